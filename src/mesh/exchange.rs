//! Who says what to whom over streams: greetings, repair, and answers to both.
//!
//! Repair compares first and moves differences only:
//!
//! ```text
//! A -> B  Roots     16 bytes, every 5 s to one random member; silence means "the same"
//! B -> A  Sums      64 numbers per list that differs
//! A -> B  Listing   what A holds in the buckets that differ
//! B -> A  Entries, States, Want      what A lacks, and what B lacks
//! ```
//!
//! Every message is answered by what it says alone: nobody keeps a conversation. Answers may be far
//! longer than questions, so that each peer has an allowance of bytes that it may be answered with.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use super::allowance::Allowances;
use super::message::{Hello, Listing, Message, Roots, Sums, Want};
use super::relay::standing_of;
use super::{Channel, Destination, Evidence, Mesh, MeshEvent, Transmit};
use crate::catalogue::{BAD_SIGNATURE, Verdict, record_key};
use crate::membership::{Belief, Carrier, Contact, Identity, MemberUpdate, Standing};
use crate::model::{
    BUCKETS, Entry, EntryKey, EntryKind, EntryVersion, MemberId, MemberPhase, Moment, StoreSize,
};

/// Time between two repairs with a random member, before jitter.
const REPAIR_INTERVAL: Duration = Duration::from_secs(5);

/// Repairs begun at once with members that have come back, and how soon the next ones follow.
const REPAIRS_MAX: usize = 8;
const REPAIR_PAUSE: Duration = Duration::from_millis(500);

/// Members waiting for a repair after they came back; beyond, the periodic repair must do.
const RETURNED_MAX: usize = 256;

/// How long to wait for something asked for before asking somebody else.
const ASK_PATIENCE: Duration = Duration::from_secs(1);

/// How long a peer that did not send what it was asked for is thought to be no help.
const SILENT_FOR: Duration = Duration::from_secs(30);

/// Things asked for that may be outstanding; beyond, repair must do.
const ASKED_MAX: usize = 8192;

/// Versions that one message lists, at some 71 bytes each, unless a single bucket has more.
const LISTED_MAX: usize = 8192;

/// Things that one message may ask for.
const WANT_MAX: usize = 1024;

/// Bytes that one peer is answered with at once, and again in each [`ALLOWANCE_TIME`]; the last
/// answer may go over. By guess 700 to 1,300 per member, so that a newcomer to 1,000 gets all it
/// lacks at once; beyond, the next repair brings the rest.
const ALLOWANCE: usize = 2 * 1024 * 1024;
/// Time in which a spent allowance is whole again.
const ALLOWANCE_TIME: Duration = Duration::from_secs(1);
/// Whoever has spent some of an allowance: four times the members that are promised.
const SPENDERS_MAX: usize = 4096;

/// Signatures of one peer's entries that are verified at once, and again in each [`VERIFY_TIME`]; a
/// whole allowance takes about 200 ms. Beyond, the next repair brings the rest.
const VERIFY_MAX: usize = 4096;
const VERIFY_TIME: Duration = Duration::from_secs(4);

/// Things that one peer's word makes this node ask for at once, and again in each [`ASK_PATIENCE`].
const ASKS_MAX: usize = 1024;

/// Versions by one member that are taken at once, and again in each [`CHANGES_TIME`]: four a second.
/// One that restarts and exposes its instances publishes about ten, and then one a second. The last
/// version is not lost with those in between: repair brings it.
const CHANGES_MAX: usize = 16;
const CHANGES_TIME: Duration = Duration::from_secs(4);

/// Addresses remembered of members without a record.
pub(super) const ADDRESSES_MAX: usize = 4096;

/// What this node has asked for, whom it will repair with, and what it still does for whom.
pub(super) struct Exchange {
    repair_at: Moment,
    /// At most [`RETURNED_MAX`].
    returned: VecDeque<MemberId>,
    /// When something was asked for, and of whom. At most [`ASKED_MAX`].
    asked: BTreeMap<Asked, (Moment, MemberId)>,
    /// Since when peers owe what they were asked for. While it is asked of one of them, it may be asked
    /// of another, too: else whoever tells first of what it never sends keeps others' news away. At
    /// most [`SPENDERS_MAX`].
    silent: BTreeMap<MemberId, Moment>,
    /// What to ask of whom at the end of this turn; bounded as `asked`.
    wants: BTreeMap<MemberId, BTreeSet<Asked>>,
    /// Bytes that each peer is answered with.
    answers: Allowances<MemberId>,
    /// Entries of each peer that are verified.
    verifications: Allowances<MemberId>,
    /// Things that each peer makes this node ask for.
    asks: Allowances<MemberId>,
    /// Versions that each owner replaces its entries with.
    changes: Allowances<MemberId>,
}

impl Default for Exchange {
    fn default() -> Self {
        let allowances = |whole, refill| Allowances::new(whole, refill, SPENDERS_MAX);
        Self {
            repair_at: Moment::START,
            returned: VecDeque::new(),
            asked: BTreeMap::new(),
            silent: BTreeMap::new(),
            wants: BTreeMap::new(),
            answers: allowances(ALLOWANCE, ALLOWANCE_TIME),
            verifications: allowances(VERIFY_MAX, VERIFY_TIME),
            asks: allowances(ASKS_MAX, ASK_PATIENCE),
            changes: allowances(CHANGES_MAX, CHANGES_TIME),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Asked {
    Member(MemberId),
    Entry(EntryKey),
}

impl Exchange {
    pub(super) fn begin(&mut self, now: Moment) {
        self.repair_at = now + REPAIR_PAUSE;
    }

    pub(super) fn next_deadline(&self) -> Option<Moment> {
        Some(self.repair_at)
    }

    pub(super) fn forget_aged(&mut self, now: Moment) {
        let is_late = |at: Moment| now.since(at) >= ASK_PATIENCE;
        let owing = self.asked.values().filter(|(at, _)| is_late(*at)).map(|(_, of)| *of);
        let owing: BTreeSet<_> = owing.collect();
        owing.into_iter().for_each(|of| self.note_silent(now, of));
        self.asked.retain(|_, (at, _)| !is_late(*at));
        self.silent.retain(|_, at| now.since(*at) < SILENT_FOR);
        for allowances in
            [&mut self.answers, &mut self.verifications, &mut self.asks, &mut self.changes]
        {
            allowances.forget_whole(now);
        }
    }

    fn note_silent(&mut self, now: Moment, peer: MemberId) {
        if self.silent.len() < SPENDERS_MAX {
            self.silent.insert(peer, now);
        }
    }

    pub(super) fn store_sizes(&self) -> [StoreSize; 8] {
        let wanted = self.wants.values().map(BTreeSet::len).sum();
        [
            StoreSize::new("members to repair with", self.returned.len(), RETURNED_MAX),
            StoreSize::new("things asked for", self.asked.len(), ASKED_MAX),
            StoreSize::new("things to ask for", wanted, ASKED_MAX),
            StoreSize::new("peers that owe something", self.silent.len(), SPENDERS_MAX),
            self.answers.store_size("peers that were answered"),
            self.verifications.store_size("peers whose entries were verified"),
            self.asks.store_size("peers that made this node ask"),
            self.changes.store_size("owners that changed something"),
        ]
    }

    /// Returns false when `from` has made this node ask for as much as it may.
    fn ask(&mut self, now: Moment, thing: Asked, from: MemberId) -> bool {
        if let Some((at, of)) = self.asked.get(&thing).copied() {
            if now.since(at) >= ASK_PATIENCE {
                self.note_silent(now, of);
            } else if of == from || !self.silent.contains_key(&of) {
                return true;
            }
        } else if self.asked.len() >= ASKED_MAX {
            return true;
        }
        let has_left = self.asks.has_left(now, &from);
        if has_left {
            self.asks.spend(now, from, 1);
            self.asked.insert(thing, (now, from));
            self.wants.entry(from).or_default().insert(thing);
        }
        has_left
    }
}

impl Mesh {
    pub(super) fn handle_decoded(&mut self, now: Moment, from: MemberId, message: Message) {
        self.note_evidence(now, from, Evidence::Answered);
        match message {
            Message::Hello(..)
            | Message::Roots(_)
            | Message::Sums(_)
            | Message::Listing(_)
            | Message::Want(_)
                if !self.exchange.answers.has_left(now, &from) =>
            {
                self.drop_from(from, "over_allowance");
            }
            Message::Hello(hello, entries) => self.handle_hello(now, from, &hello, entries),
            Message::Packet(packet) => self.handle_packet(now, from, Carrier::Stream, &packet),
            Message::Roots(roots) => self.handle_roots(now, from, roots),
            Message::Sums(sums) => self.handle_sums(now, from, &sums),
            Message::Listing(listing) => self.handle_listing(now, from, &listing),
            Message::States(states) => self.handle_states(now, from, &states),
            Message::Want(want) => self.handle_want(now, from, &want),
            Message::Entries(entries) => self.accept(now, from, entries),
            Message::Convicted(identity) if self.is_settled && !self.has_left => {
                if let Err(fault) = self.membership.handle_convicted(now, from, identity) {
                    self.drop_from(from, fault.as_str());
                }
            }
            Message::Convicted(_) => {} // no run that takes part
        }
    }

    /// Dials whoever is due.
    pub(super) fn say_hello(&mut self, now: Moment) {
        for contact in self.membership.take_contacts(now) {
            let to = match contact {
                _ if self.has_left => None,
                Contact::Seed(address) => self.unoccupied_seed(address),
                Contact::Member(id) if self.has_said_goodbye(id) => None,
                Contact::Member(id) if self.is_nobody(id) => None,
                Contact::Member(id) => self.destination(id),
            };
            match to {
                Some(to) => {
                    let hello = self.hello(false, None);
                    self.send_to(to, &hello);
                }
                None => self.membership.remove_contact(contact),
            }
        }
    }

    /// Begins repair with a member that is there again, soon and not with too many at once. In a big
    /// mesh some do, not all: about [`REPAIRS_MAX`] greet each member that returns.
    pub(super) fn greet(&mut self, member: MemberId) {
        let others = self.membership.active().count() as u64;
        let is_chosen = self.membership.random(others) < REPAIRS_MAX as u64;
        if is_chosen && self.exchange.returned.len() < RETURNED_MAX {
            self.exchange.returned.push_back(member);
        }
    }

    pub(super) fn continue_repair(&mut self, now: Moment) {
        if !self.is_settled || self.has_left || now < self.exchange.repair_at {
            return;
        }
        let count = self.exchange.returned.len().min(REPAIRS_MAX);
        let mut peers: BTreeSet<MemberId> = self.exchange.returned.drain(..count).collect();
        peers.extend(self.membership.choose_active().map(|there| there.id));
        for peer in peers {
            let roots = Message::Roots(self.roots());
            self.send_message(peer, &roots);
        }
        let pause = match self.exchange.returned.is_empty() {
            true => {
                let jitter = self.membership.random(REPAIR_INTERVAL.as_millis() as u64 / 2);
                REPAIR_INTERVAL * 3 / 4 + Duration::from_millis(jitter)
            }
            false => REPAIR_PAUSE,
        };
        self.exchange.repair_at = now + pause;
    }

    pub(super) fn want_record(&mut self, now: Moment, member: MemberId, from: MemberId) {
        self.ask(now, Asked::Member(member), from);
    }

    pub(super) fn want_entry(&mut self, key: EntryKey, from: MemberId) {
        let thing = match key == record_key(key.owner) {
            true => Asked::Member(key.owner), // with what is needed to accept it
            false => Asked::Entry(key),
        };
        self.ask(self.now, thing, from);
    }

    fn ask(&mut self, now: Moment, thing: Asked, from: MemberId) {
        if !self.exchange.ask(now, thing, from) {
            self.drop_from(from, "over_allowance");
        }
    }

    pub(super) fn ask_for_wants(&mut self) {
        for (from, things) in std::mem::take(&mut self.exchange.wants) {
            let mut want = Want::default();
            for thing in things {
                match thing {
                    Asked::Member(id) => want.members.push(id),
                    Asked::Entry(key) => want.keys.push(key),
                }
            }
            self.send_message(from, &Message::Want(want));
        }
    }

    pub(super) fn note_address(&mut self, member: MemberId, address: SocketAddr) {
        let has_room = self.addresses.len() < ADDRESSES_MAX;
        if has_room || self.addresses.contains_key(&member) {
            self.addresses.insert(member, address);
        }
    }

    /// Sends what `to` has asked for, while its allowance lasts.
    fn answer(&mut self, now: Moment, to: MemberId, message: &Message) {
        if !self.exchange.answers.has_left(now, &to) {
            return self.drop_from(to, "over_allowance");
        }
        let len = self.send_message(to, message);
        self.exchange.answers.spend(now, to, len);
    }

    /// Returns how many bytes are sent.
    pub(super) fn send_message(&mut self, to: MemberId, message: &Message) -> usize {
        if let Some(to) = self.destination(to) {
            return self.send_to(to, message);
        }
        self.drop_from(to, "no_address");
        0
    }

    /// Returns how many bytes are sent.
    pub(super) fn send_to(&mut self, to: Destination, message: &Message) -> usize {
        let Some(data) = message.encode() else {
            self.drop_from(self.id, "message_too_long");
            return 0;
        };
        let len = data.len();
        self.transmits.push_back(Transmit { to, channel: Channel::Message, data });
        len
    }

    /// Where a member is dialled: at the address it has signed, or, before its record is here, at
    /// the one it was last met at. Its certificate proves who answers.
    fn destination(&self, id: MemberId) -> Option<Destination> {
        let signed = self.catalogue.record(id).map(|(record, _)| record.address);
        let address = signed.or_else(|| self.addresses.get(&id).copied())?;
        (id != self.id).then_some(Destination::Member { id, address })
    }

    /// A seed, unless whoever was found there is known to be alive.
    fn unoccupied_seed(&self, address: SocketAddr) -> Option<Destination> {
        let occupant = self.seeds.get(&address).copied().flatten();
        let belief = occupant.and_then(|occupant| self.membership.belief(occupant));
        let is_there = belief.is_some_and(|update| update.belief != Belief::Down);
        (!is_there).then_some(Destination::Seed(address))
    }

    fn has_said_goodbye(&self, id: MemberId) -> bool {
        self.catalogue.record(id).is_some_and(|(record, _)| record.phase == MemberPhase::Left)
    }

    /// Whether nobody is to believe a member any more: it was replaced or dropped.
    fn is_nobody(&self, id: MemberId) -> bool {
        self.catalogue.is_replaced(id) || self.catalogue.dismissals().is_dropped(&id)
    }

    fn hello(&mut self, is_answer: bool, to: Option<MemberId>) -> Message {
        let mut entries: Vec<Entry> =
            self.catalogue.credentials(self.id).into_iter().cloned().collect();
        let theirs = to.and_then(|to| self.catalogue.entry(&record_key(to)));
        entries.extend(theirs.cloned()); // so that it reads its own record back
        let hello = Hello {
            identity: self.membership.identity(),
            is_settled: self.is_settled,
            is_answer,
            roots: self.roots(),
        };
        Message::Hello(hello, entries)
    }

    fn roots(&mut self) -> Roots {
        Roots { entries: self.catalogue.digest().root(), states: self.membership.digest().root() }
    }

    fn handle_hello(&mut self, now: Moment, from: MemberId, hello: &Hello, entries: Vec<Entry>) {
        if hello.identity.id != from {
            return self.blame(from, "source");
        }
        self.note_address(from, hello.identity.address);
        self.accept(now, from, entries);
        // A member that has never published has nothing to go above; any answer shows that others
        // are there. Otherwise only a member that takes part knows what it missed.
        let is_new = self.catalogue.version(&record_key(self.id)).is_none();
        if hello.is_answer && (hello.is_settled || is_new) {
            self.settle(now);
        }
        let is_current = standing_of(&self.catalogue, &hello.identity) == Standing::Current;
        let is_mutual = self.is_settled && hello.is_settled;
        if is_mutual
            && is_current
            && !self.has_said_goodbye(from)
            && !self.membership.handle_alive(now, hello.identity)
        {
            self.send_message(from, &Message::Convicted(hello.identity));
        }
        if !hello.is_answer {
            // Back to where it says it is: it may have moved, and its certificate proves who it is.
            let to = Destination::Member { id: from, address: hello.identity.address };
            let answer = self.hello(true, Some(from));
            let len = self.send_to(to, &answer);
            self.exchange.answers.spend(now, from, len);
        } else if self.is_settled {
            self.handle_roots(now, from, hello.roots);
        }
    }

    fn handle_roots(&mut self, now: Moment, from: MemberId, theirs: Roots) {
        let ours = self.roots();
        let mut sums = Sums::default();
        if ours.entries != theirs.entries {
            sums.entries = self.catalogue.digest().sums().to_vec();
        }
        if ours.states != theirs.states {
            sums.states = self.membership.digest().sums().to_vec();
        }
        if ours != theirs {
            self.answer(now, from, &Message::Sums(sums));
        }
    }

    fn handle_sums(&mut self, now: Moment, from: MemberId, theirs: &Sums) {
        let mut listing = Listing::default();
        if !theirs.entries.is_empty() {
            (listing.entry_buckets, listing.versions) = self.list(&theirs.entries);
        }
        if !theirs.states.is_empty() {
            listing.state_buckets = self.membership.digest().differing(&theirs.states);
            listing.states = self.membership.states_in(&listing.state_buckets);
        }
        if !(listing.entry_buckets.is_empty() && listing.state_buckets.is_empty()) {
            self.answer(now, from, &Message::Listing(listing));
        }
    }

    /// The buckets of entries that differ from `theirs`, with what is in them: all of them, or, if that
    /// is more than one message holds, some by chance, so that the next rounds come to the rest.
    fn list(&mut self, theirs: &[u64]) -> (Vec<u8>, Vec<(EntryKey, EntryVersion)>) {
        let mut differing = self.catalogue.digest().differing(theirs);
        let start = self.membership.random(differing.len() as u64) as usize;
        differing.rotate_left(start);
        let (mut buckets, mut versions) = (Vec::new(), Vec::new());
        for bucket in differing {
            let more = self.catalogue.versions_in(&[bucket]);
            if !buckets.is_empty() && versions.len() + more.len() > LISTED_MAX {
                break;
            }
            buckets.push(bucket);
            versions.extend(more);
        }
        (buckets, versions)
    }

    fn handle_listing(&mut self, now: Moment, from: MemberId, theirs: &Listing) {
        if theirs.entry_buckets.len().max(theirs.state_buckets.len()) > BUCKETS {
            return self.blame(from, "malformed");
        }
        let difference = self.catalogue.difference(&theirs.entry_buckets, &theirs.versions);
        let mut answers = Message::of_entries(difference.newer);
        if !difference.older.is_empty() {
            let keys = difference.older.into_iter().take(WANT_MAX).collect();
            answers.push(Message::Want(Want { members: Vec::new(), keys }));
        }
        if !theirs.state_buckets.is_empty() {
            let mut states = self.membership.states_in(&theirs.state_buckets);
            let known: BTreeMap<_, _> =
                theirs.states.iter().map(|state| (state.identity.id, state)).collect();
            states.retain(|state| known.get(&state.identity.id) != Some(&state));
            answers.push(Message::States(states));
            self.handle_states(now, from, &theirs.states);
        }
        for answer in &answers {
            self.answer(now, from, answer);
        }
    }

    /// A member that does not take part yet must not begin to probe: it would not hear the answers.
    fn handle_states(&mut self, now: Moment, from: MemberId, states: &[MemberUpdate]) {
        if self.is_settled {
            let catalogue = &self.catalogue;
            let standing = |identity: &Identity| standing_of(catalogue, identity);
            self.membership.handle_states(now, from, states, &standing);
        }
    }

    fn handle_want(&mut self, now: Moment, from: MemberId, want: &Want) {
        let members: BTreeSet<_> = want.members.iter().take(WANT_MAX).collect();
        let keys: BTreeSet<_> = want.keys.iter().take(WANT_MAX).collect();
        let credentials =
            members.into_iter().flat_map(|member| self.catalogue.credentials(*member));
        let entries = keys.into_iter().filter_map(|key| self.catalogue.entry(key));
        for answer in Message::of_entries(credentials.chain(entries)) {
            self.answer(now, from, &answer);
        }
    }

    /// Takes what `from` has sent, as far as its allowance and the rates of the owners go: verifying
    /// is the dearest thing that others make this node do. What is left out comes again by repair.
    fn accept(&mut self, now: Moment, from: MemberId, entries: Vec<Entry>) {
        for entry in entries {
            let (key, owner) = (entry.key(), entry.key().owner);
            match self.catalogue.recognise(&entry) {
                Some(Verdict::Outdated) => {
                    self.drop_from(from, "outdated_entry");
                    continue;
                }
                Some(_) => continue,
                None => {}
            }
            let is_change = is_own_word(key.kind) && self.catalogue.version(&key).is_some();
            if is_change && !self.exchange.changes.has_left(now, &owner) {
                self.events.push_back(MeshEvent::OverRate(owner));
                continue;
            }
            if !self.exchange.verifications.has_left(now, &from) {
                self.drop_from(from, "over_allowance");
                break;
            }
            self.exchange.verifications.spend(now, from, 1);
            match self.catalogue.handle_entry(entry) {
                Verdict::Refused(reason) => {
                    self.events.push_back(MeshEvent::EntryRefused { from, reason });
                    if reason == BAD_SIGNATURE {
                        break; // every agent verifies what it passes on: the rest is worth no look
                    }
                }
                Verdict::Accepted => {
                    if is_change {
                        self.exchange.changes.spend(now, owner, 1);
                    }
                    self.exchange.asked.remove(&Asked::Member(owner));
                    self.exchange.asked.remove(&Asked::Entry(key));
                }
                Verdict::Pending | Verdict::Known | Verdict::Outdated => {}
            }
        }
        self.handle_catalogue(now);
    }
}

/// Whether entries of this kind are their owner's word about itself, and not an issuer's or the root's
/// about many others.
const fn is_own_word(kind: EntryKind) -> bool {
    !matches!(kind, EntryKind::ISSUER | EntryKind::ENROLMENT | EntryKind::INVITE)
}
