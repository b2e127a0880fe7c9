//! Making certificates: the root once, issuers now and then, leaves all the time.

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer as Signing, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};

use super::verifier::ENROLMENT_OID;
use super::{SecretKey, TlsError};
use crate::model::{
    Enrolment, Entry, EntryKind, Epoch, Genesis, Issuer, MeshId, Operator, PublicKey, Signer,
    Unlisted,
};
use crate::runtime::{clock, entropy};
use crate::wire;

/// Clocks of newcomers may be behind ours by this much.
const BACKDATE: Duration = Duration::hours(1);
/// Life of roots and issuers: rotated by hand, not by expiry.
const AUTHORITY_LIFE: Duration = Duration::days(365 * 20);

/// An issuer at work: signs leaves and enrolments.
#[derive(Debug)]
pub struct Authority {
    mesh: MeshId,
    leaf_ttl_secs: u64,
    key: SecretKey,
    /// Issuer certificate, then root certificate.
    chain: Vec<CertificateDer<'static>>,
}

impl Authority {
    /// From the issuer's key and its certificate, signed by the root of `genesis`.
    pub fn new(
        mesh: MeshId,
        genesis: &Genesis,
        key: SecretKey,
        certificate: &[u8],
    ) -> Result<Self, TlsError> {
        let issuer = CertificateDer::from(certificate.to_vec());
        if super::verifier::certificate_key(&issuer)? != key.public_key() {
            return Err(TlsError::Certificate(
                "issuer.key is not the key of its certificate".into(),
            ));
        }
        let chain = vec![issuer, CertificateDer::from(genesis.root_certificate.clone())];
        Ok(Self { mesh, leaf_ttl_secs: genesis.leaf_ttl_secs, key, chain })
    }

    /// The key that signs.
    pub fn key(&self) -> &SecretKey {
        &self.key
    }

    /// Signs an entry of this issuer.
    pub fn sign_entry(
        &self,
        kind: EntryKind,
        subject: [u8; 16],
        version: u64,
        payload: &[u8],
    ) -> Result<Entry, TlsError> {
        let epoch = Epoch(clock::unix_seconds());
        Ok(Entry::sign(&self.mesh, &self.key, kind, subject, epoch, version, payload)?)
    }

    /// Enrols a member and issues its leaf: the signed enrolment, and the chain leaf, issuer, root.
    pub fn enrol(
        &self,
        enrolment: &Enrolment,
    ) -> Result<(Entry, Vec<CertificateDer<'static>>), TlsError> {
        let subject = *enrolment.key.member_id().as_bytes();
        let payload = wire::encode_payload(enrolment)?;
        let entry = self.sign_entry(EntryKind::ENROLMENT, subject, enrolment.serial, &payload)?;
        let chain = self.issue_leaf(enrolment, &entry)?;
        Ok((entry, chain))
    }

    fn issue_leaf(
        &self,
        enrolment: &Enrolment,
        entry: &Entry,
    ) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let ttl = Duration::seconds(i64::try_from(self.leaf_ttl_secs).unwrap_or(i64::MAX));
        let mut params = params(&format!("murmesh member {}", enrolment.name), ttl)?;
        let uri = format!("spiffe://{}.mesh/node/{}", self.mesh.short(), enrolment.name);
        let uri = uri.try_into().map_err(failed)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let carried = CustomExtension::from_oid_content(ENROLMENT_OID, entry.bytes().to_vec());
        params.custom_extensions = vec![carried];
        let signing =
            Signing::new(ca_params(&issuer_name(&self.key))?, self.key.certificate_key()?);
        let leaf = params.signed_by(&SubjectKey(enrolment.key), &signing).map_err(failed)?;
        Ok([&[leaf.der().clone()], &self.chain[..]].concat())
    }
}

/// Everything that `init` makes.
#[derive(Debug)]
pub struct FoundedMesh {
    /// The mesh's name for ever.
    pub mesh: MeshId,
    /// How it began, decoded and as hashed.
    pub genesis: Genesis,
    /// The encoded genesis.
    pub genesis_bytes: Vec<u8>,
    /// To be moved offline.
    pub root: SecretKey,
    /// For the person who runs the mesh.
    pub operator: SecretKey,
    /// The first node's issuing key.
    pub issuer: SecretKey,
    /// Its certificate (DER).
    pub issuer_certificate: Vec<u8>,
    /// Root-signed entries: the first issuer, the first operator.
    pub entries: Vec<Entry>,
}

/// Founds a mesh whose first issuer is the member that holds `node`.
pub fn found_mesh(
    node: &PublicKey,
    unlisted: Unlisted,
    leaf_ttl_secs: u64,
) -> Result<FoundedMesh, TlsError> {
    let (root, operator, issuer) =
        (SecretKey::generate()?, SecretKey::generate()?, SecretKey::generate()?);
    let root_params = ca_params(&root_name(&root))?;
    let root_certificate = root_params.self_signed(&root.certificate_key()?).map_err(failed)?;
    let genesis = Genesis {
        root: root.public_key(),
        root_certificate: root_certificate.der().to_vec(),
        created_at: clock::unix_seconds(),
        unlisted,
        leaf_ttl_secs,
        nonce: entropy::random_bytes()?,
    };
    let genesis_bytes = wire::encode_payload(&genesis)?;
    let mesh = MeshId::of_genesis(&genesis_bytes);
    let issuer_certificate = ca_params(&issuer_name(&issuer))?
        .signed_by(&issuer.certificate_key()?, &Signing::new(root_params, root.certificate_key()?))
        .map_err(failed)?
        .der()
        .to_vec();
    let sign = |kind, key: &PublicKey, payload: Vec<u8>| {
        let subject = *key.member_id().as_bytes();
        Entry::sign(&mesh, &root, kind, subject, Epoch(genesis.created_at), 1, &payload)
    };
    let issuer_payload = wire::encode_payload(&Issuer {
        key: issuer.public_key(),
        member: node.member_id(),
        certificate: issuer_certificate.clone(),
        is_active: true,
    })?;
    let operator_payload = wire::encode_payload(&Operator {
        key: operator.public_key(),
        name: "founder".into(),
        is_active: true,
    })?;
    let entries = vec![
        sign(EntryKind::ISSUER, &issuer.public_key(), issuer_payload)?,
        sign(EntryKind::OPERATOR, &operator.public_key(), operator_payload)?,
    ];
    Ok(FoundedMesh {
        mesh,
        genesis,
        genesis_bytes,
        root,
        operator,
        issuer,
        issuer_certificate,
        entries,
    })
}

fn root_name(key: &SecretKey) -> String {
    format!("murmesh root {}", &key.public_key().to_string()[..16])
}

fn issuer_name(key: &SecretKey) -> String {
    format!("murmesh issuer {}", &key.public_key().to_string()[..16])
}

fn ca_params(name: &str) -> Result<CertificateParams, TlsError> {
    let mut params = params(name, AUTHORITY_LIFE)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

fn params(name: &str, life: Duration) -> Result<CertificateParams, TlsError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.serial_number = Some(SerialNumber::from_slice(&entropy::random_bytes::<16>()?));
    let now = i64::try_from(clock::unix_seconds()).unwrap_or(i64::MAX);
    let now = OffsetDateTime::from_unix_timestamp(now).map_err(failed)?;
    params.not_before = now.saturating_sub(BACKDATE);
    params.not_after = now.saturating_add(life);
    Ok(params)
}

fn failed(error: impl std::fmt::Display) -> TlsError {
    TlsError::Certificate(error.to_string())
}

/// A member's public key in the form that a certificate is made for.
struct SubjectKey(PublicKey);

impl PublicKeyData for SubjectKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0.0
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}
