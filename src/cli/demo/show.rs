//! What is played: traffic without a pause, and the fate of birch.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::interval;

use super::fetch::fetch;
use super::instances::Service;
use super::picture::{Scene, counts_lines, millis, picture, span, summary_line};
use super::screen::{Ink, Screen};
use super::stage::Stage;
use super::tally::{Call, Ending, GRACE, Tally};
use super::view::View;
use super::{DemoError, failed_output, say};
use crate::cli::exit::Exit;
use crate::model::Moment;
use crate::runtime::clock::Clock;
use crate::runtime::{Shutdown, TaskGroup};

/// 50 requests a second: steady, and far below what one agent carries.
const PACE: Duration = Duration::from_millis(20);
/// A request that takes longer has failed. Also bounds the open ones, to 250 by [`PACE`].
const CALL_PATIENCE: Duration = Duration::from_secs(5);
/// Results that wait for the display. Far more than there are open requests.
const RESULTS_LEN: usize = 1_024;
/// Pictures a second: 10.
const FRAME: Duration = Duration::from_millis(100);
/// Frames in one step of the live curve.
const FRAMES_PER_STEP: u32 = 5;
/// Frames between two lines where there is no terminal.
const FRAMES_PER_LINE: u32 = 20;
/// Requests that a demo with an end must have made, or it proves nothing.
const CALLS_MIN: u64 = 200;
/// Without an end: from the start to the first kill, and from a restart to the next kill.
const KILL_AFTER: Duration = Duration::from_secs(10);
const KILL_AGAIN_AFTER: Duration = Duration::from_secs(30);
const RESTART_AFTER: Duration = Duration::from_secs(6);

/// What is done to the victim next.
#[derive(Clone, Copy)]
enum Act {
    Kill,
    Restart,
}

/// The play and its state.
pub(super) struct Show {
    pub(super) stage: Stage,
    run_for: Option<Duration>,
    clock: Clock,
    /// When traffic began.
    began: Moment,
    /// Requests that were begun.
    begun: u64,
    tally: Tally,
    watched: Watched,
}

/// What has become of the victim, told as it is seen.
#[derive(Default)]
struct Watched {
    kills: u32,
    killed_at: Option<Moment>,
    restarted_at: Option<Moment>,
    last_state: String,
    is_grace_told: bool,
    is_answer_awaited: bool,
}

impl Show {
    pub(super) fn new(run_for: Option<Duration>, clock: Clock) -> Result<Self, DemoError> {
        Ok(Self {
            stage: Stage::new()?,
            run_for,
            clock,
            began: clock.now(),
            begun: 0,
            tally: Tally::default(),
            watched: Watched::default(),
        })
    }

    /// Plays to the end, or for ever. Cancel safe: what was counted stays.
    pub(super) async fn play(&mut self, screen: &mut Screen) -> Result<(), DemoError> {
        let tasks = TaskGroup::new(Shutdown::default());
        let view = self.stage.set_up(screen, &tasks, self.clock).await?;
        self.stage.tell_commands(screen)?;
        self.carry_on(screen, view).await
    }

    /// Traffic, the display, and the fate of birch.
    async fn carry_on(
        &mut self,
        screen: &mut Screen,
        mut view: watch::Receiver<View>,
    ) -> Result<(), DemoError> {
        let calls = TaskGroup::new(Shutdown::default());
        let (results, mut ended) = mpsc::channel(RESULTS_LEN);
        let (mut pace, mut frame) = (interval(PACE), interval(FRAME));
        self.began = self.clock.now();
        self.tally = Tally::new(self.began);
        let mut next = Some((self.began + self.first_kill(), Act::Kill));
        let mut frames = 0_u32;
        while self.run_for.is_none_or(|run_for| self.elapsed() < run_for) {
            tokio::select! {
                biased;
                _ = frame.tick() => {
                    frames = frames.wrapping_add(1);
                    if frames.is_multiple_of(FRAMES_PER_STEP) {
                        self.tally.handle_step();
                    }
                    if let Some((_, act)) = next.filter(|(at, _)| *at <= self.clock.now()) {
                        next = self.act(screen, act)?;
                    }
                    self.stage.check()?;
                    let seen = view.borrow_and_update().clone();
                    self.tell_news(screen, &seen)?;
                    self.show(screen, &seen, frames)?;
                }
                Some(call) = ended.recv() => self.handle_call(screen, call)?,
                _ = pace.tick() => self.call(&calls, &results),
            }
        }
        // What is open may end.
        drop(results);
        while let Some(call) = ended.recv().await {
            self.handle_call(screen, call)?;
        }
        Ok(())
    }

    fn elapsed(&self) -> Duration {
        self.clock.now().since(self.began)
    }

    fn first_kill(&self) -> Duration {
        self.run_for.map_or(KILL_AFTER, |run_for| run_for * 3 / 10)
    }

    /// Begins one request; its result goes to `results`.
    fn call(&mut self, calls: &TaskGroup, results: &mpsc::Sender<Call>) {
        let number = self.begun;
        self.begun += 1;
        let is_clock = number % 5 == 4;
        let (service, entry) = match is_clock {
            true => (Service::Clock, self.stage.clock),
            false => (Service::Greeter, self.stage.greeter),
        };
        let (results, clock, path) = (results.clone(), self.clock, number.to_string());
        calls.spawn_connection("call", async move {
            let begun = clock.now();
            let ending = match fetch(entry, &format!("/{path}"), CALL_PATIENCE).await {
                Err(error) => Ending::Failed(error.to_string()),
                Ok(answer) => {
                    let text = String::from_utf8_lossy(&answer.body);
                    let shown = || text.chars().take(120).collect();
                    match service.node_of(&path, &text) {
                        // The agent's own words: no instance has answered.
                        _ if !answer.status.is_success() => Ending::Failed(shown()),
                        Some(node) => Ending::Right(node.to_owned()),
                        None => Ending::Wrong(shown()),
                    }
                }
            };
            // When nobody counts any more, it does not count.
            let _ = results.send(Call { service, begun, ended: clock.now(), ending }).await;
        });
    }

    fn handle_call(&mut self, screen: &mut Screen, call: Call) -> Result<(), DemoError> {
        let is_birch = matches!(&call.ending, Ending::Right(node) if node == self.stage.birch.name);
        let restarted = self.watched.restarted_at.filter(|at| call.begun >= *at);
        self.tally.handle_call(call);
        match restarted {
            Some(at) if is_birch && std::mem::take(&mut self.watched.is_answer_awaited) => {
                self.stage.outage.end();
                let took = span(self.clock.now().since(at));
                let text = format!("birch answers again, {took} after its start");
                self.note(screen, Ink::Good, &text)
            }
            _ => Ok(()),
        }
    }

    fn note(&self, screen: &mut Screen, ink: Ink, text: &str) -> Result<(), DemoError> {
        let text = screen.ink(ink, text);
        say(screen, format!("{:6.1} s  {text}", self.elapsed().as_secs_f64()))
    }

    /// Kills or restarts birch; says what is next.
    fn act(&mut self, screen: &mut Screen, act: Act) -> Result<Option<(Moment, Act)>, DemoError> {
        match act {
            Act::Kill if !self.stage.outage.try_begin() => {
                // Somebody has just broken the other instance.
                Ok(Some((self.clock.now() + FRAME, Act::Kill)))
            }
            Act::Kill => {
                let birch = &mut self.stage.birch;
                let pid = birch.pid().unwrap_or_default();
                birch.kill();
                let now = self.clock.now();
                self.tally.handle_kill(now);
                let kills = self.watched.kills + 1;
                self.watched = Watched {
                    kills,
                    killed_at: Some(now),
                    last_state: "alive".to_owned(),
                    ..Watched::default()
                };
                let text = format!("kill -9 {pid}: birch is gone, and half of greeter with it");
                self.note(screen, Ink::Bad, &text)?;
                let after = self.run_for.map_or(RESTART_AFTER, |run_for| run_for * 3 / 10);
                Ok(Some((now + after, Act::Restart)))
            }
            Act::Restart => {
                self.note(screen, Ink::Good, "birch starts again: same key, same data directory")?;
                self.stage.birch.start()?;
                let now = self.clock.now();
                self.watched.restarted_at = Some(now);
                self.watched.is_answer_awaited = true;
                let again = self.run_for.is_none();
                Ok(again.then_some((now + KILL_AGAIN_AFTER, Act::Kill)))
            }
        }
    }

    /// Says what has changed about birch since it was killed.
    fn tell_news(&mut self, screen: &mut Screen, view: &View) -> Result<(), DemoError> {
        let Some(killed_at) = self.watched.killed_at else { return Ok(()) };
        let now = self.clock.now();
        if now.since(killed_at) >= GRACE && !self.watched.is_grace_told {
            self.watched.is_grace_told = true;
            let lost = self.tally.cut + self.tally.caught;
            let open = self.begun.saturating_sub(self.tally.all());
            let text = "a second later cedar answers alone; requests";
            let text = format!("{text} lost: {lost}, waiting: {open}");
            self.note(screen, Ink::Strong, &text)?;
        }
        let state = view.state(self.stage.birch.name).unwrap_or("unknown").to_owned();
        if state == self.watched.last_state {
            return Ok(());
        }
        let (since, what) = match self.watched.restarted_at {
            Some(at) => (at, "its start"),
            None => (killed_at, "the kill"),
        };
        let took = span(now.since(since));
        let ink = if state == "alive" { Ink::Good } else { Ink::Doubtful };
        self.note(screen, ink, &format!("ash sees birch {state}, {took} after {what}"))?;
        self.watched.last_state = state;
        Ok(())
    }

    fn show(&mut self, screen: &mut Screen, view: &View, frames: u32) -> Result<(), DemoError> {
        let elapsed = self.elapsed();
        let killed = self.stage.birch.pid().is_none().then_some(self.stage.birch.name);
        let mut scene = Scene {
            view,
            now: self.clock.now(),
            elapsed,
            run_for: self.run_for,
            step_full: FRAMES_PER_STEP * 5, // a frame is five paces long
            seen_by: self.stage.ash.name,
            killed,
            tally: &mut self.tally,
        };
        if screen.is_live() {
            let lines = picture(screen, &mut scene);
            return screen.draw(&lines).map_err(failed_output);
        }
        if !frames.is_multiple_of(FRAMES_PER_LINE) {
            return Ok(());
        }
        let line = summary_line(&mut scene);
        say(screen, format!("{:6.1} s  {line}", elapsed.as_secs_f64()))
    }

    /// Says how it went.
    pub(super) fn conclude(
        &self,
        screen: &mut Screen,
        is_interrupted: bool,
    ) -> Result<Exit, DemoError> {
        let tally = &self.tally;
        if is_interrupted && (tally.all() == 0 || self.run_for.is_some()) {
            say(screen, "Interrupted before its end: no verdict.")?;
            return Ok(Exit::Warning);
        }
        if self.run_for.is_some() && self.watched.kills == 0 {
            say(screen, "Nothing was killed, for something else was broken: no verdict.")?;
            return Ok(Exit::Warning);
        }
        let kills = match self.watched.kills {
            1 => "1 kill".to_owned(),
            kills => format!("{kills} kills"),
        };
        say(screen, format!("{} requests, {kills}:", tally.all()))?;
        for line in counts_lines(screen, tally) {
            say(screen, line)?;
        }
        if let Some((p50, p99)) = tally.latency() {
            say(screen, format!("  latency p50 {}, p99 {}", millis(p50), millis(p99)))?;
        }
        for fault in &tally.faults {
            say(screen, format!("  at {fault}"))?;
        }
        let is_enough = self.run_for.is_none() || tally.all() >= CALLS_MIN;
        if !is_enough {
            say(
                screen,
                format!("Fewer than {CALLS_MIN} requests: this machine is too slow to tell."),
            )?;
        }
        let is_back = self.run_for.is_none() || !self.watched.is_answer_awaited;
        if !is_back {
            say(screen, "birch was started again and has not answered since.")?;
        }
        match tally.is_good() && is_enough && is_back {
            true => {
                let text = "The mesh kept its word: no wrong answer, none lost but at the kill.";
                let text = screen.ink(Ink::Good, text);
                say(screen, text)?;
                Ok(Exit::Ok)
            }
            false => {
                let text = screen.ink(Ink::Bad, "The mesh did not keep its word.");
                say(screen, text)?;
                Ok(Exit::Failed)
            }
        }
    }
}
