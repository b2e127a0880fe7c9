//! How much of something each of many may have: a whole allowance at once, and then as much as time
//! gives back.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::model::{Moment, StoreSize};

/// An allowance for each of many.
#[derive(Debug)]
pub(super) struct Allowances<K> {
    /// What may be spent at once; the last may go over.
    whole: usize,
    /// Time in which a spent allowance is whole again.
    refill: Duration,
    len_max: usize,
    /// When each allowance will be whole again. At most `len_max`: beyond, nobody else gets one. Kept
    /// until [`Allowances::forget_whole`].
    whole_at: BTreeMap<K, Moment>,
}

impl<K: Ord> Allowances<K> {
    pub(super) const fn new(whole: usize, refill: Duration, len_max: usize) -> Self {
        Self { whole, refill, len_max, whole_at: BTreeMap::new() }
    }

    /// Whether `who` has something left.
    pub(super) fn has_left(&self, now: Moment, who: &K) -> bool {
        match self.whole_at.get(who) {
            Some(whole_at) => whole_at.since(now) < self.refill,
            None => self.whole_at.len() < self.len_max,
        }
    }

    /// Takes `amount` from what `who` has.
    pub(super) fn spend(&mut self, now: Moment, who: K, amount: usize) {
        let whole_at = self.whole_at.entry(who).or_insert(now);
        let cost = self.refill.mul_f64(amount as f64 / self.whole as f64);
        *whole_at = (*whole_at).max(now) + cost;
    }

    /// Forgets whoever has spent nothing that time has not given back.
    pub(super) fn forget_whole(&mut self, now: Moment) {
        self.whole_at.retain(|_, at| *at > now);
    }

    pub(super) fn store_size(&self, name: &'static str) -> StoreSize {
        StoreSize::new(name, self.whole_at.len(), self.len_max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_allowance_is_spent_at_once_and_comes_back_evenly_for_each() {
        let mut allowances = Allowances::new(4, Duration::from_secs(2), 2);
        let mut spent = |at: u64, who: u8| {
            let now = Moment::from_millis(at);
            allowances.forget_whole(now);
            let has_left = allowances.has_left(now, &who);
            if has_left {
                allowances.spend(now, who, 1);
            }
            has_left
        };
        assert_eq!((0..9).filter(|_| spent(0, 1)).count(), 4);
        assert_eq!((0..9).filter(|_| spent(0, 2)).count(), 4, "each has its own");
        assert!(!spent(0, 3), "no more than two have one");
        assert!(spent(1, 1), "the last may go over");
        assert!(!spent(500, 1));
        assert!(spent(501, 1), "a quarter is back");
        assert!(!spent(502, 1));
        assert_eq!((0..9).filter(|_| spent(4_000, 3)).count(), 4, "the first two are forgotten");
    }
}
