//! The public gateway: clients from outside the mesh, over TLS only.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::EntryOptions;
use crate::model::ServiceName;

/// How long a client may take for the TLS handshake: some round trips on a bad line.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);

/// Where requests go, and what they are allowed.
#[derive(Clone, Debug)]
pub struct Route {
    /// To which service.
    pub service: ServiceName,
    /// Under which limits.
    pub options: Arc<EntryOptions>,
}

/// Which service answers under which host, as its operator said: nothing else is public. Cheap to
/// clone; all clones are one.
#[derive(Clone, Default)]
pub struct PublicHosts(Arc<ArcSwap<BTreeMap<String, Route>>>);

impl PublicHosts {
    /// From now on these are public, under names in lower case.
    pub fn set(&self, hosts: BTreeMap<String, Route>) {
        self.0.store(Arc::new(hosts));
    }

    /// The host as the operator wrote it, and where it leads, whatever case and closing dot `host` has.
    pub(super) fn find(&self, host: &str) -> Option<(String, Route)> {
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let route = self.0.load().get(&host).cloned()?;
        Some((host, route))
    }
}

impl fmt::Debug for PublicHosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.load().keys()).finish()
    }
}

/// How the public gateway greets its clients.
#[derive(Clone)]
pub(super) struct Ingress {
    pub(super) hosts: PublicHosts,
    pub(super) tls: Arc<ServerConfig>,
}

impl fmt::Debug for Ingress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.hosts.fmt(f)
    }
}

impl Ingress {
    /// Makes TLS of a client's connection, or says with one word why it is none.
    pub(super) async fn greet(&self, stream: TcpStream) -> Result<Secured, &'static str> {
        let accepting = TlsAcceptor::from(Arc::clone(&self.tls)).accept(stream);
        match timeout(HANDSHAKE_TIME_MAX, accepting).await {
            Ok(Ok(stream)) => Ok(Secured(stream)),
            Ok(Err(error)) => {
                debug!(%error, "no handshake with a client of the public gateway");
                Err("handshake")
            }
            Err(_) => Err("timeout"),
        }
    }
}

/// A client's connection inside TLS. It ends by TLS's own end and then that of TCP; dropped before,
/// it is reset.
pub(super) struct Secured(TlsStream<TcpStream>);

impl Secured {
    pub(super) fn peer(&self) -> Option<IpAddr> {
        self.0.get_ref().0.peer_addr().ok().map(|address| address.ip())
    }
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.0).poll_shutdown(cx))?;
        Poll::Ready(SockRef::from(self.0.get_ref().0).set_linger(None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_found_in_any_case_and_others_are_not_public() {
        let hosts = PublicHosts::default();
        assert!(hosts.find("shop.example.com").is_none());
        let route = Route { service: "web".parse().unwrap(), options: Arc::default() };
        hosts.set([("shop.example.com".to_owned(), route)].into());
        for host in ["shop.example.com", "SHOP.example.com", "shop.example.com."] {
            assert_eq!(hosts.find(host).unwrap().0, "shop.example.com", "{host}");
        }
        for host in ["example.com", "a.shop.example.com", "web.mesh", "", "."] {
            assert!(hosts.find(host).is_none(), "{host}");
        }
    }
}
