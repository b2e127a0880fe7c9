//! Keeps this member's identity alive: renews its leaf, opens and closes the grace for ended ones, and
//! says so when the mesh lives on grace.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use tokio::sync::{Mutex, Notify, watch};
use tokio::time::sleep;
use tracing::warn;

use super::disowned;
use crate::api::Identity;
use crate::mesh::Snapshot;
use crate::model::{EntryVersion, MemberId, MemberState, Moment, PublicKey, ServiceName};
use crate::runtime::blocking;
use crate::runtime::clock::{self, Clock};
use crate::telemetry::{EventKind, EventLog, Metrics};
use crate::tls::grace::IssuerWatch;
use crate::tls::rotation::Rotation;
use crate::tls::store::{DataDir, StoreError};
use crate::tls::{Certificate, NodeCredentials, TlsError};
use crate::transport::enrolment::renewal::{AskError, Door, RenewedLeaf, ask_leaf};
use crate::transport::enrolment::{DeskError, IssuerDesk};
use crate::transport::gossip::GossipHandle;
use crate::transport::{BindError, Endpoint};

/// How often the mesh is looked at, and the longest sleep: wall clocks jump.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A mesh that lives on grace is told this often.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);
/// Looks in a row that find this member refused, and nobody who speaks with it, until it says so: one
/// that refuses it alone is no news.
const REFUSED_LOOKS: u32 = 3;
/// How long a peer counts as accepted by grace, unless it is heard to have a valid leaf again:
/// handshakes are rare.
const ACCEPTED_FOR: Duration = Duration::from_secs(60);
/// Issuers asked in one attempt; the next attempt asks others.
const ASKED_MAX: usize = 8;

/// A renewal failed. The leaf in use stays.
#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error("no issuer is known")]
    NoIssuer,
    #[error(transparent)]
    Desk(#[from] DeskError),
    #[error("{issuer}: {error}")]
    Ask { issuer: String, error: AskError },
    /// Fault: the issuer, or its clock.
    #[error("the new leaf is not usable: {0}")]
    Unusable(#[from] TlsError),
    /// Fault: the issuer's clock, or ours.
    #[error("the new leaf is no newer than the old one; is the issuer's clock right?")]
    NotNewer,
    #[error("the new leaf cannot be kept: {0}")]
    Store(#[from] StoreError),
    #[error("the task that keeps the new leaf broke")]
    Broken,
    #[error("the new leaf cannot be used: {0}")]
    Bind(#[from] BindError),
}

impl RenewError {
    /// The word for metrics.
    const fn as_str(&self) -> &'static str {
        match self {
            Self::NoIssuer => "no_issuer",
            Self::Desk(_) => "failed",
            Self::Ask { error: AskError::Refused(_), .. } => "refused",
            Self::Ask { .. } => "unreachable",
            Self::Unusable(_) | Self::NotNewer => "unusable",
            Self::Store(_) | Self::Broken | Self::Bind(_) => "failed",
        }
    }
}

/// What the two tasks of this module share.
pub(super) struct Keeper {
    pub(super) dir: DataDir,
    pub(super) endpoint: Endpoint,
    pub(super) gossip: GossipHandle,
    pub(super) desk: Arc<Mutex<IssuerDesk>>,
    /// Asked when no issuer's address is known.
    pub(super) seeds: Vec<SocketAddr>,
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    /// Told what this member may offer, when that changes.
    pub(super) allow: watch::Sender<Option<Vec<ServiceName>>>,
    /// For readers, replaced whole.
    pub(super) identity: Arc<ArcSwap<Identity>>,
    pub(super) events: EventLog,
    pub(super) metrics: Metrics,
    pub(super) clock: Clock,
    /// Told when an issuer has appeared.
    pub(super) chance: Notify,
    /// Told when the leaf in use is not what it should be any more.
    pub(super) outdated: Notify,
}

impl Keeper {
    fn credentials(&self) -> NodeCredentials {
        self.identity.load().credentials.clone()
    }

    /// Renews the leaf whenever it is time. Cancel safe: a leaf is in use only once it is on disk.
    pub(super) async fn renew_for_ever(self: Arc<Self>, seed: u64) {
        let life = self.credentials().life();
        let mut rotation = Rotation::new(life, SmallRng::seed_from_u64(seed));
        let mut rng = SmallRng::seed_from_u64(seed ^ 1);
        let mut warned_at: Option<Moment> = None;
        loop {
            let due = rotation.poll_timeout();
            self.show(|identity| identity.renews_at = due.as_secs());
            let now = clock::unix_time();
            if now < due {
                tokio::select! {
                    biased;
                    () = sleep((due - now).min(LOOK_INTERVAL)) => {}
                    () = self.chance.notified() => rotation.handle_chance(clock::unix_time()),
                    () = self.outdated.notified() => rotation.handle_outdated(clock::unix_time()),
                }
                continue;
            }
            match self.renew(&mut rng).await {
                Ok(renewed) => {
                    self.metrics.count_renewal("success");
                    rotation.handle_renewed(renewed.life());
                }
                Err(error) => {
                    self.metrics.count_renewal(error.as_str());
                    rotation.handle_failed(clock::unix_time());
                    let now = self.clock.now();
                    if warned_at.is_none_or(|at| now.since(at) >= WARNING_INTERVAL) {
                        warned_at = Some(now);
                        let name = self.credentials().name().clone();
                        self.events.record(EventKind::RenewalFailed, name, &error);
                    }
                }
            }
        }
    }

    /// Asks issuers in turn, and uses the first leaf that is one.
    async fn renew(&self, rng: &mut SmallRng) -> Result<NodeCredentials, RenewError> {
        let old = self.credentials();
        let own = self.desk.lock().await.renew(old.member_id(), old.enrolment()).await;
        let mut last = match own {
            Ok(leaf) => return self.take(&old, leaf).await,
            Err(DeskError::NotIssuer) => RenewError::NoIssuer,
            Err(error) => error.into(), // for instance a full disk: another issuer may have room
        };
        let mut doors = doors(&self.snapshot.load(), old.member_id(), rng);
        if doors.is_empty() {
            let seed = |address: &SocketAddr| Door { member: None, address: *address };
            doors =
                self.seeds.iter().map(|at| (at.to_string(), seed(at))).take(ASKED_MAX).collect();
        }
        for (issuer, door) in doors {
            let asked = ask_leaf(&self.endpoint, door).await;
            let taken = match asked {
                Ok((leaf, _)) => self.take(&old, leaf).await,
                Err(error) => Err(RenewError::Ask { issuer, error }),
            };
            match taken {
                Ok(renewed) => return Ok(renewed),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Checks a new leaf, keeps it, and proves this member with it from now on.
    async fn take(
        &self,
        old: &NodeCredentials,
        leaf: RenewedLeaf,
    ) -> Result<NodeCredentials, RenewError> {
        let renewed = old.renewed(leaf.chain)?;
        let has_same_issuer = renewed.enrolment().signer() == old.enrolment().signer();
        let number = |leaf: &NodeCredentials| (leaf.enrolled().issued_at, leaf.enrolled().serial);
        if has_same_issuer && number(&renewed) <= number(old) {
            return Err(RenewError::NotNewer);
        }
        // Others, and our own next start, believe the enrolment only with its issuer's entry.
        for entry in leaf.entries {
            let _ = self.gossip.publish(entry).await; // refused: nobody's loss, the issuer tells it, too
        }
        let (dir, chain) = (self.dir.clone(), renewed.chain().to_vec());
        blocking(move || dir.store_chain(&chain)).await.ok_or(RenewError::Broken)??;
        self.endpoint.set_credentials(&renewed)?;
        count_expiry(&self.metrics, &renewed);
        self.show(|identity| identity.credentials = renewed.clone());
        self.allow.send_if_modified(|allowed| {
            let services = &renewed.enrolled().services;
            let has_changed = allowed != services;
            allowed.clone_from(services);
            has_changed
        });
        let late = clock::unix_seconds().saturating_sub(old.expires_at());
        let serial = renewed.enrolled().serial; // in hexadecimal digits, as `certs` lists it
        let reason = match late {
            0 => format!("serial {serial:x}"),
            late => format!("serial {serial:x}; the old one ended {late} s ago"),
        };
        self.events.record(EventKind::CertificateRenewed, renewed.name(), reason);
        if late > 0 {
            self.gossip.retry_contacts().await; // those that refused the ended leaf
        }
        Ok(renewed)
    }

    /// Looks at the mesh every second: whether an issuer is there, whose ended leaves were accepted.
    /// That the issuers `removed` were taken back is known.
    pub(super) async fn watch(self: Arc<Self>, mut removed: BTreeSet<MemberId>) {
        let (mut issuers, mut accepted) = (IssuerWatch::default(), BTreeMap::new());
        let (mut warned_at, mut outdated): (Option<Moment>, Option<EntryVersion>) = (None, None);
        let (mut appointed, mut refused) = (BTreeSet::new(), 0);
        loop {
            let (now, credentials) = (self.clock.now(), self.credentials());
            let is_reachable = self.is_issuer_there(credentials.member_id());
            if issuers.handle_look(since_start(now), is_reachable) {
                self.chance.notify_one();
            }
            self.appoint_if_named(credentials.member_id(), &mut appointed).await;
            self.tell_removed(&mut removed);
            let leaf = credentials.enrolment().version();
            if self.is_outdated(&credentials) && outdated != Some(leaf) {
                outdated = Some(leaf); // once for each leaf: failures have pauses of their own
                self.outdated.notify_one();
            }
            credentials.trust().grace().set_open(issuers.is_grace_open(since_start(now)));
            for member in credentials.trust().grace().take_accepted() {
                if accepted.insert(member, now).is_none() {
                    let reason = "its certificate has ended and no issuer is there to renew it";
                    self.events.record(EventKind::EndedAccepted, self.name_of(member), reason);
                }
            }
            accepted.retain(|member, at| now.since(*at) < ACCEPTED_FOR && !self.is_valid(member));
            let degraded = self.degraded(&credentials, accepted.keys());
            if degraded.is_some() && warned_at.is_none_or(|at| now.since(at) >= WARNING_INTERVAL) {
                warned_at = Some(now);
                warn!(reason = degraded.as_deref(), "degraded");
            }
            self.show_degraded(degraded);
            let refused_at = self.endpoint.standing().refused_at();
            refused = if refused_at.is_empty() { 0 } else { refused + 1 };
            self.show_disowned((refused >= REFUSED_LOOKS).then_some(refused_at));
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// Whether a leaf of this member that others have heard of holds now.
    fn is_valid(&self, member: &MemberId) -> bool {
        let ttl_secs = self.credentials().genesis().leaf_ttl_secs;
        let snapshot = self.snapshot.load();
        snapshot.enrolments.get(member).is_some_and(|newest| {
            newest.enrolment.issued_at.saturating_add(ttl_secs) > clock::unix_seconds()
        })
    }

    fn is_issuer_there(&self, me: MemberId) -> bool {
        let snapshot = self.snapshot.load();
        snapshot.active_issuers().any(|issuer| {
            let state = snapshot.members.get(&issuer.member).map(|view| view.state);
            issuer.member == me || matches!(state, Some(MemberState::Alive | MemberState::Suspect))
        })
    }

    /// Tells which issuers the root has taken back besides those that are `known`.
    fn tell_removed(&self, known: &mut BTreeSet<MemberId>) {
        let snapshot = self.snapshot.load();
        let removed = snapshot.issuers.iter().filter(|(_, appointed)| !appointed.issuer.is_active);
        for (_, appointed) in removed.filter(|(id, _)| known.insert(**id)) {
            let reason = "by the root key: nobody believes its certificates any more";
            let name = self.name_of(appointed.issuer.member);
            self.events.record(EventKind::IssuerRemoved, name, reason);
        }
    }

    /// Begins to issue when the root has made this member an issuer. The key is already here.
    async fn appoint_if_named(&self, me: MemberId, appointed: &mut BTreeSet<PublicKey>) {
        let snapshot = self.snapshot.load_full();
        let named = snapshot.active_issuers().filter(|issuer| issuer.member == me);
        for issuer in named {
            if appointed.contains(&issuer.key) {
                continue;
            }
            match self.desk.lock().await.appoint(issuer) {
                Ok(true) => {
                    let name = self.credentials().name().clone();
                    self.events.record(EventKind::IssuerAppointed, name, "by the root key");
                }
                Ok(false) | Err(DeskError::NotIssuer) => {} // known, or a key that was here once
                Err(error) => {
                    warn!(%error, "cannot issue with the key that the root named, tried again");
                    continue;
                }
            }
            appointed.insert(issuer.key);
        }
    }

    /// Whether the leaf in use is from an issuer that the root took back, or allows other services
    /// than the newest enrolment.
    fn is_outdated(&self, credentials: &NodeCredentials) -> bool {
        let snapshot = self.snapshot.load();
        let issuer = snapshot.issuers.get(&credentials.enrolment().signer().member_id());
        let newest = snapshot.enrolments.get(&credentials.member_id());
        issuer.is_some_and(|appointed| !appointed.issuer.is_active)
            || newest
                .is_some_and(|newest| newest.enrolment.services != credentials.enrolled().services)
    }

    /// What is wrong with the certificates in use here, if anything is.
    fn degraded<'a>(
        &self,
        credentials: &NodeCredentials,
        accepted: impl Iterator<Item = &'a MemberId>,
    ) -> Option<String> {
        let mut faults = Vec::new();
        let late = clock::unix_seconds().checked_sub(credentials.expires_at());
        if let Some(late) = late {
            faults.push(format!("the certificate of this member ended {late} s ago"));
        }
        let snapshot = self.snapshot.load();
        let me = credentials.member_id();
        if snapshot.members.contains_key(&me) && !snapshot.enrolments.contains_key(&me) {
            let fault = "no issuer vouches for this member any more, and the others refuse it";
            faults.push(fault.to_owned());
        }
        let accepted: Vec<_> = accepted.map(|member| self.name_of(*member)).collect();
        if !accepted.is_empty() {
            let names = accepted.join(", ");
            faults
                .push(format!("accepted for want of an issuer, with ended certificates: {names}"));
        }
        (!faults.is_empty()).then(|| faults.join("; "))
    }

    fn show_degraded(&self, degraded: Option<String>) {
        let was = self.identity.load().degraded.clone();
        let name = self.credentials().name().clone();
        match (&was, &degraded) {
            (None, Some(reason)) => self.events.record(EventKind::Degraded, name, reason),
            (Some(_), None) => {
                let reason = "all certificates in use are valid again";
                self.events.record(EventKind::Restored, name, reason);
            }
            _ => {}
        }
        if was != degraded {
            self.show(|identity| identity.degraded = degraded.clone());
        }
    }

    /// Says that the members at `refused_at` refuse this one, or that somebody speaks with it again.
    fn show_disowned(&self, refused_at: Option<Vec<SocketAddr>>) {
        const REASON: &str = "the other members refuse this one: it was replaced or dropped";
        let was = self.identity.load().disowned;
        let kept = match (was, &refused_at) {
            (None, Some(at)) => {
                let at: Vec<_> = at.iter().map(SocketAddr::to_string).collect();
                let reason = format!("{REASON}; told by {}", at.join(", "));
                self.events.record(EventKind::Disowned, self.credentials().name(), reason);
                disowned::mark(&self.dir)
            }
            (Some(_), None) => disowned::clear(&self.dir),
            _ => return,
        };
        if let Err(error) = kept {
            warn!(%error, "whether others believe this member cannot be kept");
        }
        self.show(|identity| identity.disowned = refused_at.as_ref().map(|_| REASON));
    }

    fn show(&self, change: impl Fn(&mut Identity)) {
        self.identity.rcu(|identity| {
            let mut changed = Identity::clone(identity);
            change(&mut changed);
            changed
        });
    }

    fn name_of(&self, member: MemberId) -> String {
        let snapshot = self.snapshot.load();
        let view = snapshot.members.get(&member);
        view.map_or_else(|| member.to_string(), |view| view.name.to_string())
    }
}

/// Sets the gauges of when the certificates of this member's chain end.
pub(super) fn count_expiry(metrics: &Metrics, credentials: &NodeCredentials) {
    let gauges =
        [&metrics.cert_expiry_leaf, &metrics.cert_expiry_issuer, &metrics.cert_expiry_root];
    for (gauge, der) in gauges.into_iter().zip(credentials.chain()) {
        match Certificate::read(der) {
            Ok(facts) => drop(gauge.set(facts.not_after as f64)),
            Err(error) => warn!(%error, "a certificate of the own chain cannot be read"),
        }
    }
}

/// Where this member may get its next leaf, with names: living issuers in random order, then the
/// others, whose death may be hearsay.
fn doors(snapshot: &Snapshot, me: MemberId, rng: &mut SmallRng) -> Vec<(String, Door)> {
    let members: BTreeSet<_> = snapshot.active_issuers().map(|issuer| issuer.member).collect();
    let views = members.iter().filter(|member| **member != me);
    let mut views: Vec<_> = views.filter_map(|member| snapshot.members.get(member)).collect();
    views.shuffle(rng);
    views.sort_by_key(|view| view.state != MemberState::Alive);
    let door = |address, id| Door { member: Some(id), address };
    let doors = views.iter().map(|view| (view.name.to_string(), door(view.address, view.id)));
    doors.take(ASKED_MAX).collect()
}

fn since_start(now: Moment) -> Duration {
    Duration::from_nanos(now.as_nanos())
}
