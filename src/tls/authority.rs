//! Making certificates: the root once, issuers now and then, leaves all the time.

use std::sync::atomic::{AtomicU64, Ordering};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer as Signing, KeyUsagePurpose, PublicKeyData, SanType,
    SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};

use super::certificate::member_uri;
use super::verifier::ENROLMENT_OID;
use super::{SecretKey, TlsError};
use crate::model::{
    Enrolment, Entry, EntryKind, Epoch, Genesis, Issuer, MemberId, MeshId, Operator, PublicKey,
    Signer, Unlisted,
};
use crate::runtime::{clock, entropy};
use crate::wire;

/// Clocks of newcomers may be behind ours by this much.
pub(super) const BACKDATE: std::time::Duration = std::time::Duration::from_secs(3_600);
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
    /// Of the last entry it signed. The clock may be set back; what it signs next wins all the same.
    epoch: AtomicU64,
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
        let leaf_ttl_secs = genesis.leaf_ttl_secs;
        Ok(Self { mesh, leaf_ttl_secs, key, chain, epoch: AtomicU64::new(0) })
    }

    /// Goes on above what it has signed in earlier runs: its own among `entries`.
    pub fn continue_above<'a>(&self, entries: impl IntoIterator<Item = &'a Entry>) {
        let own = entries.into_iter().filter(|entry| entry.signer() == self.key.public_key());
        let last = own.map(|entry| entry.version().epoch).max().unwrap_or(Epoch(0));
        self.epoch.fetch_max(last.0, Ordering::Relaxed);
    }

    /// The key that signs.
    pub fn key(&self) -> &SecretKey {
        &self.key
    }

    /// Signs an entry of this issuer. The later one about a subject wins if its `version` is higher.
    pub fn sign_entry(
        &self,
        kind: EntryKind,
        subject: [u8; 16],
        version: u64,
        payload: &[u8],
    ) -> Result<Entry, TlsError> {
        let now = clock::unix_seconds();
        let epoch = Epoch(self.epoch.fetch_max(now, Ordering::Relaxed).max(now));
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

    /// Issues the leaf of an enrolment that this issuer signed: leaf, issuer, root. Its life and
    /// serial number follow from the enrolment, so that everybody who has heard of that knows both.
    pub fn issue_leaf(
        &self,
        enrolment: &Enrolment,
        entry: &Entry,
    ) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let ttl = Duration::seconds(i64::try_from(self.leaf_ttl_secs).unwrap_or(i64::MAX));
        let from = enrolment.issued_at;
        let mut params = params(&format!("murmesh member {}", enrolment.name), from, ttl)?;
        params.serial_number = Some(SerialNumber::from(enrolment.serial));
        let uri = member_uri(&self.mesh, enrolment).try_into().map_err(failed)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let carried = CustomExtension::from_oid_content(ENROLMENT_OID, entry.bytes().to_vec());
        params.custom_extensions = vec![carried];
        let signing = Signing::new(
            ca_params(&issuer_name(&self.key.public_key()))?,
            self.key.certificate_key()?,
        );
        let leaf = params.signed_by(&SubjectKey(enrolment.key), &signing).map_err(failed)?;
        Ok([&[leaf.der().clone()], &self.chain[..]].concat())
    }
}

/// The root at work: makes issuers and takes them back. Its key is offline; a person brings it.
#[derive(Debug)]
pub struct Root {
    mesh: MeshId,
    key: SecretKey,
}

impl Root {
    /// The root of `genesis`; the key must be its key.
    pub fn new(mesh: MeshId, genesis: &Genesis, key: SecretKey) -> Result<Self, TlsError> {
        match genesis.root == key.public_key() {
            true => Ok(Self { mesh, key }),
            false => Err(TlsError::OtherRoot { mesh: mesh.short() }),
        }
    }

    /// Lets `member` issue with the key whose public half is `issuing`: the entry that says so,
    /// with the certificate inside. The private half never leaves its machine. Not for a key that the
    /// root has taken back: all that was signed with it, by whomever, would be believed again.
    pub fn appoint(&self, issuing: &PublicKey, member: MemberId) -> Result<Entry, TlsError> {
        let signing = Signing::new(
            ca_params(&root_name(&self.key.public_key()))?,
            self.key.certificate_key()?,
        );
        let certificate = ca_params(&issuer_name(issuing))?
            .signed_by(&SubjectKey(*issuing), &signing)
            .map_err(failed)?;
        let certificate = certificate.der().to_vec();
        let (kept, dropped) = (Vec::new(), Vec::new());
        let issuer = Issuer { key: *issuing, member, certificate, is_active: true, kept, dropped };
        self.sign_issuer(&issuer, None)
    }

    /// Takes back what [`Root::appoint`] gave in the epoch `above`, for good: the entry that says so, who
    /// stays of those that this issuer let in, and which keys nobody is to believe again. That is said
    /// in one word: if it were two, members that hear the second first would cut whom they should keep.
    pub fn dismiss(
        &self,
        issuer: &Issuer,
        above: Epoch,
        kept: Vec<MemberId>,
        dropped: Vec<MemberId>,
    ) -> Result<Entry, TlsError> {
        let dismissed = Issuer { is_active: false, kept, dropped, ..issuer.clone() };
        self.sign_issuer(&dismissed, Some(above))
    }

    fn sign_issuer(&self, issuer: &Issuer, above: Option<Epoch>) -> Result<Entry, TlsError> {
        let payload = wire::encode_payload(issuer)?;
        let subject = *issuer.key.member_id().as_bytes();
        let above = above.map_or(0, |Epoch(above)| above.saturating_add(1));
        let epoch = Epoch(clock::unix_seconds().max(above));
        Ok(Entry::sign(&self.mesh, &self.key, EntryKind::ISSUER, subject, epoch, 1, &payload)?)
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
    let root_params = ca_params(&root_name(&root.public_key()))?;
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
    let appointed = Root::new(mesh, &genesis, root.duplicate()?)?
        .appoint(&issuer.public_key(), node.member_id())?;
    let issuer_certificate = wire::decode_payload::<Issuer>(&appointed.payload())?.certificate;
    let operator_payload = wire::encode_payload(&Operator {
        key: operator.public_key(),
        name: "founder".into(),
        is_active: true,
    })?;
    let subject = *operator.public_key().member_id().as_bytes();
    let epoch = Epoch(genesis.created_at);
    let operator_entry =
        Entry::sign(&mesh, &root, EntryKind::OPERATOR, subject, epoch, 1, &operator_payload)?;
    let entries = vec![appointed, operator_entry];
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

fn root_name(key: &PublicKey) -> String {
    format!("murmesh root {}", &key.to_string()[..16])
}

fn issuer_name(key: &PublicKey) -> String {
    format!("murmesh issuer {}", &key.to_string()[..16])
}

fn ca_params(name: &str) -> Result<CertificateParams, TlsError> {
    let mut params = params(name, clock::unix_seconds(), AUTHORITY_LIFE)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    Ok(params)
}

fn params(name: &str, from: u64, life: Duration) -> Result<CertificateParams, TlsError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.serial_number = Some(SerialNumber::from_slice(&entropy::random_bytes::<16>()?));
    let at = |seconds: u64| {
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        OffsetDateTime::from_unix_timestamp(seconds).map_err(failed)
    };
    params.not_before = at(from.saturating_sub(BACKDATE.as_secs()))?;
    params.not_after = at(from)?.saturating_add(life);
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
