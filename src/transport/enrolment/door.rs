//! The issuer's side of both doors: who comes in, for how long, and what is counted.

use std::sync::Arc;

use arc_swap::ArcSwap;
use quinn::{Connection, VarInt};
use tokio::sync::{Mutex, mpsc};
use tokio::time::timeout;

use super::super::{Endpoint, Incoming};
use super::{EXCHANGE_TIME_MAX, IssuerDesk, REQUEST_LEN_MAX};
use crate::mesh::Snapshot;
use crate::runtime::TaskGroup;
use crate::telemetry::{Door, Metrics};
use crate::tls::Peer;
use crate::wire;

/// Answers newcomers and members until the queue ends. Who may not issue refuses by name.
pub async fn serve(
    endpoint: Endpoint,
    mut queue: mpsc::Receiver<Incoming>,
    desk: Arc<Mutex<IssuerDesk>>,
    snapshot: Arc<ArcSwap<Snapshot>>,
    metrics: Metrics,
    tasks: TaskGroup,
) {
    while let Some(incoming) = queue.recv().await {
        let place = incoming.place(); // whoever is silent in here keeps no more than its share
        let (endpoint, desk) = (endpoint.clone(), desk.clone());
        let (snapshot, metrics) = (snapshot.load_full(), metrics.clone());
        tasks.spawn_connection("enrolment", async move {
            let Ok((connection, peer)) = endpoint.accept(incoming).await else { return };
            let exchange = answer_one(&connection, peer.as_ref(), &desk, &snapshot, &metrics);
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
    desk: &Mutex<IssuerDesk>,
    snapshot: &Snapshot,
    metrics: &Metrics,
) {
    let Ok((mut send, mut receive)) = connection.accept_bi().await else { return };
    let Ok(request) = receive.read_to_end(REQUEST_LEN_MAX).await else {
        return metrics.count_refused(Door::enrol, "oversized");
    };
    let mut desk = desk.lock().await;
    let answer = match peer {
        Some(peer) => wire::encode(&desk.answer_member(peer, &request).await),
        None => wire::encode(&desk.answer(&request, snapshot).await),
    };
    drop(desk);
    let Ok(bytes) = answer else { return };
    if send.write_all(&bytes).await.is_ok() && send.finish().is_ok() {
        let _ = send.stopped().await; // they have it, or they are gone
    }
}
