//! What a pick comes to: the endpoint that takes the call, those tried before it, the call in flight.

use std::sync::Arc;

use super::service::ServiceBoard;
use super::slot::Slot;
use crate::mesh::Endpoint;
use crate::model::ServiceName;
use crate::proxy::load::Gauge;

/// The endpoint that takes a call, and what is known of it.
#[derive(Clone, Debug)]
pub struct Picked {
    pub(super) board: Arc<ServiceBoard>,
    pub(super) at: usize,
}

impl Picked {
    /// Which endpoint, as the mesh saw it then.
    pub fn endpoint(&self) -> &Endpoint {
        self.board.at(self.at).0
    }

    /// Whether the mesh keeps calls from it, but for one a period.
    pub(in crate::proxy) fn is_ejected(&self) -> bool {
        let Endpoint { member, instance, .. } = self.endpoint();
        self.board.view.ejection(member, instance).is_some()
    }

    /// Whether connections to it serve one call after the other, or several at a time. Not where its agent
    /// counts or admits calls, who sees only tunnels: each call has a tunnel of its own then.
    pub(in crate::proxy) fn shares_connections(&self) -> bool {
        self.endpoint().capacity.hard.is_none() && !self.is_ejected()
    }

    pub(in crate::proxy) fn slot(&self) -> &Arc<Slot> {
        self.board.at(self.at).1
    }

    pub(super) fn service(&self) -> &ServiceName {
        &self.board.view.name
    }
}

/// Endpoints that one call has gone to. Allocates with the second.
#[derive(Clone, Debug, Default)]
pub struct Tried {
    first: Option<Arc<Slot>>,
    others: Vec<Arc<Slot>>,
}

impl Tried {
    /// It will not be picked again for this call.
    pub fn add(&mut self, picked: &Picked) {
        let slot = Arc::clone(picked.slot());
        match &self.first {
            None => self.first = Some(slot),
            Some(_) => self.others.push(slot),
        }
    }

    pub(super) fn contains(&self, slot: &Arc<Slot>) -> bool {
        self.first.iter().chain(&self.others).any(|tried| Arc::ptr_eq(tried, slot))
    }
}

/// A tunnel of another to an own instance, open until it is dropped. Whoever calls judges it.
#[derive(Debug)]
pub(in crate::proxy) struct Counted {
    pub(super) slot: Arc<Slot>,
    /// How many calls and tunnels there were when it began, itself included.
    pub(in crate::proxy) count: u32,
}

impl Counted {
    /// How busy the instance is.
    pub(in crate::proxy) fn gauge(&self) -> &Arc<Gauge> {
        &self.slot.gauge
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.slot.close_tunnel();
    }
}
