//! Connections to instances that rest between requests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::upstream::{Kept, Shared};
use super::whose::Key;
use crate::model::Moment;

/// How long a connection rests before it is ended. Servers close resting connections, and a request
/// that crosses with that is lost: the shortest limit in common use is 5 s (Node.js), and a new
/// connection costs no round trip.
const REST_TIME_MAX: Duration = Duration::from_secs(4);
/// Connections that rest for one instance.
const RESTING_MAX: usize = 1_024;
/// Requests at a time on one connection of HTTP/2: what servers usually grant.
const STREAMS_MAX: usize = 100;

/// All connections that rest or are shared. The one used last is used first, so that those too many
/// for the load grow old.
#[derive(Default)]
pub(super) struct Pool {
    resting: Mutex<BTreeMap<Key, Vec<Resting>>>,
    shared: Mutex<BTreeMap<Key, Vec<Counted>>>,
}

struct Resting {
    kept: Kept,
    since: Moment,
}

/// A shared connection and a mark for each exchange on it.
struct Counted {
    connection: Shared,
    streams: Arc<()>,
    used_at: Moment,
}

/// One exchange on a shared connection, counted until it is dropped.
pub(super) struct Stream {
    _mark: Arc<()>,
}

impl Pool {
    /// A connection on which nothing is under way and that the instance has not closed, as far as is
    /// known.
    pub(super) fn take(&self, key: &Key) -> Option<Kept> {
        loop {
            let mut resting = self.resting.lock().get_mut(key)?.pop()?;
            if resting.kept.is_free() {
                return Some(resting.kept);
            }
        }
    }

    /// Keeps a connection for the next request.
    pub(super) fn put(&self, kept: Kept, now: Moment) {
        let mut resting = self.resting.lock();
        let connections = match resting.get_mut(&kept.whose.key) {
            Some(connections) => connections,
            None => resting.entry(kept.whose.key.clone()).or_default(),
        };
        if connections.len() < RESTING_MAX {
            connections.push(Resting { kept, since: now });
        } else {
            drop(resting);
            kept.end();
        }
    }

    /// A shared connection with room for an exchange.
    pub(super) fn share(&self, key: &Key, now: Moment) -> Option<(Shared, Stream)> {
        let mut shared = self.shared.lock();
        let connections = shared.get_mut(key)?;
        connections.retain(|counted| counted.connection.is_open());
        let has_room = |counted: &&mut Counted| Arc::strong_count(&counted.streams) <= STREAMS_MAX;
        let counted = connections.iter_mut().find(has_room)?;
        counted.used_at = now;
        Some((counted.connection.clone(), Stream { _mark: Arc::clone(&counted.streams) }))
    }

    /// Shares a new connection with later exchanges; the first is the caller's.
    pub(super) fn add(&self, connection: &Shared, now: Moment) -> Stream {
        let streams = Arc::<()>::default();
        let stream = Stream { _mark: Arc::clone(&streams) };
        let counted = Counted { connection: connection.clone(), streams, used_at: now };
        let key = connection.whose.key.clone();
        self.shared.lock().entry(key).or_default().push(counted);
        stream
    }

    /// Ends what has rested for too long, and what leads to instances that take nothing new, or that the
    /// mesh has ejected.
    pub(super) fn sweep(&self, now: Moment, takes_work: impl Fn(&Key) -> bool) {
        let mut old = Vec::new();
        self.resting.lock().retain(|key, connections| {
            let takes_work = takes_work(key);
            let is_old = |resting: &Resting| now.since(resting.since) >= REST_TIME_MAX;
            let count = connections.iter().take_while(|resting| !takes_work || is_old(resting));
            old.extend(connections.drain(..count.count()));
            !connections.is_empty()
        });
        self.shared.lock().retain(|key, connections| {
            let takes_work = takes_work(key);
            connections.retain(|counted| {
                let is_old = now.since(counted.used_at) >= REST_TIME_MAX;
                let is_used = Arc::strong_count(&counted.streams) > 1;
                counted.connection.is_open() && takes_work && (is_used || !is_old)
            });
            !connections.is_empty()
        });
        old.into_iter().for_each(|resting| resting.kept.end());
    }
}
