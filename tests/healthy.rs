//! Active checks: what they say takes an instance out of rotation, and back in, everywhere.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{
    Agent, Kind, Program, SOON, Server, TestMesh, alone, ask, beside_others, check, eventually,
    find, free_address, python, request, run_program, skip, within,
};

/// A web server that answers every request with the status that it is told, or with two in turns.
struct Ready {
    address: SocketAddr,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    statuses: [AtomicU16; 2],
    requests: AtomicU64,
    /// The last head that was read.
    head: std::sync::Mutex<String>,
}

impl Ready {
    fn start(status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ready = Self { address: listener.local_addr().unwrap(), seen: Arc::<Seen>::default() };
        ready.say([status; 2]);
        let seen = Arc::clone(&ready.seen);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = answer(stream.unwrap(), &seen); // a client that is gone
            }
        });
        ready
    }

    fn say(&self, statuses: [u16; 2]) {
        for (place, status) in self.seen.statuses.iter().zip(statuses) {
            place.store(status, Ordering::SeqCst);
        }
    }

    fn requests(&self) -> u64 {
        self.seen.requests.load(Ordering::SeqCst)
    }
}

fn answer(mut stream: TcpStream, seen: &Seen) -> std::io::Result<()> {
    let mut head = String::new();
    let mut reader = BufReader::new(&stream);
    while reader.read_line(&mut head)? > 2 {}
    let number = seen.requests.fetch_add(1, Ordering::SeqCst);
    *seen.head.lock().unwrap() = head;
    let status = seen.statuses[(number % 2) as usize].load(Ordering::SeqCst);
    let body = "a disk is full";
    write!(stream, "HTTP/1.1 {status} Said\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Exposes an instance of `service` with these checks, as the API takes them.
#[track_caller]
fn expose(agent: &Agent, service: &str, to: impl ToString, health: Value) {
    let token = format!("Bearer {}", agent.api_token());
    let body = json!({ "name": service, "to": to.to_string(), "health": health }).to_string();
    let headers = [("authorization", token.as_str())];
    let answer = request(&agent.at(), "POST", "/v1/mesh/expose", &headers, body.as_bytes());
    let answer = answer.unwrap();
    assert!([200, 201].contains(&answer.status), "{}", answer.text());
}

/// The row of the instance that `node` has of `service`, as `agent` sees it.
fn endpoint(agent: &Agent, service: &str, node: &str) -> Value {
    let rows = agent.get(&format!("/v1/mesh/endpoints/{service}"));
    let mut rows = rows.as_array().unwrap().iter();
    rows.find(|row| row["node"] == node).cloned().unwrap_or_default()
}

/// Waits until every agent sees that instance in that state.
#[track_caller]
fn everywhere(mesh: &TestMesh, service: &str, node: &str, state: &str) {
    for agent in &mesh.agents {
        let what = format!("{} sees {service} of {node} {state}", agent.name);
        eventually(&what, SOON, || {
            let row = endpoint(agent, service, node);
            check(row["state"] == state, row)
        });
    }
}

#[test]
fn a_check_of_http_takes_an_instance_out_everywhere_with_its_reason_and_back() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far", "other"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let ready = Ready::start(503);
    let [sick, well] = ["sick", "well"].map(|name| Server::start(Kind::Named(name.to_owned())));
    let checked = json!({
        "http": "/ready?deep", "at": ready.address.to_string(), "interval": "200ms",
        "header": { "x-secret": "hush", "host": "web" },
    });
    expose(far, "web", sick.address, checked);
    mesh.agent("other").expose("web", well.address);
    everywhere(&mesh, "web", "far", "failing");
    everywhere(&mesh, "web", "other", "ready");
    let entry = near.upstream("web");
    let only_well = || {
        for _ in 0..20 {
            assert_eq!(ask(entry, "who").unwrap(), "well");
        }
    };
    only_well();
    let reason = endpoint(far, "web", "far")["reason"].as_str().unwrap().to_owned();
    assert_eq!(reason, "http /ready?deep: 503 Service Unavailable: a disk is full");
    let elsewhere = endpoint(near, "web", "far")["reason"].as_str().unwrap().to_owned();
    assert!(elsewhere.contains("checks of its own agent fail"), "{elsewhere}");
    let printed = far.run(&["endpoints", "web"]).ok();
    assert!(printed.contains("failing") && printed.contains("a disk is full"), "{printed}");
    let head = ready.seen.head.lock().unwrap().clone();
    assert!(head.starts_with("GET /ready?deep HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("host: web\r\n") && head.contains("x-secret: hush"), "{head}");
    let shown = far.get("/v1/mesh/expose").to_string();
    assert!(shown.contains("x-secret") && !shown.contains("hush"), "no token, no secret: {shown}");

    ready.say([204; 2]);
    everywhere(&mesh, "web", "far", "ready");
    eventually("it is called", SOON, || {
        let name = ask(entry, "who").unwrap();
        check(name == "sick", name)
    });
    ready.say([500; 2]);
    everywhere(&mesh, "web", "far", "failing");
    only_well();
    let failing = far.events("instance_failing");
    let reason = failing.last().unwrap()["reason"].as_str().unwrap();
    assert!(reason.contains("500"), "{failing:?}");
    assert_eq!(far.events("instance_passing").len(), 1);
    let counted = |result: &str| {
        let result = format!("result=\"{result}\"");
        far.metric("murmesh_health_checks_total", &["service=\"web\"", "kind=\"http\"", &result])
    };
    assert!(counted("pass") >= 1.0 && counted("fail") >= 4.0);

    // What is taken out by its operator is that first, and a restart forgets none of it.
    far.run(&["maint", "web"]).ok();
    everywhere(&mesh, "web", "far", "maint");
    far.run(&["maint", "web", "--off"]).ok();
    everywhere(&mesh, "web", "far", "failing");
    far.stop();
    far.start();
    everywhere(&mesh, "web", "far", "failing");
    ready.say([200; 2]);
    everywhere(&mesh, "web", "far", "ready");
}

#[test]
fn a_check_that_flaps_is_damped_by_rise_and_fall() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["solo"]);
    let solo = mesh.agent("solo");
    let ready = Ready::start(200);
    let flaps = |count: u64| {
        let begun = ready.requests();
        eventually("it was checked again and again", SOON, || {
            let requests = ready.requests() - begun;
            check(requests >= count, requests)
        });
    };
    expose(solo, "web", ready.address, json!({ "http": "/", "interval": "100ms" }));
    everywhere(&mesh, "web", "solo", "ready");
    ready.say([200, 503]);
    flaps(12);
    assert_eq!(solo.events("instance_failing"), Vec::<Value>::new(), "never three in a row");
    assert_eq!(endpoint(solo, "web", "solo")["state"], "ready");
    ready.say([503; 2]);
    everywhere(&mesh, "web", "solo", "failing");
    let passed = solo.events("instance_passing").len();
    ready.say([200, 503]);
    flaps(12);
    assert_eq!(solo.events("instance_passing").len(), passed, "never two in a row");
    ready.say([200; 2]);
    everywhere(&mesh, "web", "solo", "ready");
}

#[test]
fn a_refused_connection_takes_an_instance_out_within_a_second_whatever_its_interval() {
    let _turn = alone();
    let mesh = TestMesh::of(&["near", "far", "other"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let servers = ["sick", "well"].map(|name| Server::start(Kind::Named(name.to_owned())));
    for (agent, server) in [far, mesh.agent("other")].iter().zip(&servers) {
        expose(agent, "web", server.address, json!({ "tcp": true, "interval": "1m" }));
    }
    everywhere(&mesh, "web", "far", "ready");
    everywhere(&mesh, "web", "other", "ready");
    let entry = near.upstream("web");
    servers[0].stop();
    let begun = Instant::now();
    let is_failing = || endpoint(near, "web", "far")["state"] == "failing";
    while !is_failing() {
        assert_eq!(ask(entry, "who").unwrap(), "well", "nobody is refused meanwhile");
        assert!(begun.elapsed() < SOON, "it is never taken out");
    }
    let took = begun.elapsed();
    assert!(took < within(Duration::from_secs(1)), "{took:?}");
    everywhere(&mesh, "web", "far", "failing");
}

#[test]
fn a_check_of_tcp_follows_redis_as_it_goes_and_comes() {
    let _turn = beside_others();
    let Some(redis) = find("redis-server") else { return skip("redis-server is not installed") };
    let mesh = TestMesh::of(&["near", "far"]);
    let address = free_address();
    let start = || {
        let mut command = Command::new(&redis);
        command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]);
        Program::start(command.arg(address.port().to_string()).arg("--dir").arg(mesh.home.path()))
    };
    expose(mesh.agent("far"), "redis", address, json!({ "tcp": true, "interval": "200ms" }));
    everywhere(&mesh, "redis", "far", "failing");
    let running = start();
    everywhere(&mesh, "redis", "far", "ready");
    drop(running);
    everywhere(&mesh, "redis", "far", "failing");
    let reason = endpoint(mesh.agent("far"), "redis", "far")["reason"].clone();
    assert!(reason.as_str().unwrap().contains("onnection refused"), "{reason}");
    let _running = start();
    everywhere(&mesh, "redis", "far", "ready");
}

const GRPC_SERVER: &str = r#"
import sys, threading
from concurrent import futures
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
servicer = health.HealthServicer()
server = grpc.server(futures.ThreadPoolExecutor(4))
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
server.add_insecure_port("127.0.0.1:" + sys.argv[1])
words = {"up": health_pb2.HealthCheckResponse.SERVING, "down": health_pb2.HealthCheckResponse.NOT_SERVING}
server.start()
for line in open(sys.argv[2]):
    servicer.set("shop.Cart", words[line.strip()])
"#;

#[test]
fn a_check_of_grpc_asks_the_health_protocol_about_its_service() {
    let _turn = beside_others();
    let packages = ["grpcio==1.76.0", "grpcio-health-checking==1.76.0"];
    let Some(python) = python(&packages) else { return };
    let mesh = TestMesh::of(&["near", "far"]);
    let far = mesh.agent("far");
    let (address, words) = (free_address(), mesh.home.path().join("words"));
    run_program(Command::new("mkfifo").arg(&words), b"", SOON).ok();
    let mut command = Command::new(python);
    command.args(["-c", GRPC_SERVER, &address.port().to_string()]).arg(&words);
    let _server = Program::start_logged(&mut command, &mesh.home.path().join("grpc.log"));
    let mut words = fs::File::options().write(true).open(words).unwrap();
    let mut say = |word: &str| writeln!(words, "{word}").unwrap();
    for (service, about) in [("cart", "shop.Cart"), ("whole", ""), ("other", "shop.Other")] {
        expose(far, service, address, json!({ "grpc": about, "interval": "200ms" }));
    }
    say("up");
    everywhere(&mesh, "cart", "far", "ready");
    everywhere(&mesh, "whole", "far", "ready");
    say("down");
    everywhere(&mesh, "cart", "far", "failing");
    let reason = |service: &str| endpoint(far, service, "far")["reason"].clone();
    assert_eq!(reason("cart"), "grpc shop.Cart: NOT_SERVING");
    assert_eq!(endpoint(far, "whole", "far")["state"], "ready", "nobody asked about that one");
    let unknown = reason("other");
    assert!(unknown.as_str().unwrap().contains("grpc-status 5"), "{unknown}");
    say("up");
    everywhere(&mesh, "cart", "far", "ready");
}

#[test]
fn a_command_passes_warns_and_fails_by_its_exit_code_and_is_killed_when_it_hangs() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far"]);
    let far = mesh.agent("far");
    let server = Server::start(Kind::Echo);
    let (code, pids) = (mesh.home.path().join("code"), mesh.home.path().join("pids"));
    let (shown, kept) = (code.display(), pids.display());
    let script = format!(
        "read code < {shown}; if [ $code = hang ]; then sleep 600 & echo $! $$ >> {kept}; wait; fi; \
         echo said $code; exit $code"
    );
    let say = |word: &str| {
        fs::write(code.with_extension("new"), format!("{word}\n")).unwrap();
        fs::rename(code.with_extension("new"), &code).unwrap();
    };
    say("0");
    let command =
        json!({ "command": ["sh", "-c", script], "interval": "200ms", "timeout": "500ms" });
    expose(far, "web", server.address, command);
    let checks = || far.get("/v1/agent/checks")["service:web"].clone();
    let status = |expected: &str| {
        eventually(&format!("the check is {expected}"), SOON, || {
            let row = checks();
            check(row["Status"] == expected, row)
        });
    };
    everywhere(&mesh, "web", "far", "ready");
    say("1");
    status("warning");
    assert_eq!(checks()["Output"], "exit code 1: said 1");
    assert_eq!(endpoint(far, "web", "far")["state"], "ready", "a warning takes work");
    say("2");
    everywhere(&mesh, "web", "far", "failing");
    status("critical");
    say("0");
    everywhere(&mesh, "web", "far", "ready");
    say("hang");
    everywhere(&mesh, "web", "far", "failing");
    assert!(checks()["Output"].as_str().unwrap().contains("no answer within 500ms"));
    say("0");
    everywhere(&mesh, "web", "far", "ready");
    for pid in fs::read_to_string(&pids).unwrap().split_whitespace() {
        eventually("it is gone with what it started", SOON, || {
            let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
            check(stat.as_ref().map_or(true, |stat| stat.contains(") Z ")), stat)
        });
    }
}

#[test]
fn a_word_of_an_application_runs_out_while_as_many_checks_hang_as_may_run() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["solo"]);
    let solo = mesh.agent("solo");
    let server = Server::start(Kind::Echo);
    solo.run(&["expose", "told", &server.address.to_string(), "--health", "ttl=2s"]).ok();
    let begun = mesh.home.path().join("begun");
    let script = format!("echo >> {}; exec sleep 600", begun.display());
    for number in 0..32 {
        let hangs = json!({ "command": ["sh", "-c", script], "timeout": "10min" });
        let name = format!("hangs-{number}");
        expose(solo, &name, server.address, hangs);
    }
    eventually("every place is taken", SOON, || {
        let begun = fs::read_to_string(&begun).unwrap_or_default();
        check(begun.lines().count() == 32, begun.lines().count())
    });
    let headers = [("authorization", format!("Bearer {}", solo.api_token()))];
    let headers = headers.each_ref().map(|(name, value)| (*name, value.as_str()));
    let path = "/v1/agent/check/pass/service:told";
    assert_eq!(request(&solo.at(), "PUT", path, &headers, b"").unwrap().status, 200);
    everywhere(&mesh, "told", "solo", "ready");
    everywhere(&mesh, "told", "solo", "failing");
    let reason = endpoint(solo, "told", "solo")["reason"].clone();
    assert!(reason.as_str().unwrap().contains("no word for 2s"), "{reason}");
}

const PYTHON_TTL: &str = r#"
import sys
import consul
c = consul.Consul(port=int(sys.argv[1]))
c.http.session.headers["X-Consul-Token"] = sys.argv[2]
ttl, port = sys.argv[3], int(sys.argv[4])
c.agent.service.register("web", port=port, check=consul.Check.ttl(ttl))
status = lambda: c.agent.checks()["service:web"]["Status"]
said = [status()]
for push in (c.agent.check.ttl_pass, c.agent.check.ttl_warn, c.agent.check.ttl_fail, c.agent.check.ttl_pass):
    push("service:web", "as told")
    said.append(status())
said.append(c.agent.checks()["service:web"]["Output"])
print(" ".join(said))
print(c.agent.check.ttl_pass("service:nobody"))
"#;

#[test]
fn an_application_pushes_its_own_word_through_a_client_of_consul_and_its_silence_counts() {
    let _turn = beside_others();
    let Some(python) = python(&["python-consul==1.1.0"]) else { return };
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let server = Server::start(Kind::Echo);
    let port = server.address.port().to_string();
    let push = |ttl: &str| {
        let mut script = Command::new(&python);
        script.args(["-c", PYTHON_TTL, &far.api.port().to_string(), &far.api_token(), ttl, &port]);
        run_program(&mut script, b"", SOON).ok()
    };
    let said = push("1h");
    assert_eq!(said, "critical passing warning critical passing as told\nFalse\n");
    everywhere(&mesh, "web", "far", "ready");
    let passing = || near.get("/v1/health/service/web?passing").as_array().unwrap().len();
    eventually("it passes", SOON, || check(passing() == 1, passing()));
    // The same again with another ttl: it keeps its state, and is told again.
    push("2s");
    eventually("its silence is noticed", SOON, || {
        let row = far.get("/v1/health/service/web");
        let own = &row[0]["Checks"][1];
        check(own["Status"] == "critical" && own["Output"] == "no word for 2s", row.clone())
    });
    everywhere(&mesh, "web", "far", "failing");
    eventually("it passes no more", SOON, || check(passing() == 0, passing()));
}

#[test]
fn checks_of_files_are_read_refused_with_their_place_and_changed_by_a_reload() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    let ready = Ready::start(200);
    let file = mesh.home.path().join("murmesh.toml");
    let text = |health: &str| {
        let to = ready.address;
        format!("[[expose]]\nname = \"web\"\nto = \"{to}\"\nhealth = {health}\n")
    };
    let mut agent = Agent::new(&mesh.home, "solo");
    agent.arguments = vec!["-c".to_owned(), file.display().to_string()];
    fs::write(&file, text("{ http = \"/ready\", status = \"200-299\", interval = \"200ms\" }"))
        .unwrap();
    mesh.found_with(agent);
    let solo = mesh.agent("solo");
    everywhere(&mesh, "web", "solo", "ready");
    for (health, word) in [
        ("{ http = \"/ready\", fall = 0 }", "expose[0].health.fall"),
        ("{ http = \"ready\" }", "begins with /"),
        ("{ htpp = \"/ready\" }", "did you mean 'http'?"),
        ("[{ tcp = true }, { ttl = \"5\" }]", "expose[0].health[1].ttl"),
        ("{ tcp = true, ttl = \"5s\" }", "exactly one of"),
        ("{ tcp = true, interval = \"0s\" }", "health.interval = \"0s\": expected a time"),
        ("true", "expected { http"),
    ] {
        fs::write(&file, text(health)).unwrap();
        let told = solo.run(&["reload"]).fails(2);
        assert!(told.contains(word) && told.contains("murmesh.toml:4"), "{health}: {told}");
    }
    assert_eq!(endpoint(solo, "web", "solo")["state"], "ready", "nothing of it holds");
    let two = "[{ http = \"/ready\", interval = \"200ms\" }, { ttl = \"1h\" }]";
    fs::write(&file, text(two)).unwrap();
    let said = solo.run(&["reload"]).ok();
    assert!(said.contains("health http /ready -> http /ready, ttl 1h"), "{said}");
    assert_eq!(solo.get("/v1/agent/checks").as_object().unwrap().len(), 2);
    assert_eq!(endpoint(solo, "web", "solo")["state"], "ready", "until one of them fails");
    ready.say([503; 2]);
    everywhere(&mesh, "web", "solo", "failing");
    let listed = solo.run(&["expose"]).ok();
    let details = "http /ready every 200ms, within";
    assert!(listed.contains(details) && listed.contains("; ttl 1h"), "{listed}");
    // One that is exposed by hand says the same in short.
    solo.run(&["expose", "by-hand", &ready.address.to_string(), "--health", "/"]).ok();
    everywhere(&mesh, "by-hand", "solo", "failing");
}
