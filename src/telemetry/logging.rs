//! Logs: one line an event, on standard error.

use tracing::error;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::LineQueue;
use crate::runtime::ThreadError;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// Fault: whoever wrote the filter.
    #[error("log filter '{filter}' is not understood: {error}")]
    Filter {
        /// As written.
        filter: String,
        /// Why.
        error: String,
    },
    /// Fault: the program; the first start holds.
    #[error("logging was started before")]
    Twice,
    /// Fault: the system.
    #[error(transparent)]
    Thread(#[from] ThreadError),
}

/// Starts logging for this process. `filter` is a level (`info`) or per-module levels
/// (`warn,murmesh=debug`). Returns the queue of lines for standard error: whoever else writes there
/// puts lines into it, too, and flushes it at the end.
pub fn init(filter: &str, format: LogFormat) -> Result<LineQueue, LoggingError> {
    let parsed = EnvFilter::try_new(filter).map_err(|error| LoggingError::Filter {
        filter: filter.to_owned(),
        error: error.to_string(),
    })?;
    let queue = LineQueue::start("log", std::io::stderr())?;
    let writer = queue.clone();
    let registry = tracing_subscriber::registry().with(parsed);
    let lines = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
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
    Ok(queue)
}
