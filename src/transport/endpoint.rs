//! The one UDP port and its planes.
//!
//! A dialler marks the plane in the first byte of the destination connection id that it chooses;
//! the acceptor reads it before any handshake, and hands the attempt to that plane's queue. A quinn
//! connection is driven by the runtime that dials or accepts it, so whoever owns a plane calls
//! [`Endpoint::accept`] and [`Endpoint::connect`] on its own thread, and only the socket is shared.
//!
//! Strangers cost little. Each plane has places of its own for handshakes in progress, so that a crowd
//! at one door keeps nobody from another; one host has a share of them, and a handshake has
//! [`HANDSHAKE_TIME_MAX`]. Past [`RETRY_ABOVE`] handshakes an address has to prove itself first, at the
//! two doors of the enrolment always: there nobody is in a hurry, and places are few.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, ConnectError, Connection, ConnectionError, ConnectionId, EndpointConfig,
    ServerConfig, TimeSource, TokioRuntime, VarInt,
};
use quinn_proto::{
    ConnectionIdGenerator, HashedConnectionIdGenerator, RandomConnectionIdGenerator,
};
use ring::{hkdf, hmac};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::debug;

use super::path::PAYLOAD_LEN_MAX;
use super::places::{Place, Places};
use super::planes::transport_config;
use super::socket;
use super::standing::Standing;
use crate::model::MemberId;
use crate::runtime::entropy::{self, EntropyError};
use crate::runtime::{TaskGroup, clock};
use crate::telemetry::{Door, Metrics};
use crate::tls::{NodeCredentials, Peer, Plane, TlsError, Trust, peer_of, server_name};

/// How long a handshake may take, dialled or accepted.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// Handshakes in progress on a plane of members at most; the next are refused as `overload`.
pub const HANDSHAKES_MAX: usize = 1_024;
/// The same for one host, refused as `over_share`: a stranger cannot take all of them. A mesh behind
/// one address (a test, a NAT) still starts at once.
const HANDSHAKES_PER_HOST_MAX: usize = 256;
/// Handshakes in progress on a plane of members above which an unproven address is sent a Retry first.
pub const RETRY_ABOVE: usize = 32;
/// Newcomers at the door at once, from their first packet until they have their answer; as many
/// members at the renewal door.
const EXCHANGES_MAX: usize = 64;
/// The same for one host. Of more machines that join from behind one NAT the others wait a moment.
const EXCHANGES_PER_HOST_MAX: usize = 8;

/// Connections of all planes together, those that are ending included, at which no more are let in; from
/// half of it on an address has to prove itself. Ten times what a member of a mesh of 1,000 has. quinn-proto
/// 0.11.19 keeps a connection whose very first packet closes it until its idle time is over, which is
/// half an hour on the gossip plane: without this a stranger's packets would be memory without end.
const CONNECTIONS_MAX: usize = 8_192;

/// Attempts waiting for each plane's owner.
const QUEUE_LEN_MAX: usize = 256;
const CID_LEN: usize = 16;

/// What an endpoint is bound with.
#[derive(Clone)]
pub struct Limits {
    /// Kept by the data directory, the same after a restart: an agent that comes back on its port
    /// can then tell peers of its former self at once that those connections are gone.
    pub reset_secret: [u8; 32],
}

/// The port cannot be opened. Fault: the configuration, the system, or our credentials.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address is taken or is not ours.
    #[error("cannot bind udp {address}: {error}")]
    Socket {
        /// Where.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// The certificate or key is not usable.
    #[error(transparent)]
    Credentials(#[from] TlsError),
    /// TLS offers nothing that QUIC can use.
    #[error("no cipher suite for QUIC: {0}")]
    Cipher(#[from] NoInitialCipherSuite),
    /// Fault: the system.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
}

/// A connection could not be made. No byte of any stream has reached the peer's streams.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// Nobody answered in time. Fault: network or peer. Retry: on another member.
    #[error("no answer within {HANDSHAKE_TIME_MAX:?}")]
    Timeout,
    /// The handshake was refused, by them or by us. Fault: credentials. Retry: on another member.
    #[error("handshake refused: {reason}")]
    Refused {
        /// A fixed word.
        reason: &'static str,
    },
    /// The address cannot be dialled from this socket. Fault: configuration.
    #[error("cannot dial: {0}")]
    Connect(#[from] ConnectError),
}

impl DialError {
    /// A fixed word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Refused { reason } => reason,
            Self::Connect(_) => "unreachable",
        }
    }
}

/// An attempt to connect was refused, and counted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("handshake refused: {reason}")]
pub struct AcceptError {
    /// A fixed word.
    pub reason: &'static str,
}

/// Somebody who wants to connect. Dropping it refuses.
#[derive(Debug)]
pub struct Incoming {
    inner: quinn::Incoming,
    plane: Plane,
    place: Arc<Place>,
}

impl Incoming {
    /// Where it comes from.
    pub fn remote_address(&self) -> SocketAddr {
        self.inner.remote_address()
    }

    /// Its place at the door, which is otherwise free once the handshake has ended: for whoever does
    /// more for a stranger than that.
    pub(super) fn place(&self) -> Arc<Place> {
        Arc::clone(&self.place)
    }
}

/// Attempts to connect, for the owner of each plane. A dropped receiver closes its door.
#[derive(Debug)]
pub struct PlaneQueues {
    /// Members that want to gossip.
    pub gossip: mpsc::Receiver<Incoming>,
    /// Members that want our instances.
    pub data: mpsc::Receiver<Incoming>,
    /// Newcomers with a token.
    pub enrolment: mpsc::Receiver<Incoming>,
}

/// The UDP port. Cheap to clone; every clone is the same port.
#[derive(Clone)]
pub struct Endpoint {
    inner: quinn::Endpoint,
    address: SocketAddr,
    configs: Arc<ArcSwap<Configs>>,
    token_key: Arc<hkdf::Prk>,
    places: DoorPlaces,
    trust: Trust,
    standing: Standing,
    metrics: Metrics,
}

/// The places of each plane.
#[derive(Clone)]
struct DoorPlaces {
    gossip: Places,
    data: Places,
    enrolment: Places,
    renewal: Places,
}

impl DoorPlaces {
    fn new() -> Self {
        let of_members = || Places::new(HANDSHAKES_MAX, HANDSHAKES_PER_HOST_MAX);
        let of_exchanges = || Places::new(EXCHANGES_MAX, EXCHANGES_PER_HOST_MAX);
        Self {
            gossip: of_members(),
            data: of_members(),
            enrolment: of_exchanges(),
            renewal: of_exchanges(),
        }
    }

    fn of(&self, plane: Plane) -> &Places {
        match plane {
            Plane::Gossip => &self.gossip,
            Plane::Data => &self.data,
            Plane::Enrolment => &self.enrolment,
            Plane::Renewal => &self.renewal,
        }
    }

    /// Whether an address has to prove itself before it gets a place.
    fn ask_for_proof(&self, plane: Plane) -> bool {
        match plane {
            Plane::Gossip | Plane::Data => self.of(plane).taken() > RETRY_ABOVE,
            Plane::Enrolment | Plane::Renewal => true,
        }
    }
}

impl Endpoint {
    /// Binds the port on the current runtime, whose thread reads the socket from now on, and starts
    /// the task that sorts attempts by plane.
    pub fn bind(
        listen: SocketAddr,
        credentials: &NodeCredentials,
        limits: &Limits,
        metrics: &Metrics,
        tasks: &TaskGroup,
    ) -> Result<(Self, PlaneQueues), BindError> {
        let refused = |error| BindError::Socket { address: listen, error };
        let socket = socket::bind(listen).map_err(refused)?;
        let address = socket.local_addr().map_err(refused)?;
        let token_key = hkdf::Salt::new(hkdf::HKDF_SHA256, b"murmesh address tokens");
        let token_key = Arc::new(token_key.extract(&limits.reset_secret));
        let configs = Configs::new(credentials, &token_key)?;
        let inner = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(limits)?,
            Some(configs.data.server.as_ref().clone()),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(refused)?;
        let endpoint = Self {
            inner,
            address,
            configs: Arc::new(ArcSwap::from_pointee(configs)),
            token_key,
            places: DoorPlaces::new(),
            trust: credentials.trust().clone(),
            standing: Standing::default(),
            metrics: metrics.clone(),
        };
        let (doors, queues) = Doors::new();
        tasks.spawn("sort connections by plane", endpoint.clone().sort(doors));
        Ok((endpoint, queues))
    }

    /// The address bound, with the port that the system chose where none was asked for.
    pub fn local_address(&self) -> SocketAddr {
        self.address
    }

    /// Whom this port believes.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Whether others believe this member.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Notes that the member at `address` refused this one, if that is what ended a connection to it.
    pub(super) fn note_end(&self, address: SocketAddr, end: &ConnectionError) {
        if matches!(end, ConnectionError::ConnectionClosed(_)) && refusal(end) == Some(REVOKED) {
            self.standing.note_refused(address);
        }
    }

    /// Uses renewed credentials for every handshake from now on.
    pub fn set_credentials(&self, credentials: &NodeCredentials) -> Result<(), BindError> {
        self.configs.store(Arc::new(Configs::new(credentials, &self.token_key)?));
        Ok(())
    }

    /// Dials `address` on `plane`. The peer must prove to be `expected`, or any member when `None`.
    ///
    /// The connection is driven by the runtime that calls this. Cancel safe: dropping the future
    /// gives the dial up.
    ///
    /// In TLS 1.3 the dialler is done first: the peer may still refuse our certificate, which ends
    /// the connection with [`refusal`] before any of its streams is read.
    pub async fn connect(
        &self,
        plane: Plane,
        address: SocketAddr,
        expected: Option<MemberId>,
    ) -> Result<Connection, DialError> {
        let mut config = self.configs.load().of(plane).client.clone();
        config.transport_config(transport_config(plane, address));
        let name = server_name(expected.as_ref());
        let connecting = self.inner.connect_with(config, address, &name)?;
        match timeout(HANDSHAKE_TIME_MAX, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(ConnectionError::TimedOut)) | Err(_) => Err(DialError::Timeout),
            Ok(Err(error)) => {
                self.note_end(address, &error);
                Err(DialError::Refused { reason: dial_refusal(&error) })
            }
        }
    }

    /// Finishes the handshake of `incoming` on the runtime that calls this. Every refusal is
    /// counted. There is no peer on the enrolment plane.
    pub async fn accept(
        &self,
        incoming: Incoming,
    ) -> Result<(Connection, Option<Peer>), AcceptError> {
        let Incoming { inner, plane, place } = incoming;
        let address = inner.remote_address();
        let mut config = self.configs.load().of(plane).server.as_ref().clone();
        config.transport_config(transport_config(plane, address));
        let config = Arc::new(config);
        let handshake = async { inner.accept_with(config)?.await };
        let outcome = match timeout(HANDSHAKE_TIME_MAX, handshake).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err((accept_refusal(&error), error.to_string())),
            Err(_) => Err(("timeout", "no answer".to_owned())),
        };
        drop(place);
        let connection = outcome.map_err(|(reason, error)| {
            debug!(%address, ?plane, reason, error, "handshake refused");
            self.refuse(plane, reason)
        })?;
        match (peer_of(&connection), plane) {
            (None, Plane::Enrolment) => Ok((connection, None)),
            (Some(peer), _) => Ok((connection, Some(peer))),
            (None, _) => {
                connection.close(VarInt::from_u32(0), b"no certificate");
                Err(self.refuse(plane, "no_certificate"))
            }
        }
    }

    /// Closes every connection of every plane and takes no more.
    pub fn close(&self) {
        self.inner.close(VarInt::from_u32(0), b"closing");
    }

    /// Returns when every connection is gone, for at most `time`.
    pub async fn closed(&self, time: Duration) {
        let _ = timeout(time, self.inner.wait_idle()).await;
    }

    async fn sort(self, doors: Doors) {
        while let Some(incoming) = self.inner.accept().await {
            self.admit(incoming, &doors);
        }
    }

    fn admit(&self, incoming: quinn::Incoming, doors: &Doors) {
        let marker = incoming.orig_dst_cid().first().copied();
        let Some(plane) = marker.and_then(Plane::from_marker) else {
            self.refuse(Plane::Data, "unknown_plane");
            return incoming.refuse();
        };
        let open = self.inner.open_connections();
        if open >= CONNECTIONS_MAX {
            self.refuse(plane, "overload");
            return incoming.refuse();
        }
        let is_proven = incoming.remote_address_validated();
        let is_crowded = open >= CONNECTIONS_MAX / 2 || self.places.ask_for_proof(plane);
        if !is_proven && incoming.may_retry() && is_crowded {
            let _ = incoming.retry(); // fails only where may_retry() is false
            return;
        }
        let place = match self.places.of(plane).take(incoming.remote_address().ip()) {
            Ok(place) => Arc::new(place),
            Err(reason) => {
                self.refuse(plane, reason);
                return incoming.refuse();
            }
        };
        let attempt = Incoming { inner: incoming, plane, place };
        let (reason, attempt) = match doors.of(plane).try_send(attempt) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(attempt)) => ("overload", attempt),
            Err(mpsc::error::TrySendError::Closed(attempt)) => ("closed", attempt),
        };
        self.refuse(plane, reason);
        attempt.inner.refuse();
    }

    fn refuse(&self, plane: Plane, reason: &'static str) -> AcceptError {
        let door = match plane {
            Plane::Gossip | Plane::Data => Door::mesh,
            Plane::Enrolment | Plane::Renewal => Door::enrol,
        };
        self.metrics.count_refused(door, reason);
        AcceptError { reason }
    }
}

/// Application error code of a connection that was closed before any of its streams was read.
pub(super) const REFUSED: u32 = 1;

/// Why the peer refused our connection, if that is what ended it: then it has read none of our
/// streams.
pub fn refusal(error: &ConnectionError) -> Option<&'static str> {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            (close.error_code == VarInt::from_u32(REFUSED)).then_some("overload")
        }
        ConnectionError::ConnectionClosed(close) => alert_reason(u64::from(close.error_code)),
        _ => None,
    }
}

fn dial_refusal(error: &ConnectionError) -> &'static str {
    match error {
        ConnectionError::TransportError(error) => match u64::from(error.code) {
            BAD_CERTIFICATE => "wrong_member", // only a dialler expects a certain member
            code => alert_reason(code).unwrap_or("protocol"),
        },
        ConnectionError::ConnectionClosed(_) => refusal(error).unwrap_or("refused"),
        ConnectionError::VersionMismatch => "version",
        ConnectionError::Reset => "reset",
        _ => "closed",
    }
}

fn accept_refusal(error: &ConnectionError) -> &'static str {
    match error {
        ConnectionError::TransportError(error) => {
            alert_reason(u64::from(error.code)).unwrap_or("protocol")
        }
        ConnectionError::ConnectionClosed(close) => match u64::from(close.error_code) {
            BAD_CERTIFICATE => "wrong_member", // we are not whom they meant to reach
            code => alert_reason(code).unwrap_or("closed"),
        },
        ConnectionError::TimedOut => "timeout",
        ConnectionError::VersionMismatch => "version",
        _ => "closed",
    }
}

/// TLS alerts inside QUIC's range for them (RFC 9001, section 4.8).
const ALERTS: u64 = 0x100;
const BAD_CERTIFICATE: u64 = ALERTS + 42;

/// The certificate is that of a member that was dropped or replaced.
const REVOKED: &str = "revoked";

fn alert_reason(code: u64) -> Option<&'static str> {
    Some(match code.checked_sub(ALERTS)? {
        42 => "bad_certificate",
        44 => REVOKED,
        45 => "expired",
        46 => "bad_enrolment",
        48 => "unknown_issuer",
        49 => "denied",
        70 => "version",
        116 => "no_certificate",
        120 => "other_mesh",
        0..=255 => "protocol",
        _ => return None,
    })
}

fn endpoint_config(limits: &Limits) -> Result<EndpointConfig, EntropyError> {
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &limits.reset_secret);
    let tag = hmac::sign(&reset_key, b"murmesh connection ids");
    let cid_key = tag.as_ref().iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte));
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    // Ids of our former self must look like ours, or quinn drops their packets without a reset.
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(cid_key)));
    // The bound is within quinn's range of 1,200 to 65,527.
    let _ = config.max_udp_payload_size(PAYLOAD_LEN_MAX);
    config.rng_seed(Some(entropy::random_bytes()?));
    Ok(config)
}

struct Doors {
    gossip: mpsc::Sender<Incoming>,
    data: mpsc::Sender<Incoming>,
    enrolment: mpsc::Sender<Incoming>,
}

impl Doors {
    fn new() -> (Self, PlaneQueues) {
        let (gossip, gossip_queue) = mpsc::channel(QUEUE_LEN_MAX);
        let (data, data_queue) = mpsc::channel(QUEUE_LEN_MAX);
        let (enrolment, enrolment_queue) = mpsc::channel(QUEUE_LEN_MAX);
        let queues =
            PlaneQueues { gossip: gossip_queue, data: data_queue, enrolment: enrolment_queue };
        (Self { gossip, data, enrolment }, queues)
    }

    fn of(&self, plane: Plane) -> &mpsc::Sender<Incoming> {
        match plane {
            Plane::Gossip => &self.gossip,
            Plane::Data => &self.data,
            Plane::Enrolment | Plane::Renewal => &self.enrolment,
        }
    }
}

/// quinn's configuration of every plane, made once for each set of credentials. Sessions are
/// never resumed: trust is looked at in every handshake.
struct Configs {
    gossip: PlaneConfig,
    data: PlaneConfig,
    enrolment: PlaneConfig,
    renewal: PlaneConfig,
}

struct PlaneConfig {
    server: Arc<ServerConfig>,
    client: ClientConfig,
}

impl Configs {
    fn new(credentials: &NodeCredentials, token_key: &Arc<hkdf::Prk>) -> Result<Self, BindError> {
        Ok(Self {
            gossip: PlaneConfig::new(Plane::Gossip, credentials, token_key)?,
            data: PlaneConfig::new(Plane::Data, credentials, token_key)?,
            enrolment: PlaneConfig::new(Plane::Enrolment, credentials, token_key)?,
            renewal: PlaneConfig::new(Plane::Renewal, credentials, token_key)?,
        })
    }

    fn of(&self, plane: Plane) -> &PlaneConfig {
        match plane {
            Plane::Gossip => &self.gossip,
            Plane::Data => &self.data,
            Plane::Enrolment => &self.enrolment,
            Plane::Renewal => &self.renewal,
        }
    }
}

impl PlaneConfig {
    fn new(
        plane: Plane,
        credentials: &NodeCredentials,
        token_key: &Arc<hkdf::Prk>,
    ) -> Result<Self, BindError> {
        let crypto = QuicServerConfig::try_from(credentials.server_config(plane)?)?;
        // One token key for all planes: quinn checks address tokens before it knows the plane.
        let mut server = ServerConfig::new(Arc::new(crypto), Arc::<hkdf::Prk>::clone(token_key));
        server
            .time_source(Arc::new(MachineClock))
            .max_incoming(HANDSHAKES_MAX)
            .incoming_buffer_size(64 * 1024)
            .incoming_buffer_size_total(16 * 1024 * 1024);
        let client = client_config(plane, credentials.client_config(plane)?)?;
        Ok(Self { server: Arc::new(server), client })
    }
}

/// What quinn dates address tokens by: the machine's clock, which may be a simulated one.
struct MachineClock;

impl TimeSource for MachineClock {
    fn now(&self) -> SystemTime {
        UNIX_EPOCH + clock::unix_time()
    }
}

/// quinn's configuration to dial on `plane` with `tls`.
pub(super) fn client_config(
    plane: Plane,
    tls: rustls::ClientConfig,
) -> Result<ClientConfig, NoInitialCipherSuite> {
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
    config.initial_dst_cid_provider(Arc::new(move || marked_id(plane)));
    Ok(config)
}

/// A random connection id that names its plane.
fn marked_id(plane: Plane) -> ConnectionId {
    let random = RandomConnectionIdGenerator::new(CID_LEN).generate_cid();
    let mut bytes = [plane.marker(); CID_LEN];
    bytes[1..].copy_from_slice(&random[1..]);
    ConnectionId::new(&bytes)
}
