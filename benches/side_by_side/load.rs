//! The load: a server and a client, each its own process with one thread, so that what is measured
//! is what lies between them.
//!
//! A client opens its connections and has one request answered on each before it says that it is
//! ready; it begins when it is told. So what a kind of load measures holds no handshake of another.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

use super::process;

/// Bytes of a request, and of its answer.
pub(crate) const MESSAGE_LEN: usize = 100;
/// What a program of today sends, and an answer of [`MESSAGE_LEN`] bytes.
const HTTP_REQUEST: &str = "GET /items/42?fields=name HTTP/1.1\r\nhost: web.mesh\r\n\
    user-agent: bench/1.0\r\naccept: application/json\r\naccept-encoding: gzip\r\n\r\n";
const HTTP_ANSWER: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\
    server: bench\r\ncontent-length: 100\r\n\r\n\
    {\"name\":\"01234567890123456789012345678901234567890123456789012345678901234567890123456789012345678\"}";
const BULK_CHUNK_LEN: usize = 128 * 1024;
/// What a forwarder reads at once: a few messages.
const FORWARD_LEN: usize = 4 * 1024;
/// Connections that a client opens at the same time: fewer than any backlog holds.
const OPENING_MAX: usize = 64;
/// First byte of a connection.
pub(crate) const KEEP: u8 = b'k';
const ONCE: u8 = b'o';
const SINK: u8 = b's';

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Requests over connections that stay open.
    Requests { connections: usize },
    /// A connection for each request.
    Connections { workers: usize },
    /// As many bytes as go, one way.
    Bulk { streams: usize },
    /// Requests of HTTP/1.1 over connections that stay open.
    Http { connections: usize },
    /// Connections that have carried one request each and stay open.
    Idle { connections: usize },
}

/// What was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Requests, connections or bytes.
    pub(crate) count: u64,
    pub(crate) seconds: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) errors: u64,
    /// What the client itself spent on a CPU.
    pub(crate) cpu_us: f64,
}

/// Answers on a port of its own choice, which it prints.
pub(crate) async fn serve() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let mut tasks = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        tasks.spawn(answer(stream));
        while tasks.try_join_next().is_some() {}
    }
}

/// Carries bytes to `target` and back, on a port of its own choice, which it prints: one hop and no TLS,
/// the least that a proxy of connections can do.
pub(crate) async fn forward(target: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    let mut tasks = JoinSet::new();
    loop {
        let (mut client, _) = listener.accept().await?;
        tasks.spawn(async move {
            let mut server = TcpStream::connect(target).await?;
            client.set_nodelay(true)?;
            server.set_nodelay(true)?;
            copy_bidirectional_with_sizes(&mut client, &mut server, FORWARD_LEN, FORWARD_LEN).await
        });
        while tasks.try_join_next().is_some() {}
    }
}

async fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0];
    if stream.peek(&mut first).await? == 1 && first == [b'G'] {
        return answer_http(stream).await;
    }
    let mut message = [0; MESSAGE_LEN];
    loop {
        stream.read_exact(&mut message).await?;
        match message[0] {
            SINK => return sink(stream).await,
            ONCE => return stream.write_all(&message).await, // and it closes first
            _ => stream.write_all(&message).await?,
        }
    }
}

/// Answers requests without a body, whatever they ask for.
async fn answer_http(mut stream: TcpStream) -> io::Result<()> {
    let mut head = Vec::new();
    while read_head(&mut stream, &mut head).await?.is_some() {
        head.clear();
        stream.write_all(HTTP_ANSWER.as_bytes()).await?;
    }
    Ok(())
}

/// Reads up to and with the empty line, and what came behind it. `None` at the end.
async fn read_head(stream: &mut TcpStream, head: &mut Vec<u8>) -> io::Result<Option<usize>> {
    loop {
        if let Some(at) = head.windows(4).position(|four| four == b"\r\n\r\n") {
            return Ok(Some(at + 4));
        }
        if stream.read_buf(head).await? == 0 {
            return Ok(None);
        }
    }
}

/// Asks once and reads the whole answer.
async fn request_http(stream: &mut TcpStream, answer: &mut Vec<u8>) -> io::Result<()> {
    stream.write_all(HTTP_REQUEST.as_bytes()).await?;
    answer.clear();
    let Some(head_len) = read_head(stream, answer).await? else {
        return Err(io::ErrorKind::UnexpectedEof.into());
    };
    if !answer.starts_with(b"HTTP/1.1 200") {
        return Err(io::Error::other(String::from_utf8_lossy(answer).into_owned()));
    }
    while answer.len() < head_len + MESSAGE_LEN {
        if stream.read_buf(answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Takes everything and says how much that was.
async fn sink(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BULK_CHUNK_LEN];
    let mut len = 0_u64;
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            count => len += count as u64,
        }
    }
    stream.write_all(&len.to_be_bytes()).await
}

/// Loads `target` for `time`, once a line on standard input says so. Prints an empty line when it is
/// ready, and the outcome.
pub(crate) async fn load(kind: Kind, target: SocketAddr, time: Duration) -> io::Result<()> {
    let opened = open(kind, target).await?;
    println!();
    io::stdin().read_line(&mut String::new())?; // nothing else is under way
    let (start, spent) = (Instant::now(), process::cpu_us("self")?);
    let end = start + time;
    let mut tasks = JoinSet::new();
    match kind {
        Kind::Requests { .. } => {
            for stream in opened {
                tasks.spawn(requests(stream, end));
            }
        }
        Kind::Http { .. } => {
            for stream in opened {
                tasks.spawn(requests_http(stream, end));
            }
        }
        Kind::Connections { workers } => {
            for index in 0..workers {
                tasks.spawn(connections(target, index, end));
            }
        }
        Kind::Bulk { streams } => {
            for _ in 0..streams {
                tasks.spawn(bulk(target, end));
            }
        }
        Kind::Idle { .. } => drop(opened),
    }
    let mut latencies = Vec::new();
    let mut outcome = Outcome::default();
    while let Some(joined) = tasks.join_next().await {
        let part = joined.map_err(io::Error::other)??;
        outcome.count += part.count;
        outcome.errors += part.errors;
        latencies.extend(part.latencies);
    }
    outcome.seconds = start.elapsed().as_secs_f64();
    outcome.cpu_us = process::cpu_us("self")? - spent;
    latencies.sort_unstable();
    outcome.p50_us = percentile(&latencies, 0.50);
    outcome.p99_us = percentile(&latencies, 0.99);
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

/// The connections that a kind begins with, each after its first request.
async fn open(kind: Kind, target: SocketAddr) -> io::Result<Vec<TcpStream>> {
    let connections = match kind {
        Kind::Requests { connections } | Kind::Idle { connections } => connections,
        Kind::Http { connections } => connections,
        Kind::Connections { .. } | Kind::Bulk { .. } => return Ok(Vec::new()),
    };
    let mut opened = Vec::new();
    let mut tasks = JoinSet::new();
    for index in 0..connections {
        if index >= OPENING_MAX
            && let Some(joined) = tasks.join_next().await
        {
            opened.push(joined.map_err(io::Error::other)??);
        }
        tasks.spawn(async move {
            let mut stream = TcpStream::connect(target).await?;
            stream.set_nodelay(true)?;
            match kind {
                Kind::Http { .. } => request_http(&mut stream, &mut Vec::new()).await?,
                _ => request(&mut stream).await?,
            }
            Ok::<_, io::Error>(stream)
        });
    }
    while let Some(joined) = tasks.join_next().await {
        opened.push(joined.map_err(io::Error::other)??);
    }
    Ok(opened)
}

#[derive(Default)]
struct Part {
    count: u64,
    errors: u64,
    /// In nanoseconds.
    latencies: Vec<u32>,
}

impl Part {
    fn note(&mut self, begun: Instant) {
        self.count += 1;
        self.latencies.push(u32::try_from(begun.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
}

async fn requests(mut stream: TcpStream, end: Instant) -> io::Result<Part> {
    let mut part = Part::default();
    while Instant::now() < end {
        let begun = Instant::now();
        request(&mut stream).await?;
        part.note(begun);
    }
    Ok(part)
}

async fn requests_http(mut stream: TcpStream, end: Instant) -> io::Result<Part> {
    let (mut part, mut answer) = (Part::default(), Vec::with_capacity(1_024));
    while Instant::now() < end {
        let begun = Instant::now();
        request_http(&mut stream, &mut answer).await?;
        part.note(begun);
    }
    Ok(part)
}

async fn request(stream: &mut TcpStream) -> io::Result<()> {
    let mut message = [KEEP; MESSAGE_LEN];
    stream.write_all(&message).await?;
    stream.read_exact(&mut message).await?;
    Ok(())
}

async fn connections(target: SocketAddr, index: usize, end: Instant) -> io::Result<Part> {
    // Many source addresses: one alone runs out of ports in a second.
    let source = IpAddr::V4(Ipv4Addr::new(127, 0, 1, 1 + (index % 200) as u8));
    let mut part = Part::default();
    while Instant::now() < end {
        let begun = Instant::now();
        match once(target, source).await {
            Ok(()) => part.note(begun),
            Err(_) => part.errors += 1,
        }
    }
    Ok(part)
}

async fn once(target: SocketAddr, source: IpAddr) -> io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::new(source, 0))?;
    let mut stream = socket.connect(target).await?;
    stream.set_nodelay(true)?;
    let mut message = [ONCE; MESSAGE_LEN];
    stream.write_all(&message).await?;
    stream.read_exact(&mut message).await?;
    match stream.read(&mut message).await? {
        0 => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

async fn bulk(target: SocketAddr, end: Instant) -> io::Result<Part> {
    let mut stream = TcpStream::connect(target).await?;
    let chunk = vec![SINK; BULK_CHUNK_LEN];
    stream.write_all(&chunk[..MESSAGE_LEN]).await?;
    while Instant::now() < end {
        stream.write_all(&chunk).await?;
    }
    stream.shutdown().await?;
    let count = stream.read_u64().await?;
    Ok(Part { count, ..Part::default() })
}

fn percentile(sorted: &[u32], share: f64) -> f64 {
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).map_or(0.0, |ns| f64::from(*ns) / 1_000.0)
}
