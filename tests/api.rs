//! The local API over real sockets, with a stand-in for the agent behind it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use murmesh::api::{
    ApiState, ApiToken, CallView, Calls, Check, Checks, Control, ControlError, Effective,
    ExposeSpec, Identity, Links, Listener, Local, LogSlot, Pinger, Problem, Readiness,
    UpstreamSpec, routes, serve,
};
use murmesh::breaker::Verdict;
use murmesh::mesh::{
    Endpoint, EndpointState, Enrolled, MemberView, Rotation, ServiceView, Snapshot,
};
use murmesh::model::{
    Enrolment, Epoch, MemberId, MemberPhase, MemberState, MeshId, Moment, Protocol, PublicKey,
    Weight,
};
use murmesh::proxy::{EndpointReport, Preview};
use murmesh::runtime::clock::Clock;
use murmesh::runtime::{Shutdown, TaskGroup};
use murmesh::telemetry::{Door, EventKind, EventLog, Metrics};
use murmesh::tls::testing::mesh_of;
use murmesh::transport::enrolment::Parting;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::support::{SOON, beside_others, raise_file_limit, skip};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

struct Api {
    address: SocketAddr,
    state: ApiState,
    snapshot: watch::Sender<Arc<Snapshot>>,
    local: watch::Sender<Arc<Local>>,
    readiness: watch::Sender<Readiness>,
    _tasks: TaskGroup,
}

fn snapshot() -> Snapshot {
    let me = MemberId::from_bytes([1; 16]);
    let member = MemberView {
        id: me,
        name: "eins".parse().unwrap(),
        address: "10.0.0.1:7370".parse().unwrap(),
        zone: "eu1/a".to_owned(),
        state: MemberState::Alive,
        phase: MemberPhase::Running,
        is_revoked: false,
        epoch: Epoch(7),
        version: 3,
        services: vec!["web".parse().unwrap()],
        changed_at: Moment::START,
    };
    let endpoint = |instance: &str, state| Endpoint {
        instance: instance.parse().unwrap(),
        member: me,
        member_name: member.name.clone(),
        address: member.address,
        port: 8080,
        tags: vec!["v2".to_owned()],
        weight: Weight(100),
        state,
        zone: "".into(),
        idempotent: Default::default(),
        capacity: Default::default(),
        verdict: Verdict::Clear,
        rotation: Rotation::default(),
        changed_at: Moment::START,
    };
    let service = ServiceView::new(
        "web".parse().unwrap(),
        Protocol::Tcp,
        vec![endpoint("web", EndpointState::Ready), endpoint("web-2", EndpointState::Down)],
    );
    let mut snapshot = Snapshot::default();
    snapshot.services.insert(service.name.clone(), Arc::new(service));
    let enrolment = Enrolment {
        key: PublicKey([7; 32]),
        name: member.name.clone(),
        serial: 1,
        services: None,
        issued_at: 0,
        invite: None,
        replaces: Vec::new(),
        let_in_by: None,
    };
    snapshot.enrolments.insert(me, Enrolled { issuer: me, enrolment: Arc::new(enrolment) });
    snapshot.members.insert(me, Arc::new(member));
    snapshot
}

fn with_endpoints(service: &ServiceView, endpoints: Vec<Endpoint>) -> Arc<ServiceView> {
    Arc::new(ServiceView::new(service.name.clone(), service.protocol, endpoints))
}

/// What the stand-in has under the ids `old` and `same` already.
fn replaced_by(spec: &ExposeSpec) -> Option<ExposeSpec> {
    match spec.id.as_str() {
        "old" => Some(ExposeSpec { weight: Weight(7), tags: vec!["v1".into()], ..spec.clone() }),
        "same" => Some(spec.clone()),
        _ => None,
    }
}

fn identity() -> Identity {
    let credentials = mesh_of(&["eins"]).unwrap().remove(0);
    Identity { credentials, renews_at: 4_000_000_000, degraded: None, disowned: None }
}

/// An agent that says yes, except to the instance `nobody`.
async fn stand_in(mut commands: mpsc::Receiver<Control>) {
    while let Some(command) = commands.recv().await {
        match command {
            Control::Expose { spec, reply, .. } => drop(reply.send(Ok(replaced_by(&spec)))),
            Control::Leave { reply } | Control::RevokeInvite { reply, .. } => {
                drop(reply.send(Ok(())))
            }
            Control::Unexpose { id, reply } | Control::Maintain { id, reply, .. } => {
                drop(reply.send(match id.as_str() {
                    "nobody" => {
                        Err(ControlError::NotFound { what: "instance", name: id.to_string() })
                    }
                    _ => Ok(()),
                }));
            }
            Control::Join { reply, .. }
            | Control::Drain { reply, .. }
            | Control::TellCheck { reply, .. } => {
                drop(reply.send(Ok(())));
            }
            Control::Upstream { spec, reply, .. } => drop(reply.send(Ok(spec))),
            Control::CloseUpstreams { reply, .. } => drop(reply.send(Ok(Vec::new()))),
            Control::Forget { reply, .. } => drop(reply.send(Ok(()))),
            Control::Reload { reply } => drop(reply.send(Err(ControlError::Stopping))),
            Control::Invite { reply, .. } => drop(reply.send(Err(ControlError::NotIssuer))),
            Control::IssuingKey { reply, .. } => drop(reply.send(Err(ControlError::Stopping))),
            Control::KeepMembers { reply, .. } => drop(reply.send(Ok(Parting::default()))),
            Control::Grant { reply, .. } => drop(reply.send(Ok(Vec::new()))),
            Control::Publish { reply, .. } => drop(reply.send(Ok(()))),
            Control::Invites { reply } => drop(reply.send(Ok(Vec::new()))),
        }
    }
}

async fn api() -> Api {
    api_that_forgets_after(Duration::from_secs(72 * 3_600)).await
}

async fn api_that_forgets_after(forget_after: Duration) -> Api {
    let (control, commands) = mpsc::channel(8);
    let (readiness, watched) = watch::channel(Readiness::Ready);
    let (snapshot, snapshots) = watch::channel(Arc::new(snapshot()));
    let (local, locals) = watch::channel(Arc::new(Local::default()));
    let state = ApiState {
        certificates: Arc::default(),
        me: MemberId::from_bytes([1; 16]),
        name: "eins".parse().unwrap(),
        mesh: MeshId([9; 32]),
        snapshot: snapshots,
        local: locals,
        identity: Arc::new(ArcSwap::from_pointee(identity())),
        calls: Calls::new(
            |endpoint| CallView {
                report: EndpointReport { in_flight: 4, ..EndpointReport::default() },
                trouble: (endpoint.instance.as_str() == "web-4").then_some("unreachable"),
            },
            BTreeMap::new,
            |_, _| Ok(Preview::default()),
        ),
        health: watch::channel(Arc::default()).1,
        links: Links::new(|_| None),
        pinger: Pinger::new(|_, _| Box::pin(async { Err("unreachable") })),
        checks: Checks::new(|_| Box::pin(async { vec![Check::pass("agent", "ready")] })),
        log: LogSlot::default(),
        readiness: watched,
        control,
        events: EventLog::new("eins"),
        metrics: Metrics::new(),
        effective: Arc::new(ArcSwap::from_pointee(Effective {
            forget_after,
            settings: Vec::new(),
        })),
        clock: Clock::new(),
        token: ApiToken::new(TOKEN),
    };
    let tasks = TaskGroup::new(Shutdown::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn("stand-in", stand_in(commands));
    tasks.spawn("api", serve(vec![Listener::Tcp(listener)], state.clone(), tasks.clone()));
    Api { address, state, snapshot, local, readiness, _tasks: tasks }
}

impl Api {
    /// Sends raw bytes and reads until the other side ends.
    async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
        String::from_utf8(answer).unwrap()
    }

    async fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        let len = body.len();
        let answer = self
            .raw(&format!(
                "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\
                 content-length: {len}\r\n{headers}\r\n{body}",
                self.address
            ))
            .await;
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, "", "").await;
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }

    async fn with_token(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        self.ask(method, path, &format!("authorization: Bearer {TOKEN}\r\n"), body).await
    }
}

/// A path of the table, asked for `web`.
fn filled(path: &str) -> String {
    let segment = |segment: &str| match segment.starts_with('{') {
        true => "web".to_owned(),
        false => segment.to_owned(),
    };
    path.split('/').map(segment).collect::<Vec<_>>().join("/")
}

/// The table is what is served: each of its routes answers, and is none of the two fallbacks.
#[tokio::test]
async fn every_route_of_the_table_is_served() {
    let _turn = beside_others();
    let api = api().await;
    for (method, path) in routes() {
        let path = filled(path).replace("invites/web", &format!("invites/{}", "00".repeat(16)));
        let (status, body) = api.with_token(method.as_str(), &path, "{}").await;
        let is_none = ["no_route", "later version"].iter().any(|word| body.contains(word));
        assert!(!is_none && status != 405, "{method} {path}: {status} {body}");
    }
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_refused_on_every_route_and_counted() {
    let _turn = beside_others();
    let api = api().await;
    let mut asked = 0;
    for (method, path) in routes().into_iter().chain([(hyper::Method::GET, "/nowhere")]) {
        let request = |headers: &str| {
            format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n\r\n")
        };
        let path = filled(path);
        let answer = api.raw(&request("host: evil.example")).await;
        assert!(answer.starts_with("HTTP/1.1 421"), "{method} {path}: {answer}");
        let answer = api.raw(&request("host: localhost\r\norigin: http://evil.example")).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{method} {path}: {answer}");
        asked += 1;
    }
    assert_eq!(api.state.metrics.refused(Door::api, "foreign_host"), asked);
    assert_eq!(api.state.metrics.refused(Door::api, "foreign_origin"), asked);
}

#[tokio::test]
async fn changes_want_the_token_and_reads_do_not() {
    let _turn = beside_others();
    let api = api().await;
    let expose = r#"{"name":"web","to":"127.0.0.1:8080"}"#;
    let (status, body) = api.ask("POST", "/v1/mesh/expose", "", expose).await;
    let problem: Problem = serde_json::from_str(&body).unwrap();
    assert_eq!((status, problem.status, problem.kind.as_str()), (401, 401, "urn:murmesh:token"));
    assert!(problem.detail.contains("api.token"), "says what to try: {}", problem.detail);
    assert_eq!(api.state.metrics.refused(Door::api, "token"), 1);
    let (status, body) = api.with_token("POST", "/v1/mesh/expose", expose).await;
    assert_eq!(status, 201, "{body}");
    assert!(body.contains(r#""port":8080"#), "{body}");
    let consul = format!("x-consul-token: {TOKEN}\r\n");
    assert_eq!(api.ask("PUT", "/v1/agent/leave", &consul, "").await.0, 200);
    assert_eq!(api.ask("GET", "/v1/mesh/config", "", "").await.0, 401);
    assert_eq!(api.with_token("GET", "/v1/mesh/config", "").await.0, 200);
}

#[tokio::test]
async fn exposing_again_tells_what_changed() {
    let _turn = beside_others();
    let api = api().await;
    for (id, status, changes) in [
        ("new", 201, Value::Null),
        ("same", 200, serde_json::json!([])),
        ("old", 200, serde_json::json!(["tags v1 -> none", "weight 7 -> 100"])),
    ] {
        let body = format!(r#"{{"name":"web","to":"127.0.0.1:8080","id":"{id}"}}"#);
        let (answered, text) = api.with_token("POST", "/v1/mesh/expose", &body).await;
        let answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((answered, &answer["changes"]), (status, &changes), "{text}");
    }
}

/// The states are few and fixed; what they do not say is in the reason.
#[tokio::test]
async fn an_endpoint_that_takes_less_work_than_ready_says_has_a_reason() {
    let _turn = beside_others();
    let api = api().await;
    let mut seen = snapshot();
    let me = seen.members.values().next().unwrap().as_ref().clone();
    let suspect = MemberId::from_bytes([2; 16]);
    let view = MemberView { id: suspect, state: MemberState::Suspect, ..me.clone() };
    seen.members.insert(suspect, Arc::new(view));
    let service = seen.services.values_mut().next().unwrap();
    let base = service.endpoints()[0].clone();
    let instance = |id: &str, member, weight, state| Endpoint {
        instance: id.parse().unwrap(),
        member,
        weight: Weight(weight),
        state,
        ..base.clone()
    };
    use EndpointState::{Doubtful, Ready};
    let endpoints = vec![
        instance("web-1", me.id, 100, Ready),
        instance("web-2", me.id, 0, Ready),
        instance("web-3", suspect, 100, Ready),
        instance("web-4", me.id, 100, Ready),
        instance("web-5", me.id, 100, Doubtful),
    ];
    *service = with_endpoints(service, endpoints);
    api.snapshot.send_replace(Arc::new(seen));
    let rows = api.get("/v1/mesh/endpoints/web").await;
    let expected = [
        ("ready", ""),
        ("ready", "its weight is 0: it takes no new work"),
        ("ready", "its node failed a probe and has some seconds to answer"),
        ("ready", "a call from here just failed (unreachable); used as the last resort"),
        ("down", "its node could not be reached from here just now; used as the last resort"),
    ];
    for (row, (state, reason)) in rows.as_array().unwrap().iter().zip(expected) {
        assert_eq!((&row["state"], &row["reason"]), (&state.into(), &reason.into()), "{row}");
    }
}

#[tokio::test]
async fn listings_have_the_promised_shape() {
    let _turn = beside_others();
    let api = api().await;
    let members = api.get("/v1/mesh/members").await;
    let member = &members[0];
    for (field, expected) in [
        ("name", "eins"),
        ("id", "01010101010101010101010101010101"),
        ("address", "10.0.0.1:7370"),
        ("zone", "eu1/a"),
        ("state", "alive"),
    ] {
        assert_eq!(member[field], expected, "{field}");
    }
    assert_eq!((&member["revoked"], &member["draining"]), (&false.into(), &false.into()));
    assert_eq!((&member["epoch"], &member["version"]), (&7.into(), &3.into()));
    assert_eq!(member["services"], serde_json::json!(["web"]));
    assert!(member["age_ms"].is_u64());

    let services = api.get("/v1/mesh/services").await;
    let expected = serde_json::json!([
        {
            "name": "web", "protocol": "tcp", "instances": 2, "ready": 1,
            "ejected": 0, "ejected_here": 0, "avoided": 0, "failing_here": 0, "failing": false,
            "panic": false, "mixed_protocols": false,
        }
    ]);
    assert_eq!(services, expected);

    let endpoints = api.get("/v1/mesh/endpoints/web").await;
    let row = endpoints[0].as_object().unwrap();
    for field in [
        "service",
        "instance",
        "node",
        "address",
        "state",
        "reason",
        "weight",
        "tags",
        "inflight",
        "latency_ms",
        "age_ms",
    ] {
        assert!(row.contains_key(field), "{field}");
    }
    assert_eq!((&endpoints[0]["inflight"], &endpoints[1]["state"]), (&4.into(), &"down".into()));
    assert_eq!(api.get("/v1/mesh/endpoints/nobody").await, serde_json::json!([]));

    let me = api.get("/v1/agent/self").await;
    assert_eq!(me["Config"]["Datacenter"], "eu1");
    assert_eq!(me["Mesh"]["id"], member["id"], "the member's, as everywhere");
    assert_eq!(me["Mesh"]["mesh"], "09".repeat(32));
    assert_eq!(api.get("/v1/agent/members").await[0]["Status"], 1);
}

/// Gone for longer than `join.forget_after`: out of the listing. Alive: never.
#[tokio::test]
async fn members_gone_for_long_are_hidden_from_listings() {
    let _turn = beside_others();
    let api = api_that_forgets_after(Duration::ZERO).await;
    let mut gone = snapshot();
    let me = gone.members.values().next().unwrap().as_ref().clone();
    let other = MemberId::from_bytes([2; 16]);
    let view = MemberView { id: other, state: MemberState::Down, ..me };
    gone.members.insert(other, Arc::new(view));
    api.snapshot.send_replace(Arc::new(gone));
    let members = api.get("/v1/mesh/members").await;
    assert_eq!(members.as_array().unwrap().len(), 1);
    assert_eq!(members[0]["me"], true);
}

#[tokio::test]
async fn problems_say_what_to_try() {
    let _turn = beside_others();
    let api = api().await;
    for (method, path, body, status, word, hint) in [
        ("GET", "/v1/mesh/edges", "", 404, "not_yet", "later version"),
        ("GET", "/v1/health/state/any", "", 404, "not_yet", "later version"),
        ("PUT", "/v1/agent/check/register", "", 404, "not_yet", "later version"),
        (
            "PUT",
            "/v1/agent/check/pas/service:web",
            "",
            404,
            "no_route",
            "for 'pas' expected fail, pass or warn; did you mean 'pass'?",
        ),
        ("GET", "/v1/mesh/servces", "", 404, "no_route", "did you mean 'services'?"),
        ("GET", "/v1/catalog/services?filter=x", "", 400, "not_yet", "?filter"),
        ("GET", "/v1/health/service/web?wait=5&index=1", "", 400, "malformed", "unit"),
        ("GET", "/v1/health/service/web?index=x", "", 400, "malformed", "X-Consul-Index"),
        ("GET", "/v1/health/service/No_Name", "", 400, "malformed", "No_Name"),
        ("PUT", "/v1/agent/service/register", "{}", 400, "malformed", "Name is missing"),
        (
            "PUT",
            "/v1/agent/service/register",
            r#"{"Name":"web","Port":80,"Check":{"HTTP":"https://127.0.0.1/","Interval":"10s"}}"#,
            400,
            "not_yet",
            "checks speak no TLS",
        ),
        (
            "POST",
            "/v1/mesh/expose",
            r#"{"name":"a","to":"1","health":{"tcp":true,"rize":1}}"#,
            400,
            "malformed",
            "unknown key 'rize'",
        ),
        ("PUT", "/v1/agent/service/deregister/nobody", "", 404, "not_found", "nobody"),
        ("PUT", "/v1/agent/service/maintenance/web", "", 400, "malformed", "?enable=true"),
        ("PUT", "/v1/agent/service/maintenance/nobody?enable=true", "", 404, "not_found", "nobody"),
        ("GET", "/v1/mash", "", 404, "no_route", "/v1/mesh/members"),
        ("PATCH", "/v1/mesh/members", "", 405, "method", "PATCH"),
        ("GET", "/v1/mesh/endpoints/No_Name", "", 400, "malformed", "No_Name"),
        ("GET", "/v1/mesh/events?since=soon", "", 400, "malformed", "30m"),
        ("POST", "/v1/mesh/expose", "{", 400, "malformed", "line 1"),
        (
            "POST",
            "/v1/mesh/expose",
            r#"{"name":"a","to":"1","allow":[]}"#,
            400,
            "malformed",
            "allow",
        ),
        (
            "POST",
            "/v1/mesh/expose",
            r#"{"name":"a","to":"1","protocol":"udp"}"#,
            400,
            "malformed",
            "not available yet",
        ),
        (
            "POST",
            "/v1/mesh/upstream",
            r#"{"service":"a","listen":"0.0.0.0:1"}"#,
            400,
            "malformed",
            "loopback",
        ),
        ("DELETE", "/v1/mesh/upstream", "", 400, "malformed", "?service"),
        ("DELETE", "/v1/mesh/expose/nobody", "", 404, "not_found", "nobody"),
        ("POST", "/v1/mesh/invites", "{}", 403, "not_issuer", "init"),
        ("POST", "/v1/mesh/invites", r#"{"ttl":"1"}"#, 400, "malformed", "unit"),
    ] {
        let (answered, text) = api.with_token(method, path, body).await;
        let problem: Problem = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}"));
        assert_eq!((answered, problem.kind), (status, format!("urn:murmesh:{word}")), "{text}");
        assert!(problem.detail.contains(hint), "{path}: {}", problem.detail);
    }
}

#[tokio::test]
async fn a_body_over_the_limit_is_refused() {
    let _turn = beside_others();
    let api = api().await;
    let (status, _) = api.with_token("POST", "/v1/mesh/expose", &"x".repeat(70_000)).await;
    assert_eq!(status, 413);
}

#[tokio::test]
async fn readiness_is_the_agents_word() {
    let _turn = beside_others();
    let api = api().await;
    assert_eq!(api.ask("GET", "/ready", "", "").await.0, 200);
    api.readiness.send(Readiness::NotReady("no seed answers yet")).unwrap();
    let (status, body) = api.ask("GET", "/ready", "", "").await;
    assert_eq!(status, 503);
    assert!(body.contains("no seed answers yet"), "{body}");
    assert_eq!(api.ask("GET", "/live", "", "").await.0, 200);
    api.readiness.send(Readiness::Ready).unwrap();
    let mut seen = snapshot();
    seen.enrolments.clear();
    api.snapshot.send_replace(Arc::new(seen));
    let (status, body) = api.ask("GET", "/ready", "", "").await;
    assert_eq!(status, 503, "the others refuse whom nobody vouches for");
    assert!(body.contains("nobody vouches"), "{body}");
}

#[tokio::test]
async fn events_come_as_array_lines_and_server_sent_events() {
    let _turn = beside_others();
    let api = api().await;
    api.state.events.record(EventKind::MemberUp, "zwei", "answered");
    let array = api.get("/v1/mesh/events?since=1h").await;
    assert_eq!((&array[0]["kind"], &array[0]["subject"]), (&"member_up".into(), &"zwei".into()));
    assert_eq!(api.get("/v1/mesh/events?subject=drei").await, serde_json::json!([]));

    for (query, header, start) in [
        ("?follow=true&since=1h", "", "{\"at\":"),
        ("?since=1h", "accept: text/event-stream\r\n", "id: "),
    ] {
        let mut stream = TcpStream::connect(api.address).await.unwrap();
        let request =
            format!("GET /v1/mesh/events{query} HTTP/1.1\r\nhost: localhost\r\n{header}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut seen = String::new();
        read_until(&mut stream, &mut seen, "answered").await;
        assert!(seen.contains(start), "{seen}");
        api.state.events.record(EventKind::MemberDown, "drei", "silent");
        read_until(&mut stream, &mut seen, "member_down").await;
        assert_eq!(seen.matches("zwei").count(), 1, "told once: {seen}");
    }
}

async fn read_until(stream: &mut TcpStream, seen: &mut String, word: &str) {
    let mut chunk = [0; 4096];
    while !seen.contains(word) {
        let len = timeout(SOON, stream.read(&mut chunk)).await.unwrap().unwrap();
        assert!(len > 0, "ended before '{word}': {seen}");
        seen.push_str(&String::from_utf8_lossy(&chunk[..len]));
    }
}

#[tokio::test]
async fn metrics_count_members_endpoints_and_refusals() {
    let _turn = beside_others();
    let api = api().await;
    api.ask("POST", "/v1/mesh/expose", "", "{}").await;
    let (status, text) = api.ask("GET", "/metrics", "", "").await;
    assert_eq!(status, 200);
    for line in [
        "murmesh_members{state=\"alive\"} 1",
        "murmesh_endpoints{service=\"web\",state=\"ready\"} 1",
        "murmesh_refused_total{door=\"api\",reason=\"token\"} 1",
    ] {
        assert!(text.contains(line), "missing {line} in {text}");
    }
}

/// The document is what is served, methods included; those that want the token say so.
#[tokio::test]
async fn openapi_json_tells_exactly_the_routes_that_are_served() {
    let _turn = beside_others();
    let api = api().await;
    let document = api.get("/openapi.json").await;
    let mut told = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            let text = operation["summary"].as_str().unwrap();
            assert!(!text.is_empty() && !text.contains("  "), "{method} {path}: {text}");
            let (status, _) = api.ask(&method.to_uppercase(), &filled(path), "", "").await;
            let wants_token = operation.get("security").is_some();
            assert_eq!(status == 401, wants_token, "{method} {path}: {status}");
            told.push((method.to_uppercase(), path.clone()));
        }
    }
    let mut served: Vec<_> =
        routes().into_iter().map(|(method, path)| (method.to_string(), path.to_owned())).collect();
    served.sort();
    told.sort();
    assert_eq!(told, served);
}

fn index(answer: &str) -> u64 {
    let line = answer.lines().find_map(|line| line.strip_prefix("x-consul-index: "));
    line.unwrap_or_else(|| panic!("no index: {answer}")).parse().unwrap()
}

impl Api {
    async fn index(&self, path: &str) -> u64 {
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        index(&self.raw(&request).await)
    }

    /// Asks and does not wait for the answer.
    async fn begin(&self, path: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    }

    async fn blocked(&self, count: i64) {
        let reached = async {
            while self.state.metrics.api_blocked_queries.get() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, reached).await.unwrap_or_else(|_| panic!("{count} are blocked"));
    }

    /// Gives the first endpoint of `web` another weight.
    fn change_web(&self, weight: u16) {
        let mut seen = snapshot();
        let service = seen.services.values_mut().next().unwrap();
        let mut endpoints = service.endpoints().to_vec();
        endpoints[0].weight = Weight(weight);
        *service = with_endpoints(service, endpoints);
        self.snapshot.send_replace(Arc::new(seen));
    }
}

#[tokio::test]
async fn an_answer_has_an_index_of_its_own() {
    let _turn = beside_others();
    let api = api().await;
    let paths = ["/v1/catalog/services", "/v1/health/service/web", "/v1/health/service/nobody"];
    let mut before = Vec::new();
    for path in paths {
        let index = api.index(path).await;
        assert!(index > 0 && !before.contains(&index), "{path}: {index}");
        assert_eq!(api.index(path).await, index, "{path}: nothing has changed");
        before.push(index);
    }
    api.change_web(500);
    assert_eq!(api.index(paths[0]).await, before[0], "the tags are the same");
    assert!(api.index(paths[1]).await > *before.iter().max().unwrap());
    assert_eq!(api.index(paths[2]).await, before[2]);
}

#[tokio::test]
async fn a_blocked_query_is_answered_by_a_change_of_the_mesh_or_of_this_machine() {
    let _turn = beside_others();
    let api = api().await;
    let path = "/v1/health/service/web";
    let mut last = api.index(path).await;
    for change in [0, 1] {
        let mut asked = api.begin(&format!("{path}?index={last}&wait=10m")).await;
        api.blocked(1).await;
        api.snapshot.send_replace(api.state.snapshot()); // nothing new
        match change {
            0 => api.change_web(500),
            _ => drop(api.local.send_replace(Arc::new(Local {
                upstreams: vec![UpstreamSpec::new(
                    "web".parse().unwrap(),
                    "127.0.0.1:4000".parse().unwrap(),
                )],
                ..Local::default()
            }))),
        }
        let mut answer = String::new();
        timeout(SOON, asked.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(index(&answer) > last, "{answer}");
        assert_eq!(answer.contains("\"Port\":4000"), change == 1, "{answer}");
        last = index(&answer);
    }
}

#[tokio::test]
async fn blocked_queries_are_bounded_and_those_beyond_are_refused_and_counted() {
    let _turn = beside_others();
    const BLOCKED_MAX: i64 = 768;
    if !raise_file_limit(4_096) {
        return skip("the limit of open files is too low for 768 connections (ulimit -Hn)");
    }
    let api = api().await;
    let path = "/v1/catalog/services";
    let path = format!("{path}?wait=10m&index={}", api.index(path).await);
    let mut waiting = Vec::new();
    for count in 1..=BLOCKED_MAX {
        waiting.push(api.begin(&path).await);
        api.blocked(count).await;
    }
    let (status, body) = api.ask("GET", &path, "", "").await;
    let problem: Problem = serde_json::from_str(&body).unwrap();
    assert_eq!((status, problem.kind.as_str()), (429, "urn:murmesh:blocked_queries"));
    assert_eq!(api.state.metrics.refused(Door::api, "blocked_queries"), 1);
    assert_eq!(api.ask("GET", "/v1/catalog/services", "", "").await.0, 200, "at once: as ever");
    drop(waiting);
    api.blocked(0).await;
}

/// State by state: what `passing` keeps, and what the checks say.
#[tokio::test]
async fn every_state_of_an_instance_has_its_checks() {
    let _turn = beside_others();
    let api = api().await;
    use EndpointState::{Doubtful, Down, Draining, Failing, Maint, Ready};
    let mut seen = snapshot();
    let service = seen.services.values_mut().next().unwrap();
    let base = service.endpoints()[0].clone();
    let states = [Ready, Doubtful, Draining, Failing, Maint, Down];
    let endpoint = |(number, state): (usize, &EndpointState)| Endpoint {
        instance: format!("web-{number}").parse().unwrap(),
        state: *state,
        ..base.clone()
    };
    let mut endpoints: Vec<_> = states.iter().enumerate().map(endpoint).collect();
    let me = seen.members.values().next().unwrap().as_ref().clone();
    let gone = MemberView { id: MemberId::from_bytes([2; 16]), state: MemberState::Left, ..me };
    endpoints.push(Endpoint { member: gone.id, ..base });
    *service = with_endpoints(service, endpoints);
    seen.members.insert(gone.id, Arc::new(gone));
    api.snapshot.send_replace(Arc::new(seen));
    let rows = api.get("/v1/health/service/web?near=_agent").await;
    let told: Vec<_> = rows.as_array().unwrap().iter().map(|row| &row["Checks"][1]).collect();
    let statuses: Vec<_> = told.iter().map(|check| check["Status"].as_str().unwrap()).collect();
    let expected = ["passing", "warning", "critical", "critical", "critical", "critical"];
    assert_eq!(statuses, expected, "and whoever has left has no row");
    assert_eq!(told[4]["CheckID"], "_service_maintenance:web-4");
    let passing = api.get("/v1/health/service/web?passing&tag=v2&dc=eu1").await;
    assert_eq!(passing.as_array().unwrap().len(), 1);
    assert_eq!(api.get("/v1/health/service/web?dc=eu2").await, serde_json::json!([]));
    assert_eq!(api.get("/v1/health/service/web?tag=v2&tag=v3").await, serde_json::json!([]));
    assert_eq!(api.get("/v1/catalog/nodes").await.as_array().unwrap().len(), 1);
    assert_eq!(api.get("/v1/catalog/services").await, serde_json::json!({ "web": ["v2"] }));
}

#[tokio::test]
async fn near_puts_the_same_node_first_then_its_zone_then_its_region() {
    let _turn = beside_others();
    let api = api().await;
    let mut seen = snapshot();
    let me = seen.members.values().next().unwrap().as_ref().clone();
    let service = seen.services.values().next().unwrap();
    let base = Endpoint { state: EndpointState::Ready, ..service.endpoints()[0].clone() };
    let mut endpoints = Vec::new();
    for (number, zone) in [(5, "us1/a"), (4, "eu1/b"), (3, "eu1/a"), (1, "eu1/a")] {
        let id = MemberId::from_bytes([number; 16]);
        let name = format!("node-{number}").parse().unwrap();
        let view = MemberView { id, name, zone: zone.to_owned(), ..me.clone() };
        let endpoint = Endpoint { member: id, ..base.clone() };
        endpoints.push(endpoint);
        seen.members.insert(id, Arc::new(view));
    }
    let service = seen.services.values_mut().next().unwrap();
    *service = with_endpoints(service, endpoints);
    api.snapshot.send_replace(Arc::new(seen));
    for (near, expected) in [
        ("_agent", ["node-1", "node-3", "node-4", "node-5"]),
        ("node-5", ["node-5", "node-1", "node-3", "node-4"]),
        ("nobody", ["node-1", "node-3", "node-4", "node-5"]),
    ] {
        let rows = api.get(&format!("/v1/catalog/service/web?near={near}")).await;
        let rows: Vec<_> = rows.as_array().unwrap().iter().map(|row| &row["Node"]).collect();
        assert_eq!(rows, expected, "near {near}");
    }
}
