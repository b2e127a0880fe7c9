//! Who is believed: one object for each agent, asked at every handshake, and by every open connection
//! for as long as it lasts.
//!
//! Whoever stole an issuing key can still sign leaves with it. After the root took the issuer back
//! such a leaf proves somebody only if the root's word keeps that member, or an active issuer vouches
//! for the same key.
//!
//! A member that another one has replaced is nobody any more: its machine lost that key.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::credentials::Peer;
use super::grace::Grace;
use crate::catalogue::Catalogue;
use crate::mesh::Snapshot;
use crate::model::{Issuer, MemberId, PublicKey};

/// Whose leaves prove nobody any more: those of dismissed issuers, unless somebody else stands for
/// their members, and those of members that were replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dismissed {
    /// The keys of dismissed issuers, and whom the root kept of those that each let in.
    issuers: BTreeMap<PublicKey, BTreeSet<MemberId>>,
    /// For whom an active issuer vouches. Empty as long as no issuer was dismissed.
    vouched: BTreeSet<MemberId>,
    /// Members that others have replaced.
    replaced: BTreeSet<MemberId>,
}

impl Dismissed {
    /// Of all `issuers`, those for whom an active one vouches, and those that others have replaced.
    /// Free in a mesh that never dismissed an issuer.
    pub fn new<'a>(
        issuers: impl IntoIterator<Item = &'a Arc<Issuer>>,
        vouched: impl IntoIterator<Item = MemberId>,
        replaced: BTreeSet<MemberId>,
    ) -> Self {
        let gone = issuers.into_iter().filter(|issuer| !issuer.is_active);
        let kept = |issuer: &Arc<Issuer>| (issuer.key, issuer.kept.iter().copied().collect());
        let issuers: BTreeMap<_, _> = gone.map(kept).collect();
        match issuers.is_empty() {
            true => Self { replaced, ..Self::default() },
            false => Self { issuers, vouched: vouched.into_iter().collect(), replaced },
        }
    }

    /// The keys of dismissed issuers.
    pub fn issuers(&self) -> impl Iterator<Item = &PublicKey> {
        self.issuers.keys()
    }

    /// Whether another one has replaced `member`.
    pub fn is_replaced(&self, member: &MemberId) -> bool {
        self.replaced.contains(member)
    }

    /// Whether a leaf that `issuer` signed still proves `member`.
    pub fn admits(&self, issuer: &PublicKey, member: &MemberId) -> bool {
        let is_kept = self
            .issuers
            .get(issuer)
            .is_none_or(|kept| kept.contains(member) || self.vouched.contains(member));
        is_kept && !self.is_replaced(member)
    }
}

impl From<&Snapshot> for Dismissed {
    fn from(snapshot: &Snapshot) -> Self {
        let issuers = snapshot.issuers.values().map(|appointed| &appointed.issuer);
        Self::new(issuers, snapshot.enrolments.keys().copied(), snapshot.replaced.clone())
    }
}

impl From<&Catalogue> for Dismissed {
    fn from(catalogue: &Catalogue) -> Self {
        let issuers = catalogue.issuers().map(|(_, issuer)| issuer);
        let all = || catalogue.enrolled_members();
        let vouched = all().filter(|member| catalogue.enrolment(*member).is_some());
        let replaced = all().filter(|member| catalogue.is_replaced(*member)).collect();
        Self::new(issuers, vouched, replaced)
    }
}

/// Who is believed now. Cheap to clone; every clone is the same.
#[derive(Clone, Debug)]
pub struct Trust {
    grace: Arc<Grace>,
    dismissed: watch::Sender<Arc<Dismissed>>,
}

impl Trust {
    /// In a mesh whose leaves live for `life`: nobody is dismissed, and the grace is closed.
    pub(super) fn new(life: Duration) -> Self {
        Self { grace: Arc::new(Grace::new(life)), dismissed: watch::Sender::default() }
    }

    /// Whether ended leaves are accepted.
    pub fn grace(&self) -> &Grace {
        &self.grace
    }

    /// Who was dismissed, as last told.
    pub fn dismissed(&self) -> Arc<Dismissed> {
        Arc::clone(&self.dismissed.borrow())
    }

    /// Replaces what was known.
    pub fn set_dismissed(&self, dismissed: Dismissed) {
        self.dismissed.send_if_modified(|known| {
            let has_changed = **known != dismissed;
            if has_changed {
                *known = Arc::new(dismissed);
            }
            has_changed
        });
    }

    /// Whether what `peer` proved when it connected holds now. That its leaf has ended since is no
    /// matter: expiry gates handshakes.
    pub fn admits(&self, peer: &Peer) -> bool {
        self.dismissed.borrow().admits(&peer.enrolment.signer(), &peer.id)
    }

    /// Returns once `peer` is believed no more. Cancel safe.
    pub async fn lost(&self, peer: &Peer) {
        let (issuer, member) = (peer.enrolment.signer(), peer.id);
        // The sender lives in self: the channel cannot be closed while we wait.
        let is_lost = |known: &Arc<Dismissed>| !known.admits(&issuer, &member);
        let _ = self.dismissed.subscribe().wait_for(is_lost).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::tls::testing::mesh_of;

    #[test]
    fn a_dismissed_issuers_member_is_lost_unless_the_root_kept_it_or_another_vouches_for_it() {
        let [member] = &mesh_of(&["member"]).unwrap()[..] else { panic!("one member") };
        let (id, entry) = (member.member_id(), member.enrolment().clone());
        let peer = Peer { id, name: member.name().clone(), enrolment: entry };
        let trust = Trust::new(Duration::from_secs(60));
        let issuer = |is_active, kept| {
            let key = peer.enrolment.signer();
            Arc::new(Issuer { key, member: id, certificate: Vec::new(), is_active, kept })
        };
        for (issuer, vouched, is_admitted) in [
            (issuer(true, vec![]), vec![], true),
            (issuer(false, vec![]), vec![], false),
            (issuer(false, vec![id]), vec![], true),
            (issuer(false, vec![]), vec![id], true),
        ] {
            trust.set_dismissed(Dismissed::new([&issuer], vouched, BTreeSet::new()));
            assert_eq!(trust.admits(&peer), is_admitted, "{issuer:?}");
            assert_eq!(trust.lost(&peer).now_or_never().is_some(), !is_admitted, "{issuer:?}");
        }
    }
}
