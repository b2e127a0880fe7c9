//! Leaves of issuers that the root took back.
//!
//! Whoever stole an issuing key can still sign leaves with it. After the dismissal such a leaf proves
//! somebody only if an active issuer vouches for the same key: the honest members were taken over by
//! another issuer before, and renew there.

use std::collections::BTreeSet;
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::model::{Enrolment, MemberId, PublicKey};

/// Whose leaves hold although their issuer was dismissed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dismissed {
    /// The keys of dismissed issuers.
    pub issuers: BTreeSet<PublicKey>,
    /// For whom an active issuer vouches.
    pub kept: BTreeSet<MemberId>,
}

/// What is known of [`Dismissed`] now. One for each agent, shared by all its verifiers.
#[derive(Clone, Debug, Default)]
pub struct Dismissals {
    known: Arc<ArcSwap<Dismissed>>,
}

impl Dismissals {
    /// Replaces what was known.
    pub fn set(&self, dismissed: Dismissed) {
        if **self.known.load() != dismissed {
            self.known.store(Arc::new(dismissed));
        }
    }

    /// Whether a leaf that `issuer` signed still proves the member of `enrolment`.
    pub(super) fn admit(&self, issuer: &PublicKey, enrolment: &Enrolment) -> bool {
        let known = self.known.load();
        !known.issuers.contains(issuer) || known.kept.contains(&enrolment.key.member_id())
    }
}
