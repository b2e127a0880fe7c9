//! A web server that is made here: polite or rude as the path of a request asks, and it remembers
//! what reached it.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use crate::support::{free_address, runtime};

/// How an instance treats its connections.
#[derive(Clone, Copy, Debug, Default)]
pub struct Manners {
    /// Ends a connection when no request has begun on it for so long, as servers do.
    pub rest_max: Option<Duration>,
    /// Requests that are worked on at a time; the others wait, as in a server with so many threads.
    pub workers: Option<usize>,
    /// How long each is worked on.
    pub work: Duration,
}

/// A running one. Its connections are cut when it is dropped.
pub struct Instance {
    pub address: SocketAddr,
    pub seen: Arc<Seen>,
    task: JoinHandle<()>,
}

/// What reached an instance.
#[derive(Default)]
pub struct Seen {
    accepted: AtomicU64,
    connections: AtomicU64,
    closed: AtomicU64,
    requests: AtomicU64,
    /// How often each request with an `x-id` was read, its whole body included.
    deliveries: Mutex<BTreeMap<String, u64>>,
    /// How the connections ended on which it was waiting: `end` or `cut`.
    endings: Mutex<Vec<&'static str>>,
}

impl Seen {
    pub fn deliveries(&self) -> BTreeMap<String, u64> {
        self.deliveries.lock().unwrap().clone()
    }

    pub fn endings(&self) -> Vec<&'static str> {
        self.endings.lock().unwrap().clone()
    }

    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Connections with a request: somebody may only have tried whether it is there.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Connections that are open now.
    pub fn open(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed) - self.closed.load(Ordering::Relaxed)
    }
}

impl Instance {
    pub fn start(name: &'static str) -> Self {
        Self::with(name, Manners::default())
    }

    pub fn with(name: &'static str, manners: Manners) -> Self {
        Self::at(free_address(), name, manners, Arc::default())
    }

    /// One that takes the place of an earlier one, and its memory.
    pub fn at(address: SocketAddr, name: &'static str, manners: Manners, seen: Arc<Seen>) -> Self {
        let listener = runtime().block_on(async {
            let socket = tokio::net::TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            socket.listen(4_096)
        });
        let listener = listener.unwrap_or_else(|error| panic!("listen at {address}: {error}"));
        let task = runtime().spawn(serve(listener, name, manners, Arc::clone(&seen)));
        Self { address, seen, task }
    }

    /// Ends it, as the kernel does with a process that is killed, and waits until it is gone.
    pub fn stop(&mut self) {
        self.task.abort();
        let _ = runtime().block_on(&mut self.task); // an error says that it was ended
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(listener: TcpListener, name: &'static str, manners: Manners, seen: Arc<Seen>) {
    let workers = Arc::new(Semaphore::new(manners.workers.unwrap_or(Semaphore::MAX_PERMITS)));
    let mut open = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        seen.accepted.fetch_add(1, Ordering::Relaxed);
        let _ = stream.set_nodelay(true);
        let (seen, workers) = (Arc::clone(&seen), Arc::clone(&workers));
        open.spawn(async move {
            let mut connection = Connection { stream: BufReader::new(stream), name, seen };
            // An error is a client that is gone, or the rude end of a rude answer.
            let _ = connection.serve(manners, &workers).await;
            let seen = Arc::clone(&connection.seen);
            drop(connection);
            seen.closed.fetch_add(1, Ordering::Relaxed);
        });
        while open.try_join_next().is_some() {}
    }
}

struct Connection {
    stream: BufReader<TcpStream>,
    name: &'static str,
    seen: Arc<Seen>,
}

struct Request {
    method: String,
    path: String,
    /// As they came, names in lower case.
    head: String,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }
}

impl Connection {
    async fn serve(&mut self, manners: Manners, workers: &Semaphore) -> io::Result<()> {
        for number in 0_u64.. {
            let head = self.head();
            let request = match manners.rest_max {
                None => head.await?,
                Some(limit) => match tokio::time::timeout(limit, head).await {
                    Ok(request) => request?,
                    Err(_) => return Ok(()), // it has rested for long: closed
                },
            };
            let Some(request) = request else { return Ok(()) };
            self.seen.requests.fetch_add(1, Ordering::Relaxed);
            self.seen.connections.fetch_add(u64::from(number == 0), Ordering::Relaxed);
            let _worker = workers.acquire().await.expect("never closed");
            if !manners.work.is_zero() {
                tokio::time::sleep(manners.work).await;
            }
            self.answer(&request).await?;
        }
        Ok(())
    }

    async fn head(&mut self) -> io::Result<Option<Request>> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).await? == 0 {
            return Ok(None);
        }
        let mut words = line.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut head = String::new();
        loop {
            line.clear();
            self.stream.read_line(&mut line).await?;
            if line.trim_end().is_empty() {
                return Ok(Some(Request { method, path, head }));
            }
            let (name, value) = line.split_once(':').unwrap_or((&line, ""));
            head += &format!("{}: {}\n", name.to_lowercase(), value.trim());
        }
    }

    /// The whole body, and its trailers as text.
    async fn body(&mut self, request: &Request) -> io::Result<(Vec<u8>, String)> {
        let (mut body, mut trailers) = (Vec::new(), String::new());
        if let Some(len) = request.header("content-length") {
            body.resize(len.parse().map_err(io::Error::other)?, 0);
            self.stream.read_exact(&mut body).await?;
        } else if request.header("transfer-encoding").is_some() {
            let mut line = String::new();
            loop {
                line.clear();
                if self.stream.read_line(&mut line).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let len = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
                if len == 0 {
                    break;
                }
                let start = body.len();
                body.resize(start + len, 0);
                self.stream.read_exact(&mut body[start..]).await?;
                self.stream.read_exact(&mut [0; 2]).await?;
            }
            loop {
                line.clear();
                if self.stream.read_line(&mut line).await? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                if line.trim_end().is_empty() {
                    break;
                }
                trailers += line.trim_end();
            }
        }
        Ok((body, trailers))
    }

    async fn answer(&mut self, request: &Request) -> io::Result<()> {
        let (path, argument) = request.path.split_once('?').unwrap_or((&request.path, ""));
        if path == "/early" {
            // Says no, reads so much more, and goes with most of the body unread.
            self.say("413 Payload Too Large", "connection: close\r\n", b"too large").await?;
            let more: usize = argument.parse().unwrap_or_default();
            self.stream.read_exact(&mut vec![0; more]).await?;
            return Err(io::ErrorKind::Other.into());
        }
        // Holds its answer, or the rest of it, until the client is gone.
        if path == "/wait" || path == "/hold" {
            if path == "/hold" {
                self.raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n")
                    .await?;
            }
            let ended = self.stream.read(&mut [0; 1]).await;
            let ending = if ended.is_ok() { "end" } else { "cut" };
            self.seen.endings.lock().unwrap().push(ending);
            return Err(io::ErrorKind::Other.into());
        }
        if path == "/count" {
            let len = request.header("content-length").unwrap_or_default().to_owned();
            let mut left: usize = len.parse().map_err(io::Error::other)?;
            while left > 0 {
                let there = self.stream.fill_buf().await?.len().min(left);
                if there == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                self.stream.consume(there);
                left -= there;
            }
            return self.say("200 OK", "", len.as_bytes()).await;
        }
        let (body, trailers) = self.body(request).await?;
        if let Some(id) = request.header("x-id") {
            *self.seen.deliveries.lock().unwrap().entry(id.to_owned()).or_default() += 1;
        }
        match path {
            "/echo" => {
                let said = format!("{} {} {trailers}", body.len(), sum(&body));
                self.say("200 OK", "", said.as_bytes()).await
            }
            "/head" => self.say("200 OK", "", request.head.as_bytes()).await,
            // After so many milliseconds.
            "/late" => {
                let time = argument.parse().map_err(io::Error::other)?;
                tokio::time::sleep(Duration::from_millis(time)).await;
                self.say("200 OK", "", self.name.as_bytes()).await
            }
            "/nothing" => self.raw(b"HTTP/1.1 204 No Content\r\n\r\n").await,
            "/unchanged" => {
                self.raw(b"HTTP/1.1 304 Not Modified\r\netag: \"1\"\r\ncontent-length: 9\r\n\r\n")
                    .await
            }
            "/measure" if request.method == "HEAD" => {
                self.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\n\r\n").await
            }
            "/trailers" => {
                self.raw(
                    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
                      5\r\nhello\r\n0\r\nx-sum: 42\r\n\r\n",
                )
                .await
            }
            "/last" => {
                self.say("200 OK", "connection: close\r\n", self.name.as_bytes()).await?;
                Err(io::ErrorKind::Other.into())
            }
            // Ends every connection after one answer, and does not say so.
            "/curt" => {
                self.say("200 OK", "", self.name.as_bytes()).await?;
                Err(io::ErrorKind::Other.into())
            }
            "/until-end" => {
                self.raw(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nall of it").await?;
                Err(io::ErrorKind::Other.into())
            }
            // Reads all, answers nothing, and goes.
            "/lose" => Err(io::ErrorKind::Other.into()),
            "/cut-sized" => {
                self.raw(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf an answer").await?;
                Err(io::ErrorKind::Other.into())
            }
            "/cut-chunked" => {
                self.raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n")
                    .await?;
                Err(io::ErrorKind::Other.into())
            }
            "/cut-reset" => {
                self.raw(b"HTTP/1.1 200 OK\r\n\r\nhalf an answer").await?;
                self.stream.get_ref().set_zero_linger()?;
                Err(io::ErrorKind::Other.into())
            }
            "/large" => {
                let mut left: usize = argument.parse().map_err(io::Error::other)?;
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {left}\r\n\r\n");
                self.raw(head.as_bytes()).await?;
                let block = vec![b'x'; 64 * 1024];
                while left > 0 {
                    let len = left.min(block.len());
                    self.raw(&block[..len]).await?;
                    left -= len;
                }
                Ok(())
            }
            // One event every 20 ms, as many as were asked for, each with the time it was sent at.
            "/events" => {
                self.raw(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                      transfer-encoding: chunked\r\n\r\n",
                )
                .await?;
                for _ in 0..argument.parse().map_err(io::Error::other)? {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    let event = format!("data: {}\n\n", now_us());
                    self.raw(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await?;
                }
                self.raw(b"0\r\n\r\n").await
            }
            "/headers" => {
                let mut head = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n".to_owned();
                for number in 0..argument.parse().map_err(io::Error::other)? {
                    head += &format!("x-filler-{number}: {}\r\n", "f".repeat(1_000));
                }
                self.raw((head + "\r\n").as_bytes()).await
            }
            // Switches to a protocol in which every line comes back in capitals.
            "/shout" => {
                self.raw(
                    b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                      upgrade: shout/1\r\n\r\nHELLO\n",
                )
                .await?;
                let mut line = String::new();
                while self.stream.read_line(&mut line).await? > 0 {
                    if line == "cut\n" {
                        self.stream.get_ref().set_zero_linger()?;
                        return Err(io::ErrorKind::Other.into());
                    }
                    self.raw(line.to_uppercase().as_bytes()).await?;
                    line.clear();
                }
                self.stream.get_mut().shutdown().await
            }
            _ => self.say("200 OK", "", self.name.as_bytes()).await,
        }
    }

    async fn say(&mut self, status: &str, fields: &str, body: &[u8]) -> io::Result<()> {
        let len = body.len();
        let head = format!("HTTP/1.1 {status}\r\n{fields}content-length: {len}\r\n\r\n");
        self.raw(&[head.as_bytes(), body].concat()).await
    }

    async fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes).await
    }
}

/// Microseconds of this machine's clock: the same for a client and a server on it.
pub fn now_us() -> u128 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.expect("after 1970").as_micros()
}

/// A short sum of `bytes`, as `/echo` says it.
pub fn sum(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}
