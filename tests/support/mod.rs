//! What the black-box tests share: real agents on loopback, test servers, clients, waiting.
//!
//! Nothing here sleeps and hopes: [`eventually`] polls a condition until a deadline, and every
//! process and server ends with the value that owns it, also when a test panics.

mod agent;
pub mod backends;
mod bytes;
mod clients;
mod http;
mod mesh;
mod namespaces;
mod ports;
mod programs;
mod python;
mod servers;
mod strangers;
pub mod turncoat;
mod turns;

use std::time::{Duration, Instant};

pub use agent::{Agent, Ran};
pub use bytes::{Noise, digest};
pub use clients::{ask, expect_echo, p50, runtime, socks, socks_relay};
pub use http::{At, request, request_raw};
pub use mesh::{TestMesh, enrol};
pub use namespaces::Network;
pub use ports::{free_address, free_port};
pub use programs::{Program, find, run_program};
pub use python::python;
pub use servers::{Kind, Server};
pub use strangers::{Flooder, dial, leaf, nobody, showing, trusting};
pub use turns::{alone, beside_others, calmly};

/// Whether the long forms of the tests are asked for (`MURMESH_LONG=1`).
pub fn is_long() -> bool {
    std::env::var_os("MURMESH_LONG").is_some_and(|value| value != "0")
}

/// One of two sizes: the short run's, or the one of `MURMESH_LONG=1`.
pub fn sized<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}

/// Whether a skipped test would hide something: nobody reads the output of a CI run that passed.
pub fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false")
}

/// Says why a test cannot run here; in CI that is a failure.
pub fn skip(why: &str) {
    assert!(!is_ci(), "CI cannot skip this test: {why}");
    eprintln!("SKIPPED: {why}");
}

/// How long something may take here that promises to take at most `limit`: the promise holds for
/// the build that users run; one with checks and little optimization, as the default test run has,
/// gets five times as long.
pub fn within(limit: Duration) -> Duration {
    if cfg!(debug_assertions) { limit * 5 } else { limit }
}

/// How long anything may take that should happen at once. No claim: nothing waits for it where all
/// is well, and a loaded machine is not a fault.
pub const SOON: Duration = Duration::from_secs(60);

/// How many of a crowd may be opening their connections in one moment. A test's server has room for
/// 4,096 that wait to be accepted (Linux' default), and who is not accepted within two seconds is
/// refused: a debug build on a slow machine cannot promise that to 5,000, one of release can.
pub const OPENING_MAX: usize = if cfg!(debug_assertions) { 1_000 } else { 5_000 };

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Waits until `condition` holds and tells how long that took. Fails after `limit` with what was
/// seen last.
#[track_caller]
pub fn eventually(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<(), String>,
) -> Duration {
    let started = Instant::now();
    loop {
        let seen = match condition() {
            Ok(()) => return started.elapsed(),
            Err(seen) => seen,
        };
        let waited = started.elapsed();
        assert!(waited < limit, "not within {limit:?}: {what}; last seen: {seen}");
        std::thread::park_timeout(POLL);
    }
}

/// Waits for a moment that the test itself chose: the length of a fault, of a load, of a ttl.
pub fn until(moment: Instant) {
    while let Some(left) = moment.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) {
        std::thread::park_timeout(left);
    }
}

/// `Ok` when `holds`, else what was seen.
pub fn check(holds: bool, seen: impl std::fmt::Debug) -> Result<(), String> {
    if holds { Ok(()) } else { Err(format!("{seen:?}")) }
}

/// Lets this process, and the agents it starts, open as many files as the machine allows.
pub fn raise_file_limit(needed: u64) -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(u64::MAX);
    let wanted = needed.max(limit.current.unwrap_or(u64::MAX)).min(most);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.is_none_or(|granted| granted >= needed)
}
