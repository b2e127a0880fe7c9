//! Knowing what is wrong: every fault that can be planted is found, and none where all is well.

use std::fs::{self, Permissions};
use std::net::{Ipv6Addr, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{
    Agent, Kind, Ran, SOON, Server, TestMesh, beside_others, check, eventually, expect_echo,
    free_address, request, run_program, skip,
};

/// Every check that ended otherwise than with `pass`, with its status, message and fix.
fn faults(ran: &Ran) -> Vec<(String, String, String, String)> {
    let checks: Value = serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{ran:#?}"));
    let checks = checks.as_array().unwrap();
    let word = |check: &Value, key: &str| check[key].as_str().unwrap().to_owned();
    for check in checks {
        let has_fix = !word(check, "fix").is_empty();
        assert_eq!(has_fix, check["status"] != "pass", "{check}");
    }
    checks
        .iter()
        .filter(|check| check["status"] != "pass")
        .map(|c| (word(c, "id"), word(c, "status"), word(c, "message"), word(c, "fix")))
        .collect()
}

fn ids(ran: &Ran) -> Vec<String> {
    faults(ran).into_iter().map(|(id, ..)| id).collect()
}

/// The named fault, whose message has `message` and whose fix has `fix`.
#[track_caller]
fn expect(ran: &Ran, id: &str, status: &str, message: &str, fix: &str) {
    let found = faults(ran).into_iter().find(|fault| fault.0 == id);
    let Some((_, was, told, remedy)) = found else { panic!("no {id} in {ran:#?}") };
    assert_eq!(was, status, "{id}: {told}");
    assert!(told.contains(message) && remedy.contains(fix), "{id}: {told}; {remedy}");
}

/// What this machine itself lacks, in any mesh.
fn of_this_machine() -> Vec<String> {
    let buffer = |name| {
        let text = fs::read_to_string(format!("/proc/sys/net/core/{name}")).unwrap();
        text.trim().parse::<usize>().unwrap()
    };
    let is_small = buffer("rmem_max").min(buffer("wmem_max")) < 4 * 1024 * 1024;
    if is_small { vec!["udp_buffers".to_owned()] } else { Vec::new() }
}

#[track_caller]
fn is_well(agent: &Agent) -> Ran {
    let ran = agent.run(&["check", "--json"]);
    let other: Vec<_> = faults(&ran)
        .into_iter()
        .filter(|fault| fault.0 != "open_services" && !of_this_machine().contains(&fault.0))
        .collect();
    assert!(other.is_empty(), "{other:#?}");
    ran
}

#[test]
fn a_healthy_mesh_has_no_fault_and_its_open_services_are_advice() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["one", "two", "three"]);
    let one = mesh.agent("one");
    assert!(faults(&is_well(one)).iter().all(|fault| fault.0 != "open_services"));
    let server = Server::start(Kind::Echo);
    mesh.agent("two").expose("web", server.address);
    for agent in &mesh.agents {
        agent.wait_endpoints("web", 1);
        let ran = is_well(agent);
        expect(&ran, "open_services", "warn", "web", "invite");
        if of_this_machine().is_empty() {
            assert_eq!(ran.code, Some(0), "a choice is no fault");
        }
    }
    let all = one.run(&["check", "--all"]).stdout;
    for id in ["data_dir", "mesh_port", "members", "versions", "clock_skew", "config", "seeds"] {
        assert!(all.contains(id), "{id} is not in {all}");
    }
    let served = one.get("/v1/mesh/check");
    assert!(served.as_array().unwrap().iter().any(|check| check["id"] == "disk"), "{served}");
}

#[test]
fn faults_of_a_running_mesh_are_found() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["one", "two", "three"]);
    let [one, two, three] = &mesh.agents[..] else { panic!("three agents") };
    two.expose("web", free_address()); // nobody listens there
    two.run(&["expose", "db", &free_address().to_string()]).ok();
    one.wait_endpoints("web", 1);
    let ran = two.run(&["check", "--json"]);
    expect(&ran, "instances", "fail", "refused", "murmesh unexpose");
    assert_eq!(ran.code, Some(2));

    fs::remove_file(two.data_dir.join("api.sock")).unwrap();
    expect(&two.run(&["check", "--json"]), "api_socket", "warn", "api.sock", "restart");

    fs::set_permissions(two.data_dir.join("node.key"), Permissions::from_mode(0o644)).unwrap();
    let ran = two.run(&["check", "--json"]);
    expect(&ran, "key_files", "fail", "node.key (644)", "chmod 600 node.key");
    expect(&ran, "identity", "fail", "read by others", "chmod 600");
    fs::set_permissions(two.data_dir.join("node.key"), Permissions::from_mode(0o600)).unwrap();

    // One issuer, and it is gone; so is everybody else, which two is to tell, too.
    let seed = one.mesh;
    one.kill();
    three.kill();
    two.wait_state("one", "down", SOON);
    two.wait_state("three", "down", SOON);
    let ran = two.run(&["check", "--json"]);
    expect(&ran, "members", "warn", "2 down: ", "murmesh check");
    expect(&ran, "issuers", "warn", "one", "murmesh issuer add");
    expect(&ran, "isolated", "fail", "none of 2", "firewall");
    expect(&ran, "seeds", "warn", &seed.to_string(), "node.toml");
    one.start();
    three.start();
    one.wait_alive(3, SOON);

    // A service whose only machine is gone.
    two.kill();
    one.wait_state("two", "down", SOON);
    let ran = one.run(&["check", "--json"]);
    expect(&ran, "services", "warn", "web", "murmesh endpoints db");
    assert_eq!(ran.code, Some(1), "{ran:#?}");
}

#[test]
fn without_an_agent_the_machine_is_checked_at_once_and_told_how_to_start_it() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["one"]);
    let agent = &mesh.agents[0];
    agent.stop();
    let ran = agent.run(&["check", "--json"]);
    expect(&ran, "agent", "fail", "no agent runs", "agent");
    let others: Vec<_> = ids(&ran).into_iter().filter(|id| id != "agent").collect();
    assert_eq!(others, of_this_machine(), "nothing else is wrong: {ran:#?}");

    let taken = UdpSocket::bind(agent.mesh).unwrap();
    let by = format!("(process {})", std::process::id());
    expect(&agent.run(&["check", "--json"]), "mesh_port", "fail", &by, "ss -ulpn");
    drop(taken);

    let key = agent.data_dir.join("node.key");
    fs::set_permissions(&key, Permissions::from_mode(0o640)).unwrap();
    expect(&agent.run(&["check", "--json"]), "key_files", "fail", "node.key", "chmod 600");
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();

    fs::set_permissions(&agent.data_dir, Permissions::from_mode(0o777)).unwrap();
    expect(&agent.run(&["check", "--json"]), "data_dir", "fail", "others may write", "chmod 700");
    fs::set_permissions(&agent.data_dir, Permissions::from_mode(0o755)).unwrap();
    expect(&agent.run(&["check", "--json"]), "data_dir", "warn", "everybody", "chmod 700");
    fs::set_permissions(&agent.data_dir, Permissions::from_mode(0o700)).unwrap();

    let file = mesh.home.path().join("murmesh.toml");
    fs::write(&file, "[listen]\nmesch = 1\n").unwrap();
    let path = file.to_str().unwrap().to_owned();
    let ran = agent.run(&["check", "--json", "-c", &path]);
    expect(&ran, "config", "fail", "mesch", &format!("murmesh validate {path}"));

    for (name, message) in [("entries", "empty"), ("node.crt", "damaged"), ("genesis", "empty")] {
        let path = agent.data_dir.join(name);
        let before = fs::read(&path).unwrap();
        fs::write(&path, "").unwrap();
        expect(&agent.run(&["check", "--json"]), "identity", "fail", message, "");
        fs::write(&path, before).unwrap();
    }
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&key, Some(65_534), None).unwrap();
        let ran = agent.run(&["check", "--json"]);
        expect(&ran, "data_dir", "fail", "node.key", "chown -R 0");
        std::os::unix::fs::chown(&key, Some(0), None).unwrap();
    }
    fs::remove_dir_all(&agent.data_dir).unwrap();
    expect(&agent.run(&["check", "--json"]), "data_dir", "fail", "does not exist", "murmesh init");
    let ran = agent.run(&["check"]);
    assert!(ran.code == Some(2) && ran.stdout.contains("try: "), "{ran:#?}");
}

#[test]
fn an_ended_certificate_is_no_wrong_clock() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    let agent = Agent::new(&mesh.home, "one");
    let at = agent.mesh.to_string();
    let init = ["init", "--name", "one", "--mesh", &at, "--advertise", &at, "--cert-ttl", "5s"];
    agent.run(&init).ok();
    eventually("the certificate ended", SOON, || {
        let ran = agent.run(&["check", "--json"]);
        check(faults(&ran).iter().any(|fault| fault.2.contains("ended")), &ran)
    });
    let ran = agent.run(&["check", "--json"]);
    expect(&ran, "certificate", "fail", "ended", "murmesh agent");
    assert!(!ids(&ran).contains(&"clock".to_owned()), "the clock is right: {ran:#?}");
}

#[test]
fn a_machine_without_room_or_files_is_told() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["one"]);
    let agent = &mesh.agents[0];
    agent.stop();
    let script = "ulimit -n 512 && exec \"$@\"";
    let limited = wrapped(&agent.command(&["check", "--json"]), &["sh", "-c", script, "sh"]);
    let ran = run_program(&mut { limited }, b"", SOON);
    expect(&ran, "open_files", "warn", "512", "LimitNOFILE");

    if !rustix::process::geteuid().is_root() || crate::support::find("unshare").is_none() {
        return skip("needs root and unshare to mount a small disk");
    }
    let script =
        format!("mount -t tmpfs -o size=1m none {} && exec \"$@\"", shown(&agent.data_dir));
    let arguments = ["unshare", "--mount", "sh", "-c", &script, "sh"];
    let ran =
        run_program(&mut wrapped(&agent.command(&["check", "--json"]), &arguments), b"", SOON);
    expect(&ran, "disk", "fail", "MiB free", "df -h");
    let script = format!("mount -t tmpfs -o ro none {} && exec \"$@\"", shown(&agent.data_dir));
    let arguments = ["unshare", "--mount", "sh", "-c", &script, "sh"];
    let ran =
        run_program(&mut wrapped(&agent.command(&["check", "--json"]), &arguments), b"", SOON);
    expect(&ran, "disk", "fail", "read-only", "remount");
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// `command`, started by another program.
fn wrapped(command: &Command, by: &[&str]) -> Command {
    let mut whole = Command::new(by[0]);
    whole.args(&by[1..]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => whole.env(name, value),
            None => whole.env_remove(name),
        };
    }
    whole
}

#[test]
fn net_lists_the_way_to_every_other_member() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["one", "two"]);
    let (one, two) = (&mesh.agents[0], &mesh.agents[1]);
    let row = || one.get("/v1/mesh/net").as_array().unwrap()[0].clone();
    let resting = row();
    assert_eq!((&resting["name"], &resting["connected"]), (&"two".into(), &false.into()));
    assert_eq!(resting["rtt_ms"], Value::Null);
    let server = Server::start(Kind::Echo);
    two.expose("echo", server.address);
    one.wait_endpoints("echo", 1);
    let entry = one.upstream("echo");
    let mut stream = TcpStream::connect(entry).unwrap();
    expect_echo(&mut stream, b"hello").unwrap();
    let row = row();
    assert_eq!((&row["connected"], &row["silent"]), (&true.into(), &false.into()), "{row}");
    assert!(row["rtt_ms"].as_f64().unwrap() > 0.0 && row["bytes_sent"].as_u64().unwrap() > 0);
    assert_eq!(row["address"], two.mesh.to_string());
    let table = one.run(&["net"]).ok();
    assert!(table.contains("open") && table.contains(" ms"), "{table}");
    two.kill();
    eventually("the dead one's connection is gone", SOON, || {
        let row = one.get("/v1/mesh/net").as_array().unwrap()[0].clone();
        check(row["connected"] == false && row["state"] == "down", row)
    });
}

#[test]
fn an_agent_that_never_heard_anybody_says_what_stands_between() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    let mut agent = Agent::new(&mesh.home, "one");
    let at = agent.mesh.to_string();
    agent.run(&["init", "--name", "one", "--mesh", &at, "--advertise", &at]).ok();
    let swallows = UdpSocket::bind("127.0.0.1:0").unwrap();
    let blocked = swallows.local_addr().unwrap().to_string();
    agent.arguments = vec!["--seed".to_owned(), blocked.clone()];
    agent.start();
    let ran = agent.run(&["check", "--json"]);
    expect(&ran, "udp", "fail", &format!("{blocked}: the host lives"), "/udp to 127.0.0.1");
    expect(&ran, "seeds", "warn", &blocked, "[join]");
    eventually("its log says so", SOON, || {
        let log = agent.log();
        check(log.contains("no member was heard yet") && log.contains("is dropped"), log)
    });
    agent.kill();
    drop(swallows);
    agent.start();
    expect(&agent.run(&["check", "--json"]), "udp", "fail", "nothing listens", "murmesh agent");
}

#[test]
fn a_join_that_reaches_no_issuer_says_why_and_ends_with_3() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["one"]);
    let token = mesh.invite(1);
    let one = &mesh.agents[0];
    let newcomer = Agent::new(&mesh.home, "two");
    let at = newcomer.mesh.to_string();
    let join = ["join", &token, "--name", "two", "--mesh", &at, "--advertise", &at];
    one.kill();
    let told = newcomer.run(&join).fails(3);
    assert!(
        told.contains(&format!("{}/udp: the host lives, but nothing listens", one.mesh)),
        "{told}"
    );
    assert!(told.contains("within 5 s") && told.contains("start 'murmesh agent'"), "{told}");
    let _swallows = UdpSocket::bind(one.mesh).unwrap();
    let told = newcomer.run(&join).fails(3);
    assert!(told.contains("UDP to that port is dropped"), "{told}");
    assert!(told.contains(&format!("open {}/udp", one.mesh.port())), "{told}");
}

#[test]
fn the_log_level_of_a_running_agent_changes_with_the_token_only() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["one"]);
    let one = &mesh.agents[0];
    assert_eq!(one.run(&["log-level"]).ok(), "info\n");
    for nonsense in ["nonsense==", "loud"] {
        let refused = one.run(&["log-level", nonsense]).fails(64);
        assert!(refused.contains(nonsense) && refused.contains("warn"), "{refused}");
    }
    one.run(&["log-level", "error"]).ok();
    one.expose("unseen", free_address());
    one.run(&["log-level", "info"]).ok();
    one.expose("seen", free_address());
    eventually("it logs again", SOON, || {
        let log = one.log();
        check(log.contains("service=seen"), log)
    });
    assert!(!one.log().contains("service=unseen"), "{}", one.log());
    let body = b"{\"filter\":\"error\"}";
    let refused = request(&one.at(), "PUT", "/v1/mesh/log", &[], body).unwrap();
    assert_eq!(refused.status, 401);
    assert_eq!(one.try_get("/v1/mesh/log").unwrap().status, 401, "log lines are not for all");
}

#[test]
fn a_debug_bundle_has_what_others_need_and_no_secret() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["one"]);
    let one = &mesh.agents[0];
    one.expose("web", free_address());
    let token = mesh.invite(1);
    let file = mesh.home.path().join("bundle.tar");
    let told = one.run(&["debug", "bundle", file.to_str().unwrap()]).ok();
    let mode = fs::metadata(&file).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o600);
    assert!(one.run(&["debug", "bundle", file.to_str().unwrap()]).fails(2).contains("exists"));
    let listed = Command::new("tar").arg("-tf").arg(&file).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    for name in [
        "status.json",
        "members.json",
        "endpoints/web.json",
        "events.json",
        "check.json",
        "metrics.txt",
        "config.json",
        "log.txt",
        "version.txt",
    ] {
        assert!(listed.lines().any(|line| line == name), "{name} is not in {listed}");
        assert!(told.contains(name), "{told}");
    }
    let unpacked = Command::new("tar").arg("-xOf").arg(&file).arg("log.txt").output().unwrap();
    assert!(String::from_utf8_lossy(&unpacked.stdout).contains("starting"));

    let bundle = String::from_utf8_lossy(&fs::read(&file).unwrap()).into_owned();
    assert!(!bundle.contains(&one.api_token()) && !bundle.contains(token.trim()));
    assert!(!bundle.contains("PRIVATE KEY"));
    let mut keys = 0;
    for entry in fs::read_dir(&one.data_dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "key") {
            for line in fs::read_to_string(&path).unwrap().lines().filter(|l| !l.starts_with('-')) {
                assert!(!bundle.contains(line), "{} is in the bundle", path.display());
                keys += 1;
            }
        }
    }
    assert!(keys >= 4, "root, operator, issuer and node");
}

#[test]
fn the_unit_for_systemd_is_sound_and_the_agent_says_when_it_is_ready() {
    let _turn = beside_others();
    let mesh = TestMesh::new();
    let agent = Agent::new(&mesh.home, "one");
    let unit = agent.run(&["generate", "systemd", "--user", "daemon"]).ok();
    for line in ["Type=notify", "User=daemon", "NoNewPrivileges=yes", "TimeoutStopSec=45s"] {
        assert!(unit.lines().any(|found| found == line), "{line} is not in {unit}");
    }
    assert!(unit.contains("ExecReload=/bin/kill -HUP $MAINPID\n"), "{unit}");
    assert!(agent.run(&["generate", "systemd", "--user", "a\nb"]).fails(64).contains("user"));
    assert!(agent.run(&["generate", "grafana"]).fails(64).contains("not available yet"));
    if crate::support::find("systemd-analyze").is_some() {
        let file = mesh.home.path().join("murmesh.service");
        fs::write(&file, &unit).unwrap();
        let mut verify = Command::new("systemd-analyze");
        let ran = run_program(verify.arg("verify").arg(&file), b"", SOON);
        assert_eq!(ran.code, Some(0), "{ran:#?}");
        assert!(!ran.stderr.contains("murmesh.service"), "{ran:#?}");
    }

    let at = agent.mesh.to_string();
    agent.run(&["init", "--name", "one", "--mesh", &at, "--advertise", &at]).ok();
    let path = mesh.home.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let api = agent.api.to_string();
    let mut command = agent.command(&["agent", "--mesh", &at, "--api", &api]);
    command.env("NOTIFY_SOCKET", &path).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let heard = || {
        let mut bytes = [0; 64];
        let len = manager.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    assert_eq!(heard(), "READY=1");
    assert_eq!(agent.try_get("/ready").unwrap().status, 200, "it was not said too early");
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(heard(), "STOPPING=1");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_mesh_lives_on_ipv6() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    let [one, two] = ["one", "two"].map(|name| {
        let mut agent = Agent::new(&mesh.home, name);
        agent.mesh.set_ip(Ipv6Addr::LOCALHOST.into());
        agent
    });
    let seed = one.mesh.to_string();
    mesh.found_with(one);
    let token = mesh.invite(1);
    let mut two = two;
    two.arguments = vec!["--seed".to_owned(), seed.clone()];
    mesh.join_with(two, &token);
    for agent in &mesh.agents {
        agent.wait_alive(2, SOON);
        is_well(agent);
    }
    let server = Server::start(Kind::Echo);
    mesh.agents[1].expose("echo", server.address);
    mesh.agents[0].wait_endpoints("echo", 1);
    let mut stream = TcpStream::connect(mesh.agents[0].upstream("echo")).unwrap();
    expect_echo(&mut stream, b"over six").unwrap();
    let net = mesh.agents[1].get("/v1/mesh/net");
    assert_eq!(net[0]["address"], seed, "{net}");
}
