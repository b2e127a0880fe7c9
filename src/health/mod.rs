//! Is an instance well, as its own agent sees it: active checks with rise and fall, and words that
//! the application pushes before they run out (TTL).
//!
//! An instance may have several checks, and takes work while all of them pass. It begins as failing:
//! nobody sends it work before it was seen to work once. After that [`Plan::Active::fall`] failures
//! in a row take it out and [`Plan::Active::rise`] passes in a row bring it back, so that one lost
//! packet does neither. A check that begins to fail is repeated every [`FAST_INTERVAL`] until it is
//! decided: then a dead instance is out in `fall - 1` fast intervals after the first failure,
//! however long its interval is. The way back takes whole intervals: an instance that flaps stays
//! out.
//!
//! Invariants: no check is begun before its earlier run has ended; none that is not due is begun; an
//! instance passes if and only if each of its checks has passed and none is failing.

mod check;

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::SmallRng;

pub use check::{CheckState, CheckStatus};

use self::check::Check;
use crate::model::Moment;

/// How soon a check that began to fail is repeated. With three to fall, an instance is out 400 ms
/// after its first failure; five runs a second are the most that a check costs.
pub const FAST_INTERVAL: Duration = Duration::from_millis(200);

/// When a check is made, and what it takes to change the verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The agent looks.
    Active {
        /// From the end of one run to the next, give or take a tenth, so that agents that started
        /// together do not look together.
        interval: Duration,
        /// Passes in a row that bring a failing instance back.
        rise: u32,
        /// Failures in a row that take a passing one out.
        fall: u32,
    },
    /// The application tells.
    Told {
        /// For how long one word holds.
        ttl: Duration,
    },
}

/// What one run of a check, or one word of the application, came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CheckResult {
    /// All is well.
    Pass,
    /// Worth a look; it takes work all the same.
    Warn,
    /// It does not work.
    Fail,
}

/// What changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HealthEvent {
    /// All checks pass.
    Passing,
    /// One fails.
    Failing {
        /// Which, and what it said.
        reason: String,
    },
}

/// The checks of one instance. At most as many as its maker gives it; each keeps one output.
#[derive(Debug)]
pub struct Health {
    checks: Vec<Check>,
    is_passing: bool,
    /// The newest change: one that nobody asked for in time is history.
    event: Option<HealthEvent>,
    rng: SmallRng,
}

impl Health {
    /// Checks by their names and plans, all due at once. The instance begins as failing, unless it
    /// `was_passing` by the checks that these replace: it then takes work until one of these fails.
    pub fn new(
        now: Moment,
        checks: impl IntoIterator<Item = (String, Plan)>,
        was_passing: bool,
        seed: u64,
    ) -> Self {
        let checks = checks.into_iter();
        let checks = checks.map(|(name, plan)| Check::new(now, name, plan, was_passing)).collect();
        let rng = SmallRng::seed_from_u64(seed);
        let mut health = Self { checks, is_passing: was_passing, event: None, rng };
        health.settle();
        health
    }

    /// The run of check `at` that [`Health::poll_due`] began has ended.
    pub fn handle_result(&mut self, now: Moment, at: usize, result: CheckResult, output: String) {
        if let Some(check) = self.checks.get_mut(at) {
            check.handle_result(now, result, output, &mut self.rng);
        }
        self.settle();
    }

    /// The application says how it is. False when check `at` is none that it tells.
    pub fn handle_word(
        &mut self,
        now: Moment,
        at: usize,
        result: CheckResult,
        output: String,
    ) -> bool {
        let is_told =
            self.checks.get_mut(at).is_some_and(|check| check.handle_word(now, result, output));
        self.settle();
        is_told
    }

    /// Somebody was refused a connection: every active check is due, but none sooner than
    /// [`FAST_INTERVAL`] after it last began.
    pub fn check_now(&mut self, now: Moment) {
        self.checks.iter_mut().for_each(|check| check.check_now(now));
    }

    /// The deadline of [`Health::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Moment) {
        self.checks.iter_mut().for_each(|check| check.handle_timeout(now));
        self.settle();
    }

    /// When something is to be done next: a check begun, a word has run out.
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.checks.iter().filter_map(Check::deadline).min()
    }

    /// When a word of the application runs out next. That needs no run.
    pub fn poll_expiry(&self) -> Option<Moment> {
        self.checks.iter().filter(|check| check.is_told()).filter_map(Check::deadline).min()
    }

    /// A check that is due: whoever takes it runs it and says how it ended.
    pub fn poll_due(&mut self, now: Moment) -> Option<usize> {
        self.checks.iter_mut().position(|check| check.begin(now))
    }

    /// What changed since the last call.
    pub fn poll_event(&mut self) -> Option<HealthEvent> {
        self.event.take()
    }

    /// Whether all checks pass.
    pub fn is_passing(&self) -> bool {
        self.is_passing
    }

    /// Why the instance is failing; absent when it passes.
    pub fn reason(&self) -> Option<String> {
        self.checks.iter().find_map(Check::fault)
    }

    /// Each check as it stands, in the order in which they were given.
    pub fn checks(&self) -> impl Iterator<Item = &CheckState> {
        self.checks.iter().map(Check::state)
    }

    fn settle(&mut self) {
        let reason = self.reason();
        if reason.is_none() == self.is_passing {
            return;
        }
        self.is_passing = reason.is_none();
        self.event = Some(match reason {
            None => HealthEvent::Passing,
            Some(reason) => HealthEvent::Failing { reason },
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan::Active { interval: Duration::from_secs(60), rise: 2, fall: 3 };

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    fn one(plan: Plan) -> Health {
        Health::new(Moment::START, [("web".to_owned(), plan)], false, 7)
    }

    /// Runs whatever is due at its deadline, and says when that was.
    fn run(health: &mut Health, result: CheckResult) -> Moment {
        let now = health.poll_timeout().unwrap();
        let due = health.poll_due(now).unwrap();
        health.handle_result(now, due, result, "said".to_owned());
        now
    }

    use CheckResult::{Fail, Pass, Warn};

    #[test]
    fn an_instance_is_failing_until_its_first_pass_and_the_first_check_is_due_at_once() {
        let mut health = one(PLAN);
        assert!(!health.is_passing());
        assert_eq!(health.reason().unwrap(), "web: not checked yet");
        assert_eq!(run(&mut health, Pass), Moment::START);
        assert_eq!(health.poll_event(), Some(HealthEvent::Passing));
        assert_eq!((health.is_passing(), health.reason()), (true, None));
        assert_eq!(health.poll_event(), None);
    }

    #[test]
    fn failures_repeat_fast_until_fall_takes_the_instance_out() {
        let mut health = one(PLAN);
        run(&mut health, Pass);
        health.poll_event();
        let first = run(&mut health, Fail);
        assert!(health.is_passing(), "one failure is none");
        assert_eq!(run(&mut health, Fail), first + FAST_INTERVAL);
        assert_eq!(run(&mut health, Fail), first + 2 * FAST_INTERVAL);
        let reason = "web: said".to_owned();
        assert_eq!(health.poll_event(), Some(HealthEvent::Failing { reason }));
        let next = health.poll_timeout().unwrap().since(first);
        assert!(next > Duration::from_secs(50), "decided: no haste any more, {next:?}");
    }

    #[test]
    fn one_pass_among_failures_starts_the_count_again() {
        let mut health = one(PLAN);
        run(&mut health, Pass);
        for result in [Fail, Fail, Pass, Fail, Fail, Pass] {
            run(&mut health, result);
            assert!(health.is_passing());
        }
    }

    #[test]
    fn the_way_back_takes_rise_passes_in_a_row() {
        let mut health = one(PLAN);
        run(&mut health, Pass);
        for _ in 0..3 {
            run(&mut health, Fail);
        }
        for result in [Pass, Fail, Pass, Fail] {
            run(&mut health, result);
            assert!(!health.is_passing(), "it flaps and stays out");
        }
        let first = run(&mut health, Pass);
        let second = run(&mut health, Pass);
        assert!(health.is_passing());
        assert!(second.since(first) > Duration::from_secs(50), "in whole intervals");
    }

    #[test]
    fn intervals_differ_by_a_tenth_at_most() {
        let mut health = one(PLAN);
        let mut last = run(&mut health, Pass);
        let mut seen = Vec::new();
        for _ in 0..200 {
            let now = run(&mut health, Pass);
            seen.push(now.since(last).as_millis());
            last = now;
        }
        assert!(seen.iter().all(|millis| (54_000..=66_000).contains(millis)), "{seen:?}");
        assert!(seen.iter().max().unwrap() - seen.iter().min().unwrap() > 6_000, "{seen:?}");
    }

    #[test]
    fn a_refused_connection_makes_a_check_due_now_but_no_flood_of_them() {
        let mut health = one(PLAN);
        run(&mut health, Pass);
        health.check_now(at(5_000));
        assert_eq!(health.poll_timeout(), Some(at(5_000)));
        assert_eq!(health.poll_due(at(5_000)), Some(0));
        health.check_now(at(5_001));
        assert_eq!(health.poll_due(at(5_001)), None, "never two runs at once");
        health.handle_result(at(5_010), 0, Pass, String::new());
        assert_eq!(
            health.poll_timeout(),
            Some(at(5_000) + FAST_INTERVAL),
            "refused while it ran: looked at again"
        );
        health.check_now(at(5_020));
        assert_eq!(health.poll_timeout(), Some(at(5_000) + FAST_INTERVAL));
    }

    #[test]
    fn a_word_holds_for_its_time_and_a_failure_at_once() {
        let mut health = one(Plan::Told { ttl: Duration::from_secs(30) });
        assert_eq!(health.poll_due(at(0)), None, "nobody looks");
        assert_eq!(health.poll_timeout(), None);
        assert!(health.handle_word(at(1_000), 0, Warn, "disk 90 %".to_owned()));
        assert_eq!(health.poll_event(), Some(HealthEvent::Passing), "a warning takes work");
        assert_eq!(health.checks().next().unwrap().status, CheckStatus::Warning);
        assert!(health.handle_word(at(20_000), 0, Pass, String::new()));
        assert_eq!(health.poll_timeout(), Some(at(50_000)));
        health.handle_timeout(at(49_999));
        assert!(health.is_passing());
        health.handle_timeout(at(50_000));
        let reason = "web: no word for 30s".to_owned();
        assert_eq!(health.poll_event(), Some(HealthEvent::Failing { reason }));
        assert!(health.handle_word(at(60_000), 0, Pass, String::new()));
        assert!(health.is_passing());
        assert!(health.handle_word(at(60_001), 0, Fail, "no disk".to_owned()));
        assert_eq!(health.reason().unwrap(), "web: no disk");
        assert!(!one(PLAN).handle_word(at(0), 0, Pass, String::new()), "the agent looks itself");
    }

    #[test]
    fn all_checks_of_an_instance_must_pass() {
        let checks = ["a", "b"].map(|name| (name.to_owned(), PLAN));
        let mut health = Health::new(Moment::START, checks, false, 7);
        assert_eq!(health.poll_due(at(0)), Some(0));
        assert_eq!(health.poll_due(at(0)), Some(1));
        health.handle_result(at(1), 0, Pass, String::new());
        assert_eq!(health.reason().unwrap(), "b: not checked yet");
        health.handle_result(at(2), 1, Pass, String::new());
        assert!(health.is_passing());
    }

    #[test]
    fn checks_that_replace_others_keep_a_passing_instance_until_they_fail() {
        let mut health = Health::new(Moment::START, [("web".to_owned(), PLAN)], true, 7);
        assert!(health.is_passing());
        for _ in 0..2 {
            run(&mut health, Fail);
        }
        assert!(health.is_passing());
        run(&mut health, Fail);
        assert!(!health.is_passing());
    }
}
