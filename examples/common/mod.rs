//! What the examples share: the instances of a service, and one call of it.

#![allow(dead_code)] // no example needs all of it

use std::error::Error;
use std::io;

use murmesh::Target;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

pub(crate) type Failure = Box<dyn Error>;
pub(crate) type Outcome = Result<(), Failure>;

/// Starts an instance: it answers with its own name and with what it was asked. It ends with
/// `servers`.
pub(crate) async fn serve(
    servers: &mut JoinSet<()>,
    id: &'static str,
    port: u16,
) -> io::Result<Target> {
    let listener = match TcpListener::bind(("localhost", port)).await {
        Ok(listener) => listener,
        Err(error) => {
            println!("{id} cannot have port {port} ({error}) and takes a free one");
            TcpListener::bind("localhost:0").await?
        }
    };
    let to = Target::Tcp(listener.local_addr()?);
    println!("{id} listens at {to}");
    servers.spawn(async move {
        let mut answers = JoinSet::new();
        while let Ok((mut connection, _)) = listener.accept().await {
            answers.spawn(async move {
                let mut question = String::new();
                connection.read_to_string(&mut question).await?;
                connection.write_all(format!("{id} heard '{question}'").as_bytes()).await
            });
        }
    });
    Ok(to)
}

/// Says `question` to its end and returns the answer.
pub(crate) async fn ask(
    mut connection: impl AsyncRead + AsyncWrite + Unpin,
    question: &str,
) -> io::Result<String> {
    connection.write_all(question.as_bytes()).await?;
    connection.shutdown().await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    Ok(answer)
}
