//! How much a new instance is given: caches are cold and code is not compiled yet.

use std::time::Duration;

use super::WHOLE;

/// How long an instance counts as new. A guess between what a connection pool needs to fill and what
/// people wait for in a deploy.
const RAMP: Duration = Duration::from_secs(10);
/// Of its share, what it gets at once: 10 %, as Envoy and Istio.
const BEGIN: u64 = 100;

/// The part of its weight, in thousandths, that an instance gets which has taken work for `age`.
pub fn slow_start(age: Duration) -> u16 {
    let whole = u64::from(WHOLE);
    let passed = u64::try_from(age.min(RAMP).as_millis()).unwrap_or(u64::MAX);
    let grown = (whole - BEGIN) * passed / RAMP.as_millis() as u64;
    u16::try_from(BEGIN + grown).unwrap_or(WHOLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_instance_begins_with_a_tenth_and_has_its_share_after_ten_seconds() {
        for (millis, share) in [(0, 100), (5_000, 550), (10_000, 1_000), (86_400_000, 1_000)] {
            assert_eq!(slow_start(Duration::from_millis(millis)), share, "after {millis} ms");
        }
    }
}
