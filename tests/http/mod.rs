//! HTTP between real programs, across two agents: what a client and an instance see of each other.

mod client;
mod draining;
mod failures;
mod grpc;
pub mod instance;
mod limits;
mod load;
mod requests;
mod slow_clients;
mod streaming;
mod upgrades;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{
    Agent, Program, Ran, SOON, TestMesh, check, eventually, find, free_address, run_program, skip,
};
use client::Client;
use instance::Instance;

/// A client of HTTP/2 that does what it is told, and what it needs.
const H2_CLIENT: &str = include_str!("h2_client.py");
const H2: &str = "h2==4.3.0";

/// A caller's agent `a` with an entry, and `b` in front of the instances of the service `web`.
struct Stage {
    mesh: TestMesh,
    entry: SocketAddr,
}

impl Stage {
    /// With an instance at each of these addresses, which speak `protocol`.
    #[track_caller]
    fn of(protocol: &str, instances: &[SocketAddr]) -> Self {
        let mesh = TestMesh::of(&["a", "b"]);
        let (a, b) = (mesh.agent("a"), mesh.agent("b"));
        for (number, address) in instances.iter().enumerate() {
            let (id, address) = (format!("web-{number}"), address.to_string());
            b.run(&["expose", "web", &address, "--id", &id, "--protocol", protocol]).ok();
        }
        a.wait_endpoints("web", instances.len());
        let entry = a.upstream("web");
        Self { mesh, entry }
    }

    fn a(&self) -> &Agent {
        self.mesh.agent("a")
    }

    fn b(&self) -> &Agent {
        self.mesh.agent("b")
    }

    /// From now on the entry is one that is balanced like this.
    #[track_caller]
    fn balance(&mut self, balance: &str) {
        self.entry = free_address();
        let listen = self.entry.to_string();
        self.a().run(&["upstream", "web", &listen, "--balance", balance]).ok();
    }

    fn client(&self) -> Client {
        Client::to(self.entry).expect("the entry accepts")
    }

    /// The exchanges that the caller's agent counted with this outcome.
    fn exchanges(&self, outcome: &str) -> f64 {
        let outcome = format!("outcome=\"{outcome}\"");
        self.a().metric("murmesh_requests_total", &["direction=\"outbound\"", &outcome])
    }
}

/// One instance behind two agents.
fn stage() -> (Stage, Instance) {
    let instance = Instance::start("web");
    (Stage::of("http", &[instance.address]), instance)
}

/// A server in Python, as a program of its own.
struct PythonServer {
    address: SocketAddr,
    log: PathBuf,
    program: Program,
}

impl PythonServer {
    /// Runs `script`, whose last argument is the port, and waits until it has said something.
    #[track_caller]
    fn start(python: &Path, home: &Path, script: &str, arguments: &[&str]) -> Self {
        let address = free_address();
        let log = home.join(format!("python-{}.log", address.port()));
        let mut command = Command::new(python);
        command.args(["-c", script]).args(arguments).arg(address.port().to_string());
        let server = Self { address, program: Program::start_logged(&mut command, &log), log };
        server.wait_for("");
        server
    }

    /// Asks it to stop in order.
    fn stop(&self) {
        let id = i32::try_from(self.program.id()).expect("a process id");
        let id = rustix::process::Pid::from_raw(id).expect("a process id");
        rustix::process::kill_process(id, rustix::process::Signal::TERM).expect("our own child");
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until its log has a line that contains `word`.
    #[track_caller]
    fn wait_for(&self, word: &str) {
        eventually(&format!("the server says {word:?}"), SOON, || {
            let log = self.log();
            check(log.lines().any(|line| line.contains(word)), log)
        });
    }
}

/// Runs a client in Python to its end, and returns what it printed.
#[track_caller]
fn run_python(python: &Path, script: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(python);
    run_program(command.args(["-c", script]).args(arguments), b"", 2 * SOON).ok()
}

/// The real one, or a word that it is missing.
fn curl() -> Option<PathBuf> {
    let curl = find("curl");
    if curl.is_none() {
        skip("curl is not installed");
    }
    curl
}

/// Runs curl with these arguments, silent but for what it got.
#[track_caller]
fn run_curl(curl: &PathBuf, arguments: &[&str]) -> Ran {
    run_program(Command::new(curl).args(["-sS", "--max-time", "30"]).args(arguments), b"", SOON)
}
