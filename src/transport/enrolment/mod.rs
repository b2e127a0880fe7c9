//! The enrolment door: the only way in without a certificate.
//!
//! A newcomer holds a token: the private half of an invite, the mesh id, the root's key and the
//! addresses of issuers. It makes a key, dials an issuer (whose chain must lead to that root), and
//! sends one [`JoinRequest`] signed by both keys. The issuer checks the invite, counts the use on
//! disk before it answers, and replies with the leaf's chain and all that a member starts from.
//!
//! Limits of the door: one stream, [`REQUEST_LEN_MAX`] bytes, [`EXCHANGE_TIME_MAX`].

mod desk;
mod door;
mod knock;
mod message;

use std::time::Duration;

pub use desk::{DeskError, InviteOptions, InviteView, IssuerDesk, stored_invites};
pub use door::serve;
pub use knock::{KnockError, Welcome, knock};
pub use message::{JoinAnswer, JoinRefusal, JoinRequest};

/// Longest request, in bytes.
pub const REQUEST_LEN_MAX: usize = 16 * 1024;
/// Longest answer, in bytes.
pub const ANSWER_LEN_MAX: usize = 256 * 1024;
/// The whole exchange takes at most this long.
pub const EXCHANGE_TIME_MAX: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::sync::Arc;

    use tokio::sync::Mutex;

    use super::*;
    use crate::model::{Signer, Unlisted};
    use crate::runtime::{Shutdown, TaskGroup};
    use crate::telemetry::{Door, EventLog, Metrics};
    use crate::tls::store::{DataDir, InitOptions, init};
    use crate::tls::{Plane, SecretKey, Token, joiner_config, server_name};
    use crate::transport::endpoint::client_config;
    use crate::transport::gossip::{gossip_channel, testing};
    use crate::transport::{Endpoint, Limits};

    /// A founder with its door open on loopback.
    struct Founder {
        desk: Arc<Mutex<IssuerDesk>>,
        address: SocketAddr,
        metrics: Metrics,
        tasks: TaskGroup,
        dir: tempfile::TempDir,
    }

    impl Founder {
        async fn new() -> Self {
            let temporary = tempfile::tempdir().unwrap();
            let dir = DataDir::new(temporary.path());
            let options = InitOptions {
                name: "first".parse().unwrap(),
                unlisted: Unlisted::Allow,
                cert_ttl: Duration::from_secs(3_600),
            };
            init(&dir, &options).unwrap();
            let (metrics, tasks) = (Metrics::new(), TaskGroup::new(Shutdown::default()));
            let (gossip, commands) = gossip_channel();
            tasks.spawn("gossip", testing::answer(commands, dir.entries().unwrap()));
            let credentials = dir.credentials().unwrap();
            let limits = Limits { reset_secret: dir.reset_secret().unwrap() };
            let listen = (Ipv4Addr::LOCALHOST, 0).into();
            let (endpoint, queues) =
                Endpoint::bind(listen, &credentials, &limits, &metrics, &tasks).unwrap();
            let address = endpoint.local_address();
            let authority = dir.authority().unwrap().unwrap();
            let events = EventLog::new("first");
            let desk =
                IssuerDesk::open(authority, credentials, dir, gossip, metrics.clone(), events);
            let desk = Arc::new(Mutex::new(desk.unwrap()));
            let door = serve(
                endpoint,
                queues.enrolment,
                Some(desk.clone()),
                Arc::default(),
                metrics.clone(),
                tasks.clone(),
            );
            tasks.spawn("door", door);
            Self { desk, address, metrics, tasks, dir: temporary }
        }

        async fn invite(&self, ttl_secs: u64, uses: u32) -> Token {
            let ttl = Duration::from_secs(ttl_secs);
            let options = InviteOptions { ttl, uses, name: None, services: None };
            self.desk.lock().await.invite(options, vec![self.address]).await.unwrap()
        }

        async fn join(&self, token: &Token, name: &str) -> Result<Welcome, KnockError> {
            let node = SecretKey::generate().unwrap();
            knock(token, &token.issuers, &node, &name.parse().unwrap()).await
        }

        fn refused(&self, reason: &'static str) -> u64 {
            self.metrics.refused(Door::enrol, reason)
        }
    }

    fn reason(joined: Result<Welcome, KnockError>) -> &'static str {
        match joined {
            Err(KnockError::Refused { reason, .. }) => reason.as_str(),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_token_admits_as_many_as_it_says_and_counts_the_rest() {
        let founder = Founder::new().await;
        let token = founder.invite(60, 2).await;
        let welcome = founder.join(&token, "b").await.unwrap();
        assert_eq!(welcome.entries.len(), 3, "own enrolment, issuer, operator");
        founder.join(&token, "c").await.unwrap();
        assert_eq!(reason(founder.join(&token, "d").await), "used_up");
        assert_eq!(founder.refused("used_up"), 1);
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn a_newcomer_whose_answer_was_lost_may_ask_again() {
        let founder = Founder::new().await;
        let token = founder.invite(60, 1).await;
        let (node, name) = (SecretKey::generate().unwrap(), "b".parse().unwrap());
        for _ in 0..2 {
            knock(&token, &token.issuers, &node, &name).await.unwrap();
        }
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn expired_revoked_unknown_and_taken_are_told_apart() {
        let founder = Founder::new().await;
        let expired = founder.invite(0, 1).await;
        assert_eq!(reason(founder.join(&expired, "b").await), "expired_invite");
        let revoked = founder.invite(60, 1).await;
        let id = revoked.key().unwrap().public_key().member_id();
        founder.desk.lock().await.revoke_invite(id).await.unwrap();
        assert_eq!(reason(founder.join(&revoked, "b").await), "revoked_invite");
        let key = SecretKey::generate().unwrap();
        let unknown = Token::new(expired.mesh, expired.root, vec![founder.address], &key);
        assert_eq!(reason(founder.join(&unknown, "b").await), "unknown_invite");
        let good = founder.invite(60, 1).await;
        assert_eq!(reason(founder.join(&good, "first").await), "name_taken");
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn an_invite_and_its_revocation_survive_a_crash_right_after_them() {
        let founder = Founder::new().await;
        let uses = |dir: &DataDir| -> Vec<u32> {
            let stored = stored_invites(dir).unwrap();
            let decode = |entry: &crate::model::Entry| {
                crate::wire::decode_payload::<crate::model::Invite>(&entry.payload()).unwrap().uses
            };
            stored.iter().map(decode).collect()
        };
        let dir = DataDir::new(founder.dir.path());
        let token = founder.invite(60, 3).await;
        assert_eq!(uses(&dir), [3]);
        let id = token.key().unwrap().public_key().member_id();
        founder.desk.lock().await.revoke_invite(id).await.unwrap();
        assert_eq!(uses(&dir), [0]);
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn junk_at_the_door_is_counted_and_costs_nobody_else() {
        let founder = Founder::new().await;
        let token = founder.invite(60, 1).await;
        let socket = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let config = client_config(Plane::Enrolment, joiner_config(&token).unwrap()).unwrap();
        for junk in [vec![0xff; 100], vec![0; REQUEST_LEN_MAX + 1]] {
            let name = server_name(None);
            let connecting = socket.connect_with(config.clone(), founder.address, &name).unwrap();
            let connection = connecting.await.unwrap();
            let (mut send, mut receive) = connection.open_bi().await.unwrap();
            let _ = send.write_all(&junk).await;
            let _ = send.finish();
            let _ = receive.read_to_end(ANSWER_LEN_MAX).await;
            connection.closed().await;
        }
        assert_eq!(founder.refused("malformed"), 1);
        assert_eq!(founder.refused("oversized"), 1);
        founder.join(&token, "b").await.unwrap();
        founder.tasks.stop().await;
    }
}
