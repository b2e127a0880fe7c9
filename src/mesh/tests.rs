//! A few nodes without a network between them: bytes from friends and from others.

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::message::{Listing, Roots, Sums, Want};
use super::*;
use crate::breaker::InstanceKey;
use crate::membership::{Belief, MemberUpdate, Profile};
use crate::model::entry_tests::TestKey;
use crate::model::{
    Enrolment, EntryKind, InstanceState, Issuer, MemberName, MeshId, Observations, ObservedWindow,
    Protocol, Weight,
};
use crate::wire;

const MESH: MeshId = MeshId([7; 32]);
const ROOT: u8 = 200;
const ISSUER: u8 = 201;

fn id(key: u8) -> MemberId {
    TestKey::new(key).public_key().member_id()
}

fn name(key: u8) -> MemberName {
    format!("node-{key}").parse().unwrap()
}

fn grounds(member: u8) -> Vec<Entry> {
    let key = TestKey::new(ISSUER).public_key();
    let issuer = Issuer {
        key,
        member: id(ISSUER),
        certificate: Vec::new(),
        is_active: true,
        kept: Vec::new(),
        dropped: Vec::new(),
    };
    let enrolment = Enrolment {
        key: TestKey::new(member).public_key(),
        name: name(member),
        serial: 1,
        services: None,
        issued_at: 1,
        invite: None,
        replaces: Vec::new(),
        let_in_by: None,
    };
    let sign = |signer: u8, kind, subject: MemberId, payload: Vec<u8>| {
        let subject = *subject.as_bytes();
        Entry::sign(&MESH, &TestKey::new(signer), kind, subject, Epoch(1), 1, &payload).unwrap()
    };
    vec![
        sign(ROOT, EntryKind::ISSUER, id(ISSUER), wire::encode_payload(&issuer).unwrap()),
        sign(ISSUER, EntryKind::ENROLMENT, id(member), wire::encode_payload(&enrolment).unwrap()),
    ]
}

fn address(key: u8) -> SocketAddr {
    ([10, 0, 0, key], 7370).into()
}

fn config(key: u8, seeds: &[u8]) -> MeshConfig {
    MeshConfig {
        mesh: MESH,
        root: TestKey::new(ROOT).public_key(),
        name: name(key),
        address: address(key),
        zone: String::new(),
        agent_version: String::new(),
        began_at_ms: 1_790_000_000_000,
        epoch: Epoch(100),
        profile: Profile::Lan,
        seeds: seeds.iter().map(|seed| address(*seed)).collect(),
        phase: MemberPhase::Running,
        offers: Vec::new(),
        remembered: Vec::new(),
    }
}

fn node(key: u8, seeds: &[u8]) -> Mesh {
    let signer = Box::new(TestKey::new(key));
    Mesh::new(Moment::START, config(key, seeds), signer, u64::from(key), grounds(key)).unwrap()
}

/// Carries everything between the nodes at once, until nobody has more to say.
fn carry(now: Moment, nodes: &mut [Mesh]) {
    loop {
        let mut sent = Vec::new();
        for node in nodes.iter_mut() {
            let from = node.id();
            sent.extend(std::iter::from_fn(|| node.poll_transmit()).map(|out| (from, out)));
        }
        if sent.is_empty() {
            return;
        }
        for (from, Transmit { to, channel, data }) in sent {
            let (Destination::Member { address: at, .. } | Destination::Seed(at)) = to;
            let Some(node) = nodes.iter_mut().find(|node| node.config.address == at) else {
                continue;
            };
            match channel {
                Channel::Datagram => node.handle_datagram(now, from, &data),
                Channel::Message => node.handle_message(now, from, &data),
            }
        }
    }
}

fn pair() -> [Mesh; 2] {
    let mut nodes = [node(1, &[]), node(2, &[1])];
    carry(Moment::START, &mut nodes);
    nodes.iter_mut().for_each(|node| while node.poll_event().is_some() {});
    nodes
}

fn run(nodes: &mut [Mesh], from_ms: u64, to_ms: u64) {
    for at in (from_ms..to_ms).step_by(20).map(Moment::from_millis) {
        for node in nodes.iter_mut() {
            if node.poll_timeout().is_some_and(|due| due <= at) {
                node.handle_timeout(at);
            }
        }
        carry(at, nodes);
    }
}

fn events(node: &mut Mesh) -> Vec<MeshEvent> {
    std::iter::from_fn(|| node.poll_event()).collect()
}

fn instance(name: &str) -> InstanceRecord {
    InstanceRecord {
        id: name.parse().unwrap(),
        service: name.parse().unwrap(),
        protocol: Protocol::Tcp,
        port: 80,
        tags: Vec::new(),
        weight: Weight::default(),
        state: InstanceState::Ready,
    }
}

#[test]
fn node_can_move_between_threads() {
    fn is_send<T: Send>(_: &T) {}
    is_send(&node(1, &[]));
}

#[test]
fn node_without_enrolment_does_not_begin() {
    let signer = Box::new(TestKey::new(1));
    let refused = Mesh::new(Moment::START, config(1, &[]), signer, 1, grounds(2));
    assert!(matches!(refused, Err(Error::NotEnrolled(member)) if member == id(1)));
}

#[test]
fn two_nodes_meet_and_see_each_others_instances() {
    let [mut one, mut two] = pair();
    one.set_offers(Moment::START, vec![instance("web").into()]);
    let mut nodes = [one, two];
    run(&mut nodes, 0, 2_000); // the hint goes with the next rumours
    [one, two] = nodes;
    assert_eq!(one.member_state(id(2)), Some(MemberState::Alive));
    let snapshot = two.snapshot();
    let endpoints = &snapshot.services[&"web".parse().unwrap()].endpoints();
    assert_eq!(endpoints[0].member, id(1));
    assert_eq!(endpoints[0].state, EndpointState::Ready);
}

#[test]
fn changes_are_published_five_at_once_and_then_one_a_second() {
    let mut node = node(1, &[]);
    let version = |node: &Mesh| node.entry(&record_key(id(1))).unwrap().version().version;
    let before = version(&node);
    for number in 0..50 {
        node.set_offers(Moment::START, vec![instance(&format!("web-{number}")).into()]);
    }
    assert_eq!(version(&node) - before, 5);
    node.handle_timeout(Moment::from_secs(1));
    assert_eq!(version(&node) - before, 6);
    assert_eq!(node.instances(id(1)).next().unwrap().id.as_str(), "web-49", "the last one counts");
}

/// Whom a node dials until `end`, when it is always woken in time.
fn dialled_until(end: Moment, node: &mut Mesh) -> usize {
    let mut dialled = BTreeSet::new();
    while let Some(at) = node.poll_timeout().filter(|at| *at <= end) {
        node.handle_timeout(at);
        dialled.extend(std::iter::from_fn(|| node.poll_transmit()).map(|out| out.to));
    }
    dialled.len()
}

/// Each of 100 is dialled every 100 s; after a pause of this process nobody waits for that.
#[test]
fn node_that_was_paused_tries_whoever_is_away_at_once() {
    let remembered = (2..102).map(|key| (id(key), address(key))).collect();
    let config = MeshConfig { remembered, ..config(1, &[]) };
    let signer = Box::new(TestKey::new(1));
    let mut node = Mesh::new(Moment::START, config, signer, 1, grounds(1)).unwrap();
    assert_eq!(dialled_until(Moment::from_secs(10), &mut node), 100, "all, at the start");
    dialled_until(Moment::from_secs(600), &mut node);
    let dialled = dialled_until(Moment::from_secs(650), &mut node);
    assert!(dialled < 80, "{dialled} in 50 s: now and then");
    let woken = node.poll_timeout().unwrap() + Duration::from_secs(10);
    node.handle_timeout(woken);
    let dialled = dialled_until(woken + Duration::from_secs(5), &mut node);
    assert_eq!(dialled, 100, "all, soon after the pause");
}

#[test]
fn junk_changes_nothing() {
    let [mut one, two] = pair();
    let mut rng = StdRng::seed_from_u64(1);
    let entries = one.entries().count();
    for _ in 0..20_000 {
        let mut junk = vec![0; rng.random_range(0..200)];
        rng.fill(&mut junk[..]);
        if let Some(kind) = junk.first_mut() {
            *kind %= 12; // so that known kinds are met
        }
        one.handle_message(Moment::START, two.id(), &junk);
        one.handle_datagram(Moment::START, two.id(), &junk);
        assert!(!events(&mut one).iter().any(|event| matches!(event, MeshEvent::EntryAccepted(_))));
        while one.poll_transmit().is_some() {}
    }
    assert_eq!(one.entries().count(), entries);
    assert_eq!(one.member_state(id(2)), Some(MemberState::Alive));
}

#[test]
fn every_truncation_of_a_greeting_is_harmless() {
    let mut newcomer = node(3, &[1]);
    let hello = newcomer.poll_transmit().unwrap().data;
    for len in 0..hello.len() {
        let [mut one, _] = pair();
        one.handle_message(Moment::START, id(3), &hello[..len]);
        assert_eq!(one.member_state(id(3)), None, "{len} bytes");
    }
}

#[test]
fn nobody_is_introduced_by_another() {
    let [mut one, _] = pair();
    let mut newcomer = node(3, &[1]);
    let hello = newcomer.poll_transmit().unwrap().data;
    one.handle_message(Moment::START, id(2), &hello);
    let refused = MeshEvent::Blamed { member: id(2), reason: "source" };
    assert!(events(&mut one).contains(&refused));
    assert!(one.membership.belief(id(3)).is_none());
}

#[test]
fn packet_speaks_for_whoever_proved_to_send_it() {
    let mut nodes = pair();
    nodes[1].handle_timeout(Moment::from_millis(700));
    let mut sent = std::iter::from_fn(|| nodes[1].poll_transmit());
    let ping = sent.find(|sent| sent.channel == Channel::Datagram).unwrap();
    nodes[0].handle_datagram(Moment::from_millis(700), id(9), &ping.data);
    let refused = MeshEvent::Blamed { member: id(9), reason: "source" };
    assert!(events(&mut nodes[0]).contains(&refused));
}

#[test]
fn message_of_a_later_version_is_counted_and_ignored() {
    let [mut one, _] = pair();
    one.handle_message(Moment::START, id(2), &[250, 1, 2, 3]);
    let ignored = MeshEvent::Dropped { from: id(2), reason: "unknown_kind" };
    assert_eq!(events(&mut one), [ignored]);
}

#[test]
fn run_without_a_record_is_not_believed() {
    let [mut one, _] = pair();
    let stranger = Identity { id: id(9), epoch: Epoch(1), address: address(9) };
    let later = Identity { id: id(2), epoch: Epoch(101), address: address(2) };
    let elsewhere = Identity { id: id(2), epoch: Epoch(100), address: address(66) };
    for identity in [stranger, later, elsewhere] {
        let update = MemberUpdate { identity, incarnation: 0, belief: Belief::Down };
        let message = Message::States(vec![update]).encode().unwrap();
        one.handle_message(Moment::START, id(2), &message);
    }
    assert_eq!(one.member_state(id(2)), Some(MemberState::Alive));
    assert!(one.membership.belief(id(9)).is_none());
    let asks = std::iter::from_fn(|| one.poll_transmit())
        .filter_map(|out| Message::decode(&out.data).ok())
        .any(|message| matches!(message, Message::Want(want) if want.members.contains(&id(9))));
    assert!(asks, "the record is asked for");
}

#[test]
fn one_peer_makes_this_member_renew_once_in_ten_seconds() {
    let [mut one, _] = pair();
    for at in (0..9_000).step_by(100).map(Moment::from_millis) {
        let identity = one.membership.identity();
        let message = Message::Convicted(identity).encode().unwrap();
        one.handle_message(at, id(2), &message);
    }
    assert_eq!(one.epoch(), Epoch(101));
}

#[test]
fn no_epoch_is_used_before_it_is_durable() {
    let [mut one, _] = pair();
    let forced = |one: &mut Mesh, at: u64| {
        let message = Message::Convicted(one.membership.identity()).encode().unwrap();
        one.handle_message(Moment::from_secs(at), id(2), &message);
    };
    for round in 1..=EPOCH_RESERVE + 50 {
        forced(&mut one, round * 20);
        while one.poll_transmit().is_some() {}
    }
    assert_eq!(one.epoch(), Epoch(100 + EPOCH_RESERVE));
    assert!(events(&mut one).iter().any(|e| matches!(e, MeshEvent::EpochsNeeded { .. })));
    one.extend_epochs(Moment::from_secs(30_000), Epoch(5_000));
    forced(&mut one, 30_001);
    assert_eq!(one.epoch(), Epoch(101 + EPOCH_RESERVE));
}

#[test]
fn a_member_that_moves_is_reached_where_it_is_now_and_was_never_down() {
    let mut nodes = pair();
    run(&mut nodes, 0, 1_000);
    let before = nodes[1].epoch();
    nodes[1].set_address(Moment::from_secs(1), address(9));
    run(&mut nodes, 1_000, 6_000);
    let [mut one, two] = nodes;
    let view = one.snapshot().members[&id(2)].clone();
    assert_eq!((view.address, view.state), (address(9), MemberState::Alive));
    assert!(two.epoch() > before, "the detector knows a run by one address");
    let down = |event: &MeshEvent| matches!(event, MeshEvent::MemberDown { .. });
    assert!(!events(&mut one).iter().any(down));
}

#[test]
fn announced_restart_hides_a_member_for_a_minute_and_then_it_is_down() {
    let mut nodes = pair();
    run(&mut nodes, 0, 1_000);
    nodes[1].set_phase(Moment::from_secs(1), MemberPhase::Restarting);
    carry(Moment::from_secs(1), &mut nodes);
    let [mut one, _] = nodes; // and the other is gone
    assert_eq!(one.member_state(id(2)), Some(MemberState::Restarting));
    run(std::slice::from_mut(&mut one), 1_000, 59_000);
    assert_eq!(one.member_state(id(2)), Some(MemberState::Restarting));
    run(std::slice::from_mut(&mut one), 59_000, 64_000);
    assert_eq!(one.member_state(id(2)), Some(MemberState::Down));
}

#[test]
fn failure_makes_doubtful_at_once_and_an_answer_clears_it() {
    let [mut one, mut two] = pair();
    two.set_offers(Moment::START, vec![instance("web").into()]);
    let mut nodes = [one, two];
    run(&mut nodes, 0, 2_000); // the hint goes with the next rumours
    [one, two] = nodes;
    let state = |one: &Mesh| one.snapshot().services[&"web".parse().unwrap()].endpoints()[0].state;
    one.take_changed();
    one.handle_evidence(Moment::from_secs(6), two.id(), Evidence::Failed);
    assert_eq!(state(&one), EndpointState::Doubtful);
    assert!(one.take_changed());
    assert!(one.poll_transmit().is_some(), "it is probed out of turn");
    one.handle_evidence(Moment::from_secs(7), two.id(), Evidence::Answered);
    assert_eq!(state(&one), EndpointState::Ready);
    assert!(one.take_changed());
}

/// Each of these questions is a few hundred bytes long and may be answered with all that is known.
#[test]
fn peer_that_asks_again_and_again_is_answered_within_its_allowance() {
    let all: Vec<u8> = (0..64).collect();
    let (entry_buckets, state_buckets) = (all.clone(), all);
    for question in [
        Message::Roots(Roots { entries: 1, states: 1 }),
        Message::Sums(Sums { entries: vec![1; 64], states: vec![1; 64] }),
        Message::Listing(Listing { entry_buckets, state_buckets, ..Listing::default() }),
        Message::Want(Want { members: vec![id(1)], keys: Vec::new() }),
    ] {
        let [mut one, _] = pair();
        let question = question.encode().unwrap();
        let mut answered = |at: Moment| {
            one.handle_message(at, id(2), &question);
            std::iter::from_fn(|| one.poll_transmit()).map(|out| out.data.len()).sum::<usize>()
        };
        let at_once: usize = (0..30_000).map(|_| answered(Moment::START)).sum();
        assert!(at_once > (2 << 20) - 5_000, "{at_once} bytes: the allowance is spent");
        assert!(at_once < (2 << 20) + 10_000, "{at_once} bytes: 2 MiB and the last answer");
        assert!(answered(Moment::from_millis(1_100)) > 0, "a second later it is answered again");
        let refused = MeshEvent::Dropped { from: id(2), reason: "over_allowance" };
        assert!(events(&mut one).contains(&refused));
    }
}

#[test]
fn listing_of_more_buckets_than_there_are_is_refused() {
    let [mut one, _] = pair();
    let listing = Listing { state_buckets: vec![200; 500_000], ..Listing::default() };
    one.handle_message(Moment::START, id(2), &Message::Listing(listing).encode().unwrap());
    let refused = MeshEvent::Blamed { member: id(2), reason: "malformed" };
    assert_eq!(events(&mut one), [refused]);
}

#[test]
fn messages_survive_the_wire() {
    let identity = Identity { id: id(1), epoch: Epoch(1), address: address(1) };
    let key = record_key(id(1));
    let version = grounds(1)[0].version();
    for message in [
        Message::Convicted(identity),
        Message::Entries(grounds(1)),
        Message::Want(Want { members: vec![id(1)], keys: vec![key] }),
        Message::Listing(Listing {
            entry_buckets: vec![1],
            versions: vec![(key, version)],
            state_buckets: vec![2],
            states: vec![MemberUpdate { identity, incarnation: 3, belief: Belief::Suspect }],
        }),
    ] {
        let bytes = message.encode().unwrap();
        assert_eq!(Message::decode(&bytes), Ok(message.clone()));
        for len in 0..bytes.len() {
            assert_ne!(Message::decode(&bytes[..len]), Ok(message.clone()), "{len} bytes");
        }
    }
}

/// Whoever reads the event learns why: it said that it would be back, and nobody accused it.
#[test]
fn a_restart_that_is_never_finished_is_told_as_that() {
    let mut nodes = pair();
    run(&mut nodes, 0, 3_000);
    nodes[1].set_phase(Moment::from_secs(3), MemberPhase::Restarting);
    run(&mut nodes, 3_000, 3_400);
    assert_eq!(nodes[0].member_state(id(2)), Some(MemberState::Restarting));
    events(&mut nodes[0]);
    dialled_until(Moment::from_secs(80), &mut nodes[0]);
    let down = MeshEvent::MemberDown { member: id(2), was: MemberState::Restarting };
    let told = events(&mut nodes[0]);
    assert!(told.contains(&down), "{told:?}");
}

/// What the disk holds is of an earlier run: no change, and no announcement of this moment.
#[test]
fn a_node_that_begins_again_tells_nothing_of_its_former_run() {
    let mut nodes = pair();
    nodes[0].set_offers(Moment::START, vec![instance("web").into()]);
    nodes[1].set_offers(Moment::START, vec![instance("db").into()]);
    run(&mut nodes, 0, 3_000);
    for node in &mut nodes {
        node.set_phase(Moment::from_secs(3), MemberPhase::Restarting);
    }
    run(&mut nodes, 3_000, 3_200);
    let disk: Vec<_> = nodes[0].entries().cloned().collect();
    let offers = vec![instance("web").into()];
    let config = MeshConfig { epoch: Epoch(5_000), offers, ..config(1, &[]) };
    let signer = Box::new(TestKey::new(1));
    let mut again = Mesh::new(Moment::START, config, signer, 1, disk).unwrap();
    for secs in 0..5 {
        again.handle_timeout(Moment::from_secs(secs));
        assert_eq!(again.member_state(id(1)), Some(MemberState::Alive), "after {secs} s");
        assert_eq!(again.member_state(id(2)), Some(MemberState::Down), "after {secs} s");
        assert_eq!(again.snapshot().services.len(), 2, "after {secs} s");
    }
    assert!(again.is_settled());
    let is_news = |event: &MeshEvent| {
        matches!(
            event,
            MeshEvent::InstanceAdded { .. }
                | MeshEvent::InstanceRemoved { .. }
                | MeshEvent::InstanceChanged { .. }
                | MeshEvent::MemberRestarting(_)
        )
    };
    let told = events(&mut again);
    assert!(!told.iter().any(is_news), "{told:?}");
}

/// Since when a member is as it is does not depend on what it serves, and leaving withdraws all that.
#[test]
fn a_change_of_services_is_none_of_state_and_who_leaves_serves_nothing_any_more() {
    let mut nodes = pair();
    nodes[1].set_offers(Moment::START, vec![instance("web").into()]);
    run(&mut nodes, 0, 3_000);
    let seen = |nodes: &[Mesh]| nodes[0].snapshot().members[&id(2)].clone();
    let before = seen(&nodes);
    assert_eq!((before.state, before.services.len()), (MemberState::Alive, 1));
    let now = Moment::from_secs(3);
    nodes[1].set_offers(now, vec![instance("web").into(), instance("db").into()]);
    run(&mut nodes, 3_000, 6_000);
    assert_eq!((seen(&nodes).changed_at, seen(&nodes).services.len()), (before.changed_at, 2));

    events(&mut nodes[0]);
    nodes[1].leave(Moment::from_secs(6));
    run(&mut nodes, 6_000, 6_400);
    let told = events(&mut nodes[0]);
    assert!(told.contains(&MeshEvent::MemberLeft(id(2))), "{told:?}");
    let is_down = |event: &MeshEvent| matches!(event, MeshEvent::MemberDown { member, .. } if *member == id(2));
    assert!(!told.iter().any(is_down), "it did not die: {told:?}");
    let after = seen(&nodes);
    assert_eq!((after.state, after.services.len()), (MemberState::Left, 0));
    assert!(after.changed_at >= Moment::from_secs(6));
    assert!(nodes[0].snapshot().services.is_empty());
}

/// Counted, an instance that takes no calls would stand in for the one that does.
#[test]
fn instance_without_weight_makes_nothing_the_one_of_two() {
    let mut nodes = pair();
    let parked =
        InstanceRecord { id: "parked".parse().unwrap(), weight: Weight(0), ..instance("web") };
    nodes[1].set_offers(Moment::START, vec![instance("web").into(), parked.into()]);
    run(&mut nodes, 0, 3_000);
    let accused = ObservedWindow {
        member: id(2),
        instance: "web".parse().unwrap(),
        samples: 3,
        failures: 3,
        first_failure_age_ms: Some(0),
        last_failure_age_ms: Some(0),
        last_success_age_ms: None,
    };
    let word = Observations {
        calls: vec!["web".parse().unwrap()],
        called: 4,
        accused: 1,
        windows: vec![accused],
        signed_at_ms: Some(u64::MAX / 4),
    };
    let shared = &mut nodes[0].shared;
    for caller in 3..=4 {
        shared.handle_report(Moment::from_secs(3), id(caller), &word);
    }
    (3_000..4_000).step_by(20).for_each(|at| shared.handle_timeout(Moment::from_millis(at)));
    assert!(shared.is_failing(&"web".parse().unwrap()), "all that takes calls fails");
    let key = InstanceKey { member: id(2), instance: "web".parse().unwrap() };
    assert_eq!(shared.verdict(&key).ejection(), None);
}

/// What was there when a node began is not new to it; what drains and comes back is.
#[test]
fn instance_is_new_to_others_from_when_it_came_back_into_rotation() {
    let mut nodes = pair();
    nodes[1].set_offers(Moment::START, vec![instance("web").into()]);
    run(&mut nodes, 0, 12_000);
    let rotation = |nodes: &[Mesh]| {
        nodes[0].snapshot().services[&"web".parse().unwrap()].endpoints()[0].rotation
    };
    assert_eq!(rotation(&nodes), Rotation::In { since: None });
    nodes[1].set_phase(Moment::from_secs(12), MemberPhase::Draining);
    run(&mut nodes, 12_000, 15_000);
    assert_eq!(rotation(&nodes), Rotation::Out);
    nodes[1].set_phase(Moment::from_secs(15), MemberPhase::Running);
    run(&mut nodes, 15_000, 18_000);
    let since = rotation(&nodes).since().unwrap();
    assert!((15..18).contains(&since.since(Moment::START).as_secs()), "{since:?}");
    run(&mut nodes, 18_000, 21_000);
    assert_eq!(rotation(&nodes).since(), Some(since));
}

/// What a member says that a packet of the detector carries.
fn gossip(from: &Mesh, to: &Mesh, updates: &[MemberUpdate]) -> Vec<u8> {
    const GOSSIP: u32 = 8; // of foca's messages
    let header = (from.membership.identity(), 0_u16, to.membership.identity(), GOSSIP);
    let mut packet = wire::encode(&header).unwrap();
    packet.extend(u16::try_from(updates.len()).unwrap().to_be_bytes());
    updates.iter().for_each(|update| packet.extend(wire::encode(update).unwrap()));
    packet
}

fn three() -> [Mesh; 3] {
    let mut nodes = [node(1, &[]), node(2, &[1]), node(3, &[1])];
    carry(Moment::START, &mut nodes);
    run(&mut nodes, 0, 3_000);
    nodes.iter_mut().for_each(|node| while node.poll_event().is_some() {});
    for pair in [(0, 1), (0, 2), (1, 2)] {
        let seen = nodes[pair.0].member_state(nodes[pair.1].id());
        assert_eq!(seen, Some(MemberState::Alive), "{pair:?}");
    }
    nodes
}

/// Node 3 lies to node 1 about node 2, in every way, again and again.
#[test]
fn liar_kills_nobody_and_is_named() {
    let mut nodes = three();
    let mut told = BTreeSet::new();
    for round in 0..100_u64 {
        let now = 3_000 + round * 200;
        let at = Moment::from_millis(now);
        let victim = nodes[1].membership.identity();
        let incarnation = nodes[0].membership.belief(victim.id).unwrap().incarnation;
        let said = |identity, incarnation, belief| MemberUpdate { identity, incarnation, belief };
        let elsewhere = Identity { address: address(66), ..victim };
        let next = Identity { epoch: Epoch(victim.epoch.0 + 1), ..victim };
        let lies = [
            said(victim, incarnation, Belief::Suspect),
            said(victim, incarnation + 9, Belief::Suspect),
            said(victim, incarnation + 30_000, Belief::Suspect),
            said(victim, u16::MAX, Belief::Suspect),
            said(victim, incarnation, Belief::Down),
            said(elsewhere, incarnation, Belief::Alive),
            said(next, 0, Belief::Down),
        ];
        let packet = gossip(&nodes[2], &nodes[0], &lies);
        let liar = nodes[2].id();
        nodes[0].handle_datagram(at, liar, &packet);
        let states = Message::States(lies.to_vec()).encode().unwrap();
        nodes[0].handle_message(at, liar, &states);
        let identity = nodes[1].membership.identity();
        let convicted = Message::Convicted(identity).encode().unwrap();
        nodes[1].handle_message(at, liar, &convicted);
        run(&mut nodes, now, now + 200);
        for (teller, node) in nodes.iter_mut().enumerate() {
            for event in events(node) {
                assert!(!matches!(event, MeshEvent::MemberDown { .. }), "{teller}: {event:?}");
                told.insert(format!("{teller}: {event:?}"));
            }
        }
    }
    let liar = nodes[2].id();
    for expected in [
        MeshEvent::FalseDeath { from: liar, member: nodes[1].id() },
        MeshEvent::Blamed { member: liar, reason: "absurd_incarnation" },
        MeshEvent::Dropped { from: liar, reason: "incarnation_jump" },
        MeshEvent::Dropped { from: liar, reason: "other_address" },
    ] {
        assert!(told.contains(&format!("0: {expected:?}")), "{expected:?}: {told:#?}");
    }
    let renewed = nodes[1].epoch().0 - 100;
    assert!(renewed < 25, "{renewed} epochs in 20 s");
}

/// A crash is not told more slowly for it: everybody suspected the member before.
#[test]
fn death_of_a_suspect_that_stayed_silent_is_believed_at_once() {
    let nodes = three();
    let [mut one, victim, liar] = nodes;
    let identity = victim.membership.identity();
    let said = |belief| MemberUpdate { identity, incarnation: 0, belief };
    let at = Moment::from_millis;
    one.handle_datagram(at(3_000), liar.id(), &gossip(&liar, &one, &[said(Belief::Suspect)]));
    assert_eq!(one.member_state(id(2)), Some(MemberState::Suspect));
    one.handle_datagram(at(4_000), liar.id(), &gossip(&liar, &one, &[said(Belief::Down)]));
    assert_eq!(one.member_state(id(2)), Some(MemberState::Suspect), "it had no time");
    one.handle_datagram(at(4_600), liar.id(), &gossip(&liar, &one, &[said(Belief::Down)]));
    assert_eq!(one.member_state(id(2)), Some(MemberState::Down));
}

/// Versions of node 2's record from `from` on, as it signs them itself.
fn versions(from: u64, count: u64) -> Vec<Entry> {
    let sign = |version| {
        let body = crate::model::MemberRecord {
            name: name(2),
            address: address(2),
            zone: format!("zone-{version}"),
            phase: MemberPhase::Running,
            instances: Vec::new(),
            agent_version: String::new(),
            idempotent: Vec::new(),
            capacities: Vec::new(),
        };
        let payload = wire::encode_payload(&body).unwrap();
        let (key, kind) = (TestKey::new(2), EntryKind::RECORD);
        Entry::sign(&MESH, &key, kind, [0; 16], Epoch(100), version, &payload).unwrap()
    };
    (from..from + count).map(sign).collect()
}

#[test]
fn member_that_signs_ever_new_records_is_taken_at_a_rate_named_and_heard_in_the_end() {
    let [mut one, _] = pair();
    let mut taken = 0;
    let mut send = |one: &mut Mesh, at: Moment, entries: Vec<Entry>| {
        one.handle_message(at, id(2), &Message::Entries(entries).encode().unwrap());
        let told = events(one);
        assert!(told.contains(&MeshEvent::OverRate(id(2))), "{told:?}");
        taken += told.iter().filter(|event| matches!(event, MeshEvent::EntryAccepted(_))).count();
    };
    for round in 0..20 {
        let at = Moment::from_millis(round * 100);
        send(&mut one, at, versions(100 + round * 100, 100));
        one.handle_timeout(at);
        while one.poll_transmit().is_some() {}
    }
    assert!((16..=25).contains(&taken), "{taken} of 2,000 in 2 s");
    // Silence, and then what a repair brings.
    let last = versions(2_099, 1);
    let message = Message::Entries(last.clone()).encode().unwrap();
    one.handle_message(Moment::from_secs(4), id(2), &message);
    assert_eq!(one.entry(&record_key(id(2))), Some(&last[0]));
}

#[test]
fn honest_member_that_restarts_again_and_again_is_never_over_the_rate() {
    let mut nodes = pair();
    for round in 1..10_u64 {
        let at = Moment::from_secs(round * 3);
        for number in 0..8 {
            let name = format!("web-{round}-{number}");
            nodes[1].set_offers(at, vec![instance(&name).into()]);
            carry(at, &mut nodes);
        }
        run(&mut nodes, round * 3_000, round * 3_000 + 3_000);
        let told = events(&mut nodes[0]);
        assert!(!told.contains(&MeshEvent::OverRate(id(2))), "{round}: {told:?}");
    }
    assert_eq!(nodes[0].instances(id(2)).next().unwrap().id.as_str(), "web-9-7");
}

#[test]
fn one_bad_signature_ends_the_message_and_names_its_sender() {
    let [mut one, _] = pair();
    let [good, other] = &versions(100, 2)[..] else { panic!("two") };
    let mut forged = good.bytes().to_vec();
    *forged.last_mut().unwrap() ^= 1;
    let forged = Entry::decode(forged.into()).unwrap();
    let message = Message::Entries(vec![forged, other.clone()]).encode().unwrap();
    one.handle_message(Moment::START, id(2), &message);
    let refused = MeshEvent::EntryRefused { from: id(2), reason: "signature" };
    assert_eq!(events(&mut one), [refused]);
}

#[test]
fn peer_has_so_many_entries_verified_and_no_more() {
    let [mut one, _] = pair();
    // Signed well, by keys that nobody enrolled: each costs a look at its signature.
    let strangers = (0..3_u16).map(|round| {
        let key = TestKey::new(9);
        let sign = |number: u16| {
            let kind = EntryKind(1_000 + round * 2_000 + number);
            Entry::sign(&MESH, &key, kind, [0; 16], Epoch(1), 1, b"").unwrap()
        };
        (0..2_000).map(sign).collect::<Vec<_>>()
    });
    let mut dropped = 0;
    for entries in strangers {
        one.handle_message(Moment::START, id(2), &Message::Entries(entries).encode().unwrap());
        let over = MeshEvent::Dropped { from: id(2), reason: "over_allowance" };
        dropped += events(&mut one).iter().filter(|event| **event == over).count();
    }
    assert_eq!(dropped, 1, "4,096 were looked at, and the rest of the third message was not");
}

#[test]
fn hints_of_things_that_nobody_has_fill_no_more_than_their_share() {
    let [mut one, two] = pair();
    let mut kind = 1_000;
    let mut told = BTreeSet::new();
    for _ in 0..200 {
        let mut packet = gossip(&two, &one, &[]);
        while packet.len() < 1_000 {
            kind += 1;
            let key = TestKey::new(9);
            let entry =
                Entry::sign(&MESH, &key, EntryKind(kind), [0; 16], Epoch(1), 1, b"").unwrap();
            let hint = hint::Hint::of(&entry).encode().unwrap();
            packet.extend(u16::try_from(hint.len()).unwrap().to_be_bytes());
            packet.extend(hint);
        }
        one.handle_datagram(Moment::START, two.id(), &packet);
        told.extend(events(&mut one).into_iter().map(|event| format!("{event:?}")));
        while one.poll_transmit().is_some() {}
    }
    let over = MeshEvent::Dropped { from: id(2), reason: "over_allowance" };
    assert!(told.contains(&format!("{over:?}")), "{told:?}");
    let asked = one.store_sizes().find(|store| store.name == "things asked for").unwrap();
    assert!(asked.len < 1_100, "{asked:?}");
}

/// Node 2 tells of a record before node 3 does, again and again, and never sends it.
#[test]
fn peer_that_never_sends_what_it_tells_of_keeps_no_news_away() {
    let [mut one, two, three] = three();
    let fresh = |version| hint_of(&two, version);
    let mut asked = Vec::new();
    for round in 0..8 {
        let at = Moment::from_millis(3_000 + round * 400);
        one.handle_timeout(at);
        while one.poll_transmit().is_some() {}
        let hint = fresh(1_000 + round);
        for teller in [&three, &two] {
            let mut packet = gossip(teller, &one, &[]);
            packet.extend(u16::try_from(hint.len()).unwrap().to_be_bytes());
            packet.extend(&hint);
            one.handle_datagram(at, teller.id(), &packet);
        }
        let wants = std::iter::from_fn(|| one.poll_transmit())
            .filter(|out| matches!(Message::decode(&out.data), Ok(Message::Want(_))));
        asked.extend(wants.map(|out| (round, out.to)));
    }
    let of = |id: MemberId| {
        let is_of =
            move |to: &Destination| matches!(to, Destination::Member { id: of, .. } if *of == id);
        asked.iter().filter(|(_, to)| is_of(to)).count()
    };
    assert!(of(three.id()) > 0 && of(two.id()) > 0, "{asked:?}");
}

/// A hint of that version of a node's record.
fn hint_of(node: &Mesh, version: u64) -> Bytes {
    let entry = versions(version, 1).remove(0);
    assert_eq!(entry.key().owner, node.id());
    hint::Hint::of(&entry).encode().unwrap()
}

#[test]
fn suspect_that_renews_is_seen_alive_at_once() {
    let mut nodes = three();
    let identity = nodes[1].membership.identity();
    let said = |belief| MemberUpdate { identity, incarnation: 0, belief };
    let at = Moment::from_secs(3);
    let suspected = gossip(&nodes[2], &nodes[0], &[said(Belief::Suspect)]);
    let teller = nodes[2].id();
    nodes[0].handle_datagram(at, teller, &suspected);
    assert_eq!(nodes[0].member_state(id(2)), Some(MemberState::Suspect));
    while nodes[0].poll_transmit().is_some() {} // it is told nothing
    let convicted = Message::Convicted(identity).encode().unwrap();
    nodes[1].handle_message(at, teller, &convicted);
    // Its record comes first, its own word after that.
    let record = nodes[1].entry(&record_key(id(2))).unwrap().clone();
    let message = Message::Entries(vec![record]).encode().unwrap();
    nodes[0].handle_message(at, teller, &message);
    let packet = gossip(&nodes[1], &nodes[0], &[]);
    nodes[0].handle_datagram(at, id(2), &packet);
    assert_eq!(nodes[0].member_state(id(2)), Some(MemberState::Alive));
}

#[test]
fn a_replaced_member_is_dialled_no_more() {
    let sign = |member: u8, replaces: Vec<MemberId>| {
        let enrolment = Enrolment {
            key: TestKey::new(member).public_key(),
            name: name(2),
            serial: 1,
            services: None,
            issued_at: 1,
            invite: None,
            replaces,
            let_in_by: None,
        };
        let (payload, subject) = (wire::encode_payload(&enrolment).unwrap(), id(member));
        let (kind, issuer) = (EntryKind::ENROLMENT, TestKey::new(ISSUER));
        Entry::sign(&MESH, &issuer, kind, *subject.as_bytes(), Epoch(1), 1, &payload).unwrap()
    };
    let dials = |replaces: Vec<MemberId>| {
        let entries = [grounds(1), vec![sign(2, vec![]), sign(3, replaces)]].concat();
        let config = MeshConfig { remembered: vec![(id(2), address(2))], ..config(1, &[]) };
        let signer = Box::new(TestKey::new(1));
        let mut one = Mesh::new(Moment::START, config, signer, 1, entries).unwrap();
        let mut dials = 0;
        for at in (0..60_000).step_by(20).map(Moment::from_millis) {
            if one.poll_timeout().is_some_and(|due| due <= at) {
                one.handle_timeout(at);
            }
            dials += std::iter::from_fn(|| one.poll_transmit()).count();
        }
        dials
    };
    assert!(dials(vec![]) > 5, "for ever");
    assert_eq!(dials(vec![id(2)]), 0);
}

#[test]
fn who_knows_a_refutation_tells_whoever_missed_it() {
    let mut nodes = three();
    let identity = nodes[1].membership.identity();
    let suspect = [MemberUpdate { identity, incarnation: 0, belief: Belief::Suspect }];
    let (at, later) = (Moment::from_secs(3), Moment::from_secs(4));
    let (one, three) = (nodes[0].id(), nodes[2].id());
    let suspected = gossip(&nodes[0], &nodes[2], &suspect);
    nodes[2].handle_datagram(at, one, &suspected);
    run(&mut nodes[1..], 3_000, 4_000); // the first misses the refutation
    let known = nodes[2].membership.belief(id(2)).unwrap();
    assert_eq!((known.belief, known.incarnation), (Belief::Alive, 1));
    let suspected = gossip(&nodes[2], &nodes[0], &suspect);
    nodes[0].handle_datagram(later, three, &suspected);
    assert_eq!(nodes[0].member_state(id(2)), Some(MemberState::Suspect));
    while nodes[0].poll_transmit().is_some() {} // it cannot ask the second itself

    let told = gossip(&nodes[0], &nodes[2], &suspect);
    nodes[2].handle_datagram(later, one, &told);
    while let Some(answer) = nodes[2].poll_transmit() {
        if matches!(answer.to, Destination::Member { id, .. } if id == one) {
            nodes[0].handle_datagram(later, three, &answer.data);
        }
    }
    assert_eq!(nodes[0].member_state(id(2)), Some(MemberState::Alive));
}
