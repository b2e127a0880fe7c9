//! `status`, `members`, `services`, `endpoints`, `events`: what the mesh looks like from here.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use super::Global;
use super::client::{Client, encoded};
use super::duration;
use super::exit::{Exit, Failure, Outcome};
use super::output::{
    Drawing, Grid, Listing, age, cell, count, line, note, or_dash, painted, show, state,
    until_interrupted,
};
use crate::api::views::{EndpointRow, Member, Service};
use crate::api::{ExposeSpec, UpstreamSpec};
use crate::runtime::clock;
use crate::telemetry::{EVIDENCE, Event, EventKind};

const GREEN: &str = "32";
const YELLOW: &str = "33";
const RED: &str = "31";
const DIM: &str = "2";
const BOLD: &str = "1";

const ENDPOINTS_HELP: &str = "\
STATE     ready takes work; avoided is ready, too, but calls from here go around it, because some have just
          failed; ejected failed its callers, and probing comes back from that: REASON says by whose word,
          'mesh' for all callers, 'only here' for those of this machine
WEIGHT    its share of the calls, 100 is usual
INFLIGHT  connections and requests under way from this machine; to an instance of this very machine
          those of all callers, and connections that rest
SINCE     for how long it has been so; '-' where that is longer than this agent can tell";

/// Arguments of `endpoints`.
#[derive(Debug, Args)]
#[command(after_help = ENDPOINTS_HELP)]
pub(super) struct EndpointsArgs {
    /// Which service
    #[arg(value_name = "SVC")]
    service: String,
    #[command(flatten)]
    listing: Listing,
}

/// Arguments of `events`.
#[derive(Debug, Args)]
pub(super) struct EventsArgs {
    /// Only what happened to this service, instance or member
    #[arg(value_name = "SVC")]
    subject: Option<String>,
    /// Only the last while, for instance 30m
    #[arg(long, value_name = "TIME", value_parser = duration)]
    since: Option<Duration>,
    /// Go on as things happen, until Ctrl-C
    #[arg(long, short)]
    follow: bool,
    /// Print JSON: an array, or one object a line with --follow
    #[arg(long)]
    json: bool,
}

/// Who is in the mesh.
pub(super) async fn members(global: &Global, listing: Listing) -> Outcome {
    let client = &Client::new(global)?;
    show(listing, || async move {
        let rows: Vec<Member> = client.get("/v1/mesh/members").await?;
        Drawing::of(&rows, listing, member_table, "no members are known yet")
    })
    .await
}

fn member_table(rows: &[Member]) -> String {
    let mut grid = Grid::new(["NAME", "STATE", "ADDRESS", "ZONE", "SERVICES", "SINCE", "ID"]);
    for row in rows {
        let name = if row.me { format!("{} (this one)", row.name) } else { row.name.clone() };
        let word = match (row.revoked, row.draining && row.state == "alive") {
            (true, _) => "revoked",
            (_, true) => "draining",
            _ => &row.state,
        };
        grid.row([
            cell(name),
            state(word),
            cell(&row.address),
            cell(or_dash(&row.zone)),
            cell(or_dash(&row.services.join(","))),
            cell(age(Duration::from_millis(row.age_ms))),
            cell(row.id.get(..12).unwrap_or(&row.id)),
        ]);
    }
    grid.finish(&[])
}

/// What is offered in the mesh.
pub(super) async fn services(global: &Global, listing: Listing) -> Outcome {
    let client = &Client::new(global)?;
    show(listing, || async move {
        let rows: Vec<Service> = client.get("/v1/mesh/services").await?;
        let hint = "nobody offers a service yet\n  try: murmesh expose web 127.0.0.1:8080";
        Drawing::of(&rows, listing, service_table, hint)
    })
    .await
}

fn service_table(rows: &[Service]) -> String {
    let mut grid = Grid::new(["SERVICE", "PROTOCOL", "READY", "STATE", "NOTE"]);
    for row in rows {
        let word = match used(row) {
            _ if row.failing => "failing",
            0 if row.ready > 0 => "ejected",
            0 => "down",
            _ if row.failing_here >= row.ready => "failing",
            used if used < row.instances || row.failing_here > 0 => "partly",
            _ => "ready",
        };
        grid.row([
            cell(&row.name),
            cell(&row.protocol),
            cell(format!("{}/{}", used(row), row.instances)),
            state(word),
            cell(service_note(row)),
        ]);
    }
    grid.finish(&[2])
}

/// The instances that calls from here go to as usual.
fn used(row: &Service) -> usize {
    row.ready.saturating_sub(row.ejected + row.avoided)
}

/// What an operator should know of a service beside its numbers; empty when all is well.
fn service_note(row: &Service) -> String {
    let trouble = trouble(row).map(|(word, means)| format!("{word}: {means}"));
    let mixed = row.mixed_protocols.then(|| {
        format!(
            "some instances are exposed with another protocol, and called as {} all the same",
            row.protocol
        )
    });
    let notes: Vec<_> = trouble.into_iter().chain(out_of_use(row)).chain(mixed).collect();
    notes.join("; ")
}

/// What is wrong with a service as a whole: a word, and what follows from it.
fn trouble(row: &Service) -> Option<(&'static str, &'static str)> {
    match (row.failing, row.panic) {
        (true, _) => Some(("failing as a whole", "the mesh ejects none of it")),
        (false, true) => Some(("in panic", "too much is ejected, so all is called")),
        (false, false) => None,
    }
}

/// `1 ejected, 2 only here, 1 avoided here`; absent when calls go to all that is ready, and end well.
fn out_of_use(row: &Service) -> Option<String> {
    let by_all = row.ejected.saturating_sub(row.ejected_here);
    let words = [
        (by_all, "ejected"),
        (row.ejected_here, if by_all > 0 { "only here" } else { "ejected only here" }),
        (row.avoided, "avoided here"),
        // Those that are avoided are told already.
        (row.failing_here.saturating_sub(row.avoided), "failing here"),
    ];
    let told = words.iter().filter(|(number, _)| *number > 0);
    let told: Vec<_> = told.map(|(number, word)| format!("{number} {word}")).collect();
    (!told.is_empty()).then(|| told.join(", "))
}

/// The instances of one service.
pub(super) async fn endpoints(global: &Global, args: EndpointsArgs) -> Outcome {
    let client = &Client::new(global)?;
    let (service, listing) = (&args.service, args.listing);
    show(listing, || async move {
        let path = format!("/v1/mesh/endpoints/{}", encoded(service));
        let rows: Vec<EndpointRow> = client.get(&path).await?;
        let hint = format!("nobody offers '{service}'\n  try: murmesh services");
        let exit = if rows.is_empty() { Exit::Warning } else { Exit::Ok };
        Ok(Drawing { exit, ..Drawing::of(&rows, listing, endpoint_table, hint)? })
    })
    .await
}

fn endpoint_table(rows: &[EndpointRow]) -> String {
    let mut grid = Grid::new([
        "INSTANCE", "NODE", "ADDRESS", "STATE", "WEIGHT", "INFLIGHT", "TAGS", "SINCE", "REASON",
    ]);
    for row in rows {
        grid.row([
            cell(&row.instance),
            cell(&row.node),
            cell(&row.address),
            state(if row.avoided { "avoided" } else { &row.state }),
            cell(row.weight),
            cell(row.inflight),
            cell(or_dash(&row.tags.join(","))),
            cell(row.since_ms.map_or("-".to_owned(), |ms| age(Duration::from_millis(ms)))),
            cell(&row.reason),
        ]);
    }
    grid.finish(&[4, 5])
}

/// What happened.
pub(super) async fn events(global: &Global, args: EventsArgs) -> Outcome {
    let client = Client::new(global)?;
    let mut query = Vec::new();
    if let Some(since) = &args.since {
        let since = humantime::format_duration(*since).to_string();
        query.push(format!("since={}", encoded(&since)));
    }
    if let Some(subject) = &args.subject {
        query.push(format!("subject={}", encoded(subject)));
    }
    if !args.follow {
        let path = format!("/v1/mesh/events?{}", query.join("&"));
        let events: Vec<Event> = client.get(&path).await?;
        if events.is_empty() {
            note("nothing of that kind happened");
        }
        if args.json {
            line(serde_json::to_string_pretty(&events).map_err(Failure::failed)?)?;
        } else {
            for event in &events {
                if !line(event_line(event))? {
                    break;
                }
            }
        }
        return Ok(Exit::Ok);
    }
    query.push("follow=true".to_owned());
    until_interrupted(follow(&client, &query.join("&"), args.json)).await
}

async fn follow(client: &Client, query: &str, is_json: bool) -> Outcome {
    let mut lines = client.lines(&format!("/v1/mesh/events?{query}")).await?;
    while let Some(text) = lines.next().await {
        let shown = match serde_json::from_str::<Event>(&text) {
            Ok(event) if !is_json => event_line(&event),
            _ => text, // also a {"missed": n}, which must not pass in silence
        };
        if !line(shown)? {
            return Ok(Exit::Ok); // the reader is gone
        }
    }
    Err(Failure::new(Exit::NoAgent, "the agent stopped"))
}

fn event_line(event: &Event) -> String {
    let at = humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(event.at));
    let kind = kind_word(event.kind);
    let colour = match event.kind {
        EventKind::MemberUp
        | EventKind::Healed
        | EventKind::InstanceAdded
        | EventKind::InstancePassing
        | EventKind::InstanceReturned
        | EventKind::ServiceRecovered
        | EventKind::BreakerClosed
        | EventKind::BreakerPanicEnded
        | EventKind::Restored => GREEN,
        EventKind::MemberDown
        | EventKind::InstanceFailing
        | EventKind::InstanceEjected
        | EventKind::ServiceFailing
        | EventKind::DuplicateKey
        | EventKind::Isolated => RED,
        EventKind::MemberSuspect
        | EventKind::MemberRestarting
        | EventKind::RenewalFailed
        | EventKind::EndedAccepted
        | EventKind::Degraded
        | EventKind::BreakerOpened
        | EventKind::BreakerPanic
        | EventKind::InstanceReturning
        | EventKind::StreamCut => YELLOW,
        _ => "0",
    };
    // One short line for each thing that happened: who said what of whom is for programs to read.
    let fields = event.fields.iter().filter(|(name, _)| !name.starts_with(EVIDENCE));
    let fields = fields.map(|(name, value)| format!(" {name}={value}"));
    format!(
        "{}  {}  {}  {}{}",
        painted(at, DIM),
        painted(format_args!("{kind:<21}"), colour),
        event.subject,
        event.reason,
        painted(fields.collect::<String>(), DIM),
    )
}

fn kind_word(kind: EventKind) -> String {
    match serde_json::to_value(kind) {
        Ok(Value::String(word)) => word.replace('_', " "),
        _ => format!("{kind:?}"),
    }
}

/// One screen.
pub(super) async fn status(global: &Global, listing: Listing) -> Outcome {
    let client = &Client::new(global)?;
    show(listing, || async move {
        let me: Value = client.get("/v1/agent/self").await?;
        let members: Vec<Member> = client.get("/v1/mesh/members").await?;
        let services: Vec<Service> = client.get("/v1/mesh/services").await?;
        let exposed: Vec<ExposeSpec> = client.get("/v1/mesh/expose").await?;
        let upstreams: Vec<UpstreamSpec> = client.get("/v1/mesh/upstream").await?;
        let me = me.get("Mesh").cloned().unwrap_or_default();
        let mut states: BTreeMap<&str, usize> = BTreeMap::new();
        for member in &members {
            *states.entry(member.state.as_str()).or_default() += 1;
        }
        let is_ready = me["ready"] == true;
        let is_whole = me["degraded"].is_null();
        let exit = if is_ready && is_whole { Exit::Ok } else { Exit::Warning };
        if listing.json {
            let whole = json!({
                "me": me,
                "members": states,
                "services": services,
                "exposed": exposed,
                "upstreams": upstreams,
            });
            let text = super::output::json(&whole, listing)?;
            return Ok(Drawing { text, hint: None, exit });
        }
        let text = status_screen(&me, &states, &services, &exposed, &upstreams);
        Ok(Drawing { exit, ..Drawing::new(text) })
    })
    .await
}

fn status_screen(
    me: &Value,
    states: &BTreeMap<&str, usize>,
    services: &[Service],
    exposed: &[ExposeSpec],
    upstreams: &[UpstreamSpec],
) -> String {
    let text = |key: &str| me[key].as_str().unwrap_or_default().to_owned();
    let short = |key: &str| text(key).chars().take(16).collect::<String>();
    let up = age(Duration::from_millis(me["uptime_ms"].as_u64().unwrap_or(0)));
    let readiness = match me["ready"] == true {
        true => painted("ready", GREEN),
        false => painted(format_args!("not ready: {}", text("reason")), RED),
    };
    let zone = text("zone");
    let zone = if zone.is_empty() { zone } else { format!(" in {zone}") };
    let mut rows = vec![
        ("agent", format!("{}{zone}, {readiness}, up {up}", painted(text("name"), BOLD))),
        ("mesh", format!("{} as member {}", short("mesh"), short("id"))),
        ("address", format!("{} (udp)", text("address"))),
        ("members", states_line(states)),
        ("services", services_line(services)),
        ("ejected", ejected_line(services)),
    ];
    rows.extend(troubled_line(services).map(|line| ("trouble", line)));
    let at = |key: &str| me[key].as_u64();
    let expiry = at("certificate_expires_at").zip(at("certificate_renews_at"));
    rows.extend(expiry.map(|(ends, renews)| ("certificate", expiry_line(ends, renews))));
    let degraded = me["degraded"].as_str();
    rows.extend(degraded.map(|reason| ("degraded", painted(reason, RED))));
    let mut offers: Vec<_> =
        exposed.iter().map(|spec| format!("{} at {}", spec.id, spec.to)).collect();
    offers.sort();
    let opens = upstreams.iter().map(|spec| format!("{} at {}", spec.service, spec.listen));
    let opens: Vec<_> = opens.collect();
    rows.push(("offers", or_dash(&offers.join(", ")).to_owned()));
    rows.push(("opens", or_dash(&opens.join(", ")).to_owned()));
    let doors = [("http", "gateway"), ("socks5h", "socks")];
    let doors = doors.map(|(scheme, key)| Some(format!("{scheme}://{}", me[key].as_str()?)));
    let doors: Vec<_> = doors.into_iter().flatten().collect();
    if !doors.is_empty() {
        rows.push(("by name", doors.join(", ")));
    }
    if let Some(public) = me["public"].as_str() {
        rows.push(("public", format!("https at {public}")));
    }
    let lines = rows.iter().map(|(name, value)| {
        let name = painted(format_args!("{name:<13}"), DIM);
        format!("{name}{value}")
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn states_line(states: &BTreeMap<&str, usize>) -> String {
    let words = ["alive", "suspect", "restarting", "down", "left"];
    let present = words.iter().filter_map(|word| states.get(word).map(|number| (word, number)));
    let parts = present.map(|(word, number)| {
        let colour = match *word {
            "alive" => GREEN,
            "suspect" | "restarting" => YELLOW,
            "down" => RED,
            _ => DIM,
        };
        painted(format_args!("{number} {word}"), colour)
    });
    parts.collect::<Vec<_>>().join(", ")
}

fn services_line(services: &[Service]) -> String {
    if services.is_empty() {
        return "none yet".to_owned();
    }
    let (ready, all) =
        services.iter().fold((0, 0), |(r, a), row| (r + used(row), a + row.instances));
    let colour = if ready == all { GREEN } else { YELLOW };
    let ready = painted(format_args!("{ready}/{all} instances ready"), colour);
    let without: Vec<_> =
        services.iter().filter(|row| row.ready == 0).map(|row| row.name.as_str()).collect();
    let without = match without.is_empty() {
        true => String::new(),
        false => painted(format_args!("; without any: {}", without.join(", ")), RED),
    };
    format!("{}, {ready}{without}", count(services.len(), "service"))
}

/// Of which services instances are out of use although their own agents call them ready.
fn ejected_line(services: &[Service]) -> String {
    let told = |row: &Service| Some(format!("{}: {}", row.name, out_of_use(row)?));
    let told: Vec<_> = services.iter().filter_map(told).collect();
    match told.is_empty() {
        true => "none".to_owned(),
        false => {
            let told = painted(told.join("; "), YELLOW);
            format!("{told} (murmesh breakers)")
        }
    }
}

/// The services that fail as a whole, or of which too much is ejected; absent when none does.
fn troubled_line(services: &[Service]) -> Option<String> {
    let told = |row: &Service| trouble(row).map(|(word, _)| format!("{} is {word}", row.name));
    let told: Vec<_> = services.iter().filter_map(told).collect();
    (!told.is_empty()).then(|| painted(told.join(", "), RED))
}

fn expiry_line(ends: u64, renews: u64) -> String {
    let now = clock::unix_seconds();
    let until = |at: u64| age(Duration::from_secs(at.saturating_sub(now)));
    match ends > now {
        true => format!("ends in {}, renewed in {}", until(ends), until(renews)),
        false => painted(format_args!("ended {} ago", age(Duration::from_secs(now - ends))), RED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_table_marks_this_one_and_shortens_ids() {
        let row = Member {
            name: "eins".to_owned(),
            id: "0123456789abcdef0123456789abcdef".to_owned(),
            address: "10.0.0.1:7370".to_owned(),
            zone: String::new(),
            state: "alive".to_owned(),
            revoked: false,
            draining: false,
            epoch: 1,
            version: 1,
            services: vec!["web".to_owned(), "db".to_owned()],
            age_ms: 4_200,
            me: true,
        };
        let table = member_table(&[row]);
        let line = table.lines().nth(1).unwrap();
        assert_eq!(
            line,
            "eins (this one)  alive  10.0.0.1:7370  -     web,db    4s     0123456789ab"
        );
    }
}
