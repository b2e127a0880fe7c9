//! Whole agents inside one process, as a program that embeds murmesh runs them: through the crate's
//! face.

use std::future::Future;
use std::io;
use std::time::Duration;

use murmesh::catalogue::record_key;
use murmesh::model::{MemberId, MemberRecord};
use murmesh::wire::decode_payload;
use murmesh::{
    Agent, DataDir, DialError, ExposeSpec, InstanceId, MemberPhase, NoEndpoint, ServiceName,
    Settings, StartError, Stopped, StoreError, Target, Weight,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::support::{SOON, beside_others, free_address};

/// Longest wait for what should take milliseconds.
const PATIENCE: Duration = SOON;
/// More than all buffers on the way hold.
const MUCH: usize = 32 * 1024 * 1024;

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("not in time: {what}"))
}

fn settings(dir: &tempfile::TempDir, name: &str) -> Settings {
    Settings::local(DataDir::new(dir.path())).with_name(name.parse().unwrap())
}

async fn found(name: &str) -> (Agent, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (Agent::found(settings(&dir, name)).await.unwrap(), dir)
}

async fn join_through(founder: &Agent, name: &str) -> (Agent, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let invite = founder.invite(Duration::from_secs(60), 1).await.unwrap();
    (Agent::join(settings(&dir, name), &invite.token).await.unwrap(), dir)
}

/// Two agents, of which the second offers `echo` behind the listener.
struct Pair {
    near: Agent,
    far: Agent,
    server: TcpListener,
    echo: ServiceName,
    _dirs: [tempfile::TempDir; 2],
}

impl Pair {
    async fn new() -> Self {
        let (near, a) = found("near").await;
        let (far, b) = join_through(&near, "far").await;
        let echo: ServiceName = "echo".parse().unwrap();
        let server = offer(&far, &echo, "echo").await;
        ready(&near, &echo, 1).await;
        Self { near, far, server, echo, _dirs: [a, b] }
    }

    async fn call(&self) -> (murmesh::MeshStream, TcpStream) {
        let dialled = soon("dial", self.near.dial(&self.echo)).await.unwrap();
        let (served, _) = soon("accept", self.server.accept()).await.unwrap();
        (dialled, served)
    }

    async fn stop(self) -> [Stopped; 2] {
        let near = self.near.stop(MemberPhase::Restarting, PATIENCE).await;
        [near, self.far.stop(MemberPhase::Restarting, PATIENCE).await]
    }
}

/// Exposes a listener of ours as the instance `id`.
async fn offer(agent: &Agent, service: &ServiceName, id: &str) -> TcpListener {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = Target::Tcp(server.local_addr().unwrap());
    let spec = ExposeSpec::new(service.clone(), to).unwrap();
    agent.expose(ExposeSpec { id: id.parse().unwrap(), ..spec }).await.unwrap();
    server
}

/// Waits until `agent` sees `count` instances that take work.
async fn ready(agent: &Agent, service: &ServiceName, count: usize) {
    let service = service.clone();
    let mut seen = agent.watch(move |mesh| mesh.ready(&service).count());
    soon("instances are ready", seen.wait_for(|seen| *seen == count)).await.unwrap();
}

#[tokio::test]
async fn three_agents_find_each_other_and_an_entry_leads_to_a_service() {
    let _turn = beside_others();
    let (a, a_dir) = found("a").await;
    soon("a lone agent is ready", a.ready()).await;
    let (b, b_dir) = join_through(&a, "b").await;
    let (c, c_dir) = join_through(&a, "c").await;
    for agent in [&a, &b, &c] {
        let mut alive = agent.watch(|mesh| mesh.alive().count());
        soon("all are seen", alive.wait_for(|alive| *alive == 3)).await.unwrap();
        soon("ready", agent.ready()).await;
    }
    let echo: ServiceName = "echo".parse().unwrap();
    let server = offer(&c, &echo, "echo").await;
    ready(&b, &echo, 1).await;
    let listen = b.upstream(&echo, "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let Target::Tcp(address) = listen else { panic!("a TCP entry") };
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"hello").await.unwrap();
    let (mut served, _) = soon("accept", server.accept()).await.unwrap();
    let mut heard = [0; 5];
    served.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"hello");
    drop((client, served));
    b.close_upstream(&listen).await.unwrap();
    TcpStream::connect(address).await.expect_err("the entry is closed");
    let last_words = |dir: &tempfile::TempDir, id: MemberId| {
        let entries = DataDir::new(dir.path()).entries().unwrap();
        let own = entries.iter().find(|entry| entry.key() == record_key(id)).unwrap();
        decode_payload::<MemberRecord>(&own.payload()).unwrap().phase
    };
    for (agent, dir, phase) in [
        (c, &c_dir, MemberPhase::Left),
        (b, &b_dir, MemberPhase::Restarting),
        (a, &a_dir, MemberPhase::Restarting),
    ] {
        let id = agent.id();
        assert_eq!(agent.stop(phase, PATIENCE).await, Stopped::Drained);
        assert_eq!(last_words(dir, id), phase, "the last state is the one on disk");
    }
    let again = Agent::start(Settings::local(DataDir::new(c_dir.path()))).await;
    assert!(matches!(again, Err(StartError::Left { .. })), "left lasts");
}

#[tokio::test]
async fn dialled_stream_keeps_half_close_both_ways() {
    let _turn = beside_others();
    let pair = Pair::new().await;
    let (mut dialled, mut served) = pair.call().await;
    assert_eq!(dialled.endpoint().instance.as_str(), "echo");
    dialled.write_all(b"question").await.unwrap();
    dialled.shutdown().await.unwrap();
    let mut heard = Vec::new();
    soon("the question and its end", served.read_to_end(&mut heard)).await.unwrap();
    assert_eq!(heard, b"question");
    served.write_all(b"answer").await.unwrap();
    served.shutdown().await.unwrap();
    let mut answer = Vec::new();
    soon("the answer and its end", dialled.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"answer");
    // The other way round: the instance ends first and still reads.
    let (mut dialled, mut served) = pair.call().await;
    served.shutdown().await.unwrap();
    assert_eq!(soon("its end", dialled.read(&mut [0; 8])).await.unwrap(), 0);
    dialled.write_all(b"late").await.unwrap();
    dialled.shutdown().await.unwrap();
    heard.clear();
    soon("what came late", served.read_to_end(&mut heard)).await.unwrap();
    assert_eq!(heard, b"late");
    assert_eq!(pair.stop().await, [Stopped::Drained; 2]);
}

#[tokio::test]
async fn cut_never_looks_complete_on_either_side_of_a_dialled_stream() {
    let _turn = beside_others();
    let pair = Pair::new().await;
    // Dropped before its end was said: the instance is reset.
    let (mut dialled, mut served) = pair.call().await;
    dialled.write_all(b"half").await.unwrap();
    served.read_exact(&mut [0; 4]).await.unwrap();
    drop(dialled);
    let error = soon("the reset", served.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // The instance is cut: the caller is reset after what came before.
    let (mut dialled, mut served) = pair.call().await;
    served.write_all(b"half").await.unwrap();
    dialled.read_exact(&mut [0; 4]).await.unwrap();
    served.set_zero_linger().unwrap();
    drop(served);
    let error = soon("the reset", dialled.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let error = dialled.write(b"more").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    // Given up at the drain deadline: the same, and the stop says so.
    let (mut dialled, _served) = pair.call().await;
    let Pair { near, far, _dirs, .. } = pair;
    assert_eq!(near.stop(MemberPhase::Restarting, Duration::ZERO).await, Stopped::Cut);
    let error = soon("the reset", dialled.read(&mut [0; 8])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    far.stop(MemberPhase::Restarting, PATIENCE).await;
}

#[tokio::test]
async fn reader_that_stalls_holds_its_writer_and_delays_no_neighbour() {
    let _turn = beside_others();
    let pair = Pair::new().await;
    let (mut stalled, mut served) = pair.call().await;
    let flood = tokio::spawn(async move {
        served.write_all(&vec![5; MUCH]).await.unwrap();
        served.shutdown().await.unwrap();
    });
    stalled.read_exact(&mut [0; 1]).await.unwrap(); // it flows, and then nobody reads
    for _ in 0..20 {
        let (mut dialled, mut served) = pair.call().await;
        dialled.write_all(b"ping").await.unwrap();
        let mut heard = [0; 4];
        soon("a neighbour's bytes", served.read_exact(&mut heard)).await.unwrap();
        dialled.shutdown().await.unwrap();
        served.shutdown().await.unwrap();
        soon("its end", dialled.read_to_end(&mut Vec::new())).await.unwrap();
    }
    assert!(!flood.is_finished(), "the writer waits for its reader: {MUCH} bytes are on no buffer");
    let mut rest = Vec::new();
    soon("all of it", stalled.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest.len(), MUCH - 1);
    stalled.shutdown().await.unwrap();
    flood.await.unwrap();
    assert_eq!(pair.stop().await, [Stopped::Drained; 2]);
}

#[tokio::test]
async fn writer_that_is_given_up_while_it_waits_is_a_reset() {
    let _turn = beside_others();
    let pair = Pair::new().await;
    let (mut dialled, mut served) = pair.call().await;
    let much = vec![5; MUCH];
    let sending = dialled.write_all(&much);
    timeout(Duration::from_millis(200), sending).await.expect_err("nobody reads it");
    drop(dialled);
    let mut heard = Vec::new();
    let error = soon("the reset", served.read_to_end(&mut heard)).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(pair.stop().await, [Stopped::Drained; 2]);
}

#[tokio::test]
async fn dial_says_why_no_instance_took_the_call() {
    let _turn = beside_others();
    let pair = Pair::new().await;
    let Pair { near, far, echo, .. } = &pair;
    let unknown = "nobody".parse().unwrap();
    assert_eq!(near.dial(&unknown).await.unwrap_err(), DialError::UnknownService);
    assert_eq!(near.pick(&unknown).unwrap_err(), NoEndpoint::UnknownService);
    assert_eq!(near.pick(echo).unwrap().member, far.id());
    // A target that nobody listens at.
    let closed = free_address();
    let dead: ServiceName = "dead".parse().unwrap();
    let spec = ExposeSpec::new(dead.clone(), Target::Tcp(closed)).unwrap();
    far.expose(spec.clone()).await.unwrap();
    ready(near, &dead, 1).await;
    let error = near.dial(&dead).await.unwrap_err();
    assert_eq!((error, error.reason()), (DialError::Unreachable, "unreachable"));
    assert!(error.is_retryable(), "it may listen in a moment");
    // No share at all.
    far.expose(ExposeSpec { weight: Weight(0), ..spec }).await.unwrap();
    let service = dead.clone();
    let mut weight = near.watch(move |mesh| mesh.endpoints(&service)[0].weight);
    soon("the weight is known", weight.wait_for(|weight| weight.0 == 0)).await.unwrap();
    assert_eq!(near.dial(&dead).await.unwrap_err(), DialError::NoEndpoints);
    pair.stop().await;
}

#[tokio::test]
async fn own_instances_are_dialled_without_a_second_member_and_in_flight_calls_are_balanced() {
    let _turn = beside_others();
    let (agent, _dir) = found("alone").await;
    let web: ServiceName = "web".parse().unwrap();
    let _servers = [offer(&agent, &web, "web-1").await, offer(&agent, &web, "web-2").await];
    ready(&agent, &web, 2).await;
    let mut open = Vec::new();
    for _ in 0..40 {
        open.push(soon("dial", agent.dial(&web)).await.unwrap());
    }
    let of = |id: &str| open.iter().filter(|s| s.endpoint().instance.as_str() == id).count();
    assert_eq!([of("web-1"), of("web-2")], [20, 20], "each call goes to the less busy of the two");
    agent.unexpose(&"web-1".parse::<InstanceId>().unwrap()).await.unwrap();
    ready(&agent, &web, 1).await;
    assert_eq!(agent.pick(&web).unwrap().instance.as_str(), "web-2");
    drop(open);
    assert_eq!(agent.stop(MemberPhase::Left, PATIENCE).await, Stopped::Drained);
}

#[tokio::test]
async fn watch_tells_what_comes_and_goes_and_ends_with_the_agent() {
    let _turn = beside_others();
    let pair = Pair::new().await;
    let echo = pair.echo.clone();
    let mut instances = pair.near.watch(move |mesh| {
        mesh.endpoints(&echo).iter().map(|e| e.instance.to_string()).collect::<Vec<_>>()
    });
    assert_eq!(soon("now", instances.changed()).await.unwrap(), ["echo"]);
    offer(&pair.far, &pair.echo, "echo-2").await;
    assert_eq!(soon("one more", instances.changed()).await.unwrap(), ["echo", "echo-2"]);
    pair.far.unexpose(&"echo".parse().unwrap()).await.unwrap();
    assert_eq!(soon("one less", instances.changed()).await.unwrap(), ["echo-2"]);
    let name = "far".parse().unwrap();
    let mut state = pair.near.watch(move |mesh| {
        mesh.members.values().find(|member| member.name == name).map(|member| member.state)
    });
    let Pair { near, far, _dirs, .. } = pair;
    far.stop(MemberPhase::Left, PATIENCE).await;
    let left = |state: &Option<_>| *state == Some(murmesh::MemberState::Left);
    soon("it left", state.wait_for(left)).await.unwrap();
    near.stop(MemberPhase::Restarting, PATIENCE).await;
    assert_eq!(soon("the end", state.changed()).await, None);
}

#[tokio::test]
async fn program_that_starts_again_is_the_same_member_and_says_again_what_it_serves() {
    let _turn = beside_others();
    let (first, dir) = found("again").await;
    let web: ServiceName = "web".parse().unwrap();
    offer(&first, &web, "web").await;
    ready(&first, &web, 1).await;
    let id = first.id();
    first.stop(MemberPhase::Restarting, PATIENCE).await;
    let second = Agent::found(settings(&dir, "another-name")).await.unwrap();
    assert_eq!((second.id(), second.name().as_str()), (id, "again"));
    soon("ready", second.ready()).await;
    assert!(second.snapshot().endpoints(&web).is_empty(), "it held for that run only");
    second.stop(MemberPhase::Restarting, PATIENCE).await;
}

#[tokio::test]
async fn start_that_fails_says_why_and_leaves_nothing_running() {
    let _turn = beside_others();
    let dir = tempfile::tempdir().unwrap();
    let empty = Agent::start(settings(&dir, "a")).await.map(drop).unwrap_err();
    assert!(matches!(empty, StartError::Store(StoreError::Empty { .. })), "{empty}");

    let (running, running_dir) = found("a").await;
    let held = Agent::start(settings(&running_dir, "a")).await.map(drop).unwrap_err();
    assert!(matches!(held, StartError::Store(StoreError::Locked { .. })), "{held}");

    // The mesh port is taken: nothing is left of the API, which was bound before it.
    let api = free_address();
    let founded = || settings(&dir, "b").with_api_port(api.port());
    let taken = Agent::found(founded().with_mesh(running.mesh_address())).await.map(drop);
    let taken = taken.unwrap_err();
    let port = running.mesh_address().port().to_string();
    assert!(matches!(taken, StartError::Proxy(_)) && taken.to_string().contains(&port), "{taken}");
    TcpListener::bind(api).await.expect("the API's port is free");

    // The API's port is taken.
    let holder = TcpListener::bind(api).await.unwrap();
    let taken = Agent::start(founded()).await.map(drop).unwrap_err();
    assert!(
        matches!(taken, StartError::Api { ref address, .. } if *address == Target::Tcp(api)),
        "{taken}"
    );
    drop(holder);

    // The last thing of all fails: what ran by then is gone, ports, threads and lock.
    let holder = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mesh = free_address();
    let mut late = founded().with_mesh(mesh);
    late.socks.value = Some(holder.local_addr().unwrap());
    let error = Agent::start(late).await.map(drop).unwrap_err();
    assert!(matches!(error, StartError::Entry { .. }), "{error}");
    TcpListener::bind(api).await.expect("the API's port is free");
    drop(UdpSocket::bind(mesh).await.expect("the mesh port is free"));
    let started = Agent::start(founded().with_mesh(mesh)).await.expect("and so is the directory");

    // Dropped instead of stopped, it ends as well.
    drop(started);
    soon("the mesh port is free", async {
        while UdpSocket::bind(mesh).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    running.stop(MemberPhase::Restarting, PATIENCE).await;
}

#[test]
fn agent_and_its_streams_may_be_shared_between_threads() {
    let _turn = beside_others();
    fn is_shared<T: Send + Sync>() {}
    fn is_sent<T: Send>() {}
    is_shared::<Agent>();
    is_shared::<murmesh::MeshStream>();
    is_sent::<murmesh::Watch<usize>>();
}
