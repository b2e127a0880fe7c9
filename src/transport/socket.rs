//! The one UDP socket: its buffers, and how datagrams go in and out of the kernel.

use std::fmt;
use std::io::{self, ErrorKind, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{info, warn};

use super::path::PAYLOAD_LEN_MAX;
use crate::runtime::{entropy, machine, polling};

/// Longest that the kernel takes or hands out in one call, segments together.
const CALL_LEN_MAX: usize = PAYLOAD_LEN_MAX as usize;
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
        return machine.bind_udp(listen);
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
    let state = UdpSocketState::new((&socket).into())?;
    let (gso, gro) = (state.max_gso_segments(), state.gro_segments());
    info!(%listen, receive, send, gso, gro, "udp socket bound, buffers granted in bytes");
    if receive < BUFFER_LEN || send < BUFFER_LEN {
        warn!(
            receive,
            send,
            wanted = BUFFER_LEN,
            "small socket buffers: raise net.core.rmem_max and wmem_max"
        );
    }
    let io = watch(socket, Interest::READABLE)?;
    Ok(Arc::new(Port { io, state, full: Mutex::default() }))
}

/// Asks the current tokio runtime to hear of one direction only.
#[expect(
    deprecated,
    reason = "its successor is unsafe: a type may lie about what it owns, a Socket does not"
)]
fn watch(socket: Socket, interest: Interest) -> io::Result<AsyncFd<Socket>> {
    AsyncFd::with_interest(socket, interest)
}

/// The port. Beside quinn's own it keeps four things in mind:
///
/// - quinn hands over ten segments of the path's MTU; above 6,550 bytes the kernel takes fewer in one
///   call, and quinn would take the refusal for a black hole and fall back to 1,200 bytes.
/// - A call that brings less than it could has emptied the socket: asking again is a call for nothing,
///   one for each message where there is one at a time.
/// - Frames are slices of what one call received ([`spread`]).
/// - Whoever asks the kernel to hear that a socket can be written hears it each time that a datagram has
///   left it, and is woken for that: it is asked only after a write that found no room.
#[derive(Debug)]
struct Port {
    /// Asked whether it can be read.
    io: AsyncFd<Socket>,
    state: UdpSocketState,
    /// The same socket, asked whether it can be written, from a write that found no room until there
    /// is some.
    full: Mutex<Option<Arc<AsyncFd<Socket>>>>,
}

impl Port {
    fn send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.state.send(self.io.get_ref().into(), transmit);
        if matches!(&sent, Err(error) if error.kind() == ErrorKind::WouldBlock) {
            let mut full = self.full.lock();
            if full.is_none() {
                let socket = self.io.get_ref().try_clone()?;
                *full = Some(Arc::new(watch(socket, Interest::WRITABLE)?));
            }
        }
        sent
    }

    /// Waits until there is room in `full`, which was found without.
    async fn room(&self, full: Arc<AsyncFd<Socket>>) -> io::Result<()> {
        let outcome = full.writable().await.map(drop);
        let mut last = self.full.lock();
        if last.as_ref().is_some_and(|last| Arc::ptr_eq(last, &full)) {
            *last = None;
        }
        outcome
    }
}

impl AsyncUdpSocket for Port {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable { port: self, waiting: None })
    }

    /// Of more than one call's worth what follows the first call may be lost, as on any network.
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(segment_len) = transmit.segment_size else { return self.send(transmit) };
        let mut calls = transmit.contents.chunks(CALL_LEN_MAX / segment_len * segment_len);
        let part = |contents| Transmit { contents, ..transmit.clone() };
        calls.next().map_or(Ok(()), |first| self.send(&part(first)))?;
        for contents in calls {
            let _ = self.send(&part(contents)); // a full buffer: quinn repeats it, as what a router lost
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        // A platform that receives one datagram per call joins none.
        let can_join = buffers.len() >= PIECES_MAX;
        let batches_max = if can_join { buffers.len() / PIECES_MAX } else { buffers.len() };
        loop {
            let mut ready = ready!(self.io.poll_read_ready(cx))?;
            let mut received = None;
            let outcome = ready.try_io(|io| {
                let (buffers, metas) = (&mut buffers[..batches_max], &mut metas[..batches_max]);
                let batches = self.state.recv(io.get_ref().into(), buffers, metas)?;
                received = Some(batches);
                // Said inside, where no readiness that comes meanwhile is forgotten.
                if batches < batches_max { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
            });
            if let Some(batches) = received {
                polling::note_arrival(metas[..batches].iter().map(|meta| meta.len).sum());
            }
            match (received, outcome) {
                (Some(batches), _) if can_join => {
                    return Poll::Ready(Ok(spread(buffers, metas, batches)));
                }
                (Some(batches), _) => return Poll::Ready(Ok(batches)),
                (None, Ok(Err(error))) => return Poll::Ready(Err(error)),
                (None, _) => {} // nothing was there
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        let address = self.io.get_ref().local_addr()?;
        address.as_socket().ok_or(ErrorKind::AddrNotAvailable.into())
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    /// quinn makes receive buffers of the longest payload times this, and one of them holds the most
    /// that the kernel ever joins.
    fn max_receive_segments(&self) -> usize {
        1
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

/// Waits until the port takes more; one of many that may wait.
struct Writable {
    port: Arc<Port>,
    waiting: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl fmt::Debug for Writable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writable")
    }
}

impl UdpPoller for Writable {
    fn poll_writable(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = match self.waiting.take() {
            Some(waiting) => waiting,
            None => {
                let Some(full) = self.port.full.lock().clone() else { return Poll::Ready(Ok(())) };
                let port = Arc::clone(&self.port);
                Box::pin(async move { port.room(full).await })
            }
        };
        let room = waiting.as_mut().poll(cx);
        if room.is_pending() {
            self.waiting = Some(waiting);
        }
        room
    }
}

/// Gives the datagrams of each of the first `batches` buffers of their own, in order, and counts
/// those.
///
/// quinn copies each buffer it is given into one allocation, and its frames are slices of that: one
/// frame that waits for a stalled reader keeps all of it. The kernel joins up to 64 KiB of
/// datagrams, of which neighbours have long read theirs; 500 stalled readers held 645 MiB that way.
///
/// There is a buffer for [`PIECES_MAX`] pieces of every batch.
fn spread(buffers: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta], batches: usize) -> usize {
    let piece_len = |meta: &RecvMeta| {
        let datagrams = meta.len.div_ceil(meta.stride.max(1));
        (datagrams.div_ceil(PIECES_MAX) * meta.stride).max(1)
    };
    let pieces = |meta: &RecvMeta| meta.len.div_ceil(piece_len(meta)).max(1);
    let filled = metas[..batches].iter().map(pieces).sum();
    // From the last to the first: a piece never comes to lie before its batch, so that none is
    // written over before it was moved. The most frequent batch, one datagram, stays where it is.
    let mut slot = filled;
    for batch in (0..batches).rev() {
        let (meta, piece_len) = (metas[batch], piece_len(&metas[batch]));
        for piece in (0..pieces(&meta)).rev() {
            slot -= 1;
            let piece = piece * piece_len..((piece + 1) * piece_len).min(meta.len);
            metas[slot] = RecvMeta { len: piece.len(), ..meta };
            if slot > batch {
                let (before, after) = buffers.split_at_mut(slot);
                after[0][..piece.len()].copy_from_slice(&before[batch][piece]);
            }
        }
    }
    filled
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
                buffers[at][..joined.len()].copy_from_slice(&joined);
                metas[at] = RecvMeta { len: joined.len(), stride, ..RecvMeta::default() };
            }
            let pieces = spread(&mut buffers, &mut metas, batches.len());
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
