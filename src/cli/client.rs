//! Talks to the running agent through its local API.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};
use tokio_util::either::Either;

use super::Global;
use super::exit::{Exit, Failure};
use super::found::store_failure;
use super::output::note;
use crate::agent::{has_left, way_back};
use crate::api::{ADDRESS_FILE, Problem};
use crate::config::{API_PORT, Overrides, Setting, default_data_dir, load};
use crate::model::Target;
use crate::runtime::{Shutdown, TaskGroup};
use crate::tls::store::DataDir;

/// How long a command waits for an agent to answer the door.
pub(super) const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// How long it then waits for the answer: opening an entry may have to resolve and bind.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Longest answer read: 10,000 events are below.
const ANSWER_LEN_MAX: usize = 64 * 1024 * 1024;

/// Where `--api` says that an agent of this machine listens.
fn told(api: &str) -> Option<Target> {
    let has_port = api.contains(':'); // a bare port is no address here
    api.parse().ok().filter(|target| match target {
        Target::Tcp(address) => has_port && address.ip().is_loopback(),
        Target::Unix(_) => true,
    })
}

type Stream = Either<TcpStream, UnixStream>;

async fn connect(target: &Target) -> std::io::Result<Stream> {
    match target {
        Target::Tcp(address) => TcpStream::connect(address).await.map(Either::Left),
        Target::Unix(path) => UnixStream::connect(path).await.map(Either::Right),
    }
}

/// The API of the agent that this command line means.
pub(super) struct Client {
    told: Option<Target>,
    data_dir: Option<DataDir>,
    tasks: TaskGroup,
}

impl Client {
    /// Finds the agent: where `--api` says, else where the agent of the data directory says it
    /// listens, else at the default address.
    pub(super) fn new(global: &Global) -> Result<Self, Failure> {
        let data_dir = data_dir(global).map(DataDir::new);
        let is_told = |api: &String| {
            told(api).ok_or_else(|| {
                // A change carries the token of this machine's agent, in clear.
                let message = format!("--api: '{api}' is no loopback address with a port");
                Failure::usage(message)
                    .hint("an address of this machine: 127.0.0.1:7371, or unix:/path/api.sock")
            })
        };
        let told = global.api.as_ref().map(is_told).transpose()?;
        if let (None, Some(dir)) = (&told, &data_dir) {
            // A directory that may not be read is no sign of an agent at the default address.
            dir.read(ADDRESS_FILE).map_err(store_failure)?;
        }
        Ok(Self { told, data_dir, tasks: TaskGroup::new(Shutdown::default()) })
    }

    /// Whose agent is meant, where a directory is known.
    pub(super) fn data_dir(&self) -> Option<&DataDir> {
        self.data_dir.as_ref()
    }

    /// Where the agent listens, if that is known now: an agent that is starting says so any moment.
    /// A directory with an identity never means the agent of another one at the default address.
    fn address(&self) -> Option<Target> {
        if let Some(told) = &self.told {
            return Some(told.clone());
        }
        let dir = self.data_dir.as_ref();
        match dir.and_then(|dir| dir.read(ADDRESS_FILE).ok().flatten()) {
            Some(text) => String::from_utf8_lossy(&text).trim().parse().ok(),
            None if dir.is_some_and(DataDir::has_identity) => None,
            None => Some(Target::Tcp((Ipv4Addr::LOCALHOST, API_PORT).into())),
        }
    }

    /// For messages.
    fn place(&self) -> String {
        match (self.address(), &self.data_dir) {
            (Some(address), _) => format!("at {address}"),
            (None, Some(dir)) => format!("for {}", dir.path().display()),
            (None, None) => String::new(),
        }
    }

    /// A listing.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let response = self.send(Method::GET, path, Bytes::new(), None).await?;
        read(response).await
    }

    /// An answer as it is.
    pub(super) async fn bytes(&self, path: &str) -> Result<Bytes, Failure> {
        whole(self.send(Method::GET, path, Bytes::new(), None).await?).await
    }

    /// A listing that tells secrets.
    pub(super) async fn get_secret<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let token = self.token()?;
        let response = self.send(Method::GET, path, Bytes::new(), Some(&token)).await?;
        read(response).await
    }

    /// A change, with what it answers.
    pub(super) async fn change<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Failure> {
        let token = self.token()?;
        let body = serde_json::to_vec(body).map_err(Failure::failed)?;
        read(self.send(method, path, body.into(), Some(&token)).await?).await
    }

    /// A change that answers nothing.
    pub(super) async fn act(&self, method: Method, path: &str) -> Result<(), Failure> {
        let token = self.token()?;
        self.send(method, path, Bytes::new(), Some(&token)).await.map(drop)
    }

    /// A stream of lines, without an end.
    pub(super) async fn lines(&self, path: &str) -> Result<Lines, Failure> {
        let response = self.send(Method::GET, path, Bytes::new(), None).await?;
        Ok(Lines { body: response.into_body(), rest: Vec::new() })
    }

    fn token(&self) -> Result<String, Failure> {
        let Some(dir) = &self.data_dir else {
            return Err(Failure::usage("no data directory is known").hint("--data-dir DIR"));
        };
        let path = dir.file("api.token");
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) => {
                let exit = match error.kind() {
                    std::io::ErrorKind::PermissionDenied => Exit::NotPermitted,
                    _ => Exit::Failed,
                };
                let message = format!("cannot read the API token {}: {error}", path.display());
                Err(Failure::new(exit, message)
                    .hint("the agent's user, or its --data-dir (MURMESH_DATA_DIR)"))
            }
        }
    }

    /// Whether an agent answers the door now.
    pub(super) async fn is_answered(&self) -> bool {
        match self.address() {
            Some(address) => connect(&address).await.is_ok(),
            None => false,
        }
    }

    async fn connect(&self) -> Result<Stream, Failure> {
        let attempts = async {
            let mut failures = 0;
            loop {
                if let Some(address) = self.address()
                    && let Ok(stream) = connect(&address).await
                {
                    return stream;
                }
                failures += 1;
                if failures == 10 {
                    note(format_args!("waiting for an agent {} …", self.place()));
                }
                sleep(RETRY_PAUSE).await;
            }
        };
        timeout(CONNECT_TIME_MAX, attempts).await.map_err(|_| self.no_agent())
    }

    /// Nobody answers the door.
    pub(super) fn no_agent(&self) -> Failure {
        let message = format!("no agent answers {}", self.place());
        let failure = Failure::new(Exit::NoAgent, message);
        match &self.data_dir {
            Some(dir) if has_left(dir) => {
                failure.hint(format_args!("{}: this machine has left its mesh", way_back(dir)))
            }
            _ => failure.hint(
                "murmesh agent (in another terminal), or the --data-dir of the one that runs",
            ),
        }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        token: Option<&str>,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = self.connect().await?;
        let gone = |error| {
            let message = format!("the agent {} broke off: {error}", self.place());
            Failure::new(Exit::NoAgent, message)
        };
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(gone)?;
        self.tasks.spawn_connection("api-client", async move { drop(connection.await) });
        let mut request = Request::builder().method(method).uri(path).header(HOST, "localhost");
        request = request.header(CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        let request = request.body(Full::new(body)).map_err(Failure::failed)?;
        let answered = timeout(ANSWER_TIME_MAX, sender.send_request(request)).await;
        let response = answered.map_err(|_| {
            let message = format!("the agent did not answer within {ANSWER_TIME_MAX:?}");
            Failure::new(Exit::TimedOut, message)
        })?;
        let response = response.map_err(gone)?;
        match response.status().is_success() {
            true => Ok(response),
            false => Err(refused(response).await),
        }
    }
}

async fn read<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, Failure> {
    let bytes = whole(response).await?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Failure::failed(format!("the agent's answer is not understood: {error}")))
}

async fn whole(response: Response<Incoming>) -> Result<Bytes, Failure> {
    let body = http_body_util::Limited::new(response.into_body(), ANSWER_LEN_MAX);
    let body = timeout(ANSWER_TIME_MAX, body.collect()).await;
    let body = body.map_err(|_| Failure::new(Exit::TimedOut, "the agent's answer stalled"))?;
    body.map(|body| body.to_bytes()).map_err(Failure::failed)
}

async fn refused(response: Response<Incoming>) -> Failure {
    let status = response.status();
    let exit = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Exit::NotPermitted,
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => Exit::TimedOut,
        StatusCode::BAD_REQUEST => Exit::Usage,
        _ => Exit::Failed,
    };
    let problem = whole(response).await.ok();
    let problem = problem.and_then(|bytes| serde_json::from_slice::<Problem>(&bytes).ok());
    match problem {
        Some(problem) => Failure::new(exit, problem.detail).of_kind(&problem.kind),
        None => Failure::new(exit, format!("the answer was {status}; is that an agent?")),
    }
}

/// Lines as they come.
pub(super) struct Lines {
    body: Incoming,
    rest: Vec<u8>,
}

impl Lines {
    /// The next line that is not empty; `None` when the agent stops.
    pub(super) async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if !line.is_empty() {
                    return Some(line);
                }
                continue;
            }
            let frame = self.body.frame().await?.ok()?;
            if let Some(data) = frame.data_ref() {
                self.rest.extend_from_slice(data);
            }
        }
    }
}

/// The data directory that is meant: as told, as in the configuration file, or the default.
pub(super) fn data_dir(global: &Global) -> Option<PathBuf> {
    if let Some(path) = &global.data_dir {
        return Some(path.clone());
    }
    let overrides = Overrides {
        config: std::env::var_os("MURMESH_CONFIG").map(PathBuf::from),
        data_dir: global.data_dir.clone().map(Setting::default),
        ..Overrides::default()
    };
    // A file with faults is the agent's and `validate`'s to complain about.
    match load(&overrides) {
        Ok(settings) => Some(settings.data_dir.value.path().to_owned()),
        Err(_) => default_data_dir(),
    }
}

/// Percent-encodes what goes into a path or a query.
pub(super) fn encoded(text: &str) -> String {
    text.bytes().fold(String::new(), |all, byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            all + char::from(byte).encode_utf8(&mut [0; 4])
        }
        _ => format!("{all}%{byte:02X}"),
    })
}
