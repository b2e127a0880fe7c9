//! Choose one of many. Pure: who may be chosen and how busy each one is are given.

mod least_request;
mod shares;

pub use least_request::least_request;
pub use shares::Shares;
