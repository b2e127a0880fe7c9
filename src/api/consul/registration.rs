//! Reads the body of `PUT /v1/agent/service/register`.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{checks, not_yet};
use crate::api::control::ExposeSpec;
use crate::api::problem::Refusal;
use crate::model::{InstanceId, ServiceName, Target, Weight};

/// What this agent would have to do for the service and does not. A warning would not do: clients drop
/// what they do not expect, and whoever registered would believe that it is done.
const NOT_DONE: &[(&str, &str)] = &[
    ("connect", "there are no sidecars: the agent itself carries traffic"),
    ("proxy", "there are no sidecars: the agent itself carries traffic"),
    ("kind", "there are only plain services"),
];

/// One of Consul's weight is this many of ours, so that its default is our default.
pub(super) const WEIGHT_UNIT: u16 = 100;

/// The instance that a body describes. Keys are matched as Consul matches them, whatever their case.
/// `Meta`, `TaggedAddresses`, `EnableTagOverride` and keys that nobody knows are let pass: without
/// them less is told of the instance, but nothing wrong.
pub(super) fn read(bytes: &[u8]) -> Result<ExposeSpec, Refusal> {
    let body: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|error| Refusal::malformed(error.to_string()))?;
    let body = folded(body);
    for (key, why) in NOT_DONE {
        if body.get(*key).is_some_and(|value| !is_empty(value)) {
            let text = format!("{key}: {why}; register without it");
            return Err(not_yet(text));
        }
    }
    let name: ServiceName = field(&body, "Name")?.ok_or_else(|| {
        Refusal::malformed(
            "Name is missing: the service, for instance {\"Name\":\"web\",\"Port\":8080}",
        )
    })?;
    let mut spec = ExposeSpec::new(name, target(&body)?).map_err(malformed)?;
    let id = field::<String>(&body, "ID")?.filter(|id| !id.is_empty());
    if let Some(id) = id {
        spec.id = InstanceId::try_new(&id).map_err(malformed)?;
    }
    spec.tags = field(&body, "Tags")?.unwrap_or_default();
    let weights: Map<String, Value> = field(&body, "Weights")?.unwrap_or_default();
    if let Some(passing) = field::<u16>(&folded(weights), "Passing")? {
        spec.weight = Weight(passing.saturating_mul(WEIGHT_UNIT));
    }
    spec.checks = checks::read(&body)?;
    spec.check().map_err(malformed)
}

/// The same with keys in one form.
pub(super) fn folded(fields: Map<String, Value>) -> Map<String, Value> {
    let fold = |key: &str| key.replace('_', "").to_ascii_lowercase();
    fields.into_iter().map(|(key, value)| (fold(&key), value)).collect()
}

/// Where the instance listens: on loopback unless an address is told.
fn target(body: &Map<String, Value>) -> Result<Target, Refusal> {
    let text = |key| field::<String>(body, key).map(|text| text.filter(|text| !text.is_empty()));
    if let Some(path) = text("SocketPath")? {
        return format!("unix:{path}").parse().map_err(malformed);
    }
    let port = field::<u16>(body, "Port")?.filter(|port| *port > 0).ok_or_else(|| {
        Refusal::malformed("Port is missing: where the instance listens, or SocketPath")
    })?;
    let address = text("Address")?.unwrap_or_else(|| "127.0.0.1".to_owned());
    let target = match address.contains(':') && !address.starts_with('[') {
        true => format!("[{address}]:{port}"),
        false => format!("{address}:{port}"),
    };
    target.parse().map_err(|_| {
        let shown: String = address.chars().take(80).collect();
        Refusal::malformed(format!(
            "Address '{shown}' is no IP address; names are not looked up, leave it out for 127.0.0.1"
        ))
    })
}

pub(super) fn field<T: DeserializeOwned>(
    body: &Map<String, Value>,
    key: &'static str,
) -> Result<Option<T>, Refusal> {
    match body.get(&key.to_ascii_lowercase()) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|error| Refusal::malformed(format!("{key}: {error}"))),
    }
}

pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
        Value::Bool(is_true) => !is_true,
        Value::Number(_) => false,
    }
}

pub(super) fn malformed(error: impl ToString) -> Refusal {
    Refusal::malformed(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(body: &str) -> String {
        format!("{:?}", read(body.as_bytes()).unwrap_err())
    }

    #[test]
    fn a_registration_is_read_as_consul_reads_it() {
        let plain = read(br#"{"Name":"web","Port":8080}"#).unwrap();
        assert_eq!((plain.id.as_str(), plain.to.to_string()), ("web", "127.0.0.1:8080".into()));
        assert_eq!((plain.port, plain.weight), (8080, Weight(100)));
        // As python-consul writes it, and with what is let pass.
        let full = read(
            br#"{"name":"web","id":"web-2","address":"10.0.0.9","port":81,"tags":["v2"],
                "Meta":{"a":"b"},"enable_tag_override":true,"Weights":{"Passing":3,"Warning":1},
                "Checks":[],"Check":null,"Kind":"","Connect":{},"Whatever":1}"#,
        );
        let full = full.unwrap();
        assert_eq!((full.id.as_str(), full.to.to_string()), ("web-2", "10.0.0.9:81".into()));
        assert_eq!((full.tags, full.weight), (vec!["v2".to_owned()], Weight(300)));
        let unix = read(br#"{"Name":"web","SocketPath":"/run/web.sock"}"#).unwrap();
        assert_eq!(unix.to.to_string(), "unix:/run/web.sock");
        let six = read(br#"{"Name":"web","Address":"::1","Port":80}"#).unwrap();
        assert_eq!(six.to.to_string(), "[::1]:80");
    }

    #[test]
    fn checks_of_a_registration_are_read_as_consul_reads_them() {
        let spec = read(
            br#"{"Name":"web","Port":80,"Check":{"Name":"deep","Notes":"n","TTL":"30s"},
                "checks":[
                {"HTTP":"http://localhost:9000/ready?x=1","Interval":"10s","Timeout":"1s",
                 "Header":{"a":["b","c"]},"Method":"GET","TLSSkipVerify":false},
                {"CheckID":"port","TCP":"127.0.0.1:80","Interval":"1m0s","SuccessBeforePassing":3,
                 "FailuresBeforeCritical":0},
                {"GRPC":"127.0.0.1:90/shop.Cart","Interval":"1s"},
                {"Args":["/bin/check","-v"],"Interval":"1s"}]}"#,
        );
        let written: Vec<_> = spec
            .unwrap()
            .checks
            .into_iter()
            .map(|spec| serde_json::to_value(spec).unwrap())
            .collect();
        let expected = serde_json::json!([
            { "ttl": "30s" },
            { "http": "/ready?x=1", "at": "127.0.0.1:9000", "interval": "10s", "timeout": "1s",
              "header": { "a": "b, c" } },
            { "id": "port", "tcp": true, "at": "127.0.0.1:80", "interval": "1m", "rise": 3 },
            { "grpc": "shop.Cart", "at": "127.0.0.1:90", "interval": "1s" },
            { "command": ["/bin/check", "-v"], "interval": "1s" },
        ]);
        assert_eq!(serde_json::Value::from(written), expected);
    }

    #[test]
    fn what_nobody_would_do_is_refused_with_its_key() {
        for (body, key) in [
            (r#"{"Name":"a","Port":1,"Check":{"UDP":"127.0.0.1:53"}}"#, "check.udp"),
            (r#"{"Name":"a","Port":1,"checks":[{"HTTP":"https://127.0.0.1/"}]}"#, "check.http"),
            (
                r#"{"Name":"a","Port":1,"Check":{"TTL":"9s","DeregisterCriticalServiceAfter":"1m"}}"#,
                "check.deregistercriticalserviceafter",
            ),
            (r#"{"Name":"a","Port":1,"Connect":{"SidecarService":{"Port":1}}}"#, "connect"),
            (r#"{"Name":"a","Port":1,"Kind":"mesh-gateway"}"#, "kind"),
        ] {
            let told = told(body);
            assert!(told.contains("not_yet") && told.contains(&format!("\"{key}: ")), "{told}");
        }
        for (body, word) in [
            ("{", "line 1"),
            ("[]", "expected a map"),
            (r#"{"Port":1}"#, "Name is missing"),
            (r#"{"Name":"My App","Port":1}"#, "My App"),
            (r#"{"Name":"a"}"#, "Port is missing"),
            (r#"{"Name":"a","Port":"80"}"#, "Port: invalid type"),
            (r#"{"Name":"a","Port":80000}"#, "Port: invalid value"),
            (r#"{"Name":"a","Port":1,"Address":"db.example.com"}"#, "db.example.com"),
            (r#"{"Name":"a","Port":1,"Tags":["a b"]}"#, "tag"),
            (r#"{"Name":"a","Port":1,"Weights":{"Passing":900}}"#, "weight"),
            (r#"{"Name":"a","Port":1,"Check":{"Interval":"9s"}}"#, "exactly one of"),
            (r#"{"Name":"a","Port":1,"Check":{"TTL":"9"}}"#, "Check.TTL"),
            (r#"{"Name":"a","Port":1,"Check":{"HTTP":"http://web.example/"}}"#, "not looked up"),
            (r#"{"Name":"a","Port":1,"Checks":{"TTL":"9s"}}"#, "expected a list"),
            (r#"{"Name":"a","Port":1,"Check":3}"#, "Check: expected"),
        ] {
            assert!(told(body).contains(word), "{body}: {}", told(body));
        }
    }
}
