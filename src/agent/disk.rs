//! What outlives an agent, written as it changes.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::warn;

use crate::model::{Epoch, MemberId};
use crate::tls::TlsError;
use crate::tls::store::{DataDir, StoreError};
use crate::transport::gossip::{Durable, GossipHandle};
use crate::wire;

const REMEMBERED: &str = "members";
/// A full disk is told this often.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// Members of an earlier run and where they were.
pub(super) fn remembered(dir: &DataDir) -> Result<Vec<(MemberId, SocketAddr)>, StoreError> {
    let bytes = dir.read(REMEMBERED)?.unwrap_or_default();
    Ok(wire::decode(&bytes).unwrap_or_default()) // worth nothing when damaged, and soon rewritten
}

/// Keeps on disk what a restart needs. A full disk costs nothing else.
pub(super) async fn persist(
    dir: DataDir,
    mut durable: watch::Receiver<Durable>,
    gossip: GossipHandle,
) {
    let mut complained_at: Option<Instant> = None;
    while durable.changed().await.is_ok() {
        let state = durable.borrow_and_update().clone();
        let dir = dir.clone();
        // Syncing a file takes as long as the disk likes.
        let written = tokio::task::spawn_blocking(move || write(&dir, &state)).await;
        if let Ok(Ok(Some(until))) = written {
            gossip.extend_epochs(until).await;
        }
        let is_quiet = || complained_at.is_some_and(|at| at.elapsed() < COMPLAINT_INTERVAL);
        if let Ok(Err(error)) = written
            && !is_quiet()
        {
            warn!(%error, "state cannot be kept on disk");
            #[allow(clippy::disallowed_methods)] // how often to complain is no decision of the mesh
            let now = Instant::now();
            complained_at = Some(now);
        }
    }
}

/// Keeps the last state of an agent that stops.
pub(super) fn persist_once(dir: &DataDir, durable: &watch::Receiver<Durable>) {
    if let Err(error) = write(dir, &durable.borrow()) {
        warn!(%error, "the last state cannot be kept on disk");
    }
}

/// The last epoch taken, if some were needed.
fn write(dir: &DataDir, state: &Durable) -> Result<Option<Epoch>, StoreError> {
    dir.store_entries(&state.entries)?;
    let members = wire::encode(&state.remembered).map_err(TlsError::from)?;
    dir.write(REMEMBERED, &members)?;
    state.epochs_needed.map(|needed| dir.extend_epochs(needed)).transpose()
}
