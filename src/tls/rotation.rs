//! When a leaf is renewed, and when a renewal that failed is tried again. Pure: time and randomness
//! are passed in. Times are wall time since 1970, because that is what a certificate ends by.
//!
//! - A leaf is renewed at half its life, give or take a tenth of that, so that members enrolled
//!   together do not ask together.
//! - A failure is retried with growing, jittered pauses that scale with the leaf's life: a leaf of a
//!   minute has seconds to lose, one of a week hours.
//! - Whoever holds an ended leaf is in trouble and asks more often.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::SmallRng;

/// Bounds of the first pause after a failure, which is a 200th of the leaf's life.
const PAUSE_FIRST: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));
/// Bounds of the longest pause, which is a 20th: half a life has room for ten of them.
const PAUSE_MAX: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
/// Longest pause of a member whose leaf has ended: peers that find an issuer again stop taking it
/// soon ([`super::grace`]).
pub(super) const PAUSE_MAX_ENDED: Duration = Duration::from_secs(15);

/// From when to when a leaf lives, since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// When it was issued; its notBefore is earlier, for clocks that are behind.
    pub from: Duration,
    /// Its end.
    pub until: Duration,
}

impl Life {
    /// How long it is.
    pub fn span(&self) -> Duration {
        self.until.saturating_sub(self.from)
    }

    /// Whether it is over.
    pub fn has_ended(&self, now: Duration) -> bool {
        now >= self.until
    }
}

/// Decides when one member asks for its next leaf.
#[derive(Debug)]
pub struct Rotation {
    rng: SmallRng,
    life: Life,
    failures: u32,
    due: Duration,
}

impl Rotation {
    /// The rotation of a leaf that is in use now.
    pub fn new(life: Life, mut rng: SmallRng) -> Self {
        let due = half_life(life, &mut rng);
        Self { rng, life, failures: 0, due }
    }

    /// When to ask an issuer next. In the past: now.
    pub fn poll_timeout(&self) -> Duration {
        self.due
    }

    /// A new leaf is in use.
    pub fn handle_renewed(&mut self, life: Life) {
        self.due = half_life(life, &mut self.rng);
        (self.life, self.failures) = (life, 0);
    }

    /// No issuer gave one.
    pub fn handle_failed(&mut self, now: Duration) {
        let first = (self.life.span() / 200).clamp(PAUSE_FIRST.0, PAUSE_FIRST.1);
        let mut longest = (self.life.span() / 20).clamp(PAUSE_MAX.0, PAUSE_MAX.1);
        if self.life.has_ended(now) {
            longest = longest.min(PAUSE_MAX_ENDED);
        }
        let pause = first.saturating_mul(1 << self.failures.min(16)).min(longest);
        self.failures = self.failures.saturating_add(1);
        self.due = now + pause.mul_f64(self.rng.random_range(0.75..1.25));
    }

    /// Something changed that makes success likely: an issuer has come back.
    pub fn handle_chance(&mut self, now: Duration) {
        if self.failures > 0 {
            self.failures = 0;
            self.due = self.due.min(now);
        }
    }

    /// The leaf in use does not say what it should any more: ask now.
    pub fn handle_outdated(&mut self, now: Duration) {
        self.due = self.due.min(now);
    }
}

fn half_life(life: Life, rng: &mut SmallRng) -> Duration {
    life.from + life.span().mul_f64(0.5 * rng.random_range(0.9..1.1))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    const WEEK: Duration = Duration::from_secs(7 * 24 * 3_600);

    fn at(secs: u64) -> Duration {
        Duration::from_secs(1_000_000_000 + secs)
    }

    fn rotation(len: Duration, seed: u64) -> Rotation {
        Rotation::new(Life { from: at(0), until: at(0) + len }, SmallRng::seed_from_u64(seed))
    }

    #[test]
    fn a_leaf_is_renewed_at_half_its_life_give_or_take_a_tenth() {
        let dues: Vec<_> = (0..200).map(|seed| rotation(WEEK, seed).poll_timeout()).collect();
        for due in &dues {
            let share = (*due - at(0)).as_secs_f64() / WEEK.as_secs_f64();
            assert!((0.45..=0.55).contains(&share), "{share}");
        }
        let spread = *dues.iter().max().unwrap() - *dues.iter().min().unwrap();
        assert!(spread > WEEK / 20, "members do not ask together: {spread:?}");
    }

    #[test]
    fn failures_pause_longer_and_longer_but_leave_many_tries_before_the_end() {
        for len in [Duration::from_secs(20), Duration::from_secs(3_600), WEEK] {
            let mut rotation = rotation(len, 1);
            let (mut now, mut tries, mut longest) = (rotation.poll_timeout(), 0, Duration::ZERO);
            while now < at(0) + len {
                rotation.handle_failed(now);
                let pause = rotation.poll_timeout() - now;
                assert!(pause >= Duration::from_millis(187), "{pause:?}");
                longest = longest.max(pause);
                (now, tries) = (now + pause, tries + 1);
            }
            assert!((10..2_000).contains(&tries), "{tries} tries in half of {len:?}");
            assert!(longest <= Duration::from_secs(750), "{longest:?}");
        }
    }

    #[test]
    fn a_member_whose_leaf_ended_asks_at_least_every_nineteen_seconds() {
        let mut rotation = rotation(WEEK, 2);
        let mut now = at(0) + WEEK * 2;
        for _ in 0..30 {
            rotation.handle_failed(now);
            let pause = rotation.poll_timeout() - now;
            assert!(pause <= PAUSE_MAX_ENDED.mul_f64(1.25), "{pause:?}");
            now += pause;
        }
    }

    #[test]
    fn an_issuer_that_is_back_is_asked_at_once_and_success_begins_anew() {
        let mut rotation = rotation(WEEK, 3);
        rotation.handle_chance(at(5));
        assert!(rotation.poll_timeout() > at(5), "nothing failed: nothing is hurried");
        let now = rotation.poll_timeout();
        (0..20).for_each(|_| rotation.handle_failed(now));
        rotation.handle_chance(now);
        assert_eq!(rotation.poll_timeout(), now);
        rotation.handle_renewed(Life { from: now, until: now + WEEK });
        assert!(rotation.poll_timeout() > now + WEEK * 2 / 5);
    }

    #[test]
    fn an_outdated_leaf_is_renewed_at_once() {
        let mut rotation = rotation(WEEK, 4);
        rotation.handle_outdated(at(9));
        assert_eq!(rotation.poll_timeout(), at(9));
    }
}
