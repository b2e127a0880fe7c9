//! The access log: one line of JSON for each request that this agent took from a client.
//!
//! Whoever serves a request leaves what is to be said in a queue; a thread of its own writes it down.
//! A queue that is full drops and counts: a slow disk slows no request.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use http::Method;
use http::uri::PathAndQuery;
use serde::Serialize;
use tokio::sync::mpsc;
use tracing::warn;

use super::{Counter, Door};
use crate::model::{InstanceId, MemberName, ServiceName};
use crate::runtime::{ThreadError, start_blocking_thread};

/// Requests that wait to be written down: some tenths of a second at full speed.
const WAITING_MAX: usize = 16_384;

/// Where the access log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessTarget {
    /// Standard output.
    Stdout,
    /// The end of this file, which is opened anew by `reload`.
    File(PathBuf),
}

/// A request and what came of it.
#[derive(Clone, Debug)]
pub struct Access {
    /// When it came, in milliseconds since 1970.
    pub at_ms: u64,
    /// Where it came.
    pub door: Door,
    /// Which service was asked for; none when the host was no name of the mesh.
    pub service: Option<ServiceName>,
    /// Whose instance answered, or was asked last where the mesh answers; none when none was asked.
    pub node: Option<MemberName>,
    /// Which of its instances.
    pub instance: Option<InstanceId>,
    /// Of the request; none where that cannot be read.
    pub method: Option<Method>,
    /// Of the request; what follows a `?` is not written down: it may hold secrets.
    pub path: Option<PathAndQuery>,
    /// Of the response.
    pub status: u16,
    /// Why the mesh answered, or `cut` and `client_gone` when the response did not come to its end.
    pub reason: Option<&'static str>,
    /// That the client was sent: of the response's body, or of what came after it where client and
    /// instance went on to speak something else.
    pub bytes: u64,
    /// From the request to the end of the response.
    pub duration: Duration,
}

/// The access log. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AccessLog {
    waiting: mpsc::Sender<Access>,
    dropped: Counter,
    is_stale: Arc<AtomicBool>,
}

impl AccessLog {
    /// Opens `target` and starts the thread that writes there. `dropped` counts what found the queue
    /// full.
    pub fn start(target: AccessTarget, dropped: Counter) -> Result<Self, AccessLogError> {
        let (waiting, queue) = mpsc::channel(WAITING_MAX);
        let is_stale = Arc::<AtomicBool>::default();
        let mut out = Out::open(target)?;
        let stale = Arc::clone(&is_stale);
        start_blocking_thread("access-log", move || write_all(queue, &mut out, &stale))?;
        Ok(Self { waiting, dropped, is_stale })
    }

    /// Leaves a request to be written down.
    pub fn record(&self, access: Access) {
        if self.waiting.try_send(access).is_err() {
            self.dropped.inc();
        }
    }

    /// Opens a file of the same name at the next request: the old one was moved away.
    pub fn reopen(&self) {
        self.is_stale.store(true, Ordering::Relaxed);
    }
}

/// The access log cannot be written. Fault: the configuration, or the disk.
#[derive(Debug, thiserror::Error)]
pub enum AccessLogError {
    /// Its file cannot be opened.
    #[error("cannot open the access log {path}: {error}")]
    Open {
        /// As configured.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Fault: the system.
    #[error(transparent)]
    Thread(#[from] ThreadError),
}

struct Out {
    target: AccessTarget,
    writer: BufWriter<Box<dyn Write + Send>>,
}

impl Out {
    fn open(target: AccessTarget) -> Result<Self, AccessLogError> {
        let writer: Box<dyn Write + Send> = match &target {
            AccessTarget::Stdout => Box::new(io::stdout()),
            AccessTarget::File(path) => Box::new(
                append(path).map_err(|error| AccessLogError::Open { path: path.clone(), error })?,
            ),
        };
        Ok(Self { target, writer: BufWriter::new(writer) })
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

/// Ends when the last handle is gone.
fn write_all(mut queue: mpsc::Receiver<Access>, out: &mut Out, stale: &AtomicBool) {
    let mut is_failing = false;
    while let Some(first) = queue.blocking_recv() {
        if stale.swap(false, Ordering::Relaxed) {
            match Out::open(out.target.clone()) {
                Ok(opened) => *out = opened,
                Err(error) => warn!(%error, "the access log goes on in the old file"),
            }
        }
        let mut next = Some(first);
        let mut written = Ok(());
        while let Some(access) = next {
            written = written.and_then(|()| write_line(&mut out.writer, &access));
            next = queue.try_recv().ok();
        }
        let written = written.and_then(|()| out.writer.flush());
        if let Err(error) = &written
            && !is_failing
        {
            warn!(%error, "requests are missing from the access log");
        }
        is_failing = written.is_err();
    }
}

/// The line, with its fields in this order.
#[derive(Serialize)]
struct Line<'a> {
    at: String,
    door: &'static str,
    service: Option<&'a str>,
    node: Option<&'a str>,
    instance: Option<&'a str>,
    method: Option<&'a str>,
    path: &'a str,
    status: u16,
    reason: Option<&'static str>,
    bytes: u64,
    duration_ms: f64,
}

fn write_line(out: &mut impl Write, access: &Access) -> io::Result<()> {
    let at = UNIX_EPOCH + Duration::from_millis(access.at_ms);
    let line = Line {
        at: humantime::format_rfc3339_millis(at).to_string(),
        door: access.door.as_str(),
        service: access.service.as_ref().map(ServiceName::as_str),
        node: access.node.as_ref().map(MemberName::as_str),
        instance: access.instance.as_ref().map(InstanceId::as_str),
        method: access.method.as_ref().map(Method::as_str),
        path: access.path.as_ref().map_or("", PathAndQuery::path),
        status: access.status,
        reason: access.reason,
        bytes: access.bytes,
        duration_ms: (access.duration.as_secs_f64() * 1e6).round() / 1e3,
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(path: &str) -> Access {
        Access {
            at_ms: 1_790_000_000_250,
            door: Door::gateway,
            service: Some("web".parse().unwrap()),
            node: Some("b".parse().unwrap()),
            instance: Some("web-1".parse().unwrap()),
            method: Some(Method::GET),
            path: Some(path.parse().unwrap()),
            status: 200,
            reason: None,
            bytes: 42,
            duration: Duration::from_micros(1_234),
        }
    }

    #[test]
    fn line_has_its_fields_in_a_fixed_order_and_no_query() {
        let mut line = Vec::new();
        write_line(&mut line, &access("/a?token=secret")).unwrap();
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "{\"at\":\"2026-09-21T14:13:20.250Z\",\"door\":\"gateway\",\"service\":\"web\",\
             \"node\":\"b\",\"instance\":\"web-1\",\"method\":\"GET\",\"path\":\"/a\",\
             \"status\":200,\"reason\":null,\"bytes\":42,\"duration_ms\":1.234}\n"
        );
    }

    #[test]
    fn requests_are_written_in_order_and_into_a_new_file_after_the_old_one_was_moved() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("log"), directory.path().join("old"));
        let (waiting, queue) = mpsc::channel(10);
        let stale = AtomicBool::new(false);
        let mut out = Out::open(AccessTarget::File(path.clone())).unwrap();
        let lines = |path: &Path| std::fs::read_to_string(path).unwrap().lines().count();
        std::thread::scope(|scope| {
            scope.spawn(|| write_all(queue, &mut out, &stale));
            waiting.try_send(access("/1")).unwrap();
            while !path.exists() || lines(&path) < 1 {
                std::thread::yield_now();
            }
            std::fs::rename(&path, &old).unwrap();
            stale.store(true, Ordering::Relaxed);
            waiting.try_send(access("/2")).unwrap();
            drop(waiting);
        });
        assert_eq!((lines(&old), lines(&path)), (1, 1));
        assert!(std::fs::read_to_string(&path).unwrap().contains("\"path\":\"/2\""));
    }
}
