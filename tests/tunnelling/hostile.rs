//! Strangers, and members that speak nonsense: refused, counted, and everybody else is served.

use std::net::SocketAddr;
use std::sync::Arc;

use murmesh::model::MemberId;
use murmesh::telemetry::Door;
use murmesh::tls::testing::mesh_of;
use murmesh::tls::{Plane, server_name};
use murmesh::transport::{DialError, refusal};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionId, Endpoint, VarInt};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use super::nodes::{Node, PATIENCE, ask, drains, echo_server, named_server, pair, until};
use crate::support::beside_others;

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
    let newer = b"\x02\x03web\x06nobody\x00\x00and more";
    assert_eq!(answer(&connection, &with_len(newer)).await[..2], [2, 1], "a newer header is read");
    assert_eq!(ask(entry, b"hello").await.unwrap(), b"hello");
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
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    config.initial_dst_cid_provider(Arc::new(move || ConnectionId::new(&[marker; 16])));
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let name = server_name(expected.as_ref());
    let connecting = endpoint.connect_with(config, far, &name).unwrap();
    if let Ok(Ok(connection)) = timeout(PATIENCE, connecting).await {
        let _ = timeout(PATIENCE, connection.closed()).await;
        connection.close(VarInt::from_u32(0), b"");
    }
}

/// The stranger believes anyone; whether it is believed is the question.
fn trusting() -> Arc<dyn rustls::client::danger::ServerCertVerifier> {
    #[derive(Debug)]
    struct Anyone;
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};
    impl ServerCertVerifier for Anyone {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }
        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ED25519]
        }
    }
    Arc::new(Anyone)
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
