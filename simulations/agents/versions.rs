//! Version N with N-1: what a newer agent said is kept and passed on verbatim by older ones, which
//! read as much of it as they know.

use std::time::Duration;

use bytes::Bytes;
use murmesh::model::{
    Entry, EntryKind, InstanceRecord, InstanceState, MemberPhase, MemberRecord, Protocol, Weight,
};
use murmesh::{DataDir, wire};

use super::fleet::Fleet;
use crate::figures::with_seeds;

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

/// What version N+1 would say with fields that N does not know.
fn newer(payload: &[u8]) -> Vec<u8> {
    let (version, fields) = payload.split_first().expect("a version");
    [&[version + 1], fields, b"\x05later"].concat()
}

/// An instance of a service that only the newer agent offered.
fn instance(name: &str) -> InstanceRecord {
    InstanceRecord {
        id: name.parse().expect("an id"),
        service: name.parse().expect("a name"),
        protocol: Protocol::Tcp,
        port: 8000,
        tags: Vec::new(),
        weight: Weight::default(),
        state: InstanceState::Ready,
    }
}

/// Signed by the member whose directory `dir` is, as the next run of a newer agent would.
fn said_by_a_newer_agent(dir: &DataDir, kind: EntryKind, payload: &[u8]) -> Entry {
    let credentials = dir.credentials().expect("an identity");
    let key = credentials.signer().expect("a key");
    let epoch = dir.claim_epochs().expect("an epoch");
    Entry::sign(credentials.mesh(), &key, kind, [0; 16], epoch, 1, payload).expect("short")
}

/// Whether every node has exactly these bytes on its disk.
fn is_kept_verbatim(fleet: &Fleet<'_>, by: &[usize], bytes: &Bytes) -> bool {
    let holds = |index: &usize| {
        let entries = fleet.dir(*index).entries().expect("readable");
        entries.iter().any(|entry| entry.bytes() == bytes)
    };
    by.iter().all(holds)
}

#[test]
fn an_agent_that_was_newer_for_a_while_is_understood_and_comes_back() {
    with_seeds("an_agent_that_was_newer_for_a_while_is_understood_and_comes_back", |seed| {
        let mut fleet = Fleet::whole(seed, 5);
        fleet.kill(3);
        let now = fleet.record(1, 3).expect("known to its peers");
        let record = MemberRecord {
            name: now.name.clone(),
            address: now.address,
            zone: "eu1/a".to_owned(),
            phase: MemberPhase::Running,
            instances: vec![instance("echo"), instance("extra")],
            agent_version: "0.2.0".to_owned(),
            idempotent: Vec::new(),
            capacities: Vec::new(),
        };
        let payload = newer(&wire::encode_payload(&record).expect("encodes"));
        let entry = said_by_a_newer_agent(fleet.dir(3), EntryKind::RECORD, &payload);
        fleet.publish(1, entry.clone());
        fleet.until("the known part is applied", secs(10), |fleet| {
            (0..5).filter(|index| *index != 3).all(|by| {
                let seen = fleet.record(by, 3);
                fleet.lists(by, "extra") && seen.is_some_and(|seen| seen.zone == "eu1/a")
            })
        });
        fleet.until("all keep it as it came", secs(10), |fleet| {
            is_kept_verbatim(fleet, &[0, 1, 2, 4], entry.bytes())
        });
        // Back to this version: it goes above what its newer self said.
        fleet.start(3);
        fleet.until("it is back, and so is what it offers", secs(15), |fleet| {
            fleet.is_whole() && (0..5).all(|by| !fleet.lists(by, "extra"))
        });
        (0..10).for_each(|_| fleet.call(0, 1_000));
        assert_eq!(fleet.settle_calls(), (10, 0));
    });
}

#[test]
fn what_this_version_does_not_know_is_passed_on_to_newcomers() {
    with_seeds("what_this_version_does_not_know_is_passed_on_to_newcomers", |seed| {
        let mut fleet = Fleet::whole_but_last(seed, 5);
        let entry = said_by_a_newer_agent(fleet.dir(2), EntryKind(99), b"\x01whatever it means");
        fleet.publish(2, entry.clone());
        fleet.until("all keep it as it came", secs(15), |fleet| {
            is_kept_verbatim(fleet, &[0, 1, 2, 3], entry.bytes())
        });
        fleet.start(4);
        fleet.until("the newcomer, too", secs(15), |fleet| {
            fleet.is_whole() && is_kept_verbatim(fleet, &[4], entry.bytes())
        });
        (0..10).for_each(|_| fleet.call(0, 1_000));
        assert_eq!(fleet.settle_calls(), (10, 0));
    });
}
