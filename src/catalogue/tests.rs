//! Rights, order and bounds of entries.

use super::*;
use crate::model::entry_tests::TestKey;
use crate::model::{
    InstanceId, InstanceRecord, InstanceState, MemberPhase, Protocol, Signer, Weight,
};

const MESH: MeshId = MeshId([7; 32]);
const ROOT: u8 = 200;
const ISSUER: u8 = 201;
const OTHER_ISSUER: u8 = 202;

fn id(key: u8) -> MemberId {
    TestKey::new(key).public_key().member_id()
}

fn catalogue() -> Catalogue {
    Catalogue::new(MESH, TestKey::new(ROOT).public_key(), Box::new(Signatures))
}

fn sign(key: u8, kind: EntryKind, subject: [u8; 16], version: u64, payload: &[u8]) -> Entry {
    Entry::sign(&MESH, &TestKey::new(key), kind, subject, Epoch(1), version, payload).unwrap()
}

fn issuer_by(signer: u8, is_active: bool, version: u64) -> Entry {
    let key = TestKey::new(ISSUER).public_key();
    let body = Issuer {
        key,
        member: id(ISSUER),
        certificate: Vec::new(),
        is_active,
        kept: Vec::new(),
        dropped: Vec::new(),
    };
    let payload = wire::encode_payload(&body).unwrap();
    sign(signer, EntryKind::ISSUER, *key.member_id().as_bytes(), version, &payload)
}

fn issuer() -> Entry {
    issuer_by(ROOT, true, 1)
}

fn enrolment(member: u8, name: &str, services: Option<&[&str]>) -> Entry {
    let body = Enrolment {
        key: TestKey::new(member).public_key(),
        name: name.parse().unwrap(),
        serial: 1,
        services: services.map(|names| names.iter().map(|name| name.parse().unwrap()).collect()),
        issued_at: 1,
        invite: None,
        replaces: Vec::new(),
        let_in_by: None,
    };
    let payload = wire::encode_payload(&body).unwrap();
    sign(ISSUER, EntryKind::ENROLMENT, *id(member).as_bytes(), 1, &payload)
}

fn body(name: &str, service: &str) -> MemberRecord {
    MemberRecord {
        name: name.parse().unwrap(),
        address: "10.0.0.1:7370".parse().unwrap(),
        zone: String::new(),
        phase: MemberPhase::Running,
        instances: vec![instance("one", service)],
        agent_version: String::new(),
        idempotent: Vec::new(),
        capacities: Vec::new(),
    }
}

fn instance(id: &str, service: &str) -> InstanceRecord {
    InstanceRecord {
        id: id.parse().unwrap(),
        service: service.parse().unwrap(),
        protocol: Protocol::Tcp,
        port: 80,
        tags: Vec::new(),
        weight: Weight::default(),
        state: InstanceState::Ready,
    }
}

fn record_with(member: u8, body: &MemberRecord, version: u64) -> Entry {
    sign(member, EntryKind::RECORD, [0; 16], version, &wire::encode_payload(body).unwrap())
}

fn record(member: u8, name: &str, version: u64) -> Entry {
    record_with(member, &body(name, "web"), version)
}

fn events(catalogue: &mut Catalogue) -> Vec<CatalogueEvent> {
    std::iter::from_fn(|| catalogue.poll_event()).collect()
}

#[test]
fn record_is_applied_once_its_grounds_are_here_in_any_order() {
    // All six orders lead to the same catalogue; whatever comes too early waits.
    let entries = [issuer(), enrolment(1, "a", None), record(1, "a", 1)];
    let mut digests = Vec::new();
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut catalogue = catalogue();
        for index in order {
            let verdict = catalogue.handle_entry(entries[index].clone());
            assert!(matches!(verdict, Verdict::Accepted | Verdict::Pending), "{order:?}");
        }
        assert_eq!(catalogue.record(id(1)).unwrap().0.name.as_str(), "a", "{order:?}");
        digests.push(catalogue.digest().clone());
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]));
}

#[test]
fn nobody_speaks_for_another() {
    let mut catalogue = catalogue();
    assert_eq!(catalogue.handle_entry(issuer_by(1, true, 1)), Verdict::Refused("not_root"));
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", None));
    // Signed by member 1 and filed under its own hash: an entry cannot name another owner at all.
    let payload = wire::encode_payload(&body("a", "web")).unwrap();
    let astray = sign(1, EntryKind::RECORD, [9; 16], 1, &payload);
    assert_eq!(catalogue.handle_entry(astray), Verdict::Refused("subject"));
    let by_member = sign(1, EntryKind::ENROLMENT, *id(2).as_bytes(), 1, b"");
    assert_eq!(catalogue.handle_entry(by_member), Verdict::Pending, "no issuer, no right");
    let mut forged = record(1, "a", 1).bytes().to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let forged = Entry::decode(forged.into()).unwrap();
    assert_eq!(catalogue.handle_entry(forged), Verdict::Refused("signature"));
    let elsewhere = MeshId([8; 32]);
    let key = TestKey::new(1);
    let foreign = Entry::sign(&elsewhere, &key, EntryKind::RECORD, [0; 16], Epoch(1), 1, &payload);
    assert_eq!(catalogue.handle_entry(foreign.unwrap()), Verdict::Refused("signature"));
    assert!(catalogue.record(id(1)).is_none());
}

#[test]
fn version_never_goes_back_and_a_tie_goes_to_the_higher_hash() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", None));
    assert_eq!(catalogue.handle_entry(record(1, "a", 5)), Verdict::Accepted);
    assert_eq!(catalogue.handle_entry(record(1, "a", 4)), Verdict::Outdated);
    assert_eq!(catalogue.handle_entry(record(1, "a", 5)), Verdict::Known);
    let mut pair = [record(1, "a", 6), record_with(1, &body("a", "db"), 6)];
    pair.sort_by_key(Entry::version);
    let [lower, higher] = pair;
    assert_eq!(catalogue.handle_entry(lower.clone()), Verdict::Accepted);
    events(&mut catalogue);
    assert_eq!(catalogue.handle_entry(higher.clone()), Verdict::Accepted);
    assert!(events(&mut catalogue).contains(&CatalogueEvent::Equivocation(record_key(id(1)))));
    assert_eq!(catalogue.handle_entry(lower), Verdict::Outdated);
    assert_eq!(catalogue.entry(&record_key(id(1))), Some(&higher));
}

#[test]
fn older_entry_that_waited_does_not_replace_a_newer_one() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(issuer());
    // Waits: its name is not the enrolled one. Then the newer, rightful record comes, then a
    // wider enrolment wakes whatever waits.
    catalogue.handle_entry(enrolment(1, "a", Some(&["db"])));
    assert_eq!(catalogue.handle_entry(record(1, "a", 1)), Verdict::Pending);
    let newer = record_with(1, &body("a", "db"), 2);
    assert_eq!(catalogue.handle_entry(newer.clone()), Verdict::Accepted);
    let wider = Enrolment {
        key: TestKey::new(1).public_key(),
        name: "a".parse().unwrap(),
        serial: 2,
        services: None,
        issued_at: 2,
        invite: None,
        replaces: Vec::new(),
        let_in_by: None,
    };
    let payload = wire::encode_payload(&wider).unwrap();
    let wider = sign(ISSUER, EntryKind::ENROLMENT, *id(1).as_bytes(), 2, &payload);
    assert_eq!(catalogue.handle_entry(wider), Verdict::Accepted);
    assert_eq!(catalogue.entry(&record_key(id(1))), Some(&newer));
}

#[test]
fn record_keeps_to_its_enrolled_name_and_services() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", Some(&["web"])));
    assert_eq!(catalogue.handle_entry(record(1, "b", 1)), Verdict::Pending, "another name");
    let db = record_with(1, &body("a", "db"), 2);
    assert_eq!(catalogue.handle_entry(db), Verdict::Pending, "a service it may not offer");
    assert_eq!(catalogue.handle_entry(record(1, "a", 3)), Verdict::Accepted);
}

#[test]
fn unreadable_payload_is_kept_and_relayed_but_not_applied() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", None));
    let junk = sign(1, EntryKind::RECORD, [0; 16], 1, b"\xff\xff\xff");
    assert_eq!(catalogue.handle_entry(junk.clone()), Verdict::Accepted);
    let hash = junk.version().hash;
    let quarantined = CatalogueEvent::Quarantined { key: junk.key(), hash };
    assert!(events(&mut catalogue).contains(&quarantined));
    assert!(catalogue.record(id(1)).is_none());
    assert_eq!(catalogue.entry(&junk.key()), Some(&junk), "others may be able to read it");
    let mut crowded = body("a", "web");
    let name = |number: usize| format!("i{number}").parse::<InstanceId>().unwrap();
    crowded.instances = (0..=INSTANCES_MAX)
        .map(|number| InstanceRecord { id: name(number), ..instance("x", "web") })
        .collect();
    catalogue.handle_entry(record_with(1, &crowded, 2));
    assert!(catalogue.record(id(1)).is_none(), "257 instances are not believed");
}

#[test]
fn unknown_kind_is_relayed_within_its_owners_quota() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", None));
    let novelty =
        |number: u8, len: usize| sign(1, EntryKind(999), [number; 16], 1, &vec![number; len]);
    assert_eq!(catalogue.handle_entry(novelty(0, 10)), Verdict::Accepted);
    let stranger = sign(2, EntryKind(999), [0; 16], 1, b"x");
    assert_eq!(catalogue.handle_entry(stranger), Verdict::Pending, "who is that?");
    for number in 1..16 {
        assert_eq!(catalogue.handle_entry(novelty(number, 10)), Verdict::Accepted);
    }
    assert_eq!(catalogue.handle_entry(novelty(16, 10)), Verdict::Refused("quota"), "17th");
    let big = sign(1, EntryKind(1000), [0; 16], 1, &vec![0; 60 * 1024]);
    assert_eq!(catalogue.handle_entry(big), Verdict::Accepted);
    let bigger = sign(1, EntryKind(1000), [1; 16], 1, &vec![0; 60 * 1024]);
    assert_eq!(catalogue.handle_entry(bigger), Verdict::Refused("quota"), "over 64 KiB");
}

#[test]
fn entries_without_a_payload_take_room_of_the_quota_too() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", None));
    let empty = |kind: u16| sign(1, EntryKind(kind), [0; 16], 1, b"");
    let taken =
        (1_000..3_000).filter(|kind| catalogue.handle_entry(empty(*kind)) == Verdict::Accepted);
    let count = taken.count();
    assert!((400..500).contains(&count), "{count} kinds of one member");
}

#[test]
fn waiting_entries_are_bounded() {
    let mut catalogue = catalogue();
    for number in 0..=PENDING_MAX as u64 {
        let subject = [number.to_be_bytes(), [0; 8]].concat().try_into().unwrap();
        catalogue.handle_entry(sign(1, EntryKind(999), subject, 1, b"x"));
    }
    assert_eq!(catalogue.pending.len(), PENDING_MAX);
    assert!(matches!(events(&mut catalogue)[..], [CatalogueEvent::PendingDropped(_)]));
}

#[test]
fn two_members_of_one_name_are_reported() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", None));
    catalogue.handle_entry(enrolment(2, "a", None));
    let name = "a".parse().unwrap();
    let conflict = CatalogueEvent::NameConflict { name, members: [id(1), id(2)] };
    assert!(events(&mut catalogue).contains(&conflict));
}

/// What the root says of an issuer.
fn word(issuer: u8, version: u64, change: impl Fn(&mut Issuer)) -> Entry {
    let key = TestKey::new(issuer).public_key();
    let mut body = Issuer {
        key,
        member: id(issuer),
        certificate: Vec::new(),
        is_active: true,
        kept: Vec::new(),
        dropped: Vec::new(),
    };
    change(&mut body);
    let payload = wire::encode_payload(&body).unwrap();
    sign(ROOT, EntryKind::ISSUER, *key.member_id().as_bytes(), version, &payload)
}

/// What an issuer says of a member called `a`.
fn said_by(issuer: u8, member: u8, change: impl Fn(&mut Enrolment)) -> Entry {
    let mut body = Enrolment {
        key: TestKey::new(member).public_key(),
        name: "a".parse().unwrap(),
        serial: 1,
        services: None,
        issued_at: 1,
        invite: None,
        replaces: Vec::new(),
        let_in_by: None,
    };
    change(&mut body);
    let payload = wire::encode_payload(&body).unwrap();
    sign(issuer, EntryKind::ENROLMENT, *id(member).as_bytes(), 1, &payload)
}

#[test]
fn whom_a_dismissed_issuer_let_in_goes_with_it_whoever_has_renewed_it() {
    type Change = fn(&mut Issuer);
    let kept: Change = |issuer| issuer.kept = vec![id(1)];
    let dropped: Change = |issuer| issuer.dropped = vec![id(1)];
    for (what, let_in_by, dismissal, is_vouched) in [
        ("let in and renewed", Some(id(ISSUER)), (|_| {}) as Change, false),
        ("and kept", Some(id(ISSUER)), kept, true),
        ("let in by the other, too", None, |_| {}, true),
        ("and dropped", None, dropped, false),
    ] {
        let mut catalogue = catalogue();
        for entry in [
            word(ISSUER, 1, |_| {}),
            word(OTHER_ISSUER, 1, |_| {}),
            said_by(ISSUER, 1, |_| {}),
            said_by(OTHER_ISSUER, 1, |said| said.let_in_by = let_in_by),
        ] {
            assert_eq!(catalogue.handle_entry(entry), Verdict::Accepted);
        }
        assert!(catalogue.enrolment(id(1)).is_some(), "{what}");
        catalogue.handle_entry(word(ISSUER, 2, |issuer| {
            issuer.is_active = false;
            dismissal(issuer);
        }));
        assert_eq!(catalogue.enrolment(id(1)).is_some(), is_vouched, "{what}");
    }
}

#[test]
fn a_replaced_key_is_not_believed_again_because_another_issuer_has_renewed_it_since() {
    let mut catalogue = catalogue();
    for entry in [
        word(ISSUER, 1, |_| {}),
        word(OTHER_ISSUER, 1, |_| {}),
        said_by(ISSUER, 1, |said| said.issued_at = 10),
        said_by(ISSUER, 2, |said| (said.issued_at, said.replaces) = (20, vec![id(1)])),
    ] {
        catalogue.handle_entry(entry);
    }
    assert!(catalogue.is_replaced(id(1)));
    // Its clock is ahead, or it has not heard of the replacement.
    catalogue.handle_entry(said_by(OTHER_ISSUER, 1, |said| said.issued_at = 30));
    assert!(catalogue.is_replaced(id(1)) && !catalogue.is_replaced(id(2)));
}

#[test]
fn revoked_issuer_vouches_for_nobody() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", None));
    assert!(catalogue.enrolment(id(1)).is_some());
    catalogue.handle_entry(issuer_by(ROOT, false, 2));
    assert!(catalogue.enrolment(id(1)).is_none());
    assert_eq!(catalogue.handle_entry(record(1, "a", 1)), Verdict::Accepted, "and kept");
    assert!(catalogue.record(id(1)).is_none(), "but not applied");
}

#[test]
fn what_a_revoked_issuer_said_is_kept_alike_by_those_who_hear_of_it_before_and_after() {
    let said = [enrolment(1, "a", None), record(1, "a", 1), enrolment(2, "b", None)];
    let (appointed, dismissed) = (issuer(), issuer_by(ROOT, false, 2));
    let mut before = catalogue();
    before.restore([&[appointed][..], &said].concat());
    before.handle_entry(dismissed.clone());
    let mut after = catalogue();
    after.restore([&[dismissed][..], &said].concat());
    assert_eq!(before.digest(), after.digest());
    assert_eq!((before.pending.len(), after.pending.len()), (0, 0));
    assert!(after.record(id(1)).is_none() && after.enrolment(id(2)).is_none(), "none is applied");
    // Another issuer takes the first member over.
    let other = TestKey::new(OTHER_ISSUER).public_key();
    let body = Issuer {
        key: other,
        member: id(3),
        certificate: Vec::new(),
        is_active: true,
        kept: Vec::new(),
        dropped: Vec::new(),
    };
    let payload = wire::encode_payload(&body).unwrap();
    after.handle_entry(sign(ROOT, EntryKind::ISSUER, *other.member_id().as_bytes(), 1, &payload));
    events(&mut after);
    let taken_over = sign(OTHER_ISSUER, EntryKind::ENROLMENT, *id(1).as_bytes(), 1, &{
        enrolment(1, "a", None).payload().to_vec()
    });
    assert_eq!(after.handle_entry(taken_over), Verdict::Accepted);
    assert_eq!(after.record(id(1)).unwrap().0.name.as_str(), "a");
    let is_told = |event: &CatalogueEvent| {
        matches!(event, CatalogueEvent::Accepted { content: Content::Record(_), .. })
    };
    assert!(events(&mut after).iter().any(is_told));
}

#[test]
fn a_restart_finds_all_that_was_kept_however_much_it_is() {
    let mut entries = vec![issuer()];
    for number in 0..2 * PENDING_MAX as u64 {
        let subject = [&number.to_be_bytes()[..], &[0; 8]].concat().try_into().unwrap();
        entries.push(sign(ISSUER, EntryKind::INVITE, subject, 1, b"unreadable, and kept"));
    }
    for member in 1..=50 {
        entries.push(enrolment(member, &format!("node-{member}"), None));
        entries.push(record(member, &format!("node-{member}"), 1));
    }
    let mut catalogue = catalogue();
    catalogue.restore(entries.clone());
    assert_eq!(catalogue.len(), entries.len());
    let on_disk: Vec<Entry> = catalogue.entries().cloned().collect(); // records first
    let mut restarted = self::catalogue();
    restarted.restore(on_disk);
    assert_eq!((restarted.len(), restarted.digest()), (entries.len(), catalogue.digest()));
}

#[test]
fn records_are_the_last_of_what_waits_to_be_dropped() {
    let mut catalogue = catalogue();
    catalogue.handle_entry(record(1, "a", 1));
    for number in 0..=PENDING_MAX as u64 {
        let subject = [&number.to_be_bytes()[..], &[0; 8]].concat().try_into().unwrap();
        catalogue.handle_entry(sign(ISSUER, EntryKind::INVITE, subject, 1, b"waits"));
    }
    catalogue.handle_entry(issuer());
    catalogue.handle_entry(enrolment(1, "a", None));
    assert!(catalogue.record(id(1)).is_some());
}

#[test]
fn repair_moves_differences_only_and_grounds_first() {
    let (mut ours, mut theirs) = (catalogue(), catalogue());
    let common = [issuer(), enrolment(1, "a", None), record(1, "a", 1)];
    for entry in common {
        ours.handle_entry(entry.clone());
        theirs.handle_entry(entry);
    }
    assert!(ours.digest().differing(theirs.digest().sums()).is_empty());
    ours.handle_entry(record(2, "b", 1));
    ours.handle_entry(enrolment(2, "b", None));
    theirs.handle_entry(record(1, "a", 2));
    let buckets = ours.digest().differing(theirs.digest().sums());
    let difference = ours.difference(&buckets, &theirs.versions_in(&buckets));
    assert_eq!(difference.newer, [&enrolment(2, "b", None), &record(2, "b", 1)]);
    assert_eq!(difference.older, [record_key(id(1))]);
}

#[test]
fn what_an_issuer_said_is_found_by_its_subject_and_a_name_is_free_once_nobody_holds_it() {
    let mut catalogue = catalogue();
    let first = enrolment(1, "a", None);
    for entry in [issuer(), first.clone(), enrolment(2, "b", None)] {
        catalogue.handle_entry(entry);
    }
    let about = |catalogue: &Catalogue, kind, subject: MemberId| -> Vec<Entry> {
        catalogue.entries_about(kind, *subject.as_bytes()).cloned().collect()
    };
    assert_eq!(about(&catalogue, EntryKind::ENROLMENT, id(1)), [first]);
    assert_eq!(about(&catalogue, EntryKind::ISSUER, id(ISSUER)), [issuer()]);
    assert_eq!(about(&catalogue, EntryKind::ENROLMENT, id(3)), []);
    let holders = |catalogue: &Catalogue, name: &str| -> Vec<MemberId> {
        catalogue.holders(&name.parse().unwrap()).collect()
    };
    assert_eq!(holders(&catalogue, "a"), [id(1)]);
    let body = Enrolment {
        key: TestKey::new(1).public_key(),
        name: "c".parse().unwrap(),
        serial: 2,
        services: None,
        issued_at: 2,
        invite: None,
        replaces: Vec::new(),
        let_in_by: None,
    };
    let payload = wire::encode_payload(&body).unwrap();
    catalogue.handle_entry(sign(ISSUER, EntryKind::ENROLMENT, *id(1).as_bytes(), 2, &payload));
    assert_eq!((holders(&catalogue, "a"), holders(&catalogue, "c")), (vec![], vec![id(1)]));
}
