//! `/v1/mesh/breakers`: whom calls avoid for a while, by whose word and for what reason.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::outlook::{FAILS_AS_A_WHOLE, Outlook};
use super::state::ApiState;
use crate::breaker::{BreakerState, Verdict};
use crate::mesh::{Endpoint, EndpointState, ServiceView, Snapshot};
use crate::model::Moment;

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
    /// Why it opened last, of `local` a word: `connect_errors`, `errors`, `ratio`, `relapse`; empty for
    /// one that never did.
    pub reason: String,
    /// The same as a sentence, and for a closed one what its last calls met; what `endpoints` gives for
    /// a reason.
    #[serde(default)]
    pub why: String,
    /// Who saw what.
    pub evidence: Vec<EvidenceRow>,
    /// For how many milliseconds it has been so, relapses included; of a closed one how long ago its
    /// failures began. Absent where nobody knows.
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

/// Breakers that are open or try, those of instances that have failed of late, and those that the mesh
/// leaves closed because the whole service fails: one row for each word that there is on an instance, by
/// service, instance and node.
pub(super) fn breakers(state: &ApiState) -> Vec<BreakerRow> {
    let snapshot = state.snapshot();
    let mut rows = Vec::new();
    for view in snapshot.services.values() {
        let outlook = Outlook::new(state, &snapshot, view);
        for (at, endpoint) in outlook.in_order() {
            let words = [
                others_word(state, &snapshot, &outlook, at, endpoint),
                failing_word(view, endpoint),
                owner_word(state, &outlook, at, endpoint),
                own_word(state, &outlook, at),
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

fn row(state: BreakerState, source: &str, why: String) -> BreakerRow {
    BreakerRow {
        service: String::new(),
        instance: String::new(),
        node: String::new(),
        caller: String::new(),
        state: state.as_str().to_owned(),
        source: source.to_owned(),
        reason: why.clone(),
        why,
        evidence: Vec::new(),
        since_ms: None,
        until_ms: None,
    }
}

/// By this member's own calls.
fn own_word(state: &ApiState, outlook: &Outlook<'_>, at: usize) -> Option<BreakerRow> {
    let now = state.clock.now();
    let report = &outlook.calls(at).report;
    let breaker = report.breaker?;
    let has_failed = breaker.window.failures > 0 || report.failed.is_some();
    let is_at_rest = breaker.state == BreakerState::Closed && !has_failed;
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
    let since = match breaker.state {
        BreakerState::Closed => {
            let of_stretch = window.first_failure_age.or(window.last_failure_age);
            report.failed.map(|failed| failed.first_age).or(of_stretch)
        }
        _ => breaker.since.map(|since| now.since(since)),
    };
    (!is_at_rest).then(|| BreakerRow {
        evidence: vec![evidence],
        since_ms: since.map(millis),
        until_ms: until.map(|opened| millis(opened.until.since(now))),
        reason: breaker.opened.map_or("", |opened| opened.word()).to_owned(),
        ..row(breaker.state, "local", outlook.by_own(at).unwrap_or_default())
    })
}

/// By all callers together.
fn others_word(
    state: &ApiState,
    snapshot: &Snapshot,
    outlook: &Outlook<'_>,
    at: usize,
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
        ..row(word, "mesh", outlook.by_all(at)?)
    })
}

/// That all callers together accuse it, and do not eject it because most of the service fails with it.
fn failing_word(view: &ServiceView, endpoint: &Endpoint) -> Option<BreakerRow> {
    let is_so = view.is_failing && endpoint.verdict == Verdict::Accused;
    is_so.then(|| row(BreakerState::Closed, "mesh", FAILS_AS_A_WHOLE.to_owned()))
}

/// By its own agent.
fn owner_word(
    state: &ApiState,
    outlook: &Outlook<'_>,
    at: usize,
    endpoint: &Endpoint,
) -> Option<BreakerRow> {
    let since = outlook.since(at).map(millis);
    (endpoint.state == EndpointState::Failing).then(|| BreakerRow {
        since_ms: since.or_else(|| Some(millis(state.clock.now().since(endpoint.changed_at)))),
        ..row(BreakerState::Open, "owner", "its checks fail".to_owned())
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
