//! Where an agent looks for its first members: addresses as told, and names that are resolved again
//! and again.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tracing::warn;

use crate::config::Seed;
use crate::transport::gossip::GossipHandle;

/// How often names of seeds are resolved again: a seed may move.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(30);

/// Seeds that need no resolver: the start waits for none.
pub(super) fn literal(seeds: &[Seed]) -> Vec<SocketAddr> {
    let address = |seed: &Seed| Some(SocketAddr::new(seed.host().parse().ok()?, seed.port()));
    seeds.iter().filter_map(address).collect()
}

/// All addresses of `seeds`, and those seeds that have none now.
pub(super) async fn resolve(seeds: &[Seed]) -> (Vec<SocketAddr>, Vec<(&Seed, io::Error)>) {
    let (mut found, mut without) = (Vec::new(), Vec::new());
    for seed in seeds {
        match tokio::net::lookup_host((seed.host(), seed.port())).await {
            Ok(addresses) => found.extend(addresses),
            Err(error) => without.push((seed, error)),
        }
    }
    (found, without)
}

/// Resolves seeds that are names, now and again and again, and at once when there are others: a seed
/// may move.
pub(super) async fn resolve_again(mut seeds: watch::Receiver<Vec<Seed>>, gossip: GossipHandle) {
    let is_name = |seed: &&Seed| seed.host().parse::<std::net::IpAddr>().is_err();
    loop {
        let names: Vec<Seed> = seeds.borrow_and_update().iter().filter(is_name).cloned().collect();
        let (addresses, without) = resolve(&names).await;
        for (seed, error) in without {
            warn!(%seed, %error, "seed has no address now");
        }
        for address in addresses {
            gossip.add_seed(address).await;
        }
        let changed = match names.is_empty() {
            true => seeds.changed().await,
            false => timeout(RESOLVE_INTERVAL, seeds.changed()).await.unwrap_or(Ok(())),
        };
        if changed.is_err() {
            return; // the agent stops
        }
    }
}
