//! What goes between clients outside the mesh and applications: nothing of the mesh's inside.

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, LOCATION};
use http::request::Parts;
use http::{Response, StatusCode};

use super::answer::REASON;
use super::body::Outgoing;

const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const OURS: &str = "x-murmesh-";

/// Makes a client's headers those that the public gateway vouches for. What a client outside says of
/// its own way here is not to be believed, and headers of ours are not for it to set.
pub(super) fn admit(headers: &mut HeaderMap) {
    let is_claim = |name: &str| {
        name.starts_with("x-forwarded-")
            || name.starts_with(OURS)
            || matches!(name, "forwarded" | "x-real-ip")
    };
    let claims: Vec<_> = headers.keys().filter(|name| is_claim(name.as_str())).cloned().collect();
    for name in claims {
        headers.remove(name);
    }
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("https"));
}

/// Makes an answer one that the public may see: of the mesh it says the reason, and nothing else.
pub(super) fn release(response: &mut Response<Outgoing>) {
    let is_inner = |name: &&HeaderName| name.as_str().starts_with(OURS) && **name != REASON;
    let inner: Vec<_> = response.headers().keys().filter(is_inner).cloned().collect();
    for name in inner {
        response.headers_mut().remove(name);
    }
    // Instances' answers have lost this header: whatever has it is the mesh's own.
    let Some(reason) = response.headers().get(REASON).cloned() else { return };
    if let Outgoing::Own { text: Some(text), .. } = response.body_mut() {
        *text = Bytes::copy_from_slice(&[reason.as_bytes(), b"\n"].concat());
    }
    if let Some(message) = response.headers_mut().get_mut(GRPC_MESSAGE) {
        *message = reason;
    }
}

/// Sends a client that came in plain text to the same place over TLS. `None` when there is no such
/// place.
pub(super) fn redirect(host: &str, port: u16, head: &Parts) -> Option<Response<Outgoing>> {
    let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
    let path = if path.starts_with('/') { path } else { "/" };
    let port = if port == 443 { String::new() } else { format!(":{port}") };
    let mut response = Response::new(Outgoing::EMPTY);
    *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
    let place = HeaderValue::from_str(&format!("https://{host}{port}{path}")).ok()?;
    response.headers_mut().insert(LOCATION, place);
    Some(response)
}
