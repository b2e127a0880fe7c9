//! `expose`, `unexpose`, `upstream`, `leave`: what this machine gives to the mesh and takes from it.

use std::time::Duration;

use clap::Args;
use hyper::Method;
use serde_json::{Value, json};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::client::{Client, encoded};
use super::exit::{Exit, Failure, Outcome};
use super::operate::until_empty;
use super::output::{Drawing, Grid, Listing, cell, line, note, or_dash, show};
use super::{Global, duration, number};
use crate::agent::{has_left, way_back};
use crate::api::control::{WEIGHT_MAX, balancing_fault};
use crate::api::views::{IssuerRow, Service};
use crate::api::{ExposeRequest, ExposeSpec, Exposed, SettingView, UNTIL_RESTART, UpstreamSpec};
use crate::balancer::{Balance, Near, Prefer};
use crate::model::{
    Capacity, InstanceId, Protocol, RequestPattern, ServiceName, Target, Weight, nearest,
};
use crate::proxy::{CheckError, CheckSpec, HashKey};

/// How long `expose` waits for the instance to accept one connection: it is only to warn.
const PROBE_TIME_MAX: Duration = Duration::from_millis(500);

const EXPOSE_HELP: &str = "\
A check with a ttl waits for the word of the application, at least once in that time. On this machine:
  curl -X PUT -H \"Authorization: Bearer $(cat DATA_DIR/api.token)\" \\
    127.0.0.1:7371/v1/agent/check/pass/service:ID       (or warn, fail; ?note=TEXT)";

/// Arguments of `expose`.
#[derive(Debug, Args)]
#[command(after_help = EXPOSE_HELP)]
pub(super) struct ExposeArgs {
    /// The service it belongs to; without any argument: list what this machine offers
    #[arg(requires = "to")]
    name: Option<ServiceName>,
    /// Where it listens: 127.0.0.1:8080, a port, or unix:/run/app.sock
    #[arg(value_name = "ADDR")]
    to: Option<Target>,
    /// Unique on this machine [default: the service's name]
    #[arg(long)]
    id: Option<InstanceId>,
    /// The service's natural port [default: that of ADDR]
    #[arg(long, value_parser = number::<u16>(1, u16::MAX.into()))]
    port: Option<u16>,
    /// What it speaks
    #[arg(long, value_name = "tcp|http|h2|grpc")]
    protocol: Option<Protocol>,
    /// A free word, for instance v2; may be repeated
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// Its share of the traffic, 0 to 10000 [default: 100]
    #[arg(long, value_parser = number::<u16>(0, WEIGHT_MAX.into()))]
    weight: Option<u16>,
    /// Requests that the instance may get twice, such as "GET *": sent again when it fails
    #[arg(long, value_name = "METHOD PATH")]
    idempotent: Vec<RequestPattern>,
    /// Calls at a time above which callers go elsewhere first; at most the hard limit
    #[arg(long, value_name = "CALLS", value_parser = number::<u32>(1, u32::MAX.into()))]
    soft_limit: Option<u32>,
    /// Calls at a time above which the next is refused
    #[arg(long, value_name = "CALLS", value_parser = number::<u32>(1, u32::MAX.into()))]
    hard_limit: Option<u32>,
    /// A check that must pass, or it takes no work: /ready (HTTP), tcp, grpc, grpc:SERVICE or ttl=30s
    /// (see below); may be repeated
    #[arg(long, value_name = "PATH|tcp|grpc|ttl=TIME", value_parser = check)]
    health: Vec<CheckSpec>,
    #[command(flatten)]
    listing: Listing,
}

/// Arguments of `unexpose`.
#[derive(Debug, Args)]
pub(super) struct UnexposeArgs {
    /// Which instance; see 'murmesh expose'
    id: InstanceId,
    /// How long to wait until nothing is in flight [default: not at all]; calls that it has go on
    #[arg(long, value_name = "TIME", value_parser = duration)]
    timeout: Option<Duration>,
}

/// Arguments of `upstream`.
#[derive(Debug, Args)]
pub(super) struct UpstreamArgs {
    /// Which service; it need not exist yet. Without any argument: list the open ones
    service: Option<ServiceName>,
    /// Where to listen: 127.0.0.1:5432, a port (0 for any), or unix:/run/db.sock
    #[arg(value_name = "ADDR")]
    listen: Option<Target>,
    /// How instances are chosen [default: peak_ewma]
    #[arg(long, value_name = "peak_ewma|least_request|round_robin|random|maglev", value_parser = Balance::named)]
    balance: Option<Balance>,
    /// How near they are to be, nearest first: same-zone,same-region,any
    #[arg(long, value_name = "WHERE,..", value_parser = prefer)]
    prefer: Option<Prefer>,
    /// What keeps calls together with maglev: client, or header:NAME [default: client]
    #[arg(long, value_name = "KEY", value_parser = |text: &str| HashKey::try_from(text.to_owned()))]
    hash: Option<HashKey>,
    /// Close it again
    #[arg(long, requires = "service")]
    off: bool,
    #[command(flatten)]
    listing: Listing,
}

fn prefer(text: &str) -> Result<Prefer, String> {
    Prefer::try_new(&text.split(',').collect::<Vec<_>>())
}

/// As [`CheckSpec`] is parsed, without what the parser of the command line says already.
fn check(text: &str) -> Result<CheckSpec, String> {
    text.parse().map_err(|error| match error {
        CheckError::Value { expected, .. } => {
            let meant = nearest(text, ["tcp", "grpc"]);
            let meant = meant.map(|word| format!("; did you mean '{word}'?")).unwrap_or_default();
            format!("expected {expected}{meant}")
        }
        error => error.to_string(),
    })
}

/// Says so where a file will win over what a command has just done.
async fn note_files_win(client: &Client, is_meant: impl Fn(&SettingView) -> bool) {
    let Ok(rows) = client.get_secret::<Vec<SettingView>>("/v1/mesh/config").await else { return };
    for row in rows.iter().filter(|row| is_meant(row)) {
        if let Some(file) = row.origin.strip_prefix(UNTIL_RESTART) {
            note(format_args!("holds until the agent restarts: then {file} wins; change it there"));
        }
    }
}

/// Offers an instance, or lists those offered.
pub(super) async fn expose(global: &Global, args: ExposeArgs) -> Outcome {
    let client = &Client::new(global)?;
    let (Some(name), Some(to)) = (args.name, args.to) else {
        return list_exposed(client, args.listing).await;
    };
    let inflight = Capacity { soft: args.soft_limit, hard: args.hard_limit };
    check_limits(inflight)?;
    let request = ExposeRequest {
        name,
        to,
        id: args.id,
        port: args.port,
        protocol: args.protocol,
        tags: args.tags,
        weight: args.weight.map(Weight),
        idempotent: args.idempotent,
        inflight,
        proxy_protocol: None,
        health: args.health.into_iter().map(Into::into).collect(),
    };
    let exposed: Exposed = client.change(Method::POST, "/v1/mesh/expose", &request).await?;
    let Exposed { spec, changes } = exposed;
    let what = format!("{} is offered as service {} (instance {})", spec.to, spec.service, spec.id);
    match changes {
        None => line(what),
        Some(changes) if changes.is_empty() => line(format_args!("unchanged: {what}")),
        Some(changes) => line(format_args!("changed: {}: {}", spec.id, changes.join(", "))),
    }?;
    note_files_win(client, |row| row.key == format!("expose.{}", spec.id)).await;
    if let Some(what) = missing(&spec.to).await {
        let to = &spec.to;
        note(format_args!("nothing {what} at {to} yet; callers are refused until it does"));
    }
    Ok(Exit::Ok)
}

/// The agent refuses these, too, but knows nothing of flags.
fn check_limits(Capacity { soft, hard }: Capacity) -> Result<(), Failure> {
    match soft.zip(hard) {
        Some((soft, hard)) if soft > hard => Err(Failure::usage(format!(
            "--soft-limit {soft} is above --hard-limit {hard}: expected at most {hard}"
        ))),
        _ => Ok(()),
    }
}

/// What nothing does where an instance should be; `None` when it accepts a connection.
async fn missing(target: &Target) -> Option<&'static str> {
    let connect = async {
        match target {
            Target::Tcp(address) => TcpStream::connect(address).await.map(drop),
            Target::Unix(path) => UnixStream::connect(path).await.map(drop),
        }
    };
    match timeout(PROBE_TIME_MAX, connect).await {
        Ok(Ok(())) => None,
        Ok(Err(_)) => Some("listens"),
        Err(_) => Some("answers"),
    }
}

async fn list_exposed(client: &Client, listing: Listing) -> Outcome {
    show(listing, || async move {
        let rows: Vec<ExposeSpec> = client.get("/v1/mesh/expose").await?;
        let hint = "this machine offers nothing yet\n  try: murmesh expose web 127.0.0.1:8080";
        Drawing::of(&rows, listing, exposed_table, hint)
    })
    .await
}

fn exposed_table(rows: &[ExposeSpec]) -> String {
    let head = [
        "ID",
        "SERVICE",
        "TO",
        "PORT",
        "PROTOCOL",
        "WEIGHT",
        "LIMITS",
        "TAGS",
        "HEALTH",
        "IDEMPOTENT",
    ];
    let mut grid = Grid::new(head);
    for spec in rows {
        let checks: Vec<_> = spec.checks.iter().map(CheckSpec::details).collect();
        let Capacity { soft, hard } = spec.inflight;
        let limits = [("soft", soft), ("hard", hard)];
        let limits = limits.map(|(word, limit)| limit.map(|limit| format!("{word} {limit}")));
        let limits: Vec<_> = limits.into_iter().flatten().collect();
        let idempotent: Vec<_> = spec.idempotent.iter().map(RequestPattern::as_str).collect();
        grid.row([
            cell(&spec.id),
            cell(&spec.service),
            cell(&spec.to),
            cell(spec.port),
            cell(spec.protocol),
            cell(spec.weight.0),
            cell(or_dash(&limits.join(", "))),
            cell(or_dash(&spec.tags.join(","))),
            cell(or_dash(&checks.join("; "))),
            cell(or_dash(&idempotent.join(", "))),
        ]);
    }
    grid.finish(&[3, 5])
}

/// Takes an instance back, and waits until it is empty if that is asked for.
pub(super) async fn unexpose(global: &Global, args: UnexposeArgs) -> Outcome {
    let client = Client::new(global)?;
    client.act(Method::DELETE, &format!("/v1/mesh/expose/{}", encoded(args.id.as_str()))).await?;
    line(format_args!("{} is no longer offered", args.id))?;
    note_files_win(&client, |row| row.key == format!("expose.{}", args.id)).await;
    let time = args.timeout.unwrap_or_default();
    let Some(open) = until_empty(&client, Some(&args.id), time, |_| Ok(())).await? else {
        return Ok(Exit::Ok);
    };
    let way_on = format!("murmesh wait {} --for empty", args.id);
    if args.timeout.is_none() {
        note(format_args!("{open} still open, and may end\n  try: {way_on}"));
        return Ok(Exit::Ok);
    }
    let time = humantime::format_duration(time);
    let message = format!("after {time} {open} still open; nothing new is taken");
    Err(Failure::new(Exit::TimedOut, message).hint(way_on))
}

/// Opens or closes a local entry, or lists the open ones.
pub(super) async fn upstream(global: &Global, args: UpstreamArgs) -> Outcome {
    let client = &Client::new(global)?;
    let Some(service) = args.service else {
        return list_upstreams(client, args.listing).await;
    };
    if args.off {
        let query = match &args.listen {
            Some(listen) => format!("listen={}", encoded(&listen.to_string())),
            None => format!("service={}", encoded(service.as_str())),
        };
        let path = format!("/v1/mesh/upstream?{query}");
        let closed: Vec<UpstreamSpec> = client.change(Method::DELETE, &path, &json!({})).await?;
        for spec in closed {
            line(format_args!("{} is closed", spec.listen))?;
        }
        note_files_win(client, |row| row.key == format!("upstream.{service}")).await;
        return Ok(Exit::Ok);
    }
    let Some(listen) = args.listen else {
        let message = format!("where shall '{service}' listen?");
        return Err(
            Failure::usage(message).hint(format!("murmesh upstream {service} 127.0.0.1:5432"))
        );
    };
    let (balance, prefer) = (args.balance.unwrap_or_default(), args.prefer.unwrap_or_default());
    match balancing_fault(balance, prefer, args.hash.as_ref()) {
        Some(("hash", _)) => {
            return Err(Failure::usage("--hash means nothing without --balance maglev"));
        }
        Some(_) => {
            let message =
                "--prefer means nothing with --balance maglev: the key says where calls go";
            return Err(Failure::usage(message));
        }
        None => {}
    }
    let spec =
        UpstreamSpec { balance, prefer, hash: args.hash, ..UpstreamSpec::new(service, listen) };
    let spec: UpstreamSpec = client.change(Method::POST, "/v1/mesh/upstream", &spec).await?;
    line(format_args!("{} is at {}", spec.service, spec.listen))?;
    let services: Vec<Service> = client.get("/v1/mesh/services").await?;
    if !services.iter().any(|row| row.name == spec.service.as_str() && row.ready > 0) {
        note(format_args!("nobody offers '{}' yet; callers are refused until then", spec.service));
    }
    Ok(Exit::Ok)
}

async fn list_upstreams(client: &Client, listing: Listing) -> Outcome {
    show(listing, || async move {
        let rows: Vec<UpstreamSpec> = client.get("/v1/mesh/upstream").await?;
        let hint = "no upstream is open\n  try: murmesh upstream db 127.0.0.1:5432";
        Drawing::of(&rows, listing, upstream_table, hint)
    })
    .await
}

fn upstream_table(rows: &[UpstreamSpec]) -> String {
    let mut grid = Grid::new(["SERVICE", "LISTEN", "BALANCE", "PREFER", "BREAKER"]);
    for spec in rows {
        let balance = match &spec.hash {
            Some(key) => format!("{} by {}", spec.balance.as_str(), String::from(key.clone())),
            None => spec.balance.as_str().to_owned(),
        };
        let prefer: Vec<_> = spec.prefer.tiers().map(Near::as_str).collect();
        let breaker = spec.breaker.summary();
        grid.row([
            cell(&spec.service),
            cell(&spec.listen),
            cell(balance),
            cell(if prefer.is_empty() { "any".to_owned() } else { prefer.join(",") }),
            cell(if breaker.is_empty() { "as usual" } else { &breaker }),
        ]);
    }
    grid.finish(&[])
}

/// Says goodbye for good.
pub(super) async fn leave(global: &Global) -> Outcome {
    let client = Client::new(global)?;
    let issuer = own_issuer(&client).await;
    let left = client.change::<Value>(Method::PUT, "/v1/agent/leave", &json!({})).await;
    if let Err(failure) = left {
        return match (failure.exit, client.data_dir()) {
            (Exit::NoAgent, Some(dir)) if has_left(dir) => {
                line(format_args!("unchanged: {} has left its mesh", dir.path().display()))?;
                Ok(Exit::Ok)
            }
            (Exit::NoAgent, _) => Err(failure.hint(
                "murmesh agent, then again: a running agent says the goodbye; to others this \
                 machine is down until then",
            )),
            _ => Err(failure),
        };
    }
    line("this machine leaves its mesh for good; the agent drains and ends")?;
    if let Some(dir) = client.data_dir() {
        note(format_args!("no agent starts here until '{}' brings it back", way_back(dir)));
    }
    if let Some(name) = issuer {
        note(format_args!(
            "it stays trusted as an issuer, and so does whoever has its issuer.key\n  \
             try: murmesh issuer remove {name} --root-key FILE, on another issuer"
        ));
    }
    Ok(Exit::Ok)
}

/// What this member is called, if it is an issuer.
async fn own_issuer(client: &Client) -> Option<String> {
    let me = client.data_dir()?.credentials().ok()?.member_id();
    let rows: Vec<IssuerRow> = client.get("/v1/mesh/issuers").await.ok()?;
    rows.into_iter().find(|row| row.active && row.member == me).map(|row| row.node)
}
