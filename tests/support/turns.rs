//! Turns on the machine: who measures time has it alone, and all are served in the order they came.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

static MACHINE: Machine = Machine { line: Mutex::new(Line::new()), moved: Condvar::new() };

struct Machine {
    line: Mutex<Line>,
    moved: Condvar,
}

/// Tickets, as in a shop: a standard lock may let a late reader pass a writer that waits.
struct Line {
    next_ticket: u64,
    /// Whose turn comes next.
    called: u64,
    /// How many have the machine now.
    present: usize,
}

/// A turn on the machine, until it is dropped.
pub struct Turn(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Shared,
    Alone,
}

/// A turn on the machine beside other light tests.
pub fn beside_others() -> Turn {
    MACHINE.enter(Kind::Shared)
}

/// The machine for this test alone: it measures time, or works the machine hard.
pub fn alone() -> Turn {
    MACHINE.enter(Kind::Alone)
}

impl Line {
    const fn new() -> Self {
        Self { next_ticket: 0, called: 0, present: 0 }
    }
}

impl Machine {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, kind: Kind) -> Turn {
        let mut line = self.line();
        let ticket = line.next_ticket;
        line.next_ticket += 1;
        while line.called != ticket || (kind == Kind::Alone && line.present > 0) {
            line = self.moved.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        line.present += 1;
        if kind == Kind::Shared {
            line.called += 1;
            self.moved.notify_all();
        }
        Turn(kind)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut line = MACHINE.line();
        line.present -= 1;
        if self.0 == Kind::Alone {
            line.called += 1; // nobody was called while it was alone
        }
        MACHINE.moved.notify_all();
    }
}
