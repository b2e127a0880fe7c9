//! How far this machine's clock is from the others': certificates begin and end by it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::IteratorRandom;
use tokio::time::sleep;
use tracing::{debug, warn};

use crate::mesh::Snapshot;
use crate::model::{MemberId, MemberState};
use crate::telemetry::Metrics;
use crate::transport::Endpoint;
use crate::transport::enrolment::renewal::{Door, Skew, ask_time};

/// How often one random peer is asked. Clocks that drift, drift by seconds a day.
const INTERVAL: Duration = Duration::from_secs(600);
/// How often while there are too few answers for a median. Each costs a handshake, some 7 KB: so all of
/// them belong to the start, which costs a handshake with every member, and none to the time at rest.
const INTERVAL_SETTLING: Duration = Duration::from_secs(2);
/// Answers kept. Of five two may be wrong.
const SAMPLES_MAX: usize = 5;
/// Worth a warning: half of what the back-dating of certificates forgives.
const SKEW_WARNING_SECS: f64 = 1_800.0;

/// The last answers.
#[derive(Debug, Default)]
struct Samples {
    /// At most [`SAMPLES_MAX`], newest last.
    skews: VecDeque<f64>,
}

impl Samples {
    fn push(&mut self, Skew(skew): Skew) {
        if self.skews.len() == SAMPLES_MAX {
            self.skews.pop_front();
        }
        self.skews.push_back(skew);
    }

    /// By how many seconds the others are ahead of us.
    fn median(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.skews.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied()
    }
}

/// Asks random living members for their time, for ever.
pub(super) async fn measure(
    me: MemberId,
    endpoint: Endpoint,
    snapshot: Arc<ArcSwap<Snapshot>>,
    metrics: Metrics,
    seed: u64,
) {
    let (mut rng, mut samples) = (SmallRng::seed_from_u64(seed), Samples::default());
    let mut pause = INTERVAL_SETTLING;
    loop {
        sleep(pause).await;
        let others = snapshot.load_full();
        let others = others.members.values();
        let others = others.filter(|view| view.id != me && view.state == MemberState::Alive);
        let Some(peer) = others.choose(&mut rng) else { continue };
        let door = Door { member: Some(peer.id), address: peer.address };
        match ask_time(&endpoint, door).await {
            Ok(skew) => samples.push(skew),
            Err(error) => debug!(peer = %peer.name, %error, "no time from a peer"),
        }
        let is_known = samples.skews.len() >= SAMPLES_MAX;
        pause = if is_known { INTERVAL } else { INTERVAL_SETTLING };
        let Some(median) = samples.median() else { continue };
        metrics.clock_skew.set(median);
        if median.abs() > SKEW_WARNING_SECS {
            warn!(seconds = median, "the others' clocks are ahead of this machine's by this much");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_wrong_clocks_of_five_change_little() {
        let mut samples = Samples::default();
        assert_eq!(samples.median(), None);
        for skew in [9.0, 0.1, -9_999.0, 0.2, 0.3, 9_999.0] {
            samples.push(Skew(skew));
        }
        assert_eq!(samples.skews.len(), SAMPLES_MAX);
        assert_eq!(samples.median(), Some(0.2));
    }
}
