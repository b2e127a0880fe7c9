//! From what the user wrote to settings that cannot be invalid.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::runtime::NodeFile;
use super::settings::{DOMAIN, below_home};
use super::{
    ConfigError, Fault, Origin, Seed, Setting, Settings, default_advertise, default_data_dir, file,
};
use crate::api::{ExposeSpec, UpstreamSpec};
use crate::model::{MemberName, Protocol, ServiceName, Target, TargetError};
use crate::telemetry::{self, AccessTarget};
use crate::tls::store::{DataDir, StoreError};

/// What flags and environment say, over every file. Values are checked by [`load`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides {
    /// The one file to read (`-c`, `MURMESH_CONFIG`); it must exist.
    pub config: Option<PathBuf>,
    /// Instead of `node.data_dir`.
    pub data_dir: Option<Setting<PathBuf>>,
    /// Instead of `listen.mesh`.
    pub mesh: Option<SocketAddr>,
    /// Instead of `listen.api`.
    pub api: Option<Setting<String>>,
    /// Instead of `listen.gateway`.
    pub gateway: Option<String>,
    /// Instead of `listen.socks`.
    pub socks: Option<String>,
    /// Instead of `join.seeds`, if any.
    pub seeds: Vec<Seed>,
    /// Beside those of files.
    pub exposes: Vec<ExposeSpec>,
    /// Beside those of files.
    pub upstreams: Vec<UpstreamSpec>,
}

/// Reads files, flags and the data directory's node file into settings: all faults at once.
pub fn load(overrides: &Overrides) -> Result<Settings, ConfigError> {
    let mut files = match overrides.config.clone().or_else(default_config) {
        Some(path) => with_neighbours(&path)?,
        None => Vec::new(),
    };
    if overrides.config.is_none() {
        files.retain(|path| path.exists()); // nobody asked for it
    }
    let mut contents = Vec::new();
    for path in files {
        let text = fs::read_to_string(&path).map_err(|e| ConfigError::unreadable(&path, e))?;
        contents.push((path, text));
    }
    let settings = load_texts(contents, overrides)?;
    Ok(Settings { read_by: Some(Arc::new(overrides.clone())), ..settings })
}

/// Checks one file by itself, without flags, environment or data directory.
pub fn validate(path: &Path) -> Result<Settings, ConfigError> {
    let text = fs::read_to_string(path).map_err(|error| ConfigError::unreadable(path, error))?;
    let mut settings = Settings::defaults(DataDir::new(""));
    let mut faults = Vec::new();
    file::read(path.to_owned(), &text, &mut settings, &mut faults);
    together(&settings, &mut faults);
    public(&settings, &mut faults);
    breakers(&settings, &mut faults);
    ConfigError::check(faults, &[path.to_owned()])?;
    Ok(settings)
}

/// As [`load`], from texts. The paths name places only.
pub fn load_texts(
    files: Vec<(PathBuf, String)>,
    overrides: &Overrides,
) -> Result<Settings, ConfigError> {
    let mut settings = Settings::defaults(DataDir::new(""));
    let mut faults = Vec::new();
    for (path, text) in &files {
        file::read(path.clone(), text, &mut settings, &mut faults);
    }
    apply(overrides, &mut settings, &mut faults);
    if settings.data_dir.value.path().as_os_str().is_empty() {
        let path = default_data_dir().ok_or(ConfigError::NoDataDir)?;
        settings.data_dir.value = DataDir::new(path);
    }
    fill_from_data_dir(&mut settings, &mut faults)?;
    if settings.advertise.value.is_none() {
        // not kept by `init` or `join`: a machine may get another address
        settings.advertise.value = default_advertise(settings.mesh.value).map(Seed::from);
    }
    together(&settings, &mut faults);
    public(&settings, &mut faults);
    breakers(&settings, &mut faults);
    let paths: Vec<PathBuf> = files.into_iter().map(|(path, _)| path).collect();
    ConfigError::check(faults, &paths)?;
    Ok(settings)
}

/// The file that is read when nobody names one.
pub fn default_config() -> Option<PathBuf> {
    let directory = match rustix::process::geteuid().is_root() {
        true => Some(PathBuf::from("/etc/murmesh")),
        false => below_home("XDG_CONFIG_HOME", ".config"),
    };
    directory.map(|directory| directory.join("murmesh.toml"))
}

/// The file, then `conf.d/*.toml` beside it by name. No two may set a key.
fn with_neighbours(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let directory = path.parent().unwrap_or(Path::new(".")).join("conf.d");
    let mut neighbours = Vec::new();
    match fs::read_dir(&directory) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry.map_err(|e| ConfigError::unreadable(&directory, e))?;
                neighbours.push(entry.path());
            }
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(ConfigError::unreadable(&directory, error)),
    }
    neighbours.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    neighbours.sort();
    neighbours.insert(0, path.to_owned());
    Ok(neighbours)
}

fn apply(overrides: &Overrides, settings: &mut Settings, faults: &mut Vec<Fault>) {
    if let Some(path) = &overrides.data_dir {
        settings.data_dir = Setting::new(DataDir::new(&path.value), path.origin.clone());
    }
    if let Some(mesh) = overrides.mesh {
        settings.mesh = Setting::new(mesh, Origin::Flag("--mesh"));
    }
    if let Some(api) = &overrides.api {
        match api.value.parse() {
            Ok(Target::Unix(path)) => {
                settings.api_socket = Some(Setting::new(path, api.origin.clone()));
            }
            _ => match loopback(&api.value) {
                Ok(address) => settings.api = Setting::new(address, api.origin.clone()),
                Err(message) => faults.push(flag_fault(&api.origin, &api.value, message)),
            },
        }
    }
    for (flag, told, door) in [
        ("--gateway", &overrides.gateway, &mut settings.gateway),
        ("--socks", &overrides.socks, &mut settings.socks),
    ] {
        let Some(told) = told else { continue };
        let origin = Origin::Flag(flag);
        match loopback(told) {
            Ok(address) => *door = Setting::new(Some(address), origin),
            Err(message) => faults.push(flag_fault(&origin, told, message)),
        }
    }
    if !overrides.seeds.is_empty() {
        settings.seeds = Setting::new(overrides.seeds.clone(), Origin::Flag("--seed"));
    }
    for spec in &overrides.exposes {
        settings.exposes.push(Setting::new(spec.clone(), Origin::Flag("--expose")));
    }
    for spec in &overrides.upstreams {
        settings.upstreams.push(Setting::new(spec.clone(), Origin::Flag("--upstream")));
    }
}

fn flag_fault(origin: &Origin, value: &str, message: String) -> Fault {
    let (origin, value) = (origin.clone(), Some(value.to_owned()));
    Fault { origin, key: String::new(), value, message }
}

/// What `init` or `join` were told holds where nothing else was said.
fn fill_from_data_dir(settings: &mut Settings, faults: &mut Vec<Fault>) -> Result<(), ConfigError> {
    let dir = settings.data_dir.value.clone();
    let node = NodeFile::load(&dir).map_err(|error| ConfigError::DataDir(error.to_string()))?;
    fn fill<T>(setting: &mut Setting<T>, value: Option<T>) {
        if let (false, Some(value)) = (setting.is_asked(), value) {
            *setting = Setting::new(value, Origin::DataDir);
        }
    }
    fill(&mut settings.mesh, node.mesh);
    let advertise = node.advertise.as_deref().map(advertise).transpose();
    let advertise = advertise.map_err(|expected| {
        ConfigError::DataDir(
            StoreError::damaged(dir.file("node.toml"), format!("advertise: {expected}"))
                .to_string(),
        )
    })?;
    fill(&mut settings.advertise, advertise.map(Some));
    let seeds: Vec<Seed> = node.seeds.iter().filter_map(|seed| seed.parse().ok()).collect();
    fill(&mut settings.seeds, (!seeds.is_empty()).then_some(seeds));
    let enrolled = enrolled_name(&dir);
    match (&settings.name.value, enrolled) {
        (Some(asked), Some(enrolled)) if *asked != enrolled => faults.push(Fault {
            origin: settings.name.origin.clone(),
            key: "node.name".to_owned(),
            value: Some(format!("\"{asked}\"")),
            message: format!(
                "this node is enrolled as '{enrolled}'; a name changes only by joining again \
                 with another --data-dir"
            ),
        }),
        (_, Some(enrolled)) => fill(&mut settings.name, Some(Some(enrolled))),
        (_, None) => {}
    }
    Ok(())
}

/// As whom this directory is enrolled, if it is. A damaged one is told when the agent starts.
fn enrolled_name(dir: &DataDir) -> Option<MemberName> {
    dir.credentials().ok().map(|credentials| credentials.name().clone())
}

/// What no single value shows: two that want the same.
fn together(settings: &Settings, faults: &mut Vec<Fault>) {
    let mut ids = BTreeMap::new();
    for expose in &settings.exposes {
        let id = expose.value.id.as_str();
        if let Some(first) = ids.insert(id, &expose.origin) {
            let message = format!("is taken by {first}; give one of them another id");
            faults.push(taken(&expose.origin, "expose.id", id, message));
        }
    }
    let mut listens: BTreeMap<Target, &Origin> = BTreeMap::new();
    if settings.api.is_asked() && settings.api.value.port() != 0 {
        listens.insert(Target::Tcp(settings.api.value), &settings.api.origin);
    }
    for (key, door) in [
        ("listen.gateway", &settings.gateway),
        ("listen.socks", &settings.socks),
        ("gateway.public", &settings.public),
        ("gateway.redirect", &settings.redirect),
    ] {
        if let Some(listen) = door.value.filter(|listen| listen.port() != 0)
            && let Some(first) = listens.insert(Target::Tcp(listen), &door.origin)
        {
            let message = format!("is taken by {first}");
            faults.push(taken(&door.origin, key, &listen.to_string(), message));
        }
    }
    for upstream in &settings.upstreams {
        let listen = &upstream.value.listen;
        if listen.port() == Some(0) {
            continue; // any free port
        }
        if let Some(first) = listens.insert(listen.clone(), &upstream.origin) {
            let message = format!("is taken by {first}");
            faults.push(taken(&upstream.origin, "upstream.listen", &listen.to_string(), message));
        }
    }
}

/// The public gateway needs all of its parts.
fn public(settings: &Settings, faults: &mut Vec<Fault>) {
    let mut refuse = |origin: &Origin, key: &str, message: &str| {
        let (origin, key) = (origin.clone(), key.to_owned());
        faults.push(Fault { origin, key, value: None, message: message.to_owned() });
    };
    let needs = "means nothing without gateway.public, where the public gateway listens";
    let Settings { public, redirect, certificates, publics, .. } = settings;
    match public.value {
        Some(_) if certificates.value.is_empty() => {
            let message = "needs gateway.certificates: the public gateway is TLS only";
            refuse(&public.origin, "gateway.public", message);
        }
        Some(_) => {}
        None => {
            if redirect.value.is_some() {
                refuse(&redirect.origin, "gateway.redirect", needs);
            }
            if certificates.is_asked() {
                refuse(&certificates.origin, "gateway.certificates", needs);
            }
            for public in publics {
                refuse(&public.origin, "upstream.public", needs);
            }
        }
    }
    let mut hosts = BTreeMap::new();
    for Setting { value, origin } in publics {
        for host in &value.hosts {
            if let Some(first) = hosts.insert(host, origin) {
                let message = format!("is taken by {first}");
                faults.push(taken(origin, "upstream.hosts", host, message));
            }
        }
    }
}

/// What this member holds of the instances of a service is one, through whichever entry they are called.
fn breakers(settings: &Settings, faults: &mut Vec<Fault>) {
    let mut said: BTreeMap<&ServiceName, &Setting<UpstreamSpec>> = BTreeMap::new();
    for upstream in settings.upstreams.iter().filter(|one| !one.value.breaker.is_default()) {
        let first = said.entry(&upstream.value.service).or_insert(upstream);
        if first.value.breaker != upstream.value.breaker {
            let message = format!(
                "differs from that of {}: all upstreams of a service share its breakers",
                first.origin
            );
            let (origin, key) = (upstream.origin.clone(), "upstream.breaker".to_owned());
            faults.push(Fault { origin, key, value: None, message });
        }
    }
}

fn taken(origin: &Origin, key: &str, value: &str, message: String) -> Fault {
    let value = Some(format!("\"{value}\""));
    Fault { origin: origin.clone(), key: key.to_owned(), value, message }
}

/// An address of this machine, whoever reaches it.
pub(super) fn listen(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse().ok().filter(|address| !is_group(address));
    address.ok_or_else(|| "expected ip:port of this machine, for instance 0.0.0.0:443".to_owned())
}

/// The agent and who writes the file may run in different directories.
pub(super) fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = Some(PathBuf::from(text)).filter(|path| path.is_absolute());
    path.ok_or_else(|| "expected an absolute path".to_owned())
}

/// A host that clients name: a DNS name in lower case.
pub(super) fn host(text: &str) -> Result<String, String> {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
    };
    match text.len() <= 253 && text.split('.').all(is_label) {
        true => Ok(text.to_owned()),
        false => {
            Err("expected a host name in lower case, for instance shop.example.com".to_owned())
        }
    }
}

/// `eu1/a`: region and, after a slash, zone.
pub(super) fn zone(text: &str) -> Result<String, String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    match text.len() <= 64 && text.chars().all(is_word) {
        true => Ok(text.to_owned()),
        false => Err("expected at most 64 letters, digits and -_./, for instance eu1/a".to_owned()),
    }
}

/// The one domain of this version.
pub(super) fn domain(text: &str) -> Result<String, String> {
    match text == DOMAIN {
        true => Ok(text.to_owned()),
        false => Err(format!("another domain than \"{DOMAIN}\" is not available yet")),
    }
}

/// An address that the mesh port can be bound to.
pub fn mesh_listen(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .ok()
        .filter(|address| !is_group(address))
        .ok_or_else(|| "expected ip:port of this machine, for instance 0.0.0.0:7370".to_owned())
}

/// An address that only this machine reaches.
pub(super) fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<SocketAddr>().ok().filter(|address| address.ip().is_loopback());
    address.ok_or_else(|| match text.starts_with("unix:") {
        true => "a unix socket is not available yet here, expected a loopback address".to_owned(),
        false => "expected a loopback address, for instance 127.0.0.1:7371".to_owned(),
    })
}

/// A place that others can dial.
pub fn advertise(text: &str) -> Result<Seed, String> {
    let is_dialable = |place: &Seed| match place.host().parse::<IpAddr>() {
        Ok(ip) => !ip.is_unspecified() && !is_group(&SocketAddr::new(ip, place.port())),
        Err(_) => true, // a name: the resolver knows
    };
    // Without a port it would be guessed, and a port that is forwarded is another one.
    let has_port = text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok())
        && text.parse::<IpAddr>().is_err();
    text.parse().ok().filter(is_dialable).filter(|_| has_port).ok_or_else(|| {
        "expected host:port as others reach it, for instance 10.0.0.1:7370 or web1.example.com:7370"
            .to_owned()
    })
}

/// Whether more than one machine is meant.
fn is_group(address: &SocketAddr) -> bool {
    match address.ip() {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_multicast(),
    }
}

/// A local entry: only this machine's applications reach it.
pub(super) fn entry(text: &str) -> Result<Target, String> {
    let target: Target = text.parse().map_err(|error| match error {
        TargetError::Malformed(_) => {
            "expected a port, a loopback address (127.0.0.1:5432) or unix:/path".to_owned()
        }
        error => error.to_string(),
    })?;
    match &target {
        Target::Tcp(address) if !address.ip().is_loopback() => Err(
            "expected a loopback address; an entry for other machines (public) is not available \
             yet"
            .to_owned(),
        ),
        _ => Ok(target),
    }
}

/// A protocol of this version.
pub(super) fn protocol(text: &str) -> Result<Protocol, String> {
    match text.parse() {
        Ok(Protocol::Udp) => Err("'udp' is not available yet in this version".to_owned()),
        Ok(protocol) => Ok(protocol),
        Err(_) => Err("expected \"tcp\", \"http\", \"h2\" or \"grpc\"".to_owned()),
    }
}

/// Where requests are written down.
pub(super) fn access_log(text: &str) -> Result<AccessTarget, String> {
    match text {
        "stdout" => Ok(AccessTarget::Stdout),
        path if path.starts_with('/') => Ok(AccessTarget::File(path.into())),
        _ => Err("expected \"stdout\" or an absolute path".to_owned()),
    }
}

/// A time with a unit.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let has_unit = text.chars().any(char::is_alphabetic);
    let parsed = humantime::parse_duration(text).ok().filter(|_| has_unit);
    parsed.ok_or_else(|| {
        "expected a duration with a unit, for instance \"30s\" or \"72h\"".to_owned()
    })
}

/// A log level or filter.
pub(super) fn log_filter(text: &str) -> Result<String, String> {
    match telemetry::check_filter(text) {
        Ok(()) => Ok(text.to_owned()),
        Err(expected) => Err(format!("expected {expected}")),
    }
}
