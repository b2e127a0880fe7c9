//! What the access log says of one request.

use std::sync::atomic::{AtomicU64, Ordering};

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Uri};

use crate::mesh::Endpoint;
use crate::model::{Moment, ServiceName};
use crate::proxy::last_asked::LastAsked;
use crate::runtime::clock::{self, Clock};
use crate::telemetry::{Access, AccessLog, Door};

/// What a request asks for, as far as that can be read.
pub(super) struct RequestLine {
    method: Option<Method>,
    path: Option<PathAndQuery>,
}

impl RequestLine {
    pub(super) fn of(head: &Parts) -> Self {
        Self { method: Some(head.method.clone()), path: head.uri.path_and_query().cloned() }
    }

    /// Of HTTP/1.1, in a head that was refused.
    pub(super) fn of_refused(line: &[u8]) -> Self {
        let mut words = line.split(|byte| *byte == b' ');
        let (method, target) = (words.next(), words.next());
        let uri = target.and_then(|target| Uri::try_from(target).ok());
        let has_version = words.next().is_some_and(|word| word.starts_with(b"HTTP/"));
        Self {
            method: method
                .filter(|_| has_version)
                .and_then(|method| Method::from_bytes(method).ok()),
            path: uri.filter(|_| has_version).and_then(|uri| uri.into_parts().path_and_query),
        }
    }
}

/// A request under way. Written down when it is dropped: without [`Noted::end`] and without another word its
/// client has gone before its response was whole.
pub(super) struct Noted {
    log: AccessLog,
    clock: Clock,
    begun_at: Moment,
    bytes: AtomicU64,
    /// Until it is written down.
    access: Option<Access>,
}

impl Noted {
    /// A request that has just come.
    pub(super) fn new(log: AccessLog, clock: Clock, door: Door, line: RequestLine) -> Self {
        let access = Access {
            at_ms: clock::unix_millis(),
            door,
            service: None,
            node: None,
            instance: None,
            method: line.method,
            path: line.path,
            status: 0,
            reason: Some("client_gone"),
            bytes: 0,
            duration: Default::default(),
        };
        Self { log, clock, begun_at: clock.now(), bytes: AtomicU64::new(0), access: Some(access) }
    }

    /// Where it goes is known.
    pub(super) fn is_for(&mut self, service: &ServiceName) {
        if let Some(access) = &mut self.access {
            access.service = Some(service.clone());
        }
    }

    /// An instance is asked.
    pub(super) fn asked(&mut self, endpoint: &Endpoint) {
        if let Some(access) = &mut self.access {
            access.node = Some(endpoint.member_name.clone());
            access.instance = Some(endpoint.instance.clone());
        }
    }

    /// An instance answers.
    pub(super) fn answered(&mut self, endpoint: &Endpoint, status: u16) {
        self.asked(endpoint);
        if let Some(access) = &mut self.access {
            access.status = status;
        }
    }

    /// The response ends before it is whole, and not by its client.
    pub(super) fn ended_by(&mut self, reason: &'static str) {
        if let Some(access) = &mut self.access {
            access.reason = Some(reason);
        }
    }

    /// What the client is sent, of a response's body or after it, is counted here.
    pub(super) fn bytes(&self) -> &AtomicU64 {
        &self.bytes
    }

    /// The mesh answers, for this reason; `last` is the instance that was asked last.
    pub(super) fn refused(
        &mut self,
        service: Option<&ServiceName>,
        last: Option<&LastAsked>,
        status: u16,
        reason: &'static str,
    ) {
        if let Some(access) = &mut self.access {
            access.service = service.cloned();
            access.node = last.map(|last| last.node.clone());
            access.instance = last.map(|last| last.instance.clone());
            access.status = status;
            access.reason = Some(reason);
        }
    }

    /// The response is whole.
    pub(super) fn end(mut self) {
        if let Some(access) = &mut self.access {
            access.reason = None;
        }
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if let Some(mut access) = self.access.take() {
            access.bytes = self.bytes.load(Ordering::Relaxed);
            access.duration = self.clock.now().since(self.begun_at);
            self.log.record(access);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_line_of_a_refused_head_is_read_as_far_as_it_is_one() {
        let read = |line: &str| {
            let RequestLine { method, path } = RequestLine::of_refused(line.as_bytes());
            (method.map(|method| method.to_string()), path.map(|path| path.to_string()))
        };
        let both = |method: &str, path: &str| (Some(method.to_owned()), Some(path.to_owned()));
        assert_eq!(read("GET /a?b HTTP/1.1"), both("GET", "/a?b"));
        assert_eq!(read("POST http://web.mesh/a HTTP/1.1"), both("POST", "/a"));
        assert_eq!(read("G\u{e4}T / HTTP/1.1"), (None, Some("/".to_owned())));
        assert_eq!(read("GET a\tb HTTP/1.1").1, None);
        for junk in ["", " ", "GET /", "password", "\u{1b}[31m x y"] {
            assert_eq!(read(junk), (None, None), "{junk}");
        }
    }
}
