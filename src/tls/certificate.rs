//! What a certificate says, for listings.

use rustls_pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::authority::BACKDATE;
use super::verifier::certificate_key;
use super::{TlsError, VerifyError};
use crate::model::{Enrolment, MemberId, MeshId};

/// What a certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    /// Whom it names.
    pub uris: Vec<String>,
    /// In hexadecimal digits, without leading zeros.
    pub serial: String,
    /// Seconds since 1970.
    pub not_before: u64,
    /// Seconds since 1970.
    pub not_after: u64,
    /// The hash of its key; of a leaf the member id.
    pub key_hash: MemberId,
}

impl Certificate {
    /// Reads a certificate (DER). Its signature is the caller's to check.
    pub fn read(der: &[u8]) -> Result<Self, TlsError> {
        let der = CertificateDer::from(der);
        let key_hash = certificate_key(&der)?.member_id();
        let (_, parsed) = X509Certificate::from_der(&der)
            .map_err(|error| VerifyError::Unreadable(error.to_string()))?;
        let names = parsed.subject_alternative_name().ok().flatten();
        let names = names.map_or(&[][..], |names| names.value.general_names.as_slice());
        let uri = |name: &GeneralName<'_>| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        };
        let (seconds, validity) = (|at: i64| u64::try_from(at).unwrap_or(0), parsed.validity());
        Ok(Self {
            uris: names.iter().filter_map(uri).collect(),
            serial: format!("{:x}", parsed.tbs_certificate.serial),
            not_before: seconds(validity.not_before.timestamp()),
            not_after: seconds(validity.not_after.timestamp()),
            key_hash,
        })
    }

    /// What the leaf of an enrolment says, in a mesh whose leaves live for `ttl_secs`: all of it
    /// follows from the enrolment.
    pub fn of_enrolment(mesh: &MeshId, enrolment: &Enrolment, ttl_secs: u64) -> Self {
        Self {
            uris: vec![member_uri(mesh, enrolment)],
            serial: format!("{:x}", enrolment.serial),
            not_before: enrolment.issued_at.saturating_sub(BACKDATE.as_secs()),
            not_after: enrolment.issued_at.saturating_add(ttl_secs),
            key_hash: enrolment.key.member_id(),
        }
    }
}

/// The SPIFFE id of a member.
pub(super) fn member_uri(mesh: &MeshId, enrolment: &Enrolment) -> String {
    format!("spiffe://{}.mesh/node/{}", mesh.short(), enrolment.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::testing::mesh_of;

    #[test]
    fn an_enrolment_tells_what_the_leaf_says() {
        let [a] = &mesh_of(&["a"]).unwrap()[..] else { panic!("one member") };
        let read = Certificate::read(&a.chain()[0]).unwrap();
        let told = Certificate::of_enrolment(a.mesh(), a.enrolled(), a.genesis().leaf_ttl_secs);
        assert_eq!(read, told);
        assert_eq!((read.not_after, read.key_hash), (a.expires_at(), a.member_id()));
    }
}
