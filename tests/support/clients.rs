//! Clients of services: lines, echoes, SOCKS5.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

use super::ports::free_address;

/// Where test servers and crowds of clients run, apart from the tests' own threads.
pub fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
    })
}

/// No test waits longer than this for bytes: a hang is a failure with a name.
const PATIENCE: Duration = Duration::from_secs(30);

/// One line to a [`super::Kind::Named`] server, and its answer without the line: the name.
/// `UnexpectedEof` means a clean end without an answer, which a mesh must never show.
pub fn ask(address: SocketAddr, line: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{line}\n").as_bytes())?;
    let mut answer = String::new();
    if BufReader::new(&stream).read_line(&mut answer)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let name = answer.trim_end().strip_suffix(line).map(|name| name.trim_end().to_owned());
    name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("answered {answer:?}")))
}

/// Sends `message` and reads the same bytes back.
pub fn expect_echo(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(message)?;
    let mut back = vec![0; message.len()];
    stream.read_exact(&mut back)?;
    if back == message {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "other bytes came back"))
}

/// Connects to `host` (a `.mesh` name) through the SOCKS5 entry at `entry`. The reply code of a
/// refusal is in the error's text.
pub fn socks(entry: SocketAddr, host: &str, port: u16) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&entry, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[5, 1, 0])?;
    let mut method = [0; 2];
    stream.read_exact(&mut method)?;
    stream.write_all(&socks_request(host, port))?;
    let mut reply = [0; 10];
    stream.read_exact(&mut reply)?;
    if (method, reply[0], reply[1]) == ([5, 0], 5, 0) {
        return Ok(stream);
    }
    Err(io::Error::other(format!("SOCKS5 answered method {method:?} and reply {}", reply[1])))
}

fn socks_request(host: &str, port: u16) -> Vec<u8> {
    let len = u8::try_from(host.len()).expect("a name is at most 255 bytes");
    [&[5, 1, 0, 3, len], host.as_bytes(), &port.to_be_bytes()].concat()
}

/// A local port whose connections go to `host` through the SOCKS5 entry, for clients that speak no
/// SOCKS themselves. Ends when the returned guard is dropped.
pub fn socks_relay(entry: SocketAddr, host: &str) -> (SocketAddr, Relay) {
    let (address, request) = (free_address(), socks_request(host, 1));
    let listener = runtime().block_on(async move { TcpListener::bind(address).await });
    let listener = listener.expect("the address is free");
    let task = runtime().spawn(async move {
        loop {
            let Ok((mut client, _)) = listener.accept().await else { continue };
            let request = request.clone();
            tokio::spawn(async move {
                let mut entry = tokio::net::TcpStream::connect(entry).await?;
                entry.write_all(&[5, 1, 0]).await?;
                entry.read_exact(&mut [0; 2]).await?;
                entry.write_all(&request).await?;
                entry.read_exact(&mut [0; 10]).await?;
                tokio::io::copy_bidirectional(&mut client, &mut entry).await
            });
        }
    });
    (address, Relay(task.abort_handle()))
}

/// Keeps a [`socks_relay`] going.
pub struct Relay(tokio::task::AbortHandle);

impl Drop for Relay {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Median round trip of `count` small messages on one connection.
pub fn p50(stream: &mut TcpStream, count: usize) -> io::Result<Duration> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let started = Instant::now();
        expect_echo(stream, b"one small message of 32 bytes...")?;
        times.push(started.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}
