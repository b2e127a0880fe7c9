//! Operating one agent: out of rotation and back, waiting, reloading, forgetting.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;

use rustix::process::Signal;

use crate::support::{
    Agent, Kind, SOON, Server, TestMesh, ask, beside_others, check, eventually, expect_echo,
    free_address, request,
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
    entry: SocketAddr,
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
    solo.run(&["maint", "web-2", "--reason", "a new disk"]).ok();
    let again = solo.run(&["maint", "web-2"]);
    assert!(!again.stderr.contains("nobody else"), "others are ready: {again:?}");
    eventually("who gives no reason leaves that of before", SOON, || {
        let rows = solo.get("/v1/mesh/endpoints/web");
        let mut rows = rows.as_array().unwrap().iter();
        let row = rows.find(|row| row["instance"] == "web-2").cloned();
        let row = row.unwrap_or_default();
        check(row["reason"] == "maintenance: a new disk", row)
    });
    solo.run(&["maint", "web-2", "--off"]).ok();
    for id in ["web-1", "web-2"] {
        solo.run(&["wait", id, "--for", "ready"]).ok();
    }
    let last = solo.run(&["maint", "web"]);
    assert!(last.stderr.contains("nobody else is ready to serve web"), "{last:?}");
    assert_eq!(last.code, Some(0), "{last:?}");
    solo.run(&["maint", "web", "--off"]).ok();
    assert!(solo.run(&["maint", "nobody"]).fails(2).contains("nobody"));
    for id in ["web-1", "web-2", "db"] {
        solo.run(&["wait", id, "--for", "ready"]).ok();
    }
}

#[test]
fn what_is_taken_back_ends_what_it_has_and_unexpose_says_so_and_waits() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let server = Server::start(Kind::Echo);
    far.expose("web", server.address);
    near.wait_endpoints("web", 1);
    let entry = near.upstream("web");
    let mut held = TcpStream::connect(entry).unwrap();
    expect_echo(&mut held, b"begun").unwrap();
    let said = far.run(&["unexpose", "web"]);
    assert!(said.stderr.contains("1 connection of web is still open"), "{said:?}");
    assert!(said.stderr.contains("murmesh wait web --for empty"), "{said:?}");
    far.run(&["wait", "web", "--for", "empty", "--timeout", "200ms"]).fails(3);
    expect_echo(&mut held, b"what is open goes on").unwrap();
    drop(held);
    eventually("it is empty and gone", SOON, || {
        check(own(far, "web").0 == "absent", own(far, "web"))
    });

    far.expose("web", server.address);
    near.wait_endpoints("web", 1);
    let mut held = TcpStream::connect(entry).unwrap();
    expect_echo(&mut held, b"begun").unwrap();
    let late = far.run(&["unexpose", "web", "--timeout", "200ms"]).fails(3);
    assert!(late.contains("after 200ms 1 connection of web is still open"), "{late}");

    far.expose("web", server.address);
    near.wait_endpoints("web", 1);
    std::thread::scope(|scope| {
        let taken = scope.spawn(|| far.run(&["unexpose", "web", "--timeout", "60s"]).ok());
        eventually("it is taken back", SOON, || {
            check(own(far, "web").0 == "gone", own(far, "web"))
        });
        drop(held);
        taken.join().unwrap();
    });
}

#[test]
fn wait_agent_is_there_before_the_agent_and_tells_absence_from_lateness() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["solo"]);
    let solo = mesh.agent("solo");
    for goal in ["ready", "empty"] {
        let unknown = solo.run(&["wait", "web", "--for", goal, "--timeout", "1h"]).fails(2);
        assert!(unknown.contains("there is no instance 'web' here"), "{unknown}");
    }
    solo.stop();
    solo.run(&["wait", "agent", "--for", "ready", "--timeout", "300ms"]).fails(69);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| solo.run(&["wait", "agent", "--for", "ready"]));
        solo.start();
        waiting.join().unwrap().ok();
    });
}

/// An agent that reads a file, alone in its mesh.
struct Configured {
    mesh: TestMesh,
    file: PathBuf,
}

impl Configured {
    fn new(text: &str) -> Self {
        let mut mesh = TestMesh::new();
        let file = mesh.home.path().join("murmesh.toml");
        fs::write(&file, text).unwrap();
        let mut agent = Agent::new(&mesh.home, "solo");
        agent.arguments = vec!["-c".to_owned(), file.display().to_string()];
        mesh.found_with(agent);
        Self { mesh, file }
    }

    fn agent(&self) -> &Agent {
        &self.mesh.agents[0]
    }

    fn write(&self, text: &str) {
        fs::write(&self.file, text).unwrap();
    }

    fn part(&self, name: &str, text: &str) {
        let directory = self.file.with_file_name("conf.d");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(name), text).unwrap();
    }

    /// What `config dump` says of a key.
    fn setting(&self, key: &str) -> String {
        let dump = self.agent().run(&["config", "dump"]).ok();
        let line = dump.lines().find(|line| line.split_whitespace().next() == Some(key));
        line.unwrap_or_default().to_owned()
    }

    fn exposed(&self) -> Vec<String> {
        let rows = self.agent().get("/v1/mesh/expose");
        let word = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap().to_owned();
        let rows = rows.as_array().unwrap().iter();
        rows.map(|row| format!("{} {}", word(row, "id"), word(row, "to"))).collect()
    }
}

fn upstream(service: &str, listen: SocketAddr) -> String {
    format!("[[upstream]]\nservice = \"{service}\"\nlisten = \"{listen}\"\n")
}

fn expose(name: &str, to: SocketAddr) -> String {
    format!("[[expose]]\nname = \"{name}\"\nto = \"{to}\"\n")
}

#[test]
fn a_reload_makes_what_the_files_say_hold_and_open_connections_go_on() {
    let _turn = beside_others();
    let (one, two) = (Server::start(Kind::Named("one".to_owned())), Server::start(Kind::Echo));
    let (kept, turned, gone, new) =
        (free_address(), free_address(), free_address(), free_address());
    let first = [
        expose("one", one.address),
        expose("old", one.address),
        upstream("two", turned),
        upstream("one", kept),
        upstream("one", gone),
    ];
    let mesh = Configured::new(&first.concat());
    let solo = mesh.agent();
    let said = solo.run(&["reload"]).ok();
    assert_eq!(said, "unchanged: the files say what holds already\n");
    solo.expose("by-hand", one.address);
    solo.run(&["wait", "one", "--for", "ready"]).ok();
    let mut held = TcpStream::connect(gone).unwrap();
    held.write_all(b"before\n").unwrap();

    let second = [
        expose("one", one.address),
        expose("two", two.address),
        upstream("one", turned),
        upstream("one", kept),
        "[join]\nforget_after = \"1h\"\n".to_owned(),
    ];
    mesh.write(&second.concat());
    mesh.part("10-new.toml", &upstream("two", new));
    let said = solo.run(&["reload"]).ok();
    for change in [
        "expose.old is gone".to_owned(),
        format!("expose.two at {}", two.address),
        format!("upstream one at {turned}, was two"),
        format!("upstream one at {gone} is gone"),
        format!("upstream two at {new}"),
        "join.forget_after 1h".to_owned(),
    ] {
        assert!(said.lines().any(|line| line == change), "{change} is missing in: {said}");
    }
    assert_eq!(said.lines().count(), 6, "{said}");
    let now = ["by-hand", "one", "two"];
    let exposed = mesh.exposed();
    assert!(exposed.iter().map(|row| row.split(' ').next().unwrap()).eq(now), "{exposed:?}");
    solo.run(&["wait", "two", "--for", "ready"]).ok();
    assert_eq!(ask(turned, "who").unwrap(), "one");
    assert_eq!(ask(kept, "who").unwrap(), "one");
    expect_echo(&mut TcpStream::connect(new).unwrap(), b"two").unwrap();
    eventually("the entry that is gone takes nobody", SOON, || {
        check(TcpStream::connect(gone).is_err(), "connected")
    });
    let mut answer = [0; 10];
    held.set_read_timeout(Some(SOON)).unwrap();
    std::io::Read::read_exact(&mut held, &mut answer).unwrap();
    assert_eq!(&answer, b"one before", "what was open goes on");
    assert!(mesh.setting("join.forget_after").contains("1h"));

    // By a signal and by Consul's route, too; and none of them ends the agent.
    mesh.write(&(second.concat() + &expose("three", two.address)));
    solo.signal(Signal::HUP);
    eventually("the signal is obeyed", SOON, || {
        let reloaded = solo.events("config_reloaded");
        check(reloaded.len() == 3, reloaded)
    });
    assert_eq!(mesh.exposed().len(), 4);
    mesh.write(&second.concat());
    let token = format!("Bearer {}", solo.api_token());
    let headers = [("authorization", token.as_str())];
    let answer = request(&solo.at(), "PUT", "/v1/agent/reload", &headers, b"").unwrap();
    assert_eq!(
        (answer.status, &answer.json()["applied"][0]),
        (200, &"expose.three is gone".into())
    );
}

#[test]
fn what_a_command_changes_of_a_file_holds_until_the_restart_and_says_so() {
    let _turn = beside_others();
    let server = Server::start(Kind::Echo);
    let entry = free_address();
    let mesh = Configured::new(
        &[expose("one", server.address), expose("two", server.address), upstream("one", entry)]
            .concat(),
    );
    let solo = mesh.agent();
    solo.expose("three", server.address);
    assert!(mesh.setting("expose.three").contains(" runtime.toml "), "of a command");
    let wins = "holds until the agent restarts: then";
    let at = server.address.to_string();
    for arguments in [
        &["expose", "one", &at, "--weight", "7"][..],
        &["unexpose", "two"],
        &["upstream", "one", "--off"],
    ] {
        let ran = solo.run(arguments);
        assert!(ran.code == Some(0) && ran.stderr.contains(wins), "{ran:#?}");
        assert!(ran.stderr.contains("murmesh.toml:"), "which file, and where: {ran:#?}");
    }
    let ran = solo.run(&["expose", "three", &at, "--weight", "7"]);
    assert!(!ran.stderr.contains(wins), "what no file says lasts: {ran:#?}");
    for key in ["expose.one", "expose.two", "upstream.one"] {
        assert!(mesh.setting(key).contains("a command, until the agent restarts"), "{key}");
    }
    solo.stop();
    solo.start();
    solo.run(&["wait", "two", "--for", "ready"]).ok();
    for key in ["expose.one", "expose.two", "upstream.one"] {
        assert!(!mesh.setting(key).contains("a command"), "{}", mesh.setting(key));
    }
}

#[test]
fn a_reload_with_any_fault_changes_nothing_and_tells_all_of_them() {
    let _turn = beside_others();
    let [one, other, third] = [(); 3].map(|()| Server::start(Kind::Echo));
    let (listen, free) = (free_address(), free_address());
    let first = expose("one", one.address) + &upstream("one", listen);
    let mesh = Configured::new(&first);
    let solo = mesh.agent();
    solo.run(&["wait", "one", "--for", "ready"]).ok();
    let before = solo.run(&["config", "dump"]).ok();
    let holds = || {
        assert_eq!(mesh.exposed(), [format!("one {}", one.address)]);
        let upstreams = solo.get("/v1/mesh/upstream");
        assert_eq!(upstreams.as_array().unwrap().len(), 1, "{upstreams}");
        expect_echo(&mut TcpStream::connect(listen).unwrap(), b"as before").unwrap();
        eventually("what was opened is closed again", SOON, || {
            check(TcpStream::connect(free).is_err(), "connected")
        });
        assert_eq!(solo.run(&["config", "dump"]).ok(), before);
    };

    mesh.write("[node]\nzone = \"e u\"\ncolour = 1\n");
    let told = solo.run(&["reload"]).fails(2);
    let validated = solo.run(&["validate", &mesh.file.display().to_string()]).fails(2);
    assert_eq!(told, validated, "the same words");
    assert!(told.contains("2 faults") && told.contains("murmesh.toml:3: node.colour"), "{told}");
    holds();

    // All but the last can be had: an entry of its own, one that leads elsewhere, an instance.
    let taken = upstream("one", third.address);
    let tried =
        [expose("two", other.address), upstream("two", listen), upstream("one", free), taken];
    mesh.write(&tried.concat());
    let told = solo.run(&["reload"]).fails(2);
    assert!(told.contains(&third.address.to_string()) && told.contains("murmesh.toml:"), "{told}");
    holds();
    mesh.write(&(expose("two", listen) + &upstream("one", listen)));
    assert!(solo.run(&["reload"]).fails(2).contains("lead back to itself"));
    holds();
    assert_eq!(solo.events("config_refused").len(), 3);

    fs::remove_file(&mesh.file).unwrap();
    assert!(solo.run(&["reload"]).fails(2).contains("cannot read"));
    holds();
    mesh.write(&first);
    assert!(solo.run(&["reload"]).ok().starts_with("unchanged"));
}

#[test]
fn what_waits_for_a_restart_is_named_and_the_rest_of_the_file_holds_at_once() {
    let _turn = beside_others();
    let mesh = Configured::new("[join]\nseeds = [\"127.0.0.1:9\"]\n");
    let solo = mesh.agent();
    let elsewhere = mesh.mesh.home.path().join("elsewhere");
    mesh.write(&format!(
        "[node]\nzone = \"eu1/a\"\ndata_dir = {elsewhere:?}\n[listen]\nadvertise = \"10.0.0.9:7370\"\n\
         [join]\nprofile = \"wan\"\nseeds = [\"127.0.0.1:11\"]\nforget_after = \"2h\"\n\
         [telemetry]\nlog = \"warn\"\n"
    ));
    let ran = solo.run(&["reload"]);
    assert_eq!(ran.code, Some(1), "{ran:#?}");
    assert_eq!(ran.stdout, "join.seeds 127.0.0.1:11\njoin.forget_after 2h\n");
    for key in [
        "node.zone none -> eu1/a",
        "listen.advertise",
        "join.profile lan -> wan",
        "join.seeds without 127.0.0.1:9",
        "telemetry.log info -> warn",
    ] {
        assert!(ran.stderr.contains(key), "{key} is missing in: {}", ran.stderr);
    }
    assert!(mesh.setting("node.zone").ends_with(" -"), "it tells what holds");
    assert!(mesh.setting("join.forget_after").contains("2h"));
    let again = solo.run(&["reload"]);
    assert_eq!((again.code, again.stdout.as_str()), (Some(1), ""), "still named: {}", again.stderr);
}

#[test]
fn a_forgotten_member_is_hidden_until_it_is_back_and_a_living_one_is_not_forgotten() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    for living in ["far", "near"] {
        let refused = near.run(&["forget", living]).fails(2);
        assert!(refused.contains("is alive"), "{refused}");
    }
    assert!(near.run(&["forget", "nobody"]).fails(2).contains("no member 'nobody'"));
    far.expose("web", "127.0.0.1:9");
    near.wait_endpoints("web", 1);
    far.kill();
    near.wait_state("far", "down", SOON);
    near.run(&["forget", "far"]).ok();
    assert_eq!(near.state_of("far"), "absent");
    for path in ["/v1/mesh/services", "/v1/mesh/endpoints/web"] {
        assert_eq!(near.get(path).as_array().unwrap().len(), 0, "{path}: hidden with its member");
    }
    let checked = near.run(&["check", "--json"]).stdout;
    let rows: serde_json::Value = serde_json::from_str(&checked).unwrap();
    let row = rows.as_array().unwrap().iter().find(|row| row["id"] == "members").unwrap();
    assert_eq!(row["status"], "pass", "nobody is missed: {row}");
    assert_eq!(near.get("/v1/agent/members").as_array().unwrap().len(), 1);
    near.stop();
    near.start();
    assert_eq!(near.state_of("far"), "absent", "over restarts, too");
    far.start();
    near.wait_state("far", "alive", SOON);
    far.kill();
    near.wait_state("far", "down", SOON);
}
