//! What the access log says of one request.

use std::sync::atomic::{AtomicU64, Ordering};

use http::request::Parts;

use crate::mesh::Endpoint;
use crate::model::{Moment, ServiceName};
use crate::runtime::clock::{self, Clock};
use crate::telemetry::{Access, AccessLog, Door};

/// A request under way. Written down when it is dropped; without [`Noted::end`] its response was cut.
pub(super) struct Noted {
    log: AccessLog,
    clock: Clock,
    begun_at: Moment,
    bytes: AtomicU64,
    /// Until it is written down.
    access: Option<Access>,
}

impl Noted {
    /// A request that has just come. Without a head it is one that cannot be read.
    pub(super) fn new(log: AccessLog, clock: Clock, door: Door, head: Option<&Parts>) -> Self {
        let access = Access {
            at_ms: clock::unix_millis(),
            door,
            service: None,
            node: None,
            instance: None,
            method: head.map(|head| head.method.clone()),
            path: head.and_then(|head| head.uri.path_and_query().cloned()),
            status: 0,
            reason: Some("cut"),
            bytes: 0,
            duration: Default::default(),
        };
        Self { log, clock, begun_at: clock.now(), bytes: AtomicU64::new(0), access: Some(access) }
    }

    /// An instance answers.
    pub(super) fn answered(&mut self, service: &ServiceName, endpoint: &Endpoint, status: u16) {
        if let Some(access) = &mut self.access {
            access.service = Some(service.clone());
            access.node = Some(endpoint.member_name.clone());
            access.instance = Some(endpoint.instance.clone());
            access.status = status;
        }
    }

    /// What the client is sent, of a response's body or after it, is counted here.
    pub(super) fn bytes(&self) -> &AtomicU64 {
        &self.bytes
    }

    /// The mesh answers.
    pub(super) fn refused(
        mut self,
        service: Option<&ServiceName>,
        status: u16,
        reason: &'static str,
    ) {
        if let Some(access) = &mut self.access {
            access.service = service.cloned();
            access.status = status;
            access.reason = Some(reason);
        }
    }

    /// The response is whole.
    pub(super) fn end(mut self) {
        if let Some(access) = &mut self.access {
            access.reason = None;
        }
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        if let Some(mut access) = self.access.take() {
            access.bytes = self.bytes.load(Ordering::Relaxed);
            access.duration = self.clock.now().since(self.begun_at);
            self.log.record(access);
        }
    }
}
