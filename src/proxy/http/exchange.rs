//! One request and its response: which instance, when another one, and what is counted.
//!
//! **A request is sent again only on proof that no byte of it reached an application**, or where its
//! service declares it idempotent. The proof is a refusal by the instance's agent, nothing written, a
//! connection that the instance had closed before it was given a byte of the request, or HTTP/2's
//! own word. Everything else is answered with 502 `lost`: it may have been done.

use std::future::pending;
use std::net::IpAddr;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HOST, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{Request, Response, StatusCode, Uri, Version};
use hyper::body::Incoming;
use tokio::time::{Instant, sleep_until, timeout};

use super::Http;
use super::answer::{Reason, is_grpc};
use super::body::{BodyError, Download, Outgoing, Source, Upload};
use super::head::{self, Malformed};
use super::pool::{Key, Stream};
use super::upstream::{Kept, Shared, Unanswered, UpstreamIo, Way};
use crate::mesh::Endpoint;
use crate::model::{Protocol, ServiceName};
use crate::proxy::dial::DialError;
use crate::proxy::instances::Call;
use crate::proxy::outbound::{self, Avoid, CONNECT_TIME_MAX, Dialled, Search, Setback};
use crate::proxy::traffic::Exchange;
use crate::telemetry::{Counter, Direction, Door, EventKind};
use crate::transport::Link;
use crate::transport::tunnel::{Header, Mode};

/// How long neither side of an exchange may say anything, and how long a response may take to begin,
/// unless its caller's deadline is nearer.
pub(super) const IDLE_TIME_MAX: Duration = Duration::from_secs(300);
/// By how much the time that is left shrinks at each agent, so that whoever asked hears the reason
/// from the agent that knows it best.
const DEADLINE: HeaderName = HeaderName::from_static("x-murmesh-deadline-ms");
/// The caller's member. What its agent says; the tunnel proves the agent, not the application.
const PEER: HeaderName = HeaderName::from_static("x-murmesh-peer");

/// A request and where it is to go.
pub(super) struct Asked<'a> {
    pub(super) service: &'a ServiceName,
    pub(super) source: Option<&'a ServiceName>,
    pub(super) door: Door,
    pub(super) client: Option<IpAddr>,
    pub(super) head: Parts,
    pub(super) body: Incoming,
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
    key: Key,
    exchange: Exchange,
    pub(super) bytes: Counter,
    _call: Call,
    _stream: Option<Stream>,
}

impl Carried {
    pub(super) fn count(&self, len: usize) {
        self.bytes.inc_by(len as u64);
    }

    /// The response is whole. Its connection is kept when it is free for another.
    pub(super) fn end(self, upstream: Option<Kept>, cx: &mut Context<'_>) {
        let now = self.http.outbound.clock.now();
        if let Some(mut kept) = upstream
            && kept.poll_is_free(cx)
        {
            self.http.pool.put(self.key, kept, now);
        }
        self.exchange.end(now);
    }

    /// An upgraded connection ended like this.
    pub(super) fn end_switched(self, outcome: &Result<(), crate::proxy::tcp::Cut>) {
        if outcome.is_ok() {
            self.exchange.end(self.http.outbound.clock.now());
        }
    }
}

/// What one instance made of a request.
type Attempt = Result<(Response<Incoming>, Option<Kept>, Option<Stream>), Setback>;

/// A request as it can be said to several instances.
struct Outbox {
    head: Parts,
    source: Option<Arc<Source>>,
    protocol: Protocol,
}

impl Outbox {
    /// The request for one attempt.
    fn request(&self) -> Request<Upload> {
        let body = self.source.as_ref().map_or(Upload::EMPTY, |source| source.attempt());
        Request::from_parts(self.head.clone(), body)
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
        let Asked { service, source, door, client, mut head, body } = asked;
        let is_grpc = is_grpc(&head.headers);
        let upgrade = head::upgrade(&head);
        head::forward_request(&mut head.headers, client, upgrade.clone())?;
        let deadline = self.deadline(&mut head);
        let protocol = self.protocol(service).unwrap_or_default();
        self.address(&mut head, protocol, service)?;
        let body = Source::new(body, IDLE_TIME_MAX);
        if protocol == Protocol::Http && body.is_some() && head::may_overlook_body(&head.method) {
            head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let outbox = Outbox { source: body, protocol, head };
        let by_deadline = deadline.is_some();
        let late = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => pending().await,
            }
        };
        let outcome = tokio::select! {
            biased;
            outcome = self.ask_instances(service, source, outbox) => outcome,
            () = late, if by_deadline => Err(Reason::Deadline),
        };
        Ok(match outcome {
            Ok((response, kept, carried)) => self.relay(response, kept, carried, upgrade),
            Err(reason) => {
                let word = reason.word();
                self.outbound.metrics.count_refused(door, word);
                self.outbound.events.record(EventKind::ConnectionRefused, service, word);
                Answered { response: reason.answer(Some(service), is_grpc), switched: None }
            }
        })
    }

    async fn ask_instances(
        self: &Arc<Self>,
        service: &ServiceName,
        source: Option<&ServiceName>,
        outbox: Outbox,
    ) -> Result<(Response<Incoming>, Option<Kept>, Carried), Reason> {
        let outbound = &self.outbound;
        let mut search = Search::new(outbound, service);
        let mut last: Option<DialError> = None;
        let begun_at = outbound.clock.now();
        let budget = outbound.budgets.of(service, begun_at);
        budget.note_request();
        loop {
            let dialled = match timeout(CONNECT_TIME_MAX, search.next()).await {
                Ok(Ok(dialled)) => dialled,
                Ok(Err(none)) => {
                    let none = last.unwrap_or(none.into());
                    return Err(Reason::NotTaken(none));
                }
                Err(_) => return Err(Reason::NotTaken(DialError::Timeout)),
            };
            if let Some(reason) = last
                && !outbound.may_retry(&budget, reason)
            {
                return Err(Reason::NotTaken(reason));
            }
            let Dialled { endpoint, way, call } = dialled;
            let attempt = match way {
                Ok(way) => {
                    let has_other = || outbound.has_better(service, &search.picked);
                    self.ask(source, service, &endpoint, &way, &outbox, has_other).await
                }
                Err(error) => Err(error.into()),
            };
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
                    outbound.avoided.forgive(&endpoint);
                    if let Some(source) = &outbox.source {
                        source.settle();
                    }
                    let traffic = outbound.traffic.of(
                        Direction::outbound,
                        service,
                        endpoint.member,
                        &endpoint.member_name,
                    );
                    let carried = Carried {
                        http: Arc::clone(self),
                        exchange: traffic.exchange(begun_at, response.status().as_u16()),
                        bytes: traffic.bytes,
                        key: (endpoint.member, endpoint.instance),
                        _call: call,
                        _stream: stream,
                    };
                    return Ok((response, kept, carried));
                }
                Err(Setback::Next { reason, avoid }) => {
                    outbound.avoid(&endpoint, avoid, reason);
                    last = Some(reason);
                    if !outbox.is_whole() {
                        return Err(Reason::NotTaken(reason));
                    }
                }
                Err(Setback::Final(reason)) => {
                    return Err(Reason::NotTaken(reason));
                }
                Err(Setback::Cut(_)) => return Err(Reason::Lost),
            }
        }
    }

    /// Asks one instance, first on a connection that is there.
    async fn ask(
        &self,
        source: Option<&ServiceName>,
        service: &ServiceName,
        endpoint: &Endpoint,
        way: &outbound::Way,
        outbox: &Outbox,
        has_other: impl Fn() -> bool,
    ) -> Attempt {
        let key = (endpoint.member, endpoint.instance.clone());
        let link = match way {
            outbound::Way::Here => None,
            outbound::Way::There(link) => Some(link),
        };
        let asking = async {
            if outbox.protocol == Protocol::Http {
                if let Some(kept) = self.pool.take(&key).await {
                    match kept.send(outbox.request()).await {
                        Err(Unanswered::Unsent) => {} // the instance had closed it
                        outcome => {
                            return outbox
                                .judge(endpoint, outcome.map(|(r, k)| (r, Some(k), None)));
                        }
                    }
                }
                let kept = Kept::new(self.open(source, service, endpoint, link).await?).await;
                let kept = kept.map_err(|_| lost())?;
                let outcome = kept.send(outbox.request()).await;
                return outbox
                    .judge(endpoint, outcome.map(|(response, kept)| (response, Some(kept), None)));
            }
            let now = self.outbound.clock.now();
            if let Some((shared, stream)) = self.pool.share(&key, now) {
                match shared.send(outbox.request()).await {
                    Err(Unanswered::Unsent) => {} // it is over
                    outcome => {
                        return outbox.judge(endpoint, outcome.map(|r| (r, None, Some(stream))));
                    }
                }
            }
            let way = self.open(source, service, endpoint, link).await?;
            let shared = Shared::new(way, self.tasks.clone()).await.map_err(|_| lost())?;
            let stream = self.pool.add(key.clone(), &shared, now);
            let outcome = shared.send(outbox.request()).await;
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
            outcome = timeout(IDLE_TIME_MAX, asking) => {
                if outcome.as_ref().is_ok_and(Result::is_ok) && let Some(link) = link {
                    link.note_answer();
                }
                outcome.unwrap_or(Err(Setback::Final(DialError::Timeout)))
            }
            () = silent => Err(Setback::Next { reason: DialError::Silent, avoid: Avoid::Member }),
        }
    }

    /// Begins a new connection to an instance.
    async fn open(
        &self,
        source: Option<&ServiceName>,
        service: &ServiceName,
        endpoint: &Endpoint,
        link: Option<&Arc<Link>>,
    ) -> Result<Way, Setback> {
        let Some(link) = link else {
            let instances = &self.outbound.instances;
            return Ok(Way::Local(instances.connect(service, &endpoint.instance).await?));
        };
        let header = Header {
            service: service.clone(),
            instance: endpoint.instance.clone(),
            source: source.cloned(),
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
    ) -> Answered {
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
            kept => {
                let download = Download::new(body, kept, carried, IDLE_TIME_MAX);
                (Outgoing::Relay(Box::new(download)), None)
            }
        };
        let mut response = Response::from_parts(head, body);
        *response.version_mut() = Version::HTTP_11;
        Answered { response, switched }
    }

    /// When the caller's time is over. What is left of it is what the instance is told.
    fn deadline(&self, head: &mut Parts) -> Option<Instant> {
        let text = head.headers.get(DEADLINE)?.to_str().ok()?;
        let left = Duration::from_millis(text.parse().ok()?);
        Some(Instant::now() + left)
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
    fn judge<T>(&self, endpoint: &Endpoint, outcome: Result<T, Unanswered>) -> Result<T, Setback> {
        match outcome {
            Ok(answered) => Ok(answered),
            Err(Unanswered::Refused(refusal)) => Err(refusal.into()),
            Err(Unanswered::Unsent) => Err(lost()),
            Err(Unanswered::Unknown) if self.may_repeat(endpoint) => {
                Err(Setback::Next { reason: DialError::Lost, avoid: Avoid::Instance })
            }
            Err(Unanswered::Unknown) => Err(Setback::Cut(crate::proxy::tcp::Cut::Local(
                std::io::ErrorKind::ConnectionReset,
            ))),
        }
    }
}

fn lost() -> Setback {
    Setback::Next { reason: DialError::Lost, avoid: Avoid::Member }
}
