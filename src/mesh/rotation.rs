//! Who has been in rotation since when, and who is missed there: what slow start and the spill between
//! zones go by. Own experience with an endpoint has no part in it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::EndpointState;
use crate::model::{Epoch, InstanceId, Moment};

/// What a node hears of so soon after its start may have been there for long: time to join, to repair
/// and to find members that do not answer at once. A guess.
pub(super) const BLIND_TIME: Duration = Duration::from_secs(10);
/// How long one that fell out is missed, ever less. By then it was replaced, or its zone does without
/// it and shows in its load and latency whether it can. A guess: longer than a machine takes to boot.
const MISSED_FOR: Duration = Duration::from_secs(30 * 60);

/// Whether an endpoint is in rotation, as far as its member and its own agent say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rotation {
    /// It is.
    In {
        /// Since when; `None` when that is longer than this agent can tell.
        since: Option<Moment>,
    },
    /// It was until then: its checks fail, or its member is down.
    Lost {
        /// Since when, on this agent's clock.
        at: Moment,
    },
    /// It is not: its operator took it out, its member left or restarts, or it was never seen there.
    #[default]
    Out,
}

impl Rotation {
    /// Since when it is in rotation; `None` when it is not, or for longer than this agent can tell.
    pub fn since(self) -> Option<Moment> {
        match self {
            Self::In { since } => since,
            Self::Lost { .. } | Self::Out => None,
        }
    }

    /// How much its zone misses it, from 1 for one that is to be there down to 0.
    pub fn missed(self, now: Moment) -> f64 {
        match self {
            Self::In { .. } => 1.0,
            Self::Lost { at } => {
                (1.0 - now.since(at).as_secs_f64() / MISSED_FOR.as_secs_f64()).max(0.0)
            }
            Self::Out => 0.0,
        }
    }

    fn next(self, now: Moment, state: EndpointState, is_restarted: bool, can_tell: bool) -> Self {
        match (self, state) {
            (Self::In { .. }, EndpointState::Ready) if !is_restarted => self,
            (_, EndpointState::Ready) => Self::In { since: can_tell.then_some(now) },
            (Self::In { .. }, EndpointState::Failing | EndpointState::Doubtful) => {
                Self::Lost { at: now }
            }
            (_, EndpointState::Failing | EndpointState::Doubtful) => self,
            (_, EndpointState::Draining | EndpointState::Maint | EndpointState::Down) => Self::Out,
        }
    }
}

/// Those of one member: as many as its record has instances.
#[derive(Debug, Default)]
pub(super) struct Rotations {
    /// Of the run that is seen.
    epoch: Option<Epoch>,
    instances: BTreeMap<InstanceId, Rotation>,
}

impl Rotations {
    /// The member's record of the run `epoch` and its own state come to these states. `can_tell`:
    /// whether what was not seen before was not there.
    pub(super) fn handle_states(
        &mut self,
        now: Moment,
        epoch: Epoch,
        states: impl Iterator<Item = (InstanceId, EndpointState)>,
        can_tell: bool,
    ) {
        let is_restarted = self.epoch.replace(epoch).is_some_and(|before| before != epoch);
        let next = states.map(|(id, state)| {
            let before = self.instances.get(&id).copied().unwrap_or_default();
            (id, before.next(now, state, is_restarted, can_tell))
        });
        self.instances = next.collect();
    }

    pub(super) fn of(&self, id: &InstanceId) -> Rotation {
        self.instances.get(id).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use EndpointState::{Doubtful, Down, Draining, Failing, Maint, Ready};

    fn at(secs: u64) -> Moment {
        Moment::from_secs(secs)
    }

    /// What one instance comes to whose member, of the run of that number, says these states, one
    /// second after the other from 1 s on. `None`: its record does not name the instance.
    fn rotation(of: &[(u64, Option<EndpointState>)]) -> Rotation {
        let (mut rotations, id): (_, InstanceId) = (Rotations::default(), "web".parse().unwrap());
        for (now, (epoch, state)) in (1..).zip(of) {
            let states = state.map(|state| (id.clone(), state)).into_iter();
            rotations.handle_states(at(now), Epoch(*epoch), states, now > 1);
        }
        rotations.of(&id)
    }

    #[test]
    fn who_returns_is_new_whatever_way_it_was_away() {
        let seen = |state| (1, Some(state));
        let is_in = |since: Option<u64>| Rotation::In { since: since.map(at) };
        for (why, states, expected) in [
            ("was there first", &[seen(Ready), seen(Ready)][..], is_in(None)),
            ("appeared", &[(1, None), seen(Ready), seen(Ready)], is_in(Some(2))),
            ("began with a check", &[(1, None), seen(Failing), seen(Ready)], is_in(Some(3))),
            ("drained", &[seen(Ready), seen(Draining), seen(Ready)], is_in(Some(3))),
            ("maint", &[seen(Ready), seen(Maint), seen(Ready)], is_in(Some(3))),
            ("unexposed", &[seen(Ready), (1, None), seen(Ready)], is_in(Some(3))),
            ("failed", &[seen(Ready), seen(Failing), seen(Ready)], is_in(Some(3))),
            ("died", &[seen(Ready), seen(Doubtful), seen(Ready)], is_in(Some(3))),
            ("restarted in order", &[seen(Ready), seen(Down), (2, Some(Ready))], is_in(Some(3))),
            (
                "restarted unseen",
                &[seen(Ready), (2, Some(Ready)), (2, Some(Ready))],
                is_in(Some(2)),
            ),
        ] {
            assert_eq!(rotation(states), expected, "{why}");
        }
    }

    #[test]
    fn only_what_was_there_and_fell_out_is_missed_and_ever_less() {
        let seen = |state| (1, Some(state));
        let lost = Rotation::Lost { at: at(2) };
        for (why, states, expected) in [
            ("its checks fail", &[seen(Ready), seen(Failing), seen(Failing)][..], lost),
            ("its member died", &[seen(Ready), seen(Doubtful), seen(Failing)], lost),
            ("never seen there", &[seen(Failing), seen(Doubtful)], Rotation::Out),
            ("drained, then died", &[seen(Ready), seen(Draining), seen(Doubtful)], Rotation::Out),
            ("left", &[seen(Ready), seen(Down)], Rotation::Out),
            ("died, then left", &[seen(Ready), seen(Doubtful), seen(Down)], Rotation::Out),
        ] {
            assert_eq!(rotation(states), expected, "{why}");
        }
        let missed = [2, 2 + 15 * 60, 2 + 30 * 60, 90_000].map(|now| lost.missed(at(now)));
        assert_eq!(missed, [1.0, 0.5, 0.0, 0.0]);
        assert_eq!(Rotation::Out.missed(at(2)), 0.0);
    }
}
