//! Bytes under way while something dies: an exact prefix arrives once, and no cut looks complete.

use std::time::Duration;

use super::fleet::Fleet;
use super::machine::Weather;
use crate::figures::{with_enough_seeds, with_seeds};

const LEN: u64 = 3_000_000;
const CALLS: usize = 12;
/// Seeds that a share of calls is taken of.
const SHARE_SEEDS_MIN: u64 = 25;

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// Four nodes with bytes under way from the first to the others.
fn in_the_middle(seed: u64) -> Fleet<'static> {
    let mut fleet = Fleet::whole(seed, 4);
    (0..CALLS).for_each(|_| fleet.call(0, LEN));
    fleet.until("bytes flow", secs(10), |fleet| fleet.calls_under_way() >= CALLS / 2);
    fleet
}

#[test]
fn a_kill_of_the_callers_machine_frees_every_instance() {
    with_seeds("a_kill_of_the_callers_machine_frees_every_instance", |seed| {
        let mut fleet = in_the_middle(seed);
        fleet.kill(0);
        assert!(fleet.being_served() > 0, "no transfer was in the middle");
        // 2.4 s of silence, noticed at the next look.
        fleet.until("no instance waits any more", secs(3), |fleet| fleet.being_served() == 0);
        fleet.start(0);
        fleet.until("it is back", secs(20), Fleet::is_whole);
        (0..10).for_each(|_| fleet.call(0, 1_000));
        assert_eq!(fleet.settle_calls(), (10, 0));
    });
}

#[test]
fn a_kill_of_an_instance_cuts_its_calls_and_no_others() {
    let name = "a_kill_of_an_instance_cuts_its_calls_and_no_others";
    with_seeds(name, |seed| {
        let mut fleet = in_the_middle(seed);
        let victim = (1..4).max_by_key(|&index| fleet.delivered_at(index)).expect("three");
        let hit = fleet.delivered_at(victim);
        fleet.kill_application(victim);
        let (well, cut) = fleet.settle_calls();
        println!("{name}: seed {seed}: {well} whole, {cut} cut of {hit} at the instance");
        assert_eq!(well + cut, CALLS, "every call has an end");
        assert!(cut > 0 && cut <= hit, "{cut} of {hit} cut");
        // Its agent lives, and refuses: nobody notices.
        fleet.call_for(0, 1_000, Duration::from_millis(50), secs(3));
        let (_, cut_later) = fleet.settle_calls();
        assert_eq!(cut_later, cut, "a call failed although two instances live");
        fleet.start_application(victim);
        fleet.run_for(secs(9)); // it is avoided for 8 s at most
        let before = fleet.delivered_at(victim);
        fleet.call_for(0, 1_000, Duration::from_millis(50), secs(2));
        assert!(fleet.delivered_at(victim) > before, "it is used again");
    });
}

#[test]
fn a_path_that_narrows_under_a_transfer_cuts_nothing() {
    with_seeds("a_path_that_narrows_under_a_transfer_cuts_nothing", |seed| {
        let mut fleet = in_the_middle(seed);
        fleet.set_weather(Weather { len_max: 1_252, ..Weather::FAIR });
        assert_eq!(fleet.settle_calls(), (CALLS, 0));
    });
}

#[test]
fn lost_doubled_and_damaged_packets_damage_no_byte() {
    let name = "lost_doubled_and_damaged_packets_damage_no_byte";
    let ended = with_enough_seeds(SHARE_SEEDS_MIN, name, |seed| {
        let mut fleet = Fleet::whole(seed, 3);
        fleet.set_weather(Weather { lost: 0.05, doubled: 0.2, damaged: 0.05, ..Weather::FAIR });
        (0..4).for_each(|_| fleet.call(0, 300_000));
        fleet.settle_calls()
    });
    let well: usize = ended.iter().map(|(well, _)| well).sum();
    let all = ended.len() * 4;
    println!("{name}: {well} of {all} whole, every other one was told that it was cut");
    // Of one seed alone the calls share their fate.
    let is_share = ended.len() as u64 >= SHARE_SEEDS_MIN;
    assert!(!is_share || well * 10 >= all * 9, "{well} of {all}");
}
