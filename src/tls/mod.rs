//! Who is who: keys, certificates, and TLS made of them.
//!
//! Three levels of Ed25519 X.509 certificates: the root (offline after `init`), issuers, and a leaf
//! for every member. A leaf carries its member's enrolment in an extension, so that one handshake
//! proves key, name and rights together, and no handshake waits for gossip. TLS 1.3 only, mutual
//! everywhere but at the enrolment door, no early data. Leaves are short-lived and renewed by whoever
//! issues ([`rotation`]); what is accepted past the end is in [`grace`].

mod authority;
mod certificate;
mod credentials;
pub mod grace;
mod key;
mod plane;
pub mod rotation;
pub mod store;
#[doc(hidden)]
pub mod testing;
mod token;
mod trust;
mod verifier;

pub use authority::{Authority, FoundedMesh, Root, found_mesh};
pub use certificate::Certificate;
pub use credentials::{NodeCredentials, Peer, joiner_config, peer_of, server_name};
pub use key::SecretKey;
pub use plane::Plane;
pub use token::Token;
pub use trust::{Dismissed, Trust};
pub use verifier::VerifyError;

/// Keys or certificates are not usable. Fault: the files of this machine, unless said otherwise.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum TlsError {
    #[error("cannot read a private key: {0}")]
    Key(String),
    #[error("cannot make a certificate: {0}")]
    Certificate(String),
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] rustls::Error),
    #[error("cannot build an entry: {0}")]
    Entry(#[from] crate::model::EntryError),
    #[error("cannot encode: {0}")]
    Wire(#[from] crate::wire::WireError),
    #[error(transparent)]
    Entropy(#[from] crate::runtime::entropy::EntropyError),
    /// The files do not belong together, or to this mesh.
    #[error("identity is not valid: {0}")]
    Verify(#[from] VerifyError),
    /// Fault: whoever brought the key.
    #[error("this is not the root key of mesh {mesh}")]
    OtherRoot { mesh: String },
    #[error("join token is not valid: {0}")]
    Token(&'static str),
}
