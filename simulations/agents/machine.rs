//! The simulated machine: turmoil's network and clock, and one generator per thread.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
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
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::{TcpListener, TcpStream, UdpSocket};

/// When every simulation begins, on the wall.
pub(crate) fn epoch() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// What the network does to datagrams of this thread's run, whoever sends them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Weather {
    /// Shares of all.
    pub(crate) lost: f64,
    pub(crate) doubled: f64,
    pub(crate) damaged: f64,
    /// Longer ones are lost without a word, as behind a tunnel that nobody knows of. In bytes.
    pub(crate) len_max: usize,
}

impl Weather {
    pub(crate) const FAIR: Self =
        Self { lost: 0.0, doubled: 0.0, damaged: 0.0, len_max: usize::MAX };
}

/// A machine by the runtime that it is; another one after each start.
type Host = Option<tokio::runtime::Id>;

/// A stream as its other end sees it.
type Pair = (Host, SocketAddr, SocketAddr);

thread_local! {
    static RNG: RefCell<StdRng> = RefCell::new(StdRng::seed_from_u64(0));
    static WEATHER: Cell<Weather> = const { Cell::new(Weather::FAIR) };
    static STATE: RefCell<State> = RefCell::default();
}

#[derive(Default)]
struct State {
    /// By how many seconds a machine's clock is ahead. Looked up only.
    ahead: HashMap<Host, i64>,
    /// Ports, listeners and streams that its agent holds. Looked up only.
    sockets: HashMap<Host, usize>,
    /// Streams that an agent dropped without saying their end. Looked up only.
    resets: HashSet<Pair>,
}

fn here() -> Host {
    tokio::runtime::Handle::try_current().ok().map(|runtime| runtime.id())
}

/// Puts the simulated machine under this process, and `seed` under this thread's run.
pub(crate) fn begin(seed: u64) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| assert!(simulate(Box::new(Simulated)), "nothing else simulates"));
    RNG.set(StdRng::seed_from_u64(seed));
    STATE.take();
    set_weather(Weather::FAIR);
}

pub(crate) fn set_weather(weather: Weather) {
    WEATHER.set(weather);
}

/// Puts the clock of the machine that this is called on ahead of the others', or behind.
pub(crate) fn set_clock_ahead(seconds: i64) {
    STATE.with_borrow_mut(|state| state.ahead.insert(here(), seconds));
}

/// How many sockets of any kind the agent of the machine holds that this is called on.
pub(crate) fn open_sockets() -> usize {
    STATE.with_borrow(|state| state.sockets.get(&here()).copied().unwrap_or_default())
}

/// Whether the agent at the other end of `stream` reset it. turmoil itself says "end" also for a
/// stream that was only dropped.
pub(crate) fn was_reset(near: SocketAddr, far: SocketAddr) -> bool {
    STATE.with_borrow(|state| state.resets.contains(&(here(), near, far)))
}

/// One socket of an agent, until it is dropped.
#[derive(Debug)]
struct Open(Host);

impl Open {
    fn new() -> Self {
        STATE.with_borrow_mut(|state| *state.sockets.entry(here()).or_default() += 1);
        Self(here())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        STATE.with_borrow_mut(|state| {
            if let Some(open) = state.sockets.get_mut(&self.0) {
                *open -= 1;
            }
        });
    }
}

struct Simulated;

impl Machine for Simulated {
    fn unix_time(&self) -> Duration {
        let since = || epoch().duration_since(UNIX_EPOCH).unwrap_or_default();
        let ahead = STATE.with_borrow(|state| state.ahead.get(&here()).copied().unwrap_or(0));
        let time = turmoil::since_epoch().unwrap_or_else(since);
        match ahead {
            0.. => time + Duration::from_secs(ahead.unsigned_abs()),
            _ => time - Duration::from_secs(ahead.unsigned_abs()),
        }
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        RNG.with_borrow_mut(|rng| rng.fill_bytes(bytes));
    }

    fn bind_udp(&self, listen: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        // Binding answers at once; it is async only for likeness.
        let bound = futures_util::FutureExt::now_or_never(UdpSocket::bind(listen));
        let socket = Arc::new(bound.ok_or(io::ErrorKind::WouldBlock)??);
        Ok(Arc::new(Port { socket, readable: Mutex::new(None), _open: Open::new() }))
    }

    fn listen(&self, at: SocketAddr) -> Answer<'_, Box<dyn ByteListener>> {
        Box::pin(async move {
            let listener = TcpListener::bind(at).await?;
            Ok(Box::new(Entry { listener, _open: Open::new() }) as Box<dyn ByteListener>)
        })
    }

    fn connect(&self, to: SocketAddr) -> Answer<'_, Box<dyn ByteStream>> {
        Box::pin(async move {
            Ok(Box::new(Stream::new(TcpStream::connect(to).await?)?) as Box<dyn ByteStream>)
        })
    }
}

struct Entry {
    listener: TcpListener,
    _open: Open,
}

impl ByteListener for Entry {
    fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    fn accept(&self) -> Answer<'_, Box<dyn ByteStream>> {
        Box::pin(async {
            let (stream, _) = self.listener.accept().await?;
            Ok(Box::new(Stream::new(stream)?) as Box<dyn ByteStream>)
        })
    }
}

/// An agent's end of a local connection. As with a real one, dropping it before its end was said
/// resets it.
struct Stream {
    stream: TcpStream,
    pair: Pair,
    has_ended: bool,
    _open: Open,
}

impl Stream {
    fn new(stream: TcpStream) -> io::Result<Self> {
        let pair = (here(), stream.peer_addr()?, stream.local_addr()?);
        STATE.with_borrow_mut(|state| state.resets.remove(&pair)); // the ports were used before
        Ok(Self { stream, pair, has_ended: false, _open: Open::new() })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.has_ended {
            STATE.with_borrow_mut(|state| state.resets.insert(self.pair));
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let ended = ready!(Pin::new(&mut self.stream).poll_shutdown(cx));
        self.has_ended |= ended.is_ok();
        Poll::Ready(ended)
    }
}

type Readable = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// A UDP port, one datagram a call.
struct Port {
    socket: Arc<UdpSocket>,
    /// The wait under way.
    readable: Mutex<Option<Readable>>,
    _open: Open,
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
        let weather = WEATHER.get();
        let befalls = |share| share > 0.0 && RNG.with_borrow_mut(|rng| rng.random_bool(share));
        if transmit.contents.len() > weather.len_max || befalls(weather.lost) {
            return Ok(()); // gone, as on a real network: nobody is told
        }
        let mut datagram = transmit.contents.to_vec();
        if befalls(weather.damaged) {
            let bit = RNG.with_borrow_mut(|rng| rng.random_range(0..datagram.len() * 8));
            datagram[bit / 8] ^= 1 << (bit % 8);
        }
        if befalls(weather.doubled) {
            self.socket.try_send_to(&datagram, transmit.destination)?;
        }
        self.socket.try_send_to(&datagram, transmit.destination).map(drop)
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
