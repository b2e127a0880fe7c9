//! How a command ends: the exit codes that scripts rely on, and what people read.

use std::fmt;
use std::process::ExitCode;

/// Exit codes. They never change their meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Exit {
    /// Done; an empty list is done, too.
    Ok = 0,
    /// A warning, or the answer "no".
    Warning = 1,
    /// It failed.
    Failed = 2,
    /// It took too long.
    TimedOut = 3,
    /// The command line is wrong, or asks for what this version cannot do.
    Usage = 64,
    /// No agent answers.
    NoAgent = 69,
    /// Somebody else may do this.
    NotPermitted = 77,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) exit: Exit,
    pub(super) message: String,
    hint: Option<String>,
    /// The word of the agent's problem, if it is the agent that refused.
    kind: Option<String>,
}

/// What a command returns.
pub(super) type Outcome = Result<Exit, Failure>;

impl Failure {
    pub(super) fn new(exit: Exit, message: impl ToString) -> Self {
        Self { exit, message: message.to_string(), hint: None, kind: None }
    }

    pub(super) fn failed(message: impl ToString) -> Self {
        Self::new(Exit::Failed, message)
    }

    pub(super) fn usage(message: impl ToString) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// Something that is planned and this version does not have.
    pub(super) fn not_yet(what: impl fmt::Display) -> Self {
        Self::usage(format!("{what} is not available yet in this version"))
    }

    /// As the agent named it: `urn:murmesh:<word>`.
    pub(super) fn of_kind(mut self, urn: &str) -> Self {
        self.kind = urn.strip_prefix("urn:murmesh:").map(str::to_owned);
        self
    }

    /// The word by which the agent named it.
    pub(super) fn kind(&self) -> Option<&str> {
        self.kind.as_deref()
    }

    /// What follows from it.
    pub(super) fn and(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{}; {what}", self.message);
        self
    }

    /// What to try.
    pub(super) fn hint(mut self, hint: impl ToString) -> Self {
        self.hint = Some(hint.to_string());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "murmesh: {}", self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "\n  try: {hint}"),
            None => Ok(()),
        }
    }
}
