//! An agent inside a program: its own service, its own identity over restarts, and an orderly end.
//!
//!     cargo run --example embed_agent

mod common;

use std::time::Duration;

use common::{Outcome, ask};
use murmesh::{Agent, DataDir, ExposeSpec, MemberPhase, ServiceName, Settings, Stopped, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Outcome {
    // A real program has a directory that stays, and Settings::machine.
    let dir = tempfile::tempdir()?;
    let settings = || Settings::local(DataDir::new(dir.path()));
    let first = Agent::found(settings()).await?;
    println!("first start: member {} of mesh {}", first.name(), first.credentials().mesh().short());
    first.stop(MemberPhase::Restarting, Duration::from_secs(5)).await;

    let agent = Agent::found(settings()).await?; // the same call: now it has an identity
    println!("next start: member {} of mesh {}", agent.name(), agent.credentials().mesh().short());
    agent.ready().await;
    println!("ready; the API answers at http://{}/v1/mesh/members", agent.api_address());

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let adder: ServiceName = "adder".parse()?;
    agent.expose(ExposeSpec::new(adder.clone(), Target::Tcp(listener.local_addr()?))?).await?;
    let serve = async {
        let (mut connection, _) = listener.accept().await?;
        let mut numbers = String::new();
        connection.read_to_string(&mut numbers).await?;
        let sum: i64 = numbers.split('+').filter_map(|number| number.parse::<i64>().ok()).sum();
        connection.write_all(sum.to_string().as_bytes()).await
    };
    let call = async {
        let name = adder.clone();
        agent.watch(move |mesh| mesh.ready(&name).count()).wait_for(|count| *count == 1).await;
        let sum = ask(agent.dial(&adder).await?, "20+22").await?;
        println!("this very program, called as '{adder}': 20+22 = {sum}");
        Outcome::Ok(())
    };
    let (served, called) = tokio::join!(serve, call);
    served?;
    called?;

    let stopped = agent.stop(MemberPhase::Restarting, Duration::from_secs(5)).await;
    println!("stopped: {}", if stopped == Stopped::Drained { "all had ended" } else { "cut" });
    Ok(())
}
