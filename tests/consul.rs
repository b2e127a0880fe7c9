//! The clients that people have for Consul find services of the mesh, and the API's unix socket.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    Agent, At, Kind, Program, Ran, SOON, Server, TestMesh, ask, beside_others, check, eventually,
    find, free_address, python, request, run_program, skip,
};

const LONG: Duration = Duration::from_secs(180);

fn program(name: &str) -> Option<PathBuf> {
    let found = find(name);
    if found.is_none() {
        skip(&format!("{name} is not installed"));
    }
    found
}

const PYTHON_CONSUL: &str = r#"
import json, sys, threading
import consul

near_port, far_port, token, web_port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
near, far = consul.Consul(port=near_port), consul.Consul(port=far_port)
told = {}

try:
    far.agent.service.register("web", port=web_port)
except consul.ACLDisabled as refused:
    told["without token"] = json.loads(str(refused))["status"]
far.http.session.headers["X-Consul-Token"] = token
try:
    check = dict(consul.Check.ttl("30s"), DeregisterCriticalServiceAfter="1m")
    far.agent.service.register("web", port=web_port, check=check)
except consul.base.BadRequest as refused:
    told["with check"] = str(refused)

def watch(index, change, seen):
    """The first answer of near that is as wanted; it is asked for before the change is made."""
    worker = threading.Timer(0, change)
    worker.start()
    while True:
        index, rows = near.health.service("web", index=index, wait="60s")
        if seen(rows):
            worker.join()
            return index, rows

statuses = lambda row: [check["Status"] for check in row["Checks"]]
index, rows = near.health.service("web")
told["before"] = rows
index, rows = watch(index, lambda: far.agent.service.register(
    "web", service_id="web-1", port=web_port, tags=["v2"]), lambda rows: rows)
told["registered"] = rows
told["own"] = far.agent.services()
told["catalog"] = [near.catalog.services()[1], near.catalog.nodes()[1], near.catalog.service("web")[1]]
told["tagged"] = [len(near.health.service("web", tag=tag)[1]) for tag in ("v2", "v3")]

index, rows = watch(index, lambda: far.agent.service.maintenance("web-1", "true", "new disk"),
    lambda rows: statuses(rows[0]) == ["passing", "critical"])
told["maintained"] = rows
told["maintained, passing"] = near.health.service("web", passing=True)[1]
told["reason"] = far.health.service("web")[1][0]["Checks"][1]["Output"]
index, rows = watch(index, lambda: far.agent.service.maintenance("web-1", "false"),
    lambda rows: statuses(rows[0]) == ["passing", "passing"])
index, rows = watch(index, lambda: far.agent.service.deregister("web-1"), lambda rows: not rows)
told["gone"] = rows
told["members"] = sorted(member["Name"] for member in near.agent.members())
told["self"] = near.agent.self()["Config"]
print(json.dumps(told))
"#;

#[test]
fn python_consul_registers_watches_maintains_and_takes_back() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far"]);
    let Some(python) = python(&["python-consul==1.1.0"]) else { return };
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let web = Server::start(Kind::Named("web".to_owned()));
    let ports = [near.api.port(), far.api.port()].map(|port| port.to_string());
    let mut script = Command::new(python);
    script.args(["-c", PYTHON_CONSUL]).args(&ports).arg(far.api_token());
    script.arg(web.address.port().to_string());
    let told: Value = serde_json::from_str(&run_program(&mut script, b"", LONG).ok()).unwrap();

    assert_eq!(told["without token"], 401);
    let with_check = told["with check"].as_str().unwrap();
    assert!(with_check.contains("nothing is taken back by itself"), "{with_check}");
    assert_eq!(told["before"], json!([]));
    let row = &told["registered"][0];
    let (node, service) = (&row["Node"], &row["Service"]);
    assert_eq!((&node["Node"], &node["Address"]), (&"far".into(), &"127.0.0.1".into()));
    assert_eq!(node["Datacenter"], "dc1", "without a zone");
    assert_eq!((&service["ID"], &service["Tags"]), (&"web-1".into(), &json!(["v2"])));
    // Behind another agent and without an entry here: the name, which nobody can dial around the mesh.
    assert_eq!(
        (&service["Address"], &service["Port"]),
        (&"web.mesh".into(), &web.address.port().into())
    );
    assert_eq!(told["own"]["web-1"]["Port"], web.address.port());
    assert_eq!(told["catalog"][0], json!({ "web": ["v2"] }));
    let nodes: Vec<_> = told["catalog"][1].as_array().unwrap().iter().map(|n| &n["Node"]).collect();
    assert_eq!(nodes, ["far", "near"]);
    assert_eq!(told["catalog"][2][0]["ServiceID"], "web-1");
    assert_eq!(told["tagged"], json!([1, 0]));
    let maintained = &told["maintained"][0]["Checks"][1];
    assert_eq!(maintained["CheckID"], "_service_maintenance:web-1");
    assert_eq!(told["maintained, passing"], json!([]));
    assert_eq!(told["reason"], "new disk");
    assert_eq!(told["gone"], json!([]));
    assert_eq!(told["members"], json!(["far", "near"]));
    assert_eq!(told["self"]["NodeName"], "near");
}

/// Maintenance is obeyed by calls, outlives the agent, and ends.
#[test]
fn an_instance_in_maintenance_takes_no_calls_until_it_is_back_even_over_a_restart() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let (one, two) = (Kind::Named("one".to_owned()), Kind::Named("two".to_owned()));
    let (one, two) = (Server::start(one), Server::start(two));
    far.expose("web", one.address);
    near.run(&["expose", "web", &two.address.to_string(), "--id", "web-2"]).ok();
    near.wait_endpoints("web", 2);
    let entry = near.upstream("web");
    let maintain = |query: &str| {
        let path = format!("/v1/agent/service/maintenance/web?{query}");
        let bearer = format!("Bearer {}", far.api_token());
        let headers = [("authorization", bearer.as_str())];
        let response = request(&far.at(), "PUT", &path, &headers, b"").unwrap();
        assert_eq!(response.status, 200, "{}", response.text());
    };
    maintain("enable=true&reason=disk");
    near.wait_endpoints("web", 1);
    let rows = far.get("/v1/mesh/endpoints/web");
    let own = rows.as_array().unwrap().iter().find(|row| row["node"] == "far").unwrap();
    assert_eq!(own["reason"], "maintenance: disk");
    far.stop();
    far.start();
    near.wait_state("far", "alive", SOON);
    let state = |expected: &str| {
        eventually(&format!("far's instance is {expected}"), SOON, || {
            let rows = near.get("/v1/mesh/endpoints/web");
            let mut rows = rows.as_array().unwrap().iter();
            let row = rows.find(|row| row["node"] == "far").cloned().unwrap_or_default();
            check(row["state"] == expected, row)
        });
    };
    state("maint");
    for _ in 0..20 {
        assert_eq!(ask(entry, "who").unwrap(), "two");
    }
    maintain("enable=false");
    state("ready");
    eventually("far's instance is called again", SOON, || {
        let name = ask(entry, "who").unwrap();
        check(name == "one", name)
    });
}

#[test]
fn the_address_that_is_told_is_dialled_through_the_agent_wherever_the_instance_is() {
    let _turn = beside_others();
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    let web = Server::start(Kind::Named("far-web".to_owned()));
    far.expose("web", web.address);
    near.wait_endpoints("web", 1);
    far.wait_endpoints("web", 1);
    let told = |agent: &Agent| {
        let row = agent.get("/v1/health/service/web?passing")[0]["Service"].clone();
        let catalog = agent.get("/v1/catalog/service/web")[0].clone();
        assert_eq!(row["Address"], catalog["ServiceAddress"]);
        assert_eq!(row["Port"], catalog["ServicePort"]);
        format!("{}:{}", row["Address"].as_str().unwrap(), row["Port"])
    };
    assert_eq!(told(near), format!("web.mesh:{}", web.address.port()));
    assert_eq!(told(far), web.address.to_string(), "it is on that very machine");
    let entry = near.upstream("web");
    assert_eq!(told(near), entry.to_string());
    assert_eq!(ask(told(near).parse().unwrap(), "who").unwrap(), "far-web");
    let file = mesh.home.path().join("web.sock");
    near.run(&["upstream", "web", &entry.to_string(), "--off"]).ok();
    near.run(&["upstream", "web", &format!("unix:{}", file.display())]).ok();
    let is_name = told(near).starts_with("web.mesh:");
    assert!(is_name, "a socket file is no address and port");
}

/// Both machines got new addresses while they were off: only somebody who knows one can tell.
#[test]
fn an_address_that_is_named_by_hand_joins_two_members_that_lost_each_other() {
    let _turn = beside_others();
    let mut mesh = TestMesh::of(&["near", "far"]);
    for agent in &mesh.agents {
        agent.stop();
    }
    for agent in &mut mesh.agents {
        let (before, now) = (agent.mesh, free_address());
        let file = agent.data_dir.join("node.toml");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace(&before.to_string(), &now.to_string())).unwrap();
        agent.mesh = now;
    }
    for agent in &mesh.agents {
        agent.start();
    }
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    assert_ne!(far.state_of("near"), "alive", "nobody told it the address");
    let bearer = format!("Bearer {}", far.api_token());
    let headers = [("authorization", bearer.as_str())];
    let ask = |address: &str| {
        let path = format!("/v1/agent/join/{address}");
        request(&far.at(), "PUT", &path, &headers, b"").unwrap()
    };
    assert_eq!(ask("seed.example.com").status, 422, "names are for join.seeds");
    assert_eq!(ask("nonsense:port").status, 422);
    assert_eq!(ask(&near.mesh.to_string()).status, 200);
    far.wait_state("near", "alive", SOON);
    near.wait_state("far", "alive", SOON);
}

/// curl, waiting for an answer; killed when dropped.
struct Watcher(Child);

impl Watcher {
    fn start(curl: &Path, agent: &Agent, path: &str) -> Self {
        let mut command = Command::new(curl);
        command.args(["-sS", "--noproxy", "*", "-D", "-"]);
        command.arg(format!("http://{}{path}", agent.api));
        Self(command.stdout(Stdio::piped()).spawn().unwrap())
    }

    fn is_waiting(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// The index and the rows of the answer.
    #[track_caller]
    fn answer(&mut self) -> (u64, Value) {
        eventually("curl has its answer", SOON, || check(!self.is_waiting(), "it waits"));
        let mut text = String::new();
        std::io::Read::read_to_string(&mut self.0.stdout.take().unwrap(), &mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (index(head), serde_json::from_str(body).unwrap())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn index(head: &str) -> u64 {
    let head = head.to_lowercase();
    let line = head.lines().find_map(|line| line.strip_prefix("x-consul-index: "));
    line.unwrap_or_else(|| panic!("no index: {head}")).parse().unwrap()
}

fn blocked(agent: &Agent, count: f64) {
    eventually(&format!("{count} queries are blocked"), SOON, || {
        let blocked = agent.metric("murmesh_api_blocked_queries", &[]);
        check(blocked == count, blocked)
    });
}

#[test]
fn a_watcher_sleeps_until_what_it_asked_for_changes() {
    let _turn = beside_others();
    let Some(curl) = program("curl") else { return };
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    far.expose("web", free_address());
    near.wait_endpoints("web", 1);
    let path = "/v1/health/service/web?passing";
    let first = index(&near.try_get(path).unwrap().head);
    let mut watcher = Watcher::start(&curl, near, &format!("{path}&index={first}&wait=5m"));
    blocked(near, 1.0);

    far.expose("db", free_address());
    near.wait_endpoints("db", 1);
    near.upstream("db");
    far.run(&["expose", "web", &free_address().to_string(), "--id", "web-0", "--weight", "0"]).ok();
    near.wait_endpoints("web", 2);
    let (second, rows) = watcher.answer();
    assert!(second > first && rows.as_array().unwrap().len() == 2, "{first} {second} {rows}");
    assert_eq!(index(&near.try_get(path).unwrap().head), second, "db was no change");

    // It is told of the agent's life, too: the record of a member that stops in order says so.
    let mut watcher = Watcher::start(&curl, near, &format!("{path}&index={second}&wait=5m"));
    blocked(near, 1.0);
    far.stop();
    let (third, rows) = watcher.answer();
    assert!(third > second && rows.as_array().unwrap().is_empty(), "{second} {third} {rows}");

    // Who hangs up gives the place back.
    let watcher = Watcher::start(&curl, near, &format!("{path}&index={third}&wait=5m"));
    blocked(near, 1.0);
    drop(watcher);
    blocked(near, 0.0);

    // An index of the agent's former life is never the current one.
    near.stop();
    near.start();
    let again = index(&near.try_get(path).unwrap().head);
    assert!(again > third, "{third} {again}");
    let mut watcher = Watcher::start(&curl, near, &format!("{path}&index={third}&wait=5m"));
    assert_eq!(watcher.answer().0, again, "answered at once");
    let ahead = format!("{path}&index={}&wait=5m", again + 1_000);
    assert_eq!(Watcher::start(&curl, near, &ahead).answer().0, again, "from another agent");
    let mut watcher = Watcher::start(&curl, near, &format!("{path}&index={again}&wait=1s"));
    assert_eq!(watcher.answer().0, again, "nothing changed in its time");
}

/// Debian builds its Prometheus without `consul_sd_configs`; VictoriaMetrics reads the same section of
/// the same file, asks as Prometheus does and tells its targets as Prometheus does.
#[test]
fn consul_sd_configs_find_their_targets_and_scrape_them_through_the_mesh() {
    let _turn = beside_others();
    let Some(scraper) = program("victoria-metrics") else { return };
    let mesh = TestMesh::of(&["near", "far"]);
    let (near, far) = (mesh.agent("near"), mesh.agent("far"));
    far.expose("agent-metrics", far.api); // what it serves to Prometheus is real
    let entry = near.upstream("agent-metrics");
    let (at, config) = (free_address(), mesh.home.path().join("prometheus.yml"));
    let text = format!(
        "global: {{ scrape_interval: 1s }}\n\
         scrape_configs:\n  - job_name: mesh\n    consul_sd_configs:\n      - server: '{}'\n",
        near.api
    );
    fs::write(&config, text).unwrap();
    let mut command = Command::new(scraper);
    command.arg(format!("-promscrape.config={}", config.display()));
    command.arg("-promscrape.consulSDCheckInterval=1s");
    command.arg(format!("-storageDataPath={}", mesh.home.path().join("metrics").display()));
    command.arg(format!("-httpListenAddr={at}"));
    let _scraper = Program::start(&mut command);
    let targets = || {
        let path = "/api/v1/targets?state=active";
        match request(&At::Tcp(at), "GET", path, &[], b"") {
            Ok(answer) if answer.status == 200 => {
                answer.json()["data"]["activeTargets"].as_array().cloned().unwrap_or_default()
            }
            _ => Vec::new(), // it is starting
        }
    };
    let mut found = Value::Null;
    eventually("the far agent is scraped", SOON, || {
        let targets = targets();
        found = targets.first().cloned().unwrap_or_default();
        check(targets.len() == 1 && found["health"] == "up", targets)
    });
    let labels = &found["discoveredLabels"];
    for (label, expected) in [
        ("__address__", entry.to_string()),
        ("__meta_consul_service", "agent-metrics".to_owned()),
        ("__meta_consul_node", "far".to_owned()),
        ("__meta_consul_dc", "dc1".to_owned()),
        ("__meta_consul_health", "passing".to_owned()),
    ] {
        assert_eq!(labels[label], expected, "{label}: {labels}");
    }
    near.expose("agent-metrics-2", near.api);
    let count = |expected: usize| {
        eventually(&format!("{expected} targets are known"), SOON, || {
            let targets = targets();
            check(targets.len() == expected, targets)
        });
    };
    count(2);
    near.run(&["unexpose", "agent-metrics-2"]).ok();
    count(1);
}

#[test]
fn an_agent_that_is_told_a_unix_socket_opens_no_port_for_its_api() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    mesh.found("one").stop();
    let agent = mesh.agent("one");
    let socket = format!("unix:{}", mesh.home.path().join("murmesh.sock").display());
    let mut command = agent.command(&["agent", "--mesh", &agent.mesh.to_string()]);
    let running = Program::start(command.args(["--api", &socket]));
    eventually("it answers there", SOON, || {
        let ran = agent.run(&["--api", &socket, "status"]);
        check(ran.code == Some(0), ran)
    });
    let dump = agent.run(&["--api", &socket, "config", "dump"]).ok();
    assert!(dump.contains(&socket) && !dump.contains(":7371"), "{dump}");
    let sockets = fs::read_dir(format!("/proc/{}/fd", running.id())).unwrap();
    let links = sockets.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    let own: Vec<_> = links.map(|link| link.display().to_string()).collect();
    let listening = fs::read_to_string("/proc/net/tcp").unwrap();
    let is_own = |line: &&str| {
        let mut words = line.split_whitespace();
        let (state, inode) = (words.nth(3), words.nth(5));
        state == Some("0A") && own.contains(&format!("socket:[{}]", inode.unwrap_or_default()))
    };
    assert_eq!(listening.lines().find(is_own), None, "a port is open");
}

#[test]
fn the_api_answers_on_a_unix_socket_with_the_same_rules() {
    let _turn = beside_others();
    let Some(curl) = program("curl") else { return };
    let mut mesh = TestMesh::new();
    let agent = mesh.found("one");
    let socket = agent.data_dir.join("api.sock");
    let mode = fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let unix = socket.display().to_string();
    let curl = |arguments: &[&str]| -> Ran {
        let mut command = Command::new(&curl);
        command.args(["-sS", "-o", "-", "-w", "%{http_code}", "--unix-socket", &unix]);
        run_program(command.args(arguments), b"", LONG)
    };
    assert!(curl(&["http://localhost/ready"]).ok().ends_with("200"));
    assert!(curl(&["http://evil.example/ready"]).ok().ends_with("421"));
    let origin = ["-H", "origin: http://evil.example", "http://localhost/ready"];
    assert!(curl(&origin).ok().ends_with("403"));
    let register = ["-X", "PUT", "-d", r#"{"Name":"web","Port":80}"#];
    let place = ["http://localhost/v1/agent/service/register"];
    assert!(curl(&[&register[..], &place].concat()).ok().ends_with("401"));
    let told = ["-H", &format!("x-consul-token: {}", agent.api_token())];
    assert!(curl(&[&register[..], &told, &place].concat()).ok().ends_with("200"));

    let api = format!("unix:{unix}");
    let listed = agent.run(&["services", "--json", "--api", &api]).ok();
    assert!(listed.contains("\"web\""), "{listed}");
    agent.run(&["expose", "db", "127.0.0.1:5432", "--api", &api]).ok();
    let mut members = agent.command(&["members"]);
    members.env("MURMESH_API", &api);
    assert!(run_program(&mut members, b"", LONG).ok().contains("one"));
    let nowhere = agent.run(&["members", "--api", "unix:/nowhere/api.sock"]).fails(69);
    assert!(nowhere.contains("unix:/nowhere/api.sock"), "{nowhere}");
}

#[test]
fn a_dead_agents_socket_is_replaced_and_a_live_ones_never() {
    let _turn = beside_others();
    let mut mesh = TestMesh::new();
    let asked = mesh.home.path().join("asked.sock");
    let agent = mesh.found("one");
    let own = agent.data_dir.join("api.sock");
    let answers = |path: &Path| {
        let api = format!("unix:{}", path.display());
        agent.run(&["members", "--json", "--api", &api]).ok().contains("\"one\"")
    };
    assert!(answers(&own));
    let second = agent.run(&["agent", "--mesh", &free_address().to_string()]);
    assert!(second.code != Some(0) && answers(&own), "{second:?}");

    agent.kill();
    assert!(own.exists(), "nobody was there to remove it");
    agent.start();
    assert!(answers(&own), "taken over");
    agent.stop();
    assert!(!own.exists(), "removed by an orderly stop");

    // One more where somebody wants it, beside the one of the data directory.
    let (at, api) = (agent.mesh.to_string(), format!("unix:{}", asked.display()));
    let mut command = agent.command(&["agent", "--mesh", &at, "--api", &api]);
    let program = Program::start(&mut command);
    assert!(answers(&asked) && answers(&own), "a command waits for its agent");
    drop(program);
    let _ = fs::remove_file(&asked);
    fs::write(&asked, "mine").unwrap();
    let refused = agent.run(&["agent", "--mesh", &at, "--api", &api]).fails(2);
    assert!(refused.contains("asked.sock"), "{refused}");
    assert_eq!(fs::read_to_string(&asked).unwrap(), "mine");
}

#[test]
fn only_the_group_murmesh_may_connect_to_the_socket_and_it_can_read_no_key() {
    let _turn = beside_others();
    if !rustix::process::geteuid().is_root() {
        return skip("another user and group need root");
    }
    let (Some(curl), Some(unshare)) = (program("curl"), program("unshare")) else { return };
    let Some(setpriv) = program("setpriv") else { return };
    let tried = run_program(Command::new(&unshare).args(["--mount", "true"]), b"", LONG);
    if tried.code != Some(0) {
        return skip(&format!("no mount namespaces: {}", tried.stderr));
    }
    let mut mesh = TestMesh::new();
    let agent = mesh.found("one");
    agent.stop();
    let home = agent.data_dir.parent().unwrap();
    fs::set_permissions(home, fs::Permissions::from_mode(0o755)).unwrap();

    // The agent alone sees a machine that has the group.
    let groups = home.join("group");
    let listed = fs::read_to_string("/etc/group").unwrap();
    fs::write(&groups, format!("{listed}murmesh:x:54321:\n")).unwrap();
    let (at, api) = (agent.mesh.to_string(), agent.api.to_string());
    let inner = agent.command(&["agent", "--mesh", &at, "--api", &api]);
    let mut outer = Command::new(unshare);
    outer.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/group && exec \"$@\""]);
    outer.arg(&groups).arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    let _agent = Program::start(&mut outer);
    let socket = agent.data_dir.join("api.sock");
    agent.run(&["members", "--api", &format!("unix:{}", socket.display())]).ok();

    let with_group = |group: &str, words: &[&str]| {
        let mut command = Command::new(&setpriv);
        command.args(["--reuid", "65534", "--regid", group, "--clear-groups"]).args(words);
        run_program(&mut command, b"", LONG)
    };
    let (curl, socket) = (curl.display().to_string(), socket.display().to_string());
    let live = [&curl, "-sS", "--unix-socket", &socket, "http://localhost/live"];
    assert!(with_group("54321", &live).ok().contains("true"));
    assert_eq!(with_group("65534", &live).code, Some(7), "others cannot connect");
    let key = agent.data_dir.join("node.key").display().to_string();
    let cat = with_group("54321", &["cat", &key]);
    assert!(cat.code == Some(1) && cat.stderr.contains("denied"), "{cat:?}");
}
