//! Which instance was asked last, of a call that nobody took or that has no answer.

use std::collections::BTreeMap;
use std::fmt;

use crate::mesh::Endpoint;
use crate::model::{InstanceId, MemberName};

/// Letters of what was said that are kept.
const SAID_LEN_MAX: usize = 120;

/// The instance that a call came to last, and why it did not answer, as far as that was said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LastAsked {
    pub(super) node: MemberName,
    pub(super) instance: InstanceId,
    /// By its agent or by a library; empty when nothing was said.
    said: String,
}

impl LastAsked {
    /// Of one that has said nothing.
    pub(super) fn new(endpoint: &Endpoint) -> Self {
        Self::that_said(endpoint, "")
    }

    /// Of one of which this was said. Whoever said it may mean ill, and people's terminals show it.
    pub(super) fn that_said(endpoint: &Endpoint, said: &str) -> Self {
        let (node, instance) = (endpoint.member_name.clone(), endpoint.instance.clone());
        let is_plain = |letter: &char| letter.is_ascii_graphic() || *letter == ' ';
        let said = said.chars().filter(is_plain).take(SAID_LEN_MAX).collect();
        Self { node, instance, said }
    }

    /// For an event.
    pub(super) fn fields(&self) -> BTreeMap<String, String> {
        let instance = ("instance".to_owned(), self.instance.to_string());
        let node = ("node".to_owned(), self.node.to_string());
        let said = ("said".to_owned(), self.said.clone());
        [instance, node, said].into_iter().filter(|(_, value)| !value.is_empty()).collect()
    }
}

impl fmt::Display for LastAsked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.instance, self.node)?;
        match self.said.is_empty() {
            true => Ok(()),
            false => write!(f, ": {}", self.said),
        }
    }
}
