//! Who calls, said to an instance before anything else: PROXY protocol v2, for instances that ask for
//! it.
//!
//! The connection belongs to one caller's agent for as long as it lives, also where it carries one
//! request after the other: what is said once holds for all of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_header::{ProxiedAddress, ProxyHeader, Tlv};
use serde::{Deserialize, Serialize};

use crate::model::{MemberId, MemberName, ServiceName, Target};

/// The caller's name, in the range that the protocol leaves to everybody.
const TLV_MEMBER_NAME: u8 = 0xe0;
/// The caller's member id, in hexadecimal digits.
const TLV_MEMBER_ID: u8 = 0xe1;

/// In which form an instance is told who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProxyProtocol {
    /// The binary one.
    #[serde(rename = "v2")]
    V2,
}

/// Whose agent calls, as its certificate proves.
#[derive(Clone, Debug)]
pub(super) struct CalledBy {
    pub(super) id: MemberId,
    pub(super) name: MemberName,
    /// Its UDP port, as seen from here.
    pub(super) address: SocketAddr,
}

/// What an instance at `to` hears first. Without a caller it is this agent itself that connects.
pub(super) fn v2(caller: Option<&CalledBy>, service: &ServiceName, to: &Target) -> Option<Vec<u8>> {
    let header = match caller {
        None => ProxyHeader::with_local(),
        Some(CalledBy { id, name, address }) => {
            let to = match to {
                Target::Tcp(to) => *to,
                Target::Unix(_) => SocketAddr::new(nowhere(address), 0),
            };
            let (from, to) = same_family(*address, to);
            let id = id.to_string();
            let tlvs = [
                Tlv::Authority(service.as_str().into()),
                Tlv::Custom(TLV_MEMBER_NAME, name.as_str().as_bytes().into()),
                Tlv::Custom(TLV_MEMBER_ID, id.as_bytes().into()),
            ];
            ProxyHeader::with_tlvs(Some(ProxiedAddress::stream(from, to)), tlvs)
        }
    };
    let mut bytes = Vec::new();
    header.encode_v2(&mut bytes).ok()?;
    Some(bytes)
}

fn nowhere(beside: &SocketAddr) -> IpAddr {
    match beside.ip() {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The protocol has room for two addresses of one family.
fn same_family(from: SocketAddr, to: SocketAddr) -> (SocketAddr, SocketAddr) {
    if from.is_ipv4() == to.is_ipv4() {
        return (from, to);
    }
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    (mapped(from), mapped(to))
}

#[cfg(test)]
mod tests {
    use proxy_header::ParseConfig;

    use super::*;

    #[test]
    fn what_is_said_is_read_back_by_whatever_address_a_caller_has() {
        for (address, to, from, at) in [
            ("10.0.0.1:7370", "127.0.0.1:80", "10.0.0.1:7370", "127.0.0.1:80"),
            ("[fd00::1]:7370", "127.0.0.1:80", "[fd00::1]:7370", "[::ffff:127.0.0.1]:80"),
            ("10.0.0.1:7370", "[::1]:80", "[::ffff:10.0.0.1]:7370", "[::1]:80"),
            ("10.0.0.1:7370", "unix:/run/a.sock", "10.0.0.1:7370", "0.0.0.0:0"),
        ] {
            let caller = CalledBy {
                id: MemberId::from_bytes([7; 16]),
                name: "near".parse().unwrap(),
                address: address.parse().unwrap(),
            };
            let said = v2(Some(&caller), &"web".parse().unwrap(), &to.parse().unwrap()).unwrap();
            let (header, len) = ProxyHeader::parse(&said, ParseConfig::default()).unwrap();
            assert_eq!(len, said.len());
            let told = header.proxied_address().unwrap();
            assert_eq!(
                (told.source, told.destination),
                (from.parse().unwrap(), at.parse().unwrap())
            );
            assert_eq!(header.authority(), Some("web"));
            let tlvs: Vec<_> = header.tlvs().map(Result::unwrap).collect();
            assert!(tlvs.contains(&Tlv::Custom(0xe0, b"near".into())), "{tlvs:?}");
            assert!(tlvs.contains(&Tlv::Custom(0xe1, "07".repeat(16).as_bytes().into())));
        }
    }
}
