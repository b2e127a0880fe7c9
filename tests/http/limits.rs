//! How long a request may take, how often it is sent, and what is told of it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use super::client::Client;
use super::instance::Instance;
use super::{H2, H2_CLIENT, Stage, run_python, stage};
use crate::support::{
    Agent, SOON, TestMesh, beside_others, check, enrol, eventually, free_address, python, until,
};

/// What an instance does that has read a request.
#[derive(Clone, Copy)]
enum Rude {
    /// Says this and goes.
    Says(&'static str),
    /// Goes after this time.
    Goes(Duration),
    /// Stays, and says nothing.
    Stays,
}

/// An instance that is rude to everybody. Counts how often.
fn rude(manner: Rude) -> (std::net::SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, count) = (listener.local_addr().unwrap(), Arc::<AtomicU64>::default());
    let counted = Arc::clone(&count);
    thread::spawn(move || {
        let mut stayed = Vec::new();
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            if stream.read(&mut [0; 4_096]).is_ok_and(|len| len > 0) {
                counted.fetch_add(1, Ordering::Relaxed);
            }
            match manner {
                Rude::Says(text) => drop(stream.write_all(text.as_bytes())),
                Rude::Goes(time) => until(Instant::now() + time),
                Rude::Stays => stayed.push(stream),
            }
        }
    });
    (address, count)
}

/// Offers these instances as `web`, whose requests of GET may be sent twice.
fn offer(stage: &Stage, instances: &[std::net::SocketAddr]) {
    for (number, address) in instances.iter().enumerate() {
        let (id, address) = (format!("web-{number}"), address.to_string());
        let expose = ["expose", "web", &address, "--id", &id, "--protocol", "http"];
        stage.b().run(&[&expose[..], &["--idempotent", "GET *"]].concat()).ok();
    }
    stage.a().wait_endpoints("web", instances.len());
}

/// A further caller, with this in its configuration file.
fn caller(stage: &Stage, text: &str) -> Agent {
    let file = stage.mesh.home.path().join("c.toml");
    fs::write(&file, text).unwrap();
    let mut caller = Agent::new(&stage.mesh.home, "c");
    caller.arguments = vec!["-c".to_owned(), file.display().to_string()];
    enrol(&caller, &stage.mesh.invite(1));
    caller.spawn();
    caller
}

/// The time that a request left its instance, which said the request's head.
fn time_left(head: &str) -> Option<u64> {
    let line = head.lines().find_map(|line| line.strip_prefix("x-murmesh-deadline-ms: "))?;
    line.trim().parse().ok()
}

#[test]
fn request_that_is_declared_idempotent_is_sent_again_and_no_other_is() {
    let _turn = beside_others();
    let (instance, (losing, lost)) = (Instance::start("good"), rude(Rude::Says("")));
    let mut stage = Stage::of("http", &[]);
    offer(&stage, &[instance.address, losing]);
    stage.balance("random"); // by its failures the losing one would be left alone
    let entry = stage.entry;
    eventually("the losing instance had a GET", 4 * SOON, || {
        let answer = Client::to(entry).unwrap().get("/echo").unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
        let lost = lost.load(Ordering::Relaxed);
        check(lost > 0, lost)
    });
    let retries = |result: &str| {
        let result = format!("result=\"{result}\"");
        stage.a().metric("murmesh_retries_total", &[&result])
    };
    assert!(retries("success") >= 1.0, "{}", retries("success"));
    let (before, mut number) = (lost.load(Ordering::Relaxed), 0);
    eventually("the losing instance had a POST", 4 * SOON, || {
        number += 1;
        let id = format!("x-id: {number}\r\n");
        let answer = Client::to(entry).unwrap().ask("POST", "/echo", &id, b"pay").unwrap();
        assert!([200, 502].contains(&answer.status), "{answer:?}");
        check(lost.load(Ordering::Relaxed) > before, number)
    });
    let deliveries = instance.seen.deliveries();
    let lost = lost.load(Ordering::Relaxed) - before;
    assert_eq!(deliveries.len() as u64 + lost, number, "each POST went to one of the two");
    assert!(deliveries.values().all(|count| *count == 1), "{deliveries:?}");
}

#[test]
fn answer_that_an_instance_cannot_now_is_asked_elsewhere_and_the_instance_left_alone() {
    let _turn = beside_others();
    let busy =
        "HTTP/1.1 503 Service Unavailable\r\nretry-after: 30\r\ncontent-length: 4\r\n\r\nbusy";
    let (instance, (busy, asked)) = (Instance::start("good"), rude(Rude::Says(busy)));
    let stage = Stage::of("http", &[]);
    offer(&stage, &[busy]);
    let entry = stage.a().upstream("web");
    // Nobody else is there: its own word is the answer.
    let answer = Client::to(entry).unwrap().get("/echo").unwrap();
    let said = (answer.status, answer.header("retry-after"), answer.header("x-murmesh-reason"));
    assert_eq!(said, (503, Some("30"), None), "{answer:?}");
    assert_eq!((answer.text().as_str(), asked.load(Ordering::Relaxed)), ("busy", 1));
    offer(&stage, &[busy, instance.address]);
    for number in 0..100 {
        let answer = Client::to(entry).unwrap().get("/echo").unwrap();
        assert_eq!(answer.status, 200, "{number}: {answer:?}");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1, "it wanted to be left alone for 30 s");
    // Another caller has not heard that: it asks once, asks elsewhere, and leaves it alone, too.
    let entry = stage.b().upstream("web");
    for number in 0..100 {
        let answer = Client::to(entry).unwrap().get("/echo").unwrap();
        assert_eq!(answer.status, 200, "{number}: {answer:?}");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    assert_eq!(stage.b().metric("murmesh_retries_total", &["result=\"success\""]), 1.0);
}

#[test]
fn request_that_takes_long_is_asked_of_a_second_instance_where_the_caller_wants_that() {
    let _turn = beside_others();
    let (instance, (mute, asked)) = (Instance::start("good"), rude(Rude::Stays));
    let (stage, entry) = (Stage::of("http", &[]), free_address());
    let text = format!(
        "[[upstream]]\nservice = \"web\"\nlisten = \"{entry}\"\nbalance = \"round_robin\"\n\
         retry = {{ hedge = \"30ms\" }}\n"
    );
    let caller = caller(&stage, &text);
    offer(&stage, &[mute, instance.address]);
    caller.wait_endpoints("web", 2);
    for number in 0..40 {
        let answer = Client::to(entry).unwrap().get("/echo").unwrap();
        assert_eq!(answer.status, 200, "{number}: {answer:?}");
    }
    let asked = asked.load(Ordering::Relaxed);
    let hedged = caller.metric("murmesh_retries_total", &["result=\"success\""]);
    // One that the good instance answers late is asked of the mute one beside it.
    assert!(
        hedged > 0.0 && hedged <= asked as f64,
        "{asked} were mute, {hedged} answered elsewhere"
    );
}

#[test]
fn caller_s_deadline_ends_a_request_and_the_instance_is_told_what_is_left() {
    let _turn = beside_others();
    let (stage, instance) = stage();
    let head = stage.client().ask("GET", "/head", "x-murmesh-deadline-ms: 9000\r\n", b"").unwrap();
    assert!(time_left(&head.text()).is_some_and(|left| left < 9_000), "{}", head.text());
    assert!(head.text().contains("x-murmesh-peer: a"), "{}", head.text());
    assert_eq!(head.header("x-murmesh-node"), Some("b"));
    let late = stage.client().ask("GET", "/wait", "x-murmesh-deadline-ms: 300\r\n", b"").unwrap();
    assert_eq!((late.status, late.header("x-murmesh-reason")), (504, Some("deadline")));
    eventually("the instance sees that it was given up", SOON, || {
        let endings = instance.seen.endings();
        check(endings == ["cut"], endings)
    });
}

#[test]
fn next_instance_is_told_what_the_one_before_it_has_left_of_the_time() {
    let _turn = beside_others();
    let held = Duration::from_millis(300);
    let (instance, (slow, asked)) = (Instance::start("good"), rude(Rude::Goes(held)));
    let mut stage = Stage::of("http", &[]);
    offer(&stage, &[instance.address, slow]);
    stage.balance("random");
    eventually("the slow instance was asked first", 4 * SOON, || {
        let before = asked.load(Ordering::Relaxed);
        let fields = "x-murmesh-deadline-ms: 9000\r\n";
        let head = stage.client().ask("GET", "/head", fields, b"").unwrap();
        assert_eq!(head.status, 200, "{head:?}");
        let was_asked = asked.load(Ordering::Relaxed) > before;
        let left_max = if was_asked { 8_700 } else { 8_999 };
        let left = time_left(&head.text());
        assert!(left.is_some_and(|left| left <= left_max), "{left:?} of {left_max}");
        check(was_asked, left)
    });
    let odd = stage.client().ask("GET", "/", "x-murmesh-deadline-ms: soon\r\n", b"").unwrap();
    assert_eq!((odd.status, odd.header("x-murmesh-reason")), (400, Some("malformed")));
}

/// Breakers are as good as off: what ends the repetitions is the budget alone.
#[test]
fn repetitions_are_a_fifth_of_the_requests_and_ten_a_second_however_many_fail() {
    let _turn = beside_others();
    let losing = [(); 3].map(|()| rude(Rude::Says("")));
    let (stage, entry) = (Stage::of("http", &[]), free_address());
    let text = format!(
        "[[upstream]]\nservice = \"web\"\nlisten = \"{entry}\"\nbalance = \"round_robin\"\n\
         breaker = {{ errors = 1000, ratio = 1.0, min = 10000, scope = \"local\" }}\n"
    );
    let caller = caller(&stage, &text);
    offer(&stage, &losing.each_ref().map(|(address, _)| *address));
    caller.wait_endpoints("web", losing.len());
    let (clients, requests) = (4, 250);
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut client = Client::to(entry).unwrap();
                for number in 0..requests {
                    let answer = client.get("/echo").unwrap();
                    let reason = answer.header("x-murmesh-reason");
                    assert_eq!((answer.status, reason), (502, Some("lost")), "{number}");
                }
            });
        }
    });
    let asked: u64 = losing.iter().map(|(_, asked)| asked.load(Ordering::Relaxed)).sum();
    let again = asked as f64 - f64::from(clients * requests);
    // What a member at rest has is that of 10 s.
    let again_max =
        0.2 * f64::from(clients * requests) + 10.0 * (10.0 + begun.elapsed().as_secs_f64());
    assert!((100.0..=again_max).contains(&again), "{again} of {again_max}");
    let refused = caller.metric("murmesh_retries_total", &["result=\"over_budget\""]);
    assert_eq!(refused + again, f64::from(clients * requests), "each wanted one");
}

#[test]
fn what_the_mesh_answers_is_written_down_also_where_no_request_can_be_read() {
    let _turn = beside_others();
    let instance = Instance::start("web");
    let stage = Stage::of("http", &[instance.address]);
    let (entry, gateway) = (free_address(), free_address());
    let log = stage.mesh.home.path().join("log");
    let text = format!(
        "[listen]\ngateway = \"{gateway}\"\n[telemetry]\naccess_log = \"{}\"\n\
         [[upstream]]\nservice = \"web\"\nlisten = \"{entry}\"\n",
        log.display()
    );
    let caller = caller(&stage, &text);
    caller.wait_endpoints("web", 1);
    let cases = [
        (entry, "GET / HTTP/1.1\r\n\r\n", "GET".into(), Value::Null, 400, "malformed"),
        (entry, "\x01\x02\r\n\r\n", Value::Null, Value::Null, 400, "malformed"),
        (
            entry,
            "GET /a HTTP/1.1\r\nhost: web\r\nconnection: host\r\n\r\n",
            "GET".into(),
            "web".into(),
            400,
            "malformed",
        ),
        (entry, "GET /< HTTP/1.1\r\nhost: a\r\n\r\n", "GET".into(), Value::Null, 400, "malformed"),
        (
            entry,
            "CONNECT web.mesh:80 HTTP/1.1\r\nhost: web.mesh:80\r\nconnection: close\r\n\r\n",
            "CONNECT".into(),
            Value::Null,
            405,
            "no_tunnel",
        ),
        (
            gateway,
            "GET / HTTP/1.1\r\nhost: a.example\r\nconnection: close\r\n\r\n",
            "GET".into(),
            Value::Null,
            404,
            "foreign_name",
        ),
    ];
    let lines = || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    for (number, (door, request, method, service, status, reason)) in cases.into_iter().enumerate()
    {
        let mut client = Client::to(door).unwrap();
        client.say(request).unwrap();
        let answer = client.hear(true).unwrap();
        assert_eq!((answer.status, answer.header("x-murmesh-reason")), (status, Some(reason)));
        eventually("it is written down", SOON, || check(lines().len() > number, lines()));
        let line = &lines()[number];
        let seen = [&line["method"], &line["service"], &line["status"], &line["reason"]];
        assert_eq!(seen, [&method, &service, &status.into(), &reason.into()], "{request}");
        assert_eq!(line["bytes"], answer.body.len(), "{request}");
    }
    // What is no HTTP is counted as it is sent.
    let mut client = Client::to(gateway).unwrap();
    client.say("CONNECT web.mesh:80 HTTP/1.1\r\nhost: web.mesh:80\r\n\r\n").unwrap();
    assert_eq!(client.hear(false).unwrap().status, 200);
    client.say("GET /last HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n").unwrap();
    let sent = client.rest().unwrap().len();
    assert!(sent > 0);
    drop(client);
    eventually("it is written down", SOON, || check(lines().len() == 7, lines()));
    let line = &lines()[6];
    let seen = [&line["method"], &line["status"], &line["reason"], &line["bytes"]];
    assert_eq!(seen, [&"CONNECT".into(), &200.into(), &Value::Null, &sent.into()]);
}

#[test]
fn files_limit_what_a_request_may_take_and_say_where_it_is_written_down() {
    let _turn = beside_others();
    let instance = Instance::start("web");
    let mut mesh = TestMesh::new();
    let (address, entry) = (instance.address.to_string(), free_address());
    let (file, log) = (mesh.home.path().join("murmesh.toml"), mesh.home.path().join("log"));
    let text = format!(
        "[telemetry]\naccess_log = \"{}\"\n[[upstream]]\nservice = \"web\"\nlisten = \"{entry}\"\n\
         timeout = {{ request = \"400ms\" }}\nretry = {{ tries = 1, budget = \"10%\" }}\n",
        log.display()
    );
    fs::write(&file, text).unwrap();
    let mut a = Agent::new(&mesh.home, "a");
    a.arguments = vec!["-c".to_owned(), file.display().to_string()];
    mesh.found_with(a);
    let token = mesh.invite(1);
    let b = mesh.join("b", &token);
    b.run(&["expose", "web", &address, "--protocol", "http"]).ok();
    let a = mesh.agent("a");
    a.wait_endpoints("web", 1);
    let mut client = Client::to(entry).unwrap();
    assert_eq!(client.get("/echo?token=secret").unwrap().status, 200);
    let late = client.get("/wait").unwrap();
    assert_eq!((late.status, late.header("x-murmesh-reason")), (504, Some("deadline")));
    let lines = || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    eventually("both requests are written down", SOON, || check(lines().len() == 2, lines()));
    let [first, second] = &lines()[..] else { panic!("{:?}", lines()) };
    let seen = [&first["path"], &first["status"], &first["node"], &first["reason"]];
    assert_eq!(seen, [&Value::from("/echo"), &200.into(), &"b".into(), &Value::Null]);
    let seen = [&second["path"], &second["status"], &second["node"], &second["reason"]];
    assert_eq!(seen, [&Value::from("/wait"), &504.into(), &"b".into(), &"deadline".into()]);
    assert!(second["duration_ms"].as_f64().unwrap() >= 400.0, "{second}");
    // Moved away, as log rotation does.
    fs::rename(&log, log.with_extension("1")).unwrap();
    a.run(&["reload"]).ok();
    assert_eq!(client.get("/echo").unwrap().status, 200);
    eventually("the next one is in a new file", SOON, || check(lines().len() == 1, lines()));
}

#[test]
fn ping_and_routes_say_who_takes_a_call_and_what_becomes_of_it() {
    let _turn = beside_others();
    let (stage, mut instance) = stage();
    let a = stage.a();
    let pinged: Value = serde_json::from_str(&a.run(&["ping", "web", "--json"]).ok()).unwrap();
    assert_eq!((&pinged[0]["ok"], &pinged[0]["node"]), (&true.into(), &"b".into()), "{pinged}");
    assert!(pinged[0]["connect_ms"].as_f64().is_some_and(|time| time > 0.0), "{pinged}");
    let routes = a.run(&["routes", "web", "GET", "/items/7", "--json"]).ok();
    let routes: Value = serde_json::from_str(&routes).unwrap();
    assert_eq!(routes[0]["protocol"], "http");
    assert_eq!(routes[0]["repeatable"], false);
    assert_eq!(routes[0]["instances"][0]["share"], 100.0);
    assert_eq!(routes[0]["entries"][0]["listen"], stage.entry.to_string());
    assert!(a.run(&["routes"]).ok().contains("a decision for each request"));
    a.run(&["ping", "nobody"]).fails(1);
    a.run(&["routes", "web", "GET"]).fails(64);
    for request in [["get", "/items/7"], ["GET", "items/7"]] {
        let told = a.run(&[&["routes", "web"][..], &request].concat()).fails(64);
        assert!(told.contains("is no request"), "{told}");
    }
    instance.stop();
    let told = a.run(&["ping", "web"]);
    assert!(told.stdout.contains("unreachable"), "{told:?}");
    told.fails(1);
}

#[test]
fn callers_of_a_service_that_is_gone_are_told_so_in_its_own_protocol() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    assert_eq!(stage.client().get("/echo").unwrap().status, 200);
    stage.b().run(&["unexpose", "web-0"]).ok();
    eventually("nobody offers it", SOON, || {
        let answer = stage.client().get("/echo").map_err(|error| error.kind());
        let seen = answer.as_ref().map(|answer| (answer.status, answer.header("x-murmesh-reason")));
        check(seen == Ok((404, Some("unknown_service"))), answer)
    });
    let answer = stage.client().get("/echo").unwrap();
    assert_eq!((answer.status, answer.header("x-murmesh-service")), (404, Some("web")));
    assert!(answer.text().contains("murmesh endpoints web"), "{}", answer.text());
}

#[test]
fn calls_that_an_agent_slept_through_are_no_fault_of_their_instance() {
    let _turn = beside_others();
    let instance = Instance::start("web");
    let mut mesh = TestMesh::new();
    let (address, entry) = (instance.address.to_string(), free_address());
    let file = mesh.home.path().join("murmesh.toml");
    let text = format!(
        "[[upstream]]\nservice = \"web\"\nlisten = \"{entry}\"\ntimeout = {{ request = \"2s\" }}\n"
    );
    fs::write(&file, text).unwrap();
    let mut a = Agent::new(&mesh.home, "a");
    a.arguments = vec!["-c".to_owned(), file.display().to_string()];
    mesh.found_with(a);
    let a = mesh.agent("a");
    a.run(&["expose", "web", &address, "--protocol", "http"]).ok();
    a.wait_endpoints("web", 1);
    let late_calls = |sleep: Option<Duration>| {
        let mut clients: Vec<_> = (0..8).map(|_| Client::to(entry).unwrap()).collect();
        for client in &mut clients {
            client.say("GET /wait HTTP/1.1\r\nhost: web\r\n\r\n").unwrap();
        }
        eventually("all are under way", SOON, || {
            let rows = a.get("/v1/mesh/endpoints/web");
            check(rows[0]["inflight"] == 8, rows)
        });
        if let Some(sleep) = sleep {
            a.signal(Signal::STOP);
            until(std::time::Instant::now() + sleep);
            a.signal(Signal::CONT);
        }
        for client in &mut clients {
            assert_eq!(client.hear(false).unwrap().status, 504);
        }
    };
    late_calls(Some(Duration::from_secs(4)));
    assert_eq!(a.events("breaker_opened").len(), 0, "it was the agent that slept");
    late_calls(None);
    eventually("the same calls open it while the agent is awake", SOON, || {
        let opened = a.events("breaker_opened").len();
        check(opened == 1, opened)
    });
}

#[test]
fn instances_of_a_service_that_differ_in_protocol_are_told() {
    let _turn = beside_others();
    let (stage, instance) = stage();
    let to = instance.address.to_string();
    stage.b().run(&["expose", "web", &to, "--id", "other", "--protocol", "h2"]).ok();
    eventually("the services tell it", SOON, || {
        let services = stage.a().get("/v1/mesh/services");
        check(services[0]["mixed_protocols"] == true, services)
    });
    assert!(stage.a().run(&["services"]).ok().contains("with another protocol"));
    let told = stage.a().run(&["check"]).stdout;
    assert!(told.contains("instances have several protocols, of web"), "{told}");
}

#[test]
fn what_a_client_does_to_its_own_request_counts_against_no_instance() {
    let _turn = beside_others();
    let (stage, _instance) = stage();
    let heads = ["transfer-encoding: chunked\r\n\r\nzz\r\n", "content-length: 30\r\n\r\nabc"];
    for number in 0..8 {
        let mut client = stage.client();
        client.say(format!("POST /echo HTTP/1.1\r\nhost: web\r\n{}", heads[number % 2])).unwrap();
        client.end().unwrap();
        let answer = client.hear(true).unwrap();
        assert_eq!(answer.status, 400, "{answer:?}");
    }
    let row = &stage.a().get("/v1/mesh/endpoints/web")[0];
    assert_eq!((&row["state"], &row["avoided"]), (&"ready".into(), &false.into()), "{row}");
    assert_eq!(stage.a().events("breaker_opened").len(), 0);
    assert_eq!(stage.a().events("request_failed").len(), 0);
    assert_eq!(stage.client().get("/").unwrap().status, 200);
}

#[test]
fn instance_that_says_nothing_to_a_request_that_stays_open_is_given_up_and_not_its_client() {
    let _turn = beside_others();
    let Some(python) = python(&[H2]) else { return };
    let (address, _) = rude(Rude::Stays);
    let stage = Stage::of("http", &[address]);
    let entry = free_address();
    let text = format!(
        "[[upstream]]\nservice = \"web\"\nlisten = \"{entry}\"\ntimeout = {{ idle = \"400ms\" }}\n"
    );
    let caller = caller(&stage, &text);
    caller.wait_endpoints("web", 1);
    assert_eq!(run_python(&python, H2_CLIENT, &["open", &entry.to_string()]), "504\n");
    assert_eq!(caller.events("request_failed")[0]["reason"], "timeout");
}

#[test]
fn time_that_a_client_takes_for_its_body_is_neither_the_instance_s_nor_over_after_the_idle_limit() {
    let _turn = beside_others();
    let instance = Instance::start("web");
    let stage = Stage::of("http", &[instance.address]);
    let entry = free_address();
    let text = format!(
        "[[upstream]]\nservice = \"web\"\nlisten = \"{entry}\"\ntimeout = {{ idle = \"400ms\" }}\n"
    );
    let caller = caller(&stage, &text);
    caller.wait_endpoints("web", 1);
    let mut client = Client::to(entry).unwrap();
    client.say("POST /echo HTTP/1.1\r\nhost: web\r\ncontent-length: 10\r\n\r\n").unwrap();
    for _ in 0..10 {
        until(Instant::now() + Duration::from_millis(100));
        client.say("b").unwrap();
    }
    let answer = client.hear(true).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    let row = &caller.get("/v1/mesh/endpoints/web")[0];
    assert!(row["latency_ms"].as_f64().is_none_or(|latency| latency < 500.0), "{row}");
}
