//! What one machine says, carried to the others: entries make identities believable, identities
//! make contacts superfluous, rumours make wants, and all of it makes transmits and events.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;

use super::hint::Hint;
use super::message::Message;
use super::view::Known;
use super::{Channel, Destination, Evidence, Mesh, MeshEvent, TICK, Transmit};
use crate::catalogue::{Catalogue, CatalogueEvent, Content};
use crate::membership::{Carrier, Contact, Disbelief, Identity, MembershipEvent, Standing};
use crate::model::{Entry, Epoch, InstanceRecord, MemberId, MemberPhase, MemberRecord, Moment};

/// Entries that arrive together and are still worth a rumour each; more are left to repair.
const NEWS_MAX: usize = 8;

impl Mesh {
    /// Carries what one machine said to the others, until none has more to say.
    pub(super) fn drain(&mut self, now: Moment) {
        self.now = now;
        loop {
            self.drain_shared(now);
            self.handle_catalogue(now);
            let Some(event) = self.membership.poll_event() else { break };
            self.handle_membership(now, event);
        }
        self.spread_news(now);
        while let Some(out) = self.membership.poll_transmit() {
            let to = Destination::Member { id: out.to.id, address: out.to.address };
            match out.over {
                Carrier::Datagram => {
                    self.transmits.push_back(Transmit {
                        to,
                        channel: Channel::Datagram,
                        data: out.packet,
                    });
                }
                Carrier::Stream => {
                    self.send_to(to, &Message::Packet(out.packet));
                }
            }
        }
        self.ask_for_wants();
        for member in std::mem::take(&mut self.touched) {
            self.look_at(now, member);
        }
    }

    pub(super) fn handle_catalogue(&mut self, now: Moment) {
        while let Some(event) = self.catalogue.poll_event() {
            match event {
                CatalogueEvent::Accepted { entry, content, previous } => {
                    self.handle_accepted(now, entry, &content, previous.as_ref());
                }
                CatalogueEvent::Quarantined { key, hash } => {
                    self.events.push_back(MeshEvent::EntryQuarantined { key, hash });
                }
                CatalogueEvent::Equivocation(key) => {
                    self.events.push_back(MeshEvent::Equivocation(key));
                }
                CatalogueEvent::NameConflict { name, members } => {
                    self.events.push_back(MeshEvent::NameConflict { name, members });
                }
                CatalogueEvent::PendingDropped(key) => {
                    let reason = "pending_full";
                    self.events.push_back(MeshEvent::Dropped { from: key.owner, reason });
                }
            }
        }
    }

    fn handle_accepted(
        &mut self,
        now: Moment,
        entry: Entry,
        content: &Content,
        previous: Option<&Content>,
    ) {
        let (key, version) = (entry.key(), entry.version());
        // Readers see nothing of invites, nor of what is only relayed; of observations what the shared
        // breaker makes of them.
        let is_seen =
            !matches!(content, Content::Invite(_) | Content::Observations(_) | Content::Relayed);
        self.is_changed |= is_seen;
        self.news.push(key);
        if let Content::Observations(observations) = content {
            // Too short-lived for a disk.
            return self.handle_observations(now, key.owner, version, observations);
        }
        self.events.push_back(MeshEvent::EntryAccepted(entry));
        let Content::Record(record) = content else { return };
        let member = key.owner;
        self.touched.insert(member);
        self.known.entry(member).or_insert_with(|| Known::new(now)).record_at = Some(now);
        let before = match previous {
            Some(Content::Record(before)) => before.instances.as_slice(),
            _ => &[],
        };
        self.events.extend(instance_events(member, before, record));
        if member == self.id {
            return; // the next tick looks whether this run signed it
        }
        let identity = Identity { id: member, epoch: version.epoch, address: record.address };
        let catalogue = &self.catalogue;
        let standing = |identity: &Identity| standing_of(catalogue, identity);
        let rumours = self.membership.handle_record(now, identity, &standing);
        self.handle_rumours(member, rumours);
        if self.membership.belief(member).is_none() && record.phase != MemberPhase::Left {
            let soon = Duration::from_millis(500 + self.membership.random(2_000));
            self.membership.add_contact(now + soon, Contact::Member(member));
        }
    }

    fn handle_membership(&mut self, now: Moment, event: MembershipEvent) {
        match event {
            MembershipEvent::Up { identity, is_back } => {
                self.touched.insert(identity.id);
                if is_back {
                    self.greet(identity.id);
                }
            }
            MembershipEvent::Stranger(identity) => {
                self.note_address(identity.id, identity.address);
                self.want_record(now, identity.id, identity.id);
            }
            MembershipEvent::Renewed(identity) => {
                let Identity { id: member, epoch, .. } = identity;
                self.touched.insert(member); // it may have been a suspect
                self.events.push_back(MeshEvent::MemberRenewed { member, epoch });
            }
            MembershipEvent::Down { member, is_own } => {
                self.touched.insert(member);
                if is_own {
                    self.note_evidence(now, member, Evidence::Failed);
                }
                let of_member = |(address, occupant): (&SocketAddr, &Option<MemberId>)| {
                    (*occupant == Some(member)).then_some(*address)
                };
                let seeds: Vec<_> = self.seeds.iter().filter_map(of_member).collect();
                for address in seeds {
                    self.membership.add_contact(now + TICK, Contact::Seed(address));
                }
            }
            MembershipEvent::SelfRenewed(identity) => {
                self.publication.epoch = identity.epoch;
                self.publish_record(now);
                self.membership.hurry_contacts(now);
                self.say_hello(now);
                self.events.push_back(MeshEvent::Renewed(identity.epoch));
            }
            MembershipEvent::EpochsNeeded => {
                let at_least = Epoch(self.epochs_until.0.saturating_add(1));
                self.events.push_back(MeshEvent::EpochsNeeded { at_least });
            }
            MembershipEvent::RecordWanted { member, from } => self.want_record(now, member, from),
            MembershipEvent::Accused(identity) => {
                self.send_message(identity.id, &Message::Convicted(identity));
            }
            MembershipEvent::Disbelieved { from, why } => match why {
                Disbelief::Incarnation => self.blame(from, "absurd_incarnation"),
                Disbelief::Jump => self.drop_from(from, "incarnation_jump"),
                Disbelief::Address => self.drop_from(from, "other_address"),
                Disbelief::Death(member) => {
                    self.events.push_back(MeshEvent::FalseDeath { from, member });
                }
            },
            MembershipEvent::Isolated => self.events.push_back(MeshEvent::Isolated),
            MembershipEvent::Healed => {
                self.touched.extend(self.known.keys());
                self.events.push_back(MeshEvent::Healed);
            }
            MembershipEvent::Suspect(member) | MembershipEvent::Refuted(member) => {
                self.touched.insert(member);
            }
        }
    }

    pub(super) fn handle_packet(
        &mut self,
        now: Moment,
        from: MemberId,
        over: Carrier,
        data: &[u8],
    ) {
        if !self.is_settled || self.has_left {
            return; // under which epoch this member speaks is not certain yet, or not any more
        }
        let catalogue = &self.catalogue;
        let standing = |identity: &Identity| standing_of(catalogue, identity);
        match self.membership.handle_packet(now, from, over, data, &standing) {
            Ok(rumours) => self.handle_rumours(from, rumours),
            Err(fault) if fault.is_hostile() => self.blame(from, fault.as_str()),
            Err(fault) => self.drop_from(from, fault.as_str()),
        }
    }

    fn handle_rumours(&mut self, from: MemberId, rumours: Vec<Bytes>) {
        for rumour in rumours {
            match Hint::decode(&rumour) {
                Some(hint) if hint.is_news(self.catalogue.version(&hint.key)) => {
                    self.want_entry(hint.key, from);
                }
                Some(_) => {}
                None => self.drop_from(from, "rumour"),
            }
        }
    }

    /// Passes on what was just accepted, unless it came in bulk: then the others have it too.
    fn spread_news(&mut self, now: Moment) {
        let news = std::mem::take(&mut self.news);
        let is_few = news.len() <= NEWS_MAX;
        let me = self.id;
        for key in news.into_iter().filter(|key| is_few || key.owner == me) {
            if self.push_observations(&key) {
                continue;
            }
            let hint = self.catalogue.entry(&key).map(Hint::of).and_then(|hint| hint.encode());
            if let Some(hint) = hint {
                self.membership.spread(now, &hint); // when it is full, repair spreads the news
            }
        }
    }

    pub(super) fn drop_from(&mut self, from: MemberId, reason: &'static str) {
        self.events.push_back(MeshEvent::Dropped { from, reason });
    }

    pub(super) fn blame(&mut self, member: MemberId, reason: &'static str) {
        self.events.push_back(MeshEvent::Blamed { member, reason });
    }
}

/// What the signed records say of an identity.
pub(super) fn standing_of(catalogue: &Catalogue, identity: &Identity) -> Standing {
    match catalogue.record(identity.id) {
        Some((record, version)) if version.epoch == identity.epoch => {
            match record.address == identity.address {
                true => Standing::Current,
                false => Standing::Refuted,
            }
        }
        Some((_, version)) if version.epoch > identity.epoch => Standing::Refuted,
        _ => Standing::Unknown,
    }
}

fn instance_events(
    member: MemberId,
    before: &[InstanceRecord],
    after: &MemberRecord,
) -> Vec<MeshEvent> {
    let old: BTreeMap<_, _> = before.iter().map(|instance| (&instance.id, instance)).collect();
    let new: BTreeMap<_, _> =
        after.instances.iter().map(|instance| (&instance.id, instance)).collect();
    let gone = old
        .keys()
        .filter(|id| !new.contains_key(*id))
        .map(|id| MeshEvent::InstanceRemoved { member, instance: (*id).clone() });
    let come = new.iter().filter_map(|(id, instance)| {
        let id = (*id).clone();
        match old.get(&id) {
            None => Some(MeshEvent::InstanceAdded { member, instance: id }),
            Some(before) if before != instance => {
                let states = (before.state, instance.state);
                Some(MeshEvent::InstanceChanged { member, instance: id, states })
            }
            Some(_) => None,
        }
    });
    gone.chain(come).collect()
}
