//! Hosts cut off from each other: Linux network namespaces whose packets a switch drops.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::{
    Agent, Kind, Network, SOON, Server, TestMesh, calmly, check, eventually, sized, skip, until,
    within,
};

/// After a heal every record is readable on every node within this.
const HEAL: Duration = Duration::from_secs(15);
const PORT: u16 = 7370;
/// What a member sends when nothing happens, in bytes per second, frames and all. It is about 600;
/// keep-alives or searches for a larger packet size on the gossip plane would cost thousands.
const REST_RATE_MAX: u64 = 1_500;

/// Everything that `agent` should read, it reads.
fn reads_all(agent: &Agent, members: &[&str], services: &[String]) -> Result<(), String> {
    let seen = agent.members();
    for name in members {
        let state = seen.iter().find(|(listed, _)| listed == name).map(|(_, state)| state.as_str());
        check(state == Some("alive"), format!("{} sees {name} {state:?}", agent.name))?;
    }
    for service in services {
        let ready = agent.ready_endpoints(service);
        check(ready == 1, format!("{} knows {ready} endpoints of {service}", agent.name))?;
    }
    Ok(())
}

/// Agents `n0`, `n1` and so on, each on a host of its own; none when this machine cannot have hosts.
fn hosts(count: u8) -> Option<(Network, TestMesh)> {
    if !rustix::process::geteuid().is_root() {
        skip("network namespaces need root");
        return None;
    }
    let network = match Network::try_new(count) {
        Ok(network) => network,
        Err(error) => {
            skip(&format!("no network namespaces: {error}"));
            return None;
        }
    };
    let mut mesh = TestMesh::new();
    let agent = |mesh: &TestMesh, host: u8| {
        let (at, name) = (network.address(host, PORT), format!("n{host}"));
        Agent::in_namespace(&mesh.home, &name, &network.host(host), at)
    };
    let founder = agent(&mesh, 0);
    mesh.found_with(founder);
    let token = mesh.invite(usize::from(count - 1));
    for host in 1..count {
        let newcomer = agent(&mesh, host);
        mesh.join_with(newcomer, &token);
    }
    for agent in &mesh.agents {
        agent.wait_alive(usize::from(count), SOON);
    }
    Some((network, mesh))
}

#[test]
fn after_a_cut_every_record_is_readable_on_every_node_again() {
    let _turn = calmly();
    let Some((network, mesh)) = hosts(4) else { return };
    let names: Vec<_> = mesh.agents.iter().map(|agent| agent.name.as_str()).collect();
    // Nobody connects to it: it is only what the records are about.
    let service = Server::start(Kind::Echo);
    let mut services = Vec::new();
    for seconds in sized(&[2, 10][..], &[2, 10, 30, 120][..]) {
        network.cut(3);
        let cut = Instant::now();
        // Both sides go on publishing while they cannot hear each other.
        for (agent, side) in [(&mesh.agents[3], "alone"), (&mesh.agents[1], "many")] {
            let name = format!("{side}-{seconds}");
            agent.expose(&name, service.address);
            services.push(name);
        }
        until(cut + Duration::from_secs(*seconds));
        if *seconds >= 10 {
            let limit = within(Duration::from_secs(10)).saturating_sub(cut.elapsed());
            eventually("ten seconds of silence are noticed", limit, || {
                let seen = mesh.agents[0].state_of("n3");
                check(seen != "alive", seen)
            });
        }
        network.heal(3);
        let healed = Instant::now();
        eventually(&format!("all is readable after a cut of {seconds} s"), within(HEAL), || {
            mesh.agents.iter().try_for_each(|agent| reads_all(agent, &names, &services))
        });
        eprintln!("cut of {seconds} s: all readable {:?} after the heal", healed.elapsed());
    }
}

#[test]
fn a_member_that_was_paused_comes_back_and_accuses_nobody() {
    let _turn = calmly();
    let mesh = TestMesh::of(&["n0", "n1", "n2", "n3"]);
    let paused = &mesh.agents[3];
    paused.signal(Signal::STOP);
    until(Instant::now() + Duration::from_secs(sized(8, 30)));
    paused.signal(Signal::CONT);
    let woken = Instant::now();
    let names = ["n0", "n1", "n2", "n3"];
    eventually("all see all after the pause", within(HEAL), || {
        mesh.agents.iter().try_for_each(|agent| reads_all(agent, &names, &[]))
    });
    eprintln!("all see all {:?} after the pause", woken.elapsed());
    for agent in &mesh.agents {
        let others = agent.events("member_down").into_iter().filter(|e| e["subject"] != "n3");
        let accused: Vec<_> = others.collect();
        assert!(accused.is_empty(), "{} took healthy members for dead: {accused:?}", agent.name);
    }
}

/// With all that QUIC, UDP, IP and Ethernet add to what the simulation counts.
#[test]
fn a_member_at_rest_sends_few_bytes() {
    let _turn = calmly();
    let (count, length) = (sized(4, 16), Duration::from_secs(sized(10, 60)));
    let Some((network, _mesh)) = hosts(count) else { return };
    // By then each has probed, and so connected to, each other, and asked five for the time.
    until(Instant::now() + Duration::from_secs(sized(12, 20)));
    let (before, began) = (network.bytes_sent(), Instant::now());
    until(began + length);
    let (after, took) = (network.bytes_sent(), began.elapsed());
    let rate =
        |(after, before): (&u64, &u64)| ((after - before) as f64 / took.as_secs_f64()) as u64;
    let rates: Vec<u64> = after.iter().zip(&before).map(rate).collect();
    eprintln!("{count} members at rest: {rates:?} B/s sent by each, as Ethernet frames");
    assert!(rates.iter().all(|rate| (1..=REST_RATE_MAX).contains(rate)), "{rates:?} B/s");
}
