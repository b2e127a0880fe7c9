//! What a connection of each plane may use. Every window is finite.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{MtuDiscoveryConfig, TransportConfig, VarInt};

use super::path::{self, PAYLOAD_LEN_MAX};
use crate::tls::Plane;

/// Stream window of the data plane, S: what one stream may have in flight or unread.
pub(super) const STREAM_WINDOW: u32 = 256 * 1024;
/// Streams that a peer may have open on a new data connection. quinn reserves an entry for each on
/// both sides (100,000 cost 5.4 MB a connection), so it is raised for peers that use it.
pub(super) const STREAMS_AT_START: u32 = 100;
/// How long a data connection may hear nothing, for quinn. Both ends watch their connections and
/// close them sooner ([`SILENCE_MAX`](super::silence::SILENCE_MAX)); so this must be longer.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// How long a data connection may hear nothing before it says something. Whoever is first is
/// answered, so that a connection at rest costs two packets of about 40 bytes in this time.
pub(super) const KEEP_ALIVE: Duration = Duration::from_millis(200);

/// Most unacknowledged bytes of one data connection that we buffer to send.
const SEND_WINDOW: u64 = 16 * 1024 * 1024;
/// quinn's default of 333 ms would repeat a lost first packet after a second.
const RTT_GUESS: Duration = Duration::from_millis(100);
const KIB: u32 = 1024;

/// Connection credit C for `streams` streams: at least N x S, so that a stalled stream never takes
/// a neighbour's credit; a quarter more, because new credit is told only once an eighth is used.
pub(super) const fn credit_for(streams: u32) -> u64 {
    streams as u64 * STREAM_WINDOW as u64 / 4 * 5
}

/// The transport settings of a connection with `peer` on `plane`.
pub(super) fn transport_config(plane: Plane, peer: SocketAddr) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config.initial_rtt(RTT_GUESS);
    match plane {
        Plane::Gossip => gossip(&mut config),
        Plane::Data => data(&mut config, path::payload_len_max(peer)),
        Plane::Enrolment | Plane::Renewal => enrolment(&mut config),
    }
    Arc::new(config)
}

/// Datagrams and a few repair streams, on connections that rest for long: no keep-alive, and no MTU
/// probes, which would be most of their bytes.
fn gossip(config: &mut TransportConfig) {
    config
        .initial_mtu(1_200)
        .mtu_discovery_config(None)
        .max_idle_timeout(idle(Duration::from_secs(30 * 60)))
        .keep_alive_interval(None)
        .max_concurrent_bidi_streams(VarInt::from_u32(16))
        .max_concurrent_uni_streams(VarInt::from_u32(64))
        .stream_receive_window(VarInt::from_u32(256 * KIB))
        .receive_window(VarInt::from_u32(4 * 1024 * KIB))
        .send_window(4 * 1024 * 1024)
        .datagram_receive_buffer_size(Some(64 * 1024))
        .datagram_send_buffer_size(64 * 1024);
}

fn data(config: &mut TransportConfig, payload_len_max: u16) {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(payload_len_max);
    config
        .mtu_discovery_config(Some(discovery))
        // Several segments in one call are worth it where a call takes several.
        .enable_segmentation_offload(payload_len_max <= PAYLOAD_LEN_MAX / 2)
        .max_idle_timeout(idle(IDLE_MAX))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_AT_START))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(window(credit_for(STREAMS_AT_START)))
        .send_window(SEND_WINDOW)
        // A word a second on how busy instances are.
        .datagram_receive_buffer_size(Some(8 * 1024))
        .datagram_send_buffer_size(8 * 1024);
}

/// One question, one answer; whoever comes to the enrolment door has proved nothing yet.
fn enrolment(config: &mut TransportConfig) {
    config
        .initial_mtu(1_200)
        .mtu_discovery_config(None)
        .max_idle_timeout(idle(Duration::from_secs(5)))
        .keep_alive_interval(None)
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(16 * KIB))
        .receive_window(VarInt::from_u32(16 * KIB))
        .send_window(u64::from(256 * KIB))
        .datagram_receive_buffer_size(None);
}

/// A window as quinn takes it; above 2^62 there is none.
pub(super) fn window(bytes: u64) -> VarInt {
    VarInt::from_u64(bytes).unwrap_or(VarInt::MAX)
}

fn idle(time: Duration) -> Option<quinn::IdleTimeout> {
    let millis = u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    Some(VarInt::from_u32(millis).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_covers_every_granted_stream_before_the_next_update_is_sent() {
        for streams in [1, STREAMS_AT_START, 16_384] {
            let (credit, needed) =
                (credit_for(streams), u64::from(streams) * u64::from(STREAM_WINDOW));
            assert!(credit - credit / 8 >= needed, "{streams}");
        }
    }
}
