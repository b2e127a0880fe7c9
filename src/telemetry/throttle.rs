//! How many events of a kind are recorded. What a peer or a client can repeat for ever costs a
//! bounded number of log lines and takes the place of no other kind.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::EventKind;
use crate::model::Moment;

/// Of the same trouble with the same subject, one event in this time; the counters have them all.
const REPEAT_PERIOD: Duration = Duration::from_secs(1);
/// Events of one kind at once: a mesh of 1,000 that starts tells of each member.
pub(super) const BURST_MAX: u32 = 1_000;
/// One more event of a kind in this time, after a burst. A flood costs 2.5 KB of log in a second.
const REFILL_PERIOD: Duration = Duration::from_millis(100);

/// What is to become of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Record,
    /// The same was recorded a moment ago.
    Repeated,
    /// There were too many of its kind.
    TooMany,
}

/// The allowances of all kinds.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    kinds: BTreeMap<EventKind, Allowance>,
}

#[derive(Debug)]
struct Allowance {
    left: u32,
    refilled_at: Moment,
    /// What was recorded since `period_began`: at most [`BURST_MAX`] and what was refilled.
    recorded: BTreeSet<(String, String)>,
    period_began: Moment,
}

impl Throttle {
    /// Judges an event, and counts it when it is to be recorded.
    pub(super) fn admit(
        &mut self,
        now: Moment,
        kind: EventKind,
        subject: &str,
        reason: &str,
    ) -> Verdict {
        let allowance = self.kinds.entry(kind).or_insert_with(|| Allowance::full(now));
        allowance.refill(now);
        let what = (subject.to_owned(), reason.to_owned());
        if kind.is_trouble() && allowance.recorded.contains(&what) {
            return Verdict::Repeated;
        }
        if allowance.left == 0 {
            return Verdict::TooMany;
        }
        allowance.left -= 1;
        if kind.is_trouble() {
            allowance.recorded.insert(what);
        }
        Verdict::Record
    }
}

impl Allowance {
    fn full(now: Moment) -> Self {
        Self { left: BURST_MAX, refilled_at: now, recorded: BTreeSet::new(), period_began: now }
    }

    fn refill(&mut self, now: Moment) {
        let periods = now.since(self.refilled_at).as_millis() / REFILL_PERIOD.as_millis();
        let more = u32::try_from(periods).unwrap_or(u32::MAX).min(BURST_MAX);
        if more > 0 {
            self.left = (self.left + more).min(BURST_MAX);
            self.refilled_at = now;
        }
        if now.since(self.period_began) >= REPEAT_PERIOD {
            // All at once: looking at each on every event would cost more than what it saves.
            self.recorded.clear();
            self.period_began = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REFUSED: EventKind = EventKind::ConnectionRefused;

    #[test]
    fn the_same_trouble_is_recorded_once_in_a_second_and_a_change_of_state_always() {
        let mut throttle = Throttle::default();
        let mut at = |millis, kind, subject, reason| {
            throttle.admit(Moment::from_millis(millis), kind, subject, reason)
        };
        assert_eq!(at(0, REFUSED, "web", "denied"), Verdict::Record);
        assert_eq!(at(1, REFUSED, "web", "denied"), Verdict::Repeated);
        assert_eq!(at(2, REFUSED, "web", "no_endpoints"), Verdict::Record);
        assert_eq!(at(3, REFUSED, "db", "denied"), Verdict::Record);
        assert_eq!(at(1_000, REFUSED, "web", "denied"), Verdict::Record);
        for millis in [5, 6, 7] {
            assert_eq!(at(millis, EventKind::InstanceAdded, "web", "at b"), Verdict::Record);
        }
    }

    #[test]
    fn a_flood_of_one_kind_is_cut_to_ten_a_second_and_leaves_the_others_alone() {
        let mut throttle = Throttle::default();
        let mut recorded = 0;
        for millis in 0..100_000 {
            let (now, subject) = (Moment::from_millis(millis), format!("name-{millis}"));
            let verdict = throttle.admit(now, REFUSED, &subject, "unknown_service");
            recorded += u32::from(verdict == Verdict::Record);
        }
        assert!((BURST_MAX + 990..=BURST_MAX + 1_000).contains(&recorded), "{recorded}");
        let now = Moment::from_millis(100_000);
        assert_eq!(throttle.admit(now, EventKind::MemberDown, "b", "dead"), Verdict::Record);
        assert!(throttle.kinds[&REFUSED].recorded.len() <= 10, "{throttle:?}");
    }
}
