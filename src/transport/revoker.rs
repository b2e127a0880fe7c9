//! Ends the open connections of peers that are believed no more: a handshake proves somebody for a
//! moment, and connections last.

use quinn::{Connection, VarInt};
use tracing::info;

use crate::telemetry::{EventKind, EventLog, Metrics};
use crate::tls::{Peer, Trust};

/// Whoever owns a connection asks it, or waits for it. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Revoker {
    trust: Trust,
    metrics: Metrics,
    events: EventLog,
}

impl Revoker {
    /// One that believes whom `trust` believes.
    pub fn new(trust: Trust, metrics: Metrics, events: EventLog) -> Self {
        Self { trust, metrics, events }
    }

    /// Closes `connection` if `peer` is believed no more. Returns whether it did.
    pub(super) fn close_if_lost(&self, connection: &Connection, peer: &Peer) -> bool {
        let is_lost = !self.trust.admits(peer);
        if is_lost {
            self.close(connection, peer);
        }
        is_lost
    }

    /// Returns once it has closed `connection` because `peer` is believed no more. Cancel safe.
    pub(super) async fn closed(&self, connection: &Connection, peer: &Peer) {
        self.trust.lost(peer).await;
        self.close(connection, peer);
    }

    fn close(&self, connection: &Connection, peer: &Peer) {
        // No code of a refusal: its streams may have been read.
        connection.close(VarInt::from_u32(0), b"nobody vouches for you any more");
        self.metrics.connections_revoked.inc();
        let reason = "it was replaced, or its issuer was removed: nobody vouches for it, and its connections are closed";
        info!(peer = %peer.name, id = %peer.id, "connection revoked");
        self.events.record(EventKind::ConnectionRevoked, &peer.name, reason);
    }
}
