//! For how long a connection has heard nothing: the difference between a peer that rests and one
//! that is gone.
//!
//! Both sides of a data connection keep it alive, so that at rest something is heard every
//! [`KEEP_ALIVE`](super::planes::KEEP_ALIVE) and a round trip. A peer that is not heard for longer
//! is avoided where there is another ([`avoid_after`]): it may be only paused. After [`SILENCE_MAX`]
//! its connection is closed, and what it carried is reset.

use std::time::Duration;

use quinn::{Connection, VarInt};

use crate::model::Moment;

/// Silence, beside a round trip, after which new calls go elsewhere: three keep-alives. A lost one
/// is repeated within milliseconds where the round trip is short.
const AVOID_AFTER: Duration = Duration::from_millis(600);
/// Silence after which a connection is closed, here and not by quinn, whose idle time stretches with
/// the round trip: whoever waits for an answer is promised its reset within 3 s.
pub(super) const SILENCE_MAX: Duration = Duration::from_millis(2_400);
/// What counts of the time since the last look. When we did not look for longer we did not run, and
/// what the peer said meanwhile waits in the socket: our own pause is not its silence. Long enough
/// to count every look of a loaded machine, and so short that a pause alone, after a keep-alive
/// interval, stays below [`AVOID_AFTER`].
const LOOK_MAX: Duration = Duration::from_millis(300);

/// Silence after which new calls had better go to another member than one at this distance.
pub(super) fn avoid_after(rtt: Duration) -> Duration {
    AVOID_AFTER + rtt
}

/// Closes a connection that has been silent for [`SILENCE_MAX`]. A peer that was only paused hears of
/// it when it is back, and resets its half, too.
pub(super) fn close(connection: &Connection) {
    connection.close(VarInt::from_u32(0), b"silent");
}

/// What shows that the peer lives: it answers our keep-alives and sends its own. Frames, because only
/// they come out of packets that it alone can have sealed; whoever knows the path can send datagrams.
pub(super) fn heard(connection: &Connection) -> u64 {
    let frames = connection.stats().frame_rx;
    frames.acks + frames.ping + frames.stream
}

/// For how long one connection has heard nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Silence {
    heard: u64,
    looked_at: Moment,
    lasts: Duration,
}

impl Silence {
    /// Not silent at `now`, after so much was [`heard`].
    pub(super) fn new(now: Moment, heard: u64) -> Self {
        Self { heard, looked_at: now, lasts: Duration::ZERO }
    }

    /// Takes how much was [`heard`] so far; says for how long that has been all.
    pub(super) fn look(&mut self, now: Moment, heard: u64) -> Duration {
        let since = now.since(self.looked_at).min(LOOK_MAX);
        self.looked_at = now;
        self.lasts = if heard == self.heard { self.lasts + since } else { Duration::ZERO };
        self.heard = heard;
        self.lasts
    }
}

#[cfg(test)]
mod tests {
    use super::super::planes::KEEP_ALIVE;
    use super::*;

    const LAN: Duration = Duration::from_millis(1);

    /// When a peer last heard at 0 is avoided, looked at every `period` ms from then on.
    fn avoided_at(period: u64) -> Moment {
        let mut silence = Silence::new(Moment::START, 1);
        let mut looks = (1..).map(|look| Moment::from_millis(look * period));
        looks.find(|now| silence.look(*now, 1) >= avoid_after(LAN)).unwrap()
    }

    #[test]
    fn peer_that_is_gone_is_avoided_well_within_a_second_however_late_the_looks_are() {
        for period in [50, 100, 150, 250, 300] {
            assert!(avoided_at(period) <= Moment::from_millis(900), "looks every {period} ms");
        }
        assert!(avoided_at(50) <= Moment::from_millis(650), "as it is where all is well");
    }

    #[test]
    fn silence_ends_a_connection_in_time_for_a_reset_within_3_s() {
        for period in [50, 100, 150, 250, 300] {
            let mut silence = Silence::new(Moment::START, 1);
            let mut looks = (1..).map(|look| Moment::from_millis(look * period));
            let end = looks.find(|now| silence.look(*now, 1) >= SILENCE_MAX).unwrap();
            assert!(end < Moment::from_millis(2_750), "looks every {period} ms");
        }
    }

    #[test]
    fn our_own_pause_is_not_the_silence_of_peers() {
        let mut silence = Silence::new(Moment::START, 1);
        let quiet = KEEP_ALIVE + Duration::from_millis(75); // as long as a peer at rest may be
        assert!(silence.look(Moment::START + quiet, 1) < avoid_after(LAN));
        let back = Moment::from_secs(60); // stopped for a minute; its packets are not read yet
        assert!(silence.look(back, 1) < avoid_after(LAN));
        assert_eq!(silence.look(back + Duration::from_millis(50), 9), Duration::ZERO);
    }

    #[test]
    fn peer_at_rest_is_not_avoided_however_far_it_is() {
        // A keep-alive is answered after a round trip, and the next one is an interval later.
        for rtt in [0, 1, 300, 1_500].map(Duration::from_millis) {
            let gap = KEEP_ALIVE + rtt + Duration::from_millis(75); // a late look, a late answer
            let mut silence = Silence::new(Moment::START, 1);
            let mut now = Moment::START;
            while now.since(Moment::START) < gap {
                now = now + Duration::from_millis(50);
                assert!(silence.look(now, 1) < avoid_after(rtt), "{rtt:?}");
            }
        }
    }
}
