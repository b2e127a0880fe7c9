//! The last trouble with somebody: for a while new calls go elsewhere.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::model::Moment;

/// How long somebody is avoided after the first trouble; doubled with each further, up to
/// [`AVOID_MAX`], plus up to as much again, so that callers do not come back together.
const AVOID_MIN: Duration = Duration::from_millis(500);
const AVOID_MAX: Duration = Duration::from_secs(4);

/// Trouble with one endpoint, or with one member. Read with every call: without a lock.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    /// Until when it is avoided, in nanoseconds.
    until: AtomicU64,
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    pause: Duration,
    reason: &'static str,
}

impl Trouble {
    /// Why it is avoided, if it is.
    pub(super) fn at(&self, now: Moment) -> Option<&'static str> {
        self.lasts(now).then(|| self.last.lock().reason)
    }

    /// Whether it is avoided.
    pub(super) fn lasts(&self, now: Moment) -> bool {
        now < self.until()
    }

    /// There is trouble again. `jitter` from 0 to 1 is how much of the pause is added.
    pub(super) fn add(&self, now: Moment, jitter: f64, reason: &'static str) {
        let mut last = self.last.lock();
        last.reason = reason;
        let until = self.until();
        if now < until {
            return;
        }
        // What is long over is forgotten.
        let is_new = last.pause.is_zero() || until + AVOID_MAX <= now;
        last.pause = if is_new { AVOID_MIN } else { (last.pause * 2).min(AVOID_MAX) };
        let until = now + last.pause.mul_f64(1.0 + jitter);
        self.until.store(until.as_nanos(), Ordering::Relaxed);
    }

    /// It wants no calls for so long.
    pub(super) fn leave_alone(&self, now: Moment, time: Duration) {
        *self.last.lock() = Last { pause: AVOID_MIN, reason: "retry_after" };
        self.until.store((now + time).as_nanos(), Ordering::Relaxed);
    }

    /// It took a call.
    pub(super) fn forgive(&self) {
        if self.until.load(Ordering::Relaxed) != 0 {
            *self.last.lock() = Last::default();
            self.until.store(0, Ordering::Relaxed);
        }
    }

    fn until(&self) -> Moment {
        Moment::from_nanos(self.until.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_lasts_longer_each_time_until_it_is_forgiven() {
        let at = Moment::from_millis;
        let trouble = Trouble::default();
        assert_eq!(trouble.at(at(0)), None);
        trouble.add(at(1_000), 0.0, "unreachable");
        trouble.add(at(1_200), 0.0, "silent"); // within: its reason counts, not its pause
        assert_eq!(trouble.at(at(1_499)), Some("silent"));
        assert_eq!(trouble.at(at(1_500)), None);
        trouble.add(at(2_000), 1.0, "unreachable");
        assert!(trouble.lasts(at(3_999)) && !trouble.lasts(at(4_000)), "twice as long, and jitter");
        trouble.forgive();
        assert!(!trouble.lasts(at(3_000)));
        trouble.add(at(5_000), 0.0, "unreachable");
        assert!(!trouble.lasts(at(5_500)), "as if for the first time");
    }
}
