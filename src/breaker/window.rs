//! What one caller saw of one instance lately: counts of the last window in ten buckets, and the
//! stretch of failures that goes on now. Of one size, and O(1) per outcome.

use std::time::Duration;

use crate::model::Moment;

const BUCKETS: usize = 10;

/// What a caller saw of an instance lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Calls that say something: while a stretch of failures goes on those since its first failure,
    /// that one included; else those of the whole window.
    pub samples: u16,
    /// Those of them that failed.
    pub failures: u16,
    /// How long ago the stretch of failures began that goes on now. A stretch begins with a failure and
    /// ends as soon as the share of failures in it falls to the ratio, or when nothing has failed for a
    /// window's time: successes of before never water it down.
    pub first_failure_age: Option<Duration>,
    /// How long ago a call failed last, if that was within the window.
    pub last_failure_age: Option<Duration>,
    /// How long ago a call succeeded last, if that was within the window.
    pub last_success_age: Option<Duration>,
}

/// Counts that saturate at 65,535: by then the share is known well enough.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    samples: u16,
    failures: u16,
}

impl Tally {
    fn add(&mut self, is_failure: bool) {
        if self.samples == u16::MAX {
            self.samples /= 2; // the share stays
            self.failures /= 2;
        }
        self.samples += 1;
        self.failures += u16::from(is_failure);
    }

    fn is_over(&self, ratio: f32) -> bool {
        f32::from(self.failures) > ratio * f32::from(self.samples)
    }
}

/// The calls of the last window by their time.
#[derive(Clone, Debug)]
pub(super) struct Counts {
    /// Time that one bucket covers, in nanoseconds.
    step: u64,
    buckets: [Tally; BUCKETS],
    /// The newest bucket, counted from the start of time.
    newest: u64,
}

impl Counts {
    pub(super) fn new(window: Duration) -> Self {
        let nanos = u64::try_from(window.as_nanos()).unwrap_or(u64::MAX);
        Self { step: (nanos / BUCKETS as u64).max(1), buckets: Default::default(), newest: 0 }
    }

    pub(super) fn add(&mut self, now: Moment, is_failure: bool) {
        let number = now.as_nanos() / self.step;
        let gone = number.saturating_sub(self.newest).min(BUCKETS as u64);
        for skipped in 0..gone {
            self.buckets[place(number - skipped)] = Tally::default();
        }
        self.newest = self.newest.max(number);
        self.buckets[place(self.newest)].add(is_failure);
    }

    pub(super) fn clear(&mut self) {
        self.buckets = Default::default();
    }

    /// Calls and failures in the window that ends now.
    pub(super) fn sums(&self, now: Moment) -> (u32, u32) {
        let length = BUCKETS as u64;
        let oldest = (now.as_nanos() / self.step + 1).saturating_sub(length);
        let first = oldest.max((self.newest + 1).saturating_sub(length));
        (first..=self.newest).map(|number| self.buckets[place(number)]).fold(
            (0, 0),
            |(samples, failures), tally| {
                (samples + u32::from(tally.samples), failures + u32::from(tally.failures))
            },
        )
    }

    /// Time that all buckets cover.
    pub(super) const fn window(&self) -> Duration {
        Duration::from_nanos(self.step.saturating_mul(BUCKETS as u64))
    }
}

const fn place(number: u64) -> usize {
    (number % BUCKETS as u64) as usize
}

/// A stretch in which failures outweigh: Page's cumulative sum, with the share in place of the score.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub(super) began_at: Moment,
    last_failure_at: Moment,
    tally: Tally,
}

impl Stretch {
    /// The stretch after one more call.
    pub(super) fn after(
        stretch: Option<Self>,
        now: Moment,
        is_failure: bool,
        ratio: f32,
        window: Duration,
    ) -> Option<Self> {
        let going_on = stretch.filter(|stretch| stretch.is_fresh(now, window));
        let fresh = Self { began_at: now, last_failure_at: now, tally: Tally::default() };
        let mut stretch = match (going_on, is_failure) {
            (Some(stretch), _) => stretch,
            (None, true) => fresh,
            (None, false) => return None,
        };
        stretch.tally.add(is_failure);
        if is_failure {
            stretch.last_failure_at = now;
        }
        stretch.tally.is_over(ratio).then_some(stretch)
    }

    pub(super) fn is_fresh(&self, now: Moment, window: Duration) -> bool {
        now.since(self.last_failure_at) < window
    }

    pub(super) const fn samples(&self) -> u16 {
        self.tally.samples
    }

    pub(super) const fn failures(&self) -> u16 {
        self.tally.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);

    #[test]
    fn calls_leave_the_window_bucket_by_bucket() {
        let mut counts = Counts::new(WINDOW);
        for second in 0..10 {
            counts.add(Moment::from_secs(second), second % 2 == 0);
        }
        assert_eq!(counts.sums(Moment::from_secs(9)), (10, 5));
        assert_eq!(counts.sums(Moment::from_secs(10)), (9, 4), "the first second is gone");
        assert_eq!(counts.sums(Moment::from_secs(18)), (1, 0));
        assert_eq!(counts.sums(Moment::from_secs(19)), (0, 0));
        counts.add(Moment::from_secs(14), true);
        assert_eq!(
            counts.sums(Moment::from_secs(14)),
            (6, 3),
            "buckets of old calls are not reused"
        );
        counts.add(Moment::from_secs(1_000), true);
        assert_eq!(counts.sums(Moment::from_secs(1_000)), (1, 1));
    }

    #[test]
    fn stretch_of_failures_is_not_watered_down_by_what_was_before() {
        let mut stretch = None;
        let mut now = Moment::START;
        let mut call = |is_failure: bool| {
            now = now + Duration::from_millis(10);
            stretch = Stretch::after(stretch, now, is_failure, 0.5, WINDOW);
            stretch.map(|stretch: Stretch| (stretch.samples(), stretch.failures()))
        };
        assert_eq!(call(true), Some((1, 1)));
        assert_eq!(call(true), Some((2, 2)));
        assert_eq!(call(false), Some((3, 2)));
        assert_eq!(call(false), None, "no more failures than successes");
        assert_eq!((0..900).filter_map(|_| call(false)).next(), None);
        assert_eq!(call(true), Some((1, 1)), "900 successes of before do not count");
        assert_eq!(call(true), Some((2, 2)));
    }

    #[test]
    fn stretch_ends_when_nothing_has_failed_for_a_window() {
        let first = Stretch::after(None, Moment::from_secs(1), true, 0.5, WINDOW);
        assert!(first.is_some_and(|stretch| stretch.is_fresh(Moment::from_millis(10_999), WINDOW)));
        let later = Stretch::after(first, Moment::from_secs(11), true, 0.5, WINDOW);
        assert_eq!(later.map(|stretch| stretch.samples()), Some(1));
    }
}
