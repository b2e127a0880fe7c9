//! Which instance was asked last, of a call that nobody took or that has no answer.

use std::fmt;

use crate::mesh::Endpoint;
use crate::model::{InstanceId, MemberName};

/// The instance that a call came to last, and what the agent in front of it said, if it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LastAsked {
    pub(super) node: MemberName,
    pub(super) instance: InstanceId,
    /// Empty when nothing was said.
    said: String,
}

impl LastAsked {
    /// Of one that has said nothing.
    pub(super) fn new(endpoint: &Endpoint) -> Self {
        Self::that_said(endpoint, String::new())
    }

    /// Of one whose agent said why it does not take the call.
    pub(super) fn that_said(endpoint: &Endpoint, mut said: String) -> Self {
        said.retain(|letter| !letter.is_control()); // a peer's word, for people's terminals
        let (node, instance) = (endpoint.member_name.clone(), endpoint.instance.clone());
        Self { node, instance, said }
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

/// A word, and of whom it is said.
pub(super) fn of_whom(word: &str, last: Option<&LastAsked>) -> String {
    match last {
        Some(last) => format!("{word}: {last}"),
        None => word.to_owned(),
    }
}
