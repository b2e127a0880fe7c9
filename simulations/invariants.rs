//! What must hold after every step, whatever the network does.

use std::collections::HashMap;

use murmesh::catalogue::Verify;
use murmesh::mesh::{Channel, DATAGRAM_LEN_MAX, MESSAGE_LEN_MAX, Mesh};
use murmesh::model::{Entry, EntryKey, EntryVersion, MeshId};

use crate::world::SharedVerifier;

/// Checked as things happen; a breach ends the run.
pub(crate) struct Invariants {
    mesh: MeshId,
    /// By node. Looked up only, never iterated.
    versions: HashMap<usize, HashMap<EntryKey, EntryVersion>>,
    pub(crate) entries: u64,
    pub(crate) datagrams: u64,
    pub(crate) messages: u64,
}

impl Invariants {
    pub(crate) fn new(mesh: MeshId) -> Self {
        Self { mesh, versions: HashMap::new(), entries: 0, datagrams: 0, messages: 0 }
    }

    /// A restarted node begins with what its disk holds.
    pub(crate) fn forget(&mut self, node: usize) {
        self.versions.remove(&node);
    }

    pub(crate) fn handle_entry(
        &mut self,
        node: usize,
        entry: &Entry,
        verifier: &mut SharedVerifier,
    ) {
        self.entries += 1;
        assert!(verifier.verify(&self.mesh, entry), "(b) {entry:?} is not signed by its owner");
        let before = self.versions.entry(node).or_default().insert(entry.key(), entry.version());
        let is_forward = before.is_none_or(|before| before < entry.version());
        assert!(is_forward, "(c) node {node} went back from {before:?} to {entry:?}");
    }

    /// After every step of `node`.
    pub(crate) fn handle_step(&self, node: usize, mesh: &Mesh) {
        for store in mesh.store_sizes() {
            assert!(store.len <= store.len_max, "(f) node {node} holds too much: {store:?}");
        }
    }

    pub(crate) fn handle_transmit(&mut self, channel: Channel, len: usize) {
        let (count, len_max) = match channel {
            Channel::Datagram => (&mut self.datagrams, DATAGRAM_LEN_MAX),
            Channel::Message => (&mut self.messages, MESSAGE_LEN_MAX),
        };
        *count += 1;
        assert!(len <= len_max, "(f) {channel:?} of {len} bytes is over {len_max}");
    }
}
