//! Sick instances between real agents: callers go around them, and come back.

use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::Duration;

use crate::support::backends::{Backend, Caller, Told, load, shares, wait_state};
use crate::support::{SOON, TestMesh, alone, beside_others, check, eventually, free_address};

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A mesh whose member `b` has these instances of `web`, and an entry of `a`.
#[track_caller]
fn stage(backends: &[&Backend], more: &[&str]) -> (TestMesh, SocketAddr) {
    let mesh = TestMesh::of(&["a", "b"]);
    backends.iter().for_each(|backend| backend.expose(mesh.agent("b"), more));
    mesh.agent("a").wait_endpoints("web", backends.len());
    let entry = mesh.agent("a").upstream("web");
    (mesh, entry)
}

fn breakers(mesh: &TestMesh) -> Vec<serde_json::Value> {
    mesh.agent("a").get("/v1/mesh/breakers").as_array().expect("rows").clone()
}

fn failed(told: &[Told]) -> Vec<&Told> {
    told.iter().filter(|one| one.status != 200).collect()
}

#[test]
fn callers_of_three_see_less_than_a_hundredth_of_errors_when_one_fails_with_a_third() {
    let _turn = alone();
    let backends = ["one", "two", "sick"].map(Backend::start);
    let (mesh, entry) = stage(&backends.each_ref(), &["--idempotent", "GET *"]);
    backends[2].manners.failing.store(300, Relaxed);
    let told = load(entry, 8, millis(40), millis(9_000));
    let late: Vec<_> = told.iter().filter(|one| one.at > millis(3_000)).cloned().collect();
    assert!(failed(&late).len() * 100 < late.len(), "{:?} of {}", failed(&late), late.len());
    let retries: f64 = ["success", "failure"]
        .map(|result| format!("result=\"{result}\""))
        .iter()
        .map(|result| mesh.agent("a").metric("murmesh_retries_total", &[result]))
        .sum();
    let budget = 100.0 + 90.0 + 0.2 * told.len() as f64;
    assert!(retries <= budget, "{retries} retries of {} requests", told.len());
}

#[test]
fn instance_that_fails_fast_attracts_nobody() {
    let _turn = alone();
    let backends = ["one", "two", "sick"].map(Backend::start);
    let (_mesh, entry) = stage(&backends.each_ref(), &[]);
    load(entry, 4, millis(20), millis(500));
    backends[2].manners.failing.store(1_000, Relaxed);
    let told = load(entry, 8, millis(40), millis(5_000));
    let late: Vec<_> = told.iter().filter(|one| one.at > millis(1_000)).cloned().collect();
    let by_sick = shares(&late).get("sick").copied().unwrap_or(0);
    assert!(by_sick * 50 < late.len(), "{:?} of {}", shares(&late), late.len());
}

#[test]
fn instance_that_fails_is_ejected_and_called_again_once_it_is_well() {
    let _turn = alone();
    let backends = ["one", "two", "sick"].map(Backend::start);
    let (mesh, _) = stage(&backends.each_ref(), &[]);
    let a = mesh.agent("a");
    let sick = &backends[2].manners;
    let listen = free_address();
    a.run(&["upstream", "web", &listen.to_string(), "--balance", "random"]).ok();
    sick.failing.store(1_000, Relaxed);
    eventually("its breaker opens", SOON, || {
        let told = load(listen, 2, millis(20), millis(200));
        let rows = breakers(&mesh);
        check(rows.iter().any(|row| row["instance"] == "sick" && row["state"] == "open"), told)
    });
    let row = breakers(&mesh).into_iter().find(|row| row["instance"] == "sick").unwrap();
    assert_eq!((&row["source"], &row["caller"]), (&"local".into(), &"a".into()), "{row}");
    assert!(row["evidence"][0]["failures"].as_u64() >= Some(1), "{row}");
    assert!(a.run(&["breakers"]).ok().contains("sick"));
    assert!(!a.events("breaker_opened").is_empty());
    sick.failing.store(0, Relaxed);
    eventually("it is called as usual", SOON, || {
        load(listen, 8, millis(20), millis(500));
        check(breakers(&mesh).is_empty(), breakers(&mesh))
    });
    assert_eq!(a.events("breaker_closed").len(), 1);
    let transitions = |to: &str| {
        let labels = ["service=\"web\"", &format!("to=\"{to}\""), "source=\"local\""];
        a.metric("murmesh_breaker_transitions_total", &labels)
    };
    assert!(transitions("open") >= 1.0 && transitions("closed") == 1.0);
    let before = sick.requests();
    load(listen, 8, millis(20), millis(1_000));
    assert!(sick.requests() > before, "it has its share again");
}

#[test]
fn instance_that_its_callers_see_fail_is_ejected_and_returns_at_an_agent_that_never_called_it() {
    let _turn = beside_others();
    let backends = ["one", "two", "sick"].map(Backend::start);
    let sick = &backends[2].manners;
    let mesh = TestMesh::of(&["a", "b", "c", "d", "onlooker"]);
    backends.iter().for_each(|backend| backend.expose(mesh.agent("b"), &[]));
    let entries = ["a", "c", "d"].map(|caller| {
        mesh.agent(caller).wait_endpoints("web", backends.len());
        let listen = free_address();
        let turns = ["upstream", "web", &listen.to_string(), "--balance", "random"];
        mesh.agent(caller).run(&turns).ok();
        listen
    });
    let onlooker = mesh.agent("onlooker");
    let transitions = |to: &str| {
        let labels = ["service=\"web\"", &format!("to=\"{to}\""), "source=\"mesh\""];
        onlooker.metric("murmesh_breaker_transitions_total", &labels)
    };
    let wait = |what: &str, kind: &str, to: &str| {
        eventually(what, SOON, || {
            thread::scope(|scope| {
                for entry in entries {
                    scope.spawn(move || load(entry, 2, millis(20), millis(300)));
                }
            });
            let events = onlooker.events(kind);
            let is_seen = events.iter().any(|event| event["subject"] == "sick@b");
            check(is_seen && transitions(to) >= 1.0, (events, transitions(to)))
        });
    };
    sick.failing.store(1_000, Relaxed);
    wait("it is ejected", "instance_ejected", "open");
    sick.failing.store(0, Relaxed);
    wait("it returns", "instance_returning", "half_open");
}

#[test]
fn faults_of_callers_eject_nobody() {
    let _turn = beside_others();
    let backends = [("busy", 429), ("missing", 404), ("unable", 501)].map(|(name, status)| {
        let backend = Backend::start(name);
        backend.manners.failing.store(1_000, Relaxed);
        backend.manners.status.store(status, Relaxed);
        backend
    });
    let (mesh, _) = stage(&backends.each_ref(), &[]);
    let listen = free_address();
    let turns = ["upstream", "web", &listen.to_string(), "--balance", "round_robin"];
    mesh.agent("a").run(&turns).ok();
    let mut caller = Caller::to(listen);
    for _ in 0..200 {
        let (status, by, _) = caller.get("").unwrap();
        assert!([429, 404, 501].contains(&status), "{status} by {by}");
    }
    assert!(backends.iter().all(|backend| backend.manners.requests() >= 60), "all are called");
    assert_eq!(breakers(&mesh), Vec::<serde_json::Value>::new());
    for backend in &backends {
        wait_state(mesh.agent("a"), &backend.name, "ready", SOON);
    }
}

#[test]
fn instance_that_refuses_connections_is_out_after_two_and_no_caller_sees_it() {
    let _turn = beside_others();
    let well = Backend::start("well");
    let (mesh, _) = stage(&[&well], &[]);
    let nothing = free_address().to_string();
    let gone = ["expose", "web", &nothing, "--id", "gone", "--protocol", "http"];
    mesh.agent("b").run(&gone).ok();
    mesh.agent("a").wait_endpoints("web", 2);
    let entry = mesh.agent("a").upstream("web");
    eventually("its breaker opens", SOON, || {
        let told = load(entry, 4, millis(20), millis(200));
        assert_eq!(failed(&told).len(), 0, "{:?}", failed(&told));
        let rows = breakers(&mesh);
        check(rows.iter().any(|row| row["instance"] == "gone" && row["state"] != "closed"), rows)
    });
    let row = breakers(&mesh).into_iter().find(|row| row["instance"] == "gone").unwrap();
    assert_eq!(row["reason"], "connect_errors", "{row}");
    let rows = mesh.agent("a").get("/v1/mesh/endpoints/web");
    let row = rows.as_array().unwrap().iter().find(|row| row["instance"] == "gone").unwrap();
    assert!(["ejected", "probing"].contains(&row["state"].as_str().unwrap()), "{row}");
}

#[test]
fn tcp_instance_that_cuts_every_connection_is_ejected() {
    let _turn = beside_others();
    let cutting = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = cutting.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for stream in cutting.incoming().flatten() {
            let _ = rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO));
        }
    });
    let mesh = TestMesh::of(&["a", "b"]);
    mesh.agent("b").run(&["expose", "db", &address]).ok();
    mesh.agent("a").wait_endpoints("db", 1);
    let entry = mesh.agent("a").upstream("db");
    eventually("its breaker opens", SOON, || {
        let mut caller = std::net::TcpStream::connect(entry).unwrap();
        let cut = caller.read(&mut [0; 1]);
        assert!(!matches!(cut, Ok(1)), "nobody says anything");
        let rows = breakers(&mesh);
        check(rows.iter().any(|row| row["state"] == "open"), rows)
    });
}
