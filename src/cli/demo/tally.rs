//! What became of the demo's requests.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::instances::Service;
use crate::model::Moment;

/// After a kill, callers have this long to find out; a request begun later must not fail.
pub(super) const GRACE: Duration = Duration::from_secs(1);
/// What the kill catches is told by then. Whether bytes that were sent reached the application is
/// known to nobody until the silence has lasted; only then does the agent reset the connection.
const RESET_AFTER_MAX: Duration = Duration::from_secs(3);
/// Latencies that are kept: the last six minutes or so.
const LATENCIES_MAX: usize = 20_000;
/// Latencies of a live display: the last ten seconds or so.
const LATENCIES_RECENT: usize = 500;
/// Faults that are told one by one at the end.
const FAULTS_MAX: usize = 5;
/// Steps of the live curve.
pub(super) const STEPS_MAX: usize = 40;

/// One request that has ended.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) service: Service,
    pub(super) begun: Moment,
    pub(super) ended: Moment,
    pub(super) ending: Ending,
}

/// How it ended.
#[derive(Debug)]
pub(super) enum Ending {
    /// With the right answer, by this node.
    Right(String),
    /// With another answer.
    Wrong(String),
    /// Without an answer.
    Failed(String),
}

/// Answers and latencies of some time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Step {
    pub(super) right: u32,
    pub(super) bad: u32,
}

/// Counts.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) right: u64,
    pub(super) wrong: u64,
    /// Failed, and had begun before a kill.
    pub(super) cut: u64,
    /// Failed, and had begun within [`GRACE`] after a kill.
    pub(super) caught: u64,
    /// Failed at any other time.
    pub(super) failed: u64,
    /// The first few of the wrong and failed ones.
    pub(super) faults: Vec<String>,
    began: Moment,
    killed: Option<Moment>,
    latencies: VecDeque<Duration>,
    /// Right answers of the last second.
    recent: VecDeque<(Moment, Service, String)>,
    steps: VecDeque<Step>,
    step: Step,
}

impl Tally {
    /// Nothing yet; traffic begins at `began`.
    pub(super) fn new(began: Moment) -> Self {
        Self { began, ..Self::default() }
    }

    /// An agent was killed.
    pub(super) fn handle_kill(&mut self, now: Moment) {
        self.killed = Some(now);
    }

    /// A request has ended.
    pub(super) fn handle_call(&mut self, call: Call) {
        let Call { service, begun, ended, ending } = call;
        let fault = match ending {
            Ending::Right(node) => {
                self.right += 1;
                self.step.right += 1;
                self.recent.push_back((ended, service, node));
                self.latencies.push_back(ended.since(begun));
                if self.latencies.len() > LATENCIES_MAX {
                    self.latencies.pop_front();
                }
                return;
            }
            Ending::Wrong(answer) => {
                self.wrong += 1;
                format!("wrong answer {answer:?}")
            }
            Ending::Failed(_) if self.was_cut(begun, ended) => {
                self.cut += 1;
                self.step.bad += 1;
                return;
            }
            Ending::Failed(_) if self.is_caught(begun, ended) => {
                self.caught += 1;
                self.step.bad += 1;
                return;
            }
            Ending::Failed(why) => {
                self.failed += 1;
                why
            }
        };
        self.step.bad += 1;
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(self.told(service, begun, ended, &fault));
        }
    }

    fn told(&self, service: Service, begun: Moment, ended: Moment, fault: &str) -> String {
        let since = |earlier: Moment| ended.since(earlier).as_secs_f64();
        let after = match self.killed {
            Some(killed) => format!(", {:.1} s after the kill", since(killed)),
            None => String::new(),
        };
        let (at, name, lasted) = (since(self.began), service.name(), since(begun));
        format!("{at:.1} s{after}: {name}, after {lasted:.3} s: {fault}")
    }

    fn was_cut(&self, begun: Moment, ended: Moment) -> bool {
        self.killed.is_some_and(|killed| begun <= killed && killed <= ended)
    }

    fn is_caught(&self, begun: Moment, ended: Moment) -> bool {
        self.killed.is_some_and(|killed| {
            killed <= begun
                && begun.since(killed) <= GRACE
                && ended.since(killed) <= GRACE + RESET_AFTER_MAX
        })
    }

    /// Ends a step of the live curve.
    pub(super) fn handle_step(&mut self) {
        self.steps.push_back(std::mem::take(&mut self.step));
        if self.steps.len() > STEPS_MAX {
            self.steps.pop_front();
        }
    }

    /// The live curve, oldest first.
    pub(super) fn steps(&self) -> impl Iterator<Item = Step> {
        self.steps.iter().copied()
    }

    /// All requests that have ended.
    pub(super) fn all(&self) -> u64 {
        self.right + self.wrong + self.cut + self.caught + self.failed
    }

    /// Whether the mesh kept its word.
    pub(super) fn is_good(&self) -> bool {
        self.wrong == 0 && self.failed == 0
    }

    /// Right answers of the last second, by node.
    pub(super) fn recent(&mut self, now: Moment, service: Service) -> BTreeMap<&str, u32> {
        while self.recent.front().is_some_and(|(at, ..)| now.since(*at) > Duration::from_secs(1)) {
            self.recent.pop_front();
        }
        let mut by_node = BTreeMap::new();
        for (_, of, node) in &self.recent {
            if *of == service {
                *by_node.entry(node.as_str()).or_default() += 1;
            }
        }
        by_node
    }

    /// Median and 99th percentile of what is kept.
    pub(super) fn latency(&self) -> Option<(Duration, Duration)> {
        percentiles(self.latencies.iter().copied().collect())
    }

    /// The same of the last ten seconds or so.
    pub(super) fn latency_recent(&self) -> Option<(Duration, Duration)> {
        percentiles(self.latencies.iter().rev().take(LATENCIES_RECENT).copied().collect())
    }
}

fn percentiles(mut latencies: Vec<Duration>) -> Option<(Duration, Duration)> {
    latencies.sort_unstable();
    let at = |percent: usize| latencies.get(latencies.len() * percent / 100).copied();
    Some((at(50)?, at(99)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(begun: u64, ended: u64) -> Call {
        Call {
            service: Service::Greeter,
            begun: Moment::from_millis(begun),
            ended: Moment::from_millis(ended),
            ending: Ending::Failed("reset".into()),
        }
    }

    #[test]
    fn failures_are_judged_by_the_kill() {
        let counts = |tally: &Tally| (tally.cut, tally.caught, tally.failed);
        for (begun, ended, counted, is_good) in [
            (9_000, 9_900, (0, 0, 1), false),  // before it: nothing excuses that
            (9_990, 12_500, (1, 0, 0), true),  // in flight at the kill, however late it is noticed
            (10_100, 10_900, (0, 1, 0), true), // while callers find out
            (10_900, 13_900, (0, 1, 0), true), // reset as soon as the silence is certain
            (10_100, 14_001, (0, 0, 1), false), // and no later
            (11_001, 11_100, (0, 0, 1), false), // callers had their second
            (15_000, 15_001, (0, 0, 1), false),
        ] {
            let mut tally = Tally::default();
            if begun >= 9_990 {
                tally.handle_kill(Moment::from_secs(10));
            }
            tally.handle_call(failed(begun, ended));
            assert_eq!(counts(&tally), counted, "{begun} to {ended}");
            assert_eq!(tally.is_good(), is_good, "{begun} to {ended}");
            assert_eq!(tally.all(), 1);
        }
    }

    #[test]
    fn a_wrong_answer_is_never_excused() {
        let mut tally = Tally::default();
        tally.handle_kill(Moment::from_secs(10));
        tally.handle_call(Call { ending: Ending::Wrong("?".into()), ..failed(9_999, 10_001) });
        assert!(!tally.is_good());
    }

    #[test]
    fn percentiles_are_those_of_the_right_answers() {
        let mut tally = Tally::default();
        assert_eq!(tally.latency(), None);
        for millis in 1..=100 {
            let ending = Ending::Right("birch".into());
            tally.handle_call(Call { ending, ..failed(0, millis) });
        }
        let millis = Duration::from_millis;
        assert_eq!(tally.latency(), Some((millis(51), millis(100))));
        let now = Moment::from_millis(500);
        assert_eq!(tally.recent(now, Service::Greeter).get("birch"), Some(&100));
        assert!(tally.recent(now + Duration::from_secs(2), Service::Greeter).is_empty());
    }
}
