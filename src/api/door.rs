//! Who may ask: programs of this machine, and for changes those that can read its token.
//!
//! A web page in a browser of this machine can send requests to loopback addresses, under its own
//! name by DNS rebinding. So every route, also one that does not exist, wants a `Host` of this machine
//! and no foreign `Origin`; what changes anything or tells secrets wants the token, too.

use std::net::{IpAddr, SocketAddr};

use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderValue, ORIGIN};
use hyper::{Method, Request, StatusCode};

use super::ApiToken;
use super::problem::Refusal;

/// Reads that tell secrets or how to get in.
const SECRET_READS: &[&str] = &["/v1/mesh/config", "/v1/mesh/invites", "/v1/mesh/log"];

/// Whether whoever asks this must show the token.
pub(super) fn wants_token(method: &Method, path: &str) -> bool {
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    !is_read || SECRET_READS.contains(&path)
}

/// The checks before every route.
#[derive(Clone, Debug)]
pub(super) struct Door {
    token: ApiToken,
    listen: Option<SocketAddr>,
}

impl Door {
    /// The door of an API that listens on `listen`, on unix sockets, or on both.
    pub(super) fn new(token: ApiToken, listen: Option<SocketAddr>) -> Self {
        Self { token, listen }
    }

    /// Lets a request pass, or says why not.
    pub(super) fn admit<B>(&self, request: &Request<B>) -> Result<(), Refusal> {
        let host = self.check_host(request)?;
        check_origin(request.headers(), host)?;
        match wants_token(request.method(), request.uri().path()) {
            true => self.check_token(request.headers()),
            false => Ok(()),
        }
    }

    fn check_host<'r, B>(&self, request: &'r Request<B>) -> Result<&'r str, Refusal> {
        let mut hosts = request.headers().get_all(HOST).iter();
        let (Some(host), None) = (hosts.next(), hosts.next()) else {
            return Err(Refusal::malformed("exactly one Host header is needed"));
        };
        let foreign = |host: &str| {
            Refusal::new(
                StatusCode::MISDIRECTED_REQUEST,
                "foreign_host",
                "Not this host",
                format!("'{host}' is not this API; ask http://127.0.0.1 or http://localhost"),
            )
        };
        let host = host.to_str().map_err(|_| foreign("?"))?;
        let target = request.uri().authority().map(|authority| authority.as_str());
        match [Some(host), target].into_iter().flatten().find(|name| !self.is_here(name)) {
            Some(name) => Err(foreign(&name.chars().take(80).collect::<String>())),
            None => Ok(host),
        }
    }

    /// `localhost`, a loopback address or the address listened on, with any port.
    fn is_here(&self, authority: &str) -> bool {
        let is_port = |text: &str| text.parse::<u16>().is_ok();
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if is_port(port) && (!host.contains(':') || host.ends_with(']')) => {
                host
            }
            _ => authority,
        };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let is_listen = |ip: IpAddr| self.listen.is_some_and(|listen| listen.ip() == ip);
        host.eq_ignore_ascii_case("localhost")
            || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback() || is_listen(ip))
    }

    fn check_token(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let bearer = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
        let bearer = bearer.and_then(|value| match value.split_at_checked(7) {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => Some(token),
            _ => None,
        });
        let consul = headers.get("x-consul-token").map(HeaderValue::as_bytes);
        match bearer.or(consul).is_some_and(|token| self.token.is(token.trim_ascii())) {
            true => Ok(()),
            false => Err(Refusal::new(
                StatusCode::UNAUTHORIZED,
                "token",
                "The API token is needed",
                "send 'Authorization: Bearer' with the content of <data_dir>/api.token; murmesh's \
                 commands read it themselves when they may and know the --data-dir",
            )),
        }
    }
}

/// A browser says where a request comes from; programs say nothing.
fn check_origin(headers: &HeaderMap, host: &str) -> Result<(), Refusal> {
    let foreign = |from: &str| {
        Refusal::new(
            StatusCode::FORBIDDEN,
            "foreign_origin",
            "Not from another site",
            format!("a web page of '{from}' must not talk to this API"),
        )
    };
    for origin in headers.get_all(ORIGIN) {
        let origin = origin.to_str().unwrap_or("?");
        let own = origin.strip_prefix("http://").is_some_and(|o| o.eq_ignore_ascii_case(host));
        if !own {
            return Err(foreign(&origin.chars().take(80).collect::<String>()));
        }
    }
    match headers.get("sec-fetch-site").map(HeaderValue::as_bytes) {
        None | Some(b"same-origin" | b"none") => Ok(()),
        Some(_) => Err(foreign("another site")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: &str, path: &str, headers: &[(&str, &str)]) -> u16 {
        let door = Door::new(ApiToken::new("secret"), "127.0.0.2:7371".parse().ok());
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        match door.admit(&request.body(()).unwrap()) {
            Ok(()) => 200,
            Err(refusal) => axum::response::IntoResponse::into_response(refusal).status().as_u16(),
        }
    }

    #[test]
    fn only_this_machine_by_its_own_names() {
        for host in
            ["localhost", "LOCALHOST:7371", "127.0.0.1:7371", "127.0.0.9", "[::1]:7371", "[::1]"]
        {
            assert_eq!(status("GET", "/live", &[("host", host)]), 200, "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "10.0.0.1:7371",
            "127.0.0.1.evil",
            "",
            ":7371",
            "evil@localhost",
            "127.0.0.1:7371:1",
        ] {
            assert_eq!(status("GET", "/live", &[("host", host)]), 421, "{host}");
        }
        assert_eq!(status("GET", "/live", &[]), 400);
        assert_eq!(status("GET", "/live", &[("host", "localhost"), ("host", "localhost")]), 400);
        assert_eq!(status("GET", "http://evil.example/live", &[("host", "localhost")]), 421);
    }

    #[test]
    fn web_pages_of_other_sites_are_kept_out() {
        let host = ("host", "127.0.0.1:7371");
        for (header, value, expected) in [
            ("origin", "http://127.0.0.1:7371", 200),
            ("origin", "http://127.0.0.1:3000", 403),
            ("origin", "http://evil.example", 403),
            ("origin", "null", 403),
            ("sec-fetch-site", "same-origin", 200),
            ("sec-fetch-site", "none", 200),
            ("sec-fetch-site", "same-site", 403),
            ("sec-fetch-site", "cross-site", 403),
        ] {
            assert_eq!(status("GET", "/live", &[host, (header, value)]), expected, "{value}");
        }
    }

    #[test]
    fn changes_and_secrets_want_the_token() {
        let host = ("host", "localhost");
        for (method, path) in
            [("POST", "/v1/mesh/expose"), ("DELETE", "/nothing"), ("GET", "/v1/mesh/config")]
        {
            assert_eq!(status(method, path, &[host]), 401);
            assert_eq!(status(method, path, &[host, ("authorization", "Bearer wrong")]), 401);
            assert_eq!(status(method, path, &[host, ("authorization", "secret")]), 401);
            assert_eq!(status(method, path, &[host, ("authorization", "Bearer secret")]), 200);
            assert_eq!(status(method, path, &[host, ("x-consul-token", "secret")]), 200);
        }
    }
}
