//! Whole meshes of credentials for tests and benchmarks.

use super::{Authority, FoundedMesh, NodeCredentials, SecretKey, TlsError, found_mesh};
use crate::model::{Enrolment, NameError, Signer, Unlisted};
use crate::runtime::clock;

/// Credentials could not be made.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum TestingError {
    /// A key or a certificate cannot be made.
    Tls(#[from] TlsError),
    /// A name is no member's name. Fault: whoever asks.
    Name(#[from] NameError),
}

/// A new mesh with one enrolled member for each name.
pub fn mesh_of(names: &[&str]) -> Result<Vec<NodeCredentials>, TestingError> {
    let founder = SecretKey::generate()?;
    let founded = found_mesh(&founder.public_key(), Unlisted::Allow, 3_600)?;
    members_of(&founded, names)
}

/// Enrols one more member for each name.
pub fn members_of(
    founded: &FoundedMesh,
    names: &[&str],
) -> Result<Vec<NodeCredentials>, TestingError> {
    let issuer = founded.issuer.duplicate()?;
    let authority =
        Authority::new(founded.mesh, &founded.genesis, issuer, &founded.issuer_certificate)?;
    let member = |(serial, name): (u64, &&str)| {
        let key = SecretKey::generate()?;
        let (_, chain) = authority.enrol(&Enrolment {
            key: key.public_key(),
            name: name.parse()?,
            serial,
            services: None,
            issued_at: clock::unix_seconds(),
            invite: None,
            replaces: Vec::new(),
            let_in_by: None,
        })?;
        Ok(NodeCredentials::new(founded.mesh, founded.genesis.clone(), key, chain)?)
    };
    (1..).zip(names).map(member).collect()
}
