//! Counters of traffic, resolved once for each service and peer, and what cut it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::tcp::Cut;
use crate::model::{MemberId, MemberName, Moment, ServiceName};
use crate::telemetry::{
    Counter, Direction, EventKind, EventLog, Metrics, TrafficLabels, TrafficMetrics,
};
use crate::transport::tunnel::TunnelError;

/// Services and peers whose counters are held ready; above it those without a connection are let go
/// and looked up again when they come back.
const KNOWN_MAX: usize = 10_000;

type Key = (bool, MemberId, ServiceName);

/// Counters by direction, service and peer. Cheap to clone.
#[derive(Clone)]
pub(super) struct Traffic {
    metrics: Metrics,
    known: Arc<Mutex<BTreeMap<Key, Arc<TrafficMetrics>>>>,
}

/// The counters of one connection.
pub(super) struct Counters {
    metrics: Arc<TrafficMetrics>,
    /// Bytes carried, both ways.
    pub(super) bytes: Counter,
}

/// Where the bytes of one connection are counted.
#[derive(Clone, Copy)]
pub(super) struct Meter<'a> {
    /// Both ways.
    all: &'a Counter,
    /// Those to the socket for which they are carried, where somebody wants to know.
    sent: Option<&'a AtomicU64>,
}

impl<'a> Meter<'a> {
    /// `sent` counts those to the socket for which they are carried, too.
    pub(super) fn new(all: &'a Counter, sent: Option<&'a AtomicU64>) -> Self {
        Self { all, sent }
    }

    /// The socket said so much.
    pub(super) fn count_said(&self, len: usize) {
        self.all.inc_by(len as u64);
    }

    /// The socket is sent so much.
    pub(super) fn count_sent(&self, len: usize) {
        self.all.inc_by(len as u64);
        if let Some(sent) = self.sent {
            sent.fetch_add(len as u64, Ordering::Relaxed);
        }
    }
}

/// An open connection, counted until it is dropped; without [`Open::end`] it failed.
pub(super) struct Open {
    metrics: Arc<TrafficMetrics>,
    is_success: bool,
}

impl Traffic {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { metrics, known: Arc::default() }
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
        if known.len() >= KNOWN_MAX && !known.contains_key(&key) {
            known.retain(|_, metrics| Arc::strong_count(metrics) > 1);
        }
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
        events.record(kind, service, reason);
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

/// A request under way, counted until it is dropped; without [`Exchange::end`] its response was cut.
pub(super) struct Exchange {
    metrics: Arc<TrafficMetrics>,
    status: u16,
    begun_at: Moment,
    /// How long it took, where it is over.
    duration: Option<Duration>,
}

impl Counters {
    /// Counts an exchange that began at `begun_at` and was answered with `status`.
    pub(super) fn exchange(&self, begun_at: Moment, status: u16) -> Exchange {
        self.metrics.open.inc();
        Exchange { metrics: Arc::clone(&self.metrics), status, begun_at, duration: None }
    }
}

impl Exchange {
    /// The response came to its end.
    pub(super) fn end(mut self, now: Moment) {
        self.duration = Some(now.since(self.begun_at));
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.metrics.open.dec();
        self.metrics.count_answer(self.status, self.duration.is_some());
        if let Some(duration) = self.duration {
            self.metrics.duration.observe(duration.as_secs_f64());
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.metrics.open.dec();
        let ended = if self.is_success { &self.metrics.success } else { &self.metrics.failure };
        ended.inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_the_past_are_let_go_and_those_of_open_connections_stay() {
        let (metrics, peer) = (Metrics::new(), MemberId::from_bytes([1; 16]));
        let traffic = Traffic::new(metrics);
        let of = |number: usize| {
            let service = format!("web-{number}").parse().unwrap();
            traffic.of(Direction::outbound, &service, peer, &"b".parse().unwrap())
        };
        let first = of(0);
        let open = first.begin();
        drop(first);
        (1..2 * KNOWN_MAX).for_each(|number| drop(of(number)));
        assert!(traffic.known.lock().len() <= KNOWN_MAX, "{}", traffic.known.lock().len());
        open.end(&Ok(()));
        assert_eq!(of(0).metrics.success.get(), 1, "counted where it began");
    }
}
