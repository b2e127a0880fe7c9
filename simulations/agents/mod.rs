//! Whole agents: the real `Agent`, with its quinn, its rustls and its proxies, on simulated machines.
//!
//! Every run checks after each 20 ms that no agent's knowledge of a member goes back (c), and at every
//! byte that each application and each caller reads an exact prefix, once (e); and when an agent has
//! stopped, that no task of it is left (g).

mod fleet;
mod ledger;
mod machine;
mod scenarios;
