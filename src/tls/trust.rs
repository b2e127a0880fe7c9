//! Who is believed: one object for each agent, asked at every handshake, and by every open connection
//! for as long as it lasts.
//!
//! Whoever stole an issuing key can still sign leaves with it. After the root took the issuer back
//! such a leaf proves somebody only if the root's word keeps that member, or an active issuer vouches
//! for the same key. The same holds for whom that issuer let in and another has renewed since. Whom the
//! root's word drops is nobody, whoever vouches.
//!
//! A member that another one has replaced is nobody any more: its machine lost that key.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::credentials::Peer;
use super::grace::Grace;
use crate::catalogue::{Catalogue, Dismissals};
use crate::mesh::Snapshot;
use crate::model::MemberId;

/// Whose leaves prove nobody any more: those of dismissed issuers and of members that one of these let
/// in, unless somebody else stands for them, and those of members that were dropped or replaced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dismissed {
    by_root: Dismissals,
    /// For whom an active issuer vouches. Empty as long as no issuer was dismissed.
    vouched: BTreeSet<MemberId>,
    /// Members that others have replaced.
    replaced: BTreeSet<MemberId>,
}

impl Dismissed {
    /// Of all that the root took back, of those for whom an active issuer vouches, and of those that
    /// others have replaced. Free in a mesh that never dismissed an issuer.
    pub fn new(
        by_root: Dismissals,
        vouched: impl IntoIterator<Item = MemberId>,
        replaced: BTreeSet<MemberId>,
    ) -> Self {
        let vouched = match by_root.is_empty() {
            true => BTreeSet::new(),
            false => vouched.into_iter().collect(),
        };
        Self { by_root, vouched, replaced }
    }

    /// What the root took back.
    pub fn by_root(&self) -> &Dismissals {
        &self.by_root
    }

    /// Whether another one has replaced `member`.
    pub fn is_replaced(&self, member: &MemberId) -> bool {
        self.replaced.contains(member)
    }

    /// Whether a leaf that `issuer` signed still proves `member`, which `let_in_by` let in: the hashes of
    /// two issuing keys.
    pub fn admits(&self, issuer: &MemberId, let_in_by: &MemberId, member: &MemberId) -> bool {
        let stays = |by: &MemberId| self.by_root.stays(by, member);
        let is_vouched = (stays(issuer) && stays(let_in_by)) || self.vouched.contains(member);
        is_vouched && !self.by_root.is_dropped(member) && !self.is_replaced(member)
    }
}

impl From<&Snapshot> for Dismissed {
    fn from(snapshot: &Snapshot) -> Self {
        let issuers = snapshot.issuers.values().map(|appointed| appointed.issuer.as_ref());
        let vouched = snapshot.enrolments.keys().copied();
        Self::new(Dismissals::of(issuers), vouched, snapshot.replaced.clone())
    }
}

impl From<&Catalogue> for Dismissed {
    fn from(catalogue: &Catalogue) -> Self {
        let all = || catalogue.enrolled_members();
        let vouched = all().filter(|member| catalogue.enrolment(*member).is_some());
        let replaced = all().filter(|member| catalogue.is_replaced(*member)).collect();
        Self::new(catalogue.dismissals().clone(), vouched, replaced)
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
        is_admitted(&self.dismissed.borrow(), peer)
    }

    /// Returns once `peer` is believed no more. Cancel safe.
    pub async fn lost(&self, peer: &Peer) {
        // The sender lives in self: the channel cannot be closed while we wait.
        let is_lost = |known: &Arc<Dismissed>| !is_admitted(known, peer);
        let _ = self.dismissed.subscribe().wait_for(is_lost).await;
    }
}

fn is_admitted(known: &Dismissed, peer: &Peer) -> bool {
    known.admits(&peer.enrolment.signer().member_id(), &peer.let_in_by, &peer.id)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::model::{Issuer, Signer};
    use crate::tls::SecretKey;
    use crate::tls::testing::mesh_of;

    #[test]
    fn a_member_is_lost_with_whoever_let_it_in_unless_the_root_kept_it_or_another_did() {
        let [member] = &mesh_of(&["member"]).unwrap()[..] else { panic!("one member") };
        let (id, entry) = (member.member_id(), member.enrolment().clone());
        let (signer, first) = (entry.signer(), SecretKey::generate().unwrap().public_key());
        let let_in_by = first.member_id();
        let peer = Peer { id, name: member.name().clone(), enrolment: entry, let_in_by };
        let trust = Trust::new(Duration::from_secs(60));
        let [none, it] = [vec![], vec![id]];
        for (what, gone, kept, dropped, vouched, is_admitted) in [
            ("both active", vec![], &none, &none, &none, true),
            ("its issuer is gone", vec![signer], &none, &none, &none, false),
            ("and kept it", vec![signer], &it, &none, &none, true),
            ("another vouches", vec![signer], &none, &none, &it, true),
            ("who let it in is gone", vec![first], &none, &none, &none, false),
            ("and kept it, too", vec![first], &it, &none, &none, true),
            ("and another let it in, too", vec![first], &none, &none, &it, true),
            ("dropped, whoever vouches", vec![first], &none, &it, &it, false),
        ] {
            let issuers = gone.into_iter().map(|key| Issuer {
                key,
                member: id,
                certificate: Vec::new(),
                is_active: false,
                kept: kept.clone(),
                dropped: dropped.clone(),
            });
            let issuers: Vec<_> = issuers.collect();
            let by_root = Dismissals::of(&issuers);
            trust.set_dismissed(Dismissed::new(by_root, vouched.clone(), BTreeSet::new()));
            assert_eq!(trust.admits(&peer), is_admitted, "{what}");
            assert_eq!(trust.lost(&peer).now_or_never().is_some(), !is_admitted, "{what}");
        }
    }
}
