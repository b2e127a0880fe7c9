//! Strangers, and members that speak nonsense: refused, counted, and everybody else is served.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use futures_util::FutureExt;
use futures_util::future::join_all;
use murmesh::model::MemberId;
use murmesh::telemetry::Door;
use murmesh::tls::testing::mesh_of;
use murmesh::tls::{Plane, server_name};
use murmesh::transport::{DialError, RETRY_ABOVE, refusal};
use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use quinn_proto::TransportErrorCode;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::nodes::{Node, PATIENCE, ask, drains, echo_server, named_server, pair, until};
use crate::support::{Flooder, alone, beside_others, dial as stranger, nobody, trusting};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[tokio::test(flavor = "multi_thread")]
async fn datagrams_of_junk_change_nothing() {
    let _turn = beside_others();
    let (_a, b, entry) = pair(echo_server().await).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut state = 1_u64;
    for len in [0, 1, 20, 40, 1_199, 1_200, 1_500, 9_000].into_iter().cycle().take(2_000) {
        let junk: Vec<u8> = (0..len).map(|_| super::next(&mut state)).collect();
        let _ = socket.send_to(&junk, b.address).await;
    }
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_and_counted_by_what_they_lack() {
    let _turn = beside_others();
    let (_a, b, entry) = pair(echo_server().await).await;
    let stranger = mesh_of(&["mallory"]).unwrap().remove(0);
    let b_id = b.id;
    let dial =
        async |tls: rustls::ClientConfig, marker: u8| dial(b.address, tls, marker, b_id).await;
    let data = Plane::Data.marker();

    dial(stranger.client_config(Plane::Data).unwrap(), data).await;
    counted(&b, "other_mesh").await;

    let mut same_words = stranger.client_config(Plane::Data).unwrap();
    same_words.alpn_protocols = vec![Plane::Data.alpn(b.credentials.mesh())];
    same_words.dangerous().set_certificate_verifier(trusting());
    dial(same_words, data).await;
    counted(&b, "unknown_issuer").await;

    let mut nobody = b.credentials.client_config(Plane::Data).unwrap();
    nobody.client_auth_cert_resolver = Arc::new(NoCertificate);
    dial(nobody, data).await;
    counted(&b, "no_certificate").await;

    dial(b.credentials.client_config(Plane::Data).unwrap(), 0xee).await;
    counted(&b, "unknown_plane").await;

    drop(b.enrolment);
    let enrol = b.credentials.client_config(Plane::Enrolment).unwrap();
    dial_at(b.address, enrol, Plane::Enrolment.marker(), None).await;
    until("closed", || b.metrics.refused(Door::enrol, "closed") == 1).await;
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn member_that_is_not_the_one_meant_is_not_spoken_to() {
    let _turn = beside_others();
    let (a, b, _) = pair(echo_server().await).await;
    let other = MemberId::from_bytes([9; 16]);
    let dialled = a.endpoint.connect(Plane::Data, b.address, Some(other)).await;
    assert_eq!(dialled.unwrap_err(), DialError::Refused { reason: "wrong_member" });
    counted(&b, "wrong_member").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_has_only_so_many_connections() {
    let _turn = beside_others();
    let (a, b, entry) = pair(echo_server().await).await;
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello"); // the first
    let mut open = Vec::new();
    for _ in 0..8 {
        open.push(a.endpoint.connect(Plane::Data, b.address, Some(b.id)).await.unwrap());
    }
    until("one is refused", || b.metrics.refused(Door::mesh, "overload") == 1).await;
    let refused = open.iter().filter_map(Connection::close_reason).next();
    assert!(refused.is_none_or(|why| refusal(&why) == Some("overload")), "and told why");
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
}

/// From an address that is never proved.
#[tokio::test(flavor = "multi_thread")]
async fn past_32_unfinished_handshakes_an_address_is_asked_to_prove_itself_and_members_connect() {
    let _turn = alone();
    let (a, b, _) = pair(echo_server().await).await;
    let asked = 200 - (RETRY_ABOVE + 1);
    let flooder = flood(flooder(&b, 2), 200, false, |flooder| flooder.retries >= asked).await;
    connects(&a, &b).await;
    let flooder = flood(flooder, 0, false, |_| true).await;
    assert_eq!(flooder.retries, asked, "33 are under way, all others cost nothing");
    assert_eq!(b.metrics.refused(Door::mesh, "overload"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_proved_itself_takes_its_share_of_handshakes_and_no_more() {
    let _turn = alone();
    let (a, b, entry) = pair(echo_server().await).await;
    let over_share = || b.metrics.refused(Door::mesh, "over_share");
    let _flooder = flood(flooder(&b, 2), 400, true, |_| over_share() > 0).await;
    connects(&a, &b).await; // behind all of the flood, in the same socket
    assert!(over_share() <= 400 - 256, "{} of 400 were refused", over_share());
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_from_everywhere_ends_at_a_bound_and_when_it_is_over_members_connect() {
    let _turn = alone();
    let (a, b, entry) = pair(echo_server().await).await;
    assert_eq!(ask(entry, b"before").await.unwrap(), b"before");
    let mut flooders: Vec<Flooder> = (2..8).map(|host| flooder(&b, host)).collect();
    // Refused at an address that has begun nothing else: not its share is used up, but all.
    let newcomer = async || {
        let tls = nobody(Plane::Data.alpn(b.credentials.mesh()));
        let from = Ipv4Addr::new(127, 0, 0, 99).into();
        let (_endpoint, dialled) =
            stranger(from, b.address, tls, Plane::Data.marker(), &server_name(None));
        matches!(
            timeout(PATIENCE, dialled).await,
            Ok(Err(ConnectionError::ConnectionClosed(close)))
                if close.error_code == TransportErrorCode::CONNECTION_REFUSED
        )
    };
    timeout(PATIENCE, async {
        loop {
            let all = std::mem::take(&mut flooders).into_iter();
            flooders = join_all(all.map(|flooder| flood(flooder, 200, true, |_| true))).await;
            if newcomer().await {
                return;
            }
        }
    })
    .await
    .expect("a bound");
    assert!(b.metrics.refused(Door::mesh, "overload") > 0);
    assert_eq!(ask(entry, b"during").await.unwrap(), b"during", "who is in stays in");
    drop(flooders);
    connects(&a, &b).await;
}

/// However many handshakes strangers hold at one plane, the others have places of their own.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_at_one_plane_keeps_nobody_from_another() {
    let _turn = alone();
    let (a, b, entry) = pair(echo_server().await).await;
    let overload = || b.metrics.refused(Door::mesh, "overload");
    let tls = || nobody(Plane::Gossip.alpn(b.credentials.mesh()));
    let at_gossip =
        |host| Flooder::new(Ipv4Addr::new(127, 0, 0, host).into(), b.address, tls(), Plane::Gossip);
    let mut flooders: Vec<Flooder> = (2..8).map(at_gossip).collect();
    timeout(PATIENCE, async {
        while overload() == 0 {
            let all = std::mem::take(&mut flooders).into_iter();
            flooders = join_all(all.map(|flooder| flood(flooder, 200, true, |_| true))).await;
        }
    })
    .await
    .expect("a bound");
    let before = b.metrics.refused(Door::mesh, "timeout");
    connects(&a, &b).await;
    assert_eq!(b.metrics.refused(Door::mesh, "timeout"), before, "the flood had not ended yet");
    assert_eq!(ask(entry, b"during").await.unwrap(), b"during");
}

fn flooder(far: &Node, host: u8) -> Flooder {
    let tls = nobody(Plane::Data.alpn(far.credentials.mesh()));
    Flooder::new(Ipv4Addr::new(127, 0, 0, host).into(), far.address, tls, Plane::Data)
}

/// Begins `count` more handshakes and hears, on a thread that may block, until `is_enough`.
async fn flood(
    mut flooder: Flooder,
    mut count: usize,
    is_proving: bool,
    is_enough: impl Fn(&Flooder) -> bool,
) -> Flooder {
    let end = Instant::now() + PATIENCE;
    loop {
        let blocking = tokio::task::spawn_blocking(move || {
            flooder.begin(count, is_proving);
            flooder.hear(is_proving);
            flooder
        });
        (flooder, count) = (blocking.await.unwrap(), 0);
        if is_enough(&flooder) {
            return flooder;
        }
        assert!(Instant::now() < end, "after {} retries", flooder.retries);
    }
}

/// Returns once a new connection of `a` is served by `b`.
async fn connects(a: &Node, b: &Node) {
    let header = with_len(b"\x01\x03web\x06nobody\x00\x00");
    timeout(PATIENCE, async {
        loop {
            let Ok(connection) = a.endpoint.connect(Plane::Data, b.address, Some(b.id)).await
            else {
                continue; // refused: it takes a round trip
            };
            let (mut send, mut receive) = connection.open_bi().await.unwrap();
            if send.write_all(&header).await.is_ok()
                && receive.read_to_end(200).await.is_ok_and(|answer| answer[..2] == [2, 1])
            {
                return;
            }
        }
    })
    .await
    .expect("a member connects");
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_junk_are_cut_and_counted_and_neighbours_are_served() {
    let _turn = beside_others();
    let (a, b, entry) = pair(echo_server().await).await;
    let connection = a.endpoint.connect(Plane::Data, b.address, Some(b.id)).await.unwrap();
    let junk: [&[u8]; 6] = [
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 4_096],       // a header of 64 KiB is announced
        &[0, 4, 1, 9, 9, 9],  // no names
        &[0, 40, 1, 3, b'w'], // ends too early
        &[0, 0],              // empty
        &[],
    ];
    for (count, bytes) in (1..).zip(junk) {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        send.finish().unwrap();
        let end = timeout(PATIENCE, receive.read_to_end(100)).await.unwrap();
        assert!(end.is_err(), "reset, not answered: {bytes:?}");
        until("it is counted", || b.metrics.refused(Door::mesh, "malformed") == count).await;
    }
    let unheard = b"\x01\x03web\x03web\x00\x07";
    assert_eq!(answer(&connection, &with_len(unheard)).await[..2], [2, 6], "unknown mode");
    let newer = b"\x03\x03web\x06nobody\x00\x00\x00and more";
    assert_eq!(answer(&connection, &with_len(newer)).await[..2], [2, 1], "a newer header is read");
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
}

/// A stream without a header can hold a window of memory, so it must not lead to more of them.
#[tokio::test(flavor = "multi_thread")]
async fn tunnels_without_a_header_are_granted_no_more_streams() {
    let _turn = beside_others();
    let (a, b, entry) = pair(echo_server().await).await;
    let connection = a.endpoint.connect(Plane::Data, b.address, Some(b.id)).await.unwrap();
    let _silent = headerless(&connection, 99).await;
    // Streams are accepted in their order: when the last is answered, the others are there.
    let nobody = with_len(b"\x01\x03web\x06nobody\x00\x00");
    assert_eq!(answer(&connection, &nobody).await[..2], [2, 1], "not served");
    let granted: Vec<_> =
        std::iter::from_fn(|| connection.open_bi().now_or_never()).take(300).collect();
    assert!(granted.len() <= 1, "{} more, beside the one that was answered", granted.len());
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_too_many_tunnels_without_a_header_the_oldest_are_refused() {
    let _turn = beside_others();
    let (a, b, entry) = pair(echo_server().await).await;
    let connection = a.endpoint.connect(Plane::Data, b.address, Some(b.id)).await.unwrap();
    let header = with_len(b"\x01\x03web\x03web\x00\x00");
    let mut admitted = Vec::new();
    for _ in 0..60 {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&header).await.unwrap();
        receive.read_exact(&mut [0]).await.unwrap();
        admitted.push((send, receive)); // with these the peer is granted more than it had
    }
    let mut silent = headerless(&connection, 300).await;
    until("what is too many is refused", || b.metrics.refused(Door::mesh, "overflow") == 44).await;
    let (_, oldest) = &mut silent[0];
    let refusal = timeout(PATIENCE, oldest.read_to_end(200)).await.unwrap().unwrap();
    assert_eq!(refusal[..2], [2, 4], "overflow: the caller may go elsewhere");
    let (send, newest) = &mut silent[299];
    send.write_all(&header[1..]).await.unwrap();
    let mut accepted = [0];
    timeout(PATIENCE, newest.read_exact(&mut accepted)).await.unwrap().unwrap();
    assert_eq!(accepted, [1], "whose header comes after all is served");
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
    assert_eq!(b.metrics.refused(Door::mesh, "overflow"), 44);
}

/// Opens streams that say the first byte of a header and nothing more.
async fn headerless(connection: &Connection, count: usize) -> Vec<(SendStream, RecvStream)> {
    let mut open = Vec::with_capacity(count);
    for _ in 0..count {
        let (mut send, receive) =
            timeout(PATIENCE, connection.open_bi()).await.expect("a stream is granted").unwrap();
        send.write_all(&[0]).await.unwrap();
        open.push((send, receive));
    }
    open
}

/// A caller whose tunnel is refused may try another instance; one whose tunnel is lost may not.
#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_that_is_on_its_way_when_the_agent_closes_is_refused_and_not_lost() {
    let _turn = beside_others();
    let (a, b, entry) = pair(named_server("b").await).await;
    let mut carried = TcpStream::connect(entry).await.unwrap();
    carried.read_exact(&mut [0]).await.unwrap();
    let connection = a.endpoint.connect(Plane::Data, b.address, Some(b.id)).await.unwrap();
    let proxy = b.proxy.clone();
    tokio::spawn(async move { proxy.drain(PATIENCE).await });
    drains(&b).await;

    let header = with_len(b"\x01\x03web\x03web\x00\x00");
    let (first, rest) = header.split_at(4);
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(first).await.unwrap();
    // Streams are accepted in their order: when a later one has its refusal, this one is there.
    assert_eq!(answer(&connection, &header).await[..2], [2, 2], "draining");
    let proxy = b.proxy.clone();
    let closing = tokio::spawn(async move { proxy.close().await });
    let cut = timeout(PATIENCE, carried.read(&mut [0])).await.unwrap();
    assert!(cut.is_err(), "what was carried is cut: closing has begun");
    send.write_all(rest).await.unwrap();
    let refusal = timeout(PATIENCE, receive.read_to_end(200)).await.unwrap().unwrap();
    assert_eq!(refusal[..2], [2, 2], "draining");
    timeout(PATIENCE, closing).await.expect("and then it closes").unwrap();
}

fn with_len(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u16).to_be_bytes(), payload].concat()
}

async fn answer(connection: &Connection, header: &[u8]) -> Vec<u8> {
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(header).await.unwrap();
    timeout(PATIENCE, receive.read_to_end(200)).await.unwrap().unwrap()
}

async fn counted(node: &Node, reason: &'static str) {
    until(reason, || node.metrics.refused(Door::mesh, reason) == 1).await;
}

/// Dials until the far side has had its say.
async fn dial(far: SocketAddr, tls: rustls::ClientConfig, marker: u8, expected: MemberId) {
    dial_at(far, tls, marker, Some(expected)).await;
}

async fn dial_at(
    far: SocketAddr,
    tls: rustls::ClientConfig,
    marker: u8,
    expected: Option<MemberId>,
) {
    let name = server_name(expected.as_ref());
    let (_endpoint, connecting) = stranger(LOOPBACK, far, tls, marker, &name);
    if let Ok(Ok(connection)) = timeout(PATIENCE, connecting).await {
        let _ = timeout(PATIENCE, connection.closed()).await;
        connection.close(VarInt::from_u32(0), b"");
    }
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(
        &self,
        _: &[&[u8]],
        _: &[rustls::SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
