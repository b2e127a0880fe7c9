//! How far the accusation of one instance has come.

use std::sync::Arc;
use std::time::Duration;

use super::{Grounds, SharedConfig};
use crate::model::{MemberId, Moment};

/// One instance that is, or was, accused by a quorum.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) stage: Stage,
    /// The first failure that was told.
    pub(super) onset: Moment,
    /// Ejections and failed probes since it was well for a while: each doubles the time between probes.
    pub(super) relapses: u32,
    /// Who told that its probe failed, while another is asked.
    pub(super) failed_for: Option<MemberId>,
    /// Whether this node's own call has shown that it is back.
    pub(super) is_witness: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Stage {
    /// A quorum accuses; others may still object.
    Accused { since: Moment },
    /// Nobody calls it.
    Ejected { since: Moment, tried_at: Moment, grounds: Arc<Grounds> },
    /// It answered: its share grows.
    Returning { since: Moment, grounds: Arc<Grounds> },
    /// It is back, or the accusation was outweighed; what comes next is judged by what was.
    Watched { since: Moment },
}

impl Case {
    pub(super) const fn new(now: Moment, onset: Moment) -> Self {
        let stage = Stage::Accused { since: now };
        Self { stage, onset, relapses: 0, failed_for: None, is_witness: false }
    }

    /// Time between two probes of the whole mesh: the shortest after one that failed for its caller, so
    /// that another soon looks, too.
    pub(super) fn period(&self, config: &SharedConfig) -> Duration {
        if self.failed_for.is_some() {
            return config.period_min;
        }
        let doublings = self.relapses.saturating_sub(1).min(16);
        config.period_min.saturating_mul(1 << doublings).min(config.period_max)
    }

    /// The number of the probe that comes: each is another caller's.
    pub(super) fn round(&self) -> u32 {
        self.relapses.saturating_mul(2).saturating_add(self.failed_for.is_some().into())
    }

    /// Evidence of before then does not count any more.
    pub(super) const fn since(&self) -> Moment {
        match self.stage {
            Stage::Accused { .. } | Stage::Ejected { .. } => Moment::START,
            Stage::Returning { since, .. } | Stage::Watched { since } => since,
        }
    }

    pub(super) const fn is_ejected(&self) -> bool {
        matches!(self.stage, Stage::Ejected { .. })
    }
}
