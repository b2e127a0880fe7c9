//! The data plane: a local connection in, a tunnel between agents, a local instance out.
//!
//! All of it lives on one thread with a runtime of its own, so that no lock is contended where bytes
//! move and no busy stream delays gossip. [`Proxy`] is the handle for everybody else.

mod board;
mod both;
mod budget;
mod call;
mod checker;
mod dial;
mod entry;
mod http;
mod inbound;
mod ingress;
mod instances;
mod last_asked;
mod limits;
mod load;
mod local;
mod outbound;
mod pauses;
mod pipe;
mod preamble;
mod socks;
mod stalls;
mod tcp;
mod traffic;
mod trouble;
mod turnstile;
mod wakes;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::ServerConfig;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::info;

pub use board::{
    Boards, BreakerReport, Choice, Cost, EndpointReport, Opened, Picked, Preview, Tried, cost_min,
};
pub use checker::{
    CHECK_INTERVALS, CHECK_TIMEOUTS, CHECKS_MAX, CheckError, CheckReport, CheckSpec, CheckedAs,
    CheckedInstance, Checker, HealthChecks, Report, Reports, WordError, WrittenCheck,
    WrittenStatus,
};
pub use dial::{DialError, MeshStream};
pub use ingress::{PublicHosts, Route};
pub use instances::LocalInstance;
pub use limits::{
    Balancing, BreakerLimits, CallLimits, HashKey, Ratio, Retry, Scope, Share, Span, Timeouts,
};
pub use preamble::ProxyProtocol;

use self::budget::Budgets;
use self::entry::{CONNECTIONS_MAX, Leads, accept};
use self::http::Http;
use self::inbound::Inbound;
use self::ingress::Ingress;
use self::instances::Instances;
use self::local::{LocalListener, LocalSocket};
use self::outbound::{Ask, Greeting, Outbound};
use self::pipe::{Pipe, pipe};
use self::stalls::Stalls;
use self::traffic::Traffic;
use self::turnstile::Turnstile;
use crate::breaker::OwnWindow;
use crate::mesh::{self, Evidence, NoEndpoint, Snapshot};
use crate::model::{InstanceId, MemberId, ServiceName, Target};
use crate::runtime::clock::Clock;
use crate::runtime::entropy::{self, EntropyError};
use crate::runtime::{Shutdown, TaskGroup, Thread, ThreadError};
use crate::telemetry::{AccessLog, Door, EventKind, EventLog, Metrics};
use crate::tls::NodeCredentials;
use crate::transport::{BindError, Endpoint, Incoming, Limits, LinkView, Peers, Revoker};

/// Commands that wait for the data thread.
const COMMANDS_MAX: usize = 64;
/// Names of instances that refused a connection and wait to be checked; more will be refused again.
const REFUSED_MAX: usize = 64;
/// How long closing waits for peers to hear of it.
const CLOSE_TIME_MAX: Duration = Duration::from_millis(500);
/// How long closing waits for refusals on their way: some round trips, and no reason to wait for a
/// caller that never says what it wants.
const REFUSE_TIME_MAX: Duration = Duration::from_secs(1);

/// What the data plane is made of.
pub struct Settings {
    /// The one UDP address of the mesh.
    pub listen: SocketAddr,
    /// Who this member is.
    pub credentials: NodeCredentials,
    /// Of the UDP port.
    pub limits: Limits,
    /// The mesh as gossip sees it.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Where the data plane tells what it sees of members. Words that find it full are dropped.
    pub evidence: mpsc::Sender<(MemberId, Evidence)>,
    /// Where the data plane tells what its calls saw of instances. Words that find it full are dropped.
    pub windows: mpsc::Sender<Vec<OwnWindow>>,
    /// All metrics.
    pub metrics: Metrics,
    /// What happened.
    pub events: EventLog,
    /// Where requests are written down, if anywhere.
    pub access_log: Option<AccessLog>,
    /// The agent's clock.
    pub clock: Clock,
    /// Told when the data thread panics.
    pub shutdown: Shutdown,
}

/// A data plane that runs.
pub struct Started {
    /// The handle.
    pub proxy: Proxy,
    /// The port, for the owners of the other planes.
    pub endpoint: Endpoint,
    /// Attempts to connect on the gossip plane.
    pub gossip: mpsc::Receiver<Incoming>,
    /// Attempts to join. Dropped by members that are no issuer.
    pub enrolment: mpsc::Receiver<Incoming>,
    /// Own instances that refused a connection; one that is not read in time is named again.
    pub refused: mpsc::Receiver<InstanceId>,
    /// Ends after [`Proxy::close`].
    pub thread: Thread,
}

/// The data plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Fault: configuration, system or credentials.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Fault: the system.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// Fault: the system.
    #[error(transparent)]
    Entropy(#[from] EntropyError),
    /// The data thread ended before it was ready.
    #[error("the data plane ended while it started")]
    Ended,
}

/// A local entry cannot be opened or closed. Nothing changed.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// Somebody listens there, or the address is not ours. Fault: the configuration.
    #[error("cannot listen at {listen}: {error}")]
    Bind {
        /// Where.
        listen: Target,
        /// Why.
        error: std::io::Error,
    },
    /// No entry of ours is there. Fault: whoever asked.
    #[error("nothing of ours listens at {0}")]
    Unknown(Target),
    /// The data plane is draining or gone.
    #[error("the data plane takes nothing new")]
    Closed,
}

/// How an entry is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryOptions {
    /// As which local service the callers call; as the member itself when absent.
    pub source: Option<ServiceName>,
    /// What its calls are allowed.
    pub limits: CallLimits,
    /// How they are balanced.
    pub balancing: Balancing,
    /// When this member stops calling an instance of the service; as usual when absent.
    pub breaker: Option<BreakerLimits>,
}

/// The handle of the data plane, for any thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Proxy {
    commands: mpsc::Sender<Command>,
    instances: Arc<Instances>,
    boards: Arc<Boards>,
    /// Weak, because what it leads to ends with the data thread.
    outbound: Weak<Outbound>,
}

type Pinged = oneshot::Sender<Result<Duration, DialError>>;
type Dialled = oneshot::Sender<Result<mesh::Endpoint, DialError>>;

#[derive(Debug)]
enum Command {
    Open { listen: Target, leads: Leads, reply: oneshot::Sender<Result<Target, EntryError>> },
    Dial { service: ServiceName, client: Pipe, reply: Dialled },
    Ping { service: ServiceName, endpoint: Box<mesh::Endpoint>, reply: Pinged },
    Redirect { listen: Target, leads: Leads, reply: oneshot::Sender<Result<(), EntryError>> },
    CloseEntry { listen: Target, reply: oneshot::Sender<Result<(), EntryError>> },
    Drain { deadline: Duration, reply: oneshot::Sender<bool> },
    Close { reply: oneshot::Sender<()> },
}

impl Proxy {
    /// Starts the data thread and binds the port.
    pub async fn start(settings: Settings) -> Result<Started, StartError> {
        let seed = entropy::seed()?;
        let (ready, readiness) = oneshot::channel();
        let shutdown = settings.shutdown.clone();
        let thread = Thread::start("data", shutdown, move || async move {
            match DataPlane::new(settings, seed) {
                Ok((plane, commands, data, started)) => {
                    let _ = ready.send(Ok(started)); // the starter gave up: commands are closed
                    plane.run(commands, data).await;
                }
                Err(error) => {
                    let _ = ready.send(Err(error)); // the starter gave up: nothing was started
                }
            }
        })?;
        let (proxy, endpoint, gossip, enrolment, refused) =
            readiness.await.map_err(|_| StartError::Ended)??;
        Ok(Started { proxy, endpoint, gossip, enrolment, refused, thread })
    }

    /// Opens a local entry to `service`, which need not exist yet. Returns where it listens.
    pub async fn open_upstream(
        &self,
        service: ServiceName,
        listen: Target,
        options: EntryOptions,
    ) -> Result<Target, EntryError> {
        self.open(listen, Leads::Service { service, options: Arc::new(options) }).await
    }

    /// Opens a SOCKS5 entry to all services by name. Returns where it listens.
    pub async fn open_socks(&self, listen: Target) -> Result<Target, EntryError> {
        self.open(listen, Leads::Socks).await
    }

    /// Opens an HTTP gateway to all services by name. Returns where it listens.
    pub async fn open_gateway(&self, listen: Target) -> Result<Target, EntryError> {
        self.open(listen, Leads::Gateway).await
    }

    /// Opens the public gateway: TLS of this kind, for these hosts. Returns where it listens.
    pub async fn open_public(
        &self,
        listen: Target,
        hosts: PublicHosts,
        tls: Arc<ServerConfig>,
    ) -> Result<Target, EntryError> {
        self.open(listen, Leads::Public(Ingress { hosts, tls })).await
    }

    /// Opens an entry that sends clients in plain text to the public gateway at `port`. Returns where
    /// it listens.
    pub async fn open_redirect(
        &self,
        listen: Target,
        hosts: PublicHosts,
        port: u16,
    ) -> Result<Target, EntryError> {
        self.open(listen, Leads::Redirect { hosts, port }).await
    }

    /// Leads the entry at `listen`, as opening returned it, to `service` from now on. Its connections
    /// go on where they are, and none is refused in between.
    pub async fn redirect(
        &self,
        listen: Target,
        service: ServiceName,
        options: EntryOptions,
    ) -> Result<(), EntryError> {
        let leads = Leads::Service { service, options: Arc::new(options) };
        let redirected = self.ask(|reply| Command::Redirect { listen, leads, reply }).await;
        redirected.ok_or(EntryError::Closed)?
    }

    /// Closes the entry at `listen`, as opening returned it. Its connections go on.
    pub async fn close_entry(&self, listen: Target) -> Result<(), EntryError> {
        self.ask(|reply| Command::CloseEntry { listen, reply }).await.ok_or(EntryError::Closed)?
    }

    /// Calls `service` from within this process, on the same way as a client of a local entry.
    ///
    /// Cancel safe: a call that is given up is reset.
    pub async fn dial(&self, service: ServiceName) -> Result<MeshStream, DialError> {
        let (near, client) = pipe();
        let dialled = self.ask(|reply| Command::Dial { service, client, reply }).await;
        let endpoint = dialled.ok_or(DialError::Stopping)??;
        Ok(MeshStream::new(near, endpoint))
    }

    /// Calls an instance, to see whether it takes one, and says how long that took. It sees a connection
    /// that is closed again.
    pub async fn ping(
        &self,
        service: ServiceName,
        endpoint: mesh::Endpoint,
    ) -> Result<Duration, DialError> {
        let endpoint = Box::new(endpoint);
        let pinged = self.ask(|reply| Command::Ping { service, endpoint, reply }).await;
        pinged.ok_or(DialError::Stopping)?
    }

    /// The instance that a call of `service` would go to first, now.
    pub fn pick(&self, service: &ServiceName) -> Result<mesh::Endpoint, NoEndpoint> {
        let outbound = self.outbound.upgrade().ok_or(NoEndpoint::NoEndpoints)?;
        let picked =
            outbound.pick(outbound.clock.now(), service, &Choice::default(), &Tried::default())?;
        Ok(picked.endpoint().clone())
    }

    /// Where calls of `service` would go now through an entry that balances like this.
    pub fn preview(
        &self,
        service: &ServiceName,
        balancing: &Balancing,
    ) -> Result<Preview, NoEndpoint> {
        let outbound = self.outbound.upgrade().ok_or(NoEndpoint::NoEndpoints)?;
        outbound.preview(service, &balancing.choice(None))
    }

    /// Replaces what this member serves. Connections to instances that are gone go on.
    pub fn set_local(&self, instances: Vec<LocalInstance>) {
        self.instances.set(instances);
    }

    /// The calls that instances of `member` have in flight; resting instances are left out.
    pub fn in_flight_of(&self, member: &MemberId) -> BTreeMap<InstanceId, u64> {
        self.boards.in_flight_of(member)
    }

    /// All calls in flight, to others' instances from here and to our own from everywhere.
    pub fn in_flight(&self) -> u32 {
        self.boards.in_flight_total()
    }

    /// What this member's own calls say of an endpoint; nothing when there were none.
    pub fn report(&self, endpoint: &mesh::Endpoint) -> EndpointReport {
        self.boards.report(endpoint)
    }

    /// Why this member would rather not call an endpoint: the word of a refusal or loss of a moment
    /// ago. Whatever gossip says of it, it is then the last resort.
    pub fn trouble(&self, endpoint: &crate::mesh::Endpoint) -> Option<&'static str> {
        self.outbound.upgrade()?.trouble(endpoint)
    }

    /// The data connection that this member dialled to another one, if it is open.
    pub fn link(&self, member: &MemberId) -> Option<LinkView> {
        self.outbound.upgrade()?.peers.view(member)
    }

    /// Takes nothing new, waits until nothing is in flight, and after `deadline` resets the rest.
    /// True when nothing was cut.
    pub async fn drain(&self, deadline: Duration) -> bool {
        self.ask(|reply| Command::Drain { deadline, reply }).await.unwrap_or(true)
    }

    /// Resets what is left, closes every connection of every plane and ends the thread.
    pub async fn close(&self) {
        self.ask(|reply| Command::Close { reply }).await;
    }

    async fn open(&self, listen: Target, leads: Leads) -> Result<Target, EntryError> {
        self.ask(|reply| Command::Open { listen, leads, reply }).await.ok_or(EntryError::Closed)?
    }

    /// `None` when the data thread is gone.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }
}

/// A listener for local clients.
struct Entry {
    leads: Arc<ArcSwap<Leads>>,
    closed: CancellationToken,
}

/// What runs on the data thread.
struct DataPlane {
    endpoint: Endpoint,
    inbound: Arc<Inbound>,
    outbound: Arc<Outbound>,
    http: Arc<Http>,
    instances: Arc<Instances>,
    entries: BTreeMap<Target, Entry>,
    /// One for each call from within this process.
    dials: Arc<Semaphore>,
    is_draining: bool,
    metrics: Metrics,
    events: EventLog,
    /// What lives as long as the data plane: listeners, connections, dials.
    tasks: TaskGroup,
    /// One for each connection that is carried.
    streams: TaskGroup,
    /// One for each tunnel that came while draining: it is told so before its connection closes, or
    /// its caller could not know that no byte has reached the instance.
    refusals: TaskGroup,
}

type Shared = (
    Proxy,
    Endpoint,
    mpsc::Receiver<Incoming>,
    mpsc::Receiver<Incoming>,
    mpsc::Receiver<InstanceId>,
);

impl DataPlane {
    #[allow(clippy::type_complexity)] // named where it is taken apart
    fn new(
        settings: Settings,
        seed: u64,
    ) -> Result<(Self, mpsc::Receiver<Command>, mpsc::Receiver<Incoming>, Shared), StartError> {
        let Settings { metrics, events, clock, shutdown, snapshot, evidence, .. } = settings;
        let (access_log, windows) = (settings.access_log, settings.windows);
        let [tasks, streams, refusals] = [(); 3].map(|()| TaskGroup::new(shutdown.clone()));
        let me = settings.credentials.member_id();
        let (listen, limits) = (settings.listen, &settings.limits);
        let (endpoint, queues) =
            Endpoint::bind(listen, &settings.credentials, limits, &metrics, &tasks)?;
        let trust = endpoint.trust().clone();
        let revoker = Revoker::new(trust, metrics.clone(), events.clone());
        let peers = Peers::new(
            endpoint.clone(),
            metrics.clone(),
            tasks.clone(),
            evidence.clone(),
            revoker.clone(),
            clock,
        );
        let (refuse, refused) = mpsc::channel(REFUSED_MAX);
        let turnstile = Turnstile::new(me, Arc::clone(&snapshot), clock);
        let instances = Arc::new(Instances::new(turnstile, refuse));
        let boards = Boards::new(me, clock, metrics.clone(), events.clone(), seed);
        let boards = Arc::new(boards);
        let (traffic, stalls) = (Traffic::new(metrics.clone()), Stalls::default());
        let inbound = Arc::new(Inbound {
            endpoint: endpoint.clone(),
            instances: Arc::clone(&instances),
            boards: Arc::clone(&boards),
            traffic: traffic.clone(),
            stalls: stalls.clone(),
            metrics: metrics.clone(),
            events: events.clone(),
            clock,
            revoker,
            evidence,
            streams: streams.clone(),
            refusals: refusals.clone(),
            connections: Mutex::default(),
        });
        let outbound = Arc::new(Outbound {
            me,
            snapshot,
            peers: peers.clone(),
            instances: Arc::clone(&instances),
            boards: Arc::clone(&boards),
            traffic,
            stalls,
            metrics: metrics.clone(),
            events: events.clone(),
            clock,
            budgets: Budgets::default(),
        });
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (own, weak) = (Arc::clone(&instances), Arc::downgrade(&outbound));
        let proxy = Proxy { commands, instances: own, boards, outbound: weak };
        let http = Arc::new(Http::new(Arc::clone(&outbound), streams.clone(), access_log));
        tasks.spawn("tell windows", Arc::clone(&outbound.boards).tell_windows(windows));
        tasks.spawn("hear loads", load::hear(peers, Arc::clone(&outbound.boards)));
        tasks.spawn("http pool", Arc::clone(&http).sweep());
        tasks.spawn("pauses", Arc::clone(&outbound.boards).look_for_pauses());
        let plane = Self {
            endpoint: endpoint.clone(),
            inbound,
            outbound,
            http,
            instances,
            entries: BTreeMap::new(),
            dials: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            is_draining: false,
            metrics,
            events,
            tasks,
            streams,
            refusals,
        };
        Ok((plane, inbox, queues.data, (proxy, endpoint, queues.gossip, queues.enrolment, refused)))
    }

    /// Serves until it is closed or every handle is gone.
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut data: mpsc::Receiver<Incoming>,
    ) {
        let closed = loop {
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(Command::Open { listen, leads, reply }) => {
                        let _ = reply.send(self.open(listen, leads).await); // nobody waits: fine
                    }
                    Some(Command::Dial { service, client, reply }) => {
                        self.dial(service, LocalSocket::of_task(client), reply);
                    }
                    Some(Command::Ping { service, endpoint, reply }) => {
                        let outbound = Arc::clone(&self.outbound);
                        self.tasks.spawn_connection("ping", async move {
                            let pinged = outbound.ping(&service, *endpoint).await;
                            let _ = reply.send(pinged); // nobody waits: fine
                        });
                    }
                    Some(Command::Redirect { listen, leads, reply }) => {
                        let _ = reply.send(self.redirect(listen, leads)); // nobody waits: fine
                    }
                    Some(Command::CloseEntry { listen, reply }) => {
                        let _ = reply.send(self.close_entry(listen)); // nobody waits: fine
                    }
                    Some(Command::Drain { deadline, reply }) => self.drain(deadline, reply),
                    Some(Command::Close { reply }) => break Some(reply),
                    None => break None,
                },
                Some(incoming) = data.recv() => {
                    let serve = Arc::clone(&self.inbound).serve(incoming);
                    self.tasks.spawn_connection("data connection", serve);
                }
            }
        };
        self.instances.drain(); // what comes from now on is refused
        self.streams.stop().await; // every guard resets, while connections can still tell it
        let _ = timeout(REFUSE_TIME_MAX, self.refusals.finished()).await; // late: its caller's fault
        self.endpoint.close();
        self.endpoint.closed(CLOSE_TIME_MAX).await;
        self.tasks.stop().await;
        closed.map(|reply| reply.send(()));
    }

    async fn open(&mut self, listen: Target, leads: Leads) -> Result<Target, EntryError> {
        if self.is_draining {
            return Err(EntryError::Closed);
        }
        let failed = |error| EntryError::Bind { listen: listen.clone(), error };
        let opened = async {
            let listener = LocalListener::bind(&listen).await?;
            Ok((listener.address()?, listener))
        };
        let (address, listener) = opened.await.map_err(failed).inspect_err(|error| {
            self.events.record(EventKind::EntryFailed, &listen, error);
        })?;
        info!(%address, ?leads, "entry open");
        let service = leads.service().cloned();
        let closed = CancellationToken::new();
        let (http, streams) = (Arc::clone(&self.http), self.streams.clone());
        let leads = Arc::new(ArcSwap::from_pointee(leads));
        let task = accept(listener, Arc::clone(&leads), http, streams, closed.clone());
        self.tasks.spawn("entry", task);
        self.entries.insert(address.clone(), Entry { leads, closed });
        self.configure(service);
        Ok(address)
    }

    fn dial(&self, service: ServiceName, client: LocalSocket, reply: Dialled) {
        let refuse = |error: DialError| {
            self.metrics.count_refused(Door::dial, error.reason());
            Err(error)
        };
        if self.is_draining {
            return drop(reply.send(refuse(DialError::Stopping)));
        }
        let Ok(slot) = Arc::clone(&self.dials).try_acquire_owned() else {
            return drop(reply.send(refuse(DialError::Overflow)));
        };
        let ask = Ask { service, options: Arc::default(), greeting: Greeting::Dial(reply) };
        let outbound = Arc::clone(&self.outbound);
        self.streams.spawn_connection("dial", async move {
            outbound.serve(client, ask).await;
            drop(slot);
        });
    }

    fn close_entry(&mut self, listen: Target) -> Result<(), EntryError> {
        match self.entries.remove(&listen) {
            Some(entry) => {
                entry.closed.cancel();
                self.configure(entry.leads.load().service().cloned());
                Ok(())
            }
            None => Err(EntryError::Unknown(listen)),
        }
    }

    fn redirect(&self, listen: Target, leads: Leads) -> Result<(), EntryError> {
        let entry = self.entries.get(&listen).ok_or(EntryError::Unknown(listen))?;
        let service = leads.service().cloned();
        let before = entry.leads.swap(Arc::new(leads));
        self.configure(before.service().cloned());
        self.configure(service);
        Ok(())
    }

    /// The breakers of a service are as one of its entries says; the others, which say nothing, share
    /// them.
    fn configure(&self, service: Option<ServiceName>) {
        let Some(service) = service else { return };
        let limits = self.entries.values().find_map(|entry| match &**entry.leads.load() {
            Leads::Service { service: of, options } if *of == service => options.breaker.clone(),
            _ => None,
        });
        self.outbound.boards.configure(&service, &limits.unwrap_or_default());
    }

    fn drain(&mut self, deadline: Duration, reply: oneshot::Sender<bool>) {
        self.is_draining = true;
        self.instances.drain();
        self.http.drain();
        self.entries.values().for_each(|entry| entry.closed.cancel());
        self.entries.clear();
        let streams = self.streams.clone();
        self.tasks.spawn("drain", async move {
            let is_complete = timeout(deadline, streams.finished()).await.is_ok();
            if !is_complete {
                streams.stop().await;
            }
            let _ = reply.send(is_complete); // nobody waits: fine
        });
    }
}
