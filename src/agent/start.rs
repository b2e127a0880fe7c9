//! The start of an agent: every part begun in the order in which it can fail most cheaply, and put
//! together. What had begun before something failed is undone.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{Mutex, Notify, mpsc, watch};
use tracing::{info, warn};

use super::advertise::{self, advertised};
use super::check::{Inspector, warn_while_unheard};
use super::control::{Controller, check_loop, ids, local_error};
use super::identity::{self, Keeper};
use super::ingress::Ingress;
use super::join::JoinError;
use super::left::{self, has_left};
use super::local::LocalServices;
use super::reload::{self, Asked};
use super::{Agent, CancelOnDrop, api, clocks, disk, drain, join_all, seeds, twin};
use crate::api::control::CONTROL_QUEUE_LEN_MAX;
use crate::api::{
    ADDRESS_FILE, ApiState, ApiToken, CallView, Calls, Checks, ControlError, Doors, ExposeSpec,
    Identity, Links, Local, LogSlot, Pinger, Readiness, UpstreamSpec, serve,
};
use crate::catalogue::{Catalogue, Signatures};
use crate::config::{Origin, RuntimeFile, Setting, Settings};
use crate::mesh::{self, Mesh, MeshConfig, Snapshot};
use crate::model::{Entry, EntryKind, InstanceId, ServiceName, Target};
use crate::proxy::{self, Checker, DialError, Proxy};
use crate::runtime::clock::Clock;
use crate::runtime::{Shutdown, Stage, TaskGroup, Thread, ThreadError, entropy, limits};
use crate::telemetry::{AccessLog, AccessLogError, EventKind, EventLog, Metrics};
use crate::tls::grace::IssuerWatch;
use crate::tls::public::PublicCertificates;
use crate::tls::store::{DataDir, StoreError};
use crate::tls::{Dismissed, NodeCredentials};
use crate::transport::Limits;
use crate::transport::enrolment::renewal::Run;
use crate::transport::enrolment::{self, IssuerDesk, Presence};
use crate::transport::gossip::{Durable, Gossip, gossip_channel};

/// Reports of the data plane that wait for the gossip driver; more are dropped, the next will say
/// the same.
const EVIDENCE_LEN: usize = 1_024;
/// Words of the data plane on instances that wait for the gossip driver. One that waits grows old:
/// what happens meanwhile is kept where it is counted, and told with the next.
const WINDOWS_LEN: usize = 1;

/// An agent could not start. Everything it had begun is undone; what it wrote into its data directory
/// is of use to the next start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No identity, a damaged one, or another agent has it. Fault: the data directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The member left its mesh for good. Fault: whoever starts it again.
    #[error("{} has left its mesh; '{way_back}' brings it back, then start the agent", path.display())]
    Left {
        /// The data directory.
        path: PathBuf,
        /// The command that brings it back.
        way_back: &'static str,
    },
    /// The issuer that let this member in was removed, and the member with it. Fault: whoever did that.
    #[error(
        "nobody vouches for the member of {} any more: the issuer that let it in was removed; \
         'murmesh join TOKEN' lets it in again", path.display()
    )]
    Unvouched {
        /// The data directory.
        path: PathBuf,
    },
    /// The mesh could not be joined ([`Agent::join`]).
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The port of the mesh is taken, or no address of this machine.
    #[error(transparent)]
    Proxy(#[from] proxy::StartError),
    /// Its access log cannot be written.
    #[error(transparent)]
    AccessLog(#[from] AccessLogError),
    /// Fault: the system.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// Fault: the system.
    #[error(transparent)]
    Entropy(#[from] entropy::EntropyError),
    /// The identity is not usable. Fault: the data directory.
    #[error(transparent)]
    Tls(#[from] crate::tls::TlsError),
    /// What an issuer must remember cannot be read. Fault: the data directory.
    #[error(transparent)]
    Desk(#[from] enrolment::DeskError),
    /// What this member would say of itself is no valid record.
    #[error("cannot begin as a member: {0}")]
    Mesh(#[from] crate::mesh::Error),
    /// The API's address was asked for and is taken, or no address of this machine.
    #[error("listen.api: cannot listen on {address}: {error}")]
    Api {
        /// As asked.
        address: Target,
        /// Why.
        error: std::io::Error,
    },
    /// An instance or an entry of the settings cannot be had.
    #[error("{what} ({origin}): {error}")]
    Entry {
        /// Which.
        what: String,
        /// Who asked for it: a flag, or a line of a file.
        origin: String,
        /// Why.
        error: ControlError,
    },
    /// The data directory was copied, and runs elsewhere. Fault: whoever copied it.
    #[error(
        "another agent with this member's key answers at {0}; one identity runs on one machine: stop \
         that agent, or join from here with another --data-dir"
    )]
    Twin(SocketAddr),
    /// Nobody would know where to dial this member. Fault: the settings.
    #[error(
        "the mesh port {0} is bound on every address and this machine has no default route; \
         say where others reach it with --advertise host:port"
    )]
    NoAdvertise(SocketAddr),
}

impl Agent {
    /// Starts an agent with the identity in its data directory. Returns when it is bound, gossiping
    /// and answering on its API; [`Agent::ready`] tells when the data plane can serve.
    ///
    /// Two agents cannot share a data directory; that and every other failure leaves nothing running.
    /// All of its threads log through the process's `tracing` subscriber: one that blocks stops them.
    pub async fn start(settings: Settings) -> Result<Self, StartError> {
        let shutdown = Shutdown::default();
        let tasks = TaskGroup::new(shutdown.clone());
        let mut threads = Vec::new();
        match Self::wire(settings, shutdown, tasks.clone(), &mut threads).await {
            Ok(mut agent) => {
                agent.threads = threads;
                Ok(agent)
            }
            Err(error) => {
                tasks.stop().await;
                join_all(threads).await; // every handle is gone, so they end
                Err(error)
            }
        }
    }

    /// Starts every part and puts them together. What it started before it failed is in `tasks` and
    /// `threads`.
    async fn wire(
        settings: Settings,
        shutdown: Shutdown,
        tasks: TaskGroup,
        threads: &mut Vec<Thread>,
    ) -> Result<Self, StartError> {
        let dir = settings.data_dir.value.clone();
        let credentials = dir.credentials()?;
        let lock = dir.lock()?;
        if has_left(&dir) {
            let (path, way_back) = (dir.path().to_owned(), left::way_back(&dir));
            return Err(StartError::Left { path, way_back });
        }
        let runtime = RuntimeFile::load(&dir)?;
        let services = declared(&settings, &runtime, credentials.enrolled().services.clone())?;
        let open_files = limits::raise_open_files();
        limits::keep_freed_memory();
        info!(member = %credentials.name(), id = %credentials.member_id(), open_files, "starting");
        let (metrics, clock) = (Metrics::new(), Clock::new());
        let events = EventLog::new(credentials.name().as_str());
        identity::count_expiry(&metrics, &credentials);
        metrics.show_events_dropped(events.dropped());
        // Before the port is open: nobody comes in by a certificate that this member knew to be void.
        let entries = starting_entries(&credentials, &dir)?;
        let trust = credentials.trust();
        let dismissed = Dismissed::from(&grounds(&credentials, &entries));
        let removed = dismissed.by_root().issuers().copied().collect();
        trust.set_dismissed(dismissed);
        trust.grace().set_open(IssuerWatch::default().is_grace_open(Duration::ZERO));

        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let (snapshots, snapshots_reader) = watch::channel(snapshot.load_full());

        // The API's addresses first: the cheapest thing that can be wrong.
        let (api_address, api_listeners) = api::listen(&settings, &dir).await?;

        let (evidence, evidence_queue) = mpsc::channel(EVIDENCE_LEN);
        let (windows, mut windows_queue) = mpsc::channel(WINDOWS_LEN);
        let access_log = match settings.access_log.value.clone() {
            Some(target) => Some(AccessLog::start(target, metrics.access_log_dropped.clone())?),
            None => None,
        };
        let data = Proxy::start(proxy::Settings {
            listen: settings.mesh.value,
            credentials: credentials.clone(),
            limits: Limits { reset_secret: dir.reset_secret()? },
            snapshot: snapshot.clone(),
            evidence,
            windows,
            events: events.clone(),
            access_log: access_log.clone(),
            metrics: metrics.clone(),
            clock,
            shutdown: shutdown.clone(),
        })
        .await?;
        threads.push(data.thread);
        let (health, checker) =
            Checker::new(data.refused, entropy::seed()?, clock, events.clone(), metrics.clone());
        tasks.spawn("checker", checker.run());
        // Before anybody hears of them: the first record of this run names them all, as that of an
        // earlier one did.
        data.proxy.set_local(services.targets());
        let mesh_address = data.endpoint.local_address();
        let told = settings.advertise.value.clone();
        let advertise = advertised(told.as_ref(), mesh_address).await?;

        let (gossip, commands) = gossip_channel();
        let teller = gossip.clone();
        tasks.spawn("tell windows", async move {
            while let Some(told) = windows_queue.recv().await {
                teller.give_windows(told).await;
            }
        });
        let desk = Arc::new(Mutex::new(IssuerDesk::open(
            dir.authority()?,
            credentials.clone(),
            dir.clone(),
            gossip.clone(),
            metrics.clone(),
            events.clone(),
        )?));
        let run = Run(entropy::random_bytes()?);
        let presence = Presence {
            me: credentials.member_id(),
            name: credentials.name().clone(),
            run,
            events: events.clone(),
        };
        let door = enrolment::serve(
            data.endpoint.clone(),
            data.enrolment,
            presence,
            desk.clone(),
            snapshot.clone(),
            metrics.clone(),
            tasks.clone(),
        );
        tasks.spawn("enrolment-door", door);
        // The door is open: where this very process answers it is known by its run.
        let places = twin::places(credentials.member_id(), &entries, advertise, mesh_address);
        let found = twin::find(&data.endpoint, credentials.member_id(), run, places).await;
        if let Some(address) = found {
            return Err(StartError::Twin(address));
        }

        let mesh = Mesh::new(
            clock.now(),
            MeshConfig {
                mesh: *credentials.mesh(),
                root: credentials.genesis().root,
                name: credentials.name().clone(),
                address: advertise,
                zone: settings.zone.value.clone(),
                agent_version: env!("CARGO_PKG_VERSION").to_owned(),
                began_at_ms: clock.began_at_unix_millis(),
                epoch: dir.claim_epochs()?,
                profile: settings.profile.value,
                seeds: seeds::literal(&settings.seeds.value),
                phase: drain::phase(services.out()),
                offers: services.offers(),
                remembered: disk::remembered(&dir)?,
            },
            Box::new(credentials.signer()?),
            entropy::seed()?,
            entries,
        )
        .map_err(|error| without_issuer(error, &credentials, &dir))?;
        let (settled, settled_reader) = watch::channel(false);
        let (durable, durable_reader) = watch::channel(Durable::default());
        let gossip_tasks = TaskGroup::new(shutdown.clone());
        let driver = Gossip {
            mesh,
            clock,
            endpoint: data.endpoint.clone(),
            incoming: data.gossip,
            commands,
            evidence: evidence_queue,
            snapshot: snapshot.clone(),
            snapshots,
            durable,
            settled,
            events: events.clone(),
            metrics: metrics.clone(),
            tasks: gossip_tasks,
        };
        threads.push(Thread::start("gossip", shutdown.clone(), move || driver.run())?);
        let disk = TaskGroup::new(shutdown.clone());
        disk.spawn("persist", disk::persist(dir.clone(), durable_reader, gossip.clone()));
        let (seeds, known_seeds) = watch::channel(settings.seeds.value.clone());
        tasks.spawn("resolve-seeds", seeds::resolve_again(known_seeds, gossip.clone()));

        let (reached_at, advertised_at) = watch::channel(advertise);
        let follow = advertise::follow(told, mesh_address, gossip.clone(), reached_at);
        tasks.spawn("follow the advertised name", follow);

        let identity = Arc::new(ArcSwap::from_pointee(Identity {
            credentials: credentials.clone(),
            renews_at: 0,
            degraded: None,
            disowned: None,
        }));
        let (allow, allowed) = watch::channel(credentials.enrolled().services.clone());
        let keeper = Arc::new(Keeper {
            allow,
            dir: dir.clone(),
            endpoint: data.endpoint.clone(),
            gossip: gossip.clone(),
            desk: desk.clone(),
            seeds: seeds::literal(&settings.seeds.value),
            snapshot: snapshot.clone(),
            identity: identity.clone(),
            events: events.clone(),
            metrics: metrics.clone(),
            clock,
            chance: Notify::new(),
            outdated: Notify::new(),
        });
        tasks.spawn("renew certificate", keeper.clone().renew_for_ever(entropy::seed()?));
        tasks.spawn("watch certificates", keeper.watch(removed));
        let measure = clocks::measure(
            credentials.member_id(),
            data.endpoint.clone(),
            snapshot.clone(),
            metrics.clone(),
            entropy::seed()?,
        );
        tasks.spawn("compare clocks", measure);

        let inspector = Arc::new(Inspector {
            dir: dir.clone(),
            mesh: mesh_address,
            advertise: advertised_at.clone(),
            seeds: settings.seeds.value.clone(),
            endpoint: data.endpoint.clone(),
            gossip: gossip.clone(),
            turn: Mutex::default(),
        });

        let (leave, leaving) = watch::channel(false);
        let (view, local) = watch::channel(Arc::new(Local::default()));
        let effective = Arc::new(ArcSwap::from_pointee(reload::effective(&settings)));
        let mut controller = Controller {
            settings: settings.clone(),
            access_log,
            effective: Arc::clone(&effective),
            asked: Vec::new(),
            seeds,
            dir: dir.clone(),
            services,
            upstreams: Vec::new(),
            doors: Doors::default(),
            ingress: None,
            runtime,
            joined: BTreeSet::new(),
            view,
            proxy: data.proxy.clone(),
            reports: health.reports(),
            health: health.clone(),
            gossip: gossip.clone(),
            desk,
            me: credentials.member_id(),
            name: credentials.name().clone(),
            allowed,
            snapshot: snapshot.clone(),
            snapshots: snapshots_reader.clone(),
            endpoint: data.endpoint,
            advertise: advertised_at,
            events: events.clone(),
            leaving: leave,
        };
        let certificates = Arc::<PublicCertificates>::default();
        open_settings(&mut controller, &settings, &data.proxy).await?;
        open_public(&mut controller, &settings, &data.proxy, &certificates, &events).await?;
        if let Some(ingress) = &controller.ingress {
            tasks.spawn("watch public certificates", ingress.watch(events.clone()));
        }
        let (control, control_queue) = mpsc::channel(CONTROL_QUEUE_LEN_MAX);
        tasks.spawn("control", controller.run(control_queue));

        let (ready, readiness) = watch::channel(Readiness::NotReady("the agent is starting"));
        tasks.spawn("readiness", watch_readiness(ready, settled_reader, shutdown.clone()));
        let (calls, own_calls) = (data.proxy.clone(), data.proxy.clone());
        let previews = data.proxy.clone();
        let me = credentials.member_id();
        let (links, pings, log) = (data.proxy.clone(), data.proxy.clone(), LogSlot::default());
        let state = ApiState {
            me: credentials.member_id(),
            name: credentials.name().clone(),
            mesh: *credentials.mesh(),
            snapshot: snapshots_reader.clone(),
            local,
            identity: identity.clone(),
            calls: Calls::new(
                move |endpoint| CallView {
                    report: calls.report(endpoint),
                    trouble: calls.trouble(endpoint),
                },
                move || own_calls.in_flight_of(&me),
                move |service, balancing| previews.preview(service, balancing),
            ),
            health: health.reports(),
            links: Links::new(move |member| links.link(member)),
            certificates,
            pinger: Pinger::new(move |service, endpoint| {
                let proxy = pings.clone();
                Box::pin(async move {
                    let called = proxy.ping(service, endpoint).await;
                    called.map_err(DialError::reason)
                })
            }),
            checks: Checks::new({
                let inspector = inspector.clone();
                move |state| Box::pin(inspector.clone().run(state))
            }),
            log: log.clone(),
            readiness: readiness.clone(),
            control: control.clone(),
            events: events.clone(),
            metrics: metrics.clone(),
            effective,
            clock,
            token: ApiToken::new(&dir.api_token()?),
        };
        dir.write(ADDRESS_FILE, api_address.to_string().as_bytes())?;
        tasks.spawn("warn while unheard", warn_while_unheard(inspector, state.clone()));
        tasks.spawn("api", serve(api_listeners, state, tasks.clone()));

        events.record(EventKind::AgentStarted, credentials.name(), format!("mesh {mesh_address}"));
        Ok(Self {
            id: credentials.member_id(),
            name: credentials.name().clone(),
            identity,
            snapshot,
            snapshots: snapshots_reader,
            proxy: data.proxy,
            gossip,
            events,
            metrics,
            shutdown,
            control,
            leaving,
            readiness,
            log,
            dir,
            mesh_address,
            api_address,
            tasks: CancelOnDrop(tasks),
            disk,
            threads: Vec::new(),
            _lock: lock,
        })
    }
}

/// The enrolment is believed by the word of its issuer, which the root signed: that one is missing, or
/// says that it is none any more.
fn without_issuer(error: mesh::Error, credentials: &NodeCredentials, dir: &DataDir) -> StartError {
    let issuer = credentials.enrolment().signer().member_id();
    let me = credentials.member_id();
    let dismissed = credentials.trust().dismissed();
    let let_in_by = credentials.enrolled().let_in_by.unwrap_or(issuer);
    let was_removed = !dismissed.admits(&issuer, &let_in_by, &me);
    match error {
        mesh::Error::NotEnrolled(_) if was_removed => {
            StartError::Unvouched { path: dir.path().to_owned() }
        }
        mesh::Error::NotEnrolled(_) => {
            dir.damaged_entries("it does not name the issuer of this member").into()
        }
        error => error.into(),
    }
}

/// What was known when the agent last ran, and what it owns even if that file was lost or is behind:
/// its enrolment and, on issuers, its invites.
fn starting_entries(
    credentials: &NodeCredentials,
    dir: &DataDir,
) -> Result<Vec<Entry>, StartError> {
    let mut entries = dir.entries()?;
    entries.push(credentials.enrolment().clone());
    entries.extend(enrolment::stored_invites(dir)?);
    Ok(entries)
}

/// Who vouches for whom, by these entries alone.
pub(super) fn grounds(credentials: &NodeCredentials, entries: &[Entry]) -> Catalogue {
    let is_ground =
        |entry: &&Entry| matches!(entry.key().kind, EntryKind::ISSUER | EntryKind::ENROLMENT);
    let (mesh, root) = (*credentials.mesh(), credentials.genesis().root);
    let mut catalogue = Catalogue::new(mesh, root, Box::new(Signatures));
    catalogue.restore(entries.iter().filter(is_ground).cloned().collect());
    catalogue
}

/// All instances that flags and files name, and those that the command line added in an earlier run.
fn declared(
    settings: &Settings,
    runtime: &RuntimeFile,
    allowed: Option<Vec<ServiceName>>,
) -> Result<LocalServices, StartError> {
    let mut services = LocalServices::new(allowed, runtime.out.clone());
    let listen = |door: &Setting<Option<SocketAddr>>| door.value.map(Target::Tcp);
    let doors = Doors {
        gateway: listen(&settings.gateway),
        socks: listen(&settings.socks),
        public: listen(&settings.public),
        redirect: listen(&settings.redirect),
    };
    let mut declare = |spec: &ExposeSpec| {
        check_loop(&spec.to, doors.open())?;
        services.declare(spec.clone()).map_err(local_error).map(drop)
    };
    for Setting { value, origin } in &settings.exposes {
        declare(value).map_err(failed(format!("expose {}", value.id), origin))?;
    }
    let is_in_files =
        |id: &InstanceId| settings.exposes.iter().any(|expose| expose.value.id == *id);
    for spec in runtime.expose.iter().filter(|spec| !is_in_files(&spec.id)) {
        if let Err(error) = declare(spec) {
            warn!(instance = %spec.id, %error, "cannot expose again what was exposed before");
        }
    }
    let withheld = ids(services.withheld());
    if !withheld.is_empty() {
        warn!(instances = withheld, "withheld: this member may not offer them now");
    }
    Ok(services)
}

fn failed(what: String, origin: &Origin) -> impl FnOnce(ControlError) -> StartError {
    let origin = origin.to_string();
    move |error| StartError::Entry { what, origin, error }
}

/// Opens all that flags and files say, then what the command line added in an earlier run.
async fn open_settings(
    controller: &mut Controller,
    settings: &Settings,
    proxy: &Proxy,
) -> Result<(), StartError> {
    controller.publish().await; // nothing new to the mesh: the local API lists them
    for Setting { value, origin } in &settings.upstreams {
        let what = format!("upstream {} {}", value.service, value.listen);
        let opened = controller.open(value.clone()).await.map_err(failed(what, origin))?;
        controller.asked.push(Asked { written: value.clone(), opened });
    }
    let invalid = |error: proxy::EntryError| ControlError::Invalid(error.to_string());
    if let Some(listen) = settings.gateway.value {
        let opened = proxy.open_gateway(Target::Tcp(listen)).await.map_err(invalid);
        let opened = opened.map_err(failed("listen.gateway".into(), &settings.gateway.origin))?;
        controller.doors.gateway = Some(opened);
    }
    if let Some(listen) = settings.socks.value {
        let opened = proxy.open_socks(Target::Tcp(listen)).await.map_err(invalid);
        let opened = opened.map_err(failed("listen.socks".into(), &settings.socks.origin))?;
        controller.doors.socks = Some(opened);
    }
    controller.show();
    for spec in controller.runtime.upstream.clone() {
        let is_in_files = |file: &Setting<UpstreamSpec>| {
            file.value.listen == spec.listen && file.value.service == spec.service
        };
        if settings.upstreams.iter().any(is_in_files) {
            continue; // files win
        }
        if let Err(error) = controller.open(spec.clone()).await {
            let UpstreamSpec { service, listen, .. } = spec;
            warn!(%service, %listen, %error, "cannot open again what was open before");
        }
    }
    Ok(())
}

/// Opens the public gateway, if the settings say so.
async fn open_public(
    controller: &mut Controller,
    settings: &Settings,
    proxy: &Proxy,
    certificates: &Arc<PublicCertificates>,
    events: &EventLog,
) -> Result<(), StartError> {
    let Settings { public, redirect, .. } = settings;
    let Some(listen) = public.value else { return Ok(()) };
    let ingress = Ingress::new(Arc::clone(certificates));
    ingress.begin(settings, events).await;
    let invalid = |error: proxy::EntryError| ControlError::Invalid(error.to_string());
    let tls = Arc::clone(certificates).server_config()?;
    let opened = proxy.open_public(listen.into(), ingress.hosts.clone(), tls).await;
    let opened =
        opened.map_err(invalid).map_err(failed("gateway.public".into(), &public.origin))?;
    if let Some(from) = redirect.value {
        let port = opened.port().unwrap_or_default();
        let moved = proxy.open_redirect(from.into(), ingress.hosts.clone(), port).await;
        let moved = moved.map_err(invalid);
        let moved = moved.map_err(failed("gateway.redirect".into(), &redirect.origin))?;
        controller.doors.redirect = Some(moved);
    }
    controller.doors.public = Some(opened);
    controller.ingress = Some(ingress);
    controller.show();
    Ok(())
}

/// Ready once this member takes part, and until it drains.
async fn watch_readiness(
    ready: watch::Sender<Readiness>,
    mut settled: watch::Receiver<bool>,
    shutdown: Shutdown,
) {
    ready.send_replace(Readiness::NotReady("this member has not heard from its mesh yet"));
    tokio::select! {
        biased;
        () = shutdown.reached(Stage::Draining) => {}
        true = async { settled.wait_for(|settled| *settled).await.is_ok() } => {
            ready.send_replace(Readiness::Ready);
            shutdown.reached(Stage::Draining).await;
        }
    }
    ready.send_replace(Readiness::NotReady("the agent is draining"));
    // The API may ask until it is stopped, too.
    ready.closed().await;
}
