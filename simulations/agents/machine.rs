//! The simulated machine: turmoil's network and clock, and one generator per thread.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Once};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use murmesh::runtime::machine::{Answer, ByteListener, ByteStream, Machine, simulate};
use parking_lot::Mutex;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};
use turmoil::net::{TcpListener, TcpStream, UdpSocket};

/// When every simulation begins, on the wall.
pub(crate) fn epoch() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

thread_local! {
    static RNG: RefCell<StdRng> = RefCell::new(StdRng::seed_from_u64(0));
    static LOSS: Cell<f64> = const { Cell::new(0.0) };
}

/// Loses this share of all datagrams of this thread's run.
pub(crate) fn lose(share: f64) {
    LOSS.set(share);
}

/// Puts the simulated machine under this process, and `seed` under this thread's run.
pub(crate) fn begin(seed: u64) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| assert!(simulate(Box::new(Simulated)), "nothing else simulates"));
    RNG.set(StdRng::seed_from_u64(seed));
    LOSS.set(0.0);
}

struct Simulated;

impl Machine for Simulated {
    fn unix_time(&self) -> Duration {
        let since = || epoch().duration_since(UNIX_EPOCH).unwrap_or_default();
        turmoil::since_epoch().unwrap_or_else(since)
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        RNG.with_borrow_mut(|rng| rng.fill_bytes(bytes));
    }

    fn bind_udp(&self, listen: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        // Binding answers at once; it is async only for likeness.
        let bound = futures_util::FutureExt::now_or_never(UdpSocket::bind(listen));
        let socket = Arc::new(bound.ok_or(io::ErrorKind::WouldBlock)??);
        Ok(Arc::new(Port { socket, readable: Mutex::new(None) }))
    }

    fn listen(&self, at: SocketAddr) -> Answer<'_, Box<dyn ByteListener>> {
        Box::pin(async move {
            let listener = TcpListener::bind(at).await?;
            Ok(Box::new(Entry(listener)) as Box<dyn ByteListener>)
        })
    }

    fn connect(&self, to: SocketAddr) -> Answer<'_, Box<dyn ByteStream>> {
        Box::pin(async move {
            let stream = TcpStream::connect(to).await?;
            Ok(Box::new(stream) as Box<dyn ByteStream>)
        })
    }
}

struct Entry(TcpListener);

impl ByteListener for Entry {
    fn local_address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn accept(&self) -> Answer<'_, Box<dyn ByteStream>> {
        Box::pin(async {
            let (stream, _) = self.0.accept().await?;
            Ok(Box::new(stream) as Box<dyn ByteStream>)
        })
    }
}

type Readable = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// A UDP port, one datagram a call.
struct Port {
    socket: Arc<UdpSocket>,
    /// The wait under way.
    readable: Mutex<Option<Readable>>,
}

impl fmt::Debug for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Port")
    }
}

impl AsyncUdpSocket for Port {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if LOSS.get() > 0.0 && RNG.with_borrow_mut(|rng| rng.random_bool(LOSS.get())) {
            return Ok(()); // gone, as on a real network: nobody is told
        }
        self.socket.try_send_to(transmit.contents, transmit.destination).map(drop)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut waiting = self.readable.lock();
        loop {
            if let Some(readable) = waiting.as_mut() {
                ready!(readable.as_mut().poll(cx))?;
                *waiting = None;
            }
            match self.socket.try_recv_from(&mut buffers[0]) {
                Ok((len, addr)) => {
                    metas[0] = RecvMeta { addr, len, stride: len, ecn: None, dst_ip: None };
                    return Poll::Ready(Ok(1));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let socket = Arc::clone(&self.socket);
                    *waiting = Some(Box::pin(async move { socket.readable().await }));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
