//! Logs: one line an event, on standard error.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::error;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

use super::LineQueue;
use crate::runtime::ThreadError;

/// Lines kept for a bundle: some minutes of a busy agent.
const TAIL_LINES_MAX: usize = 512;
/// Bytes kept of each; ours are some 200.
const TAIL_LINE_LEN_MAX: usize = 512;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The log of this process. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Log {
    lines: LineQueue,
    tail: Tail,
    filter: reload::Handle<EnvFilter, Registry>,
}

impl Log {
    /// The queue of lines for standard error: whoever else writes there puts lines into it, too, and
    /// flushes it at the end.
    pub fn lines(&self) -> &LineQueue {
        &self.lines
    }

    /// From now on only what `filter` lets through is logged.
    pub fn set_filter(&self, filter: &str) -> Result<(), LoggingError> {
        let parsed = parse(filter)?;
        self.filter.reload(parsed).map_err(|_| LoggingError::Ended)
    }

    /// What is let through now.
    pub fn filter(&self) -> String {
        self.filter.with_current(EnvFilter::to_string).unwrap_or_default()
    }

    /// The last lines, at most 256 KiB.
    pub fn tail(&self) -> String {
        self.tail.text()
    }
}

/// The last lines of the log, for whoever asks later what happened.
#[derive(Clone, Debug, Default)]
struct Tail(Arc<Mutex<VecDeque<Vec<u8>>>>);

impl Tail {
    fn push(&self, line: &[u8]) {
        let mut lines = self.0.lock();
        lines.push_back(line[..line.len().min(TAIL_LINE_LEN_MAX)].to_vec());
        if lines.len() > TAIL_LINES_MAX {
            lines.pop_front();
        }
    }

    fn text(&self) -> String {
        let lines = self.0.lock();
        lines.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect()
    }
}

/// Writes each event to both.
struct Writer {
    lines: LineQueue,
    tail: Tail,
}

impl Write for Writer {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.tail.push(line);
        self.lines.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// Fault: whoever wrote the filter.
    #[error("log filter '{filter}' is not understood: expected {expected}")]
    Filter {
        /// As written.
        filter: String,
        /// What would be.
        expected: &'static str,
    },
    /// Another subscriber took its place.
    #[error("logging has ended")]
    Ended,
    /// Fault: the program; the first start holds.
    #[error("logging was started before")]
    Twice,
    /// Fault: the system.
    #[error(transparent)]
    Thread(#[from] ThreadError),
}

/// Checks that this is a level (`info`) or levels per module (`warn,murmesh=debug`).
///
/// # Errors
/// What is expected instead.
pub fn check_filter(filter: &str) -> Result<(), &'static str> {
    read(filter).map(|_| ())
}

/// The parser of filters takes a lone word that is no level for a module: `debg` would silence everything.
fn read(filter: &str) -> Result<EnvFilter, &'static str> {
    let is_level = |word: &str| !word.is_empty() && word.parse::<LevelFilter>().is_ok();
    let is_part = |part: &str| match part.rsplit_once('=') {
        Some((module, level)) => !module.is_empty() && is_level(level),
        None => is_level(part),
    };
    let read = EnvFilter::try_new(filter).ok().filter(|_| filter.split(',').all(is_part));
    read.ok_or(
        "a level (off, error, warn, info, debug, trace) or levels per module (warn,murmesh=debug)",
    )
}

fn parse(filter: &str) -> Result<EnvFilter, LoggingError> {
    read(filter).map_err(|expected| LoggingError::Filter { filter: filter.to_owned(), expected })
}

/// Starts logging for this process. `filter` is a level (`info`) or per-module levels
/// (`warn,murmesh=debug`).
pub fn init(filter: &str, format: LogFormat) -> Result<Log, LoggingError> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let queue = LineQueue::start("log", std::io::stderr())?;
    let log = Log { lines: queue, tail: Tail::default(), filter: handle };
    let (lines, tail) = (log.lines.clone(), log.tail.clone());
    let registry = tracing_subscriber::registry().with(filter);
    let writer = move || Writer { lines: lines.clone(), tail: tail.clone() };
    let lines = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        LogFormat::Text => {
            let is_terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
            registry.with(lines.with_ansi(is_terminal)).try_init()
        }
        LogFormat::Json => registry.with(lines.json()).try_init(),
    }
    .map_err(|_| LoggingError::Twice)?;
    // The usual hook writes to standard error itself, on the thread that panicked.
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let what = panic.to_string().replace('\n', " ");
        error!(thread = thread.name(), what, "panicked");
    }));
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_keeps_the_last_lines_within_its_bound() {
        let tail = Tail::default();
        for number in 0..TAIL_LINES_MAX + 3 {
            tail.push(format!("{number}\n").as_bytes());
        }
        tail.push(&[b'x'; 2 * TAIL_LINE_LEN_MAX]);
        let text = tail.text();
        assert!(text.starts_with("4\n5\n"), "the oldest are gone");
        assert_eq!(text.lines().count(), TAIL_LINES_MAX);
        assert!(text.len() <= TAIL_LINES_MAX * TAIL_LINE_LEN_MAX);
    }
}
