//! How old another member's report is, by two clocks that nobody has set to each other.
//!
//! A report names the time at which it was signed. Its lag, from there to this node's own time, is its
//! age and what the clocks differ by. The least lag of the last few reports is taken for the difference:
//! a report that is fresh corrects it at once, and one that a partition held back does not move it. What
//! is given of the clocks before the first report is that they differ by less than a tolerance.
//!
//! A clock that is ahead is understood from its first report on, one that is behind by more than that
//! after [`LAGS`]; until then what it says looks older than it is, and counts the less. Both are
//! clocks that do not step while their agents run; that of a machine which slept is behind. An owner
//! that lies about the time makes its words look older, or as fresh as it could sign them any time.

use std::time::Duration;

/// Lags that are kept. A partition or a restart holds one report of a member back, perhaps two.
const LAGS: usize = 3;

/// Of reports that arrive within this time of one another only the first tells of the clocks: an agent
/// that did not run for a while finds many that waited for it.
const BURST_MS: u64 = 500;

/// What is known of another member's clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Skew {
    /// In milliseconds, the newest last.
    lags: [i64; LAGS],
    /// When the newest of them was measured.
    measured_at_ms: Option<u64>,
    /// When the last report was signed: the same one may be read again, and then tells nothing new.
    signed_at_ms: Option<u64>,
}

impl Skew {
    /// Of a member that has not been heard yet.
    pub(super) fn new(tolerance: Duration) -> Self {
        let lag = i64::try_from(tolerance.as_millis()).unwrap_or(i64::MAX);
        Self { lags: [lag; LAGS], measured_at_ms: None, signed_at_ms: None }
    }

    /// The age of a report that has just arrived. Both times are in milliseconds since 1970, each on its
    /// own clock.
    pub(super) fn age(&mut self, now_ms: u64, signed_at_ms: u64) -> Duration {
        let millis = |time: u64| i64::try_from(time).unwrap_or(i64::MAX);
        let lag = millis(now_ms) - millis(signed_at_ms); // of two that are not negative
        let least = self.lags.iter().fold(lag, |least, one| least.min(*one));
        let is_new = self.signed_at_ms.replace(signed_at_ms) != Some(signed_at_ms);
        if is_new && self.measured_at_ms.is_none_or(|at| now_ms.abs_diff(at) >= BURST_MS) {
            self.lags.rotate_left(1);
            self.lags[LAGS - 1] = lag;
            self.measured_at_ms = Some(now_ms);
        }
        Duration::from_millis(lag.abs_diff(least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLERANCE: Duration = Duration::from_secs(2);
    const HOUR: i64 = 3_600_000;

    /// Ages, in milliseconds, of reports that were signed `skew` off true time: when, and when they came.
    fn ages(skew: i64, reports: &[(i64, i64)]) -> Vec<u128> {
        let mut known = Skew::new(TOLERANCE);
        let time = |at: i64| (HOUR + at) as u64;
        let age = |(signed, came): &(i64, i64)| known.age(time(*came), time(signed + skew));
        reports.iter().map(age).map(|age| age.as_millis()).collect()
    }

    #[test]
    fn fresh_reports_are_fresh_whatever_the_clocks_say_and_late_ones_are_late() {
        let minutes = 300_000;
        // Three that arrive at once, one that a partition held back for 5 minutes, one after it.
        let reports = [(0, 50), (1_000, 1_010), (2_000, 2_050), (3_000, 3_000 + minutes)];
        for skew in [0, 30_000, -30_000, -500] {
            let ages = ages(skew, &[&reports[..], &[(304_000, 304_020)]].concat());
            assert!(ages[3].abs_diff(300_000) < 2_100, "{skew}: {ages:?}");
            assert!(ages[4] < 100, "{skew}: {ages:?}");
            assert!(ages[2] < 100 || skew < -2_000, "{skew}: {ages:?}");
        }
    }

    #[test]
    fn first_report_is_judged_by_the_plain_difference_with_a_tolerance() {
        assert_eq!(ages(0, &[(0, 1_999)]), [0]);
        assert_eq!(ages(0, &[(0, 60_000)]), [58_000]);
        assert_eq!(ages(30_000, &[(0, 10)]), [0], "ahead by 30 s");
        assert_eq!(ages(-30_000, &[(0, 10)]), [28_010], "behind by 30 s: too old, to be safe");
    }

    #[test]
    fn two_late_reports_in_a_row_do_not_make_each_other_fresh() {
        let ages = ages(0, &[(0, 600_000), (300_000, 600_600), (601_200, 601_210)]);
        assert_eq!(ages, [598_000, 298_600, 0]);
    }

    #[test]
    fn reports_that_waited_for_an_agent_which_did_not_run_do_not_make_each_other_fresh() {
        let before = (-3..0).map(|number| (number * 1_000, number * 1_000 + 20));
        let waited = (0..20).map(|number| (number * 1_000, 20_000 + number));
        let ages = ages(0, &before.chain(waited).collect::<Vec<_>>());
        let late = ages[3..].iter().zip(0..).map(|(age, number)| age + 999 * number);
        assert!(late.clone().all(|sum| (19_900..=20_000).contains(&sum)), "{ages:?}");
    }

    #[test]
    fn report_that_is_read_again_and_again_grows_old() {
        let again = [(0, 10), (0, 60_000), (0, 120_000), (0, 180_000), (0, 240_000)];
        assert_eq!(ages(0, &again), [0, 59_990, 119_990, 179_990, 239_990]);
    }

    #[test]
    fn clock_that_has_stepped_between_two_runs_is_understood_again() {
        let mut known = Skew::new(TOLERANCE);
        let hour = HOUR as u64;
        let secs = |number: u64| hour + number * 1_000;
        (0..3).for_each(|at| assert_eq!(known.age(secs(at), secs(at)).as_millis(), 0));
        assert_eq!(known.age(secs(10), secs(40)).as_millis(), 0, "30 s forward: at once");
        let back = (20..24).map(|at| known.age(secs(at), secs(at)).as_millis());
        assert_eq!(back.collect::<Vec<_>>(), [30_000, 30_000, 30_000, 0], "back: with the fourth");
    }

    #[test]
    fn owner_that_lies_about_the_time_makes_nothing_younger_that_it_has_signed_before() {
        // Whatever it signs: a report ages from its arrival on, and one that is dated ahead makes those
        // look old that are not.
        assert_eq!(ages(0, &[(60_000, 0), (1_000, 1_000), (61_000, 2_000)]), [0, 60_000, 1_000]);
        let mut known = Skew::new(TOLERANCE);
        assert_eq!(known.age(0, u64::MAX).as_millis(), 0);
        assert!(known.age(u64::MAX, 0).as_millis() > 0);
    }
}
