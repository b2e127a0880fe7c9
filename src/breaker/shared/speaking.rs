//! What this node tells the others, and when.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{SharedBreaker, Weighed};
use crate::breaker::case::{Case, Stage};
use crate::breaker::report::{Report, Seen};
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
        if !self.has_turned()
            && !self.is_other()
            && !worth.iter().any(|(key, seen)| self.is_news(now, key, seen))
        {
            return None; // what was to be said is not so any more, or others have said it
        }
        let left_out = worth.len().saturating_sub(Observations::WINDOWS_MAX)
            + self.called_at.len().saturating_sub(Observations::CALLS_MAX);
        let said: BTreeMap<_, _> = worth.into_iter().take(Observations::WINDOWS_MAX).collect();
        self.voice.tokens -= 1;
        let windows = said.iter().map(|(key, seen)| seen.observed(now, key)).collect();
        let keys: Vec<_> = said.keys().cloned().collect();
        self.turned_away
            .retain(|key, since| !said.get(key).is_some_and(|seen| seen.is_well_after(*since)));
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
    }

    /// Those of long ago count no more.
    pub(super) fn forget_futile(&mut self, now: Moment) {
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
            // Without this node, which others have not heard, and with some to spare. Whose own word
            // counts only for the service as a whole keeps quiet once enough of all say the same.
            let is_clear = || {
                self.weighed.get(key).is_some_and(|Weighed { credible, all, .. }| {
                    let known = if self.own.condemns() { all } else { credible };
                    let accusers = spared(known.accusers.saturating_sub(1));
                    Grounds { accusers, ..known.clone() }.is_clear(&self.config)
                })
            };
            return was_said
                || (is_enough && self.is_known_to_fail(key))
                || match case.map(|case| &case.stage) {
                    None | Some(Stage::Watched { .. } | Stage::Returning { .. }) => is_enough,
                    Some(Stage::Accused { .. }) => is_enough && !is_clear(),
                    Some(Stage::Ejected { since, .. }) => {
                        self.has_probed(seen, *since) || (is_enough && !is_clear())
                    }
                };
        }
        if self.is_awaited(key, seen) {
            return true;
        }
        let Some(case) = case else { return false };
        match &case.stage {
            Stage::Ejected { since, .. } => seen.is_well_after(*since),
            Stage::Returning { .. } if was_said || case.is_witness => true,
            Stage::Watched { .. } if was_said => true,
            _ => self.objects(key, seen, was_said),
        }
    }

    /// Whether the agent in front of the instance holds an ejection of which this node knows nothing, for
    /// all who had made it were gone for a while or have begun anew, and lets a call pass now and then: it
    /// is to hear of the first that has succeeded.
    fn is_awaited(&self, key: &InstanceKey, seen: &Seen) -> bool {
        self.turned_away.get(key).is_some_and(|since| {
            let mut others = self.words(key).filter(|(member, _)| *member != self.id);
            let has_said = |report: &Report| {
                report.windows.get(key).is_some_and(|seen| seen.is_well_after(*since))
            };
            seen.is_well_after(*since) && !others.any(|(_, report)| has_said(report))
        })
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
        let said = self.voice.said.get(key);
        if seen.is_accusing() && self.is_known_to_fail(key) {
            return self.is_wanted(now, key, said, seen);
        }
        let Some(said) = said else { return true };
        if said.is_accusing() != seen.is_accusing() {
            return true;
        }
        if seen.is_accusing() {
            let is_more = said.failures < seen.failures && case.is_none();
            let is_probe = matches!(case.map(|case| &case.stage), Some(Stage::Ejected { since, .. })
                if self.has_probed(seen, *since) && said.last_failure_at < seen.last_failure_at);
            // What it said before was of before the return.
            let is_relapse = matches!(case.map(|case| &case.stage), Some(Stage::Returning { since, .. })
                if said.last_failure_at < Some(*since) && seen.last_failure_at >= Some(*since));
            return is_more || is_probe || is_relapse;
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
        let is_awaited = self.is_awaited(key, seen)
            && said.last_success_at <= self.turned_away.get(key).copied();
        is_back || is_dated || is_awaited
    }

    /// Whether its service fails as a whole.
    fn is_known_to_fail(&self, key: &InstanceKey) -> bool {
        self.service_of(key).is_some_and(|service| self.is_failing(service))
    }

    /// While its service fails as a whole, whether this node is to say so: too few have done it of late,
    /// this node among them, or it has said otherwise.
    fn is_wanted(&self, now: Moment, key: &InstanceKey, said: Option<&Seen>, seen: &Seen) -> bool {
        let fresh_from = now.before(self.counts_for(key) / 2);
        let is_fresh = |seen: &Seen| seen.is_accusing() && seen.last_failure_at >= Some(fresh_from);
        let others = || {
            let windows = self.words(key).filter_map(|(_, report)| report.windows.get(key));
            windows.filter(|seen| is_fresh(seen)).count()
        };
        let is_known =
            || self.weighed.get(key).is_some_and(|told| spared(others()) >= told.all.quorum);
        match said {
            Some(said) if !said.is_accusing() => true,
            Some(said) if is_fresh(said) => false,
            _ => is_fresh(seen) && !is_known(),
        }
    }

    /// Whether the last failure is that of a probe: nothing else is called half a period after an
    /// ejection.
    fn has_probed(&self, seen: &Seen, ejected_at: Moment) -> bool {
        let probing_from = ejected_at + self.config.period_min / 2;
        seen.last_failure_at.is_some_and(|at| at > probing_from)
    }

    /// Whether what was said of whom it calls, or of what failed, holds no more.
    fn is_other(&self) -> bool {
        self.own.calls != self.voice.said_calls || self.voice.takes_back
    }

    /// Whether what was said is not to be believed any more, or is again.
    fn has_turned(&self) -> bool {
        self.own.condemns() != self.voice.has_condemned && !self.voice.said.is_empty()
    }

    /// Decides whether there is something to say, and when.
    pub(super) fn speak(&mut self, now: Moment) {
        if self.voice.due_at.is_some_and(|at| at <= now) {
            return;
        }
        let worth = self.worth_saying();
        let mut at = self.is_other().then_some(now + REPORT_PAUSE);
        if self.has_turned() {
            at = Some(now);
        }
        for (key, seen) in &worth {
            if self.is_news(now, key, seen) {
                let soon = match seen.is_accusing() {
                    true if !self.is_known_to_fail(key) => now,
                    // Once only: others say it meanwhile.
                    true if self.voice.due_at.is_some() => continue,
                    true => now + self.voice.jitter(self.config.window),
                    false => now + self.voice.jitter(REBUTTAL_JITTER),
                };
                at = Some(at.map_or(soon, |at| at.min(soon)));
            }
        }
        self.voice.due_at = match (self.voice.due_at, at) {
            (Some(due), Some(at)) => Some(due.min(at)),
            (due, at) => due.or(at),
        };
    }
}

/// Of so many accusers those that are sure to count everywhere.
const fn spared(accusers: usize) -> usize {
    accusers * 4 / 5
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

    /// Up to `most`.
    fn jitter(&mut self, most: Duration) -> Duration {
        self.seed = turn::mix(self.seed);
        let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        Duration::from_nanos(self.seed % most.max(1))
    }
}
