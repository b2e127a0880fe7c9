//! Doubts about single members: probes out of turn, and accusations put to the accused.
//!
//! The data plane sees a dead peer within a second and asks for an expedited probe: a ping at once,
//! one more over a stream, then ordinary suspicion. It gives nobody a new power to accuse.
//!
//! A member that is said to be dead and is alive here is asked first, and believed dead only if it
//! stays silent: one liar kills nobody. If it answers it is told, so that it renews: others may hold
//! that run of it for dead, and would for ever. Only the death of a suspect that had half its time and
//! was not heard since is believed at once: most crashes are told that way, and wait for nobody.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use foca::{Member, Message, State};

use super::codec::{self, Packet};
use super::{
    Belief, Carrier, Disbelief, Identity, MemberUpdate, Membership, MembershipEvent, Outgoing,
    Timer,
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
    /// `by` said that it is dead; this node follows unless it hears from it.
    Convicted { by: MemberId },
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

    /// `by` holds `identity` for dead, which is alive here.
    pub(super) fn put_to_accused(&mut self, now: Moment, by: MemberId, identity: Identity) {
        if self.verify_death(now, by, identity) {
            self.events.push_back(MembershipEvent::Accused(identity));
        }
    }

    /// Asks whom `by` says to be dead. Returns false if that is under way, or too much else is.
    pub(super) fn verify_death(&mut self, now: Moment, by: MemberId, identity: Identity) -> bool {
        let is_begun =
            self.doubt(now, identity, Stage::Convicted { by }, self.config.suspicion / 2);
        if is_begun {
            self.ping(identity, Carrier::Stream);
        }
        is_begun
    }

    /// Whether `member` has been a suspect for half its time without a word from it.
    pub(super) fn is_overdue(&self, now: Moment, member: MemberId) -> bool {
        let is_silent = |since: &Moment| self.heard.get(&member).is_none_or(|at| at <= since);
        self.suspected
            .get(&member)
            .filter(|since| is_silent(since))
            .is_some_and(|since| now.since(*since) >= self.config.suspicion / 2)
    }

    /// The next step about a doubted member.
    pub(super) fn continue_accusation(&mut self, now: Moment, member: MemberId) {
        let Some(doubt) = self.accusations.doubts.remove(&member) else { return };
        if self.heard.get(&member).is_some_and(|at| *at > doubt.since) {
            if let Stage::Convicted { by } = doubt.stage {
                let why = Disbelief::Death(member);
                self.events.push_back(MembershipEvent::Disbelieved { from: by, why });
                // Whoever does believe it takes back nothing but a run.
                self.events.push_back(MembershipEvent::Accused(doubt.identity));
            }
            return;
        }
        let is_same =
            |seen: &MemberUpdate| seen.identity == doubt.identity && seen.belief != Belief::Down;
        let Some(seen) = self.seen.get(&member).copied().filter(is_same) else { return };
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
            Stage::Convicted { .. } => {
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
    /// now and then when much is lost. Those that were heard last are asked to tell it, too: where the
    /// way from here is cut they may have heard its refutation, or reach it.
    pub(super) fn tell_suspect(&mut self, identity: Identity, incarnation: u16) {
        let update = MemberUpdate { identity, incarnation, belief: Belief::Suspect };
        self.send_ping(identity, Carrier::Stream, Some(update));
        for helper in self.heard_last(identity.id) {
            let (src, own) = (self.identity(), self.incarnation);
            if let Some(packet) = codec::ping_req(src, own, helper, PING_NUMBER, update) {
                let over = Carrier::Datagram;
                self.outgoing.push_back(Outgoing { to: helper, over, packet });
            }
        }
    }

    /// Tells a suspect what `packet` asks to tell it. Before the detector asks whether it is there: its
    /// answer then refutes, and goes back to whoever suspects it.
    pub(super) fn tell_for(&mut self, packet: &Packet) {
        let Message::PingReq { target, .. } = packet.header.message else { return };
        let is_meant = |update: &&MemberUpdate| {
            update.identity == target
                && update.belief == Belief::Suspect
                && self.doubt_about(update).is_none()
        };
        if let Some(update) = packet.updates.iter().find(is_meant).copied() {
            self.send_ping(target, Carrier::Datagram, Some(update));
        }
    }

    /// The members that are there and were heard last, without `member`; as many as foca asks for help.
    pub(super) fn heard_last(&self, member: MemberId) -> Vec<Identity> {
        let others = self.active().filter(|other| other.id != member);
        let mut heard: Vec<_> =
            others.filter_map(|other| Some((*self.heard.get(&other.id)?, other))).collect();
        heard.sort_by_key(|(at, other)| (Reverse(*at), other.id));
        heard.truncate(self.config.fanout.get());
        heard.into_iter().map(|(_, other)| other).collect()
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
