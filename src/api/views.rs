//! The JSON of listings. Fields may be added, never renamed.

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};

use super::outlook::{Outlook, Standing, Tally};
use super::{ApiState, ExposeSpec};
use crate::mesh::{Appointed, Endpoint, EndpointState, MemberView, ServiceView, Snapshot};
use crate::model::{
    Enrolment, Epoch, MemberId, MemberName, MemberPhase, MemberState, Moment, PublicKey,
    ServiceName,
};
use crate::tls::Certificate;
use crate::transport::enrolment::InviteView;

/// One member, this one included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// What people call it.
    pub name: String,
    /// 32 hexadecimal digits.
    pub id: String,
    /// Where it is dialled.
    pub address: String,
    /// For instance `eu1/a`; may be empty.
    pub zone: String,
    /// `alive`, `suspect`, `restarting`, `down` or `left`.
    pub state: String,
    /// Whether its rights were taken away.
    pub revoked: bool,
    /// Whether it takes nothing new.
    pub draining: bool,
    /// Which run of it, higher is later.
    pub epoch: u64,
    /// Of its record.
    pub version: u64,
    /// Names of what it serves.
    pub services: Vec<String>,
    /// Since its state or record last changed.
    pub age_ms: u64,
    /// Whether it is the member that answers.
    pub me: bool,
}

/// One service of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// What callers ask for.
    pub name: String,
    /// What it speaks.
    pub protocol: String,
    /// How many there are.
    pub instances: usize,
    /// How many of them take work by the word of their own agents.
    pub ready: usize,
    /// How many of the ready ones calls from here avoid because they failed: by the word of the whole
    /// mesh, or of this member's calls alone.
    #[serde(default)]
    pub ejected: usize,
    /// How many of the ejected ones are so only here.
    #[serde(default)]
    pub ejected_here: usize,
    /// How many of the other ready ones calls from here go around, because some there have just failed:
    /// fewer than open a breaker.
    #[serde(default)]
    pub avoided: usize,
    /// Of how many of the ready ones that are not ejected the last two calls from here or more failed,
    /// whether calls go around them or not.
    #[serde(default)]
    pub failing_here: usize,
    /// Whether more than half of it fails: the mesh ejects nothing of it, and nothing is sent twice.
    #[serde(default)]
    pub failing: bool,
    /// Whether so much of it is ejected that all of it is called again.
    #[serde(default)]
    pub panic: bool,
    /// Whether instances were exposed with another protocol: they are called with this one, too.
    #[serde(default)]
    pub mixed_protocols: bool,
}

/// One instance of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointRow {
    /// Of which service.
    pub service: String,
    /// Unique on its node.
    pub instance: String,
    /// The member in front of it.
    pub node: String,
    /// Where that member is dialled.
    pub address: String,
    /// `ready`, `ejected`, `probing`, `draining`, `failing`, `maint` or `down`. Ejected and probing are
    /// ready by the word of their own agents.
    pub state: String,
    /// Why it is in that state, or why it takes less work than that says; empty when all is well. Whose
    /// word that is comes first: `mesh: ` that of all callers; `only here: `, `avoided here: `,
    /// `fails here: ` and `slow here: ` of calls from here.
    pub reason: String,
    /// Its share; 100 is usual.
    pub weight: u16,
    /// Free words.
    pub tags: Vec<String>,
    /// Connections and requests that are under way now from this agent; to an instance of this very
    /// machine also those of all other callers.
    pub inflight: u64,
    /// How long its answers took of late when they took longest, or its connections; absent where none
    /// was measured from here.
    pub latency_ms: Option<f64>,
    /// Since its own agent last said something new.
    pub age_ms: u64,
    /// Whether calls from here go around it, because some have just failed there: before a breaker opens
    /// its `state` is `ready`.
    #[serde(default)]
    pub avoided: bool,
    /// For how many milliseconds it has stood as it does; absent for longer than this agent can tell.
    #[serde(default)]
    pub since_ms: Option<u64>,
}

/// This machine's own instances: what of them is out of rotation, and what they still have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// Whether the whole member drains.
    pub draining: bool,
    /// By id.
    pub instances: Vec<OwnInstance>,
}

/// One instance of this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnInstance {
    /// Unique on this machine.
    pub instance: String,
    /// Of which service; empty for one that was taken back and still has connections.
    pub service: String,
    /// A state of an endpoint, `pending` until the mesh was told of it, or `gone`.
    pub state: String,
    /// Connections that it has now, whoever called.
    pub inflight: u64,
}

/// The way to one other member, as `/v1/mesh/net` lists it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Net {
    /// What people call it.
    pub name: String,
    /// 32 hexadecimal digits.
    pub id: String,
    /// Where it is dialled.
    pub address: String,
    /// As in `/v1/mesh/members`.
    pub state: String,
    /// Whether this member has a data connection to it: the first call dials one, a minute without
    /// any closes it.
    pub connected: bool,
    /// Round trip on that connection; absent without one.
    pub rtt_ms: Option<f64>,
    /// Whether the other end of that connection was not heard for 600 ms and a round trip.
    pub silent: bool,
    /// UDP payload sent on that connection.
    pub bytes_sent: u64,
    /// UDP payload received on that connection.
    pub bytes_received: u64,
    /// Since its state or record last changed.
    pub age_ms: u64,
}

/// One certificate, as `/v1/mesh/certs` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertRow {
    /// Whose key it certifies; empty for the root, which is no node's.
    pub node: String,
    /// `root`, `issuer`, `leaf`, or `public`: of the public gateway, of another authority.
    pub kind: String,
    /// The names in it, as URIs.
    pub uris: Vec<String>,
    /// Hexadecimal.
    pub serial: String,
    /// The hash of the key that signed it; of a `public` one the name of who signed it.
    pub issuer: String,
    /// Unix seconds.
    pub not_before: u64,
    /// Unix seconds.
    pub not_after: u64,
    /// Unix seconds; leaves only, and of other members about.
    pub renews_at: Option<u64>,
    /// The hash of the certified key in hexadecimal; of a leaf the member id.
    pub key_hash: String,
}

/// A member that stays when the issuer that let it in goes, or that goes with it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeptMember {
    /// Its id.
    pub member: MemberId,
    /// Its name; absent for a key that one of those that go had replaced.
    pub name: Option<MemberName>,
    /// Whether it stays.
    pub stays: bool,
}

/// One issuer, as `/v1/mesh/issuers` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuerRow {
    /// The name of its member, or that one's id where no record names it.
    pub node: String,
    /// The hash of its issuing key.
    pub id: String,
    /// The id of its member.
    #[serde(with = "as_text")]
    pub member: MemberId,
    /// Its issuing key.
    #[serde(with = "as_text")]
    pub key: PublicKey,
    /// False once the root took it back.
    pub active: bool,
    /// Epoch of the root's newest word about it, which the next must go above.
    pub epoch: Epoch,
    /// The state of its member, or `replaced`: another machine has taken its place, and this key is
    /// believed until it is removed.
    pub state: String,
    /// Members whose newest enrolment it signed.
    pub members: usize,
    /// Its certificate: DER in base64.
    pub certificate: String,
}

/// A member's issuing key, as it told it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IssuingKey {
    /// Whose key it is.
    #[serde(with = "as_text")]
    pub member: MemberId,
    /// The public half of it.
    #[serde(with = "as_text")]
    pub key: PublicKey,
}

/// One invite that this member made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteRow {
    /// To revoke it by.
    pub id: String,
    /// `open`, `used`, `expired` or `revoked`.
    pub state: String,
    /// How many may join.
    pub uses: u32,
    /// How many have.
    pub redeemed: usize,
    /// Unix seconds.
    pub expires_at: u64,
    /// The only name that it lets in.
    pub name: Option<String>,
    /// The only services that whoever joins may offer.
    pub services: Option<Vec<String>>,
    /// Ids of the members that came by it.
    #[serde(default)]
    pub members: Vec<String>,
}

/// Ids and keys in JSON: hexadecimal digits, as people know them.
mod as_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(id: &impl Display, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(id)
    }

    pub(super) fn deserialize<'de, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

pub(super) fn age_ms(now: Moment, then: Moment) -> u64 {
    u64::try_from(now.since(then).as_millis()).unwrap_or(u64::MAX)
}

fn names(services: &[ServiceName]) -> Vec<String> {
    services.iter().map(ToString::to_string).collect()
}

/// `/v1/mesh/members`, by name.
pub(super) fn members(state: &ApiState) -> Vec<Member> {
    let now = state.clock.now();
    let snapshot = state.snapshot();
    let shown = snapshot.members.values().filter(|view| is_shown(state, view, now));
    let mut rows: Vec<_> = shown.map(|view| member(state, view, now)).collect();
    rows.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    rows
}

/// A member that is gone for long or was forgotten is hidden from listings, and only from those: its records
/// and the attempts to reach it stay.
pub(crate) fn is_shown(state: &ApiState, view: &MemberView, now: Moment) -> bool {
    let is_gone = matches!(view.state, MemberState::Down | MemberState::Left);
    let is_recent = || now.since(view.changed_at) <= state.effective.load().forget_after;
    !is_gone || (is_recent() && !state.local().forgotten.contains(&view.id))
}

fn member(state: &ApiState, view: &MemberView, now: Moment) -> Member {
    Member {
        name: view.name.to_string(),
        id: view.id.to_string(),
        address: view.address.to_string(),
        zone: view.zone.clone(),
        state: view.state.to_string(),
        revoked: view.is_revoked,
        draining: view.phase == MemberPhase::Draining,
        epoch: view.epoch.0,
        version: view.version,
        services: names(&view.services),
        age_ms: age_ms(now, view.changed_at),
        me: view.id == state.me,
    }
}

/// `/v1/mesh/net`: every other member, by name.
pub(super) fn net(state: &ApiState) -> Vec<Net> {
    let now = state.clock.now();
    let snapshot = state.snapshot();
    let others = snapshot.members.values().filter(|view| view.id != state.me);
    let row = |view: &Arc<MemberView>| {
        let link = state.links.to(&view.id);
        Net {
            name: view.name.to_string(),
            id: view.id.to_string(),
            address: view.address.to_string(),
            state: view.state.to_string(),
            connected: link.is_some(),
            rtt_ms: link.map(|link| link.rtt.as_secs_f64() * 1_000.0),
            silent: link.is_some_and(|link| link.is_silent),
            bytes_sent: link.map_or(0, |link| link.bytes_sent),
            bytes_received: link.map_or(0, |link| link.bytes_received),
            age_ms: age_ms(now, view.changed_at),
        }
    };
    let mut rows: Vec<_> = others.filter(|view| is_shown(state, view, now)).map(row).collect();
    rows.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    rows
}

/// `/v1/mesh/services`, by name. A service that only hidden members offer is hidden with them.
pub(crate) fn services(state: &ApiState) -> Vec<Service> {
    let snapshot = state.snapshot();
    let shown = |view: &Arc<ServiceView>| service(state, &snapshot, view);
    snapshot.services.values().map(shown).filter(|row| row.instances > 0).collect()
}

fn service(state: &ApiState, snapshot: &Snapshot, view: &ServiceView) -> Service {
    let outlook = Outlook::new(state, snapshot, view);
    let shown = shown_endpoints(state, snapshot, &outlook);
    let is_ready = |(_, endpoint): &&(usize, &Endpoint)| endpoint.state == EndpointState::Ready;
    let Tally { ejected, ejected_here, avoided, failing_here } =
        outlook.tally(shown.iter().map(|(at, _)| *at));
    Service {
        name: view.name.to_string(),
        protocol: view.protocol.to_string(),
        instances: shown.len(),
        ready: shown.iter().filter(is_ready).count(),
        ejected: ejected + ejected_here,
        ejected_here,
        avoided,
        failing_here,
        failing: view.is_failing,
        panic: view.is_panic,
        mixed_protocols: view.is_mixed,
    }
}

/// The instances of a service with their places, by name and node, without those of members that
/// listings hide.
fn shown_endpoints<'a>(
    state: &ApiState,
    snapshot: &Snapshot,
    outlook: &Outlook<'a>,
) -> Vec<(usize, &'a Endpoint)> {
    let now = state.clock.now();
    let is_member_shown = |member: &MemberId| {
        snapshot.members.get(member).is_none_or(|view| is_shown(state, view, now))
    };
    let mut all = outlook.in_order();
    all.retain(|(_, endpoint)| is_member_shown(&endpoint.member));
    all
}

/// `/v1/mesh/endpoints/{svc}`, by instance and node; empty for a service that nobody offers.
pub(super) fn endpoints(state: &ApiState, service: &ServiceName) -> Vec<EndpointRow> {
    let now = state.clock.now();
    let snapshot = state.snapshot();
    let Some(view) = snapshot.services.get(service) else { return Vec::new() };
    let outlook = Outlook::new(state, &snapshot, view);
    let row = |(at, endpoint): (usize, &Endpoint)| {
        let report = &outlook.calls(at).report;
        EndpointRow {
            service: service.to_string(),
            instance: endpoint.instance.to_string(),
            node: endpoint.member_name.to_string(),
            address: endpoint.address.to_string(),
            state: outlook.state_word(at).to_owned(),
            reason: outlook.why(at),
            weight: endpoint.weight.0,
            tags: endpoint.tags.clone(),
            inflight: report.in_flight.into(),
            latency_ms: report.latency.map(|time| (time.as_secs_f64() * 1e6).round() / 1e3),
            age_ms: age_ms(now, endpoint.changed_at),
            avoided: outlook.standing(at) == Standing::Avoided,
            since_ms: outlook.since(at).map(|time| time.as_millis().try_into().unwrap_or(u64::MAX)),
        }
    };
    shown_endpoints(state, &snapshot, &outlook).into_iter().map(row).collect()
}

/// `/v1/mesh/drain`: what this machine offers and, until their last call ends, what it took back.
pub(super) fn rotation(state: &ApiState) -> Rotation {
    // The state first: whoever is seen out of rotation and then without a call gets none any more.
    let (local, snapshot) = (state.local(), state.snapshot());
    let mut busy = state.calls.own();
    let row = |spec: &ExposeSpec| {
        let endpoints = snapshot.endpoints(&spec.service).iter();
        let mut own = endpoints.filter(|row| row.member == state.me && row.instance == spec.id);
        let word = match own.next() {
            _ if local.out.maintenance.contains_key(&spec.id) => EndpointState::Maint.as_str(),
            _ if local.out.is_draining(&spec.id) => EndpointState::Draining.as_str(),
            // The mesh may not have heard yet, of that or that it is back.
            Some(_) if local.failing.contains(&spec.id) => EndpointState::Failing.as_str(),
            Some(row) if matches!(row.state, EndpointState::Draining | EndpointState::Maint) => {
                "pending"
            }
            Some(endpoint) => endpoint.state_word(),
            None => "pending",
        };
        OwnInstance {
            instance: spec.id.to_string(),
            service: spec.service.to_string(),
            state: word.to_owned(),
            inflight: busy.remove(&spec.id).unwrap_or(0),
        }
    };
    let mut instances: Vec<_> = local.exposed.iter().map(row).collect();
    instances.extend(busy.into_iter().map(|(id, inflight)| OwnInstance {
        instance: id.to_string(),
        service: String::new(),
        state: "gone".to_owned(),
        inflight,
    }));
    instances.sort_by(|a, b| a.instance.cmp(&b.instance));
    Rotation { draining: local.out.node_draining, instances }
}

/// Why an endpoint of a node in the state `node` is seen as it is; `trouble` is what this agent's own
/// calls met.
pub(super) fn reason(
    endpoint: &Endpoint,
    node: Option<MemberState>,
    trouble: Option<&str>,
) -> String {
    let is_heard = matches!(node, Some(MemberState::Alive | MemberState::Suspect));
    let words = match endpoint.state {
        EndpointState::Ready if endpoint.weight.0 == 0 => "its weight is 0: it takes no new work",
        EndpointState::Ready => match trouble {
            Some(trouble) => {
                return format!(
                    "a call from here just failed ({trouble}); used as the last resort"
                );
            }
            None if node == Some(MemberState::Suspect) => {
                "its node failed a probe and has some seconds to answer"
            }
            None => "",
        },
        EndpointState::Doubtful if is_heard => {
            "its node could not be reached from here just now; used as the last resort"
        }
        EndpointState::Doubtful => "its node is down by hearsay; used as the last resort",
        EndpointState::Draining => "it finishes what it has",
        EndpointState::Failing => "the checks of its own agent fail; that one says why",
        EndpointState::Maint => "taken out by its operator",
        EndpointState::Down => match node {
            Some(MemberState::Restarting) => "its node announced a restart",
            Some(MemberState::Left) => "its node has left the mesh",
            _ => "its node is down",
        },
    };
    words.to_owned()
}

/// `/v1/mesh/certs`: the chain of this member, with `all` those of every issuer and member, too.
/// The soonest to end come first.
pub(super) fn certs(state: &ApiState, all: bool) -> Vec<CertRow> {
    let (identity, snapshot) = (state.identity.load(), state.snapshot());
    let credentials = &identity.credentials;
    let genesis = credentials.genesis();
    let root = genesis.root.member_id();
    let own_issuer = credentials.enrolment().signer().member_id();
    let name = |id: &MemberId| match snapshot.members.get(id) {
        Some(view) => view.name.to_string(),
        None => id.to_string(),
    };
    let row = |node, kind: &str, issuer: MemberId, facts: Certificate| CertRow {
        node,
        kind: kind.to_owned(),
        uris: facts.uris,
        serial: facts.serial,
        issuer: issuer.to_string(),
        not_before: facts.not_before,
        not_after: facts.not_after,
        renews_at: None,
        key_hash: facts.key_hash.to_string(),
    };
    let mut rows = Vec::new();
    let facts = Certificate::read(&genesis.root_certificate).ok();
    rows.extend(facts.map(|facts| row(String::new(), "root", root, facts)));
    let issuers = snapshot.issuers.iter().map(|(id, appointed)| (id, &appointed.issuer));
    for (_, issuer) in issuers.filter(|(id, issuer)| **id == own_issuer || all && issuer.is_active)
    {
        let facts = Certificate::read(&issuer.certificate).ok();
        rows.extend(facts.map(|facts| row(name(&issuer.member), "issuer", root, facts)));
    }
    rows.extend(state.certificates.used().certificates.iter().map(|public| CertRow {
        node: state.name.to_string(),
        kind: "public".to_owned(),
        uris: public.names.iter().map(|name| format!("dns:{name}")).collect(),
        serial: public.serial.clone(),
        issuer: public.issuer.clone(),
        not_before: public.not_before,
        not_after: public.not_after,
        renews_at: None,
        key_hash: public.key_hash.clone(),
    }));
    let ttl_secs = genesis.leaf_ttl_secs;
    let leaf = |issuer, enrolment: &Enrolment, renews_at| CertRow {
        renews_at: Some(renews_at),
        ..row(
            enrolment.name.to_string(),
            "leaf",
            issuer,
            Certificate::of_enrolment(credentials.mesh(), enrolment, ttl_secs),
        )
    };
    rows.push(leaf(own_issuer, credentials.enrolled(), identity.renews_at));
    let others = snapshot.enrolments.iter().filter(|(id, _)| all && **id != state.me);
    rows.extend(others.map(|(_, enrolled)| {
        let about = enrolled.enrolment.issued_at.saturating_add(ttl_secs / 2);
        leaf(enrolled.issuer, &enrolled.enrolment, about)
    }));
    rows.sort_by(|a, b| (a.not_after, &a.node).cmp(&(b.not_after, &b.node)));
    rows
}

/// `/v1/mesh/issuers`, by name.
pub(super) fn issuers(state: &ApiState) -> Vec<IssuerRow> {
    let snapshot = state.snapshot();
    let row = |(id, Appointed { issuer, epoch }): (&MemberId, &Appointed)| {
        let view = snapshot.members.get(&issuer.member);
        IssuerRow {
            node: view.map_or_else(|| issuer.member.to_string(), |view| view.name.to_string()),
            id: id.to_string(),
            member: issuer.member,
            key: issuer.key,
            active: issuer.is_active,
            epoch: *epoch,
            state: match snapshot.replaced.contains(&issuer.member) {
                true => "replaced".to_owned(),
                false => view.map_or(MemberState::Down, |view| view.state).to_string(),
            },
            members: snapshot.enrolments.values().filter(|enrolled| enrolled.issuer == *id).count(),
            certificate: BASE64_STANDARD.encode(&issuer.certificate),
        }
    };
    let mut rows: Vec<_> = snapshot.issuers.iter().map(row).collect();
    rows.sort_by(|a, b| (&a.node, &a.id).cmp(&(&b.node, &b.id)));
    rows
}

/// One row of `/v1/mesh/invites`.
pub(super) fn invite(view: &InviteView, snapshot: &Snapshot, now_secs: u64) -> InviteRow {
    let invite = &view.invite;
    let is_used = u32::try_from(view.redeemed).is_ok_and(|redeemed| redeemed >= invite.uses);
    let state = match (invite.uses, is_used) {
        (0, _) => "revoked",
        (_, true) => "used",
        _ if invite.expires_at <= now_secs => "expired",
        _ => "open",
    };
    let came = snapshot.enrolments.iter();
    let came = came.filter(|(_, enrolled)| enrolled.enrolment.invite == Some(view.id));
    InviteRow {
        id: view.id.to_string(),
        state: state.to_owned(),
        uses: invite.uses,
        redeemed: view.redeemed,
        expires_at: invite.expires_at,
        name: invite.name.as_ref().map(ToString::to_string),
        services: invite.services.as_deref().map(names),
        members: came.map(|(id, _)| id.to_string()).collect(),
    }
}
