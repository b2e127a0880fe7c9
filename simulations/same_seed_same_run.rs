//! Determinism: without it a failing seed could not be repeated.

use std::time::Duration;

use murmesh::mesh::MeshEvent;
use murmesh::model::Moment;

use crate::world::World;

fn run(seed: u64) -> Vec<(Moment, usize, MeshEvent)> {
    let mut world = World::new(seed, 24);
    world.network.loss = 0.1;
    world.start_all(Duration::from_secs(1), &[0, 1]);
    world.run_for(Duration::from_secs(5));
    world.crash(3);
    world.network.groups[4] = 1;
    world.run_for(Duration::from_secs(10));
    world.network.groups[4] = 0;
    world.start(3);
    world.run_for(Duration::from_secs(20));
    world.log
}

#[test]
fn same_seed_gives_the_same_run() {
    assert_eq!(run(5), run(5));
    assert_ne!(run(5), run(6));
}
