//! The machines of layer 1 joined into one pure node: what a driver runs and simulations drive.
//!
//! Contract: `handle_*` tells the node what happened, then drain `poll_transmit` and `poll_event`
//! and wake it with [`Mesh::handle_timeout`] at `poll_timeout`. It knows no clock and no socket.
//!
//! A life: say hello to seeds and to members of an earlier run; read this member's own record back
//! from them, so that a restored backup does not publish under an old number; settle; say hello
//! again under the epoch that is certain now, which makes this member known; from then on gossip,
//! probe and repair.
//!
//! What arrives as a rumour is only ever a hint to ask for a signed entry. What arrives as an entry
//! is judged by the catalogue, whoever brought it. The detector hears of a member only under a run
//! that the member's record names.

mod allowance;
mod config;
mod dials;
mod exchange;
mod hint;
mod message;
mod observe;
mod pick;
mod publication;
mod relay;
mod rotation;
mod snapshot;
mod transmit;
mod view;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use crate::breaker::{SharedBreaker, SharedConfig};
use crate::catalogue::{Catalogue, Signatures, Verdict, Verify, record_key};
use crate::membership::{Belief, Carrier, Contact, Identity, Membership};
use crate::model::{
    Entry, EntryKey, EntryKind, Epoch, InstanceRecord, MemberId, MemberName, MemberPhase,
    MemberState, Moment, Offer, Signer, StoreSize,
};

use exchange::Exchange;
use message::{Message, Unread};
use publication::Publication;
use rotation::Rotations;
use view::Known;

pub use config::{EPOCH_RESERVE, MeshConfig};
pub use dials::{Dials, Lane};
pub use pick::{Caller, NoEndpoint, pick};
pub use rotation::Rotation;
pub use snapshot::{
    Appointed, Endpoint, EndpointState, Enrolled, MemberView, ServiceView, Snapshot,
};
pub use transmit::{
    Channel, DATAGRAM_LEN_MAX, Destination, Evidence, MESSAGE_LEN_MAX, MeshEvent, Transmit,
};

/// Longest wait for peers to show this member its own record.
const SETTLE_WITHIN: Duration = Duration::from_secs(3);

/// How often states that depend on time alone are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Shortest time between two epochs taken because of a record that this run did not sign.
const OUTBID_PAUSE: Duration = Duration::from_secs(10);

/// Members to dial after the next start.
const REMEMBERED_MAX: usize = 256;

/// Members that are told directly when this one leaves, restarts or moves.
const FAREWELLS: usize = 8;

/// How long after its farewell a member that leaves is taken off the detector's list. The other way
/// round it would first look like one that died. A few round trips.
const FAREWELL_TIME: Duration = Duration::from_millis(200);

/// A node that cannot begin, or an entry that cannot be published. Nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The entries given at the start hold no enrolment of this node's key under its name. Fault:
    /// the data directory.
    #[error("no enrolment of member {0} among the entries of the mesh")]
    NotEnrolled(MemberId),
    /// An entry that no peer would accept. Fault: whoever signed it.
    #[error("entry cannot be published: {0}")]
    Refused(&'static str),
    /// Signing or encoding this node's own record failed. Fault: an instance list too long.
    #[error("own record cannot be signed: {0}")]
    Record(String),
}

/// One member of a mesh, pure.
pub struct Mesh {
    id: MemberId,
    config: MeshConfig,
    signer: Box<dyn Signer>,
    /// The latest moment that anybody told.
    now: Moment,
    catalogue: Catalogue,
    membership: Membership,
    shared: SharedBreaker,
    /// Of this node's last observations in this epoch.
    observations_version: u64,
    publication: Publication,
    exchange: Exchange,
    /// The last epoch that is durable.
    epochs_until: Epoch,
    is_settled: bool,
    /// Whether what an earlier run left has been read.
    is_begun: bool,
    has_left: bool,
    /// When the detector is to be told of the leave.
    leave_at: Option<Moment>,
    settle_by: Moment,
    tick_at: Moment,
    outbid_at: Option<Moment>,
    /// Given by the operator; whoever was found there. Not grown by peers.
    seeds: BTreeMap<SocketAddr, Option<MemberId>>,
    /// Where members of an earlier run, and members without a record yet, were. Bounded by
    /// [`exchange::ADDRESSES_MAX`].
    addresses: BTreeMap<MemberId, SocketAddr>,
    /// Bounded by the records in the catalogue.
    known: BTreeMap<MemberId, Known>,
    /// Of the same members.
    rotations: BTreeMap<MemberId, Rotations>,
    started_at: Moment,
    /// Entries accepted since the last drain that others may not have.
    news: Vec<EntryKey>,
    /// Drained by the driver after every call.
    transmits: VecDeque<Transmit>,
    /// Drained by the driver after every call.
    events: VecDeque<MeshEvent>,
    /// Members whose state may have changed since the last drain.
    touched: BTreeSet<MemberId>,
    is_changed: bool,
}

impl Mesh {
    /// A node at its start. `entries`: its own enrolment, the issuers, and all that the disk has.
    pub fn new(
        now: Moment,
        config: MeshConfig,
        signer: Box<dyn Signer>,
        rng_seed: u64,
        entries: Vec<Entry>,
    ) -> Result<Self, Error> {
        Self::with_verifier(now, config, signer, rng_seed, entries, Box::new(Signatures))
    }

    /// [`Mesh::new`] with another way to verify signatures, for simulations.
    pub fn with_verifier(
        now: Moment,
        config: MeshConfig,
        signer: Box<dyn Signer>,
        rng_seed: u64,
        entries: Vec<Entry>,
        verifier: Box<dyn Verify>,
    ) -> Result<Self, Error> {
        let id = signer.public_key().member_id();
        let mut catalogue = Catalogue::new(config.mesh, config.root, verifier);
        catalogue.restore(entries);
        if catalogue.enrolment(id).is_none_or(|enrolment| enrolment.name != config.name) {
            return Err(Error::NotEnrolled(id));
        }
        let epochs_until = Epoch(config.epoch.0.saturating_add(EPOCH_RESERVE));
        let identity = Identity { id, epoch: config.epoch, address: config.address };
        let profile = config.profile.into();
        let mut mesh = Self {
            id,
            now,
            membership: Membership::new(now, profile, identity, epochs_until, rng_seed),
            shared: SharedBreaker::new(SharedConfig::default(), id, config.began_at_ms, rng_seed),
            observations_version: 0,
            publication: Publication::new(now, &config),
            exchange: Exchange::default(),
            catalogue,
            signer,
            epochs_until,
            is_settled: false,
            is_begun: false,
            has_left: false,
            leave_at: None,
            settle_by: now + SETTLE_WITHIN,
            tick_at: now + TICK,
            outbid_at: None,
            seeds: BTreeMap::new(),
            addresses: BTreeMap::new(),
            known: BTreeMap::new(),
            rotations: BTreeMap::new(),
            started_at: now,
            news: Vec::new(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            touched: BTreeSet::new(),
            is_changed: true,
            config,
        };
        mesh.begin(now);
        Ok(mesh)
    }

    /// Who this is.
    pub fn id(&self) -> MemberId {
        self.id
    }

    /// A datagram has come on a connection whose certificate proves it is `from`'s.
    pub fn handle_datagram(&mut self, now: Moment, from: MemberId, data: &[u8]) {
        if data.len() <= DATAGRAM_LEN_MAX {
            self.handle_packet(now, from, Carrier::Datagram, data);
        } else {
            self.blame(from, "too_long");
        }
        self.drain(now);
    }

    /// A reliable message has come, whole, from `from`.
    pub fn handle_message(&mut self, now: Moment, from: MemberId, data: &[u8]) {
        match Message::decode(data) {
            _ if from == self.id => self.drop_from(from, "source"),
            Ok(message) => self.handle_decoded(now, from, message),
            Err(Unread::UnknownKind) => self.drop_from(from, "unknown_kind"),
            Err(Unread::Fault(reason)) => self.blame(from, reason),
        }
        self.drain(now);
    }

    /// A gossip connection that this node dialled at `address` proved to be `peer`'s.
    pub fn handle_connected(&mut self, now: Moment, peer: MemberId, address: SocketAddr) {
        if let Some(occupant) = self.seeds.get_mut(&address) {
            *occupant = Some(peer);
            if peer == self.id {
                self.seeds.remove(&address);
                self.membership.remove_contact(Contact::Seed(address));
            }
        }
        self.note_address(peer, address);
        self.drain(now);
    }

    /// A dial, or the delivery of a message, failed.
    pub fn handle_unreachable(&mut self, now: Moment, to: Destination) {
        if let Destination::Member { id, .. } = to {
            self.handle_evidence(now, id, Evidence::Failed);
        }
    }

    /// The data plane saw something of a member. A failure asks for a probe at once and makes the
    /// member the last resort; an answer outweighs hearsay of its death for some seconds.
    pub fn handle_evidence(&mut self, now: Moment, member: MemberId, evidence: Evidence) {
        self.now = now;
        self.note_evidence(now, member, evidence);
        if evidence == Evidence::Failed {
            self.membership.handle_failure(now, member);
        }
        self.drain(now);
    }

    /// The deadline of [`Mesh::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Moment) {
        let due = self.poll_timeout().unwrap_or(now);
        if !self.is_settled && now >= self.settle_by {
            self.settle(now);
        }
        if self.leave_at.take_if(|at| *at <= now).is_some() {
            self.membership.leave(now);
        }
        self.membership.handle_timeout(now, due);
        self.say_hello(now);
        self.continue_repair(now);
        self.shared.handle_timeout(now);
        if self.is_settled && self.publication.take_due(now) {
            self.publish_record(now);
        }
        if now >= self.tick_at {
            self.tick_at = now + TICK;
            self.look_at_aged(now);
            self.go_above(now);
            self.exchange.forget_aged(now);
        }
        self.drain(now);
    }

    /// Says what this member serves. Published at most once a second after a burst of 5; calls in
    /// between are merged.
    pub fn set_offers(&mut self, now: Moment, offers: Vec<Offer>) {
        if self.publication.offers != offers {
            self.publication.offers = offers;
            self.publish_soon(now);
        }
    }

    /// Announces a phase of this member's life. A restart is told to some members at once.
    pub fn set_phase(&mut self, now: Moment, phase: MemberPhase) {
        if self.publication.phase == phase || self.has_left {
            return;
        }
        self.publication.phase = phase;
        match phase {
            MemberPhase::Restarting | MemberPhase::Left if self.is_settled => {
                self.publish_record(now);
                self.tell_directly();
                self.drain(now);
            }
            _ => self.publish_soon(now),
        }
    }

    /// Spreads an entry that was signed outside: an enrolment, an invite, an issuer.
    pub fn publish(&mut self, now: Moment, entry: Entry) -> Result<(), Error> {
        let verdict = self.catalogue.handle_entry(entry);
        self.drain(now);
        match verdict {
            Verdict::Accepted | Verdict::Known => Ok(()),
            Verdict::Outdated => Err(Error::Refused("a newer one is known here")),
            Verdict::Pending => Err(Error::Refused("its signer has no right that is known here")),
            Verdict::Refused(reason) => Err(Error::Refused(reason)),
        }
    }

    /// Says goodbye for good, and that this member serves nothing any more. Go on for 400 ms before
    /// closing the socket.
    pub fn leave(&mut self, now: Moment) {
        self.publication.offers.clear();
        self.set_phase(now, MemberPhase::Left);
        self.has_left = true;
        self.leave_at = Some(now + FAREWELL_TIME);
        self.drain(now);
    }

    /// One more address where a member may answer.
    pub fn add_seed(&mut self, now: Moment, address: SocketAddr) {
        if address != self.config.address && !self.seeds.contains_key(&address) {
            self.seeds.insert(address, None);
            self.membership.add_contact(now, Contact::Seed(address));
            self.say_hello(now);
            self.drain(now);
        }
    }

    /// Others reach this member at `address` from now on: a new run of it, as the detector sees it. Does
    /// nothing but ask for epochs while none is left; say it again then.
    pub fn set_address(&mut self, now: Moment, address: SocketAddr) {
        if self.config.address == address || self.has_left {
            return;
        }
        if !self.is_settled {
            self.config.address = address; // it is not known under another yet
            return;
        }
        let above = Epoch(self.publication.epoch.0.saturating_add(1));
        if above > self.epochs_until {
            self.events.push_back(MeshEvent::EpochsNeeded { at_least: above });
        } else {
            self.config.address = address;
            self.take_epoch(now, above);
            self.tell_directly(); // a hint would make them ask where this member is no more
        }
        self.drain(now);
    }

    /// Dials everybody who is away soon: what made them refuse this member is mended.
    pub fn retry_contacts(&mut self, now: Moment) {
        self.membership.hurry_contacts(now);
        self.say_hello(now);
        self.drain(now);
    }

    /// Epochs up to `until` are durable now.
    pub fn extend_epochs(&mut self, now: Moment, until: Epoch) {
        self.epochs_until = self.epochs_until.max(until);
        self.membership.extend_epochs(until);
        self.drain(now);
    }

    /// The next bytes to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// When to call [`Mesh::handle_timeout`] at the latest.
    pub fn poll_timeout(&self) -> Option<Moment> {
        let settle = (!self.is_settled).then_some(self.settle_by);
        let publish = self.publication.next_deadline().filter(|_| self.is_settled);
        let repair = self.exchange.next_deadline().filter(|_| self.is_settled && !self.has_left);
        let detector = self.membership.poll_timeout();
        let shared = self.shared.poll_timeout().filter(|_| self.is_settled && !self.has_left);
        [settle, publish, repair, detector, shared, self.leave_at, Some(self.tick_at)]
            .into_iter()
            .flatten()
            .min()
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<MeshEvent> {
        self.events.pop_front()
    }

    /// Whether [`Mesh::snapshot`] may differ from when this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.is_changed)
    }

    /// How a member is seen: cheaper than a snapshot. `None` when there is no record of it.
    pub fn member_state(&self, member: MemberId) -> Option<MemberState> {
        self.catalogue.record(member)?;
        self.known.get(&member).map(|known| known.state)
    }

    /// What this node itself saw of a member last; `None` when that is too long ago.
    pub fn experience(&self, member: MemberId) -> Option<Evidence> {
        self.known.get(&member)?.experience(self.now)
    }

    /// Which dials a dial of `to` waits for.
    pub fn lane(&self, to: &Destination) -> Lane {
        let belief = match to {
            Destination::Member { id, .. } => self.membership.belief(*id),
            Destination::Seed(_) => None,
        };
        match belief.map(|update| update.belief) {
            Some(Belief::Alive | Belief::Suspect) => Lane::There,
            Some(Belief::Down) | None => Lane::Away,
        }
    }

    /// What a member's record offers, whatever the member's state.
    pub fn instances(&self, member: MemberId) -> impl Iterator<Item = &InstanceRecord> {
        self.catalogue.record(member).into_iter().flat_map(|(record, _)| &record.instances)
    }

    /// What people call a member, as its record says, or its enrolment before there is a record.
    pub fn member_name(&self, member: MemberId) -> Option<&MemberName> {
        let recorded = self.catalogue.record(member).map(|(record, _)| &record.name);
        recorded.or_else(|| self.catalogue.enrolment(member).map(|enrolment| &enrolment.name))
    }

    /// The newest entry of a key.
    pub fn entry(&self, key: &EntryKey) -> Option<&Entry> {
        self.catalogue.entry(key)
    }

    /// All entries, ordered by key.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.catalogue.entries()
    }

    /// The entries of a kind, ordered by key.
    pub fn entries_of(&self, kind: EntryKind) -> impl Iterator<Item = &Entry> {
        self.catalogue.entries_of(kind)
    }

    /// The entries of a kind about one subject that the root or any issuer signed.
    pub fn entries_about(
        &self,
        kind: EntryKind,
        subject: [u8; 16],
    ) -> impl Iterator<Item = &Entry> {
        self.catalogue.entries_about(kind, subject)
    }

    /// The members that are enrolled under a name.
    pub fn holders(&self, name: &MemberName) -> impl Iterator<Item = MemberId> {
        self.catalogue.holders(name)
    }

    /// Members to dial after the next start, with their addresses; those that are there first, at
    /// most 256.
    pub fn remembered(&self) -> Vec<(MemberId, SocketAddr)> {
        let active: Vec<_> = self.membership.active().map(|there| there.id).collect();
        let all = self
            .catalogue
            .records()
            .filter(|(id, record, _)| *id != self.id && record.phase != MemberPhase::Left);
        let mut members: Vec<_> = all.map(|(id, record, _)| (id, record.address)).collect();
        members.sort_by_key(|(id, _)| (active.binary_search(id).is_err(), *id));
        members.truncate(REMEMBERED_MAX);
        members
    }

    /// The epoch in use.
    pub fn epoch(&self) -> Epoch {
        self.publication.epoch
    }

    /// How full each store is that peers can fill.
    pub fn store_sizes(&self) -> impl Iterator<Item = StoreSize> {
        let entries = self.catalogue.len();
        let own = [
            StoreSize::new("addresses", self.addresses.len(), exchange::ADDRESSES_MAX),
            StoreSize::new("known members", self.known.len(), entries),
            self.catalogue.store_size(),
            self.shared.cases_size(),
            StoreSize::new("heard callers", self.shared.heard(), entries),
        ];
        own.into_iter().chain(self.exchange.store_sizes()).chain(self.membership.store_sizes())
    }

    /// Whether this node has read its own record back (or waited long enough) and takes part.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    fn begin(&mut self, now: Moment) {
        let records = self.catalogue.records().map(|(id, record, _)| (id, record.address));
        let remembered = self.config.remembered.iter().copied().chain(records);
        let members: BTreeMap<_, _> =
            remembered.filter(|(id, _)| *id != self.id).take(exchange::ADDRESSES_MAX).collect();
        for (id, address) in members {
            self.addresses.insert(id, address);
            self.membership.add_contact(now, Contact::Member(id));
        }
        for address in self.config.seeds.clone() {
            self.add_seed(now, address);
        }
        // What the disk had is no news, neither for the disk nor for others.
        self.handle_catalogue(now);
        self.is_begun = true;
        self.news.clear();
        let is_old = |event: &MeshEvent| {
            matches!(event, MeshEvent::EntryAccepted(_) | MeshEvent::InstanceAdded { .. })
        };
        self.events.retain(|event| !is_old(event));
        self.known.values_mut().for_each(|known| known.record_at = None);
        if self.addresses.is_empty() && self.seeds.is_empty() {
            self.settle(now);
        }
        self.say_hello(now);
        self.drain(now);
    }

    /// From here on this member takes part, under an epoch above all that it was ever seen with.
    fn settle(&mut self, now: Moment) {
        if self.is_settled {
            return;
        }
        let seen = self.catalogue.version(&record_key(self.id)).map(|version| version.epoch);
        let epoch = match seen {
            Some(Epoch(seen)) if seen >= self.publication.epoch.0 => Epoch(seen.saturating_add(1)),
            _ => self.publication.epoch,
        };
        if epoch > self.epochs_until {
            self.settle_by = now + SETTLE_WITHIN; // asked again until the disk has it
            self.events.push_back(MeshEvent::EpochsNeeded { at_least: epoch });
            return;
        }
        self.is_settled = true;
        self.take_epoch(now, epoch);
        self.exchange.begin(now);
        self.membership.hurry_contacts(now);
        self.events.push_back(MeshEvent::Settled);
        self.say_hello(now);
    }

    fn take_epoch(&mut self, now: Moment, epoch: Epoch) {
        let address = self.config.address;
        let identity = Identity { epoch, address, ..self.membership.identity() };
        self.publication.epoch = epoch;
        self.membership.begin_above(now, identity);
        self.publish_record(now);
    }

    fn publish_soon(&mut self, now: Moment) {
        self.publication.set_due();
        if self.is_settled && self.publication.take_due(now) {
            self.publish_record(now);
        }
        self.drain(now);
    }

    fn publish_record(&mut self, now: Moment) {
        match self.publication.sign(&self.config, self.signer.as_ref()) {
            Ok(entry) => {
                let verdict = self.catalogue.handle_entry(entry);
                if verdict != Verdict::Accepted {
                    let reason = "own_record";
                    self.events.push_back(MeshEvent::EntryRefused { from: self.id, reason });
                }
            }
            Err(_) => {
                let reason = "own_record_too_long";
                self.events.push_back(MeshEvent::EntryRefused { from: self.id, reason });
            }
        }
        self.handle_catalogue(now);
    }

    /// Tells some members its record, whole.
    fn tell_directly(&mut self) {
        let record = self.catalogue.entry(&record_key(self.id)).cloned();
        let chosen: BTreeSet<_> =
            (0..FAREWELLS * 2).filter_map(|_| self.membership.choose_active()).collect();
        for there in chosen.into_iter().take(FAREWELLS) {
            for message in Message::of_entries(&record) {
                self.send_message(there.id, &message);
            }
        }
    }

    /// Goes above a record of this member that this run did not sign: there is a restored backup, or
    /// another process with this key. Two such processes would outbid each other for ever, so that
    /// it happens at most once in [`OUTBID_PAUSE`].
    fn go_above(&mut self, now: Moment) {
        let Some(version) = self.catalogue.version(&record_key(self.id)) else { return };
        let is_early = self.outbid_at.is_some_and(|at| now.since(at) < OUTBID_PAUSE);
        if is_early || !self.is_settled || self.has_left || !self.publication.is_behind(&version) {
            return;
        }
        self.outbid_at = Some(now);
        self.events.push_back(MeshEvent::Outbid(version.epoch));
        let above = Epoch(version.epoch.0.saturating_add(1));
        if above > self.epochs_until {
            self.events.push_back(MeshEvent::EpochsNeeded { at_least: above });
        } else {
            self.take_epoch(now, above);
        }
    }
}

#[cfg(test)]
mod tests;
