//! Who offers what: signed, single-writer entries, replicated to every member. No registry.
//!
//! An entry certifies itself: its owner is the hash of the key that signed it, and only a higher
//! version by the same owner replaces it. Whether an entry may be *applied* follows from other
//! entries (an enrolment needs its issuer, a record its enrolment), so that an entry whose ground is
//! not here yet waits in a bounded store. What cannot be read is kept and relayed, not applied.
//!
//! Invariants, which tests name:
//! - no record of a member that this member did not sign;
//! - the version of an entry never goes back;
//! - the same entries arriving in any order leave the same catalogue;
//! - every store is under its bound, whatever arrives.

mod admission;
mod dismissals;
mod quota;
mod succession;
mod verify;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::model::{
    Digest, Enrolment, Entry, EntryHash, EntryKey, EntryKind, EntryVersion, Epoch, Issuer,
    ItemHash, MemberId, MemberName, MemberRecord, MeshId, Observations, PublicKey, StoreSize,
};
use crate::wire;

use quota::Quotas;
use succession::Claim;

pub use admission::{Content, INSTANCES_MAX, REQUESTS_MAX};
pub use dismissals::{Dismissals, let_in_by};
pub use verify::{Signatures, Verify};

/// Entries that wait for their ground (an issuer, an enrolment). Beyond, the last by key is dropped,
/// invites and enrolments before records, and comes again by repair.
const PENDING_MAX: usize = 1024;

/// The newest entry of each key that this node has accepted.
pub struct Catalogue {
    mesh: MeshId,
    root: PublicKey,
    verifier: Box<dyn Verify>,
    /// Bounded by [`Quotas`].
    entries: BTreeMap<EntryKey, Stored>,
    quotas: Quotas,
    digest: Digest,
    /// Signed well, without ground yet. At most [`PENDING_MAX`].
    pending: BTreeMap<EntryKey, Entry>,
    /// Who enrolled whom. Bounded by the enrolments.
    issuers_of: BTreeMap<MemberId, BTreeSet<MemberId>>,
    /// Who claims to have taken over whose name. Bounded by the enrolments.
    successors: BTreeMap<MemberId, BTreeSet<MemberId>>,
    /// Who is enrolled under a name. Bounded by the enrolments.
    names: BTreeMap<MemberName, BTreeSet<MemberId>>,
    /// What the root took back. Bounded by the issuers.
    dismissals: Dismissals,
    events: VecDeque<CatalogueEvent>,
}

struct Stored {
    entry: Entry,
    content: Content,
}

/// Why an entry is refused whose signature does not hold.
pub const BAD_SIGNATURE: &str = "signature";

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the newest of its key now.
    Accepted,
    /// It is here already.
    Known,
    /// A newer one is here.
    Outdated,
    /// It waits for its ground.
    Pending,
    /// It is not what it claims. Fault: whoever sent it.
    Refused(&'static str),
}

/// What happened, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum CatalogueEvent {
    /// An entry was accepted; it replaced `previous`.
    Accepted {
        /// The entry.
        entry: Entry,
        /// What it carries.
        content: Content,
        /// What was there before.
        previous: Option<Content>,
    },
    /// An entry is kept and relayed, but its payload cannot be read or breaks a rule of its kind.
    Quarantined {
        /// Its place.
        key: EntryKey,
        /// Of its payload.
        hash: EntryHash,
    },
    /// One owner signed two payloads with one number.
    Equivocation(EntryKey),
    /// Two members are enrolled under one name.
    NameConflict {
        /// The name.
        name: MemberName,
        /// Both.
        members: [MemberId; 2],
    },
    /// The store of waiting entries was full; this one was dropped.
    PendingDropped(EntryKey),
}

impl Catalogue {
    /// An empty catalogue of `mesh`, whose issuers `root` signs.
    pub fn new(mesh: MeshId, root: PublicKey, verifier: Box<dyn Verify>) -> Self {
        Self {
            mesh,
            root,
            verifier,
            entries: BTreeMap::new(),
            quotas: Quotas::default(),
            digest: Digest::default(),
            pending: BTreeMap::new(),
            issuers_of: BTreeMap::new(),
            successors: BTreeMap::new(),
            names: BTreeMap::new(),
            dismissals: Dismissals::default(),
            events: VecDeque::new(),
        }
    }

    /// Takes an entry from anywhere. Its signature is verified once: what is known is recognised
    /// before, what is accepted or waits is never verified again.
    pub fn handle_entry(&mut self, entry: Entry) -> Verdict {
        if let Some(verdict) = self.recognise(&entry) {
            return verdict;
        }
        if !self.verifier.verify(&self.mesh, &entry) {
            return Verdict::Refused(BAD_SIGNATURE);
        }
        self.apply(entry)
    }

    /// Takes what an earlier run has kept, in whatever order: grounds first, so that nothing waits.
    pub fn restore(&mut self, mut entries: Vec<Entry>) {
        entries.sort_by_key(|entry| order_of(entry.key().kind));
        for entry in entries {
            self.handle_entry(entry);
        }
    }

    /// The verdict on an entry that is no news; `None` when its signature has to be looked at.
    pub fn recognise(&self, entry: &Entry) -> Option<Verdict> {
        let key = entry.key();
        let waiting = || self.pending.get(&key).map(Entry::version);
        match self.version(&key).or_else(waiting)?.cmp(&entry.version()) {
            Ordering::Less => None,
            Ordering::Equal => Some(Verdict::Known),
            Ordering::Greater => Some(Verdict::Outdated),
        }
    }

    /// How many entries are kept.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no entry is kept.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How full the store is of what waits.
    pub fn store_size(&self) -> StoreSize {
        StoreSize::new("entries without ground", self.pending.len(), PENDING_MAX)
    }

    /// The newest entry of a key.
    pub fn entry(&self, key: &EntryKey) -> Option<&Entry> {
        self.entries.get(key).map(|stored| &stored.entry)
    }

    /// All entries, ordered by key.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().map(|stored| &stored.entry)
    }

    /// The entries of a kind, ordered by key.
    pub fn entries_of(&self, kind: EntryKind) -> impl Iterator<Item = &Entry> {
        self.entries.range(of_kind(kind)).map(|(_, stored)| &stored.entry)
    }

    /// The entries of a kind about one subject that the root or any issuer signed: a few look-ups,
    /// however many entries there are.
    pub fn entries_about(
        &self,
        kind: EntryKind,
        subject: [u8; 16],
    ) -> impl Iterator<Item = &Entry> {
        let owners = [self.root.member_id()].into_iter().chain(self.issuers().map(|(id, _)| id));
        owners.filter_map(move |owner| self.entry(&EntryKey { kind, owner, subject }))
    }

    /// The members that are enrolled under a name, by whatever issuer; one, unless two issuers gave
    /// it away at the same time.
    pub fn holders(&self, name: &MemberName) -> impl Iterator<Item = MemberId> {
        let all = self.names.get(name).into_iter().flatten().copied();
        all.filter(|member| !self.is_replaced(*member) && !self.dismissals.is_dropped(member))
    }

    /// The version of a key's newest entry.
    pub fn version(&self, key: &EntryKey) -> Option<EntryVersion> {
        self.entries.get(key).map(|stored| stored.entry.version())
    }

    /// A member's own record, and its version.
    pub fn record(&self, member: MemberId) -> Option<(&Arc<MemberRecord>, EntryVersion)> {
        match self.entries.get(&record_key(member))? {
            Stored { content: Content::Record(record), entry } => Some((record, entry.version())),
            _ => None,
        }
    }

    /// What a member said last of others' instances.
    pub fn observations(&self, member: MemberId) -> Option<&Arc<Observations>> {
        let kind = EntryKind::OBSERVATIONS;
        match &self.entries.get(&EntryKey { kind, owner: member, subject: [0; 16] })?.content {
            Content::Observations(observations) => Some(observations),
            _ => None,
        }
    }

    /// All readable records, ordered by member.
    pub fn records(&self) -> impl Iterator<Item = (MemberId, &Arc<MemberRecord>, EntryVersion)> {
        self.entries.range(of_kind(EntryKind::RECORD)).filter_map(|(key, stored)| {
            match &stored.content {
                Content::Record(record) => Some((key.owner, record, stored.entry.version())),
                _ => None,
            }
        })
    }

    /// The newest enrolment of a member by an issuer that is still active, if whoever let it in is,
    /// too, or the root kept it.
    pub fn enrolment(&self, member: MemberId) -> Option<&Arc<Enrolment>> {
        self.newest_enrolment(member).map(|(_, enrolment)| enrolment)
    }

    /// The same, with the hash of the issuer's key.
    pub fn newest_enrolment(&self, member: MemberId) -> Option<(MemberId, &Arc<Enrolment>)> {
        let all = self.enrolments(member);
        all.max_by_key(|(_, enrolment)| (enrolment.issued_at, enrolment.serial))
    }

    /// Whether another member under the same name says that it replaces this one: the machine lost its
    /// key and has another one. Nobody is to believe the old one.
    pub fn is_replaced(&self, member: MemberId) -> bool {
        let Some(successors) = self.successors.get(&member) else { return false };
        let Some((name, own)) = self.claim(member) else { return false };
        let claims = successors.iter().filter_map(|successor| self.claim(*successor));
        claims.filter(|(of, _)| *of == name).any(|(_, later)| later.supersedes(&own))
    }

    /// Under which name a member is enrolled, and whom it says to replace there.
    fn claim(&self, member: MemberId) -> Option<(&MemberName, Claim)> {
        let newest = self.enrolment(member)?;
        let replaces = self.enrolments(member).flat_map(|(_, enrolment)| &enrolment.replaces);
        let (issued_at, replaces) = (newest.issued_at, replaces.copied().collect());
        Some((&newest.name, Claim { member, issued_at, replaces }))
    }

    /// What the root took back.
    pub fn dismissals(&self) -> &Dismissals {
        &self.dismissals
    }

    /// Everybody whom an issuer ever enrolled, ordered.
    pub fn enrolled_members(&self) -> impl Iterator<Item = MemberId> {
        self.issuers_of.keys().copied()
    }

    /// All issuers with the hash of their key, those that the root took back, too.
    pub fn issuers(&self) -> impl Iterator<Item = (MemberId, &Arc<Issuer>)> {
        self.entries.range(of_kind(EntryKind::ISSUER)).filter_map(|(key, stored)| {
            match &stored.content {
                Content::Issuer(issuer) => Some((MemberId::from_bytes(key.subject), issuer)),
                _ => None,
            }
        })
    }

    /// The epoch of the root's newest word about the issuer whose key hashes to `id`.
    pub fn issuer_epoch(&self, id: MemberId) -> Option<Epoch> {
        self.version(&self.issuer_key(id)).map(|version| version.epoch)
    }

    /// The entries that let others accept a member's record: issuers first, the record last.
    pub fn credentials(&self, member: MemberId) -> Vec<&Entry> {
        let issuers = self.issuers_of.get(&member).into_iter().flatten();
        let issuer = issuers.clone().map(|issuer| self.issuer_key(*issuer));
        let enrolment = issuers.map(|issuer| EntryKey {
            kind: EntryKind::ENROLMENT,
            owner: *issuer,
            subject: *member.as_bytes(),
        });
        let keys = issuer.chain(enrolment).chain([record_key(member)]);
        keys.filter_map(|key| self.entry(&key)).collect()
    }

    /// The summary of all entries here.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Keys and versions of the entries in some buckets of [`Catalogue::digest`].
    pub fn versions_in(&self, buckets: &[u8]) -> Vec<(EntryKey, EntryVersion)> {
        self.entries
            .iter()
            .filter(|(key, _)| buckets.contains(&bucket_of(key)))
            .map(|(key, stored)| (*key, stored.entry.version()))
            .collect()
    }

    /// What to send to, and to ask of, a member that has `theirs` in `buckets`.
    pub fn difference(
        &self,
        buckets: &[u8],
        theirs: &[(EntryKey, EntryVersion)],
    ) -> Difference<'_> {
        let theirs: BTreeMap<_, _> = theirs.iter().copied().collect();
        let ours = self.entries.iter().filter(|(key, _)| buckets.contains(&bucket_of(key)));
        let mut newer: Vec<&Entry> = ours
            .map(|(_, stored)| &stored.entry)
            .filter(|entry| {
                theirs.get(&entry.key()).is_none_or(|version| *version < entry.version())
            })
            .collect();
        newer.sort_by_key(|entry| order_of(entry.key().kind));
        let older = theirs
            .iter()
            .filter(|(key, version)| self.version(key).is_none_or(|ours| ours < **version))
            .map(|(key, _)| *key)
            .collect();
        Difference { newer, older }
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<CatalogueEvent> {
        self.events.pop_front()
    }

    fn apply(&mut self, entry: Entry) -> Verdict {
        let mut verdict = None;
        let mut queue = VecDeque::from([entry]);
        while let Some(entry) = queue.pop_front() {
            let key = entry.key();
            let is_old = self.version(&key).is_some_and(|known| known >= entry.version());
            let one = match self.admit(&entry) {
                _ if is_old => Verdict::Outdated, // it waited while a newer one came
                Ok(content) => self.store(entry, content),
                Err(admission::Refusal::NoGround) => self.postpone(entry),
                Err(admission::Refusal::NoRight(reason)) => Verdict::Refused(reason),
            };
            if one == Verdict::Accepted {
                queue.extend(self.take_unblocked(&key));
                self.reconsider(&key);
            }
            verdict.get_or_insert(one);
        }
        verdict.unwrap_or(Verdict::Known)
    }

    fn store(&mut self, entry: Entry, content: Content) -> Verdict {
        let key = entry.key();
        let previous = self.entries.get(&key);
        if !self.quotas.admits(&entry, previous.map(|stored| &stored.entry)) {
            return Verdict::Refused("quota");
        }
        self.quotas.replace(&entry, previous.map(|stored| &stored.entry));
        if let Some(stored) = previous {
            self.digest.remove(bucket_of(&key), item_hash(&stored.entry));
            let (old, new) = (stored.entry.version(), entry.version());
            if (old.epoch, old.version) == (new.epoch, new.version) {
                self.events.push_back(CatalogueEvent::Equivocation(key));
            }
        }
        self.digest.add(bucket_of(&key), item_hash(&entry));
        if content == Content::Unreadable {
            let hash = entry.version().hash;
            self.events.push_back(CatalogueEvent::Quarantined { key, hash });
        }
        if let Content::Enrolment(enrolment) = &content {
            self.index(key.owner, &enrolment.clone());
        }
        let stored = Stored { entry: entry.clone(), content: content.clone() };
        let previous = self.entries.insert(key, stored).map(|stored| stored.content);
        if let Some(Content::Enrolment(before)) = &previous {
            self.forget_name(before);
        }
        if key.kind == EntryKind::ISSUER {
            self.dismissals = Dismissals::of(self.issuers().map(|(_, issuer)| issuer.as_ref()));
        }
        self.events.push_back(CatalogueEvent::Accepted { entry, content, previous });
        Verdict::Accepted
    }

    fn index(&mut self, issuer: MemberId, enrolment: &Enrolment) {
        let member = enrolment.key.member_id();
        self.issuers_of.entry(member).or_default().insert(issuer);
        for former in &enrolment.replaces {
            self.successors.entry(*former).or_default().insert(member);
        }
        let successors = self.successors.get(&member);
        let follows = |other: &MemberId| {
            enrolment.replaces.contains(other)
                || successors.is_some_and(|successors| successors.contains(other))
        };
        let holders = self.names.entry(enrolment.name.clone()).or_default();
        if let Some(other) =
            holders.iter().copied().find(|other| *other != member && !follows(other))
            && !holders.contains(&member)
        {
            let name = enrolment.name.clone();
            let members = [other, member];
            self.events.push_back(CatalogueEvent::NameConflict { name, members });
        }
        holders.insert(member);
    }

    /// Frees the name of an enrolment that was replaced, unless its member still holds it.
    fn forget_name(&mut self, before: &Enrolment) {
        let member = before.key.member_id();
        let issuers = self.issuers_of.get(&member).into_iter().flatten();
        let mut enrolments = issuers.filter_map(|issuer| {
            let subject = *member.as_bytes();
            self.entries.get(&EntryKey { kind: EntryKind::ENROLMENT, owner: *issuer, subject })
        });
        let holds = |stored: &Stored| matches!(&stored.content, Content::Enrolment(now) if now.name == before.name);
        if !enrolments.any(holds)
            && let Some(holders) = self.names.get_mut(&before.name)
        {
            holders.remove(&member);
            if holders.is_empty() {
                self.names.remove(&before.name);
            }
        }
    }

    fn postpone(&mut self, entry: Entry) -> Verdict {
        self.pending.insert(entry.key(), entry);
        if self.pending.len() > PENDING_MAX
            && let Some((key, _)) = self.pending.pop_last()
        {
            self.events.push_back(CatalogueEvent::PendingDropped(key));
        }
        Verdict::Pending
    }

    /// Waiting entries for which the entry of `key` may be the missing ground.
    fn take_unblocked(&mut self, key: &EntryKey) -> Vec<Entry> {
        let owner = match key.kind {
            EntryKind::ISSUER | EntryKind::ENROLMENT => MemberId::from_bytes(key.subject),
            _ => return Vec::new(),
        };
        let is_unblocked = |waiting: &EntryKey| waiting.owner == owner;
        let keys: Vec<_> = self.pending.keys().copied().filter(is_unblocked).collect();
        keys.iter().filter_map(|key| self.pending.remove(key)).collect()
    }

    /// Applies records that were only kept, if the entry of `key` entitles them.
    fn reconsider(&mut self, key: &EntryKey) {
        let subject = MemberId::from_bytes(key.subject);
        let members: Vec<_> = match key.kind {
            EntryKind::ENROLMENT => vec![subject],
            EntryKind::ISSUER => {
                let is_by = |(_, issuers): &(_, &BTreeSet<_>)| issuers.contains(&subject);
                self.issuers_of.iter().filter(is_by).map(|(member, _)| *member).collect()
            }
            _ => return,
        };
        for key in members.into_iter().map(record_key) {
            let is_kept = |stored: &&Stored| stored.content == Content::Relayed;
            if let Some(entry) =
                self.entries.get(&key).filter(is_kept).map(|kept| kept.entry.clone())
                && let Ok(content @ Content::Record(_)) = self.admit(&entry)
            {
                let stored = Stored { entry: entry.clone(), content: content.clone() };
                self.entries.insert(key, stored);
                self.events.push_back(CatalogueEvent::Accepted { entry, content, previous: None });
            }
        }
    }

    /// What counts of what issuers said of a member.
    fn enrolments(&self, member: MemberId) -> impl Iterator<Item = (MemberId, &Arc<Enrolment>)> {
        let issuers = self.issuers_of.get(&member).into_iter().flatten();
        let all =
            issuers.filter(|issuer| self.issuer(**issuer).is_some()).filter_map(move |issuer| {
                let subject = *member.as_bytes();
                let key = EntryKey { kind: EntryKind::ENROLMENT, owner: *issuer, subject };
                match &self.entries.get(&key)?.content {
                    Content::Enrolment(enrolment) => Some((*issuer, enrolment)),
                    _ => None,
                }
            });
        all.filter(move |(issuer, enrolment)| {
            let let_in_by = enrolment.let_in_by.unwrap_or(*issuer);
            self.dismissals.stays(&let_in_by, &member) && !self.dismissals.is_dropped(&member)
        })
    }

    /// The issuer whose key hashes to `id`, if it is one and active.
    fn issuer(&self, id: MemberId) -> Option<&Issuer> {
        match &self.entries.get(&self.issuer_key(id))?.content {
            Content::Issuer(issuer) if issuer.is_active => Some(issuer),
            _ => None,
        }
    }

    /// Whether the root has ever made this key's holder an issuer.
    fn was_issuer(&self, id: MemberId) -> bool {
        let stored = self.entries.get(&self.issuer_key(id));
        stored.is_some_and(|stored| matches!(stored.content, Content::Issuer(_)))
    }

    fn issuer_key(&self, id: MemberId) -> EntryKey {
        let subject = *id.as_bytes();
        EntryKey { kind: EntryKind::ISSUER, owner: self.root.member_id(), subject }
    }
}

/// What two members need of each other.
#[derive(Debug, Default)]
pub struct Difference<'a> {
    /// Newer here: send them. Issuers come first, then enrolments, so that nothing has to wait.
    pub newer: Vec<&'a Entry>,
    /// Newer there: ask for them.
    pub older: Vec<EntryKey>,
}

/// The place of a member's own record.
pub const fn record_key(member: MemberId) -> EntryKey {
    EntryKey { kind: EntryKind::RECORD, owner: member, subject: [0; 16] }
}

fn of_kind(kind: EntryKind) -> std::ops::RangeInclusive<EntryKey> {
    let at = |byte| EntryKey { kind, owner: MemberId::from_bytes([byte; 16]), subject: [byte; 16] };
    at(0)..=at(u8::MAX)
}

fn bucket_of(key: &EntryKey) -> u8 {
    let [owner, ..] = *key.owner.as_bytes();
    let [subject, ..] = key.subject;
    Digest::bucket_of(owner ^ subject)
}

fn item_hash(entry: &Entry) -> ItemHash {
    let (key, version) = (entry.key(), entry.version());
    let Epoch(epoch) = version.epoch;
    ItemHash::of(
        &[
            &key.kind.0.to_be_bytes()[..],
            key.owner.as_bytes(),
            &key.subject,
            &epoch.to_be_bytes(),
            &version.version.to_be_bytes(),
            &version.hash.0,
        ]
        .concat(),
    )
}

/// Grounds before what stands on them.
const fn order_of(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::ISSUER => 0,
        EntryKind::ENROLMENT => 1,
        _ => 2,
    }
}

fn decode<T: wire::Payload>(entry: &Entry) -> Option<Arc<T>> {
    wire::decode_payload(&entry.payload()).ok().map(Arc::new)
}

#[cfg(test)]
mod tests;
