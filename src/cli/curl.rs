//! `curl`: the system's curl, through the gateway.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::Args;
use serde_json::Value;

use super::Global;
use super::client::Client;
use super::exit::{Failure, Outcome};

const HELP: &str = "\
murmesh curl http://web.mesh/
murmesh curl -sS -d @order.json http://orders.mesh/v1/orders

Whatever follows is curl's, its exit code too. Flags of murmesh itself stand before 'curl':
murmesh --data-dir DIR curl http://web.mesh/";

/// Arguments of `curl`.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(super) struct CurlArgs {
    /// A URL such as http://web.mesh/, and arguments of curl
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "URL"
    )]
    arguments: Vec<OsString>,
}

/// Becomes curl. Returns only when that fails.
pub(super) async fn curl(global: &Global, args: CurlArgs) -> Outcome {
    let client = Client::new(global)?;
    let me: Value = client.get("/v1/agent/self").await?;
    let gateway = me["Mesh"]["gateway"].as_str().ok_or_else(|| {
        Failure::failed("the agent has no gateway open")
            .hint("murmesh agent --gateway 127.0.0.1:7380, or 'gateway' under [listen]")
    })?;
    // In this order: what the caller says of proxies wins.
    let mut curl = Command::new("curl");
    curl.args(["--proxy", &format!("http://{gateway}"), "--noproxy", ""]).args(args.arguments);
    let error = curl.exec();
    Err(match error.kind() {
        io::ErrorKind::NotFound => Failure::failed("there is no curl on this machine")
            .hint(format_args!("apt install curl, or any client with http_proxy=http://{gateway}")),
        _ => Failure::failed(format_args!("cannot run curl: {error}")),
    })
}
