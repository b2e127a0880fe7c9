//! What outlives an agent, written as it changes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::warn;

use crate::model::{Epoch, MemberId};
use crate::runtime::blocking;
use crate::tls::TlsError;
use crate::tls::store::{DataDir, StoreError};
use crate::transport::gossip::{Durable, GossipHandle};
use crate::wire;

const REMEMBERED: &str = "members";
/// A full disk is told this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);
/// What could not be written is tried again after this.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Members of an earlier run and where they were.
pub(super) fn remembered(dir: &DataDir) -> Result<Vec<(MemberId, SocketAddr)>, StoreError> {
    let Some(bytes) = dir.read(REMEMBERED)? else { return Ok(Vec::new()) };
    wire::decode(&bytes).map_err(|error| StoreError::damaged(dir.file(REMEMBERED), error))
}

/// Keeps on disk what a restart needs, until the gossip driver is gone and its last state is
/// written. The only writer of these files while the agent runs. A full disk costs nothing else.
pub(super) async fn persist(
    dir: DataDir,
    mut durable: watch::Receiver<Durable>,
    gossip: GossipHandle,
) {
    let mut complained_at: Option<Instant> = None;
    let mut has_failed = false;
    while next(&mut durable, has_failed).await {
        let state = durable.borrow_and_update().clone();
        let dir = dir.clone();
        // Syncing a file takes as long as the disk likes.
        let written = blocking(move || write(&dir, &state)).await;
        if let Some(Ok(Some(until))) = written {
            gossip.extend_epochs(until).await;
        }
        has_failed = matches!(written, Some(Err(_)));
        let is_quiet = || complained_at.is_some_and(|at| at.elapsed() < COMPLAINT_INTERVAL);
        if let Some(Err(error)) = written
            && !is_quiet()
        {
            warn!(%error, "state cannot be kept on disk");
            #[allow(clippy::disallowed_methods)] // how often to complain is no decision of the mesh
            let now = Instant::now();
            complained_at = Some(now);
        }
    }
}

/// Waits for what to write next: a new state, or after a failure the same again. False once the
/// gossip driver is gone.
async fn next(durable: &mut watch::Receiver<Durable>, has_failed: bool) -> bool {
    let changed = durable.changed();
    if has_failed {
        timeout(RETRY_INTERVAL, changed).await.unwrap_or(Ok(())).is_ok()
    } else {
        changed.await.is_ok()
    }
}

/// The last epoch taken, if some were needed: the smallest file and the one that a member cannot be
/// without, so it is the first.
fn write(dir: &DataDir, state: &Durable) -> Result<Option<Epoch>, StoreError> {
    let until = state.epochs_needed.map(|needed| dir.extend_epochs(needed)).transpose()?;
    dir.store_entries(&state.entries)?;
    let members = wire::encode(&state.remembered).map_err(TlsError::from)?;
    dir.write(REMEMBERED, &members)?;
    Ok(until)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::gossip::gossip_channel;

    /// The driver hands over faster than the disk takes, and ends right after its last word.
    #[tokio::test]
    async fn the_last_state_handed_over_is_the_one_on_disk() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::new(temporary.path());
        let (durable, reader) = watch::channel(Durable::default());
        let persist = persist(dir.clone(), reader, gossip_channel().0);
        let hand_over = async move {
            for port in 1..=50 {
                let somebody = (MemberId::from_bytes([1; 16]), ([10, 0, 0, 1], port).into());
                durable.send_replace(Durable { remembered: vec![somebody], ..Durable::default() });
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(persist, hand_over);
        let kept = remembered(&dir).unwrap();
        assert_eq!(kept, [(MemberId::from_bytes([1; 16]), ([10, 0, 0, 1], 50).into())]);
    }
}
