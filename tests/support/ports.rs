//! Ports that nothing uses.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::{Mutex, PoisonError};

static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// Below Linux's range for outgoing connections (32768 and up), so that a test's own thousands of
/// connections never sit on a port that was promised to a listener.
const RANGE: std::ops::Range<u16> = 10_000..32_000;

/// A port free for TCP and UDP on loopback, never given twice by this process.
pub fn free_port() -> u16 {
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    // Processes start at different places, so that two test runs on one machine rarely meet.
    let start = std::process::id() as usize * 7_919 % RANGE.len();
    for port in RANGE.cycle().skip(start).take(RANGE.len()) {
        if given.contains(&port) {
            continue;
        }
        let at = (Ipv4Addr::LOCALHOST, port);
        if TcpListener::bind(at).is_ok() && UdpSocket::bind(at).is_ok() {
            given.insert(port);
            return port;
        }
    }
    panic!("no free port in {RANGE:?}");
}

/// A free loopback address.
pub fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}
