//! Data planes in this process, on loopback, with real certificates; and what runs behind them.

#![allow(clippy::disallowed_methods)] // tests have no agent that could own their tasks

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use murmesh::breaker::Verdict;
use murmesh::mesh::{Endpoint, EndpointState, Evidence, Rotation, ServiceView, Snapshot};
use murmesh::model::{InstanceState, MemberId, Moment, Protocol, ServiceName, Target, Weight};
use murmesh::proxy::{EntryOptions, LocalInstance, Proxy, Settings, Started};
use murmesh::runtime::clock::Clock;
use murmesh::runtime::{Shutdown, Thread};
use murmesh::telemetry::{EventLog, Metrics};
use murmesh::tls::NodeCredentials;
use murmesh::tls::testing::mesh_of;
use murmesh::transport::{Incoming, Limits};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// Long enough for a loaded machine; nothing waits for it where all is well.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// One data plane.
pub(super) struct Node {
    pub(super) id: MemberId,
    pub(super) name: String,
    pub(super) address: SocketAddr,
    pub(super) credentials: NodeCredentials,
    pub(super) proxy: Proxy,
    pub(super) endpoint: murmesh::transport::Endpoint,
    pub(super) metrics: Metrics,
    pub(super) events: EventLog,
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    /// Nobody listens to what the data plane sees, or on the gossip plane; the doors stay open.
    _evidence: mpsc::Receiver<(MemberId, Evidence)>,
    _gossip: mpsc::Receiver<Incoming>,
    pub(super) enrolment: mpsc::Receiver<Incoming>,
    pub(super) thread: Thread,
}

impl Node {
    pub(super) async fn start(credentials: NodeCredentials) -> Self {
        Self::start_at(credentials, "127.0.0.1:0".parse().unwrap()).await
    }

    pub(super) async fn start_at(credentials: NodeCredentials, listen: SocketAddr) -> Self {
        let (evidence_in, evidence) = mpsc::channel(64);
        let (windows, _) = mpsc::channel(1);
        let (metrics, events) = (Metrics::new(), EventLog::new(credentials.name().as_str()));
        let snapshot = Arc::<ArcSwap<Snapshot>>::default();
        let started = Proxy::start(Settings {
            listen,
            credentials: credentials.clone(),
            limits: Limits { reset_secret: [7; 32] }, // the same after every restart
            snapshot: Arc::clone(&snapshot),
            evidence: evidence_in,
            windows,
            metrics: metrics.clone(),
            events: events.clone(),
            access_log: None,
            clock: Clock::new(),
            shutdown: Shutdown::default(),
        })
        .await
        .unwrap();
        let Started { proxy, endpoint, gossip, enrolment, thread, .. } = started;
        Self {
            id: credentials.member_id(),
            name: credentials.name().to_string(),
            address: endpoint.local_address(),
            credentials,
            proxy,
            endpoint,
            metrics,
            events,
            snapshot,
            _evidence: evidence,
            _gossip: gossip,
            enrolment,
            thread,
        }
    }

    /// An entry of this node to `service`.
    pub(super) async fn upstream(&self, service: &str) -> SocketAddr {
        let listen = "127.0.0.1:0".parse().unwrap();
        let bound =
            self.proxy.open_upstream(service.parse().unwrap(), listen, EntryOptions::default());
        match bound.await.unwrap() {
            Target::Tcp(address) => address,
            Target::Unix(path) => panic!("{path:?}"),
        }
    }

    /// An endpoint of this node's that leads through `wire`.
    pub(super) fn endpoint_behind(&self, wire: &Wire, service: &str) -> (ServiceName, Endpoint) {
        let (name, endpoint) = self.endpoint(service, service);
        (name, Endpoint { address: wire.address, ..endpoint })
    }

    /// What this node serves: (id, service, where).
    pub(super) fn serve(&self, instances: &[(&str, &str, SocketAddr)]) {
        let local = |(id, service, address): &(&str, &str, SocketAddr)| LocalInstance {
            id: id.parse().unwrap(),
            service: service.parse().unwrap(),
            target: Target::Tcp(*address),
            state: InstanceState::Ready,
            hard_limit: None,
            proxy_protocol: None,
        };
        self.proxy.set_local(instances.iter().map(local).collect());
    }

    /// How this node's endpoint of `service` looks in a snapshot.
    pub(super) fn endpoint(&self, service: &str, instance: &str) -> (ServiceName, Endpoint) {
        let endpoint = Endpoint {
            instance: instance.parse().unwrap(),
            member: self.id,
            member_name: self.name.parse().unwrap(),
            address: self.address,
            port: 80,
            tags: Vec::new(),
            weight: Weight::default(),
            state: EndpointState::Ready,
            zone: "".into(),
            idempotent: Default::default(),
            capacity: Default::default(),
            verdict: Verdict::Clear,
            rotation: Rotation::In { since: None },
            changed_at: Moment::START,
        };
        (service.parse().unwrap(), endpoint)
    }

    /// Shows this node these endpoints.
    pub(super) fn sees(&self, endpoints: impl IntoIterator<Item = (ServiceName, Endpoint)>) {
        let mut services: BTreeMap<ServiceName, Vec<Endpoint>> = BTreeMap::new();
        for (name, endpoint) in endpoints {
            services.entry(name).or_default().push(endpoint);
        }
        let services = services.into_iter().map(|(name, endpoints)| {
            (name.clone(), Arc::new(ServiceView::new(name, Protocol::Tcp, endpoints)))
        });
        let services = services.collect();
        self.snapshot.store(Arc::new(Snapshot { services, ..Snapshot::default() }));
    }

    /// What is in flight, as (instance, count).
    pub(super) fn in_flight(&self) -> u32 {
        self.proxy.in_flight()
    }
}

/// Two nodes, `a` that calls and `b` that serves `web` at `backend`; and a's entry to it.
pub(super) async fn pair(backend: SocketAddr) -> (Node, Node, SocketAddr) {
    let mut credentials = mesh_of(&["a", "b"]).unwrap().into_iter();
    let a = Node::start(credentials.next().unwrap()).await;
    let b = Node::start(credentials.next().unwrap()).await;
    b.serve(&[("web", "web", backend)]);
    a.sees([b.endpoint("web", "web")]);
    let entry = a.upstream("web").await;
    (a, b, entry)
}

/// Serves every connection with `serve`.
pub(super) async fn server<F, S>(serve: S) -> SocketAddr
where
    S: Fn(TcpStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    // A crowd is not lost in the server's own queue.
    let listener = socket.listen(8_192).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream));
        }
    });
    address
}

/// Sends everything back, and an end for an end.
pub(super) async fn echo_server() -> SocketAddr {
    server(|mut stream| async move {
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
        let _ = write.shutdown().await;
    })
    .await
}

/// Says its name to whoever comes, then echoes.
pub(super) async fn named_server(name: &'static str) -> SocketAddr {
    server(move |mut stream| async move {
        let _ = stream.write_all(name.as_bytes()).await;
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await
}

/// An address where nobody listens, nor can while the socket is held.
pub(super) fn nobody() -> (SocketAddr, TcpSocket) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    (socket.local_addr().unwrap(), socket)
}

/// Sends `bytes` and an end, and reads until the end meanwhile: no way holds more than its buffers.
pub(super) async fn ask(entry: SocketAddr, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    exchange(TcpStream::connect(entry).await?, bytes).await
}

pub(super) async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    bytes: &[u8],
) -> std::io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let send = async {
        writer.write_all(bytes).await?;
        writer.shutdown().await
    };
    let exchange = async { tokio::try_join!(send, reader.read_to_end(&mut answer)) };
    timeout(PATIENCE, exchange).await.expect("an answer in time")?;
    Ok(answer)
}

/// Returns once `is_true`.
pub(super) async fn until(what: &str, is_true: impl Fn() -> bool) {
    let wait = async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("waited in vain until {what}"));
}

/// Returns once `node` drains: it opens no more entries, and has refused tunnels since before.
pub(super) async fn drains(node: &Node) {
    let opens = async || {
        let any = "127.0.0.1:0".parse().unwrap();
        let service = "probe".parse().unwrap();
        node.proxy.open_upstream(service, any, EntryOptions::default()).await.is_ok()
    };
    timeout(PATIENCE, async { while opens().await {} }).await.expect("it drains");
}

/// Carries datagrams to one address until it is dropped: then the way is dead without a word, as
/// when a machine loses power.
pub(super) struct Wire {
    pub(super) address: SocketAddr,
    far: Arc<ArcSwap<SocketAddr>>,
    held: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Wire {
    pub(super) async fn to(far: SocketAddr) -> Self {
        Self::slow(far, Duration::ZERO).await
    }

    /// A way that takes `delay` in each direction.
    pub(super) async fn slow(far: SocketAddr, delay: Duration) -> Self {
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = near.local_addr().unwrap();
        let far = Arc::new(ArcSwap::from_pointee(far));
        let (to, held) = (Arc::clone(&far), watch::Sender::new(false));
        let lanes = held.clone();
        let task = tokio::spawn(async move {
            let mut ways = BTreeMap::new();
            let mut tasks = tokio::task::JoinSet::new();
            let mut buffer = vec![0; 65_536];
            loop {
                let Ok((len, from)) = near.recv_from(&mut buffer).await else { continue };
                if let Entry::Vacant(vacant) = ways.entry(from) {
                    let way = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                    let (near, to, back) = (Arc::clone(&near), Arc::clone(&to), Arc::clone(&way));
                    let (there, there_out) = mpsc::channel(LANE_LEN_MAX);
                    let (here, here_out) = mpsc::channel(LANE_LEN_MAX);
                    let send = Arc::clone(&way);
                    tasks.spawn(lane(there_out, delay, lanes.subscribe(), send, move || {
                        **to.load()
                    }));
                    tasks.spawn(lane(here_out, delay, lanes.subscribe(), near, move || from));
                    tasks.spawn(async move {
                        let mut buffer = vec![0; 65_536];
                        while let Ok((len, _)) = back.recv_from(&mut buffer).await {
                            let _ = here.try_send((Instant::now(), buffer[..len].to_vec()));
                        }
                    });
                    vacant.insert(there);
                }
                let _ = ways[&from].try_send((Instant::now(), buffer[..len].to_vec()));
            }
        });
        Self { address, far, held, task }
    }

    /// Leads to another address from now on.
    pub(super) fn lead_to(&self, far: SocketAddr) {
        self.far.store(Arc::new(far));
    }

    /// Keeps everything that comes, as a machine that is paused; or lets it go on.
    pub(super) fn hold(&self, is_held: bool) {
        self.held.send_replace(is_held);
    }
}

/// What a way holds at most in one direction; more is lost.
const LANE_LEN_MAX: usize = 10_000;

/// One direction of a way: what came at some instant is passed on `delay` later.
async fn lane(
    mut datagrams: mpsc::Receiver<(Instant, Vec<u8>)>,
    delay: Duration,
    mut held: watch::Receiver<bool>,
    socket: Arc<UdpSocket>,
    to: impl Fn() -> SocketAddr + Send,
) {
    while let Some((at, bytes)) = datagrams.recv().await {
        if !delay.is_zero() {
            tokio::time::sleep_until(at + delay).await;
        }
        if held.wait_for(|is_held| !is_held).await.is_err() {
            return;
        }
        let _ = socket.send_to(&bytes, to()).await;
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}
