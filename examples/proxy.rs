//! Proxy: one local port leads to a service, wherever its instances are.
//!
//!     cargo run --example proxy

mod common;

use std::time::Duration;

use common::{Outcome, ask, serve};
use murmesh::{Agent, DataDir, ExposeSpec, MemberPhase, ServiceName, Settings, Target};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

#[tokio::main]
async fn main() -> Outcome {
    let (dir, mut servers) = (tempfile::tempdir()?, JoinSet::new());
    let agent = Agent::found(Settings::local(DataDir::new(dir.path()))).await?;
    let service: ServiceName = "my-service".parse()?;
    for (id, port) in [("service-1", 8080), ("service-2", 8081)] {
        let to = serve(&mut servers, id, port).await?;
        let spec = ExposeSpec::new(service.clone(), to)?;
        agent.expose(ExposeSpec { id: id.parse()?, ..spec }).await?;
    }
    let name = service.clone();
    agent.watch(move |mesh| mesh.ready(&name).count()).wait_for(|count| *count == 2).await;

    // This one address is all that an application needs to know.
    let entry = agent.upstream(&service, "127.0.0.1:0".parse()?).await?;
    let Target::Tcp(address) = entry else { return Err("it was to be a TCP port".into()) };
    println!("the proxy for {service} listens at {address}");

    let mut by_first = 0;
    for number in 1..=40 {
        let answer = ask(TcpStream::connect(address).await?, &format!("request {number}")).await?;
        if number <= 4 {
            println!("  {answer}");
        }
        by_first += usize::from(answer.starts_with("service-1"));
    }
    println!("service-1 answered {by_first} of 40 requests, service-2 the other {}", 40 - by_first);
    assert!((1..40).contains(&by_first), "by chance that happens once in a million million runs");

    agent.stop(MemberPhase::Left, Duration::from_secs(5)).await;
    println!("stopped: nothing was open any more");
    Ok(())
}
