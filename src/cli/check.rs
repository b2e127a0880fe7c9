//! `check`, `net`: what is wrong, and the ways to other members.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::Global;
use super::client::{CONNECT_TIME_MAX, Client};
use super::exit::{Exit, Failure, Outcome};
use super::found::open_dir;
use super::output::{Drawing, Grid, Listing, age, cell, count, or_dash, show, state};
use super::run::{AgentArgs, overrides};
use crate::agent::{Runs, check_machine, not_answering, not_running};
use crate::api::views::Net;
use crate::api::{Check, CheckStatus};
use crate::config::{ConfigError, Settings, default_config, load};

/// What is a choice, not a fault: it warns, and leaves the exit code alone.
const ADVICE: &str = "open_services";

const HELP: &str = "\
Without an agent it checks this machine: directory, keys, identity, certificate, clock, port, disk.
With one it asks that agent about the mesh, too, which also connects to each instance of this machine.

Exit codes: 0 all is well, 1 something warns, 2 something fails. 'open_services' alone leaves 0: who
may call a service is a choice. JSON always has every check.";

/// Arguments of `check`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct CheckArgs {
    /// Show what passed, too
    #[arg(long)]
    all: bool,
    /// The configuration file that the agent is started with
    #[arg(short, long, value_name = "FILE", env = "MURMESH_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    listing: Listing,
}

/// Says what is wrong with this machine and its mesh.
pub(super) async fn check(global: &Global, args: CheckArgs) -> Outcome {
    let client = &Client::new(global)?;
    let (listing, is_all) = (args.listing, args.all);
    let agent = AgentArgs::with_config(args.config);
    show(listing, || async {
        let mut checks = vec![];
        let settings = load(&overrides(global, &agent));
        checks.extend(configuration(agent.config.as_ref(), settings.as_ref().err()));
        checks.extend(match client.is_answered().await {
            true => ask(client).await?,
            false => without_agent(global, client, settings.ok()).await?,
        });
        let text = match listing.json {
            true => super::output::json(&checks, listing)?,
            false => screen(&checks, is_all),
        };
        Ok(Drawing { exit: exit(&checks), ..Drawing::new(text) })
    })
    .await
}

async fn ask(client: &Client) -> Result<Vec<Check>, Failure> {
    client.get("/v1/mesh/check").await
}

/// An agent that holds the directory may be starting: it has some time to answer.
async fn without_agent(
    global: &Global,
    client: &Client,
    settings: Option<Settings>,
) -> Result<Vec<Check>, Failure> {
    let dir = open_dir(global)?;
    let mesh = settings.unwrap_or_else(|| Settings::machine(dir.clone())).mesh.value;
    let (runs, agent) = match dir.is_locked() {
        true => match ask(client).await {
            Ok(checks) => return Ok(checks),
            Err(_) => (Runs::Yes, not_answering(&dir, CONNECT_TIME_MAX)),
        },
        false => (Runs::No, not_running(&dir)),
    };
    Ok([vec![agent], check_machine(&dir, mesh, runs)].concat())
}

/// The file that the next start would read.
fn configuration(told: Option<&PathBuf>, fault: Option<&ConfigError>) -> Option<Check> {
    const ID: &str = "config";
    let file = told.cloned().or_else(|| default_config().filter(|path| path.exists()));
    let shown = file.as_ref().map(|path| path.display().to_string());
    Some(match (fault, shown) {
        (None, Some(file)) => Check::pass(ID, format!("{file} is valid")),
        (None, None) => Check::pass(ID, "there is no configuration file, and none is needed"),
        (Some(error), Some(file)) => {
            Check::fail(ID, first_lines(error), format!("murmesh validate {file}"))
        }
        // Then the data directory is damaged, which has a check of its own.
        (Some(ConfigError::DataDir(_)), None) => return None,
        (Some(error), None) => Check::fail(ID, first_lines(error), "murmesh agent --help"),
    })
}

fn first_lines(error: &ConfigError) -> String {
    let text = error.to_string();
    text.lines().map(str::trim).take(3).collect::<Vec<_>>().join("; ")
}

fn exit(checks: &[Check]) -> Exit {
    let counted =
        checks.iter().filter(|check| check.id != ADVICE || check.status == CheckStatus::Fail);
    match counted.map(|check| check.status).max() {
        Some(CheckStatus::Fail) => Exit::Failed,
        Some(CheckStatus::Warn) => Exit::Warning,
        Some(CheckStatus::Pass) | None => Exit::Ok,
    }
}

fn screen(checks: &[Check], is_all: bool) -> String {
    let number = |status| checks.iter().filter(|check| check.status == status).count();
    let (fails, warns) = (number(CheckStatus::Fail), number(CheckStatus::Warn));
    let total = format!("{}: {fails} failed, {warns} warned", count(checks.len(), "check"));
    let mut shown: Vec<_> =
        checks.iter().filter(|check| is_all || check.status != CheckStatus::Pass).collect();
    shown.sort_by_key(|check| std::cmp::Reverse(check.status));
    if shown.is_empty() {
        return total;
    }
    let mut grid = Grid::new(["CHECK", "", "WHAT"]);
    for check in shown {
        grid.row([cell(&check.id), state(check.status.as_str()), cell(&check.message)]);
        if !check.fix.is_empty() {
            grid.row([cell(""), cell(""), cell(format!("try: {}", check.fix))]);
        }
    }
    format!("{}\n{total}", grid.finish(&[]))
}

/// The ways to the other members.
pub(super) async fn net(global: &Global, listing: Listing) -> Outcome {
    let client = &Client::new(global)?;
    show(listing, || async move {
        let rows: Vec<Net> = client.get("/v1/mesh/net").await?;
        Drawing::of(&rows, listing, net_table, "no other member is known yet")
    })
    .await
}

fn net_table(rows: &[Net]) -> String {
    let mut grid =
        Grid::new(["NAME", "STATE", "ADDRESS", "DATA", "RTT", "SENT", "RECEIVED", "SINCE"]);
    for row in rows {
        let data = match (row.connected, row.silent) {
            (false, _) => "-",
            (true, true) => "silent",
            (true, false) => "open",
        };
        let rtt = row.rtt_ms.map_or(String::new(), |rtt| format!("{rtt:.1} ms"));
        let bytes = |bytes: u64| if row.connected { size(bytes) } else { "-".to_owned() };
        grid.row([
            cell(&row.name),
            state(&row.state),
            cell(&row.address),
            state(data),
            cell(or_dash(&rtt)),
            cell(bytes(row.bytes_sent)),
            cell(bytes(row.bytes_received)),
            cell(age(Duration::from_millis(row.age_ms))),
        ]);
    }
    grid.finish(&[4, 5, 6])
}

fn size(bytes: u64) -> String {
    match bytes {
        ..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{} KiB", bytes / 1_024),
        _ => format!("{} MiB", bytes / 1_048_576),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_check_decides_the_exit_code_and_an_open_service_does_not() {
        let (pass, open) = (Check::pass("disk", ""), Check::warn(ADVICE, "", ""));
        assert_eq!(exit(&[pass.clone(), open.clone()]), Exit::Ok);
        let warn = Check::warn("members", "", "");
        assert_eq!(exit(&[warn.clone(), open, pass]), Exit::Warning);
        assert_eq!(exit(&[Check::fail("udp", "", ""), warn]), Exit::Failed);
    }

    #[test]
    fn a_screen_shows_what_is_wrong_first_and_what_to_do() {
        let checks = [
            Check::pass("disk", "enough"),
            Check::warn("members", "1 down: b", "murmesh check"),
            Check::fail("udp", "nobody", "open 7370/udp"),
        ];
        let shown = screen(&checks, false);
        assert!(shown.find("udp").unwrap() < shown.find("members").unwrap(), "{shown}");
        assert!(shown.contains("try: open 7370/udp") && !shown.contains("enough"), "{shown}");
        assert!(shown.ends_with("3 checks: 1 failed, 1 warned"), "{shown}");
        assert!(screen(&checks, true).contains("enough"));
    }
}
