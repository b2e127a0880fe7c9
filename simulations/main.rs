//! Whole meshes of pure nodes in virtual time on a hostile network.
//!
//! The same seed gives the same run. `MURMESH_SEED=7` repeats one run, `MURMESH_SEEDS=20` makes each
//! scenario run with 20 seeds (otherwise 2, and 1 with over 64 members). Each scenario prints a line with
//! its figures (`cargo test --test simulations -- --nocapture`).

#![allow(clippy::expect_used)] // a simulation that cannot go on has failed

mod agents;
mod figures;
mod invariants;
mod network;
mod world;

mod at_rest;
mod breaker;
mod crash_is_detected;
mod deaf_observers;
mod load_of_others;
mod newcomer_learns_all;
mod one_way_cut;
mod partition_heals;
mod record_spreads;
mod restarts;
mod same_seed_same_run;
mod small_meshes;
mod storm_of_loss;
