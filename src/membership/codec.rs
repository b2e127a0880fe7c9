//! foca's packets on the wire, and the means to take them apart.
//!
//! A packet is a header, then (unless it is an announcement, a broadcast or a TurnUndead) a count
//! and that many member states, then broadcast items behind their lengths. The driver reads packets
//! itself before foca does, so that foca sees only what may be believed.

use bytes::{Buf, BufMut, Bytes};
use foca::{Header, Incarnation, Member, Message, State};
use serde::{Deserialize, Serialize};

use super::Identity;
use crate::wire::{self, WireError};

/// foca's codec over [`wire`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Codec;

impl foca::Codec<Identity> for Codec {
    type Error = WireError;

    fn encode_header(
        &mut self,
        header: &Header<Identity>,
        mut buf: impl BufMut,
    ) -> Result<(), WireError> {
        let Header { src, src_incarnation, dst, message } = header.clone();
        wire::encode_into(&(src, src_incarnation, dst, Kind::from(message)), &mut buf)
    }

    fn decode_header(&mut self, buf: impl Buf) -> Result<Header<Identity>, WireError> {
        let (src, src_incarnation, dst, kind): (_, _, _, Kind) = decode(buf)?;
        Ok(Header { src, src_incarnation, dst, message: kind.into() })
    }

    fn encode_member(
        &mut self,
        member: &Member<Identity>,
        mut buf: impl BufMut,
    ) -> Result<(), WireError> {
        wire::encode_into(&MemberUpdate::from(member), &mut buf)
    }

    fn decode_member(&mut self, buf: impl Buf) -> Result<Member<Identity>, WireError> {
        decode::<MemberUpdate>(buf).map(Member::from)
    }
}

fn decode<T: serde::de::DeserializeOwned>(mut buf: impl Buf) -> Result<T, WireError> {
    let (value, len) = wire::decode_prefix(buf.chunk())?;
    buf.advance(len);
    Ok(value)
}

/// What one member believes of another, as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberUpdate {
    /// Whom it is about.
    pub identity: Identity,
    /// Raised by the member itself when it refutes.
    pub incarnation: u16,
    /// What is believed.
    pub belief: Belief,
}

/// What is believed of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Belief {
    /// It answers, or others vouch for it.
    Alive,
    /// It failed a probe and may still refute it.
    Suspect,
    /// It was convicted.
    Down,
}

impl From<&Member<Identity>> for MemberUpdate {
    fn from(member: &Member<Identity>) -> Self {
        let belief = match member.state() {
            State::Alive => Belief::Alive,
            State::Suspect => Belief::Suspect,
            State::Down => Belief::Down,
        };
        Self { identity: *member.id(), incarnation: member.incarnation(), belief }
    }
}

impl From<MemberUpdate> for Member<Identity> {
    fn from(update: MemberUpdate) -> Self {
        let state = match update.belief {
            Belief::Alive => State::Alive,
            Belief::Suspect => State::Suspect,
            Belief::Down => State::Down,
        };
        Self::new(update.identity, update.incarnation, state)
    }
}

/// foca's messages as they travel.
#[derive(Serialize, Deserialize)]
enum Kind {
    Ping(u8),
    Ack(u8),
    PingReq(Identity, u8),
    IndirectPing(Identity, u8),
    IndirectAck(Identity, u8),
    ForwardedAck(Identity, u8),
    Announce,
    Feed,
    Gossip,
    Broadcast,
    TurnUndead,
}

impl From<Message<Identity>> for Kind {
    fn from(message: Message<Identity>) -> Self {
        match message {
            Message::Ping(number) => Self::Ping(number),
            Message::Ack(number) => Self::Ack(number),
            Message::PingReq { target, probe_number } => Self::PingReq(target, probe_number),
            Message::IndirectPing { origin, probe_number } => {
                Self::IndirectPing(origin, probe_number)
            }
            Message::IndirectAck { target, probe_number } => {
                Self::IndirectAck(target, probe_number)
            }
            Message::ForwardedAck { origin, probe_number } => {
                Self::ForwardedAck(origin, probe_number)
            }
            Message::Announce => Self::Announce,
            Message::Feed => Self::Feed,
            Message::Gossip => Self::Gossip,
            Message::Broadcast => Self::Broadcast,
            Message::TurnUndead => Self::TurnUndead,
        }
    }
}

impl From<Kind> for Message<Identity> {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Ping(number) => Self::Ping(number),
            Kind::Ack(number) => Self::Ack(number),
            Kind::PingReq(target, probe_number) => Self::PingReq { target, probe_number },
            Kind::IndirectPing(origin, probe_number) => Self::IndirectPing { origin, probe_number },
            Kind::IndirectAck(target, probe_number) => Self::IndirectAck { target, probe_number },
            Kind::ForwardedAck(origin, probe_number) => Self::ForwardedAck { origin, probe_number },
            Kind::Announce => Self::Announce,
            Kind::Feed => Self::Feed,
            Kind::Gossip => Self::Gossip,
            Kind::Broadcast => Self::Broadcast,
            Kind::TurnUndead => Self::TurnUndead,
        }
    }
}

/// One packet, taken apart.
pub(super) struct Packet {
    pub(super) header: Header<Identity>,
    pub(super) updates: Vec<MemberUpdate>,
    pub(super) items: Vec<Bytes>,
}

impl Packet {
    /// Reads a packet; its size was checked before, so its counts are bounded.
    pub(super) fn decode(mut data: &[u8]) -> Result<Self, WireError> {
        let mut codec = Codec;
        let header = foca::Codec::decode_header(&mut codec, &mut data)?;
        let mut updates = Vec::new();
        if has_updates(&header.message) && data.len() >= 2 {
            for _ in 0..data.get_u16() {
                updates.push(decode(&mut data)?);
            }
        }
        let mut items = Vec::new();
        while data.len() >= 2 {
            let len = usize::from(data.get_u16());
            let item = data.get(..len).filter(|item| !item.is_empty());
            items.push(Bytes::copy_from_slice(item.ok_or(WireError::TooLong { len })?));
            data.advance(len);
        }
        match data.len() {
            0 => Ok(Self { header, updates, items }),
            len => Err(WireError::Trailing { len }),
        }
    }

    /// The packet without its items, for foca to read.
    pub(super) fn encode_without_items(&self) -> Result<Vec<u8>, WireError> {
        let mut codec = Codec;
        let mut bytes = Vec::with_capacity(256);
        foca::Codec::encode_header(&mut codec, &self.header, &mut bytes)?;
        if has_updates(&self.header.message) {
            let count = u16::try_from(self.updates.len());
            bytes.put_u16(count.map_err(|_| WireError::TooLong { len: self.updates.len() })?);
            for update in &self.updates {
                wire::encode_into(update, &mut bytes)?;
            }
        }
        Ok(bytes)
    }

    /// The identity, besides sender and receiver, that this packet asks to be written to.
    pub(super) fn third_party(&self) -> Option<Identity> {
        match self.header.message {
            Message::PingReq { target: third, .. }
            | Message::IndirectPing { origin: third, .. }
            | Message::IndirectAck { target: third, .. }
            | Message::ForwardedAck { origin: third, .. } => Some(third),
            _ => None,
        }
    }
}

/// Reads only the header of a packet that this node made.
pub(super) fn header_of(data: &[u8]) -> Option<Header<Identity>> {
    foca::Codec::decode_header(&mut Codec, data).ok()
}

/// A ping made by the driver, outside foca's own rounds, with one thing to tell.
pub(super) fn ping(
    src: Identity,
    src_incarnation: Incarnation,
    dst: Identity,
    number: u8,
    update: Option<MemberUpdate>,
) -> Option<Bytes> {
    made(src, src_incarnation, dst, Message::Ping(number), update.into_iter().collect())
}

/// Asks `dst` to reach `about` for this member, and to tell it what is said of it.
pub(super) fn ping_req(
    src: Identity,
    src_incarnation: Incarnation,
    dst: Identity,
    number: u8,
    about: MemberUpdate,
) -> Option<Bytes> {
    let message = Message::PingReq { target: about.identity, probe_number: number };
    made(src, src_incarnation, dst, message, vec![about])
}

/// What one member wants another to know of others at once.
pub(super) fn gossip(
    src: Identity,
    src_incarnation: Incarnation,
    dst: Identity,
    updates: Vec<MemberUpdate>,
) -> Option<Bytes> {
    made(src, src_incarnation, dst, Message::Gossip, updates)
}

fn made(
    src: Identity,
    src_incarnation: Incarnation,
    dst: Identity,
    message: Message<Identity>,
    updates: Vec<MemberUpdate>,
) -> Option<Bytes> {
    let header = Header { src, src_incarnation, dst, message };
    let packet = Packet { header, updates, items: Vec::new() };
    packet.encode_without_items().ok().map(Bytes::from)
}

const fn has_updates(message: &Message<Identity>) -> bool {
    !matches!(message, Message::Announce | Message::TurnUndead | Message::Broadcast)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Epoch, MemberId};

    fn identity(byte: u8) -> Identity {
        let address = ([10, 0, 0, byte], 7370).into();
        Identity { id: MemberId::from_bytes([byte; 16]), epoch: Epoch(1_790_000_000), address }
    }

    fn packet() -> Packet {
        let message = Message::PingReq { target: identity(3), probe_number: 7 };
        let header = Header { src: identity(1), src_incarnation: 2, dst: identity(2), message };
        let update =
            MemberUpdate { identity: identity(4), incarnation: 1, belief: Belief::Suspect };
        Packet { header, updates: vec![update; 3], items: Vec::new() }
    }

    #[test]
    fn packets_of_version_1_are_read_and_written_as_ever() {
        let (target, origin, probe_number) = (identity(3), identity(4), 7);
        let messages = [
            ("ping", Message::Ping(7)),
            ("ack", Message::Ack(7)),
            ("ping-req", Message::PingReq { target, probe_number }),
            ("indirect-ping", Message::IndirectPing { origin, probe_number }),
            ("indirect-ack", Message::IndirectAck { target, probe_number }),
            ("forwarded-ack", Message::ForwardedAck { origin, probe_number }),
            ("announce", Message::Announce),
            ("feed", Message::Feed),
            ("gossip", Message::Gossip),
            ("broadcast", Message::Broadcast),
            ("turn-undead", Message::TurnUndead),
        ];
        for (name, message) in messages {
            let header = Header { src: identity(1), src_incarnation: 2, dst: identity(2), message };
            let write = |header: &Header<Identity>| {
                let mut bytes = Vec::new();
                foca::Codec::encode_header(&mut Codec, header, &mut bytes).unwrap();
                bytes
            };
            let read = |bytes: &[u8]| foca::Codec::decode_header(&mut Codec, bytes).unwrap();
            wire::golden::check(&format!("packet/{name}"), &header, write, read);
        }
        for belief in [Belief::Alive, Belief::Suspect, Belief::Down] {
            let update = MemberUpdate { identity: identity(4), incarnation: 300, belief };
            wire::golden::check_value(&format!("packet/member/{belief:?}"), &update);
        }
    }

    #[test]
    fn packet_survives_the_wire_and_its_identities_are_small() {
        let bytes = packet().encode_without_items().unwrap();
        let read = Packet::decode(&bytes).unwrap();
        assert_eq!(read.header, packet().header);
        assert_eq!(read.updates, packet().updates);
        // Three identities in the header and three in updates; a probe must stay far below 1150.
        assert!(bytes.len() < 6 * 34, "{} bytes", bytes.len());
    }

    #[test]
    fn every_truncation_of_a_packet_is_refused() {
        let mut bytes = packet().encode_without_items().unwrap();
        bytes.extend([0, 3, 1, 2, 3]); // one item
        let whole = Packet::decode(&bytes).unwrap();
        assert_eq!(whole.items, [Bytes::from_static(&[1, 2, 3])]);
        let without_item = bytes.len() - 5;
        let without_updates = foca_header_len();
        for len in 0..bytes.len() {
            let is_whole = len == without_item || len == without_updates;
            assert_eq!(Packet::decode(&bytes[..len]).is_ok(), is_whole, "{len} bytes");
        }
    }

    fn foca_header_len() -> usize {
        let mut bytes = Vec::new();
        foca::Codec::encode_header(&mut Codec, &packet().header, &mut bytes).unwrap();
        bytes.len()
    }
}
