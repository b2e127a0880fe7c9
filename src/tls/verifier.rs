//! Accepting a peer: by chain to the mesh's root, by the enrolment inside its leaf, by nothing else.
//!
//! The chain is checked by `webpki`. What it does not know is ours: that the leaf's key is the key
//! of the enrolment, that the enrolment was signed by the issuer that signed the leaf, and that the
//! server is the member we meant to reach.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error as RustlsError, OtherError,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::grace::RENEWABLE;
use super::trust::Trust;
use crate::model::{
    Enrolment, Entry, EntryError, EntryKind, MemberId, MemberName, MeshId, PublicKey,
};
use crate::wire::{self, WireError};

/// Where a leaf carries its enrolment: an arc under 2.25 (ITU-T X.667), where no registration is
/// needed, with a random number.
pub(super) const ENROLMENT_OID: &[u64] = &[2, 25, 1_876_304_441_220_917];

/// A certificate that is not that of a member. Fault: the peer, or our files.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// It is no X.509 certificate in DER.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// Every key of a mesh is an Ed25519 key of 32 bytes.
    #[error("the certificate's key is not Ed25519")]
    Key,
    /// A leaf without the extension of that name proves no member.
    #[error("the certificate carries no enrolment")]
    NoEnrolment,
    /// The extension holds no entry.
    #[error("the enrolment cannot be read: {0}")]
    Entry(#[from] EntryError),
    /// The entry holds no enrolment.
    #[error("the enrolment's payload cannot be read: {0}")]
    Payload(#[from] WireError),
    /// It was taken from another certificate, or our private key is not that of our certificate.
    #[error("the enrolment is not for this key")]
    OtherKey,
    /// Two issuers vouch for the two halves, or the leaf came without its issuer.
    #[error("the enrolment was not signed by the issuer of the certificate")]
    OtherIssuer,
    /// It proved somebody once; what [`Dismissed`](super::Dismissed) holds says no longer.
    #[error("the member was dropped or replaced, or whoever let it in was dismissed")]
    Dismissed,
    /// It is forged, or was made for another mesh.
    #[error("the enrolment's signature does not hold in this mesh")]
    Signature,
    /// It was to renew that of a member with another name.
    #[error("the certificate is for the name '{0}'")]
    OtherName(MemberName),
    /// A member of the mesh answered, but not the one that was dialled.
    #[error("the peer is {found}, not {expected}")]
    OtherMember {
        /// Who was dialled.
        expected: MemberId,
        /// Who answered.
        found: MemberId,
    },
    /// A signature, a time or a constraint in it does not hold, with webpki's reason.
    #[error("the chain does not hold: {0}")]
    Chain(String),
    /// It is a certificate of another mesh, or of none.
    #[error("the chain does not lead to the root of the mesh")]
    OtherRoot,
}

impl From<VerifyError> for RustlsError {
    fn from(error: VerifyError) -> Self {
        match error {
            VerifyError::OtherRoot => CertificateError::UnknownIssuer.into(),
            VerifyError::Dismissed => CertificateError::Revoked.into(),
            VerifyError::OtherMember { .. } => CertificateError::NotValidForName.into(),
            other => CertificateError::Other(OtherError(Arc::new(other))).into(),
        }
    }
}

/// Which root a chain must lead to.
#[derive(Clone, Debug)]
pub(super) enum Anchor {
    /// The certificate that the genesis carries.
    Root(CertificateDer<'static>),
    /// A newcomer knows the root by its key only; the chain brings the certificate.
    RootKey(PublicKey),
}

/// How far past its end a leaf is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tolerance {
    /// Not at all.
    None,
    /// As far as this agent's grace goes now.
    Grace,
    /// As long as it may be renewed.
    Renewable,
}

/// Verifies members, as servers and as clients.
#[derive(Debug)]
pub(super) struct MemberVerifier {
    mesh: MeshId,
    anchor: Anchor,
    tolerance: Tolerance,
    trust: Trust,
    provider: Arc<CryptoProvider>,
}

impl MemberVerifier {
    pub(super) fn new(
        mesh: MeshId,
        anchor: Anchor,
        tolerance: Tolerance,
        trust: Trust,
        provider: Arc<CryptoProvider>,
    ) -> Self {
        Self { mesh, anchor, tolerance, trust, provider }
    }

    /// How far past its end a leaf is accepted now.
    fn tolerated(&self) -> Duration {
        match self.tolerance {
            Tolerance::None => Duration::ZERO,
            Tolerance::Grace => self.trust.grace().tolerance(),
            Tolerance::Renewable => RENEWABLE,
        }
    }

    /// Whose leaf this is, if everything about it holds at `now`.
    pub(super) fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(Enrolment, Entry), RustlsError> {
        let root = match &self.anchor {
            Anchor::Root(certificate) => certificate,
            Anchor::RootKey(key) => intermediates
                .iter()
                .find(|certificate| certificate_key(certificate).as_ref() == Ok(key))
                .ok_or(VerifyError::OtherRoot)?,
        };
        let anchors = [anchor_from_trusted_cert(root).map_err(chain_error)?];
        let end = UnixTime::since_unix_epoch(Duration::from_secs(not_after(leaf)?));
        let late = Duration::from_secs(now.as_secs().saturating_sub(end.as_secs()));
        let is_tolerated = !late.is_zero() && late <= self.tolerated();
        // Everything about a tolerated leaf must have held when it ended.
        let now = if is_tolerated { end } else { now };
        let certificate = EndEntityCert::try_from(leaf).map_err(chain_error)?;
        let algorithms = &[webpki::ring::ED25519];
        let path = certificate
            .verify_for_usage(algorithms, &anchors, intermediates, now, usage, None, None)
            .map_err(chain_error)?;
        // Whose signature the leaf bears. What else the peer has sent proves nothing.
        let issuer = path.intermediate_certificates().next().ok_or(VerifyError::OtherIssuer)?;
        let (enrolment, entry) = self.enrolment_of(leaf, &issuer.der())?;
        if is_tolerated && self.tolerance == Tolerance::Grace {
            self.trust.grace().note_accepted(enrolment.key.member_id());
        }
        Ok((enrolment, entry))
    }

    fn enrolment_of(
        &self,
        leaf: &CertificateDer<'_>,
        issuer: &CertificateDer<'_>,
    ) -> Result<(Enrolment, Entry), VerifyError> {
        let (enrolment, entry) = carried_enrolment(leaf)?;
        if certificate_key(issuer)? != entry.signer() {
            return Err(VerifyError::OtherIssuer);
        }
        if !entry.is_signed(&self.mesh) {
            return Err(VerifyError::Signature);
        }
        let (signer, member) = (entry.signer().member_id(), enrolment.key.member_id());
        let let_in_by = enrolment.let_in_by.unwrap_or(signer);
        if !self.trust.dismissed().admits(&signer, &let_in_by, &member) {
            return Err(VerifyError::Dismissed);
        }
        Ok((enrolment, entry))
    }
}

fn chain_error(error: webpki::Error) -> RustlsError {
    match error {
        webpki::Error::CertExpired { .. } => CertificateError::Expired.into(),
        webpki::Error::CertNotValidYet { .. } => CertificateError::NotValidYet.into(),
        webpki::Error::UnknownIssuer => VerifyError::OtherRoot.into(),
        other => VerifyError::Chain(other.to_string()).into(),
    }
}

impl ServerCertVerifier for MemberVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, RustlsError> {
        let (enrolment, _) = self.verify(leaf, intermediates, now, KeyUsage::server_auth())?;
        let found = enrolment.key.member_id();
        match super::credentials::expected_member(server_name) {
            Some(expected) if expected != found => {
                Err(VerifyError::OtherMember { expected, found }.into())
            }
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        Err(RustlsError::General("TLS 1.2 is not spoken here".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for MemberVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, RustlsError> {
        self.verify(leaf, intermediates, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        ServerCertVerifier::verify_tls12_signature(self, message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, RustlsError> {
        ServerCertVerifier::verify_tls13_signature(self, message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

/// The Ed25519 key of a certificate.
pub(super) fn certificate_key(certificate: &CertificateDer<'_>) -> Result<PublicKey, VerifyError> {
    let parsed = parse(certificate)?;
    let bytes = parsed.public_key().subject_public_key.data.as_ref();
    bytes.try_into().map(PublicKey).map_err(|_| VerifyError::Key)
}

/// When a certificate ends, in seconds since 1970.
pub(super) fn not_after(certificate: &CertificateDer<'_>) -> Result<u64, VerifyError> {
    let end = parse(certificate)?.validity().not_after.timestamp();
    Ok(u64::try_from(end).unwrap_or(0))
}

/// The enrolment that a leaf carries, which must be for the leaf's key. Its signature and chain are
/// the caller's to check.
pub(super) fn carried_enrolment(
    leaf: &CertificateDer<'_>,
) -> Result<(Enrolment, Entry), VerifyError> {
    let key = certificate_key(leaf)?;
    let parsed = parse(leaf)?;
    let extension = parsed
        .extensions()
        .iter()
        .find(|extension| {
            extension.oid.iter().is_some_and(|arcs| arcs.eq(ENROLMENT_OID.iter().copied()))
        })
        .ok_or(VerifyError::NoEnrolment)?;
    let entry = Entry::decode(extension.value.to_vec().into())?;
    let enrolment: Enrolment = wire::decode_payload(&entry.payload())?;
    let is_same = entry.key().kind == EntryKind::ENROLMENT
        && entry.key().subject == *key.member_id().as_bytes()
        && enrolment.key == key;
    if is_same { Ok((enrolment, entry)) } else { Err(VerifyError::OtherKey) }
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, VerifyError> {
    X509Certificate::from_der(certificate)
        .map(|(_, parsed)| parsed)
        .map_err(|error| VerifyError::Unreadable(error.to_string()))
}
