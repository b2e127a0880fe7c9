//! Web servers whose manners can be changed while they run, and callers that go on for a while.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::{Agent, check, eventually, free_address, runtime, until};

/// A web server that answers every request with its name.
pub struct Backend {
    pub address: SocketAddr,
    pub name: String,
    pub manners: Arc<Manners>,
    task: JoinHandle<()>,
}

/// How it answers, and what it has seen.
#[derive(Default)]
pub struct Manners {
    /// Before each answer.
    pub delay_ms: AtomicU64,
    /// Of a thousand requests, so many fail.
    pub failing: AtomicU64,
    /// What those are answered with; 503 unless set.
    pub status: AtomicU64,
    requests: AtomicU64,
    failures: AtomicU64,
    arrivals: Mutex<Vec<Instant>>,
    in_work: AtomicU64,
    in_work_max: AtomicU64,
}

impl Manners {
    pub fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// Requests that it failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// When requests came, since `from`.
    pub fn arrivals(&self, from: Instant) -> Vec<Duration> {
        let arrivals = self.arrivals.lock().expect("no thread panics with it");
        arrivals.iter().filter_map(|at| at.checked_duration_since(from)).collect()
    }

    /// Requests that were worked on at the same time, at most.
    pub fn in_work_max(&self) -> u64 {
        self.in_work_max.load(Relaxed)
    }

    async fn answer(&self, name: &str) -> String {
        let number = self.requests.fetch_add(1, Relaxed);
        self.arrivals.lock().expect("no thread panics with it").push(Instant::now());
        let in_work = self.in_work.fetch_add(1, Relaxed) + 1;
        self.in_work_max.fetch_max(in_work, Relaxed);
        let delay = Duration::from_millis(self.delay_ms.load(Relaxed));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        self.in_work.fetch_sub(1, Relaxed);
        // Spread evenly: 619 is coprime with 1,000.
        let has_failed = number * 619 % 1_000 < self.failing.load(Relaxed);
        self.failures.fetch_add(has_failed.into(), Relaxed);
        let status = match self.status.load(Relaxed) {
            _ if !has_failed => 200,
            0 => 503,
            status => status,
        };
        format!("HTTP/1.1 {status} So\r\ncontent-length: {}\r\n\r\n{name}", name.len())
    }
}

impl Backend {
    pub fn start(name: &str) -> Self {
        let (address, manners) = (free_address(), Arc::<Manners>::default());
        let listener = runtime().block_on(TcpListener::bind(address)).expect("a free address");
        let task = runtime().spawn(serve(listener, name.to_owned(), Arc::clone(&manners)));
        Self { address, name: name.to_owned(), manners, task }
    }

    /// Offers it at `agent` as an instance of `web` under its name.
    #[track_caller]
    pub fn expose(&self, agent: &Agent, more: &[&str]) {
        let address = self.address.to_string();
        let words = ["expose", "web", &address, "--id", &self.name, "--protocol", "http"];
        agent.run(&[&words[..], more].concat()).ok();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, name: String, manners: Arc<Manners>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let (name, manners) = (name.clone(), Arc::clone(&manners));
        runtime().spawn(async move {
            let mut stream = tokio::io::BufReader::new(stream);
            loop {
                let mut line = String::new();
                while line != "\r\n" {
                    line.clear();
                    match stream.read_line(&mut line).await {
                        Ok(len) if len > 0 => {}
                        _ => return,
                    }
                }
                let answer = manners.answer(&name).await;
                if stream.get_mut().write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// One answer that a caller got.
#[derive(Clone, Debug)]
pub struct Told {
    /// Which of those that were started together.
    pub caller: usize,
    /// Since the load began.
    pub at: Duration,
    /// 0 when the connection broke.
    pub status: u16,
    /// The name of the instance, or what the mesh said.
    pub by: String,
    /// Why the mesh answered itself.
    pub reason: Option<String>,
}

/// A caller on one connection.
pub struct Caller {
    entry: SocketAddr,
    stream: Option<BufReader<TcpStream>>,
}

impl Caller {
    pub fn to(entry: SocketAddr) -> Self {
        Self { entry, stream: None }
    }

    /// Status, body, and the mesh's own reason. Broken connections are made anew the next time.
    pub fn get(&mut self, fields: &str) -> io::Result<(u16, String, Option<String>)> {
        let told = self.try_get(fields);
        if told.is_err() {
            self.stream = None;
        }
        told
    }

    fn try_get(&mut self, fields: &str) -> io::Result<(u16, String, Option<String>)> {
        if self.stream.is_none() {
            let stream = TcpStream::connect(self.entry)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            self.stream = Some(BufReader::new(stream));
        }
        let stream = self.stream.as_mut().expect("just made");
        let head = format!("GET / HTTP/1.1\r\nhost: web\r\n{fields}\r\n");
        stream.get_mut().write_all(head.as_bytes())?;
        let mut fields = BTreeMap::new();
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.ok_or(io::ErrorKind::UnexpectedEof)?;
        loop {
            line.clear();
            stream.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            fields.insert(name.to_lowercase(), value.trim().to_owned());
        }
        let len = fields.get("content-length").and_then(|len| len.parse().ok()).unwrap_or(0);
        let mut body = vec![0; len];
        stream.read_exact(&mut body)?;
        if fields.get("connection").is_some_and(|word| word == "close") {
            self.stream = None;
        }
        let reason = fields.remove("x-murmesh-reason");
        Ok((status, String::from_utf8_lossy(&body).into_owned(), reason))
    }
}

/// What one caller is told that asks from `first` on every `period`, while it `goes_on`.
fn call(
    number: usize,
    entry: SocketAddr,
    begun: Instant,
    first: Instant,
    period: Duration,
    goes_on: impl Fn(Instant) -> bool,
) -> Vec<Told> {
    let (mut caller, mut told, mut next) = (Caller::to(entry), Vec::new(), first);
    while goes_on(next) {
        until(next);
        let answer = caller.get("");
        let at = begun.elapsed();
        let (status, by, reason) = answer.unwrap_or_else(|e| (0, e.to_string(), None));
        told.push(Told { caller: number, at, status, by, reason });
        next = (next + period).max(Instant::now());
    }
    told
}

/// What `callers` at once are told that each ask every `period` for `time`.
pub fn load(entry: SocketAddr, callers: u32, period: Duration, time: Duration) -> Vec<Told> {
    let begun = Instant::now();
    let goes_on = |next| next < begun + time;
    std::thread::scope(|scope| {
        let start = |number| {
            let first = begun + period * number / callers;
            scope.spawn(move || call(number as usize, entry, begun, first, period, goes_on))
        };
        let threads: Vec<_> = (0..callers).map(start).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a caller")).collect()
    })
}

/// What one caller at each of `entries` is told that asks every `period`, while `meanwhile` runs, which
/// is given the moment from which their answers are counted.
pub fn load_while(
    entries: &[SocketAddr],
    period: Duration,
    meanwhile: impl FnOnce(Instant),
) -> Vec<Told> {
    /// Ends the load also when `meanwhile` panics.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Relaxed);
        }
    }
    let (begun, is_over) = (Instant::now(), AtomicBool::new(false));
    let goes_on = |_| !is_over.load(Relaxed);
    std::thread::scope(|scope| {
        let end = End(&is_over);
        let start = |(number, entry): (u32, &SocketAddr)| {
            let (entry, first) = (*entry, begun + period * number / entries.len() as u32);
            scope.spawn(move || call(number as usize, entry, begun, first, period, goes_on))
        };
        let threads: Vec<_> = (0..).zip(entries).map(start).collect();
        meanwhile(begun);
        drop(end);
        threads.into_iter().flat_map(|thread| thread.join().expect("a caller")).collect()
    })
}

/// How many of `told` each instance answered.
pub fn shares(told: &[Told]) -> BTreeMap<String, usize> {
    told.iter().fold(BTreeMap::new(), |mut shares, one| {
        *shares.entry(one.by.clone()).or_default() += 1;
        shares
    })
}

/// Waits until `agent` shows the instance in this state.
#[track_caller]
pub fn wait_state(agent: &Agent, instance: &str, state: &str, limit: Duration) -> Duration {
    eventually(&format!("{instance} is {state}"), limit, || {
        let rows = agent.get("/v1/mesh/endpoints/web");
        let rows = rows.as_array().expect("rows");
        let row = rows.iter().find(|row| row["instance"] == instance);
        check(row.is_some_and(|row| row["state"] == state), rows)
    })
}
