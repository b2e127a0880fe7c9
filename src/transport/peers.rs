//! One data connection to each peer that this member calls: dialled once, shared, watched, dropped
//! when it rests.
//!
//! The other direction has a connection of its own, dialled by the peer, so simultaneous dials need
//! no decision. What is seen here of a member (it answered, it cannot be reached, it has fallen
//! silent) goes to the gossip driver as [`Evidence`]: the data path notices long before SWIM does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::FutureExt;
use parking_lot::Mutex;
use quinn::{Connection, VarInt};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::debug;

use super::credit::Credit;
use super::endpoint::{DialError, Endpoint, refusal};
use super::revoker::Revoker;
use super::silence::{self, SILENCE_MAX, Silence, avoid_after};
use super::tunnel::{self, OpenError, TunnelReader, TunnelWriter};
use crate::mesh::Evidence;
use crate::model::{MemberId, Moment};
use crate::runtime::TaskGroup;
use crate::runtime::clock::Clock;
use crate::telemetry::Metrics;
use crate::tls::{Peer, Plane, peer_of};

/// How long a dial of the data plane may take: shorter than any handshake's limit, so that a call
/// still has time for other instances.
const DIAL_TIME_MAX: Duration = Duration::from_millis(1_500);
/// How often connections are looked at: so much later than it could a silence is noticed.
const TICK: Duration = Duration::from_millis(50);
/// How long a connection without a stream is kept.
const REST_MAX: Duration = Duration::from_secs(60);
/// Time between two samples of the round trip, and between two words of evidence on one peer.
const SAMPLE_PERIOD: Duration = Duration::from_secs(1);

/// A data connection that this member dialled.
#[derive(Debug)]
pub struct Link {
    connection: Connection,
    credit: Credit,
    peer: Peer,
    evidence: mpsc::Sender<(MemberId, Evidence)>,
    /// Set while nothing has been heard for longer than [`avoid_after`].
    silent: watch::Sender<bool>,
    /// Whether the peer answered since the last word of evidence.
    has_answered: AtomicBool,
}

impl Link {
    /// Opens a tunnel.
    pub async fn open(&self) -> Result<(TunnelWriter, TunnelReader), OpenError> {
        let (place, _) = self.credit.enter(&self.connection);
        tunnel::open(&self.connection, place).await
    }

    /// Notes that the peer answered a call.
    pub fn note_answer(&self) {
        self.has_answered.store(true, Ordering::Relaxed);
    }

    /// Whether the peer has not been heard for 600 ms and a round trip. New calls had better go
    /// elsewhere; it may be only paused, so nothing is given up for that.
    pub fn is_silent(&self) -> bool {
        *self.silent.borrow()
    }

    /// Returns once the peer is silent. Cancel safe.
    pub async fn silent(&self) {
        // The sender lives in self: the channel cannot be closed while we wait.
        let _ = self.silent.subscribe().wait_for(|is_silent| *is_silent).await;
    }

    /// Whether the connection stands.
    pub fn is_open(&self) -> bool {
        self.connection.close_reason().is_none()
    }

    /// Whether the peer refused our certificate after all: then it has read no stream of ours.
    pub fn was_refused(&self) -> bool {
        self.connection.close_reason().is_some_and(|error| refusal(&error).is_some())
    }

    /// Round trip, as the congestion controller sees it.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    fn tell(&self, evidence: Evidence) {
        let _ = self.evidence.try_send((self.peer.id, evidence)); // a full queue: others will come
    }
}

/// A data connection as listings show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkView {
    /// Round trip, as the congestion controller sees it.
    pub rtt: Duration,
    /// Whether the peer has not been heard for 600 ms and a round trip.
    pub is_silent: bool,
    /// Of UDP payload, in this connection's life.
    pub bytes_sent: u64,
    /// Of UDP payload, in this connection's life.
    pub bytes_received: u64,
}

type Dialled = Option<Result<Arc<Link>, DialError>>;

#[derive(Debug)]
enum Slot {
    Dialling(watch::Receiver<Dialled>),
    Open(Arc<Link>),
}

/// The data connections that this member dialled. Lives on the data thread.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    endpoint: Endpoint,
    metrics: Metrics,
    tasks: TaskGroup,
    evidence: mpsc::Sender<(MemberId, Evidence)>,
    slots: Mutex<BTreeMap<MemberId, Slot>>,
    /// Those among them that are silent: read with every call, and nearly always empty.
    silent: ArcSwap<BTreeSet<MemberId>>,
    revoker: Revoker,
    clock: Clock,
}

impl Peers {
    /// No connections yet. `evidence` is told what is seen of members; words that find it full are
    /// dropped; `revoker` says whose connections end.
    pub fn new(
        endpoint: Endpoint,
        metrics: Metrics,
        tasks: TaskGroup,
        evidence: mpsc::Sender<(MemberId, Evidence)>,
        revoker: Revoker,
        clock: Clock,
    ) -> Self {
        let (slots, silent) = Default::default();
        let inner = Inner { endpoint, metrics, tasks, evidence, slots, silent, revoker, clock };
        let peers = Self { inner: Arc::new(inner) };
        peers.inner.tasks.spawn("watch data connections", peers.clone().watch());
        peers
    }

    /// The connection to `member`, dialled at `address` unless it is there. Callers at the same
    /// time share one dial, which goes on when they give up.
    pub async fn link(
        &self,
        member: MemberId,
        address: SocketAddr,
    ) -> Result<Arc<Link>, DialError> {
        let mut dialled = {
            let mut slots = self.inner.slots.lock();
            match slots.get(&member) {
                Some(Slot::Open(link)) if link.connection.close_reason().is_none() => {
                    return Ok(Arc::clone(link));
                }
                // A dial that ended without a word has panicked, which was reported: dial anew.
                Some(Slot::Dialling(dialled)) if dialled.has_changed().is_ok() => dialled.clone(),
                _ => {
                    let dialled = self.dial(member, address);
                    slots.insert(member, Slot::Dialling(dialled.clone()));
                    dialled
                }
            }
        };
        match dialled.wait_for(Option::is_some).await.map(|outcome| outcome.clone()) {
            Ok(Some(outcome)) => outcome,
            _ => Err(DialError::Timeout), // the group is stopped
        }
    }

    /// The connection to `member`, if it stands.
    pub fn standing(&self, member: &MemberId) -> Option<Arc<Link>> {
        match self.inner.slots.lock().get(member) {
            Some(Slot::Open(link)) if link.connection.close_reason().is_none() => {
                Some(Arc::clone(link))
            }
            _ => None,
        }
    }

    /// Whether `member` was connected and has not been heard for 600 ms and a round trip, as the last
    /// look has it. Takes no lock.
    pub fn is_silent(&self, member: &MemberId) -> bool {
        self.inner.silent.load().contains(member)
    }

    /// The data connection to `member`, if one is open.
    pub fn view(&self, member: &MemberId) -> Option<LinkView> {
        let slots = self.inner.slots.lock();
        let Some(Slot::Open(link)) = slots.get(member) else { return None };
        let stats = link.connection.stats();
        link.connection.close_reason().is_none().then(|| LinkView {
            rtt: link.rtt(),
            is_silent: link.is_silent(),
            bytes_sent: stats.udp_tx.bytes,
            bytes_received: stats.udp_rx.bytes,
        })
    }

    /// What peers have said beside their tunnels since this was last asked: of each at most as much as
    /// its connection keeps, 8 KiB.
    pub fn told(&self) -> Vec<(MemberId, Bytes)> {
        let slots = self.inner.slots.lock();
        let mut told = Vec::new();
        for (member, slot) in slots.iter() {
            let Slot::Open(link) = slot else { continue };
            while let Some(Ok(word)) = link.connection.read_datagram().now_or_never() {
                told.push((*member, word));
            }
        }
        told
    }

    /// How many connections are open.
    pub fn len(&self) -> usize {
        self.inner.slots.lock().values().filter(|slot| matches!(slot, Slot::Open(_))).count()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn dial(&self, member: MemberId, address: SocketAddr) -> watch::Receiver<Dialled> {
        let (report, dialled) = watch::channel(None);
        let inner = Arc::clone(&self.inner);
        self.inner.tasks.spawn_connection("dial", async move {
            let outcome = inner.connect(member, address).await;
            let evidence = match &outcome {
                Ok(_) => Evidence::Answered,
                Err(_) => Evidence::Failed,
            };
            let _ = inner.evidence.try_send((member, evidence)); // a full queue: others will come
            let mut slots = inner.slots.lock();
            match &outcome {
                Ok(link) => slots.insert(member, Slot::Open(Arc::clone(link))),
                Err(error) => {
                    debug!(peer = %member, %address, %error, "data dial failed");
                    slots.remove(&member)
                }
            };
            drop(slots);
            report.send_replace(Some(outcome));
        });
        dialled
    }

    async fn watch(self) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watched: BTreeMap<usize, Watched> = BTreeMap::new();
        loop {
            ticks.tick().await;
            self.inner.look(self.inner.clock.now(), &mut watched);
        }
    }
}

/// What the last look at a connection saw.
#[derive(Clone, Copy, Debug)]
struct Watched {
    silence: Silence,
    used_at: Moment,
    sampled_at: Moment,
    seen_at: Moment,
}

impl Inner {
    async fn connect(&self, member: MemberId, address: SocketAddr) -> Result<Arc<Link>, DialError> {
        let dial = self.endpoint.connect(Plane::Data, address, Some(member));
        let connection = timeout(DIAL_TIME_MAX, dial).await.map_err(|_| DialError::Timeout)??;
        // The handshake has read the same certificate.
        let peer = peer_of(&connection).ok_or(DialError::Refused { reason: "no_certificate" })?;
        Ok(Arc::new(Link {
            connection,
            credit: Credit::default(),
            peer,
            evidence: self.evidence.clone(),
            silent: watch::Sender::new(false),
            has_answered: AtomicBool::new(false),
        }))
    }

    /// Looks at every connection: notices silence, tells answers, takes away what is gone or rests, and
    /// whom nobody vouches for any more.
    fn look(&self, now: Moment, watched: &mut BTreeMap<usize, Watched>) {
        self.slots.lock().retain(|_, slot| {
            let Slot::Open(link) = slot else { return true };
            if link.connection.close_reason().is_some() {
                if !link.is_silent() {
                    link.tell(Evidence::Failed);
                }
                return false;
            }
            if self.revoker.close_if_lost(&link.connection, &link.peer) {
                link.tell(Evidence::Failed);
                return false;
            }
            let heard = silence::heard(&link.connection);
            let silence = Silence::new(now, heard);
            let fresh = Watched { silence, used_at: now, sampled_at: now, seen_at: now };
            let seen = watched.entry(link.connection.stable_id()).or_insert(fresh);
            seen.seen_at = now;
            if link.credit.is_in_use() || Arc::strong_count(link) > 1 {
                seen.used_at = now; // a tunnel is open, or somebody is about to open one
            }
            if now.since(seen.used_at) > REST_MAX {
                link.connection.close(VarInt::from_u32(0), b"resting");
                return false;
            }
            let lasts = seen.silence.look(now, heard);
            self.judge(link, lasts >= avoid_after(link.rtt()).min(SILENCE_MAX));
            if lasts >= SILENCE_MAX {
                silence::close(&link.connection);
                return false;
            }
            if now.since(seen.sampled_at) >= SAMPLE_PERIOD {
                seen.sampled_at = now;
                self.sample(link);
            }
            true
        });
        watched.retain(|_, seen| seen.seen_at == now);
        self.note_silent();
    }

    fn note_silent(&self) {
        let slots = self.slots.lock();
        let silent = slots.iter().filter_map(|(member, slot)| match slot {
            Slot::Open(link) if link.is_silent() => Some(*member),
            _ => None,
        });
        let silent: BTreeSet<_> = silent.collect();
        if silent != **self.silent.load() {
            self.silent.store(Arc::new(silent));
        }
    }

    fn judge(&self, link: &Link, is_silent: bool) {
        let has_changed = link.silent.send_if_modified(|was| {
            let has_changed = *was != is_silent;
            *was = is_silent;
            has_changed
        });
        if has_changed {
            debug!(peer = %link.peer.id, is_silent, "data connection");
            link.tell(if is_silent { Evidence::Failed } else { Evidence::Answered });
        }
    }

    fn sample(&self, link: &Link) {
        if link.has_answered.swap(false, Ordering::Relaxed) {
            link.tell(Evidence::Answered);
        }
        self.metrics.tunnel_rtt.observe(link.rtt().as_secs_f64());
    }
}
