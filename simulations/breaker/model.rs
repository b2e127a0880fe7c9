//! Callers and instances in virtual time. Each caller has the real local breakers and the real shared
//! one; each instance has its agent before it, with the real gate. News takes the time that was
//! measured. Only choosing is simpler than in an agent: at random among those that may be called.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use murmesh::breaker::{
    Admission, Breaker, BreakerConfig, BreakerEvent, InstanceChange, InstanceKey, OwnWindow,
    ProbeGate, SharedBreaker, SharedConfig, SharedEvent, Verdict,
};
use murmesh::model::{MemberId, Moment, Observations, ObservedWindow, Outcome, ServiceName};

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

/// How an instance answers at a time of the run: the share that fails, and after how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answer {
    pub(super) failing: f64,
    pub(super) latency: Duration,
}

impl Answer {
    pub(super) const WELL: Self = Self { failing: 0.0, latency: Duration::from_millis(5) };
    pub(super) const DEAD: Self = Self { failing: 1.0, latency: Duration::from_millis(5) };

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
    /// From 10 s on it says that the first so many instances fail, whatever it sees: all of 1,000
    /// calls, the last one now.
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
}

impl Manner {
    pub(super) const ALL: [Self; 4] = [Self::Steady, Self::Renewing, Self::Striking, Self::Joining];

    const fn pause(self) -> Duration {
        match self {
            Self::Steady | Self::Renewing | Self::Joining => Duration::from_secs(1),
            Self::Striking => Duration::from_secs(7),
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
    pub(super) length: Duration,
    pub(super) answer: Behaviour,
    /// How long news takes from one member to another: from, to.
    pub(super) news: (Duration, Duration),
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
            length: Duration::from_secs(60),
            answer,
            news: (Duration::from_millis(5), Duration::from_millis(100)),
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
    pub(super) reports: usize,
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
        self.failures.iter().filter(|at| (from..to).contains(&at.as_secs_f64())).count()
    }
}

struct Caller {
    kind: Kind,
    shared: SharedBreaker,
    breakers: Vec<Breaker>,
    /// Of [`Way::PerClient`]: failures in a row, and ejected until.
    plain: Vec<(u32, Moment)>,
    /// When it probed last for the mesh.
    probed_at: Vec<Option<Moment>>,
    called: Vec<bool>,
    told_at: Moment,
    lied_at: Moment,
}

enum Happening {
    Call(usize),
    Ended { caller: usize, instance: usize, outcome: Outcome },
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
    owners: Vec<(SharedBreaker, ProbeGate)>,
    accused_by: Vec<Vec<usize>>,
    recent: Vec<Vec<Moment>>,
    service: ServiceName,
    run: Run,
}

const TICK: Duration = Duration::from_millis(20);
const TRIES_MAX: usize = 3;

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
            let mut shared = SharedBreaker::new(setting.shared.clone(), id, seed);
            for instance in 0..setting.instances {
                let InstanceKey { member, instance } = key(instance);
                shared.set_instances(member, [(instance, service.clone())]);
            }
            shared
        };
        let mut rng = StdRng::seed_from_u64(seed);
        let callers = setting.callers.iter().enumerate().map(|(number, kind)| Caller {
            kind: *kind,
            shared: shared(caller_id(number), rng.random()),
            breakers: (0..setting.instances)
                .map(|_| Breaker::new(&setting.breaker, rng.random()))
                .collect(),
            plain: vec![(0, Moment::START); setting.instances],
            probed_at: vec![None; setting.instances],
            called: vec![false; setting.instances],
            told_at: Moment::from_nanos(rng.random_range(0..1_000_000_000)),
            lied_at: Moment::START,
        });
        let callers: Vec<_> = callers.collect();
        let owners = (0..setting.instances)
            .map(|instance| (shared(key(instance).member, instance as u64), ProbeGate::default()));
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
                reports: 0,
                opened: 0,
                quorum_at: BTreeMap::new(),
            },
        };
        for caller in 0..world.callers.len() {
            let first = Duration::from_secs_f64(world.rng.random_range(0.0..1.0) / setting.rate);
            world.schedule(first, Happening::Call(caller));
            if let Kind::Liar(..) = world.callers[caller].kind {
                world.schedule(Duration::from_secs(10), Happening::Lie(caller));
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
                let pause = self.rng.random_range(0.5..1.5) / self.setting.rate;
                self.schedule(Duration::from_secs_f64(pause), Happening::Call(caller));
            }
            Happening::Ended { caller, instance, outcome } => {
                self.ended(caller, instance, outcome);
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
                        let (shared, _) = &mut self.owners[owner];
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
            let Some((instance, is_probe)) = self.pick(caller, &tried) else { break };
            tried.push(instance);
            let now = self.now;
            let (shared, gate) = &mut self.owners[instance];
            if self.way == Way::Shared && !shared.is_failing(&self.service) {
                let verdict = shared.verdict(&key(instance));
                let holds = !shared.is_panic(&self.service);
                if let Some(ejection) = verdict.ejection().filter(|_| holds) {
                    if !gate.passes(now, ejection, false) {
                        continue;
                    }
                    self.run.probes[instance].push(now.since(Moment::START));
                }
            }
            if is_probe {
                self.callers[caller].probed_at[instance] = Some(now);
            }
            self.callers[caller].breakers[instance].begin_probe(now);
            self.run.reached[instance].push(self.now.since(Moment::START));
            self.recent[instance].push(now);
            let second = Duration::from_secs(1);
            self.recent[instance].retain(|at| now.since(*at) < second);
            let load = self.recent[instance].len();
            let answer = (self.setting.answer)(instance, self.elapsed(), load);
            let is_broken = self.callers[caller].kind == Kind::Broken
                && self.elapsed() >= Duration::from_secs(10);
            let outcome = match is_broken || self.rng.random_bool(answer.failing) {
                true => Outcome::Failed,
                false => Outcome::Success,
            };
            let ended = Happening::Ended { caller, instance, outcome };
            self.schedule(answer.latency, ended);
            return;
        }
        self.note_failure(caller); // nobody took it
    }

    /// A probe first, then at random among those that may be called, then among the rest.
    fn pick(&mut self, caller: usize, tried: &[usize]) -> Option<(usize, bool)> {
        let now = self.now;
        let (mut ready, mut rest) = (Vec::new(), Vec::new());
        let one = &self.callers[caller];
        let ignores = self.way != Way::Shared
            || one.shared.is_failing(&self.service)
            || one.shared.is_panic(&self.service);
        for instance in (0..self.setting.instances).filter(|one| !tried.contains(one)) {
            if self.way == Way::PerClient {
                let is_ready = one.plain[instance].1 <= now;
                if is_ready {
                    ready.push(instance)
                } else {
                    rest.push(instance)
                }
                continue;
            }
            let breaker = &one.breakers[instance];
            if !ignores {
                let verdict = one.shared.verdict(&key(instance));
                let admission = verdict.admits(now);
                let own = breaker.window(now);
                if let Verdict::Ejected(ejection) = &verdict
                    && !verdict.is_vetoed_by(now, &own)
                {
                    let is_due = one.probed_at[instance].is_none_or(|at| at <= ejection.tried_at);
                    if admission == Admission::Probe && is_due {
                        return Some((instance, true));
                    }
                    rest.push(instance);
                    continue;
                }
                if let Admission::Ramp(share) = admission
                    && self.rng.random_range(0..1_000) >= share
                {
                    rest.push(instance);
                    continue;
                }
            }
            match breaker.admits(now) {
                Admission::Pass => ready.push(instance),
                Admission::Ramp(share) if self.rng.random_range(0..1_000) < share => {
                    ready.push(instance);
                }
                Admission::Probe => return Some((instance, false)),
                _ => rest.push(instance),
            }
        }
        let pool = if ready.is_empty() { rest } else { ready };
        (!pool.is_empty()).then(|| (pool[self.rng.random_range(0..pool.len())], false))
    }

    fn ended(&mut self, caller: usize, instance: usize, outcome: Outcome) {
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
        one.breakers[instance].handle_outcome(now, outcome);
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
        });
        let windows: Vec<_> = windows.collect();
        one.shared.handle_windows(now, windows);
        self.drain(caller);
    }

    fn drain(&mut self, caller: usize) {
        let one = &mut self.callers[caller];
        while let Some(event) = one.shared.poll_event() {
            let SharedEvent::Instance { key, change, .. } = event else { continue };
            if matches!(change, InstanceChange::Ejected(_)) && !matches!(one.kind, Kind::Liar(..)) {
                let instance = usize::from(key.member.as_bytes()[0]);
                let at = self.now.since(Moment::START);
                self.run.ejected.push((at, caller, instance));
            }
        }
        while let Some(observations) = self.callers[caller].shared.poll_report(self.now) {
            self.spread(caller, &observations);
        }
    }

    fn spread(&mut self, from: usize, observations: &Observations) {
        self.run.reports += 1;
        let (least, most) = self.setting.news;
        for to in (0..self.callers.len() + self.owners.len()).filter(|to| *to != from) {
            let after = self.news_rng.random_range(least..=most);
            let observations = observations.clone();
            self.schedule(after, Happening::News { from: caller_id(from), to, observations });
        }
    }

    /// What a liar says of its own accord.
    fn lie(&mut self, caller: usize) {
        let Kind::Liar(accused, manner) = self.callers[caller].kind else { return };
        if manner != Manner::Joining {
            self.accuse(caller, 0..accused);
        }
        self.schedule(manner.pause(), Happening::Lie(caller));
    }

    /// What a liar says when it hears others.
    fn lie_about(&mut self, caller: usize, from: MemberId, heard: &Observations) {
        let Kind::Liar(accused, manner) = self.callers[caller].kind else { return };
        let is_honest = |number: usize| {
            caller_id(number) == from && !matches!(self.callers[number].kind, Kind::Liar(..))
        };
        let is_early = self.elapsed() < Duration::from_secs(10)
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
            _ => {}
        }
    }

    /// Says the worst that one report can say.
    fn accuse(&mut self, caller: usize, accused: impl IntoIterator<Item = usize>) {
        self.callers[caller].lied_at = self.now;
        let windows = accused.into_iter().map(|instance| ObservedWindow {
            member: key(instance).member,
            instance: key(instance).instance,
            samples: 1_000,
            failures: 1_000,
            first_failure_age_ms: Some(0),
            last_failure_age_ms: Some(0),
            last_success_age_ms: None,
        });
        let windows: Vec<_> = windows.collect();
        let accused = windows.len() as u16;
        // Half of what it calls: one more, and nobody would believe it.
        let calls = vec![self.service.clone()];
        self.spread(caller, &Observations { calls, called: 2 * accused, accused, windows });
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
        for (shared, _) in &mut self.owners {
            if shared.poll_timeout().is_some_and(|at| at <= now) {
                shared.handle_timeout(now);
                while shared.poll_event().is_some() {}
            }
        }
        self.schedule(TICK, Happening::Tick);
    }
}
