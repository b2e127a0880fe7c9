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

mod heads;
#[cfg(test)]
mod tests;

use std::mem::take;

use bytes::{Buf, Bytes, BytesMut};
use httparse::Status;
use memchr::{memchr, memchr_iter};

use self::heads::{Body, Message, check_head, check_trailers};
use super::malformed::Malformed;

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
    /// The first line of the head that was refused.
    refused_line: Bytes,
}

impl Gate {
    /// Before the first request.
    pub(super) fn new() -> Self {
        let framing =
            Framing { state: State::Head { is_after_empty_line: false }, then: Then::Head };
        let (kept, came, refused_line) = Default::default();
        Self { framing, kept, came, refused_line }
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
                Stop::Refused => {
                    if !self.has_refused_body() {
                        let refused = if is_kept { &self.kept[..] } else { &self.came[..] };
                        self.refused_line = Bytes::copy_from_slice(first_line(refused));
                    }
                    (self.kept, self.came) = Default::default();
                }
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

    /// Whether a request has begun whose head has passed and whose body is not whole.
    pub(super) fn is_within_body(&self) -> bool {
        !matches!(self.framing.state, State::Head { .. } | State::Held | State::Refused { .. })
    }

    /// Whether what was refused belongs to a request whose head has passed.
    pub(super) fn has_refused_body(&self) -> bool {
        matches!(self.framing.state, State::Refused { in_body: true, .. })
    }

    /// Of a head that was refused, the first line as far as it came: 8 KiB at most.
    pub(super) fn refused_line(&self) -> &[u8] {
        &self.refused_line
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

fn first_line(bytes: &[u8]) -> &[u8] {
    let bytes = &bytes[..bytes.len().min(REQUEST_LINE_LEN_MAX)];
    let line = &bytes[..memchr(b'\n', bytes).unwrap_or(bytes.len())];
    line.strip_suffix(b"\r").unwrap_or(line)
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
