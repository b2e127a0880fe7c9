//! Time in which this agent did not run: it was stopped, its machine slept, or others had the CPU.
//!
//! Whatever waited meanwhile has waited for us. A call is not the instance's fault then, and the time is
//! no part of what the call took; else an agent that was stopped for 20 s would wake up with 20 s of
//! latency, and failures, of all that it was calling.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::model::Moment;

/// How often somebody [looks](Pauses::look).
pub(super) const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// A look that is later than this was kept from its CPU.
const SLACK: Duration = Duration::from_millis(300);

/// What is known of such time.
#[derive(Debug)]
pub(super) struct Pauses {
    /// In nanoseconds.
    looked_at: AtomicU64,
    /// All pauses before that, in nanoseconds.
    slept: AtomicU64,
}

impl Pauses {
    /// None before `now`.
    pub(super) fn new(now: Moment) -> Self {
        Self { looked_at: AtomicU64::new(now.as_nanos()), slept: AtomicU64::new(0) }
    }

    /// To be called every [`LOOK_PERIOD`].
    pub(super) fn look(&self, now: Moment) {
        let slept = self.slept(now).as_nanos();
        self.slept.store(u64::try_from(slept).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.looked_at.store(now.as_nanos(), Ordering::Relaxed);
    }

    /// All time until `now` in which this agent did not run.
    pub(super) fn slept(&self, now: Moment) -> Duration {
        let looked_at = Moment::from_nanos(self.looked_at.load(Ordering::Relaxed));
        let since = now.since(looked_at);
        let slept = Duration::from_nanos(self.slept.load(Ordering::Relaxed));
        slept + since.saturating_sub(LOOK_PERIOD + SLACK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_without_a_look_was_slept_and_is_known_before_the_next_one() {
        let secs = Duration::from_secs;
        let mut now = Moment::START;
        let pauses = Pauses::new(now);
        for late in [0, 250] {
            now = now + LOOK_PERIOD + Duration::from_millis(late);
            assert_eq!(pauses.slept(now), Duration::ZERO, "as late as looks are");
            pauses.look(now);
        }
        now = now + secs(20);
        let slept = pauses.slept(now);
        assert!(slept > secs(18) && slept <= secs(20), "{slept:?}");
        pauses.look(now);
        assert_eq!(pauses.slept(now + LOOK_PERIOD), slept);
    }
}
