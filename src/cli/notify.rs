//! Tells systemd how far the agent is (sd_notify(3)), where it asked for that.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tracing::warn;

/// The agent can serve.
pub(super) const READY: &str = "READY=1";
/// It is told to stop.
pub(super) const STOPPING: &str = "STOPPING=1";

/// Sends `state` to whoever started this process, if it wants to know. Never blocks.
pub(super) fn notify(state: &str) {
    let Some(place) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let send = || -> io::Result<()> {
        let address = match place.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&place)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.send_to_addr(state.as_bytes(), &address).map(drop)
    };
    if let Err(error) = send() {
        warn!(state, %error, "cannot tell the service manager");
    }
}
