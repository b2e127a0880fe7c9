//! The routes, as one table: what is served is what it says.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::Router;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, StatusCode, Uri};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};
use tracing::info;

use super::blocking::Served;
use super::check::Check;
use super::control::{
    Control, Drain, ExposeSpec, Lifetime, UpstreamSelector, UpstreamSpec, one_or_more,
};
use super::events::{EventsQuery, events};
use super::openapi::{Parameter, Route, delete, document, get, post, put};
use super::outlook::{Outlook, Tally};
use super::problem::Refusal;
use super::{ApiState, Readiness, SettingView, breakers, calls, consul, effective, views};
use crate::model::{
    Capacity, Entry, InstanceId, MemberId, MemberName, Protocol, RequestPattern, ServiceName,
    Target, Weight, expected_one_of, nearest,
};
use crate::proxy::{ProxyProtocol, WrittenCheck};
use crate::runtime::clock;
use crate::telemetry::{BreakerGauges, EndpointLabels, Log, LoggingError};
use crate::transport::enrolment::{InviteOptions, Parting};

/// Longest body, in bytes: the largest command is a few hundred.
const BODY_LEN_MAX: usize = 64 * 1024;
/// Longest time for a body to arrive: it comes from this machine.
const BODY_TIME_MAX: Duration = Duration::from_secs(10);

type Answer = Result<Response, Refusal>;

const INDEX: Parameter = Parameter {
    name: "index",
    text: "X-Consul-Index of an earlier answer: waits until it differs",
};
const WAIT: Parameter = Parameter {
    name: "wait",
    text: "How long to wait, 5m unless set, at most 10m; a little is added",
};
const DC: Parameter = Parameter { name: "dc", text: "Only nodes of this region; all unless set" };
const NEAR: Parameter =
    Parameter { name: "near", text: "A node, or _agent: those of its zone and region first" };
const TAG: Parameter = Parameter { name: "tag", text: "Only instances with this tag; repeatable" };
const NOTE: Parameter = Parameter { name: "note", text: "Shown in listings of this machine" };
const PASSING: Parameter = Parameter { name: "passing", text: "Only instances that take work" };

/// Every route: what is served and what `/openapi.json` tells are made of this.
fn table() -> Vec<Route> {
    vec![
        get("/live", "200 while the agent runs", live),
        get("/ready", "200 while the data plane can serve, else 503", ready),
        get("/metrics", "Metrics in the format of OpenMetrics 1.0", metrics),
        get("/openapi.json", "This document", openapi),
        get("/v1/agent/self", "This agent", consul::agent_self),
        get("/v1/agent/members", "All members", consul::agent_members),
        get("/v1/agent/services", "What this machine offers", consul::agent_services),
        put(
            "/v1/agent/service/register",
            "Offer an instance with its checks, over restarts; the same ID again replaces it. Meta is \
             not kept",
            consul::register,
        )
        .body(r#"{"Name":"web","ID":"web-1","Port":8080,"Check":{"TTL":"30s"}}"#),
        put("/v1/agent/service/deregister/{id}", "Take an instance back", consul::deregister),
        get("/v1/agent/checks", "The checks of this machine's instances", consul::agent_checks),
        put("/v1/agent/check/pass/{id}", "Say that all is well: a check with a TTL", consul::pass)
            .query(&[NOTE]),
        put("/v1/agent/check/warn/{id}", "The same, but worth a look", consul::warn).query(&[NOTE]),
        put("/v1/agent/check/fail/{id}", "Say that the instance takes no work", consul::fail)
            .query(&[NOTE]),
        put(
            "/v1/agent/service/maintenance/{id}",
            "Take an instance out of rotation, or back in; over restarts",
            consul::maintenance,
        )
        .query(&[
            Parameter { name: "enable", text: "true or false; must be said" },
            Parameter { name: "reason", text: "Shown in listings of this machine" },
        ]),
        put(
            "/v1/agent/join/{address}",
            "Ask this address (ip or ip:port) for members of this mesh, too; answered at once",
            consul::join,
        ),
        put(
            "/v1/agent/force-leave/{node}",
            "Hide a member that is down or left from listings here, until it is back",
            consul::force_leave,
        ),
        put(
            "/v1/agent/reload",
            "Read the files again and apply all of them that needs no restart, or nothing",
            reload,
        ),
        put("/v1/agent/leave", "Leave the mesh for good and stop", leave),
        get("/v1/catalog/services", "All services with their tags", consul::catalog_services)
            .query(&[DC, INDEX, WAIT]),
        get(
            "/v1/catalog/service/{name}",
            "The instances of a service, well or not",
            consul::catalog_service,
        )
        .query(&[TAG, DC, NEAR, INDEX, WAIT]),
        get("/v1/catalog/nodes", "All nodes", consul::catalog_nodes)
            .query(&[DC, NEAR, INDEX, WAIT]),
        get(
            "/v1/health/service/{name}",
            "The instances of a service with their checks",
            consul::health_service,
        )
        .query(&[PASSING, TAG, DC, NEAR, INDEX, WAIT]),
        get("/v1/mesh/members", "All members, this one included", members),
        get("/v1/mesh/services", "All services", services),
        get("/v1/mesh/endpoints/{svc}", "The instances of a service", endpoints),
        get("/v1/mesh/breakers", "Whom calls avoid, by whose word and why", list_breakers),
        get("/v1/mesh/routes", "What would happen to a call", list_routes).query(&[
            Parameter { name: "service", text: "Only calls of this service" },
            Parameter { name: "method", text: "Of the request, with path" },
            Parameter { name: "path", text: "Of the request, with method" },
        ]),
        get("/v1/mesh/ping/{svc}", "Calls every instance of a service once", ping),
        get(
            "/v1/mesh/events",
            "What happened: an array, or a stream with Accept application/x-ndjson or \
             text/event-stream",
            list_events,
        )
        .query(&[
            Parameter { name: "since", text: "A duration (30m) or milliseconds since 1970" },
            Parameter { name: "subject", text: "Only about this member, service or instance" },
            Parameter { name: "follow", text: "Go on for ever, in lines" },
        ]),
        get("/v1/mesh/certs", "Certificates, the soonest to end first", certs).query(&[
            Parameter { name: "all", text: "true: those of all members, too" },
            Parameter { name: "expiring", text: "Only those that end within this, 30d" },
        ]),
        get("/v1/mesh/check", "What is well and what is wrong, and what to do about it", check),
        get("/v1/mesh/net", "The way to every other member", net),
        get("/v1/mesh/log", "What the log lets through, and its last lines", log),
        put("/v1/mesh/log", "Change what the log lets through, until the agent restarts", set_log)
            .body(r#"{"filter":"debug"}"#),
        get("/v1/mesh/config", "Effective settings and their origin", config),
        get("/v1/mesh/expose", "What this machine offers", exposed),
        post("/v1/mesh/expose", "Offer an instance, over restarts", expose)
            .body(r#"{"name":"web","to":"127.0.0.1:8080"}"#),
        delete("/v1/mesh/expose/{id}", "Take an instance back", unexpose),
        get("/v1/mesh/upstream", "The entries of this machine", upstreams),
        post("/v1/mesh/upstream", "Open an entry, over restarts", upstream)
            .body(r#"{"service":"db","listen":"127.0.0.1:5432"}"#),
        delete("/v1/mesh/upstream", "Close entries: say exactly one of the two", close_upstream)
            .query(&[
                Parameter { name: "service", text: "All of this service" },
                Parameter { name: "listen", text: "The one that listens there" },
            ]),
        get("/v1/mesh/drain", "What this machine offers, and what it has in flight", rotation),
        post(
            "/v1/mesh/drain",
            "Take this member or an instance of it out of rotation, over restarts; 200 once nothing \
             is in flight, 202 when something still is after the timeout",
            drain,
        )
        .body(r#"{"instance":"web","timeout":"30s"}"#),
        delete("/v1/mesh/drain", "Take it back in", end_drain)
            .query(&[Parameter { name: "instance", text: "Which; the whole member unless set" }]),
        post("/v1/mesh/entries", "Spread an entry that was signed elsewhere", publish)
            .body(r#"{"entry":"BASE64"}"#),
        post("/v1/mesh/grants", "Say what a member may offer; on an issuer", grant)
            .body(r#"{"node":"two","services":["web"]}"#),
        get("/v1/mesh/issuers", "All issuers", issuers),
        post(
            "/v1/mesh/issuers/{node}/key",
            "Ask a member for the public half of its issuing key",
            issuing_key,
        ),
        post(
            "/v1/mesh/issuers/{node}/keep",
            "Vouch for the members that only this issuer vouches for",
            keep_members,
        ),
        get("/v1/mesh/invites", "The invites of this issuer", invites),
        post("/v1/mesh/invites", "Make an invite; on an issuer", invite)
            .body(r#"{"ttl":"1h","uses":1}"#),
        delete("/v1/mesh/invites/{id}", "Take an invite back", revoke_invite),
    ]
}

/// Routes of later versions: `*` stands for the rest.
const LATER: &[&str] = &[
    "/",
    "/v1/agent/service/*",
    "/v1/agent/check/register",
    "/v1/agent/check/deregister/*",
    "/v1/agent/check/update/*",
    "/v1/catalog/*",
    "/v1/health/*",
    "/v1/mesh/edges",
    "/v1/mesh/stat",
    "/v1/mesh/policy",
    "/v1/mesh/routes",
    "/v1/mesh/explain",
    "/v1/mesh/tap",
    "/v1/mesh/fault",
];

/// Method and path of every route served.
pub fn routes() -> Vec<(Method, &'static str)> {
    table().into_iter().map(|route| (route.method, route.path)).collect()
}

/// The router of all routes; every other path and method has its own answer.
pub(super) fn router(state: ApiState) -> Router {
    let all =
        table().into_iter().fold(Router::new(), |all, route| all.route(route.path, route.handler));
    let served = Served::new(state);
    all.fallback(not_found).method_not_allowed_fallback(wrong_method).with_state(served)
}

async fn openapi() -> Json<Value> {
    Json(document(&table()))
}

async fn not_found(uri: Uri) -> Refusal {
    let path = uri.path();
    let is_later = |pattern: &&str| match pattern.strip_suffix('*') {
        Some(prefix) => path.starts_with(prefix),
        None => path == *pattern,
    };
    let shown: String = path.chars().take(120).collect();
    let shown = if path == "/" { "the dashboard".to_owned() } else { shown };
    let (word, title, what) = match LATER.iter().any(is_later) {
        true => ("not_yet", "Not available yet", format!("{shown} comes with a later version")),
        false => ("no_route", "No such route", format!("there is no {shown}")),
    };
    let routes = table();
    let way_on = instead(path, routes.iter().map(|route| route.path)).unwrap_or_else(|| {
        "try /v1/mesh/members, /v1/mesh/services, /metrics or /openapi.json".to_owned()
    });
    Refusal::new(StatusCode::NOT_FOUND, word, title, format!("{what}; {way_on}"))
}

/// Words that are told to whoever wrote another; of more only the nearest.
const TOLD_MAX: usize = 6;

/// What could stand in `path`, where one word of it keeps it from being one of `routes`.
fn instead<'a>(path: &str, routes: impl Iterator<Item = &'a str>) -> Option<String> {
    let asked: Vec<_> = path.split('/').collect();
    let mut words: BTreeMap<usize, BTreeSet<&str>> = BTreeMap::new();
    for route in routes {
        let known: Vec<_> = route.split('/').collect();
        let is_wrong = |at: &usize| !known[*at].starts_with('{') && asked[*at] != known[*at];
        let mut wrong = (0..asked.len().min(known.len())).filter(is_wrong);
        if let (Some(at), None) = (wrong.next(), wrong.next())
            && known.len() == asked.len()
        {
            words.entry(at).or_default().insert(known[at]);
        }
    }
    let (at, known) = words.into_iter().next()?;
    let wrong: String = asked[at].chars().take(40).collect();
    let known: Vec<_> = known.into_iter().collect();
    match known.len() <= TOLD_MAX {
        true => Some(format!("for '{wrong}' {}", expected_one_of(&wrong, &known))),
        false => nearest(&wrong, known).map(|near| format!("did you mean '{near}'?")),
    }
}

async fn wrong_method(method: Method, uri: Uri) -> Refusal {
    let detail = format!("{} does not take {method}", uri.path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "method", "Not this way", detail)
}

async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

async fn ready(State(state): State<ApiState>) -> Answer {
    match state.readiness() {
        Readiness::Ready => Ok(Json(json!({ "ready": true })).into_response()),
        Readiness::NotReady(reason) => {
            let status = StatusCode::SERVICE_UNAVAILABLE;
            Err(Refusal::new(status, "not_ready", "Not ready", reason))
        }
    }
}

async fn metrics(State(state): State<ApiState>) -> Answer {
    let snapshot = state.snapshot();
    let mut members: BTreeMap<&'static str, i64> =
        ["alive", "suspect", "restarting", "down", "left"].map(|word| (word, 0)).into();
    for view in snapshot.members.values() {
        *members.entry(view.state.as_str()).or_default() += 1;
    }
    state.metrics.set_members(members);
    let outlooks: Vec<_> = snapshot
        .services
        .values()
        .map(|view| (view, Outlook::new(&state, &snapshot, view)))
        .collect();
    let mut endpoints: BTreeMap<(&str, &'static str), i64> = BTreeMap::new();
    for (view, outlook) in &outlooks {
        for at in 0..view.endpoints().len() {
            *endpoints.entry((view.name.as_str(), outlook.state_word(at))).or_default() += 1;
        }
    }
    state.metrics.set_endpoints(endpoints.into_iter().map(|((service, state), count)| {
        (EndpointLabels { service: service.to_owned(), state }, count)
    }));
    state.metrics.set_breakers(outlooks.iter().map(|(view, outlook)| {
        let Tally { ejected, ejected_here, avoided, .. } = outlook.tally(0..view.endpoints().len());
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        BreakerGauges {
            service: view.name.to_string(),
            is_panic: view.is_panic,
            is_failing: view.is_failing,
            ejected: [("mesh", count(ejected)), ("local", count(ejected_here))],
            avoided: count(avoided),
        }
    }));
    let text = state.metrics.encode().map_err(|_| {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Refusal::new(status, "failed", "The agent failed", "the metrics could not be written")
    })?;
    let mut response = Response::new(text.into());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    Ok(response)
}

async fn leave(State(state): State<ApiState>) -> Answer {
    Control::ask(&state.control, |reply| Control::Leave { reply }).await?;
    Ok(Json(json!({ "left": true })).into_response())
}

async fn reload(State(state): State<ApiState>) -> Answer {
    let reloaded = Control::ask(&state.control, |reply| Control::Reload { reply }).await?;
    Ok(Json(reloaded).into_response())
}

async fn members(State(state): State<ApiState>) -> Json<Vec<views::Member>> {
    Json(views::members(&state))
}

async fn services(State(state): State<ApiState>) -> Json<Vec<views::Service>> {
    Json(views::services(&state))
}

async fn endpoints(State(state): State<ApiState>, Path(service): Path<String>) -> Answer {
    let service = named::<ServiceName>(&service)?;
    Ok(Json(views::endpoints(&state, &service)).into_response())
}

async fn list_breakers(State(state): State<ApiState>) -> Json<Vec<breakers::BreakerRow>> {
    Json(breakers::breakers(&state))
}

/// The call that `GET /v1/mesh/routes` is about; all services when none is named.
#[derive(Clone, Debug, Deserialize)]
struct RoutesQuery {
    service: Option<String>,
    method: Option<String>,
    path: Option<String>,
}

async fn list_routes(
    State(state): State<ApiState>,
    query: Result<Query<RoutesQuery>, QueryRejection>,
) -> Answer {
    let Query(query) = query.map_err(|error| Refusal::malformed(error.body_text()))?;
    let service = query.service.as_deref().map(named::<ServiceName>).transpose()?;
    let request = query.method.as_deref().zip(query.path.as_deref());
    if request.is_none() && (query.method.is_some() || query.path.is_some()) {
        return Err(Refusal::malformed("expected a method and a path, or neither"));
    }
    if let Some((method, path)) = request {
        let is_method = !method.is_empty() && method.bytes().all(|byte| byte.is_ascii_uppercase());
        if !is_method || !path.starts_with('/') {
            return Err(Refusal::malformed(format!(
                "'{method} {path}' is no request: expected a method in capital letters and a path from / \
                 on, such as GET /items"
            )));
        }
    }
    Ok(Json(calls::routes(&state, service.as_ref(), request)).into_response())
}

async fn ping(State(state): State<ApiState>, Path(service): Path<String>) -> Answer {
    let service = named::<ServiceName>(&service)?;
    Ok(Json(calls::ping(&state, &service).await).into_response())
}

async fn list_events(
    State(state): State<ApiState>,
    query: Result<Query<EventsQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Answer {
    let Query(query) = query.map_err(|error| Refusal::malformed(error.body_text()))?;
    events(&state, &query, &headers)
}

/// What `GET /v1/mesh/certs` lists: by default this member's own chain.
#[derive(Clone, Debug, Deserialize)]
struct CertsQuery {
    #[serde(default)]
    all: bool,
    /// For instance `30d`.
    expiring: Option<String>,
}

async fn certs(
    State(state): State<ApiState>,
    query: Result<Query<CertsQuery>, QueryRejection>,
) -> Answer {
    let Query(query) = query.map_err(|error| Refusal::malformed(error.body_text()))?;
    let within = query.expiring.as_deref().map(duration).transpose()?;
    let mut rows = views::certs(&state, query.all);
    if let Some(within) = within {
        let until = clock::unix_seconds().saturating_add(within.as_secs());
        rows.retain(|row| row.not_after <= until);
    }
    Ok(Json(rows).into_response())
}

async fn check(State(state): State<ApiState>) -> Json<Vec<Check>> {
    Json(state.checks.clone().run(state).await)
}

async fn net(State(state): State<ApiState>) -> Json<Vec<views::Net>> {
    Json(views::net(&state))
}

/// The body of `PUT /v1/mesh/log`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogRequest {
    /// A level (`debug`), or levels of modules (`warn,murmesh=debug`).
    pub filter: String,
}

fn own_log(state: &ApiState) -> Result<&Log, Refusal> {
    let absent = || {
        let detail = "this agent is part of another program, which has its own log";
        Refusal::new(StatusCode::CONFLICT, "no_log", "No log of its own", detail)
    };
    state.log.log().ok_or_else(absent)
}

async fn log(State(state): State<ApiState>) -> Answer {
    let log = own_log(&state)?;
    Ok(Json(json!({ "filter": log.filter(), "tail": log.tail() })).into_response())
}

async fn set_log(State(state): State<ApiState>, request: Request) -> Answer {
    let LogRequest { filter } = body(request).await?;
    let log = own_log(&state)?;
    let malformed = |error: LoggingError| Refusal::malformed(error.to_string());
    log.set_filter(&filter).map_err(malformed)?;
    info!(filter, "log filter changed");
    Ok(Json(LogRequest { filter: log.filter() }).into_response())
}

async fn config(State(state): State<ApiState>) -> Json<Vec<SettingView>> {
    Json(effective::config(&state))
}

async fn exposed(State(state): State<ApiState>) -> Response {
    let exposed = state.local().exposed.clone();
    let shown: Vec<_> = exposed.into_iter().map(ExposeSpec::without_secrets).collect();
    Json(shown).into_response()
}

/// The body of `POST /v1/mesh/expose`: what is absent has its default.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExposeRequest {
    /// The service.
    pub name: ServiceName,
    /// Where the instance listens.
    pub to: Target,
    /// Unique on this machine; the service's name unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<InstanceId>,
    /// The natural port of the service; that of `to` unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// `tcp` unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Free words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Its share; 100 unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<Weight>,
    /// Requests that may be sent twice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub idempotent: Vec<RequestPattern>,
    /// How many calls it takes at a time.
    #[serde(default, skip_serializing_if = "Capacity::is_unlimited")]
    pub inflight: Capacity,
    /// `v2` for an instance that expects to be told who calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// All of these must pass, or it takes no work.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "one_or_more")]
    pub health: Vec<WrittenCheck>,
}

/// The answer to `POST /v1/mesh/expose`: 201 for a new instance, 200 for one that was there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exposed {
    /// The instance as it is offered now.
    #[serde(flatten)]
    pub spec: ExposeSpec,
    /// What is different from the instance that it replaces; absent for a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<Vec<String>>,
}

async fn expose(State(state): State<ApiState>, request: Request) -> Answer {
    let asked: ExposeRequest = body(request).await?;
    let malformed = |error: &dyn std::fmt::Display| Refusal::malformed(error.to_string());
    let mut spec = ExposeSpec::new(asked.name, asked.to).map_err(|error| malformed(&error))?;
    spec.id = asked.id.unwrap_or(spec.id);
    spec.port = asked.port.unwrap_or(spec.port);
    spec.protocol = asked.protocol.unwrap_or_default();
    spec.tags = asked.tags;
    spec.weight = asked.weight.unwrap_or_default();
    spec.idempotent = asked.idempotent;
    spec.inflight = asked.inflight;
    spec.proxy_protocol = asked.proxy_protocol;
    let checks = asked.health.into_iter().map(WrittenCheck::strict).collect::<Result<_, _>>();
    spec.checks = checks.map_err(|error| malformed(&format_args!("health: {error}")))?;
    let spec = spec.check().map_err(|error| malformed(&error))?;
    let accepted = spec.clone();
    let lifetime = Lifetime::Restarts;
    let expose = |reply| Control::Expose { spec, lifetime, reply };
    let replaced = Control::ask(&state.control, expose).await?;
    let (status, changes) = match replaced {
        Some(before) => (StatusCode::OK, Some(accepted.changes_since(&before))),
        None => (StatusCode::CREATED, None),
    };
    Ok((status, Json(Exposed { spec: accepted, changes })).into_response())
}

async fn unexpose(State(state): State<ApiState>, Path(id): Path<String>) -> Answer {
    let id = named::<InstanceId>(&id)?;
    Control::ask(&state.control, |reply| Control::Unexpose { id, reply }).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn upstreams(State(state): State<ApiState>) -> Response {
    Json(&state.local().upstreams).into_response()
}

async fn upstream(State(state): State<ApiState>, request: Request) -> Answer {
    let asked: UpstreamSpec = body(request).await?;
    let spec = asked.check().map_err(|error| Refusal::malformed(error.to_string()))?;
    let lifetime = Lifetime::Restarts;
    let open = |reply| Control::Upstream { spec, lifetime, reply };
    let opened = Control::ask(&state.control, open).await?;
    Ok((StatusCode::CREATED, Json(opened)).into_response())
}

/// Which entries `DELETE /v1/mesh/upstream` closes: exactly one of the two.
#[derive(Clone, Debug, Deserialize)]
struct UpstreamQuery {
    service: Option<String>,
    listen: Option<String>,
}

async fn close_upstream(
    State(state): State<ApiState>,
    query: Result<Query<UpstreamQuery>, QueryRejection>,
) -> Answer {
    let Query(query) = query.map_err(|error| Refusal::malformed(error.body_text()))?;
    let which = match (query.service, query.listen) {
        (Some(service), None) => UpstreamSelector::Service(named(&service)?),
        (None, Some(listen)) => UpstreamSelector::Listen(named(&listen)?),
        _ => return Err(Refusal::malformed("say either ?service=NAME or ?listen=ADDRESS")),
    };
    let closed =
        Control::ask(&state.control, |reply| Control::CloseUpstreams { which, reply }).await?;
    Ok(Json(closed).into_response())
}

async fn rotation(State(state): State<ApiState>) -> Json<views::Rotation> {
    Json(views::rotation(&state))
}

/// The body of `POST /v1/mesh/drain`: what is absent has its default.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Which instance; the whole member unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// How long the answer may wait until nothing is in flight: `30s` unless set, at most 10 min.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// Also the last ready instance of a service.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// How long the answer to a drain may wait: as long as a blocking query.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(600);
/// How long it waits unless told: what an agent that stops gives, too.
const DRAIN_TIME: Duration = Duration::from_secs(30);
/// How often it looks. Nobody is told when a call ends: the data plane has better things to do.
const DRAIN_LOOK_INTERVAL: Duration = Duration::from_millis(50);

async fn drain(State(state): State<ApiState>, request: Request) -> Answer {
    let asked: DrainRequest = body(request).await?;
    let time = asked.timeout.as_deref().map_or(Ok(DRAIN_TIME), duration)?;
    if time > DRAIN_TIME_MAX {
        return Err(Refusal::malformed("timeout: expected at most 10min"));
    }
    let how = if asked.force { Drain::Force } else { Drain::Begin };
    let instance = asked.instance.clone();
    let drain = |reply| Control::Drain { instance, drain: how, reply };
    Control::ask(&state.control, drain).await?;
    let look = || {
        let mut rotation = views::rotation(&state);
        let is_meant = |id: &str| asked.instance.as_ref().is_none_or(|asked| asked.as_str() == id);
        rotation.instances.retain(|row| is_meant(&row.instance));
        let is_empty = rotation.instances.iter().all(|row| row.inflight == 0);
        (is_empty, rotation)
    };
    let empty = async {
        while !look().0 {
            sleep(DRAIN_LOOK_INTERVAL).await;
        }
    };
    let _ = timeout(time, empty).await; // the answer says whether it is
    let (is_empty, rotation) = look();
    let status = if is_empty { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(rotation)).into_response())
}

#[derive(Clone, Debug, Deserialize)]
struct DrainQuery {
    instance: Option<String>,
}

async fn end_drain(
    State(state): State<ApiState>,
    query: Result<Query<DrainQuery>, QueryRejection>,
) -> Answer {
    let Query(query) = query.map_err(|error| Refusal::malformed(error.body_text()))?;
    let instance = query.instance.as_deref().map(named::<InstanceId>).transpose()?;
    let end = |reply| Control::Drain { instance, drain: Drain::End, reply };
    Control::ask(&state.control, end).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The body of `POST /v1/mesh/invites`: what is absent has its default.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    /// `1h` unless set; at most 30 days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
    /// 1 unless set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses: Option<u32>,
    /// The only name that it lets in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<MemberName>,
    /// The only services that whoever joins may offer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<Vec<ServiceName>>,
}

/// A token that lies around for longer is a key that somebody finds.
const INVITE_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3_600);

async fn invite(State(state): State<ApiState>, request: Request) -> Answer {
    let asked: InviteRequest = body(request).await?;
    let ttl = asked.ttl.as_deref().map_or(Ok(Duration::from_secs(3_600)), duration)?;
    if ttl.is_zero() || ttl > INVITE_TTL_MAX {
        return Err(Refusal::malformed("an invite holds for 1s to 30days"));
    }
    let uses = asked.uses.unwrap_or(1);
    if !(1..=1_000).contains(&uses) {
        return Err(Refusal::malformed("an invite has 1 to 1000 uses"));
    }
    let options = InviteOptions { ttl, uses, name: asked.name, services: asked.services };
    let made = Control::ask(&state.control, |reply| Control::Invite { options, reply }).await?;
    let body = json!({
        "id": made.id.to_string(),
        "token": made.token,
        "expires_at": made.expires_at,
    });
    Ok((StatusCode::CREATED, Json(body)).into_response())
}

async fn invites(State(state): State<ApiState>) -> Answer {
    let made = Control::ask(&state.control, |reply| Control::Invites { reply }).await?;
    let now = clock::unix_seconds();
    let snapshot = state.snapshot.borrow().clone();
    let rows: Vec<_> = made.iter().map(|view| views::invite(view, &snapshot, now)).collect();
    Ok(Json(rows).into_response())
}

async fn revoke_invite(State(state): State<ApiState>, Path(id): Path<String>) -> Answer {
    let id = named::<MemberId>(&id)?;
    Control::ask(&state.control, |reply| Control::RevokeInvite { id, reply }).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn issuers(State(state): State<ApiState>) -> Json<Vec<views::IssuerRow>> {
    Json(views::issuers(&state))
}

async fn issuing_key(State(state): State<ApiState>, Path(node): Path<String>) -> Answer {
    let name = named::<MemberName>(&node)?;
    let asked = Control::ask(&state.control, |reply| Control::IssuingKey { name, reply });
    let (member, key) = asked.await?;
    Ok(Json(views::IssuingKey { member, key }).into_response())
}

/// The body of `POST /v1/mesh/issuers/{node}/keep`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepRequest {
    /// Those that are to go with the issuer that let them in, by their names, their ids or the first
    /// 12 digits of these.
    #[serde(default)]
    pub drop: Vec<MemberName>,
}

async fn keep_members(
    State(state): State<ApiState>,
    Path(issuer): Path<String>,
    request: Request,
) -> Answer {
    let issuer = named::<MemberId>(&issuer)?;
    let KeepRequest { drop: dropped } = body(request).await?;
    let keep = |reply| Control::KeepMembers { issuer, dropped, reply };
    let Parting { kept, dropped, replaced } = Control::ask(&state.control, keep).await?;
    let of = |stays| {
        move |(member, name): (MemberId, MemberName)| {
            let name = Some(name);
            views::KeptMember { member, name, stays }
        }
    };
    let mut rows: Vec<_> = kept.into_iter().map(of(true)).collect();
    rows.extend(dropped.into_iter().map(of(false)));
    let replaced = replaced.into_iter();
    rows.extend(replaced.map(|member| views::KeptMember { member, name: None, stays: false }));
    Ok(Json(rows).into_response())
}

/// The body of `POST /v1/mesh/grants`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantRequest {
    /// Whom it is about: an enrolled member.
    pub node: MemberName,
    /// The only services that it may offer; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<Vec<ServiceName>>,
}

async fn grant(State(state): State<ApiState>, request: Request) -> Answer {
    let GrantRequest { node: name, services } = body(request).await?;
    let grant = |reply| Control::Grant { name, services, reply };
    let withdrawn = Control::ask(&state.control, grant).await?;
    Ok(Json(json!({ "granted": true, "withdrawn": withdrawn })).into_response())
}

/// The body of `POST /v1/mesh/entries`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryRequest {
    /// A signed entry in base64.
    entry: String,
}

/// Carries what somebody entitled signed: the API itself has no key.
async fn publish(State(state): State<ApiState>, request: Request) -> Answer {
    let asked: EntryRequest = body(request).await?;
    let malformed = |error: &dyn ToString| Refusal::malformed(error.to_string());
    let bytes = BASE64_STANDARD.decode(&asked.entry).map_err(|error| malformed(&error))?;
    let entry = Entry::decode(bytes.into()).map_err(|error| malformed(&error))?;
    Control::ask(&state.control, |reply| Control::Publish { entry, reply }).await?;
    Ok(Json(json!({ "published": true })).into_response())
}

pub(super) fn named<T: std::str::FromStr<Err: ToString>>(text: &str) -> Result<T, Refusal> {
    text.parse().map_err(|error: T::Err| Refusal::malformed(error.to_string()))
}

fn duration(text: &str) -> Result<Duration, Refusal> {
    humantime::parse_duration(text).map_err(|_| {
        let shown: String = text.chars().take(40).collect();
        Refusal::malformed(format!("'{shown}' is no duration with a unit, for instance 30s"))
    })
}

async fn body<T: DeserializeOwned>(request: Request) -> Result<T, Refusal> {
    let bytes = whole_body(request).await?;
    serde_json::from_slice(&bytes).map_err(|error| Refusal::malformed(error.to_string()))
}

pub(super) async fn whole_body(request: Request) -> Result<Bytes, Refusal> {
    let limited = Limited::new(request.into_body(), BODY_LEN_MAX).collect();
    let collected = timeout(BODY_TIME_MAX, limited).await.map_err(|_| {
        let detail = format!("the body did not arrive within {BODY_TIME_MAX:?}");
        Refusal::new(StatusCode::REQUEST_TIMEOUT, "body_time", "Too slow", detail)
    })?;
    match collected {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            let detail = format!("the body is over {BODY_LEN_MAX} bytes");
            Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "body_len", "Too long", detail))
        }
        Err(_) => Err(Refusal::malformed("the body broke off")),
    }
}
