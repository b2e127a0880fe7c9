//! One client: where its requests go, and what it is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::Waker;

use http::header::{CONNECTION, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use parking_lot::Mutex;

use super::answer::{OwnAnswer, Reason, is_grpc};
use super::body::Outgoing;
use super::exchange::{Answered, Asked};
use super::gate::Gate;
use super::head::{self, ClientAddress};
use super::malformed::Malformed;
use super::noted::{Noted, RequestLine};
use super::onward::Onward;
use super::request_body::RequestBody;
use super::{Destination, Http, Site, outside};
use crate::model::{Protocol, ServiceName, service_of};
use crate::proxy::ingress::{PublicHosts, Route};
use crate::proxy::local::LocalSocket;
use crate::proxy::outbound::{Ask, Greeting};
use crate::telemetry::Door;

/// One client's connection: what its reader, its service and its driver share.
pub(super) struct Client {
    pub(super) http: Arc<Http>,
    pub(super) site: Site,
    /// Where it is, unless it came by a unix socket.
    address: Option<ClientAddress>,
    /// Requests that wait for the head of their answer.
    in_flight: AtomicU32,
    /// Whether an answer is awaited or under way.
    is_answered: AtomicBool,
    /// Whether the connection ends with the answer that is under way, which may be long.
    is_last: AtomicBool,
    /// Of HTTP/1.1.
    pub(super) front: Mutex<Front>,
}

/// What the reader of a connection of HTTP/1.1 and those who answer on it tell each other.
pub(super) struct Front {
    pub(super) gate: Gate,
    /// Why the last request is refused, once it is.
    pub(super) refused: Option<Malformed>,
    /// Wakes whoever reads: what is held behind a request to upgrade may pass once that is declined.
    pub(super) reader: Waker,
    pub(super) onward: Option<Box<Onward>>,
}

/// One answer to a client of HTTP/1.1, from its request until all of it was handed on or nobody wants it.
pub(super) struct Answering(Arc<Client>);

impl Answering {
    fn new(client: &Arc<Client>) -> Self {
        client.is_answered.store(true, Ordering::Relaxed);
        Self(Arc::clone(client))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.is_answered.store(false, Ordering::Relaxed);
    }
}

/// Why a request goes nowhere, and to which service it would have gone.
type Unrouted = (Reason, Option<ServiceName>);

impl Client {
    pub(super) fn new(http: Arc<Http>, site: Site, socket: &LocalSocket) -> Self {
        let front =
            Front { gate: Gate::new(), refused: None, reader: Waker::noop().clone(), onward: None };
        let address = socket.peer().and_then(ClientAddress::new);
        let in_flight = AtomicU32::new(0);
        let (is_answered, is_last) = (AtomicBool::new(false), AtomicBool::new(false));
        let front = Mutex::new(front);
        Self { http, site, address, in_flight, is_answered, is_last, front }
    }

    /// Whether nothing is under way but the rest of an answer, and another request may come.
    pub(super) fn is_resting(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) == 0
            && !self.is_last.load(Ordering::Relaxed)
            && self.front.lock().gate.is_between_messages()
    }

    /// Whether an answer is awaited or under way.
    pub(super) fn is_answered(&self) -> bool {
        self.is_answered.load(Ordering::Relaxed)
    }

    pub(super) async fn answer_http1(
        self: &Arc<Self>,
        head: Box<Parts>,
        body: Incoming,
    ) -> Response<Outgoing> {
        let answering = Answering::new(self);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        // Only then the gate waits; another one may have passed behind this request, and wait still.
        let asked_onward = head.method == Method::CONNECT || head::has(&head.headers, &UPGRADE);
        let asked_to_end = is_last(head.version, &head.headers);
        let response = match self.refusal(&head) {
            Some(malformed) => {
                let line = RequestLine::of_refused(self.front.lock().gate.refused_line());
                let unrouted = (Reason::Malformed(malformed), None);
                self.turn_away(unrouted, false, self.noted(|| line))
            }
            None => self.answer(head, RequestBody::http1(body)).await,
        };
        let mut response = self.released(response);
        if let Outgoing::Relay(download) = response.body_mut() {
            download.answering = Some(answering);
        }
        if asked_to_end || says(response.headers(), "close") {
            self.is_last.store(true, Ordering::Relaxed);
        }
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        let mut front = self.front.lock();
        if asked_onward && front.onward.is_none() {
            front.gate.declined();
            front.reader.wake_by_ref();
        }
        response
    }

    pub(super) async fn answer_http2(&self, request: Request<Incoming>) -> Response<Outgoing> {
        let (head, body) = request.into_parts();
        let head = Box::new(head);
        let body = RequestBody::http2(body, &self.http.tasks);
        let is_head = head.method == Method::HEAD;
        let mut response = match head::check(&head) {
            Ok(()) => self.answer(head, body).await,
            Err(malformed) => {
                let unrouted = (Reason::Malformed(malformed), None);
                let noted = self.noted(|| RequestLine::of(&head));
                self.turn_away(unrouted, is_grpc(&head.headers), noted)
            }
        };
        if let (Outgoing::Own { text, .. }, true) = (response.body_mut(), is_head) {
            *text = None; // hyper leaves it out for HTTP/1.1 only
        }
        self.released(response)
    }

    /// Why the head was refused for which this request stands.
    fn refusal(&self, head: &Parts) -> Option<Malformed> {
        let refused = self.front.lock().refused?;
        let is_marker = head.uri == "/"
            && head.headers.len() == 1
            && head.headers.get("host").is_some_and(|host| host == "refused");
        is_marker.then_some(refused)
    }

    async fn answer(&self, mut head: Box<Parts>, body: RequestBody) -> Response<Outgoing> {
        let is_grpc = is_grpc(&head.headers);
        let noted = self.noted(|| RequestLine::of(&head));
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
            is_grpc,
            noted,
        };
        let Answered { response, onward } = self.http.exchange(asked).await;
        if onward.is_some() {
            self.front.lock().onward = onward;
        }
        response
    }

    /// What the access log is to say of a request, if there is one.
    fn noted(&self, line: impl FnOnce() -> RequestLine) -> Option<Box<Noted>> {
        let (door, clock) = (self.site.door, self.http.outbound.clock);
        let log = self.http.log.clone()?;
        Some(Box::new(Noted::new(log, clock, door, line())))
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
        let options = || Arc::clone(&self.site.options);
        let host = || match head::authority(head) {
            Ok(authority) => Ok(authority.host),
            Err(malformed) => Err(unrouted(Reason::Malformed(malformed))),
        };
        let route = match &self.site.destination {
            Destination::Service(service) => {
                return Ok(Route { service: service.clone(), options: options() });
            }
            Destination::MeshName => {
                let service = service_of(host()?.as_bytes());
                service.map(|service| Route { service, options: options() })
            }
            Destination::Public(hosts) | Destination::Redirect { hosts, .. } => {
                hosts.find(host()?).map(|(_, route)| route)
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
        mut noted: Option<Box<Noted>>,
    ) -> Response<Outgoing> {
        let host = match head::authority(head) {
            Ok(authority) => hosts.find(authority.host),
            Err(malformed) => {
                return self.turn_away((Reason::Malformed(malformed), None), false, noted);
            }
        };
        let moved = host
            .and_then(|(host, route)| Some((route.service, outside::redirect(&host, port, head)?)));
        let Some((service, mut moved)) = moved else {
            return self.turn_away((Reason::ForeignName, None), false, noted);
        };
        if let Some(noted) = &mut noted {
            noted.refused(Some(&service), None, moved.status().as_u16(), "redirect");
        }
        *moved.body_mut() = Outgoing::Own { text: None, noted };
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
        if let Some(noted) = &mut noted {
            noted.is_for(&service);
        }
        let ask = Ask { service, options, greeting: Greeting::Tunnel };
        match Box::pin(self.http.outbound.reach(&ask)).await {
            Ok(connected) => {
                if let Some(noted) = &mut noted {
                    noted.answered(connected.endpoint(), StatusCode::OK.as_u16());
                }
                self.front.lock().onward = Some(Box::new(Onward::Tunnel(ask, connected, noted)));
                Response::new(Outgoing::EMPTY)
            }
            Err((error, last)) => {
                let (reason, service) = (Reason::NotTaken(error), Some(&ask.service));
                let answer = OwnAnswer { reason, service, last: last.as_ref(), is_grpc: false };
                answer.response(noted)
            }
        }
    }

    /// Refuses a request that goes nowhere.
    fn turn_away(
        &self,
        (reason, service): Unrouted,
        is_grpc: bool,
        noted: Option<Box<Noted>>,
    ) -> Response<Outgoing> {
        self.http.outbound.metrics.count_refused(self.site.door, reason.word());
        let answer = OwnAnswer { reason, service: service.as_ref(), last: None, is_grpc };
        answer.response(noted)
    }
}

/// Whether a client that asks so wants the connection to end with the answer.
fn is_last(version: Version, headers: &HeaderMap) -> bool {
    says(headers, "close") || (version == Version::HTTP_10 && !says(headers, "keep-alive"))
}

/// Whether `Connection` has this word.
fn says(headers: &HeaderMap, word: &str) -> bool {
    if !head::has(headers, &CONNECTION) {
        return false;
    }
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|said| said.trim().eq_ignore_ascii_case(word))
}
