//! How fast the ways are and what they cost: interleaved rounds, and medians over them.

use std::collections::BTreeMap;
use std::error::Error;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use super::limits::Limit;
use super::load::{Kind, Outcome};
use super::plot::{self, Panel, Row};
use super::process::{Client, machine_cpu_us};
use super::proxies::{Carries, PROXIES, proxies};
use super::ways::{DIRECT, Link, MURMESH, ONE_HOP, Stage, TUNNEL as BYTES, UNWATCHED, Way};

/// What is measured of which ways, and what must hold of it.
pub(crate) struct Course {
    carries: Carries,
    proxies: &'static [&'static str],
    /// Whether proxies that are missing are fetched.
    is_installing: bool,
    measures: &'static [Measure],
    limits: fn(&Samples) -> Vec<Limit>,
}

struct Measure {
    title: &'static str,
    kind: Kind,
    link: Link,
}

const ONE: &str = "1 connection";
const MANY: &str = "64 connections";
const CROWD: &str = "1,000 connections";
const NEW: &str = "new connections";
const BULK: &str = "bulk, 1 stream";
const BULK_NARROW: &str = "bulk, 1,452 bytes";

const HTTP_ONE: &str = "HTTP, 1 connection";
const HTTP_MANY: &str = "HTTP, 64";
const HTTP_CROWD: &str = "HTTP, 1,000";

const fn on_loopback(title: &'static str, kind: Kind) -> Measure {
    Measure { title, kind, link: Link::Loopback }
}

/// The short one: against HAProxy, for every change.
pub(crate) const TUNNEL: Course = Course {
    carries: Carries::Bytes,
    proxies: &["haproxy"],
    is_installing: false,
    measures: &[
        on_loopback(ONE, Kind::Requests { connections: 1 }),
        on_loopback(MANY, Kind::Requests { connections: 64 }),
        on_loopback(NEW, Kind::Connections { workers: 32 }),
        on_loopback(BULK, Kind::Bulk { streams: 1 }),
        on_loopback("bulk, 8 streams", Kind::Bulk { streams: 8 }),
    ],
    limits: |samples| {
        let direct = |title| samples.ratio(title, rate, DIRECT);
        let of_haproxy = samples.ratio(MANY, cpu, "haproxy");
        vec![
            Limit::at_least("requests/s of direct, 64 connections", 0.25, direct(MANY)),
            Limit::at_least("new connections/s of direct", 0.25, direct(NEW)),
            Limit::at_most("CPU per request of HAProxy's, 64 connections", 0.5, of_haproxy),
            Limit::at_most("p99 of p50, 64 connections", 5.0, Some(samples.tail(MANY))),
        ]
    },
};

/// The whole one: against everything that carries bytes over mutual TLS.
pub(crate) const PEERS: Course = Course {
    carries: Carries::Bytes,
    proxies: &PROXIES,
    is_installing: true,
    measures: &[
        on_loopback(ONE, Kind::Requests { connections: 1 }),
        on_loopback(MANY, Kind::Requests { connections: 64 }),
        on_loopback(CROWD, Kind::Requests { connections: 1_000 }),
        on_loopback(NEW, Kind::Connections { workers: 32 }),
        on_loopback(BULK, Kind::Bulk { streams: 1 }),
        Measure { title: BULK_NARROW, kind: Kind::Bulk { streams: 1 }, link: Link::Narrow },
    ],
    limits: |samples| {
        let direct = |title| samples.ratio(title, rate, DIRECT);
        let best = |title, of, better| samples.of_best(title, of, better);
        let added =
            samples.best(ONE, p50, f64::min).map(|best| samples.of(ONE, MURMESH, p50) - best);
        let narrow = samples
            .has(BULK_NARROW, MURMESH)
            .then(|| samples.of(BULK_NARROW, MURMESH, cpu) / samples.of(BULK, "envoy", cpu));
        let narrow = narrow.filter(|_| samples.has(BULK, "envoy"));
        vec![
            Limit::at_least("requests/s of direct, 64 connections", 0.30, direct(MANY)),
            Limit::at_least("requests/s of the best, 64", 1.0, best(MANY, rate, f64::max)),
            Limit::at_least("requests/s of the best, 1,000", 1.0, best(CROWD, rate, f64::max)),
            Limit::at_least("new connections/s of direct", 0.33, direct(NEW)),
            Limit::at_least("new connections/s of the best", 8.0, best(NEW, rate, f64::max)),
            Limit::at_most("CPU per request of the best's, 64", 0.5, best(MANY, cpu, f64::min)),
            Limit::at_most("CPU per request of the best's, 1,000", 1.0, best(CROWD, cpu, f64::min)),
            Limit::at_most("p99 of the best's, 64", 1.0, best(MANY, p99, f64::min)),
            Limit::at_most("p99 of the best's, 1,000", 1.0, best(CROWD, p99, f64::min)),
            Limit::at_most("p99 of p50, 64 connections", 3.0, Some(samples.tail(MANY))),
            Limit::at_most("p50 above the best's in us, 1 connection", 3.0, added),
            Limit::at_most("CPU per GB of Envoy's", 1.0, samples.ratio(BULK, cpu, "envoy")),
            Limit::at_most("CPU per GB at 1,452 of Envoy's on loopback", 2.5, narrow),
        ]
    },
};

/// Requests of HTTP, against those that balance them one by one.
pub(crate) const HTTP: Course = Course {
    carries: Carries::Http,
    proxies: &["nginx", "envoy"],
    is_installing: true,
    measures: &[
        on_loopback(HTTP_ONE, Kind::Http { connections: 1 }),
        on_loopback(HTTP_MANY, Kind::Http { connections: 64 }),
        on_loopback(HTTP_CROWD, Kind::Http { connections: 1_000 }),
    ],
    limits: |samples| {
        let many = |of, other| samples.ratio(HTTP_MANY, of, other);
        vec![
            Limit::at_least("requests/s of Envoy's, 64", 2.5, many(rate, "envoy")),
            Limit::at_least("requests/s of nginx's, 64", 1.0, many(rate, "nginx")),
            Limit::at_least("requests/s of direct, 64", 0.22, many(rate, DIRECT)),
            Limit::at_most("CPU per request of Envoy's, 64", 1.0 / 3.0, many(cpu, "envoy")),
            Limit::at_most("CPU per request of nginx's, 64", 0.6, many(cpu, "nginx")),
            Limit::at_most("CPU per request of our byte tunnel's, 64", 1.6, many(cpu, BYTES)),
            Limit::at_least(
                "requests/s without the breaker, metrics on, 64",
                0.95,
                many(rate, UNWATCHED),
            ),
            Limit::at_most("p50 of Envoy's, 1", 0.5, samples.ratio(HTTP_ONE, p50, "envoy")),
        ]
    },
};

/// What one round of one measure over one way gave.
struct Sample {
    kind: Kind,
    outcome: Outcome,
    /// Of both agents, in microseconds.
    cpu_us: f64,
}

/// Requests, connections or bytes in a second.
fn rate(sample: &Sample) -> f64 {
    sample.outcome.count as f64 / sample.outcome.seconds
}

/// Microseconds of both agents for a request, a connection or a gigabyte.
fn cpu(sample: &Sample) -> f64 {
    let units = match sample.kind {
        Kind::Bulk { .. } => sample.outcome.count as f64 / 1e9,
        _ => sample.outcome.count as f64,
    };
    sample.cpu_us / units.max(1e-9)
}

fn p50(sample: &Sample) -> f64 {
    sample.outcome.p50_us
}

fn p99(sample: &Sample) -> f64 {
    sample.outcome.p99_us
}

/// Of all rounds, by measure and way.
#[derive(Default)]
struct Samples {
    taken: BTreeMap<(&'static str, &'static str), Vec<Sample>>,
    /// Whether everything that the course names was there.
    is_complete: bool,
    /// Shares of the machine that neither the load nor what it measured has used.
    others: Vec<f64>,
    /// What was asked of other programs and did not succeed.
    failures: Vec<String>,
}

impl Samples {
    fn has(&self, title: &'static str, way: &'static str) -> bool {
        self.taken.contains_key(&(title, way))
    }

    /// The median; not a number where nothing was measured.
    fn of(&self, title: &'static str, way: &'static str, of: fn(&Sample) -> f64) -> f64 {
        let rounds = self.taken.get(&(title, way)).map_or(&[][..], Vec::as_slice);
        median(rounds.iter().map(of).collect())
    }

    /// What of all ways that were measured, in units of `unit`.
    fn panel(
        &self,
        title: &'static str,
        of: fn(&Sample) -> f64,
        unit: (&'static str, f64),
        is_log: bool,
    ) -> Panel {
        let rows = WAYS.iter().filter_map(|way| {
            let values: Vec<f64> =
                self.taken.get(&(title, *way))?.iter().map(|sample| of(sample) / unit.1).collect();
            Some(Row::of(*way, &values))
        });
        // Nothing lies between on the direct way, and nothing is spent there.
        let rows = rows.filter(|row| row.value > 0.0).collect();
        Panel { title: title.to_owned(), unit: unit.0, is_log, rows }
    }

    /// Of murmesh, as a share of `other`'s where that was measured.
    fn ratio(
        &self,
        title: &'static str,
        of: fn(&Sample) -> f64,
        other: &'static str,
    ) -> Option<f64> {
        self.has(title, other).then(|| self.of(title, MURMESH, of) / self.of(title, other, of))
    }

    /// Of the best of all others, where all are there.
    fn best(
        &self,
        title: &'static str,
        of: fn(&Sample) -> f64,
        better: fn(f64, f64) -> f64,
    ) -> Option<f64> {
        let others = self.taken.keys().filter(|(measured, way)| {
            *measured == title && ![DIRECT, MURMESH, ONE_HOP].contains(way)
        });
        let best = others.map(|(_, way)| self.of(title, way, of)).reduce(better);
        best.filter(|_| self.is_complete)
    }

    /// Of murmesh, as a share of that.
    fn of_best(
        &self,
        title: &'static str,
        of: fn(&Sample) -> f64,
        better: fn(f64, f64) -> f64,
    ) -> Option<f64> {
        self.best(title, of, better).map(|best| self.of(title, MURMESH, of) / best)
    }

    /// p99 of murmesh as a multiple of its p50.
    fn tail(&self, title: &'static str) -> f64 {
        self.of(title, MURMESH, p99) / self.of(title, MURMESH, p50)
    }
}

/// In the order of the plots.
const WAYS: [&str; 6] = [DIRECT, MURMESH, PROXIES[0], PROXIES[1], PROXIES[2], PROXIES[3]];

/// Draws `target/bench/speed.svg`.
fn plot(samples: &Samples) -> Result<(), Box<dyn Error>> {
    let requests = ("requests/s, more is better", 1.0);
    let us = |what| (what, 1.0);
    let panels = [
        samples.panel(ONE, rate, requests, false),
        samples.panel(ONE, p50, us("p50 in us, less is better"), false),
        samples.panel(MANY, rate, requests, false),
        samples.panel(MANY, p99, us("p99 in us, less is better; decades"), true),
        samples.panel(CROWD, rate, requests, false),
        samples.panel(CROWD, p99, us("p99 in us, less is better; decades"), true),
        samples.panel(MANY, cpu, us("CPU us/request, both agents; less is better"), false),
        samples.panel(CROWD, cpu, us("CPU us/request, both agents; less is better; decades"), true),
        samples.panel(NEW, rate, ("connections/s, more is better; decades", 1.0), true),
        samples.panel(
            NEW,
            cpu,
            us("CPU us/connection, both agents; less is better; decades"),
            true,
        ),
        samples.panel(BULK, rate, ("Gbit/s, more is better", 1e9 / 8.0), false),
        samples.panel(BULK, cpu, ("CPU s/GB, both agents; less is better", 1e6), false),
        samples.panel(BULK_NARROW, rate, ("Gbit/s, more is better", 1e9 / 8.0), false),
        samples.panel(BULK_NARROW, cpu, ("CPU s/GB, both agents; less is better", 1e6), false),
    ];
    let title = "Two agents between client and server: median, least and most of all rounds";
    println!("\ndrawn: {}", plot::write("speed", title, &panels)?.display());
    Ok(())
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Measures, prints all figures, and returns the limits with what was measured.
pub(crate) fn compare(course: &Course, is_quick: bool) -> Result<Vec<Limit>, Box<dyn Error>> {
    let (rounds, time) = match is_quick {
        true => (3, Duration::from_millis(200)),
        false => (5, Duration::from_millis(600)),
    };
    let directory = tempfile::tempdir()?;
    let (proxies, missing) = proxies(course.proxies, course.is_installing);
    let mut samples = Samples { is_complete: missing.is_empty(), ..Samples::default() };
    let mut stages = vec![Stage::new(Link::Loopback, course.carries, &proxies, directory.path())?];
    if course.measures.iter().any(|measure| measure.link == Link::Narrow) {
        match Stage::new(Link::Narrow, course.carries, &proxies, directory.path()) {
            Ok(stage) => stages.push(stage),
            Err(error) => println!("{BULK_NARROW}: not compared ({error})"),
        }
    }
    for proxy in &proxies {
        println!("{:<10} {}", proxy.name, proxy.version);
    }
    if course.carries == Carries::Bytes {
        println!("strangers were refused by both sides of every way with agents");
    }
    for stage in &stages {
        for way in &stage.ways {
            let warm = Duration::from_millis(300);
            let kind = match course.carries {
                Carries::Bytes => Kind::Requests { connections: 64 },
                Carries::Http => Kind::Http { connections: 64 },
            };
            measure(stage, way, kind, warm, &mut samples)?;
        }
    }
    for round in 0..rounds {
        for &Measure { title, kind, link } in course.measures {
            let Some(stage) = stages.iter().find(|stage| stage.link == link) else { continue };
            // Nobody always comes behind the same one.
            let count = stage.ways.len();
            for way in (0..count).map(|at| &stage.ways[(round + at) % count]) {
                match measure(stage, way, kind, time, &mut samples) {
                    Ok(sample) => samples.taken.entry((title, way.name)).or_default().push(sample),
                    Err(error) if [DIRECT, MURMESH].contains(&way.name) => return Err(error),
                    Err(error) => samples.failures.push(error.to_string()),
                }
            }
        }
    }
    println!("\nmedians of {rounds} rounds of {time:?}, 100-byte messages, one machine");
    println!(
        "others' share of the machine while we measured: median {:.0} %, most {:.0} %",
        100.0 * median(samples.others.clone()),
        100.0 * samples.others.iter().copied().fold(0.0, f64::max),
    );
    for measure in course.measures {
        print(measure, &samples, &stages);
    }
    if samples.has(CROWD, MURMESH) {
        plot(&samples)?;
    }
    println!();
    missing.iter().for_each(|missing| println!("{missing}"));
    samples.failures.iter().for_each(|failure| println!("failed: {failure}"));
    Ok((course.limits)(&samples))
}

fn measure(
    stage: &Stage,
    way: &Way,
    kind: Kind,
    time: Duration,
    samples: &mut Samples,
) -> Result<Sample, Box<dyn Error>> {
    let named = |error: Box<dyn Error>| format!("{}, {kind:?}: {error}", way.name);
    let client = Client::open(&stage.place, kind, way.entry, time).map_err(named)?;
    let spent = || -> Result<_, Box<dyn Error>> {
        Ok((way.cpu_us()?, stage.server.cpu_us()?, machine_cpu_us()?, Instant::now()))
    };
    let before = spent()?;
    let outcome = client.run().map_err(named)?;
    let after = spent()?;
    let cpu_us = after.0 - before.0;
    let ours = cpu_us + (after.1 - before.1) + outcome.cpu_us;
    let machine = available_parallelism()?.get() as f64 * (after.3 - before.3).as_micros() as f64;
    samples.others.push(((after.2 - before.2 - ours) / machine).max(0.0));
    if outcome.errors > 0 {
        let Outcome { count, errors, .. } = outcome;
        return Err(named(format!("{errors} errors beside {count} successes").into()).into());
    }
    Ok(Sample { kind, outcome, cpu_us })
}

fn print(measure: &Measure, samples: &Samples, stages: &[Stage]) {
    let &Measure { title, kind, link } = measure;
    let Some(stage) = stages.iter().find(|stage| stage.link == link) else { return };
    let is_bulk = matches!(kind, Kind::Bulk { .. });
    let (rate_title, cpu_title) = match kind {
        Kind::Requests { .. } | Kind::Http { .. } | Kind::Idle { .. } => {
            ("requests/s", "CPU us/request")
        }
        Kind::Connections { .. } => ("connections/s", "CPU us/connection"),
        Kind::Bulk { .. } => ("Gbit/s", "CPU s/GB"),
    };
    let (rate_unit, cpu_unit, digits) = if is_bulk { (1e9 / 8.0, 1e6, 1) } else { (1.0, 1.0, 0) };
    println!(
        "\n{title:<18} {rate_title:>13} {:>9} {:>10} {:>9} {:>9} {cpu_title:>17} {:>10}",
        "of direct", "murmesh/it", "p50 us", "p99 us", "murmesh/it"
    );
    for way in stage.ways.iter().map(|way| way.name).filter(|way| samples.has(title, way)) {
        let of = |of| samples.of(title, way, of);
        let ratio = |of| samples.ratio(title, of, way).unwrap_or(f64::NAN);
        println!(
            "{way:<18} {:>13.digits$} {:>9.3} {:>10.2} {:>9.1} {:>9.1} {:>17.2} {:>10.2}",
            of(rate) / rate_unit,
            of(rate) / samples.of(title, DIRECT, rate),
            ratio(rate),
            of(p50),
            of(p99),
            of(cpu) / cpu_unit,
            ratio(cpu),
        );
    }
}
