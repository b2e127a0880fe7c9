//! What a node needs to know to begin.

use std::net::SocketAddr;

use crate::membership::Profile;
use crate::model::{Epoch, MemberId, MemberName, MemberPhase, MeshId, Offer, PublicKey};

/// How many epochs above [`MeshConfig::epoch`] a run may use without asking the disk again.
pub const EPOCH_RESERVE: u64 = 1024;

/// What a node needs to know to begin.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    /// Which mesh.
    pub mesh: MeshId,
    /// The root key: signs issuers.
    pub root: PublicKey,
    /// This member's name, as in its enrolment.
    pub name: MemberName,
    /// Where others reach this member.
    pub address: SocketAddr,
    /// For instance `eu1/a`; may be empty.
    pub zone: String,
    /// Of the agent, for instance `0.1.0`.
    pub agent_version: String,
    /// This machine's wall time when its moments began, in milliseconds since 1970: how old others'
    /// observations are is told by it. Need not be exact.
    pub began_at_ms: u64,
    /// Above that of every earlier run, and durable; so are the next [`EPOCH_RESERVE`].
    pub epoch: Epoch,
    /// How fast to detect and at what cost.
    pub profile: Profile,
    /// Addresses where a member may answer. This node's own is ignored.
    pub seeds: Vec<SocketAddr>,
    /// What this member says of its life from its first record on: running or draining.
    pub phase: MemberPhase,
    /// What this member serves from its first record on.
    pub offers: Vec<Offer>,
    /// Members of an earlier run ([`Mesh::remembered`](super::Mesh::remembered)).
    pub remembered: Vec<(MemberId, SocketAddr)>,
}
