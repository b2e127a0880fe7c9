//! murmesh: a service mesh with nothing in the middle.
//!
//! Each machine runs one agent. Agents find each other by SWIM gossip, prove who they are with
//! certificates of their own mesh, tell each other what they serve in signed records, and carry
//! traffic between applications over QUIC with mutual TLS 1.3.
//!
//! # Where to begin
//!
//! Most people run the agent as a program, `murmesh`; the README tells how. A program can also be a
//! member by itself, with an [`Agent`] inside it: [`Agent::found`] begins a mesh, [`Agent::join`] joins
//! one, [`Agent::expose`] offers an instance of a service, [`Agent::dial`] calls a service by its name,
//! [`Agent::watch`] follows what comes and goes, and [`Agent::stop`] lets what is open end.
//!
//! ```
//! use std::time::Duration;
//! use murmesh::{Agent, DataDir, ExposeSpec, MemberPhase, ServiceName, Settings, Target};
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//! use tokio::net::TcpListener;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (dir_a, dir_b) = (tempfile::tempdir()?, tempfile::tempdir()?);
//! // Two members on one machine; on two machines: Settings::machine instead of Settings::local.
//! let settings = Settings::local(DataDir::new(dir_a.path())).with_name("a".parse()?);
//! let a = Agent::found(settings).await?;
//! let token = a.invite(Duration::from_secs(60), 1).await?.token;
//! let settings = Settings::local(DataDir::new(dir_b.path())).with_name("b".parse()?);
//! let b = Agent::join(settings, &token).await?;
//!
//! // What a serves is an ordinary server; b calls it by its name.
//! let server = TcpListener::bind("127.0.0.1:0").await?;
//! let greeter: ServiceName = "greeter".parse()?;
//! a.expose(ExposeSpec::new(greeter.clone(), Target::Tcp(server.local_addr()?))?).await?;
//! let service = greeter.clone();
//! b.watch(move |mesh| mesh.ready(&service).count()).wait_for(|count| *count == 1).await;
//! let mut call = b.dial(&greeter).await?;
//! call.write_all(b"who are you?").await?;
//! call.shutdown().await?; // the end of what b says
//!
//! let (mut called, _) = server.accept().await?;
//! let (mut question, mut answer) = (String::new(), String::new());
//! called.read_to_string(&mut question).await?;
//! called.write_all(b"a greeter").await?;
//! drop(called);
//! call.read_to_string(&mut answer).await?;
//! assert_eq!((question.as_str(), answer.as_str()), ("who are you?", "a greeter"));
//!
//! for agent in [a, b] {
//!     agent.stop(MemberPhase::Restarting, Duration::from_secs(5)).await;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `examples/` has one program for each of these. The names that an embedding program needs are at the
//! root of the crate; the modules below are the agent's inside, public for tests and the curious, and
//! change more often.
//!
//! # The map
//!
//! Imports go down only; `tests/architecture.rs` holds this list as data.
//!
//! | layer | modules | what lives there |
//! |---|---|---|
//! | L0 | [`model`], [`wire`] | nouns; the one codec |
//! | L1 | [`membership`], [`catalogue`], [`health`], [`breaker`], [`balancer`] | pure state machines, unaware of each other |
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
pub mod breaker;
pub mod catalogue;
pub mod health;
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

pub use agent::{Agent, JoinError, JoinOptions, JoinReport, StartError, Stopped, Watch, join};
pub use api::{ControlError, ExposeSpec, InviteMade};
pub use config::{Seed, Settings};
pub use mesh::{Endpoint, EndpointState, MemberView, NoEndpoint, ServiceView, Snapshot};
pub use model::{
    InstanceId, MemberId, MemberName, MemberPhase, MemberState, NameError, ServiceName, Target,
    Unlisted, Weight,
};
pub use proxy::{CheckSpec, DialError, MeshStream};
pub use tls::store::{DataDir, InitOptions, InitReport, StoreError, init};
