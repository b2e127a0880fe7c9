//! The endpoints of a service by distance, and which part of the calls leaves the near ones.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use rand::{Rng, RngExt};

use super::service::ServiceBoard;
use crate::balancer::{Near, Prefer, Shares, Tier, WHOLE, spill};
use crate::breaker::{Admission, Verdict};
use crate::mesh::{Endpoint, EndpointState, ServiceView};
use crate::model::{Moment, Weight};

/// How old the figures may be by which calls leave the near zone.
const SPILL_PERIOD: Duration = Duration::from_millis(100);

/// The endpoints of a service by distance.
pub(super) struct Plan {
    /// Nearest first: their shares, and the part of their calls that goes on to the next.
    tiers: Vec<(Shares, AtomicU16)>,
    pub(super) nearness: Vec<Option<u8>>,
    /// When the parts were worked out, in nanoseconds.
    looked_at: AtomicU64,
}

impl Plan {
    /// Of the endpoints of `view`, to a caller in `zone` that prefers those that are near like this.
    pub(super) fn new(view: &ServiceView, zone: &str, prefer: Prefer) -> Self {
        let tiers: Vec<_> = prefer.tiers().collect();
        let nearness = |endpoint: &Endpoint| {
            let near = Near::between(zone, &endpoint.zone);
            tiers.iter().position(|tier| near <= *tier).and_then(|at| u8::try_from(at).ok())
        };
        let nearness: Vec<_> = view.endpoints().iter().map(nearness).collect();
        let shares = |tier: usize| {
            let of = view.ready().iter();
            let of = of.filter(|one| nearness[one.candidate] == u8::try_from(tier).ok());
            let weight = |weight| Weight(u16::try_from(weight).unwrap_or(u16::MAX));
            of.map(|one| (one.candidate, weight(one.weight))).collect()
        };
        let tiers = (0..tiers.len()).map(|tier| (shares(tier), AtomicU16::new(0))).collect();
        Self { tiers, nearness, looked_at: AtomicU64::new(0) }
    }

    /// Among whom is drawn first.
    pub(super) fn tier(&self, board: &ServiceBoard, now: Moment, rng: &mut impl Rng) -> &Shares {
        let looked_at = Moment::from_nanos(self.looked_at.load(Ordering::Relaxed));
        if now.since(looked_at) >= SPILL_PERIOD || looked_at == Moment::START {
            self.looked_at.store(now.as_nanos().max(1), Ordering::Relaxed);
            self.look(board, now);
        }
        let mut goes_on = |part: &AtomicU16| match part.load(Ordering::Relaxed) {
            0 => false,
            part => rng.random_range(0..WHOLE) < part,
        };
        // The part of the last is 0: there is no next.
        let stops = self.tiers.iter().position(|(_, part)| !goes_on(part)).unwrap_or(0);
        &self.tiers[stops].0
    }

    /// Works out which part of each tier's calls goes on to the next.
    fn look(&self, board: &ServiceBoard, now: Moment) {
        let heeds_others = board.heeds_others();
        let takes_work = |endpoint: &Endpoint| {
            let is_ejected = heeds_others && matches!(endpoint.verdict, Verdict::Ejected(_));
            endpoint.state == EndpointState::Ready && !is_ejected
        };
        let tier = |nearness: usize| {
            let mut tier = Tier { soft: Some(0), ..Tier::default() };
            let (mut latency, mut measured) = (Duration::ZERO, 0);
            for (at, near) in self.nearness.iter().enumerate() {
                let (endpoint, slot) = board.at(at);
                if near.map(usize::from) != Some(nearness) || endpoint.weight.0 == 0 {
                    continue;
                }
                if !takes_work(endpoint) {
                    tier.missed += endpoint.rotation.missed(now);
                    continue;
                }
                let standing = slot.standing.lock();
                if matches!(standing.breaker.admits(now), Admission::Refuse { .. }) {
                    tier.missed += 1.0;
                    continue;
                }
                tier.ready += 1;
                tier.in_flight += u64::from(slot.gauge.under_way());
                let limit = endpoint.capacity.soft.map(u64::from);
                tier.soft = tier.soft.zip(limit).map(|(sum, limit)| sum + limit);
                if let Some(of_one) = standing.cost.latency_at(now) {
                    latency += of_one;
                    measured += 1;
                }
            }
            tier.latency = (measured > 0).then(|| latency / measured);
            tier
        };
        for (at, pair) in self.tiers.windows(2).enumerate() {
            pair[0].1.store(spill(&tier(at), &tier(at + 1)), Ordering::Relaxed);
        }
    }
}
