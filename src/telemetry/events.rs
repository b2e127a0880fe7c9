//! What happened in the mesh, kept for a while and told to whoever follows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;

use super::Counter;
use super::throttle::{BURST_MAX, Throttle, Verdict};
use crate::runtime::clock::{self, Clock};

/// How many events of one kind are kept; the oldest go first. Each kind for itself: what a peer can
/// repeat for ever must not push out what tells why.
const KEPT_MAX: usize = BURST_MAX as usize;
/// How many events a follower may be behind before it misses some.
const FOLLOWER_LAG_MAX: usize = 1_024;

/// How the names of fields begin that tell who saw what, at length.
pub const EVIDENCE: &str = "evidence";

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// This agent runs.
    AgentStarted,
    /// This agent takes nothing new.
    AgentDraining,
    /// This agent takes new work again.
    AgentResumed,
    /// This agent read its files again, and what they say holds.
    ConfigReloaded,
    /// This agent read its files again, and nothing of them holds.
    ConfigRefused,
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
    /// A newcomer was not let in.
    JoinRefused,
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
    /// The checks of an own instance fail: it takes no work.
    InstanceFailing,
    /// They pass again, or for the first time.
    InstancePassing,
    /// The callers of an instance agree not to call it.
    InstanceEjected,
    /// Callers accused an instance, and others saw it succeed.
    AccusationDismissed,
    /// An ejected instance answered, and gets a growing share.
    InstanceReturning,
    /// An instance that was ejected has its whole share again.
    InstanceReturned,
    /// Most of a service fails.
    ServiceFailing,
    /// No more than half of a service fails any more.
    ServiceRecovered,
    /// So much of a service is ejected that all of it is called again.
    BreakerPanic,
    /// Little of a service is ejected any more.
    BreakerPanicEnded,
    /// An own instance accepts no connection.
    InstanceUnreachable,
    /// A member's gossip is what no agent sends, or was found to be untrue.
    GossipRefused,
    /// A signed entry was not taken.
    EntryRefused,
    /// A signed entry cannot be read and is kept aside.
    EntryQuarantined,
    /// Calls to an instance stop for a while.
    BreakerOpened,
    /// Calls to an instance go on.
    BreakerClosed,
    /// No instance took a call.
    ConnectionRefused,
    /// An instance was asked, and gave no answer, or not all of it.
    RequestFailed,
    /// A connection was cut on the way.
    StreamCut,
    /// A connection was given up because its reader took nothing.
    StreamStalled,
    /// An open connection was closed, because nobody vouches for its peer any more.
    ConnectionRevoked,
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
    /// This member lives on certificates that have ended, its own or others', or on one for which
    /// nobody vouches any more.
    Degraded,
    /// It does no more.
    Restored,
    /// The other members believe this one no more: it was replaced or dropped.
    Disowned,
    /// The root made this member an issuer.
    IssuerAppointed,
    /// The root took an issuer back.
    IssuerRemoved,
    /// An issuer changed what a member may offer.
    ServicesGranted,
    /// The public gateway has another certificate.
    PublicCertificateRenewed,
    /// A certificate of the public gateway is broken; the one of before stays in use.
    PublicCertificateRefused,
    /// A local entry listens.
    EntryOpened,
    /// A local entry cannot listen or accept.
    EntryFailed,
}

impl EventKind {
    /// Whether it tells that something goes wrong, maybe again and again, and of no change of state.
    pub(super) fn is_trouble(self) -> bool {
        matches!(
            self,
            Self::NameConflict
                | Self::InstanceUnreachable
                | Self::JoinRefused
                | Self::GossipRefused
                | Self::EntryRefused
                | Self::EntryQuarantined
                | Self::ConnectionRefused
                | Self::RequestFailed
                | Self::StreamCut
                | Self::StreamStalled
                | Self::ConnectionRevoked
                | Self::EntryFailed
        )
    }
}

/// The last events, and a way to follow. Cheap to clone.
///
/// The same trouble with the same subject is recorded once in a second, and each kind of event has
/// an allowance: see [`EventLog::dropped`].
#[derive(Clone, Debug)]
pub struct EventLog {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    node: String,
    clock: Clock,
    throttle: Mutex<Throttle>,
    recent: Mutex<Recent>,
    followers: broadcast::Sender<Event>,
    dropped: Counter,
}

#[derive(Debug, Default)]
struct Recent {
    /// With their numbers, which are the order in which they happened.
    kept: BTreeMap<EventKind, VecDeque<(u64, Event)>>,
    count: u64,
}

impl EventLog {
    /// An empty log of the member `node`.
    pub fn new(node: &str) -> Self {
        let inner = Inner {
            node: node.to_owned(),
            clock: Clock::new(),
            throttle: Mutex::default(),
            recent: Mutex::default(),
            followers: broadcast::Sender::new(FOLLOWER_LAG_MAX),
            dropped: Counter::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Events left out because there were too many of their kind.
    pub fn dropped(&self) -> &Counter {
        &self.inner.dropped
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
        let now = self.inner.clock.now();
        let verdict = self.inner.throttle.lock().admit(now, kind, &subject, &reason);
        match verdict {
            Verdict::Record => {}
            Verdict::Repeated => return,
            Verdict::TooMany => {
                self.inner.dropped.inc();
                return;
            }
        }
        tracing::info!(target: "murmesh::event", ?kind, subject, reason, "mesh event");
        let at = clock::unix_millis();
        let event = Event { at, node: self.inner.node.clone(), kind, subject, reason, fields };
        let mut recent = self.inner.recent.lock();
        recent.keep(event.clone());
        let _ = self.inner.followers.send(event); // nobody follows: fine
    }

    /// The events kept that happened at `since` (milliseconds since 1970) or later, oldest first.
    pub fn recent(&self, since: u64) -> Vec<Event> {
        let recent = self.inner.recent.lock();
        let kept = recent.kept.values().flatten().filter(|(_, event)| event.at >= since);
        let mut found: Vec<_> = kept.cloned().collect();
        drop(recent);
        found.sort_by_key(|(number, _)| *number);
        found.into_iter().map(|(_, event)| event).collect()
    }

    /// Every event from now on.
    pub fn follow(&self) -> broadcast::Receiver<Event> {
        self.inner.followers.subscribe()
    }
}

impl Recent {
    fn keep(&mut self, event: Event) {
        self.count += 1;
        let kept = self.kept.entry(event.kind).or_default();
        if kept.len() == KEPT_MAX {
            kept.pop_front();
        }
        kept.push_back((self.count, event));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_one_kind_pushes_out_no_other_and_is_counted() {
        let log = EventLog::new("a");
        log.record(EventKind::MemberDown, "b", "dead");
        for number in 0..5_000 {
            log.record(EventKind::InstanceChanged, format!("web-{number}"), "changed at c");
        }
        log.record(EventKind::MemberUp, "b", "back");
        let events = log.recent(0);
        assert!(events.len() as u64 + log.dropped().get() >= 5_002, "each is kept or counted");
        assert!(events.len() <= KEPT_MAX + 2, "{}", events.len());
        assert_eq!(events.first().map(|event| event.kind), Some(EventKind::MemberDown));
        assert_eq!(events.last().map(|event| event.kind), Some(EventKind::MemberUp));
    }
}
