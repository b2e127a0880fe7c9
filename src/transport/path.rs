//! How long a datagram to a peer may be, as far as this machine knows.
//!
//! Bytes per datagram are the one lever of bulk: every datagram costs its headers, a seal and a way
//! through the kernel. What an interface cannot carry is not worth probing for, and what it can is
//! worth a lot: loopback takes 64 KiB, a jumbo link 9,000 bytes, the rest of the world 1,500.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use crate::runtime::machine;

/// Largest UDP payload that we send or accept.
pub(super) const PAYLOAD_LEN_MAX: u16 = 65_507;
/// Of a path whose interface nobody can tell: Ethernet less the longest headers.
const PAYLOAD_LEN_GUESS: u16 = 1_452;
/// What every path of QUIC carries (RFC 9000, section 14).
const PAYLOAD_LEN_MIN: u16 = 1_200;

const UDP_HEADER_LEN: u32 = 8;

/// The largest UDP payload that the interface towards `peer` carries; the path behind it may carry
/// less.
pub(super) fn payload_len_max(peer: SocketAddr) -> u16 {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let ip_header_len = if peer.is_ipv4() { 20 } else { 40 };
    let Some(mtu) = mtu(peer) else { return PAYLOAD_LEN_GUESS };
    let payload_len = mtu.saturating_sub(ip_header_len + UDP_HEADER_LEN);
    u16::try_from(payload_len).unwrap_or(u16::MAX).clamp(PAYLOAD_LEN_MIN, PAYLOAD_LEN_MAX)
}

/// What the kernel's route to `peer` says. Sends nothing.
#[cfg(target_os = "linux")]
fn mtu(peer: SocketAddr) -> Option<u32> {
    if machine::simulated().is_some() {
        return None;
    }
    let any: IpAddr = match peer {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(peer).ok()?;
    match peer {
        SocketAddr::V4(_) => rustix::net::sockopt::ip_mtu(&socket).ok(),
        SocketAddr::V6(_) => rustix::net::sockopt::ipv6_mtu(&socket).ok(),
    }
}

#[cfg(not(target_os = "linux"))]
fn mtu(_: SocketAddr) -> Option<u32> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_carries_the_longest_datagrams_in_both_families() {
        let mtu: u32 =
            std::fs::read_to_string("/sys/class/net/lo/mtu").unwrap().trim().parse().unwrap();
        for (peer, headers) in [("127.0.0.1:7", 28), ("[::ffff:127.0.0.1]:7", 28), ("[::1]:7", 48)]
        {
            let expected = (mtu - headers).min(u32::from(PAYLOAD_LEN_MAX));
            assert_eq!(u32::from(payload_len_max(peer.parse().unwrap())), expected, "{peer}");
        }
    }

    #[test]
    fn nothing_is_promised_where_no_route_leads() {
        // Class E: reserved, and refused by the kernel.
        assert_eq!(payload_len_max("255.255.255.255:7".parse().unwrap()), PAYLOAD_LEN_GUESS);
    }
}
