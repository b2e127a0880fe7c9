//! Three agents as processes of their own, in a directory that goes when the demo goes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use hyper::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncWriteExt;
use tokio::time::{sleep, timeout};

use super::DemoError;
use super::fetch::fetch;
use crate::runtime::entropy;

/// Makes an agent end with the demo, however the demo ends; see [`end_with_parent`].
const END_WITH_PARENT: &str = "MURMESH_END_WITH_PARENT";
/// Longest wait for a command of the demo, and for an agent to be ready. Both take well below a
/// second on an idle machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// Longest wait for an agent that was asked to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks at something that takes a moment.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Ports are looked for here: below those that systems give to outgoing connections, one of which
/// could otherwise sit on an agent's port while that agent is down.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
const PORT_TRIES_MAX: usize = 1_000;
/// How much of a log is shown when its agent has ended.
const LOG_TAIL_LINES: usize = 8;

/// A directory of the demo's own, removed with all that is in it.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Result<Self, DemoError> {
        let random = u32::from_le_bytes(entropy::random_bytes()?);
        let path = std::env::temp_dir().join(format!("murmesh-demo-{random:08x}"));
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|error| DemoError::io("create", &path, error))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "cannot remove the demo's directory");
        }
    }
}

/// Ports of this machine that nobody uses, each given out once.
#[derive(Default)]
pub(super) struct Ports(Vec<u16>);

impl Ports {
    /// A port that is free for TCP and UDP now.
    pub(super) fn take(&mut self) -> Result<SocketAddr, DemoError> {
        for _ in 0..PORT_TRIES_MAX {
            let random = u16::from_le_bytes(entropy::random_bytes()?);
            let port = PORTS.start + random % (PORTS.end - PORTS.start);
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            let is_free = || TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok();
            if !self.0.contains(&port) && is_free() {
                self.0.push(port);
                return Ok(address);
            }
        }
        Err(DemoError::NoPort)
    }
}

/// A process that never outlives its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already, which is just as well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One agent: what it is started with, and its process while it runs.
pub(super) struct Agent {
    pub(super) name: &'static str,
    /// Of its UDP port.
    pub(super) mesh: SocketAddr,
    /// Of its local API.
    pub(super) api: SocketAddr,
    /// Its data directory.
    pub(super) data_dir: PathBuf,
    binary: PathBuf,
    config: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    process: Option<Process>,
}

impl Agent {
    /// An agent that is not enrolled and does not run. `arguments` of `murmesh agent` beside
    /// addresses and directories, `settings` of its file.
    pub(super) fn new(
        name: &'static str,
        binary: &Path,
        scratch: &Scratch,
        ports: &mut Ports,
        arguments: Vec<String>,
        settings: String,
    ) -> Result<Self, DemoError> {
        let config = scratch.path().join(format!("{name}.toml"));
        // A crash is to be seen within seconds, and agents' logs are only read when something fails.
        let text = format!("[join]\nprofile = \"local\"\n{settings}");
        fs::write(&config, text).map_err(|error| DemoError::io("write", &config, error))?;
        Ok(Self {
            name,
            mesh: ports.take()?,
            api: ports.take()?,
            data_dir: scratch.path().join(name),
            binary: binary.to_owned(),
            config,
            log: scratch.path().join(format!("{name}.log")),
            arguments,
            process: None,
        })
    }

    /// Its process, while it runs.
    pub(super) fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.0.id())
    }

    /// Runs `murmesh VERB ..` for this agent's data directory to its end; returns what it printed.
    pub(super) async fn command(
        &self,
        arguments: &[&str],
        input: &str,
    ) -> Result<String, DemoError> {
        let verb = arguments.first().copied().unwrap_or_default();
        let failed = |what: String| DemoError::Command { verb: verb.to_owned(), what };
        let run = async {
            let mut command = clean(&self.binary);
            command.args(arguments).arg("--data-dir").arg(&self.data_dir);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut command = tokio::process::Command::from(command);
            let mut child = command.kill_on_drop(true).spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                match stdin.write_all(input.as_bytes()).await {
                    // It does not read, or has ended and will say why.
                    Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                    _ => {}
                }
            }
            child.wait_with_output().await
        };
        let ended = timeout(PATIENCE, run).await;
        let ended = ended.map_err(|_| failed(format!("it did not end within {PATIENCE:?}")))?;
        let output = ended.map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(failed(format!("{}: {}", output.status, said.trim())));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Founds a mesh with this agent as its first member.
    pub(super) async fn init(&self) -> Result<(), DemoError> {
        let mesh = self.mesh.to_string();
        let arguments = ["init", "--name", self.name, "--mesh", &mesh, "--advertise", &mesh];
        self.command(&arguments, "").await.map(drop)
    }

    /// A token that lets `uses` agents in. Only the founder can make one.
    pub(super) async fn invite(&self, uses: usize) -> Result<String, DemoError> {
        let (api, uses) = (self.api.to_string(), uses.to_string());
        self.command(&["invite", "--uses", &uses, "--api", &api], "").await
    }

    /// Enrols this agent. The token goes through a pipe: arguments are for everybody to see.
    pub(super) async fn join(&self, token: &str) -> Result<(), DemoError> {
        let mesh = self.mesh.to_string();
        let arguments = ["join", "-", "--name", self.name, "--mesh", &mesh, "--advertise", &mesh];
        self.command(&arguments, token).await.map(drop)
    }

    /// Starts the process.
    pub(super) fn start(&mut self) -> Result<(), DemoError> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.and_then(|log| Ok((log.try_clone()?, log)));
        let (out, err): (File, File) =
            log.map_err(|error| DemoError::io("open", &self.log, error))?;
        let (mesh, api) = (self.mesh.to_string(), self.api.to_string());
        let mut command = clean(&self.binary);
        command.arg("agent").arg("-c").arg(&self.config);
        command.arg("--data-dir").arg(&self.data_dir);
        command.args(["--mesh", &mesh, "--api", &api]).args(&self.arguments);
        command.env(END_WITH_PARENT, "1");
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        // Ctrl-C is for the demo alone: it stops its agents itself.
        command.process_group(0);
        let child = command.spawn().map_err(|error| DemoError::Command {
            verb: "agent".to_owned(),
            what: error.to_string(),
        })?;
        self.process = Some(Process(child));
        Ok(())
    }

    /// Returns when the data plane can serve; fails when the process ends instead.
    pub(super) async fn ready(&mut self) -> Result<(), DemoError> {
        let ready = timeout(PATIENCE, async {
            loop {
                self.check()?;
                match fetch(self.api, "/ready", PATIENCE).await {
                    Ok(answer) if answer.status == StatusCode::OK => return Ok(()),
                    _ => sleep(LOOK_AGAIN).await,
                }
            }
        });
        ready.await.unwrap_or_else(|_| Err(self.failed(format!("is not ready after {PATIENCE:?}"))))
    }

    /// Fails if the process has ended by itself.
    pub(super) fn check(&mut self) -> Result<(), DemoError> {
        match self.ended() {
            Some(status) => Err(self.failed(format!("has ended ({status})"))),
            None => Ok(()),
        }
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut().and_then(|process| process.0.try_wait().ok().flatten())
    }

    /// Ends the process without a warning, as a crash or a pulled plug would.
    pub(super) fn kill(&mut self) {
        self.process = None;
    }

    /// Asks the process to stop, and insists after a while.
    pub(super) async fn stop(&mut self) {
        if let Some(process) = &self.process {
            // If it has ended already, nobody gets the signal: it was not awaited yet.
            let _ = kill_process(Pid::from_child(&process.0), Signal::TERM);
        }
        let stopped = async {
            while self.process.is_some() && self.ended().is_none() {
                sleep(LOOK_AGAIN).await;
            }
        };
        let _ = timeout(STOP_PATIENCE, stopped).await; // then it is killed
        self.process = None;
    }

    fn failed(&self, what: String) -> DemoError {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(LOG_TAIL_LINES)..).unwrap_or_default();
        DemoError::Agent { name: self.name, what, log: tail.join("\n") }
    }
}

/// A command that nothing but its arguments tells what to do: the user's own mesh is not meant.
fn clean(binary: &Path) -> Command {
    let mut command = Command::new(binary);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MURMESH_") {
            command.env_remove(name);
        }
    }
    command
}

/// Ends this process with the demo that started it, even if the demo is killed and cannot clean up.
/// To be called first by `murmesh agent`; for every other agent it does nothing.
pub(in crate::cli) fn end_with_parent() {
    #[cfg(target_os = "linux")]
    if std::env::var_os(END_WITH_PARENT).is_some() {
        // Without it a killed demo leaves its agents behind, which is untidy and no more.
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_private_and_goes_with_its_owner() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new().unwrap();
        let path = scratch.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(path.join("file"), "x").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn ports_are_given_out_once() {
        let mut ports = Ports::default();
        let taken: std::collections::BTreeSet<_> =
            (0..50).map(|_| ports.take().unwrap().port()).collect();
        assert_eq!(taken.len(), 50);
    }

    #[test]
    fn a_process_is_gone_when_its_owner_is() {
        let process = Process(Command::new("sleep").arg("60").spawn().unwrap());
        let pid = Pid::from_child(&process.0);
        drop(process);
        assert!(rustix::process::test_kill_process(pid).is_err(), "killed and awaited");
    }
}
