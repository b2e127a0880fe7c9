//! One UDP port, QUIC, mutual TLS: the socket, its three planes, tunnels, the gossip driver.

mod accepted;
mod credit;
mod endpoint;
pub mod enrolment;
pub mod gossip;
mod path;
mod peers;
mod places;
mod planes;
mod revoker;
mod silence;
mod socket;
mod standing;
pub mod tunnel;

pub use accepted::Accepted;
pub use endpoint::{
    AcceptError, BindError, DialError, Endpoint, HANDSHAKE_TIME_MAX, HANDSHAKES_MAX, Incoming,
    Limits, PlaneQueues, RETRY_ABOVE, refusal,
};
pub use peers::{Link, LinkView, Peers};
pub use revoker::Revoker;
pub use socket::BUFFER_LEN as SOCKET_BUFFER_LEN;
pub use standing::Standing;
