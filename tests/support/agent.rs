//! One real agent process with its data directory, and questions to it.

use std::fs::{self, File};
use std::io::{PipeReader, Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::http::{At, Response, request};
use super::ports::free_address;
use super::programs::run_program;
use super::{SOON, check, eventually};

/// The end of a command.
#[derive(Clone, Debug)]
pub struct Ran {
    #[allow(dead_code)] // printed when an assertion fails
    pub what: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Asserts that it exited with 0, and returns what it printed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.stdout
    }

    /// Asserts that it failed with `code`, and returns what it complained.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self.stderr
    }
}

/// An agent: a data directory, and a process while it runs. The process is killed on drop; when
/// the test is failing, the end of its log is printed first.
pub struct Agent {
    pub name: String,
    pub data_dir: PathBuf,
    /// Its one UDP port.
    pub mesh: SocketAddr,
    pub api: SocketAddr,
    pub socks: SocketAddr,
    log: PathBuf,
    /// More arguments of `agent`.
    pub arguments: Vec<String>,
    /// The network namespace it runs in; its API is then reached from inside it.
    namespace: Option<String>,
    child: Mutex<Option<Child>>,
    home: Arc<TempDir>,
}

impl Agent {
    /// An agent that has neither identity nor process yet.
    pub fn new(home: &Arc<TempDir>, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            data_dir: home.path().join(name),
            mesh: free_address(),
            api: free_address(),
            socks: free_address(),
            log: home.path().join(format!("{name}.log")),
            arguments: Vec::new(),
            namespace: None,
            child: Mutex::new(None),
            home: Arc::clone(home),
        }
    }

    /// The same inside a network namespace, where its mesh address is `mesh`.
    pub fn in_namespace(
        home: &Arc<TempDir>,
        name: &str,
        namespace: &str,
        mesh: SocketAddr,
    ) -> Self {
        let mut agent = Self::new(home, name);
        agent.namespace = Some(namespace.to_owned());
        agent.mesh = mesh;
        agent
    }

    /// `murmesh` with this agent's environment and nobody else's.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let binary = env!("CARGO_BIN_EXE_murmesh");
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, binary]);
                command
            }
            None => Command::new(binary),
        };
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MURMESH_") {
                command.env_remove(name);
            }
        }
        command
            .args(arguments)
            .env("MURMESH_DATA_DIR", &self.data_dir)
            .env("MURMESH_API", self.api.to_string())
            .env("HOME", self.home.path())
            .env("XDG_CONFIG_HOME", self.home.path().join("config"))
            .env("XDG_DATA_HOME", self.home.path().join("share"));
        command
    }

    /// Runs a command to its end.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> Ran {
        self.run_with(arguments, b"")
    }

    /// The same, with bytes on its standard input.
    #[track_caller]
    pub fn run_with(&self, arguments: &[&str], input: &[u8]) -> Ran {
        run_program(&mut self.command(arguments), input, 2 * SOON)
    }

    /// Starts the process and waits for `/ready`.
    #[track_caller]
    pub fn start(&self) {
        self.spawn();
        self.wait_ready();
    }

    /// Starts the process.
    #[track_caller]
    pub fn spawn(&self) {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        self.spawn_with(log.try_clone().unwrap().into(), log.into());
    }

    /// Starts the process and waits for `/ready`. What it says goes into the pipe that is returned,
    /// and blocks whoever writes it while nobody reads.
    #[track_caller]
    pub fn start_with_pipe(&self) -> PipeReader {
        let (reader, writer) = std::io::pipe().unwrap();
        self.spawn_with(writer.try_clone().unwrap().into(), writer.into());
        self.wait_ready();
        reader
    }

    #[track_caller]
    fn spawn_with(&self, stdout: Stdio, stderr: Stdio) {
        let api = self.api.to_string();
        let (mesh, socks) = (self.mesh.to_string(), self.socks.to_string());
        let mut command =
            self.command(&["agent", "--mesh", &mesh, "--socks", &socks, "--api", &api]);
        command.args(&self.arguments).stdin(Stdio::null());
        command.stdout(stdout).stderr(stderr);
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let earlier = self.child.lock().unwrap().replace(child);
        assert!(earlier.is_none(), "{} runs already", self.name);
    }

    /// Waits until the agent says that it can serve.
    #[track_caller]
    pub fn wait_ready(&self) -> Duration {
        eventually(&format!("{} is ready", self.name), SOON, || {
            if let Some(status) = self.child.lock().unwrap().as_mut().unwrap().try_wait().unwrap() {
                panic!("{} ended with {status}\n{}", self.name, self.log_tail());
            }
            let response = self.try_get("/ready").map_err(|error| error.to_string())?;
            check(response.status == 200, response.status)
        })
    }

    /// Sends a signal. Once `STOP` has returned, no thread of the agent runs.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.lock().unwrap();
        let child = child.as_ref().expect("it runs");
        kill_process(Pid::from_child(child), signal).unwrap();
        if signal == Signal::STOP {
            // The kernel stops each thread when it next looks; until then one may still answer.
            eventually(&format!("{} stands still", self.name), SOON, || {
                let states = thread_states(child.id());
                check(states.chars().all(|state| state == 'T'), states)
            });
        }
    }

    /// SIGKILL, and gone.
    pub fn kill(&self) {
        if let Some(mut child) = self.child.lock().unwrap().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Waits until the process ends by itself.
    #[track_caller]
    pub fn wait_end(&self, limit: Duration) -> ExitStatus {
        let mut child = self.child.lock().unwrap().take().expect("it runs");
        let mut ended = None;
        eventually(&format!("{} ends", self.name), limit, || {
            ended = child.try_wait().unwrap();
            check(ended.is_some(), "it runs")
        });
        ended.unwrap()
    }

    /// SIGTERM, and gone with exit code 0.
    #[track_caller]
    pub fn stop(&self) {
        self.signal(Signal::TERM);
        let status = self.wait_end(SOON);
        assert_eq!(status.code(), Some(0), "{} ended with {status}", self.name);
    }

    /// Where its API listens, seen from here.
    pub fn at(&self) -> At {
        match &self.namespace {
            Some(namespace) => At::Inside(namespace.clone(), self.api),
            None => At::Tcp(self.api),
        }
    }

    /// One GET without credentials.
    pub fn try_get(&self, path: &str) -> std::io::Result<Response> {
        request(&self.at(), "GET", path, &[], b"")
    }

    /// The JSON of one GET.
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        let response = self
            .try_get(path)
            .unwrap_or_else(|error| panic!("GET {path} of {}: {error}", self.name));
        assert_eq!(response.status, 200, "GET {path} of {}: {}", self.name, response.text());
        response.json()
    }

    /// The token of its API.
    pub fn api_token(&self) -> String {
        fs::read_to_string(self.data_dir.join("api.token")).unwrap().trim().to_owned()
    }

    /// Name and state of every member it lists.
    #[track_caller]
    pub fn members(&self) -> Vec<(String, String)> {
        let listed = self.get("/v1/mesh/members");
        let members = listed.as_array().unwrap_or_else(|| panic!("no array: {listed}"));
        let word = |member: &Value, key: &str| member[key].as_str().unwrap_or("?").to_owned();
        members.iter().map(|member| (word(member, "name"), word(member, "state"))).collect()
    }

    /// The state of a member, `absent` when it is not listed.
    #[track_caller]
    pub fn state_of(&self, name: &str) -> String {
        let found = self.members().into_iter().find(|(listed, _)| listed == name);
        found.map_or_else(|| "absent".to_owned(), |(_, state)| state)
    }

    /// Waits until it shows the member in that state.
    #[track_caller]
    pub fn wait_state(&self, name: &str, state: &str, limit: Duration) -> Duration {
        eventually(&format!("{} shows {name} {state}", self.name), limit, || {
            let seen = self.state_of(name);
            check(seen == state, seen)
        })
    }

    /// Waits until it says that the others refuse it.
    #[track_caller]
    pub fn wait_disowned(&self) {
        eventually(&format!("{} knows that it is refused", self.name), SOON, || {
            let ready = self.try_get("/ready").map_err(|error| error.to_string())?;
            check(ready.status == 503 && ready.text().contains("refuse this one"), ready.text())
        });
    }

    /// Waits until it lists exactly `count` members, all alive.
    #[track_caller]
    pub fn wait_alive(&self, count: usize, limit: Duration) -> Duration {
        eventually(&format!("{} shows {count} alive", self.name), limit, || {
            let members = self.members();
            let alive = members.iter().filter(|(_, state)| state == "alive").count();
            check(alive == count && members.len() == count, members)
        })
    }

    /// Puts a service behind this agent.
    #[track_caller]
    pub fn expose(&self, service: &str, to: impl ToString) {
        self.run(&["expose", service, &to.to_string()]).ok();
    }

    /// Opens a local entry to a service on a free port.
    #[track_caller]
    pub fn upstream(&self, service: &str) -> SocketAddr {
        let entry = free_address();
        self.run(&["upstream", service, &entry.to_string()]).ok();
        entry
    }

    /// How many endpoints of a service it would send work to.
    #[track_caller]
    pub fn ready_endpoints(&self, service: &str) -> usize {
        let path = format!("/v1/mesh/endpoints/{service}");
        let Ok(response) = self.try_get(&path) else { return 0 };
        if response.status == 404 {
            return 0;
        }
        let listed = response.json();
        let endpoints = listed.as_array().unwrap_or_else(|| panic!("no array: {listed}"));
        endpoints.iter().filter(|endpoint| endpoint["state"] == "ready").count()
    }

    /// Waits until it would send work to exactly `count` endpoints of a service.
    #[track_caller]
    pub fn wait_endpoints(&self, service: &str, count: usize) -> Duration {
        let what = format!("{} knows {count} ready endpoints of {service}", self.name);
        eventually(&what, SOON, || {
            let ready = self.ready_endpoints(service);
            check(ready == count, ready)
        })
    }

    /// The sum of all series of a metric whose labels contain all of `labels` (`door="enrol"`).
    #[track_caller]
    pub fn metric(&self, name: &str, labels: &[&str]) -> f64 {
        let text = self.try_get("/metrics").expect("/metrics").text();
        let series = text.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with([' ', '{']))
                && labels.iter().all(|label| line.contains(label))
        });
        series.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// All that this agent's doors refused, as text for a failing assertion.
    #[track_caller]
    pub fn refusals(&self) -> Vec<String> {
        let text = self.try_get("/metrics").expect("/metrics").text();
        let refused = text.lines().filter(|line| line.starts_with("murmesh_refused_total"));
        refused.map(str::to_owned).collect()
    }

    /// The events of one kind that this run of the agent recorded.
    #[track_caller]
    pub fn events(&self, kind: &str) -> Vec<Value> {
        let printed = self.run(&["events", "--since", "1h", "--json"]).ok();
        let events: Value = serde_json::from_str(&printed)
            .unwrap_or_else(|error| panic!("events --json: {error}: {printed}"));
        let events = events.as_array().unwrap_or_else(|| panic!("no array: {printed}"));
        events.iter().filter(|event| event["kind"] == kind).cloned().collect()
    }

    /// Its resident memory, in bytes.
    pub fn memory(&self) -> u64 {
        let id = self.child.lock().unwrap().as_ref().expect("it runs").id();
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    }

    /// Its open files.
    pub fn descriptors(&self) -> usize {
        let id = self.child.lock().unwrap().as_ref().expect("it runs").id();
        fs::read_dir(format!("/proc/{id}/fd")).map_or(0, |open| open.count())
    }

    /// The whole log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn log_tail(&self) -> String {
        let Ok(mut log) = File::open(&self.log) else { return String::new() };
        let len = log.metadata().map_or(0, |metadata| metadata.len());
        let _ = log.seek(SeekFrom::Start(len.saturating_sub(3_000)));
        let mut tail = Vec::new();
        let _ = log.read_to_end(&mut tail);
        String::from_utf8_lossy(&tail).into_owned()
    }
}

/// The state letter of every thread of `process`, as the kernel tells it: `T` is stopped.
fn thread_states(process: u32) -> String {
    let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let state = |thread: std::io::Result<fs::DirEntry>| {
        let stat = fs::read_to_string(thread.unwrap().path().join("stat")).ok()?;
        // "id (name) state ...", and a name may hold anything, parentheses too.
        stat.rsplit_once(") ")?.1.chars().next()
    };
    threads.filter_map(state).collect()
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- log of {} ----\n{}", self.name, self.log_tail());
        }
        let child = self.child.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(mut child) = child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
