//! Discovery: one agent watches the instances that another one registers and takes back.
//!
//!     cargo run --example discovery

mod common;

use std::time::Duration;

use common::{Outcome, serve};
use murmesh::{Agent, DataDir, ExposeSpec, MemberPhase, ServiceName, Settings};
use tokio::task::JoinSet;

#[tokio::main]
async fn main() -> Outcome {
    let (dir, other_dir, mut servers) =
        (tempfile::tempdir()?, tempfile::tempdir()?, JoinSet::new());
    let settings = Settings::local(DataDir::new(dir.path())).with_name("watcher".parse()?);
    let watcher = Agent::found(settings).await?;
    let token = watcher.invite(Duration::from_secs(60), 1).await?.token;
    let settings = Settings::local(DataDir::new(other_dir.path())).with_name("server".parse()?);
    let server = Agent::join(settings, &token).await?;

    let service: ServiceName = "my-service".parse()?;
    let name = service.clone();
    // Wakes only when this list differs from the last one.
    let mut instances = watcher.watch(move |mesh| {
        let ready = mesh.ready(&name);
        ready.map(|at| format!("{} on {}", at.instance, at.member_name)).collect::<Vec<_>>()
    });
    println!("the watcher sees {}", said(instances.changed().await));

    for (id, port) in [("service-1", 8080), ("service-2", 8081)] {
        let to = serve(&mut servers, id, port).await?;
        let spec = ExposeSpec::new(service.clone(), to)?;
        server.expose(ExposeSpec { id: id.parse()?, ..spec }).await?;
        println!("{id} is registered; the watcher sees {}", said(instances.changed().await));
    }
    server.unexpose(&"service-1".parse()?).await?;
    println!("service-1 is taken back; the watcher sees {}", said(instances.changed().await));

    server.stop(MemberPhase::Left, Duration::from_secs(5)).await;
    let last = instances.wait_for(Vec::is_empty).await;
    println!("the server has left; the watcher sees {}", said(last));
    watcher.stop(MemberPhase::Left, Duration::from_secs(5)).await;
    println!("the watcher has stopped, and sees {}", said(instances.changed().await));
    Ok(())
}

fn said(instances: Option<Vec<String>>) -> String {
    match instances {
        None => "nothing any more".to_owned(),
        Some(instances) if instances.is_empty() => "no instance".to_owned(),
        Some(instances) => instances.join(" and "),
    }
}
