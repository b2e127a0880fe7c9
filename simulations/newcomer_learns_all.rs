//! One machine more: it sees everybody, and everybody sees it, at once.

use std::time::Duration;

use murmesh::model::MemberState;

use crate::figures::{Times, with_seeds_for};
use crate::world::World;

fn join(seed: u64, count: usize, loss: f64) -> (Duration, Duration) {
    let mut world = World::whole(seed, count);
    world.network.loss = loss;
    let newcomer = world.enrol();
    world.nodes[newcomer].seeds = vec![world.nodes[0].address, world.nodes[1].address];
    world.start(newcomer);
    let (tick, limit) = (Duration::from_millis(5), Duration::from_secs(20));
    let sees = world.time_until(tick, limit, |world| world.sees_all(newcomer));
    let seen = |world: &World| {
        world.running().all(|at| world.state(at, newcomer) == Some(MemberState::Alive))
    };
    let is_seen = world.time_until(tick, limit, seen);
    let sees = sees.expect("the newcomer sees all");
    (sees, sees + is_seen.expect("all see the newcomer"))
}

#[test]
fn newcomer_sees_all_within_a_second() {
    let name = "newcomer_sees_all_within_a_second";
    for count in [64, 256] {
        let runs = with_seeds_for(count, name, |seed| join(seed, count, 0.0));
        let sees: Times = runs.iter().map(|(sees, _)| *sees).collect();
        let seen: Times = runs.iter().map(|(_, seen)| *seen).collect();
        println!("{name}: joins {count}: sees all: {sees}; seen by all: {seen}");
        assert!(sees.max() < Duration::from_secs(1), "{sees}");
        assert!(seen.max() < Duration::from_secs(8), "{seen}");
    }
}
