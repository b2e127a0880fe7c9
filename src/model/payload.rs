//! What the known kinds of entries carry. Fields are only ever appended: a reader of an older
//! version reads the prefix that it knows (see `wire::decode_payload`).

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{
    InstanceId, MemberId, MemberName, Protocol, PublicKey, RequestPattern, ServiceName, Weight,
};

/// What an unlisted service allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unlisted {
    /// Every enrolled member may call it.
    #[default]
    Allow,
    /// Nobody may call it until a rule says so.
    Deny,
}

/// How a mesh began. Its encoded bytes are never changed; their hash is the mesh id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Genesis {
    /// The first root key.
    pub root: PublicKey,
    /// The root's self-signed X.509 certificate (DER): the trust anchor of every handshake.
    pub root_certificate: Vec<u8>,
    /// Unix seconds.
    pub created_at: u64,
    /// What services without a rule allow.
    pub unlisted: Unlisted,
    /// How long a leaf certificate lives, in seconds.
    pub leaf_ttl_secs: u64,
    /// Makes two meshes of one key different.
    pub nonce: [u8; 16],
}

/// What a member says of itself. At most 256 instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// As in its enrolment; a record with another name is refused.
    pub name: MemberName,
    /// Where its one UDP port is reached: the only source of dial addresses.
    pub address: SocketAddr,
    /// For instance `eu1/a`.
    pub zone: String,
    /// What it is about to do.
    pub phase: MemberPhase,
    /// What it serves.
    pub instances: Vec<InstanceRecord>,
    /// Of the agent, for instance `0.1.0`.
    pub agent_version: String,
    /// Which requests to which instances may be sent twice; instances without any are left out.
    /// Since version 2.
    pub idempotent: Vec<Idempotent>,
    /// How many calls instances take at a time; those without a limit are left out. Since version 3.
    pub capacities: Vec<LimitedInstance>,
}

/// How many calls an instance takes at a time, from all callers together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Capacity {
    /// Above this callers go elsewhere first; no limit when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft: Option<u32>,
    /// Above this its agent refuses them; no limit when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hard: Option<u32>,
}

impl fmt::Display for Capacity {
    /// As files write it: `soft = 5, hard = 3`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = |key, limit: Option<u32>| limit.map(|limit| format!("{key} = {limit}"));
        let limits = [limit("soft", self.soft), limit("hard", self.hard)];
        f.write_str(&limits.into_iter().flatten().collect::<Vec<_>>().join(", "))
    }
}

impl Capacity {
    /// Whether there is no limit.
    pub fn is_unlimited(&self) -> bool {
        *self == Self::default()
    }
}

/// An instance that takes only so many calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitedInstance {
    /// One of its member.
    pub instance: InstanceId,
    /// As [`Capacity::soft`].
    pub soft: Option<u32>,
    /// As [`Capacity::hard`].
    pub hard: Option<u32>,
}

/// Requests that an instance may get twice and does the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Idempotent {
    /// One of its member.
    pub instance: InstanceId,
    /// At most 32.
    pub requests: Vec<RequestPattern>,
}

/// One instance as its member offers it: its record, and what stands beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// What everybody is told.
    pub record: InstanceRecord,
    /// Requests that may be sent twice.
    pub idempotent: Vec<RequestPattern>,
    /// How many calls it takes at a time.
    pub capacity: Capacity,
}

impl From<InstanceRecord> for Offer {
    fn from(record: InstanceRecord) -> Self {
        Self { record, idempotent: Vec::new(), capacity: Capacity::default() }
    }
}

/// What a member announces about its own life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberPhase {
    /// Serving.
    #[default]
    Running,
    /// Finishing what it has and taking nothing new.
    Draining,
    /// Stopped by SIGTERM and expected back.
    Restarting,
    /// Gone for good.
    Left,
}

/// One instance in its member's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Unique on the member.
    pub id: InstanceId,
    /// What it serves.
    pub service: ServiceName,
    /// As declared.
    pub protocol: Protocol,
    /// The natural port of the service.
    pub port: u16,
    /// Free words, for instance `v2`.
    pub tags: Vec<String>,
    /// Its share.
    pub weight: Weight,
    /// Whether to send it work.
    pub state: InstanceState,
}

/// Whether an instance wants work, as its own agent says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceState {
    /// Send it work.
    #[default]
    Ready,
    /// Finishing; nothing new.
    Draining,
    /// Its checks fail.
    Failing,
    /// Taken out by its operator.
    Maint,
}

impl InstanceState {
    /// The word that people read.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Failing => "failing",
            Self::Maint => "maint",
        }
    }
}

/// An issuer's word on who a key is. Subject: the member id. Also carried inside the member's
/// certificate, so that every handshake proves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// The member's node key.
    pub key: PublicKey,
    /// Its name, unique in the mesh.
    pub name: MemberName,
    /// Of this issuer's enrolments.
    pub serial: u64,
    /// The services it may offer; all when absent.
    pub services: Option<Vec<ServiceName>>,
    /// Unix seconds.
    pub issued_at: u64,
    /// The invite it came by, if any.
    pub invite: Option<MemberId>,
    /// The members whose name it has taken over: the same machine before it lost its key. Since
    /// version 2.
    pub replaces: Vec<MemberId>,
    /// The hash of the issuing key that first let this member in, whoever has renewed it since; when
    /// absent, that of whoever signed this. Since version 3.
    pub let_in_by: Option<MemberId>,
}

/// Permission to join, for whoever holds the token's private key. Subject: hash of its public key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// The public half of the token.
    pub key: PublicKey,
    /// Unix seconds; useless afterwards.
    pub expires_at: u64,
    /// How many members may join with it; 0 when revoked.
    pub uses: u32,
    /// The only name it admits, if set.
    pub name: Option<MemberName>,
    /// The services whoever joins may offer; all when absent.
    pub services: Option<Vec<ServiceName>>,
}

/// Makes a key an issuer. Subject: the hash of the issuer's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Issuer {
    /// Signs enrolments, invites and leaf certificates.
    pub key: PublicKey,
    /// The member that holds it.
    pub member: MemberId,
    /// Its X.509 CA certificate (DER), signed by the root.
    pub certificate: Vec<u8>,
    /// False once revoked.
    pub is_active: bool,
    /// Of a revoked issuer: the members that it let in and that stay. Since version 2.
    pub kept: Vec<MemberId>,
    /// Of a revoked issuer: members that went with it, and those that they had replaced. Nobody
    /// believes these keys any more, whoever vouches for them. Since version 3.
    pub dropped: Vec<MemberId>,
}

/// Makes a key an operator: a person's, who signs policy and revocations. Subject: the hash of the
/// operator's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operator {
    /// Held by the operator's command line, never by an agent.
    pub key: PublicKey,
    /// What people call the operator.
    pub name: String,
    /// False once revoked.
    pub is_active: bool,
}
