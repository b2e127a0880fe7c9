//! What is wrong between here and an address where nobody answers.
//!
//! A firewall that drops UDP looks like a dead agent, and so does an agent that was never started.
//! Two questions tell them apart: a datagram in a version of QUIC that nobody speaks, which every
//! agent answers with those that it does (RFC 9000, 6.1) and a host without a listener with ICMP; and
//! a TCP connection to the same port, which a host that lives accepts or refuses.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::machine;

/// How long both questions wait: some round trips around the world.
const WAIT: Duration = Duration::from_millis(1_500);

/// What stands between here and a UDP port that does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Nothing: something answers there on UDP.
    None,
    /// The host says that nobody listens there.
    NoListener,
    /// The host lives, and datagrams to the port vanish.
    Blocked,
    /// Nothing comes back, neither by UDP nor by TCP.
    Silent,
    /// This machine has no way there.
    NoRoute,
}

/// Finds out why `address` does not answer on UDP. Takes 1.5 s at most. Cancel safe.
pub async fn obstacle(address: SocketAddr) -> Obstacle {
    if machine::simulated().is_some() {
        return Obstacle::Silent; // a simulated network has no ICMP
    }
    let (udp, is_alive) = tokio::join!(datagram(address), is_alive(address));
    match udp.map_err(|error| error.kind()) {
        Ok(true) => Obstacle::None,
        Err(ErrorKind::ConnectionRefused) => Obstacle::NoListener,
        _ if is_alive => Obstacle::Blocked,
        Err(ErrorKind::NetworkUnreachable) => Obstacle::NoRoute,
        _ => Obstacle::Silent,
    }
}

/// Whether something answers. An error is what the host, or this one, says about datagrams.
async fn datagram(address: SocketAddr) -> io::Result<bool> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(address).await?;
    socket.send(&question()).await?;
    match timeout(WAIT, socket.recv(&mut [0; 64])).await {
        Ok(answer) => answer.map(|_| true),
        Err(_) => Ok(false),
    }
}

/// A long header with a version that is reserved to be unknown, two ids of 8 bytes, and padding: what
/// is shorter than 1,200 bytes is not answered.
fn question() -> [u8; 1_200] {
    let mut packet = [0; 1_200];
    packet[..6].copy_from_slice(&[0xc0, 0x0a, 0x1a, 0x2a, 0x3a, 8]);
    packet[14] = 8;
    packet
}

async fn is_alive(address: SocketAddr) -> bool {
    match timeout(WAIT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() == ErrorKind::ConnectionRefused,
        Err(_) => false,
    }
}

impl Obstacle {
    /// What to do about it, where `address` does not answer.
    pub fn remedy(self, address: SocketAddr) -> String {
        let port = address.port();
        match self {
            Self::None => "murmesh events --since 5m, on both machines".to_owned(),
            Self::NoListener => format!("start 'murmesh agent' on {}", address.ip()),
            Self::Blocked => {
                format!("open {port}/udp to {} in every firewall between", address.ip())
            }
            Self::Silent => {
                format!("is {} up? its {port}/udp must be open from here", address.ip())
            }
            Self::NoRoute => format!("a route to {}, for instance a default route", address.ip()),
        }
    }
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "something answers on UDP, but not as a member of this mesh",
            Self::NoListener => "the host lives, but nothing listens on that UDP port",
            Self::Blocked => "the host lives (TCP reaches it), but UDP to that port is dropped",
            Self::Silent => "nothing answers there, neither on UDP nor on TCP",
            Self::NoRoute => "this machine has no route there",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_without_a_listener_is_told_from_one_that_swallows_all() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = silent.local_addr().unwrap();
        assert_eq!(obstacle(at).await, Obstacle::Blocked, "loopback refuses TCP there");
        drop(silent);
        assert_eq!(obstacle(at).await, Obstacle::NoListener);
    }
}
