//! What one endpoint is to this caller: calls in flight, cost, breaker, last trouble.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::balancer::{Balance, Load, Others, PeakEwma, Rank, Stance, WHOLE};
use crate::breaker::{
    Admission, Breaker, BreakerConfig, BreakerEvent, BreakerState, Ejection, FailedCalls,
    InstanceKey, OwnWindow, Trial, Trip, Verdict, Window,
};
use crate::mesh::Endpoint;
use crate::model::{Moment, Outcome, ServiceName};
use crate::proxy::load::Gauge;
use crate::proxy::trouble::Trouble;

/// What a member is to this caller: the part that all its instances share.
#[derive(Debug, Default)]
pub(super) struct MemberSlot {
    /// Its agent cannot be reached. No evidence about its instances.
    pub(super) trouble: Trouble,
}

/// What one endpoint is to this caller.
#[derive(Debug)]
pub(in crate::proxy) struct Slot {
    key: InstanceKey,
    service: ServiceName,
    pub(super) member: Arc<MemberSlot>,
    /// Its agent refused a call for it.
    pub(in crate::proxy) trouble: Trouble,
    /// Of this caller, in flight.
    calls: AtomicU32,
    /// Of others, to an own instance. They may rest.
    tunnels: AtomicU32,
    /// Calls that are under way: of this caller, and for an own instance of everybody.
    pub(super) gauge: Arc<Gauge>,
    /// How busy others keep it.
    pub(super) others: Others,
    /// Whether the others were not told of the last call.
    is_news: AtomicBool,
    /// Whether nobody listened where it is, the last time that it was asked.
    was_absent: AtomicBool,
    /// When it first took a call again after that, in nanoseconds; 0 when it never was.
    returned_at: AtomicU64,
    /// When its agent first turned a call away, for the mesh has ejected it, since the others were told of
    /// calls; 0 when it did not.
    turned_away_at: AtomicU64,
    pub(super) standing: Mutex<Standing>,
}

#[derive(Debug)]
pub(super) struct Standing {
    pub(super) cost: PeakEwma,
    pub(super) breaker: Breaker,
    /// Since when the breaker is as it is.
    breaker_since: Option<Moment>,
    /// How it opened last.
    opened: Option<Opened>,
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
    /// Calls in flight from here, and for an own instance the tunnels of others, at rest or not.
    pub in_flight: u32,
    /// Calls in flight from here alone.
    pub calls: u32,
    /// Calls under way: from here, and for an own instance from everywhere. What limits are about.
    pub under_way: u32,
    /// Until an answer began, or a connection was there.
    pub latency: Option<Duration>,
    /// Of this caller; `None` where it has not called the service.
    pub breaker: Option<BreakerReport>,
    /// The calls that failed last, if the very last one did and that was within a minute.
    pub failed: Option<FailedCalls>,
    /// Whether others keep it far busier than the rest.
    pub is_crowded: bool,
    /// What a call to it costs, beside those in flight.
    pub cost: Cost,
}

/// What calls are balanced by, as `peak_ewma` does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// All of it.
    pub whole: Duration,
    /// The part that is for failures.
    pub penalty: Duration,
}

/// How long calls that failed are shown where none came after them.
const FAILED_FOR: Duration = Duration::from_secs(60);

/// How a breaker opened, after it had last been closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Why.
    pub trip: Trip,
    /// When.
    pub at: Moment,
    /// Until when it refuses.
    pub until: Moment,
    /// Failures in a row by then.
    pub in_row: u16,
    /// What was seen before it opened last.
    pub window: Window,
    /// How often calls that tried the instance have failed since.
    pub relapses: u32,
}

impl Opened {
    /// Why it opened last, in one word.
    pub const fn word(&self) -> &'static str {
        match self.relapses {
            0 => self.trip.as_str(),
            _ => Trip::Relapse.as_str(),
        }
    }

    /// Why it opened, in a few words.
    pub fn cause(&self) -> String {
        let Window { samples, failures, .. } = self.window;
        match self.trip {
            Trip::ConnectErrors => format!("{} refused connections in a row", self.in_row),
            Trip::Errors => format!("{} failures in a row", self.in_row),
            Trip::Ratio => format!("{failures} of {samples} failed calls"),
            Trip::Relapse => "a failure when it was tried".to_owned(),
        }
    }
}

/// What listings show of one breaker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BreakerReport {
    /// In the field's words.
    pub state: BreakerState,
    /// How it opened last; `None` for one that never did.
    pub opened: Option<Opened>,
    /// When it became what it is, on this agent's clock; `None` for one that never changed.
    pub since: Option<Moment>,
    /// What was seen of late.
    pub window: Window,
}

impl Slot {
    pub(super) fn new(
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
            calls: AtomicU32::new(0),
            tunnels: AtomicU32::new(0),
            gauge: Arc::default(),
            others: Others::default(),
            is_news: AtomicBool::new(false),
            was_absent: AtomicBool::new(false),
            returned_at: AtomicU64::new(0),
            turned_away_at: AtomicU64::new(0),
            standing: Mutex::new(Standing {
                cost: PeakEwma::default(),
                breaker: Breaker::new(config, seed),
                breaker_since: None,
                opened: None,
                probed: None,
            }),
        }
    }

    /// Calls of this caller in flight.
    pub(in crate::proxy) fn calls(&self) -> u32 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Calls in flight, and tunnels of others to an own instance.
    pub(super) fn in_flight(&self) -> u32 {
        self.calls() + self.tunnels.load(Ordering::Relaxed)
    }

    /// Why new calls had better go elsewhere: the word of a refusal or loss of a moment ago.
    pub(super) fn trouble_at(&self, now: Moment) -> Option<&'static str> {
        self.member.trouble.at(now).or_else(|| self.trouble.at(now))
    }

    /// Nobody listens where it is: it restarts, or has no check that says so.
    pub(in crate::proxy) fn note_absent(&self) {
        self.was_absent.store(true, Ordering::Relaxed);
    }

    /// Its agent turned a call away, for the mesh has ejected it.
    pub(in crate::proxy) fn note_turned_away(&self, now: Moment) {
        let at = now.as_nanos().max(1);
        let _ = self.turned_away_at.compare_exchange(0, at, Ordering::Relaxed, Ordering::Relaxed);
        self.is_news.store(true, Ordering::Relaxed);
    }

    /// It took a call: what was before is over, and who had been absent is new.
    pub(in crate::proxy) fn note_taken(&self, now: Moment) {
        self.trouble.forgive();
        self.member.trouble.forgive();
        if self.was_absent.load(Ordering::Relaxed) && self.was_absent.swap(false, Ordering::Relaxed)
        {
            self.returned_at.store(now.as_nanos(), Ordering::Relaxed);
        }
    }

    /// Since when it takes work, as `endpoint` and own calls say; `None` for longer than is known here.
    pub(super) fn takes_work_since(&self, endpoint: &Endpoint) -> Option<Moment> {
        let returned_at = self.returned_at.load(Ordering::Relaxed);
        let returned = (returned_at > 0).then(|| Moment::from_nanos(returned_at));
        endpoint.rotation.since().max(returned)
    }

    /// A call of this caller begins.
    pub(in crate::proxy) fn enter(&self, now: Moment) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.gauge.begin(now);
    }

    /// A call of this caller ends.
    pub(in crate::proxy) fn leave(&self, now: Moment) {
        self.calls.fetch_sub(1, Ordering::Relaxed);
        self.gauge.end(now);
    }

    /// Another opens a tunnel to this own instance. Returns how many calls and tunnels there are, this
    /// one included.
    pub(super) fn open_tunnel(&self) -> u32 {
        self.tunnels.fetch_add(1, Ordering::Relaxed) + 1 + self.calls()
    }

    /// It is closed.
    pub(super) fn close_tunnel(&self) {
        self.tunnels.fetch_sub(1, Ordering::Relaxed);
    }

    /// An answer began after so long.
    pub(in crate::proxy) fn note_latency(&self, now: Moment, latency: Duration) {
        self.standing.lock().cost.handle_latency(now, latency);
    }

    /// Its caller has waited for so long and gave up.
    pub(in crate::proxy) fn note_given_up(&self, now: Moment, waited: Duration) {
        self.standing.lock().cost.handle_given_up(now, waited);
    }

    /// A call has failed, and no breaker is to know.
    pub(super) fn note_failure(&self, now: Moment) {
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
    pub(super) fn take_news(&self, now: Moment) -> Option<OwnWindow> {
        let is_news = self.is_news.swap(false, Ordering::Relaxed);
        is_news.then(|| OwnWindow {
            key: self.key.clone(),
            service: self.service.clone(),
            window: self.standing.lock().breaker.window(now),
            turned_away_at: Some(self.turned_away_at.swap(0, Ordering::Relaxed))
                .filter(|at| *at > 0)
                .map(Moment::from_nanos),
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
    pub(super) fn has_probed(&self, now: Moment, ejection: &Ejection) -> bool {
        let probed = self.standing.lock().probed;
        probed.is_some_and(|probed| {
            probed.after == ejection.tried_at && now.since(probed.at) < ejection.period
        })
    }

    /// How it stands to a call, as far as its own agent has not said otherwise.
    /// `cost_min` is what counts as the same.
    pub(super) fn stance(
        &self,
        now: Moment,
        endpoint: &Endpoint,
        balance: Balance,
        cost_min: f64,
    ) -> Stance {
        let under_way = self.gauge.under_way();
        let is_above = |limit: Option<u32>| limit.is_some_and(|limit| under_way >= limit);
        let mut rank = if self.trouble_at(now).is_some() || is_above(endpoint.capacity.hard) {
            Rank::LastResort
        } else if is_above(endpoint.capacity.soft) || self.others.is_crowd(now) {
            Rank::Full
        } else {
            Rank::Willing
        };
        let standing = self.standing.lock();
        let mut share = WHOLE;
        let cost = match balance {
            Balance::PeakEwma => standing.cost.cost_at(now).max(cost_min),
            _ => 1.0,
        };
        // Of this caller alone: what others have under way is seen of own instances only, and would
        // make each agent shun its own.
        let mut load = Load { cost, in_flight: self.calls() };
        match standing.breaker.admits(now) {
            Admission::Pass => {}
            Admission::Ramp(part) => share = share.min(part),
            Admission::Probe => (load, share) = (Load::TRIAL, WHOLE),
            Admission::Refuse { .. } => rank = Rank::LastResort,
        }
        Stance { rank, share, load }
    }

    /// How its breaker opened last; `None` for one that never did.
    pub(super) fn opened(&self) -> Option<Opened> {
        self.standing.lock().opened
    }

    pub(super) fn report(&self, now: Moment) -> EndpointReport {
        let standing = self.standing.lock();
        let breaker = BreakerReport {
            state: standing.breaker.state(),
            opened: standing.opened,
            since: standing.breaker_since,
            window: standing.breaker.window(now),
        };
        let in_row = standing.breaker.failed_in_row(now);
        let in_row = in_row.filter(|failed| failed.last_age < FAILED_FOR);
        EndpointReport {
            in_flight: self.in_flight(),
            calls: self.calls(),
            under_way: self.gauge.under_way(),
            latency: standing.cost.latency_at(now),
            breaker: Some(breaker),
            failed: in_row,
            is_crowded: self.others.is_crowd(now),
            cost: Cost {
                whole: nanos(standing.cost.cost_at(now)),
                penalty: nanos(standing.cost.penalty_at(now)),
            },
        }
    }
}

impl Standing {
    fn poll_event(&mut self, now: Moment) -> Option<BreakerEvent> {
        let event = self.breaker.poll_event()?;
        self.breaker_since = Some(now);
        match event {
            BreakerEvent::Opened { trip, until } => {
                let window = self.breaker.window(now);
                let in_row = self.breaker.failed_in_row(now).map_or(0, |failed| failed.count);
                // A relapse is more of the same: what began it, and when, stays.
                let opened = match self.opened {
                    Some(opened) if trip == Trip::Relapse => {
                        Opened { until, relapses: opened.relapses.saturating_add(1), ..opened }
                    }
                    _ => Opened { trip, at: now, until, in_row, window, relapses: 0 },
                };
                self.breaker_since = Some(opened.at);
                self.opened = Some(opened);
            }
            // It comes back by its ramp; what it did before is over.
            BreakerEvent::HalfOpened => self.cost = PeakEwma::default(),
            BreakerEvent::Closed => {}
        }
        Some(event)
    }
}

fn nanos(cost: f64) -> Duration {
    Duration::from_nanos(cost as u64)
}
