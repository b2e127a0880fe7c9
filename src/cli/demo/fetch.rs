//! One GET over one connection: enough for the agents' API and for the demo's traffic.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper::{Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest answer in bytes; listings of three members have a few hundred.
const ANSWER_LEN_MAX: usize = 1024 * 1024;

/// A request without an answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    #[error("no answer: {0}")]
    Http(#[from] hyper::Error),
    #[error("the answer broke off: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("cannot ask: {0}")]
    Request(#[from] hyper::http::Error),
}

/// What came back.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) body: Bytes,
}

/// Asks `address` for `path` over a connection of its own.
pub(super) async fn fetch(
    address: SocketAddr,
    path: &str,
    patience: Duration,
) -> Result<Answer, FetchError> {
    let exchange = exchange(address, path);
    timeout(patience, exchange).await.unwrap_or(Err(FetchError::Timeout(patience)))
}

async fn exchange(address: SocketAddr, path: &str) -> Result<Answer, FetchError> {
    let stream = TcpStream::connect(address).await.map_err(FetchError::Connect)?;
    let request = Request::get(path)
        .header(header::HOST, address.to_string())
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let asked = async move {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_LEN_MAX).collect().await;
        Ok(Answer { status, body: body.map_err(FetchError::Body)?.to_bytes() })
    };
    // The connection moves only while it is polled; what goes wrong with it, `asked` tells, too.
    let (answer, _) = join(asked, connection).await;
    answer
}
