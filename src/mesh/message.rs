//! What members say to each other over reliable streams: one message each, no conversations.
//!
//! One byte says the kind, the rest is its body. A kind that this version does not know is ignored
//! and counted, so that a later version can add one. Bodies never change shape: a new shape is a new
//! kind.

use bytes::{BufMut, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::MESSAGE_LEN_MAX;
use crate::membership::{Identity, MemberUpdate};
use crate::model::{Entry, EntryKey, EntryVersion, MemberId};
use crate::wire;

/// Entries are sent in messages of about this size, in bytes.
const ENTRIES_LEN: usize = 256 * 1024;

/// One reliable message.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Message {
    /// "Here I am, with my credentials." Answered by the same.
    Hello(Hello, Vec<Entry>),
    /// A detector's packet that must not be lost.
    Packet(Bytes),
    /// "Do we hold the same?"
    Roots(Roots),
    /// "No; my sums are these."
    Sums(Sums),
    /// "Then we differ in these buckets, where I hold this."
    Listing(Listing),
    /// "Of these members I believe this."
    States(Vec<MemberUpdate>),
    /// "Send me these."
    Want(Want),
    /// What was wanted, or what is news.
    Entries(Vec<Entry>),
    /// "I hold this run of you for dead."
    Convicted(Identity),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) identity: Identity,
    /// Whether the sender takes part already, or is still reading its own record back.
    pub(super) is_settled: bool,
    pub(super) is_answer: bool,
    pub(super) roots: Roots,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Roots {
    pub(super) entries: u64,
    pub(super) states: u64,
}

/// Empty where the roots agree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sums {
    pub(super) entries: Vec<u64>,
    pub(super) states: Vec<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Listing {
    pub(super) entry_buckets: Vec<u8>,
    pub(super) versions: Vec<(EntryKey, EntryVersion)>,
    pub(super) state_buckets: Vec<u8>,
    pub(super) states: Vec<MemberUpdate>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Want {
    /// Records, with all that is needed to accept them.
    pub(super) members: Vec<MemberId>,
    pub(super) keys: Vec<EntryKey>,
}

const HELLO: u8 = 1;
const PACKET: u8 = 2;
const ROOTS: u8 = 3;
const SUMS: u8 = 4;
const LISTING: u8 = 5;
const STATES: u8 = 6;
const WANT: u8 = 7;
const ENTRIES: u8 = 8;
const CONVICTED: u8 = 9;

/// Bytes that are no message of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unread {
    /// Perhaps one of a later version.
    UnknownKind,
    /// One of no version, for a reason in a fixed word.
    Fault(&'static str),
}

impl Message {
    /// The message as it travels; `None` when it would be too long.
    pub(super) fn encode(&self) -> Option<Bytes> {
        let mut bytes = BytesMut::new();
        let is_encoded = match self {
            Self::Hello(hello, entries) => {
                put(&mut bytes, HELLO, hello) && put_entries(&mut bytes, entries)
            }
            Self::Packet(packet) => {
                bytes.put_u8(PACKET);
                bytes.put_slice(packet);
                true
            }
            Self::Roots(roots) => put(&mut bytes, ROOTS, roots),
            Self::Sums(sums) => put(&mut bytes, SUMS, sums),
            Self::Listing(listing) => put(&mut bytes, LISTING, listing),
            Self::States(states) => put(&mut bytes, STATES, states),
            Self::Want(want) => put(&mut bytes, WANT, want),
            Self::Entries(entries) => {
                bytes.put_u8(ENTRIES);
                put_entries(&mut bytes, entries)
            }
            Self::Convicted(identity) => put(&mut bytes, CONVICTED, identity),
        };
        (is_encoded && bytes.len() <= MESSAGE_LEN_MAX).then(|| bytes.freeze())
    }

    /// Reads a message.
    pub(super) fn decode(data: &[u8]) -> Result<Self, Unread> {
        if data.len() > MESSAGE_LEN_MAX {
            return Err(Unread::Fault("too_long"));
        }
        let Some((kind, body)) = data.split_first() else {
            return Err(Unread::Fault("malformed"));
        };
        Ok(match *kind {
            HELLO => {
                let (hello, len) =
                    wire::decode_prefix(body).map_err(|_| Unread::Fault("malformed"))?;
                Self::Hello(hello, read_entries(body.get(len..).unwrap_or_default())?)
            }
            PACKET => Self::Packet(Bytes::copy_from_slice(body)),
            ROOTS => Self::Roots(read(body)?),
            SUMS => Self::Sums(read(body)?),
            LISTING => Self::Listing(read(body)?),
            STATES => Self::States(read(body)?),
            WANT => Self::Want(read(body)?),
            ENTRIES => Self::Entries(read_entries(body)?),
            CONVICTED => Self::Convicted(read(body)?),
            _ => return Err(Unread::UnknownKind),
        })
    }

    /// Entries in as many messages as they need.
    pub(super) fn of_entries<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Vec<Self> {
        let mut messages = Vec::new();
        let (mut batch, mut len) = (Vec::new(), 0);
        for entry in entries {
            len += entry.bytes().len();
            batch.push(entry.clone());
            if len >= ENTRIES_LEN {
                messages.push(Self::Entries(std::mem::take(&mut batch)));
                len = 0;
            }
        }
        if !batch.is_empty() {
            messages.push(Self::Entries(batch));
        }
        messages
    }
}

fn put<T: Serialize>(bytes: &mut BytesMut, kind: u8, body: &T) -> bool {
    bytes.put_u8(kind);
    wire::encode(body).map(|body| bytes.put_slice(&body)).is_ok()
}

fn put_entries(bytes: &mut BytesMut, entries: &[Entry]) -> bool {
    entries.iter().for_each(|entry| bytes.put_slice(entry.bytes()));
    true
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Unread> {
    wire::decode(body).map_err(|_| Unread::Fault("malformed"))
}

fn read_entries(body: &[u8]) -> Result<Vec<Entry>, Unread> {
    let mut rest = Bytes::copy_from_slice(body);
    let mut entries = Vec::new();
    while !rest.is_empty() {
        entries.push(Entry::decode_from(&mut rest).map_err(|_| Unread::Fault("framing"))?);
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::Belief;
    use crate::model::{EntryHash, EntryKind, Epoch, PublicKey, Signature, Signer};
    use crate::wire::golden;

    /// Signs with a constant: an envelope keeps whatever is there.
    struct Stamp;

    impl Signer for Stamp {
        fn public_key(&self) -> PublicKey {
            PublicKey([7; 32])
        }

        fn sign(&self, _: &[u8]) -> Signature {
            Signature([0xaa; 64])
        }
    }

    fn identity(byte: u8) -> Identity {
        let address = ([10, 0, 0, byte], 7370).into();
        Identity { id: MemberId::from_bytes([byte; 16]), epoch: Epoch(1_790_000_000), address }
    }

    #[test]
    fn messages_of_version_1_are_read_and_written_as_ever() {
        let kinds = [EntryKind::RECORD, EntryKind::POLICY, EntryKind(99)];
        let mesh = crate::model::MeshId([1; 32]);
        let sign = |kind| {
            Entry::sign(&mesh, &Stamp, kind, [2; 16], Epoch(5), 300, b"\x01whatever").unwrap()
        };
        let entries: Vec<Entry> = kinds.into_iter().map(sign).collect();
        let key = EntryKey {
            kind: EntryKind::INVITE,
            owner: MemberId::from_bytes([3; 16]),
            subject: [4; 16],
        };
        let version =
            EntryVersion { epoch: Epoch(1_790_000_000), version: 2, hash: EntryHash([8; 16]) };
        let roots = Roots { entries: u64::MAX, states: 1 };
        let hello = Hello { identity: identity(1), is_settled: true, is_answer: false, roots };
        let update =
            MemberUpdate { identity: identity(2), incarnation: 300, belief: Belief::Suspect };
        let listing = Listing {
            entry_buckets: vec![0, 255],
            versions: vec![(key, version)],
            state_buckets: vec![3],
            states: vec![update],
        };
        let messages = [
            ("hello", Message::Hello(hello, entries.clone())),
            ("packet", Message::Packet(Bytes::from_static(b"of the detector"))),
            ("roots", Message::Roots(roots)),
            ("sums", Message::Sums(Sums { entries: vec![1, 1 << 40], states: Vec::new() })),
            ("listing", Message::Listing(listing)),
            ("states", Message::States(vec![update])),
            ("want", Message::Want(Want { members: vec![identity(5).id], keys: vec![key] })),
            ("entries", Message::Entries(entries)),
            ("convicted", Message::Convicted(identity(6))),
        ];
        for (name, message) in messages {
            let write = |message: &Message| message.encode().unwrap().to_vec();
            let name = format!("message/{name}");
            golden::check(&name, &message, write, |bytes| Message::decode(bytes).unwrap());
        }
    }
}
