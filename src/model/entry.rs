//! The frozen outer envelope of everything that is replicated.
//!
//! An entry has one writer: the holder of `signer`, whose hash is the owner. It says which of its
//! things it is about (`subject`: all zero for a member's own record, a member id for an enrolment),
//! and only its owner can replace it, by a higher [`EntryVersion`]. The payload is carried verbatim,
//! so that a member can relay what it cannot read.
//!
//! Layout, big-endian, never to change (golden bytes in the tests):
//!
//! | bytes | field |
//! |---|---|
//! | 1 | format, always 1 |
//! | 2 | kind |
//! | 32 | signer, an Ed25519 public key |
//! | 16 | subject |
//! | 8 | epoch |
//! | 8 | version |
//! | 4 | length of the payload, at most [`PAYLOAD_LEN_MAX`] |
//! | n | payload |
//! | 64 | signature over a domain string, the mesh id and all fields above |

use std::fmt;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::{EntryHash, Epoch, MemberId, MeshId, PublicKey, Signature, Signer};

/// Longest payload, in bytes. With the envelope it fits a 64 KiB frame.
pub const PAYLOAD_LEN_MAX: usize = 60 * 1024;

const FORMAT: u8 = 1;
const HEADER_LEN: usize = 1 + 2 + 32 + 16 + 8 + 8 + 4;
const SIGNATURE_LEN: usize = 64;
const DOMAIN: &[u8] = b"murmesh entry v1\0";

/// What an entry is about. Unknown kinds are relayed, not applied and not blamed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EntryKind(pub u16);

impl EntryKind {
    /// A member's own record: address, instances, phase. Signed by its node key.
    pub const RECORD: Self = Self(1);
    /// What a member saw of others' instances. Signed by its node key.
    pub const OBSERVATIONS: Self = Self(2);
    /// Binds a member's key, name and services. Signed by an issuer.
    pub const ENROLMENT: Self = Self(3);
    /// Lets the holder of a token join. Signed by an issuer.
    pub const INVITE: Self = Self(4);
    /// Makes a key an issuer. Signed by the root.
    pub const ISSUER: Self = Self(5);
    /// Makes a key an operator. Signed by the root.
    pub const OPERATOR: Self = Self(6);
    /// Takes a key's rights away. Signed by root or operator.
    pub const REVOCATION: Self = Self(7);
    /// Rules. Signed by an operator.
    pub const POLICY: Self = Self(8);
}

impl fmt::Debug for EntryKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::RECORD => "record",
            Self::OBSERVATIONS => "observations",
            Self::ENROLMENT => "enrolment",
            Self::INVITE => "invite",
            Self::ISSUER => "issuer",
            Self::OPERATOR => "operator",
            Self::REVOCATION => "revocation",
            Self::POLICY => "policy",
            Self(other) => return write!(f, "kind-{other}"),
        };
        f.write_str(name)
    }
}

/// The place of an entry: of all entries with one key only the newest is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EntryKey {
    /// What it is about.
    pub kind: EntryKind,
    /// Who wrote it.
    pub owner: MemberId,
    /// Which of the owner's things it is about.
    pub subject: [u8; 16],
}

/// Which of two entries with one key wins: the higher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EntryVersion {
    /// The owner's run.
    pub epoch: Epoch,
    /// Counts up within one epoch.
    pub version: u64,
    /// Of the payload: breaks the tie of an owner that signed two payloads with one number.
    pub hash: EntryHash,
}

/// Bytes that are no entry. Fault: whoever sent them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// It ends too early.
    #[error("entry of {len} bytes ends before its field '{field}'")]
    Truncated {
        /// Which field.
        field: &'static str,
        /// In bytes.
        len: usize,
    },
    /// It is of a format that this version does not know.
    #[error("entry format {0} is unknown, expected {FORMAT}")]
    Format(u8),
    /// Its payload is too long.
    #[error("entry payload of {len} bytes is over the limit of {PAYLOAD_LEN_MAX}")]
    PayloadTooLong {
        /// In bytes.
        len: usize,
    },
    /// Something follows it.
    #[error("entry is followed by {len} bytes that do not belong to it")]
    Trailing {
        /// In bytes.
        len: usize,
    },
}

/// A signed, single-writer entry. Cheap to clone: the bytes are shared.
#[derive(Clone, PartialEq, Eq)]
pub struct Entry {
    bytes: Bytes,
    key: EntryKey,
    version: EntryVersion,
    signer: PublicKey,
}

impl Entry {
    /// Signs a new entry. `payload` must be at most [`PAYLOAD_LEN_MAX`] bytes.
    pub fn sign(
        mesh: &MeshId,
        signer: &dyn Signer,
        kind: EntryKind,
        subject: [u8; 16],
        epoch: Epoch,
        version: u64,
        payload: &[u8],
    ) -> Result<Self, EntryError> {
        if payload.len() > PAYLOAD_LEN_MAX {
            return Err(EntryError::PayloadTooLong { len: payload.len() });
        }
        let mut bytes = BytesMut::with_capacity(HEADER_LEN + payload.len() + SIGNATURE_LEN);
        bytes.put_u8(FORMAT);
        bytes.put_u16(kind.0);
        bytes.put_slice(&signer.public_key().0);
        bytes.put_slice(&subject);
        bytes.put_u64(epoch.0);
        bytes.put_u64(version);
        bytes.put_u32(payload.len() as u32); // at most PAYLOAD_LEN_MAX
        bytes.put_slice(payload);
        let signature = signer.sign(&signed_message(mesh, &bytes));
        bytes.put_slice(&signature.0);
        Self::decode(bytes.freeze())
    }

    /// Reads exactly one entry. Checks its shape, not its signature.
    pub fn decode(bytes: Bytes) -> Result<Self, EntryError> {
        let mut rest = bytes.clone();
        let entry = Self::decode_from(&mut rest)?;
        match rest.len() {
            0 => Ok(entry),
            len => Err(EntryError::Trailing { len }),
        }
    }

    /// Reads one entry off the front of `bytes`. Checks its shape, not its signature.
    pub fn decode_from(bytes: &mut Bytes) -> Result<Self, EntryError> {
        let len = bytes.len();
        if len < HEADER_LEN {
            return Err(EntryError::Truncated { field: "header", len });
        }
        let mut header = bytes.slice(..HEADER_LEN);
        match header.get_u8() {
            FORMAT => {}
            other => return Err(EntryError::Format(other)),
        }
        let kind = EntryKind(header.get_u16());
        let signer = PublicKey(take(&mut header));
        let subject = take(&mut header);
        let epoch = Epoch(header.get_u64());
        let version = header.get_u64();
        let payload_len = header.get_u32() as usize;
        if payload_len > PAYLOAD_LEN_MAX {
            return Err(EntryError::PayloadTooLong { len: payload_len });
        }
        let entry_len = HEADER_LEN + payload_len + SIGNATURE_LEN;
        if len < entry_len {
            return Err(EntryError::Truncated { field: "payload", len });
        }
        let bytes = bytes.split_to(entry_len);
        let hash = EntryHash::of(&bytes[HEADER_LEN..HEADER_LEN + payload_len]);
        let key = EntryKey { kind, owner: signer.member_id(), subject };
        Ok(Self { bytes, key, version: EntryVersion { epoch, version, hash }, signer })
    }

    /// Whether the signature holds in `mesh`. Costs about 50 µs; callers remember the answer.
    pub fn is_signed(&self, mesh: &MeshId) -> bool {
        let (signed, signature) = self.bytes.split_at(self.bytes.len() - SIGNATURE_LEN);
        let mut bytes = [0; SIGNATURE_LEN];
        bytes.copy_from_slice(signature);
        self.signer.verifies(&signed_message(mesh, signed), &Signature(bytes))
    }

    /// Its place.
    pub fn key(&self) -> EntryKey {
        self.key
    }

    /// Which of two wins.
    pub fn version(&self) -> EntryVersion {
        self.version
    }

    /// Who signed it.
    pub fn signer(&self) -> PublicKey {
        self.signer
    }

    /// What it carries, verbatim.
    pub fn payload(&self) -> Bytes {
        self.bytes.slice(HEADER_LEN..self.bytes.len() - SIGNATURE_LEN)
    }

    /// The whole entry as it travels and as it is stored.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EntryKey { kind, owner, .. } = self.key;
        let EntryVersion { epoch, version, .. } = self.version;
        write!(f, "Entry({kind:?} of {owner:?}, {epoch}.{version}, {} bytes)", self.bytes.len())
    }
}

fn signed_message(mesh: &MeshId, fields: &[u8]) -> Vec<u8> {
    [DOMAIN, &mesh.0, fields].concat()
}

fn take<const N: usize>(bytes: &mut Bytes) -> [u8; N] {
    let mut out = [0; N];
    bytes.copy_to_slice(&mut out);
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use ring::signature::{Ed25519KeyPair, KeyPair};

    use super::*;

    /// A key made of one repeated byte.
    pub(crate) struct TestKey(Ed25519KeyPair);

    impl TestKey {
        pub(crate) fn new(seed: u8) -> Self {
            Self(Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap())
        }
    }

    impl Signer for TestKey {
        fn public_key(&self) -> PublicKey {
            PublicKey(self.0.public_key().as_ref().try_into().unwrap())
        }

        fn sign(&self, message: &[u8]) -> Signature {
            Signature(self.0.sign(message).as_ref().try_into().unwrap())
        }
    }

    const MESH: MeshId = MeshId([7; 32]);

    fn entry() -> Entry {
        let key = TestKey::new(1);
        Entry::sign(&MESH, &key, EntryKind::RECORD, [0; 16], Epoch(3), 9, b"hello").unwrap()
    }

    #[test]
    fn envelope_bytes_are_frozen() {
        // Members of every version read this layout: a change here cuts the mesh in two.
        let golden = "0100018a88e3dd7409f195fd52db2d3cba5d72ca6709bf1d94121bf3748801b40f6f5c\
                      0000000000000000000000000000000000000000000000030000000000000009\
                      0000000568656c6c6f";
        let bytes = entry().bytes().clone();
        assert_eq!(super::super::key::hex(&bytes[..bytes.len() - 64]), golden);
    }

    #[test]
    fn entry_survives_the_wire_and_is_bound_to_its_mesh() {
        let decoded = Entry::decode(entry().bytes().clone()).unwrap();
        assert_eq!(decoded, entry());
        assert!(decoded.is_signed(&MESH));
        assert!(!decoded.is_signed(&MeshId([8; 32])), "an entry of one mesh is nothing in another");
    }

    #[test]
    fn every_flipped_bit_breaks_the_shape_or_the_signature() {
        let bytes = entry().bytes().clone();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let survived = Entry::decode(damaged.into()).is_ok_and(|entry| entry.is_signed(&MESH));
            assert!(!survived, "bit {bit}");
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = entry().bytes().clone();
        for len in 0..bytes.len() {
            assert!(Entry::decode(bytes.slice(..len)).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn declared_length_over_the_limit_is_refused_before_it_is_believed() {
        let mut bytes = entry().bytes().to_vec();
        bytes[67..71].copy_from_slice(&u32::MAX.to_be_bytes());
        let refused = Entry::decode(bytes.into()).unwrap_err();
        assert_eq!(refused, EntryError::PayloadTooLong { len: u32::MAX as usize });
    }
}
