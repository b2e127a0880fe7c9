//! One service as this caller sees it, and the pick of one of its endpoints.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rand::Rng;

use super::picked::Tried;
use super::slot::Slot;
use super::table::{Made, Table};
use super::tiers::Plan;
use crate::balancer::{Balance, Order, Prefer, Rank, Stance, WHOLE, slow_start};
use crate::mesh::{self, Endpoint, NoEndpoint, ServiceView};
use crate::model::{MemberId, Moment, Protocol};
use crate::proxy::limits::Scope;

/// Cost below which TCP services take one connection for another: how long a connect took says little of
/// how an instance will work for as long as the connection lives.
const CONNECT_COST_MIN: Duration = Duration::from_millis(50);

/// Below which cost calls of services that speak `protocol` take one instance for another.
pub const fn cost_min(protocol: Protocol) -> Duration {
    match protocol {
        Protocol::Tcp | Protocol::Udp => CONNECT_COST_MIN,
        Protocol::Http | Protocol::H2 | Protocol::Grpc => Duration::ZERO,
    }
}

/// How one call is balanced.
#[derive(Clone, Copy, Debug, Default)]
pub struct Choice {
    /// The rule.
    pub balance: Balance,
    /// How near.
    pub prefer: Prefer,
    /// Of the key by which calls stay together.
    pub hash: u64,
}

/// One service as this caller sees it.
pub(super) struct ServiceBoard {
    pub(super) view: Arc<ServiceView>,
    /// One for each endpoint of the view, in its order.
    pub(super) slots: Vec<Arc<Slot>>,
    /// By [`Prefer::index`]; made with the first call that needs it.
    pub(super) plans: [OnceLock<Plan>; Prefer::COUNT],
    /// Of this caller's member.
    pub(super) zone: Arc<str>,
    /// Whose experience counts.
    pub(super) scope: Scope,
    pub(super) table: OnceLock<Table>,
    /// That of the view before.
    pub(super) made_before: Option<Arc<Made>>,
    pub(super) turn: Arc<AtomicU32>,
}

impl ServiceBoard {
    /// The endpoint and the slot at a place.
    pub(super) fn at(&self, at: usize) -> (&Endpoint, &Arc<Slot>) {
        (&self.view.endpoints()[at], &self.slots[at])
    }

    /// The place of the endpoint that takes the next call, among those that were not `tried`.
    /// `is_silent` says of a member whether it has fallen silent. Takes no lock for longer than it
    /// looks at one endpoint, and allocates nothing.
    pub(super) fn pick(
        &self,
        choice: &Choice,
        tried: &Tried,
        now: Moment,
        is_silent: impl Fn(&MemberId) -> bool,
        rng: &mut impl Rng,
    ) -> Result<usize, NoEndpoint> {
        let cost_min = cost_min(self.view.protocol).as_nanos() as f64;
        // Beside nobody who is warm all are alike.
        let eldest = self.view.in_rotation_since();
        let is_warm = eldest.is_none_or(|since| slow_start(now.since(since)) == WHOLE);
        let stance = |at: usize| {
            let (endpoint, slot) = self.at(at);
            if tried.contains(slot) {
                return Stance::NEVER;
            }
            let mut stance = slot.stance(now, endpoint, choice.balance, cost_min);
            if is_warm && let Some(since) = slot.takes_work_since(endpoint) {
                stance.share = stance.share.min(slow_start(now.since(since)));
            }
            if is_silent(&endpoint.member) {
                stance.rank = stance.rank.min(Rank::LastResort);
            }
            stance
        };
        let plan = (!choice.prefer.is_empty()).then(|| self.plan(choice.prefer));
        let shares = plan.map_or(self.view.ready(), |plan| plan.tier(self, now, rng));
        let nearness = |at: usize| plan.map_or(Some(0), |plan| plan.nearness[at]);
        let pick = |order: &Order<'_>, stance: &dyn Fn(usize) -> Stance, rng| {
            let caller = mesh::Caller {
                stance,
                shares,
                order,
                now,
                heeds_others: self.scope == Scope::Mesh,
                window: &|at| self.slots[at].standing.lock().breaker.window(now),
                has_probed: &|at, ejection| self.slots[at].has_probed(now, ejection),
                nearness: &nearness,
            };
            mesh::pick(&self.view, &caller, rng)
        };
        match choice.balance {
            Balance::PeakEwma | Balance::LeastRequest => pick(&Order::LeastLoad, &stance, rng),
            Balance::Random => pick(&Order::Random, &stance, rng),
            Balance::RoundRobin => {
                let next = || self.turn.fetch_add(1, Ordering::Relaxed);
                pick(&Order::Turns(&next), &stance, rng)
            }
            Balance::Maglev => {
                let table = self.table();
                let (maglev, places) = (&table.made.maglev, table.places.as_slice());
                pick(&Order::Table { maglev, places, hash: choice.hash }, &stance, rng)
            }
        }
    }

    /// Whether what all callers together hold of an endpoint counts now.
    pub(super) fn heeds_others(&self) -> bool {
        self.scope == Scope::Mesh && !self.view.is_panic && !self.view.is_failing
    }

    fn plan(&self, prefer: Prefer) -> &Plan {
        self.plans[prefer.index()].get_or_init(|| Plan::new(&self.view, &self.zone, prefer))
    }

    pub(super) fn table(&self) -> &Table {
        self.table.get_or_init(|| Table::new(&self.view, self.made_before.as_ref()))
    }
}

impl fmt::Debug for ServiceBoard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceBoard({})", self.view.name)
    }
}
