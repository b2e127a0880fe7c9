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
use crate::mesh::Snapshot;
use crate::model::{
    Enrolment, Entry, EntryKind, Invite, Issuer, MemberId, MemberName, MemberState, PublicKey,
    ServiceName, Signer,
};
use crate::runtime::{clock, entropy};
use crate::telemetry::{Door, EventKind, EventLog, Metrics};
use crate::tls::store::{DataDir, StoreError};
use crate::tls::{Authority, NodeCredentials, Peer, SecretKey, TlsError, Token};
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
    #[error(
        "'{0}' has its certificate from another issuer, too, and cannot be dropped with this one"
    )]
    OthersVouch(MemberName),
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
        let mut replaces = self.check_name(request, snapshot).await?;
        let before = self.replaced_before(request.key.member_id()).await;
        replaces.extend(before.map_err(|error| JoinRefusal::Internal(error.to_string()))?);
        replaces.sort_unstable();
        replaces.dedup();
        // Whoever comes back by a token without a word on services may offer what it might before.
        let services = match invite.services {
            Some(services) => Some(services),
            None => self.granted(request.key.member_id(), &replaces).await?,
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
        let issuers = self.active_issuers().await?;
        let known = self.gossip.entries_about(EntryKind::ENROLMENT, member).await;
        let known = known.ok_or(DeskError::Stopping)?;
        let newest = known
            .iter()
            .chain([shown])
            .filter(|entry| entry.key().subject == *member.as_bytes())
            .filter(|entry| issuers.contains_key(&entry.signer()))
            .filter_map(|entry| Some((wire::decode_payload(&entry.payload()).ok()?, entry)))
            .filter(|(enrolment, _): &(Enrolment, _)| enrolment.key.member_id() == member)
            .max_by_key(|(enrolment, _)| (enrolment.issued_at, enrolment.serial));
        let (newest, entry) = newest.ok_or(DeskError::Revoked)?;
        let ttl_secs = self.credentials.genesis().leaf_ttl_secs;
        if entry.signer() == mine && is_fresh(newest.issued_at, now, ttl_secs) {
            let chain = self.authority()?.issue_leaf(&newest, entry)?;
            return Ok(RenewedLeaf { chain, entries: vec![own, entry.clone()] });
        }
        self.state.serial += 1;
        self.save()?; // no serial is given twice
        let enrolment = Enrolment { serial: self.state.serial, issued_at: now, ..newest };
        let (entry, chain) = self.authority()?.enrol(&enrolment)?;
        self.publish(entry.clone()).await?;
        debug!(member = %enrolment.name, serial = enrolment.serial, "leaf renewed");
        Ok(RenewedLeaf { chain, entries: vec![own, entry] })
    }

    /// Vouches for the members that only the issuer with that key's hash vouches for, all but those
    /// called as in `dropped`: the root is about to take it back. Their leaves go on; the next come
    /// from others. Returns all that it let in and that stay.
    pub async fn keep_members(
        &mut self,
        issuer: MemberId,
        dropped: &[MemberName],
    ) -> Result<Vec<(MemberId, MemberName)>, DeskError> {
        self.check_active().await?;
        if self.authority()?.key().public_key().member_id() == issuer {
            return Err(DeskError::OwnWord);
        }
        let issuers = self.active_issuers().await?;
        let all = self.gossip.entries(EntryKind::ENROLMENT).await.ok_or(DeskError::Stopping)?;
        let (theirs, others): (Vec<_>, Vec<_>) =
            all.iter().partition(|entry| entry.key().owner == issuer);
        let is_active = |entry: &&&Entry| issuers.contains_key(&entry.signer());
        let vouched: BTreeSet<_> =
            others.iter().filter(is_active).map(|entry| entry.key().subject).collect();
        let enrolment = |entry: &Entry| {
            let enrolment: Enrolment = wire::decode_payload(&entry.payload()).ok()?;
            let is_sound = *enrolment.key.member_id().as_bytes() == entry.key().subject;
            is_sound.then_some(enrolment)
        };
        // A key that another one has replaced is nobody's, whoever let it in.
        let known = self.credentials.trust().dismissed();
        let is_held = |enrolment: &Enrolment| !known.is_replaced(&enrolment.key.member_id());
        let now = clock::unix_seconds();
        let (out, kept): (Vec<_>, Vec<_>) = theirs
            .into_iter()
            .filter_map(enrolment)
            .filter(is_held)
            .partition(|enrolment| dropped.contains(&enrolment.name));
        for name in dropped {
            let named = out.iter().find(|enrolment| enrolment.name == *name);
            let named = named.ok_or_else(|| DeskError::NoMember(name.clone()))?;
            if vouched.contains(named.key.member_id().as_bytes()) {
                return Err(DeskError::OthersVouch(name.clone()));
            }
        }
        let mut stay = Vec::new();
        for enrolment in kept {
            let member = enrolment.key.member_id();
            stay.push((member, enrolment.name.clone()));
            if !vouched.contains(member.as_bytes()) {
                self.state.serial += 1;
                self.save()?;
                // A thief may have signed it for any time, and then no leaf can be made of it.
                let issued_at = enrolment.issued_at.min(now);
                let enrolment = Enrolment { serial: self.state.serial, issued_at, ..enrolment };
                let (entry, _) = self.authority()?.enrol(&enrolment)?;
                self.publish(entry).await?;
            }
        }
        Ok(stay)
    }

    /// Lets a member offer these services and no others; all when absent. Its next leaf says so, too.
    pub async fn grant(
        &mut self,
        member: MemberId,
        services: Option<Vec<ServiceName>>,
    ) -> Result<(), DeskError> {
        self.check_active().await?;
        let issuers = self.active_issuers().await?;
        let about = self.gossip.entries_about(EntryKind::ENROLMENT, member).await;
        let about = about.ok_or(DeskError::Stopping)?;
        let held = about
            .iter()
            .filter(|entry| issuers.contains_key(&entry.signer()))
            .filter_map(|entry| wire::decode_payload::<Enrolment>(&entry.payload()).ok());
        let newest = held.max_by_key(|enrolment| (enrolment.issued_at, enrolment.serial));
        let newest = newest.ok_or(DeskError::Revoked)?;
        self.state.serial += 1;
        self.save()?;
        let (serial, issued_at) = (self.state.serial, clock::unix_seconds());
        let enrolment = Enrolment { serial, issued_at, services, ..newest };
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
            Ok(RenewalRequest::IssuingKey) => self.issuing_key().map(RenewalReply::IssuingKey),
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

    /// The public half of this member's issuing key, made now if there is none.
    pub fn issuing_key(&self) -> Result<PublicKey, DeskError> {
        Ok(self.dir.issuing_key()?.public_key())
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
        let issuers = self.active_issuers().await?;
        let about = self.gossip.entries_about(EntryKind::ENROLMENT, member).await;
        let about = about.ok_or(DeskError::Stopping)?;
        let sound = about.iter().filter(|entry| issuers.contains_key(&entry.signer()));
        let enrolments =
            sound.filter_map(|entry| wire::decode_payload::<Enrolment>(&entry.payload()).ok());
        let own = enrolments.filter(|enrolment| enrolment.key.member_id() == member);
        Ok(own.flat_map(|enrolment| enrolment.replaces).collect())
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
