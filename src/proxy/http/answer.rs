//! Answers that the mesh itself gives: each says its reason, and what to try.

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};

use super::body::Outgoing;
use super::malformed::Malformed;
use super::noted::Noted;
use crate::model::{Protocol, ServiceName};
use crate::proxy::dial::DialError;
use crate::proxy::last_asked::LastAsked;
use crate::telemetry::EventKind;

/// Why the mesh answers instead of an instance.
pub(super) const REASON: HeaderName = HeaderName::from_static("x-murmesh-reason");
/// Which service was asked for.
pub(super) const SERVICE: HeaderName = HeaderName::from_static("x-murmesh-service");
/// Which member's instance answered.
pub(super) const NODE: HeaderName = HeaderName::from_static("x-murmesh-node");

/// How a call of gRPC ended.
pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC: &str = "application/grpc";

/// Why a request has no answer of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// No instance took it: nothing reached an application.
    NotTaken(DialError),
    /// An instance took it and went away without an answer. It may have done what was asked.
    Lost,
    /// The same, and what it said instead is not of its protocol.
    Unreadable(Protocol),
    /// An instance took it and said nothing for as long as its caller's limit allows.
    Timeout,
    /// The time that the caller gave it is over.
    Deadline,
    /// The client's request is no sound HTTP.
    Malformed(Malformed),
    /// The client did not send the body that it announced.
    BodyCut,
    /// The name in the request is none of the mesh.
    ForeignName,
    /// CONNECT where it is not taken: over HTTP/2, or not at the gateway.
    NoTunnel,
    /// The service speaks something else.
    NotHttp,
}

impl Reason {
    /// The word of headers, metrics and logs.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::NotTaken(error) => match error {
                DialError::NotServed | DialError::Silent | DialError::Lost => "unreachable",
                DialError::Handshake(_) | DialError::Unsupported => "refused",
                DialError::Stopping => "draining",
                error => error.reason(),
            },
            Self::Lost | Self::Unreadable(_) => "lost",
            Self::Timeout => "timeout",
            Self::Deadline => "deadline",
            Self::Malformed(_) => "malformed",
            Self::BodyCut => "body_cut",
            Self::ForeignName => "foreign_name",
            Self::NoTunnel => "no_tunnel",
            Self::NotHttp => "not_http",
        }
    }

    pub(super) fn status(self) -> StatusCode {
        match self.word() {
            "malformed" | "body_cut" => StatusCode::BAD_REQUEST,
            "denied" => StatusCode::FORBIDDEN,
            "unknown_service" | "foreign_name" => StatusCode::NOT_FOUND,
            "no_tunnel" => StatusCode::METHOD_NOT_ALLOWED,
            "no_endpoints" | "all_ejected" | "draining" | "maint" | "overflow" => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            "deadline" | "timeout" => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::BAD_GATEWAY,
        }
    }

    /// As gRPC maps them (status codes and their use in gRPC).
    fn grpc_status(self) -> &'static str {
        match self.status() {
            StatusCode::BAD_REQUEST => "13", // INTERNAL
            StatusCode::FORBIDDEN => "7",    // PERMISSION_DENIED
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => "12", // UNIMPLEMENTED
            StatusCode::GATEWAY_TIMEOUT => "4", // DEADLINE_EXCEEDED
            _ => "14",                       // UNAVAILABLE
        }
    }

    /// Whether the connection it came on cannot go on: what follows on it is in doubt.
    fn closes(self) -> bool {
        matches!(self, Self::Malformed(_) | Self::BodyCut)
    }

    /// As what kind of event people are told of it, if it is not for the client alone.
    pub(super) fn event(self, last: Option<&LastAsked>) -> Option<EventKind> {
        match self {
            Self::NotTaken(_) => Some(EventKind::ConnectionRefused),
            Self::Deadline if last.is_none() => Some(EventKind::ConnectionRefused),
            Self::Lost | Self::Unreadable(_) | Self::Timeout | Self::Deadline => {
                Some(EventKind::RequestFailed)
            }
            _ => None,
        }
    }

    /// What happened, for people.
    fn text(self, service: Option<&ServiceName>, last: Option<&LastAsked>) -> String {
        let name = service.map_or("?", |service| service.as_str());
        let instance = match last {
            Some(last) => last.to_string(),
            None => "the instance".to_owned(),
        };
        match self {
            Self::NotTaken(error) => {
                let last = last.map(|last| format!(" ({last})")).unwrap_or_default();
                format!(
                    "{name}: {error}{last}\n\
                     try: murmesh endpoints {name}, murmesh events {name}\n"
                )
            }
            Self::Lost => format!(
                "{name}: no answer of {instance}; it may have done what was asked\n\
                 try: murmesh events {name}\n"
            ),
            Self::Unreadable(protocol) => format!(
                "{name}: no sound {} of {instance}; it may have done what was asked\n\
                 try: murmesh services, where {name} has its protocol: http is HTTP/1.1, h2 and grpc \
                 are HTTP/2\n",
                wire_name(protocol)
            ),
            Self::Timeout => {
                format!("{name}: no answer in time of {instance}\ntry: murmesh endpoints {name}\n")
            }
            Self::Deadline => {
                let last = last.map(|last| format!(", without an answer of {last}"));
                let last = last.unwrap_or_default();
                format!(
                    "{name}: the time that the caller gave is over{last}\n\
                     try: murmesh endpoints {name}\n"
                )
            }
            Self::Malformed(malformed) => format!("{malformed}\n"),
            Self::BodyCut => "the body of the request ended before its end\n".to_owned(),
            Self::ForeignName => "the host of this request is no name of this mesh\n\
                                  try: a host such as web.mesh; murmesh services lists them\n"
                .to_owned(),
            Self::NoTunnel => "CONNECT is taken by the gateway only, over HTTP/1.1\n\
                               try: curl --proxytunnel -x http://GATEWAY, or socks5h://\n"
                .to_owned(),
            Self::NotHttp => format!(
                "{name}: the service is not declared as http, h2 or grpc\n\
                 try: CONNECT {name}.mesh through this gateway, or expose it with its protocol\n"
            ),
        }
    }
}

/// That the mesh itself answers a request.
pub(super) struct OwnAnswer<'a> {
    pub(super) reason: Reason,
    /// Which service was asked for, where that is known.
    pub(super) service: Option<&'a ServiceName>,
    /// Which instance was asked last, if any was.
    pub(super) last: Option<&'a LastAsked>,
    /// Whether the request is gRPC's.
    pub(super) is_grpc: bool,
}

impl OwnAnswer<'_> {
    /// What is sent, and what the access log says of it.
    pub(super) fn response(self, mut noted: Option<Box<Noted>>) -> Response<Outgoing> {
        let Self { reason, service, last, is_grpc } = self;
        let status = if is_grpc { StatusCode::OK } else { reason.status() };
        if let Some(noted) = &mut noted {
            noted.refused(service, last, reason.status().as_u16(), reason.word());
        }
        let text = reason.text(service, last);
        let mut response = Response::new(Outgoing::EMPTY);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(REASON, HeaderValue::from_static(reason.word()));
        if let Some(service) = service.and_then(|name| HeaderValue::from_str(name.as_str()).ok()) {
            headers.insert(SERVICE, service);
        }
        if is_grpc {
            // "Trailers-Only": the status is where a client without a body looks for it.
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
            headers.insert(GRPC_STATUS, HeaderValue::from_static(reason.grpc_status()));
            headers.insert(GRPC_MESSAGE, grpc_message(text.lines().next().unwrap_or_default()));
            *response.body_mut() = Outgoing::Own { text: None, noted };
            return response;
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if reason.closes() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        *response.body_mut() = Outgoing::Own { text: Some(Bytes::from(text)), noted };
        response
    }
}

/// A message as gRPC has it: percent-encoded (PROTOCOL-HTTP2, "Status-Message").
fn grpc_message(text: &str) -> HeaderValue {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'%' | ..b' ' | 0x7f.. => encoded += &format!("%{byte:02X}"),
            _ => encoded.push(char::from(byte)),
        }
    }
    HeaderValue::try_from(encoded).unwrap_or(HeaderValue::from_static("refused"))
}

/// What an instance that speaks `protocol` sends.
fn wire_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Http => "HTTP/1.1",
        _ => "HTTP/2",
    }
}

/// Whether a request, or a response, with these headers is gRPC's.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| {
        kind.strip_prefix(GRPC).is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_grpc_are_percent_encoded() {
        assert_eq!(grpc_message("web: no answer of web-0"), "web: no answer of web-0");
        assert_eq!(grpc_message("100%\n\u{e4}"), "100%25%0A%C3%A4");
    }
}
