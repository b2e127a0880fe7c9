//! What one caller says of the instances that it calls, on the clock of whoever hears it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Window;
use crate::model::{InstanceId, MemberId, Moment, Observations, ObservedWindow, ServiceName};

/// One instance in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceKey {
    /// The member in front of it.
    pub member: MemberId,
    /// Unique on that member.
    pub instance: InstanceId,
}

/// What this node's own calls saw of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnWindow {
    /// Which instance.
    pub key: InstanceKey,
    /// What it serves.
    pub service: ServiceName,
    /// As [`Breaker::window`](super::Breaker::window) has it now.
    pub window: Window,
}

/// What one caller saw of one instance. Moments are on this node's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) samples: u16,
    pub(super) failures: u16,
    pub(super) first_failure_at: Option<Moment>,
    pub(super) last_failure_at: Option<Moment>,
    pub(super) last_success_at: Option<Moment>,
}

impl Seen {
    pub(super) fn of(now: Moment, window: &Window) -> Self {
        let at = |age: Option<Duration>| age.map(|age| now.before(age));
        Self {
            samples: window.samples,
            failures: window.failures.min(window.samples),
            first_failure_at: at(window.first_failure_age),
            last_failure_at: at(window.last_failure_age),
            last_success_at: at(window.last_success_age),
        }
    }

    fn heard(now: Moment, observed: &ObservedWindow) -> Self {
        let at = |age: Option<u32>| {
            age.map(|millis| now.before(Duration::from_millis(u64::from(millis))))
        };
        Self {
            samples: observed.samples,
            failures: observed.failures.min(observed.samples),
            first_failure_at: at(observed.first_failure_age_ms),
            last_failure_at: at(observed.last_failure_age_ms),
            last_success_at: at(observed.last_success_age_ms),
        }
    }

    pub(super) fn observed(&self, now: Moment, key: &InstanceKey) -> ObservedWindow {
        let age = |at: Option<Moment>| {
            at.map(|at| u32::try_from(now.since(at).as_millis()).unwrap_or(u32::MAX))
        };
        ObservedWindow {
            member: key.member,
            instance: key.instance.clone(),
            samples: self.samples,
            failures: self.failures,
            first_failure_age_ms: age(self.first_failure_at),
            last_failure_age_ms: age(self.last_failure_at),
            last_success_age_ms: age(self.last_success_at),
        }
    }

    /// Whether the newest call that it tells of is after `since` and within the window.
    pub(super) fn is_fresh(&self, now: Moment, since: Moment, window: Duration) -> bool {
        self.newest().is_some_and(|at| at >= since && now.since(at) < window)
    }

    fn newest(&self) -> Option<Moment> {
        self.last_failure_at.max(self.last_success_at)
    }

    /// Whether failures outweigh in a stretch that goes on.
    pub(super) const fn is_accusing(&self) -> bool {
        self.first_failure_at.is_some() && self.failures > 0
    }

    /// Whether its last word is a success after `since`.
    pub(super) fn is_well_after(&self, since: Moment) -> bool {
        self.last_success_at.is_some_and(|at| {
            at > since && self.last_failure_at.is_none_or(|failed_at| failed_at < at)
        })
    }
}

/// The latest word of one caller.
#[derive(Clone, Debug, Default)]
pub(super) struct Report {
    pub(super) calls: BTreeSet<ServiceName>,
    pub(super) called: u16,
    pub(super) accused: u16,
    /// At most [`Observations::WINDOWS_MAX`] of another member; of this node's own calls as many as
    /// it has called instances.
    pub(super) windows: BTreeMap<InstanceKey, Seen>,
}

impl Report {
    pub(super) fn heard(now: Moment, observations: &Observations) -> Self {
        let windows = observations.windows.iter().take(Observations::WINDOWS_MAX);
        let windows = windows.map(|observed| {
            let key = InstanceKey { member: observed.member, instance: observed.instance.clone() };
            (key, Seen::heard(now, observed))
        });
        let calls = observations.calls.iter().take(Observations::CALLS_MAX);
        Self {
            calls: calls.cloned().collect(),
            called: observations.called,
            accused: observations.accused,
            windows: windows.collect(),
        }
    }

    /// Counts again of how many instances its calls have failed, of all those called since.
    pub(super) fn count(&mut self) {
        let accusing = || self.windows.values().filter(|seen| seen.is_accusing());
        let onset = accusing().filter_map(|seen| seen.first_failure_at).min();
        let called = self.windows.values().filter(|seen| onset.is_some() && seen.newest() >= onset);
        let saturated = |count| u16::try_from(count).unwrap_or(u16::MAX);
        (self.called, self.accused) = (saturated(called.count()), saturated(accusing().count()));
    }

    /// Whether most of what it calls fails for it: then the cause is rather its own side, or the
    /// service as a whole.
    pub(super) fn condemns(&self) -> bool {
        self.accused > 1 && u32::from(self.accused) * 2 > u32::from(self.called)
    }
}
