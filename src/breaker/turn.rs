//! Whose turn it is to probe an ejected instance: rendezvous hashing, so that all who know the same
//! callers agree without a word, and each relapse makes another order.

use super::InstanceKey;
use crate::model::MemberId;

/// How many of `callers` come before `own`; `None` when it is none of them.
pub(super) fn place(
    own: MemberId,
    key: &InstanceKey,
    round: u32,
    callers: &[MemberId],
) -> Option<u32> {
    let rank = |caller: &MemberId| (score(caller, key, round), *caller);
    let mine = rank(&own);
    let before = callers.iter().filter(|caller| rank(caller) > mine).count();
    callers.contains(&own).then_some(u32::try_from(before).unwrap_or(u32::MAX))
}

fn score(caller: &MemberId, key: &InstanceKey, round: u32) -> u64 {
    let bytes = caller.as_bytes().iter().chain(key.member.as_bytes());
    let bytes = bytes.chain(key.instance.as_str().as_bytes());
    bytes.fold(mix(u64::from(round)), |hash, byte| mix(hash ^ u64::from(*byte)))
}

/// The finaliser of SplitMix64: every bit of the result depends on every bit of the input.
pub(super) const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
