//! Who runs hyper's tasks.

use std::future::Future;

use hyper::rt::Executor;

use crate::runtime::TaskGroup;

/// Runs hyper's tasks in a group, which ends them.
#[derive(Clone, Debug)]
pub(super) struct Tasks(pub(super) TaskGroup);

impl Tasks {
    pub(super) fn spawn(
        &self,
        name: &'static str,
        future: impl Future<Output = ()> + Send + 'static,
    ) {
        self.0.spawn_connection(name, future);
    }
}

impl<F> Executor<F> for Tasks
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        self.spawn("http2", async move {
            future.await; // hyper's own: what they return says nothing
        });
    }
}
