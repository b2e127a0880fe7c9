//! One request and its response: which instance, when another one, and what is counted.
//!
//! **A request is sent again only on proof that no byte of it reached an application**, or where its
//! service declares it idempotent. The proof is a refusal by the instance's agent, nothing written, a
//! connection that the instance had closed before it was given a byte of the request, or HTTP/2's
//! own word. Everything else is answered with 502 `lost`: it may have been done.

use std::future::pending;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use tokio::time::{Instant, sleep_until, timeout};

use super::Http;
use super::answer::{GRPC_STATUS, NODE, Reason, is_grpc};
use super::body::{BodyError, Outgoing, Patience, Source, Upload};
use super::head::{self, Malformed};
use super::noted::Noted;
use super::pool::{Key, Stream};
use super::upstream::{Kept, Shared, Unanswered, UpstreamIo, Way};
use crate::mesh::Endpoint;
use crate::model::{Outcome, Protocol, ServiceName};
use crate::proxy::board::{Avoid, Choice};
use crate::proxy::call::Call;
use crate::proxy::dial::DialError;
use crate::proxy::outbound::{self, Dialled, Search, Setback};
use crate::proxy::traffic::Exchange;
use crate::proxy::{EntryOptions, Span};
use crate::telemetry::{Counter, Direction, Door, EventKind};
use crate::transport::Link;
use crate::transport::tunnel::{Header, Mode};

/// How much time the caller leaves, in milliseconds.
const DEADLINE: HeaderName = HeaderName::from_static("x-murmesh-deadline-ms");
/// The caller's member, as its agent says. What the certificate proves is in PROXY protocol's header.
const PEER: HeaderName = HeaderName::from_static("x-murmesh-peer");

/// Requests that one instance may have in flight from this caller; the next is answered at once, while
/// it can still be of use to ask elsewhere. Far more than an instance works on at a time, and few
/// enough to be answered within seconds.
const IN_FLIGHT_MAX: u32 = 1_024;

/// A request and where it is to go.
pub(super) struct Asked<'a> {
    pub(super) service: &'a ServiceName,
    pub(super) options: &'a EntryOptions,
    pub(super) door: Door,
    pub(super) client: Option<IpAddr>,
    pub(super) head: Parts,
    pub(super) body: Incoming,
    pub(super) noted: Option<Box<Noted>>,
}

/// A response whose head has come.
pub(super) struct Answered {
    pub(super) response: Response<Outgoing>,
    /// The connection itself, where both sides agreed to speak something else from here on.
    pub(super) switched: Option<Switched>,
}

/// What both sides go on with after an upgrade.
pub(super) struct Switched {
    pub(super) io: UpstreamIo,
    /// What the instance said already.
    pub(super) said: Bytes,
    pub(super) carried: Carried,
}

/// The accounts of one exchange. Dropped before its end it has failed.
pub(super) struct Carried {
    http: Arc<Http>,
    /// What the access log is to say.
    noted: Option<Box<Noted>>,
    key: Key,
    exchange: Exchange,
    pub(super) bytes: Counter,
    call: Call,
    /// To the agent of the instance; `None` where that is this one.
    link: Option<Arc<Link>>,
    /// Whether its status comes last, as gRPC has it.
    is_grpc: bool,
    _stream: Option<Stream>,
}

impl Carried {
    pub(super) fn count(&mut self, len: usize) {
        self.bytes.inc_by(len as u64);
        if let Some(noted) = &mut self.noted {
            noted.count(len);
        }
    }

    /// The trailers of the response.
    pub(super) fn handle_trailers(&self, trailers: &HeaderMap) {
        if self.is_grpc {
            self.call.judge(grpc_outcome(trailers).unwrap_or(Outcome::Failed));
        }
    }

    /// The instance did not say the rest of the response.
    pub(super) fn cut(&self) {
        let is_its_fault = self.link.as_ref().is_none_or(|link| link.is_open());
        self.call.judge(if is_its_fault { Outcome::Failed } else { Outcome::Unknown });
    }

    /// The response is whole. Its connection is kept when it is free for another.
    pub(super) fn end(self, upstream: Option<Kept>) {
        let now = self.http.outbound.clock.now();
        self.call.judge(if self.is_grpc { Outcome::Failed } else { Outcome::Success });
        if let Some(mut kept) = upstream
            && kept.is_free()
        {
            self.http.pool.put(self.key, kept, now);
        }
        self.exchange.end(now);
        if let Some(noted) = self.noted {
            noted.end();
        }
    }

    /// An upgraded connection ended like this.
    pub(super) fn end_switched(self, outcome: &Result<(), crate::proxy::tcp::Cut>) {
        if outcome.is_ok() {
            self.end(None);
        }
    }
}

/// What one instance made of a request.
type Attempt = Result<(Response<Incoming>, Option<Kept>, Option<Stream>), Miss>;

/// Why one instance brought no response.
enum Miss {
    /// Nothing of the request reached it.
    NotTaken(Setback),
    /// It may have had the request, which may be repeated.
    Repeatable(DialError, Avoid),
    /// It may have had the request, which may not be repeated.
    Lost,
    /// It said nothing for too long.
    TimedOut,
}

impl<T: Into<Setback>> From<T> for Miss {
    fn from(setback: T) -> Self {
        Self::NotTaken(setback.into())
    }
}

/// A request as it can be said to several instances.
struct Outbox {
    choice: Choice,
    is_grpc: bool,
    head: Parts,
    source: Option<Arc<Source>>,
    protocol: Protocol,
}

impl Outbox {
    /// The request for one attempt. An error when too much of its body has gone to say it again.
    fn request(&self) -> Result<Request<Upload>, Setback> {
        let body = match &self.source {
            Some(source) => source
                .attempt()
                .ok_or(Setback::Next { reason: DialError::Lost, avoid: Avoid::Nobody })?,
            None => Upload::EMPTY,
        };
        Ok(Request::from_parts(self.head.clone(), body))
    }

    /// Whether it may be sent again although `endpoint` may have had it.
    fn may_repeat(&self, endpoint: &Endpoint) -> bool {
        endpoint.is_idempotent(self.head.method.as_str(), self.head.uri.path()) && self.is_whole()
    }

    /// Whether all of it can be said again.
    fn is_whole(&self) -> bool {
        self.source.as_ref().is_none_or(|source| source.can_repeat())
    }

    /// What is wrong with the client's side, if that is what failed.
    fn failure(&self) -> Option<Reason> {
        Some(match self.source.as_ref()?.failure()? {
            BodyError::Malformed(malformed) => Reason::Malformed(malformed),
            _ => Reason::BodyCut,
        })
    }
}

impl Http {
    /// Sends a request to an instance of its service and brings its response, or says why none comes.
    pub(super) async fn exchange(
        self: &Arc<Self>,
        asked: Asked<'_>,
    ) -> Result<Answered, Malformed> {
        let Asked { service, options, door, client, mut head, body, mut noted } = asked;
        let idle_max = options.limits.timeout.idle();
        let is_grpc = is_grpc(&head.headers);
        let is_http2 = head.version == Version::HTTP_2;
        let upgrade = head::upgrade(&head);
        head::forward_request(&mut head.headers, client, upgrade.clone())?;
        let deadline = self.deadline(&mut head, options.limits.timeout.request);
        if let Some(peer) = self.name() {
            head.headers.insert(PEER, peer);
        }
        let protocol = self.protocol(service).unwrap_or_default();
        self.address(&mut head, protocol, service)?;
        let body = Source::new(body, is_http2, idle_max);
        if protocol == Protocol::Http && body.is_some() && head::may_overlook_body(&head.method) {
            head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let choice = options.balancing.choice_by(client, Some(&head.headers));
        let outbox = Outbox { choice, is_grpc, source: body, protocol, head };
        let by_deadline = deadline.is_some();
        let late = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => pending().await,
            }
        };
        let outcome = tokio::select! {
            biased;
            outcome = self.ask_instances(service, options, outbox, &mut noted) => outcome,
            () = late, if by_deadline => Err(Reason::Deadline),
        };
        Ok(match outcome {
            Ok((response, kept, carried)) => {
                let patience = Patience::new(idle_max, deadline);
                self.relay(response, kept, carried, upgrade, patience)
            }
            Err(reason) => {
                let word = reason.word();
                self.outbound.metrics.count_refused(door, word);
                self.outbound.events.record(EventKind::ConnectionRefused, service, word);
                if let Some(noted) = noted {
                    noted.refused(Some(service), reason.status().as_u16(), word);
                }
                Answered { response: reason.answer(Some(service), is_grpc), switched: None }
            }
        })
    }

    async fn ask_instances(
        self: &Arc<Self>,
        service: &ServiceName,
        options: &EntryOptions,
        outbox: Outbox,
        noted: &mut Option<Box<Noted>>,
    ) -> Result<(Response<Incoming>, Option<Kept>, Carried), Reason> {
        let outbound = &self.outbound;
        // Of the entry's own limit; that it lets a caller wait for less is not the instance's fault.
        let limit = options.limits.timeout.request.map(|limit| limit.0.mul_f64(0.9));
        let mut search = Search::new(outbound, service, outbox.choice, limit);
        let (mut last, mut reached, mut is_paid) = (None, 0, false);
        let begun_at = outbound.clock.now();
        let budget = outbound.budgets.of(service, options.limits.retry.budget, begun_at);
        budget.note_request();
        loop {
            let dialled = match timeout(options.limits.timeout.connect(), search.next()).await {
                Ok(Ok(dialled)) => dialled,
                Ok(Err(_)) if reached > 0 => return Err(Reason::Lost),
                Ok(Err(none)) => return Err(Reason::NotTaken(last.unwrap_or(none.into()))),
                Err(_) => return Err(Reason::NotTaken(DialError::Timeout)),
            };
            if let Some(reason) = last
                && !std::mem::take(&mut is_paid)
                && !outbound.may_retry(&budget, reason)
            {
                let is_lost = reached > 0;
                return Err(if is_lost { Reason::Lost } else { Reason::NotTaken(reason) });
            }
            let Dialled { way, call } = dialled;
            // It was the less busy of two.
            if call.count() > IN_FLIGHT_MAX {
                return Err(Reason::NotTaken(DialError::Overflow));
            }
            let mut link = None;
            let attempt = match way {
                Ok(way) => {
                    if let outbound::Way::There(there) = way {
                        link = Some(there);
                    }
                    call.ask();
                    let has_other = || outbound.has_better(service, &outbox.choice, &search.tried);
                    self.ask(options, service, call.endpoint(), link.as_ref(), &outbox, has_other)
                        .await
                }
                Err(error) => Err(Miss::from(error)),
            };
            let is_link_open = link.as_ref().is_none_or(|link| link.is_open());
            if last.is_some() {
                let result = if attempt.is_ok() { "success" } else { "failure" };
                outbound.metrics.count_retry(result);
            }
            if attempt.is_err()
                && let Some(reason) = outbox.failure()
            {
                return Err(reason);
            }
            match attempt {
                Ok((response, kept, stream)) => {
                    call.note_answer();
                    outbound.forgive(&call);
                    let early = early_outcome(&response, outbox.is_grpc);
                    if let Some(outcome) = early {
                        call.judge(outcome);
                    }
                    reached += 1;
                    if early == Some(Outcome::Failed)
                        && reached < options.limits.retry.tries()
                        && outbox.may_repeat(call.endpoint())
                        && !outbound.is_failing(service)
                        && outbound.has_better(service, &outbox.choice, &search.tried)
                        && outbound.may_retry(&budget, DialError::Lost)
                    {
                        (last, is_paid) = (Some(DialError::Lost), true);
                        continue;
                    }
                    if let Some(source) = &outbox.source {
                        source.settle();
                    }
                    let endpoint = call.endpoint();
                    let (peer, name) = (endpoint.member, &endpoint.member_name);
                    let traffic = outbound.traffic.of(Direction::outbound, service, peer, name);
                    let status = response.status().as_u16();
                    if let Some(noted) = noted {
                        noted.answered(service, endpoint, status);
                    }
                    let carried = Carried {
                        http: Arc::clone(self),
                        noted: noted.take(),
                        exchange: traffic.exchange(begun_at, status),
                        bytes: traffic.bytes,
                        key: (endpoint.member, endpoint.instance.clone()),
                        call,
                        link,
                        is_grpc: outbox.is_grpc,
                        _stream: stream,
                    };
                    return Ok((response, kept, carried));
                }
                Err(Miss::NotTaken(Setback::Next { reason, avoid })) => {
                    if avoid == Avoid::Member && reason == DialError::Lost && is_link_open {
                        call.judge(Outcome::Failed); // it took the connection and closed it unread
                    }
                    outbound.avoid(&call, avoid, reason);
                    last = Some(reason);
                    if !outbox.is_whole() {
                        return Err(Reason::NotTaken(reason));
                    }
                }
                Err(Miss::Repeatable(reason, avoid)) => {
                    if avoid == Avoid::Instance && is_link_open {
                        call.judge(Outcome::Failed);
                    }
                    outbound.avoid(&call, avoid, reason);
                    last = Some(reason);
                    reached += 1;
                    if reached >= options.limits.retry.tries() || outbound.is_failing(service) {
                        return Err(Reason::Lost);
                    }
                }
                Err(Miss::NotTaken(Setback::Final(reason))) => {
                    return Err(Reason::NotTaken(reason));
                }
                Err(Miss::NotTaken(Setback::Cut(_)) | Miss::Lost) => {
                    call.judge(if is_link_open { Outcome::Failed } else { Outcome::Unknown });
                    return Err(Reason::Lost);
                }
                Err(Miss::TimedOut) => {
                    call.judge(if is_link_open { Outcome::Failed } else { Outcome::Unknown });
                    return Err(Reason::Timeout);
                }
            }
        }
    }

    /// Asks one instance, first on a connection that is there.
    async fn ask(
        &self,
        options: &EntryOptions,
        service: &ServiceName,
        endpoint: &Endpoint,
        link: Option<&Arc<Link>>,
        outbox: &Outbox,
        has_other: impl Fn() -> bool,
    ) -> Attempt {
        let key = (endpoint.member, endpoint.instance.clone());
        let asking = async {
            if outbox.protocol == Protocol::Http {
                if let Some(kept) = self.pool.take(&key) {
                    match kept.send(outbox.request()?).await {
                        Err(Unanswered::Unsent) => {} // the instance had closed it
                        outcome => {
                            return outbox
                                .judge(endpoint, outcome.map(|(r, k)| (r, Some(k), None)));
                        }
                    }
                }
                let kept = Kept::new(self.open(options, service, endpoint, link).await?).await;
                let kept = kept.map_err(|_| lost())?;
                let outcome = kept.send(outbox.request()?).await;
                return outbox
                    .judge(endpoint, outcome.map(|(response, kept)| (response, Some(kept), None)));
            }
            let now = self.outbound.clock.now();
            if let Some((shared, stream)) = self.pool.share(&key, now) {
                match shared.send(outbox.request()?).await {
                    Err(Unanswered::Unsent) => {} // it is over
                    outcome => {
                        return outbox.judge(endpoint, outcome.map(|r| (r, None, Some(stream))));
                    }
                }
            }
            let way = self.open(options, service, endpoint, link).await?;
            let shared = Shared::new(way, self.tasks.clone()).await.map_err(|_| lost())?;
            let stream = self.pool.add(key.clone(), &shared, now);
            let outcome = shared.send(outbox.request()?).await;
            outbox.judge(endpoint, outcome.map(|response| (response, None, Some(stream))))
        };
        let silent = async {
            match link {
                Some(link) if outbox.may_repeat(endpoint) => link.silent().await,
                _ => pending().await,
            }
            if !(outbox.is_whole() && has_other()) {
                pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            outcome = timeout(options.limits.timeout.idle(), asking) => {
                if outcome.as_ref().is_ok_and(Result::is_ok) && let Some(link) = link {
                    link.note_answer();
                }
                outcome.unwrap_or(Err(Miss::TimedOut))
            }
            () = silent => Err(Miss::Repeatable(DialError::Silent, Avoid::Member)),
        }
    }

    /// Begins a new connection to an instance.
    async fn open(
        &self,
        options: &EntryOptions,
        service: &ServiceName,
        endpoint: &Endpoint,
        link: Option<&Arc<Link>>,
    ) -> Result<Way, Setback> {
        let Some(link) = link else {
            let own = self.outbound.connect_own(service, &endpoint.instance).await?;
            return Ok(Way::Local(own));
        };
        let header = Header {
            service: service.clone(),
            instance: endpoint.instance.clone(),
            source: options.source.clone(),
            mode: match self.protocol(service) {
                Some(Protocol::H2 | Protocol::Grpc) => Mode::HTTP2,
                _ => Mode::HTTP1,
            },
        };
        let header = header.encode().map_err(|_| Setback::Final(DialError::Unsupported))?;
        let (writer, reader) = link.open().await?;
        Ok(Way::Tunnel { writer, reader, header, is_open: false })
    }

    /// Hands a response on, with its connection once both sides have agreed to switch.
    fn relay(
        &self,
        mut response: Response<Incoming>,
        kept: Option<Kept>,
        carried: Carried,
        upgrade: Option<HeaderValue>,
        patience: Patience,
    ) -> Answered {
        let node = HeaderValue::from_str(carried.call.endpoint().member_name.as_str()).ok();
        let is_switch = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        let switched_to = upgrade.filter(|_| is_switch);
        let is_upgrade = switched_to.is_some();
        head::forward_response(response.headers_mut(), switched_to);
        let (head, body) = response.into_parts();
        let (body, switched) = match kept {
            Some(kept) if is_upgrade => {
                let (io, said) = kept.into_io();
                (Outgoing::EMPTY, Some(Switched { io, said, carried }))
            }
            kept => (Outgoing::relay(body, kept, carried, patience), None),
        };
        let mut response = Response::from_parts(head, body);
        if let Some(node) = node {
            response.headers_mut().insert(NODE, node);
        }
        *response.version_mut() = Version::HTTP_11;
        Answered { response, switched }
    }

    /// When the caller's time is over: its own word, or the entry's limit, whichever is nearer. The
    /// instance is told what is left.
    fn deadline(&self, head: &mut Parts, limit: Option<Span>) -> Option<Instant> {
        let text = head.headers.get(DEADLINE).and_then(|value| value.to_str().ok());
        let left = text.and_then(|text| text.parse().ok()).map(Duration::from_millis);
        let limit = limit.map(|span| span.0);
        let left = left.into_iter().chain(limit).min();
        match left {
            Some(left) => {
                let millis = u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
                head.headers.insert(DEADLINE, HeaderValue::from(millis));
            }
            None => drop(head.headers.remove(DEADLINE)),
        }
        left.and_then(|left| Instant::now().checked_add(left))
    }

    /// Writes where the request goes as the instance's protocol says it.
    fn address(
        &self,
        head: &mut Parts,
        protocol: Protocol,
        service: &ServiceName,
    ) -> Result<(), Malformed> {
        let path = head.uri.path_and_query().cloned();
        let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
        if !head.headers.contains_key(HOST) {
            // HTTP/2 says it in its target, HTTP/1.0 need not say it, and HTTP/1.1 always has one.
            let host = head.uri.authority().map_or(service.as_str(), |host| host.as_str());
            let host = HeaderValue::from_str(host).map_err(|_| Malformed::Host)?;
            head.headers.insert(HOST, host);
        }
        let mut uri = http::uri::Parts::default();
        if protocol == Protocol::Http {
            head.version = Version::HTTP_11;
        } else {
            let host = head.headers.remove(HOST);
            let host = host.as_ref().and_then(|host| host.to_str().ok());
            let authority = head.uri.authority().cloned();
            uri.authority = authority.or_else(|| host?.parse().ok());
            uri.scheme = Some(Scheme::HTTP);
            head.headers.remove(CONNECTION);
            head.version = Version::HTTP_2;
        }
        uri.path_and_query = Some(path);
        head.uri = Uri::from_parts(uri).map_err(|_| Malformed::Target)?;
        head.extensions = http::Extensions::new();
        Ok(())
    }
}

impl Outbox {
    fn judge<T>(&self, endpoint: &Endpoint, outcome: Result<T, Unanswered>) -> Result<T, Miss> {
        outcome.map_err(|unanswered| match unanswered {
            Unanswered::Refused(refusal) => refusal.into(),
            Unanswered::Unsent => lost().into(),
            Unanswered::Unknown if self.may_repeat(endpoint) => {
                Miss::Repeatable(DialError::Lost, Avoid::Instance)
            }
            Unanswered::Unknown => Miss::Lost,
        })
    }
}

/// What the head of a response says of its instance; `None` where the rest is still to say it. Faults
/// of the caller say nothing.
fn early_outcome(response: &Response<Incoming>, is_grpc: bool) -> Option<Outcome> {
    let status = response.status();
    if is_grpc && status == StatusCode::OK {
        return grpc_outcome(response.headers());
    }
    if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED {
        return Some(Outcome::Failed);
    }
    status.is_client_error().then_some(Outcome::Unknown)
}

/// What gRPC's status says of the instance, if it is there.
fn grpc_outcome(fields: &HeaderMap) -> Option<Outcome> {
    let status = fields.get(GRPC_STATUS)?;
    Some(match status.as_bytes() {
        // UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS
        b"2" | b"4" | b"13" | b"14" | b"15" => Outcome::Failed,
        // CANCELLED, INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED,
        // RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNAUTHENTICATED
        b"1" | b"3" | b"5" | b"6" | b"7" | b"8" | b"9" | b"10" | b"11" | b"16" => Outcome::Unknown,
        _ => Outcome::Success, // OK and UNIMPLEMENTED
    })
}

fn lost() -> Setback {
    Setback::Next { reason: DialError::Lost, avoid: Avoid::Member }
}
