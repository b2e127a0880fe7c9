//! `/v1/mesh/breakers`: whom calls avoid for a while, by whose word and for what reason.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state::ApiState;
use crate::breaker::BreakerState;
use crate::mesh::{Endpoint, EndpointState};
use crate::proxy::EndpointReport;

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
    /// Whose word it is: `local`, this caller's own calls.
    pub source: String,
    /// Why it opened last; empty for one that never did.
    pub reason: String,
    /// Who saw what.
    pub evidence: Vec<EvidenceRow>,
    /// For how many milliseconds it has been so; absent for one that never changed.
    pub since_ms: Option<u64>,
    /// In how many milliseconds a call may try the instance; absent unless it is open.
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
}

/// Breakers that are open or try, and those of instances that have failed of late.
pub(super) fn breakers(state: &ApiState) -> Vec<BreakerRow> {
    let (now, snapshot) = (state.clock.now(), state.snapshot());
    let endpoints = snapshot
        .services
        .values()
        .flat_map(|view| view.endpoints().iter().map(move |endpoint| (&view.name, endpoint)));
    let row = |(service, endpoint): (_, &Endpoint)| {
        let breaker = state.calls.of(endpoint).report.breaker?;
        let is_at_rest = breaker.state == BreakerState::Closed && breaker.failures == 0;
        let (caller, samples, failures) =
            (state.name.to_string(), breaker.samples, breaker.failures);
        (!is_at_rest).then(|| BreakerRow {
            service: ToString::to_string(service),
            instance: endpoint.instance.to_string(),
            node: endpoint.member_name.to_string(),
            caller: caller.clone(),
            state: breaker.state.as_str().to_owned(),
            source: "local".to_owned(),
            reason: breaker.reason.unwrap_or_default().to_owned(),
            evidence: vec![EvidenceRow { caller, samples, failures }],
            since_ms: breaker.since.map(|since| millis(now.since(since))),
            until_ms: breaker.until.map(|until| millis(until.since(now))),
        })
    };
    endpoints.filter_map(row).collect()
}

/// The word of listings for how an endpoint stands: that of its own agent, or else of breakers.
pub(super) fn state_word(endpoint: &Endpoint, report: &EndpointReport) -> &'static str {
    match (endpoint.state, report.breaker.map(|breaker| breaker.state)) {
        (EndpointState::Ready, Some(BreakerState::Open)) => "ejected",
        (EndpointState::Ready, Some(BreakerState::HalfOpen)) => "probing",
        (state, _) => state.as_str(),
    }
}

/// What breakers say of an endpoint that its agent calls ready.
pub(super) fn reason(endpoint: &Endpoint, report: &EndpointReport) -> Option<String> {
    let breaker = report.breaker.filter(|_| endpoint.state == EndpointState::Ready)?;
    let seen = format!("{} of {} calls from here failed", breaker.failures, breaker.samples);
    match breaker.state {
        BreakerState::Closed => None,
        BreakerState::Open => Some(format!("{}: {seen}", breaker.reason.unwrap_or("open"))),
        BreakerState::HalfOpen => Some("coming back after failures".to_owned()),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
