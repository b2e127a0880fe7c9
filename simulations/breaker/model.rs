//! Callers and instances in virtual time. Each caller has the real local breakers, the real shared one
//! and the real pick; each instance has its agent before it, with the real gate. News takes the time that
//! was measured. To a pick all instances cost the same.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use murmesh::balancer::{Load, Order, Rank, Shares, Stance, WHOLE};
use murmesh::breaker::{
    Admission, Breaker, BreakerConfig, BreakerEvent, InstanceChange, InstanceKey, OwnWindow,
    ProbeGate, SharedBreaker, SharedConfig, SharedEvent, Trial, Verdict,
};
use murmesh::mesh::{self, Endpoint, EndpointState, Rotation, ServiceView};
use murmesh::model::{
    Capacity, MemberId, Moment, Observations, ObservedWindow, Outcome, Protocol, ServiceName,
    Weight,
};

/// How callers learn that an instance is ill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    /// Own breakers and the shared one.
    Shared,
    /// Own breakers only.
    Alone,
    /// As proxies do that learn each for itself: 5 failures in a row, then 30 s without.
    PerClient,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::Shared, Self::Alone, Self::PerClient];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Alone => "alone",
            Self::PerClient => "per client",
        }
    }
}

/// How an instance answers at a time of the run: the share that fails, how, and after how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    pub(super) failing: f64,
    pub(super) failure: Outcome,
    pub(super) latency: Duration,
}

impl Answer {
    pub(super) const WELL: Self =
        Self { failing: 0.0, failure: Outcome::Failed, latency: Duration::from_millis(5) };
    pub(super) const DEAD: Self = Self { failing: 1.0, ..Self::WELL };
    /// Nothing listens.
    pub(super) const REFUSING: Self = Self { failure: Outcome::Unreached, ..Self::DEAD };

    pub(super) const fn grey(failing: f64) -> Self {
        Self { failing, ..Self::WELL }
    }
}

/// How an instance answers: its number, the time, calls that it got in the last second.
pub(super) type Behaviour = fn(usize, Duration, usize) -> Answer;

/// What a caller is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Honest,
    /// Its own network fails from 10 s on: so does whatever it calls.
    Broken,
    /// It says that the first so many instances fail, whatever it sees: all of 1,000 calls, the last one
    /// now. Or that they are well.
    Liar(usize, Manner),
}

/// When a liar speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// Once a second.
    Steady,
    /// The same, and again as soon as it hears somebody say otherwise.
    Renewing,
    /// All liars in the same moment, then nothing for 7 s, until what they said is forgotten.
    Striking,
    /// As soon as it hears an honest accusation, and only of what that accuses.
    Joining,
    /// Once a second, of failures that began an hour ago, each time by another clock.
    Misdating,
    /// The same, by the true clock.
    Backdating,
    /// A fresh report that accuses nothing, by which its clock is known; then two that do, of failures
    /// that began an hour ago, signed 3 to 9 s back.
    Redating,
    /// Once a second, so many instances for 15 s and then the next ones.
    Marching,
    /// Once a second, and when it hears an accusation, that all is well.
    Vouching,
}

impl Manner {
    /// Those that try to have what is well ejected.
    pub(super) const ALL: [Self; 5] =
        [Self::Steady, Self::Renewing, Self::Striking, Self::Joining, Self::Misdating];

    const fn pause(self) -> Duration {
        match self {
            Self::Striking => Duration::from_secs(7),
            _ => Duration::from_secs(1),
        }
    }
}

/// How soon a liar that answers may speak again: others refuse who publishes more often.
const LIE_PAUSE: Duration = Duration::from_millis(200);

/// What is simulated.
pub(super) struct Setting {
    pub(super) callers: Vec<Kind>,
    pub(super) instances: usize,
    /// Calls a second of each caller.
    pub(super) rate: f64,
    /// How often it calls beside that, by its number.
    pub(super) pace: fn(usize) -> f64,
    /// When liars begin.
    pub(super) lies_from: Duration,
    /// Whether an instance is near a caller: caller, instance. The others take what these do not.
    pub(super) near: fn(usize, usize) -> bool,
    pub(super) length: Duration,
    pub(super) answer: Behaviour,
    /// How long news takes from one member to another: from, to.
    pub(super) news: (Duration, Duration),
    /// By how much clocks differ from true time at most.
    pub(super) skew: Duration,
    pub(super) breaker: BreakerConfig,
    pub(super) shared: SharedConfig,
}

impl Setting {
    /// 50 callers of 5 calls a second, 10 instances, 60 s; news takes 5 to 100 ms, longer than `observe`
    /// measures it.
    pub(super) fn new(answer: Behaviour) -> Self {
        Self {
            callers: vec![Kind::Honest; 50],
            instances: 10,
            rate: 5.0,
            pace: |_| 1.0,
            lies_from: Duration::from_secs(10),
            near: |_, _| true,
            length: Duration::from_secs(60),
            answer,
            news: (Duration::from_millis(5), Duration::from_millis(100)),
            skew: Duration::from_millis(100),
            breaker: BreakerConfig::default(),
            shared: SharedConfig::default(),
        }
    }
}

/// What a run showed.
pub(super) struct Run {
    pub(super) calls: usize,
    pub(super) failed: usize,
    /// Of callers that neither lie nor have a broken network.
    pub(super) honest_failed: usize,
    /// When each failed call ended.
    pub(super) failures: Vec<Duration>,
    /// Calls that reached each instance: when they began.
    pub(super) reached: Vec<Vec<Duration>>,
    /// Calls that passed the gate of an ejected instance.
    pub(super) probes: Vec<Vec<Duration>>,
    /// Ejections: when, at which caller that is no liar, of which instance.
    pub(super) ejected: Vec<(Duration, usize, usize)>,
    /// When each report was signed.
    pub(super) reported: Vec<Duration>,
    /// When a service began to fail as a whole, or did no more: when, at which caller that is no liar.
    pub(super) failing: Vec<(Duration, usize, bool)>,
    /// How often callers' own breakers opened.
    pub(super) opened: usize,
    /// When failures of a quorum had happened, by instance.
    pub(super) quorum_at: BTreeMap<usize, Duration>,
}

impl Run {
    /// Calls to an instance in `[from, to)`, in seconds.
    pub(super) fn reached_in(&self, instance: usize, from: f64, to: f64) -> usize {
        let within = |at: &&Duration| (from..to).contains(&at.as_secs_f64());
        self.reached[instance].iter().filter(within).count()
    }

    pub(super) fn failed_in(&self, from: f64, to: f64) -> usize {
        count_in(&self.failures, from, to)
    }

    pub(super) fn reported_in(&self, from: f64, to: f64) -> usize {
        count_in(&self.reported, from, to)
    }
}

fn count_in(moments: &[Duration], from: f64, to: f64) -> usize {
    moments.iter().filter(|at| (from..to).contains(&at.as_secs_f64())).count()
}

struct Caller {
    kind: Kind,
    shared: SharedBreaker,
    breakers: Vec<Breaker>,
    /// Of [`Way::PerClient`]: failures in a row, and ejected until.
    plain: Vec<(u32, Moment)>,
    /// What it sees of the service, and those of it that are near.
    view: ServiceView,
    near: Shares,
    /// When it probed last for the mesh, and when that had been tried before.
    probed: Vec<Option<[Moment; 2]>>,
    called: Vec<bool>,
    told_at: Moment,
    lied_at: Moment,
}

/// The agent in front of an instance.
struct Owner {
    shared: SharedBreaker,
    gate: ProbeGate,
    view: ServiceView,
}

enum Happening {
    Call(usize),
    Ended { caller: usize, instance: usize, trial: Option<Trial>, outcome: Outcome },
    News { from: MemberId, to: usize, observations: Observations },
    Lie(usize),
    Tick,
}

pub(super) struct World<'a> {
    setting: &'a Setting,
    way: Way,
    rng: StdRng,
    /// Of how long news takes: apart, so that calls go the same way as long as nothing is ejected.
    news_rng: StdRng,
    now: Moment,
    queue: BinaryHeap<Reverse<(Moment, u64)>>,
    happenings: BTreeMap<u64, Happening>,
    queued: u64,
    callers: Vec<Caller>,
    /// The agents in front of the instances.
    owners: Vec<Owner>,
    accused_by: Vec<Vec<usize>>,
    recent: Vec<Vec<Moment>>,
    service: ServiceName,
    run: Run,
}

const TICK: Duration = Duration::from_millis(20);
const TRIES_MAX: usize = 3;
/// Of the true clock.
const BEGAN_AT_MS: u64 = 1_790_000_000_000;

fn caller_id(number: usize) -> MemberId {
    let mut bytes = [1; 16];
    bytes[..8].copy_from_slice(&(number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    MemberId::from_bytes(bytes)
}

fn key(instance: usize) -> InstanceKey {
    let mut bytes = [2; 16];
    bytes[0] = instance as u8;
    let member = MemberId::from_bytes(bytes);
    InstanceKey { member, instance: "web".parse().expect("a name") }
}

/// The service as a member sees it.
fn view(shared: &SharedBreaker, service: &ServiceName, instances: usize) -> ServiceView {
    let endpoint = |number: usize| {
        let InstanceKey { member, instance } = key(number);
        Endpoint {
            instance: instance.clone(),
            member,
            member_name: "server".parse().expect("a name"),
            address: "127.0.0.1:7370".parse().expect("an address"),
            port: 80,
            tags: Vec::new(),
            weight: Weight(100),
            state: EndpointState::Ready,
            zone: "".into(),
            verdict: shared.verdict(&InstanceKey { member, instance }),
            idempotent: Default::default(),
            capacity: Capacity::default(),
            changed_at: Moment::START,
            rotation: Rotation::In { since: None },
        }
    };
    let endpoints = (0..instances).map(endpoint).collect();
    let mut view = ServiceView::new(service.clone(), Protocol::Http, endpoints);
    view.is_failing = shared.is_failing(service);
    view.is_panic = shared.is_panic(service);
    view
}

/// One run.
pub(super) fn run(setting: &Setting, way: Way, seed: u64) -> Run {
    let mut world = World::new(setting, way, seed);
    let end = Moment::START + setting.length;
    while let Some(Reverse((at, number))) = world.queue.pop() {
        if at > end {
            break;
        }
        world.now = at;
        let Some(happening) = world.happenings.remove(&number) else { continue };
        world.handle(happening);
    }
    world.run
}

impl<'a> World<'a> {
    fn new(setting: &'a Setting, way: Way, seed: u64) -> Self {
        let service: ServiceName = "web".parse().expect("a name");
        let shared = |id: MemberId, seed: u64| {
            let skew = setting.skew.as_millis() as u64;
            let mut clocks = StdRng::seed_from_u64(seed);
            let began_at_ms = BEGAN_AT_MS - skew + clocks.random_range(0..=2 * skew);
            let mut shared = SharedBreaker::new(setting.shared.clone(), id, began_at_ms, seed);
            for instance in 0..setting.instances {
                let InstanceKey { member, instance } = key(instance);
                shared.set_instances(Moment::START, member, [(instance, service.clone())]);
            }
            shared
        };
        let mut rng = StdRng::seed_from_u64(seed);
        let near = |caller: usize| {
            let near = (0..setting.instances).filter(move |one| (setting.near)(caller, *one));
            near.map(|one| (one, Weight(100))).collect()
        };
        let nothing = shared(MemberId::from_bytes([0; 16]), 0);
        // Whose turn it is follows from who it is: with each seed others are those of another kind.
        let mut kinds = setting.callers.clone();
        kinds.rotate_right(seed as usize * 7 % setting.callers.len());
        let callers = kinds.into_iter().enumerate().map(|(number, kind)| Caller {
            kind,
            shared: shared(caller_id(number), rng.random()),
            breakers: (0..setting.instances)
                .map(|_| Breaker::new(&setting.breaker, rng.random()))
                .collect(),
            plain: vec![(0, Moment::START); setting.instances],
            view: view(&nothing, &service, setting.instances),
            near: near(number),
            probed: vec![None; setting.instances],
            called: vec![false; setting.instances],
            told_at: Moment::from_nanos(rng.random_range(0..1_000_000_000)),
            lied_at: Moment::START,
        });
        let callers: Vec<_> = callers.collect();
        let owners = (0..setting.instances).map(|instance| Owner {
            shared: shared(key(instance).member, instance as u64),
            gate: ProbeGate::default(),
            view: view(&nothing, &service, setting.instances),
        });
        let owners = owners.collect();
        let mut world = Self {
            setting,
            way,
            rng,
            news_rng: StdRng::seed_from_u64(seed.wrapping_add(1 << 32)),
            now: Moment::START,
            queue: BinaryHeap::new(),
            happenings: BTreeMap::new(),
            queued: 0,
            callers,
            owners,
            accused_by: vec![Vec::new(); setting.instances],
            recent: vec![Vec::new(); setting.instances],
            service,
            run: Run {
                calls: 0,
                failed: 0,
                honest_failed: 0,
                failures: Vec::new(),
                reached: vec![Vec::new(); setting.instances],
                probes: vec![Vec::new(); setting.instances],
                ejected: Vec::new(),
                reported: Vec::new(),
                failing: Vec::new(),
                opened: 0,
                quorum_at: BTreeMap::new(),
            },
        };
        for caller in 0..world.callers.len() {
            let first = world.rng.random_range(0.0..1.0) / (setting.rate * (setting.pace)(caller));
            let first = Duration::from_secs_f64(first);
            world.schedule(first, Happening::Call(caller));
            if let Kind::Liar(..) = world.callers[caller].kind {
                world.schedule(setting.lies_from, Happening::Lie(caller));
            }
        }
        world.schedule(TICK, Happening::Tick);
        world
    }

    fn schedule(&mut self, after: Duration, happening: Happening) {
        self.queued += 1;
        self.queue.push(Reverse((self.now + after, self.queued)));
        self.happenings.insert(self.queued, happening);
    }

    fn elapsed(&self) -> Duration {
        self.now.since(Moment::START)
    }

    fn handle(&mut self, happening: Happening) {
        match happening {
            Happening::Call(caller) => {
                self.call(caller);
                let rate = self.setting.rate * (self.setting.pace)(caller);
                let pause = self.rng.random_range(0.5..1.5) / rate;
                self.schedule(Duration::from_secs_f64(pause), Happening::Call(caller));
            }
            Happening::Ended { caller, instance, trial, outcome } => {
                self.ended(caller, instance, trial, outcome);
            }
            Happening::News { from, to, observations } => {
                let now = self.now;
                match to.checked_sub(self.callers.len()) {
                    None => {
                        self.callers[to].shared.handle_report(now, from, &observations);
                        self.drain(to);
                        self.lie_about(to, from, &observations);
                    }
                    Some(owner) => {
                        let shared = &mut self.owners[owner].shared;
                        shared.handle_report(now, from, &observations);
                        while shared.poll_event().is_some() {}
                    }
                }
            }
            Happening::Lie(caller) => self.lie(caller),
            Happening::Tick => self.tick(),
        }
    }

    /// One call, tried elsewhere when it is refused before it reaches the instance.
    fn call(&mut self, caller: usize) {
        let mut tried = Vec::new();
        self.run.calls += 1;
        while tried.len() < TRIES_MAX.min(self.setting.instances) {
            let Some(instance) = self.pick(caller, &tried) else { break };
            tried.push(instance);
            let now = self.now;
            if self.way == Way::Shared {
                let Owner { shared, gate, view: seen } = &mut self.owners[instance];
                if shared.take_changed() {
                    *seen = view(shared, &self.service, self.setting.instances);
                }
                let InstanceKey { member, instance: id } = key(instance);
                if let Some(ejection) = seen.ejection(&member, &id) {
                    if !gate.passes(now, ejection, false) {
                        self.note_probe(caller, instance);
                        continue;
                    }
                    self.run.probes[instance].push(now.since(Moment::START));
                }
            }
            self.note_probe(caller, instance);
            let trial = self.callers[caller].breakers[instance].begin_probe(now);
            self.run.reached[instance].push(self.now.since(Moment::START));
            self.recent[instance].push(now);
            let second = Duration::from_secs(1);
            self.recent[instance].retain(|at| now.since(*at) < second);
            let load = self.recent[instance].len();
            let answer = (self.setting.answer)(instance, self.elapsed(), load);
            let is_broken = self.callers[caller].kind == Kind::Broken
                && self.elapsed() >= Duration::from_secs(10);
            let outcome = match is_broken || self.rng.random_bool(answer.failing) {
                true => answer.failure,
                false => Outcome::Success,
            };
            let ended = Happening::Ended { caller, instance, trial, outcome };
            self.schedule(answer.latency, ended);
            return;
        }
        self.note_failure(caller); // nobody took it
    }

    /// As an agent picks; of [`Way::PerClient`] at random among those that may be called.
    fn pick(&mut self, caller: usize, tried: &[usize]) -> Option<usize> {
        let now = self.now;
        if self.way == Way::PerClient {
            let all = (0..self.setting.instances).filter(|one| !tried.contains(one));
            let plain = &self.callers[caller].plain;
            let (ready, rest): (Vec<_>, Vec<_>) = all.partition(|one| plain[*one].1 <= now);
            let pool = if ready.is_empty() { rest } else { ready };
            return (!pool.is_empty()).then(|| pool[self.rng.random_range(0..pool.len())]);
        }
        let one = &mut self.callers[caller];
        if one.shared.take_changed() {
            one.view = view(&one.shared, &self.service, self.setting.instances);
        }
        let stance = |at: usize| {
            let (rank, share) = match one.breakers[at].admits(now) {
                _ if tried.contains(&at) => return Stance::NEVER,
                Admission::Pass => (Rank::Willing, WHOLE),
                Admission::Ramp(share) => (Rank::Willing, share),
                Admission::Probe => {
                    return Stance { rank: Rank::Willing, share: WHOLE, load: Load::TRIAL };
                }
                Admission::Refuse { .. } => (Rank::LastResort, WHOLE),
            };
            Stance { rank, share, load: Load { cost: 1.0, in_flight: 0 } }
        };
        let asked = mesh::Caller {
            stance: &stance,
            shares: &one.near,
            order: &Order::LeastLoad,
            now,
            heeds_others: self.way == Way::Shared,
            window: &|at| one.breakers[at].window(now),
            has_probed: &|at, ejection| {
                one.probed[at].is_some_and(|[probed_at, after]| {
                    after == ejection.tried_at && now.since(probed_at) < ejection.period
                })
            },
            nearness: &|at| Some(u8::from(!(self.setting.near)(caller, at))),
        };
        mesh::pick(&one.view, &asked, &mut self.rng).ok()
    }

    /// A caller takes its turn to probe, if it has one.
    fn note_probe(&mut self, caller: usize, instance: usize) {
        let one = &mut self.callers[caller];
        let verdict = &one.view.endpoints()[instance].verdict;
        if let Verdict::Ejected(ejection) = verdict
            && verdict.admits(self.now) == Admission::Probe
        {
            one.probed[instance] = Some([self.now, ejection.tried_at]);
        }
    }

    fn ended(&mut self, caller: usize, instance: usize, trial: Option<Trial>, outcome: Outcome) {
        let now = self.now;
        if outcome.is_failure() {
            self.note_failure(caller);
            let accusers = &mut self.accused_by[instance];
            accusers.push(caller);
            let mut distinct = accusers.clone();
            distinct.sort_unstable();
            distinct.dedup();
            let share = self.setting.callers.len() as f32 * self.setting.shared.quorum_share;
            let quorum = (share as usize + 1).max(self.setting.shared.quorum_min);
            if accusers.len() >= 6 && distinct.len() >= quorum {
                let at = now.since(Moment::START);
                self.run.quorum_at.entry(instance).or_insert(at);
            }
        }
        let one = &mut self.callers[caller];
        let (in_row, until) = &mut one.plain[instance];
        *in_row = if outcome.is_failure() { *in_row + 1 } else { 0 };
        if *in_row >= 5 {
            (*in_row, *until) = (0, now + Duration::from_secs(30));
        }
        one.breakers[instance].handle_outcome(now, trial, outcome);
        let event = one.breakers[instance].poll_event();
        self.run.opened += usize::from(matches!(event, Some(BreakerEvent::Opened { .. })));
        let window = one.breakers[instance].window(now);
        one.called[instance] = true;
        // As the proxy does it: a change at once, with all else that is new.
        let is_begun = outcome.is_failure() && window.first_failure_age == Some(Duration::ZERO);
        let verdict = one.shared.verdict(&key(instance));
        let is_asked = matches!(verdict, Verdict::Accused | Verdict::Ejected(_));
        if is_begun || event.is_some() || is_asked {
            self.give(caller);
        }
    }

    fn note_failure(&mut self, caller: usize) {
        self.run.failed += 1;
        if self.callers[caller].kind != Kind::Broken {
            self.run.honest_failed += 1;
        }
        self.run.failures.push(self.now.since(Moment::START));
    }

    /// Gives a caller's own windows that are new to its shared breaker.
    fn give(&mut self, caller: usize) {
        if self.way != Way::Shared || matches!(self.callers[caller].kind, Kind::Liar(..)) {
            return;
        }
        let now = self.now;
        let one = &mut self.callers[caller];
        let called =
            (0..self.setting.instances).filter(|one_of| std::mem::take(&mut one.called[*one_of]));
        let called: Vec<_> = called.collect();
        let windows = called.into_iter().map(|instance| OwnWindow {
            key: key(instance),
            service: self.service.clone(),
            window: one.breakers[instance].window(now),
            turned_away_at: None,
        });
        let windows: Vec<_> = windows.collect();
        one.shared.handle_windows(now, windows);
        self.drain(caller);
    }

    fn drain(&mut self, caller: usize) {
        let one = &mut self.callers[caller];
        while let Some(event) = one.shared.poll_event() {
            let at = self.now.since(Moment::START);
            match event {
                _ if matches!(one.kind, Kind::Liar(..)) => {}
                SharedEvent::Instance { key, change: InstanceChange::Ejected(_), .. } => {
                    let instance = usize::from(key.member.as_bytes()[0]);
                    self.run.ejected.push((at, caller, instance));
                }
                SharedEvent::Failing { is_failing, .. } => {
                    self.run.failing.push((at, caller, is_failing));
                }
                _ => {}
            }
        }
        while let Some(observations) = self.callers[caller].shared.poll_report(self.now) {
            self.spread(caller, &observations);
        }
    }

    fn spread(&mut self, from: usize, observations: &Observations) {
        self.run.reported.push(self.elapsed());
        let (least, most) = self.setting.news;
        for to in (0..self.callers.len() + self.owners.len()).filter(|to| *to != from) {
            let after = self.news_rng.random_range(least..=most);
            let observations = observations.clone();
            self.schedule(after, Happening::News { from: caller_id(from), to, observations });
        }
    }

    /// What a liar says of its own accord.
    fn lie(&mut self, caller: usize) {
        let Kind::Liar(named, manner) = self.callers[caller].kind else { return };
        match manner {
            Manner::Joining => {}
            Manner::Redating if self.elapsed().as_secs().is_multiple_of(3) => {
                self.accuse(caller, []);
            }
            Manner::Marching => {
                let step = (self.elapsed() - self.setting.lies_from).as_secs() as usize / 15;
                let from = step * named % self.setting.instances;
                self.accuse(caller, from..(from + named).min(self.setting.instances));
            }
            _ => self.accuse(caller, 0..named),
        }
        self.schedule(manner.pause(), Happening::Lie(caller));
    }

    /// What a liar says when it hears others.
    fn lie_about(&mut self, caller: usize, from: MemberId, heard: &Observations) {
        let Kind::Liar(accused, manner) = self.callers[caller].kind else { return };
        let is_honest = |number: usize| {
            caller_id(number) == from && !matches!(self.callers[number].kind, Kind::Liar(..))
        };
        let is_early = self.elapsed() < self.setting.lies_from
            || self.now.since(self.callers[caller].lied_at) < LIE_PAUSE;
        if is_early || !(0..self.callers.len()).any(is_honest) {
            return;
        }
        let instance = |window: &ObservedWindow| usize::from(window.member.as_bytes()[0]);
        let said = |is_failing| {
            let windows = heard.windows.iter().filter(move |one| (one.failures > 0) == is_failing);
            windows.map(instance).filter(|one| *one < accused).collect::<Vec<_>>()
        };
        match manner {
            Manner::Renewing if !said(false).is_empty() => self.accuse(caller, 0..accused),
            Manner::Joining if !said(true).is_empty() => self.accuse(caller, said(true)),
            Manner::Vouching if !said(true).is_empty() => self.accuse(caller, 0..accused),
            _ => {}
        }
    }

    /// Says the worst that one report can say; or the best, where it vouches.
    fn accuse(&mut self, caller: usize, named: impl IntoIterator<Item = usize>) {
        self.callers[caller].lied_at = self.now;
        let Kind::Liar(_, manner) = self.callers[caller].kind else { return };
        let is_vouching = manner == Manner::Vouching;
        let is_old = matches!(manner, Manner::Misdating | Manner::Backdating | Manner::Redating);
        let windows = named.into_iter().map(|instance| ObservedWindow {
            member: key(instance).member,
            instance: key(instance).instance,
            samples: 1_000,
            failures: if is_vouching { 0 } else { 1_000 },
            first_failure_age_ms: (!is_vouching).then_some(if is_old { 3_600_000 } else { 0 }),
            last_failure_age_ms: (!is_vouching).then_some(0),
            last_success_age_ms: is_vouching.then_some(0),
        });
        let windows: Vec<_> = windows.collect();
        let accused = if is_vouching { 0 } else { windows.len() as u16 };
        // Half of what it calls: one more, and nobody would believe it.
        let calls = vec![self.service.clone()];
        let told = BEGAN_AT_MS + self.elapsed().as_millis() as u64;
        let second = self.elapsed().as_secs();
        let signed_at_ms = match manner {
            Manner::Misdating => told + second % 7 * 20_000,
            Manner::Redating if accused > 0 => told - (3 + second / 3 % 7) * 1_000,
            _ => told,
        };
        let signed_at_ms = Some(signed_at_ms);
        let lie = Observations { calls, called: 2 * accused, accused, windows, signed_at_ms };
        self.spread(caller, &lie);
    }

    fn tick(&mut self) {
        let now = self.now;
        for caller in 0..self.callers.len() {
            if self.way != Way::Shared {
                break;
            }
            if now.since(self.callers[caller].told_at) >= Duration::from_secs(1) {
                self.callers[caller].told_at = now;
                self.give(caller);
            }
            let shared = &mut self.callers[caller].shared;
            if shared.poll_timeout().is_some_and(|at| at <= now) {
                shared.handle_timeout(now);
                self.drain(caller);
            }
        }
        for Owner { shared, .. } in &mut self.owners {
            if shared.poll_timeout().is_some_and(|at| at <= now) {
                shared.handle_timeout(now);
                while shared.poll_event().is_some() {}
            }
        }
        self.schedule(TICK, Happening::Tick);
    }
}
