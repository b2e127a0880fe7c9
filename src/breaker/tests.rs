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
    let mut shared = SharedBreaker::new(SharedConfig::default(), member(255), 1);
    for server in 200..200 + servers {
        shared.set_instances(member(server), [("web".parse().unwrap(), web())]);
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
    }
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
        shared.handle_report(millis(1_000), member(caller), &word(3, 3));
    }
    pass(&mut shared, 1_000, 1_420);
    assert!(is_ejected(&shared));
    shared
}

#[test]
fn quorum_ejects_after_the_time_for_objections_and_tells_its_grounds() {
    let mut shared = node(3);
    shared.handle_report(millis(1_000), member(1), &word(3, 3));
    assert_eq!(shared.verdict(&key(200)), Verdict::Clear);
    shared.handle_report(millis(1_000), member(2), &word(3, 3));
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
    (1..=20).for_each(|caller| shared.handle_report(millis(900), member(caller), &silent));
    for caller in 1..=accusers {
        shared.handle_report(millis(1_000), member(caller), &word(1_000, 1_000));
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
        shared.handle_report(millis(1_300), member(caller), &word(5, 0));
    }
    let events = pass(&mut shared, 1_300, 2_980);
    assert_eq!(events, [], "while some object the others are waited for");
    let events = pass(&mut shared, 3_000, 3_020);
    let acquitted =
        SharedEvent::Instance { key: key(200), service: web(), change: InstanceChange::Acquitted };
    assert_eq!(events, [acquitted]);
    assert!(!is_ejected(&shared));
}

#[test]
fn who_condemns_most_of_what_it_calls_counts_nothing() {
    let mut shared = node(3);
    for caller in 1..=2 {
        let broken = Observations { called: 3, accused: 2, ..word(3, 3) };
        shared.handle_report(millis(1_000), member(caller), &broken);
    }
    pass(&mut shared, 1_000, 5_000);
    assert!(!is_ejected(&shared));
}

#[test]
fn last_instance_is_kept_and_its_service_is_failing() {
    let mut shared = node(1);
    for caller in 1..=2 {
        shared.handle_report(millis(1_000), member(caller), &word(3, 3));
    }
    pass(&mut shared, 1_000, 5_000);
    assert!(!is_ejected(&shared));
    assert!(shared.is_failing(&web()));
}

#[test]
fn success_of_one_probe_begins_the_ramp_and_relapse_doubles_the_period() {
    let mut shared = ejected();
    let period = |shared: &SharedBreaker| match shared.verdict(&key(200)) {
        Verdict::Ejected(ejection) => ejection.period,
        other => panic!("{other:?}"),
    };
    assert_eq!(period(&shared), Duration::from_secs(1));
    let callers = [1, 2].map(member);
    let place = |caller: &MemberId| turn::place(*caller, &key(200), 1, &callers);
    let [first, second] = if place(&callers[0]) == Some(0) { [1, 2] } else { [2, 1] };
    shared.handle_report(millis(2_500), member(second), &word(1, 1));
    assert_eq!(period(&shared), Duration::from_secs(1), "it was not its turn");
    shared.handle_report(millis(2_500), member(first), &word(1, 1));
    assert_eq!(period(&shared), Duration::from_secs(2));
    shared.handle_report(millis(4_500), member(2), &word(1, 0));
    let verdict = shared.verdict(&key(200));
    assert_eq!(verdict.admits(millis(4_500)), Admission::Ramp(100));
    assert_eq!(verdict.admits(millis(14_500)), Admission::Pass);
    for caller in 1..=2 {
        shared.handle_report(millis(6_000), member(caller), &word(1, 1));
    }
    assert_eq!(period(&shared), Duration::from_secs(4), "less suffices while it returns");
}

#[test]
fn gate_lets_one_call_a_period_pass_and_whoever_has_nobody_else() {
    let Verdict::Ejected(ejection) = ejected().verdict(&key(200)) else { panic!() };
    let mut gate = ProbeGate::default();
    let mut passes = |at, insists| gate.passes(millis(at), &ejection, insists);
    let passed: Vec<_> = (1_420..4_420).step_by(10).filter(|at| passes(*at, false)).collect();
    assert_eq!(passed.len(), 3, "{passed:?} with a period of {:?}", ejection.period);
    assert!(!passes(4_420, false) && passes(4_420, true), "who has nobody else passes");
    assert!(!passes(passed[2] + 1_000, false), "and has tried it for all");
    assert!(passes(5_420, false));
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
        shared.handle_windows(
            now,
            windows.map(|(server, window)| OwnWindow { key: key(server), service: web(), window }),
        );
        while let Some(observations) = shared.poll_report(now) {
            assert_eq!(observations.windows.len(), 1, "at {at} ms");
            reports += 1;
        }
    }
    assert!((3..=13).contains(&reports), "{reports}");
}

proptest! {
    /// Whatever one caller says, and however often, it ejects nothing; as soon as a second one says the
    /// same, they do.
    #[test]
    fn one_caller_alone_ejects_nothing(
        said in prop::collection::vec((0_u64..1_000, 0_u16..2_000, 0_u16..2_000), 1..60),
    ) {
        let mut shared = node(3);
        let mut at = 0;
        for (pause, samples, failures) in said {
            let failures = failures.min(samples);
            shared.handle_report(millis(at), member(1), &word(samples, failures));
            pass(&mut shared, at, at + pause);
            at += pause;
            prop_assert!(!is_ejected(&shared));
        }
        for caller in 1..=2 {
            shared.handle_report(millis(at), member(caller), &word(3, 3));
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
            shared.handle_report(millis(at), member(caller), &said);
            pass(&mut shared, at, at + pause);
            at += pause;
            let left = (200..200 + servers)
                .filter(|server| !matches!(shared.verdict(&key(*server)), Verdict::Ejected(_)));
            prop_assert!(left.count() >= 1);
        }
    }
}
