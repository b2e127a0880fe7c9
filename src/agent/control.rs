//! Does what the local API asks, one command at a time, and keeps on disk what must survive.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{Mutex, mpsc, watch};
use tracing::{info, warn};

use super::ingress::Ingress;
use super::local::{LocalError, LocalServices};
use super::reload::Asked;
use super::{left, seeds};
use crate::api::{
    Control, ControlError, Doors, Effective, ExposeSpec, InviteMade, Lifetime, Local, Maintenance,
    UpstreamSelector, UpstreamSpec,
};
use crate::config::{RuntimeFile, Seed, Settings};
use crate::mesh::Snapshot;
use crate::model::{
    Entry, InstanceId, MemberId, MemberName, MemberState, PublicKey, ServiceName, Target,
};
use crate::proxy::{HealthChecks, Proxy, Reports, WordError};
use crate::telemetry::{AccessLog, EventKind, EventLog};
use crate::tls::store::DataDir;
use crate::transport::Endpoint;
use crate::transport::enrolment::renewal::{Door, ask_issuing_key};
use crate::transport::enrolment::{DeskError, InviteOptions, InviteView, IssuerDesk};
use crate::transport::gossip::GossipHandle;

/// Local entries that one agent may open.
const UPSTREAMS_MAX: usize = 256;

/// Addresses that may be named while an agent runs: one wrong script must not make it dial a
/// whole network for ever.
const JOINED_MAX: usize = 64;

/// Issuers that one token names: more would only make it longer.
const TOKEN_ISSUERS_MAX: usize = 4;

/// The desk behind the API's commands.
pub(super) struct Controller {
    pub(super) dir: DataDir,
    pub(super) services: LocalServices,
    pub(super) upstreams: Vec<UpstreamSpec>,
    /// The public gateway, where it is open.
    pub(super) ingress: Option<Ingress>,
    /// The entries by name, as they listen.
    pub(super) doors: Doors,
    /// What holds of flags and files, all but instances and entries that the CLI changed since.
    pub(super) settings: Settings,
    /// Where requests are written down, if anywhere.
    pub(super) access_log: Option<AccessLog>,
    /// The same for the local API.
    pub(super) effective: Arc<ArcSwap<Effective>>,
    /// Entries of flags and files.
    pub(super) asked: Vec<Asked>,
    /// Whom to ask first, for those whose names are looked up.
    pub(super) seeds: watch::Sender<Vec<Seed>>,
    /// What the CLI added; files own the rest.
    pub(super) runtime: RuntimeFile,
    /// Addresses that were named to be asked: each is dialled until the agent stops.
    pub(super) joined: BTreeSet<SocketAddr>,
    pub(super) view: watch::Sender<Arc<Local>>,
    pub(super) proxy: Proxy,
    pub(super) health: HealthChecks,
    /// What its checks say, as it changes.
    pub(super) reports: watch::Receiver<Arc<Reports>>,
    pub(super) gossip: GossipHandle,
    pub(super) desk: Arc<Mutex<IssuerDesk>>,
    pub(super) me: MemberId,
    pub(super) name: MemberName,
    /// What this member may offer, as its newest leaf says; all when absent.
    pub(super) allowed: watch::Receiver<Option<Vec<ServiceName>>>,
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    /// The same, as it changes.
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    /// To ask other members.
    pub(super) endpoint: Endpoint,
    /// Where newcomers knock.
    pub(super) advertise: watch::Receiver<SocketAddr>,
    pub(super) events: EventLog,
    /// Set once somebody asked this member to leave for good.
    pub(super) leaving: watch::Sender<bool>,
}

impl Controller {
    /// Answers commands until nobody can ask any more.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Control>) {
        loop {
            tokio::select! {
                biased;
                Ok(()) = self.allowed.changed() => self.keep_to_allowed().await,
                Ok(()) = self.reports.changed() => self.keep_to_checks().await,
                Ok(()) = self.snapshots.changed(), if !self.runtime.forgotten.is_empty() => {
                    self.remember_returned();
                }
                command = commands.recv() => match command {
                    Some(command) => self.answer(command).await,
                    None => return,
                },
            }
        }
    }

    /// Takes instances out whose checks fail, and in those whose checks pass.
    async fn keep_to_checks(&mut self) {
        let reports = Arc::clone(&self.reports.borrow_and_update());
        let passing = reports.iter().filter(|(_, report)| report.reason.is_none());
        let passing = passing.map(|(id, report)| (id.clone(), report.known_as.clone())).collect();
        if self.services.set_passing(passing) {
            self.publish().await;
        }
    }

    /// Withholds what this member may not offer any more, and offers again what it may.
    async fn keep_to_allowed(&mut self) {
        let allowed = self.allowed.borrow_and_update().clone();
        let mut reason = match &allowed {
            None => "may offer every service".to_owned(),
            Some(allowed) => format!("may offer {}", names(allowed)),
        };
        self.services.allow(allowed);
        let withheld = ids(self.services.withheld());
        if !withheld.is_empty() {
            reason += &format!("; withheld: {withheld}");
        }
        self.events.record(EventKind::ServicesGranted, &self.name, reason);
        self.publish().await;
    }

    async fn answer(&mut self, command: Control) {
        // An asker that is gone does not need its answer: what it asked for is done all the same.
        match command {
            Control::Expose { spec, lifetime: Lifetime::Run, reply } => {
                drop(reply.send(self.expose(spec).await));
            }
            Control::Expose { spec, lifetime: Lifetime::Restarts, reply } => {
                drop(reply.send(self.expose_and_keep(spec).await));
            }
            Control::Unexpose { id, reply } => drop(reply.send(self.unexpose(&id).await)),
            Control::Maintain { id, maintenance, reply } => {
                drop(reply.send(self.maintain(&id, maintenance).await));
            }
            Control::Drain { instance, drain, reply } => {
                drop(reply.send(self.drain(instance.as_ref(), drain).await));
            }
            Control::TellCheck { check, result, output, reply } => {
                let told = self.health.tell(check.clone(), result, output).await;
                drop(reply.send(told.map_err(|error| word_error(error, check))));
            }
            Control::Join { address, reply } => drop(reply.send(self.join(&address).await)),
            Control::Upstream { spec, lifetime: Lifetime::Run, reply } => {
                drop(reply.send(self.open(spec).await));
            }
            Control::Upstream { spec, lifetime: Lifetime::Restarts, reply } => {
                drop(reply.send(self.open_and_keep(spec).await));
            }
            Control::CloseUpstreams { which, reply } => {
                drop(reply.send(self.close_upstreams(&which).await));
            }
            Control::Forget { node, reply } => drop(reply.send(self.forget(&node))),
            Control::Reload { reply } => drop(reply.send(self.reload().await)),
            Control::Leave { reply } => drop(reply.send(self.leave())),
            Control::Invite { options, reply } => drop(reply.send(self.invite(options).await)),
            Control::Invites { reply } => drop(reply.send(self.invites().await)),
            Control::IssuingKey { name, reply } => {
                drop(reply.send(self.issuing_key(name).await));
            }
            Control::KeepMembers { issuer, dropped, reply } => {
                let kept = self.desk.lock().await.keep_members(issuer, &dropped).await;
                drop(reply.send(kept.map_err(desk_error)));
            }
            Control::Grant { name, services, reply } => {
                drop(reply.send(self.grant(name, services).await));
            }
            Control::Publish { entry, reply } => drop(reply.send(self.publish_entry(entry).await)),
            Control::RevokeInvite { id, reply } => drop(reply.send(self.revoke_invite(id).await)),
        }
    }

    /// Offers an instance; a restart forgets it. Returns the one that it replaces.
    pub(super) async fn expose(
        &mut self,
        spec: ExposeSpec,
    ) -> Result<Option<ExposeSpec>, ControlError> {
        check_loop(&spec.to, self.listeners())?;
        let replaced = self.services.expose(spec.clone()).map_err(local_error)?;
        info!(instance = %spec.id, service = %spec.service, to = %spec.to, "exposed");
        self.publish().await;
        Ok(replaced)
    }

    async fn expose_and_keep(
        &mut self,
        spec: ExposeSpec,
    ) -> Result<Option<ExposeSpec>, ControlError> {
        let replaced = self.expose(spec.clone()).await?;
        if self.runtime.expose.contains(&spec) {
            return Ok(replaced); // some clients say it again and again: no work for the disk
        }
        self.runtime.expose.retain(|kept| kept.id != spec.id);
        self.runtime.expose.push(spec);
        self.keep()?;
        Ok(replaced)
    }

    async fn unexpose(&mut self, id: &InstanceId) -> Result<(), ControlError> {
        self.services.unexpose(id).map_err(local_error)?;
        self.publish().await;
        self.runtime.expose.retain(|kept| kept.id != *id);
        self.keep()
    }

    async fn maintain(
        &mut self,
        id: &InstanceId,
        maintenance: Maintenance,
    ) -> Result<(), ControlError> {
        let told = match self.services.maintain(id, maintenance).map_err(local_error)? {
            Some(reason) => format!("taken out for maintenance: {reason}"),
            None => "back from maintenance".to_owned(),
        };
        self.events.record(EventKind::InstanceChanged, id, told);
        self.publish().await;
        self.keep()
    }

    async fn join(&mut self, address: &str) -> Result<(), ControlError> {
        let invalid = |error: &dyn ToString| ControlError::Invalid(error.to_string());
        let seed: Seed = address.parse().map_err(|error| invalid(&error))?;
        let Some(address) = seeds::literal(&[seed]).pop() else {
            let text = "names are looked up for join.seeds only, expected an IP address here";
            return Err(ControlError::Invalid(text.to_owned()));
        };
        if !self.joined.contains(&address) && self.joined.len() >= JOINED_MAX {
            let text = format!("{JOINED_MAX} addresses were named already, as many as one may");
            return Err(ControlError::Conflict(text));
        }
        self.joined.insert(address);
        self.gossip.add_seed(address).await;
        Ok(())
    }

    /// Opens a local entry; a restart forgets it.
    pub(super) async fn open(&mut self, spec: UpstreamSpec) -> Result<UpstreamSpec, ControlError> {
        if let Some(open) = self.upstreams.iter().find(|open| open.listen == spec.listen) {
            return match open.service == spec.service {
                true => Ok(spec),
                false => Err(ControlError::Conflict(format!(
                    "{} is already the upstream of service '{}'; close it first \
                     (murmesh upstream {} {} --off)",
                    spec.listen, open.service, open.service, open.listen
                ))),
            };
        }
        if self.upstreams.len() >= UPSTREAMS_MAX {
            let text = format!("{UPSTREAMS_MAX} upstreams are open, as many as one agent may");
            return Err(ControlError::Conflict(text));
        }
        if let Some(own) = self.services.declared().find(|own| reaches(&own.to, &spec.listen)) {
            return Err(ControlError::Conflict(format!(
                "{} is where this machine's instance '{}' listens: the entry would lead to itself",
                spec.listen, own.id
            )));
        }
        let (service, options) = (spec.service.clone(), spec.options());
        let opened = self.proxy.open_upstream(service.clone(), spec.listen.clone(), options).await;
        let listen = opened.map_err(|error| ControlError::Invalid(error.to_string()))?;
        info!(%service, %listen, "upstream open");
        self.events.record(EventKind::EntryOpened, &service, format!("listens on {listen}"));
        let spec = UpstreamSpec { listen, ..spec };
        self.upstreams.push(spec.clone());
        self.show();
        Ok(spec)
    }

    async fn open_and_keep(&mut self, spec: UpstreamSpec) -> Result<UpstreamSpec, ControlError> {
        let others = |open: &&UpstreamSpec| {
            open.service == spec.service && open.listen != spec.listen && !open.breaker.is_default()
        };
        if let Some(open) = self.upstreams.iter().find(others)
            && !spec.breaker.is_default()
            && spec.breaker != open.breaker
        {
            return Err(ControlError::Conflict(format!(
                "breaker: differs from that of {}: all upstreams of '{}' share its breakers",
                open.listen, spec.service
            )));
        }
        let spec = self.open_or_change(spec).await?;
        self.runtime.upstream.retain(|kept| kept.listen != spec.listen);
        self.runtime.upstream.push(spec.clone());
        self.keep()?;
        Ok(spec)
    }

    /// Opens a local entry; one that leads to the same service already is as `spec` says from now on.
    pub(super) async fn open_or_change(
        &mut self,
        spec: UpstreamSpec,
    ) -> Result<UpstreamSpec, ControlError> {
        let is_same = |open: &&UpstreamSpec| {
            open.listen == spec.listen && open.service == spec.service && **open != spec
        };
        let Some(before) = self.upstreams.iter().find(is_same).cloned() else {
            return self.open(spec).await;
        };
        self.redirect(&before, &spec).await?;
        self.show();
        Ok(spec)
    }

    async fn close_upstreams(
        &mut self,
        which: &UpstreamSelector,
    ) -> Result<Vec<UpstreamSpec>, ControlError> {
        let (closed, kept): (Vec<_>, Vec<_>) =
            self.upstreams.drain(..).partition(|spec| which.selects(spec));
        self.upstreams = kept;
        if closed.is_empty() {
            let name = match which {
                UpstreamSelector::Service(service) => service.to_string(),
                UpstreamSelector::Listen(listen) => listen.to_string(),
            };
            return Err(ControlError::NotFound { what: "upstream", name });
        }
        for spec in &closed {
            if let Err(error) = self.proxy.close_entry(spec.listen.clone()).await {
                warn!(listen = %spec.listen, %error, "entry was gone already");
            }
        }
        self.show();
        self.runtime.upstream.retain(|spec| !which.selects(spec));
        self.keep()?;
        Ok(closed)
    }

    /// Where this agent's own entries listen.
    fn listeners(&self) -> impl Iterator<Item = &Target> {
        self.upstreams.iter().map(|spec| &spec.listen).chain(self.doors.open())
    }

    /// The data plane first, so that whoever hears of an instance finds it.
    pub(super) async fn publish(&self) {
        self.health.check(self.services.checked());
        self.proxy.set_local(self.services.targets());
        self.gossip.set_offers(self.services.offers()).await;
        self.show();
    }

    pub(super) fn show(&self) {
        self.view.send_replace(Arc::new(Local {
            exposed: self.services.offered().cloned().collect(),
            withheld: self.services.withheld().cloned().collect(),
            upstreams: self.upstreams.clone(),
            doors: self.doors.clone(),
            out: self.services.out().clone(),
            failing: self.services.failing().collect(),
            forgotten: self.runtime.forgotten.clone(),
        }));
    }

    pub(super) fn keep(&mut self) -> Result<(), ControlError> {
        self.runtime.out.clone_from(self.services.out());
        self.runtime.save(&self.dir).map_err(|error| {
            warn!(%error, "what the command line added will not survive a restart");
            ControlError::Failed(format!("it works now but will not survive a restart: {error}"))
        })
    }

    /// Durable before it is said: whoever has left stays gone over every restart.
    fn leave(&self) -> Result<(), ControlError> {
        left::mark(&self.dir).map_err(|error| ControlError::Failed(error.to_string()))?;
        self.leaving.send_replace(true);
        Ok(())
    }

    async fn invite(&self, options: InviteOptions) -> Result<InviteMade, ControlError> {
        let expires_at = crate::runtime::clock::unix_seconds() + options.ttl.as_secs();
        let mut desk = self.desk.lock().await;
        let token = desk.invite(options, self.issuer_addresses()).await.map_err(desk_error)?;
        let id = token.key().map_err(|error| ControlError::Failed(error.to_string()))?;
        let id = crate::model::Signer::public_key(&id).member_id();
        Ok(InviteMade { id, token: token.to_string(), expires_at })
    }

    /// Asks a member for its issuing key, which need not exist yet.
    async fn issuing_key(&self, node: MemberName) -> Result<(MemberId, PublicKey), ControlError> {
        let snapshot = self.snapshot.load_full();
        let alive = snapshot.members.values().filter(|view| view.state == MemberState::Alive);
        let named = alive.map(|view| (view.id, &view.name));
        let id = only_member("living member", &node, named)?;
        let view = snapshot.members.get(&id).ok_or(ControlError::Stopping)?;
        if view.id == self.me {
            let key = self.desk.lock().await.issuing_key().await.map_err(desk_error)?;
            return Ok((view.id, key));
        }
        let door = Door { member: Some(view.id), address: view.address };
        let key = ask_issuing_key(&self.endpoint, door).await;
        key.map(|key| (view.id, key))
            .map_err(|error| ControlError::Failed(format!("{node}: {error}")))
    }

    /// Says what a member may offer. Returns which of its services that takes out of the mesh.
    async fn grant(
        &self,
        node: MemberName,
        services: Option<Vec<ServiceName>>,
    ) -> Result<Vec<ServiceName>, ControlError> {
        let snapshot = self.snapshot.load_full();
        let enrolled = snapshot.enrolments.iter();
        let named = enrolled.map(|(id, enrolled)| (*id, &enrolled.enrolment.name));
        let member = only_member("member", &node, named)?;
        let offered = snapshot.members.get(&member).into_iter();
        let is_over =
            |service: &&ServiceName| services.as_ref().is_some_and(|all| !all.contains(service));
        let withdrawn: Vec<_> =
            offered.flat_map(|view| &view.services).filter(is_over).cloned().collect();
        let mut reason = match &services {
            None => "may offer every service".to_owned(),
            Some(services) => format!("may offer {}", names(services)),
        };
        if !withdrawn.is_empty() {
            reason += &format!("; withdrawn: {}", names(&withdrawn));
        }
        self.desk.lock().await.grant(member, services).await.map_err(desk_error)?;
        self.events.record(EventKind::ServicesGranted, &node, reason);
        Ok(withdrawn)
    }

    async fn publish_entry(&self, entry: Entry) -> Result<(), ControlError> {
        let published = self.gossip.publish(entry).await.ok_or(ControlError::Stopping)?;
        published.map_err(ControlError::Invalid)
    }

    /// Where a newcomer may knock: here first, then at other living issuers.
    fn issuer_addresses(&self) -> Vec<SocketAddr> {
        let snapshot = self.snapshot.load();
        let others = snapshot.active_issuers().filter(|issuer| issuer.member != self.me);
        let others = others.filter_map(|issuer| snapshot.members.get(&issuer.member));
        let others = others.filter(|view| view.state == MemberState::Alive);
        let addresses = others.map(|view| view.address);
        [*self.advertise.borrow()].into_iter().chain(addresses).take(TOKEN_ISSUERS_MAX).collect()
    }

    async fn invites(&self) -> Result<Vec<InviteView>, ControlError> {
        self.desk.lock().await.invites().await.map_err(desk_error)
    }

    async fn revoke_invite(&self, id: MemberId) -> Result<(), ControlError> {
        self.desk.lock().await.revoke_invite(id).await.map_err(desk_error)
    }
}

/// Refuses an instance behind one of this agent's own entries.
pub(super) fn check_loop<'a>(
    to: &Target,
    mut listeners: impl Iterator<Item = &'a Target>,
) -> Result<(), ControlError> {
    match listeners.any(|listen| reaches(to, listen)) {
        true => Err(ControlError::Conflict(format!(
            "{to} is an entry of this agent: what it serves would lead back to itself"
        ))),
        false => Ok(()),
    }
}

/// The one member that is called so, or has this id: a name that two members have means neither.
fn only_member<'a>(
    what: &'static str,
    node: &MemberName,
    members: impl Iterator<Item = (MemberId, &'a MemberName)>,
) -> Result<MemberId, ControlError> {
    let meant = members.filter(|(id, name)| id.is_called(name, node));
    let meant: Vec<_> = meant.map(|(id, _)| id).collect();
    match meant[..] {
        [id] => Ok(id),
        [] => Err(ControlError::NotFound { what, name: node.to_string() }),
        _ => {
            let ids: Vec<_> = meant.iter().map(MemberId::to_string).collect();
            let text = format!(
                "{} members are called '{node}': say which by its id, {}",
                ids.len(),
                ids.join(" or ")
            );
            Err(ControlError::Conflict(text))
        }
    }
}

fn names(services: &[ServiceName]) -> String {
    services.iter().map(ServiceName::as_str).collect::<Vec<_>>().join(", ")
}

/// For people: the instances' ids.
pub(super) fn ids<'a>(instances: impl Iterator<Item = &'a ExposeSpec>) -> String {
    instances.map(|instance| instance.id.as_str()).collect::<Vec<_>>().join(", ")
}

/// Whether connecting to `target` on this machine reaches what listens at `listen`.
fn reaches(target: &Target, listen: &Target) -> bool {
    match (target, listen) {
        (Target::Tcp(target), Target::Tcp(listen)) => {
            let is_here = target.ip().is_loopback() || target.ip().is_unspecified();
            let is_same = target.ip() == listen.ip() || (is_here && listen.ip().is_unspecified());
            target.port() == listen.port() && is_same
        }
        (target, listen) => target == listen,
    }
}

pub(super) fn local_error(error: LocalError) -> ControlError {
    match error {
        LocalError::Unknown(id) => {
            ControlError::NotFound { what: "instance", name: id.to_string() }
        }
        LocalError::NotAllowed { .. } => ControlError::NotPermitted(error.to_string()),
        LocalError::TooMany | LocalError::TooLong { .. } | LocalError::CheckId(_) => {
            ControlError::Conflict(error.to_string())
        }
        other => ControlError::Invalid(other.to_string()),
    }
}

fn word_error(error: WordError, check: String) -> ControlError {
    match error {
        WordError::Unknown => ControlError::NotFound { what: "check", name: check },
        WordError::NotTold => ControlError::Conflict(format!("{check}: {error}")),
        WordError::Stopping => ControlError::Stopping,
    }
}

fn desk_error(error: DeskError) -> ControlError {
    match error {
        DeskError::NoInvite(id) => ControlError::NotFound { what: "invite", name: id.to_string() },
        DeskError::Stopping => ControlError::Stopping,
        DeskError::NoMember(name) => {
            ControlError::NotFound { what: "member", name: name.to_string() }
        }
        DeskError::NotIssuer => ControlError::NotIssuer,
        DeskError::TooManyInvites
        | DeskError::OwnWord
        | DeskError::OthersVouch(_)
        | DeskError::SeveralMembers { .. } => ControlError::Conflict(error.to_string()),
        other => ControlError::Failed(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_behind_an_own_entry_is_seen_as_the_loop_it_is() {
        let reaches = |target: &str, listen: &str| {
            super::reaches(&target.parse::<Target>().unwrap(), &listen.parse().unwrap())
        };
        assert!(reaches("127.0.0.1:5432", "127.0.0.1:5432"));
        assert!(reaches("127.0.0.1:5432", "0.0.0.0:5432"));
        assert!(reaches("unix:/run/db.sock", "unix:/run/db.sock"));
        for (target, listen) in [
            ("127.0.0.1:5432", "127.0.0.1:5433"),
            ("10.0.0.9:5432", "127.0.0.1:5432"),
            ("unix:/run/db.sock", "unix:/run/other.sock"),
            ("127.0.0.1:5432", "unix:/run/db.sock"),
        ] {
            assert!(!reaches(target, listen), "{target} {listen}");
        }
    }
}
