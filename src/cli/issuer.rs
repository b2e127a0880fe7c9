//! `issuer`: who may let members in and renew their certificates. The root key signs here, on the
//! command line; agents only carry what it signed. `grant`: what an issuer lets a member offer.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use clap::{Args, Subcommand};
use hyper::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::Global;
use super::client::{Client, encoded};
use super::exit::{Exit, Failure, Outcome};
use super::found::{open_dir, store_failure};
use super::output::{Drawing, Grid, Listing, cell, count, line, note, show, state};
use crate::api::views::{InviteRow, IssuerRow, IssuingKey, KeptMember};
use crate::api::{GrantRequest, KeepRequest};
use crate::model::{Entry, Issuer, MemberName, ServiceName};
use crate::tls::Root;
use crate::tls::store::{self, StoreError};

/// How often it is looked whether the newcomer is there.
const NEWCOMER_INTERVAL: Duration = Duration::from_millis(500);

/// Verbs of `issuer`.
#[derive(Debug, Subcommand)]
pub(super) enum IssuerVerb {
    /// Let a member issue: it admits newcomers and renews certificates from now on
    Add(IssuerArgs),
    /// List the issuers
    List(Listing),
    /// Take it back; run it on another issuer, which vouches for the members that it let in
    Remove(RemoveArgs),
}

/// Arguments of `issuer add`.
#[derive(Debug, Args)]
pub(super) struct IssuerArgs {
    /// Which member, by its name or id
    node: MemberName,
    /// The root key of the mesh [default: root.key in the data directory]
    #[arg(long, value_name = "FILE", env = "MURMESH_ROOT_KEY", hide_env_values = true)]
    root_key: Option<PathBuf>,
}

/// Arguments of `issuer remove`.
#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    #[command(flatten)]
    issuer: IssuerArgs,
    /// A member that it let in and that goes with it, by its name or id; may be repeated
    #[arg(long = "drop", value_name = "NODE")]
    dropped: Vec<MemberName>,
}

/// Arguments of `grant`.
#[derive(Debug, Args)]
pub(super) struct GrantArgs {
    /// Which member, by its name or id
    node: MemberName,
    /// The only services that it may offer
    #[arg(long, value_delimiter = ',', value_name = "web,db", required_unless_present = "all")]
    services: Option<Vec<ServiceName>>,
    /// It may offer every service
    #[arg(long, conflicts_with = "services")]
    all: bool,
}

#[derive(Debug, Deserialize)]
struct Granted {
    withdrawn: Vec<String>,
}

/// Says what a member may offer. Issuers only.
pub(super) async fn grant(global: &Global, args: GrantArgs) -> Outcome {
    let client = Client::new(global)?;
    let request = GrantRequest { node: args.node.clone(), services: args.services };
    let granted: Granted = client.change(Method::POST, "/v1/mesh/grants", &request).await?;
    let what = request.services.map_or("every service".to_owned(), |services| {
        services.iter().map(ServiceName::as_str).collect::<Vec<_>>().join(", ")
    });
    line(format_args!("{} may offer {what}", args.node))?;
    if !granted.withdrawn.is_empty() {
        let withdrawn = granted.withdrawn.join(", ");
        line(format_args!("withdrawn until it may offer them again: {withdrawn}"))?;
    }
    Ok(Exit::Ok)
}

/// Makes issuers, lists them, takes them back.
pub(super) async fn issuer(global: &Global, verb: IssuerVerb) -> Outcome {
    match verb {
        IssuerVerb::Add(args) => add(global, args).await,
        IssuerVerb::Remove(args) => remove(global, args).await,
        IssuerVerb::List(listing) => list(global, listing).await,
    }
}

async fn list(global: &Global, listing: Listing) -> Outcome {
    let client = &Client::new(global)?;
    show(listing, || async move {
        let rows = issuers(client).await?;
        Drawing::of(&rows, listing, table, "no issuer is known here yet")
    })
    .await
}

fn table(rows: &[IssuerRow]) -> String {
    let mut grid = Grid::new(["NODE", "STATE", "MEMBERS", "KEY"]);
    for row in rows {
        grid.row([
            cell(&row.node),
            state(if row.active { &row.state } else { "removed" }),
            cell(row.members),
            cell(row.id.get(..12).unwrap_or(&row.id)),
        ]);
    }
    let mut told = grid.finish(&[2]);
    for row in rows.iter().filter(|row| row.active && row.state == "replaced") {
        told += &format!(
            "\n{} was replaced, and its issuing key is still believed: murmesh issuer remove {} \
             --root-key FILE\n",
            row.node, row.node
        );
    }
    told
}

async fn issuers(client: &Client) -> Result<Vec<IssuerRow>, Failure> {
    client.get("/v1/mesh/issuers").await
}

async fn add(global: &Global, args: IssuerArgs) -> Outcome {
    let (root, client) = (root(global, args.root_key)?, Client::new(global)?);
    let node = args.node.as_str();
    match appoint(&client, &root, node).await? {
        Appointed::Now => line(format_args!("{node} is an issuer from now on"))?,
        Appointed::Before => line(format_args!("unchanged: {node} is an issuer"))?,
    };
    Ok(Exit::Ok)
}

enum Appointed {
    Now,
    Before,
}

/// Lets a member, given by its name or id, issue from now on.
async fn appoint(client: &Client, root: &Root, node: &str) -> Result<Appointed, Failure> {
    let rows = issuers(client).await?;
    if rows.iter().any(|row| row.active && is_of(row, node)) {
        return Ok(Appointed::Before);
    }
    let path = format!("/v1/mesh/issuers/{}/key", encoded(node));
    let made: IssuingKey = client.change(Method::POST, &path, &json!({})).await?;
    if rows.iter().any(|row| row.key == made.key) {
        // Believed again, it would bring back all that was ever signed with it.
        let text = format!("{node} has not heard yet that its issuing key was taken back");
        return Err(
            Failure::failed(text).hint("try again in some seconds: it then makes a new one")
        );
    }
    let entry = root.appoint(&made.key, made.member).map_err(Failure::failed)?;
    publish(client, &entry).await?;
    Ok(Appointed::Now)
}

/// Waits until somebody has come by the invite with this id and its agent runs, and makes it an issuer.
/// The newcomer makes its issuing key itself, so that no secret but the token travels, and nobody can
/// sign for a key that is not there yet.
pub(super) async fn appoint_newcomer(
    client: &Client,
    root: &Root,
    invite: &str,
    ttl: Duration,
) -> Outcome {
    let mut last = "nobody came".to_owned();
    let appointed = timeout(ttl, async {
        loop {
            let rows: Vec<InviteRow> = client.get_secret("/v1/mesh/invites").await?;
            let row = rows.into_iter().find(|row| row.id == invite);
            if let Some(member) = row.and_then(|row| row.members.into_iter().next()) {
                match appoint(client, root, &member).await {
                    Ok(_) => return Ok(member),
                    Err(failure) if failure.exit == Exit::NoAgent => return Err(failure),
                    Err(failure) => last = failure.message, // its agent does not run yet
                }
            }
            sleep(NEWCOMER_INTERVAL).await;
        }
    });
    match appointed.await {
        Ok(appointed) => {
            line(format_args!("member {} is an issuer from now on", appointed?))?;
            Ok(Exit::Ok)
        }
        Err(_) => Err(Failure::new(Exit::TimedOut, format!("nobody was made an issuer: {last}"))
            .hint("murmesh issuer add NODE, once its agent runs")),
    }
}

async fn remove(global: &Global, args: RemoveArgs) -> Outcome {
    let RemoveArgs { issuer: args, dropped } = args;
    let (root, client) = (root(global, args.root_key)?, Client::new(global)?);
    let node = args.node.as_str();
    let rows = issuers(&client).await?;
    let (theirs, others): (Vec<_>, Vec<_>) =
        rows.into_iter().filter(|row| row.active).partition(|row| is_of(row, node));
    if theirs.is_empty() {
        line(format_args!("unchanged: {node} is no issuer"))?;
        return Ok(Exit::Ok);
    }
    if others.is_empty() {
        let text = format!("{node} is the last issuer: without one no certificate can be renewed");
        return Err(Failure::failed(text).hint("murmesh issuer add OTHER"));
    }
    let mut out = Vec::new();
    for row in theirs {
        let path = format!("/v1/mesh/issuers/{}/keep", encoded(&row.id));
        let request = KeepRequest { drop: dropped.clone() };
        let kept: Vec<KeptMember> = client
            .change(Method::POST, &path, &request)
            .await
            .map_err(|failure| failure.hint(format_args!("run this on {}", others[0].node)))?;
        let (kept, gone): (Vec<_>, Vec<_>) = kept.into_iter().partition(|member| member.stays);
        let ids = |members: &[KeptMember]| members.iter().map(|member| member.member).collect();
        let dismissed = root.dismiss(&issuer_of(&row)?, row.epoch, ids(&kept), ids(&gone));
        publish(&client, &dismissed.map_err(Failure::failed)?).await?;
        let names: Vec<_> =
            kept.into_iter().filter_map(|kept| Some(kept.name?.to_string())).collect();
        if !names.is_empty() {
            let what = count(names.len(), "member");
            note(format_args!("{what} let in by {node} stay: {}", names.join(", ")));
        }
        out.extend(gone.into_iter().map(|KeptMember { member, name, .. }| match name {
            Some(name) => format!("{name} ({member})"),
            None => format!("{member}, whose place one of them had taken"),
        }));
    }
    line(format_args!("{node} issues nothing any more"))?;
    if !out.is_empty() {
        line(format_args!("nobody believes any more: {}", out.join(", ")))?;
    }
    Ok(Exit::Ok)
}

/// Whether `node` may mean the member of an issuer: by its name, its id, or as listings show that.
fn is_of(row: &IssuerRow, node: &str) -> bool {
    let (member, key) = (row.member.to_string(), &row.id);
    row.node == node || [&member, key].iter().any(|id| *id == node || id.get(..12) == Some(node))
}

fn issuer_of(row: &IssuerRow) -> Result<Issuer, Failure> {
    let certificate = BASE64_STANDARD.decode(&row.certificate).map_err(Failure::failed)?;
    let (kept, dropped) = (Vec::new(), Vec::new());
    Ok(Issuer { key: row.key, member: row.member, certificate, is_active: true, kept, dropped })
}

async fn publish(client: &Client, entry: &Entry) -> Result<(), Failure> {
    let body = json!({ "entry": BASE64_STANDARD.encode(entry.bytes()) });
    client.change::<Value>(Method::POST, "/v1/mesh/entries", &body).await.map(drop)
}

/// The root key, from where it is kept.
pub(super) fn root(global: &Global, file: Option<PathBuf>) -> Result<Root, Failure> {
    let dir = open_dir(global)?;
    let path = file.unwrap_or_else(|| dir.file("root.key"));
    let found = dir.genesis().map_err(store_failure)?;
    let empty = || store_failure(StoreError::Empty { path: dir.path().to_owned() });
    let (mesh, genesis) = found.ok_or_else(empty)?;
    let key = store::read_key(&path).map_err(store_failure)?.ok_or_else(|| {
        let text = format!("there is no root key at {}", path.display());
        Failure::new(Exit::NotPermitted, text).hint("--root-key FILE, wherever you keep it")
    })?;
    Root::new(mesh, &genesis, key)
        .map_err(|error| Failure::new(Exit::NotPermitted, format!("{}: {error}", path.display())))
}
