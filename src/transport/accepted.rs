//! A data connection that a peer dialled: where its tunnels come in, and how many it may have.

use std::sync::Arc;

use quinn::{Connection, ConnectionError, VarInt};

use super::credit::Credit;
use super::endpoint::REFUSED;
use super::tunnel::{TunnelReader, TunnelWriter};
use crate::tls::Peer;

/// A data connection that a peer dialled.
#[derive(Debug)]
pub struct Accepted {
    connection: Connection,
    peer: Arc<Peer>,
    credit: Credit,
}

impl Accepted {
    /// A connection whose handshake proved `peer`.
    pub fn new(connection: Connection, peer: Peer) -> Self {
        Self { connection, peer: Arc::new(peer), credit: Credit::default() }
    }

    /// Who dialled.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// Takes none of its tunnels; the dialler may go elsewhere with what it sent.
    pub fn refuse(self) {
        self.connection.close(VarInt::from_u32(REFUSED), b"too many connections");
    }

    /// The next tunnel, its header not read yet. Cancel safe.
    pub async fn next(&self) -> Result<(TunnelWriter, TunnelReader), ConnectionError> {
        let (send, receive) = self.connection.accept_bi().await?;
        let (place, grown) = self.credit.enter(&self.connection);
        if let Some(streams) = grown {
            // Credit covers them already: now the peer may open them.
            self.connection.set_max_concurrent_bi_streams(VarInt::from_u32(streams));
        }
        Ok((TunnelWriter::new(send), TunnelReader::new(receive, place)))
    }
}
