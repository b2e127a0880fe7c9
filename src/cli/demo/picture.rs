//! What the live display shows.

use std::time::Duration;

use super::instances::Service;
use super::screen::{Ink, Screen};
use super::tally::{STEPS_MAX, Step, Tally};
use super::view::{MemberRow, View};
use crate::model::Moment;

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Everything a picture is made of.
pub(super) struct Scene<'a> {
    pub(super) view: &'a View,
    pub(super) tally: &'a mut Tally,
    pub(super) now: Moment,
    /// Since traffic began.
    pub(super) elapsed: Duration,
    pub(super) run_for: Option<Duration>,
    /// Requests of one step of the curve, when all is well.
    pub(super) step_full: u32,
    /// Who sees it so.
    pub(super) seen_by: &'static str,
    /// Nodes whose process is gone, by our own hand.
    pub(super) killed: Option<&'static str>,
}

/// The picture for a terminal. No line is longer than 78 characters.
pub(super) fn picture(screen: &Screen, scene: &mut Scene<'_>) -> Vec<String> {
    let quiet = |text: String| screen.ink(Ink::Quiet, &text);
    let mut lines = vec![String::new()];
    let seen_by = format!("as {} sees them", scene.seen_by);
    lines.push(quiet(format!("  {:<12} {:<13} {:<26} {seen_by}", "MEMBER", "STATE", "SERVES")));
    for member in &scene.view.members {
        lines.push(member_line(screen, member, scene.killed));
    }
    lines.push(String::new());
    lines.push(quiet(format!(
        "  {:<12} {:<13} {}",
        "SERVICE", "READY", "ANSWERS IN THE LAST SECOND"
    )));
    for service in [Service::Greeter, Service::Clock] {
        lines.push(service_line(screen, service, scene));
    }
    lines.push(String::new());
    lines.push(curve_line(screen, scene));
    lines.push(counts_line(screen, scene.tally));
    let time = format!("{:.0} s", scene.elapsed.as_secs_f64());
    let until = match scene.run_for {
        Some(run_for) => format!("{time} of {:.0} s", run_for.as_secs_f64()),
        None => time,
    };
    lines.push(quiet(format!("  {until}; Ctrl-C stops everything and cleans up")));
    lines
}

/// The same in one line, for a pipe.
pub(super) fn summary_line(scene: &mut Scene<'_>) -> String {
    let members = scene.view.members.iter().map(|row| format!("{} {}", row.name, row.state));
    let members: Vec<_> = members.collect();
    let services: Vec<_> = [Service::Greeter, Service::Clock]
        .map(|service| {
            let (ready, instances) = scene.view.ready(service.name());
            format!("{} {ready}/{instances}", service.name())
        })
        .into();
    let rate: u32 = [Service::Greeter, Service::Clock]
        .map(|service| scene.tally.recent(scene.now, service).values().sum::<u32>())
        .iter()
        .sum();
    format!("{} | {} | {rate} answers/s", members.join(", "), services.join(", "))
}

fn member_line(screen: &Screen, member: &MemberRow, killed: Option<&str>) -> String {
    let ink = match member.state.as_str() {
        "alive" => Ink::Good,
        "down" => Ink::Bad,
        _ => Ink::Doubtful,
    };
    let is_killed = killed == Some(member.name.as_str());
    let services = match member.services.is_empty() {
        true => "–".to_owned(),
        false => member.services.join(" "),
    };
    let note = if is_killed { screen.ink(Ink::Bad, "killed") } else { String::new() };
    let state = screen.ink(ink, &format!("● {:<11}", member.state));
    format!("  {:<12} {state} {services:<26} {note}", member.name)
}

fn service_line(screen: &Screen, service: Service, scene: &mut Scene<'_>) -> String {
    let (ready, instances) = scene.view.ready(service.name());
    let ink = match (ready, instances) {
        (0, _) => Ink::Bad,
        (ready, all) if ready < all => Ink::Doubtful,
        _ => Ink::Good,
    };
    let ready = screen.ink(ink, &format!("● {:<11}", format!("{ready} of {instances}")));
    let answers = scene.tally.recent(scene.now, service);
    let by: Vec<_> = answers.iter().map(|(node, count)| format!("{node} {count}")).collect();
    format!("  {:<12} {ready} {}", service.name(), by.join("   "))
}

fn curve_line(screen: &Screen, scene: &Scene<'_>) -> String {
    let steps = scene.tally.steps().count();
    let blank = " ".repeat(STEPS_MAX.saturating_sub(steps));
    let curve: String =
        scene.tally.steps().map(|step| bar(screen, step, scene.step_full)).collect();
    let latency = match scene.tally.latency_recent() {
        Some((p50, p99)) => format!("p50 {}  p99 {}", millis(p50), millis(p99)),
        None => String::new(),
    };
    format!("  {curve}{blank}  {latency}")
}

fn bar(screen: &Screen, step: Step, full: u32) -> String {
    let level = (step.right * 7).div_ceil(full.max(1)).min(7);
    let bar = BARS.get(level as usize).copied().unwrap_or(' ').to_string();
    screen.ink(if step.bad == 0 { Ink::Good } else { Ink::Bad }, &bar)
}

fn counts_line(screen: &Screen, tally: &Tally) -> String {
    let counts = counts(tally).map(|(count, what, ink, _)| {
        let text = format!("{count} {what}");
        if count == 0 { text } else { screen.ink(ink, &text) }
    });
    format!("  {}", counts.join("   "))
}

/// What became of all requests, one line each.
pub(super) fn counts_lines(screen: &Screen, tally: &Tally) -> Vec<String> {
    let lines = counts(tally).map(|(count, what, ink, meaning)| {
        let text = format!("{count:>9} {what:<8}");
        let text = if count == 0 { text } else { screen.ink(ink, &text) };
        format!("{text}{}", screen.ink(Ink::Quiet, meaning)).trim_end().to_owned()
    });
    lines.into()
}

fn counts(tally: &Tally) -> [(u64, &'static str, Ink, &'static str); 5] {
    [
        (tally.right, "right", Ink::Good, ""),
        (tally.wrong, "wrong", Ink::Bad, ""),
        (tally.cut, "cut", Ink::Doubtful, "in flight at the kill"),
        (
            tally.caught,
            "caught",
            Ink::Doubtful,
            "sent to the dead agent in the second after the kill, and reset",
        ),
        (tally.failed, "failed", Ink::Bad, "at any other time"),
    ]
}

/// `120 ms`, and from a second on `1.2 s`.
pub(super) fn span(time: Duration) -> String {
    match time < Duration::from_secs(1) {
        true => format!("{} ms", time.as_millis()),
        false => format!("{:.1} s", time.as_secs_f64()),
    }
}

/// `0.9 ms`.
pub(super) fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1_000.0)
}
