//! Junk at every door, and an operator's mistakes: clear errors, and agents that go on serving.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use murmesh::model::{Enrolment, Entry, EntryKind, Epoch, MeshId, Signer};
use murmesh::tls::store::DataDir;
use murmesh::tls::{Plane, SecretKey, server_name};
use murmesh::transport::refusal;
use murmesh::wire;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::time::timeout;

use crate::support::{
    Agent, Kind, Noise, SOON, Server, TestMesh, ask, beside_others, check, dial, enrol, eventually,
    free_address, leaf, nobody, request, request_raw, runtime, showing, socks, within,
};

/// Reproducible junk of this length.
fn junk(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Noise::new(seed, len as u64).fill(&mut bytes);
    bytes
}

/// Two agents with a service between them that must work before, during and after.
fn serving() -> (TestMesh, Server, SocketAddr) {
    let mesh = TestMesh::of(&["near", "far"]);
    let web = Server::start(Kind::Named("far".to_owned()));
    mesh.agent("far").expose("web", web.address);
    let near = mesh.agent("near");
    near.wait_endpoints("web", 1);
    let entry = near.upstream("web");
    assert_eq!(ask(entry, "before").unwrap(), "far");
    (mesh, web, entry)
}

#[track_caller]
fn assert_unharmed(mesh: &TestMesh, entry: SocketAddr) {
    assert_eq!(ask(entry, "after").unwrap(), "far");
    for agent in &mesh.agents {
        assert_eq!(agent.try_get("/ready").unwrap().status, 200, "{}", agent.name);
        assert_eq!(agent.members().len(), 2, "{:?}", agent.members());
        assert!(agent.members().iter().all(|(_, state)| state == "alive"), "{:?}", agent.members());
        let log = agent.log();
        assert!(!log.contains("panicked"), "{} panicked", agent.name);
    }
}

#[test]
fn garbage_datagrams_change_nothing() {
    let _turn = beside_others();
    let (mesh, _web, entry) = serving();
    let far = mesh.agent("far");
    let before = far.memory();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for number in 0..20_000_u64 {
        let len = [0, 1, 7, 20, 21, 100, 1_199, 1_200, 1_201, 1_472, 9_000][number as usize % 11];
        let mut datagram = junk(number + 1, len);
        match number % 4 {
            // A QUIC initial of version 1, up to the part that is protected.
            1 if len >= 20 => datagram[..7].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8, 0x67]),
            // A version that nobody speaks: at most a version negotiation comes back.
            2 if len >= 20 => {
                datagram[..7].copy_from_slice(&[0xc3, 0x1a, 0x2a, 0x3a, 0x4a, 8, 0x64])
            }
            // A short header for a connection that does not exist.
            3 if len >= 20 => datagram[0] = 0x40,
            _ => {}
        }
        let _ = socket.send_to(&datagram, far.mesh);
    }
    assert_unharmed(&mesh, entry);
    let grown = far.memory().saturating_sub(before) >> 20;
    assert!(grown < 64, "20,000 garbage datagrams cost {grown} MiB");
}

#[test]
fn garbage_at_the_api_is_refused_and_the_api_goes_on() {
    let _turn = beside_others();
    let (mesh, _web, entry) = serving();
    let near = mesh.agent("near");
    let at = near.at();
    let cases: Vec<Vec<u8>> = vec![
        junk(1, 10_000),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"GET /v1/mesh/members HTTP/1.1\r\n\r\n".to_vec(),
        format!("GET /live HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "y".repeat(1 << 20)).into(),
        [b"GET /".to_vec(), vec![b'a'; 1 << 20], b" HTTP/1.1\r\nhost: localhost\r\n\r\n".to_vec()].concat(),
        b"POST /v1/mesh/expose HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\nconnection: close\r\n\r\n{".to_vec(),
    ];
    for case in &cases {
        let asked = String::from_utf8_lossy(&case[..case.len().min(60)]);
        let answer = request_raw(&at, case).unwrap_or_else(|error| panic!("{asked}: {error}"));
        let answer = String::from_utf8_lossy(&answer[..answer.len().min(60)]);
        assert!(answer.starts_with("HTTP/1.1 4"), "{asked}: {answer}");
    }
    assert_unharmed(&mesh, entry);
}

#[test]
fn the_api_refuses_foreign_hosts_and_origins_and_mutations_without_the_token() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    let agent = mesh.found("only");
    let get = |headers: &[(&str, &str)]| {
        request(&agent.at(), "GET", "/v1/mesh/members", headers, b"").unwrap().status
    };
    assert_eq!(get(&[]), 200);
    assert!((400..500).contains(&get(&[("host", "attacker.example:7371")])));
    assert!((400..500).contains(&get(&[("origin", "http://attacker.example")])));
    assert!((400..500).contains(&get(&[("sec-fetch-site", "cross-site")])));
    let body = br#"{"name":"web","to":"127.0.0.1:80"}"#;
    let json = ("content-type", "application/json");
    let post = |headers: &[(&str, &str)]| {
        request(&agent.at(), "POST", "/v1/mesh/expose", headers, body).unwrap()
    };
    let refused = post(&[json]);
    assert!(matches!(refused.status, 401 | 403), "{}: {}", refused.status, refused.text());
    assert!(refused.head.contains("application/problem+json"), "{}", refused.head);
    let wrong = post(&[json, ("authorization", "Bearer wrong")]);
    assert!(matches!(wrong.status, 401 | 403), "{}", wrong.status);
    let token = format!("Bearer {}", agent.api_token());
    let taken = post(&[json, ("authorization", &token)]);
    assert!(taken.status < 300, "{}: {}", taken.status, taken.text());
    let consul = post(&[json, ("x-consul-token", &agent.api_token())]);
    assert!(consul.status < 300, "{}: {}", consul.status, consul.text());
    let counted = agent.metric("murmesh_refused_total", &["door=\"api\""]);
    assert!(counted >= 5.0, "{:?}", agent.refusals());
    assert_eq!(request(&agent.at(), "GET", "/nothing", &[], b"").unwrap().status, 404);
}

#[test]
fn garbage_at_socks_ends_that_connection_only() {
    let _turn = beside_others();
    let (mesh, _web, entry) = serving();
    let near = mesh.agent("near");
    let long = [&[5, 1, 0, 5, 1, 0, 3, 255][..], &[b'a'; 255], &[0, 80]].concat();
    let cases: Vec<Vec<u8>> = vec![
        junk(3, 4_096),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![4, 1, 0, 80, 127, 0, 0, 1, 0],
        vec![5, 0],
        vec![5, 1, 2],
        vec![5, 1, 0, 5, 2, 0, 1, 127, 0, 0, 1, 0, 80],
        vec![5, 1, 0, 5, 1, 0, 9, 0, 0],
        vec![5, 1, 0, 5, 1, 0, 3, 0, 0, 80],
        vec![5, 1, 0, 5, 1, 0, 3, 4, 0xff, 0xfe, 0, b'\n', 0, 80],
        long,
    ];
    for case in &cases {
        let mut stream = TcpStream::connect(near.socks).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let _ = stream.write_all(case);
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let timed_out = ended.is_err_and(|error| {
            matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
        });
        assert!(!timed_out, "{case:?} holds a connection; it answered {answer:?}");
        assert!(!answer.ends_with(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]), "{case:?} was granted");
    }
    // Truncated: a client that says half a request and waits does not hold its place for ever.
    let mut silent = TcpStream::connect(near.socks).unwrap();
    silent.write_all(&[5, 1]).unwrap();
    silent.set_read_timeout(Some(SOON)).unwrap();
    let mut stream = socks(near.socks, "web.mesh", 1).unwrap();
    stream.write_all(b"beside\n").unwrap();
    let ended = silent.read(&mut [0; 8]).map_err(|error| error.kind());
    let is_ended = matches!(ended, Ok(0) | Err(std::io::ErrorKind::ConnectionReset));
    assert!(is_ended, "half a request holds for ever: {ended:?}");
    assert_unharmed(&mesh, entry);
}

/// What one chain of certificates gets at an agent: `Ok` with the first bytes of an answer, or the
/// word of the refusal.
fn knock(
    far: SocketAddr,
    tls: rustls::ClientConfig,
    plane: Plane,
) -> Result<Vec<u8>, Option<&'static str>> {
    runtime().block_on(async {
        let from = Ipv4Addr::LOCALHOST.into();
        let (_endpoint, dialled) = dial(from, far, tls, plane.marker(), &server_name(None));
        let dialled = timeout(SOON, dialled).await.expect("an answer in time");
        let connection = dialled.map_err(|error| refusal(&error))?;
        let answer = async {
            let (mut send, mut receive) = connection.open_bi().await.ok()?;
            // A tunnel to a service that is not there: a member is told so.
            send.write_all(b"\x00\x0e\x01\x03web\x06nobody\x00\x00").await.ok()?;
            receive.read_to_end(200).await.ok()
        };
        match timeout(SOON, answer).await.expect("an answer in time") {
            Some(answer) => Ok(answer),
            None => Err(refusal(&connection.closed().await)),
        }
    })
}

/// An issuer's key could sign anything, and a member's key, too: what counts is that one word holds
/// the other. Each of these is right but for one thing.
#[test]
fn a_forged_identity_reaches_nothing_and_is_counted() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("victim");
    let enrolled = Agent::new(&mesh.home, "mallory");
    enrol(&enrolled, &mesh.invite(1));
    let victim = mesh.agent("victim");
    let founder = DataDir::new(&victim.data_dir);
    let authority = founder.authority().unwrap().unwrap();
    let issuer_key = authority.key();
    let mallory = DataDir::new(&enrolled.data_dir).credentials().unwrap();
    let key = mallory.signer().unwrap();
    let pem = fs::read(enrolled.data_dir.join("node.crt")).unwrap();
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem).map(Result::unwrap).collect();
    let [own, issuer, root] = &chain[..] else { panic!("{} certificates", chain.len()) };

    let enrolment = |mesh: &MeshId, key: &SecretKey, name: &str, signer: &SecretKey| {
        let key = key.public_key();
        let enrolment = Enrolment {
            key,
            name: name.parse().unwrap(),
            serial: 9,
            services: None,
            issued_at: 0,
            invite: None,
            replaces: Vec::new(),
            let_in_by: None,
        };
        let (subject, payload) = (key.member_id(), wire::encode_payload(&enrolment).unwrap());
        let kind = EntryKind::ENROLMENT;
        Entry::sign(mesh, signer, kind, *subject.as_bytes(), Epoch(1), 9, &payload).unwrap()
    };
    let (here, elsewhere) = (mallory.mesh(), MeshId::of_genesis(b"another mesh"));
    let below_issuer = |key: &SecretKey, enrolment: &Entry| {
        vec![leaf(key, enrolment, issuer, issuer_key), issuer.clone(), root.clone()]
    };
    let member_of = |tls: Plane, key: &SecretKey, chain: Vec<CertificateDer<'static>>| {
        showing(mallory.client_config(tls).unwrap(), key, chain)
    };

    // So that what follows is refused for what it says, and not for how it is made.
    let honest = below_issuer(&key, &enrolment(here, &key, "mallory", issuer_key));
    let answer = knock(victim.mesh, member_of(Plane::Data, &key, honest), Plane::Data);
    assert_eq!(answer.as_deref().map(|answer| &answer[..2]), Ok(&[2, 1][..]), "no such instance");

    let renamed = enrolment(here, &key, "mallor", issuer_key).bytes().to_vec();
    let at = renamed.windows(6).position(|bytes| bytes == b"mallor").unwrap();
    let renamed = [&renamed[..at], b"victim", &renamed[at + 6..]].concat();
    let renamed = Entry::decode(renamed.into()).unwrap();
    let other = SecretKey::generate().unwrap();
    let below_member = vec![
        leaf(&other, &enrolment(here, &other, "victim", &key), own, &key),
        own.clone(),
        issuer.clone(),
        root.clone(),
    ];
    // The chain holds without the second certificate, which is there to lend its key.
    let forged = enrolment(here, &other, "victim", &key);
    let around = vec![
        leaf(&other, &forged, issuer, issuer_key),
        leaf(&key, &forged, own, &key),
        issuer.clone(),
        root.clone(),
    ];
    let cases = [
        ("signed by whom the chain goes around", &other, around),
        ("signed by a member", &key, below_issuer(&key, &enrolment(here, &key, "victim", &key))),
        ("of another mesh", &key, {
            below_issuer(&key, &enrolment(&elsewhere, &key, "victim", issuer_key))
        }),
        ("with another name", &key, below_issuer(&key, &renamed)),
        ("of another member", &key, {
            below_issuer(&key, founder.credentials().unwrap().enrolment())
        }),
        ("below a member's leaf", &other, below_member),
    ];
    let refused =
        || victim.metric("murmesh_refused_total", &["door=\"mesh\"", "reason=\"bad_enrolment\""]);
    assert_eq!(refused(), 0.0, "{:?}", victim.refusals());
    let mut count = 0.0;
    for (what, key, chain) in cases {
        for plane in [Plane::Gossip, Plane::Data] {
            let answer = knock(victim.mesh, member_of(plane, key, chain.clone()), plane);
            assert_eq!(answer, Err(Some("bad_enrolment")), "{what}, {plane:?}");
            count += 1.0;
            eventually("the refusal is counted", SOON, || {
                check(refused() == count, victim.refusals())
            });
        }
    }
    assert!(victim.members().iter().all(|(name, _)| name != "mallory"), "{:?}", victim.members());
}

#[test]
fn a_crowd_at_the_enrolment_door_is_bounded_and_a_newcomer_comes_in_behind_it() {
    let _turn = beside_others();
    let (mesh, _web, entry) = serving();
    let near = mesh.agent("near"); // the issuer
    let credentials = DataDir::new(&near.data_dir).credentials().unwrap();
    let tls = nobody(Plane::Enrolment.alpn(credentials.mesh()));
    // Strangers need no certificate here: 80 of them, 5 at each of 16 addresses, who come in and
    // never say a word.
    let crowd = runtime().block_on(async {
        let mut dialled = Vec::new();
        for number in 0..80_u8 {
            let from: IpAddr = Ipv4Addr::new(127, 0, 1, 1 + number / 5).into();
            let marker = Plane::Enrolment.marker();
            dialled.push(dial(from, near.mesh, tls.clone(), marker, &server_name(None)));
        }
        let mut crowd = Vec::new();
        for (endpoint, connecting) in dialled {
            crowd.push((endpoint, timeout(SOON, connecting).await.expect("an answer in time")));
        }
        crowd
    });
    let inside = crowd.iter().filter(|(_, dialled)| dialled.is_ok()).count();
    assert!((1..=64).contains(&inside), "{inside} of 80 are inside");
    let overload = near.metric("murmesh_refused_total", &["door=\"enrol\"", "\"overload\""]);
    assert_eq!(overload as usize, 80 - inside, "{:?}", near.refusals());
    assert_eq!(ask(entry, "during").unwrap(), "far");
    let newcomer = Agent::new(&mesh.home, "newcomer");
    let (token, at) = (mesh.invite(1), newcomer.mesh.to_string());
    eventually("the newcomer is in", Duration::from_secs(30), || {
        let join = ["join", &token, "--name", "newcomer", "--mesh", &at, "--advertise", &at];
        let ran = newcomer.run(&join);
        check(ran.code == Some(0), ran)
    });
    drop(crowd);
    assert_unharmed(&mesh, entry);
}

#[test]
fn one_address_holds_eight_places_at_the_enrolment_door_and_a_newcomer_walks_past() {
    let _turn = beside_others();
    let (mesh, _web, entry) = serving();
    let near = mesh.agent("near"); // the issuer
    let credentials = DataDir::new(&near.data_dir).credentials().unwrap();
    let tls = nobody(Plane::Enrolment.alpn(credentials.mesh()));
    let crowd: Vec<_> = (0..30)
        .map(|_| {
            let (from, marker) = (Ipv4Addr::new(127, 0, 2, 1).into(), Plane::Enrolment.marker());
            runtime().block_on(async {
                let (endpoint, dialled) =
                    dial(from, near.mesh, tls.clone(), marker, &server_name(None));
                (endpoint, timeout(SOON, dialled).await.expect("an answer in time"))
            })
        })
        .collect();
    let inside = crowd.iter().filter(|(_, dialled)| dialled.is_ok()).count();
    let over_share = near.metric("murmesh_refused_total", &["door=\"enrol\"", "\"over_share\""]);
    assert_eq!(over_share as usize, 30 - inside, "{:?}", near.refusals());
    // One that is inside is shown out after a few seconds, and then another may come.
    assert!((8..=24).contains(&inside), "{inside} of 30 are inside");
    let newcomer = Agent::new(&mesh.home, "newcomer");
    enrol(&newcomer, &mesh.invite(1)); // at the first attempt
    drop(crowd);
    assert_unharmed(&mesh, entry);
}

#[test]
fn exposing_an_instance_that_never_answers_is_said_at_once() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("only");
    // A listener that accepts nothing, with its queue full: the next one waits for minutes.
    let hole = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    hole.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    hole.listen(1).unwrap();
    let address = hole.local_addr().unwrap().as_socket().unwrap();
    let mut queue = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        queue.push(stream);
    }
    let started = Instant::now();
    let ran = mesh.agent("only").run(&["expose", "web", &address.to_string()]);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(ran.stderr.contains("nothing answers"), "{ran:#?}");
    ran.ok();
}

/// One thread that waits for a log reader would be the one that carries bytes, or gossip.
#[test]
fn an_agent_whose_log_nobody_reads_serves_on_tells_the_gap_and_stops_in_order() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("far");
    let token = mesh.invite(1);
    let mut near = Agent::new(&mesh.home, "near");
    enrol(&near, &token);
    let file = mesh.home.path().join("loud.toml");
    fs::write(&file, "[telemetry]\nlog = \"info,murmesh=trace,quinn_proto=trace\"\n").unwrap();
    near.arguments = vec!["-c".to_owned(), file.display().to_string()];
    let mut pipe = near.start_with_pipe();
    let web = Server::start(Kind::Named("far".to_owned()));
    mesh.agent("far").expose("web", web.address);
    near.wait_endpoints("web", 1);
    let entry = near.upstream("web");
    for number in 0..2_000 {
        socks(near.socks, &format!("nobody-{number}.mesh"), 1).unwrap_err();
    }
    let dropped = || near.metric("murmesh_log_lines_dropped_total", &[]);
    eventually("lines are dropped", Duration::from_secs(60), || {
        assert_eq!(ask(entry, "more").unwrap(), "far");
        check(dropped() > 0.0, dropped())
    });
    assert_eq!(ask(entry, "unread").unwrap(), "far");
    assert_eq!(near.try_get("/ready").unwrap().status, 200);
    near.wait_alive(2, SOON);

    // Somebody reads again: the gap is told where it is.
    let (mut read, mut chunk, started) = (Vec::new(), vec![0; 1 << 16], Instant::now());
    let told = b"lines were dropped";
    while !read.windows(told.len()).any(|seen| seen == told) {
        assert!(started.elapsed() < Duration::from_secs(60), "nobody tells of the gap");
        let len = pipe.read(&mut chunk).unwrap();
        read.drain(..read.len().saturating_sub(told.len()));
        read.extend_from_slice(&chunk[..len]);
    }

    // And nobody reads the end.
    let before = dropped();
    eventually("lines are dropped again", Duration::from_secs(60), || {
        assert_eq!(ask(entry, "more").unwrap(), "far");
        check(dropped() > before, dropped())
    });
    near.stop();
}

#[test]
fn a_file_with_five_faults_is_answered_with_all_five_at_once() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    let agent = Agent::new(&mesh.home, "nobody");
    let file = mesh.home.path().join("faulty.toml");
    let text = "\
[node]
nmae = \"web1\"
zone = 7

[listen]
mesh = \"not an address\"

[join]
profile = \"moon\"

[[expose]]
name = \"Not_A_Name\"
to = \"127.0.0.1:8080\"
";
    fs::write(&file, text).unwrap();
    let path = file.display().to_string();
    let at = agent.mesh.to_string();
    agent.run(&["init", "--name", "nobody", "--mesh", &at, "--advertise", &at]).ok();
    for command in [&["validate", &path][..], &["agent", "-c", &path]] {
        let ran = agent.run(command);
        assert!(!matches!(ran.code, Some(0) | None), "{ran:#?}");
        let said = format!("{}{}", ran.stdout, ran.stderr);
        let faults = [
            ("nmae", ":2"),
            ("zone", ":3"),
            ("not an address", ":6"),
            ("moon", ":9"),
            ("Not_A_Name", ":12"),
        ];
        for (value, line) in faults {
            assert!(said.contains(value), "{command:?} does not name {value}: {said}");
            let place = said
                .lines()
                .any(|l| l.contains(line) || l.contains(&format!("line {}", &line[1..])));
            assert!(place, "{command:?} does not name line {line} of {value}: {said}");
        }
        assert!(said.contains("name"), "a suggestion for nmae: {said}");
    }
    // The repaired file is taken.
    fs::write(&file, "[node]\nzone = \"eu1/a\"\n").unwrap();
    agent.run(&["validate", &path]).ok();
}

#[test]
fn a_setting_that_is_not_available_yet_is_refused_and_never_ignored() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    let agent = Agent::new(&mesh.home, "nobody");
    let file = mesh.home.path().join("early.toml");
    let text = "[[expose]]\nname = \"web\"\nto = \"127.0.0.1:80\"\nallow = [\"checkout\"]\n";
    fs::write(&file, text).unwrap();
    let ran = agent.run(&["validate", &file.display().to_string()]);
    assert_ne!(ran.code, Some(0), "{ran:#?}");
    let said = format!("{}{}", ran.stdout, ran.stderr);
    assert!(said.contains("not available yet") && said.contains("allow"), "{said}");
    let ran = agent.run(&["init", "--name", "nobody", "--deny"]);
    assert_ne!(ran.code, Some(0), "{ran:#?}");
    assert!(ran.stderr.contains("not available yet"), "{ran:#?}");
    assert!(!agent.data_dir.join("node.crt").exists(), "init --deny made a mesh");
}

#[test]
fn a_port_in_use_is_named() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("holder");
    let holder = mesh.agent("holder");
    let agent = Agent::new(&mesh.home, "second");
    let at = agent.mesh.to_string();
    agent.run(&["init", "--name", "second", "--mesh", &at, "--advertise", &at]).ok();
    let (own_mesh, own_api) = (at.as_str(), agent.api.to_string());
    let (their_mesh, their_api) = (holder.mesh.to_string(), holder.api.to_string());
    for (mesh_at, api_at, taken) in
        [(their_mesh.as_str(), own_api.as_str(), &their_mesh), (own_mesh, &their_api, &their_api)]
    {
        let ran = agent.run(&["agent", "--mesh", mesh_at, "--api", api_at]);
        assert!(!matches!(ran.code, Some(0) | None), "{ran:#?}");
        assert!(ran.stderr.contains(taken.as_str()), "{taken} is not named: {ran:#?}");
        let said = ran.stderr.to_lowercase();
        assert!(said.contains("in use"), "{ran:#?}");
        assert!(!said.contains("panicked"), "{ran:#?}");
    }
    // An entry on a port that somebody else has: an error now, not a silence later.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let ran = holder.run(&["upstream", "web", &address]);
    assert_ne!(ran.code, Some(0), "{ran:#?}");
    assert!(ran.stderr.contains(&address), "{ran:#?}");
    assert_eq!(holder.try_get("/ready").unwrap().status, 200);
}

#[test]
fn a_data_directory_that_cannot_be_written_is_named() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    // Below a file: not even root can make a directory there.
    let file = mesh.home.path().join("file");
    fs::write(&file, "").unwrap();
    let below = file.join("data").display().to_string();
    let agent = Agent::new(&mesh.home, "nobody");
    for command in
        [&["init", "--name", "nobody", "--data-dir", &below][..], &["agent", "--data-dir", &below]]
    {
        let ran = agent.run(command);
        assert!(!matches!(ran.code, Some(0) | None), "{ran:#?}");
        assert!(ran.stderr.contains(&below), "{below} is not named: {ran:#?}");
        assert!(!ran.stderr.contains("panicked"), "{ran:#?}");
    }
}

#[test]
fn an_agent_without_identity_says_what_to_do() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    let agent = Agent::new(&mesh.home, "nobody");
    let ran = agent.run(&["agent"]);
    assert!(!matches!(ran.code, Some(0) | None), "{ran:#?}");
    assert!(ran.stderr.contains("init") && ran.stderr.contains("join"), "{ran:#?}");
}

#[test]
fn a_key_that_others_can_read_stops_the_start() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    let agent = Agent::new(&mesh.home, "open");
    let at = agent.mesh.to_string();
    agent.run(&["init", "--name", "open", "--mesh", &at, "--advertise", &at]).ok();
    let key = agent.data_dir.join("node.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let ran = agent.run(&["agent", "--mesh", &at, "--api", &agent.api.to_string()]);
    assert!(!matches!(ran.code, Some(0) | None), "{ran:#?}");
    assert!(ran.stderr.contains("node.key") && ran.stderr.contains("600"), "{ran:#?}");
}

#[test]
fn commands_without_an_agent_exit_with_69_and_bad_usage_with_64() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    let agent = Agent::new(&mesh.home, "nobody");
    let at = agent.mesh.to_string();
    agent.run(&["init", "--name", "nobody", "--mesh", &at, "--advertise", &at]).ok();
    let started = Instant::now();
    let said = agent.run(&["members"]).fails(69);
    assert!(said.contains(&agent.api.to_string()), "names the address: {said}");
    let waited = started.elapsed();
    assert!(waited < within(Duration::from_secs(8)), "waits up to 5 s: {waited:?}");
    agent.run(&["membres"]).fails(64);
    agent.run(&["upstream", "web"]).fails(64);
    agent
        .run(&["join", "no-token-at-all", "--name", "x"])
        .code
        .filter(|code| *code != 0)
        .expect("refused");
}

#[test]
fn two_agents_with_one_key_never_run_together() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("only");
    let only = mesh.agent("only");
    let ran = only.run(&[
        "agent",
        "--mesh",
        &free_address().to_string(),
        "--api",
        &free_address().to_string(),
    ]);
    assert!(!matches!(ran.code, Some(0) | None), "{ran:#?}");
    let directory = only.data_dir.display().to_string();
    assert!(ran.stderr.contains(&directory), "names the directory: {ran:#?}");
    assert_eq!(only.try_get("/ready").unwrap().status, 200);
}

#[test]
fn listings_are_empty_without_error_and_json_is_an_array() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("only");
    let only = mesh.agent("only");
    for command in ["members", "services", "events"] {
        only.run(&[command]).ok();
        let printed = only.run(&[command, "--json"]).ok();
        let value: serde_json::Value = serde_json::from_str(&printed).expect(command);
        assert!(value.is_array(), "{command}: {printed}");
    }
    // A service that nobody offers is a question answered with no, and still an array.
    let printed = only.run(&["endpoints", "nothing", "--json"]);
    assert_eq!((printed.code, printed.stdout.trim()), (Some(1), "[]"), "{printed:#?}");
    only.run(&["status"]).ok();
}

#[test]
fn a_newcomer_is_told_when_nobody_answers() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("first");
    let token = mesh.invite(1);
    mesh.agent("first").kill();
    let newcomer = Agent::new(&mesh.home, "late");
    let started = Instant::now();
    let ran = newcomer.run(&["join", &token, "--name", "late"]);
    assert!(!matches!(ran.code, Some(0) | None), "{ran:#?}");
    assert!(
        ran.stderr.contains(&mesh.agent("first").mesh.to_string()),
        "names the address: {ran:#?}"
    );
    assert!(started.elapsed() < within(Duration::from_secs(20)), "{:?}", started.elapsed());
    // The same command works when the issuer is back.
    mesh.agent("first").start();
    enrol(&newcomer, &token);
    newcomer.start();
    eventually("both see both", SOON, || check(newcomer.members().len() == 2, newcomer.members()));
}
