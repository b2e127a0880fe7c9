//! Out of rotation and back: what a deploy does around a restart.

use super::control::{Controller, local_error};
use crate::api::{ControlError, Drain, OutOfRotation};
use crate::model::{InstanceId, MemberPhase, ServiceName};
use crate::telemetry::EventKind;

/// What this member says of its life while it runs.
pub(super) fn phase(out: &OutOfRotation) -> MemberPhase {
    match out.node_draining {
        true => MemberPhase::Draining,
        false => MemberPhase::Running,
    }
}

impl Controller {
    /// Takes this member or an instance out of rotation, or back in. Here that holds at once; others
    /// that have not heard of it are refused, and go elsewhere.
    pub(super) async fn drain(
        &mut self,
        instance: Option<&InstanceId>,
        drain: Drain,
    ) -> Result<(), ControlError> {
        let last = match drain {
            Drain::Begin => self.last_ready(instance),
            Drain::Force | Drain::End => Vec::new(),
        };
        if !last.is_empty() {
            return Err(ControlError::LastReady { services: last });
        }
        let changed = match drain {
            Drain::Begin | Drain::Force => self.services.drain(instance),
            Drain::End => self.services.end_drain(instance),
        };
        if !changed.map_err(local_error)? {
            return Ok(());
        }
        self.record_drain(instance, drain);
        self.publish().await;
        self.gossip.set_phase(phase(self.services.out())).await;
        self.keep()
    }

    fn record_drain(&self, instance: Option<&InstanceId>, drain: Drain) {
        match (instance, drain) {
            (Some(id), Drain::End) => {
                self.events.record(EventKind::InstanceChanged, id, "back from its drain");
            }
            (Some(id), _) => {
                self.events.record(EventKind::InstanceChanged, id, "taken out to drain");
            }
            (None, Drain::End) => {
                let reason = "back from its drain";
                self.events.record(EventKind::AgentResumed, &self.name, reason);
            }
            (None, _) => {
                let reason = "taken out to drain; the agent runs on";
                self.events.record(EventKind::AgentDraining, &self.name, reason);
            }
        }
    }

    /// The services that would have no ready instance, as far as is known here, were this one (all
    /// of this member when absent) out of rotation.
    fn last_ready(&self, instance: Option<&InstanceId>) -> Vec<ServiceName> {
        let snapshot = self.snapshot.load();
        let goes = |id: &InstanceId| instance.is_none_or(|instance| instance == id);
        let stays_here = |service: &ServiceName| {
            self.services.ready().any(|own| own.service == *service && !goes(&own.id))
        };
        let is_elsewhere = |service: &ServiceName| {
            snapshot.ready(service).any(|other| other.member != self.me && other.weight.0 > 0)
        };
        let going = self.services.ready().filter(|own| goes(&own.id)).map(|own| &own.service);
        let mut last: Vec<_> = going
            .filter(|service| !stays_here(service) && !is_elsewhere(service))
            .cloned()
            .collect();
        last.sort();
        last.dedup();
        last
    }
}
