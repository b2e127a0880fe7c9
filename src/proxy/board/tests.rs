use std::time::Duration;

use super::*;
use crate::balancer::{Balance, Prefer};
use crate::breaker::{BreakerState, Trip};
use crate::mesh::{EndpointState, Rotation};
use crate::model::{Capacity, Protocol};

const ME: MemberId = MemberId::from_bytes([255; 16]);

fn boards() -> Boards {
    Boards::new(ME, Clock::new(), Metrics::new(), EventLog::new("me"), 1)
}

fn service() -> ServiceName {
    "web".parse().unwrap()
}

fn snapshot(endpoints: Vec<Endpoint>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let view = ServiceView::new(service(), Protocol::Http, endpoints);
    snapshot.services.insert(service(), Arc::new(view));
    snapshot
}

fn pick(boards: &Boards, snapshot: &Snapshot, tried: &Tried) -> Result<Picked, NoEndpoint> {
    boards.pick(boards.now(), snapshot, &service(), &Choice::default(), tried, |_| false)
}

/// How many of 1,000 picks go to each, by the number of its member.
fn shares(boards: &Boards, snapshot: &Snapshot) -> BTreeMap<u8, u32> {
    let mut shares = BTreeMap::new();
    for _ in 0..1_000 {
        let picked = pick(boards, snapshot, &Tried::default()).unwrap();
        *shares.entry(picked.endpoint().member.as_bytes()[0]).or_default() += 1;
    }
    shares
}

/// One call to `number` that ends like this.
fn call(boards: &Boards, snapshot: &Snapshot, number: usize, outcome: Outcome) {
    let board = boards.of(snapshot, &service()).unwrap();
    let picked = Picked { board, at: number };
    let now = boards.now();
    let trial = boards.begin(now, &picked);
    boards.settle(now, &picked, trial, outcome);
}

#[test]
fn what_is_known_of_an_endpoint_outlives_every_change_of_the_mesh() {
    let boards = boards();
    let before = snapshot(vec![Endpoint::numbered(1), Endpoint::numbered(2)]);
    (0..5).for_each(|_| call(&boards, &before, 0, Outcome::Failed));
    let after = snapshot(vec![Endpoint::numbered(0), Endpoint::numbered(1), Endpoint::numbered(2)]);
    let report = boards.report(&Endpoint::numbered(1));
    assert_eq!(report.breaker.unwrap().state, BreakerState::Open);
    assert!(!shares(&boards, &after).contains_key(&1), "its place is another, its breaker not");
    for _ in 0..2 {
        shares(&boards, &snapshot(vec![Endpoint::numbered(2)])); // a view holds what the next one may need
    }
    assert_eq!(boards.report(&Endpoint::numbered(1)), EndpointReport::default(), "it is forgotten");
}

#[test]
fn open_breaker_is_the_last_resort_and_refused_connections_open_it_sooner() {
    let boards = boards();
    let snapshot = snapshot(vec![Endpoint::numbered(1), Endpoint::numbered(2)]);
    (0..2).for_each(|_| call(&boards, &snapshot, 0, Outcome::Unreached));
    assert_eq!(shares(&boards, &snapshot).into_keys().collect::<Vec<_>>(), [2]);
    let mut tried = Tried::default();
    tried.add(&pick(&boards, &snapshot, &tried).unwrap());
    let last = pick(&boards, &snapshot, &tried).unwrap();
    assert_eq!(last.endpoint().member, Endpoint::numbered(1).member, "nobody else is left");
    tried.add(&last);
    assert_eq!(pick(&boards, &snapshot, &tried).unwrap_err(), NoEndpoint::NoEndpoints);
    assert_eq!(boards.metrics.breakers("web", "open", "local"), 1);
}

#[test]
fn breaker_that_is_off_never_opens_and_tells_nobody() {
    let boards = boards();
    let off = BreakerLimits { scope: Some(Scope::Off), ..BreakerLimits::default() };
    boards.configure(&service(), &off);
    let snapshot = snapshot(vec![Endpoint::numbered(1), Endpoint::numbered(2)]);
    (0..100).for_each(|_| call(&boards, &snapshot, 0, Outcome::Failed));
    assert!(boards.take_news().is_empty());
    assert!(
        boards
            .report(&Endpoint::numbered(1))
            .breaker
            .is_none_or(|b| b.state == BreakerState::Closed)
    );
    let shares = shares(&boards, &snapshot);
    assert!(shares[&2] > 900, "failures still count as slowness: {shares:?}");
    boards.configure(&service(), &BreakerLimits::default());
    (0..5).for_each(|_| call(&boards, &snapshot, 0, Outcome::Failed));
    assert_eq!(boards.report(&Endpoint::numbered(1)).breaker.unwrap().state, BreakerState::Open);
}

#[test]
fn who_is_new_begins_with_a_tenth_unless_all_are() {
    let boards = boards();
    let now = boards.now();
    let new = |number| Endpoint {
        rotation: Rotation::In { since: Some(now) },
        ..Endpoint::numbered(number)
    };
    let one = snapshot(vec![Endpoint::numbered(1), Endpoint::numbered(2), new(3)]);
    let share = shares(&boards, &one).get(&3).copied().unwrap_or(0);
    assert!((5..80).contains(&share), "{share} of 1,000 for a tenth of a third");
    let all = shares(&boards, &snapshot(vec![new(1), new(2)]));
    assert!(all.values().all(|share| (400..600).contains(share)), "{all:?}");
}

#[test]
fn who_was_absent_and_takes_calls_again_is_new_although_no_check_said_so() {
    let boards = boards();
    let snapshot = snapshot(vec![Endpoint::numbered(1), Endpoint::numbered(2)]);
    let slot = Arc::clone(&boards.of(&snapshot, &service()).unwrap().slots[0]);
    slot.note_taken(boards.now());
    assert!(shares(&boards, &snapshot)[&1] > 400, "it never was absent");
    slot.note_absent();
    slot.note_taken(boards.now());
    let share = shares(&boards, &snapshot)[&1];
    assert!((10..120).contains(&share), "{share} of 1,000 for a tenth of a half");
}

#[test]
fn full_ones_are_gone_around_and_used_when_all_are_full() {
    let boards = boards();
    let limited =
        Endpoint { capacity: Capacity { soft: Some(2), hard: Some(3) }, ..Endpoint::numbered(1) };
    let snapshot = snapshot(vec![limited, Endpoint::numbered(2)]);
    let full = boards.of(&snapshot, &service()).unwrap();
    for _ in 0..2 {
        full.slots[0].enter(boards.now());
    }
    assert_eq!(shares(&boards, &snapshot).into_keys().collect::<Vec<_>>(), [2]);
    let mut tried = Tried::default();
    tried.add(&Picked { board: Arc::clone(&full), at: 1 });
    assert!(pick(&boards, &snapshot, &tried).is_ok(), "full is better than nothing");
    (0..2).for_each(|_| full.slots[0].leave(boards.now()));
    assert!(shares(&boards, &snapshot).contains_key(&1));
}

#[test]
fn tunnels_of_others_that_rest_do_not_drive_own_calls_from_an_own_instance() {
    let boards = boards();
    let own = Endpoint { member: ME, ..Endpoint::numbered(1) };
    let limited = Endpoint { capacity: Capacity { soft: Some(3), hard: Some(3) }, ..own };
    let snapshot = snapshot(vec![limited.clone(), Endpoint::numbered(2)]);
    let tunnels: Vec<_> = (0..5).map(|_| boards.enter(&service(), &limited.instance)).collect();
    let report = boards.report(&limited);
    assert_eq!((report.in_flight, report.calls, report.under_way), (5, 0, 0));
    let rest = shares(&boards, &snapshot);
    assert!(rest.values().all(|share| (400..600).contains(share)), "{rest:?}");
    tunnels.iter().for_each(|tunnel| tunnel.gauge().begin(boards.now()));
    let work = shares(&boards, &snapshot);
    assert_eq!(work.into_keys().collect::<Vec<_>>(), [2], "it has as many calls as it takes");
}

/// A board of these endpoints for a caller in `eu1/a`.
fn near_board(boards: &Boards, endpoints: Vec<Endpoint>) -> ServiceBoard {
    let snapshot = snapshot(endpoints);
    let view = Arc::clone(&snapshot.services[&service()]);
    let slots: Vec<_> = view
        .endpoints()
        .iter()
        .map(|one| boards.slots.lock().slot(one.member, &service(), &one.instance))
        .collect();
    ServiceBoard {
        view,
        slots,
        plans: Default::default(),
        zone: "eu1/a".into(),
        scope: Scope::Mesh,
        table: OnceLock::new(),
        made_before: None,
        turn: Arc::default(),
    }
}

/// How many of 1,000 calls at that time stay in the zone `eu1/a`.
fn near_of(board: &ServiceBoard, now: Moment) -> usize {
    let prefer = Prefer::try_new(&["same-zone", "any"]).unwrap();
    let choice = Choice { prefer, ..Choice::default() };
    let mut rng = SmallRng::seed_from_u64(3);
    let mut pick = || board.pick(&choice, &Tried::default(), now, |_| false, &mut rng).unwrap();
    (0..1_000).filter(|_| &*board.at(pick()).0.zone == "eu1/a").count()
}

fn zoned(number: u8, zone: &str) -> Endpoint {
    Endpoint { zone: zone.into(), ..Endpoint::numbered(number) }
}

#[test]
fn calls_prefer_the_near_zone_and_leave_it_as_it_fills() {
    let boards = boards();
    let limited = |number, zone| Endpoint {
        capacity: Capacity { soft: Some(10), hard: None },
        ..zoned(number, zone)
    };
    let endpoints = vec![limited(1, "eu1/a"), limited(2, "eu1/b"), limited(3, "us1/a")];
    let board = near_board(&boards, endpoints);
    assert_eq!(near_of(&board, Moment::from_secs(1)), 1_000);
    for _ in 0..8 {
        board.slots[0].enter(boards.now());
    }
    let left = near_of(&board, Moment::from_secs(2));
    assert!((550..750).contains(&left), "{left} stay at 80 % of the limit");
    (0..8).for_each(|_| board.slots[0].leave(boards.now()));
    assert_eq!(near_of(&board, Moment::from_secs(3)), 1_000, "and all are back");
}

#[test]
fn calls_leave_a_zone_that_lost_some_until_they_are_given_up_but_not_for_what_was_taken_out() {
    let boards = boards();
    let out = |number, state, rotation| Endpoint { state, rotation, ..zoned(number, "eu1/a") };
    let lost = Rotation::Lost { at: Moment::from_secs(100) };
    for (why, other, secs, expected) in [
        ("half of it died", out(2, EndpointState::Down, lost), 101, 650..780),
        ("long ago", out(2, EndpointState::Down, lost), 2_000, 1_000..1_001),
        ("it drains", out(2, EndpointState::Draining, Rotation::Out), 101, 1_000..1_001),
        ("it left", out(2, EndpointState::Down, Rotation::Out), 101, 1_000..1_001),
    ] {
        let board = near_board(&boards, vec![zoned(1, "eu1/a"), other, zoned(3, "us1/a")]);
        let near = near_of(&board, Moment::from_secs(secs));
        assert!(expected.contains(&near), "{why}: {near}");
    }
}

#[test]
fn table_is_kept_while_the_same_instances_are_ready() {
    let boards = boards();
    let choice = Choice { balance: Balance::Maglev, hash: 7, ..Choice::default() };
    let led = |snapshot: &Snapshot| {
        let picked =
            boards.pick(boards.now(), snapshot, &service(), &choice, &Tried::default(), |_| false);
        let board = boards.of(snapshot, &service()).unwrap();
        (picked.unwrap().endpoint().member, Arc::clone(&board.table().made))
    };
    let (first, made) = led(&snapshot(vec![Endpoint::numbered(1), Endpoint::numbered(2)]));
    let down = Endpoint { state: EndpointState::Down, ..Endpoint::numbered(0) };
    let (second, same) = led(&snapshot(vec![down, Endpoint::numbered(1), Endpoint::numbered(2)]));
    assert!(Arc::ptr_eq(&made, &same), "what is down has no place in it");
    assert_eq!(first, second);
    let (_, other) = led(&snapshot(vec![Endpoint::numbered(1)]));
    assert!(!Arc::ptr_eq(&made, &other));
}

#[test]
fn preview_says_where_calls_go_and_that_one_whose_last_calls_failed_is_avoided() {
    let boards = boards();
    let snapshot = snapshot((1..=3).map(Endpoint::numbered).collect());
    let preview = |choice: Choice| boards.preview(&snapshot, &service(), &choice, |_| false);
    let shares = |choice| -> Vec<f64> { preview(choice).unwrap().shares.into_values().collect() };
    let is_third = |share: &f64| (0.28..0.39).contains(share);
    assert!(shares(Choice::default()).iter().all(is_third), "{:?}", shares(Choice::default()));
    (0..2).for_each(|_| call(&boards, &snapshot, 0, Outcome::Failed));
    assert_eq!(shares(Choice::default())[0], 0.0, "by cost calls go around what failed");
    assert_eq!(boards.report(&Endpoint::numbered(1)).failed.unwrap().count, 2);
    let random = Choice { balance: Balance::Random, ..Choice::default() };
    assert!(shares(random).iter().all(is_third), "{:?}", shares(random));
    (0..3).for_each(|_| call(&boards, &snapshot, 0, Outcome::Failed));
    assert_eq!(shares(random)[0], 0.0, "its breaker is open");
    let opened = boards.report(&Endpoint::numbered(1)).breaker.unwrap().opened.unwrap();
    assert_eq!((opened.trip, opened.in_row), (Trip::Errors, 5));
    call(&boards, &snapshot, 1, Outcome::Success);
    assert_eq!(boards.report(&Endpoint::numbered(2)).failed, None);
}

#[tokio::test(start_paused = true)]
async fn one_of_two_that_fails_is_avoided_by_cost_and_its_breaker_opens_within_a_minute() {
    let boards = boards();
    let snapshot = snapshot(vec![Endpoint::numbered(1), Endpoint::numbered(2)]);
    let mut failures = 0;
    for _ in 0..60 * 100 {
        let picked = pick(&boards, &snapshot, &Tried::default()).unwrap();
        let is_sick = picked.endpoint().member == Endpoint::numbered(1).member;
        failures += u32::from(is_sick);
        let (place, outcome) = if is_sick { (0, Outcome::Failed) } else { (1, Outcome::Success) };
        call(&boards, &snapshot, place, outcome);
        tokio::time::advance(Duration::from_millis(10)).await;
    }
    assert!((5..=12).contains(&failures), "{failures} of 6,000 calls met it");
    let opened = boards.report(&Endpoint::numbered(1)).breaker.unwrap().opened;
    assert!(opened.is_some(), "its breaker never opened");
}

#[test]
fn call_that_is_refused_for_distance_alone_is_told_so() {
    let boards = boards();
    let prefer = Prefer::try_new(&["same-zone"]).unwrap();
    let choice = Choice { prefer, ..Choice::default() };
    let refused = |endpoints| {
        let snapshot = snapshot(endpoints);
        boards.preview(&snapshot, &service(), &choice, |_| false).unwrap_err()
    };
    assert_eq!(refused(vec![Endpoint::numbered(1)]), NoEndpoint::TooFar);
    let down = Endpoint { state: EndpointState::Down, ..Endpoint::numbered(1) };
    assert_eq!(refused(vec![down]), NoEndpoint::NoEndpoints, "no distance would help");
}

#[tokio::test(start_paused = true)]
async fn news_that_finds_the_queue_full_is_told_later_with_what_came_meanwhile() {
    let boards = Arc::new(boards());
    let snapshot = snapshot(vec![Endpoint::numbered(1), Endpoint::numbered(2)]);
    let (windows, mut queue) = tokio::sync::mpsc::channel(1);
    let mut telling = std::pin::pin!(Arc::clone(&boards).tell_windows(windows));
    let mut told = Vec::new();
    for calls in [1, 2, 0] {
        (0..calls).for_each(|_| call(&boards, &snapshot, 0, Outcome::Failed));
        // Nobody reads: the first word takes the only place, and the next ones wait.
        let _ = tokio::time::timeout(Duration::from_secs(2), telling.as_mut()).await;
    }
    while told.len() < 2 {
        tokio::select! {
            biased;
            Some(words) = queue.recv() => told.push(words),
            () = telling.as_mut() => {}
            () = tokio::time::sleep(Duration::from_secs(5)) => panic!("nothing more is told"),
        }
    }
    let failures: Vec<_> = told.iter().map(|words| words[0].window.failures).collect();
    assert_eq!(failures, [1, 3], "what came while it waited is in the next word");
    assert!(boards.metrics.breaker_news_delayed.get() >= 1);
}
