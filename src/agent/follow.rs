//! Following a part of the mesh, without polling.

use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use crate::mesh::Snapshot;

/// Follows a part of the mesh as seen from here. Made by [`Agent::watch`](super::Agent::watch).
///
/// It wakes only when the part differs from what was returned last. Of several changes in between
/// only the last is seen: it tells what is, not what happened.
pub struct Watch<T> {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    part: Box<dyn FnMut(&Snapshot) -> T + Send>,
    last: Option<T>,
}

impl<T: Clone + PartialEq> Watch<T> {
    pub(super) fn new(
        snapshots: watch::Receiver<Arc<Snapshot>>,
        part: impl FnMut(&Snapshot) -> T + Send + 'static,
    ) -> Self {
        Self { snapshots, part: Box::new(part), last: None }
    }

    /// The part as it is now, at once the first time and then each time that it has changed. `None`
    /// when the agent has stopped. Cancel safe.
    pub async fn changed(&mut self) -> Option<T> {
        let last = self.last.clone();
        self.wait_for(|now| last.as_ref() != Some(now)).await
    }

    /// Waits until the part is as `is_wanted` says, and returns it; at once when it is. `None` when
    /// the agent has stopped before. Cancel safe.
    pub async fn wait_for(&mut self, mut is_wanted: impl FnMut(&T) -> bool) -> Option<T> {
        loop {
            let snapshot = Arc::clone(&self.snapshots.borrow_and_update());
            let now = (self.part)(&snapshot);
            if is_wanted(&now) {
                self.last = Some(now.clone());
                return Some(now);
            }
            self.snapshots.changed().await.ok()?;
        }
    }
}

impl<T> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watch")
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::mesh::ServiceView;
    use crate::model::{Protocol, ServiceName};

    fn offering(names: &[&str]) -> Arc<Snapshot> {
        let mut snapshot = Snapshot::default();
        for name in names {
            let name: ServiceName = name.parse().unwrap();
            let view = ServiceView::new(name.clone(), Protocol::Tcp, Vec::new());
            snapshot.services.insert(name, Arc::new(view));
        }
        Arc::new(snapshot)
    }

    #[tokio::test]
    async fn only_changes_of_the_part_wake_and_the_last_one_is_told() {
        let (sender, receiver) = watch::channel(offering(&["db"]));
        let web: ServiceName = "web".parse().unwrap();
        let name = web.clone();
        let mut has_web = Watch::new(receiver, move |s| s.services.contains_key(&name));
        assert_eq!(has_web.changed().await, Some(false), "at once the first time");
        sender.send_replace(offering(&["db", "cache"]));
        assert_eq!(has_web.changed().now_or_never(), None, "another service is no change");
        sender.send_replace(offering(&["web"]));
        assert_eq!(has_web.wait_for(|has| *has).await, Some(true));
        sender.send_replace(offering(&["db", "web"]));
        assert_eq!(has_web.wait_for(|has| *has).await, Some(true), "it still is");
        sender.send_replace(offering(&[]));
        sender.send_replace(offering(&["web"]));
        assert_eq!(has_web.changed().now_or_never(), None, "back again before anybody looked");
        drop(sender);
        assert_eq!(has_web.changed().await, None);
        assert_eq!(has_web.wait_for(|has| !*has).await, None);
    }
}
