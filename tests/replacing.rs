//! Who a machine is and where it is: a reimaged one takes its name over, two of one name are told
//! apart, a newcomer becomes an issuer, and a name says where a member is reached.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use murmesh::model::{Enrolment, Signer};
use murmesh::tls::store::DataDir;

use crate::support::{
    Agent, Kind, SOON, Server, TestMesh, ask, beside_others, check, enrol, eventually,
};

/// A machine of that name with an empty disk.
fn machine(mesh: &TestMesh, name: &str, disk: &str) -> Agent {
    let mut agent = Agent::new(&mesh.home, name);
    agent.data_dir = mesh.home.path().join(disk);
    agent
}

fn id_of(agent: &Agent) -> String {
    DataDir::new(&agent.data_dir).credentials().unwrap().member_id().to_string()
}

#[test]
fn a_reimaged_machine_takes_its_name_over_and_its_old_key_is_believed_no_more() {
    let _turn = beside_others();
    let mut mesh = TestMesh::of(&["first", "caller", "web1"]);
    let server = Server::start(Kind::Named("web".to_owned()));
    mesh.agent("first").run(&["grant", "web1", "--services", "web"]).ok();
    mesh.agent("web1").expose("web", server.address);
    mesh.agent("caller").wait_endpoints("web", 1);
    let entry = mesh.agent("caller").upstream("web");
    ask(entry, "before").unwrap();

    let token = mesh.invite(2);
    let new = machine(&mesh, "web1", "web1-reimaged");
    let at = new.mesh.to_string();
    let join = ["join", &token, "--name", "web1", "--mesh", &at, "--advertise", &at];
    let replace = [&join[..], &["--replace"]].concat();
    let taken = new.run(&join).fails(2);
    assert!(taken.contains("--replace"), "{taken}");
    let alive = new.run(&replace).fails(2);
    assert!(alive.contains("'web1' answers; stop it first"), "{alive}");

    let old = mesh.agents.pop().unwrap();
    old.kill();
    mesh.agent("first").wait_state("web1", "down", SOON);
    let joined = new.run(&replace).ok();
    assert!(joined.contains("may offer   web"), "what its former self might: {joined}");
    assert_ne!(id_of(&new), id_of(&old));
    new.start();
    new.expose("web", server.address);
    mesh.agents.push(new);
    for agent in &mesh.agents {
        agent.wait_alive(3, SOON); // and no other is listed
    }
    mesh.agent("caller").wait_endpoints("web", 1);
    ask(entry, "after").unwrap();
    let told = mesh.agent("first").events("member_enrolled");
    let told = told.last().unwrap()["reason"].as_str().unwrap().to_owned();
    assert!(told.contains(&format!("it replaces {}", id_of(&old))), "{told}");
    assert!(mesh.agent("caller").events("name_conflict").is_empty(), "nobody has it twice");

    // The old disk is found in a drawer and put into a machine.
    old.spawn();
    for name in ["first", "caller"] {
        let agent = mesh.agent(name);
        eventually(&format!("{name} refuses it"), SOON, || {
            let labels = ["door=\"mesh\"", "reason=\"revoked\""];
            check(agent.metric("murmesh_refused_total", &labels) >= 1.0, agent.refusals())
        });
        let listed = agent.get("/v1/mesh/members").to_string();
        assert!(!listed.contains(&id_of(&old)), "{listed}");
    }
    assert_ne!(old.state_of("caller"), "alive");
    ask(entry, "and still").unwrap();
    old.wait_disowned();
    old.stop();
    let (token, at) = (mesh.invite(1), old.mesh.to_string());
    let there = old.run(&["join", &token, "--name", "web1", "--mesh", &at, "--replace"]).fails(2);
    assert!(there.contains("'web1' answers; stop it first"), "{there}");
}

#[test]
fn the_issuing_key_of_a_replaced_machine_is_told_until_it_is_removed() {
    let _turn = beside_others();
    let mut mesh = TestMesh::of(&["first", "second"]);
    let token = mesh.invite(1);
    mesh.agent("first").run(&["issuer", "add", "second"]).ok();
    let old = mesh.agents.pop().unwrap();
    let id = id_of(&old);
    old.kill();
    let first = mesh.agent("first");
    first.wait_state("second", "down", SOON);
    let new = machine(&mesh, "second", "second-reimaged");
    let at = new.mesh.to_string();
    new.run(&["join", &token, "--name", "second", "--mesh", &at, "--advertise", &at, "--replace"])
        .ok();
    new.start();
    let told = |command: &[&str]| {
        let said = first.run(command);
        let fix = format!("murmesh issuer remove {id} --root-key FILE");
        (said.stdout.contains(&fix), said.stdout)
    };
    for command in [&["issuer", "list"][..], &["check"]] {
        let (is_told, said) = told(command);
        assert!(is_told, "{said}");
    }
    first.run(&["issuer", "remove", &id]).ok();
    for command in [&["issuer", "list"][..], &["check"]] {
        let (is_told, said) = told(command);
        assert!(!is_told, "{said}");
    }
}

#[test]
fn two_members_of_one_name_raise_an_alarm_and_are_told_apart_by_id() {
    let _turn = beside_others();
    let mut mesh = TestMesh::of(&["first", "web1"]);
    // What two issuers do that cannot hear each other: here one does it behind its agent's back.
    let mut twin = machine(&mesh, "web1", "web1-too");
    let issuer = DataDir::new(&mesh.agent("first").data_dir);
    let dir = DataDir::new(&twin.data_dir);
    dir.create().unwrap();
    let enrolment = Enrolment {
        key: dir.node_key().unwrap().public_key(),
        name: "web1".parse().unwrap(),
        serial: 2, // as far as the agent is
        services: None,
        issued_at: on_disk_now(mesh.agent("first")),
        invite: None,
        replaces: Vec::new(),
        let_in_by: None,
    };
    let (entry, chain) = issuer.authority().unwrap().unwrap().enrol(&enrolment).unwrap();
    let entries = [issuer.entries().unwrap(), vec![entry]].concat();
    dir.store_identity(&issuer.genesis_bytes().unwrap(), &entries, &chain).unwrap();
    let (mesh_at, seed) = (twin.mesh.to_string(), mesh.agent("first").mesh.to_string());
    std::fs::write(
        twin.data_dir.join("node.toml"),
        format!("mesh = \"{mesh_at}\"\nadvertise = \"{mesh_at}\"\nseeds = [\"{seed}\"]\n"),
    )
    .unwrap();
    twin.arguments = vec!["--seed".to_owned(), seed];
    twin.start();
    mesh.agents.push(twin);
    for agent in &mesh.agents {
        agent.wait_alive(3, SOON);
    }

    let first = mesh.agent("first");
    eventually("the alarm is raised", SOON, || {
        let told = first.events("name_conflict");
        check(told.iter().any(|event| event["subject"] == "web1"), told)
    });
    let names = first.run(&["check", "--json"]).stdout;
    let checks: serde_json::Value = serde_json::from_str(&names).unwrap();
    let row = checks.as_array().unwrap().iter().find(|row| row["id"] == "names").unwrap();
    assert_eq!(row["status"], "fail", "{row}");

    let [_, one, two] = &mesh.agents[..] else { panic!("three agents") };
    let both = first.run(&["grant", "web1", "--services", "web"]).fails(2);
    assert!(both.contains(&id_of(one)) && both.contains(&id_of(two)), "{both}");
    first.run(&["grant", &id_of(two), "--services", "web"]).ok();
    eventually("one of them is meant", SOON, || {
        let allowed = |agent: &Agent| {
            let credentials = DataDir::new(&agent.data_dir).credentials().unwrap();
            credentials.enrolled().services.clone()
        };
        check(allowed(one).is_none() && allowed(two).is_some(), (allowed(one), allowed(two)))
    });
}

/// When an agent's own enrolment was made: never in the future.
fn on_disk_now(agent: &Agent) -> u64 {
    DataDir::new(&agent.data_dir).credentials().unwrap().enrolled().issued_at
}

#[test]
fn a_newcomer_becomes_an_issuer_by_its_invite_and_only_with_the_root_key_at_hand() {
    let _turn = beside_others();
    let mut mesh = TestMesh::of(&["first"]);
    let first = mesh.agent("first");
    let key = first.data_dir.join("root.key");
    let offline = mesh.home.path().join("offline.key");
    std::fs::rename(&key, &offline).unwrap();
    first.run(&["invite", "--issuer"]).fails(77);
    let offline = offline.to_str().unwrap();
    let two = first.run(&["invite", "--issuer", "--root-key", offline, "--uses", "2"]).fails(64);
    assert!(two.contains("one machine"), "{two}");

    let mut command = first.command(&["invite", "--issuer", "--root-key", offline]);
    let mut inviting = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut printed = BufReader::new(inviting.stdout.take().unwrap()).lines();
    let token = printed.next().unwrap().unwrap();
    let second = Agent::new(&mesh.home, "second");
    enrol(&second, &token);
    assert!(inviting.try_wait().unwrap().is_none(), "it waits for the agent");
    second.start();
    let told = printed.next().unwrap().unwrap();
    assert!(told.ends_with("is an issuer from now on"), "{told}");
    assert!(inviting.wait().unwrap().success());
    eventually("the second issues", SOON, || {
        check(!second.events("issuer_appointed").is_empty(), "not yet")
    });
    let token = second.run(&["invite"]).ok();
    mesh.agents.push(second);
    mesh.join("third", token.trim());
    mesh.agent("first").wait_alive(3, SOON);
}

#[test]
fn a_member_is_reached_where_its_advertised_name_leads() {
    let _turn = beside_others();
    let mut mesh = TestMesh::of(&["first"]);
    let token = mesh.invite(1);
    let named = Agent::new(&mesh.home, "named");
    let (at, name) = (named.mesh.to_string(), format!("localhost:{}", named.mesh.port()));
    let none = named.run(&["join", &token, "--advertise", "localhost"]).fails(64);
    assert!(none.contains("expected host:port"), "{none}");
    let joined =
        named.run(&["join", &token, "--name", "named", "--mesh", &at, "--advertise", &name]).ok();
    assert!(joined.contains(&format!("advertises  {name}")), "{joined}");
    named.start();
    mesh.agents.push(named);
    for agent in &mesh.agents {
        agent.wait_alive(2, SOON);
    }
    let listed = mesh.agent("first").get("/v1/mesh/members");
    let row = listed.as_array().unwrap().iter().find(|row| row["name"] == "named").unwrap();
    assert_eq!(row["address"], at.as_str());
    let dump = mesh.agent("named").run(&["config", "dump", "--json"]).ok();
    assert!(dump.contains(&name), "{dump}");
}
