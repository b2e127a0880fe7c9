//! What the agents of each way hold: at rest, with connections that stay open, and after those are
//! closed.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::limits::Limit;
use super::load::Kind;
use super::plot::{self, Panel, Row};
use super::process::{Client, Usage, until};
use super::proxies::{Carries, PROXIES, proxies};
use super::ways::{Link, MURMESH, Stage, Way};

/// Connections that stay open, to see what one costs.
const OPEN: usize = 1_000;
/// Connections of a wave that comes and goes.
const WAVE: usize = 5_000;
/// How long an agent may take to give back what closed connections held.
const CLOSING_MAX: Duration = Duration::from_secs(20);

/// Both agents of a way at one moment.
type Both = [Usage; 2];

/// What the agents of a way held, from their start on.
struct Story {
    way: &'static str,
    idle: Both,
    /// With [`OPEN`] connections.
    open: Both,
    waves: Vec<Wave>,
}

/// [`WAVE`] connections that came and went.
struct Wave {
    top: Both,
    after: Both,
    /// Connections that the agents still counted in the end; none where an agent does not say.
    left: Option<f64>,
}

/// Measures, prints all figures, and returns the limits with what was measured.
pub(crate) fn compare(is_quick: bool) -> Result<Vec<Limit>, Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let (proxies, missing) = proxies(&PROXIES, true);
    let stage = Stage::new(Link::Loopback, Carries::Bytes, &proxies, directory.path())?;
    let mut stories = Vec::new();
    for way in stage.ways.iter().filter(|way| way.agents.len() == 2) {
        let waves = if is_quick && way.name != MURMESH { 0 } else { 2 };
        match tell(&stage, way, waves) {
            Ok(story) => stories.push(story),
            Err(error) if way.name == MURMESH => return Err(error),
            Err(error) => println!("failed: {}: {error}", way.name),
        }
    }
    print(&stories);
    plot(&stories)?;
    missing.iter().for_each(|missing| println!("{missing}"));
    let murmesh = stories.iter().find(|story| story.way == MURMESH).ok_or("murmesh is measured")?;
    Ok(limits(murmesh))
}

fn limits(murmesh: &Story) -> Vec<Limit> {
    let [first, second] = &murmesh.waves[..] else { return Vec::new() };
    let worst = |of: &dyn Fn(usize) -> f64| Some(of(0).max(of(1)));
    let idle = |agent: usize| murmesh.idle[agent].rss / 1e6;
    let each = |agent: usize| (murmesh.open[agent].rss - murmesh.idle[agent].rss) / 1024.0;
    let growth = |agent: usize| 100.0 * (second.top[agent].rss / first.top[agent].rss - 1.0);
    let more = |of: fn(&Usage) -> f64| {
        let left = |agent: usize| of(&second.after[agent]) - of(&murmesh.idle[agent]);
        worst(&left)
    };
    vec![
        Limit::at_most("idle agent, MB", 20.0, worst(&idle)),
        Limit::at_most(
            "an idle connection, KB for each agent",
            8.0,
            worst(&|agent| each(agent) / OPEN as f64),
        ),
        Limit::at_most("descriptors left by 2 waves", 0.0, more(|usage| usage.descriptors)),
        Limit::at_most("threads left by 2 waves", 0.0, more(|usage| usage.threads)),
        Limit::at_most("connections still counted", 0.0, second.left),
        Limit::at_most("memory that a second wave adds, %", 5.0, worst(&growth)),
    ]
}

fn tell(stage: &Stage, way: &Way, waves: usize) -> Result<Story, Box<dyn Error>> {
    let idle = usage(way)?;
    let held = |connections| -> Result<Both, Box<dyn Error>> {
        let kind = Kind::Idle { connections };
        let client = Client::open(&stage.place, kind, way.entry, Duration::ZERO)?;
        let held = usage(way)?;
        client.run()?;
        Ok(held)
    };
    let open = held(OPEN)?;
    let _ = until_closed(way, &idle); // who keeps some shows in what follows
    let mut story = Story { way: way.name, idle, open, waves: Vec::new() };
    for _ in 0..waves {
        let top = held(WAVE)?;
        let after = until_closed(way, &idle).or_else(|_| usage(way))?;
        story.waves.push(Wave { top, after, left: connections_open(way)? });
    }
    Ok(story)
}

fn usage(way: &Way) -> Result<Both, Box<dyn Error>> {
    let [client, server] = &way.agents[..] else { return Err("a way has two agents".into()) };
    Ok([client.usage()?, server.usage()?])
}

/// Waits until no more descriptors are open than in the beginning, and returns what the agents held then:
/// asking them for their count of connections opens another one.
fn until_closed(way: &Way, idle: &Both) -> Result<Both, Box<dyn Error>> {
    until("descriptors as in the beginning", CLOSING_MAX, || {
        let held = usage(way)?;
        let is_closed = held
            .iter()
            .zip(idle)
            .all(|(now, then)| now.descriptors <= then.descriptors && now.threads <= then.threads);
        if is_closed && connections_open(way)?.unwrap_or(0.0) == 0.0 {
            return Ok(held);
        }
        Err("there are more".into())
    })
}

/// What murmesh's agents count as open, together.
fn connections_open(way: &Way) -> Result<Option<f64>, Box<dyn Error>> {
    let mut open = None;
    for api in &way.apis {
        let metrics = metrics(*api)?;
        let counted = metrics.lines().filter(|line| line.starts_with("murmesh_connections_open"));
        for line in counted {
            let value: f64 = line.rsplit(' ').next().unwrap_or_default().parse()?;
            *open.get_or_insert(0.0) += value;
        }
    }
    Ok(open)
}

fn metrics(api: SocketAddr) -> Result<String, Box<dyn Error>> {
    let mut stream = TcpStream::connect(api)?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {api}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.starts_with("HTTP/1.1 200") {
        true => Ok(answer),
        false => Err(format!("{api} does not tell its metrics: {answer}").into()),
    }
}

/// Draws `target/bench/memory.svg`.
fn plot(stories: &[Story]) -> Result<(), Box<dyn Error>> {
    let panel = |title: &str, unit, is_log, of: &dyn Fn(&Story) -> Option<f64>| {
        let rows = stories.iter().filter_map(|story| Some(Row::of(story.way, &[of(story)?])));
        Panel { title: title.to_owned(), unit, is_log, rows: rows.collect() }
    };
    let both = |both: &Both, of: fn(&Usage) -> f64| of(&both[0]) + of(&both[1]);
    let mb = "MB, both agents; less is better";
    let wave = |of: fn(&Wave) -> &Both| {
        move |story: &Story| Some(both(of(story.waves.first()?), |usage| usage.rss) / 1e6)
    };
    let panels = [
        panel("idle, RSS", mb, false, &|story| Some(both(&story.idle, |usage| usage.rss) / 1e6)),
        panel("idle, PSS", mb, false, &|story| Some(both(&story.idle, |usage| usage.pss) / 1e6)),
        panel("an idle connection", "KB, both agents; less is better", false, &|story| {
            let grown = both(&story.open, |usage| usage.rss) - both(&story.idle, |usage| usage.rss);
            Some(grown / 1024.0 / OPEN as f64)
        }),
        panel("5,000 connections, RSS", mb, false, &wave(|wave| &wave.top)),
        panel("5,000 connections closed again, RSS", mb, false, &wave(|wave| &wave.after)),
    ];
    let title = "Memory of the two agents between client and server";
    println!("\ndrawn: {}\n", plot::write("memory", title, &panels)?.display());
    Ok(())
}

fn print(stories: &[Story]) {
    let both = |both: &Both, of: &dyn Fn(&Usage) -> f64, digits: usize| {
        format!("{:.digits$} + {:.digits$}", of(&both[0]), of(&both[1]))
    };
    println!("\nthe client's agent + the server's; RSS and PSS in MB, before any load");
    println!(
        "{:<10} {:>15} {:>15} {:>13} {:>13} {:>22} {:>20}",
        "idle", "RSS", "PSS", "threads", "descriptors", "KB/idle connection", "threads with 1,000"
    );
    for Story { way, idle, open, .. } in stories {
        let each = [0, 1].map(|at| (open[at].rss - idle[at].rss) / 1024.0 / OPEN as f64);
        println!(
            "{way:<10} {:>15} {:>15} {:>13} {:>13} {:>22} {:>20}",
            both(idle, &|usage| usage.rss / 1e6, 1),
            both(idle, &|usage| usage.pss / 1e6, 1),
            both(idle, &|usage| usage.threads, 0),
            both(idle, &|usage| usage.descriptors, 0),
            format!("{:.1} + {:.1}", each[0], each[1]),
            both(open, &|usage| usage.threads, 0),
        );
    }
    println!("\nwaves of 5,000 connections that come and go; RSS in MB");
    println!(
        "{:<10} {:>17} {:>17} {:>17} {:>17} {:>17} {:>13}",
        "", "first", "closed", "second", "closed", "descriptors left", "threads left"
    );
    for Story { way, idle, waves, .. } in stories {
        let [first, second] = &waves[..] else { continue };
        let rss = |held: &Both| both(held, &|usage| usage.rss / 1e6, 1);
        let left = |of: fn(&Usage) -> f64| {
            let left = [0, 1].map(|at| of(&second.after[at]) - of(&idle[at]));
            format!("{:.0} + {:.0}", left[0], left[1])
        };
        println!(
            "{way:<10} {:>17} {:>17} {:>17} {:>17} {:>17} {:>13}",
            rss(&first.top),
            rss(&first.after),
            rss(&second.top),
            rss(&second.after),
            left(|usage| usage.descriptors),
            left(|usage| usage.threads),
        );
    }
}
