//! What of a request's head counts, and what of it goes on.
//!
//! This is policy on parsed heads, for HTTP/1.1 and HTTP/2 alike (RFC 9110, 9112, 9113). The bytes
//! of HTTP/1.1 are judged by the [gate](super::gate) before they are parsed; what came as frames is
//! judged by [`check`] here. Where a standard lets us choose between mending and refusing we
//! refuse: whoever mends reads a message in another way than somebody else.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use http::header::{
    CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::request::Parts;
use http::{Method, Version};

use super::malformed::Malformed;

const HOST_LEN_MAX: usize = 255; // the longest name that DNS knows
/// What belongs to the connection that a message came on, whatever `Connection` says.
static HOP_BY_HOP: [HeaderName; 8] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TRANSFER_ENCODING,
    UPGRADE,
];
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const REASON: HeaderName = HeaderName::from_static("x-murmesh-reason");
const OURS: &str = "x-murmesh-";
/// How much time the caller leaves, in milliseconds: the one header of ours that clients set.
pub(super) const DEADLINE: HeaderName = HeaderName::from_static("x-murmesh-deadline-ms");
/// What applications and we rely on. No honest client has a proxy take these away.
const END_TO_END: [&str; 17] = [
    "authorization",
    "cache-control",
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "origin",
    "range",
    "referer",
    "set-cookie",
    "traceparent",
    "tracestate",
    "x-real-ip",
];
/// What a trailer must not say besides: it comes after the decisions that hang on it were made.
const NO_TRAILER: [&str; 10] = [
    "connection",
    "keep-alive",
    "max-forwards",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "www-authenticate",
];

/// A host and perhaps a port, as the client wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Authority<'a> {
    /// A name, an IPv4 address, or an IPv6 address in brackets.
    pub(super) host: &'a str,
    /// What follows the colon.
    pub(super) port: Option<u16>,
}

impl<'a> Authority<'a> {
    /// Reads `host[:port]`. Stricter than RFC 3986: no user name, no percent-encoding, no empty
    /// port.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, Malformed> {
        if bytes.contains(&b'@') {
            return Err(Malformed::Userinfo);
        }
        let text = std::str::from_utf8(bytes).map_err(|_| Malformed::Host)?;
        let (host, rest) = match text.strip_prefix('[').map(|text| text.split_once(']')) {
            Some(Some((address, _))) if address.parse::<Ipv6Addr>().is_ok() => {
                text.split_at(address.len() + 2)
            }
            Some(_) => return Err(Malformed::Host),
            None => text.split_at(text.find(':').unwrap_or(text.len())),
        };
        let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
        let is_host = host.starts_with('[') || host.bytes().all(is_name);
        if !is_host || !(1..=HOST_LEN_MAX).contains(&host.len()) {
            return Err(Malformed::Host);
        }
        let port = match rest.strip_prefix(':') {
            None if rest.is_empty() => None,
            Some(port) if port.bytes().all(|b| b.is_ascii_digit()) => {
                Some(port.parse().map_err(|_| Malformed::Host)?)
            }
            _ => return Err(Malformed::Host),
        };
        Ok(Self { host, port })
    }

    /// Whether both mean the same, where `default` is the port of who names none.
    pub(super) fn is_same(&self, other: &Authority<'_>, default: Option<u16>) -> bool {
        self.host.eq_ignore_ascii_case(other.host)
            && self.port.or(default) == other.port.or(default)
    }
}

/// The one host that a request is for: that of its target, which `Host` must not contradict, or
/// that of `Host`.
///
/// # Errors
/// Nothing names a host, several lines do, they differ, or it is none.
pub(super) fn authority(parts: &Parts) -> Result<Authority<'_>, Malformed> {
    let mut hosts = parts.headers.get_all(HOST).iter();
    let host = hosts.next().map(|host| Authority::parse(host.as_bytes())).transpose()?;
    if hosts.next().is_some() {
        return Err(Malformed::SeveralHosts);
    }
    let Some(target) = parts.uri.authority() else { return host.ok_or(Malformed::HostMissing) };
    let target = Authority::parse(target.as_str().as_bytes())?;
    let default = match parts.uri.scheme_str() {
        Some("https") => Some(443),
        Some(_) => Some(80),
        None => target.port, // CONNECT: clients leave the port out of `Host`
    };
    match host {
        Some(host) if !target.is_same(&host, default) => Err(Malformed::HostMismatch),
        _ => Ok(target),
    }
}

/// What the gate holds of the bytes of HTTP/1.1, for a request that came as frames of HTTP/2. What
/// passes can be written as HTTP/1.1 and is read there as the same one message.
pub(super) fn check(parts: &Parts) -> Result<(), Malformed> {
    if !is_method(parts.method.as_str()) {
        return Err(Malformed::Method);
    }
    let path = parts.uri.path_and_query().map(http::uri::PathAndQuery::as_str);
    let is_target = match path {
        None | Some("") => parts.method == Method::CONNECT && authority(parts)?.port.is_some(),
        Some("*") => parts.method == Method::OPTIONS,
        Some(path) => path.starts_with('/') && path.is_ascii(),
    };
    if !is_target {
        return Err(Malformed::Target);
    }
    if parts.version == Version::HTTP_2 && parts.headers.contains_key(TRANSFER_ENCODING) {
        return Err(Malformed::TransferEncoding);
    }
    let mut lengths = parts.headers.get_all(CONTENT_LENGTH).iter();
    if let Some(len) = lengths.next() {
        content_length(len.as_bytes())?;
    }
    if lengths.next().is_some() {
        return Err(Malformed::SeveralLengths);
    }
    if parts.headers.get_all(EXPECT).iter().any(|value| !is_expectation(value.as_bytes())) {
        return Err(Malformed::Expect);
    }
    if parts.headers.keys().any(|name| is_lookalike(name.as_str())) {
        return Err(Malformed::LookalikeName);
    }
    authority(parts).map(|_| ())
}

/// What a request asks to upgrade to, such as `websocket`. `None` also for what is never passed on:
/// a list to choose from, a request with a body, and HTTP/2, which would carry requests past us
/// unread.
pub(super) fn upgrade(parts: &Parts) -> Option<HeaderValue> {
    if !has(&parts.headers, &UPGRADE) {
        return None;
    }
    let has_length = parts.headers.get(CONTENT_LENGTH).is_some_and(|len| len != "0");
    if has_length || parts.headers.contains_key(TRANSFER_ENCODING) {
        return None;
    }
    let mut protocols = parts.headers.get_all(UPGRADE).iter();
    let protocol = protocols.next()?;
    let (name, _) =
        protocol.to_str().ok()?.split_once('/').unwrap_or((protocol.to_str().ok()?, ""));
    let is_one = protocols.next().is_none() && HeaderName::from_bytes(name.as_bytes()).is_ok();
    let is_http = ["h2c", "h2", "http", "tls"].iter().any(|http| name.eq_ignore_ascii_case(http));
    let is_asked = parts.version == Version::HTTP_11
        && options(&parts.headers).any(|option| option.eq_ignore_ascii_case(b"upgrade"));
    (is_one && is_asked && !is_http).then(|| protocol.clone())
}

/// How much time the caller leaves, where it says so.
pub(super) fn time_left(headers: &HeaderMap) -> Result<Option<Duration>, Malformed> {
    if !has(headers, &DEADLINE) {
        return Ok(None);
    }
    let mut lines = headers.get_all(DEADLINE).iter();
    let Some(line) = lines.next() else { return Ok(None) };
    let is_number = line.as_bytes().iter().all(u8::is_ascii_digit) && lines.next().is_none();
    let text = line.to_str().ok().filter(|_| is_number);
    let left = text.and_then(|text| text.parse().ok()).map(Duration::from_millis);
    left.map(Some).ok_or(Malformed::Deadline)
}

/// A client's address, also as a header says it.
pub(super) struct ClientAddress {
    pub(super) ip: IpAddr,
    text: HeaderValue,
}

impl ClientAddress {
    pub(super) fn new(ip: IpAddr) -> Option<Self> {
        let text = HeaderValue::from_str(&ip.to_canonical().to_string()).ok()?;
        Some(Self { ip, text })
    }
}

/// Makes a client's headers those of the request that goes to the application: without what
/// belonged to the client's connection and without what only we may say, with the client's address,
/// and with `upgrade` when the exchange is one.
///
/// A client that has `Connection` name what others rely on is refused: removing it would let
/// clients take away what proxies before us added, and leaving it would pass on what was called
/// private.
pub(super) fn forward_request(
    headers: &mut HeaderMap,
    client: Option<&ClientAddress>,
    upgrade: Option<HeaderValue>,
) -> Result<(), Malformed> {
    let mut nominated = Vec::new();
    for option in options(headers).filter(|option| !is_harmless(option)) {
        let name = HeaderName::from_bytes(option).map_err(|_| Malformed::Connection)?;
        if is_end_to_end(name.as_str()) {
            return Err(Malformed::Connection);
        }
        nominated.push(name);
    }
    nominated.extend(headers.keys().filter(|name| is_forged(name.as_str())).cloned());
    strip(headers, &nominated, upgrade);
    if has(headers, &TE) {
        let wants_trailers = headers.get_all(TE).iter().any(|te| names(te, b"trailers"));
        headers.remove(TE);
        if wants_trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
    }
    if has(headers, &COOKIE) {
        join(headers, COOKIE, b"; ", None); // RFC 9113 8.2.3: HTTP/2 splits it, HTTP/1.1 must not
    }
    match client {
        Some(client) if has(headers, &FORWARDED_FOR) => {
            join(headers, FORWARDED_FOR, b", ", Some(&client.text));
        }
        Some(client) => drop(headers.insert(FORWARDED_FOR, client.text.clone())),
        None => {}
    }
    Ok(())
}

/// Makes an application's headers those of the answer to the client, as [`forward_request`] does.
/// What an application has `Connection` name wrongly stays: the answer must arrive whole.
pub(super) fn forward_response(headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
    let nominated: Vec<_> = options(headers)
        .filter(|option| !is_harmless(option))
        .filter_map(|option| HeaderName::from_bytes(option).ok())
        .filter(|name| !is_end_to_end(name.as_str()))
        .collect();
    strip(headers, &nominated, upgrade);
    if has(headers, &REASON) {
        headers.remove(REASON);
    }
}

/// Whether a request may have this trailer, in whatever case it is written.
pub(super) fn is_trailer(name: &str) -> bool {
    let name = name.to_ascii_lowercase().replace('_', "-");
    !(is_end_to_end(&name) || NO_TRAILER.contains(&name.as_str()))
}

/// Whether this is written as methods are. Case counts in HTTP, yet some applications ignore it,
/// and CONNECT and HEAD change what a message is.
pub(super) fn is_method(method: &str) -> bool {
    method.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
}

/// Reads the one way to write a length that everybody reads the same: `010` is eight to some.
pub(super) fn content_length(value: &[u8]) -> Result<u64, Malformed> {
    let is_plain = match value {
        [b'0'] => true,
        [b'0', ..] => false,
        digits => digits.iter().all(u8::is_ascii_digit),
    };
    let text = std::str::from_utf8(value).ok().filter(|_| is_plain);
    let len = text.and_then(|text| text.parse::<i64>().ok()); // some read lengths as signed
    len.map(i64::unsigned_abs).ok_or(Malformed::ContentLength)
}

/// Whether some applications take no body with this method, and read one as their next request.
/// What has one nevertheless goes on a connection that nobody uses after it.
pub(super) fn may_overlook_body(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::DELETE, Method::OPTIONS, Method::TRACE].contains(method)
}

/// Whether this is the one expectation that HTTP knows.
pub(super) fn is_expectation(value: &[u8]) -> bool {
    value.eq_ignore_ascii_case(b"100-continue")
}

/// Whether CGI and its heirs, which turn `-` into `_`, take this for a framing header.
pub(super) fn is_lookalike(name: &str) -> bool {
    name.contains('_')
        && (is_dashed(name, "content-length") || is_dashed(name, "transfer-encoding"))
}

/// Whether they are equal where neither case nor the kind of dash counts.
fn is_dashed(name: &str, dashed: &str) -> bool {
    let is_same = |(a, b): (u8, u8)| a.eq_ignore_ascii_case(&b) || (a == b'_' && b == b'-');
    name.len() == dashed.len() && name.bytes().zip(dashed.bytes()).all(is_same)
}

/// Whether there is such a line. For names that few messages have: to look at all of a message's few
/// names is cheaper than to look for one.
pub(super) fn has(headers: &HeaderMap, name: &HeaderName) -> bool {
    headers.keys().any(|own| own == name)
}

/// What the `Connection` lines list, without the white space around it.
fn options(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = has(headers, &CONNECTION).then(|| headers.get_all(CONNECTION).iter());
    lines.into_iter().flatten().flat_map(list)
}

fn list(value: &HeaderValue) -> impl Iterator<Item = &[u8]> {
    let items = value.as_bytes().split(|b| *b == b',').map(<[u8]>::trim_ascii);
    items.filter(|item| !item.is_empty())
}

fn names(value: &HeaderValue, item: &[u8]) -> bool {
    list(value).any(|listed| listed.eq_ignore_ascii_case(item))
}

/// The options that clients do send, and that name nothing which is not removed anyway.
fn is_harmless(option: &[u8]) -> bool {
    let usual: [&[u8]; 4] = [b"keep-alive", b"close", b"upgrade", b"te"];
    usual.iter().any(|usual| option.eq_ignore_ascii_case(usual))
}

/// In lower case.
fn is_end_to_end(name: &str) -> bool {
    END_TO_END.contains(&name) || name.starts_with("x-forwarded-") || name.starts_with(OURS)
}

/// What only we say to applications, also as those see it that take `_` for `-`.
fn is_forged(name: &str) -> bool {
    let begins = |prefix: &str| name.get(..prefix.len()).is_some_and(|it| is_dashed(it, prefix));
    let is_lookalike = || begins("x-forwarded-") && name.contains('_');
    let is_ours = || begins(OURS) && name != DEADLINE.as_str();
    name.starts_with('x') && (is_lookalike() || is_ours()) // most names end here
}

fn strip(headers: &mut HeaderMap, nominated: &[HeaderName], upgrade: Option<HeaderValue>) {
    // A message has few headers, and none of these as a rule: looking at its own is cheaper than
    // looking for each of those.
    let is_gone = |name: &&HeaderName| HOP_BY_HOP.contains(name) || nominated.contains(name);
    let gone: Vec<_> = headers.keys().filter(is_gone).cloned().collect();
    gone.iter().for_each(|name| drop(headers.remove(name)));
    if let Some(protocol) = upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, protocol);
    }
}

/// Makes one line of all lines of `name`, of which there is one at least, and of `last`.
fn join(headers: &mut HeaderMap, name: HeaderName, separator: &[u8], last: Option<&HeaderValue>) {
    let lines = headers.get_all(&name).iter().chain(last).map(HeaderValue::as_bytes);
    let lines: Vec<_> = lines.collect();
    if let [_] = lines[..] {
        return;
    }
    if let Ok(joined) = HeaderValue::from_bytes(&lines.join(separator)) {
        headers.insert(name, joined); // valid values, joined by valid bytes, always are one
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri(uri).version(Version::HTTP_2);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn headers(lines: &[(&str, &str)]) -> HeaderMap {
        parts("GET", "/", lines).headers
    }

    fn lines(headers: &HeaderMap) -> Vec<(&str, &str)> {
        headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect()
    }

    #[test]
    fn a_host_is_a_name_or_an_address_and_perhaps_a_port() {
        for (good, host, port) in [
            ("a", "a", None),
            ("web.mesh.:80", "web.mesh.", Some(80)),
            ("my_db-1.mesh", "my_db-1.mesh", None),
            ("127.0.0.1:1", "127.0.0.1", Some(1)),
            ("[::1]", "[::1]", None),
            ("[fd00::1]:65535", "[fd00::1]", Some(65535)),
        ] {
            assert_eq!(Authority::parse(good.as_bytes()), Ok(Authority { host, port }), "{good}");
        }
        for bad in [
            "",
            ":80",
            "a:",
            "a:65536",
            "a:-1",
            "a:+1",
            "a:8x",
            "a:1:2",
            "a b",
            " a",
            "a,b",
            "a/b",
            "a?b",
            "a#b",
            "a\\b",
            "a%2eb",
            "a\tb",
            "\u{e9}",
            "*",
            "::1",
            "[",
            "[]",
            "[a]",
            "[::1",
            "[::1]x",
            "[::1]:",
            "[fe80::1%25eth0]",
            "a[::1]",
        ] {
            assert_eq!(Authority::parse(bad.as_bytes()), Err(Malformed::Host), "{bad}");
        }
        assert_eq!(Authority::parse(&[b'a'; 256]), Err(Malformed::Host));
        assert_eq!(Authority::parse(b"web.mesh@evil"), Err(Malformed::Userinfo));
    }

    #[test]
    fn a_request_is_for_the_host_that_target_and_host_agree_on() {
        let host = |uri: &str, hosts: &[&str]| {
            let lines: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            authority(&parts("GET", uri, &lines)).map(|found| found.host.to_owned())
        };
        assert_eq!(host("/", &["a"]), Ok("a".into()));
        assert_eq!(host("http://a/", &[]), Ok("a".into()));
        assert_eq!(host("http://a/", &["A:80"]), Ok("a".into()));
        assert_eq!(host("https://a:443/", &["a"]), Ok("a".into()));
        assert_eq!(host("/", &[]), Err(Malformed::HostMissing));
        assert_eq!(host("/", &["a", "a"]), Err(Malformed::SeveralHosts));
        assert_eq!(host("http://a/", &["a", "a"]), Err(Malformed::SeveralHosts));
        assert_eq!(host("/", &[""]), Err(Malformed::Host));
        assert_eq!(host("http://a/", &[""]), Err(Malformed::Host));
        assert_eq!(host("http://a/", &["b"]), Err(Malformed::HostMismatch));
        assert_eq!(host("http://a:81/", &["a"]), Err(Malformed::HostMismatch));
        assert_eq!(host("https://a/", &["a:80"]), Err(Malformed::HostMismatch));
        assert_eq!(host("http://b@a/", &["a"]), Err(Malformed::Userinfo));
        assert_eq!(host("a:80", &["a"]), Ok("a".into()), "CONNECT");
    }

    /// What passes as frames must not become something else as HTTP/1.1.
    #[test]
    fn frames_that_would_make_two_messages_are_refused() {
        let at = "http://a/";
        for (attack, refused, request) in [
            (
                "h2.CL list",
                Malformed::ContentLength,
                parts("POST", at, &[("content-length", "1,1")]),
            ),
            (
                "h2.CL plus",
                Malformed::ContentLength,
                parts("POST", at, &[("content-length", "+1")]),
            ),
            (
                "h2.CL.CL",
                Malformed::SeveralLengths,
                parts("POST", at, &[("content-length", "1"), ("content-length", "2")]),
            ),
            (
                "h2.TE",
                Malformed::TransferEncoding,
                parts("POST", at, &[("transfer-encoding", "chunked")]),
            ),
            (
                "CL look-alike",
                Malformed::LookalikeName,
                parts("POST", at, &[("content_length", "1")]),
            ),
            (
                "TE look-alike",
                Malformed::LookalikeName,
                parts("POST", at, &[("transfer_encoding", "chunked")]),
            ),
            ("expectation", Malformed::Expect, parts("POST", at, &[("expect", "x")])),
            ("method", Malformed::Method, parts("connect", at, &[])),
            ("asterisk", Malformed::Target, parts("GET", "*", &[("host", "a")])),
            ("CONNECT without a port", Malformed::Target, parts("CONNECT", "a", &[])),
            ("authority alone", Malformed::Target, parts("GET", "a:80", &[])),
            ("high byte", Malformed::Target, parts("GET", "/\u{e9}", &[("host", "a")])),
            ("no host", Malformed::HostMissing, parts("GET", "/", &[])),
            ("host against authority", Malformed::HostMismatch, parts("GET", at, &[("host", "b")])),
        ] {
            assert_eq!(check(&request), Err(refused), "{attack}");
        }
        for usual in [
            parts("POST", at, &[("content-length", "1"), ("expect", "100-continue")]),
            parts("OPTIONS", "*", &[("host", "a")]),
            parts("CONNECT", "a:80", &[]),
            parts("CONNECT", at, &[]), // of a WebSocket (RFC 8441)
        ] {
            assert_eq!(check(&usual), Ok(()), "{usual:?}");
        }
    }

    #[test]
    fn what_belongs_to_the_clients_connection_stays_there() {
        let mut request = headers(&[
            ("host", "a"),
            ("connection", "close, X-Mine ,, keep-alive"),
            ("connection", "TE"),
            ("x-mine", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic x"),
            ("proxy-authenticate", "Basic"),
            ("te", "gzip, Trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("http2-settings", "x"),
            ("x-other", "2"),
        ]);
        forward_request(&mut request, None, None).unwrap();
        assert_eq!(lines(&request), [("host", "a"), ("x-other", "2"), ("te", "trailers")]);
    }

    #[test]
    fn a_client_cannot_have_what_others_rely_on_removed() {
        for name in [
            "Host",
            "content-length",
            "Authorization",
            "cookie",
            "x-forwarded-for",
            "X-Forwarded-Proto",
            "x-murmesh-deadline-ms",
            "x-murmesh-peer",
            "traceparent",
            "a b",
            "\"host\"",
        ] {
            for value in [name.to_owned(), format!("close, {name}")] {
                let mut request = headers(&[("connection", &value)]);
                let refused = forward_request(&mut request, None, None);
                assert_eq!(refused, Err(Malformed::Connection), "{value}");
            }
        }
        let mut response = headers(&[("connection", "content-length"), ("content-length", "1")]);
        forward_response(&mut response, None);
        assert_eq!(lines(&response), [("content-length", "1")], "an answer arrives whole");
    }

    #[test]
    fn nobody_but_us_says_what_we_say() {
        let mut request = headers(&[
            ("x-murmesh-deadline-ms", "5"),
            ("x-murmesh-peer", "root"),
            ("x_murmesh-peer", "root"),
            ("x_murmesh_deadline_ms", "9"),
            ("x_forwarded_for", "::1"),
            ("x-murmeshed", "1"),
        ]);
        forward_request(&mut request, None, None).unwrap();
        assert_eq!(lines(&request), [("x-murmesh-deadline-ms", "5"), ("x-murmeshed", "1")]);
        let mut response = headers(&[("x-murmesh-reason", "denied"), ("x-murmesh-node", "own")]);
        forward_response(&mut response, None);
        assert_eq!(lines(&response), [("x-murmesh-node", "own")]);
    }

    #[test]
    fn the_clients_address_ends_the_one_line_of_addresses() {
        for (before, client, after) in [
            (&[][..], "10.0.0.1", "10.0.0.1"),
            (&["1.1.1.1"], "::ffff:10.0.0.1", "1.1.1.1, 10.0.0.1"),
            (&["1.1.1.1", "2.2.2.2, 3.3.3.3"], "::1", "1.1.1.1, 2.2.2.2, 3.3.3.3, ::1"),
        ] {
            let before: Vec<_> =
                before.iter().map(|address| ("x-forwarded-for", *address)).collect();
            let mut request = headers(&before);
            let client = ClientAddress::new(client.parse().unwrap());
            forward_request(&mut request, client.as_ref(), None).unwrap();
            assert_eq!(lines(&request), [("x-forwarded-for", after)]);
        }
        let mut request = headers(&[("x-forwarded-for", "a"), ("x-forwarded-for", "b")]);
        forward_request(&mut request, None, None).unwrap();
        assert_eq!(lines(&request), [("x-forwarded-for", "a"), ("x-forwarded-for", "b")]);
    }

    #[test]
    fn cookies_that_http2_split_are_one_line_again() {
        let mut request = headers(&[("cookie", "a=1"), ("cookie", "b=2"), ("cookie", "c=3")]);
        forward_request(&mut request, None, None).unwrap();
        assert_eq!(lines(&request), [("cookie", "a=1; b=2; c=3")]);
    }

    #[test]
    fn only_an_upgrade_that_is_one_goes_on() {
        let asked = |lines: &[(&str, &str)]| {
            let mut parts = parts("GET", "/", lines);
            parts.version = Version::HTTP_11;
            upgrade(&parts)
        };
        let web_socket = asked(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert_eq!(web_socket.as_ref().unwrap(), "websocket");
        let mut request = headers(&[("connection", "Upgrade, X-Mine"), ("x-mine", "1")]);
        forward_request(&mut request, None, web_socket.clone()).unwrap();
        assert_eq!(lines(&request), [("connection", "upgrade"), ("upgrade", "websocket")]);
        let mut response = headers(&[("connection", "Upgrade"), ("upgrade", "WebSocket")]);
        forward_response(&mut response, web_socket);
        assert_eq!(lines(&response), [("connection", "upgrade"), ("upgrade", "websocket")]);
        for protocol in ["h2c", "H2C", "HTTP/2.0", "TLS/1.0", "websocket, h2c", "", "a b"] {
            let upgrade = asked(&[("connection", "upgrade"), ("upgrade", protocol)]);
            assert_eq!(upgrade, None, "{protocol}");
        }
        assert_eq!(asked(&[("upgrade", "websocket")]), None, "not asked for");
        for body in [("content-length", "1"), ("transfer-encoding", "chunked")] {
            let lines = [("connection", "upgrade"), ("upgrade", "websocket"), body];
            assert_eq!(asked(&lines), None, "{body:?}");
        }
        assert_eq!(
            asked(&[("connection", "upgrade"), ("upgrade", "websocket"), ("upgrade", "x")]),
            None
        );
    }

    #[test]
    fn time_that_a_caller_leaves_is_one_number_of_milliseconds() {
        let left = |lines: &[&str]| {
            let lines: Vec<_> = lines.iter().map(|line| ("x-murmesh-deadline-ms", *line)).collect();
            time_left(&headers(&lines))
        };
        assert_eq!(left(&[]), Ok(None));
        assert_eq!(left(&["0"]), Ok(Some(Duration::ZERO)));
        assert_eq!(left(&["9000"]), Ok(Some(Duration::from_secs(9))));
        for bad in [&[""][..], &["+1"], &["-1"], &["1.5"], &["1s"], &["99999999999999999999"]] {
            assert_eq!(left(bad), Err(Malformed::Deadline), "{bad:?}");
        }
        assert_eq!(left(&["1", "1"]), Err(Malformed::Deadline));
    }

    #[test]
    fn trailers_decide_nothing() {
        for good in ["grpc-status", "Content-Digest", "x-amz-checksum-crc32", "Server-Timing"] {
            assert!(is_trailer(good), "{good}");
        }
        for bad in [
            "Host",
            "Content-Length",
            "content_length",
            "Transfer-Encoding",
            "Connection",
            "TE",
            "Trailer",
            "Authorization",
            "Cookie",
            "Expect",
            "X-Forwarded-For",
            "x-murmesh-peer",
        ] {
            assert!(!is_trailer(bad), "{bad}");
        }
    }
}
