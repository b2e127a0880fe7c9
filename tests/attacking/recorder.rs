//! An application that writes down every byte it gets.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::reading::strictly;
use crate::support::{SOON, check, eventually, runtime};

/// Answers each request with its method and target, so that a client knows whose answer it got.
pub(super) struct Recorder {
    pub(super) address: SocketAddr,
    connections: Arc<Mutex<Vec<Connection>>>,
}

#[derive(Clone, Default)]
struct Connection {
    bytes: Vec<u8>,
    has_ended: bool,
}

impl Recorder {
    pub(super) fn start() -> Self {
        let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::<Mutex<Vec<Connection>>>::default();
        let known = Arc::clone(&connections);
        runtime().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let index = known.lock().unwrap().len();
                known.lock().unwrap().push(Connection::default());
                tokio::spawn(record(stream, index, Arc::clone(&known)));
            }
        });
        Self { address, connections }
    }

    /// The bytes of every connection, once all have ended.
    #[track_caller]
    pub(super) fn recorded(&self) -> Vec<Vec<u8>> {
        eventually("all connections to the application have ended", SOON, || {
            let connections = self.connections.lock().unwrap();
            let open = connections.iter().filter(|connection| !connection.has_ended).count();
            check(open == 0, open)
        });
        let connections = self.connections.lock().unwrap();
        connections.iter().map(|connection| connection.bytes.clone()).collect()
    }
}

async fn record(mut stream: TcpStream, index: usize, known: Arc<Mutex<Vec<Connection>>>) {
    let (mut chunk, mut answered) = (vec![0; 64 * 1024], 0);
    while let Ok(len) = stream.read(&mut chunk).await {
        if len == 0 {
            break;
        }
        let bytes = {
            let connection = &mut known.lock().unwrap()[index];
            connection.bytes.extend_from_slice(&chunk[..len]);
            connection.bytes.clone()
        };
        let Ok(messages) = strictly(&bytes) else { continue }; // recorded: the test will say it
        let whole: Vec<_> = messages.iter().filter(|message| message.is_whole).collect();
        for message in &whole[answered..] {
            let page = format!("{} {}", message.method, message.target);
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", page.len());
            let is_head = message.method == "HEAD";
            let answer = if is_head { head } else { head + &page };
            if stream.write_all(answer.as_bytes()).await.is_err() {
                break;
            }
        }
        answered = whole.len();
    }
    known.lock().unwrap()[index].has_ended = true;
}
