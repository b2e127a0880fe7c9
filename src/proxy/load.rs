//! How busy an instance is with others' calls: measured by the agent in front of it, which alone sees all
//! of them, and told to whoever calls it.
//!
//! A caller counts its own calls in flight, and between two instances that rest for it draws blindly,
//! though others, who have their reasons (a zone, a key, an older view), may keep one of them busy. So
//! each second the agent in front of an instance tells
//! every peer that has a data connection to it how many calls of *others* were under way there on
//! average. It goes in one datagram on that very connection: what members gossip would reach all of the
//! mesh, of whom most never call it, and hints carry ten entries a second, not one a second of each
//! member that works. While no instance works nothing is said. A word counts for three seconds: one that
//! is lost, or an agent of before, leaves the caller with what it sees itself.
//!
//! Under way is: between two agents' HTTP/1.1 a request whose answer has not begun; on a connection of
//! HTTP/2 at least one such; any other connection for as long as it lives.
//!
//! What was heard is a second old, and all hear the same. Added to the calls in flight it made all
//! callers leave the busiest instance together: in `simulations/load_of_others.rs` the 99th percentile
//! of callers that are all balanced rose fourfold. So it is smoothed over some seconds, and says only
//! which instances are far more crowded than the rest ([`Others`](crate::balancer::Others)): those are
//! taken when nobody else has room.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::{MissedTickBehavior, interval};

use super::board::{Boards, Counted};
use crate::model::{InstanceId, Moment};
use crate::runtime::clock::Clock;
use crate::transport::{Accepted, Peers};
use crate::wire::{self, WireError};

/// How often callers are told, and what a figure is the average of.
const TELL_PERIOD: Duration = Duration::from_secs(1);
/// How often words of peers are taken from their connections.
const HEAR_PERIOD: Duration = Duration::from_millis(100);
/// Bytes of one word: a datagram of QUIC on any path. Of more instances than fit the busiest are named,
/// forty of them where names are long.
const WORD_LEN_MAX: usize = 1_000;
/// In tenths of a call; less is nothing.
const TOLD_MIN: u16 = 1;

/// Calls under way at one instance, and the time that all calls have taken so far.
#[derive(Debug, Default)]
pub(super) struct Gauge {
    under_way: AtomicU32,
    /// Of calls that have ended, modulo 2^64: the sum of their ends less that of their beginnings, in
    /// nanoseconds.
    nanos: AtomicU64,
}

impl Gauge {
    pub(super) fn begin(&self, now: Moment) {
        self.nanos.fetch_sub(now.as_nanos(), Ordering::Relaxed);
        self.under_way.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self, now: Moment) {
        self.nanos.fetch_add(now.as_nanos(), Ordering::Relaxed);
        self.under_way.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn under_way(&self) -> u32 {
        self.under_way.load(Ordering::Relaxed)
    }

    /// The time that calls have taken until now, in nanoseconds modulo 2^64: the difference of two is the
    /// average under way times the time between.
    fn total(&self, now: Moment) -> u64 {
        let open = u64::from(self.under_way()).wrapping_mul(now.as_nanos());
        self.nanos.load(Ordering::Relaxed).wrapping_add(open)
    }
}

/// The work of one tunnel, which counts as a call of its instance until it is dropped or settled.
#[derive(Debug)]
pub(super) struct Work {
    /// Of its instance, and of that what its caller causes.
    gauges: [Arc<Gauge>; 2],
    counted: Mutex<Option<Counted>>,
    clock: Clock,
    is_under_way: AtomicBool,
}

impl Work {
    pub(super) fn begin(&self) {
        if !self.is_under_way.swap(true, Ordering::Relaxed) {
            let now = self.clock.now();
            self.gauges.iter().for_each(|gauge| gauge.begin(now));
        }
    }

    pub(super) fn end(&self) {
        if self.is_under_way.swap(false, Ordering::Relaxed) {
            let now = self.clock.now();
            self.gauges.iter().for_each(|gauge| gauge.end(now));
        }
    }

    /// Nothing is under way any more, and nothing will be.
    pub(super) fn settle(&self) {
        self.end();
        drop(self.counted.lock().take());
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.end();
    }
}

/// What one peer causes at the instances of this member, and is told of the rest.
#[derive(Debug)]
pub(super) struct Share {
    clock: Clock,
    /// At most one for each own instance that the peer has called on this connection.
    caused: Mutex<BTreeMap<InstanceId, Arc<Gauge>>>,
}

impl Share {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock, caused: Mutex::default() }
    }

    /// A tunnel to an instance where it is counted. Nothing is under way on it.
    pub(super) fn work(&self, id: &InstanceId, counted: Counted) -> Work {
        let gauges = [Arc::clone(counted.gauge()), self.caused(id)];
        let (clock, counted) = (self.clock, Mutex::new(Some(counted)));
        Work { gauges, counted, clock, is_under_way: AtomicBool::new(false) }
    }

    fn caused(&self, id: &InstanceId) -> Arc<Gauge> {
        Arc::clone(self.caused.lock().entry(id.clone()).or_default())
    }

    /// Tells the peer how busy others keep the instances, for as long as the connection lasts. Cancel
    /// safe.
    pub(super) async fn tell(&self, accepted: &Accepted, boards: &Boards) {
        let mut ticks = interval(TELL_PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut before, mut has_told) = (Totals::default(), false);
        loop {
            ticks.tick().await;
            let now = Totals::of(self.clock.now(), boards.own_gauges(), &self.caused.lock());
            let told = now.others_since(&before);
            before = now;
            if (!told.is_empty() || has_told)
                && let Some(word) = encode(&told)
            {
                accepted.tell(word);
            }
            has_told = !told.is_empty();
            let is_known = |id: &InstanceId| before.by_instance.contains_key(id);
            let mut caused = self.caused.lock();
            caused.retain(|id, gauge| is_known(id) || Arc::strong_count(gauge) > 1);
        }
    }
}

/// The time that calls of each instance have taken: of all callers, and of one.
#[derive(Default)]
struct Totals {
    at: Moment,
    /// With the gauge of all: an instance that nobody has called for a while may get another.
    by_instance: BTreeMap<InstanceId, (Arc<Gauge>, [u64; 2])>,
}

impl Totals {
    fn of(
        now: Moment,
        all: impl IntoIterator<Item = (InstanceId, Arc<Gauge>)>,
        caused: &BTreeMap<InstanceId, Arc<Gauge>>,
    ) -> Self {
        let totals = all.into_iter().map(|(id, gauge)| {
            let own = caused.get(&id).map_or(0, |own| own.total(now));
            let totals = [gauge.total(now), own];
            (id, (gauge, totals))
        });
        Self { at: now, by_instance: totals.collect() }
    }

    /// What others had under way on average since `before`; the busiest first.
    fn others_since(&self, before: &Self) -> Vec<InstanceLoad> {
        let time = self.at.since(before.at).as_nanos().max(1);
        let others = self.by_instance.iter().filter_map(|(id, (gauge, [all, own]))| {
            let (same, [all_before, own_before]) = before.by_instance.get(id)?;
            if !Arc::ptr_eq(gauge, same) {
                return None;
            }
            let [all, own] = [all.wrapping_sub(*all_before), own.wrapping_sub(*own_before)];
            let tenths = u128::from(all.saturating_sub(own)) * 10 / time;
            let tenths = u16::try_from(tenths).unwrap_or(u16::MAX);
            (tenths >= TOLD_MIN).then(|| InstanceLoad { instance: id.clone(), tenths })
        });
        let mut others: Vec<_> = others.collect();
        others.sort_by_key(|load| std::cmp::Reverse(load.tenths));
        others
    }
}

/// What a member tells one of its callers: how many calls of others are under way. Instances that it
/// does not name have none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Word {
    loads: Vec<InstanceLoad>,
}

impl wire::Payload for Word {}

/// Calls of others under way at one instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InstanceLoad {
    pub(super) instance: InstanceId,
    /// On average over the last second, in tenths of a call.
    pub(super) tenths: u16,
}

/// The first of them that fit; `None` when that cannot be said.
fn encode(loads: &[InstanceLoad]) -> Option<Bytes> {
    let len = |load: &InstanceLoad| load.instance.as_str().len() + 4; // of name and figure, at most
    let mut left = WORD_LEN_MAX - 4; // version, and how many
    let fit = loads.iter().take_while(|load| {
        let fits = len(load) <= left;
        left = left.saturating_sub(len(load));
        fits
    });
    wire::encode_payload(&Word { loads: fit.cloned().collect() }).ok().map(Bytes::from)
}

fn decode(word: &[u8]) -> Result<BTreeMap<InstanceId, f64>, WireError> {
    let word: Word = wire::decode_payload(word)?;
    let calls = |load: InstanceLoad| (load.instance, f64::from(load.tenths) / 10.0);
    Ok(word.loads.into_iter().map(calls).collect())
}

/// Takes what peers say of their instances, for ever.
pub(super) async fn hear(peers: Peers, boards: Arc<Boards>) {
    let mut ticks = interval(HEAR_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let told = peers.told().into_iter();
        let words = told.filter_map(|(member, word)| Some((member, decode(&word).ok()?)));
        let words: Vec<_> = words.collect();
        if !words.is_empty() {
            boards.note_loads(&words);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MemberId;
    use crate::telemetry::{EventLog, Metrics};

    fn load(number: usize, tenths: u16) -> InstanceLoad {
        InstanceLoad { instance: format!("web-{number}").parse().unwrap(), tenths }
    }

    #[test]
    fn peer_hears_the_average_of_what_others_had_under_way() {
        let at = Moment::from_millis;
        let clock = Clock::new();
        let (share, id) = (Share::new(clock), "web".parse().unwrap());
        let all = Arc::<Gauge>::default();
        let own = share.caused(&id);
        let totals = |now| {
            let gauges = [(id.clone(), Arc::clone(&all))];
            Totals::of(now, gauges, &share.caused.lock())
        };
        let told = |before: &Totals, now: &Totals| {
            let loads = now.others_since(before);
            loads.first().map_or(0, |load| load.tenths)
        };
        // Its own call of a second; of others two that go on and one of half a second.
        let begin = totals(at(1_000));
        [&all, &own].iter().for_each(|gauge| gauge.begin(at(1_000)));
        [1_000, 1_000, 1_500].iter().for_each(|begun| all.begin(at(*begun)));
        all.end(at(2_000));
        [&all, &own].iter().for_each(|gauge| gauge.end(at(2_000)));
        let end = totals(at(2_000));
        assert_eq!(told(&begin, &end), 25, "two, and half a second of one");
        assert_eq!(told(&end, &totals(at(3_000))), 20, "two of others go on");
        (0..2).for_each(|_| all.end(at(3_000)));
        let end = totals(at(4_000));
        assert_eq!(told(&totals(at(3_000)), &end), 0);
        let another = [(id.clone(), Arc::<Gauge>::default())];
        let another = Totals::of(at(5_000), another, &share.caused.lock());
        assert_eq!(told(&end, &another), 0, "counted anew");
    }

    #[test]
    fn work_of_a_tunnel_counts_once_until_it_is_settled() {
        let clock = Clock::new();
        let (share, id) = (Share::new(clock), "web".parse().unwrap());
        let me = MemberId::from_bytes([1; 16]);
        let boards = Boards::new(me, clock, Metrics::new(), EventLog::new("me"), 1);
        let counted = boards.enter(&"web".parse().unwrap(), &id);
        let gauge = Arc::clone(counted.gauge());
        let work = share.work(&id, counted);
        let under_way = || (gauge.under_way(), boards.in_flight(&me, &id));
        assert_eq!(under_way(), (0, 1));
        work.begin();
        work.begin();
        assert_eq!(under_way(), (1, 1));
        work.end();
        work.begin();
        work.settle();
        assert_eq!(under_way(), (0, 0));
        drop(work);
        assert_eq!(under_way(), (0, 0));
    }

    #[test]
    fn word_is_frozen_and_names_the_busiest_that_fit() {
        let word = encode(&[load(1, 25)]).unwrap();
        assert_eq!(&word[..], b"\x01\x01\x05web-1\x19");
        let many: Vec<_> = (0..1_000).map(|number| load(number, 60_000 - number as u16)).collect();
        let word = encode(&many).unwrap();
        assert!(word.len() <= WORD_LEN_MAX, "{}", word.len());
        let heard = decode(&word).unwrap();
        assert!(heard.len() >= 80, "{}", heard.len());
        assert!(heard.values().all(|calls| *calls > 5_985.0), "the first ones");
    }

    #[test]
    fn what_is_no_word_is_no_load() {
        let word = encode(&[load(1, 25), load(2, 7)]).unwrap();
        for len in 0..word.len() {
            assert!(decode(&word[..len]).is_err(), "{len} bytes");
        }
        assert!(decode(&[0; 40]).is_err() && decode(&[255; 1_200]).is_err());
    }
}
