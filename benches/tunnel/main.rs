//! What two agents between a client and a server cost, against no agents at all, and against a pair
//! of HAProxies with mutual TLS where HAProxy is installed.
//!
//! `cargo bench --bench tunnel` builds and runs the shipped binary (profile `dist`, identity and
//! metrics on) as two processes; client and server are processes of their own. The ways are measured
//! in turn, round after round, and every figure is the median of all rounds; ratios are of figures
//! of the same run. Each limit is printed as held, missed or not compared; `-- --check` fails when
//! one is missed, and with `CI=true` when one is not compared; a failed request in any round always
//! fails. `-- --quick` makes three short
//! rounds, whose figures are rough.

#![allow(clippy::disallowed_methods)] // a benchmark reads the clock

mod limits;
mod load;
mod ways;

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use limits::{Figures, Standing, limits};
use load::{Kind, Outcome};
use ways::{Way, ways};

const MANY: &str = "64 connections";
const NEW: &str = "new connections";

const KINDS: [(&str, Kind); 5] = [
    ("1 connection", Kind::Requests { connections: 1 }),
    (MANY, Kind::Requests { connections: 64 }),
    (NEW, Kind::Connections { workers: 32 }),
    ("bulk, 1 stream", Kind::Bulk { streams: 1 }),
    ("bulk, 8 streams", Kind::Bulk { streams: 8 }),
];

/// What one round of one kind over one way gave.
struct Sample {
    outcome: Outcome,
    /// Of both agents, per request, connection or gigabyte, in microseconds.
    cpu_us: f64,
}

/// Of all rounds, by kind and way.
type Samples = BTreeMap<(&'static str, &'static str), Vec<Sample>>;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--role", "server"] => on_one_thread(load::serve()),
        ["--role", "load", kind, target, millis] => {
            let kind: Kind = serde_json::from_str(kind)?;
            let time = Duration::from_millis(millis.parse()?);
            on_one_thread(async {
                let outcome =
                    load::load(kind, target.parse().map_err(std::io::Error::other)?, time);
                println!("{}", serde_json::to_string(&outcome.await?)?);
                Ok(())
            })
        }
        _ => {
            let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
            let missed = compare(has("--quick"))?;
            match has("--check") && !missed.is_empty() {
                true => {
                    Err(format!("{} of the limits not held: {}", missed.len(), missed.join("; "))
                        .into())
                }
                false => Ok(()),
            }
        }
    }
}

fn on_one_thread(work: impl Future<Output = std::io::Result<()>>) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    Ok(runtime.block_on(work)?)
}

/// Measures, prints all figures, and returns the limits that are missed.
fn compare(is_quick: bool) -> Result<Vec<&'static str>, Box<dyn Error>> {
    let (rounds, time) = if is_quick { (3, 300) } else { (7, 1_000) };
    let directory = tempfile::tempdir()?;
    let ways = ways(directory.path())?;
    let mut samples = Samples::new();
    for way in &ways {
        measure(way, Kind::Requests { connections: 64 }, 200)?; // warm
    }
    for _ in 0..rounds {
        for (title, kind) in KINDS {
            for way in &ways {
                let sample = measure(way, kind, time)?;
                samples.entry((title, way.name)).or_default().push(sample);
            }
        }
    }
    println!("medians of {rounds} rounds of {time} ms, 100-byte messages, one machine");
    for (title, kind) in KINDS {
        println!();
        println!("{}", header(title, kind));
        let direct = samples.get(&(title, "direct"));
        for way in &ways {
            if let Some(rounds) = samples.get(&(title, way.name)) {
                println!("{}", line(kind, way.name, rounds, direct.map_or(&[], Vec::as_slice)));
            }
        }
    }
    if !ways.iter().any(|way| way.name == "haproxy") {
        println!("\nhaproxy: not compared (not installed)");
    }
    println!();
    let limits = limits(&figures(&samples));
    limits.iter().for_each(|limit| println!("{limit}"));
    let must_compare = env::var("CI").is_ok_and(|ci| ci == "true");
    let missed = limits.iter().filter(|limit| match limit.standing() {
        Standing::Held => false,
        Standing::Missed => true,
        Standing::NotCompared => must_compare,
    });
    Ok(missed.map(|limit| limit.what).collect())
}

/// The figures that limits are about; not a number where nothing was measured.
fn figures(samples: &Samples) -> Figures {
    let of = |title, way, what: fn(&Sample) -> f64| {
        samples.get(&(title, way)).map_or(f64::NAN, |rounds| median(rounds, what))
    };
    let ratio_to_direct = |title| of(title, "murmesh", rate) / of(title, "direct", rate);
    let cpu = |way| of(MANY, way, |sample| sample.cpu_us);
    let p50 = of(MANY, "murmesh", |sample| sample.outcome.p50_us);
    let p99 = of(MANY, "murmesh", |sample| sample.outcome.p99_us);
    let has_haproxy = samples.contains_key(&(MANY, "haproxy"));
    Figures {
        requests_of_direct: ratio_to_direct(MANY),
        connections_of_direct: ratio_to_direct(NEW),
        cpu_of_haproxy: has_haproxy.then(|| cpu("murmesh") / cpu("haproxy")),
        p99_of_p50: p99 / p50,
    }
}

/// Requests, connections or bytes in a second.
fn rate(sample: &Sample) -> f64 {
    sample.outcome.count as f64 / sample.outcome.seconds
}

fn measure(way: &Way, kind: Kind, millis: u64) -> Result<Sample, Box<dyn Error>> {
    let before = way.cpu_us()?;
    let outcome = run_load(kind, way.entry, millis)?;
    let spent = way.cpu_us()? - before;
    let units = match kind {
        Kind::Bulk { .. } => outcome.count as f64 / 1e9,
        _ => outcome.count as f64,
    };
    if outcome.errors > 0 {
        let Outcome { count, errors, .. } = outcome;
        let name = way.name;
        return Err(format!("{name}, {kind:?}: {errors} errors beside {count} successes").into());
    }
    Ok(Sample { outcome, cpu_us: spent / units.max(1e-9) })
}

fn run_load(kind: Kind, target: SocketAddr, millis: u64) -> Result<Outcome, Box<dyn Error>> {
    let output = Command::new(env::current_exe()?)
        .args(["--role", "load", &serde_json::to_string(&kind)?])
        .args([target.to_string(), millis.to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("load on {target} failed").into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn header(title: &str, kind: Kind) -> String {
    let (rate, cpu) = match kind {
        Kind::Requests { .. } => ("requests/s", "CPU us/request"),
        Kind::Connections { .. } => ("connections/s", "CPU us/connection"),
        Kind::Bulk { .. } => ("Gbit/s", "CPU s/GB"),
    };
    format!("{title:<16} {rate:>13} {:>9} {:>9} {:>9} {cpu:>18}", "of direct", "p50 us", "p99 us")
}

fn line(kind: Kind, way: &str, rounds: &[Sample], direct: &[Sample]) -> String {
    let is_bulk = matches!(kind, Kind::Bulk { .. });
    let unit = if is_bulk { 1e9 / 8.0 } else { 1.0 };
    let rate = |sample: &Sample| rate(sample) / unit;
    let (here, there) = (median(rounds, rate), median(direct, rate));
    let p50 = median(rounds, |sample| sample.outcome.p50_us);
    let p99 = median(rounds, |sample| sample.outcome.p99_us);
    let cpu = median(rounds, |sample| sample.cpu_us) / if is_bulk { 1e6 } else { 1.0 };
    let digits = if is_bulk { 1 } else { 0 };
    let ratio = here / there;
    format!("{way:<16} {here:>13.digits$} {ratio:>9.3} {p50:>9.1} {p99:>9.1} {cpu:>18.2}")
}

fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
