use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::model::{MemberId, Moment, Observations, ObservedWindow, ServiceName};

fn member(number: u8) -> MemberId {
    MemberId::from_bytes([number; 16])
}

fn web() -> ServiceName {
    "web".parse().unwrap()
}

fn key(server: u8) -> InstanceKey {
    InstanceKey { member: member(server), instance: "web".parse().unwrap() }
}

/// A node that knows `servers` instances, at members 200 and up, and calls none.
fn node(servers: u8) -> SharedBreaker {
    let mut shared = SharedBreaker::new(SharedConfig::default(), member(255), 0, 1);
    for server in 200..200 + servers {
        shared.set_instances(Moment::START, member(server), [("web".parse().unwrap(), web())]);
    }
    shared
}

/// What a caller says of server 200: failures of samples, of this moment.
fn word(samples: u16, failures: u16) -> Observations {
    let age = |is: bool| is.then_some(0);
    Observations {
        calls: vec![web()],
        called: 10,
        accused: u16::from(failures > 0),
        windows: vec![ObservedWindow {
            member: member(200),
            instance: "web".parse().unwrap(),
            samples,
            failures,
            first_failure_age_ms: age(failures > 0),
            last_failure_age_ms: age(failures > 0),
            last_success_age_ms: age(failures < samples),
        }],
        signed_at_ms: None,
    }
}

/// Another member's word arrives in the moment in which it is signed.
fn hear(shared: &mut SharedBreaker, at: u64, caller: u8, word: &Observations) {
    let signed = Observations { signed_at_ms: Some(at), ..word.clone() };
    shared.handle_report(millis(at), member(caller), &signed);
}

fn millis(at: u64) -> Moment {
    Moment::from_millis(at)
}

/// Drives time in steps of 20 ms, and says what happened.
fn pass(shared: &mut SharedBreaker, from: u64, to: u64) -> Vec<SharedEvent> {
    let mut events = Vec::new();
    for at in (from..=to).step_by(20) {
        shared.handle_timeout(millis(at));
        events.extend(std::iter::from_fn(|| shared.poll_event()));
    }
    events
}

fn is_ejected(shared: &SharedBreaker) -> bool {
    matches!(shared.verdict(&key(200)), Verdict::Ejected(_))
}

/// Two callers of two accuse at 1 s; ejected by 1.42 s.
fn ejected() -> SharedBreaker {
    let mut shared = node(3);
    for caller in 1..=2 {
        hear(&mut shared, 1_000, caller, &word(3, 3));
    }
    pass(&mut shared, 1_000, 1_420);
    assert!(is_ejected(&shared));
    shared
}

#[test]
fn quorum_ejects_after_the_time_for_objections_and_tells_its_grounds() {
    let mut shared = node(3);
    hear(&mut shared, 1_000, 1, &word(3, 3));
    assert_eq!(shared.verdict(&key(200)), Verdict::Clear);
    hear(&mut shared, 1_000, 2, &word(3, 3));
    assert_eq!(shared.verdict(&key(200)), Verdict::Accused);
    assert_eq!(pass(&mut shared, 1_000, 1_380), []);
    let events = pass(&mut shared, 1_400, 1_420);
    let [SharedEvent::Instance { change: InstanceChange::Ejected(grounds), .. }] =
        events.as_slice()
    else {
        panic!("{events:?}")
    };
    assert_eq!((grounds.callers, grounds.quorum, grounds.accusers), (2, 2, 2));
    assert_eq!((grounds.failures, grounds.share, grounds.testimony.len()), (6, 1_000, 2));
}

/// A node that knows 20 callers, of whom the first so many say that server 200 fails.
fn accused_by(accusers: u8) -> SharedBreaker {
    let mut shared = node(3);
    let silent = Observations { windows: Vec::new(), ..word(0, 0) };
    (1..=20).for_each(|caller| hear(&mut shared, 900, caller, &silent));
    for caller in 1..=accusers {
        hear(&mut shared, 1_000, caller, &word(1_000, 1_000));
    }
    shared
}

#[test]
fn a_quarter_of_the_callers_accuses_nothing_and_one_more_does() {
    let mut shared = accused_by(5);
    assert_eq!(pass(&mut shared, 1_000, 5_000), []);
    assert_eq!(shared.verdict(&key(200)), Verdict::Clear);
    assert_eq!(accused_by(6).verdict(&key(200)), Verdict::Accused);
}

#[test]
fn voices_that_saw_success_since_outweigh_a_quorum() {
    let mut shared = accused_by(6);
    for caller in 7..=12 {
        hear(&mut shared, 1_300, caller, &word(5, 0));
    }
    let events = pass(&mut shared, 1_300, 2_980);
    assert_eq!(events, [], "while some object the others are waited for");
    let events = pass(&mut shared, 3_000, 3_020);
    let [SharedEvent::Instance { change: InstanceChange::Acquitted(grounds), .. }] =
        events.as_slice()
    else {
        panic!("{events:?}")
    };
    let weights = |weight| grounds.testimony.iter().filter(move |one| one.weight == weight).count();
    let told = [TestimonyWeight::Accuses, TestimonyWeight::Rebuts].map(weights);
    assert_eq!(told, [6, 6], "and says by whom");
    assert!(!is_ejected(&shared));
}

#[test]
fn who_condemns_most_of_what_it_calls_counts_nothing() {
    let mut shared = node(3);
    for caller in 1..=2 {
        let broken = Observations { called: 4, accused: 3, ..word(3, 3) };
        hear(&mut shared, 1_000, caller, &broken);
    }
    pass(&mut shared, 1_000, 5_000);
    assert!(!is_ejected(&shared));
}

#[test]
fn last_instance_is_kept_and_its_service_is_failing() {
    let mut shared = node(1);
    for caller in 1..=2 {
        hear(&mut shared, 1_000, caller, &word(3, 3));
    }
    pass(&mut shared, 1_000, 5_000);
    assert!(!is_ejected(&shared));
    assert!(shared.is_failing(&web()));
}

/// The callers 1 and 2, the one first whose turn to probe comes first.
fn by_turn(round: u32) -> [u8; 2] {
    let callers = [1, 2].map(member);
    match turn::place(callers[0], &key(200), round, &callers) {
        Some(0) => [1, 2],
        _ => [2, 1],
    }
}

fn period(shared: &SharedBreaker) -> Duration {
    match shared.verdict(&key(200)) {
        Verdict::Ejected(ejection) => ejection.period,
        other => panic!("{other:?}"),
    }
}

#[test]
fn success_of_one_probe_begins_the_ramp_and_relapse_doubles_the_period() {
    let mut shared = ejected();
    assert_eq!(period(&shared), Duration::from_secs(1));
    let [first, second] = by_turn(2);
    hear(&mut shared, 2_500, second, &word(1, 1));
    assert_eq!(period(&shared), Duration::from_secs(1), "it was not its turn");
    hear(&mut shared, 2_500, first, &word(1, 1));
    assert_eq!(period(&shared), Duration::from_secs(2));
    let [first, second] = by_turn(4);
    hear(&mut shared, 4_500, second, &word(1, 0));
    assert!(is_ejected(&shared), "its turn has not come yet");
    hear(&mut shared, 4_500, first, &word(1, 0));
    let verdict = shared.verdict(&key(200));
    assert_eq!(verdict.admits(millis(4_500)), Admission::Ramp(100));
    assert_eq!(verdict.admits(millis(14_500)), Admission::Pass);
    for caller in 1..=2 {
        hear(&mut shared, 6_000, caller, &word(1, 1));
    }
    assert_eq!(period(&shared), Duration::from_secs(4), "less suffices while it returns");
}

#[test]
fn probe_that_hangs_counts_although_it_fails_after_its_turn_and_from_when_it_failed() {
    let mut shared = accused_by(8);
    pass(&mut shared, 1_000, 3_500);
    assert!(is_ejected(&shared));
    let callers: Vec<_> = (1..=20).map(member).collect();
    let first = (1..=20).find(|one| turn::place(member(*one), &key(200), 2, &callers) == Some(0));
    let Verdict::Ejected(before) = shared.verdict(&key(200)) else { panic!() };
    let mut late = word(1, 1);
    (late.windows[0].first_failure_age_ms, late.windows[0].last_failure_age_ms) =
        (Some(700), Some(700));
    hear(&mut shared, 9_000, first.unwrap(), &late);
    let Verdict::Ejected(after) = shared.verdict(&key(200)) else { panic!() };
    assert_eq!((before.period, after.period), (Duration::from_secs(1), Duration::from_secs(2)));
    assert_eq!(after.tried_at, millis(8_300));
}

#[test]
fn agent_in_front_takes_any_success_for_one_that_passed_its_gate() {
    for (id, is_back) in [(255, false), (200, true)] {
        let mut shared = SharedBreaker::new(SharedConfig::default(), member(id), 0, 1);
        for server in 200..203 {
            shared.set_instances(Moment::START, member(server), [("web".parse().unwrap(), web())]);
        }
        (1..=2).for_each(|caller| hear(&mut shared, 1_000, caller, &word(3, 3)));
        pass(&mut shared, 1_000, 1_420);
        assert!(is_ejected(&shared));
        // To it the turn of whoever has called may seem to be still to come.
        hear(&mut shared, 2_430, by_turn(2)[1], &word(1, 0));
        assert_eq!(!is_ejected(&shared), is_back, "at {id}");
    }
}

#[test]
fn caller_that_knows_of_no_ejection_tells_the_agent_that_does_of_the_call_that_it_let_pass() {
    let mut shared = node(3);
    let none = Window { last_success_age: None, ..window(0, 0) };
    let turned_away =
        |at, window| OwnWindow { turned_away_at: Some(millis(at)), ..own_window(200, window) };
    shared.handle_windows(millis(1_000), [turned_away(900, none)]);
    assert!(said(&mut shared, 1_000, 5_000).iter().all(|word| word.windows.is_empty()));
    // One passes, and others meet the gate again before its agent has heard of that.
    shared.handle_windows(millis(6_000), [turned_away(6_005, window(1, 0))]);
    let told = said(&mut shared, 6_000, 8_000);
    assert_eq!(told.iter().map(|word| word.windows.len()).sum::<usize>(), 1, "{told:?}");
    shared.handle_windows(millis(8_100), [turned_away(8_050, none)]);
    hear(&mut shared, 9_000, 1, &word(1, 0));
    own(&mut shared, 9_500, 200, "web", window(1, 0));
    let told = said(&mut shared, 9_500, 12_000);
    assert!(told.iter().all(|word| word.windows.is_empty()), "another has said it: {told:?}");
}

#[test]
fn caller_that_accused_before_says_so_again_when_a_call_of_the_ramp_fails() {
    let mut shared = node(3);
    for server in 200..203 {
        own(&mut shared, 900, server, "web", window(5, 0));
    }
    own(&mut shared, 1_000, 200, "web", window(3, 3));
    hear(&mut shared, 1_000, 1, &word(3, 3));
    said(&mut shared, 1_000, 2_000);
    assert!(is_ejected(&shared));
    assert_eq!(said(&mut shared, 2_050, 3_950), []);
    hear(&mut shared, 4_000, 1, &word(1, 0));
    assert!(!is_ejected(&shared), "both have had their turns");
    assert_eq!(said(&mut shared, 4_000, 5_000), []);
    own(&mut shared, 5_000, 200, "web", window(4, 4));
    let reports = said(&mut shared, 5_000, 5_950);
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].windows[0].failures, 4);
}

#[test]
fn the_only_one_that_still_calls_probes_again_and_again() {
    let mut shared = ejected();
    own(&mut shared, 1_420, 201, "web", window(5, 0));
    // The two others are still taken for callers, and let their turns pass.
    for _ in 0..12 {
        let Verdict::Ejected(ejection) = shared.verdict(&key(200)) else { panic!() };
        let Some(turn) = ejection.turn else { panic!("no turn after {:?}", ejection.period) };
        let wait = turn.from.since(ejection.tried_at);
        assert!(wait <= Duration::from_secs(60) + turn.length * 2, "{wait:?}");
        own(
            &mut shared,
            turn.from.since(Moment::START).as_millis() as u64,
            200,
            "web",
            window(1, 1),
        );
        assert!(shared.poll_report(turn.from).is_some(), "says that it failed");
    }
}

#[test]
fn one_caller_alone_cannot_make_the_period_a_long_one() {
    let mut shared = ejected();
    let mut at = 1_420;
    for (round, seconds) in [(2, 2), (4, 4), (6, 8)] {
        at += period(&shared).as_millis() as u64 + 50;
        hear(&mut shared, at, by_turn(round)[0], &word(1, 1));
        assert_eq!(period(&shared), Duration::from_secs(seconds));
    }
    at += 8_050;
    let [liar, other] = by_turn(8);
    hear(&mut shared, at, liar, &word(1, 1));
    assert_eq!(period(&shared), Duration::from_secs(1), "another looks at once");
    for again in (0..8_000).step_by(500) {
        hear(&mut shared, at + again, liar, &word(1, 1));
    }
    assert_eq!(period(&shared), Duration::from_secs(1), "the same word of the same caller");
    let turns = (10_000..12_000).step_by(50);
    for later in turns.map(|after| at + after) {
        if period(&shared) > Duration::from_secs(1) {
            break;
        }
        hear(&mut shared, later, other, &word(1, 1));
    }
    assert_eq!(period(&shared), Duration::from_secs(16), "that of another");
}

#[test]
fn gate_lets_one_call_a_period_pass_and_whoever_has_nobody_else() {
    let Verdict::Ejected(ejection) = ejected().verdict(&key(200)) else { panic!() };
    let mut gate = ProbeGate::default();
    let mut passes = |at, insists| gate.passes(millis(at), &ejection, insists);
    let passed: Vec<_> = (1_420..4_420).step_by(10).filter(|at| passes(*at, false)).collect();
    assert_eq!(passed.len(), 3, "{passed:?} with a period of {:?}", ejection.period);
    assert!(!passes(4_420, false) && passes(4_420, true), "who has nobody else passes");
    assert!(passes(passed[2] + 1_000, false), "and takes no probe from the others");
    assert!(!passes(5_420, false));
}

#[test]
fn callers_take_turns_and_after_a_minute_anyone_probes() {
    let callers: Vec<_> = (1..=4).map(member).collect();
    let mut places: Vec<_> =
        callers.iter().filter_map(|one| turn::place(*one, &key(200), 1, &callers)).collect();
    places.sort_unstable();
    assert_eq!(places, [0, 1, 2, 3]);
    assert_eq!(turn::place(member(9), &key(200), 1, &callers), None);
    let Verdict::Ejected(ejection) = ejected().verdict(&key(200)) else { panic!() };
    assert_eq!(ejection.turn, None, "this node calls nothing");
    let verdict = Verdict::Ejected(ejection.clone());
    assert_eq!(verdict.admits(millis(3_000)), Admission::Refuse { until: ejection.anyone_at });
    assert_eq!(verdict.admits(ejection.anyone_at), Admission::Probe);
}

#[test]
fn callers_that_come_while_it_is_ejected_get_their_turns() {
    let mut shared = ejected();
    shared.take_changed();
    shared.handle_windows(millis(2_000), []);
    assert!(!shared.take_changed(), "nothing is new");
    own(&mut shared, 2_000, 201, "web", window(5, 0));
    assert!(shared.take_changed(), "this node calls now");
    let turn = |shared: &SharedBreaker| shared.verdict(&key(200)).ejection().unwrap().turn.unwrap();
    assert_eq!(turn(&shared).every, Duration::from_millis(1_500));
    for caller in 1..=2 {
        shared.forget_caller(millis(2_100), member(caller));
        assert!(shared.take_changed(), "another caller has gone");
    }
    assert_eq!(turn(&shared).every, Duration::from_millis(500), "of this one alone");
    assert_eq!(turn(&shared).from, millis(2_400), "which need not wait for those that have gone");
}

#[test]
fn own_success_later_than_the_accusations_goes_before_them() {
    let verdict = ejected().verdict(&key(200));
    let now = millis(2_000);
    let own = |success_age| Window {
        samples: 5,
        last_success_age: Some(Duration::from_millis(success_age)),
        ..Window::default()
    };
    assert!(verdict.is_vetoed_by(now, &own(500)));
    assert!(!verdict.is_vetoed_by(now, &own(1_500)), "that was before");
}

#[test]
fn report_of_own_calls_is_due_at_once_and_then_no_more_often_than_it_may() {
    let mut shared = node(3);
    let mut reports = 0;
    for at in (0..10_000).step_by(10) {
        let now = millis(at);
        let failures = (at / 10 + 1) as u16;
        let age = Some(Duration::ZERO);
        let failing = Window {
            samples: failures,
            failures,
            first_failure_age: age,
            last_failure_age: age,
            last_success_age: None,
        };
        let well = Window { samples: 5, last_success_age: age, ..Window::default() };
        let windows = [(200, failing), (201, well), (202, well)];
        shared.handle_windows(now, windows.map(|(server, window)| own_window(server, window)));
        while let Some(observations) = shared.poll_report(now) {
            assert_eq!(observations.windows.len(), 1, "at {at} ms");
            reports += 1;
        }
    }
    assert!((3..=13).contains(&reports), "{reports}");
}

/// The same word of two callers of two, signed `late` milliseconds before it arrives at 400 s.
fn late(late: u64) -> SharedBreaker {
    let mut shared = node(3);
    for caller in 1..=2 {
        let said = Observations { signed_at_ms: Some(400_000 - late), ..word(3, 3) };
        shared.handle_report(millis(400_000), member(caller), &said);
    }
    pass(&mut shared, 400_000, 400_420);
    shared
}

#[test]
fn word_that_is_older_than_the_window_weighs_nothing_whenever_it_arrives() {
    assert!(is_ejected(&late(0)));
    assert!(is_ejected(&late(9_000)), "within the window");
    assert_eq!(late(12_000).verdict(&key(200)), Verdict::Clear);
    assert_eq!(late(300_000).verdict(&key(200)), Verdict::Clear, "after a partition of 5 minutes");
    let mut shared = node(3);
    for caller in 1..=2 {
        shared.handle_report(millis(1_000), member(caller), &word(3, 3));
    }
    assert_eq!(shared.verdict(&key(200)), Verdict::Clear, "nobody knows how old it is");
    assert!(shared.has_heard(member(1)), "but who calls");
}

#[test]
fn node_that_has_just_begun_takes_nothing_for_fresh_that_was_before_it() {
    let mut shared = SharedBreaker::new(SharedConfig::default(), member(255), 900_000, 1);
    shared.set_instances(Moment::START, member(200), [("web".parse().unwrap(), web())]);
    shared.set_instances(Moment::START, member(201), [("web".parse().unwrap(), web())]);
    for caller in 1..=2 {
        let said = Observations { signed_at_ms: Some(900_000 - 5_000), ..word(3, 3) };
        shared.handle_report(millis(1_000), member(caller), &said);
    }
    assert_eq!(shared.verdict(&key(200)), Verdict::Clear);
}

#[test]
fn clocks_that_differ_by_half_a_minute_do_no_harm() {
    for skew in [30_000_i64, -30_000] {
        let mut shared = node(3);
        let said = |at: u64, word: &Observations| {
            let signed_at_ms = Some(100_000_u64.saturating_add_signed(skew) + at);
            Observations { signed_at_ms, ..word.clone() }
        };
        let silent = Observations { windows: Vec::new(), ..word(0, 0) };
        for (at, word) in [(0, &silent), (1_000, &silent), (2_000, &silent), (3_000, &word(3, 3))] {
            for caller in 1..=2 {
                let now = millis(100_000 + at);
                shared.handle_report(now, member(caller), &said(at, word));
            }
        }
        pass(&mut shared, 103_000, 103_420);
        assert!(is_ejected(&shared), "{skew}");
        // What was signed before arrives 5 minutes later, from another who was cut off.
        let mut shared = node(3);
        for caller in 1..=2 {
            shared.handle_report(millis(400_000), member(caller), &said(0, &word(3, 3)));
        }
        assert_eq!(shared.verdict(&key(200)), Verdict::Clear, "{skew}");
    }
}

#[test]
fn clock_of_who_was_away_is_still_known() {
    let mut shared = node(3);
    let behind = |at: u64, word: &Observations| Observations {
        signed_at_ms: Some(100_000 + at - 30_000),
        ..word.clone()
    };
    let silent = Observations { windows: Vec::new(), ..word(0, 0) };
    for caller in 1..=2 {
        for at in [0, 1_000, 2_000] {
            shared.handle_report(millis(100_000 + at), member(caller), &behind(at, &silent));
        }
        shared.forget_caller(millis(103_000), member(caller));
    }
    for caller in 1..=2 {
        shared.handle_report(millis(110_000), member(caller), &behind(10_000, &word(3, 3)));
    }
    pass(&mut shared, 110_000, 110_420);
    assert!(is_ejected(&shared), "its first word after that counts");
}

fn window(samples: u16, failures: u16) -> Window {
    let age = |is: bool| is.then_some(Duration::ZERO);
    Window {
        samples,
        failures,
        first_failure_age: age(failures > 0),
        last_failure_age: age(failures > 0),
        last_success_age: age(failures < samples),
    }
}

fn own_window(server: u8, window: Window) -> OwnWindow {
    OwnWindow { key: key(server), service: web(), window, turned_away_at: None }
}

fn own(shared: &mut SharedBreaker, at: u64, server: u8, service: &str, window: Window) {
    let service = service.parse().unwrap();
    let own = OwnWindow { service, ..own_window(server, window) };
    shared.handle_windows(millis(at), [own]);
}

/// What a node says in this time.
fn said(shared: &mut SharedBreaker, from: u64, to: u64) -> Vec<Observations> {
    let mut reports = Vec::new();
    for at in (from..=to).step_by(50) {
        shared.handle_timeout(millis(at));
        reports.extend(std::iter::from_fn(|| shared.poll_report(millis(at))));
    }
    reports
}

#[test]
fn caller_that_has_stopped_calling_says_so() {
    let mut shared = node(3);
    own(&mut shared, 0, 200, "web", window(5, 0));
    let reports = said(&mut shared, 0, 59_000);
    assert_eq!(reports.iter().map(|one| one.calls.len()).collect::<Vec<_>>(), [1]);
    let reports = said(&mut shared, 59_050, 62_000);
    assert_eq!(reports.iter().map(|one| one.calls.len()).collect::<Vec<_>>(), [0]);
    assert_eq!(said(&mut shared, 62_050, 200_000), [], "and is quiet then");
}

#[test]
fn what_an_earlier_run_said_is_replaced_by_what_holds() {
    let mut shared = node(3);
    assert_eq!(said(&mut shared, 0, 3_000), [], "there is nothing to say");
    shared.handle_own_past(millis(3_000));
    let reports = said(&mut shared, 3_000, 6_000);
    assert_eq!(reports.len(), 1);
    assert_eq!((reports[0].calls.len(), reports[0].windows.len()), (0, 0));
}

#[test]
fn of_more_services_than_fit_those_are_named_that_fail_and_the_rest_is_counted() {
    let mut shared = SharedBreaker::new(SharedConfig::default(), member(255), 0, 1);
    let name = |number: u8| format!("service-{number:02}");
    for number in 0..40_u8 {
        let offered = [("web".parse().unwrap(), name(number).parse().unwrap())];
        shared.set_instances(Moment::START, member(number), offered);
        own(&mut shared, 0, number, &name(number), window(5, 0));
    }
    let reports = said(&mut shared, 0, 2_000);
    assert_eq!(reports.last().unwrap().calls.len(), Observations::CALLS_MAX);
    assert!(shared.take_left_out() >= 8);
    let last = name(39).parse().unwrap();
    assert!(!reports.last().unwrap().calls.contains(&last));
    own(&mut shared, 3_000, 39, &name(39), window(5, 5));
    let reports = said(&mut shared, 3_000, 3_100);
    assert!(reports[0].calls.contains(&last), "{:?}", reports[0].calls);
    assert_eq!(reports[0].windows.len(), 1);
}

#[test]
fn machine_that_fails_with_all_that_it_serves_is_one_experience() {
    let mut shared = node(1);
    let both = ["api", "web"].map(|name| (name.parse().unwrap(), name.parse().unwrap()));
    shared.set_instances(Moment::START, member(200), both);
    for name in ["api", "web"] {
        let key = InstanceKey { member: member(200), instance: name.parse().unwrap() };
        let service = name.parse().unwrap();
        shared.handle_windows(
            millis(1_000),
            [OwnWindow { key, service, window: window(3, 3), turned_away_at: None }],
        );
    }
    let reports = said(&mut shared, 1_000, 3_000);
    let word = reports.last().unwrap();
    assert_eq!((word.called, word.accused, word.windows.len()), (1, 1, 2));
}

#[test]
fn accuser_that_dates_its_failures_back_makes_no_success_an_objection() {
    let mut shared = node(3);
    for caller in 3..=8 {
        hear(&mut shared, 900, caller, &word(5, 0)); // all call it with success until it dies
    }
    let mut lie = word(1_000, 1_000);
    lie.windows[0].first_failure_age_ms = Some(60_000);
    hear(&mut shared, 2_000, 1, &lie);
    for caller in [2, 3, 4] {
        hear(&mut shared, 2_000, caller, &word(3, 3));
    }
    let events = pass(&mut shared, 2_000, 2_420);
    let [SharedEvent::Instance { change: InstanceChange::Ejected(grounds), .. }] =
        events.as_slice()
    else {
        panic!("{events:?}")
    };
    assert_eq!((grounds.share, grounds.first_failure_at), (1_000, millis(1_700)));
    let dated = grounds.testimony.iter().filter(|one| one.weight == TestimonyWeight::Dated);
    assert_eq!(dated.count(), 4, "and says whose words it left out, and why");
}

#[test]
fn failing_service_says_by_whose_word_and_that_it_is_over_when_its_instances_go() {
    let mut shared = node(1);
    for caller in 1..=9 {
        hear(&mut shared, 1_000, caller, &word(3, 3));
    }
    let events = pass(&mut shared, 1_000, 5_000);
    let [SharedEvent::Failing { is_failing: true, grounds, .. }] = events.as_slice() else {
        panic!("{events:?}")
    };
    let grounds = &grounds[0].1;
    assert_eq!((grounds.accusers, grounds.testimony.len()), (9, 4), "a few of many words");
    shared.set_instances(millis(5_000), member(200), []);
    let events: Vec<_> = std::iter::from_fn(|| shared.poll_event()).collect();
    assert!(matches!(events.as_slice(), [SharedEvent::Failing { is_failing: false, .. }]));
}

#[test]
fn while_enough_say_that_a_service_fails_the_rest_keeps_quiet_until_these_words_are_half_a_minute_old()
 {
    let mut shared = node(1);
    own(&mut shared, 0, 200, "web", window(5, 0));
    assert_eq!(said(&mut shared, 0, 1_050).len(), 1, "whom it calls");
    for caller in 1..=9 {
        hear(&mut shared, 1_100, caller, &word(3, 3));
    }
    let mut told_at = Vec::new();
    for second in 3..60 {
        own(&mut shared, second * 1_000, 200, "web", window(3, 3));
        let reports = said(&mut shared, second * 1_000, second * 1_000 + 950);
        told_at.extend(reports.iter().map(|_| second));
        assert!(shared.is_failing(&web()), "at {second} s");
    }
    assert!(matches!(told_at.as_slice(), [31..=41]), "{told_at:?}");
}

#[test]
fn testimony_keeps_those_that_count_most_and_says_why_others_do_not() {
    let mut shared = node(3);
    for caller in 1..=60 {
        hear(&mut shared, 500, caller, &word(2, 0)); // before it dies
    }
    for caller in 61..=100 {
        hear(&mut shared, 1_000, caller, &word(3, 3));
    }
    let events = pass(&mut shared, 1_000, 1_420);
    let [SharedEvent::Instance { change: InstanceChange::Ejected(grounds), .. }] =
        events.as_slice()
    else {
        panic!("{events:?}")
    };
    let weights = grounds.testimony.iter().map(|one| one.weight);
    assert_eq!(weights.collect::<Vec<_>>(), [TestimonyWeight::Accuses; 32]);
}

/// Words weighed for one more report when a whole service of so many fails for so many callers.
fn weighed_for_one_report(callers: u8, servers: u8) -> u64 {
    let mut shared = node(servers);
    let mut all = word(3, 3);
    let windows = (200..200 + servers.min(16)).map(|server| {
        let member = member(server);
        ObservedWindow { member, ..all.windows[0].clone() }
    });
    all.windows = windows.collect();
    for round in 0..3 {
        for caller in 0..callers {
            hear(&mut shared, 1_000 + round * 1_000, caller, &all);
        }
        pass(&mut shared, 1_000 + round * 1_000, 1_900 + round * 1_000);
    }
    let before = shared.words_weighed;
    hear(&mut shared, 4_000, 0, &all);
    shared.words_weighed - before
}

#[test]
fn report_costs_as_many_words_as_there_are_on_what_it_names_however_much_else_fails() {
    for (callers, servers) in [(30, 10), (150, 10), (150, 30)] {
        let named = u64::from(servers.min(16));
        let words = weighed_for_one_report(callers, servers);
        assert!(words <= named * u64::from(callers) * 2, "{words} of {callers} on {named}");
    }
}

proptest! {
    /// Whatever one caller says, and however often, it ejects nothing; as soon as a second one says the
    /// same, they do.
    #[test]
    fn one_caller_alone_ejects_nothing(
        said in prop::collection::vec((0_u64..1_000, 0_u16..2_000, 0_u16..2_000), 1..60),
    ) {
        let mut shared = node(3);
        let mut at = 1; // it takes nothing for fresh that was before it began
        for (pause, samples, failures) in said {
            let failures = failures.min(samples);
            hear(&mut shared, at, 1, &word(samples, failures));
            pass(&mut shared, at, at + pause);
            at += pause;
            prop_assert!(!is_ejected(&shared));
        }
        for caller in 1..=2 {
            hear(&mut shared, at, caller, &word(3, 3));
        }
        pass(&mut shared, at, at + 3_000);
        prop_assert!(is_ejected(&shared), "two of two callers accuse it, and nobody objects");
    }

    /// Of however many that are accused one is always left.
    #[test]
    fn one_instance_is_always_left(
        servers in 1_u8..6,
        said in prop::collection::vec((0_u64..2_000, 1_u8..6, 0_u8..6), 1..60),
    ) {
        let mut shared = node(servers);
        let mut at = 0;
        for (pause, caller, server) in said {
            let mut said = word(9, 9);
            said.windows[0].member = member(200 + server % servers);
            hear(&mut shared, at, caller, &said);
            pass(&mut shared, at, at + pause);
            at += pause;
            let left = (200..200 + servers)
                .filter(|server| !matches!(shared.verdict(&key(*server)), Verdict::Ejected(_)));
            prop_assert!(left.count() >= 1);
        }
    }
}
