//! Streams whose reader takes nothing, and the memory that they hold.
//!
//! Flow control keeps a stalled stream from delaying a neighbour, at the price of one stream window
//! of memory each. So a write that has waited for [`STALL_AFTER`] is charged one window, and above
//! the budget the stream that has stalled the longest is given up.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// A write to a local socket failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// The socket is gone, or its reader.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Its reader took nothing for so long that its memory was needed.
    #[error(transparent)]
    Stalled(#[from] Evicted),
}

/// Of too many that wait this one had waited the longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stalled")]
pub(super) struct Evicted;

/// A write that waits for this long is a stall.
pub(super) const STALL_AFTER: Duration = Duration::from_secs(1);
/// What one stalled stream is charged, in bytes: the stream window of the data plane.
const CHARGE: usize = 256 * 1024;
/// What all stalled streams of the process may hold, in bytes.
const BUDGET: usize = 256 * 1024 * 1024;

/// The stalled streams of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Stalls {
    waiting: Arc<Mutex<Waiting>>,
    count_max: usize,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    /// By the order in which they stalled.
    stalled: BTreeMap<u64, oneshot::Sender<()>>,
}

/// Takes its stream off the list.
struct Stalled<'a> {
    stalls: &'a Stalls,
    number: u64,
}

impl Drop for Stalled<'_> {
    fn drop(&mut self) {
        self.stalls.waiting.lock().stalled.remove(&self.number);
    }
}

impl Default for Stalls {
    fn default() -> Self {
        Self::new(BUDGET / CHARGE)
    }
}

impl Stalls {
    /// At most `count_max` streams may be stalled at a time.
    pub(super) fn new(count_max: usize) -> Self {
        Self { waiting: Arc::default(), count_max }
    }

    /// How many streams are stalled now.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.waiting.lock().stalled.len()
    }

    /// Waits for what has stalled, unless its memory is needed.
    pub(super) async fn watch<T>(&self, waiting: impl Future<Output = T>) -> Result<T, Evicted> {
        let (_stalled, evicted) = self.enter();
        tokio::select! {
            biased;
            outcome = waiting => Ok(outcome),
            _ = evicted => Err(Evicted),
        }
    }

    fn enter(&self) -> (Stalled<'_>, oneshot::Receiver<()>) {
        let (evict, evicted) = oneshot::channel();
        let mut waiting = self.waiting.lock();
        if waiting.stalled.len() >= self.count_max
            && let Some((_, longest)) = waiting.stalled.pop_first()
        {
            let _ = longest.send(()); // it has just ended by itself
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.stalled.insert(number, evict);
        (Stalled { stalls: self, number }, evicted)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn longest_stalled_goes_when_there_are_too_many() {
        let stalls = Stalls::new(2);
        let mut writes = Vec::new();
        for _ in 0..3 {
            writes.push(Box::pin(stalls.watch(pending::<()>())));
        }
        let (evicted, index, rest) = futures_util::future::select_all(writes).await;
        assert_eq!(evicted, Err(Evicted));
        assert_eq!(index, 0);
        assert_eq!(stalls.len(), 2);
        drop(rest);
        assert_eq!(stalls.len(), 0, "whoever gives up is no longer charged");
    }

    #[tokio::test]
    async fn write_that_ends_is_no_longer_charged() {
        let stalls = Stalls::new(1);
        assert_eq!(stalls.watch(ready(7)).await, Ok(7));
        assert_eq!(stalls.len(), 0);
    }
}
