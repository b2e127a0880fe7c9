//! When to stop calling an instance, and how to begin again.
//!
//! [`Breaker`] is one caller's own experience with one instance: closed lets through, open refuses,
//! half-open tries. [`SharedBreaker`] is what all callers together hold of an instance: a [`Verdict`]
//! with its [`Grounds`]. A caller asks both, its own experience first. The rules with the simulations
//! that chose them are in `docs/breaker.md`.

mod case;
mod config;
mod grounds;
mod local;
mod report;
mod shared;
mod skew;
mod turn;
mod verdict;
mod window;

pub use config::{BreakerConfig, SharedConfig};
pub use grounds::{Grounds, Testimony, TestimonyWeight};
pub use local::{Admission, Breaker, BreakerEvent, BreakerState, FailedCalls, Trial, Trip};
pub use report::{InstanceKey, OwnWindow};
pub use shared::{InstanceChange, SharedBreaker, SharedEvent};
pub use verdict::{Ejection, ProbeGate, Turn, Verdict};
pub use window::Window;

#[cfg(test)]
mod tests;
