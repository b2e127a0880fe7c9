//! Seeds to run, and figures to print.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

/// Members above which a run makes do with one seed: such a run costs seconds.
const SMALL: usize = 64;

/// Runs `scenario` with every seed that the environment asks for; says which one failed.
pub(crate) fn with_seeds<R>(name: &str, scenario: impl FnMut(u64) -> R) -> Vec<R> {
    with_seeds_for(SMALL, name, scenario)
}

/// As [`with_seeds`], for a mesh of `count` members: unless told otherwise a large one gets a single seed.
pub(crate) fn with_seeds_for<R>(
    count: usize,
    name: &str,
    scenario: impl FnMut(u64) -> R,
) -> Vec<R> {
    with_many_seeds(1, count, name, scenario)
}

/// As [`with_seeds`], but with `least` seeds at least, unless one is named: for a claim about a share,
/// which two seeds neither show nor refute.
pub(crate) fn with_enough_seeds<R>(
    least: u64,
    name: &str,
    scenario: impl FnMut(u64) -> R,
) -> Vec<R> {
    with_many_seeds(least, SMALL, name, scenario)
}

fn with_many_seeds<R>(
    least: u64,
    count: usize,
    name: &str,
    mut scenario: impl FnMut(u64) -> R,
) -> Vec<R> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match (number("MURMESH_SEED"), number("MURMESH_SEEDS")) {
        (Some(seed), _) => seed..=seed,
        (None, Some(seeds)) => 1..=seeds.max(least),
        (None, None) if count > SMALL => 1..=least,
        (None, None) => 1..=least.max(2),
    };
    seeds
        .map(|seed| {
            catch_unwind(AssertUnwindSafe(|| scenario(seed))).unwrap_or_else(|cause| {
                println!(
                    "seed {seed} failed; repeat with\n  \
                     MURMESH_SEED={seed} cargo test --test simulations {name} -- --nocapture"
                );
                resume_unwind(cause)
            })
        })
        .collect()
}

/// Times, to be read as percentiles.
#[derive(Default)]
pub(crate) struct Times(Vec<Duration>);

impl Times {
    pub(crate) fn percentile(&self, share: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        let index = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
        sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or_default()
    }

    pub(crate) fn max(&self) -> Duration {
        self.percentile(1.0)
    }
}

impl FromIterator<Duration> for Times {
    fn from_iter<I: IntoIterator<Item = Duration>>(times: I) -> Self {
        Self(times.into_iter().collect())
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p95, max] = [0.5, 0.95, 1.0].map(|share| self.percentile(share).as_secs_f64());
        write!(f, "p50 {p50:.2} s, p95 {p95:.2} s, max {max:.2} s of {}", self.0.len())
    }
}
