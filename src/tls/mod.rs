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
pub mod public;
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
pub enum TlsError {
    /// It is not an Ed25519 key in PKCS#8, as PEM where it is text.
    #[error("cannot read a private key: {0}")]
    Key(String),
    /// The issuing key and its certificate do not belong together, or a field does not fit.
    #[error("cannot make a certificate: {0}")]
    Certificate(String),
    /// rustls refuses what it was given.
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] rustls::Error),
    /// What was to be signed does not fit into an entry.
    #[error("cannot build an entry: {0}")]
    Entry(#[from] crate::model::EntryError),
    /// A payload cannot be encoded or decoded.
    #[error("cannot encode: {0}")]
    Wire(#[from] crate::wire::WireError),
    /// The system gives no random bytes. Fault: this machine.
    #[error(transparent)]
    Entropy(#[from] crate::runtime::entropy::EntropyError),
    /// The files do not belong together, or to this mesh.
    #[error("identity is not valid: {0}")]
    Verify(#[from] VerifyError),
    /// Fault: whoever brought the key.
    #[error("this is not the root key of mesh {mesh}")]
    OtherRoot {
        /// The mesh that was meant, by the first digits of its id.
        mesh: String,
    },
    /// Fault: whoever copied the token. Holds what is wrong with it, never the token.
    #[error("join token is not valid: {0}")]
    Token(&'static str),
}
