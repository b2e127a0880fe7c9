//! The integration tests: one binary, one link.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs, unreachable_pub)]
// Real processes run on the real clock and beside real threads.
#![allow(clippy::disallowed_methods)]

mod api;
mod architecture;
mod attacking;
mod balancing;
mod breaking;
mod checking;
mod cli;
mod compromised;
mod config_files;
mod consul;
mod deploying;
mod dismissing;
mod embedding;
mod gateway;
mod healthy;
mod hostile;
mod http;
mod joining;
mod operating;
mod partitions;
mod reaching;
mod renewing;
mod replacing;
mod sixteen;
mod support;
mod surviving;
mod tunnelling;
