//! The breaker that all callers share: what others observed, weighed.
//!
//! Callers tell each other counts, not verdicts; each node judges for itself, by the same rules:
//!
//! 1. A caller accuses an instance while failures outweigh in its calls to it, from the first failure on.
//!    What it says has an age, by which it counts or not, whoever brings it and whenever.
//! 2. An instance is *accused* once more than a quarter of the service's callers accuse it, with a least
//!    number of failures together: liars that are fewer can do nothing. Callers that saw a success since
//!    the first of these failures say so, once. Nobody's failures began long before it first told of them.
//! 3. After the time for rebuttal, which is longer when somebody objects, it is *ejected* if the pooled
//!    share of failures of all who spoke reaches the ratio; few samples of each count, so that nobody's
//!    voice is louder for being busy. Where a quorum objects and another instance is accused, too, it is
//!    load.
//! 4. Who condemns most of the members that it calls, and two at least, counts nothing. When more than
//!    half of a service is accused, the service is failing, and nobody is ejected. The last instance is
//!    never ejected.
//! 5. An ejected instance is tried by one caller per period; whose turn it is follows from a hash, and the
//!    agent in front of it lets no more than one pass. A success of one whose turn has come puts it on a
//!    ramp, a failure of one whose turn has come doubles the period. To make it a long one takes the same
//!    word of a second caller, who looks soon.
//! 6. Panic, while more than half of a service are ejected: readers ignore these verdicts.
//!
//! Once a quorum accuses, others keep quiet, and while a service fails as a whole a quorum says so twice a
//! minute. A caller whose accusations come to nothing needs more failures for the next, so that a service
//! with some errors does not fill the mesh with reports.

mod judging;
mod speaking;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::case::{Case, Stage};
use super::report::{Report, Seen};
use super::skew::Skew;
use super::{BreakerState, Ejection, Grounds, InstanceKey, OwnWindow, SharedConfig, Verdict};
use crate::model::{InstanceId, MemberId, Moment, Observations, ServiceName, StoreSize};
use speaking::Voice;

/// How often what depends on time alone is looked at while there is a case.
const TICK: Duration = Duration::from_secs(1);

/// Most cases at a time; beyond, an accusation waits. Only instances that members' records name can
/// have one.
const CASES_MAX: usize = 4096;

/// Members that have gone whose clocks are remembered.
const GONE_CLOCKS_MAX: usize = 256;

/// Something that the shared breaker decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SharedEvent {
    /// What all callers hold of an instance has changed.
    Instance {
        /// Which.
        key: InstanceKey,
        /// What it serves.
        service: ServiceName,
        /// To what.
        change: InstanceChange,
    },
    /// More than half of a service fails, or no more.
    Failing {
        /// Which.
        service: ServiceName,
        /// Whether it does now.
        is_failing: bool,
        /// Those of it that fail, and why they are held to; at most 16, with at most four words each.
        grounds: Vec<(InstanceKey, Arc<Grounds>)>,
    },
    /// Too many of a service are ejected to believe it, or no more.
    Panic {
        /// Which.
        service: ServiceName,
        /// Whether it is so now.
        is_panic: bool,
    },
}

/// A change of what all callers hold of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstanceChange {
    /// It was ejected; why.
    Ejected(Arc<Grounds>),
    /// Its accusation was outweighed before it was ejected; by what.
    Acquitted(Arc<Grounds>),
    /// It was ejected, and its accusation was outweighed by words that came later; by what.
    Restored(Arc<Grounds>),
    /// It has answered this caller: its share grows from now on.
    Returning(MemberId),
    /// It is back for good.
    Returned,
}

impl InstanceChange {
    /// Why, where words were weighed for it.
    pub const fn grounds(&self) -> Option<&Arc<Grounds>> {
        match self {
            Self::Ejected(grounds) | Self::Acquitted(grounds) | Self::Restored(grounds) => {
                Some(grounds)
            }
            Self::Returning(_) | Self::Returned => None,
        }
    }

    /// The state that this makes of the shared breaker, if another.
    pub const fn to(&self) -> Option<BreakerState> {
        match self {
            Self::Ejected(_) => Some(BreakerState::Open),
            Self::Returning(_) => Some(BreakerState::HalfOpen),
            Self::Restored(_) | Self::Returned => Some(BreakerState::Closed),
            Self::Acquitted(_) => None,
        }
    }
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
    /// This node's wall time when its moments began, in milliseconds since 1970.
    began_at_ms: u64,
    /// Instances that want work, by service. Bounded by the members' records.
    services: BTreeMap<ServiceName, Service>,
    /// What each offers. Bounded by the members' records.
    served: BTreeMap<MemberId, BTreeMap<InstanceId, ServiceName>>,
    /// This node's own calls, and when each window was given. Bounded by `served`.
    own: Report,
    /// Since when the agent in front of an instance turns this node's calls away, against which this node
    /// holds nothing. Bounded by `served`.
    turned_away: BTreeMap<InstanceKey, Moment>,
    /// When this node called a service last. Bounded by `services`, and what has gone of late.
    called_at: BTreeMap<ServiceName, Moment>,
    /// Who calls a service, this node included. Bounded by what all reports say.
    callers: BTreeMap<ServiceName, Vec<MemberId>>,
    /// The latest word of each other member. Bounded by the members.
    reports: BTreeMap<MemberId, Report>,
    /// How their clocks go, also of some that have gone: those that come back are understood at once.
    /// Bounded by the members and [`GONE_CLOCKS_MAX`].
    clocks: BTreeMap<MemberId, Skew>,
    /// Who of them says something of an instance. Bounded by what all reports say.
    voices: BTreeMap<InstanceKey, BTreeSet<MemberId>>,
    /// What all words on an instance came to when it was last looked at, while somebody accuses it.
    /// Bounded by `served`.
    weighed: BTreeMap<InstanceKey, Weighed>,
    /// Words weighed so far: what all this costs.
    pub(super) words_weighed: u64,
    /// At most [`CASES_MAX`].
    cases: BTreeMap<InstanceKey, Case>,
    voice: Voice,
    events: VecDeque<SharedEvent>,
    tick_at: Option<Moment>,
    /// When all cases were last looked at.
    judged_at: Moment,
    is_changed: bool,
}

/// What all words on an instance come to.
#[derive(Clone, Debug)]
struct Weighed {
    /// Of those that do not condemn most of what they call.
    credible: Grounds,
    /// Of all who speak.
    all: Grounds,
    /// The same, with what was said before the last accusation was dismissed.
    ever: Grounds,
}

#[derive(Clone, Debug, Default)]
struct Service {
    instances: BTreeSet<InstanceKey>,
    is_failing: bool,
    /// Until when it was failing as a whole: what was seen before says nothing about one instance.
    failed_until: Option<Moment>,
    panic_since: Option<Moment>,
}

impl SharedBreaker {
    /// Of the node `id`, whose moments began at the wall time `began_at_ms`, in milliseconds since 1970.
    /// `seed` makes its pauses differ from those of others.
    pub fn new(config: SharedConfig, id: MemberId, began_at_ms: u64, seed: u64) -> Self {
        Self {
            config,
            id,
            began_at_ms,
            services: BTreeMap::new(),
            served: BTreeMap::new(),
            own: Report::default(),
            turned_away: BTreeMap::new(),
            called_at: BTreeMap::new(),
            callers: BTreeMap::new(),
            reports: BTreeMap::new(),
            clocks: BTreeMap::new(),
            voices: BTreeMap::new(),
            weighed: BTreeMap::new(),
            words_weighed: 0,
            cases: BTreeMap::new(),
            voice: Voice::new(seed),
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
        now: Moment,
        member: MemberId,
        instances: impl IntoIterator<Item = (InstanceId, ServiceName)>,
    ) {
        let offered: BTreeMap<InstanceId, ServiceName> = instances.into_iter().collect();
        let before = self.served.get(&member).cloned().unwrap_or_default();
        for (instance, service) in before {
            if offered.get(&instance) != Some(&service) {
                self.forget(now, &InstanceKey { member, instance });
            }
        }
        let mut spoken_of = Vec::new();
        for (instance, service) in &offered {
            let key = InstanceKey { member, instance: instance.clone() };
            let instances = &mut self.services.entry(service.clone()).or_default().instances;
            if instances.insert(key.clone()) && self.voices.contains_key(&key) {
                spoken_of.push(key);
            }
        }
        if offered.is_empty() {
            self.served.remove(&member);
        } else {
            self.served.insert(member, offered);
        }
        for key in spoken_of {
            self.judge(now, &key);
        }
    }

    /// Takes what this node's own calls saw: when a stretch of failures begins, when a breaker changes,
    /// when a call to one ends that is [`Verdict::Accused`] or [`Verdict::Ejected`], and each second;
    /// each time all instances that were called since.
    pub fn handle_windows(&mut self, now: Moment, windows: impl IntoIterator<Item = OwnWindow>) {
        let mut touched = Vec::new();
        for OwnWindow { key, service, window, turned_away_at } in windows {
            if self.service_of(&key) != Some(&service) {
                continue; // it has gone meanwhile
            }
            if let Some(at) = turned_away_at
                && !self.cases.get(&key).is_some_and(Case::is_ejected)
            {
                self.turned_away.entry(key.clone()).or_insert(at);
            }
            let seen = Seen::of(now, &window);
            self.called_at.insert(service, now);
            self.note_futile(now, &key, &seen);
            self.own.windows.insert(key.clone(), seen);
            touched.push(key);
        }
        self.forget_futile(now);
        self.renew_own(now);
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
        let wall_ms = self.wall_ms(now);
        let unknown = || Skew::new(self.config.clock_tolerance);
        let skew = self.clocks.entry(from).or_insert_with(unknown);
        let told = observations.signed_at_ms.map(|signed| skew.age(wall_ms, signed));
        let mut report = Report::heard(now, told, self.config.caller_for, observations);
        let calls = report.calls.clone();
        let keys: Vec<_> = report.windows.keys().cloned().collect();
        let before = self.unhear(from);
        report.bound_onsets(before.as_ref(), self.config.onset_age_max);
        for key in &keys {
            self.voices.entry(key.clone()).or_default().insert(from);
        }
        self.reports.insert(from, report);
        if before.as_ref().is_none_or(|before| before.calls != calls) {
            self.count_callers();
        }
        // What it says no more counts no more.
        let before = before.into_iter().flat_map(|before| before.windows.into_keys());
        let touched: BTreeSet<_> = before.chain(keys).collect();
        for key in touched {
            self.judge(now, &key);
        }
        self.speak(now);
    }

    /// Others hold a word of an earlier run of this node: they are to hear what holds now.
    pub fn handle_own_past(&mut self, now: Moment) {
        self.voice.takes_back = true;
        self.speak(now);
    }

    /// A member is down or gone: it has no voice any more.
    pub fn forget_caller(&mut self, now: Moment, member: MemberId) {
        let Some(report) = self.unhear(member) else { return };
        if self.clocks.len() > self.reports.len() + GONE_CLOCKS_MAX {
            let gone = self.clocks.keys().find(|known| !self.reports.contains_key(*known)).copied();
            gone.map(|gone| self.clocks.remove(&gone));
        }
        self.count_callers();
        for key in report.windows.keys() {
            self.judge(now, key);
        }
    }

    /// The deadline of [`SharedBreaker::poll_timeout`] has come.
    pub fn handle_timeout(&mut self, now: Moment) {
        let is_due = self.deadlines().into_iter().flatten().any(|at| at <= now);
        if !is_due {
            return;
        }
        self.judged_at = now;
        self.renew_own(now);
        let keys: BTreeSet<_> = self.cases.keys().chain(self.weighed.keys()).cloned().collect();
        for key in keys {
            self.judge(now, &key);
        }
        let troubled = |service: &Service| service.is_failing || service.panic_since.is_some();
        let services = self.services.iter().filter(|(_, one)| troubled(one));
        let services: Vec<_> = services.map(|(name, _)| name.clone()).collect();
        for service in services {
            self.judge_service(now, &service);
        }
        let is_accusing = !self.cases.is_empty() || !self.weighed.is_empty();
        let is_busy = is_accusing || self.services.values().any(troubled);
        self.tick_at = is_busy.then_some(now + TICK);
        self.speak(now);
    }

    /// When to call [`SharedBreaker::handle_timeout`] at the latest.
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.deadlines().into_iter().flatten().min()
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
                Verdict::Ejected(Ejection {
                    since: *since,
                    tried_at: *tried_at,
                    period,
                    turn: self.turn_of(self.id, key, case, *tried_at),
                    anyone_at: self.anyone_at(case, *tried_at),
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

    fn deadlines(&self) -> [Option<Moment>; 4] {
        let decide = self.cases.values().flat_map(|case| match case.stage {
            Stage::Accused { since } => {
                [Some(since + self.config.rebuttal_min), Some(since + self.config.rebuttal_max)]
            }
            _ => [None, None],
        });
        let decide = decide.flatten().filter(|at| *at > self.judged_at).min();
        let quiet = self.called_at.values().min().map(|at| *at + self.config.caller_for);
        [decide, self.voice.poll_timeout(), self.tick_at, quiet]
    }

    /// This node's own time, which does not step.
    fn wall_ms(&self, now: Moment) -> u64 {
        let passed = u64::try_from(now.since(Moment::START).as_millis()).unwrap_or(u64::MAX);
        self.began_at_ms.saturating_add(passed)
    }

    /// Takes a member's word away.
    fn unhear(&mut self, member: MemberId) -> Option<Report> {
        let report = self.reports.remove(&member)?;
        for key in report.windows.keys() {
            if let Some(voices) = self.voices.get_mut(key) {
                voices.remove(&member);
                if voices.is_empty() {
                    self.voices.remove(key);
                }
            }
        }
        Some(report)
    }

    /// Forgets own calls that are too long ago, and says anew what this node calls: of more services than
    /// fit those that fail for it, then those that it has named before.
    fn renew_own(&mut self, now: Moment) {
        let window = self.config.window;
        self.own.told_at = now;
        self.own.windows.retain(|_, seen| seen.is_fresh(now, window));
        self.own.count();
        self.voice.said.retain(|key, _| self.own.windows.contains_key(key));
        let caller_for = self.config.caller_for;
        self.called_at.retain(|_, at| now.since(*at) < caller_for);
        let accused = self.own.windows.iter().filter(|(_, seen)| seen.is_accusing());
        let failing: BTreeSet<_> =
            accused.filter_map(|(key, _)| self.service_of(key).cloned()).collect();
        let mut calls: Vec<_> = self.called_at.keys().collect();
        calls.sort_by_key(|name| (!failing.contains(*name), !self.own.calls.contains(*name)));
        let calls = calls.into_iter().take(Observations::CALLS_MAX).cloned().collect();
        if self.own.calls != calls {
            self.own.calls = calls;
            self.count_callers();
        }
    }

    fn service_of(&self, key: &InstanceKey) -> Option<&ServiceName> {
        self.served.get(&key.member)?.get(&key.instance)
    }

    fn tell(&mut self, key: &InstanceKey, change: InstanceChange) {
        let Some(service) = self.service_of(key).cloned() else { return };
        self.events.push_back(SharedEvent::Instance { key: key.clone(), service, change });
    }

    fn forget(&mut self, now: Moment, key: &InstanceKey) {
        let known = self.served.get_mut(&key.member);
        let Some(service) = known.and_then(|known| known.remove(&key.instance)) else { return };
        self.own.windows.remove(key);
        self.turned_away.remove(key);
        self.voice.forget(key);
        self.weighed.remove(key);
        self.is_changed |= self.cases.remove(key).is_some();
        if let Some(known) = self.services.get_mut(&service) {
            known.instances.remove(key);
        }
        self.judge_service(now, &service); // what is left of it may fail no more
        self.services.retain(|_, known| !known.instances.is_empty());
    }

    /// Whose turn it is to probe follows from who calls: readers are to know it when that has changed, or
    /// callers that are all new would wait until anyone may.
    fn count_callers(&mut self) {
        let before = std::mem::take(&mut self.callers);
        let others = self.reports.iter().map(|(member, report)| (*member, report));
        for (member, report) in others.chain([(self.id, &self.own)]) {
            for service in &report.calls {
                self.callers.entry(service.clone()).or_default().push(member);
            }
        }
        self.is_changed |= self.callers != before && self.cases.values().any(Case::is_ejected);
    }

    /// The members that call a service, this one included if it does.
    fn callers(&self, service: &ServiceName) -> &[MemberId] {
        self.callers.get(service).map_or(&[], Vec::as_slice)
    }
}
