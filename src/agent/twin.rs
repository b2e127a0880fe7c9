//! Two live processes with one key: a data directory that was copied, and runs twice.
//!
//! The later one does not start. What counts is the live answer of a process that proves this
//! member's key and is another run: no hearsay, and no record, which a former run leaves behind. The
//! one that answers records the alarm.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use crate::model::{Entry, EntryKind, MemberId, MemberRecord};
use crate::transport::Endpoint;
use crate::transport::enrolment::renewal::{Door, Run, ask_run};
use crate::wire;

/// How long a start waits for a twin to answer. Where nobody is, a start is late by this much.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(1);

/// Where a twin would answer: where this member's last record said it is, and where this run is to
/// be reached. `bound` is this process by itself.
pub(super) fn places(
    me: MemberId,
    entries: &[Entry],
    advertise: SocketAddr,
    bound: SocketAddr,
) -> BTreeSet<SocketAddr> {
    let own = |entry: &&Entry| entry.key().kind == EntryKind::RECORD && entry.key().owner == me;
    let address = |entry: &Entry| {
        wire::decode_payload::<MemberRecord>(&entry.payload()).ok().map(|record| record.address)
    };
    let recorded = entries.iter().filter(own).filter_map(address);
    recorded.chain([advertise]).filter(|address| *address != bound).collect()
}

/// Where another run of this member answers, if one does.
pub(super) async fn find(
    endpoint: &Endpoint,
    me: MemberId,
    own: Run,
    places: BTreeSet<SocketAddr>,
) -> Option<SocketAddr> {
    let asked = places.into_iter().map(async |address| {
        let door = Door { member: Some(me), address };
        match timeout(ANSWER_TIME_MAX, ask_run(endpoint, door, own)).await {
            Ok(Ok(run)) if run != own => Some(address),
            _ => None, // nobody, somebody else, or this very process
        }
    });
    join_all(asked).await.into_iter().flatten().next()
}
