//! A waker that remembers: what it was given to is polled only once it was woken.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

use futures_util::task::AtomicWaker;

/// The wakes of one part of a task.
pub(super) struct Wakes {
    shared: Arc<Shared>,
    waker: Waker,
}

/// Whether the part was woken since somebody asked, and whom that concerns.
struct Shared {
    is_woken: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl Wakes {
    /// Of a part that is to be polled for the first time.
    pub(super) fn new() -> Self {
        let (is_woken, task) = (AtomicBool::new(true), AtomicWaker::new());
        let shared = Arc::new(Shared { is_woken, task });
        Self { waker: Waker::from(Arc::clone(&shared)), shared }
    }

    /// It is to be polled again, whether somebody wakes it or not. Wakes nobody itself.
    pub(super) fn remember(&self) {
        self.shared.is_woken.store(true, Ordering::Release);
    }

    /// What wakes the part.
    pub(super) fn waker(&self) -> &Waker {
        &self.waker
    }

    /// What to poll the part with.
    pub(super) fn context(&self) -> Context<'_> {
        Context::from_waker(&self.waker)
    }

    /// A wake from now on wakes this task, too. Ask whether the part [was woken](Self::was_woken) after
    /// this: a wake just before it reached nobody.
    pub(super) fn concern(&self, task: &Waker) {
        self.shared.task.register(task);
    }

    /// A wake from now on is remembered, and wakes nobody.
    pub(super) fn concern_nobody(&self) {
        drop(self.shared.task.take());
    }

    /// Whether the part is to be polled.
    pub(super) fn is_woken(&self) -> bool {
        self.shared.is_woken.load(Ordering::Acquire)
    }

    /// Whether the part was woken since this was last asked.
    pub(super) fn was_woken(&self) -> bool {
        self.shared.is_woken.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A task, and whether it was woken since it was last asked.
    fn task() -> (Waker, impl Fn() -> bool) {
        let wakes = Wakes::new();
        assert!(wakes.was_woken(), "to be polled for the first time");
        (wakes.waker.clone(), move || wakes.was_woken())
    }

    #[test]
    fn whom_a_wake_concerns_is_woken_and_what_concerned_nobody_is_remembered() {
        let (wakes, (task, was_task_woken)) = (Wakes::new(), task());
        assert!(wakes.was_woken() && !wakes.was_woken(), "once");
        wakes.concern(&task);
        wakes.context().waker().wake_by_ref();
        assert!(was_task_woken() && wakes.was_woken());
        wakes.concern(&task);
        wakes.concern_nobody();
        wakes.context().waker().wake_by_ref();
        assert!(!was_task_woken() && wakes.was_woken());
    }
}
