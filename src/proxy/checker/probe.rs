//! One run of a check.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_TYPE, HOST, TE};
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::timeout;

use super::spec::{CheckSpec, Probe, StatusSet};
use super::{CheckedInstance, command, shortened};
use crate::health::CheckResult;
use crate::model::{Protocol, Target};
use crate::proxy::instances;
use crate::proxy::local::LocalSocket;
use crate::runtime::machine::ByteStream;

/// What is read of a response; the rest is nobody's business.
const BODY_LEN_MAX: usize = 64 * 1024;
/// Of its head.
const HEAD_LEN_MAX: usize = 64 * 1024;

/// What a run came to, and what was said.
pub(super) type Finding = (CheckResult, String);

/// What went wrong, for people.
type Fault = String;

/// Runs check `spec` of `instance` once, for as long as it may.
pub(super) async fn run(instance: &CheckedInstance, spec: &CheckSpec) -> Finding {
    let failed = |fault: String| (CheckResult::Fail, shortened(&fault));
    match timeout(spec.timeout(), probe(instance, &spec.probe)).await {
        Ok(Ok((result, said))) => (result, shortened(&said)),
        Ok(Err(fault)) => failed(fault),
        Err(_) => failed(format!("no answer within {:?}", spec.timeout())),
    }
}

async fn probe(instance: &CheckedInstance, probe: &Probe) -> Result<Finding, Fault> {
    let passed = |said: String| (CheckResult::Pass, said);
    match probe {
        Probe::Http { path, at, headers, status } => {
            http(instance, path, at.as_ref(), headers, status).await.map(passed)
        }
        Probe::Tcp { at } => tcp(instance, at.as_ref()).await.map(passed),
        Probe::Grpc { service, at } => grpc(instance, service, at.as_ref()).await.map(passed),
        Probe::Command { words } => command::run(words).await,
        Probe::Ttl { .. } => Err("nobody runs it".to_owned()), // it is never due
    }
}

/// Connects to the instance as its callers do, or to `at`.
async fn connect(instance: &CheckedInstance, at: Option<&Target>) -> Result<LocalSocket, Fault> {
    let mut local = instance.local();
    if let Some(at) = at {
        (local.target, local.proxy_protocol) = (at.clone(), None);
    }
    let failed = |error: std::io::Error| format!("connect to {}: {error}", local.target);
    instances::open(&local, None).await.map_err(failed)
}

async fn tcp(instance: &CheckedInstance, at: Option<&Target>) -> Result<String, Fault> {
    let socket = connect(instance, at).await?;
    // Said in order: a reset would be a line in the logs of many servers.
    socket.end().await.map_err(|error| error.to_string())?;
    Ok("it accepts connections".to_owned())
}

async fn http(
    instance: &CheckedInstance,
    path: &str,
    at: Option<&Target>,
    headers: &BTreeMap<String, String>,
    passing: &StatusSet,
) -> Result<String, Fault> {
    let stream = connect(instance, at).await?.into_stream();
    let speaks_h2 = at.is_none() && matches!(instance.protocol, Protocol::H2 | Protocol::Grpc);
    let authority = authority(at.unwrap_or(&instance.known_as.target));
    let (status, body) = match speaks_h2 {
        true => {
            let uri = format!("http://{authority}{path}");
            let request = request(Method::GET, &uri, headers)?;
            let answer = exchange(stream, request, Bytes::new()).await?;
            (answer.status, answer.body)
        }
        false => {
            let mut request = request(Method::GET, path, headers)?;
            request.headers_mut().insert(CONNECTION, http::HeaderValue::from_static("close"));
            if !request.headers().contains_key(HOST) {
                let authority = authority.parse().map_err(|_| "no host".to_owned())?;
                request.headers_mut().insert(HOST, authority);
            }
            exchange_in_text(stream, request).await?
        }
    };
    let body = String::from_utf8_lossy(&body);
    let said = match body.trim() {
        "" => status.to_string(),
        body => format!("{status}: {body}"),
    };
    if passing.contains(status.as_u16()) { Ok(said) } else { Err(said) }
}

/// What stands for the host: a unix socket has none.
fn authority(target: &Target) -> String {
    match target {
        Target::Tcp(address) => address.to_string(),
        Target::Unix(_) => "localhost".to_owned(),
    }
}

fn request(
    method: Method,
    uri: &str,
    headers: &BTreeMap<String, String>,
) -> Result<Request<()>, Fault> {
    let uri = uri.parse::<Uri>().map_err(|error| error.to_string())?;
    let mut request = Request::builder().method(method).uri(uri);
    request = request.header("user-agent", concat!("murmesh/", env!("CARGO_PKG_VERSION")));
    for (name, value) in headers {
        request = request.header(name, value);
    }
    request.body(()).map_err(|error| error.to_string())
}

/// One exchange of HTTP/1.1.
async fn exchange_in_text(
    stream: Box<dyn ByteStream>,
    request: Request<()>,
) -> Result<(StatusCode, Vec<u8>), Fault> {
    let failed = |error: hyper::Error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    let mut builder = http1::Builder::new();
    let handshake = builder.max_buf_size(HEAD_LEN_MAX).handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(failed)?;
    let exchange = async {
        let response = sender.send_request(request.map(|()| Empty::<Bytes>::new()));
        let response = response.await.map_err(failed)?;
        let (status, mut incoming) = (response.status(), response.into_body());
        let mut body = Vec::new();
        while body.len() < BODY_LEN_MAX {
            let Some(frame) = incoming.frame().await else { break };
            if let Ok(data) = frame.map_err(failed)?.into_data() {
                body.extend_from_slice(&data[..data.len().min(BODY_LEN_MAX - body.len())]);
            }
        }
        Ok((status, body))
    };
    let (mut exchange, mut connection) = (std::pin::pin!(exchange), std::pin::pin!(connection));
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        _ = &mut connection => exchange.await, // what it has is all there is
    }
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
    trailers: HeaderMap,
}

/// One exchange of HTTP/2.
async fn exchange(
    stream: Box<dyn ByteStream>,
    request: Request<()>,
    said: Bytes,
) -> Result<Answer, Fault> {
    let failed = |error: h2::Error| error.to_string();
    let mut builder = h2::client::Builder::new();
    let handshake = builder.max_header_list_size(HEAD_LEN_MAX as u32).handshake::<_, Bytes>(stream);
    let (sender, connection) = handshake.await.map_err(failed)?;
    let exchange = async {
        let mut sender = sender.ready().await.map_err(failed)?;
        let (response, mut upload) =
            sender.send_request(request, said.is_empty()).map_err(failed)?;
        if !said.is_empty() {
            upload.send_data(said, true).map_err(failed)?;
        }
        let (head, mut incoming) = response.await.map_err(failed)?.into_parts();
        let mut body = Vec::new();
        while let Some(data) = incoming.data().await {
            let data = data.map_err(failed)?;
            let _ = incoming.flow_control().release_capacity(data.len()); // it is over: so be it
            body.extend_from_slice(&data[..data.len().min(BODY_LEN_MAX - body.len())]);
            if body.len() == BODY_LEN_MAX {
                // Enough: trailers would come behind all of it, for which nobody waits.
                let trailers = HeaderMap::new();
                return Ok(Answer { status: head.status, headers: head.headers, body, trailers });
            }
        }
        let trailers = incoming.trailers().await.map_err(failed)?.unwrap_or_default();
        Ok(Answer { status: head.status, headers: head.headers, body, trailers })
    };
    let (mut exchange, mut connection) = (std::pin::pin!(exchange), std::pin::pin!(connection));
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        _ = &mut connection => exchange.await,
    }
}

/// Asks `grpc.health.v1.Health/Check`.
async fn grpc(
    instance: &CheckedInstance,
    service: &str,
    at: Option<&Target>,
) -> Result<String, Fault> {
    let stream = connect(instance, at).await?.into_stream();
    let authority = authority(at.unwrap_or(&instance.known_as.target));
    let uri = format!("http://{authority}/grpc.health.v1.Health/Check");
    let mut request = request(Method::POST, &uri, &BTreeMap::new())?;
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, http::HeaderValue::from_static("application/grpc"));
    headers.insert(TE, http::HeaderValue::from_static("trailers"));
    let answer = exchange(stream, request, question(service)).await?;
    if answer.status != StatusCode::OK {
        return Err(answer.status.to_string());
    }
    let field = |name| answer.trailers.get(name).or_else(|| answer.headers.get(name));
    let text = |name| field(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match text("grpc-status") {
        "0" => {}
        code => return Err(format!("grpc-status {code} {}", text("grpc-message"))),
    }
    match serving_status(&answer.body) {
        Some(1) => Ok("SERVING".to_owned()),
        Some(2) => Err("NOT_SERVING".to_owned()),
        Some(3) => Err("SERVICE_UNKNOWN".to_owned()),
        _ => Err("UNKNOWN".to_owned()),
    }
}

/// A `HealthCheckRequest` in its frame: a flag that says "not compressed", four bytes of length, and
/// the one field that it has, number 1, a string. Two lines, and no generated code for them.
fn question(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(1 << 3 | 2);
        // Its length as a varint: names have at most 256 bytes.
        let len = service.len();
        match u8::try_from(len).ok().filter(|len| *len < 0x80) {
            Some(len) => message.put_u8(len),
            None => message.put_slice(&[(len & 0x7f) as u8 | 0x80, (len >> 7) as u8]),
        }
        message.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.len() as u32); // at most 259
    frame.put_slice(&message);
    frame.freeze()
}

/// The field `status` of a `HealthCheckResponse`, number 1, an enum; 0 when it is left out. `None` when
/// it is no such message.
fn serving_status(body: &[u8]) -> Option<u8> {
    let (prefix, message) = body.split_at_checked(5)?;
    let len = u32::from_be_bytes(prefix[1..].try_into().ok()?);
    if prefix[0] != 0 || usize::try_from(len).ok()? != message.len() {
        return None;
    }
    match message {
        [] => Some(0),
        [8, status @ 0..=127] => Some(*status),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_health_protocol_are_what_it_says() {
        assert_eq!(&question("")[..], [0, 0, 0, 0, 0]);
        assert_eq!(&question("a.B")[..], [0, 0, 0, 0, 5, 10, 3, b'a', b'.', b'B']);
        let long = question(&"x".repeat(200));
        assert_eq!(long[..8], [0, 0, 0, 0, 203, 10, 200, 1]);
        for (body, status) in [
            (&[0, 0, 0, 0, 2, 8, 1][..], Some(1)),
            (&[0, 0, 0, 0, 2, 8, 2], Some(2)),
            (&[0, 0, 0, 0, 0], Some(0)),
            (&[0, 0, 0, 0, 2, 8], None),
            (&[1, 0, 0, 0, 2, 8, 1], None),
            (&[0, 0, 0], None),
            (&[], None),
        ] {
            assert_eq!(serving_status(body), status, "{body:?}");
        }
    }
}
