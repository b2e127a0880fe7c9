//! The table of all keys, those of later versions included: so that a key is either read, or refused
//! as unknown with a suggestion, or refused as not available yet, and never taken and ignored.

/// One section: its name, the keys that are read, the keys of later versions.
pub(super) struct Section {
    pub(super) name: &'static str,
    pub(super) is_list: bool,
    pub(super) keys: &'static [&'static str],
    pub(super) later: &'static [&'static str],
}

/// The sections that are read.
pub(super) const SECTIONS: &[Section] = &[
    Section {
        name: "node",
        is_list: false,
        keys: &["name", "zone", "data_dir", "domain"],
        later: &["vip"],
    },
    Section {
        name: "listen",
        is_list: false,
        keys: &["mesh", "api", "socks", "advertise"],
        later: &["dns", "gateway", "metrics"],
    },
    Section {
        name: "join",
        is_list: false,
        keys: &["seeds", "profile", "forget_after"],
        later: &[],
    },
    Section {
        name: "expose",
        is_list: true,
        keys: &["name", "id", "to", "port", "protocol", "tags", "weight"],
        later: &["meta", "allow", "proxy_protocol", "inflight", "idempotent", "drain", "health"],
    },
    Section {
        name: "upstream",
        is_list: true,
        keys: &["service", "listen"],
        later: &["as", "prefer", "public", "timeout", "retry", "breaker", "balance"],
    },
    Section {
        name: "telemetry",
        is_list: false,
        keys: &["log", "log_format"],
        later: &["otlp", "access_log"],
    },
];

/// Sections of later versions; the last five belong into a policy file.
pub(super) const SECTIONS_LATER: &[&str] =
    &["gateway", "allow", "route", "limit", "fault", "defaults"];

/// What becomes of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Read,
    Later,
    Unknown(Option<&'static str>),
}

/// What becomes of a section.
pub(super) fn section(name: &str) -> Result<&'static Section, Standing> {
    if let Some(section) = SECTIONS.iter().find(|section| section.name == name) {
        return Ok(section);
    }
    if SECTIONS_LATER.contains(&name) {
        return Err(Standing::Later);
    }
    Err(Standing::Unknown(nearest(name, SECTIONS.iter().map(|section| section.name))))
}

impl Section {
    /// What becomes of `key` in this section.
    pub(super) fn standing(&self, key: &str) -> Standing {
        if self.keys.contains(&key) {
            Standing::Read
        } else if self.later.contains(&key) {
            Standing::Later
        } else {
            Standing::Unknown(nearest(key, self.keys.iter().copied()))
        }
    }
}

/// The candidate most like `word`, if it is like it at all: at most a third of its letters differ.
pub(super) fn nearest(
    word: &str,
    candidates: impl Iterator<Item = &'static str>,
) -> Option<&'static str> {
    let near = candidates.map(|candidate| (distance(word, candidate), candidate));
    let (differences, candidate) = near.min()?;
    (differences <= candidate.len().max(3) / 3).then_some(candidate)
}

/// Letters to change, add or drop to make one word the other (Levenshtein 1966), by rows.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut before = i + 1;
        if let Some(first) = row.first_mut() {
            *first = before;
        }
        for (cell, right) in row.iter_mut().skip(1).zip(b.chars()) {
            let changed = diagonal + usize::from(left != right);
            diagonal = *cell;
            before = changed.min(diagonal + 1).min(before + 1);
            *cell = before;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_find_their_key_and_other_words_find_none() {
        let listen = section("listen").unwrap_or_else(|_| panic!("listen is read"));
        assert_eq!(listen.standing("mesh"), Standing::Read);
        assert_eq!(listen.standing("dns"), Standing::Later);
        assert_eq!(listen.standing("mehs"), Standing::Unknown(None), "two of four letters differ");
        assert_eq!(listen.standing("mes"), Standing::Unknown(Some("mesh")));
        assert_eq!(listen.standing("advertize"), Standing::Unknown(Some("advertise")));
        assert_eq!(listen.standing("colour"), Standing::Unknown(None));
        assert!(matches!(section("gateway"), Err(Standing::Later)));
        assert!(matches!(section("exposes"), Err(Standing::Unknown(Some("expose")))));
    }

    #[test]
    fn distance_counts_changes_additions_and_losses() {
        for (a, b, expected) in [("", "", 0), ("a", "", 1), ("", "ab", 2), ("kitten", "sitting", 3)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
