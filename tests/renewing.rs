//! Identity that keeps itself alive: leaves that are renewed under load, issuers that are away, whole
//! meshes that were off for too long. Leaves of seconds stand for leaves of a week.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use murmesh::tls::NodeCredentials;
use murmesh::tls::store::DataDir;

use crate::support::{
    Agent, Kind, Server, TestMesh, ask, beside_others, calmly, check, enrol, eventually, sized,
    until,
};
use crate::surviving::{assert_no_lie_and_no_hang, failed, load};

const SOON: Duration = Duration::from_secs(15);

/// A mesh of agents with these names whose leaves live for `ttl_secs`.
#[track_caller]
fn mesh_of(names: &[&str], ttl_secs: u64) -> TestMesh {
    let mut mesh = TestMesh::new();
    let first = Agent::new(&mesh.home, names[0]);
    let (at, ttl) = (first.mesh.to_string(), format!("{ttl_secs}s"));
    let init = ["init", "--name", names[0], "--mesh", &at, "--advertise", &at, "--cert-ttl", &ttl];
    first.run(&init).ok();
    first.start();
    mesh.agents.push(first);
    let token = mesh.invite(names.len());
    for name in &names[1..] {
        mesh.join(name, &token);
    }
    wait_all(&mesh);
    mesh
}

#[track_caller]
fn wait_all(mesh: &TestMesh) {
    for agent in &mesh.agents {
        agent.wait_alive(mesh.agents.len(), Duration::from_secs(20));
    }
}

/// The identity that an agent would start with now.
fn on_disk(agent: &Agent) -> NodeCredentials {
    DataDir::new(&agent.data_dir).credentials().unwrap()
}

fn renewals(agent: &Agent) -> f64 {
    agent.metric("murmesh_cert_renewals_total", &["result=\"success\""])
}

/// Waits until an agent's leaf has ended. Certificates know whole seconds, and hold for the last one.
fn wait_end_of_leaf(agent: &Agent) {
    let end = Duration::from_secs(on_disk(agent).expires_at() + 1);
    eventually("the leaf ends", Duration::from_secs(90), || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        check(now > end, end.saturating_sub(now))
    });
}

/// What is wrong, as `status` says.
fn degraded(agent: &Agent) -> Option<String> {
    agent.get("/v1/agent/self")["Mesh"]["degraded"].as_str().map(str::to_owned)
}

/// The life of a mesh in short: leaves of 10 s in the short form, of a minute in the long one.
#[test]
fn every_member_renews_again_and_again_and_no_request_fails() {
    let _turn = calmly();
    let ttl = sized(10, 60);
    let names = ["issuer", "second", "server", "one", "two", "three"];
    let mesh = mesh_of(&names[..sized(4, 6)], ttl);
    let [issuer, second, server, callers @ ..] = &mesh.agents[..] else { panic!("four agents") };
    issuer.run(&["issuer", "add", "second"]).ok();
    eventually("the second issues, too", SOON, || {
        check(!second.events("issuer_appointed").is_empty(), "not yet")
    });
    let web = Server::start(Kind::Named("web".to_owned()));
    server.expose("web", web.address);
    let entries: Vec<_> = callers.iter().map(|agent| agent.upstream("web")).collect();
    for caller in callers {
        caller.wait_endpoints("web", 1);
    }
    let before: Vec<_> = mesh.agents.iter().map(on_disk).collect();

    let mut renewed_before = [0.0; 2];
    let calls = load(&entries, |load| {
        load.go_on_for(Duration::from_secs(sized(7, 240)));
        // All issuers are away for half a life: whoever is due meanwhile has to wait.
        renewed_before = [issuer, second].map(renewals);
        [issuer, second].into_iter().for_each(Agent::stop);
        load.go_on_for(Duration::from_secs(ttl / 2));
        [issuer, second].into_iter().for_each(Agent::start);
        // Live connections outlive their leaves; a restart means new handshakes with everybody.
        second.wait_endpoints("web", 1);
        ask(second.upstream("web"), "new handshakes").unwrap();
        load.go_on_for(Duration::from_secs(sized(8, 330)));
    });
    let mut times: Vec<_> = calls.iter().map(|call| call.took).collect();
    times.sort();
    eprintln!(
        "{} calls in {:?}, {} failed, p99 {:?}, longest {:?}",
        calls.len(),
        calls.last().map(|call| call.started + call.took),
        failed(&calls).len(),
        times[times.len() * 99 / 100],
        times.last(),
    );
    assert_no_lie_and_no_hang(&calls);
    assert!(calls.len() > 100, "{} calls are no load", calls.len());
    assert!(failed(&calls).is_empty(), "{} of {}", failed(&calls).len(), calls.len());

    for (number, (agent, before)) in mesh.agents.iter().zip(&before).enumerate() {
        let now = on_disk(agent);
        assert_eq!(now.member_id(), before.member_id(), "the key stays");
        assert_eq!(now.enrolled().services, before.enrolled().services);
        assert!(now.enrolled().issued_at > before.enrolled().issued_at, "{}", agent.name);
        let mode = fs::metadata(agent.data_dir.join("node.crt")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        eventually(&format!("{} is not degraded", agent.name), SOON, || {
            check(degraded(agent).is_none(), degraded(agent))
        });
        let count = renewals(agent) + renewed_before.get(number).unwrap_or(&0.0);
        eprintln!("{} renewed {count} times", agent.name);
        assert!(count >= sized(2.0, 10.0), "{} renewed {count} times", agent.name);
        let expired = agent.metric("murmesh_refused_total", &["reason=\"expired\""]);
        assert_eq!(expired, 0.0, "{} refused a member", agent.name);
    }

    // The whole mesh is off for longer than any leaf lives.
    mesh.agents.iter().for_each(Agent::stop);
    mesh.agents.iter().for_each(wait_end_of_leaf);
    mesh.agents.iter().for_each(Agent::spawn);
    let started = Instant::now();
    for agent in &mesh.agents {
        agent.wait_ready();
    }
    wait_all(&mesh);
    eprintln!("the mesh was whole again after {:?}", started.elapsed());
    for agent in &mesh.agents {
        eventually(&format!("{} has a leaf again", agent.name), SOON, || {
            let told = degraded(agent);
            check(told.is_none() && renewals(agent) >= 1.0, told)
        });
        let renewed = agent.events("certificate_renewed");
        let late = |event: &serde_json::Value| event["reason"].as_str().unwrap().contains("ago");
        assert!(renewed.iter().any(late), "{} says that it was late: {renewed:?}", agent.name);
    }
    for agent in &mesh.agents[2..] {
        assert!(!agent.events("degraded").is_empty(), "{} says that it was degraded", agent.name);
        assert!(!agent.events("restored").is_empty(), "{} says that it is no more", agent.name);
    }
    callers[0].wait_endpoints("web", 1);
    ask(entries[0], "as before").unwrap();
}

#[test]
fn a_mesh_without_its_issuer_lives_on_grace_says_so_and_recovers() {
    let _turn = beside_others();
    let mesh = mesh_of(&["issuer", "caller", "server"], 12);
    let [issuer, caller, server] = &mesh.agents[..] else { panic!("three agents") };
    let web = Server::start(Kind::Named("web".to_owned()));
    server.expose("web", web.address);
    let entry = caller.upstream("web");
    caller.wait_endpoints("web", 1);
    ask(entry, "warm").unwrap();
    issuer.kill();
    let calls = load(&[entry], |_| {
        wait_end_of_leaf(caller);
        wait_end_of_leaf(server);
    });
    assert!(failed(&calls).is_empty(), "{:#?}", failed(&calls));
    // Both are past their ends now, and a restart makes them shake hands anew.
    server.stop();
    server.start();
    caller.wait_state("server", "alive", SOON);
    caller.wait_endpoints("web", 1);
    ask(entry, "with an ended certificate").unwrap();
    for agent in [caller, server] {
        let told = degraded(agent).expect("it says that it is degraded");
        assert!(told.contains("ended"), "{told}");
        assert!(!agent.events("degraded").is_empty());
        assert!(agent.log().contains("degraded"), "the log says it, too");
        eventually(&format!("{} tells that it cannot renew", agent.name), SOON, || {
            check(!agent.events("renewal_failed").is_empty(), "no event")
        });
    }
    eventually("peers are named", SOON, || {
        check(!caller.events("ended_accepted").is_empty(), "no event")
    });

    issuer.start();
    wait_all(&mesh);
    for agent in &mesh.agents {
        eventually(&format!("{} has a leaf again", agent.name), SOON, || {
            check(renewals(agent) >= 1.0, renewals(agent))
        });
    }
    ask(entry, "and as before").unwrap();
}

#[test]
fn a_mesh_that_was_off_past_leaves_and_grace_forms_again_by_itself() {
    let _turn = beside_others();
    let mesh = mesh_of(&["issuer", "left", "right"], 5);
    let [issuer, left, right] = &mesh.agents[..] else { panic!("three agents") };
    mesh.agents.iter().for_each(Agent::stop);
    wait_end_of_leaf(left);
    wait_end_of_leaf(right);
    until(Instant::now() + Duration::from_secs(6)); // the grace is one life
    for agent in [left, right] {
        agent.start();
    }
    eventually("ended past the grace is refused and counted", SOON, || {
        let count = |agent: &Agent| {
            agent.metric("murmesh_refused_total", &["door=\"mesh\"", "reason=\"expired\""])
        };
        check(count(left) + count(right) >= 1.0, (left.refusals(), right.refusals()))
    });
    assert_ne!(left.state_of("right"), "alive");
    issuer.start();
    wait_all(&mesh);
    for agent in &mesh.agents {
        eventually(&format!("{} is whole again", agent.name), SOON, || {
            let told = degraded(agent);
            check(told.is_none() && renewals(agent) >= 1.0, told)
        });
        let renewed = agent.events("certificate_renewed");
        let late = |event: &serde_json::Value| event["reason"].as_str().unwrap().contains("ago");
        assert!(renewed.iter().any(late), "{} says that it was late: {renewed:?}", agent.name);
    }
    for agent in [left, right] {
        assert!(!agent.events("degraded").is_empty() && !agent.events("restored").is_empty());
    }
}

#[test]
fn a_newcomer_comes_in_long_after_the_first_leaves_have_ended() {
    let _turn = beside_others();
    let mut mesh = mesh_of(&["issuer", "old"], 5);
    let founded = on_disk(mesh.agent("issuer")).enrolled().issued_at;
    eventually("the issuer has renewed itself twice", SOON * 2, || {
        let count = renewals(mesh.agent("issuer"));
        check(count >= 2.0, (count, founded))
    });
    let token = mesh.invite(1);
    let newcomer = Agent::new(&mesh.home, "new");
    enrol(&newcomer, &token);
    newcomer.start();
    mesh.agents.push(newcomer);
    wait_all(&mesh);
}

#[test]
fn certs_lists_who_proves_what_until_when() {
    let _turn = beside_others();
    let mesh = mesh_of(&["issuer", "member"], 3_600);
    let [_, member] = &mesh.agents[..] else { panic!("two agents") };
    let list = |arguments: &[&str]| -> Vec<serde_json::Value> {
        let arguments = [&["certs", "--json"], arguments].concat();
        serde_json::from_str(&member.run(&arguments).ok()).unwrap()
    };
    let words = |rows: &[serde_json::Value]| -> Vec<String> {
        let word = |row: &serde_json::Value| {
            format!("{} {}", row["kind"].as_str().unwrap(), row["node"].as_str().unwrap())
        };
        rows.iter().map(word).collect()
    };
    let own = list(&[]);
    assert_eq!(words(&own), ["leaf member", "root ", "issuer issuer"], "soonest first");
    let identity = on_disk(member);
    let leaf = &own[0];
    assert_eq!(leaf["not_after"], identity.expires_at());
    assert_eq!(leaf["key_hash"], identity.member_id().to_string());
    assert_eq!(leaf["issuer"], own[2]["key_hash"]);
    assert_eq!(own[2]["issuer"], own[1]["key_hash"]);
    let renews_in = leaf["renews_at"].as_u64().unwrap() - identity.enrolled().issued_at;
    assert!((1_620..=1_980).contains(&renews_in), "half of an hour: {renews_in}");
    assert!(leaf["uris"][0].as_str().unwrap().ends_with("/node/member"), "{leaf}");
    assert_eq!(list(&["--all"]).len(), 4);
    let soon = list(&["--all", "--expiring", "2h"]);
    let soon = words(&soon);
    assert!(soon.len() == 2 && soon.iter().all(|row| row.starts_with("leaf")), "{soon:?}");
    assert!(list(&["--expiring", "1m"]).is_empty());
    let expiry = |kind: &str| {
        member.metric("murmesh_cert_expiry_timestamp_seconds", &[&format!("kind=\"{kind}\"")])
    };
    assert_eq!(expiry("leaf"), identity.expires_at() as f64);
    assert_eq!(expiry("root"), own[1]["not_after"].as_f64().unwrap());
    assert!(member.run(&["certs"]).ok().contains("member"));
    eventually("the clocks of one machine agree", SOON, || {
        let skew = member.metric("murmesh_clock_skew_seconds", &[]);
        check(skew.abs() < 1.0, skew)
    });
}

/// The member id of the issuer key that signed an agent's leaf.
fn issuer_of(agent: &Agent) -> String {
    on_disk(agent).enrolment().signer().member_id().to_string()
}

#[test]
fn a_second_issuer_takes_over_without_a_restart_and_the_first_may_go() {
    let _turn = beside_others();
    let mut mesh = mesh_of(&["first", "second", "third"], 20);
    let [first, second, third] = &mesh.agents[..] else { panic!("three agents") };
    let key = first.data_dir.join("root.key");
    let offline = mesh.home.path().join("offline.key");
    fs::rename(&key, &offline).unwrap();
    let offline = offline.to_str().unwrap();
    first.run(&["issuer", "add", "second"]).fails(77);
    let last = first.run(&["issuer", "remove", "first", "--root-key", offline]).fails(2);
    assert!(last.contains("last issuer"), "{last}");
    second.run(&["invite"]).fails(77);
    first.run(&["issuer", "add", "second", "--root-key", offline]).ok();
    eventually("the second issues", SOON, || {
        check(!second.events("issuer_appointed").is_empty(), "not yet")
    });
    let again = first.run(&["issuer", "add", "second", "--root-key", offline]).ok();
    assert!(again.contains("unchanged"), "{again}");
    let operator = first.data_dir.join("operator.key");
    let operator = operator.to_str().unwrap();
    second.run(&["issuer", "remove", "first", "--root-key", operator]).fails(77);

    // Its own word for the members would go with it, and nobody would believe them any more.
    let own = first.run(&["issuer", "remove", "first", "--root-key", offline]).fails(2);
    assert!(own.contains("another issuer must vouch") && own.contains("on second"), "{own}");

    // Run where the other issuer is, but with the founder's root key.
    let before: Vec<_> = [first, second, third].map(issuer_of).into();
    assert!(before.iter().all(|issuer| *issuer == before[0]), "{before:?}");
    let told = second.run(&["issuer", "remove", "first", "--root-key", offline]).ok();
    assert!(told.contains("issues nothing"), "{told}");
    for agent in [first, second, third] {
        eventually(&format!("{} has its leaf from the second", agent.name), SOON, || {
            let now = issuer_of(agent);
            check(now != before[0], now)
        });
    }
    first.run(&["invite"]).fails(77);
    eventually("the third tells of the removal", SOON, || {
        let subjects: Vec<_> =
            third.events("issuer_removed").iter().map(|event| event["subject"].clone()).collect();
        check(subjects == ["first"], subjects)
    });
    assert!(third.events("degraded").is_empty(), "{:?}", third.events("degraded"));
    let listed = third.run(&["issuer", "list", "--json"]).ok();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let active = |row: &serde_json::Value| (row["node"].clone(), row["active"].clone());
    let rows: Vec<_> = listed.as_array().unwrap().iter().map(active).collect();
    assert_eq!(rows, [("first".into(), false.into()), ("second".into(), true.into())]);

    let token = second.run(&["invite"]).ok();
    first.kill();
    mesh.join("fourth", token.trim());
    let fourth = mesh.agent("fourth");
    fourth.wait_state("third", "alive", SOON);
    mesh.agent("third").wait_state("fourth", "alive", SOON);
}

#[test]
fn a_grant_reaches_the_certificate_and_what_is_not_granted_is_nobodys_to_call() {
    let _turn = beside_others();
    let mesh = mesh_of(&["issuer", "member"], 3_600);
    let [issuer, member] = &mesh.agents[..] else { panic!("two agents") };
    let echo = Server::start(Kind::Echo);
    member.expose("web", echo.address);
    member.expose("db", echo.address);
    issuer.wait_endpoints("db", 1);
    member.run(&["grant", "member", "--services", "db"]).fails(77);
    issuer.run(&["grant", "nobody", "--services", "db"]).fails(2);
    let told = issuer.run(&["grant", "member", "--services", "web,cache"]).ok();
    assert!(told.ends_with("withdrawn until it may offer them again: db\n"), "{told}");
    let reason = |agent: &Agent| {
        let events = agent.events("services_granted");
        events.last().map_or(String::new(), |event| event["reason"].as_str().unwrap().to_owned())
    };
    assert_eq!(reason(issuer), "may offer web, cache; withdrawn: db");
    issuer.wait_endpoints("db", 0);
    issuer.wait_endpoints("web", 1);
    eventually("the member tells, too", SOON, || {
        check(reason(member) == "may offer web, cache; withheld: db", reason(member))
    });
    eventually("the certificate says so, too", SOON, || {
        let services = on_disk(member).enrolled().services.clone();
        check(services.as_ref().is_some_and(|allowed| allowed.len() == 2), services)
    });
    // From the renewed certificate the agent knows at once, without a restart.
    eventually("the member may offer a cache", SOON, || {
        let ran = member.run(&["expose", "cache", &echo.address.to_string()]);
        check(ran.code == Some(0), ran)
    });
    issuer.wait_endpoints("cache", 1);
    member.run(&["expose", "db", &echo.address.to_string()]).fails(77);
    member.stop();
    member.start();
    issuer.wait_alive(2, SOON);
    issuer.wait_endpoints("web", 1);
    assert_eq!(issuer.ready_endpoints("db"), 0, "it starts, and withholds it still");

    let told = issuer.run(&["grant", "member", "--all"]).ok();
    assert_eq!(told, "member may offer every service\n");
    issuer.wait_endpoints("db", 1); // what was exposed and withheld is back by itself

    // Whoever leaves and comes back may offer no more than before, unless the token says so.
    issuer.run(&["grant", "member", "--services", "web"]).ok();
    issuer.wait_endpoints("db", 0);
    for (invite, told, web, db) in [
        (&["invite"][..], "may offer   web   (as before)\n", 1, 0),
        (&["invite", "--services", "db"], "may offer   db   (before: web)\n", 0, 1),
    ] {
        let allowed = || on_disk(member).enrolled().services.as_ref().map(Vec::len);
        eventually("it knows of the grant", SOON, || check(allowed() == Some(1), allowed()));
        member.run(&["leave"]).ok();
        issuer.wait_state("member", "left", SOON);
        member.wait_end(SOON);
        let token = issuer.run(invite).ok();
        let joined = member.run(&["join", token.trim()]).ok();
        assert!(joined.contains(told), "{joined}");
        member.start();
        issuer.wait_alive(2, SOON);
        issuer.wait_endpoints("web", web);
        issuer.wait_endpoints("db", db);
    }
}
