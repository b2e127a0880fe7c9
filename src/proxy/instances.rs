//! This member's own instances, and how many calls each instance has in flight.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::local::LocalSocket;
use super::preamble::{self, CalledBy, ProxyProtocol};
use crate::model::{InstanceId, InstanceState, MemberId, ServiceName, Target};
use crate::transport::tunnel::{Refusal, RefusalCode};

/// How long an instance may take to accept a connection: a lost SYN is repeated after a second, and a
/// caller whose first three instances take none has time for a fourth.
const CONNECT_TIME_MAX: Duration = Duration::from_millis(1_250);

/// An instance on this machine, and how it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalInstance {
    /// Unique on this member.
    pub id: InstanceId,
    /// What it serves.
    pub service: ServiceName,
    /// Where it listens.
    pub target: Target,
    /// Whether it takes new calls, and if not, why.
    pub state: InstanceState,
    /// How it wants to be told who calls, if it does.
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// This member's own instances. Replaced whole, read without a lock.
#[derive(Debug)]
pub(super) struct Instances {
    by_id: ArcSwap<BTreeMap<InstanceId, LocalInstance>>,
    is_draining: AtomicBool,
    /// Told which refused a connection. Full: it was told so a moment ago.
    refused: mpsc::Sender<InstanceId>,
}

impl Instances {
    /// None yet.
    pub(super) fn new(refused: mpsc::Sender<InstanceId>) -> Self {
        Self { by_id: ArcSwap::default(), is_draining: AtomicBool::new(false), refused }
    }

    pub(super) fn set(&self, instances: Vec<LocalInstance>) {
        let by_id = instances.into_iter().map(|instance| (instance.id.clone(), instance)).collect();
        self.by_id.store(Arc::new(by_id));
    }

    /// Refuses every call from now on.
    pub(super) fn drain(&self) {
        self.is_draining.store(true, Ordering::Relaxed);
    }

    /// Whether every call is refused.
    pub(super) fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// Connects to an instance for `caller`, or for this agent itself, or says why not. Nothing has
    /// been written to it but who calls, if it asked for that.
    pub(super) async fn connect(
        &self,
        service: &ServiceName,
        id: &InstanceId,
        caller: Option<&CalledBy>,
    ) -> Result<LocalSocket, Refusal> {
        let reason = match timeout(CONNECT_TIME_MAX, open(&self.admit(service, id)?, caller)).await
        {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) if is_ours(&error) => {
                return Err(Refusal::new(RefusalCode::OVERFLOW, error.to_string()));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer to connect".to_owned(),
        };
        let _ = self.refused.try_send(id.clone());
        Err(Refusal::new(RefusalCode::UNREACHABLE, reason))
    }

    /// The instance, if it is here and takes new calls.
    pub(super) fn admit(
        &self,
        service: &ServiceName,
        id: &InstanceId,
    ) -> Result<LocalInstance, Refusal> {
        if self.is_draining() {
            return Err(Refusal::new(RefusalCode::DRAINING, "the agent is draining"));
        }
        let instances = self.by_id.load();
        match instances.get(id).filter(|instance| instance.service == *service) {
            None => Err(Refusal::new(RefusalCode::NOT_SERVED, "no such instance")),
            Some(instance) => match instance.state {
                InstanceState::Ready => Ok(instance.clone()),
                InstanceState::Failing => {
                    Err(Refusal::new(RefusalCode::UNREACHABLE, "the checks of the instance fail"))
                }
                InstanceState::Draining | InstanceState::Maint => {
                    Err(Refusal::new(RefusalCode::DRAINING, "the instance is draining"))
                }
            },
        }
    }
}

/// Connects to an instance and tells it who calls, if it wants to know.
pub(super) async fn open(
    instance: &LocalInstance,
    caller: Option<&CalledBy>,
) -> std::io::Result<LocalSocket> {
    let mut socket = LocalSocket::connect(&instance.target).await?;
    let said = instance
        .proxy_protocol
        .and_then(|ProxyProtocol::V2| preamble::v2(caller, &instance.service, &instance.target));
    if let Some(said) = said {
        socket.write_all(&said).await?;
    }
    Ok(socket)
}

/// Whether this process, not the instance, is what cannot connect.
fn is_ours(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let ours = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL];
    ours.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

type Counts = BTreeMap<InstanceId, Arc<AtomicU32>>;

/// Calls in flight by instance: to others' from here, to our own from everywhere. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct InFlight {
    counts: Arc<Mutex<BTreeMap<MemberId, Counts>>>,
}

/// One call in flight, until it is dropped.
#[derive(Debug)]
pub(super) struct Call {
    count: Arc<AtomicU32>,
}

impl Call {
    /// All calls of its instance that are in flight from here, itself among them.
    pub(super) fn count(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl InFlight {
    /// How many calls `instance` of `member` has in flight, as far as this member knows.
    pub fn of(&self, member: &MemberId, instance: &InstanceId) -> u32 {
        let counts = self.counts.lock();
        let count = counts.get(member).and_then(|instances| instances.get(instance));
        count.map_or(0, |count| count.load(Ordering::Relaxed))
    }

    /// The calls that instances of `member` have in flight; resting instances are left out.
    pub fn of_member(&self, member: &MemberId) -> BTreeMap<InstanceId, u64> {
        let counts = self.counts.lock();
        let instances = counts.get(member).into_iter().flatten();
        let busy = instances.map(|(id, count)| (id.clone(), count.load(Ordering::Relaxed).into()));
        busy.filter(|(_, count)| *count > 0).collect()
    }

    /// All calls in flight, by instance; resting instances are left out.
    pub fn all(&self) -> Vec<(MemberId, InstanceId, u32)> {
        let counts = self.counts.lock();
        let flat = counts.iter().flat_map(|(member, instances)| {
            instances.iter().map(|(id, count)| (*member, id.clone(), count.load(Ordering::Relaxed)))
        });
        flat.filter(|(_, _, count)| *count > 0).collect()
    }

    pub(super) fn enter(&self, member: MemberId, instance: &InstanceId) -> Call {
        let mut counts = self.counts.lock();
        let instances = counts.entry(member).or_default();
        let count = match instances.get(instance) {
            Some(count) => Arc::clone(count),
            None => {
                // What rests is forgotten here, so that names of the past do not pile up.
                instances.retain(|_, count| Arc::strong_count(count) > 1);
                Arc::clone(instances.entry(instance.clone()).or_default())
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
        Call { count }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMBER: MemberId = MemberId::from_bytes([1; 16]);

    #[test]
    fn calls_are_counted_while_they_live_and_names_of_the_past_are_forgotten() {
        let in_flight = InFlight::default();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let calls = [in_flight.enter(MEMBER, &a), in_flight.enter(MEMBER, &a)];
        assert_eq!(in_flight.of(&MEMBER, &a), 2);
        drop(calls);
        assert_eq!(in_flight.of(&MEMBER, &a), 0);
        let _call = in_flight.enter(MEMBER, &b);
        assert_eq!(in_flight.all(), [(MEMBER, b, 1)]);
        assert!(!in_flight.counts.lock()[&MEMBER].contains_key(&a));
    }

    #[tokio::test]
    async fn instance_is_refused_with_its_reason_before_anything_is_written() {
        let (refused, mut told) = mpsc::channel(8);
        let instances = Instances::new(refused);
        let local = |id: &str, state| LocalInstance {
            id: id.parse().unwrap(),
            service: "web".parse().unwrap(),
            target: Target::Unix("/nonexistent/socket".into()),
            state,
            proxy_protocol: None,
        };
        instances.set(vec![
            local("up", InstanceState::Ready),
            local("leaving", InstanceState::Draining),
            local("sick", InstanceState::Failing),
        ]);
        let code = async |service: &str, id: &str| {
            let refused =
                instances.connect(&service.parse().unwrap(), &id.parse().unwrap(), None).await;
            refused.map(|_| ()).unwrap_err().code
        };
        assert_eq!(code("web", "unknown").await, RefusalCode::NOT_SERVED);
        assert_eq!(code("db", "up").await, RefusalCode::NOT_SERVED);
        assert_eq!(code("web", "leaving").await, RefusalCode::DRAINING);
        assert_eq!(code("web", "sick").await, RefusalCode::UNREACHABLE);
        assert!(told.try_recv().is_err(), "nobody has connected");
        assert_eq!(code("web", "up").await, RefusalCode::UNREACHABLE);
        assert_eq!(told.try_recv().unwrap().as_str(), "up");
        instances.drain();
        assert_eq!(code("web", "up").await, RefusalCode::DRAINING);
    }
}
