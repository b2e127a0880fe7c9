//! The least HTTP/1.1 client that the local API needs.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use super::programs::run_program;

/// Where an API listens.
#[derive(Clone, Debug)]
pub enum At {
    /// On loopback.
    Tcp(SocketAddr),
    /// On loopback of a network namespace.
    Inside(String, SocketAddr),
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Response {
    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("no JSON ({error}): {} {}", self.status, self.text()))
    }
}

const TIMEOUT: Duration = Duration::from_secs(30);

/// One request on a connection of its own.
pub fn request(
    at: &At,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Response> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        let host = match at {
            At::Tcp(address) | At::Inside(_, address) => address.to_string(),
        };
        head += &format!("host: {host}\r\n");
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !body.is_empty() {
        head += &format!("content-length: {}\r\n", body.len());
    }
    head += "\r\n";
    parse(&request_raw(at, &[head.as_bytes(), body].concat())?)
}

/// Sends these bytes as they are, and returns all that comes back until the other side closes.
pub fn request_raw(at: &At, bytes: &[u8]) -> io::Result<Vec<u8>> {
    match at {
        At::Tcp(address) => {
            let stream = TcpStream::connect_timeout(address, TIMEOUT)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            stream.set_write_timeout(Some(TIMEOUT))?;
            exchange(stream, bytes)
        }
        At::Inside(namespace, address) => {
            // A socket belongs to the namespace of the process that makes it.
            let script = format!(
                "exec 3<>/dev/tcp/{}/{} && cat >&3 && cat <&3",
                address.ip(),
                address.port()
            );
            let mut inside = Command::new("ip");
            inside.args(["netns", "exec", namespace, "bash", "-c", &script]);
            let ran = run_program(&mut inside, bytes, 2 * TIMEOUT);
            match ran.code {
                Some(0) => Ok(ran.stdout.into_bytes()),
                _ => Err(io::Error::other(ran.stderr)),
            }
        }
    }
}

fn exchange(mut stream: impl Read + Write, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let sent = stream.write_all(bytes);
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    match sent.and(read) {
        // Refused in the middle of what we sent: what it said before is the answer.
        Err(error) if is_cut(&error) && !answer.is_empty() => Ok(answer),
        Err(error) => Err(error),
        Ok(_) => Ok(answer),
    }
}

/// As a write meets it, or a read.
fn is_cut(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

fn parse(answer: &[u8]) -> io::Result<Response> {
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "no HTTP answer");
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").ok_or_else(broken)?;
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(broken)?;
    let mut body = answer[end + 4..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        body = dechunk(&body).ok_or_else(broken)?;
    }
    Ok(Response { status, head, body })
}

fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|two| two == b"\r\n")?;
        let len =
            usize::from_str_radix(std::str::from_utf8(&rest[..line]).ok()?.trim(), 16).ok()?;
        if len == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(line + 2..line + 2 + len)?);
        rest = rest.get(line + 4 + len..)?;
    }
}
