//! Whom to dial again, and when: seeds and members that are away, for ever.
//!
//! Membership lists that forget the dead never heal: two halves of a mesh that were parted for
//! longer than their memory stay parted. So nobody is forgotten here. Pauses double from
//! [`PAUSE_MIN`], but only up to what bounds the rate of dials: [`PAUSE_PER_MEMBER`] for each member
//! known, here or away. Among `n` members of which `k` are away each of the others comes down to
//! `k/n` dials a second, and each that is away is dialled `(n-k)/n` times a second. Neither exceeds
//! one; a few members meet within seconds after any cut, and so do two halves of many.
//!
//! The first pauses are short in every mesh because after a heal everybody renews at once: what a
//! dial has found is outdated a moment later, and rumours have not the capacity for them all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use rand::RngExt;

use crate::model::{MemberId, Moment, StoreSize};

/// Seeds and members that are tried. Beyond, no more are taken.
const CONTACTS_MAX: usize = 4096 + 64;

/// Contacts tried in each [`TURN`]; more wait for the next: 32 a second, however many are due.
const BURST_MAX: usize = 8;
const TURN: Duration = Duration::from_millis(250);

const PAUSE_PER_MEMBER: Duration = Duration::from_secs(1);
/// A dial takes up to 3 s; another one meanwhile would find nobody sooner.
const PAUSE_MIN: Duration = Duration::from_secs(3);
/// So that in a mesh of thousands nobody is forgotten for an hour: beyond 300 members the rate
/// grows, to 14 dials a second with [`CONTACTS_MAX`] away.
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// Somebody to be dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contact {
    /// Whoever answers there.
    Seed(SocketAddr),
    /// This member, wherever it was last.
    Member(MemberId),
}

#[derive(Clone, Copy, Debug)]
struct Attempt {
    due: Moment,
    /// From this attempt to the next.
    pause: Duration,
}

impl Attempt {
    fn first(due: Moment) -> Self {
        Self { due, pause: PAUSE_MIN }
    }
}

/// Everybody to be dialled again.
#[derive(Debug, Default)]
pub(super) struct Contacts {
    /// At most [`CONTACTS_MAX`].
    waiting: BTreeMap<Contact, Attempt>,
    /// The same, by deadline.
    order: BTreeSet<(Moment, Contact)>,
    turn_began: Moment,
    /// In this turn. At most [`BURST_MAX`].
    taken: usize,
}

impl Contacts {
    /// Tries `contact` at `due` and then again and again. One that is tried already keeps its turn.
    pub(super) fn add(&mut self, contact: Contact, due: Moment) {
        if self.waiting.len() < CONTACTS_MAX && !self.waiting.contains_key(&contact) {
            self.set(contact, Attempt::first(due));
        }
    }

    /// Stops trying `contact`: it is here.
    pub(super) fn remove(&mut self, contact: Contact) {
        if let Some(attempt) = self.waiting.remove(&contact) {
            self.order.remove(&(attempt.due, contact));
        }
    }

    /// Tries everybody again at once: something has changed that may have been the obstacle.
    pub(super) fn hurry(&mut self, now: Moment) {
        let all: Vec<Contact> = self.waiting.keys().copied().collect();
        all.into_iter().for_each(|contact| self.set(contact, Attempt::first(now)));
    }

    /// The contacts whose time has come; their next attempts are scheduled. `live` members are here.
    pub(super) fn take_due(
        &mut self,
        now: Moment,
        live: usize,
        rng: &mut impl RngExt,
    ) -> Vec<Contact> {
        let pause_max = pause_max_among(live + self.waiting.len());
        if now.since(self.turn_began) >= TURN {
            (self.turn_began, self.taken) = (now, 0);
        }
        let mut due = Vec::new();
        while self.next_deadline().is_some_and(|at| at <= now)
            && let Some((_, contact)) = self.order.first().copied()
            && let Some(Attempt { pause, .. }) = self.waiting.get(&contact).copied()
        {
            let jitter = rng.random_range(0.75..1.25); // a returning mesh is not dialled in step
            let next = now + pause.min(pause_max).mul_f64(jitter);
            self.set(contact, Attempt { due: next, pause: (pause * 2).min(pause_max) });
            self.taken += 1;
            due.push(contact);
        }
        due
    }

    pub(super) fn store_sizes(&self) -> [StoreSize; 2] {
        [
            StoreSize::new("contacts", self.waiting.len(), CONTACTS_MAX),
            // Each contact is due once.
            StoreSize::new("deadlines of contacts", self.order.len(), self.waiting.len()),
        ]
    }

    /// When the next contact is due, and has its turn.
    pub(super) fn next_deadline(&self) -> Option<Moment> {
        let (at, _) = *self.order.first()?;
        let is_full = self.taken >= BURST_MAX;
        Some(if is_full { at.max(self.turn_began + TURN) } else { at })
    }

    fn set(&mut self, contact: Contact, attempt: Attempt) {
        if let Some(before) = self.waiting.insert(contact, attempt) {
            self.order.remove(&(before.due, contact));
        }
        self.order.insert((attempt.due, contact));
    }
}

/// Longest time between two tries of one contact in a mesh of `members`, those away included.
fn pause_max_among(members: usize) -> Duration {
    let members = u32::try_from(members).unwrap_or(u32::MAX);
    PAUSE_PER_MEMBER.saturating_mul(members).clamp(PAUSE_MIN, PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn seed(number: u16) -> Contact {
        Contact::Seed(([10, 0, 0, 1], number).into())
    }

    /// Tries made in each second of `seconds`, with `away` contacts and `live` members here.
    fn tries(live: usize, away: u16, seconds: usize) -> Vec<usize> {
        let mut contacts = Contacts::default();
        let mut rng = StdRng::seed_from_u64(1);
        (0..away).for_each(|number| contacts.add(seed(number), Moment::START));
        let mut tries = vec![0; seconds];
        while let Some(at) = contacts.next_deadline()
            && let Some(second) = tries.get_mut(at.since(Moment::START).as_secs() as usize)
        {
            *second += contacts.take_due(at, live, &mut rng).len();
        }
        tries
    }

    #[test]
    fn contact_of_a_small_mesh_is_tried_for_ever_within_4_seconds() {
        for (live, away) in [(1, 1), (1, 2), (2, 1)] {
            let tries = tries(live, away, 3600);
            let quiet = tries.split(|tries| *tries > 0).map(<[usize]>::len).max();
            assert!(quiet < Some(4), "{live} here, {away} away: {quiet:?} s without a try");
        }
    }

    #[test]
    fn half_of_a_large_mesh_away_costs_each_member_a_dial_or_two_a_second() {
        for (away, mean_max) in [(32, 1), (150, 1), (500, 2)] {
            let hour = 3600;
            let tries = tries(away.into(), away, hour);
            let burst = BURST_MAX * 5; // turns of 250 ms, the first and the last cut by the second
            assert!(tries.iter().all(|tries| *tries <= burst), "{away} away: no second is worse");
            let total: usize = tries.iter().sum();
            let first = usize::from(away) * 8; // pauses of 3, 6, 12 s and so on
            assert!(total <= first + mean_max * hour, "{away} away: {total} dials in an hour");
            let late: usize = tries.iter().skip(hour / 2).sum();
            assert!(late <= mean_max * hour / 2, "{away} away: {late} dials in the second half");
            assert!(total >= 1000, "{away} away: {total} dials in an hour, nobody is given up");
        }
    }

    #[test]
    fn one_turn_tries_a_few_and_all_get_their_turn() {
        let mut contacts = Contacts::default();
        let mut rng = StdRng::seed_from_u64(1);
        (1..=20).for_each(|port| contacts.add(seed(port), Moment::START));
        assert_eq!(contacts.take_due(Moment::START, 1, &mut rng).len(), BURST_MAX);
        assert_eq!(contacts.take_due(Moment::START + TURN, 1, &mut rng).len(), BURST_MAX);
        assert_eq!(contacts.take_due(Moment::START + TURN * 2, 1, &mut rng).len(), 4);
        contacts.remove(seed(1));
        assert!(!contacts.take_due(Moment::from_secs(60), 1, &mut rng).contains(&seed(1)));
    }
}
