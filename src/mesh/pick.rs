//! One decision: which endpoint takes this call, or the reason why none does.

use rand::{Rng, RngExt};

use super::{Endpoint, EndpointState, ServiceView};
use crate::balancer::{Load, Order, Rank, Shares, Stance, WHOLE, choose, scan};
use crate::breaker::{Admission, Ejection, Verdict, Window};
use crate::model::Moment;

/// What the caller knows beside the view, and how it wants to choose. Endpoints are named by their
/// place in the view.
pub struct Caller<'a> {
    /// How an endpoint stands to this call, as far as the caller itself knows: whether it was tried,
    /// is in trouble or full, and what it costs.
    pub stance: &'a dyn Fn(usize) -> Stance,
    /// Those among which is drawn first.
    pub shares: &'a Shares,
    /// In which order.
    pub order: &'a Order<'a>,
    /// The time.
    pub now: Moment,
    /// Whether it heeds what all callers together hold of an endpoint.
    pub heeds_others: bool,
    /// Its own experience with an endpoint of late. Asked only about those that others accuse.
    pub window: &'a dyn Fn(usize) -> Window,
    /// Whether it has taken the turn to probe that this ejection offers.
    pub has_probed: &'a dyn Fn(usize, &Ejection) -> bool,
    /// How near an endpoint is, from 0 on; `None` for one that is not to be used however few are left.
    pub nearness: &'a dyn Fn(usize) -> Option<u8>,
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
    /// Those that are ready are all farther than the caller lets its calls go.
    #[error("every endpoint that is ready is farther than 'prefer' lets calls go")]
    TooFar,
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
            Self::TooFar | Self::NoEndpoints => "no_endpoints",
        }
    }
}

/// Picks an endpoint of a service and returns its place: a ready one, else one that is full, else one
/// in doubt. Allocates nothing.
///
/// The caller is asked only about those that are drawn, until none of the first few will do; then about
/// all.
pub fn pick(
    view: &ServiceView,
    caller: &Caller<'_>,
    rng: &mut impl Rng,
) -> Result<usize, NoEndpoint> {
    let endpoints = view.endpoints();
    let heeds_others = caller.heeds_others && !view.is_panic && !view.is_failing;
    let stance = |at: usize| match endpoints[at].state {
        EndpointState::Ready if heeds_others => heeding(caller, at, &endpoints[at].verdict),
        EndpointState::Ready => (caller.stance)(at),
        EndpointState::Doubtful => as_last_resort((caller.stance)(at)),
        _ => Stance::NEVER,
    };
    // However many instances there are, a probe that is due goes with its prober's next call, but for
    // calls that a key leads.
    let is_led = matches!(caller.order, Order::Table { .. });
    let is_due = |at: usize| endpoints[at].verdict.admits(caller.now) == Admission::Probe;
    let may_probe = |at: usize| is_due(at) && (caller.nearness)(at).is_some();
    let is_probe = |at: &usize| may_probe(*at) && stance(*at) == PROBE;
    let due = if heeds_others && !is_led { view.to_probe(caller.now) } else { &[] };
    let first = if due.len() > PROBES_MAX { rng.random_range(..due.len()) } else { 0 };
    let from = |place: usize| due[(first + place) % due.len()].1;
    if let Some(at) = (0..due.len().min(PROBES_MAX)).map(from).find(is_probe) {
        return Ok(at);
    }
    if let Some(at) = choose(caller.shares, caller.order, stance, rng) {
        return Ok(at);
    }
    let usable = endpoints.iter().enumerate().filter_map(|(at, endpoint)| {
        Some((at, endpoint.weight, (caller.nearness)(at)?, stance(at)))
    });
    scan(usable, caller.order, rng).ok_or_else(|| why_none(endpoints, caller.nearness))
}

/// Of how many ejected instances one pick asks whether a probe is due now, so that it costs the same
/// however many have been due once. Who has more of them has calls enough to come by each.
const PROBES_MAX: usize = 16;

/// The turn to probe what all callers have ejected.
const PROBE: Stance = Stance { rank: Rank::Willing, share: WHOLE, load: Load::TRIAL };

/// What all callers hold of an endpoint goes before what this one does, unless its own success is newer.
fn heeding(caller: &Caller<'_>, at: usize, verdict: &Verdict) -> Stance {
    let own = (caller.stance)(at);
    let admission = verdict.admits(caller.now);
    if admission == Admission::Pass || own.rank == Rank::Never {
        return own;
    }
    if let Admission::Ramp(share) = admission {
        return Stance { share: own.share.min(share), ..own };
    }
    if verdict.is_vetoed_by(caller.now, &(caller.window)(at)) {
        return own;
    }
    let is_turn = |ejection: &Ejection| !(caller.has_probed)(at, ejection);
    match verdict {
        Verdict::Ejected(ejection) if admission == Admission::Probe && is_turn(ejection) => PROBE,
        _ => as_last_resort(own),
    }
}

fn as_last_resort(own: Stance) -> Stance {
    Stance { rank: own.rank.min(Rank::LastResort), ..own }
}

fn why_none(endpoints: &[Endpoint], nearness: &dyn Fn(usize) -> Option<u8>) -> NoEndpoint {
    let all = |state| endpoints.iter().all(|endpoint| endpoint.state == state);
    let takes_work = |endpoint: &Endpoint| {
        matches!(endpoint.state, EndpointState::Ready | EndpointState::Doubtful)
            && endpoint.weight.0 > 0
    };
    let is_any = |is_near: bool| {
        let mut usable = endpoints.iter().enumerate().filter(|(_, endpoint)| takes_work(endpoint));
        usable.any(|(at, _)| nearness(at).is_some() == is_near)
    };
    if endpoints.is_empty() {
        NoEndpoint::UnknownService
    } else if all(EndpointState::Draining) {
        NoEndpoint::Draining
    } else if all(EndpointState::Maint) {
        NoEndpoint::Maint
    } else if is_any(false) && !is_any(true) {
        NoEndpoint::TooFar
    } else {
        NoEndpoint::NoEndpoints
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;
    use crate::breaker::Grounds;
    use crate::model::{Protocol, ServiceName, Weight};

    /// Picks among endpoints numbered from 0; `tried` and `avoided` are numbers.
    fn picked(
        states: &[(EndpointState, u16)],
        tried: &[u8],
        avoided: &[u8],
    ) -> Result<u8, NoEndpoint> {
        let name: ServiceName = "web".parse().unwrap();
        let endpoint = |(number, &(state, weight))| Endpoint {
            state,
            weight: Weight(weight),
            ..Endpoint::numbered(number)
        };
        let endpoints = (0..).zip(states).map(endpoint).collect();
        let view = ServiceView::new(name, Protocol::Tcp, endpoints);
        let stance = |at: usize| {
            let is_in = |numbers: &[u8]| numbers.iter().any(|number| usize::from(*number) == at);
            let rank = match (is_in(tried), is_in(avoided)) {
                (true, _) => Rank::Never,
                (_, true) => Rank::LastResort,
                _ => Rank::Willing,
            };
            Stance { rank, share: WHOLE, load: Load { cost: 1.0, in_flight: 0 } }
        };
        let caller = Caller {
            stance: &stance,
            shares: view.ready(),
            order: &Order::LeastLoad,
            now: Moment::START,
            heeds_others: true,
            window: &|_| Window::default(),
            has_probed: &|_, _| false,
            nearness: &|_| Some(0),
        };
        let picked = pick(&view, &caller, &mut SmallRng::seed_from_u64(3));
        picked.map(|at| u8::try_from(at).unwrap())
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

    /// An ejection at 10 s, after failures up to then, whose probe is anyone's from 70 s on.
    fn ejected() -> Verdict {
        let at = Moment::from_secs(10);
        let grounds = Arc::new(Grounds { last_failure_at: at, ..Grounds::default() });
        Verdict::Ejected(Ejection {
            since: at,
            tried_at: at,
            period: Duration::from_secs(1),
            turn: None,
            anyone_at: Moment::from_secs(70),
            grounds,
        })
    }

    #[test]
    fn probe_that_is_due_goes_with_the_next_call_among_however_many() {
        let mut endpoints: Vec<_> = (0..30).map(Endpoint::numbered).collect();
        endpoints[17].verdict = ejected();
        let view = ServiceView::new("web".parse().unwrap(), Protocol::Tcp, endpoints);
        let mut rng = SmallRng::seed_from_u64(3);
        let mut picks = |now, has_probed: bool, nearness: &dyn Fn(usize) -> Option<u8>| {
            let caller = Caller {
                stance: &|_| Stance {
                    rank: Rank::Willing,
                    share: WHOLE,
                    load: Load { cost: 1.0, in_flight: 0 },
                },
                shares: view.ready(),
                order: &Order::LeastLoad,
                now: Moment::from_secs(now),
                heeds_others: true,
                window: &|_| Window::default(),
                has_probed: &|_, _| has_probed,
                nearness,
            };
            (0..100).filter(|_| pick(&view, &caller, &mut rng) == Ok(17)).count()
        };
        let all_are_near = |_| Some(0);
        assert_eq!(picks(69, false, &all_are_near), 0);
        assert_eq!(picks(70, false, &all_are_near), 100);
        assert_eq!(picks(70, true, &all_are_near), 0, "this caller has tried it");
        assert!(picks(70, false, &|at| (at != 17).then_some(0)) < 30, "it is nobody's to use");
    }

    #[test]
    fn ejected_by_all_is_the_last_resort_unless_own_success_is_newer_or_it_is_to_be_probed() {
        let success = |secs_ago| Window {
            last_success_age: Some(Duration::from_secs(secs_ago)),
            ..Window::default()
        };
        let (calm, panic) = (false, true);
        #[allow(clippy::type_complexity)] // a table: when, own window, probed, panic; who is picked
        let cases: &[(&str, u64, Window, bool, bool, &[usize])] = &[
            ("no own evidence", 20, Window::default(), false, calm, &[1]),
            ("own success of before", 20, success(11), false, calm, &[1]),
            ("own success since", 20, success(2), false, calm, &[0, 1]),
            ("panic", 20, Window::default(), false, panic, &[0, 1]),
            ("its time has come", 71, Window::default(), false, calm, &[0]),
            ("and was taken", 71, Window::default(), true, calm, &[1]),
        ];
        for (why, now, window, has_probed, is_panic, expected) in cases {
            let mut endpoints: Vec<_> = (0..2).map(Endpoint::numbered).collect();
            endpoints[0].verdict = ejected();
            let name: ServiceName = "web".parse().unwrap();
            let mut view = ServiceView::new(name, Protocol::Tcp, endpoints);
            view.is_panic = *is_panic;
            let caller = Caller {
                stance: &|_| Stance {
                    rank: Rank::Willing,
                    share: WHOLE,
                    load: Load { cost: 1.0, in_flight: 0 },
                },
                shares: view.ready(),
                order: &Order::LeastLoad,
                now: Moment::from_secs(*now),
                heeds_others: true,
                window: &|_| *window,
                has_probed: &|_, _| *has_probed,
                nearness: &|_| Some(0),
            };
            let mut rng = SmallRng::seed_from_u64(3);
            let mut picked: Vec<_> =
                (0..100).map(|_| pick(&view, &caller, &mut rng).unwrap()).collect();
            picked.sort_unstable();
            picked.dedup();
            assert_eq!(picked, *expected, "{why}");
        }
    }
}
