//! What this node tells the others, and when.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{SharedBreaker, Weighed};
use crate::breaker::case::{Case, Stage};
use crate::breaker::report::Seen;
use crate::breaker::{Grounds, InstanceKey, turn};
use crate::model::{Moment, Observations, ServiceName};

/// Reports at once, and the time after which there may be one more.
const BURST_MAX: u32 = 3;
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause of a rebuttal, so that a few speak and others see that it suffices.
const REBUTTAL_JITTER: Duration = Duration::from_millis(100);

/// What this node tells the others, and how often.
#[derive(Debug)]
pub(super) struct Voice {
    pub(super) said: BTreeMap<InstanceKey, Seen>,
    said_calls: BTreeSet<ServiceName>,
    has_condemned: bool,
    /// Whether something was said that holds no more: an accusation that has ended, or what an earlier run
    /// said.
    pub(super) takes_back: bool,
    /// Windows and services that did not fit into what was said, since this was last asked.
    left_out: usize,
    tokens: u32,
    refilled_at: Moment,
    due_at: Option<Moment>,
    /// Accusations that came to nothing, and when the last one did. Bounded by `served`.
    pub(super) futile: BTreeMap<InstanceKey, (u16, Moment)>,
    seed: u64,
}

impl SharedBreaker {
    /// The next report of this node, to be signed and spread.
    pub fn poll_report(&mut self, now: Moment) -> Option<Observations> {
        self.voice.refill(now);
        if self.voice.tokens == 0 || self.voice.due_at.is_none_or(|at| at > now) {
            return None;
        }
        self.voice.due_at = None;
        let worth = self.worth_saying();
        let left_out = worth.len().saturating_sub(Observations::WINDOWS_MAX)
            + self.called_at.len().saturating_sub(Observations::CALLS_MAX);
        let said: BTreeMap<_, _> = worth.into_iter().take(Observations::WINDOWS_MAX).collect();
        let is_news =
            !said.is_empty() || self.voice.takes_back || self.own.calls != self.voice.said_calls;
        if !is_news {
            return None; // what was to be said is not so any more
        }
        self.voice.tokens -= 1;
        let windows = said.iter().map(|(key, seen)| seen.observed(now, key)).collect();
        let keys: Vec<_> = said.keys().cloned().collect();
        self.voice.said = said;
        self.voice.said_calls = self.own.calls.clone();
        self.voice.has_condemned = self.own.condemns();
        self.voice.takes_back = false;
        self.voice.left_out += left_out;
        for key in keys {
            self.judge(now, &key);
        }
        Some(Observations {
            calls: self.own.calls.iter().cloned().collect(),
            called: self.own.called,
            accused: self.own.accused,
            windows,
            signed_at_ms: Some(self.wall_ms(now)),
        })
    }

    /// How much did not fit into this node's reports since this was last asked: windows of instances and
    /// names of services.
    pub fn take_left_out(&mut self) -> usize {
        std::mem::take(&mut self.voice.left_out)
    }

    /// An accusation that this node has published ended without a case: the next needs more.
    pub(super) fn note_futile(&mut self, now: Moment, key: &InstanceKey, seen: &Seen) {
        let was_said = self.voice.said.get(key).is_some_and(Seen::is_accusing);
        if was_said && !seen.is_accusing() {
            self.voice.said.remove(key);
            self.voice.takes_back = true;
            if !self.cases.contains_key(key) {
                let (count, at) = self.voice.futile.entry(key.clone()).or_insert((0, now));
                *count = count.saturating_add(1);
                *at = now;
            }
        }
        let care_for = self.config.care_for;
        self.voice.futile.retain(|_, (_, at)| now.since(*at) < care_for);
    }

    /// Own windows that others should know.
    fn worth_saying(&self) -> Vec<(InstanceKey, Seen)> {
        let all = self.own.windows.iter().filter(|(key, seen)| self.is_worth(key, seen));
        let mut all: Vec<_> = all.map(|(key, seen)| (key.clone(), *seen)).collect();
        // Those first that accuse, and by most.
        all.sort_by_key(|(_, seen)| (!seen.is_accusing(), Reverse(seen.failures)));
        all
    }

    fn is_worth(&self, key: &InstanceKey, seen: &Seen) -> bool {
        let was_said = self.voice.said.contains_key(key);
        let case = self.cases.get(key);
        if seen.is_accusing() {
            let care = self.voice.futile.get(key).map_or(1, |(count, _)| 1 << (*count).min(3));
            let is_enough = seen.failures >= care.min(self.config.care_max);
            // Without this node, which others have not heard, and with some to spare: not all count
            // everywhere.
            let is_clear = || {
                self.weighed.get(key).is_some_and(|said| {
                    let accusers = said.credible.accusers.saturating_sub(1) * 4 / 5;
                    Grounds { accusers, ..said.credible.clone() }.is_clear(&self.config)
                })
            };
            return was_said
                || match case.map(|case| &case.stage) {
                    None | Some(Stage::Watched { .. } | Stage::Returning { .. }) => is_enough,
                    Some(Stage::Accused { .. }) => is_enough && !is_clear(),
                    Some(Stage::Ejected { since, .. }) => {
                        self.has_probed(seen, *since) || (is_enough && !is_clear())
                    }
                };
        }
        let Some(case) = case else { return false };
        match &case.stage {
            Stage::Ejected { since, .. } => seen.is_well_after(*since),
            Stage::Returning { .. } if was_said || case.is_witness => true,
            Stage::Watched { .. } if was_said => true,
            _ => self.objects(key, seen, was_said),
        }
    }

    /// Whether it has seen success since the first failure of those who accuse, whatever this node
    /// makes of them, and not enough others have said so.
    fn objects(&self, key: &InstanceKey, seen: &Seen, was_said: bool) -> bool {
        self.weighed.get(key).is_some_and(|Weighed { ever, .. }| {
            let is_needed = was_said || f32::from(ever.share) >= self.config.ratio * 500.0;
            is_needed
                && ever.has_quorum(&self.config)
                && seen.last_success_at > Some(ever.first_failure_at)
        })
    }

    /// Whether it says something that this node has not said yet.
    fn is_news(&self, now: Moment, key: &InstanceKey, seen: &Seen) -> bool {
        let case = self.cases.get(key);
        let Some(said) = self.voice.said.get(key) else { return true };
        if said.is_accusing() != seen.is_accusing() {
            return true;
        }
        if seen.is_accusing() {
            let is_more = said.failures < seen.failures && case.is_none();
            let is_probe = matches!(case.map(|case| &case.stage), Some(Stage::Ejected { since, .. })
                if self.has_probed(seen, *since) && said.last_failure_at < seen.last_failure_at);
            // While a service fails as a whole its callers say so again before their word grows old.
            let fresh_from = Some(now.before(self.config.window / 2));
            let is_stale = self.service_of(key).is_some_and(|service| self.is_failing(service))
                && said.last_failure_at < fresh_from
                && seen.last_failure_at >= fresh_from;
            return is_more || is_probe || is_stale;
        }
        let is_back = match case {
            Some(Case { stage: Stage::Ejected { since, .. }, .. })
            | Some(Case { stage: Stage::Returning { since, .. }, is_witness: true, .. }) => {
                said.last_success_at < Some(*since)
            }
            _ => false,
        };
        // What it said before was of before the first failure.
        let is_dated = self.weighed.get(key).is_some_and(|Weighed { ever, .. }| {
            ever.has_quorum(&self.config) && said.last_success_at <= Some(ever.first_failure_at)
        });
        is_back || is_dated
    }

    /// Whether the last failure is that of a probe: nothing else is called half a period after an
    /// ejection.
    fn has_probed(&self, seen: &Seen, ejected_at: Moment) -> bool {
        let probing_from = ejected_at + self.config.period_min / 2;
        seen.last_failure_at.is_some_and(|at| at > probing_from)
    }

    /// Decides whether there is something to say, and when.
    pub(super) fn speak(&mut self, now: Moment) {
        if self.voice.due_at.is_some_and(|at| at <= now) {
            return;
        }
        let worth = self.worth_saying();
        let is_due = self.own.calls != self.voice.said_calls || self.voice.takes_back;
        let mut at = is_due.then_some(now + REPORT_PAUSE);
        if self.own.condemns() != self.voice.has_condemned && !self.voice.said.is_empty() {
            at = Some(now); // what was said is not to be believed any more, or is again
        }
        for (key, seen) in &worth {
            if self.is_news(now, key, seen) {
                let soon = if seen.is_accusing() { now } else { now + self.voice.jitter() };
                at = Some(at.map_or(soon, |at| at.min(soon)));
            }
        }
        self.voice.due_at = match (self.voice.due_at, at) {
            (Some(due), Some(at)) => Some(due.min(at)),
            (due, at) => due.or(at),
        };
    }
}

impl Voice {
    pub(super) const fn new(seed: u64) -> Self {
        Self {
            said: BTreeMap::new(),
            said_calls: BTreeSet::new(),
            has_condemned: false,
            takes_back: false,
            left_out: 0,
            tokens: BURST_MAX,
            refilled_at: Moment::START,
            due_at: None,
            futile: BTreeMap::new(),
            seed,
        }
    }

    /// Nothing is known of an instance any more.
    pub(super) fn forget(&mut self, key: &InstanceKey) {
        self.said.remove(key);
        self.futile.remove(key);
    }

    /// When the next report may leave.
    pub(super) fn poll_timeout(&self) -> Option<Moment> {
        let refilled_at = self.refilled_at + REPORT_PAUSE;
        self.due_at.map(|at| if self.tokens == 0 { at.max(refilled_at) } else { at })
    }

    fn refill(&mut self, now: Moment) {
        while self.tokens < BURST_MAX && now.since(self.refilled_at) >= REPORT_PAUSE {
            self.tokens += 1;
            self.refilled_at = self.refilled_at + REPORT_PAUSE;
        }
        if self.tokens == BURST_MAX {
            self.refilled_at = now;
        }
    }

    /// Up to [`REBUTTAL_JITTER`].
    fn jitter(&mut self) -> Duration {
        self.seed = turn::mix(self.seed);
        Duration::from_nanos(self.seed % REBUTTAL_JITTER.as_nanos() as u64)
    }
}
