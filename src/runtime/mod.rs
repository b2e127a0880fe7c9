//! The only doors to the machine: clock, tasks, shutdown, entropy; and the machine itself, where a
//! simulation takes its place.

pub mod clock;
pub mod entropy;
pub mod limits;
pub mod machine;
pub mod polling;
pub mod reach;
mod shutdown;
mod tasks;
mod unix;

pub use shutdown::{Shutdown, Stage};
pub use tasks::{TaskGroup, Thread, ThreadError, blocking, start_blocking_thread};
pub use unix::UnixSocket;
