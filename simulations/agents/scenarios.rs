//! Faults, one at a time, under whole agents.

use std::time::Duration;

use murmesh::model::MemberState;
use murmesh::telemetry::EventKind;
use murmesh::{MemberPhase, Stopped};

use super::fleet::Fleet;
use super::machine::Weather;
use crate::figures::{Times, with_seeds};

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

const PAUSE: Duration = Duration::from_millis(50);

#[test]
fn same_seed_gives_the_same_events() {
    let run = |seed| {
        let mut fleet = Fleet::whole(seed, 4);
        fleet.call_for(0, 20_000, PAUSE, secs(2));
        fleet.kill(2);
        fleet.call_for(0, 20_000, PAUSE, secs(10));
        fleet.start(2);
        fleet.run_for(secs(10));
        fleet.into_log()
    };
    let (first, second) = (run(5), run(5));
    assert!(first.len() > 20, "{first:#?}");
    for (number, (one, other)) in first.iter().zip(&second).enumerate() {
        assert_eq!(one, other, "event {number}");
    }
    assert_eq!(first.len(), second.len());
    assert_ne!(first, run(6));
}

#[test]
fn agents_join_and_carry_calls() {
    with_seeds("agents_join_and_carry_calls", |seed| {
        let mut fleet = Fleet::whole(seed, 5);
        (0..50).for_each(|number| fleet.call(number % 5, 40_000));
        assert_eq!(fleet.settle_calls(), (50, 0));
        assert_eq!(fleet.stop(4, MemberPhase::Left), Stopped::Drained);
        let left = |by| move |fleet: &Fleet<'_>| fleet.state(by, 4) == Some(MemberState::Left);
        for by in 0..4 {
            fleet.until("its leave is known", secs(3), left(by));
        }
        assert_eq!(fleet.count(EventKind::MemberDown, None), 0, "nobody was taken for dead");
    });
}

#[test]
fn a_connection_lasts_as_long_as_its_ends_want() {
    with_seeds("a_connection_lasts_as_long_as_its_ends_want", |seed| {
        let mut fleet = Fleet::whole(seed, 3);
        fleet.call_slowly(0, 30_000, secs(50)); // nothing for 50 s, four times
        fleet.call_slowly(0, 2_000_000, secs(1)); // four minutes of traffic
        fleet.run_for(secs(300));
        assert_eq!(fleet.settle_calls(), (2, 0), "nobody has ended or cut them");
    });
}

#[test]
fn a_newcomer_sees_all_and_is_used() {
    let name = "a_newcomer_sees_all_and_is_used";
    let seen: Times = with_seeds(name, |seed| {
        let mut fleet = Fleet::whole_but_last(seed, 6);
        fleet.start(5);
        let seen = fleet.until("all see all", secs(10), Fleet::is_whole);
        let before = fleet.delivered_at(5);
        fleet.call_for(0, 1_000, PAUSE, secs(3));
        assert!(fleet.delivered_at(5) > before, "it gets its share of the calls");
        seen
    })
    .into_iter()
    .collect();
    println!("{name}: 6th of 6, all see all {seen} after its start");
    assert!(seen.max() < secs(3), "{seen}");
}

#[test]
fn a_killed_agent_is_avoided_and_welcome_again() {
    let name = "a_killed_agent_is_avoided_and_welcome_again";
    let back: Times = with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, 5);
        fleet.call_for(0, 1_000, PAUSE, secs(1)); // connections to everybody
        fleet.kill(2);
        fleet.call_for(0, 1_000, PAUSE, secs(1));
        let (_, cut) = fleet.settle_calls();
        fleet.call_for(0, 1_000, PAUSE, secs(5));
        assert_eq!(fleet.settle_calls().1, cut, "a call failed over a second after the kill");
        let down = |fleet: &Fleet<'_>| fleet.state(1, 2) == Some(MemberState::Down);
        fleet.until("it is taken for dead", secs(15), down);
        fleet.start(2);
        fleet.until("it is back under its name", secs(15), Fleet::is_whole)
    })
    .into_iter()
    .collect();
    println!("{name}: whole again {back} after its start");
    // One in ten: somebody's last failure with it is remembered for 10 s after it is back.
    assert!(back.percentile(0.5) < secs(1), "{back}");
}

#[test]
fn a_kill_in_the_middle_of_transfers_loses_doubles_and_damages_nothing() {
    let name = "a_kill_in_the_middle_of_transfers_loses_doubles_and_damages_nothing";
    with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, 4);
        for round in 0..3 {
            let victim = 1 + round;
            (0..12).for_each(|_| fleet.call(0, 3_000_000));
            fleet.until("bytes flow", secs(10), |fleet| fleet.calls_under_way() >= 6);
            fleet.kill(victim);
            let (well, cut) = fleet.settle_calls();
            assert_eq!(well + cut, 12 * (round + 1), "every call has an end");
            fleet.start(victim);
            fleet.until("it is back", secs(20), Fleet::is_whole);
        }
        let (well, cut) = fleet.settle_calls();
        println!("{name}: seed {seed}: {well} whole, {cut} cut, none doubled");
        assert!(well > 0 && cut > 0, "{well} whole, {cut} cut: no transfer was in the middle");
    });
}

#[test]
fn an_agent_that_moves_is_found_at_its_new_address() {
    let name = "an_agent_that_moves_is_found_at_its_new_address";
    let found: Times = with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, 5);
        fleet.kill(3);
        fleet.run_for(secs(1));
        fleet.start_elsewhere(3);
        let found = fleet.until("it is found", secs(20), Fleet::is_whole);
        let before = fleet.delivered_at(3);
        fleet.call_for(0, 1_000, PAUSE, secs(4));
        assert!(fleet.delivered_at(3) > before, "it is called where it is now");
        found
    })
    .into_iter()
    .collect();
    println!("{name}: {found} after its start");
    assert!(found.max() < secs(10), "{found}");
}

#[test]
fn halves_meet_again() {
    let name = "halves_meet_again";
    let healed: Times = with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, 6);
        fleet.cut(&[0, 1, 2]);
        fleet.run_for(secs(60));
        fleet.heal(&[0, 1, 2]);
        fleet.until("all see all", secs(60), Fleet::is_whole)
    })
    .into_iter()
    .collect();
    println!("{name}: 3 and 3 of 6, cut for 60 s: {healed} after the heal");
    assert!(healed.max() < secs(15), "{healed}");
}

#[test]
fn a_ring_of_broken_links_takes_nobody_out() {
    let name = "a_ring_of_broken_links_takes_nobody_out";
    with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, 6);
        // Nobody is cut off: each has lost the way to one neighbour.
        (0..6).for_each(|a| fleet.cut_link(a, (a + 1) % 6));
        fleet.run_for(secs(5)); // what had stood on those links is gone
        let (_, cut) = fleet.settle_calls();
        for _ in 0..5 {
            (0..6).for_each(|from| fleet.call(from, 1_000));
            fleet.run_for(secs(6));
        }
        let (_, cut_later) = fleet.settle_calls();
        assert_eq!(cut_later, cut, "a call failed although instances could be reached");
        let downs = fleet.count(EventKind::MemberDown, None);
        assert_eq!(downs, 0, "who answers others was taken for dead");
        (0..6).for_each(|a| fleet.heal_link(a, (a + 1) % 6));
        fleet.until("all see all", secs(15), Fleet::is_whole);
    });
}

#[test]
fn a_one_way_cut_ends_in_one_view() {
    with_seeds("a_one_way_cut_ends_in_one_view", |seed| {
        let mut fleet = Fleet::whole(seed, 6);
        fleet.cut_from(5); // it hears everybody, and nobody hears it
        fleet.run_for(secs(20));
        fleet.call_for(0, 1_000, PAUSE, secs(2));
        assert_eq!(fleet.settle_calls().1, 0, "nobody calls an instance behind a deaf link");
        fleet.heal(&[5]);
        fleet.until("all see all", secs(15), Fleet::is_whole);
    });
}

#[test]
fn everybody_comes_back_without_any_seed() {
    let name = "everybody_comes_back_without_any_seed";
    let back: Times = with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, 5);
        fleet.run_for(secs(5)); // what is remembered is on disk
        fleet.kill(0); // the only address that anybody was given
        fleet.kill(3);
        fleet.run_for(secs(1));
        fleet.start(3);
        let whole = |fleet: &Fleet<'_>| fleet.is_whole_among(&[1, 2, 3, 4]);
        fleet.until("it is back from its disk", secs(20), whole)
    })
    .into_iter()
    .collect();
    println!("{name}: {back} after its start, with every seed dead");
    assert!(back.max() < secs(10), "{back}");
}

#[test]
fn a_quarter_of_all_packets_lost_kills_nobody() {
    with_seeds("a_quarter_of_all_packets_lost_kills_nobody", |seed| {
        let mut fleet = Fleet::whole(seed, 6);
        fleet.set_weather(Weather { lost: 0.25, ..Weather::FAIR });
        fleet.call_for(0, 10_000, Duration::from_millis(500), secs(60));
        fleet.settle_calls();
        assert_eq!(fleet.count(EventKind::MemberDown, None), 0, "nobody has died");
        fleet.set_weather(Weather::FAIR);
        fleet.until("all see all", secs(5), Fleet::is_whole);
    });
}

#[test]
fn a_slow_machine_is_neither_dead_nor_makes_others_so() {
    with_seeds("a_slow_machine_is_neither_dead_nor_makes_others_so", |seed| {
        let mut fleet = Fleet::whole(seed, 5);
        fleet.slow(4, Duration::from_millis(150));
        fleet.call_for(0, 1_000, PAUSE, secs(30));
        assert_eq!(fleet.settle_calls().1, 0, "slow is not wrong");
        assert_eq!(fleet.count(EventKind::MemberDown, None), 0, "nobody has died");
    });
}

#[test]
fn rolling_restart_under_traffic_fails_no_call() {
    let name = "rolling_restart_under_traffic_fails_no_call";
    with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, 5);
        for member in 1..5 {
            fleet.call_for(0, 10_000, PAUSE, secs(1));
            fleet.stop_under_calls(member, 0, 10_000, PAUSE);
            fleet.call_for(0, 10_000, PAUSE, secs(1));
            fleet.start(member);
            fleet.until("it is back", secs(15), Fleet::is_whole);
        }
        let (well, cut) = fleet.settle_calls();
        println!("{name}: seed {seed}: {well} calls, {cut} cut");
        assert_eq!(cut, 0, "of {well}");
    });
}

#[test]
fn a_restart_with_other_services_is_believed() {
    with_seeds("a_restart_with_other_services_is_believed", |seed| {
        let mut fleet = Fleet::whole(seed, 5);
        fleet.call_for(0, 1_000, PAUSE, secs(1));
        fleet.kill(3);
        fleet.start_with(3, &["other"]);
        fleet.until("all see what it offers now", secs(15), |fleet| {
            let is_seen = |by| fleet.ready(by) == 3 && fleet.ready_of(by, "other") == 1;
            fleet.is_whole() && (0..5).all(is_seen)
        });
        let (_, cut) = fleet.settle_calls();
        let before = fleet.delivered_at(3);
        fleet.call_for(0, 1_000, PAUSE, secs(3));
        assert_eq!(fleet.settle_calls().1, cut);
        assert_eq!(fleet.delivered_at(3), before, "it is called for what it no longer offers");
    });
}

#[test]
fn a_newcomer_waits_for_its_issuer() {
    with_seeds("a_newcomer_waits_for_its_issuer", |seed| {
        let mut fleet = Fleet::whole_but_last(seed, 5);
        fleet.kill(0); // the only one that its token names
        fleet.start(4);
        fleet.run_for(secs(20));
        assert!(!fleet.is_running(4), "nobody could let it in");
        fleet.start(0);
        fleet.until("all see all", secs(20), Fleet::is_whole);
    });
}

#[test]
fn a_whole_mesh_that_restarts_at_once_is_whole_again() {
    let name = "a_whole_mesh_that_restarts_at_once_is_whole_again";
    let whole: Times = with_seeds(name, |seed| {
        let mut fleet = Fleet::whole(seed, 6);
        fleet.run_for(secs(5)); // what is remembered is on disk
        (0..6).for_each(|index| fleet.kill(index));
        fleet.run_for(secs(30));
        (0..6).for_each(|index| fleet.start(index));
        let whole = fleet.until("all see all", secs(20), Fleet::is_whole);
        (0..12).for_each(|number| fleet.call(number % 6, 1_000));
        assert_eq!(fleet.settle_calls(), (12, 0));
        whole
    })
    .into_iter()
    .collect();
    println!("{name}: 6 of 6, all see all {whole} after their start");
    assert!(whole.max() < secs(10), "{whole}");
}

#[test]
fn clocks_that_differ_by_minutes_harm_nobody() {
    with_seeds("clocks_that_differ_by_minutes_harm_nobody", |seed| {
        let mut fleet = Fleet::whole_but_last(seed, 5);
        for (index, ahead) in [(2, 600), (3, -600)] {
            fleet.kill(index);
            fleet.set_clock_ahead(index, ahead);
            fleet.start(index);
        }
        fleet.set_clock_ahead(4, -600);
        fleet.start(4); // its certificate begins an hour before the issuer's now
        fleet.until("all see all", secs(20), Fleet::is_whole);
        let downs = fleet.count(EventKind::MemberDown, None);
        let (_, cut) = fleet.settle_calls();
        for _ in 0..40 {
            (0..5).for_each(|from| fleet.call(from, 1_000));
            fleet.run_for(secs(1));
        }
        assert_eq!(fleet.settle_calls().1, cut, "a call failed");
        assert_eq!(fleet.count(EventKind::MemberDown, None), downs, "somebody was taken for dead");
    });
}

#[test]
fn a_drain_under_traffic_fails_no_call() {
    with_seeds("a_drain_under_traffic_fails_no_call", |seed| {
        let mut fleet = Fleet::whole(seed, 4);
        fleet.call_slowly(0, 100_000, Duration::from_millis(300)); // it lasts longer than the drain
        fleet.call_for(0, 1_000, PAUSE, secs(1));
        fleet.drain(2);
        fleet.call_for(0, 1_000, PAUSE, secs(1));
        let before = fleet.delivered_at(2);
        fleet.call_for(0, 1_000, PAUSE, secs(3));
        assert_eq!(fleet.delivered_at(2), before, "an instance that drains gets calls");
        fleet.end_drain(2);
        fleet.call_for(0, 1_000, PAUSE, secs(3));
        assert!(fleet.delivered_at(2) > before, "it is used again");
        assert_eq!(fleet.settle_calls().1, 0, "a call failed");
    });
}
