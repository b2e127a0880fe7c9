//! What each threshold costs and saves on both sides of its value: the tables of `docs/breaker.md`.

use std::time::Duration;

use super::model::{Answer, Behaviour, Kind, Manner, Run, Setting, Way, run};
use super::{
    all_die_and_return, among_20, dies, dies_and_returns, fails_30, fails_50, flaps, noisy,
    overload, well, when, zone_is_lost,
};

const SEEDS: u64 = 4;

/// Few overloads eject anything, and those that do eject much: four seeds would choose by chance.
const OVERLOADS: u64 = 20;

/// A value that a threshold is set to.
type Change<'c> = &'c dyn Fn(&mut Setting);

/// A figure of a scenario: its name, and what it is with a threshold set.
type Figure = (&'static str, fn(Change<'_>) -> f64);

fn study<V: std::fmt::Debug + Copy>(
    threshold: &str,
    set: fn(&mut Setting, V),
    values: &[V],
    figures: &[Figure],
) {
    let names: Vec<_> = figures.iter().map(|(name, _)| *name).collect();
    println!("\n| {threshold} | {} |", names.join(" | "));
    println!("|---|{}", "---:|".repeat(figures.len()));
    for value in values {
        let figures = figures.iter().map(|(_, figure)| figure(&|setting| set(setting, *value)));
        let figures: Vec<_> =
            figures.map(|one| format!("{}", (one * 100.0).round() / 100.0)).collect();
        println!("| {value:?} | {} |", figures.join(" | "));
    }
}

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn runs(setting: Setting, way: Way, change: Change<'_>) -> Vec<Run> {
    runs_of(SEEDS, setting, way, change)
}

fn runs_of(seeds: u64, mut setting: Setting, way: Way, change: Change<'_>) -> Vec<Run> {
    change(&mut setting);
    (1..=seeds).map(|seed| run(&setting, way, seed)).collect()
}

/// A mean of the runs, and a sum of them.
fn mean(runs: &[Run], of: impl Fn(&Run) -> f64) -> f64 {
    (runs.iter().map(of).sum::<f64>() / runs.len() as f64 * 10.0).round() / 10.0
}

fn failed(setting: Setting, way: Way, change: Change<'_>) -> f64 {
    mean(&runs(setting, way, change), |run| run.honest_failed as f64).round()
}

fn ejected(setting: Setting, change: Change<'_>) -> f64 {
    ejections(&runs(setting, Way::Shared, change))
}

fn ejections(runs: &[Run]) -> f64 {
    runs.iter().map(|run| run.ejected.len() as f64).sum()
}

fn long(seconds: u64, setting: Setting) -> Setting {
    Setting { length: secs(seconds), ..setting }
}

/// When the last probe passed, in seconds after instance 0 was well.
fn back_after(runs: &[Run], well_at: f64) -> f64 {
    mean(runs, |run| run.probes[0].last().map_or(0.0, Duration::as_secs_f64) - well_at)
}

// Figures of the shared breaker: means of failed calls, sums of ejections.

const DIES: Figure =
    ("dies: failed", |change| failed(long(30, Setting::new(dies)), Way::Shared, change));
const HALF: Figure =
    ("50 % fail: failed", |change| failed(long(40, Setting::new(fails_50)), Way::Shared, change));
const ZONE: Figure =
    ("4 of 10: failed", |change| failed(long(30, Setting::new(zone_is_lost)), Way::Shared, change));
const FLAPS: Figure =
    ("flaps: failed", |change| failed(long(60, Setting::new(flaps)), Way::Shared, change));
const OVERLOAD: Figure = ("20 overloads: ejections", |change| {
    ejections(&runs_of(OVERLOADS, long(40, among_20(&[], overload)), Way::Shared, change))
});
const ALL_FAIL: Figure =
    ("all fail: ejections", |change| ejected(long(45, among_20(&[], all_die_and_return)), change));
const LIARS: Figure = ("3 liars of 20: ejections", |change| {
    let manners = [(Manner::Renewing, well as Behaviour), (Manner::Joining, noisy)];
    let lied = manners.map(|(manner, answer)| {
        ejected(long(30, among_20(&[Kind::Liar(10, manner); 3], answer)), change)
    });
    lied.iter().sum()
});
/// They join what honest callers say, where one call of ten fails.
const LIARS_IN_NOISE: Figure = ("3 liars of 20, 10 % errors: ejections", |change| {
    let liars = [Kind::Liar(10, Manner::Joining); 3];
    ejected(long(40, among_20(&liars, |_, _, _| Answer::grey(0.1))), change)
});
/// Once in 4 s, of 50 callers.
const RARE: Figure = ("dies, 0.25/s: failed", |change| {
    failed(Setting { rate: 0.25, ..Setting::new(dies) }, Way::Shared, change)
});
/// Three callers of three instances.
fn few(answer: Behaviour) -> Setting {
    Setting { callers: vec![Kind::Honest; 3], instances: 3, ..Setting::new(answer) }
}
const FEW: Figure =
    ("3 callers, dies: failed", |change| failed(long(30, few(dies)), Way::Shared, change));
const FEW_NOISY: Figure = ("3 callers, 5 % errors: ejections", |change| {
    ejected(long(300, few(|_, _, _| Answer::grey(0.05))), change)
});
const FEW_HALF: Figure =
    ("3 callers, 50 % fail: failed", |change| failed(few(fails_50), Way::Shared, change));
const LONG_REPORTS: Figure = ("3 % errors, 200 s: reports", |change| {
    let setting = long(200, among_20(&[], |_, _, _| Answer::grey(0.03)));
    mean(&runs(setting, Way::Shared, change), |run| run.reported.len() as f64)
});
/// Where all fail at times, so that callers are careful of it when it dies.
const NOISE_DIES: Figure = ("3 % errors, dies: calls to it", |change| {
    let answer = |instance, at: Duration, _| match instance == 0 && at >= secs(60) {
        true => Answer::DEAD,
        false => Answer::grey(0.03),
    };
    let setting = long(80, among_20(&[], answer));
    mean(&runs(setting, Way::Shared, change), |run| run.reached_in(0, 60.0, 80.0) as f64)
});
/// The highest share of its share that instance 0 took in ten seconds after it had answered again.
const PEAK: Figure = ("returns: most of its share in 10 s", |change| {
    let peak = |run: &Run| {
        let back_at = run.probes[0].last().map_or(30.0, Duration::as_secs_f64);
        let from = (0..20).map(|step| back_at + f64::from(step));
        from.map(|from| run.reached_in(0, from, from + 10.0) as f64 / 250.0).fold(0.0, f64::max)
    };
    runs(Setting::new(dies_and_returns), Way::Shared, change).iter().map(peak).fold(0.0, f64::max)
});
const PROBES: Figure = ("dies: probes in 90 s", |change| {
    let runs = runs(long(100, among_20(&[], dies)), Way::Shared, change);
    mean(&runs, |run| run.probes[0].len() as f64)
});
const BACK: Figure = ("returns: back after, s", |change| {
    let runs = runs(long(45, Setting::new(dies_and_returns)), Way::Shared, change);
    back_after(&runs, 25.0)
});
const RARE_BACK: Figure = ("returns, 0.5/s: back after, s", |change| {
    let setting = Setting { rate: 0.5, ..Setting::new(dies_and_returns) };
    back_after(&runs(long(60, setting), Way::Shared, change), 25.0)
});
const LIED_BACK: Figure = ("returns, 3 liars of 20: back after, s", |change| {
    let liars = [Kind::Liar(1, Manner::Steady); 3];
    back_after(&runs(long(100, among_20(&liars, dies_and_returns)), Way::Shared, change), 25.0)
});
/// Five minutes of illness.
fn outage() -> Setting {
    let answer = |instance, at: Duration, _| {
        when(instance == 0 && (10..310).contains(&at.as_secs()), Answer::DEAD)
    };
    let callers = vec![Kind::Honest; 10];
    long(600, Setting { callers, instances: 3, rate: 2.0, ..Setting::new(answer) })
}
const OUTAGE_PROBES: Figure = ("ill for 5 min: probes", |change| {
    mean(&runs(outage(), Way::Shared, change), |run| run.probes[0].len() as f64)
});
const OUTAGE_BACK: Figure = ("ill for 5 min: back after, s", |change| {
    back_after(&runs(outage(), Way::Shared, change), 310.0)
});
/// Four call often, 16 once in half a minute.
pub(super) fn mixed(answer: Behaviour) -> Setting {
    let pace = |number| if number % 5 == 0 { 4.0 } else { 1.0 / 150.0 };
    long(180, Setting { pace, ..among_20(&[], answer) })
}
const MIXED: Figure = ("16 of 20 call once in 30 s, dies: failed", |change| {
    let answer = |instance, at: Duration, _| when(instance == 0 && at >= secs(100), Answer::DEAD);
    failed(mixed(answer), Way::Shared, change)
});
const RARE_LIARS: Figure = ("calls once in 20 s, 3 liars of 20: ejections", |change| {
    let liars = [Kind::Liar(1, Manner::Renewing); 3];
    let setting = Setting { rate: 0.05, lies_from: secs(65), ..among_20(&liars, well) };
    ejected(long(150, setting), change)
});
const SKEWED: [Figure; 2] = [
    ("clocks 1 s off, dies: failed", |change| {
        let setting = Setting { skew: secs(1), ..Setting::new(dies) };
        failed(long(30, setting), Way::Shared, change)
    }),
    ("clocks 10 s off, dies: failed", |change| {
        let setting = Setting { skew: secs(10), ..Setting::new(dies) };
        failed(long(30, setting), Way::Shared, change)
    }),
];
const MISDATED: Figure = ("liars date back, dies: failed", |change| {
    let liars = [Kind::Liar(1, Manner::Misdating); 3];
    failed(long(30, among_20(&liars, dies)), Way::Shared, change)
});
/// Three die, and 15 s later three more; each that is left takes 16 calls a second and fails the rest.
/// They are well again after a minute.
fn six_die(instance: usize, at: Duration, load: usize) -> Answer {
    let from = if instance < 3 { 10 } else { 25 };
    let is_dead = instance < 6 && (from..70).contains(&at.as_secs());
    if is_dead { Answer::DEAD } else { Answer::grey((1.0 - 16.0 / load.max(16) as f64).max(0.0)) }
}
const SIX_DIE: Figure = ("6 of 10 die in turn, the rest overloaded: failed", |change| {
    failed(long(130, among_20(&[], six_die)), Way::Shared, change)
});
/// The same, of instances that bear it.
const SIX_DIE_LIGHT: Figure = ("6 of 10 die in turn: failed", |change| {
    let answer =
        |instance, at, load| if instance < 6 { six_die(instance, at, load) } else { Answer::WELL };
    failed(long(130, among_20(&[], answer)), Way::Shared, change)
});

/// 13 of 20 have healthy instances ejected, three by three; the rest bear 16 calls a second each.
const MOST_LIE: Figure = ("13 liars of 20, the rest overloaded: failed", |change| {
    let answer = |_, _, load: usize| Answer::grey((1.0 - 16.0 / load.max(16) as f64).max(0.0));
    let liars = [Kind::Liar(3, Manner::Marching); 13];
    failed(long(80, among_20(&liars, answer)), Way::Shared, change)
});

#[test]
#[ignore = "a study: minutes"]
fn thresholds_of_quorum() {
    let shares = [0.1, 0.15, 0.2, 0.25, 0.3, 0.4];
    study("quorum", |s, v| s.shared.quorum_share = v, &shares, &[DIES, OVERLOAD, LIARS]);
    let values = [2, 4, 6, 10, 20];
    study("failures", |s, v| s.shared.failures_min = v, &values, &[FEW, FEW_NOISY, FEW_HALF]);
    let figures = [DIES, OVERLOAD, LIARS_IN_NOISE];
    study("samples of a caller", |s, v| s.shared.samples_max = v, &[1, 3, 5, 10], &figures);
    study("share", |s, v| s.shared.ratio = v, &[0.5, 0.6, 0.7, 0.8], &[HALF, ZONE, OVERLOAD]);
    let values = [0.6, 0.75, 0.85, 1.0];
    let figures = [DIES, ZONE, OVERLOAD];
    study("share not to wait", |s, v| s.shared.ratio_clear = v, &values, &figures);
    let windows = [3, 5, 10, 20].map(secs);
    study("window", |s, v| s.shared.window = v, &windows, &[RARE, OVERLOAD, ALL_FAIL]);
    let values = [10, 30, 60, 240].map(secs);
    study("time of callers", |s, v| s.shared.caller_for = v, &values, &[MIXED, RARE_LIARS]);
}

#[test]
#[ignore = "a study: minutes"]
fn thresholds_of_time() {
    let values = [100, 250, 400, 700].map(millis);
    study("objections", |s, v| s.shared.rebuttal_min = v, &values, &[DIES, OVERLOAD, LIARS]);
    let values = [1, 2, 4].map(secs);
    let figures = [HALF, OVERLOAD, LIARS_IN_NOISE];
    study("objections when some object", |s, v| s.shared.rebuttal_max = v, &values, &figures);
    let values = [0, 300, 1_000, 10_000].map(millis);
    let figures = [OVERLOAD, MISDATED];
    study("age when first told", |s, v| s.shared.onset_age_max = v, &values, &figures);
    let values = [250, 1_000, 4_000].map(millis);
    let figures = [FLAPS, PROBES, BACK, LIED_BACK];
    study("first pause of probes", |s, v| s.shared.period_min = v, &values, &figures);
    let values = [15, 60, 240].map(secs);
    let figures = [OUTAGE_PROBES, OUTAGE_BACK];
    study("longest pause of probes", |s, v| s.shared.period_max = v, &values, &figures);
    let values = [100, 250, 500, 1_000, 4_000].map(millis);
    study("turn", |s, v| s.shared.turn = v, &values, &[PROBES, BACK, RARE_BACK, LIED_BACK]);
    study("ramp", |s, v| s.shared.ramp = v, &[1, 5, 10, 20].map(secs), &[FLAPS, PEAK]);
    study(
        "care, failures",
        |s, v| s.shared.care_max = v,
        &[1, 2, 5, 10],
        &[LONG_REPORTS, NOISE_DIES],
    );
    let values = [10, 60, 240].map(secs);
    study("care, time", |s, v| s.shared.care_for = v, &values, &[LONG_REPORTS, NOISE_DIES]);
    let values = [0, 2, 10].map(secs);
    study("clocks differ by", |s, v| s.shared.clock_tolerance = v, &values, &SKEWED);
    let figures = [SIX_DIE, SIX_DIE_LIGHT, MOST_LIE];
    let values = [(0.3, 0.2), (0.5, 0.3), (0.7, 0.5), (1.0, 0.5)];
    study("panic", |s, v| s.shared.panic = v, &values, &figures);
    let values = [(0.5, 0.1), (0.5, 0.3), (0.5, 0.5)];
    study("panic ends", |s, v| s.shared.panic = v, &values, &figures);
    study("panic lasts", |s, v| s.shared.panic_hold = v, &[1, 10, 30].map(secs), &figures);
}

#[test]
#[ignore = "a study: a minute"]
fn thresholds_of_doubt() {
    let values = [1, 8, 16, 60].map(secs);
    let figures = [PROBES, BACK, LIED_BACK];
    study("pause by one word", |s, v| s.shared.period_doubted = v, &values, &figures);
}

// Figures of a caller's own breaker.

const OWN_DIES: Figure = ("dies: failed", |change| failed(Setting::new(dies), Way::Alone, change));
const OWN_HALF: Figure =
    ("50 % fail: failed", |change| failed(Setting::new(fails_50), Way::Alone, change));
const OWN_THIRD: Figure =
    ("30 % fail: failed", |change| failed(Setting::new(fails_30), Way::Alone, change));
const OWN_FLAPS: Figure =
    ("flaps: failed", |change| failed(Setting::new(flaps), Way::Alone, change));

fn opened(answer: Behaviour, change: Change<'_>) -> f64 {
    mean(&runs(Setting::new(answer), Way::Alone, change), |run| run.opened as f64)
}
const OWN_NOISY: Figure =
    ("10 % errors: opened", |change| opened(|_, _, _| Answer::grey(0.1), change));
const OWN_REFUSED: Figure = ("refuses from 10 s: failed", |change| {
    let answer =
        |instance, at: Duration, _| when(instance == 0 && at >= secs(10), Answer::REFUSING);
    failed(Setting::new(answer), Way::Alone, change)
});
/// Away for 300 ms every 5 s.
const OWN_RESTARTS: Figure = ("refuses 300 ms: opened", |change| {
    let answer = |instance, at: Duration, _| {
        when(instance == 0 && at.as_millis() % 5_000 < 300, Answer::REFUSING)
    };
    opened(answer, change)
});
const OWN_OUTAGE: Figure = ("ill for 5 min: failed", |change| failed(outage(), Way::Alone, change));
const OWN_BACK: Figure = ("ill for 5 min: of its share in the minute after", |change| {
    let runs = runs(outage(), Way::Alone, change);
    runs.iter().map(|run| run.reached_in(0, 310.0, 370.0) as f64 / 400.0).sum::<f64>()
        / runs.len() as f64
});

#[test]
#[ignore = "a study: a minute"]
fn thresholds_of_ones_own() {
    let figures = [OWN_DIES, OWN_HALF, OWN_NOISY];
    study("failures in a row", |s, v| s.breaker.errors = v, &[3, 4, 5, 8], &figures);
    let figures = [OWN_REFUSED, OWN_RESTARTS];
    study("refused in a row", |s, v| s.breaker.connect_errors = v, &[1, 2, 4], &figures);
    let figures = [OWN_HALF, OWN_THIRD, OWN_NOISY];
    study("share of failures", |s, v| s.breaker.ratio = v, &[0.3, 0.5, 0.7], &figures);
    study("of at least", |s, v| s.breaker.samples_min = v, &[5, 10, 20], &figures);
    let values = [3, 10, 30].map(secs);
    study("in", |s, v| s.breaker.window = v, &values, &figures);
    let values = [250, 1_000, 4_000].map(millis);
    study("first pause", |s, v| s.breaker.pause_min = v, &values, &[OWN_DIES, OWN_FLAPS]);
    let values = [15, 60, 240].map(secs);
    study("longest pause", |s, v| s.breaker.pause_max = v, &values, &[OWN_OUTAGE, OWN_BACK]);
    let values = [1, 10, 30].map(secs);
    study("ramp", |s, v| s.breaker.ramp = v, &values, &[OWN_DIES, OWN_HALF, OWN_FLAPS]);
}
