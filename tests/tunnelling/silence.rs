//! Members that are paused, gone without a word, or just far away.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use murmesh::tls::testing::mesh_of;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::nodes::{Node, PATIENCE, Wire, ask, echo_server, named_server, server, until};
use super::three;
use crate::support::{alone, within};

#[tokio::test(flavor = "multi_thread")]
async fn member_that_pauses_for_a_second_loses_new_calls_and_no_connection() {
    let _turn = alone();
    let [a, b, c] = three().await;
    b.serve(&[("web", "web", echo_server().await)]);
    c.serve(&[("web", "web", named_server("c").await)]);
    let wire = Wire::to(b.address).await;
    let behind = || b.endpoint_behind(&wire, "web");
    a.sees([behind()]);
    let entry = a.upstream("web").await;
    let mut client = TcpStream::connect(entry).await.unwrap();
    client.write_all(b"hello").await.unwrap();
    client.read_exact(&mut [0; 5]).await.unwrap();
    a.sees([behind(), c.endpoint("web", "web")]);

    wire.hold(true);
    let began = Instant::now();
    until("it is avoided", || a.proxy.trouble(&behind().1) == Some("silent")).await;
    for _ in 0..10 {
        assert_eq!(ask(entry, b"!").await.unwrap(), b"c!");
    }
    sleep(Duration::from_secs(1).saturating_sub(began.elapsed())).await; // the length of the fault
    wire.hold(false);

    until("it is called again", || a.proxy.trouble(&behind().1).is_none()).await;
    client.write_all(b"still here").await.unwrap();
    let mut back = [0; 10];
    timeout(PATIENCE, client.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(&back, b"still here");
}

#[tokio::test(flavor = "multi_thread")]
async fn call_of_the_only_instance_waits_while_its_agent_pauses() {
    let _turn = alone();
    let [a, b, _] = three().await;
    let greeter = server(|mut stream| async move {
        stream.write_all(b"greeting").await.unwrap();
        let _ = stream.read(&mut [0; 1]).await; // open until the client goes
    });
    b.serve(&[("web", "web", greeter.await)]);
    let wire = Wire::to(b.address).await;
    a.sees([b.endpoint_behind(&wire, "web")]);
    let entry = a.upstream("web").await;
    let greet = move || async move {
        let mut client = TcpStream::connect(entry).await.unwrap();
        let mut greeting = [0; 8];
        timeout(PATIENCE, client.read_exact(&mut greeting)).await.unwrap().map(|_| greeting)
    };
    assert_eq!(&greet().await.unwrap(), b"greeting");

    wire.hold(true);
    let before = tokio::spawn(greet()); // asks before the silence is noticed
    let silent = || a.proxy.trouble(&b.endpoint_behind(&wire, "web").1) == Some("silent");
    until("it is silent", silent).await;
    let amid = tokio::spawn(greet());
    sleep(Duration::from_millis(300)).await; // the length of the fault
    wire.hold(false);
    assert_eq!(&before.await.unwrap().unwrap(), b"greeting");
    assert_eq!(&amid.await.unwrap().unwrap(), b"greeting");
}

/// Nine tenths of a second there and back: a keep-alive is answered when the next is long due.
#[tokio::test(flavor = "multi_thread")]
async fn member_that_is_far_away_is_not_taken_for_silent() {
    let _turn = alone();
    let [a, b, _] = three().await;
    b.serve(&[("web", "web", echo_server().await)]);
    let wire = Wire::slow(b.address, Duration::from_millis(450)).await;
    let behind = || b.endpoint_behind(&wire, "web");
    a.sees([behind()]);
    let entry = a.upstream("web").await;
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        assert_eq!(a.proxy.trouble(&behind().1), None, "after {:?}", began.elapsed());
        sleep(Duration::from_millis(10)).await;
    }
}

/// quinn's own idle time is three probe timeouts at least, and those grow with the round trip.
#[tokio::test(flavor = "multi_thread")]
async fn member_far_away_that_vanishes_means_reset_within_3_s_on_both_sides() {
    let _turn = alone();
    let (told, mut ends) = mpsc::unbounded_channel();
    let backend = server(move |mut stream| {
        let told = told.clone();
        async move {
            let mut bytes = [0; 5];
            stream.read_exact(&mut bytes).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            let end = stream.read(&mut bytes).await.map_err(|error| error.kind());
            let _ = told.send((end, Instant::now()));
        }
    });
    let [a, b, _] = three().await;
    b.serve(&[("web", "web", backend.await)]);
    let wire = Wire::slow(b.address, Duration::from_millis(400)).await;
    a.sees([b.endpoint_behind(&wire, "web")]);
    let mut client = TcpStream::connect(a.upstream("web").await).await.unwrap();
    client.write_all(b"hello").await.unwrap();
    client.read_exact(&mut [0; 5]).await.unwrap();

    drop(wire);
    let start = Instant::now();
    let end = timeout(PATIENCE, client.read(&mut [0; 1])).await.unwrap();
    let took = start.elapsed();
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(took < within(Duration::from_secs(3)), "the client waited {took:?}");
    let (end, at) = timeout(PATIENCE, ends.recv()).await.unwrap().unwrap();
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
    assert!(at - start < within(Duration::from_secs(3)), "the instance waited {:?}", at - start);
}

/// Each of them takes longer to be dialled than a call waits before it dials the next.
#[tokio::test(flavor = "multi_thread")]
async fn first_call_of_a_service_that_is_far_away_everywhere_is_served() {
    let _turn = alone();
    let names = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
    let mut credentials = mesh_of(&names).unwrap().into_iter();
    let a = Node::start(credentials.next().unwrap()).await;
    let backend = echo_server().await;
    let (mut far, mut endpoints) = (Vec::new(), Vec::new());
    for credentials in credentials {
        let node = Node::start(credentials).await;
        node.serve(&[("web", "web", backend)]);
        let wire = Wire::slow(node.address, Duration::from_millis(200)).await;
        endpoints.push(node.endpoint_behind(&wire, "web"));
        far.push((node, wire));
    }
    a.sees(endpoints);
    let entry = a.upstream("web").await;
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
    assert!(!a.metrics.encode().unwrap().contains("murmesh_retries_total{"), "nothing failed");
}
