//! A connection between a task of this process and the data thread, without a socket.
//!
//! It keeps the manners of TCP: each direction ends for itself, and an end that is dropped before
//! it was said is a reset, so that a cut never looks complete. What was said before a reset is still
//! read. Each direction holds at most [`LEN_MAX`] bytes; a resting one owns no buffer.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop;

/// Bytes that one direction holds: a writer that is further ahead of its reader waits.
pub(super) const LEN_MAX: usize = 64 * 1024;

/// One end of a connection. Dropped before its end was said the other end is reset.
#[derive(Debug)]
pub(super) struct Pipe {
    reader: PipeReader,
    writer: PipeWriter,
}

/// What the other end says.
#[derive(Debug)]
pub(super) struct PipeReader(Arc<Mutex<Flow>>);

/// What this end says.
#[derive(Debug)]
pub(super) struct PipeWriter(Arc<Mutex<Flow>>);

/// One direction.
#[derive(Debug, Default)]
struct Flow {
    /// At most [`LEN_MAX`].
    buffer: BytesMut,
    writing: Writing,
    has_no_reader: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// How far the writer of a direction is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Writing {
    #[default]
    Open,
    /// Its end was said.
    Ended,
    /// It went away without.
    Cut,
}

/// The two ends of a new connection.
pub(super) fn pipe() -> (Pipe, Pipe) {
    let (there, back) = (Arc::<Mutex<Flow>>::default(), Arc::<Mutex<Flow>>::default());
    let end = |reads: &Arc<_>, writes: &Arc<_>| Pipe {
        reader: PipeReader(Arc::clone(reads)),
        writer: PipeWriter(Arc::clone(writes)),
    };
    (end(&back, &there), end(&there, &back))
}

impl Pipe {
    /// Both directions at once.
    pub(super) fn split(&mut self) -> (&mut PipeReader, &mut PipeWriter) {
        (&mut self.reader, &mut self.writer)
    }
}

impl AsyncRead for PipeReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // The other end may refill it as fast as it is read: give way to other tasks now and then.
        let turn = ready!(coop::poll_proceed(cx));
        let mut flow = self.0.lock();
        let len = flow.buffer.len().min(buf.remaining());
        if len > 0 {
            buf.put_slice(&flow.buffer[..len]);
            flow.buffer.advance(len);
            if flow.buffer.is_empty() {
                flow.buffer = BytesMut::new();
            }
        } else if !flow.buffer.is_empty() || flow.writing == Writing::Ended {
            // no room to read into, or the end
        } else if flow.writing == Writing::Cut {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        } else {
            flow.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        turn.made_progress();
        let writer = flow.writer.take();
        drop(flow);
        wake(writer);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PipeWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let turn = ready!(coop::poll_proceed(cx));
        let mut flow = self.0.lock();
        if flow.has_no_reader || flow.writing != Writing::Open {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let len = bytes.len().min(LEN_MAX - flow.buffer.len());
        if len == 0 && !bytes.is_empty() {
            flow.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        flow.buffer.extend_from_slice(&bytes[..len]);
        turn.made_progress();
        let reader = flow.reader.take();
        drop(flow);
        wake(reader);
        Poll::Ready(Ok(len))
    }

    /// What is written is on its way already.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stop(Writing::Ended);
        Poll::Ready(Ok(()))
    }
}

impl PipeWriter {
    /// Writes no more; only the first reason counts.
    fn stop(&self, writing: Writing) {
        let mut flow = self.0.lock();
        if flow.writing == Writing::Open {
            flow.writing = writing;
        }
        let reader = flow.reader.take();
        drop(flow);
        wake(reader);
    }
}

/// Only once the lock is given back: whoever is woken takes it.
fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl Drop for PipeWriter {
    fn drop(&mut self) {
        self.stop(Writing::Cut);
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        let mut flow = self.0.lock();
        flow.has_no_reader = true;
        flow.buffer = BytesMut::new();
        let writer = flow.writer.take();
        drop(flow);
        wake(writer);
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn each_direction_ends_for_itself_and_a_drop_is_a_reset() {
        let (mut near, mut far) = pipe();
        near.write_all(b"question").await.unwrap();
        near.shutdown().await.unwrap();
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"question");
        assert_eq!(near.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        far.write_all(b"half an ans").await.unwrap();
        drop(far);
        heard.clear();
        let error = near.read_to_end(&mut heard).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(heard, b"half an ans", "what came before the cut is still read");
    }

    #[tokio::test]
    async fn writer_waits_for_its_reader_at_the_bound_and_learns_when_it_is_gone() {
        let (mut near, mut far) = pipe();
        let bytes = vec![7; LEN_MAX + 1];
        assert_eq!(near.write(&bytes).await.unwrap(), LEN_MAX);
        assert!(near.write(&bytes).now_or_never().is_none(), "it is full");
        far.read_exact(&mut [0; 10]).await.unwrap();
        assert_eq!(near.write(&bytes).await.unwrap(), 10);
        let write = near.write(&bytes);
        let gone = async { drop(far) };
        let (written, ()) = tokio::join!(write, gone);
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn pipe_that_is_always_ready_gives_way_to_other_tasks() {
        let (mut near, mut far) = pipe();
        let endless = async {
            loop {
                near.write_all(&[1; 512]).await.unwrap();
                far.read_exact(&mut [0; 512]).await.unwrap();
            }
        };
        tokio::select! {
            biased;
            () = endless => unreachable!("it has no end"),
            () = tokio::task::yield_now() => {}
        }
    }
}
