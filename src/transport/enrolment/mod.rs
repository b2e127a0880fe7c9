//! The enrolment door: the only way in without a certificate.
//!
//! A newcomer holds a token: the private half of an invite, the mesh id, the root's key and the
//! addresses of issuers. It makes a key, dials an issuer (whose chain must lead to that root), and
//! sends one [`JoinRequest`] signed by both keys. The issuer checks the invite, counts the use on
//! disk before it answers, and replies with the leaf's chain and all that a member starts from.
//!
//! Beside it, on a plane of its own, is the renewal door: members come with their certificate, also
//! an ended one, and ask for the next leaf ([`renewal`]).
//!
//! Limits of both doors: one stream, [`REQUEST_LEN_MAX`] bytes, [`EXCHANGE_TIME_MAX`].

mod desk;
mod door;
mod knock;
mod message;
pub mod renewal;

use std::time::Duration;

pub use desk::{DeskError, InviteOptions, InviteView, IssuerDesk, Parting, stored_invites};
pub use door::{Presence, serve};
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

    use super::renewal::{
        AskError, Door as At, RenewalRefusal, RenewalRequest, Run, ask_leaf, ask_time,
    };
    use super::*;
    use crate::catalogue::Dismissals;
    use crate::model::{Enrolment, EntryKind, Issuer, MemberId, Signer, Unlisted};
    use crate::runtime::{Shutdown, TaskGroup, clock};
    use crate::telemetry::{Door, EventLog, Metrics};
    use crate::tls::store::{DataDir, InitOptions, init};
    use crate::tls::{Authority, Dismissed, Peer, Trust};
    use crate::tls::{NodeCredentials, Plane, Root, SecretKey, Token, joiner_config, server_name};
    use crate::transport::endpoint::client_config;
    use crate::transport::gossip::{GossipHandle, gossip_channel, testing};
    use crate::transport::{Endpoint, Limits};
    use crate::wire;

    /// A founder with its door open on loopback.
    struct Founder {
        desk: Arc<Mutex<IssuerDesk>>,
        gossip: GossipHandle,
        me: MemberId,
        address: SocketAddr,
        metrics: Metrics,
        trust: Trust,
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
            let authority = dir.authority().unwrap();
            let events = EventLog::new("first");
            let (me, trust) = (credentials.member_id(), credentials.trust().clone());
            let desk = IssuerDesk::open(
                authority,
                credentials,
                dir,
                gossip.clone(),
                metrics.clone(),
                events,
            );
            let desk = Arc::new(Mutex::new(desk.unwrap()));
            let door = serve(
                endpoint,
                queues.enrolment,
                Presence {
                    me,
                    name: "first".parse().unwrap(),
                    run: Run([1; 16]),
                    events: EventLog::new("first"),
                },
                desk.clone(),
                Arc::default(),
                metrics.clone(),
                tasks.clone(),
            );
            tasks.spawn("door", door);
            Self { desk, gossip, me, address, metrics, trust, tasks, dir: temporary }
        }

        async fn invite(&self, ttl_secs: u64, uses: u32) -> Token {
            let ttl = Duration::from_secs(ttl_secs);
            let options = InviteOptions { ttl, uses, name: None, services: None };
            self.desk.lock().await.invite(options, vec![self.address]).await.unwrap()
        }

        async fn join(&self, token: &Token, name: &str) -> Result<Welcome, KnockError> {
            let node = SecretKey::generate().unwrap();
            knock(token, &token.issuers, &node, &name.parse().unwrap(), false).await
        }

        /// A member enrolled `age_secs` ago, and the endpoint that it dials with.
        async fn member(&self, name: &str, age_secs: u64) -> (NodeCredentials, Endpoint) {
            let dir = DataDir::new(self.dir.path());
            let (mesh, genesis) = dir.genesis().unwrap().unwrap();
            let node = SecretKey::generate().unwrap();
            let enrolment = Enrolment {
                key: node.public_key(),
                name: name.parse().unwrap(),
                serial: 900,
                services: Some(vec!["web".parse().unwrap()]),
                issued_at: clock::unix_seconds() - age_secs,
                invite: None,
                replaces: Vec::new(),
                let_in_by: None,
            };
            let (entry, chain) = dir.authority().unwrap().unwrap().enrol(&enrolment).unwrap();
            self.gossip.publish(entry).await.unwrap().unwrap();
            let credentials = NodeCredentials::new(mesh, genesis, node, chain).unwrap();
            let endpoint = self.endpoint(&credentials);
            (credentials, endpoint)
        }

        fn root(&self) -> Root {
            let dir = DataDir::new(self.dir.path());
            let (mesh, genesis) = dir.genesis().unwrap().unwrap();
            let pem = dir.read("root.key").unwrap().unwrap();
            Root::new(mesh, &genesis, SecretKey::from_pem(&pem).unwrap()).unwrap()
        }

        fn endpoint(&self, credentials: &NodeCredentials) -> Endpoint {
            let (listen, limits) =
                ((Ipv4Addr::LOCALHOST, 0).into(), Limits { reset_secret: [7; 32] });
            let metrics = Metrics::new();
            Endpoint::bind(listen, credentials, &limits, &metrics, &self.tasks).unwrap().0
        }

        fn door(&self) -> At {
            At { member: None, address: self.address }
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
    async fn an_issuer_promises_no_more_uses_than_it_can_keep_track_of() {
        let founder = Founder::new().await;
        let options =
            |uses| InviteOptions { ttl: Duration::from_secs(60), uses, name: None, services: None };
        let mut desk = founder.desk.lock().await;
        desk.invite(options(10_000), vec![]).await.unwrap();
        let refused = desk.invite(options(10_000), vec![]).await;
        assert!(matches!(refused, Err(DeskError::TooManyInvites)), "{refused:?}");
        desk.invite(options(1_000), vec![]).await.unwrap();
        drop(desk);
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn a_newcomer_whose_answer_was_lost_may_ask_again() {
        let founder = Founder::new().await;
        let token = founder.invite(60, 1).await;
        let (node, name) = (SecretKey::generate().unwrap(), "b".parse().unwrap());
        for _ in 0..2 {
            knock(&token, &token.issuers, &node, &name, false).await.unwrap();
        }
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn a_replaced_key_stays_replaced_when_its_successor_asks_again() {
        let founder = Founder::new().await;
        let token = founder.invite(60, 3).await;
        let (lost, node) = (SecretKey::generate().unwrap(), SecretKey::generate().unwrap());
        let name = "b".parse().unwrap();
        knock(&token, &token.issuers, &lost, &name, false).await.unwrap();
        let lost = lost.public_key().member_id();
        for is_replacement in [true, true, false] {
            knock(&token, &token.issuers, &node, &name, is_replacement).await.unwrap();
            let member = node.public_key().member_id();
            let about = founder.gossip.entries_about(EntryKind::ENROLMENT, member).await.unwrap();
            let enrolment: Enrolment = wire::decode_payload(&about[0].payload()).unwrap();
            assert_eq!(enrolment.replaces, [lost]);
        }
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn whom_nobody_believes_any_more_is_not_renewed() {
        let founder = Founder::new().await;
        let (member, _endpoint) = founder.member("b", 1_800).await;
        let peer = Peer {
            id: member.member_id(),
            name: member.name().clone(),
            enrolment: member.enrolment().clone(),
            let_in_by: member.enrolment().signer().member_id(),
        };
        let leaf = wire::encode(&RenewalRequest::Leaf).unwrap();
        founder.desk.lock().await.answer_member(&peer, &leaf).await;
        assert_eq!(founder.refused("revoked"), 0);
        let replaced = Dismissed::new(Dismissals::default(), [], [peer.id].into());
        founder.trust.set_dismissed(replaced);
        founder.desk.lock().await.answer_member(&peer, &leaf).await;
        assert_eq!(founder.refused("revoked"), 1, "though it was let in before");
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn of_a_removed_issuers_members_replaced_ones_do_not_stay_and_none_is_of_the_future() {
        let founder = Founder::new().await;
        let key = SecretKey::generate().unwrap();
        let removed = key.public_key().member_id();
        let appointed = founder.root().appoint(&key.public_key(), founder.me).unwrap();
        let issuer: Issuer = wire::decode_payload(&appointed.payload()).unwrap();
        founder.gossip.publish(appointed).await.unwrap().unwrap();
        let dir = DataDir::new(founder.dir.path());
        let (mesh, genesis) = dir.genesis().unwrap().unwrap();
        let thief = Authority::new(mesh, &genesis, key, &issuer.certificate).unwrap();
        let mut let_in = Vec::new();
        for (name, issued_at) in [("early", 1_000), ("late", u64::MAX), ("replaced", 1_000)] {
            let node = SecretKey::generate().unwrap();
            let enrolment = Enrolment {
                key: node.public_key(),
                name: name.parse().unwrap(),
                serial: 1,
                services: None,
                issued_at,
                invite: None,
                replaces: Vec::new(),
                let_in_by: None,
            };
            let (kind, id) = (EntryKind::ENROLMENT, node.public_key().member_id());
            let payload = wire::encode_payload(&enrolment).unwrap();
            let entry = thief.sign_entry(kind, *id.as_bytes(), 1, &payload).unwrap();
            founder.gossip.publish(entry).await.unwrap().unwrap();
            let_in.push(id);
        }
        let replaced = Dismissed::new(Dismissals::default(), [], [let_in[2]].into());
        founder.trust.set_dismissed(replaced);
        let parting = founder.desk.lock().await.keep_members(removed, &[]).await.unwrap();
        let mut stay: Vec<_> = parting.kept.into_iter().map(|(_, name)| name.to_string()).collect();
        stay.sort();
        assert_eq!(stay, ["early", "late"]);
        founder.tasks.stop().await;
    }

    /// Another issuer, whose key may be in other hands.
    async fn second_issuer(founder: &Founder) -> Authority {
        let key = SecretKey::generate().unwrap();
        let appointed = founder.root().appoint(&key.public_key(), founder.me).unwrap();
        let issuer: Issuer = wire::decode_payload(&appointed.payload()).unwrap();
        founder.gossip.publish(appointed).await.unwrap().unwrap();
        let (mesh, genesis) = DataDir::new(founder.dir.path()).genesis().unwrap().unwrap();
        Authority::new(mesh, &genesis, key, &issuer.certificate).unwrap()
    }

    /// Lets a member in as `authority`. Returns its id.
    async fn let_in(
        founder: &Founder,
        authority: &Authority,
        name: &str,
        replaces: Vec<MemberId>,
    ) -> (MemberId, crate::model::Entry) {
        let node = SecretKey::generate().unwrap();
        let enrolment = Enrolment {
            key: node.public_key(),
            name: name.parse().unwrap(),
            serial: 1,
            services: None,
            issued_at: clock::unix_seconds(),
            invite: None,
            replaces,
            let_in_by: None,
        };
        let (entry, _) = authority.enrol(&enrolment).unwrap();
        founder.gossip.publish(entry.clone()).await.unwrap().unwrap();
        (node.public_key().member_id(), entry)
    }

    #[tokio::test]
    async fn a_renewal_and_a_grant_tell_who_let_the_member_in() {
        let founder = Founder::new().await;
        let other = second_issuer(&founder).await;
        let (renewed, entry) = let_in(&founder, &other, "renewed", vec![]).await;
        let (granted, _) = let_in(&founder, &other, "granted", vec![]).await;
        let mut desk = founder.desk.lock().await;
        desk.renew(renewed, &entry).await.unwrap();
        desk.grant(granted, None).await.unwrap();
        let first = desk_key(&founder);
        for member in [renewed, granted] {
            let about = founder.gossip.entries_about(EntryKind::ENROLMENT, member).await.unwrap();
            let own = about.iter().find(|entry| entry.key().owner == first).unwrap();
            let said: Enrolment = wire::decode_payload(&own.payload()).unwrap();
            assert_eq!(said.let_in_by, Some(other.key().public_key().member_id()));
        }
        drop(desk);
        founder.tasks.stop().await;
    }

    fn desk_key(founder: &Founder) -> MemberId {
        let dir = DataDir::new(founder.dir.path());
        dir.issuing_key().unwrap().public_key().member_id()
    }

    #[tokio::test]
    async fn who_goes_with_an_issuer_is_named_by_name_or_id_and_takes_along_what_it_replaced() {
        let founder = Founder::new().await;
        let other = second_issuer(&founder).await;
        let issuer = other.key().public_key().member_id();
        let (old, _) = founder.member("web", 60).await;
        let old = old.member_id();
        let (new, shown) = let_in(&founder, &other, "web", vec![old]).await;
        let (one, _) = let_in(&founder, &other, "twin", vec![]).await;
        let (two, _) = let_in(&founder, &other, "twin", vec![]).await;
        let (honest, _) = founder.member("honest", 60).await;
        founder.trust.set_dismissed(Dismissed::new(Dismissals::default(), [], [old].into()));
        let mut desk = founder.desk.lock().await;
        desk.renew(new, &shown).await.unwrap(); // it would dodge what follows
        let named = |name: &str| [name.parse().unwrap()];
        let both = desk.keep_members(issuer, &named("twin")).await.unwrap_err().to_string();
        assert!(both.contains(&one.to_string()) && both.contains(&two.to_string()), "{both}");
        for (name, refusal) in [("nobody", "no member"), ("honest", "by another issuer")] {
            let refused = desk.keep_members(issuer, &named(name)).await.unwrap_err().to_string();
            assert!(refused.contains(refusal), "{refused}");
        }
        for name in ["web", &new.to_string(), &new.to_string()[..12]] {
            let parting = desk.keep_members(issuer, &named(name)).await.unwrap();
            let ids = |all: &[(MemberId, crate::model::MemberName)]| -> Vec<_> {
                all.iter().map(|(id, _)| *id).collect()
            };
            assert_eq!((ids(&parting.dropped), &parting.replaced[..]), (vec![new], &[old][..]));
            let kept = ids(&parting.kept);
            assert!(kept.contains(&one) && kept.contains(&two), "{kept:?}");
            assert!(!kept.contains(&honest.member_id()), "it stays anyway");
        }
        drop(desk);
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn an_issuing_key_that_the_root_took_back_is_given_up_for_another() {
        let founder = Founder::new().await;
        let mut desk = founder.desk.lock().await;
        let before = desk.issuing_key().await.unwrap();
        assert_eq!(desk.issuing_key().await.unwrap(), before, "it is active");
        let about = founder.gossip.entries_about(EntryKind::ISSUER, before.member_id()).await;
        let about = about.unwrap().remove(0);
        let issuer: Issuer = wire::decode_payload(&about.payload()).unwrap();
        let epoch = about.version().epoch;
        let gone = founder.root().dismiss(&issuer, epoch, Vec::new(), Vec::new()).unwrap();
        founder.gossip.publish(gone).await.unwrap().unwrap();
        let after = desk.issuing_key().await.unwrap();
        assert_ne!(after, before);
        assert_eq!(desk.issuing_key().await.unwrap(), after, "once");
        assert!(DataDir::new(founder.dir.path()).authority().unwrap().is_none());
        drop(desk);
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn newcomer_waits_for_a_place_while_its_neighbours_take_all_of_their_share() {
        let founder = Founder::new().await;
        let token = founder.invite(60, 1).await;
        let socket = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let config = client_config(Plane::Enrolment, joiner_config(&token).unwrap()).unwrap();
        let mut silent = Vec::new();
        for _ in 0..8 {
            let name = server_name(None);
            let connecting = socket.connect_with(config.clone(), founder.address, &name).unwrap();
            silent.push(connecting.await.unwrap());
        }
        let turned_away = async {
            while founder.refused("over_share") == 0 {
                tokio::task::yield_now().await;
            }
            silent.pop(); // dropped: closed
        };
        let (joined, ()) = tokio::join!(founder.join(&token, "b"), turned_away);
        joined.unwrap();
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
    async fn a_leaf_is_renewed_for_the_same_key_name_and_services_and_no_longer_than_the_mesh_says()
    {
        let founder = Founder::new().await;
        let (old, endpoint) = founder.member("b", 1_800).await;
        let (leaf, skew) = ask_leaf(&endpoint, founder.door()).await.unwrap();
        assert!(skew.0.abs() < 5.0, "one machine has one clock: {skew:?}");
        let renewed = old.renewed(leaf.chain).unwrap();
        assert_eq!(renewed.member_id(), old.member_id());
        assert_eq!(renewed.enrolled().services, old.enrolled().services);
        assert_ne!(renewed.enrolled().serial, old.enrolled().serial);
        assert_eq!(renewed.expires_at() - renewed.enrolled().issued_at, 3_600);
        assert!(renewed.expires_at() >= old.expires_at() + 1_800);
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn whoever_asks_again_soon_gets_the_same_enrolment_again() {
        let founder = Founder::new().await;
        let (old, endpoint) = founder.member("b", 60).await;
        for _ in 0..2 {
            let (leaf, _) = ask_leaf(&endpoint, founder.door()).await.unwrap();
            let again = old.renewed(leaf.chain).unwrap();
            assert_eq!(again.enrolment(), old.enrolment(), "no new serial, no write, no gossip");
        }
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn an_ended_leaf_opens_the_renewal_door() {
        let founder = Founder::new().await;
        let (late, endpoint) = founder.member("late", 4_000).await;
        let (leaf, _) = ask_leaf(&endpoint, founder.door()).await.unwrap();
        late.renewed(leaf.chain).unwrap();
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn only_active_issuers_renew_and_only_whom_an_active_issuer_vouches_for() {
        let founder = Founder::new().await;
        let (_, endpoint) = founder.member("b", 1_800).await;
        let dir = DataDir::new(founder.dir.path());
        let issuer = dir.authority().unwrap().unwrap().key().public_key();
        let first = founder.root().appoint(&issuer, founder.me).unwrap();
        let epoch = first.version().epoch;
        let first = wire::decode_payload::<Issuer>(&first.payload()).unwrap();
        let dismissed = founder.root().dismiss(&first, epoch, Vec::new(), Vec::new()).unwrap();
        founder.gossip.publish(dismissed).await.unwrap().unwrap();
        let refused = ask_leaf(&endpoint, founder.door()).await.unwrap_err();
        assert!(matches!(refused, AskError::Refused(RenewalRefusal::NotIssuer)), "{refused}");
        // A fresh issuer is active, and whom only the dismissed one vouched for is nobody to it.
        std::fs::remove_file(dir.file("issuer.key")).unwrap();
        let fresh = dir.issuing_key().unwrap().public_key();
        let appointed = founder.root().appoint(&fresh, founder.me).unwrap();
        founder.gossip.publish(appointed.clone()).await.unwrap().unwrap();
        let appointed = wire::decode_payload(&appointed.payload()).unwrap();
        assert!(founder.desk.lock().await.appoint(&appointed).unwrap());
        let refused = ask_leaf(&endpoint, founder.door()).await.unwrap_err();
        assert!(matches!(refused, AskError::Refused(RenewalRefusal::Revoked)), "{refused}");
        assert_eq!((founder.refused("not_issuer"), founder.refused("revoked")), (1, 1));
        founder.tasks.stop().await;
    }

    #[tokio::test]
    async fn a_stranger_opens_no_renewal_door() {
        let (founder, other) = (Founder::new().await, Founder::new().await);
        let (_, endpoint) = other.member("b", 0).await;
        let refused = ask_time(&endpoint, founder.door()).await.unwrap_err();
        assert!(matches!(refused, AskError::Dial(_)), "{refused}");
        assert_eq!(founder.refused("other_mesh"), 1);
        other.tasks.stop().await;
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
