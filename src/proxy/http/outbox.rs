//! A request as it is said to instances, again where that may be.

use std::sync::Arc;

use http::request::Parts;
use http::{HeaderValue, Request};
use tokio::time::Instant;

use super::answer::Reason;
use super::body::{BodyError, Source, Upload};
use super::head::DEADLINE;
use super::miss::{Lost, Miss};
use super::upstream::Unanswered;
use crate::mesh::Endpoint;
use crate::model::Protocol;
use crate::proxy::board::{Avoid, Choice};
use crate::proxy::dial::DialError;
use crate::proxy::outbound::Setback;

/// A request as it can be said to several instances.
pub(super) struct Outbox {
    /// How it is balanced.
    pub(super) choice: Choice,
    pub(super) is_grpc: bool,
    pub(super) head: Box<Parts>,
    pub(super) source: Option<Arc<Source>>,
    pub(super) protocol: Protocol,
    /// When its caller's time is over.
    pub(super) deadline: Option<Instant>,
}

impl Outbox {
    /// The request for one attempt, with the time that is left now. An error when too much of its body
    /// has gone to say it again.
    pub(super) fn request(&self) -> Result<Request<Upload>, Setback> {
        let body = match &self.source {
            Some(source) => {
                source.attempt().ok_or(Setback::next(DialError::Lost, Avoid::Nobody))?
            }
            None => Upload::EMPTY,
        };
        let mut head = Parts::clone(&self.head);
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            let left = HeaderValue::from(u64::try_from(left).unwrap_or(u64::MAX));
            head.headers.insert(DEADLINE, left);
        }
        Ok(Request::from_parts(head, body))
    }

    /// Whether it may be sent again although `endpoint` may have had it.
    pub(super) fn may_repeat(&self, endpoint: &Endpoint) -> bool {
        endpoint.is_idempotent(self.head.method.as_str(), self.head.uri.path()) && self.is_whole()
    }

    /// Whether all of it can be said again.
    pub(super) fn is_whole(&self) -> bool {
        self.source.as_ref().is_none_or(|source| source.can_repeat())
    }

    /// What is wrong with the client's side, if that is what failed.
    pub(super) fn failure(&self) -> Option<Reason> {
        Some(match self.source.as_ref()?.failure()? {
            BodyError::Malformed(malformed) => Reason::Malformed(malformed),
            _ => Reason::BodyCut,
        })
    }

    /// What follows from how an attempt on `endpoint` ended that brought no response.
    pub(super) fn judge(&self, endpoint: &Endpoint, unanswered: Unanswered) -> Box<Miss> {
        let (why, is_unreadable) = match unanswered {
            Unanswered::Refused(refusal) => return refusal.into(),
            Unanswered::Unsent => return Setback::next(DialError::Lost, Avoid::Member).into(),
            Unanswered::Unknown { why, is_unreadable } => (why, is_unreadable),
        };
        let reason = if is_unreadable { Reason::Unreadable(self.protocol) } else { Reason::Lost };
        let lost = Lost { reason, why };
        Box::new(match self.may_repeat(endpoint) {
            true => {
                let (reason, avoid) = (DialError::Lost, Avoid::Instance);
                Miss::Repeatable { reason, avoid, lost }
            }
            false => Miss::Lost(lost),
        })
    }
}
