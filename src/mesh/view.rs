//! How this node sees the others: the detector's belief, the member's own word and this node's own
//! experience, taken together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::rotation::BLIND_TIME;
use super::{
    Appointed, Endpoint, EndpointState, Enrolled, Evidence, MemberView, Mesh, MeshEvent,
    ServiceView, Snapshot,
};
use crate::breaker::InstanceKey;
use crate::membership::Belief;
use crate::model::{
    Capacity, EntryVersion, Epoch, InstanceRecord, LimitedInstance, MemberId, MemberPhase,
    MemberRecord, MemberState, Moment, Protocol, RequestPattern, ServiceName,
};

/// How long an announced restart hides a member before it counts as down.
const RESTART_PATIENCE: Duration = Duration::from_secs(60);

/// A member that is back within this was never really gone: it flaps.
const FLAP_WITHIN: Duration = Duration::from_secs(60);

/// How long an answer outweighs hearsay of death, and a failure hearsay of life.
const ANSWER_VALID: Duration = Duration::from_secs(5);
const FAILURE_VALID: Duration = Duration::from_secs(10);

/// What this node knows of a member besides the detector's belief.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) state: MemberState,
    /// When it was first heard of.
    appeared_at: Moment,
    /// When the state last changed.
    pub(super) changed_at: Moment,
    /// When its record last arrived; absent for one that an earlier run left on the disk, of which
    /// nobody knows how old it is.
    pub(super) record_at: Option<Moment>,
    answered_at: Option<Moment>,
    failed_at: Option<Moment>,
}

impl Known {
    pub(super) fn new(now: Moment) -> Self {
        Self {
            state: MemberState::Down,
            appeared_at: now,
            changed_at: now,
            record_at: None,
            answered_at: None,
            failed_at: None,
        }
    }

    /// Whether time alone can change how it is seen.
    fn is_ageing(&self) -> bool {
        self.state == MemberState::Restarting
            || self.answered_at.is_some()
            || self.failed_at.is_some()
    }

    /// Forgets experience that is too old to count. Returns whether there was any.
    fn forget_experience(&mut self, now: Moment, is_back: bool) -> bool {
        let is_there = self.is_there();
        let is_old = |at: Moment, valid: Duration| now.since(at) >= valid;
        let answer = self.answered_at.take_if(|at| is_old(*at, ANSWER_VALID));
        // Of a member that is down nothing better is heard than the failure: it stays.
        let is_over = |at: Moment| is_back || (is_there && is_old(at, FAILURE_VALID));
        let failure = self.failed_at.take_if(|at| is_over(*at));
        failure.is_some() || (answer.is_some() && !is_there)
    }

    pub(super) fn is_there(&self) -> bool {
        matches!(self.state, MemberState::Alive | MemberState::Suspect)
    }

    /// What this node's own recent experience says; `None` when it has none.
    pub(super) fn experience(&self, now: Moment) -> Option<Evidence> {
        let answered = self.answered_at.filter(|at| now.since(*at) < ANSWER_VALID);
        match (answered, self.failed_at) {
            (Some(answered), failed) if failed.is_none_or(|at| at < answered) => {
                Some(Evidence::Answered)
            }
            (_, Some(_)) => Some(Evidence::Failed),
            _ => None,
        }
    }
}

impl Mesh {
    /// Notes what this node saw of a member itself.
    pub(super) fn note_evidence(&mut self, now: Moment, member: MemberId, evidence: Evidence) {
        let Some(known) = self.known.get_mut(&member) else { return };
        let before = known.experience(now);
        match evidence {
            Evidence::Answered => known.answered_at = Some(now),
            Evidence::Failed => known.failed_at = Some(now),
        }
        let after = known.experience(now);
        // That a member which is there has answered changes nothing for anybody.
        let is_dull = known.is_there() && ![before, after].contains(&Some(Evidence::Failed));
        self.is_changed |= before != after && !is_dull;
    }

    /// Looks again at the members that time alone may have changed.
    pub(super) fn look_at_aged(&mut self, now: Moment) {
        let is_silent = self.membership.is_isolated();
        let may_age =
            |(id, known): (&MemberId, &Known)| (is_silent || known.is_ageing()).then_some(*id);
        let members: Vec<_> = self.known.iter().filter_map(may_age).collect();
        for member in members {
            self.look_at(now, member);
        }
    }

    /// Looks at a member again, and says what changed.
    pub(super) fn look_at(&mut self, now: Moment, id: MemberId) {
        let Some((record, _)) = self.catalogue.record(id) else { return };
        let state = self.state_of(now, id, record);
        self.note_instances(now, id, state);
        self.note_rotations(now, id, state);
        let known = self.known.entry(id).or_insert_with(|| Known::new(now));
        let is_back =
            !known.is_there() && matches!(state, MemberState::Alive | MemberState::Suspect);
        self.is_changed |= known.forget_experience(now, is_back);
        if known.state == state {
            return;
        }
        let was_down = known.state == MemberState::Down && known.changed_at > known.appeared_at;
        let is_flap = was_down && now.since(known.changed_at) < FLAP_WITHIN;
        let event = match (known.state, state) {
            (MemberState::Alive, MemberState::Suspect) => Some(MeshEvent::MemberSuspect(id)),
            (MemberState::Suspect, MemberState::Alive) => None,
            (_, MemberState::Alive | MemberState::Suspect) => {
                Some(MeshEvent::MemberUp { member: id, is_flap })
            }
            (was, MemberState::Down) => Some(MeshEvent::MemberDown { member: id, was }),
            (_, MemberState::Left) => Some(MeshEvent::MemberLeft(id)),
            (_, MemberState::Restarting) => Some(MeshEvent::MemberRestarting(id)),
        };
        known.state = state;
        known.changed_at = now;
        self.is_changed = true;
        self.events.extend(event.filter(|_| id != self.id));
    }

    fn note_rotations(&mut self, now: Moment, id: MemberId, state: MemberState) {
        let Some((record, version)) = self.catalogue.record(id) else { return };
        let states = record.instances.iter().map(|instance| {
            (instance.id.clone(), EndpointState::of(state, record.phase, instance.state))
        });
        let can_tell = now.since(self.started_at) >= BLIND_TIME;
        let rotations = self.rotations.entry(id).or_default();
        rotations.handle_states(now, version.epoch, states, can_tell);
    }

    fn state_of(&self, now: Moment, id: MemberId, record: &MemberRecord) -> MemberState {
        let belief = self.membership.belief(id).map(|update| update.belief);
        let is_there = id == self.id || matches!(belief, Some(Belief::Alive | Belief::Suspect));
        let record_at = self.known.get(&id).and_then(|known| known.record_at);
        let is_recent = record_at.is_some_and(|at| now.since(at) < RESTART_PATIENCE);
        // At its start a member's own record is that of the run before.
        let phase = if id == self.id { self.publication.phase } else { record.phase };
        match phase {
            MemberPhase::Left => return MemberState::Left,
            MemberPhase::Restarting if is_there || is_recent => {
                return MemberState::Restarting;
            }
            _ => {}
        }
        match belief {
            _ if id == self.id => MemberState::Alive,
            _ if self.membership.is_deserted(now) => MemberState::Down,
            Some(Belief::Alive) => MemberState::Alive,
            Some(Belief::Suspect) => MemberState::Suspect,
            Some(Belief::Down) | None => MemberState::Down,
        }
    }

    /// The mesh as seen from here.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        let mut services: BTreeMap<ServiceName, (Protocol, bool, Vec<Endpoint>)> = BTreeMap::new();
        for (id, record, version) in self.catalogue.records() {
            if id != self.id && self.catalogue.is_replaced(id) {
                continue; // its machine is here under another key
            }
            let known = self.known.get(&id).copied().unwrap_or_else(|| Known::new(self.now));
            // What an enrolment does not allow, or no more, is nobody's to call.
            let allowed = self.catalogue.enrolment(id).and_then(|known| known.services.as_ref());
            let is_allowed = |instance: &&InstanceRecord| {
                allowed.is_none_or(|allowed| allowed.contains(&instance.service))
            };
            for instance in record.instances.iter().filter(is_allowed) {
                let endpoint = self.endpoint(id, record, instance, &known);
                let service = services.entry(instance.service.clone());
                let service = service.or_insert((instance.protocol, false, Vec::new()));
                let (protocol, is_mixed, endpoints) = service;
                *is_mixed |= instance.protocol != *protocol;
                endpoints.push(endpoint);
            }
            let view = self.member_view(id, record, version, &known);
            snapshot.members.insert(id, Arc::new(view));
        }
        let views = services.into_iter().map(|(name, (protocol, is_mixed, endpoints))| {
            let mut view = ServiceView::new(name.clone(), protocol, endpoints);
            view.is_mixed = is_mixed;
            view.is_failing = self.shared.is_failing(&name);
            view.is_panic = self.shared.is_panic(&name);
            (name, Arc::new(view))
        });
        snapshot.services = views.collect();
        let appointed = self.catalogue.issuers().map(|(id, issuer)| {
            let epoch = self.catalogue.issuer_epoch(id).unwrap_or(Epoch(0));
            (id, Appointed { issuer: Arc::clone(issuer), epoch })
        });
        snapshot.issuers = appointed.collect();
        let mut replaced = BTreeSet::new();
        let enrolled = self.catalogue.enrolled_members().filter_map(|member| {
            let (issuer, enrolment) = self.catalogue.newest_enrolment(member)?;
            if self.catalogue.is_replaced(member) {
                replaced.insert(member);
                return None;
            }
            Some((member, Enrolled { issuer, enrolment: Arc::clone(enrolment) }))
        });
        snapshot.enrolments = enrolled.collect();
        snapshot.replaced = replaced;
        snapshot
    }

    fn member_view(
        &self,
        id: MemberId,
        record: &MemberRecord,
        version: EntryVersion,
        known: &Known,
    ) -> MemberView {
        let mut services: Vec<_> =
            record.instances.iter().map(|instance| instance.service.clone()).collect();
        services.sort();
        services.dedup();
        MemberView {
            id,
            name: record.name.clone(),
            address: record.address,
            zone: record.zone.clone(),
            state: known.state,
            phase: record.phase,
            is_revoked: self.catalogue.enrolment(id).is_none(),
            epoch: version.epoch,
            version: version.version,
            services,
            changed_at: known.changed_at,
        }
    }

    fn endpoint(
        &self,
        member: MemberId,
        record: &MemberRecord,
        instance: &InstanceRecord,
        known: &Known,
    ) -> Endpoint {
        let experience = match member == self.id {
            true => Some(Evidence::Answered),
            false => known.experience(self.now),
        };
        let key = InstanceKey { member, instance: instance.id.clone() };
        Endpoint {
            instance: instance.id.clone(),
            member,
            member_name: record.name.clone(),
            address: record.address,
            port: instance.port,
            tags: instance.tags.clone(),
            weight: instance.weight,
            state: endpoint_state(known.state, record.phase, instance, experience),
            zone: record.zone.as_str().into(),
            verdict: self.shared.verdict(&key),
            idempotent: declared(record, instance),
            capacity: capacity(record, instance),
            rotation: self
                .rotations
                .get(&member)
                .map(|all| all.of(&instance.id))
                .unwrap_or_default(),
            changed_at: known.record_at.map_or(known.changed_at, |at| known.changed_at.max(at)),
        }
    }
}

/// Hearsay of death makes an endpoint doubtful, not down, until this node's own experience agrees;
/// an answer of a moment ago overrules it. A failure makes it doubtful whatever is heard.
fn endpoint_state(
    member: MemberState,
    phase: MemberPhase,
    instance: &InstanceRecord,
    experience: Option<Evidence>,
) -> EndpointState {
    let state = EndpointState::of(member, phase, instance.state);
    match (state, member, experience) {
        (EndpointState::Doubtful, _, Some(Evidence::Answered)) => {
            EndpointState::of(MemberState::Alive, phase, instance.state)
        }
        (EndpointState::Doubtful, MemberState::Down, Some(Evidence::Failed)) => EndpointState::Down,
        (EndpointState::Ready, _, Some(Evidence::Failed)) => EndpointState::Doubtful,
        _ => state,
    }
}

/// The requests to `instance` that may be sent twice.
fn declared(record: &MemberRecord, instance: &InstanceRecord) -> Arc<[RequestPattern]> {
    let declared = record.idempotent.iter().find(|declared| declared.instance == instance.id);
    declared.map_or_else(Default::default, |declared| declared.requests.as_slice().into())
}

/// How many calls `instance` takes at a time.
fn capacity(record: &MemberRecord, instance: &InstanceRecord) -> Capacity {
    let limited = record.capacities.iter().find(|limited| limited.instance == instance.id);
    limited.map_or_else(Capacity::default, |&LimitedInstance { soft, hard, .. }| Capacity {
        soft,
        hard,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceState, Protocol, Weight};

    #[test]
    fn own_experience_decides_what_hearsay_only_doubts() {
        let instance = InstanceRecord {
            id: "web".parse().unwrap(),
            service: "web".parse().unwrap(),
            protocol: Protocol::Tcp,
            port: 80,
            tags: Vec::new(),
            weight: Weight::default(),
            state: InstanceState::Ready,
        };
        use EndpointState::{Doubtful, Down, Ready};
        use Evidence::{Answered, Failed};
        for (member, experience, expected) in [
            (MemberState::Alive, None, Ready),
            (MemberState::Suspect, None, Ready),
            (MemberState::Down, None, Doubtful),
            (MemberState::Down, Some(Answered), Ready),
            (MemberState::Down, Some(Failed), Down),
            (MemberState::Alive, Some(Failed), Doubtful),
            (MemberState::Left, Some(Answered), Down),
            (MemberState::Restarting, Some(Answered), Down),
        ] {
            let state = endpoint_state(member, MemberPhase::Running, &instance, experience);
            assert_eq!(state, expected, "{member} with {experience:?}");
        }
    }
}
