//! This member's own instances.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::local::LocalSocket;
use super::preamble::{self, CalledBy, ProxyProtocol};
use super::turnstile::Turnstile;
use crate::model::{InstanceId, InstanceState, ServiceName, Target};
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
    /// Calls at a time above which the next is refused; no limit when absent.
    pub hard_limit: Option<u32>,
    /// How it wants to be told who calls, if it does.
    pub proxy_protocol: Option<ProxyProtocol>,
}

/// This member's own instances. Replaced whole, read without a lock.
#[derive(Debug)]
pub(super) struct Instances {
    by_id: ArcSwap<BTreeMap<InstanceId, LocalInstance>>,
    is_draining: AtomicBool,
    turnstile: Turnstile,
    /// Told which refused a connection. Full: it was told so a moment ago.
    refused: mpsc::Sender<InstanceId>,
}

impl Instances {
    /// None yet.
    pub(super) fn new(turnstile: Turnstile, refused: mpsc::Sender<InstanceId>) -> Self {
        let is_draining = AtomicBool::new(false);
        Self { by_id: ArcSwap::default(), is_draining, turnstile, refused }
    }

    pub(super) fn set(&self, instances: Vec<LocalInstance>) {
        let by_id = instances.into_iter().map(|instance| (instance.id.clone(), instance));
        let by_id: BTreeMap<_, _> = by_id.collect();
        self.turnstile.retain(|id| by_id.contains_key(id));
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

    /// Connects to an instance for `caller`, or for this agent itself, or says why not. `in_flight` is
    /// how many calls it has, with this one; a caller that has nobody else `insists`. Nothing has been
    /// written to it but who calls, if it asked for that.
    pub(super) async fn connect(
        &self,
        service: &ServiceName,
        id: &InstanceId,
        caller: Option<&CalledBy>,
        in_flight: u32,
        insists: bool,
    ) -> Result<LocalSocket, Refusal> {
        let instance = self.admit(service, id)?;
        if instance.hard_limit.is_some_and(|limit| in_flight > limit) {
            let reason = "the instance has as many calls as it takes";
            return Err(Refusal::new(RefusalCode::OVERFLOW, reason));
        }
        self.turnstile.pass(service, id, insists)?;
        let reason = match timeout(CONNECT_TIME_MAX, open(&instance, caller)).await {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::MemberId;
    use crate::runtime::clock::Clock;

    #[tokio::test]
    async fn instance_is_refused_with_its_reason_before_anything_is_written() {
        let (refused, mut told) = mpsc::channel(8);
        let (me, snapshot) = (MemberId::from_bytes([1; 16]), Arc::default());
        let instances = Instances::new(Turnstile::new(me, snapshot, Clock::new()), refused);
        let local = |id: &str, state| LocalInstance {
            id: id.parse().unwrap(),
            service: "web".parse().unwrap(),
            target: Target::Unix("/nonexistent/socket".into()),
            state,
            hard_limit: Some(2),
            proxy_protocol: None,
        };
        instances.set(vec![
            local("up", InstanceState::Ready),
            local("leaving", InstanceState::Draining),
            local("sick", InstanceState::Failing),
        ]);
        let busy = async |service: &str, id: &str, in_flight| {
            let (service, id) = (service.parse().unwrap(), id.parse().unwrap());
            let refused = instances.connect(&service, &id, None, in_flight, false).await;
            refused.map(|_| ()).unwrap_err().code
        };
        let code = async |service: &str, id: &str| busy(service, id, 2).await;
        assert_eq!(busy("web", "up", 3).await, RefusalCode::OVERFLOW);
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
