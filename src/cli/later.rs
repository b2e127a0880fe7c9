//! What later versions bring: named here, so that a command line that asks for it gets a clear answer
//! instead of "unknown", and nothing is taken and ignored.

use clap::error::{ContextKind, ContextValue, Error, ErrorKind};

use super::exit::Failure;

const VERBS: &[&str] = &[
    "stat", "top", "tap", "edges", "explain", "policy", "split", "switch", "canary", "fault",
    "limit", "revoke", "rotate", "operator", "record", "replay", "sim",
];

const FLAGS: &[&str] = &["--deny", "--allow", "--client", "--dns", "--operator-key"];

/// The answer to a command line that only a later version understands.
pub(super) fn not_yet(error: &Error) -> Option<Failure> {
    let (kind, known) = match error.kind() {
        ErrorKind::InvalidSubcommand => (ContextKind::InvalidSubcommand, VERBS),
        ErrorKind::UnknownArgument => (ContextKind::InvalidArg, FLAGS),
        _ => return None,
    };
    let Some(ContextValue::String(word)) = error.get(kind) else { return None };
    let word = word.split(['=', ' ']).next()?;
    known.contains(&word).then(|| Failure::not_yet(format_args!("'{word}'")))
}
