//! What readers see of the mesh: immutable, replaced whole on every change.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use super::Rotation;
use crate::balancer::Shares;
use crate::breaker::{Ejection, Verdict};
use crate::model::{
    Capacity, Enrolment, Epoch, InstanceId, InstanceState, Issuer, MemberId, MemberName,
    MemberPhase, MemberState, Moment, Protocol, RequestPattern, ServiceName, Weight,
};

/// The mesh as this member sees it. One decision reads one snapshot.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// All members that are not forgotten, this one included.
    pub members: BTreeMap<MemberId, Arc<MemberView>>,
    /// All services that any listed member offers; endpoints of suspended members are kept with
    /// their state, so that a listing can say why they take no work.
    pub services: BTreeMap<ServiceName, Arc<ServiceView>>,
    /// All issuers, by the hash of their issuing key; those that the root took back, too.
    pub issuers: BTreeMap<MemberId, Appointed>,
    /// The newest enrolment of each member by an active issuer.
    pub enrolments: BTreeMap<MemberId, Enrolled>,
    /// Members whose machine is here under another key; they are in no other list.
    pub replaced: BTreeSet<MemberId>,
}

impl Snapshot {
    /// The issuers that the root lets issue.
    pub fn active_issuers(&self) -> impl Iterator<Item = &Arc<Issuer>> {
        self.issuers.values().map(|appointed| &appointed.issuer).filter(|issuer| issuer.is_active)
    }
}

/// The root's newest word about an issuer.
#[derive(Clone, Debug, PartialEq)]
pub struct Appointed {
    /// What it says.
    pub issuer: Arc<Issuer>,
    /// What its next word must go above.
    pub epoch: Epoch,
}

/// An enrolment and who signed it.
#[derive(Clone, Debug, PartialEq)]
pub struct Enrolled {
    /// The hash of the issuing key.
    pub issuer: MemberId,
    /// Its word.
    pub enrolment: Arc<Enrolment>,
}

impl Snapshot {
    /// All instances of `service`, whatever their state; none when nobody offers it.
    pub fn endpoints(&self, service: &ServiceName) -> &[Endpoint] {
        self.services.get(service).map_or(&[], |view| view.endpoints())
    }

    /// The instances of `service` that take work.
    pub fn ready(&self, service: &ServiceName) -> impl Iterator<Item = &Endpoint> {
        self.endpoints(service).iter().filter(|endpoint| endpoint.state == EndpointState::Ready)
    }

    /// The members that answer, this one included.
    pub fn alive(&self) -> impl Iterator<Item = &MemberView> {
        let members = self.members.values().map(Arc::as_ref);
        members.filter(|member| member.state == MemberState::Alive)
    }
}

/// One member as seen from here.
#[derive(Clone, Debug, PartialEq)]
pub struct MemberView {
    /// Who it is.
    pub id: MemberId,
    /// What people call it.
    pub name: MemberName,
    /// Where it is dialled, from its signed record.
    pub address: SocketAddr,
    /// For instance `eu1/a`; empty when it has none.
    pub zone: String,
    /// As the detector and its own record say.
    pub state: MemberState,
    /// Its own announcement.
    pub phase: MemberPhase,
    /// Whether somebody entitled took its rights away.
    pub is_revoked: bool,
    /// Of its record.
    pub epoch: Epoch,
    /// Of its record.
    pub version: u64,
    /// Names of what it serves, sorted, without repeats.
    pub services: Vec<ServiceName>,
    /// When its state last changed, on this agent's clock.
    pub changed_at: Moment,
}

/// One service as seen from here.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceView {
    /// What callers ask for.
    pub name: ServiceName,
    /// As declared by its first endpoint.
    pub protocol: Protocol,
    /// Whether others declare another one: they are called as if they did not.
    pub is_mixed: bool,
    /// Whether more than half of it fails: nothing of it is ejected, and retries help nobody.
    pub is_failing: bool,
    /// Whether so much of it is ejected that verdicts are to be ignored.
    pub is_panic: bool,
    endpoints: Vec<Endpoint>,
    in_rotation_since: Option<Moment>,
    ready: Shares,
    /// The places of those that are ejected and ready otherwise, by their keys.
    ejected: Vec<usize>,
    /// The same, by when this caller may probe them for the first time.
    probes: Vec<(Moment, usize)>,
    /// Whether one is ready that is not ejected.
    has_other: bool,
}

impl ServiceView {
    /// A service with its endpoints, in any order.
    pub fn new(name: ServiceName, protocol: Protocol, mut endpoints: Vec<Endpoint>) -> Self {
        endpoints.sort_by(|a, b| a.key().cmp(&b.key()));
        let ready =
            endpoints.iter().enumerate().filter(|(_, one)| one.state == EndpointState::Ready);
        let ready: Shares = ready.map(|(at, endpoint)| (at, endpoint.weight)).collect();
        let is_ejected = |at: &usize| matches!(endpoints[*at].verdict, Verdict::Ejected(_));
        let places = || ready.iter().map(|one| one.candidate);
        let ejected: Vec<_> = places().filter(is_ejected).collect();
        let first_probe =
            |at: &usize| Some((endpoints[*at].verdict.ejection()?.first_probe_at(), *at));
        let mut probes: Vec<_> = ejected.iter().filter_map(first_probe).collect();
        probes.sort_unstable();
        let has_other = !places().all(|at| is_ejected(&at));
        let since = places().map(|at| endpoints[at].rotation.since());
        let in_rotation_since = since.min().flatten(); // `None` is least
        let (is_mixed, is_failing, is_panic) = (false, false, false);
        Self {
            name,
            protocol,
            is_mixed,
            is_failing,
            is_panic,
            in_rotation_since,
            endpoints,
            ready,
            ejected,
            probes,
            has_other,
        }
    }

    /// All of them, whatever their state, by member and instance.
    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The instance of that name on `member`.
    pub fn endpoint(&self, member: &MemberId, instance: &InstanceId) -> Option<&Endpoint> {
        let sought = (*member, instance);
        let place = self.endpoints.binary_search_by(|endpoint| endpoint.key().cmp(&sought)).ok()?;
        self.endpoints.get(place)
    }

    /// Why an instance is called by nobody but one caller at a time: its ejection, while that holds. It
    /// does not while the service fails as a whole, while too much of it is ejected to believe it, or
    /// while nothing else is ready.
    pub fn ejection(&self, member: &MemberId, instance: &InstanceId) -> Option<&Ejection> {
        let holds = self.has_other && !self.is_failing && !self.is_panic;
        let sought = (*member, instance);
        let found = self.ejected.binary_search_by(|at| self.endpoints[*at].key().cmp(&sought));
        let place = found.ok().filter(|_| holds)?;
        self.endpoints[self.ejected[place]].verdict.ejection()
    }

    /// The places of those that are ejected, ready otherwise, and whose first probe is due.
    pub(super) fn to_probe(&self, now: Moment) -> &[(Moment, usize)] {
        &self.probes[..self.probes.partition_point(|(from, _)| *from <= now)]
    }

    /// Since when the oldest of those that are ready is in rotation; `None` for longer than this agent
    /// can tell, or when none is.
    pub fn in_rotation_since(&self) -> Option<Moment> {
        self.in_rotation_since
    }

    /// The shares of those that are ready, by their place among all.
    pub fn ready(&self) -> &Shares {
        &self.ready
    }
}

/// One instance of a service, with the member in front of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Unique on the member.
    pub instance: InstanceId,
    /// The member in front of it.
    pub member: MemberId,
    /// What people call that member.
    pub member_name: MemberName,
    /// Where that member is dialled.
    pub address: SocketAddr,
    /// The natural port of the service.
    pub port: u16,
    /// Free words.
    pub tags: Vec<String>,
    /// Its share.
    pub weight: Weight,
    /// Whether it takes work, member and instance taken together.
    pub state: EndpointState,
    /// Of its member, for instance `eu1/a`; empty when it has none.
    pub zone: Arc<str>,
    /// What all callers together hold of it.
    pub verdict: Verdict,
    /// Requests that may be sent twice.
    pub idempotent: Arc<[RequestPattern]>,
    /// How many calls it takes at a time.
    pub capacity: Capacity,
    /// Since when it takes work, or is missed.
    pub rotation: Rotation,
    /// When this last changed, on this agent's clock.
    pub changed_at: Moment,
}

impl Endpoint {
    /// The word used in tables, JSON and metrics: what the instance and its member say goes before what
    /// its callers hold of it.
    pub const fn state_word(&self) -> &'static str {
        match (self.state, &self.verdict) {
            (EndpointState::Ready, Verdict::Ejected(_)) => "ejected",
            (EndpointState::Ready, Verdict::Probing { .. }) => "probing",
            (state, _) => state.as_str(),
        }
    }

    /// What tells it from the others of its service.
    fn key(&self) -> (MemberId, &InstanceId) {
        (self.member, &self.instance)
    }

    /// Whether a request may be sent again although the instance may have had it.
    pub fn is_idempotent(&self, method: &str, path: &str) -> bool {
        self.idempotent.iter().any(|pattern| pattern.matches(method, path))
    }
}

#[cfg(test)]
impl Endpoint {
    /// A ready one, alone on its member, that tests tell from others by its number.
    pub(crate) fn numbered(number: u8) -> Self {
        Self {
            instance: format!("web-{number}").parse().unwrap(),
            member: MemberId::from_bytes([number; 16]),
            member_name: format!("node-{number}").parse().unwrap(),
            address: "127.0.0.1:7370".parse().unwrap(),
            port: 80,
            tags: Vec::new(),
            weight: Weight(100),
            state: EndpointState::Ready,
            zone: "".into(),
            verdict: Verdict::Clear,
            idempotent: Arc::default(),
            capacity: Capacity::default(),
            rotation: Rotation::In { since: None },
            changed_at: Moment::START,
        }
    }
}

/// Whether an endpoint takes work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EndpointState {
    /// Send it work.
    Ready,
    /// Its member is suspected or declared down by hearsay only: the last resort.
    Doubtful,
    /// It or its member is finishing what it has.
    Draining,
    /// Its own agent's checks fail.
    Failing,
    /// Taken out by its operator.
    Maint,
    /// Its member is down, left or restarting.
    Down,
}

impl EndpointState {
    /// The state that follows from the member's and the instance's.
    pub fn of(member: MemberState, phase: MemberPhase, instance: InstanceState) -> Self {
        match (member, phase, instance) {
            (MemberState::Left | MemberState::Restarting, ..) => Self::Down,
            (_, MemberPhase::Left | MemberPhase::Restarting, _) => Self::Down,
            (_, _, InstanceState::Maint) => Self::Maint,
            (_, _, InstanceState::Failing) => Self::Failing,
            (_, MemberPhase::Draining, _) | (_, _, InstanceState::Draining) => Self::Draining,
            (MemberState::Down, ..) => Self::Doubtful,
            _ => Self::Ready,
        }
    }

    /// The word used in tables, JSON and metrics; see [`Endpoint::state_word`].
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Failing => "failing",
            Self::Maint => "maint",
            Self::Doubtful | Self::Down => "down",
        }
    }
}
