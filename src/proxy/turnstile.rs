//! The gate before an own instance that the mesh has ejected: one new tunnel per probing period.
//!
//! Callers take turns to probe, but they know different things, and some of them heed only themselves.
//! The agent in front of the instance sees all who come, so that it alone can promise that one call a
//! period reaches an instance that is perhaps still ill. Who is turned away has lost a round trip and
//! nothing else: it goes to another instance, and learns nothing about this one. A caller that has
//! nobody else says so, and passes: an instance in doubt is better than none.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use crate::breaker::ProbeGate;
use crate::mesh::Snapshot;
use crate::model::{InstanceId, MemberId, ServiceName};
use crate::runtime::clock::Clock;
use crate::transport::tunnel::{Refusal, RefusalCode};

/// Who passes to the instances of this member.
#[derive(Debug)]
pub(super) struct Turnstile {
    me: MemberId,
    snapshot: Arc<ArcSwap<Snapshot>>,
    clock: Clock,
    /// Those that were ejected. At most one for each own instance.
    gates: Mutex<BTreeMap<InstanceId, ProbeGate>>,
}

impl Turnstile {
    /// All pass.
    pub(super) fn new(me: MemberId, snapshot: Arc<ArcSwap<Snapshot>>, clock: Clock) -> Self {
        Self { me, snapshot, clock, gates: Mutex::default() }
    }

    /// Lets a call to an own instance pass, or says why it does not. `insists`: its caller has nobody
    /// else.
    pub(super) fn pass(
        &self,
        service: &ServiceName,
        id: &InstanceId,
        insists: bool,
    ) -> Result<(), Refusal> {
        let snapshot = self.snapshot.load();
        let view = snapshot.services.get(service);
        let Some(ejection) = view.and_then(|view| view.ejection(&self.me, id)) else {
            return Ok(());
        };
        let mut gates = self.gates.lock();
        let gate = gates.entry(id.clone()).or_default();
        match gate.passes(self.clock.now(), ejection, insists) {
            true => Ok(()),
            false => Err(Refusal::new(RefusalCode::EJECTED, "the mesh has ejected the instance")),
        }
    }

    /// Forgets instances that are here no more.
    pub(super) fn retain(&self, is_here: impl Fn(&InstanceId) -> bool) {
        self.gates.lock().retain(|id, _| is_here(id));
    }
}
