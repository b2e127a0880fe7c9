//! What a connection goes on with after its last request: bytes that are no HTTP any more.

use bytes::Bytes;

use super::Http;
use super::exchange::Switched;
use super::noted::Noted;
use crate::proxy::local::LocalSocket;
use crate::proxy::outbound::{Ask, Connected};
use crate::proxy::tcp::Cut;

/// What a connection goes on with after its last request.
pub(super) enum Onward {
    /// What client and instance agreed to speak.
    Upgraded(Switched),
    /// What CONNECT asked for.
    Tunnel(Ask, Connected, Option<Box<Noted>>),
}

impl Onward {
    /// Carries bytes until both sides have ended; what the client `said` already goes first.
    pub(super) async fn carry(self, http: &Http, mut socket: LocalSocket, said: Bytes) {
        match self {
            Self::Upgraded(Switched { io, said: heard, carried }) => {
                let (bytes, stalls) = (carried.meter(), &http.outbound.stalls);
                let outcome = io.carry(&mut socket, heard, said, bytes, stalls).await;
                carried.end_switched(&outcome);
            }
            Self::Tunnel(ask, connected, noted) => {
                let (len, connected) = (said.len(), connected.with_said(said));
                let sent = noted.as_ref().map(|noted| noted.bytes());
                let outcome = http.outbound.carry(socket, ask, connected, len, sent).await;
                match (noted, outcome) {
                    (Some(noted), Ok(())) => noted.end(),
                    (Some(mut noted), Err(Cut::Tunnel(_))) => noted.ended_by("cut"),
                    _ => {}
                }
            }
        }
    }
}
