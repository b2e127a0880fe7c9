//! Counters of traffic, resolved once for each service and peer, and events at a bounded rate.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::tcp::Cut;
use crate::model::{MemberId, MemberName, Moment, ServiceName};
use crate::runtime::clock::Clock;
use crate::telemetry::{
    Counter, Direction, EventKind, EventLog, Metrics, TrafficLabels, TrafficMetrics,
};
use crate::transport::tunnel::TunnelError;

/// Of one kind of trouble with one subject, one event in this time; the counters have them all.
const EVENT_PERIOD: Duration = Duration::from_secs(1);
/// Kinds of trouble remembered for that.
const RECENT_MAX: usize = 1_024;

type Key = (bool, MemberId, ServiceName);

/// Counters by direction, service and peer. Cheap to clone.
#[derive(Clone)]
pub(super) struct Traffic {
    metrics: Metrics,
    clock: Clock,
    known: Arc<Mutex<BTreeMap<Key, Arc<TrafficMetrics>>>>,
    recent: Arc<Mutex<BTreeMap<(String, String), Moment>>>,
}

/// The counters of one connection.
pub(super) struct Counters {
    metrics: Arc<TrafficMetrics>,
    /// Bytes carried, both ways.
    pub(super) bytes: Counter,
}

/// An open connection, counted until it is dropped; without [`Open::end`] it failed.
pub(super) struct Open {
    metrics: Arc<TrafficMetrics>,
    is_success: bool,
}

impl Traffic {
    pub(super) fn new(metrics: Metrics, clock: Clock) -> Self {
        Self { metrics, clock, known: Arc::default(), recent: Arc::default() }
    }

    /// The counters of a connection with `peer` about `service`.
    pub(super) fn of(
        &self,
        direction: Direction,
        service: &ServiceName,
        peer: MemberId,
        peer_name: &MemberName,
    ) -> Counters {
        let key = (direction == Direction::inbound, peer, service.clone());
        let mut known = self.known.lock();
        let metrics = known.entry(key).or_insert_with(|| {
            let (service, peer) = (service.to_string(), peer_name.to_string());
            Arc::new(self.metrics.traffic(TrafficLabels { direction, service, peer }))
        });
        Counters { bytes: metrics.bytes.clone(), metrics: Arc::clone(metrics) }
    }

    /// Records what cut a connection about `service`, if something did that is worth telling.
    pub(super) fn report_cut(
        &self,
        events: &EventLog,
        service: &ServiceName,
        outcome: &Result<(), Cut>,
    ) {
        let kind = match outcome {
            Err(Cut::Stalled) => EventKind::StreamStalled,
            Err(Cut::Tunnel(TunnelError::Lost(_))) => EventKind::StreamCut,
            _ => return, // applications cut connections all the time
        };
        let reason = if kind == EventKind::StreamStalled { "stalled" } else { "connection lost" };
        self.report(events, kind, service.as_str(), reason);
    }

    /// Records an event, unless the same was recorded within the last second.
    pub(super) fn report(&self, events: &EventLog, kind: EventKind, subject: &str, reason: &str) {
        let now = self.clock.now();
        let mut recent = self.recent.lock();
        let key = (format!("{kind:?} {subject}"), reason.to_owned());
        if recent.get(&key).is_some_and(|at| now.since(*at) < EVENT_PERIOD) {
            return;
        }
        if recent.len() >= RECENT_MAX {
            recent.retain(|_, at| now.since(*at) < EVENT_PERIOD);
        }
        recent.insert(key, now);
        drop(recent);
        events.record(kind, subject, reason);
    }
}

impl Counters {
    /// Counts the connection as open.
    pub(super) fn begin(&self) -> Open {
        self.metrics.open.inc();
        Open { metrics: Arc::clone(&self.metrics), is_success: false }
    }
}

impl Open {
    /// Counts how the connection ended.
    pub(super) fn end(mut self, outcome: &Result<(), Cut>) {
        self.is_success = outcome.is_ok();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.open.dec();
        let ended = if self.is_success { &self.metrics.success } else { &self.metrics.failure };
        ended.inc();
    }
}
