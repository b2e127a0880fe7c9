//! Services for agents to stand in front of.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use super::bytes::Noise;
use super::clients::runtime;
use super::ports::free_address;

/// What a server does with a connection.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Sends back what it gets, and ends when the client ends.
    Echo,
    /// Answers each line with `<name> <line>`.
    Named(String),
    /// Reads to the end, then answers with the SHA-256 of what it read. Only a client whose end
    /// was carried through gets an answer.
    Sink,
    /// Sends this many bytes of [`Noise`] of this seed, then ends.
    Source { seed: u64, len: u64 },
    /// Writes each line down, answers nothing and holds the connection.
    Ledger,
    /// Reads one line and resets the connection, as the kernel does for a process that is killed.
    Cutter,
    /// A web server with one page.
    Web(String),
}

/// A server on loopback. Stops, and resets what is open, when dropped.
pub struct Server {
    pub address: SocketAddr,
    tally: Arc<Tally>,
    task: Mutex<Option<AbortHandle>>,
    kind: Kind,
}

#[derive(Default)]
struct Tally {
    accepted: AtomicU64,
    resets: AtomicU64,
    lines: Mutex<BTreeMap<String, u64>>,
}

impl Server {
    /// Starts one on a free port.
    pub fn start(kind: Kind) -> Self {
        let server =
            Self { address: free_address(), tally: Arc::default(), task: Mutex::new(None), kind };
        server.resume();
        server
    }

    /// Stops listening, so that new connections are refused, and drops the open ones.
    pub fn stop(&self) {
        if let Some(task) = self.task.lock().unwrap().take() {
            task.abort();
        }
        super::eventually("the port refuses", super::SOON, || {
            super::check(std::net::TcpStream::connect(self.address).is_err(), "it accepts")
        });
    }

    /// Listens again on the same port.
    pub fn resume(&self) {
        let address = self.address;
        let listener: io::Result<TcpListener> = runtime().block_on(async move {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(address)?;
            // A crowd that connects in one moment is not lost in the server's own queue.
            socket.listen(8_192)
        });
        let listener = listener.unwrap_or_else(|error| panic!("listen on {address}: {error}"));
        let task = runtime().spawn(serve(listener, self.kind.clone(), Arc::clone(&self.tally)));
        *self.task.lock().unwrap() = Some(task.abort_handle());
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.tally.accepted.load(Ordering::Relaxed)
    }

    /// How many connections ended with a reset by the client ([`Kind::Ledger`]).
    pub fn resets(&self) -> u64 {
        self.tally.resets.load(Ordering::Relaxed)
    }

    /// How often each line was read ([`Kind::Named`] and [`Kind::Ledger`]).
    pub fn lines(&self) -> BTreeMap<String, u64> {
        self.tally.lines.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(task) = self.task.lock().unwrap().take() {
            task.abort();
        }
    }
}

async fn serve(listener: TcpListener, kind: Kind, tally: Arc<Tally>) {
    let mut open = JoinSet::new();
    let listener = listener; // dropped before `open`: who is cut can no longer come back
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        tally.accepted.fetch_add(1, Ordering::Relaxed);
        let (kind, tally) = (kind.clone(), Arc::clone(&tally));
        open.spawn(async move {
            let _ = stream.set_nodelay(true);
            let _ = answer(stream, kind, tally).await;
        });
        while open.try_join_next().is_some() {}
    }
}

async fn answer(mut stream: TcpStream, kind: Kind, tally: Arc<Tally>) -> io::Result<()> {
    match kind {
        Kind::Echo => {
            let (mut reader, mut writer) = stream.split();
            tokio::io::copy(&mut reader, &mut writer).await?;
            writer.shutdown().await
        }
        Kind::Named(name) => {
            let (reader, mut writer) = stream.split();
            let mut lines = BufReader::new(reader).lines();
            while let Some(line) = lines.next_line().await? {
                *tally.lines.lock().unwrap().entry(line.clone()).or_default() += 1;
                writer.write_all(format!("{name} {line}\n").as_bytes()).await?;
            }
            writer.shutdown().await
        }
        Kind::Sink => {
            let mut context = ring::digest::Context::new(&ring::digest::SHA256);
            let mut buffer = vec![0; 256 * 1024];
            loop {
                let read = stream.read(&mut buffer).await?;
                if read == 0 {
                    break;
                }
                context.update(&buffer[..read]);
            }
            stream.write_all(context.finish().as_ref()).await?;
            stream.shutdown().await
        }
        Kind::Source { seed, len } => {
            let (mut noise, mut buffer) = (Noise::new(seed, len), vec![0; 256 * 1024]);
            loop {
                let filled = noise.fill(&mut buffer);
                if filled == 0 {
                    return stream.shutdown().await;
                }
                stream.write_all(&buffer[..filled]).await?;
            }
        }
        Kind::Ledger => {
            let mut lines = BufReader::new(stream).lines();
            loop {
                match lines.next_line().await {
                    Ok(Some(line)) => *tally.lines.lock().unwrap().entry(line).or_default() += 1,
                    Ok(None) => return Ok(()),
                    Err(error) => {
                        let is_reset = error.kind() == io::ErrorKind::ConnectionReset;
                        tally.resets.fetch_add(is_reset.into(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
            }
        }
        Kind::Cutter => {
            let mut reader = BufReader::new(stream);
            reader.read_line(&mut String::new()).await?;
            reader.get_ref().set_zero_linger() // and dropped
        }
        Kind::Web(page) => {
            let (reader, mut writer) = stream.split();
            let mut lines = BufReader::new(reader).lines();
            while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
            let len = page.len();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {len}\r\nconnection: close\r\n");
            writer.write_all(format!("{head}\r\n{page}").as_bytes()).await?;
            writer.shutdown().await
        }
    }
}
