//! Small things that ride on the detector's packets: hints that something has changed.
//!
//! foca passes a rumour on a fixed number of times and then forgets it. Its capacity is about ten
//! rumours a second for the whole mesh, so that a rumour only names what changed, and whoever wants
//! it asks for it.
//!
//! On the wire: one byte for the length of the place, the place, the news. Of two rumours about one
//! place only the later is passed on.

use bytes::Bytes;

use super::Identity;

/// Longest rumour, in bytes.
pub const RUMOUR_LEN_MAX: usize = 96;

/// Rumours that wait to be passed on. Beyond, repair alone spreads the news.
pub(super) const BACKLOG_MAX: usize = 64;

/// Puts a rumour together; `None` when it is too long.
pub fn rumour(place: &[u8], news: &[u8]) -> Option<Bytes> {
    let len = u8::try_from(place.len()).ok()?;
    let bytes = [&[len], place, news].concat();
    (bytes.len() <= RUMOUR_LEN_MAX).then(|| bytes.into())
}

/// Takes a rumour apart into its place and its news.
pub fn read_rumour(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = data.split_first()?;
    (data.len() <= RUMOUR_LEN_MAX).then(|| rest.split_at_checked(usize::from(*len)))?
}

/// foca's view of rumours. It never sees those of others before this node has judged them: the
/// driver takes them off incoming packets.
pub(super) struct Rumours;

/// What a rumour is about.
pub(super) struct Place(Vec<u8>);

impl foca::Invalidates for Place {
    fn invalidates(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

/// A rumour without a place. Fault: whoever made it.
#[derive(Debug, thiserror::Error)]
#[error("rumour has no place")]
pub(super) struct NoPlace;

impl foca::BroadcastHandler<Identity> for Rumours {
    type Key = Place;
    type Error = NoPlace;

    fn receive_item(
        &mut self,
        data: &[u8],
        _sender: Option<&Identity>,
    ) -> Result<Option<Place>, NoPlace> {
        let (place, _) = read_rumour(data).ok_or(NoPlace)?;
        Ok(Some(Place(place.to_vec())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rumour_survives_the_wire_and_nonsense_is_refused() {
        let bytes = rumour(b"place", b"news").unwrap();
        assert_eq!(read_rumour(&bytes), Some((&b"place"[..], &b"news"[..])));
        assert_eq!(read_rumour(b""), None);
        assert_eq!(read_rumour(&[200, 1, 2]), None, "shorter than it says");
        assert_eq!(rumour(&[0; 90], &[0; 9]), None, "too long");
    }
}
