//! Bodies on their way: a request's, which may have to be said again, and a response's.

use std::error::Error;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use hyper::HeaderMap;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep_until};

use super::acceptance::Acceptance;
use super::client::Answering;
use super::exchange::Carried;
use super::head;
use super::malformed::Malformed;
use super::noted::Noted;
use super::request_body::RequestBody;
use super::upstream::Kept;
use crate::model::Moment;
use crate::runtime::clock::Clock;

/// Bytes of a request's body that are kept until its response begins, so that another instance can be
/// asked; of a longer one nothing is. No more are said before the agent of the instance has taken the
/// connection: it may refuse it, and a request that nobody has had goes to another instance.
const REPEAT_LEN_MAX: usize = 64 * 1024;

/// A body ended before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BodyError {
    /// Whoever sends it went away.
    #[error("cut by its sender")]
    Cut,
    /// Whoever sends it sent what can be read in two ways.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// Nothing came for too long.
    #[error("nothing came for too long")]
    Idle,
    /// The time for the whole of it is over.
    #[error("not whole in time")]
    Late,
    /// Another attempt has taken its place.
    #[error("given up for another attempt")]
    Superseded,
}

/// Whether nothing is missing of a body that says no more. hyper shows a body of HTTP/2 that was
/// cancelled as one that has ended.
fn is_whole(body: &impl Body, is_http2: bool) -> bool {
    !is_http2 || body.is_end_stream() || body.size_hint().exact() == Some(0)
}

/// Whose turn it is in an exchange, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It owes more of the body.
    Client,
    /// Whoever has something to say.
    Either(Moment),
    Instance(Moment),
}

/// A piece of a body that can be said twice.
#[derive(Clone)]
enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl Piece {
    fn of(frame: &Frame<Bytes>) -> Option<Self> {
        let data = frame.data_ref().map(|data| Self::Data(data.clone()));
        data.or_else(|| frame.trailers_ref().map(|trailers| Self::Trailers(trailers.clone())))
    }

    fn into_frame(self) -> Frame<Bytes> {
        match self {
            Self::Data(data) => Frame::data(data),
            Self::Trailers(trailers) => Frame::trailers(trailers),
        }
    }
}

/// A request's body as the client sends it.
pub(super) struct Source {
    state: Mutex<Sourced>,
    hint: SizeHint,
}

struct Sourced {
    body: RequestBody,
    /// What was said so far; `None` once it is too much, or will not be needed.
    kept: Option<Vec<Piece>>,
    kept_len: usize,
    /// Read, and more than can be kept: it waits until the connection was taken.
    held: Option<Frame<Bytes>>,
    has_ended: bool,
    /// Why nothing more comes, once that is so.
    failure: Arc<OnceLock<BodyError>>,
    attempt: u32,
    patience: Patience,
    clock: Clock,
    /// Whether the client has to say more. One of HTTP/2 that has not said how much may stay open for as
    /// long as both sides talk.
    is_owed: bool,
    /// Whether the client is waited for.
    is_awaited: bool,
    /// When the client last said something.
    said_at: Moment,
}

impl Source {
    /// `None` when there is no body.
    pub(super) fn new(body: RequestBody, idle_max: Duration, clock: Clock) -> Option<Arc<Self>> {
        if body.is_end_stream() {
            return None;
        }
        let hint = body.size_hint();
        let is_owed = !body.is_http2() || hint.exact().is_some();
        let state = Sourced {
            body,
            kept: Some(Vec::new()),
            kept_len: 0,
            held: None,
            has_ended: false,
            failure: Arc::default(),
            attempt: 0,
            patience: Patience::new(idle_max, None),
            clock,
            is_owed,
            is_awaited: false,
            said_at: clock.now(),
        };
        Some(Arc::new(Self { state: Mutex::new(state), hint }))
    }

    /// Whose turn it is to say something.
    pub(super) fn turn(&self) -> Turn {
        let state = self.state.lock();
        match (state.is_awaited, state.is_owed) {
            (true, true) => Turn::Client,
            (true, false) => Turn::Either(state.said_at),
            (false, _) => Turn::Instance(state.said_at),
        }
    }

    /// The body from its beginning, as long as it can still be said from there. Those that were given
    /// out before end.
    pub(super) fn attempt(self: &Arc<Self>) -> Option<Upload> {
        let mut state = self.state.lock();
        if !state.can_repeat() {
            return None;
        }
        state.attempt += 1;
        state.is_awaited = false; // until somebody asks for it
        let (source, number) = (Arc::clone(self), state.attempt);
        Some(Upload(Some(Attempt { source, number, next: 0, acceptance: None })))
    }

    /// Whether all of it can be said again.
    pub(super) fn can_repeat(&self) -> bool {
        self.state.lock().can_repeat()
    }

    /// It will not be said again.
    pub(super) fn settle(&self) {
        self.state.lock().kept = None;
    }

    /// What is wrong with the client's side of it.
    pub(super) fn failure(&self) -> Option<BodyError> {
        self.state.lock().failure.get().copied()
    }

    /// The same, also once it is gone.
    pub(super) fn failure_to_come(&self) -> Arc<OnceLock<BodyError>> {
        Arc::clone(&self.state.lock().failure)
    }
}

impl Sourced {
    fn can_repeat(&self) -> bool {
        self.kept.is_some() && self.failure.get().is_none()
    }

    /// What is to be said next, on a connection of which `acceptance` tells whether it was taken.
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        acceptance: Option<&Acceptance>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = match self.held.take() {
            Some(frame) => frame,
            None => match ready!(self.poll_read(cx)) {
                Some(Ok(frame)) => frame,
                end => return Poll::Ready(end),
            },
        };
        let len = frame.data_ref().map_or(0, Bytes::len);
        if self.kept.is_some() && self.kept_len + len > REPEAT_LEN_MAX {
            if acceptance.is_some_and(|acceptance| acceptance.poll(cx).is_pending()) {
                self.held = Some(frame);
                return Poll::Pending;
            }
            self.kept = None;
        }
        self.kept_len += len;
        if let (Some(kept), Some(piece)) = (&mut self.kept, Piece::of(&frame)) {
            kept.push(piece);
        }
        Poll::Ready(Some(Ok(frame)))
    }

    /// What the client says next.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(failure) = self.failure.get().copied() {
            return Poll::Ready(Some(Err(failure)));
        }
        if self.has_ended {
            return Poll::Ready(None);
        }
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        self.is_awaited = frame.is_pending();
        if !self.is_awaited {
            self.said_at = self.clock.now();
        }
        let frame = match frame {
            Poll::Ready(Some(Ok(frame))) => frame,
            Poll::Ready(Some(Err(error))) => {
                return self.fail(malformed(&error).map_or(BodyError::Cut, BodyError::Malformed));
            }
            Poll::Ready(None) if !is_whole(&self.body, self.body.is_http2()) => {
                return self.fail(BodyError::Cut);
            }
            Poll::Ready(None) => {
                self.has_ended = true;
                return Poll::Ready(None);
            }
            Poll::Pending if !self.is_owed => return Poll::Pending,
            Poll::Pending => {
                ready!(self.patience.poll(cx));
                return self.fail(BodyError::Idle);
            }
        };
        self.patience.renew();
        if let Some(trailers) = frame.trailers_ref()
            && !trailers.keys().all(|name| head::is_trailer(name.as_str()))
        {
            return self.fail(Malformed::TrailerName.into()); // of HTTP/2, which no gate has read
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn fail(&mut self, failure: BodyError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.is_awaited = false;
        let failure = *self.failure.get_or_init(|| failure);
        Poll::Ready(Some(Err(failure)))
    }
}

/// What the gate refused, where that is why a body ends.
fn malformed(error: &hyper::Error) -> Option<Malformed> {
    let io = error.source()?.downcast_ref::<io::Error>()?;
    io.get_ref()?.downcast_ref().copied()
}

/// A request's body as one instance gets it; `None` when there is none.
pub(super) struct Upload(Option<Attempt>);

struct Attempt {
    source: Arc<Source>,
    number: u32,
    /// The piece to be said again next.
    next: usize,
    /// Of the connection that it is said on.
    acceptance: Option<Arc<Acceptance>>,
}

impl Upload {
    /// No body.
    pub(super) const EMPTY: Self = Self(None);

    /// Says no more than can be said again before this connection was taken.
    pub(super) fn wait_for(&mut self, acceptance: &Arc<Acceptance>) {
        if let Some(attempt) = &mut self.0 {
            attempt.acceptance = Some(Arc::clone(acceptance));
        }
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(attempt) = &mut self.0 else { return Poll::Ready(None) };
        let mut state = attempt.source.state.lock();
        if state.attempt != attempt.number {
            return Poll::Ready(Some(Err(BodyError::Superseded)));
        }
        let again = state.kept.as_ref().and_then(|kept| kept.get(attempt.next)).cloned();
        attempt.next += 1;
        if let Some(piece) = again {
            return Poll::Ready(Some(Ok(piece.into_frame())));
        }
        let frame = state.poll_frame(cx, attempt.acceptance.as_deref());
        if frame.is_pending() {
            attempt.next -= 1;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or(SizeHint::with_exact(0), |attempt| attempt.source.hint)
    }
}

/// The body of an answer: the mesh's own, or an instance's.
pub(super) enum Outgoing {
    /// What is still to be sent, and what the access log says once it was.
    Own {
        text: Option<Bytes>,
        noted: Option<Box<Noted>>,
    },
    Relay(Box<Download>),
}

impl Outgoing {
    /// No body.
    pub(super) const EMPTY: Self = Self::Own { text: None, noted: None };

    /// The body of a response that comes on `upstream`, if that is for this exchange alone.
    pub(super) fn relay(
        body: Incoming,
        upstream: Option<Kept>,
        carried: Carried,
        patience: Patience,
    ) -> Self {
        if body.is_end_stream() {
            carried.end(upstream);
            return Self::EMPTY;
        }
        let carried = Some(carried);
        Self::Relay(Box::new(Download { body, upstream, carried, patience, answering: None }))
    }
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match &mut *self {
            Self::Own { text, noted } => {
                let text = text.take();
                if let (Some(text), Some(noted)) = (&text, noted) {
                    noted.bytes().fetch_add(text.len() as u64, Ordering::Relaxed);
                }
                Poll::Ready(text.map(|text| Ok(Frame::data(text))))
            }
            Self::Relay(download) => download.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own { text, .. } => text.is_none(),
            Self::Relay(download) => download.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own { text, .. } => {
                SizeHint::with_exact(text.as_ref().map_or(0, |text| text.len() as u64))
            }
            Self::Relay(download) => download.body.size_hint(),
        }
    }
}

/// A response's body on its way to the client. Dropped before its end it cuts the exchange.
pub(super) struct Download {
    body: Incoming,
    /// The connection that it comes on, where it is for this exchange alone.
    upstream: Option<Kept>,
    carried: Option<Carried>,
    patience: Patience,
    /// Tells its client, of HTTP/1.1, how long it is under way.
    pub(super) answering: Option<Answering>,
}

impl Download {
    /// All of it was handed on.
    fn end(&mut self, cx: &mut Context<'_>) {
        if let Some(carried) = self.carried.take() {
            // Asked for once more, HTTP/2 reads the end of the message, and has room for another.
            let _ = Pin::new(&mut self.body).poll_frame(cx);
            carried.end(self.upstream.take());
        }
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.patience.is_over() {
            if let Some(carried) = &mut self.carried {
                carried.is_late();
            }
            return Poll::Ready(Some(Err(BodyError::Late)));
        }
        let body = &mut self.body;
        let frame = match &mut self.upstream {
            None => Pin::new(body).poll_frame(cx),
            Some(upstream) => match upstream.poll_for(cx, |cx| Pin::new(&mut *body).poll_frame(cx))
            {
                Poll::Ready(Some(frame)) => Poll::Ready(frame),
                Poll::Ready(None) | Poll::Pending => Poll::Pending, // what is over shows in the body
            },
        };
        match frame {
            Poll::Ready(Some(Ok(frame))) => {
                self.patience.renew();
                if let Some(carried) = &self.carried {
                    if let Some(data) = frame.data_ref() {
                        carried.count(data.len());
                    } else if let Some(trailers) = frame.trailers_ref() {
                        carried.handle_trailers(trailers);
                    }
                }
                // Nobody may ask for more: its length was said, or nothing follows trailers.
                if frame.is_trailers() || self.body.is_end_stream() {
                    self.end(cx);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(_))) => self.fail(BodyError::Cut),
            // A connection of HTTP/2 is for no exchange alone.
            Poll::Ready(None) if !is_whole(&self.body, self.upstream.is_none()) => {
                self.fail(BodyError::Cut)
            }
            Poll::Ready(None) => {
                self.end(cx);
                Poll::Ready(None)
            }
            Poll::Pending => {
                ready!(self.patience.poll(cx));
                self.fail(BodyError::Idle)
            }
        }
    }

    /// The instance does not say the rest.
    fn fail(&mut self, error: BodyError) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Some(carried) = &mut self.carried {
            carried.cut();
        }
        Poll::Ready(Some(Err(error)))
    }
}

/// A limit on how long nothing comes, and perhaps on the whole. Costs no timer while something comes.
pub(super) struct Patience {
    limit: Duration,
    /// When it is over whatever comes.
    until: Option<Instant>,
    renewed_at: Option<Instant>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    pub(super) fn new(limit: Duration, until: Option<Instant>) -> Self {
        Self { limit, until, renewed_at: None, sleep: None }
    }

    /// Whether it is over whatever comes.
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| until <= Instant::now())
    }

    /// When it is over unless something comes after `last`.
    fn end_after(&self, last: Instant) -> Instant {
        let end = last + self.limit;
        self.until.map_or(end, |until| until.min(end))
    }

    /// Something came.
    fn renew(&mut self) {
        if self.sleep.is_some() {
            self.renewed_at = Some(Instant::now());
        }
    }

    /// Nothing is there. Ready when it was so for too long.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut sleep = match self.sleep.take() {
            Some(sleep) => sleep,
            None => Box::pin(sleep_until(self.end_after(Instant::now()))),
        };
        while sleep.as_mut().poll(cx).is_ready() {
            let Some(renewed_at) = self.renewed_at.take() else { return Poll::Ready(()) };
            let end = self.end_after(renewed_at);
            if end <= Instant::now() {
                return Poll::Ready(());
            }
            sleep.as_mut().reset(end);
        }
        self.sleep = Some(sleep);
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::{advance, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_ends_a_limit_after_the_last_sign_of_life_and_at_its_end_in_any_case() {
        let secs = Duration::from_secs;
        let begun_at = Instant::now();
        let mut patience = Patience::new(secs(10), Some(begun_at + secs(25)));
        for _ in 0..2 {
            let early = timeout(secs(8), poll_fn(|cx| patience.poll(cx))).await;
            assert!(early.is_err(), "something comes every 8 s");
            patience.renew();
        }
        poll_fn(|cx| patience.poll(cx)).await;
        assert_eq!(begun_at.elapsed(), secs(25), "the whole may take 25 s");
        let mut patience = Patience::new(secs(10), None);
        assert!(timeout(secs(9), poll_fn(|cx| patience.poll(cx))).await.is_err());
        patience.renew();
        advance(secs(5)).await;
        poll_fn(|cx| patience.poll(cx)).await;
        assert_eq!(begun_at.elapsed(), secs(25 + 9 + 10));
    }
}
