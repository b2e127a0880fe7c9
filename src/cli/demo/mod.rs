//! `murmesh demo`: a mesh on one machine, with traffic, and an agent that is killed before one's eyes.
//!
//! Three agents run as processes of their own, each with its own keys and data directory, made by the
//! same commands that a user would type. Two of them have sample services behind them; the demo calls
//! these through the third without a pause, and checks every answer.

mod agents;
mod fetch;
mod instances;
mod picture;
mod screen;
mod show;
mod stage;
mod tally;
mod view;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::exit::{Exit, Failure, Outcome};
use crate::runtime::clock::Clock;
use crate::runtime::entropy;

use screen::Screen;
use show::Show;

pub(super) use agents::end_with_parent;

/// Shorter ones could not show an agent die, be missed and come back.
const RUN_FOR_MIN: Duration = Duration::from_secs(10);
/// `murmesh demo`.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct DemoArgs {
    /// End after this time, at least 10s; exit 0 only if no answer was wrong and no request failed
    /// that began later than a second after the kill. Without it the demo runs until Ctrl-C
    #[arg(long = "for", value_name = "TIME", value_parser = run_time)]
    run_for: Option<Duration>,
}

fn run_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text)
        .map_err(|_| "expected a time with a unit, for instance 20s".to_owned())?;
    match time >= RUN_FOR_MIN {
        true => Ok(time),
        false => Err(format!("expected at least {RUN_FOR_MIN:?}: it takes that to see a crash")),
    }
}

/// The demo could not go on. Everything it had started is stopped and removed.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    /// Fault: this machine.
    #[error("cannot {action} {}: {error}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// Fault: this machine.
    #[error("cannot {action}: {error}")]
    System {
        /// What was tried.
        action: &'static str,
        /// What happened.
        error: io::Error,
    },
    /// Fault: this machine.
    #[error("found no free port on 127.0.0.1")]
    NoPort,
    /// Fault: this machine.
    #[error(transparent)]
    Entropy(#[from] entropy::EntropyError),
    /// A command of murmesh failed.
    #[error("murmesh {verb}: {what}")]
    Command {
        /// Which.
        verb: String,
        /// Why.
        what: String,
    },
    /// An agent ended or did not begin.
    #[error("agent {name} {what}; the end of its log:\n{log}")]
    Agent {
        /// Which.
        name: &'static str,
        /// What about it.
        what: String,
        /// Its last lines.
        log: String,
    },
    /// The agents run, and did not find each other.
    #[error("the mesh is not complete after {0:?}: {1}")]
    Incomplete(Duration, String),
}

impl DemoError {
    fn io(action: &'static str, path: &Path, error: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), error }
    }
}

/// Runs the demo. The exit code is 0 if the mesh kept its word, 1 if it was interrupted before its
/// end, 2 if not.
pub(super) async fn run(args: DemoArgs) -> Outcome {
    perform(args).await.map_err(Failure::failed)
}

async fn perform(args: DemoArgs) -> Result<Exit, DemoError> {
    let mut interrupts = Interrupts::new()?;
    let mut screen = Screen::new();
    let clock = Clock::new();
    let mut show = Show::new(args.run_for, clock)?;
    let played = tokio::select! {
        biased;
        () = interrupts.received() => None,
        played = show.play(&mut screen) => Some(played),
    };
    say(
        &mut screen,
        format!("Stopping the agents, removing {} …", show.stage.scratch.path().display()),
    )?;
    tokio::select! {
        biased;
        () = interrupts.received() => {} // a second time: at once
        () = show.stage.stop() => {}
    }
    let is_interrupted = played.is_none();
    played.transpose()?;
    show.conclude(&mut screen, is_interrupted)
}

fn say(screen: &mut Screen, text: impl AsRef<str>) -> Result<(), DemoError> {
    screen.line(text.as_ref()).map_err(failed_output)
}

fn failed_output(error: io::Error) -> DemoError {
    DemoError::System { action: "write to standard output", error }
}

/// Ctrl-C and its relatives.
struct Interrupts([Signal; 3]);

impl Interrupts {
    fn new() -> Result<Self, DemoError> {
        let listen = |kind| {
            signal(kind).map_err(|error| DemoError::System { action: "listen to signals", error })
        };
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [a, b, c] = kinds.map(listen);
        Ok(Self([a?, b?, c?]))
    }

    /// Returns when one arrives. Cancel safe.
    async fn received(&mut self) {
        let [a, b, c] = &mut self.0;
        tokio::select! { _ = a.recv() => {}, _ = b.recv() => {}, _ = c.recv() => {} }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_short_a_demo_is_refused() {
        assert_eq!(run_time("20s"), Ok(Duration::from_secs(20)));
        assert!(run_time("5s").unwrap_err().contains("at least 10s"));
        assert!(run_time("20").unwrap_err().contains("unit"));
    }
}
