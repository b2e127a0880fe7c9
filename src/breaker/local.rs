//! The breaker of one instance at one caller: closed lets through, open refuses, half-open tries.
//!
//! ```text
//!            connect_errors or errors in a row, or the share of failures
//!   closed --------------------------------------------------------------> open
//!     ^                                                                   |    ^
//!     |                                                      pause is over|    |
//!     |   the ramp is over       one call succeeds                        v    |
//!     +------------------- ramp <------------------------ probing: one call ---+
//!                           |                                one call fails    |
//!                           +--------------------------------------------------+
//!                              two in a row fail, or the share of failures
//! ```
//!
//! Half-open is both probing and the ramp.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::BreakerConfig;
use super::window::{Counts, Stretch, Window};
use crate::model::{Moment, Outcome};

/// What a caller may do with an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// Call it.
    Pass,
    /// Call it with this share of what it would get, in thousandths, 100 to 999.
    Ramp(u16),
    /// One call may try it: whoever makes it says so with [`Breaker::begin_probe`].
    Probe,
    /// Do not call it.
    Refuse {
        /// Ask again then.
        until: Moment,
    },
}

/// A call that tries an instance, of one breaker: its end decides, and that of no call besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial(u32);

/// Calls that failed one after the other until now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FailedCalls {
    /// How many.
    pub count: u16,
    /// How long ago the first one ended.
    pub first_age: Duration,
    /// How long ago the last one did.
    pub last_age: Duration,
}

/// The state of a breaker, in the field's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BreakerState {
    /// Lets through.
    Closed,
    /// Refuses.
    Open,
    /// Tries: one call, then a growing share.
    HalfOpen,
}

impl BreakerState {
    /// The word of tables, JSON and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// Why a breaker opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trip {
    /// The instance refused connections in a row.
    ConnectErrors,
    /// Calls failed in a row.
    Errors,
    /// The share of failures in the window.
    Ratio,
    /// The call that tried it failed, or calls of the ramp.
    Relapse,
}

impl Trip {
    /// The word of tables, JSON and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ConnectErrors => "connect_errors",
            Self::Errors => "errors",
            Self::Ratio => "ratio",
            Self::Relapse => "relapse",
        }
    }
}

/// A change of state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerEvent {
    /// It refuses from now on.
    Opened {
        /// Why.
        trip: Trip,
        /// Until then.
        until: Moment,
    },
    /// It tries.
    HalfOpened,
    /// It lets everything through.
    Closed,
}

/// The share that a ramp begins with, in thousandths.
const RAMP_FIRST: u64 = 100;

/// Failures in a row that end a ramp: one may be left from before.
const RAMP_ERRORS: u16 = 2;

/// How long a call that tries may go without an outcome before another may try: the first byte of a
/// healthy instance comes sooner, and a call that lasts is not lost by it.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);

/// The breaker of one instance at one caller. Pure and small: O(1) per outcome, no allocation.
///
/// Invariants, which tests name:
/// - an open breaker admits no call before its pause is over, and then one;
/// - the pause grows with each relapse, and begins anew after as long a time closed;
/// - calls that had nowhere else to go meanwhile can end it, and never make it longer: when all
///   instances fail, none of them is back later than the others for having been called;
/// - only the call that tries ends a pause or begins the next, whatever others end meanwhile;
/// - outcomes without evidence change nothing but who may try.
#[derive(Clone, Debug)]
pub struct Breaker {
    counts: Counts,
    stretch: Option<Stretch>,
    last_success_at: Option<Moment>,
    last_failure_at: Option<Moment>,
    phase: Phase,
    event: Option<BreakerEvent>,
    seed: u64,
    pause_min_ms: u32,
    pause_max_ms: u32,
    /// The last pause before jitter; 0 before the first.
    pause_ms: u32,
    ramp_ms: u32,
    ratio: f32,
    errors: u16,
    connect_errors: u16,
    samples_min: u16,
    failed_in_row: u16,
    /// When the first of these ended.
    failing_since: Moment,
    unreached_in_row: u16,
    /// The last call that tried.
    trial: Trial,
    /// The first one since it opened; another follows it when it takes long.
    first_trial: Trial,
    /// Whether calls have had nowhere else to go since it opened.
    was_needed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Closed {
        since: Moment,
    },
    Open {
        until: Moment,
    },
    /// A call tries. When it had nowhere else to go the pause is not over: `until` is still to come.
    Probing {
        since: Moment,
        until: Moment,
    },
    Ramp {
        since: Moment,
    },
}

impl Breaker {
    /// A closed breaker. `seed` makes its pauses differ from those of others.
    pub fn new(config: &BreakerConfig, seed: u64) -> Self {
        Self {
            counts: Counts::new(config.window),
            stretch: None,
            last_success_at: None,
            last_failure_at: None,
            phase: Phase::Closed { since: Moment::START },
            event: None,
            seed,
            pause_min_ms: millis(config.pause_min).max(1),
            pause_max_ms: millis(config.pause_max),
            pause_ms: 0,
            ramp_ms: millis(config.ramp),
            ratio: config.ratio,
            errors: config.errors.max(1),
            connect_errors: config.connect_errors.max(1),
            samples_min: config.samples_min,
            failed_in_row: 0,
            failing_since: Moment::START,
            unreached_in_row: 0,
            trial: Trial(0),
            first_trial: Trial(0),
            was_needed: false,
        }
    }

    /// A call has ended, which began with that `trial` if with any.
    pub fn handle_outcome(&mut self, now: Moment, trial: Option<Trial>, outcome: Outcome) {
        let is_trial = trial.is_some_and(|trial| self.is_trying(trial));
        if !outcome.is_evidence() {
            if let Phase::Probing { until, .. } = self.phase
                && trial == Some(self.trial)
            {
                self.phase = Phase::Open { until }; // it tried nothing: another may
            }
            return;
        }
        let is_back = is_trial && outcome == Outcome::Success;
        if is_back {
            self.was_needed = false;
            self.counts.clear(); // what was before it is another story
            self.stretch = None;
        }
        self.note(now, outcome);
        match self.phase {
            Phase::Open { .. } => {}                 // it began before
            Phase::Probing { .. } if !is_trial => {} // so did this
            Phase::Probing { since, until } if is_back => {
                if since < until {
                    self.event = Some(BreakerEvent::HalfOpened);
                }
                self.phase = Phase::Ramp { since: now };
            }
            Phase::Probing { until, .. } if now < until => self.phase = Phase::Open { until },
            Phase::Probing { .. } => self.open(now, Trip::Relapse),
            Phase::Closed { .. } => {
                if let Some(trip) = self.trip(now) {
                    self.open(now, trip);
                }
            }
            Phase::Ramp { since } => {
                if self.failed_in_row >= RAMP_ERRORS.min(self.errors) || self.trip(now).is_some() {
                    self.open(now, Trip::Relapse);
                } else if now.since(since) >= self.ramp() {
                    self.phase = Phase::Closed { since: now };
                    self.event = Some(BreakerEvent::Closed);
                }
            }
        }
    }

    /// What a call that begins now may do.
    pub fn admits(&self, now: Moment) -> Admission {
        match self.phase {
            Phase::Closed { .. } => Admission::Pass,
            Phase::Open { until } if now < until => Admission::Refuse { until },
            Phase::Probing { since, .. } if now.since(since) < PROBE_PATIENCE => {
                Admission::Refuse { until: since + PROBE_PATIENCE }
            }
            Phase::Open { .. } | Phase::Probing { .. } => Admission::Probe,
            Phase::Ramp { since } => ramp(now.since(since), self.ramp()),
        }
    }

    /// A call begins that was told [`Admission::Probe`], or that has nowhere else to go: its success
    /// decides, and in the first case its failure, too. `None`, and nothing changes, while another call
    /// tries.
    pub fn begin_probe(&mut self, now: Moment) -> Option<Trial> {
        let until = match self.phase {
            Phase::Open { until } => until,
            Phase::Probing { since, until } if now.since(since) >= PROBE_PATIENCE => until,
            _ => return None,
        };
        if now < until {
            self.was_needed = true;
        } else if matches!(self.phase, Phase::Open { .. }) {
            self.event = Some(BreakerEvent::HalfOpened);
        }
        self.trial = Trial(self.trial.0.wrapping_add(1));
        if matches!(self.phase, Phase::Open { .. }) {
            self.first_trial = self.trial;
        }
        self.phase = Phase::Probing { since: now, until };
        Some(self.trial)
    }

    /// Whether it is one of those that try now: also one that has taken so long that another followed.
    fn is_trying(&self, trial: Trial) -> bool {
        let after_first = |of: Trial| of.0.wrapping_sub(self.first_trial.0);
        matches!(self.phase, Phase::Probing { .. }) && after_first(trial) <= after_first(self.trial)
    }

    /// In the field's words. A ramp that is over is closed from the next outcome on.
    pub const fn state(&self) -> BreakerState {
        match self.phase {
            Phase::Closed { .. } => BreakerState::Closed,
            Phase::Open { .. } => BreakerState::Open,
            Phase::Probing { since, until } if since.as_nanos() < until.as_nanos() => {
                BreakerState::Open
            }
            Phase::Probing { .. } | Phase::Ramp { .. } => BreakerState::HalfOpen,
        }
    }

    /// The last change of state that was not asked for yet. Ask after every `handle_outcome` and
    /// `begin_probe`: only the last one is kept.
    pub fn poll_event(&mut self) -> Option<BreakerEvent> {
        self.event.take()
    }

    /// Failures one after the other until now; `None` after a success and before the first failure.
    pub fn failed_in_row(&self, now: Moment) -> Option<FailedCalls> {
        let last_at = self.last_failure_at.filter(|_| self.failed_in_row > 0)?;
        Some(FailedCalls {
            count: self.failed_in_row,
            first_age: now.since(self.failing_since),
            last_age: now.since(last_at),
        })
    }

    /// What was seen lately, for the others in the mesh.
    pub fn window(&self, now: Moment) -> Window {
        let window = self.counts.window();
        let stretch = self.stretch.filter(|stretch| stretch.is_fresh(now, window));
        let (samples, failures) = match &stretch {
            Some(stretch) => (stretch.samples(), stretch.failures()),
            None => {
                let (samples, failures) = self.counts.sums(now);
                (saturated(samples), saturated(failures))
            }
        };
        Window {
            samples,
            failures,
            first_failure_age: stretch.map(|stretch| now.since(stretch.began_at)),
            last_failure_age: self
                .last_failure_at
                .map(|at| now.since(at))
                .filter(|age| *age < window),
            last_success_age: self
                .last_success_at
                .map(|at| now.since(at))
                .filter(|age| *age < window),
        }
    }

    fn note(&mut self, now: Moment, outcome: Outcome) {
        let is_failure = outcome.is_failure();
        self.counts.add(now, is_failure);
        let window = self.counts.window();
        self.stretch = Stretch::after(self.stretch, now, is_failure, self.ratio, window);
        if self.failed_in_row == 0 {
            self.failing_since = now;
        }
        self.failed_in_row = if is_failure { self.failed_in_row.saturating_add(1) } else { 0 };
        self.unreached_in_row = match outcome {
            Outcome::Unreached => self.unreached_in_row.saturating_add(1),
            _ => 0,
        };
        let last_at =
            if is_failure { &mut self.last_failure_at } else { &mut self.last_success_at };
        *last_at = Some(now);
    }

    fn trip(&self, now: Moment) -> Option<Trip> {
        if self.unreached_in_row >= self.connect_errors {
            return Some(Trip::ConnectErrors);
        }
        if self.failed_in_row >= self.errors {
            return Some(Trip::Errors);
        }
        if self.failed_in_row == 0 {
            return None; // a success trips nothing
        }
        let (samples, failures) = self.counts.sums(now);
        let is_over = samples >= u32::from(self.samples_min)
            && failures as f32 >= self.ratio * samples as f32;
        is_over.then_some(Trip::Ratio)
    }

    fn open(&mut self, now: Moment, trip: Trip) {
        let last = Duration::from_millis(u64::from(self.pause_ms));
        let is_recovered =
            matches!(self.phase, Phase::Closed { since } if now.since(since) >= last);
        let was_needed = std::mem::take(&mut self.was_needed);
        self.pause_ms = match self.pause_ms {
            0 => self.pause_min_ms,
            _ if is_recovered || was_needed => self.pause_min_ms,
            pause => pause.saturating_mul(2),
        }
        .min(self.pause_max_ms);
        let until = now + self.jittered_pause();
        self.phase = Phase::Open { until };
        self.event = Some(BreakerEvent::Opened { trip, until });
    }

    /// Between half of the pause and all of it: callers that tripped together try apart, and none
    /// tries at once.
    fn jittered_pause(&mut self) -> Duration {
        let mut rng = SmallRng::seed_from_u64(self.seed);
        self.seed = rng.random();
        let pause = u64::from(self.pause_ms);
        Duration::from_millis(rng.random_range(pause / 2..=pause))
    }

    fn ramp(&self) -> Duration {
        Duration::from_millis(u64::from(self.ramp_ms))
    }
}

/// The share after `age` of a ramp that takes `whole`.
pub(super) fn ramp(age: Duration, whole: Duration) -> Admission {
    if age >= whole {
        return Admission::Pass;
    }
    let gained = (1_000 - RAMP_FIRST) * age.as_micros() as u64 / (whole.as_micros() as u64).max(1);
    Admission::Ramp((RAMP_FIRST + gained).min(999) as u16)
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn saturated(count: u32) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use Outcome::{Failed, Success, Unknown, Unreached};

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    impl Breaker {
        /// The call that tries ends, or any while none does.
        fn end(&mut self, now: Moment, outcome: Outcome) {
            self.handle_outcome(now, Some(self.trial), outcome);
        }
    }

    /// A breaker after outcomes 10 ms apart, the last of them `now`.
    fn after(outcomes: &[Outcome]) -> (Breaker, Moment) {
        let mut breaker = Breaker::new(&BreakerConfig::default(), 7);
        let mut now = Moment::START;
        for outcome in outcomes {
            now = now + Duration::from_millis(10);
            breaker.end(now, *outcome);
        }
        (breaker, now)
    }

    fn refused_until(breaker: &Breaker, now: Moment) -> Moment {
        match breaker.admits(now) {
            Admission::Refuse { until } => until,
            other => panic!("{other:?}"),
        }
    }

    /// Opened, its pause waited for, and the one call begun.
    fn probing() -> (Breaker, Moment) {
        let (mut breaker, now) = after(&[Failed; 5]);
        let now = refused_until(&breaker, now);
        breaker.begin_probe(now);
        (breaker, now)
    }

    #[test]
    fn it_opens_by_refused_connections_failures_in_a_row_or_the_share_of_failures() {
        let alternating = [Success, Failed, Success, Failed, Success, Failed, Success, Failed];
        let mut many = alternating.to_vec();
        many.extend([Success, Failed]);
        let cases: &[(&[Outcome], Option<Trip>)] = &[
            (&[Unreached], None),
            (&[Unreached, Unreached], Some(Trip::ConnectErrors)),
            (&[Unreached, Failed, Unreached], None),
            (&[Failed; 4], None),
            (&[Failed; 5], Some(Trip::Errors)),
            (&[Failed, Failed, Failed, Failed, Success, Failed], None),
            (&[Unknown; 50], None),
            (&[Failed, Failed, Unknown, Failed, Failed, Failed], Some(Trip::Errors)),
            (&alternating, None), // below the least number of samples
            (&many, Some(Trip::Ratio)),
        ];
        for (outcomes, expected) in cases {
            let (mut breaker, _) = after(outcomes);
            let trip = match breaker.poll_event() {
                Some(BreakerEvent::Opened { trip, .. }) => Some(trip),
                None => None,
                other => panic!("{other:?}"),
            };
            assert_eq!(trip, *expected, "{outcomes:?}");
        }
    }

    #[test]
    fn share_below_the_ratio_never_opens_it() {
        let outcomes: Vec<_> = [Success, Success, Failed].repeat(500);
        let (breaker, _) = after(&outcomes);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn open_breaker_admits_one_call_after_its_pause() {
        let (mut breaker, now) = after(&[Failed; 5]);
        let until = refused_until(&breaker, now);
        assert!((500..=1_000).contains(&(until - now).as_millis()), "{:?}", until - now);
        assert_eq!(breaker.admits(until), Admission::Probe);
        breaker.begin_probe(until);
        assert_eq!(breaker.poll_event(), Some(BreakerEvent::HalfOpened));
        assert_eq!(refused_until(&breaker, until), until + PROBE_PATIENCE);
        assert_eq!(breaker.admits(until + PROBE_PATIENCE), Admission::Probe, "the first is lost");
    }

    #[test]
    fn call_that_began_before_the_pause_changes_nothing() {
        let (mut breaker, now) = after(&[Failed; 5]);
        let until = refused_until(&breaker, now);
        breaker.end(now + Duration::from_millis(1), Failed);
        breaker.end(now + Duration::from_millis(2), Success);
        assert_eq!(refused_until(&breaker, now), until);
    }

    #[test]
    fn success_of_the_one_call_begins_a_ramp_that_ends_closed() {
        let (mut breaker, now) = probing();
        breaker.end(now, Success);
        let share = |millis| breaker.admits(now + Duration::from_millis(millis));
        assert_eq!(share(0), Admission::Ramp(100));
        assert_eq!(share(5_000), Admission::Ramp(550));
        assert_eq!(share(9_999), Admission::Ramp(999));
        assert_eq!(share(10_000), Admission::Pass);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        breaker.end(now + Duration::from_secs(10), Success);
        assert_eq!(breaker.state(), BreakerState::Closed);
        assert_eq!(breaker.poll_event(), Some(BreakerEvent::Closed));
    }

    #[test]
    fn calls_that_fail_one_after_the_other_are_told_since_the_first_however_far_apart() {
        let mut breaker = Breaker::new(&BreakerConfig::default(), 1);
        let secs = |number| Moment::START + Duration::from_secs(number);
        [(1, Failed), (2, Success), (10, Failed), (25, Failed), (40, Failed)]
            .into_iter()
            .for_each(|(at, outcome)| breaker.end(secs(at), outcome));
        let failed = breaker.failed_in_row(secs(50)).unwrap();
        let [first_age, last_age] = [40, 10].map(Duration::from_secs);
        assert_eq!(failed, FailedCalls { count: 3, first_age, last_age });
    }

    #[test]
    fn trial_that_fails_after_another_has_begun_doubles_the_pause_all_the_same() {
        let (mut breaker, mut now) = after(&[Failed; 5]);
        for doubled in 0..4 {
            let until = refused_until(&breaker, now);
            let pause = (until - now).as_millis();
            assert!((500 << doubled..=1_000 << doubled).contains(&pause), "{doubled}: {pause} ms");
            let first = breaker.begin_probe(until);
            let second = breaker.begin_probe(until + PROBE_PATIENCE);
            assert!(first.is_some() && second.is_some());
            now = until + 2 * PROBE_PATIENCE;
            breaker.handle_outcome(now, first, Failed);
            assert_eq!(breaker.state(), BreakerState::Open);
            let ended = breaker.clone();
            breaker.handle_outcome(now + PROBE_PATIENCE / 2, second, Failed);
            assert_eq!(refused_until(&breaker, now), refused_until(&ended, now), "it began before");
        }
    }

    #[test]
    fn only_the_end_of_the_call_that_tries_decides() {
        for outcome in [Success, Failed, Unknown] {
            let (mut breaker, now) = probing();
            let before = breaker.poll_event();
            let own = breaker.trial;
            assert_eq!((breaker.begin_probe(now), before), (None, Some(BreakerEvent::HalfOpened)));
            breaker.handle_outcome(now, None, outcome);
            breaker.handle_outcome(now, Some(Trial(own.0 - 1)), outcome);
            assert_eq!((breaker.poll_event(), breaker.state()), (None, BreakerState::HalfOpen));
            assert!(matches!(breaker.admits(now), Admission::Refuse { .. }), "{outcome:?}");
            breaker.handle_outcome(now, Some(own), Success);
            assert_eq!(breaker.admits(now), Admission::Ramp(100));
        }
    }

    #[test]
    fn ramp_forgives_one_failure_and_not_two_in_a_row() {
        let (mut breaker, now) = probing();
        for outcome in [Success, Failed, Success, Failed] {
            breaker.end(now, outcome);
            assert_eq!(breaker.state(), BreakerState::HalfOpen);
        }
        breaker.end(now, Failed);
        let opened = breaker.poll_event();
        assert!(matches!(opened, Some(BreakerEvent::Opened { trip: Trip::Relapse, .. })));
    }

    #[test]
    fn call_with_nowhere_else_to_go_ends_the_pause_by_its_success() {
        let (mut breaker, now) = after(&[Failed; 5]);
        let _opened = breaker.poll_event();
        breaker.begin_probe(now);
        assert!(matches!(breaker.admits(now), Admission::Refuse { .. }), "it alone tries");
        assert_eq!((breaker.poll_event(), breaker.state()), (None, BreakerState::Open));
        breaker.end(now, Success);
        assert_eq!(breaker.poll_event(), Some(BreakerEvent::HalfOpened));
        assert_eq!(breaker.admits(now), Admission::Ramp(100));
        assert_eq!(breaker.window(now).first_failure_age, None);
    }

    #[test]
    fn calls_with_nowhere_else_to_go_never_make_the_pause_longer_nor_any_event() {
        let (mut breaker, mut now) = after(&[Failed; 5]);
        let _opened = breaker.poll_event();
        for _ in 0..10 {
            let until = refused_until(&breaker, now);
            assert!((until - now).as_millis() <= 1_000, "{:?}", until - now);
            while now + Duration::from_millis(30) < until {
                now = now + Duration::from_millis(30);
                breaker.begin_probe(now);
                breaker.end(now, Failed);
                assert_eq!((breaker.poll_event(), refused_until(&breaker, now)), (None, until));
            }
            now = until;
            assert_eq!(breaker.admits(now), Admission::Probe);
            breaker.begin_probe(now);
            breaker.end(now, Failed);
            assert!(matches!(breaker.poll_event(), Some(BreakerEvent::Opened { .. })));
        }
    }

    #[test]
    fn outcome_without_evidence_lets_another_call_try() {
        let (mut breaker, now) = probing();
        breaker.end(now, Unknown);
        assert_eq!(breaker.admits(now), Admission::Probe);
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_as_long_a_time_closed() {
        let (mut breaker, mut now) = after(&[Failed; 5]);
        for expected in [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000] {
            let until = refused_until(&breaker, now);
            let pause = (until - now).as_millis() as u64;
            assert!((expected / 2..=expected).contains(&pause), "{pause} of {expected}");
            now = until;
            breaker.begin_probe(now);
            breaker.end(now, Failed);
        }
        for (closed, expected) in [(59, 60_000), (60, 1_000)] {
            now = refused_until(&breaker, now);
            breaker.begin_probe(now);
            breaker.end(now, Success);
            now = now + Duration::from_secs(10);
            breaker.end(now, Success);
            now = now + Duration::from_secs(closed);
            (0..5).for_each(|_| breaker.end(now, Failed));
            let pause = (refused_until(&breaker, now) - now).as_millis() as u64;
            assert!((expected / 2..=expected).contains(&pause), "{pause} after {closed} s closed");
        }
    }

    #[test]
    fn callers_that_trip_together_try_apart() {
        let until = |seed| {
            let mut breaker = Breaker::new(&BreakerConfig::default(), seed);
            (0..5).for_each(|_| breaker.end(at(0), Failed));
            refused_until(&breaker, at(0))
        };
        let mut moments: Vec<_> = (0..50).map(until).collect();
        moments.sort();
        moments.dedup();
        assert!(moments.len() > 40, "{}", moments.len());
    }

    #[test]
    fn window_tells_of_the_stretch_that_goes_on_or_of_all_calls() {
        let (breaker, now) = after(&[Success, Success, Failed, Success, Success, Success]);
        let all = breaker.window(now);
        assert_eq!((all.samples, all.failures, all.first_failure_age), (6, 1, None));
        assert_eq!(all.last_success_age, Some(Duration::ZERO));
        let (breaker, now) = after(&[Success, Success, Failed, Failed, Success, Failed]);
        let later = breaker.window(now + Duration::from_secs(1));
        assert_eq!((later.samples, later.failures), (4, 3));
        assert_eq!(later.first_failure_age, Some(Duration::from_millis(1_030)));
        assert_eq!(later.last_success_age, Some(Duration::from_millis(1_010)));
        let aged = breaker.window(now + Duration::from_secs(20));
        assert_eq!(aged, Window::default());
    }

    #[test]
    fn breaker_takes_at_most_216_bytes() {
        assert!(size_of::<Breaker>() <= 216, "{}", size_of::<Breaker>());
    }

    proptest! {
        /// No admitted call between opening and the end of the pause, whatever happens meanwhile.
        #[test]
        fn open_breaker_admits_nothing_before_its_pause_is_over(
            steps in prop::collection::vec((0_u64..3_000, 0_usize..4), 1..300),
            seed in prop::num::u64::ANY,
        ) {
            let mut breaker = Breaker::new(&BreakerConfig::default(), seed);
            let (mut now, mut closed_until) = (Moment::START, Moment::START);
            for (millis, kind) in steps {
                now = now + Duration::from_millis(millis);
                let admission = breaker.admits(now);
                match admission {
                    Admission::Refuse { until } => {
                        prop_assert!(until > now);
                        prop_assert!(until - now <= Duration::from_secs(60));
                    }
                    _ => prop_assert!(now >= closed_until, "{admission:?}"),
                }
                if admission == Admission::Probe {
                    breaker.begin_probe(now);
                    let is_refused = matches!(breaker.admits(now), Admission::Refuse { .. });
                    prop_assert!(is_refused);
                }
                breaker.end(now, [Success, Failed, Unreached, Unknown][kind]);
                if let Some(BreakerEvent::Opened { until, .. }) = breaker.poll_event() {
                    closed_until = until;
                }
            }
        }
    }
}
