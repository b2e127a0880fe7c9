//! One tunnel: a QUIC stream that carries one connection between two agents.
//!
//! The caller writes a header and at once, without waiting, the first bytes. The far agent answers
//! with one frame, [`Answer::Accepted`] or a [`Refusal`], before anything else:
//!
//! ```text
//! header   length (2 bytes, big-endian, at most 1,024), then a versioned value of `wire`
//! answer   1 accepted | 2 refused, code (1), length (1), reason
//! ```
//!
//! Two rules hold here. *A refusal proves that no byte reached the application*: the far agent
//! refuses only before its first write to it. *A cut tunnel never looks complete*: quinn finishes a
//! stream that is dropped, so both halves live in guards that reset unless they were ended. A reset
//! throws away what was said and is not read yet; where the instance's end is that of the tunnel its
//! last words count, and the cut is said apart ([`TunnelReader::stop_at`]).

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{Connection, ReadError, RecvStream, SendStream, StoppedError, VarInt, WriteError};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::credit::Place;
use crate::model::{InstanceId, ServiceName};
use crate::wire::{self, WireError};

/// Longest header, in bytes. Three names and a few numbers take 200.
pub const HEADER_LEN_MAX: usize = 1_024;
/// How long an accepted stream may take to say its header.
pub const HEADER_TIME_MAX: Duration = Duration::from_secs(10);

/// How long opening waits for the peer to grant another stream.
const GRANT_TIME_MAX: Duration = Duration::from_secs(1);
const REASON_LEN_MAX: usize = 120;
const ACCEPTED: u8 = 1;
const REFUSED: u8 = 2;

/// What the caller wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The service.
    pub service: ServiceName,
    /// The instance that the caller picked.
    pub instance: InstanceId,
    /// As which local service the caller calls. `None`: as the member itself, which the
    /// certificate proves.
    pub source: Option<ServiceName>,
    /// How the bytes are to be treated.
    pub mode: Mode,
    /// Whether the caller has nobody else: then it is let through to an instance that the mesh has
    /// ejected.
    pub insists: bool,
}

impl wire::Payload for Header {
    const VERSION: u8 = 2;

    fn appended_after(version: u8) -> Result<Vec<u8>, WireError> {
        match version {
            1 => wire::encode(&false),
            _ => Ok(Vec::new()),
        }
    }
}

/// How the far agent treats the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mode(pub u8);

impl Mode {
    /// Carried unread, each direction with an end of its own.
    pub const SPLICE: Self = Self(0);
    /// HTTP/1.1 requests, one after the other. Once the instance has said its end it is given nothing
    /// more, and the caller hears how many bytes it was given ([`TunnelWriter::given`]): a request that
    /// lies behind them never reached it.
    pub const HTTP1: Self = Self(1);
    /// One HTTP/2 connection, else as [`HTTP1`](Self::HTTP1).
    pub const HTTP2: Self = Self(2);

    /// Whether the instance's end is the end of the whole tunnel.
    pub fn ends_with_instance(self) -> bool {
        matches!(self, Self::HTTP1 | Self::HTTP2)
    }
}

impl Header {
    /// The header as it travels.
    pub fn encode(&self) -> Result<Bytes, WireError> {
        let payload = wire::encode_payload(self)?;
        if payload.len() > HEADER_LEN_MAX {
            return Err(WireError::TooLong { len: payload.len() });
        }
        let mut frame = BytesMut::with_capacity(2 + payload.len());
        frame.put_u16(payload.len() as u16); // at most HEADER_LEN_MAX
        frame.put_slice(&payload);
        Ok(frame.freeze())
    }
}

/// What the far agent says to a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The instance is connected; its bytes follow.
    Accepted,
    /// No byte has reached the instance.
    Refused(Refusal),
}

/// A tunnel that the far agent did not open. No byte has reached the application.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {reason}")]
pub struct Refusal {
    /// Why, for programs.
    pub code: RefusalCode,
    /// Why, for people.
    pub reason: String,
}

impl Refusal {
    /// A refusal with its reason.
    pub fn new(code: RefusalCode, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into() }
    }

    fn encode(&self) -> Bytes {
        let mut len = self.reason.len().min(REASON_LEN_MAX);
        while !self.reason.is_char_boundary(len) {
            len -= 1;
        }
        let mut frame = BytesMut::with_capacity(3 + len);
        frame.put_slice(&[REFUSED, self.code.0, len as u8]); // at most REASON_LEN_MAX
        frame.put_slice(&self.reason.as_bytes()[..len]);
        frame.freeze()
    }
}

/// Why a tunnel was refused. Codes of a newer version print as their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RefusalCode(pub u8);

impl RefusalCode {
    /// The instance is not served here any more. Fault: a stale catalogue.
    pub const NOT_SERVED: Self = Self(1);
    /// The instance or its agent takes nothing new. Fault: nobody's.
    pub const DRAINING: Self = Self(2);
    /// The instance does not accept connections. Fault: the instance.
    pub const UNREACHABLE: Self = Self(3);
    /// The agent or the instance has too much to do. Fault: load.
    pub const OVERFLOW: Self = Self(4);
    /// A rule forbids it. Fault: the operator, or the caller.
    pub const DENIED: Self = Self(5);
    /// The header cannot be read, or asks for what this version cannot do. Fault: the caller.
    pub const UNSUPPORTED: Self = Self(6);
    /// The mesh has ejected the instance, and this is not the call that may try it. Fault: nobody's.
    pub const EJECTED: Self = Self(7);

    /// Whether another instance may answer differently: all but a rule, which is the same
    /// everywhere.
    pub fn is_retryable(self) -> bool {
        self != Self::DENIED
    }

    /// A fixed word for metrics and events.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NOT_SERVED => "not_served",
            Self::DRAINING => "draining",
            Self::UNREACHABLE => "unreachable",
            Self::OVERFLOW => "overflow",
            Self::DENIED => "denied",
            Self::UNSUPPORTED => "unsupported",
            Self::EJECTED => "ejected",
            Self(_) => "refused",
        }
    }
}

impl std::fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// Why a tunnel is reset, as the QUIC application error code of its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ResetCode {
    /// The connection behind the other half was cut.
    Cut = 1,
    /// Its reader took nothing for so long that its memory was needed.
    Stalled = 2,
    /// The header or the answer was not understood.
    Malformed = 4,
}

/// Codes from here on say how many bytes the instance was given before its end: the code less this,
/// and less [`WAS_CUT`].
const GIVEN: u64 = 256;
/// In a code that says how much was given: the instance was cut, and the end of what it said is none.
/// A reset would say so, too, but throws away what was said before and is not read yet.
const WAS_CUT: u64 = 1 << 61;

impl From<ResetCode> for VarInt {
    fn from(code: ResetCode) -> Self {
        VarInt::from_u32(code as u32)
    }
}

/// A tunnel could not be opened on this connection. Nothing was sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The peer grants no further stream. Fault: load. Retry: on another instance.
    #[error("peer granted no stream within {GRANT_TIME_MAX:?}")]
    Overflow,
    /// The connection is gone. Fault: peer or network. Retry: on a new connection.
    #[error("connection lost: {0}")]
    Lost(#[from] quinn::ConnectionError),
}

/// A tunnel ended otherwise than by its end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelError {
    /// The peer wants no more of our bytes; its own may still come.
    #[error("peer stopped reading (code {0})")]
    Stopped(VarInt),
    /// The peer cut it.
    #[error("peer reset (code {0})")]
    Reset(VarInt),
    /// The connection is gone.
    #[error("connection lost: {0}")]
    Lost(quinn::ConnectionError),
    /// What came is no header or no answer.
    #[error("malformed {0}")]
    Malformed(&'static str),
}

impl TunnelError {
    /// How many of our bytes the instance was given at most, where the peer stopped reading because
    /// its instance had said its end.
    pub fn given(&self) -> Option<u64> {
        match self {
            Self::Stopped(code) => (code.into_inner() & !WAS_CUT).checked_sub(GIVEN),
            _ => None,
        }
    }
}

impl From<ReadError> for TunnelError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::Reset(code),
            ReadError::ConnectionLost(error) => Self::Lost(error),
            _ => Self::Lost(quinn::ConnectionError::LocallyClosed), // closed by us, or 0-RTT
        }
    }
}

impl From<WriteError> for TunnelError {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Stopped(code) => Self::Stopped(code),
            WriteError::ConnectionLost(error) => Self::Lost(error),
            _ => Self::Lost(quinn::ConnectionError::LocallyClosed), // closed by us, or 0-RTT
        }
    }
}

/// Opens a tunnel: nothing is sent before the first write.
pub(super) async fn open(
    connection: &Connection,
    place: Place,
) -> Result<(TunnelWriter, TunnelReader), OpenError> {
    match timeout(GRANT_TIME_MAX, connection.open_bi()).await {
        Ok(Ok((send, receive))) => {
            Ok((TunnelWriter::new(send), TunnelReader::new(receive, Some(place))))
        }
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(OpenError::Overflow),
    }
}

/// Our bytes to the peer. Dropped before its end it resets.
#[derive(Debug)]
pub struct TunnelWriter {
    inner: SendStream,
    drop_code: ResetCode,
    is_ended: bool,
}

impl TunnelWriter {
    pub(super) fn new(inner: SendStream) -> Self {
        Self { inner, drop_code: ResetCode::Cut, is_ended: false }
    }

    /// Writes some of `chunk` and leaves in it what is still to be written. Cancel safe.
    pub async fn write_some(&mut self, chunk: &mut Bytes) -> Result<(), TunnelError> {
        self.inner.write_chunks(std::slice::from_mut(chunk)).await?;
        Ok(())
    }

    /// Writes all of `chunk`. Not cancel safe.
    pub async fn write(&mut self, mut chunk: Bytes) -> Result<(), TunnelError> {
        while !chunk.is_empty() {
            self.write_some(&mut chunk).await?;
        }
        Ok(())
    }

    /// The end of our bytes: the peer reads all of them and then an end.
    pub fn end(&mut self) {
        let _ = self.inner.finish(); // fails only on a stream that is ended or reset already
        self.is_ended = true;
    }

    /// Returns true once the peer has all bytes up to the end; false when it never will.
    pub async fn delivered(&self) -> bool {
        let outcome: Result<_, StoppedError> = self.inner.stopped().await;
        self.is_ended && outcome == Ok(None)
    }

    /// Writes some of `bytes` and says how many. They are copied.
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, TunnelError>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes).map_err(TunnelError::from)
    }

    /// Returns when the peer wants no more of our bytes, or has all of them, or is gone.
    pub fn unwanted(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = self.inner.stopped();
        async move { drop(stopped.await) }
    }

    /// How many of our bytes the instance was given at most, once its agent says that there will be no
    /// more; `None` when that will never be known. Cancel safe.
    pub async fn given(&self) -> Option<u64> {
        TunnelError::Stopped(self.inner.stopped().await.ok()??).given()
    }

    /// Says that it accepts the tunnel.
    pub async fn accept(&mut self) -> Result<(), TunnelError> {
        self.write(Bytes::from_static(&[ACCEPTED])).await
    }

    /// Says why it does not, as the only thing on this tunnel. Returns when the peer has heard it.
    pub async fn refuse(mut self, refusal: &Refusal) -> Result<(), TunnelError> {
        self.write(refusal.encode()).await?;
        self.end();
        self.delivered().await;
        Ok(())
    }

    /// What the peer is told should this be dropped before its end.
    pub fn set_drop_code(&mut self, code: ResetCode) {
        self.drop_code = code;
    }
}

impl Drop for TunnelWriter {
    fn drop(&mut self) {
        if !self.is_ended {
            let _ = self.inner.reset(self.drop_code.into()); // already gone: nothing to reset
        }
    }
}

/// What a peer says of our bytes, once it has said its last word on them.
struct Stopping(Pin<Box<dyn Future<Output = Result<Option<VarInt>, StoppedError>> + Send + Sync>>);

impl std::fmt::Debug for Stopping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stopping")
    }
}

/// The peer's bytes to us. Dropped before its end it asks the peer to stop.
#[derive(Debug)]
pub struct TunnelReader {
    inner: RecvStream,
    is_ended: bool,
    /// Where the end of the peer's bytes may be that of a connection that was cut.
    stopping: Option<Stopping>,
    place: Option<Place>,
    /// As much of the answer as has come, until it is whole.
    answer: Vec<u8>,
}

impl TunnelReader {
    /// A tunnel that holds `place`, if it has one already.
    pub(super) fn new(inner: RecvStream, place: Option<Place>) -> Self {
        Self { inner, is_ended: false, stopping: None, place, answer: Vec::new() }
    }

    /// Holds `place` from now on.
    pub(super) fn take(&mut self, place: Place) {
        self.place = Some(place);
    }

    /// From now on the end is one only if what the peer says of the bytes of `writer` agrees: for
    /// tunnels whose mode [ends with the instance](Mode::ends_with_instance).
    pub fn end_as_said_of(&mut self, writer: &TunnelWriter) {
        self.stopping = Some(Stopping(Box::pin(writer.inner.stopped())));
    }

    /// Reads what is there into `chunks` and says how many it filled; `None` at the end. Cancel
    /// safe.
    pub async fn read_chunks(
        &mut self,
        chunks: &mut [Bytes],
    ) -> Result<Option<usize>, TunnelError> {
        let filled = self.inner.read_chunks(chunks).await?;
        if filled.is_none() {
            poll_fn(|cx| self.poll_end(cx)).await?;
        }
        Ok(filled)
    }

    /// The peer's bytes are read. Whether that was their end.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        self.is_ended = true;
        if let Some(stopping) = &mut self.stopping {
            let stopped = ready!(stopping.0.as_mut().poll(cx));
            self.stopping = None;
            match stopped {
                Ok(Some(code)) if code.into_inner() & WAS_CUT != 0 => {
                    return Poll::Ready(Err(TunnelError::Reset(ResetCode::Cut.into())));
                }
                Err(StoppedError::ConnectionLost(error)) => {
                    return Poll::Ready(Err(TunnelError::Lost(error)));
                }
                Ok(_) | Err(StoppedError::ZeroRttRejected) => {}
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads the header that a new tunnel begins with.
    pub async fn header(&mut self) -> Result<Header, TunnelError> {
        let mut len = [0; 2];
        self.fill(&mut len, "header").await?;
        let len = usize::from(u16::from_be_bytes(len));
        if len > HEADER_LEN_MAX {
            return Err(TunnelError::Malformed("header"));
        }
        let mut payload = vec![0; len];
        self.fill(&mut payload, "header").await?;
        wire::decode_payload(&payload).map_err(|_| TunnelError::Malformed("header"))
    }

    /// Reads the answer that the peer's bytes begin with. Cancel safe.
    pub async fn answer(&mut self) -> Result<Answer, TunnelError> {
        poll_fn(|cx| self.poll_answer(cx)).await
    }

    /// Reads the answer that the peer's bytes begin with. Once it is there the instance's bytes follow.
    pub fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Result<Answer, TunnelError>> {
        loop {
            let missing = match self.answer[..] {
                [] => 1,
                [ACCEPTED] => {
                    self.answer = Vec::new();
                    return Poll::Ready(Ok(Answer::Accepted));
                }
                [REFUSED] => 2,
                [REFUSED, _] => 1,
                [REFUSED, code, len, ref reason @ ..] => match usize::from(len) - reason.len() {
                    0 => {
                        let reason = String::from_utf8_lossy(reason).into_owned();
                        let refusal = Refusal { code: RefusalCode(code), reason };
                        return Poll::Ready(Ok(Answer::Refused(refusal)));
                    }
                    missing => missing,
                },
                _ => return Poll::Ready(Err(TunnelError::Malformed("answer"))),
            };
            let mut buffer = [0; u8::MAX as usize];
            match ready!(self.inner.poll_read(cx, &mut buffer[..missing]))? {
                0 => return Poll::Ready(Err(TunnelError::Malformed("answer"))),
                len => self.answer.extend_from_slice(&buffer[..len]),
            }
        }
    }

    /// Reads what is there, at most `len_max` bytes; `None` at the end.
    pub fn poll_chunk(
        &mut self,
        cx: &mut Context<'_>,
        len_max: usize,
    ) -> Poll<Result<Option<Bytes>, TunnelError>> {
        let chunk = ready!(pin!(self.inner.read_chunk(len_max, true)).poll(cx))?;
        if chunk.is_none() {
            ready!(self.poll_end(cx))?;
        }
        Poll::Ready(Ok(chunk.map(|chunk| chunk.bytes)))
    }

    /// Wants no more of the peer's bytes: the instance, which has had `given` of them at most, has
    /// said its end, or was cut.
    pub fn stop_at(&mut self, given: u64, was_cut: bool) {
        let code = GIVEN + given + if was_cut { WAS_CUT } else { 0 };
        let code = VarInt::from_u64(code).unwrap_or(VarInt::MAX);
        let _ = self.inner.stop(code); // already gone: nothing to stop
        self.is_ended = true;
    }

    /// Wants no more of the peer's bytes.
    pub fn stop(&mut self, code: ResetCode) {
        let _ = self.inner.stop(code.into()); // already gone: nothing to stop
        self.is_ended = true;
    }

    async fn fill(&mut self, buffer: &mut [u8], what: &'static str) -> Result<(), TunnelError> {
        self.inner.read_exact(buffer).await.map_err(|error| match error {
            quinn::ReadExactError::FinishedEarly(_) => TunnelError::Malformed(what),
            quinn::ReadExactError::ReadError(error) => error.into(),
        })
    }
}

impl Drop for TunnelReader {
    fn drop(&mut self) {
        if !self.is_ended {
            self.stop(ResetCode::Cut);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            service: "web".parse().unwrap(),
            instance: "web-1".parse().unwrap(),
            source: Some("checkout".parse().unwrap()),
            mode: Mode::SPLICE,
            insists: false,
        }
    }

    #[test]
    fn frames_are_frozen() {
        // Agents of neighbouring versions speak these bytes to each other.
        assert_eq!(
            &header().encode().unwrap()[..],
            b"\x00\x17\x02\x03web\x05web-1\x01\x08checkout\x00\x00"
        );
        let before = b"\x01\x03web\x05web-1\x01\x08checkout\x00";
        assert_eq!(wire::decode_payload::<Header>(before).unwrap(), header());
        let refusal = Refusal::new(RefusalCode::DRAINING, "bye");
        assert_eq!(&refusal.encode()[..], b"\x02\x02\x03bye");
    }

    #[test]
    fn longest_names_fit_the_header_and_long_reasons_are_cut_between_characters() {
        let name = "x".repeat(63);
        let header = Header {
            service: name.parse().unwrap(),
            instance: name.parse().unwrap(),
            source: Some(name.parse().unwrap()),
            mode: Mode(255),
            insists: true,
        };
        assert!(header.encode().unwrap().len() < HEADER_LEN_MAX);
        let refusal = Refusal::new(RefusalCode::DENIED, "ä".repeat(200) + "b");
        assert_eq!(refusal.encode().len(), 3 + REASON_LEN_MAX);
        let refusal = Refusal::new(RefusalCode::DENIED, "a".to_owned() + &"ä".repeat(200));
        assert_eq!(refusal.encode().len(), 3 + REASON_LEN_MAX - 1);
    }

    #[test]
    fn only_a_rule_is_the_same_on_every_instance() {
        for code in 0..=255 {
            assert_eq!(RefusalCode(code).is_retryable(), code != RefusalCode::DENIED.0);
        }
    }

    proptest::proptest! {
        #[test]
        fn junk_is_no_header_and_no_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = wire::decode_payload::<Header>(&bytes);
        }
    }
}
