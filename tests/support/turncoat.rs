//! A member that somebody else has taken over: its certificate is valid and its key signs, and what it
//! says is made by hand.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use bytes::Bytes;
use murmesh::membership::{Belief, Identity, MemberUpdate};
use murmesh::model::{Entry, EntryKind, Epoch, MemberPhase, MemberRecord};
use murmesh::tls::store::DataDir;
use murmesh::tls::{NodeCredentials, Plane, server_name};
use murmesh::wire;
use quinn::{Connection, Endpoint};
use serde::{Deserialize, Serialize};

use super::agent::Agent;
use super::clients::runtime;
use super::strangers::dial;

/// The kinds of messages that members send each other on streams.
pub mod kind {
    pub const HELLO: u8 = 1;
    pub const PACKET: u8 = 2;
    pub const ROOTS: u8 = 3;
    pub const SUMS: u8 = 4;
    pub const LISTING: u8 = 5;
    pub const STATES: u8 = 6;
    pub const WANT: u8 = 7;
    pub const ENTRIES: u8 = 8;
    pub const CONVICTED: u8 = 9;
}

/// The detector's messages, as they travel.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Said {
    Ping(u8),
    Ack(u8),
    PingReq(Identity, u8),
    IndirectPing(Identity, u8),
    IndirectAck(Identity, u8),
    ForwardedAck(Identity, u8),
    Announce,
    Feed,
    Gossip,
    Broadcast,
    TurnUndead,
}

/// A member that was taken over.
pub struct Turncoat {
    pub credentials: NodeCredentials,
    pub identity: Identity,
    grounds: Vec<Entry>,
    incarnation: Arc<AtomicU16>,
}

impl Turncoat {
    /// The one that `enrolled` would be: its agent joined and never runs.
    pub fn new(enrolled: &Agent) -> Self {
        let dir = DataDir::new(&enrolled.data_dir);
        let credentials = dir.credentials().unwrap();
        let (id, epoch) = (credentials.member_id(), dir.claim_epochs().unwrap());
        let identity = Identity { id, epoch, address: enrolled.mesh };
        let grounds = dir.entries().unwrap();
        Self { credentials, identity, grounds, incarnation: Arc::default() }
    }

    /// One more version of its own record.
    pub fn record(&self, version: u64) -> Entry {
        let record = MemberRecord {
            name: self.credentials.name().clone(),
            address: self.identity.address,
            zone: format!("zone-{version}"),
            phase: MemberPhase::Running,
            instances: Vec::new(),
            agent_version: String::new(),
            idempotent: Vec::new(),
            capacities: Vec::new(),
        };
        self.sign(
            EntryKind::RECORD,
            self.identity.epoch,
            version,
            &wire::encode_payload(&record).unwrap(),
        )
    }

    /// Any entry with its own signature.
    pub fn sign(&self, kind: EntryKind, epoch: Epoch, version: u64, payload: &[u8]) -> Entry {
        let (mesh, signer) = (self.credentials.mesh(), self.credentials.signer().unwrap());
        Entry::sign(mesh, &signer, kind, [0; 16], epoch, version, payload).unwrap()
    }

    /// "Here I am": what makes it a member in the eyes of others.
    fn hello(&self) -> Vec<u8> {
        let (is_settled, is_answer, roots) = (true, false, (0_u64, 0_u64));
        let body = wire::encode(&(self.identity, is_settled, is_answer, roots)).unwrap();
        let entries = self.grounds.iter().cloned().chain([self.record(1)]);
        [vec![kind::HELLO], body, of_entries(entries)].concat()
    }

    /// Dials an agent's gossip plane, introduces itself, and answers probes from then on.
    pub fn gossip(&self, victim: &Agent) -> Session {
        let tls = self.credentials.client_config(Plane::Gossip).unwrap();
        let them = DataDir::new(&victim.data_dir).credentials().unwrap().member_id();
        let (endpoint, connection) = runtime().block_on(async {
            let marker = Plane::Gossip.marker();
            let name = server_name(Some(&them));
            let (endpoint, dialled) =
                dial(Ipv4Addr::LOCALHOST.into(), victim.mesh, tls, marker, &name);
            (endpoint, dialled.await.unwrap())
        });
        let answering = Answering {
            me: self.identity,
            incarnation: Arc::clone(&self.incarnation),
            connection: connection.clone(),
        };
        runtime().spawn(answering.clone().datagrams());
        runtime().spawn(answering.messages());
        let session = Session { _endpoint: endpoint, connection };
        session.message(self.hello());
        session
    }

    /// A packet of the detector for `to`.
    pub fn packet(&self, to: Identity, said: Said, updates: &[MemberUpdate]) -> Vec<u8> {
        packet(self.identity, self.incarnation.load(Ordering::Relaxed), to, said, updates)
    }
}

fn packet(
    from: Identity,
    incarnation: u16,
    to: Identity,
    said: Said,
    updates: &[MemberUpdate],
) -> Vec<u8> {
    let mut packet = wire::encode(&(from, incarnation, to, said)).unwrap();
    if !matches!(said, Said::Announce | Said::Broadcast | Said::TurnUndead) {
        packet.extend(u16::try_from(updates.len()).unwrap().to_be_bytes());
        updates.iter().for_each(|update| packet.extend(wire::encode(update).unwrap()));
    }
    packet
}

/// Entries as they travel.
pub fn of_entries(entries: impl IntoIterator<Item = Entry>) -> Vec<u8> {
    entries.into_iter().flat_map(|entry| entry.bytes().to_vec()).collect()
}

/// How the members are known to an agent, by name.
pub fn identities(agent: &Agent) -> BTreeMap<String, Identity> {
    let listed = agent.get("/v1/mesh/members");
    let members = listed.as_array().unwrap().iter().map(|member| {
        let word = |key: &str| member[key].as_str().unwrap();
        let (id, address) = (word("id").parse().unwrap(), word("address").parse().unwrap());
        let epoch = Epoch(member["epoch"].as_u64().unwrap());
        (word("name").to_owned(), Identity { id, epoch, address })
    });
    members.collect()
}

/// A gossip connection to one agent.
pub struct Session {
    _endpoint: Endpoint,
    pub connection: Connection,
}

impl Session {
    /// Sends a datagram, when there is room for it.
    pub fn datagram(&self, data: Vec<u8>) {
        let sent = self.connection.send_datagram_wait(Bytes::from(data));
        runtime().block_on(sent).unwrap();
    }

    /// Sends a message on a stream of its own, without waiting for anything.
    pub fn message(&self, data: Vec<u8>) {
        let connection = self.connection.clone();
        runtime().block_on(async move {
            let mut stream = connection.open_uni().await.unwrap();
            stream.write_all(&data).await.unwrap();
            stream.finish().unwrap();
        });
    }
}

/// Keeps the member alive in the eyes of others: answers pings and refutes suspicions.
#[derive(Clone)]
struct Answering {
    me: Identity,
    incarnation: Arc<AtomicU16>,
    connection: Connection,
}

impl Answering {
    async fn datagrams(self) {
        while let Ok(data) = self.connection.read_datagram().await {
            if let Some(answer) = self.answer(&data) {
                let _ = self.connection.send_datagram(Bytes::from(answer));
            }
        }
    }

    async fn messages(self) {
        while let Ok(mut stream) = self.connection.accept_uni().await {
            let Ok(data) = stream.read_to_end(1 << 20).await else { continue };
            let Some((&kind::PACKET, data)) = data.split_first() else { continue };
            let Some(answer) = self.answer(data) else { continue };
            let Ok(mut stream) = self.connection.open_uni().await else { return };
            let _ = stream.write_all(&[vec![kind::PACKET], answer].concat()).await;
            let _ = stream.finish();
        }
    }

    fn answer(&self, data: &[u8]) -> Option<Vec<u8>> {
        let (header, len) = wire::decode_prefix::<(Identity, u16, Identity, Said)>(data).ok()?;
        let (from, _, _, said) = header;
        let mut rest = data.get(len + 2..).unwrap_or_default(); // behind the count of updates
        while let Ok((update, len)) = wire::decode_prefix::<MemberUpdate>(rest) {
            if update.identity == self.me && update.belief == Belief::Suspect {
                self.incarnation.fetch_max(update.incarnation + 1, Ordering::Relaxed);
            }
            rest = &rest[len..];
        }
        let Said::Ping(number) = said else { return None };
        let incarnation = self.incarnation.load(Ordering::Relaxed);
        Some(packet(self.me, incarnation, from, Said::Ack(number), &[]))
    }
}
