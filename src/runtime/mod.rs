//! The only doors to the machine: clock, tasks, shutdown, entropy.

pub mod clock;
pub mod entropy;
pub mod limits;
mod shutdown;
mod tasks;

pub use shutdown::{Shutdown, Stage};
pub use tasks::{TaskGroup, Thread, ThreadError, start_blocking_thread};
