//! `validate`, `config dump`: what the agent reads, and what holds.

use std::path::PathBuf;
use std::slice;

use clap::{Args, Subcommand};
use serde_json::Value;

use super::Global;
use super::client::Client;
use super::exit::{Exit, Failure, Outcome};
use super::output::{Drawing, Grid, Listing, cell, line, show};
use crate::api::SettingView;
use crate::config::validate as validate_file;
use crate::tls::public::load;

/// Arguments of `validate`.
#[derive(Debug, Args)]
pub(super) struct ValidateArgs {
    /// The file to check; nothing is started or changed
    file: PathBuf,
}

/// Verbs of `config`.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigVerb {
    /// Show every effective value of the running agent and where it came from
    Dump {
        #[command(flatten)]
        listing: Listing,
    },
}

/// Checks a file and tells all its faults, also those of the certificates that it names.
pub(super) fn validate(args: &ValidateArgs) -> Outcome {
    let settings = validate_file(&args.file).map_err(Failure::failed)?;
    let certificates = &settings.certificates.value;
    let faults = certificates.iter().filter_map(|one| load(slice::from_ref(one)).err());
    let faults: Vec<_> = faults.map(|fault| fault.to_string()).collect();
    if !faults.is_empty() {
        let file = args.file.display();
        let faults = faults.join("\n  ");
        return Err(Failure::failed(format!("{file}: gateway.certificates:\n  {faults}")));
    }
    line(format_args!("{} is valid", args.file.display()))?;
    Ok(Exit::Ok)
}

/// Shows what holds.
pub(super) async fn config(global: &Global, verb: ConfigVerb) -> Outcome {
    let ConfigVerb::Dump { listing } = verb;
    let client = &Client::new(global)?;
    show(listing, || async move {
        let rows: Vec<SettingView> = client.get_secret("/v1/mesh/config").await?;
        Drawing::of(&rows, listing, setting_table, "the agent tells no settings")
    })
    .await
}

fn setting_table(rows: &[SettingView]) -> String {
    // What may be long comes last: others are not padded to it.
    let mut grid = Grid::new(["KEY", "FROM", "VALUE"]);
    for row in rows {
        let value = match &row.value {
            Value::Null => "-".to_owned(),
            Value::String(text) if text.is_empty() => "-".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        grid.row([cell(&row.key), cell(&row.origin), cell(value)]);
    }
    grid.finish(&[])
}
