//! `ping` and `routes`: whether a call is taken, and what would become of one.

use std::time::Duration;

use clap::Args;

use super::Global;
use super::client::{Client, encoded};
use super::exit::{Exit, Outcome};
use super::output::{Drawing, Grid, Listing, cell, or_dash, show, state};
use crate::api::breakers::BreakerRow;
use crate::api::calls::{PingRow, RouteRow};
use crate::model::ServiceName;

/// Arguments of `ping`.
#[derive(Debug, Args)]
pub(super) struct PingArgs {
    /// Which service
    service: ServiceName,
    #[command(flatten)]
    listing: Listing,
}

/// Arguments of `breakers`.
#[derive(Debug, Args)]
pub(super) struct BreakersArgs {
    #[command(flatten)]
    listing: Listing,
}

/// Arguments of `routes`.
#[derive(Debug, Args)]
pub(super) struct RoutesArgs {
    /// Which service; all unless named
    service: Option<ServiceName>,
    /// Of a request: GET
    #[arg(requires_all = ["service", "path"])]
    method: Option<String>,
    /// Of a request: /items/7
    path: Option<String>,
    #[command(flatten)]
    listing: Listing,
}

/// Calls every instance of a service once.
pub(super) async fn ping(global: &Global, args: PingArgs) -> Outcome {
    let client = &Client::new(global)?;
    let (service, listing) = (&args.service, args.listing);
    show(listing, || async move {
        let path = format!("/v1/mesh/ping/{}", encoded(service.as_str()));
        let rows: Vec<PingRow> = client.get(&path).await?;
        let hint = format!("nobody offers '{service}'\n  try: murmesh services");
        let all_well = !rows.is_empty() && rows.iter().all(|row| row.ok);
        let exit = if all_well { Exit::Ok } else { Exit::Warning };
        Ok(Drawing { exit, ..Drawing::of(&rows, listing, ping_table, hint)? })
    })
    .await
}

fn ping_table(rows: &[PingRow]) -> String {
    let mut grid = Grid::new(["INSTANCE", "NODE", "RESULT", "CONNECT"]);
    for row in rows {
        let time = row.connect_ms.map_or("-".to_owned(), |time| format!("{time:.3} ms"));
        let word = if row.ok { "ok" } else { &row.reason };
        grid.row([cell(&row.instance), cell(&row.node), state(word), cell(time)]);
    }
    grid.finish(&[3])
}

/// Whom calls avoid, by whose word and why.
pub(super) async fn breakers(global: &Global, args: BreakersArgs) -> Outcome {
    let client = &Client::new(global)?;
    let listing = args.listing;
    show(listing, || async move {
        let rows: Vec<BreakerRow> = client.get("/v1/mesh/breakers").await?;
        Drawing::of(&rows, listing, breaker_table, "every instance is called as usual")
    })
    .await
}

fn breaker_table(rows: &[BreakerRow]) -> String {
    let mut grid =
        Grid::new(["SERVICE", "INSTANCE", "NODE", "STATE", "SOURCE", "REASON", "FAILED", "SINCE"]);
    for row in rows {
        let failed = row.evidence.iter().map(|seen| u32::from(seen.failures)).sum::<u32>();
        let samples = row.evidence.iter().map(|seen| u32::from(seen.samples)).sum::<u32>();
        let since = row.since_ms.map(|ms| Duration::from_secs(ms / 1_000));
        grid.row([
            cell(&row.service),
            cell(&row.instance),
            cell(&row.node),
            state(&row.state),
            cell(&row.source),
            cell(or_dash(&row.reason)),
            cell(format!("{failed} of {samples}")),
            cell(
                since.map_or("-".to_owned(), |since| humantime::format_duration(since).to_string()),
            ),
        ]);
    }
    grid.finish(&[6, 7])
}

/// What would happen to a call.
pub(super) async fn routes(global: &Global, args: RoutesArgs) -> Outcome {
    let client = &Client::new(global)?;
    let listing = args.listing;
    let mut query = Vec::new();
    for (key, value) in [
        ("service", args.service.as_ref().map(ToString::to_string)),
        ("method", args.method.clone()),
        ("path", args.path.clone()),
    ] {
        query.extend(value.map(|value| format!("{key}={}", encoded(&value))));
    }
    let path = &format!("/v1/mesh/routes?{}", query.join("&"));
    show(listing, || async move {
        let rows: Vec<RouteRow> = client.get(path).await?;
        let hint = "no such service\n  try: murmesh services".to_owned();
        let takes = |row: &RouteRow| row.instances.iter().any(|instance| instance.share > 0.0);
        let all_well = !rows.is_empty() && rows.iter().all(takes);
        let exit = if all_well { Exit::Ok } else { Exit::Warning };
        Ok(Drawing { exit, ..Drawing::of(&rows, listing, route_text, hint)? })
    })
    .await
}

fn route_text(rows: &[RouteRow]) -> String {
    rows.iter().map(one_route).collect::<Vec<_>>().join("\n")
}

fn one_route(row: &RouteRow) -> String {
    let what = if row.protocol == "tcp" { "connection" } else { "request" };
    let mut text = format!("{} ({}): a decision for each {what}\n", row.service, row.protocol);
    for entry in &row.entries {
        let span = |millis| humantime::format_duration(Duration::from_millis(millis)).to_string();
        text += &format!("  entry {}: connect within {}", entry.listen, span(entry.connect_ms));
        if row.protocol != "tcp" {
            let whole = entry.request_ms.map_or("any time".to_owned(), span);
            text += &format!(", answer within {whole}, silence up to {}", span(entry.idle_ms));
            text += &format!(", at most {} instances", entry.tries);
        }
        text += "\n";
    }
    if row.protocol != "tcp" {
        text += &match &row.idempotent[..] {
            [] => "  nothing is declared idempotent (expose --idempotent)\n".to_owned(),
            declared => format!("  declared idempotent: {}\n", declared.join(", ")),
        };
    }
    if let Some(repeatable) = row.repeatable {
        let word = if repeatable { "may" } else { "may not" };
        text += &format!("  this request {word} be sent again once an instance had it\n");
    }
    let mut grid = Grid::new(["  INSTANCE", "NODE", "STATE", "SHARE", "AVOIDED"]);
    for instance in &row.instances {
        grid.row([
            cell(format!("  {}", instance.instance)),
            cell(&instance.node),
            state(&instance.state),
            cell(format!("{:.1} %", instance.share)),
            cell(or_dash(&instance.avoided)),
        ]);
    }
    text + &grid.finish(&[3])
}
