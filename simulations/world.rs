//! A whole mesh in virtual time: pure nodes, a simulated network, one queue of what happens next.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use ring::signature::{Ed25519KeyPair, KeyPair};

use murmesh::catalogue::Verify;
use murmesh::membership::Profile;
use murmesh::mesh::{
    Channel, Destination, Dials, EPOCH_RESERVE, Lane, Mesh, MeshConfig, MeshEvent, Transmit,
};
use murmesh::model::{
    Enrolment, Entry, EntryKey, EntryKind, Epoch, InstanceRecord, InstanceState, Issuer, MemberId,
    MemberPhase, MemberState, MeshId, Moment, Protocol, PublicKey, Signature, Signer, Weight,
};
use murmesh::wire;

use crate::invariants::Invariants;
use crate::network::{Fate, Network};

const MESH: MeshId = MeshId([7; 32]);

/// (a) After the last fault the mesh is whole again within this.
pub(crate) const HEAL_TIME_MAX: Duration = Duration::from_secs(15);

/// A key made from a number.
pub(crate) struct Key(Ed25519KeyPair);

impl Key {
    pub(crate) fn new(number: u64) -> Self {
        let mut seed = [0x5a; 32];
        seed[..8].copy_from_slice(&number.to_be_bytes());
        Self(Ed25519KeyPair::from_seed_unchecked(&seed).expect("32 bytes are a seed"))
    }

    pub(crate) fn id(&self) -> MemberId {
        self.public_key().member_id()
    }
}

impl Signer for Key {
    fn public_key(&self) -> PublicKey {
        PublicKey(self.0.public_key().as_ref().try_into().expect("32 bytes"))
    }

    fn sign(&self, message: &[u8]) -> Signature {
        Signature(self.0.sign(message).as_ref().try_into().expect("64 bytes"))
    }
}

/// Verifies each signature once for all nodes of the process.
#[derive(Clone, Default)]
pub(crate) struct SharedVerifier(Arc<Mutex<HashSet<Bytes>>>);

impl Verify for SharedVerifier {
    fn verify(&mut self, mesh: &MeshId, entry: &Entry) -> bool {
        let mut verified = self.0.lock().expect("one thread");
        if verified.contains(entry.bytes()) {
            return true;
        }
        let is_signed = entry.is_signed(mesh);
        if is_signed {
            verified.insert(entry.bytes().clone());
        }
        is_signed
    }
}

/// One machine.
pub(crate) struct Node {
    pub(crate) id: MemberId,
    pub(crate) address: SocketAddr,
    /// `None` while the agent is not running.
    pub(crate) mesh: Option<Mesh>,
    pub(crate) epoch: Epoch,
    pub(crate) seeds: Vec<SocketAddr>,
    /// What survives a crash.
    disk: BTreeMap<EntryKey, Entry>,
    remembered: Vec<(MemberId, SocketAddr)>,
    /// As in an agent: a dial of the dead takes its time, and they are bounded.
    dials: Dials,
    /// Neither reads nor acts before this moment.
    paused_until: Moment,
    wake_at: Option<Moment>,
    pub(crate) bytes_sent: u64,
    /// What its wall clock said when the run began, in milliseconds since 1970.
    pub(crate) began_at_ms: u64,
    pub(crate) started_at: Moment,
    pub(crate) settled_at: Option<Moment>,
}

enum Happening {
    Arrival {
        to: usize,
        from: MemberId,
        channel: Channel,
        data: Bytes,
    },
    /// A dial has ended; `peer` has answered.
    Dialled {
        node: usize,
        to: Destination,
        peer: Option<usize>,
    },
    Undelivered {
        node: usize,
        to: Destination,
    },
    Wake(usize),
}

/// The whole.
pub(crate) struct World {
    pub(crate) now: Moment,
    pub(crate) network: Network,
    pub(crate) nodes: Vec<Node>,
    pub(crate) rng: StdRng,
    pub(crate) invariants: Invariants,
    /// What happened to members: when, at which node, what.
    pub(crate) log: Vec<(Moment, usize, MeshEvent)>,
    /// Who declared whom dead that was running, and not paused, at that time.
    false_deaths: Vec<(usize, usize)>,
    /// Since when a dial of a member that is believed there waits to begin.
    wanted: BTreeMap<(usize, Destination), Moment>,
    /// The longest such wait since this was last reset.
    pub(crate) dial_wait_max: Duration,
    queue: BTreeMap<(Moment, u64), Happening>,
    queued: u64,
    by_address: BTreeMap<SocketAddr, usize>,
    pub(crate) by_id: BTreeMap<MemberId, usize>,
    issuer: Arc<Key>,
    grounds: Vec<Entry>,
    verifier: SharedVerifier,
}

impl World {
    /// `count` enrolled nodes, none of them running.
    pub(crate) fn new(seed: u64, count: usize) -> Self {
        let (root, issuer) = (Key::new(1_000_000), Key::new(1_000_001));
        let body = Issuer {
            key: issuer.public_key(),
            member: issuer.id(),
            certificate: Vec::new(),
            is_active: true,
            kept: Vec::new(),
            dropped: Vec::new(),
        };
        let payload = wire::encode_payload(&body).expect("encodes");
        let kind = EntryKind::ISSUER;
        let subject = *issuer.id().as_bytes();
        let grounds = Entry::sign(&MESH, &root, kind, subject, Epoch(1), 1, &payload);
        let mut world = Self {
            now: Moment::from_secs(1),
            network: Network::new(seed ^ 0xff, 0),
            nodes: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
            invariants: Invariants::new(MESH),
            log: Vec::new(),
            false_deaths: Vec::new(),
            wanted: BTreeMap::new(),
            dial_wait_max: Duration::ZERO,
            queue: BTreeMap::new(),
            queued: 0,
            by_address: BTreeMap::new(),
            by_id: BTreeMap::new(),
            issuer: Arc::new(issuer),
            grounds: vec![grounds.expect("short")],
            verifier: SharedVerifier::default(),
        };
        (0..count).for_each(|_| {
            world.enrol();
        });
        world
    }

    /// A mesh of `count` nodes that all see each other alive.
    pub(crate) fn whole(seed: u64, count: usize) -> Self {
        let mut world = Self::new(seed, count);
        world.start_all(Duration::from_millis(500), &[0, 1, 2].map(|seed: usize| seed % count));
        let (tick, limit) = (Duration::from_millis(100), Duration::from_secs(60));
        let whole = world.time_until(tick, limit, Self::is_whole);
        assert!(whole.is_some(), "(a) all see all");
        world.run_for(Duration::from_secs(3));
        world
    }

    /// One more node, enrolled and not running.
    pub(crate) fn enrol(&mut self) -> usize {
        let number = self.nodes.len();
        let key = Key::new(number as u64);
        let id = key.id();
        let address: SocketAddr = ([10, 0, (number >> 8) as u8, number as u8], 7370).into();
        let enrolment = Enrolment {
            key: key.public_key(),
            name: name_of(number).parse().expect("a name"),
            serial: number as u64,
            services: None,
            issued_at: 1,
            invite: None,
            replaces: Vec::new(),
            let_in_by: None,
        };
        let payload = wire::encode_payload(&enrolment).expect("encodes");
        let (kind, subject) = (EntryKind::ENROLMENT, *id.as_bytes());
        let entry = Entry::sign(&MESH, &*self.issuer, kind, subject, Epoch(1), 1, &payload);
        let own = [self.grounds[0].clone(), entry.expect("short")];
        self.by_address.insert(address, number);
        self.by_id.insert(id, number);
        self.network.groups.push(0);
        self.network.deaf.push(None);
        self.nodes.push(Node {
            id,
            address,
            mesh: None,
            epoch: Epoch(1_790_000_000),
            seeds: Vec::new(),
            disk: own.into_iter().map(|entry| (entry.key(), entry)).collect(),
            remembered: Vec::new(),
            dials: Dials::default(),
            paused_until: Moment::START,
            wake_at: None,
            bytes_sent: 0,
            began_at_ms: 1_790_000_000_000,
            started_at: Moment::START,
            settled_at: None,
        });
        number
    }

    /// Starts a node's agent, with what its disk holds.
    pub(crate) fn start(&mut self, node: usize) {
        let seed = self.rng.random();
        let (now, verifier) = (self.now, self.verifier.clone());
        let machine = &mut self.nodes[node];
        machine.epoch = Epoch(machine.epoch.0 + 1);
        machine.started_at = now;
        machine.settled_at = None;
        machine.wake_at = None;
        let config = MeshConfig {
            mesh: MESH,
            root: Key::new(1_000_000).public_key(),
            name: name_of(node).parse().expect("a name"),
            address: machine.address,
            zone: String::new(),
            agent_version: "0.1.0".into(),
            began_at_ms: machine.began_at_ms,
            epoch: machine.epoch,
            profile: Profile::Lan,
            seeds: machine.seeds.clone(),
            phase: MemberPhase::Running,
            offers: Vec::new(),
            remembered: machine.remembered.clone(),
        };
        machine.epoch = Epoch(machine.epoch.0 + EPOCH_RESERVE);
        let signer = Box::new(Key::new(node as u64));
        let entries = machine.disk.values().cloned().collect();
        let mesh = Mesh::with_verifier(now, config, signer, seed, entries, Box::new(verifier));
        machine.mesh = Some(mesh.expect("it is enrolled"));
        self.invariants.forget(node);
        self.drain(node);
    }

    /// Starts all nodes, spread over `within`, with `seeds` for their first contacts.
    pub(crate) fn start_all(&mut self, within: Duration, seeds: &[usize]) {
        let seeds: Vec<_> = seeds.iter().map(|seed| self.nodes[*seed].address).collect();
        for node in 0..self.nodes.len() {
            self.nodes[node].seeds = seeds.clone();
            self.start(node);
            self.run_for(within / self.nodes.len() as u32);
        }
    }

    /// Stops a node's agent without a word.
    pub(crate) fn crash(&mut self, node: usize) {
        self.network.disconnect_all(node);
        let machine = &mut self.nodes[node];
        machine.dials = Dials::default();
        if let Some(mesh) = machine.mesh.take() {
            machine.remembered = mesh.remembered();
        }
    }

    /// Stops a node's world for a while: timers and packets wait.
    pub(crate) fn pause(&mut self, node: usize, pause: Duration) {
        self.nodes[node].paused_until = self.now + pause;
    }

    /// Does something at a node.
    pub(crate) fn at<R>(&mut self, node: usize, act: impl FnOnce(&mut Mesh, Moment) -> R) -> R {
        let now = self.now;
        let mesh = self.nodes[node].mesh.as_mut().expect("the node is running");
        let result = act(mesh, now);
        self.drain(node);
        result
    }

    /// Lets virtual time pass.
    pub(crate) fn run_for(&mut self, time: Duration) {
        self.run_until(self.now + time, |_| false);
    }

    /// Lets virtual time pass until `is_done` (looked at after every step) or `deadline`. Returns
    /// whether it was done.
    pub(crate) fn run_until(
        &mut self,
        deadline: Moment,
        mut is_done: impl FnMut(&Self) -> bool,
    ) -> bool {
        loop {
            let next = self.queue.first_key_value().map(|((at, _), _)| *at);
            match next.filter(|at| *at <= deadline) {
                Some(_) => self.step(),
                None => {
                    self.now = deadline;
                    return is_done(self);
                }
            }
            if is_done(self) {
                return true;
            }
        }
    }

    /// Looks every `every` whether `is_done`; returns when it was.
    pub(crate) fn time_until(
        &mut self,
        every: Duration,
        limit: Duration,
        mut is_done: impl FnMut(&Self) -> bool,
    ) -> Option<Duration> {
        let start = self.now;
        while self.now.since(start) < limit {
            if is_done(self) {
                return Some(self.now.since(start));
            }
            self.run_for(every);
        }
        is_done(self).then(|| self.now.since(start))
    }

    /// How `at` sees `member`.
    pub(crate) fn state(&self, at: usize, member: usize) -> Option<MemberState> {
        self.nodes[at].mesh.as_ref()?.member_state(self.nodes[member].id)
    }

    /// Running nodes.
    pub(crate) fn running(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.nodes.len()).filter(|node| self.nodes[*node].mesh.is_some())
    }

    /// Whether `at` sees all running nodes alive.
    pub(crate) fn sees_all(&self, at: usize) -> bool {
        self.running().all(|member| self.state(at, member) == Some(MemberState::Alive))
    }

    /// Whether all running nodes see all running nodes alive.
    pub(crate) fn is_whole(&self) -> bool {
        self.running().all(|at| self.sees_all(at))
    }

    /// Takes every fault of the network away. (a): within [`HEAL_TIME_MAX`] all running nodes see
    /// each other alive. Returns after how long.
    pub(crate) fn end_faults(&mut self) -> Duration {
        self.network.end_faults();
        let whole = self.time_until(Duration::from_millis(50), HEAL_TIME_MAX, Self::is_whole);
        let world = &*self;
        let seen = |at| world.running().map(move |member| (at, member, world.state(at, member)));
        let is_missing = |(.., state): &(_, _, _)| *state != Some(MemberState::Alive);
        let missing: Vec<_> = self.running().flat_map(seen).filter(is_missing).collect();
        assert!(
            missing.is_empty(),
            "(a) {HEAL_TIME_MAX:?} after the last fault these do not see each other: {missing:?}"
        );
        whole.unwrap_or_default()
    }

    /// Times of the first event at each node that `select` takes, after `since`.
    pub(crate) fn first_at_each(
        &self,
        since: Moment,
        select: impl Fn(&MeshEvent) -> bool,
    ) -> BTreeMap<usize, Duration> {
        let mut first = BTreeMap::new();
        for (at, node, event) in self.log.iter().filter(|(at, ..)| *at >= since) {
            if select(event) {
                first.entry(*node).or_insert(at.since(since));
            }
        }
        first
    }

    /// Declarations of death of nodes that were running, and not paused, at that time.
    pub(crate) fn false_deaths(&self) -> usize {
        self.false_deaths.len()
    }

    /// Those of [`World::false_deaths`] whose observer and member `select` takes.
    pub(crate) fn false_deaths_seen_by(&self, select: impl Fn(usize, usize) -> bool) -> usize {
        self.false_deaths.iter().filter(|(at, member)| select(*at, *member)).count()
    }

    /// Bytes sent by all nodes, datagrams and messages.
    pub(crate) fn bytes_sent(&self) -> u64 {
        self.nodes.iter().map(|node| node.bytes_sent).sum()
    }

    /// Lets a node offer one instance.
    pub(crate) fn offer(&mut self, node: usize, name: &str) {
        let instance = InstanceRecord {
            id: name.parse().expect("a name"),
            service: name.parse().expect("a name"),
            protocol: Protocol::Tcp,
            port: 80,
            tags: Vec::new(),
            weight: Weight::default(),
            state: InstanceState::Ready,
        };
        self.at(node, |mesh, now| mesh.set_offers(now, vec![instance.into()]));
    }

    /// Whether `at` knows that `member` offers `name`.
    pub(crate) fn offers(&self, at: usize, member: usize, name: &str) -> bool {
        let id = self.nodes[member].id;
        self.nodes[at]
            .mesh
            .as_ref()
            .is_some_and(|mesh| mesh.instances(id).any(|instance| instance.id.as_str() == name))
    }

    /// Whether `event` says that `member` offers `name`.
    pub(crate) fn is_offer(&self, event: &MeshEvent, member: usize, name: &str) -> bool {
        matches!(event, MeshEvent::InstanceAdded { member: owner, instance }
            if *owner == self.nodes[member].id && instance.as_str() == name)
    }

    /// Moves a node that is not running.
    pub(crate) fn readdress(&mut self, node: usize, address: SocketAddr) {
        self.by_address.remove(&self.nodes[node].address);
        self.by_address.insert(address, node);
        self.nodes[node].address = address;
    }

    fn step(&mut self) {
        let Some(((at, _), happening)) = self.queue.pop_first() else { return };
        let node = match &happening {
            Happening::Arrival { to: node, .. }
            | Happening::Dialled { node, .. }
            | Happening::Undelivered { node, .. }
            | Happening::Wake(node) => *node,
        };
        let resumes_at = self.nodes[node].paused_until;
        if at < resumes_at {
            // Its connections die meanwhile, and what they carried: the others give up on them.
            return match happening {
                Happening::Arrival { .. } => {}
                happening => self.queue(resumes_at, happening),
            };
        }
        self.now = at;
        let now = self.now;
        let Some(mesh) = self.nodes[node].mesh.as_mut() else { return };
        match happening {
            Happening::Arrival { from, channel: Channel::Datagram, data, .. } => {
                mesh.handle_datagram(now, from, &data);
            }
            Happening::Arrival { from, channel: Channel::Message, data, .. } => {
                mesh.handle_message(now, from, &data);
            }
            Happening::Dialled { to, peer, .. } => self.finish_dial(node, to, peer),
            Happening::Undelivered { to, .. } => {
                mesh.handle_unreachable(now, to);
                if let Some(target) = self.target(node, &to) {
                    self.network.disconnect(node, target);
                }
            }
            Happening::Wake(_) => {
                self.nodes[node].wake_at = None;
                let mesh = self.nodes[node].mesh.as_mut().expect("looked at above");
                if mesh.poll_timeout().is_some_and(|at| at <= now) {
                    mesh.handle_timeout(now);
                }
            }
        }
        self.drain(node);
    }

    fn drain(&mut self, node: usize) {
        let Some(mut mesh) = self.nodes[node].mesh.take() else { return };
        while let Some(transmit) = mesh.poll_transmit() {
            let lane = mesh.lane(&transmit.to);
            self.send(node, lane, transmit);
        }
        while let Some(event) = mesh.poll_event() {
            self.note(node, event);
        }
        self.invariants.handle_step(node, &mesh);
        let wake_at = mesh.poll_timeout().map(|at| at.max(self.now));
        self.nodes[node].mesh = Some(mesh);
        if let Some(at) = wake_at
            && self.nodes[node].wake_at.is_none_or(|before| at < before)
        {
            self.nodes[node].wake_at = Some(at);
            self.queue(at, Happening::Wake(node));
        }
    }

    fn note(&mut self, node: usize, event: MeshEvent) {
        let is_falsely_dead = |member: &MemberId| {
            let machine = &self.nodes[self.by_id[member]];
            let is_there = machine.mesh.is_some() && machine.paused_until <= self.now;
            is_there && machine.settled_at.is_some()
        };
        match &event {
            MeshEvent::EntryAccepted(entry) => {
                self.invariants.handle_entry(node, entry, &mut self.verifier);
                self.nodes[node].disk.insert(entry.key(), entry.clone());
                return;
            }
            MeshEvent::MemberDown { member, .. } => {
                if is_falsely_dead(member) {
                    self.false_deaths.push((node, self.by_id[member]));
                }
                self.network.disconnect(node, self.by_id[member]); // as the driver does
            }
            MeshEvent::Settled => self.nodes[node].settled_at = Some(self.now),
            _ => {}
        }
        self.log.push((self.now, node, event));
    }

    fn send(&mut self, node: usize, lane: Lane, transmit: Transmit) {
        self.invariants.handle_transmit(transmit.channel, transmit.data.len());
        self.nodes[node].bytes_sent += transmit.data.len() as u64;
        match self.target(node, &transmit.to) {
            Some(target) if self.network.is_connected(node, target) => {
                self.deliver(node, target, transmit);
            }
            _ => {
                if lane == Lane::There {
                    self.wanted.entry((node, transmit.to)).or_insert(self.now);
                }
                // A full queue drops it, as in an agent.
                let _ = self.nodes[node].dials.push(lane, transmit);
                self.begin_dials(node);
            }
        }
    }

    /// Who answers a dial, if anybody is there.
    fn target(&self, node: usize, to: &Destination) -> Option<usize> {
        let (Destination::Member { address, .. } | Destination::Seed(address)) = to;
        self.by_address.get(address).copied().filter(|target| {
            let is_expected = match to {
                Destination::Member { id, .. } => self.nodes[*target].id == *id,
                Destination::Seed(_) => true,
            };
            is_expected && (self.nodes[*target].mesh.is_some() || *target == node)
        })
    }

    fn begin_dials(&mut self, node: usize) {
        while let Some(to) = self.nodes[node].dials.poll_dial() {
            if let Some(since) = self.wanted.remove(&(node, to)) {
                self.dial_wait_max = self.dial_wait_max.max(self.now.since(since));
            }
            let target = self.target(node, &to);
            let (at, is_answered) = self.network.dial(self.now, node, target);
            let peer = target.filter(|_| is_answered);
            self.queue(at, Happening::Dialled { node, to, peer });
        }
    }

    fn finish_dial(&mut self, node: usize, to: Destination, peer: Option<usize>) {
        let now = self.now;
        let waiting = self.nodes[node].dials.finish(&to);
        self.wanted.remove(&(node, to)); // asked for while it was under way
        self.begin_dials(node);
        let ids = peer.map(|peer| (peer, self.nodes[peer].id));
        let mesh = self.nodes[node].mesh.as_mut().expect("it is running");
        let (Destination::Member { address, .. } | Destination::Seed(address)) = to;
        match ids {
            Some((peer, id)) => {
                mesh.handle_connected(now, id, address);
                self.network.connect(node, peer);
                waiting.into_iter().for_each(|transmit| self.deliver(node, peer, transmit));
            }
            None => mesh.handle_unreachable(now, to),
        }
    }

    fn deliver(&mut self, node: usize, target: usize, transmit: Transmit) {
        let Transmit { to, channel, data } = transmit;
        let from = self.nodes[node].id;
        match self.network.send(self.now, node, Some(target), channel) {
            Fate::Fails(at) => self.queue(at, Happening::Undelivered { node, to }),
            Fate::Arrives(moments) => {
                for at in moments {
                    let data = data.clone();
                    self.queue(at, Happening::Arrival { to: target, from, channel, data });
                }
            }
        }
    }

    fn queue(&mut self, at: Moment, happening: Happening) {
        self.queued += 1;
        self.queue.insert((at, self.queued), happening);
    }
}

pub(crate) fn name_of(node: usize) -> String {
    format!("node-{node}")
}
