//! Connections of clients: HTTP/1.1 behind the gate, or HTTP/2, whichever the client begins with.
//!
//! A connection that rests is parked: nothing of it stays but its socket and a small task. hyper,
//! with its buffers, is there only while something is under way.

use std::convert::Infallible;
use std::future::{Future, pending, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use http::header::{CONNECTION, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::TokioTimer;
use parking_lot::Mutex;
use tokio::time::{Sleep, sleep, timeout};

use super::answer::{Reason, is_grpc};
use super::body::Outgoing;
use super::exchange::{Asked, Switched};
use super::gate::Gate;
use super::head::{self, ClientAddress, Malformed};
use super::noted::Noted;
use super::{Destination, Http, Site, outside};
use crate::model::{Protocol, ServiceName, service_of};
use crate::proxy::ingress::{PublicHosts, Route};
use crate::proxy::local::LocalSocket;
use crate::proxy::outbound::{Ask, Connected, Greeting};
use crate::proxy::stalls::{STALL_AFTER, Stalls};
use crate::telemetry::Door;

/// How long a client may take from the first to the last byte of a head.
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// How long a connection may rest between requests: longer than any usual client keeps one, so that
/// it is the client who closes it and no request crosses with that.
const REST_TIME_MAX: Duration = Duration::from_secs(600);
/// A connection that rests for so long is parked.
const PARK_AFTER: Duration = Duration::from_millis(500);
/// What is read at once.
const READ_LEN_MAX: usize = 64 * 1024;
/// What hyper may hold of a request.
const BUFFER_LEN_MAX: usize = 64 * 1024;
/// After an answer that ends the connection the client may still be sending; were its bytes not
/// read, the system would take the answer back. Many clients read it only once they have said all.
const LINGER_TIME_MAX: Duration = Duration::from_secs(5);
/// What a client of HTTP/2 begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Requests at a time on one connection of HTTP/2.
const STREAMS_MAX: u32 = 256;
/// What a stream, and what a connection of HTTP/2 may have on its way to us, in bytes.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
const HEAD_LEN_MAX: u32 = 32 * 1024;
/// How often a connection of HTTP/2 that rests is asked whether it lives, and how long it may take.
const PING_PERIOD: Duration = Duration::from_secs(30);
const PING_TIME_MAX: Duration = Duration::from_secs(20);
/// Stands where a head was refused, so that hyper asks for the answer to it.
const REFUSED: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\n\r\n";

/// One client's connection: what its reader, its service and its driver share.
struct Client {
    http: Arc<Http>,
    site: Site,
    /// Where it is, unless it came by a unix socket.
    address: Option<ClientAddress>,
    /// Exchanges under way.
    in_flight: AtomicU32,
    /// Whether the connection ends with the answer that is under way, which may be long.
    is_last: AtomicBool,
    /// Of HTTP/1.1.
    front: Mutex<Front>,
}

struct Front {
    gate: Gate,
    /// Heads that passed and are not answered, the one that was refused among them.
    refused: Option<Malformed>,
    /// Whoever waits for an upgrade to be answered before it reads on.
    reader: Option<Waker>,
    onward: Option<Onward>,
}

/// What a connection goes on with after its last request.
enum Onward {
    /// What client and instance agreed to speak.
    Upgraded(Switched),
    /// What CONNECT asked for.
    Tunnel(Ask, Connected, Option<Box<Noted>>),
}

/// Why a request goes nowhere, and to which service it would have gone.
type Unrouted = (Reason, Option<ServiceName>);

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
        let client = Arc::new(Client::new(self, site, &socket));
        let io = ClientIo::new(socket, Arc::clone(&client), begun, false);
        let serve = service_fn(move |request| {
            let client = Arc::clone(&client);
            async move { Ok::<_, Infallible>(client.answer_http2(request).await) }
        });
        let mut connection = pin!(
            http2::Builder::new(tasks)
                .timer(TokioTimer::new())
                .max_concurrent_streams(STREAMS_MAX)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_header_list_size(HEAD_LEN_MAX)
                .keep_alive_interval(PING_PERIOD)
                .keep_alive_timeout(PING_TIME_MAX)
                .serve_connection(io, serve)
        );
        tokio::select! {
            _ = &mut connection => return, // whatever ended it, its exchanges were told
            () = draining.cancelled() => {}
        }
        connection.as_mut().graceful_shutdown();
        drop(connection.await);
    }
}

impl Onward {
    /// Carries bytes until both sides have ended; what the client `said` already goes first.
    async fn carry(self, http: &Http, mut socket: LocalSocket, said: Bytes) {
        match self {
            Self::Upgraded(Switched { io, said: heard, carried }) => {
                let (bytes, stalls) = (carried.bytes.clone(), &http.outbound.stalls);
                let outcome = io.carry(&mut socket, heard, said, &bytes, stalls).await;
                carried.end_switched(&outcome);
            }
            Self::Tunnel(ask, connected, noted) => {
                let (len, connected) = (said.len(), connected.with_said(said));
                let outcome = http.outbound.carry(socket, ask, connected, len).await;
                if let (Some(noted), Ok(())) = (noted, outcome) {
                    noted.end();
                }
            }
        }
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
    let io = ClientIo::new(socket, Arc::clone(&client), begun, true);
    let answering = Arc::clone(&client);
    let serve = service_fn(move |request| {
        let client = Arc::clone(&answering);
        let (head, body) = request.into_parts();
        let head = Box::new(head);
        // In a box of its own, which is there only while a request is under way.
        let answer: BoxFuture<'static, _> =
            Box::pin(async move { Ok::<_, Infallible>(client.answer_http1(head, body).await) });
        answer
    });
    let mut connection =
        http1::Builder::new().max_buf_size(BUFFER_LEN_MAX).writev(true).serve_connection(io, serve);
    let mut is_parking = false;
    let draining = client.http.draining.clone();
    let mut drained = pin!(draining.cancelled());
    let mut look = pin!(sleep(PARK_AFTER));
    let mut was_resting = false;
    let ended = poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = connection.poll_without_shutdown(cx) {
                return Poll::Ready(ended);
            }
            if is_parking {
                return Poll::Pending;
            }
            if drained.as_mut().poll(cx).is_ready() {
                is_parking = true;
                Pin::new(&mut connection).graceful_shutdown();
                continue;
            }
            ready!(look.as_mut().poll(cx));
            let is_resting = client.is_resting();
            if is_resting && was_resting {
                is_parking = true;
                Pin::new(&mut connection).graceful_shutdown(); // nothing is under way: it ends at once
            } else {
                was_resting = is_resting;
                look.set(sleep(PARK_AFTER / 2));
            }
        }
    });
    let ended = ended.await;
    let parts = connection.into_parts();
    let ClientIo { socket, passed, has_ended, .. } = parts.io;
    let (onward, refused, unread) = {
        let mut front = client.front.lock();
        let unread = [&parts.read_buf[..], &passed, &front.gate.take_unpassed()].concat();
        (front.onward.take(), front.refused, Bytes::from(unread))
    };
    if let Some(onward) = onward {
        return Some(Next::Switch(socket, Box::new(onward), unread));
    }
    if ended.is_err() || has_ended {
        return None; // cut, or closed by the client
    }
    if was_resting && is_parking && !draining.is_cancelled() {
        return Some(Next::Park(socket, unread));
    }
    let lingers = refused.is_some() || !unread.is_empty() || !client.is_resting();
    linger(socket, lingers).await;
    None
}

/// Whether a client that asks so wants the connection to end with the answer.
fn is_last(version: Version, headers: &HeaderMap) -> bool {
    says(headers, "close") || (version == Version::HTTP_10 && !says(headers, "keep-alive"))
}

/// Whether `Connection` has this word.
fn says(headers: &HeaderMap, word: &str) -> bool {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|said| said.trim().eq_ignore_ascii_case(word))
}

/// Ends our side. One that may still be sending is listened to for a while.
async fn linger(mut socket: LocalSocket, is_sending: bool) {
    if socket.writer().end().await.is_err() || !is_sending {
        return;
    }
    let listen = async { while read(&mut socket).await.is_ok_and(|bytes| !bytes.is_empty()) {} };
    let _ = timeout(LINGER_TIME_MAX, listen).await; // it had its time
}

impl Client {
    fn new(http: Arc<Http>, site: Site, socket: &LocalSocket) -> Self {
        let front = Front { gate: Gate::new(), refused: None, reader: None, onward: None };
        let address = socket.peer().and_then(ClientAddress::new);
        let in_flight = AtomicU32::new(0);
        let (is_last, front) = (AtomicBool::new(false), Mutex::new(front));
        Self { http, site, address, in_flight, is_last, front }
    }

    /// Whether nothing is under way but the rest of an answer, and another request may come.
    fn is_resting(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) == 0
            && !self.is_last.load(Ordering::Relaxed)
            && self.front.lock().gate.is_between_messages()
    }

    async fn answer_http1(&self, head: Box<Parts>, body: Incoming) -> Response<Outgoing> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        // Only then the gate waits; another one may have passed behind this request, and wait still.
        let asked_onward = head.method == Method::CONNECT || head.headers.contains_key(UPGRADE);
        let asked_to_end = is_last(head.version, &head.headers);
        let response = match self.refusal(&head) {
            Some(malformed) => self.refuse(Reason::Malformed(malformed), None, false),
            None => self.answer(head, body).await,
        };
        let response = self.released(response);
        if asked_to_end || says(response.headers(), "close") {
            self.is_last.store(true, Ordering::Relaxed);
        }
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        let mut front = self.front.lock();
        if asked_onward && front.onward.is_none() {
            front.gate.declined();
            if let Some(reader) = front.reader.take() {
                reader.wake();
            }
        }
        response
    }

    async fn answer_http2(&self, request: Request<Incoming>) -> Response<Outgoing> {
        let (head, body) = request.into_parts();
        let head = Box::new(head);
        let response = match head::check(&head) {
            Ok(()) => self.answer(head, body).await,
            Err(malformed) => {
                self.refuse(Reason::Malformed(malformed), None, is_grpc(&head.headers))
            }
        };
        self.released(response)
    }

    /// Why the head was refused for which this request stands.
    fn refusal(&self, head: &Parts) -> Option<Malformed> {
        let is_marker = head.uri == "/"
            && head.headers.len() == 1
            && head.headers.get("host").is_some_and(|host| host == "refused");
        self.front.lock().refused.filter(|_| is_marker)
    }

    async fn answer(&self, mut head: Box<Parts>, body: Incoming) -> Response<Outgoing> {
        let is_grpc = is_grpc(&head.headers);
        let (door, clock) = (self.site.door, self.http.outbound.clock);
        let log = self.http.log.clone();
        let noted = log.map(|log| Box::new(Noted::new(log, clock, door, &head)));
        if let Destination::Redirect { hosts, port } = &self.site.destination {
            return self.redirect(&head, hosts, *port, noted);
        }
        let Route { service, options } = match self.route(&head) {
            Ok(route) => route,
            Err(unrouted) => return self.turn_away(unrouted, is_grpc, noted),
        };
        if head.method == Method::CONNECT {
            return self.tunnel(Route { service, options }, noted).await;
        }
        if let Destination::Public(_) = &self.site.destination {
            outside::admit(&mut head.headers);
        }
        let asked = Asked {
            service: &service,
            options: &options,
            door: self.site.door,
            client: self.address.as_ref(),
            head,
            body,
            noted,
        };
        match self.http.exchange(asked).await {
            Ok(answered) => {
                self.front.lock().onward = answered.switched.map(Onward::Upgraded);
                answered.response
            }
            Err(malformed) => self.refuse(Reason::Malformed(malformed), Some(&service), is_grpc),
        }
    }

    /// Where a request goes, or why it goes nowhere.
    fn route(&self, head: &Parts) -> Result<Route, Unrouted> {
        let is_connect = head.method == Method::CONNECT;
        let unrouted = |reason| (reason, None);
        // Several tunnels in one connection of HTTP/2 would need a framing of their own.
        let takes_connect = matches!(self.site.destination, Destination::MeshName)
            && head.version != Version::HTTP_2;
        if is_connect && !takes_connect {
            return Err(unrouted(Reason::NoTunnel));
        }
        let authority = match head::authority(head) {
            Ok(authority) => authority.host,
            Err(_) if self.site.destination.is_fixed() && head.version == Version::HTTP_10 => "",
            Err(malformed) => return Err(unrouted(Reason::Malformed(malformed))),
        };
        let options = || Arc::clone(&self.site.options);
        let route = match &self.site.destination {
            Destination::Service(service) => {
                return Ok(Route { service: service.clone(), options: options() });
            }
            Destination::MeshName => {
                let service = service_of(authority.as_bytes());
                service.map(|service| Route { service, options: options() })
            }
            Destination::Public(hosts) | Destination::Redirect { hosts, .. } => {
                hosts.find(authority).map(|(_, route)| route)
            }
        };
        let route = route.ok_or(unrouted(Reason::ForeignName))?;
        match self.http.protocol(&route.service) {
            Some(Protocol::Tcp | Protocol::Udp) if !is_connect => {
                Err((Reason::NotHttp, Some(route.service)))
            }
            _ => Ok(route),
        }
    }

    /// Sends a client from plain text to TLS, if that is where its host is.
    fn redirect(
        &self,
        head: &Parts,
        hosts: &PublicHosts,
        port: u16,
        noted: Option<Box<Noted>>,
    ) -> Response<Outgoing> {
        let host = match head::authority(head) {
            Ok(authority) => hosts.find(authority.host),
            Err(malformed) => {
                return self.turn_away((Reason::Malformed(malformed), None), false, noted);
            }
        };
        let moved = host
            .and_then(|(host, route)| Some((route.service, outside::redirect(&host, port, head)?)));
        let Some((service, moved)) = moved else {
            return self.turn_away((Reason::ForeignName, None), false, noted);
        };
        if let Some(noted) = noted {
            noted.refused(Some(&service), moved.status().as_u16(), "redirect");
        }
        moved
    }

    /// What of an answer its client may see.
    fn released(&self, mut response: Response<Outgoing>) -> Response<Outgoing> {
        if self.site.door == Door::public {
            outside::release(&mut response);
        }
        response
    }

    /// Connects to an instance. Bytes are carried once the client was told.
    async fn tunnel(
        &self,
        Route { service, options }: Route,
        mut noted: Option<Box<Noted>>,
    ) -> Response<Outgoing> {
        let ask = Ask { service, options, greeting: Greeting::Tunnel };
        match Box::pin(self.http.outbound.reach(&ask)).await {
            Ok(connected) => {
                if let Some(noted) = &mut noted {
                    noted.answered(&ask.service, connected.endpoint(), StatusCode::OK.as_u16());
                }
                self.front.lock().onward = Some(Onward::Tunnel(ask, connected, noted));
                Response::new(Outgoing::EMPTY)
            }
            Err(error) => {
                let reason = Reason::NotTaken(error);
                if let Some(noted) = noted {
                    noted.refused(Some(&ask.service), reason.status().as_u16(), reason.word());
                }
                reason.answer(Some(&ask.service), false)
            }
        }
    }

    /// Refuses a request that can be written down.
    fn turn_away(
        &self,
        (reason, service): Unrouted,
        is_grpc: bool,
        noted: Option<Box<Noted>>,
    ) -> Response<Outgoing> {
        if let Some(noted) = noted {
            let status = reason.status().as_u16();
            noted.refused(service.as_ref(), status, reason.word());
        }
        self.refuse(reason, service.as_ref(), is_grpc)
    }

    fn refuse(
        &self,
        reason: Reason,
        service: Option<&ServiceName>,
        is_grpc: bool,
    ) -> Response<Outgoing> {
        self.http.outbound.metrics.count_refused(self.site.door, reason.word());
        reason.answer(service, is_grpc)
    }
}

/// A client's socket as hyper reads and writes it.
struct ClientIo {
    socket: LocalSocket,
    client: Arc<Client>,
    /// Read, judged where it has to be, and not yet taken.
    passed: Bytes,
    /// Whether what comes is HTTP/1.1, which has to pass the gate.
    is_gated: bool,
    has_ended: bool,
    /// Runs while a head is incomplete.
    head_time: Option<Pin<Box<Sleep>>>,
    /// Runs while the client takes nothing.
    stall: Option<BoxFuture<'static, ()>>,
}

impl ClientIo {
    fn new(socket: LocalSocket, client: Arc<Client>, begun: Bytes, is_gated: bool) -> Self {
        let passed = if is_gated {
            client.front.lock().gate.handle_bytes(begun);
            Bytes::new()
        } else {
            begun
        };
        Self { socket, client, passed, is_gated, has_ended: false, head_time: None, stall: None }
    }

    /// Waits for what may pass. Empty at the end.
    fn poll_passed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        loop {
            if self.is_gated {
                let mut front = self.client.front.lock();
                match front.gate.poll_pass() {
                    Ok(Some(bytes)) => return Poll::Ready(Ok(bytes)),
                    Ok(None) => {}
                    Err(malformed) if front.gate.has_refused_body() => {
                        front.refused = Some(malformed);
                        return Poll::Ready(Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            malformed,
                        )));
                    }
                    Err(malformed) => {
                        if front.refused.replace(malformed).is_some() {
                            return Poll::Pending; // an end would overtake the answer, which closes
                        }
                        return Poll::Ready(Ok(Bytes::from_static(REFUSED)));
                    }
                }
                if !front.gate.wants_more() {
                    front.reader = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
            let Poll::Ready(bytes) = self.socket.reader().poll_read(cx, READ_LEN_MAX)? else {
                ready!(self.poll_head_time(cx));
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            };
            if bytes.is_empty() || !self.is_gated {
                self.has_ended = bytes.is_empty();
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

    fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = self.socket.writer().poll_write_slices(cx, slices);
        self.poll_patiently(cx, written)
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
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

/// Returns when a client has taken nothing for too long, or its memory is needed.
async fn stalled(stalls: Stalls, time_max: Duration) {
    sleep(STALL_AFTER).await;
    let _ = timeout(time_max, stalls.watch(pending::<()>())).await; // either way it is over
}

impl Read for ClientIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.passed.is_empty() {
            self.passed = ready!(self.poll_passed(cx))?;
        }
        let len = self.passed.len().min(buffer.remaining());
        buffer.put_slice(&self.passed.split_to(len));
        Poll::Ready(Ok(()))
    }
}

impl Write for ClientIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, &[IoSlice::new(bytes)])
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, slices)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = self.socket.writer().poll_flush(cx);
        self.poll_patiently(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        pin!(self.socket.writer().end()).poll(cx)
    }
}
