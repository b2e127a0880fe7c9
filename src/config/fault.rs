//! What is wrong with what the user wrote: all of it at once, each fault with its place.

use std::fmt;
use std::path::{Path, PathBuf};

use super::Origin;

/// One thing that is wrong. Fault: whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where it was written.
    pub origin: Origin,
    /// For instance `expose[1].to`; empty when the file is no TOML.
    pub key: String,
    /// As written, cut short.
    pub value: Option<String>,
    /// What is wrong, and what was expected instead.
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.origin)?;
        match (&self.value, self.key.is_empty()) {
            (_, true) => {}
            (Some(value), _) => write!(f, "{} = {value}: ", self.key)?,
            (None, _) => write!(f, "{}: ", self.key)?,
        }
        f.write_str(&self.message)
    }
}

/// The configuration cannot be used. Nothing was started or changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Fault: whoever wrote it. Never empty; by file in the order they were read, then by line, and
    /// flags last.
    #[error("{}", lines(.0))]
    Faults(Vec<Fault>),
    /// Fault: this machine or its operator.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        error: String,
    },
    /// A file of the data directory cannot be used; the text names it. Fault: this machine.
    #[error("{0}")]
    DataDir(String),
    /// There is no home directory to put it below.
    #[error("no data directory is known: set --data-dir or MURMESH_DATA_DIR")]
    NoDataDir,
}

impl ConfigError {
    /// Nothing is wrong, or all of it, in the order in which people read `files`.
    pub(super) fn check(mut faults: Vec<Fault>, files: &[PathBuf]) -> Result<(), Self> {
        if faults.is_empty() {
            return Ok(());
        }
        faults.sort_by_key(|fault| match &fault.origin {
            Origin::File { path, line } => {
                let file = files.iter().position(|file| *file == **path);
                (file.unwrap_or(files.len()), *line)
            }
            _ => (files.len(), 0),
        });
        Err(Self::Faults(faults))
    }

    /// A file that cannot be read.
    pub(super) fn unreadable(path: &Path, error: impl ToString) -> Self {
        Self::Unreadable { path: path.to_owned(), error: error.to_string() }
    }
}

fn lines(faults: &[Fault]) -> String {
    let count = match faults.len() {
        1 => "1 fault in the configuration".to_owned(),
        len => format!("{len} faults in the configuration"),
    };
    faults.iter().fold(count, |text, fault| format!("{text}\n  {fault}"))
}
