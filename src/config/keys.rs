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
        keys: &["mesh", "api", "gateway", "socks", "advertise"],
        later: &["dns", "metrics"],
    },
    Section {
        name: "gateway",
        is_list: false,
        keys: &["public", "redirect", "certificates"],
        later: &[],
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
        keys: &[
            "name",
            "id",
            "to",
            "port",
            "protocol",
            "tags",
            "weight",
            "idempotent",
            "inflight",
            "proxy_protocol",
            "health",
        ],
        later: &["meta", "allow", "drain"],
    },
    Section {
        name: "upstream",
        is_list: true,
        keys: &[
            "service", "listen", "public", "hosts", "timeout", "retry", "balance", "prefer",
            "hash", "breaker",
        ],
        later: &["as"],
    },
    Section {
        name: "telemetry",
        is_list: false,
        keys: &["log", "log_format", "access_log"],
        later: &["otlp"],
    },
];

/// Sections of later versions; the last five belong into a policy file.
pub(super) const SECTIONS_LATER: &[&str] = &["allow", "route", "limit", "fault", "defaults"];

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

/// Letters to change, add, drop or swap with their neighbour to make one word the other (optimal
/// string alignment), by rows.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // The row of two letters ago, of the last letter, of this one.
    let mut rows = [Vec::new(), (0..=b.len()).collect::<Vec<usize>>(), vec![0; b.len() + 1]];
    for (i, left) in a.iter().enumerate() {
        let [earlier, last, row] = &mut rows;
        row[0] = i + 1;
        for (j, right) in b.iter().enumerate() {
            let changed = last[j] + usize::from(left != right);
            row[j + 1] = changed.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *left == b[j - 1] && a[i - 1] == *right {
                row[j + 1] = row[j + 1].min(earlier[j - 1] + 1);
            }
        }
        rows.rotate_left(1);
        rows[2].resize(b.len() + 1, 0);
    }
    rows[1][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn typing_errors_find_their_key_and_other_words_find_none() {
        let listen = section("listen").unwrap_or_else(|_| panic!("listen is read"));
        assert_eq!(listen.standing("mesh"), Standing::Read);
        assert_eq!(listen.standing("dns"), Standing::Later);
        assert_eq!(
            listen.standing("mehs"),
            Standing::Unknown(Some("mesh")),
            "one slip of two keys"
        );
        assert_eq!(listen.standing("mash-x"), Standing::Unknown(None));
        assert_eq!(listen.standing("mes"), Standing::Unknown(Some("mesh")));
        assert_eq!(listen.standing("advertize"), Standing::Unknown(Some("advertise")));
        assert_eq!(listen.standing("colour"), Standing::Unknown(None));
        assert!(matches!(section("route"), Err(Standing::Later)));
        assert!(matches!(section("exposes"), Err(Standing::Unknown(Some("expose")))));
    }

    #[test]
    fn distance_counts_changes_additions_losses_and_swaps() {
        for (a, b, expected) in [
            ("", "", 0),
            ("a", "", 1),
            ("", "ab", 2),
            ("kitten", "sitting", 3),
            ("nmae", "name", 1),
            ("abcd", "badc", 2),
            ("abc", "cab", 2),
        ] {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }
}
