//! What a release must hold, as ratios of figures of one run.

use std::fmt;

/// Whether one limit holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Held,
    Missed,
    NotCompared,
}

/// One limit and what was measured.
pub(crate) struct Limit {
    pub(crate) what: String,
    bound: Bound,
    measured: Option<f64>,
}

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Limit {
    /// `measured` is none where something to compare with is missing.
    pub(crate) fn at_least(what: impl Into<String>, least: f64, measured: Option<f64>) -> Self {
        Self { what: what.into(), bound: Bound::AtLeast(least), measured }
    }

    /// `measured` is none where something to compare with is missing.
    pub(crate) fn at_most(what: impl Into<String>, most: f64, measured: Option<f64>) -> Self {
        Self { what: what.into(), bound: Bound::AtMost(most), measured }
    }

    /// A figure that is no number holds nothing.
    pub(crate) fn standing(&self) -> Standing {
        let is_held = |measured: f64| match self.bound {
            Bound::AtLeast(least) => measured >= least,
            Bound::AtMost(most) => measured <= most,
        };
        match self.measured {
            None => Standing::NotCompared,
            Some(measured) if is_held(measured) => Standing::Held,
            Some(_) => Standing::Missed,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.standing() {
            Standing::Held => "held",
            Standing::Missed => "MISSED",
            Standing::NotCompared => "not compared",
        };
        let (is, bound) = match self.bound {
            Bound::AtLeast(least) => ("at least", least),
            Bound::AtMost(most) => ("at most", most),
        };
        write!(f, "{word:<13} {}: {is} {bound}", self.what)?;
        match self.measured {
            Some(measured) => write!(f, ", measured {measured:.3}"),
            None => Ok(()),
        }
    }
}
