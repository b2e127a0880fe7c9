//! What this machine is called and where others reach it, when nobody says.

use std::net::{SocketAddr, UdpSocket};

use crate::model::MemberName;

/// The address that others reach a socket bound to `bound` at: its own, or that of the default
/// route. `None` when this machine has neither.
///
/// Connecting a UDP socket sends no packet; it only makes the kernel choose the source address.
pub fn default_advertise(bound: SocketAddr) -> Option<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return Some(bound);
    }
    let documentation: [(&str, &str); 2] =
        [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")]; // RFC 5737, RFC 3849
    let routed = documentation.iter().find_map(|(any, far)| {
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(far).ok()?;
        socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_unspecified())
    });
    routed.map(|ip| SocketAddr::new(ip, bound.port()))
}

/// The hostname as a member's name: small letters, what is not allowed becomes a dash; `node` when
/// nothing is left.
pub fn hostname() -> MemberName {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    sanitised(&name).unwrap_or_else(fallback)
}

fn sanitised(hostname: &str) -> Option<MemberName> {
    let label = hostname.split('.').next().unwrap_or_default();
    let dashed = label.chars().map(|c| match c.to_ascii_lowercase() {
        c if c.is_ascii_lowercase() || c.is_ascii_digit() => c,
        _ => '-',
    });
    let dashed: String = dashed.take(63).collect();
    MemberName::try_new(dashed.trim_matches('-')).ok()
}

#[allow(clippy::expect_used)] // four letters are a name
fn fallback() -> MemberName {
    MemberName::try_new("node").expect("'node' is 1 to 63 of a-z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostnames_become_names() {
        for (hostname, name) in
            [("Build_Box.example.com", "build-box"), ("web1", "web1"), ("-x-", "x"), ("a.b", "a")]
        {
            assert_eq!(sanitised(hostname).unwrap().as_str(), name);
        }
        assert_eq!(sanitised("___"), None);
        assert!(!hostname().as_str().is_empty());
    }

    #[test]
    fn a_bound_address_is_advertised_as_it_is() {
        let bound = "127.0.0.1:9".parse().unwrap();
        assert_eq!(default_advertise(bound), Some(bound));
    }
}
