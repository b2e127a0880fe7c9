//! Agents beside as many of serf, one mesh at a time on this machine: how soon all know, and what
//! it costs to keep knowing.
//!
//! Both print what they learn, a line an event; the time of an event is when its line is read here.
//! Each mesh lives in a network namespace of its own, so that its loopback counts its bytes.

use std::collections::BTreeSet;
use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::limits::Limit;
use super::plot::{self, Panel, Row};
use super::process::{Place, Process, find, machine_cpu_us, succeed, until};
use super::proxies::install;
use super::speed::median;
use super::ways::{binary, murmesh_command};

/// An address of its own for each agent, on loopback.
const PORT: usize = 7_000;
const API_PORT: usize = 8_000;
/// How long an event may take to reach all.
const EVENT_MAX: Duration = Duration::from_secs(60);
/// How long bytes are counted.
const REST: Duration = Duration::from_secs(20);
const REST_QUICK: Duration = Duration::from_secs(5);
/// What an agent takes to contact each other one once, a peer: it is at rest only when it has a
/// connection to everybody. The same for serf, which has none.
const SETTLING: Duration = Duration::from_millis(800);

/// What an agent says that it learned.
enum News {
    /// It runs itself.
    Started(usize),
    Joined(usize),
    Died(usize),
    /// The state with this number is there.
    State(usize),
}

/// A program that keeps a mesh.
trait Gossip {
    fn name(&self) -> &'static str;
    /// Makes what `count` agents need before they start.
    fn prepare(&mut self, count: usize) -> Result<(), Box<dyn Error>>;
    fn agent(&self, at: usize) -> Command;
    /// Makes agent 0 tell a new state.
    fn tell(&self, number: usize) -> Result<(), Box<dyn Error>>;
    /// Whether a line of an agent's log brings this.
    fn is(&self, line: &str, news: &News) -> bool;
    fn place(&self) -> &Place;
}

fn name(at: usize) -> String {
    format!("n{at:03}") // none begins another
}

fn address(port: usize, at: usize) -> String {
    format!("127.0.0.1:{}", port + at)
}

struct Serf {
    program: PathBuf,
    place: Place,
}

impl Gossip for Serf {
    fn name(&self) -> &'static str {
        "serf"
    }

    fn prepare(&mut self, _: usize) -> Result<(), Box<dyn Error>> {
        Ok(())
    }

    fn agent(&self, at: usize) -> Command {
        let mut command = self.place.command(&self.program);
        command
            .args(["agent", "-node", &name(at), "-bind", &address(PORT, at)])
            .args(["-rpc-addr", &address(API_PORT, at)]);
        if at > 0 {
            command.args(["-retry-join", &address(PORT, 0), "-retry-interval", "1s"]);
        }
        command
    }

    fn tell(&self, number: usize) -> Result<(), Box<dyn Error>> {
        let mut command = self.place.command(&self.program);
        command.args(["tags", "-rpc-addr", &address(API_PORT, 0)]);
        succeed(command.args(["-set", &format!("state={number}")])).map(drop)
    }

    fn is(&self, line: &str, news: &News) -> bool {
        let (kind, at) = match news {
            News::Started(at) | News::Joined(at) => ("EventMemberJoin", *at),
            News::Died(at) => ("EventMemberFailed", *at),
            News::State(_) => ("EventMemberUpdate", 0),
        };
        line.contains(&format!("serf: {kind}: {}", name(at)))
    }

    fn place(&self) -> &Place {
        &self.place
    }
}

struct Murmesh {
    binary: PathBuf,
    directory: PathBuf,
    place: Place,
}

impl Murmesh {
    fn command(&self, at: usize, arguments: &[&str]) -> Command {
        let mut command = murmesh_command(&self.place, &self.binary);
        command.args(arguments).arg("--data-dir").arg(self.directory.join(name(at)));
        command
    }

    fn found_or_join(&self, at: usize, arguments: &[&str]) -> Result<(), Box<dyn Error>> {
        let mesh = address(PORT, at);
        let mut command = self.command(at, arguments);
        command.args(["--name", &name(at), "--mesh", &mesh, "--advertise", &mesh]);
        succeed(&mut command).map(drop)
    }
}

impl Gossip for Murmesh {
    fn name(&self) -> &'static str {
        "murmesh"
    }

    /// Enrols all. That is done once in the life of a machine, and is no part of a start.
    fn prepare(&mut self, count: usize) -> Result<(), Box<dyn Error>> {
        self.found_or_join(0, &["init"])?;
        let log = super::process::log("murmesh-founder")?;
        let _founder = Process::spawn(self.agent(0).stdout(log.try_clone()?).stderr(log))?;
        let token = until("an invite", EVENT_MAX, || {
            let api = address(API_PORT, 0);
            let invite = ["invite", "--uses", &count.to_string(), "--api", &api];
            succeed(&mut self.command(0, &invite))
        })?;
        (1..count).try_for_each(|at| self.found_or_join(at, &["join", token.trim()]))
    }

    fn agent(&self, at: usize) -> Command {
        self.command(at, &["agent", "--api", &address(API_PORT, at)])
    }

    fn tell(&self, number: usize) -> Result<(), Box<dyn Error>> {
        let (service, api) = (format!("state{number}"), address(API_PORT, 0));
        succeed(&mut self.command(0, &["expose", &service, "127.0.0.1:9", "--api", &api])).map(drop)
    }

    fn is(&self, line: &str, news: &News) -> bool {
        let (kind, subject) = match news {
            News::Started(at) => ("AgentStarted", name(*at)),
            News::Joined(at) => ("MemberUp", name(*at)),
            News::Died(at) => ("MemberDown", name(*at)),
            News::State(number) => ("InstanceAdded", format!("state{number}")),
        };
        line.contains(&format!("kind={kind} subject=\"{subject}\""))
    }

    fn place(&self) -> &Place {
        &self.place
    }
}

/// A line that an agent printed.
struct Line {
    at: Instant,
    agent: usize,
    text: String,
}

/// Agents that run.
struct Mesh<'a> {
    gossip: &'a dyn Gossip,
    agents: Vec<Option<Process>>,
    lines: Receiver<Line>,
    /// Lines that were read before somebody asked for them.
    read: Vec<Line>,
    sender: Sender<Line>,
}

impl<'a> Mesh<'a> {
    fn new(gossip: &'a dyn Gossip) -> Self {
        let (sender, lines) = channel();
        Self { gossip, agents: Vec::new(), lines, read: Vec::new(), sender }
    }

    fn start(&mut self) -> Result<(), Box<dyn Error>> {
        let agent = self.agents.len();
        let (reader, writer) = std::io::pipe()?;
        let mut command = self.gossip.agent(agent);
        self.agents.push(Some(Process::spawn(command.stdout(writer.try_clone()?).stderr(writer))?));
        drop(command); // or our own ends of the pipe stay open for ever
        let sender = self.sender.clone();
        thread::spawn(move || {
            for text in BufReader::new(reader).lines().map_while(Result::ok) {
                if sender.send(Line { at: Instant::now(), agent, text }).is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    fn alive(&self) -> BTreeSet<usize> {
        (0..self.agents.len()).filter(|at| self.agents[*at].is_some()).collect()
    }

    /// Seconds from `since` until each of `whom` has printed `news`.
    fn until_known(
        &mut self,
        since: Instant,
        whom: &BTreeSet<usize>,
        news: &News,
    ) -> Result<f64, Box<dyn Error>> {
        let (mut missing, mut last, mut next) = (whom.clone(), since, 0);
        loop {
            for line in &self.read[next..] {
                if line.at >= since
                    && missing.contains(&line.agent)
                    && self.gossip.is(&line.text, news)
                {
                    missing.remove(&line.agent);
                    last = last.max(line.at);
                }
            }
            next = self.read.len();
            if missing.is_empty() {
                return Ok((last - since).as_secs_f64());
            }
            let left = (since + EVENT_MAX).saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.read.push(line),
                Err(_) => return Err(format!("not known in {EVENT_MAX:?} at {missing:?}").into()),
            }
        }
    }

    /// How often a living member was declared dead so far, by anybody.
    fn mistakes(&mut self) -> usize {
        self.read.extend(self.lines.try_iter());
        let alive = self.alive();
        let is_mistake =
            |line: &&Line| alive.iter().any(|at| self.gossip.is(&line.text, &News::Died(*at)));
        self.read.iter().filter(is_mistake).count()
    }
}

/// What one mesh did.
struct Figures {
    gossip: &'static str,
    count: usize,
    /// Seconds.
    join: f64,
    detect: Vec<f64>,
    state: Vec<f64>,
    /// KB for each agent, from the start to the beginning of rest.
    start: f64,
    /// Bytes in a second for each agent.
    rest: f64,
    /// MB of each agent, median.
    rss: f64,
    pss: f64,
    /// Of one agent, in milliseconds for each second.
    cpu_ms: f64,
    /// Share of the machine in use at rest.
    load: f64,
    mistakes: usize,
}

/// Measures, prints all figures, and returns the limits with what was measured.
pub(crate) fn compare(counts: &[usize], is_quick: bool) -> Result<Vec<Limit>, Box<dyn Error>> {
    if find("serf").is_none()
        && let Err(error) = install(&["serf"])
    {
        println!("serf: not compared (not installed, and {error})");
    }
    let (mut limits, mut all) = (Vec::new(), Vec::new());
    println!(
        "{:>3} {:<9} {:>7} {:>17} {:>17} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>10}",
        "",
        "",
        "join s",
        "detection s",
        "state to all s",
        "start KB",
        "rest B/s",
        "RSS MB",
        "PSS MB",
        "CPU ms/s",
        "machine %",
        "false dead"
    );
    for &count in counts {
        let ours = measure("murmesh", count, is_quick)?;
        print(&ours);
        let serf = find("serf").and_then(|_| {
            let measured = measure("serf", count, is_quick);
            measured.map_err(|error| println!("failed: serf, {count}: {error}")).ok()
        });
        serf.iter().for_each(print);
        let ratio = |of: &dyn Fn(&Figures) -> f64| serf.as_ref().map(|serf| of(&ours) / of(serf));
        let mut limit = |what, most, of: &dyn Fn(&Figures) -> f64| {
            limits.push(Limit::at_most(format!("{what} of serf's, {count}"), most, ratio(of)));
        };
        limit("detection at all", 0.75, &|figures| median(figures.detect.clone()));
        limit("new state to all", 1.0, &|figures| median(figures.state.clone()));
        limit("RSS", 1.3, &|figures| figures.rss);
        limit("bytes at rest", 2.5, &|figures| figures.rest);
        all.extend(std::iter::once(ours).chain(serf));
    }
    plot(&all)?;
    Ok(limits)
}

fn measure(program: &str, count: usize, is_quick: bool) -> Result<Figures, Box<dyn Error>> {
    let place = Place::with_mtu(program, u16::MAX)?;
    let directory = tempfile::tempdir()?;
    let mut gossip: Box<dyn Gossip> = match program {
        "serf" => Box::new(Serf { program: find("serf").ok_or("serf is installed")?, place }),
        _ => Box::new(Murmesh { binary: binary()?, directory: directory.path().into(), place }),
    };
    gossip.prepare(count)?;
    let (kills, states) = if is_quick { (1, 2) } else { (3, 5) };
    let mut mesh = Mesh::new(&*gossip);
    let born = Instant::now();
    mesh.start()?; // the one that all others ask
    mesh.until_known(born, &BTreeSet::from([0]), &News::Started(0))?;
    let (begun, unborn) = (Instant::now(), bytes(mesh.gossip.place())?);
    (1..count).try_for_each(|_| mesh.start())?;
    let all = mesh.alive();
    let mut join = 0.0_f64;
    for at in 0..count {
        // The first one's own start lies before.
        let others: BTreeSet<_> = all.iter().copied().filter(|other| *other != at).collect();
        join = join.max(mesh.until_known(begun, &others, &News::Joined(at))?);
    }
    let state = (0..states)
        .map(|number| {
            let told = Instant::now();
            mesh.gossip.tell(number)?;
            let others = all.iter().copied().filter(|at| *at > 0).collect();
            let known = mesh.until_known(told, &others, &News::State(number));
            known.map_err(|error| format!("state {number}: {error}").into())
        })
        .collect::<Result<Vec<f64>, Box<dyn Error>>>()?;
    let rest = if is_quick { REST_QUICK } else { REST };
    thread::sleep(rest / 4 + SETTLING * u32::try_from(count)?);
    let spent = |mesh: &Mesh<'_>| -> Result<_, Box<dyn Error>> {
        let cpu = mesh.agents.iter().flatten().map(Process::cpu_us).sum::<Result<f64, _>>()?;
        Ok((bytes(mesh.gossip.place())?, cpu, machine_cpu_us()?, Instant::now()))
    };
    let before = spent(&mesh)?;
    thread::sleep(rest);
    let after = spent(&mesh)?;
    let usages = mesh.agents.iter().flatten().map(Process::usage).collect::<Result<Vec<_>, _>>()?;
    let mut mistakes = mesh.mistakes();
    let detect = (1..=kills)
        .map(|at| {
            let died = Instant::now();
            mesh.agents[at] = None;
            let left = mesh.alive();
            let known = mesh.until_known(died, &left, &News::Died(at));
            known.map_err(|error| format!("death of {}: {error}", name(at)).into())
        })
        .collect::<Result<Vec<f64>, Box<dyn Error>>>()?;
    mistakes = mistakes.max(mesh.mistakes());
    let seconds = (after.3 - before.3).as_secs_f64();
    let cores = thread::available_parallelism()?.get() as f64;
    Ok(Figures {
        gossip: gossip.name(),
        count,
        join,
        detect,
        state,
        start: (before.0 - unborn) / 1e3 / count as f64,
        rest: (after.0 - before.0) / seconds / count as f64,
        rss: median(usages.iter().map(|usage| usage.rss / 1e6).collect()),
        pss: median(usages.iter().map(|usage| usage.pss / 1e6).collect()),
        cpu_ms: (after.1 - before.1) / 1e3 / seconds / count as f64,
        load: (after.2 - before.2) / 1e6 / seconds / cores,
        mistakes,
    })
}

/// Bytes that the loopback of a place has carried, with all headers.
fn bytes(place: &Place) -> Result<f64, Box<dyn Error>> {
    let devices = succeed(place.command("cat").arg("/proc/net/dev"))?;
    let line = devices.lines().find_map(|line| line.trim().strip_prefix("lo:"));
    let bytes = line.and_then(|line| line.split_whitespace().next());
    Ok(bytes.ok_or("no loopback in /proc/net/dev")?.parse()?)
}

/// Draws `target/bench/serf.svg`.
fn plot(all: &[Figures]) -> Result<(), Box<dyn Error>> {
    let panel = |title: &str, unit, of: &dyn Fn(&Figures) -> Vec<f64>| {
        let label = |figures: &Figures| format!("{} {}", figures.count, figures.gossip);
        let rows = all.iter().map(|figures| Row::of(label(figures), &of(figures))).collect();
        Panel { title: title.to_owned(), unit, is_log: false, rows }
    };
    let seconds = "seconds, less is better";
    let panels = [
        panel("a crash is known to all", seconds, &|figures| figures.detect.clone()),
        panel("a new state is known to all", seconds, &|figures| figures.state.clone()),
        panel("bytes at rest", "B/s and agent, less is better", &|figures| vec![figures.rest]),
        panel("memory", "RSS in MB and agent, less is better", &|figures| vec![figures.rss]),
        panel("CPU at rest", "ms/s and agent, less is better", &|figures| vec![figures.cpu_ms]),
        panel("all are started and know each other", seconds, &|figures| vec![figures.join]),
    ];
    let title = "Agents of murmesh beside agents of serf, on one machine";
    println!("\ndrawn: {}", plot::write("serf", title, &panels)?.display());
    Ok(())
}

fn print(figures: &Figures) {
    let range = |values: &[f64]| {
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        format!("{:.2} ({least:.2}-{most:.2})", median(values.to_vec()))
    };
    println!(
        "{:>3} {:<9} {:>7.1} {:>17} {:>17} {:>9.0} {:>9.0} {:>8.1} {:>8.1} {:>8.1} {:>9.0} {:>10}",
        figures.count,
        figures.gossip,
        figures.join,
        range(&figures.detect),
        range(&figures.state),
        figures.start,
        figures.rest,
        figures.rss,
        figures.pss,
        figures.cpu_ms,
        100.0 * figures.load,
        figures.mistakes,
    );
}
