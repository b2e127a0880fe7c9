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
    /// When the agent in front of it first turned a call away since the last
    /// window; `None` when it did not.
    pub turned_away_at: Option<Moment>,
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

    /// Of a report of that age; `None` when all that it tells of is too old to count, or was before this
    /// node began.
    fn heard(
        now: Moment,
        told: Duration,
        window: Duration,
        observed: &ObservedWindow,
    ) -> Option<Self> {
        let age = |age: Option<u32>| age.map(|age| told + Duration::from_millis(u64::from(age)));
        let [first, last, success] = [
            observed.first_failure_age_ms,
            observed.last_failure_age_ms,
            observed.last_success_age_ms,
        ]
        .map(age);
        let newest = last.into_iter().chain(success).min()?;
        let at = |age: Option<Duration>| age.map(|age| now.before(age));
        (newest < window.min(now.since(Moment::START))).then(|| Self {
            samples: observed.samples,
            failures: observed.failures.min(observed.samples),
            first_failure_at: at(first),
            last_failure_at: at(last),
            last_success_at: at(success),
        })
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

    /// Whether the newest call that it tells of is within the window.
    pub(super) fn is_fresh(&self, now: Moment, window: Duration) -> bool {
        self.newest().is_some_and(|at| now.since(at) < window)
    }

    pub(super) fn newest(&self) -> Option<Moment> {
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
    /// When it was signed.
    pub(super) told_at: Moment,
    pub(super) calls: BTreeSet<ServiceName>,
    pub(super) called: u16,
    pub(super) accused: u16,
    /// At most [`Observations::WINDOWS_MAX`] of another member; of this node's own calls as many as
    /// it has called instances.
    pub(super) windows: BTreeMap<InstanceKey, Seen>,
}

impl Report {
    /// Of that age; of unknown age it tells only who calls what. What is older than `window` counts
    /// nothing and is left out.
    pub(super) fn heard(
        now: Moment,
        told: Option<Duration>,
        window: Duration,
        observations: &Observations,
    ) -> Self {
        let windows = observations.windows.iter().take(Observations::WINDOWS_MAX);
        let windows = windows.filter_map(|observed| {
            let key = InstanceKey { member: observed.member, instance: observed.instance.clone() };
            Some((key, Seen::heard(now, told?, window, observed)?))
        });
        let calls = observations.calls.iter().take(Observations::CALLS_MAX);
        Self {
            told_at: now.before(told.unwrap_or_default()),
            calls: calls.cloned().collect(),
            called: observations.called,
            accused: observations.accused,
            windows: windows.collect(),
        }
    }

    /// Whoever sees an instance fail says so at once, unless it is careful for having been wrong: nobody's
    /// failures began long before it first told of them. Else one that dates its own back would make
    /// everybody's last success an objection.
    pub(super) fn bound_onsets(&mut self, before: Option<&Self>, age_max: Duration) {
        for (key, seen) in &mut self.windows {
            let known = before.and_then(|before| before.windows.get(key));
            let told = known.filter(|known| known.is_accusing());
            let bound = told.and_then(|known| known.first_failure_at);
            let bound = bound.unwrap_or_else(|| self.told_at.before(age_max));
            seen.first_failure_at = seen.first_failure_at.map(|at| at.max(bound));
        }
    }

    /// Counts again of how many members its calls have failed, of all those called since.
    pub(super) fn count(&mut self) {
        let accusing = || self.windows.iter().filter(|(_, seen)| seen.is_accusing());
        let onset = accusing().filter_map(|(_, seen)| seen.first_failure_at).min();
        let is_called = |seen: &Seen| onset.is_some() && seen.newest() >= onset;
        let called = members(self.windows.iter().filter(|(_, seen)| is_called(seen)));
        (self.called, self.accused) = (called, members(accusing()));
    }

    /// Whether most of what it calls fails for it: then the cause is rather its own side, or the
    /// service as a whole.
    pub(super) fn condemns(&self) -> bool {
        self.accused > 1 && u32::from(self.accused) * 2 > u32::from(self.called)
    }
}

fn members<'w>(windows: impl Iterator<Item = (&'w InstanceKey, &'w Seen)>) -> u16 {
    let members: BTreeSet<_> = windows.map(|(key, _)| key.member).collect();
    u16::try_from(members.len()).unwrap_or(u16::MAX)
}
