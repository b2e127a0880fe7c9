//! A member that the others believe no more: a mark in the data directory, so that `join` does not
//! take what this machine remembers of the mesh for the truth.

use std::fs;
use std::io::ErrorKind;

use crate::tls::store::{DataDir, StoreError};

const MARK: &str = "disowned";

/// What to do about it.
pub(crate) const FIX: &str =
    "murmesh join TOKEN --replace, once its agent is stopped, or ask whoever runs the mesh";

/// Whether the others refused the member of this directory when it last ran.
pub(super) fn is_marked(dir: &DataDir) -> bool {
    dir.file(MARK).exists()
}

/// They refuse it.
pub(super) fn mark(dir: &DataDir) -> Result<(), StoreError> {
    dir.write(MARK, b"The other members of the mesh refuse this machine: join it anew.\n")
}

/// They do not, or it was let in again.
pub(super) fn clear(dir: &DataDir) -> Result<(), StoreError> {
    match fs::remove_file(dir.file(MARK)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(StoreError::Io { action: "remove", path: dir.file(MARK), error })
        }
        _ => Ok(()),
    }
}
