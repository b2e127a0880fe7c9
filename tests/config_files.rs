//! What the user wrote: every fault at once, nothing taken and ignored.

use std::path::PathBuf;
use std::time::Duration;

use murmesh::balancer::{Balance, Prefer};
use murmesh::config::{ConfigError, Overrides, Setting, Settings, load, load_texts};

use crate::support::beside_others;

fn read(text: &str) -> Result<Settings, ConfigError> {
    let nowhere = tempfile::tempdir().unwrap();
    let overrides = Overrides {
        data_dir: Some(Setting::default(nowhere.path().to_owned())),
        ..Overrides::default()
    };
    load_texts(vec![(PathBuf::from("murmesh.toml"), text.to_owned())], &overrides)
}

fn faults(text: &str) -> Vec<String> {
    match read(text) {
        Err(ConfigError::Faults(faults)) => faults.iter().map(ToString::to_string).collect(),
        other => panic!("expected faults, got {other:?}"),
    }
}

/// Five faults of five kinds: each is told with its line, key, value and what was expected.
#[test]
fn five_faults_are_told_at_once() {
    let _turn = beside_others();
    let told = faults(
        r#"[node]
zone = "eu1 a"

[listen]
mesh = "0.0.0.0"
api = "0.0.0.0:7371"

[join]
forget_after = 72

[[expose]]
name = "web"
weight = -1
"#,
    );
    let expected = [
        r#"murmesh.toml:2: node.zone = "eu1 a": expected at most 64 letters, digits and -_./, for instance eu1/a"#,
        r#"murmesh.toml:5: listen.mesh = "0.0.0.0": expected ip:port of this machine, for instance 0.0.0.0:7370"#,
        r#"murmesh.toml:6: listen.api = "0.0.0.0:7371": expected a loopback address, for instance 127.0.0.1:7371"#,
        r#"murmesh.toml:9: join.forget_after = 72: a duration needs a unit, for instance "72s""#,
        "murmesh.toml:11: expose[0].to: is missing",
        "murmesh.toml:13: expose[0].weight = -1: expected a whole number from 0 to 10000",
    ];
    for line in expected {
        assert!(told.iter().any(|fault| fault == line), "missing: {line}\nin: {told:#?}");
    }
    assert_eq!(told.len(), expected.len());
}

#[test]
fn a_unix_socket_for_the_api_is_not_available_yet() {
    let _turn = beside_others();
    let told = faults("[listen]\napi = \"unix:/run/api.sock\"\n");
    assert!(told[0].contains("listen.api") && told[0].contains("not available yet"), "{told:?}");
}

#[test]
fn unknown_keys_come_with_a_suggestion() {
    let _turn = beside_others();
    let told = faults("[listen]\nadvertize = \"10.0.0.1:7370\"\n[nod]\nname = \"a\"\n");
    assert_eq!(
        told,
        [
            "murmesh.toml:2: listen.advertize: unknown key, did you mean 'advertise'?",
            "murmesh.toml:3: nod: unknown section, did you mean 'node'?",
        ]
    );
}

/// Keys of later versions, one of each section: refused, never taken and ignored.
#[test]
fn keys_of_later_versions_are_refused_as_not_available_yet() {
    let _turn = beside_others();
    for (text, key) in [
        ("[node]\ndomain = \"corp\"", "node.domain"),
        ("[[expose]]\nname = \"a\"\nto = \"80\"\ndrain = \"5s\"", "expose[0].drain"),
        ("[node]\nvip = \"127.64.0.0/10\"", "node.vip"),
        ("[listen]\ndns = \"127.0.0.1:7353\"", "listen.dns"),
        ("[listen]\nmetrics = \"10.0.0.1:7374\"", "listen.metrics"),
        ("[[expose]]\nname = \"a\"\nto = \"80\"\nallow = [\"b\"]", "expose[0].allow"),
        ("[[upstream]]\nservice = \"a\"\nlisten = \"80\"\nas = \"b\"", "upstream[0].as"),
        ("[telemetry]\notlp = \"http://x\"", "telemetry.otlp"),
        ("[[allow]]\nfrom = \"a\"", "allow"),
    ] {
        let told = faults(text);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains(&format!(" {key}")), "{told:?}");
        assert!(told[0].contains("not available yet"), "{told:?}");
    }
    let text = "[[expose]]\nname = \"a\"\nto = \"80\"\nprotocol = \"udp\"";
    assert!(faults(text)[0].contains("not available yet"));
}

#[test]
fn balancing_is_read_and_what_contradicts_itself_is_told() {
    let _turn = beside_others();
    let upstream = "[[upstream]]\nservice = \"a\"\nlisten = \"80\"\n";
    let settings = read(&format!(
        "{upstream}balance = \"least_request\"\nprefer = [\"same-zone\", \"any\"]\n\
         breaker = {{ errors = 3, ratio = 0.25, window = \"20s\", min = 4, scope = \"local\" }}\n\
         [[expose]]\nname = \"b\"\nto = \"81\"\ninflight = {{ soft = 20, hard = 30 }}\n"
    ))
    .unwrap();
    let options = settings.upstreams[0].value.options();
    assert_eq!(options.balancing.balance, Balance::LeastRequest);
    assert_eq!(options.balancing.prefer, Prefer::try_new(&["same-zone", "any"]).unwrap());
    let breaker = options.breaker.unwrap().config();
    assert_eq!((breaker.errors, breaker.ratio, breaker.samples_min), (3, 0.25, 4));
    assert_eq!(breaker.window, Duration::from_secs(20));
    let inflight = settings.exposes[0].value.inflight;
    assert_eq!((inflight.soft, inflight.hard), (Some(20), Some(30)));
    for (line, key, expected) in [
        ("balance = \"best\"", "upstream[0].balance", "peak_ewma, least_request, round_robin"),
        ("prefer = [\"any\", \"same-zone\"]", "upstream[0].prefer", "nearest first"),
        ("hash = \"client\"", "upstream[0]", "without balance \"maglev\""),
        ("balance = \"maglev\"\nhash = \"user\"", "upstream[0].hash", "header:NAME"),
        ("balance = \"maglev\"\nprefer = [\"any\"]", "upstream[0]", "the key says"),
        ("breaker = { ratio = 1.5 }", "upstream[0].breaker.ratio", "above 0 and up to 1"),
        ("breaker = { window = \"5ms\" }", "upstream[0].breaker.window", "1s to 1h"),
        ("breaker = { errors = 0 }", "upstream[0].breaker.errors", "from 1 to"),
        ("breaker = { eror = 1 }", "upstream[0].breaker.eror", "did you mean"),
    ] {
        let told = faults(&format!("{upstream}{line}\n"));
        assert_eq!(told.len(), 1, "{line}: {told:?}");
        assert!(told[0].contains(key) && told[0].contains(expected), "{told:?}");
    }
    let expose = "[[expose]]\nname = \"b\"\nto = \"81\"\n";
    for line in ["inflight = { soft = 3, hard = 2 }", "inflight = { hard = 0 }"] {
        let told = faults(&format!("{expose}{line}\n"));
        assert!(told[0].contains("expose[0].inflight"), "{told:?}");
    }
}

#[test]
fn values_of_logging_and_relative_unix_paths_are_refused_with_what_is_expected() {
    let _turn = beside_others();
    for (text, key, expected) in [
        ("[telemetry]\nlog = \"loud\"", "telemetry.log = \"loud\"", "off, error, warn"),
        ("[telemetry]\nlog = \"warn,murmesh=loud\"", "telemetry.log", "off, error, warn"),
        ("[telemetry]\nlog = \"info,\"", "telemetry.log", "off, error, warn"),
        ("[telemetry]\nlog_format = \"xml\"", "telemetry.log_format = \"xml\"", "text or json"),
        ("[[expose]]\nname = \"a\"\nto = \"unix:a.sock\"", "expose[0].to", "begins with /"),
        ("[[upstream]]\nservice = \"a\"\nlisten = \"unix:a.sock\"", "upstream[0].listen", "with /"),
        ("[listen]\nmesh = \"224.0.0.1:7370\"", "listen.mesh", "ip:port of this machine"),
    ] {
        let told = faults(text);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains(key) && told[0].contains(expected), "{told:?}");
    }
    for log in ["info", "WARN", "warn,murmesh=debug", "off,murmesh::proxy=trace"] {
        read(&format!("[telemetry]\nlog = \"{log}\"")).unwrap();
    }
}

#[test]
fn faults_of_balancers_breakers_and_checks_name_their_key_what_is_expected_and_the_nearest_word() {
    let _turn = beside_others();
    let upstream = "[[upstream]]\nservice = \"a\"\nlisten = \"127.0.0.1:80\"\n";
    for (line, key, expected) in [
        ("prefer = []", "upstream[0].prefer = []", "without 'prefer' all are alike"),
        ("prefer = [\"same-zon\"]", "upstream[0].prefer", "did you mean 'same-zone'?"),
        ("balance = \"maglv\"", "upstream[0].balance = \"maglv\"", "did you mean 'maglev'?"),
        ("hash = \"client\"", "upstream[0].hash", "without balance \"maglev\""),
        ("breaker = { window = \"0s\" }", "upstream[0].breaker.window = \"0s\"", "from 1s to 1h"),
        ("breaker = { scope = \"mash\" }", "upstream[0].breaker.scope", "did you mean 'mesh'?"),
    ] {
        let told = faults(&format!("{upstream}{line}\n"));
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].contains(key) && told[0].contains(expected), "{told:?}");
    }
    let check = "[[expose]]\nto = \"80\"\nproxy_protocol = \"v3\"\nhealth = { http = \"/\", timeout = \
                 \"1h\", interval = \"1ms\", header = { a = 1, b = 2 } }\n";
    let told = faults(check);
    for key in
        ["name", "proxy_protocol", "health.timeout", "health.interval", "header.a", "header.b"]
    {
        let is_told = told.iter().any(|fault| fault.contains(&format!("expose[0].{key}")));
        let is_told = is_told || told.iter().any(|fault| fault.contains(&format!("health.{key}")));
        assert!(is_told, "{key} at once with the others: {told:#?}");
    }
}

/// One fault for each line that is no TOML; none for what only seems wrong because of it.
#[test]
fn lines_that_are_no_toml_are_told_once_and_nothing_is_made_of_them() {
    let _turn = beside_others();
    for (text, lines) in [
        ("[node]\nname = \"a\"\nzone = \n", &[3][..]),
        ("[[expose]]\nname = \"a\"\nto = \n", &[3]),
        ("[[expose]]\nname = \"a\"\nto \"80\"\n", &[3]),
        ("[listen]\nmesh = 0.0.0.0:7370\napi = 127.0.0.1\n", &[2, 3]),
        ("[[expose]]\nname = a\nto = \"80\"\nweight = 1O\n", &[2, 4]),
        ("[[expose]\nname = \"a\"\nto = \"80\"\n", &[1]),
        ("[node]\nnmae = \"a\"\nzone = \"eu1\n", &[2, 3]), // what stands before is judged
        ("[join]\nseeds = [\"a:1\"\n[listen]\nmesh = \"x\"\n[node]\nname = \"X\"\n", &[3]),
        ("[join]\nseeds = [\n\"a:1\",\nprofile = \"lan\"\n[node]\nname = \"a\"\n", &[4]),
        ("[join]\nseeds = [\"a:1\"\n[listen]\nmesh = 0.0.0.0:1\n", &[3, 4]),
    ] {
        let told = faults(text);
        let expected: Vec<_> = lines.iter().map(|line| format!("murmesh.toml:{line}: ")).collect();
        assert_eq!(told.len(), expected.len(), "{text}{told:#?}");
        for (fault, place) in told.iter().zip(&expected) {
            assert!(fault.starts_with(place), "{text}{told:#?}");
        }
    }
}

#[test]
fn faults_are_told_file_by_file_in_the_order_of_their_lines() {
    let _turn = beside_others();
    let upstream = "[[upstream]]\nservice = \"db\"\nlisten = \"5432\"\n";
    let first = format!("{upstream}{upstream}[telemetry]\nlog = \"\"\n[node]\nnmae = \"a\"\n");
    let files = [("z.toml", first.as_str()), ("conf.d/a.toml", "[node]\nzone = \"e u\"\n")];
    let files = files.map(|(path, text)| (PathBuf::from(path), text.to_owned()));
    let overrides = Overrides {
        data_dir: Some(Setting::default("/nowhere".into())),
        socks: Some("x".to_owned()),
        ..Overrides::default()
    };
    let Err(ConfigError::Faults(told)) = load_texts(files.into(), &overrides) else {
        panic!("expected faults")
    };
    let places: Vec<_> = told.iter().map(|fault| fault.origin.to_string()).collect();
    let expected = ["z.toml:4", "z.toml:8", "z.toml:10", "conf.d/a.toml:2", "flag --socks"];
    assert_eq!(places, expected, "{told:#?}");
    assert!(told[2].message.contains("did you mean 'name'?"), "{told:#?}");
}

#[test]
fn two_that_want_the_same_are_told_apart() {
    let _turn = beside_others();
    let told = faults(
        r#"
[[expose]]
name = "web"
to = "8080"
[[expose]]
name = "web"
to = "8081"
[[upstream]]
service = "db"
listen = "5432"
[[upstream]]
service = "cache"
listen = "127.0.0.1:5432"
"#,
    );
    assert!(told[0].contains("taken by murmesh.toml:2"), "{told:?}");
    assert!(told[1].contains("taken by murmesh.toml:8"), "{told:?}");
}

#[test]
fn breaker_that_could_have_no_effect_is_refused_by_its_key() {
    let _turn = beside_others();
    let gateway = "[gateway]\npublic = \"0.0.0.0:443\"\n\
                   certificates = [{ cert = \"/a.pem\", key = \"/a.key\" }]\n";
    let public = "[[upstream]]\nservice = \"web\"\npublic = true\nhosts = [\"a.example.com\"]\n";
    let entry =
        |port: u16| format!("[[upstream]]\nservice = \"web\"\nlisten = \"127.0.0.1:{port}\"\n");
    let breaker = |errors: u16| format!("breaker = {{ errors = {errors} }}\n");
    let (one, two, three, four) = (entry(6_001), entry(6_002), breaker(3), breaker(4));
    let told = faults(&format!("{gateway}{public}{three}")).join("\n");
    assert!(
        told.contains("upstream[0].breaker") && told.contains("means nothing without listen"),
        "{told}"
    );
    let told = faults(&format!("{one}{three}{two}{four}")).join("\n");
    assert!(told.contains("upstream.breaker: differs from that of"), "{told}");
    for sound in [format!("{one}{three}{two}"), format!("{one}{three}{two}{three}")] {
        assert!(read(&sound).is_ok(), "{sound}");
    }
}

#[test]
fn a_public_gateway_without_one_of_its_parts_is_refused() {
    let _turn = beside_others();
    let gateway = "[gateway]\npublic = \"0.0.0.0:443\"\n";
    let pair = "certificates = [{ cert = \"/a.pem\", key = \"/a.key\" }]\n";
    let public = "[[upstream]]\nservice = \"web\"\npublic = true\n";
    let hosts = "hosts = [\"a.example.com\"]\n";
    for (text, message) in [
        (gateway.to_owned(), "needs gateway.certificates"),
        (format!("[gateway]\n{pair}"), "without gateway.public"),
        ("[gateway]\nredirect = \"0.0.0.0:80\"\n".to_owned(), "without gateway.public"),
        (format!("{public}{hosts}"), "without gateway.public"),
        (format!("{gateway}{pair}{public}"), "hosts: is missing"),
        (format!("{gateway}{pair}{public}hosts = []\n"), "hosts: is missing"),
        (format!("{gateway}{pair}{public}hosts = [\"A.example.com\"]\n"), "in lower case"),
        (format!("{gateway}{pair}{public}{hosts}{public}{hosts}"), "is taken by"),
        (format!("[[upstream]]\nservice = \"web\"\n{hosts}"), "listen: is missing"),
        (format!("{gateway}certificates = [{{ cert = \"/a.pem\" }}]\n"), "key: is missing"),
        (format!("{gateway}certificates = [{{ cert = \"a\", key = \"/k\" }}]\n"), "absolute"),
        (format!("{gateway}certificates = [{{ crt = \"/a\", key = \"/k\" }}]\n"), "unknown key"),
        (format!("{gateway}certificates = \"/a.pem\"\n"), "expected a list"),
        (format!("{gateway}{pair}redirect = \"0.0.0.0:443\"\n"), "is taken by"),
    ] {
        let told = faults(&text).join("\n");
        assert!(told.contains(message), "{text}{told}");
    }
}

#[test]
fn entries_for_other_machines_are_refused() {
    let _turn = beside_others();
    let told = faults("[[upstream]]\nservice = \"db\"\nlisten = \"0.0.0.0:5432\"");
    assert!(told[0].contains("loopback"), "{told:?}");
}

/// Flag over environment over file over the data directory over default, and each value says so.
#[test]
fn every_value_remembers_where_it_came_from() {
    let _turn = beside_others();
    let temporary = tempfile::tempdir().unwrap();
    let config = temporary.path().join("murmesh.toml");
    std::fs::write(&config, "[node]\nzone = \"eu1/a\"\n\n[listen]\nmesh = \"127.0.0.1:1\"\n")
        .unwrap();
    std::fs::create_dir(temporary.path().join("conf.d")).unwrap();
    std::fs::write(temporary.path().join("conf.d/10.toml"), "[node]\nname = \"web-1\"\n").unwrap();
    std::fs::write(
        temporary.path().join("node.toml"),
        "mesh = \"127.0.0.1:2\"\nadvertise = \"10.0.0.9:7370\"\nseeds = [\"10.0.0.1:7370\"]\n",
    )
    .unwrap();
    let overrides = Overrides {
        config: Some(config),
        data_dir: Some(Setting::default(temporary.path().to_owned())),
        seeds: vec!["seed.example.com".parse().unwrap()],
        ..Overrides::default()
    };
    let settings = load(&overrides).unwrap();
    let origin = |key: &str| {
        let dump = settings.dump();
        let view = dump.iter().find(|view| view.key == key).unwrap();
        format!("{} from {}", view.value, view.origin)
    };
    let place = temporary.path().display();
    assert_eq!(origin("node.zone"), format!("\"eu1/a\" from {place}/murmesh.toml:2"));
    assert_eq!(origin("node.name"), format!("\"web-1\" from {place}/conf.d/10.toml:2"));
    assert_eq!(origin("listen.mesh"), format!("\"127.0.0.1:1\" from {place}/murmesh.toml:5"));
    assert_eq!(origin("listen.advertise"), "\"10.0.0.9:7370\" from data_dir");
    assert_eq!(origin("join.seeds"), "[\"seed.example.com:7370\"] from flag --seed");
    assert_eq!(origin("listen.api"), "\"127.0.0.1:7371\" from default");
}

/// Neither of two files is more right than the other.
#[test]
fn a_key_in_two_files_is_a_fault_that_names_both_places() {
    let _turn = beside_others();
    let temporary = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(temporary.path().join(name), text).unwrap();
    std::fs::create_dir(temporary.path().join("conf.d")).unwrap();
    let seeds = "[join]\nseeds = [\"10.0.0.1\"]\nforget_after = \"1h\"\n";
    write("murmesh.toml", &format!("{seeds}[node]\nzone = \"eu1\"\n"));
    write("conf.d/20.toml", &format!("[[upstream]]\nservice = \"db\"\nlisten = \"5432\"\n{seeds}"));
    write(
        "conf.d/10.toml",
        "[node]\n\nzone = \"eu1\"\n[[upstream]]\nservice = \"web\"\nlisten = \"80\"\n",
    );
    write("conf.d/30.toml.bak", "no TOML");
    let overrides = Overrides {
        config: Some(temporary.path().join("murmesh.toml")),
        data_dir: Some(Setting::default(temporary.path().to_owned())),
        ..Overrides::default()
    };
    let Err(ConfigError::Faults(told)) = load(&overrides) else { panic!("expected faults") };
    let place = temporary.path().display();
    let told: Vec<_> = told.iter().map(ToString::to_string).collect();
    let expected = [
        format!(
            "{place}/conf.d/10.toml:3: node.zone = \"eu1\": is set by {place}/murmesh.toml:5 already"
        ),
        format!(
            "{place}/conf.d/20.toml:5: join.seeds = [\"10.0.0.1\"]: is set by {place}/murmesh.toml:2 already"
        ),
        format!(
            "{place}/conf.d/20.toml:6: join.forget_after = \"1h\": is set by {place}/murmesh.toml:3 already"
        ),
    ];
    assert_eq!(told, expected);
}

/// The example that people copy is one that the agent takes.
#[test]
fn the_example_of_the_readme_is_valid() {
    let _turn = beside_others();
    let readme = include_str!("../README.md");
    let example = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let settings = read(example).unwrap();
    assert!(!settings.exposes.is_empty() && !settings.upstreams.is_empty());
}
