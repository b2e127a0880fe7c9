//! The limits that a release must hold, as ratios of figures of one run.

use std::fmt;

/// What the limits are about: medians of all rounds.
pub(crate) struct Figures {
    /// Of murmesh, as a share of direct, with 64 connections.
    pub(crate) requests_of_direct: f64,
    /// Of murmesh, as a share of direct.
    pub(crate) connections_of_direct: f64,
    /// CPU of both agents for a request with 64 connections, as a share of both HAProxies'.
    pub(crate) cpu_of_haproxy: Option<f64>,
    /// Of murmesh with 64 connections.
    pub(crate) p99_of_p50: f64,
}

/// Whether one limit holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Held,
    Missed,
    NotCompared,
}

/// One limit and what was measured.
pub(crate) struct Limit {
    pub(crate) what: &'static str,
    bound: Bound,
    measured: Option<f64>,
}

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Limit {
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

/// All limits, with what was measured.
pub(crate) fn limits(figures: &Figures) -> Vec<Limit> {
    use Bound::{AtLeast, AtMost};
    let limit = |what, bound, measured| Limit { what, bound, measured };
    vec![
        limit(
            "requests/s of direct, 64 connections",
            AtLeast(0.25),
            Some(figures.requests_of_direct),
        ),
        limit("new connections/s of direct", AtLeast(0.25), Some(figures.connections_of_direct)),
        limit("CPU per request of HAProxy's, 64 connections", AtMost(0.5), figures.cpu_of_haproxy),
        limit("p99 of p50, 64 connections", AtMost(5.0), Some(figures.p99_of_p50)),
    ]
}
