//! The one UDP socket: buffers, and the limits that keep large datagrams sound.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use socket2::{Domain, Protocol, Socket, Type};
use tracing::{info, warn};

/// Largest UDP payload that we send or accept: what a jumbo frame of 9,000 bytes carries. Loopback
/// and jumbo links then move 2.1 times the bytes of 1,452-byte datagrams; MTU discovery finds what
/// the path takes.
pub(super) const PAYLOAD_LEN_MAX: u16 = 8_972;

/// Longest datagram that the kernel takes in one call, segments together (IPv4).
const SEND_LEN_MAX: usize = 65_507;
/// Longest datagram that the kernel hands out in one call, segments together.
const RECEIVE_LEN_MAX: usize = 65_535;
/// Asked for in each direction; the system's 208 KiB drop bursts.
const BUFFER_LEN: usize = 4 * 1024 * 1024;

/// Binds `listen` and registers it with the current tokio runtime.
pub(super) fn bind(listen: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
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
        self.inner.poll_recv(cx, buffers, metas)
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
