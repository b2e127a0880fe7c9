//! Turns on the machine: who measures time has it alone or nearly so, and others share it, a few at a time.
//!
//! Tests of a kind are served one after the other, and the kinds in turn: while one kind has the machine the
//! others wait, until nobody of it is left. With more threads of tests than turns that many wait,
//! and each change of kind, for which the machine must come to rest, serves several.

use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;

static MACHINE: Machine = Machine { line: Mutex::new(Line::new()), moved: Condvar::new() };

static CORES: LazyLock<usize> = LazyLock::new(|| available_parallelism().map_or(1, |n| n.get()));

struct Machine {
    line: Mutex<Line>,
    moved: Condvar,
}

struct Line {
    /// Whose time it is.
    kind: Kind,
    /// How many of that kind have the machine now.
    present: usize,
    /// How many wait, by kind.
    waiting: [usize; 3],
}

/// A turn on the machine, until it is dropped.
pub struct Turn(());

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Shared,
    Calm,
    Alone,
}

/// A turn on the machine beside other light tests.
pub fn beside_others() -> Turn {
    MACHINE.enter(Kind::Shared)
}

/// A turn on the machine beside other tests that wait for seconds, for what needs little of it.
pub fn calmly() -> Turn {
    MACHINE.enter(Kind::Calm)
}

/// The machine for this test alone: it measures time, or works the machine hard.
pub fn alone() -> Turn {
    MACHINE.enter(Kind::Alone)
}

impl Line {
    const fn new() -> Self {
        Self { kind: Kind::Shared, present: 0, waiting: [0; 3] }
    }

    /// Whether one more of this kind may have the machine now.
    fn admits(&self, kind: Kind) -> bool {
        let has_passed = self.present == 0 && self.waiting[self.kind as usize] == 0;
        let room = match kind {
            Kind::Shared => 3 * *CORES, // most tests wait for agents: three of them a core keep it busy
            Kind::Calm => *CORES,
            Kind::Alone => 1,
        };
        (kind == self.kind || has_passed) && self.present < room
    }
}

impl Machine {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, kind: Kind) -> Turn {
        let mut line = self.line();
        line.waiting[kind as usize] += 1;
        while !line.admits(kind) {
            line = self.moved.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        line.waiting[kind as usize] -= 1;
        line.kind = kind;
        line.present += 1;
        Turn(())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        MACHINE.line().present -= 1;
        MACHINE.moved.notify_all();
    }
}
