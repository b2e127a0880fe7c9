//! Weighing: from what callers say of one instance to whether it is to be believed.

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
    /// Callers that saw success later than all that the accusers saw fail.
    pub recovered: usize,
    /// The pooled share of failures, in thousandths.
    pub share: u16,
    /// When the first of their failures was.
    pub first_failure_at: Moment,
    /// When the last of their failures was.
    pub last_failure_at: Moment,
    /// Who said what, by member; at most 32.
    pub testimony: Vec<Testimony>,
}

/// One caller's word, on this node's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Testimony {
    /// Who.
    pub caller: MemberId,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TestimonyWeight {
    /// It accuses.
    Accuses,
    /// It has seen success since the accusers' first failure.
    Rebuts,
    /// Nothing: it condemns most of what it calls.
    Condemner,
    /// Nothing: what it saw was before the accusers' first failure.
    Dated,
}

impl TestimonyWeight {
    /// The word of tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accuses => "accuses",
            Self::Rebuts => "rebuts",
            Self::Condemner => "condemner",
            Self::Dated => "dated",
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

    /// Whether so many accuse that others need not be waited for.
    pub(super) fn is_crowd(&self, config: &SharedConfig) -> bool {
        self.has_quorum(config) && self.accusers as f32 >= self.callers as f32 * config.crowd_share
    }

    /// Whether they outweigh those who have seen success.
    pub(super) fn is_carried(&self, config: &SharedConfig) -> bool {
        self.has_quorum(config)
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
    /// The first failure that was ever told in this case: who accuses cannot make it later.
    pub(super) onset: Option<Moment>,
    pub(super) bench: Bench,
}

impl Scale<'_> {
    /// Weighs what `reports` say of `key`.
    pub(super) fn weigh<'r>(
        &self,
        now: Moment,
        key: &InstanceKey,
        reports: impl Iterator<Item = (MemberId, &'r Report)>,
    ) -> Grounds {
        let window = self.config.window;
        let said: Vec<_> = reports
            .filter_map(|(caller, report)| Some((caller, report, report.windows.get(key)?)))
            .filter(|(_, _, seen)| seen.is_fresh(now, self.since, window))
            .map(|(caller, report, seen)| {
                let counts = self.bench == Bench::All || !report.condemns();
                (caller, *seen, counts)
            })
            .collect();
        let accuses = |seen: &Seen, counts: bool| {
            counts && seen.is_accusing() && seen.last_failure_at.is_some_and(|at| at >= self.since)
        };
        let accusers = || said.iter().filter(|(_, seen, counts)| accuses(seen, *counts));
        let first_failure_at = accusers().filter_map(|(_, seen, _)| seen.first_failure_at).min();
        let last_failure_at = accusers().filter_map(|(_, seen, _)| seen.last_failure_at).max();
        let first_failure_at = first_failure_at.into_iter().chain(self.onset).min().unwrap_or(now);
        let mut grounds = Grounds {
            callers: self.callers,
            quorum: quorum(self.config, self.callers),
            accusers: accusers().count(),
            first_failure_at,
            last_failure_at: last_failure_at.unwrap_or(now),
            ..Grounds::default()
        };
        let (mut samples, mut failures, mut accused) = (0, 0, 0);
        for (caller, seen, counts) in &said {
            grounds.recovered +=
                usize::from(*counts && seen.is_well_after(grounds.last_failure_at));
            let weight = match () {
                () if !counts => TestimonyWeight::Condemner,
                () if accuses(seen, *counts) => TestimonyWeight::Accuses,
                () if seen.last_success_at.is_some_and(|at| at > first_failure_at) => {
                    TestimonyWeight::Rebuts
                }
                () => TestimonyWeight::Dated,
            };
            if matches!(weight, TestimonyWeight::Accuses | TestimonyWeight::Rebuts) {
                let (capped, failed) = capped(seen, self.config.samples_max);
                samples += capped;
                failures += failed;
                if weight == TestimonyWeight::Accuses {
                    accused += failed;
                }
            }
            if grounds.testimony.len() < TESTIMONY_MAX {
                grounds.testimony.push(Testimony {
                    caller: *caller,
                    samples: seen.samples,
                    failures: seen.failures,
                    last_failure_at: seen.last_failure_at,
                    last_success_at: seen.last_success_at,
                    weight,
                });
            }
        }
        grounds.failures = accused / UNIT;
        grounds.share = (failures * 1_000).checked_div(samples).unwrap_or(0).min(1_000) as u16;
        grounds
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

/// Accusers that it takes among so many callers.
fn quorum(config: &SharedConfig, callers: usize) -> usize {
    let share = (callers as f32 * config.quorum_share).ceil() as usize;
    share.max(config.quorum_min)
}
