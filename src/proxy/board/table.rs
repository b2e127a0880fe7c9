//! By which keys lead to endpoints.

use std::sync::Arc;

use crate::balancer::Maglev;
use crate::mesh::ServiceView;
use crate::model::{InstanceId, MemberId, Weight};

/// By which keys lead to endpoints.
pub(super) struct Table {
    pub(super) made: Arc<Made>,
    /// The place in the view of each candidate.
    pub(super) places: Vec<usize>,
}

/// A table and what it was made of: what of it most changes of the mesh leave as it is.
pub(super) struct Made {
    candidates: Vec<(MemberId, InstanceId, Weight)>,
    pub(super) maglev: Maglev,
}

impl Table {
    /// Of those that are ready. `before` is what the last one was made of.
    pub(super) fn new(view: &ServiceView, before: Option<&Arc<Made>>) -> Self {
        let endpoints = view.endpoints();
        let named = view.ready().iter().map(|one| {
            let endpoint = &endpoints[one.candidate];
            let name = (endpoint.member, endpoint.instance.clone(), endpoint.weight);
            (name, one.candidate)
        });
        let mut named: Vec<_> = named.collect();
        named.sort();
        let (candidates, places): (Vec<_>, Vec<_>) = named.into_iter().unzip();
        let before = before.filter(|made| made.candidates == candidates);
        let made = before.map_or_else(|| Arc::new(Made::new(candidates)), Arc::clone);
        Self { made, places }
    }
}

impl Made {
    fn new(candidates: Vec<(MemberId, InstanceId, Weight)>) -> Self {
        let names: Vec<_> = candidates
            .iter()
            .map(|(member, id, _)| [member.as_bytes().as_slice(), id.as_str().as_bytes()].concat())
            .collect();
        let weights = candidates.iter().map(|(_, _, weight)| *weight);
        let named = names.iter().zip(weights).enumerate();
        let maglev = Maglev::new(named.map(|(at, (name, weight))| (at, name.as_slice(), weight)));
        Self { candidates, maglev }
    }
}
