//! What happened in the mesh, kept for a while and told to whoever follows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use crate::runtime::clock;

/// How many events are kept; the oldest go first.
const EVENTS_MAX: usize = 10_000;
/// How many events a follower may be behind before it misses some.
const FOLLOWER_LAG_MAX: usize = 1_024;

/// Something that happened, in the shape of `/v1/mesh/events`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Milliseconds since 1970.
    pub at: u64,
    /// The name of the member that saw it: this one.
    pub node: String,
    /// What kind of thing happened.
    pub kind: EventKind,
    /// Whom or what it happened to: a member, service or instance.
    pub subject: String,
    /// Why.
    pub reason: String,
    /// More about it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fields: BTreeMap<String, String>,
}

/// What kind of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// This agent runs.
    AgentStarted,
    /// This agent takes nothing new.
    AgentDraining,
    /// A member answers.
    MemberUp,
    /// A member failed a probe.
    MemberSuspect,
    /// A member was convicted.
    MemberDown,
    /// A member said goodbye for good.
    MemberLeft,
    /// A member said that it will be back.
    MemberRestarting,
    /// A newcomer was let in.
    MemberEnrolled,
    /// A member has a new certificate.
    MemberRenewed,
    /// Two members have one name.
    NameConflict,
    /// Two processes have one key.
    DuplicateKey,
    /// Nobody answers this member.
    Isolated,
    /// Somebody answers it again.
    Healed,
    /// A member offers one more instance.
    InstanceAdded,
    /// A member took an instance back.
    InstanceRemoved,
    /// An instance has other properties.
    InstanceChanged,
    /// An own instance accepts no connection.
    InstanceUnreachable,
    /// A signed entry was not taken.
    EntryRefused,
    /// A signed entry cannot be read and is kept aside.
    EntryQuarantined,
    /// No instance took a call.
    ConnectionRefused,
    /// A connection was cut on the way.
    StreamCut,
    /// A connection was given up because its reader took nothing.
    StreamStalled,
    /// An invite was made.
    InviteCreated,
    /// An invite was taken back.
    InviteRevoked,
    /// This member has its next certificate.
    CertificateRenewed,
    /// No issuer gave this member its next certificate yet.
    RenewalFailed,
    /// A peer's certificate has ended and was accepted for want of an issuer.
    EndedAccepted,
    /// This member lives on certificates that have ended, its own or others'.
    Degraded,
    /// It does no more.
    Restored,
    /// The root made a member an issuer, or no more.
    IssuerAppointed,
    /// An issuer changed what a member may offer.
    ServicesGranted,
    /// A local entry listens.
    EntryOpened,
    /// A local entry cannot listen or accept.
    EntryFailed,
}

/// The last events, and a way to follow. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EventLog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: String,
    recent: Mutex<VecDeque<Event>>,
    followers: broadcast::Sender<Event>,
}

impl EventLog {
    /// An empty log of the member `node`.
    pub fn new(node: &str) -> Self {
        let followers = broadcast::Sender::new(FOLLOWER_LAG_MAX);
        let recent = Mutex::new(VecDeque::new());
        Self { inner: Arc::new(Inner { node: node.to_owned(), recent, followers }) }
    }

    /// Records that `kind` happened to `subject`.
    pub fn record(&self, kind: EventKind, subject: impl ToString, reason: impl ToString) {
        self.record_with(kind, subject, reason, BTreeMap::new());
    }

    /// Records that `kind` happened to `subject`, with more about it.
    pub fn record_with(
        &self,
        kind: EventKind,
        subject: impl ToString,
        reason: impl ToString,
        fields: BTreeMap<String, String>,
    ) {
        let (subject, reason) = (subject.to_string(), reason.to_string());
        tracing::info!(target: "murmesh::event", ?kind, subject, reason, "mesh event");
        let at = clock::unix_millis();
        let event = Event { at, node: self.inner.node.clone(), kind, subject, reason, fields };
        let mut recent = self.inner.recent.lock();
        if recent.len() == EVENTS_MAX {
            recent.pop_front();
        }
        recent.push_back(event.clone());
        let _ = self.inner.followers.send(event); // nobody follows: fine
    }

    /// The events kept that happened at `since` (milliseconds since 1970) or later, oldest first.
    pub fn recent(&self, since: u64) -> Vec<Event> {
        self.inner.recent.lock().iter().filter(|event| event.at >= since).cloned().collect()
    }

    /// Every event from now on.
    pub fn follow(&self) -> broadcast::Receiver<Event> {
        self.inner.followers.subscribe()
    }
}
