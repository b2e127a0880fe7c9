//! Which of the keys that one machine has had is it now.

use std::collections::BTreeSet;

use crate::model::MemberId;

/// What is said of one of those that are enrolled under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) member: MemberId,
    /// Of its newest enrolment, in seconds since 1970.
    pub(super) issued_at: u64,
    /// Whose name it has taken over.
    pub(super) replaces: BTreeSet<MemberId>,
}

impl Claim {
    /// Whether this member has taken the place of `former`. That it says so is enough, whenever either
    /// was enrolled: the two may have other issuers, whose clocks differ. Where both say so, the old key
    /// was let in again: the later enrolment is right, and of two at once that with the larger id.
    pub(super) fn supersedes(&self, former: &Self) -> bool {
        let order = |claim: &Self| (claim.issued_at, claim.member);
        let is_mutual = former.replaces.contains(&self.member);
        self.member != former.member
            && self.replaces.contains(&former.member)
            && (!is_mutual || order(self) > order(former))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_superseded_by_whoever_says_so_and_in_a_cycle_by_the_later() {
        let id = |member| MemberId::from_bytes([member; 16]);
        let claim = |member, issued_at, replaces: &[u8]| Claim {
            member: id(member),
            issued_at,
            replaces: replaces.iter().map(|member| id(*member)).collect(),
        };
        for (what, former, later, is_superseded) in [
            ("strangers", claim(1, 5, &[]), claim(2, 6, &[]), false),
            ("a replacement", claim(1, 5, &[]), claim(2, 6, &[1]), true),
            ("by an issuer whose clock is behind", claim(1, 5, &[]), claim(2, 4, &[1]), true),
            ("of a key that was renewed since", claim(1, 9, &[]), claim(2, 6, &[1]), true),
            ("of another one", claim(1, 5, &[]), claim(2, 6, &[3]), false),
            ("whose former key says nothing of it", claim(2, 6, &[1]), claim(1, 9, &[]), false),
            ("a key that came back", claim(2, 6, &[1]), claim(1, 7, &[2]), true),
            ("and what it came back from", claim(1, 7, &[2]), claim(2, 6, &[1]), false),
            ("both in one second", claim(1, 6, &[2]), claim(2, 6, &[1]), true),
            ("both in one second, seen from there", claim(2, 6, &[1]), claim(1, 6, &[2]), false),
            ("a key and itself", claim(1, 5, &[1]), claim(1, 6, &[1]), false),
        ] {
            assert_eq!(later.supersedes(&former), is_superseded, "{what}");
        }
    }
}
