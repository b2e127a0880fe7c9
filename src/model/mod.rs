//! Nouns of the mesh: names, identifiers, addresses, signed entries. No behaviour beyond parsing,
//! order and display.

mod address;
mod digest;
mod domain;
mod entry;
mod key;
mod member;
mod moment;
mod nearest;
mod observations;
mod outcome;
mod payload;
mod request;
mod service;
mod store;

pub use address::{Target, TargetError};
pub use digest::{BUCKETS, Digest, ItemHash};
pub use domain::service_of;
#[cfg(test)]
pub(crate) use entry::tests as entry_tests;
pub use entry::{Entry, EntryError, EntryKey, EntryKind, EntryVersion, PAYLOAD_LEN_MAX};
pub use key::{EntryHash, MeshId, PublicKey, Signature, Signer};
pub use member::{Epoch, MemberId, MemberName, MemberState};
pub use moment::Moment;
pub use nearest::{expected_one_of, nearest};
pub use observations::{Observations, ObservedWindow};
pub use outcome::Outcome;
pub use payload::{
    Capacity, Enrolment, Genesis, Idempotent, InstanceRecord, InstanceState, Invite, Issuer,
    LimitedInstance, MemberPhase, MemberRecord, Offer, Operator, Unlisted,
};
pub use request::{PatternError, RequestPattern};
pub use service::{InstanceId, NameError, Protocol, ServiceName, Weight};
pub use store::StoreSize;
