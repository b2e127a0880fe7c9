//! What the local API asks of its agent: commands with a reply, in one bounded queue.
//!
//! Listings never come this way: they read the snapshots of [`ApiState`](super::ApiState). The agent
//! owns the receiver and answers every command, also while it drains.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::balancer::{Balance, Prefer};
use crate::catalogue::REQUESTS_MAX;
use crate::health::CheckResult;
use crate::model::{
    Capacity, Entry, InstanceId, MemberId, MemberName, NameError, Protocol, PublicKey,
    RequestPattern, ServiceName, Target, Weight,
};
use crate::proxy::{
    Balancing, BreakerLimits, CHECKS_MAX, CallLimits, CheckSpec, EntryOptions, HashKey,
    ProxyProtocol, Retry, Timeouts,
};
use crate::transport::enrolment::{InviteOptions, InviteView, Parting};

/// How many commands may wait. People and deploy scripts write them one at a time; a queue that is
/// full means that the agent is stuck, and waiting longer would not help.
pub const CONTROL_QUEUE_LEN_MAX: usize = 64;

/// Most tags of one instance: they travel in its member's record.
pub const TAGS_MAX: usize = 16;

/// Highest weight: a hundred times the usual one.
pub const WEIGHT_MAX: u16 = 10_000;

/// Where one answer goes. Dropping it unsent tells the asker that the agent stops.
pub type Reply<T> = oneshot::Sender<Result<T, ControlError>>;

/// What the agent is asked to do.
#[derive(Debug)]
pub enum Control {
    /// Offer an instance to the mesh. The same id again replaces it.
    Expose {
        /// What to offer.
        spec: ExposeSpec,
        /// For how long.
        lifetime: Lifetime,
        /// What it replaces. Answered once the record is published, not once everybody has it.
        reply: Reply<Option<ExposeSpec>>,
    },
    /// Take an instance back: no new streams; those it has go on.
    Unexpose {
        /// Which.
        id: InstanceId,
        /// [`ControlError::NotFound`] when nothing has that id.
        reply: Reply<()>,
    },
    /// Take an instance out of rotation, or back in; those calls that it has go on. Lasts over
    /// restarts, and until it is taken back or in.
    Maintain {
        /// Which.
        id: InstanceId,
        /// Out or in.
        maintenance: Maintenance,
        /// [`ControlError::NotFound`] when nothing has that id.
        reply: Reply<()>,
    },
    /// Say for an application how it is.
    TellCheck {
        /// The id of a check with a ttl.
        check: String,
        /// How it is.
        result: CheckResult,
        /// For people.
        output: String,
        /// [`ControlError::NotFound`] when no check has that id, [`ControlError::Conflict`] when the
        /// agent runs it itself.
        reply: Reply<()>,
    },
    /// Take this member or an instance of it out of rotation, or back in; those calls that it has go
    /// on. Lasts over restarts, and until it is taken back in.
    Drain {
        /// Which instance; the whole member when absent.
        instance: Option<InstanceId>,
        /// Out or in.
        drain: Drain,
        /// Answered once nothing new is taken. [`ControlError::NotFound`] when nothing has that id,
        /// [`ControlError::LastReady`] when nobody else would serve.
        reply: Reply<()>,
    },
    /// Ask one more address for members of this mesh, until the agent stops.
    Join {
        /// An IP address, with the mesh port unless it says another.
        address: String,
        /// Answered once it will be asked, not once somebody has answered there.
        reply: Reply<()>,
    },
    /// Open a local entry to a service, which need not exist yet.
    Upstream {
        /// Which service, and where to listen.
        spec: UpstreamSpec,
        /// For how long.
        lifetime: Lifetime,
        /// Answered once it listens, with the address it got (port 0 asks for any).
        reply: Reply<UpstreamSpec>,
    },
    /// Close local entries: new connections are refused, open ones go on.
    CloseUpstreams {
        /// Which.
        which: UpstreamSelector,
        /// Those closed; [`ControlError::NotFound`] when there was none.
        reply: Reply<Vec<UpstreamSpec>>,
    },
    /// Hide a member that is down or left from listings here, until it is back.
    Forget {
        /// Its name, or its id.
        node: String,
        /// [`ControlError::NotFound`] when nobody is called so, [`ControlError::Conflict`] when it
        /// lives.
        reply: Reply<()>,
    },
    /// Read the configuration files again.
    Reload {
        /// What that changed; [`ControlError::Invalid`] with every fault when nothing did.
        reply: Reply<Reloaded>,
    },
    /// Say goodbye for good and stop. Lasts over restarts.
    Leave {
        /// Answered once no agent can start here any more; this one then drains, says so and ends.
        reply: Reply<()>,
    },
    /// Make an invite.
    Invite {
        /// Its limits.
        options: InviteOptions,
        /// The token; [`ControlError::NotIssuer`] on a member that may not.
        reply: Reply<InviteMade>,
    },
    /// The invites that this member made.
    Invites {
        /// Open, used up and expired ones.
        reply: Reply<Vec<InviteView>>,
    },
    /// Ask a member for the public half of its issuing key.
    IssuingKey {
        /// Which member.
        name: MemberName,
        /// Its id and key; [`ControlError::NotFound`] when it is not there.
        reply: Reply<(MemberId, PublicKey)>,
    },
    /// Vouch for the members that only this issuer vouches for.
    KeepMembers {
        /// The hash of its issuing key.
        issuer: MemberId,
        /// Those that it let in and that are to go with it, by their names or ids.
        dropped: Vec<MemberName>,
        /// What becomes of all that it let in; [`ControlError::NotIssuer`] on a member that may not.
        reply: Reply<Parting>,
    },
    /// Say what a member may offer.
    Grant {
        /// Which member.
        name: MemberName,
        /// Everything when absent.
        services: Option<Vec<ServiceName>>,
        /// Which of its services that takes out of the mesh; [`ControlError::NotFound`] when nobody
        /// is enrolled under that name.
        reply: Reply<Vec<ServiceName>>,
    },
    /// Spread an entry that was signed elsewhere.
    Publish {
        /// By whoever may.
        entry: Entry,
        /// [`ControlError::Invalid`] when nobody would believe it.
        reply: Reply<()>,
    },
    /// Take an invite back; who joined with it stays.
    RevokeInvite {
        /// Which.
        id: MemberId,
        /// [`ControlError::NotFound`] when none has that id.
        reply: Reply<()>,
    },
}

impl Control {
    /// Sends the command that `make` builds around a reply channel and waits for the answer.
    ///
    /// Cancel safe: the agent does what was sent, the answer is lost.
    pub async fn ask<T>(
        queue: &mpsc::Sender<Self>,
        make: impl FnOnce(Reply<T>) -> Self,
    ) -> Result<T, ControlError> {
        let (reply, answer) = oneshot::channel();
        queue.try_send(make(reply)).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => ControlError::Busy,
            mpsc::error::TrySendError::Closed(_) => ControlError::Stopping,
        })?;
        answer.await.unwrap_or(Err(ControlError::Stopping))
    }
}

/// Which way a maintenance goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Maintenance {
    /// Out of rotation, for this reason; for that of before, or none that is known, when absent.
    Begin(Option<String>),
    /// Back in.
    End,
}

/// Which way a drain goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// Out of rotation, unless a service would then have no instance that is ready.
    Begin,
    /// Out of rotation, whatever that leaves.
    Force,
    /// Back in.
    End,
}

/// What its operator took out of rotation on this machine, exposed now or not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutOfRotation {
    /// All of it: the whole member drains.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub node_draining: bool,
    /// Instances that finish what they have.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub draining: BTreeSet<InstanceId>,
    /// Instances in maintenance, and why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub maintenance: BTreeMap<InstanceId, String>,
}

impl OutOfRotation {
    /// Whether instance `id` drains, by itself or with the whole member.
    pub fn is_draining(&self, id: &InstanceId) -> bool {
        self.node_draining || self.draining.contains(id)
    }

    /// Whether instance `id` takes no new calls.
    pub fn contains(&self, id: &InstanceId) -> bool {
        self.is_draining(id) || self.maintenance.contains_key(id)
    }
}

/// How long something holds that nobody takes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// Until the agent stops: whoever asked will ask again.
    Run,
    /// Across restarts: it is kept in the data directory.
    Restarts,
}

/// An instance to offer: an `[[expose]]` of a file, `murmesh expose`, or the body of
/// `POST /v1/mesh/expose`. Unknown fields are let pass, because a later version's runtime file is
/// read with this, too; what people write is checked where it comes in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExposeSpec {
    /// The service it belongs to.
    #[serde(rename = "name")]
    pub service: ServiceName,
    /// Unique on this machine; the service's name unless set.
    pub id: InstanceId,
    /// Where it listens.
    pub to: Target,
    /// The natural port of the service; that of `to` unless set, 0 when a unix socket has none.
    pub port: u16,
    /// What it speaks. [`Protocol::Udp`] does not get past [`check`](Self::check) in this version.
    #[serde(default)]
    pub protocol: Protocol,
    /// Free words, for instance `v2`: at most [`TAGS_MAX`].
    #[serde(default)]
    pub tags: Vec<String>,
    /// Its share; 100 unless set, 0 takes no new work.
    #[serde(default)]
    pub weight: Weight,
    /// Requests of HTTP that it may get twice and does the same: at most [`REQUESTS_MAX`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub idempotent: Vec<RequestPattern>,
    /// How many calls it takes at a time: as many as come unless set.
    #[serde(default, skip_serializing_if = "Capacity::is_unlimited")]
    pub inflight: Capacity,
    /// How it is told who calls: not at all unless set. It must expect that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_protocol: Option<ProxyProtocol>,
    /// All of these must pass, or it takes no work: at most [`CHECKS_MAX`]. None: it is taken for well.
    #[serde(
        default,
        rename = "health",
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "one_or_more"
    )]
    pub checks: Vec<CheckSpec>,
}

/// One of these, or a list of them.
pub(super) fn one_or_more<'de, T, D>(from: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct OneOrMore<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for OneOrMore<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map or a list of maps")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map)).map(|one| vec![one])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<T>, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(seq))
        }
    }
    from.deserialize_any(OneOrMore(PhantomData))
}

impl ExposeSpec {
    /// An instance of `service` at `to`, everything else by default.
    ///
    /// ```
    /// use murmesh::{ExposeSpec, Weight};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let plain = ExposeSpec::new("web".parse()?, "127.0.0.1:8080".parse()?)?;
    /// assert_eq!((plain.id.as_str(), plain.weight), ("web", Weight(100)));
    /// let second = ExposeSpec { id: "web-2".parse()?, tags: vec!["v2".into()], ..plain };
    /// # assert_eq!(second.port, 8080);
    /// # Ok(())
    /// # }
    /// ```
    pub fn new(service: ServiceName, to: Target) -> Result<Self, NameError> {
        Ok(Self {
            id: InstanceId::try_new(service.as_str())?,
            service,
            port: to.port().unwrap_or(0),
            to,
            protocol: Protocol::Tcp,
            tags: Vec::new(),
            weight: Weight::default(),
            idempotent: Vec::new(),
            inflight: Capacity::default(),
            proxy_protocol: None,
            checks: Vec::new(),
        })
    }

    /// The same without what may be a secret: for whoever has no token.
    pub fn without_secrets(mut self) -> Self {
        self.checks = self.checks.into_iter().map(CheckSpec::without_secrets).collect();
        self
    }

    /// What is different from `before`, for people: `weight 100 -> 50`. Empty when nothing is.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let words = |spec: &Self| {
            let tags = spec.tags.join(",");
            let tags = if tags.is_empty() { "none".to_owned() } else { tags };
            let limit = |limit: Option<u32>| limit.map_or("none".to_owned(), |l| l.to_string());
            let idempotent: Vec<_> = spec.idempotent.iter().map(RequestPattern::as_str).collect();
            [
                ("service", spec.service.to_string()),
                ("to", spec.to.to_string()),
                ("port", spec.port.to_string()),
                ("protocol", spec.protocol.to_string()),
                ("tags", tags),
                ("weight", spec.weight.0.to_string()),
                ("proxy_protocol", spec.proxy_protocol.map_or("none", |_| "v2").to_owned()),
                ("inflight.soft", limit(spec.inflight.soft)),
                ("inflight.hard", limit(spec.inflight.hard)),
                ("idempotent", format!("{:?}", idempotent.join(", "))),
            ]
        };
        let pairs = words(before).into_iter().zip(words(self));
        let changed = pairs.filter(|((_, old), (_, new))| old != new);
        let mut changes: Vec<_> =
            changed.map(|((name, old), (_, new))| format!("{name} {old} -> {new}")).collect();
        if before.checks != self.checks {
            let summary = |spec: &Self| match spec.checks.is_empty() {
                true => "none".to_owned(),
                false => spec.checks.iter().map(CheckSpec::summary).collect::<Vec<_>>().join(", "),
            };
            changes.push(match (summary(before), summary(self)) {
                (old, new) if old == new => format!("health {new}, otherwise"),
                (old, new) => format!("health {old} -> {new}"),
            });
        }
        changes
    }

    /// Refuses what this version cannot do and what does not fit a record.
    pub fn check(self) -> Result<Self, SpecError> {
        if self.protocol == Protocol::Udp {
            return Err(SpecError::Protocol(self.protocol));
        }
        if self.tags.len() > TAGS_MAX {
            return Err(SpecError::Tags(self.tags.len()));
        }
        if self.idempotent.len() > REQUESTS_MAX {
            return Err(SpecError::Idempotent(self.idempotent.len()));
        }
        if self.protocol == Protocol::Tcp && !self.idempotent.is_empty() {
            return Err(SpecError::NoRequests);
        }
        if self.checks.len() > CHECKS_MAX {
            return Err(SpecError::Checks(self.checks.len()));
        }
        if self.weight.0 > WEIGHT_MAX {
            return Err(SpecError::Weight(self.weight.0));
        }
        check_capacity(&self.inflight)?;
        for tag in &self.tags {
            check_tag(tag)?;
        }
        Ok(self)
    }
}

/// Tags have the form of names: they become labels of DNS names.
pub fn check_tag(tag: &str) -> Result<(), SpecError> {
    InstanceId::try_new(tag).map(drop).map_err(SpecError::Tag)
}

/// An instance takes at least one call, and goes full before it refuses.
pub fn check_capacity(capacity: &Capacity) -> Result<(), SpecError> {
    let Capacity { soft, hard } = *capacity;
    let is_sound = soft.unwrap_or(1).min(hard.unwrap_or(1)) > 0
        && soft.zip(hard).is_none_or(|(soft, hard)| soft <= hard);
    if is_sound { Ok(()) } else { Err(SpecError::Capacity(*capacity)) }
}

/// A local entry to a service: an `[[upstream]]` of a file, `murmesh upstream`, or the body of
/// `POST /v1/mesh/upstream`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamSpec {
    /// Where connections go.
    pub service: ServiceName,
    /// Where this machine's applications connect.
    pub listen: Target,
    /// How long its calls may take.
    #[serde(default, skip_serializing_if = "Timeouts::is_default")]
    pub timeout: Timeouts,
    /// How often one may be tried.
    #[serde(default, skip_serializing_if = "Retry::is_default")]
    pub retry: Retry,
    /// How instances are chosen.
    #[serde(default, skip_serializing_if = "Balance::is_default")]
    pub balance: Balance,
    /// How near they are to be, nearest first.
    #[serde(default, skip_serializing_if = "Prefer::is_empty")]
    pub prefer: Prefer,
    /// What keeps calls together, with [`Balance::Maglev`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<HashKey>,
    /// When this member stops calling an instance of the service.
    #[serde(default, skip_serializing_if = "BreakerLimits::is_default")]
    pub breaker: BreakerLimits,
}

impl UpstreamSpec {
    /// An entry to `service` at `listen`, everything else by default.
    pub fn new(service: ServiceName, listen: Target) -> Self {
        Self {
            service,
            listen,
            timeout: Timeouts::default(),
            retry: Retry::default(),
            balance: Balance::default(),
            prefer: Prefer::default(),
            hash: None,
            breaker: BreakerLimits::default(),
        }
    }

    /// How its calls are made.
    pub fn options(&self) -> EntryOptions {
        let limits = CallLimits { timeout: self.timeout.clone(), retry: self.retry.clone() };
        let hash = self.hash.clone().unwrap_or_default();
        let balancing = Balancing { balance: self.balance, prefer: self.prefer, hash };
        let breaker = Some(self.breaker.clone()).filter(|breaker| !breaker.is_default());
        EntryOptions { source: None, limits, balancing, breaker }
    }

    /// Refuses an entry that other machines could reach, and what contradicts itself.
    pub fn check(self) -> Result<Self, SpecError> {
        let fault = balancing_fault(self.balance, self.prefer, self.hash.as_ref());
        if let Some((_, fault)) = fault {
            return Err(SpecError::Balancing(fault));
        }
        match &self.listen {
            Target::Tcp(address) if !address.ip().is_loopback() => {
                Err(SpecError::Public(self.listen.clone()))
            }
            _ => Ok(self),
        }
    }
}

/// The key that contradicts the balancer, and why.
pub fn balancing_fault(
    balance: Balance,
    prefer: Prefer,
    hash: Option<&HashKey>,
) -> Option<(&'static str, &'static str)> {
    match balance == Balance::Maglev {
        false if hash.is_some() => Some(("hash", "hash means nothing without balance \"maglev\"")),
        true if !prefer.is_empty() => Some((
            "prefer",
            "prefer means nothing with balance \"maglev\": the key says where calls go",
        )),
        _ => None,
    }
}

/// An instance or entry that this version cannot offer. Fault: whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Of a later version.
    #[error(
        "protocol '{0}' is not available yet in this version, use 'tcp', 'http', 'h2' or 'grpc'"
    )]
    Protocol(Protocol),
    /// There are this many.
    #[error("{0} tags are too many, at most {TAGS_MAX} are allowed")]
    Tags(usize),
    /// One of them is malformed.
    #[error("tag: {0}")]
    Tag(NameError),
    /// There are this many.
    #[error("{0} patterns of idempotent requests are too many, at most {REQUESTS_MAX} are allowed")]
    Idempotent(usize),
    /// Of TCP, which has none.
    #[error(
        "idempotent means requests, and protocol 'tcp' has none: say --protocol http, h2 or grpc, too"
    )]
    NoRequests,
    /// There are this many.
    #[error("{0} checks are too many, at most {CHECKS_MAX} are allowed")]
    Checks(usize),
    /// It would drown all others.
    #[error("weight {0} is over {WEIGHT_MAX}")]
    Weight(u16),
    /// It would take nothing, or refuse before it is full.
    #[error("inflight: {0}: expected each at least 1, and soft at most hard")]
    Capacity(Capacity),
    /// Two keys contradict each other.
    #[error("{0}")]
    Balancing(&'static str),
    /// Other machines could reach the entry.
    #[error("'{0}' is no loopback address; an entry for other machines is not available yet")]
    Public(Target),
}

/// Which local entries are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UpstreamSelector {
    /// All of a service.
    Service(ServiceName),
    /// The one that listens there.
    Listen(Target),
}

impl UpstreamSelector {
    /// Whether `spec` is meant.
    pub fn selects(&self, spec: &UpstreamSpec) -> bool {
        match self {
            Self::Service(service) => spec.service == *service,
            Self::Listen(listen) => spec.listen == *listen,
        }
    }
}

/// What reading the files again came to, in words for people.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// What is different now.
    pub applied: Vec<String>,
    /// What the files say and only the next start does.
    pub needs_restart: Vec<String>,
}

/// A new invite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InviteMade {
    /// To list or revoke it by.
    pub id: MemberId,
    /// What the newcomer needs. A secret.
    pub token: String,
    /// Unix seconds.
    pub expires_at: u64,
}

/// The agent did not do what it was asked. Nothing changed, unless said otherwise.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Fault: whoever asked.
    #[error("there is no {what} '{name}' here")]
    NotFound {
        /// `instance`, `upstream`, `invite`, `living member`.
        what: &'static str,
        /// As asked.
        name: String,
    },
    /// Fault: whoever asked. For instance an id or an address that a file has already taken.
    #[error("{0}")]
    Conflict(String),
    /// Fault: whoever asked, or this machine: an address in use, a directory that cannot be written.
    #[error("{0}")]
    Invalid(String),
    /// Fault: whoever asked. Its enrolment does not let this member do it.
    #[error("{0}")]
    NotPermitted(String),
    /// Fault: whoever asked, unless it is meant: nobody else would serve these.
    #[error("nobody else is ready to serve {}; callers would be refused", names(services))]
    LastReady {
        /// Never empty.
        services: Vec<ServiceName>,
    },
    /// Only issuers can; ask one.
    #[error(
        "this member is no issuer; run this where 'murmesh init' was run, or see murmesh issuer list"
    )]
    NotIssuer,
    /// The agent answers nothing any more. A retry after its restart is safe.
    #[error("the agent is stopping")]
    Stopping,
    /// Too many commands wait already. A retry is safe.
    #[error("the agent is busy with {CONTROL_QUEUE_LEN_MAX} other commands")]
    Busy,
    /// Fault: this machine. The text says what failed.
    #[error("{0}")]
    Failed(String),
}

fn names(services: &[ServiceName]) -> String {
    services.iter().map(ServiceName::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expose_takes_its_defaults_from_the_service() {
        let spec = ExposeSpec::new("web".parse().unwrap(), "127.0.0.1:8080".parse().unwrap());
        let spec = spec.unwrap();
        assert_eq!((spec.id.as_str(), spec.port, spec.weight), ("web", 8080, Weight(100)));
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<ExposeSpec>(&text).unwrap(), spec);
    }

    #[tokio::test]
    async fn full_queue_and_stopped_agent_are_told_apart() {
        let (queue, commands) = mpsc::channel(1);
        queue.try_send(Control::Leave { reply: oneshot::channel().0 }).unwrap();
        let leave = |reply| Control::Leave { reply };
        assert_eq!(Control::ask(&queue, leave).await, Err(ControlError::Busy));
        drop(commands);
        assert_eq!(Control::ask(&queue, leave).await, Err(ControlError::Stopping));
    }
}
