//! This member's own record: what it says, under which number, and how often.

use std::time::Duration;

use super::{Error, MeshConfig};
use crate::model::{
    Capacity, Entry, EntryKind, EntryVersion, Epoch, Idempotent, LimitedInstance, MemberPhase,
    MemberRecord, Moment, Offer, Signer,
};
use crate::wire;

/// Publications at once; after that one per [`PAUSE`]. The mesh carries about ten a second in all.
const BURST_MAX: u32 = 5;
const PAUSE: Duration = Duration::from_secs(1);

/// What this member publishes about itself.
pub(super) struct Publication {
    pub(super) offers: Vec<Offer>,
    pub(super) phase: MemberPhase,
    pub(super) epoch: Epoch,
    version: u64,
    is_due: bool,
    tokens: u32,
    refilled_at: Moment,
}

impl Publication {
    pub(super) fn new(now: Moment, config: &MeshConfig) -> Self {
        Self {
            offers: config.offers.clone(),
            phase: config.phase,
            epoch: config.epoch,
            version: 0,
            is_due: false,
            tokens: BURST_MAX,
            refilled_at: now,
        }
    }

    /// Something changed: publish when the limit allows.
    pub(super) fn set_due(&mut self) {
        self.is_due = true;
    }

    /// Whether to publish now; counts it.
    pub(super) fn take_due(&mut self, now: Moment) -> bool {
        self.refill(now);
        let is_now = self.is_due && self.tokens > 0;
        if is_now {
            self.tokens -= 1;
            self.is_due = false;
        }
        is_now
    }

    /// When to ask [`Publication::take_due`] again.
    pub(super) fn next_deadline(&self) -> Option<Moment> {
        self.is_due.then(|| self.refilled_at + PAUSE)
    }

    /// Whether `version` of this member's own record is later than any that this run has signed.
    pub(super) fn is_behind(&self, version: &EntryVersion) -> bool {
        (version.epoch, version.version) > (self.epoch, self.version)
    }

    /// Signs the record as it is now, under the next version.
    pub(super) fn sign(
        &mut self,
        config: &MeshConfig,
        signer: &dyn Signer,
    ) -> Result<Entry, Error> {
        self.version += 1;
        let record = MemberRecord {
            name: config.name.clone(),
            address: config.address,
            zone: config.zone.clone(),
            phase: self.phase,
            instances: self.offers.iter().map(|offer| offer.record.clone()).collect(),
            agent_version: config.agent_version.clone(),
            idempotent: self.offers.iter().filter_map(idempotent).collect(),
            capacities: self.offers.iter().filter_map(limited).collect(),
        };
        let payload = wire::encode_payload(&record).map_err(|e| Error::Record(e.to_string()))?;
        let (kind, subject) = (EntryKind::RECORD, [0; 16]);
        Entry::sign(&config.mesh, signer, kind, subject, self.epoch, self.version, &payload)
            .map_err(|e| Error::Record(e.to_string()))
    }

    fn refill(&mut self, now: Moment) {
        while self.tokens < BURST_MAX && now.since(self.refilled_at) >= PAUSE {
            self.tokens += 1;
            self.refilled_at = self.refilled_at + PAUSE;
        }
        if self.tokens == BURST_MAX {
            self.refilled_at = now;
        }
    }
}

fn limited(offer: &Offer) -> Option<LimitedInstance> {
    let Capacity { soft, hard } = offer.capacity;
    let instance = offer.record.id.clone();
    (!offer.capacity.is_unlimited()).then_some(LimitedInstance { instance, soft, hard })
}

fn idempotent(offer: &Offer) -> Option<Idempotent> {
    let requests = offer.idempotent.clone();
    (!requests.is_empty()).then(|| Idempotent { instance: offer.record.id.clone(), requests })
}
