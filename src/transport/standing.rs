//! Whether the others still believe this member: whoever is dropped or replaced while it cannot hear
//! of it learns it from those that refuse it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// Addresses remembered: enough to say where it was seen.
const NAMED_MAX: usize = 16;

/// Who refuses this member since anybody last spoke with it. One that refuses it alone proves nothing
/// while others speak. Cheap to clone; every clone is the same.
#[derive(Clone, Debug, Default)]
pub struct Standing(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// At most [`NAMED_MAX`].
    refused_at: Mutex<BTreeSet<SocketAddr>>,
    /// Whether there is any: packets come by the thousand.
    is_refused: AtomicBool,
}

impl Standing {
    /// The member at `address` refused this one's certificate as that of nobody.
    pub(super) fn note_refused(&self, address: SocketAddr) {
        let mut refused_at = self.0.refused_at.lock();
        if refused_at.len() < NAMED_MAX {
            refused_at.insert(address);
        }
        self.0.is_refused.store(true, Ordering::Relaxed);
    }

    /// Somebody spoke with this member.
    pub(super) fn note_heard(&self) {
        if self.0.is_refused.swap(false, Ordering::Relaxed) {
            self.0.refused_at.lock().clear();
        }
    }

    /// Where this member was refused, at most 16 addresses; nowhere if anybody has spoken with it since.
    pub fn refused_at(&self) -> Vec<SocketAddr> {
        self.0.refused_at.lock().iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_count_until_somebody_speaks_and_are_bounded() {
        let standing = Standing::default();
        (1..1_000).for_each(|port| standing.note_refused(([10, 0, 0, 1], port).into()));
        assert_eq!(standing.refused_at().len(), NAMED_MAX);
        standing.clone().note_heard();
        assert!(standing.refused_at().is_empty());
    }
}
