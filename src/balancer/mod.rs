//! Choose one of many. Pure: who may be chosen and how busy each one is are given.

mod least_request;

pub use least_request::least_request;

use crate::model::Weight;

/// One that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its share; 0 takes none.
    pub weight: Weight,
    /// Calls in flight to it.
    pub load: u32,
}
