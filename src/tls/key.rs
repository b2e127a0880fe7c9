//! Private keys.

use rcgen::KeyPair as CertificateKey;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

use super::TlsError;
use crate::model::{PublicKey, Signature, Signer};
use crate::runtime::entropy;

/// What stands before the 32 bytes of an Ed25519 key in PKCS#8 (RFC 8410, section 7).
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// An Ed25519 private key. Its bytes are wiped when it is dropped and never printed.
pub struct SecretKey {
    pkcs8: Zeroizing<Vec<u8>>,
    pair: Ed25519KeyPair,
}

impl SecretKey {
    /// A new key.
    pub fn generate() -> Result<Self, TlsError> {
        let seed = Zeroizing::new(entropy::random_bytes::<32>()?);
        let der = Zeroizing::new([&PKCS8_PREFIX[..], &seed[..]].concat());
        Self::from_pkcs8(&der)
    }

    /// From PKCS#8 (DER).
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, TlsError> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der)
            .map_err(|error| TlsError::Key(format!("not an Ed25519 key in PKCS#8: {error}")))?;
        Ok(Self { pkcs8: Zeroizing::new(der.to_vec()), pair })
    }

    /// From PKCS#8 in PEM.
    pub fn from_pem(pem: &[u8]) -> Result<Self, TlsError> {
        let der = PrivatePkcs8KeyDer::from_pem_slice(pem)
            .map_err(|error| TlsError::Key(format!("not a PEM private key: {error}")))?;
        Self::from_pkcs8(der.secret_pkcs8_der())
    }

    /// As PKCS#8 in PEM.
    pub fn to_pem(&self) -> Result<Zeroizing<String>, TlsError> {
        Ok(Zeroizing::new(self.certificate_key()?.serialize_pem()))
    }

    /// As PKCS#8 (DER).
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// In the form that certificates are signed with.
    pub(super) fn certificate_key(&self) -> Result<CertificateKey, TlsError> {
        let der = PrivatePkcs8KeyDer::from(self.pkcs8.as_slice());
        CertificateKey::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ED25519)
            .map_err(|error| TlsError::Key(error.to_string()))
    }

    /// A second handle on the same key.
    pub fn duplicate(&self) -> Result<Self, TlsError> {
        Self::from_pkcs8(&self.pkcs8)
    }
}

impl Signer for SecretKey {
    fn public_key(&self) -> PublicKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref()); // Ed25519 public keys are 32 bytes
        PublicKey(bytes)
    }

    fn sign(&self, message: &[u8]) -> Signature {
        let mut bytes = [0; 64];
        bytes.copy_from_slice(self.pair.sign(message).as_ref()); // and signatures 64
        Signature(bytes)
    }
}

impl std::fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SecretKey(of {:?})", self.public_key())
    }
}
