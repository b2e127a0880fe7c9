//! Proxy: a local port that leads to a service, whichever machine its instances are on.
//!
//!     cargo run --example proxy

use std::error::Error;
use std::time::Duration;

use murmesh::{Agent, DataDir, ExposeSpec, MemberPhase, ServiceName, Settings, Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;
    let agent = Agent::found(Settings::local(DataDir::new(dir.path()))).await?;
    let service: ServiceName = "my-service".parse()?;
    for (id, port) in [("service-1", 8080), ("service-2", 8081)] {
        let to = serve(id, port).await?;
        println!("{id} of {service} listens at {to}");
        let spec = ExposeSpec::new(service.clone(), to)?;
        agent.expose(ExposeSpec { id: id.parse()?, ..spec }).await?;
    }
    let name = service.clone();
    agent.watch(move |mesh| mesh.ready(&name).count()).wait_for(|count| *count == 2).await;

    // What an application sees of the mesh is this one address.
    let entry = agent.upstream(&service, "127.0.0.1:0".parse()?).await?;
    let Target::Tcp(entry) = entry else { return Err("asked for a TCP port".into()) };
    println!("the proxy listens at {entry}");
    let mut answers = Vec::new();
    // Who answers is a matter of chance: 40 times the same is one in a million millions.
    for request in 1..=40 {
        let mut connection = TcpStream::connect(entry).await?;
        connection.write_all(format!("request {request}").as_bytes()).await?;
        connection.shutdown().await?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer).await?;
        answers.push(answer);
    }
    let of = |id: &str| answers.iter().filter(|answer| answer.starts_with(id)).count();
    println!("{}, {}, ...", answers[0], answers[1]);
    println!("service-1 answered {} requests, service-2 {}", of("service-1"), of("service-2"));
    assert!(of("service-1") > 0 && of("service-2") > 0 && answers.len() == 40);
    agent.stop(MemberPhase::Left, Duration::from_secs(5)).await;
    Ok(())
}

/// An instance of the service: answers with its name and what it was asked.
async fn serve(id: &'static str, port: u16) -> Result<Target, Box<dyn Error>> {
    let listener = match TcpListener::bind(("127.0.0.1", port)).await {
        Ok(listener) => listener,
        Err(error) => {
            println!("port {port} cannot be had ({error}), so {id} takes a free one");
            TcpListener::bind("127.0.0.1:0").await?
        }
    };
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut request = String::new();
            if connection.read_to_string(&mut request).await.is_ok() {
                let _ = connection.write_all(format!("{id} got {request}").as_bytes()).await;
            }
        }
    });
    Ok(Target::Tcp(address))
}
