//! Tunnel in, local instance out.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::timeout;
use tracing::debug;

use super::board::{Boards, Counted};
use super::instances::Instances;
use super::load::{Share, Work};
use super::local::LocalSocket;
use super::preamble::CalledBy;
use super::stalls::{Evicted, Stalls};
use super::tcp::{Leftover, carry, carry_while_instance_lasts};
use super::traffic::{Meter, Traffic};
use crate::mesh::Evidence;
use crate::model::{MemberId, ServiceName};
use crate::runtime::TaskGroup;
use crate::runtime::clock::Clock;
use crate::telemetry::{Direction, Door, EventKind, EventLog, Metrics};
use crate::tls::Peer;
use crate::transport::tunnel::{
    HEADER_TIME_MAX, Header, Mode, Refusal, RefusalCode, ResetCode, TunnelReader, TunnelWriter,
};
use crate::transport::{Accepted, Endpoint, Incoming, Revoker};

/// Data connections that one peer may have here. It needs one; a second for a moment, when it has
/// restarted.
const CONNECTIONS_MAX: u32 = 8;
/// Tunnels of one connection that may wait for their header, which comes with the stream unless a
/// packet is lost. Each may hold a stream window; at the next the one that waits longest is refused.
const HEADERLESS_MAX: usize = 256;
/// How long a caller may take to hear a refusal.
const REFUSE_TIME_MAX: Duration = Duration::from_secs(10);

/// Serves what peers ask of this member's instances.
pub(super) struct Inbound {
    pub(super) endpoint: Endpoint,
    pub(super) instances: Arc<Instances>,
    pub(super) boards: Arc<Boards>,
    pub(super) traffic: Traffic,
    pub(super) stalls: Stalls,
    pub(super) metrics: Metrics,
    pub(super) events: EventLog,
    pub(super) clock: Clock,
    pub(super) revoker: Revoker,
    pub(super) evidence: tokio::sync::mpsc::Sender<(MemberId, Evidence)>,
    pub(super) streams: TaskGroup,
    pub(super) refusals: TaskGroup,
    /// Data connections by peer.
    pub(super) connections: Mutex<BTreeMap<MemberId, u32>>,
}

/// A peer's connection, counted until it is dropped.
struct Entered<'a> {
    inbound: &'a Inbound,
    peer: MemberId,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.inbound.leave(self.peer);
    }
}

/// A tunnel whose instance is connected.
struct Opened {
    service: ServiceName,
    mode: Mode,
    local: LocalSocket,
    work: Work,
}

/// A peer's connection, and what it causes here.
struct Served {
    accepted: Accepted,
    share: Share,
}

impl Inbound {
    /// Serves one connection until it ends.
    pub(super) async fn serve(self: Arc<Self>, incoming: Incoming) {
        let (connection, peer) = match self.endpoint.accept(incoming).await {
            Ok((connection, Some(peer))) => (connection, peer),
            Ok((_, None)) | Err(_) => return, // refused and counted by the endpoint
        };
        let _ = self.evidence.try_send((peer.id, Evidence::Answered)); // full: others will come
        let (id, accepted) = (peer.id, Accepted::new(connection, peer));
        if !self.enter(id) {
            self.metrics.count_refused(Door::mesh, "overload");
            return accepted.refuse();
        }
        let _entered = Entered { inbound: &self, peer: id };
        let served = Arc::new(Served { accepted, share: Share::new(self.clock) });
        let mut tunnels = pin!(Arc::clone(&self).serve_connection(Arc::clone(&served)));
        let Served { accepted, share } = &*served;
        tokio::select! {
            biased;
            () = &mut tunnels => {}
            () = accepted.watch(&self.clock, &self.revoker) => tunnels.await, // closed: it says so and returns
            () = share.tell(accepted, &self.boards) => {}
        }
    }

    fn enter(&self, peer: MemberId) -> bool {
        let mut connections = self.connections.lock();
        let count = connections.entry(peer).or_default();
        let has_room = *count < CONNECTIONS_MAX;
        *count += u32::from(has_room);
        has_room
    }

    fn leave(&self, peer: MemberId) {
        let mut connections = self.connections.lock();
        match connections.get_mut(&peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(connections.remove(&peer)),
        }
    }

    async fn serve_connection(self: Arc<Self>, served: Arc<Served>) {
        let headerless = Stalls::new(HEADERLESS_MAX);
        loop {
            match served.accepted.next().await {
                Ok((writer, reader)) => {
                    let (inbound, served) = (Arc::clone(&self), Arc::clone(&served));
                    let headerless = headerless.clone();
                    // A drain waits for streams and cuts them in the end; a refusal is neither.
                    let is_draining = self.instances.is_draining();
                    let group = if is_draining { &self.refusals } else { &self.streams };
                    group.spawn_connection("inbound", async move {
                        inbound.serve_tunnel(&served, &headerless, writer, reader).await;
                    });
                }
                Err(error) => {
                    debug!(peer = %served.accepted.peer().id, %error, "data connection ended");
                    return;
                }
            }
        }
    }

    async fn serve_tunnel(
        &self,
        served: &Served,
        headerless: &Stalls,
        mut writer: TunnelWriter,
        mut reader: TunnelReader,
    ) {
        // Boxed, and gone before bytes are carried, as in [`Outbound::serve`](super::outbound).
        let opening = Box::pin(self.open(served, headerless, &mut writer, &mut reader));
        match opening.await {
            Ok(opened) => self.carry(opened, served.accepted.peer(), writer, reader).await,
            Err(Some(refusal)) => {
                let peer = served.accepted.peer();
                Box::pin(self.refuse(peer, writer, reader, refusal)).await;
            }
            Err(None) => {}
        }
    }

    /// Reads what a new tunnel is for and connects it. An error without a refusal was counted.
    async fn open(
        &self,
        Served { accepted, share }: &Served,
        headerless: &Stalls,
        writer: &mut TunnelWriter,
        reader: &mut TunnelReader,
    ) -> Result<Opened, Option<Refusal>> {
        let peer = accepted.peer();
        let header = headerless.watch(timeout(HEADER_TIME_MAX, reader.header())).await;
        let header = match header {
            Ok(Ok(Ok(header))) => header,
            Ok(Ok(Err(error))) => {
                debug!(peer = %peer.id, %error, "tunnel without a header");
                writer.set_drop_code(ResetCode::Malformed);
                self.metrics.count_refused(Door::mesh, "malformed");
                return Err(None);
            }
            Ok(Err(_)) => {
                self.metrics.count_refused(Door::mesh, "timeout");
                return Err(None);
            }
            Err(Evicted) => {
                let reason = "too many tunnels without a header";
                return Err(Some(Refusal::new(RefusalCode::OVERFLOW, reason)));
            }
        };
        self.admit(&header, peer)?;
        // Before it is connected: an instance that takes its time to accept must not keep the
        // callers of its neighbours waiting for streams.
        accepted.admit(reader);
        let (local, counted) = self.connect(&header, accepted).await?;
        let work = share.work(&header.instance, counted);
        Ok(Opened { service: header.service, mode: header.mode, local, work })
    }

    /// The seam for authorization: who calls is `peer`, whom the certificate proves, and
    /// `header.source` is what it says of itself.
    fn admit(&self, header: &Header, peer: &Peer) -> Result<(), Refusal> {
        if !matches!(header.mode, Mode::SPLICE | Mode::HTTP1 | Mode::HTTP2) {
            let reason = format!("mode {} of {}", header.mode.0, peer.name);
            return Err(Refusal::new(RefusalCode::UNSUPPORTED, reason));
        }
        self.instances.admit(&header.service, &header.instance).map(drop)
    }

    /// Admits once more, now that the call is counted: who drains an instance and then sees no call
    /// can rely on there being none.
    async fn connect(
        &self,
        header: &Header,
        accepted: &Accepted,
    ) -> Result<(LocalSocket, Counted), Refusal> {
        let peer = accepted.peer();
        let (id, name, address) = (peer.id, peer.name.clone(), accepted.address());
        let caller = CalledBy { id, name, address };
        let (service, instance) = (&header.service, &header.instance);
        let (counted, insists) = (self.boards.enter(service, instance), header.insists);
        let connecting =
            self.instances.connect(service, instance, Some(&caller), counted.count, insists);
        let local = connecting.await;
        if let Err(Refusal { code: RefusalCode::UNREACHABLE, reason }) = &local {
            self.events.record(EventKind::InstanceUnreachable, &header.instance, reason);
        }
        local.map(|local| (local, counted))
    }

    async fn refuse(
        &self,
        peer: &Peer,
        writer: TunnelWriter,
        mut reader: TunnelReader,
        refusal: Refusal,
    ) {
        debug!(peer = %peer.id, %refusal, "tunnel refused");
        self.metrics.count_refused(Door::mesh, refusal.code.as_str());
        reader.stop(ResetCode::Cut); // frees what it holds, however long the caller takes to hear
        let _ = timeout(REFUSE_TIME_MAX, writer.refuse(&refusal)).await; // gone: nobody to tell
    }

    async fn carry(
        &self,
        opened: Opened,
        peer: &Peer,
        mut writer: TunnelWriter,
        mut reader: TunnelReader,
    ) {
        let Opened { service, mode, mut local, work } = opened;
        let traffic = self.traffic.of(Direction::inbound, &service, peer.id, &peer.name);
        let open = traffic.begin();
        // Said first: only then may a byte reach the instance.
        let outcome = match writer.accept().await {
            Ok(()) => {
                let bytes = Meter::new(&traffic.bytes, None);
                let (local, stalls) = (&mut local, &self.stalls);
                let (writer, reader) = (&mut writer, &mut reader);
                if mode.ends_with_instance() {
                    carry_while_instance_lasts(local, writer, reader, bytes, stalls, &work).await
                } else {
                    work.begin();
                    let left = Leftover::default();
                    carry(local, writer, reader, left, bytes, stalls, None).await
                }
            }
            Err(error) => Err(error.into()),
        };
        drop(local);
        if outcome.is_ok() {
            writer.delivered().await;
        }
        self.traffic.report_cut(&self.events, &service, &outcome);
        open.end(&outcome);
    }
}
