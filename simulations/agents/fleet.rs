//! Whole agents on simulated machines, each a host of turmoil with a data directory, and what befalls
//! them.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use murmesh::api::Drain;
use murmesh::model::{Entry, MemberState};
use murmesh::telemetry::EventKind;
use murmesh::{DataDir, MemberPhase, MemberView, ServiceName, Stopped};
use tempfile::TempDir;
use turmoil::{Builder, Sim};

use super::invariants::Invariants;
use super::links::Links;
use super::machine::{self, Weather};
use super::node::{ECHO, Happening, Node, Shared, Wish, name, run, service};

/// How often a run is looked at, and its invariants.
const LOOK: Duration = Duration::from_millis(20);
const STOP_TIME_MAX: Duration = Duration::from_secs(30);

/// Agents on a network.
pub(crate) struct Fleet<'a> {
    pub(crate) sim: Sim<'a>,
    nodes: Vec<Rc<Node>>,
    links: Links,
    invariants: Invariants,
    shared: Rc<Shared>,
    _home: TempDir,
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
                let services = (index > 0).then(|| service(ECHO)).into_iter().collect();
                Rc::new(Node::new(index, DataDir::new(home.path().join(name(index))), services))
            })
            .collect();
        for node in &nodes {
            let (node, shared) = (Rc::clone(node), Rc::clone(&shared));
            sim.host(name(node.index), move || run(Rc::clone(&node), Rc::clone(&shared)));
        }
        let (links, invariants) = (Links::default(), Invariants::default());
        Self { sim, nodes, links, invariants, shared, _home: home }
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
        let now = self.sim.elapsed();
        self.invariants.look(now, &self.nodes, &self.links);
    }

    /// How long, at most, somebody did not see what it could reach, and then did.
    pub(crate) fn missed_max(&self) -> Duration {
        self.invariants.missed_max
    }

    /// SIGKILL, to all that runs on a machine.
    pub(crate) fn kill(&mut self, index: usize) {
        self.sim.crash(name(index));
        self.forget(index);
    }

    /// Starts a node that was killed or has stopped.
    pub(crate) fn start(&mut self, index: usize) {
        self.forget(index);
        self.sim.bounce(name(index));
    }

    /// Starts a node that was killed or has stopped at another address.
    pub(crate) fn start_elsewhere(&mut self, index: usize) {
        let port = &self.nodes[index].port;
        port.set(port.get() + 1);
        self.start(index);
    }

    /// Starts a node that was killed or has stopped; from now on it offers this, and no more.
    pub(crate) fn start_with(&mut self, index: usize, services: &[&str]) {
        *self.nodes[index].services.borrow_mut() =
            services.iter().map(|name| service(name)).collect();
        self.start(index);
    }

    fn forget(&mut self, index: usize) {
        self.nodes[index].forget();
        self.invariants.forget(index);
        self.shared.ledger.borrow_mut().abandon(index);
    }

    pub(crate) fn is_running(&self, index: usize) -> bool {
        self.nodes[index].is_running()
    }

    /// Puts the clock of a machine ahead, or behind, from its next start on.
    pub(crate) fn set_clock_ahead(&self, index: usize, seconds: i64) {
        self.nodes[index].clock_ahead.set(seconds);
    }

    /// Kills the application of a node, with all that it has open; its agent runs on.
    pub(crate) fn kill_application(&self, index: usize) {
        self.nodes[index].has_application.set(false);
        self.nodes[index].wish(Wish::Application(false));
    }

    pub(crate) fn start_application(&self, index: usize) {
        self.nodes[index].has_application.set(true);
        self.nodes[index].wish(Wish::Application(true));
    }

    /// Takes the instance of a node out of rotation, though it is the last.
    pub(crate) fn drain(&self, index: usize) {
        self.nodes[index].is_drained.set(true);
        self.nodes[index].wish(Wish::Drain(Drain::Force));
    }

    pub(crate) fn end_drain(&self, index: usize) {
        self.nodes[index].is_drained.set(false);
        self.nodes[index].wish(Wish::Drain(Drain::End));
    }

    /// Lets a node spread an entry that was signed elsewhere.
    pub(crate) fn publish(&self, index: usize, entry: Entry) {
        self.nodes[index].wish(Wish::Publish(entry));
    }

    /// What a node has on its disk.
    pub(crate) fn dir(&self, index: usize) -> &DataDir {
        &self.nodes[index].dir
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
        self.nodes[index].is_stopping.set(true);
        self.nodes[index].wish(Wish::Stop(phase));
    }

    /// Cuts the links between the nodes of `some` and all others.
    pub(crate) fn cut(&mut self, some: &[usize]) {
        self.links_of(some).into_iter().for_each(|(a, b)| self.cut_link(a, b));
    }

    pub(crate) fn heal(&mut self, some: &[usize]) {
        self.links_of(some).into_iter().for_each(|(a, b)| self.heal_link(a, b));
    }

    pub(crate) fn heal_all(&mut self) {
        let cut: Vec<_> = self.links.cut().collect();
        cut.into_iter().for_each(|(from, to)| self.set_way(from, to, false));
    }

    /// Cuts the link of two nodes.
    pub(crate) fn cut_link(&mut self, a: usize, b: usize) {
        [(a, b), (b, a)].into_iter().for_each(|(from, to)| self.set_way(from, to, true));
    }

    pub(crate) fn heal_link(&mut self, a: usize, b: usize) {
        [(a, b), (b, a)].into_iter().for_each(|(from, to)| self.set_way(from, to, false));
    }

    /// Nothing that one node sends to another arrives; the other way works.
    pub(crate) fn cut_way(&mut self, from: usize, to: usize) {
        self.set_way(from, to, true);
    }

    /// Nothing of what a node sends arrives.
    pub(crate) fn cut_from(&mut self, index: usize) {
        self.links_of(&[index]).into_iter().for_each(|(from, to)| self.cut_way(from, to));
    }

    /// Nothing arrives at a node.
    pub(crate) fn cut_to(&mut self, index: usize) {
        self.links_of(&[index]).into_iter().for_each(|(to, from)| self.cut_way(from, to));
    }

    fn set_way(&mut self, from: usize, to: usize, is_cut: bool) {
        match is_cut {
            true => self.sim.partition_oneway(name(from), name(to)),
            false => self.sim.repair_oneway(name(from), name(to)),
        }
        self.links.set(from, to, is_cut);
    }

    /// What the network does to datagrams between machines from now on.
    pub(crate) fn set_weather(&self, weather: Weather) {
        machine::set_weather(weather);
    }

    /// Makes every packet from and to a node take this long.
    pub(crate) fn slow(&self, index: usize, latency: Duration) {
        for (a, b) in self.links_of(&[index]) {
            self.sim.set_link_latency(name(a), name(b), latency);
        }
    }

    fn links_of(&self, some: &[usize]) -> Vec<(usize, usize)> {
        let others = || (0..self.len()).filter(|index| !some.contains(index));
        some.iter().flat_map(|&a| others().map(move |b| (a, b))).collect()
    }

    /// Lets a node call `echo` once, with `len` bytes there and back.
    pub(crate) fn call(&self, from: usize, len: u64) {
        self.call_slowly(from, len, Duration::ZERO);
    }

    /// As [`Fleet::call`], with a pause before each 8 KiB.
    pub(crate) fn call_slowly(&self, from: usize, len: u64, pause: Duration) {
        self.nodes[from].wish(Wish::Call { len, pause });
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
            idle && fleet.shared.ledger.borrow().open() == 0
        });
        self.shared.ledger.borrow().counts()
    }

    /// Calls that have reached the application of a node.
    pub(crate) fn delivered_at(&self, index: usize) -> usize {
        self.shared.ledger.borrow().delivered_at(index)
    }

    /// Calls that instances have not let go.
    pub(crate) fn being_served(&self) -> usize {
        self.shared.ledger.borrow().being_served()
    }

    pub(crate) fn calls_under_way(&self) -> usize {
        self.shared.ledger.borrow().under_way()
    }

    /// How `by` sees `of`; `None` while it does not run or does not know it.
    pub(crate) fn state(&self, by: usize, of: usize) -> Option<MemberState> {
        self.record(by, of).map(|member| member.state)
    }

    /// What `by` knows of `of` from its record; `None` while it does not run or does not know it.
    pub(crate) fn record(&self, by: usize, of: usize) -> Option<Arc<MemberView>> {
        let seen = self.nodes[by].seen.borrow();
        let of = name(of);
        seen.as_ref()?.snapshot.members.values().find(|member| member.name.as_str() == of).cloned()
    }

    /// Whether a node lists an instance of a service, in whatever state.
    pub(crate) fn lists(&self, by: usize, name: &str) -> bool {
        let seen = self.nodes[by].seen.borrow();
        seen.as_ref().is_some_and(|seen| !seen.snapshot.endpoints(&service(name)).is_empty())
    }

    /// How many instances of `echo` a node sees that take calls.
    pub(crate) fn ready(&self, by: usize) -> usize {
        self.ready_of(by, ECHO)
    }

    pub(crate) fn ready_of(&self, by: usize, name: &str) -> usize {
        let seen = self.nodes[by].seen.borrow();
        seen.as_ref().map_or(0, |seen| seen.snapshot.ready(&service(name)).count())
    }

    /// (a) Every node runs, sees every one alive, and all instances that they offer.
    pub(crate) fn is_whole(&self) -> bool {
        self.is_whole_among(&(0..self.len()).collect::<Vec<_>>())
    }

    /// As [`Fleet::is_whole`], among `some` of the nodes.
    pub(crate) fn is_whole_among(&self, some: &[usize]) -> bool {
        let some: Vec<_> = some.iter().map(|&index| &self.nodes[index]).collect();
        let offered: BTreeSet<ServiceName> =
            some.iter().flat_map(|node| node.services.borrow().clone()).collect();
        some.iter().all(|node| {
            let sees =
                |other: &&Rc<Node>| self.state(node.index, other.index) == Some(MemberState::Alive);
            let sees_instances = |service: &ServiceName| {
                let offering = some.iter().filter(|node| node.offers(service)).count();
                self.ready_of(node.index, service.as_str()) >= offering
            };
            some.iter().all(sees) && offered.iter().all(sees_instances)
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
