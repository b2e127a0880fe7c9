//! What a node hands to its driver: bytes to send, and things that happened.

use std::net::SocketAddr;

use bytes::Bytes;

use crate::breaker::SharedEvent;
use crate::model::{
    Entry, EntryHash, EntryKey, Epoch, InstanceId, InstanceState, MemberId, MemberName, MemberState,
};

/// Longest datagram that a node makes or reads, in bytes: what a QUIC datagram carries on a path
/// whose MTU nobody has measured.
pub const DATAGRAM_LEN_MAX: usize = 1150;

/// Longest reliable message that a node makes or reads, in bytes.
pub const MESSAGE_LEN_MAX: usize = 1024 * 1024;

/// Bytes to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// To whom.
    pub to: Destination,
    /// How.
    pub channel: Channel,
    /// What. At most [`DATAGRAM_LEN_MAX`] or [`MESSAGE_LEN_MAX`] bytes.
    pub data: Bytes,
}

/// Whom to send to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Destination {
    /// A member. Whoever answers at `address` must prove to be `id`.
    Member {
        /// Who must answer.
        id: MemberId,
        /// Where it is dialled.
        address: SocketAddr,
    },
    /// Any member of this mesh that answers at this address.
    Seed(SocketAddr),
}

/// How to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Channel {
    /// Once, and perhaps in vain.
    Datagram,
    /// Whole, or [`handle_unreachable`](super::Mesh::handle_unreachable) hears of it. One
    /// unidirectional stream each; their order does not matter.
    Message,
}

/// What the data plane saw of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// It answered: bytes arrived from it.
    Answered,
    /// It could not be dialled, or its connection died.
    Failed,
}

/// What happened, for logs, metrics and the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MeshEvent {
    /// This node has read its own record back, or waited long enough, and takes part now.
    Settled,
    /// A member is there: new, or back. `is_flap` when it was declared down within the last minute.
    MemberUp {
        /// Which.
        member: MemberId,
        /// Whether it was away for less than a minute.
        is_flap: bool,
    },
    /// A member failed a probe; it stays in use until refuted or convicted.
    MemberSuspect(MemberId),
    /// A member was convicted, here or elsewhere, or did not come back from a restart in time.
    MemberDown {
        /// Which.
        member: MemberId,
        /// What it was before.
        was: MemberState,
    },
    /// A member said goodbye for good.
    MemberLeft(MemberId),
    /// A member announced a restart.
    MemberRestarting(MemberId),
    /// A member came back under a higher epoch.
    MemberRenewed {
        /// Which.
        member: MemberId,
        /// Its new epoch.
        epoch: Epoch,
    },
    /// This node was declared down elsewhere and took a new epoch.
    Renewed(Epoch),
    /// Others hold a record of this member, of this epoch, that this run did not sign: its data
    /// directory was restored from a backup, or another process runs with this key.
    Outbid(Epoch),
    /// Renewals have used up most of the epochs that are durable. Make more durable and say so with
    /// [`Mesh::extend_epochs`](super::Mesh::extend_epochs).
    EpochsNeeded {
        /// At least up to here, and better some more.
        at_least: Epoch,
    },
    /// An instance appeared.
    InstanceAdded {
        /// On which member.
        member: MemberId,
        /// Which.
        instance: InstanceId,
    },
    /// An instance disappeared from its member's record.
    InstanceRemoved {
        /// On which member.
        member: MemberId,
        /// Which.
        instance: InstanceId,
    },
    /// An instance changed what it says of itself.
    InstanceChanged {
        /// On which member.
        member: MemberId,
        /// Which.
        instance: InstanceId,
        /// Its state before and now, which may be the same.
        states: (InstanceState, InstanceState),
    },
    /// The breaker that all callers share has decided something.
    Breaker(SharedEvent),
    /// An entry was accepted: keep it on disk under its key.
    EntryAccepted(Entry),
    /// An entry was refused; nothing changed.
    EntryRefused {
        /// Who brought it; itself when it came from disk.
        from: MemberId,
        /// A fixed word.
        reason: &'static str,
    },
    /// An entry is kept and relayed but its payload cannot be read.
    EntryQuarantined {
        /// Its place.
        key: EntryKey,
        /// Of its payload.
        hash: EntryHash,
    },
    /// One owner signed two payloads with one number. The higher hash won.
    Equivocation(EntryKey),
    /// Two members are enrolled under one name. Neither matches a rule by name until resolved.
    NameConflict {
        /// The name.
        name: MemberName,
        /// Both of them.
        members: [MemberId; 2],
    },
    /// A member changes its own entries faster than it may: what it signed in between was left out.
    OverRate(MemberId),
    /// A member sent what no agent of this version or a later one sends; it was dropped.
    Blamed {
        /// Who sent it.
        member: MemberId,
        /// A fixed word.
        reason: &'static str,
    },
    /// One member said that another is dead, which answers.
    FalseDeath {
        /// Who said so.
        from: MemberId,
        /// Who answers.
        member: MemberId,
    },
    /// A message or datagram, or part of one, was dropped. `from` is who sent it.
    Dropped {
        /// Who sent it.
        from: MemberId,
        /// A fixed word.
        reason: &'static str,
    },
    /// Nobody has been heard for a while: it is probably this node that is cut off. Routes are kept.
    Isolated,
    /// Somebody is heard again.
    Healed,
}
