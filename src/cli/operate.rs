//! `drain`, `maint`, `wait`, `reload`, `forget`: operating this machine's agent.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use hyper::Method;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::client::{Client, encoded};
use super::exit::{Exit, Failure, Outcome};
use super::output::{count, line, note};
use super::{Global, duration};
use crate::api::views::{OwnInstance, Rotation, Service};
use crate::api::{DrainRequest, ExposeSpec, Reloaded};
use crate::model::InstanceId;

/// How often a wait looks again.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Arguments of `drain`.
#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    /// Which instance of this machine [default: all of it]
    id: Option<InstanceId>,
    /// How long to wait until nothing is in flight; it stays out of rotation after that, too
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    timeout: Duration,
    /// Also the last ready instance of a service
    #[arg(long)]
    force: bool,
    /// Take it back in
    #[arg(long, conflicts_with = "force")]
    off: bool,
}

/// Arguments of `maint`.
#[derive(Debug, Args)]
pub(super) struct MaintArgs {
    /// An instance of this machine, or a service: all of its instances here
    #[arg(value_name = "ID|SVC")]
    which: InstanceId,
    /// Take it back in
    #[arg(long)]
    off: bool,
    /// Shown in this machine's listings; that of before stays when this is not said
    #[arg(long, value_name = "TEXT", conflicts_with = "off")]
    reason: Option<String>,
}

/// Arguments of `wait`.
#[derive(Debug, Args)]
pub(super) struct WaitArgs {
    /// 'agent', or an instance of this machine
    #[arg(value_name = "agent|ID")]
    which: InstanceId,
    /// What for: ready takes work, empty has nothing in flight
    #[arg(long = "for", value_enum)]
    goal: Goal,
    /// How long
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    timeout: Duration,
}

/// Arguments of `forget`.
#[derive(Debug, Args)]
pub(super) struct ForgetArgs {
    /// Its name, or its id where several had the name
    #[arg(value_name = "NODE")]
    node: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Goal {
    Ready,
    Empty,
}

/// Takes this machine or an instance out of rotation and waits until it is empty, or back in.
pub(super) async fn drain(global: &Global, args: DrainArgs) -> Outcome {
    let client = &Client::new(global)?;
    let name = args.id.as_ref().map_or("this machine", InstanceId::as_str);
    if args.off {
        return end_drain(client, args.id.as_ref(), name).await;
    }
    let instance = args.id.clone();
    let request = DrainRequest { instance, timeout: Some("0s".to_owned()), force: args.force };
    let asked = client.change::<Rotation>(Method::POST, "/v1/mesh/drain", &request).await;
    asked.map_err(|failure| match failure.kind() {
        Some("last_ready") => failure.hint("--force, or first start another instance elsewhere"),
        _ => failure,
    })?;
    let open = until_empty(client, args.id.as_ref(), args.timeout, |rotation| {
        match is_out(rotation, args.id.as_ref()) {
            true => Ok(()),
            false => {
                let message = format!("{name} was taken back in while it drained");
                Err(Failure::new(Exit::Warning, message))
            }
        }
    })
    .await?;
    let Some(open) = open else {
        line(format_args!("{name} is drained: nothing is in flight"))?;
        return Ok(Exit::Ok);
    };
    let time = humantime::format_duration(args.timeout);
    let id = args.id.map(|id| format!(" {id}")).unwrap_or_default();
    Err(Failure::new(
        Exit::TimedOut,
        format!("after {time} {open} still open; nothing new is taken"),
    )
    .hint(format_args!("murmesh drain{id}, to wait on; murmesh drain{id} --off, to take it back")))
}

/// Waits until an instance, or all of this machine when absent, has nothing in flight, and says what it
/// still has after `time`. `check` may end it earlier.
pub(super) async fn until_empty(
    client: &Client,
    id: Option<&InstanceId>,
    time: Duration,
    check: impl Fn(&Rotation) -> Result<(), Failure>,
) -> Result<Option<String>, Failure> {
    let mut progress = Progress::default();
    let emptied = timeout(time, async {
        loop {
            let rotation = rotation(client).await?;
            check(&rotation)?;
            let open = open(&rotation, id);
            if open.is_empty() {
                return Ok(());
            }
            progress.show(&open);
            sleep(LOOK_INTERVAL).await;
        }
    })
    .await;
    progress.clear();
    emptied.unwrap_or(Ok(()))?;
    let rotation = rotation(client).await?;
    let open = open(&rotation, id);
    Ok((!open.is_empty()).then(|| told(&open)))
}

async fn end_drain(client: &Client, id: Option<&InstanceId>, name: &str) -> Outcome {
    let drains = |rotation: &Rotation| match id {
        None => rotation.draining,
        Some(id) => {
            let mut rows = rotation.instances.iter();
            rows.any(|row| row.instance == id.as_str() && row.state == "draining")
        }
    };
    let was_out = drains(&rotation(client).await?);
    let query = id.map(|id| format!("?instance={}", encoded(id.as_str())));
    client.act(Method::DELETE, &format!("/v1/mesh/drain{}", query.unwrap_or_default())).await?;
    line(match was_out {
        true => format!("{name} drains no more and takes new connections"),
        false => format!("{name} was not draining"),
    })?;
    // Each way out has its own way back.
    for row in rotation(client).await?.instances {
        let command = match row.state.as_str() {
            "draining" => "drain",
            "maint" => "maint",
            _ => continue,
        };
        let id = row.instance;
        line(format_args!("{id} is still out ({}): murmesh {command} {id} --off", row.state))?;
    }
    Ok(Exit::Ok)
}

async fn rotation(client: &Client) -> Result<Rotation, Failure> {
    client.get("/v1/mesh/drain").await
}

/// Whether what was asked to drain still does.
fn is_out(rotation: &Rotation, id: Option<&InstanceId>) -> bool {
    let Some(id) = id else { return rotation.draining };
    let row = rotation.instances.iter().find(|row| row.instance == id.as_str());
    row.is_none_or(|row| matches!(row.state.as_str(), "draining" | "maint" | "gone"))
}

/// The instances that have something in flight.
fn open<'r>(rotation: &'r Rotation, id: Option<&InstanceId>) -> Vec<&'r OwnInstance> {
    let is_meant = |row: &&OwnInstance| id.is_none_or(|id| row.instance == id.as_str());
    rotation.instances.iter().filter(is_meant).filter(|row| row.inflight > 0).collect()
}

/// `3 connections of web-1 and 1 connection of db are`.
fn told(open: &[&OwnInstance]) -> String {
    let parts: Vec<_> = open
        .iter()
        .map(|row| {
            let number = usize::try_from(row.inflight).unwrap_or(usize::MAX);
            format!("{} of {}", count(number, "connection"), row.instance)
        })
        .collect();
    let is_one = matches!(open, [row] if row.inflight == 1);
    format!("{} {}", parts.join(" and "), if is_one { "is" } else { "are" })
}

/// What a terminal shows while a drain goes on: one line, over and over. Scripts see nothing of it.
#[derive(Default)]
struct Progress {
    is_shown: bool,
}

impl Progress {
    fn show(&mut self, open: &[&OwnInstance]) {
        let mut out = std::io::stderr();
        if out.is_terminal() {
            self.is_shown = true;
            let _ = write!(out, "\r\x1b[K{} open …", told(open)); // nobody looks: fine
            let _ = out.flush();
        }
    }

    fn clear(&self) {
        if self.is_shown {
            let _ = write!(std::io::stderr(), "\r\x1b[K"); // nobody looks: fine
        }
    }
}

/// Takes instances out for maintenance, or back in.
pub(super) async fn maint(global: &Global, args: MaintArgs) -> Outcome {
    let client = &Client::new(global)?;
    let exposed: Vec<ExposeSpec> = client.get("/v1/mesh/expose").await?;
    let ids = meant(&exposed, &args.which);
    let last = if args.off { Vec::new() } else { last_ready(client, &ids).await? };
    let reason = args.reason.map(|reason| format!("&reason={}", encoded(&reason)));
    let query = format!("enable={}{}", !args.off, reason.unwrap_or_default());
    for id in &ids {
        let path = format!("/v1/agent/service/maintenance/{}?{query}", encoded(id.as_str()));
        client.act(Method::PUT, &path).await?;
        match args.off {
            true => line(format_args!("{id} is back from maintenance")),
            false => line(format_args!("{id} is in maintenance: no new connections")),
        }?;
    }
    let rotation = rotation(client).await?;
    let drains = |id: &InstanceId| {
        rotation.draining
            || rotation
                .instances
                .iter()
                .any(|row| row.instance == id.as_str() && row.state == "draining")
    };
    if args.off && ids.iter().any(drains) {
        note(
            "it takes none yet: it drains, too\n  try: murmesh drain --off, with its id or without",
        );
    }
    for service in last {
        let which = &args.which;
        note(format_args!(
            "nobody else is ready to serve {service}: callers are refused\n  \
             try: murmesh maint {which} --off, or start another instance elsewhere"
        ));
    }
    Ok(Exit::Ok)
}

/// The services of which these instances of this machine are all that is ready.
async fn last_ready(client: &Client, ids: &[InstanceId]) -> Result<Vec<String>, Failure> {
    let services: Vec<Service> = client.get("/v1/mesh/services").await?;
    let rotation = rotation(client).await?;
    let goes = |row: &&OwnInstance| {
        row.state == "ready" && ids.iter().any(|id| id.as_str() == row.instance)
    };
    let mut going: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rotation.instances.iter().filter(goes) {
        *going.entry(row.service.as_str()).or_default() += 1;
    }
    let is_last = |row: &&Service| going.get(row.name.as_str()).is_some_and(|n| row.ready <= *n);
    Ok(services.iter().filter(is_last).map(|row| row.name.clone()).collect())
}

/// The instance of that id, else those of the service of that name. What nothing here is called is
/// the agent's to refuse.
fn meant(exposed: &[ExposeSpec], which: &InstanceId) -> Vec<InstanceId> {
    let of_service: Vec<_> = exposed
        .iter()
        .filter(|spec| spec.service.as_str() == which.as_str())
        .map(|spec| spec.id.clone())
        .collect();
    let is_id = exposed.iter().any(|spec| spec.id == *which);
    if is_id || of_service.is_empty() { vec![which.clone()] } else { of_service }
}

/// What a wait saw when it looked last.
enum Seen {
    Reached,
    NotYet(String),
}

/// Waits until the agent or an instance is as it should be.
pub(super) async fn wait(global: &Global, args: WaitArgs) -> Outcome {
    let client = &Client::new(global)?;
    let (id, goal) = (&args.which, args.goal);
    let is_agent = id.as_str() == "agent";
    let mut last = Err(client.no_agent());
    let mut was_there = false;
    let waited = timeout(args.timeout, async {
        loop {
            last = match is_agent {
                true => see_agent(client, goal).await,
                false => see_instance(client, id, goal, &mut was_there).await,
            };
            match &last {
                Ok(Seen::Reached) => return Ok(()),
                Ok(Seen::NotYet(_)) => {}
                Err(failure) if failure.exit == Exit::NoAgent && is_agent => {} // it may be starting
                Err(failure) => return Err(failure.clone()),
            }
            sleep(LOOK_INTERVAL).await;
        }
    })
    .await;
    match (waited, last) {
        (Ok(reached), _) => reached.map(|()| Exit::Ok),
        (Err(_), Err(failure)) => Err(failure),
        (Err(_), Ok(Seen::NotYet(why))) => {
            let time = humantime::format_duration(args.timeout);
            let word = if goal == Goal::Ready { "ready" } else { "empty" };
            let message = format!("{id} is not {word} after {time}: {why}");
            Err(Failure::new(Exit::TimedOut, message))
        }
        (Err(_), Ok(Seen::Reached)) => Ok(Exit::Ok),
    }
}

async fn see_agent(client: &Client, goal: Goal) -> Result<Seen, Failure> {
    match goal {
        Goal::Ready => readiness(client).await,
        Goal::Empty => Ok(emptiness(&open(&rotation(client).await?, None))),
    }
}

async fn readiness(client: &Client) -> Result<Seen, Failure> {
    match client.get::<Value>("/ready").await {
        Ok(_) => Ok(Seen::Reached),
        Err(failure) if failure.kind() == Some("not_ready") => Ok(Seen::NotYet(failure.message)),
        Err(failure) => Err(failure),
    }
}

/// `was_there` says whether it was seen before: what is taken back meanwhile is gone once it is empty.
async fn see_instance(
    client: &Client,
    id: &InstanceId,
    goal: Goal,
    was_there: &mut bool,
) -> Result<Seen, Failure> {
    let rotation = rotation(client).await?;
    let row = rotation.instances.iter().find(|row| row.instance == id.as_str());
    let was_there = std::mem::replace(was_there, row.is_some());
    match (goal, row) {
        (Goal::Empty, Some(_)) => Ok(emptiness(&open(&rotation, Some(id)))),
        (Goal::Empty, None) if was_there => Ok(Seen::Reached),
        // One that is not there has nothing in flight, and so has one that nobody ever meant.
        (_, None) => Err(Failure::failed(format!("there is no instance '{id}' here"))
            .hint("murmesh expose, for those that there are")),
        (Goal::Ready, Some(row)) if row.state == "ready" => readiness(client).await,
        (Goal::Ready, Some(row)) => Ok(Seen::NotYet(format!("it is {}", row.state))),
    }
}

fn emptiness(open: &[&OwnInstance]) -> Seen {
    match open.is_empty() {
        true => Seen::Reached,
        false => Seen::NotYet(format!("{} open", told(open))),
    }
}

/// Makes the agent read its files again.
pub(super) async fn reload(global: &Global) -> Outcome {
    let client = Client::new(global)?;
    let reloaded: Reloaded = client.change(Method::PUT, "/v1/agent/reload", &json!({})).await?;
    let Reloaded { applied, needs_restart } = reloaded;
    for change in &applied {
        line(change)?;
    }
    if applied.is_empty() && needs_restart.is_empty() {
        line("unchanged: the files say what holds already")?;
    }
    for change in &needs_restart {
        note(format_args!("needs a restart of the agent: {change}"));
    }
    Ok(if needs_restart.is_empty() { Exit::Ok } else { Exit::Warning })
}

/// Hides a member that is gone.
pub(super) async fn forget(global: &Global, args: ForgetArgs) -> Outcome {
    let client = Client::new(global)?;
    let path = format!("/v1/agent/force-leave/{}", encoded(&args.node));
    client.act(Method::PUT, &path).await?;
    line(format_args!("{} is hidden from listings here until it is back", args.node))?;
    Ok(Exit::Ok)
}
