//! When calls leave the near zone for the next: before it melts, and no sooner.
//!
//! Two signs are read. Calls in flight against the soft limits say it early, where limits are
//! declared. Latency against that of the next zone says it in any case: once near is slower than far,
//! nearness is worth nothing. Both act in proportion, so that what leaves is what is too much, and the
//! near zone goes on being measured.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::WHOLE;
use crate::model::nearest;

/// In flight over soft limit from which calls begin to leave, and at which all do. A guess: queues
/// grow without bound at 1, and are short below 0.7 (M/M/1: 2.3 waiting).
const LOAD_BEGIN: f64 = 0.7;
const LOAD_END: f64 = 1.0;
/// Near over far latency from which calls begin to leave, and at which [`LATENCY_SHARE_MAX`] do. A
/// guess: below 2 it is noise of two averages.
const LATENCY_BEGIN: f64 = 2.0;
const LATENCY_END: f64 = 5.0;
/// Thousandths. What is slow but has room keeps something, or nobody would see it recover.
const LATENCY_SHARE_MAX: f64 = 900.0;
/// What is assumed of a zone that nobody has called: a round trip between continents.
const LATENCY_UNKNOWN: Duration = Duration::from_millis(100);
/// Faster than this is no sign of trouble, whatever the other zone does.
const LATENCY_FINE: Duration = Duration::from_millis(5);

/// How near an endpoint is to the caller, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Near {
    /// The same zone.
    Zone,
    /// The same region.
    Region,
    /// Anywhere.
    Any,
}

impl Near {
    /// All of them, nearest first.
    pub const ALL: [Self; 3] = [Self::Zone, Self::Region, Self::Any];

    /// How near `zone` is to `own`. A zone is written `region/zone`; who has none is near nobody.
    pub fn between(own: &str, zone: &str) -> Self {
        if own.is_empty() || zone.is_empty() || region(own) != region(zone) {
            Self::Any
        } else if own == zone {
            Self::Zone
        } else {
            Self::Region
        }
    }

    /// The word of the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zone => "same-zone",
            Self::Region => "same-region",
            Self::Any => "any",
        }
    }
}

fn region(zone: &str) -> Option<&str> {
    zone.split('/').next()
}

/// Where calls go, nearest first: some of [`Near::ALL`]. Empty: anywhere, without preference.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "Vec<String>", into = "Vec<&'static str>")]
pub struct Prefer(u8);

impl Prefer {
    /// How many there are.
    pub const COUNT: usize = 1 << Near::ALL.len();

    /// What is told to whoever wrote something else.
    pub const EXPECTED: &str =
        "expected some of same-zone, same-region, any, each once and nearest first";

    /// From the words of the configuration.
    ///
    /// # Errors
    /// What is expected: calls that go anywhere have no nearer place to go to then.
    pub fn try_new(words: &[impl AsRef<str>]) -> Result<Self, String> {
        let mut prefer = Self::default();
        let mut last = None;
        for word in words {
            let word = word.as_ref();
            let Some(near) = Near::ALL.into_iter().find(|near| near.as_str() == word) else {
                let meant = nearest(word, Near::ALL.map(Near::as_str));
                let meant = meant.map(|near| format!("; did you mean '{near}'?"));
                return Err(Self::EXPECTED.to_owned() + &meant.unwrap_or_default());
            };
            if last >= Some(near) {
                return Err(Self::EXPECTED.to_owned());
            }
            prefer.0 |= 1 << near as u8;
            last = Some(near);
        }
        Ok(prefer)
    }

    /// Whether there is no preference.
    pub fn is_empty(&self) -> bool {
        self.0 == 0
    }

    /// As a number below [`Prefer::COUNT`].
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// What it is made of, nearest first.
    pub fn tiers(self) -> impl Iterator<Item = Near> {
        Near::ALL.into_iter().filter(move |near| self.0 & (1 << *near as u8) != 0)
    }
}

impl TryFrom<Vec<String>> for Prefer {
    type Error = String;

    fn try_from(words: Vec<String>) -> Result<Self, String> {
        Self::try_new(&words)
    }
}

impl From<Prefer> for Vec<&'static str> {
    fn from(prefer: Prefer) -> Self {
        prefer.tiers().map(Near::as_str).collect()
    }
}

/// How the endpoints of one distance fare together, as this caller sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tier {
    /// Those that take calls.
    pub ready: usize,
    /// Those that took some and do not now, each from 1 down to 0 as it is given up.
    pub missed: f64,
    /// Calls in flight to those that take calls.
    pub in_flight: u64,
    /// Their soft limits together; `None` when one has none.
    pub soft: Option<u64>,
    /// Of their answers, on average.
    pub latency: Option<Duration>,
}

/// The part of the calls for `near`, in thousandths, that goes to `far` instead.
pub fn spill(near: &Tier, far: &Tier) -> u16 {
    if far.ready == 0 {
        return 0;
    }
    if near.ready == 0 {
        return WHOLE;
    }
    by_load(near).max(by_latency(near, far)).max(by_loss(near))
}

/// What was lost of the near zone cannot be carried by the rest: calls leave in proportion once less
/// than 70 % is left, as Envoy's overprovisioning factor of 1.4 has it. Nobody says how large a zone is
/// meant to be, so what stays away counts ever less: load and latency show whether the rest can do
/// without it, and machines that are gone for good would draw calls away for ever.
fn by_loss(near: &Tier) -> u16 {
    let ready = near.ready as f64;
    let left = ready / (ready + near.missed) / LOAD_BEGIN;
    thousandths((1.0 - left) * f64::from(WHOLE))
}

fn by_load(near: &Tier) -> u16 {
    let Some(soft) = near.soft.filter(|soft| *soft > 0) else { return 0 };
    let load = near.in_flight as f64 / soft as f64;
    thousandths(between(load, LOAD_BEGIN, LOAD_END) * f64::from(WHOLE))
}

fn by_latency(near: &Tier, far: &Tier) -> u16 {
    let Some(latency) = near.latency.filter(|latency| *latency > LATENCY_FINE) else { return 0 };
    let other = far.latency.unwrap_or(LATENCY_UNKNOWN).max(LATENCY_FINE);
    let ratio = latency.as_secs_f64() / other.as_secs_f64();
    thousandths(between(ratio, LATENCY_BEGIN, LATENCY_END) * LATENCY_SHARE_MAX)
}

/// 0 up to `begin`, 1 from `end` on, in proportion between.
fn between(value: f64, begin: f64, end: f64) -> f64 {
    ((value - begin) / (end - begin)).clamp(0.0, 1.0)
}

fn thousandths(share: f64) -> u16 {
    share.clamp(0.0, f64::from(WHOLE)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_are_near_by_their_region_and_who_has_none_is_near_nobody() {
        for (own, zone, near) in [
            ("eu1/a", "eu1/a", Near::Zone),
            ("eu1/a", "eu1/b", Near::Region),
            ("eu1/a", "eu1", Near::Region),
            ("eu1", "eu1", Near::Zone),
            ("eu1/a", "eu10/a", Near::Any),
            ("eu1/a", "us1/a", Near::Any),
            ("", "", Near::Any),
            ("eu1/a", "", Near::Any),
        ] {
            assert_eq!(Near::between(own, zone), near, "{own:?} and {zone:?}");
        }
    }

    #[test]
    fn preference_is_nearest_first_or_refused() {
        let tiers =
            |words: &[&str]| Prefer::try_new(words).map(|it| it.tiers().collect::<Vec<_>>());
        assert_eq!(tiers(&["same-zone", "any"]).unwrap(), [Near::Zone, Near::Any]);
        assert_eq!(tiers(&["same-zone", "same-region", "any"]).unwrap(), Near::ALL);
        assert_eq!(tiers(&[]).unwrap(), []);
        for bad in [&["any", "same-zone"][..], &["any", "any"], &["same-rack"]] {
            assert!(tiers(bad).unwrap_err().contains("nearest first"), "{bad:?}");
        }
    }

    #[test]
    fn calls_leave_before_the_near_zone_melts_and_stay_while_it_is_well() {
        let tier = |ready, in_flight, soft, millis| Tier {
            ready,
            missed: (4 - ready) as f64,
            in_flight,
            soft,
            latency: Option::<u64>::map(millis, Duration::from_millis),
        };
        let far = tier(4, 0, Some(400), Some(40));
        for (why, near, far, expected) in [
            ("all is well", tier(4, 100, Some(400), Some(10)), far, 0..=0),
            ("no limits and no figures", tier(4, 9_999, None, None), far, 0..=0),
            ("at 70 % of the limits", tier(4, 280, Some(400), Some(10)), far, 0..=1),
            ("half way from there", tier(4, 340, Some(400), Some(10)), far, 490..=510),
            ("at the limits", tier(4, 400, Some(400), Some(10)), far, 1_000..=1_000),
            ("slower than far, yet within noise", tier(4, 0, None, Some(79)), far, 0..=0),
            ("three and a half times slower", tier(4, 0, None, Some(140)), far, 440..=460),
            ("far slower: some stay to measure it", tier(4, 0, None, Some(5_000)), far, 900..=900),
            ("fast in any case", tier(4, 0, None, Some(5)), tier(4, 0, None, Some(1)), 0..=0),
            ("far was never called", tier(4, 0, None, Some(150)), tier(4, 0, None, None), 0..=0),
            ("and slow", tier(4, 0, None, Some(350)), tier(4, 0, None, None), 440..=460),
            ("one of four is lost", tier(3, 0, None, None), far, 0..=0),
            ("half is lost", tier(2, 0, None, None), far, 280..=290),
            ("all is lost", tier(0, 0, None, None), far, 1_000..=1_000),
            (
                "nothing is ready there",
                tier(4, 900, Some(1), Some(9_000)),
                tier(0, 0, None, None),
                0..=0,
            ),
        ] {
            let share = spill(&near, &far);
            assert!(expected.contains(&share), "{why}: {share}");
        }
    }

    /// A zone of four, each good for 100 calls a second, that takes 240 until two of them die. Its rest
    /// answers the slower the busier it is (M/M/1, 10 ms when idle); far has room and takes 40 ms.
    #[test]
    fn zone_of_which_half_is_lost_does_not_melt_while_it_is_missed_nor_for_good() {
        for missed in [2.0, 1.0, 0.5, 0.0] {
            let (mut near_calls, mut busiest) = (240.0 * if missed > 0.0 { 0.7 } else { 1.0 }, 0.0);
            for round in 0..100 {
                let load = f64::min(near_calls / 200.0, 0.99);
                let latency = Some(Duration::from_secs_f64(0.010 / (1.0 - load)));
                let near = Tier { ready: 2, missed, latency, ..Tier::default() };
                let far =
                    Tier { ready: 4, latency: Some(Duration::from_millis(40)), ..Tier::default() };
                let goal = 240.0 * (1.0 - f64::from(spill(&near, &far)) / f64::from(WHOLE));
                near_calls += (goal - near_calls) * 0.1; // latency is an average of a while
                if round >= 50 {
                    busiest = f64::max(busiest, near_calls / 200.0);
                }
            }
            assert!((0.8..0.95).contains(&busiest), "{missed} missed: {busiest} of what is left");
        }
    }
}
