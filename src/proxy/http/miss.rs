//! Why an instance brought no response, and what its caller is told when none did.

use super::answer::Reason;
use super::malformed::Malformed;
use crate::proxy::board::Avoid;
use crate::proxy::dial::DialError;
use crate::proxy::last_asked::LastAsked;
use crate::proxy::outbound::Setback;

/// Why no instance answered, and which one was asked last.
pub(super) struct Unanswerable {
    pub(super) reason: Reason,
    pub(super) last: Option<LastAsked>,
}

impl Unanswerable {
    /// Nobody took the request, and it is nobody's in particular.
    pub(super) const fn not_taken(error: DialError) -> Self {
        Self { reason: Reason::NotTaken(error), last: None }
    }
}

impl From<Malformed> for Unanswerable {
    /// Nobody was asked.
    fn from(malformed: Malformed) -> Self {
        Self { reason: Reason::Malformed(malformed), last: None }
    }
}

/// Why one instance brought no response.
pub(super) enum Miss {
    /// Nothing of the request reached it.
    NotTaken(Setback),
    /// It may have had the request, which may be repeated.
    Repeatable { reason: DialError, avoid: Avoid, lost: Lost },
    /// It may have had the request, which may not be repeated.
    Lost(Lost),
    /// It said nothing for too long. No fault where the client may have had to speak first.
    TimedOut { is_fault: bool },
}

/// What the caller is told of a request that an instance may have had, and why.
pub(super) struct Lost {
    pub(super) reason: Reason,
    pub(super) why: String,
}

impl Lost {
    /// Nothing more is known.
    pub(super) const fn new() -> Self {
        Self { reason: Reason::Lost, why: String::new() }
    }
}

impl Miss {
    /// Whether it is the instance that failed. Not where its agent went away: then `is_link_open` is
    /// false.
    pub(super) fn is_fault(&self, is_link_open: bool) -> bool {
        is_link_open
            && match self {
                // It took the connection and closed it unread.
                Self::NotTaken(Setback::Next { reason, avoid, .. }) => {
                    (*reason, *avoid) == (DialError::Lost, Avoid::Member)
                }
                Self::TimedOut { is_fault } => *is_fault,
                Self::NotTaken(Setback::Cut(_)) | Self::Lost(_) => true,
                Self::NotTaken(Setback::Final { .. }) => false,
                Self::Repeatable { avoid, .. } => *avoid == Avoid::Instance,
            }
    }

    /// What the caller hears when nobody else is asked.
    pub(super) fn answer(&self) -> Reason {
        match self {
            Self::NotTaken(Setback::Next { reason, .. } | Setback::Final { reason, .. }) => {
                Reason::NotTaken(*reason)
            }
            Self::NotTaken(Setback::Cut(_)) => Reason::Lost,
            Self::Repeatable { lost, .. } | Self::Lost(lost) => lost.reason,
            Self::TimedOut { .. } => Reason::Timeout,
        }
    }

    /// What is said of it, if anything.
    pub(super) fn said(&self) -> &str {
        match self {
            Self::NotTaken(Setback::Next { said, .. } | Setback::Final { said, .. }) => said,
            Self::Repeatable { lost, .. } | Self::Lost(lost) => &lost.why,
            Self::NotTaken(Setback::Cut(_)) | Self::TimedOut { .. } => "",
        }
    }
}

impl<T: Into<Setback>> From<T> for Box<Miss> {
    fn from(setback: T) -> Self {
        Self::new(Miss::NotTaken(setback.into()))
    }
}
