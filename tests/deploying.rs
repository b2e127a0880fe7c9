//! Deploys and deaths under a steady load: what callers see of them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval_at, timeout};

use crate::http::instance::Instance;
use crate::support::{
    Agent, SOON, TestMesh, alone, beside_others, calmly, check, eventually, runtime, sized, until,
    within,
};

/// The agents in front of instances; callers enter through `gate`, which is none of them.
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
/// Clients of the load, each with a connection that it keeps.
const CLIENTS: u32 = 25;
/// Each so many of its requests a client begins a new connection.
const REQUESTS_EACH: usize = 20;
/// No call waits longer: a hang is a failure with a name.
const PATIENCE: Duration = Duration::from_secs(10);

/// Six agents, and an instance of `web` behind five of them.
struct Stage {
    mesh: TestMesh,
    instances: Vec<Instance>,
    entry: SocketAddr,
}

impl Stage {
    /// Each instance is exposed with these arguments beside its own.
    fn new(arguments: &[&str]) -> Self {
        let mesh = TestMesh::of(&["gate", "a", "b", "c", "d", "e"]);
        let instances: Vec<_> = NAMES.iter().map(|name| Instance::start(name)).collect();
        for (name, instance) in NAMES.iter().zip(&instances) {
            let to = instance.address.to_string();
            let own = ["expose", "web", &to, "--protocol", "http"];
            mesh.agent(name).run(&[&own, arguments].concat()).ok();
        }
        mesh.agent("gate").wait_endpoints("web", NAMES.len());
        let entry = mesh.agent("gate").upstream("web");
        Self { mesh, instances, entry }
    }

    fn gate(&self) -> &Agent {
        self.mesh.agent("gate")
    }

    fn requests(&self) -> Vec<u64> {
        self.instances.iter().map(|instance| instance.seen.requests()).collect()
    }

    /// Waits until every instance serves.
    fn wait_all_serve(&self) {
        let before = self.requests();
        eventually("every instance is called", SOON, || {
            let served: Vec<_> =
                self.requests().iter().zip(&before).map(|(now, before)| now - before).collect();
            check(served.iter().all(|served| *served > 10), served)
        });
    }
}

/// One request of the load.
#[derive(Clone, Debug)]
struct Call {
    /// Since the load began.
    started: Duration,
    took: Duration,
    /// Who answered, or what went wrong.
    answer: Result<String, String>,
}

/// Requests at a steady rate, whatever becomes of them, until it is ended.
struct Load {
    began: Instant,
    is_over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<Call>>>,
}

impl Load {
    /// `rate` requests a second of this method.
    fn begin(entry: SocketAddr, method: &'static str, rate: u32) -> Self {
        let is_over = Arc::<AtomicBool>::default();
        let began = Instant::now();
        let period = Duration::from_secs(1) * CLIENTS / rate;
        let clients = (0..CLIENTS).map(|number| {
            let (is_over, first) = (Arc::clone(&is_over), began + period * number / CLIENTS);
            runtime().spawn(async move {
                let (mut ticks, mut calls) = (interval_at(first, period), Vec::new());
                let mut connection = None;
                while !is_over.load(Ordering::Relaxed) {
                    ticks.tick().await;
                    if calls.len().is_multiple_of(REQUESTS_EACH) {
                        connection = None;
                    }
                    let started = Instant::now();
                    let asked = timeout(PATIENCE, ask(entry, method, &mut connection)).await;
                    let answer = asked.unwrap_or_else(|_| Err("no answer".to_owned()));
                    if answer.is_err() {
                        connection = None;
                    }
                    let took = started.elapsed();
                    calls.push(Call { started: started - began, took, answer });
                }
                calls
            })
        });
        let clients = clients.collect();
        Self { began, is_over, clients }
    }

    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// All calls, in the order in which they began.
    fn end(mut self) -> Vec<Call> {
        self.is_over.store(true, Ordering::Relaxed);
        let clients = std::mem::take(&mut self.clients);
        let calls = clients.into_iter().map(|client| runtime().block_on(client).unwrap());
        let mut calls: Vec<_> = calls.flatten().collect();
        calls.sort_by_key(|call| call.started);
        calls
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.clients.iter().for_each(JoinHandle::abort);
    }
}

type Connection = BufReader<TcpStream>;

/// One request and its whole answer, on the connection that is there or on a new one.
async fn ask(
    entry: SocketAddr,
    method: &str,
    connection: &mut Option<Connection>,
) -> Result<String, String> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream = TcpStream::connect(entry).await.map_err(|e| format!("connect: {e}"))?;
            stream.set_nodelay(true).map_err(|e| e.to_string())?;
            connection.insert(BufReader::new(stream))
        }
    };
    let (body, len) = if method == "POST" { ("pay", "content-length: 3\r\n") } else { ("", "") };
    let request = format!("{method} / HTTP/1.1\r\nhost: web\r\n{len}\r\n{body}");
    stream.get_mut().write_all(request.as_bytes()).await.map_err(|e| format!("write: {e}"))?;
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let read = stream.read_line(&mut head).await.map_err(|e| format!("read: {e}"))?;
        if read == 0 {
            return Err(format!("an end after {head:?}"));
        }
    }
    let len = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let len = len.and_then(|len| len.parse().ok()).ok_or_else(|| format!("no length: {head}"))?;
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.map_err(|e| format!("body: {e}"))?;
    let body = String::from_utf8_lossy(&body).into_owned();
    match head.starts_with("HTTP/1.1 200 ") {
        true => Ok(body),
        false => Err(format!("{}: {body}", head.lines().next().unwrap_or_default())),
    }
}

/// Streams of events, one after the other on four connections; each lasts so many events of 20 ms.
struct Streams {
    is_over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Result<usize, String>>>,
}

impl Streams {
    fn begin(entry: SocketAddr, events: usize) -> Self {
        let is_over = Arc::<AtomicBool>::default();
        let clients = (0..4).map(|_| {
            let is_over = Arc::clone(&is_over);
            runtime().spawn(async move {
                let mut whole = 0;
                while !is_over.load(Ordering::Relaxed) {
                    let streamed = timeout(2 * SOON, stream(entry, events)).await;
                    streamed.map_err(|_| "it hangs".to_owned())??;
                    whole += 1;
                }
                Ok(whole)
            })
        });
        let clients = clients.collect();
        Self { clients, is_over }
    }

    /// How many were whole. Fails on the first that was not.
    #[track_caller]
    fn end(self) -> usize {
        self.is_over.store(true, Ordering::Relaxed);
        let clients = self.clients.into_iter();
        clients.map(|client| runtime().block_on(client).unwrap().unwrap()).sum()
    }
}

async fn stream(entry: SocketAddr, events: usize) -> Result<(), String> {
    let mut stream = TcpStream::connect(entry).await.map_err(|e| format!("connect: {e}"))?;
    let request =
        format!("GET /events?{events} HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.map_err(|e| format!("write: {e}"))?;
    let mut text = String::new();
    let read = stream.read_to_string(&mut text).await;
    let whole = text.matches("data: ").count() == events && text.ends_with("\r\n0\r\n\r\n");
    match read {
        Ok(_) if whole => Ok(()),
        end => Err(format!("{end:?} after {} events", text.matches("data: ").count())),
    }
}

fn failed(calls: &[Call]) -> Vec<&Call> {
    calls.iter().filter(|call| call.answer.is_err()).collect()
}

/// That nothing of all this failed, and that it was as much as it was to be.
#[track_caller]
fn assert_none_failed(what: &str, calls: &[Call], rate: u32, lasted: Duration) {
    let failed = failed(calls);
    let slowest = calls.iter().map(|call| call.took).max().unwrap_or_default();
    eprintln!("{what}: {} of {} failed, slowest {slowest:?}", failed.len(), calls.len());
    assert!(failed.is_empty(), "{:#?}", &failed[..failed.len().min(8)]);
    let offered = f64::from(rate) * lasted.as_secs_f64();
    assert!(calls.len() as f64 > 0.8 * offered, "{} of {offered:.0} offered", calls.len());
}

/// Requests a second. The promise speaks of 500: `.ci/run --long` makes them, with agents of the release
/// build (`MURMESH_LONG=1 cargo test --release`).
fn rate() -> u32 {
    sized(200, 500)
}

#[test]
fn every_instance_is_restarted_one_after_the_other_and_nobody_notices() {
    let _turn = alone();
    let mut stage = Stage::new(&["--health", "/"]);
    let load = Load::begin(stage.entry, "POST", rate());
    let streams = Streams::begin(stage.entry, 75);
    stage.wait_all_serve();
    for (number, name) in NAMES.iter().enumerate() {
        let agent = stage.mesh.agent(name);
        agent.run(&["drain", "web", "--timeout", "60s"]).ok();
        let old = &mut stage.instances[number];
        old.stop();
        let (address, seen) = (old.address, Arc::clone(&old.seen));
        let served = seen.requests();
        stage.instances[number] = Instance::at(address, name, Default::default(), seen);
        agent.run(&["drain", "web", "--off"]).ok();
        agent.run(&["wait", "web", "--for", "ready"]).ok();
        eventually(&format!("{name} serves again"), SOON, || {
            let now = stage.instances[number].seen.requests();
            check(now > served + 5, now - served)
        });
    }
    let lasted = load.elapsed();
    let whole = streams.end();
    assert_none_failed("instances restarted", &load.end(), rate(), lasted);
    assert!(whole >= 4, "{whole} streams");
}

#[test]
fn every_agent_is_restarted_one_after_the_other_and_nobody_notices() {
    let _turn = alone();
    let stage = Stage::new(&["--health", "/"]);
    let load = Load::begin(stage.entry, "POST", rate());
    let streams = Streams::begin(stage.entry, 75);
    stage.wait_all_serve();
    for (name, instance) in NAMES.iter().zip(&stage.instances) {
        let agent = stage.mesh.agent(name);
        agent.stop();
        let served = instance.seen.requests();
        agent.start();
        stage.gate().wait_endpoints("web", NAMES.len());
        eventually(&format!("{name} serves again"), SOON, || {
            let now = instance.seen.requests();
            check(now > served + 5, now - served)
        });
    }
    let lasted = load.elapsed();
    let whole = streams.end();
    assert_none_failed("agents restarted", &load.end(), rate(), lasted);
    assert!(whole >= 4, "{whole} streams");
}

#[test]
fn maintenance_and_taking_back_drain_as_a_restart_does() {
    let _turn = alone();
    let stage = Stage::new(&[]);
    let load = Load::begin(stage.entry, "POST", rate());
    let streams = Streams::begin(stage.entry, 75);
    stage.wait_all_serve();
    stage.mesh.agent("a").run(&["maint", "web"]).ok();
    stage.mesh.agent("b").run(&["unexpose", "web"]).ok();
    stage.gate().wait_endpoints("web", NAMES.len() - 2);
    for name in ["a", "b"] {
        eventually(&format!("what {name} had in flight has ended"), SOON, || {
            let rotation = stage.mesh.agent(name).get("/v1/mesh/drain");
            let rows = rotation["instances"].as_array().unwrap();
            check(rows.iter().all(|row| row["inflight"] == 0), rotation)
        });
    }
    let quiet = stage.requests();
    stage.mesh.agent("a").run(&["maint", "web", "--off"]).ok();
    eventually("the maintained one serves again", SOON, || {
        let now = stage.requests();
        check(now[0] > quiet[0] + 5, now)
    });
    assert_eq!(stage.requests()[1], quiet[1], "the one that was taken back does not");
    let lasted = load.elapsed();
    streams.end();
    assert_none_failed("maint and unexpose", &load.end(), rate(), lasted);
}

#[test]
fn who_comes_back_is_ready_once_a_check_made_since_has_passed() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["a"]);
    let a = mesh.agent("a");
    let mut instance = Instance::start("a");
    let (address, seen) = (instance.address, Arc::clone(&instance.seen));
    a.run(&["expose", "web", &address.to_string(), "--protocol", "http", "--health", "/"]).ok();
    let ready = ["wait", "web", "--for", "ready"];
    a.run(&ready).ok();
    for (out, back) in [
        (&["drain", "web", "--force"][..], &["drain", "web", "--off"][..]),
        (&["maint", "web"], &["maint", "web", "--off"]),
    ] {
        a.run(out).ok();
        instance.stop(); // its last check has passed
        a.run(back).ok();
        let said = a.run(&[&ready[..], &["--timeout", "300ms"]].concat()).fails(3);
        assert!(said.contains("it is failing"), "{back:?}: {said}");
        instance = Instance::at(address, "a", Default::default(), Arc::clone(&seen));
        a.run(&ready).ok();
    }
}

/// What calls saw that began after `moment`, for people.
fn seen(calls: &[Call], moment: Duration) -> String {
    let late = calls.iter().filter(|call| call.started > moment);
    let slow: Vec<_> = late.filter(|call| call.took > Duration::from_secs(1)).collect();
    let slowest = slow.iter().map(|call| call.took).max().unwrap_or_default();
    let last = slow.last().map_or(Duration::ZERO, |call| call.started - moment);
    let (failed, all) = (failed(calls).len(), calls.len());
    format!(
        "{failed} of {all} failed; {} took more than a second, the slowest {slowest:?}, the last began \
         {last:?} after",
        slow.len()
    )
}

/// How long after `moment` calls that began were still bad: failed, or slower than a second.
fn outage(calls: &[Call], moment: Duration) -> Duration {
    let is_bad = |call: &&Call| call.answer.is_err() || call.took > within(Duration::from_secs(1));
    let last = calls.iter().rev().find(|call| call.started > moment && is_bad(call));
    last.map_or(Duration::ZERO, |call| call.started - moment)
}

#[test]
fn an_agent_is_killed_and_requests_that_may_be_repeated_hardly_notice() {
    let _turn = alone();
    let stage = Stage::new(&["--idempotent", "GET *"]);
    let load = Load::begin(stage.entry, "GET", rate());
    stage.wait_all_serve();
    let length = Duration::from_secs(sized(5, 20));
    until(std::time::Instant::now() + length / 2);
    let killed = load.elapsed();
    stage.mesh.agent("c").kill();
    until(std::time::Instant::now() + length / 2);
    stage.mesh.agent("c").start();
    stage.gate().wait_endpoints("web", NAMES.len());
    stage.wait_all_serve();
    let calls = load.end();
    let (bad, outage) = (failed(&calls), outage(&calls, killed));
    eprintln!("killed: {}", seen(&calls, killed));
    assert!(bad.len() * 1_000 <= calls.len(), "{:#?}", &bad[..bad.len().min(8)]);
    assert!(outage <= within(Duration::from_secs(1)), "{outage:?}");
}

#[test]
fn an_agent_that_stands_still_costs_the_calls_of_a_second_and_accuses_nobody_when_it_wakes() {
    let _turn = calmly();
    let stage = Stage::new(&["--idempotent", "GET *"]);
    let gets = Load::begin(stage.entry, "GET", rate() / 2);
    let posts = Load::begin(stage.entry, "POST", rate() / 2);
    stage.wait_all_serve();
    let (sleeper, sleep) = (stage.mesh.agent("c"), Duration::from_secs(20));
    let accused = || -> usize {
        ["member_suspect", "member_down"].map(|kind| sleeper.events(kind).len()).iter().sum()
    };
    let before = accused();
    let stopped = [gets.elapsed(), posts.elapsed()];
    sleeper.signal(Signal::STOP);
    until(std::time::Instant::now() + sleep);
    let served = stage.instances[2].seen.requests();
    let woken = gets.elapsed();
    sleeper.signal(Signal::CONT);
    eventually("it is used again", SOON, || {
        let now = stage.instances[2].seen.requests();
        check(now > served + 5, now - served)
    });
    let back = gets.elapsed() - woken;
    stage.wait_all_serve();
    // As long as it takes here to suspect somebody, and to give up on him.
    until(std::time::Instant::now() + Duration::from_secs(5));
    assert_eq!(accused(), before, "it accused others when it woke");
    for (method, load, stopped) in [("GET", gets, stopped[0]), ("POST", posts, stopped[1])] {
        let calls = load.end();
        let (bad, outage) = (failed(&calls), outage(&calls, stopped));
        let second = within(Duration::from_secs(1));
        eprintln!("{method}, stood still: {}; back after {back:?}", seen(&calls, stopped));
        assert!(outage <= second, "{method}: {:#?}", &bad[..bad.len().min(8)]);
        // What was under way when it fell asleep is lost, too: it had been sent to it.
        let had_begun = |call: &&&Call| call.started + call.took < stopped;
        assert_eq!(bad.iter().filter(had_begun).count(), 0, "{method}: before: {bad:#?}");
        let in_time = |call: &&Call| (stopped..stopped + second).contains(&call.started);
        let sent = calls.iter().filter(in_time).count() / NAMES.len() + CLIENTS as usize / 5;
        let lost_max = if method == "GET" { calls.len() / 1_000 } else { sent };
        assert!(bad.len() <= lost_max, "{method}: {} lost, {lost_max} sent", bad.len());
    }
    assert!(back <= within(Duration::from_secs(3)), "{back:?}");
}
