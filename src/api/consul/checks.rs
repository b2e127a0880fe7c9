//! Reads `Check` and `Checks` of a registration.

use serde_json::{Map, Value};

use super::not_yet;
use super::registration::{field, folded, is_empty, malformed};
use crate::api::problem::Refusal;
use crate::model::Target;
use crate::proxy::{CheckSpec, Span, WrittenCheck};

/// What a check may say that nobody here would do.
const NOT_DONE: &[(&str, &str)] = &[
    ("aliasnode", "checks that repeat another check are not available"),
    ("aliasservice", "checks that repeat another check are not available"),
    ("body", "a check of HTTP sends no body"),
    ("deregistercriticalserviceafter", "nothing is taken back by itself"),
    ("dockercontainerid", "checks inside containers are not available"),
    ("grpcusetls", "checks speak no TLS"),
    ("h2ping", "checks by pings of HTTP/2 are not available"),
    ("osservice", "checks of services of the system are not available"),
    ("script", "a check runs no shell; use Args"),
    ("udp", "checks over UDP are not available"),
];

/// All checks of a registration, whose keys are in lower case.
pub(super) fn read(body: &Map<String, Value>) -> Result<Vec<CheckSpec>, Refusal> {
    let one = body.get("check").filter(|check| !is_empty(check));
    let more = match body.get("checks") {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(checks)) => checks,
        Some(_) => return Err(Refusal::malformed("Checks: expected a list")),
    };
    one.into_iter().chain(more).map(check).collect()
}

fn check(value: &Value) -> Result<CheckSpec, Refusal> {
    let Value::Object(fields) = value else {
        return Err(Refusal::malformed("Check: expected {\"HTTP\": .., \"Interval\": ..}"));
    };
    let fields = folded(fields.clone());
    for (key, why) in NOT_DONE {
        if fields.get(*key).is_some_and(|value| !is_empty(value)) {
            return Err(not_yet(format!("check.{key}: {why}; register without it")));
        }
    }
    let text = |key| -> Result<Option<String>, Refusal> {
        Ok(field::<String>(&fields, key)?.filter(|text| !text.is_empty()))
    };
    if let Some(method) = text("Method")?.filter(|method| method != "GET") {
        let shown: String = method.chars().take(40).collect();
        return Err(not_yet(format!("check.method: only GET is available, not '{shown}'")));
    }
    let span = |key: &'static str| match text(key)? {
        None => Ok(None),
        Some(text) => Span::try_from(text)
            .map(Some)
            .map_err(|error| Refusal::malformed(format!("Check.{key}: {error}"))),
    };
    let mut written = WrittenCheck {
        id: text("CheckID")?,
        ttl: span("TTL")?,
        command: field::<Vec<String>>(&fields, "Args")?.filter(|words| !words.is_empty()),
        interval: span("Interval")?,
        timeout: span("Timeout")?,
        rise: field(&fields, "SuccessBeforePassing")?.filter(|count| *count > 0),
        fall: field(&fields, "FailuresBeforeCritical")?.filter(|count| *count > 0),
        ..WrittenCheck::default()
    };
    if let Some(url) = text("HTTP")? {
        let (at, path) = split_url(&url)?;
        (written.http, written.at) = (Some(path), Some(at));
    }
    if let Some(address) = text("TCP")? {
        (written.tcp, written.at) = (Some(true), Some(place("TCP", &address)?));
    }
    if let Some(address) = text("GRPC")? {
        let (address, service) = address.split_once('/').unwrap_or((&address, ""));
        written.grpc = Some(service.to_owned());
        written.at = Some(place("GRPC", address)?);
    }
    if written.ttl.is_some() {
        // Consul's clients say an interval of nothing, too.
        (written.interval, written.timeout, written.rise, written.fall) = (None, None, None, None);
    }
    let header = field::<Map<String, Value>>(&fields, "Header")?.unwrap_or_default();
    for (name, values) in header {
        let values: Vec<String> = serde_json::from_value(values)
            .map_err(|error| Refusal::malformed(format!("Check.Header: {error}")))?;
        written.header.insert(name, values.join(", "));
    }
    written.strict().map_err(|error| malformed(format!("Check: {error}")))
}

/// `http://127.0.0.1:8080/ready`: the address and the path.
fn split_url(url: &str) -> Result<(Target, String), Refusal> {
    let uri: http::Uri =
        url.parse().map_err(|error| Refusal::malformed(format!("Check.HTTP: {error}")))?;
    if uri.scheme_str() != Some("http") {
        return Err(not_yet("check.http: checks speak no TLS; use http://".to_owned()));
    }
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    let authority = match uri.port() {
        Some(_) => authority.to_owned(),
        None => format!("{authority}:80"),
    };
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    Ok((place("HTTP", &authority)?, path.to_owned()))
}

fn place(key: &str, address: &str) -> Result<Target, Refusal> {
    let target = address.parse().ok().filter(|target| matches!(target, Target::Tcp(_)));
    target.ok_or_else(|| {
        let shown: String = address.chars().take(80).collect();
        Refusal::malformed(format!(
            "Check.{key} '{shown}': expected an IP address or localhost, and a port; names are not \
             looked up"
        ))
    })
}
