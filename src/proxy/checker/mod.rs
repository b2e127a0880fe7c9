//! Runs the active checks of this machine's instances, takes the words that applications push, and
//! says which instances pass.
//!
//! One task owns all of it: which checks there are ([`HealthChecks::check`]), whose turn it is, and
//! the runs themselves, at most [`RUNS_MAX`] at a time. When it is dropped they end with it.

mod command;
mod probe;
mod spec;

use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;

pub use spec::{
    CHECK_INTERVALS, CHECK_TIMEOUTS, CHECKS_MAX, CheckError, CheckSpec, WrittenCheck, WrittenStatus,
};

use self::probe::Finding;
use super::{LocalInstance, ProxyProtocol};
use crate::health::{CheckResult, CheckState, Health, HealthEvent};
use crate::model::{InstanceId, InstanceState, Moment, Protocol, ServiceName, Target};
use crate::runtime::clock::Clock;
use crate::telemetry::{EventKind, EventLog, Metrics};

/// Runs at a time: a machine with 256 instances checks them all in a few rounds, and a crowd of
/// hanging programs stays a small one. Who is due waits for a place.
const RUNS_MAX: usize = 32;
/// Of what a check said, in bytes.
const OUTPUT_LEN_MAX: usize = 4 * 1024;
/// Of a reason, in characters: it is shown in listings.
const REASON_LEN_MAX: usize = 200;
/// Words of applications that wait. Whoever pushes waits for the answer.
const WORDS_MAX: usize = 64;

/// What a check was made of. A result says nothing of an instance that is elsewhere, or that was away
/// since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedAs {
    /// Where it listens.
    pub target: Target,
    /// Which of its stays in rotation this is: a number that none before had.
    pub stay: u64,
}

/// An instance and its checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedInstance {
    /// Unique on this member.
    pub id: InstanceId,
    /// What it serves.
    pub service: ServiceName,
    /// What its checks are made of.
    pub known_as: CheckedAs,
    /// What it speaks.
    pub protocol: Protocol,
    /// How it wants to be told who calls, if it does.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// At most [`CHECKS_MAX`].
    pub checks: Vec<CheckSpec>,
}

impl CheckedInstance {
    fn local(&self) -> LocalInstance {
        LocalInstance {
            id: self.id.clone(),
            service: self.service.clone(),
            target: self.known_as.target.clone(),
            state: InstanceState::Ready,
            proxy_protocol: self.proxy_protocol,
            hard_limit: None,
        }
    }

    /// By what its checks are known on this machine.
    pub fn check_ids(&self) -> impl Iterator<Item = String> {
        (0..self.checks.len()).map(|at| self.check_id(at))
    }

    /// The same of check `at`, as Consul calls it.
    fn check_id(&self, at: usize) -> String {
        match self.checks.get(at).and_then(|check| check.id.clone()) {
            Some(id) => id,
            None if self.checks.len() == 1 => format!("service:{}", self.id),
            None => format!("service:{}:{}", self.id, at + 1),
        }
    }
}

/// How an instance stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What was looked at.
    pub known_as: CheckedAs,
    /// Why it is failing; absent when it passes. At most 200 characters.
    pub reason: Option<String>,
    /// Each of its checks.
    pub checks: Vec<CheckReport>,
}

/// How one check stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckReport {
    /// By which it is known on this machine.
    pub id: String,
    /// `http`, `tcp`, `grpc`, `command` or `ttl`.
    pub kind: &'static str,
    /// What it is called and what it says, at most 4 KiB.
    pub state: CheckState,
}

/// How all instances with checks stand.
pub type Reports = BTreeMap<InstanceId, Report>;

/// A word that was not taken. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    /// Fault: whoever pushed it, or the instance was taken back.
    #[error("there is no such check here")]
    Unknown,
    /// Fault: whoever pushed it.
    #[error("the agent runs this check itself: only one with a ttl is told")]
    NotTold,
    /// The agent ends.
    #[error("the agent is stopping")]
    Stopping,
}

struct Word {
    check: String,
    result: CheckResult,
    output: String,
    reply: oneshot::Sender<Result<(), WordError>>,
}

/// The handle of the checks, for any thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct HealthChecks {
    wanted: watch::Sender<Arc<Vec<CheckedInstance>>>,
    words: mpsc::Sender<Word>,
    reports: watch::Receiver<Arc<Reports>>,
}

impl HealthChecks {
    /// Checks these instances from now on, and no others. Those that stay as they are keep their
    /// state; one with other checks takes work until one of them fails, unless it is known as another.
    pub fn check(&self, instances: Vec<CheckedInstance>) {
        self.wanted.send_if_modified(|wanted| {
            let is_new = **wanted != instances;
            if is_new {
                *wanted = Arc::new(instances);
            }
            is_new
        });
    }

    /// Says for the application how it is: `check` is the id of a check with a ttl. At most 4 KiB of
    /// `output` are kept.
    pub async fn tell(
        &self,
        check: String,
        result: CheckResult,
        output: String,
    ) -> Result<(), WordError> {
        let (reply, answer) = oneshot::channel();
        let word = Word { check, result, output: shortened(&output), reply };
        self.words.send(word).await.map_err(|_| WordError::Stopping)?;
        answer.await.unwrap_or(Err(WordError::Stopping))
    }

    /// How the instances stand, as it changes.
    pub fn reports(&self) -> watch::Receiver<Arc<Reports>> {
        self.reports.clone()
    }
}

/// The machinery behind [`HealthChecks`].
pub struct Checker {
    wanted: watch::Receiver<Arc<Vec<CheckedInstance>>>,
    words: mpsc::Receiver<Word>,
    /// Instances that refused a connection.
    refused: mpsc::Receiver<InstanceId>,
    reports: watch::Sender<Arc<Reports>>,
    checked: BTreeMap<InstanceId, Checked>,
    running: FuturesUnordered<Pin<Box<dyn Future<Output = Ended> + Send>>>,
    /// Makes every [`Checked`] another one.
    count: u64,
    rng: SmallRng,
    clock: Clock,
    events: EventLog,
    metrics: Metrics,
}

struct Checked {
    number: u64,
    instance: Arc<CheckedInstance>,
    health: Health,
}

/// A run that has ended.
struct Ended {
    instance: InstanceId,
    number: u64,
    at: usize,
    finding: Finding,
}

impl Checker {
    /// Nothing to check yet. `refused` names instances that refused a connection: their checks are
    /// made at once.
    pub fn new(
        refused: mpsc::Receiver<InstanceId>,
        seed: u64,
        clock: Clock,
        events: EventLog,
        metrics: Metrics,
    ) -> (HealthChecks, Self) {
        let (want, wanted) = watch::channel(Arc::default());
        let (speak, words) = mpsc::channel(WORDS_MAX);
        let (reports, read) = watch::channel(Arc::default());
        let checker = Self {
            wanted,
            words,
            refused,
            reports,
            checked: BTreeMap::new(),
            running: FuturesUnordered::new(),
            count: 0,
            rng: SmallRng::seed_from_u64(seed),
            clock,
            events,
            metrics,
        };
        (HealthChecks { wanted: want, words: speak, reports: read }, checker)
    }

    /// Checks until every handle is gone.
    pub async fn run(mut self) {
        loop {
            self.begin_due();
            let (clock, deadline) = (self.clock, self.deadline());
            let due = async {
                match deadline {
                    Some(deadline) => sleep_until(clock.instant(deadline)).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased; // whoever exposes an instance and then speaks of it is understood
                changed = self.wanted.changed() => match changed {
                    Ok(()) => self.take_wanted(),
                    Err(_) => return,
                },
                Some(ended) = self.running.next() => self.handle_end(ended),
                Some(word) = self.words.recv() => self.handle_word(word),
                Some(id) = self.refused.recv() => {
                    if let Some(checked) = self.checked.get_mut(&id) {
                        checked.health.check_now(self.clock.now());
                    }
                }
                () = due => {}
            }
        }
    }

    /// When there is something to do. While there is no place for another run, that is only a word that
    /// runs out: what is due to be run waits for a run to end.
    fn deadline(&self) -> Option<Moment> {
        let has_place = self.running.len() < RUNS_MAX;
        let healths = self.checked.values().map(|checked| &checked.health);
        let deadlines = healths.filter_map(|health| match has_place {
            true => health.poll_timeout(),
            false => health.poll_expiry(),
        });
        deadlines.min()
    }

    /// Begins what is due, as far as there are places: what has waited longest goes first.
    fn begin_due(&mut self) {
        let now = self.clock.now();
        let is_late = |checked: &Checked| checked.health.poll_timeout().is_some_and(|at| at <= now);
        let late = self.checked.iter().filter(|(_, checked)| is_late(checked));
        let mut late: Vec<_> =
            late.map(|(id, checked)| (checked.health.poll_timeout(), id.clone())).collect();
        late.sort();
        for (_, id) in late {
            let Some(checked) = self.checked.get_mut(&id) else { continue };
            checked.health.handle_timeout(now);
            while self.running.len() < RUNS_MAX
                && let Some(at) = checked.health.poll_due(now)
            {
                let (instance, number) = (Arc::clone(&checked.instance), checked.number);
                self.running.push(Box::pin(async move {
                    let finding = probe::run(&instance, &instance.checks[at]).await;
                    Ended { instance: instance.id.clone(), number, at, finding }
                }));
            }
            self.note(&id);
        }
    }

    fn take_wanted(&mut self) {
        let wanted = Arc::clone(&self.wanted.borrow_and_update());
        let now = self.clock.now();
        let mut before = std::mem::take(&mut self.checked);
        for instance in wanted.iter() {
            let checked = match before.remove(&instance.id) {
                Some(kept) if *kept.instance == *instance => kept,
                kept => {
                    let was_passing = kept.is_some_and(|kept| {
                        kept.instance.known_as == instance.known_as && kept.health.is_passing()
                    });
                    self.count += 1;
                    let plans = instance.checks.iter().map(|spec| (spec.summary(), spec.plan()));
                    let health = Health::new(now, plans, was_passing, self.rng.random());
                    Checked { number: self.count, instance: Arc::new(instance.clone()), health }
                }
            };
            self.checked.insert(instance.id.clone(), checked);
        }
        self.reports.send_if_modified(|reports| {
            let is_gone = reports.keys().any(|id| !self.checked.contains_key(id));
            if is_gone {
                Arc::make_mut(reports).retain(|id, _| self.checked.contains_key(id));
            }
            is_gone
        });
        for instance in wanted.iter() {
            self.note(&instance.id);
        }
    }

    fn handle_end(&mut self, ended: Ended) {
        let Ended { instance: id, number, at, finding: (result, said) } = ended;
        let checked = self.checked.get_mut(&id).filter(|checked| checked.number == number);
        let Some(checked) = checked else { return }; // it is checked otherwise by now, or no more
        if let Some(spec) = checked.instance.checks.get(at) {
            let (service, kind) = (checked.instance.service.as_str(), spec.probe.kind());
            self.metrics.count_health_check(service, kind, word(result));
        }
        checked.health.handle_result(self.clock.now(), at, result, said);
        self.note(&id);
    }

    fn handle_word(&mut self, word: Word) {
        let Word { check, result, output, reply } = word;
        let found = self.checked.iter_mut().find_map(|(id, checked)| {
            let at = checked.instance.check_ids().position(|id| id == check)?;
            Some((id.clone(), checked, at))
        });
        let taken = match found {
            None => Err(WordError::Unknown),
            Some((id, checked, at)) => {
                let is_told = checked.health.handle_word(self.clock.now(), at, result, output);
                if is_told {
                    let service = checked.instance.service.as_str();
                    self.metrics.count_health_check(service, "ttl", self::word(result));
                }
                self.note(&id);
                if is_told { Ok(()) } else { Err(WordError::NotTold) }
            }
        };
        let _ = reply.send(taken); // nobody waits: fine
    }

    /// Tells what has changed of an instance.
    fn note(&mut self, id: &InstanceId) {
        let Some(checked) = self.checked.get_mut(id) else { return };
        match checked.health.poll_event() {
            Some(HealthEvent::Passing) => {
                self.events.record(EventKind::InstancePassing, id, "its checks pass");
            }
            Some(HealthEvent::Failing { reason }) => {
                self.events.record(EventKind::InstanceFailing, id, one_line(&reason));
            }
            None => {}
        }
        let report = checked.report();
        self.reports.send_if_modified(|reports| {
            let is_new = reports.get(id) != Some(&report);
            if is_new {
                Arc::make_mut(reports).insert(id.clone(), report);
            }
            is_new
        });
    }
}

impl Checked {
    fn report(&self) -> Report {
        let checks = self.health.checks().zip(&self.instance.checks).enumerate();
        let checks = checks.map(|(at, (state, spec))| CheckReport {
            id: self.instance.check_id(at),
            kind: spec.probe.kind(),
            state: state.clone(),
        });
        Report {
            known_as: self.instance.known_as.clone(),
            reason: self.health.reason().map(|reason| one_line(&reason)),
            checks: checks.collect(),
        }
    }
}

/// The word of metrics.
const fn word(result: CheckResult) -> &'static str {
    match result {
        CheckResult::Pass => "pass",
        CheckResult::Warn => "warn",
        CheckResult::Fail => "fail",
    }
}

/// As much of an output as is kept.
fn shortened(output: &str) -> String {
    let mut ends = (0..=output.len().min(OUTPUT_LEN_MAX)).rev();
    let end = ends.find(|end| output.is_char_boundary(*end));
    output[..end.unwrap_or(0)].to_owned()
}

/// As much of it as listings and events show.
fn one_line(reason: &str) -> String {
    let words = reason.chars().map(|c| if c.is_control() { ' ' } else { c });
    words.take(REASON_LEN_MAX).collect()
}
