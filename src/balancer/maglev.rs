//! A table that leads each key to a candidate, the same at every caller, and that moves few keys when
//! candidates come or go.
//!
//! Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer" (2016), section 3.4.
//! Candidates take turns in filling the table, each along its own permutation of the places. Weights
//! as in Envoy: whoever weighs less sits out some of the turns. Shares are then right within a few
//! percent as long as places outnumber candidates by a hundred.

use ring::digest::{SHA256, digest};

use crate::model::Weight;

/// Places of the table, a prime as in the paper: right for some 650 candidates.
const PLACES: u64 = 65_537;

/// 128 KiB, made once for a set of candidates.
#[derive(Debug, PartialEq, Eq)]
pub struct Maglev {
    places: Vec<u16>,
}

/// One candidate while the table is filled.
struct Filler {
    candidate: u16,
    offset: u64,
    skip: u64,
    /// How far along its permutation.
    next: u64,
    weight: u32,
    /// Turns that its weight has earned and that it has not had, in parts of the largest weight.
    credit: u32,
}

impl Maglev {
    /// The table of these candidates: number, name and weight. The order makes no difference, nor does
    /// the number; weight 0 gets no place. Of more than 65,535 the rest gets none.
    pub fn new<'a>(candidates: impl IntoIterator<Item = (usize, &'a [u8], Weight)>) -> Self {
        let weighty = candidates.into_iter().filter(|(_, _, weight)| weight.0 > 0);
        let mut named: Vec<_> = weighty
            .filter_map(|(number, name, weight)| {
                let candidate = u16::try_from(number).ok()?;
                let digest = digest(&SHA256, name);
                let (first, second) = digest.as_ref().split_at(16);
                let (offset, skip) = (number_of(first) % PLACES, number_of(second));
                let skip = skip % (PLACES - 1) + 1;
                let weight = u32::from(weight.0);
                let filler = Filler { candidate, offset, skip, next: 0, weight, credit: 0 };
                Some((digest.as_ref().to_vec(), filler))
            })
            .collect();
        named.sort_by(|(one, _), (other, _)| one.cmp(other));
        let fillers = named.into_iter().map(|(_, filler)| filler).collect();
        Self { places: fill(fillers) }
    }

    /// Whether it leads nowhere.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Where a key leads, then where it leads if that will not do, and so on. Ends after every place.
    pub fn lookup(&self, hash: u64) -> impl Iterator<Item = usize> {
        let len = self.places.len();
        let begin = usize::try_from(hash % (len as u64).max(1)).unwrap_or(0);
        let places = self.places[begin..].iter().chain(&self.places[..begin]);
        places.map(|candidate| usize::from(*candidate))
    }
}

fn fill(mut fillers: Vec<Filler>) -> Vec<u16> {
    let Some(weight_max) = fillers.iter().map(|filler| filler.weight).max() else {
        return Vec::new();
    };
    let mut places: Vec<Option<u16>> = vec![None; PLACES as usize];
    let mut left = places.len();
    loop {
        for filler in &mut fillers {
            filler.credit += filler.weight;
            if filler.credit < weight_max {
                continue;
            }
            filler.credit -= weight_max;
            // Its permutation visits every place, and one is free.
            loop {
                let at = (filler.offset + filler.next * filler.skip) % PLACES;
                filler.next += 1;
                if let Some(place @ None) = places.get_mut(at as usize) {
                    *place = Some(filler.candidate);
                    break;
                }
            }
            left -= 1;
            if left == 0 {
                return places.into_iter().flatten().collect();
            }
        }
    }
}

/// The hash of a key: what the same key has at every caller.
pub fn hash_of(key: &[u8]) -> u64 {
    number_of(digest(&SHA256, key).as_ref())
}

fn number_of(bytes: &[u8]) -> u64 {
    let first = bytes.first_chunk::<8>().copied().unwrap_or_default();
    u64::from_be_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(names: &[&str]) -> Maglev {
        let named = names.iter().enumerate();
        Maglev::new(named.map(|(number, name)| (number, name.as_bytes(), Weight(100))))
    }

    /// To which name each of 10,000 keys leads.
    fn led<'n>(maglev: &Maglev, names: &[&'n str]) -> Vec<&'n str> {
        let keys = (0..10_000_u32).map(|key| hash_of(&key.to_be_bytes()));
        keys.map(|hash| names[maglev.lookup(hash).next().unwrap()]).collect()
    }

    #[test]
    fn keys_are_shared_evenly_and_stay_where_they_are_when_others_go() {
        let names = ["a", "b", "c", "d", "e"];
        let before = led(&table(&names), &names);
        for name in names {
            let share = before.iter().filter(|led| **led == name).count();
            assert!((1_800..2_200).contains(&share), "{name}: {share} of 10,000");
        }
        let without = ["a", "b", "d", "e"];
        let after = led(&table(&without), &without);
        let stayed = before.iter().zip(&after).filter(|(was, is)| **was != "c" && was == is);
        let others = before.iter().filter(|was| **was != "c").count();
        let moved = others - stayed.count();
        assert!(moved < others / 20, "{moved} of {others} keys moved that need not");
    }

    #[test]
    fn order_and_numbers_make_no_difference() {
        let (one, other) = (["a", "b", "c"], ["c", "a", "b"]);
        assert_eq!(led(&table(&one), &one), led(&table(&other), &other));
    }

    #[test]
    fn places_follow_the_weights() {
        let weights = [("light", 50), ("heavy", 150), ("none", 0)];
        let named = weights.iter().enumerate();
        let maglev = Maglev::new(named.map(|(at, (name, w))| (at, name.as_bytes(), Weight(*w))));
        let share = |at: u16| maglev.places.iter().filter(|place| **place == at).count();
        assert_eq!(share(0) + share(1), PLACES as usize);
        assert_eq!(share(0), PLACES as usize / 4);
        assert_eq!(Maglev::new([(0, b"a".as_slice(), Weight(0))]).lookup(7).count(), 0);
    }

    #[test]
    fn key_whose_candidate_will_not_do_is_led_on_and_in_the_end_to_all() {
        let names = ["a", "b", "c"];
        let mut led: Vec<_> = table(&names).lookup(hash_of(b"key")).collect();
        assert_eq!(led.len(), PLACES as usize);
        led.sort_unstable();
        led.dedup();
        assert_eq!(led, [0, 1, 2]);
    }
}
