//! `init`, `invite`, `join`: how a mesh begins and grows.

use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use hyper::Method;
use serde::Deserialize;

use super::Global;
use super::client::{Client, data_dir, encoded};
use super::exit::{Exit, Failure, Outcome};
use super::output::{Drawing, Grid, Listing, age, cell, line, note, or_dash, show, state};
use super::{duration, issuer, number};
use crate::agent::{self, JoinOptions};
use crate::api::InviteRequest;
use crate::api::views::InviteRow;
use crate::config::{
    MESH_PORT, NodeFile, Seed, advertise_address, default_advertise, hostname, mesh_address,
};
use crate::model::{MemberName, ServiceName, Unlisted};
use crate::runtime::clock;
use crate::runtime::reach::Obstacle;
use crate::tls::store::{self, DataDir, InitOptions, StoreError};

/// Longest token read from standard input: one is about 300 bytes.
const TOKEN_LEN_MAX: u64 = 4_096;
/// How long certificates live unless told otherwise.
const CERT_TTL: Duration = Duration::from_secs(7 * 24 * 3_600);
/// Digits of an invite's id.
const ID_LEN: usize = 32;
/// Digits that mean an invite: enough to mean one of 1,000, few enough to type.
const PREFIX_LEN_MIN: usize = 6;

/// Arguments of `init`.
#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// What people call this machine [default: the hostname]
    #[arg(long)]
    name: Option<MemberName>,
    /// Where other machines reach it [default: the default route's address]
    #[arg(long, value_name = "HOST:PORT", value_parser = advertise_address)]
    advertise: Option<Seed>,
    /// Where the mesh port is bound [default: 0.0.0.0:7370]
    #[arg(long, value_name = "ADDR", value_parser = mesh_address)]
    mesh: Option<SocketAddr>,
    /// How long certificates live; they are renewed at half of it
    /// [default: 7d]
    #[arg(long, value_name = "TIME", value_parser = cert_ttl)]
    cert_ttl: Option<Duration>,
}

/// Arguments of `join`.
#[derive(Debug, Args)]
pub(super) struct JoinArgs {
    /// From 'murmesh invite'; '-' reads it from standard input
    #[arg(env = "MURMESH_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// What people call this machine [default: the hostname]
    #[arg(long)]
    name: Option<MemberName>,
    /// Take the name over from a member that is gone: this machine, before it
    /// was set up anew. What had its key before is believed no more
    #[arg(long)]
    replace: bool,
    /// Where other machines reach it [default: the default route's address]
    #[arg(long, value_name = "HOST:PORT", value_parser = advertise_address)]
    advertise: Option<Seed>,
    /// Where the mesh port is bound [default: 0.0.0.0:7370]
    #[arg(long, value_name = "ADDR", value_parser = mesh_address)]
    mesh: Option<SocketAddr>,
    /// One more member to ask first; may be repeated
    #[arg(long = "seed", value_name = "HOST:PORT")]
    seeds: Vec<Seed>,
}

/// Arguments of `invite`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct InviteArgs {
    #[command(subcommand)]
    verb: Option<InviteVerb>,
    /// How long the token holds
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    ttl: Duration,
    /// How many machines may join with it
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = number::<u32>(1, u32::MAX.into()))]
    uses: u32,
    /// The only services that whoever joins may offer [default: all]
    #[arg(long, value_delimiter = ',', value_name = "web,db")]
    services: Option<Vec<ServiceName>>,
    /// The only name that it lets in
    #[arg(long, value_name = "NAME")]
    node: Option<MemberName>,
    /// Make whoever joins with it an issuer: prints the token, waits until its
    /// agent runs, and signs with the root key
    #[arg(long)]
    issuer: bool,
    /// The root key of the mesh [default: root.key in the data directory]
    #[arg(long, value_name = "FILE", env = "MURMESH_ROOT_KEY", hide_env_values = true)]
    root_key: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum InviteVerb {
    /// List the invites made here
    List {
        #[command(flatten)]
        listing: Listing,
    },
    /// Take an invite back; who joined with it stays
    Revoke {
        /// Which; the first 6 digits or more, see 'murmesh invite list'
        #[arg(value_parser = invite_prefix)]
        id: String,
    },
}

/// Shorter leaves end while a dead issuer is still being dialled, longer ones outlive their issuer.
fn cert_ttl(text: &str) -> Result<Duration, String> {
    const RANGE: RangeInclusive<u64> = 5..=10 * 365 * 24 * 3_600;
    let time = duration(text)?;
    match RANGE.contains(&time.as_secs()) {
        true => Ok(time),
        false => Err("expected a life of 5s to 3650d".to_owned()),
    }
}

pub(super) fn open_dir(global: &Global) -> Result<DataDir, Failure> {
    let path = data_dir(global).ok_or_else(|| {
        Failure::usage("no data directory is known").hint("--data-dir DIR or MURMESH_DATA_DIR")
    })?;
    Ok(DataDir::new(path))
}

/// What the data directory says, as an exit code.
pub(super) fn store_failure(error: StoreError) -> Failure {
    use std::io::ErrorKind;
    match &error {
        StoreError::Io { error: reason, .. } if reason.kind() == ErrorKind::PermissionDenied => {
            Failure::new(Exit::NotPermitted, error)
                .hint("another user, or another place: --data-dir DIR (or MURMESH_DATA_DIR)")
        }
        StoreError::NotPrivate { .. } => Failure::new(Exit::NotPermitted, error),
        StoreError::Io { action: "create", .. } => Failure::failed(error)
            .hint("a place for the data directory where files can be made: --data-dir DIR"),
        _ => Failure::failed(error),
    }
}

/// Founds a mesh.
pub(super) async fn init(global: &Global, args: InitArgs) -> Outcome {
    let dir = open_dir(global)?;
    let options = InitOptions {
        name: args.name.clone().unwrap_or_else(hostname),
        unlisted: Unlisted::Allow,
        cert_ttl: args.cert_ttl.unwrap_or(CERT_TTL),
    };
    let report = store::init(&dir, &options).map_err(store_failure)?;
    if report.was_there {
        let wishes = Wishes {
            name: args.name.clone(),
            advertise: args.advertise.clone(),
            mesh: args.mesh,
            cert_ttl: args.cert_ttl,
            seeds: Vec::new(),
        };
        tell_untaken(&dir, &report.name, &wishes)?;
    }
    if agent::has_left(&dir) {
        return come_back(&dir, &report.name);
    }
    if report.was_there {
        line(format_args!(
            "unchanged: {} is member {} of mesh {}",
            dir.path().display(),
            report.name,
            report.mesh.short()
        ))?;
        return Ok(Exit::Ok);
    }
    let advertise = args.advertise.as_ref().map(Seed::to_string);
    let node = NodeFile { advertise, mesh: args.mesh, seeds: Vec::new() };
    node.save(&dir).map_err(store_failure)?;
    line(format_args!("mesh        {}", report.mesh))?;
    line(format_args!(
        "name        {}{}",
        report.name,
        origin(args.name.is_some(), "the hostname")
    ))?;
    line(advertise_line(node.advertise.as_deref(), args.mesh))?;
    line(format_args!("root key    {}   <- move it offline", report.root_key.display()))?;
    line(format_args!("operator    {}", report.operator_key.display()))?;
    note("next: murmesh agent, then in another terminal: murmesh invite");
    Ok(Exit::Ok)
}

/// The founder is back in its mesh. Whoever came by a token needs one to come back.
fn come_back(dir: &DataDir, name: &MemberName) -> Outcome {
    if dir.authority().map_err(store_failure)?.is_none() {
        let message = format!("{} has left its mesh and needs a token", dir.path().display());
        return Err(Failure::failed(message).hint(agent::way_back(dir)));
    }
    agent::come_back(dir).map_err(store_failure)?;
    line(format_args!("back: {} is member {name} of its mesh again", dir.path().display()))?;
    note("next: murmesh agent");
    Ok(Exit::Ok)
}

/// What somebody asked of a machine that is a member already.
struct Wishes {
    name: Option<MemberName>,
    advertise: Option<Seed>,
    mesh: Option<SocketAddr>,
    cert_ttl: Option<Duration>,
    seeds: Vec<Seed>,
}

/// Says which wishes are not taken because something else holds already, and what to do instead.
fn tell_untaken(dir: &DataDir, name: &MemberName, wishes: &Wishes) -> Result<(), Failure> {
    let before = NodeFile::load(dir).map_err(store_failure)?;
    let genesis = dir.genesis().map_err(store_failure)?;
    let untaken = |wish: &str, why: String| note(format_args!("not taken: {wish}: {why}"));
    if let Some(wish) = wishes.name.as_ref().filter(|wish| *wish != name) {
        let why = format!("this machine is member {name}; another name needs another --data-dir");
        untaken(&format!("--name {wish}"), why);
    }
    let address = |flag: &str, key: &str, wish: Option<String>, kept: Option<String>| {
        let Some(wish) = wish.filter(|wish| kept.as_ref() != Some(wish)) else { return };
        let kept = kept.map_or("the default is kept".to_owned(), |kept| format!("{kept} is kept"));
        let why =
            format!("{kept}; write {key} = \"{wish}\" under [listen] of the configuration file");
        untaken(&format!("{flag} {wish}"), why);
    };
    let text = |address: SocketAddr| address.to_string();
    let wish = wishes.advertise.as_ref().map(Seed::to_string);
    address("--advertise", "advertise", wish, before.advertise.clone());
    address("--mesh", "mesh", wishes.mesh.map(text), before.mesh.map(text));
    let ttl = genesis.map(|(_, genesis)| Duration::from_secs(genesis.leaf_ttl_secs));
    if let (Some(wish), Some(ttl)) = (wishes.cert_ttl.filter(|wish| Some(*wish) != ttl), ttl) {
        let [wish, ttl] = [wish, ttl].map(humantime::format_duration);
        let why = format!("certificates of this mesh live {ttl}, as its first init said");
        untaken(&format!("--cert-ttl {wish}"), why);
    }
    for seed in wishes.seeds.iter().filter(|seed| !before.seeds.contains(&seed.to_string())) {
        let why = "murmesh agent --seed, or seeds under [join] of the configuration file";
        untaken(&format!("--seed {seed}"), why.to_owned());
    }
    Ok(())
}

fn origin(is_asked: bool, default: &str) -> String {
    if is_asked { String::new() } else { format!("   ({default})") }
}

fn advertise_line(asked: Option<&str>, mesh: Option<SocketAddr>) -> String {
    let mesh = mesh.unwrap_or((Ipv4Addr::UNSPECIFIED, MESH_PORT).into());
    match (asked, default_advertise(mesh)) {
        (Some(place), _) => format!("advertises  {place}"),
        (None, Some(address)) if mesh.ip().is_unspecified() => {
            format!("advertises  {address}   (the default route's; --advertise for another)")
        }
        (None, Some(address)) => format!("advertises  {address}"),
        (None, None) => {
            "advertises  nothing: there is no default route, say --advertise".to_owned()
        }
    }
}

#[derive(Debug, Deserialize)]
struct Made {
    id: String,
    token: String,
}

/// A token that nobody has read is lost: there is no other way to it.
fn printed_token(made: &Made) -> Result<(), Failure> {
    match line(&made.token)? {
        true => Ok(()),
        false => Err(Failure::failed("cannot write to standard output: its reader is gone")),
    }
}

/// Takes back an invite whose token is lost, and says what is left to do.
async fn take_back(client: &Client, made: &Made, failure: Failure) -> Failure {
    match client.act(Method::DELETE, &format!("/v1/mesh/invites/{}", encoded(&made.id))).await {
        Ok(()) => failure.and(format_args!("the token is lost, its invite {} is revoked", made.id)),
        Err(other) => failure
            .and(format_args!(
                "the token is lost, its invite {} stays open: {}",
                made.id, other.message
            ))
            .hint(format_args!("murmesh invite revoke {}", made.id)),
    }
}

/// Prints a token; or lists or takes back invites.
pub(super) async fn invite(global: &Global, args: InviteArgs) -> Outcome {
    let client = &Client::new(global)?;
    match args.verb {
        Some(InviteVerb::List { listing }) => {
            show(listing, || async move {
                let rows: Vec<InviteRow> = client.get_secret("/v1/mesh/invites").await?;
                let hint = "no invites were made here\n  try: murmesh invite";
                Drawing::of(&rows, listing, invite_table, hint)
            })
            .await
        }
        Some(InviteVerb::Revoke { id }) => {
            let rows: Vec<InviteRow> = client.get_secret("/v1/mesh/invites").await?;
            let id = only_match(&rows, &id)?;
            client.act(Method::DELETE, &format!("/v1/mesh/invites/{}", encoded(id))).await?;
            line(format_args!("invite {id} lets nobody in any more"))?;
            Ok(Exit::Ok)
        }
        None => {
            if args.issuer && args.uses != 1 {
                let text = "--issuer is for one machine: no two members hold one issuing key";
                return Err(Failure::usage(text).hint("murmesh invite --issuer, once for each"));
            }
            // Before anything is made: without the key the invite would not do what it says.
            let root = args.issuer.then(|| issuer::root(global, args.root_key)).transpose()?;
            let request = InviteRequest {
                ttl: Some(humantime::format_duration(args.ttl).to_string()),
                uses: Some(args.uses),
                name: args.node,
                services: args.services,
            };
            let made: Made = client.change(Method::POST, "/v1/mesh/invites", &request).await?;
            if let Err(failure) = printed_token(&made) {
                return Err(take_back(client, &made, failure).await);
            }
            let uses = super::output::count(args.uses as usize, "machine");
            note(format_args!("lets {uses} join within {}: murmesh join TOKEN", age(args.ttl)));
            let Some(root) = root else { return Ok(Exit::Ok) };
            note("waiting until it has joined and its agent runs, to make it an issuer");
            issuer::appoint_newcomer(client, &root, &made.id, args.ttl).await
        }
    }
}

/// The beginning of an invite's id.
fn invite_prefix(text: &str) -> Result<String, String> {
    let is_hexadecimal = text.chars().all(|c| c.is_ascii_hexdigit());
    match is_hexadecimal && (PREFIX_LEN_MIN..=ID_LEN).contains(&text.len()) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err(format!("expected {PREFIX_LEN_MIN} to {ID_LEN} hexadecimal digits")),
    }
}

/// The id of the one invite that begins so.
fn only_match<'a>(rows: &'a [InviteRow], prefix: &str) -> Result<&'a str, Failure> {
    let matching: Vec<_> =
        rows.iter().map(|row| row.id.as_str()).filter(|id| id.starts_with(prefix)).collect();
    match matching[..] {
        [id] => Ok(id),
        [] => Err(Failure::failed(format!("no invite made here begins with {prefix}"))
            .hint("murmesh invite list")),
        _ => Err(Failure::failed(format!(
            "{} invites begin with {prefix}: {}",
            matching.len(),
            matching.join(", ")
        ))),
    }
}

fn invite_table(rows: &[InviteRow]) -> String {
    let mut grid = Grid::new(["ID", "STATE", "USED", "ENDS IN", "NODE", "SERVICES"]);
    let now = clock::unix_seconds();
    for row in rows {
        let ends = match row.state.as_str() {
            "open" => age(Duration::from_secs(row.expires_at.saturating_sub(now))),
            _ => "-".to_owned(),
        };
        let services = row.services.as_ref().map_or("all".to_owned(), |list| list.join(","));
        let used = match row.state.as_str() {
            "revoked" => row.redeemed.to_string(), // of how many is gone with the permission
            _ => format!("{}/{}", row.redeemed, row.uses),
        };
        grid.row([
            cell(row.id.get(..12).unwrap_or(&row.id)),
            state(&row.state),
            cell(used),
            cell(ends),
            cell(or_dash(row.name.as_deref().unwrap_or_default())),
            cell(services),
        ]);
    }
    grid.finish(&[])
}

/// Joins a mesh.
pub(super) async fn join(global: &Global, args: JoinArgs) -> Outcome {
    let dir = open_dir(global)?;
    // Whoever comes back keeps what it was told the first time, unless it is told anew.
    let earlier = dir.credentials().ok();
    let known = earlier.as_ref().map(|credentials| credentials.name().clone());
    let before = NodeFile::load(&dir).map_err(store_failure)?;
    let is_hostname = args.name.is_none() && known.is_none();
    let name = args.name.clone().or(known).unwrap_or_else(hostname);
    let mut seeds = Vec::new();
    for seed in &args.seeds {
        let resolved = tokio::net::lookup_host((seed.host(), seed.port())).await;
        seeds.extend(resolved.map_err(|error| Failure::failed(format!("--seed {seed}: {error}")))?);
    }
    let options = JoinOptions {
        data_dir: dir.path().to_owned(),
        token: token(args.token)?,
        name,
        replace: args.replace,
        seeds,
    };
    let report = agent::join(options).await.map_err(join_failure)?;
    if report.was_there {
        let (advertise, mesh, seeds) = (args.advertise, args.mesh, args.seeds);
        let wishes = Wishes { name: args.name, advertise, mesh, cert_ttl: None, seeds };
        tell_untaken(&dir, &report.name, &wishes)?;
        line(format_args!(
            "unchanged: {} is member {} of mesh {}",
            dir.path().display(),
            report.name,
            report.mesh.short()
        ))?;
        return Ok(Exit::Ok);
    }
    let mut kept: Vec<String> = args.seeds.iter().map(Seed::to_string).collect();
    for seed in report.seeds.iter().map(SocketAddr::to_string) {
        if !kept.contains(&seed) {
            kept.push(seed);
        }
    }
    let advertise = args.advertise.as_ref().map(Seed::to_string).or(before.advertise);
    let mesh = args.mesh.or(before.mesh);
    let node = NodeFile { advertise, mesh, seeds: kept };
    node.save(&dir).map_err(store_failure)?;
    line(format_args!("mesh        {}", report.mesh))?;
    line(format_args!("name        {}{}", report.name, origin(!is_hostname, "the hostname")))?;
    line(format_args!("member      {}", report.member))?;
    let services = earlier.map(|credentials| credentials.enrolled().services.clone());
    if let Some(told) = services_line(services, report.services.as_deref()) {
        line(told)?;
    }
    line(advertise_line(node.advertise.as_deref(), mesh))?;
    note("next: murmesh agent");
    Ok(Exit::Ok)
}

/// What this member may offer, where that is not simply everything. `before` is what an earlier
/// enrolment of it said.
fn services_line(
    before: Option<Option<Vec<ServiceName>>>,
    now: Option<&[ServiceName]>,
) -> Option<String> {
    let words = |services: Option<&[ServiceName]>| match services {
        None => "every service".to_owned(),
        Some(all) => all.iter().map(ServiceName::as_str).collect::<Vec<_>>().join(", "),
    };
    let origin = match before {
        Some(before) if before.as_deref() == now => "as before".to_owned(),
        Some(before) => format!("before: {}", words(before.as_deref())),
        None => "by the token".to_owned(),
    };
    let is_plain = now.is_none() && !origin.starts_with("before");
    (!is_plain).then(|| format!("may offer   {}   ({origin})", words(now)))
}

fn join_failure(error: agent::JoinError) -> Failure {
    match error {
        agent::JoinError::Store(error) => store_failure(error),
        agent::JoinError::Token(error) => {
            Failure::usage(error).hint("murmesh invite, on a machine that runs 'murmesh agent'")
        }
        agent::JoinError::Knock(error) => Failure::failed(error),
        error @ agent::JoinError::Unreachable(_) => {
            let remedy = match &error {
                agent::JoinError::Unreachable(obstacles) => {
                    let first = obstacles.iter().find(|(_, obstacle)| *obstacle != Obstacle::None);
                    first.map(|(address, obstacle)| obstacle.remedy(*address))
                }
                _ => None,
            };
            let failure = Failure::new(Exit::TimedOut, &error);
            remedy.into_iter().fold(failure, Failure::hint)
        }
    }
}

fn token(argument: String) -> Result<String, Failure> {
    if argument != "-" {
        return Ok(argument);
    }
    let mut text = String::new();
    // One line: whoever writes it may have more to do before it ends.
    BufReader::new(std::io::stdin().take(TOKEN_LEN_MAX))
        .read_line(&mut text)
        .map_err(|error| Failure::failed(format!("cannot read the token: {error}")))?;
    Ok(text)
}
