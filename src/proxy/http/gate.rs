//! The gate before hyper: lets pass what can be read in one way only.
//!
//! Request smuggling lives of two parsers that read one message differently. Behind this agent
//! stands one parser, hyper's, and what an application sees is written anew by it. It is lenient
//! and silent in places, though: it drops a `Content-Length` beside `Transfer-Encoding`, takes bare
//! line feeds for line ends and skips chunk extensions. So the gate reads the bytes first (RFC
//! 9112), with hyper's own parser for heads and stricter checks around it, and refuses whatever is
//! in doubt.
//!
//! The gate is pure: bytes in, bytes out, no clock, no socket. Invariants, which the tests name:
//! - what passes is what came, in order, without the one empty line that may precede a request;
//! - nothing of a head or trailer section passes before all of it was judged;
//! - how the bytes were cut into pieces changes nothing.

use std::mem::{MaybeUninit, take};

use bytes::{Buf, Bytes, BytesMut};
use httparse::{Header, Request, Status};
use memchr::{memchr, memchr_iter};

use super::head::{
    Authority, Malformed, content_length, is_expectation, is_lookalike, is_method, is_trailer,
};

/// A request's head. Twice what usual servers take, so that none of their clients is refused here.
pub(super) const HEAD_LEN_MAX: usize = 32 * 1024;
/// What most servers take.
const REQUEST_LINE_LEN_MAX: usize = 8 * 1024;
/// What hyper takes.
const HEADERS_MAX: usize = 100;
const TRAILERS_LEN_MAX: usize = 8 * 1024;
/// The digits of the largest number, and the line end.
const CHUNK_SIZE_LEN_MAX: usize = 18;
/// What may wait behind a request to upgrade before reading stops.
const HELD_LEN_MAX: usize = 64 * 1024;

/// Judges what one client sends on one HTTP/1.1 connection.
///
/// After every [`handle_bytes`](Self::handle_bytes) and [`declined`](Self::declined), drain
/// [`poll_pass`](Self::poll_pass). Keeps at most one head, or what waits for the answer to an
/// upgrade: 64 KiB and one piece.
#[derive(Debug)]
pub(super) struct Gate {
    framing: Framing,
    /// The begin of something that cannot be judged yet, or what is held. A copy, so that it does
    /// not keep a reader's whole buffer alive.
    kept: BytesMut,
    /// What came after that.
    came: Bytes,
}

impl Gate {
    /// Before the first request.
    pub(super) fn new() -> Self {
        let framing =
            Framing { state: State::Head { is_after_empty_line: false }, then: Then::Head };
        Self { framing, kept: BytesMut::new(), came: Bytes::new() }
    }

    /// Takes what came from the client, in any pieces.
    pub(super) fn handle_bytes(&mut self, bytes: Bytes) {
        if self.came.is_empty() {
            self.came = bytes;
        } else {
            self.came = [take(&mut self.came), bytes].concat().into(); // not drained: still right
        }
    }

    /// What passes next, until `None`: then more must come, or the answer to an upgrade.
    ///
    /// # Errors
    /// The client is refused, from here on for ever. All that passed before stands.
    pub(super) fn poll_pass(&mut self) -> Result<Option<Bytes>, Malformed> {
        loop {
            self.top_up();
            let is_kept = !self.kept.is_empty();
            let (clear_len, stop) =
                self.framing.judge(if is_kept { &self.kept } else { &self.came });
            let clear = match is_kept {
                true => self.kept.split_to(clear_len).freeze(),
                false => self.came.split_to(clear_len),
            };
            match stop {
                Stop::Empty => {}
                Stop::Skip(len) if is_kept => self.kept.advance(len),
                Stop::Skip(len) => self.came.advance(len),
                Stop::Undecided if is_kept => {}
                Stop::Undecided => self.kept.extend_from_slice(&take(&mut self.came)),
                Stop::Refused => (self.kept, self.came) = Default::default(),
            }
            if self.kept.is_empty() {
                self.kept = BytesMut::new(); // an idle connection owns no buffer
            }
            if !clear.is_empty() {
                return Ok(Some(clear));
            }
            if let State::Refused { malformed, .. } = self.framing.state {
                return Err(malformed);
            }
            if self.came.is_empty() {
                return Ok(None);
            }
        }
    }

    /// What came and did not pass, for whoever goes on with the connection: after an upgrade that the
    /// application agreed to, or between messages.
    pub(super) fn take_unpassed(&mut self) -> Bytes {
        [take(&mut self.kept).freeze(), take(&mut self.came)].concat().into()
    }

    /// The last request asked for an upgrade and is answered without one: requests follow. Without
    /// effect when there was none.
    pub(super) fn declined(&mut self) {
        self.framing.resolve(Then::Head);
    }

    /// False while enough waits behind an upgrade, and for ever after a refusal.
    pub(super) fn wants_more(&self) -> bool {
        match self.framing.state {
            State::Held => self.kept.len() + self.came.len() < HELD_LEN_MAX,
            State::Refused { .. } => false,
            _ => true,
        }
    }

    /// Whether all that came has passed and the next byte begins a request.
    pub(super) fn is_between_messages(&self) -> bool {
        matches!(self.framing.state, State::Head { .. })
            && self.kept.is_empty()
            && self.came.is_empty()
    }

    /// Whether a request has begun whose head is not whole.
    pub(super) fn is_within_head(&self) -> bool {
        matches!(self.framing.state, State::Head { .. }) && !self.kept.is_empty()
    }

    /// Whether what was refused belongs to a request whose head has passed.
    pub(super) fn has_refused_body(&self) -> bool {
        matches!(self.framing.state, State::Refused { in_body: true, .. })
    }

    /// Continues what is kept with what came, as far as judging it can need.
    fn top_up(&mut self) {
        if !self.kept.is_empty() {
            let room = self.framing.unit_len_max().saturating_sub(self.kept.len());
            let more = self.came.split_to(room.min(self.came.len()));
            self.kept.extend_from_slice(&more);
        }
    }
}

/// Where in its messages a connection is.
#[derive(Debug)]
struct Framing {
    state: State,
    /// What follows the message at hand.
    then: Then,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head { is_after_empty_line: bool },
    Body { left: u64 },
    ChunkSize,
    Chunk { left: u64 },
    ChunkEnd,
    Trailers,
    Held,
    Refused { malformed: Malformed, in_body: bool },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Head,
    Held,
}

/// What one look at the bytes says.
enum Step {
    Pass(usize),
    Skip(usize),
    Wait,
}

/// Why judging stopped.
enum Stop {
    /// All bytes pass.
    Empty,
    /// This many bytes belong to no message.
    Skip(usize),
    Undecided,
    Refused,
}

impl Framing {
    /// How many bytes pass, and what is with those behind them.
    fn judge(&mut self, bytes: &[u8]) -> (usize, Stop) {
        let mut clear_len = 0;
        while let Some(rest) = bytes.get(clear_len..).filter(|rest| !rest.is_empty()) {
            match self.step(rest) {
                Ok(Step::Pass(len)) => clear_len += len,
                Ok(Step::Skip(len)) => return (clear_len, Stop::Skip(len)),
                Ok(Step::Wait) => return (clear_len, Stop::Undecided),
                Err(malformed) => {
                    let in_body = !matches!(self.state, State::Head { .. });
                    self.state = State::Refused { malformed, in_body };
                    return (clear_len, Stop::Refused);
                }
            }
        }
        (clear_len, Stop::Empty)
    }

    /// Never empty.
    fn step(&mut self, bytes: &[u8]) -> Result<Step, Malformed> {
        match &mut self.state {
            State::Head { is_after_empty_line } => {
                let Some(len) = head_len(bytes)? else { return Ok(Step::Wait) };
                if len == EMPTY_LINE.len() {
                    if *is_after_empty_line {
                        return Err(Malformed::EmptyLines);
                    }
                    *is_after_empty_line = true;
                    return Ok(Step::Skip(len));
                }
                let Message { body, is_upgrade } = check_head(&bytes[..len])?;
                self.then = if is_upgrade { Then::Held } else { Then::Head };
                match body {
                    Body::Sized(0) => self.end(),
                    Body::Sized(left) => self.state = State::Body { left },
                    Body::Chunked => self.state = State::ChunkSize,
                }
                Ok(Step::Pass(len))
            }
            State::Body { left } => {
                let len = take_up_to(left, bytes);
                if *left == 0 {
                    self.end();
                }
                Ok(Step::Pass(len))
            }
            State::ChunkSize => {
                let Some((len, size)) = chunk_size(bytes)? else { return Ok(Step::Wait) };
                self.state = if size == 0 { State::Trailers } else { State::Chunk { left: size } };
                Ok(Step::Pass(len))
            }
            State::Chunk { left } => {
                let len = take_up_to(left, bytes);
                if *left == 0 {
                    self.state = State::ChunkEnd;
                }
                Ok(Step::Pass(len))
            }
            State::ChunkEnd => {
                if bytes.starts_with(EMPTY_LINE) {
                    self.state = State::ChunkSize;
                    return Ok(Step::Pass(EMPTY_LINE.len()));
                }
                if bytes == b"\r" { Ok(Step::Wait) } else { Err(Malformed::ChunkEnd) }
            }
            State::Trailers => {
                let Some(len) = trailers_len(bytes)? else { return Ok(Step::Wait) };
                check_trailers(&bytes[..len])?;
                self.end();
                Ok(Step::Pass(len))
            }
            State::Held => Ok(Step::Wait),
            State::Refused { malformed, .. } => Err(*malformed),
        }
    }

    /// The message at hand is whole.
    fn end(&mut self) {
        self.state = match self.then {
            Then::Head => State::Head { is_after_empty_line: false },
            Then::Held => State::Held,
        };
    }

    /// The answer to an upgrade, which may come before its request has ended.
    fn resolve(&mut self, then: Then) {
        if self.then == Then::Held {
            self.then = then;
            if self.state == State::Held {
                self.end();
            }
        }
    }

    /// How many bytes are enough to judge what comes next.
    fn unit_len_max(&self) -> usize {
        match self.state {
            State::Head { .. } => HEAD_LEN_MAX + 1,
            State::ChunkSize => CHUNK_SIZE_LEN_MAX + 1,
            State::ChunkEnd => EMPTY_LINE.len(),
            State::Trailers => TRAILERS_LEN_MAX + 1,
            _ => usize::MAX,
        }
    }
}

const EMPTY_LINE: &[u8] = b"\r\n";

fn take_up_to(left: &mut u64, bytes: &[u8]) -> usize {
    let len = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
    *left -= len as u64;
    len
}

/// Where the head ends that these bytes begin with, once its end is here.
fn head_len(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    let line = &bytes[..bytes.len().min(REQUEST_LINE_LEN_MAX)];
    if line.len() == REQUEST_LINE_LEN_MAX && memchr(b'\n', line).is_none() {
        return Err(Malformed::RequestLineTooLong);
    }
    section_len(bytes, HEAD_LEN_MAX, Malformed::HeadTooLarge)
}

fn trailers_len(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
    section_len(bytes, TRAILERS_LEN_MAX, Malformed::TrailersTooLarge)
}

/// The length of the lines up to and with the first empty one. Refuses as soon as it can: a client
/// that ends its lines otherwise must not wait for an end that we never see.
fn section_len(
    bytes: &[u8],
    len_max: usize,
    too_large: Malformed,
) -> Result<Option<usize>, Malformed> {
    let section = &bytes[..bytes.len().min(len_max)];
    let mut start = 0;
    for end in memchr_iter(b'\n', section) {
        match &section[start..end] {
            [b'\r'] => return Ok(Some(end + 1)),
            [b' ' | b'\t', .., b'\r'] => return Err(Malformed::ObsFold),
            [.., b'\r'] => start = end + 1,
            _ => return Err(Malformed::BareLf),
        }
    }
    if bytes.len() > len_max { Err(too_large) } else { Ok(None) }
}

/// Length of the line and size of the chunk, once the line is here.
fn chunk_size(bytes: &[u8]) -> Result<Option<(usize, u64)>, Malformed> {
    let line = &bytes[..bytes.len().min(CHUNK_SIZE_LEN_MAX)];
    let digits = line.iter().take_while(|b| b.is_ascii_hexdigit()).count();
    match &line[digits..] {
        [b'\r', b'\n', ..] if digits > 0 => {}
        [] | [b'\r'] if line.len() < CHUNK_SIZE_LEN_MAX => return Ok(None),
        _ => return Err(Malformed::ChunkSize),
    }
    match httparse::parse_chunk_size(line) {
        Ok(Status::Complete((len, size))) if i64::try_from(size).is_ok() => Ok(Some((len, size))),
        _ => Err(Malformed::ChunkSize),
    }
}

struct Message {
    body: Body,
    is_upgrade: bool,
}

enum Body {
    Sized(u64),
    Chunked,
}

/// Judges a whole head, which consists of lines that end in CRLF and begin with no white space.
fn check_head(head: &[u8]) -> Result<Message, Malformed> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut request = Request::new(&mut []);
    match request.parse_with_uninit_headers(head, &mut headers) {
        Ok(Status::Complete(len)) if len == head.len() => {}
        Ok(_) => return Err(Malformed::RequestLine),
        Err(error) => return Err(unparsable(error, head)),
    }
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(Malformed::RequestLine);
    };
    if !is_method(method) {
        return Err(Malformed::Method);
    }
    let mut lines = Lines::default();
    for header in request.headers.iter() {
        lines.handle_header(head, header)?;
    }
    let is_http_11 = version == 1;
    check_host(method, target, lines.host, is_http_11)?;
    let body = match (lines.length, lines.is_chunked) {
        (Some(_), true) => return Err(Malformed::LengthAndEncoding),
        (None, true) if !is_http_11 => return Err(Malformed::EncodingInHttp10),
        (_, true) => Body::Chunked,
        (length, false) => Body::Sized(length.unwrap_or(0)),
    };
    let is_connect = method == "CONNECT";
    if is_connect && (lines.length.is_some() || lines.is_chunked) {
        return Err(Malformed::ConnectWithBody);
    }
    Ok(Message { body, is_upgrade: is_connect || lines.is_upgrade })
}

/// The headers that decide where a message ends and where it goes.
#[derive(Default)]
struct Lines<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    is_chunked: bool,
    is_upgrade: bool,
}

impl<'a> Lines<'a> {
    fn handle_header(&mut self, head: &[u8], header: &Header<'a>) -> Result<(), Malformed> {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        match header.name.len() {
            4 if is("host") => {
                if self.host.replace(header.value).is_some() {
                    return Err(Malformed::SeveralHosts);
                }
                if !is_plain(head, header) {
                    return Err(Malformed::Host);
                }
            }
            6 if is("expect") && !is_expectation(header.value) => return Err(Malformed::Expect),
            7 if is("upgrade") => self.is_upgrade = true,
            14 if is("content-length") => {
                if !is_plain(head, header) {
                    return Err(Malformed::ContentLength);
                }
                if self.length.replace(content_length(header.value)?).is_some() {
                    return Err(Malformed::SeveralLengths);
                }
            }
            17 if is("transfer-encoding") => {
                let is_one = !self.is_chunked && header.value.eq_ignore_ascii_case(b"chunked");
                if !is_one || !is_plain(head, header) {
                    return Err(Malformed::TransferEncoding);
                }
                self.is_chunked = true;
            }
            14 | 17 if is_lookalike(header.name) => return Err(Malformed::LookalikeName),
            _ => {}
        }
        Ok(())
    }
}

/// Whether only the usual space, or nothing, stands around the value. Parsers differ in what else
/// they take for white space.
fn is_plain(head: &[u8], header: &Header<'_>) -> bool {
    let offset = |bytes: &[u8]| (bytes.as_ptr() as usize).wrapping_sub(head.as_ptr() as usize);
    let name_end = offset(header.name.as_bytes()) + header.name.len();
    let (start, end) = (offset(header.value), offset(header.value) + header.value.len());
    let before = head.get(name_end..start).unwrap_or_default();
    let after = head.get(end..).unwrap_or_default();
    matches!(before, b":" | b": ") && after.starts_with(EMPTY_LINE)
}

/// RFC 9112 3.2: the form of the target follows from the method, and target and `Host` agree.
fn check_host(
    method: &str,
    target: &str,
    host: Option<&[u8]>,
    is_http_11: bool,
) -> Result<(), Malformed> {
    if !target.is_ascii() || target.contains('#') {
        return Err(Malformed::Target);
    }
    let host = host.map(Authority::parse).transpose()?;
    if is_http_11 && host.is_none() {
        return Err(Malformed::HostMissing);
    }
    let (authority, default) = match method {
        "CONNECT" => {
            let authority = Authority::parse(target.as_bytes())?;
            (authority, Some(authority.port.ok_or(Malformed::Target)?))
        }
        _ if target.starts_with('/') => return Ok(()),
        "OPTIONS" if target == "*" => return Ok(()),
        _ => absolute(target)?,
    };
    match host {
        Some(host) if !authority.is_same(&host, default) => Err(Malformed::HostMismatch),
        _ => Ok(()),
    }
}

/// Authority and default port of `http://host:port/path`.
fn absolute(target: &str) -> Result<(Authority<'_>, Option<u16>), Malformed> {
    let (scheme, rest) = target.split_once("://").ok_or(Malformed::Target)?;
    let default = match scheme {
        _ if scheme.eq_ignore_ascii_case("http") => 80,
        _ if scheme.eq_ignore_ascii_case("https") => 443,
        _ => return Err(Malformed::Target),
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    Ok((Authority::parse(&rest.as_bytes()[..end])?, Some(default)))
}

fn check_trailers(section: &[u8]) -> Result<(), Malformed> {
    if section == EMPTY_LINE {
        return Ok(());
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    match httparse::parse_headers(section, &mut headers) {
        Ok(Status::Complete((len, trailers))) if len == section.len() => {
            let is_allowed = trailers.iter().all(|trailer| is_trailer(trailer.name));
            if is_allowed { Ok(()) } else { Err(Malformed::TrailerName) }
        }
        Ok(_) => Err(Malformed::HeaderName),
        Err(httparse::Error::TooManyHeaders) => Err(Malformed::TrailersTooLarge),
        Err(error) => Err(unparsable(error, section)),
    }
}

fn unparsable(error: httparse::Error, section: &[u8]) -> Malformed {
    if section.windows(2).any(|pair| matches!(pair, [b'\r', next] if *next != b'\n')) {
        return Malformed::BareCr;
    }
    match error {
        httparse::Error::HeaderName => Malformed::HeaderName,
        httparse::Error::HeaderValue => Malformed::HeaderValue,
        httparse::Error::TooManyHeaders => Malformed::TooManyHeaders,
        httparse::Error::Version => Malformed::Version,
        _ => Malformed::RequestLine,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What passes of `pieces`, and the word of the refusal.
    fn fed<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Option<&'static str>) {
        let (mut gate, mut passed) = (Gate::new(), Vec::new());
        for piece in pieces {
            gate.handle_bytes(Bytes::copy_from_slice(piece));
            match drained(&mut gate) {
                Ok(more) => passed.extend(more),
                Err((more, malformed)) => {
                    passed.extend(more);
                    return (passed, Some(malformed.reason()));
                }
            }
        }
        (passed, None)
    }

    fn drained(gate: &mut Gate) -> Result<Vec<u8>, (Vec<u8>, Malformed)> {
        let mut passed = Vec::new();
        loop {
            match gate.poll_pass() {
                Ok(Some(bytes)) => passed.extend_from_slice(&bytes),
                Ok(None) => return Ok(passed),
                Err(malformed) => return Err((passed, malformed)),
            }
        }
    }

    /// The same at once and byte by byte.
    fn judged(bytes: &[u8]) -> (Vec<u8>, Option<&'static str>) {
        let at_once = fed([bytes]);
        assert_eq!(fed(bytes.chunks(1)), at_once, "{}", bytes.escape_ascii());
        at_once
    }

    fn after(gate: &mut Gate, bytes: &'static [u8]) -> Vec<u8> {
        gate.handle_bytes(Bytes::from_static(bytes));
        drained(gate).unwrap()
    }

    const GET: &str = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    const UPGRADE: &[u8] =
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";

    #[test]
    fn what_is_usual_passes_unchanged() {
        for usual in [
            GET.to_owned(),
            "GET / HTTP/1.0\r\n\r\n".to_owned(),
            "GET /a?b={c}|d HTTP/1.1\r\nhost:a\r\nx: \t y\u{e9} \r\nEmpty:\r\n\r\n".to_owned(),
            "OPTIONS * HTTP/1.1\r\nHost: web.mesh:80\r\n\r\n".to_owned(),
            "GET http://web.mesh HTTP/1.1\r\nHost: WEB.mesh:80\r\n\r\n".to_owned(),
            "GET HTTPS://[::1]:8443/a HTTP/1.1\r\nHost: [::1]:8443\r\n\r\n".to_owned(),
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n".to_owned() + GET,
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nGET /".to_owned() + GET,
            "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 1\r\n\r\n\n"
                .to_owned(),
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n".to_owned()
                + "a\r\n0\r\n\r\n0\r\n\r\n\r\n000F\r\n0123456789abcde\r\n0\r\n\r\n"
                + GET,
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned()
                + "1\r\na\r\n00\r\nContent-Digest: x\r\ny:\r\n\r\n"
                + GET,
        ] {
            assert_eq!(judged(usual.as_bytes()), (usual.clone().into_bytes(), None), "{usual:?}");
        }
    }

    #[test]
    fn one_empty_line_before_a_request_is_no_part_of_it() {
        let passed = |bytes: String| {
            let (passed, refused) = judged(bytes.as_bytes());
            (String::from_utf8(passed).unwrap(), refused)
        };
        assert_eq!(passed(format!("\r\n{GET}\r\n{GET}\r\n")), (format!("{GET}{GET}"), None));
        assert_eq!(passed(format!("{GET}\r\n\r\n{GET}")), (GET.into(), Some("empty_lines")));
        assert_eq!(passed(format!("\n{GET}")), (String::new(), Some("bare_lf")));
    }

    /// Each is refused with its word, and nothing of it passes.
    #[test]
    fn a_head_that_can_be_read_in_two_ways_is_refused_whole() {
        let long = |len: usize| "a".repeat(len);
        let with = |lines: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n");
        let line = |line: &str| format!("{line}\r\nHost: a\r\n\r\n");
        for (attack, word, head) in [
            (
                "CL.TE",
                "length_and_encoding",
                with("Content-Length: 5\r\nTransfer-Encoding: chunked"),
            ),
            (
                "TE.CL",
                "length_and_encoding",
                with("Transfer-Encoding: chunked\r\nContent-Length: 5"),
            ),
            ("CL.CL", "several_lengths", with("Content-Length: 5\r\nContent-Length: 6")),
            ("CL.CL equal", "several_lengths", with("Content-Length: 5\r\ncontent-length: 5")),
            ("CL list", "content_length", with("Content-Length: 5, 5")),
            ("CL plus", "content_length", with("Content-Length: +5")),
            ("CL minus", "content_length", with("Content-Length: -1")),
            ("CL hexadecimal", "content_length", with("Content-Length: 0x5")),
            ("CL octal", "content_length", with("Content-Length: 010")),
            ("CL fraction", "content_length", with("Content-Length: 5.0")),
            ("CL with a space in it", "content_length", with("Content-Length: 1 0")),
            ("CL empty", "content_length", with("Content-Length: ")),
            ("CL overflow", "content_length", with("Content-Length: 18446744073709551621")),
            ("CL signed overflow", "content_length", with("Content-Length: 9223372036854775808")),
            ("CL after a tab", "content_length", with("Content-Length:\t5")),
            ("CL before a space", "content_length", with("Content-Length: 5 ")),
            ("CL look-alike", "lookalike_name", with("Content_Length: 5")),
            (
                "TE.TE",
                "transfer_encoding",
                with("Transfer-Encoding: chunked\r\nTransfer-Encoding: x"),
            ),
            (
                "TE twice",
                "transfer_encoding",
                with("Transfer-Encoding: chunked\r\nTransfer-encoding: chunked"),
            ),
            ("TE list", "transfer_encoding", with("Transfer-Encoding: gzip, chunked")),
            ("TE identity", "transfer_encoding", with("Transfer-Encoding: identity")),
            ("TE not last", "transfer_encoding", with("Transfer-Encoding: chunked, identity")),
            ("TE quoted", "transfer_encoding", with("Transfer-Encoding: \"chunked\"")),
            ("TE prefix", "transfer_encoding", with("Transfer-Encoding: xchunked")),
            ("TE parameter", "transfer_encoding", with("Transfer-Encoding: chunked;a=b")),
            ("TE empty", "transfer_encoding", with("Transfer-Encoding:")),
            ("TE vertical tab", "header_value", with("Transfer-Encoding: \x0bchunked")),
            ("TE tab", "transfer_encoding", with("Transfer-Encoding:\tchunked")),
            ("TE look-alike", "lookalike_name", with("Transfer_Encoding: chunked")),
            ("TE behind a bare LF", "bare_lf", with("X: a\nTransfer-Encoding: chunked")),
            ("TE behind a bare CR", "bare_cr", with("X: a\rTransfer-Encoding: chunked")),
            ("TE and a space", "header_name", with("Transfer-Encoding : chunked")),
            ("TE and a tab", "header_name", with("Transfer-Encoding\t: chunked")),
            ("TE folded", "obs_fold", with("Transfer-Encoding:\r\n chunked")),
            (
                "TE in 1.0",
                "encoding_in_http10",
                "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
            ),
            ("first header indented", "obs_fold", line("GET / HTTP/1.1\r\n X: a")),
            ("NUL in a name", "header_name", with("X\0: a")),
            ("high byte in a name", "header_name", with("X\u{e9}: a")),
            ("no name", "header_name", with(": a")),
            ("no colon", "header_name", with("X")),
            ("NUL in a value", "header_value", with("X: a\0b")),
            ("expectation", "expect", with("Expect: 100-continue, x")),
            ("no host", "host_missing", "GET / HTTP/1.1\r\n\r\n".into()),
            ("two hosts", "several_hosts", with("Host: b")),
            ("the same host twice", "several_hosts", with("Host: a")),
            ("empty host", "host", "GET / HTTP/1.1\r\nHost: \r\n\r\n".into()),
            ("host with a path", "host", "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".into()),
            ("host list", "host", "GET / HTTP/1.1\r\nHost: a, b\r\n\r\n".into()),
            ("host with a user", "userinfo", "GET / HTTP/1.1\r\nHost: a@b\r\n\r\n".into()),
            ("host with a bad port", "host", "GET / HTTP/1.1\r\nHost: a:+80\r\n\r\n".into()),
            ("half an address", "host", "GET / HTTP/1.1\r\nHost: [\r\n\r\n".into()),
            ("absolute-form against Host", "host_mismatch", line("GET http://b/ HTTP/1.1")),
            ("absolute-form, another port", "host_mismatch", line("GET http://a:81/ HTTP/1.1")),
            ("absolute-form with a user", "userinfo", line("GET http://a@b/ HTTP/1.1")),
            ("absolute-form without host", "host", line("GET http:///a HTTP/1.1")),
            ("another scheme", "target", line("GET file://a/ HTTP/1.1")),
            ("asterisk-form", "target", line("GET * HTTP/1.1")),
            ("authority-form", "target", line("GET a:80 HTTP/1.1")),
            ("no slash", "target", line("GET index HTTP/1.1")),
            ("CONNECT to a path", "host", line("CONNECT / HTTP/1.1")),
            ("CONNECT without a port", "target", line("CONNECT a HTTP/1.1")),
            ("CONNECT against Host", "host_mismatch", line("CONNECT b:80 HTTP/1.1")),
            (
                "CONNECT with a body",
                "connect_with_body",
                line("CONNECT a:80 HTTP/1.1\r\nContent-Length: 1"),
            ),
            ("fragment", "target", line("GET /a#b HTTP/1.1")),
            ("high byte in the target", "target", line("GET /\u{e9} HTTP/1.1")),
            ("control in the target", "request_line", line("GET /\x01 HTTP/1.1")),
            ("two spaces", "request_line", line("GET  / HTTP/1.1")),
            ("space at the end", "request_line", line("GET / HTTP/1.1 ")),
            ("tab for a space", "request_line", line("GET\t/ HTTP/1.1")),
            ("space in the target", "version", line("GET /a b HTTP/1.1")),
            ("space before the method", "obs_fold", line(" GET / HTTP/1.1")),
            ("method in lower case", "method", line("head / HTTP/1.1")),
            ("HTTP/0.9", "request_line", "GET /\r\n\r\n".into()),
            ("HTTP/1.2", "version", line("GET / HTTP/1.2")),
            ("HTTP/2", "version", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".into()),
            ("version in lower case", "version", line("GET / http/1.1")),
            ("TLS", "bare_lf", "\x16\x03\x01\n".into()),
            ("bare LF everywhere", "bare_lf", "GET / HTTP/1.1\nHost: a\n\n".into()),
            ("CR CR LF", "bare_cr", line("GET / HTTP/1.1\r")),
            (
                "long request line",
                "request_line_too_long",
                line(&format!("GET /{} HTTP/1.1", long(8192))),
            ),
            ("endless request line", "request_line_too_long", long(8192)),
            ("long head", "head_too_large", with(&format!("X: {}", long(32 * 1024)))),
            ("many headers", "too_many_headers", with(&vec!["X: a"; 100].join("\r\n"))),
        ] {
            let stream = head.clone() + GET;
            assert_eq!(judged(stream.as_bytes()), (Vec::new(), Some(word)), "{attack}: {head:?}");
            let pipelined = judged(format!("{GET}{stream}").as_bytes());
            assert_eq!(pipelined, (GET.into(), Some(word)), "{attack}, pipelined");
        }
    }

    /// Chunk data before the fault passes; the message never ends.
    #[test]
    fn a_chunked_body_that_can_be_read_in_two_ways_is_refused() {
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let long = format!("X: {}\r\n\r\n", "a".repeat(8 * 1024));
        let many = "X: a\r\n".repeat(101) + "\r\n";
        for (attack, word, clear, bad) in [
            ("extension", "chunk_size", "", "1;a=b\r\nx\r\n"),
            ("extension that hides a line", "chunk_size", "", "1;\n\r\nx\r\n"),
            ("space after the size", "chunk_size", "", "1 \r\nx\r\n"),
            ("space before the size", "chunk_size", "", " 1\r\nx\r\n"),
            ("bare LF", "chunk_size", "", "1\nx\r\n"),
            ("bare CR", "chunk_size", "", "1\rx\r\n"),
            ("no digit", "chunk_size", "", "\r\n"),
            ("hexadecimal prefix", "chunk_size", "", "0x1\r\nx\r\n"),
            ("plus", "chunk_size", "", "+1\r\nx\r\n"),
            ("minus", "chunk_size", "", "-1\r\nx\r\n"),
            ("underscore", "chunk_size", "", "1_0\r\nx\r\n"),
            ("overflow", "chunk_size", "", "10000000000000001\r\nx\r\n"),
            ("signed overflow", "chunk_size", "", "8000000000000000\r\nx\r\n"),
            ("endless size", "chunk_size", "", "00000000000000000001\r\nx\r\n"),
            ("longer than it says", "chunk_end", "1\r\nx", "y\r\n0\r\n\r\n"),
            ("ends in a bare LF", "chunk_end", "1\r\nx", "\n0\r\n\r\n"),
            ("ends in a bare CR", "chunk_end", "1\r\nx", "\r0\r\n\r\n"),
            ("framing trailer", "trailer_name", "0\r\n", "Content-Length: 1\r\n\r\n"),
            ("routing trailer", "trailer_name", "0\r\n", "X: a\r\nhost: b\r\n\r\n"),
            ("forwarding trailer", "trailer_name", "0\r\n", "x_forwarded_for: ::1\r\n\r\n"),
            ("authenticating trailer", "trailer_name", "0\r\n", "Authorization: x\r\n\r\n"),
            ("our trailer", "trailer_name", "0\r\n", "X-Murmesh-Peer: x\r\n\r\n"),
            ("folded trailer", "obs_fold", "0\r\n", "X: a\r\n b\r\n\r\n"),
            ("trailer and a space", "header_name", "0\r\n", "X : a\r\n\r\n"),
            ("bare LF after the last chunk", "bare_lf", "0\r\n", "\n"),
            ("a request for trailers", "header_name", "0\r\n", "GET / HTTP/1.1\r\n\r\n"),
            ("long trailers", "trailers_too_large", "0\r\n", &long),
            ("many trailers", "trailers_too_large", "0\r\n", &many),
        ] {
            let (passed, refused) = judged(format!("{head}{clear}{bad}{GET}").as_bytes());
            assert_eq!(refused, Some(word), "{attack}");
            assert_eq!(String::from_utf8(passed).unwrap(), format!("{head}{clear}"), "{attack}");
        }
    }

    #[test]
    fn a_refused_client_stays_refused() {
        let mut gate = Gate::new();
        gate.handle_bytes(Bytes::from_static(b"\n"));
        assert_eq!(gate.poll_pass(), Err(Malformed::BareLf));
        assert!(!gate.wants_more());
        gate.handle_bytes(Bytes::from_static(GET.as_bytes()));
        assert_eq!(gate.poll_pass(), Err(Malformed::BareLf));
    }

    #[test]
    fn what_follows_a_request_to_upgrade_waits_for_the_answer() {
        for open in [UPGRADE, b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n"] {
            let mut gate = Gate::new();
            assert_eq!(after(&mut gate, open), open);
            assert_eq!(after(&mut gate, b"\n\x81\0"), b"");
            assert!(!gate.is_between_messages());
            gate.handle_bytes(Bytes::from_static(b"\n"));
            assert_eq!(gate.take_unpassed(), b"\n\x81\0\n"[..]);
        }
    }

    #[test]
    fn a_declined_upgrade_is_followed_by_requests() {
        let mut gate = Gate::new();
        assert_eq!(after(&mut gate, UPGRADE), UPGRADE);
        assert_eq!(after(&mut gate, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n\n"), b"");
        gate.declined();
        assert_eq!(gate.poll_pass().unwrap().unwrap(), GET);
        assert_eq!(gate.poll_pass(), Err(Malformed::BareLf));
    }

    #[test]
    fn what_nobody_asked_for_changes_nothing() {
        let mut gate = Gate::new();
        gate.declined();
        gate.handle_bytes(Bytes::from_static(b"\n"));
        assert_eq!(gate.poll_pass(), Err(Malformed::BareLf));
    }

    /// 64 KiB behind an upgrade, then reading stops.
    #[test]
    fn a_client_cannot_make_us_hold_more_than_the_bound() {
        let mut gate = Gate::new();
        after(&mut gate, UPGRADE);
        let mut held_len = 0;
        while gate.wants_more() {
            assert_eq!(after(&mut gate, &[0; 1024]), b"");
            held_len += 1024;
        }
        assert_eq!(held_len, HELD_LEN_MAX);
    }

    #[test]
    fn a_connection_rests_only_between_messages() {
        let mut gate = Gate::new();
        assert!(gate.is_between_messages());
        for (piece, rests) in [
            (&b"GE"[..], false),
            (b"T / HTTP/1.1\r\nHost: a\r\n\r\n", true),
            (b"\r", false),
            (b"\n", true),
            (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n1", false),
            (b"2", true),
        ] {
            after(&mut gate, piece);
            assert_eq!(gate.is_between_messages(), rests, "{}", piece.escape_ascii());
        }
    }

    /// A whole head and a body pass in the very buffer that they came in.
    #[test]
    fn what_comes_in_one_piece_is_not_copied() {
        let bytes = Bytes::from(format!(
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n123456789{GET}GET"
        ));
        let mut gate = Gate::new();
        gate.handle_bytes(bytes.clone());
        let passed = gate.poll_pass().unwrap().unwrap();
        assert_eq!(passed.as_ptr(), bytes.as_ptr());
        assert_eq!(passed, bytes[..bytes.len() - 3]);
    }

    /// Pieces of requests, good and bad, in any order.
    fn streams() -> impl Strategy<Value = Vec<u8>> {
        let word = prop::sample::select(vec![
            GET,
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\nContent-Length: 3\r\n\r\n",
            "GET / HTTP/1.1\r\n",
            "POST /a?b HTTP/1.1\r\nHost: a\r\n",
            "CONNECT a:1 HTTP/1.1\r\n",
            "Host: a\r\n",
            "Content-Length: 3\r\n",
            "Content-Length: 0\r\n",
            "Transfer-Encoding: chunked\r\n",
            "Upgrade: x\r\n",
            "X: y z\t\r\n",
            "\r\n",
            "\r\n",
            "\r\n",
            "abc",
            "3\r\nabc\r\n",
            "0\r\n\r\n",
            "\n",
            "\r",
            " ",
            "\0",
            ":",
            "\u{e9}",
        ]);
        let junk = any::<u8>().prop_map(|byte| vec![byte]);
        let part = prop_oneof![12 => word.prop_map(|word| word.as_bytes().to_vec()), 1 => junk];
        prop::collection::vec(part, 0..24).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn how_bytes_are_cut_changes_nothing(
            stream in streams(),
            cuts in prop::collection::vec(1..40_usize, 1..64),
        ) {
            let (mut rest, mut pieces) = (&stream[..], Vec::new());
            for cut in cuts.into_iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, more) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = more;
            }
            prop_assert_eq!(fed(pieces), fed([&stream[..]]));
        }

        /// Reads what passes as the standard says, with nothing but httparse and no leniency: it
        /// finds whole requests, and the last may lack only its end.
        #[test]
        fn what_passes_is_whole_requests_to_another_parser(stream in streams()) {
            let (passed, _) = fed([&stream[..]]);
            let mut rest = &passed[..];
            while !rest.is_empty() {
                let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
                let mut request = Request::new(&mut headers);
                let parsed = request.parse(rest);
                prop_assert!(matches!(parsed, Ok(Status::Complete(_))), "{}", rest.escape_ascii());
                let Ok(Status::Complete(len)) = parsed else { break };
                let value = |name: &str| request.headers.iter()
                    .find(|header| header.name.eq_ignore_ascii_case(name))
                    .map(|header| std::str::from_utf8(header.value).unwrap());
                rest = &rest[len..];
                if value("transfer-encoding").is_some() {
                    loop {
                        let Ok(Status::Complete((line, size))) = httparse::parse_chunk_size(rest)
                        else { prop_assert!(rest.is_empty()); break };
                        let len = (line + usize::try_from(size).unwrap() + 2).min(rest.len());
                        rest = &rest[len..];
                        if size == 0 { break }
                    }
                } else {
                    let len: usize = value("content-length").map_or(0, |len| len.parse().unwrap());
                    rest = &rest[len.min(rest.len())..];
                }
                let is_last = value("upgrade").is_some() || request.method == Some("CONNECT");
                prop_assert!(!is_last || rest.is_empty(), "something passed behind an upgrade");
            }
        }
    }
}
