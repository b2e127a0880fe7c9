//! What this caller knows of every endpoint by its own calls: calls in flight, cost, breaker, last
//! trouble. One object for each, found by its place in the service's view.
//!
//! The [`Board`] of a service is made from the mesh's view of it, again with the first call after that
//! has changed; the objects are kept. So a pick takes no lock but that of the two or three endpoints it
//! looks at, and allocates nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng};
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use super::limits::{BreakerLimits, Scope};
use super::load::Gauge;
use super::trouble::Trouble;
use crate::balancer::{
    Balance, Load, Maglev, Near, Order, Others, PeakEwma, Prefer, Rank, Shares, Stance, Tier,
    WHOLE, slow_start, spill,
};
use crate::breaker::{
    Admission, Breaker, BreakerConfig, BreakerEvent, BreakerState, Ejection, InstanceKey,
    OwnWindow, Trial, Verdict, Window,
};
use crate::mesh::{self, Endpoint, EndpointState, NoEndpoint, ServiceView, Snapshot};
use crate::model::{InstanceId, MemberId, Moment, Outcome, Protocol, ServiceName, Weight};
use crate::runtime::clock::Clock;
use crate::telemetry::{EventKind, EventLog, Metrics};

/// How old the figures may be by which calls leave the near zone.
const SPILL_PERIOD: Duration = Duration::from_millis(100);
/// Cost, in nanoseconds, below which TCP services take one connection for another: how long a connect
/// took says little of how an instance will work for as long as the connection lives.
const CONNECT_COST_MIN: f64 = 50e6;
/// How often the others are told of calls that changed nothing, and the pause after telling, so that a
/// burst of failures is told once.
const TELL_PERIOD: Duration = Duration::from_secs(1);
const TELL_PAUSE: Duration = Duration::from_millis(20);

/// What a member is to this caller: the part that all its instances share.
#[derive(Debug, Default)]
pub(super) struct MemberSlot {
    /// Its agent cannot be reached. No evidence about its instances.
    pub(super) trouble: Trouble,
}

/// What one endpoint is to this caller.
#[derive(Debug)]
pub(super) struct Slot {
    key: InstanceKey,
    service: ServiceName,
    pub(super) member: Arc<MemberSlot>,
    /// Its agent refused a call for it.
    pub(super) trouble: Trouble,
    in_flight: AtomicU32,
    /// The work of an own instance, whoever causes it.
    gauge: Arc<Gauge>,
    /// How busy others keep it.
    others: Others,
    /// Whether the others were not told of the last call.
    is_news: AtomicBool,
    standing: Mutex<Standing>,
}

#[derive(Debug)]
struct Standing {
    cost: PeakEwma,
    breaker: Breaker,
    /// Since when the breaker is as it is.
    breaker_since: Option<Moment>,
    /// What opened it last, and until when.
    opened: Option<(&'static str, Moment)>,
    /// Since when it has taken work, while it is new.
    new_since: Option<Moment>,
    /// When this caller last took its turn to probe what all callers have ejected, and when that had
    /// been tried before.
    probed: Option<Probed>,
}

#[derive(Clone, Copy, Debug)]
struct Probed {
    at: Moment,
    after: Moment,
}

/// What listings show of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EndpointReport {
    /// Calls in flight, as far as this member knows.
    pub in_flight: u32,
    /// Until an answer began, or a connection was there.
    pub latency: Option<Duration>,
    /// Of this caller; `None` where it has not called the service.
    pub breaker: Option<BreakerReport>,
}

/// What listings show of one breaker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BreakerReport {
    /// In the field's words.
    pub state: BreakerState,
    /// What opened it last; `None` for one that never was.
    pub reason: Option<&'static str>,
    /// When it became what it is, on this agent's clock; `None` for one that never changed.
    pub since: Option<Moment>,
    /// Until when it refuses, if it does.
    pub until: Option<Moment>,
    /// What was seen of late.
    pub window: Window,
}

impl Slot {
    fn new(
        key: InstanceKey,
        service: ServiceName,
        member: Arc<MemberSlot>,
        config: &BreakerConfig,
        seed: u64,
    ) -> Self {
        Self {
            key,
            service,
            member,
            trouble: Trouble::default(),
            in_flight: AtomicU32::new(0),
            gauge: Arc::default(),
            others: Others::default(),
            is_news: AtomicBool::new(false),
            standing: Mutex::new(Standing {
                cost: PeakEwma::default(),
                breaker: Breaker::new(config, seed),
                breaker_since: None,
                opened: None,
                new_since: None,
                probed: None,
            }),
        }
    }

    /// Calls in flight.
    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Why new calls had better go elsewhere: the word of a refusal or loss of a moment ago.
    pub(super) fn trouble_at(&self, now: Moment) -> Option<&'static str> {
        self.member.trouble.at(now).or_else(|| self.trouble.at(now))
    }

    /// How busy the instance is, if it is an own one.
    pub(super) fn gauge(&self) -> &Gauge {
        &self.gauge
    }

    /// A call begins. Returns how many are in flight, this one included.
    pub(super) fn enter(&self) -> u32 {
        self.in_flight.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// A call ends.
    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// An answer began after so long.
    pub(super) fn note_latency(&self, now: Moment, latency: Duration) {
        self.standing.lock().cost.handle_latency(now, latency);
    }

    /// Its caller has waited for so long and gave up.
    pub(super) fn note_given_up(&self, now: Moment, waited: Duration) {
        self.standing.lock().cost.handle_given_up(now, waited);
    }

    /// A call has failed, and no breaker is to know.
    fn note_failure(&self, now: Moment) {
        self.standing.lock().cost.handle_failure(now);
    }

    /// A call has ended; returns what that made of the breaker, and whether the other callers are to
    /// be told at once: a stretch of failures has begun, or the breaker has changed.
    pub(super) fn note_outcome(
        &self,
        now: Moment,
        trial: Option<Trial>,
        outcome: Outcome,
    ) -> (Option<BreakerEvent>, bool) {
        let mut standing = self.standing.lock();
        standing.breaker.handle_outcome(now, trial, outcome);
        let event = standing.poll_event(now);
        let mut is_urgent = event.is_some();
        if outcome.is_failure() {
            standing.cost.handle_failure(now);
            is_urgent |= standing.breaker.window(now).first_failure_age == Some(Duration::ZERO);
        }
        if outcome.is_evidence() {
            self.is_news.store(true, Ordering::Relaxed);
        }
        (event, is_urgent)
    }

    /// What the others are to be told, if there is anything new.
    fn take_news(&self, now: Moment) -> Option<OwnWindow> {
        let is_news = self.is_news.swap(false, Ordering::Relaxed);
        is_news.then(|| OwnWindow {
            key: self.key.clone(),
            service: self.service.clone(),
            window: self.standing.lock().breaker.window(now),
        })
    }

    /// A call begins: the one that tries the instance, if nobody else may call it.
    pub(super) fn begin(
        &self,
        now: Moment,
        verdict: &Verdict,
    ) -> (Option<Trial>, Option<BreakerEvent>) {
        let mut standing = self.standing.lock();
        if let Verdict::Ejected(ejection) = verdict
            && verdict.admits(now) == Admission::Probe
        {
            standing.probed = Some(Probed { at: now, after: ejection.tried_at });
        }
        if standing.breaker.state() == BreakerState::Closed {
            return (None, None);
        }
        (standing.breaker.begin_probe(now), standing.poll_event(now))
    }

    /// Whether this caller has taken the turn to probe that this ejection offers. A probe that nobody has
    /// heard of within a period was turned away, or told nothing: it may take the turn again.
    fn has_probed(&self, now: Moment, ejection: &Ejection) -> bool {
        let probed = self.standing.lock().probed;
        probed.is_some_and(|probed| {
            probed.after == ejection.tried_at && now.since(probed.at) < ejection.period
        })
    }

    /// How it stands to a call, as far as its own agent has not said otherwise.
    /// `cost_min` is what counts as the same.
    fn stance(&self, now: Moment, endpoint: &Endpoint, balance: Balance, cost_min: f64) -> Stance {
        let in_flight = self.in_flight();
        let is_above = |limit: Option<u32>| limit.is_some_and(|limit| in_flight >= limit);
        let mut rank = if self.trouble_at(now).is_some() || is_above(endpoint.capacity.hard) {
            Rank::LastResort
        } else if is_above(endpoint.capacity.soft) || self.others.is_crowd(now) {
            Rank::Full
        } else {
            Rank::Willing
        };
        let mut standing = self.standing.lock();
        let mut share = standing.share_of_new(now);
        let cost = match balance {
            Balance::PeakEwma => standing.cost.cost_at(now).max(cost_min),
            _ => 1.0,
        };
        let mut load = Load { cost, in_flight };
        match standing.breaker.admits(now) {
            Admission::Pass => {}
            Admission::Ramp(part) => share = share.min(part),
            Admission::Probe => (load, share) = (Load::TRIAL, WHOLE),
            Admission::Refuse { .. } => rank = Rank::LastResort,
        }
        Stance { rank, share, load }
    }

    fn report(&self, now: Moment) -> EndpointReport {
        let standing = self.standing.lock();
        let (breaker, window) = (&standing.breaker, standing.breaker.window(now));
        let state = breaker.state();
        let (reason, until) = standing.opened.unzip();
        let breaker = BreakerReport {
            state,
            reason,
            since: standing.breaker_since,
            until: until.filter(|_| state == BreakerState::Open),
            window,
        };
        EndpointReport {
            in_flight: self.in_flight(),
            latency: standing.cost.latency_at(now),
            breaker: Some(breaker),
        }
    }
}

impl Standing {
    fn share_of_new(&mut self, now: Moment) -> u16 {
        let Some(since) = self.new_since else { return WHOLE };
        let share = slow_start(now.since(since));
        if share >= WHOLE {
            self.new_since = None;
        }
        share
    }

    fn poll_event(&mut self, now: Moment) -> Option<BreakerEvent> {
        let event = self.breaker.poll_event()?;
        self.breaker_since = Some(now);
        match event {
            BreakerEvent::Opened { trip, until } => self.opened = Some((trip.as_str(), until)),
            // It comes back by its ramp; what it did before is over.
            BreakerEvent::HalfOpened => self.cost = PeakEwma::default(),
            BreakerEvent::Closed => {}
        }
        Some(event)
    }
}

/// A call of an own instance, in flight until it is dropped. Whoever calls judges it.
#[derive(Debug)]
pub(super) struct Counted {
    slot: Arc<Slot>,
    /// How many were in flight when it began, itself included.
    pub(super) count: u32,
}

impl Counted {
    /// How busy the instance is.
    pub(super) fn gauge(&self) -> &Arc<Gauge> {
        &self.slot.gauge
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.slot.leave();
    }
}

/// The endpoint that takes a call, and what is known of it.
#[derive(Clone, Debug)]
pub struct Picked {
    board: Arc<ServiceBoard>,
    at: usize,
}

impl Picked {
    /// Which endpoint, as the mesh saw it then.
    pub fn endpoint(&self) -> &Endpoint {
        self.board.at(self.at).0
    }

    /// Whether the mesh keeps calls from it, but for one a period.
    pub(super) fn is_ejected(&self) -> bool {
        let Endpoint { member, instance, .. } = self.endpoint();
        self.board.view.ejection(member, instance).is_some()
    }

    /// Whether connections to it serve one call after the other, or several at a time. Not where its agent
    /// counts or admits calls, who sees only tunnels: each call has a tunnel of its own then.
    pub(super) fn shares_connections(&self) -> bool {
        self.endpoint().capacity.hard.is_none() && !self.is_ejected()
    }

    pub(super) fn slot(&self) -> &Arc<Slot> {
        self.board.at(self.at).1
    }

    fn service(&self) -> &ServiceName {
        &self.board.view.name
    }
}

/// Endpoints that one call has gone to. Allocates with the second.
#[derive(Clone, Debug, Default)]
pub struct Tried {
    first: Option<Arc<Slot>>,
    others: Vec<Arc<Slot>>,
}

impl Tried {
    /// It will not be picked again for this call.
    pub fn add(&mut self, picked: &Picked) {
        let slot = Arc::clone(picked.slot());
        match &self.first {
            None => self.first = Some(slot),
            Some(_) => self.others.push(slot),
        }
    }

    fn contains(&self, slot: &Arc<Slot>) -> bool {
        self.first.iter().chain(&self.others).any(|tried| Arc::ptr_eq(tried, slot))
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
    view: Arc<ServiceView>,
    /// One for each endpoint of the view, in its order.
    slots: Vec<Arc<Slot>>,
    /// By [`Prefer::index`]; made with the first call that needs it.
    plans: [OnceLock<Plan>; Prefer::COUNT],
    /// Of this caller's member.
    zone: Arc<str>,
    /// Whose experience counts.
    scope: Scope,
    table: OnceLock<Table>,
    /// That of the view before.
    made_before: Option<Arc<Made>>,
    turn: Arc<AtomicU32>,
}

/// By which keys lead to endpoints.
struct Table {
    made: Arc<Made>,
    /// The place in the view of each candidate.
    places: Vec<usize>,
}

/// A table and what it was made of: what of it most changes of the mesh leave as it is.
struct Made {
    candidates: Vec<(MemberId, InstanceId, Weight)>,
    maglev: Maglev,
}

/// The endpoints of a service by distance.
struct Plan {
    /// Nearest first: their shares, and the part of their calls that goes on to the next.
    tiers: Vec<(Shares, AtomicU16)>,
    nearness: Vec<Option<u8>>,
    /// When the parts were worked out, in nanoseconds.
    looked_at: AtomicU64,
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
        let cost_min = match self.view.protocol {
            Protocol::Tcp | Protocol::Udp => CONNECT_COST_MIN,
            Protocol::Http | Protocol::H2 | Protocol::Grpc => 0.0,
        };
        let stance = |at: usize| {
            let (endpoint, slot) = self.at(at);
            if tried.contains(slot) {
                return Stance::NEVER;
            }
            let mut stance = slot.stance(now, endpoint, choice.balance, cost_min);
            if is_silent(&endpoint.member) {
                stance.rank = stance.rank.min(Rank::LastResort);
            }
            stance
        };
        let plan = (!choice.prefer.is_empty()).then(|| self.plan(choice.prefer));
        let shares = plan.map_or(self.view.ready(), |plan| self.tier(plan, now, rng));
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

    /// Among whom is drawn first.
    fn tier<'p>(&self, plan: &'p Plan, now: Moment, rng: &mut impl Rng) -> &'p Shares {
        let looked_at = Moment::from_nanos(plan.looked_at.load(Ordering::Relaxed));
        if now.since(looked_at) >= SPILL_PERIOD || looked_at == Moment::START {
            plan.looked_at.store(now.as_nanos().max(1), Ordering::Relaxed);
            self.look(plan, now);
        }
        let mut goes_on = |part: &AtomicU16| match part.load(Ordering::Relaxed) {
            0 => false,
            part => rng.random_range(0..WHOLE) < part,
        };
        // The part of the last is 0: there is no next.
        let stops = plan.tiers.iter().position(|(_, part)| !goes_on(part)).unwrap_or(0);
        &plan.tiers[stops].0
    }

    /// Works out which part of each tier's calls goes on to the next.
    fn look(&self, plan: &Plan, now: Moment) {
        let tier = |nearness: usize| {
            let mut tier = Tier { soft: Some(0), ..Tier::default() };
            let (mut latency, mut measured) = (Duration::ZERO, 0);
            for (at, near) in plan.nearness.iter().enumerate() {
                if near.map(usize::from) != Some(nearness) {
                    continue;
                }
                let (endpoint, slot) = self.at(at);
                tier.all += 1;
                if endpoint.state != EndpointState::Ready {
                    continue;
                }
                let standing = slot.standing.lock();
                if matches!(standing.breaker.admits(now), Admission::Refuse { .. }) {
                    continue;
                }
                tier.ready += 1;
                tier.in_flight += u64::from(slot.in_flight());
                let limit = endpoint.capacity.soft.map(u64::from);
                tier.soft = tier.soft.zip(limit).map(|(sum, limit)| sum + limit);
                if let Some(of_one) = standing.cost.latency_at(now) {
                    latency += of_one;
                    measured += 1;
                }
            }
            tier.latency = (measured > 0).then(|| latency / measured);
            tier
        };
        for (at, pair) in plan.tiers.windows(2).enumerate() {
            pair[0].1.store(spill(&tier(at), &tier(at + 1)), Ordering::Relaxed);
        }
    }

    fn plan(&self, prefer: Prefer) -> &Plan {
        self.plans[prefer.index()].get_or_init(|| {
            let tiers: Vec<_> = prefer.tiers().collect();
            let nearness = |endpoint: &Endpoint| {
                let near = Near::between(&self.zone, &endpoint.zone);
                tiers.iter().position(|tier| near <= *tier).and_then(|at| u8::try_from(at).ok())
            };
            let nearness: Vec<_> = self.view.endpoints().iter().map(nearness).collect();
            let shares = |tier: usize| {
                let ready = self.view.ready().iter();
                let of = ready.filter(|one| nearness[one.candidate] == u8::try_from(tier).ok());
                let weight = |weight| Weight(u16::try_from(weight).unwrap_or(u16::MAX));
                of.map(|one| (one.candidate, weight(one.weight))).collect()
            };
            let tiers = (0..tiers.len()).map(|tier| (shares(tier), AtomicU16::new(0))).collect();
            Plan { tiers, nearness, looked_at: AtomicU64::new(0) }
        })
    }

    fn table(&self) -> &Table {
        self.table.get_or_init(|| {
            let endpoints = self.view.endpoints();
            let named = self.view.ready().iter().map(|one| {
                let endpoint = &endpoints[one.candidate];
                let name = (endpoint.member, endpoint.instance.clone(), endpoint.weight);
                (name, one.candidate)
            });
            let mut named: Vec<_> = named.collect();
            named.sort();
            let (candidates, places): (Vec<_>, Vec<_>) = named.into_iter().unzip();
            let before = self.made_before.as_ref().filter(|made| made.candidates == candidates);
            let made = before.map_or_else(|| Arc::new(Made::new(candidates)), Arc::clone);
            Table { made, places }
        })
    }
}

impl Made {
    fn new(candidates: Vec<(MemberId, InstanceId, Weight)>) -> Self {
        let names: Vec<_> = candidates
            .iter()
            .map(|(member, id, _)| [member.as_bytes().as_slice(), id.as_str().as_bytes()].concat())
            .collect();
        let weights = candidates.iter().map(|(_, _, weight)| *weight);
        let named = names.iter().zip(weights).enumerate();
        let maglev = Maglev::new(named.map(|(at, (name, weight))| (at, name.as_slice(), weight)));
        Self { candidates, maglev }
    }
}

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
            rng: Mutex::new(SmallRng::seed_from_u64(seed)),
            services: ArcSwap::default(),
            slots: Mutex::new(slots),
        }
    }

    /// The board of `service`, as `snapshot` has it.
    pub(super) fn of(
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
    pub(super) fn now(&self) -> Moment {
        self.clock.now()
    }

    /// The endpoint of `service` that takes the next call, among those that were not `tried`.
    /// `is_silent` says of a member whether it has fallen silent.
    pub fn pick(
        &self,
        snapshot: &Snapshot,
        service: &ServiceName,
        choice: &Choice,
        tried: &Tried,
        is_silent: impl Fn(&MemberId) -> bool,
    ) -> Result<Picked, NoEndpoint> {
        let board = self.of(snapshot, service)?;
        let at = board.pick(choice, tried, self.now(), is_silent, &mut *self.rng.lock())?;
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
    pub(super) fn begin(&self, picked: &Picked) -> Option<Trial> {
        if picked.board.scope == Scope::Off {
            return None;
        }
        let (trial, event) = picked.slot().begin(self.now(), &picked.endpoint().verdict);
        self.tell(picked, event);
        trial
    }

    /// A call to this endpoint ended so, which began with that trial if with any.
    pub fn settle(&self, picked: &Picked, trial: Option<Trial>, outcome: Outcome) {
        if picked.board.scope == Scope::Off {
            if outcome.is_failure() {
                picked.slot().note_failure(self.now());
            }
            return;
        }
        let (event, is_urgent) = picked.slot().note_outcome(self.now(), trial, outcome);
        // Whoever calls an instance with success that others accuse is to say so, and how a probe ended.
        let is_wanted = matches!(picked.endpoint().verdict, Verdict::Accused | Verdict::Ejected(_));
        if is_urgent || is_wanted {
            self.news.notify_one();
        }
        self.tell(picked, event);
    }

    /// Tells of own calls, for ever: of a change at once, and else every second of what was called.
    /// Words that find `windows` full are dropped: the next second has later ones.
    pub(super) async fn tell_windows(self: Arc<Self>, windows: mpsc::Sender<Vec<OwnWindow>>) {
        loop {
            let _ = timeout(TELL_PERIOD, self.news.notified()).await; // nothing urgent: time is up
            let told = self.take_news();
            if !told.is_empty() {
                let _ = windows.try_send(told);
            }
            sleep(TELL_PAUSE).await;
        }
    }

    fn take_news(&self) -> Vec<OwnWindow> {
        let (now, slots) = (self.now(), self.slots.lock());
        let instances = slots.members.values().flat_map(|known| known.instances.values());
        instances.filter_map(|(_, slot)| slot.take_news(now)).collect()
    }

    fn tell(&self, picked: &Picked, event: Option<BreakerEvent>) {
        let Some(event) = event else { return };
        let (state, kind, reason) = match event {
            BreakerEvent::Opened { trip, .. } => {
                (BreakerState::Open, Some(EventKind::BreakerOpened), trip.as_str())
            }
            BreakerEvent::HalfOpened => (BreakerState::HalfOpen, None, ""),
            BreakerEvent::Closed => {
                (BreakerState::Closed, Some(EventKind::BreakerClosed), "it answers again")
            }
        };
        let (service, endpoint) = (picked.service(), picked.endpoint());
        self.metrics.count_breaker(service.as_str(), state.as_str(), "local");
        if let Some(kind) = kind {
            let fields = [
                ("service", service.to_string()),
                ("node", endpoint.member_name.to_string()),
                ("source", "local".to_owned()),
            ];
            let fields = fields.map(|(key, value)| (key.to_owned(), value));
            self.events.record_with(kind, &endpoint.instance, reason, fields.into());
        }
    }

    /// A call to an instance of this very member begins, whoever calls.
    pub(super) fn enter(&self, service: &ServiceName, id: &InstanceId) -> Counted {
        let slot = self.slots.lock().slot(self.me, service, id);
        let count = slot.enter();
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
        if let Some(before) = before {
            before.mark_new(view, &slots);
        }
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

impl ServiceBoard {
    /// Marks those of the next view that have just begun to take work.
    fn mark_new(&self, next: &ServiceView, slots: &[Arc<Slot>]) {
        let takes_work = |endpoint: &Endpoint| {
            !matches!(endpoint.state, EndpointState::Down | EndpointState::Failing)
        };
        let known = self.view.endpoints().iter().zip(&self.slots);
        let known = known.filter(|(endpoint, _)| takes_work(endpoint));
        let known: BTreeSet<_> = known.map(|(_, slot)| Arc::as_ptr(slot)).collect();
        for (endpoint, slot) in next.endpoints().iter().zip(slots) {
            let was_there = known.contains(&Arc::as_ptr(slot));
            if endpoint.state == EndpointState::Ready && !was_there {
                slot.standing.lock().new_since = Some(endpoint.changed_at);
            }
        }
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

impl fmt::Debug for ServiceBoard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceBoard({})", self.view.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Capacity;

    const ME: MemberId = MemberId::from_bytes([255; 16]);

    fn boards() -> Boards {
        Boards::new(ME, Clock::new(), Metrics::new(), EventLog::new("me"), 1)
    }

    fn endpoint(number: u8) -> Endpoint {
        Endpoint {
            instance: format!("web-{number}").parse().unwrap(),
            member: MemberId::from_bytes([number; 16]),
            member_name: format!("node-{number}").parse().unwrap(),
            address: "127.0.0.1:7370".parse().unwrap(),
            port: 80,
            tags: Vec::new(),
            weight: Weight(100),
            state: EndpointState::Ready,
            zone: "".into(),
            verdict: Verdict::Clear,
            idempotent: Arc::default(),
            capacity: Capacity::default(),
            changed_at: Moment::START,
        }
    }

    fn service() -> ServiceName {
        "web".parse().unwrap()
    }

    fn snapshot(endpoints: Vec<Endpoint>) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let view = ServiceView::new(service(), Protocol::Http, endpoints);
        snapshot.services.insert(service(), Arc::new(view));
        snapshot
    }

    fn pick(boards: &Boards, snapshot: &Snapshot, tried: &Tried) -> Result<Picked, NoEndpoint> {
        boards.pick(snapshot, &service(), &Choice::default(), tried, |_| false)
    }

    /// How many of 1,000 picks go to each, by the number of its member.
    fn shares(boards: &Boards, snapshot: &Snapshot) -> BTreeMap<u8, u32> {
        let mut shares = BTreeMap::new();
        for _ in 0..1_000 {
            let picked = pick(boards, snapshot, &Tried::default()).unwrap();
            *shares.entry(picked.endpoint().member.as_bytes()[0]).or_default() += 1;
        }
        shares
    }

    /// One call to `number` that ends like this.
    fn call(boards: &Boards, snapshot: &Snapshot, number: usize, outcome: Outcome) {
        let board = boards.of(snapshot, &service()).unwrap();
        let picked = Picked { board, at: number };
        let trial = boards.begin(&picked);
        boards.settle(&picked, trial, outcome);
    }

    #[test]
    fn what_is_known_of_an_endpoint_outlives_every_change_of_the_mesh() {
        let boards = boards();
        let before = snapshot(vec![endpoint(1), endpoint(2)]);
        (0..5).for_each(|_| call(&boards, &before, 0, Outcome::Failed));
        let after = snapshot(vec![endpoint(0), endpoint(1), endpoint(2)]);
        let report = boards.report(&endpoint(1));
        assert_eq!(report.breaker.unwrap().state, BreakerState::Open);
        assert!(!shares(&boards, &after).contains_key(&1), "its place is another, its breaker not");
        for _ in 0..2 {
            shares(&boards, &snapshot(vec![endpoint(2)])); // a view holds what the next one may need
        }
        assert_eq!(boards.report(&endpoint(1)), EndpointReport::default(), "it is forgotten");
    }

    #[test]
    fn open_breaker_is_the_last_resort_and_refused_connections_open_it_sooner() {
        let boards = boards();
        let snapshot = snapshot(vec![endpoint(1), endpoint(2)]);
        (0..2).for_each(|_| call(&boards, &snapshot, 0, Outcome::Unreached));
        assert_eq!(shares(&boards, &snapshot).into_keys().collect::<Vec<_>>(), [2]);
        let mut tried = Tried::default();
        tried.add(&pick(&boards, &snapshot, &tried).unwrap());
        let last = pick(&boards, &snapshot, &tried).unwrap();
        assert_eq!(last.endpoint().member, endpoint(1).member, "nobody else is left");
        tried.add(&last);
        assert_eq!(pick(&boards, &snapshot, &tried).unwrap_err(), NoEndpoint::NoEndpoints);
        assert_eq!(boards.metrics.breakers("web", "open", "local"), 1);
    }

    #[test]
    fn breaker_that_is_off_never_opens_and_tells_nobody() {
        let boards = boards();
        let off = BreakerLimits { scope: Some(Scope::Off), ..BreakerLimits::default() };
        boards.configure(&service(), &off);
        let snapshot = snapshot(vec![endpoint(1), endpoint(2)]);
        (0..100).for_each(|_| call(&boards, &snapshot, 0, Outcome::Failed));
        assert!(boards.take_news().is_empty());
        assert!(
            boards.report(&endpoint(1)).breaker.is_none_or(|b| b.state == BreakerState::Closed)
        );
        let shares = shares(&boards, &snapshot);
        assert!(shares[&2] > 900, "failures still count as slowness: {shares:?}");
        boards.configure(&service(), &BreakerLimits::default());
        (0..5).for_each(|_| call(&boards, &snapshot, 0, Outcome::Failed));
        assert_eq!(boards.report(&endpoint(1)).breaker.unwrap().state, BreakerState::Open);
    }

    #[test]
    fn new_instance_begins_with_a_tenth_and_those_of_the_first_view_are_not_new() {
        let boards = boards();
        let two = snapshot(vec![endpoint(1), endpoint(2)]);
        assert!(shares(&boards, &two).values().all(|share| (400..600).contains(share)));
        let mut new = endpoint(3);
        new.changed_at = boards.now();
        let three = snapshot(vec![endpoint(1), endpoint(2), new]);
        let share = shares(&boards, &three).get(&3).copied().unwrap_or(0);
        assert!((5..80).contains(&share), "{share} of 1,000 for a tenth of a third");
    }

    #[test]
    fn full_ones_are_gone_around_and_used_when_all_are_full() {
        let boards = boards();
        let limited =
            Endpoint { capacity: Capacity { soft: Some(2), hard: Some(3) }, ..endpoint(1) };
        let snapshot = snapshot(vec![limited, endpoint(2)]);
        let full = boards.of(&snapshot, &service()).unwrap();
        for _ in 0..2 {
            full.slots[0].enter();
        }
        assert_eq!(shares(&boards, &snapshot).into_keys().collect::<Vec<_>>(), [2]);
        let mut tried = Tried::default();
        tried.add(&Picked { board: Arc::clone(&full), at: 1 });
        assert!(pick(&boards, &snapshot, &tried).is_ok(), "full is better than nothing");
        (0..2).for_each(|_| full.slots[0].leave());
        assert!(shares(&boards, &snapshot).contains_key(&1));
    }

    #[test]
    fn calls_prefer_the_near_zone_and_leave_it_as_it_fills() {
        let boards = boards();
        let zoned = |number, zone: &str| Endpoint {
            zone: zone.into(),
            capacity: Capacity { soft: Some(10), hard: None },
            ..endpoint(number)
        };
        let snapshot = snapshot(vec![zoned(1, "eu1/a"), zoned(2, "eu1/b"), zoned(3, "us1/a")]);
        let view = Arc::clone(&snapshot.services[&service()]);
        let slots: Vec<_> = view
            .endpoints()
            .iter()
            .map(|one| boards.slots.lock().slot(one.member, &service(), &one.instance))
            .collect();
        let board = ServiceBoard {
            view,
            slots,
            plans: Default::default(),
            zone: "eu1/a".into(),
            scope: Scope::Mesh,
            table: OnceLock::new(),
            made_before: None,
            turn: Arc::default(),
        };
        let prefer = Prefer::try_new(&["same-zone", "any"]).unwrap();
        let choice = Choice { prefer, ..Choice::default() };
        let mut rng = SmallRng::seed_from_u64(3);
        let mut near_of = |now: u64| {
            let near = (0..1_000).filter(|_| {
                let now = Moment::from_secs(now);
                board.pick(&choice, &Tried::default(), now, |_| false, &mut rng) == Ok(0)
            });
            near.count()
        };
        assert_eq!(near_of(1), 1_000);
        for _ in 0..8 {
            board.slots[0].enter();
        }
        let left = near_of(2);
        assert!((550..750).contains(&left), "{left} stay at 80 % of the limit");
        (0..8).for_each(|_| board.slots[0].leave());
        assert_eq!(near_of(3), 1_000, "and all are back");
    }

    #[test]
    fn table_is_kept_while_the_same_instances_are_ready() {
        let boards = boards();
        let choice = Choice { balance: Balance::Maglev, hash: 7, ..Choice::default() };
        let led = |snapshot: &Snapshot| {
            let picked = boards.pick(snapshot, &service(), &choice, &Tried::default(), |_| false);
            let board = boards.of(snapshot, &service()).unwrap();
            (picked.unwrap().endpoint().member, Arc::clone(&board.table().made))
        };
        let (first, made) = led(&snapshot(vec![endpoint(1), endpoint(2)]));
        let down = Endpoint { state: EndpointState::Down, ..endpoint(0) };
        let (second, same) = led(&snapshot(vec![down, endpoint(1), endpoint(2)]));
        assert!(Arc::ptr_eq(&made, &same), "what is down has no place in it");
        assert_eq!(first, second);
        let (_, other) = led(&snapshot(vec![endpoint(1)]));
        assert!(!Arc::ptr_eq(&made, &other));
    }
}
