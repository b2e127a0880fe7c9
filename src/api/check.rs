//! What is well and what is wrong on this machine and in its mesh, in the shape of
//! `/v1/mesh/check`.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::ApiState;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    /// All is well.
    Pass,
    /// Something works worse than it could, or soon will.
    Warn,
    /// Something does not work.
    Fail,
}

impl CheckStatus {
    /// The word used in tables and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One check and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Which; a word that never changes its meaning.
    pub id: String,
    /// How it ended.
    pub status: CheckStatus,
    /// What was seen.
    pub message: String,
    /// A command, a file or a place where it is put right; empty when it passed.
    pub fix: String,
}

impl Check {
    /// All is well.
    pub fn pass(id: &str, message: impl fmt::Display) -> Self {
        Self::new(id, CheckStatus::Pass, message, "")
    }

    /// Something works worse than it could.
    pub fn warn(id: &str, message: impl fmt::Display, fix: impl fmt::Display) -> Self {
        Self::new(id, CheckStatus::Warn, message, fix)
    }

    /// Something does not work.
    pub fn fail(id: &str, message: impl fmt::Display, fix: impl fmt::Display) -> Self {
        Self::new(id, CheckStatus::Fail, message, fix)
    }

    fn new(
        id: &str,
        status: CheckStatus,
        message: impl fmt::Display,
        fix: impl fmt::Display,
    ) -> Self {
        let (message, fix) = (message.to_string(), fix.to_string());
        Self { id: id.to_owned(), status, message, fix }
    }
}

/// The answer to `/v1/mesh/check`, some time.
pub type Checking = Pin<Box<dyn Future<Output = Vec<Check>> + Send>>;

/// Makes the agent check itself.
#[derive(Clone)]
pub struct Checks(Arc<dyn Fn(ApiState) -> Checking + Send + Sync>);

impl Checks {
    /// Made by `check`.
    pub fn new(check: impl Fn(ApiState) -> Checking + Send + Sync + 'static) -> Self {
        Self(Arc::new(check))
    }

    /// Every check, as it ends now. Takes some seconds where something does not answer.
    pub async fn run(&self, state: ApiState) -> Vec<Check> {
        (self.0)(state).await
    }
}

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Checks")
    }
}
