//! Repair of the member list: what two members hold of all others, compared and levelled.
//!
//! Rumours are passed on a dozen times and then forgotten, so that now and then somebody misses one.
//! Members therefore compare digests of their lists; only which run of a member is there or down
//! counts, not suspicion, which comes and goes.

use super::{Belief, Digest, Identity, MemberId, MemberUpdate, Membership, Moment, Standing};
use crate::model::ItemHash;

impl Membership {
    /// The summary of the member list, this member included.
    pub fn digest(&mut self) -> &Digest {
        let digest = self.digest.take().unwrap_or_else(|| self.sum_up());
        self.digest.insert(digest)
    }

    /// What this node holds of the members in some buckets of [`Membership::digest`].
    pub fn states_in(&self, buckets: &[u8]) -> Vec<MemberUpdate> {
        self.states().filter(|update| buckets.contains(&bucket_of(update.identity.id))).collect()
    }

    /// Takes what `from` holds of some members.
    ///
    /// Of two runs of a member the later is taken. A run that is down there and alive here is not
    /// believed dead at once: the member is told and can renew.
    pub fn handle_states(
        &mut self,
        now: Moment,
        from: MemberId,
        states: &[MemberUpdate],
        standing: &dyn Fn(&Identity) -> Standing,
    ) {
        let is_newcomer = self.foca.num_members() <= 1;
        let (disputed, clear): (Vec<_>, Vec<_>) = self
            .believable(now, from, states, standing)
            .into_iter()
            .partition(|update| self.is_disputed(update));
        for update in disputed {
            self.put_to_accused(now, from, update.identity);
        }
        // A newcomer's news are old to everybody else.
        self.apply(now, clear.into_iter().map(Into::into), !is_newcomer);
    }

    fn sum_up(&self) -> Digest {
        let mut digest = Digest::default();
        for update in self.states() {
            let identity = update.identity;
            let is_down = [u8::from(update.belief == Belief::Down)];
            let epoch = identity.epoch.0.to_be_bytes();
            let item = [&identity.id.as_bytes()[..], &epoch, &is_down].concat();
            digest.add(bucket_of(identity.id), ItemHash::of(&item));
        }
        digest
    }

    /// Whether somebody is said to be dead whom this node holds alive.
    pub(super) fn is_disputed(&self, update: &MemberUpdate) -> bool {
        let seen = self.seen.get(&update.identity.id);
        update.belief == Belief::Down && seen.is_some_and(|seen| seen.belief != Belief::Down)
    }

    fn states(&self) -> impl Iterator<Item = MemberUpdate> {
        let own = MemberUpdate {
            identity: self.identity(),
            incarnation: self.incarnation,
            belief: Belief::Alive,
        };
        self.seen
            .values()
            .copied()
            .filter(move |seen| seen.identity.id != own.identity.id)
            .chain([own])
    }
}

fn bucket_of(member: MemberId) -> u8 {
    let [first, ..] = *member.as_bytes();
    Digest::bucket_of(first)
}
