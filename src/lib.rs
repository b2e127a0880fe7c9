//! murmesh: a service mesh with nothing in the middle.
//!
//! Each machine runs one agent. Agents find each other by SWIM gossip, prove who they are with
//! certificates of their own mesh, tell each other what they serve in signed records, and carry
//! traffic between applications over QUIC with mutual TLS 1.3.
//!
//! # The map
//!
//! Imports go down only; `tests/architecture.rs` holds this list as data.
//!
//! | layer | modules | what lives there |
//! |---|---|---|
//! | L0 | [`model`], [`wire`] | nouns; the one codec |
//! | L1 | [`membership`], [`catalogue`], [`balancer`] | pure state machines, unaware of each other |
//! | L2 | [`mesh`] | the machines of L1 joined into one pure node: what simulations drive |
//! | L3 | [`runtime`], [`telemetry`], [`tls`] | clock, tasks, shutdown; logs, metrics; certificates |
//! | L4 | [`transport`] | one UDP port, QUIC, mutual TLS; the gossip driver |
//! | L5 | [`proxy`] | the data plane: local connection in, tunnel out, local instance |
//! | L6 | [`api`], [`config`] | local HTTP API; what the user wrote, checked |
//! | L7 | [`agent`] | wiring and life cycle |
//! | L8 | [`cli`] | one file per verb family; talks to a running agent through the API |
//!
//! L0 to L2 know no clock, socket, thread, lock or `async`: time is an argument, randomness is
//! passed in, and the same code runs in the agent, in tests and in simulations.

pub mod model;
pub mod wire;

pub mod balancer;
pub mod catalogue;
pub mod membership;

pub mod mesh;

pub mod runtime;
pub mod telemetry;
pub mod tls;

pub mod transport;

pub mod proxy;

pub mod api;
pub mod config;

pub mod agent;

pub mod cli;
