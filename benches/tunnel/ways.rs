//! The ways from client to server that are compared.

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

/// One way from client to server.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    /// Where the client connects.
    pub(crate) entry: SocketAddr,
    agents: Vec<Killed>,
    _server: Option<Killed>,
}

/// A process that ends with its owner.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it ended by itself
        let _ = self.0.wait();
    }
}

impl Way {
    /// Microseconds that the agents of this way have spent on a CPU so far, all threads together.
    pub(crate) fn cpu_us(&self) -> Result<f64, Box<dyn Error>> {
        let mut nanos = 0.0;
        for agent in &self.agents {
            for task in fs::read_dir(format!("/proc/{}/task", agent.0.id()))? {
                let schedstat = fs::read_to_string(task?.path().join("schedstat"))?;
                nanos += schedstat.split(' ').next().unwrap_or("0").parse::<f64>()?;
            }
        }
        Ok(nanos / 1_000.0)
    }
}

/// All ways that this machine can go, to one server.
pub(crate) fn ways(directory: &Path) -> Result<Vec<Way>, Box<dyn Error>> {
    let (server, backend) = server()?;
    let mut ways =
        vec![Way { name: "direct", entry: backend, agents: Vec::new(), _server: Some(server) }];
    ways.push(murmesh(directory, backend)?);
    if Command::new("haproxy").arg("-v").stdout(Stdio::null()).status().is_ok() {
        ways.push(haproxy(directory, backend)?);
    }
    Ok(ways)
}

fn server() -> Result<(Killed, SocketAddr), Box<dyn Error>> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut child = command.args(["--role", "server"]).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().ok_or("server without output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    Ok((Killed(child), line.trim().parse()?))
}

/// Two agents of a new mesh: `a` with an upstream, `b` with the instance.
fn murmesh(directory: &Path, backend: SocketAddr) -> Result<Way, Box<dyn Error>> {
    let binary = binary()?;
    let (entry, mesh_a, mesh_b) = (free_tcp()?, free_udp()?, free_udp()?);
    // What the user of this machine has set up for murmesh is not what is measured.
    let config = directory.join("empty.toml");
    fs::write(&config, "")?;
    let run = |data: &str, arguments: &[&str]| -> Result<Command, Box<dyn Error>> {
        let mut command = Command::new(&binary);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MURMESH_") {
                command.env_remove(name);
            }
        }
        command.env("MURMESH_CONFIG", &config);
        command.arg(arguments[0]).arg("--data-dir").arg(directory.join(data));
        command.args(&arguments[1..]);
        Ok(command)
    };
    let listen = |name: &str, mesh: SocketAddr| {
        let mesh = mesh.to_string();
        ["--name", name, "--mesh", &mesh, "--advertise", &mesh].map(str::to_owned)
    };
    succeed(run("a", &["init"])?.args(listen("a", mesh_a)))?;
    let api_a = free_tcp()?.to_string();
    let a = run("a", &["agent", "--api", &api_a])?
        .args(["--upstream", &format!("web={entry}")])
        .spawn()?;
    let a = Killed(a);
    let token = succeed(run("a", &["invite"])?.args(["--api", &api_a]))?;
    succeed(run("b", &["join", token.trim()])?.args(listen("b", mesh_b)))?;
    let api_b = free_tcp()?.to_string();
    let b = run("b", &["agent", "--api", &api_b])?
        .args(["--expose", &format!("web={backend}")])
        .spawn()?;
    let way = Way { name: "murmesh", entry, agents: vec![a, Killed(b)], _server: None };
    until_it_answers(&way)?;
    Ok(way)
}

/// The binary that users get.
fn binary() -> Result<PathBuf, Box<dyn Error>> {
    if let Some(binary) = std::env::var_os("MURMESH_BENCH_BINARY") {
        return Ok(binary.into());
    }
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    succeed(Command::new(cargo).args(["build", "--profile", "dist", "--bin", "murmesh"]))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into());
    Ok(Path::new(&target).join("dist/murmesh"))
}

/// Two HAProxies with one thread each and mutual TLS 1.3 between them.
fn haproxy(directory: &Path, backend: SocketAddr) -> Result<Way, Box<dyn Error>> {
    let directory = directory.join("haproxy");
    fs::create_dir(&directory)?;
    certificates(&directory)?;
    let (entry, between) = (free_tcp()?, free_tcp()?);
    let files = directory.display();
    let tls = format!(
        "ssl crt {files}/node.pem ca-file {files}/ca.pem verify required ssl-min-ver TLSv1.3"
    );
    let a = haproxy_with(
        &directory,
        "a",
        &format!("bind {entry}"),
        &format!("server b {between} {tls}"),
    )?;
    let b = haproxy_with(
        &directory,
        "b",
        &format!("bind {between} {tls}"),
        &format!("server web {backend}"),
    )?;
    let way = Way { name: "haproxy", entry, agents: vec![a, b], _server: None };
    until_it_answers(&way)?;
    Ok(way)
}

fn haproxy_with(
    directory: &Path,
    name: &str,
    bind: &str,
    server: &str,
) -> Result<Killed, Box<dyn Error>> {
    let path = directory.join(format!("{name}.cfg"));
    let mut file = fs::File::create(&path)?;
    writeln!(
        file,
        "global\n log stderr local0 emerg\n nbthread 1\n maxconn 8000\n tune.ssl.default-dh-param 2048"
    )?;
    writeln!(
        file,
        "defaults\n log global\n mode tcp\n timeout connect 5s\n timeout client 1m\n timeout server 1m"
    )?;
    writeln!(file, "frontend in\n {bind}\n default_backend out\nbackend out\n {server}")?;
    Ok(Killed(Command::new("haproxy").arg("-db").arg("-f").arg(path).spawn()?))
}

/// A root and one P-256 certificate below it, for both sides.
fn certificates(directory: &Path) -> Result<(), Box<dyn Error>> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "benchmark root"); // OpenSSL wants them to differ
    let root = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let node = CertificateParams::new(vec!["node".to_owned()])?.signed_by(&key, &root)?;
    fs::write(directory.join("ca.pem"), root.pem())?;
    fs::write(directory.join("node.pem"), node.pem() + &key.serialize_pem())?;
    Ok(())
}

fn succeed(command: &mut Command) -> Result<String, Box<dyn Error>> {
    let output = command.stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        return Err(format!("{command:?} failed").into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn until_it_answers(way: &Way) -> Result<(), Box<dyn Error>> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Ok(outcome) =
            super::run_load(super::Kind::Requests { connections: 1 }, way.entry, 10)
            && outcome.count > 0
        {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{} does not answer at {}", way.name, way.entry).into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn free_tcp() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

fn free_udp() -> std::io::Result<SocketAddr> {
    UdpSocket::bind("127.0.0.1:0")?.local_addr()
}
