//! The API's listeners: one hyper connection per client, each behind the same door.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::either::Either;
use tower_service::Service;
use tracing::debug;

use super::ApiState;
use super::door::Door;
use super::problem::Refused;
use super::routes::router;
use crate::runtime::{TaskGroup, UnixSocket};
use crate::telemetry::{Door as MetricDoor, Metrics};

/// The file of the data directory in which a running agent says where its API listens.
pub const ADDRESS_FILE: &str = "api.addr";
/// The file of the data directory that is the API's unix socket.
pub const SOCKET_FILE: &str = "api.sock";
/// Most connections at once: people, scripts, a scraper, followers of events, and above all clients
/// that keep one for each service that they watch. Each takes some 10 KiB.
const CONNECTIONS_MAX: usize = 1_024;
/// Longest wait for a request's head, and longest idle time between requests.
const HEAD_TIME_MAX: Duration = Duration::from_secs(30);
/// Pause after the system refused a connection (no file descriptors left), so as not to spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the API listens.
#[derive(Debug)]
pub enum Listener {
    /// For this machine, or for all that reach the address.
    Tcp(TcpListener),
    /// For whoever may write to its file.
    Unix(UnixSocket),
}

impl Listener {
    async fn accept(&self) -> io::Result<Either<TcpStream, UnixStream>> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(stream, _)| Either::Left(stream)),
            Self::Unix(socket) => socket.accept().await.map(Either::Right),
        }
    }

    fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }
}

/// Accepts on all `listeners` and answers until cancelled; connections live in `connections`.
pub async fn serve(listeners: Vec<Listener>, state: ApiState, connections: TaskGroup) {
    let desk = Desk::new(state, listeners.iter().find_map(Listener::address));
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    join_all(listeners.iter().map(|listener| accept(listener, &desk, &room, &connections))).await;
}

async fn accept(listener: &Listener, desk: &Desk, room: &Arc<Semaphore>, connections: &TaskGroup) {
    loop {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                debug!(%error, "accepting an API connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(room).try_acquire_owned() else {
            desk.metrics.count_refused(MetricDoor::api, "connections");
            continue;
        };
        let desk = desk.clone();
        connections.spawn_connection("api", async move {
            desk.serve(stream).await;
            drop(place);
        });
    }
}

/// Answers requests, from whatever kind of stream they come.
#[derive(Clone)]
struct Desk {
    door: Arc<Door>,
    router: Router,
    metrics: Metrics,
}

impl Desk {
    fn new(state: ApiState, listen: Option<SocketAddr>) -> Self {
        let door = Arc::new(Door::new(state.token.clone(), listen));
        Self { door, metrics: state.metrics.clone(), router: router(state) }
    }

    async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Unpin + 'static) {
        let answer = service_fn(|request| self.answer(request));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new()) // without it the next line does nothing
            .header_read_timeout(HEAD_TIME_MAX)
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(stream), answer);
        if let Err(error) = connection.await {
            debug!(%error, "API connection ended early");
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response, Infallible> {
        let response = match self.door.admit(&request) {
            Ok(()) => self.router.clone().call(request.map(Body::new)).await?,
            Err(refusal) => refusal.into_response(),
        };
        if let Some(Refused(reason)) = response.extensions().get() {
            self.metrics.count_refused(MetricDoor::api, reason);
        }
        Ok(response)
    }
}
