//! Who a member is to the detector.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::model::{Epoch, MemberId};

/// One run of a member. The id is the key of the member list; of two runs the higher epoch wins.
/// An identity is believed only if the member's signed record says the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Identity {
    /// Which member.
    pub id: MemberId,
    /// Which run.
    pub epoch: Epoch,
    /// Where this run is reached.
    pub address: SocketAddr,
}

impl foca::Identity for Identity {
    type Addr = MemberId;

    fn renew(&self) -> Option<Self> {
        let epoch = Epoch(self.epoch.0.checked_add(1)?);
        Some(Self { epoch, ..*self })
    }

    fn addr(&self) -> MemberId {
        self.id
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.epoch > adversary.epoch
    }
}

/// What a member's signed record says of an identity that somebody else mentions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The same: it may be believed.
    Current,
    /// A later run, or another address in this run: it must not be believed.
    Refuted,
    /// No record of this run is here yet: it waits for one.
    Unknown,
}
