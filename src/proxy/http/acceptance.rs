//! Whether an instance's agent has taken a new connection.

use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

/// Whether an instance's agent has taken a connection: until then what is said on it may have to be said
/// to another instance, and whoever says it had better not say more than it keeps.
#[derive(Debug)]
pub(super) struct Acceptance {
    /// Who waits for it, at most one for each exchange on the connection; `None` once it is there.
    waiting: Mutex<Option<Vec<Waker>>>,
}

impl Acceptance {
    /// Of a connection that was taken already, or not yet.
    pub(super) fn new(is_accepted: bool) -> Self {
        let waiting = (!is_accepted).then(Vec::new);
        Self { waiting: Mutex::new(waiting) }
    }

    /// The connection was taken.
    pub(super) fn accept(&self) {
        let waiting = self.waiting.lock().take();
        waiting.into_iter().flatten().for_each(Waker::wake);
    }

    /// Ready once the connection was taken. A connection that is refused ends instead.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut *self.waiting.lock() {
            None => Poll::Ready(()),
            Some(waiting) => {
                if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                    waiting.push(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }
}
