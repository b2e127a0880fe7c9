//! One comparison for the benches `tunnel` and `peers`: the ways from a client to a server, the
//! load, and what is measured.

mod gossip;
mod limits;
mod load;
mod memory;
mod plot;
#[allow(clippy::panic, unreachable_pub)] // it is the tests', and as strict as they
#[path = "../../tests/support/ports.rs"]
mod ports;
mod process;
mod proxies;
mod speed;
mod strangers;
mod ways;

use std::env;
use std::error::Error;
use std::time::Duration;

use limits::{Limit, Standing};
use load::Kind;

const PARTS: &str = "tunnel, speed, http, memory, serf, serf-16, serf-32 and serf-64";

/// Runs the parts that the arguments name, or `usual` where they name none.
///
/// The same program is also the server and the client of the load, in processes of their own.
pub(crate) fn run(usual: &[&str]) -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["--role", "server"] => on_one_thread(load::serve()),
        ["--role", "forward", target] => on_one_thread(load::forward(target.parse()?)),
        ["--role", "load", kind, target, millis] => {
            let kind: Kind = serde_json::from_str(kind)?;
            let time = Duration::from_millis(millis.parse()?);
            on_one_thread(load::load(kind, target.parse()?, time))
        }
        _ => compare(usual, &arguments),
    }
}

fn on_one_thread(work: impl Future<Output = std::io::Result<()>>) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(work)?)
}

fn compare(usual: &[&str], arguments: &[&str]) -> Result<(), Box<dyn Error>> {
    let (flags, parts): (Vec<&str>, Vec<&str>) =
        arguments.iter().partition(|argument| argument.starts_with("--"));
    // cargo adds `--bench`.
    if let Some(flag) = flags.iter().find(|flag| !["--quick", "--check", "--bench"].contains(flag))
    {
        return Err(format!("unknown option {flag}: --quick and --check are known").into());
    }
    let is_quick = flags.contains(&"--quick");
    let mut limits = Vec::new();
    for part in if parts.is_empty() { usual } else { &parts } {
        limits.extend(match *part {
            "tunnel" => speed::compare(&speed::TUNNEL, is_quick)?,
            "speed" => speed::compare(&speed::PEERS, is_quick)?,
            "http" => speed::compare(&speed::HTTP, is_quick)?,
            "memory" => memory::compare(is_quick)?,
            "serf" => gossip::compare(if is_quick { &[16] } else { &[16, 32, 64] }, is_quick)?,
            "serf-16" => gossip::compare(&[16], is_quick)?,
            "serf-32" => gossip::compare(&[32], is_quick)?,
            "serf-64" => gossip::compare(&[64], is_quick)?,
            _ => return Err(format!("unknown part '{part}': known are {PARTS}").into()),
        });
    }
    println!();
    limits.iter().for_each(|limit| println!("{limit}"));
    let missed = missed(&limits);
    match flags.contains(&"--check") && !missed.is_empty() {
        true => Err(format!("{} limits not held: {}", missed.len(), missed.join("; ")).into()),
        false => Ok(()),
    }
}

/// The limits that are missed; in CI also those that nothing was compared with.
fn missed(limits: &[Limit]) -> Vec<&str> {
    let must_compare = env::var("CI").is_ok_and(|ci| ci == "true");
    let missed = limits.iter().filter(|limit| match limit.standing() {
        Standing::Held => false,
        Standing::Missed => true,
        Standing::NotCompared => must_compare,
    });
    missed.map(|limit| limit.what.as_str()).collect()
}
