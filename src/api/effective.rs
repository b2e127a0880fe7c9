//! `/v1/mesh/config`: what flags and files say, and what commands have changed since.

use serde_json::{Value, json};

use super::{ApiState, Local, SettingView, UpstreamSpec};

/// Where a setting is from that a command has left.
const RUNTIME: &str = "runtime.toml";

/// Begins the origin of a setting that a command has changed; what follows wins at the next start.
pub const UNTIL_RESTART: &str = "a command, until the agent restarts: then ";

/// Every value that holds and where it is from.
pub(super) fn config(state: &ApiState) -> Vec<SettingView> {
    effective(&state.effective.load().settings, &state.local())
}

fn effective(asked: &[SettingView], local: &Local) -> Vec<SettingView> {
    let mut here = of_machine(local);
    let mut rows: Vec<_> = asked
        .iter()
        .map(|row| {
            let is_expose = row.key.starts_with("expose.");
            if !is_expose && !row.key.starts_with("upstream.") {
                return row.clone();
            }
            // An instance has one row; more than one entry may lead to a service, and of a port that
            // the system chose nobody knows more than that it is one.
            let is_any = row.value.as_str().is_some_and(|listen| listen.ends_with(":0"));
            let is_same = |now: &SettingView| {
                now.key == row.key && (is_expose || is_any || now.value == row.value)
            };
            let now = here.iter().position(is_same).map(|at| here.remove(at).value);
            match now {
                Some(value) if value == row.value || is_any => row.clone(),
                now => SettingView {
                    key: row.key.clone(),
                    value: now.unwrap_or(Value::Null),
                    origin: format!("{UNTIL_RESTART}{}", row.origin),
                },
            }
        })
        .collect();
    rows.extend(here);
    rows
}

/// What an entry says, by key: where it listens, its breaker with every default, and what else is not
/// as usual.
pub fn of_upstream(spec: &UpstreamSpec) -> Vec<(String, Value)> {
    let UpstreamSpec { timeout, retry, balance, prefer, hash, breaker, .. } = spec;
    let others = [
        ("timeout", (!timeout.is_default()).then(|| json!(timeout))),
        ("retry", (!retry.is_default()).then(|| json!(retry))),
        ("balance", (!balance.is_default()).then(|| json!(balance))),
        ("prefer", (!prefer.is_empty()).then(|| json!(prefer))),
        ("hash", hash.as_ref().map(|hash| json!(hash))),
        ("breaker", Some(json!(breaker.whole()))),
    ];
    let key = format!("upstream.{}", spec.service);
    let others = others.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let others: Vec<_> = others.map(|(name, value)| (format!("{key}.{name}"), value)).collect();
    [vec![(key, spec.listen.to_string().into())], others].concat()
}

/// What this machine offers, opens and hides, as if nothing but commands had said so.
fn of_machine(local: &Local) -> Vec<SettingView> {
    let view = |key: String, value| SettingView { key, value, origin: RUNTIME.to_owned() };
    let exposed = local.exposed.iter().chain(&local.withheld);
    let exposed = exposed
        .map(|spec| view(format!("expose.{}", spec.id), json!(spec.clone().without_secrets())));
    let open = local.upstreams.iter().flat_map(of_upstream);
    let open = open.map(|(key, value)| view(key, value));
    let (out, forgotten) = (&local.out, &local.forgotten);
    let others = [
        ("draining", out.node_draining.then(|| json!("this machine"))),
        ("draining.instances", (!out.draining.is_empty()).then(|| json!(out.draining))),
        ("maintenance", (!out.maintenance.is_empty()).then(|| json!(out.maintenance))),
        ("forgotten", (!forgotten.is_empty()).then(|| json!(forgotten))),
    ];
    let others = others.into_iter().filter_map(|(key, value)| Some(view(key.to_owned(), value?)));
    exposed.chain(open).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ExposeSpec;

    #[test]
    fn what_a_command_added_changed_and_took_back_is_told_apart_from_what_files_say() {
        let spec = |name: &str, port: u16| {
            let to = format!("127.0.0.1:{port}").parse().unwrap();
            ExposeSpec::new(name.parse().unwrap(), to).unwrap()
        };
        let upstream = |port: u16| {
            let listen = format!("127.0.0.1:{port}").parse().unwrap();
            UpstreamSpec::new("db".parse().unwrap(), listen)
        };
        let asked = |key: &str, value| SettingView {
            key: key.to_owned(),
            value,
            origin: "murmesh.toml:3".to_owned(),
        };
        let files = [
            asked("node.zone", "eu1/a".into()),
            asked("expose.same", json!(spec("same", 1))),
            asked("expose.other", json!(spec("other", 2))),
            asked("expose.gone", json!(spec("gone", 3))),
            asked("upstream.db", "127.0.0.1:5".into()),
            asked("upstream.db", "127.0.0.1:6".into()),
        ];
        let local = Local {
            exposed: vec![spec("added", 9), spec("other", 22), spec("same", 1)],
            upstreams: vec![upstream(5), upstream(7)],
            ..Local::default()
        };
        let rows = effective(&files, &local);
        let (breakers, others): (Vec<_>, Vec<_>) =
            rows.iter().partition(|row| row.key.ends_with(".breaker"));
        assert_eq!(breakers[0].key, "upstream.db.breaker");
        let usual = json!({
            "errors": 5, "ratio": 0.5, "window": "10s", "min": 10, "scope": "mesh",
        });
        assert_eq!(breakers[0].value, usual, "with every default");
        let words: Vec<_> = others
            .iter()
            .map(|row| (row.key.as_str(), row.value.is_null(), row.origin.as_str()))
            .collect();
        let (file, changed) = ("murmesh.toml:3", &*format!("{UNTIL_RESTART}murmesh.toml:3"));
        assert_eq!(
            words,
            [
                ("node.zone", false, file),
                ("expose.same", false, file),
                ("expose.other", false, changed),
                ("expose.gone", true, changed),
                ("upstream.db", false, file),
                ("upstream.db", true, changed),
                ("expose.added", false, RUNTIME),
                ("upstream.db", false, RUNTIME),
            ]
        );
        assert_eq!(rows[2].value["to"], "127.0.0.1:22");
    }
}
