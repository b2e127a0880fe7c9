//! What members ask each other at the renewal door, and the asker's side of it.
//!
//! Both ends have proved their keys by certificate before a byte is said, so a question needs no
//! signature. The asker's leaf may have ended: renewing it is what this door is for.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use quinn::VarInt;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::super::{DialError, Endpoint, refusal};
use super::{ANSWER_LEN_MAX, EXCHANGE_TIME_MAX};
use crate::model::{Entry, EntryError, MemberId, PublicKey};
use crate::runtime::clock;
use crate::tls::Plane;
use crate::wire::{self, WireError};

/// A question at the renewal door.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenewalRequest {
    /// My next leaf. Issuers only.
    Leaf,
    /// What time is it?
    Time,
    /// The public half of your issuing key, made now if there is none.
    IssuingKey,
    /// Which run are you? This is mine.
    Run(Run),
}

/// One run of an agent: random, made at its start. Two at one time with one key are twins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run(pub [u8; 16]);

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewalAnswer {
    /// The answerer's clock, in milliseconds since 1970.
    pub at: u64,
    /// To the question.
    pub reply: RenewalReply,
}

/// An answer to one question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RenewalReply {
    /// The next leaf.
    Leaf {
        /// Leaf, issuer, root (DER).
        chain: Vec<Vec<u8>>,
        /// What makes others believe it, encoded: the issuer's entry, then the new enrolment.
        entries: Vec<Vec<u8>>,
    },
    /// The time is in every answer.
    Time,
    /// The public half of the answerer's issuing key.
    IssuingKey(PublicKey),
    /// No, and why.
    Refused(RenewalRefusal),
    /// The answerer's run.
    Run(Run),
}

/// Why there is no new leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RenewalRefusal {
    /// This member has no issuing key, or the root took it back.
    #[error("it is not an issuer")]
    NotIssuer,
    /// No issuer that is one still vouches for the asker.
    #[error("no active issuer vouches for this member any more")]
    Revoked,
    /// The bytes are no question.
    #[error("the question cannot be read")]
    Malformed,
    /// The answerer could not do its work.
    #[error("it failed: {0}")]
    Internal(String),
}

impl RenewalRefusal {
    /// The word for metrics.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::NotIssuer => "not_issuer",
            Self::Revoked => "revoked",
            Self::Malformed => "malformed",
            Self::Internal(_) => "internal",
        }
    }
}

/// A question got no useful answer. Nothing changed; asking again, or somebody else, is safe.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No connection came about. Fault: network, or whoever did not answer.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// It ended before the answer was whole. Fault: network, or whoever answered.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// Fault: network, or whoever did not answer.
    #[error("no answer within {EXCHANGE_TIME_MAX:?}")]
    Timeout,
    /// The answer is no. Fault: as the refusal says.
    #[error(transparent)]
    Refused(#[from] RenewalRefusal),
    /// Fault: whoever answered.
    #[error("the answer is not understood: {0}")]
    Wire(#[from] WireError),
    /// Fault: whoever answered.
    #[error("the answer holds what is no entry: {0}")]
    Entry(#[from] EntryError),
    /// Fault: whoever answered.
    #[error("the answer is to another question")]
    OtherQuestion,
}

/// Where to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Door {
    /// Who must answer; anybody of the mesh when absent.
    pub member: Option<MemberId>,
    /// Where.
    pub address: SocketAddr,
}

/// What an issuer gave.
#[derive(Debug)]
pub struct RenewedLeaf {
    /// Leaf, issuer, root; not checked yet.
    pub chain: Vec<CertificateDer<'static>>,
    /// The issuer's entry, then the new enrolment.
    pub entries: Vec<Entry>,
}

impl RenewedLeaf {
    pub(super) fn into_reply(self) -> RenewalReply {
        RenewalReply::Leaf {
            chain: self.chain.iter().map(|certificate| certificate.to_vec()).collect(),
            entries: self.entries.iter().map(|entry| entry.bytes().to_vec()).collect(),
        }
    }
}

/// Asks for the next leaf of the member whose `endpoint` this is, and the answerer's clock against
/// ours.
pub async fn ask_leaf(endpoint: &Endpoint, door: Door) -> Result<(RenewedLeaf, Skew), AskError> {
    match ask(endpoint, door, RenewalRequest::Leaf).await? {
        (RenewalReply::Leaf { chain, entries }, skew) => {
            let entries = entries.into_iter().map(|bytes| Entry::decode(Bytes::from(bytes)));
            let entries = entries.collect::<Result<_, _>>()?;
            let chain = chain.into_iter().map(CertificateDer::from).collect();
            Ok((RenewedLeaf { chain, entries }, skew))
        }
        (RenewalReply::Refused(refusal), _) => Err(refusal.into()),
        _ => Err(AskError::OtherQuestion),
    }
}

/// Asks for the answerer's clock against ours.
pub async fn ask_time(endpoint: &Endpoint, door: Door) -> Result<Skew, AskError> {
    ask(endpoint, door, RenewalRequest::Time).await.map(|(_, skew)| skew)
}

/// Asks a member for its issuing key.
pub async fn ask_issuing_key(endpoint: &Endpoint, door: Door) -> Result<PublicKey, AskError> {
    match ask(endpoint, door, RenewalRequest::IssuingKey).await? {
        (RenewalReply::IssuingKey(key), _) => Ok(key),
        (RenewalReply::Refused(refusal), _) => Err(refusal.into()),
        _ => Err(AskError::OtherQuestion),
    }
}

/// Asks whoever answers for its run, and tells `own`.
pub async fn ask_run(endpoint: &Endpoint, door: Door, own: Run) -> Result<Run, AskError> {
    match ask(endpoint, door, RenewalRequest::Run(own)).await? {
        (RenewalReply::Run(run), _) => Ok(run),
        (RenewalReply::Refused(refusal), _) => Err(refusal.into()),
        _ => Err(AskError::OtherQuestion),
    }
}

/// By how many seconds the answerer's clock is ahead of ours, known to half a round trip.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Skew(pub f64);

impl Skew {
    /// Of a clock that showed `there` somewhere between `asked` and `answered` of ours, all in
    /// milliseconds since 1970.
    fn between(asked: u64, there: u64, answered: u64) -> Self {
        let here = (asked as f64 + answered as f64) / 2.0;
        Self((there as f64 - here) / 1_000.0)
    }
}

async fn ask(
    endpoint: &Endpoint,
    door: Door,
    request: RenewalRequest,
) -> Result<(RenewalReply, Skew), AskError> {
    let exchange = async {
        let connection = endpoint.connect(Plane::Renewal, door.address, door.member).await?;
        let asked = clock::unix_millis();
        let exchange = async {
            let broken = |error: &dyn ToString| AskError::Broken(error.to_string());
            let (mut send, mut receive) =
                connection.open_bi().await.map_err(|error| broken(&error))?;
            let bytes = wire::encode(&request)?;
            send.write_all(&bytes).await.map_err(|error| broken(&error))?;
            send.finish().map_err(|error| broken(&error))?;
            let bytes =
                receive.read_to_end(ANSWER_LEN_MAX).await.map_err(|error| broken(&error))?;
            Ok::<RenewalAnswer, AskError>(wire::decode(&bytes)?)
        };
        let mut answered = exchange.await;
        if let (Err(AskError::Broken(_)), Some(closed)) = (&answered, connection.close_reason())
            && let Some(reason) = refusal(&closed)
        {
            answered = Err(DialError::Refused { reason }.into());
        }
        connection.close(VarInt::from_u32(0), b"thanks");
        let RenewalAnswer { at, reply } = answered?;
        Ok((reply, Skew::between(asked, at, clock::unix_millis())))
    };
    timeout(EXCHANGE_TIME_MAX, exchange).await.map_err(|_| AskError::Timeout)?
}

/// The answer to `reply` as it is now.
pub(super) fn answer(reply: RenewalReply) -> RenewalAnswer {
    RenewalAnswer { at: clock::unix_millis(), reply }
}

/// How long after a leaf was issued another request is given the same enrolment again, as a share
/// of its life: whoever lost an answer asks at once, and whoever asks all the time costs no serial,
/// no write and no gossip.
pub(super) fn is_fresh(issued_at: u64, now: u64, ttl_secs: u64) -> bool {
    Duration::from_secs(now.saturating_sub(issued_at)) < Duration::from_secs(ttl_secs) / 10
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::golden;

    #[test]
    fn questions_of_version_1_are_read_and_written_as_ever() {
        let (key, run) = (PublicKey([7; 32]), Run([4; 16]));
        let questions = [
            RenewalRequest::Leaf,
            RenewalRequest::Time,
            RenewalRequest::IssuingKey,
            RenewalRequest::Run(run),
        ];
        for (number, question) in questions.iter().enumerate() {
            golden::check_value(&format!("renewal/question/{number}"), question);
        }
        let (chain, entries) = (vec![vec![1, 2], vec![3]], vec![vec![4]]);
        let replies = [
            RenewalReply::Leaf { chain, entries },
            RenewalReply::Time,
            RenewalReply::IssuingKey(key),
            RenewalReply::Refused(RenewalRefusal::NotIssuer),
            RenewalReply::Refused(RenewalRefusal::Revoked),
            RenewalReply::Refused(RenewalRefusal::Malformed),
            RenewalReply::Refused(RenewalRefusal::Internal("why".to_owned())),
            RenewalReply::Run(run),
        ];
        for (number, reply) in replies.into_iter().enumerate() {
            let answer = RenewalAnswer { at: 1_790_000_000_123, reply };
            golden::check_value(&format!("renewal/answer/{number}"), &answer);
        }
    }

    #[test]
    fn skew_is_taken_against_the_middle_of_the_exchange() {
        assert_eq!(Skew::between(1_000, 3_050, 1_100), Skew(2.0));
        assert_eq!(Skew::between(9_000, 1_050, 9_100), Skew(-8.0));
    }
}
