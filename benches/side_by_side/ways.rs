//! The ways from client to server that are compared.

use std::error::Error;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::load::Kind;
use super::ports::free_address;
use super::process::{Client, Place, Process, forwarder, log, server, succeed, target, until};
use super::proxies::{Carries, Proxy, Side};
use super::strangers::{self, Identities};

/// The two that are always there.
pub(crate) const DIRECT: &str = "direct";
pub(crate) const MURMESH: &str = "murmesh";
/// The least that can lie between: what any proxy of connections costs on this machine.
pub(crate) const ONE_HOP: &str = "one hop, no TLS";
/// murmesh that carries the same requests as bytes.
pub(crate) const TUNNEL: &str = "murmesh, tcp";

/// murmesh that watches nobody: no breaker of its own, and nothing told to others or heard of them. Its
/// metrics are on, as they always are, so that their cost is in both.
pub(crate) const UNWATCHED: &str = "murmesh, no breaker";

/// How long a way may take until it answers.
const START_MAX: Duration = Duration::from_secs(20);

/// What packets between the agents may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    /// 65,536 bytes.
    Loopback,
    /// [`NARROW_MTU`].
    Narrow,
}

/// Leaves 1,452 bytes to a UDP datagram over IPv4: what most paths of the Internet carry.
const NARROW_MTU: u16 = 1_480;

/// The ways over one kind of link, to one server.
pub(crate) struct Stage {
    pub(crate) link: Link,
    pub(crate) ways: Vec<Way>,
    pub(crate) server: Process,
    /// Outlives what runs in it.
    pub(crate) place: Place,
}

impl Stage {
    pub(crate) fn new(
        link: Link,
        carries: Carries,
        proxies: &[Proxy],
        directory: &Path,
    ) -> Result<Self, Box<dyn Error>> {
        let place = match link {
            Link::Loopback => Place::here(),
            Link::Narrow => Place::with_mtu("narrow", NARROW_MTU)?,
        };
        let (server, backend) = server(&place)?;
        let directory = directory.join(format!("{link:?}"));
        let mut ways =
            vec![Way::direct(backend), Way::murmesh(&place, &directory, carries, backend, "mesh")?];
        if carries == Carries::Http {
            for (name, carries, scope) in
                [(TUNNEL, Carries::Bytes, "mesh"), (UNWATCHED, Carries::Http, "off")]
            {
                let directory = directory.join(name);
                let way = Way::murmesh(&place, &directory, carries, backend, scope)?;
                ways.push(Way { name, ..way });
            }
        }
        if carries == Carries::Bytes && place.is_here() {
            let (agent, entry) = forwarder(&place, backend)?;
            let (agents, apis) = (vec![agent], Vec::new());
            ways.push(Way { name: ONE_HOP, entry, agents, apis });
        }
        for proxy in proxies.iter().filter(|proxy| link == Link::Loopback || proxy.name == "envoy")
        {
            let way = Way::proxied(&place, proxy, carries, &directory, backend);
            ways.push(way.map_err(|error| format!("{}: {error}", proxy.name))?);
        }
        Ok(Self { link, ways, server, place })
    }
}

/// One way from client to server.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    /// Where the client connects.
    pub(crate) entry: SocketAddr,
    /// The client's side, and the server's; none on the direct way.
    pub(crate) agents: Vec<Process>,
    /// Where an agent of murmesh tells its metrics.
    pub(crate) apis: Vec<SocketAddr>,
}

impl Way {
    /// The server itself.
    pub(crate) fn direct(server: SocketAddr) -> Self {
        Self { name: DIRECT, entry: server, agents: Vec::new(), apis: Vec::new() }
    }

    /// Two agents of a new mesh, after those of another one turned strangers away. `breaker` is the scope
    /// of the caller's.
    pub(crate) fn murmesh(
        place: &Place,
        directory: &Path,
        carries: Carries,
        server: SocketAddr,
        breaker: &str,
    ) -> Result<Self, Box<dyn Error>> {
        let start = |directory: &Path| -> Result<_, Box<dyn Error>> {
            let pair = Pair::new(place, directory)?;
            let agents = vec![pair.caller(breaker)?, pair.callee(server, carries)?];
            let apis = pair.api.to_vec();
            let way = Self { name: MURMESH, entry: pair.entry, agents, apis };
            way.until_it_answers(place, carries)?;
            Ok((pair, way))
        };
        if place.is_here() && carries == Carries::Bytes {
            let (pair, mut way) = start(&directory.join("proof"))?;
            strangers::knock_at_murmesh(&pair)?;
            way.agents.pop();
            strangers::pose_as_murmesh(&pair)?;
        }
        Ok(start(directory)?.1)
    }

    /// Two proxies with mutual TLS between them, after strangers were turned away from both.
    pub(crate) fn proxied(
        place: &Place,
        proxy: &Proxy,
        carries: Carries,
        directory: &Path,
        server: SocketAddr,
    ) -> Result<Self, Box<dyn Error>> {
        let directory = directory.join(proxy.name);
        fs::create_dir_all(&directory)?;
        let identities = Identities::new(&directory)?;
        let (entry, between) = (free_address(), free_address());
        let start = |side, listen, connect| {
            Process::spawn(&mut proxy.command(place, &directory, carries, side, listen, connect)?)
        };
        let mut way = Self { name: proxy.name, entry, agents: Vec::new(), apis: Vec::new() };
        way.agents.push(start(Side::Client, entry, between)?);
        // The certificates and who checks them are the same whatever is carried.
        let is_checked = place.is_here() && carries == Carries::Bytes;
        if is_checked {
            strangers::pose_as_proxy(entry, between, &identities)?;
        }
        way.agents.push(start(Side::Server, between, server)?);
        way.until_it_answers(place, carries)?;
        if is_checked {
            strangers::knock_at_proxy(between, &identities)?;
        }
        Ok(way)
    }

    /// Microseconds that the agents of this way have spent on a CPU so far.
    pub(crate) fn cpu_us(&self) -> io::Result<f64> {
        self.agents.iter().map(Process::cpu_us).sum()
    }

    fn until_it_answers(&self, place: &Place, carries: Carries) -> Result<(), Box<dyn Error>> {
        let once = match carries {
            Carries::Bytes => Kind::Idle { connections: 1 },
            Carries::Http => Kind::Http { connections: 1 },
        };
        until(&format!("an answer through {}", self.name), START_MAX, || {
            Client::open(place, once, self.entry, Duration::ZERO)?.run().map(drop)
        })
    }
}

/// A mesh of two: `a` with an upstream, `b` with the instance.
pub(crate) struct Pair<'a> {
    place: &'a Place,
    binary: PathBuf,
    pub(crate) directory: PathBuf,
    pub(crate) entry: SocketAddr,
    /// Where the agents hear their peers.
    pub(crate) mesh: [SocketAddr; 2],
    api: [SocketAddr; 2],
}

impl<'a> Pair<'a> {
    fn new(place: &'a Place, directory: &Path) -> Result<Self, Box<dyn Error>> {
        let pair = Self {
            place,
            binary: binary()?,
            directory: directory.to_path_buf(),
            entry: free_address(),
            mesh: [free_address(), free_address()],
            api: [free_address(), free_address()],
        };
        fs::create_dir_all(directory)?;
        succeed(pair.run("a", &["init"]).args(listen("a", pair.mesh[0])))?;
        Ok(pair)
    }

    /// A command on the data directory `data`.
    ///
    /// What the user of this machine has set up for murmesh is not what is measured.
    pub(crate) fn run(&self, data: &str, arguments: &[&str]) -> Command {
        let mut command = murmesh_command(self.place, &self.binary);
        command.args(arguments).arg("--data-dir").arg(self.directory.join(data));
        command
    }

    fn caller(&self, breaker: &str) -> Result<Process, Box<dyn Error>> {
        let file = self.directory.join("caller.toml");
        let upstream = format!(
            "[[upstream]]\nservice = \"web\"\nlisten = \"{}\"\nbreaker = {{ scope = \"{breaker}\" }}\n",
            self.entry
        );
        fs::write(&file, upstream)?;
        self.agent("a", 0, &["--config", &file.to_string_lossy()])
    }

    fn callee(&self, server: SocketAddr, carries: Carries) -> Result<Process, Box<dyn Error>> {
        self.join("b", self.mesh[1])?;
        let agent = self.agent("b", 1, &[])?;
        let protocol = if carries == Carries::Http { "http" } else { "tcp" };
        let (server, api) = (server.to_string(), self.api[1].to_string());
        until("the agent of the instance", START_MAX, || {
            let expose = ["expose", "web", &server, "--protocol", protocol, "--api", &api];
            succeed(&mut self.run("b", &expose)).map(drop)
        })?;
        Ok(agent)
    }

    /// Enrols `name`, while the caller runs.
    pub(crate) fn join(&self, name: &str, mesh: SocketAddr) -> Result<(), Box<dyn Error>> {
        let token = until("an invite", START_MAX, || {
            succeed(self.run("a", &["invite"]).args(["--api", &self.api[0].to_string()]))
        })?;
        succeed(self.run(name, &["join", token.trim()]).args(listen(name, mesh))).map(drop)
    }

    fn agent(&self, name: &str, at: usize, with: &[&str]) -> Result<Process, Box<dyn Error>> {
        let log = log(&format!("murmesh-{name}"))?;
        let mut command = self.run(name, &["agent", "--api", &self.api[at].to_string()]);
        Process::spawn(command.args(with).stdout(log.try_clone()?).stderr(log))
    }
}

/// `murmesh` with no settings but those of its arguments.
pub(crate) fn murmesh_command(place: &Place, binary: &Path) -> Command {
    let mut command = place.command(binary);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MURMESH_") {
            command.env_remove(name);
        }
    }
    command.env("MURMESH_CONFIG", "/dev/null");
    command
}

fn listen(name: &str, mesh: SocketAddr) -> [String; 6] {
    let mesh = mesh.to_string();
    ["--name", name, "--mesh", &mesh, "--advertise", &mesh].map(str::to_owned)
}

/// The binary that users get.
pub(crate) fn binary() -> Result<PathBuf, Box<dyn Error>> {
    if let Some(binary) = std::env::var_os("MURMESH_BENCH_BINARY") {
        return Ok(binary.into());
    }
    let cargo = std::env::var_os("CARGO").unwrap_or("cargo".into());
    succeed(Command::new(cargo).args(["build", "--profile", "dist", "--bin", "murmesh"]))?;
    Ok(target().join("dist/murmesh"))
}
