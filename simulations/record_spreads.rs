//! A member serves something new: all know at once.

use std::time::Duration;

use crate::figures::{Times, with_seeds, with_seeds_for};
use crate::world::World;

fn spread(seed: u64, count: usize, loss: f64) -> Vec<Duration> {
    let mut world = World::whole(seed, count);
    world.network.loss = loss;
    world.run_for(Duration::from_secs(2));
    let owner = (seed as usize * 5) % count;
    let published_at = world.now;
    world.offer(owner, "web");
    world.run_for(Duration::from_secs(30));
    let first = world.first_at_each(published_at, |event| world.is_offer(event, owner, "web"));
    assert_eq!(first.len(), count, "all know, sooner or later");
    first.into_values().collect()
}

#[test]
fn new_record_reaches_all_within_a_second() {
    let name = "new_record_reaches_all_within_a_second";
    for count in [64, 256] {
        let runs = with_seeds_for(count, name, |seed| spread(seed, count, 0.0));
        let times: Times = runs.into_iter().flatten().collect();
        let p99 = times.percentile(0.99);
        println!("{name}: {count} members: p99 {:.2} s, {times}", p99.as_secs_f64());
        assert!(p99 < Duration::from_secs(1), "{times}");
    }
}

#[test]
fn new_record_reaches_all_despite_loss_of_a_quarter() {
    let name = "new_record_reaches_all_despite_loss_of_a_quarter";
    let runs = with_seeds(name, |seed| spread(seed, 64, 0.25));
    let times: Times = runs.into_iter().flatten().collect();
    println!("{name}: 64 members: {times}");
    assert!(times.percentile(0.95) < Duration::from_secs(2), "{times}");
}
