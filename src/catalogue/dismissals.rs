//! What the root took back: issuers, and with them members that they had let in.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Enrolment, Issuer, MemberId};

/// The issuers that the root took back, and what became of those that they had let in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dismissals {
    /// Whom the root kept of those that each let in, by the hash of the issuing key.
    kept: BTreeMap<MemberId, BTreeSet<MemberId>>,
    /// Keys that nobody is to believe, whoever vouches for them.
    dropped: BTreeSet<MemberId>,
}

impl Dismissals {
    /// What the root says of all `issuers`.
    pub fn of<'a>(issuers: impl IntoIterator<Item = &'a Issuer>) -> Self {
        let mut all = Self::default();
        for issuer in issuers.into_iter().filter(|issuer| !issuer.is_active) {
            all.kept.insert(issuer.key.member_id(), issuer.kept.iter().copied().collect());
            all.dropped.extend(&issuer.dropped);
        }
        all
    }

    /// Whether no issuer was taken back.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The hashes of the keys of issuers that were taken back.
    pub fn issuers(&self) -> impl Iterator<Item = &MemberId> {
        self.kept.keys()
    }

    /// Whether the root took back the issuing key with this hash.
    pub fn is_dismissed(&self, issuer: &MemberId) -> bool {
        self.kept.contains_key(issuer)
    }

    /// Whether nobody is to believe this key, whoever vouches for it.
    pub fn is_dropped(&self, member: &MemberId) -> bool {
        self.dropped.contains(member)
    }

    /// Whether `issuer` was not taken back, or the root kept `member` of those that it let in.
    pub fn stays(&self, issuer: &MemberId, member: &MemberId) -> bool {
        self.kept.get(issuer).is_none_or(|kept| kept.contains(member))
    }
}

/// The issuer that let a member in, by the word of `signer`. It is believed about another one than
/// itself where the own word of that one is among `about`, all that is known of the member: else a
/// stolen issuer would put those that it lets in down to an honest one.
pub fn let_in_by(signer: MemberId, said: &Enrolment, about: &[(MemberId, Enrolment)]) -> MemberId {
    let named = said.let_in_by.unwrap_or(signer);
    let says_so = |(issuer, own): &(MemberId, Enrolment)| {
        *issuer == named && own.let_in_by.unwrap_or(named) == named
    };
    if named == signer || about.iter().any(says_so) { named } else { signer }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PublicKey;

    #[test]
    fn an_issuers_word_about_another_one_counts_only_beside_that_ones_own() {
        let id = |number| MemberId::from_bytes([number; 16]);
        let said = |let_in_by: Option<u8>| Enrolment {
            key: PublicKey([7; 32]),
            name: "a".parse().unwrap(),
            serial: 1,
            services: None,
            issued_at: 1,
            invite: None,
            replaces: Vec::new(),
            let_in_by: let_in_by.map(id),
        };
        let (honest, thief, third) = (1, 2, 3);
        for (what, signer, named, about, expected) in [
            ("its own member", thief, None, vec![], thief),
            ("another's, which says so, too", thief, Some(honest), vec![(honest, None)], honest),
            ("another's, which says nothing", thief, Some(honest), vec![], thief),
            (
                "another's, which took it over",
                third,
                Some(honest),
                vec![(honest, Some(thief))],
                third,
            ),
            ("another's, renewed", third, Some(thief), vec![(thief, None)], thief),
        ] {
            let about: Vec<_> =
                about.into_iter().map(|(by, named)| (id(by), said(named))).collect();
            assert_eq!(let_in_by(id(signer), &said(named), &about), id(expected), "{what}");
        }
    }
}
