//! Two halves of a mesh do not reach each other for a minute.

use std::time::Duration;

use murmesh::model::MemberState;

use crate::figures::{Times, with_seeds_for};
use crate::world::{HEAL_TIME_MAX, World};

fn heal(seed: u64, count: usize) -> Duration {
    let mut world = World::whole(seed, count);
    for node in 0..count / 2 {
        world.network.groups[node] = 1;
    }
    world.run_for(Duration::from_secs(60));
    let (here, there) = (0, count - 1);
    let is_seen = |at: usize| {
        (count / 2..count).all(|other| world.state(at, other) == Some(MemberState::Down))
    };
    assert!((0..count / 2).all(is_seen), "everybody has seen the cut");
    // Both sides publish meanwhile.
    for node in [here, there] {
        world.offer(node, "during-the-cut");
    }
    let whole = world.end_faults();
    let (tick, limit) = (Duration::from_millis(50), HEAL_TIME_MAX);
    let read = world.time_until(tick, limit, |world| {
        (0..count).all(|at| {
            world.offers(at, here, "during-the-cut") && world.offers(at, there, "during-the-cut")
        })
    });
    whole + read.expect("what was published during the cut is read by all")
}

#[test]
fn parted_halves_are_whole_again_in_seconds() {
    let name = "parted_halves_are_whole_again_in_seconds";
    for count in [64, 256] {
        let healed: Times =
            with_seeds_for(count, name, |seed| heal(seed, count)).into_iter().collect();
        println!("{name}: {count} members, 60 s parted: whole after {healed}");
        assert!(healed.max() < HEAL_TIME_MAX, "{healed}");
    }
}
