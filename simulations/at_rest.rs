//! Nothing happens: how much is sent all the same.
//!
//! Counted is what the mesh hands to its transport. What QUIC, UDP and IP add to that is measured
//! with real agents (`tests/partitions.rs`).

use std::time::Duration;

use crate::figures::with_seeds;
use crate::world::World;

#[test]
fn rest_costs_the_same_whatever_the_size() {
    let name = "rest_costs_the_same_whatever_the_size";
    for count in [16, 64, 256] {
        let rates = with_seeds(name, |seed| {
            let mut world = World::whole(seed, count);
            world.run_for(Duration::from_secs(10));
            let sent = world.bytes_sent();
            world.run_for(Duration::from_secs(30));
            assert_eq!(world.false_deaths(), 0);
            (world.bytes_sent() - sent) / 30 / count as u64
        });
        println!("{name}: {count} members: {rates:?} B/s of payload sent by each");
        assert!(rates.iter().all(|rate| *rate <= 450), "{rates:?}");
    }
}
