//! Who may say what: the rights behind each kind of entry.
//!
//! | kind | signed by | about |
//! |---|---|---|
//! | issuer | the root | the hash of the issuer's key |
//! | enrolment | an active issuer | the member id, hash of the enrolled key |
//! | invite | an active issuer | the hash of the token's public key |
//! | record | an enrolled member | itself, under its enrolled name, with services it may offer |
//! | observations | an enrolled member | what it saw of others' instances |
//! | any other | the root, an active issuer or an enrolled member | relayed, not applied |
//!
//! What an issuer said before the root took it back is kept by everybody, also by those who hear of it
//! later: else members would differ for ever, and repair with them. It entitles nobody to anything.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::model::{
    Enrolment, Entry, EntryKind, Invite, Issuer, MemberId, MemberRecord, Observations, PublicKey,
};

use super::{Catalogue, decode};

/// Most patterns of requests that one instance may have declared idempotent.
pub const REQUESTS_MAX: usize = 32;
/// Most instances in one record.
pub const INSTANCES_MAX: usize = 256;

/// Longest free text in a record (zone, version, one tag), in bytes.
const TEXT_LEN_MAX: usize = 128;

/// Most tags of one instance.
const TAGS_MAX: usize = 32;

/// What an accepted entry carries.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A member's word about itself.
    Record(Arc<MemberRecord>),
    /// An issuer's word about a member.
    Enrolment(Arc<Enrolment>),
    /// Permission to join.
    Invite(Arc<Invite>),
    /// The root's word about an issuer.
    Issuer(Arc<Issuer>),
    /// What a member saw of others' instances.
    Observations(Arc<Observations>),
    /// Kept for others, not applied: a kind that this version does not know, or the word of a member
    /// whose issuers were all taken back.
    Relayed,
    /// A kind that this version applies, with a payload that it cannot read or must not believe.
    Unreadable,
}

pub(super) enum Refusal {
    /// The entry that would entitle it is not here; it may come.
    NoGround,
    /// Nothing can entitle it.
    NoRight(&'static str),
}

impl Catalogue {
    /// What a well-signed entry carries, if its signer may say so.
    pub(super) fn admit(&self, entry: &Entry) -> Result<Content, Refusal> {
        let key = entry.key();
        match key.kind {
            EntryKind::ISSUER if entry.signer() != self.root => Err(Refusal::NoRight("not_root")),
            EntryKind::ISSUER => {
                let issuer = decode::<Issuer>(entry);
                Ok(about(issuer, key.subject, |issuer| issuer.key, Content::Issuer))
            }
            EntryKind::ENROLMENT | EntryKind::INVITE if !self.was_issuer(key.owner) => {
                Err(Refusal::NoGround)
            }
            EntryKind::ENROLMENT => {
                let enrolment = decode::<Enrolment>(entry);
                Ok(about(enrolment, key.subject, |enrolment| enrolment.key, Content::Enrolment))
            }
            EntryKind::INVITE => {
                let invite = decode::<Invite>(entry);
                Ok(about(invite, key.subject, |invite| invite.key, Content::Invite))
            }
            EntryKind::RECORD | EntryKind::OBSERVATIONS if key.subject != [0; 16] => {
                Err(Refusal::NoRight("subject"))
            }
            EntryKind::RECORD => self.admit_record(entry),
            EntryKind::OBSERVATIONS => self.admit_observations(entry),
            _ if self.is_known(entry.signer()) => Ok(Content::Relayed),
            _ => Err(Refusal::NoGround),
        }
    }

    fn admit_record(&self, entry: &Entry) -> Result<Content, Refusal> {
        let member = entry.key().owner;
        if self.enrolments(member).next().is_none() {
            // A record that is applied already stays until another issuer has taken the member over.
            let is_kept = self.issuers_of.contains_key(&member) && self.record(member).is_none();
            return if is_kept { Ok(Content::Relayed) } else { Err(Refusal::NoGround) };
        }
        let Some(record) = decode::<MemberRecord>(entry).filter(|record| is_sound(record)) else {
            return Ok(Content::Unreadable);
        };
        // A wider enrolment may be on its way: wait for it rather than refuse.
        match self.enrolments(member).any(|(_, enrolment)| covers(enrolment, &record)) {
            true => Ok(Content::Record(record)),
            false => Err(Refusal::NoGround),
        }
    }

    fn admit_observations(&self, entry: &Entry) -> Result<Content, Refusal> {
        if self.enrolments(entry.key().owner).next().is_none() {
            return Err(Refusal::NoGround);
        }
        let observations = decode::<Observations>(entry).filter(|observations| {
            observations.calls.len() <= Observations::CALLS_MAX
                && observations.windows.len() <= Observations::WINDOWS_MAX
        });
        Ok(observations.map_or(Content::Unreadable, Content::Observations))
    }

    fn is_known(&self, signer: PublicKey) -> bool {
        let id = signer.member_id();
        signer == self.root || self.issuer(id).is_some() || self.enrolments(id).next().is_some()
    }
}

/// The content of an entry about a key, if it was filed under that key's hash.
fn about<T>(
    value: Option<Arc<T>>,
    subject: [u8; 16],
    key: impl Fn(&T) -> PublicKey,
    content: impl Fn(Arc<T>) -> Content,
) -> Content {
    match value {
        Some(value) if key(&value).member_id() == MemberId::from_bytes(subject) => content(value),
        _ => Content::Unreadable,
    }
}

fn covers(enrolment: &Enrolment, record: &MemberRecord) -> bool {
    enrolment.name == record.name
        && enrolment.services.as_ref().is_none_or(|allowed| {
            record.instances.iter().all(|instance| allowed.contains(&instance.service))
        })
}

fn is_sound(record: &MemberRecord) -> bool {
    let ids: BTreeSet<_> = record.instances.iter().map(|instance| &instance.id).collect();
    record.instances.len() <= INSTANCES_MAX
        && ids.len() == record.instances.len()
        && record.zone.len() <= TEXT_LEN_MAX
        && record.agent_version.len() <= TEXT_LEN_MAX
        && record.idempotent.len() <= INSTANCES_MAX
        && record.capacities.len() <= INSTANCES_MAX
        && record.idempotent.iter().all(|declared| declared.requests.len() <= REQUESTS_MAX)
        && record.instances.iter().all(|instance| {
            instance.tags.len() <= TAGS_MAX
                && instance.tags.iter().all(|tag| tag.len() <= TEXT_LEN_MAX)
        })
}
