//! One decision: which endpoint takes this call, or the reason why none does.

use rand::Rng;

use super::{Endpoint, EndpointState, Snapshot};
use crate::balancer::{Shares, least_request};
use crate::model::ServiceName;

/// What the caller knows beside the snapshot.
pub struct Caller<'a> {
    /// Whether this call tried the endpoint before: never again.
    pub has_tried: &'a dyn Fn(&Endpoint) -> bool,
    /// Whether the caller just had trouble with the endpoint: only as a last resort.
    pub avoids: &'a dyn Fn(&Endpoint) -> bool,
    /// Calls in flight to the endpoint.
    pub load: &'a dyn Fn(&Endpoint) -> u32,
}

/// Why no endpoint takes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    /// No member offers the service.
    #[error("no member offers this service")]
    UnknownService,
    /// Every endpoint is finishing what it has.
    #[error("every endpoint is draining")]
    Draining,
    /// Every endpoint was taken out by its operator.
    #[error("every endpoint is in maintenance")]
    Maint,
    /// Endpoints are failing, down, without weight, or tried already.
    #[error("no endpoint is ready")]
    NoEndpoints,
}

impl NoEndpoint {
    /// The reason as metrics, events and headers say it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UnknownService => "unknown_service",
            Self::Draining => "draining",
            Self::Maint => "maint",
            Self::NoEndpoints => "no_endpoints",
        }
    }
}

/// Picks an endpoint of `service`: a ready one, else one in doubt, the less busy of two drawn by
/// weight.
///
/// The caller is asked only about those that are drawn, until one of them will not do; then about all.
pub fn pick<'s>(
    snapshot: &'s Snapshot,
    service: &ServiceName,
    caller: &Caller<'_>,
    rng: &mut impl Rng,
) -> Result<&'s Endpoint, NoEndpoint> {
    let view = snapshot.services.get(service).ok_or(NoEndpoint::UnknownService)?;
    let endpoints = view.endpoints();
    let mut balance =
        |shares: &Shares| least_request(shares, |at| (caller.load)(&endpoints[at]), rng);
    if let Some(at) = balance(view.ready()) {
        let drawn = &endpoints[at];
        if !(caller.has_tried)(drawn) && !(caller.avoids)(drawn) {
            return Ok(drawn);
        }
    }
    let mut ready = Vec::new();
    let mut doubtful = Vec::new();
    for (at, endpoint) in endpoints.iter().enumerate() {
        if (caller.has_tried)(endpoint) {
            continue;
        }
        match endpoint.state {
            EndpointState::Ready if !(caller.avoids)(endpoint) => ready.push((at, endpoint.weight)),
            EndpointState::Ready | EndpointState::Doubtful => doubtful.push((at, endpoint.weight)),
            _ => {}
        }
    }
    balance(&ready.into_iter().collect())
        .or_else(|| balance(&doubtful.into_iter().collect()))
        .map(|at| &endpoints[at])
        .ok_or_else(|| why_none(endpoints))
}

fn why_none(endpoints: &[Endpoint]) -> NoEndpoint {
    let all = |state| endpoints.iter().all(|endpoint| endpoint.state == state);
    if endpoints.is_empty() {
        NoEndpoint::UnknownService
    } else if all(EndpointState::Draining) {
        NoEndpoint::Draining
    } else if all(EndpointState::Maint) {
        NoEndpoint::Maint
    } else {
        NoEndpoint::NoEndpoints
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;
    use crate::breaker::Verdict;
    use crate::mesh::ServiceView;
    use crate::model::{MemberId, Moment, Protocol, Weight};

    fn endpoint(number: u8, state: EndpointState, weight: u16) -> Endpoint {
        Endpoint {
            instance: format!("web-{number}").parse().unwrap(),
            member: MemberId::from_bytes([number; 16]),
            member_name: format!("node-{number}").parse().unwrap(),
            address: "127.0.0.1:7370".parse().unwrap(),
            port: 80,
            tags: Vec::new(),
            weight: Weight(weight),
            state,
            idempotent: Arc::default(),
            verdict: Verdict::Clear,
            changed_at: Moment::START,
        }
    }

    /// Picks among endpoints numbered from 0; `tried` and `avoided` are numbers.
    fn picked(
        states: &[(EndpointState, u16)],
        tried: &[u8],
        avoided: &[u8],
    ) -> Result<u8, NoEndpoint> {
        let name: ServiceName = "web".parse().unwrap();
        let endpoints =
            (0..).zip(states).map(|(n, &(state, weight))| endpoint(n, state, weight)).collect();
        let view = ServiceView::new(name.clone(), Protocol::Tcp, endpoints);
        let mut snapshot = Snapshot::default();
        snapshot.services.insert(name.clone(), Arc::new(view));
        let number = |endpoint: &Endpoint| endpoint.member.as_bytes()[0];
        let caller = Caller {
            has_tried: &|endpoint| tried.contains(&number(endpoint)),
            avoids: &|endpoint| avoided.contains(&number(endpoint)),
            load: &|_| 0,
        };
        let mut rng = SmallRng::seed_from_u64(3);
        pick(&snapshot, &name, &caller, &mut rng).map(number)
    }

    #[test]
    fn ready_goes_before_doubtful_and_doubtful_before_nothing() {
        use EndpointState::{Doubtful, Down, Draining, Failing, Maint, Ready};
        #[allow(clippy::type_complexity)] // a table: endpoints, avoided, tried, picked
        let cases: &[(&[(EndpointState, u16)], &[u8], &[u8], Result<u8, NoEndpoint>)] = &[
            (&[(Down, 100), (Ready, 100), (Doubtful, 100)], &[], &[], Ok(1)),
            (&[(Ready, 100), (Ready, 100)], &[0], &[], Ok(1)),
            (&[(Ready, 100), (Ready, 100)], &[], &[0], Ok(1)),
            (&[(Ready, 100), (Down, 100)], &[], &[0], Ok(0)), // avoided: the last resort
            (&[(Doubtful, 100), (Failing, 100)], &[], &[], Ok(0)),
            (&[(Ready, 0), (Doubtful, 100)], &[], &[], Ok(1)), // weight 0 takes none
            (&[(Ready, 100)], &[0], &[], Err(NoEndpoint::NoEndpoints)),
            (&[(Draining, 100), (Draining, 100)], &[], &[], Err(NoEndpoint::Draining)),
            (&[(Maint, 100)], &[], &[], Err(NoEndpoint::Maint)),
            (&[(Maint, 100), (Draining, 100)], &[], &[], Err(NoEndpoint::NoEndpoints)),
            (&[], &[], &[], Err(NoEndpoint::UnknownService)),
        ];
        for (states, tried, avoided, expected) in cases {
            assert_eq!(
                picked(states, tried, avoided),
                *expected,
                "{states:?} {tried:?} {avoided:?}"
            );
        }
    }

    #[test]
    fn service_that_nobody_offers_is_unknown() {
        let caller = Caller { has_tried: &|_| false, avoids: &|_| false, load: &|_| 0 };
        let name = "nobody".parse().unwrap();
        let mut rng = SmallRng::seed_from_u64(3);
        let none = pick(&Snapshot::default(), &name, &caller, &mut rng).map(|_| ());
        assert_eq!(none, Err(NoEndpoint::UnknownService));
    }
}
