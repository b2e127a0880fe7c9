//! Whole agents on simulated machines: each a host of turmoil with a data directory, an application
//! that echoes, and callers.

#![allow(clippy::disallowed_methods)] // a machine runs more than an agent: its application and its clients

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use murmesh::config::Setting;
use murmesh::mesh::Snapshot;
use murmesh::model::{Epoch, MemberId, MemberState};
use murmesh::telemetry::{Event, EventKind};
use murmesh::{Agent, DataDir, ExposeSpec, MemberPhase, ServiceName, Settings, Stopped, Target};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::spawn_local;
use tokio::time::sleep;
use turmoil::net::{TcpListener, TcpStream};
use turmoil::{Builder, Sim};

use super::ledger::{Call, Ledger};
use super::machine;

const MESH_PORT: u16 = 7370;
const APP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8000);
const ENTRY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9000);
/// How often a run is looked at, and its invariants.
const LOOK: Duration = Duration::from_millis(20);
const DRAIN: Duration = Duration::from_secs(5);
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

/// Something that happened at a node, and when on the simulation's clock.
pub(crate) type Happening = (Duration, usize, EventKind, String, String);

/// What a node is asked to do.
enum Wish {
    Stop(MemberPhase),
    /// With `pause` before each part.
    Call {
        len: u64,
        pause: Duration,
    },
}

/// A machine with one agent.
struct Node {
    index: usize,
    dir: DataDir,
    /// Of its UDP socket: another one after its address has changed.
    port: Cell<u16>,
    serves: bool,
    wishes: RefCell<VecDeque<Wish>>,
    /// While its agent runs.
    seen: RefCell<Option<Arc<Snapshot>>>,
    stopped: Cell<Option<Stopped>>,
    /// Of every member's record as its agent saw it last. Versions never go back.
    versions: RefCell<BTreeMap<MemberId, (Epoch, u64)>>,
}

/// What all nodes of a run share.
#[derive(Default)]
struct Shared {
    /// An invitation, once the first agent runs.
    token: RefCell<Option<String>>,
    log: RefCell<Vec<Happening>>,
    ledger: RefCell<Ledger>,
}

/// Agents on a network.
pub(crate) struct Fleet<'a> {
    pub(crate) sim: Sim<'a>,
    nodes: Vec<Rc<Node>>,
    shared: Rc<Shared>,
    _home: TempDir,
}

fn name(index: usize) -> String {
    format!("n{index}")
}

fn echo() -> ServiceName {
    "echo".parse().expect("a name")
}

impl<'a> Fleet<'a> {
    /// `count` agents of one mesh that all know each other. All but the first serve `echo`, and every
    /// machine has an entry to it.
    pub(crate) fn whole(seed: u64, count: usize) -> Self {
        let mut fleet = Self::new(seed, count);
        fleet.until("all see all, and every instance", Duration::from_secs(60), Self::is_whole);
        fleet
    }

    /// As [`Fleet::whole`] without the last machine, which was never started.
    pub(crate) fn whole_but_last(seed: u64, count: usize) -> Self {
        let mut fleet = Self::new(seed, count);
        fleet.sim.crash(name(count - 1));
        let others: Vec<_> = (0..count - 1).collect();
        let limit = Duration::from_secs(60);
        fleet.until("all others see all others", limit, |fleet| fleet.is_whole_among(&others));
        fleet
    }

    fn new(seed: u64, count: usize) -> Self {
        machine::begin(seed);
        let home = TempDir::new().expect("a temporary directory");
        let mut sim = Builder::new()
            .epoch(machine::epoch())
            .rng_seed(seed)
            .simulation_duration(Duration::from_secs(86_400))
            .tick_duration(Duration::from_millis(1))
            .min_message_latency(Duration::from_micros(100))
            .max_message_latency(Duration::from_millis(3))
            .tcp_capacity(1 << 16)
            .udp_capacity(1 << 16)
            .build();
        let shared = Rc::new(Shared::default());
        let nodes: Vec<_> = (0..count)
            .map(|index| {
                Rc::new(Node {
                    index,
                    dir: DataDir::new(home.path().join(name(index))),
                    port: Cell::new(MESH_PORT),
                    serves: index > 0,
                    wishes: RefCell::default(),
                    seen: RefCell::default(),
                    stopped: Cell::default(),
                    versions: RefCell::default(),
                })
            })
            .collect();
        for node in &nodes {
            let (node, shared) = (Rc::clone(node), Rc::clone(&shared));
            sim.host(name(node.index), move || run(Rc::clone(&node), Rc::clone(&shared)));
        }
        Self { sim, nodes, shared, _home: home }
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Lets time pass.
    pub(crate) fn run_for(&mut self, time: Duration) {
        let end = self.sim.elapsed() + time;
        while self.sim.elapsed() < end {
            self.step();
        }
    }

    /// Lets time pass until `condition` holds; tells how long that took.
    #[track_caller]
    pub(crate) fn until(
        &mut self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Self) -> bool,
    ) -> Duration {
        let began = self.sim.elapsed();
        while !condition(self) {
            let waited = self.sim.elapsed() - began;
            assert!(waited < limit, "not within {limit:?}: {what}\n{}", self.views());
            self.step();
        }
        self.sim.elapsed() - began
    }

    fn step(&mut self) {
        for _ in 0..LOOK.as_millis() {
            self.sim.step().expect("no agent fails");
        }
        self.nodes.iter().for_each(|node| node.check_versions());
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self, index: usize) {
        self.sim.crash(name(index));
        self.nodes[index].forget();
    }

    /// Starts a node that was killed or has stopped.
    pub(crate) fn start(&mut self, index: usize) {
        self.nodes[index].forget();
        self.sim.bounce(name(index));
    }

    /// Starts a node that was killed or has stopped at another address.
    pub(crate) fn start_elsewhere(&mut self, index: usize) {
        self.nodes[index].port.set(MESH_PORT + 1);
        self.start(index);
    }

    /// Asks an agent to stop, and waits until it has.
    pub(crate) fn stop(&mut self, index: usize, phase: MemberPhase) -> Stopped {
        self.ask_to_stop(index, phase);
        self.until("it stops", STOP_TIME_MAX, |fleet| fleet.nodes[index].stopped.get().is_some());
        self.nodes[index].stopped.get().expect("waited for")
    }

    /// Restarts an agent in order as far as its end, while `from` goes on calling.
    pub(crate) fn stop_under_calls(
        &mut self,
        index: usize,
        from: usize,
        len: u64,
        pause: Duration,
    ) {
        self.ask_to_stop(index, MemberPhase::Restarting);
        let deadline = self.sim.elapsed() + STOP_TIME_MAX;
        while self.nodes[index].stopped.get().is_none() {
            assert!(self.sim.elapsed() < deadline, "it does not stop");
            self.call_for(from, len, pause, pause);
        }
    }

    fn ask_to_stop(&self, index: usize, phase: MemberPhase) {
        self.nodes[index].stopped.set(None);
        self.nodes[index].wishes.borrow_mut().push_back(Wish::Stop(phase));
    }

    /// Cuts the links between the nodes of `some` and all others.
    pub(crate) fn cut(&mut self, some: &[usize]) {
        for (a, b) in self.links(some) {
            self.sim.partition(name(a), name(b));
        }
    }

    pub(crate) fn heal(&mut self, some: &[usize]) {
        for (a, b) in self.links(some) {
            self.sim.repair(name(a), name(b));
        }
    }

    /// Cuts the link of two nodes.
    pub(crate) fn cut_link(&mut self, a: usize, b: usize) {
        self.sim.partition(name(a), name(b));
    }

    pub(crate) fn heal_link(&mut self, a: usize, b: usize) {
        self.sim.repair(name(a), name(b));
    }

    /// Nothing of what a node sends arrives.
    pub(crate) fn cut_from(&mut self, index: usize) {
        for (from, to) in self.links(&[index]) {
            self.sim.partition_oneway(name(from), name(to));
        }
    }

    /// Loses this share of all datagrams between machines.
    pub(crate) fn lose(&self, share: f64) {
        machine::lose(share);
    }

    /// Makes every packet from and to a node take this long.
    pub(crate) fn slow(&self, index: usize, latency: Duration) {
        for (a, b) in self.links(&[index]) {
            self.sim.set_link_latency(name(a), name(b), latency);
        }
    }

    fn links(&self, some: &[usize]) -> Vec<(usize, usize)> {
        let others = || (0..self.len()).filter(|index| !some.contains(index));
        some.iter().flat_map(|&a| others().map(move |b| (a, b))).collect()
    }

    /// Lets a node call `echo` once, with `len` bytes there and back.
    pub(crate) fn call(&self, from: usize, len: u64) {
        self.call_slowly(from, len, Duration::ZERO);
    }

    /// As [`Fleet::call`], with a pause before each 8 KiB.
    pub(crate) fn call_slowly(&self, from: usize, len: u64, pause: Duration) {
        self.nodes[from].wishes.borrow_mut().push_back(Wish::Call { len, pause });
    }

    /// Lets time pass with calls of `len` bytes from `from`, one every `pause`.
    pub(crate) fn call_for(&mut self, from: usize, len: u64, pause: Duration, time: Duration) {
        let end = self.sim.elapsed() + time;
        while self.sim.elapsed() < end {
            self.call(from, len);
            self.run_for(pause);
        }
    }

    /// Waits until every call has ended; how many ended well, and how many were cut.
    pub(crate) fn settle_calls(&mut self) -> (usize, usize) {
        self.until("every call has ended", Duration::from_secs(60), |fleet| {
            let idle = fleet.nodes.iter().all(|node| node.wishes.borrow().is_empty());
            idle && fleet.shared.ledger.borrow().under_way() == 0
        });
        self.run_for(Duration::from_secs(6)); // the longest that a call may wait for its first byte
        self.shared.ledger.borrow().counts()
    }

    /// Calls that have reached the application of a node.
    pub(crate) fn delivered_at(&self, index: usize) -> usize {
        self.shared.ledger.borrow().delivered_at(index)
    }

    pub(crate) fn calls_under_way(&self) -> usize {
        self.shared.ledger.borrow().under_way()
    }

    /// How `by` sees `of`; `None` while it does not run or does not know it.
    pub(crate) fn state(&self, by: usize, of: usize) -> Option<MemberState> {
        let seen = self.nodes[by].seen.borrow();
        let of = name(of);
        let members = &seen.as_ref()?.members;
        members.values().find(|member| member.name.as_str() == of).map(|member| member.state)
    }

    pub(crate) fn ready(&self, by: usize) -> usize {
        let seen = self.nodes[by].seen.borrow();
        seen.as_ref().map_or(0, |seen| seen.ready(&echo()).count())
    }

    /// (a) Every running node sees every running one alive, and everything they serve.
    pub(crate) fn is_whole(&self) -> bool {
        let running: Vec<_> = self.nodes.iter().filter(|n| n.seen.borrow().is_some()).collect();
        let serving = running.iter().filter(|node| node.serves).count();
        running.len() == self.len() && self.sees_all(&running, serving)
    }

    /// As [`Fleet::is_whole`], among `some` of the nodes.
    pub(crate) fn is_whole_among(&self, some: &[usize]) -> bool {
        let some: Vec<_> = some.iter().map(|&index| &self.nodes[index]).collect();
        let serving = some.iter().filter(|node| node.serves).count();
        self.sees_all(&some, serving)
    }

    fn sees_all(&self, nodes: &[&Rc<Node>], serving: usize) -> bool {
        nodes.iter().all(|node| {
            let sees =
                |other: &&Rc<Node>| self.state(node.index, other.index) == Some(MemberState::Alive);
            nodes.iter().all(sees) && self.ready(node.index) >= serving
        })
    }

    /// How often nodes took `kind` to be true of `subject`.
    pub(crate) fn count(&self, kind: EventKind, subject: Option<usize>) -> usize {
        let subject = subject.map(name);
        let log = self.shared.log.borrow();
        let is_meant = |(_, _, what, whom, _): &&Happening| {
            *what == kind && subject.as_ref().is_none_or(|subject| subject == whom)
        };
        log.iter().filter(is_meant).count()
    }

    pub(crate) fn into_log(self) -> Vec<Happening> {
        self.shared.log.take()
    }

    fn views(&self) -> String {
        let view = |node: &Rc<Node>| {
            let states = (0..self.len()).map(|of| match self.state(node.index, of) {
                Some(state) => state.as_str().to_owned(),
                None => "-".to_owned(),
            });
            let states = states.collect::<Vec<_>>().join(" ");
            format!("{} sees {states}, {} ready", name(node.index), self.ready(node.index))
        };
        self.nodes.iter().map(view).collect::<Vec<_>>().join("\n")
    }
}

impl Node {
    /// Its agent runs no more.
    fn forget(&self) {
        self.seen.take();
        self.versions.take();
        self.stopped.set(None);
    }

    /// (c) What an agent knows of a member never goes back.
    fn check_versions(&self) {
        let seen = self.seen.borrow();
        let mut versions = self.versions.borrow_mut();
        for member in seen.iter().flat_map(|seen| seen.members.values()) {
            let now = (member.epoch, member.version);
            let before = versions.insert(member.id, now);
            let went_back = before.is_some_and(|before| before > now);
            assert!(!went_back, "(c) {} of {} from {before:?} to {now:?}", self.index, member.name);
        }
    }

    fn settings(&self) -> Settings {
        let address = |port| SocketAddr::new(turmoil::lookup(name(self.index)), port);
        let mut settings = Settings::local(self.dir.clone());
        settings.name = Setting::default(Some(name(self.index).parse().expect("a name")));
        settings.mesh = Setting::default((Ipv4Addr::UNSPECIFIED, self.port.get()).into());
        settings.advertise = Setting::default(Some(address(self.port.get()).into()));
        settings.profile = Setting::default(murmesh::membership::Profile::Lan);
        settings
    }
}

/// What a machine runs from its start on.
async fn run(node: Rc<Node>, shared: Rc<Shared>) -> turmoil::Result {
    let agent = loop {
        match begin(&node, &shared).await {
            Ok(agent) => break agent,
            Err(error) => {
                // The issuer may not be up yet.
                tracing::debug!(%error, "not yet");
                sleep(Duration::from_millis(250)).await;
            }
        }
    };
    spawn_local(follow(node.index, agent.events().follow(), Rc::clone(&shared)));
    if node.serves {
        spawn_local(serve(node.index, TcpListener::bind(APP).await?, Rc::clone(&shared)));
        agent.expose(ExposeSpec::new(echo(), Target::Tcp(APP))?).await?;
    }
    agent.upstream(&echo(), Target::Tcp(ENTRY)).await?;
    agent.ready().await;
    loop {
        *node.seen.borrow_mut() = Some(agent.snapshot());
        let wish = node.wishes.borrow_mut().pop_front();
        match wish {
            None => sleep(Duration::from_millis(10)).await,
            Some(Wish::Call { len, pause }) => {
                let call = shared.ledger.borrow_mut().begin(len);
                spawn_local(call_once(call, pause, Rc::clone(&shared)));
            }
            Some(Wish::Stop(phase)) => {
                let stopped = agent.stop(phase, DRAIN).await;
                let left = tokio::runtime::Handle::current().metrics().num_alive_tasks();
                assert_eq!(left, 0, "(g) tasks outlive their agent");
                node.seen.take();
                node.stopped.set(Some(stopped));
                return pending().await; // the machine goes on
            }
        }
    }
}

async fn begin(node: &Node, shared: &Shared) -> Result<Agent, Box<dyn std::error::Error>> {
    if node.index > 0 {
        let token = shared.token.borrow().clone().ok_or("nobody has invited yet")?;
        return Ok(Agent::join(node.settings(), &token).await?);
    }
    let agent = Agent::found(node.settings()).await?;
    if shared.token.borrow().is_none() {
        let invite = agent.invite(Duration::from_secs(86_400), 100).await?;
        *shared.token.borrow_mut() = Some(invite.token);
    }
    Ok(agent)
}

async fn follow(
    index: usize,
    mut events: tokio::sync::broadcast::Receiver<Event>,
    shared: Rc<Shared>,
) {
    while let Ok(Event { kind, subject, reason, .. }) = events.recv().await {
        let at = turmoil::sim_elapsed().unwrap_or_default();
        shared.log.borrow_mut().push((at, index, kind, subject, reason));
    }
}

/// The application: gives back what it reads.
async fn serve(index: usize, listener: TcpListener, shared: Rc<Shared>) {
    while let Ok((stream, _)) = listener.accept().await {
        let shared = Rc::clone(&shared);
        spawn_local(async move {
            let _ = echo_back(index, stream, shared).await; // a cut: the ledger knows how far
        });
    }
}

async fn echo_back(index: usize, mut stream: TcpStream, shared: Rc<Shared>) -> std::io::Result<()> {
    let mut head = [0; Call::HEAD_LEN];
    stream.read_exact(&mut head).await?;
    let call = Call::from_head(head);
    let place = shared.ledger.borrow_mut().arrive(call, index);
    let mut buffer = [0; 8192];
    loop {
        match stream.read(&mut buffer).await? {
            0 => break,
            count => {
                shared.ledger.borrow_mut().deliver(call, place, &buffer[..count]);
                stream.write_all(&buffer[..count]).await?;
            }
        }
    }
    stream.shutdown().await
}

async fn call_once(call: Call, pause: Duration, shared: Rc<Shared>) {
    let _ = exchange(call, pause, &shared).await; // a cut: the ledger knows how far
    shared.ledger.borrow_mut().end(call);
}

async fn exchange(call: Call, pause: Duration, shared: &Shared) -> std::io::Result<()> {
    let stream = TcpStream::connect(ENTRY).await?;
    let (mut reader, mut writer) = stream.into_split();
    let ask = async {
        writer.write_all(&call.head()).await?;
        let (mut at, mut buffer) = (0, [0; 8192]);
        while at < call.len {
            sleep(pause).await;
            let count = call.fill(at, &mut buffer);
            writer.write_all(&buffer[..count]).await?;
            at += count as u64;
        }
        writer.shutdown().await
    };
    let hear = async {
        let mut buffer = [0; 8192];
        loop {
            match reader.read(&mut buffer).await? {
                0 => return Ok(()),
                count => shared.ledger.borrow_mut().give_back(call, &buffer[..count]),
            }
        }
    };
    tokio::try_join!(ask, hear).map(drop)
}
