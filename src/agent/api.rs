//! Where this machine's programs reach the agent: on loopback, and always on a socket in its data
//! directory.

use std::net::SocketAddr;
use std::path::Path;

use tokio::net::TcpListener;
use tracing::{info, warn};

use super::StartError;
use crate::api::{Listener, SOCKET_FILE};
use crate::config::{Setting, Settings};
use crate::model::Target;
use crate::runtime::{UnixSocket, machine};
use crate::tls::store::DataDir;

/// Whoever is in this group may connect to the socket, where this machine has the group.
const GROUP: &str = "murmesh";

/// Listens on every address of the API, and says which of them was asked for: the unix socket where
/// one was, else the port on loopback. Whoever calls has the lock of `dir`. On a simulated machine
/// nobody asks over HTTP.
pub(super) async fn listen(
    settings: &Settings,
    dir: &DataDir,
) -> Result<(Target, Vec<Listener>), StartError> {
    if machine::simulated().is_some() {
        return Ok((settings.api.value.into(), Vec::new()));
    }
    let own = dir.file(SOCKET_FILE);
    let (address, mut listeners) = match settings.api_socket.as_ref().map(|asked| &asked.value) {
        None => {
            let tcp = listen_tcp(&settings.api).await?;
            let failed = |error| StartError::Api { address: settings.api.value.into(), error };
            (tcp.local_addr().map_err(failed)?.into(), vec![Listener::Tcp(tcp)])
        }
        Some(path) if *path == own => (Target::Unix(own.clone()), Vec::new()),
        Some(path) => {
            let socket = UnixSocket::bind(path).await;
            let failed = |error| StartError::Api { address: Target::Unix(path.clone()), error };
            (Target::Unix(path.clone()), vec![Listener::Unix(socket.map_err(failed)?)])
        }
    };
    listeners.extend(listen_unix(&own).await.map(Listener::Unix));
    Ok((address, listeners))
}

/// Listens where the settings say; a default that is taken gives way to any free port.
async fn listen_tcp(setting: &Setting<SocketAddr>) -> Result<TcpListener, StartError> {
    let address = setting.value;
    let failed =
        |address: SocketAddr| move |error| StartError::Api { address: address.into(), error };
    match TcpListener::bind(address).await {
        Err(error) if !setting.is_asked() => {
            warn!(%address, %error, "the API's default address is taken, any free port will do");
            let any = SocketAddr::new(address.ip(), 0);
            TcpListener::bind(any).await.map_err(failed(any))
        }
        listener => listener.map_err(failed(address)),
    }
}

/// The socket that nobody asked for: an agent that cannot have it works without, for instance where
/// the path is longer than a socket's may be.
async fn listen_unix(path: &Path) -> Option<UnixSocket> {
    let socket = match UnixSocket::bind(path).await {
        Ok(socket) => socket,
        Err(error) => {
            warn!(path = %path.display(), %error, "the API has no unix socket");
            return None;
        }
    };
    match socket.admit_group(GROUP) {
        Ok(true) => info!(group = GROUP, "the group may connect to the API's socket"),
        Ok(false) => {}
        Err(error) => warn!(group = GROUP, %error, "the group cannot connect to the API's socket"),
    }
    Some(socket)
}
