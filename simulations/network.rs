//! The simulated network: who can reach whom, how late, and what gets lost.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use murmesh::mesh::Channel;
use murmesh::model::Moment;

/// Time after which a dial, or a stream to nobody, is given up: as in an agent.
const DIAL_PATIENCE: Duration = Duration::from_secs(3);

/// Without a fault: the share of datagrams that arrive twice, and the one-way delay.
const DUPLICATION: f64 = 0.01;
const DELAY: (Duration, Duration) = (Duration::from_micros(150), Duration::from_millis(1));

/// First retransmission of a reliable message, doubled for each further one.
const RETRANSMISSION: Duration = Duration::from_millis(60);

/// A network of numbered nodes.
pub(crate) struct Network {
    rng: StdRng,
    /// Share of packets lost, each way.
    pub(crate) loss: f64,
    /// Share of datagrams that arrive twice.
    pub(crate) duplication: f64,
    /// One-way delay: from, to.
    pub(crate) delay: (Duration, Duration),
    /// Nodes of different groups do not reach each other.
    pub(crate) groups: Vec<u8>,
    /// From the first to the second nothing passes.
    pub(crate) cuts: Vec<(usize, usize)>,
    /// Deaf nodes hear for a second, then not for this long, again and again.
    pub(crate) deaf: Vec<Option<Duration>>,
    /// Pairs, the lower number first, that need no dial. A cut does not end a connection.
    connected: BTreeSet<(usize, usize)>,
}

/// What becomes of something sent.
pub(crate) enum Fate {
    /// Arrives at these moments; never, when there are none.
    Arrives(Vec<Moment>),
    /// Its sender hears at this moment that it cannot arrive.
    Fails(Moment),
}

impl Network {
    pub(crate) fn new(seed: u64, nodes: usize) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            loss: 0.0,
            duplication: DUPLICATION,
            delay: DELAY,
            groups: vec![0; nodes],
            cuts: Vec::new(),
            deaf: vec![None; nodes],
            connected: BTreeSet::new(),
        }
    }

    pub(crate) fn is_connected(&self, one: usize, other: usize) -> bool {
        self.connected.contains(&(one.min(other), one.max(other)))
    }

    pub(crate) fn connect(&mut self, one: usize, other: usize) {
        self.connected.insert((one.min(other), one.max(other)));
    }

    pub(crate) fn disconnect(&mut self, one: usize, other: usize) {
        self.connected.remove(&(one.min(other), one.max(other)));
    }

    /// A node is gone, and its connections with it.
    pub(crate) fn disconnect_all(&mut self, node: usize) {
        self.connected.retain(|(one, other)| *one != node && *other != node);
    }

    /// When a dial begun now ends, and whether it is answered.
    pub(crate) fn dial(&mut self, now: Moment, from: usize, to: Option<usize>) -> (Moment, bool) {
        let given_up = now + DIAL_PATIENCE;
        match self.send(now, from, to, Channel::Message) {
            Fate::Arrives(at) => match at.first().map(|at| *at + self.one_way()) {
                Some(answered) if answered <= given_up => (answered, true),
                _ => (given_up, false),
            },
            Fate::Fails(at) => (at, false),
        }
    }

    /// From now on packets pass as at the start.
    pub(crate) fn end_faults(&mut self) {
        (self.loss, self.duplication, self.delay) = (0.0, DUPLICATION, DELAY);
        self.groups.fill(0);
        self.cuts.clear();
        self.deaf.fill(None);
    }

    pub(crate) fn reaches(&self, from: usize, to: usize) -> bool {
        self.groups[from] == self.groups[to] && !self.cuts.contains(&(from, to))
    }

    /// The fate of something sent from a node to another that is up, or not.
    pub(crate) fn send(
        &mut self,
        now: Moment,
        from: usize,
        to: Option<usize>,
        channel: Channel,
    ) -> Fate {
        let both_ways = |to: &usize| self.reaches(from, *to) && self.reaches(*to, from);
        match (channel, to) {
            (Channel::Datagram, Some(to)) if self.reaches(from, to) => {
                let copies = 1 + usize::from(self.rng.random_bool(self.duplication));
                let arrivals = (0..copies).filter_map(|_| {
                    let is_lost = self.rng.random_bool(self.loss);
                    let delay = self.one_way();
                    (!is_lost).then(|| self.hearing(now + delay, to))
                });
                Fate::Arrives(arrivals.collect())
            }
            (Channel::Datagram, _) => Fate::Arrives(Vec::new()),
            (Channel::Message, Some(to)) if both_ways(&to) => {
                let mut delay = self.one_way();
                let mut wait = RETRANSMISSION;
                while self.rng.random_bool(self.loss) {
                    delay += wait;
                    wait *= 2;
                }
                Fate::Arrives(vec![self.hearing(now + delay, to)])
            }
            (Channel::Message, _) => Fate::Fails(now + DIAL_PATIENCE),
        }
    }

    fn one_way(&mut self) -> Duration {
        self.rng.random_range(self.delay.0..=self.delay.1)
    }

    /// When a deaf node takes what arrives at `at`: at once, or when it hears again.
    fn hearing(&self, at: Moment, to: usize) -> Moment {
        let Some(deaf) = self.deaf[to] else { return at };
        let cycle = (deaf + Duration::from_secs(1)).as_nanos() as u64;
        // Nodes are deaf at different times.
        let offset = (to as u64).wrapping_mul(777_777_777) % cycle;
        let phase = (at.as_nanos() + offset) % cycle;
        match phase < deaf.as_nanos() as u64 {
            true => Moment::from_nanos(at.as_nanos() + deaf.as_nanos() as u64 - phase),
            false => at,
        }
    }
}
