//! A member that was taken over: it hurts what it owns, others are told its name, and everybody else is
//! served as if nothing happened.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use murmesh::membership::{Belief, Identity, MemberUpdate, rumour};
use murmesh::model::{Entry, EntryKey, EntryKind, Epoch, MemberId};
use murmesh::tls::store::DataDir;
use murmesh::tls::{Plane, server_name};
use murmesh::transport::refusal;
use murmesh::wire;
use tokio::time::timeout;

use crate::support::turncoat::{Said, Session, Turncoat, identities, kind, of_entries};
use crate::support::{
    Agent, Kind, Noise, SOON, Server, TestMesh, ask, beside_others, check, dial, enrol, eventually,
    runtime, until,
};

const HONEST: [&str; 3] = ["near", "far", "third"];

/// Three honest agents with calls from the first to the second all the time, and one that was taken
/// over.
struct Scene {
    mesh: TestMesh,
    _web: Server,
    calls: Calls,
    mallory: Turncoat,
    sessions: Vec<Session>,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let mesh = TestMesh::of(&HONEST);
        let web = Server::start(Kind::Named("far".to_owned()));
        mesh.agent("far").expose("web", web.address);
        mesh.agent("near").wait_endpoints("web", 1);
        let enrolled = Agent::new(&mesh.home, "mallory");
        enrol(&enrolled, &mesh.invite(1));
        let mallory = Turncoat::new(&enrolled);
        let sessions: Vec<_> = mesh.agents.iter().map(|agent| mallory.gossip(agent)).collect();
        for agent in &mesh.agents {
            agent.wait_alive(4, SOON);
        }
        let calls = Calls::start(mesh.agent("near").upstream("web"));
        Self { mesh, _web: web, calls, mallory, sessions }
    }

    /// Each agent with the connection that mallory has to it.
    fn victims(&self) -> impl Iterator<Item = (&Agent, &Session)> {
        self.mesh.agents.iter().zip(&self.sessions)
    }

    /// Waits until every agent has counted something dropped for this reason.
    #[track_caller]
    fn assert_dropped(&self, reason: &str) {
        self.assert_counted("murmesh_gossip_dropped_total", reason);
    }

    #[track_caller]
    fn assert_counted(&self, metric: &str, reason: &str) {
        let label = format!("reason=\"{reason}\"");
        for agent in &self.mesh.agents {
            eventually(&format!("{} counts {reason}", agent.name), SOON, || {
                check(agent.metric(metric, &[&label]) > 0.0, "none")
            });
        }
    }

    /// Waits until every agent names mallory in an event of this kind with these words.
    #[track_caller]
    fn assert_blamed(&self, kind: &str, words: &str) {
        for agent in &self.mesh.agents {
            eventually(&format!("{} tells {kind}: {words}", agent.name), SOON, || {
                let told = agent.events(kind);
                let is_meant = |event: &serde_json::Value| {
                    event["subject"] == "mallory"
                        && event["reason"].as_str().is_some_and(|reason| reason.contains(words))
                };
                check(told.iter().any(is_meant), &told)
            });
        }
    }

    /// No call failed, nobody honest was ever taken for dead or blamed, and all agents are well.
    #[track_caller]
    fn assert_unharmed(self) {
        // What mallory did may have taken less time than a few calls do.
        eventually("calls go on", SOON, || {
            let answered = self.calls.answered.load(Ordering::Relaxed);
            check(answered > 10 || self.calls.caller.is_finished(), answered)
        });
        let (answered, errors) = self.calls.stop();
        assert!(errors.is_empty(), "{} of {answered} calls: {:?}", errors.len(), errors[0]);
        assert!(answered > 10, "{answered} calls");
        for agent in &self.mesh.agents {
            let turn = agent.metric("murmesh_gossip_turn_seconds_max", &[]);
            println!("{}: {answered} calls; longest turn {turn:.3} s", agent.name);
            assert_eq!(agent.try_get("/ready").unwrap().status, 200, "{}", agent.name);
            for kind in ["member_down", "gossip_refused", "entry_refused", "isolated"] {
                let told = agent.events(kind);
                let honest = told.iter().filter(|event| event["subject"] != "mallory");
                let honest: Vec<_> = honest.collect();
                assert!(honest.is_empty(), "{} tells of {kind}: {honest:?}", agent.name);
            }
            for name in HONEST {
                let state = agent.state_of(name);
                assert!(matches!(state.as_str(), "alive" | "suspect"), "{name} is {state}");
            }
            assert!(!agent.log().contains("panicked"), "{} panicked", agent.name);
        }
    }
}

/// One call after the other, until told to stop.
struct Calls {
    is_over: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    caller: JoinHandle<Vec<std::io::Error>>,
}

impl Calls {
    fn start(entry: SocketAddr) -> Self {
        let (is_over, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (end, count) = (Arc::clone(&is_over), Arc::clone(&answered));
        let caller = std::thread::spawn(move || {
            let mut errors = Vec::new();
            while !end.load(Ordering::Relaxed) {
                match ask(entry, "who?") {
                    Ok(_) => drop(count.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => errors.push(error),
                }
                std::thread::park_timeout(Duration::from_millis(5));
            }
            errors
        });
        Self { is_over, answered, caller }
    }

    fn stop(self) -> (u64, Vec<std::io::Error>) {
        self.is_over.store(true, Ordering::Relaxed);
        let errors = self.caller.join().unwrap();
        (self.answered.load(Ordering::Relaxed), errors)
    }
}

/// Calls `fault` again and again for a while.
fn for_seconds(seconds: u64, pause: Duration, mut fault: impl FnMut(u64)) {
    let begun = Instant::now();
    for round in 0.. {
        let at = begun + pause * u32::try_from(round).unwrap();
        if at > begun + Duration::from_secs(seconds) {
            return;
        }
        until(at);
        fault(round);
    }
}

#[test]
fn a_member_that_lies_about_all_others_kills_nobody_and_is_named() {
    let _turn = beside_others();
    let scene = Scene::new();
    let mallory = &scene.mallory;
    for_seconds(12, Duration::from_millis(200), |_| {
        let known = identities(scene.mesh.agent("near"));
        for (victim, session) in scene.victims() {
            let to = known[&victim.name];
            let others =
                known.values().filter(|other| ![to.id, mallory.identity.id].contains(&other.id));
            let lies: Vec<_> = others.flat_map(lies_about).collect();
            session.datagram(mallory.packet(to, Said::Gossip, &lies));
            let states = [vec![kind::STATES], wire::encode(&lies).unwrap()].concat();
            session.message(states);
            // Of the victim itself, to its face.
            let suspected =
                MemberUpdate { identity: to, incarnation: 9_000, belief: Belief::Suspect };
            session.datagram(mallory.packet(to, Said::Gossip, &[suspected]));
            session.message([vec![kind::CONVICTED], wire::encode(&to).unwrap()].concat());
            session.datagram(mallory.packet(to, Said::TurnUndead, &[]));
        }
    });
    for reason in [
        "absurd_incarnation",
        "incarnation_jump",
        "other_address",
        "false_death",
        "renewal_refused",
    ] {
        scene.assert_dropped(reason);
    }
    scene.assert_blamed("gossip_refused", "is dead, which answers");
    scene.assert_blamed("gossip_refused", "absurd_incarnation");
    scene.assert_unharmed();
}

fn lies_about(victim: &Identity) -> Vec<MemberUpdate> {
    let victim = *victim;
    let said = |identity, incarnation, belief| MemberUpdate { identity, incarnation, belief };
    let elsewhere = Identity { address: ([127, 0, 0, 1], 9).into(), ..victim };
    let later = Identity { epoch: Epoch(victim.epoch.0 + 1), ..victim };
    vec![
        said(victim, 0, Belief::Down),
        said(victim, 0, Belief::Suspect),
        said(victim, 7, Belief::Suspect),
        said(victim, 30_000, Belief::Suspect),
        said(victim, u16::MAX, Belief::Alive),
        said(elsewhere, 0, Belief::Alive),
        said(later, 0, Belief::Down),
    ]
}

#[test]
fn a_member_that_forges_replays_and_signs_without_end_is_refused_and_named() {
    let _turn = beside_others();
    let scene = Scene::new();
    let mallory = &scene.mallory;
    let entries = |entries: Vec<Entry>| [vec![kind::ENTRIES], of_entries(entries)].concat();
    // What others signed a while ago: "far" has published since.
    let known = stored(scene.mesh.agent("near"));
    let far = identities(scene.mesh.agent("near"))["far"].id;
    let is_of_far =
        |entry: &&Entry| entry.key().kind == EntryKind::RECORD && entry.key().owner == far;
    let old = known.iter().find(is_of_far).unwrap().clone();
    let cache = Server::start(Kind::Named("far".to_owned()));
    scene.mesh.agent("far").expose("cache", cache.address);
    for agent in &scene.mesh.agents {
        agent.wait_endpoints("cache", 1);
    }
    let mut forged = old.bytes().to_vec();
    let version_at = 1 + 2 + 32 + 16 + 8;
    forged[version_at] = 0x7f; // far above what its owner has signed
    let forged = Entry::decode(forged.into()).unwrap();
    let mut version = 100;
    for_seconds(6, Duration::from_millis(50), |_| {
        for (_, session) in scene.victims() {
            session.message(entries(vec![old.clone(), forged.clone()]));
            let ever_new = (version..version + 200).map(|version| mallory.record(version));
            session.message(entries(ever_new.collect()));
            let stranger = (version..version + 50)
                .map(|version| mallory.sign(EntryKind::INVITE, Epoch(1), version, b"not mine"));
            session.message(entries(stranger.collect()));
        }
        version += 200;
    });
    scene.assert_dropped("outdated_entry");
    for reason in ["signature", "over_rate"] {
        scene.assert_counted("murmesh_gossip_entries_refused_total", reason);
    }
    scene.assert_blamed("entry_refused", "signature");
    scene.assert_blamed("entry_refused", "faster than others take them");
    for agent in &scene.mesh.agents {
        assert_eq!(agent.ready_endpoints("cache"), 1, "an old record came back");
    }
    // And once it is quiet its last word is taken like anybody's.
    let last = mallory.record(version + 1);
    for (agent, session) in scene.victims() {
        eventually(&format!("{} takes the last word", agent.name), SOON, || {
            session.message(entries(vec![last.clone()]));
            let listed = agent.get("/v1/mesh/members");
            let found =
                listed.as_array().unwrap().iter().find(|member| member["name"] == "mallory");
            let seen = found.unwrap()["version"].as_u64();
            check(seen == Some(version + 1), seen)
        });
    }
    scene.assert_unharmed();
}

/// What an agent has on disk, once it is there.
fn stored(agent: &Agent) -> Vec<Entry> {
    let dir = DataDir::new(&agent.data_dir);
    let is_record = |entry: &&Entry| entry.key().kind == EntryKind::RECORD;
    let mut entries = Vec::new();
    eventually("all records are on disk", SOON, || {
        entries = dir.entries().unwrap();
        check(entries.iter().filter(is_record).count() == 4, &entries)
    });
    entries
}

#[test]
fn a_member_that_floods_the_gossip_plane_with_questions_hints_and_junk_is_bounded_and_named() {
    let _turn = beside_others();
    let scene = Scene::new();
    let mallory = &scene.mallory;
    let before: Vec<_> = scene.mesh.agents.iter().map(Agent::memory).collect();
    let junk = |seed: u64, len: usize| {
        let mut bytes = vec![0; len];
        Noise::new(seed, len as u64).fill(&mut bytes);
        bytes
    };
    let with = |kind: u8, body: Vec<u8>| [vec![kind], body].concat();
    let all: Vec<u8> = (0..64).collect();
    let nothing: Vec<(EntryKey, u64)> = Vec::new();
    let no_states: Vec<MemberUpdate> = Vec::new();
    let everybody: Vec<MemberId> =
        identities(scene.mesh.agent("near")).values().map(|member| member.id).collect();
    let questions = [
        with(kind::ROOTS, wire::encode(&(1_u64, 1_u64)).unwrap()),
        with(kind::SUMS, wire::encode(&(vec![1_u64; 64], vec![1_u64; 64])).unwrap()),
        with(kind::LISTING, wire::encode(&(&all, nothing, &all, no_states)).unwrap()),
        with(
            kind::WANT,
            wire::encode(&(vec![everybody; 64].concat(), Vec::<EntryKey>::new())).unwrap(),
        ),
    ];
    for_seconds(8, Duration::from_millis(20), |round| {
        let known = identities(scene.mesh.agent("near"));
        for (victim, session) in scene.victims() {
            let to = known[&victim.name];
            for question in &questions {
                (0..8).for_each(|_| session.message(question.clone()));
            }
            // Garbage in every kind of message, and behind the last.
            let seed = round + 1;
            for kind in 0..=12_u8 {
                session.message(with(kind, junk(seed, 300)));
                session.message(with(kind, vec![0xff; 300]));
            }
            if round % 16 == 0 {
                session.message(with(kind::ENTRIES, junk(seed, (1 << 20) - 1)));
                session.message(with(kind::STATES, junk(seed, 1 << 20)));
            }
            let mut hints = mallory.packet(to, Said::Gossip, &[]);
            while hints.len() < 1_050 {
                let hint = hint(&junk(hints.len() as u64 ^ (round << 16) ^ 1, 32));
                hints.extend(u16::try_from(hint.len()).unwrap().to_be_bytes());
                hints.extend(hint);
            }
            (0..20).for_each(|_| session.datagram(hints.clone()));
            (0..200).for_each(|_| session.datagram(mallory.packet(to, Said::Announce, &[])));
            session.datagram(junk(seed, 1_100));
            let elsewhere = Identity { address: ([127, 0, 0, 1], 9).into(), ..mallory.identity };
            let hello = wire::encode(&(elsewhere, true, false, (1_u64, 1_u64))).unwrap();
            session.message(with(kind::HELLO, hello));
        }
    });
    for reason in ["malformed", "framing", "unknown_kind", "over_allowance"] {
        scene.assert_dropped(reason);
    }
    for words in ["malformed", "framing"] {
        scene.assert_blamed("gossip_refused", words);
    }
    for (agent, before) in scene.mesh.agents.iter().zip(before) {
        let grown = agent.memory().saturating_sub(before) >> 20;
        assert!(grown < 150, "{} grew by {grown} MiB", agent.name);
    }
    scene.assert_unharmed();
}

/// A hint of an entry that nobody has: its owner and subject are junk.
fn hint(junk: &[u8]) -> Vec<u8> {
    let (owner, subject): ([u8; 16], [u8; 16]) =
        (junk[..16].try_into().unwrap(), junk[16..].try_into().unwrap());
    let place = wire::encode(&(EntryKind(999), MemberId::from_bytes(owner), Some(subject)));
    let news = wire::encode(&(Epoch(1), 1_u64, [0_u8; 8])).unwrap();
    rumour(&place.unwrap(), &news).unwrap().to_vec()
}

#[test]
fn a_member_that_floods_the_data_plane_has_its_share_and_no_more() {
    let _turn = beside_others();
    let scene = Scene::new();
    let far = scene.mesh.agent("far");
    let tls = scene.mallory.credentials.client_config(Plane::Data).unwrap();
    let opened = runtime().block_on(async {
        let mut opened = Vec::new();
        for _ in 0..40 {
            let marker = Plane::Data.marker();
            let from = std::net::Ipv4Addr::LOCALHOST.into();
            let (endpoint, dialled) = dial(from, far.mesh, tls.clone(), marker, &server_name(None));
            opened.push((endpoint, timeout(SOON, dialled).await.expect("an answer").unwrap()));
        }
        opened
    });
    let is_refused = |(_, connection): &&(_, quinn::Connection)| {
        connection.close_reason().is_some_and(|why| refusal(&why) == Some("overload"))
    };
    eventually("eight are served and all others refused", SOON, || {
        let refused = opened.iter().filter(is_refused).count();
        check(refused == 32, refused)
    });
    let mut junk = vec![0; 4_096];
    Noise::new(1, 4_096).fill(&mut junk);
    for (_, connection) in opened.iter().filter(|open| !is_refused(open)) {
        runtime().block_on(async {
            for _ in 0..90 {
                let Ok(Ok((mut send, _))) = timeout(SOON, connection.open_bi()).await else {
                    return;
                };
                let _ = send.write_all(&junk).await;
                let _ = send.finish();
            }
        });
    }
    eventually("junk is counted", SOON, || {
        let labels = ["door=\"mesh\"", "reason=\"malformed\""];
        check(far.metric("murmesh_refused_total", &labels) > 0.0, far.refusals())
    });
    drop(opened);
    scene.assert_unharmed();
}
