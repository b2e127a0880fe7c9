//! A client's socket as hyper reads and writes it: what comes as HTTP/1.1 passes the gate.
//!
//! **A client that ends its side with its request is answered**, as scripts expect that pipe a request
//! into a socket. One that ends it later has stopped waiting: whoever closes a connection looks the
//! same to us, and an instance had better not work for nobody.

use std::future::{Future, pending};
use std::io::{self, ErrorKind, IoSlice};
use std::mem::take;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::time::{Sleep, sleep, timeout};

use super::chunks::Chunks;
use super::client::Client;
use crate::model::Moment;
use crate::proxy::local::LocalSocket;
use crate::proxy::stalls::{STALL_AFTER, Stalls};
use crate::proxy::wakes::Wakes;

/// How long a client may take from the first to the last byte of a head.
pub(super) const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// An end that comes so soon after a request belongs to it. A limit that the README states: on the wire a
/// client that closes looks as one that only ends its side, until something is written to it. Longer than
/// a script takes from its request to its end, shorter than people wait for answers.
const END_TIME_MAX: Duration = Duration::from_millis(250);
/// What is read at once.
pub(super) const READ_LEN_MAX: usize = 64 * 1024;
/// Stands where a head was refused, so that hyper asks for the answer to it.
const REFUSED: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\n\r\n";

/// A client's connection.
pub(super) struct ClientIo {
    pub(super) socket: LocalSocket,
    client: Arc<Client>,
    /// Read, judged where it has to be, and not yet asked for.
    pub(super) ahead: Bytes,
    /// Whether what comes is HTTP/1.1, which has to pass the gate.
    is_gated: bool,
    /// Of whoever reads: hyper looks for more than there is several times for each request.
    wakes: Wakes,
    /// Since when the client has said neither more nor its end.
    quiet_since: Option<Moment>,
    pub(super) has_ended: bool,
    /// Runs while a head is incomplete.
    head_time: Option<Pin<Box<Sleep>>>,
    /// Runs while the client takes nothing.
    stall: Option<BoxFuture<'static, ()>>,
}

impl ClientIo {
    /// `begun` is what the client said already.
    pub(super) fn new(
        socket: LocalSocket,
        client: Arc<Client>,
        begun: Bytes,
        is_gated: bool,
    ) -> Self {
        let (mut ahead, wakes) = (begun, Wakes::new());
        if is_gated {
            let mut front = client.front.lock();
            front.gate.handle_bytes(take(&mut ahead));
            front.reader = wakes.waker().clone();
        }
        Self {
            socket,
            client,
            ahead,
            is_gated,
            wakes,
            quiet_since: None,
            has_ended: false,
            head_time: None,
            stall: None,
        }
    }

    /// Waits for what may pass. Empty at the end.
    fn poll_passed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        self.wakes.concern(cx.waker());
        if !self.wakes.was_woken() {
            return Poll::Pending;
        }
        let waker = self.wakes.waker().clone();
        let passed = self.poll_gate(&mut Context::from_waker(&waker));
        if passed.is_ready() {
            self.wakes.remember(); // there may be more
        }
        passed
    }

    fn poll_gate(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        loop {
            if self.is_gated {
                let mut front = self.client.front.lock();
                match front.gate.poll_pass() {
                    Ok(Some(bytes)) => return Poll::Ready(Ok(bytes)),
                    Ok(None) => {}
                    Err(malformed) if front.gate.has_refused_body() => {
                        front.refused = Some(malformed);
                        return Poll::Ready(Err(io::Error::new(ErrorKind::InvalidData, malformed)));
                    }
                    Err(malformed) => {
                        if front.refused.replace(malformed).is_some() {
                            return Poll::Pending; // an end would overtake the answer, which closes
                        }
                        return Poll::Ready(Ok(Bytes::from_static(REFUSED)));
                    }
                }
                if !front.gate.wants_more() {
                    return Poll::Pending;
                }
            }
            let Poll::Ready(bytes) = self.socket.reader().poll_read(cx, READ_LEN_MAX)? else {
                self.quiet_since.get_or_insert_with(|| self.client.http.outbound.clock.now());
                ready!(self.poll_head_time(cx));
                return Poll::Ready(Err(ErrorKind::TimedOut.into()));
            };
            if !self.is_gated {
                return Poll::Ready(Ok(bytes));
            }
            let quiet_since = self.quiet_since.take();
            if bytes.is_empty() {
                let now = self.client.http.outbound.clock.now();
                let is_late = quiet_since.is_some_and(|since| now.since(since) > END_TIME_MAX);
                let is_within_body = self.client.front.lock().gate.is_within_body();
                if is_late && !is_within_body && self.client.is_answered() {
                    return Poll::Ready(Err(ErrorKind::ConnectionAborted.into()));
                }
                self.has_ended = true;
                return Poll::Ready(Ok(bytes));
            }
            self.client.front.lock().gate.handle_bytes(bytes);
        }
    }

    /// Ready when a head has taken too long.
    fn poll_head_time(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !(self.is_gated && self.client.front.lock().gate.is_within_head()) {
            self.head_time = None;
            return Poll::Pending;
        }
        self.head_time.get_or_insert_with(|| Box::pin(sleep(HEAD_TIME_MAX))).as_mut().poll(cx)
    }

    /// Reads on while hyper does not, during an answer, as far as it takes to see a client that has gone.
    fn look_ahead(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let may_have_gone = self.is_gated && !self.has_ended && self.client.is_answered();
        let has_enough = !self.ahead.is_empty();
        if !may_have_gone || has_enough || self.client.front.lock().refused.is_some() {
            return Ok(());
        }
        match self.poll_passed(cx) {
            Poll::Ready(Ok(bytes)) => self.ahead = bytes,
            // hyper hears it when it reads on, which may be after an answer.
            Poll::Ready(Err(error)) if error.kind() == ErrorKind::InvalidData => {}
            Poll::Ready(Err(error)) if error.kind() == ErrorKind::TimedOut => return Ok(()),
            Poll::Ready(Err(error)) => return Err(error),
            Poll::Pending => return Ok(()),
        }
        cx.waker().wake_by_ref(); // it may have asked just before
        Ok(())
    }

    /// A client that takes nothing for too long is given up.
    fn poll_patiently<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stall = None;
            return written;
        }
        let stall = self.stall.get_or_insert_with(|| {
            let idle_max = self.client.site.options.limits.timeout.idle();
            Box::pin(stalled(self.client.http.outbound.stalls.clone(), idle_max))
        });
        ready!(stall.as_mut().poll(cx));
        Poll::Ready(Err(ErrorKind::TimedOut.into()))
    }
}

/// Returns when a client has taken nothing for too long, or its memory is needed.
async fn stalled(stalls: Stalls, time_max: Duration) {
    sleep(STALL_AFTER).await;
    let _ = timeout(time_max, stalls.watch(pending::<()>())).await; // either way it is over
}

impl Chunks for ClientIo {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        if !self.ahead.is_empty() {
            return Poll::Ready(Ok(take(&mut self.ahead)));
        }
        self.poll_passed(cx)
    }

    fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.socket.writer().poll_write_slices(cx, slices);
        self.poll_patiently(cx, written)
    }

    /// hyper flushes whenever it has done something, and then waits without a look at the client.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = self.socket.writer().poll_flush(cx);
        ready!(self.poll_patiently(cx, flushed))?;
        Poll::Ready(self.look_ahead(cx))
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_gated {
            return Poll::Ready(Ok(())); // it may go on without hyper: whoever drives it ends it
        }
        pin!(self.socket.writer().end()).poll(cx)
    }
}
