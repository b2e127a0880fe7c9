//! Places at a door: how many attempts it serves at once, and how many of them for one host.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use parking_lot::Mutex;

/// A host as far as addresses can tell: an IPv4 address, or the /64 out of which an IPv6 host takes
/// as many addresses as it likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Host(IpAddr);

impl Host {
    fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
            address => address,
        })
    }
}

/// The places at one door. Cheap to clone; every clone is the same door.
#[derive(Clone, Debug)]
pub(super) struct Places {
    max: usize,
    host_max: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    count: usize,
    /// Hosts with at least one place, so at most `max`.
    by_host: BTreeMap<Host, usize>,
}

/// One place, free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    host: Host,
    taken: Arc<Mutex<Taken>>,
}

impl Places {
    /// `max` places, of which one host has at most `host_max`.
    pub(super) fn new(max: usize, host_max: usize) -> Self {
        Self { max, host_max, taken: Arc::default() }
    }

    /// How many are taken.
    pub(super) fn taken(&self) -> usize {
        self.taken.lock().count
    }

    /// A place for `address`, or why there is none, as a fixed word.
    pub(super) fn take(&self, address: IpAddr) -> Result<Place, &'static str> {
        let host = Host::of(address);
        let mut taken = self.taken.lock();
        let count = taken.by_host.get(&host).copied().unwrap_or(0);
        if count >= self.host_max {
            return Err("over_share");
        }
        if taken.count >= self.max {
            return Err("overload");
        }
        taken.count += 1;
        taken.by_host.insert(host, count + 1);
        Ok(Place { host, taken: Arc::clone(&self.taken) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        taken.count -= 1;
        match taken.by_host.get_mut(&self.host) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(taken.by_host.remove(&self.host)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(places: &Places, address: &str) -> Result<Place, &'static str> {
        places.take(address.parse().unwrap())
    }

    #[test]
    fn one_host_has_its_share_and_the_door_its_bound_until_places_are_free_again() {
        let places = Places::new(3, 2);
        let first = take(&places, "10.0.0.1").unwrap();
        let _second = take(&places, "::ffff:10.0.0.1").unwrap();
        assert_eq!(take(&places, "10.0.0.1").unwrap_err(), "over_share");
        let _third = take(&places, "10.0.0.2").unwrap();
        assert_eq!(take(&places, "10.0.0.3").unwrap_err(), "overload");
        drop(first);
        take(&places, "10.0.0.3").unwrap();
        assert_eq!(places.taken(), 2, "a place that was dropped is free");
        assert_eq!(places.taken.lock().by_host.len(), 2, "and nothing is left of its host");
    }

    #[test]
    fn all_addresses_of_an_ipv6_prefix_are_one_host() {
        let places = Places::new(9, 2);
        let _held =
            ["2001:db8:0:1::1", "2001:db8:0:1:ffff::2"].map(|at| take(&places, at).unwrap());
        assert_eq!(take(&places, "2001:db8:0:1:1:2:3:4").unwrap_err(), "over_share");
        take(&places, "2001:db8:0:2::1").unwrap();
    }
}
