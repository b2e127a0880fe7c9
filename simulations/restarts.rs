//! Agents come back: alone, without their seeds, all at once, at another address, from a backup.

use std::time::Duration;

use murmesh::mesh::MeshEvent;
use murmesh::model::{Epoch, MemberState};

use crate::figures::{Times, with_seeds};
use crate::world::World;

const TICK: Duration = Duration::from_millis(20);

#[test]
fn everybody_starts_at_once_and_sees_everybody() {
    let name = "everybody_starts_at_once_and_sees_everybody";
    for count in [64, 256] {
        let whole: Times = with_seeds(name, |seed| {
            let mut world = World::new(seed, count);
            world.start_all(Duration::from_secs(1), &[0, 1, 2]);
            let whole = world.time_until(TICK, Duration::from_secs(60), World::is_whole);
            Duration::from_secs(1) + whole.expect("all see all")
        })
        .into_iter()
        .collect();
        println!("{name}: {count} members within 1 s, 3 seeds: all see all after {whole}");
        assert!(whole.max() < Duration::from_secs(10), "{whole}");
    }
}

#[test]
fn whole_mesh_restarts_at_once() {
    let name = "whole_mesh_restarts_at_once";
    let whole: Times = with_seeds(name, |seed| {
        let mut world = World::whole(seed, 64);
        (0..64).for_each(|node| world.crash(node));
        world.run_for(Duration::from_secs(5));
        world.start_all(Duration::from_secs(1), &[0, 1, 2]);
        let whole = world.time_until(TICK, Duration::from_secs(60), World::is_whole);
        Duration::from_secs(1) + whole.expect("all see all")
    })
    .into_iter()
    .collect();
    println!("{name}: 64 members within 1 s: all see all after {whole}");
    assert!(whole.max() < Duration::from_secs(10), "{whole}");
}

#[test]
fn member_rejoins_from_memory_when_all_seeds_are_dead() {
    let name = "member_rejoins_from_memory_when_all_seeds_are_dead";
    let rejoined: Times = with_seeds(name, |seed| {
        let mut world = World::whole(seed, 64);
        (0..3).for_each(|seed| world.crash(seed));
        world.run_for(Duration::from_secs(15));
        world.crash(40);
        world.run_for(Duration::from_secs(20));
        world.start(40);
        let everywhere = |world: &World| {
            world.sees_all(40)
                && world.running().all(|at| world.state(at, 40) == Some(MemberState::Alive))
        };
        let rejoined = world.time_until(TICK, Duration::from_secs(60), everywhere);
        rejoined.expect("it is back")
    })
    .into_iter()
    .collect();
    println!("{name}: back everywhere after {rejoined}");
    assert!(rejoined.max() < Duration::from_secs(8), "{rejoined}");
}

#[test]
fn member_that_restarts_while_most_are_dead_reaches_the_living_at_once() {
    let name = "member_that_restarts_while_most_are_dead_reaches_the_living_at_once";
    with_seeds(name, |seed| {
        let mut world = World::whole(seed, 64);
        (10..60).for_each(|node| world.crash(node));
        world.run_for(Duration::from_secs(60));
        world.crash(63);
        world.run_for(Duration::from_secs(20));
        world.dial_wait_max = Duration::ZERO;
        world.start(63);
        world.run_for(Duration::from_secs(30)); // 50 dials of the dead take 10 s
        assert_eq!(world.dial_wait_max, Duration::ZERO, "nobody alive waits for them");
        assert!(world.is_whole());
    });
}

#[test]
fn restored_backup_goes_above_its_former_self() {
    let name = "restored_backup_goes_above_its_former_self";
    with_seeds(name, |seed| {
        let mut world = World::whole(seed, 16);
        let before = world.nodes[9].mesh.as_ref().map(murmesh::mesh::Mesh::epoch);
        world.crash(9);
        world.run_for(Duration::from_secs(20));
        world.nodes[9].epoch = Epoch(1_790_000_000 - 10); // the disk of an earlier day
        world.start(9);
        let everywhere = |world: &World| {
            world.sees_all(9)
                && world.running().all(|at| world.state(at, 9) == Some(MemberState::Alive))
        };
        let back = world.time_until(TICK, Duration::from_secs(60), everywhere);
        assert!(back.expect("it is back") < Duration::from_secs(10));
        assert!(world.nodes[9].mesh.as_ref().map(murmesh::mesh::Mesh::epoch) > before);
    });
}

#[test]
fn member_that_moved_is_dialled_at_its_new_address() {
    let name = "member_that_moved_is_dialled_at_its_new_address";
    let moved: Times = with_seeds(name, |seed| {
        let mut world = World::whole(seed, 16);
        world.crash(9);
        world.readdress(9, ([10, 9, 9, 9], 7000).into());
        world.start(9);
        let address = world.nodes[9].address;
        let id = world.nodes[9].id;
        let everywhere = move |world: &World| {
            world.sees_all(9)
                && world.running().all(|at| {
                    let mesh = world.nodes[at].mesh.as_ref();
                    let snapshot = mesh.map(murmesh::mesh::Mesh::snapshot).unwrap_or_default();
                    snapshot.members.get(&id).is_some_and(|view| {
                        view.address == address && view.state == MemberState::Alive
                    })
                })
        };
        world.time_until(TICK, Duration::from_secs(60), everywhere).expect("it is back")
    })
    .into_iter()
    .collect();
    println!("{name}: everywhere after {moved}");
    assert!(moved.max() < Duration::from_secs(5), "{moved}");
}

#[test]
fn paused_member_comes_back_and_drags_nobody_down() {
    let name = "paused_member_comes_back_and_drags_nobody_down";
    for (paused, count) in [(4, 32), (1, 4)] {
        for pause in [12, 45].map(Duration::from_secs) {
            let back: Times = with_seeds(name, |seed| {
                let mut world = World::whole(seed, count);
                (0..paused).for_each(|node| world.pause(node, pause));
                world.run_for(pause);
                let back = world.time_until(TICK, Duration::from_secs(60), World::is_whole);
                let healthy = world.false_deaths_seen_by(|_, member| member >= paused);
                assert_eq!(healthy, 0, "nobody who was awake is declared dead");
                back.expect("all are back")
            })
            .into_iter()
            .collect();
            println!("{name}: {paused} of {count} paused for {pause:?}: whole again after {back}");
            assert!(back.max() < Duration::from_secs(10), "{back}");
        }
    }
}

#[test]
fn goodbye_is_known_at_once_and_is_no_death() {
    let name = "goodbye_is_known_at_once_and_is_no_death";
    let known: Times = with_seeds(name, |seed| {
        let mut world = World::whole(seed, 64);
        let (id, left_at) = (world.nodes[7].id, world.now);
        world.at(7, |mesh, now| mesh.leave(now));
        world.run_for(Duration::from_millis(300));
        world.crash(7);
        world.run_for(Duration::from_secs(20));
        let left = world.first_at_each(left_at, |event| *event == MeshEvent::MemberLeft(id));
        assert_eq!(left.len(), 63);
        left.into_values().max().unwrap_or_default()
    })
    .into_iter()
    .collect();
    println!("{name}: 64 members: known to all after {known}");
    assert!(known.percentile(0.95) < Duration::from_secs(3), "{known}");
}
