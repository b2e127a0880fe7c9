//! Processes of the comparison: where they run, what they use, and that they end with us.

use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use super::load::{Kind, Outcome};

/// A process that ends with its owner.
pub(crate) struct Process(Child);

impl Process {
    pub(crate) fn spawn(command: &mut Command) -> Result<Self, Box<dyn Error>> {
        let spawned = command.spawn();
        Ok(Self(spawned.map_err(|error| format!("cannot start {command:?}: {error}"))?))
    }

    /// Microseconds that all its threads have spent on a CPU so far.
    pub(crate) fn cpu_us(&self) -> io::Result<f64> {
        cpu_us(&self.0.id().to_string())
    }

    pub(crate) fn usage(&self) -> Result<Usage, Box<dyn Error>> {
        let id = self.0.id();
        let rollup = fs::read_to_string(format!("/proc/{id}/smaps_rollup"))?;
        let status = fs::read_to_string(format!("/proc/{id}/status"))?;
        Ok(Usage {
            rss: field(&rollup, "Rss:")? * 1_024.0,
            pss: field(&rollup, "Pss:")? * 1_024.0,
            threads: field(&status, "Threads:")?,
            descriptors: fs::read_dir(format!("/proc/{id}/fd"))?.count() as f64,
        })
    }

    /// Ends it at once, as a crash would.
    pub(crate) fn kill(&mut self) {
        let _ = self.0.kill(); // it ended by itself
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a process holds at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// Bytes.
    pub(crate) rss: f64,
    /// Bytes; a page that several processes share counts in parts.
    pub(crate) pss: f64,
    pub(crate) threads: f64,
    pub(crate) descriptors: f64,
}

fn field(text: &str, name: &str) -> Result<f64, Box<dyn Error>> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.ok_or_else(|| format!("no '{name}' in {text}"))?.parse()?)
}

/// Microseconds that all threads of process `id` have spent on a CPU so far.
///
/// The sum over its threads is exact, but loses those that have ended; what the kernel says of the
/// whole process counts them, in steps of 10 ms. The larger one is the truer one.
pub(crate) fn cpu_us(id: &str) -> io::Result<f64> {
    let number = |text: &str| text.parse::<f64>().map_err(io::Error::other);
    let mut nanos = 0.0;
    for task in fs::read_dir(format!("/proc/{id}/task"))? {
        // A thread may end while we look.
        let Ok(schedstat) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        nanos += number(schedstat.split(' ').next().unwrap_or_default())?;
    }
    let stat = fs::read_to_string(format!("/proc/{id}/stat"))?;
    // The name in brackets may hold anything; user and system time are the 12th and 13th behind it.
    let behind = stat.rsplit_once(") ").map_or("", |(_, behind)| behind);
    let ticks = behind.split(' ').skip(11).take(2);
    let ticks: f64 = ticks.map(number).sum::<io::Result<f64>>()?;
    Ok(f64::max(nanos / 1_000.0, ticks * US_PER_TICK))
}

/// What `/proc` counts in, on every Linux.
const US_PER_TICK: f64 = 10_000.0;

/// Microseconds of CPU that this machine has given to anybody, and that its host has taken away.
pub(crate) fn machine_cpu_us() -> Result<f64, Box<dyn Error>> {
    let stat = fs::read_to_string("/proc/stat")?;
    let all = stat.lines().next().unwrap_or_default();
    let ticks: Vec<f64> =
        all.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    // user, nice, system, idle, iowait, irq, softirq, steal
    let busy = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| ticks.get(*at)).sum::<f64>();
    Ok(busy * US_PER_TICK)
}

/// Where processes run: on this machine's loopback, or on one with links of another kind.
pub(crate) struct Place {
    namespace: Option<String>,
}

impl Place {
    pub(crate) fn here() -> Self {
        Self { namespace: None }
    }

    /// A network namespace of its own, whose loopback carries packets of `mtu` bytes.
    pub(crate) fn with_mtu(name: &str, mtu: u16) -> Result<Self, Box<dyn Error>> {
        let name = format!("murmesh-bench-{}-{name}", std::process::id());
        let ip = |arguments: &[&str]| succeed(Command::new("ip").args(arguments));
        ip(&["netns", "add", &name])?;
        let place = Self { namespace: Some(name.clone()) };
        ip(&["-n", &name, "link", "set", "lo", "mtu", &mtu.to_string(), "up"])?;
        Ok(place)
    }

    pub(crate) fn is_here(&self) -> bool {
        self.namespace.is_none()
    }

    /// A command that runs here, and in its own process: `ip` replaces itself.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let Some(namespace) = &self.namespace else { return Command::new(program) };
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).arg(program);
        command
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(namespace) = &self.namespace {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

/// A server of the load, at the address that it chose.
pub(crate) fn server(place: &Place) -> Result<(Process, SocketAddr), Box<dyn Error>> {
    listening(place, &["--role", "server"])
}

/// What forwards to `target`, and where it listens.
pub(crate) fn forwarder(
    place: &Place,
    target: SocketAddr,
) -> Result<(Process, SocketAddr), Box<dyn Error>> {
    listening(place, &["--role", "forward", &target.to_string()])
}

/// This program in another role, and the address that it prints.
fn listening(place: &Place, role: &[&str]) -> Result<(Process, SocketAddr), Box<dyn Error>> {
    let mut command = place.command(std::env::current_exe()?);
    let mut process = Process::spawn(command.args(role).stdout(Stdio::piped()))?;
    let stdout = process.0.stdout.take().ok_or("nobody to say where it listens")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    Ok((process, line.trim().parse()?))
}

/// A client of the load whose connections are open.
pub(crate) struct Client {
    process: Process,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Client {
    /// Returns when every connection that the kind needs has answered once.
    pub(crate) fn open(
        place: &Place,
        kind: Kind,
        target: SocketAddr,
        time: Duration,
    ) -> Result<Self, Box<dyn Error>> {
        let mut command = place.command(std::env::current_exe()?);
        command
            .args(["--role", "load", &serde_json::to_string(&kind)?])
            .args([target.to_string(), time.as_millis().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut process = Process::spawn(&mut command)?;
        let stdin = process.0.stdin.take().ok_or("client without input")?;
        let stdout = process.0.stdout.take().ok_or("client without output")?;
        let mut client = Self { process, stdin, stdout: BufReader::new(stdout) };
        client.line()?;
        Ok(client)
    }

    /// Loads, for the time that it was opened with.
    pub(crate) fn run(mut self) -> Result<Outcome, Box<dyn Error>> {
        self.stdin.write_all(b"\n")?;
        let outcome = serde_json::from_str(&self.line()?)?;
        self.process.0.wait()?;
        Ok(outcome)
    }

    fn line(&mut self) -> Result<String, Box<dyn Error>> {
        let mut line = String::new();
        if self.stdout.read_line(&mut line)? > 0 {
            return Ok(line);
        }
        let mut said = String::new();
        if let Some(stderr) = &mut self.process.0.stderr {
            stderr.read_to_string(&mut said)?;
        }
        Err(format!("the client failed: {}", said.trim()).into())
    }
}

/// What the command printed.
pub(crate) fn succeed(command: &mut Command) -> Result<String, Box<dyn Error>> {
    let output = command.output().map_err(|error| format!("cannot start {command:?}: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?} failed: {}", said.trim()).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Asks again until there is an answer, for at most `time`; then with the last reason.
pub(crate) fn until<T>(
    what: &str,
    time: Duration,
    mut ask: impl FnMut() -> Result<T, Box<dyn Error>>,
) -> Result<T, Box<dyn Error>> {
    let deadline = Instant::now() + time;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if Instant::now() > deadline => {
                return Err(format!("not in {time:?}: {what}: {error}").into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Where a program is: on the path, or where Debian keeps servers.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

/// The build's own directory, for what is fetched and drawn.
pub(crate) fn target() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or("target".into());
    Path::new(&target).to_path_buf()
}

/// A file for what a process says, to look at when something fails: `target/bench/log/NAME`.
pub(crate) fn log(name: &str) -> io::Result<fs::File> {
    let directory = target().join("bench/log");
    fs::create_dir_all(&directory)?;
    fs::File::create(directory.join(name))
}
