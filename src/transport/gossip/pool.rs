//! Connections to members: dialled once, shared, bounded.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, RecvStream, VarInt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

use super::super::{Endpoint, Incoming, Revoker};
use crate::mesh::{Channel, Destination, Dials, Lane, MESSAGE_LEN_MAX, Transmit};
use crate::model::{MemberId, Moment};
use crate::runtime::TaskGroup;
use crate::telemetry::{EventKind, EventLog, Metrics};
use crate::tls::{Peer, Plane, peer_of};

/// Members with a connection; the least recently used goes first.
const PEERS_MAX: usize = 512;
/// Connections kept to one member: one dialled by each side.
const CONNECTIONS_PER_PEER_MAX: usize = 2;
/// A dial, and the delivery of a short message, take at most this long.
const DELIVERY_TIME_MAX: Duration = Duration::from_secs(3);
/// Bytes a second that a link is expected to carry of a long message, whatever else it carries.
const SLOWEST_LINK: f64 = 64.0 * 1024.0;
/// A message must have come whole in this time: the longest over the slowest link.
const MESSAGE_TIME_MAX: Duration = Duration::from_secs(20);
/// Datagrams of one peer that wait for a turn; more are dropped, so that no peer takes the room of
/// the others. In a second an honest one sends a few, or some dozens when much has changed.
const DATAGRAMS_PER_PEER_MAX: usize = 256;
/// Messages of one peer that are being read or wait for a turn; further streams wait unaccepted,
/// and QUIC lets the peer open no more than a few.
const MESSAGES_PER_PEER_MAX: usize = 8;
/// KiB of messages of all peers that are being read or wait for a turn. One that is being read
/// counts as the longest, so that none waits for room when it has begun.
const MESSAGES_KIB_MAX: usize = 64 * 1024;
/// [`MESSAGE_LEN_MAX`].
const MESSAGE_KIB_MAX: u32 = (MESSAGE_LEN_MAX / 1024) as u32;

/// What came in from the tasks around the driver.
pub(super) enum Input {
    /// Its place is free again when the last is dropped.
    Datagram(MemberId, Bytes, OwnedSemaphorePermit),
    /// Its room is free again when the last is dropped.
    Message(MemberId, Vec<u8>, Room),
    Accepted(Peer, Connection),
    Dialled(Destination, Result<(Peer, Connection), String>),
    Undelivered(Destination, MemberId, usize),
    Closed(MemberId, usize),
}

/// What a message takes of the bounds on all messages, until it is dropped.
pub(super) struct Room {
    _bytes: OwnedSemaphorePermit,
    _share: OwnedSemaphorePermit,
}

/// Connections to members, and dials under way.
pub(super) struct Pool {
    me: MemberId,
    endpoint: Endpoint,
    inputs: mpsc::Sender<Input>,
    /// [`MESSAGES_KIB_MAX`], less what is taken.
    room: Arc<Semaphore>,
    tasks: TaskGroup,
    metrics: Metrics,
    events: EventLog,
    revoker: Revoker,
    dials: Dials,
    /// At most [`PEERS_MAX`].
    peers: BTreeMap<MemberId, Slot>,
    /// Whom a seed's address proved to be; at most as many as there are seeds.
    seeds: BTreeMap<SocketAddr, MemberId>,
}

struct Slot {
    /// Newest last; at most [`CONNECTIONS_PER_PEER_MAX`].
    connections: Vec<Connection>,
    /// [`MESSAGES_PER_PEER_MAX`], less those taken; of all its connections together.
    share: Arc<Semaphore>,
    /// [`DATAGRAMS_PER_PEER_MAX`], less those taken; of all its connections together.
    datagrams: Arc<Semaphore>,
    used_at: Moment,
}

impl Pool {
    /// An empty pool that accepts from now on. Everything it hears goes into `inputs`.
    pub(super) fn new(
        me: MemberId,
        endpoint: Endpoint,
        incoming: mpsc::Receiver<Incoming>,
        inputs: mpsc::Sender<Input>,
        tasks: TaskGroup,
        metrics: &Metrics,
        events: &EventLog,
    ) -> Self {
        let revoker = Revoker::new(endpoint.trust().clone(), metrics.clone(), events.clone());
        let accepting = accept_loop(endpoint.clone(), incoming, inputs.clone(), tasks.clone());
        tasks.spawn("gossip-accept", accepting);
        Self {
            me,
            endpoint,
            inputs,
            room: Arc::new(Semaphore::new(MESSAGES_KIB_MAX)),
            tasks,
            metrics: metrics.clone(),
            events: events.clone(),
            revoker,
            dials: Dials::default(),
            peers: BTreeMap::new(),
            seeds: BTreeMap::new(),
        }
    }

    /// Who we are.
    pub(super) fn me(&self) -> MemberId {
        self.me
    }

    /// Ends a dial that failed; returns what waited for it.
    pub(super) fn give_up(&mut self, to: &Destination) -> VecDeque<Transmit> {
        let waiting = self.dials.finish(to);
        self.begin_dials();
        waiting
    }

    /// Whether there is a live connection with a member.
    pub(super) fn reaches(&self, to: &Destination) -> bool {
        let Destination::Member { id, .. } = to else { return false };
        let slot = self.peers.get(id);
        slot.is_some_and(|slot| slot.connections.iter().any(|c| c.close_reason().is_none()))
    }

    /// Closes every connection.
    pub(super) fn close_all(&mut self) {
        for slot in std::mem::take(&mut self.peers).into_values() {
            slot.connections.iter().for_each(|connection| close(connection, b"stopping"));
        }
    }

    /// Sends a transmit on the member's connection, or dials for it in `lane`.
    pub(super) fn send(&mut self, now: Moment, lane: Lane, transmit: Transmit) {
        let member = match transmit.to {
            Destination::Member { id, .. } => Some(id),
            Destination::Seed(address) => self.seeds.get(&address).copied(),
        };
        let slot = member.and_then(|member| self.peers.get_mut(&member));
        let Some((member, slot)) = member.zip(slot) else { return self.dial(lane, transmit) };
        slot.used_at = now;
        let live = slot.connections.iter().rev().find(|open| open.close_reason().is_none());
        let Some(connection) = live.cloned() else { return self.dial(lane, transmit) };
        match transmit.channel {
            Channel::Datagram => self.send_datagram(&connection, lane, transmit),
            Channel::Message => self.send_message(member, connection, transmit),
        }
    }

    fn send_datagram(&mut self, connection: &Connection, lane: Lane, transmit: Transmit) {
        match connection.send_datagram(transmit.data.clone()) {
            Ok(()) => {
                self.metrics.gossip_datagrams_sent.inc();
            }
            Err(quinn::SendDatagramError::ConnectionLost(_)) => self.dial(lane, transmit),
            Err(_) => self.metrics.count_gossip_dropped("datagram_too_large"),
        }
    }

    /// Delivers a message on a stream of its own, and reports when that fails.
    fn send_message(&self, member: MemberId, connection: Connection, transmit: Transmit) {
        let (to, inputs) = (transmit.to, self.inputs.clone());
        self.tasks.spawn_connection("gossip-message", async move {
            let deliver = async {
                let mut stream = connection.open_uni().await.ok()?;
                stream.write_all(&transmit.data).await.ok()?;
                stream.finish().ok()?;
                stream.stopped().await.ok()?.is_none().then_some(()) // none: all was acknowledged
            };
            if !matches!(timeout(patience(transmit.data.len()), deliver).await, Ok(Some(()))) {
                let input = Input::Undelivered(to, member, connection.stable_id());
                let _ = inputs.send(input).await; // the driver has stopped
            }
        });
    }

    /// Dials whom a transmit is for; it and those after it wait. One dial per destination.
    fn dial(&mut self, lane: Lane, transmit: Transmit) {
        if let Err(reason) = self.dials.push(lane, transmit) {
            self.metrics.count_gossip_dropped(reason);
        }
        self.begin_dials();
    }

    fn begin_dials(&mut self) {
        while let Some(to) = self.dials.poll_dial() {
            self.begin_dial(to);
        }
    }

    fn begin_dial(&self, to: Destination) {
        let (endpoint, inputs) = (self.endpoint.clone(), self.inputs.clone());
        self.tasks.spawn_connection("gossip-dial", async move {
            let (address, expected) = match to {
                Destination::Member { id, address } => (address, Some(id)),
                Destination::Seed(address) => (address, None),
            };
            let dial = endpoint.connect(Plane::Gossip, address, expected);
            let dialled = match timeout(DELIVERY_TIME_MAX, dial).await {
                Ok(Ok(connection)) => match peer_of(&connection) {
                    Some(peer) => Ok((peer, connection)),
                    None => Err("the peer proved nothing".to_owned()),
                },
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {DELIVERY_TIME_MAX:?}")),
            };
            let _ = inputs.send(Input::Dialled(to, dialled)).await; // the driver has stopped
        });
    }

    /// Takes a dialled connection; returns what waited for it.
    pub(super) fn dialled(
        &mut self,
        now: Moment,
        to: Destination,
        peer: Peer,
        connection: Connection,
    ) -> VecDeque<Transmit> {
        if let Destination::Seed(address) = to {
            self.seeds.insert(address, peer.id);
        }
        self.adopt(now, peer, connection);
        let waiting = self.dials.finish(&to);
        self.begin_dials();
        waiting
    }

    /// Takes a connection into the pool and starts to read from it.
    pub(super) fn adopt(&mut self, now: Moment, peer: Peer, connection: Connection) {
        let member = peer.id;
        if !self.peers.contains_key(&member) && self.peers.len() >= PEERS_MAX {
            let idle = self.peers.iter().min_by_key(|(_, slot)| slot.used_at).map(|(id, _)| *id);
            idle.into_iter().for_each(|id| self.close(id, None));
        }
        let fresh = || Slot {
            connections: Vec::new(),
            share: Arc::new(Semaphore::new(MESSAGES_PER_PEER_MAX)),
            datagrams: Arc::new(Semaphore::new(DATAGRAMS_PER_PEER_MAX)),
            used_at: now,
        };
        let slot = self.peers.entry(member).or_insert_with(fresh);
        if slot.connections.len() >= CONNECTIONS_PER_PEER_MAX {
            close(&slot.connections.remove(0), b"replaced");
        }
        slot.connections.push(connection.clone());
        slot.used_at = now;
        let reader = Reader {
            peer: Arc::new(peer),
            revoker: self.revoker.clone(),
            inputs: self.inputs.clone(),
            room: Arc::clone(&self.room),
            share: Arc::clone(&slot.share),
            datagrams: Arc::clone(&slot.datagrams),
            events: self.events.clone(),
            tasks: self.tasks.clone(),
            metrics: self.metrics.clone(),
        };
        let endpoint = self.endpoint.clone();
        self.tasks.spawn_connection("gossip-read", async move {
            reader.read(&connection).await;
            if let Some(end) = connection.close_reason() {
                endpoint.note_end(connection.remote_address(), &end);
            }
            let closed = Input::Closed(member, connection.stable_id());
            let _ = reader.inputs.send(closed).await; // the driver has stopped
        });
    }

    /// Closes one connection to a member, or all of them.
    pub(super) fn close(&mut self, member: MemberId, which: Option<usize>) {
        let Some(slot) = self.peers.get_mut(&member) else { return };
        slot.connections.retain(|connection| {
            let is_meant = which.is_none_or(|id| connection.stable_id() == id);
            if is_meant {
                close(connection, b"given up");
            }
            !is_meant
        });
        if slot.connections.is_empty() {
            self.peers.remove(&member);
        }
    }

    /// A connection has ended by itself.
    pub(super) fn forget(&mut self, member: MemberId, connection: usize) {
        let Some(slot) = self.peers.get_mut(&member) else { return };
        slot.connections.retain(|open| open.stable_id() != connection);
        if slot.connections.is_empty() {
            self.peers.remove(&member);
        }
    }
}

/// How long a message of `len` bytes may take. A slow link is no dead one: whoever is gone is found out
/// by the short messages.
fn patience(len: usize) -> Duration {
    DELIVERY_TIME_MAX + Duration::from_secs_f64(len as f64 / SLOWEST_LINK)
}

fn close(connection: &Connection, reason: &[u8]) {
    connection.close(VarInt::from_u32(0), reason);
}

/// Accepts gossip connections on this thread.
async fn accept_loop(
    endpoint: Endpoint,
    mut incoming: mpsc::Receiver<Incoming>,
    inputs: mpsc::Sender<Input>,
    tasks: TaskGroup,
) {
    while let Some(next) = incoming.recv().await {
        let (endpoint, inputs) = (endpoint.clone(), inputs.clone());
        tasks.spawn_connection("gossip-handshake", async move {
            if let Ok((connection, Some(peer))) = endpoint.accept(next).await {
                let _ = inputs.send(Input::Accepted(peer, connection)).await;
            }
        });
    }
}

/// Reads what one peer sends on one connection.
#[derive(Clone)]
struct Reader {
    peer: Arc<Peer>,
    revoker: Revoker,
    inputs: mpsc::Sender<Input>,
    room: Arc<Semaphore>,
    share: Arc<Semaphore>,
    datagrams: Arc<Semaphore>,
    tasks: TaskGroup,
    metrics: Metrics,
    events: EventLog,
}

impl Reader {
    /// Reads datagrams and messages until the connection ends.
    async fn read(&self, connection: &Connection) {
        let mut revoked = pin!(self.revoker.closed(connection, &self.peer));
        loop {
            tokio::select! {
                biased;
                () = &mut revoked => return,
                datagram = connection.read_datagram() => {
                    let Ok(data) = datagram else { return };
                    self.hand_over(data);
                }
                next = self.next_stream(connection) => {
                    let Some((stream, share)) = next else { return };
                    let reader = self.clone();
                    self.tasks.spawn_connection("gossip-stream", async move {
                        match reader.read_message(stream, share).await {
                            // An error: the driver has stopped.
                            Ok(message) => drop(reader.inputs.send(message).await),
                            Err(reason) => reader.metrics.count_gossip_dropped(reason),
                        }
                    });
                }
            }
        }
    }

    fn hand_over(&self, datagram: Bytes) {
        let Ok(place) = Arc::clone(&self.datagrams).try_acquire_owned() else {
            self.metrics.count_gossip_dropped("over_share");
            let reason = "more datagrams at once than a member sends";
            return self.events.record(EventKind::GossipRefused, &self.peer.name, reason);
        };
        if self.inputs.try_send(Input::Datagram(self.peer.id, datagram, place)).is_err() {
            self.metrics.count_gossip_dropped("inbox_full");
        }
    }

    /// The next message of the peer, once it may have one more. quinn frees a stream's number when
    /// it is read to its end, so that the plane's stream limit alone bounds nothing that waits
    /// after that. Cancel safe: a permit that is not used goes back, a stream stays unaccepted.
    async fn next_stream(
        &self,
        connection: &Connection,
    ) -> Option<(RecvStream, OwnedSemaphorePermit)> {
        let share = Arc::clone(&self.share).acquire_owned().await.ok()?; // never closed
        Some((connection.accept_uni().await.ok()?, share))
    }

    async fn read_message(
        &self,
        mut stream: RecvStream,
        share: OwnedSemaphorePermit,
    ) -> Result<Input, &'static str> {
        let room = Arc::clone(&self.room).acquire_many_owned(MESSAGE_KIB_MAX);
        let Ok(Ok(mut bytes)) = timeout(MESSAGE_TIME_MAX, room).await else {
            return Err("inbox_full");
        };
        let data = match timeout(MESSAGE_TIME_MAX, stream.read_to_end(MESSAGE_LEN_MAX)).await {
            Ok(Ok(data)) => data,
            Ok(Err(_)) => return Err("message_broken"),
            Err(_) => return Err("message_slow"),
        };
        let unused = bytes.num_permits().saturating_sub(data.len() / 1024 + 1);
        drop(bytes.split(unused));
        Ok(Input::Message(self.peer.id, data, Room { _bytes: bytes, _share: share }))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::runtime::Shutdown;
    use crate::tls::testing::mesh_of;
    use crate::transport::Limits;

    /// A pool, its inbox of `len` inputs, and a connection to it from a member called `b`.
    struct Joined {
        pool: Pool,
        inbox: mpsc::Receiver<Input>,
        sender: Connection,
        metrics: Metrics,
        events: EventLog,
        tasks: TaskGroup,
        _queues: [crate::transport::PlaneQueues; 1],
    }

    async fn joined(len: usize) -> Joined {
        let [a, b] = &mesh_of(&["a", "b"]).unwrap()[..] else { panic!("two members") };
        let (tasks, metrics) = (TaskGroup::new(Shutdown::default()), Metrics::new());
        let events = EventLog::new("a");
        let bind = |credentials| {
            let (listen, limits) = ((Ipv4Addr::LOCALHOST, 0), Limits { reset_secret: [7; 32] });
            Endpoint::bind(listen.into(), credentials, &limits, &metrics, &tasks).unwrap()
        };
        let ((ours, queues), (theirs, their_queues)) = (bind(a), bind(b));
        let (inputs, mut inbox) = mpsc::channel(len);
        let (me, at) = (a.member_id(), ours.local_address());
        let gossip = queues.gossip;
        let mut pool = Pool::new(me, ours, gossip, inputs, tasks.clone(), &metrics, &events);
        let sender = theirs.connect(Plane::Gossip, at, Some(me)).await.unwrap();
        let Some(Input::Accepted(peer, accepted)) = inbox.recv().await else { panic!("a peer") };
        pool.adopt(Moment::START, peer, accepted);
        Joined { pool, inbox, sender, metrics, events, tasks, _queues: [their_queues] }
    }

    #[tokio::test]
    async fn peer_that_floods_datagrams_has_its_share_of_the_inbox_and_is_named() {
        let mut joined = joined(INBOX_LEN).await;
        const INBOX_LEN: usize = 4 * DATAGRAMS_PER_PEER_MAX;
        // A few at a time: the buffers of quinn drop what is too much at once.
        let dropped = || joined.metrics.gossip_dropped("over_share");
        timeout(DELIVERY_TIME_MAX, async {
            while dropped() == 0 {
                joined.sender.send_datagram_wait(Bytes::from_static(&[1; 100])).await.unwrap();
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("a bound");
        assert_eq!(joined.inbox.len(), DATAGRAMS_PER_PEER_MAX, "three quarters are left to others");
        let told = joined.events.recent(0);
        let blamed = |event: &crate::telemetry::Event| event.subject == "b";
        assert!(told.iter().any(blamed), "{told:?}");
        drop(joined.inbox.recv().await);
        let before = dropped();
        joined.sender.send_datagram(Bytes::from_static(b"again")).unwrap();
        let taken = async {
            while joined.inbox.len() < DATAGRAMS_PER_PEER_MAX {
                tokio::task::yield_now().await;
            }
        };
        timeout(DELIVERY_TIME_MAX, taken).await.expect("one that is handled makes room for one");
        assert_eq!(dropped(), before);
        joined.tasks.stop().await;
    }

    /// quinn's limit is 64 streams at once, and it frees a stream's number when it has been read.
    #[tokio::test]
    async fn peer_has_a_few_messages_in_memory_however_many_it_sends() {
        const SENT: usize = 200;
        let Joined { pool, mut inbox, sender, tasks, _queues, .. } = joined(SENT).await;
        let connection = sender.clone();
        tasks.spawn_connection("sender", async move {
            for _ in 0..SENT {
                let mut stream = connection.open_uni().await.unwrap();
                stream.write_all(&[1; 5_000]).await.unwrap();
                stream.finish().unwrap();
            }
        });
        let mut held = VecDeque::new();
        for _ in 0..MESSAGES_PER_PEER_MAX {
            held.push_back(inbox.recv().await);
        }
        let more = timeout(Duration::from_millis(300), inbox.recv()).await;
        assert!(more.is_err(), "no more while the driver has not taken these");
        let taken = MESSAGES_KIB_MAX - pool.room.available_permits();
        assert_eq!(taken, MESSAGES_PER_PEER_MAX * 5, "5,000 bytes are 5 KiB each");
        for number in MESSAGES_PER_PEER_MAX..SENT {
            held.pop_front();
            let next = timeout(DELIVERY_TIME_MAX, inbox.recv()).await;
            assert!(matches!(next, Ok(Some(Input::Message(..)))), "message {number}");
            held.push_back(next.unwrap());
        }
        held.clear();
        assert_eq!(pool.room.available_permits(), MESSAGES_KIB_MAX, "all room is free again");
    }
}
