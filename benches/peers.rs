//! murmesh beside what else there is: HAProxy, nginx, stunnel and Envoy as pairs with mutual TLS
//! between them, and serf.
//!
//!     cargo bench --bench peers                   # speed and memory
//!     cargo bench --bench peers -- speed          # one part: speed, memory, serf, serf-16, ...
//!     cargo bench --bench peers -- --quick        # short rounds, whose figures are rough
//!     cargo bench --bench peers -- --check        # fails when a limit is missed
//!
//! Programs that are not installed are fetched where that is possible, and else said to be not
//! compared. `docs/comparison.md` says how it is measured, and what came out.

#![allow(clippy::disallowed_methods)] // a benchmark reads the clock

mod side_by_side;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    side_by_side::run(&["speed", "memory"])
}
