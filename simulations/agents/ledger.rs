//! What became of every byte of every call.

use std::collections::BTreeMap;

/// A call: `len` bytes there and the same bytes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) number: u64,
    pub(crate) len: u64,
}

impl Call {
    /// The call as its first bytes say it.
    pub(crate) const HEAD_LEN: usize = 16;

    pub(crate) fn head(self) -> [u8; Self::HEAD_LEN] {
        let mut head = [0; Self::HEAD_LEN];
        head[..8].copy_from_slice(&self.number.to_be_bytes());
        head[8..].copy_from_slice(&self.len.to_be_bytes());
        head
    }

    pub(crate) fn from_head(head: [u8; Self::HEAD_LEN]) -> Self {
        let (number, len) = head.split_at(8);
        let number_of =
            |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
        Self { number: number_of(number), len: number_of(len) }
    }

    /// The byte at `at`: another one at every place and in every call.
    fn byte(self, at: u64) -> u8 {
        let mixed = (self.number << 40 ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as u8
    }

    /// The bytes from `at` on, at most as many as `buffer` holds.
    pub(crate) fn fill(self, at: u64, buffer: &mut [u8]) -> usize {
        let count = buffer.len().min((self.len - at) as usize);
        buffer[..count].iter_mut().zip(at..).for_each(|(byte, at)| *byte = self.byte(at));
        count
    }

    /// Fails unless `bytes` stand at `at`.
    fn check(self, at: u64, bytes: &[u8], side: &str) {
        assert!(at + bytes.len() as u64 <= self.len, "(e) {self:?}: more bytes at the {side}");
        let is_right = bytes.iter().zip(at..).all(|(byte, at)| *byte == self.byte(at));
        assert!(is_right, "(e) {self:?}: other bytes at the {side} behind {at}");
    }
}

/// What is known of a call.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fate {
    /// Bytes that each instance has read, by its node, in the order of the connections.
    pub(crate) delivered: Vec<(usize, u64)>,
    /// Bytes that came back.
    pub(crate) returned: u64,
    /// `Some(true)` when all bytes came back, and then an end.
    pub(crate) is_complete: Option<bool>,
}

/// All calls of a run.
#[derive(Default)]
pub(crate) struct Ledger {
    fates: BTreeMap<u64, Fate>,
}

impl Ledger {
    pub(crate) fn begin(&mut self, len: u64) -> Call {
        let number = self.fates.len() as u64;
        self.fates.insert(number, Fate::default());
        Call { number, len }
    }

    /// An instance at `node` has read the head of a call. Returns where to count.
    pub(crate) fn arrive(&mut self, call: Call, node: usize) -> usize {
        let delivered = &mut self.fate(call).delivered;
        delivered.push((node, 0));
        assert!(delivered.len() == 1, "(e) {call:?} reached an application twice: {delivered:?}");
        delivered.len() - 1
    }

    pub(crate) fn deliver(&mut self, call: Call, place: usize, bytes: &[u8]) {
        let read = &mut self.fate(call).delivered[place].1;
        call.check(*read, bytes, "instance");
        *read += bytes.len() as u64;
    }

    pub(crate) fn give_back(&mut self, call: Call, bytes: &[u8]) {
        let returned = &mut self.fate(call).returned;
        call.check(*returned, bytes, "caller");
        *returned += bytes.len() as u64;
    }

    pub(crate) fn end(&mut self, call: Call) {
        let fate = self.fate(call);
        fate.is_complete = Some(fate.returned == call.len);
    }

    /// Calls of which bytes have come back, and not yet all.
    pub(crate) fn under_way(&self) -> usize {
        let is_under_way = |fate: &&Fate| fate.is_complete.is_none() && fate.returned > 0;
        self.fates.values().filter(is_under_way).count()
    }

    /// Calls that have reached the application of a node.
    pub(crate) fn delivered_at(&self, node: usize) -> usize {
        let there = |fate: &&Fate| fate.delivered.iter().any(|(at, _)| *at == node);
        self.fates.values().filter(there).count()
    }

    /// How many calls ended well, and how many were cut.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let count = |wanted| self.fates.values().filter(|f| f.is_complete == Some(wanted)).count();
        (count(true), count(false))
    }

    fn fate(&mut self, call: Call) -> &mut Fate {
        self.fates.get_mut(&call.number).expect("a number that no caller gave: bytes are damaged")
    }
}
