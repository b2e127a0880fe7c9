//! Members: the agents of a mesh.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::key::{hex, parse_hex};
use super::service::{NameError, check_name};

/// Which member: the first 16 bytes of the SHA-256 of its node key. Fixed at enrolment; renewing a
/// certificate keeps the key and so the id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemberId([u8; 16]);

impl MemberId {
    /// From its 16 bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemberId({})", hex(&self.0[..4]))
    }
}

impl FromStr for MemberId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        parse_hex(text).map(Self).ok_or_else(|| NameError::Hexadecimal {
            text: text.chars().take(80).collect(),
            digits: 32,
        })
    }
}

/// What people call a member: 1 to 63 of `a-z 0-9 -`, no dash at either end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MemberName(Arc<str>);

impl MemberName {
    /// Checks the rules above.
    pub fn try_new(text: &str) -> Result<Self, NameError> {
        check_name(text).map(|()| Self(text.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Hexadecimal digits of an id that listings show.
const SHORT_LEN: usize = 12;

impl MemberId {
    /// Whether somebody who writes `node` may mean this member, which is called `name`: by that name, by
    /// the id, or by its first 12 digits, as listings show it.
    pub fn is_called(&self, name: &MemberName, node: &MemberName) -> bool {
        let id = self.to_string();
        let (node, short) = (node.as_str(), id.get(..SHORT_LEN));
        name.as_str() == node || id == node || short == Some(node)
    }
}

/// Which run of a member: higher wins. Durable before its first use, so that it never goes back.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a member is seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// Answers, or is vouched for by others.
    Alive,
    /// Failed a probe; still in use until refuted or convicted.
    Suspect,
    /// Announced a restart; hidden from routing, shown as down after 60 s.
    Restarting,
    /// Convicted. Its records are suspended, never erased.
    Down,
    /// Said goodbye for good.
    Left,
}

impl MemberState {
    /// The word used in tables, JSON and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Restarting => "restarting",
            Self::Down => "down",
            Self::Left => "left",
        }
    }
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
