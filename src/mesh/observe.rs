//! What members observe of each other's instances: this node's own word signed and spread, others'
//! weighed by the shared breaker.
//!
//! A word about failures is of use for a second or two, and hints take most of one. So whoever accepts
//! one that is new passes it on whole to [`PUSH_FANOUT`] others, each of which does so once: after a few
//! hops 98 of 100 have it, and repair brings it to the rest. What only says who calls what rides on
//! hints like anything else.

use super::message::Message;
use super::{Mesh, MeshEvent};
use crate::breaker::OwnWindow;
use crate::catalogue::Verdict;
use crate::model::{
    EntryKey, EntryKind, EntryVersion, InstanceState, MemberId, MemberPhase, MemberState, Moment,
    Observations,
};
use crate::wire;

/// Members that get a new word from each that accepts it.
const PUSH_FANOUT: usize = 4;

impl Mesh {
    /// Takes what this node's own calls saw. Give an instance's window when a stretch of failures
    /// begins or ends, when its breaker changes, when its verdict is
    /// [`Accused`](crate::breaker::Verdict::Accused) and it answers well, and each second those of
    /// instances that were called.
    pub fn handle_windows(&mut self, now: Moment, windows: Vec<OwnWindow>) {
        self.shared.handle_windows(now, windows);
        self.drain(now);
    }

    /// Publishes this node's own word, and tells what the shared breaker decided.
    pub(super) fn drain_shared(&mut self, now: Moment) {
        while let Some(event) = self.shared.poll_event() {
            self.events.push_back(MeshEvent::Breaker(event));
        }
        self.is_changed |= self.shared.take_changed();
        if !self.is_settled || self.has_left {
            return;
        }
        while let Some(observations) = self.shared.poll_report(now) {
            self.publish_observations(&observations);
        }
        if self.shared.take_left_out() > 0 {
            let reason = "own_observations_left_out";
            self.events.push_back(MeshEvent::Dropped { from: self.id, reason });
        }
    }

    fn publish_observations(&mut self, observations: &Observations) {
        self.observations_version += 1;
        let (epoch, version) = (self.publication.epoch, self.observations_version);
        let signed = wire::encode_payload(observations).ok().and_then(|payload| {
            let (mesh, signer) = (&self.config.mesh, self.signer.as_ref());
            let kind = EntryKind::OBSERVATIONS;
            crate::model::Entry::sign(mesh, signer, kind, [0; 16], epoch, version, &payload).ok()
        });
        let accepted =
            signed.is_some_and(|entry| self.catalogue.handle_entry(entry) == Verdict::Accepted);
        if !accepted {
            let reason = "own_observations";
            self.events.push_back(MeshEvent::EntryRefused { from: self.id, reason });
        }
    }

    /// Another member has said what it saw; or this one has, or had before it began anew.
    pub(super) fn handle_observations(
        &mut self,
        now: Moment,
        from: MemberId,
        version: EntryVersion,
        observations: &Observations,
    ) {
        let is_own =
            (version.epoch, version.version) == (self.publication.epoch, self.observations_version);
        if from == self.id && !is_own {
            return self.shared.handle_own_past(now);
        }
        let is_there = self.known.get(&from).is_some_and(|known| known.is_there());
        if is_there && self.is_begun {
            self.shared.handle_report(now, from, observations);
        }
    }

    /// Passes a new word about failures on. Returns whether it was one.
    pub(super) fn push_observations(&mut self, key: &EntryKey) -> bool {
        let is_urgent = self.catalogue.observations(key.owner).is_some_and(|observations| {
            key.kind == EntryKind::OBSERVATIONS && !observations.windows.is_empty()
        });
        let entry = self.catalogue.entry(key).filter(|_| is_urgent).cloned();
        for message in Message::of_entries(&entry) {
            for _ in 0..PUSH_FANOUT {
                if let Some(there) = self.membership.choose_active() {
                    self.send_message(there.id, &message);
                }
            }
        }
        is_urgent
    }

    /// Tells the shared breaker what a member offers, and whether it has a voice.
    pub(super) fn note_instances(&mut self, now: Moment, member: MemberId, state: MemberState) {
        let Some((record, _)) = self.catalogue.record(member) else { return };
        let is_there = matches!(state, MemberState::Alive | MemberState::Suspect);
        let takes_work = is_there && record.phase == MemberPhase::Running;
        // One of weight 0 takes no calls: counted, it would stand in for one that does.
        let ready = record.instances.iter().filter(|instance| {
            takes_work && instance.state == InstanceState::Ready && instance.weight.0 > 0
        });
        let ready = ready.map(|instance| (instance.id.clone(), instance.service.clone()));
        self.shared.set_instances(now, member, ready);
        if member == self.id {
            return;
        }
        if !is_there {
            self.shared.forget_caller(now, member);
        } else if !self.shared.has_heard(member)
            && let Some(observations) = self.catalogue.observations(member).cloned()
        {
            // It was away, or this node was: who calls what still holds, what it saw has its age.
            self.shared.handle_report(now, member, &observations);
        }
    }
}
