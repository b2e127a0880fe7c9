//! Connections to members: dialled once, shared, bounded.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, VarInt};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::super::{Endpoint, Incoming};
use crate::mesh::{Channel, Destination, MESSAGE_LEN_MAX, Transmit};
use crate::model::{MemberId, Moment};
use crate::runtime::TaskGroup;
use crate::telemetry::Metrics;
use crate::tls::{Plane, peer_of};

/// Members with a connection; the least recently used goes first.
const PEERS_MAX: usize = 512;
/// Connections kept to one member: one dialled by each side.
const CONNECTIONS_PER_PEER_MAX: usize = 2;
/// Dials under way at once; more wait for their turn.
const DIALS_MAX: usize = 16;
/// Destinations being dialled or waiting for it.
const DIALLING_MAX: usize = 512;
/// Transmits that wait for one dial.
const WAITING_PER_DIAL_MAX: usize = 64;
/// A dial, and the delivery of a message, take at most this long.
const DELIVERY_TIME_MAX: Duration = Duration::from_secs(3);
/// A message must have come whole in this time.
const MESSAGE_TIME_MAX: Duration = Duration::from_secs(10);

/// What came in from the tasks around the driver.
pub(super) enum Input {
    Datagram(MemberId, Bytes),
    Message(MemberId, Vec<u8>),
    Accepted(MemberId, Connection),
    Dialled(Destination, Result<(MemberId, Connection), String>),
    Undelivered(Destination, MemberId, usize),
    Closed(MemberId, usize),
}

/// Connections to members, and dials under way.
pub(super) struct Pool {
    me: MemberId,
    endpoint: Endpoint,
    inputs: mpsc::Sender<Input>,
    tasks: TaskGroup,
    metrics: Metrics,
    dials: Arc<Semaphore>,
    /// At most [`PEERS_MAX`].
    peers: BTreeMap<MemberId, Slot>,
    /// Whom a seed's address proved to be; at most as many as there are seeds.
    seeds: BTreeMap<SocketAddr, MemberId>,
    /// At most [`DIALLING_MAX`], with at most [`WAITING_PER_DIAL_MAX`] transmits each.
    dialling: BTreeMap<Destination, VecDeque<Transmit>>,
}

struct Slot {
    /// Newest last; at most [`CONNECTIONS_PER_PEER_MAX`].
    connections: Vec<Connection>,
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
    ) -> Self {
        let accepting = accept_loop(endpoint.clone(), incoming, inputs.clone(), tasks.clone());
        tasks.spawn("gossip-accept", accepting);
        Self {
            me,
            endpoint,
            inputs,
            tasks,
            metrics: metrics.clone(),
            dials: Arc::new(Semaphore::new(DIALS_MAX)),
            peers: BTreeMap::new(),
            seeds: BTreeMap::new(),
            dialling: BTreeMap::new(),
        }
    }

    /// Who we are.
    pub(super) fn me(&self) -> MemberId {
        self.me
    }

    /// Drops what waited for a dial that failed.
    pub(super) fn give_up(&mut self, to: &Destination) {
        self.dialling.remove(to);
    }

    /// Closes every connection.
    pub(super) fn close_all(&mut self) {
        for slot in std::mem::take(&mut self.peers).into_values() {
            slot.connections.iter().for_each(|connection| close(connection, b"stopping"));
        }
    }

    /// Sends a transmit on the member's connection, or dials for it.
    pub(super) fn send(&mut self, now: Moment, transmit: Transmit) {
        let member = match transmit.to {
            Destination::Member { id, .. } => Some(id),
            Destination::Seed(address) => self.seeds.get(&address).copied(),
        };
        let slot = member.and_then(|member| self.peers.get_mut(&member));
        let Some((member, slot)) = member.zip(slot) else { return self.dial(transmit) };
        slot.used_at = now;
        let live = slot.connections.iter().rev().find(|open| open.close_reason().is_none());
        let Some(connection) = live.cloned() else { return self.dial(transmit) };
        match transmit.channel {
            Channel::Datagram => self.send_datagram(&connection, transmit),
            Channel::Message => self.send_message(member, connection, transmit),
        }
    }

    fn send_datagram(&mut self, connection: &Connection, transmit: Transmit) {
        match connection.send_datagram(transmit.data.clone()) {
            Ok(()) => {
                self.metrics.gossip_datagrams_sent.inc();
            }
            Err(quinn::SendDatagramError::ConnectionLost(_)) => self.dial(transmit),
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
            if !matches!(timeout(DELIVERY_TIME_MAX, deliver).await, Ok(Some(()))) {
                let input = Input::Undelivered(to, member, connection.stable_id());
                let _ = inputs.send(input).await; // the driver has stopped
            }
        });
    }

    /// Dials whom a transmit is for; it and those after it wait. One dial per destination.
    fn dial(&mut self, transmit: Transmit) {
        let to = transmit.to;
        if let Some(waiting) = self.dialling.get_mut(&to) {
            if waiting.len() < WAITING_PER_DIAL_MAX {
                waiting.push_back(transmit);
            } else {
                self.metrics.count_gossip_dropped("dial_queue_full");
            }
            return;
        }
        if self.dialling.len() >= DIALLING_MAX {
            return self.metrics.count_gossip_dropped("too_many_dials");
        }
        self.dialling.insert(to, VecDeque::from([transmit]));
        let (endpoint, dials, inputs) =
            (self.endpoint.clone(), self.dials.clone(), self.inputs.clone());
        self.tasks.spawn_connection("gossip-dial", async move {
            let _permit = dials.acquire_owned().await; // never closed
            let (address, expected) = match to {
                Destination::Member { id, address } => (address, Some(id)),
                Destination::Seed(address) => (address, None),
            };
            let dial = endpoint.connect(Plane::Gossip, address, expected);
            let dialled = match timeout(DELIVERY_TIME_MAX, dial).await {
                Ok(Ok(connection)) => match peer_of(&connection) {
                    Some(peer) => Ok((peer.id, connection)),
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
        member: MemberId,
        connection: Connection,
    ) -> VecDeque<Transmit> {
        if let Destination::Seed(address) = to {
            self.seeds.insert(address, member);
        }
        self.adopt(now, member, connection);
        self.dialling.remove(&to).unwrap_or_default()
    }

    /// Takes a connection into the pool and starts to read from it.
    pub(super) fn adopt(&mut self, now: Moment, member: MemberId, connection: Connection) {
        if !self.peers.contains_key(&member) && self.peers.len() >= PEERS_MAX {
            let idle = self.peers.iter().min_by_key(|(_, slot)| slot.used_at).map(|(id, _)| *id);
            idle.into_iter().for_each(|id| self.close(id, None));
        }
        let fresh = || Slot { connections: Vec::new(), used_at: now };
        let slot = self.peers.entry(member).or_insert_with(fresh);
        if slot.connections.len() >= CONNECTIONS_PER_PEER_MAX {
            close(&slot.connections.remove(0), b"replaced");
        }
        slot.connections.push(connection.clone());
        slot.used_at = now;
        let inputs = self.inputs.clone();
        let (tasks, metrics) = (self.tasks.clone(), self.metrics.clone());
        self.tasks.spawn_connection("gossip-read", async move {
            read_loop(member, &connection, &inputs, &tasks, &metrics).await;
            let _ = inputs.send(Input::Closed(member, connection.stable_id())).await;
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
                let _ = inputs.send(Input::Accepted(peer.id, connection)).await;
            }
        });
    }
}

/// Reads datagrams and messages until the connection ends.
async fn read_loop(
    member: MemberId,
    connection: &Connection,
    inputs: &mpsc::Sender<Input>,
    tasks: &TaskGroup,
    metrics: &Metrics,
) {
    loop {
        tokio::select! {
            biased;
            datagram = connection.read_datagram() => {
                let Ok(data) = datagram else { return };
                if inputs.try_send(Input::Datagram(member, data)).is_err() {
                    metrics.count_gossip_dropped("inbox_full");
                }
            }
            stream = connection.accept_uni() => {
                // Their number is bounded by the plane's stream limit.
                let Ok(mut stream) = stream else { return };
                let (inputs, metrics) = (inputs.clone(), metrics.clone());
                tasks.spawn_connection("gossip-stream", async move {
                    match timeout(MESSAGE_TIME_MAX, stream.read_to_end(MESSAGE_LEN_MAX)).await {
                        Ok(Ok(data)) => {
                            let _ = inputs.send(Input::Message(member, data)).await;
                        }
                        Ok(Err(_)) => metrics.count_gossip_dropped("message_broken"),
                        Err(_) => metrics.count_gossip_dropped("message_slow"),
                    }
                });
            }
        }
    }
}
