//! Coming in, staying out, coming back, going away: whole agents on loopback.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use murmesh::model::{EntryKind, MeshId, Signer};
use murmesh::tls::store::DataDir;
use murmesh::tls::{Plane, Token};
use rustix::process::Signal;

use crate::support::{
    Agent, Kind, SOON, Server, TestMesh, beside_others, calmly, check, enrol, eventually,
    expect_echo, runtime, socks, until,
};

fn refused(agent: &Agent, door: &str, reason: &str) -> f64 {
    let labels = [format!("door=\"{door}\""), format!("reason=\"{reason}\"")];
    agent.metric("murmesh_refused_total", &[&labels[0], &labels[1]])
}

/// Every file of a directory with its bytes.
fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let files = files.filter(|entry| entry.file_type().unwrap().is_file());
    files
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

#[test]
fn five_commands_make_a_mesh_of_two_machines() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    let first = Agent::new(&mesh.home, "first");
    let at = first.mesh.to_string();
    let told = first.run(&["init", "--name", "first", "--mesh", &at, "--advertise", &at]);
    let told = format!("{}{}", told.clone().ok(), told.stderr);
    for word in ["root.key", "operator.key", "first", &at] {
        assert!(told.contains(word), "init does not print {word}: {told}");
    }
    for key in ["root.key", "operator.key", "node.key"] {
        let mode = fs::metadata(first.data_dir.join(key)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{key}");
    }
    first.start();
    let token = first.run(&["invite"]).ok();
    assert_eq!(token.lines().count(), 1, "invite prints the token and nothing else: {token:?}");
    assert!(!token.trim().contains(char::is_whitespace), "{token:?}");
    mesh.agents.push(first);
    mesh.join("second", token.trim());
    for agent in &mesh.agents {
        agent.wait_alive(2, SOON);
        let members = agent.get("/v1/mesh/members");
        for member in members.as_array().unwrap() {
            for field in ["name", "id", "address", "zone", "state", "epoch", "version"] {
                assert!(!member[field].is_null(), "no {field} in {member}");
            }
            assert!(member["services"].is_array() && member["age_ms"].is_number(), "{member}");
        }
    }
}

#[test]
fn a_token_is_taken_from_standard_input_and_from_the_environment() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("first");
    let token = mesh.invite(2);
    let piped = Agent::new(&mesh.home, "piped");
    let at = piped.mesh.to_string();
    let arguments = ["join", "-", "--name", "piped", "--mesh", &at, "--advertise", &at];
    piped.run_with(&arguments, format!("{token}\n").as_bytes()).ok();
    let set = Agent::new(&mesh.home, "set");
    let at = set.mesh.to_string();
    let mut command = set.command(&["join", "--name", "set", "--mesh", &at, "--advertise", &at]);
    command.env("MURMESH_JOIN_TOKEN", &token);
    crate::support::run_program(&mut command, b"", SOON).ok();
    for agent in [piped, set] {
        agent.start();
        mesh.agents.push(agent);
    }
    for agent in &mesh.agents {
        agent.wait_alive(3, SOON);
    }
}

#[test]
fn init_and_join_repeated_change_nothing_and_another_mesh_is_refused() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    let first = Agent::new(&mesh.home, "first");
    let at = first.mesh.to_string();
    let init = ["init", "--name", "first", "--mesh", &at, "--advertise", &at];
    first.run(&init).ok();
    let before = contents(&first.data_dir);
    first.run(&init).ok();
    assert!(before == contents(&first.data_dir), "init repeated changed a file");
    first.start();
    mesh.agents.push(first);

    let token = mesh.invite(1);
    let second = Agent::new(&mesh.home, "second");
    enrol(&second, &token);
    let before = contents(&second.data_dir);
    enrol(&second, &token);
    let after = contents(&second.data_dir);
    let key = |files: &BTreeMap<String, Vec<u8>>| files["node.key"].clone();
    assert_eq!(key(&before), key(&after), "join repeated made another key");
    assert!(before == after, "join repeated changed a file");

    let mut other = TestMesh::new();
    other.found("elsewhere");
    let foreign = other.invite(1);
    let refused = second.run(&["join", &foreign, "--name", "second"]);
    assert_ne!(refused.code, Some(0), "{refused:#?}");
    assert!(refused.stderr.contains("mesh"), "says why: {refused:#?}");
    assert!(after == contents(&second.data_dir), "a refused join changed a file");
}

#[test]
fn each_unfit_token_is_refused_with_its_own_reason_and_counted() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("first");
    let first = mesh.agent("first");
    let expired = first.run(&["invite", "--ttl", "1s"]).ok().trim().to_owned();
    let expires = Instant::now() + Duration::from_secs(2);
    let used = mesh.invite(1);
    enrol(&Agent::new(&mesh.home, "second"), &used);

    let before = first.run(&["invite", "list", "--json"]).ok();
    let revoked = mesh.invite(1);
    let listed: serde_json::Value =
        serde_json::from_str(&first.run(&["invite", "list", "--json"]).ok()).unwrap();
    let ids = listed.as_array().unwrap().iter().filter_map(|invite| invite["id"].as_str());
    let fresh: Vec<_> = ids.filter(|id| !before.contains(id)).collect();
    assert_eq!(fresh.len(), 1, "one new invite in {listed}");
    first.run(&["invite", "revoke", fresh[0]]).ok();
    let open = mesh.invite(1);
    until(expires);

    let cases = [
        ("third", &expired, "expired_invite", "expired"),
        ("third", &used, "used_up", "used"),
        ("third", &revoked, "revoked_invite", "revoked"),
        ("second", &open, "name_taken", "second"),
        ("first", &open, "name_taken", "first"),
    ];
    for (name, token, reason, word) in cases {
        let agent = Agent::new(&mesh.home, &format!("{name}-{reason}"));
        let before = refused(first, "enrol", reason);
        let at = agent.mesh.to_string();
        let ran = agent.run(&["join", token, "--name", name, "--mesh", &at, "--advertise", &at]);
        assert_ne!(ran.code, Some(0), "{ran:#?}");
        assert!(ran.stderr.contains(word), "'{word}' is missing: {ran:#?}");
        assert!(!agent.data_dir.join("node.crt").exists(), "an identity was written");
        let counted = refused(first, "enrol", reason) - before;
        assert!(counted >= 1.0, "{reason} is not counted: {:?}", first.refusals());
        let told = first.events("join_refused");
        let is_it = |event: &serde_json::Value| {
            let (fields, token) = (&event["fields"], token.parse::<Token>().unwrap());
            event["subject"] == "127.0.0.1"
                && fields["reason"] == reason
                && fields["name"] == name
                && fields["invite"] == token.key().unwrap().public_key().member_id().to_string()
        };
        assert!(told.iter().any(is_it), "who was refused, and with which token: {told:#?}");
    }
    // The token that two refused joins carried is still good.
    let agent = Agent::new(&mesh.home, "third");
    enrol(&agent, &open);
}

#[test]
fn a_member_of_another_mesh_reaches_nothing() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("honest");
    let echo = Server::start(Kind::Echo);
    mesh.agent("honest").expose("echo", echo.address);
    // The command looks whether anybody listens there. Connections are accepted in their order, so
    // once this one is answered, that one is counted.
    let mut own = TcpStream::connect(echo.address).unwrap();
    expect_echo(&mut own, b"counted").unwrap();
    let before = echo.accepted();
    let mut other = TestMesh::new();
    let mut stranger = Agent::new(&other.home, "stranger");
    let seed = mesh.agent("honest").mesh.to_string();
    stranger.arguments = vec!["--seed".into(), seed];
    other.found_with(stranger);

    let (honest, stranger) = (mesh.agent("honest"), other.agent("stranger"));
    eventually("the stranger is refused and counted", SOON, || {
        let counted = honest.metric("murmesh_refused_total", &["door=\"mesh\""]);
        check(counted >= 1.0, honest.refusals())
    });
    assert_eq!(honest.members().len(), 1, "{:?}", honest.members());
    assert_eq!(stranger.members().len(), 1, "{:?}", stranger.members());
    socks(stranger.socks, "echo.mesh", 1).expect_err("the service of another mesh");
    assert_eq!(echo.accepted(), before);
}

#[test]
fn without_a_certificate_only_the_enrolment_door_opens() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("first");
    let first = mesh.agent("first");
    let (id, _) = DataDir::new(&first.data_dir).genesis().unwrap().expect("a mesh");
    for (plane, opens) in [(Plane::Gossip, false), (Plane::Data, false), (Plane::Enrolment, true)] {
        let before = first.metric("murmesh_refused_total", &["door=\"mesh\""]);
        let outcome = runtime().block_on(knock(first.mesh, plane, &id));
        assert_eq!(outcome.is_ok(), opens, "{plane:?}: {outcome:?}");
        if !opens {
            eventually(&format!("the knock on {plane:?} is counted"), SOON, || {
                let counted = first.metric("murmesh_refused_total", &["door=\"mesh\""]);
                check(counted > before, first.refusals())
            });
        }
    }
    // The door that opens does not believe: junk is answered with a refusal and counted.
    eventually("junk is counted", SOON, || {
        check(refused(first, "enrol", "malformed") >= 1.0, first.refusals())
    });
    assert_eq!(first.members().len(), 1);
}

/// Dials one plane with no certificate, says something, and returns what came back.
async fn knock(to: std::net::SocketAddr, plane: Plane, mesh: &MeshId) -> Result<Vec<u8>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_no_client_auth();
    tls.alpn_protocols = vec![plane.alpn(mesh)];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.initial_dst_cid_provider(Arc::new(move || {
        let mut id = [7; 16];
        id[0] = plane.marker();
        quinn::ConnectionId::new(&id)
    }));
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let exchange = async {
        let connecting = endpoint.connect_with(config, to, "murmesh").map_err(|e| e.to_string())?;
        let connection = connecting.await.map_err(|error| error.to_string())?;
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| e.to_string())?;
        send.write_all(b"let me in").await.map_err(|error| error.to_string())?;
        let _ = send.finish();
        receive.read_to_end(64 * 1024).await.map_err(|error| error.to_string())
    };
    let answered = tokio::time::timeout(SOON, exchange).await;
    let answer = answered.map_err(|_| "no answer".to_owned())??;
    if answer.is_empty() { Err("ended without an answer".to_owned()) } else { Ok(answer) }
}

/// Takes any server for the right one: the question here is what the server takes.
#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[test]
fn a_member_restarted_after_sigkill_rejoins_from_disk_with_all_seeds_dead() {
    let _turn = calmly();
    let mesh = TestMesh::of(&["seed", "stays", "returns"]);
    let echo = Server::start(Kind::Echo);
    mesh.agent("stays").expose("echo", echo.address);
    let (stays, returns) = (mesh.agent("stays"), mesh.agent("returns"));
    returns.wait_endpoints("echo", 1);
    mesh.agent("seed").kill();
    returns.kill();
    until(Instant::now() + Duration::from_secs(1));
    let started = Instant::now();
    returns.start();
    returns.wait_state("stays", "alive", SOON);
    stays.wait_state("returns", "alive", SOON);
    returns.wait_endpoints("echo", 1);
    eprintln!("back {:?} after its start, with every seed dead", started.elapsed());
    let mut stream = socks(returns.socks, "echo.mesh", 1).unwrap();
    expect_echo(&mut stream, b"still here").unwrap();
    // The dead seed is told apart from the living.
    stays.wait_state("seed", "down", SOON);
}

#[test]
fn a_member_that_leaves_is_gone_over_restarts_until_a_token_lets_it_in_again() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["first", "second", "third"]);
    let (first, second, third) = (mesh.agent("first"), mesh.agent("second"), mesh.agent("third"));
    let echo = Server::start(Kind::Echo);
    second.expose("echo", echo.address);
    third.wait_endpoints("echo", 1);
    let id = |agent: &Agent| {
        let members = first.get("/v1/mesh/members");
        let mut rows = members.as_array().unwrap().iter();
        rows.find(|row| row["name"] == agent.name.as_str()).unwrap()["id"].clone()
    };
    let before = id(second);
    second.run(&["leave"]).ok();
    first.wait_state("second", "left", SOON);
    assert_eq!(second.wait_end(SOON).code(), Some(0));
    assert_eq!(first.get("/v1/mesh/services"), serde_json::json!([]), "it took its service along");
    assert_eq!(first.events("member_down"), Vec::<serde_json::Value>::new(), "it did not die");

    let refused = second.run(&["agent"]).fails(2);
    assert!(refused.contains("has left") && refused.contains("murmesh join TOKEN"), "{refused}");
    let nobody = second.run(&["members"]).fails(69);
    assert!(nobody.contains("murmesh join TOKEN: this machine has left"), "{nobody}");
    assert!(second.run(&["init"]).fails(2).contains("murmesh join TOKEN"));
    let revoked = mesh.invite(1);
    let listed = first.run(&["invite", "list", "--json"]).ok();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let open = listed.as_array().unwrap().iter().find(|invite| invite["state"] == "open").unwrap();
    first.run(&["invite", "revoke", &open["id"].as_str().unwrap()[..8]]).ok();
    assert!(second.run(&["join", &revoked]).fails(2).contains("revoked"));
    assert!(second.run(&["agent"]).fails(2).contains("has left"), "a refused join changes nothing");

    // Without a word on name and address: it keeps those it had.
    let told = second.run(&["join", &mesh.invite(1)]).ok();
    assert!(told.contains("name        second\n"), "{told}");
    second.start();
    for agent in &mesh.agents {
        agent.wait_alive(3, SOON);
    }
    assert_eq!(id(second), before, "under its old key");
    third.wait_endpoints("echo", 1);
    let mut stream = socks(third.socks, "echo.mesh", 1).unwrap();
    expect_echo(&mut stream, b"here again").unwrap();
    assert!(second.run(&["join", &mesh.invite(1)]).ok().starts_with("unchanged"));
}

/// Whoever restarts offers from its first record on what it offered before.
#[test]
fn a_restart_with_the_same_services_takes_none_away_for_a_moment() {
    let _turn = beside_others();
    let mut mesh = TestMesh::of(&["first", "second"]);
    let echo = Server::start(Kind::Echo);
    mesh.agents[1].arguments =
        ["--expose", &format!("by-flag={}", echo.address)].map(String::from).into();
    let (first, second) = (mesh.agent("first"), mesh.agent("second"));
    second.stop();
    second.start();
    first.expose("own", echo.address);
    second.expose("by-command", echo.address);
    let services = ["by-command", "by-flag", "own"];
    for agent in &mesh.agents {
        for service in services {
            agent.wait_endpoints(service, 1);
        }
    }
    let changes = |agent: &Agent| {
        ["instance_added", "instance_removed", "instance_changed"]
            .map(|kind| agent.events(kind).len())
    };
    let listed = |agent: &Agent| -> Vec<String> {
        let listed = agent.get("/v1/mesh/services");
        let name = |row: &serde_json::Value| row["name"].as_str().unwrap().to_owned();
        listed.as_array().unwrap().iter().map(name).collect()
    };
    let run = |of: &str, seen_by: &Agent| {
        let members = seen_by.get("/v1/mesh/members");
        let row =
            members.as_array().unwrap().iter().find(|row| row["name"] == of).cloned().unwrap();
        (row["state"] == "alive", row["epoch"].as_u64().unwrap())
    };
    for (restarted, other) in [(second, first), (first, second)] {
        let (before, (_, epoch)) = (changes(other), run(&restarted.name, other));
        restarted.stop();
        restarted.spawn();
        eventually("it is back", SOON, || {
            assert_eq!(listed(other), services, "seen by the other");
            let (is_alive, epoch_now) = run(&restarted.name, other);
            check(is_alive && epoch_now > epoch, (is_alive, epoch_now))
        });
        restarted.wait_ready();
        assert_eq!(listed(restarted), services, "seen by itself");
        other.wait_endpoints("own", 1);
        assert_eq!(changes(other), before, "{} saw {} change", other.name, restarted.name);
        assert_eq!(changes(restarted), [0; 3], "{} saw changes", restarted.name);
    }
}

/// A copied data directory is an accident: the copy says so and ends, and the one that runs tells.
#[test]
fn a_copied_data_directory_does_not_start_while_the_first_runs() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["first", "second"]);
    let (first, second) = (mesh.agent("first"), mesh.agent("second"));
    let mut copy = Agent::new(&mesh.home, "copy");
    let mut cp = std::process::Command::new("cp");
    let copied = cp.arg("-a").args([&second.data_dir, &copy.data_dir]).status();
    assert!(copied.unwrap().success());
    let refused = copy.run(&["agent", "--mesh", &copy.mesh.to_string()]).fails(2);
    let place = format!("another agent with this member's key answers at {}", second.mesh);
    assert!(refused.contains(&place) && refused.contains("--data-dir"), "{refused}");
    let told = second.events("duplicate_key");
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0]["reason"].as_str().unwrap().contains("wants to start"), "{told:?}");
    assert_eq!(first.state_of("second"), "alive");

    // A directory that moved is none.
    second.stop();
    copy.mesh = second.mesh;
    copy.start();
    first.wait_alive(2, SOON);
    copy.wait_alive(2, SOON);
    assert_eq!(copy.events("duplicate_key"), Vec::<serde_json::Value>::new());
}

/// A damaged file is named, with what may be done: and that works.
#[test]
fn a_damaged_data_directory_is_refused_with_the_file_and_the_way_back() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["first", "second"]);
    let (first, second) = (mesh.agent("first"), mesh.agent("second"));
    second.expose("web", "127.0.0.1:1");
    second.stop();
    let whole = contents(&second.data_dir);
    let entries = DataDir::new(&second.data_dir).entries().unwrap();
    let issuerless = entries.iter().filter(|entry| entry.key().kind != EntryKind::ISSUER);
    let issuerless = issuerless.flat_map(|entry| entry.bytes().to_vec()).collect();
    let half = |file: &str| whole[file][..whole[file].len() - 3].to_vec();
    for (file, bytes, way_back) in [
        ("entries", Vec::new(), "murmesh join TOKEN"),
        ("entries", half("entries"), "murmesh join TOKEN"),
        ("entries", issuerless, "murmesh join TOKEN"),
        ("members", Vec::new(), "may be deleted"),
        ("members", half("members"), "may be deleted"),
        ("node.toml", Vec::new(), "may be deleted"),
        ("node.toml", b"mesh = 3".to_vec(), "may be deleted"),
        ("runtime.toml", b"[[expose]]".to_vec(), "may be deleted"),
        ("epoch", Vec::new(), "may be deleted"),
    ] {
        let path = second.data_dir.join(file);
        let is_empty = bytes.is_empty();
        fs::write(&path, bytes).unwrap();
        let told = second.run(&["agent"]).fails(2);
        let place = format!("{} is damaged: ", path.display());
        assert!(told.contains(&place) && told.contains(way_back), "{told}");
        assert_eq!(told.contains("it is empty"), is_empty, "{told}");
        match way_back {
            "may be deleted" => fs::remove_file(&path).unwrap(),
            _ => drop(second.run(&["join", &mesh.invite(1)]).ok()),
        }
        second.start();
        first.wait_alive(2, SOON);
        second.wait_alive(2, SOON);
        second.stop();
        fs::write(&path, &whole[file]).unwrap();
    }
}

#[test]
fn a_founder_that_left_comes_back_by_init() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["first", "second"]);
    let (first, second) = (mesh.agent("first"), mesh.agent("second"));
    let left = first.run(&["leave"]);
    let hint = "try: murmesh issuer remove first --root-key FILE";
    assert!(left.code == Some(0) && left.stderr.contains(hint), "an issuer stays one: {left:?}");
    second.wait_state("first", "left", SOON);
    first.wait_end(SOON);
    assert!(first.run(&["agent"]).fails(2).contains("murmesh init"));
    assert!(first.run(&["init"]).ok().starts_with("back: "));
    first.start();
    second.wait_state("first", "alive", SOON);
    first.wait_alive(2, SOON);
    first.run(&["invite"]).ok();
}

#[test]
fn a_member_stopped_with_sigterm_is_shown_as_restarting_and_never_as_left() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["first", "second"]);
    let (first, second) = (mesh.agent("first"), mesh.agent("second"));
    let mut seen = std::collections::BTreeSet::new();
    second.signal(Signal::TERM);
    eventually("first shows second restarting", SOON, || {
        let state = first.state_of("second");
        seen.insert(state.clone());
        check(state == "restarting", state)
    });
    assert_eq!(second.wait_end(SOON).code(), Some(0));
    // Longer than probe and suspicion take: no detector turns the announcement into a death.
    let end = Instant::now() + Duration::from_secs(6);
    while Instant::now() < end {
        seen.insert(first.state_of("second"));
        until(Instant::now() + Duration::from_millis(50));
    }
    assert!(!seen.contains("left") && !seen.contains("down"), "{seen:?}");
    second.start();
    first.wait_state("second", "alive", SOON);
}

#[test]
fn sigint_ends_an_agent_in_order_as_well() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    let agent = mesh.found("only");
    agent.signal(Signal::INT);
    assert_eq!(agent.wait_end(SOON).code(), Some(0));
}
