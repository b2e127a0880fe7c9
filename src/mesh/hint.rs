//! "This entry has a new version": what rides on the detector's packets, about 40 bytes.

use bytes::Bytes;

use crate::membership::{read_rumour, rumour};
use crate::model::{Entry, EntryKey, EntryKind, EntryVersion, Epoch, MemberId};
use crate::wire;

/// Names an entry and the version that its owner has published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hint {
    pub(super) key: EntryKey,
    epoch: Epoch,
    version: u64,
    /// The first bytes of the payload's hash: enough to tell two payloads of one number apart.
    tie: [u8; 8],
}

impl Hint {
    pub(super) fn of(entry: &Entry) -> Self {
        let version = entry.version();
        Self {
            key: entry.key(),
            epoch: version.epoch,
            version: version.version,
            tie: tie_of(&version),
        }
    }

    /// Whether it names something later than `known`.
    pub(super) fn is_news(&self, known: Option<EntryVersion>) -> bool {
        known.is_none_or(|known| {
            (self.epoch, self.version, self.tie) > (known.epoch, known.version, tie_of(&known))
        })
    }

    pub(super) fn encode(&self) -> Option<Bytes> {
        let EntryKey { kind, owner, subject } = self.key;
        let about = (subject != [0; 16]).then_some(subject);
        let place = wire::encode(&(kind, owner, about)).ok()?;
        let news = wire::encode(&(self.epoch, self.version, self.tie)).ok()?;
        rumour(&place, &news)
    }

    pub(super) fn decode(data: &[u8]) -> Option<Self> {
        let (place, news) = read_rumour(data)?;
        let (kind, owner, about): (EntryKind, MemberId, Option<[u8; 16]>) =
            wire::decode(place).ok()?;
        let (epoch, version, tie) = wire::decode(news).ok()?;
        let key = EntryKey { kind, owner, subject: about.unwrap_or_default() };
        Some(Self { key, epoch, version, tie })
    }
}

fn tie_of(version: &EntryVersion) -> [u8; 8] {
    let [a, b, c, d, e, f, g, h, ..] = version.hash.0;
    [a, b, c, d, e, f, g, h]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::golden;

    #[test]
    fn hints_of_version_1_are_read_and_written_as_ever() {
        let owner = MemberId::from_bytes([3; 16]);
        for (name, subject) in [("hint/record", [0; 16]), ("hint/enrolment", [8; 16])] {
            let kind = if subject == [0; 16] { EntryKind::RECORD } else { EntryKind::ENROLMENT };
            let key = EntryKey { kind, owner, subject };
            let hint = Hint { key, epoch: Epoch(1_790_000_000), version: 300, tie: [6; 8] };
            let write = |hint: &Hint| hint.encode().unwrap().to_vec();
            golden::check(name, &hint, write, |bytes| Hint::decode(bytes).unwrap());
        }
    }
}
