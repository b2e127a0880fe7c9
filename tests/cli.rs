//! The commands as people and scripts run them: real processes, real exit codes.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::support::beside_others;

const VERBS: [&str; 28] = [
    "demo",
    "init",
    "invite",
    "join",
    "agent",
    "expose",
    "unexpose",
    "upstream",
    "status",
    "members",
    "services",
    "endpoints",
    "events",
    "drain",
    "maint",
    "wait",
    "reload",
    "forget",
    "check",
    "net",
    "log-level",
    "debug",
    "generate",
    "leave",
    "validate",
    "config",
    "completions",
    "man",
];

fn murmesh(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_murmesh"));
    for name in ["MURMESH_DATA_DIR", "MURMESH_API", "MURMESH_CONFIG", "MURMESH_JOIN_TOKEN"] {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    murmesh(arguments).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// An agent of its own, founded in a temporary directory, killed when dropped.
struct Agent {
    home: TempDir,
    child: Child,
}

impl Agent {
    fn found() -> Self {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("data");
        let founded = murmesh(&["init", "--name", "eins", "--mesh", "127.0.0.1:0"])
            .args([Path::new("--data-dir"), &dir])
            .output()
            .unwrap();
        assert_eq!(code(&founded), 0, "{}", err(&founded));
        Self { child: Self::start(&dir), home }
    }

    fn start(dir: &Path) -> Child {
        murmesh(&["agent", "--api", "127.0.0.1:0"])
            .args([Path::new("--data-dir"), dir])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn dir(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn run(&self, arguments: &[&str]) -> Output {
        murmesh(arguments).args([Path::new("--data-dir"), &self.dir()]).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(arguments);
        assert_eq!(code(&output), 0, "{arguments:?}: {}", err(&output));
        serde_json::from_str(&out(&output)).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn every_command_explains_itself() {
    let _turn = beside_others();
    let whole = out(&run(&["--help"]));
    for verb in VERBS {
        assert!(whole.contains(&format!("  {verb} ")), "{verb} is missing in: {whole}");
        let help = run(&[verb, "--help"]);
        assert_eq!(code(&help), 0, "{verb}");
        assert!(out(&help).contains(&format!("Usage: murmesh {verb}")), "{}", out(&help));
    }
    assert!(!whole.contains('\x1b'), "colours are for terminals only");
}

#[test]
fn completions_and_manual_are_generated() {
    let _turn = beside_others();
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell]);
        assert_eq!(code(&script), 0);
        assert!(out(&script).contains("upstream"), "{shell}");
    }
    assert!(out(&run(&["man"])).starts_with(".ie"), "roff");
    assert!(out(&run(&["man", "invite"])).contains("murmesh\\-invite"));
    assert_eq!(code(&run(&["man", "nothing"])), 64);
}

#[test]
fn nothing_asked_is_help_where_errors_go() {
    let _turn = beside_others();
    let home = tempfile::tempdir().unwrap();
    let alone = murmesh(&[]).env("MURMESH_DATA_DIR", home.path()).output().unwrap();
    assert_eq!((code(&alone), out(&alone).as_str()), (64, ""));
    let told = err(&alone);
    assert!(told.starts_with("A service mesh") && told.contains("murmesh init"), "{told}");
    assert!(!told.contains("error:") && !told.contains("murmesh: "), "{told}");
}

#[test]
fn wrong_command_lines_are_64_and_say_why() {
    let _turn = beside_others();
    for (line, word) in [
        (&["init", "--api", "127.0.0.1:7999"][..], "murmesh agent --api"),
        (&["join", "x", "--api", "127.0.0.1:7999"], "murmesh agent --api"),
        (&["expose", "web", "80", "--weight", "many"], "'many' for --weight: expected a whole"),
        (
            &["expose", "web", "80", "--soft-limit", "5", "--hard-limit", "3"],
            "--soft-limit 5 is above --hard-limit 3: expected at most 3",
        ),
        (
            &["expose", "web", "80", "--protocol", "https"],
            "protocol 'https' is unknown, expected tcp, http, h2 or grpc",
        ),
        (
            &["expose", "web", "80", "--hard-limit", "0"],
            "'0' for --hard-limit: expected a whole number from 1",
        ),
        (
            &["expose", "web", "80", "--soft-limit", "x"],
            "'x' for --soft-limit: expected a whole number from 1",
        ),
        (
            &["expose", "web", "80", "--health", "ttl=0s"],
            "'ttl=0s' for --health: expected a time from 100ms to 24h",
        ),
        (
            &["expose", "web", "80", "--health", "grpc:"],
            "'grpc:' for --health: expected the full name of a service behind it",
        ),
        (&["expose", "web", "80", "--health", "tpc"], "did you mean 'tcp'?"),
        (&["upstream", "web", "80", "--balance", "maglv"], "did you mean 'maglev'?"),
        (&["upstream", "web", "80", "--prefer", "same-zon"], "did you mean 'same-zone'?"),
        (
            &["upstream", "web", "80", "--hash", "client"],
            "--hash means nothing without --balance maglev",
        ),
        (&["init", "--advertise", "here"], "'here' for --advertise: expected host:port"),
        (&["invite", "revoke", "12345"], "'12345' for ID: expected 6 to 32"),
        (&["drain", "web", "--off", "--force"], "cannot be used with"),
        (&["wait", "web", "--for", "rain"], "ready, empty"),
        (&["maint", "web", "--timeout", "1s"], "--timeout"),
        (&["renew"], "unrecognized"),
        (&["memers"], "members"),
        (&["members", "--jsn"], "--json"),
        (&["events", "--since", "5"], "unit"),
        (&["expose", "web"], "ADDR"),
        (&["expose", "Web", "80"], "only a-z"),
        (&["edges"], "not available yet"),
        (&["init", "--deny"], "not available yet"),
        (&["join", "murmesh1-x"], "not valid"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let output = murmesh(line).env("MURMESH_DATA_DIR", home.path()).output().unwrap();
        assert_eq!(code(&output), 64, "{line:?}: {}", err(&output));
        assert!(err(&output).contains(word), "{line:?}: {}", err(&output));
        assert_eq!(out(&output), "", "{line:?}");
    }
}

#[test]
fn no_agent_is_69_after_waiting_for_it() {
    let _turn = beside_others();
    let home = tempfile::tempdir().unwrap();
    let output = murmesh(&["members", "--api", "127.0.0.1:1"])
        .env("MURMESH_DATA_DIR", home.path())
        .output()
        .unwrap();
    assert_eq!(code(&output), 69);
    assert!(err(&output).contains("no agent answers at 127.0.0.1:1"), "{}", err(&output));
}

#[test]
fn a_file_with_five_faults_is_told_whole() {
    let _turn = beside_others();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("murmesh.toml");
    let faulty = "[node]\nname = \"No Name\"\ncolour = 1\n[listen]\nmesh = \"x\"\ndns = \"y\"\n\
                  [join]\nforget_after = \"3\"\n";
    std::fs::write(&path, faulty).unwrap();
    let output = run(&["validate", path.to_str().unwrap()]);
    assert_eq!(code(&output), 2);
    for line in [2, 3, 5, 6, 8] {
        assert!(err(&output).contains(&format!("murmesh.toml:{line}: ")), "{}", err(&output));
    }
    assert!(err(&output).contains("5 faults"), "{}", err(&output));

    let agent = run(&["agent", "-c", path.to_str().unwrap(), "--data-dir", "/nowhere"]);
    assert_eq!((code(&agent), err(&agent)), (2, err(&output)), "the agent tells the same");

    std::fs::write(&path, "[node]\nzone = \"eu1/a\"\n").unwrap();
    assert_eq!(code(&run(&["validate", path.to_str().unwrap()])), 0);
    let missing = run(&["validate", "/nowhere/murmesh.toml"]);
    assert_eq!(code(&missing), 2);
    assert!(err(&missing).contains("/nowhere/murmesh.toml"), "{}", err(&missing));
}

#[test]
fn an_agent_without_identity_or_place_says_what_to_do() {
    let _turn = beside_others();
    let home = tempfile::tempdir().unwrap();
    let empty = murmesh(&["agent"]).env("MURMESH_DATA_DIR", home.path()).output().unwrap();
    assert_eq!(code(&empty), 2);
    assert!(err(&empty).contains("murmesh init"), "{}", err(&empty));
    let file = home.path().join("file");
    std::fs::write(&file, "").unwrap();
    let unwritable = murmesh(&["init"]).env("MURMESH_DATA_DIR", file.join("x")).output().unwrap();
    assert_eq!(code(&unwritable), 2);
    assert!(err(&unwritable).contains("file/x"), "{}", err(&unwritable));

    // A place where nobody can make a directory: path, the system's reason, what to do.
    for command in [&["init"][..], &["agent"]] {
        let nowhere = murmesh(command).env("MURMESH_DATA_DIR", "/proc/x").output().unwrap();
        assert_eq!(code(&nowhere), 2, "{}", err(&nowhere));
        assert!(err(&nowhere).contains("/proc/x"), "{}", err(&nowhere));
    }
    let told = err(&murmesh(&["init"]).env("MURMESH_DATA_DIR", "/proc/x").output().unwrap());
    for word in ["cannot create /proc/x:", "No such file", "--data-dir DIR"] {
        assert!(told.contains(word), "{word} is missing: {told}");
    }
}

/// Listings that go on by themselves.
const LASTING: [&[&str]; 2] = [&["events", "-f", "--since", "1h"], &["members", "--watch"]];

/// Whoever presses Ctrl-C, or closes the pipe, has seen enough: no failure.
#[test]
fn a_listing_that_the_user_ends_is_no_failure() {
    let _turn = beside_others();
    let agent = Agent::found();
    let id = agent.json(&["members", "--json"])[0]["id"].clone();
    let status = agent.json(&["status", "--json"]);
    assert_eq!(status["me"]["id"], id, "the member's");
    assert_eq!(status["me"]["mesh"].as_str().unwrap().len(), 64, "the mesh has its own");
    let closing = [true, false].into_iter();
    for (line, closes) in closing.flat_map(|closes| LASTING.map(|line| (line, closes))) {
        let mut child = murmesh(line)
            .args([Path::new("--data-dir"), &agent.dir()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // It shows something, so it is at its work.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        if closes {
            drop(child.stdout.take()); // and nothing more happens
        } else {
            let process = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
        }
        assert_eq!(child.wait().unwrap().code(), Some(0), "{line:?}, closed: {closes}");
    }
}

/// `/dev/full` takes nothing, like a disk without room.
#[test]
fn what_cannot_be_printed_is_a_failure_and_a_reader_that_is_gone_is_none() {
    let _turn = beside_others();
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let agent = Agent::found();
    agent.json(&["members", "--json"]);
    let into_full = |line: &[&str]| {
        let mut command = murmesh(line);
        command.args([Path::new("--data-dir"), &agent.dir()]).stdout(full()).output().unwrap()
    };
    let no_data_dir = |line: &[&str]| murmesh(line).stdout(full()).output().unwrap();
    for output in [
        no_data_dir(&["--help"]),
        no_data_dir(&["man"]),
        no_data_dir(&["completions", "bash"]),
        into_full(&["members"]),
        into_full(&["events", "--since", "1h"]),
        into_full(&["events", "-f", "--since", "1h"]),
        into_full(&["expose", "web", "127.0.0.1:1"]),
        into_full(&["init"]),
    ] {
        assert_eq!(code(&output), 2, "{output:?}");
        assert!(err(&output).contains("cannot write to standard output"), "{}", err(&output));
    }

    let lost = into_full(&["invite"]);
    assert_eq!(code(&lost), 2);
    let invites = agent.json(&["invite", "list", "--json"]);
    assert_eq!(invites[0]["state"], "revoked", "nobody has its token");
    let id = invites[0]["id"].as_str().unwrap();
    assert!(err(&lost).contains(id) && err(&lost).contains("revoked"), "{}", err(&lost));

    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut members = murmesh(&["members"]);
    members.args([Path::new("--data-dir"), &agent.dir()]).stdout(writer);
    let unread = members.output().unwrap();
    assert_eq!((code(&unread), err(&unread).as_str()), (0, ""));
}

/// What was told but is not the way it is now is said to be so, and what to do.
#[test]
fn an_offer_to_nowhere_is_warned_of_and_bad_addresses_are_refused() {
    let _turn = beside_others();
    let mut agent = Agent::found();
    for to in ["127.0.0.1:1", "unix:/nowhere/web.sock"] {
        let exposed = agent.run(&["expose", "web", to]);
        assert_eq!(code(&exposed), 0, "{}", err(&exposed));
        let told = format!("nothing listens at {to} yet");
        assert!(err(&exposed).contains(&told), "{}", err(&exposed));
    }
    let there = agent.home.path().join("web.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&there).unwrap();
    let exposed = agent.run(&["expose", "web", &format!("unix:{}", there.display())]);
    assert_eq!((code(&exposed), err(&exposed).as_str()), (0, ""));
    for line in [
        &["expose", "web", "unix:web.sock"][..],
        &["upstream", "web", "unix:web.sock"],
        &["init", "--advertise", "0.0.0.0:7370"],
        &["init", "--advertise", "224.0.0.1:7370"],
        &["join", "t", "--advertise", "127.0.0.1:0"],
        &["init", "--mesh", "224.0.0.1:7370"],
        &["agent", "--mesh", "255.255.255.255:7370"],
    ] {
        let refused = agent.run(line);
        assert_eq!(code(&refused), 64, "{line:?}: {}", err(&refused));
        let value = line.last().unwrap();
        assert!(err(&refused).contains(&format!("'{value}'")), "{}", err(&refused));
        assert!(err(&refused).contains("expected"), "{}", err(&refused));
    }
    let issuers = agent.json(&["issuer", "list", "--json"]);
    for (key, digits) in [("member", 32), ("key", 64)] {
        let text = issuers[0][key].as_str().unwrap();
        assert!(text.len() == digits && text.chars().all(|c| c.is_ascii_hexdigit()), "{issuers}");
    }
    terminate(&agent.child);
    assert_eq!(agent.child.wait().unwrap().code(), Some(0));
    let leave = agent.run(&["leave"]);
    assert_eq!(code(&leave), 69);
    assert!(err(&leave).contains("murmesh agent, then again"), "{}", err(&leave));
}

/// One life of an agent, seen through the commands.
#[test]
fn a_lone_agent_offers_opens_invites_and_leaves() {
    let _turn = beside_others();
    let mut agent = Agent::found();
    let members = agent.json(&["members", "--json"]);
    assert_eq!((&members[0]["name"], &members[0]["state"]), (&"eins".into(), &"alive".into()));

    let again = agent.run(&["init", "--name", "other"]);
    assert_eq!(code(&again), 0);
    assert!(out(&again).starts_with("unchanged"), "{}", out(&again));
    let told = err(&again);
    assert!(told.starts_with("not taken: --name other: this machine is member eins"), "{told}");
    let again = agent.run(&["init", "--name", "eins", "--mesh", "127.0.0.1:0", "--cert-ttl", "7d"]);
    assert_eq!((code(&again), err(&again).as_str()), (0, ""), "it is as it is wished");
    let wishes =
        ["init", "--advertise", "10.9.9.9:7370", "--mesh", "127.0.0.1:1", "--cert-ttl", "1d"];
    let told = err(&agent.run(&wishes));
    for line in [
        "--advertise 10.9.9.9:7370: the default is kept; write advertise = \"10.9.9.9:7370\" under",
        "--mesh 127.0.0.1:1: 127.0.0.1:0 is kept; write mesh",
        "--cert-ttl 1day: certificates of this mesh live 7days",
    ] {
        assert!(told.contains(&format!("not taken: {line}")), "{told}");
    }

    let services = agent.run(&["services"]);
    assert_eq!((code(&services), out(&services).as_str()), (0, ""), "an empty list is no failure");
    assert!(err(&services).contains("murmesh expose"), "{}", err(&services));
    assert_eq!(agent.json(&["services", "--json"]), serde_json::json!([]));

    let exposed = agent.run(&["expose", "web", "127.0.0.1:1", "--tag", "v2", "--weight", "50"]);
    assert_eq!(code(&exposed), 0, "{}", err(&exposed));
    assert_eq!(agent.json(&["expose", "--json"])[0]["tags"], serde_json::json!(["v2"]));
    let udp = agent.run(&["expose", "web", "127.0.0.1:1", "--protocol", "udp"]);
    assert_eq!(code(&udp), 64);
    assert!(err(&udp).contains("not available yet"), "{}", err(&udp));
    assert_eq!(agent.json(&["endpoints", "web", "--json"])[0]["weight"], 50);
    let again = ["expose", "web", "127.0.0.1:1", "--tag", "v2", "--weight", "50"];
    assert!(out(&agent.run(&again)).starts_with("unchanged: "));
    let changed =
        out(&agent.run(&["expose", "web", "127.0.0.1:1", "--tag", "v2", "--weight", "0"]));
    assert_eq!(changed, "changed: web: weight 50 -> 0\n");
    let idle = out(&agent.run(&["endpoints", "web"]));
    assert!(idle.contains("its weight is 0"), "{idle}");
    let nobody = agent.run(&["endpoints", "ghost"]);
    assert_eq!((code(&nobody), out(&nobody).as_str()), (1, ""));
    assert!(err(&nobody).contains("nobody offers 'ghost'"), "{}", err(&nobody));
    let nobody = agent.run(&["endpoints", "ghost", "--json"]);
    assert_eq!((code(&nobody), out(&nobody).trim()), (1, "[]"));
    assert_eq!(code(&agent.run(&["unexpose", "web"])), 0);
    assert_eq!(code(&agent.run(&["unexpose", "web"])), 2);

    assert_eq!(code(&agent.run(&["upstream", "db", "127.0.0.1:0"])), 0);
    let listen = agent.json(&["upstream", "--json"])[0]["listen"].as_str().unwrap().to_owned();
    assert!(!listen.ends_with(":0"), "the port it got: {listen}");
    assert_eq!(code(&agent.run(&["upstream", "db", "--off"])), 0);
    assert_eq!(agent.json(&["upstream", "--json"]), serde_json::json!([]));

    let invite = agent.run(&["invite", "--uses", "2"]);
    let token = out(&invite);
    assert!(token.starts_with("murmesh1-") && token.lines().count() == 1, "{token}");
    let invites = agent.json(&["invite", "list", "--json"]);
    assert_eq!((&invites[0]["uses"], &invites[0]["state"]), (&2.into(), &"open".into()));
    let id = invites[0]["id"].as_str().unwrap();
    assert_eq!(code(&agent.run(&["invite", "revoke", "000000"])), 2, "none begins so");
    assert_eq!(code(&agent.run(&["invite", "revoke", &id[..6]])), 0);
    let revoked = out(&agent.run(&["invite", "list"]));
    let row = revoked.lines().nth(1).unwrap();
    assert!(row.starts_with(&format!("{}  revoked  0 ", &id[..12])), "{revoked}");

    let config = agent.json(&["config", "dump", "--json"]);
    let api = config.as_array().unwrap().iter().find(|row| row["key"] == "listen.api").unwrap();
    assert_eq!(api["origin"], "flag --api");
    let events = agent.json(&["events", "--since", "1h", "--json"]);
    assert!(events.as_array().unwrap().iter().any(|event| event["kind"] == "invite_created"));
    let status = agent.run(&["status"]);
    assert!(out(&status).contains("1 alive"), "{}", out(&status));

    let second = Agent::start(&agent.dir()).wait_with_output().unwrap();
    assert_eq!(second.status.code(), Some(2), "one directory, one agent");

    std::fs::write(agent.dir().join("api.token"), "x".repeat(64)).unwrap();
    assert_eq!(code(&agent.run(&["invite"])), 77, "not with a wrong token");
    std::fs::remove_file(agent.dir().join("api.token")).unwrap();
    assert_eq!(code(&agent.run(&["invite"])), 2);

    terminate(&agent.child);
    assert_eq!(agent.child.wait().unwrap().code(), Some(0), "the drain completed");
    assert!(!agent.dir().join("api.addr").exists());
}

fn terminate(child: &Child) {
    let id = rustix::process::Pid::from_raw(child.id() as i32).unwrap();
    rustix::process::kill_process(id, rustix::process::Signal::TERM).unwrap();
}

#[test]
fn a_second_machine_joins_by_a_token_from_standard_input() {
    let _turn = beside_others();
    let first = Agent::found();
    let token = out(&first.run(&["invite"]));
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("data");
    let join = |token: &str| {
        let mut child = murmesh(&["join", "-", "--name", "zwei", "--mesh", "127.0.0.1:0"])
            .args([Path::new("--data-dir"), &dir])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(token.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let joined = join(&token);
    assert_eq!(code(&joined), 0, "{}", err(&joined));
    assert!(out(&joined).contains("zwei"), "{}", out(&joined));
    let again = join(&token);
    assert_eq!(code(&again), 0, "{}", err(&again));
    assert!(out(&again).starts_with("unchanged"), "{}", out(&again));
    assert_eq!(err(&again), "");

    let other = Agent::found();
    let elsewhere = join(&out(&other.run(&["invite"])));
    assert_eq!(code(&elsewhere), 2);
    assert!(err(&elsewhere).contains("belongs to mesh"), "{}", err(&elsewhere));
}

#[test]
fn a_token_never_leaves_the_machine() {
    let _turn = beside_others();
    let dir = tempfile::tempdir().unwrap();
    for elsewhere in ["192.0.2.2:7371", "example.com:7371", "http://127.0.0.1:7371", "7371"] {
        let words = ["--data-dir", dir.path().to_str().unwrap(), "--api", elsewhere, "members"];
        let told = assert_cmd::Command::new(env!("CARGO_BIN_EXE_murmesh")).args(words).output();
        let told = told.unwrap();
        assert_eq!(told.status.code(), Some(64), "{elsewhere}: {told:?}");
        assert!(String::from_utf8_lossy(&told.stderr).contains(elsewhere), "{told:?}");
    }
}
