//! Whom to dial again, and when: seeds and members that are away, for ever.
//!
//! Membership lists that forget the dead never heal: two halves of a mesh that were parted for
//! longer than their memory stay parted. So nobody is forgotten here; only the pauses grow, from
//! [`PAUSE_MIN`] to [`PAUSE_MAX`], with jitter, so that a returning mesh is not dialled in step.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use rand::RngExt;

use crate::model::{MemberId, Moment, StoreSize};

/// Seeds and members that are tried. Beyond, no more are taken.
const CONTACTS_MAX: usize = 4096 + 64;

/// Contacts tried in one turn; more wait for [`TURN`].
const BURST_MAX: usize = 8;
const TURN: Duration = Duration::from_millis(250);

const PAUSE_MIN: Duration = Duration::from_secs(2);
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
    pause: Duration,
    due: Moment,
}

/// Everybody to be dialled again.
#[derive(Debug, Default)]
pub(super) struct Contacts {
    /// At most [`CONTACTS_MAX`].
    waiting: BTreeMap<Contact, Attempt>,
    /// By deadline; an entry that disagrees with `waiting` is void.
    order: BTreeMap<(Moment, Contact), ()>,
}

impl Contacts {
    /// Tries `contact` at `due` and then again with growing pauses. One that is tried already keeps
    /// its pauses.
    pub(super) fn add(&mut self, contact: Contact, due: Moment) {
        if self.waiting.len() < CONTACTS_MAX && !self.waiting.contains_key(&contact) {
            self.set(contact, Attempt { pause: PAUSE_MIN, due });
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
        for contact in all {
            self.remove(contact);
            self.add(contact, now);
        }
    }

    /// The contacts whose time has come; their next attempts are scheduled.
    pub(super) fn take_due(&mut self, now: Moment, rng: &mut impl RngExt) -> Vec<Contact> {
        let mut due = Vec::new();
        while let Some(((at, contact), ())) = self.order.first_key_value()
            && *at <= now
        {
            let contact = *contact;
            let Some(attempt) = self.waiting.get(&contact).copied() else { break };
            self.remove(contact);
            let wait = match due.len() < BURST_MAX {
                true => attempt.pause.mul_f64(rng.random_range(0.75..1.25)),
                false => TURN,
            };
            let pause = match due.len() < BURST_MAX {
                true => (attempt.pause * 2).min(PAUSE_MAX),
                false => attempt.pause,
            };
            if due.len() < BURST_MAX {
                due.push(contact);
            }
            self.set(contact, Attempt { pause, due: now + wait });
        }
        due
    }

    /// When the next contact is due.
    pub(super) fn store_sizes(&self) -> [StoreSize; 2] {
        [
            StoreSize::new("contacts", self.waiting.len(), CONTACTS_MAX),
            // Each contact is due once.
            StoreSize::new("deadlines of contacts", self.order.len(), self.waiting.len()),
        ]
    }

    pub(super) fn next_deadline(&self) -> Option<Moment> {
        self.order.keys().next().map(|(at, _)| *at)
    }

    fn set(&mut self, contact: Contact, attempt: Attempt) {
        self.waiting.insert(contact, attempt);
        self.order.insert((attempt.due, contact), ());
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn seed(port: u16) -> Contact {
        Contact::Seed(([10, 0, 0, 1], port).into())
    }

    #[test]
    fn contact_is_tried_for_ever_with_pauses_that_stop_growing() {
        let mut contacts = Contacts::default();
        let mut rng = StdRng::seed_from_u64(1);
        contacts.add(seed(1), Moment::START);
        let mut now = Moment::START;
        let mut pauses = Vec::new();
        for _ in 0..12 {
            assert_eq!(contacts.take_due(now, &mut rng), [seed(1)]);
            let next = contacts.next_deadline().unwrap();
            pauses.push(next.since(now));
            now = next;
        }
        assert!(pauses[0] <= PAUSE_MIN.mul_f64(1.25));
        assert!(pauses[4] > pauses[0] * 8, "they double");
        assert!(pauses.iter().all(|pause| *pause <= PAUSE_MAX.mul_f64(1.25)));
    }

    #[test]
    fn one_turn_tries_a_few_and_all_get_their_turn() {
        let mut contacts = Contacts::default();
        let mut rng = StdRng::seed_from_u64(1);
        (1..=20).for_each(|port| contacts.add(seed(port), Moment::START));
        assert_eq!(contacts.take_due(Moment::START, &mut rng).len(), BURST_MAX);
        assert_eq!(contacts.take_due(Moment::START + TURN, &mut rng).len(), BURST_MAX);
        assert_eq!(contacts.take_due(Moment::START + TURN * 2, &mut rng).len(), 4);
        contacts.remove(seed(1));
        assert!(!contacts.take_due(Moment::from_secs(9), &mut rng).contains(&seed(1)));
    }
}
