//! Sick instances between real agents: callers go around them, and come back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::Ordering::Relaxed;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::backends::{Backend, Caller, Told, load, load_while, shares, wait_state};
use crate::support::{
    Agent, SOON, TestMesh, alone, beside_others, calmly, check, eventually, free_address, until,
    within,
};

const SECOND: Duration = Duration::from_secs(1);

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
    let sent_again = retries(&mesh, "success") + retries(&mesh, "failure");
    let failures = backends[2].manners.failures() as f64;
    assert!((1.0..=failures).contains(&sent_again), "{sent_again} for {failures} failures");
}

/// How many attempts on another instance came to this at `a`.
fn retries(mesh: &TestMesh, result: &str) -> f64 {
    mesh.agent("a").metric("murmesh_retries_total", &[&format!("result=\"{result}\"")])
}

#[test]
fn retries_stay_within_their_budget_when_every_call_wants_one() {
    let _turn = alone();
    let backends = ["one", "two", "three"].map(Backend::start);
    let (mesh, entry) = stage(&backends.each_ref(), &["--idempotent", "GET *"]);
    backends.iter().for_each(|backend| backend.manners.failing.store(1_000, Relaxed));
    let begun = Instant::now();
    let told = load(entry, 8, millis(20), millis(5_000));
    let (asked, lasted) = (told.len() as f64, begun.elapsed().as_secs_f64());
    let budget = 100.0 + 10.0 * lasted + 0.2 * asked;
    let sent_again = retries(&mesh, "success") + retries(&mesh, "failure");
    assert!(asked > 2.0 * budget, "{asked} calls want more than {budget} retries");
    assert!(sent_again <= budget, "{sent_again} retries, {budget} allowed for {asked} calls");
    assert!(sent_again > 100.0, "what the budget allows is made use of: {sent_again}");
    let refused = retries(&mesh, "over_budget");
    assert!(refused > 0.0 && sent_again + refused >= asked, "{sent_again} made, {refused} not");
    let worked: u64 = backends.iter().map(|backend| backend.manners.requests()).sum();
    assert_eq!(worked as f64, asked + sent_again, "instances see no more than is counted");
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

/// An entry of each agent that asks instances by turns.
fn turns(mesh: &TestMesh) -> Vec<SocketAddr> {
    let entry = |agent: &Agent| {
        let listen = free_address();
        let words = ["upstream", "web", &listen.to_string(), "--balance", "round_robin"];
        agent.run(&words).ok();
        listen
    };
    mesh.agents.iter().map(entry).collect()
}

/// Waits until all callers together hold this of `sick`, at every agent: `open`, `half_open` or
/// nothing.
fn wait_everywhere(mesh: &TestMesh, state: Option<&str>) {
    for agent in &mesh.agents {
        eventually(&format!("{} knows that sick is {state:?}", agent.name), SOON, || {
            let rows = agent.get("/v1/mesh/breakers");
            let mut rows = rows.as_array().expect("rows").iter();
            let row = rows.find(|row| row["instance"] == "sick" && row["source"] == "mesh");
            check(row.and_then(|row| row["state"].as_str()) == state, row)
        });
    }
}

/// Waits until every agent knows so many instances.
fn wait_instances(mesh: &TestMesh, count: usize) {
    for agent in &mesh.agents {
        agent.wait_endpoints("web", count);
    }
}

/// That the first two probes are 2 s apart, the next 4 s and so on: each that fails doubles the period,
/// which is 1 s until the first one. A tenth less is allowed, as a call takes its time to arrive.
#[track_caller]
fn assert_periods_double(probes: &[&Duration]) {
    let periods = (1..).map(|doublings| SECOND * (1 << doublings));
    for (pair, period) in probes.windows(2).zip(periods) {
        let gap = *pair[1] - *pair[0];
        assert!(gap >= period * 9 / 10, "{gap:?} after a period of {period:?}: {probes:?}");
    }
}

#[test]
fn ejected_instance_gets_one_call_a_period_from_the_whole_mesh_and_then_a_growing_share() {
    let _turn = alone();
    let mut mesh = TestMesh::of(&["a", "b", "c", "d"]);
    // One that heeds only what it sees itself.
    let (mut stubborn, listen) = (Agent::new(&mesh.home, "stubborn"), free_address());
    let file = mesh.home.path().join("stubborn.toml");
    let upstream = format!(
        "[[upstream]]\nservice = \"web\"\nlisten = \"{listen}\"\nbalance = \"round_robin\"\n\
         breaker = {{ scope = \"local\" }}\n"
    );
    fs::write(&file, upstream).unwrap();
    stubborn.arguments = vec!["-c".to_owned(), file.display().to_string()];
    let (mut entries, token) = (turns(&mesh), mesh.invite(1));
    mesh.join_with(stubborn, &token);
    entries.push(listen);
    let backends = ["one", "two", "sick"].map(Backend::start);
    for (backend, name) in backends.iter().zip(["a", "b", "c"]) {
        backend.expose(mesh.agent(name), &[]);
    }
    wait_instances(&mesh, 3);
    let sick = &backends[2].manners;
    let probed_for = millis(8_000);
    let (mut begun, mut ejected, mut back) = (Instant::now(), Duration::ZERO, Duration::ZERO);
    let told = load_while(&entries, millis(50), |at| {
        begun = at;
        sick.failing.store(1_000, Relaxed);
        wait_everywhere(&mesh, Some("open"));
        ejected = begun.elapsed();
        until(begun + ejected + probed_for);
        sick.failing.store(0, Relaxed);
        wait_everywhere(&mesh, Some("half_open"));
        back = begun.elapsed();
        wait_everywhere(&mesh, None);
    });
    let arrivals = sick.arrivals(begun);
    let of = |from: Duration, to: Duration| {
        let arrivals: Vec<_> = arrivals.iter().filter(|at| (from..to).contains(*at)).collect();
        arrivals
    };
    let probes = of(ejected, ejected + probed_for);
    assert_periods_double(&probes);
    assert!((2..=4).contains(&probes.len()), "periods of 1 s, 2 s and 4 s: {probes:?}");
    let failed: Vec<_> =
        failed(&told).into_iter().filter(|one| one.at > ejected && one.by != "sick").collect();
    assert_eq!(failed.len(), 0, "whoever is turned away is answered elsewhere: {failed:?}");
    for window in 0..3 {
        let from = back + millis(3_000) * window;
        let to = from + millis(3_000);
        let share = told.iter().filter(|one| (from..to).contains(&one.at)).count() as f64 / 3.0;
        let load = of(from, to).len() as f64;
        assert!(load <= share * 1.2, "{load} calls of its share of {share} in 3 s from {from:?}");
    }
    assert!(of(back, back + millis(9_000)).len() > 20, "it has its ramp");
}

#[test]
fn instance_that_was_ill_for_15_s_is_in_use_at_every_caller_within_20_s_with_the_usual_balancer() {
    let _turn = calmly();
    let mesh = TestMesh::of(&["a", "b", "c", "d", "e"]);
    let backends = ["one", "two", "sick"].map(Backend::start);
    for (backend, name) in backends.iter().zip(["a", "b", "c"]) {
        // So that several calls of each agent are under way at a time.
        backend.manners.delay_ms.store(200, Relaxed);
        backend.expose(mesh.agent(name), &[]);
    }
    wait_instances(&mesh, 3);
    let entries: Vec<_> = mesh.agents.iter().map(|agent| agent.upstream("web")).collect();
    let callers = entries.repeat(8);
    let sick = &backends[2].manners;
    let (mut start, mut ejected, mut well) = (Instant::now(), Duration::ZERO, Duration::ZERO);
    let told = load_while(&callers, millis(200), |begun| {
        start = begun;
        until(begun + 2 * SECOND);
        sick.failing.store(1_000, Relaxed);
        wait_everywhere(&mesh, Some("open"));
        ejected = begun.elapsed();
        until(begun + 17 * SECOND);
        sick.failing.store(0, Relaxed);
        well = begun.elapsed();
        wait_everywhere(&mesh, None);
        for agent in &mesh.agents {
            wait_state(agent, "sick", "ready", SOON);
        }
    });
    assert!(ejected < 16 * SECOND, "it was ill long enough to tell: {ejected:?}");
    let arrivals = sick.arrivals(start);
    let probes: Vec<_> = arrivals.iter().filter(|at| (ejected..well).contains(*at)).collect();
    let too_soon = probes.windows(2).find(|pair| *pair[1] - *pair[0] < millis(900));
    assert!(too_soon.is_none(), "less than a period of 1 s apart: {probes:?}");
    assert!(probes.len() <= 5, "periods of 1 s, 2 s, 4 s and 8 s: {probes:?}");
    let late = failed(&told).into_iter().filter(|one| one.at > ejected + millis(500)).count();
    assert!(late <= probes.len() + 1, "{late} calls failed, and {} tried it", probes.len());
    for (at, agent) in mesh.agents.iter().enumerate() {
        let by_sick = |one: &&Told| {
            let is_its = one.caller % entries.len() == at && one.by == "sick";
            is_its && one.status == 200 && one.at > well
        };
        let back = told.iter().filter(by_sick).map(|one| one.at - well).min();
        let back = back.unwrap_or_else(|| panic!("{} uses it again", agent.name));
        assert!(back <= 20 * SECOND, "{} uses it {back:?} after it was well", agent.name);
    }
}

#[test]
fn instance_that_is_ejected_is_called_when_nobody_else_is_left() {
    let _turn = alone();
    let mesh = TestMesh::of(&["a", "b", "c"]);
    let backends = ["one", "two", "sick"].map(Backend::start);
    let expose = |at: usize, more: &[&str]| backends[at].expose(&mesh.agents[at], more);
    (0..3).for_each(|at| expose(at, &[]));
    wait_instances(&mesh, 3);
    let entries = turns(&mesh);
    backends[2].manners.failing.store(1_000, Relaxed);
    load_while(&entries, millis(50), |_| wait_everywhere(&mesh, Some("open")));
    backends[2].manners.failing.store(0, Relaxed);
    // One call each keeps the others busy: for a third there is only the ejected one.
    for (at, backend) in backends.iter().enumerate().take(2) {
        backend.manners.delay_ms.store(1_500, Relaxed);
        expose(at, &["--hard-limit", "1"]);
    }
    let told = load(entries[0], 3, millis(100), millis(1_000));
    assert_eq!(failed(&told).len(), 0, "{told:?}");
    assert!(shares(&told).contains_key("sick"), "{told:?}");
}

#[test]
fn eight_agents_see_few_failures_of_one_instance_of_ten_and_all_stop_calling_it() {
    let _turn = alone();
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let mesh = TestMesh::of(&names);
    let nth = |number: usize| format!("web-{number}");
    let backends: Vec<_> = ["sick".to_owned()].into_iter().chain((1..10).map(nth)).collect();
    let backends: Vec<_> = backends.iter().map(|name| Backend::start(name)).collect();
    for (backend, name) in backends.iter().zip(names.iter().cycle()) {
        backend.expose(mesh.agent(name), &[]);
    }
    wait_instances(&mesh, 10);
    // By turns: balanced by cost most callers would meet it once, and avoid it before they are sure.
    let entries = turns(&mesh);
    let manners = &backends[0].manners;
    manners.status.store(500, Relaxed);
    let told = load_while(&entries, millis(200), |begun| {
        until(begun + millis(4_000));
        manners.failing.store(1_000, Relaxed);
        wait_everywhere(&mesh, Some("open"));
        for agent in &mesh.agents {
            let rows = agent.get("/v1/mesh/breakers");
            let mut rows = rows.as_array().expect("rows").iter();
            let row = rows.find(|row| row["instance"] == "sick" && row["source"] == "mesh");
            let evidence = row.and_then(|row| row["evidence"].as_array()).expect("evidence");
            let callers = evidence.iter().filter(|told| told["failures"].as_u64() >= Some(1));
            let callers: BTreeSet<_> = callers.map(|told| told["caller"].as_str()).collect();
            assert!(callers.len() >= 2, "one alone ejects nothing: {evidence:?}");
        }
        let calm = Instant::now() + within(SECOND) + millis(6_000);
        until(calm);
    });
    // By the first three of eight callers, and by six failures of at most three each.
    let mut by_caller: BTreeMap<usize, u32> = BTreeMap::new();
    let mut in_order: Vec<_> = failed(&told);
    in_order.sort_by_key(|one| one.at);
    let counted = |seen: &BTreeMap<usize, u32>| seen.values().map(|n| n.min(&3)).sum::<u32>();
    let quorum = in_order.iter().find(|one| {
        *by_caller.entry(one.caller).or_default() += 1;
        by_caller.len() >= 3 && counted(&by_caller) >= 6
    });
    let quorum = quorum.expect("a quorum of callers").at;
    let late: Vec<_> = in_order.iter().filter(|one| one.at > quorum + within(SECOND)).collect();
    let last = in_order.iter().rev().find(|one| one.at <= quorum + within(SECOND));
    let out_after = last.map(|one| one.at.saturating_sub(quorum)).unwrap_or_default();
    eprintln!("out of rotation {out_after:?} after the quorum; then {} probes", late.len());
    // One call of the whole mesh after 1 s, 2 s and 4 s. Were it called on, it would be four a second.
    assert!(late.len() <= 4, "called on after the quorum at {quorum:?}: {late:?}");
    let too_soon = late.windows(2).find(|pair| pair[1].at - pair[0].at < millis(900));
    assert!(too_soon.is_none(), "less than a period of 1 s apart: {late:?}");
    let failed = in_order;
    assert!((1..=40).contains(&failed.len()), "{} of {}: {failed:?}", failed.len(), told.len());
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

/// The row of an instance of `web` in the listing of `agent`.
fn endpoint(agent: &Agent, instance: &str) -> serde_json::Value {
    let rows = agent.get("/v1/mesh/endpoints/web");
    let mut rows = rows.as_array().expect("rows").iter();
    rows.find(|row| row["instance"] == instance).cloned().unwrap_or_default()
}

#[test]
fn an_ejected_instance_is_seen_in_every_listing_with_who_says_so_and_until_when() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["a", "b", "c"]);
    let backends = ["one", "two", "sick"].map(Backend::start);
    for (backend, agent) in backends.iter().zip(&mesh.agents) {
        backend.expose(agent, &[]);
    }
    wait_instances(&mesh, 3);
    let (a, entries) = (mesh.agent("a"), turns(&mesh));
    backends[2].manners.failing.store(1_000, Relaxed);
    load_while(&entries, millis(50), |_| {
        wait_everywhere(&mesh, Some("open"));
        let services = a.get("/v1/mesh/services");
        let row = &services[0];
        assert_eq!((&row["ready"], &row["ejected"]), (&3.into(), &1.into()), "{row}");
        let listed = a.run(&["services"]).ok();
        assert!(listed.contains("2/3") && listed.contains("1 ejected"), "{listed}");
        let status = a.run(&["status"]).ok();
        assert!(status.contains("2/3 instances ready"), "{status}");
        assert!(status.contains("web: 1 ejected"), "{status}");
        let row = endpoint(a, "sick");
        assert_eq!(row["state"], "ejected", "{row}");
        assert!(row["reason"].as_str().unwrap().starts_with("mesh: "), "{row}");
        let warned = a.run(&["check"]);
        assert_eq!(warned.code, Some(1), "{warned:#?}");
        let told = &warned.stdout;
        assert!(told.contains("1 of 3 of web") && told.contains("murmesh breakers"), "{told}");
        let table = a.run(&["breakers"]).ok();
        let line = table.lines().find(|line| line.contains("  mesh  ")).expect(&table);
        let accuser = |name: &str| line.split("of the calls since").nth(1).unwrap().contains(name);
        assert!(["a ", "b ", "c "].into_iter().filter(|name| accuser(name)).count() >= 2, "{line}");
        assert!(line.contains(" in ") || line.contains(" the next call "), "{line}");
        let ejected = ["service=\"web\"", "source=\"mesh\""];
        assert_eq!(a.metric("murmesh_breaker_ejected", &ejected), 1.0);
        let routes = a.get("/v1/mesh/routes?service=web");
        let rows = routes[0]["entries"][0]["instances"].as_array().expect("rows");
        let row = rows.iter().find(|row| row["instance"] == "sick").expect("all are told");
        assert!(row["trial"] == true || row["share"] == 0.0, "{row}");
        assert!(!row["reason"].as_str().unwrap().is_empty(), "{row}");
    });
}

#[test]
fn an_instance_that_calls_avoid_after_one_failure_is_told_in_the_same_words_by_every_listing() {
    let _turn = beside_others();
    let backends = ["one", "sick"].map(Backend::start);
    let (mesh, entry) = stage(&backends.each_ref(), &[]);
    let a = mesh.agent("a");
    backends[1].manners.failing.store(1_000, Relaxed);
    let mut caller = Caller::to(entry);
    eventually("a call fails", SOON, || {
        let told = caller.get("").unwrap();
        check(told.0 == 503, told)
    });
    let (row, service) = (endpoint(a, "sick"), &a.get("/v1/mesh/services")[0]);
    assert_eq!((&row["state"], &row["avoided"]), (&"ready".into(), &true.into()), "{row}");
    let why = "avoided here: its last call failed";
    assert!(row["reason"].as_str().unwrap().starts_with(why), "{row}");
    assert_eq!((&service["avoided"], &service["ready"]), (&1.into(), &2.into()), "{service}");
    let listed = |words: &[&str]| a.run(words).ok();
    let status = listed(&["status"]);
    assert!(status.contains("1/2 instances ready"), "{status}");
    assert!(status.contains("web: 1 avoided here"), "{status}");
    assert!(listed(&["services"]).contains("1 avoided here"));
    for words in [&["endpoints", "web"][..], &["breakers"], &["routes", "web"]] {
        let table = listed(words);
        let line = table.lines().find(|line| line.contains("sick")).expect(&table);
        assert!(line.contains(why), "{words:?}: {table}");
    }
    assert_eq!(a.metric("murmesh_breaker_avoided", &["service=\"web\""]), 1.0);
    let has_warned = |told: &str| told.contains("failing here");
    assert!(!has_warned(&a.run(&["check"]).stdout), "a single failure is nobody's fault");
    eventually("calls meet it a second time", SOON, || {
        let _ = caller.get("");
        check(a.get("/v1/mesh/services")[0]["failing_here"] == 1, endpoint(a, "sick"))
    });
    // The other one answers, but slowly: calls go there all the same.
    backends[0].manners.delay_ms.store(450, Relaxed);
    assert_eq!(caller.get("").unwrap().0, 200);
    let row = endpoint(a, "sick");
    let reason = row["reason"].as_str().unwrap();
    assert!(reason.starts_with("avoided here: its last 2 calls failed"), "{row}");
    let warned = a.run(&["check"]);
    assert_eq!(warned.code, Some(1), "{warned:#?}");
    let told = &warned.stdout;
    assert!(has_warned(told) && told.contains("murmesh endpoints web"), "{warned:#?}");
}

#[test]
fn a_service_that_fails_as_a_whole_is_told_in_the_same_words_by_every_listing_and_in_few_events() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["a", "b"]);
    let backends = ["one", "two"].map(Backend::start);
    for (backend, agent) in backends.iter().zip(&mesh.agents) {
        backend.expose(agent, &[]);
    }
    wait_instances(&mesh, 2);
    let (a, entries) = (mesh.agent("a"), turns(&mesh));
    backends.iter().for_each(|backend| backend.manners.failing.store(1_000, Relaxed));
    load_while(&entries, millis(20), |_| {
        eventually(
            "the service is failing, and breakers have opened again and again",
            SOON,
            || {
                let rows = breakers(&mesh);
                let relapsed = rows.iter().filter(|row| row["reason"] == "relapse").count();
                let service = a.get("/v1/mesh/services")[0].clone();
                check(service["failing"] == true && relapsed == 2, rows)
            },
        );
        let rows = breakers(&mesh);
        for name in ["one", "two"] {
            let is_told = |row: &&serde_json::Value| {
                row["instance"] == name && row["source"] == "mesh" && row["state"] == "closed"
            };
            let row = rows.iter().find(is_told).unwrap_or_else(|| panic!("{name}: {rows:?}"));
            assert!(row["why"].as_str().unwrap().contains("fails as a whole"), "{row}");
        }
        assert!(a.run(&["breakers"]).ok().contains("the service fails as a whole"));
        assert!(a.run(&["endpoints", "web"]).ok().contains("the service fails as a whole"));
        assert!(a.run(&["services"]).ok().contains("failing as a whole"));
        assert!(a.run(&["status"]).ok().contains("web is failing as a whole"));
        let opened = a.events("breaker_opened");
        assert_eq!(opened.len(), 2, "one for each breaker, however often it relapses: {opened:?}");
        let lines = a.run(&["events", "web"]).ok();
        let line = lines.lines().find(|line| line.contains("service failing")).expect(&lines);
        assert!(line.len() < 160, "{line}");
        let fields = a.events("service_failing")[0]["fields"].to_string();
        assert!(fields.contains("evidence one@a") && fields.contains("accuses"), "{fields}");
    });
}

#[test]
fn routes_say_why_a_call_is_refused_that_may_not_go_far() {
    let _turn = beside_others();
    let far = Backend::start("far");
    let (mesh, _) = stage(&[&far], &[]);
    let (a, listen) = (mesh.agent("a"), free_address());
    a.run(&["upstream", "web", &listen.to_string(), "--prefer", "same-zone"]).ok();
    let why = "every endpoint that is ready is farther than 'prefer' lets calls go";
    let told = a.run(&["routes", "web"]);
    assert_eq!(told.code, Some(1), "{told:#?}");
    assert!(told.stdout.contains(&format!("refused now: no_endpoints: {why}")), "{told:#?}");
    assert!(told.stdout.contains("100.0 %"), "by name it is taken: {told:#?}");
    let (status, body, reason) = Caller::to(listen).get("").unwrap();
    assert_eq!((status, reason.as_deref()), (503, Some("no_endpoints")), "{body}");
    assert!(body.contains("farther than 'prefer' lets calls go"), "{body}");
    let listed = a.run(&["upstream"]).ok();
    assert!(listed.contains("peak_ewma  same-zone"), "{listed}");
}
