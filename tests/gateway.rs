//! The ways in by name: the gateway for this machine's clients.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

use crate::support::{
    Agent, Kind, Ran, SOON, Server, TestMesh, beside_others, find, free_address, run_program,
    runtime, skip,
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
