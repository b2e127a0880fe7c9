//! How fast to detect, and at what cost.

use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

/// Presets. Choose one before turning knobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// Processes on one machine: demos and tests. A crash is known in about 2 s.
    Local,
    /// One site or a few near ones (round trips below 50 ms). A crash is known to all in about 7 s.
    #[default]
    Lan,
    /// Sites far apart (round trips up to 400 ms). A crash is known in about 20 s.
    Wan,
}

/// The detector's constants. Members of one mesh should agree on them; nothing breaks if not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MembershipConfig {
    /// One probe per period. Detection takes about 1.6 periods plus `suspicion`; the bytes at rest
    /// are inverse to it.
    pub period: Duration,
    /// Silence after which a probe asks for help. Above the worst round trip, below half a period.
    pub probe_timeout: Duration,
    /// Time that a suspect has to refute. Shorter convicts slow members, longer delays detection.
    pub suspicion: Duration,
    /// Time between rounds in which rumours are passed on.
    pub gossip_interval: Duration,
    /// Members told per round, and asked to help with a probe.
    pub fanout: NonZeroUsize,
    /// Fewest times that a rumour is passed on. The formula for big meshes gives 4 for 16 members,
    /// with which one broadcast in five misses somebody.
    pub transmissions_min: NonZeroU8,
}

const FANOUT: NonZeroUsize = NonZeroUsize::new(3).expect("3 is not 0");
/// What a QUIC datagram carries on a path whose MTU nobody has measured.
const PACKET_LEN_MAX: NonZeroUsize = NonZeroUsize::new(1150).expect("1150 is not 0");
const TRANSMISSIONS_MIN: NonZeroU8 = NonZeroU8::new(12).expect("12 is not 0");

impl From<Profile> for MembershipConfig {
    fn from(profile: Profile) -> Self {
        let (period, probe_timeout, suspicion, gossip_interval) = match profile {
            Profile::Local => (250, 100, 1_000, 100),
            // Simulated: 700/250/3000 tells all of a crash within 7 s in 91-96 % of runs,
            // 1000/300/4000 in 66-76 %.
            Profile::Lan => (700, 250, 3_000, 200),
            Profile::Wan => (2_000, 900, 8_000, 300),
        };
        Self {
            period: Duration::from_millis(period),
            probe_timeout: Duration::from_millis(probe_timeout),
            suspicion: Duration::from_millis(suspicion),
            gossip_interval: Duration::from_millis(gossip_interval),
            fanout: FANOUT,
            transmissions_min: TRANSMISSIONS_MIN,
        }
    }
}

impl MembershipConfig {
    /// How often each rumour is passed on among `members`.
    pub(super) fn transmissions(&self, members: usize) -> u8 {
        let by_size = ((members + 1) as f64).log10() * 4.0; // as foca and memberlist have it
        (by_size.ceil() as u8).max(self.transmissions_min.get()) // saturates at 255
    }

    /// foca's settings. It neither announces nor forgets: the driver dials, and nobody is forgotten.
    pub(super) fn to_foca(&self, transmissions: u8) -> foca::Config {
        foca::Config {
            probe_period: self.period,
            probe_rtt: self.probe_timeout,
            num_indirect_probes: self.fanout,
            max_transmissions: NonZeroU8::new(transmissions).unwrap_or(self.transmissions_min),
            suspect_to_down_after: self.suspicion,
            remove_down_after: None,
            max_packet_size: PACKET_LEN_MAX,
            notify_down_members: true,
            periodic_announce: None,
            periodic_announce_to_down_members: None,
            periodic_gossip: Some(foca::PeriodicParams {
                frequency: self.gossip_interval,
                num_members: self.fanout,
            }),
        }
    }
}
