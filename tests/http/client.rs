//! A client that says exactly what it is told to, and hears what came, byte by byte.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

/// No test waits longer than this for bytes: a hang is a failure with a name.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection.
pub struct Client(BufReader<TcpStream>);

/// What came back, and whether all of it did.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub head: String,
    pub body: Vec<u8>,
    pub trailers: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Client {
    pub fn to(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    fn stream(&self) -> &TcpStream {
        self.0.get_ref()
    }

    /// Reads what is there.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }

    pub fn say(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.0.get_mut().write_all(bytes.as_ref())
    }

    /// Says its end, and can still hear.
    pub fn end(&self) -> io::Result<()> {
        self.stream().shutdown(Shutdown::Write)
    }

    /// A request with a body of known length, unless that is empty.
    pub fn ask(
        &mut self,
        method: &str,
        path: &str,
        fields: &str,
        body: &[u8],
    ) -> io::Result<Answer> {
        let length = match body.len() {
            0 => String::new(),
            len => format!("content-length: {len}\r\n"),
        };
        let head = format!("{method} {path} HTTP/1.1\r\nhost: web\r\n{fields}{length}\r\n");
        let said = self.say([head.as_bytes(), body].concat());
        match self.hear(method != "HEAD") {
            Ok(answer) => Ok(answer), // also when it was said before all was heard
            Err(error) => said.and(Err(error)),
        }
    }

    pub fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.ask("GET", path, "", b"")
    }

    /// Hears one whole answer, interim ones left out.
    pub fn hear(&mut self, has_body: bool) -> io::Result<Answer> {
        loop {
            let answer = self.hear_one(has_body)?;
            if answer.status >= 200 || answer.status == 101 {
                return Ok(answer);
            }
        }
    }

    /// The next answer, whichever it is. `UnexpectedEof` when it is cut by an end.
    pub fn hear_one(&mut self, has_body: bool) -> io::Result<Answer> {
        let first = self.line()?;
        let status = first.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status: u16 = status.ok_or_else(|| io::Error::other(format!("no status: {first}")))?;
        let mut head = String::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').unwrap_or((&line, ""));
            head += &format!("{}: {}\n", name.to_lowercase(), value.trim());
        }
        let mut answer = Answer { status, head, body: Vec::new(), trailers: String::new() };
        if !has_body || status < 200 || matches!(status, 204 | 304) {
            return Ok(answer);
        }
        if answer.header("transfer-encoding").is_some() {
            loop {
                let line = self.line()?;
                let len = usize::from_str_radix(&line, 16).map_err(io::Error::other)?;
                if len == 0 {
                    break;
                }
                let start = answer.body.len();
                answer.body.resize(start + len, 0);
                self.0.read_exact(&mut answer.body[start..])?;
                self.line()?;
            }
            loop {
                let line = self.line()?;
                if line.is_empty() {
                    return Ok(answer);
                }
                answer.trailers += &line;
            }
        }
        if let Some(len) = answer.header("content-length") {
            answer.body.resize(len.parse().map_err(io::Error::other)?, 0);
            self.0.read_exact(&mut answer.body)?;
        } else {
            self.0.read_to_end(&mut answer.body)?;
        }
        Ok(answer)
    }

    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// What comes next, as much as is there.
    pub fn some(&mut self) -> io::Result<Vec<u8>> {
        let some = self.0.fill_buf()?.to_vec();
        self.0.consume(some.len());
        if some.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(some) }
    }

    /// What comes until the end.
    pub fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut rest = Vec::new();
        self.0.read_to_end(&mut rest)?;
        Ok(rest)
    }
}
