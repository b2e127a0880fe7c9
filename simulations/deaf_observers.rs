//! Some members are deaf for seconds at a time, while their timers run: the sick accuse nobody.

use std::time::Duration;

use crate::figures::with_seeds;
use crate::world::World;

#[test]
fn deaf_members_convict_nobody() {
    let name = "deaf_members_convict_nobody";
    let deaths = with_seeds(name, |seed| {
        let mut world = World::whole(seed, 128);
        let deaf_for = Duration::from_secs([16, 4, 8][seed as usize % 3]);
        (0..16).for_each(|node| world.network.deaf[node] = Some(deaf_for));
        world.run_for(Duration::from_secs(90));
        let healthy = world.false_deaths_seen_by(|seen_by, member| seen_by >= 16 && member >= 16);
        let by_deaf = world.false_deaths_seen_by(|seen_by, member| seen_by < 16 && member >= 16);
        println!(
            "{name}: 16 of 128 deaf for {deaf_for:?} at a time, 90 s: false deaths of hearing \
             members: {healthy} at hearing ones, {by_deaf} at deaf ones"
        );
        world.end_faults();
        healthy + by_deaf
    });
    assert_eq!(deaths.iter().sum::<usize>(), 0);
}
