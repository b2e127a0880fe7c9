//! One agent: wiring and life cycle.
//!
//! Three threads, each with a runtime of its own, so that control work never waits behind bytes:
//! `data` owns the UDP port and moves traffic, `gossip` drives the pure node, and the caller's
//! runtime carries the local API, the enrolment door, the disk and this module.
//!
//! Stopping goes in stages: announce draining, stop taking work, let what is open end, announce the
//! restart (or the leave), say goodbye on the gossip plane, close the port, await every task.

mod advertise;
mod api;
mod check;
mod clocks;
mod control;
mod disk;
mod disowned;
mod drain;
mod embed;
mod follow;
mod forget;
mod identity;
mod ingress;
mod join;
mod left;
mod local;
mod reload;
mod seeds;
mod start;
mod twin;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::api::control::Reply;
use crate::api::{Control, ControlError, Identity, LogSlot, Readiness};
use crate::mesh::Snapshot;
use crate::model::{MemberId, MemberName, MemberPhase, StoreSize, Target};
use crate::proxy::Proxy;
use crate::runtime::{Shutdown, Stage, TaskGroup, Thread};
use crate::telemetry::{EventKind, EventLog, Log, Metrics};
use crate::tls::NodeCredentials;
use crate::tls::store::{DataDir, DataDirLock};
use crate::transport::gossip::GossipHandle;

pub use check::{Runs, machine as check_machine, not_answering, not_running};
pub use follow::Watch;
pub use join::{JoinError, JoinOptions, JoinReport, join};
pub use left::{come_back, has_left, way_back};
pub use local::{LocalError, LocalServices};
pub use start::StartError;

/// How a stop went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Everything that was open ended by itself.
    Drained,
    /// Something was still open at the deadline, and was cut.
    Cut,
}

/// A running agent: one member of a mesh, in this process.
///
/// It lives on two threads of its own and on the tokio runtime that started it, which needs its I/O
/// and time drivers. It answers on its local API, as `murmesh status` and its like ask it, logs with
/// `tracing`, and raises the number of files that the process may open as far as it may. Tasks share
/// it in an `Arc`.
///
/// [`Agent::stop`] ends it in order. An agent that is dropped instead ends at
/// once, as if it had crashed: what is open is cut, and the others notice by themselves.
pub struct Agent {
    id: MemberId,
    name: MemberName,
    identity: Arc<ArcSwap<Identity>>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    proxy: Proxy,
    gossip: GossipHandle,
    events: EventLog,
    metrics: Metrics,
    shutdown: Shutdown,
    control: mpsc::Sender<Control>,
    leaving: watch::Receiver<bool>,
    readiness: watch::Receiver<Readiness>,
    log: LogSlot,
    dir: DataDir,
    mesh_address: SocketAddr,
    api_address: Target,
    tasks: CancelOnDrop,
    /// Ends by itself once the gossip driver has handed over its last state and that is on disk.
    disk: TaskGroup,
    threads: Vec<Thread>,
    _lock: DataDirLock,
}

/// Some tasks hold their own group, so that it would never be the last clone that is dropped.
struct CancelOnDrop(TaskGroup);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Agent {
    /// Who this is, with the leaf in use now.
    pub fn credentials(&self) -> NodeCredentials {
        self.identity.load().credentials.clone()
    }

    /// This member's id.
    pub fn id(&self) -> MemberId {
        self.id
    }

    /// What people call this member.
    pub fn name(&self) -> &MemberName {
        &self.name
    }

    /// The address of the mesh port, with the port that was really bound.
    pub fn mesh_address(&self) -> SocketAddr {
        self.mesh_address
    }

    /// Where the local API answers: the port on loopback that was really bound, or the unix socket that
    /// was asked for instead. It answers on `<data_dir>/api.sock`, too.
    pub fn api_address(&self) -> &Target {
        &self.api_address
    }

    /// The mesh as seen from here.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Asks the agent what the local API would ask it.
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Control) -> Result<T, ControlError> {
        Control::ask(&self.control, make).await
    }

    /// What happened.
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// What is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// How full each store is that other members can fill; none once the agent stops.
    pub async fn store_sizes(&self) -> Vec<StoreSize> {
        self.gossip.store_sizes().await.unwrap_or_default()
    }

    /// Tells the agent which log is its process's: its API then says what was dropped of it, shows its
    /// last lines and changes its filter. The first one stays.
    pub fn show_log(&self, log: Log) {
        self.metrics.show_log_lines_dropped(log.lines().dropped());
        self.log.fill(log);
    }

    /// Returns once the data plane can serve. Cancel safe.
    pub async fn ready(&self) {
        let mut readiness = self.readiness.clone();
        let _ = readiness.wait_for(|ready| *ready == Readiness::Ready).await; // or it stops
    }

    /// Returns when the agent is to stop, and how: `Left` when somebody asked it to leave for good,
    /// `Restarting` when a part of it failed. Cancel safe.
    pub async fn stopping(&self) -> MemberPhase {
        let mut leaving = self.leaving.clone();
        tokio::select! {
            biased;
            true = async { leaving.wait_for(|leaving| *leaving).await.is_ok() } => {
                MemberPhase::Left
            }
            () = self.shutdown.reached(Stage::Draining) => MemberPhase::Restarting,
        }
    }

    /// Stops the agent: announces it, lets what is open end for at most `drain`, then says why it
    /// goes (`phase`: restarting or left) and awaits every task. Left lasts: this directory starts no
    /// agent until it is brought back ([`come_back`], [`join`]).
    pub async fn stop(self, phase: MemberPhase, drain: Duration) -> Stopped {
        self.stop_or_cut(phase, drain, std::future::pending()).await
    }

    /// [`Agent::stop`], but once `cut` has returned what is still open is reset and the rest of the
    /// way takes about a second.
    pub async fn stop_or_cut(
        self,
        phase: MemberPhase,
        drain: Duration,
        cut: impl Future<Output = ()>,
    ) -> Stopped {
        let Self { gossip, proxy, shutdown, events, tasks, .. } = &self;
        shutdown.advance(Stage::Draining);
        if phase == MemberPhase::Left
            && let Err(error) = left::mark(&self.dir)
        {
            warn!(%error, "this machine leaves, but its next agent will not know");
        }
        let reason = format!("open connections have {drain:?}");
        events.record(EventKind::AgentDraining, self.credentials().name(), reason);
        gossip.set_phase(MemberPhase::Draining).await;
        let is_drained = tokio::select! {
            biased;
            is_drained = proxy.drain(drain) => is_drained,
            () = cut => false, // closing resets it
        };
        match phase {
            MemberPhase::Left => gossip.leave().await,
            phase => gossip.set_phase(phase).await,
        }
        gossip.stop().await;
        shutdown.advance(Stage::Closing);
        proxy.close().await;
        tasks.0.stop().await;
        self.disk.finished().await;
        join_all(self.threads).await;
        if is_drained { Stopped::Drained } else { Stopped::Cut }
    }
}

async fn join_all(threads: Vec<Thread>) {
    for thread in threads {
        if let Err(error) = thread.join().await {
            warn!(%error, "a thread did not end in order");
        }
    }
}
