//! What two agents between a client and a server cost, against no agents at all, and against a pair
//! of HAProxies with mutual TLS where HAProxy is installed: part `tunnel` of the bench `peers`.
//!
//! `cargo bench --bench tunnel` builds and runs the shipped binary (profile `dist`, identity and
//! metrics on) as two processes; client and server are processes of their own. The ways are measured
//! in turn, round after round, and every figure is the median of all rounds; ratios are of figures
//! of the same run. Each limit is printed as held, missed or not compared; `-- --check` fails when
//! one is missed, and with `CI=true` when one is not compared; a failed request in any round always
//! fails. `-- --quick` makes three short rounds, whose figures are rough.

#![allow(clippy::disallowed_methods)] // a benchmark reads the clock

mod side_by_side;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    side_by_side::run(&["tunnel"])
}
