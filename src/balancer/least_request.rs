//! Power of two choices: of two drawn by weight, the one with less in flight for its weight.
//!
//! Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing" (2001): two draws bring the
//! longest queue from log n / log log n down to log log n, and unlike a full scan callers with the
//! same old view do not all run to the same instance.

use rand::Rng;

use super::Shares;

/// The chosen candidate, where `load` is how many calls each has in flight; `None` when nobody has a
/// weight.
pub fn least_request(
    shares: &Shares,
    load: impl Fn(usize) -> u32,
    rng: &mut impl Rng,
) -> Option<usize> {
    let (first, second) = shares.draw_two(rng)?;
    let Some(second) = second else { return Some(first.candidate) };
    // Load over weight, each scaled by the other's weight: compares without division. The call to
    // come is not counted: between two that rest the draw decides, which follows the weights already.
    let (of_first, of_second) = (load(first.candidate), load(second.candidate));
    let is_busier = u64::from(of_first) * second.weight > u64::from(of_second) * first.weight;
    Some(if is_busier { second.candidate } else { first.candidate })
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;
    use crate::model::Weight;

    fn weights(of: &[(u16, u32)]) -> Shares {
        of.iter().map(|&(weight, _)| Weight(weight)).enumerate().collect()
    }

    /// How often each of `of` is chosen in 10,000 draws.
    fn shares(of: &[(u16, u32)]) -> Vec<u32> {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut shares = vec![0; of.len()];
        for _ in 0..10_000 {
            if let Some(index) = least_request(&weights(of), |index| of[index].1, &mut rng) {
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
        let (weights, mut load) = (weights(&[(300, 0), (100, 0)]), [0; 2]);
        for _ in 0..4_000 {
            if let Some(index) = least_request(&weights, |index| load[index], &mut rng) {
                load[index] += 1;
            }
        }
        assert!((2_950..3_050).contains(&load[0]), "{load:?}");
    }
}
