//! What can be wrong with a running agent and its mesh, seen from that agent.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Mutex, watch};
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::machine::{Runs, machine};
use super::{listed, span};
use crate::agent::{disowned, seeds};
use crate::api::views::{self, Service, is_shown};
use crate::api::{ApiState, Check, Readiness, SOCKET_FILE};
use crate::config::Seed;
use crate::mesh::{MemberView, Snapshot};
use crate::model::{EntryKind, MemberRecord, MemberState, Target};
use crate::runtime::reach::obstacle;
use crate::runtime::{blocking, clock};
use crate::telemetry::Metrics;
use crate::tls::public::PublicCertificate;
use crate::tls::store::DataDir;
use crate::transport::Endpoint;
use crate::transport::enrolment::renewal::{Door, ask_time};
use crate::transport::gossip::GossipHandle;
use crate::wire;

/// How long a seed or an instance may take to answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// Seeds and silent addresses that are asked at once: each costs a handshake.
const ASKED_MAX: usize = 16;
/// From here on clocks are worth a look: with NTP they differ by milliseconds.
const SKEW_LOW_SECS: f64 = 60.0;
/// Half of what the back-dating of certificates forgives.
const SKEW_MAX_SECS: f64 = 1_800.0;
/// How late a renewal may be: it is tried again after minutes.
const RENEWAL_LATE_SECS: u64 = 600;
/// Certificates are usually renewed when a third of their life is left, which may be a month.
const PUBLIC_LEFT_LOW_SECS: u64 = 14 * 24 * 3_600;
/// How long an agent may be without a word before that is told.
const UNHEARD_AFTER: Duration = Duration::from_secs(10);
/// How often it is told again.
const UNHEARD_INTERVAL: Duration = Duration::from_secs(60);

/// Checks a running agent. One check runs at a time, so that asking often costs little.
pub(in crate::agent) struct Inspector {
    pub(in crate::agent) dir: DataDir,
    pub(in crate::agent) mesh: SocketAddr,
    pub(in crate::agent) advertise: watch::Receiver<SocketAddr>,
    pub(in crate::agent) seeds: Vec<Seed>,
    pub(in crate::agent) endpoint: Endpoint,
    pub(in crate::agent) gossip: GossipHandle,
    pub(in crate::agent) turn: Mutex<()>,
}

impl Inspector {
    /// Every check, as it ends now.
    pub(in crate::agent) async fn run(self: Arc<Self>, state: ApiState) -> Vec<Check> {
        let state = &state;
        let _turn = self.turn.lock().await;
        let (dir, mesh) = (self.dir.clone(), self.mesh);
        let machine = blocking(move || machine(&dir, mesh, Runs::Yes)).await;
        let mut checks = vec![agent(state), believed(state)];
        checks.extend(machine.unwrap_or_default());
        let snapshot = state.snapshot();
        let (udp, seeds, instances, versions) = tokio::join!(
            self.udp(state, &snapshot),
            self.seeds(&snapshot),
            instances(state),
            self.versions(&snapshot),
        );
        checks.extend([udp, self.isolated(state, &snapshot), seeds, members(state, &snapshot)]);
        checks.extend([names(&snapshot), versions, clock_skew(state.metrics.clock_skew.get())]);
        let renews_at = state.identity.load().renews_at;
        checks.extend([
            renewal(renews_at, clock::unix_seconds()),
            issuers(&snapshot),
            degraded(state),
        ]);
        let rows = views::services(state);
        checks.extend([services(&snapshot), ejected(&rows), failing(&rows)]);
        checks.extend([open_services(&snapshot), instances]);
        checks.extend([dropped(state), self.api_socket()]);
        checks.extend(public(state, clock::unix_seconds()));
        checks
    }

    fn advertise(&self) -> SocketAddr {
        *self.advertise.borrow()
    }

    /// Where somebody of this mesh should answer.
    async fn expected(&self, state: &ApiState, snapshot: &Snapshot) -> Vec<SocketAddr> {
        let (mut addresses, _) = seeds::resolve(&self.seeds).await;
        addresses.extend(others(state, snapshot).map(|view| view.address));
        addresses.retain(|address| *address != self.advertise() && *address != self.mesh);
        addresses.sort_unstable();
        addresses.dedup();
        addresses.truncate(ASKED_MAX);
        addresses
    }

    async fn udp(&self, state: &ApiState, snapshot: &Snapshot) -> Check {
        const ID: &str = "udp";
        if has_heard(&state.metrics) {
            return Check::pass(ID, "other members were heard");
        }
        if state.disowned().is_some() {
            return Check::pass(ID, "other members answer, and refuse this one");
        }
        let expected = self.expected(state, snapshot).await;
        let Some(first) = expected.first() else {
            return Check::pass(ID, "no other member is known yet");
        };
        let obstacles = obstacles(&expected).await;
        let remedy = obstacle(*first).await.remedy(*first);
        let message = format!("no member was ever heard: {}", listed(&obstacles));
        Check::fail(
            ID,
            message,
            format!("{remedy}; and {}/udp to this machine", self.advertise().port()),
        )
    }

    fn isolated(&self, state: &ApiState, snapshot: &Snapshot) -> Check {
        let is_heard = |view: &&Arc<MemberView>| view.state == MemberState::Alive;
        let alive = others(state, snapshot).filter(is_heard).count();
        match (others(state, snapshot).count(), alive) {
            (0, _) => Check::pass("isolated", "no other member is known"),
            // Which of the two is cut off nobody can tell: 'members' says that it does not answer.
            (1, 0) => Check::pass("isolated", "there is one other member"),
            (_, 0) if state.disowned().is_some() => {
                Check::pass("isolated", "the others answer, and refuse this one")
            }
            (all, 0) => {
                let message = format!("none of {all} other members answers this one");
                let fix = format!(
                    "the network of this machine, {}/udp in its firewall; murmesh net",
                    self.advertise().port()
                );
                Check::fail("isolated", message, fix)
            }
            (all, alive) => Check::pass("isolated", format!("{alive} of {all} others answer")),
        }
    }

    /// A seed is well when it is an address of a living member, or somebody of this mesh answers.
    async fn seeds(&self, snapshot: &Snapshot) -> Check {
        const ID: &str = "seeds";
        let (addresses, unresolved) = seeds::resolve(&self.seeds).await;
        let is_known = |address: &SocketAddr| {
            let mut others = snapshot.members.values();
            let is_alive = |view: &MemberView| view.state == MemberState::Alive;
            *address == self.advertise()
                || others.any(|view| view.address == *address && is_alive(view))
        };
        let unknown = addresses.into_iter().filter(|address| !is_known(address)).take(ASKED_MAX);
        let asked = unknown.map(async |address| {
            let door = Door { member: None, address };
            let is_there = timeout(ANSWER_TIME_MAX, ask_time(&self.endpoint, door)).await;
            (!matches!(is_there, Ok(Ok(_)))).then_some(address)
        });
        let silent: Vec<_> = join_all(asked).await.into_iter().flatten().collect();
        let mut faults: Vec<String> = silent.iter().map(SocketAddr::to_string).collect();
        faults.extend(unresolved.into_iter().map(|(seed, why)| format!("{seed} ({why})")));
        let fix = format!(
            "seeds under [join] of the configuration file, or in {}",
            self.dir.file("node.toml").display()
        );
        match (faults.is_empty(), self.seeds.len()) {
            (true, 0) => Check::pass(ID, "none are set"),
            (true, all) => Check::pass(ID, format!("{all} set, all answer")),
            (false, all) => {
                let count = faults.len();
                let message =
                    format!("{count} of {all} seeds do not answer as members: {}", listed(&faults));
                Check::warn(ID, message, fix)
            }
        }
    }

    async fn versions(&self, snapshot: &Snapshot) -> Check {
        let entries = self.gossip.entries(EntryKind::RECORD).await.unwrap_or_default();
        let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for entry in entries {
            let view = snapshot.members.get(&entry.signer().member_id());
            let is_there = view.is_some_and(|view| view.state == MemberState::Alive);
            if let (true, Ok(record)) =
                (is_there, wire::decode_payload::<MemberRecord>(&entry.payload()))
            {
                versions.entry(record.agent_version).or_default().push(record.name.to_string());
            }
        }
        mixed(&versions)
    }

    fn api_socket(&self) -> Check {
        let path = self.dir.file(SOCKET_FILE);
        match path.exists() {
            true => Check::pass("api_socket", path.display()),
            false => {
                let message = format!("{} is not there: programs cannot use it", path.display());
                let fix =
                    "restart the agent; a path of more than 107 bytes needs another --data-dir";
                Check::warn("api_socket", message, fix)
            }
        }
    }
}

fn agent(state: &ApiState) -> Check {
    let up = span(state.clock.now().as_nanos() / 1_000_000_000);
    match state.readiness() {
        Readiness::Ready => Check::pass("agent", format!("ready, up {up}")),
        Readiness::NotReady(reason) => {
            let fix = "murmesh events --since 5m";
            Check::fail("agent", format!("not ready: {reason} (up {up})"), fix)
        }
    }
}

/// Whether the other members believe this one.
fn believed(state: &ApiState) -> Check {
    match state.disowned() {
        None => Check::pass("believed", "no other member refuses this one"),
        Some(reason) => Check::fail("believed", reason, disowned::FIX),
    }
}

fn others<'s>(
    state: &ApiState,
    snapshot: &'s Snapshot,
) -> impl Iterator<Item = &'s Arc<MemberView>> {
    let me = state.me;
    let others = snapshot.members.values().filter(move |view| view.id != me);
    others.filter(|view| view.state != MemberState::Left)
}

/// What the checks of this machine's instances say; to those without any it connects, as the agent
/// does for every call.
async fn instances(state: &ApiState) -> Check {
    const ID: &str = "instances";
    let (local, reports) = (state.local(), state.reports());
    let offered = local.exposed.iter().filter(|spec| !local.out.maintenance.contains_key(&spec.id));
    let asked = offered.clone().map(async |spec| {
        let why = match reports.get(&spec.id) {
            Some(report) => report.reason.clone()?,
            None => refusal(&spec.to).await?,
        };
        Some(format!("{} at {} ({why})", spec.id, spec.to))
    });
    let failing: Vec<String> = join_all(asked).await.into_iter().flatten().collect();
    match failing.is_empty() {
        true => Check::pass(ID, format!("all {} of this machine are well", offered.count())),
        false => {
            let message = format!("out of order: {}", listed(&failing));
            Check::fail(ID, message, "start or mend what serves it, or murmesh unexpose ID")
        }
    }
}

fn clock_skew(skew: f64) -> Check {
    const ID: &str = "clock_skew";
    let fix = "timedatectl set-ntp true, here and on the other machines";
    if skew.is_nan() {
        return Check::pass(ID, "no other member was asked yet");
    }
    let message = format!("the others' clocks are {skew:+.1} s from this machine's");
    match skew.abs() {
        SKEW_MAX_SECS.. => Check::fail(ID, message, fix),
        SKEW_LOW_SECS.. => Check::warn(ID, message, fix),
        _ => Check::pass(ID, message),
    }
}

fn renewal(renews_at: u64, now: u64) -> Check {
    const ID: &str = "renewal";
    match now.checked_sub(renews_at).filter(|late| *late > RENEWAL_LATE_SECS && renews_at > 0) {
        Some(late) => {
            let message = format!("the certificate's renewal is {} late", span(late));
            Check::warn(ID, message, "murmesh events --since 1d; murmesh issuer list")
        }
        None => Check::pass(ID, format!("renewed in {}", span(renews_at.saturating_sub(now)))),
    }
}

fn issuers(snapshot: &Snapshot) -> Check {
    const ID: &str = "issuers";
    let state = |member| snapshot.members.get(member).map(|view| view.state);
    let all: Vec<_> = snapshot.active_issuers().collect();
    let replaced = all.iter().map(|issuer| issuer.member);
    let replaced: Vec<_> = replaced.filter(|member| snapshot.replaced.contains(member)).collect();
    if let Some(first) = replaced.first() {
        let message =
            format!("issuing keys of replaced machines are still believed: {}", listed(&replaced));
        return Check::warn(ID, message, format!("murmesh issuer remove {first} --root-key FILE"));
    }
    let is_there = |member| matches!(state(member), Some(MemberState::Alive));
    let there = all.iter().filter(|issuer| is_there(&issuer.member)).count();
    match there {
        0 => {
            let name = |member| {
                let view = snapshot.members.get(member);
                view.map_or_else(|| "unknown".to_owned(), |view| view.name.to_string())
            };
            let names: Vec<_> = all.iter().map(|issuer| name(&issuer.member)).collect();
            let message = format!("no issuer answers: {}", listed(&names));
            let fix = "start its agent, or murmesh issuer add NODE --root-key FILE";
            Check::warn(ID, message, fix)
        }
        there => Check::pass(ID, format!("{there} of {} issuers answer", all.len())),
    }
}

/// What the public gateway proves itself with, where there is one.
fn public(state: &ApiState, now: u64) -> Option<Check> {
    const ID: &str = "public_certificates";
    let used = state.certificates.used();
    if let Some(error) = state.certificates.fault() {
        let fix = format!("put {} right", error.path.display());
        let is_in_use =
            |one: &PublicCertificate| [&one.files.cert, &one.files.key].contains(&&error.path);
        return Some(match used.certificates.iter().any(is_in_use) {
            true => Check::warn(ID, format!("{error}; the certificate of before is in use"), fix),
            false => Check::fail(ID, format!("{error}; its hosts are not served"), fix),
        });
    }
    let soonest = used.certificates.iter().min_by_key(|certificate| certificate.not_after)?;
    let (path, count) = (soonest.files.cert.display(), used.certificates.len());
    let fix = format!("renew {path}; it is read as soon as it changes");
    Some(match soonest.not_after.checked_sub(now) {
        None => Check::fail(ID, format!("{path} has ended"), fix),
        Some(left) if left < PUBLIC_LEFT_LOW_SECS => {
            Check::warn(ID, format!("{path} ends in {}", span(left)), fix)
        }
        Some(left) => Check::pass(ID, format!("{count} in use, the first ends in {}", span(left))),
    })
}

fn degraded(state: &ApiState) -> Check {
    match &state.identity.load().degraded {
        None => Check::pass("degraded", "all certificates in use are valid"),
        Some(reason) => {
            let fix = "start an issuer (murmesh issuer list): certificates are then renewed";
            Check::fail("degraded", reason, fix)
        }
    }
}

fn dropped(state: &ApiState) -> Check {
    const ID: &str = "dropped";
    let events = state.events.dropped().get();
    let lines = state.log.dropped();
    match (events, lines) {
        (0, 0) => Check::pass(ID, "no event and no log line"),
        _ => {
            let message =
                format!("since the start {events} events and {lines} log lines were left out");
            let fix = "murmesh log-level warn, a faster reader of the log; murmesh events";
            Check::warn(ID, message, fix)
        }
    }
}

fn mixed(versions: &BTreeMap<String, Vec<String>>) -> Check {
    if versions.len() < 2 {
        let version = versions.keys().next().map_or("none", String::as_str);
        return Check::pass("versions", format!("all agents run {version}"));
    }
    let told =
        |(version, names): (&String, &Vec<String>)| format!("{version} on {}", listed(names));
    let told: Vec<_> = versions.iter().map(told).collect();
    let fix = "upgrade one machine after the other, and restart its agent";
    Check::warn("versions", format!("agents differ: {}", told.join("; ")), fix)
}

fn has_heard(metrics: &Metrics) -> bool {
    metrics.gossip_datagrams_received.get() + metrics.gossip_bytes_received.get() > 0
}

/// What stands between here and each address, in words.
async fn obstacles(addresses: &[SocketAddr]) -> Vec<String> {
    let asked = addresses.iter().take(ASKED_MAX);
    join_all(asked.map(async |at| format!("{at}: {}", obstacle(*at).await))).await
}

fn members(state: &ApiState, snapshot: &Snapshot) -> Check {
    let named = |wanted: MemberState| -> Vec<String> {
        let now = state.clock.now();
        let shown = others(state, snapshot).filter(|view| is_shown(state, view, now));
        let meant = shown.filter(|view| view.state == wanted);
        meant.map(|view| view.name.to_string()).collect()
    };
    let (suspect, down) = (named(MemberState::Suspect), named(MemberState::Down));
    let mut faults = Vec::new();
    if !down.is_empty() {
        faults.push(format!("{} down: {}", down.len(), listed(&down)));
    }
    if !suspect.is_empty() {
        faults.push(format!("{} suspect: {}", suspect.len(), listed(&suspect)));
    }
    match faults.is_empty() {
        true => Check::pass("members", format!("{} known", snapshot.members.len())),
        false => Check::warn("members", faults.join("; "), "murmesh check, on those machines"),
    }
}

fn names(snapshot: &Snapshot) -> Check {
    let mut holders: BTreeMap<&str, usize> = BTreeMap::new();
    for view in snapshot.members.values().filter(|view| view.state != MemberState::Left) {
        *holders.entry(view.name.as_str()).or_default() += 1;
    }
    let taken: Vec<_> =
        holders.iter().filter(|(_, count)| **count > 1).map(|(name, _)| name).collect();
    match taken.is_empty() {
        true => Check::pass("names", "every member has a name of its own"),
        false => {
            let message = format!("more than one member is called {}", listed(&taken));
            let fix = "murmesh members; on the one too many: murmesh leave";
            Check::fail("names", message, fix)
        }
    }
}

fn services(snapshot: &Snapshot) -> Check {
    let all = snapshot.services.keys();
    let without: Vec<_> = all.filter(|name| snapshot.ready(name).next().is_none()).collect();
    let mixed = snapshot.services.values().filter(|view| view.is_mixed);
    let mixed: Vec<_> = mixed.map(|view| &view.name).collect();
    match (without.first(), mixed.first()) {
        (None, None) => Check::pass("services", format!("{} served", snapshot.services.len())),
        (Some(first), _) => {
            let message = format!("no instance is ready of {}", listed(&without));
            Check::warn("services", message, format!("murmesh endpoints {first}"))
        }
        (None, Some(_)) => {
            let message = format!("instances have several protocols, of {}", listed(&mixed));
            Check::warn("services", message, "expose all of a service with one --protocol")
        }
    }
}

/// Instances that calls go around because they failed.
fn ejected(services: &[Service]) -> Check {
    const ID: &str = "ejected";
    let ejected = |row: &Service| match (row.ejected, row.ejected_here) {
        (0, _) => None,
        (all, 0) => Some(format!("{all} of {} of {}", row.instances, row.name)),
        (all, here) => {
            Some(format!("{all} of {} of {}, {here} only here", row.instances, row.name))
        }
    };
    let told: Vec<_> = services.iter().filter_map(ejected).collect();
    let shunned: Vec<_> = services.iter().filter(|row| row.failing_here > 0).collect();
    let mut faults = Vec::new();
    if !told.is_empty() {
        faults.push(format!("ejected, because calls to them failed: {}", told.join("; ")));
    }
    if !shunned.is_empty() {
        let told =
            |row: &&Service| format!("{} of {} of {}", row.failing_here, row.instances, row.name);
        let told: Vec<_> = shunned.iter().map(told).collect();
        faults.push(format!("failing here, by their last calls: {}", told.join("; ")));
    }
    let fix = match (told.is_empty(), shunned.first()) {
        (true, None) => return Check::pass(ID, "no instance is ejected or fails here"),
        (true, Some(row)) => format!("murmesh endpoints {}, for what they met", row.name),
        (false, _) => "murmesh breakers, for who saw what and when they are tried".to_owned(),
    };
    Check::warn(ID, faults.join("; and "), fix)
}

/// Services that fail as a whole: nobody is spared them by ejecting one instance.
fn failing(services: &[Service]) -> Check {
    const ID: &str = "failing";
    let named = |is_meant: fn(&Service) -> bool| -> Vec<&str> {
        services.iter().filter(|row| is_meant(row)).map(|row| row.name.as_str()).collect()
    };
    let (failing, panic) = (named(|row| row.failing), named(|row| row.panic && !row.failing));
    let mut faults = Vec::new();
    if !failing.is_empty() {
        let what = "most calls fail, so that the mesh ejects nothing and nothing is sent twice";
        faults.push(format!("{what}: {}", listed(&failing)));
    }
    if !panic.is_empty() {
        let what = "so much is ejected that all of it is called again";
        faults.push(format!("{what}: {}", listed(&panic)));
    }
    match failing.iter().chain(&panic).next() {
        None => Check::pass(ID, "no service fails as a whole"),
        Some(first) => Check::warn(
            ID,
            faults.join("; "),
            format!("what its instances share, such as a database; murmesh events {first}"),
        ),
    }
}

/// In this version nobody can limit who calls a service.
fn open_services(snapshot: &Snapshot) -> Check {
    let names: Vec<_> = snapshot.services.keys().collect();
    match names.is_empty() {
        true => Check::pass("open_services", "no service is offered"),
        false => {
            let message = format!("every member may call {}", listed(&names));
            let fix = "rules come with a later version; until then invite only whom you trust";
            Check::warn("open_services", message, fix)
        }
    }
}

/// Why nothing answers at `to`; `None` when something does.
async fn refusal(to: &Target) -> Option<String> {
    let connected = async {
        match to {
            Target::Tcp(address) => TcpStream::connect(address).await.map(drop),
            Target::Unix(path) => UnixStream::connect(path).await.map(drop),
        }
    };
    match timeout(ANSWER_TIME_MAX, connected).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some(format!("no answer within {ANSWER_TIME_MAX:?}")),
    }
}

/// Says in the log what is wrong while seeds are set and nobody was ever heard. Ends once somebody
/// was.
pub(in crate::agent) async fn warn_while_unheard(inspector: Arc<Inspector>, state: ApiState) {
    sleep(UNHEARD_AFTER).await;
    while !has_heard(&state.metrics) {
        if state.disowned().is_some() {
            warn!(fix = disowned::FIX, "the other members refuse this one");
            sleep(UNHEARD_INTERVAL).await;
            continue;
        }
        let expected = inspector.expected(&state, &state.snapshot()).await;
        let obstacles = obstacles(&expected).await;
        if !obstacles.is_empty() {
            let up = state.clock.now().as_nanos() / 1_000_000_000;
            warn!(after = span(up), asked = listed(&obstacles), "no member was heard yet");
        }
        sleep(UNHEARD_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::CheckStatus;
    use crate::model::{Epoch, MemberId, MemberPhase, Moment};

    #[test]
    fn clocks_apart_are_told_before_certificates_break() {
        let status = |skew| clock_skew(skew).status;
        assert_eq!([f64::NAN, 0.2, -59.0].map(status), [CheckStatus::Pass; 3]);
        assert_eq!([60.0, -1_799.0].map(status), [CheckStatus::Warn; 2]);
        assert_eq!([-1_800.0, 9e9].map(status), [CheckStatus::Fail; 2]);
    }

    #[test]
    fn what_is_ejected_fails_as_a_whole_or_is_in_panic_is_told() {
        let well = Service {
            name: "web".to_owned(),
            protocol: "http".to_owned(),
            instances: 4,
            ready: 4,
            ejected: 0,
            ejected_here: 0,
            avoided: 0,
            failing_here: 0,
            failing: false,
            panic: false,
            mixed_protocols: false,
        };
        let all = |row: &Service| {
            [ejected(std::slice::from_ref(row)), failing(std::slice::from_ref(row))]
        };
        assert_eq!(all(&well).map(|check| check.status), [CheckStatus::Pass; 2]);
        let one = Service { ejected: 2, ejected_here: 1, ..well.clone() };
        let [told, _] = all(&one);
        assert_eq!(told.status, CheckStatus::Warn);
        assert!(told.message.contains("2 of 4 of web, 1 only here"), "{told:?}");
        let [told, _] = all(&Service { failing_here: 1, ..well.clone() });
        assert_eq!(told.status, CheckStatus::Warn);
        assert!(told.fix.contains("endpoints web"), "{told:?}");
        for sick in
            [Service { failing: true, ..well.clone() }, Service { panic: true, ..well.clone() }]
        {
            let [_, told] = all(&sick);
            assert_eq!(told.status, CheckStatus::Warn);
            assert!(told.message.contains("web") && !told.fix.is_empty(), "{told:?}");
        }
    }

    #[test]
    fn a_renewal_that_is_late_is_told() {
        assert_eq!(renewal(1_000, 900).status, CheckStatus::Pass);
        assert_eq!(renewal(1_000, 1_000 + RENEWAL_LATE_SECS).status, CheckStatus::Pass);
        assert_eq!(renewal(1_000, 1_001 + RENEWAL_LATE_SECS).status, CheckStatus::Warn);
        assert_eq!(renewal(0, u64::MAX).status, CheckStatus::Pass, "not known yet");
    }

    #[test]
    fn two_versions_are_told_with_who_runs_them() {
        let mut versions = BTreeMap::from([("0.1.0".to_owned(), vec!["a".to_owned()])]);
        assert_eq!(mixed(&versions).status, CheckStatus::Pass);
        versions.insert("0.2.0".to_owned(), vec!["b".to_owned(), "c".to_owned()]);
        let told = mixed(&versions);
        assert_eq!(told.status, CheckStatus::Warn);
        assert!(told.message.contains("0.1.0 on a; 0.2.0 on b, c"), "{told:?}");
    }

    #[test]
    fn two_members_of_one_name_are_told_until_one_has_left() {
        let view = |id, state| MemberView {
            id: MemberId::from_bytes([id; 16]),
            name: "same".parse().unwrap(),
            address: ([10, 0, 0, id], 7370).into(),
            zone: String::new(),
            state,
            phase: MemberPhase::Running,
            is_revoked: false,
            epoch: Epoch(1),
            version: 1,
            services: Vec::new(),
            changed_at: Moment::from_secs(1),
        };
        let status = |second| {
            let views = [view(1, MemberState::Alive), view(2, second)];
            let members = views.map(|view| (view.id, Arc::new(view))).into();
            names(&Snapshot { members, ..Snapshot::default() }).status
        };
        assert_eq!(status(MemberState::Alive), CheckStatus::Fail);
        assert_eq!(status(MemberState::Left), CheckStatus::Pass);
    }
}
