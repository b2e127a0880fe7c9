//! Doubts about single members: probes out of turn, and accusations put to the accused.
//!
//! The data plane sees a dead peer within a second and asks for an expedited probe: a ping at once,
//! one more over a stream, then ordinary suspicion. It gives nobody a new power to accuse.
//!
//! When repair shows that others hold a member for dead that is alive here, it is told first (it
//! renews if it lives), and believed dead only if it stays silent.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use foca::{Member, State};

use super::codec;
use super::{
    Belief, Carrier, Identity, MemberUpdate, Membership, MembershipEvent, Outgoing, Timer,
};
use crate::model::{MemberId, Moment, StoreSize};

/// Members doubted at once; beyond, foca's own rounds must do.
const DOUBTS_MAX: usize = 64;

/// Shortest time between two renewals that one peer asks for.
const TURN_PAUSE: Duration = Duration::from_secs(10);

/// Members remembered for having asked this one to renew; beyond, the first is forgotten.
const TURNED_MAX: usize = 1024;

/// The number of the driver's own pings; foca's come in order, and a chance equality is harmless.
const PING_NUMBER: u8 = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// A datagram was sent; a stream is next.
    Pinged,
    /// A stream was opened; suspicion is next.
    Repeated,
    /// Others convicted it; this node follows unless it hears from it.
    Convicted,
}

#[derive(Clone, Copy, Debug)]
struct Doubt {
    identity: Identity,
    stage: Stage,
    since: Moment,
}

/// What is doubted, and who doubted this member.
#[derive(Debug, Default)]
pub(super) struct Accusations {
    /// At most [`DOUBTS_MAX`].
    doubts: BTreeMap<MemberId, Doubt>,
    /// Members that this node is convicting itself. Emptied as they go down.
    own: BTreeSet<MemberId>,
    /// Who asked this member to renew, and when. At most [`TURNED_MAX`].
    turned: BTreeMap<MemberId, Moment>,
}

impl Accusations {
    pub(super) fn store_sizes(&self) -> [StoreSize; 2] {
        [
            StoreSize::new("doubted members", self.doubts.len(), DOUBTS_MAX),
            StoreSize::new("members that accused this one", self.turned.len(), TURNED_MAX),
        ]
    }

    /// Notes that this node convicts `member` itself.
    pub(super) fn insert_own(&mut self, member: MemberId) {
        self.own.insert(member);
    }

    /// Whether this node convicted `member` itself.
    pub(super) fn take_own(&mut self, member: MemberId) -> bool {
        self.own.remove(&member)
    }

    /// Whether `by` may ask this member to renew; counts it as having asked.
    pub(super) fn may_turn(&mut self, now: Moment, by: MemberId) -> bool {
        let is_early = self.turned.get(&by).is_some_and(|at| now.since(*at) < TURN_PAUSE);
        if !is_early {
            self.turned.insert(by, now);
            if self.turned.len() > TURNED_MAX {
                self.turned.pop_first();
            }
        }
        !is_early
    }
}

impl Membership {
    /// Something failed at `member`: probe it now.
    pub fn handle_failure(&mut self, now: Moment, member: MemberId) {
        let Some(seen) = self.seen.get(&member).filter(|seen| seen.belief == Belief::Alive) else {
            return;
        };
        let identity = seen.identity;
        if self.doubt(now, identity, Stage::Pinged, self.config.probe_timeout) {
            self.ping(identity, Carrier::Datagram);
        }
    }

    /// Others hold `identity` for dead, which is alive here.
    pub(super) fn put_to_accused(&mut self, now: Moment, identity: Identity) {
        if self.doubt(now, identity, Stage::Convicted, self.config.suspicion / 2) {
            self.ping(identity, Carrier::Stream);
            self.events.push_back(MembershipEvent::Accused(identity));
        }
    }

    /// The next step about a doubted member.
    pub(super) fn continue_accusation(&mut self, now: Moment, member: MemberId) {
        let Some(doubt) = self.accusations.doubts.remove(&member) else { return };
        let seen = self.seen.get(&member).copied();
        let is_there =
            seen.filter(|seen| seen.identity == doubt.identity && seen.belief != Belief::Down);
        let is_heard = self.heard.get(&member).is_some_and(|at| *at > doubt.since);
        let Some(seen) = is_there.filter(|_| !is_heard) else { return };
        match doubt.stage {
            Stage::Pinged => {
                self.ping(doubt.identity, Carrier::Stream);
                let stage = Stage::Repeated;
                self.accusations.doubts.insert(member, Doubt { stage, ..doubt });
                self.timers.set(now + self.config.probe_timeout, Timer::Accusation(member));
            }
            Stage::Repeated => {
                let incarnation = seen.incarnation;
                let identity = doubt.identity;
                self.apply(now, [Member::new(identity, incarnation, State::Suspect)], true);
                self.await_refutation(now, identity, incarnation, self.config.suspicion);
                self.gossip_now(now);
            }
            Stage::Convicted => {
                let down = Member::new(doubt.identity, seen.incarnation, State::Down);
                self.apply(now, [down], true);
            }
        }
    }

    fn doubt(&mut self, now: Moment, identity: Identity, stage: Stage, after: Duration) -> bool {
        let doubts = &mut self.accusations.doubts;
        if doubts.contains_key(&identity.id) || doubts.len() >= DOUBTS_MAX {
            return false;
        }
        doubts.insert(identity.id, Doubt { identity, stage, since: now });
        self.timers.set(now + after, Timer::Accusation(identity.id));
        true
    }

    /// Tells a suspect over a stream that it is suspected; its answer refutes. Rumours alone miss it
    /// now and then when much is lost.
    pub(super) fn tell_suspect(&mut self, identity: Identity, incarnation: u16) {
        let update = MemberUpdate { identity, incarnation, belief: Belief::Suspect };
        self.send_ping(identity, Carrier::Stream, Some(update));
    }

    fn ping(&mut self, to: Identity, over: Carrier) {
        self.send_ping(to, over, None);
    }

    fn send_ping(&mut self, to: Identity, over: Carrier, update: Option<MemberUpdate>) {
        let (src, incarnation) = (self.identity(), self.incarnation);
        if let Some(packet) = codec::ping(src, incarnation, to, PING_NUMBER, update) {
            self.outgoing.push_back(Outgoing { to, over, packet });
        }
    }
}
