//! Whole agents: the real `Agent`, with its quinn, its rustls and its proxies, on simulated machines.
//!
//! Every run checks the eight invariants. After each 20 ms: members that reach each other list each
//! other (a) and use each other's instances (d), after at most T_probe; a member says one thing under
//! one number (b), and nobody's knowledge of it goes back (c); stores that peers fill are under their
//! caps (f); retries are few (h). At every byte: each application and each caller reads an exact
//! prefix, once, and an end only after all (e). When an agent has stopped: no task and no socket of
//! it is left (g).

mod fleet;
mod invariants;
mod ledger;
mod links;
mod machine;
mod node;
mod partitions;
mod scenarios;
mod transfers;
mod versions;
mod walk;
