//! The issuer's side of both doors: who comes in, for how long, and what is counted.

use std::sync::Arc;

use arc_swap::ArcSwap;
use quinn::{Connection, VarInt};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;
use tracing::warn;

use super::super::{Endpoint, Incoming};
use super::renewal::{self, RenewalReply, RenewalRequest, Run};
use super::{EXCHANGE_TIME_MAX, IssuerDesk, REQUEST_LEN_MAX};
use crate::mesh::Snapshot;
use crate::model::{MemberId, MemberName};
use crate::runtime::TaskGroup;
use crate::telemetry::{Door, EventKind, EventLog, Metrics};
use crate::tls::Peer;
use crate::wire;

/// Who answers here, for a twin that asks: and the alarm that there is one.
#[derive(Clone, Debug)]
pub struct Presence {
    /// This member.
    pub me: MemberId,
    /// Its name.
    pub name: MemberName,
    /// This process, as told from any other with the same key.
    pub run: Run,
    /// Where the alarm goes.
    pub events: EventLog,
}

impl Presence {
    fn answer(&self, peer: &Peer, theirs: Run) -> RenewalReply {
        if peer.id == self.me && theirs != self.run {
            let reason =
                "another process with this key wants to start; it is told that this one runs";
            warn!(member = %self.name, reason);
            self.events.record(EventKind::DuplicateKey, &self.name, reason);
        }
        RenewalReply::Run(self.run)
    }
}

/// Answers newcomers and members until the queue ends. Who may not issue refuses by name.
pub async fn serve(
    endpoint: Endpoint,
    mut queue: mpsc::Receiver<Incoming>,
    presence: Presence,
    desk: Arc<Mutex<IssuerDesk>>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    metrics: Metrics,
    tasks: TaskGroup,
) {
    while let Some(incoming) = queue.recv().await {
        let place = incoming.place(); // whoever is silent in here keeps no more than its share
        let (endpoint, presence, desk) = (endpoint.clone(), presence.clone(), desk.clone());
        let (snapshot, metrics) = (snapshot.load_full(), metrics.clone());
        tasks.spawn_connection("enrolment", async move {
            let Ok((connection, peer)) = endpoint.accept(incoming).await else { return };
            let peer = peer.as_ref();
            let exchange = answer_one(&connection, peer, &presence, &desk, &snapshot, &metrics);
            if timeout(EXCHANGE_TIME_MAX, exchange).await.is_err() {
                metrics.count_refused(Door::enrol, "timeout");
            }
            connection.close(VarInt::from_u32(0), b"done");
            drop(place);
        });
    }
}

async fn answer_one(
    connection: &Connection,
    peer: Option<&Peer>,
    presence: &Presence,
    desk: &Mutex<IssuerDesk>,
    snapshot: &Snapshot,
    metrics: &Metrics,
) {
    let Ok((mut send, mut receive)) = connection.accept_bi().await else { return };
    let Ok(request) = receive.read_to_end(REQUEST_LEN_MAX).await else {
        return metrics.count_refused(Door::enrol, "oversized");
    };
    let answer = match (peer, wire::decode(&request)) {
        // Asked before the answerer's own start is done: the desk may be waiting for that.
        (Some(peer), Ok(RenewalRequest::Run(theirs))) => {
            wire::encode(&renewal::answer(presence.answer(peer, theirs)))
        }
        (Some(peer), _) => wire::encode(&desk.lock().await.answer_member(peer, &request).await),
        (None, _) => wire::encode(
            &desk.lock().await.answer(&request, connection.remote_address(), snapshot).await,
        ),
    };
    let Ok(bytes) = answer else { return };
    if send.write_all(&bytes).await.is_ok() && send.finish().is_ok() {
        let _ = send.stopped().await; // they have it, or they are gone
    }
}
