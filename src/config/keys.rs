//! The table of all keys, those of later versions included: so that a key is either read, or refused
//! as unknown with a suggestion, or refused as not available yet, and never taken and ignored.

use crate::model::nearest;

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
}
