//! Hosts cut off from each other: Linux network namespaces whose packets a switch drops.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::{
    Agent, Kind, Network, SOON, Server, TestMesh, alone, check, eventually, sized, skip, until,
    within,
};

/// After a heal every record is readable on every node within this.
const HEAL: Duration = Duration::from_secs(15);
const PORT: u16 = 7370;

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

#[test]
fn after_a_cut_every_record_is_readable_on_every_node_again() {
    let _turn = alone();
    if !rustix::process::geteuid().is_root() {
        skip("network namespaces need root");
        return;
    }
    let network = match Network::try_new(4) {
        Ok(network) => network,
        Err(error) => return skip(&format!("no network namespaces: {error}")),
    };
    let names = ["n0", "n1", "n2", "n3"];
    let mut mesh = TestMesh::new();
    let agent = |mesh: &TestMesh, host: u8| {
        let at = network.address(host, PORT);
        let name = names[usize::from(host)];
        Agent::in_namespace(&mesh.home, name, &network.host(host), at)
    };
    let founder = agent(&mesh, 0);
    mesh.found_with(founder);
    let token = mesh.invite(3);
    for host in 1..4 {
        let newcomer = agent(&mesh, host);
        mesh.join_with(newcomer, &token);
    }
    for agent in &mesh.agents {
        agent.wait_alive(4, SOON);
    }
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
    let _turn = alone();
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
