//! One call to an instance: in flight while it lives, and with exactly one outcome.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::board::{Boards, Picked};
use crate::breaker::Trial;
use crate::mesh::Endpoint;
use crate::model::{Moment, Outcome};

/// A call in flight, until it is dropped. Its first outcome counts; without one it says nothing about
/// the instance, unless it took longer than its entry allows.
#[derive(Debug)]
pub(super) struct Call {
    boards: Arc<Boards>,
    picked: Picked,
    /// Whether it tries the instance for its breaker.
    trial: Option<Trial>,
    /// When the instance was asked, in nanoseconds; 0 before.
    asked_at: AtomicU64,
    is_answered: AtomicBool,
    is_judged: AtomicBool,
    /// When it ended, where that was noted.
    ended_at: Option<Moment>,
    /// Whether its caller has nobody else.
    insists: bool,
    /// From being asked, after which no answer is the instance's fault.
    limit: Option<Duration>,
    /// For how long this agent had not run before.
    slept_before: Duration,
}

impl Call {
    pub(super) fn new(
        now: Moment,
        boards: &Arc<Boards>,
        picked: Picked,
        insists: bool,
        limit: Option<Duration>,
    ) -> Self {
        picked.slot().enter(now);
        let trial = boards.begin(now, &picked);
        Self {
            boards: Arc::clone(boards),
            picked,
            trial,
            asked_at: AtomicU64::new(0),
            is_answered: AtomicBool::new(false),
            is_judged: AtomicBool::new(false),
            ended_at: None,
            insists,
            limit,
            slept_before: boards.slept(now),
        }
    }

    /// Which instance, as it was seen when it was picked.
    pub(super) fn endpoint(&self) -> &Endpoint {
        self.picked.endpoint()
    }

    /// With what is known of it.
    pub(super) fn picked(&self) -> &Picked {
        &self.picked
    }

    /// Whether its caller has nobody else.
    pub(super) fn insists(&self) -> bool {
        self.insists
    }

    /// All calls of its instance that are in flight from here, itself among them.
    pub(super) fn count(&self) -> u32 {
        self.picked.slot().calls()
    }

    /// The instance is asked, since this moment.
    pub(super) fn ask(&self, at: Moment) {
        self.asked_at.store(at.as_nanos().max(1), Ordering::Relaxed);
    }

    /// Until `moment` it was not the instance that was waited for, but its caller.
    pub(super) fn ask_from(&self, moment: Moment) {
        if self.asked_at.load(Ordering::Relaxed) > 0 {
            self.asked_at.fetch_max(moment.as_nanos(), Ordering::Relaxed);
        }
    }

    /// It was taken: its answer begins, or its connection is there. Trouble of before is over.
    pub(super) fn note_answer(&self) {
        let now = self.boards.now();
        self.picked.slot().note_taken(now);
        if let Some(waited) = self.waited(now)
            && !self.is_answered.swap(true, Ordering::Relaxed)
        {
            self.picked.slot().note_latency(now, waited);
        }
    }

    /// The time that it takes is not the instance's: its agent has fallen silent, or is gone.
    pub(super) fn excuse(&self) {
        self.asked_at.store(0, Ordering::Relaxed);
    }

    /// How it ended. Only the first word counts. A failure while this agent did not run says nothing.
    pub(super) fn judge(&self, outcome: Outcome) {
        if !self.is_judged.load(Ordering::Relaxed) {
            self.judge_at(self.boards.now(), outcome);
        }
    }

    /// It ends now, like this.
    pub(super) fn end(mut self, now: Moment, outcome: Outcome) {
        self.judge_at(now, outcome);
        self.ended_at = Some(now);
    }

    fn judge_at(&self, now: Moment, outcome: Outcome) {
        if !self.is_judged.swap(true, Ordering::Relaxed) {
            let is_ours = outcome.is_failure() && !self.slept(now).is_zero();
            let outcome = if is_ours { Outcome::Unknown } else { outcome };
            self.boards.settle(now, &self.picked, self.trial, outcome);
        }
    }

    /// How long this agent has waited for the instance by now.
    fn waited(&self, now: Moment) -> Option<Duration> {
        let asked_at = self.asked_at.load(Ordering::Relaxed);
        let since = now.since(Moment::from_nanos(asked_at));
        (asked_at > 0).then(|| since.saturating_sub(self.slept(now)))
    }

    /// For how long this agent has not run since the call began.
    fn slept(&self, now: Moment) -> Duration {
        self.boards.slept(now).saturating_sub(self.slept_before)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let now = self.ended_at.unwrap_or_else(|| self.boards.now());
        self.picked.slot().leave(now);
        if self.is_judged.load(Ordering::Relaxed) {
            return;
        }
        let mut outcome = Outcome::Unknown;
        if let Some(waited) = self.waited(now)
            && !self.is_answered.load(Ordering::Relaxed)
        {
            self.picked.slot().note_given_up(now, waited);
            if self.limit.is_some_and(|limit| waited >= limit) {
                outcome = Outcome::Failed;
            }
        }
        self.judge_at(now, outcome);
    }
}
