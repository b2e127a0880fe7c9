//! Reads one TOML file into settings. Every value is read even after a fault, so that all faults are
//! told at once. What no TOML is makes doubtful what stands after it: of that only the lines that
//! are no TOML by themselves either are told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::{self, Standing};
use super::{Fault, Origin, PublicService, Seed, Setting, Settings, check};
use crate::api::control::{TAGS_MAX, WEIGHT_MAX, balancing_fault, check_capacity, check_tag};
use crate::api::{ExposeSpec, UpstreamSpec};
use crate::balancer::{Balance, Prefer};
use crate::catalogue::REQUESTS_MAX;
use crate::membership::Profile;
use crate::model::{
    Capacity, InstanceId, MemberName, RequestPattern, ServiceName, Target, Weight, expected_one_of,
    nearest,
};
use crate::proxy::{
    BreakerLimits, CHECK_INTERVALS, CHECK_TIMEOUTS, CHECKS_MAX, CheckSpec, HashKey, ProxyProtocol,
    Ratio, Retry, Scope, Share, Span, Timeouts, WrittenCheck, WrittenStatus,
};
use crate::telemetry::LogFormat;
use crate::tls::public::CertificateFiles;
use crate::tls::store::DataDir;

/// A value is quoted in a fault up to this many characters.
const QUOTE_LEN_MAX: usize = 48;

type Value<'i> = Spanned<DeValue<'i>>;

/// Reads `text`, the content of `path`, over `settings`.
pub(super) fn read(path: PathBuf, text: &str, settings: &mut Settings, faults: &mut Vec<Fault>) {
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader { path: Arc::new(path), text, broken_at: None, faults };
    reader.syntax(&errors);
    for (name, value) in document.get_ref() {
        let key: &str = name.get_ref();
        match keys::section(key) {
            Ok(section) if section.is_list => match value.get_ref() {
                DeValue::Array(items) => {
                    for (index, item) in items.iter().enumerate() {
                        reader.section(section, &format!("{key}[{index}]"), item, settings);
                    }
                }
                _ => reader.refuse(value, key, format!("expected a list: [[{key}]]")),
            },
            Ok(section) => reader.section(section, key, value, settings),
            Err(standing) => reader.refuse_key(name.span(), key, key, &standing, "section"),
        }
    }
}

struct Reader<'a> {
    path: Arc<PathBuf>,
    text: &'a str,
    /// Where the first line begins that is no TOML.
    broken_at: Option<usize>,
    faults: &'a mut Vec<Fault>,
}

impl Reader<'_> {
    /// Tells of every line that is no TOML; the first complaint on a line is the one that helps.
    fn syntax(&mut self, errors: &[toml::de::Error]) {
        let mut lines = BTreeMap::new();
        for error in errors {
            let at = error.span().unwrap_or_default().start.min(self.text.len());
            let line_start = self.text[..at].rfind('\n').map_or(0, |end| end + 1);
            let earlier = lines.entry(line_start).or_insert((at, error.message()));
            *earlier = (*earlier).min((at, error.message()));
        }
        self.broken_at = lines.keys().next().copied();
        for (line_start, (at, message)) in lines {
            // Behind a bracket or quote that is still open, sound lines look broken as well.
            let line = self.text[line_start..].lines().next().unwrap_or_default();
            if self.broken_at == Some(line_start) || DeTable::parse(line).is_err() {
                self.faults.push(Fault {
                    origin: self.origin(at..at),
                    key: String::new(),
                    value: None,
                    message: message.to_owned(),
                });
            }
        }
    }

    fn section(
        &mut self,
        section: &keys::Section,
        at: &str,
        value: &Value<'_>,
        settings: &mut Settings,
    ) {
        let DeValue::Table(table) = value.get_ref() else {
            return self.refuse(value, at, format!("expected a section: [{}]", section.name));
        };
        for (name, _) in table {
            let standing = section.standing(name.get_ref());
            if standing != Standing::Read {
                self.refuse_key(
                    name.span(),
                    &format!("{at}.{}", name.get_ref()),
                    name.get_ref(),
                    &standing,
                    "key",
                );
            }
        }
        match section.name {
            "node" => self.node(table, settings),
            "listen" => self.listen(table, settings),
            "gateway" => self.gateway(table, settings),
            "join" => self.join(table, settings),
            "expose" => self.expose(table, at, value.span(), settings),
            "upstream" => self.upstream(table, at, value.span(), settings),
            _ => self.telemetry(table, settings),
        }
    }

    fn node(&mut self, table: &DeTable<'_>, settings: &mut Settings) {
        self.set(table, "node", "name", &mut settings.name, |text: &str| {
            parse::<MemberName>(text).map(Some)
        });
        self.set(table, "node", "zone", &mut settings.zone, check::zone);
        self.set(table, "node", "domain", &mut settings.domain, check::domain);
        self.set(table, "node", "data_dir", &mut settings.data_dir, |text: &str| match text {
            "" => Err("expected a path".to_owned()),
            path => Ok(DataDir::new(path)),
        });
    }

    fn listen(&mut self, table: &DeTable<'_>, settings: &mut Settings) {
        self.set(table, "listen", "mesh", &mut settings.mesh, check::mesh_listen);
        self.set(table, "listen", "api", &mut settings.api, check::loopback);
        for (key, door) in [("gateway", &mut settings.gateway), ("socks", &mut settings.socks)] {
            self.set(table, "listen", key, door, |text: &str| check::loopback(text).map(Some));
        }
        self.set(table, "listen", "advertise", &mut settings.advertise, |text: &str| {
            check::advertise(text).map(Some)
        });
    }

    fn gateway(&mut self, table: &DeTable<'_>, settings: &mut Settings) {
        for (key, door) in [("public", &mut settings.public), ("redirect", &mut settings.redirect)]
        {
            self.set(table, "gateway", key, door, |text: &str| check::listen(text).map(Some));
        }
        let Some(value) = table.get("certificates") else { return };
        let DeValue::Array(items) = value.get_ref() else {
            let message = "expected a list: [{ cert = \"…\", key = \"…\" }]";
            return self.refuse(value, "gateway.certificates", message.to_owned());
        };
        let files = items.iter().enumerate().filter_map(|(index, item)| {
            self.certificate(item, &format!("gateway.certificates[{index}]"))
        });
        let files = files.collect();
        self.take(value, "gateway.certificates", &mut settings.certificates, files);
    }

    fn certificate(&mut self, item: &Value<'_>, at: &str) -> Option<CertificateFiles> {
        let DeValue::Table(table) = item.get_ref() else {
            let message = "expected { cert = \"…\", key = \"…\" }";
            self.refuse(item, at, message.to_owned());
            return None;
        };
        for (name, _) in
            table.iter().filter(|(name, _)| !matches!(name.get_ref().as_ref(), "cert" | "key"))
        {
            let name: &str = name.get_ref();
            let message = format!("unknown key '{name}', expected cert and key");
            self.refuse(item, at, message);
        }
        let mut path = |key: &str| {
            if !table.contains_key(key) {
                self.missing(at, key, &item.span());
            }
            self.text(table, at, key, check::absolute)
        };
        let (cert, key) = (path("cert"), path("key"));
        Some(CertificateFiles { cert: cert?, key: key? })
    }

    fn join(&mut self, table: &DeTable<'_>, settings: &mut Settings) {
        self.set(table, "join", "profile", &mut settings.profile, |text: &str| match text {
            "local" => Ok(Profile::Local),
            "lan" => Ok(Profile::Lan),
            "wan" => Ok(Profile::Wan),
            _ => Err("expected local, lan or wan".to_owned()),
        });
        self.duration(table, "join", "forget_after", &mut settings.forget_after);
        let Some(value) = table.get("seeds") else { return };
        let seeds = self.list(value, "join.seeds", parse::<Seed>);
        self.take(value, "join.seeds", &mut settings.seeds, seeds);
    }

    fn telemetry(&mut self, table: &DeTable<'_>, settings: &mut Settings) {
        self.set(table, "telemetry", "log", &mut settings.log, check::log_filter);
        self.set(table, "telemetry", "access_log", &mut settings.access_log, |text: &str| {
            check::access_log(text).map(Some)
        });
        self.set(
            table,
            "telemetry",
            "log_format",
            &mut settings.log_format,
            |text: &str| match text {
                "text" => Ok(LogFormat::Text),
                "json" => Ok(LogFormat::Json),
                _ => Err("expected text or json".to_owned()),
            },
        );
    }

    fn expose(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        span: Range<usize>,
        settings: &mut Settings,
    ) {
        let service = self.required::<ServiceName>(table, at, "name", &span);
        let to = self.required::<Target>(table, at, "to", &span);
        let id = self.text(table, at, "id", parse::<InstanceId>);
        let protocol = self.text(table, at, "protocol", check::protocol);
        let port = self.number(table, at, "port", 1, u16::MAX);
        let weight = self.number(table, at, "weight", 0, WEIGHT_MAX);
        let tags = table.get("tags").map(|value| {
            let tags = self.list(value, &format!("{at}.tags"), |text| {
                check_tag(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
            });
            if tags.len() > TAGS_MAX {
                self.refuse(value, &format!("{at}.tags"), format!("expected at most {TAGS_MAX}"));
            }
            tags
        });
        let idempotent = table.get("idempotent").map(|value| {
            let at = format!("{at}.idempotent");
            let requests = self.list(value, &at, parse::<RequestPattern>);
            if requests.len() > REQUESTS_MAX {
                self.refuse(value, &at, format!("expected at most {REQUESTS_MAX}"));
            }
            requests
        });
        let inflight = self.capacity(table, at);
        let checks = self.checks(table, at);
        let proxy_protocol = self.text(table, at, "proxy_protocol", |text| match text {
            "v2" => Ok(ProxyProtocol::V2),
            _ => Err("expected v2".to_owned()),
        });
        let (Some(service), Some(to)) = (service, to) else { return };
        let mut spec = match ExposeSpec::new(service, to) {
            Ok(spec) => spec,
            Err(error) => return self.fault(span, &format!("{at}.name"), None, error.to_string()),
        };
        spec.id = id.unwrap_or(spec.id);
        spec.port = port.unwrap_or(spec.port);
        spec.protocol = protocol.unwrap_or_default();
        spec.weight = weight.map_or(spec.weight, Weight);
        spec.tags = tags.unwrap_or_default();
        spec.idempotent = idempotent.unwrap_or_default();
        spec.inflight = inflight;
        spec.checks = checks;
        spec.proxy_protocol = proxy_protocol;
        settings.exposes.push(Setting::new(spec, self.origin(span)));
    }

    /// One check, or a list of them.
    fn checks(&mut self, table: &DeTable<'_>, at: &str) -> Vec<CheckSpec> {
        let Some(value) = table.get("health") else { return Vec::new() };
        let at = format!("{at}.health");
        let DeValue::Array(items) = value.get_ref() else {
            return self.check(value, &at).into_iter().collect();
        };
        if items.len() > CHECKS_MAX {
            self.refuse(value, &at, format!("expected at most {CHECKS_MAX}"));
        }
        let items = items.iter().enumerate();
        items.filter_map(|(index, item)| self.check(item, &format!("{at}[{index}]"))).collect()
    }

    fn check(&mut self, value: &Value<'_>, at: &str) -> Option<CheckSpec> {
        let DeValue::Table(table) = value.get_ref() else {
            let message = "expected { http = \"/ready\" }, or tcp, grpc, command or ttl";
            self.refuse(value, at, message.to_owned());
            return None;
        };
        let faults = self.faults.len();
        self.known(
            table,
            at,
            &[
                "http", "tcp", "grpc", "command", "ttl", "at", "status", "header", "interval",
                "timeout", "rise", "fall",
            ],
        );
        let span = |spans: RangeInclusive<Duration>| {
            move |text: &str| {
                let span = Span::try_from(text.to_owned()).ok();
                span.filter(|span| spans.contains(&span.0)).ok_or_else(|| {
                    let [least, most] = [*spans.start(), *spans.end()].map(Span).map(String::from);
                    format!("expected a time from {least} to {most}, with its unit")
                })
            }
        };
        let interval = || span(CHECK_INTERVALS);
        let text = |text: &str| Ok(text.to_owned());
        let mut written = WrittenCheck {
            http: self.text(table, at, "http", text),
            tcp: self.switch(table, at, "tcp"),
            grpc: self.text(table, at, "grpc", text),
            ttl: self.text(table, at, "ttl", interval()),
            at: self.text(table, at, "at", parse::<Target>),
            interval: self.text(table, at, "interval", interval()),
            timeout: self.text(table, at, "timeout", span(CHECK_TIMEOUTS)),
            rise: self.number(table, at, "rise", 1, 100),
            fall: self.number(table, at, "fall", 1, 100),
            ..WrittenCheck::default()
        };
        if let Some(command) = table.get("command") {
            written.command = Some(self.list(command, &format!("{at}.command"), text));
        }
        if let Some(status) = table.get("status") {
            written.status = match status.get_ref() {
                DeValue::Integer(_) => {
                    self.number(table, at, "status", 100, 599).map(WrittenStatus::Code)
                }
                _ => self.text(table, at, "status", text).map(WrittenStatus::Set),
            };
        }
        if let Some(header) = table.get("header") {
            let at = format!("{at}.header");
            match header.get_ref() {
                DeValue::Table(fields) => {
                    let fields = fields.iter().map(|(name, value)| {
                        let at = format!("{at}.{}", name.get_ref());
                        Some((name.get_ref().to_string(), self.parsed(value, &at, text)?))
                    });
                    let fields: Vec<_> = fields.collect(); // all of them, to tell every fault
                    written.header = fields.into_iter().flatten().collect();
                }
                _ => self.refuse(header, &at, "expected { name = \"value\" }".to_owned()),
            }
        }
        if self.faults.len() > faults {
            return None; // each was told where it stands
        }
        CheckSpec::try_from(written).map_err(|error| self.refuse(value, at, error.to_string())).ok()
    }

    fn upstream(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        span: Range<usize>,
        settings: &mut Settings,
    ) {
        let service = self.required::<ServiceName>(table, at, "service", &span);
        let is_public = self.switch(table, at, "public");
        let listen = self.text(table, at, "listen", check::entry);
        if !table.contains_key("listen") && is_public != Some(true) {
            self.missing(at, "listen", &span);
        }
        let hosts = table.get("hosts").map(|value| {
            let at = format!("{at}.hosts");
            if is_public != Some(true) {
                self.refuse(value, &at, "means nothing without public = true".to_owned());
            }
            self.list(value, &at, check::host)
        });
        if is_public == Some(true) && hosts.as_ref().is_none_or(Vec::is_empty) {
            self.missing(at, "hosts", &span); // no host is public that nobody named
        }
        let (timeout, retry) = (self.timeouts(table, at), self.retry(table, at));
        let balance = self.text(table, at, "balance", Balance::named);
        let prefer = table.get("prefer").and_then(|value| {
            let (at, faults) = (format!("{at}.prefer"), self.faults.len());
            let words = self.list(value, &at, |text| Ok(text.to_owned()));
            if self.faults.len() > faults {
                return None; // each was told where it stands
            }
            let prefer = match words.is_empty() {
                true => Err(format!("{}; without 'prefer' all are alike", Prefer::EXPECTED)),
                false => Prefer::try_new(&words),
            };
            prefer.map_err(|message| self.refuse(value, &at, message)).ok()
        });
        let hash = self.text(table, at, "hash", |text| HashKey::try_from(text.to_owned()));
        let breaker = self.breaker(table, at);
        if let Some(value) = table.get("breaker").filter(|_| !table.contains_key("listen")) {
            let message = "means nothing without listen: say it where the service has an entry";
            self.refuse(value, &format!("{at}.breaker"), message.to_owned());
        }
        if let Some((key, message)) =
            balancing_fault(balance.unwrap_or_default(), prefer.unwrap_or_default(), hash.as_ref())
            && let Some(value) = table.get(key)
        {
            self.refuse(value, &format!("{at}.{key}"), message.to_owned());
        }
        let Some(service) = service else { return };
        // One that is only public listens nowhere of its own.
        let nowhere = Target::Tcp(SocketAddr::from(([127, 0, 0, 1], 0)));
        let mut spec = UpstreamSpec::new(service, listen.clone().unwrap_or(nowhere));
        (spec.timeout, spec.retry) = (timeout, retry);
        (spec.balance, spec.prefer) = (balance.unwrap_or_default(), prefer.unwrap_or_default());
        (spec.hash, spec.breaker) = (hash, breaker);
        if let Some(hosts) = hosts.filter(|_| is_public == Some(true)) {
            let (service, options) = (spec.service.clone(), spec.options());
            let public = PublicService { service, hosts, options };
            settings.publics.push(Setting::new(public, self.origin(span.clone())));
        }
        if listen.is_none() {
            return;
        }
        settings.upstreams.push(Setting::new(spec, self.origin(span)));
    }

    fn switch(&mut self, table: &DeTable<'_>, at: &str, key: &str) -> Option<bool> {
        let value = table.get(key)?;
        let read = value.get_ref().as_bool();
        if read.is_none() {
            self.refuse(value, &format!("{at}.{key}"), "expected true or false".to_owned());
        }
        read
    }

    fn timeouts(&mut self, table: &DeTable<'_>, at: &str) -> Timeouts {
        let mut timeouts = Timeouts::default();
        let span = |text: &str| Span::try_from(text.to_owned());
        self.inner(table, at, "timeout", &["connect", "request", "idle"], |reader, inner, at| {
            timeouts.connect = reader.text(inner, at, "connect", span);
            timeouts.request = reader.text(inner, at, "request", span);
            timeouts.idle = reader.text(inner, at, "idle", span);
        });
        timeouts
    }

    fn retry(&mut self, table: &DeTable<'_>, at: &str) -> Retry {
        let mut retry = Retry::default();
        self.inner(table, at, "retry", &["budget", "hedge", "tries"], |reader, inner, at| {
            let tries = reader.number(inner, at, "tries", 1, 10);
            retry.tries = tries.and_then(|tries| u8::try_from(tries).ok());
            retry.budget =
                reader.text(inner, at, "budget", |text| Share::try_from(text.to_owned()));
            retry.hedge = reader.text(inner, at, "hedge", |text| Span::try_from(text.to_owned()));
        });
        retry
    }

    fn breaker(&mut self, table: &DeTable<'_>, at: &str) -> BreakerLimits {
        let mut breaker = BreakerLimits::default();
        let known = &["errors", "ratio", "window", "min", "scope"];
        self.inner(table, at, "breaker", known, |reader, inner, at| {
            breaker.errors = reader.number(inner, at, "errors", 1, 1_000);
            breaker.min = reader.number(inner, at, "min", 1, 10_000);
            breaker.ratio = reader.ratio(inner, at, "ratio");
            breaker.window = reader.text(inner, at, "window", |text| {
                let (least, most) = (Duration::from_secs(1), Duration::from_secs(3_600));
                let window = Span::try_from(text.to_owned()).ok();
                let window = window.filter(|window| (least..=most).contains(&window.0));
                window.ok_or_else(|| "expected a time from 1s to 1h, with its unit".to_owned())
            });
            breaker.scope = reader.text(inner, at, "scope", |text| match text {
                "mesh" => Ok(Scope::Mesh),
                "local" => Ok(Scope::Local),
                "off" => Ok(Scope::Off),
                _ => Err(expected_one_of(text, &["mesh", "local", "off"])),
            });
        });
        breaker
    }

    fn capacity(&mut self, table: &DeTable<'_>, at: &str) -> Capacity {
        let mut capacity = Capacity::default();
        self.inner(table, at, "inflight", &["soft", "hard"], |reader, inner, at| {
            let mut limit = |key| reader.number(inner, at, key, 1, u16::MAX).map(u32::from);
            capacity = Capacity { soft: limit("soft"), hard: limit("hard") };
        });
        if let (Some(value), Err(error)) = (table.get("inflight"), check_capacity(&capacity)) {
            self.refuse(value, &format!("{at}.inflight"), error.to_string());
        }
        capacity
    }

    fn ratio(&mut self, table: &DeTable<'_>, at: &str, key: &str) -> Option<Ratio> {
        let value = table.get(key)?;
        let read = match value.get_ref() {
            DeValue::Float(number) => number.as_str().parse().ok(),
            DeValue::Integer(number) => number.as_str().parse().ok(),
            _ => None,
        };
        let ratio = read.and_then(|fraction: f64| Ratio::try_from(fraction).ok());
        if ratio.is_none() {
            let message = "expected a fraction above 0 and up to 1, for instance 0.5";
            self.refuse(value, &format!("{at}.{key}"), message.to_owned());
        }
        ratio
    }

    /// Reads `key = { .. }`, whose keys are `known`.
    fn inner(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        key: &str,
        known: &'static [&'static str],
        read: impl FnOnce(&mut Self, &DeTable<'_>, &str),
    ) {
        let Some(value) = table.get(key) else { return };
        let at = format!("{at}.{key}");
        let DeValue::Table(inner) = value.get_ref() else {
            let expected = format!("expected {{ {} = .. }}", known.join(" = .., "));
            return self.refuse(value, &at, expected);
        };
        self.known(inner, &at, known);
        read(self, inner, &at);
    }

    /// Refuses every key of `table` that is not `known`.
    fn known(&mut self, table: &DeTable<'_>, at: &str, known: &'static [&'static str]) {
        for (name, _) in table {
            let key: &str = name.get_ref();
            if known.contains(&key) {
                continue;
            }
            let name_at = format!("{at}.{key}");
            let standing = Standing::Unknown(nearest(key, known.iter().copied()));
            self.refuse_key(name.span(), &name_at, key, &standing, "key");
        }
    }

    /// Reads a text into a setting, where it is there.
    fn set<T>(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        key: &str,
        setting: &mut Setting<T>,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) {
        let Some(value) = table.get(key) else { return };
        if let Some(parsed) = self.parsed(value, &format!("{at}.{key}"), parse) {
            self.take(value, &format!("{at}.{key}"), setting, parsed);
        }
    }

    /// One file cannot say a key twice: that is no TOML. What another one said is no less meant.
    fn take<T>(&mut self, value: &Value<'_>, at: &str, setting: &mut Setting<T>, parsed: T) {
        match &setting.origin {
            first @ Origin::File { .. } => {
                let message = format!("is set by {first} already");
                self.refuse(value, at, message);
            }
            _ => *setting = Setting::new(parsed, self.origin(value.span())),
        }
    }

    fn text<T>(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let value = table.get(key)?;
        self.parsed(value, &format!("{at}.{key}"), parse)
    }

    fn required<T: FromStr<Err: ToString>>(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        key: &str,
        span: &Range<usize>,
    ) -> Option<T> {
        if !table.contains_key(key) {
            self.missing(at, key, span);
        }
        self.text(table, at, key, parse::<T>)
    }

    fn parsed<T>(
        &mut self,
        value: &Value<'_>,
        at: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let read = match value.get_ref() {
            DeValue::String(text) => parse(text),
            other => Err(format!("expected a text in quotes, found {}", kind(other))),
        };
        read.map_err(|message| self.refuse(value, at, message)).ok()
    }

    fn number(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        key: &str,
        min: u16,
        max: u16,
    ) -> Option<u16> {
        let value = table.get(key)?;
        let read = value.get_ref().as_integer().filter(|number| number.radix() == 10);
        let read = read.and_then(|number| number.as_str().parse().ok());
        let read = read.filter(|number| (min..=max).contains(number));
        if read.is_none() {
            let message = format!("expected a whole number from {min} to {max}");
            self.refuse(value, &format!("{at}.{key}"), message);
        }
        read
    }

    fn duration(
        &mut self,
        table: &DeTable<'_>,
        at: &str,
        key: &str,
        setting: &mut Setting<Duration>,
    ) {
        let Some(value) = table.get(key) else { return };
        let at = format!("{at}.{key}");
        let time = match value.get_ref() {
            DeValue::Integer(number) => {
                let message =
                    format!("a duration needs a unit, for instance \"{}s\"", number.as_str());
                self.refuse(value, &at, message);
                None
            }
            _ => self.parsed(value, &at, check::duration),
        };
        if let Some(time) = time {
            self.take(value, &at, setting, time);
        }
    }

    fn list<T>(
        &mut self,
        value: &Value<'_>,
        at: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        let DeValue::Array(items) = value.get_ref() else {
            self.refuse(value, at, "expected a list: [\"…\", \"…\"]".to_owned());
            return Vec::new();
        };
        let numbered = items.iter().enumerate();
        numbered.filter_map(|(i, item)| self.parsed(item, &format!("{at}[{i}]"), &parse)).collect()
    }

    fn missing(&mut self, at: &str, key: &str, span: &Range<usize>) {
        if self.broken_at.is_some() {
            return; // it may be on a broken line
        }
        self.fault(span.clone(), &format!("{at}.{key}"), None, "is missing".to_owned());
    }

    fn refuse(&mut self, value: &Value<'_>, at: &str, message: String) {
        let written = self.text.get(value.span()).unwrap_or_default();
        let line = written.lines().next().unwrap_or_default();
        let quoted = match line.char_indices().nth(QUOTE_LEN_MAX) {
            Some((end, _)) => format!("{}…", &line[..end]),
            None => line.to_owned(),
        };
        self.fault(value.span(), at, Some(quoted), message);
    }

    fn refuse_key(
        &mut self,
        span: Range<usize>,
        at: &str,
        name: &str,
        standing: &Standing,
        what: &str,
    ) {
        let message = match standing {
            Standing::Read => return,
            Standing::Later => format!("'{name}' is not available yet in this version"),
            Standing::Unknown(Some(near)) => format!("unknown {what}, did you mean '{near}'?"),
            Standing::Unknown(None) => format!("unknown {what}"),
        };
        self.fault(span, at, None, message);
    }

    fn fault(&mut self, span: Range<usize>, key: &str, value: Option<String>, message: String) {
        if self.broken_at.is_some_and(|broken_at| broken_at < span.end) {
            return;
        }
        let origin = self.origin(span);
        self.faults.push(Fault { origin, key: key.to_owned(), value, message });
    }

    fn origin(&self, span: Range<usize>) -> Origin {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        Origin::File { path: Arc::clone(&self.path), line }
    }
}

fn parse<T: FromStr<Err: ToString>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|error: T::Err| error.to_string())
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "a truth value",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
