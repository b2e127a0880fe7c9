//! What would happen to a call, and what happens to one: `/v1/mesh/routes` and `/v1/mesh/ping`.

use serde::{Deserialize, Serialize};

use super::ApiState;
use super::outlook::Outlook;
use crate::balancer::{Balance, Near, Prefer};
use crate::mesh::{Endpoint, EndpointState, ServiceView, Snapshot};
use crate::model::{Capacity, Protocol, ServiceName};
use crate::proxy::{Balancing, EndpointReport, EntryOptions};

/// What would happen to calls of one service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouteRow {
    /// What is called.
    pub service: String,
    /// `tcp`: a decision for each connection; `http`, `h2`, `grpc`: for each request.
    pub protocol: String,
    /// Where this machine's applications call it, and with which limits; the gateway is the last.
    pub entries: Vec<RouteEntry>,
    /// Requests that are sent again when the instance that got them fails, as its instances declare;
    /// empty when none is.
    pub idempotent: Vec<String>,
    /// Whether the request that was asked about is one of them; absent when none was.
    pub repeatable: Option<bool>,
    /// Why a call by name would be refused now; absent when it would not.
    pub refused: Option<String>,
    /// Where a call by name would go now: one of no entry that has rules of its own.
    pub instances: Vec<RouteInstance>,
}

/// A local entry to a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouteEntry {
    /// Where it listens.
    pub listen: String,
    /// Until an instance has taken the call.
    pub connect_ms: u64,
    /// Until the end of a response; no limit when absent.
    pub request_ms: Option<u64>,
    /// For which nothing may come.
    pub idle_ms: u64,
    /// Instances that a request which may be repeated is sent to at most.
    pub tries: u32,
    /// How it chooses between instances.
    pub balance: String,
    /// How near they are to be, nearest first; empty when that does not matter.
    pub prefer: Vec<String>,
    /// Why a call there would be refused now: a reason, and what it means; absent when it would not.
    pub refused: Option<String>,
    /// Where a call there would go now.
    pub instances: Vec<RouteInstance>,
}

/// An instance and how much of the calls it takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouteInstance {
    /// The member in front of it.
    pub node: String,
    /// Unique on that member.
    pub instance: String,
    /// As in `endpoints`.
    pub state: String,
    /// Of the next calls, in percent, if all stays as it is: of a thousand that were drawn, so up to 3
    /// off.
    pub share: f64,
    /// Whether the next call tries it, before all others; its share is none until that has ended well.
    #[serde(default)]
    pub trial: bool,
    /// The word of the trouble for which calls go elsewhere for a moment; empty when there is none.
    pub avoided: String,
    /// Why it gets more or less than its weight's share; empty when there is nothing to say.
    #[serde(default)]
    pub reason: String,
}

/// One instance that was called.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PingRow {
    /// The member in front of it.
    pub node: String,
    /// Unique on that member.
    pub instance: String,
    /// Whether it took a connection.
    pub ok: bool,
    /// `ok`, or why it did not.
    pub reason: String,
    /// Until it had taken it; absent when it did not.
    pub connect_ms: Option<f64>,
}

/// `/v1/mesh/routes`: of one service, or of all; `request` is a method and a path.
pub(super) fn routes(
    state: &ApiState,
    service: Option<&ServiceName>,
    request: Option<(&str, &str)>,
) -> Vec<RouteRow> {
    let snapshot = state.snapshot();
    let asked = |view: &&ServiceView| service.is_none_or(|service| view.name == *service);
    let views = snapshot.services.values().map(AsRef::as_ref).filter(asked);
    views.map(|view| route(state, &snapshot, view, request)).collect()
}

fn route(
    state: &ApiState,
    snapshot: &Snapshot,
    view: &ServiceView,
    request: Option<(&str, &str)>,
) -> RouteRow {
    let takes = |endpoint: &&Endpoint| endpoint.state == EndpointState::Ready;
    let ready = || view.endpoints().iter().filter(takes);
    let mut idempotent: Vec<_> =
        ready().flat_map(|endpoint| endpoint.idempotent.iter().map(ToString::to_string)).collect();
    idempotent.sort();
    idempotent.dedup();
    let entry = |listen: &dyn ToString, options: &EntryOptions| {
        entry(listen.to_string(), options, destinations(state, snapshot, view, &options.balancing))
    };
    let local = state.local();
    let own = local.upstreams.iter().filter(|spec| spec.service == view.name);
    let mut entries: Vec<_> = own.map(|spec| entry(&spec.listen, &spec.options())).collect();
    let by_name = EntryOptions::default();
    if let Some(gateway) = &local.doors.gateway {
        entries.push(entry(&format!("http://{gateway}"), &by_name));
    }
    let Destinations { refused, instances } =
        destinations(state, snapshot, view, &by_name.balancing);
    RouteRow {
        service: view.name.to_string(),
        protocol: view.protocol.to_string(),
        entries,
        repeatable: request.filter(|_| view.protocol != Protocol::Tcp).map(|(method, path)| {
            ready().next().is_some() && ready().all(|one| one.is_idempotent(method, path))
        }),
        idempotent,
        refused,
        instances,
    }
}

/// Where calls of one entry go, or why they go nowhere.
struct Destinations {
    refused: Option<String>,
    instances: Vec<RouteInstance>,
}

fn destinations(
    state: &ApiState,
    snapshot: &Snapshot,
    view: &ServiceView,
    balancing: &Balancing,
) -> Destinations {
    let preview = state.calls.preview(&view.name, balancing);
    let refused = preview.as_ref().err().map(|none| format!("{}: {none}", none.as_str()));
    let preview = preview.unwrap_or_default();
    let zone = snapshot.members.get(&state.me).map_or("", |me| me.zone.as_str());
    let outlook = Outlook::new(state, snapshot, view);
    let weights: u64 = view.ready().iter().map(|one| one.weight).sum();
    let instance = |(at, endpoint): (usize, &Endpoint)| {
        let calls = outlook.calls(at);
        let key = (endpoint.member, endpoint.instance.clone());
        let share = preview.shares.get(&key).copied().unwrap_or(0.0);
        let is_trial = preview.trials.contains(&key);
        let takes_work = matches!(endpoint.state, EndpointState::Ready | EndpointState::Doubtful);
        let reason = match () {
            () if takes_work && is_beyond(&balancing.prefer, zone, &endpoint.zone) => {
                "farther than 'prefer' lets calls go".to_owned()
            }
            () if is_trial => "the next call tries it".to_owned(),
            () => match outlook.why(at) {
                why if !why.is_empty() => why,
                _ => load(endpoint, &calls.report)
                    .or_else(|| {
                        let fair = f64::from(endpoint.weight.0) / weights.max(1) as f64;
                        let is_less = takes_work && share < fair / 2.0;
                        is_less.then(|| less(&outlook, at, share, balancing).to_owned())
                    })
                    .unwrap_or_default(),
            },
        };
        RouteInstance {
            node: endpoint.member_name.to_string(),
            instance: endpoint.instance.to_string(),
            state: outlook.state_word(at).to_owned(),
            share: (1_000.0 * share).round() / 10.0,
            trial: is_trial,
            avoided: calls.trouble.unwrap_or_default().to_owned(),
            reason,
        }
    };
    let instances = outlook.in_order().into_iter().map(instance).collect();
    Destinations { refused, instances }
}

/// Why an instance against which nothing speaks gets less than half of its weight's share.
fn less(outlook: &Outlook<'_>, at: usize, share: f64, balancing: &Balancing) -> &'static str {
    let in_flight = |at: usize| outlook.calls(at).report.calls;
    let least = outlook.in_order().into_iter().map(|(other, _)| in_flight(other)).min();
    match () {
        () if share == 0.0 && !balancing.prefer.is_empty() => "others are nearer",
        () if balancing.balance == Balance::Maglev => "few keys lead here",
        () if least.is_some_and(|least| in_flight(at) > least) => {
            "others have fewer calls from here in flight"
        }
        () if outlook.is_new(at) => "new here: its share grows",
        () => "others have answered faster of late",
    }
}

/// Whether an instance in `zone` is farther from `own` than `prefer` lets calls go.
fn is_beyond(prefer: &Prefer, own: &str, zone: &str) -> bool {
    let near = Near::between(own, zone);
    !prefer.is_empty() && !prefer.tiers().any(|tier| near <= tier)
}

/// What an endpoint is so busy with that calls go elsewhere first.
fn load(endpoint: &Endpoint, report: &EndpointReport) -> Option<String> {
    let is_at = |limit: Option<u32>| limit.filter(|limit| report.under_way >= *limit);
    let Capacity { soft, hard } = endpoint.capacity;
    let calls = report.under_way;
    match (is_at(hard), is_at(soft)) {
        (Some(hard), _) => Some(format!("full: {calls} calls under way, at most {hard} at a time")),
        (None, Some(soft)) => Some(format!("busy: {calls} calls under way, soft limit {soft}")),
        (None, None) if report.is_crowded => Some("busy with others' calls".to_owned()),
        (None, None) => None,
    }
}

fn entry(listen: String, options: &EntryOptions, to: Destinations) -> RouteEntry {
    let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let (limits, balancing) = (&options.limits, &options.balancing);
    RouteEntry {
        listen,
        connect_ms: millis(limits.timeout.connect()),
        request_ms: limits.timeout.request.map(|span| millis(span.0)),
        idle_ms: millis(limits.timeout.idle()),
        tries: limits.retry.tries(),
        balance: balancing.balance.as_str().to_owned(),
        prefer: balancing.prefer.tiers().map(|near| near.as_str().to_owned()).collect(),
        refused: to.refused,
        instances: to.instances,
    }
}

/// `/v1/mesh/ping/{svc}`: calls every instance once, all at the same time.
pub(super) async fn ping(state: &ApiState, service: &ServiceName) -> Vec<PingRow> {
    let snapshot = state.snapshot();
    let calls = snapshot.endpoints(service).iter().map(|endpoint| async {
        let called = state.pinger.ping(service.clone(), endpoint.clone()).await;
        PingRow {
            node: endpoint.member_name.to_string(),
            instance: endpoint.instance.to_string(),
            ok: called.is_ok(),
            reason: called.as_ref().map_or_else(|reason| *reason, |_| "ok").to_owned(),
            connect_ms: called.ok().map(|time| (time.as_secs_f64() * 1e6).round() / 1e3),
        }
    });
    futures_util::future::join_all(calls).await
}
