//! When to stop calling an instance, and how to begin again.
//!
//! [`Breaker`] is one caller's own experience with one instance: closed lets through, open refuses,
//! half-open tries.

mod config;
mod local;
mod window;

pub use config::BreakerConfig;
pub use local::{Admission, Breaker, BreakerEvent, BreakerState, Trip};
pub use window::Window;
