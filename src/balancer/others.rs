//! How busy others keep a candidate, as somebody who sees all of them says once in a while.
//!
//! Such a figure is old when it comes, and all callers hear the same. Counted as load it made all of
//! them leave the busiest together, and come back together. So it is smoothed, and compared: only who is
//! far more crowded than the rest is left alone, by all who do not have to go there.
//! `simulations/load_of_others.rs` has the figures that chose this.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::model::Moment;

/// How long a word counts: two may be lost.
const VALID: Duration = Duration::from_secs(3);
/// Of a new word this part counts, and of what was before the rest.
const MEMORY: f64 = 5.0;
/// An instance is crowded with more than one call of others, and more than this many times as many as
/// the rest of its service has on average.
const CROWD: f64 = 2.0;
/// How busy others keep an instance, as its agent has said of late. Read with every call: without a lock.
#[derive(Debug, Default)]
pub struct Others {
    /// Calls under way, smoothed; the bits of a float.
    calls: AtomicU64,
    /// Both in nanoseconds.
    heard_at: AtomicU64,
    crowded_until: AtomicU64,
}

impl Others {
    /// Whether new calls had better go to an instance that is not as crowded.
    pub fn is_crowd(&self, now: Moment) -> bool {
        now.as_nanos() < self.crowded_until.load(Ordering::Relaxed)
    }

    /// Its agent has told of so many, or named it not.
    pub fn note(&self, now: Moment, calls: Option<f64>) {
        let before = self.calls_at(now);
        let smoothed = before + (calls.unwrap_or(0.0) - before) / MEMORY;
        self.calls.store(smoothed.to_bits(), Ordering::Relaxed);
        self.heard_at.store(now.as_nanos(), Ordering::Relaxed);
    }

    fn calls_at(&self, now: Moment) -> f64 {
        let heard_at = Moment::from_nanos(self.heard_at.load(Ordering::Relaxed));
        let is_valid = now.since(heard_at) < VALID;
        if is_valid { f64::from_bits(self.calls.load(Ordering::Relaxed)) } else { 0.0 }
    }

    /// Compares the instances of a service, each with its weight.
    pub fn compare<'a>(now: Moment, all: impl Iterator<Item = (&'a Self, u64)> + Clone) {
        let sum = |(calls, weight): (f64, f64), (one, more): (&Self, u64)| {
            (calls + one.calls_at(now), weight + more as f64)
        };
        let (calls, weight) = all.clone().fold((0.0, 0.0), sum);
        for (one, own_weight) in all {
            let (own, own_weight) = (one.calls_at(now), own_weight as f64);
            let rest = (calls - own) * own_weight / (weight - own_weight).max(1.0);
            let is_crowded = own > 1.0 + CROWD * rest;
            let until = if is_crowded { (now + VALID).as_nanos() } else { 0 };
            one.crowded_until.store(until, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(secs: u64) -> Moment {
        Moment::from_secs(secs)
    }

    /// After ten words of a second each, who is crowded.
    fn crowded(calls: &[(f64, u64)]) -> Vec<bool> {
        let all: Vec<_> = calls.iter().map(|_| Others::default()).collect();
        for second in 1..=10 {
            all.iter().zip(calls).for_each(|(one, (calls, _))| one.note(at(second), Some(*calls)));
            let weighted = all.iter().zip(calls).map(|(one, (_, weight))| (one, *weight));
            Others::compare(at(second), weighted);
        }
        all.iter().map(|one| one.is_crowd(at(10))).collect()
    }

    #[test]
    fn only_who_is_far_busier_than_the_rest_for_its_weight_is_crowded() {
        #[allow(clippy::type_complexity)] // a table: calls and weight of each; who is crowded
        let cases: &[(&[(f64, u64)], &[bool])] = &[
            (&[(4.0, 100), (0.0, 100)], &[true, false]),
            (&[(4.0, 100), (3.0, 100), (2.0, 100)], &[false, false, false]),
            (&[(0.9, 100), (0.0, 100)], &[false, false]),
            (&[(12.0, 300), (4.0, 100)], &[false, false]),
            (&[(12.0, 100), (4.0, 100)], &[true, false]),
            (&[(4.0, 100)], &[true]), // it has nobody to leave calls to
            (&[], &[]),
        ];
        for (calls, expected) in cases {
            assert_eq!(crowded(calls), *expected, "{calls:?}");
        }
    }

    #[test]
    fn one_word_alone_crowds_nobody_and_the_last_is_forgotten_in_three_seconds() {
        let (one, other) = (Others::default(), Others::default());
        let is_crowd = |second| {
            Others::compare(at(second), [(&one, 100), (&other, 100)].into_iter());
            one.is_crowd(at(second))
        };
        one.note(at(1), Some(4.0));
        assert!(!is_crowd(1));
        one.note(at(2), Some(4.0));
        assert!(is_crowd(2) && !one.is_crowd(at(5)), "whoever is asked no more");
        assert!(is_crowd(4) && !is_crowd(5));
    }
}
