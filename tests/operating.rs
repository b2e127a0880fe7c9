//! Operating one agent: out of rotation and back, waiting, reloading, forgetting.

use std::io::Write;
use std::net::TcpStream;

use crate::support::{
    Agent, Kind, SOON, Server, TestMesh, ask, beside_others, check, eventually, expect_echo,
    request,
};

/// What `agent` says of its own instance.
fn own(agent: &Agent, id: &str) -> (String, u64) {
    let rotation = agent.get("/v1/mesh/drain");
    let rows = rotation["instances"].as_array().unwrap();
    let row = rows.iter().find(|row| row["instance"] == id).cloned().unwrap_or_default();
    (row["state"].as_str().unwrap_or("absent").to_owned(), row["inflight"].as_u64().unwrap_or(0))
}

/// Waits until `agent` sees the only instance of `service` on `node` in that state.
#[track_caller]
fn wait_endpoint(agent: &Agent, service: &str, node: &str, state: &str) {
    eventually(&format!("{service} of {node} is {state}"), SOON, || {
        let rows = agent.get(&format!("/v1/mesh/endpoints/{service}"));
        let mut rows = rows.as_array().unwrap().iter();
        let row = rows.find(|row| row["node"] == node).cloned().unwrap_or_default();
        check(row["state"] == state, row)
    });
}

/// Two agents that both serve `web`, and an entry to it at the first.
struct Pair {
    mesh: TestMesh,
    _servers: [Server; 2],
    entry: std::net::SocketAddr,
}

impl Pair {
    fn new() -> Self {
        let mesh = TestMesh::of(&["near", "far"]);
        let server = |name: &str| Server::start(Kind::Named(name.to_owned()));
        let servers = [server("near"), server("far")];
        for (agent, server) in mesh.agents.iter().zip(&servers) {
            agent.expose("web", server.address);
        }
        mesh.agent("near").wait_endpoints("web", 2);
        mesh.agent("far").wait_endpoints("web", 2);
        let entry = mesh.agent("near").upstream("web");
        Self { mesh, _servers: servers, entry }
    }

    /// Twenty calls in a row reach only this one: with both in rotation that is one in a million.
    #[track_caller]
    fn only_serves(&self, name: &str) {
        for _ in 0..20 {
            assert_eq!(ask(self.entry, "who").unwrap(), name);
        }
    }
}

#[test]
fn a_drained_instance_takes_nothing_new_and_its_drain_ends_with_its_last_call() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let (one, two) = (Server::start(Kind::Echo), Server::start(Kind::Echo));
    far.expose("web", one.address);
    near.wait_endpoints("web", 1);
    let entry = near.upstream("web");
    let mut held = TcpStream::connect(entry).unwrap();
    expect_echo(&mut held, b"before").unwrap();
    assert_eq!(own(far, "web"), ("ready".to_owned(), 1));

    let refused = far.run(&["drain", "web"]).fails(2);
    assert!(refused.contains("ready to serve web") && refused.contains("--force"), "{refused}");
    assert_eq!(own(far, "web").0, "ready", "a refused drain changes nothing");
    near.run(&["expose", "web", &two.address.to_string(), "--id", "web-2"]).ok();
    near.wait_endpoints("web", 2);
    far.wait_endpoints("web", 2);

    let late = far.run(&["drain", "web", "--timeout", "200ms"]).fails(3);
    assert!(late.contains("1 connection of web is still open"), "{late}");
    assert_eq!(own(far, "web"), ("draining".to_owned(), 1));
    wait_endpoint(near, "web", "far", "draining");
    for _ in 0..20 {
        let mut call = TcpStream::connect(entry).unwrap();
        expect_echo(&mut call, b"elsewhere").unwrap();
    }
    assert_eq!(own(far, "web").1, 1, "all of them went to the other one");
    expect_echo(&mut held, b"what is open goes on").unwrap();
    assert!(
        far.run(&["wait", "web", "--for", "empty", "--timeout", "200ms"]).fails(3).contains("web")
    );
    assert!(far.run(&["wait", "agent", "--for", "empty", "--timeout", "200ms"]).code == Some(3));

    std::thread::scope(|scope| {
        let drained = scope.spawn(|| far.run(&["drain", "web", "--timeout", "60s"]).ok());
        held.flush().unwrap();
        drop(held);
        assert!(drained.join().unwrap().contains("nothing is in flight"));
    });
    far.run(&["wait", "web", "--for", "empty"]).ok();
    far.run(&["drain", "web", "--off"]).ok();
    near.wait_endpoints("web", 2);
    far.run(&["wait", "web", "--for", "ready"]).ok();
}

#[test]
fn a_drained_machine_stays_out_over_a_restart_with_all_that_it_exposes_then() {
    let _turn = beside_others();
    let pair = Pair::new();
    let (near, far) = (pair.mesh.agent("near"), pair.mesh.agent("far"));
    far.run(&["drain"]).ok();
    wait_endpoint(near, "web", "far", "draining");
    pair.only_serves("near");
    let listed = near.get("/v1/mesh/members");
    let row = listed.as_array().unwrap().iter().find(|row| row["name"] == "far").unwrap();
    assert_eq!((&row["state"], &row["draining"]), (&"alive".into(), &true.into()));
    let kinds = ["agent_draining", "agent_resumed"];
    assert_eq!(kinds.map(|kind| far.events(kind).len()), [1, 0]);

    far.stop();
    far.start();
    near.wait_state("far", "alive", SOON);
    wait_endpoint(near, "web", "far", "draining");
    far.run(&["expose", "late", "127.0.0.1:9"]).ok();
    wait_endpoint(near, "late", "far", "draining");
    pair.only_serves("near");

    far.run(&["drain", "--off"]).ok();
    wait_endpoint(near, "web", "far", "ready");
    wait_endpoint(near, "late", "far", "ready");
    assert_eq!(far.events("agent_resumed").len(), 1);
    far.run(&["drain", "--off"]).ok();
    eventually("the other one is called again", SOON, || {
        let name = ask(pair.entry, "who").unwrap();
        check(name == "far", name)
    });
}

#[test]
fn the_last_ready_instance_is_drained_by_force_only_and_not_twice() {
    let _turn = beside_others();
    let pair = Pair::new();
    let (near, far) = (pair.mesh.agent("near"), pair.mesh.agent("far"));
    near.run(&["drain"]).ok();
    far.wait_endpoints("web", 1);
    assert!(far.run(&["drain"]).fails(2).contains("nobody else is ready to serve web"));
    let token = format!("Bearer {}", far.api_token());
    let post = |body: &str| {
        let headers = [("authorization", token.as_str())];
        request(&far.at(), "POST", "/v1/mesh/drain", &headers, body.as_bytes()).unwrap()
    };
    let refused = post("{}");
    assert_eq!((refused.status, &refused.json()["type"]), (409, &"urn:murmesh:last_ready".into()));
    assert_eq!(post(r#"{"instance":"nobody"}"#).status, 404);
    assert_eq!(post(r#"{"timeout":"1h"}"#).status, 400);
    let forced = post(r#"{"force":true}"#);
    assert_eq!((forced.status, &forced.json()["draining"]), (200, &true.into()));
    assert_eq!(post("{}").status, 200, "what drains already is refused to nobody");
    far.run(&["drain", "nobody", "--off"]).fails(2);
    far.run(&["drain", "--off"]).ok();
}

#[test]
fn maintenance_is_told_by_id_or_for_all_instances_of_a_service_and_ends() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["solo"]);
    let solo = mesh.agent("solo");
    for id in ["web-1", "web-2", "db"] {
        let service = id.split('-').next().unwrap();
        solo.run(&["expose", service, "127.0.0.1:9", "--id", id]).ok();
    }
    let states = || ["web-1", "web-2", "db"].map(|id| own(solo, id).0);
    for id in ["web-1", "web-2", "db"] {
        solo.run(&["wait", id, "--for", "ready"]).ok();
    }
    solo.run(&["maint", "web-2", "--reason", "a new disk & more"]).ok();
    assert_eq!(states(), ["ready", "maint", "ready"]);
    wait_endpoint(solo, "db", "solo", "ready");
    eventually("the reason is shown", SOON, || {
        let rows = solo.get("/v1/mesh/endpoints/web");
        check(rows[1]["reason"] == "maintenance: a new disk & more", rows)
    });
    let said = solo.run(&["maint", "web"]).ok();
    assert_eq!(said.lines().count(), 2, "{said}");
    assert_eq!(states(), ["maint", "maint", "ready"]);
    solo.run(&["drain", "--force"]).ok();
    let back = solo.run(&["maint", "web", "--off"]);
    assert!(back.stderr.contains("it drains, too"), "{back:#?}");
    solo.run(&["drain", "--off"]).ok();
    assert!(solo.run(&["maint", "nobody"]).fails(2).contains("nobody"));
    for id in ["web-1", "web-2", "db"] {
        solo.run(&["wait", id, "--for", "ready"]).ok();
    }
}

#[test]
fn wait_agent_is_there_before_the_agent_and_tells_absence_from_lateness() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["solo"]);
    let solo = mesh.agent("solo");
    let late = solo.run(&["wait", "web", "--for", "ready", "--timeout", "200ms"]).fails(3);
    assert!(late.contains("web is not ready after 200ms"), "{late}");
    assert!(solo.run(&["wait", "web", "--for", "empty"]).fails(2).contains("'web'"));
    solo.stop();
    solo.run(&["wait", "agent", "--for", "ready", "--timeout", "300ms"]).fails(69);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| solo.run(&["wait", "agent", "--for", "ready"]));
        solo.start();
        waiting.join().unwrap().ok();
    });
}
