//! Cuts of odd shapes: who can reach an instance reaches it, and all is whole after the heal.

use std::time::Duration;

use murmesh::telemetry::EventKind;

use super::fleet::Fleet;
use crate::figures::{Times, with_seeds};

const NODES: usize = 6;
const ALL: [usize; NODES] = [0, 1, 2, 3, 4, 5];
const HEAL_TIME_MAX: Duration = Duration::from_secs(15);

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Runs `cut` in a mesh of six; then nobody of `callers` may fail to reach an instance for a while,
/// and after the heal all must be whole. What stood on the links that are cut ends first.
fn survives(name: &str, callers: &[usize], cut: impl Fn(&mut Fleet<'_>)) {
    let healed: Times = with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, NODES);
        callers.iter().for_each(|&from| fleet.call(from, 1_000)); // connections that are cut then
        fleet.run_for(secs(1));
        cut(&mut fleet);
        fleet.run_for(secs(5));
        let (_, cut_at_first) = fleet.settle_calls();
        for _ in 0..30 {
            callers.iter().for_each(|&from| fleet.call(from, 1_000));
            fleet.run_for(secs(1));
        }
        let (_, cut_later) = fleet.settle_calls();
        assert_eq!(cut_later, cut_at_first, "a call failed although an instance could be reached");
        fleet.heal_all();
        fleet.until("all see all", HEAL_TIME_MAX, Fleet::is_whole)
    })
    .into_iter()
    .collect();
    println!("{name}: all see all {healed} after the heal");
}

#[test]
fn three_islands_serve_themselves_and_meet_again() {
    survives("three_islands_serve_themselves_and_meet_again", &ALL, |fleet| {
        fleet.cut(&[0, 1]);
        fleet.cut(&[2, 3]);
    });
}

#[test]
fn an_island_inside_an_island_is_found_again() {
    survives("an_island_inside_an_island_is_found_again", &[0, 1, 3, 4, 5], |fleet| {
        fleet.cut(&[0, 1, 2]);
        fleet.run_for(secs(20));
        fleet.cut(&[2]);
        fleet.run_for(secs(20));
        fleet.heal(&[2]);
        fleet.cut(&[0, 1, 2]);
        fleet.until("the island is whole", secs(20), |fleet| fleet.is_whole_among(&[0, 1, 2]));
    });
}

#[test]
fn a_bridge_keeps_both_sides_in_sight() {
    survives("a_bridge_keeps_both_sides_in_sight", &ALL, |fleet| {
        for left in [0, 1] {
            [3, 4, 5].into_iter().for_each(|right| fleet.cut_link(left, right));
        }
        fleet.run_for(secs(10));
        let downs = fleet.count(EventKind::MemberDown, None);
        fleet.run_for(secs(10));
        let later = fleet.count(EventKind::MemberDown, None);
        assert_eq!(later, downs, "the bridge speaks for both sides, for ever");
        fleet.until("each side is whole with the bridge", secs(15), |fleet| {
            fleet.is_whole_among(&[0, 1, 2]) && fleet.is_whole_among(&[2, 3, 4, 5])
        });
    });
}

#[test]
fn who_hears_nobody_is_called_by_nobody() {
    survives("who_hears_nobody_is_called_by_nobody", &[0, 1, 2, 3, 4], |fleet| {
        fleet.cut_to(5);
        fleet.run_for(secs(15));
    });
}

#[test]
fn half_connected_links_take_nobody_out() {
    survives("half_connected_links_take_nobody_out", &ALL, |fleet| {
        // Each hears one neighbour that does not hear it.
        (0..NODES).for_each(|index| fleet.cut_way(index, (index + 1) % NODES));
        fleet.run_for(secs(20));
        assert_eq!(fleet.count(EventKind::MemberDown, None), 0, "who answers others is not dead");
    });
}
