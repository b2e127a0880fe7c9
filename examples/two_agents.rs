//! Two agents: one founds a mesh, one joins it with a token, and each calls what the other serves.
//!
//!     cargo run --example two_agents

mod common;

use std::time::Duration;

use common::{Outcome, ask, serve};
use murmesh::{Agent, DataDir, DialError, ExposeSpec, MemberPhase, ServiceName, Settings};
use tokio::task::JoinSet;

#[tokio::main]
async fn main() -> Outcome {
    let (dir, other_dir, mut servers) =
        (tempfile::tempdir()?, tempfile::tempdir()?, JoinSet::new());
    let settings = Settings::local(DataDir::new(dir.path())).with_name("alpha".parse()?);
    let alpha = Agent::found(settings).await?;
    println!("alpha founded a mesh at {}", alpha.mesh_address());
    let token = alpha.invite(Duration::from_secs(60), 1).await?.token;
    let settings = Settings::local(DataDir::new(other_dir.path())).with_name("beta".parse()?);
    let beta = Agent::join(settings, &token).await?;
    println!("beta joined it at {}", beta.mesh_address());

    let (web, db): (ServiceName, ServiceName) = ("web".parse()?, "db".parse()?);
    alpha.expose(ExposeSpec::new(web.clone(), serve(&mut servers, "web", 8080).await?)?).await?;
    beta.expose(ExposeSpec::new(db.clone(), serve(&mut servers, "db", 8081).await?)?).await?;
    for (agent, service) in [(&alpha, &db), (&beta, &web)] {
        let name = service.clone();
        agent.watch(move |mesh| mesh.ready(&name).count()).wait_for(|count| *count == 1).await;
        let call = agent.dial(service).await?;
        println!("{} calls {service} on {}", agent.name(), call.endpoint().member_name);
        println!("  {}", ask(call, "are you there?").await?);
    }

    beta.stop(MemberPhase::Left, Duration::from_secs(5)).await;
    let name = db.clone();
    alpha.watch(move |mesh| mesh.ready(&name).count()).wait_for(|count| *count == 0).await;
    let error: Option<DialError> = alpha.dial(&db).await.err();
    println!("beta has left; calling db now: {}", error.map_or("", DialError::reason));
    alpha.stop(MemberPhase::Left, Duration::from_secs(5)).await;
    Ok(())
}
