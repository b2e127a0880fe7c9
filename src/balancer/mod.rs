//! Choose one of many. Pure: who may be chosen, and how each one fares, are given.
//!
//! A choice is made in two steps. [`choose`] draws a few candidates and asks about those only, so that
//! a service of a thousand instances costs no more than one of three. Where none of the drawn will do,
//! [`scan`] asks about all. Neither allocates.
//!
//! Invariants, which the tests name:
//! - a candidate of weight 0, or that refuses, is never chosen;
//! - one that is chosen only as the last resort is chosen only when no better one is there;
//! - over many calls each candidate gets its weight's share, unless load says otherwise.

mod choice;
mod maglev;
mod others;
mod peak_ewma;
mod shares;
mod slow_start;
mod spill;

pub use choice::{Balance, Load, Order, Rank, Stance, WHOLE, choose, scan};
pub use maglev::{Maglev, hash_of};
pub use others::Others;
pub use peak_ewma::PeakEwma;
pub use shares::{Drawn, Shares};
pub use slow_start::slow_start;
pub use spill::{Near, Prefer, Tier, spill};
