//! `log-level`, `debug bundle`: when something is odd.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::Value;
use tar::Header;

use super::Global;
use super::client::{Client, encoded};
use super::exit::{Exit, Failure, Outcome};
use super::output::line;
use crate::api::LogRequest;
use crate::api::views::Service;
use crate::runtime::clock;

/// Services whose endpoints go into a bundle.
const SERVICES_MAX: usize = 1_000;

/// Arguments of `log-level`.
#[derive(Debug, Args)]
pub(super) struct LogLevelArgs {
    /// error, warn, info, debug or trace, or levels of modules: warn,murmesh=debug; shown unless said
    #[arg(value_name = "LEVEL")]
    level: Option<String>,
}

/// Verbs of `debug`.
#[derive(Debug, Subcommand)]
pub(super) enum DebugVerb {
    /// Write what the running agent knows into one file, without keys and tokens
    Bundle {
        /// A new file [default: murmesh-debug-TIME.tar]
        file: Option<PathBuf>,
    },
}

/// Changes or shows what the running agent logs.
pub(super) async fn log_level(global: &Global, args: LogLevelArgs) -> Outcome {
    let client = Client::new(global)?;
    match args.level {
        Some(filter) => {
            let asked = LogRequest { filter };
            let now: LogRequest = client.change(Method::PUT, "/v1/mesh/log", &asked).await?;
            line(format_args!("the agent logs {} until it restarts", now.filter))?;
        }
        None => {
            let log: Value = client.get_secret("/v1/mesh/log").await?;
            line(log["filter"].as_str().unwrap_or_default())?;
        }
    }
    Ok(Exit::Ok)
}

/// Collects what somebody far away needs to know.
pub(super) async fn debug(global: &Global, verb: DebugVerb) -> Outcome {
    let DebugVerb::Bundle { file } = verb;
    let client = Client::new(global)?;
    let mut files = vec![("version.txt".to_owned(), version().into_bytes())];
    for (name, path) in [
        ("status.json", "/v1/agent/self"),
        ("members.json", "/v1/mesh/members"),
        ("services.json", "/v1/mesh/services"),
        ("net.json", "/v1/mesh/net"),
        ("certs.json", "/v1/mesh/certs?all=true"),
        ("issuers.json", "/v1/mesh/issuers"),
        ("exposed.json", "/v1/mesh/expose"),
        ("upstreams.json", "/v1/mesh/upstream"),
        ("events.json", "/v1/mesh/events"),
        ("check.json", "/v1/mesh/check"),
        ("metrics.txt", "/metrics"),
    ] {
        files.push((name.to_owned(), client.bytes(path).await?.into()));
    }
    let services: Vec<Service> = client.get("/v1/mesh/services").await?;
    for service in services.iter().take(SERVICES_MAX) {
        let path = format!("/v1/mesh/endpoints/{}", encoded(&service.name));
        let name = format!("endpoints/{}.json", service.name);
        files.push((name, client.bytes(&path).await?.into()));
    }
    let config: Value = client.get_secret("/v1/mesh/config").await?;
    let config = serde_json::to_vec_pretty(&config).map_err(Failure::failed)?;
    files.push(("config.json".to_owned(), config));
    // An agent inside another program has no log of its own.
    if let Ok(log) = client.get_secret::<Value>("/v1/mesh/log").await {
        let tail = log["tail"].as_str().unwrap_or_default().as_bytes().to_vec();
        files.push(("log.txt".to_owned(), tail));
    }
    let now = clock::unix_seconds();
    let file = file.unwrap_or_else(|| format!("murmesh-debug-{now}.tar").into());
    let failed = |error| Failure::failed(format!("cannot write {}: {error}", file.display()));
    let mut options = OpenOptions::new();
    let out = options.write(true).create_new(true).mode(0o600).open(&file).map_err(failed)?;
    archive(&files, now, out).and_then(|out| out.sync_all()).map_err(failed)?;
    for (name, bytes) in &files {
        line(format_args!("{:>9}  {name}", bytes.len()))?;
    }
    line(format_args!("written to {}; no key and no token is in it", file.display()))?;
    Ok(Exit::Ok)
}

fn version() -> String {
    let system = rustix::system::uname();
    format!(
        "murmesh {}\n{} {} {}\n",
        env!("CARGO_PKG_VERSION"),
        system.sysname().to_string_lossy(),
        system.release().to_string_lossy(),
        system.machine().to_string_lossy()
    )
}

/// Writes `files` as a tar archive, private as the file itself.
fn archive(files: &[(String, Vec<u8>)], time: u64, out: File) -> io::Result<File> {
    let mut archive = tar::Builder::new(out);
    for (name, bytes) in files {
        let mut header = Header::new_ustar();
        header.set_mode(0o600);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(time);
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, name, &bytes[..])?;
    }
    archive.into_inner()
}
