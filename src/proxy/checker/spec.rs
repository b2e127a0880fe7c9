//! What is checked and how: as people write it, and as it is done.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use http::uri::PathAndQuery;
use http::{HeaderName, HeaderValue};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::health::Plan;
use crate::model::Target;
use crate::proxy::Span;

/// Checks of one instance: who has more asks one address about all of them.
pub const CHECKS_MAX: usize = 8;

/// Out in about half a minute at the worst, and a load that no instance notices.
const INTERVAL: Duration = Duration::from_secs(5);
/// Long for an answer from the same machine.
const TIMEOUT: Duration = Duration::from_secs(2);
const RISE: u16 = 2;
const FALL: u16 = 3;
const ROW_MAX: u16 = 100;

/// Longer ones would never be seen to end; shorter ones would be a load of their own.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(24 * 3_600);
const TIMEOUT_MAX: Duration = Duration::from_secs(600);

/// From one run of a check to the next, and for how long a word holds.
pub const CHECK_INTERVALS: RangeInclusive<Duration> = INTERVAL_MIN..=INTERVAL_MAX;
/// Of one run.
pub const CHECK_TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(1)..=TIMEOUT_MAX;

/// Of paths, of a header's value, of all words of a command, in bytes.
const TEXT_LEN_MAX: usize = 4_096;
const WORDS_MAX: usize = 64;
const HEADERS_MAX: usize = 16;
const ID_LEN_MAX: usize = 128;
const SERVICE_LEN_MAX: usize = 256;

/// One check of an instance: `health = { http = "/ready", interval = "5s" }`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "WrittenCheck", into = "WrittenCheck")]
pub struct CheckSpec {
    pub(super) id: Option<String>,
    pub(super) probe: Probe,
    /// All that is absent has its default.
    timing: Timing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Timing {
    interval: Option<Span>,
    timeout: Option<Span>,
    rise: Option<u16>,
    fall: Option<u16>,
}

/// What one run of a check does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Probe {
    /// GETs a path.
    Http { path: String, at: Option<Target>, headers: BTreeMap<String, String>, status: StatusSet },
    /// Connects.
    Tcp { at: Option<Target> },
    /// Asks the health protocol of gRPC about a service, or about the whole server when empty.
    Grpc { service: String, at: Option<Target> },
    /// Runs a program: exit code 0 passes, 1 warns, all else fails.
    Command { words: Vec<String> },
    /// Waits for the application's word.
    Ttl { ttl: Span },
}

/// Status codes of HTTP that pass: `200`, `200-299,401`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StatusSet {
    /// As written; empty unless set.
    text: String,
    ranges: Vec<(u16, u16)>,
}

impl Default for StatusSet {
    fn default() -> Self {
        Self { text: String::new(), ranges: vec![(200, 399)] }
    }
}

impl StatusSet {
    pub(super) fn contains(&self, status: u16) -> bool {
        self.ranges.iter().any(|(first, last)| (*first..=*last).contains(&status))
    }
}

impl FromStr for StatusSet {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let code = |text: &str| {
            text.trim().parse().ok().filter(|code: &u16| (100..=599).contains(code)).ok_or(())
        };
        let range = |text: &str| match text.split_once('-') {
            Some((first, last)) => Ok((code(first)?, code(last)?)),
            None => code(text).map(|code| (code, code)),
        };
        let ranges = text.split(',').map(range).collect::<Result<Vec<_>, ()>>()?;
        let is_good = ranges.len() <= 16 && ranges.iter().all(|(first, last)| first <= last);
        is_good.then(|| Self { text: text.to_owned(), ranges }).ok_or(())
    }
}

/// A check that cannot be made. Fault: whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// It says what to do not at all, or twice.
    #[error("expected exactly one of http, tcp, grpc, command and ttl")]
    Kind,
    /// A key belongs to another kind of check.
    #[error("{key} means nothing for a check of kind {kind}")]
    Key {
        /// Which.
        key: &'static str,
        /// What the check is.
        kind: &'static str,
    },
    /// A value is none of those that are taken.
    #[error("{key} '{value}': expected {expected}")]
    Value {
        /// Of which key.
        key: &'static str,
        /// As written, cut where it is long.
        value: String,
        /// What would be taken.
        expected: &'static str,
    },
    /// There is no such key.
    #[error("unknown key '{0}'")]
    Unknown(String),
}

/// A check as it is written: in a file, in JSON.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WrittenCheck {
    /// A path that is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// Whether to connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<bool>,
    /// A service of gRPC; the whole server when empty.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grpc: Option<String>,
    /// A program and its arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// For how long a word of the application holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
    /// Where to ask; the instance's own address unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<Target>,
    /// Codes that pass, `200-399` unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<WrittenStatus>,
    /// Fields of the request's head; `host` among them.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub header: BTreeMap<String, String>,
    /// By which the check is known on this machine; `service:ID` unless set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// From one run to the next: 5 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Span>,
    /// Of one run: 2 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// Passes in a row that bring the instance back: 2; the first is enough for a new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rise: Option<u16>,
    /// Failures in a row that take it out: 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fall: Option<u16>,
    /// Keys of later versions, or misspelt ones: [`WrittenCheck::strict`] tells.
    #[serde(flatten, skip_serializing)]
    pub unknown: BTreeMap<String, IgnoredAny>,
}

/// One code or a text with several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum WrittenStatus {
    /// `204`.
    Code(u16),
    /// `200-299,401`.
    Set(String),
}

impl WrittenCheck {
    /// The check, if every key of it is known. What this program wrote itself is read without this: a
    /// later version may have written more.
    pub fn strict(self) -> Result<CheckSpec, CheckError> {
        match self.unknown.keys().next() {
            Some(key) => Err(CheckError::Unknown(key.chars().take(40).collect())),
            None => self.try_into(),
        }
    }
}

fn refused(key: &'static str, value: &str, expected: &'static str) -> CheckError {
    CheckError::Value { key, value: value.chars().take(60).collect(), expected }
}

fn path(text: String) -> Result<String, CheckError> {
    let is_path = text.starts_with('/') && text.len() <= TEXT_LEN_MAX;
    match is_path && text.parse::<PathAndQuery>().is_ok() {
        true => Ok(text),
        false => Err(refused("http", &text, "a path that begins with /, such as /ready")),
    }
}

fn status(written: WrittenStatus) -> Result<StatusSet, CheckError> {
    let text = match written {
        WrittenStatus::Code(code) => code.to_string(),
        WrittenStatus::Set(text) => text,
    };
    text.parse()
        .map_err(|()| refused("status", &text, "codes of HTTP, such as 204 or \"200-299,401\""))
}

fn headers(written: BTreeMap<String, String>) -> Result<BTreeMap<String, String>, CheckError> {
    if written.len() > HEADERS_MAX {
        return Err(refused("header", &written.len().to_string(), "at most 16 fields"));
    }
    for (name, value) in &written {
        let is_name = HeaderName::try_from(name).is_ok();
        // The value may be a secret: it is not said again.
        if !is_name || value.len() > TEXT_LEN_MAX || HeaderValue::try_from(value).is_err() {
            return Err(refused("header", name, "the name and the value of a field of HTTP"));
        }
    }
    Ok(written)
}

fn service(text: String) -> Result<String, CheckError> {
    match text.len() <= SERVICE_LEN_MAX && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(text),
        false => Err(refused("grpc", &text, "the full name of a service, or \"\" for the server")),
    }
}

fn words(words: Vec<String>) -> Result<Vec<String>, CheckError> {
    let len: usize = words.iter().map(String::len).sum();
    let is_good = !words.is_empty()
        && !words[0].is_empty()
        && words.len() <= WORDS_MAX
        && len <= TEXT_LEN_MAX
        && words.iter().all(|word| !word.contains('\0'));
    let shown = || words.join(" ");
    match is_good {
        true => Ok(words),
        false => Err(refused("command", &shown(), "a program and its arguments, 4 KiB together")),
    }
}

fn span(
    key: &'static str,
    span: Option<Span>,
    least: Duration,
    most: Duration,
    expected: &'static str,
) -> Result<Option<Span>, CheckError> {
    match span {
        Some(span) if span.0 < least || span.0 > most => {
            Err(refused(key, &String::from(span), expected))
        }
        span => Ok(span),
    }
}

fn row(key: &'static str, count: Option<u16>) -> Result<Option<u16>, CheckError> {
    match count {
        Some(count) if !(1..=ROW_MAX).contains(&count) => {
            Err(refused(key, &count.to_string(), "1 to 100"))
        }
        count => Ok(count),
    }
}

impl TryFrom<WrittenCheck> for CheckSpec {
    type Error = CheckError;

    fn try_from(written: WrittenCheck) -> Result<Self, CheckError> {
        let WrittenCheck { http, tcp, grpc, command, ttl, at, header, .. } = written;
        let kinds =
            [http.is_some(), tcp == Some(true), grpc.is_some(), command.is_some(), ttl.is_some()];
        if kinds.iter().filter(|is_set| **is_set).count() != 1 {
            return Err(CheckError::Kind);
        }
        let (has_at, has_status, has_header) =
            (at.is_some(), written.status.is_some(), !header.is_empty());
        let probe = if let Some(path) = http {
            let status = written.status.map_or(Ok(StatusSet::default()), status)?;
            Probe::Http { path: self::path(path)?, at, headers: headers(header)?, status }
        } else if let Some(service) = grpc {
            Probe::Grpc { service: self::service(service)?, at }
        } else if let Some(words) = command {
            Probe::Command { words: self::words(words)? }
        } else if let Some(ttl) = ttl {
            let expected = "100ms to 24h";
            let ttl = span("ttl", Some(ttl), INTERVAL_MIN, INTERVAL_MAX, expected)?;
            Probe::Ttl { ttl: ttl.unwrap_or(Span(INTERVAL)) }
        } else {
            Probe::Tcp { at }
        };
        let kind = probe.kind();
        let is_told = matches!(probe, Probe::Ttl { .. });
        for (key, is_set, has_meaning) in [
            ("status", has_status, kind == "http"),
            ("header", has_header, kind == "http"),
            ("at", has_at, matches!(kind, "http" | "tcp" | "grpc")),
            ("interval", written.interval.is_some(), !is_told),
            ("timeout", written.timeout.is_some(), !is_told),
            ("rise", written.rise.is_some(), !is_told),
            ("fall", written.fall.is_some(), !is_told),
        ] {
            if is_set && !has_meaning {
                return Err(CheckError::Key { key, kind });
            }
        }
        let is_id = |id: &String| {
            (1..=ID_LEN_MAX).contains(&id.len())
                && id.chars().all(|c| c.is_ascii_graphic() && c != '/')
        };
        if let Some(id) = written.id.as_ref().filter(|id| !is_id(id)) {
            return Err(refused("id", id, "1 to 128 printable characters without spaces and /"));
        }
        let timing = Timing {
            interval: span(
                "interval",
                written.interval,
                INTERVAL_MIN,
                INTERVAL_MAX,
                "100ms to 24h",
            )?,
            timeout: span(
                "timeout",
                written.timeout,
                *CHECK_TIMEOUTS.start(),
                TIMEOUT_MAX,
                "1ms to 10min",
            )?,
            rise: row("rise", written.rise)?,
            fall: row("fall", written.fall)?,
        };
        Ok(Self { id: written.id, probe, timing })
    }
}

impl From<CheckSpec> for WrittenCheck {
    fn from(spec: CheckSpec) -> Self {
        let Timing { interval, timeout, rise, fall } = spec.timing;
        let written = Self { id: spec.id, interval, timeout, rise, fall, ..Self::default() };
        match spec.probe {
            Probe::Http { path, at, headers, status } => Self {
                http: Some(path),
                at,
                header: headers,
                status: (!status.text.is_empty()).then_some(WrittenStatus::Set(status.text)),
                ..written
            },
            Probe::Tcp { at } => Self { tcp: Some(true), at, ..written },
            Probe::Grpc { service, at } => Self { grpc: Some(service), at, ..written },
            Probe::Command { words } => Self { command: Some(words), ..written },
            Probe::Ttl { ttl } => Self { ttl: Some(ttl), ..written },
        }
    }
}

impl Probe {
    /// The word of metrics and of Consul's `Type`.
    pub(super) const fn kind(&self) -> &'static str {
        match self {
            Self::Http { .. } => "http",
            Self::Tcp { .. } => "tcp",
            Self::Grpc { .. } => "grpc",
            Self::Command { .. } => "command",
            Self::Ttl { .. } => "ttl",
        }
    }
}

impl CheckSpec {
    pub(super) fn plan(&self) -> Plan {
        let Timing { interval, rise, fall, .. } = self.timing;
        match self.probe {
            Probe::Ttl { ttl } => Plan::Told { ttl: ttl.0 },
            _ => Plan::Active {
                interval: interval.map_or(INTERVAL, |span| span.0),
                rise: rise.unwrap_or(RISE).into(),
                fall: fall.unwrap_or(FALL).into(),
            },
        }
    }

    pub(super) fn timeout(&self) -> Duration {
        self.timing.timeout.map_or(TIMEOUT, |span| span.0)
    }

    /// What it does, in a few words: `http /ready`.
    pub fn summary(&self) -> String {
        let kind = self.probe.kind();
        match &self.probe {
            Probe::Http { path, .. } => format!("{kind} {path}"),
            Probe::Grpc { service, .. } if !service.is_empty() => format!("{kind} {service}"),
            Probe::Tcp { .. } | Probe::Grpc { .. } => kind.to_owned(),
            // Its arguments may be secrets.
            Probe::Command { words } => {
                format!("{kind} {}", words.first().map_or("", String::as_str))
            }
            Probe::Ttl { ttl } => format!("{kind} {}", String::from(*ttl)),
        }
    }

    /// The same with its times, as they hold: `http /ready every 5s, within 2s, out after 3, back after 2`.
    pub fn details(&self) -> String {
        let span = |time: Duration| humantime::format_duration(time);
        match self.plan() {
            Plan::Told { .. } => self.summary(),
            Plan::Active { interval, rise, fall } => format!(
                "{} every {}, within {}, out after {fall}, back after {rise}",
                self.summary(),
                span(interval),
                span(self.timeout())
            ),
        }
    }

    /// The same without what may be a secret: for whoever has no token.
    pub fn without_secrets(mut self) -> Self {
        match &mut self.probe {
            Probe::Http { headers, .. } => {
                headers.values_mut().for_each(|value| *value = "***".to_owned());
            }
            Probe::Command { words } => words.truncate(1),
            _ => {}
        }
        self
    }
}

/// The short form of command lines: `/ready`, `tcp`, `grpc`, `grpc:SERVICE`, `ttl=30s`.
impl FromStr for CheckSpec {
    type Err = CheckError;

    fn from_str(text: &str) -> Result<Self, CheckError> {
        let written = match text {
            "tcp" => WrittenCheck { tcp: Some(true), ..WrittenCheck::default() },
            "grpc" => WrittenCheck { grpc: Some(String::new()), ..WrittenCheck::default() },
            path if path.starts_with('/') => {
                WrittenCheck { http: Some(path.to_owned()), ..WrittenCheck::default() }
            }
            _ => match (text.strip_prefix("grpc:"), text.strip_prefix("ttl=")) {
                (Some(""), _) => {
                    let expected = "the full name of a service behind it, such as \
                                    grpc:shop.Cart, or grpc for the whole server";
                    return Err(refused("grpc", text, expected));
                }
                (Some(service), _) => {
                    WrittenCheck { grpc: Some(service.to_owned()), ..WrittenCheck::default() }
                }
                (_, Some(ttl)) => {
                    let ttl = Span::try_from(ttl.to_owned());
                    let expected = "a time from 100ms to 24h with its unit, such as ttl=30s";
                    let ttl = ttl.map_err(|_| refused("ttl", text, expected))?;
                    WrittenCheck { ttl: Some(ttl), ..WrittenCheck::default() }
                }
                _ => {
                    let expected = "a path (/ready), tcp, grpc, grpc:SERVICE or ttl=30s";
                    return Err(refused("health", text, expected));
                }
            },
        };
        written.try_into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<CheckSpec, String> {
        let written: WrittenCheck = toml::from_str(text).map_err(|error| error.to_string())?;
        written.strict().map_err(|error| error.to_string())
    }

    #[test]
    fn a_check_is_written_and_read_the_same() {
        for text in [
            "http = \"/ready\"\n",
            "http = \"/ready?deep=1\"\nat = \"127.0.0.1:9000\"\nstatus = \"200-299,401\"\n\
             interval = \"10s\"\ntimeout = \"1s\"\nrise = 1\nfall = 5\n\n[header]\nhost = \"web\"\n",
            "tcp = true\n",
            "grpc = \"\"\n",
            "command = [\"/usr/bin/check\", \"-v\"]\nid = \"deep\"\n",
            "ttl = \"30s\"\n",
        ] {
            let spec = read(text).unwrap();
            assert_eq!(toml::to_string(&spec).unwrap(), text);
        }
        assert!(
            read("http = \"/\"\nstatus = 204").unwrap().probe
                != read("http = \"/\"").unwrap().probe
        );
    }

    #[test]
    fn what_cannot_be_checked_says_why() {
        for (text, word) in [
            ("", "exactly one of"),
            ("tcp = false", "exactly one of"),
            ("tcp = true\nttl = \"3s\"", "exactly one of"),
            ("http = \"ready\"", "begins with /"),
            ("http = \"/a b\"", "begins with /"),
            ("http = \"/\"\nstatus = 99", "codes of HTTP"),
            ("http = \"/\"\nstatus = \"300-200\"", "codes of HTTP"),
            ("http = \"/\"\n[header]\n\"a b\" = \"c\"", "field of HTTP"),
            ("tcp = true\nstatus = 200", "status means nothing for a check of kind tcp"),
            ("ttl = \"3s\"\nfall = 2", "fall means nothing for a check of kind ttl"),
            ("ttl = \"1ms\"", "100ms to 24h"),
            ("command = []", "a program"),
            ("tcp = true\ninterval = \"1ms\"", "100ms to 24h"),
            ("tcp = true\ntimeout = \"1h\"", "1ms to 10min"),
            ("tcp = true\nrise = 0", "rise '0': expected 1 to 100"),
            ("tcp = true\nrize = 2", "unknown key 'rize'"),
            ("tcp = true\nid = \"a b\"", "printable"),
        ] {
            let told = read(text).unwrap_err();
            assert!(told.contains(word), "{text}: {told}");
        }
        let later: CheckSpec = toml::from_str("tcp = true\nof_a_later_version = 1").unwrap();
        assert_eq!(later, "tcp".parse().unwrap());
    }

    #[test]
    fn command_lines_have_a_short_form() {
        for (text, summary) in [
            ("/ready", "http /ready"),
            ("tcp", "tcp"),
            ("grpc", "grpc"),
            ("grpc:shop.Cart", "grpc shop.Cart"),
            ("ttl=90s", "ttl 1m 30s"),
        ] {
            assert_eq!(text.parse::<CheckSpec>().unwrap().summary(), summary);
        }
        for bad in ["", "http", "ready", "ttl=30", "ttl=0s", "ttl", "grpc:", "grpc:a b"] {
            assert!(bad.parse::<CheckSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_of_a_check_are_not_shown() {
        let text = "http = \"/\"\n[header]\nauthorization = \"Bearer x\"";
        let shown = format!("{:?}", read(text).unwrap().without_secrets());
        assert!(shown.contains("authorization") && !shown.contains("Bearer"), "{shown}");
        let command = read("command = [\"check\", \"--password=x\"]").unwrap();
        assert_eq!(command.summary(), "command check");
        assert!(!format!("{:?}", command.without_secrets()).contains("password"));
    }
}
