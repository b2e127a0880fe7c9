//! Those who dial an agent's port with something else than an agent: forged certificates, and
//! handshakes that are begun and never finished.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use murmesh::model::Entry;
use murmesh::tls::{Plane, SecretKey};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connecting, ConnectionId, Endpoint};
use quinn_proto::{Connection, ConnectionHandle, DatagramEvent, EndpointConfig};
use rcgen::{
    CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519,
};
use rustls::client::ResolvesClientCert;
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Dials `far` from a port of `from`, with any TLS and any mark of a plane.
pub fn dial(
    from: IpAddr,
    far: SocketAddr,
    tls: rustls::ClientConfig,
    marker: u8,
    server_name: &str,
) -> (Endpoint, Connecting) {
    let endpoint = Endpoint::client(SocketAddr::new(from, 0)).unwrap();
    let connecting = endpoint.connect_with(config(tls, marker), far, server_name).unwrap();
    (endpoint, connecting)
}

fn config(tls: rustls::ClientConfig, marker: u8) -> ClientConfig {
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
    config.initial_dst_cid_provider(Arc::new(move || {
        let mut id: [u8; 16] = std::array::from_fn(|_| rand::random());
        id[0] = marker;
        ConnectionId::new(&id)
    }));
    config
}

/// TLS of somebody without a certificate, who believes anyone and knows the words of a plane.
pub fn nobody(alpn: Vec<u8>) -> rustls::ClientConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(trusting())
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn];
    config
}

/// A leaf for `key` below the certificate `above` of `signer`, which carries `enrolment`: what an
/// issuer makes, without its checks.
pub fn leaf(
    key: &SecretKey,
    enrolment: &Entry,
    above: &CertificateDer<'_>,
    signer: &SecretKey,
) -> CertificateDer<'static> {
    let pair = |key: &SecretKey| {
        let der = PrivatePkcs8KeyDer::from(key.pkcs8());
        KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ED25519).unwrap()
    };
    let mut params = CertificateParams::default();
    let now = i64::try_from(UnixTime::now().as_secs()).unwrap();
    let now = time::OffsetDateTime::from_unix_timestamp(now).unwrap();
    params.not_before = now - Duration::from_secs(60);
    params.not_after = now + Duration::from_secs(3_600);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    // Where every member of every version looks for it.
    let place = &[2, 25, 1_876_304_441_220_917];
    let carried = CustomExtension::from_oid_content(place, enrolment.bytes().to_vec());
    params.custom_extensions = vec![carried];
    let mut signing = CertificateParams::default();
    let (_, parsed) = X509Certificate::from_der(above).unwrap();
    let subject = parsed.subject().iter_common_name().next().unwrap().as_str().unwrap();
    signing.distinguished_name = rcgen::DistinguishedName::new();
    signing.distinguished_name.push(DnType::CommonName, subject);
    let signed = params.signed_by(&pair(key), &Issuer::new(signing, pair(signer))).unwrap();
    signed.der().clone()
}

/// Shows `chain` whenever a certificate is asked for.
pub fn showing(
    mut tls: rustls::ClientConfig,
    key: &SecretKey,
    chain: Vec<CertificateDer<'static>>,
) -> rustls::ClientConfig {
    let key = any_supported_type(&PrivatePkcs8KeyDer::from(key.pkcs8().to_vec()).into()).unwrap();
    tls.client_auth_cert_resolver = Arc::new(Shown(Arc::new(CertifiedKey::new(chain, key))));
    tls
}

#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Begins handshakes from one address and never finishes one.
pub struct Flooder {
    socket: UdpSocket,
    far: SocketAddr,
    endpoint: quinn_proto::Endpoint,
    config: ClientConfig,
    begun: HashMap<ConnectionHandle, Connection>,
    /// Retry packets that came back.
    pub retries: usize,
}

impl Flooder {
    /// One that sends from a port of `from`.
    pub fn new(from: IpAddr, far: SocketAddr, tls: rustls::ClientConfig, plane: Plane) -> Self {
        let socket = UdpSocket::bind((from, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
        let endpoint =
            quinn_proto::Endpoint::new(Arc::new(EndpointConfig::default()), None, false, None);
        let config = config(tls, plane.marker());
        Self { socket, far, endpoint, config, begun: HashMap::new(), retries: 0 }
    }

    /// Begins `count` more handshakes, a few at a time, and hears what comes back.
    pub fn begin(&mut self, count: usize, is_proving: bool) {
        for number in 1..=count {
            let (now, config) = (Instant::now(), self.config.clone());
            let begun = self.endpoint.connect(now, config, self.far, "any.member");
            let (handle, connection) = begun.unwrap();
            self.begun.insert(handle, connection);
            self.send(handle);
            if number % 20 == 0 || number == count {
                self.hear(is_proving); // before the answers are more than our socket holds
            }
        }
    }

    /// Reads what has come back. A Retry is counted and, when `is_proving`, answered: then the far
    /// side knows that the address is real. Nothing else is.
    pub fn hear(&mut self, is_proving: bool) {
        let (mut buffer, end) = ([0; 2_048], Instant::now() + Duration::from_millis(50));
        while Instant::now() < end
            && let Ok(len) = self.socket.recv(&mut buffer)
        {
            let is_retry = buffer[0] & 0xf0 == 0xf0; // RFC 9000, section 17.2.5
            if !is_retry {
                continue;
            }
            self.retries += 1;
            let (data, now, mut answer) = (buffer[..len].into(), Instant::now(), Vec::new());
            let heard = self.endpoint.handle(now, self.far, None, None, data, &mut answer);
            if let Some(DatagramEvent::ConnectionEvent(handle, event)) = heard
                && let Some(connection) = self.begun.get_mut(&handle)
                && is_proving
            {
                connection.handle_event(event);
                self.send(handle);
            }
        }
    }

    fn send(&mut self, handle: ConnectionHandle) {
        let (mut packet, now) = (Vec::new(), Instant::now());
        if let Some(connection) = self.begun.get_mut(&handle)
            && let Some(transmit) = connection.poll_transmit(now, 1, &mut packet)
        {
            self.socket.send_to(&packet[..transmit.size], self.far).unwrap();
        }
    }
}

/// The stranger believes anyone; whether it is believed is the question.
pub fn trusting() -> Arc<dyn rustls::client::danger::ServerCertVerifier> {
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
