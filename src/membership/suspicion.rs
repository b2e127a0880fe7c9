//! Suspicion and conviction. foca suspects; this module convicts, because foca's own timer also
//! strikes members that have refuted meanwhile, and knows nothing of this node's own hearing.

use std::time::Duration;

use foca::{Member, State};

use super::local_health::{LISTENERS_MIN, Trust};
use super::{Belief, EAGER_PAUSE, Identity, MemberUpdate, Membership, MembershipEvent, Timer};
use crate::model::Moment;

impl Membership {
    /// Whom the earlier run suspected could not hear it: each gets its whole time again, and is told.
    pub(super) fn suspect_anew(&mut self, now: Moment) {
        let suspects = self.seen.values().filter(|seen| seen.belief == Belief::Suspect);
        for MemberUpdate { identity, incarnation, .. } in suspects.copied().collect::<Vec<_>>() {
            self.await_refutation(now, identity, incarnation, self.config.suspicion);
        }
    }

    /// Sees to it that `suspect` is told and judged by this node if whoever suspected it does not end
    /// that: it may have crashed or renewed meanwhile, and the refutation may have been missed here.
    pub(super) fn plan_take_over(&mut self, now: Moment, suspect: MemberUpdate) {
        let MemberUpdate { identity, incarnation, .. } = suspect;
        let due = now + self.config.suspicion * 2 + self.jitter(self.config.suspicion);
        self.timers.set(due, Timer::TakeOver { identity, incarnation });
    }

    /// Gives a suspect its time, unless it runs already, and tells it now and at half-time.
    pub(super) fn await_refutation(
        &mut self,
        now: Moment,
        identity: Identity,
        incarnation: u16,
        suspicion: Duration,
    ) {
        let is_sought = |timer: &Timer| {
            matches!(timer, Timer::Convict { identity: of, incarnation: at, .. }
                if (*of, *at) == (identity, incarnation))
        };
        if self.timers.any(is_sought) {
            return;
        }
        self.tell_suspect(identity, incarnation);
        self.timers.set(now + suspicion / 2, Timer::Remind { identity, incarnation });
        let convict = Timer::Convict { identity, incarnation, postponed: 0 };
        self.timers.set(now + suspicion, convict);
    }

    /// A suspect's time has run out: convict it, unless it has refuted, or this node is not well
    /// enough to judge.
    pub(super) fn convict(
        &mut self,
        now: Moment,
        identity: Identity,
        incarnation: u16,
        postponed: u32,
    ) {
        if !self.is_suspect(identity, incarnation) {
            return; // refuted, renewed or convicted meanwhile
        }
        match self.health.trust(now, self.foca.num_members() + 1, postponed) {
            Trust::Sound => {
                self.accusations.insert_own(identity.id);
                self.apply(now, [Member::new(identity, incarnation, State::Down)], true);
                self.gossip_now(now);
            }
            Trust::Later(at) => {
                // It was told when it was suspected, and perhaps nobody could hear us then: after
                // a cut nothing else would make it refute.
                self.tell_suspect(identity, incarnation);
                let again = Timer::Convict { identity, incarnation, postponed: postponed + 1 };
                self.timers.set(at.max(now + EAGER_PAUSE), again);
            }
        }
    }

    pub(super) fn judge_isolation(&mut self, now: Moment) {
        let is_silent = self.health.silence(now) >= self.config.suspicion;
        if is_silent && !self.is_isolated && self.foca.num_members() + 1 >= LISTENERS_MIN {
            self.is_isolated = true;
            self.events.push_back(MembershipEvent::Isolated);
        }
    }

    pub(super) fn is_suspect(&self, identity: Identity, incarnation: u16) -> bool {
        let suspect = MemberUpdate { identity, incarnation, belief: Belief::Suspect };
        self.seen.get(&identity.id) == Some(&suspect)
    }
}
