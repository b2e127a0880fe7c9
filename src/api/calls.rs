//! What would happen to a call, and what happens to one: `/v1/mesh/routes` and `/v1/mesh/ping`.

use serde::{Deserialize, Serialize};

use super::ApiState;
use crate::mesh::{Endpoint, EndpointState, ServiceView};
use crate::model::{Protocol, ServiceName};
use crate::proxy::EntryOptions;

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
    /// Who may take the call.
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
    /// Of all calls, in percent, as far as weights decide; of two that are drawn the less busy takes it.
    pub share: f64,
    /// Why calls go elsewhere for a moment; empty when they do not.
    pub avoided: String,
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
    views.map(|view| route(state, view, request)).collect()
}

fn route(state: &ApiState, view: &ServiceView, request: Option<(&str, &str)>) -> RouteRow {
    let takes = |endpoint: &Endpoint| endpoint.state == EndpointState::Ready;
    let ready = || view.endpoints().iter().filter(|endpoint| takes(endpoint));
    let weights: u32 = ready().map(|endpoint| u32::from(endpoint.weight.0)).sum();
    let instances = view.endpoints().iter().map(|endpoint| {
        let weight = if takes(endpoint) { f64::from(endpoint.weight.0) } else { 0.0 };
        RouteInstance {
            node: endpoint.member_name.to_string(),
            instance: endpoint.instance.to_string(),
            state: endpoint.state_word().to_owned(),
            share: (1_000.0 * weight / f64::from(weights.max(1))).round() / 10.0,
            avoided: state.calls.of(endpoint).trouble.unwrap_or_default().to_owned(),
        }
    });
    let mut idempotent: Vec<_> =
        ready().flat_map(|endpoint| endpoint.idempotent.iter().map(ToString::to_string)).collect();
    idempotent.sort();
    idempotent.dedup();
    let local = state.local();
    let own = local.upstreams.iter().filter(|spec| spec.service == view.name);
    let mut entries: Vec<_> = own.map(|spec| entry(&spec.listen, &spec.options())).collect();
    if let Some(gateway) = &local.doors.gateway {
        entries.push(entry(&format!("http://{gateway}"), &EntryOptions::default()));
    }
    RouteRow {
        service: view.name.to_string(),
        protocol: view.protocol.to_string(),
        entries,
        repeatable: request.filter(|_| view.protocol != Protocol::Tcp).map(|(method, path)| {
            ready().next().is_some() && ready().all(|one| one.is_idempotent(method, path))
        }),
        idempotent,
        instances: instances.collect(),
    }
}

fn entry(listen: &impl ToString, options: &EntryOptions) -> RouteEntry {
    let millis = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let limits = &options.limits;
    RouteEntry {
        listen: listen.to_string(),
        connect_ms: millis(limits.timeout.connect()),
        request_ms: limits.timeout.request.map(|span| millis(span.0)),
        idle_ms: millis(limits.timeout.idle()),
        tries: limits.retry.tries(),
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
