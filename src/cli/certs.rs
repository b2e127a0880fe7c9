//! `certs`: who proves what with which certificate, and until when.

use std::time::Duration;

use clap::Args;

use super::Global;
use super::client::{Client, encoded};
use super::duration;
use super::exit::Outcome;
use super::output::{Drawing, Grid, Listing, age, cell, or_dash, show};
use crate::api::views::CertRow;
use crate::runtime::clock;

/// Arguments of `certs`.
#[derive(Debug, Args)]
pub(super) struct CertsArgs {
    /// Also those of all other members, as their enrolments say
    #[arg(long)]
    all: bool,
    /// Only those that end within this time, or have ended
    #[arg(long, value_name = "TIME", value_parser = duration)]
    expiring: Option<Duration>,
    #[command(flatten)]
    listing: Listing,
}

/// Lists certificates, the soonest to end first.
pub(super) async fn certs(global: &Global, args: CertsArgs) -> Outcome {
    let client = &Client::new(global)?;
    let mut path = format!("/v1/mesh/certs?all={}", args.all);
    if let Some(within) = args.expiring {
        let within = humantime::format_duration(within).to_string();
        path += &format!("&expiring={}", encoded(&within));
    }
    let (path, listing) = (&path, args.listing);
    show(listing, || async move {
        let rows: Vec<CertRow> = client.get(path).await?;
        Drawing::of(&rows, listing, table, "no certificate ends that soon")
    })
    .await
}

fn table(rows: &[CertRow]) -> String {
    let mut grid = Grid::new(["NODE", "KIND", "ENDS IN", "RENEWED IN", "SERIAL", "KEY", "ISSUER"]);
    let now = clock::unix_seconds();
    let short = |hash: &str| hash.get(..12).unwrap_or(hash).to_owned();
    let until = |at: u64| match at.checked_sub(now) {
        Some(left) => age(Duration::from_secs(left)),
        None => format!("{} ago", age(Duration::from_secs(now - at))),
    };
    for row in rows {
        grid.row([
            cell(or_dash(&row.node)),
            cell(&row.kind),
            cell(until(row.not_after)),
            cell(row.renews_at.map_or("-".to_owned(), until)),
            cell(short(&row.serial)),
            cell(short(&row.key_hash)),
            cell(short(&row.issuer)),
        ]);
    }
    grid.finish(&[])
}
