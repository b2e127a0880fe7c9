//! HTTP connections to instances, through the agents in front of them.
//!
//! HTTP/1.1 connections are kept between requests and belong to one exchange at a time; whoever has
//! one also drives it, so that a request costs no task of its own. An HTTP/2 connection is shared by
//! all exchanges with its instance and driven by a task.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures_util::FutureExt;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::TokioTimer;
use parking_lot::Mutex;
use tokio::time::timeout;

use super::acceptance::Acceptance;
use super::body::Upload;
use super::chunks::{Chunked, Chunks};
use super::pool::Stream;
use super::tasks::Tasks;
use super::whose::Whose;
use crate::proxy::local::LocalSocket;
use crate::proxy::stalls::Stalls;
use crate::proxy::tcp::{Cut, Leftover, carry, carry_locally};
use crate::proxy::traffic::Meter;
use crate::proxy::wakes::Wakes;
use crate::transport::tunnel::{Answer, Refusal, TunnelError, TunnelReader, TunnelWriter};

/// What is read of an instance at once, and what may wait to be written to it.
const BUFFER_LEN_MAX: usize = 64 * 1024;
/// Of a response's head. It may have hyper's default of 100 fields: for any other number hyper takes
/// memory for each response anew, which was 5 % of this agent's time.
const HEAD_LEN_MAX: usize = 64 * 1024;
/// What a stream of HTTP/2 may have on its way to us, in bytes.
const STREAM_WINDOW: u32 = 256 * 1024;
/// The same of a connection. Streams bound what waits here, for neither may a stalled one delay its neighbours. h2 allows small frames
/// that wait half of the connection's window, at 256 bytes each, and ends the connection above that.
const CONNECTION_WINDOW: u32 = 128 * 1024 * 1024;
/// How long it is waited for the word on how much an instance was given: it comes with the end.
const GIVEN_TIME_MAX: Duration = Duration::from_secs(1);

/// The way to an instance.
pub(super) enum Way {
    /// Through its agent. `header` is what of the tunnel's header is still unsent.
    Tunnel { writer: TunnelWriter, reader: TunnelReader, header: Bytes, is_open: bool },
    /// It is on this machine.
    Local(LocalSocket),
}

impl Way {
    /// What the instance says next; empty at its end. Notes in `fate` what its agent says before.
    fn poll_chunk(&mut self, cx: &mut Context<'_>, fate: &Fate) -> Poll<io::Result<Bytes>> {
        match self {
            Self::Local(socket) => socket.split().0.poll_read(cx, BUFFER_LEN_MAX),
            Self::Tunnel { reader, is_open, .. } => {
                if !*is_open {
                    match ready!(reader.poll_answer(cx)).map_err(io_error)? {
                        Answer::Accepted => {
                            *is_open = true;
                            fate.acceptance.accept();
                        }
                        Answer::Refused(refusal) => {
                            *fate.refusal.lock() = Some(refusal);
                            return Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into()));
                        }
                    }
                }
                let chunk = ready!(reader.poll_chunk(cx, BUFFER_LEN_MAX)).map_err(io_error)?;
                Poll::Ready(Ok(chunk.unwrap_or_default()))
            }
        }
    }

    fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Local(socket) => socket.split().1.poll_write_slices(cx, slices),
            Self::Tunnel { writer, header, .. } => {
                while !header.is_empty() {
                    let len = ready!(writer.poll_write(cx, header)).map_err(io_error)?;
                    header.advance(len);
                }
                let mut written = 0;
                for slice in slices.iter().filter(|slice| !slice.is_empty()) {
                    match writer.poll_write(cx, slice) {
                        Poll::Ready(Ok(len)) => written += len,
                        Poll::Ready(Err(error)) if written == 0 => {
                            return Poll::Ready(Err(io_error(error)));
                        }
                        Poll::Pending if written == 0 => return Poll::Pending,
                        Poll::Ready(Err(_)) | Poll::Pending => break, // the next write meets it again
                    }
                }
                Poll::Ready(Ok(written))
            }
        }
    }
}

/// What is known of a connection besides what it says.
pub(super) struct Fate {
    /// Whether its agent has taken it.
    acceptance: Arc<Acceptance>,
    /// Bytes that were written on it.
    written: AtomicU64,
    /// Of those, how many before the last request.
    begun_at: AtomicU64,
    /// Whether something waits to be written for which there was no room.
    is_blocked: AtomicBool,
    /// Why its agent refused it.
    refusal: Mutex<Option<Refusal>>,
    /// Of its reader: hyper looks for more than there is several times for each response, and each look
    /// takes the lock of the tunnel's connection.
    arrivals: Wakes,
}

impl Fate {
    fn new(is_accepted: bool) -> Self {
        Self {
            acceptance: Arc::new(Acceptance::new(is_accepted)),
            written: AtomicU64::new(0),
            begun_at: AtomicU64::new(0),
            is_blocked: AtomicBool::new(false),
            refusal: Mutex::new(None),
            arrivals: Wakes::new(),
        }
    }

    /// A request begins. Returns how many bytes were written before.
    fn begin(&self) -> u64 {
        let begun_at = self.written.load(Ordering::Relaxed);
        self.begun_at.store(begun_at, Ordering::Relaxed);
        begun_at
    }

    /// Whether a write that failed proves that the instance was given nothing of the last request.
    fn is_proof(&self, error: &io::Error) -> bool {
        let error = error.get_ref().and_then(|error| error.downcast_ref::<TunnelError>());
        let given = error.and_then(TunnelError::given);
        given.is_some_and(|given| given <= self.begun_at.load(Ordering::Relaxed))
    }

    /// What became of a request that ended with `error` on a connection of which `io` is left.
    async fn why_unanswered(
        &self,
        begun_at: u64,
        mut error: TrySendError<Request<Upload>>,
        io: UpstreamIo,
    ) -> Unanswered {
        let is_refused = self.refusal.lock().is_some();
        let is_begun = self.written.load(Ordering::Relaxed) > begun_at;
        if is_refused || error.take_message().is_some() || !is_begun {
            return self.unsent();
        }
        match io.given().await {
            Some(given) if given <= begun_at => Unanswered::Unsent,
            _ => {
                let is_unreadable = error.error().is_parse();
                let why = if is_unreadable { error.error().to_string() } else { String::new() };
                Unanswered::Unknown { why, is_unreadable }
            }
        }
    }

    /// Why a request did not reach the instance.
    fn unsent(&self) -> Unanswered {
        self.refusal.lock().clone().map_or(Unanswered::Unsent, Unanswered::Refused)
    }
}

/// A connection to an instance as hyper reads and writes it.
pub(super) struct UpstreamIo {
    way: Way,
    fate: Arc<Fate>,
    /// Nothing more can be written. What the instance said before, or how it went, is still to be
    /// read: an upload that is refused early has an answer.
    is_deaf: bool,
}

impl UpstreamIo {
    pub(super) fn new(way: Way) -> Self {
        let is_accepted = match &way {
            Way::Local(_) => true,
            Way::Tunnel { is_open, .. } => *is_open,
        };
        Self { way, fate: Arc::new(Fate::new(is_accepted)), is_deaf: false }
    }

    /// How many bytes the instance was given at most; `None` when nobody knows.
    async fn given(&self) -> Option<u64> {
        match &self.way {
            Way::Local(_) => None,
            Way::Tunnel { writer, .. } => timeout(GIVEN_TIME_MAX, writer.given()).await.ok()?,
        }
    }

    /// Says our end, so that the instance sees an idle connection closed and not cut.
    fn end(self) {
        match self.way {
            Way::Tunnel { mut writer, header, .. } if header.is_empty() => writer.end(),
            Way::Tunnel { .. } => {} // nothing was begun
            Way::Local(socket) => drop(socket.end().now_or_never()),
        }
    }

    /// Carries bytes between `client` and the instance until both have ended: what the instance said
    /// already goes first.
    pub(super) async fn carry(
        self,
        client: &mut LocalSocket,
        said: Bytes,
        from_client: Bytes,
        bytes: Meter<'_>,
        stalls: &Stalls,
    ) -> Result<(), Cut> {
        client.write_all(&said).await?;
        bytes.count_sent(said.len());
        let left = Leftover { chunks: vec![from_client], has_ended: false };
        match self.way {
            Way::Local(mut instance) => {
                carry_locally(client, &mut instance, left, bytes, stalls, None).await
            }
            Way::Tunnel { mut writer, mut reader, .. } => {
                carry(client, &mut writer, &mut reader, left, bytes, stalls, None).await?;
                writer.delivered().await;
                Ok(())
            }
        }
    }
}

impl Chunks for UpstreamIo {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        let arrivals = &self.fate.arrivals;
        arrivals.concern(cx.waker());
        if !arrivals.was_woken() {
            return Poll::Pending;
        }
        let chunk = self.way.poll_chunk(&mut arrivals.context(), &self.fate);
        if chunk.is_ready() {
            arrivals.remember(); // there may be more
        }
        chunk
    }

    fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if !self.is_deaf {
            let outcome = self.way.poll_write_slices(cx, slices);
            self.fate.is_blocked.store(outcome.is_pending(), Ordering::Relaxed);
            match ready!(outcome) {
                Ok(written) => {
                    self.fate.written.fetch_add(written as u64, Ordering::Relaxed);
                    return Poll::Ready(Ok(written));
                }
                Err(error) if self.fate.is_proof(&error) => return Poll::Ready(Err(error)),
                Err(_) => self.is_deaf = true,
            }
        }
        Poll::Ready(Ok(slices.iter().map(|slice| slice.len()).sum()))
    }

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(())) // nothing waits here
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.way {
            Way::Local(socket) => pin!(socket.split().1.end()).poll(cx),
            Way::Tunnel { writer, .. } => {
                writer.end();
                Poll::Ready(Ok(()))
            }
        }
    }
}

fn io_error(error: TunnelError) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

/// What came of a request that has no response.
#[derive(Debug)]
pub(super) enum Unanswered {
    /// No byte of it reached the instance.
    Unsent,
    /// The instance's agent refused the connection: no byte reached the instance.
    Refused(Refusal),
    /// The instance may have it.
    Unknown {
        /// What its connection tells of that; may be empty.
        why: String,
        /// Whether what it said instead of an answer cannot be read.
        is_unreadable: bool,
    },
}

/// A response whose head has come, and on what the rest of it comes.
pub(super) struct Brought {
    pub(super) response: Response<Incoming>,
    pub(super) whose: Arc<Whose>,
    /// The connection, where that is for this exchange alone.
    pub(super) kept: Option<Kept>,
    /// A place on the connection, where that is shared.
    pub(super) stream: Option<Stream>,
}

/// What hyper makes of a request.
type Sent = Result<Response<Incoming>, TrySendError<Request<Upload>>>;

/// A connection of HTTP/1.1 that one exchange has for itself.
pub(super) struct Kept {
    pub(super) whose: Arc<Whose>,
    sender: http1::SendRequest<Upload>,
    /// In a box: it passes through many hands.
    connection: Box<http1::Connection<Chunked<UpstreamIo>, Upload>>,
    fate: Arc<Fate>,
    /// Of the connection: most times that its exchange is polled, nothing has come on it.
    wakes: Wakes,
    is_over: bool,
}

impl Kept {
    /// A connection on which nothing was said yet.
    pub(super) async fn new(way: Way, whose: Arc<Whose>) -> hyper::Result<Self> {
        let io = UpstreamIo::new(way);
        let fate = Arc::clone(&io.fate);
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(HEAD_LEN_MAX)
            .writev(true)
            .handshake(Chunked::new(io))
            .await?;
        let (connection, wakes) = (Box::new(connection), Wakes::new());
        Ok(Self { whose, sender, connection, fate, wakes, is_over: false })
    }

    /// Sends a request and waits for the head of its response.
    pub(super) fn send(
        mut self,
        mut request: Request<Upload>,
    ) -> impl Future<Output = Result<Box<Brought>, Unanswered>> {
        let begun_at = self.fate.begin();
        request.body_mut().wait_for(&self.fate.acceptance);
        let answer = self.sender.try_send_request(request);
        async move {
            let mut answer = pin!(answer);
            let early = poll_fn(|cx| self.poll_for(cx, |cx| answer.as_mut().poll(cx))).await;
            match early {
                Some(Ok(response)) => {
                    let whose = Arc::clone(&self.whose);
                    Ok(Box::new(Brought { response, whose, kept: Some(self), stream: None }))
                }
                // In a box: it takes much room, and happens seldom.
                early => Err(Box::pin(self.why_unanswered(begun_at, early, answer)).await),
            }
        }
    }

    /// What became of the last request, which began after `begun_at` bytes.
    async fn why_unanswered(
        self,
        begun_at: u64,
        early: Option<Sent>,
        answer: impl Future<Output = Sent>,
    ) -> Unanswered {
        let Self { connection, fate, .. } = self;
        let io = connection.into_parts().io.connection; // whoever waits for it is told
        let late = match early {
            Some(answer) => answer,
            None => answer.await,
        };
        match late {
            // Cannot be: nothing could have come.
            Ok(_) => Unanswered::Unknown { why: String::new(), is_unreadable: false },
            Err(error) => fate.why_unanswered(begun_at, error, io).await,
        }
    }

    /// Drives the connection until `wanted` is there, which comes on it. `None` when the connection is
    /// over without.
    pub(super) fn poll_for<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut wanted: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<Option<T>> {
        self.wakes.concern_nobody(); // what the two tell each other here is heard here
        for _ in 0..2 {
            if let Poll::Ready(wanted) = wanted(&mut self.wakes.context()) {
                return Poll::Ready(Some(wanted));
            }
            if self.is_over {
                return Poll::Ready(None);
            }
            if !self.wakes.was_woken() {
                self.wakes.concern(cx.waker());
                if !self.wakes.was_woken() {
                    return Poll::Pending;
                }
                self.wakes.concern_nobody();
            }
            self.drive();
        }
        if let Poll::Ready(wanted) = wanted(&mut self.wakes.context()) {
            return Poll::Ready(Some(wanted));
        }
        cx.waker().wake_by_ref(); // it has more to do, and others their turn
        Poll::Pending
    }

    fn drive(&mut self) {
        let connection = &mut self.connection;
        self.is_over = connection.poll_without_shutdown(&mut self.wakes.context()).is_ready();
    }

    /// Whether nothing is left of the last exchange, as far as was read: neither a part of its response
    /// nor of a request that was answered early.
    pub(super) fn is_idle(&self) -> bool {
        let is_blocked = self.fate.is_blocked.load(Ordering::Relaxed);
        !self.is_over && !is_blocked && self.sender.is_ready()
    }

    /// Whether it can take another request: it is idle, and the instance has not closed it.
    pub(super) fn is_free(&mut self) -> bool {
        if !self.is_over && self.fate.arrivals.is_woken() {
            self.drive();
        }
        self.is_idle()
    }

    /// Ends the connection while nothing is under way on it.
    pub(super) fn end(self) {
        self.connection.into_parts().io.connection.end();
    }

    /// The connection itself, after an upgrade, with what the instance said behind its response.
    pub(super) fn into_io(self) -> (UpstreamIo, Bytes) {
        let parts = self.connection.into_parts();
        let Chunked { connection, unread } = parts.io;
        (connection, [parts.read_buf, unread].concat().into())
    }
}

/// A connection of HTTP/2 that all exchanges with an instance share. Cheap to clone.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) whose: Arc<Whose>,
    sender: http2::SendRequest<Upload>,
    fate: Arc<Fate>,
}

impl Shared {
    /// A connection on which nothing was said yet, driven in `tasks`.
    pub(super) async fn new(way: Way, whose: Arc<Whose>, tasks: Tasks) -> hyper::Result<Self> {
        let io = UpstreamIo::new(way);
        let fate = Arc::clone(&io.fate);
        let (sender, connection) = http2::Builder::new(tasks.clone())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(HEAD_LEN_MAX as u32)
            .handshake(Chunked::new(io))
            .await?;
        tasks.spawn("http2 upstream", async move {
            let _ = connection.await; // its exchanges are told
        });
        Ok(Self { whose, sender, fate })
    }

    /// Whether it takes another request.
    pub(super) fn is_open(&self) -> bool {
        !self.sender.is_closed()
    }

    /// Sends a request and waits for the head of its response, in a place on the connection.
    pub(super) fn send(
        mut self,
        mut request: Request<Upload>,
        stream: Option<Stream>,
    ) -> impl Future<Output = Result<Box<Brought>, Unanswered>> {
        request.body_mut().wait_for(&self.fate.acceptance);
        let answer = self.sender.try_send_request(request);
        async move {
            match answer.await {
                Ok(response) => {
                    Ok(Box::new(Brought { response, whose: self.whose, kept: None, stream }))
                }
                Err(error) => Err(self.why_unanswered(error)),
            }
        }
    }

    /// What became of a request that ended with `error`.
    fn why_unanswered(&self, mut error: TrySendError<Request<Upload>>) -> Unanswered {
        let is_refused = self.fate.refusal.lock().is_some();
        if is_refused || error.take_message().is_some() || was_not_processed(error.error()) {
            return self.fate.unsent();
        }
        let error = h2_error(error.error());
        let why = error.map(ToString::to_string).unwrap_or_default();
        // What this side of the connection ended, for it cannot read it.
        let is_unreadable = error.is_some_and(|error| {
            error.is_library() && error.reason() != Some(h2::Reason::ENHANCE_YOUR_CALM)
        });
        Unanswered::Unknown { why, is_unreadable }
    }
}

/// Whether the instance says that it has not begun with the request (RFC 9113, section 8.7).
fn was_not_processed(error: &hyper::Error) -> bool {
    h2_error(error).is_some_and(|error| {
        // A server that stops says up to which request it has gone. Those behind learn it as the end of
        // the connection without an error; those before as what ends the connection then.
        let has_stopped =
            error.is_go_away() && error.is_remote() && error.reason() == Some(h2::Reason::NO_ERROR);
        has_stopped || error.reason() == Some(h2::Reason::REFUSED_STREAM)
    })
}

/// What of HTTP/2 an error is about.
fn h2_error(error: &hyper::Error) -> Option<&h2::Error> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref() {
            return Some(error);
        }
        source = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use http::header::HOST;
    use hyper::body::Body;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::model::MemberId;
    use crate::proxy::pipe::pipe;

    #[tokio::test]
    async fn an_answer_wakes_its_task_once_and_what_hyper_tells_itself_does_not() {
        let (near, mut far) = pipe();
        let key = ("web".parse().unwrap(), MemberId::from_bytes([1; 16]), "a".parse().unwrap());
        let whose = Whose::new(key, &"b".parse().unwrap());
        let way = Way::Local(LocalSocket::of_task(near));
        let kept = Kept::new(way, Arc::new(whose)).await.unwrap();
        let request = Request::get("/").header(HOST, "a").body(Upload::EMPTY).unwrap();
        let mut send = pin!(kept.send(request));
        // A task that only remembers whether it was woken.
        let task = Wakes::new();
        let poll = |send: Pin<&mut _>| {
            assert!(task.was_woken());
            Future::poll(send, &mut task.context())
        };
        assert!(poll(send.as_mut()).is_pending());
        assert!(!task.was_woken(), "it was told nothing yet");
        let mut said = [0; 64];
        let len = far.read(&mut said).await.unwrap();
        assert!(said[..len].starts_with(b"GET / HTTP/1.1\r\n"));
        far.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        let Poll::Ready(Ok(brought)) = poll(send.as_mut()) else {
            panic!("the answer is there");
        };
        let Brought { response, kept: Some(mut kept), .. } = *brought else { panic!("its own") };
        let mut body = response.into_body();
        let frame = poll_fn(|_| {
            kept.poll_for(&mut task.context(), |cx| Pin::new(&mut body).poll_frame(cx))
        });
        let frame = frame.await.unwrap().unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "ok");
        assert!(!task.was_woken(), "all of it came with one wake");
        assert!(kept.is_idle() && kept.is_free());
        drop(far);
        assert!(!task.was_woken(), "nobody uses it");
        assert!(kept.is_idle() && !kept.is_free(), "that it was closed shows when it is taken");
    }
}
