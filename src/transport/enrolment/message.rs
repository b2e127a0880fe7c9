//! What newcomer and issuer say to each other.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::model::{MemberId, MemberName, MeshId, PublicKey, Signature, Signer};
use crate::runtime::clock;
use crate::tls::{SecretKey, TlsError, Token};
use crate::wire::{self, WireError};

const REQUEST_DOMAIN: &[u8] = b"murmesh join v1\0";

/// What a newcomer asks for. Signed by the invite's key and by the node's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The public half of the token.
    pub invite: PublicKey,
    /// The newcomer's node key.
    pub key: PublicKey,
    /// The name it wants.
    pub name: MemberName,
    /// Seconds since 1970, as the newcomer's clock says.
    pub at: u64,
    /// Whether it takes the name over from whoever has it. Behind everything else as it travels, and
    /// only when it is so: an issuer of an earlier version reads all other requests.
    #[serde(skip)]
    pub is_replacement: bool,
    invite_signature: Vec<u8>,
    key_signature: Vec<u8>,
}

impl JoinRequest {
    /// A request to join the token's mesh at the issuer `issuer`.
    pub fn sign(
        token: &Token,
        node: &SecretKey,
        name: &MemberName,
        is_replacement: bool,
        issuer: &MemberId,
    ) -> Result<Self, TlsError> {
        let invite = token.key()?;
        let mut request = Self {
            invite: invite.public_key(),
            key: node.public_key(),
            name: name.clone(),
            at: clock::unix_seconds(),
            is_replacement,
            invite_signature: Vec::new(),
            key_signature: Vec::new(),
        };
        let message = request.message(&token.mesh, issuer)?;
        request.invite_signature = invite.sign(&message).0.to_vec();
        request.key_signature = node.sign(&message).0.to_vec();
        Ok(request)
    }

    fn message(&self, mesh: &MeshId, issuer: &MemberId) -> Result<Vec<u8>, WireError> {
        let fields = wire::encode(&(&self.invite, &self.key, &self.name, self.at))?;
        let replacement = self.replacement()?;
        Ok([REQUEST_DOMAIN, &mesh.0, issuer.as_bytes(), &fields, &replacement].concat())
    }

    fn replacement(&self) -> Result<Vec<u8>, WireError> {
        if self.is_replacement { wire::encode(&true) } else { Ok(Vec::new()) }
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, WireError> {
        Ok([wire::encode(self)?, self.replacement()?].concat())
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let (mut request, len) = wire::decode_prefix::<Self>(bytes)?;
        if let Some(rest @ [_, ..]) = bytes.get(len..) {
            request.is_replacement = wire::decode(rest)?;
        }
        Ok(request)
    }

    pub(super) fn is_signed(&self, mesh: &MeshId, issuer: &MemberId) -> bool {
        let verifies = |key: &PublicKey, signature: &[u8]| {
            let Ok(message) = self.message(mesh, issuer) else { return false };
            let Ok(bytes) = signature.try_into() else { return false };
            key.verifies(&message, &Signature(bytes))
        };
        verifies(&self.invite, &self.invite_signature) && verifies(&self.key, &self.key_signature)
    }
}

/// What the issuer answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinAnswer {
    /// All that a member starts from.
    Welcome {
        /// The encoded genesis; its hash must be the token's mesh id.
        genesis: Vec<u8>,
        /// Leaf, issuer, root (DER).
        chain: Vec<Vec<u8>>,
        /// Own enrolment, issuers, operators: encoded entries.
        entries: Vec<Vec<u8>>,
        /// Live members to dial first.
        contacts: Vec<(MemberId, SocketAddr)>,
    },
    /// No, and why.
    Refused(JoinRefusal),
}

/// Why a newcomer is not let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum JoinRefusal {
    /// Fault: whoever made the token, or it was revoked or belongs to an issuer not heard of yet.
    #[error("no invite for this token is known here")]
    UnknownInvite,
    /// Fault: whoever waited too long.
    #[error("the token expired {0} s ago; ask for a new one (murmesh invite)")]
    Expired(u64),
    /// The token did its work.
    #[error("the token was used {}, as often as it may be", times(.0))]
    UsedUp(u32),
    /// Revoked by hand.
    #[error("the token was revoked")]
    Revoked,
    /// Another issuer made the token and is alive: only it counts uses.
    #[error("this issuer did not make the token; ask {name} at {address}")]
    OtherIssuer {
        /// Who made it.
        name: MemberName,
        /// Where that is.
        address: SocketAddr,
    },
    /// The name belongs to another key.
    #[error(
        "the name '{0}' belongs to another member; choose another with --name, or take it over with \
         --replace if this is the same machine, set up anew"
    )]
    NameTaken(MemberName),
    /// The invite admits one name only.
    #[error("the token is for a node called '{0}'; use --name {0}")]
    OtherName(MemberName),
    /// The signatures do not hold.
    #[error("the request is not signed by the token's key and the node's key")]
    Signature,
    /// The clocks are too far apart.
    #[error("this machine's clock is {0} s away from the issuer's; set it and try again")]
    Clock(u64),
    /// This member has no issuing key.
    #[error("this member is not an issuer")]
    NotIssuer,
    /// The bytes are no request.
    #[error("the request cannot be read")]
    Malformed,
    /// The issuer could not do its work.
    #[error("the issuer failed: {0}")]
    Internal(String),
    /// Whose name it wants to take over lives.
    #[error(
        "the member '{0}' answers; stop it first. One that has just lost power is held for alive for \
         some seconds: try again"
    )]
    StillThere(MemberName),
    /// The root took back who let this key in, and the key with it.
    #[error(
        "the key of this machine was dropped from the mesh, for good; join with another data \
         directory, and with --replace to keep the name"
    )]
    Dropped,
}

fn times(count: &u32) -> String {
    if *count == 1 { "once".to_owned() } else { format!("{count} times") }
}

impl JoinRefusal {
    /// The word for metrics.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::UnknownInvite => "unknown_invite",
            Self::Expired(_) => "expired_invite",
            Self::UsedUp(_) => "used_up",
            Self::Revoked => "revoked_invite",
            Self::OtherIssuer { .. } => "other_issuer",
            Self::NameTaken(_) => "name_taken",
            Self::OtherName(_) => "other_name",
            Self::Signature => "bad_signature",
            Self::Clock(_) => "clock",
            Self::NotIssuer => "not_issuer",
            Self::Malformed => "malformed",
            Self::Internal(_) => "internal",
            Self::StillThere(_) => "still_there",
            Self::Dropped => "dropped_key",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::golden;

    #[test]
    fn joins_are_read_and_written_as_ever() {
        let (name, address): (MemberName, _) =
            ("node-a".parse().unwrap(), "10.0.0.1:7370".parse().unwrap());
        let request = JoinRequest {
            invite: PublicKey([1; 32]),
            key: PublicKey([2; 32]),
            name: name.clone(),
            at: 1_790_000_000,
            is_replacement: false,
            invite_signature: vec![3; 64],
            key_signature: vec![4; 64],
        };
        let write = |request: &JoinRequest| request.encode().unwrap();
        let read = |bytes: &[u8]| JoinRequest::decode(bytes).unwrap();
        golden::check("join/request", &request, write, read);
        let replacing = JoinRequest { is_replacement: true, ..request };
        golden::check("join/request/replacing", &replacing, write, read);
        let welcome = JoinAnswer::Welcome {
            genesis: vec![1, 2, 3],
            chain: vec![vec![4], vec![5, 6]],
            entries: vec![vec![7]],
            contacts: vec![(MemberId::from_bytes([9; 16]), address)],
        };
        golden::check_value("join/welcome", &welcome);
        let refusals = [
            JoinRefusal::UnknownInvite,
            JoinRefusal::Expired(300),
            JoinRefusal::UsedUp(1),
            JoinRefusal::Revoked,
            JoinRefusal::OtherIssuer { name: name.clone(), address },
            JoinRefusal::NameTaken(name.clone()),
            JoinRefusal::OtherName(name),
            JoinRefusal::Signature,
            JoinRefusal::Clock(7_200),
            JoinRefusal::NotIssuer,
            JoinRefusal::Malformed,
            JoinRefusal::Internal("why".to_owned()),
            JoinRefusal::StillThere("node-a".parse().unwrap()),
            JoinRefusal::Dropped,
        ];
        for refusal in refusals {
            let name = format!("join/refused/{}", refusal.as_str());
            golden::check_value(&name, &JoinAnswer::Refused(refusal));
        }
    }
}
