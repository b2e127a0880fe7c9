//! A data connection that a peer dialled: where its tunnels come in, and how many it may have.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, ConnectionError, VarInt};
use tokio::time::{MissedTickBehavior, interval};

use super::credit::Credit;
use super::endpoint::REFUSED;
use super::revoker::Revoker;
use super::silence::{self, SILENCE_MAX, Silence};
use super::tunnel::{TunnelReader, TunnelWriter};
use crate::runtime::clock::Clock;
use crate::tls::Peer;

/// How often the connection is looked at. Nobody here avoids the peer, so once in a while will do.
const TICK: Duration = Duration::from_millis(100);

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

    /// Where it dialled from, as seen from here now.
    pub fn address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    /// Takes none of its tunnels; the dialler may go elsewhere with what it sent.
    pub fn refuse(self) {
        self.connection.close(VarInt::from_u32(REFUSED), b"too many connections");
    }

    /// Closes the connection once its peer has fallen silent or is believed no more; never returns
    /// before that. Cancel safe.
    pub async fn watch(&self, clock: &Clock, revoker: &Revoker) {
        tokio::select! {
            biased;
            () = revoker.closed(&self.connection, &self.peer) => {}
            () = self.fallen_silent(clock) => silence::close(&self.connection),
        }
    }

    async fn fallen_silent(&self, clock: &Clock) {
        let heard = || silence::heard(&self.connection);
        let mut silence = Silence::new(clock.now(), heard());
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while silence.look(clock.now(), heard()) < SILENCE_MAX {
            ticks.tick().await;
        }
    }

    /// The next tunnel, its header not read yet. Cancel safe.
    pub async fn next(&self) -> Result<(TunnelWriter, TunnelReader), ConnectionError> {
        let (send, receive) = self.connection.accept_bi().await?;
        Ok((TunnelWriter::new(send), TunnelReader::new(receive, None)))
    }

    /// Tells the peer something beside its tunnels, in one datagram of at most 1,000 bytes, which may be
    /// lost. An agent of before hears none.
    pub fn tell(&self, word: Bytes) {
        let _ = self.connection.send_datagram(word); // not taken, or the connection is gone
    }

    /// Gives a tunnel whose header was found good its place. Only such tunnels make the peer's
    /// streams and credit grow: whoever says nothing of use has what every connection begins with.
    pub fn admit(&self, tunnel: &mut TunnelReader) {
        let (place, grown) = self.credit.enter(&self.connection);
        if let Some(streams) = grown {
            // Credit covers them already: now the peer may open them.
            self.connection.set_max_concurrent_bi_streams(VarInt::from_u32(streams));
        }
        tunnel.take(place);
    }
}
