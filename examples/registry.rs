//! Registry: there is none. Each agent says what it serves, and every other one knows.
//!
//!     cargo run --example registry

mod common;

use std::time::Duration;

use common::{Outcome, serve};
use murmesh::{Agent, DataDir, ExposeSpec, MemberPhase, ServiceName, Settings, Weight};
use tokio::task::JoinSet;

#[tokio::main]
async fn main() -> Outcome {
    let (dir, mut servers) = (tempfile::tempdir()?, JoinSet::new());
    let agent = Agent::found(Settings::local(DataDir::new(dir.path()))).await?;
    let service: ServiceName = "my-service".parse()?;
    let of = service.clone();
    let mut registered = agent.watch(move |mesh| mesh.endpoints(&of).to_vec());

    // An id is unique on its machine; tags and weight are for whoever picks an instance.
    for (id, port, tag, weight) in [("service-1", 8080, "v1", 100), ("service-2", 8081, "v2", 50)] {
        let to = serve(&mut servers, id, port).await?;
        let spec = ExposeSpec::new(service.clone(), to)?;
        let (tags, weight) = (vec![tag.to_owned()], Weight(weight));
        agent.expose(ExposeSpec { id: id.parse()?, tags, weight, ..spec }).await?;
        println!("registered {id}");
    }
    let all = registered.wait_for(|all| all.len() == 2).await.unwrap_or_default();
    println!("{service} has {} instances:", all.len());
    for at in &all {
        println!(
            "  {} on {}: {}, tags {:?}, weight {}",
            at.instance,
            at.member_name,
            at.state.as_str(),
            at.tags,
            at.weight.0
        );
    }

    agent.unexpose(&"service-1".parse()?).await?;
    let left = registered.wait_for(|all| all.len() == 1).await.unwrap_or_default();
    println!("deregistered service-1; left is {}", left[0].instance);
    let error = agent.unexpose(&"service-1".parse()?).await.err();
    println!("once more: {}", error.map_or("ok".to_owned(), |error| error.to_string()));
    agent.stop(MemberPhase::Left, Duration::from_secs(5)).await;
    Ok(())
}
