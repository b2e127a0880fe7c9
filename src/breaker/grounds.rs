//! Weighing: from what callers say of one instance to whether it is to be believed.

use std::cmp::Reverse;
use std::time::Duration;

use super::SharedConfig;
use super::report::{InstanceKey, Report, Seen};
use crate::model::{MemberId, Moment};

/// Words kept as evidence of one verdict.
const TESTIMONY_MAX: usize = 32;

/// Why a verdict is as it is: who said what, and how it was weighed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grounds {
    /// Members that call the service.
    pub callers: usize,
    /// Accusers that it takes.
    pub quorum: usize,
    /// Callers that accuse and count.
    pub accusers: usize,
    /// What they saw fail, as far as it counts.
    pub failures: u32,
    /// Callers that have seen success since the first of these failures.
    pub objectors: usize,
    /// Callers that saw success later than all that the accusers saw fail.
    pub recovered: usize,
    /// The pooled share of failures, in thousandths.
    pub share: u16,
    /// When the first of their failures was.
    pub first_failure_at: Moment,
    /// When the last of their failures was.
    pub last_failure_at: Moment,
    /// Who said what, those first that count most; at most 32.
    pub testimony: Vec<Testimony>,
}

/// One caller's word, on this node's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Testimony {
    /// Who.
    pub caller: MemberId,
    /// When it said so.
    pub told_at: Moment,
    /// Calls that it tells of.
    pub samples: u16,
    /// Those that failed.
    pub failures: u16,
    /// When its last call failed.
    pub last_failure_at: Option<Moment>,
    /// When its last call succeeded.
    pub last_success_at: Option<Moment>,
    /// What it counts for.
    pub weight: TestimonyWeight,
}

/// What a caller's word counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TestimonyWeight {
    /// It accuses.
    Accuses,
    /// It has seen success since the accusers' first failure.
    Rebuts,
    /// Nothing: it condemns most of what it calls.
    Condemner,
    /// Nothing: what it saw was before the accusers' first failure, or before the accusation that was
    /// dismissed last.
    Dated,
    /// Nothing: what it saw is too long ago.
    Old,
}

impl TestimonyWeight {
    /// The word of tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accuses => "accuses",
            Self::Rebuts => "rebuts",
            Self::Condemner => "condemner",
            Self::Dated => "dated",
            Self::Old => "old",
        }
    }
}

/// Whose words count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bench {
    /// Those that do not condemn most of what they call.
    Credible,
    /// Everybody's: to tell whether a service fails as a whole.
    All,
}

impl Grounds {
    /// Whether enough callers have seen enough.
    pub(super) const fn has_quorum(&self, config: &SharedConfig) -> bool {
        self.accusers >= self.quorum && self.failures >= config.failures_min
    }

    /// Whether so little speaks against it that it needs not be waited for.
    pub(super) fn is_clear(&self, config: &SharedConfig) -> bool {
        self.is_carried(config) && f32::from(self.share) >= config.ratio_clear * 1_000.0
    }

    /// Whether as many speak for it as it takes against it.
    pub(super) const fn is_disputed(&self) -> bool {
        self.objectors >= self.quorum
    }

    /// Whether they outweigh those who have seen success.
    pub(super) fn is_carried(&self, config: &SharedConfig) -> bool {
        self.has_quorum(config) && self.outweighs(config)
    }

    /// The same, however few failures there were yet.
    pub(super) fn outweighs(&self, config: &SharedConfig) -> bool {
        self.accusers >= self.quorum
            && self.recovered < self.quorum
            && f32::from(self.share) >= config.ratio * 1_000.0
    }
}

/// What a case is weighed by.
pub(super) struct Scale<'a> {
    pub(super) config: &'a SharedConfig,
    /// Members that call the service.
    pub(super) callers: usize,
    /// Evidence of before does not count.
    pub(super) since: Moment,
    /// How long a word counts.
    pub(super) counts_for: Duration,
    /// The first failure that was ever told in this case: who accuses cannot make it later.
    pub(super) onset: Option<Moment>,
    pub(super) bench: Bench,
}

impl Scale<'_> {
    /// Weighs what `words` say of `key`; the testimony is left out.
    pub(super) fn weigh<'r>(
        &self,
        now: Moment,
        key: &InstanceKey,
        words: impl Iterator<Item = (MemberId, &'r Report)>,
    ) -> Grounds {
        let said = self.said(now, key, words);
        let first_failure_at = self.first_failure_at(now, &said);
        let accusers = || said.iter().filter(|said| said.accuses);
        let last_failure_at = accusers().filter_map(|said| said.seen.last_failure_at).max();
        let mut grounds = Grounds {
            callers: self.callers,
            quorum: quorum(self.config, self.callers),
            accusers: accusers().count(),
            first_failure_at,
            last_failure_at: last_failure_at.unwrap_or(now),
            ..Grounds::default()
        };
        let (mut samples, mut failures, mut accused) = (0, 0, 0);
        for said in &said {
            let is_well = said.counts() && said.seen.is_well_after(grounds.last_failure_at);
            grounds.recovered += usize::from(is_well);
            let weight = said.weight(first_failure_at);
            grounds.objectors += usize::from(weight == TestimonyWeight::Rebuts);
            if matches!(weight, TestimonyWeight::Accuses | TestimonyWeight::Rebuts) {
                let (capped, failed) = capped(&said.seen, self.config.samples_max);
                samples += capped;
                failures += failed;
                accused += if said.accuses { failed } else { 0 };
            }
        }
        grounds.failures = accused / UNIT;
        grounds.share = (failures * 1_000).checked_div(samples).unwrap_or(0).min(1_000) as u16;
        grounds
    }

    /// What is weighed, word by word: those that count most, at most [`TESTIMONY_MAX`].
    pub(super) fn testimony<'r>(
        &self,
        now: Moment,
        key: &InstanceKey,
        words: impl Iterator<Item = (MemberId, &'r Report)>,
    ) -> Vec<Testimony> {
        let said = self.said(now, key, words);
        let first_failure_at = self.first_failure_at(now, &said);
        let testimony = said.iter().map(|said| Testimony {
            caller: said.caller,
            told_at: said.told_at,
            samples: said.seen.samples,
            failures: said.seen.failures,
            last_failure_at: said.seen.last_failure_at,
            last_success_at: said.seen.last_success_at,
            weight: said.weight(first_failure_at),
        });
        let mut testimony: Vec<_> = testimony.collect();
        testimony.sort_by_key(|one| (one.weight, Reverse(one.failures), one.caller));
        testimony.truncate(TESTIMONY_MAX);
        testimony
    }

    fn said<'r>(
        &self,
        now: Moment,
        key: &InstanceKey,
        words: impl Iterator<Item = (MemberId, &'r Report)>,
    ) -> Vec<Said> {
        let about = words.filter_map(|(caller, report)| {
            let seen = *report.windows.get(key)?;
            let dismissed = self.dismissed(now, report, &seen);
            let is_new = seen.last_failure_at.is_some_and(|at| at >= self.since);
            let accuses = dismissed.is_none() && is_new && seen.is_accusing();
            Some(Said { caller, told_at: report.told_at, seen, dismissed, accuses })
        });
        about.collect()
    }

    fn first_failure_at(&self, now: Moment, said: &[Said]) -> Moment {
        let accusers = said.iter().filter(|said| said.accuses);
        let told = accusers.filter_map(|said| said.seen.first_failure_at);
        told.chain(self.onset).min().unwrap_or(now)
    }

    /// Why a word counts nothing, if it does not.
    fn dismissed(&self, now: Moment, report: &Report, seen: &Seen) -> Option<TestimonyWeight> {
        match () {
            () if !seen.is_fresh(now, self.counts_for) => Some(TestimonyWeight::Old),
            () if seen.newest() < Some(self.since) => Some(TestimonyWeight::Dated),
            () if self.bench == Bench::Credible && report.condemns() => {
                Some(TestimonyWeight::Condemner)
            }
            () => None,
        }
    }
}

/// One caller's word.
struct Said {
    caller: MemberId,
    told_at: Moment,
    seen: Seen,
    dismissed: Option<TestimonyWeight>,
    accuses: bool,
}

impl Said {
    const fn counts(&self) -> bool {
        self.dismissed.is_none()
    }

    fn weight(&self, first_failure_at: Moment) -> TestimonyWeight {
        let is_later = self.seen.last_success_at.is_some_and(|at| at > first_failure_at);
        match self.dismissed {
            Some(reason) => reason,
            None if self.accuses => TestimonyWeight::Accuses,
            None if is_later => TestimonyWeight::Rebuts,
            None => TestimonyWeight::Dated,
        }
    }
}

/// Samples are counted in these parts, so that a capped caller's share stays exact.
const UNIT: u32 = 60;

/// Samples and failures of one caller that count, in [`UNIT`]s.
fn capped(seen: &Seen, samples_max: u16) -> (u32, u32) {
    let samples = u32::from(seen.samples.min(samples_max).max(1)) * UNIT;
    let failures = samples * u32::from(seen.failures) / u32::from(seen.samples.max(1));
    (samples, failures)
}

/// Accusers that it takes among so many callers: more than the share.
fn quorum(config: &SharedConfig, callers: usize) -> usize {
    let share = (callers as f32 * config.quorum_share) as usize + 1;
    share.max(config.quorum_min)
}
