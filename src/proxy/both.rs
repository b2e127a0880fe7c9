//! Two futures in one task, of which only the one that was woken is polled.
//!
//! The halves of a carried connection wake each other's task with every message. Polling both each
//! time asks the tunnel for bytes, under the lock of its connection, once more than there are any.

use std::pin::Pin;
use std::task::{Context, Poll};

use super::wakes::Wakes;

/// Runs both to their ends, or to the first error.
pub(super) async fn try_both<A, B, E>(
    a: Pin<&mut impl Future<Output = Result<A, E>>>,
    b: Pin<&mut impl Future<Output = Result<B, E>>>,
) -> Result<(A, B), E> {
    let (mut a, mut b) = (Half::new(a), Half::new(b));
    std::future::poll_fn(|cx| {
        a.poll(cx)?;
        b.poll(cx)?;
        match (a.output.take(), b.output.take()) {
            (Some(of_a), Some(of_b)) => Poll::Ready(Ok((of_a, of_b))),
            (of_a, of_b) => {
                (a.output, b.output) = (of_a, of_b);
                Poll::Pending
            }
        }
    })
    .await
}

struct Half<'a, F, T> {
    future: Pin<&'a mut F>,
    output: Option<T>,
    wakes: Wakes,
}

impl<'a, F: Future<Output = Result<T, E>>, T, E> Half<'a, F, T> {
    fn new(future: Pin<&'a mut F>) -> Self {
        Self { future, output: None, wakes: Wakes::new() }
    }

    /// Keeps the output once it is there.
    fn poll(&mut self, cx: &Context<'_>) -> Result<(), E> {
        // First, so that a wake from now on reaches this task.
        self.wakes.concern(cx.waker());
        if self.output.is_none()
            && self.wakes.was_woken()
            && let Poll::Ready(output) = self.future.as_mut().poll(&mut self.wakes.context())
        {
            self.output = Some(output?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::pin::pin;

    use futures_util::FutureExt;
    use tokio::sync::oneshot;

    use super::*;

    /// What `hear` brings, and how often it was asked.
    fn counted<'a>(
        mut hear: oneshot::Receiver<u8>,
        polls: &'a Cell<u32>,
    ) -> impl Future<Output = Result<u8, oneshot::error::RecvError>> + 'a {
        poll_fn(move |cx| {
            polls.set(polls.get() + 1);
            hear.poll_unpin(cx)
        })
    }

    #[test]
    fn only_the_half_that_was_woken_is_polled_and_both_run_to_their_ends() {
        let (tell_a, hear_a) = oneshot::channel();
        let (tell_b, hear_b) = oneshot::channel();
        let (polls_a, polls_b) = (Cell::new(0), Cell::new(0));
        let mut both = pin!(async {
            let (a, b) = (pin!(counted(hear_a, &polls_a)), pin!(counted(hear_b, &polls_b)));
            try_both(a, b).await
        });
        let mut poll = || both.as_mut().now_or_never();
        assert_eq!((poll(), polls_a.get(), polls_b.get()), (None, 1, 1));
        assert_eq!((poll(), polls_a.get(), polls_b.get()), (None, 1, 1), "nobody was woken");
        tell_b.send(2).unwrap();
        assert_eq!((poll(), polls_a.get(), polls_b.get()), (None, 1, 2));
        tell_a.send(1).unwrap();
        assert_eq!((poll(), polls_a.get(), polls_b.get()), (Some(Ok((1, 2))), 2, 2));
    }

    #[test]
    fn the_first_error_ends_both() {
        let (tell_a, hear_a) = oneshot::channel();
        let (_tell_b, hear_b) = oneshot::channel();
        let (polls_a, polls_b) = (Cell::new(0), Cell::new(0));
        let a = pin!(counted(hear_a, &polls_a));
        let b = pin!(counted(hear_b, &polls_b));
        drop(tell_a);
        assert!(try_both(a, b).now_or_never().is_some_and(|outcome| outcome.is_err()));
    }
}
