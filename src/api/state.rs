//! What the API's handlers see of the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::check::Checks;
use super::control::{Control, ExposeSpec, OutOfRotation, UpstreamSpec};
use crate::mesh::{Endpoint, NoEndpoint, Snapshot};
use crate::model::{InstanceId, MemberId, MemberName, MeshId, ServiceName, Target};
use crate::proxy::{Balancing, EndpointReport, Preview, Reports};
use crate::runtime::clock::Clock;
use crate::telemetry::{EventLog, Log, Metrics};
use crate::tls::NodeCredentials;
use crate::tls::public::PublicCertificates;
use crate::transport::LinkView;

/// What the API's handlers see of the agent. Cheap to clone; made once by the agent.
#[derive(Clone)]
pub struct ApiState {
    /// This member.
    pub me: MemberId,
    /// What people call it.
    pub name: MemberName,
    /// Its mesh.
    pub mesh: MeshId,
    /// The mesh as seen from here.
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    /// What this machine offers and opens.
    pub local: watch::Receiver<Arc<Local>>,
    /// Who this member proves to be; the agent stores a new one on every change.
    pub identity: Arc<ArcSwap<Identity>>,
    /// What this agent's own calls tell of each endpoint.
    pub calls: Calls,
    /// What the checks of this machine's instances say.
    pub health: watch::Receiver<Arc<Reports>>,
    /// The data connections to other members.
    pub links: Links,
    /// What the public gateway proves itself with; empty where there is none.
    pub certificates: Arc<PublicCertificates>,
    /// Calls instances, to see whether they take one.
    pub pinger: Pinger,
    /// Checks of this machine and its mesh.
    pub checks: Checks,
    /// The log of the process, where it has ours.
    pub log: LogSlot,
    /// Whether the data plane can serve.
    pub readiness: watch::Receiver<Readiness>,
    /// To the agent.
    pub control: mpsc::Sender<Control>,
    /// What happened.
    pub events: EventLog,
    /// Counters.
    pub metrics: Metrics,
    /// What holds of the settings; the agent stores a new one on every reload.
    pub effective: Arc<ArcSwap<Effective>>,
    /// The agent's clock, on which snapshots are dated. It started with the agent.
    pub clock: Clock,
    /// Opens what changes anything or tells secrets.
    pub token: ApiToken,
}

impl ApiState {
    /// The mesh as seen from here now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.borrow())
    }

    /// Whether the data plane can serve now, and others believe this member.
    pub fn readiness(&self) -> Readiness {
        match self.disowned() {
            Some(reason) => Readiness::NotReady(reason),
            None => self.readiness.borrow().clone(),
        }
    }

    /// Why the other members believe this one no more, if they do not: as it heard itself, or as they
    /// let it feel.
    pub fn disowned(&self) -> Option<&'static str> {
        let snapshot = self.snapshot();
        let is_known = snapshot.members.contains_key(&self.me);
        match () {
            () if snapshot.replaced.contains(&self.me) => {
                Some("another machine has taken the place of this one, and the others refuse it")
            }
            () if is_known && !snapshot.enrolments.contains_key(&self.me) => {
                Some("nobody vouches for this member any more, and the others refuse it")
            }
            () => self.identity.load().disowned,
        }
    }

    /// What the checks of this machine's instances say now.
    pub fn reports(&self) -> Arc<Reports> {
        Arc::clone(&self.health.borrow())
    }

    /// What this machine offers and opens now.
    pub fn local(&self) -> Arc<Local> {
        Arc::clone(&self.local.borrow())
    }
}

/// Who this member proves to be, and how well.
#[derive(Clone, Debug)]
pub struct Identity {
    /// In use for every new handshake.
    pub credentials: NodeCredentials,
    /// When the next leaf is asked for, in seconds since 1970.
    pub renews_at: u64,
    /// What is wrong with the certificates in use here; absent when nothing is.
    pub degraded: Option<String>,
    /// Why the other members believe this one no more; absent when they do, or nobody has said.
    pub disowned: Option<&'static str>,
}

/// Where clients reach services by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Doors {
    /// The HTTP gateway.
    pub gateway: Option<Target>,
    /// SOCKS5.
    pub socks: Option<Target>,
    /// The public gateway.
    pub public: Option<Target>,
    /// Where plain text is sent to it.
    pub redirect: Option<Target>,
}

impl Doors {
    /// All that are open.
    pub fn open(&self) -> impl Iterator<Item = &Target> {
        [&self.gateway, &self.socks, &self.public, &self.redirect].into_iter().flatten()
    }
}

/// What this machine offers and opens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// Its instances, ordered by id.
    pub exposed: Vec<ExposeSpec>,
    /// Instances that it may not offer now, ordered by id.
    pub withheld: Vec<ExposeSpec>,
    /// Its entries, with the addresses they really listen on.
    pub upstreams: Vec<UpstreamSpec>,
    /// Its entries by name, as they really listen.
    pub doors: Doors,
    /// What of it is out of rotation by its operator's word.
    pub out: OutOfRotation,
    /// Those whose checks do not pass, or have not yet since they came, or came back.
    pub failing: BTreeSet<InstanceId>,
    /// Members that listings here hide while they are down or left.
    pub forgotten: BTreeSet<MemberId>,
}

/// Whether the data plane can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It can.
    Ready,
    /// Not yet or no more, for this reason.
    NotReady(&'static str),
}

/// What holds of the settings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effective {
    /// How long a member that is gone stays in listings.
    pub forget_after: Duration,
    /// Every value and where it came from.
    pub settings: Vec<SettingView>,
}

/// One effective setting, as `config dump` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingView {
    /// For instance `listen.mesh`.
    pub key: String,
    /// What holds.
    pub value: serde_json::Value,
    /// `default`, `file:line`, `env NAME`, `flag --name` or `data_dir`.
    pub origin: String,
}

/// What this agent's own calls tell of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CallView {
    /// What they saw of it.
    pub report: EndpointReport,
    /// Why this agent would rather not call it, if a call went wrong a moment ago.
    pub trouble: Option<&'static str>,
}

/// Asks what calls tell.
#[derive(Clone)]
pub struct Calls {
    look: Arc<dyn Fn(&Endpoint) -> CallView + Send + Sync>,
    own: Arc<dyn Fn() -> BTreeMap<InstanceId, u64> + Send + Sync>,
    preview: Arc<PreviewCalls>,
}

type PreviewCalls = dyn Fn(&ServiceName, &Balancing) -> Result<Preview, NoEndpoint> + Send + Sync;

impl Calls {
    /// Asks `look` about an endpoint, `own` for the calls that this machine's instances have in flight,
    /// and `preview` where calls would go. None may block.
    pub fn new(
        look: impl Fn(&Endpoint) -> CallView + Send + Sync + 'static,
        own: impl Fn() -> BTreeMap<InstanceId, u64> + Send + Sync + 'static,
        preview: impl Fn(&ServiceName, &Balancing) -> Result<Preview, NoEndpoint>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        Self { look: Arc::new(look), own: Arc::new(own), preview: Arc::new(preview) }
    }

    /// Where calls of a service would go now through an entry that balances like this.
    pub fn preview(
        &self,
        service: &ServiceName,
        balancing: &Balancing,
    ) -> Result<Preview, NoEndpoint> {
        (self.preview)(service, balancing)
    }

    /// What this agent's own calls tell of `endpoint` now.
    pub fn of(&self, endpoint: &Endpoint) -> CallView {
        (self.look)(endpoint)
    }

    /// The calls that this machine's instances have in flight now, whoever called; those that have
    /// none are left out. One that was taken back is in it until its last call ends.
    pub fn own(&self) -> BTreeMap<InstanceId, u64> {
        (self.own)()
    }
}

/// Asks for the data connection that this member dialled to another one.
#[derive(Clone)]
pub struct Links(Arc<LookUpLink>);

type LookUpLink = dyn Fn(&MemberId) -> Option<LinkView> + Send + Sync;

impl Links {
    /// Asks `look`, which must not block.
    pub fn new(look: impl Fn(&MemberId) -> Option<LinkView> + Send + Sync + 'static) -> Self {
        Self(Arc::new(look))
    }

    /// That to `member`, if it is open.
    pub fn to(&self, member: &MemberId) -> Option<LinkView> {
        (self.0)(member)
    }
}

/// Calls of instances, to see whether they take one.
#[derive(Clone)]
pub struct Pinger(Arc<Ping>);

type Ping = dyn Fn(ServiceName, Endpoint) -> Pinging + Send + Sync;

/// How long it took, or why it was not taken.
pub type Pinging = BoxFuture<'static, Result<Duration, &'static str>>;

impl Pinger {
    /// Calls with `ping`.
    pub fn new(ping: impl Fn(ServiceName, Endpoint) -> Pinging + Send + Sync + 'static) -> Self {
        Self(Arc::new(ping))
    }

    /// Calls an instance once.
    pub async fn ping(
        &self,
        service: ServiceName,
        endpoint: Endpoint,
    ) -> Result<Duration, &'static str> {
        (self.0)(service, endpoint).await
    }
}

impl fmt::Debug for Pinger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pinger")
    }
}

/// The log of the process that the agent runs in: a program that embeds one may have its own.
#[derive(Clone, Debug, Default)]
pub struct LogSlot(Arc<OnceLock<Log>>);

impl LogSlot {
    /// From now on `log` is it. The first one stays.
    pub fn fill(&self, log: Log) {
        let _ = self.0.set(log);
    }

    /// The log, if it is ours.
    pub fn log(&self) -> Option<&Log> {
        self.0.get()
    }

    /// Lines that nobody read in time.
    pub fn dropped(&self) -> u64 {
        self.log().map_or(0, |log| log.lines().dropped().get())
    }
}

/// The token of `<data_dir>/api.token`. Never printed.
#[derive(Clone)]
pub struct ApiToken(Arc<str>);

impl ApiToken {
    /// The token with this text.
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// Whether `presented` is it. Takes the same time wherever the two differ: what is compared are
    /// digests.
    pub fn is(&self, presented: &[u8]) -> bool {
        use ring::digest::{SHA256, digest};
        let (mine, theirs) = (digest(&SHA256, self.0.as_bytes()), digest(&SHA256, presented));
        let differences = mine.as_ref().iter().zip(theirs.as_ref());
        differences.fold(0, |sum, (a, b)| sum | (a ^ b)) == 0 && !self.0.is_empty()
    }
}

impl fmt::Debug for ApiState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiState({} of {:?})", self.name, self.mesh)
    }
}

impl fmt::Debug for Calls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Calls")
    }
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Links")
    }
}

impl fmt::Debug for ApiToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiToken")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_opens() {
        let token = ApiToken::new("0123456789abcdef");
        assert!(token.is(b"0123456789abcdef"));
        for wrong in ["", "0123456789abcde", "0123456789abcdef0", "x"] {
            assert!(!token.is(wrong.as_bytes()), "{wrong}");
        }
        assert!(!ApiToken::new("").is(b""), "an empty token opens nothing");
        assert_eq!(format!("{token:?}"), "ApiToken");
    }
}
