//! The only spawner. A group owns its tasks: dropping it stops them, and a panic in one is logged
//! and begins the agent's shutdown instead of leaving half of it running.

#![allow(clippy::disallowed_methods)] // this is the one place that may

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::thread;

use futures_util::FutureExt;
use futures_util::future::CatchUnwind;
use pin_project_lite::pin_project;
use tokio::sync::oneshot;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;
use tracing::{Instrument, error, error_span};

use super::{Shutdown, Stage, machine, polling};

/// Tasks with one owner. Dropping the last clone of the group cancels them.
#[derive(Clone, Debug)]
pub struct TaskGroup {
    tracker: TaskTracker,
    owner: std::sync::Arc<Owner>,
    shutdown: Shutdown,
}

#[derive(Debug)]
struct Owner(CancellationToken);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl TaskGroup {
    /// An empty group; a panic in one of its tasks advances `shutdown`.
    pub fn new(shutdown: Shutdown) -> Self {
        let owner = std::sync::Arc::new(Owner(CancellationToken::new()));
        Self { tracker: TaskTracker::new(), owner, shutdown }
    }

    /// Runs `future` on the current runtime until it ends or the group is stopped.
    ///
    /// For a task that lives as long as its owner. A panic in it stops the agent in order.
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let (cancel, shutdown) = (self.owner.0.clone(), self.shutdown.clone());
        self.tracker.spawn(
            async move {
                let guarded = AssertUnwindSafe(future).catch_unwind();
                if let Some(Err(_)) = cancel.run_until_cancelled(guarded).await {
                    error!(task = name, "task panicked, the agent stops");
                    shutdown.advance(Stage::Draining);
                }
            }
            .instrument(error_span!("task", name)),
        );
    }

    /// Runs `future`, which serves one connection, until it ends or the group is stopped.
    ///
    /// A panic in it costs that connection and is logged; the agent goes on. No span: a
    /// connection's task is on the hot path.
    pub fn spawn_connection(
        &self,
        name: &'static str,
        future: impl Future<Output = ()> + Send + 'static,
    ) {
        let connection = Connection {
            name,
            token: self.owner.0.clone(),
            cancelled: self.owner.0.clone().cancelled_owned(),
            is_waiting: false,
            future: AssertUnwindSafe(future).catch_unwind(),
        };
        self.tracker.spawn(connection);
    }

    /// How many tasks have not ended.
    pub fn len(&self) -> usize {
        self.tracker.len()
    }

    /// Whether every task has ended.
    pub fn is_empty(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Returns when every task has ended by itself. No task may be spawned meanwhile.
    pub async fn finished(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Cancels every task, and every one that is spawned later.
    pub fn cancel(&self) {
        self.owner.0.cancel();
    }

    /// Cancels every task and returns when all are gone.
    pub async fn stop(&self) {
        self.cancel();
        self.finished().await;
    }
}

pin_project! {
    /// A connection's task. Written out, because each layer of `async` would hold the future once more:
    /// thousands of connections rest in tasks like this.
    struct Connection<F> {
        name: &'static str,
        token: CancellationToken,
        #[pin]
        cancelled: WaitForCancellationFutureOwned,
        is_waiting: bool,
        #[pin]
        future: CatchUnwind<AssertUnwindSafe<F>>,
    }
}

impl<F: Future<Output = ()>> Future for Connection<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        // Once is enough to be woken: tokio gives a task one waker for its life.
        if (!*this.is_waiting || this.token.is_cancelled()) && this.cancelled.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        *this.is_waiting = true;
        if ready!(this.future.poll(cx)).is_err() {
            error!(task = this.name, "connection task panicked, its connection is lost");
        }
        Poll::Ready(())
    }
}

/// Runs `work`, which waits for a disk, beside the tasks of this runtime. `None` when it panicked.
///
/// A simulated machine has one thread, and its disk takes no time.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match machine::simulated() {
        Some(_) => Some(work()),
        None => tokio::task::spawn_blocking(work).await.ok(),
    }
}

/// Starting or ending a thread failed.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    /// The system gave no thread or no runtime.
    #[error("cannot start thread {name}: {error}")]
    Start {
        /// Which.
        name: &'static str,
        /// Why.
        error: std::io::Error,
    },
    /// What it owned is gone.
    #[error("thread {0} panicked")]
    Panicked(&'static str),
}

/// Sockets that a thread turns to before what it did for them is sent: quinn writes its datagrams once
/// all woken tasks have run, and meanwhile the peer, on another core, would have nothing to do. With
/// fewer, datagrams are shorter and cost more: 16 took 3 to 6 % more CPU for each request of 64 clients
/// than tokio's 1,024, 32 took as much and carried a tenth more requests of HTTP.
const IO_EVENTS_MAX: usize = 32;

/// A named thread with a single-threaded tokio runtime of its own, running one main future.
#[derive(Debug)]
pub struct Thread {
    name: &'static str,
    ended: oneshot::Receiver<bool>,
}

impl Thread {
    /// Starts the thread and runs the future that `main` makes on its runtime to the end.
    pub fn start<F, Fut>(
        name: &'static str,
        shutdown: Shutdown,
        main: F,
    ) -> Result<Self, ThreadError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        if machine::simulated().is_some() {
            return Ok(Self::start_here(name, shutdown, main));
        }
        let failed = |error| ThreadError::Start { name, error };
        let mut builder = tokio::runtime::Builder::new_current_thread();
        polling::attach(&mut builder);
        let runtime =
            builder.enable_all().max_io_events_per_tick(IO_EVENTS_MAX).build().map_err(failed)?;
        runtime.spawn(polling::be_nudged()); // ends with its runtime
        let (done, ended) = oneshot::channel();
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let run = AssertUnwindSafe(|| runtime.block_on(main()));
                let is_clean = std::panic::catch_unwind(run).is_ok();
                if !is_clean {
                    error!(thread = name, "thread panicked, the agent stops");
                    shutdown.advance(Stage::Draining);
                }
                drop(runtime); // what its tasks hold, sockets too, is gone when the thread is joined
                let _ = done.send(is_clean);
            })
            .map_err(failed)?;
        Ok(Self { name, ended })
    }

    /// On a simulated machine every thread of an agent is a task of its one runtime.
    fn start_here<F, Fut>(name: &'static str, shutdown: Shutdown, main: F) -> Self
    where
        F: FnOnce() -> Fut + 'static,
        Fut: Future<Output = ()> + 'static,
    {
        let (done, ended) = oneshot::channel();
        tokio::task::spawn_local(async move {
            let is_clean = AssertUnwindSafe(main()).catch_unwind().await.is_ok();
            if !is_clean {
                error!(thread = name, "thread panicked, the agent stops");
                shutdown.advance(Stage::Draining);
            }
            let _ = done.send(is_clean);
        });
        Self { name, ended }
    }

    /// Returns when the thread's main future has ended.
    pub async fn join(self) -> Result<(), ThreadError> {
        match self.ended.await {
            Ok(true) => Ok(()),
            _ => Err(ThreadError::Panicked(self.name)),
        }
    }
}

/// Starts a named thread for work that may block for ever, such as a write to a pipe that nobody
/// reads. Nobody awaits it: it ends when `work` returns or with the process.
pub fn start_blocking_thread(
    name: &'static str,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), ThreadError> {
    let started = thread::Builder::new().name(name.to_owned()).spawn(work);
    started.map(drop).map_err(|error| ThreadError::Start { name, error })
}
