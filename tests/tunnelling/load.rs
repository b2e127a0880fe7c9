//! Many connections at once, and readers that take nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use murmesh::runtime::limits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::nodes::{PATIENCE, ask, echo_server, pair, server, until};
use crate::support::{OPENING_MAX, alone, skip, within};

/// More than a peer is granted at first, and more than connection credit would hold at 256 KiB each
/// if credit did not grow with the streams.
const STALLED: u32 = 250;

#[tokio::test(flavor = "multi_thread")]
async fn stalled_readers_delay_no_neighbour() {
    let _turn = alone();
    let flood = server(|mut stream| async move {
        let chunk = vec![7; 64 * 1024];
        while stream.write_all(&chunk).await.is_ok() {}
    });
    let flood = flood.await;
    let (a, b, flooded) = pair(flood).await;
    b.serve(&[("web", "web", flood), ("echo", "echo", echo_server().await)]);
    a.sees([b.endpoint("web", "web"), b.endpoint("echo", "echo")]);
    let echo = a.upstream("echo").await;
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let mut client = TcpStream::connect(flooded).await.unwrap();
        client.read_exact(&mut [0; 1]).await.unwrap(); // and nothing more
        stalled.push(client);
    }
    until("all of them are in flight", || a.in_flight() == STALLED).await;
    let mut neighbour = TcpStream::connect(echo).await.unwrap();
    let mut slowest = Duration::ZERO;
    for _ in 0..100 {
        let begun = Instant::now();
        neighbour.write_all(&[1; 1024]).await.unwrap();
        timeout(PATIENCE, neighbour.read_exact(&mut [0; 1024])).await.unwrap().unwrap();
        slowest = slowest.max(begun.elapsed());
    }
    assert!(slowest < within(Duration::from_secs(2)), "{slowest:?}");
    assert_eq!(ask(echo, b"and a new one").await.unwrap(), b"and a new one");
    let big = vec![3; 4 * 1024 * 1024];
    assert_eq!(ask(echo, &big).await.unwrap(), big, "credit flows, too");
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_connections_at_once_all_get_their_bytes_back() {
    let _turn = alone();
    // Four descriptors each in this one process.
    let count = (limits::raise_open_files() / 4).saturating_sub(300).min(5_000);
    if count < 1_000 {
        skip("the limit of open files is too low for 1,000 connections (ulimit -Hn)");
        return;
    }
    let (a, b, entry) = pair(echo_server().await).await;
    let opening = Arc::new(Semaphore::new(OPENING_MAX));
    let mut clients = JoinSet::new();
    for number in 0..count {
        let opening = Arc::clone(&opening);
        clients.spawn(async move {
            let _place = opening.acquire().await;
            let mut client = TcpStream::connect(entry).await?;
            client.write_all(&number.to_be_bytes()).await?;
            let back = timeout(3 * PATIENCE, client.read_u64()).await??;
            Ok::<_, std::io::Error>((client, number, back))
        });
    }
    let mut open = Vec::new();
    while let Some(ended) = clients.join_next().await {
        let (client, sent, back) = ended.unwrap().unwrap_or_else(|error| {
            let events = [&a, &b].map(|node| node.events.recent(0));
            panic!("after {} of {count}: {error}; {events:#?}", open.len())
        });
        assert_eq!(sent, back);
        open.push(client);
    }
    assert_eq!(u64::from(a.in_flight()), count, "all are open at the same time");
    drop(open);
    until("all have ended", || a.in_flight() + b.in_flight() == 0).await;
}
