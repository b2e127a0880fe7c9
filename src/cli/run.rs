//! `agent`: runs until it is told to stop.

use std::convert::Infallible;
use std::fmt::Display;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Global;
use super::demo::end_with_parent;
use super::exit::{Exit, Failure, Outcome};
use super::found::store_failure;
use super::notify::{self, notify};
use crate::agent::{Agent, StartError, Stopped};
use crate::api::{ADDRESS_FILE, Control, ControlError, ExposeSpec, UpstreamSpec};
use crate::config::{
    DRAIN_DEADLINE, Origin, Overrides, Seed, Setting, Settings, load, mesh_address,
};
use crate::model::{MemberPhase, Target};
use crate::telemetry::{self, LineQueue, Log};

/// How long the end waits for whoever reads what the agent said.
const FLUSH_TIME_MAX: Duration = Duration::from_secs(1);

/// Arguments of `agent`.
#[derive(Debug, Default, Args)]
pub(super) struct AgentArgs {
    /// The configuration file; none is needed
    #[arg(short, long, value_name = "FILE", env = "MURMESH_CONFIG")]
    pub(super) config: Option<PathBuf>,
    /// Where the mesh port is bound
    #[arg(long, value_name = "ADDR", value_parser = mesh_address)]
    mesh: Option<SocketAddr>,
    /// A member to ask first; may be repeated
    #[arg(long = "seed", value_name = "HOST:PORT")]
    seeds: Vec<Seed>,
    /// Offer an instance: web=127.0.0.1:8080; may be repeated
    #[arg(long = "expose", value_name = "NAME=ADDR", value_parser = expose)]
    exposes: Vec<ExposeSpec>,
    /// Open a local entry: db=127.0.0.1:5432; may be repeated
    #[arg(long = "upstream", value_name = "NAME=LISTEN", value_parser = upstream)]
    upstreams: Vec<UpstreamSpec>,
    /// Offer all services by name to this machine's HTTP clients
    #[arg(long, value_name = "ADDR")]
    gateway: Option<String>,
    /// Offer SOCKS5 to this machine's applications
    #[arg(long, value_name = "ADDR")]
    socks: Option<String>,
}

impl AgentArgs {
    /// An agent that is told nothing but its configuration file.
    pub(super) fn with_config(config: Option<PathBuf>) -> Self {
        Self { config, ..Self::default() }
    }
}

fn expose(text: &str) -> Result<ExposeSpec, String> {
    let (name, to) = text.split_once('=').ok_or("expected NAME=ADDR, for instance web=8080")?;
    let name = name.parse().map_err(|error: crate::model::NameError| error.to_string())?;
    let to = to.parse().map_err(|error: crate::model::TargetError| error.to_string())?;
    ExposeSpec::new(name, to).map_err(|error| error.to_string())
}

fn upstream(text: &str) -> Result<UpstreamSpec, String> {
    let (service, listen) =
        text.split_once('=').ok_or("expected NAME=LISTEN, for instance db=127.0.0.1:5432")?;
    let service = service.parse().map_err(|error: crate::model::NameError| error.to_string())?;
    let listen = listen.parse().map_err(|error: crate::model::TargetError| error.to_string())?;
    UpstreamSpec::new(service, listen).check().map_err(|error| error.to_string())
}

/// What flags and environment say.
pub(super) fn overrides(global: &Global, args: &AgentArgs) -> Overrides {
    let origin =
        |is_env: bool, env, flag| if is_env { Origin::Env(env) } else { Origin::Flag(flag) };
    Overrides {
        config: args.config.clone(),
        data_dir: global.data_dir.clone().map(|path| {
            Setting::new(path, origin(global.data_dir_is_env, "MURMESH_DATA_DIR", "--data-dir"))
        }),
        mesh: args.mesh,
        api: global
            .api
            .clone()
            .map(|api| Setting::new(api, origin(global.api_is_env, "MURMESH_API", "--api"))),
        gateway: args.gateway.clone(),
        socks: args.socks.clone(),
        seeds: args.seeds.clone(),
        exposes: args.exposes.clone(),
        upstreams: args.upstreams.clone(),
    }
}

/// Runs an agent. The exit code says whether the drain completed.
pub(super) async fn agent(global: &Global, args: AgentArgs) -> Outcome {
    end_with_parent();
    let settings = load(&overrides(global, &args)).map_err(Failure::failed)?;
    let voice = Voice::start(&settings)?;
    let exit = run(settings, &voice).await.unwrap_or_else(|failure| {
        voice.note(&failure);
        failure.exit
    });
    voice.flush();
    Ok(exit)
}

/// What an agent says. None of it blocks: whoever stops reading must not stop the agent.
struct Voice {
    out: LineQueue,
    log: Log,
}

impl Voice {
    fn start(settings: &Settings) -> Result<Self, Failure> {
        let log = telemetry::init_logging(&settings.log.value, settings.log_format.value)
            .map_err(Failure::failed)?;
        let out = LineQueue::start("stdout", std::io::stdout()).map_err(Failure::failed)?;
        Ok(Self { out, log })
    }

    fn line(&self, text: impl Display) {
        self.out.push(format!("{text}\n").as_bytes());
    }

    fn note(&self, text: impl Display) {
        self.log.lines().push(format!("{text}\n").as_bytes());
    }

    /// Gives whoever reads some time to have it all; the end waits no longer.
    fn flush(&self) {
        self.out.flush(FLUSH_TIME_MAX);
        self.log.lines().flush(FLUSH_TIME_MAX);
    }
}

async fn run(settings: Settings, voice: &Voice) -> Outcome {
    let (mut signals, mut hangups) = (Signals::new()?, watch(SignalKind::hangup())?);
    let dir = settings.data_dir.value.clone();
    let start = start_line(&settings);
    let agent = Agent::start(settings).await.map_err(start_failure)?;
    agent.show_log(voice.log.clone());
    voice.line(format_args!(
        "murmesh {} runs as {} of mesh {}: mesh {} (udp), api {}{start}",
        env!("CARGO_PKG_VERSION"),
        agent.credentials().name(),
        agent.credentials().mesh().short(),
        agent.mesh_address(),
        match agent.api_address() {
            Target::Tcp(address) => format!("http://{address}"),
            socket => socket.to_string(),
        },
    ));
    let mut is_told = false;
    let phase = loop {
        tokio::select! {
            biased;
            () = signals.received() => break Some(MemberPhase::Restarting),
            phase = agent.stopping() => break match phase {
                MemberPhase::Left => Some(MemberPhase::Left),
                _ => None, // a part of it failed
            },
            never = reload_on(&mut hangups, &agent) => match never {},
            () = agent.ready(), if !is_told => {
                is_told = true;
                notify(notify::READY);
            }
        }
    };
    notify(notify::STOPPING);
    info!(deadline = ?DRAIN_DEADLINE, "stopping: open connections may end");
    voice.note("stopping; once more stops at once");
    let is_failed = phase.is_none();
    let (phase, cut) = (phase.unwrap_or(MemberPhase::Restarting), CancellationToken::new());
    let stop = agent.stop_or_cut(phase, DRAIN_DEADLINE, cut.cancelled());
    tokio::pin!(stop);
    let stopped = loop {
        tokio::select! {
            biased;
            stopped = &mut stop => break Some(stopped),
            () = signals.received() => {
                if cut.is_cancelled() {
                    break None; // a third time: not even the goodbye
                }
                cut.cancel();
            }
        }
    };
    if let Err(error) = std::fs::remove_file(dir.file(ADDRESS_FILE)) {
        warn!(%error, "the API's address file stays behind");
    }
    match (is_failed, stopped) {
        (true, _) => Err(Failure::failed("a part of the agent failed; its log says which")),
        (_, Some(Stopped::Drained)) => Ok(Exit::Ok),
        (_, Some(Stopped::Cut)) if !cut.is_cancelled() => {
            voice.note("connections that were still open at the deadline were cut");
            Ok(Exit::Warning)
        }
        (_, Some(Stopped::Cut) | None) => {
            voice.note("stopped at once; open connections were cut");
            Ok(Exit::Warning)
        }
    }
}

/// Watched from now on: it ends the process no more, also while nobody looks.
fn watch(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::failed(format!("cannot watch for signals: {error}")))
}

/// Reads the files again whenever somebody asks for it; the agent logs what that came to.
async fn reload_on(hangups: &mut Signal, agent: &Agent) -> Infallible {
    while hangups.recv().await.is_some() {
        if let Err(ControlError::Busy) = agent.ask(|reply| Control::Reload { reply }).await {
            warn!("too many commands wait: the files were not read again");
        }
    }
    std::future::pending().await
}

/// What tells an agent to stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, Failure> {
        let (terminate, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
        Ok(Self { terminate: watch(terminate)?, interrupt: watch(interrupt)? })
    }

    /// Returns when one arrives. Cancel safe.
    async fn received(&mut self) {
        tokio::select! { _ = self.terminate.recv() => {}, _ = self.interrupt.recv() => {} }
    }
}

fn start_line(settings: &Settings) -> String {
    let doors = [("gateway http", settings.gateway.value), ("socks5h", settings.socks.value)];
    let open = doors.iter().filter_map(|(scheme, door)| Some((scheme, (*door)?)));
    open.map(|(scheme, door)| format!(", {scheme}://{door}")).collect()
}

fn start_failure(error: StartError) -> Failure {
    match error {
        StartError::Store(error) => store_failure(error),
        error => Failure::failed(error),
    }
}
