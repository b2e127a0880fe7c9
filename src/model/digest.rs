//! Summaries of a set, by which two members find out cheaply in what their sets differ.
//!
//! Items fall into 64 buckets by their key. A bucket is summarised by the wrapping sum of its items'
//! hashes: order does not matter and one item comes and goes in constant time. Two members compare
//! roots (8 bytes), then buckets (about 600 bytes), then the keys in buckets that differ. The sums
//! find accidents; they are no proof against an adversary, who could only hide items that nobody
//! but it has seen.

use super::EntryHash;

/// Number of buckets. 64 keep a comparison within one datagram's size.
pub const BUCKETS: usize = 64;

/// The hash of one item, key and version together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ItemHash(u64);

impl ItemHash {
    /// The hash of an item's encoding.
    pub fn of(bytes: &[u8]) -> Self {
        let [a, b, c, d, e, f, g, h, ..] = EntryHash::of(bytes).0;
        Self(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }
}

/// The summary of one set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest([u64; BUCKETS]);

impl Default for Digest {
    fn default() -> Self {
        Self([0; BUCKETS])
    }
}

impl Digest {
    /// The bucket of an item whose key starts with `byte`.
    pub const fn bucket_of(byte: u8) -> u8 {
        byte % BUCKETS as u8
    }

    /// Adds an item to a bucket.
    pub fn add(&mut self, bucket: u8, item: ItemHash) {
        if let Some(sum) = self.0.get_mut(usize::from(bucket)) {
            *sum = sum.wrapping_add(item.0);
        }
    }

    /// Takes an item that was added out of its bucket.
    pub fn remove(&mut self, bucket: u8, item: ItemHash) {
        if let Some(sum) = self.0.get_mut(usize::from(bucket)) {
            *sum = sum.wrapping_sub(item.0);
        }
    }

    /// One number for the whole set.
    pub fn root(&self) -> u64 {
        self.0
            .iter()
            .fold(0, |root: u64, sum| root.rotate_left(5) ^ sum.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// The sums, as they travel.
    pub fn sums(&self) -> &[u64] {
        &self.0
    }

    /// The buckets in which another member's sums differ; all when it has another number of them.
    pub fn differing(&self, theirs: &[u64]) -> Vec<u8> {
        let all = 0..BUCKETS as u8;
        if theirs.len() != BUCKETS {
            return all.collect();
        }
        all.zip(self.0.iter().zip(theirs)).filter(|(_, (a, b))| a != b).map(|(i, _)| i).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_with_the_same_items_have_the_same_digest_in_any_order() {
        let (a, b) = (ItemHash::of(b"a"), ItemHash::of(b"b"));
        let (mut one, mut other) = (Digest::default(), Digest::default());
        one.add(1, a);
        one.add(1, b);
        other.add(1, b);
        other.add(2, b);
        other.add(1, a);
        assert_eq!(one.differing(other.sums()), [2]);
        assert_ne!(one.root(), other.root());
        other.remove(2, b);
        assert_eq!(one, other);
        assert_eq!(one.root(), other.root());
    }

    #[test]
    fn digest_of_another_shape_differs_everywhere() {
        assert_eq!(Digest::default().differing(&[0; 3]).len(), BUCKETS);
    }
}
