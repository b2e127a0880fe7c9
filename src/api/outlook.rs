//! How the instances of a service stand to calls from here: one judgement, told in the same words by
//! `status`, `services`, `endpoints`, `breakers`, `routes`, `check` and the metrics.

use std::time::Duration;

use super::{ApiState, CallView, views};
use crate::balancer::{Balance, WHOLE, slow_start};
use crate::breaker::{BreakerState, FailedCalls, Grounds, Verdict, Window};
use crate::mesh::{Endpoint, EndpointState, Rotation, ServiceView, Snapshot};
use crate::model::{Moment, ServiceName};
use crate::proxy::{Cost, EndpointReport, Opened, cost_min};

/// What an operator is told of the instances of a service that fails as a whole.
pub(super) const FAILS_AS_A_WHOLE: &str =
    "the service fails as a whole, so the mesh ejects none of it";

/// Failures in a row from which on an instance is said to fail: a single one is nobody's fault.
const FAILS_MIN: u16 = 2;

/// An instance that costs more than this many times the cheapest gets next to no calls: of two that are
/// drawn the cheaper is taken.
const AVOIDED_FACTOR: u32 = 2;

/// From so much more than the cheapest on, at this cost at least, an instance is said to be slow: what is
/// less is the noise of connections that are made, and of schedulers.
const SLOW_FACTOR: u32 = 4;
const SLOW_MIN: Duration = Duration::from_millis(50);

/// How an instance stands to calls from here, as far as its own agent has not said otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing speaks against it, or its own agent has said enough.
    Clear,
    /// All callers together keep calls from it.
    Ejected,
    /// Only this one's own calls do.
    EjectedHere,
    /// It comes back: its share grows.
    Probing,
    /// No breaker is open, and calls go elsewhere because some of them have failed there.
    Avoided,
}

impl Standing {
    /// As far as breakers go: what all callers hold goes before what this one's own calls say.
    fn by_breakers(endpoint: &Endpoint, report: &EndpointReport) -> Self {
        let own = report.breaker.map(|breaker| breaker.state);
        match (endpoint.state, &endpoint.verdict, own) {
            (EndpointState::Ready, Verdict::Ejected(_), _) => Self::Ejected,
            (EndpointState::Ready, Verdict::Probing { .. }, _) => Self::Probing,
            (EndpointState::Ready, _, Some(BreakerState::Open)) => Self::EjectedHere,
            (EndpointState::Ready, _, Some(BreakerState::HalfOpen)) => Self::Probing,
            _ => Self::Clear,
        }
    }
}

/// How many instances of one service stand how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// By the mesh's word.
    pub(super) ejected: usize,
    /// By this member's alone.
    pub(super) ejected_here: usize,
    /// Not ejected, and calls go around them.
    pub(super) avoided: usize,
    /// Not ejected, and the last calls from here failed, whether calls go around them or not.
    pub(super) failing_here: usize,
}

/// The instances of one service as calls from here see them, by their place in its view.
pub(super) struct Outlook<'a> {
    state: &'a ApiState,
    snapshot: &'a Snapshot,
    view: &'a ServiceView,
    calls: Vec<CallView>,
    /// Of the cheapest that takes calls; `None` where calls do not go by cost.
    least_cost: Option<Duration>,
    /// The same among those whose last calls did not fail.
    least_well_cost: Option<Duration>,
    now: Moment,
}

impl<'a> Outlook<'a> {
    /// Of `view`, which is in `snapshot`.
    pub(super) fn new(state: &'a ApiState, snapshot: &'a Snapshot, view: &'a ServiceView) -> Self {
        let calls: Vec<_> = view.endpoints().iter().map(|one| state.calls.of(one)).collect();
        let takes_calls = |(endpoint, calls): &(&Endpoint, &CallView)| {
            let is_out = matches!(
                Standing::by_breakers(endpoint, &calls.report),
                Standing::Ejected | Standing::EjectedHere
            );
            endpoint.state == EndpointState::Ready && endpoint.weight.0 > 0 && !is_out
        };
        let (mut least_cost, mut least_well_cost) = (None, None);
        if goes_by_cost(state, &view.name) {
            let willing = view.endpoints().iter().zip(&calls).filter(takes_calls);
            let willing = willing.map(|(_, calls)| calls);
            let cost = |calls: &CallView| cost(view, calls).whole;
            least_cost = willing.clone().map(cost).min();
            least_well_cost = willing.filter(|calls| !has_failed(&calls.report)).map(cost).min();
        }
        let now = state.clock.now();
        Self { state, snapshot, view, calls, least_cost, least_well_cost, now }
    }

    /// The instances with their places, by name and then by node.
    pub(super) fn in_order(&self) -> Vec<(usize, &'a Endpoint)> {
        let mut all: Vec<_> = self.view.endpoints().iter().enumerate().collect();
        all.sort_by(|(_, a), (_, b)| {
            (&a.instance, &a.member_name, a.member).cmp(&(&b.instance, &b.member_name, b.member))
        });
        all
    }

    /// What own calls tell of the one at `at`.
    pub(super) fn calls(&self, at: usize) -> &CallView {
        &self.calls[at]
    }

    fn endpoint(&self, at: usize) -> &'a Endpoint {
        &self.view.endpoints()[at]
    }

    fn report(&self, at: usize) -> &EndpointReport {
        &self.calls[at].report
    }

    pub(super) fn standing(&self, at: usize) -> Standing {
        match Standing::by_breakers(self.endpoint(at), self.report(at)) {
            Standing::Clear if self.is_costly(at) && self.is_penalized(at) => Standing::Avoided,
            Standing::Clear if self.fails_here(at) && self.has_better(at) => Standing::Avoided,
            standing => standing,
        }
    }

    /// The word of listings: that of its own agent, else that of all callers, else that of this one's
    /// own breaker.
    pub(super) fn state_word(&self, at: usize) -> &'static str {
        match self.standing(at) {
            Standing::Ejected | Standing::EjectedHere => "ejected",
            Standing::Probing => "probing",
            Standing::Avoided | Standing::Clear => self.endpoint(at).state.as_str(),
        }
    }

    /// How many of those at these places stand how.
    pub(super) fn tally(&self, places: impl IntoIterator<Item = usize>) -> Tally {
        let mut tally = Tally::default();
        for at in places {
            let standing = self.standing(at);
            match standing {
                Standing::Ejected => tally.ejected += 1,
                Standing::EjectedHere => tally.ejected_here += 1,
                Standing::Avoided => tally.avoided += 1,
                Standing::Probing | Standing::Clear => {}
            }
            let is_in = matches!(standing, Standing::Avoided | Standing::Clear);
            tally.failing_here += usize::from(is_in && self.fails_here(at));
        }
        tally
    }

    /// For how long it has stood so; `None` for longer than is known here.
    pub(super) fn since(&self, at: usize) -> Option<Duration> {
        let (endpoint, breaker) = (self.endpoint(at), self.report(at).breaker);
        let by_own = breaker.and_then(|breaker| breaker.since);
        let since = match (&endpoint.verdict, self.standing(at), endpoint.rotation) {
            (Verdict::Ejected(ejection), Standing::Ejected, _) => Some(ejection.since),
            (Verdict::Probing { since, .. }, Standing::Probing, _) => Some(*since),
            (_, Standing::EjectedHere | Standing::Probing, _) => by_own,
            (_, Standing::Avoided, _) => {
                return self.report(at).failed.map(|failed| failed.first_age);
            }
            (.., Rotation::In { since }) => since.max(by_own),
            (.., Rotation::Lost { at }) => Some(at),
            // Its agent has said so with its last word, or later than that.
            (.., Rotation::Out) => Some(endpoint.changed_at),
        };
        since.map(|since| self.now.since(since))
    }

    /// Whether it has come into rotation of late, so that its share grows.
    pub(super) fn is_new(&self, at: usize) -> bool {
        let since = self.endpoint(at).rotation.since();
        since.is_some_and(|since| slow_start(self.now.since(since)) < WHOLE)
    }

    /// Why it is seen as it is, by whoever knows best: this machine of its own instances, then breakers,
    /// then what its member says. Empty when there is nothing to say.
    pub(super) fn why(&self, at: usize) -> String {
        let endpoint = self.endpoint(at);
        if endpoint.member == self.state.me {
            if let Some(why) = self.state.local().out.maintenance.get(&endpoint.instance) {
                return format!("maintenance: {why}");
            }
            let reports = self.state.reports();
            let fault = reports.get(&endpoint.instance).and_then(|own| own.reason.as_deref());
            if let (EndpointState::Failing, Some(why)) = (endpoint.state, fault) {
                return why.to_owned();
            }
        }
        let by_calls = self.by_calls(at);
        let is_failing = self.view.is_failing && endpoint.verdict == Verdict::Accused;
        match (is_failing, by_calls) {
            (true, Some(why)) => return format!("the service fails as a whole; {why}"),
            (true, None) => return FAILS_AS_A_WHOLE.to_owned(),
            (false, Some(why)) => return why,
            (false, None) => {}
        }
        let node = self.snapshot.members.get(&endpoint.member).map(|member| member.state);
        let by_member = views::reason(endpoint, node, self.calls[at].trouble);
        match by_member.is_empty() {
            true => self.slowness(at).unwrap_or_default(),
            false => by_member,
        }
    }

    /// What calls have to do with how it stands, and whose: `mesh: ` those of all callers, else those
    /// from here.
    fn by_calls(&self, at: usize) -> Option<String> {
        match self.standing(at) {
            Standing::Ejected | Standing::Probing
                if self.endpoint(at).verdict.grounds().is_some() =>
            {
                self.by_all(at).map(|why| format!("mesh: {why}"))
            }
            Standing::Ejected | Standing::EjectedHere | Standing::Probing => {
                self.by_own(at).map(|why| format!("only here: {why}"))
            }
            Standing::Avoided => Some(format!("avoided here: {}", self.failures(at))),
            Standing::Clear if self.endpoint(at).state != EndpointState::Ready => None,
            Standing::Clear if self.fails_here(at) => {
                Some(format!("fails here: {}", self.failures(at)))
            }
            Standing::Clear => {
                self.report(at).failed?;
                Some(format!("only here: {}", self.failures(at)))
            }
        }
    }

    /// What all callers together say of it, where they keep calls from it.
    pub(super) fn by_all(&self, at: usize) -> Option<String> {
        let grounds = self.endpoint(at).verdict.grounds()?;
        Some(format!("{}{}", told(grounds), ignored(self.view)))
    }

    /// What this caller's own breaker says of it, or its calls where that is closed; `None` when nothing
    /// speaks against it.
    pub(super) fn by_own(&self, at: usize) -> Option<String> {
        let breaker = self.report(at).breaker?;
        match (breaker.state, breaker.opened) {
            (BreakerState::Open, Some(opened)) => Some(how(&opened)),
            (BreakerState::HalfOpen, Some(opened)) => {
                Some(format!("it comes back after {}", how(&opened)))
            }
            _ => match self.standing(at) {
                Standing::Avoided => self.by_calls(at),
                Standing::Clear if self.fails_here(at) => self.by_calls(at),
                _ => (breaker.window.failures > 0 || self.report(at).failed.is_some())
                    .then(|| self.failures(at)),
            },
        }
    }

    /// What the last calls from here met.
    fn failures(&self, at: usize) -> String {
        let report = self.report(at);
        let ago = |age: Duration| format!("{} s ago", age.as_secs());
        let window = report.breaker.map(|breaker| breaker.window).unwrap_or_default();
        match (report.failed, window) {
            (Some(FailedCalls { count: 1, last_age, .. }), _) => {
                format!("its last call failed {}", ago(last_age))
            }
            (Some(FailedCalls { count, last_age, .. }), _) => {
                format!("its last {count} calls failed, the last {}", ago(last_age))
            }
            (None, Window { failures, samples, last_failure_age: Some(age), .. }) => {
                format!("{failures} of {samples} calls failed, the last {}", ago(age))
            }
            _ => "calls to it have just failed".to_owned(),
        }
    }

    fn fails_here(&self, at: usize) -> bool {
        self.endpoint(at).state == EndpointState::Ready && has_failed(self.report(at))
    }

    /// Whether calls go to one that does not fail here, because it costs less, however slow it is.
    fn has_better(&self, at: usize) -> bool {
        let cost = cost(self.view, &self.calls[at]).whole;
        self.least_well_cost.is_some_and(|least| least < cost)
    }

    /// Whether calls go elsewhere because it costs so much more than the cheapest.
    fn is_costly(&self, at: usize) -> bool {
        let endpoint = self.endpoint(at);
        let takes_calls = endpoint.state == EndpointState::Ready && endpoint.weight.0 > 0;
        let cost = cost(self.view, &self.calls[at]).whole;
        takes_calls && self.least_cost.is_some_and(|least| cost > least * AVOIDED_FACTOR)
    }

    /// Whether most of what it costs is for calls that failed.
    fn is_penalized(&self, at: usize) -> bool {
        let Cost { whole, penalty } = self.report(at).cost;
        penalty * 2 > whole
    }

    /// That it is so much slower than others that calls go there.
    fn slowness(&self, at: usize) -> Option<String> {
        let least = self.least_cost?;
        let Cost { whole, .. } = cost(self.view, &self.calls[at]);
        let is_slow = self.endpoint(at).state == EndpointState::Ready
            && whole > (least * SLOW_FACTOR).max(SLOW_MIN);
        let latency = self.report(at).latency.filter(|_| is_slow)?;
        let millis = |time: Duration| (time.as_secs_f64() * 1e3).ceil();
        Some(format!(
            "slow here: its answers took up to {} ms, others take {} ms",
            millis(latency),
            millis(least)
        ))
    }
}

/// Whether the last calls to an instance failed.
fn has_failed(report: &EndpointReport) -> bool {
    report.failed.is_some_and(|failed| failed.count >= FAILS_MIN)
}

/// What calls to an instance cost, as they are balanced: what is cheap costs the same.
fn cost(view: &ServiceView, calls: &CallView) -> Cost {
    let Cost { whole, penalty } = calls.report.cost;
    Cost { whole: whole.max(cost_min(view.protocol)), penalty }
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

/// How a breaker opened.
fn how(opened: &Opened) -> String {
    let again = match opened.relapses {
        0 => String::new(),
        1 => ", and again when it was tried".to_owned(),
        times => format!(", and again the {times} times that it was tried"),
    };
    format!("{}{again}", opened.cause())
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
