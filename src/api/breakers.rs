//! `/v1/mesh/breakers`: whom calls avoid for a while, by whose word and for what reason.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state::ApiState;
use crate::balancer::Balance;
use crate::breaker::{BreakerState, Grounds, Trip, Verdict, Window};
use crate::mesh::{Endpoint, EndpointState, ServiceView, Snapshot};
use crate::model::{Moment, ServiceName};
use crate::proxy::{EndpointReport, FailedCalls, Opened};

/// One breaker that is not at rest, in the shape of `/v1/mesh/breakers`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BreakerRow {
    /// What is called.
    pub service: String,
    /// Unique on its member.
    pub instance: String,
    /// The member in front of it.
    pub node: String,
    /// The member that calls: this one.
    pub caller: String,
    /// `closed`, `open` or `half_open`.
    pub state: String,
    /// Whose word it is: `local`, this caller's own calls; `mesh`, those of all callers; `owner`, the
    /// agent in front of it.
    pub source: String,
    /// Why it opened last; empty for one that never did.
    pub reason: String,
    /// Who saw what.
    pub evidence: Vec<EvidenceRow>,
    /// For how many milliseconds it has been so; absent for one that never changed.
    pub since_ms: Option<u64>,
    /// In how many milliseconds a call is to try the instance, of whichever caller its `source` lets
    /// try next; absent unless it is open, and where nobody knows.
    pub until_ms: Option<u64>,
}

/// What one caller saw of an instance of late.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvidenceRow {
    /// The member that called.
    pub caller: String,
    /// Calls that say something about the instance.
    pub samples: u16,
    /// Those of them that failed.
    pub failures: u16,
    /// What its word counts for: `own` for this member's, or how others' were weighed.
    pub weight: String,
    /// How long ago it said so, in milliseconds.
    #[serde(default)]
    pub age_ms: u64,
    /// How long ago its last call failed, in milliseconds.
    pub last_failure_ms: Option<u64>,
    /// How long ago its last call succeeded, in milliseconds.
    pub last_success_ms: Option<u64>,
}

/// Breakers that are open or try, and those of instances that have failed of late: one row for each
/// word that there is on an instance.
pub(super) fn breakers(state: &ApiState) -> Vec<BreakerRow> {
    let snapshot = state.snapshot();
    let mut rows = Vec::new();
    for view in snapshot.services.values() {
        for endpoint in view.endpoints() {
            let words = [
                others_word(state, &snapshot, view, endpoint),
                owner_word(state, endpoint),
                own_word(state, endpoint),
            ];
            rows.extend(words.into_iter().flatten().map(|word| BreakerRow {
                service: view.name.to_string(),
                instance: endpoint.instance.to_string(),
                node: endpoint.member_name.to_string(),
                caller: state.name.to_string(),
                ..word
            }));
        }
    }
    rows
}

fn row(state: BreakerState, source: &str, reason: String) -> BreakerRow {
    BreakerRow {
        service: String::new(),
        instance: String::new(),
        node: String::new(),
        caller: String::new(),
        state: state.as_str().to_owned(),
        source: source.to_owned(),
        reason,
        evidence: Vec::new(),
        since_ms: None,
        until_ms: None,
    }
}

/// By this member's own calls.
fn own_word(state: &ApiState, endpoint: &Endpoint) -> Option<BreakerRow> {
    let now = state.clock.now();
    let breaker = state.calls.of(endpoint).report.breaker?;
    let is_at_rest = breaker.state == BreakerState::Closed && breaker.window.failures == 0;
    let window = &breaker.window;
    // An open one is not called: what opened it is told until it is.
    let counted = match breaker.opened {
        Some(opened) if window.samples == 0 => opened.window,
        _ => *window,
    };
    let evidence = EvidenceRow {
        caller: state.name.to_string(),
        samples: counted.samples,
        failures: counted.failures,
        weight: "own".to_owned(),
        age_ms: 0,
        last_failure_ms: window.last_failure_age.map(millis),
        last_success_ms: window.last_success_age.map(millis),
    };
    let until = breaker.opened.filter(|_| breaker.state == BreakerState::Open);
    (!is_at_rest).then(|| BreakerRow {
        evidence: vec![evidence],
        since_ms: breaker.since.map(|since| millis(now.since(since))),
        until_ms: until.map(|opened| millis(opened.until.since(now))),
        ..row(
            breaker.state,
            "local",
            breaker.opened.map_or("", |opened| opened.trip.as_str()).to_owned(),
        )
    })
}

/// By all callers together.
fn others_word(
    state: &ApiState,
    snapshot: &Snapshot,
    view: &ServiceView,
    endpoint: &Endpoint,
) -> Option<BreakerRow> {
    let now = state.clock.now();
    let (word, since, until) = match &endpoint.verdict {
        Verdict::Clear | Verdict::Accused => return None,
        Verdict::Ejected(ejection) => {
            // Whoever's turn it is: this member may come later, and its own calls sooner.
            let next = ejection.tried_at + ejection.period;
            (BreakerState::Open, ejection.since, Some(next))
        }
        Verdict::Probing { since, .. } => (BreakerState::HalfOpen, *since, None),
    };
    let grounds = endpoint.verdict.grounds()?;
    let name = |member| {
        snapshot.members.get(member).map_or_else(|| member.to_string(), |m| m.name.to_string())
    };
    let age = |at: Option<Moment>| at.map(|at| millis(now.since(at)));
    let evidence = grounds.testimony.iter().map(|told| EvidenceRow {
        caller: name(&told.caller),
        samples: told.samples,
        failures: told.failures,
        weight: told.weight.as_str().to_owned(),
        age_ms: millis(now.since(told.told_at)),
        last_failure_ms: age(told.last_failure_at),
        last_success_ms: age(told.last_success_at),
    });
    Some(BreakerRow {
        evidence: evidence.collect(),
        since_ms: Some(millis(now.since(since))),
        until_ms: until.map(|until| millis(until.since(now))),
        ..row(word, "mesh", format!("{}{}", told(grounds), ignored(view)))
    })
}

/// By its own agent.
fn owner_word(state: &ApiState, endpoint: &Endpoint) -> Option<BreakerRow> {
    let since = millis(state.clock.now().since(endpoint.changed_at));
    (endpoint.state == EndpointState::Failing).then(|| BreakerRow {
        since_ms: Some(since),
        ..row(BreakerState::Open, "owner", "its checks fail".to_owned())
    })
}

fn told(grounds: &Grounds) -> String {
    format!(
        "{} of {} callers saw {} failures, {:.0} % of the calls since",
        grounds.accusers,
        grounds.callers,
        grounds.failures,
        f64::from(grounds.share) / 10.0
    )
}

/// Why verdicts on instances of a service do not count now; empty while they do.
fn ignored(view: &ServiceView) -> &'static str {
    match (view.is_failing, view.is_panic) {
        (true, _) => ", ignored: most of the service fails",
        (false, true) => ", ignored: too much of the service is ejected",
        (false, false) => "",
    }
}

/// What breakers make of an endpoint, as listings count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// They say nothing against it, or its own agent has said enough.
    Clear,
    /// All callers together keep calls from it.
    Ejected,
    /// Only this one's own calls do.
    EjectedHere,
    /// It comes back: its share grows.
    Probing,
    /// Its last two calls from here failed, or more, and no breaker is open: calls go elsewhere while
    /// they have a choice.
    Avoided,
}

/// Failures in a row from which on an operator is told: a single one is nobody's fault.
const AVOIDED_MIN: u16 = 2;

impl Standing {
    /// Of an endpoint: what all callers hold goes before what this one's own calls say.
    pub(super) fn of(endpoint: &Endpoint, report: &EndpointReport) -> Self {
        let own = report.breaker.map(|breaker| breaker.state);
        match (endpoint.state, &endpoint.verdict, own) {
            (EndpointState::Ready, Verdict::Ejected(_), _) => Self::Ejected,
            (EndpointState::Ready, Verdict::Probing { .. }, _) => Self::Probing,
            (EndpointState::Ready, _, Some(BreakerState::Open)) => Self::EjectedHere,
            (EndpointState::Ready, _, Some(BreakerState::HalfOpen)) => Self::Probing,
            (EndpointState::Ready, ..) if is_avoided(report) => Self::Avoided,
            _ => Self::Clear,
        }
    }
}

/// The word of listings for how an endpoint stands: that of its own agent, else that of all callers,
/// else that of this one's own calls.
pub(super) fn state_word(endpoint: &Endpoint, report: &EndpointReport) -> &'static str {
    match Standing::of(endpoint, report) {
        Standing::Ejected | Standing::EjectedHere => "ejected",
        Standing::Probing => "probing",
        Standing::Avoided | Standing::Clear => endpoint.state.as_str(),
    }
}

/// What breakers say of an endpoint of `view` that its agent calls ready, and whose word that is.
pub(super) fn reason(
    state: &ApiState,
    view: &ServiceView,
    endpoint: &Endpoint,
    report: &EndpointReport,
) -> Option<String> {
    let standing = Standing::of(endpoint, report);
    if let (Standing::Ejected | Standing::Probing, Some(grounds)) =
        (standing, endpoint.verdict.grounds())
    {
        return Some(format!("mesh: {}{}", told(grounds), ignored(view)));
    }
    match standing {
        Standing::EjectedHere => {
            let opened = report.breaker?.opened?;
            Some(format!("only here: {}", how(&opened)))
        }
        Standing::Probing => Some("only here: it comes back after failures".to_owned()),
        Standing::Avoided | Standing::Clear if endpoint.state == EndpointState::Ready => {
            Some(failures(report.failed.as_ref()?, goes_by_cost(state, &view.name)))
        }
        _ => None,
    }
}

fn is_avoided(report: &EndpointReport) -> bool {
    report.failed.is_some_and(|failed| failed.count >= AVOIDED_MIN)
}

/// How a breaker opened.
fn how(opened: &Opened) -> String {
    let Window { samples, failures, .. } = opened.window;
    match opened.trip {
        Trip::ConnectErrors => format!("refused connections, {} failures in a row", opened.in_row),
        Trip::Errors => format!("{} consecutive failures", opened.in_row),
        Trip::Ratio => format!("{failures} of {samples} calls failed"),
        Trip::Relapse => "it failed again when it was tried".to_owned(),
    }
}

/// Whether calls of a service from here go around what has just failed, as those of the usual balancer
/// do, by name or at an entry.
fn goes_by_cost(state: &ApiState, service: &ServiceName) -> bool {
    let local = state.local();
    let mut entries = local.upstreams.iter().filter(|spec| spec.service == *service).peekable();
    let has_own = entries.peek().is_some();
    !has_own
        || entries.any(|spec| spec.balance == Balance::PeakEwma)
        || local.doors.open().next().is_some()
}

/// What calls from here met last.
fn failures(failed: &FailedCalls, is_avoided: bool) -> String {
    let ago = format!("{} s ago", failed.last_age.as_secs());
    let told = match failed.count {
        1 => format!("its last call failed {ago}"),
        count => format!("its last {count} calls failed, the last {ago}"),
    };
    format!("{} here: {told}", if is_avoided { "avoided" } else { "only" })
}

/// How many endpoints of one service stand how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// By the mesh's word.
    pub(super) ejected: usize,
    /// By this member's alone.
    pub(super) ejected_here: usize,
    /// Not yet, and avoided.
    pub(super) avoided: usize,
}

impl Tally {
    /// Of these endpoints, as calls from here see them.
    pub(super) fn of<'e>(
        state: &ApiState,
        endpoints: impl IntoIterator<Item = &'e Endpoint>,
    ) -> Self {
        let mut tally = Self::default();
        for endpoint in endpoints {
            match Standing::of(endpoint, &state.calls.of(endpoint).report) {
                Standing::Ejected => tally.ejected += 1,
                Standing::EjectedHere => tally.ejected_here += 1,
                Standing::Avoided => tally.avoided += 1,
                Standing::Probing | Standing::Clear => {}
            }
        }
        tally
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
