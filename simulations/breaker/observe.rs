//! The same with whole nodes: observations signed, spread and weighed by real meshes.

use std::time::Duration;

use murmesh::breaker::{InstanceChange, InstanceKey, OwnWindow, SharedEvent, Verdict, Window};
use murmesh::mesh::MeshEvent;
use murmesh::model::{EntryKind, Moment};

use crate::figures::{Times, with_seeds};
use crate::world::World;

fn window(samples: u16, failures: u16, age: Duration) -> Window {
    Window {
        samples,
        failures,
        first_failure_age: (failures > 0).then_some(age),
        last_failure_age: (failures > 0).then_some(age),
        last_success_age: (failures == 0).then_some(age),
    }
}

/// Nodes 0 and 1 serve; all others call both.
struct Called {
    world: World,
    count: usize,
}

impl Called {
    fn new(seed: u64, count: usize) -> Self {
        let mut world = World::whole(seed, count);
        (0..2).for_each(|server| world.offer(server, "web"));
        world.run_for(Duration::from_secs(3));
        let mut called = Self { world, count };
        for caller in 2..count {
            called.give(
                caller,
                &[(0, window(5, 0, Duration::ZERO)), (1, window(5, 0, Duration::ZERO))],
            );
        }
        called.world.run_for(Duration::from_secs(15));
        called
    }

    fn give(&mut self, caller: usize, seen: &[(usize, Window)]) {
        let windows: Vec<_> = seen
            .iter()
            .map(|(server, window)| OwnWindow {
                key: self.key(*server),
                service: "web".parse().expect("a name"),
                window: *window,
                turned_away_at: None,
            })
            .collect();
        self.world.at(caller, |mesh, now| mesh.handle_windows(now, windows));
    }

    fn key(&self, server: usize) -> InstanceKey {
        let member = self.world.nodes[server].id;
        InstanceKey { member, instance: "web".parse().expect("a name") }
    }

    /// Half of the callers see instance 0 fail three times within 300 ms, one after the other.
    fn die(&mut self) -> Moment {
        let began_at = self.world.now;
        let accusers = (self.count - 2).div_ceil(2);
        for caller in 2..2 + accusers {
            let seen = [(0, window(3, 3, Duration::ZERO)), (1, window(5, 0, Duration::ZERO))];
            self.give(caller, &seen);
            self.world.run_for(Duration::from_millis(300) / accusers as u32);
        }
        began_at
    }
}

#[test]
fn accusation_reaches_all_and_ejects_everywhere_within_a_second_of_it() {
    let name = "accusation_reaches_all_and_ejects_everywhere";
    for count in [8, 24, 50] {
        let runs = with_seeds(name, |seed| {
            let mut called = Called::new(seed, count);
            let began_at = called.die();
            called.world.run_for(Duration::from_secs(5));
            let key = called.key(0);
            let ejected = called.world.first_at_each(began_at, |event| {
                matches!(event, MeshEvent::Breaker(SharedEvent::Instance { key: of, change: InstanceChange::Ejected(_), .. }) if *of == key)
            });
            assert_eq!(ejected.len(), count, "all eject it");
            let snapshot = called.world.at(count - 1, |mesh, _| mesh.snapshot());
            let service = "web".parse().expect("a name");
            let words: Vec<_> =
                snapshot.endpoints(&service).iter().map(|one| one.state_word()).collect();
            let verdicts = snapshot.endpoints(&service).iter().filter(|one| {
                matches!(one.verdict, Verdict::Ejected(_)) && one.member == key.member
            });
            assert_eq!(verdicts.count(), 1, "{words:?}");
            ejected.into_values().collect::<Vec<_>>()
        });
        let times: Times = runs.into_iter().flatten().collect();
        println!("{name}: {count} members: since the first failure {times}");
        // Six failures take their time of these 300 ms, the rebuttal another 300 ms.
        assert!(times.max() < Duration::from_millis(1_300), "{times}");
    }
}

fn is_ejection(event: &MeshEvent) -> bool {
    let MeshEvent::Breaker(SharedEvent::Instance { change, .. }) = event else { return false };
    matches!(change, InstanceChange::Ejected(_))
}

/// Half of the callers see an instance fail just after they were cut off from the rest, 5 minutes long.
#[test]
fn word_that_a_partition_held_back_ejects_nothing() {
    with_seeds("word_that_a_partition_held_back", |seed| {
        let (count, cut) = (16, 9..16);
        let mut called = Called::new(seed, count);
        for node in cut.clone() {
            called.world.network.groups[node] = 1;
        }
        let cut_at = called.world.now;
        for caller in cut.clone() {
            called.give(caller, &[(0, window(3, 3, Duration::ZERO))]);
        }
        called.world.run_for(Duration::from_secs(300));
        let ejected = called.world.first_at_each(cut_at, is_ejection);
        assert!(ejected.keys().all(|node| cut.contains(node)), "{ejected:?}");
        assert!(!ejected.is_empty(), "it was a quorum among those that were cut off");
        let healed_at = called.world.now;
        called.world.end_faults();
        called.world.run_for(Duration::from_secs(20));
        let ejected = called.world.first_at_each(healed_at, is_ejection);
        assert!(ejected.is_empty(), "{ejected:?}");
    });
}

/// A member begins anew a minute after half of the callers have seen an instance fail.
#[test]
fn member_that_begins_anew_believes_no_word_of_before() {
    with_seeds("member_that_begins_anew", |seed| {
        let count = 16;
        let mut called = Called::new(seed, count);
        called.die();
        called.world.run_for(Duration::from_secs(60));
        called.world.crash(15);
        called.world.run_for(Duration::from_secs(1));
        called.world.start(15);
        let began_at = called.world.now;
        called.world.run_for(Duration::from_secs(30));
        let ejected = called.world.first_at_each(began_at, is_ejection);
        assert!(!ejected.contains_key(&15), "{ejected:?}");
    });
}

#[test]
fn word_about_failures_is_with_all_in_a_tenth_of_a_second() {
    let name = "word_about_failures";
    for count in [16, 50] {
        let runs = with_seeds(name, |seed| {
            let mut called = Called::new(seed, count);
            let kind = EntryKind::OBSERVATIONS;
            let owner = called.world.nodes[2].id;
            let told = |called: &mut Called| {
                let all = (0..count).filter(|at| {
                    called.world.at(*at, |mesh, _| {
                        let mut entries = mesh.entries_of(kind).filter(|e| e.key().owner == owner);
                        entries.next().map(|entry| entry.version())
                    }) == called.world.at(2, |mesh, _| {
                        let mut entries = mesh.entries_of(kind).filter(|e| e.key().owner == owner);
                        entries.next().map(|entry| entry.version())
                    })
                });
                all.count()
            };
            let seen = [(0, window(1, 1, Duration::ZERO)), (1, window(5, 0, Duration::ZERO))];
            called.give(2, &seen);
            let (mut most, mut all) = (None, None);
            for step in 1..=1_000_u64 {
                called.world.run_for(Duration::from_millis(10));
                let heard = told(&mut called);
                let after = Duration::from_millis(10 * step);
                if heard * 20 >= count * 19 {
                    most.get_or_insert(after);
                }
                if heard == count {
                    all = Some(after);
                    break;
                }
            }
            (most.expect("most hear of it"), all.expect("all hear of it"))
        });
        println!("{name}: {count} members: 95 % and all after {runs:?}");
        assert!(runs.iter().all(|(most, _)| *most <= Duration::from_millis(100)), "{runs:?}");
    }
}
