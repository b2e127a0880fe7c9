//! Connection credit that grows with the streams it has to cover.
//!
//! A stalled reader's stream holds up to one stream window S of the connection's credit C for as
//! long as it stalls. Its neighbours go on as long as C covers N x S, so both sides of a connection
//! raise their own C before the number N of tunnels that may be open grows: the acceptor with what
//! it grants, the dialler with what it opens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use quinn::Connection;

use super::planes::{STREAMS_AT_START, credit_for, window};

/// Most tunnels that one connection may have open. At the next its caller is refused.
///
/// quinn-proto keeps an entry for each that is granted, in hash tables from which the ended ones go and
/// the next ones come. Such a table of 32,768 places cleans itself up where it is while at most 14,335
/// are taken, and doubles above: a second wave of connections would find 1 MB more.
pub(super) const STREAMS_MAX: u32 = 14_000;

/// The admitted tunnels of one connection, and how many of them its credit covers.
#[derive(Debug)]
pub(super) struct Credit {
    open: Arc<AtomicU32>,
    covered: AtomicU32,
}

/// One tunnel's place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<AtomicU32>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Default for Credit {
    fn default() -> Self {
        Self { open: Arc::default(), covered: AtomicU32::new(STREAMS_AT_START) }
    }
}

impl Credit {
    /// Whether a tunnel is open, or being opened.
    pub(super) fn is_in_use(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0
    }

    /// A place for one more tunnel. Covers four times as many once half of the places are taken,
    /// and then says how many that are.
    pub(super) fn enter(&self, connection: &Connection) -> (Place, Option<u32>) {
        let open = self.open.fetch_add(1, Ordering::Relaxed) + 1;
        let place = Place(Arc::clone(&self.open));
        let covered = self.covered.load(Ordering::Relaxed);
        if open <= covered / 2 || covered >= STREAMS_MAX {
            return (place, None);
        }
        let covered = (covered * 4).min(STREAMS_MAX);
        self.covered.store(covered, Ordering::Relaxed); // one thread owns the connection
        connection.set_receive_window(window(credit_for(covered)));
        (place, Some(covered))
    }
}
