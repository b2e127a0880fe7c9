//! What a member tells the others about instances that it calls.

use serde::{Deserialize, Serialize};

use super::{InstanceId, MemberId, ServiceName};

/// What a member saw of others' instances lately: counts, not verdicts. Published when something
/// begins, at most about once a second; what it saw grows old by the ages in it and by its own, whenever
/// and by whomever it is brought.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observations {
    /// The services that it calls: who has a voice. At most [`Observations::CALLS_MAX`].
    pub calls: Vec<ServiceName>,
    /// How many members it has called since the first failure that still counts, that one included:
    /// what one machine does is one experience.
    pub called: u16,
    /// How many of them fail for it. When most do, and two at least, it is itself the likelier cause.
    pub accused: u16,
    /// Those of which it has something to say. At most [`Observations::WINDOWS_MAX`].
    pub windows: Vec<ObservedWindow>,
    /// When it was signed, on its owner's clock: the wall time at which that run of it began and what has
    /// passed since, in milliseconds since 1970. What was seen counts nothing without it. Since version 2.
    pub signed_at_ms: Option<u64>,
}

impl Observations {
    /// Services in one entry; of a member that calls more, the others do not count it as a caller.
    pub const CALLS_MAX: usize = 32;
    /// Windows in one entry: with 16 of them it is about 600 bytes long.
    pub const WINDOWS_MAX: usize = 16;
}

/// Calls of one member to one instance. Ages are in milliseconds, as of when it was signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedWindow {
    /// The member in front of the instance.
    pub member: MemberId,
    /// Unique on that member.
    pub instance: InstanceId,
    /// Calls that say something: of the stretch of failures that goes on, or else of the window.
    pub samples: u16,
    /// Those that failed.
    pub failures: u16,
    /// When the stretch of failures began, if one goes on.
    pub first_failure_age_ms: Option<u32>,
    /// When a call failed last.
    pub last_failure_age_ms: Option<u32>,
    /// When a call succeeded last.
    pub last_success_age_ms: Option<u32>,
}
