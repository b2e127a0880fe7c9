//! What this caller knows of every endpoint by its own calls: calls in flight, cost, breaker, last
//! trouble. One object for each, found by its place in the service's view.
//!
//! The [`Board`] of a service is made from the mesh's view of it, again with the first call after that
//! has changed; the objects are kept. So a pick allocates nothing, and locks the random generator of all
//! services to its end and, one by one, the endpoints that it looks at, mostly two or three. All picks are
//! made on the proxy's one thread: none waits for another.

mod news;
mod picked;
mod preview;
mod service;
mod slot;
mod table;
#[cfg(test)]
mod tests;
mod tiers;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Notify;
use tokio::time::interval;

use super::limits::{BreakerLimits, Scope};
use super::load::Gauge;
use super::pauses::{LOOK_PERIOD, Pauses};
use crate::balancer::Others;
use crate::breaker::{Breaker, BreakerConfig, InstanceKey, Trial, Verdict};
use crate::mesh::{Endpoint, NoEndpoint, ServiceView, Snapshot};
use crate::model::{InstanceId, MemberId, Moment, Outcome, ServiceName};
use crate::runtime::clock::Clock;
use crate::telemetry::{EventLog, Metrics};

use service::ServiceBoard;
use slot::{MemberSlot, Slot};

pub(super) use picked::Counted;
pub use picked::{Picked, Tried};
pub use preview::Preview;
pub use service::{Choice, cost_min};
pub use slot::{BreakerReport, Cost, EndpointReport, Opened};

/// Who is to be avoided for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Avoid {
    Nobody,
    Instance,
    Member,
}

/// The boards of all services that are called, and what is known of every endpoint. For any thread;
/// picks are made on the data thread.
pub struct Boards {
    me: MemberId,
    clock: Clock,
    metrics: Metrics,
    events: EventLog,
    /// Something that the other callers should know at once.
    news: Notify,
    pauses: Pauses,
    rng: Mutex<SmallRng>,
    services: ArcSwap<BTreeMap<ServiceName, Arc<ServiceBoard>>>,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    members: BTreeMap<MemberId, Known>,
    /// Where the breakers of a service are to be other than usual.
    configs: BTreeMap<ServiceName, (BreakerConfig, Scope)>,
    /// Of the next breaker.
    seed: u64,
}

#[derive(Debug, Default)]
struct Known {
    slot: Arc<MemberSlot>,
    /// With the service that each serves: one of the same name that serves another is another.
    instances: BTreeMap<InstanceId, (ServiceName, Arc<Slot>)>,
}

impl Boards {
    /// None yet. `seed` makes the choices and pauses differ from those of other callers.
    pub fn new(me: MemberId, clock: Clock, metrics: Metrics, events: EventLog, seed: u64) -> Self {
        let slots = Slots { seed, ..Slots::default() };
        Self {
            me,
            clock,
            metrics,
            events,
            news: Notify::new(),
            pauses: Pauses::new(clock.now()),
            rng: Mutex::new(SmallRng::seed_from_u64(seed)),
            services: ArcSwap::default(),
            slots: Mutex::new(slots),
        }
    }

    /// The board of `service`, as `snapshot` has it.
    fn of(
        &self,
        snapshot: &Snapshot,
        service: &ServiceName,
    ) -> Result<Arc<ServiceBoard>, NoEndpoint> {
        let view = snapshot.services.get(service).ok_or(NoEndpoint::UnknownService)?;
        let services = self.services.load();
        match services.get(service) {
            Some(board) if Arc::ptr_eq(&board.view, view) => Ok(Arc::clone(board)),
            before => Ok(self.renew(snapshot, view, before)),
        }
    }

    /// Breakers of `service` are made like this from now on, those that are there anew.
    pub(super) fn configure(&self, service: &ServiceName, limits: &BreakerLimits) {
        let mut slots = self.slots.lock();
        let (config, scope) = (&limits.config(), limits.scope.unwrap_or_default());
        let before = slots.configs.insert(service.clone(), (config.clone(), scope));
        if before.unwrap_or_default() == (config.clone(), scope) {
            return;
        }
        self.services.store(Arc::default()); // made again with the next call
        let Slots { members, seed, .. } = &mut *slots;
        let instances = members.values().flat_map(|known| known.instances.values());
        for (_, slot) in instances.filter(|(of, _)| of == service) {
            *seed = seed.wrapping_add(1);
            slot.standing.lock().breaker = Breaker::new(config, *seed);
        }
    }

    /// The time.
    pub fn now(&self) -> Moment {
        self.clock.now()
    }

    /// All time until `now` in which this agent did not run.
    pub(super) fn slept(&self, now: Moment) -> Duration {
        self.pauses.slept(now)
    }

    /// Notes when this agent does not run, for ever.
    pub(super) async fn look_for_pauses(self: Arc<Self>) {
        let mut ticks = interval(LOOK_PERIOD);
        loop {
            ticks.tick().await;
            self.pauses.look(self.now());
        }
    }

    /// The endpoint of `service` that takes a call which begins `now`, among those that were not `tried`.
    /// `is_silent` says of a member whether it has fallen silent.
    pub fn pick(
        &self,
        now: Moment,
        snapshot: &Snapshot,
        service: &ServiceName,
        choice: &Choice,
        tried: &Tried,
        is_silent: impl Fn(&MemberId) -> bool,
    ) -> Result<Picked, NoEndpoint> {
        let board = self.of(snapshot, service)?;
        let at = board.pick(choice, tried, now, is_silent, &mut *self.rng.lock())?;
        Ok(Picked { board, at })
    }

    /// New calls go elsewhere for a while.
    pub(super) fn avoid(&self, picked: &Picked, whom: Avoid, reason: &'static str) {
        let slot = picked.slot();
        let trouble = match whom {
            Avoid::Nobody => return,
            Avoid::Instance => &slot.trouble,
            Avoid::Member => &slot.member.trouble,
        };
        trouble.add(self.now(), self.jitter(), reason);
    }

    /// From 0 to 1.
    pub(super) fn jitter(&self) -> f64 {
        self.rng.lock().random()
    }

    /// A call to this endpoint begins: with a trial if its end decides about the breaker.
    pub(super) fn begin(&self, now: Moment, picked: &Picked) -> Option<Trial> {
        if picked.board.scope == Scope::Off {
            return None;
        }
        let (trial, event) = picked.slot().begin(now, &picked.endpoint().verdict);
        self.tell(picked, event);
        trial
    }

    /// A call to this endpoint ended so, which began with that trial if with any.
    pub fn settle(&self, now: Moment, picked: &Picked, trial: Option<Trial>, outcome: Outcome) {
        if picked.board.scope == Scope::Off {
            if outcome.is_failure() {
                picked.slot().note_failure(now);
            }
            return;
        }
        let (event, is_urgent) = picked.slot().note_outcome(now, trial, outcome);
        // Whoever calls an instance with success that others accuse is to say so, and how a probe ended.
        let is_wanted = matches!(picked.endpoint().verdict, Verdict::Accused | Verdict::Ejected(_));
        if is_urgent || is_wanted {
            self.news.notify_one();
        }
        self.tell(picked, event);
    }

    /// Another opens a tunnel to an instance of this very member.
    pub(super) fn enter(&self, service: &ServiceName, id: &InstanceId) -> Counted {
        let slot = self.slots.lock().slot(self.me, service, id);
        let count = slot.open_tunnel();
        Counted { slot, count }
    }

    /// How busy each own instance is.
    pub(super) fn own_gauges(&self) -> Vec<(InstanceId, Arc<Gauge>)> {
        let slots = self.slots.lock();
        let own = slots.members.get(&self.me).into_iter().flat_map(|known| &known.instances);
        own.map(|(id, (_, slot))| (id.clone(), Arc::clone(&slot.gauge))).collect()
    }

    /// Members have said how many calls of others are under way at their instances; those that they did
    /// not name have none.
    pub(super) fn note_loads(&self, words: &[(MemberId, BTreeMap<InstanceId, f64>)]) {
        let now = self.now();
        for (member, loads) in words {
            let slots = self.slots.lock();
            let known = slots.members.get(member).into_iter().flat_map(|known| &known.instances);
            known.for_each(|(id, (_, slot))| slot.others.note(now, loads.get(id).copied()));
        }
        for board in self.services.load().values() {
            let ready = board.view.ready().iter();
            let ready = ready.map(|one| (&board.slots[one.candidate].others, one.weight));
            Others::compare(now, ready);
        }
    }

    /// How many calls an instance has in flight, as far as this member knows.
    pub fn in_flight(&self, member: &MemberId, instance: &InstanceId) -> u32 {
        self.find(member, instance).map_or(0, |slot| slot.in_flight())
    }

    /// The calls that instances of `member` have in flight; resting instances are left out.
    pub fn in_flight_of(&self, member: &MemberId) -> BTreeMap<InstanceId, u64> {
        let slots = self.slots.lock();
        let instances = slots.members.get(member).into_iter().flat_map(|known| &known.instances);
        let busy = instances.map(|(id, (_, slot))| (id.clone(), u64::from(slot.in_flight())));
        busy.filter(|(_, count)| *count > 0).collect()
    }

    /// All calls in flight, to others' instances from here and to our own from everywhere.
    pub fn in_flight_total(&self) -> u32 {
        let slots = self.slots.lock();
        let instances = slots.members.values().flat_map(|known| known.instances.values());
        instances.map(|(_, slot)| slot.in_flight()).sum()
    }

    /// What this member's own calls say of an endpoint; nothing when there were none.
    pub fn report(&self, endpoint: &Endpoint) -> EndpointReport {
        let slot = self.find(&endpoint.member, &endpoint.instance);
        slot.map_or_else(EndpointReport::default, |slot| slot.report(self.now()))
    }

    /// Why calls had better not go to an endpoint: the last trouble with it, if that was a moment ago.
    pub(super) fn trouble(&self, endpoint: &Endpoint) -> Option<&'static str> {
        self.find(&endpoint.member, &endpoint.instance)?.trouble_at(self.now())
    }

    fn find(&self, member: &MemberId, instance: &InstanceId) -> Option<Arc<Slot>> {
        let slots = self.slots.lock();
        let (_, slot) = slots.members.get(member)?.instances.get(instance)?;
        Some(Arc::clone(slot))
    }

    fn renew(
        &self,
        snapshot: &Snapshot,
        view: &Arc<ServiceView>,
        before: Option<&Arc<ServiceBoard>>,
    ) -> Arc<ServiceBoard> {
        let mut registry = self.slots.lock();
        let slot =
            |endpoint: &Endpoint| registry.slot(endpoint.member, &view.name, &endpoint.instance);
        let slots: Vec<_> = view.endpoints().iter().map(slot).collect();
        let board = Arc::new(ServiceBoard {
            view: Arc::clone(view),
            slots,
            plans: Default::default(),
            zone: snapshot
                .members
                .get(&self.me)
                .map_or_else(|| "".into(), |me| me.zone.as_str().into()),
            scope: registry.configs.get(&view.name).map_or(Scope::Mesh, |(_, scope)| *scope),
            table: OnceLock::new(),
            made_before: before.and_then(|before| {
                let made = before.table.get().map(|table| Arc::clone(&table.made));
                made.or_else(|| before.made_before.clone())
            }),
            turn: before.map_or_else(Arc::default, |before| Arc::clone(&before.turn)),
        });
        let known = self.services.load();
        let offered = known.iter().filter(|(name, _)| snapshot.services.contains_key(*name));
        let mut services: BTreeMap<_, _> =
            offered.map(|(name, board)| (name.clone(), Arc::clone(board))).collect();
        services.insert(view.name.clone(), Arc::clone(&board));
        self.services.store(Arc::new(services));
        drop(known);
        registry.forget();
        board
    }
}

impl Slots {
    fn slot(&mut self, member: MemberId, service: &ServiceName, id: &InstanceId) -> Arc<Slot> {
        let known = self.members.entry(member).or_default();
        if let Some((of, slot)) = known.instances.get(id)
            && of == service
        {
            return Arc::clone(slot);
        }
        let usual = BreakerConfig::default();
        let config = self.configs.get(service).map_or(&usual, |(config, _)| config);
        self.seed = self.seed.wrapping_add(1);
        let key = InstanceKey { member, instance: id.clone() };
        let of_member = Arc::clone(&known.slot);
        let slot = Arc::new(Slot::new(key, service.clone(), of_member, config, self.seed));
        known.instances.insert(id.clone(), (service.clone(), Arc::clone(&slot)));
        slot
    }

    /// Lets go of what no view and no call holds.
    fn forget(&mut self) {
        self.members.retain(|_, known| {
            known.instances.retain(|_, (_, slot)| Arc::strong_count(slot) > 1);
            !known.instances.is_empty()
        });
    }
}

impl fmt::Debug for Boards {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Boards")
    }
}
