//! Two and three data planes on loopback, real QUIC and real certificates: what a client sees.

#![allow(clippy::disallowed_methods)] // tests have no agent that could own their tasks

mod hostile;
mod load;
mod nodes;
mod silence;
mod sockets;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use murmesh::mesh::Endpoint;
use murmesh::model::Weight;
use murmesh::telemetry::Door;
use murmesh::tls::Plane;
use murmesh::tls::testing::mesh_of;
use quinn::ConnectionError;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{alone, beside_others, within};
use nodes::{
    Node, PATIENCE, Wire, ask, drains, echo_server, named_server, nobody, pair, server, until,
};

#[tokio::test(flavor = "multi_thread")]
async fn bytes_come_back_through_two_agents() {
    let _turn = beside_others();
    let (a, b, entry) = pair(echo_server().await).await;
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
    assert_eq!(ask(entry, b"").await.unwrap(), b"", "an end without bytes is carried, too");
    until("nothing is in flight", || a.in_flight() + b.in_flight() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn half_close_is_carried_both_ways() {
    let _turn = beside_others();
    // The server answers only after the client's end, and the client ends only after the server's.
    let backend = server(|mut stream| async move {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        stream.write_all(&request.len().to_be_bytes()).await.unwrap();
    });
    let (_a, _b, entry) = pair(backend.await).await;
    assert_eq!(ask(entry, &[1; 1000]).await.unwrap(), 1000_usize.to_be_bytes());

    let first = server(|mut stream| async move {
        stream.write_all(b"greeting").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"thanks");
    });
    let (a, b, entry) = pair(first.await).await;
    let mut client = TcpStream::connect(entry).await.unwrap();
    let mut greeting = Vec::new();
    client.read_to_end(&mut greeting).await.unwrap();
    assert_eq!(greeting, b"greeting");
    client.write_all(b"thanks").await.unwrap();
    client.shutdown().await.unwrap();
    until("both ends were carried", || a.in_flight() + b.in_flight() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_of_64_mib_each_way_arrives_once_and_in_order() {
    let _turn = alone();
    const LEN: u64 = 64 * 1024 * 1024;
    let (_a, _b, entry) = pair(echo_server().await).await;
    let (mut read, mut write) = TcpStream::connect(entry).await.unwrap().into_split();
    let sender = tokio::spawn(async move {
        let mut state = 1;
        let mut chunk = vec![0_u8; 64 * 1024];
        for _ in 0..LEN / chunk.len() as u64 {
            chunk.iter_mut().for_each(|byte| *byte = next(&mut state));
            write.write_all(&chunk).await.unwrap();
        }
        write.shutdown().await.unwrap();
    });
    let (mut state, mut len) = (1, 0);
    let mut chunk = vec![0_u8; 64 * 1024];
    loop {
        let count = timeout(PATIENCE, read.read(&mut chunk)).await.unwrap().unwrap();
        if count == 0 {
            break;
        }
        assert!(chunk[..count].iter().all(|byte| *byte == next(&mut state)), "at {len}");
        len += count as u64;
    }
    assert_eq!(len, LEN);
    sender.await.unwrap();
}

/// A cheap sequence that no shift or repeat of itself equals.
fn next(state: &mut u64) -> u8 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 56) as u8
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_that_refuses_is_replaced_without_the_client_noticing() {
    let _turn = beside_others();
    let [a, b, c] = three().await;
    let (refusing, _held) = nobody();
    b.serve(&[("web", "web", refusing)]);
    c.serve(&[("web", "web", named_server("c").await)]);
    a.sees([b.endpoint("web", "web"), c.endpoint("web", "web")]);
    let entry = a.upstream("web").await;
    for _ in 0..20 {
        assert_eq!(ask(entry, b"!").await.unwrap(), b"c!");
    }
    assert!(b.metrics.refused(Door::mesh, "unreachable") > 0, "b was asked, and said no");
    assert!(
        b.metrics.refused(Door::mesh, "unreachable") < 10,
        "and is avoided from then on, not asked for every second connection"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn call_is_served_while_one_of_very_many_instances_lives() {
    let _turn = beside_others();
    let [a, b, c] = three().await;
    c.serve(&[("web", "web", named_server("c").await)]);
    let weighing = |weight, (service, endpoint)| (service, Endpoint { weight, ..endpoint });
    let gone = (1..=40).map(|number| b.endpoint("web", &format!("gone-{number}")));
    let gone = gone.map(|one| weighing(Weight(u16::MAX), one));
    // Of 100,000 such runs one draws it among the first.
    let alive = weighing(Weight(1), c.endpoint("web", "web"));
    a.sees(gone.chain([alive]).collect::<Vec<_>>());
    assert_eq!(ask(a.upstream("web").await, b"!").await.unwrap(), b"c!");
    assert!(b.metrics.refused(Door::mesh, "not_served") > 8, "the others were asked before");
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_agent_refuses_and_another_serves() {
    let _turn = beside_others();
    let [a, b, c] = three().await;
    b.serve(&[("web", "web", named_server("b").await)]);
    c.serve(&[("web", "web", named_server("c").await)]);
    a.sees([b.endpoint("web", "web")]);
    let entry = a.upstream("web").await;
    let mut early = TcpStream::connect(entry).await.unwrap();
    let mut name = [0];
    early.read_exact(&mut name).await.unwrap();
    let draining = tokio::spawn({
        let proxy = b.proxy.clone();
        async move { proxy.drain(PATIENCE).await }
    });
    drains(&b).await;
    // Gossip has not told yet: a still believes that b is ready.
    a.sees([b.endpoint("web", "web"), c.endpoint("web", "web")]);
    for _ in 0..20 {
        assert_eq!(ask(entry, b"!").await.unwrap(), b"c!");
    }
    early.write_all(b"still here").await.unwrap();
    let mut back = [0; 10];
    early.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"still here", "what was in flight is finished");
    drop(early);
    assert!(draining.await.unwrap(), "nothing was cut");
}

#[tokio::test(flavor = "multi_thread")]
async fn drain_cuts_what_outlives_its_deadline() {
    let _turn = beside_others();
    let (_a, b, entry) = pair(named_server("b").await).await;
    let mut client = TcpStream::connect(entry).await.unwrap();
    let mut name = [0];
    client.read_exact(&mut name).await.unwrap();
    assert!(!b.proxy.drain(Duration::from_millis(100)).await, "it says that it cut something");
    let end = timeout(PATIENCE, client.read(&mut name)).await.unwrap();
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset, "a cut is no end");
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_that_dies_resets_the_client() {
    let _turn = beside_others();
    let backend = server(|mut stream| async move {
        stream.write_all(b"half an ans").await.unwrap();
        let mut request = [0; 1];
        stream.read_exact(&mut request).await.unwrap();
        stream.set_zero_linger().unwrap(); // as the kernel does for a process that is killed
    });
    let (_a, _b, entry) = pair(backend.await).await;
    let mut client = TcpStream::connect(entry).await.unwrap();
    let mut answer = [0; 11];
    client.read_exact(&mut answer).await.unwrap();
    client.write_all(b"x").await.unwrap();
    let end = timeout(PATIENCE, client.read(&mut answer)).await.unwrap();
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset, "a cut is no end");
}

#[tokio::test(flavor = "multi_thread")]
async fn client_that_dies_resets_the_instance() {
    let _turn = beside_others();
    let (ended, end) = tokio::sync::oneshot::channel();
    let ended = Arc::new(std::sync::Mutex::new(Some(ended)));
    let backend = server(move |mut stream| {
        let ended = Arc::clone(&ended);
        async move {
            stream.write_all(b"x").await.unwrap();
            let mut byte = [0; 1];
            let outcome = stream.read(&mut byte).await.map_err(|error| error.kind());
            let _ = ended.lock().unwrap().take().unwrap().send(outcome);
        }
    });
    let (_a, _b, entry) = pair(backend.await).await;
    let mut client = TcpStream::connect(entry).await.unwrap();
    client.read_exact(&mut [0; 1]).await.unwrap();
    client.set_zero_linger().unwrap();
    drop(client);
    let outcome = timeout(PATIENCE, end).await.unwrap().unwrap();
    assert_eq!(outcome, Err(ErrorKind::ConnectionReset));
}

#[tokio::test(flavor = "multi_thread")]
async fn early_answer_arrives_although_the_server_reads_no_more() {
    let _turn = beside_others();
    // As servers do that refuse an upload: answer, end, and close with bytes unread.
    let backend = server(|mut stream| async move {
        let mut head = [0; 16];
        stream.read_exact(&mut head).await.unwrap();
        stream.write_all(b"too large").await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let (_a, _b, entry) = pair(backend.await).await;
    let mut client = TcpStream::connect(entry).await.unwrap();
    client.write_all(&[0; 16]).await.unwrap();
    let mut answer = Vec::new();
    let upload = async {
        while client.write_all(&[0; 1024]).await.is_ok() && answer.len() < 9 {
            let _ = timeout(Duration::from_millis(10), client.read_buf(&mut answer)).await;
        }
    };
    timeout(PATIENCE, upload).await.unwrap();
    assert_eq!(answer, b"too large");
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_vanishes_after_bytes_reached_the_instance_means_reset_within_3_s_and_no_replay()
{
    let _turn = alone();
    let [a, b, c] = three().await;
    let received = Arc::new(AtomicU64::new(0));
    let silent = || {
        let received = Arc::clone(&received);
        server(move |mut stream| {
            let received = Arc::clone(&received);
            async move {
                let mut bytes = [0; 64];
                while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                    received.fetch_add(count as u64, Ordering::SeqCst);
                }
            }
        })
    };
    b.serve(&[("web", "web", silent().await)]);
    c.serve(&[("web", "web", silent().await)]);
    let (to_b, to_c) = (Wire::to(b.address).await, Wire::to(c.address).await);
    a.sees([b.endpoint_behind(&to_b, "web"), c.endpoint_behind(&to_c, "web")]);
    let mut client = TcpStream::connect(a.upstream("web").await).await.unwrap();
    client.write_all(b"pay 100").await.unwrap();
    until("the order has arrived", || received.load(Ordering::SeqCst) == 7).await;
    drop((to_b, to_c));
    let start = Instant::now();
    let end = timeout(PATIENCE, client.read(&mut [0; 1])).await.unwrap();
    let took = start.elapsed();
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(took < within(Duration::from_secs(3)), "{took:?}");
    assert_eq!(received.load(Ordering::SeqCst), 7, "one order, delivered once");
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_vanishes_is_avoided_within_a_second() {
    let _turn = alone();
    let [a, b, c] = three().await;
    b.serve(&[("web", "web", named_server("b").await)]);
    c.serve(&[("web", "web", named_server("c").await)]);
    let to_b = Wire::to(b.address).await;
    a.sees([b.endpoint_behind(&to_b, "web"), c.endpoint("web", "web")]);
    let entry = a.upstream("web").await;
    let mut seen = Vec::new();
    while !seen.contains(&b'b') {
        seen = ask(entry, b"").await.unwrap();
    }
    drop(to_b);
    // Traffic goes on: who asks nothing first is moved, and after a second nobody is sent there.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(1_100) {
        let begun = Instant::now();
        assert_eq!(ask(entry, b"").await.unwrap(), b"c");
        assert!(begun.elapsed() < within(Duration::from_millis(1_500)), "{:?}", begun.elapsed());
    }
    for _ in 0..50 {
        let begun = Instant::now();
        assert_eq!(ask(entry, b"!").await.unwrap(), b"c!");
        assert!(begun.elapsed() < within(Duration::from_millis(500)), "{:?}", begun.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_that_comes_back_on_its_port_resets_what_its_former_self_carried() {
    let _turn = alone();
    let [a, b, _] = three().await;
    let wire = Wire::to(b.address).await;
    a.sees([b.endpoint_behind(&wire, "web")]);
    let (entry, echo) = (a.upstream("web").await, echo_server().await);
    b.serve(&[("web", "web", echo)]);
    let (mut lives, mut causes) = (vec![b], Vec::new());
    // On a starved machine silence may be noticed before the word of the new self is read.
    while !causes.contains(&ConnectionError::Reset) {
        assert!(causes.len() < 5, "its new self never says that it knows nothing: {causes:?}");
        let mut client = TcpStream::connect(entry).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        client.read_exact(&mut [0; 5]).await.unwrap();
        // A second connection, to see what ends both.
        let beside = a.endpoint.connect(Plane::Data, wire.address, Some(lives[0].id));
        let beside = beside.await.unwrap();
        let reborn = Node::start(lives[0].credentials.clone()).await;
        reborn.serve(&[("web", "web", echo)]);
        wire.lead_to(reborn.address);
        lives.push(reborn);
        client.write_all(&[0; 100]).await.unwrap();
        let end = timeout(PATIENCE, client.read(&mut [0; 1])).await.unwrap();
        assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
        causes.push(timeout(PATIENCE, beside.closed()).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_data_plane_ends_its_thread_and_frees_its_port() {
    let _turn = beside_others();
    let (a, b, entry) = pair(echo_server().await).await;
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
    assert!(a.proxy.drain(PATIENCE).await && b.proxy.drain(PATIENCE).await, "all ended by itself");
    assert!(TcpStream::connect(entry).await.is_err(), "a draining agent accepts nobody");
    for node in [a, b] {
        node.proxy.close().await;
        timeout(PATIENCE, node.thread.join()).await.unwrap().unwrap();
        drop(node.endpoint); // the last that holds the socket
        std::net::UdpSocket::bind(node.address).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn own_instance_is_reached_without_a_tunnel() {
    let _turn = beside_others();
    let a = Node::start(mesh_of(&["a"]).unwrap().remove(0)).await;
    a.serve(&[("web", "web", echo_server().await)]);
    a.sees([a.endpoint("web", "web")]);
    assert_eq!(ask(a.upstream("web").await, b"hello").await.unwrap(), b"hello");
    until("nothing is in flight", || a.in_flight() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_without_an_endpoint_is_reset_and_counted() {
    let _turn = beside_others();
    let a = Node::start(mesh_of(&["a"]).unwrap().remove(0)).await;
    let entry = a.upstream("nobody").await;
    assert_eq!(ask(entry, b"").await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(a.metrics.refused(Door::upstream, "unknown_service"), 1);
    assert_eq!(a.events.recent(0).last().unwrap().reason, "unknown_service");
}

async fn three() -> [Node; 3] {
    let mut credentials = mesh_of(&["a", "b", "c"]).unwrap().into_iter();
    let mut start = async || Node::start(credentials.next().unwrap()).await;
    [start().await, start().await, start().await]
}
