//! The driver of the pure node: QUIC connections and deadlines in, transmits out.
//!
//! One task owns the node, its connections and its timers. A turn drains what has arrived (up to
//! `TURN_INPUTS_MAX`), then the timers, then sends; nothing in it is slow, and its longest turn is
//! a metric: a late turn makes this very member suspect. Reading, dialling and delivering are tasks
//! of their own that talk to it through one bounded queue.

mod driver;
mod pool;

use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};

use super::{Endpoint, Incoming};
use crate::breaker::OwnWindow;
use crate::mesh::{Evidence, Mesh, Snapshot};
use crate::model::{Entry, EntryKind, Epoch, MemberId, MemberName, MemberPhase, Offer, StoreSize};
use crate::runtime::TaskGroup;
use crate::runtime::clock::Clock;
use crate::telemetry::{EventLog, Metrics};

use driver::Driver;

/// Commands that wait for a turn.
const COMMANDS_LEN: usize = 256;

/// What should be on disk, as of now.
#[derive(Clone, Debug, Default)]
pub struct Durable {
    /// All entries.
    pub entries: Vec<Entry>,
    /// Whom to dial after a restart.
    pub remembered: Vec<(MemberId, SocketAddr)>,
    /// Epochs up to here are to be taken, and [`GossipHandle::extend_epochs`] told.
    pub epochs_needed: Option<Epoch>,
}

#[derive(Debug)]
enum Command {
    Offers(Vec<Offer>),
    Phase(MemberPhase),
    Publish(Entry, oneshot::Sender<Result<(), String>>),
    Entries(EntryKind, oneshot::Sender<Vec<Entry>>),
    EntriesAbout(EntryKind, [u8; 16], oneshot::Sender<Vec<Entry>>),
    Holders(MemberName, oneshot::Sender<Vec<MemberId>>),
    StoreSizes(oneshot::Sender<Vec<StoreSize>>),
    Windows(Vec<OwnWindow>),
    Seed(SocketAddr),
    Address(SocketAddr),
    RetryContacts,
    Epochs(Epoch),
    Leave,
    Stop(oneshot::Sender<()>),
}

/// Talks to the gossip driver from any thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct GossipHandle {
    commands: mpsc::Sender<Command>,
}

impl GossipHandle {
    /// Says what this member serves.
    pub async fn set_offers(&self, offers: Vec<Offer>) {
        let _ = self.commands.send(Command::Offers(offers)).await; // stopping: nobody cares
    }

    /// Announces a phase of this member's life.
    pub async fn set_phase(&self, phase: MemberPhase) {
        let _ = self.commands.send(Command::Phase(phase)).await;
    }

    /// Spreads an entry. `None` when the driver has stopped.
    pub async fn publish(&self, entry: Entry) -> Option<Result<(), String>> {
        self.ask(|reply| Command::Publish(entry, reply)).await
    }

    /// All entries of a kind: of some kinds thousands, so not for questions that a stranger can
    /// cause. `None` when the driver has stopped.
    pub async fn entries(&self, kind: EntryKind) -> Option<Vec<Entry>> {
        self.ask(|reply| Command::Entries(kind, reply)).await
    }

    /// The entries of a kind about one subject that the root or any issuer signed. `None` when the
    /// driver has stopped.
    pub async fn entries_about(&self, kind: EntryKind, subject: MemberId) -> Option<Vec<Entry>> {
        self.ask(|reply| Command::EntriesAbout(kind, *subject.as_bytes(), reply)).await
    }

    /// The members that are enrolled under a name. `None` when the driver has stopped.
    pub async fn holders(&self, name: MemberName) -> Option<Vec<MemberId>> {
        self.ask(|reply| Command::Holders(name, reply)).await
    }

    /// How full each store is that peers can fill. `None` when the driver has stopped.
    pub async fn store_sizes(&self) -> Option<Vec<StoreSize>> {
        self.ask(Command::StoreSizes).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Gives what this agent's own calls saw; see [`Mesh::handle_windows`] for when. Waits while the
    /// driver is busy.
    pub async fn give_windows(&self, windows: Vec<OwnWindow>) {
        let _ = self.commands.send(Command::Windows(windows)).await;
    }

    /// One more address where a member may answer.
    pub async fn add_seed(&self, address: SocketAddr) {
        let _ = self.commands.send(Command::Seed(address)).await;
    }

    /// Others reach this member there from now on.
    pub async fn set_address(&self, address: SocketAddr) {
        let _ = self.commands.send(Command::Address(address)).await;
    }

    /// Dials everybody who is away soon.
    pub async fn retry_contacts(&self) {
        let _ = self.commands.send(Command::RetryContacts).await;
    }

    /// Epochs up to `until` are durable now.
    pub async fn extend_epochs(&self, until: Epoch) {
        let _ = self.commands.send(Command::Epochs(until)).await;
    }

    /// Says goodbye for good.
    pub async fn leave(&self) {
        let _ = self.commands.send(Command::Leave).await;
    }

    /// Sends what is still to be sent and closes all gossip connections.
    pub async fn stop(&self) {
        let _ = self.ask(Command::Stop).await; // it has stopped already
    }
}

/// The other end of a [`GossipHandle`]; made before the driver, which lives on its own thread.
pub struct GossipCommands {
    receiver: mpsc::Receiver<Command>,
}

/// A handle and the end that [`Gossip::run`] takes.
pub fn gossip_channel() -> (GossipHandle, GossipCommands) {
    let (commands, receiver) = mpsc::channel(COMMANDS_LEN);
    (GossipHandle { commands }, GossipCommands { receiver })
}

/// The driver, ready to run on the gossip thread.
pub struct Gossip {
    /// The pure node.
    pub mesh: Mesh,
    /// The agent's clock.
    pub clock: Clock,
    /// Dials on the gossip plane.
    pub endpoint: Endpoint,
    /// What others dialled.
    pub incoming: mpsc::Receiver<Incoming>,
    /// From handles.
    pub commands: GossipCommands,
    /// What the data plane saw.
    pub evidence: mpsc::Receiver<(MemberId, Evidence)>,
    /// For those who read it when they need it.
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// For those who wait for a change: the same one.
    pub snapshots: watch::Sender<Arc<Snapshot>>,
    /// For the disk.
    pub durable: watch::Sender<Durable>,
    /// Becomes true when this member takes part.
    pub settled: watch::Sender<bool>,
    /// What happened.
    pub events: EventLog,
    /// What is counted.
    pub metrics: Metrics,
    /// Owner of the tasks around the driver.
    pub tasks: TaskGroup,
}

impl Gossip {
    /// Drives the node until [`GossipHandle::stop`], or until every handle is gone.
    pub async fn run(self) {
        Driver::new(self).run().await;
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use crate::model::Enrolment;
    use crate::wire;

    /// Answers a handle out of a plain list of entries: what a mesh of one would know.
    pub(in crate::transport) async fn answer(mut commands: GossipCommands, mut known: Vec<Entry>) {
        while let Some(command) = commands.receiver.recv().await {
            match command {
                Command::Publish(entry, reply) => {
                    known.retain(|old| old.key() != entry.key());
                    known.push(entry);
                    let _ = reply.send(Ok(()));
                }
                Command::Entries(kind, reply) => {
                    let found = known.iter().filter(|entry| entry.key().kind == kind);
                    let _ = reply.send(found.cloned().collect());
                }
                Command::EntriesAbout(kind, subject, reply) => {
                    let is_about =
                        |entry: &&Entry| entry.key().kind == kind && entry.key().subject == subject;
                    let _ = reply.send(known.iter().filter(is_about).cloned().collect());
                }
                Command::Holders(name, reply) => {
                    let enrolments =
                        known.iter().filter(|entry| entry.key().kind == EntryKind::ENROLMENT);
                    let enrolled = enrolments
                        .map(|entry| wire::decode_payload::<Enrolment>(&entry.payload()).unwrap());
                    let named: Vec<_> = enrolled.filter(|one| one.name == name).collect();
                    let replaced = |id| named.iter().any(|one| one.replaces.contains(&id));
                    let holders = named.iter().map(|held| held.key.member_id());
                    let _ = reply.send(holders.filter(|id| !replaced(*id)).collect());
                }
                _ => {}
            }
        }
    }
}
