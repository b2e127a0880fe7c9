//! What the others and the operator are told of own calls.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::{Boards, Picked};
use crate::breaker::{BreakerEvent, BreakerState, OwnWindow, Trip};
use crate::telemetry::EventKind;

/// How often the others are told of calls that changed nothing, and the pause after telling, so that a
/// burst of failures is told once.
const TELL_PERIOD: Duration = Duration::from_secs(1);
const TELL_PAUSE: Duration = Duration::from_millis(20);

impl Boards {
    /// Tells of own calls until nobody listens: of a change at once, and else every second of what was
    /// called. Nothing is taken before there is room for it: while `windows` is full it stays where it
    /// is counted, and is told as it stands then.
    pub(in crate::proxy) async fn tell_windows(
        self: Arc<Self>,
        windows: mpsc::Sender<Vec<OwnWindow>>,
    ) {
        loop {
            let _ = timeout(TELL_PERIOD, self.news.notified()).await; // nothing urgent: time is up
            if windows.capacity() == 0 {
                self.metrics.breaker_news_delayed.inc();
            }
            let Ok(room) = windows.reserve().await else { return };
            let told = self.take_news();
            if !told.is_empty() {
                room.send(told);
            }
            sleep(TELL_PAUSE).await;
        }
    }

    pub(super) fn take_news(&self) -> Vec<OwnWindow> {
        let (now, slots) = (self.now(), self.slots.lock());
        let instances = slots.members.values().flat_map(|known| known.instances.values());
        instances.filter_map(|(_, slot)| slot.take_news(now)).collect()
    }

    pub(super) fn tell(&self, picked: &Picked, event: Option<BreakerEvent>) {
        let Some(event) = event else { return };
        let (state, kind) = match event {
            // The instance has failed since the first time, and nothing new has happened.
            BreakerEvent::Opened { trip: Trip::Relapse, .. } => (BreakerState::Open, None),
            BreakerEvent::Opened { .. } => (BreakerState::Open, Some(EventKind::BreakerOpened)),
            BreakerEvent::HalfOpened => (BreakerState::HalfOpen, None),
            BreakerEvent::Closed => (BreakerState::Closed, Some(EventKind::BreakerClosed)),
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
            let why = match kind {
                EventKind::BreakerClosed => "it answers again".to_owned(),
                _ => picked.slot().opened().map_or_else(String::new, |opened| opened.cause()),
            };
            let reason = format!("only here: {why}");
            self.events.record_with(kind, &endpoint.instance, reason, fields.into());
        }
    }
}
