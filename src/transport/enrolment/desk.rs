//! The issuer's desk: makes invites and redeems them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use super::super::gossip::GossipHandle;
use super::renewal::{
    self, RenewalAnswer, RenewalRefusal, RenewalReply, RenewalRequest, RenewedLeaf, is_fresh,
};
use super::{JoinAnswer, JoinRefusal, JoinRequest};
use crate::catalogue::let_in_by;
use crate::mesh::Snapshot;
use crate::model::{
    Enrolment, Entry, EntryKind, Invite, Issuer, MemberId, MemberName, MemberState, PublicKey,
    ServiceName, Signer,
};
use crate::runtime::{clock, entropy};
use crate::telemetry::{Door, EventKind, EventLog, Metrics};
use crate::tls::store::{DataDir, StoreError};
use crate::tls::{Authority, Dismissed, NodeCredentials, Peer, SecretKey, TlsError, Token};
use crate::wire::{self, WireError};

/// How far a newcomer's clock may be from the issuer's.
const SKEW_MAX_SECS: u64 = 3_600;
/// Addresses of live members that a newcomer is given.
const CONTACTS_MAX: usize = 32;
/// How long it is remembered who redeemed an invite that has ended.
const ENDED_KEPT_SECS: u64 = 600;
const STATE: &str = "issuer.state";
/// Longest encoded state, in bytes: half of what the codec would read back.
const STATE_LEN_MAX: usize = wire::VALUE_LEN_MAX / 2;
/// Most that one more key costs in the encoded state, its length prefix included.
const REDEEMED_LEN_MAX: usize = 40;

/// What an issuer must not forget: serials given, invites redeemed and by whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct IssuerState {
    serial: u64,
    invite_version: u64,
    redeemed: BTreeMap<MemberId, Vec<PublicKey>>,
    /// The signed entries of this issuer's invites, on disk before anybody hears of them: neither a
    /// token nor its revocation is lost in a crash.
    invites: BTreeMap<MemberId, Vec<u8>>,
}

impl IssuerState {
    fn load(dir: &DataDir) -> Result<Self, DeskError> {
        match dir.read(STATE)? {
            Some(bytes) => wire::decode(&bytes)
                .map_err(|error: WireError| StoreError::damaged(dir.file(STATE), error).into()),
            // init used serial 1 for the founder
            None => Ok(Self { serial: 1, ..Self::default() }),
        }
    }

    /// Whether all that is kept can still be written once every use of every invite is redeemed.
    fn fits(&self) -> Result<bool, WireError> {
        let redeemable = self.invites.iter().filter_map(|(id, bytes)| {
            let uses = invite_of(bytes)?.uses as usize;
            Some(uses.saturating_sub(self.redeemed.get(id).map_or(0, Vec::len)))
        });
        let still_to_come = redeemable.fold(0, usize::saturating_add);
        let most = still_to_come.saturating_mul(REDEEMED_LEN_MAX);
        Ok(wire::encode(self)?.len().saturating_add(most) <= STATE_LEN_MAX)
    }

    /// Forgets invites that ended more than [`ENDED_KEPT_SECS`] ago.
    fn forget_ended(&mut self, now: u64) {
        let Self { invites, redeemed, .. } = self;
        invites.retain(|id, bytes| {
            let is_kept = invite_of(bytes)
                .is_some_and(|invite| invite.expires_at.saturating_add(ENDED_KEPT_SECS) > now);
            if !is_kept {
                redeemed.remove(id);
            }
            is_kept
        });
    }
}

/// The invite of a signed entry.
fn invite_of(entry: &[u8]) -> Option<Invite> {
    let entry = Entry::decode(entry.to_vec().into()).ok()?;
    wire::decode_payload(&entry.payload()).ok()
}

/// The invites that this issuer made, for the start of its agent.
pub fn stored_invites(dir: &DataDir) -> Result<Vec<Entry>, DeskError> {
    let invites = IssuerState::load(dir)?.invites.into_values();
    Ok(invites.filter_map(|bytes| Entry::decode(bytes.into()).ok()).collect())
}

/// What `invite` asks for.
#[derive(Clone, Debug)]
pub struct InviteOptions {
    /// How long it holds.
    pub ttl: Duration,
    /// How many may join with it, at least 1.
    pub uses: u32,
    /// The only name it admits.
    pub name: Option<MemberName>,
    /// What whoever joins may offer.
    pub services: Option<Vec<ServiceName>>,
}

/// An invite as listed.
#[derive(Clone, Debug)]
pub struct InviteView {
    /// The hash of its key.
    pub id: MemberId,
    /// The invite itself.
    pub invite: Invite,
    /// How often it was redeemed here.
    pub redeemed: usize,
}

/// An issuer at its desk: makes invites, redeems them and renews leaves. Every member has one; it
/// signs something once the root made the member an issuer.
#[derive(Debug)]
pub struct IssuerDesk {
    /// Absent on a member that is no issuer.
    authority: Option<Authority>,
    credentials: NodeCredentials,
    dir: DataDir,
    state: IssuerState,
    gossip: GossipHandle,
    metrics: Metrics,
    events: EventLog,
}

/// The desk could not do what its own operator asked.
#[derive(Debug, thiserror::Error)]
pub enum DeskError {
    /// What it remembers cannot be read or written. Fault: this machine.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A certificate or an entry cannot be made. Fault: the files of this machine.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// An entry cannot be encoded or decoded.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Fault: this machine.
    #[error(transparent)]
    Entropy(#[from] entropy::EntropyError),
    /// Nothing will happen any more. Asking again is safe once it runs.
    #[error("the agent is stopping")]
    Stopping,
    /// It has no issuing key, or the root has not appointed it, or took it back. Ask an issuer.
    #[error("this member is no issuer")]
    NotIssuer,
    /// Fault: whoever asks. Ask another issuer.
    #[error(
        "this member is the issuer that is to go, and its word for the members that it let in goes \
         with it: another issuer must vouch for them"
    )]
    OwnWord,
    /// Fault: whoever asks; nobody was kept or dropped.
    #[error("'{0}' was let in by another issuer, and cannot be dropped with this one")]
    OthersVouch(MemberName),
    /// Fault: whoever asks; nobody was kept or dropped.
    #[error("{} members are called '{name}': say which by its id, {}", ids.len(), listed(ids))]
    SeveralMembers {
        /// What was asked for.
        name: MemberName,
        /// All that are called so.
        ids: Vec<MemberId>,
    },
    /// Fault: the member that asks: it must join anew.
    #[error("no active issuer vouches for this member any more")]
    Revoked,
    /// The catalogue did not take it, with its reason.
    #[error("the mesh refused the entry: {0}")]
    Refused(String),
    /// Fault: whoever asks.
    #[error("no member '{0}' is enrolled")]
    NoMember(MemberName),
    /// Fault: whoever asks. An invite is revoked where it was made.
    #[error("no invite with id {0} was made here")]
    NoInvite(MemberId),
    /// No invite was made. Asking again helps once others have ended.
    #[error(
        "the open invites and their uses are all that this issuer can keep track of \
         ({STATE_LEN_MAX} bytes); ask for fewer uses, or wait until some invites have ended"
    )]
    TooManyInvites,
}

fn listed(ids: &[MemberId]) -> String {
    ids.iter().map(MemberId::to_string).collect::<Vec<_>>().join(" or ")
}

impl IssuerDesk {
    /// Opens the desk with what it remembers.
    pub fn open(
        authority: Option<Authority>,
        credentials: NodeCredentials,
        dir: DataDir,
        gossip: GossipHandle,
        metrics: Metrics,
        events: EventLog,
    ) -> Result<Self, DeskError> {
        let state = IssuerState::load(&dir)?;
        if let Some(authority) = &authority {
            authority.continue_above(&dir.entries()?);
        }
        Ok(Self { authority, credentials, dir, state, gossip, metrics, events })
    }

    /// Begins to issue as the root's word says, if this member holds that issuing key; returns
    /// whether that is news. The certificate goes to disk, so that the next start knows.
    pub fn appoint(&mut self, issuer: &Issuer) -> Result<bool, DeskError> {
        if self.authority().is_ok_and(|authority| authority.key().public_key() == issuer.key) {
            return Ok(false);
        }
        let key = self.dir.issuing_key()?;
        if key.public_key() != issuer.key {
            return Err(DeskError::NotIssuer);
        }
        let (mesh, genesis) = (*self.credentials.mesh(), self.credentials.genesis());
        let authority = Authority::new(mesh, genesis, key, &issuer.certificate)?;
        authority.continue_above(&self.dir.entries()?);
        self.dir.store_issuer_certificate(&issuer.certificate)?;
        self.authority = Some(authority);
        Ok(true)
    }

    /// Makes an invite, gossips it, and returns the token that redeems it.
    pub async fn invite(
        &mut self,
        options: InviteOptions,
        issuers: Vec<SocketAddr>,
    ) -> Result<Token, DeskError> {
        self.check_active().await?;
        let now = clock::unix_seconds();
        let key = SecretKey::generate()?;
        let invite = Invite {
            key: key.public_key(),
            expires_at: now.saturating_add(options.ttl.as_secs()),
            uses: options.uses.max(1),
            name: options.name,
            services: options.services,
        };
        self.publish_invite(&invite).await?;
        let id = invite.key.member_id();
        self.events.record(EventKind::InviteCreated, id, "asked for by the local API");
        let root = self.credentials.genesis().root;
        Ok(Token::new(*self.credentials.mesh(), root, issuers, &key))
    }

    /// Takes an invite back; members that joined with it stay.
    pub async fn revoke_invite(&mut self, id: MemberId) -> Result<(), DeskError> {
        let view = self.invites().await?.into_iter().find(|view| view.id == id);
        let mut invite = view.ok_or(DeskError::NoInvite(id))?.invite;
        invite.uses = 0;
        self.publish_invite(&invite).await?;
        self.events.record(EventKind::InviteRevoked, id, "asked for by the local API");
        Ok(())
    }

    /// The invites that this issuer made.
    pub async fn invites(&self) -> Result<Vec<InviteView>, DeskError> {
        let mine = self.authority()?.key().public_key().member_id();
        let entries = self.gossip.entries(EntryKind::INVITE).await.ok_or(DeskError::Stopping)?;
        let own = entries.iter().filter(|entry| entry.key().owner == mine);
        let decoded = own.filter_map(|entry| wire::decode_payload(&entry.payload()).ok());
        Ok(decoded.map(|invite| self.view(invite)).collect())
    }

    fn view(&self, invite: Invite) -> InviteView {
        let id = invite.key.member_id();
        let redeemed = self.state.redeemed.get(&id).map_or(0, Vec::len);
        InviteView { id, invite, redeemed }
    }

    async fn publish_invite(&mut self, invite: &Invite) -> Result<(), DeskError> {
        let id = invite.key.member_id();
        let payload = wire::encode_payload(invite)?;
        self.state.invite_version += 1;
        let version = self.state.invite_version;
        let entry =
            self.authority()?.sign_entry(EntryKind::INVITE, *id.as_bytes(), version, &payload)?;
        self.state.forget_ended(clock::unix_seconds());
        let before = self.state.invites.insert(id, entry.bytes().to_vec());
        if before.is_none() && !self.state.fits()? {
            self.state.invites.remove(&id);
            return Err(DeskError::TooManyInvites);
        }
        self.save()?;
        self.publish(entry).await
    }

    fn authority(&self) -> Result<&Authority, DeskError> {
        self.authority.as_ref().ok_or(DeskError::NotIssuer)
    }

    /// The keys that the root lets issue now.
    async fn active_issuers(&self) -> Result<BTreeMap<PublicKey, Entry>, DeskError> {
        let entries = self.gossip.entries(EntryKind::ISSUER).await.ok_or(DeskError::Stopping)?;
        let active = entries.into_iter().filter_map(|entry| {
            let issuer: Issuer = wire::decode_payload(&entry.payload()).ok()?;
            issuer.is_active.then_some((issuer.key, entry))
        });
        Ok(active.collect())
    }

    /// The root's word about the issuing key with this hash, while that key may issue.
    async fn active_issuer(&self, id: MemberId) -> Result<Option<(Entry, Issuer)>, DeskError> {
        let entries = self.gossip.entries_about(EntryKind::ISSUER, id).await;
        let mut active = entries.ok_or(DeskError::Stopping)?.into_iter().filter_map(|entry| {
            let issuer: Issuer = wire::decode_payload(&entry.payload()).ok()?;
            issuer.is_active.then_some((entry, issuer))
        });
        Ok(active.next())
    }

    /// This issuer's entry; an error when the root has not made it one, or took it back.
    async fn check_active(&self) -> Result<Entry, DeskError> {
        let mine = self.authority()?.key().public_key().member_id();
        let (entry, _) = self.active_issuer(mine).await?.ok_or(DeskError::NotIssuer)?;
        Ok(entry)
    }

    async fn publish(&self, entry: Entry) -> Result<(), DeskError> {
        let published = self.gossip.publish(entry).await.ok_or(DeskError::Stopping)?;
        published.map_err(DeskError::Refused)
    }

    fn save(&self) -> Result<(), DeskError> {
        self.dir.write_secret(STATE, &wire::encode(&self.state)?)?;
        Ok(())
    }

    /// Answers one request, given as the bytes that came in, of a newcomer that came from there.
    pub async fn answer(
        &mut self,
        request: &[u8],
        from: SocketAddr,
        snapshot: &Snapshot,
    ) -> JoinAnswer {
        let request = JoinRequest::decode(request);
        let answered = match &request {
            Ok(request) => match self.check_active().await {
                Ok(_) => self.redeem(request, snapshot).await,
                Err(_) => Err(JoinRefusal::NotIssuer),
            },
            Err(_) => Err(JoinRefusal::Malformed),
        };
        answered.unwrap_or_else(|refusal| {
            self.metrics.count_refused(Door::enrol, refusal.as_str());
            let mut fields = BTreeMap::from([("reason".to_owned(), refusal.as_str().to_owned())]);
            if let Ok(request) = &request {
                fields.insert("invite".to_owned(), request.invite.member_id().to_string());
                fields.insert("name".to_owned(), request.name.to_string());
            }
            // The address without its port: who tries again comes from another one.
            let subject = from.ip();
            self.events.record_with(EventKind::JoinRefused, subject, &refusal, fields);
            JoinAnswer::Refused(refusal)
        })
    }

    async fn redeem(
        &mut self,
        request: &JoinRequest,
        snapshot: &Snapshot,
    ) -> Result<JoinAnswer, JoinRefusal> {
        let me = self.credentials.member_id();
        if !request.is_signed(self.credentials.mesh(), &me) {
            return Err(JoinRefusal::Signature);
        }
        let now = clock::unix_seconds();
        if request.at.abs_diff(now) > SKEW_MAX_SECS {
            return Err(JoinRefusal::Clock(request.at.abs_diff(now)));
        }
        let invite = self.find_invite(&request.invite, snapshot).await?;
        if invite.uses == 0 {
            return Err(JoinRefusal::Revoked);
        }
        if now >= invite.expires_at {
            return Err(JoinRefusal::Expired(now - invite.expires_at));
        }
        if let Some(name) = invite.name.filter(|name| *name != request.name) {
            return Err(JoinRefusal::OtherName(name));
        }
        let id = request.invite.member_id();
        let redeemed = self.state.redeemed.get(&id).map_or(&[][..], Vec::as_slice);
        // The same key again is the same newcomer whose answer was lost.
        let is_again = redeemed.contains(&request.key);
        if !is_again && redeemed.len() >= invite.uses as usize {
            return Err(JoinRefusal::UsedUp(invite.uses));
        }
        let (known, member) = (self.credentials.trust().dismissed(), request.key.member_id());
        if known.by_root().is_dropped(&member) {
            return Err(JoinRefusal::Dropped);
        }
        let mut replaces = self.check_name(request, snapshot).await?;
        let before = self.replaced_before(member).await;
        replaces.extend(before.map_err(|error| JoinRefusal::Internal(error.to_string()))?);
        if known.is_replaced(&member) {
            replaces.extend(self.successors(member).await?); // it is let in again, in their place
        }
        replaces.sort_unstable();
        replaces.dedup();
        // Whoever comes back by a token without a word on services may offer what it might before.
        let services = match invite.services {
            Some(services) => Some(services),
            None => self.granted(member, &replaces).await?,
        };
        self.state.serial += 1;
        if !is_again {
            self.state.redeemed.entry(id).or_default().push(request.key);
        }
        let enrolment = Enrolment {
            key: request.key,
            name: request.name.clone(),
            serial: self.state.serial,
            services,
            issued_at: now,
            invite: Some(id),
            replaces,
            let_in_by: None, // by this issuer
        };
        self.enrol(&enrolment, snapshot)
            .await
            .map_err(|error| JoinRefusal::Internal(error.to_string()))
    }

    /// The next leaf of a member that proved its key and showed the enrolment of its last one. The
    /// newest word of an active issuer decides on name and services. Repeated soon, the answer is
    /// the same enrolment again.
    pub async fn renew(
        &mut self,
        member: MemberId,
        shown: &Entry,
    ) -> Result<RenewedLeaf, DeskError> {
        let own = self.check_active().await?;
        let (mine, now) = (own_key(&own)?, clock::unix_seconds());
        let known = self.gossip.entries_about(EntryKind::ENROLMENT, member).await;
        let known = known.ok_or(DeskError::Stopping)?;
        let known: Vec<_> = known.iter().chain([shown]).cloned().collect();
        let about = self.standing(member, &known).await?;
        let newest = about.iter().max_by_key(|(_, said)| (said.issued_at, said.serial));
        let (entry, newest) = newest.ok_or(DeskError::Revoked)?.clone();
        let ttl_secs = self.credentials.genesis().leaf_ttl_secs;
        if entry.signer() == mine && is_fresh(newest.issued_at, now, ttl_secs) {
            let chain = self.authority()?.issue_leaf(&newest, &entry)?;
            return Ok(RenewedLeaf { chain, entries: vec![own, entry] });
        }
        self.state.serial += 1;
        self.save()?; // no serial is given twice
        let let_in_by = Some(let_in_by(entry.signer().member_id(), &newest, &all_said(&known)));
        let serial = self.state.serial;
        let enrolment = Enrolment { serial, issued_at: now, let_in_by, ..newest };
        let (entry, chain) = self.authority()?.enrol(&enrolment)?;
        self.publish(entry.clone()).await?;
        debug!(member = %enrolment.name, serial = enrolment.serial, "leaf renewed");
        Ok(RenewedLeaf { chain, entries: vec![own, entry] })
    }

    /// Vouches for the members that only the issuer with that key's hash vouches for, all but
    /// `dropped`: the root is about to take it back. Their leaves go on; the next come from others.
    ///
    /// Whoever is dropped must have been let in by that issuer, and by no other; who has renewed it since
    /// is no matter. With it go the keys that it had replaced: their machine lost them.
    pub async fn keep_members(
        &mut self,
        issuer: MemberId,
        dropped: &[MemberName],
    ) -> Result<Parting, DeskError> {
        self.check_active().await?;
        if self.authority()?.key().public_key().member_id() == issuer {
            return Err(DeskError::OwnWord);
        }
        let issuers: BTreeSet<_> =
            self.active_issuers().await?.keys().map(PublicKey::member_id).collect();
        let all = self.gossip.entries(EntryKind::ENROLMENT).await.ok_or(DeskError::Stopping)?;
        let mut said: BTreeMap<MemberId, Vec<(MemberId, Enrolment)>> = BTreeMap::new();
        for (by, enrolment) in all_said(&all) {
            said.entry(enrolment.key.member_id()).or_default().push((by, enrolment));
        }
        let known = self.credentials.trust().dismissed();
        let parting = part(&said, &issuers, issuer, dropped, &known)?;
        for (member, _) in &parting.kept {
            let Some(about) = said.get(member) else { continue };
            let mut active = about.iter().filter(|(by, _)| issuers.contains(by));
            if let (Some((by, enrolment)), None) = (active.next(), active.next())
                && *by == issuer
            {
                self.state.serial += 1;
                self.save()?;
                // A thief may have signed it for any time, and then no leaf can be made of it.
                let issued_at = enrolment.issued_at.min(clock::unix_seconds());
                let let_in_by = Some(let_in_by(*by, enrolment, about));
                let serial = self.state.serial;
                let enrolment = Enrolment { serial, issued_at, let_in_by, ..enrolment.clone() };
                let (entry, _) = self.authority()?.enrol(&enrolment)?;
                self.publish(entry).await?;
            }
        }
        Ok(parting)
    }

    /// Lets a member offer these services and no others; all when absent. Its next leaf says so, too.
    pub async fn grant(
        &mut self,
        member: MemberId,
        services: Option<Vec<ServiceName>>,
    ) -> Result<(), DeskError> {
        self.check_active().await?;
        let known = self.gossip.entries_about(EntryKind::ENROLMENT, member).await;
        let known = known.ok_or(DeskError::Stopping)?;
        let about = self.standing(member, &known).await?;
        let newest = about.iter().max_by_key(|(_, said)| (said.issued_at, said.serial));
        let (entry, newest) = newest.ok_or(DeskError::Revoked)?.clone();
        let let_in_by = Some(let_in_by(entry.signer().member_id(), &newest, &all_said(&known)));
        self.state.serial += 1;
        self.save()?;
        let (serial, issued_at) = (self.state.serial, clock::unix_seconds());
        let enrolment = Enrolment { serial, issued_at, services, let_in_by, ..newest };
        let (entry, _) = self.authority()?.enrol(&enrolment)?;
        self.publish(entry).await
    }

    /// Answers one question at the renewal door, asked by `peer`, given as the bytes that came in.
    pub async fn answer_member(&mut self, peer: &Peer, request: &[u8]) -> RenewalAnswer {
        let reply = match wire::decode(request) {
            // It was let in at the door, and may have waited there until it was believed no more.
            Ok(RenewalRequest::Leaf) if !self.credentials.trust().admits(peer) => {
                Err(DeskError::Revoked)
            }
            Ok(RenewalRequest::Leaf) => {
                self.renew(peer.id, &peer.enrolment).await.map(RenewedLeaf::into_reply)
            }
            Ok(RenewalRequest::Time) => Ok(RenewalReply::Time),
            Ok(RenewalRequest::IssuingKey) => {
                self.issuing_key().await.map(RenewalReply::IssuingKey)
            }
            Ok(RenewalRequest::Run(_)) => {
                Ok(RenewalReply::Refused(RenewalRefusal::Malformed)) // no question to the desk
            }
            Err(error) => Err(error.into()),
        };
        let reply = reply.unwrap_or_else(|error| {
            let refusal = match error {
                DeskError::NotIssuer => RenewalRefusal::NotIssuer,
                DeskError::Revoked => RenewalRefusal::Revoked,
                DeskError::Wire(_) => RenewalRefusal::Malformed,
                other => RenewalRefusal::Internal(other.to_string()),
            };
            self.metrics.count_refused(Door::enrol, refusal.as_str());
            warn!(member = %peer.name, reason = %refusal, "renewal refused");
            RenewalReply::Refused(refusal)
        });
        renewal::answer(reply)
    }

    /// The public half of this member's issuing key, made now if there is none. One that the root took
    /// back is given up for another: it may be in other hands, and is not to be believed again.
    pub async fn issuing_key(&mut self) -> Result<PublicKey, DeskError> {
        let key = self.dir.issuing_key()?.public_key();
        let about = self.gossip.entries_about(EntryKind::ISSUER, key.member_id()).await;
        let is_known = !about.ok_or(DeskError::Stopping)?.is_empty();
        if !is_known || self.active_issuer(key.member_id()).await?.is_some() {
            return Ok(key);
        }
        self.authority = None;
        Ok(self.dir.new_issuing_key()?.public_key())
    }

    async fn find_invite(
        &self,
        key: &PublicKey,
        snapshot: &Snapshot,
    ) -> Result<Invite, JoinRefusal> {
        let stopping = || JoinRefusal::Internal("it is stopping".into());
        let invites = self.gossip.entries_about(EntryKind::INVITE, key.member_id()).await;
        let entry =
            invites.ok_or_else(stopping)?.into_iter().next().ok_or(JoinRefusal::UnknownInvite)?;
        let mine = self.authority().map(|authority| authority.key().public_key());
        if mine.ok() != Some(entry.signer()) {
            // Uses are counted where the invite was made; others redeem only while that is dead.
            let maker = self.active_issuer(entry.key().owner).await.map_err(|_| stopping())?;
            let (_, maker) = maker.ok_or(JoinRefusal::Revoked)?; // with its issuer
            let maker = snapshot.members.get(&maker.member);
            if let Some(maker) = maker.filter(|maker| maker.state == MemberState::Alive) {
                let (name, address) = (maker.name.clone(), maker.address);
                return Err(JoinRefusal::OtherIssuer { name, address });
            }
        }
        wire::decode_payload(&entry.payload()).map_err(|_| JoinRefusal::UnknownInvite)
    }

    /// Whom a member has replaced by what is known of it: asking again, or joining once more, must not
    /// bring a lost key back.
    async fn replaced_before(&self, member: MemberId) -> Result<Vec<MemberId>, DeskError> {
        let about = self.gossip.entries_about(EntryKind::ENROLMENT, member).await;
        let about = about.ok_or(DeskError::Stopping)?;
        let standing = self.standing(member, &about).await?;
        Ok(standing.into_iter().flat_map(|(_, enrolment)| enrolment.replaces).collect())
    }

    /// Those that say to have replaced a member.
    async fn successors(&self, member: MemberId) -> Result<Vec<MemberId>, JoinRefusal> {
        let all = self.gossip.entries(EntryKind::ENROLMENT).await;
        let all = all.ok_or_else(|| JoinRefusal::Internal("it is stopping".into()))?;
        let claims = all_said(&all).into_iter().filter(|(_, said)| said.replaces.contains(&member));
        Ok(claims.map(|(_, said)| said.key.member_id()).collect())
    }

    /// What counts of `known` about a member: the words of active issuers, unless the root took back who
    /// let it in and did not keep it.
    async fn standing(
        &self,
        member: MemberId,
        known: &[Entry],
    ) -> Result<Vec<(Entry, Enrolment)>, DeskError> {
        let issuers = self.active_issuers().await?;
        let dismissed = self.credentials.trust().dismissed();
        let by_root = dismissed.by_root();
        let stands = |(entry, said): &(Entry, Enrolment)| {
            let signer = entry.signer().member_id();
            issuers.contains_key(&entry.signer())
                && said.key.member_id() == member
                && by_root.stays(&said.let_in_by.unwrap_or(signer), &member)
                && !by_root.is_dropped(&member)
        };
        let decoded = known.iter().filter_map(|entry| Some((entry.clone(), enrolment_of(entry)?)));
        Ok(decoded.filter(stands).collect())
    }

    /// What the newest enrolment of a member, or of those that it replaces, lets it offer; everything
    /// when there is none.
    async fn granted(
        &self,
        member: MemberId,
        replaces: &[MemberId],
    ) -> Result<Option<Vec<ServiceName>>, JoinRefusal> {
        let stopping = || JoinRefusal::Internal("it is stopping".into());
        let issuers = self.active_issuers().await.map_err(|_| stopping())?;
        let all = self.gossip.entries(EntryKind::ENROLMENT).await.ok_or_else(stopping)?;
        let held = all
            .iter()
            .filter(|entry| issuers.contains_key(&entry.signer()))
            .filter_map(|entry| wire::decode_payload::<Enrolment>(&entry.payload()).ok())
            .filter(|enrolment| {
                let held = enrolment.key.member_id();
                held == member || replaces.contains(&held)
            });
        let newest = held.max_by_key(|enrolment| (enrolment.issued_at, enrolment.serial));
        Ok(newest.and_then(|enrolment| enrolment.services))
    }

    /// Whose name the newcomer takes over: nobody's, unless it says so and they are gone.
    async fn check_name(
        &self,
        request: &JoinRequest,
        snapshot: &Snapshot,
    ) -> Result<Vec<MemberId>, JoinRefusal> {
        let holders = self.gossip.holders(request.name.clone()).await;
        let mut holders = holders.ok_or_else(|| JoinRefusal::Internal("it is stopping".into()))?;
        holders.retain(|holder| *holder != request.key.member_id());
        let is_there = |holder: &MemberId| {
            let state = snapshot.members.get(holder).map(|view| view.state);
            matches!(state, Some(MemberState::Alive | MemberState::Suspect))
        };
        match request.is_replacement {
            false if !holders.is_empty() => Err(JoinRefusal::NameTaken(request.name.clone())),
            true if holders.iter().any(is_there) => {
                Err(JoinRefusal::StillThere(request.name.clone()))
            }
            _ => Ok(holders),
        }
    }

    async fn enrol(
        &mut self,
        enrolment: &Enrolment,
        snapshot: &Snapshot,
    ) -> Result<JoinAnswer, DeskError> {
        self.save()?; // counted before it is given
        let (entry, chain) = self.authority()?.enrol(enrolment)?;
        self.publish(entry.clone()).await?;
        let mut entries = vec![entry];
        for kind in [EntryKind::ISSUER, EntryKind::OPERATOR] {
            entries.extend(self.gossip.entries(kind).await.ok_or(DeskError::Stopping)?);
        }
        let id = enrolment.key.member_id();
        let replaced: Vec<_> = enrolment.replaces.iter().map(MemberId::to_string).collect();
        let reason = match replaced.is_empty() {
            true => format!("key {id}"),
            false => format!("key {id}; it replaces {}", replaced.join(", ")),
        };
        self.events.record(EventKind::MemberEnrolled, &enrolment.name, reason);
        let alive = snapshot.members.values().filter(|view| view.state == MemberState::Alive);
        Ok(JoinAnswer::Welcome {
            genesis: self.dir.genesis_bytes()?,
            chain: chain.iter().map(|certificate| certificate.to_vec()).collect(),
            entries: entries.iter().map(|entry| entry.bytes().to_vec()).collect(),
            contacts: alive.take(CONTACTS_MAX).map(|view| (view.id, view.address)).collect(),
        })
    }
}

/// What becomes of the members that an issuer let in, when the root takes it back.
#[derive(Clone, Debug, Default)]
pub struct Parting {
    /// They stay, and others vouch for them.
    pub kept: Vec<(MemberId, MemberName)>,
    /// They go with it.
    pub dropped: Vec<(MemberId, MemberName)>,
    /// Keys that those had replaced: they go, too, else they would be believed again.
    pub replaced: Vec<MemberId>,
}

/// Who stays and who goes when the root takes `issuer` back, one of those in `issuers` that are active.
fn part(
    said: &BTreeMap<MemberId, Vec<(MemberId, Enrolment)>>,
    issuers: &BTreeSet<MemberId>,
    issuer: MemberId,
    dropped: &[MemberName],
    known: &Dismissed,
) -> Result<Parting, DeskError> {
    // A key that another one has replaced is nobody's, whoever let it in.
    let is_held =
        |member: &MemberId| !known.is_replaced(member) && !known.by_root().is_dropped(member);
    let newest = |about: &[(MemberId, Enrolment)]| {
        let active = about.iter().filter(|(by, _)| issuers.contains(by));
        active.max_by_key(|(_, said)| (said.issued_at, said.serial)).cloned()
    };
    let held = said.iter().filter(|(member, _)| is_held(member));
    let held: BTreeMap<_, _> = held
        .filter_map(|(member, about)| Some((*member, (newest(about)?.1.name, about))))
        .collect();
    let mut out = BTreeSet::new();
    for node in dropped {
        let named =
            held.iter().filter(|(id, (name, _))| id.is_called(name, node)).map(|(id, _)| *id);
        match named.collect::<Vec<_>>()[..] {
            [id] => out.insert(id),
            [] => return Err(DeskError::NoMember(node.clone())),
            ref several => {
                let (name, ids) = (node.clone(), several.to_vec());
                return Err(DeskError::SeveralMembers { name, ids });
            }
        };
    }
    let mut parting = Parting::default();
    for (member, (name, about)) in &held {
        let is_by_it = |(by, said): &&(MemberId, Enrolment)| {
            *by == issuer || let_in_by(*by, said, about) == issuer
        };
        let active: Vec<_> = about.iter().filter(|(by, _)| issuers.contains(by)).collect();
        let (by_it, by_others): (Vec<_>, Vec<_>) = active.into_iter().partition(is_by_it);
        match out.contains(member) {
            true if by_it.is_empty() || !by_others.is_empty() => {
                return Err(DeskError::OthersVouch(name.clone()));
            }
            true => parting.dropped.push((*member, name.clone())),
            false if !by_it.is_empty() => parting.kept.push((*member, name.clone())),
            false => {}
        }
    }
    let mut gone: Vec<_> = parting.dropped.iter().map(|(id, _)| *id).collect();
    while let Some(member) = gone.pop() {
        let about = said.get(&member).into_iter().flatten();
        for former in about.flat_map(|(_, enrolment)| &enrolment.replaces) {
            if known.is_replaced(former) && !parting.replaced.contains(former) {
                parting.replaced.push(*former);
                gone.push(*former);
            }
        }
    }
    Ok(parting)
}

/// What an entry says of the member that it is filed under.
fn enrolment_of(entry: &Entry) -> Option<Enrolment> {
    let enrolment: Enrolment = wire::decode_payload(&entry.payload()).ok()?;
    let is_sound = *enrolment.key.member_id().as_bytes() == entry.key().subject;
    is_sound.then_some(enrolment)
}

/// What all these entries say, with the hashes of the keys that signed them.
fn all_said(entries: &[Entry]) -> Vec<(MemberId, Enrolment)> {
    let said = |entry: &Entry| Some((entry.signer().member_id(), enrolment_of(entry)?));
    entries.iter().filter_map(said).collect()
}

/// The issuing key that an issuer's entry is about.
fn own_key(entry: &Entry) -> Result<PublicKey, DeskError> {
    Ok(wire::decode_payload::<Issuer>(&entry.payload())?.key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_state_is_read_back() {
        let keys = vec![PublicKey([255; 32]); STATE_LEN_MAX / REDEEMED_LEN_MAX];
        let redeemed = BTreeMap::from([(PublicKey([1; 32]).member_id(), keys)]);
        let state = IssuerState { redeemed, ..IssuerState::default() };
        let bytes = wire::encode(&state).unwrap();
        assert!(bytes.len() <= STATE_LEN_MAX, "{} bytes", bytes.len());
        assert_eq!(wire::decode::<IssuerState>(&bytes).unwrap(), state);
    }
}
