//! What the system lets this process use.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the number of files this process may open to the most that it may ask for; returns the
/// number granted. Every carried connection takes two at its far end and one here.
pub fn raise_open_files() -> u64 {
    let before = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: before.maximum, maximum: before.maximum };
    if setrlimit(Resource::Nofile, wanted).is_err() {
        tracing::warn!(limit = ?before.current, "cannot raise the limit of open files");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// What the allocator keeps of freed memory at the end of a heap is twice this, in bytes.
const KEPT_BLOCK_LEN: usize = 2 * 1024 * 1024;

/// Lets the allocator keep a few megabytes that were freed, where it is glibc's.
///
/// It gives the end of a heap back above 128 KiB, and datagrams of 64 KiB come and go there: page
/// faults were 18 % of the receiving agent's time in a bulk transfer. glibc raises that limit to twice
/// the longest block that was freed so far (`mallopt(3)`, `M_MMAP_THRESHOLD`); so one is freed.
pub fn keep_freed_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(KEPT_BLOCK_LEN)));
}
