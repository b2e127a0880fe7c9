//! Instances refuse, agents drain, hang and die, readers stall: what applications see.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::{
    Agent, Kind, Noise, SOON, Server, TestMesh, alone, ask, beside_others, check, eventually,
    expect_echo, p50, raise_file_limit, sized, skip, socks, until, within,
};

/// A caller, and two agents that stand in front of one server each; all instances of `web`.
struct Pair {
    mesh: TestMesh,
    one: Server,
    two: Server,
    entry: SocketAddr,
}

impl Pair {
    /// The caller has connections to both and has called both.
    fn new() -> Self {
        let pair = Self::cold();
        let mut seen = BTreeMap::<String, u64>::new();
        eventually("both instances answer", SOON, || {
            *seen.entry(ask(pair.entry, "warm").map_err(|e| e.to_string())?).or_default() += 1;
            check(seen.len() == 2, &seen)
        });
        pair
    }

    /// The caller knows both and has called neither.
    fn cold() -> Self {
        let mesh = TestMesh::of(&["caller", "one", "two"]);
        let one = Server::start(Kind::Named("one".to_owned()));
        let two = Server::start(Kind::Named("two".to_owned()));
        mesh.agent("one").expose("web", one.address);
        mesh.agent("two").expose("web", two.address);
        let caller = mesh.agent("caller");
        caller.wait_endpoints("web", 2);
        let entry = caller.upstream("web");
        Self { mesh, one, two, entry }
    }

    fn caller(&self) -> &Agent {
        self.mesh.agent("caller")
    }
}

/// One call of a steady load.
#[derive(Clone, Debug)]
pub struct Call {
    /// Since the load began.
    pub started: Duration,
    pub took: Duration,
    pub answer: Result<String, ErrorKind>,
}

impl Call {
    /// Whether it was answered by `name`, and soon enough for a caller that knows whom to avoid.
    pub fn is_well_answered_by(&self, name: &str) -> bool {
        self.answer.as_deref() == Ok(name) && self.took <= within(Duration::from_secs(1))
    }
}

/// A steady load while it goes on.
pub struct Load {
    began: Instant,
    is_over: AtomicBool,
    /// Those that ended, in that order.
    calls: Mutex<Vec<Call>>,
}

impl Load {
    /// Time since the load began.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Lets the load go on for this long.
    pub fn go_on_for(&self, time: Duration) {
        until(Instant::now() + time);
    }

    /// Lets it go on until no call that is `bad` has ended for `calm`.
    #[track_caller]
    pub fn go_on_until_calm(&self, calm: Duration, bad: impl Fn(&Call) -> bool) {
        let asked = self.elapsed();
        eventually(&format!("no bad call for {calm:?}"), SOON, || {
            let calls = self.calls.lock().unwrap();
            let last = calls.iter().rev().find(|call| bad(call));
            let since = last.map_or(asked, |call| asked.max(call.started + call.took));
            check(self.elapsed() >= since + calm, last)
        });
    }

    fn work(&self, worker: usize, entry: SocketAddr) {
        let mut count = 0;
        while !self.is_over.load(Ordering::Relaxed) {
            let started = self.elapsed();
            let answer = ask(entry, &format!("call {worker}-{count}")).map_err(|e| e.kind());
            count += 1;
            let call = Call { started, took: self.elapsed() - started, answer };
            self.calls.lock().unwrap().push(call);
            // About 50 calls a second each: traffic, and time for the agents.
            until(Instant::now() + Duration::from_millis(20));
        }
    }
}

/// One connection after the other, by one worker for each of `entries`, while `during` happens.
/// The calls in the order in which they started.
pub fn load(entries: &[SocketAddr], during: impl FnOnce(&Load)) -> Vec<Call> {
    let (is_over, calls) = (AtomicBool::new(false), Mutex::default());
    let load = Load { began: Instant::now(), is_over, calls };
    std::thread::scope(|scope| {
        for (worker, &entry) in entries.iter().enumerate() {
            let load = &load;
            scope.spawn(move || load.work(worker, entry));
        }
        // Also when `during` panics, or the workers would go on for ever.
        let _end = EndOf(&load);
        during(&load);
    });
    let mut calls = load.calls.into_inner().unwrap();
    calls.sort_by_key(|call| call.started);
    calls
}

struct EndOf<'a>(&'a Load);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

pub fn failed(calls: &[Call]) -> Vec<&Call> {
    calls.iter().filter(|call| call.answer.is_err()).collect()
}

/// What no call may ever end with: a clean end without an answer, or nothing at all.
#[track_caller]
pub fn assert_no_lie_and_no_hang(calls: &[Call]) {
    use ErrorKind::{InvalidData, TimedOut, UnexpectedEof, WouldBlock};
    let bad = |call: &&Call| {
        let kind = call.answer.as_ref().err();
        call.took > within(Duration::from_secs(4))
            || kind.is_some_and(|kind| {
                matches!(kind, UnexpectedEof | InvalidData | WouldBlock | TimedOut)
            })
    };
    let bad: Vec<_> = calls.iter().filter(bad).collect();
    assert!(bad.is_empty(), "{} of {}: {:#?}", bad.len(), calls.len(), &bad[..bad.len().min(5)]);
}

/// That from `moment` on, which is some time before the end, every call was answered well by
/// `name`.
#[track_caller]
pub fn assert_well_answered_by(name: &str, calls: &[Call], moment: Duration) {
    let late: Vec<_> = calls.iter().filter(|call| call.started > moment).collect();
    let bad: Vec<_> = late.iter().filter(|call| !call.is_well_answered_by(name)).collect();
    assert!(bad.is_empty(), "{} of {}: {:#?}", bad.len(), late.len(), &bad[..bad.len().min(5)]);
}

#[test]
fn an_instance_that_refuses_is_not_seen_while_another_lives() {
    let _turn = alone();
    let pair = Pair::new();
    let mut stopped = Duration::ZERO;
    let calls = load(&[pair.entry; 4], |load| {
        load.go_on_for(Duration::from_millis(500));
        pair.one.stop();
        stopped = load.elapsed();
        load.go_on_for(Duration::from_secs(2));
    });
    // Connections open at the moment of the stop were answered or are cut; none of these calls
    // lasts longer than one line, so at most the four workers' calls were in flight.
    let late: Vec<_> = failed(&calls).into_iter().filter(|c| c.started > stopped).collect();
    assert!(late.is_empty(), "{late:#?}");
    assert!(failed(&calls).len() <= 4, "{:#?}", failed(&calls));
    assert!(calls.len() > 100, "{} calls are no traffic", calls.len());
    // The instance that returns is used again.
    pair.one.resume();
    let before = pair.one.accepted();
    eventually("it gets connections again", SOON, || {
        let _ = ask(pair.entry, "again");
        check(pair.one.accepted() > before, "none")
    });
}

#[test]
fn a_killed_agent_resets_the_connections_of_its_own_machine_too() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["caller", "far"]);
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    mesh.agent("far").expose("web", server.local_addr().unwrap());
    drop(server.accept().unwrap()); // the look that expose takes
    mesh.agent("caller").wait_endpoints("web", 1);
    let entry = mesh.agent("caller").upstream("web");
    for victim in ["caller", "far"] {
        let mut client = TcpStream::connect(entry).unwrap();
        client.write_all(b"half an upload").unwrap();
        let (mut served, _) = server.accept().unwrap();
        served.read_exact(&mut [0; 14]).unwrap();
        served.write_all(b"half a download").unwrap();
        client.read_exact(&mut [0; 15]).unwrap();
        mesh.agent(victim).kill();
        for end in [&mut client, &mut served] {
            end.set_read_timeout(Some(SOON)).unwrap();
            let error = end.read(&mut [0; 1]).expect_err("a cut that looks complete");
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{victim} was killed");
        }
        mesh.agent(victim).start();
        mesh.agent("caller").wait_endpoints("web", 1);
    }
}

#[test]
fn with_no_instance_left_a_connection_ends_with_a_reset_at_once() {
    let _turn = alone();
    let pair = Pair::new();
    pair.one.stop();
    pair.two.stop();
    let started = Instant::now();
    let error = ask(pair.entry, "anyone").expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    assert!(started.elapsed() < within(Duration::from_secs(3)), "{:?}", started.elapsed());
    let refusal = |agent: &Agent| agent.metric("murmesh_refused_total", &["door=\"upstream\""]);
    assert!(refusal(pair.caller()) >= 1.0, "{:?}", pair.caller().refusals());
}

#[test]
fn an_agent_that_drains_finishes_what_it_has_and_nobody_sees_an_error() {
    let _turn = alone();
    let pair = Pair::new();
    // A connection that goes on through the drain.
    let mut long = loop {
        let mut stream = TcpStream::connect(pair.entry).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        if talk(&mut stream, "which").unwrap() == "one which\n" {
            break stream;
        }
    };
    let mut told = Duration::ZERO;
    let calls = load(&[pair.entry; 4], |load| {
        load.go_on_for(Duration::from_millis(500));
        let one = pair.mesh.agent("one");
        one.signal(Signal::TERM);
        eventually("one says that it takes no more", SOON, || {
            let status = one.try_get("/ready").map_err(|error| error.to_string())?.status;
            check(status == 503, status)
        });
        told = load.elapsed();
        load.go_on_until_calm(Duration::from_secs(2), |call| call.answer.as_deref() == Ok("one"));
        for number in 0..20 {
            let line = format!("still {number}");
            assert_eq!(talk(&mut long, &line).unwrap(), format!("one {line}\n"));
        }
    });
    assert!(failed(&calls).is_empty(), "{:#?}", failed(&calls));
    assert_well_answered_by("two", &calls, told + within(Duration::from_secs(1)));
    drop(long);
    let status = pair.mesh.agent("one").wait_end(SOON);
    assert_eq!(status.code(), Some(0), "the drain completed");
}

fn talk(stream: &mut TcpStream, line: &str) -> io::Result<String> {
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\n") {
        stream.read_exact(&mut byte)?;
        answer.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn new_connections_avoid_an_agent_within_a_second_of_its_sigkill() {
    let _turn = alone();
    let rounds = sized(2, 20);
    let pair = Pair::new();
    let mut slowest = Duration::ZERO;
    for round in 0..rounds {
        let victim = if round % 2 == 0 { "one" } else { "two" };
        let other = if round % 2 == 0 { "two" } else { "one" };
        let mut killed = Duration::ZERO;
        let calls = load(&[pair.entry; 4], |load| {
            load.go_on_for(Duration::from_millis(500));
            killed = load.elapsed();
            pair.mesh.agent(victim).kill();
            load.go_on_for(Duration::from_secs(1));
            load.go_on_until_calm(Duration::from_secs(2), |call| !call.is_well_answered_by(other));
        });
        assert_no_lie_and_no_hang(&calls);
        assert_well_answered_by(other, &calls, killed + within(Duration::from_secs(1)));
        let last = failed(&calls).last().map_or(killed, |call| call.started);
        slowest = slowest.max(last.saturating_sub(killed));
        let cut = failed(&calls).len();
        eprintln!(
            "round {round}: {cut} of {} calls failed, the last began {:?} after the kill",
            calls.len(),
            last.saturating_sub(killed)
        );
        pair.mesh.agent(victim).start();
        pair.caller().wait_endpoints("web", 2);
    }
}

#[test]
fn new_connections_avoid_an_agent_that_hangs() {
    let _turn = alone();
    let pair = Pair::new();
    let mut stopped = Duration::ZERO;
    let calls = load(&[pair.entry; 4], |load| {
        load.go_on_for(Duration::from_millis(500));
        stopped = load.elapsed();
        pair.mesh.agent("one").signal(Signal::STOP);
        // Three seconds of silence end the connection; from then on nothing fails.
        load.go_on_for(Duration::from_secs(3));
        load.go_on_until_calm(Duration::from_secs(2), |call| call.answer.is_err());
    });
    pair.mesh.agent("one").signal(Signal::CONT);
    assert_no_lie_and_no_hang(&calls);
    let limit = stopped + within(Duration::from_secs(3));
    let late: Vec<_> = failed(&calls).into_iter().filter(|call| call.started > limit).collect();
    assert!(late.is_empty(), "{late:#?}");
    pair.caller().wait_state("one", "alive", SOON);
    pair.caller().wait_endpoints("web", 2);
}

#[test]
fn an_agent_whose_handshake_never_completes_is_not_seen_while_another_lives() {
    let _turn = alone();
    let pair = Pair::cold();
    // Nobody has a data connection to it yet, so whoever picks it waits for a handshake.
    pair.mesh.agent("one").signal(Signal::STOP);
    let calls = load(&[pair.entry; 8], |load| load.go_on_for(Duration::from_secs(4)));
    pair.mesh.agent("one").signal(Signal::CONT);
    let slowest = calls.iter().map(|call| call.took).max().unwrap();
    eprintln!("{} calls, the slowest took {slowest:?}", calls.len());
    assert!(failed(&calls).is_empty(), "{:#?}", failed(&calls));
    assert!(calls.iter().all(|call| call.answer.as_deref() == Ok("two")));
    assert!(slowest < within(Duration::from_secs(1)), "{slowest:?}");
}

#[test]
fn a_stream_whose_far_agent_is_killed_is_reset_and_never_runs_twice() {
    let _turn = alone();
    let (kills, streams_each) = (sized(3, 20), sized(34, 50));
    let mesh = TestMesh::of(&["caller", "one", "two"]);
    let ledgers = [Server::start(Kind::Ledger), Server::start(Kind::Ledger)];
    mesh.agent("one").expose("ledger", ledgers[0].address);
    mesh.agent("two").expose("ledger", ledgers[1].address);
    let caller = mesh.agent("caller");
    let entry = caller.upstream("ledger");
    let (mut resets, mut slowest) = (0, Duration::ZERO);
    for kill in 0..kills {
        caller.wait_endpoints("ledger", 2);
        let victim = kill % 2;
        let before = ledgers[victim].lines().len();
        // Two thirds have bytes at a backend when the agent dies; the rest race with its death.
        let (early, racing) = (streams_each * 2 / 3, streams_each - streams_each * 2 / 3);
        let open = |number: usize| {
            let line = format!("stream {kill}-{number}");
            let stream = TcpStream::connect(entry).unwrap();
            stream.set_nodelay(true).unwrap();
            let sent = (&stream).write_all(format!("{line}\n").as_bytes());
            (line, stream, sent)
        };
        let mut streams: Vec<_> = (0..early).map(open).collect();
        eventually("all early lines are at a backend", SOON, || {
            let arrived = ledgers.iter().flat_map(|ledger| ledger.lines().into_keys());
            let wanted = format!("stream {kill}-");
            let count = arrived.filter(|line| line.starts_with(&wanted)).count();
            check(count == early, count)
        });
        assert!(ledgers[victim].lines().len() > before, "no stream went to the victim");
        let killed = std::thread::scope(|scope| {
            let agent = mesh.agent(["one", "two"][victim]);
            let killer = scope.spawn(move || {
                let killed = Instant::now();
                agent.kill();
                killed
            });
            streams.extend((early..early + racing).map(open));
            killer.join().unwrap()
        });
        for (line, mut stream, sent) in streams {
            let was_at_victim = ledgers[victim].lines().contains_key(&line);
            // The backend answers nothing and holds on, so whatever ends now was ended by a death.
            let limit = within(Duration::from_secs(3));
            let left = limit.saturating_sub(killed.elapsed());
            let patience = if was_at_victim {
                left + Duration::from_millis(500)
            } else {
                Duration::from_millis(1)
            };
            stream.set_read_timeout(Some(patience)).unwrap();
            // One write or one read is told of the reset, not both.
            match sent.and_then(|()| stream.read(&mut [0; 64])) {
                Ok(0) => panic!("{line}: a cut stream ended as if complete"),
                Ok(read) => panic!("{line}: {read} bytes that nobody sent"),
                Err(error) if is_reset(&error) => {
                    resets += 1;
                    slowest = slowest.max(killed.elapsed());
                }
                Err(error) => {
                    assert!(
                        !was_at_victim,
                        "{line}: no reset within {limit:?} of the kill: {error}"
                    )
                }
            }
        }
        let dead = mesh.agent(["one", "two"][victim]);
        dead.start();
    }
    let mut counts = BTreeMap::<String, u64>::new();
    for ledger in &ledgers {
        for (line, count) in ledger.lines() {
            *counts.entry(line).or_default() += count;
        }
    }
    let twice: Vec<_> = counts.iter().filter(|(_, count)| **count > 1).collect();
    assert!(twice.is_empty(), "bytes ran twice: {twice:?}");
    eprintln!(
        "{kills} kills, {} streams: {resets} resets within {slowest:?}, {} at a backend, none twice",
        kills * streams_each,
        counts.len()
    );
}

/// The second signal does not wait, and lies as little as the first.
#[test]
fn a_second_signal_ends_an_agent_at_once_and_resets_what_is_open() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["caller", "far"]);
    let (caller, far) = (mesh.agent("caller"), mesh.agent("far"));
    let echo = Server::start(Kind::Echo);
    far.expose("echo", echo.address);
    for victim in [caller, far] {
        caller.wait_endpoints("echo", 1);
        let entry = caller.upstream("echo");
        let mut stream = TcpStream::connect(entry).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        expect_echo(&mut stream, b"still open").unwrap();
        victim.signal(Signal::TERM);
        eventually("it drains", SOON, || {
            let ready = victim.try_get("/ready").map_err(|error| error.to_string())?;
            check(ready.text().contains("draining"), ready.text())
        });
        victim.signal(Signal::INT);
        let ended = stream.read(&mut [0; 64]).unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::ConnectionReset, "at {}", victim.name);
        assert_eq!(victim.wait_end(SOON).code(), Some(1), "{} was cut", victim.name);
        assert!(victim.log().contains("stopped at once"), "{}", victim.log());
        victim.start();
    }
}

/// As a write meets it, or a read.
fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

#[test]
fn a_transfer_cut_in_the_middle_is_an_exact_prefix_and_a_reset() {
    let _turn = alone();
    let mesh = TestMesh::of(&["caller", "far"]);
    let source = Server::start(Kind::Source { seed: 3, len: 1 << 32 });
    mesh.agent("far").expose("source", source.address);
    let caller = mesh.agent("caller");
    caller.wait_endpoints("source", 1);
    let mut stream = TcpStream::connect(caller.upstream("source")).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let (mut noise, mut expected, mut buffer) =
        (Noise::new(3, 1 << 32), vec![0; 64 * 1024], vec![0; 64 * 1024]);
    let (mut total, mut killed) = (0_u64, None);
    loop {
        // Exactly as many bytes as were read, so that noise and stream stay in step.
        match read_some(&mut stream, &mut buffer) {
            Ok(0) => panic!("a cut transfer ended as if complete, after {total} bytes"),
            Ok(read) => {
                assert_eq!(noise.fill(&mut expected[..read]), read);
                assert!(expected[..read] == buffer[..read], "wrong bytes near {total}");
                total += read as u64;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset, "after {total} bytes");
                break;
            }
        }
        if killed.is_none() && total > 4 << 20 {
            killed = Some(Instant::now());
            mesh.agent("far").kill();
        }
    }
    let took = killed.expect("killed in the middle").elapsed();
    assert!(took < within(Duration::from_secs(3)), "{took:?}");
    eprintln!("reset {took:?} after the kill, {total} bytes exact");
}

/// Reads a multiple of eight bytes unless the stream ends.
fn read_some(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = stream.read(buffer)?;
    while filled % 8 != 0 {
        match stream.read(&mut buffer[filled..filled + 8 - filled % 8])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

#[test]
fn stalled_readers_delay_no_neighbour_and_cost_bounded_memory() {
    let _turn = alone();
    let crowd: &[usize] = sized(&[1, 5, 50][..], &[1, 5, 50, 500][..]);
    if !raise_file_limit(3_000) {
        skip("the limit of open files is below 3,000");
        return;
    }
    // A pair of agents that carries nothing else, in the same moments: what the machine does to a
    // round trip just now happens to both.
    let mesh = TestMesh::of(&["caller", "far", "quiet-caller", "quiet-far"]);
    let echo = Server::start(Kind::Echo);
    // More than every buffer on the way: whoever does not read stops the source.
    let source = Server::start(Kind::Source { seed: 4, len: 1 << 30 });
    let (caller, far) = (mesh.agent("caller"), mesh.agent("far"));
    far.expose("echo", echo.address);
    far.expose("source", source.address);
    mesh.agent("quiet-far").expose("quiet", echo.address);
    caller.wait_endpoints("echo", 1);
    caller.wait_endpoints("source", 1);
    mesh.agent("quiet-caller").wait_endpoints("quiet", 1);
    let (entry, tap) = (caller.upstream("echo"), caller.upstream("source"));
    let mut quiet = TcpStream::connect(mesh.agent("quiet-caller").upstream("quiet")).unwrap();
    let mut neighbour = TcpStream::connect(entry).unwrap();
    let (beside, alone) = both(&mut neighbour, &mut quiet);
    eprintln!("nobody stalled: p50 {beside:?}, {alone:?} at the quiet pair");
    let before = (caller.memory(), far.memory());
    let mut stalled = Vec::new();
    for &count in crowd {
        while stalled.len() < count {
            let mut stream = TcpStream::connect(tap).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream.read_exact(&mut [0; 1]).unwrap(); // it flows, and then nobody reads
            stalled.push(stream);
        }
        wait_until_still(far);
        let (beside, alone) = both(&mut neighbour, &mut quiet);
        let open = |_| {
            let started = Instant::now();
            let mut fresh = TcpStream::connect(entry).unwrap();
            expect_echo(&mut fresh, b"a new connection").unwrap();
            started.elapsed()
        };
        let opened = (0..3).map(open).min().unwrap();
        let grown = [(caller, before.0), (far, before.1)]
            .map(|(agent, before)| agent.memory().saturating_sub(before) >> 20);
        eprintln!(
            "{count} stalled: p50 {beside:?}, {alone:?} at the quiet pair, a new connection in {opened:?}, memory +{grown:?} MiB"
        );
        let limit = within(alone.mul_f64(1.5));
        assert!(beside <= limit, "{count} stalled: p50 {beside:?} beside {alone:?}");
        assert!(opened < within(Duration::from_millis(100)), "{count} stalled: {opened:?} to open");
        assert!(grown.iter().all(|mib| *mib <= 256), "{count} stalled: +{grown:?} MiB");
    }
    // Those that read again get every byte in order.
    let mut late = stalled.swap_remove(0);
    let mut noise = Noise::new(4, 1 << 30);
    let mut first = [0; 8];
    noise.fill(&mut first);
    let mut rest = [0; 7];
    late.read_exact(&mut rest).unwrap();
    assert_eq!(rest, first[1..]);
    let mut mesh_still_works = socks(caller.socks, "echo.mesh", 1).unwrap();
    expect_echo(&mut mesh_still_works, b"after the stall").unwrap();
}

/// Median round trips of two streams, measured in turns.
fn both(one: &mut TcpStream, other: &mut TcpStream) -> (Duration, Duration) {
    let mut medians = [Vec::new(), Vec::new()];
    for _ in 0..21 {
        for (stream, medians) in [&mut *one, &mut *other].into_iter().zip(&mut medians) {
            medians.push(p50(stream, 100).unwrap());
        }
    }
    let [one, other] = medians.map(|mut medians| {
        medians.sort();
        medians[medians.len() / 2]
    });
    (one, other)
}

/// Waits until an agent carries no more bytes: every window is full.
fn wait_until_still(agent: &Agent) {
    let mut last = (-1.0, Instant::now());
    eventually("all windows are full", SOON, || {
        let carried = agent.metric("murmesh_bytes_total", &["service=\"source\""]);
        if carried > last.0 {
            last = (carried, Instant::now());
        }
        check(last.1.elapsed() > Duration::from_millis(300), carried)
    });
}
