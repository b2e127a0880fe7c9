//! Drawing by weight, from sums that are made once for many draws.

use rand::{Rng, RngExt};

use crate::model::Weight;

/// Candidates and their shares. A draw among n takes log n steps and no memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    /// Those that have a weight, in order.
    parts: Vec<Part>,
    /// What divides every weight.
    unit: u64,
    /// From one turn to the next, in units. Has no divisor in common with all units together, so that
    /// every unit has its turn before one has a second; near the golden section of them, so that the
    /// turns of one candidate are spread.
    step: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    candidate: usize,
    weight: u64,
    /// Of all weights up to and with this one.
    end: u64,
}

/// One that was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drawn {
    /// The number it was given.
    pub candidate: usize,
    /// Its weight, above 0.
    pub weight: u64,
}

impl FromIterator<(usize, Weight)> for Shares {
    /// Candidates as the numbers that draws are to return. Weight 0 is never drawn.
    fn from_iter<T: IntoIterator<Item = (usize, Weight)>>(weights: T) -> Self {
        let mut end = 0;
        let weighty = weights.into_iter().filter(|(_, weight)| weight.0 > 0);
        let parts = weighty.map(|(candidate, Weight(weight))| {
            let weight = u64::from(weight);
            end += weight;
            Part { candidate, weight, end }
        });
        let parts: Vec<_> = parts.collect();
        let unit = parts.iter().fold(0, |unit, part| gcd(unit, part.weight)).max(1);
        let units = end / unit;
        let golden = (units as f64 * 0.618) as u64;
        let step = (golden.max(1)..).find(|step| gcd(*step, units) <= 1).unwrap_or(1);
        Self { parts, unit, step }
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Shares {
    /// How many have a weight.
    pub fn len(&self) -> usize {
        self.parts.len()
    }

    /// Whether nobody has a weight.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Those that have a weight, in order.
    pub fn iter(&self) -> impl Iterator<Item = Drawn> + Clone {
        self.parts.iter().copied().map(Drawn::from)
    }

    /// The weight of one of them on average; 0 when there is none.
    pub fn weight_mean(&self) -> f64 {
        self.parts.last().map_or(0.0, |last| last.end as f64 / self.parts.len() as f64)
    }

    /// One by weight; `None` where nobody has a weight.
    pub fn draw(&self, rng: &mut impl Rng) -> Option<Drawn> {
        let total = self.parts.last()?.end;
        Some(self.at(rng.random_range(0..total)).into())
    }

    /// Whose turn it is, where turns are counted up: each has exactly its share of as many turns in a
    /// row as there are units of weight.
    pub fn at_turn(&self, turn: u32) -> Option<Drawn> {
        let units = self.parts.last()?.end / self.unit;
        let at = u128::from(turn) * u128::from(self.step) % u128::from(units);
        let at = u64::try_from(at).unwrap_or(0) * self.unit;
        Some(self.at(at).into())
    }

    /// Two different ones by weight, the second as if the first were not there; one where there is
    /// no other; `None` where nobody has a weight.
    pub fn draw_two(&self, rng: &mut impl Rng) -> Option<(Drawn, Option<Drawn>)> {
        let total = self.parts.last()?.end;
        let first = self.at(rng.random_range(0..total));
        let others = total - first.weight;
        let second = (others > 0).then(|| {
            let at = rng.random_range(0..others);
            let is_before = at < first.end - first.weight;
            self.at(if is_before { at } else { at + first.weight })
        });
        Some((first.into(), second.map(Drawn::from)))
    }

    /// Whose share `at` falls into; `at` is below the sum of all.
    fn at(&self, at: u64) -> Part {
        self.parts[self.parts.partition_point(|part| part.end <= at)]
    }
}

impl From<Part> for Drawn {
    fn from(Part { candidate, weight, .. }: Part) -> Self {
        Self { candidate, weight }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    proptest! {
        #[test]
        fn two_that_are_drawn_differ_and_have_a_weight(
            weights in prop::collection::vec(prop_oneof![Just(0), 1..=u16::MAX], 0..40),
            seed in prop::num::u64::ANY,
        ) {
            let shares: Shares = weights.iter().map(|weight| Weight(*weight)).enumerate().collect();
            let weighty = weights.iter().filter(|weight| **weight > 0).count();
            let drawn = shares.draw_two(&mut SmallRng::seed_from_u64(seed));
            prop_assert_eq!(drawn.is_some(), weighty > 0);
            let Some((first, second)) = drawn else { return Ok(()) };
            prop_assert_eq!(second.is_some(), weighty > 1);
            prop_assert_ne!(Some(first), second);
            for drawn in [Some(first), second].into_iter().flatten() {
                prop_assert_eq!(u64::from(weights[drawn.candidate]), drawn.weight);
                prop_assert!(drawn.weight > 0);
            }
        }
    }

    #[test]
    fn turns_are_shared_exactly_by_weight_and_spread() {
        for weights in [vec![100; 3], vec![300, 100], vec![5, 0, 15, 10], vec![7], vec![1; 1_000]] {
            let shares: Shares = weights.iter().copied().map(Weight).enumerate().collect();
            let unit = weights.iter().fold(0, |unit, weight| gcd(unit, u64::from(*weight)));
            let units = weights.iter().map(|weight| u64::from(*weight)).sum::<u64>() / unit;
            let mut turns = vec![0; weights.len()];
            for turn in 0..u32::try_from(units * 2).unwrap() {
                turns[shares.at_turn(turn).unwrap().candidate] += 1;
            }
            let expected: Vec<_> = weights.iter().map(|w| u64::from(*w) / unit * 2).collect();
            assert_eq!(turns, expected, "{weights:?}");
        }
        let shares: Shares =
            [100, 100, 100, 100, 100].map(Weight).into_iter().enumerate().collect();
        let turns: Vec<_> = (0..10).map(|turn| shares.at_turn(turn).unwrap().candidate).collect();
        assert!(turns.windows(2).all(|two| two[0] != two[1]), "never twice in a row: {turns:?}");
        assert_eq!(Shares::default().at_turn(1), None);
    }

    #[test]
    fn first_draw_follows_the_weights_and_the_second_those_of_the_others() {
        let weights = [100, 0, 300, 600].map(Weight);
        let shares: Shares = weights.into_iter().enumerate().collect();
        let mut rng = SmallRng::seed_from_u64(11);
        let (mut first, mut second_of_last) = ([0_u32; 4], [0_u32; 4]);
        for _ in 0..100_000 {
            let (one, Some(other)) = shares.draw_two(&mut rng).unwrap() else { panic!("alone") };
            first[one.candidate] += 1;
            if one.candidate == 3 {
                second_of_last[other.candidate] += 1;
            }
        }
        let near = |count: u32, expected: u32| count.abs_diff(expected) < expected / 20;
        assert!(near(first[0], 10_000) && near(first[2], 30_000), "{first:?}");
        assert!(near(second_of_last[0], 15_000), "{second_of_last:?}");
        assert!(near(second_of_last[2], 45_000), "{second_of_last:?}");
        assert_eq!((first[1], second_of_last[1]), (0, 0));
    }
}
