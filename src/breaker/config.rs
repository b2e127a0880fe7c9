//! Every threshold of the breakers, with its reason. `docs/breaker.md` has the figures.

use std::time::Duration;

/// When one caller stops calling an instance, and how it begins again.
#[derive(Clone, Debug, PartialEq)]
pub struct BreakerConfig {
    /// Answered failures in a row that open it. Default 5. More: a sick instance is hit longer; fewer:
    /// chance opens it (five in a row by chance at 10 % errors: once in 100,000 calls).
    pub errors: u16,
    /// Refused connections in a row that open it. Default 2: the second only rules out a restart.
    pub connect_errors: u16,
    /// Share of failures in the window that opens it, 0 to 1. Default 0.5.
    pub ratio: f32,
    /// Time that the window covers, in ten buckets. Default 10 s.
    pub window: Duration,
    /// Calls in the window below which the share says nothing. Default 10.
    pub samples_min: u16,
    /// First pause. Default 1 s.
    pub pause_min: Duration,
    /// Longest pause. Default 60 s.
    pub pause_max: Duration,
    /// Time in which an instance that is back comes from a tenth of its share to all. Default 10 s: a
    /// cold instance warms up, and at a tenth a relapse meets a tenth of the calls.
    pub ramp: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            errors: 5,
            connect_errors: 2,
            ratio: 0.5,
            window: Duration::from_secs(10),
            samples_min: 10,
            pause_min: Duration::from_secs(1),
            pause_max: Duration::from_secs(60),
            ramp: Duration::from_secs(10),
        }
    }
}
