//! Connections of this machine, towards clients and towards instances: TCP, unix, and pipes to tasks
//! of this very process.
//!
//! A TCP socket or a pipe dropped before our end was said is reset (TCP: linger 0), so that a cut
//! never looks complete. Unix sockets know no reset: there a cut is an end, and only what the
//! protocol inside says tells the two apart.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::FutureExt;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream, tcp, unix};
use tokio::time::{sleep, timeout};

use super::ingress::Ingress;
use super::pipe::{Pipe, PipeReader, PipeWriter};
use super::stalls::{STALL_AFTER, Stalls, WriteError};
use crate::model::Target;
use crate::runtime::UnixSocket;
use crate::runtime::machine::{self, ByteListener, ByteStream};
use crate::runtime::polling;

/// Chunks that one write takes at most.
pub(super) const CHUNKS_MAX: usize = 16;

/// Read buffers are cut from blocks of this size, shared by all sockets of the thread.
const ARENA_LEN: usize = 64 * 1024;
/// A block with less space than this is given up: shorter reads cost more calls than they save.
const READ_LEN_MIN: usize = 8 * 1024;
/// Short slices are written as one: copying so few bytes costs less than a call with a list of them.
const JOIN_LEN_MAX: usize = 4 * 1024;
/// Connections that the kernel holds for us to accept.
const BACKLOG: u32 = 4_096;
/// After how long a listener on this machine whose queue is full is asked again: first, and at last.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(100);

thread_local! {
    /// Where this thread reads into. What is read is split off and shared, so a socket that rests
    /// owns no buffer.
    static ARENA: RefCell<BytesMut> = RefCell::new(BytesMut::new());
    /// Where this thread joins what is written at once.
    static JOINED: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(JOIN_LEN_MAX));
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Pipe(Pipe),
    /// TLS, or what a simulated machine has, and where its other side is.
    Boxed(Box<dyn ByteStream>, Option<IpAddr>),
}

/// A connection on this machine. Dropped before its end was said it is reset.
pub(super) struct LocalSocket(Stream);

impl LocalSocket {
    /// Until our end is said the kernel is to reset a TCP connection that we give up: also when this
    /// process is killed and can say nothing any more.
    fn new(stream: Stream) -> Self {
        if let Stream::Tcp(stream) = &stream {
            // Both fail only on a socket that is gone already.
            let _ = stream.set_nodelay(true);
            let _ = stream.set_zero_linger();
        }
        Self(stream)
    }

    /// Connects to an instance.
    pub(super) async fn connect(target: &Target) -> io::Result<Self> {
        Ok(Self::new(match (target, machine::simulated()) {
            (Target::Tcp(address), Some(machine)) => {
                Stream::Boxed(machine.connect(*address).await?, None)
            }
            (Target::Tcp(address), None) => {
                let stream = dial(*address).await?;
                // Where nobody listens, the kernel may give us the very port that we dial, and
                // then connects us with ourselves.
                if stream.local_addr()? == *address {
                    stream.set_zero_linger()?;
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                Stream::Tcp(stream)
            }
            (Target::Unix(path), _) => Stream::Unix(dial_unix(path).await?),
        }))
    }

    /// The same connection inside TLS, or the word why there is none.
    pub(super) async fn secured(self, ingress: &Ingress) -> Result<Self, &'static str> {
        let Stream::Tcp(stream) = self.0 else { return Err("handshake") };
        let secured = ingress.greet(stream).await?;
        let peer = secured.peer();
        Ok(Self::new(Stream::Boxed(Box::new(secured), peer)))
    }

    /// The data plane's end of a connection to a task of this process.
    pub(super) fn of_task(pipe: Pipe) -> Self {
        Self::new(Stream::Pipe(pipe))
    }

    /// Where the other side is, if it came over a network.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        match &self.0 {
            Stream::Tcp(stream) => stream.peer_addr().ok().map(|address| address.ip()),
            Stream::Boxed(_, peer) => *peer,
            Stream::Unix(_) | Stream::Pipe(_) => None,
        }
    }

    /// Both directions at once.
    pub(super) fn split(&mut self) -> (LocalReader<'_>, LocalWriter<'_>) {
        let (read, write) = match &mut self.0 {
            Stream::Tcp(stream) => {
                let (read, write) = stream.split();
                (ReadHalf::Tcp(read), WriteHalf::Tcp(write))
            }
            Stream::Unix(stream) => {
                let (read, write) = stream.split();
                (ReadHalf::Unix(read), WriteHalf::Unix(write))
            }
            Stream::Pipe(pipe) => {
                let (read, write) = pipe.split();
                (ReadHalf::Pipe(read), WriteHalf::Pipe(write))
            }
            Stream::Boxed(stream, _) => {
                let (read, write) = tokio::io::split(stream);
                (ReadHalf::Boxed(read), WriteHalf::Boxed(write))
            }
        };
        (LocalReader(read), LocalWriter(write))
    }

    /// The connection as anybody's: what HTTP of others is spoken on. It ends as the system ends it.
    pub(super) fn into_stream(self) -> Box<dyn ByteStream> {
        match self.0 {
            Stream::Tcp(stream) => {
                let _ = SockRef::from(&stream).set_linger(None); // gone: then it has ended
                Box::new(stream)
            }
            Stream::Unix(stream) => Box::new(stream),
            Stream::Pipe(pipe) => Box::new(pipe),
            Stream::Boxed(stream, _) => stream,
        }
    }

    /// One direction alone: for a stream in a box that spares the lock between its halves.
    pub(super) fn reader(&mut self) -> LocalReader<'_> {
        LocalReader(match &mut self.0 {
            Stream::Tcp(stream) => ReadHalf::Tcp(stream.split().0),
            Stream::Unix(stream) => ReadHalf::Unix(stream.split().0),
            Stream::Pipe(pipe) => ReadHalf::Pipe(pipe.split().0),
            Stream::Boxed(stream, _) => ReadHalf::Whole(stream),
        })
    }

    /// The other one.
    pub(super) fn writer(&mut self) -> LocalWriter<'_> {
        LocalWriter(match &mut self.0 {
            Stream::Tcp(stream) => WriteHalf::Tcp(stream.split().1),
            Stream::Unix(stream) => WriteHalf::Unix(stream.split().1),
            Stream::Pipe(pipe) => WriteHalf::Pipe(pipe.split().1),
            Stream::Boxed(stream, _) => WriteHalf::Whole(stream),
        })
    }

    /// Reads exactly `buffer`. For the short exchanges before bytes are carried.
    pub(super) async fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        match &mut self.0 {
            Stream::Tcp(stream) => stream.read_exact(buffer).await,
            Stream::Unix(stream) => stream.read_exact(buffer).await,
            Stream::Pipe(pipe) => pipe.read_exact(buffer).await,
            Stream::Boxed(stream, _) => stream.read_exact(buffer).await,
        }
        .map(|_| ())
    }

    /// Writes all of `bytes`. For the short exchanges before bytes are carried.
    pub(super) async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.0 {
            Stream::Tcp(stream) => stream.write_all(bytes).await,
            Stream::Unix(stream) => stream.write_all(bytes).await,
            Stream::Pipe(pipe) => pipe.write_all(bytes).await,
            Stream::Boxed(stream, _) => {
                stream.write_all(bytes).await?;
                stream.flush().await
            }
        }
    }

    /// Ends without a reset: what was written is all there is.
    pub(super) async fn end(mut self) -> io::Result<()> {
        self.writer().end().await
    }
}

/// What comes from the application.
pub(super) struct LocalReader<'a>(ReadHalf<'a>);

enum ReadHalf<'a> {
    Tcp(tcp::ReadHalf<'a>),
    Unix(unix::ReadHalf<'a>),
    Pipe(&'a mut PipeReader),
    Boxed(tokio::io::ReadHalf<&'a mut Box<dyn ByteStream>>),
    Whole(&'a mut Box<dyn ByteStream>),
}

impl LocalReader<'_> {
    /// Reads what is there, at most `len_max` bytes; empty at the end. Cancel safe.
    pub(super) async fn read(&mut self, len_max: usize) -> io::Result<Bytes> {
        poll_fn(|cx| self.poll_read(cx, len_max)).await
    }

    /// Reads what is there, at most `len_max` bytes; empty at the end.
    pub(super) fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        len_max: usize,
    ) -> Poll<io::Result<Bytes>> {
        // The arena is borrowed for one poll only. A read that waits leaves nothing in it.
        ARENA.with_borrow_mut(|arena| self.poll_read_into(cx, arena, len_max))
    }

    fn poll_read_into(
        &mut self,
        cx: &mut Context<'_>,
        arena: &mut BytesMut,
        len_max: usize,
    ) -> Poll<io::Result<Bytes>> {
        if arena.capacity() < READ_LEN_MIN {
            arena.reserve(ARENA_LEN);
        }
        let mut space = (&mut *arena).limit(len_max);
        let len = ready!(match &mut self.0 {
            ReadHalf::Tcp(half) => pin!(half.read_buf(&mut space)).poll(cx),
            ReadHalf::Unix(half) => pin!(half.read_buf(&mut space)).poll(cx),
            ReadHalf::Pipe(half) => pin!(half.read_buf(&mut space)).poll(cx),
            ReadHalf::Boxed(half) => pin!(half.read_buf(&mut space)).poll(cx),
            ReadHalf::Whole(stream) => pin!(stream.read_buf(&mut space)).poll(cx),
        })?;
        polling::note_arrival(len);
        Poll::Ready(Ok(arena.split().freeze()))
    }
}

/// What goes to the application.
pub(super) struct LocalWriter<'a>(WriteHalf<'a>);

enum WriteHalf<'a> {
    Tcp(tcp::WriteHalf<'a>),
    Unix(unix::WriteHalf<'a>),
    Pipe(&'a mut PipeWriter),
    Boxed(tokio::io::WriteHalf<&'a mut Box<dyn ByteStream>>),
    Whole(&'a mut Box<dyn ByteStream>),
}

fn len(slices: &[IoSlice<'_>]) -> usize {
    slices.iter().map(|slice| slice.len()).sum()
}

/// How many bytes are there to be read, up to one; 0 at the end.
fn peek(socket: impl AsFd) -> Result<usize, Errno> {
    recv(socket, &mut [0; 1][..], RecvFlags::PEEK | RecvFlags::DONTWAIT).map(|(len, _)| len)
}

impl LocalWriter<'_> {
    /// Writes all of `chunks` and leaves them empty. A write that waits for long is a stall.
    pub(super) async fn write(
        &mut self,
        chunks: &mut [Bytes],
        stalls: &Stalls,
    ) -> Result<(), WriteError> {
        let mut rest = chunks;
        loop {
            while rest.first().is_some_and(Bytes::is_empty) {
                rest = &mut rest[1..];
            }
            if rest.is_empty() {
                return patiently(|cx| self.poll_flush(cx), stalls).await;
            }
            let mut written = patiently(|cx| self.poll_write(cx, rest), stalls).await?;
            for chunk in rest.iter_mut() {
                let len = chunk.len().min(written);
                chunk.advance(len);
                written -= len;
                if chunk.is_empty() {
                    *chunk = Bytes::new(); // an empty rest would pin what it was cut from
                }
            }
        }
    }

    /// Whether the application has ended its side or is gone, as the kernel has it. The runtime hears
    /// of it only when it next asks for events, which may be after a request that crosses with it.
    pub(super) fn is_over(&self) -> bool {
        let peeked = match &self.0 {
            WriteHalf::Tcp(half) => peek(half.as_ref()),
            WriteHalf::Unix(half) => peek(half.as_ref()),
            WriteHalf::Pipe(_) | WriteHalf::Boxed(_) | WriteHalf::Whole(_) => return false,
        };
        !matches!(peeked, Ok(1..) | Err(Errno::AGAIN | Errno::INTR))
    }

    /// The end of our bytes: the application reads all of them and then an end.
    pub(super) async fn end(&mut self) -> io::Result<()> {
        match &mut self.0 {
            WriteHalf::Tcp(half) => {
                half.shutdown().await?;
                SockRef::from(half.as_ref()).set_linger(None)
            }
            WriteHalf::Unix(half) => half.shutdown().await,
            WriteHalf::Pipe(half) => half.shutdown().await,
            WriteHalf::Boxed(half) => half.shutdown().await,
            WriteHalf::Whole(stream) => stream.shutdown().await,
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, chunks: &[Bytes]) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); CHUNKS_MAX];
        let count = chunks.len().min(CHUNKS_MAX);
        for (slice, chunk) in slices.iter_mut().zip(chunks) {
            *slice = IoSlice::new(chunk);
        }
        self.poll_write_slices(cx, &slices[..count])
    }

    /// Sends what waits in the socket's own layers.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.0 {
            WriteHalf::Tcp(_) | WriteHalf::Unix(_) | WriteHalf::Pipe(_) => Poll::Ready(Ok(())),
            WriteHalf::Boxed(half) => Pin::new(half).poll_flush(cx),
            WriteHalf::Whole(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    /// Writes some of `slices`, at least a byte, and says how many.
    pub(super) fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(match &mut self.0 {
            WriteHalf::Tcp(half) => match slices {
                [one] => Pin::new(half).poll_write(cx, one), // the kernel takes it at less cost
                few if len(few) <= JOIN_LEN_MAX => JOINED.with_borrow_mut(|joined| {
                    joined.clear();
                    few.iter().for_each(|slice| joined.extend_from_slice(slice));
                    Pin::new(half).poll_write(cx, joined)
                }),
                _ => Pin::new(half).poll_write_vectored(cx, slices),
            },
            WriteHalf::Unix(half) => Pin::new(half).poll_write_vectored(cx, slices),
            WriteHalf::Pipe(half) => Pin::new(half).poll_write_vectored(cx, slices),
            WriteHalf::Boxed(half) => Pin::new(half).poll_write_vectored(cx, slices),
            WriteHalf::Whole(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        })?;
        match written {
            0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            written => Poll::Ready(Ok(written)),
        }
    }
}

/// Waits for a write. One that takes long is a stall.
async fn patiently<T>(
    mut write: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
    stalls: &Stalls,
) -> Result<T, WriteError> {
    let mut writing = poll_fn(&mut write);
    if let Some(written) = (&mut writing).now_or_never() {
        return Ok(written?);
    }
    match timeout(STALL_AFTER, writing).await {
        Ok(written) => Ok(written?),
        Err(_) => Ok(stalls.watch(poll_fn(write)).await??),
    }
}

/// A socket to bind to `address` or to connect there.
///
/// On loopback there is no path to explore, and the congestion control of least work is the best: BBR,
/// which some systems have for all, sends by a timer.
fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    #[cfg(target_os = "linux")]
    if address.ip().is_loopback() {
        let _ = rustix::net::sockopt::set_tcp_congestion(&socket, "reno"); // where it is allowed
    }
    Ok(socket)
}

/// Connects to `address`. A listener on this machine answers at once, or its queue is full and it
/// says nothing: then the kernel would ask again after a second, which a burst of calls to an
/// application with a short queue would wait.
async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    if !address.ip().is_loopback() {
        return TcpStream::connect(address).await;
    }
    let mut pause = PAUSE_MIN;
    loop {
        let socket = socket(address)?;
        if let Ok(connected) = timeout(pause, socket.connect(address)).await {
            return connected;
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Connects to the listener at `path`, which says so when its queue is full.
async fn dial_unix(path: &Path) -> io::Result<UnixStream> {
    let mut pause = PAUSE_MIN;
    loop {
        match UnixStream::connect(path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(pause).await,
            connected => return connected,
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Where local clients, or applications behind us, connect.
pub(super) enum LocalListener {
    Tcp(TcpListener),
    Unix(UnixSocket),
    Simulated(Box<dyn ByteListener>),
}

impl LocalListener {
    /// Listens at `target`. A unix socket's file that nobody answers behind is taken over.
    pub(super) async fn bind(target: &Target) -> io::Result<Self> {
        match (target, machine::simulated()) {
            (Target::Tcp(address), Some(machine)) => {
                Ok(Self::Simulated(machine.listen(*address).await?))
            }
            (Target::Tcp(address), None) => {
                let socket = socket(*address)?;
                socket.set_reuseaddr(true)?;
                socket.bind(*address)?;
                Ok(Self::Tcp(socket.listen(BACKLOG)?))
            }
            (Target::Unix(path), _) => UnixSocket::bind(path).await.map(Self::Unix),
        }
    }

    /// Where it listens, with the port that the system chose where none was asked for.
    pub(super) fn address(&self) -> io::Result<Target> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Target::Tcp),
            Self::Unix(socket) => Ok(Target::Unix(socket.path().to_owned())),
            Self::Simulated(listener) => listener.local_address().map(Target::Tcp),
        }
    }

    /// The next client. Cancel safe.
    pub(super) async fn accept(&self) -> io::Result<LocalSocket> {
        Ok(LocalSocket::new(match self {
            Self::Tcp(listener) => Stream::Tcp(listener.accept().await?.0),
            Self::Unix(socket) => Stream::Unix(socket.accept().await?),
            Self::Simulated(listener) => Stream::Boxed(listener.accept().await?, None),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::sleep;

    use super::*;

    /// More than two sockets buffer.
    const LEN: usize = 16 * 1024 * 1024;

    #[tokio::test(start_paused = true)]
    async fn bytes_of_a_stalled_write_arrive_whole_once_they_are_read() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target::Tcp(listener.local_addr().unwrap());
        let mut socket = LocalSocket::connect(&target).await.unwrap();
        let (mut reader, _) = listener.accept().await.unwrap();
        let sent: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
        let chunks = Bytes::from(sent.clone());
        let stalls = Stalls::default();
        let write = async {
            let (_, mut writer) = socket.split();
            for at in (0..LEN).step_by(LEN / 256) {
                let mut chunk = [
                    chunks.slice(at..at + LEN / 512),
                    chunks.slice(at + LEN / 512..at + LEN / 256),
                ];
                writer.write(&mut chunk, &stalls).await.unwrap();
            }
            writer.end().await.unwrap();
        };
        let read = async {
            while stalls.len() == 0 {
                sleep(Duration::from_millis(100)).await; // virtual
            }
            let mut heard = Vec::new();
            reader.read_to_end(&mut heard).await.unwrap();
            heard
        };
        let ((), heard) = tokio::join!(write, read);
        assert!(heard == sent, "{} of {} bytes", heard.len(), sent.len());
        assert_eq!(stalls.len(), 0);
    }

    /// Connections that a listener of this queue takes before somebody accepts: the kernel has one more
    /// than it was asked for.
    const QUEUE: u32 = 1;

    #[tokio::test]
    async fn whoever_finds_the_queue_of_an_instance_full_connects_as_soon_as_there_is_room() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let unix = std::os::unix::net::UnixListener::bind(&path).unwrap();
        rustix::net::listen(&unix, QUEUE as i32).unwrap();
        let tcp = TcpSocket::new_v4().unwrap();
        tcp.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let tcp = tcp.listen(QUEUE).unwrap();
        for target in [Target::Tcp(tcp.local_addr().unwrap()), Target::Unix(path)] {
            let connect = || LocalSocket::connect(&target);
            let _queued = [connect().await.unwrap(), connect().await.unwrap()];
            let mut late = Box::pin(connect());
            let early = timeout(Duration::from_millis(150), &mut late).await;
            assert!(early.is_err(), "{target} had no room");
            match &target {
                Target::Tcp(_) => drop(tcp.accept().await.unwrap()),
                Target::Unix(_) => drop(unix.accept().unwrap()),
            }
            // The kernel asks again a second after the first time.
            let connected = timeout(Duration::from_millis(500), late).await;
            assert!(connected.is_ok_and(|socket| socket.is_ok()), "{target}");
        }
    }
}
