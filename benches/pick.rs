//! What it costs to pick one of 1,000 instances, as the data plane does it: the mesh's view, breakers,
//! calls in flight and cost of every endpoint taken into account.
//!
//!     cargo bench --bench pick
//!     cargo bench --bench pick -- --check     # fails at 300 ns or at the first allocation
//!
//! Every figure is that of the quickest of 21 rounds of 20,000 picks, after a warm-up: what else runs on
//! the machine only adds to it. The median stands beside it.

#![allow(clippy::disallowed_methods, clippy::expect_used)] // a benchmark reads the clock, of what it made itself

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use murmesh::balancer::{Balance, Prefer};
use murmesh::breaker::{Ejection, Turn, Verdict};
use murmesh::mesh::{Endpoint, EndpointState, MemberView, Rotation, ServiceView, Snapshot};
use murmesh::model::{
    Epoch, MemberId, MemberPhase, MemberState, Moment, Outcome, Protocol, ServiceName, Weight,
};
use murmesh::proxy::{Boards, Choice, Tried};
use murmesh::runtime::clock::Clock;
use murmesh::telemetry::{EventLog, Metrics};

const ME: MemberId = MemberId::from_bytes([255; 16]);
const INSTANCES: u16 = 1_000;
const SERVICES: u16 = 50;
const PICKS: u32 = 20_000;
const ROUNDS: usize = 21;
const LIMIT: Duration = Duration::from_nanos(300);

fn main() -> ExitCode {
    let is_check = std::env::args().any(|arg| arg == "--check");
    let snapshot = snapshot();
    let service: ServiceName = "web-25".parse().expect("a name");
    let of_many_ejected: ServiceName = "ejected".parse().expect("a name");
    let boards = Boards::new(ME, Clock::new(), Metrics::new(), EventLog::new("bench"), 7);
    let choice = |balance| Choice { balance, prefer: Prefer::default(), hash: 0 };
    let near = Prefer::try_new(&["same-zone", "same-region", "any"]).expect("nearest first");
    let mut missed = 0;
    let mut measure = |name: &str, service: &ServiceName, choice: Choice| {
        let pick = |turn: u32| {
            let choice = Choice { hash: u64::from(turn) * 0x9e37_79b9_7f4a_7c15, ..choice };
            let picked =
                boards
                    .pick(boards.now(), &snapshot, service, &choice, &Tried::default(), |_| false);
            black_box(picked).expect("an instance");
        };
        (0..PICKS).for_each(pick);
        let mut rounds: Vec<_> = (0..ROUNDS).map(|_| timed(pick)).collect();
        rounds.sort();
        let allocations = allocation_counter::measure(|| (0..PICKS).for_each(pick)).count_total;
        let (quickest, median) = (rounds[0].as_nanos(), rounds[ROUNDS / 2].as_nanos());
        let is_held = rounds[0] < LIMIT && allocations == 0;
        missed += u32::from(!is_held);
        let word = if is_held { "held" } else { "missed" };
        println!(
            "{name:<42} {quickest:>5} ns, median {median:>5}  {allocations} allocations  {word}"
        );
    };
    println!(
        "one pick among {INSTANCES} instances, beside {SERVICES} services; limit {LIMIT:?}, 0"
    );
    for balance in Balance::ALL {
        measure(balance.as_str(), &service, choice(balance));
    }
    let usual = choice(Balance::PeakEwma);
    measure("peak_ewma, same-zone first", &service, Choice { prefer: near, ..usual });
    measure("peak_ewma, 300 ejected by all callers", &of_many_ejected, usual);
    for round in 0..u64::from(INSTANCES) * 20 {
        // A third of them breaks; every breaker has seen calls.
        let choice = Choice { hash: round, ..choice(Balance::Random) };
        let picked =
            boards.pick(boards.now(), &snapshot, &service, &choice, &Tried::default(), |_| false);
        let picked = picked.expect("an instance");
        let is_sick = picked.endpoint().port.is_multiple_of(3);
        let outcome = if is_sick { Outcome::Failed } else { Outcome::Success };
        boards.settle(boards.now(), &picked, None, outcome);
    }
    measure("peak_ewma, a third with an open breaker", &service, usual);
    if is_check && missed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn timed(pick: impl Fn(u32)) -> Duration {
    let begun = Instant::now();
    (0..PICKS).for_each(pick);
    begun.elapsed() / PICKS
}

fn snapshot() -> Snapshot {
    let mut snapshot = Snapshot::default();
    let me = MemberView {
        id: ME,
        name: "me".parse().expect("a name"),
        address: "10.0.0.1:7370".parse().expect("an address"),
        zone: "eu1/a".to_owned(),
        state: MemberState::Alive,
        phase: MemberPhase::Running,
        is_revoked: false,
        epoch: Epoch(1),
        version: 1,
        services: Vec::new(),
        changed_at: Moment::START,
    };
    snapshot.members.insert(ME, Arc::new(me));
    for number in 0..SERVICES {
        let name: ServiceName = format!("web-{number}").parse().expect("a name");
        let endpoints = (0..INSTANCES).map(endpoint).collect();
        let view = ServiceView::new(name.clone(), Protocol::Http, endpoints);
        snapshot.services.insert(name, Arc::new(view));
    }
    let name: ServiceName = "ejected".parse().expect("a name");
    let mut endpoints: Vec<_> = (0..INSTANCES).map(endpoint).collect();
    endpoints.iter_mut().take(300).for_each(|endpoint| endpoint.verdict = ejected());
    let view = ServiceView::new(name.clone(), Protocol::Http, endpoints);
    snapshot.services.insert(name, Arc::new(view));
    snapshot
}

/// Its probe is due in an hour, and the turn of the caller then.
fn ejected() -> Verdict {
    let later = Moment::from_secs(3_600);
    let (length, every) = (Duration::from_millis(500), Duration::from_secs(25));
    Verdict::Ejected(Ejection {
        since: Moment::START,
        tried_at: Moment::START,
        period: Duration::from_secs(3_600),
        turn: Some(Turn { from: later, length, every }),
        anyone_at: later,
        grounds: Default::default(),
    })
}

fn endpoint(number: u16) -> Endpoint {
    let mut id = [0; 16];
    id[..2].copy_from_slice(&number.to_be_bytes());
    Endpoint {
        instance: format!("web-{number}").parse().expect("an id"),
        member: MemberId::from_bytes(id),
        member_name: format!("node-{number}").parse().expect("a name"),
        address: "10.0.0.1:7370".parse().expect("an address"),
        port: number,
        tags: Vec::new(),
        weight: Weight(100),
        state: EndpointState::Ready,
        zone: format!("eu{}/a", number % 3).into(),
        verdict: Verdict::Clear,
        idempotent: Arc::default(),
        capacity: Default::default(),
        rotation: Rotation::In { since: None },
        changed_at: Moment::START,
    }
}
