//! Services and their instances.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::MemberName;

/// Longest name of a member, service or instance, in bytes (a DNS label).
const NAME_LEN_MAX: usize = 63;

/// A name that breaks the rules. Fault: whoever wrote it; nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is no text.
    #[error("a name must not be empty")]
    Empty,
    /// It does not fit a DNS label.
    #[error("name '{text}…' is {len} bytes long, at most {NAME_LEN_MAX} are allowed")]
    TooLong {
        /// As written, cut where it is long.
        text: String,
        /// In bytes.
        len: usize,
    },
    /// It has a character that no name has.
    #[error("name '{text}' has '{found}', only a-z, 0-9 and '-' inside are allowed")]
    Character {
        /// As written, cut where it is long.
        text: String,
        /// The first that is wrong.
        found: char,
    },
    /// It means something else.
    #[error("name '{text}' is reserved")]
    Reserved {
        /// As written, cut where it is long.
        text: String,
    },
    /// It is no identifier of this many digits.
    #[error("'{text}' is not {digits} hexadecimal digits")]
    Hexadecimal {
        /// As written, cut where it is long.
        text: String,
        /// How many it should have.
        digits: usize,
    },
    /// It is no protocol.
    #[error(
        "protocol '{text}' is unknown, expected tcp, http, h2 or grpc; tcp for an instance that \
         speaks TLS itself"
    )]
    Protocol {
        /// As written, cut where it is long.
        text: String,
    },
}

pub(super) fn check_name(text: &str) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty);
    }
    if text.len() > NAME_LEN_MAX {
        return Err(NameError::TooLong { text: text.chars().take(20).collect(), len: text.len() });
    }
    let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let found = text.chars().find(|c| !is_allowed(*c));
    let edge = || (text.starts_with('-') || text.ends_with('-')).then_some('-');
    match found.or_else(edge) {
        Some(found) => Err(NameError::Character { text: text.to_owned(), found }),
        None => Ok(()),
    }
}

/// What callers ask for: 1 to 63 of `a-z 0-9 -`, no dash at either end, not `node` or `zone`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    /// Checks the rules above.
    pub fn try_new(text: &str) -> Result<Self, NameError> {
        check_name(text)?;
        if matches!(text, "node" | "zone") {
            return Err(NameError::Reserved { text: text.to_owned() });
        }
        Ok(Self(text.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// One process serving a service, unique on its member: same rules as a member's name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(Arc<str>);

impl InstanceId {
    /// Checks the rules above.
    pub fn try_new(text: &str) -> Result<Self, NameError> {
        check_name(text).map(|()| Self(text.into()))
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

macro_rules! text_newtype {
    ($($type:ident),+) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($type), "({})"), self.as_str())
            }
        }

        impl FromStr for $type {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::try_new(text)
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                Self::try_new(&text)
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.as_str().to_owned()
            }
        }
    )+};
}

text_newtype!(MemberName, ServiceName, InstanceId);

/// What a service speaks. Declared by whoever exposes it, never sniffed.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Bytes both ways, with half-close.
    #[default]
    Tcp,
    /// HTTP/1.1.
    Http,
    /// HTTP/2 with prior knowledge.
    H2,
    /// gRPC over HTTP/2.
    Grpc,
    /// Datagrams.
    Udp,
}

impl Protocol {
    /// The word used in configuration, tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Http => "http",
            Self::H2 => "h2",
            Self::Grpc => "grpc",
            Self::Udp => "udp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Protocol {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        [Self::Tcp, Self::Http, Self::H2, Self::Grpc, Self::Udp]
            .into_iter()
            .find(|protocol| protocol.as_str() == text)
            .ok_or_else(|| NameError::Protocol { text: text.chars().take(40).collect() })
    }
}

/// Share of a service's traffic relative to its siblings; 100 unless set, 0 takes none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Weight(pub u16);

impl Default for Weight {
    fn default() -> Self {
        Self(100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels_and_say_what_is_wrong_with_others() {
        for good in ["web", "a", "0", "my-service-1", &"x".repeat(63)] {
            assert!(ServiceName::try_new(good).is_ok(), "{good}");
        }
        for bad in
            ["", "Web", "a_b", "-a", "a-", "a.b", "ä", "a\nb", "node", "zone", &"x".repeat(64)]
        {
            assert!(ServiceName::try_new(bad).is_err(), "{bad}");
        }
        assert_eq!(
            ServiceName::try_new("my_db").unwrap_err().to_string(),
            "name 'my_db' has '_', only a-z, 0-9 and '-' inside are allowed"
        );
    }
}
