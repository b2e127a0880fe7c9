//! Real clients reach real servers behind another agent: by a port, a socket file and SOCKS5.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::support::{
    Kind, Noise, OPENING_MAX, Program, Ran, SOON, Server, TestMesh, alone, beside_others, check,
    digest, eventually, expect_echo, find, free_port, raise_file_limit, run_program, runtime,
    sized, skip, socks, socks_relay,
};

const LONG: Duration = Duration::from_secs(120);

/// Three agents: calls go from `near` to `far`; `other` only makes it a mesh.
fn mesh() -> TestMesh {
    TestMesh::of(&["near", "far", "other"])
}

fn program(name: &str) -> Option<PathBuf> {
    let found = find(name);
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

#[track_caller]
fn run(program: &Path, arguments: &[&str], input: &[u8]) -> Ran {
    run_program(Command::new(program).args(arguments), input, LONG)
}

#[test]
fn curl_reaches_a_web_server_by_port_socket_file_and_socks() {
    let _turn = beside_others();
    let Some(curl) = program("curl") else { return };
    let mesh = mesh();
    let web = Server::start(Kind::Web("hello from far\n".to_owned()));
    mesh.agent("far").expose("web", web.address);
    let near = mesh.agent("near");
    near.wait_endpoints("web", 1);
    let (port, file) = (near.upstream("web"), mesh.home.path().join("web.sock"));
    near.run(&["upstream", "web", &format!("unix:{}", file.display())]).ok();
    let (url, socks) = (format!("http://{port}/"), near.socks.to_string());
    let file = file.display().to_string();
    let ways: [&[&str]; 4] = [
        &["-sSf", "--noproxy", "*", &url],
        &["-sSf", "--noproxy", "*", "--unix-socket", &file, "http://web.mesh/"],
        &["-sSf", "--socks5-hostname", &socks, "http://web.mesh/"],
        &["-sSf", "--proxy", &format!("socks5h://{socks}"), "http://web.mesh:5432/"],
    ];
    for way in ways {
        assert_eq!(run(&curl, way, b"").ok(), "hello from far\n", "{way:?}");
    }
    // Every connection went through the mesh and is counted on both sides.
    for (agent, direction) in [("near", "outbound"), ("far", "inbound")] {
        let labels = [format!("direction=\"{direction}\""), "service=\"web\"".to_owned()];
        eventually("four connections are counted", SOON, || {
            let counted = mesh
                .agent(agent)
                .metric("murmesh_requests_total", &[&labels[0], &labels[1], "success"]);
            check(counted >= 4.0, format!("{agent} {direction}: {counted}"))
        });
    }
}

#[test]
fn redis_cli_reaches_redis_by_port_socket_file_and_socks() {
    let _turn = beside_others();
    let (Some(server), Some(client)) = (program("redis-server"), program("redis-cli")) else {
        return;
    };
    let mesh = mesh();
    let (port, file) = (free_port(), mesh.home.path().join("redis-server.sock"));
    let mut command = Command::new(server);
    command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]);
    command.arg(port.to_string()).arg("--unixsocket").arg(&file);
    command.arg("--dir").arg(mesh.home.path());
    let _redis = Program::start(&mut command);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    eventually("redis listens", SOON, || {
        let listens = TcpStream::connect(address).is_ok() && UnixStream::connect(&file).is_ok();
        check(listens, "it does not")
    });
    // The same server twice: by its port and by its socket file.
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    far.expose("redis", address);
    far.expose("redis-by-file", format!("unix:{}", file.display()));
    near.wait_endpoints("redis", 1);
    near.wait_endpoints("redis-by-file", 1);
    let entry = near.upstream("redis").port().to_string();
    let by_file = near.upstream("redis-by-file").port().to_string();
    let local = mesh.home.path().join("redis.sock").display().to_string();
    near.run(&["upstream", "redis", &format!("unix:{local}")]).ok();
    let (relay, _guard) = socks_relay(near.socks, "redis.mesh");
    let relay = relay.port().to_string();
    let ways: [&[&str]; 4] = [&["-p", &entry], &["-p", &by_file], &["-s", &local], &["-p", &relay]];
    for (index, way) in ways.iter().enumerate() {
        let index = index.to_string();
        let set = [way, &["SET", "key", &index][..]].concat();
        assert_eq!(run(&client, &set, b"").ok().trim(), "OK", "{way:?}");
        let get = [way, &["GET", "key"][..]].concat();
        assert_eq!(run(&client, &get, b"").ok().trim(), index, "{way:?}");
    }
    // Pipelined and parallel, with answers as long as the tunnel's windows.
    let load = "for i=1,20000 do redis.call('rpush', 'list', string.rep('x', 100)) end return 1";
    run(&client, &["-p", &entry, "EVAL", load, "0"], b"").ok();
    let list = run(&client, &["-p", &entry, "LRANGE", "list", "0", "-1"], b"").ok();
    assert_eq!(list.lines().count(), 20_000);
    assert!(list.lines().all(|line| line.len() == 100 && line.bytes().all(|byte| byte == b'x')));
}

/// A PostgreSQL of this test's own.
struct Postgres {
    address: SocketAddr,
    file_directory: PathBuf,
    _server: Program,
}

impl Postgres {
    fn start(home: &Path) -> Option<Self> {
        let (Some(initdb), Some(postgres)) = (program("initdb"), program("postgres")) else {
            return None;
        };
        let directory = home.join("postgres");
        fs::create_dir(&directory).unwrap();
        let is_root = rustix::process::geteuid().is_root();
        let mut wrapper = Vec::new();
        if is_root {
            // PostgreSQL refuses to run as root.
            let setpriv = program("setpriv")?;
            let own = Command::new("chown").arg("postgres").arg(&directory).status().unwrap();
            let open = Command::new("chmod").args(["755"]).arg(home).status().unwrap();
            assert!(own.success() && open.success(), "a directory for the user postgres");
            wrapper = vec![setpriv.display().to_string()];
            wrapper.extend(
                ["--reuid=postgres", "--regid=postgres", "--init-groups"].map(str::to_owned),
            );
        }
        let command = |program: &Path| {
            let mut words = wrapper.iter().map(Into::into).collect::<Vec<std::ffi::OsString>>();
            words.push(program.into());
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]).current_dir(&directory).env("LC_ALL", "C");
            command
        };
        let data = directory.join("data");
        let mut init = command(&initdb);
        init.args(["-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "-D"]).arg(&data);
        run_program(&mut init, b"", LONG).ok();
        let port = free_port();
        let mut server = command(&postgres);
        server.arg("-D").arg(&data).arg("-k").arg(&directory);
        server.args(["-p", &port.to_string(), "-c", "fsync=off", "-c", "max_connections=60"]);
        server.args(["-c", "listen_addresses=127.0.0.1"]);
        let server = Program::start(&mut server);
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let psql = program("psql")?;
        eventually("postgres answers", SOON, || {
            let answer = query(&psql, "127.0.0.1", port, "select 1");
            check(answer.code == Some(0), answer)
        });
        Some(Self { address, file_directory: directory, _server: server })
    }

    fn file(&self) -> PathBuf {
        self.file_directory.join(format!(".s.PGSQL.{}", self.address.port()))
    }
}

fn query(psql: &Path, host: &str, port: u16, sql: &str) -> Ran {
    let port = port.to_string();
    let arguments = ["-h", host, "-p", &port, "-U", "postgres", "-X", "-A", "-t", "-c", sql];
    run(psql, &arguments, b"")
}

#[test]
fn psql_and_pgbench_reach_postgres_by_port_socket_file_and_socks() {
    let _turn = beside_others();
    let (Some(psql), Some(pgbench)) = (program("psql"), program("pgbench")) else { return };
    let mesh = mesh();
    let Some(postgres) = Postgres::start(mesh.home.path()) else { return };
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    far.expose("db", postgres.address);
    far.expose("db-by-file", format!("unix:{}", postgres.file().display()));
    near.wait_endpoints("db", 1);
    near.wait_endpoints("db-by-file", 1);
    let (entry, by_file) = (near.upstream("db").port(), near.upstream("db-by-file").port());
    let directory = mesh.home.path().join("sockets");
    fs::create_dir(&directory).unwrap();
    let file = directory.join(".s.PGSQL.5432");
    near.run(&["upstream", "db", &format!("unix:{}", file.display())]).ok();
    let (relay, _guard) = socks_relay(near.socks, "db.mesh");
    let directory = directory.display().to_string();
    let loopback = "127.0.0.1";
    let ways = [
        (loopback, entry),
        (loopback, by_file),
        (directory.as_str(), 5432),
        (loopback, relay.port()),
    ];
    for (host, port) in ways {
        let answer = query(&psql, host, port, "select 6 * 7, md5(repeat('x', 3000000))");
        assert_eq!(answer.ok().trim(), "42|8e32e22642bddc89698e25a4e9bf528b", "{host} {port}");
    }
    let (entry, clients) = (entry.to_string(), sized("8", "32"));
    let bench = |arguments: &[&str]| {
        let common = ["-h", loopback, "-p", &entry, "-U", "postgres"];
        run(&pgbench, &[&common[..], arguments, &["postgres"]].concat(), b"")
    };
    let made = bench(&["-i", "-s", "1"]);
    assert_eq!(made.code, Some(0), "{made:#?}");
    let told = bench(&["-c", clients, "-j", "2", "-t", sized("50", "1000")]).ok();
    assert!(told.contains("number of failed transactions: 0"), "{told}");
    // A new connection for every transaction.
    let told = bench(&["-C", "-S", "-c", "4", "-t", sized("25", "500")]).ok();
    assert!(told.contains("number of failed transactions: 0"), "{told}");
}

#[test]
fn bytes_of_a_long_transfer_arrive_as_they_left_each_way() {
    let _turn = alone();
    let len: u64 = sized(64 << 20, 1 << 30);
    let mesh = mesh();
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let (sink, source) = (Server::start(Kind::Sink), Server::start(Kind::Source { seed: 2, len }));
    far.expose("sink", sink.address);
    far.expose("source", source.address);
    near.wait_endpoints("sink", 1);
    near.wait_endpoints("source", 1);
    let (sink, source) = (near.upstream("sink"), near.upstream("source"));

    // Up: the sink answers only after it has seen our end, so the answer proves the half-close too.
    let started = Instant::now();
    let mut stream = TcpStream::connect(sink).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let (mut noise, mut buffer) = (Noise::new(1, len), vec![0; 256 * 1024]);
    loop {
        let filled = noise.fill(&mut buffer);
        if filled == 0 {
            break;
        }
        stream.write_all(&buffer[..filled]).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let up = started.elapsed();
    assert_eq!(answer, digest(1, len), "SHA-256 of what the far server read");

    let started = Instant::now();
    let mut stream = TcpStream::connect(source).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let mut total = 0;
    loop {
        let read = stream.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        total += read as u64;
        context.update(&buffer[..read]);
    }
    let down = started.elapsed();
    assert_eq!(total, len);
    assert_eq!(context.finish().as_ref(), digest(2, len), "SHA-256 of what came back");
    eprintln!("{} MiB up in {up:?}, down in {down:?}", len >> 20);
}

#[test]
fn a_half_close_is_seen_by_the_other_side_and_the_way_back_stays_open() {
    let _turn = beside_others();
    let mesh = mesh();
    let echo = Server::start(Kind::Echo);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    far.expose("echo", echo.address);
    near.wait_endpoints("echo", 1);
    let entry = near.upstream("echo");
    let file = mesh.home.path().join("echo.sock");
    near.run(&["upstream", "echo", &format!("unix:{}", file.display())]).ok();
    // The echo ends only when it has seen our end, and all it was sent comes back before its own.
    let message = vec![b'm'; 300_000];
    for round in 0..20 {
        let (back, sent) = match round % 3 {
            0 => echoed(TcpStream::connect(entry).unwrap(), &message),
            1 => echoed(socks(near.socks, "echo.mesh", 80).unwrap(), &message),
            _ => echoed(UnixStream::connect(&file).unwrap(), &message),
        };
        sent.unwrap_or_else(|error| panic!("round {round}: sending: {error}"));
        assert!(back == message, "round {round}: {} of {} bytes", back.len(), message.len());
    }
    // A client that ends at once, with nothing said, sees the far side's end and no reset.
    let mut stream = TcpStream::connect(entry).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 0);
}

/// Writes a message and its end while reading all that comes back; and how the writing went.
fn echoed(stream: impl Into<socket2::Socket>, message: &[u8]) -> (Vec<u8>, std::io::Result<()>) {
    let stream: socket2::Socket = stream.into();
    stream.set_read_timeout(Some(SOON)).unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            (&stream).write_all(message)?;
            stream.shutdown(Shutdown::Write)
        });
        let mut back = Vec::new();
        (&stream).read_to_end(&mut back).unwrap();
        (back, writer.join().unwrap())
    })
}

#[test]
fn a_reset_is_carried_as_a_reset_both_ways() {
    let _turn = beside_others();
    let mesh = mesh();
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let (ledger, cutter) = (Server::start(Kind::Ledger), Server::start(Kind::Cutter));
    far.expose("ledger", ledger.address);
    far.expose("cutter", cutter.address);
    near.wait_endpoints("ledger", 1);
    near.wait_endpoints("cutter", 1);

    let mut client = TcpStream::connect(near.upstream("cutter")).unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.write_all(b"the server dies after this line\n").unwrap();
    let end = client.read(&mut [0; 16]).map_err(|error| error.kind());
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset), "a cut is no end");

    let entry = near.upstream("ledger");
    for (end, resets) in [("an end", 0), ("a reset", 1)] {
        let mut client = TcpStream::connect(entry).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        client.write_all(format!("{end} follows\n").as_bytes()).unwrap();
        eventually("the server has the line", SOON, || {
            check(ledger.lines().contains_key(&format!("{end} follows")), ledger.lines())
        });
        if resets == 0 {
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(client.read(&mut [0; 16]).unwrap(), 0, "the server ends as well");
            assert_eq!(ledger.resets(), 0, "an end is no cut");
        } else {
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            drop(client);
            eventually("the server sees a reset", SOON, || check(ledger.resets() == 1, "none"));
        }
    }
}

#[test]
fn five_thousand_connections_at_once_all_echo_their_bytes() {
    let _turn = alone();
    let wanted: usize = 5_000;
    // Both ends of each connection are in this process.
    if !raise_file_limit(2 * wanted as u64 + 500) {
        skip("the limit of open files is too low for 5,000 connections (ulimit -Hn)");
        return;
    }
    let mesh = mesh();
    let echo = Server::start(Kind::Echo);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    far.expose("echo", echo.address);
    near.wait_endpoints("echo", 1);
    let entry = near.upstream("echo");
    let before = (near.memory(), far.memory());
    let started = Instant::now();
    let (failures, opened, peak, took) = runtime().block_on(async {
        let (open, all_open) = tokio::sync::watch::channel(false);
        let (ready, mut readies) = tokio::sync::mpsc::channel(wanted);
        let opening = Arc::new(Semaphore::new(OPENING_MAX));
        let mut crowd = JoinSet::new();
        for number in 0..wanted {
            let (mut all_open, ready) = (all_open.clone(), ready.clone());
            let opening = Arc::clone(&opening);
            crowd.spawn(async move {
                let place = opening.acquire().await;
                let mut stream = tokio::net::TcpStream::connect(entry).await?;
                echo_once(&mut stream, number as u64).await?;
                drop(place);
                let _ = ready.send(()).await;
                // All are open at the same time before any may end.
                let _ = all_open.wait_for(|open| *open).await;
                echo_once(&mut stream, number as u64 + 1_000_000).await?;
                stream.shutdown().await?;
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest).await?;
                assert!(rest.is_empty());
                Ok::<(), std::io::Error>(())
            });
        }
        drop(ready);
        // Until all have been echoed once, or those that are missing have failed.
        let (mut opened, mut failures) = (0, Vec::new());
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        while opened + failures.len() < wanted {
            tokio::select! {
                Some(()) = readies.recv() => opened += 1,
                Some(ended) = crowd.join_next() => failures.extend(ended.unwrap().err()),
                () = tokio::time::sleep_until(deadline) => break,
            }
        }
        let took = started.elapsed();
        let peak = (near.memory(), far.memory());
        let _ = open.send(true);
        while let Some(ended) = crowd.join_next().await {
            failures.extend(ended.unwrap().err());
        }
        (failures, opened, peak, took)
    });
    let mib = |after: u64, before: u64| after.saturating_sub(before) >> 20;
    eprintln!(
        "{opened} open at once after {took:?}; memory grew by {} and {} MiB",
        mib(peak.0, before.0),
        mib(peak.1, before.1),
    );
    assert_eq!(failures.len(), 0, "{} of {wanted}, first: {:?}", failures.len(), failures.first());
    assert_eq!(opened, wanted);
}

async fn echo_once(stream: &mut tokio::net::TcpStream, number: u64) -> std::io::Result<()> {
    let message = [number.to_le_bytes(); 8].concat();
    stream.write_all(&message).await?;
    let mut back = vec![0; message.len()];
    tokio::time::timeout(Duration::from_secs(60), stream.read_exact(&mut back)).await??;
    assert!(back == message, "connection {number} got other bytes");
    Ok(())
}

#[test]
fn an_agents_own_instances_are_reached_like_any_other() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("only");
    let only = mesh.agent("only");
    let named = Server::start(Kind::Named("own".to_owned()));
    only.expose("own", named.address);
    let entry = only.upstream("own");
    only.wait_endpoints("own", 1);
    assert_eq!(crate::support::ask(entry, "who").unwrap(), "own");
    let mut stream = socks(only.socks, "own.mesh", 9).unwrap();
    stream.write_all(b"me\n").unwrap();
    let mut answer = [0; 7];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"own me\n");
}

#[test]
fn an_unknown_name_and_a_foreign_address_are_refused_and_counted() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("only");
    let only = mesh.agent("only");
    let open = Server::start(Kind::Echo);
    for host in ["nothing.mesh", "example.com", "localhost", "127.0.0.1"] {
        let before = only.metric("murmesh_refused_total", &["door=\"socks\""]);
        socks(only.socks, host, open.address.port()).expect_err(host);
        eventually(&format!("the refusal of {host} is counted"), SOON, || {
            let counted = only.metric("murmesh_refused_total", &["door=\"socks\""]);
            check(counted > before, only.refusals())
        });
    }
    assert_eq!(open.accepted(), 0, "SOCKS5 went outside the mesh");
}

#[test]
fn what_was_exposed_and_opened_survives_a_restart_and_can_be_taken_back() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let echo = Server::start(Kind::Echo);
    far.expose("echo", echo.address);
    let entry = near.upstream("echo");
    near.wait_endpoints("echo", 1);
    let at = entry.to_string();
    near.run(&["upstream", "echo", &at, "--balance", "round_robin"]).ok();
    let is_changed = || near.run(&["upstream", "--json"]).ok().contains("round_robin");
    assert!(is_changed(), "an open entry is as it was said last");
    for agent in [near, far] {
        agent.stop();
        agent.start();
    }
    near.wait_endpoints("echo", 1);
    assert!(is_changed());
    let mut stream = TcpStream::connect(entry).unwrap();
    expect_echo(&mut stream, b"after both restarts").unwrap();
    drop(stream);
    far.run(&["unexpose", "echo"]).ok();
    near.wait_endpoints("echo", 0);
    near.run(&["upstream", "echo", &entry.to_string(), "--off"]).ok();
    eventually("the entry is closed", SOON, || {
        check(TcpStream::connect(entry).is_err(), "it accepts")
    });
}
