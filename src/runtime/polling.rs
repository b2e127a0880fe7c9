//! Looks for work a little longer before a thread sleeps, while that pays.
//!
//! Where the CPU is virtual, what a message costs most is that its receiver sleeps: its core stops, and
//! is started again for every message, which was half of the time of a request over one connection on
//! the machine of `docs/performance.md`. So a thread whose last `SHORT_MIN` rests were short, with
//! little to do after each, polls its sockets for up to `POLL_TIME_MAX` before it sleeps, and lets
//! whoever wants the core go first at every turn. One poll that nothing comes of ends that, until as many
//! short rests have been seen again: so what comes now and then costs nothing more. It is what KVM does
//! for guests that halt (`halt_poll_ns`), inside one.
//!
//! With much to do at once a rest is none: what is there to wait for comes while the thread works.
//! There polling would only spend time that another process of this machine could use.

use std::cell::Cell;
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::thread::{available_parallelism, yield_now};
use std::time::Duration;

use rustix::thread::sched_getaffinity;
use tokio::runtime::Builder;
use tokio::time::Instant;

/// From the beginning of one rest to that of the next.
const SHORT_MAX: Duration = Duration::from_micros(200);
/// So many short rests in a row begin to pay.
const SHORT_MIN: u32 = 8;
/// More arrivals than this between two rests are much to do. A long one counts as several.
const FEW: usize = 2;
const LONG: usize = 4 * 1024;
/// How long is polled at most before a thread sleeps.
const POLL_TIME_MAX: Duration = Duration::from_micros(100);

thread_local! {
    /// What came to this thread since it last began to rest.
    static ARRIVED: Cell<usize> = const { Cell::new(0) };
    static RESTS: Cell<Option<Rests>> = const { Cell::new(None) };
    /// Wakes the task that runs `be_nudged`.
    static NUDGED: Cell<Option<Waker>> = const { Cell::new(None) };
}

/// Notes that a socket of this thread brought `len` bytes.
pub fn note_arrival(len: usize) {
    ARRIVED.set(ARRIVED.get() + 1 + len / LONG);
}

/// The rests of a thread.
#[derive(Clone, Copy, Debug)]
struct Rests {
    began_at: Instant,
    short_in_row: u32,
}

impl Rests {
    fn new(now: Instant) -> Self {
        Self { began_at: now, short_in_row: 0 }
    }

    /// Nothing is left to do, after `arrived` since this was last asked. Whether to look again before
    /// sleeping.
    fn look_again(&mut self, now: Instant, arrived: usize) -> bool {
        if arrived > 0 {
            let is_short = now - self.began_at <= SHORT_MAX && arrived <= FEW;
            self.short_in_row = if is_short { self.short_in_row + 1 } else { 0 };
            self.began_at = now;
        }
        if self.short_in_row < SHORT_MIN {
            return false;
        }
        let is_in_time = now - self.began_at < POLL_TIME_MAX;
        if !is_in_time {
            self.short_in_row = 0;
        }
        is_in_time
    }
}

/// The runtime that `builder` makes looks again before it sleeps, once `be_nudged` runs in it. Not where
/// this process has a quota of the cores: what were spent on nothing would be missing later.
pub(super) fn attach(builder: &mut Builder) {
    let is_capped = match (available_parallelism(), sched_getaffinity(None)) {
        (Ok(usable), Ok(cores)) => usable.get() < cores.count() as usize,
        _ => false,
    };
    if !is_capped {
        builder.on_thread_park(before_sleep);
    }
}

/// The task that is woken so that its thread does not sleep. Does nothing, for ever.
pub(super) async fn be_nudged() {
    poll_fn(|cx| {
        NUDGED.set(Some(cx.waker().clone()));
        Poll::Pending
    })
    .await
}

fn before_sleep() {
    let (now, arrived) = (Instant::now(), ARRIVED.take());
    let mut rests = RESTS.get().unwrap_or(Rests::new(now));
    let is_to_look = rests.look_again(now, arrived);
    RESTS.set(Some(rests));
    if is_to_look && let Some(waker) = NUDGED.take() {
        yield_now();
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a thread looks again at the end of a rest of `rest` that ended with `arrived`.
    fn look(rests: &mut Rests, now: &mut Instant, rest: Duration, arrived: usize) -> bool {
        *now += rest;
        rests.look_again(*now, arrived)
    }

    #[test]
    fn only_a_thread_with_one_thing_to_do_after_every_short_rest_looks_again_before_it_sleeps() {
        let (short, long) = (Duration::from_micros(60), Duration::from_millis(5));
        let mut now = Instant::now();
        let mut rests = Rests::new(now);
        for _ in 1..SHORT_MIN {
            assert!(!look(&mut rests, &mut now, short, 1));
        }
        assert!(look(&mut rests, &mut now, short, 1));
        // While it polls nothing comes: it sleeps, and must see as many short rests again.
        assert!(look(&mut rests, &mut now, short, 0));
        assert!(!look(&mut rests, &mut now, short, 0), "{POLL_TIME_MAX:?} are over");
        for _ in 1..SHORT_MIN {
            assert!(!look(&mut rests, &mut now, short, 1));
        }
        assert!(look(&mut rests, &mut now, short, 1));
        assert!(!look(&mut rests, &mut now, short, FEW + 1), "much came at once");
        // A call now and then: its two rests are short and long in turn.
        for _ in 0..10 * SHORT_MIN {
            assert!(!look(&mut rests, &mut now, short, 1));
            assert!(!look(&mut rests, &mut now, long, 1));
        }
    }
}
