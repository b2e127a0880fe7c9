//! A quarter of all packets is lost: nobody dies of it.

use std::time::Duration;

use crate::figures::with_seeds;
use crate::world::World;

#[test]
fn quarter_of_loss_kills_nobody() {
    let name = "quarter_of_loss_kills_nobody";
    let deaths = with_seeds(name, |seed| {
        let mut world = World::whole(seed, 64);
        world.network.loss = 0.25;
        let sent = world.bytes_sent();
        world.run_for(Duration::from_secs(300));
        let rate = (world.bytes_sent() - sent) / 300 / 64;
        println!(
            "{name}: 64 members, 300 s: {} false deaths, {rate} B/s each",
            world.false_deaths()
        );
        world.end_faults();
        world.false_deaths()
    });
    assert_eq!(deaths.iter().sum::<usize>(), 0);
}

#[test]
fn late_doubled_and_reordered_packets_kill_nobody() {
    let name = "late_doubled_and_reordered_packets_kill_nobody";
    let deaths = with_seeds(name, |seed| {
        let mut world = World::whole(seed, 32);
        world.network.delay = (Duration::from_millis(1), Duration::from_millis(80));
        world.network.duplication = 0.2;
        world.run_for(Duration::from_secs(120));
        assert!(world.is_whole());
        world.end_faults();
        world.false_deaths()
    });
    println!("{name}: 32 members, 120 s: {deaths:?} false deaths");
    assert_eq!(deaths.iter().sum::<usize>(), 0);
}
