//! Whole agents inside one process, as a program that embeds murmesh runs them.

use std::time::Duration;

use murmesh::agent::{Agent, JoinOptions, StartError, Stopped, join};
use murmesh::api::{Control, ExposeSpec, UpstreamSpec};
use murmesh::catalogue::record_key;
use murmesh::config::Settings;
use murmesh::model::{MemberId, MemberPhase, MemberRecord, MemberState, Target, Unlisted};
use murmesh::tls::store::{DataDir, InitOptions, init};
use murmesh::transport::enrolment::InviteOptions;
use murmesh::wire::decode_payload;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use crate::support::{SOON, beside_others};

async fn found(name: &str) -> (Agent, tempfile::TempDir) {
    let temporary = tempfile::tempdir().unwrap();
    let dir = DataDir::new(temporary.path());
    let cert_ttl = Duration::from_secs(3_600);
    let name = name.parse().unwrap();
    init(&dir, &InitOptions { name, unlisted: Unlisted::Allow, cert_ttl }).unwrap();
    (Agent::start(Settings::local(dir)).await.unwrap(), temporary)
}

async fn join_through(founder: &Agent, name: &str) -> (Agent, tempfile::TempDir) {
    let temporary = tempfile::tempdir().unwrap();
    let options =
        InviteOptions { ttl: Duration::from_secs(60), uses: 1, name: None, services: None };
    let invite = founder.ask(|reply| Control::Invite { options, reply }).await.unwrap();
    let report = join(JoinOptions {
        data_dir: temporary.path().to_owned(),
        token: invite.token,
        name: name.parse().unwrap(),
        seeds: vec![],
    })
    .await
    .unwrap();
    let mut settings = Settings::local(DataDir::new(temporary.path()));
    settings.seeds.value =
        report.seeds.iter().map(|seed| seed.to_string().parse().unwrap()).collect();
    (Agent::start(settings).await.unwrap(), temporary)
}

/// Waits until `agent` sees `count` members alive.
async fn sees(agent: &Agent, count: usize) {
    let alive = || {
        let snapshot = agent.snapshot();
        snapshot.members.values().filter(|member| member.state == MemberState::Alive).count()
    };
    let seen = timeout(SOON, async {
        while alive() != count {
            sleep(Duration::from_millis(5)).await;
        }
    });
    let name = agent.credentials().name();
    seen.await.unwrap_or_else(|_| panic!("{name} sees {} of {count} members", alive()));
}

#[tokio::test]
async fn three_agents_find_each_other_and_carry_bytes() {
    let _turn = beside_others();
    let (a, a_dir) = found("a").await;
    timeout(SOON, a.ready()).await.expect("a lone agent is ready");
    let (b, b_dir) = join_through(&a, "b").await;
    let (c, c_dir) = join_through(&a, "c").await;
    for agent in [&a, &b, &c] {
        sees(agent, 3).await;
        timeout(SOON, agent.ready()).await.expect("ready");
    }

    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = Target::Tcp(server.local_addr().unwrap());
    let spec = ExposeSpec::new("echo".parse().unwrap(), to).unwrap();
    c.ask(|reply| Control::Expose { spec, reply }).await.unwrap();
    let listen = "127.0.0.1:0".parse().unwrap();
    let spec = UpstreamSpec { service: "echo".parse().unwrap(), listen };
    let upstream = b.ask(|reply| Control::Upstream { spec, reply }).await.unwrap();
    let known = timeout(SOON, async {
        while b.snapshot().services.is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    known.await.expect("the service is known");

    let Target::Tcp(address) = upstream.listen else { panic!("a TCP entry") };
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let (mut served, _) = timeout(SOON, server.accept()).await.unwrap().unwrap();
    let mut heard = Vec::new();
    served.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"hello", "what was said, to its end");
    served.write_all(b"goodbye").await.unwrap();
    drop(served);
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"goodbye");

    let last_words = |dir: &tempfile::TempDir, id: MemberId| {
        let entries = DataDir::new(dir.path()).entries().unwrap();
        let own = entries.iter().find(|entry| entry.key() == record_key(id)).unwrap();
        decode_payload::<MemberRecord>(&own.payload()).unwrap().phase
    };
    for (agent, dir, phase) in [
        (c, &c_dir, MemberPhase::Left),
        (b, &b_dir, MemberPhase::Restarting),
        (a, &a_dir, MemberPhase::Restarting),
    ] {
        let id = agent.credentials().member_id();
        assert_eq!(agent.stop(phase, SOON).await, Stopped::Drained);
        assert_eq!(last_words(dir, id), phase, "the last state is the one on disk");
    }
    let again = Agent::start(Settings::local(DataDir::new(c_dir.path()))).await;
    assert!(matches!(again, Err(StartError::Left { .. })), "left lasts");
}
