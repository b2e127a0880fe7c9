//! What became of every byte of every call.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::node::Shared;

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
struct Fate {
    caller: usize,
    /// The node of the instance that it has reached, and the bytes that this has read.
    delivered: Option<(usize, u64)>,
    is_served: bool,
    /// Whether that instance died before it had read the end.
    is_orphaned: bool,
    /// Bytes that came back.
    returned: u64,
    end: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// All bytes came back, and then an end.
    Well,
    /// It was cut, and its caller was told.
    Cut,
    /// Its caller's machine died.
    Abandoned,
}

/// All calls of a run.
#[derive(Default)]
pub(crate) struct Ledger {
    fates: BTreeMap<u64, Fate>,
}

impl Ledger {
    /// A call from the node `caller`.
    pub(crate) fn begin(&mut self, caller: usize, len: u64) -> Call {
        let number = self.fates.len() as u64;
        self.fates.insert(number, Fate { caller, ..Fate::default() });
        Call { number, len }
    }

    pub(crate) fn give_back(&mut self, call: Call, bytes: &[u8]) {
        let returned = &mut self.fate(call).returned;
        call.check(*returned, bytes, "caller");
        *returned += bytes.len() as u64;
    }

    /// The caller has read an end (`is_clean`), or that it was cut.
    pub(crate) fn end(&mut self, call: Call, is_clean: bool) {
        let fate = self.fate(call);
        let is_whole = fate.returned == call.len;
        assert!(
            is_whole || !is_clean || fate.is_orphaned,
            "(e) {call:?}: a cut stream looks complete at the caller: {fate:?}"
        );
        fate.end = Some(if is_whole && is_clean { End::Well } else { End::Cut });
    }

    /// The machine of `caller` has died.
    pub(crate) fn abandon(&mut self, caller: usize) {
        let open = self.fates.values_mut().filter(|f| f.caller == caller && f.end.is_none());
        open.for_each(|fate| fate.end = Some(End::Abandoned));
    }

    /// Calls without an end.
    pub(crate) fn open(&self) -> usize {
        self.fates.values().filter(|fate| fate.end.is_none()).count()
    }

    /// Calls of which bytes have come back, and not yet all.
    pub(crate) fn under_way(&self) -> usize {
        self.fates.values().filter(|fate| fate.end.is_none() && fate.returned > 0).count()
    }

    /// Calls that instances have not let go, whether their callers live or not.
    pub(crate) fn being_served(&self) -> usize {
        self.fates.values().filter(|fate| fate.is_served).count()
    }

    /// Calls that have reached the application of a node.
    pub(crate) fn delivered_at(&self, node: usize) -> usize {
        let there = |fate: &&Fate| fate.delivered.is_some_and(|(at, _)| at == node);
        self.fates.values().filter(there).count()
    }

    /// How many calls ended well, and how many were cut.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let count = |end| self.fates.values().filter(|fate| fate.end == Some(end)).count();
        (count(End::Well), count(End::Cut))
    }

    fn fate(&mut self, call: Call) -> &mut Fate {
        self.fates.get_mut(&call.number).expect("a number that no caller gave: bytes are damaged")
    }
}

/// A call that an instance serves, until it is dropped.
pub(super) struct Arrival {
    call: Call,
    shared: Rc<Shared>,
    has_ended: Cell<bool>,
}

impl Arrival {
    /// An instance at `node` has read the head of `call`.
    pub(super) fn new(call: Call, node: usize, shared: Rc<Shared>) -> Self {
        let mut ledger = shared.ledger.borrow_mut();
        let fate = ledger.fate(call);
        fate.is_served = true;
        let before = fate.delivered.replace((node, 0));
        drop(ledger);
        assert_eq!(before, None, "(e) {call:?} reached an application twice, now that of {node}");
        Self { call, shared, has_ended: Cell::new(false) }
    }

    /// It has read `bytes`.
    pub(super) fn deliver(&self, bytes: &[u8]) {
        let mut ledger = self.shared.ledger.borrow_mut();
        if let Some((_, read)) = &mut ledger.fate(self.call).delivered {
            self.call.check(*read, bytes, "instance");
            *read += bytes.len() as u64;
        }
    }

    /// It has read an end, which no caller says before it has said all.
    pub(super) fn end(&self) {
        let delivered = self.shared.ledger.borrow_mut().fate(self.call).delivered;
        let read = delivered.map(|(_, read)| read);
        let call = self.call;
        assert_eq!(
            read,
            Some(call.len),
            "(e) {call:?}: a cut stream looks complete at the instance"
        );
        self.has_ended.set(true);
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let mut ledger = self.shared.ledger.borrow_mut();
        let fate = ledger.fate(self.call);
        (fate.is_served, fate.is_orphaned) = (false, !self.has_ended.get());
    }
}
