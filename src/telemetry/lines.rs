//! Lines on their way to somebody who may read slowly, or not at all.
//!
//! A write to a pipe that nobody empties blocks for ever, and a thread that carries bytes or gossip
//! must not: it leaves its line in a buffer, and a thread of its own does the writing.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tracing::warn;

use super::Counter;
use crate::runtime::{ThreadError, start_blocking_thread};

/// Bytes that wait to be written; as many more may be in the write under way. About 4,000 log lines:
/// a reader may stand still for a moment in a busy hour without a gap.
const WAITING_LEN_MAX: usize = 1024 * 1024;

/// A bounded queue of lines. Pushing never blocks: a line that finds it full is dropped and counted,
/// and the log tells how many were dropped once it is written again. Cheap to clone.
#[derive(Clone, Debug)]
pub struct LineQueue {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    dropped: Counter,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Dropped and not told yet.
    untold: u64,
    is_writing: bool,
}

impl LineQueue {
    /// Starts the thread that writes to `out`, which is called `name`.
    pub fn start(
        name: &'static str,
        out: impl Write + Send + 'static,
    ) -> Result<Self, ThreadError> {
        let queue = Self { shared: Arc::default() };
        let shared = Arc::clone(&queue.shared);
        start_blocking_thread(name, move || shared.write_all(name, out))?;
        Ok(queue)
    }

    /// Leaves `lines`, one or more whole ones, to be written.
    pub fn push(&self, lines: &[u8]) {
        let mut waiting = self.shared.waiting.lock();
        if waiting.lines.len() + lines.len() > WAITING_LEN_MAX {
            waiting.untold += count(lines);
            self.shared.dropped.inc_by(count(lines));
            return;
        }
        waiting.lines.extend_from_slice(lines);
        drop(waiting);
        self.shared.changed.notify_all();
    }

    /// Lines that were dropped.
    pub fn dropped(&self) -> &Counter {
        &self.shared.dropped
    }

    /// Waits, for at most `time`, until everything is written. False when something still waits.
    /// Blocks the thread.
    pub fn flush(&self, time: Duration) -> bool {
        let mut waiting = self.shared.waiting.lock();
        let is_busy = |waiting: &mut Waiting| waiting.is_writing || !waiting.lines.is_empty();
        self.shared.changed.wait_while_for(&mut waiting, is_busy, time);
        !is_busy(&mut waiting)
    }
}

impl Shared {
    fn write_all(&self, name: &'static str, mut out: impl Write) {
        loop {
            let (lines, untold) = self.take();
            if untold > 0 {
                // Into the buffer just emptied: behind the lines before the gap, before all others.
                warn!(to = name, dropped = untold, "lines were dropped: their reader is too slow");
            }
            if out.write_all(&lines).and_then(|()| out.flush()).is_err() {
                self.dropped.inc_by(count(&lines)); // the reader is gone
            }
        }
    }

    /// All that waits, as soon as something does.
    fn take(&self) -> (Vec<u8>, u64) {
        let mut waiting = self.waiting.lock();
        waiting.is_writing = false;
        self.changed.notify_all();
        self.changed.wait_while(&mut waiting, |waiting| waiting.lines.is_empty());
        waiting.is_writing = true;
        (std::mem::take(&mut waiting.lines), std::mem::take(&mut waiting.untold))
    }
}

/// One write is one event: what is written in pieces would be cut in the middle by a full buffer.
impl Write for LineQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn count(lines: &[u8]) -> u64 {
    lines.iter().filter(|byte| **byte == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Shows each batch when its write begins, and ends the write when it is allowed to.
    struct Gate {
        begun: mpsc::Sender<Vec<u8>>,
        open: mpsc::Receiver<()>,
    }

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.begun.send(bytes.to_vec());
            self.open.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn gated() -> (LineQueue, mpsc::Sender<()>, mpsc::Receiver<Vec<u8>>) {
        let (open, gate) = mpsc::channel();
        let (begun, seen) = mpsc::channel();
        (LineQueue::start("test", Gate { begun, open: gate }).unwrap(), open, seen)
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn what_a_reader_does_not_take_is_dropped_at_the_bound_and_counted() {
        let (queue, open, seen) = gated();
        queue.push(b"first\n");
        assert_eq!(seen.recv_timeout(SOON).unwrap(), b"first\n");
        let line = [b"x".repeat(1_023), b"\n".to_vec()].concat();
        for _ in 0..1_024 + 500 {
            queue.push(&line);
        }
        assert_eq!(queue.dropped().get(), 500, "beside 1 MiB");
        assert!(!queue.flush(Duration::from_millis(1)), "a flush gives up in time");
        open.send(()).unwrap();
        assert_eq!(seen.recv_timeout(SOON).unwrap().len(), WAITING_LEN_MAX);
        open.send(()).unwrap();
        assert!(queue.flush(SOON));
        queue.push(b"after\n");
        assert_eq!(seen.recv_timeout(SOON).unwrap(), b"after\n", "and it goes on");
        assert_eq!(queue.dropped().get(), 500);
    }

    #[test]
    fn lines_for_a_reader_that_is_gone_are_counted() {
        let (queue, open, _seen) = gated();
        drop(open);
        queue.push(b"one\ntwo\n");
        assert!(queue.flush(SOON));
        assert_eq!(queue.dropped().get(), 2);
    }
}
