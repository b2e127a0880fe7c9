//! Heads and trailer sections as bytes: where a message ends, where it goes, and whether everybody reads
//! them so.

use std::mem::MaybeUninit;

use http::Uri;
use httparse::{Header, Request, Status};

use super::{EMPTY_LINE, HEADERS_MAX};
use crate::proxy::http::head::{
    Authority, content_length, is_expectation, is_lookalike, is_method, is_trailer,
};
use crate::proxy::http::malformed::Malformed;

/// What hyper takes anywhere in a target, by byte.
static USUAL_IN_TARGETS: [bool; 256] = {
    let mut usual = [false; 256];
    let mut byte = 0;
    while byte < usual.len() {
        usual[byte] = matches!(
            byte as u8,
            b'!' | b'$'..=b';' | b'=' | b'?'..=b'[' | b']' | b'_' | b'a'..=b'z' | b'|' | b'~'
        );
        byte += 1;
    }
    usual
};

pub(super) struct Message {
    pub(super) body: Body,
    pub(super) is_upgrade: bool,
}

pub(super) enum Body {
    Sized(u64),
    Chunked,
}

/// Judges a whole head, which consists of lines that end in CRLF and begin with no white space.
pub(super) fn check_head(head: &[u8]) -> Result<Message, Malformed> {
    let mut headers = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let mut request = Request::new(&mut []);
    match request.parse_with_uninit_headers(head, &mut headers) {
        Ok(Status::Complete(len)) if len == head.len() => {}
        Ok(_) => return Err(Malformed::RequestLine),
        Err(error) => return Err(unparsable(error, head)),
    }
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Err(Malformed::RequestLine);
    };
    if !is_method(method) {
        return Err(Malformed::Method);
    }
    let mut lines = Lines::default();
    for header in request.headers.iter() {
        lines.handle_header(head, header)?;
    }
    let is_http_11 = version == 1;
    check_host(method, target, lines.host, is_http_11)?;
    let body = match (lines.length, lines.is_chunked) {
        (Some(_), true) => return Err(Malformed::LengthAndEncoding),
        (None, true) if !is_http_11 => return Err(Malformed::EncodingInHttp10),
        (_, true) => Body::Chunked,
        (length, false) => Body::Sized(length.unwrap_or(0)),
    };
    let is_connect = method == "CONNECT";
    if is_connect && (lines.length.is_some() || lines.is_chunked) {
        return Err(Malformed::ConnectWithBody);
    }
    Ok(Message { body, is_upgrade: is_connect || lines.is_upgrade })
}

/// The headers that decide where a message ends and where it goes.
#[derive(Default)]
struct Lines<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    is_chunked: bool,
    is_upgrade: bool,
}

impl<'a> Lines<'a> {
    fn handle_header(&mut self, head: &[u8], header: &Header<'a>) -> Result<(), Malformed> {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        match header.name.len() {
            4 if is("host") => {
                if self.host.replace(header.value).is_some() {
                    return Err(Malformed::SeveralHosts);
                }
                if !is_plain(head, header) {
                    return Err(Malformed::Host);
                }
            }
            6 if is("expect") && !is_expectation(header.value) => return Err(Malformed::Expect),
            7 if is("upgrade") => self.is_upgrade = true,
            14 if is("content-length") => {
                if !is_plain(head, header) {
                    return Err(Malformed::ContentLength);
                }
                if self.length.replace(content_length(header.value)?).is_some() {
                    return Err(Malformed::SeveralLengths);
                }
            }
            17 if is("transfer-encoding") => {
                let is_one = !self.is_chunked && header.value.eq_ignore_ascii_case(b"chunked");
                if !is_one || !is_plain(head, header) {
                    return Err(Malformed::TransferEncoding);
                }
                self.is_chunked = true;
            }
            14 | 17 if is_lookalike(header.name) => return Err(Malformed::LookalikeName),
            _ => {}
        }
        Ok(())
    }
}

/// Whether only the usual space, or nothing, stands around the value. Parsers differ in what else
/// they take for white space.
fn is_plain(head: &[u8], header: &Header<'_>) -> bool {
    let offset = |bytes: &[u8]| (bytes.as_ptr() as usize).wrapping_sub(head.as_ptr() as usize);
    let name_end = offset(header.name.as_bytes()) + header.name.len();
    let (start, end) = (offset(header.value), offset(header.value) + header.value.len());
    let before = head.get(name_end..start).unwrap_or_default();
    let after = head.get(end..).unwrap_or_default();
    matches!(before, b":" | b": ") && after.starts_with(EMPTY_LINE)
}

/// RFC 9112 3.2: the form of the target follows from the method, and target and `Host` agree.
fn check_host(
    method: &str,
    target: &str,
    host: Option<&[u8]>,
    is_http_11: bool,
) -> Result<(), Malformed> {
    if !is_target(target) {
        return Err(Malformed::Target);
    }
    let host = host.map(Authority::parse).transpose()?;
    if is_http_11 && host.is_none() {
        return Err(Malformed::HostMissing);
    }
    let (authority, default) = match method {
        "CONNECT" => {
            let authority = Authority::parse(target.as_bytes())?;
            (authority, Some(authority.port.ok_or(Malformed::Target)?))
        }
        _ if target.starts_with('/') => return Ok(()),
        "OPTIONS" if target == "*" => return Ok(()),
        _ => absolute(target)?,
    };
    match host {
        Some(host) if !authority.is_same(&host, default) => Err(Malformed::HostMismatch),
        _ => Ok(()),
    }
}

/// Whether hyper takes this for a target, too: what it does not take it refuses without a reason. That
/// is little beside what no target has: `<`, `>` and a back-tick, and in a query a double quote.
fn is_target(target: &str) -> bool {
    let is_usual = |b| USUAL_IN_TARGETS[usize::from(b)];
    let is_rare = || target.is_ascii() && !target.contains('#') && target.parse::<Uri>().is_ok();
    target.bytes().all(is_usual) || is_rare()
}

/// Authority and default port of `http://host:port/path`.
fn absolute(target: &str) -> Result<(Authority<'_>, Option<u16>), Malformed> {
    let (scheme, rest) = target.split_once("://").ok_or(Malformed::Target)?;
    let default = match scheme {
        _ if scheme.eq_ignore_ascii_case("http") => 80,
        _ if scheme.eq_ignore_ascii_case("https") => 443,
        _ => return Err(Malformed::Target),
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    Ok((Authority::parse(&rest.as_bytes()[..end])?, Some(default)))
}

pub(super) fn check_trailers(section: &[u8]) -> Result<(), Malformed> {
    if section == EMPTY_LINE {
        return Ok(());
    }
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    match httparse::parse_headers(section, &mut headers) {
        Ok(Status::Complete((len, trailers))) if len == section.len() => {
            let is_allowed = trailers.iter().all(|trailer| is_trailer(trailer.name));
            if is_allowed { Ok(()) } else { Err(Malformed::TrailerName) }
        }
        Ok(_) => Err(Malformed::HeaderName),
        Err(httparse::Error::TooManyHeaders) => Err(Malformed::TrailersTooLarge),
        Err(error) => Err(unparsable(error, section)),
    }
}

fn unparsable(error: httparse::Error, section: &[u8]) -> Malformed {
    if section.windows(2).any(|pair| matches!(pair, [b'\r', next] if *next != b'\n')) {
        return Malformed::BareCr;
    }
    match error {
        httparse::Error::HeaderName => Malformed::HeaderName,
        httparse::Error::HeaderValue => Malformed::HeaderValue,
        httparse::Error::TooManyHeaders => Malformed::TooManyHeaders,
        httparse::Error::Version => Malformed::Version,
        _ => Malformed::RequestLine,
    }
}
