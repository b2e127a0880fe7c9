//! Packets in and out: what foca may see, and how its packets travel.

use std::collections::BTreeMap;

use bytes::Bytes;
use foca::Message;

use super::codec::{self, Packet, header_of};
use super::{
    Belief, Carrier, Identity, MemberUpdate, Membership, MembershipEvent, Outgoing, Standing,
};
use crate::model::{MemberId, Moment, StoreSize};

/// Updates and packets that wait for a record. Beyond, the first by member is dropped; gossip and
/// repair bring it again.
const WAITING_MAX: usize = 4096;

/// An incarnation that no honest member reaches in one run: it counts refuted suspicions, and a member
/// that comes near takes a higher epoch.
const INCARNATION_ABSURD: u16 = 1 << 15;

/// Refutations that a suspicion may be ahead of what is known here. A member that is suspected further
/// ahead, where it has perhaps never been, could not be heard again.
const INCARNATION_JUMP_MAX: u16 = 16;

/// Suspects of one packet about whom its sender is told better: what a datagram has room for.
const ANSWERED_MAX: usize = 16;

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketFault {
    /// It is no packet.
    Malformed,
    /// It speaks for somebody else than whoever sent it.
    Source,
    /// Its sender claims an incarnation that nobody reaches.
    Incarnation,
    /// It is for somebody else.
    Destination,
    /// Its sender's record names a later run.
    StaleSource,
    /// It asks to probe a run that no record names.
    ThirdParty,
    /// It asks this member to renew, which has done so for its sender a moment ago.
    Renewal,
    /// The detector has no use for it.
    Detector,
}

impl PacketFault {
    /// A fixed word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Source => "source",
            Self::Incarnation => "absurd_incarnation",
            Self::Destination => "destination",
            Self::StaleSource => "stale_source",
            Self::ThirdParty => "third_party",
            Self::Renewal => "renewal_refused",
            Self::Detector => "detector",
        }
    }

    /// Whether no agent sends such a packet. The others come of packets that met a change on the way.
    pub const fn is_hostile(self) -> bool {
        matches!(self, Self::Malformed | Self::Source | Self::Incarnation)
    }
}

/// Why something is not believed that one member said of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disbelief {
    /// Its incarnation is one that nobody reaches.
    Incarnation,
    /// It suspects an incarnation far ahead of what is known here.
    Jump,
    /// This run of the member has another address.
    Address,
    /// It says that this member is dead, which has answered since.
    Death(MemberId),
}

/// foca's ping in flight.
pub(super) struct Probe {
    pub(super) target: Identity,
    pub(super) number: u8,
    pub(super) packet: Bytes,
    pub(super) is_answered: bool,
    /// Whether its target was suspected already: then silence says nothing about this node.
    pub(super) was_suspect: bool,
}

/// What is not believed until a record comes.
#[derive(Default)]
pub(super) struct Waiting {
    /// At most [`WAITING_MAX`].
    updates: BTreeMap<MemberId, MemberUpdate>,
    /// The last packet of each sender whose own run is unknown. At most [`WAITING_MAX`].
    packets: BTreeMap<MemberId, (Identity, Carrier, Bytes)>,
}

impl Waiting {
    pub(super) fn store_sizes(&self) -> [StoreSize; 2] {
        [
            StoreSize::new("updates without record", self.updates.len(), WAITING_MAX),
            StoreSize::new("packets without record", self.packets.len(), WAITING_MAX),
        ]
    }
}

impl Membership {
    /// A packet has come from `from`, who proved it. Returns the rumours it carried, or why it was
    /// dropped. `standing` says what the record here says of an identity.
    pub fn handle_packet(
        &mut self,
        now: Moment,
        from: MemberId,
        over: Carrier,
        data: &[u8],
        standing: &dyn Fn(&Identity) -> Standing,
    ) -> Result<Vec<Bytes>, PacketFault> {
        let mut packet = Packet::decode(data).map_err(|_| PacketFault::Malformed)?;
        let src = packet.header.src;
        if src.id != from || from == self.identity().id {
            return Err(PacketFault::Source);
        }
        if packet.header.src_incarnation >= INCARNATION_ABSURD {
            return Err(PacketFault::Incarnation);
        }
        if packet.header.dst.id != self.identity().id {
            return Err(PacketFault::Destination);
        }
        self.note_heard(now, from);
        match standing(&src) {
            Standing::Current => {}
            Standing::Refuted => return Err(PacketFault::StaleSource),
            Standing::Unknown => {
                self.hold(from, src, over, data);
                return Ok(Vec::new());
            }
        }
        if packet.third_party().is_some_and(|third| standing(&third) != Standing::Current) {
            return Err(PacketFault::ThirdParty);
        }
        let is_turn = packet.header.message == Message::TurnUndead;
        if is_turn && packet.header.dst != self.identity() {
            return Ok(Vec::new()); // of a run that is over
        }
        if is_turn && !self.may_renew_for(now, from) {
            return Err(PacketFault::Renewal);
        }
        self.answer_outdated(src, &packet.updates);
        self.tell_for(&packet);
        packet.updates = self.believable(now, from, &packet.updates, standing);
        packet.updates.retain(|update| {
            let is_surprise = self.is_disputed(update) && !self.is_overdue(now, update.identity.id);
            if is_surprise {
                self.verify_death(now, from, update.identity);
            }
            !is_surprise
        });
        self.note_ack(&packet);
        let (me, before) = (self.identity(), self.incarnation);
        let is_suspected =
            |update: &MemberUpdate| update.identity == me && update.belief == Belief::Suspect;
        let am_suspected = packet.updates.iter().any(is_suspected);
        let bytes = packet.encode_without_items().map_err(|_| PacketFault::Malformed)?;
        let is_refused = self.foca.handle_data(&bytes, &mut self.runtime).is_err();
        self.absorb(now, Some((from, over)));
        if am_suspected && self.incarnation != before {
            self.tell_refutation(src);
        }
        let incarnation = packet.header.src_incarnation;
        let as_now = MemberUpdate { identity: src, incarnation, belief: Belief::Alive };
        let is_settled = self.seen.get(&from) == Some(&as_now);
        if !packet.updates.is_empty() || !is_settled {
            let about = packet.updates.iter().map(|update| update.identity.id);
            let members: Vec<_> = about.chain([from]).collect();
            self.look_again(now, &members);
        }
        if is_refused { Err(PacketFault::Detector) } else { Ok(packet.items) }
    }

    /// The record of this run of a member is here: what waited for it may be believed. Returns the
    /// rumours of a packet that waited.
    pub fn handle_record(
        &mut self,
        now: Moment,
        identity: Identity,
        standing: &dyn Fn(&Identity) -> Standing,
    ) -> Vec<Bytes> {
        let id = identity.id;
        if let Some(update) = self.waiting.updates.get(&id).copied()
            && standing(&update.identity) != Standing::Unknown
        {
            self.waiting.updates.remove(&id);
            // Not that a run is dead before anybody saw it, of a member that is there.
            if update.identity == identity && !self.is_disputed(&update) {
                self.apply(now, [update.into()], true);
            }
        }
        match self.waiting.packets.get(&id) {
            Some((src, ..)) if standing(src) == Standing::Unknown => Vec::new(),
            Some(_) => {
                let held = self.waiting.packets.remove(&id);
                held.and_then(|(_, over, data)| {
                    self.handle_packet(now, id, over, &data, standing).ok()
                })
                .unwrap_or_default()
            }
            None => Vec::new(),
        }
    }

    /// Tells `from` of suspects that have refuted long ago. A refutation is passed on a dozen times and
    /// then forgotten: whoever missed it, and is not heard by the suspect itself, would convict it.
    fn answer_outdated(&mut self, from: Identity, updates: &[MemberUpdate]) {
        let refuted = updates.iter().filter_map(|update| {
            let seen = self.seen.get(&update.identity.id)?;
            let is_refuted = update.belief == Belief::Suspect
                && seen.belief == Belief::Alive
                && seen.identity == update.identity
                && seen.incarnation > update.incarnation;
            is_refuted.then_some(*seen)
        });
        let refuted: Vec<_> = refuted.take(ANSWERED_MAX).collect();
        let of_me = |update: &MemberUpdate| {
            update.identity == self.identity()
                && update.belief == Belief::Suspect
                && update.incarnation < self.incarnation
        };
        if !refuted.is_empty() || updates.iter().any(of_me) {
            self.tell(from, refuted);
        }
    }

    /// Tells `from`, who said that this member is suspected, and those that were heard last that it is
    /// there: foca tells some at random, and the way to all of those may be cut.
    fn tell_refutation(&mut self, from: Identity) {
        for other in [vec![from], self.heard_last(from.id)].concat() {
            self.tell(other, Vec::new()); // the header says under which incarnation it is
        }
    }

    /// Tells a member of others, once.
    pub(super) fn tell(&mut self, to: Identity, updates: Vec<MemberUpdate>) {
        let (src, incarnation) = (self.identity(), self.incarnation);
        if let Some(packet) = codec::gossip(src, incarnation, to, updates) {
            self.outgoing.push_back(Outgoing { to, over: Carrier::Datagram, packet });
        }
    }

    /// The updates of a packet that foca may see.
    pub(super) fn believable(
        &mut self,
        now: Moment,
        from: MemberId,
        updates: &[MemberUpdate],
        standing: &dyn Fn(&Identity) -> Standing,
    ) -> Vec<MemberUpdate> {
        let mut believed = Vec::with_capacity(updates.len());
        for update in updates {
            if let Some(why) = self.doubt_about(update) {
                self.events.push_back(MembershipEvent::Disbelieved { from, why });
                continue;
            }
            let is_believable = match update.identity {
                identity if identity.id == self.identity().id => self.believes_of_self(now, update),
                _ if !self.is_news(update) => false,
                identity => match standing(&identity) {
                    Standing::Current => true,
                    Standing::Refuted => false,
                    Standing::Unknown => {
                        self.wait_for_record(from, *update);
                        false
                    }
                },
            };
            if is_believable {
                believed.push(*update);
            }
        }
        believed
    }

    /// Why an update cannot be true, whoever it is about.
    pub(super) fn doubt_about(&self, update: &MemberUpdate) -> Option<Disbelief> {
        if update.incarnation >= INCARNATION_ABSURD {
            return Some(Disbelief::Incarnation);
        }
        let seen = self.seen.get(&update.identity.id)?;
        if seen.identity.epoch != update.identity.epoch {
            return None;
        }
        if seen.identity.address != update.identity.address {
            return Some(Disbelief::Address);
        }
        let most = seen.incarnation.saturating_add(INCARNATION_JUMP_MAX);
        let is_ahead = update.belief == Belief::Suspect && update.incarnation > most;
        is_ahead.then_some(Disbelief::Jump)
    }

    /// Whether foca would learn something: most of what is gossiped is known, and each look through
    /// its list costs.
    fn is_news(&self, update: &MemberUpdate) -> bool {
        let Some(seen) = self.seen.get(&update.identity.id) else { return true };
        match update.identity == seen.identity {
            true if seen.belief == Belief::Down => false, // for this run that is the last word
            true if update.belief == Belief::Down => true,
            true => (update.incarnation, update.belief) > (seen.incarnation, seen.belief),
            false => update.identity.epoch > seen.identity.epoch,
        }
    }

    /// Of itself a member knows better: it hears only that this very run is suspected, or convicted
    /// when it may renew. A suspicion under an incarnation it has never used is refuted by going
    /// above; where that leads nowhere, by a higher epoch.
    fn believes_of_self(&mut self, now: Moment, update: &MemberUpdate) -> bool {
        if update.identity != self.identity() {
            return false;
        }
        match update.belief {
            Belief::Alive => false,
            Belief::Suspect => {
                if update.incarnation == self.incarnation {
                    self.health.handle_missed();
                }
                let most = self.incarnation.saturating_add(INCARNATION_JUMP_MAX);
                let is_refutable =
                    update.incarnation <= most && update.incarnation + 1 < INCARNATION_ABSURD;
                if !is_refutable {
                    self.renew_soon(now);
                }
                is_refutable
            }
            Belief::Down => self.may_renew(now),
        }
    }

    fn wait_for_record(&mut self, from: MemberId, update: MemberUpdate) {
        let member = update.identity.id;
        let waiting = self.waiting.updates.entry(member).or_insert(update);
        let rank =
            |update: &MemberUpdate| (update.identity.epoch, update.belief, update.incarnation);
        if rank(&update) > rank(waiting) {
            *waiting = update;
        }
        if self.waiting.updates.len() > WAITING_MAX {
            self.waiting.updates.pop_first();
        }
        self.events.push_back(MembershipEvent::RecordWanted { member, from });
    }

    fn hold(&mut self, from: MemberId, src: Identity, over: Carrier, data: &[u8]) {
        self.waiting.packets.insert(from, (src, over, Bytes::copy_from_slice(data)));
        if self.waiting.packets.len() > WAITING_MAX {
            self.waiting.packets.pop_first();
        }
        self.events.push_back(MembershipEvent::Stranger(src));
    }

    fn note_ack(&mut self, packet: &Packet) {
        let Some(probe) = &mut self.probe else { return };
        let is_answer = match packet.header.message {
            Message::Ack(number) => packet.header.src == probe.target && number == probe.number,
            Message::ForwardedAck { origin, probe_number } => {
                origin == probe.target && probe_number == probe.number
            }
            _ => false,
        };
        probe.is_answered |= is_answer;
    }

    /// Hands out one of foca's packets, and remembers its pings.
    pub(super) fn send(
        &mut self,
        to: Identity,
        packet: Bytes,
        answering: Option<(MemberId, Carrier)>,
    ) {
        let Some(header) = header_of(&packet) else { return };
        self.incarnation = header.src_incarnation;
        let over = match (&header.message, answering) {
            (Message::Ack(_), Some((peer, over))) if peer == to.id => over,
            _ => Carrier::Datagram,
        };
        if let Message::Ping(number) = header.message {
            let was_suspect =
                self.seen.get(&to.id).is_some_and(|seen| seen.belief == Belief::Suspect);
            let packet = packet.clone();
            self.probe =
                Some(Probe { target: to, number, packet, is_answered: false, was_suspect });
        }
        self.outgoing.push_back(Outgoing { to, over, packet });
    }

    /// Sends an unanswered ping again over a stream, beside the helpers that foca asks: a lost
    /// datagram is no dead member.
    pub(super) fn repeat_ping(&mut self, target: &Identity) {
        if let Some(probe) = &self.probe
            && probe.target == *target
            && !probe.is_answered
        {
            let packet = probe.packet.clone();
            self.outgoing.push_back(Outgoing { to: *target, over: Carrier::Stream, packet });
        }
    }
}
