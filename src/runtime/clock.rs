//! The only reader of the system clock.

#![allow(clippy::disallowed_methods)] // this is the one place that may

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use super::machine;
use crate::model::Moment;

/// The agent's monotonic clock. Follows tokio's time, so a paused runtime pauses it, too.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// A clock that starts now.
    #[allow(clippy::new_without_default)] // reading the time is no default
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }

    /// The time now.
    pub fn now(&self) -> Moment {
        Moment::from_nanos(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    /// When it began, in milliseconds since 1970, by what the wall clock says now.
    pub fn began_at_unix_millis(&self) -> u64 {
        let passed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        unix_millis().saturating_sub(passed)
    }

    /// The instant that tokio's timers need for `moment`.
    pub fn instant(&self, moment: Moment) -> Instant {
        self.start + Duration::from_nanos(moment.as_nanos())
    }
}

/// Wall time in whole seconds since 1970. For certificates, epochs and displays only.
pub fn unix_seconds() -> u64 {
    unix_time().as_secs()
}

/// Wall time since 1970. For what ends by wall time: certificates.
pub fn unix_time() -> Duration {
    match machine::simulated() {
        None => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
        Some(machine) => machine.unix_time(),
    }
}

/// Wall time in milliseconds since 1970. For displays and for comparing clocks only.
pub fn unix_millis() -> u64 {
    u64::try_from(unix_time().as_millis()).unwrap_or(u64::MAX)
}
