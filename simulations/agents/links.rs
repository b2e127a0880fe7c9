//! Which ways between machines are cut.

use std::collections::BTreeSet;

/// Ways from one machine to another that carry nothing.
#[derive(Default)]
pub(super) struct Links {
    cut: BTreeSet<(usize, usize)>,
}

impl Links {
    pub(super) fn set(&mut self, from: usize, to: usize, is_cut: bool) {
        match is_cut {
            true => self.cut.insert((from, to)),
            false => self.cut.remove(&(from, to)),
        };
    }

    pub(super) fn cut(&self) -> impl Iterator<Item = (usize, usize)> {
        self.cut.iter().copied()
    }

    /// Whether two machines hear each other.
    pub(super) fn join(&self, a: usize, b: usize) -> bool {
        !self.cut.contains(&(a, b)) && !self.cut.contains(&(b, a))
    }
}
