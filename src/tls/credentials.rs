//! What one member proves itself with, and the TLS configurations made of it.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::server::NoServerSessionStorage;
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

use super::rotation::Life;
use super::trust::Trust;
use super::verifier::{Anchor, MemberVerifier, Tolerance, carried_enrolment, not_after};
use super::{Plane, SecretKey, TlsError, Token};
use crate::model::{Enrolment, Entry, Genesis, MemberId, MemberName, MeshId, PublicKey, Signer};
use crate::runtime::clock;

/// A member's key, chain and enrolment. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NodeCredentials {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    mesh: MeshId,
    genesis: Genesis,
    key: SecretKey,
    chain: Vec<CertificateDer<'static>>,
    enrolment: Enrolment,
    entry: Entry,
    expires_at: u64,
    /// Shared by all leaves of this member.
    trust: Trust,
}

impl NodeCredentials {
    /// From a node key and the chain (leaf, issuer, root) issued for it. The chain itself is proved
    /// by peers at every handshake; here it is only checked to belong to the key.
    pub fn new(
        mesh: MeshId,
        genesis: Genesis,
        key: SecretKey,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<Self, TlsError> {
        let trust = Trust::new(Duration::from_secs(genesis.leaf_ttl_secs));
        Self::with_trust(mesh, genesis, key, chain, trust)
    }

    fn with_trust(
        mesh: MeshId,
        genesis: Genesis,
        key: SecretKey,
        chain: Vec<CertificateDer<'static>>,
        trust: Trust,
    ) -> Result<Self, TlsError> {
        let leaf = chain.first().ok_or(super::VerifyError::NoEnrolment)?;
        let (enrolment, entry) = carried_enrolment(leaf)?;
        if enrolment.key != key.public_key() {
            return Err(super::VerifyError::OtherKey.into());
        }
        let expires_at = not_after(leaf)?;
        let inner = Inner { mesh, genesis, key, chain, enrolment, entry, expires_at, trust };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The same member with the next leaf, which must be valid now and for the same key and name.
    pub fn renewed(&self, chain: Vec<CertificateDer<'static>>) -> Result<Self, TlsError> {
        let Inner { mesh, genesis, key, trust, .. } = &*self.inner;
        let (key, trust) = (key.duplicate()?, trust.clone());
        let renewed = Self::with_trust(*mesh, genesis.clone(), key, chain, trust)?;
        if renewed.name() != self.name() {
            return Err(super::VerifyError::OtherName(renewed.name().clone()).into());
        }
        let [leaf, intermediates @ ..] = &renewed.inner.chain[..] else {
            return Err(super::VerifyError::NoEnrolment.into());
        };
        let now = UnixTime::since_unix_epoch(Duration::from_secs(clock::unix_seconds()));
        let usage = webpki::KeyUsage::client_auth();
        renewed.verifier(Tolerance::None).verify(leaf, intermediates, now, usage)?;
        Ok(renewed)
    }

    /// Leaf, issuer, root.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.inner.chain
    }

    /// From when to when the leaf lives.
    pub fn life(&self) -> Life {
        let from = Duration::from_secs(self.inner.enrolment.issued_at);
        Life { from, until: Duration::from_secs(self.inner.expires_at) }
    }

    /// Which peers are believed; one for all leaves of this member.
    pub fn trust(&self) -> &Trust {
        &self.inner.trust
    }

    /// Which mesh.
    pub fn mesh(&self) -> &MeshId {
        &self.inner.mesh
    }

    /// How that mesh began.
    pub fn genesis(&self) -> &Genesis {
        &self.inner.genesis
    }

    /// Who we are.
    pub fn member_id(&self) -> MemberId {
        self.inner.enrolment.key.member_id()
    }

    /// What people call us.
    pub fn name(&self) -> &MemberName {
        &self.inner.enrolment.name
    }

    /// The node key's public half.
    pub fn public_key(&self) -> PublicKey {
        self.inner.enrolment.key
    }

    /// The issuer's word on us.
    pub fn enrolment(&self) -> &Entry {
        &self.inner.entry
    }

    /// What the issuer says of us, decoded.
    pub fn enrolled(&self) -> &Enrolment {
        &self.inner.enrolment
    }

    /// A handle on the node key, to sign records with.
    pub fn signer(&self) -> Result<SecretKey, TlsError> {
        self.inner.key.duplicate()
    }

    /// When the leaf ends, in seconds since 1970.
    pub fn expires_at(&self) -> u64 {
        self.inner.expires_at
    }

    /// To accept on `plane`. A client certificate is mandatory but at the enrolment door.
    pub fn server_config(&self, plane: Plane) -> Result<ServerConfig, TlsError> {
        let builder = ServerConfig::builder_with_details(provider(), Arc::new(WallClock))
            .with_protocol_versions(&[&TLS13])?;
        let builder = match plane {
            Plane::Enrolment => builder.with_no_client_auth(),
            Plane::Gossip | Plane::Data => {
                builder.with_client_cert_verifier(self.verifier(Tolerance::Grace))
            }
            Plane::Renewal => {
                builder.with_client_cert_verifier(self.verifier(Tolerance::Renewable))
            }
        };
        let mut config = builder.with_single_cert(self.inner.chain.clone(), self.private_key())?;
        config.alpn_protocols = vec![plane.alpn(&self.inner.mesh)];
        // A resumed session is not verified again: an expired member could stay for ever.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        debug_assert_eq!(config.max_early_data_size, 0, "early data can be replayed");
        Ok(config)
    }

    /// To dial on `plane` with our certificate.
    pub fn client_config(&self, plane: Plane) -> Result<ClientConfig, TlsError> {
        let mut config = ClientConfig::builder_with_details(provider(), Arc::new(WallClock))
            .with_protocol_versions(&[&TLS13])?
            .dangerous() // the verifier is ours, and stricter
            .with_custom_certificate_verifier(self.verifier(Tolerance::Grace))
            .with_client_auth_cert(self.inner.chain.clone(), self.private_key())?;
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![plane.alpn(&self.inner.mesh)];
        Ok(config)
    }

    fn verifier(&self, tolerance: Tolerance) -> Arc<MemberVerifier> {
        let root = CertificateDer::from(self.inner.genesis.root_certificate.clone());
        let anchor = Anchor::Root(root);
        let trust = self.inner.trust.clone();
        Arc::new(MemberVerifier::new(self.inner.mesh, anchor, tolerance, trust, provider()))
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.inner.key.pkcs8().to_vec()).into()
    }
}

/// To knock at the enrolment door with a token: no certificate, and only the root's key is known.
pub fn joiner_config(token: &Token) -> Result<ClientConfig, TlsError> {
    let anchor = Anchor::RootKey(token.root);
    let trust = Trust::new(Duration::ZERO); // a newcomer has heard nothing yet
    let verifier = MemberVerifier::new(token.mesh, anchor, Tolerance::None, trust, provider());
    let mut config = ClientConfig::builder_with_details(provider(), Arc::new(WallClock))
        .with_protocol_versions(&[&TLS13])?
        .dangerous() // the verifier is ours, and stricter
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![Plane::Enrolment.alpn(&token.mesh)];
    Ok(config)
}

/// The provider is always passed by hand: a process-wide default could be changed by others.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The agent's wall clock, as rustls asks for it.
#[derive(Debug)]
struct WallClock;

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(clock::unix_seconds())))
    }
}

const ANY: &str = "any.member";
const SUFFIX: &str = ".member";

/// The server name to dial with: the verifier holds the server to it. `None`: any member.
pub fn server_name(id: Option<&MemberId>) -> String {
    id.map_or_else(|| ANY.to_owned(), |id| format!("{id}{SUFFIX}"))
}

pub(super) fn expected_member(name: &ServerName<'_>) -> Option<MemberId> {
    let ServerName::DnsName(name) = name else { return None };
    name.as_ref().strip_suffix(SUFFIX)?.parse().ok()
}

/// Who is at the other end of a connection, as its certificate proved.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The hash of its key.
    pub id: MemberId,
    /// As enrolled.
    pub name: MemberName,
    /// The issuer's word on it.
    pub enrolment: Entry,
    /// The hash of the issuing key that let it in, by that word.
    pub let_in_by: MemberId,
}

/// Who is at the other end; nobody at the enrolment door's far side.
pub fn peer_of(connection: &quinn::Connection) -> Option<Peer> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let (enrolment, entry) = carried_enrolment(chain.first()?).ok()?;
    let let_in_by = enrolment.let_in_by.unwrap_or(entry.signer().member_id());
    Some(Peer { id: enrolment.key.member_id(), name: enrolment.name, enrolment: entry, let_in_by })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rustls::{AlertDescription, CertificateError, ClientConnection, Error, ServerConnection};

    use super::*;
    use crate::catalogue::Dismissals;
    use crate::model::{Issuer, Unlisted};
    use crate::tls::testing::{members_of, mesh_of};
    use crate::tls::{Dismissed, Plane, found_mesh};

    /// Runs a handshake in memory. The first error of either side, the server's first.
    fn handshake(client: ClientConfig, server: ServerConfig, name: &str) -> Result<(), Error> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = ServerConnection::new(Arc::new(server)).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).unwrap();
            }
            server.read_tls(&mut bytes.as_slice()).unwrap();
            let served = server.process_new_packets();
            let mut bytes = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut bytes).unwrap();
            }
            served?;
            client.read_tls(&mut bytes.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok(())
    }

    #[test]
    fn members_prove_themselves_to_each_other() {
        let [a, b] = &mesh_of(&["a", "b"]).unwrap()[..] else { panic!("two members") };
        for plane in [Plane::Gossip, Plane::Data] {
            for name in [server_name(Some(&b.member_id())), server_name(None)] {
                let config = a.client_config(plane).unwrap();
                handshake(config, b.server_config(plane).unwrap(), &name).unwrap();
            }
        }
    }

    #[test]
    fn a_member_that_is_not_the_one_meant_is_refused() {
        let [a, b] = &mesh_of(&["a", "b"]).unwrap()[..] else { panic!("two members") };
        let meant = server_name(Some(&a.member_id()));
        let config = a.client_config(Plane::Data).unwrap();
        let refused = handshake(config, b.server_config(Plane::Data).unwrap(), &meant).unwrap_err();
        assert_eq!(refused, Error::InvalidCertificate(CertificateError::NotValidForName));
    }

    #[test]
    fn nobody_comes_in_without_a_certificate_but_at_the_enrolment_door() {
        let [a] = &mesh_of(&["a"]).unwrap()[..] else { panic!("one member") };
        let root = a.genesis().root;
        let token = Token::new(*a.mesh(), root, vec![], &SecretKey::generate().unwrap());
        for plane in [Plane::Gossip, Plane::Data] {
            let mut config = joiner_config(&token).unwrap();
            config.alpn_protocols = vec![plane.alpn(a.mesh())];
            let server = a.server_config(plane).unwrap();
            let refused = handshake(config, server, &server_name(None)).unwrap_err();
            assert_eq!(refused, Error::NoCertificatesPresented);
        }
        let door = a.server_config(Plane::Enrolment).unwrap();
        handshake(joiner_config(&token).unwrap(), door, &server_name(None)).unwrap();
    }

    #[test]
    fn a_newcomer_refuses_a_mesh_with_another_root() {
        let [a] = &mesh_of(&["a"]).unwrap()[..] else { panic!("one member") };
        let [stranger] = &mesh_of(&["a"]).unwrap()[..] else { panic!("one member") };
        let root = stranger.genesis().root;
        let token = Token::new(*a.mesh(), root, vec![], &SecretKey::generate().unwrap());
        let door = a.server_config(Plane::Enrolment).unwrap();
        let refused = handshake(joiner_config(&token).unwrap(), door, &server_name(None));
        assert_eq!(
            refused.unwrap_err(),
            Error::InvalidCertificate(CertificateError::UnknownIssuer)
        );
    }

    #[test]
    fn another_mesh_is_refused_by_protocol_name_and_without_it_by_chain() {
        let [a] = &mesh_of(&["a"]).unwrap()[..] else { panic!("one member") };
        let [stranger] = &mesh_of(&["a"]).unwrap()[..] else { panic!("one member") };
        let server = || a.server_config(Plane::Data).unwrap();
        let config = stranger.client_config(Plane::Data).unwrap();
        let refused = handshake(config, server(), &server_name(None)).unwrap_err();
        assert_eq!(refused, Error::NoApplicationProtocol);
        let mut config = stranger.client_config(Plane::Data).unwrap();
        config.alpn_protocols = vec![Plane::Data.alpn(a.mesh())];
        // The client refuses the server first: their roots differ, whoever looks.
        let refused = handshake(config, server(), &server_name(None)).unwrap_err();
        assert!(matches!(
            refused,
            Error::InvalidCertificate(CertificateError::UnknownIssuer)
                | Error::AlertReceived(AlertDescription::UnknownCA)
        ));
    }

    /// A clock that stands still.
    #[derive(Debug)]
    struct At(u64);

    impl rustls::time_provider::TimeProvider for At {
        fn current_time(&self) -> Option<rustls_pki_types::UnixTime> {
            Some(rustls_pki_types::UnixTime::since_unix_epoch(std::time::Duration::from_secs(
                self.0,
            )))
        }
    }

    #[test]
    fn an_expired_member_is_refused_however_often_it_came_in_before() {
        let [a, b] = &mesh_of(&["a", "b"]).unwrap()[..] else { panic!("two members") };
        let (client, name) = (a.client_config(Plane::Data).unwrap(), server_name(None));
        let server = |now: u64| {
            let mut config = b.server_config(Plane::Data).unwrap();
            config.time_provider = Arc::new(At(now));
            config
        };
        let before = server(a.expires_at() - 1);
        for _ in 0..2 {
            handshake(client.clone(), before.clone(), &name).unwrap();
        }
        let mut after = before;
        after.time_provider = Arc::new(At(a.expires_at() + 1));
        let refused = handshake(client, after, &name).unwrap_err();
        assert!(matches!(
            refused,
            Error::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. }
            )
        ));
    }

    #[test]
    fn an_ended_leaf_opens_the_renewal_door_for_thirty_days_and_peers_for_one_life_of_grace() {
        const DAY: u64 = 24 * 3_600;
        let [a, b] = &mesh_of(&["a", "b"]).unwrap()[..] else { panic!("two members") };
        let life = 3_600;
        for (plane, is_open, late, is_taken) in [
            (Plane::Renewal, false, 1, true),
            (Plane::Renewal, false, 30 * DAY, true),
            (Plane::Renewal, true, 30 * DAY + 1, false),
            (Plane::Data, false, 1, false),
            (Plane::Data, true, life, true),
            (Plane::Gossip, true, life, true),
            (Plane::Data, true, life + 1, false),
        ] {
            b.trust().grace().set_open(is_open);
            let mut server = b.server_config(plane).unwrap();
            server.time_provider = Arc::new(At(a.expires_at() + late));
            let taken = handshake(a.client_config(plane).unwrap(), server, &server_name(None));
            let is_grace = is_taken && plane != Plane::Renewal;
            assert_eq!(taken.is_ok(), is_taken, "{plane:?} {late} s late: {taken:?}");
            let accepted = b.trust().grace().take_accepted();
            assert_eq!(accepted.contains(&a.member_id()), is_grace, "what grace lets in is told");
        }
    }

    #[test]
    fn a_dismissed_issuers_leaf_proves_only_whom_an_active_issuer_vouches_for() {
        let [a, b] = &mesh_of(&["a", "b"]).unwrap()[..] else { panic!("two members") };
        let try_it = || {
            let server = b.server_config(Plane::Data).unwrap();
            handshake(a.client_config(Plane::Data).unwrap(), server, &server_name(None))
        };
        let (key, member) = (a.enrolment().signer(), b.member_id());
        let (certificate, kept, dropped) = (Vec::new(), Vec::new(), Vec::new());
        let gone = Issuer { key, member, certificate, is_active: false, kept, dropped };
        let dismiss = |vouched: Option<MemberId>| {
            let by_root = Dismissals::of([&gone]);
            b.trust().set_dismissed(Dismissed::new(by_root, vouched, BTreeSet::new()));
        };
        dismiss(None);
        let refused = try_it().unwrap_err();
        assert_eq!(refused, Error::InvalidCertificate(CertificateError::Revoked));
        dismiss(Some(a.member_id()));
        try_it().unwrap();
    }

    #[test]
    fn a_leaf_with_another_members_enrolment_is_nobody() {
        let founder = SecretKey::generate().unwrap();
        let founded = found_mesh(&founder.public_key(), Unlisted::Allow, 60).unwrap();
        let [a, b] = &members_of(&founded, &["a", "b"]).unwrap()[..] else { panic!("two") };
        let stolen = NodeCredentials::new(
            founded.mesh,
            founded.genesis.clone(),
            b.inner.key.duplicate().unwrap(),
            a.inner.chain.clone(),
        );
        assert!(matches!(stolen, Err(TlsError::Verify(super::super::VerifyError::OtherKey))));
    }
}
