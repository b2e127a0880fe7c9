//! HTTP: a decision for each request, not only for each connection.
//!
//! The caller's agent reads requests ([`downstream`], behind the [`gate`]), says where each goes
//! ([`client`]), picks an instance for it ([`exchange`], [`asking`]) and writes them anew on a connection
//! to it ([`outbox`], [`upstream`]); the agent in front of the instance carries bytes. Connections to instances rest in
//! a [`pool`] between requests. What an application sees was parsed once, and what the mesh itself has to
//! say is in [`answer`].

mod acceptance;
mod answer;
mod asking;
mod body;
mod chunks;
mod client;
mod client_io;
mod downstream;
mod exchange;
mod gate;
mod head;
mod malformed;
mod miss;
mod noted;
mod onward;
mod outbox;
mod outside;
mod pool;
mod request_body;
mod tasks;
mod upstream;
mod whose;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::HeaderValue;
use parking_lot::Mutex;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;

use self::pool::Pool;
use self::tasks::Tasks;
use super::EntryOptions;
use super::ingress::PublicHosts;
use super::outbound::Outbound;
use crate::mesh::{Endpoint, EndpointState};
use crate::model::{Protocol, ServiceName};
use crate::runtime::TaskGroup;
use crate::telemetry::{AccessLog, Door};

/// Services whose protocol is remembered.
const SPOKEN_MAX: usize = 10_000;
/// How often connections that rest are looked at.
const SWEEP_PERIOD: Duration = Duration::from_secs(1);

/// Where the requests of a listener go.
#[derive(Clone, Debug)]
pub(super) struct Site {
    pub(super) destination: Destination,
    /// As which local service they are sent, and what they are allowed.
    pub(super) options: Arc<EntryOptions>,
    /// For counting.
    pub(super) door: Door,
}

/// What says which service a request is for.
#[derive(Clone, Debug)]
pub(super) enum Destination {
    /// The listener: all are for this one.
    Service(ServiceName),
    /// The host, which is a name of the mesh. CONNECT is taken, too.
    MeshName,
    /// The host, which is one of those that are public.
    Public(PublicHosts),
    /// Nothing: they are sent to the public gateway at `port`.
    Redirect { hosts: PublicHosts, port: u16 },
}

/// Serves HTTP clients.
pub(super) struct Http {
    pub(super) outbound: Arc<Outbound>,
    pool: Pool,
    /// This member's name, once it is known.
    name: OnceLock<HeaderValue>,
    /// What services spoke when they were last called. At most [`SPOKEN_MAX`].
    spoken: Mutex<BTreeMap<ServiceName, Protocol>>,
    tasks: Tasks,
    /// Where requests are written down, if anywhere.
    log: Option<AccessLog>,
    /// Whether connections are to end once nothing is under way on them.
    draining: CancellationToken,
}

impl Http {
    /// Runs what exchanges need beside their clients' own tasks in `streams`.
    pub(super) fn new(outbound: Arc<Outbound>, streams: TaskGroup, log: Option<AccessLog>) -> Self {
        Self {
            outbound,
            pool: Pool::default(),
            name: OnceLock::new(),
            spoken: Mutex::default(),
            tasks: Tasks(streams),
            log,
            draining: CancellationToken::new(),
        }
    }

    /// Takes no further requests on connections that are open: each ends with what is under way.
    pub(super) fn drain(&self) {
        self.draining.cancel();
    }

    /// Ends connections that have rested for long, for ever.
    pub(super) async fn sweep(self: Arc<Self>) {
        let mut ticks = interval(SWEEP_PERIOD);
        loop {
            ticks.tick().await;
            let snapshot = self.outbound.snapshot.load();
            self.pool.sweep(self.outbound.clock.now(), |(service, member, instance)| {
                let view = snapshot.services.get(service);
                view.is_some_and(|view| {
                    // Whose calls are counted from now on has none on connections of before.
                    let is_free = |endpoint: &Endpoint| {
                        endpoint.state == EndpointState::Ready && endpoint.capacity.hard.is_none()
                    };
                    view.endpoint(member, instance).is_some_and(is_free)
                        && view.ejection(member, instance).is_none()
                })
            });
        }
    }

    /// This member's name as a header says it; none before the mesh knows it.
    fn name(&self) -> Option<HeaderValue> {
        if let Some(name) = self.name.get() {
            return Some(name.clone());
        }
        let snapshot = self.outbound.snapshot.load();
        let own = snapshot.members.get(&self.outbound.me)?;
        let name = HeaderValue::from_str(own.name.as_str()).ok()?;
        Some(self.name.get_or_init(|| name).clone())
    }

    /// What `service` speaks, or spoke when it was last called: then its callers are told in HTTP that
    /// it is gone.
    pub(super) fn protocol(&self, service: &ServiceName) -> Option<Protocol> {
        let snapshot = self.outbound.snapshot.load();
        let now = snapshot.services.get(service).map(|view| view.protocol);
        now.or_else(|| self.spoken.lock().get(service).copied())
    }

    /// An instance of `service` is about to be called.
    fn remember(&self, service: &ServiceName, protocol: Protocol) {
        let mut spoken = self.spoken.lock();
        if spoken.len() < SPOKEN_MAX || spoken.contains_key(service) {
            spoken.insert(service.clone(), protocol);
        }
    }
}
