//! Where calls would go now: asked of the very pick that they take, many times over.

use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use super::service::ServiceBoard;
use super::{Boards, Choice, Picked, Tried};
use crate::balancer::Balance;
use crate::breaker::Admission;
use crate::mesh::{Endpoint, NoEndpoint, Snapshot};
use crate::model::{InstanceId, MemberId, Moment, ServiceName};
use crate::proxy::limits::Scope;

/// Picks that a preview is made of: a share is out by 3 of 100 at most, in 19 cases of 20. One takes
/// less than a millisecond.
const PICKS: u16 = 1_000;
/// The same for every preview, so that two of one state are the same.
const SEED: u64 = 1;

/// Where calls would go if nothing changed meanwhile.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Preview {
    /// Of all calls, 0 to 1, for each instance of the service.
    pub shares: BTreeMap<(MemberId, InstanceId), f64>,
    /// Those that one call each is to try next, before all others.
    pub trials: Vec<(MemberId, InstanceId)>,
}

impl Boards {
    /// Where the calls of `service` would go that are balanced like this. Nothing is called, and nobody's
    /// turn is taken.
    pub fn preview(
        &self,
        snapshot: &Snapshot,
        service: &ServiceName,
        choice: &Choice,
        is_silent: impl Fn(&MemberId) -> bool,
    ) -> Result<Preview, NoEndpoint> {
        let board = self.of(snapshot, service)?;
        let (now, mut rng) = (self.now(), SmallRng::seed_from_u64(SEED));
        let balance = match choice.balance {
            Balance::RoundRobin => Balance::Random, // the same shares, and no turn is taken
            balance => balance,
        };
        let mut calls = vec![0_u16; board.view.endpoints().len()];
        let (mut trials, mut tried) = (Vec::new(), Tried::default());
        for _ in 0..PICKS {
            let choice = Choice { balance, hash: rng.random(), ..*choice };
            match board.pick(&choice, &tried, now, &is_silent, &mut rng) {
                Ok(at) if board.is_to_be_tried(at, now) => {
                    tried.add(&Picked { board: board.clone(), at });
                    trials.push(key(board.at(at).0));
                }
                Ok(at) => calls[at] += 1,
                Err(_) if !trials.is_empty() => break,
                Err(none) => return Err(none),
            }
        }
        let all = f64::from(calls.iter().sum::<u16>().max(1));
        let shares = calls.into_iter().zip(board.view.endpoints());
        let shares = shares.map(|(calls, endpoint)| (key(endpoint), f64::from(calls) / all));
        Ok(Preview { shares: shares.collect(), trials })
    }
}

fn key(endpoint: &Endpoint) -> (MemberId, InstanceId) {
    (endpoint.member, endpoint.instance.clone())
}

impl ServiceBoard {
    /// Whether the next call there is one that tries it, and then no other goes there for a while.
    fn is_to_be_tried(&self, at: usize, now: Moment) -> bool {
        let (endpoint, slot) = self.at(at);
        let ejection = self.view.ejection(&endpoint.member, &endpoint.instance);
        let ejection = ejection.filter(|_| self.scope == Scope::Mesh);
        let is_turn = ejection.is_some_and(|ejection| {
            endpoint.verdict.admits(now) == Admission::Probe && !slot.has_probed(now, ejection)
        });
        is_turn || slot.standing.lock().breaker.admits(now) == Admission::Probe
    }
}
