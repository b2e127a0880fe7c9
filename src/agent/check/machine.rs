//! What can be wrong with this machine, seen without an agent: also when none can start.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::process::{Resource, geteuid, getrlimit};
use socket2::{Domain, Protocol, Socket, Type};

use super::{listed, span};
use crate::agent::{has_left, way_back};
use crate::api::Check;
use crate::runtime::clock;
use crate::tls::store::{DataDir, StoreError};
use crate::tls::{Certificate, NodeCredentials, grace};
use crate::transport::SOCKET_BUFFER_LEN;

/// Files of the data directory that hold or prove secrets.
const SECRETS: &[&str] = &[
    "root.key",
    "operator.key",
    "node.key",
    "issuer.key",
    "node.crt",
    "api.token",
    "reset.secret",
];
/// Below this an agent cannot keep what it must: the largest file is its memory of the mesh, some
/// 10 MB at 1,000 members, written beside the old one.
const DISK_FREE_MIN: u64 = 32 * 1024 * 1024;
/// Below this somebody should look.
const DISK_FREE_LOW: u64 = 256 * 1024 * 1024;
/// A carried connection takes two files at its far end: 4,096 are 2,000 connections.
const OPEN_FILES_LOW: u64 = 4_096;

/// Whether an agent runs with the data directory, which then holds the mesh port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runs {
    /// It does.
    Yes,
    /// None does.
    No,
}

/// Checks the machine under an agent of `dir` whose mesh port is `mesh`. Blocks for the disk.
pub fn machine(dir: &DataDir, mesh: SocketAddr, runs: Runs) -> Vec<Check> {
    let mut checks = vec![data_dir(dir), key_files(dir)];
    let credentials = dir.credentials();
    checks.push(identity(dir, credentials.as_ref().err()));
    if let Ok(credentials) = &credentials {
        let now = clock::unix_seconds();
        checks.push(certificate(credentials, now, runs));
        checks.push(wall_clock(credentials, now));
    }
    checks.push(mesh_port(mesh, runs));
    checks.push(disk(dir));
    checks.push(open_files());
    checks.push(udp_buffers());
    checks
}

fn data_dir(dir: &DataDir) -> Check {
    const ID: &str = "data_dir";
    let path = dir.path().display();
    let about = match fs::metadata(dir.path()) {
        Ok(about) if about.is_dir() => about,
        Ok(_) => {
            return Check::fail(ID, format!("{path} is no directory"), "another --data-dir DIR");
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let fix = "murmesh init (a new mesh), murmesh join TOKEN, or the right --data-dir DIR";
            return Check::fail(ID, format!("{path} does not exist"), fix);
        }
        Err(error) => {
            return Check::fail(ID, format!("{path}: {error}"), "run this as the agent's user");
        }
    };
    let (owner, me) = (about.uid(), geteuid().as_raw());
    if me != 0 && owner != me {
        let message = format!("{path} belongs to user {owner}, this is user {me}");
        return Check::fail(ID, message, format!("chown -R {me} {path}, or run as user {owner}"));
    }
    let foreign = foreign_files(dir, owner);
    if !foreign.is_empty() {
        // For instance after a command that root ran beside an agent that is not root.
        let message = format!("{path} belongs to user {owner}, but not {}", listed(&foreign));
        return Check::fail(ID, message, format!("chown -R {owner} {path}"));
    }
    let mode = about.permissions().mode() & 0o777;
    let fix = format!("chmod 700 {path}");
    match mode {
        mode if mode & 0o022 != 0 => {
            Check::fail(ID, format!("others may write to {path} (mode {mode:o})"), fix)
        }
        mode if mode & 0o005 != 0 => {
            Check::warn(ID, format!("everybody may look into {path} (mode {mode:o})"), fix)
        }
        mode => Check::pass(ID, format!("{path} (mode {mode:o}, user {owner})")),
    }
}

/// Files in the directory that somebody else than `owner` owns.
fn foreign_files(dir: &DataDir, owner: u32) -> Vec<String> {
    let entries = fs::read_dir(dir.path()).into_iter().flatten().flatten();
    let is_foreign = |about: &Metadata| about.uid() != owner;
    let mut names: Vec<_> = entries
        .filter(|entry| entry.metadata().is_ok_and(|about| is_foreign(&about)))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn key_files(dir: &DataDir) -> Check {
    let open: Vec<_> = SECRETS
        .iter()
        .filter_map(|name| {
            let mode = fs::metadata(dir.file(name)).ok()?.permissions().mode() & 0o777;
            (mode & 0o077 != 0).then(|| format!("{name} ({mode:o})"))
        })
        .collect();
    match open.is_empty() {
        true => Check::pass("key_files", "only their owner may read them"),
        false => {
            let message = format!("others may read {}", listed(&open));
            let names: Vec<_> = open.iter().filter_map(|text| text.split(' ').next()).collect();
            let path = dir.path().display();
            let fix = format!("cd {path} && chmod 600 {}", names.join(" "));
            Check::fail("key_files", message, fix)
        }
    }
}

fn identity(dir: &DataDir, fault: Option<&StoreError>) -> Check {
    const ID: &str = "identity";
    let path = dir.path().display();
    match fault {
        Some(StoreError::Empty { .. }) => {
            let fix = "murmesh init (a new mesh), or murmesh join TOKEN";
            return Check::fail(ID, format!("{path} holds no identity yet"), fix);
        }
        Some(error @ StoreError::NotPrivate { path, .. }) => {
            return Check::fail(ID, error, format!("chmod 600 {}", path.display()));
        }
        Some(error) => {
            let fix = format!("a backup of {path}, or a new --data-dir and murmesh join TOKEN");
            return Check::fail(ID, error, fix);
        }
        None => {}
    }
    if has_left(dir) {
        return Check::fail(ID, "this machine has left its mesh", way_back(dir));
    }
    match dir.entries() {
        Ok(entries) => Check::pass(ID, format!("readable, with {} entries", entries.len())),
        Err(error) => {
            let path = dir.file("entries");
            let fix = format!("murmesh join TOKEN, or copy {} from another member", path.display());
            Check::fail(ID, error, fix)
        }
    }
}

fn certificate(credentials: &NodeCredentials, now: u64, runs: Runs) -> Check {
    const ID: &str = "certificate";
    let (until, life) = (credentials.expires_at(), credentials.life().span().as_secs());
    let renew = match runs {
        Runs::Yes => "murmesh issuer list: one of them must run and be reachable from here",
        Runs::No => "murmesh agent: it renews the certificate when an issuer is reachable",
    };
    let Some(left) = until.checked_sub(now).filter(|left| *left > 0) else {
        let since = now - until;
        let message = format!("the certificate ended {} ago", span(since));
        let fix = if since < grace::RENEWABLE.as_secs() { renew } else { "murmesh join TOKEN" };
        return Check::fail(ID, message, fix);
    };
    let message = format!("the certificate ends in {}", span(left));
    match left < life / 4 {
        true => Check::warn(ID, format!("{message}; it should have been renewed"), renew),
        false => Check::pass(ID, message),
    }
}

fn wall_clock(credentials: &NodeCredentials, now: u64) -> Check {
    let chain = credentials.chain().first();
    let begins =
        chain.and_then(|leaf| Certificate::read(leaf).ok()).map_or(0, |leaf| leaf.not_before);
    match begins.checked_sub(now).filter(|early| *early > 0) {
        Some(early) => {
            let message =
                format!("this machine's clock is {} before its certificate begins", span(early));
            Check::fail("clock", message, "timedatectl set-ntp true, or set the clock by hand")
        }
        None => Check::pass("clock", "not before this member's certificate begins"),
    }
}

fn mesh_port(mesh: SocketAddr, runs: Runs) -> Check {
    const ID: &str = "mesh_port";
    if runs == Runs::Yes {
        return Check::pass(ID, format!("{mesh} (udp) is bound"));
    }
    let Err(error) = UdpSocket::bind(mesh) else {
        return Check::pass(ID, format!("{mesh} (udp) is free"));
    };
    let port = mesh.port();
    let other = "another [listen] mesh in the configuration file";
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            let by = holder(port).map_or("another process".to_owned(), |holder| holder);
            let message = format!("{mesh} (udp) is taken by {by}");
            Check::fail(ID, message, format!("stop it (ss -ulpn 'sport = :{port}'), or {other}"))
        }
        _ => Check::fail(ID, format!("{mesh} (udp): {error}"), other),
    }
}

/// Who has a UDP port of this machine, as far as this user may know.
fn holder(port: u16) -> Option<String> {
    let tables = ["/proc/net/udp", "/proc/net/udp6"].map(fs::read_to_string);
    let inode = tables.iter().flatten().find_map(|table| inode_of(table, port))?;
    let socket = format!("socket:[{inode}]");
    let has_it = |process: &Path| {
        let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        files.into_iter().any(|file| {
            fs::read_link(file.path()).is_ok_and(|target| target.as_os_str() == socket.as_str())
        })
    };
    let entries = fs::read_dir("/proc").ok()?.flatten();
    let is_process = |name: &OsStr| name.as_encoded_bytes().iter().all(u8::is_ascii_digit);
    let mut processes = entries.filter(|entry| is_process(&entry.file_name()));
    let process = processes.find(|entry| has_it(&entry.path()))?.path();
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    Some(format!("{} (process {})", name.trim(), process.file_name()?.to_string_lossy()))
}

/// The inode of the socket on a local port, in a table of proc(5): the local address is the second
/// word, the inode the tenth.
fn inode_of(table: &str, port: u16) -> Option<u64> {
    let on_port = format!(":{port:04X}");
    let mut rows = table.lines().skip(1).map(str::split_whitespace);
    rows.find_map(|mut words| {
        let is_meant = words.nth(1)?.ends_with(&on_port);
        words.nth(7)?.parse().ok().filter(|_| is_meant)
    })
}

fn disk(dir: &DataDir) -> Check {
    const ID: &str = "disk";
    // What does not exist yet will be on the disk of what is above it.
    let Some(place) = dir.path().ancestors().find(|path| path.exists()) else {
        return Check::pass(ID, "not known: the data directory is nowhere yet");
    };
    let shown = place.display();
    let fix = format!("df -h {shown}; df -i {shown}");
    match statvfs(place) {
        Err(error) => Check::warn(ID, format!("{shown}: {error}"), fix),
        Ok(about) if about.f_flag.contains(StatVfsMountFlags::RDONLY) => {
            let fix = format!("mount -o remount,rw {shown}, or another --data-dir DIR");
            Check::fail(ID, format!("{shown} is mounted read-only"), fix)
        }
        Ok(about) => {
            let free = about.f_bavail.saturating_mul(about.f_frsize);
            let has_files = about.f_files == 0 || about.f_favail > 100;
            room(free, has_files, &shown.to_string(), &fix)
        }
    }
}

fn room(free: u64, has_files: bool, place: &str, fix: &str) -> Check {
    let message = format!("{} MiB free at {place}", free / (1024 * 1024));
    match free {
        _ if !has_files => Check::fail("disk", format!("no file can be made at {place}"), fix),
        ..DISK_FREE_MIN => Check::fail("disk", message, fix),
        DISK_FREE_MIN..DISK_FREE_LOW => Check::warn("disk", message, fix),
        _ => Check::pass("disk", message),
    }
}

fn open_files() -> Check {
    const ID: &str = "open_files";
    let fix = "LimitNOFILE=65536 in the agent's unit, or 'ulimit -Hn' where it is started";
    let limit = getrlimit(Resource::Nofile);
    match limit.maximum {
        Some(most) if most < OPEN_FILES_LOW => {
            Check::warn(ID, format!("a process may open {most} files at most"), fix)
        }
        most => {
            let most = most.map_or("any number of".to_owned(), |most| most.to_string());
            Check::pass(ID, format!("a process may open {most} files"))
        }
    }
}

fn udp_buffers() -> Check {
    const ID: &str = "udp_buffers";
    let fix = format!(
        "sysctl -w net.core.rmem_max={SOCKET_BUFFER_LEN} net.core.wmem_max={SOCKET_BUFFER_LEN}, and \
         the same in /etc/sysctl.d/murmesh.conf"
    );
    match buffers_granted() {
        Err(error) => Check::warn(ID, format!("cannot open a UDP socket: {error}"), fix),
        Ok(granted) if granted < SOCKET_BUFFER_LEN => {
            let message = format!(
                "the system grants UDP buffers of {} KiB, {} KiB are wanted: bursts will be dropped",
                granted / 1024,
                SOCKET_BUFFER_LEN / 1024
            );
            Check::warn(ID, message, fix)
        }
        Ok(granted) => Check::pass(ID, format!("{} KiB are granted", granted / 1024)),
    }
}

/// The smaller of the two buffers that a socket here gets, in bytes of payload.
fn buffers_granted() -> io::Result<usize> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_LEN)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_LEN)?;
    // The kernel reports twice what it lets payload use.
    Ok(socket.recv_buffer_size()?.min(socket.send_buffer_size()?) / 2)
}

/// No agent runs: what was checked is only the half of it.
pub fn not_running(dir: &DataDir) -> Check {
    let path = dir.path().display();
    let fix = format!(
        "systemctl start murmesh, or murmesh --data-dir {path} agent; its log says why it stopped"
    );
    Check::fail("agent", format!("no agent runs with {path}"), fix)
}

/// An agent has the data directory, and its API does not answer.
pub fn not_answering(dir: &DataDir, waited: Duration) -> Check {
    let path = dir.path().display();
    let message =
        format!("an agent runs with {path}, but its API did not answer within {waited:?}");
    Check::fail("agent", message, "its log; then systemctl restart murmesh")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::CheckStatus;
    use crate::tls::testing::mesh_of;

    #[test]
    fn a_disk_without_room_or_without_files_is_told() {
        let status = |free, has_files| room(free, has_files, "/x", "df").status;
        assert_eq!(status(1 << 40, true), CheckStatus::Pass);
        assert_eq!(status(DISK_FREE_LOW - 1, true), CheckStatus::Warn);
        assert_eq!(status(DISK_FREE_MIN - 1, true), CheckStatus::Fail);
        assert_eq!(status(1 << 40, false), CheckStatus::Fail);
    }

    #[test]
    fn an_old_certificate_and_an_early_clock_are_told_apart() {
        let [a] = &mesh_of(&["a"]).unwrap()[..] else { panic!("one member") };
        let (from, until) = (a.life().from.as_secs(), a.expires_at());
        let told = |now| {
            let [certificate, clock] = [certificate(a, now, Runs::No), wall_clock(a, now)];
            (certificate.status, certificate.fix, clock.status)
        };
        let (certificate, fix, clock) = told(from + 1);
        assert_eq!((certificate, fix.as_str(), clock), (CheckStatus::Pass, "", CheckStatus::Pass));
        assert_eq!(told(until - (until - from) / 5).0, CheckStatus::Warn);
        assert!(
            matches!(told(until), (CheckStatus::Fail, fix, _) if fix.contains("murmesh agent"))
        );
        let late = until + grace::RENEWABLE.as_secs();
        assert!(matches!(told(late), (CheckStatus::Fail, fix, _) if fix == "murmesh join TOKEN"));
        assert_eq!(told(from - 86_400).2, CheckStatus::Fail, "a clock that is behind by a day");
    }

    #[test]
    fn the_holder_of_a_port_is_named() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let at = socket.local_addr().unwrap();
        let me = format!("(process {})", std::process::id());
        let told = mesh_port(at, Runs::No);
        assert!(told.status == CheckStatus::Fail && told.message.contains(&me), "{told:?}");
        drop(socket);
        assert_eq!(mesh_port(at, Runs::No).status, CheckStatus::Pass);
    }
}
