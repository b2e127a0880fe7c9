//! The local HTTP API: what this machine's people and programs ask of the agent.
//!
//! Reads come from snapshots and disturb nobody; changes go to the agent through [`control`]. Every
//! request passes one door first (`door.rs`), every refusal is a problem (RFC 9457) and is counted.

mod blocking;
pub mod breakers;
pub mod calls;
mod check;
mod consul;
pub mod control;
mod door;
mod effective;
mod events;
mod openapi;
mod outlook;
mod problem;
mod routes;
mod server;
mod state;
pub mod views;

pub use check::{Check, CheckStatus, Checking, Checks};
pub use control::{
    Control, ControlError, Drain, ExposeSpec, InviteMade, Lifetime, Maintenance, OutOfRotation,
    Reloaded, UpstreamSelector, UpstreamSpec,
};
pub use effective::{UNTIL_RESTART, of_upstream};
pub use problem::Problem;
pub use routes::{
    DrainRequest, ExposeRequest, Exposed, GrantRequest, InviteRequest, KeepRequest, LogRequest,
    routes,
};
pub use server::{ADDRESS_FILE, Listener, SOCKET_FILE, serve};
pub use state::{
    ApiState, ApiToken, CallView, Calls, Doors, Effective, Identity, Links, Local, LogSlot, Pinger,
    Pinging, Readiness, SettingView,
};
