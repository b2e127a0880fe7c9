//! Who takes a call, between real agents: by load, by turns, by weight, by key, by zone.

use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use crate::support::backends::{Backend, Caller, Told, load, load_while, shares, wait_state};
use crate::support::{
    Agent, SOON, TestMesh, alone, beside_others, check, eventually, free_address,
};

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A mesh whose member `b` has these instances of `web`, each with what it is exposed with.
#[track_caller]
fn stage(backends: &[(&Backend, &[&str])]) -> TestMesh {
    let mesh = TestMesh::of(&["a", "b"]);
    for (backend, more) in backends {
        backend.expose(mesh.agent("b"), more);
    }
    mesh.agent("a").wait_endpoints("web", backends.len());
    mesh
}

/// An entry of `a` that is balanced like this.
#[track_caller]
fn entry(mesh: &TestMesh, more: &[&str]) -> SocketAddr {
    let listen = free_address();
    let words = ["upstream", "web", &listen.to_string()].map(str::to_owned);
    let words: Vec<_> = words.iter().map(String::as_str).chain(more.iter().copied()).collect();
    mesh.agent("a").run(&words).ok();
    listen
}

/// Who answers so many calls, one after the other.
fn one_after_another(entry: SocketAddr, calls: usize) -> Vec<Told> {
    let mut caller = Caller::to(entry);
    let call = |_| {
        let (status, by, reason) = caller.get("").unwrap();
        Told { caller: 0, at: Duration::ZERO, status, by, reason }
    };
    (0..calls).map(call).collect()
}

#[test]
fn instance_that_takes_half_a_second_longer_gets_less_than_a_tenth_of_the_calls() {
    let _turn = alone();
    let backends = ["one", "two", "slow"].map(Backend::start);
    backends[2].manners.delay_ms.store(500, Relaxed);
    let mesh = stage(&backends.each_ref().map(|backend| (backend, &[][..])));
    let told = load(entry(&mesh, &[]), 8, millis(40), millis(6_000));
    let shares = shares(&told);
    let slow = shares.get("slow").copied().unwrap_or(0);
    assert!(slow * 10 < told.len(), "{shares:?} of {}", told.len());
    assert!(shares["one"] > told.len() / 5 && shares["two"] > told.len() / 5, "{shares:?}");
    let rows = mesh.agent("a").get("/v1/mesh/endpoints/web");
    let rows = rows.as_array().unwrap();
    let latency = |id: &str| {
        let row = rows.iter().find(|row| row["instance"] == id).unwrap();
        row["latency_ms"].as_f64()
    };
    assert!(latency("slow").is_some_and(|latency| latency >= 400.0), "{rows:?}");
    assert!(latency("one").is_some_and(|latency| latency < 400.0), "{rows:?}");
}

#[test]
fn caller_goes_around_an_instance_that_others_keep_busy() {
    let _turn = alone();
    let mesh = TestMesh::of(&["a", "b", "c"]);
    let backends = ["one", "two"].map(Backend::start);
    for backend in &backends {
        backend.manners.delay_ms.store(100, Relaxed);
        backend.expose(mesh.agent("b"), &[]);
    }
    let entry = |name: &str, balance: &str| {
        mesh.agent(name).wait_endpoints("web", 2);
        let listen = free_address();
        let words = ["upstream", "web", &listen.to_string(), "--balance", balance];
        mesh.agent(name).run(&words).ok();
        listen
    };
    // All calls of one client go to one instance, of which the other member's calls know nothing.
    let (heavy, light) = (entry("a", "maglev"), entry("c", "least_request"));
    let busy = Caller::to(heavy).get("").unwrap().1;
    load_while(&[heavy; 8], millis(1), |_| {
        eventually("20 calls in a row go to the idle one", SOON, || {
            let told = one_after_another(light, 20);
            check(told.iter().all(|one| one.by != busy), shares(&told))
        });
    });
    eventually("it takes calls once it is idle", SOON, || {
        let told = shares(&one_after_another(light, 20));
        check(told.contains_key(&busy), told)
    });
}

#[test]
fn turns_are_even_to_the_call() {
    let _turn = beside_others();
    let backends = ["one", "two", "three"].map(Backend::start);
    let mesh = stage(&backends.each_ref().map(|backend| (backend, &[][..])));
    let entry = entry(&mesh, &["--balance", "round_robin"]);
    let told = shares(&one_after_another(entry, 300));
    assert_eq!(told.into_values().collect::<Vec<_>>(), [100, 100, 100]);
}

#[test]
fn calls_follow_the_weights_whichever_way_they_are_balanced() {
    let _turn = beside_others();
    let (heavy, light) = (Backend::start("heavy"), Backend::start("light"));
    let mesh = stage(&[(&heavy, &["--weight", "300"]), (&light, &["--weight", "100"])]);
    for (balance, expected) in [("round_robin", 200..=200), ("random", 140..=260)] {
        let told = shares(&one_after_another(entry(&mesh, &["--balance", balance]), 800));
        assert!(expected.contains(&told["light"]), "{balance}: {told:?}");
    }
    // By load the better one gets more, yet at most twice its weight's share.
    let told = shares(&one_after_another(entry(&mesh, &[]), 800));
    assert!(told.get("light").is_none_or(|light| *light <= 440), "{told:?}");
    assert!(told["heavy"] >= 360, "{told:?}");
}

#[test]
fn calls_with_the_same_key_go_to_the_same_instance() {
    let _turn = beside_others();
    let backends = ["one", "two", "three"].map(Backend::start);
    let mesh = stage(&backends.each_ref().map(|backend| (backend, &[][..])));
    let entry = entry(&mesh, &["--balance", "maglev", "--hash", "header:x-user"]);
    let mut first = Vec::new();
    for user in 0..30 {
        let field = format!("x-user: {user}\r\n");
        let by: Vec<_> = (0..4).map(|_| Caller::to(entry).get(&field).unwrap().1).collect();
        assert!(by.iter().all(|one| *one == by[0]), "user {user}: {by:?}");
        first.push(by[0].clone());
    }
    let mut seen = first.clone();
    seen.sort();
    seen.dedup();
    assert_eq!(seen, ["one", "three", "two"], "30 users reach all of three");
    // Another's end moves only its own users.
    mesh.agent("b").run(&["unexpose", "two"]).ok();
    mesh.agent("a").wait_endpoints("web", 2);
    for (user, before) in first.iter().enumerate().filter(|(_, by)| *by != "two") {
        let by = Caller::to(entry).get(&format!("x-user: {user}\r\n")).unwrap().1;
        assert_eq!(by, *before, "user {user}");
    }
}

#[test]
fn instance_never_has_more_calls_than_its_hard_limit_and_full_ones_are_gone_around() {
    let _turn = alone();
    let (small, large) = (Backend::start("small"), Backend::start("large"));
    for backend in [&small, &large] {
        backend.manners.delay_ms.store(300, Relaxed);
    }
    let limits = ["--soft-limit", "2", "--hard-limit", "3"];
    let mesh = stage(&[(&small, &limits), (&large, &[])]);
    let entry = entry(&mesh, &[]);
    let told = load(entry, 16, millis(10), millis(3_000));
    assert!(told.iter().all(|one| one.status == 200), "the large one has room: {told:?}");
    assert!(small.manners.in_work_max() <= 3, "{}", small.manners.in_work_max());
    assert!(shares(&told)["small"] >= 10, "it works meanwhile: {:?}", shares(&told));
    mesh.agent("b").run(&["unexpose", "large"]).ok();
    mesh.agent("a").wait_endpoints("web", 1);
    let told = load(entry, 16, millis(10), millis(2_000));
    let (answered, refused): (Vec<_>, Vec<_>) = told.iter().partition(|one| one.status == 200);
    assert!(!answered.is_empty() && !refused.is_empty());
    let is_overflow = |one: &&Told| one.status == 503 && one.reason.as_deref() == Some("overflow");
    assert!(refused.iter().all(is_overflow), "{refused:?}");
    assert!(small.manners.in_work_max() <= 3, "{}", small.manners.in_work_max());
}

#[test]
fn connections_that_rest_do_not_count_against_the_hard_limit() {
    let _turn = alone();
    let mesh = TestMesh::of(&["a", "b", "c", "d", "e"]);
    let only = Backend::start("only");
    // One call at a time, while those just before it may still be closing.
    only.expose(mesh.agent("a"), &["--hard-limit", "3"]);
    let entries = mesh.agents.iter().map(|agent| {
        agent.wait_endpoints("web", 1);
        agent.upstream("web")
    });
    let mut callers: Vec<_> = entries.map(Caller::to).collect();
    for _ in 0..20 {
        for caller in &mut callers {
            let (status, _, reason) = caller.get("").unwrap();
            assert_eq!(status, 200, "{reason:?}");
        }
    }
}

#[test]
fn calls_stay_in_their_zone_while_it_has_instances_and_leave_it_then() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    for (name, zone) in [("a", "eu1/a"), ("b", "eu1/a"), ("c", "us1/a")] {
        let file = mesh.home.path().join(format!("{name}.toml"));
        fs::write(&file, format!("[node]\nzone = \"{zone}\"\n")).unwrap();
        let mut agent = Agent::new(&mesh.home, name);
        agent.arguments = vec!["-c".to_owned(), file.display().to_string()];
        if name == "a" {
            mesh.found_with(agent);
        } else {
            let token = mesh.invite(1);
            mesh.join_with(agent, &token);
        }
    }
    let (near, far) = (Backend::start("near"), Backend::start("far"));
    near.expose(mesh.agent("b"), &[]);
    far.expose(mesh.agent("c"), &[]);
    mesh.agent("a").wait_endpoints("web", 2);
    let prefer = ["--prefer", "same-zone,same-region,any"];
    let entry = entry(&mesh, &prefer);
    let told = shares(&one_after_another(entry, 100));
    assert_eq!(told["near"], 100, "{told:?}");
    mesh.agent("b").run(&["drain", "near"]).ok();
    wait_state(mesh.agent("a"), "near", "draining", SOON);
    let told = shares(&one_after_another(entry, 50));
    assert_eq!(told["far"], 50, "{told:?}");
    let told = mesh.agent("a").run(&["upstream", "web", "0", "--prefer", "any,same-zone"]);
    assert!(told.stderr.contains("nearest first"), "{told:?}");
}
