//! One check: when it runs next, and what its results add up to.

use std::time::Duration;

use rand::RngExt;

use super::{CheckResult, FAST_INTERVAL, Plan};
use crate::model::Moment;

/// How a check stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckStatus {
    /// The instance takes work as far as this one says.
    Passing,
    /// The same, and something is worth a look.
    Warning,
    /// It takes none.
    Failing,
}

impl CheckStatus {
    /// The word of Consul's API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Passing => "passing",
            Self::Warning => "warning",
            Self::Failing => "critical",
        }
    }
}

/// A check as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckState {
    /// What people call it.
    pub name: String,
    /// How it stands.
    pub status: CheckStatus,
    /// What it last said; as long as its runner lets it be.
    pub output: String,
}

#[derive(Debug)]
pub(super) struct Check {
    plan: Plan,
    state: CheckState,
    has_passed: bool,
    /// In a row, until now.
    passes: u32,
    failures: u32,
    turn: Turn,
    began_at: Option<Moment>,
}

/// What a check waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// To be run, or for the last word to run out; a word never said does not run out.
    Waiting(Option<Moment>),
    /// For its run to end. Somebody may have asked for another one meanwhile.
    Running { again: bool },
}

impl Check {
    pub(super) fn new(now: Moment, name: String, plan: Plan, was_passing: bool) -> Self {
        let (status, deadline) = match (was_passing, plan) {
            (false, Plan::Active { .. }) => (CheckStatus::Failing, Some(now)),
            (false, Plan::Told { .. }) => (CheckStatus::Failing, None),
            (true, Plan::Active { .. }) => (CheckStatus::Passing, Some(now)),
            (true, Plan::Told { ttl }) => (CheckStatus::Passing, Some(now + ttl)),
        };
        let output = match plan {
            Plan::Active { .. } => "not checked yet".to_owned(),
            Plan::Told { .. } => "no word yet".to_owned(),
        };
        Self {
            plan,
            state: CheckState { name, status, output },
            has_passed: was_passing,
            passes: 0,
            failures: 0,
            turn: Turn::Waiting(deadline),
            began_at: None,
        }
    }

    pub(super) fn state(&self) -> &CheckState {
        &self.state
    }

    /// What is wrong, if the check fails.
    pub(super) fn fault(&self) -> Option<String> {
        let CheckState { name, status, output } = &self.state;
        (*status == CheckStatus::Failing).then(|| format!("{name}: {output}"))
    }

    pub(super) fn deadline(&self) -> Option<Moment> {
        match self.turn {
            Turn::Waiting(deadline) => deadline,
            Turn::Running { .. } => None,
        }
    }

    /// Whether the application says how it is, and nothing is run.
    pub(super) fn is_told(&self) -> bool {
        matches!(self.plan, Plan::Told { .. })
    }

    /// Whether it is to be run now; then it runs.
    pub(super) fn begin(&mut self, now: Moment) -> bool {
        let is_due = !self.is_told() && self.deadline().is_some_and(|deadline| deadline <= now);
        if is_due {
            self.turn = Turn::Running { again: false };
            self.began_at = Some(now);
        }
        is_due
    }

    pub(super) fn check_now(&mut self, now: Moment) {
        if let Plan::Told { .. } = self.plan {
            return;
        }
        let earliest = self.began_at.map_or(now, |began| now.max(began + FAST_INTERVAL));
        match &mut self.turn {
            Turn::Running { again } => *again = true,
            Turn::Waiting(deadline) => {
                *deadline = Some(deadline.map_or(earliest, |deadline| deadline.min(earliest)));
            }
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Moment) {
        let Plan::Told { ttl } = self.plan else { return };
        if self.deadline().is_some_and(|deadline| deadline <= now) {
            self.state.status = CheckStatus::Failing;
            self.state.output = format!("no word for {ttl:?}");
            self.turn = Turn::Waiting(None);
        }
    }

    pub(super) fn handle_word(&mut self, now: Moment, result: CheckResult, output: String) -> bool {
        let Plan::Told { ttl } = self.plan else { return false };
        self.state.status = status(result);
        self.state.output = output;
        self.turn = Turn::Waiting(Some(now + ttl));
        true
    }

    pub(super) fn handle_result(
        &mut self,
        now: Moment,
        result: CheckResult,
        output: String,
        rng: &mut impl RngExt,
    ) {
        let (Plan::Active { interval, rise, fall }, Turn::Running { again }) =
            (self.plan, self.turn)
        else {
            return;
        };
        let is_well = result != CheckResult::Fail;
        let is_passing = self.state.status != CheckStatus::Failing;
        (self.passes, self.failures) = match is_well {
            true => (self.passes.saturating_add(1), 0),
            false => (0, self.failures.saturating_add(1)),
        };
        let is_enough = match is_well {
            true => self.passes >= rise || !self.has_passed,
            false => self.failures >= fall,
        };
        if is_enough || is_well == is_passing {
            self.state.status = status(result);
        }
        self.state.output = output;
        self.has_passed |= is_well;
        let wait = match is_well || self.failures >= fall {
            true => jittered(interval, rng),
            false => FAST_INTERVAL.min(interval),
        };
        self.turn = Turn::Waiting(Some(now + wait));
        if again {
            self.check_now(now);
        }
    }
}

fn status(result: CheckResult) -> CheckStatus {
    match result {
        CheckResult::Pass => CheckStatus::Passing,
        CheckResult::Warn => CheckStatus::Warning,
        CheckResult::Fail => CheckStatus::Failing,
    }
}

/// A tenth more or less.
fn jittered(interval: Duration, rng: &mut impl RngExt) -> Duration {
    interval.mul_f64(rng.random_range(0.9..=1.1))
}
