//! The choice itself: in which order candidates are asked, and which of them takes the call.
//!
//! The default is the power of two choices: of two that are drawn by weight, the one with less load.
//! Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001): two draws bring the
//! longest queue from log n / log log n down to log log n, and unlike a full scan callers with the
//! same old view do not all run to the same instance.
//!
//! Load is cost times (calls in flight + 1), as in Finagle and linkerd. Two additions make it hold for
//! weights, which neither has. Calls in flight are counted by weight. And a lighter one is compared
//! with a heavier one only as often as its weight allows: so it gets at most twice its share however
//! well it does, where otherwise an idle canary of 5 % with a quicker machine would get all.

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use super::{Maglev, Shares};
use crate::model::{Weight, expected_one_of};

/// A whole in thousandths.
pub const WHOLE: u16 = 1_000;

/// How often is drawn before all candidates are asked. With a third of them out, all of eight draws
/// fail once in 6,500 calls.
const DRAWS_MAX: u32 = 8;
/// Costs that differ by less than this part are the same: latencies do so without a reason, and then
/// calls in flight decide, or between two that rest the draw, which follows the weights.
const CLEARLY_LESS: f64 = 0.8;

/// How the instances of a service are balanced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The better of two by latency, failures and calls in flight.
    #[default]
    PeakEwma,
    /// The better of two by calls in flight alone.
    LeastRequest,
    /// Each in turn, by weight.
    RoundRobin,
    /// By weight alone.
    Random,
    /// By a key of the call: calls with the same key go to the same instance.
    Maglev,
}

impl Balance {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::PeakEwma, Self::LeastRequest, Self::RoundRobin, Self::Random, Self::Maglev];

    /// Whether it is the usual one.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// That of this word of the configuration.
    ///
    /// # Errors
    /// What is expected.
    pub fn named(word: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|balance| balance.as_str() == word);
        named.ok_or_else(|| expected_one_of(word, &Self::ALL.map(Self::as_str)))
    }

    /// The word of the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PeakEwma => "peak_ewma",
            Self::LeastRequest => "least_request",
            Self::RoundRobin => "round_robin",
            Self::Random => "random",
            Self::Maglev => "maglev",
        }
    }
}

/// In which order candidates are asked for one call.
pub enum Order<'a> {
    /// The less loaded of two that are drawn.
    LeastLoad,
    /// As they are drawn.
    Random,
    /// By turns, which this counts.
    Turns(&'a dyn Fn() -> u32),
    /// As the table leads the key with this hash. `places` says which candidate each number of the
    /// table is.
    Table {
        /// The table.
        maglev: &'a Maglev,
        /// By the table's numbers.
        places: &'a [usize],
        /// Of the key.
        hash: u64,
    },
}

/// Whether a candidate takes a call, from never to gladly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// Not this call.
    Never,
    /// When nobody else is there.
    LastResort,
    /// When nobody else has room.
    Full,
    /// Gladly.
    Willing,
}

/// What a call would meet at a candidate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Of one call, in any unit that is the same for all; 0 for one that is to be tried now.
    pub cost: f64,
    /// Calls in flight.
    pub in_flight: u32,
}

impl Load {
    /// To be tried now, before all others.
    pub const TRIAL: Self = Self { cost: 0.0, in_flight: 0 };

    /// Whether a call meets less here than at `other`; weights are relative to one another.
    fn is_less(self, weight: f64, other: Self, others_weight: f64) -> bool {
        let queue = |load: Self, weight: f64| 1.0 + f64::from(load.in_flight) / weight;
        let (own, others) = (queue(self, weight), queue(other, others_weight));
        let (least, most) = (self.cost.min(other.cost), self.cost.max(other.cost));
        if least > most * CLEARLY_LESS {
            own < others
        } else {
            self.cost * own < other.cost * others
        }
    }
}

/// How a candidate stands to a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stance {
    /// Whether it takes it.
    pub rank: Rank,
    /// The part of its weight that it gets now, in thousandths.
    pub share: u16,
    /// What the call would meet.
    pub load: Load,
}

impl Stance {
    /// It will not take this call.
    pub const NEVER: Self = Self { rank: Rank::Never, share: 0, load: Load::TRIAL };

    /// Its load, if it takes a call gladly and this one falls into its share.
    fn takes(self, rng: &mut impl Rng) -> Option<Load> {
        let is_its = self.share >= WHOLE || rng.random_range(0..WHOLE) < self.share;
        (self.rank == Rank::Willing && is_its).then_some(self.load)
    }
}

/// One of `shares` that takes the call gladly; `None` when none of the first few does. `look` says how
/// the one of that number stands to the call.
pub fn choose(
    shares: &Shares,
    order: &Order<'_>,
    look: impl Fn(usize) -> Stance,
    rng: &mut impl Rng,
) -> Option<usize> {
    match order {
        Order::LeastLoad => (0..DRAWS_MAX / 2).find_map(|_| less_loaded(shares, &look, rng)),
        Order::Random => draw(shares, &look, rng),
        Order::Turns(next) => {
            let first = shares.at_turn(next())?.candidate;
            // Whoever cannot take its turn leaves it to all others, not to the next one alone.
            look(first).takes(rng).map_or_else(|| draw(shares, &look, rng), |_| Some(first))
        }
        Order::Table { maglev, places, hash } => {
            let part = u16::try_from((hash >> 32) % u64::from(WHOLE)).unwrap_or(0);
            // The key says which part of a share it is, so that it stays where it is meanwhile.
            let takes = |stance: Stance| stance.rank == Rank::Willing && part < stance.share;
            let led = maglev.lookup(*hash).take(DRAWS_MAX as usize * 8);
            led.filter_map(|number| places.get(number).copied())
                .find(|candidate| takes(look(*candidate)))
        }
    }
}

fn draw(shares: &Shares, look: &impl Fn(usize) -> Stance, rng: &mut impl Rng) -> Option<usize> {
    (0..DRAWS_MAX).find_map(|_| {
        let drawn = shares.draw(rng)?.candidate;
        look(drawn).takes(rng).map(|_| drawn)
    })
}

fn less_loaded(
    shares: &Shares,
    look: &impl Fn(usize) -> Stance,
    rng: &mut impl Rng,
) -> Option<usize> {
    let (first, second) = shares.draw_two(rng)?;
    let load = look(first.candidate).takes(rng);
    let second = second.filter(|second| {
        load.is_none()
            || second.weight >= first.weight
            || rng.random_range(0..first.weight) < second.weight
    });
    let other = second.and_then(|second| Some((second, look(second.candidate).takes(rng)?)));
    match (load, other) {
        (Some(load), Some((second, other))) => {
            let relative = |weight: u64| weight as f64 / shares.weight_mean();
            let is_less = other.is_less(relative(second.weight), load, relative(first.weight));
            Some(if is_less { second.candidate } else { first.candidate })
        }
        (Some(_), None) => Some(first.candidate),
        (None, other) => other.map(|(second, _)| second.candidate),
    }
}

/// One of all, by rank, then by `nearness` from 0 on, then by what is left of its weight; `None` when
/// none takes the call. Asks each once.
pub fn scan(
    candidates: impl Iterator<Item = (usize, Weight, u8, Stance)>,
    order: &Order<'_>,
    rng: &mut impl Rng,
) -> Option<usize> {
    let mut best: Option<((Rank, std::cmp::Reverse<u8>), Sample)> = None;
    for (candidate, weight, nearness, stance) in candidates {
        let part = u64::from(weight.0) * u64::from(stance.share.clamp(1, WHOLE));
        if stance.rank == Rank::Never || part == 0 {
            continue;
        }
        let class = (stance.rank, std::cmp::Reverse(nearness));
        let one = One { candidate, load: stance.load, weight: f64::from(weight.0) / 100.0 };
        match &mut best {
            Some((known, sample)) if *known == class => sample.add(one, part, rng),
            Some((known, _)) if *known > class => {}
            best => *best = Some((class, Sample { one, other: one, total: part })),
        }
    }
    let (_, Sample { one, other, .. }) = best?;
    let is_less =
        matches!(order, Order::LeastLoad) && other.load.is_less(other.weight, one.load, one.weight);
    Some(if is_less { other.candidate } else { one.candidate })
}

#[derive(Clone, Copy)]
struct One {
    candidate: usize,
    load: Load,
    weight: f64,
}

/// Two drawn by weight out of a stream, each by itself, without keeping it: a newcomer takes a place
/// with the probability of its share of all so far (Chao, 1982).
struct Sample {
    one: One,
    other: One,
    total: u64,
}

impl Sample {
    fn add(&mut self, newcomer: One, weight: u64, rng: &mut impl Rng) {
        self.total += weight;
        for place in [&mut self.one, &mut self.other] {
            if rng.random_range(0..self.total) < weight {
                *place = newcomer;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;
    use crate::balancer::hash_of;

    /// Ready, with this many in flight, each of which costs so much.
    fn stance(cost: f64, in_flight: u32) -> Stance {
        Stance { rank: Rank::Willing, share: WHOLE, load: Load { cost, in_flight } }
    }

    fn weights(of: &[u16]) -> Shares {
        of.iter().copied().map(Weight).enumerate().collect()
    }

    /// How often each is chosen in 10,000 calls, one after another.
    fn counts(of: &[u16], order: &Order<'_>, look: impl Fn(usize) -> Stance) -> Vec<u32> {
        let mut rng = SmallRng::seed_from_u64(7);
        let (shares, mut counts) = (weights(of), vec![0; of.len()]);
        for _ in 0..10_000 {
            if let Some(at) = choose(&shares, order, &look, &mut rng) {
                counts[at] += 1;
            }
        }
        counts
    }

    #[test]
    fn equal_candidates_share_equally() {
        for order in [Order::LeastLoad, Order::Random] {
            for count in counts(&[100; 4], &order, |_| stance(1.0, 0)) {
                assert!((2_200..2_800).contains(&count), "{count}");
            }
        }
    }

    #[test]
    fn calls_one_after_another_follow_the_weights() {
        let light = counts(&[950, 50], &Order::LeastLoad, |_| stance(1.0, 0))[1];
        assert!((400..600).contains(&light), "{light} of 10,000 went to the 5 %");
    }

    #[test]
    fn light_one_gets_at_most_twice_its_share_however_well_it_does() {
        let light = counts(&[950, 50], &Order::LeastLoad, |at| stance([1_000.0, 1.0][at], 0))[1];
        assert!((800..1_100).contains(&light), "{light} of 10,000 went to the 5 %");
    }

    #[test]
    fn busiest_and_slowest_of_three_are_never_chosen() {
        let busiest = counts(&[100; 3], &Order::LeastLoad, |at| stance(1.0, [1, 50, 2][at]));
        assert_eq!(busiest[1], 0, "it loses every pair");
        let slowest = counts(&[100; 3], &Order::LeastLoad, |at| stance([5.0, 5.0, 500.0][at], 0));
        assert_eq!(slowest[2], 0, "it loses every pair");
    }

    #[test]
    fn slow_one_takes_calls_once_the_others_are_as_busy_as_it_is_slow() {
        let taken = counts(&[100; 2], &Order::LeastLoad, |at| stance([1.0, 10.0][at], [20, 0][at]));
        assert_eq!(taken, [0, 10_000]);
    }

    #[test]
    fn weight_zero_takes_none_even_alone() {
        let none = |of: &[u16]| counts(of, &Order::LeastLoad, |_| stance(1.0, 0));
        assert_eq!(none(&[0, 100]), [0, 10_000]);
        assert_eq!(none(&[0, 0]), [0, 0]);
        assert_eq!(none(&[]), [0; 0]);
    }

    #[test]
    fn long_run_follows_the_weights() {
        // Calls that stay: load settles in proportion to weight.
        let mut rng = SmallRng::seed_from_u64(1);
        let (weights, in_flight) = (weights(&[300, 100]), [Cell::new(0), Cell::new(0)]);
        let look = |at: usize| stance(1.0, in_flight[at].get());
        for _ in 0..4_000 {
            if let Some(at) = choose(&weights, &Order::LeastLoad, look, &mut rng) {
                in_flight[at].set(in_flight[at].get() + 1);
            }
        }
        let heavy = in_flight[0].get();
        assert!((2_850..3_150).contains(&heavy), "{heavy} of 4,000");
    }

    #[test]
    fn turns_are_even_and_those_of_one_that_is_out_go_to_all_others() {
        let turn = Cell::new(0);
        let next = || {
            turn.set(turn.get() + 1);
            turn.get()
        };
        let even = counts(&[100; 4], &Order::Turns(&next), |_| stance(1.0, 0));
        assert_eq!(even, [2_500; 4]);
        let is_out = |at| if at == 2 { Stance::NEVER } else { stance(1.0, 0) };
        let without = counts(&[100; 4], &Order::Turns(&next), is_out);
        for (at, count) in without.iter().enumerate() {
            let expected = if at == 2 { 0..1 } else { 3_200..3_470 };
            assert!(expected.contains(count), "{without:?}");
        }
    }

    #[test]
    fn part_of_a_share_is_a_part_of_the_calls() {
        let ramp = |at| Stance { share: [WHOLE, 100][at], ..stance(1.0, 0) };
        for (order, expected) in [
            // It is half of the pair, and takes a tenth of that.
            (Order::LeastLoad, 400..600),
            // The same, and a share of what is drawn again.
            (Order::Random, 800..1_010),
            // Turn 1 is always its own.
            (Order::Turns(&|| 1), 1_700..1_950),
        ] {
            let few = counts(&[100; 2], &order, ramp)[1];
            assert!(expected.contains(&few), "{few} of 10,000, expected {expected:?}");
        }
    }

    #[test]
    fn same_key_stays_where_it_is_while_others_come_and_go() {
        let names = ["a", "b", "c"].map(str::as_bytes);
        let table = Maglev::new((0..).zip(names).map(|(at, name)| (at, name, Weight(100))));
        let shares = weights(&[100; 3]);
        let mut rng = SmallRng::seed_from_u64(1);
        for key in 0..200_u32 {
            let hash = hash_of(&key.to_be_bytes());
            let order = Order::Table { maglev: &table, places: &[0, 1, 2], hash };
            let mut led = |out: Option<usize>| {
                let look = |at| if Some(at) == out { Stance::NEVER } else { stance(1.0, 9) };
                choose(&shares, &order, look, &mut rng)
            };
            let first = led(None);
            assert_eq!(led(None), first);
            for other in (0..3).filter(|other| Some(*other) != first) {
                assert_eq!(led(Some(other)), first, "it is none of its business");
            }
            assert_ne!(led(first), first);
            assert!(led(first).is_some());
        }
    }

    #[test]
    fn scan_takes_the_best_rank_then_the_nearest_then_by_what_is_left_of_the_weight() {
        use Rank::{Full, LastResort, Never, Willing};
        #[allow(clippy::type_complexity)] // a table: rank, nearness, weight, share; who is chosen
        let cases: &[(&[(Rank, u8, u16, u16)], &[usize])] = &[
            (&[(Never, 0, 100, 1_000), (LastResort, 2, 100, 1_000)], &[1]),
            (&[(LastResort, 0, 100, 1_000), (Full, 1, 100, 1_000)], &[1]),
            (&[(Full, 0, 100, 1_000), (Willing, 1, 100, 10)], &[1]),
            (&[(Willing, 1, 100, 1_000), (Willing, 0, 100, 1_000), (Full, 0, 1, 1)], &[1]),
            (&[(Willing, 0, 100, 1_000), (Willing, 0, 100, 1_000)], &[0, 1]),
            (&[(Willing, 0, 0, 1_000)], &[]),
            (&[(Never, 0, 100, 1_000)], &[]),
            (&[], &[]),
        ];
        for (candidates, expected) in cases {
            let mut rng = SmallRng::seed_from_u64(3);
            let mut chosen: Vec<_> = (0..200)
                .filter_map(|_| {
                    let of =
                        candidates.iter().enumerate().map(|(at, (rank, near, weight, share))| {
                            let stance = Stance { rank: *rank, share: *share, ..stance(1.0, 0) };
                            (at, Weight(*weight), *near, stance)
                        });
                    scan(of, &Order::LeastLoad, &mut rng)
                })
                .collect();
            chosen.sort_unstable();
            chosen.dedup();
            assert_eq!(chosen, *expected, "{candidates:?}");
        }
    }

    #[test]
    fn scan_follows_weights_and_load() {
        let mut rng = SmallRng::seed_from_u64(3);
        let mut light = 0;
        for _ in 0..10_000 {
            let of = [900, 100].map(Weight).into_iter().enumerate();
            let of = of.map(|(at, weight)| (at, weight, 0, stance(1.0, 0)));
            light += u32::from(scan(of, &Order::Random, &mut rng) == Some(1));
        }
        assert!((900..1_100).contains(&light), "{light}");
        let busy = [50, 0, 50].into_iter().enumerate();
        let of = || busy.clone().map(|(at, calls)| (at, Weight(100), 0, stance(1.0, calls)));
        let idle = (0..1_000).filter(|_| scan(of(), &Order::LeastLoad, &mut rng) == Some(1));
        assert!(idle.count() > 500, "of two of three the idle one, 5 of 9 times");
    }
}
