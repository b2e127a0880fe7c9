//! Whose a connection to an instance is.

use std::sync::OnceLock;

use http::HeaderValue;

use crate::mesh::Endpoint;
use crate::model::{InstanceId, MemberId, MemberName, ServiceName};
use crate::proxy::traffic::{Counters, Traffic};
use crate::telemetry::Direction;

/// An instance, of a service.
pub(super) type Key = (ServiceName, MemberId, InstanceId);

/// Of this endpoint of `service`.
pub(super) fn key(service: &ServiceName, endpoint: &Endpoint) -> Key {
    (service.clone(), endpoint.member, endpoint.instance.clone())
}

/// Whose a connection is, and where each exchange on it is counted.
pub(super) struct Whose {
    pub(super) key: Key,
    member: MemberName,
    /// The name of the instance's member, as a header says it.
    pub(super) node: Option<HeaderValue>,
    /// Once there was an answer: who refuses all connections has no counters.
    counters: OnceLock<Counters>,
}

impl Whose {
    pub(super) fn new(key: Key, member: &MemberName) -> Self {
        let node = HeaderValue::from_str(member.as_str()).ok();
        Self { key, member: member.clone(), node, counters: OnceLock::new() }
    }

    /// Of `traffic`, those of its exchanges.
    pub(super) fn counters(&self, traffic: &Traffic) -> &Counters {
        let (service, peer, _) = &self.key;
        self.counters.get_or_init(|| traffic.of(Direction::outbound, service, *peer, &self.member))
    }
}
