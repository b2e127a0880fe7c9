//! How long a request may take, how often it is sent, and what is told of it.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use serde_json::Value;

use super::client::Client;
use super::instance::Instance;
use super::{Stage, stage};
use crate::support::{
    Agent, SOON, TestMesh, beside_others, check, enrol, eventually, free_address,
};

/// What an instance does that has read a request.
#[derive(Clone, Copy)]
enum Rude {
    /// Says this and goes.
    Says(&'static str),
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
    let file = stage.mesh.home.path().join("a").join("conf.toml");
    let text = format!(
        "[[upstream]]\nservice = \"web\"\nlisten = \"{entry}\"\nbalance = \"round_robin\"\n\
         retry = {{ hedge = \"30ms\" }}\n"
    );
    fs::write(&file, text).unwrap();
    let mut caller = Agent::new(&stage.mesh.home, "c");
    caller.arguments = vec!["-c".to_owned(), file.display().to_string()];
    enrol(&caller, &stage.mesh.invite(1));
    caller.spawn();
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
    let left = |text: &str| {
        let line = text.lines().find(|line| line.starts_with("x-murmesh-deadline-ms: "))?;
        line.rsplit(' ').next()?.trim().parse::<u64>().ok()
    };
    assert!(left(&head.text()).is_some_and(|left| left <= 9_000), "{}", head.text());
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
    assert_eq!(seen, [&Value::from("/wait"), &504.into(), &Value::Null, &"deadline".into()]);
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
