//! One request and its response: what is said to the instance and to the client, and what is counted.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::header::{CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Response, StatusCode, Uri, Version};
use tokio::time::Instant;

use super::Http;
use super::answer::{NODE, OwnAnswer};
use super::asking::{Answer, Question, grpc_outcome};
use super::body::{BodyError, Outgoing, Patience, Source};
use super::head::{self, ClientAddress};
use super::malformed::Malformed;
use super::miss::Unanswerable;
use super::noted::Noted;
use super::onward::Onward;
use super::outbox::Outbox;
use super::pool::Stream;
use super::request_body::RequestBody;
use super::upstream::{Brought, Kept, UpstreamIo};
use super::whose::Whose;
use crate::model::{Moment, Outcome, Protocol, ServiceName};
use crate::proxy::call::Call;
use crate::proxy::last_asked::LastAsked;
use crate::proxy::tcp::Cut;
use crate::proxy::traffic::{Exchange, Meter};
use crate::proxy::{EntryOptions, Span};
use crate::telemetry::{Door, EventKind};
use crate::transport::Link;

/// The caller's member, as its agent says. What the certificate proves is in PROXY protocol's header.
const PEER: HeaderName = HeaderName::from_static("x-murmesh-peer");

/// A request and where it is to go.
pub(super) struct Asked<'a> {
    pub(super) service: &'a ServiceName,
    pub(super) options: &'a EntryOptions,
    pub(super) door: Door,
    pub(super) client: Option<&'a ClientAddress>,
    /// In a box: it passes through many hands.
    pub(super) head: Box<Parts>,
    pub(super) body: RequestBody,
    pub(super) is_grpc: bool,
    pub(super) noted: Option<Box<Noted>>,
}

/// A response whose head has come.
pub(super) struct Answered {
    pub(super) response: Response<Outgoing>,
    /// The connection itself, where both sides agreed to speak something else from here on.
    pub(super) onward: Option<Box<Onward>>,
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
    whose: Arc<Whose>,
    exchange: Exchange,
    call: Call,
    /// What is wrong with what the client sends, if something is.
    client_failure: Option<Arc<OnceLock<BodyError>>>,
    /// To the agent of the instance; `None` where that is this one.
    link: Option<Arc<Link>>,
    /// Whether its status comes last, as gRPC has it.
    is_grpc: bool,
    _stream: Option<Stream>,
}

impl Carried {
    /// A piece of the response is on its way.
    pub(super) fn count(&self, len: usize) {
        self.meter().count_sent(len);
    }

    /// Where its bytes are counted.
    pub(super) fn meter(&self) -> Meter<'_> {
        let counters = self.whose.counters(&self.http.outbound.traffic);
        Meter::new(&counters.bytes, self.noted.as_ref().map(|noted| noted.bytes()))
    }

    /// The trailers of the response.
    pub(super) fn handle_trailers(&self, trailers: &HeaderMap) {
        if self.is_grpc {
            self.call.judge(grpc_outcome(trailers).unwrap_or(Outcome::Failed));
        }
    }

    /// The instance did not say the rest of the response.
    pub(super) fn cut(&mut self) {
        if self.client_failure.as_ref().is_some_and(|failure| failure.get().is_some()) {
            return self.call.judge(Outcome::Unknown); // the client has cut its request
        }
        self.ended_by("cut");
        let endpoint = self.call.endpoint();
        let fields = LastAsked::new(endpoint).fields();
        let events = &self.http.outbound.events;
        events.record_with(EventKind::RequestFailed, &self.whose.key.0, "cut", fields);
        let is_its_fault = self.link.as_ref().is_none_or(|link| link.is_open());
        self.call.judge(if is_its_fault { Outcome::Failed } else { Outcome::Unknown });
    }

    /// The time that the caller gave is over before the response is whole.
    pub(super) fn is_late(&mut self) {
        self.ended_by("deadline");
    }

    fn ended_by(&mut self, reason: &'static str) {
        if let Some(noted) = &mut self.noted {
            noted.ended_by(reason);
        }
    }

    /// The response is whole. Its connection is kept when nothing is left of the exchange on it.
    pub(super) fn end(self, upstream: Option<Kept>) {
        let now = self.http.outbound.clock.now();
        if let Some(kept) = upstream
            && kept.is_idle()
        {
            match self.call.picked().shares_connections() {
                true => self.http.pool.put(kept, now),
                false => kept.end(),
            }
        }
        self.call.end(now, if self.is_grpc { Outcome::Failed } else { Outcome::Success });
        self.exchange.end(now);
        if let Some(noted) = self.noted {
            noted.end();
        }
    }

    /// An upgraded connection ended like this.
    pub(super) fn end_switched(mut self, outcome: &Result<(), Cut>) {
        match outcome {
            Ok(()) => self.end(None),
            Err(Cut::Tunnel(_)) => self.ended_by("cut"),
            Err(Cut::Local(_) | Cut::Stalled) => {} // as far as is known the client went
        }
    }
}

impl Http {
    /// Sends a request to an instance of its service and brings its response, or says why none comes.
    pub(super) async fn exchange(self: &Arc<Self>, mut asked: Asked<'_>) -> Answered {
        let (service, door, is_grpc) = (asked.service, asked.door, asked.is_grpc);
        let (mut noted, begun_at) = (asked.noted.take(), self.outbound.clock.now());
        if let Some(noted) = &mut noted {
            noted.is_for(service);
        }
        let decline =
            |unanswerable, noted| self.decline(service, door, is_grpc, unanswerable, noted);
        let (question, upgrade) = match self.prepare(asked) {
            Ok(prepared) => prepared,
            Err(malformed) => return decline(malformed.into(), noted),
        };
        match question.ask_in_time(&mut noted).await {
            Ok(answer) => self.relay(&question, answer, begun_at, noted, upgrade),
            Err(unanswerable) => decline(unanswerable, noted),
        }
    }

    /// Says why no instance's response comes.
    fn decline(
        &self,
        service: &ServiceName,
        door: Door,
        is_grpc: bool,
        Unanswerable { reason, last }: Unanswerable,
        noted: Option<Box<Noted>>,
    ) -> Answered {
        if let Some(kind) = reason.event(last.as_ref()) {
            let fields = last.as_ref().map(LastAsked::fields).unwrap_or_default();
            self.outbound.events.record_with(kind, service, reason.word(), fields);
        }
        self.outbound.metrics.count_refused(door, reason.word());
        let answer = OwnAnswer { reason, service: Some(service), last: last.as_ref(), is_grpc };
        Answered { response: answer.response(noted), onward: None }
    }

    /// Makes of what a client asks what an instance is asked, and says what it is to upgrade to.
    fn prepare<'a>(
        &'a self,
        asked: Asked<'a>,
    ) -> Result<(Question<'a>, Option<HeaderValue>), Malformed> {
        let Asked { service, options, client, mut head, body, is_grpc, .. } = asked;
        let upgrade = head::upgrade(&head);
        head::forward_request(&mut head.headers, client, upgrade.clone())?;
        let deadline = deadline(&head.headers, options.limits.timeout.request)?;
        if let Some(peer) = self.name() {
            head.headers.insert(PEER, peer);
        }
        let protocol = self.protocol(service).unwrap_or_default();
        self.address(&mut head, protocol, service)?;
        let source = Source::new(body, options.limits.timeout.idle(), self.outbound.clock);
        if protocol == Protocol::Http && source.is_some() && head::may_overlook_body(&head.method) {
            head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let ip = client.map(|client| client.ip);
        let choice = options.balancing.choice_by(ip, Some(&head.headers));
        let outbox = Outbox { choice, is_grpc, source, protocol, head, deadline };
        Ok((Question { http: self, service, options, outbox }, upgrade))
    }

    /// Hands a response on, with its connection once both sides have agreed to switch.
    fn relay(
        self: &Arc<Self>,
        question: &Question<'_>,
        answer: Answer,
        begun_at: Moment,
        mut noted: Option<Box<Noted>>,
        upgrade: Option<HeaderValue>,
    ) -> Answered {
        let Question { outbox, options, .. } = question;
        if let Some(source) = &outbox.source {
            source.settle();
        }
        let Answer { brought, call, link } = answer;
        let Brought { mut response, whose, kept, stream } = *brought;
        let (status, endpoint) = (response.status(), call.endpoint());
        if let Some(noted) = &mut noted {
            noted.answered(endpoint, status.as_u16());
        }
        let node = whose.node.clone();
        let carried = Carried {
            http: Arc::clone(self),
            noted,
            exchange: whose.counters(&self.outbound.traffic).exchange(begun_at, status.as_u16()),
            whose,
            call,
            client_failure: outbox.source.as_ref().map(|source| source.failure_to_come()),
            link,
            is_grpc: outbox.is_grpc,
            _stream: stream,
        };
        let switched_to = upgrade.filter(|_| status == StatusCode::SWITCHING_PROTOCOLS);
        let is_upgrade = switched_to.is_some();
        head::forward_response(response.headers_mut(), switched_to);
        let (head, body) = response.into_parts();
        let (body, onward) = match kept {
            Some(kept) if is_upgrade => {
                let (io, said) = kept.into_io();
                let onward = Onward::Upgraded(Switched { io, said, carried });
                (Outgoing::EMPTY, Some(Box::new(onward)))
            }
            kept => {
                let patience = Patience::new(options.limits.timeout.idle(), outbox.deadline);
                (Outgoing::relay(body, kept, carried, patience), None)
            }
        };
        let mut response = Response::from_parts(head, body);
        if let Some(node) = node {
            response.headers_mut().insert(NODE, node);
        }
        *response.version_mut() = Version::HTTP_11;
        Answered { response, onward }
    }

    /// Writes where the request goes as the instance's protocol says it.
    fn address(
        &self,
        head: &mut Parts,
        protocol: Protocol,
        service: &ServiceName,
    ) -> Result<(), Malformed> {
        if !head.headers.contains_key(HOST) {
            // HTTP/2 says it in its target, HTTP/1.0 need not say it, and HTTP/1.1 always has one.
            let host = head.uri.authority().map_or(service.as_str(), |host| host.as_str());
            let host = HeaderValue::from_str(host).map_err(|_| Malformed::Host)?;
            head.headers.insert(HOST, host);
        }
        if protocol == Protocol::Http {
            head.version = Version::HTTP_11;
            if head.uri.authority().is_some() {
                head.uri = uri(&head.uri, None)?;
            }
        } else {
            let host = head.headers.remove(HOST);
            let host = host.as_ref().and_then(|host| host.to_str().ok());
            let authority = head.uri.authority().cloned().or_else(|| host?.parse().ok());
            head.uri = uri(&head.uri, Some(authority.ok_or(Malformed::Target)?))?;
            head.headers.remove(CONNECTION);
            head.version = Version::HTTP_2;
        }
        head.extensions = http::Extensions::new();
        Ok(())
    }
}

/// What of `target` is said to an instance: with where it is, as HTTP/2 has it, or without.
fn uri(target: &Uri, authority: Option<Authority>) -> Result<Uri, Malformed> {
    let mut uri = http::uri::Parts::default();
    let path = target.path_and_query().cloned();
    uri.path_and_query = Some(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    uri.scheme = authority.as_ref().map(|_| Scheme::HTTP);
    uri.authority = authority;
    Uri::from_parts(uri).map_err(|_| Malformed::Target)
}

/// When the caller's time is over: its own word, or the entry's limit, whichever is nearer.
fn deadline(headers: &HeaderMap, limit: Option<Span>) -> Result<Option<Instant>, Malformed> {
    let left = head::time_left(headers)?.into_iter().chain(limit.map(|span| span.0)).min();
    Ok(left.and_then(|left| Instant::now().checked_add(left)))
}
