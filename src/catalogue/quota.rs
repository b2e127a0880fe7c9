//! How much one owner may make everybody keep.

use std::collections::BTreeMap;

use crate::model::{Entry, EntryKind, MemberId};

/// Entries of one kind by one owner.
const fn entries_max(kind: EntryKind) -> u32 {
    match kind {
        EntryKind::RECORD | EntryKind::OBSERVATIONS => 1,
        EntryKind::ENROLMENT => 4096, // four times the members that are promised
        EntryKind::INVITE => 8192,    // never taken back: one for each machine and a few more
        EntryKind::ISSUER => 64,
        _ => 16,
    }
}

/// Bytes of all entries by one owner that this version does not apply, envelopes included: there are
/// 65,536 kinds.
const RELAYED_LEN_MAX: usize = 64 * 1024;

/// What each owner has stored here.
#[derive(Debug, Default)]
pub(super) struct Quotas {
    counts: BTreeMap<(EntryKind, MemberId), u32>,
    relayed_len: BTreeMap<MemberId, usize>,
}

impl Quotas {
    /// Whether `entry` may take the place of `previous`.
    pub(super) fn admits(&self, entry: &Entry, previous: Option<&Entry>) -> bool {
        let key = entry.key();
        let count = self.counts.get(&(key.kind, key.owner)).copied().unwrap_or(0);
        if previous.is_none() && count >= entries_max(key.kind) {
            return false;
        }
        if is_applied(key.kind) {
            return true;
        }
        let len = self.relayed_len.get(&key.owner).copied().unwrap_or(0);
        let before = previous.map_or(0, |entry| entry.bytes().len());
        len.saturating_sub(before) + entry.bytes().len() <= RELAYED_LEN_MAX
    }

    /// Counts `entry` in the place of `previous`.
    pub(super) fn replace(&mut self, entry: &Entry, previous: Option<&Entry>) {
        let key = entry.key();
        if previous.is_none() {
            *self.counts.entry((key.kind, key.owner)).or_default() += 1;
        }
        if !is_applied(key.kind) {
            let len = self.relayed_len.entry(key.owner).or_default();
            let before = previous.map_or(0, |entry| entry.bytes().len());
            *len = len.saturating_sub(before) + entry.bytes().len();
        }
    }
}

const fn is_applied(kind: EntryKind) -> bool {
    matches!(
        kind,
        EntryKind::RECORD
            | EntryKind::OBSERVATIONS
            | EntryKind::ENROLMENT
            | EntryKind::INVITE
            | EntryKind::ISSUER
    )
}
