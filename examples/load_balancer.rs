//! Load balancer: each call goes to the less busy of two instances that are drawn by weight.
//!
//!     cargo run --example load_balancer

mod common;

use std::time::Duration;

use common::{Outcome, ask, serve};
use murmesh::{Agent, DataDir, ExposeSpec, MemberPhase, ServiceName, Settings, Weight};
use tokio::task::JoinSet;

#[tokio::main]
async fn main() -> Outcome {
    let (dir, mut servers) = (tempfile::tempdir()?, JoinSet::new());
    let agent = Agent::found(Settings::local(DataDir::new(dir.path()))).await?;
    let service: ServiceName = "my-service".parse()?;
    let of = service.clone();
    let mut weights = agent.watch(move |mesh| mesh.ready(&of).map(|at| at.weight.0).collect());
    let mut specs = Vec::new();
    for (id, port) in [("service-1", 8080), ("service-2", 8081)] {
        let to = serve(&mut servers, id, port).await?;
        specs.push(ExposeSpec { id: id.parse()?, ..ExposeSpec::new(service.clone(), to)? });
        agent.expose(specs[specs.len() - 1].clone()).await?;
    }
    weights.wait_for(|seen: &Vec<u16>| *seen == [100, 100]).await;
    println!("the next call would go to {}", agent.pick(&service)?.instance);
    let shares = calls_at_once(&agent, &service).await?;
    println!("of 40 calls at once service-1 took {}, service-2 {}", shares[0], shares[1]);
    assert_eq!(shares, [20, 20]);

    agent.expose(ExposeSpec { weight: Weight(300), ..specs[0].clone() }).await?;
    weights.wait_for(|seen| *seen == [300, 100]).await;
    let shares = calls_at_once(&agent, &service).await?;
    println!("with weights 300 and 100: {} and {}", shares[0], shares[1]);
    assert!((29..=31).contains(&shares[0]));

    agent.unexpose(&specs[0].id).await?;
    weights.wait_for(|seen| *seen == [100]).await;
    let shares = calls_at_once(&agent, &service).await?;
    println!("without service-1: {} and {}", shares[0], shares[1]);
    assert_eq!(shares, [0, 40]);
    agent.stop(MemberPhase::Left, Duration::from_secs(5)).await;
    Ok(())
}

/// Opens 40 calls before it asks any of them, and counts which instance answered.
async fn calls_at_once(agent: &Agent, service: &ServiceName) -> Result<[u32; 2], common::Failure> {
    let (mut calls, mut shares) = (Vec::new(), [0, 0]);
    for _ in 0..40 {
        calls.push(agent.dial(service).await?);
    }
    for call in calls {
        let answer = ask(call, "who are you?").await?;
        shares[usize::from(answer.starts_with("service-2"))] += 1;
    }
    Ok(shares)
}
