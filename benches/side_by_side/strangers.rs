//! What mutual TLS is for: before a way is measured, both of its agents turn strangers away.
//!
//! At the server's agent a stranger knocks with a certificate of another authority, and with none.
//! To the client's agent it poses as the server's: with a certificate of another authority, and
//! without TLS at all. In all four cases no byte of a request or an answer may pass; with the right
//! certificate, both ways, it must.

use std::error::Error;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use murmesh::tls::store::DataDir;
use murmesh::tls::{NodeCredentials, Plane, server_name};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionId, Endpoint};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, ServerConfig,
    ServerConnection, SignatureScheme, StreamOwned,
};

use super::load::{KEEP, MESSAGE_LEN};
use super::ports::free_address;
use super::process::{succeed, until};
use super::proxies::NODE;
use super::ways::Pair;

/// Refusals come at once; this is for who is never answered.
const PATIENCE: Duration = Duration::from_secs(2);

type Fallible = Result<(), Box<dyn Error>>;

/// An authority with one certificate below it.
struct Identity {
    authority: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Writes nothing; the PEM texts are of the authority, and of certificate and key.
    fn new(name: &str) -> Result<(Self, [String; 2]), Box<dyn Error>> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name); // OpenSSL wants them to differ
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let key = KeyPair::generate()?;
        let node = CertificateParams::new(vec![NODE.to_owned()])?.signed_by(&key, &root)?;
        let pem = [root.pem(), node.pem() + &key.serialize_pem()];
        let identity = Self {
            authority: root.der().clone(),
            certificate: node.der().clone(),
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        };
        Ok((identity, pem))
    }

    fn server(&self) -> Result<ServerConfig, Box<dyn Error>> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth();
        Ok(builder.with_single_cert(vec![self.certificate.clone()], self.key.clone_key())?)
    }
}

/// Who may be on both ends of a pair of proxies, and who may not.
pub(crate) struct Identities {
    ours: Identity,
    strangers: Identity,
}

impl Identities {
    /// Writes ours into `directory`: `ca.pem`, and `node.pem` with its key.
    pub(crate) fn new(directory: &Path) -> Result<Self, Box<dyn Error>> {
        let (ours, [authority, node]) = Identity::new("benchmark root")?;
        fs::write(directory.join("ca.pem"), authority)?;
        fs::write(directory.join("node.pem"), node)?;
        Ok(Self { ours, strangers: Identity::new("another root")?.0 })
    }

    /// TLS of a client that knows our authority and shows the certificate of `shown`.
    fn client(&self, shown: Option<&Identity>) -> Result<ClientConfig, Box<dyn Error>> {
        let mut roots = RootCertStore::empty();
        roots.add(self.ours.authority.clone())?;
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots);
        Ok(match shown {
            Some(Identity { certificate, key, .. }) => {
                builder.with_client_auth_cert(vec![certificate.clone()], key.clone_key())?
            }
            None => builder.with_no_client_auth(),
        })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn hold(claim: &str, holds: bool) -> Fallible {
    if holds { Ok(()) } else { Err(format!("not so: {claim}").into()) }
}

/// Knocks at the server's agent of a pair of proxies.
pub(crate) fn knock_at_proxy(door: SocketAddr, identities: &Identities) -> Fallible {
    let answers = |shown| -> Result<bool, Box<dyn Error>> {
        let name = ServerName::try_from(NODE)?;
        let tls = ClientConnection::new(Arc::new(identities.client(shown)?), name)?;
        Ok(ask(&mut StreamOwned::new(tls, connect(door)?)).is_ok())
    };
    hold("our certificate is let in", answers(Some(&identities.ours))?)?;
    hold("a stranger's certificate is refused", !answers(Some(&identities.strangers))?)?;
    hold("no certificate is refused", !answers(None)?)
}

/// Poses as the server's agent at `between` to the client's, whose clients come to `entry`.
pub(crate) fn pose_as_proxy(
    entry: SocketAddr,
    between: SocketAddr,
    identities: &Identities,
) -> Fallible {
    let believed = |posing: Posing<'_>| -> Result<bool, Box<dyn Error>> {
        let tls = match posing {
            Posing::Tls(identity) => Some(Arc::new(identity.server()?)),
            Posing::Plain => None,
        };
        let listener = TcpListener::bind(between)?;
        listener.set_nonblocking(true)?;
        let (is_over, is_asked) = (AtomicBool::new(false), AtomicBool::new(false));
        let is_answered = thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    let Ok((stream, _)) = listener.accept() else {
                        thread::sleep(Duration::from_millis(5));
                        continue;
                    };
                    if answer(stream, tls.clone()).is_ok() {
                        is_asked.store(true, Ordering::Relaxed);
                    }
                }
            });
            let is_answered = connect(entry).and_then(|mut client| ask(&mut client)).is_ok();
            is_over.store(true, Ordering::Relaxed);
            is_answered
        });
        Ok(is_answered || is_asked.into_inner())
    };
    // So that what follows is refused for who it is. The agent may still be starting.
    until("our certificate is believed", 10 * PATIENCE, || {
        hold("it is", believed(Posing::Tls(&identities.ours))?)
    })?;
    hold("a stranger's server is refused", !believed(Posing::Tls(&identities.strangers))?)?;
    hold("a server without TLS is refused", !believed(Posing::Plain)?)
}

enum Posing<'a> {
    Tls(&'a Identity),
    Plain,
}

/// Answers one request; an error when there was none that could be read as one.
fn answer(stream: TcpStream, tls: Option<Arc<ServerConfig>>) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    match tls {
        Some(tls) => {
            let tls = ServerConnection::new(tls).map_err(io::Error::other)?;
            echo(&mut StreamOwned::new(tls, stream))
        }
        None => echo(&mut { stream }),
    }
}

fn echo(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut message = [0; MESSAGE_LEN];
    stream.read_exact(&mut message)?;
    stream.write_all(&message)?;
    stream.flush()?;
    if message == [KEEP; MESSAGE_LEN] { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// One request and its answer.
fn ask(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut message = [KEEP; MESSAGE_LEN];
    stream.write_all(&message)?;
    stream.flush()?;
    stream.read_exact(&mut message)?;
    if message == [KEEP; MESSAGE_LEN] { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Knocks at the server's agent of a mesh, as a member of another one and as nobody, who all know
/// the words of this one.
pub(crate) fn knock_at_murmesh(pair: &Pair<'_>) -> Fallible {
    pair.join("c", free_address())?;
    let member = credentials(&pair.directory.join("c"))?;
    let stranger = stranger(pair)?;
    for plane in [Plane::Gossip, Plane::Data] {
        let alpn = vec![plane.alpn(member.mesh())];
        let mut theirs = stranger.client_config(plane)?;
        theirs.dangerous().set_certificate_verifier(Arc::new(Anyone));
        theirs.alpn_protocols = alpn.clone();
        let mut nobodys = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone))
            .with_no_client_auth();
        nobodys.alpn_protocols = alpn;
        let ours = member.client_config(plane)?;
        hold("a member is let in", is_let_in(pair.mesh[1], plane, ours)?)?;
        hold("another mesh's member is refused", !is_let_in(pair.mesh[1], plane, theirs)?)?;
        hold("nobody is refused", !is_let_in(pair.mesh[1], plane, nobodys)?)?;
    }
    Ok(())
}

/// Poses as the server's agent, which has just died, at its address: a member of another mesh that
/// knows the words of this one.
pub(crate) fn pose_as_murmesh(pair: &Pair<'_>) -> Fallible {
    let words = credentials(&pair.directory.join("a"))?;
    let stranger = stranger(pair)?;
    on_runtime(async {
        let mut tls = stranger.server_config(Plane::Data)?;
        tls.alpn_protocols = vec![Plane::Data.alpn(words.mesh())];
        let posing = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls)?));
        let endpoint = Endpoint::server(posing, pair.mesh[1])?;
        // Calls of the dead agent's service make the other one dial its address, as soon as it
        // knows that the old connection is dead.
        let entry = pair.entry;
        let asking = async {
            loop {
                let ask = move || connect(entry).and_then(|mut client| ask(&mut client));
                if tokio::task::spawn_blocking(ask).await?.is_ok() {
                    return Err("not so: nobody answers for the dead agent".into());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let refused = async {
            loop {
                let incoming = endpoint.accept().await.ok_or("our own endpoint is closed")?;
                let is_data = incoming.orig_dst_cid().first() == Some(&Plane::Data.marker());
                match incoming.await {
                    Ok(_) => return Err("not so: a stranger's agent is refused".into()),
                    Err(_) if is_data => return Ok(()),
                    Err(_) => (), // gossip, in words that we do not know
                }
            }
        };
        tokio::select! {
            over = asking => over,
            over = refused => over,
            () = tokio::time::sleep(10 * PATIENCE) => Err("the stranger was never dialled".into()),
        }
    })
}

/// A member of another mesh.
fn stranger(pair: &Pair<'_>) -> Result<NodeCredentials, Box<dyn Error>> {
    let directory = pair.directory.join("stranger");
    if !directory.exists() {
        succeed(&mut pair.run("stranger", &["init", "--name", "b"]))?;
    }
    credentials(&directory)
}

fn credentials(directory: &Path) -> Result<NodeCredentials, Box<dyn Error>> {
    Ok(DataDir::new(directory).credentials()?)
}

/// Whether a connection holds: a client's handshake ends before the far side has judged it.
fn is_let_in(far: SocketAddr, plane: Plane, tls: ClientConfig) -> Result<bool, Box<dyn Error>> {
    on_runtime(async {
        let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls)?));
        config.initial_dst_cid_provider(Arc::new(move || ConnectionId::new(&[plane.marker(); 16])));
        let endpoint = Endpoint::client("127.0.0.1:0".parse()?)?;
        let dialled = endpoint.connect_with(config, far, &server_name(None))?.await;
        let Ok(connection) = dialled else { return Ok(false) };
        let judged = tokio::time::timeout(PATIENCE / 2, connection.closed()).await;
        Ok(judged.is_err())
    })
}

fn on_runtime<T>(
    work: impl Future<Output = Result<T, Box<dyn Error>>>,
) -> Result<T, Box<dyn Error>> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// The stranger believes anyone; whether it is believed is the question.
#[derive(Debug)]
struct Anyone;

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
