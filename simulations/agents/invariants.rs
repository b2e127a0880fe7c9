//! What must hold at every look, whatever happens to machines and links (`research/reliability.md`
//! gives them their letters): (a) to (d), (f) and (h) here, (e) in the ledger, (g) where an agent stops.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use murmesh::model::{Epoch, MemberId, MemberPhase, MemberState, ServiceName};
use murmesh::{EndpointState, MemberView};

use super::links::Links;
use super::node::{Node, Seen, name};

/// Retries for each request.
const RETRIES_SHARE: f64 = 0.2;
/// Retries in a second, and how many seconds' worth may be made at once.
const RETRIES_PER_SECOND: f64 = 10.0;
const RETRIES_SAVED: f64 = 100.0;

/// The detector's constants of the profile that every node runs, and the longest dial.
const PERIOD: Duration = Duration::from_millis(700);
const SUSPICION: Duration = Duration::from_secs(3);
const DIAL: Duration = Duration::from_secs(3);

/// T_probe: how long a member that another one reaches may look to it as if it were away. The latest
/// dial of somebody who is away is due after a second for each member, and a quarter more; one that
/// began before a heal fails first; and rumours of the death are refuted in a round of probes and a
/// suspicion.
pub(crate) fn probe_time_max(members: usize) -> Duration {
    let pause = Duration::from_secs(members.max(3) as u64).mul_f64(1.25);
    pause + DIAL + DIAL + PERIOD * members as u32 + SUSPICION
}

/// What a member says of itself under one number.
#[derive(Clone, Debug, PartialEq)]
struct Word {
    address: SocketAddr,
    zone: String,
    phase: MemberPhase,
    services: Vec<ServiceName>,
}

impl Word {
    fn of(view: &MemberView) -> Self {
        let MemberView { address, zone, phase, services, .. } = view.clone();
        Self { address, zone, phase, services }
    }
}

/// What a node must see of another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sight {
    Member,
    Instance(ServiceName),
}

/// Checked at every look; a breach ends the run.
#[derive(Default)]
pub(super) struct Invariants {
    /// (b) Of every member under each number, whoever saw it first.
    words: BTreeMap<(MemberId, Epoch, u64), Word>,
    /// (c) Of each member as each node saw it last.
    versions: BTreeMap<(usize, MemberId), (Epoch, u64)>,
    /// (a), (d) Since when somebody does not see what it must.
    missed: BTreeMap<(usize, usize, Sight), Duration>,
    /// How long anything was missed that came back.
    pub(super) missed_max: Duration,
}

impl Invariants {
    /// The agent of a node runs no more.
    pub(super) fn forget(&mut self, index: usize) {
        self.versions.retain(|(by, _), _| *by != index);
    }

    pub(super) fn look(&mut self, now: Duration, nodes: &[Rc<Node>], links: &Links) {
        let seen: Vec<_> = nodes.iter().map(|node| node.seen.borrow()).collect();
        for (node, seen) in nodes.iter().zip(&seen) {
            let Some(seen) = seen.as_ref() else { continue };
            self.check_words(node, seen);
            check_stores(node, seen);
            check_retries(now, node, seen);
        }
        for (by, view) in nodes.iter().zip(&seen) {
            for (of, other) in nodes.iter().zip(&seen).filter(|(of, _)| of.index != by.index) {
                let pair = view.as_ref().zip(other.as_ref());
                let pair = pair.filter(|_| links.join(by.index, of.index) && !of.is_stopping.get());
                match pair {
                    Some((view, other)) => self.check_sights(now, by, view, of, other, nodes.len()),
                    None => self.missed.retain(|(a, b, _), _| (*a, *b) != (by.index, of.index)),
                }
            }
        }
    }

    fn check_words(&mut self, node: &Node, seen: &Seen) {
        for view in seen.snapshot.members.values() {
            let number = (view.epoch, view.version);
            let before = self.versions.insert((node.index, view.id), number);
            let went_back = before.is_some_and(|before| before > number);
            let who = &view.name;
            assert!(!went_back, "(c) {} of {who} from {before:?} to {number:?}", node.index);
            if before == Some(number) {
                continue;
            }
            let word = Word::of(view);
            let first = self.words.entry((view.id, number.0, number.1)).or_insert(word.clone());
            assert_eq!(*first, word, "(b) {} sees another {who} under {number:?}", node.index);
        }
    }

    /// (a) Members that reach each other list each other; (d) and use each other's instances.
    fn check_sights(
        &mut self,
        now: Duration,
        by: &Node,
        view: &Seen,
        of: &Node,
        other: &Seen,
        members: usize,
    ) {
        let state = view.snapshot.members.get(&other.id).map(|member| member.state);
        let is_listed = matches!(state, Some(MemberState::Alive | MemberState::Suspect));
        self.note(now, by, of, Sight::Member, is_listed, members);
        let is_healthy = of.has_application.get() && !of.is_drained.get();
        for service in of.services.borrow().iter() {
            let is_used = view
                .snapshot
                .endpoints(service)
                .iter()
                .any(|e| e.member == other.id && e.state == EndpointState::Ready);
            self.note(
                now,
                by,
                of,
                Sight::Instance(service.clone()),
                is_used || !is_healthy,
                members,
            );
        }
    }

    fn note(
        &mut self,
        now: Duration,
        by: &Node,
        of: &Node,
        sight: Sight,
        is_seen: bool,
        members: usize,
    ) {
        let key = (by.index, of.index, sight);
        if is_seen {
            let since = self.missed.remove(&key);
            self.missed_max = self.missed_max.max(since.map_or(Duration::ZERO, |at| now - at));
            return;
        }
        let (by, of, sight) = key.clone();
        let missed = now - *self.missed.entry(key).or_insert(now);
        let (letter, limit) = match sight {
            Sight::Member => ("a", probe_time_max(members)),
            Sight::Instance(_) => ("d", probe_time_max(members)),
        };
        let (by, of) = (name(by), name(of));
        assert!(missed <= limit, "({letter}) {by} reaches {of}, but for {missed:?} no {sight:?}");
    }
}

/// (f) What peers can fill is never more than full.
fn check_stores(node: &Node, seen: &Seen) {
    for store in &seen.stores {
        assert!(store.len <= store.len_max, "(f) node {} holds too much: {store:?}", node.index);
    }
}

/// (h) Retries are few.
fn check_retries(now: Duration, node: &Node, seen: &Seen) {
    let time = (now - seen.since).as_secs_f64();
    let most = RETRIES_SAVED + RETRIES_PER_SECOND * time + RETRIES_SHARE * seen.requests as f64;
    assert!(
        seen.retries as f64 <= most,
        "(h) node {} made {} retries of {} requests in {time} s",
        node.index,
        seen.retries,
        seen.requests
    );
}
