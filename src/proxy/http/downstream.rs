//! Connections of clients: HTTP/1.1 behind the gate, or HTTP/2, whichever the client begins with.
//!
//! A connection that rests is parked: nothing of it stays but its socket and a small task. hyper,
//! with its buffers, is there only while something is under way.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioTimer;
use tokio::time::{sleep, timeout};

use super::chunks::Chunked;
use super::client::Client;
use super::client_io::{ClientIo, HEAD_TIME_MAX, READ_LEN_MAX};
use super::onward::Onward;
use super::{Http, Site};
use crate::proxy::local::LocalSocket;
use crate::proxy::wakes::Wakes;
use crate::telemetry::Door;

/// How long a connection may rest between requests: longer than any usual client keeps one, so that
/// it is the client who closes it and no request crosses with that.
const REST_TIME_MAX: Duration = Duration::from_secs(600);
/// A connection that rests for so long is parked.
const PARK_AFTER: Duration = Duration::from_millis(500);
/// What hyper may hold of a request.
const BUFFER_LEN_MAX: usize = 64 * 1024;
/// After an answer that ends the connection the client may still be sending; were its bytes not
/// read, the system would take the answer back. Many clients read it only once they have said all.
const LINGER_TIME_MAX: Duration = Duration::from_secs(5);
/// What a client of HTTP/2 begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Requests at a time on one connection of HTTP/2.
const STREAMS_MAX: u32 = 256;
/// What a stream of HTTP/2 may have on its way to us, in bytes.
pub(super) const STREAM_WINDOW: u32 = 256 * 1024;
/// The same of a connection: enough that streams whose instances read slowly delay no other. h2 allows small
/// frames that wait half of it, at 256 bytes each, and ends the connection above that.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// The same where anybody may connect: what that costs is theirs to choose.
const PUBLIC_CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
const HEAD_LEN_MAX: u32 = 32 * 1024;
/// How often a connection of HTTP/2 that rests is asked whether it lives, and how long it may take.
const PING_PERIOD: Duration = Duration::from_secs(30);
const PING_TIME_MAX: Duration = Duration::from_secs(20);

/// How a connection of HTTP/1.1 ended that goes on.
enum Next {
    /// It rests, or goes on with what the client said already.
    Park(LocalSocket, Bytes),
    /// Both sides speak something else from here on; the client said this already.
    Switch(LocalSocket, Box<Onward>, Bytes),
}

impl Http {
    /// Serves one client until its connection ends.
    pub(in crate::proxy) async fn serve(self: Arc<Self>, mut socket: LocalSocket, site: Site) {
        let mut begun = Box::pin(first_bytes(&mut socket)).await;
        if begun.starts_with(PREFACE) {
            return Box::pin(self.serve_http2(socket, site, begun)).await;
        }
        loop {
            if begun.is_empty() {
                drop(socket.end().await); // the client is gone
                return;
            }
            let client = Client::new(Arc::clone(&self), site.clone(), &socket);
            match Box::pin(serve_http1(client, socket, begun)).await {
                None => return,
                Some(Next::Switch(socket, onward, said)) => {
                    return Box::pin(onward.carry(&self, socket, said)).await;
                }
                Some(Next::Park(parked, unread)) => (socket, begun) = (parked, unread),
            }
            if !begun.is_empty() {
                continue;
            }
            let next = timeout(REST_TIME_MAX, read(&mut socket));
            begun = match self.draining.run_until_cancelled(next).await {
                Some(Ok(Ok(bytes))) => bytes,
                _ => Bytes::new(),
            };
        }
    }

    async fn serve_http2(self: Arc<Self>, socket: LocalSocket, site: Site, begun: Bytes) {
        let tasks = self.tasks.clone();
        let draining = self.draining.clone();
        let window = match site.door {
            Door::public => PUBLIC_CONNECTION_WINDOW,
            _ => CONNECTION_WINDOW,
        };
        let client = Arc::new(Client::new(self, site, &socket));
        let io = Chunked::new(ClientIo::new(socket, Arc::clone(&client), begun, false));
        let serve = service_fn(move |request| {
            let client = Arc::clone(&client);
            async move { Ok::<_, Infallible>(client.answer_http2(request).await) }
        });
        let mut connection = pin!(
            http2::Builder::new(tasks)
                .timer(TokioTimer::new())
                .max_concurrent_streams(STREAMS_MAX)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(window)
                .max_header_list_size(HEAD_LEN_MAX)
                .keep_alive_interval(PING_PERIOD)
                .keep_alive_timeout(PING_TIME_MAX)
                .serve_connection(io, serve)
        );
        tokio::select! {
            biased;
            _ = &mut connection => return, // whatever ended it, its exchanges were told
            () = draining.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        drop(connection.await);
    }
}

/// What a client says first: as much as tells HTTP/2 from HTTP/1.1. Empty when it is gone.
async fn first_bytes(socket: &mut LocalSocket) -> Bytes {
    let mut begun = BytesMut::new();
    let mut time_max = REST_TIME_MAX;
    loop {
        match timeout(time_max, read(socket)).await {
            Ok(Ok(bytes)) if !bytes.is_empty() => begun.extend_from_slice(&bytes),
            _ => return Bytes::new(),
        }
        time_max = HEAD_TIME_MAX;
        let len = begun.len().min(PREFACE.len());
        if len == PREFACE.len() || begun[..len] != PREFACE[..len] {
            return begun.freeze();
        }
    }
}

async fn read(socket: &mut LocalSocket) -> io::Result<Bytes> {
    socket.reader().read(READ_LEN_MAX).await
}

/// Serves requests of HTTP/1.1 until the connection ends, rests or is switched.
async fn serve_http1(client: Client, socket: LocalSocket, begun: Bytes) -> Option<Next> {
    let client = Arc::new(client);
    let io = Chunked::new(ClientIo::new(socket, Arc::clone(&client), begun, true));
    let answering = Arc::clone(&client);
    let serve = service_fn(move |request| {
        let client = Arc::clone(&answering);
        let (head, body) = request.into_parts();
        let head = Box::new(head);
        // hyper keeps room for it as long as the connection is not parked.
        async move { Ok::<_, Infallible>(client.answer_http1(head, body).await) }
    });
    let mut connection = http1::Builder::new()
        .half_close(true)
        .max_buf_size(BUFFER_LEN_MAX)
        .writev(true)
        .serve_connection(io, serve);
    let mut is_parking = false;
    let draining = client.http.draining.clone();
    let mut drained = pin!(draining.cancelled());
    let mut look = pin!(sleep(PARK_AFTER));
    let mut was_resting = false;
    let aside = Wakes::new(); // of the two that end it, which most polls do not concern
    let ended = poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = Pin::new(&mut connection).poll(cx) {
                return Poll::Ready(ended);
            }
            aside.concern(cx.waker());
            if is_parking || !aside.was_woken() {
                return Poll::Pending;
            }
            let cx = &mut aside.context();
            if drained.as_mut().poll(cx).is_pending() {
                ready!(look.as_mut().poll(cx));
                aside.remember();
                let is_resting = client.is_resting();
                if !(is_resting && was_resting) {
                    was_resting = is_resting;
                    look.set(sleep(PARK_AFTER / 2));
                    continue;
                }
            }
            is_parking = true;
            Pin::new(&mut connection).graceful_shutdown(); // at once where nothing is under way
        }
    });
    let ended = ended.await;
    let parts = connection.into_parts();
    let Chunked { connection: ClientIo { socket, ahead, has_ended, .. }, unread } = parts.io;
    let (onward, refused, unread) = {
        let mut front = client.front.lock();
        let unread = [&parts.read_buf[..], &unread, &ahead, &front.gate.take_unpassed()].concat();
        (front.onward.take(), front.refused, Bytes::from(unread))
    };
    if let Some(onward) = onward {
        return Some(Next::Switch(socket, onward, unread));
    }
    if ended.is_err() {
        return None; // cut
    }
    if has_ended {
        drop(socket.end().await); // whether it has gone or reads on
        return None;
    }
    if was_resting && is_parking && !draining.is_cancelled() {
        return Some(Next::Park(socket, unread));
    }
    let lingers = refused.is_some() || !unread.is_empty() || !client.is_resting();
    linger(socket, lingers).await;
    None
}

/// Ends our side. One that may still be sending is listened to for a while.
async fn linger(mut socket: LocalSocket, is_sending: bool) {
    if socket.writer().end().await.is_err() || !is_sending {
        return;
    }
    let listen = async { while read(&mut socket).await.is_ok_and(|bytes| !bytes.is_empty()) {} };
    let _ = timeout(LINGER_TIME_MAX, listen).await; // it had its time
}
