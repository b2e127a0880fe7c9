//! Power of two choices: of two drawn by weight, the one with less in flight for its weight.
//!
//! Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001): two draws bring the
//! longest queue from log n / log log n down to log log n, and unlike a full scan callers with the
//! same old view do not all run to the same instance.

use rand::{Rng, RngExt};

use super::Candidate;

/// The index of the chosen candidate; `None` when all have weight 0.
pub fn least_request(candidates: &[Candidate], rng: &mut impl Rng) -> Option<usize> {
    let total: u64 = candidates.iter().map(weight).sum();
    let first = draw(candidates, None, total, rng)?;
    let rest = total - weight(&candidates[first]);
    let Some(second) = draw(candidates, Some(first), rest, rng) else { return Some(first) };
    let is_busier = fullness(candidates, first, second) > fullness(candidates, second, first);
    Some(if is_busier { second } else { first })
}

/// Draws by weight among all but `without`, whose weights sum to `total`.
fn draw(
    candidates: &[Candidate],
    without: Option<usize>,
    total: u64,
    rng: &mut impl Rng,
) -> Option<usize> {
    if total == 0 {
        return None;
    }
    let mut at = rng.random_range(0..total);
    for (index, candidate) in candidates.iter().enumerate() {
        if without == Some(index) {
            continue;
        }
        match at.checked_sub(weight(candidate)) {
            None => return Some(index),
            Some(left) => at = left,
        }
    }
    None
}

/// Load over weight of `this`, scaled by the other's weight: compares without division. The call to
/// come is not counted: between two that rest the draw decides, which follows the weights already.
fn fullness(candidates: &[Candidate], this: usize, other: usize) -> u64 {
    u64::from(candidates[this].load) * weight(&candidates[other])
}

fn weight(candidate: &Candidate) -> u64 {
    u64::from(candidate.weight.0)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;
    use crate::model::Weight;

    fn candidates(of: &[(u16, u32)]) -> Vec<Candidate> {
        of.iter().map(|&(weight, load)| Candidate { weight: Weight(weight), load }).collect()
    }

    /// How often each of `of` is chosen in 10,000 draws.
    fn shares(of: &[(u16, u32)]) -> Vec<u32> {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut shares = vec![0; of.len()];
        for _ in 0..10_000 {
            if let Some(index) = least_request(&candidates(of), &mut rng) {
                shares[index] += 1;
            }
        }
        shares
    }

    #[test]
    fn equal_candidates_share_equally() {
        for share in shares(&[(100, 0), (100, 0), (100, 0), (100, 0)]) {
            assert!((2_200..2_800).contains(&share), "{share}");
        }
    }

    #[test]
    fn calls_one_after_another_follow_the_weights() {
        let light = shares(&[(950, 0), (50, 0)])[1];
        assert!((400..600).contains(&light), "{light} of 10,000 went to the 5 %");
    }

    #[test]
    fn busiest_of_three_is_never_chosen() {
        assert_eq!(shares(&[(100, 1), (100, 50), (100, 2)])[1], 0, "it loses every pair");
    }

    #[test]
    fn weight_zero_takes_none_even_alone() {
        assert_eq!(shares(&[(0, 0), (100, 9)]), [0, 10_000]);
        assert_eq!(shares(&[(0, 0), (0, 0)]), [0, 0]);
        assert_eq!(shares(&[]), [0; 0]);
    }

    #[test]
    fn long_run_follows_the_weights() {
        // Calls that stay: load settles in proportion to weight.
        let mut rng = SmallRng::seed_from_u64(1);
        let mut pool = candidates(&[(300, 0), (100, 0)]);
        for _ in 0..4_000 {
            if let Some(index) = least_request(&pool, &mut rng) {
                pool[index].load += 1;
            }
        }
        assert!((2_950..3_050).contains(&pool[0].load), "{pool:?}");
    }
}
