//! `ping` and `routes`: whether a call is taken, and what would become of one.

use std::time::Duration;

use clap::Args;

use super::Global;
use super::client::{Client, encoded};
use super::exit::{Exit, Outcome};
use super::output::{Drawing, Grid, Listing, age, breaker, cell, or_dash, show, state};
use crate::api::breakers::{BreakerRow, EvidenceRow};
use crate::api::calls::{PingRow, RouteInstance, RouteRow};
use crate::model::ServiceName;

/// Arguments of `ping`.
#[derive(Debug, Args)]
pub(super) struct PingArgs {
    /// Which service
    service: ServiceName,
    #[command(flatten)]
    listing: Listing,
}

const BREAKERS_HELP: &str = "\
BREAKER   open keeps calls away, half_open tries, closed lets through
BY        whose word it is: 'mesh' that of all callers, 'only here' that of this machine's calls, 'its
          agent' that of its checks
SINCE     for how long, relapses included
NEXT TRY  when a call is to try it; 'the next call' where the pause is over
FAILED/CALLS  what each caller counts: its calls of the last 10 s (or 'breaker.window'), from the first
          failure on while failures outweigh; '1/1' after 'its last 3 calls failed' says that two of the
          three are older";

/// Arguments of `breakers`.
#[derive(Debug, Args)]
#[command(after_help = BREAKERS_HELP)]
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

/// Who says of which instance that it fails, since when, and until when.
pub(super) async fn breakers(global: &Global, args: BreakersArgs) -> Outcome {
    let client = &Client::new(global)?;
    let listing = args.listing;
    show(listing, || async move {
        let rows: Vec<BreakerRow> = client.get("/v1/mesh/breakers").await?;
        let hint = "no breaker is open, and no call from here has failed of late";
        Drawing::of(&rows, listing, breaker_table, hint)
    })
    .await
}

fn breaker_table(rows: &[BreakerRow]) -> String {
    let head = [
        "SERVICE",
        "INSTANCE",
        "NODE",
        "BREAKER",
        "BY",
        "SINCE",
        "NEXT TRY",
        "WHY",
        "FAILED/CALLS BY CALLER",
    ];
    let mut grid = Grid::new(head);
    for row in rows {
        let since = row.since_ms.map(|ms| age(Duration::from_millis(ms)));
        grid.row([
            cell(&row.service),
            cell(&row.instance),
            cell(&row.node),
            breaker(&row.state),
            cell(by(&row.source)),
            cell(since.unwrap_or_else(|| "-".to_owned())),
            cell(next_try(row)),
            cell(or_dash(&row.why)),
            cell(or_dash(&seen(&row.evidence))),
        ]);
    }
    grid.finish(&[5])
}

/// Whose word a breaker follows.
fn by(source: &str) -> &str {
    match source {
        "local" => "only here",
        "owner" => "its agent",
        other => other,
    }
}

/// When somebody calls the instance again.
fn next_try(row: &BreakerRow) -> String {
    match (row.state.as_str(), row.source.as_str(), row.until_ms) {
        ("open", "owner", _) => "once its checks pass".to_owned(),
        ("open", _, None | Some(0)) => "the next call".to_owned(),
        ("open", _, Some(ms)) => format!("in {}", age(Duration::from_millis(ms + 999))),
        ("half_open", ..) => "its share grows".to_owned(),
        _ => "-".to_owned(),
    }
}

/// Callers that the table names for one row; `--json` has all.
const SEEN_MAX: usize = 4;

/// What callers saw, accusers first: `a 7/7, c 6/6, e 0/20 (rebuts)`.
fn seen(evidence: &[EvidenceRow]) -> String {
    let mut rows: Vec<_> = evidence.iter().collect();
    let accuses = |row: &EvidenceRow| matches!(row.weight.as_str(), "own" | "accuses");
    rows.sort_by_key(|row| (!accuses(row), std::cmp::Reverse(row.failures)));
    let told = rows.iter().take(SEEN_MAX).map(|row| {
        let EvidenceRow { caller, samples, failures, weight, .. } = row;
        match accuses(row) {
            true => format!("{caller} {failures}/{samples}"),
            false => format!("{caller} {failures}/{samples} ({weight})"),
        }
    });
    let mut told: Vec<_> = told.collect();
    if let Some(more) = rows.len().checked_sub(SEEN_MAX).filter(|more| *more > 0) {
        told.push(format!("{more} more (--json)"));
    }
    told.join(", ")
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
        let takes = |row: &RouteRow| {
            row.refused.is_none() && row.entries.iter().all(|entry| entry.refused.is_none())
        };
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
        text += &format!(", by {}", entry.balance);
        if !entry.prefer.is_empty() {
            text += &format!(" from {}", entry.prefer.join(", "));
        }
        text += "\n";
        if (&entry.refused, &entry.instances) != (&row.refused, &row.instances) {
            text += &destinations("    ", &entry.refused, &entry.instances);
            text += "\n";
        }
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
    text + &destinations("  ", &row.refused, &row.instances)
}

/// Where calls go, or why they are refused.
fn destinations(indent: &str, refused: &Option<String>, instances: &[RouteInstance]) -> String {
    let refused = refused.as_ref().map(|why| format!("{indent}refused now: {why}\n"));
    let first = format!("{indent}INSTANCE");
    let mut grid = Grid::new([first.as_str(), "NODE", "STATE", "SHARE", "WHY"]);
    for instance in instances {
        grid.row([
            cell(format!("{indent}{}", instance.instance)),
            cell(&instance.node),
            state(&instance.state),
            cell(format!("{:.1} %", instance.share)),
            cell(or_dash(&instance.reason)),
        ]);
    }
    refused.unwrap_or_default() + &grid.finish(&[3])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(caller: &str, failures: u16, samples: u16, weight: &str) -> EvidenceRow {
        EvidenceRow {
            caller: caller.to_owned(),
            samples,
            failures,
            weight: weight.to_owned(),
            age_ms: 0,
            last_failure_ms: None,
            last_success_ms: None,
        }
    }

    #[test]
    fn breaker_table_says_why_an_instance_is_out_who_says_so_and_until_when() {
        let row = BreakerRow {
            service: "web".to_owned(),
            instance: "sick".to_owned(),
            node: "b".to_owned(),
            caller: "a".to_owned(),
            state: "open".to_owned(),
            source: "mesh".to_owned(),
            reason: "2 of 3 callers saw 13 failures".to_owned(),
            why: "2 of 3 callers saw 13 failures".to_owned(),
            evidence: vec![
                told("e", 0, 20, "rebuts"),
                told("a", 6, 6, "accuses"),
                told("c", 7, 7, "accuses"),
            ],
            since_ms: Some(12_300),
            until_ms: Some(2_100),
        };
        let table = breaker_table(&[row]);
        assert_eq!(
            table.lines().nth(1).unwrap(),
            "web      sick      b     open     mesh    12s  in 3s     2 of 3 callers saw 13 \
             failures  c 7/7, a 6/6, e 0/20 (rebuts)"
        );
    }

    #[test]
    fn evidence_of_many_callers_stays_on_one_line() {
        let many: Vec<_> = (0..30).map(|n| told(&format!("n{n}"), n, 30, "accuses")).collect();
        assert_eq!(seen(&many), "n29 29/30, n28 28/30, n27 27/30, n26 26/30, 26 more (--json)");
    }
}
