//! What a call to an endpoint costs: its latency, which remembers peaks, and what failures add.
//!
//! The latency is a peak-sensitive moving average as in Finagle: a slow call counts at once, and is
//! forgotten in [`MEMORY`]. A failure is recorded beside it, as a penalty: an endpoint that fails
//! fast would otherwise look like the best one and attract every call (linkerd's load biaser).
//! Penalties double while failures follow each other, so that they outgrow any honest latency.

use std::time::Duration;

use crate::model::Moment;

/// In this time all but `1/e` of a peak or a penalty is forgotten. One that answered once in a second,
/// among others that answer at once, or that failed once, is out of favour for some ten seconds, as long
/// as a breaker's window and its ramp. With the ten of Finagle and linkerd it would be a minute.
const MEMORY: Duration = Duration::from_secs(2);
/// Cheaper than this counts as this. It is what an endpoint costs that nobody has called: at nothing it
/// would attract every call at once. And of what is faster a single peak, of a connection that is made or
/// of a scheduler, would decide for seconds where few calls come; calls in flight say it better.
const FLOOR_NANOS: f64 = 5e6;
/// The first failure adds this much; each further doubles what is left of it.
const PENALTY_MIN_NANOS: f64 = 1e9;
/// Penalties end here, however often it fails.
const PENALTY_MAX_NANOS: f64 = 60e9;
/// The cost of calls to one endpoint. 24 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PeakEwma {
    /// Both in nanoseconds, as they were then.
    latency: f64,
    penalty: f64,
    as_of: Moment,
}

impl PeakEwma {
    /// A call took this long until it was answered.
    pub fn handle_latency(&mut self, now: Moment, latency: Duration) {
        let kept = self.kept(now, MEMORY);
        let sample = latency.as_nanos() as f64;
        let is_peak = sample >= self.latency * kept;
        let averaged = self.latency * kept + sample * (1.0 - kept);
        self.latency = if is_peak { sample } else { averaged };
        self.penalty *= self.kept(now, MEMORY);
        self.as_of = now;
    }

    /// A caller gave up after this time: it would have taken longer.
    pub fn handle_given_up(&mut self, now: Moment, waited: Duration) {
        if waited.as_nanos() as f64 > self.latency * self.kept(now, MEMORY) {
            self.handle_latency(now, waited);
        }
    }

    /// A call failed.
    pub fn handle_failure(&mut self, now: Moment) {
        self.latency *= self.kept(now, MEMORY);
        let left = self.penalty * self.kept(now, MEMORY);
        self.penalty = (left * 2.0).clamp(PENALTY_MIN_NANOS, PENALTY_MAX_NANOS);
        self.as_of = now;
    }

    /// What a call would cost now, in nanoseconds; at least 5 ms. Changes nothing.
    pub fn cost_at(&self, now: Moment) -> f64 {
        if self.latency + self.penalty <= FLOOR_NANOS {
            return FLOOR_NANOS; // what most endpoints of a local network cost: nothing to work out
        }
        let latency = self.latency * self.kept(now, MEMORY);
        let penalty = match self.penalty {
            0.0 => 0.0,
            penalty => penalty * self.kept(now, MEMORY),
        };
        (latency + penalty).max(FLOOR_NANOS)
    }

    /// The part of the cost that is for calls that failed, in nanoseconds.
    pub fn penalty_at(&self, now: Moment) -> f64 {
        self.penalty * self.kept(now, MEMORY)
    }

    /// The latency of answered calls alone; `None` when nothing was measured, or all of it forgotten.
    pub fn latency_at(&self, now: Moment) -> Option<Duration> {
        let is_known = self.latency > 0.0 && now.since(self.as_of) < MEMORY * 30;
        // Of those that rest the last figure says more than what is left of it.
        is_known.then(|| Duration::from_nanos(self.latency as u64))
    }

    /// The share of the past that still counts.
    fn kept(&self, now: Moment, memory: Duration) -> f64 {
        (-now.since(self.as_of).as_secs_f64() / memory.as_secs_f64()).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: f64 = 1e6;

    fn at(millis: u64) -> Moment {
        Moment::from_millis(millis)
    }

    /// Measured every 10 ms for a while, as it is then.
    fn steady(latency: Duration) -> PeakEwma {
        let mut cost = PeakEwma::default();
        for millis in (0..30_000).step_by(10) {
            cost.handle_latency(at(millis), latency);
        }
        cost
    }

    #[test]
    fn one_that_was_never_called_costs_the_floor_and_not_nothing() {
        assert_eq!(PeakEwma::default().cost_at(at(5)), FLOOR_NANOS);
        assert_eq!(PeakEwma::default().latency_at(at(5)), None);
        assert_eq!(steady(Duration::from_micros(80)).cost_at(at(30_000)), FLOOR_NANOS);
    }

    #[test]
    fn peak_counts_at_once_and_is_forgotten_in_time() {
        let mut cost = steady(Duration::from_millis(20));
        cost.handle_latency(at(30_000), Duration::from_millis(900));
        assert_eq!(cost.cost_at(at(30_000)), 900.0 * MS);
        for millis in (30_010..38_000).step_by(10) {
            cost.handle_latency(at(millis), Duration::from_millis(20));
        }
        let after = cost.cost_at(at(38_000));
        assert!((20.0 * MS..40.0 * MS).contains(&after), "{after} ns, 8 s after the peak");
    }

    #[test]
    fn reading_changes_nothing_and_sees_what_time_has_forgotten() {
        let mut cost = PeakEwma::default();
        cost.handle_latency(at(0), Duration::from_millis(1_000));
        let before = cost;
        let a_memory_later = cost.cost_at(at(2_000));
        assert!((360.0 * MS..370.0 * MS).contains(&a_memory_later), "{a_memory_later}");
        assert_eq!(cost, before);
        assert_eq!(cost.cost_at(at(300_000)), FLOOR_NANOS);
    }

    #[test]
    fn one_that_fails_fast_costs_more_than_any_that_answers_slowly() {
        let slow = steady(Duration::from_secs(20));
        let mut failing = PeakEwma::default();
        for failure in 0..10 {
            failing.handle_failure(at(30_000 + failure * 10));
        }
        assert!(failing.cost_at(at(30_100)) > 2.0 * slow.cost_at(at(30_100)));
        assert_eq!(failing.latency_at(at(30_100)), None, "a penalty is no measurement");
        let mut once = steady(Duration::from_millis(5));
        once.handle_failure(at(30_000));
        assert!(once.cost_at(at(30_000)) >= 1_000.0 * MS);
        assert!(once.cost_at(at(45_000)) < 1.2 * FLOOR_NANOS, "and is forgiven after 15 s");
    }
}
