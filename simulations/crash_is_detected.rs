//! A member's machine loses power: everybody knows within seconds.

use std::time::Duration;

use murmesh::mesh::MeshEvent;

use crate::figures::{Times, with_seeds_for};
use crate::world::World;

const PATIENCE: Duration = Duration::from_secs(25);

/// When 99 % of the members, and when all, knew of a crash.
fn crash(seed: u64, count: usize, loss: f64) -> (Duration, Duration) {
    let mut world = World::whole(seed, count);
    world.network.loss = loss;
    world.run_for(Duration::from_secs(3));
    let victim = (seed as usize * 7) % count;
    let (id, crashed_at) = (world.nodes[victim].id, world.now);
    world.crash(victim);
    world.run_for(PATIENCE);
    let is_down =
        |event: &MeshEvent| matches!(event, MeshEvent::MemberDown { member, .. } if *member == id);
    let known = world.first_at_each(crashed_at, is_down);
    assert_eq!(known.len(), count - 1, "of {} members some never learnt it", count - 1);
    assert_eq!(world.false_deaths(), 0);
    let times: Times = known.into_values().collect();
    (times.percentile(0.99), times.max())
}

fn crashes(name: &str, count: usize, loss: f64, most: Duration, all: Duration) {
    let runs = with_seeds_for(count, name, |seed| crash(seed, count, loss));
    let at_most: Times = runs.iter().map(|(most, _)| *most).collect();
    let at_all: Times = runs.iter().map(|(_, all)| *all).collect();
    println!("{name}: N = {count}, loss {loss}: known to 99 %: {at_most}; to all: {at_all}");
    // Of fewer runs the 95th percentile is the slowest, and one late probe decides.
    let most = if runs.len() < 20 { all } else { most };
    assert!(at_most.percentile(0.95) <= most, "99 % of the members: {at_most}");
    assert!(at_all.max() <= all, "all members: {at_all}");
}

#[test]
fn crash_is_known_to_64_within_seconds() {
    let name = "crash_is_known_to_64_within_seconds";
    crashes(name, 64, 0.0, Duration::from_secs(7), Duration::from_secs(10));
}

#[test]
fn crash_is_known_to_256_within_seconds() {
    let name = "crash_is_known_to_256_within_seconds";
    crashes(name, 256, 0.0, Duration::from_secs(7), Duration::from_secs(10));
}

#[test]
fn crash_is_known_despite_loss_of_a_quarter() {
    let name = "crash_is_known_despite_loss_of_a_quarter";
    crashes(name, 64, 0.25, Duration::from_secs(9), Duration::from_secs(13));
    crashes(name, 256, 0.25, Duration::from_secs(9), Duration::from_secs(13));
}
