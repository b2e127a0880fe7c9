//! The machine under the agent: wall clock, randomness, sockets.
//!
//! One seam, so that a simulation can be the machine under whole agents: then the network, the clock
//! and every random byte of ours come from one seed. Without one it is the real machine, and nothing
//! here costs more than a look at a cell.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use quinn::AsyncUdpSocket;
use tokio::io::{AsyncRead, AsyncWrite};

/// A connection of a simulated machine.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> ByteStream for T {}

/// A listener of a simulated machine.
pub trait ByteListener: Send + Sync {
    /// Where it listens.
    fn local_address(&self) -> io::Result<SocketAddr>;
    /// The next connection. Cancel safe.
    fn accept(&self) -> Answer<'_, Box<dyn ByteStream>>;
}

/// What a simulated machine answers, some time.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'a>>;

/// A simulated machine. Asked on the thread, and inside the runtime, of the agent that runs on it.
pub trait Machine: Send + Sync {
    /// Wall time since 1970.
    fn unix_time(&self) -> Duration;
    /// Fills `bytes` from the machine's generator.
    fn fill_random(&self, bytes: &mut [u8]);
    /// Binds a UDP port.
    fn bind_udp(&self, listen: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>>;
    /// Listens on a TCP port.
    fn listen(&self, at: SocketAddr) -> Answer<'_, Box<dyn ByteListener>>;
    /// Connects to a TCP port.
    fn connect(&self, to: SocketAddr) -> Answer<'_, Box<dyn ByteStream>>;
}

static SIMULATED: OnceLock<Box<dyn Machine>> = OnceLock::new();

/// Makes `machine` the one under every agent of this process, from now on. False when there is one
/// already. To be called before anything else of this crate.
pub fn simulate(machine: Box<dyn Machine>) -> bool {
    SIMULATED.set(machine).is_ok()
}

/// The simulated machine, unless this is a real one.
pub(crate) fn simulated() -> Option<&'static dyn Machine> {
    SIMULATED.get().map(Box::as_ref)
}
