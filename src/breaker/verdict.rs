//! What all callers together hold of an instance, as a reader of the snapshot sees it.

use std::sync::Arc;
use std::time::Duration;

use super::local::ramp;
use super::{Admission, Grounds, Window};
use crate::model::Moment;

/// What all callers together hold of an instance, as this node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing speaks against it.
    #[default]
    Clear,
    /// A quorum accuses it, and others may object: whoever calls it with success gives the shared
    /// breaker its window at once.
    Accused,
    /// Nobody calls it but one caller at a time, whose turn it is.
    Ejected(Ejection),
    /// It is on its way back: its share grows.
    Probing {
        /// Since when.
        since: Moment,
        /// Time that the ramp takes.
        ramp: Duration,
        /// Why it was ejected.
        grounds: Arc<Grounds>,
    },
}

/// An instance that nobody calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ejection {
    /// Since when.
    pub since: Moment,
    /// When the mesh tried it last, or began not to call it.
    pub tried_at: Moment,
    /// Time between two probes of the whole mesh.
    pub period: Duration,
    /// When it is this node's turn to probe; `None` when it is no caller.
    pub turn: Option<Turn>,
    /// From then on anyone may probe.
    pub anyone_at: Moment,
    /// Why.
    pub grounds: Arc<Grounds>,
}

impl Verdict {
    /// What a call that begins now may do. A caller that takes [`Admission::Probe`] remembers when,
    /// and takes none for the same [`Ejection::tried_at`] again.
    pub fn admits(&self, now: Moment) -> Admission {
        match self {
            Self::Clear | Self::Accused => Admission::Pass,
            Self::Probing { since, ramp: whole, .. } => ramp(now.since(*since), *whole),
            Self::Ejected(ejection) => ejection.admits(now),
        }
    }

    /// Whether the caller's own experience outweighs it for itself: its last call succeeded, later
    /// than whatever the accusers saw fail.
    pub fn is_vetoed_by(&self, now: Moment, own: &Window) -> bool {
        let Self::Ejected(ejection) = self else { return false };
        let Some(success_age) = own.last_success_age else { return false };
        let is_well = own.last_failure_age.is_none_or(|age| age > success_age);
        is_well && now.before(success_age) > ejection.grounds.last_failure_at
    }

    /// The ejection, if that is what it is.
    pub const fn ejection(&self) -> Option<&Ejection> {
        match self {
            Self::Ejected(ejection) => Some(ejection),
            _ => None,
        }
    }

    /// Why, if there is anything to say.
    pub fn grounds(&self) -> Option<&Arc<Grounds>> {
        match self {
            Self::Clear | Self::Accused => None,
            Self::Ejected(Ejection { grounds, .. }) | Self::Probing { grounds, .. } => {
                Some(grounds)
            }
        }
    }
}

/// When a caller's turn to probe comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn {
    /// When it comes first.
    pub from: Moment,
    /// How long it lasts.
    pub length: Duration,
    /// Time until it comes again, if all others let theirs pass.
    pub every: Duration,
}

impl Turn {
    /// Time since the latest turn began, if the first has come: more than its length between two.
    fn age_at(&self, at: Moment) -> Option<Duration> {
        let every = self.every.max(self.length).as_nanos();
        let every = u64::try_from(every).unwrap_or(u64::MAX).max(1);
        let since = at.as_nanos().checked_sub(self.from.as_nanos())?;
        Some(Duration::from_nanos(since % every)) // for each pick: not by u128
    }
}

impl Ejection {
    /// When this caller may probe it for the first time.
    pub fn first_probe_at(&self) -> Moment {
        self.turn.map_or(self.anyone_at, |turn| turn.from.min(self.anyone_at))
    }

    fn admits(&self, now: Moment) -> Admission {
        let later = |next: Moment| Admission::Refuse { until: next.min(self.anyone_at) };
        match self.turn {
            _ if now >= self.anyone_at => Admission::Probe,
            None => later(self.anyone_at),
            Some(turn) => match turn.age_at(now) {
                None => later(turn.from),
                Some(age) if age < turn.length => Admission::Probe,
                Some(age) => later(now.before(age) + turn.every),
            },
        }
    }
}

/// The gate before an ejected instance, at the agent in front of it: whoever believes what, one call
/// per period passes from the whole mesh, beside those that have nobody else. The rest is refused
/// before a byte reaches the instance, so that it is safe to send it elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeGate {
    passed_at: Option<Moment>,
}

impl ProbeGate {
    /// Whether a call that arrives now passes, which it always does if its caller `insists` for want of
    /// anybody else. That one is no probe: it asks whatever comes of it, and takes no other's turn.
    pub fn passes(&mut self, now: Moment, ejection: &Ejection, insists: bool) -> bool {
        let last_at = self.passed_at.unwrap_or(ejection.since).max(ejection.since);
        let is_probe = !insists && now.since(last_at) >= ejection.period;
        if is_probe {
            self.passed_at = Some(now);
        }
        insists || is_probe
    }
}
