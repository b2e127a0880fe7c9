//! Settings that cannot be invalid: what an agent starts from.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use super::{Origin, Overrides, Setting, default_advertise};
use crate::api::{ExposeSpec, SettingView, UpstreamSpec, of_upstream};
use crate::membership::Profile;
use crate::model::{MemberName, ServiceName};
use crate::proxy::EntryOptions;
use crate::telemetry::{AccessTarget, LogFormat};
use crate::tls::public::CertificateFiles;
use crate::tls::store::DataDir;

/// The one port that other machines need.
pub const MESH_PORT: u16 = 7370;
/// Where the local API listens.
pub const API_PORT: u16 = 7371;
/// The suffix of names in the mesh.
pub const DOMAIN: &str = "mesh";
/// How long an agent that stops may finish what it has.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(30);
/// How long a member that is gone stays in listings.
pub const FORGET_AFTER: Duration = Duration::from_secs(72 * 3_600);

/// A service that answers clients outside the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicService {
    /// Which.
    pub service: ServiceName,
    /// Under which hosts: DNS names in lower case, at least one.
    pub hosts: Vec<String>,
    /// How they are led there.
    pub options: EntryOptions,
}

/// Everything an agent starts from, valid by construction: only the checks of this module make it.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Keys, certificates, what must outlive the agent.
    pub data_dir: Setting<DataDir>,
    /// This member's name. The enrolment decides; this one was checked against it when both are
    /// known.
    pub name: Setting<Option<MemberName>>,
    /// For instance `eu1/a`; empty when it has none.
    pub zone: Setting<String>,
    /// The suffix of names.
    pub domain: Setting<String>,
    /// Where the UDP socket is bound.
    pub mesh: Setting<SocketAddr>,
    /// Where others reach it, by address or by a name that is looked up again and again; the default
    /// route's address when nobody said, with port 0 while the port is not known. `None` when this machine
    /// has no route either.
    pub advertise: Setting<Option<Seed>>,
    /// Where the API listens; a default that is taken gives way to any free port.
    pub api: Setting<SocketAddr>,
    /// A unix socket where the API listens instead, beside the one in the data directory.
    pub api_socket: Option<Setting<PathBuf>>,
    /// Where the HTTP gateway listens, if it shall.
    pub gateway: Setting<Option<SocketAddr>>,
    /// Where SOCKS5 listens, if it shall.
    pub socks: Setting<Option<SocketAddr>>,
    /// Where the public gateway listens, if it shall: TLS only.
    pub public: Setting<Option<SocketAddr>>,
    /// Where clients in plain text are sent to it, if they shall.
    pub redirect: Setting<Option<SocketAddr>>,
    /// What it proves itself with; the first also to clients that ask for no name.
    pub certificates: Setting<Vec<CertificateFiles>>,
    /// What it leads to, and nothing else.
    pub publics: Vec<Setting<PublicService>>,
    /// Whom to ask first.
    pub seeds: Setting<Vec<Seed>>,
    /// How fast to detect and at what cost.
    pub profile: Setting<Profile>,
    /// How long a member that is gone stays in listings. Records and re-dialling stay longer.
    pub forget_after: Setting<Duration>,
    /// What this machine offers, of flags and files. What the CLI added is in the runtime file.
    pub exposes: Vec<Setting<ExposeSpec>>,
    /// What this machine opens, of flags and files. What the CLI added is in the runtime file.
    pub upstreams: Vec<Setting<UpstreamSpec>>,
    /// Level or filter.
    pub log: Setting<String>,
    /// How log lines look.
    pub log_format: Setting<LogFormat>,
    /// Where requests of HTTP are written down; nowhere unless set.
    pub access_log: Setting<Option<AccessTarget>>,
    /// How these were read, to read them again; absent when no files were looked for.
    pub read_by: Option<Arc<Overrides>>,
}

impl Settings {
    /// For agents of one machine, for instance in tests: any free ports, on loopback only.
    pub fn local(data_dir: DataDir) -> Self {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Self {
            mesh: Setting::default(any),
            advertise: Setting::default(None),
            api: Setting::default(any),
            profile: Setting::default(Profile::Local),
            ..Self::defaults(data_dir)
        }
    }

    /// What `murmesh agent` runs with when nobody says otherwise: the mesh port 7370 on every address,
    /// the API on loopback, profile `lan`.
    pub fn machine(data_dir: DataDir) -> Self {
        let settings = Self::defaults(data_dir);
        let advertise = Setting::default(default_advertise(settings.mesh.value).map(Seed::from));
        Self { advertise, ..settings }
    }

    /// With this name for the member, where it founds or joins a mesh.
    pub fn with_name(mut self, name: MemberName) -> Self {
        self.name = Setting::new(Some(name), Origin::Program);
        self
    }

    /// With the UDP port of the mesh bound here; others reach it there, or at the default route's
    /// address when it is bound on every address.
    pub fn with_mesh(mut self, address: SocketAddr) -> Self {
        self.mesh = Setting::new(address, Origin::Program);
        self.advertise = Setting::default(default_advertise(address).map(Seed::from));
        self
    }

    /// With this place for others to dial, an address or a name ([`Seed`]), for instance behind a port
    /// forwarding.
    pub fn with_advertise(mut self, place: impl Into<Seed>) -> Self {
        self.advertise = Setting::new(Some(place.into()), Origin::Program);
        self
    }

    /// With the local API at this port of loopback: it is for this machine only.
    pub fn with_api_port(mut self, port: u16) -> Self {
        self.api = Setting::new((Ipv4Addr::LOCALHOST, port).into(), Origin::Program);
        self
    }

    /// With one more member to ask first.
    pub fn with_seed(mut self, seed: Seed) -> Self {
        self.seeds.value.push(seed);
        self.seeds.origin = Origin::Program;
        self
    }

    /// The built-in values.
    pub(super) fn defaults(data_dir: DataDir) -> Self {
        Self {
            data_dir: Setting::default(data_dir),
            name: Setting::default(None),
            zone: Setting::default(String::new()),
            domain: Setting::default(DOMAIN.to_owned()),
            mesh: Setting::default((Ipv4Addr::UNSPECIFIED, MESH_PORT).into()),
            advertise: Setting::default(None),
            api: Setting::default((Ipv4Addr::LOCALHOST, API_PORT).into()),
            api_socket: None,
            gateway: Setting::default(None),
            socks: Setting::default(None),
            public: Setting::default(None),
            redirect: Setting::default(None),
            certificates: Setting::default(Vec::new()),
            publics: Vec::new(),
            seeds: Setting::default(Vec::new()),
            profile: Setting::default(Profile::Lan),
            forget_after: Setting::default(FORGET_AFTER),
            exposes: Vec::new(),
            upstreams: Vec::new(),
            log: Setting::default("info".to_owned()),
            log_format: Setting::default(LogFormat::Text),
            access_log: Setting::default(None),
            read_by: None,
        }
    }

    /// Every effective value with its origin, in the order of the documentation.
    pub fn dump(&self) -> Vec<SettingView> {
        fn view<T>(
            key: &str,
            setting: &Setting<T>,
            value: impl FnOnce(&T) -> serde_json::Value,
        ) -> SettingView {
            let (value, origin) = (value(&setting.value), setting.origin.to_string());
            SettingView { key: key.to_owned(), value, origin }
        }
        fn text<T: fmt::Display>(value: &T) -> serde_json::Value {
            value.to_string().into()
        }
        fn optional<T: fmt::Display>(value: &Option<T>) -> serde_json::Value {
            value.as_ref().map(T::to_string).into()
        }
        let mut views = vec![
            view("node.name", &self.name, optional),
            view("node.zone", &self.zone, text),
            view("node.data_dir", &self.data_dir, |dir| dir.path().display().to_string().into()),
            view("node.domain", &self.domain, text),
            view("listen.mesh", &self.mesh, text),
            view("listen.advertise", &self.advertise, optional),
            match &self.api_socket {
                Some(path) => {
                    view("listen.api", path, |path| format!("unix:{}", path.display()).into())
                }
                None => view("listen.api", &self.api, text),
            },
            view("listen.gateway", &self.gateway, optional),
            view("listen.socks", &self.socks, optional),
            view("gateway.public", &self.public, optional),
            view("gateway.redirect", &self.redirect, optional),
            view("gateway.certificates", &self.certificates, |files| {
                files.iter().map(|files| files.cert.display().to_string()).collect()
            }),
            view("join.seeds", &self.seeds, |seeds| seeds.iter().map(Seed::to_string).collect()),
            view("join.profile", &self.profile, |profile| profile_word(*profile).into()),
            view("join.forget_after", &self.forget_after, |time| {
                humantime::format_duration(*time).to_string().into()
            }),
        ];
        for expose in &self.exposes {
            let key = format!("expose.{}", expose.value.id);
            views.push(view(&key, expose, |spec| {
                serde_json::to_value(spec.clone().without_secrets()).unwrap_or_default()
            }));
        }
        for upstream in &self.upstreams {
            for (key, value) in of_upstream(&upstream.value) {
                views.push(view(&key, upstream, |_| value));
            }
        }
        for public in &self.publics {
            let key = format!("public.{}", public.value.service);
            views.push(view(&key, public, |public| public.hosts.clone().into()));
        }
        views.push(view("telemetry.log", &self.log, text));
        views.push(view("telemetry.log_format", &self.log_format, |format| match format {
            LogFormat::Text => "text".into(),
            LogFormat::Json => "json".into(),
        }));
        views.push(view("telemetry.access_log", &self.access_log, |target| match target {
            None => serde_json::Value::Null,
            Some(AccessTarget::Stdout) => "stdout".into(),
            Some(AccessTarget::File(path)) => path.display().to_string().into(),
        }));
        views
    }
}

/// The word for a profile in files.
pub(super) fn profile_word(profile: Profile) -> &'static str {
    match profile {
        Profile::Local => "local",
        Profile::Lan => "lan",
        Profile::Wan => "wan",
    }
}

/// Where a member answers: `10.0.0.1:7370`, `seed.example.com`, `[::1]:7370`. Names are resolved
/// by the agent, again and again, so that a machine may move.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seed {
    host: String,
    port: u16,
}

impl Seed {
    /// A name or an IP address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// [`MESH_PORT`] unless said otherwise.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for Seed {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

/// No address. Fault: whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a seed, expected host:port (10.0.0.1:7370 or seed.example.com:7370)")]
pub struct SeedError(String);

impl FromStr for Seed {
    type Err = SeedError;

    fn from_str(text: &str) -> Result<Self, SeedError> {
        let refused = || SeedError(text.chars().take(120).collect());
        if let Ok(address) = text.parse::<SocketAddr>() {
            return match address.port() {
                0 => Err(refused()),
                port => Ok(Self { host: address.ip().to_string(), port }),
            };
        }
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self { host: ip.to_string(), port: MESH_PORT });
        }
        let (host, port) = match text.split_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| refused())?),
            None => (text, MESH_PORT),
        };
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
        };
        // An all-numeric last label is a mistyped IP address, never a host name (RFC 1123, 2.1).
        let is_name = host.len() <= 253
            && host.split('.').all(is_label)
            && !host.rsplit('.').next().is_some_and(|l| l.chars().all(|c| c.is_ascii_digit()));
        if !is_name || port == 0 {
            return Err(refused());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

impl fmt::Display for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Where the data directory is unless said otherwise: `/var/lib/murmesh` as root, else below the XDG
/// data home. `None` when there is no home either.
pub fn default_data_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/var/lib/murmesh".into());
    }
    below_home("XDG_DATA_HOME", ".local/share")
}

/// `<the XDG directory>/murmesh`. The specification says to ignore relative values.
pub(super) fn below_home(variable: &str, fallback: &str) -> Option<PathBuf> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = absolute(variable).or_else(|| absolute("HOME").map(|home| home.join(fallback)));
    base.map(|base| base.join("murmesh"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_addresses_or_names_with_the_mesh_port_by_default() {
        for (text, printed) in [
            ("10.0.0.1:7370", "10.0.0.1:7370"),
            ("10.0.0.1", "10.0.0.1:7370"),
            ("[::1]:80", "[::1]:80"),
            ("::1", "[::1]:7370"),
            ("seed.example.com", "seed.example.com:7370"),
            ("node_2:1", "node_2:1"),
        ] {
            assert_eq!(text.parse::<Seed>().unwrap().to_string(), printed);
        }
        for bad in
            ["", ":1", "a:0", "a:b", "10.0.0.300:7370", "10.0.0.1:0", "a b", "http://a", "a..b"]
        {
            assert!(bad.parse::<Seed>().is_err(), "{bad}");
        }
    }
}
