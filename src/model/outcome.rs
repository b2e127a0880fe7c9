//! How a call to an instance ended.

/// How a call to an instance ended, as evidence about that instance. Everything that says nothing
/// about it is [`Outcome::Unknown`], so that a caller's own faults never count against anybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It answered well: HTTP below 400 and 501, any gRPC status but those below, a TCP connection
    /// that carried bytes back.
    Success,
    /// It was reached and answered badly or not at all: HTTP 5xx other than 501, gRPC UNAVAILABLE,
    /// INTERNAL, DATA_LOSS, UNKNOWN or DEADLINE_EXCEEDED, a reset or a time-out after the connection.
    Failed,
    /// Its agent answered that the instance refused the connection: certain, and no byte reached it.
    Unreached,
    /// No evidence: its agent was not reached, the caller was denied or gave up, the caller's own
    /// fault (4xx and 429).
    Unknown,
}

impl Outcome {
    /// Whether it speaks against the instance.
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::Failed | Self::Unreached)
    }

    /// Whether it says anything about the instance.
    pub const fn is_evidence(self) -> bool {
        !matches!(self, Self::Unknown)
    }
}
