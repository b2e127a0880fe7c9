//! The ways in by name: the gateway for this machine's clients, and the public one.

use std::convert::Infallible;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt, split};
use tokio::net::TcpListener;

use crate::support::{
    Agent, Kind, Program, Ran, SOON, Server, TestMesh, beside_others, check, eventually, find,
    free_address, run_program, runtime, skip,
};

const LONG: Duration = Duration::from_secs(120);

/// What an application speaks.
#[derive(Clone, Copy)]
enum Speaks {
    Http1,
    Http2,
}

/// An application that answers every request with what it was: request line, then headers.
fn application(speaks: Speaks) -> SocketAddr {
    let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime().spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let io = TokioIo::new(stream);
            let told = service_fn(async |request| Ok::<_, Infallible>(told(request)));
            runtime().spawn(async move {
                match speaks {
                    Speaks::Http1 => drop(http1::Builder::new().serve_connection(io, told).await),
                    Speaks::Http2 => {
                        let http2 = http2::Builder::new(TokioExecutor::new());
                        drop(http2.serve_connection(io, told).await);
                    }
                }
            });
        }
    });
    address
}

fn told(request: Request<Incoming>) -> Response<Full<Bytes>> {
    let mut text = format!("{} {} {:?}\n", request.method(), request.uri(), request.version());
    for (name, value) in request.headers() {
        text += &format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes()));
    }
    Response::new(Full::new(text.into()))
}

/// Calls enter at `near`, whose gateway is returned; applications are behind `far`.
fn mesh() -> (TestMesh, SocketAddr) {
    let (mut mesh, gateway) = (TestMesh::new(), free_address());
    let mut near = Agent::new(&mesh.home, "near");
    near.arguments = vec!["--gateway".to_owned(), gateway.to_string()];
    mesh.found_with(near);
    let token = mesh.invite(1);
    mesh.join("far", &token);
    (mesh, gateway)
}

impl TestMesh {
    /// Puts an application behind `far`, and waits until `near` knows it.
    #[track_caller]
    fn offer(&self, service: &str, protocol: &str, to: SocketAddr) {
        let to = to.to_string();
        self.agent("far").run(&["expose", service, &to, "--protocol", protocol]).ok();
        self.agent("near").wait_endpoints(service, 1);
    }
}

fn program(name: &str) -> Option<PathBuf> {
    let found = find(name);
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

#[track_caller]
fn curl(arguments: &[&str]) -> Ran {
    let mut command = Command::new("curl");
    for name in ["http_proxy", "https_proxy", "all_proxy", "no_proxy", "NO_PROXY"] {
        command.env_remove(name);
    }
    run_program(command.args(["-sS", "--max-time", "60"]).args(arguments), b"", LONG)
}

/// Sends these bytes and reads to the end.
fn said(to: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn curl_reaches_services_by_host_as_a_proxy_and_by_connect() {
    let _turn = beside_others();
    if program("curl").is_none() {
        return;
    }
    let (mesh, gateway) = mesh();
    mesh.offer("web", "http", application(Speaks::Http1));
    mesh.offer("fast", "h2", application(Speaks::Http2));
    let page = Server::start(Kind::Web("hello by bytes\n".to_owned()));
    mesh.offer("plain", "tcp", page.address);

    let (url, proxy) = (format!("http://{gateway}/a?b=1"), format!("http://{gateway}"));
    let host = |name: &str| format!("host: {name}");
    let ways: [(&[&str], &str); 10] = [
        (&[&url, "-H", &host("web.mesh")], "HTTP/1.1"),
        (&[&url, "-H", &host("WEB.Mesh.Internal:81")], "HTTP/1.1"),
        (&[&url, "-H", &host("web.mesh."), "--http2-prior-knowledge"], "HTTP/1.1"),
        (&[&url, "-H", &host("web.mesh"), "--http1.0"], "HTTP/1.1"),
        (&["-x", &proxy, "http://web.mesh/a?b=1"], "HTTP/1.1"),
        (&["-x", &proxy, "http://web.mesh:9999/a?b=1"], "HTTP/1.1"),
        (&["-p", "-x", &proxy, "http://web.mesh/a?b=1"], "HTTP/1.1"),
        (&[&url, "-H", &host("fast.mesh")], "HTTP/2.0"),
        (&[&url, "-H", &host("fast.mesh"), "--http2-prior-knowledge"], "HTTP/2.0"),
        (&["-x", &proxy, "http://fast.mesh/a?b=1"], "HTTP/2.0"),
    ];
    for (arguments, version) in ways {
        let told = curl(&[&["-f"], arguments].concat()).ok();
        let first = told.lines().next().unwrap_or_default();
        let target = first.strip_prefix("GET ").and_then(|rest| rest.strip_suffix(version));
        assert!(target.is_some_and(|target| target.ends_with("/a?b=1 ")), "{arguments:?}: {told}");
    }
    let told = curl(&["-f", "-p", "-x", &proxy, "http://plain.mesh/"]).ok();
    assert_eq!(told, "hello by bytes\n");
}

#[test]
fn what_no_service_answers_is_refused_with_its_reason_and_counted() {
    let _turn = beside_others();
    let (mesh, gateway) = mesh();
    mesh.offer("web", "http", application(Speaks::Http1));
    let echo = Server::start(Kind::Echo);
    mesh.offer("echo", "tcp", echo.address);
    let near = mesh.agent("near");
    let get = |host: &str| format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let proxied = |url: &str, host: &str| get(host).replacen(" / ", &format!(" {url} "), 1);
    let connect =
        |to: &str| format!("CONNECT {to} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\n\r\n");
    let outside = Server::start(Kind::Web("outside".to_owned()));
    for (request, status, reason) in [
        (get("example.com"), 404, "foreign_name"),
        (get("127.0.0.1"), 404, "foreign_name"),
        (get("a.web.mesh"), 404, "foreign_name"),
        (proxied("http://example.com/", "example.com"), 404, "foreign_name"),
        (proxied(&format!("http://{}/", outside.address), "web.mesh"), 400, "malformed"),
        (get("nobody.mesh"), 404, "unknown_service"),
        (get("echo.mesh"), 502, "not_http"),
        (connect("example.com:443"), 404, "foreign_name"),
        (connect(&outside.address.to_string()), 404, "foreign_name"),
        (connect("nobody.mesh:80"), 404, "unknown_service"),
    ] {
        let before = near.metric("murmesh_refused_total", &["door=\"gateway\"", reason]);
        let answer = said(gateway, request.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}{answer}");
        assert!(answer.contains(&format!("x-murmesh-reason: {reason}")), "{request}{answer}");
        let after = near.metric("murmesh_refused_total", &["door=\"gateway\"", reason]);
        assert_eq!(after, before + 1.0, "{request}");
    }
    assert!(said(gateway, get("echo.mesh").as_bytes()).contains("CONNECT echo.mesh"));
    assert_eq!(outside.accepted(), 0, "the gateway went outside the mesh");
}

#[test]
fn connect_carries_bytes_both_ways_also_those_sent_before_its_answer() {
    let _turn = beside_others();
    let (mesh, gateway) = mesh();
    let echo = Server::start(Kind::Echo);
    mesh.offer("echo", "tcp", echo.address);
    let mut request = b"CONNECT echo.mesh:7 HTTP/1.1\r\nhost: echo.mesh:7\r\n\r\nearly ".to_vec();
    let long = "0123456789".repeat(200_000);
    request.extend_from_slice(long.as_bytes());
    let mut stream = TcpStream::connect(gateway).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        writer.write_all(&request).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    writing.join().unwrap();
    let (head, bytes) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 ") && !head.contains("content-length"), "{head}");
    assert_eq!(bytes.len(), "early ".len() + long.len());
    assert!(bytes.strip_prefix("early ") == Some(&long));
}

/// A proxy of HTTP/2 is something that no client takes this one for; who does is told what to do.
#[test]
fn connect_over_http_2_is_refused_with_what_to_try() {
    let _turn = beside_others();
    let (mesh, gateway) = mesh();
    mesh.offer("web", "http", application(Speaks::Http1));
    let (status, reason, text) = runtime().block_on(async {
        let stream = tokio::net::TcpStream::connect(gateway).await.unwrap();
        let shake =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
        let (mut sender, connection) = shake.await.unwrap();
        runtime().spawn(connection);
        let request = Request::connect("web.mesh:80").body(Empty::<Bytes>::new()).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        let reason = answer.headers()["x-murmesh-reason"].clone();
        let status = answer.status().as_u16();
        let text = answer.into_body().collect().await.unwrap().to_bytes();
        (status, reason, String::from_utf8(text.to_vec()).unwrap())
    });
    assert_eq!((status, reason.to_str().unwrap()), (405, "no_tunnel"));
    assert!(text.contains("over HTTP/1.1") && text.contains("--proxytunnel"), "{text}");
}

#[test]
fn applications_hear_from_where_a_request_came() {
    let _turn = beside_others();
    let (mesh, gateway) = mesh();
    mesh.offer("web", "http", application(Speaks::Http1));
    let near = mesh.agent("near");
    let file = mesh.home.path().join("web.sock").display().to_string();
    near.run(&["upstream", "web", &format!("unix:{file}")]).ok();
    let port = near.upstream("web");
    if program("curl").is_none() {
        return;
    }
    let from = ["-H", "x-forwarded-for: 192.0.2.7"];
    for (url, more, forwarded) in [
        (format!("http://{gateway}/"), &["-H", "host: web.mesh"][..], "127.0.0.1"),
        (format!("http://{port}/"), &[], "127.0.0.1"),
        (format!("http://{port}/"), &from, "192.0.2.7, 127.0.0.1"),
    ] {
        let told = curl(&[&["-f", &url], more].concat()).ok();
        let expected = format!("x-forwarded-for: {forwarded}\n");
        assert!(told.contains(&expected), "{url} {more:?}: {told}");
    }
    let told = curl(&["-f", "--unix-socket", &file, "http://web.mesh/"]).ok();
    assert!(!told.contains("x-forwarded-for"), "{told}");
}

#[test]
fn murmesh_curl_is_curl_through_the_gateway() {
    let _turn = beside_others();
    if program("curl").is_none() {
        return;
    }
    let (mesh, gateway) = mesh();
    mesh.offer("web", "http", application(Speaks::Http1));
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let told = near.run(&["curl", "-sS", "-d", "x=1", "http://web.mesh/order"]).ok();
    assert!(told.starts_with("POST /order HTTP/1.1\n"), "{told}");
    let failed = near.run(&["curl", "-sSf", "http://nobody.mesh/"]);
    assert_eq!(failed.code, Some(22), "curl's own exit code: {failed:?}");
    let refused = far.run(&["curl", "http://web.mesh/"]).fails(2);
    assert!(refused.contains("no gateway") && refused.contains("--gateway"), "{refused}");
    let mut without = near.command(&["curl", "http://web.mesh/"]);
    let refused = run_program(without.env("PATH", mesh.home.path()), b"", SOON).fails(2);
    assert!(refused.contains("no curl on this machine"), "{refused}");

    let screen = near.run(&["status"]).ok();
    assert!(screen.contains(&format!("http://{gateway}")), "{screen}");
    let dump = near.run(&["config", "dump"]).ok();
    assert!(dump.contains("listen.gateway") && dump.contains("flag --gateway"), "{dump}");
}

/// An authority of this test's own.
struct Authority {
    certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, "the test's own authority");
        let certificate = params.self_signed(&key).unwrap();
        Self { certificate, issuer: rcgen::Issuer::new(params, key) }
    }

    /// Writes a certificate for `name` and its key. Returns the certificate's serial number.
    fn issue(&self, name: &str, at: &Pair) -> String {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let mut distinguished = rcgen::DistinguishedName::new();
        distinguished.push(rcgen::DnType::CommonName, name);
        params.distinguished_name = distinguished;
        params.not_before = time::OffsetDateTime::now_utc() - time::Duration::hours(1);
        params.not_after = time::OffsetDateTime::now_utc() + time::Duration::days(60);
        let serial = format!("4{:03x}", u16::from(key.public_key_raw()[1]) << 2);
        params.serial_number = Some(u64::from_str_radix(&serial, 16).unwrap().into());
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(&at.key, key.serialize_pem()).unwrap();
        fs::write(&at.cert, certificate.pem()).unwrap();
        serial
    }
}

/// Where a certificate and its key are.
struct Pair {
    cert: PathBuf,
    key: PathBuf,
}

/// A mesh whose `near` is a public gateway: `shop.example.com` is `web`, `fast.example.org` is `fast`.
struct Ingress {
    mesh: TestMesh,
    authority: Authority,
    shop: Pair,
    org: Pair,
    public: SocketAddr,
    redirect: SocketAddr,
    config: PathBuf,
    ca: String,
}

impl Ingress {
    fn new() -> Self {
        let (mut mesh, authority) = (TestMesh::new(), Authority::new());
        let home = mesh.home.path().to_owned();
        let pair = |name: &str| Pair {
            cert: home.join(format!("{name}.pem")),
            key: home.join(format!("{name}.key")),
        };
        let (shop, org) = (pair("shop"), pair("org"));
        authority.issue("shop.example.com", &shop);
        authority.issue("*.example.org", &org);
        fs::write(home.join("ca.pem"), authority.certificate.pem()).unwrap();
        let (public, redirect, config) = (free_address(), free_address(), home.join("near.toml"));
        let list =
            [&shop, &org].map(|Pair { cert, key }| format!("{{ cert = {cert:?}, key = {key:?} }}"));
        let text = format!(
            "[gateway]\npublic = \"{public}\"\nredirect = \"{redirect}\"\ncertificates = [{}]\n\
             [[upstream]]\nservice = \"web\"\npublic = true\nhosts = [\"shop.example.com\"]\n\
             [[upstream]]\nservice = \"fast\"\npublic = true\nhosts = [\"fast.example.org\"]\n",
            list.join(", ")
        );
        fs::write(&config, text).unwrap();
        let mut near = Agent::new(&mesh.home, "near");
        near.arguments = vec!["-c".to_owned(), config.display().to_string()];
        mesh.found_with(near);
        let token = mesh.invite(1);
        mesh.join("far", &token);
        let ca = home.join("ca.pem").display().to_string();
        Self { mesh, authority, shop, org, public, redirect, config, ca }
    }

    /// curl as a client outside: it trusts the authority, and finds these hosts here.
    #[track_caller]
    fn curl(&self, arguments: &[&str]) -> Ran {
        let mut all = vec!["--cacert".to_owned(), self.ca.clone()];
        for host in ["shop.example.com", "fast.example.org", "example.net"] {
            for port in [self.public.port(), self.redirect.port()] {
                all.extend(["--resolve".to_owned(), format!("{host}:{port}:127.0.0.1")]);
            }
        }
        let all: Vec<_> = all.iter().map(String::as_str).chain(arguments.iter().copied()).collect();
        curl(&all)
    }

    fn url(&self, host: &str, path: &str) -> String {
        format!("https://{host}:{}{path}", self.public.port())
    }

    /// Subject and serial of the certificate that a client is shown, or why there is none.
    #[track_caller]
    fn shown(&self, name: &[&str]) -> Result<(String, String), String> {
        let mut client = Command::new("openssl");
        client.args(["s_client", "-connect", &self.public.to_string()]).args(name);
        let ran = run_program(&mut client, b"", LONG);
        let mut print = Command::new("openssl");
        print.args(["x509", "-noout", "-subject", "-serial"]);
        let printed = run_program(&mut print, ran.stdout.as_bytes(), LONG);
        let mut lines = printed.stdout.lines().filter_map(|line| line.split_once('='));
        match (lines.next(), lines.next()) {
            (Some((_, subject)), Some((_, serial))) => {
                Ok((subject.replace("CN = ", "").trim().to_owned(), serial.to_lowercase()))
            }
            _ => Err(ran.stderr),
        }
    }
}

#[test]
fn clients_outside_reach_what_is_public_over_tls_and_nothing_else() {
    let _turn = beside_others();
    if program("curl").is_none() {
        return;
    }
    let ingress = Ingress::new();
    let mesh = &ingress.mesh;
    mesh.offer("web", "http", application(Speaks::Http1));
    mesh.offer("fast", "h2", application(Speaks::Http2));
    mesh.offer("inner", "http", application(Speaks::Http1));
    let shop = ingress.url("shop.example.com", "/a?b=1");

    let forged = ["-H", "x-forwarded-for: 192.0.2.7", "-H", "x-murmesh-peer: me"];
    for (version, spoken) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let arguments = [&["-f", version, "-w", "%{http_version}", &shop], &forged[..]].concat();
        let told = ingress.curl(&arguments).ok();
        assert!(told.starts_with("GET /a?b=1 HTTP/1.1\n"), "{told}");
        assert!(told.contains("x-forwarded-for: 127.0.0.1\n"), "{told}");
        assert!(told.contains("x-forwarded-proto: https\n"), "{told}");
        assert!(!told.contains("x-murmesh-peer: me"), "{told}");
        assert!(told.ends_with(spoken), "ALPN: {told}");
    }
    let told = ingress.curl(&["-f", &ingress.url("fast.example.org", "/")]).ok();
    assert!(told.starts_with("GET ") && told.contains("HTTP/2.0"), "{told}");

    // A public name, and inside TLS somebody else.
    for host in ["inner.mesh", "web.mesh", "example.net", "127.0.0.1"] {
        let answer = ingress.curl(&["-i", &shop, "-H", &format!("host: {host}")]).ok();
        let first = answer.lines().next().unwrap_or_default();
        assert!(first.contains(" 404"), "{host}: {answer}");
        assert!(answer.contains("x-murmesh-reason: foreign_name"), "{host}: {answer}");
    }
    // What the mesh says of itself to the outside: one word.
    mesh.agent("far").run(&["unexpose", "web"]).ok();
    mesh.agent("near").wait_endpoints("web", 0);
    for more in [&[][..], &["-H", "content-type: application/grpc"]] {
        let answer = ingress.curl(&[&["-i", &shop], more].concat()).ok();
        assert!(answer.contains("x-murmesh-reason: "), "{answer}");
        for inner in ["x-murmesh-service", "x-murmesh-node", "far", "web", "murmesh e"] {
            assert!(!answer.contains(inner), "{inner}: {answer}");
        }
    }
    // No plain text, and no way around.
    let plain = ingress.curl(&[&format!("http://shop.example.com:{}/", ingress.public.port())]);
    assert_ne!(plain.code, Some(0), "{plain:?}");
    let here = format!("http://shop.example.com:{}/a?b=1", ingress.redirect.port());
    let moved = ingress.curl(&["-i", &here]).ok();
    assert!(moved.starts_with("HTTP/1.1 308 "), "{moved}");
    assert!(moved.contains(&format!("location: {shop}\r\n")), "{moved}");
    let foreign = ingress.curl(&["-i", &here, "-H", "host: example.net"]).ok();
    assert!(foreign.starts_with("HTTP/1.1 404 ") && !foreign.contains("location:"), "{foreign}");
}

#[test]
fn the_name_that_a_client_asks_for_chooses_the_certificate() {
    let _turn = beside_others();
    if program("openssl").is_none() {
        return;
    }
    let ingress = Ingress::new();
    for (name, subject) in [
        (&["-servername", "shop.example.com"][..], "shop.example.com"),
        (&["-servername", "fast.example.org"], "*.example.org"),
        (&["-noservername"], "shop.example.com"),
        (&["-servername", "shop.example.com", "-tls1_2"], "shop.example.com"),
    ] {
        assert_eq!(ingress.shown(name).unwrap().0, subject, "{name:?}");
    }
    for name in ["example.net", "a.fast.example.org", "example.org"] {
        let refused = ingress.shown(&["-servername", name]).unwrap_err();
        assert!(refused.contains("alert"), "{name}: {refused}");
    }
    let refused = ingress.mesh.agent("near").metric("murmesh_refused_total", &["door=\"public\""]);
    assert_eq!(refused, 3.0);
}

#[test]
fn certificates_are_read_again_when_they_change_and_broken_ones_are_not_used() {
    let _turn = beside_others();
    if program("openssl").is_none() {
        return;
    }
    let ingress = Ingress::new();
    let near = ingress.mesh.agent("near");
    let serial = |ingress: &Ingress| ingress.shown(&["-servername", "shop.example.com"]).unwrap().1;
    let is_listed = |serial: &str| {
        let listed: serde_json::Value =
            serde_json::from_str(&near.run(&["certs", "--json"]).ok()).unwrap();
        let row = listed.as_array().unwrap().iter().find(|row| row["serial"] == *serial).cloned();
        row.is_some_and(|row| row["kind"] == "public" && row["uris"][0] == "dns:shop.example.com")
    };
    let next = ingress.authority.issue("shop.example.com", &ingress.shop);
    eventually("the next certificate is shown", SOON, || {
        let shown = serial(&ingress);
        check(shown == next, shown)
    });
    assert!(is_listed(&next));
    eventually("the renewal is told", SOON, || {
        check(!near.events("public_certificate_renewed").is_empty(), "it is not")
    });

    fs::write(&ingress.shop.key, "no key\n").unwrap();
    eventually("the broken key is told", SOON, || {
        check(near.events("public_certificate_refused").len() == 1, "it is not")
    });
    let renewed = near.events("public_certificate_renewed");
    assert_eq!(renewed.len(), 1, "the other one is as it was: {renewed:?}");
    assert_eq!(serial(&ingress), next);
    let path = ingress.shop.key.display().to_string();
    let told = near.run(&["check"]).stdout;
    assert!(told.contains("public_certificates") && told.contains(&path), "{told}");
    let warned = near.run(&["validate", &ingress.config.display().to_string()]).fails(1);
    assert!(warned.contains(&path) && warned.contains("shop.example.com"), "{warned}");
    let refused = near.run(&["reload"]);
    assert!(refused.code != Some(0) && refused.stderr.contains(&path), "{refused:?}");

    near.stop();
    near.start();
    assert_eq!(near.events("public_certificate_refused").len(), 1, "it starts without it");
    assert!(ingress.shown(&["-servername", "shop.example.com"]).is_err());
    let other = ingress.authority.issue("*.example.org", &ingress.org);
    eventually("another one is renewed meanwhile", SOON, || {
        let shown = ingress.shown(&["-servername", "fast.example.org"]).unwrap().1;
        check(shown == other, shown)
    });
    let told = near.run(&["check"]).stdout;
    assert!(told.contains("its hosts are not served"), "{told}");

    let next = ingress.authority.issue("shop.example.com", &ingress.shop);
    let text = fs::read_to_string(&ingress.config).unwrap();
    fs::write(&ingress.config, text.replace("shop.example.com", "example.net")).unwrap();
    near.run(&["reload"]).ok();
    assert_eq!(serial(&ingress), next, "a reload reads them at once");
    let get = |host: &str| {
        let url = ingress.url("shop.example.com", "/");
        ingress.curl(&["-i", "-H", &format!("host: {host}"), &url]).ok()
    };
    assert!(get("shop.example.com").contains("foreign_name"), "public no more");
    assert!(get("example.net").contains("unknown_service"), "public now");
}

#[test]
fn a_browser_shows_a_page_through_the_public_gateway() {
    let _turn = beside_others();
    let Some(browser) = program("chromium-headless-shell") else { return };
    let ingress = Ingress::new();
    ingress.mesh.offer("web", "http", application(Speaks::Http1));
    let pem = fs::read(&ingress.shop.cert).unwrap();
    let mut spki = Command::new("openssl");
    spki.args(["x509", "-noout", "-pubkey"]);
    let key = run_program(&mut spki, &pem, LONG).ok();
    let mut hash = Command::new("sh");
    hash.args(["-c", "openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64"]);
    let hash = run_program(&mut hash, key.as_bytes(), LONG).ok();
    let mut command = Command::new(browser);
    command.args(["--no-sandbox", "--disable-gpu", "--no-proxy-server", "--dump-dom"]);
    command.arg(format!("--user-data-dir={}", ingress.mesh.home.path().join("browser").display()));
    command.arg(format!("--ignore-certificate-errors-spki-list={}", hash.trim()));
    command.arg("--host-resolver-rules=MAP shop.example.com 127.0.0.1");
    command.arg(ingress.url("shop.example.com", "/page?of=shop"));
    let page = run_program(&mut command, b"", LONG);
    assert!(page.stdout.contains("GET /page?of=shop HTTP/1.1"), "{page:#?}");
    assert!(page.stdout.contains("x-forwarded-proto: https"), "{page:#?}");
}

#[test]
fn an_application_hears_by_proxy_protocol_which_member_calls() {
    let _turn = beside_others();
    let Some(haproxy) = program("haproxy") else { return };
    let mut mesh = TestMesh::new();
    let (home, at, gateway) = (mesh.home.path().to_owned(), free_address(), free_address());
    let told = "%[src]:%[src_port] to %[dst_port] for %[fc_pp_authority]";
    let text = format!(
        "defaults\n mode http\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n\
         frontend told\n bind {at} accept-proxy\n \
         http-request return status 200 content-type text/plain lf-string \"{told}\"\n"
    );
    fs::write(home.join("haproxy.cfg"), text).unwrap();
    let mut command = Command::new(haproxy);
    let _haproxy = Program::start(command.arg("-db").arg("-f").arg(home.join("haproxy.cfg")));
    eventually("haproxy listens", SOON, || check(TcpStream::connect(at).is_ok(), "it does not"));

    let mut near = Agent::new(&mesh.home, "near");
    near.arguments = vec!["--gateway".to_owned(), gateway.to_string()];
    mesh.found_with(near);
    let mut far = Agent::new(&mesh.home, "far");
    let expose = |name: &str, protocol: &str| {
        format!(
            "[[expose]]\nname = \"{name}\"\nto = \"{at}\"\nprotocol = \"{protocol}\"\n\
             proxy_protocol = \"v2\"\n"
        )
    };
    let config = home.join("far.toml");
    fs::write(&config, expose("web", "http") + &expose("raw", "tcp")).unwrap();
    let own = free_address();
    far.arguments = vec!["-c".to_owned(), config.display().to_string()];
    far.arguments.extend(["--gateway".to_owned(), own.to_string()]);
    let token = mesh.invite(1);
    mesh.join_with(far, &token);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let cases = [(near, gateway), (far, own)];
    for (caller, gateway) in cases {
        caller.wait_endpoints("web", 1);
        caller.wait_endpoints("raw", 1);
        let proxy = format!("http://{gateway}");
        for (service, way) in [("web", &[][..]), ("raw", &["-p"])] {
            let url = format!("http://{service}.mesh/");
            let arguments = [&["-f", "-x", &proxy, &url, &url], way].concat();
            let told = curl(&arguments).ok();
            let one = format!("{} to {} for {service}", caller.mesh, at.port());
            assert_eq!(told, one.repeat(2), "{} asks", caller.name);
        }
    }
}

#[test]
fn an_upgraded_connection_over_tls_carries_all_bytes_both_ways() {
    let _turn = beside_others();
    let ingress = Ingress::new();
    ingress.mesh.offer("web", "http", switching());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ingress.authority.certificate.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let long = "0123456789".repeat(200_000).into_bytes();
    let sent = long.clone();
    let heard = runtime().block_on(async move {
        let stream = tokio::net::TcpStream::connect(ingress.public).await.unwrap();
        let name = "shop.example.com".try_into().unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let (mut reader, mut writer) = split(connector.connect(name, stream).await.unwrap());
        let request = b"GET / HTTP/1.1\r\nhost: shop.example.com\r\nconnection: upgrade\r\n\
                        upgrade: echo\r\n\r\n";
        writer.write_all(request).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(reader.read_u8().await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        let write = async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let read = async {
            let mut heard = Vec::new();
            reader.read_to_end(&mut heard).await.unwrap(); // a cut TLS connection is an error here
            heard
        };
        tokio::join!(write, read).1
    });
    assert!(heard == long, "{} of {} bytes", heard.len(), long.len());
}

/// An application that agrees to speak something else: it sends back what it gets.
fn switching() -> SocketAddr {
    let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            runtime().spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                               upgrade: echo\r\n\r\n";
                stream.write_all(answer).await?;
                let (mut reader, mut writer) = stream.split();
                tokio::io::copy(&mut reader, &mut writer).await?;
                writer.shutdown().await
            });
        }
    });
    address
}
