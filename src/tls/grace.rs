//! How far past its end a leaf is still accepted, and when.
//!
//! A leaf that ended is refused, with two exceptions. The renewal door takes it for [`RENEWABLE`], so
//! that a machine that was off finds back. And while no issuer can be reached, so that nobody *can*
//! renew, peers take each other's leaves for one more life: a mesh without its issuers degrades
//! loudly before it falls apart.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::model::MemberId;

/// How long past its end a leaf opens the renewal door. Not scaled with the life of leaves: it says
/// how long a machine may be off, and short leaves do not make machines come back sooner.
pub const RENEWABLE: Duration = Duration::from_secs(30 * DAY_SECS);
/// Longest grace on the mesh planes; below it is one life of a leaf.
const GRACE_MAX: Duration = Duration::from_secs(7 * DAY_SECS);
const DAY_SECS: u64 = 24 * 3_600;
/// How long an issuer must have been there before ended leaves are refused: two of the pauses of a
/// member that asks with an ended leaf ([`super::rotation`]).
const HOLD: Duration = Duration::from_secs(30);
/// Members remembered between two calls of [`Grace::take_accepted`].
const ACCEPTED_MAX: usize = 1_024;

/// Whether ended leaves are accepted now. One for each agent, shared by all its verifiers.
#[derive(Debug)]
pub struct Grace {
    len: Duration,
    is_open: AtomicBool,
    /// At most [`ACCEPTED_MAX`].
    accepted: Mutex<BTreeSet<MemberId>>,
}

impl Grace {
    /// Closed, in a mesh whose leaves live for `life`.
    pub(super) fn new(life: Duration) -> Self {
        let (len, is_open) = (life.min(GRACE_MAX), AtomicBool::new(false));
        Self { len, is_open, accepted: Mutex::default() }
    }

    /// Accepts ended leaves from now on, or no more.
    pub fn set_open(&self, is_open: bool) {
        self.is_open.store(is_open, Ordering::Relaxed);
    }

    /// How far past its end a leaf is accepted now.
    pub(super) fn tolerance(&self) -> Duration {
        match self.is_open.load(Ordering::Relaxed) {
            true => self.len,
            false => Duration::ZERO,
        }
    }

    pub(super) fn note_accepted(&self, member: MemberId) {
        let mut accepted = self.accepted.lock();
        if accepted.len() < ACCEPTED_MAX {
            accepted.insert(member);
        }
    }

    /// Whose ended leaf was accepted since this was last asked; at most 1,024 members.
    pub fn take_accepted(&self) -> BTreeSet<MemberId> {
        std::mem::take(&mut self.accepted.lock())
    }
}

/// Decides whether [`Grace`] is open, from whether an issuer is seen. Pure.
#[derive(Clone, Copy, Debug, Default)]
pub struct IssuerWatch {
    seen_since: Option<Duration>,
}

impl IssuerWatch {
    /// Notes whether an issuer can be reached at `now` (any clock, as long as it is one). Returns
    /// true when one can be reached that could not before.
    pub fn handle_look(&mut self, now: Duration, is_reachable: bool) -> bool {
        let is_news = is_reachable && self.seen_since.is_none();
        match is_reachable {
            true => self.seen_since = self.seen_since.or(Some(now)),
            false => self.seen_since = None,
        }
        is_news
    }

    /// Whether ended leaves are to be accepted: no issuer was there for all of the last 30 s.
    pub fn is_grace_open(&self, now: Duration) -> bool {
        self.seen_since.is_none_or(|since| now.saturating_sub(since) < HOLD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn grace_is_one_life_and_at_most_a_week_and_only_while_open() {
        for (life, len) in [(secs(60), secs(60)), (RENEWABLE, GRACE_MAX)] {
            let grace = Grace::new(life);
            assert_eq!(grace.tolerance(), Duration::ZERO);
            grace.set_open(true);
            assert_eq!(grace.tolerance(), len);
        }
    }

    #[test]
    fn grace_closes_only_after_an_issuer_was_there_long_enough_for_everybody_to_ask() {
        let mut watch = IssuerWatch::default();
        assert!(watch.is_grace_open(secs(0)), "nobody has been seen yet");
        assert!(watch.handle_look(secs(10), true), "news");
        assert!(!watch.handle_look(secs(11), true), "no news");
        assert!(watch.is_grace_open(secs(39)));
        assert!(!watch.is_grace_open(secs(40)));
        watch.handle_look(secs(50), false);
        assert!(watch.is_grace_open(secs(50)), "at once when the last issuer is gone");
        assert!(watch.handle_look(secs(60), true));
        assert!(watch.is_grace_open(secs(89)));
        const { assert!(HOLD.as_secs() >= 2 * super::super::rotation::PAUSE_MAX_ENDED.as_secs()) };
    }
}
