//! Whom to dial now, and whom to let wait: a dial that nobody answers takes seconds.
//!
//! Dials under way are bounded, in two lanes that do not wait for each other: members that are
//! believed there, and everybody else. After half of a mesh has died its members would otherwise be
//! dialled in front of those that live, for half a minute.

use std::collections::{BTreeMap, VecDeque};

use super::{Destination, Transmit};

/// Dials under way at once, in each lane.
const UNDER_WAY_MAX: usize = 16;
/// Destinations that wait for their dial, in each lane.
const QUEUED_MAX: usize = 512;
/// Addresses of one member that are dialled or wait: one that has moved has two. Else whoever claims
/// ever other addresses takes the places of others.
const ADDRESSES_PER_MEMBER_MAX: usize = 2;
/// Transmits that wait for one dial.
const TRANSMITS_MAX: usize = 64;

/// Which dials a dial waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Those of members believed there: answered within a round trip.
    There,
    /// Those of seeds and of members believed away: most end without an answer.
    Away,
}

/// Dials wanted and under way, with what is to be sent then.
#[derive(Debug, Default)]
pub struct Dials {
    /// At most [`QUEUED_MAX`] and [`UNDER_WAY_MAX`] for each lane.
    dials: BTreeMap<Destination, Dial>,
    there: Queue,
    away: Queue,
}

#[derive(Debug)]
struct Dial {
    lane: Lane,
    is_under_way: bool,
    /// At most [`TRANSMITS_MAX`].
    transmits: VecDeque<Transmit>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Not begun yet. At most [`QUEUED_MAX`].
    waiting: VecDeque<Destination>,
    /// At most [`UNDER_WAY_MAX`].
    under_way: usize,
}

impl Dials {
    /// Takes what needs a dial. One destination is dialled once at a time; when it turns out to be
    /// there while it waits among the others, it changes lanes.
    ///
    /// An error is a fixed word: the transmit is dropped because too much waits.
    pub fn push(&mut self, lane: Lane, transmit: Transmit) -> Result<(), &'static str> {
        let to = transmit.to;
        let Some(dial) = self.dials.get_mut(&to) else {
            let has_its_share = self.addresses_of(&to) >= ADDRESSES_PER_MEMBER_MAX;
            let queue = self.queue(lane);
            if queue.waiting.len() >= QUEUED_MAX || has_its_share {
                return Err("too_many_dials");
            }
            queue.waiting.push_back(to);
            let transmits = VecDeque::from([transmit]);
            self.dials.insert(to, Dial { lane, is_under_way: false, transmits });
            return Ok(());
        };
        let is_full = dial.transmits.len() >= TRANSMITS_MAX;
        if !is_full {
            dial.transmits.push_back(transmit);
        }
        let is_overtaking = lane == Lane::There && dial.lane == Lane::Away && !dial.is_under_way;
        if is_overtaking && self.there.waiting.len() < QUEUED_MAX {
            dial.lane = Lane::There;
            self.away.waiting.retain(|waiting| *waiting != to);
            self.there.waiting.push_back(to);
        }
        if is_full { Err("dial_queue_full") } else { Ok(()) }
    }

    /// The next destination to dial now. Say [`Dials::finish`] when that has ended, either way.
    pub fn poll_dial(&mut self) -> Option<Destination> {
        let to = self.there.begin().or_else(|| self.away.begin())?;
        if let Some(dial) = self.dials.get_mut(&to) {
            dial.is_under_way = true;
        }
        Some(to)
    }

    /// The dial of `to` has ended. Returns what waited for it.
    pub fn finish(&mut self, to: &Destination) -> VecDeque<Transmit> {
        let Some(dial) = self.dials.remove(to) else { return VecDeque::new() };
        let queue = self.queue(dial.lane);
        if dial.is_under_way {
            queue.under_way = queue.under_way.saturating_sub(1);
        } else {
            queue.waiting.retain(|waiting| waiting != to);
        }
        dial.transmits
    }

    /// How many addresses of the member behind `to` are in here; each seed stands for itself.
    fn addresses_of(&self, to: &Destination) -> usize {
        let Destination::Member { id, .. } = to else { return 0 };
        let is_same = |other: &&Destination| matches!(other, Destination::Member { id: other, .. } if other == id);
        self.dials.keys().filter(is_same).count()
    }

    fn queue(&mut self, lane: Lane) -> &mut Queue {
        match lane {
            Lane::There => &mut self.there,
            Lane::Away => &mut self.away,
        }
    }
}

impl Queue {
    fn begin(&mut self) -> Option<Destination> {
        let to = (self.under_way < UNDER_WAY_MAX).then(|| self.waiting.pop_front()).flatten()?;
        self.under_way += 1;
        Some(to)
    }
}

#[cfg(test)]
mod tests {
    use std::iter::from_fn;

    use bytes::Bytes;

    use super::*;
    use crate::mesh::Channel;

    fn to(number: u16) -> Destination {
        Destination::Seed(([10, 0, 0, 1], number).into())
    }

    fn transmit(number: u16) -> Transmit {
        Transmit { to: to(number), channel: Channel::Message, data: Bytes::new() }
    }

    fn with_away(count: u16) -> (Dials, Vec<Destination>) {
        let mut dials = Dials::default();
        (0..count).for_each(|number| dials.push(Lane::Away, transmit(number)).unwrap());
        let begun = from_fn(|| dials.poll_dial()).collect();
        (dials, begun)
    }

    #[test]
    fn dials_of_the_dead_are_bounded_and_the_next_begins_when_one_ends() {
        let (mut dials, begun) = with_away(100);
        assert_eq!(begun.len(), UNDER_WAY_MAX);
        assert_eq!(dials.finish(&to(3)), [transmit(3)]);
        assert_eq!(from_fn(|| dials.poll_dial()).collect::<Vec<_>>(), [to(16)]);
    }

    #[test]
    fn member_that_is_there_waits_for_no_dial_of_the_dead() {
        let (mut dials, _) = with_away(100);
        dials.push(Lane::There, transmit(200)).unwrap();
        assert_eq!(dials.poll_dial(), Some(to(200)));
    }

    #[test]
    fn member_that_turns_out_to_be_there_leaves_the_queue_of_the_dead() {
        let (mut dials, _) = with_away(100);
        dials.push(Lane::There, transmit(90)).unwrap();
        assert_eq!(dials.poll_dial(), Some(to(90)));
        assert_eq!(dials.poll_dial(), None, "and is dialled once");
        assert_eq!(dials.finish(&to(90)).len(), 2);
        let mut rest = 0;
        for number in 0..100 {
            rest += dials.finish(&to(number)).len();
        }
        assert_eq!(rest, 99);
        assert_eq!((dials.there.under_way, dials.away.under_way), (0, 0));
        assert_eq!((dials.there.waiting.len(), dials.away.waiting.len()), (0, 0));
    }

    #[test]
    fn member_that_claims_ever_other_addresses_takes_two_places() {
        let mut dials = Dials::default();
        let id = crate::model::MemberId::from_bytes([1; 16]);
        let taken = (1..100).filter(|port| {
            let to = Destination::Member { id, address: ([10, 0, 0, 1], *port).into() };
            let transmit = Transmit { to, ..transmit(0) };
            dials.push(Lane::There, transmit).is_ok()
        });
        assert_eq!(taken.count(), ADDRESSES_PER_MEMBER_MAX);
        assert_eq!(dials.push(Lane::There, transmit(7)), Ok(()), "others find room");
    }

    #[test]
    fn what_waits_for_dials_is_bounded() {
        let mut dials = Dials::default();
        let taken = (0..u16::MAX).filter(|n| dials.push(Lane::Away, transmit(*n)).is_ok()).count();
        assert_eq!(taken, QUEUED_MAX);
        assert_eq!(dials.push(Lane::Away, transmit(u16::MAX)), Err("too_many_dials"));
        assert_eq!(dials.push(Lane::There, transmit(u16::MAX)), Ok(()), "the lanes are apart");
        let more = (0..1_000).filter(|_| dials.push(Lane::Away, transmit(0)).is_ok()).count();
        assert_eq!(more, TRANSMITS_MAX - 1);
        assert_eq!(dials.push(Lane::Away, transmit(0)), Err("dial_queue_full"));
    }
}
