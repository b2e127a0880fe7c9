//! How many attempts on another instance this member's calls to a service may make together.
//!
//! Only those are charged that may make work for an application or for an agent that has too much: a
//! call that was refused before anybody had it is free to go elsewhere.
//!
//! Retries help while few calls need them. When most do, they multiply the load on whatever is left,
//! and what they began they keep going. So they get a share of the requests of the last seconds and a
//! small constant rate, as Finagle and linkerd have it (ratio 0.2, 10/s, 10 s).
//!
//! The balance flows in with every request and every second and loses a share of `1/e` in
//! [`MEMORY`]. It is brought up to date only when it is asked: a request costs one addition.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::limits::Share;
use crate::model::{Moment, ServiceName};
use crate::runtime::clock::Clock;

/// Retries for each request, unless an entry says otherwise.
const SHARE: f64 = 0.2;
/// Retries in a second, so that a service that is seldom called has some, too.
const PER_SECOND: f64 = 10.0;
/// Services whose budgets are kept, unless more are in use.
const SERVICES_MAX: usize = 10_000;
/// For how long what was not used stays.
const MEMORY: Duration = Duration::from_secs(10);

/// Whose budget, and of which size where an entry says one.
type Key = (ServiceName, Option<Share>);

/// The budgets of this member's calls, one for each service and share. Cheap to ask.
#[derive(Debug, Default)]
pub(super) struct Budgets {
    by_service: Mutex<BTreeMap<Key, Arc<RetryBudget>>>,
}

impl Budgets {
    /// The budget of calls to `service`. Those that nobody uses are forgotten above [`SERVICES_MAX`].
    pub(super) fn of(
        &self,
        service: &ServiceName,
        share: Option<Share>,
        clock: &Clock,
    ) -> Arc<RetryBudget> {
        let key = (service.clone(), share);
        let mut budgets = self.by_service.lock();
        if let Some(budget) = budgets.get(&key) {
            return Arc::clone(budget);
        }
        if budgets.len() >= SERVICES_MAX {
            budgets.retain(|_, budget| Arc::strong_count(budget) > 1);
        }
        let budget =
            Arc::new(RetryBudget::new(clock.now(), share.map_or(SHARE, Share::as_fraction)));
        budgets.insert(key, Arc::clone(&budget));
        budget
    }
}

/// At any time at most `100 + 10 a second + 0.2 a request` were taken since the start.
#[derive(Debug)]
pub(super) struct RetryBudget {
    /// Retries for each request.
    share: f64,
    requests: AtomicU64,
    balance: Mutex<Balance>,
}

#[derive(Debug)]
struct Balance {
    retries: f64,
    as_of: Moment,
    /// Of the requests, those that have flowed in.
    requests: u64,
}

impl RetryBudget {
    /// What a member at rest has.
    pub(super) fn new(now: Moment, share: f64) -> Self {
        let retries = PER_SECOND * MEMORY.as_secs_f64();
        let balance = Balance { retries, as_of: now, requests: 0 };
        Self { share, requests: AtomicU64::new(0), balance: Mutex::new(balance) }
    }

    /// A client has asked for something.
    pub(super) fn note_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one retry, if there is one left.
    pub(super) fn take(&self, now: Moment) -> bool {
        let requests = self.requests.load(Ordering::Relaxed);
        let mut balance = self.balance.lock();
        balance.update(now, requests, self.share);
        let is_left = balance.retries >= 1.0;
        if is_left {
            balance.retries -= 1.0;
        }
        is_left
    }
}

impl Balance {
    fn update(&mut self, now: Moment, requests: u64, share: f64) {
        let (passed, memory) = (now.since(self.as_of).as_secs_f64(), MEMORY.as_secs_f64());
        let inflow = passed * PER_SECOND + requests.saturating_sub(self.requests) as f64 * share;
        // An even flow into a store that loses 1/memory of itself in each second. All of it, when no
        // time has passed.
        let kept = (-passed / memory).exp();
        let stays = if passed > 0.0 { (1.0 - kept) * memory / passed } else { 1.0 };
        self.retries = self.retries * kept + inflow * stays;
        (self.as_of, self.requests) = (now, requests);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of `wanted` retries are there.
    fn take(budget: &RetryBudget, second: u64, wanted: usize) -> usize {
        (0..wanted).filter(|_| budget.take(Moment::from_secs(second))).count()
    }

    #[test]
    fn member_at_rest_may_retry_a_hundred_times_and_then_ten_times_a_second() {
        let budget = RetryBudget::new(Moment::START, SHARE);
        assert_eq!(take(&budget, 0, 1_000), 100);
        let taken: usize = (1..=60).map(|second| take(&budget, second, 1_000)).sum();
        assert!((540..=600).contains(&taken), "{taken}");
    }

    #[test]
    fn what_was_not_used_is_lost_in_time() {
        let budget = RetryBudget::new(Moment::START, SHARE);
        (0..100_000).for_each(|_| budget.note_request());
        assert!(budget.take(Moment::START), "brings the balance up to date");
        let taken = take(&budget, 3_600, 1_000_000);
        assert!((99..=101).contains(&taken), "{taken}");
    }

    #[test]
    fn retries_follow_the_requests_and_never_exceed_a_fifth() {
        let budget = RetryBudget::new(Moment::START, SHARE);
        let mut all = 0;
        for second in 1..=100 {
            (0..1_000).for_each(|_| budget.note_request());
            all += take(&budget, second, 1_000);
        }
        let most = 100 + 10 * 100 + 200 * 100;
        assert!((most * 9 / 10..=most).contains(&all), "{all} of {most}");
    }
}
