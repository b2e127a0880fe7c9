//! Whether an entry was signed by whom it names.

use crate::model::{Entry, MeshId};

/// Verifies entries. A seam for simulations only, where hundreds of nodes in one process would
/// verify every signature hundreds of times: there they share one memory of what was verified.
pub trait Verify: Send {
    /// Whether `entry`'s signature holds in `mesh`.
    fn verify(&mut self, mesh: &MeshId, entry: &Entry) -> bool;
}

/// Verifies every signature it is asked about: about 50 µs each.
#[derive(Clone, Copy, Debug, Default)]
pub struct Signatures;

impl Verify for Signatures {
    fn verify(&mut self, mesh: &MeshId, entry: &Entry) -> bool {
        entry.is_signed(mesh)
    }
}
