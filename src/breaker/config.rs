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

/// When callers together stop calling an instance, and how they begin again.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedConfig {
    /// Accusers that it takes at least. Default 2: nobody alone.
    pub quorum_min: usize,
    /// Share of the service's callers that it takes, 0 to 1. Default 0.25: liars that are fewer eject
    /// nothing, whatever they say.
    pub quorum_share: f32,
    /// Failures that all accusers together have seen. Default 6.
    pub failures_min: u32,
    /// Pooled share of failures that it takes, 0 to 1. Default 0.6: as many voices against as for it do
    /// not eject.
    pub ratio: f32,
    /// Pooled share from which nobody is waited for longer than [`SharedConfig::rebuttal_min`], 0 to 1.
    /// Default 0.85: nobody objects, or one in many.
    pub ratio_clear: f32,
    /// Most samples that count of one caller: a busy one, or one that lies, has no more voice than
    /// that. Default 3.
    pub samples_max: u16,
    /// How long evidence counts. Default 10 s.
    pub window: Duration,
    /// How long a member counts as a caller after its last call, and what it says of a service that fails
    /// as a whole. Default 60 s: longer, and those that are gone make the quorum larger; shorter, and liars
    /// are more of those that call now and then.
    pub caller_for: Duration,
    /// By how much clocks may differ before anything is known of them. Default 2 s: what NTP keeps, and to
    /// spare. A first report may be older by as much than it is taken for.
    pub clock_tolerance: Duration,
    /// Failures that the most careful caller needs. Default 5.
    pub care_max: u16,
    /// How long an accusation that came to nothing makes a caller more careful. Default 60 s.
    pub care_for: Duration,
    /// How long ago failures may have begun that a caller tells of for the first time. Default 300 ms, as
    /// long as a word takes: longer, and one that dates its own back makes more of others' successes
    /// objections.
    pub onset_age_max: Duration,
    /// How long callers with contrary evidence have to speak at least. Default 400 ms: an
    /// accusation and an answer to it take up to 300.
    pub rebuttal_min: Duration,
    /// How long they have when some do. Default 2 s: in that time enough of them call it once more, and
    /// where few calls are made the wait costs few.
    pub rebuttal_max: Duration,
    /// First time between two probes of the whole mesh, doubled with each that fails. Default 1 s.
    pub period_min: Duration,
    /// Longest time between two probes; a probe that is late by as much may be anyone's. Default 60 s.
    pub period_max: Duration,
    /// Longest time between two probes that one caller's word makes; beyond, a second one is asked soon,
    /// and the first one's turn comes as much later than the others' begin. Default 8 s: longer, and a liar
    /// keeps out longer what is well; shorter, and what is ill gets more probes.
    pub period_doubted: Duration,
    /// How long it is one caller's turn to probe; then it is the next one's. Default 500 ms.
    pub turn: Duration,
    /// Time in which an instance that is back comes from a tenth of its share to all. Default 10 s.
    pub ramp: Duration,
    /// Shares of a service's instances ejected above which panic begins, and up to which it ends.
    /// Default 0.5 and 0.3.
    pub panic: (f32, f32),
    /// How long a panic lasts at least. Default 10 s.
    pub panic_hold: Duration,
}

impl Default for SharedConfig {
    fn default() -> Self {
        Self {
            quorum_min: 2,
            quorum_share: 0.25,
            failures_min: 6,
            ratio: 0.6,
            ratio_clear: 0.85,
            samples_max: 3,
            window: Duration::from_secs(10),
            caller_for: Duration::from_secs(60),
            clock_tolerance: Duration::from_secs(2),
            care_max: 5,
            care_for: Duration::from_secs(60),
            onset_age_max: Duration::from_millis(300),
            rebuttal_min: Duration::from_millis(400),
            rebuttal_max: Duration::from_secs(2),
            period_min: Duration::from_secs(1),
            period_max: Duration::from_secs(60),
            period_doubted: Duration::from_secs(8),
            turn: Duration::from_millis(500),
            ramp: Duration::from_secs(10),
            panic: (0.5, 0.3),
            panic_hold: Duration::from_secs(10),
        }
    }
}
