//! All pending timers by deadline.

use std::collections::BTreeMap;

use crate::model::{Moment, StoreSize};

/// Most timers that wait. foca asks for a handful per member and period; beyond, the latest is
/// dropped, which delays what it was for to the next round.
const TIMERS_MAX: usize = 65_536;

/// Timers, ordered by deadline and then by when they were set.
#[derive(Debug)]
pub(super) struct Timers<T> {
    pending: BTreeMap<(Moment, u64), T>,
    set: u64,
}

impl<T> Default for Timers<T> {
    fn default() -> Self {
        Self { pending: BTreeMap::new(), set: 0 }
    }
}

impl<T> Timers<T> {
    /// Asks for `timer` at `deadline`.
    pub(super) fn set(&mut self, deadline: Moment, timer: T) {
        self.set += 1;
        self.pending.insert((deadline, self.set), timer);
        if self.pending.len() > TIMERS_MAX {
            self.pending.pop_last();
        }
    }

    /// The first timer whose deadline has come.
    pub(super) fn take_due(&mut self, now: Moment) -> Option<T> {
        let entry = self.pending.first_entry()?;
        let (deadline, _) = *entry.key();
        (deadline <= now).then(|| entry.remove())
    }

    /// Forgets the timers that `keep` does not want.
    pub(super) fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        self.pending.retain(|_, timer| keep(timer));
    }

    /// Whether a timer waits that `is_sought` takes.
    pub(super) fn any(&self, is_sought: impl Fn(&T) -> bool) -> bool {
        self.pending.values().any(is_sought)
    }

    pub(super) fn store_size(&self) -> StoreSize {
        StoreSize::new("timers", self.pending.len(), TIMERS_MAX)
    }

    /// The first deadline.
    pub(super) fn next_deadline(&self) -> Option<Moment> {
        self.pending.keys().next().map(|(deadline, _)| *deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_come_due_by_deadline_and_ties_in_the_order_they_were_set() {
        let mut timers = Timers::default();
        let at = Moment::from_secs;
        timers.set(at(2), "late");
        timers.set(at(1), "first");
        timers.set(at(1), "second");
        assert_eq!(timers.next_deadline(), Some(at(1)));
        assert_eq!(timers.take_due(Moment::START), None);
        assert_eq!(timers.take_due(at(1)), Some("first"));
        assert_eq!(timers.take_due(at(1)), Some("second"));
        assert_eq!(timers.take_due(at(1)), None);
        assert!(timers.any(|timer| *timer == "late"));
        timers.retain(|timer| *timer != "late");
        assert!(!timers.any(|timer| *timer == "late"));
        assert_eq!(timers.next_deadline(), None);
    }
}
