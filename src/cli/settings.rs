//! `validate`, `config dump`: what the agent reads, and what holds.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::Value;

use super::Global;
use super::client::Client;
use super::exit::{Exit, Failure, Outcome};
use super::output::{Drawing, Grid, Listing, cell, line, note, show};
use crate::api::SettingView;
use crate::config::{Setting, Settings, validate as validate_file};
use crate::runtime::clock::unix_millis;
use crate::telemetry::AccessTarget;
use crate::tls::public::PublicCertificates;

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

/// Checks a file and tells all its faults; what it names and this machine does not have is only warned of.
pub(super) fn validate(args: &ValidateArgs) -> Outcome {
    let settings = validate_file(&args.file).map_err(Failure::failed)?;
    line(format_args!("{} is valid", args.file.display()))?;
    let missing = missing(&settings);
    for warning in &missing {
        note(format_args!("on this machine: {warning}"));
    }
    Ok(if missing.is_empty() { Exit::Ok } else { Exit::Warning })
}

/// What an agent on this machine would start without, or not start without.
fn missing(settings: &Settings) -> Vec<String> {
    let Setting { value: files, origin } = &settings.certificates;
    let certificates = PublicCertificates::default();
    let faults = certificates.read(files).refused;
    let loaded = certificates.used();
    let mut missing: Vec<_> =
        faults.iter().map(|fault| format!("gateway.certificates ({origin}): {fault}")).collect();
    let now = unix_millis() / 1_000;
    for ended in loaded.certificates.iter().filter(|one| one.not_after <= now) {
        let path = ended.files.cert.display();
        missing.push(format!("gateway.certificates ({origin}): {path}: has ended"));
    }
    for Setting { value, origin } in &settings.publics {
        let bare = value.hosts.iter().filter(|host| !loaded.has(host));
        missing.extend(bare.map(|host| {
            format!("upstream.hosts ({origin}): no certificate is for {host}, so its clients are refused")
        }));
    }
    let Setting { value: log, origin } = &settings.access_log;
    if let Some(AccessTarget::File(path)) = log
        && !path.parent().is_some_and(Path::is_dir)
    {
        let path = path.display();
        missing
            .push(format!("telemetry.access_log ({origin}): {path}: its directory is not there"));
    }
    missing
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
