//! How far this node may trust its own accusations.
//!
//! After Lifeguard (arXiv 1707.00788): a node that misses answers from everybody is probably slow
//! itself, so that it probes less often and convicts nobody while it is. Added here is a deaf rule:
//! whoever has heard nothing for a while, or hears again only since a moment, convicts nobody. In
//! simulation (16 deaf of 128 members) either rule alone leaves false deaths, both together none.
//!
//! Both need others to listen to: with fewer than [`LISTENERS_MIN`] live members a silence may well
//! be the death of the only other, so that there conviction waits one further suspicion time instead.

use std::time::Duration;

use crate::model::Moment;

/// Fewest live members, this one included, for silence to say something about this node: it convicts
/// nobody while it is deaf, and counts as isolated instead. One bound for both: a node that neither
/// convicts nor is isolated would never take the others for gone.
pub(super) const LISTENERS_MIN: usize = 4;

/// Worst score: probes are 1 + this many times slower.
const SCORE_MAX: u32 = 8;

/// Above this score nobody is convicted.
const SCORE_SOUND: u32 = 1;

/// Further suspicion times that a bad score may postpone a conviction by: a node that hears well
/// and yet misses many answers is in a mesh where many have died.
const POSTPONED_MAX: u32 = 2;

/// Silence after which the others are taken for gone after all. Until then routes are kept.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// What this node knows about its own hearing.
#[derive(Clone, Debug)]
pub(super) struct LocalHealth {
    suspicion: Duration,
    /// A pause between packets after which the node counts as deaf.
    gap: Duration,
    score: u32,
    heard_at: Moment,
    hearing_since: Moment,
    /// When this node last woke from a pause of its own.
    woken_at: Moment,
}

/// Whether a conviction may be spoken now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// Yes.
    Sound,
    /// Not yet: judge again then.
    Later(Moment),
}

impl LocalHealth {
    pub(super) fn new(now: Moment, period: Duration, suspicion: Duration) -> Self {
        let gap = period * 3; // at rest a member of a mesh of 4 hears about 3 packets per period
        Self { suspicion, gap, score: 0, heard_at: now, hearing_since: now, woken_at: now }
    }

    /// Something came from a proven member.
    pub(super) fn handle_heard(&mut self, now: Moment) {
        if now.since(self.heard_at) > self.gap {
            self.hearing_since = now;
        }
        self.heard_at = now;
    }

    /// A timer that was due at `due` fires now. If that is late, this node was paused and could not
    /// have heard anybody: a suspended machine, a stopped process, a stalled scheduler. Returns
    /// whether it was.
    pub(super) fn handle_turn(&mut self, now: Moment, due: Moment) -> bool {
        let is_awoken = now.since(due) > self.gap;
        if is_awoken {
            self.woken_at = now;
        }
        is_awoken
    }

    /// A probe was answered, directly or through a helper.
    pub(super) fn handle_answered(&mut self) {
        self.score = self.score.saturating_sub(1);
    }

    /// A probe of a member whom nobody suspected was not answered, or this node had to refute.
    pub(super) fn handle_missed(&mut self) {
        self.score = (self.score + 1).min(SCORE_MAX);
    }

    /// By how much to stretch the time between probes.
    pub(super) fn stretch(&self) -> u32 {
        1 + self.score
    }

    /// Whether a suspect whose time ran out may be convicted, `postponed` suspicion times late.
    pub(super) fn trust(&self, now: Moment, live: usize, postponed: u32) -> Trust {
        if live < LISTENERS_MIN {
            return match postponed {
                0 => Trust::Later(now + self.suspicion),
                _ => Trust::Sound,
            };
        }
        if now.since(self.heard_at) > self.gap {
            return Trust::Later(now + self.gap);
        }
        let hearing = now.since(self.hearing_since);
        if hearing < self.suspicion {
            return Trust::Later(self.hearing_since + self.suspicion);
        }
        if self.score > SCORE_SOUND && postponed < POSTPONED_MAX {
            return Trust::Later(now + self.suspicion);
        }
        Trust::Sound
    }

    /// How long nobody has been heard by a node that listened.
    pub(super) fn silence(&self, now: Moment) -> Duration {
        now.since(self.heard_at.max(self.woken_at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> LocalHealth {
        let (period, suspicion) = (Duration::from_millis(700), Duration::from_secs(3));
        LocalHealth::new(Moment::START, period, suspicion)
    }

    fn heard_until(secs: u64) -> LocalHealth {
        let mut health = health();
        (0..=secs).for_each(|at| health.handle_heard(Moment::from_secs(at)));
        health
    }

    #[test]
    fn node_that_hears_and_is_answered_convicts_at_once() {
        assert_eq!(heard_until(10).trust(Moment::from_secs(10), 8, 0), Trust::Sound);
    }

    #[test]
    fn deaf_node_convicts_nobody_until_it_has_heard_for_a_whole_suspicion() {
        let mut health = heard_until(10);
        let at = Moment::from_secs;
        assert!(matches!(health.trust(at(13), 8, 9), Trust::Later(_)), "silent since 10 s");
        health.handle_heard(at(14));
        assert_eq!(health.trust(at(15), 8, 9), Trust::Later(at(17)));
        health.handle_heard(at(16));
        assert_eq!(health.trust(at(17), 8, 0), Trust::Sound);
    }

    #[test]
    fn sick_node_postpones_twice_and_no_more() {
        let mut health = heard_until(10);
        health.handle_missed();
        health.handle_missed();
        let now = Moment::from_secs(10);
        assert_eq!(health.stretch(), 3);
        assert_eq!(health.trust(now, 8, 1), Trust::Later(Moment::from_secs(13)));
        assert_eq!(health.trust(now, 8, 2), Trust::Sound);
    }

    #[test]
    fn pause_of_this_node_is_no_silence_of_the_others() {
        let mut health = heard_until(10);
        let at = Moment::from_secs;
        health.handle_turn(at(11), at(11));
        assert_eq!(health.silence(at(15)), Duration::from_secs(5), "it listens and hears nobody");
        health.handle_turn(at(50), at(12));
        assert_eq!(health.silence(at(51)), Duration::from_secs(1), "it listens since it woke");
        assert!(matches!(health.trust(at(51), 8, 9), Trust::Later(_)), "and judges nobody yet");
    }

    #[test]
    fn of_two_members_the_survivor_convicts_after_one_further_suspicion() {
        let health = heard_until(1);
        let now = Moment::from_secs(5);
        assert_eq!(health.trust(now, 2, 0), Trust::Later(Moment::from_secs(8)));
        assert_eq!(health.trust(now, 2, 1), Trust::Sound, "silence says nothing among two");
    }
}
