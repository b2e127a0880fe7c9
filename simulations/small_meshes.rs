//! Two and three members: too few to listen to, enough to be a mesh.

use std::time::Duration;

use murmesh::mesh::MeshEvent;
use murmesh::model::MemberState;

use crate::figures::{Times, with_seeds};
use crate::world::World;

const TICK: Duration = Duration::from_millis(20);
const LIMIT: Duration = Duration::from_secs(60);
/// Lengths of cuts, in seconds: some end before anybody is convicted, some long after.
const CUTS: [u64; 5] = [2, 10, 30, 120, 600];

#[test]
fn lone_member_takes_part_at_once() {
    let mut world = World::new(1, 1);
    world.start(0);
    assert!(world.nodes[0].mesh.as_ref().is_some_and(murmesh::mesh::Mesh::is_settled));
    world.run_for(Duration::from_secs(10));
    assert_eq!(world.bytes_sent(), 0, "there is nobody to talk to");
}

#[test]
fn two_and_three_members_find_each_other_and_see_death_and_return() {
    let name = "two_and_three_members_find_each_other_and_see_death_and_return";
    for count in [2, 3] {
        let runs = with_seeds(name, |seed| {
            let mut world = World::new(seed, count);
            world.start(0);
            (1..count).for_each(|node| {
                world.nodes[node].seeds = vec![world.nodes[0].address];
                world.start(node);
            });
            let whole = world.time_until(TICK, LIMIT, World::is_whole).expect("they meet");
            world.run_for(Duration::from_secs(10));
            world.crash(count - 1);
            let is_down = |world: &World| {
                world.running().all(|at| world.state(at, count - 1) == Some(MemberState::Down))
            };
            let down = world.time_until(TICK, LIMIT, is_down).expect("its death is seen");
            world.run_for(Duration::from_secs(20));
            world.start(count - 1);
            let back = world.time_until(TICK, LIMIT, World::is_whole).expect("it is back");
            assert_eq!(world.false_deaths(), 0);
            [whole, down, back]
        });
        let times = |index: usize| runs.iter().map(move |run| run[index]).collect::<Times>();
        println!(
            "{name}: {count} members: whole {}; death seen {}; back {}",
            times(0),
            times(1),
            times(2)
        );
        assert!(times(0).max() < Duration::from_secs(2), "{}", times(0));
        assert!(times(1).max() < Duration::from_secs(12), "{}", times(1));
        assert!(times(2).max() < Duration::from_secs(5), "{}", times(2));
    }
}

#[test]
fn two_and_three_members_meet_again_however_long_the_cut() {
    let name = "two_and_three_members_meet_again_however_long_the_cut";
    for (count, seconds) in [2, 3].into_iter().flat_map(|n| CUTS.map(|seconds| (n, seconds))) {
        let runs = with_seeds(name, |seed| {
            let mut world = World::whole(seed, count);
            world.network.groups[0] = 1;
            let before = world.invariants.messages;
            world.run_for(Duration::from_secs(seconds));
            let messages = world.invariants.messages - before;
            if seconds >= 30 {
                assert_eq!(world.state(0, 1), Some(MemberState::Down));
                assert_eq!(world.state(1, 0), Some(MemberState::Down));
            }
            world.network.groups[0] = 0;
            let healed = world.time_until(TICK, LIMIT, World::is_whole);
            (healed.expect("they meet again"), messages as f64 / (seconds * count as u64) as f64)
        });
        let healed: Times = runs.iter().map(|(healed, _)| *healed).collect();
        let rate = runs.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
        println!(
            "{name}: {count} members, {seconds} s: after {healed}; {rate:.2} messages/s meanwhile"
        );
        assert!(healed.max() < Duration::from_secs(15), "{count} members, {seconds} s: {healed}");
        // Once all is known, what is sent are dials: of a member and of its seed, every 3 s each.
        assert!(seconds < 600 || rate < 1.5, "{count} members: {rate:.2} messages/s");
    }
}

#[test]
fn one_of_four_cut_off_is_alive_for_all_soon_after_the_heal_and_accused_by_nobody_again() {
    let name =
        "one_of_four_cut_off_is_alive_for_all_soon_after_the_heal_and_accused_by_nobody_again";
    for seconds in [2, 10, 30] {
        let healed: Times = with_seeds(name, |seed| {
            let mut world = World::whole(seed, 4);
            world.network.groups[3] = 1;
            world.run_for(Duration::from_secs(seconds));
            world.network.groups[3] = 0;
            let are_alive = |world: &World| {
                let sees = |at| (0..4).all(|of| world.state(at, of) == Some(MemberState::Alive));
                (0..4).all(sees)
            };
            let healed = world.time_until(TICK, LIMIT, are_alive).unwrap_or_else(|| {
                let seen = |at| (0..4).map(|of| world.state(at, of)).collect::<Vec<_>>();
                panic!("{seconds} s: {:#?}", (0..4).map(seen).collect::<Vec<_>>())
            });
            let whole = world.now;
            world.run_for(Duration::from_secs(30));
            let accused = world.first_at_each(whole, |event| {
                matches!(event, MeshEvent::MemberSuspect(_) | MeshEvent::MemberDown { .. })
            });
            assert!(accused.is_empty(), "{seconds} s: who accuses somebody, and when: {accused:?}");
            healed
        })
        .into_iter()
        .collect();
        println!("{name}: {seconds} s: after {healed}");
        assert!(healed.max() < Duration::from_secs(15), "{seconds} s: {healed}");
    }
}
