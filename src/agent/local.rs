//! What this member serves: the instances behind it, as declared here and as told to the mesh.

use std::collections::{BTreeMap, BTreeSet};

use crate::api::{ExposeSpec, Maintenance, OutOfRotation};
use crate::model::{
    InstanceId, InstanceRecord, InstanceState, Offer, PAYLOAD_LEN_MAX, Protocol, ServiceName,
};
use crate::proxy::{CheckedAs, CheckedInstance, LocalInstance};
use crate::wire;

/// Instances that one member may expose.
const INSTANCES_MAX: usize = 256;
/// What all instances may take in this member's record, in bytes; the rest of it is short.
const RECORD_LEN_MAX: usize = PAYLOAD_LEN_MAX - 1_024;
const TAGS_MAX: usize = 16;
const TAG_LEN_MAX: usize = 64;

/// A declaration that cannot be taken. Nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocalError {
    /// No room for one more.
    #[error("{INSTANCES_MAX} instances are exposed here already, as many as one member may")]
    TooMany,
    /// They would not fit the record of this member.
    #[error("all instances with their tags take {len} bytes, at most {RECORD_LEN_MAX} are allowed")]
    TooLong {
        /// In bytes.
        len: usize,
    },
    /// Nothing has this id.
    #[error("no instance {0} is exposed here")]
    Unknown(InstanceId),
    /// A tag is malformed.
    #[error("tag '{0}' is not 1 to {TAG_LEN_MAX} printable characters without commas")]
    Tag(String),
    /// One instance has too many.
    #[error("{0} tags, at most {TAGS_MAX} are allowed")]
    TooManyTags(usize),
    /// Fault: whoever enrolled this member, or the name.
    #[error("this member was enrolled for {allowed}, not for '{service}'")]
    NotAllowed {
        /// Which was to be exposed.
        service: ServiceName,
        /// What it may expose.
        allowed: String,
    },
    /// Another check has it.
    #[error("there is another check with the id '{0}' on this machine")]
    CheckId(String),
    /// Of a later version.
    #[error("protocol {0} is not available yet, only tcp, http, h2 and grpc are")]
    Protocol(Protocol),
}

/// The instances of this member. What was declared and may not be offered is withheld: it is
/// offered as soon as it may be.
#[derive(Clone, Debug, Default)]
pub struct LocalServices {
    /// All that was declared, at most [`INSTANCES_MAX`].
    instances: BTreeMap<InstanceId, ExposeSpec>,
    /// What the enrolment allows; all when absent.
    allowed: Option<Vec<ServiceName>>,
    /// Kept for what is not exposed now, too, so that a restart brings it back as it was; at most
    /// [`INSTANCES_MAX`] of those.
    out: OutOfRotation,
    /// Of each instance, which of its stays in rotation this is.
    stays: BTreeMap<InstanceId, u64>,
    /// Of the next stay that begins, whose ever it is.
    next_stay: u64,
    /// As what each instance is known whose checks pass.
    passing: BTreeMap<InstanceId, CheckedAs>,
}

impl LocalServices {
    /// None yet; only `allowed` may be offered. Those of `out` begin out of rotation.
    pub fn new(allowed: Option<Vec<ServiceName>>, out: OutOfRotation) -> Self {
        Self { allowed, out, ..Self::default() }
    }

    /// From now on only `allowed` may be offered.
    pub fn allow(&mut self, allowed: Option<Vec<ServiceName>>) {
        self.allowed = allowed;
    }

    fn may_offer(&self, service: &ServiceName) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| allowed.contains(service))
    }

    /// Takes an instance that may be offered. One with the same id is replaced and returned.
    pub fn expose(&mut self, instance: ExposeSpec) -> Result<Option<ExposeSpec>, LocalError> {
        if let Some(allowed) = self.allowed.as_ref().filter(|_| !self.may_offer(&instance.service))
        {
            let allowed: Vec<_> = allowed.iter().map(ServiceName::as_str).collect();
            let allowed = allowed.join(", ");
            return Err(LocalError::NotAllowed { service: instance.service, allowed });
        }
        self.declare(instance)
    }

    /// Takes an instance, to be offered once it may be. One with the same id is replaced and
    /// returned.
    pub fn declare(&mut self, instance: ExposeSpec) -> Result<Option<ExposeSpec>, LocalError> {
        if instance.protocol == Protocol::Udp {
            return Err(LocalError::Protocol(instance.protocol));
        }
        check_tags(&instance.tags)?;
        self.check_ids_are_free(&instance)?;
        if !self.instances.contains_key(&instance.id) && self.instances.len() >= INSTANCES_MAX {
            return Err(LocalError::TooMany);
        }
        let id = instance.id.clone();
        let previous = self.instances.insert(id.clone(), instance);
        let all = self.instances.values().map(|one| (self.record(one), &one.idempotent));
        let len = wire::encode(&all.collect::<Vec<_>>()).map_or(usize::MAX, |bytes| bytes.len());
        if len > RECORD_LEN_MAX {
            match previous {
                Some(previous) => drop(self.instances.insert(id, previous)),
                None => drop(self.instances.remove(&id)),
            }
            return Err(LocalError::TooLong { len });
        }
        if previous.is_none() {
            self.begin_stay(id);
        }
        Ok(previous)
    }

    /// What its checks said of an instance before it came, or came back, says nothing of it now.
    fn begin_stay(&mut self, id: InstanceId) {
        self.stays.insert(id, self.next_stay);
        self.next_stay += 1;
    }

    /// Takes an instance out.
    pub fn unexpose(&mut self, id: &InstanceId) -> Result<ExposeSpec, LocalError> {
        self.out.maintenance.remove(id);
        self.out.draining.remove(id);
        self.stays.remove(id);
        self.instances.remove(id).ok_or_else(|| LocalError::Unknown(id.clone()))
    }

    /// Takes an instance out that may be declared again as it was. Returns whether it was there.
    pub fn withdraw(&mut self, id: &InstanceId) -> bool {
        self.stays.remove(id);
        self.instances.remove(id).is_some()
    }

    /// Takes an instance out of rotation, or back in: it then takes work once its checks, made from now
    /// on, pass. Returns the reason for which it is out now. It stays as it is when it is exposed again.
    pub fn maintain(
        &mut self,
        id: &InstanceId,
        maintenance: Maintenance,
    ) -> Result<Option<&str>, LocalError> {
        self.must_be_declared(id)?;
        if self.out.maintenance.len() >= INSTANCES_MAX {
            self.out.maintenance.retain(|id, _| self.instances.contains_key(id));
        }
        let reason = match maintenance {
            Maintenance::Begin(reason) => reason,
            Maintenance::End => {
                if self.out.maintenance.remove(id).is_some() {
                    self.begin_stay(id.clone());
                }
                return Ok(None);
            }
        };
        let unknown = || "no reason was given".to_owned();
        let known = self.out.maintenance.entry(id.clone()).or_insert_with(unknown);
        if let Some(reason) = reason {
            *known = reason;
        }
        Ok(Some(known))
    }

    /// Takes an instance, or all that are and will be exposed, out of rotation until it ends.
    /// Returns whether that changes anything. It stays as it is when it is exposed again.
    pub fn drain(&mut self, id: Option<&InstanceId>) -> Result<bool, LocalError> {
        let Some(id) = id else {
            return Ok(!std::mem::replace(&mut self.out.node_draining, true));
        };
        self.must_be_declared(id)?;
        if self.out.draining.len() >= INSTANCES_MAX {
            self.out.draining.retain(|id| self.instances.contains_key(id));
        }
        Ok(self.out.draining.insert(id.clone()))
    }

    /// Ends what [`LocalServices::drain`] began. Returns whether that changes anything. What comes back
    /// takes work once its checks, made from now on, pass.
    pub fn end_drain(&mut self, id: Option<&InstanceId>) -> Result<bool, LocalError> {
        let back: Vec<_> = match id {
            None if std::mem::take(&mut self.out.node_draining) => {
                self.instances.keys().cloned().collect()
            }
            None => return Ok(false),
            Some(id) => {
                self.must_be_declared(id)?;
                self.out.draining.take(id).into_iter().collect()
            }
        };
        let is_changed = id.is_none() || !back.is_empty();
        back.into_iter().for_each(|id| self.begin_stay(id));
        Ok(is_changed)
    }

    fn must_be_declared(&self, id: &InstanceId) -> Result<(), LocalError> {
        match self.instances.contains_key(id) {
            true => Ok(()),
            false => Err(LocalError::Unknown(id.clone())),
        }
    }

    /// Takes note of the instances whose checks pass. Returns whether that changes what any of them is
    /// taken for.
    pub fn set_passing(&mut self, passing: BTreeMap<InstanceId, CheckedAs>) -> bool {
        let before: Vec<_> = self.failing().collect();
        self.passing = passing;
        !self.failing().eq(before)
    }

    /// Those whose checks do not pass, or have not yet since they came, or came back; by id.
    pub fn failing(&self) -> impl Iterator<Item = InstanceId> {
        let failing = self.declared().filter(|instance| self.is_failing(instance));
        failing.map(|instance| instance.id.clone())
    }

    /// Whether the instance has checks that do not pass, or have not yet.
    fn is_failing(&self, instance: &ExposeSpec) -> bool {
        !instance.checks.is_empty()
            && self.passing.get(&instance.id) != Some(&self.checked_as(instance))
    }

    fn checked_as(&self, instance: &ExposeSpec) -> CheckedAs {
        let stay = self.stays.get(&instance.id).copied().unwrap_or(self.next_stay);
        CheckedAs { target: instance.to.clone(), stay }
    }

    /// What is to be checked, by id.
    pub fn checked(&self) -> Vec<CheckedInstance> {
        let checked = self.offered().filter(|instance| !instance.checks.is_empty());
        checked.map(|instance| self.checked_of(instance)).collect()
    }

    fn checked_of(&self, instance: &ExposeSpec) -> CheckedInstance {
        CheckedInstance {
            id: instance.id.clone(),
            service: instance.service.clone(),
            known_as: self.checked_as(instance),
            protocol: instance.protocol,
            proxy_protocol: instance.proxy_protocol,
            checks: instance.checks.clone(),
        }
    }

    /// Whoever pushes a word says the id of a check and no more.
    fn check_ids_are_free(&self, instance: &ExposeSpec) -> Result<(), LocalError> {
        let others = self.declared().filter(|other| other.id != instance.id);
        let mut taken: BTreeSet<_> = others
            .flat_map(|other| self.checked_of(other).check_ids().collect::<Vec<_>>())
            .collect();
        match self.checked_of(instance).check_ids().find(|id| !taken.insert(id.clone())) {
            Some(id) => Err(LocalError::CheckId(id)),
            None => Ok(()),
        }
    }

    /// What is out of rotation.
    pub fn out(&self) -> &OutOfRotation {
        &self.out
    }

    /// What takes new calls: offered, in rotation, well and of some weight.
    pub fn ready(&self) -> impl Iterator<Item = &ExposeSpec> {
        let is_in =
            |instance: &&ExposeSpec| !self.out.contains(&instance.id) && !self.is_failing(instance);
        self.offered().filter(|instance| instance.weight.0 > 0).filter(is_in)
    }

    /// All that was declared, by id.
    pub fn declared(&self) -> impl Iterator<Item = &ExposeSpec> {
        self.instances.values()
    }

    /// What is offered, by id.
    pub fn offered(&self) -> impl Iterator<Item = &ExposeSpec> {
        self.declared().filter(|instance| self.may_offer(&instance.service))
    }

    /// What may not be offered, by id.
    pub fn withheld(&self) -> impl Iterator<Item = &ExposeSpec> {
        self.declared().filter(|instance| !self.may_offer(&instance.service))
    }

    /// What is offered, as told to the mesh.
    pub fn offers(&self) -> Vec<Offer> {
        self.offered().map(|instance| self.offer(instance)).collect()
    }

    fn offer(&self, instance: &ExposeSpec) -> Offer {
        let (idempotent, capacity) = (instance.idempotent.clone(), instance.inflight);
        Offer { record: self.record(instance), idempotent, capacity }
    }

    fn record(&self, instance: &ExposeSpec) -> InstanceRecord {
        InstanceRecord {
            id: instance.id.clone(),
            service: instance.service.clone(),
            protocol: instance.protocol,
            port: instance.port,
            tags: instance.tags.clone(),
            weight: instance.weight,
            // That the whole member drains is said once, by its phase.
            state: self.state(instance),
        }
    }

    /// What the operator says goes before what checks say.
    fn state(&self, instance: &ExposeSpec) -> InstanceState {
        if self.out.maintenance.contains_key(&instance.id) {
            InstanceState::Maint
        } else if self.out.draining.contains(&instance.id) {
            InstanceState::Draining
        } else if self.is_failing(instance) {
            InstanceState::Failing
        } else {
            InstanceState::Ready
        }
    }

    /// What is offered, as told to the data plane.
    pub fn targets(&self) -> Vec<LocalInstance> {
        let target = |instance: &ExposeSpec| LocalInstance {
            id: instance.id.clone(),
            service: instance.service.clone(),
            target: instance.to.clone(),
            state: match self.state(instance) {
                InstanceState::Ready if self.out.node_draining => InstanceState::Draining,
                state => state,
            },
            hard_limit: instance.inflight.hard,
            proxy_protocol: instance.proxy_protocol,
        };
        self.offered().map(target).collect()
    }
}

fn check_tags(tags: &[String]) -> Result<(), LocalError> {
    if tags.len() > TAGS_MAX {
        return Err(LocalError::TooManyTags(tags.len()));
    }
    let is_good = |tag: &String| {
        (1..=TAG_LEN_MAX).contains(&tag.len())
            && tag.chars().all(|c| c.is_ascii_graphic() && c != ',')
    };
    match tags.iter().find(|tag| !is_good(tag)) {
        Some(tag) => Err(LocalError::Tag(tag.chars().take(TAG_LEN_MAX).collect())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(service: &str, to: &str) -> ExposeSpec {
        ExposeSpec::new(service.parse().unwrap(), to.parse().unwrap()).unwrap()
    }

    #[test]
    fn the_same_id_again_replaces_and_the_bound_holds() {
        let mut local = LocalServices::default();
        local.expose(spec("web", "127.0.0.1:80")).unwrap();
        local.expose(spec("web", "127.0.0.1:81")).unwrap();
        assert_eq!(local.offers().len(), 1);
        assert_eq!(local.offers()[0].record.port, 81);
        for number in 1..INSTANCES_MAX {
            local.expose(spec(&format!("web-{number}"), "127.0.0.1:80")).unwrap();
        }
        assert_eq!(local.expose(spec("one-more", "127.0.0.1:80")), Err(LocalError::TooMany));
    }

    #[test]
    fn a_member_exposes_only_what_it_was_enrolled_for() {
        let mut local =
            LocalServices::new(Some(vec!["db".parse().unwrap()]), OutOfRotation::default());
        local.expose(spec("db", "127.0.0.1:5432")).unwrap();
        let refused = local.expose(spec("web", "127.0.0.1:80")).unwrap_err();
        assert_eq!(refused.to_string(), "this member was enrolled for db, not for 'web'");
    }

    #[test]
    fn maintenance_holds_over_a_new_exposure_and_ends_with_the_instance() {
        let id: InstanceId = "web".parse().unwrap();
        let disk = || Maintenance::Begin(Some("disk".to_owned()));
        let mut local = LocalServices::default();
        assert_eq!(local.maintain(&id, Maintenance::End), Err(LocalError::Unknown(id.clone())));
        let state =
            |local: &LocalServices| (local.offers()[0].record.state, local.targets()[0].state);
        local.expose(spec("web", "127.0.0.1:80")).unwrap();
        local.maintain(&id, disk()).unwrap();
        let again = local.maintain(&id, Maintenance::Begin(None)).unwrap();
        assert_eq!(again, Some("disk"), "who gives no reason leaves the one that was given");
        local.expose(spec("web", "127.0.0.1:81")).unwrap();
        assert_eq!(state(&local), (InstanceState::Maint, InstanceState::Maint));
        local.maintain(&id, Maintenance::End).unwrap();
        assert_eq!(state(&local), (InstanceState::Ready, InstanceState::Ready));

        local.maintain(&id, disk()).unwrap();
        local.unexpose(&id).unwrap();
        local.expose(spec("web", "127.0.0.1:80")).unwrap();
        assert_eq!(state(&local), (InstanceState::Ready, InstanceState::Ready));
    }

    #[test]
    fn an_instance_with_checks_takes_work_only_where_they_passed() {
        let mut local = LocalServices::default();
        let checked =
            |to: &str| ExposeSpec { checks: vec!["tcp".parse().unwrap()], ..spec("web", to) };
        local.expose(checked("127.0.0.1:80")).unwrap();
        let state = |local: &LocalServices| local.offers()[0].record.state;
        assert_eq!(state(&local), InstanceState::Failing);
        assert_eq!(local.ready().count(), 0);
        let passing = passing(&local);
        assert!(local.set_passing(passing.clone()));
        assert_eq!((state(&local), local.ready().count()), (InstanceState::Ready, 1));
        assert!(!local.set_passing(passing));
        local.expose(checked("127.0.0.1:81")).unwrap();
        assert_eq!(state(&local), InstanceState::Failing, "another one, and nobody looked yet");
        local.expose(spec("web", "127.0.0.1:81")).unwrap();
        assert_eq!(state(&local), InstanceState::Ready, "without checks nobody asks");
    }

    /// All checks pass, as far as they are made now.
    fn passing(local: &LocalServices) -> BTreeMap<InstanceId, CheckedAs> {
        local.checked().into_iter().map(|one| (one.id, one.known_as)).collect()
    }

    #[test]
    fn who_comes_back_takes_work_once_a_check_made_since_has_passed() {
        let id: InstanceId = "web".parse().unwrap();
        let checked =
            ExposeSpec { checks: vec!["tcp".parse().unwrap()], ..spec("web", "127.0.0.1:80") };
        type Step = fn(&mut LocalServices, &InstanceId);
        let ways: [(&str, Step, Step); 4] = [
            (
                "drain",
                |local, id| assert!(local.drain(Some(id)).unwrap()),
                |local, id| assert!(local.end_drain(Some(id)).unwrap()),
            ),
            (
                "drain of the agent",
                |local, _| assert!(local.drain(None).unwrap()),
                |local, _| assert!(local.end_drain(None).unwrap()),
            ),
            (
                "maint",
                |local, id| {
                    _ = local.maintain(id, Maintenance::Begin(Some("disk".to_owned()))).unwrap()
                },
                |local, id| _ = local.maintain(id, Maintenance::End).unwrap(),
            ),
            (
                "unexpose",
                |local, id| drop(local.unexpose(id).unwrap()),
                |local, _| {
                    let checks = vec!["tcp".parse().unwrap()];
                    local.expose(ExposeSpec { checks, ..spec("web", "127.0.0.1:80") }).unwrap();
                },
            ),
        ];
        for (way, goes, returns) in ways {
            let mut local = LocalServices::default();
            local.expose(checked.clone()).unwrap();
            local.expose(spec("free", "127.0.0.1:81")).unwrap();
            let before = passing(&local);
            local.set_passing(before.clone());
            assert_eq!(local.ready().count(), 2);
            goes(&mut local, &id);
            returns(&mut local, &id);
            assert!(!local.set_passing(before.clone()), "{way}: that was before");
            let ready: Vec<_> = local.ready().map(|one| one.id.as_str()).collect();
            assert_eq!(ready, ["free"], "{way}: what has no check is ready at once");
            assert!(local.set_passing(passing(&local)));
            assert_eq!(local.ready().count(), 2, "{way}");
            assert!(!local.end_drain(None).unwrap());
            local.maintain(&id, Maintenance::End).unwrap();
            assert_eq!(local.ready().count(), 2, "{way}: it was not away");
        }
    }

    #[test]
    fn two_checks_of_one_id_are_refused() {
        let mut local = LocalServices::default();
        let checked = |service: &str, checks: &[&str]| {
            let read = |check: &&str| serde_json::from_str(check).unwrap();
            let checks = checks.iter().map(read).collect();
            ExposeSpec { checks, ..spec(service, "127.0.0.1:80") }
        };
        let told = r#"{"ttl":"9s","id":"service:db"}"#;
        local.declare(checked("web", &[told])).unwrap();
        local.declare(checked("web", &[told])).unwrap();
        let refused = Err(LocalError::CheckId("service:db".to_owned()));
        assert_eq!(local.declare(checked("db", &[r#"{"tcp":true}"#])), refused);
        assert_eq!(local.declare(checked("web", &[told, told])), refused);
        local.declare(checked("db", &[r#"{"tcp":true}"#, r#"{"tcp":true}"#])).unwrap();
    }

    #[test]
    fn what_may_not_be_offered_is_withheld_and_back_when_it_may() {
        let mut local = LocalServices::default();
        local.expose(spec("db", "127.0.0.1:5432")).unwrap();
        local.expose(spec("web", "127.0.0.1:80")).unwrap();
        local.allow(Some(vec!["db".parse().unwrap()]));
        let ids = |specs: Vec<&ExposeSpec>| -> Vec<String> {
            specs.iter().map(|spec| spec.id.to_string()).collect()
        };
        assert_eq!(ids(local.offered().collect()), ["db"]);
        assert_eq!(ids(local.withheld().collect()), ["web"]);
        assert_eq!((local.offers().len(), local.targets().len()), (1, 1));
        local.allow(None);
        assert_eq!(ids(local.offered().collect()), ["db", "web"]);
        local.unexpose(&"web".parse().unwrap()).unwrap();
        assert_eq!(local.offers().len(), 1);
    }
}
