//! The breaker that all callers share: what others observed, weighed.
//!
//! Callers tell each other counts, not verdicts; each node judges for itself, by the same rules:
//!
//! 1. A caller accuses an instance while failures outweigh in its calls to it, from the first failure on.
//! 2. An instance is *accused* once a quorum of the service's callers accuse it, with a least number of
//!    failures together. Callers that saw a success since the first of these failures say so, once.
//! 3. After the time for rebuttal it is *ejected* if the pooled share of failures of all who spoke reaches
//!    the ratio; few samples of each count, so that nobody's voice is louder for being busy.
//! 4. Who condemns most of what it calls counts nothing. When more than half of a service is accused, the
//!    service is failing, and nobody is ejected. The last instance is never ejected.
//! 5. An ejected instance is tried by one caller per period; whose turn it is follows from a hash, and the
//!    agent in front of it lets no more than one pass. A success puts it on a ramp, a failure doubles
//!    the period.
//! 6. Panic, while more than half of a service are ejected: readers ignore these verdicts.
//!
//! Once a quorum accuses, others keep quiet. A caller whose accusations come to nothing needs more
//! failures for the next, so that a service with some errors does not fill the mesh with reports.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::case::{Case, Stage};
use super::grounds::{Bench, Scale};
use super::report::{Report, Seen};
use super::{Ejection, Grounds, InstanceKey, OwnWindow, SharedConfig, Turn, Verdict, turn};
use crate::model::{InstanceId, MemberId, Moment, Observations, ServiceName, StoreSize};

/// How long a member counts as a caller after its last call.
const CALLER_FOR: Duration = Duration::from_secs(60);

/// Reports at once, and the time after which there may be one more.
const BURST_MAX: u32 = 3;
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause of a rebuttal, so that a few speak and others see that it suffices.
const REBUTTAL_JITTER: Duration = Duration::from_millis(100);

/// How often what depends on time alone is looked at while there is a case.
const TICK: Duration = Duration::from_secs(1);

/// How long a futile accusation makes a caller more careful.
const FUTILE_FOR: Duration = Duration::from_secs(60);

/// Failures that the most careful caller needs.
const CARE_MAX: u16 = 5;

/// Most cases at a time; beyond, an accusation waits. Only instances that members' records name can
/// have one.
const CASES_MAX: usize = 4096;

/// Something that the shared breaker decided or wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SharedEvent {
    /// A quorum accuses an instance: give this node's own window of it, if it has one.
    WindowWanted(InstanceKey),
    /// An instance was ejected.
    Ejected {
        /// Which.
        key: InstanceKey,
        /// Why.
        grounds: Arc<Grounds>,
    },
    /// The accusation of an instance was outweighed, before or after it was ejected.
    Dismissed(InstanceKey),
    /// An ejected instance has answered: its share grows from now on.
    Returning {
        /// Which.
        key: InstanceKey,
        /// Who saw it.
        by: MemberId,
    },
    /// An instance is back for good.
    Returned(InstanceKey),
    /// More than half of a service fails, or no more.
    Failing {
        /// Which.
        service: ServiceName,
        /// Whether it does now.
        is_failing: bool,
    },
    /// Too many of a service are ejected to believe it, or no more.
    Panic {
        /// Which.
        service: ServiceName,
        /// Whether it is so now.
        is_panic: bool,
    },
}

/// What the callers of all instances hold of them together, at one node. Pure.
///
/// Invariants, which tests name:
/// - one caller alone ejects nothing, whatever it says;
/// - the last instance of a service is never ejected;
/// - nothing is ejected while its service is failing.
#[derive(Debug)]
pub struct SharedBreaker {
    config: SharedConfig,
    id: MemberId,
    /// Instances that want work, by service. Bounded by the members' records.
    services: BTreeMap<ServiceName, Service>,
    /// What each offers. Bounded by the members' records.
    served: BTreeMap<MemberId, BTreeMap<InstanceId, ServiceName>>,
    /// This node's own calls, and when each window was given. Bounded by `served`.
    own: Report,
    /// When this node called a service last. At most [`Observations::CALLS_MAX`].
    called_at: BTreeMap<ServiceName, Moment>,
    /// Who calls a service, this node included. Bounded by what all reports say.
    callers: BTreeMap<ServiceName, Vec<MemberId>>,
    /// The latest word of each other member. Bounded by the members.
    reports: BTreeMap<MemberId, Report>,
    /// At most [`CASES_MAX`].
    cases: BTreeMap<InstanceKey, Case>,
    voice: Voice,
    events: VecDeque<SharedEvent>,
    tick_at: Option<Moment>,
    /// When all cases were last looked at.
    judged_at: Moment,
    is_changed: bool,
}

#[derive(Clone, Debug, Default)]
struct Service {
    instances: BTreeSet<InstanceKey>,
    is_failing: bool,
    /// Until when it was failing as a whole: what was seen before says nothing about one instance.
    failed_until: Option<Moment>,
    panic_since: Option<Moment>,
}

/// What this node tells the others, and how often.
#[derive(Debug)]
struct Voice {
    said: BTreeMap<InstanceKey, Seen>,
    said_calls: BTreeSet<ServiceName>,
    has_condemned: bool,
    /// Whether an accusation that was said has ended.
    takes_back: bool,
    tokens: u32,
    refilled_at: Moment,
    due_at: Option<Moment>,
    /// Accusations that came to nothing, and when the last one did. Bounded by `served`.
    futile: BTreeMap<InstanceKey, (u16, Moment)>,
    seed: u64,
}

impl SharedBreaker {
    /// Of the node `id`. `seed` makes its pauses differ from those of others.
    pub fn new(config: SharedConfig, id: MemberId, seed: u64) -> Self {
        Self {
            config,
            id,
            services: BTreeMap::new(),
            served: BTreeMap::new(),
            own: Report::default(),
            called_at: BTreeMap::new(),
            callers: BTreeMap::new(),
            reports: BTreeMap::new(),
            cases: BTreeMap::new(),
            voice: Voice {
                said: BTreeMap::new(),
                said_calls: BTreeSet::new(),
                has_condemned: false,
                takes_back: false,
                tokens: BURST_MAX,
                refilled_at: Moment::START,
                due_at: None,
                futile: BTreeMap::new(),
                seed,
            },
            events: VecDeque::new(),
            tick_at: None,
            judged_at: Moment::START,
            is_changed: false,
        }
    }

    /// Says which instances of a member want work; of all others that it had before nothing is known
    /// any more.
    pub fn set_instances(
        &mut self,
        member: MemberId,
        instances: impl IntoIterator<Item = (InstanceId, ServiceName)>,
    ) {
        let offered: BTreeMap<InstanceId, ServiceName> = instances.into_iter().collect();
        let before = self.served.get(&member).cloned().unwrap_or_default();
        for (instance, service) in before {
            if offered.get(&instance) != Some(&service) {
                self.forget(&InstanceKey { member, instance });
            }
        }
        for (instance, service) in &offered {
            let key = InstanceKey { member, instance: instance.clone() };
            self.services.entry(service.clone()).or_default().instances.insert(key);
        }
        if offered.is_empty() {
            self.served.remove(&member);
        } else {
            self.served.insert(member, offered);
        }
    }

    /// Takes what this node's own calls saw. Give an instance's window when a stretch of failures
    /// begins, when its breaker opens or a probe ends, when [`SharedEvent::WindowWanted`] asks for it,
    /// and each second those of instances that were called.
    pub fn handle_windows(&mut self, now: Moment, windows: impl IntoIterator<Item = OwnWindow>) {
        let mut touched = Vec::new();
        for OwnWindow { key, service, window } in windows {
            if self.service_of(&key) != Some(&service) {
                continue; // it has gone meanwhile
            }
            let seen = Seen::of(now, &window);
            if self.called_at.contains_key(&service)
                || self.called_at.len() < Observations::CALLS_MAX
            {
                self.called_at.insert(service, now);
            }
            self.note_futile(now, &key, &seen);
            self.own.windows.insert(key.clone(), seen);
            touched.push(key);
        }
        let window = self.config.window;
        self.own.windows.retain(|_, seen| seen.is_fresh(now, Moment::START, window));
        let accused = self.own.windows.values().filter(|seen| seen.is_accusing()).count();
        self.own.called = u16::try_from(self.own.windows.len()).unwrap_or(u16::MAX);
        self.own.accused = u16::try_from(accused).unwrap_or(u16::MAX);
        if !self.own.calls.iter().eq(self.called_at.keys()) {
            self.own.calls = self.called_at.keys().cloned().collect();
            self.count_callers();
        }
        for key in touched {
            self.judge(now, &key);
        }
        self.speak(now);
    }

    /// Takes another member's word.
    pub fn handle_report(&mut self, now: Moment, from: MemberId, observations: &Observations) {
        if from == self.id {
            return;
        }
        let report = Report::heard(now, observations);
        let keys: Vec<_> = report.windows.keys().cloned().collect();
        let calls = report.calls.clone();
        let before = self.reports.insert(from, report);
        if before.is_none_or(|before| before.calls != calls) {
            self.count_callers();
        }
        for key in keys {
            self.judge(now, &key);
        }
        self.speak(now);
    }

    /// A member is down or gone: it has no voice any more.
    pub fn forget_caller(&mut self, member: MemberId) {
        if self.reports.remove(&member).is_some() {
            self.count_callers();
        }
    }

    /// The deadline of [`SharedBreaker::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Moment) {
        let is_due = self.deadlines().into_iter().flatten().any(|at| at <= now);
        if !is_due {
            return;
        }
        self.judged_at = now;
        self.called_at.retain(|_, at| now.since(*at) < CALLER_FOR);
        let keys: Vec<_> = self.cases.keys().cloned().collect();
        for key in keys {
            self.judge(now, &key);
        }
        let troubled = |service: &Service| service.is_failing || service.panic_since.is_some();
        let services = self.services.iter().filter(|(_, one)| troubled(one));
        let services: Vec<_> = services.map(|(name, _)| name.clone()).collect();
        for service in services {
            self.look_at(now, &service);
        }
        let is_busy = !self.cases.is_empty() || self.services.values().any(troubled);
        self.tick_at = is_busy.then_some(now + TICK);
        self.speak(now);
    }

    /// When to call [`SharedBreaker::handle_timeout`] at the latest.
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.deadlines().into_iter().flatten().min()
    }

    /// The next report of this node, to be signed and spread.
    pub fn poll_report(&mut self, now: Moment) -> Option<Observations> {
        self.voice.refill(now);
        if self.voice.tokens == 0 || self.voice.due_at.is_none_or(|at| at > now) {
            return None;
        }
        self.voice.due_at = None;
        let said = self.worth_saying(now);
        let is_news =
            !said.is_empty() || self.voice.takes_back || self.own.calls != self.voice.said_calls;
        if !is_news {
            return None; // what was to be said is not so any more
        }
        for key in said.keys() {
            if let Some(case) = self.cases.get_mut(key) {
                case.has_rebutted |= said.get(key).is_some_and(|seen| !seen.is_accusing());
            }
        }
        self.voice.tokens -= 1;
        let windows = said.iter().map(|(key, seen)| seen.observed(now, key)).collect();
        self.voice.said = said;
        self.voice.said_calls = self.own.calls.clone();
        self.voice.has_condemned = self.own.condemns();
        self.voice.takes_back = false;
        Some(Observations {
            calls: self.own.calls.iter().cloned().collect(),
            called: self.own.called,
            accused: self.own.accused,
            windows,
        })
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<SharedEvent> {
        self.events.pop_front()
    }

    /// Whether a verdict, or what is said of a service, may differ from when this was last asked.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.is_changed)
    }

    /// What is held of an instance.
    pub fn verdict(&self, key: &InstanceKey) -> Verdict {
        let Some(case) = self.cases.get(key) else { return Verdict::Clear };
        match &case.stage {
            Stage::Watched { .. } => Verdict::Clear,
            Stage::Accused { .. } => Verdict::Accused,
            Stage::Returning { since, grounds } => Verdict::Probing {
                since: *since,
                ramp: self.config.ramp,
                grounds: Arc::clone(grounds),
            },
            Stage::Ejected { since, tried_at, grounds } => {
                let period = case.period(&self.config);
                let callers = self.service_of(key).map(|service| self.callers(service));
                let callers = callers.unwrap_or_default();
                let place = turn::place(self.id, key, case.relapses, callers);
                let turn = place.map(|place| Turn {
                    from: *tried_at + period + self.config.turn.saturating_mul(place),
                    length: self.config.turn,
                    every: self.config.turn.saturating_mul(callers.len() as u32),
                });
                Verdict::Ejected(Ejection {
                    since: *since,
                    tried_at: *tried_at,
                    period,
                    turn,
                    anyone_at: *tried_at + self.config.period_max.max(period),
                    grounds: Arc::clone(grounds),
                })
            }
        }
    }

    /// Whether more than half of a service fails: nothing of it is ejected, retries help nobody.
    pub fn is_failing(&self, service: &ServiceName) -> bool {
        self.services.get(service).is_some_and(|service| service.is_failing)
    }

    /// Whether too many of a service are ejected to believe it.
    pub fn is_panic(&self, service: &ServiceName) -> bool {
        self.services.get(service).is_some_and(|service| service.panic_since.is_some())
    }

    /// Whether this member's word is known.
    pub fn has_heard(&self, member: MemberId) -> bool {
        self.reports.contains_key(&member)
    }

    /// How many members' words are known; bounded by whoever forgets those that are gone.
    pub fn heard(&self) -> usize {
        self.reports.len()
    }

    /// How full the store of cases is.
    pub fn cases_size(&self) -> StoreSize {
        StoreSize::new("accused instances", self.cases.len(), CASES_MAX)
    }

    fn deadlines(&self) -> [Option<Moment>; 3] {
        let decide = self.cases.values().flat_map(|case| match case.stage {
            Stage::Accused { since } => {
                [Some(since + self.config.rebuttal_short), Some(since + self.config.rebuttal)]
            }
            _ => [None, None],
        });
        let decide = decide.flatten().filter(|at| *at > self.judged_at).min();
        let report = self.voice.due_at.map(|at| match self.voice.tokens {
            0 => at.max(self.voice.refilled_at + REPORT_PAUSE),
            _ => at,
        });
        [decide, report, self.tick_at]
    }

    fn service_of(&self, key: &InstanceKey) -> Option<&ServiceName> {
        self.served.get(&key.member)?.get(&key.instance)
    }

    fn forget(&mut self, key: &InstanceKey) {
        let known = self.served.get_mut(&key.member);
        let Some(service) = known.and_then(|known| known.remove(&key.instance)) else { return };
        self.own.windows.remove(key);
        self.voice.futile.remove(key);
        self.is_changed |= self.cases.remove(key).is_some();
        if let Some(known) = self.services.get_mut(&service) {
            known.instances.remove(key);
            if known.instances.is_empty() {
                self.services.remove(&service);
            }
        }
    }

    fn count_callers(&mut self) {
        self.callers.clear();
        let others = self.reports.iter().map(|(member, report)| (*member, report));
        for (member, report) in others.chain([(self.id, &self.own)]) {
            for service in &report.calls {
                self.callers.entry(service.clone()).or_default().push(member);
            }
        }
    }

    /// The members that call a service, this one included if it does.
    fn callers(&self, service: &ServiceName) -> &[MemberId] {
        self.callers.get(service).map_or(&[], Vec::as_slice)
    }

    /// Weighs what is said of an instance.
    fn weigh(&self, now: Moment, key: &InstanceKey, bench: Bench) -> Grounds {
        self.scale(key, bench).weigh(now, key, self.words())
    }

    fn words(&self) -> impl Iterator<Item = (MemberId, &Report)> {
        let others = self.reports.iter().map(|(member, report)| (*member, report));
        others.chain([(self.id, &self.own)])
    }

    fn scale(&self, key: &InstanceKey, bench: Bench) -> Scale<'_> {
        let service = self.service_of(key);
        let callers = service.map_or(0, |service| self.callers(service).len());
        let failed_until = service.and_then(|service| self.services.get(service)?.failed_until);
        let case = self.cases.get(key);
        let since = case.map_or(Moment::START, Case::since);
        let since = failed_until.map_or(since, |at| at.max(since));
        let onset = case.map(|case| case.onset).filter(|at| *at >= since);
        Scale { config: &self.config, callers, since, onset, bench }
    }

    /// Looks again at one instance.
    fn judge(&mut self, now: Moment, key: &InstanceKey) {
        let Some(service) = self.service_of(key).cloned() else { return };
        let case = self.cases.get(key).cloned();
        let next = match &case {
            None => self.judge_new(now, key),
            Some(case) => match &case.stage {
                Stage::Accused { since } => self.judge_accused(now, key, &service, case, *since),
                Stage::Ejected { since, tried_at, grounds } => {
                    self.judge_ejected(now, key, case, [*since, *tried_at], grounds)
                }
                Stage::Returning { .. } | Stage::Watched { .. } => {
                    self.judge_returning(now, key, &service, case)
                }
            },
        };
        if let Some(next) = next {
            match next {
                Some(case) => self.cases.insert(key.clone(), case),
                None => self.cases.remove(key),
            };
            self.is_changed = true;
            self.tick_at.get_or_insert(now + TICK);
            self.look_at(now, &service);
        }
    }

    /// The outer `None`: as before. The inner one: no case.
    fn judge_new(&mut self, now: Moment, key: &InstanceKey) -> Option<Option<Case>> {
        let all = self.weigh(now, key, Bench::All);
        if !all.has_quorum(&self.config) || self.cases.len() >= CASES_MAX {
            return None;
        }
        self.events.push_back(SharedEvent::WindowWanted(key.clone()));
        Some(Some(Case::new(now, all.first_failure_at)))
    }

    fn judge_accused(
        &mut self,
        now: Moment,
        key: &InstanceKey,
        service: &ServiceName,
        case: &Case,
        since: Moment,
    ) -> Option<Option<Case>> {
        let all = self.weigh(now, key, Bench::All);
        if !all.has_quorum(&self.config) {
            return Some(None);
        }
        self.look_at(now, service); // what was said while it failed as a whole counts nothing
        let grounds = self.weigh(now, key, Bench::Credible);
        if now.since(since) < self.rebuttal(&grounds) {
            return None;
        }
        let is_late = now.since(since) >= self.config.rebuttal;
        if self.is_well_here(key, case) || (is_late && !all.is_carried(&self.config)) {
            let stage = Stage::Watched { since: now };
            let dismissals = case.dismissals + 1;
            self.events.push_back(SharedEvent::Dismissed(key.clone()));
            return Some(Some(Case { stage, dismissals, ..case.clone() }));
        }
        if !grounds.is_carried(&self.config) || !self.may_eject(now, service, key) {
            return None;
        }
        Some(Some(self.eject(now, key, case, grounds)))
    }

    fn judge_ejected(
        &mut self,
        now: Moment,
        key: &InstanceKey,
        case: &Case,
        [since, tried_at]: [Moment; 2],
        grounds: &Arc<Grounds>,
    ) -> Option<Option<Case>> {
        // Words of the time of the accusation may still come in.
        let again = self.weigh(now, key, Bench::Credible);
        let is_open = now.since(since) < self.config.rebuttal;
        if is_open && again.has_quorum(&self.config) && !again.is_carried(&self.config) {
            self.events.push_back(SharedEvent::Dismissed(key.clone()));
            let stage = Stage::Watched { since: now };
            let dismissals = case.dismissals + 1;
            return Some(Some(Case { stage, dismissals, ..case.clone() }));
        }
        let period = case.period(&self.config);
        let probed_from = tried_at + period / 2;
        let said = || {
            let all = self.credible();
            all.filter_map(|(member, report)| Some((member, *report.windows.get(key)?)))
        };
        let well = said().find(|(_, seen)| seen.is_well_after(probed_from));
        let is_ill = |seen: &Seen| seen.last_failure_at.is_some_and(|at| at > probed_from);
        let is_relapse = said().any(|(_, seen)| is_ill(&seen));
        if let Some((by, _)) = well {
            self.events.push_back(SharedEvent::Returning { key: key.clone(), by });
            let stage = Stage::Returning { since: now, grounds: Arc::clone(grounds) };
            return Some(Some(Case { stage, is_witness: by == self.id, ..case.clone() }));
        }
        if !is_relapse {
            return None;
        }
        let mut next = Case { relapses: case.relapses + 1, ..case.clone() };
        if let Stage::Ejected { tried_at, .. } = &mut next.stage {
            *tried_at = now;
        }
        Some(Some(next))
    }

    fn judge_returning(
        &mut self,
        now: Moment,
        key: &InstanceKey,
        service: &ServiceName,
        case: &Case,
    ) -> Option<Option<Case>> {
        let grounds = self.weigh(now, key, Bench::Credible);
        if let Stage::Returning { since, .. } = case.stage {
            // A tenth of the calls makes a tenth of the evidence: less has to do.
            let is_relapse = grounds.accusers >= self.config.quorum_min
                && f32::from(grounds.share) >= self.config.ratio * 1_000.0;
            if is_relapse && self.may_eject(now, service, key) {
                return Some(Some(self.eject(now, key, case, grounds)));
            }
            if now.since(since) < self.config.ramp {
                return None;
            }
            self.events.push_back(SharedEvent::Returned(key.clone()));
            return Some(Some(Case { stage: Stage::Watched { since: now }, ..case.clone() }));
        }
        let is_heard = now.since(case.since()) >= case.deafness(&self.config);
        if grounds.is_crowd(&self.config) || (is_heard && grounds.has_quorum(&self.config)) {
            let stage = Stage::Accused { since: now };
            self.events.push_back(SharedEvent::WindowWanted(key.clone()));
            let onset = grounds.first_failure_at;
            return Some(Some(Case { stage, onset, has_rebutted: false, ..case.clone() }));
        }
        let memory = case.period(&self.config).max(case.deafness(&self.config) * 2);
        (now.since(case.since()) >= memory).then_some(None)
    }

    fn eject(&mut self, now: Moment, key: &InstanceKey, case: &Case, grounds: Grounds) -> Case {
        let testimony = self.scale(key, Bench::Credible).testimony(now, key, self.words());
        let grounds = Grounds { testimony, ..grounds };
        let grounds = Arc::new(grounds);
        let event = SharedEvent::Ejected { key: key.clone(), grounds: Arc::clone(&grounds) };
        self.events.push_back(event);
        let stage = Stage::Ejected { since: now, tried_at: now, grounds };
        Case { stage, relapses: case.relapses + 1, ..case.clone() }
    }

    /// Whether this node's own calls have only succeeded since the first failure that was told: its
    /// own experience goes before what others say.
    fn is_well_here(&self, key: &InstanceKey, case: &Case) -> bool {
        let own = self.own.windows.get(key);
        own.is_some_and(|seen| seen.failures == 0 && seen.is_well_after(case.onset))
    }

    /// Not the last one, and not while more than half are accused, be others heard or not: then it is
    /// rather the service.
    fn may_eject(&self, now: Moment, name: &ServiceName, key: &InstanceKey) -> bool {
        let Some(service) = self.services.get(name) else { return false };
        let is_left = |other: &&InstanceKey| {
            *other != key && !self.cases.get(*other).is_some_and(Case::is_ejected)
        };
        let is_accused =
            |key: &&InstanceKey| self.weigh(now, key, Bench::All).is_likely(&self.config);
        let accused = service.instances.iter().filter(is_accused).count();
        !service.is_failing
            && accused * 2 <= service.instances.len()
            && service.instances.iter().any(|other| is_left(&other))
    }

    fn credible(&self) -> impl Iterator<Item = (MemberId, &Report)> {
        self.words().filter(|(_, report)| !report.condemns())
    }

    /// Whether an accusation holds, whoever makes it, after the time to speak against it.
    fn is_condemned(&self, now: Moment, key: &InstanceKey) -> bool {
        let Some(case) = self.cases.get(key) else { return false };
        let all = self.weigh(now, key, Bench::All);
        let rebuttal = self.rebuttal(&all);
        let is_heard = match case.stage {
            Stage::Accused { since } => now.since(since) >= rebuttal,
            Stage::Ejected { .. } | Stage::Returning { .. } => true,
            Stage::Watched { .. } => false,
        };
        is_heard && all.is_carried(&self.config)
    }

    /// How long others have to speak against it.
    fn rebuttal(&self, grounds: &Grounds) -> Duration {
        match grounds.is_crowd(&self.config) {
            true => self.config.rebuttal_short,
            false => self.config.rebuttal,
        }
    }

    /// Looks again at a service as a whole.
    fn look_at(&mut self, now: Moment, name: &ServiceName) {
        let Some(service) = self.services.get(name) else { return };
        let accused = service.instances.iter().filter(|key| self.is_condemned(now, key));
        let (accused, count) = (accused.count(), service.instances.len());
        let is_failing = accused * 2 > count;
        let ejected = service
            .instances
            .iter()
            .filter(|key| self.cases.get(*key).is_some_and(Case::is_ejected));
        let share = ejected.count() as f32 / count.max(1) as f32;
        let (enter, leave) = self.config.panic;
        let panic_since = match service.panic_since {
            None => (share > enter).then_some(now),
            Some(since) if share <= leave && now.since(since) >= self.config.panic_hold => None,
            since => since,
        };
        let Some(service) = self.services.get_mut(name) else { return };
        if service.is_failing && !is_failing {
            service.failed_until = Some(now);
        }
        if service.is_failing != is_failing {
            self.events.push_back(SharedEvent::Failing { service: name.clone(), is_failing });
            self.is_changed = true;
        }
        if service.panic_since.is_some() != panic_since.is_some() {
            let is_panic = panic_since.is_some();
            self.events.push_back(SharedEvent::Panic { service: name.clone(), is_panic });
            self.is_changed = true;
        }
        service.is_failing = is_failing;
        service.panic_since = panic_since;
    }

    /// An accusation that this node has published ended without a case: the next needs more.
    fn note_futile(&mut self, now: Moment, key: &InstanceKey, seen: &Seen) {
        let was_said = self.voice.said.get(key).is_some_and(Seen::is_accusing);
        if was_said && !seen.is_accusing() {
            self.voice.said.remove(key);
            self.voice.takes_back = true;
            if !self.cases.contains_key(key) {
                let (count, at) = self.voice.futile.entry(key.clone()).or_insert((0, now));
                *count = count.saturating_add(1);
                *at = now;
            }
        }
        self.voice.futile.retain(|_, (_, at)| now.since(*at) < FUTILE_FOR);
    }

    /// Own windows that others should know.
    fn worth_saying(&self, now: Moment) -> BTreeMap<InstanceKey, Seen> {
        let all = self.own.windows.iter().filter(|(key, seen)| self.is_worth(now, key, seen));
        let all = all.map(|(key, seen)| (key.clone(), *seen));
        all.take(Observations::WINDOWS_MAX).collect()
    }

    fn is_worth(&self, now: Moment, key: &InstanceKey, seen: &Seen) -> bool {
        let was_said = self.voice.said.contains_key(key);
        let case = self.cases.get(key);
        if seen.is_accusing() {
            let care = self.voice.futile.get(key).map_or(1, |(count, _)| 1 << (*count).min(3));
            let is_enough = seen.failures >= care.min(CARE_MAX);
            // Without this node, which others have not heard, and with some to spare: not all count
            // everywhere.
            let is_crowd = || {
                let mut all = self.weigh(now, key, Bench::Credible);
                all.accusers = all.accusers.saturating_sub(1) * 4 / 5;
                all.is_crowd(&self.config)
            };
            return was_said
                || match case.map(|case| &case.stage) {
                    None | Some(Stage::Watched { .. } | Stage::Returning { .. }) => is_enough,
                    Some(Stage::Accused { .. }) => is_enough && !is_crowd(),
                    Some(Stage::Ejected { since, .. }) => {
                        self.has_probed(seen, *since) || (is_enough && !is_crowd())
                    }
                };
        }
        match case {
            None => false,
            Some(case) => match &case.stage {
                Stage::Accused { .. } => {
                    let all = self.weigh(now, key, Bench::All);
                    let is_needed = f32::from(all.share) >= self.config.ratio * 500.0;
                    let has_seen = seen.last_success_at > Some(all.first_failure_at);
                    has_seen && (was_said || is_needed)
                }
                Stage::Ejected { since, .. } => seen.is_well_after(*since),
                Stage::Returning { .. } => was_said || case.is_witness,
                Stage::Watched { .. } => was_said,
            },
        }
    }

    fn is_failing_of(&self, key: &InstanceKey) -> bool {
        self.service_of(key).is_some_and(|service| self.is_failing(service))
    }

    /// Whether the last failure is that of a probe: nothing else is called half a period after an
    /// ejection.
    fn has_probed(&self, seen: &Seen, ejected_at: Moment) -> bool {
        let probing_from = ejected_at + self.config.period_min / 2;
        seen.last_failure_at.is_some_and(|at| at > probing_from)
    }

    /// Decides whether there is something to say, and when.
    fn speak(&mut self, now: Moment) {
        if self.voice.due_at.is_some_and(|at| at <= now) {
            return;
        }
        let worth = self.worth_saying(now);
        let is_due = self.own.calls != self.voice.said_calls || self.voice.takes_back;
        let mut at = is_due.then_some(now + REPORT_PAUSE);
        if self.own.condemns() && !self.voice.has_condemned && !self.voice.said.is_empty() {
            at = Some(now); // what was said is not to be believed any more
        }
        // While a service fails as a whole its callers say so again before their word grows old.
        let fresh_from = now.before(self.config.window / 2);
        for (key, seen) in &worth {
            let before = self.voice.said.get(key);
            let is_new = before.is_none_or(|said| said.is_accusing() != seen.is_accusing());
            let is_more = before.is_some_and(|said| said.failures < seen.failures)
                && !self.cases.contains_key(key);
            let is_told = self.cases.get(key).is_none_or(|case| case.has_rebutted);
            let is_probe = matches!(
                self.cases.get(key).map(|case| &case.stage),
                Some(Stage::Ejected { since, .. })
                    if self.has_probed(seen, *since)
                        && before.is_none_or(|said| said.last_failure_at < seen.last_failure_at)
            );
            let is_back = |said: Option<&Seen>| match self.cases.get(key) {
                Some(Case { stage: Stage::Ejected { since, .. }, .. })
                | Some(Case { stage: Stage::Returning { since, .. }, is_witness: true, .. }) => {
                    said.is_none_or(|said| said.last_success_at < Some(*since))
                }
                _ => false,
            };
            // The first failure that this node knew of was another one when it spoke.
            let is_dated = |said: Option<&Seen>| {
                let is_accused = self.cases.get(key).is_some_and(Case::is_accused);
                is_accused
                    && said.is_some_and(|said| {
                        let all = self.weigh(now, key, Bench::All);
                        said.last_success_at <= Some(all.first_failure_at)
                    })
            };
            let is_stale = self.is_failing_of(key)
                && before.is_some_and(|said| said.last_failure_at.is_none_or(|at| at < fresh_from))
                && seen.last_failure_at.is_some_and(|at| at >= fresh_from);
            let is_news = match seen.is_accusing() {
                true => is_new || is_more || is_probe || is_stale,
                false => !is_told || is_back(before) || is_dated(before),
            };
            if is_news {
                let soon =
                    if seen.is_accusing() || is_probe { now } else { now + self.voice.jitter() };
                at = Some(at.map_or(soon, |at| at.min(soon)));
            }
        }
        self.voice.due_at = match (self.voice.due_at, at) {
            (Some(due), Some(at)) => Some(due.min(at)),
            (due, at) => due.or(at),
        };
    }
}

impl Voice {
    fn refill(&mut self, now: Moment) {
        while self.tokens < BURST_MAX && now.since(self.refilled_at) >= REPORT_PAUSE {
            self.tokens += 1;
            self.refilled_at = self.refilled_at + REPORT_PAUSE;
        }
        if self.tokens == BURST_MAX {
            self.refilled_at = now;
        }
    }

    /// Up to [`REBUTTAL_JITTER`].
    fn jitter(&mut self) -> Duration {
        self.seed = turn::mix(self.seed);
        Duration::from_nanos(self.seed % REBUTTAL_JITTER.as_nanos() as u64)
    }
}
