//! Where others reach this member: an address as told, or a host name that is looked up again and again,
//! because the machine behind it may move.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::seeds::literal;
use super::start::StartError;
use crate::config::{Seed, default_advertise};
use crate::transport::gossip::GossipHandle;

/// How often a name is looked up again.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);
/// How long a start waits for the resolver, which may not be up yet when a machine boots.
const RESOLVE_TIME_MAX: Duration = Duration::from_secs(3);

/// Where others reach us: as told, or where we are bound when that is one address. A name without an
/// address now gives way to the default route's until it has one.
pub(super) async fn advertised(
    told: Option<&Seed>,
    bound: SocketAddr,
) -> Result<SocketAddr, StartError> {
    let by_default = || default_advertise(bound).ok_or(StartError::NoAdvertise(bound));
    let Some(told) = told else {
        return match bound.ip().is_unspecified() {
            true => Err(StartError::NoAdvertise(bound)),
            false => Ok(bound),
        };
    };
    if let Some(address) = literal(std::slice::from_ref(told)).pop() {
        let port = if address.port() == 0 { bound.port() } else { address.port() };
        return Ok(SocketAddr::new(address.ip(), port));
    }
    match resolve(told, bound, None).await {
        Ok(address) => Ok(address),
        Err(reason) => {
            let address = by_default()?;
            warn!(name = %told, reason, %address, "what is advertised has no address now; until then this one is");
            Ok(address)
        }
    }
}

/// Looks a name up again and again, and tells the mesh and `advertise` when it leads elsewhere. Returns
/// at once when `told` is no name.
pub(super) async fn follow(
    told: Option<Seed>,
    bound: SocketAddr,
    gossip: GossipHandle,
    advertise: watch::Sender<SocketAddr>,
) {
    let Some(told) = told.filter(|told| literal(std::slice::from_ref(told)).is_empty()) else {
        return;
    };
    loop {
        sleep(RESOLVE_INTERVAL).await;
        let current = *advertise.borrow();
        let address = match resolve(&told, bound, Some(current)).await {
            Ok(address) => address,
            Err(reason) => {
                warn!(name = %told, reason, "what is advertised has no address now; the last one is kept");
                continue;
            }
        };
        if current != address {
            info!(name = %told, %address, "others reach this member elsewhere now");
            advertise.send_replace(address);
        }
        // Also when it is the same: the node may not have had the epochs for the change.
        gossip.set_address(address).await;
    }
}

/// An address of a name that the socket can be reached at: `current` while it is one.
async fn resolve(
    name: &Seed,
    bound: SocketAddr,
    current: Option<SocketAddr>,
) -> Result<SocketAddr, String> {
    let found = timeout(RESOLVE_TIME_MAX, tokio::net::lookup_host((name.host(), name.port())));
    let found = found.await.map_err(|_| format!("no answer within {RESOLVE_TIME_MAX:?}"))?;
    let found = found.map_err(|error| error.to_string())?;
    choose(found, bound, current)
        .ok_or_else(|| "it has no IPv4 address, and the mesh port is bound to one".to_owned())
}

/// `current` if it was `found`, else the first that the socket `bound` can be reached at. Resolvers turn
/// the order of several addresses round with each answer, and another address is another run of this
/// member for all others.
fn choose(
    found: impl Iterator<Item = SocketAddr>,
    bound: SocketAddr,
    current: Option<SocketAddr>,
) -> Option<SocketAddr> {
    // A socket bound to an IPv6 address takes IPv4 as well, or is asked for by an IPv6 name.
    let usable: Vec<_> = found.filter(|address| bound.is_ipv6() || address.is_ipv4()).collect();
    current.filter(|current| usable.contains(current)).or_else(|| usable.first().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_kept_as_long_as_the_name_has_it() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let [a, b, six] = [at("10.0.0.1:7370"), at("10.0.0.2:7370"), at("[fd00::1]:7370")];
        let (four, both) = (at("0.0.0.0:7370"), at("[::]:7370"));
        for (what, found, bound, current, expected) in [
            ("at first the first", vec![a, b], four, None, Some(a)),
            ("the order turns", vec![b, a], four, Some(a), Some(a)),
            ("it is gone", vec![b], four, Some(a), Some(b)),
            ("not one that the socket has no way to", vec![six, b], four, None, Some(b)),
            ("nor when it was", vec![six, b], four, Some(six), Some(b)),
            ("either kind", vec![six, b], both, None, Some(six)),
            ("none", vec![six], four, Some(a), None),
        ] {
            assert_eq!(choose(found.into_iter(), bound, current), expected, "{what}");
        }
    }
}
