//! Sixteen agents on one machine: news travels fast, and nobody is taken for dead.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::{
    Agent, Kind, SOON, Server, TestMesh, alone, ask, check, enrol, eventually, expect_echo, sized,
    socks, until, within,
};
use crate::surviving::{assert_no_lie_and_no_hang, assert_well_answered_by, failed, load};

/// Sixteen agents that know each other; `n0` is the founder.
fn sixteen() -> TestMesh {
    let names: Vec<String> = (0..16).map(|number| format!("n{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    TestMesh::of(&names)
}

#[test]
fn a_newly_exposed_service_is_reachable_from_all_within_a_second() {
    let _turn = alone();
    let trials: usize = sized(8, 50);
    let mesh = sixteen();
    let echo = Server::start(Kind::Echo);
    let mut times = Vec::with_capacity(trials);
    for trial in 0..trials {
        let service = format!("echo-{trial}");
        let host = format!("{service}.mesh");
        let owner = &mesh.agents[trial % mesh.agents.len()];
        let started = Instant::now();
        owner.expose(&service, echo.address);
        let accepted = started.elapsed();
        let slowest = std::thread::scope(|scope| {
            let reach = |agent: &Agent| {
                let what = format!("{} reaches {service} of {}", agent.name, owner.name);
                eventually(&what, SOON, || {
                    let reached = socks(agent.socks, &host, 1)
                        .and_then(|mut stream| expect_echo(&mut stream, service.as_bytes()));
                    reached.map_err(|error| error.to_string())
                });
                started.elapsed()
            };
            let threads: Vec<_> =
                mesh.agents.iter().map(|agent| scope.spawn(move || reach(agent))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
        });
        eprintln!("trial {trial}: accepted after {accepted:?}, reached by all after {slowest:?}");
        times.push(slowest);
    }
    times.sort();
    let p99 = times[(times.len() * 99).div_ceil(100) - 1];
    eprintln!("{trials} trials: p50 {:?}, p99 {p99:?}", times[times.len() / 2]);
    assert!(p99 < within(Duration::from_secs(1)), "{times:?}");
}

#[test]
fn a_newcomer_sees_all_members_within_a_second() {
    let _turn = alone();
    let mut mesh = sixteen();
    let token = mesh.invite(3);
    for number in 16..sized(17, 19) {
        let newcomer = Agent::new(&mesh.home, &format!("n{number}"));
        enrol(&newcomer, &token);
        let started = Instant::now();
        newcomer.spawn();
        eventually("the newcomer's API answers", SOON, || {
            newcomer.try_get("/v1/mesh/members").map(drop).map_err(|error| error.to_string())
        });
        let answers = started.elapsed();
        newcomer.wait_alive(number + 1, SOON);
        let sees = started.elapsed();
        for agent in &mesh.agents {
            agent.wait_alive(number + 1, SOON);
        }
        let seen = started.elapsed();
        eprintln!(
            "process start to API {answers:?}, to all members {sees:?}, seen by all {seen:?}"
        );
        assert!(sees < within(Duration::from_secs(1)), "the newcomer sees all after {sees:?}");
        mesh.agents.push(newcomer);
    }
}

#[test]
fn sixteen_callers_avoid_a_killed_agent_within_a_second() {
    let _turn = alone();
    let mesh = sixteen();
    let servers = ["one", "two"].map(|name| Server::start(Kind::Named(name.to_owned())));
    mesh.agents[1].expose("web", servers[0].address);
    mesh.agents[2].expose("web", servers[1].address);
    let callers: Vec<_> = mesh.agents.iter().filter(|a| a.name != "n1" && a.name != "n2").collect();
    let entries: Vec<_> = callers.iter().map(|agent| agent.upstream("web")).collect();
    for (caller, entry) in callers.iter().zip(&entries) {
        caller.wait_endpoints("web", 2);
        ask(*entry, "warm").unwrap();
    }
    let mut killed = Duration::ZERO;
    let calls = load(&entries, |load| {
        load.go_on_for(Duration::from_secs(1));
        killed = load.elapsed();
        mesh.agents[1].kill();
        load.go_on_for(Duration::from_secs(1));
        load.go_on_until_calm(Duration::from_secs(2), |call| !call.is_well_answered_by("two"));
    });
    assert_no_lie_and_no_hang(&calls);
    let last = failed(&calls).last().map_or(killed, |call| call.started);
    eprintln!(
        "{} of {} calls failed, the last began {:?} after the kill",
        failed(&calls).len(),
        calls.len(),
        last.saturating_sub(killed)
    );
    assert_well_answered_by("two", &calls, killed + within(Duration::from_secs(1)));
    // And all agree on who died, and only that.
    for caller in callers {
        caller.wait_state("n1", "down", SOON);
        let events = caller.events("member_down");
        let died: BTreeSet<_> = events.iter().filter_map(|e| e["subject"].as_str()).collect();
        assert_eq!(died, BTreeSet::from(["n1"]), "{} saw {events:?}", caller.name);
    }
}

#[test]
fn nobody_is_taken_for_dead_while_the_data_plane_saturates_the_cores() {
    let _turn = alone();
    let length = Duration::from_secs(sized(30, 300));
    let mesh = sixteen();
    let source = Server::start(Kind::Source { seed: 5, len: u64::MAX });
    let echo = Server::start(Kind::Echo);
    for agent in &mesh.agents[8..12] {
        agent.expose("bulk", source.address);
        agent.expose("echo", echo.address);
    }
    for agent in &mesh.agents[..4] {
        agent.wait_endpoints("bulk", 4);
        agent.wait_endpoints("echo", 4);
    }
    let (over, carried, calls) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let before = CoreTime::now();
    std::thread::scope(|scope| {
        for agent in &mesh.agents[..4] {
            let (over, carried, calls) = (&over, &carried, &calls);
            scope.spawn(move || {
                let mut stream = socks(agent.socks, "bulk.mesh", 1).unwrap();
                let mut buffer = vec![0; 256 * 1024];
                while !over.load(Ordering::Relaxed) {
                    let read = stream.read(&mut buffer).unwrap();
                    assert!(read > 0, "the bulk stream of {} ended", agent.name);
                    carried.fetch_add(read as u64, Ordering::Relaxed);
                }
            });
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let mut stream: TcpStream = socks(agent.socks, "echo.mesh", 1).unwrap();
                    for _ in 0..20 {
                        expect_echo(&mut stream, &[7; 512]).unwrap();
                    }
                    calls.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        until(Instant::now() + length);
        over.store(true, Ordering::Relaxed);
    });
    let busy = CoreTime::now().busy_since(&before);
    let mut deaths = Vec::new();
    let mut suspicions = 0;
    for agent in &mesh.agents {
        deaths.extend(agent.events("member_down"));
        suspicions += agent.events("member_suspect").len();
        let flaps = agent.metric("murmesh_member_flaps_total", &[]);
        assert!(flaps == 0.0, "{} counts {flaps} flaps", agent.name);
    }
    eprintln!(
        "{length:?} at {:.0} % of all cores: {} MiB, {} connections, {suspicions} suspicions, {} deaths",
        busy * 100.0,
        carried.into_inner() >> 20,
        calls.into_inner(),
        deaths.len()
    );
    // Four callers cannot fill a machine of many cores.
    assert!(busy >= 0.9 || before.cores > 4, "the cores were {:.0} % busy", busy * 100.0);
    assert!(deaths.is_empty(), "{} false deaths: {:#?}", deaths.len(), deaths.first());
    for agent in &mesh.agents {
        check(agent.members().iter().all(|(_, state)| state == "alive"), agent.members()).unwrap();
    }
}

/// What all cores of the machine together have done so far.
struct CoreTime {
    cores: usize,
    /// In ticks.
    idle: f64,
    all: f64,
}

impl CoreTime {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/stat").unwrap();
        let mut lines = stat.lines().filter(|line| line.starts_with("cpu"));
        let sum = lines.next().unwrap();
        let ticks: Vec<f64> =
            sum.split_whitespace().skip(1).take(8).map(|tick| tick.parse().unwrap()).collect();
        // user, nice, system, idle, and idle while a disk works
        Self { cores: lines.count(), idle: ticks[3] + ticks[4], all: ticks.iter().sum() }
    }

    /// The share of time that was not idle.
    fn busy_since(&self, before: &Self) -> f64 {
        1.0 - (self.idle - before.idle) / (self.all - before.all).max(1.0)
    }
}
