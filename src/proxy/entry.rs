//! Listeners for clients: one service each, all by name over SOCKS or HTTP, or what is public.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::EntryOptions;
use super::http::{Destination, Http, Site};
use super::ingress::{Ingress, PublicHosts};
use super::local::{LocalListener, LocalSocket};
use super::outbound::{Ask, Greeting};
use super::socks::{self, SocksError};
use crate::model::{Protocol, ServiceName};
use crate::runtime::TaskGroup;
use crate::telemetry::{Door, EventKind};

/// Connections that one listener, or all dials of this process together, may have open; the next are
/// reset and counted as `overflow`.
pub(super) const CONNECTIONS_MAX: usize = 16_384;
/// How long a SOCKS client may take to say what it wants.
const NEGOTIATION_TIME_MAX: Duration = Duration::from_secs(10);
/// After an accept that failed for want of descriptors or memory: they come back when others end.
const BACK_OFF: Duration = Duration::from_millis(50);

/// What a listener leads to.
#[derive(Clone, Debug)]
pub(super) enum Leads {
    /// To one service.
    Service { service: ServiceName, options: Arc<EntryOptions> },
    /// To whatever the client names.
    Socks,
    /// The same, for HTTP.
    Gateway,
    /// To what is public, for clients outside the mesh.
    Public(Ingress),
    /// To that one, which listens at `port`.
    Redirect { hosts: PublicHosts, port: u16 },
}

impl Leads {
    /// The one service that it leads to, if that is all.
    pub(super) fn service(&self) -> Option<&ServiceName> {
        match self {
            Self::Service { service, .. } => Some(service),
            _ => None,
        }
    }

    fn door(&self) -> Door {
        match self {
            Self::Service { .. } => Door::upstream,
            Self::Socks => Door::socks,
            Self::Gateway => Door::gateway,
            Self::Public(_) | Self::Redirect { .. } => Door::public,
        }
    }
}

/// Accepts clients until `closed`, and leads each where `leads` says then. Their connections go on in
/// `streams`.
pub(super) async fn accept(
    listener: LocalListener,
    leads: Arc<ArcSwap<Leads>>,
    http: Arc<Http>,
    streams: TaskGroup,
    closed: CancellationToken,
) {
    let outbound = &http.outbound;
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    while let Some(accepted) = closed.run_until_cancelled(listener.accept()).await {
        let client = match accepted {
            Ok(client) => client,
            Err(error) if is_of_one_client(&error) => continue,
            Err(error) => {
                outbound.metrics.count_refused(leads.load().door(), "accept");
                outbound.events.record(EventKind::EntryFailed, "accept", error);
                sleep(BACK_OFF).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            outbound.metrics.count_refused(leads.load().door(), "overflow");
            continue; // dropped: reset
        };
        let (leads, http) = (Leads::clone(&leads.load()), Arc::clone(&http));
        streams.spawn_connection("outbound", async move {
            serve(client, leads, http).await;
            drop(slot);
        });
    }
}

async fn serve(mut client: LocalSocket, leads: Leads, http: Arc<Http>) {
    let outbound = &http.outbound;
    let ask = match leads {
        Leads::Service { service, options } => match http.protocol(&service) {
            Some(Protocol::Http | Protocol::H2 | Protocol::Grpc) => {
                let destination = Destination::Service(service);
                let site = Site { destination, options, door: Door::upstream };
                return Box::pin(http.serve(client, site)).await;
            }
            _ => Ask { service, options, greeting: Greeting::None },
        },
        Leads::Gateway => {
            let destination = Destination::MeshName;
            let site = Site { destination, options: Arc::default(), door: Door::gateway };
            return Box::pin(http.serve(client, site)).await;
        }
        Leads::Public(ingress) => {
            let client = match Box::pin(client.secured(&ingress)).await {
                Ok(client) => client,
                Err(reason) => return outbound.metrics.count_refused(Door::public, reason),
            };
            let destination = Destination::Public(ingress.hosts);
            let site = Site { destination, options: Arc::default(), door: Door::public };
            return Box::pin(http.serve(client, site)).await;
        }
        Leads::Redirect { hosts, port } => {
            let destination = Destination::Redirect { hosts, port };
            let site = Site { destination, options: Arc::default(), door: Door::public };
            return Box::pin(http.serve(client, site)).await;
        }
        Leads::Socks => match Box::pin(negotiate(&mut client)).await {
            Ok(service) => Ask { service, options: Arc::default(), greeting: Greeting::Socks },
            Err(reason) => {
                outbound.metrics.count_refused(Door::socks, reason);
                let _ = client.end().await; // the client is gone: nobody to tell
                return;
            }
        },
    };
    // In a box, or every task here would be as large as what carries bytes.
    Box::pin(outbound.serve(client, ask)).await;
}

async fn negotiate(client: &mut LocalSocket) -> Result<ServiceName, &'static str> {
    match timeout(NEGOTIATION_TIME_MAX, socks::negotiate(client)).await {
        Ok(Ok(service)) => Ok(service),
        Ok(Err(SocksError::Refused(reason))) => Err(reason),
        Ok(Err(SocksError::Io(error))) => {
            debug!(%error, "socks client went away");
            Err("malformed")
        }
        Err(_) => Err("timeout"),
    }
}

/// Whether the error is of the client that was just about to be accepted (accept(2)).
fn is_of_one_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}
