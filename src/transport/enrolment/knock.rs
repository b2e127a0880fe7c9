//! The newcomer's side of the door.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use quinn::{ConnectionError, VarInt};
use quinn_proto::TransportErrorCode;
use rustls_pki_types::CertificateDer;
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::super::endpoint::client_config;
use super::super::planes::transport_config;
use super::super::socket;
use super::{ANSWER_LEN_MAX, EXCHANGE_TIME_MAX, JoinAnswer, JoinRefusal, JoinRequest};
use crate::model::{Entry, MemberId, MemberName, MeshId};
use crate::tls::{Plane, SecretKey, TlsError, Token, joiner_config, peer_of, server_name};
use crate::wire;

/// How long to wait before the next attempt at a door that is full. An exchange takes some
/// milliseconds.
const FULL_PAUSE: Duration = Duration::from_millis(200);

/// All that a newcomer starts from, checked against its token.
#[derive(Debug)]
pub struct Welcome {
    /// The encoded genesis.
    pub genesis: Vec<u8>,
    /// Leaf, issuer, root.
    pub chain: Vec<CertificateDer<'static>>,
    /// Own enrolment, issuers, operators.
    pub entries: Vec<Entry>,
    /// Live members to dial first.
    pub contacts: Vec<(MemberId, SocketAddr)>,
}

/// Joining failed; the data directory is as it was, but for a node key that a next try uses.
#[derive(Debug, thiserror::Error)]
pub enum KnockError {
    /// Fault: whoever made the token or chose the name; trying again is in vain.
    #[error("{issuer} refused: {reason}")]
    Refused {
        /// Who refused.
        issuer: SocketAddr,
        /// Why.
        reason: JoinRefusal,
    },
    /// Fault: network, or no issuer is up. Trying again is safe.
    #[error(
        "no issuer could be reached: {0}. Is an agent running there, and is its UDP port open?"
    )]
    Unreachable(String),
    /// Fault: whoever starts it.
    #[error("the token names no issuer; say one with --seed host:port")]
    NoIssuer,
    /// Fault: the token, or the files of this machine.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Fault: this machine.
    #[error("cannot open a UDP socket: {0}")]
    Socket(#[from] std::io::Error),
    /// Fault: the issuer; nothing of its answer was kept.
    #[error("{issuer} answered with what does not belong to the token's mesh: {what}")]
    Wrong {
        /// Who answered.
        issuer: SocketAddr,
        /// What is wrong with it.
        what: String,
    },
}

/// Asks the issuers in turn to let `node` in as `name`, which it may take over from another member.
pub async fn knock(
    token: &Token,
    issuers: &[SocketAddr],
    node: &SecretKey,
    name: &MemberName,
    is_replacement: bool,
) -> Result<Welcome, KnockError> {
    let mut failures = Vec::new();
    let mut waiting: Vec<SocketAddr> = issuers.to_vec();
    waiting.reverse();
    while let Some(issuer) = waiting.pop() {
        match timeout(EXCHANGE_TIME_MAX, knock_at(token, issuer, node, name, is_replacement)).await
        {
            Ok(Ok(JoinAnswer::Welcome { genesis, chain, entries, contacts })) => {
                return check_welcome(token, issuer, genesis, chain, entries, contacts);
            }
            Ok(Ok(JoinAnswer::Refused(JoinRefusal::OtherIssuer { address, .. })))
                if !failures
                    .iter()
                    .any(|failure: &String| failure.contains(&address.to_string())) =>
            {
                failures.push(format!("{issuer}: says to ask {address}"));
                waiting.push(address);
            }
            Ok(Ok(JoinAnswer::Refused(JoinRefusal::NotIssuer))) => {
                failures.push(format!("{issuer}: {}", JoinRefusal::NotIssuer));
            }
            Ok(Ok(JoinAnswer::Refused(reason))) => {
                return Err(KnockError::Refused { issuer, reason });
            }
            Ok(Err(error)) => failures.push(format!("{issuer}: {error}")),
            Err(_) => failures.push(format!("{issuer}: no answer within {EXCHANGE_TIME_MAX:?}")),
        }
    }
    if failures.is_empty() {
        return Err(KnockError::NoIssuer);
    }
    Err(KnockError::Unreachable(failures.join("; ")))
}

async fn knock_at(
    token: &Token,
    issuer: SocketAddr,
    node: &SecretKey,
    name: &MemberName,
    is_replacement: bool,
) -> Result<JoinAnswer, KnockError> {
    let failed = |what: String| KnockError::Unreachable(what);
    let any: SocketAddr = match issuer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = socket::client(any)?;
    let mut config = client_config(Plane::Enrolment, joiner_config(token)?)
        .map_err(|error| failed(error.to_string()))?;
    config.transport_config(transport_config(Plane::Enrolment, issuer));
    let connection = loop {
        let connecting = socket
            .connect_with(config.clone(), issuer, &server_name(None))
            .map_err(|error| failed(error.to_string()))?;
        match connecting.await {
            Ok(connection) => break connection,
            Err(error) if is_full(&error) => sleep(FULL_PAUSE).await,
            Err(error) => return Err(failed(error.to_string())),
        }
    };
    let peer = peer_of(&connection).ok_or_else(|| failed("it proved nothing".into()))?;
    debug!(issuer = %peer.name, "enrolment door open");
    let request = JoinRequest::sign(token, node, name, is_replacement, &peer.id)?;
    let exchange = async {
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| e.to_string())?;
        let bytes = request.encode().map_err(|e| e.to_string())?;
        send.write_all(&bytes).await.map_err(|e| e.to_string())?;
        send.finish().map_err(|e| e.to_string())?;
        let answer = receive.read_to_end(ANSWER_LEN_MAX).await.map_err(|e| e.to_string())?;
        wire::decode(&answer).map_err(|e| e.to_string())
    };
    let answer = exchange.await.map_err(failed)?;
    connection.close(VarInt::from_u32(0), b"thanks");
    socket.wait_idle().await;
    Ok(answer)
}

/// Whether the door has no place for this machine just now: its neighbours are joining, too.
fn is_full(error: &ConnectionError) -> bool {
    let refused = TransportErrorCode::CONNECTION_REFUSED;
    matches!(error, ConnectionError::ConnectionClosed(close) if close.error_code == refused)
}

fn check_welcome(
    token: &Token,
    issuer: SocketAddr,
    genesis: Vec<u8>,
    chain: Vec<Vec<u8>>,
    entries: Vec<Vec<u8>>,
    contacts: Vec<(MemberId, SocketAddr)>,
) -> Result<Welcome, KnockError> {
    let wrong = |what: &str| KnockError::Wrong { issuer, what: what.to_owned() };
    if MeshId::of_genesis(&genesis) != token.mesh {
        return Err(wrong("another genesis"));
    }
    let decoded: Result<Vec<_>, _> =
        entries.into_iter().map(|bytes| Entry::decode(Bytes::from(bytes))).collect();
    let entries = decoded.map_err(|error| wrong(&error.to_string()))?;
    if !entries.iter().all(|entry| entry.is_signed(&token.mesh)) {
        return Err(wrong("an entry that is not signed"));
    }
    let chain = chain.into_iter().map(CertificateDer::from).collect();
    Ok(Welcome { genesis, chain, entries, contacts })
}
