//! An issuer is removed, and with it whom it alone let in: live connections end, and a restart does
//! not open the door again.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use murmesh::model::{EntryKind, Issuer};
use murmesh::tls::store::DataDir;
use murmesh::tls::{NodeCredentials, Plane, Root, SecretKey, server_name};
use murmesh::transport::refusal;
use murmesh::wire;
use quinn::ConnectionError;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use crate::support::{
    Agent, Kind, SOON, Server, TestMesh, alone, beside_others, check, dial, eventually,
    free_address, request, runtime, within,
};

/// Two issuers, one member that stays and one that is to go; the first issuer let everybody in.
fn mesh() -> TestMesh {
    let mesh = TestMesh::of(&["first", "second", "staying", "going"]);
    mesh.agent("first").run(&["issuer", "add", "second"]).ok();
    eventually("the second issues", SOON, || {
        let appointed = mesh.agent("second").events("issuer_appointed");
        check(!appointed.is_empty(), "not yet")
    });
    mesh
}

/// Removes the first issuer and drops the member that is to go.
#[track_caller]
fn remove_first(mesh: &TestMesh) {
    let key = mesh.agent("first").data_dir.join("root.key");
    let second = mesh.agent("second");
    let arguments = ["issuer", "remove", "first", "--root-key", key.to_str().unwrap()];
    let unknown = second.run(&[&arguments[..], &["--drop", "nobody"]].concat()).fails(2);
    assert!(unknown.contains("nobody"), "{unknown}");
    // A word of another issuer does not save it.
    second.run(&["grant", "going", "--services", "inner"]).ok();
    let going = DataDir::new(&mesh.agent("going").data_dir).credentials().unwrap().member_id();
    let short = &going.to_string()[..12];
    let told = second.run(&[&arguments[..], &["--drop", short]].concat()).ok();
    assert!(told.contains(&format!("nobody believes any more: going ({going})")), "{told}");
}

/// A connection through the mesh that has carried something.
#[track_caller]
fn open(caller: &Agent, service: &str) -> TcpStream {
    caller.wait_endpoints(service, 1);
    let mut stream = TcpStream::connect(caller.upstream(service)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    echo(&mut stream).unwrap();
    stream
}

fn echo(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(b"still there?")?;
    stream.read_exact(&mut [0; 12])
}

#[test]
fn open_connections_of_whom_nobody_vouches_for_any_more_end_everywhere_within_2_s() {
    let _turn = alone();
    let mesh = mesh();
    let [first, second, staying, going] = &mesh.agents[..] else { panic!("four agents") };
    let server = Server::start(Kind::Echo);
    going.expose("inner", server.address);
    second.expose("outer", server.address);
    let ending = [
        ("first to the one that goes", open(first, "inner")),
        ("second to the one that goes", open(second, "inner")),
        ("the third to the one that goes", open(staying, "inner")),
        ("the one that goes to the second", open(going, "outer")),
    ];
    let mut lasting = [open(first, "outer"), open(staying, "outer")];

    remove_first(&mesh);
    let removed = Instant::now();
    for (what, mut stream) in ending {
        let left = within(Duration::from_secs(2)).saturating_sub(removed.elapsed());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1)))).unwrap();
        match stream.read(&mut [0; 64]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{what}: {other:?} {:?} after the removal", removed.elapsed()),
        }
    }
    for agent in [first, second, staying] {
        eventually(&format!("{} tells and counts it", agent.name), SOON, || {
            let told = agent.events("connection_revoked");
            let count = agent.metric("murmesh_connections_revoked_total", &[]);
            let is_told = told.iter().all(|event| event["subject"] == "going");
            check(!told.is_empty() && is_told && count >= 1.0, (told, count))
        });
        agent.wait_state("going", "down", SOON);
    }
    for stream in &mut lasting {
        echo(stream).expect("whoever is kept keeps its connections");
    }
}

/// How an attempt to come in ended.
#[derive(Debug, PartialEq)]
enum Attempt {
    /// Nobody listened, or the agent was not that far.
    Unanswered,
    Revoked,
    Other(String),
}

/// One handshake on `plane`, and what the far side says once it has seen the certificate.
async fn attempt(who: NodeCredentials, plane: Plane, far: SocketAddr) -> Attempt {
    let tls = who.client_config(plane).unwrap();
    let from = Ipv4Addr::LOCALHOST.into();
    let (_endpoint, dialled) = dial(from, far, tls, plane.marker(), &server_name(None));
    let ended = match tokio::time::timeout(Duration::from_secs(4), dialled).await {
        Err(_) => return Attempt::Unanswered,
        Ok(Err(error)) => error,
        Ok(Ok(connection)) => {
            match tokio::time::timeout(Duration::from_secs(4), connection.closed()).await {
                Ok(error) => error,
                Err(_) => return Attempt::Other("it was let in".to_owned()),
            }
        }
    };
    match (refusal(&ended), &ended) {
        (Some("revoked"), _) => Attempt::Revoked,
        (_, ConnectionError::TimedOut) => Attempt::Unanswered,
        (_, other) => Attempt::Other(other.to_string()),
    }
}

/// Attempts on both planes, every twentieth of a second until `is_ready` is told; how they ended.
async fn attempts(
    who: NodeCredentials,
    far: SocketAddr,
    mut is_ready: oneshot::Receiver<()>,
) -> Vec<Attempt> {
    let mut attempts = JoinSet::new();
    let mut pace = tokio::time::interval(Duration::from_millis(50));
    while is_ready.try_recv().is_err() {
        pace.tick().await;
        for plane in [Plane::Data, Plane::Gossip] {
            attempts.spawn(attempt(who.clone(), plane, far));
        }
    }
    attempts.join_all().await
}

#[test]
fn a_restarted_member_refuses_whom_nobody_vouches_for_from_the_first_packet_on() {
    let _turn = beside_others();
    let mut mesh = mesh();
    mesh.agent("going").stop();
    remove_first(&mesh);
    eventually("the third has heard of it", SOON, || {
        check(!mesh.agent("staying").events("issuer_removed").is_empty(), "not yet")
    });
    let who = DataDir::new(&mesh.agent("going").data_dir).credentials().unwrap();
    for name in ["second", "staying"] {
        let agent = mesh.agents.iter_mut().find(|agent| agent.name == name).unwrap();
        agent.stop();
        // On another port its start waits a second for a twin at the old one. Its port is open then,
        // and nobody has told it more than its disk did.
        agent.mesh = free_address();
        let (ready, is_ready) = oneshot::channel();
        let attempts = runtime().spawn(attempts(who.clone(), agent.mesh, is_ready));
        agent.start();
        ready.send(()).unwrap();
        let ended = runtime().block_on(attempts).unwrap();
        let is_in_vain = |one: &Attempt| matches!(one, Attempt::Unanswered | Attempt::Revoked);
        assert!(ended.iter().all(is_in_vain), "{ended:?}");
        let refused = ended.iter().filter(|one| **one == Attempt::Revoked).count();
        assert!(refused >= 2, "{refused} of {} were answered", ended.len());
        assert_ne!(agent.state_of("going"), "alive");
    }
}

#[test]
fn a_member_that_hears_that_nobody_vouches_for_it_is_not_ready_and_says_why() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["only"]);
    let only = mesh.agent("only");
    // The command line refuses to remove the last issuer; the root key does not have to ask it.
    let dir = DataDir::new(&only.data_dir);
    let (id, genesis) = dir.genesis().unwrap().unwrap();
    let key = SecretKey::from_pem(&dir.read("root.key").unwrap().unwrap()).unwrap();
    let issuers = dir.entries().unwrap();
    let entry = issuers.iter().find(|entry| entry.key().kind == EntryKind::ISSUER).unwrap();
    let issuer: Issuer = wire::decode_payload(&entry.payload()).unwrap();
    let root = Root::new(id, &genesis, key).unwrap();
    let gone = root.dismiss(&issuer, entry.version().epoch, Vec::new(), Vec::new()).unwrap();
    let body = serde_json::json!({ "entry": BASE64_STANDARD.encode(gone.bytes()) }).to_string();
    let token = format!("Bearer {}", only.api_token());
    let headers = [("authorization", token.as_str()), ("content-type", "application/json")];
    let told = request(&only.at(), "POST", "/v1/mesh/entries", &headers, body.as_bytes()).unwrap();
    assert_eq!(told.status, 200, "{}", told.text());
    eventually("it is not ready", SOON, || {
        let ready = only.try_get("/ready").unwrap();
        check(ready.status == 503 && ready.text().contains("nobody vouches"), ready.text())
    });
    only.stop();
    let failed = only.run(&["agent"]).fails(2);
    assert!(failed.contains("nobody vouches") && failed.contains("murmesh join TOKEN"), "{failed}");
}

#[test]
fn an_issuer_that_is_added_again_has_another_key_and_the_old_one_stays_void() {
    let _turn = beside_others();
    let mesh = mesh();
    let first = mesh.agent("first");
    first.run(&["issuer", "remove", "second"]).ok();
    eventually("the second has heard of it", SOON, || {
        check(!mesh.agent("second").events("issuer_removed").is_empty(), "not yet")
    });
    first.run(&["issuer", "add", "second"]).ok();
    let listed: serde_json::Value =
        serde_json::from_str(&first.run(&["issuer", "list", "--json"]).ok()).unwrap();
    let rows = listed.as_array().unwrap().iter().filter(|row| row["node"] == "second");
    let rows: Vec<_> = rows.map(|row| (&row["key"], &row["active"])).collect();
    assert_eq!(rows.len(), 2, "{listed}");
    assert!(rows[0].0 != rows[1].0 && rows[0].1 != rows[1].1, "one key each way: {listed}");
    eventually("the second issues again", SOON, || {
        check(mesh.agent("second").events("issuer_appointed").len() == 2, "not yet")
    });
    mesh.agent("second").run(&["invite"]).ok();
}

#[test]
fn a_member_that_was_dropped_while_it_was_off_learns_it_from_those_that_refuse_it() {
    let _turn = beside_others();
    let mesh = mesh();
    let going = mesh.agent("going");
    going.stop();
    remove_first(&mesh);
    going.spawn();
    going.wait_disowned();
    let checks = going.run(&["check", "--json"]).stdout;
    let checks: serde_json::Value = serde_json::from_str(&checks).unwrap();
    let row = |id: &str| checks.as_array().unwrap().iter().find(|row| row["id"] == id).unwrap();
    assert_eq!(row("believed")["status"], "fail", "{checks}");
    assert!(row("believed")["fix"].as_str().unwrap().contains("murmesh join TOKEN --replace"));
    for id in ["udp", "isolated"] {
        assert_eq!(row(id)["status"], "pass", "the network is well: {checks}");
    }
    let status = going.run(&["status"]).stdout;
    assert!(status.contains("not ready: the other members refuse this one"), "{status}");

    // A token does not bring the key back, and what its disk remembers does not count.
    going.stop();
    let token = mesh.agent("second").run(&["invite"]).ok();
    let again = going.run(&["join", token.trim(), "--name", "going", "--replace"]).fails(2);
    assert!(again.contains("was dropped from the mesh"), "{again}");
}
