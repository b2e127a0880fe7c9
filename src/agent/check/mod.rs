//! Knowing what is wrong: checks of the machine, which need no agent, and of the mesh as a running
//! agent sees it. Each names what was seen and the command or file that puts it right.

mod machine;
mod mesh;

use std::fmt::Display;
use std::time::Duration;

pub use machine::{Runs, machine, not_answering, not_running};
pub(super) use mesh::{Inspector, warn_while_unheard};

/// As many things as one message names.
const NAMED_MAX: usize = 6;

/// Names for people: the first few, and how many more there are.
fn listed<T: Display>(names: &[T]) -> String {
    let shown: Vec<_> = names.iter().take(NAMED_MAX).map(T::to_string).collect();
    match names.len().saturating_sub(NAMED_MAX) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// A time in its two largest units.
fn span(secs: u64) -> String {
    let text = humantime::format_duration(Duration::from_secs(secs)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_and_times_are_short() {
        assert_eq!(listed(&["a", "b"]), "a, b");
        let many: Vec<_> = (0..9).collect();
        assert_eq!(listed(&many), "0, 1, 2, 3, 4, 5 and 3 more");
        assert_eq!(span(93_784), "1day 2h");
    }
}
