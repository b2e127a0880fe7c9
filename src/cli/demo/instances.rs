//! The sample services: small HTTP servers inside the demo's own process.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::time::sleep;
use tracing::debug;

use crate::runtime::{Shutdown, TaskGroup, clock};

/// How long an instance stays broken when somebody asks it to break.
pub(super) const BREAK: Duration = Duration::from_secs(15);
/// How long callers may go on avoiding an instance that is back (the agent's own limit is 8 s);
/// nothing else shall be broken meanwhile.
const SETTLE: Duration = Duration::from_secs(10);
/// Between two tries to listen, or to accept when the system refuses.
const AGAIN: Duration = Duration::from_millis(100);

/// Which of the two services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Service {
    Greeter,
    Clock,
}

impl Service {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Greeter => "greeter",
            Self::Clock => "clock",
        }
    }

    fn answer(self, path: &str, node: &str) -> String {
        match self {
            Self::Greeter => format!("hello {path}, this is greeter on {node}\n"),
            Self::Clock => format!("{path}: it is {} UTC on {node}\n", time_of_day()),
        }
    }

    /// The node that gave this answer, if it is a right answer to `path`.
    pub(super) fn node_of<'a>(self, path: &str, answer: &'a str) -> Option<&'a str> {
        let line = answer.strip_suffix('\n')?;
        match self {
            Self::Greeter => {
                line.strip_prefix(&format!("hello {path}, this is greeter on ")).filter(is_word)
            }
            Self::Clock => {
                let told = line.strip_prefix(&format!("{path}: it is "))?;
                told.split_once(" UTC on ").map(|(_, node)| node).filter(is_word)
            }
        }
    }
}

fn is_word(text: &&str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase())
}

fn time_of_day() -> String {
    let seconds = clock::unix_seconds() % 86_400;
    format!("{:02}:{:02}:{:02}", seconds / 3_600, seconds / 60 % 60, seconds % 60)
}

/// One thing is out of order at a time, or there would be nobody left to answer.
#[derive(Clone, Default)]
pub(super) struct Outage(Arc<AtomicBool>);

impl Outage {
    /// Whether it may begin: nothing else is out of order.
    pub(super) fn try_begin(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }

    /// All is in order again.
    pub(super) fn end(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Serves one instance of `service` behind `node` for ever. `/break` on it closes the door for
/// [`BREAK`].
pub(super) async fn serve(
    listener: TcpListener,
    address: SocketAddr,
    service: Service,
    node: &'static str,
    outage: Outage,
) {
    let connections = TaskGroup::new(Shutdown::default());
    let broken = Arc::new(Notify::new());
    let mut listener = Some(listener);
    loop {
        let open = match listener.take() {
            Some(open) => open,
            None => {
                let again = listen_again(address).await;
                let settled = outage.clone();
                connections.spawn_connection("settle", async move {
                    sleep(SETTLE).await;
                    settled.end();
                });
                again
            }
        };
        loop {
            tokio::select! {
                biased;
                () = broken.notified() => break,
                accepted = open.accept() => match accepted {
                    Ok((stream, _)) => {
                        let answering = answer(stream, service, node, broken.clone(), outage.clone());
                        connections.spawn_connection("sample", answering);
                    }
                    Err(error) => {
                        debug!(%error, "sample service cannot accept");
                        sleep(AGAIN).await;
                    }
                },
            }
        }
        // Those that the system has accepted already shall have their answer.
        while let Some(Ok((stream, _))) = open.accept().now_or_never() {
            connections.spawn_connection(
                "sample",
                answer(stream, service, node, broken.clone(), outage.clone()),
            );
        }
        drop(open);
        sleep(BREAK).await;
    }
}

async fn listen_again(address: SocketAddr) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(_) => sleep(AGAIN).await,
        }
    }
}

fn answer(
    stream: TcpStream,
    service: Service,
    node: &'static str,
    broken: Arc<Notify>,
    outage: Outage,
) -> impl Future<Output = ()> + Send {
    let reply = move |request: Request<Incoming>| {
        let path = request.uri().path().trim_start_matches('/');
        let text = match path {
            "break" if service != Service::Greeter => {
                format!("not done: there is no other {} in this mesh\n", service.name())
            }
            "break" if !outage.try_begin() => {
                "not now: something is out of order already, nobody would be left\n".to_owned()
            }
            "break" => {
                broken.notify_one();
                format!("{} on {node} refuses connections for {BREAK:?}\n", service.name())
            }
            path => service.answer(path, node),
        };
        async move { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text)))) }
    };
    async move {
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new());
        let served = server.serve_connection(TokioIo::new(stream), service_fn(reply)).await;
        if let Err(error) = served {
            debug!(%error, "sample connection ended early");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_to_this_very_question_is_right() {
        for service in [Service::Greeter, Service::Clock] {
            let answer = service.answer("17", "birch");
            assert_eq!(service.node_of("17", &answer), Some("birch"));
            assert_eq!(service.node_of("18", &answer), None, "another question's answer");
            assert_eq!(service.node_of("17", answer.trim_end()), None, "an answer that broke off");
            assert_eq!(service.node_of("17", ""), None);
        }
    }
}
