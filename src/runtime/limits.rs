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
