//! Who is in the mesh: SWIM (Das 2002) by `foca` 2, and the driver that cures its weaknesses.
//!
//! foca alone, simulated with 64 to 1024 members, has ten. What this module does about each:
//!
//! | weakness of foca alone | cure here |
//! |---|---|
//! | a newcomer learns the members one by one (1024: minutes) | states are exchanged whole at join, and repaired ([`Membership::handle_states`]) |
//! | its conviction timer also strikes members that refuted | this module convicts itself, after looking again |
//! | only who suspects a member first judges it, and may be gone before | nobody stays a suspect: others take over |
//! | at 25 % loss healthy members are convicted | an unanswered ping is repeated over a stream |
//! | deaf and slow observers convict healthy members | `local_health` |
//! | rumours have little capacity and no guarantee | they are hints; digests repair lists and entries |
//! | parted halves meet again after minutes | `contacts`: everybody away is dialled for ever |
//! | a refutation is told to some and then forgotten | who knows it answers an old suspicion; whoever was heard last is asked |
//! | anybody can make anybody renew | renewals are counted and limited |
//! | anybody can kill anybody by one word | a death that comes as a surprise is put to the accused first |
//!
//! foca believes any member about any other. Here it sees only what a signed record covers: updates
//! about an unknown run of a member wait until its record is here ([`Standing`]).
//!
//! Invariants, which tests name:
//! - a member that refuted in time is not convicted by this node;
//! - nothing about a run without a record reaches foca;
//! - a member that answers is not believed dead, whatever one other says;
//! - this member takes a higher epoch at most twice in a suspicion time, and never one that is not
//!   durable.

mod accusation;
mod codec;
mod config;
mod contacts;
mod identity;
mod local_health;
mod packets;
mod repair;
mod rumour;
mod suspicion;
mod timers;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use foca::{AccumulatingRuntime, Foca, Member, OwnedNotification};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::model::{Digest, Epoch, MemberId, Moment, StoreSize};

use accusation::Accusations;
use codec::Codec;
use contacts::Contacts;
use local_health::{LocalHealth, PATIENCE};
use packets::Probe;
use rumour::{BACKLOG_MAX, Rumours};
use timers::Timers;

pub use codec::{Belief, MemberUpdate};
pub use config::{MembershipConfig, Profile};
pub use contacts::Contact;
pub use identity::{Identity, Standing};
pub use packets::{Disbelief, PacketFault};
pub use rumour::{RUMOUR_LEN_MAX, read_rumour, rumour};

/// Durable epochs below which more are asked for.
const EPOCHS_LOW: u64 = 512;

/// Shortest time between two rounds of gossip out of turn.
const EAGER_PAUSE: Duration = Duration::from_millis(40);

/// How a packet travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Once, and perhaps in vain.
    Datagram,
    /// Reliably.
    Stream,
}

/// A packet to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// To whom; its address is that of its signed record.
    pub to: Identity,
    /// How.
    pub over: Carrier,
    /// What.
    pub packet: Bytes,
}

/// What happened, or is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MembershipEvent {
    /// A member is there: new, or back from the dead.
    Up {
        /// Which, and which run.
        identity: Identity,
        /// Whether it was held for dead before.
        is_back: bool,
    },
    /// A member that was there came back under a higher epoch.
    Renewed(Identity),
    /// A member failed a probe, here or elsewhere.
    Suspect(MemberId),
    /// A suspect refuted.
    Refuted(MemberId),
    /// A member was convicted; `is_own` when by this node's own probes.
    Down {
        /// Which.
        member: MemberId,
        /// Whether this node convicted it itself.
        is_own: bool,
    },
    /// This member took a higher epoch, because others had convicted it.
    SelfRenewed(Identity),
    /// Durable epochs run out.
    EpochsNeeded,
    /// `from` mentioned a run of a member whose record is not here: ask it for the record.
    RecordWanted {
        /// Whose record.
        member: MemberId,
        /// Who must have it.
        from: MemberId,
    },
    /// A member whose record is not here has sent a packet: ask it for the record.
    Stranger(Identity),
    /// Something that `from` said of another member is not believed.
    Disbelieved {
        /// Who said it.
        from: MemberId,
        /// Why not.
        why: Disbelief,
    },
    /// Others hold a member for dead that this node holds alive: tell it, so that it can renew.
    Accused(Identity),
    /// Nobody has been heard for a while.
    Isolated,
    /// Somebody is heard again.
    Healed,
}

/// This node's view of who is in the mesh.
pub struct Membership {
    config: MembershipConfig,
    foca: Foca<Identity, Codec, StdRng, Rumours>,
    runtime: AccumulatingRuntime<Identity>,
    rng: StdRng,
    /// Of this member, as in its last packet.
    incarnation: u16,
    /// The last epoch that is durable.
    epochs_until: Epoch,
    renewed_at: Option<Moment>,
    /// The run for which there is a [`Timer::Renew`].
    renewal_planned: Option<Identity>,
    timers: Timers<Timer>,
    health: LocalHealth,
    is_isolated: bool,
    /// foca's ping in flight.
    probe: Option<Probe>,
    accusations: Accusations,
    contacts: Contacts,
    /// foca's list as last looked at. Bounded like foca's: by the members with a record.
    seen: BTreeMap<MemberId, MemberUpdate>,
    /// Of `seen`, until it changes.
    digest: Option<Digest>,
    /// Since when the suspects of `seen` are.
    suspected: BTreeMap<MemberId, Moment>,
    /// When each of `seen` was last heard directly.
    heard: BTreeMap<MemberId, Moment>,
    waiting: packets::Waiting,
    gossiped_at: Moment,
    transmissions: u8,
    outgoing: VecDeque<Outgoing>,
    events: VecDeque<MembershipEvent>,
}

#[derive(Debug)]
enum Timer {
    Foca(foca::Timer<Identity>),
    /// Half of a suspect's time has passed.
    Remind {
        identity: Identity,
        incarnation: u16,
    },
    /// A suspect's time has run out.
    Convict {
        identity: Identity,
        incarnation: u16,
        postponed: u32,
    },
    /// A suspect is one for so long that whoever suspected it first may be gone.
    TakeOver {
        identity: Identity,
        incarnation: u16,
    },
    /// This run cannot refute what is said of it, and was to renew as soon as it may.
    Renew(Identity),
    /// An expedited probe or an accusation put to the accused is due for its next step.
    Accusation(MemberId),
}

impl Membership {
    /// A member that knows nobody yet. Epochs up to `epochs_until` are durable.
    pub fn new(
        now: Moment,
        config: MembershipConfig,
        identity: Identity,
        epochs_until: Epoch,
        rng_seed: u64,
    ) -> Self {
        let mut rng = StdRng::seed_from_u64(rng_seed);
        let foca_rng = StdRng::seed_from_u64(rng.random());
        let transmissions = config.transmissions(1);
        let settings = config.to_foca(transmissions);
        Self {
            foca: Foca::with_custom_broadcast(identity, settings, foca_rng, Codec, Rumours),
            runtime: AccumulatingRuntime::new(),
            rng,
            incarnation: 0,
            epochs_until,
            renewed_at: None,
            renewal_planned: None,
            timers: Timers::default(),
            health: LocalHealth::new(now, config.period, config.suspicion),
            is_isolated: false,
            probe: None,
            accusations: Accusations::default(),
            contacts: Contacts::default(),
            seen: BTreeMap::new(),
            digest: None,
            suspected: BTreeMap::new(),
            heard: BTreeMap::new(),
            waiting: packets::Waiting::default(),
            gossiped_at: now,
            transmissions,
            outgoing: VecDeque::new(),
            events: VecDeque::new(),
            config,
        }
    }

    /// How full each bounded store is.
    pub fn store_sizes(&self) -> impl Iterator<Item = StoreSize> {
        let rumours = self.foca.custom_broadcast_backlog();
        let own = [self.timers.store_size(), StoreSize::new("rumours", rumours, BACKLOG_MAX)];
        own.into_iter()
            .chain(self.accusations.store_sizes())
            .chain(self.contacts.store_sizes())
            .chain(self.waiting.store_sizes())
    }

    /// This run of this member.
    pub fn identity(&self) -> Identity {
        *self.foca.identity()
    }

    /// What is believed of a member; `None` when nobody has vouched for it since the start.
    pub fn belief(&self, member: MemberId) -> Option<MemberUpdate> {
        self.seen.get(&member).copied()
    }

    /// Members that are there, without this one.
    pub fn active(&self) -> impl Iterator<Item = Identity> {
        let is_active = |update: &&MemberUpdate| update.belief != Belief::Down;
        self.seen.values().filter(is_active).map(|update| update.identity)
    }

    /// A random member that is there.
    pub fn choose_active(&mut self) -> Option<Identity> {
        let count = self.active().count();
        let index = self.rng.random_range(0..count.max(1));
        self.active().nth(index)
    }

    /// Whether nobody has been heard for a while.
    pub fn is_isolated(&self) -> bool {
        self.is_isolated
    }

    /// Whether silence has lasted so long that the others must be taken for gone. They are not
    /// convicted: this node may be the one that is cut off, and must not carry that verdict back.
    pub fn is_deserted(&self, now: Moment) -> bool {
        self.is_isolated && self.health.silence(now) >= PATIENCE
    }

    /// A number in `0..bound`, from this member's generator.
    pub fn random(&mut self, bound: u64) -> u64 {
        self.rng.random_range(0..bound.max(1))
    }

    /// Takes a higher epoch before anybody has seen this one.
    pub fn begin_above(&mut self, now: Moment, identity: Identity) {
        // The only error is "the same identity", which leaves nothing to do.
        let _ = self.foca.change_identity(identity, &mut self.runtime);
        self.digest = None;
        self.absorb(now, None);
    }

    /// Epochs up to `until` are durable now.
    pub fn extend_epochs(&mut self, until: Epoch) {
        self.epochs_until = self.epochs_until.max(until);
    }

    /// `identity` has proved to be there. Returns false if this run of it was convicted here: it
    /// must renew, and has to be told.
    pub fn handle_alive(&mut self, now: Moment, identity: Identity) -> bool {
        self.note_heard(now, identity.id);
        let is_convicted = self.seen.get(&identity.id).is_some_and(|seen| {
            seen.belief == Belief::Down && seen.identity.epoch >= identity.epoch
        });
        if !is_convicted && identity.id != self.identity().id {
            self.apply(now, [Member::alive(identity)], true);
        }
        !is_convicted
    }

    /// Somebody holds this run of this member for dead. An error when it said so a moment ago.
    pub fn handle_convicted(
        &mut self,
        now: Moment,
        by: MemberId,
        identity: Identity,
    ) -> Result<(), PacketFault> {
        if identity != self.identity() {
            return Ok(()); // of a run that is over
        }
        if !self.may_renew_for(now, by) {
            return Err(PacketFault::Renewal);
        }
        self.apply(now, [Member::down(identity)], true);
        Ok(())
    }

    /// Passes a rumour on. Returns false when too many wait already: repair will spread it.
    pub fn spread(&mut self, now: Moment, rumour: &[u8]) -> bool {
        if self.foca.custom_broadcast_backlog() >= BACKLOG_MAX {
            return false;
        }
        let is_taken = self.foca.add_broadcast(rumour).unwrap_or(false);
        self.gossip_now(now);
        is_taken
    }

    /// Tells some members goodbye. Nothing is probed afterwards.
    pub fn leave(&mut self, now: Moment) {
        // Encoding this member's own identity does not fail; if it did, others would find out.
        let _ = self.foca.leave_cluster(&mut self.runtime);
        self.absorb(now, None);
    }

    /// One more contact to be tried, now.
    pub fn add_contact(&mut self, now: Moment, contact: Contact) {
        self.contacts.add(contact, now);
    }

    /// `contact` needs no more trying.
    pub fn remove_contact(&mut self, contact: Contact) {
        self.contacts.remove(contact);
    }

    /// Tries all contacts again at once.
    pub fn hurry_contacts(&mut self, now: Moment) {
        self.contacts.hurry(now);
    }

    /// Contacts to be dialled now.
    pub fn take_contacts(&mut self, now: Moment) -> Vec<Contact> {
        let live = self.foca.num_members() + 1;
        self.contacts.take_due(now, live, &mut self.rng)
    }

    /// The deadline of [`Membership::poll_timeout`], or an earlier one of this node, has come. It
    /// was at `due`: a turn much later than that is a pause of this node, after which all contacts
    /// are tried at once.
    pub fn handle_timeout(&mut self, now: Moment, due: Moment) {
        if self.health.handle_turn(now, due) {
            self.contacts.hurry(now);
        }
        while let Some(timer) = self.timers.take_due(now) {
            match timer {
                Timer::Foca(timer) => self.handle_foca_timer(now, timer),
                Timer::Convict { identity, incarnation, postponed } => {
                    self.convict(now, identity, incarnation, postponed);
                }
                Timer::Remind { identity, incarnation } => {
                    if self.is_suspect(identity, incarnation) {
                        self.tell_suspect(identity, incarnation);
                    }
                }
                Timer::TakeOver { identity, incarnation } => {
                    if self.is_suspect(identity, incarnation) {
                        let suspicion = self.config.suspicion;
                        self.await_refutation(now, identity, incarnation, suspicion);
                    }
                }
                Timer::Renew(identity) if identity == self.identity() => {
                    self.renewal_planned = None;
                    self.renew_soon(now);
                }
                Timer::Renew(_) => {} // it has
                Timer::Accusation(member) => self.continue_accusation(now, member),
            }
        }
        self.judge_isolation(now);
    }

    /// When to call [`Membership::handle_timeout`] and [`Membership::take_contacts`] at the latest.
    pub fn poll_timeout(&self) -> Option<Moment> {
        self.timers.next_deadline().into_iter().chain(self.contacts.next_deadline()).min()
    }

    /// The next packet to send.
    pub fn poll_transmit(&mut self) -> Option<Outgoing> {
        self.outgoing.pop_front()
    }

    /// The next thing that happened.
    pub fn poll_event(&mut self) -> Option<MembershipEvent> {
        self.events.pop_front()
    }

    fn handle_foca_timer(&mut self, now: Moment, timer: foca::Timer<Identity>) {
        // The only timer by which foca changes its list itself: it suspects whom it has probed.
        let probed = match timer {
            foca::Timer::ProbeRandomMember(_) => self.probe.as_ref().map(|probe| probe.target.id),
            _ => None,
        };
        match &timer {
            foca::Timer::SendIndirectProbe { probed_id, .. } => self.repeat_ping(probed_id),
            foca::Timer::ProbeRandomMember(_) => match self.probe.take() {
                Some(probe) if probe.is_answered => self.health.handle_answered(),
                Some(probe) if !probe.was_suspect => self.health.handle_missed(),
                _ => {}
            },
            _ => {}
        }
        // Errors: a timer of an earlier connection state, or an incomplete round after a pause of
        // this process. foca recovers from both by itself.
        let _ = self.foca.handle_timer(timer, &mut self.runtime);
        self.absorb(now, None);
        self.look_again(now, probed.as_slice());
    }

    /// Feeds foca with what may be believed.
    fn apply(
        &mut self,
        now: Moment,
        updates: impl IntoIterator<Item = Member<Identity>>,
        is_news: bool,
    ) {
        let updates: Vec<_> = updates.into_iter().collect();
        let members: Vec<_> = updates.iter().map(|update| update.id().id).collect();
        // Encoding an identity that was decoded before does not fail.
        let _ = self.foca.apply_many(updates.into_iter(), is_news, &mut self.runtime);
        self.absorb(now, None);
        self.look_again(now, &members);
    }

    fn gossip_now(&mut self, now: Moment) {
        if now.since(self.gossiped_at) >= EAGER_PAUSE {
            self.gossiped_at = now;
            let _ = self.foca.gossip(&mut self.runtime); // fails only as `apply` does
            self.absorb(now, None);
        }
    }

    fn may_renew(&mut self, now: Moment) -> bool {
        if self.identity().epoch >= self.epochs_until {
            self.events.push_back(MembershipEvent::EpochsNeeded);
            return false;
        }
        self.renewed_at.is_none_or(|at| now.since(at) >= self.renewal_pause())
    }

    /// Shortest time between two renewals of this member: short enough to be back before the next
    /// conviction.
    fn renewal_pause(&self) -> Duration {
        self.config.suspicion / 2
    }

    /// Takes a higher epoch now, or as soon as this member may.
    fn renew_soon(&mut self, now: Moment) {
        let identity = self.identity();
        if self.may_renew(now) {
            self.apply(now, [Member::down(identity)], true);
        } else if self.renewal_planned != Some(identity) {
            self.renewal_planned = Some(identity);
            self.timers.set(now + self.renewal_pause(), Timer::Renew(identity));
        }
    }

    fn may_renew_for(&mut self, now: Moment, by: MemberId) -> bool {
        self.seen.contains_key(&by) && self.may_renew(now) && self.accusations.may_turn(now, by)
    }

    fn note_heard(&mut self, now: Moment, member: MemberId) {
        self.health.handle_heard(now);
        if self.seen.contains_key(&member) {
            self.heard.insert(member, now);
        }
        if self.is_isolated {
            self.is_isolated = false;
            self.events.push_back(MembershipEvent::Healed);
        }
    }

    /// Takes what foca wants done. Answers to a packet that came over a stream go back over one.
    fn absorb(&mut self, now: Moment, answering: Option<(MemberId, Carrier)>) {
        while let Some((to, packet)) = self.runtime.to_send() {
            self.send(to, packet, answering);
        }
        while let Some((after, timer)) = self.runtime.to_schedule() {
            self.schedule(now, after, timer);
        }
        while let Some(notification) = self.runtime.to_notify() {
            if let OwnedNotification::Rejoin(identity) = notification {
                self.digest = None;
                self.renewed_at = Some(now);
                self.incarnation = 0;
                self.timers
                    .retain(|timer| !matches!(timer, Timer::Convict { .. } | Timer::Remind { .. }));
                self.suspect_anew(now);
                self.events.push_back(MembershipEvent::SelfRenewed(identity));
                if self.epochs_until.0.saturating_sub(identity.epoch.0) < EPOCHS_LOW {
                    self.events.push_back(MembershipEvent::EpochsNeeded);
                }
            }
        }
    }

    fn schedule(&mut self, now: Moment, after: Duration, timer: foca::Timer<Identity>) {
        match timer {
            foca::Timer::ChangeSuspectToDown { member_id: identity, incarnation, .. } => {
                self.await_refutation(now, identity, incarnation, after);
            }
            foca::Timer::ProbeRandomMember(_) | foca::Timer::SendIndirectProbe { .. } => {
                self.timers.set(now + after * self.health.stretch(), Timer::Foca(timer));
            }
            timer => self.timers.set(now + after, Timer::Foca(timer)),
        }
    }

    /// Compares foca's list with what was seen of it, and says what changed of some members.
    fn look_again(&mut self, now: Moment, members: &[MemberId]) {
        let is_changed = |update: &MemberUpdate| self.seen.get(&update.identity.id) != Some(update);
        let all = self.foca.iter_membership_state();
        let asked = all.filter(|member| members.contains(&member.id().id));
        let changed: Vec<_> = asked.map(MemberUpdate::from).filter(is_changed).collect();
        for update in changed {
            self.digest = None;
            let before = self.seen.insert(update.identity.id, update);
            self.note_change(now, before, update);
        }
        let transmissions = self.config.transmissions(self.foca.num_members() + 1);
        if transmissions != self.transmissions {
            // Only the count of transmissions changes, which foca allows at any time.
            let _ = self.foca.set_config(self.config.to_foca(transmissions));
            self.transmissions = transmissions;
        }
    }

    fn note_change(&mut self, now: Moment, before: Option<MemberUpdate>, after: MemberUpdate) {
        let member = after.identity.id;
        let was_active = before.is_some_and(|before| before.belief != Belief::Down);
        let was_suspect = before.is_some_and(|before| before.belief == Belief::Suspect);
        let is_renewed = before.is_some_and(|before| before.identity != after.identity);
        if after.belief == Belief::Suspect {
            self.suspected.insert(member, now);
            self.plan_take_over(now, after);
        } else {
            self.suspected.remove(&member);
        }
        match after.belief {
            Belief::Down => {
                let is_own = self.accusations.take_own(member);
                let due = now + self.jitter(PATIENCE / 8);
                self.contacts.add(Contact::Member(member), due);
                if was_active || before.is_none() {
                    self.events.push_back(MembershipEvent::Down { member, is_own });
                }
                return;
            }
            _ if !was_active => {
                let (identity, is_back) = (after.identity, before.is_some());
                self.events.push_back(MembershipEvent::Up { identity, is_back });
            }
            _ if is_renewed => self.events.push_back(MembershipEvent::Renewed(after.identity)),
            Belief::Suspect if !was_suspect => {
                self.events.push_back(MembershipEvent::Suspect(member));
            }
            Belief::Alive if was_suspect => {
                self.events.push_back(MembershipEvent::Refuted(member));
            }
            _ => {}
        }
        self.contacts.remove(Contact::Member(member));
        self.contacts.remove(Contact::Seed(after.identity.address));
    }

    fn jitter(&mut self, up_to: Duration) -> Duration {
        up_to.mul_f64(self.rng.random_range(0.25..1.0))
    }
}
