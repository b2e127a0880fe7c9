//! The one UDP socket: buffers, and the limits that keep large datagrams sound.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::{info, warn};

use crate::runtime::{entropy, machine};

/// Largest UDP payload that we send or accept: what a jumbo frame of 9,000 bytes carries. Loopback
/// and jumbo links then move 2.1 times the bytes of 1,452-byte datagrams; MTU discovery finds what
/// the path takes.
pub(super) const PAYLOAD_LEN_MAX: u16 = 8_972;

/// Longest datagram that the kernel takes in one call, segments together (IPv4).
const SEND_LEN_MAX: usize = 65_507;
/// Longest datagram that the kernel hands out in one call, segments together.
const RECEIVE_LEN_MAX: usize = 65_535;
/// Asked for in each direction; the system's 208 KiB drop bursts.
pub const BUFFER_LEN: usize = 4 * 1024 * 1024;

/// Most pieces that [`spread`] makes of what one call received.
const PIECES_MAX: usize = 8;

/// An endpoint that only dials, bound to `any` address.
pub(super) fn client(any: SocketAddr) -> io::Result<Endpoint> {
    let (mut config, runtime) = (EndpointConfig::default(), Arc::new(TokioRuntime));
    config.rng_seed(Some(entropy::random_bytes().map_err(io::Error::other)?));
    Endpoint::new_with_abstract_socket(config, None, bind(any)?, runtime)
}

/// Binds `listen` and registers it with the current tokio runtime.
pub(super) fn bind(listen: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    if let Some(machine) = machine::simulated() {
        let inner = machine.bind_udp(listen)?;
        return Ok(Arc::new(CappedSocket { inner }));
    }
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
    if listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    for (buffer, set) in [
        ("receive", socket.set_recv_buffer_size(BUFFER_LEN)),
        ("send", socket.set_send_buffer_size(BUFFER_LEN)),
    ] {
        if let Err(error) = set {
            warn!(buffer, %error, "cannot enlarge a socket buffer");
        }
    }
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    // The kernel reports twice what it lets payload use.
    let (receive, send) = (socket.recv_buffer_size()? / 2, socket.send_buffer_size()? / 2);
    let inner = TokioRuntime.wrap_udp_socket(socket.into())?;
    let (gso, gro) = (inner.max_transmit_segments(), inner.max_receive_segments());
    info!(%listen, receive, send, gso, gro, "udp socket bound, buffers granted in bytes");
    if receive < BUFFER_LEN || send < BUFFER_LEN {
        warn!(
            receive,
            send,
            wanted = BUFFER_LEN,
            "small socket buffers: raise net.core.rmem_max and wmem_max"
        );
    }
    Ok(Arc::new(CappedSocket { inner }))
}

/// Keeps what is sent and received in one call below 64 KiB.
///
/// quinn sends up to ten segments of the path's MTU in one call. Above 6,550 bytes that is more
/// than a datagram may have: the kernel refuses it, quinn takes that for a black hole and falls
/// back to 1,200 bytes. And it makes receive buffers of payload times segments; a few segments are
/// enough to hold the most that the kernel ever joins.
#[derive(Debug)]
struct CappedSocket {
    inner: Arc<dyn AsyncUdpSocket>,
}

/// Gives the datagrams of each of `batches` buffers of their own, in order, and counts those.
///
/// quinn copies each buffer it is given into one allocation, and its frames are slices of that: one
/// frame that waits for a stalled reader keeps all of it. The kernel joins up to 64 KiB of
/// datagrams, of which neighbours have long read theirs; 500 stalled readers held 645 MiB that way.
///
/// `batches` are the last of the buffers, at most one for every [`PIECES_MAX`]: pieces then never
/// reach a batch that was not read yet.
fn spread(buffers: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta], batches: Range<usize>) -> usize {
    let mut filled = 0;
    for batch in batches {
        let meta = metas[batch];
        let datagrams = meta.len.div_ceil(meta.stride.max(1));
        let piece_len = datagrams.div_ceil(PIECES_MAX) * meta.stride;
        let mut start = 0;
        while start < meta.len {
            let piece = start..(start + piece_len).min(meta.len);
            start = piece.end;
            metas[filled] = RecvMeta { len: piece.len(), ..meta };
            if filled == batch {
                buffers[batch].copy_within(piece, 0);
            } else {
                let (free, read) = buffers.split_at_mut(batch);
                free[filled][..piece.len()].copy_from_slice(&read[0][piece]);
            }
            filled += 1;
        }
    }
    filled
}

impl AsyncUdpSocket for CappedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        // A platform that receives one datagram per call joins none.
        if buffers.len() < PIECES_MAX {
            return self.inner.poll_recv(cx, buffers, metas);
        }
        let first = buffers.len() - buffers.len() / PIECES_MAX;
        let batches = ready!(self.inner.poll_recv(cx, &mut buffers[first..], &mut metas[first..]))?;
        Poll::Ready(Ok(spread(buffers, metas, first..first + batches)))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(SEND_LEN_MAX / usize::from(PAYLOAD_LEN_MAX))
    }

    fn max_receive_segments(&self) -> usize {
        let enough = RECEIVE_LEN_MAX.div_ceil(usize::from(PAYLOAD_LEN_MAX));
        self.inner.max_receive_segments().min(enough)
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Batches as the kernel joins them: datagrams of one length, the last at most as long.
        #[test]
        fn every_datagram_is_kept_in_order_and_shares_its_buffer_with_few(
            batches in prop::collection::vec((1_usize..64, 1_usize..1_500, 1_usize..1_500), 0..=4),
        ) {
            const BUFFERS: usize = 32;
            let mut space = vec![[0; 96 * 1024]; BUFFERS];
            let mut buffers: Vec<_> = space.iter_mut().map(|b| IoSliceMut::new(b)).collect();
            let mut metas = vec![RecvMeta::default(); BUFFERS];
            let first = BUFFERS - BUFFERS / PIECES_MAX;
            let (mut sent, mut number) = (Vec::new(), 0_u8);
            for (at, &(count, stride, last)) in batches.iter().enumerate() {
                let mut joined = Vec::new();
                for datagram in 1..=count {
                    number = number.wrapping_add(1);
                    let len = if datagram == count { last.min(stride) } else { stride };
                    let bytes = vec![number; len];
                    joined.extend_from_slice(&bytes);
                    sent.push(bytes);
                }
                buffers[first + at][..joined.len()].copy_from_slice(&joined);
                metas[first + at] = RecvMeta { len: joined.len(), stride, ..RecvMeta::default() };
            }
            let pieces = spread(&mut buffers, &mut metas, first..first + batches.len());
            let received: Vec<_> = metas[..pieces]
                .iter()
                .zip(&buffers)
                .flat_map(|(meta, buffer)| buffer[..meta.len].chunks(meta.stride))
                .collect();
            prop_assert_eq!(received, sent);
            let few = |meta: &RecvMeta| meta.len <= 64_usize.div_ceil(PIECES_MAX) * meta.stride;
            prop_assert!(metas[..pieces].iter().all(few));
        }
    }
}
