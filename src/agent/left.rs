//! Leaving lasts: a mark in the data directory, which outlives the agent.
//!
//! The mark is on disk before the goodbye is said, so that a member that others hold for gone never
//! starts again by mistake. Whoever came by a token comes back by a token; the founder, which is an
//! issuer and needs nobody's permission, comes back by `init`.

use std::fs;
use std::io::ErrorKind;

use crate::tls::store::{DataDir, StoreError};

const MARK: &str = "left";

/// Whether the member of this directory has left its mesh.
pub fn has_left(dir: &DataDir) -> bool {
    dir.file(MARK).exists()
}

/// Makes the member of this directory one that has not left. It must not be running.
pub fn come_back(dir: &DataDir) -> Result<(), StoreError> {
    let _lock = dir.lock()?;
    clear(dir)
}

/// From now on no agent starts here.
pub(super) fn mark(dir: &DataDir) -> Result<(), StoreError> {
    dir.write(MARK, b"This machine has left its mesh: no agent starts here until it is back.\n")
}

/// Agents start here again.
pub(super) fn clear(dir: &DataDir) -> Result<(), StoreError> {
    match fs::remove_file(dir.file(MARK)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(StoreError::Io { action: "remove", path: dir.file(MARK), error })
        }
        _ => Ok(()),
    }
}

/// The command that brings the member of this directory back.
pub fn way_back(dir: &DataDir) -> &'static str {
    match dir.authority() {
        Ok(Some(_)) => "murmesh init",
        _ => "murmesh join TOKEN",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaving_lasts_until_the_member_is_back_and_a_running_one_is_not_brought_back() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::new(temporary.path());
        assert!(!has_left(&dir));
        mark(&dir).unwrap();
        mark(&dir).unwrap();
        assert!(has_left(&dir));
        let running = dir.lock().unwrap();
        assert!(matches!(come_back(&dir), Err(StoreError::Locked { .. })));
        assert!(has_left(&dir));
        drop(running);
        come_back(&dir).unwrap();
        come_back(&dir).unwrap();
        assert!(!has_left(&dir));
    }
}
