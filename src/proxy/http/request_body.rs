//! A request's body as its client sends it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::downstream::STREAM_WINDOW;
use super::tasks::Tasks;

/// So much is still heard of a body that nobody wants: what may be on its way. A client that has more to
/// say is better told to stop.
const REST_LEN_MAX: usize = STREAM_WINDOW as usize;
/// For so long: a stream that is listened to counts among those that its connection may have.
const REST_TIME_MAX: Duration = Duration::from_secs(2);

/// A request's body.
///
/// Dropped before its end, that of HTTP/2 is heard on for a moment: an answer that is followed by
/// RST_STREAM (RFC 9113, section 8.1) while the client still sends is lost on some of them, curl 7.88 among
/// them. Of HTTP/1.1 its connection [lingers](super::downstream).
pub(super) struct RequestBody {
    /// Until it is dropped.
    body: Option<Incoming>,
    /// Who hears on, of HTTP/2.
    listeners: Option<Tasks>,
}

impl RequestBody {
    /// Of a request of HTTP/1.1.
    pub(super) fn http1(body: Incoming) -> Self {
        Self { body: Some(body), listeners: None }
    }

    /// Of a request of HTTP/2. What is not wanted of it is heard in `listeners`.
    pub(super) fn http2(body: Incoming, listeners: &Tasks) -> Self {
        let listeners = (!body.is_end_stream()).then(|| listeners.clone());
        Self { body: Some(body), listeners }
    }

    /// Whether it is of HTTP/2, unless there is none.
    pub(super) fn is_http2(&self) -> bool {
        self.listeners.is_some()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Incoming::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), Incoming::size_hint)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        let (Some(body), Some(listeners)) = (self.body.take(), &self.listeners) else { return };
        if body.is_end_stream() {
            return;
        }
        let mut rest = Rest { body, len: 0 };
        let is_over = Pin::new(&mut rest).poll(&mut Context::from_waker(Waker::noop())).is_ready();
        if !is_over && Handle::try_current().is_ok() {
            listeners.spawn("rest of a request", async move {
                let _ = timeout(REST_TIME_MAX, rest).await; // it had its time
            });
        }
    }
}

/// What is left of a body. Ready at its end, or when it is too much.
struct Rest {
    body: Incoming,
    len: usize,
}

impl Future for Rest {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        while self.len < REST_LEN_MAX {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => self.len += frame.data_ref().map_or(0, Bytes::len),
                Poll::Ready(_) => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }
}
