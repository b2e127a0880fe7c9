//! `generate`: files for other programs.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::Global;
use super::exit::{Exit, Failure, Outcome};
use super::found::open_dir;
use super::output::{note, print};
use crate::config::DRAIN_DEADLINE;

/// Verbs of `generate`.
#[derive(Debug, Subcommand)]
pub(super) enum GenerateVerb {
    /// Print a unit for systemd
    Systemd(SystemdArgs),
    /// Of a later version
    #[command(hide = true)]
    Resolved,
    /// Of a later version
    #[command(hide = true)]
    PrometheusRules,
    /// Of a later version
    #[command(hide = true)]
    Grafana,
}

/// Arguments of `generate systemd`.
#[derive(Debug, Args)]
pub(super) struct SystemdArgs {
    /// As whom the agent runs; must exist
    #[arg(long, value_name = "NAME", default_value = "murmesh", value_parser = user)]
    user: String,
    /// The configuration file; none is needed
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Names that useradd takes: nothing that ends the line it stands in.
fn user(text: &str) -> Result<String, String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match !text.is_empty() && text.len() <= 32 && text.chars().all(is_word) {
        true => Ok(text.to_owned()),
        false => Err("expected the name of a user".to_owned()),
    }
}

/// Prints a file.
pub(super) fn generate(global: &Global, verb: GenerateVerb) -> Outcome {
    let args = match verb {
        GenerateVerb::Systemd(args) => args,
        GenerateVerb::Resolved => return Err(Failure::not_yet("'generate resolved'")),
        GenerateVerb::PrometheusRules => {
            return Err(Failure::not_yet("'generate prometheus-rules'"));
        }
        GenerateVerb::Grafana => return Err(Failure::not_yet("'generate grafana'")),
    };
    let program = std::env::current_exe()
        .map_err(|error| Failure::failed(format!("cannot tell where this program is: {error}")))?;
    let absolute = |path: &Path| {
        std::path::absolute(path)
            .map_err(|error| Failure::failed(format!("{}: {error}", path.display())))
    };
    let dir = absolute(open_dir(global)?.path())?;
    let config = args.config.as_deref().map(absolute).transpose()?;
    let paths = [Some(&program), Some(&dir), config.as_ref()];
    for path in paths.into_iter().flatten() {
        if path.to_str().is_none_or(|text| text.contains(char::is_control)) {
            let message = format!("{path:?} cannot stand in a unit");
            return Err(Failure::usage(message).hint("a path of printable characters"));
        }
    }
    print(unit(&program, &dir, config.as_deref(), &args.user))?;
    let user = &args.user;
    note(format_args!(
        "next: useradd --system --shell /usr/sbin/nologin {user}
      murmesh generate systemd > /etc/systemd/system/murmesh.service
      systemctl daemon-reload && systemctl enable --now murmesh"
    ));
    Ok(Exit::Ok)
}

/// A word of a unit: quoted, and without specifiers (systemd.unit(5)).
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    format!("\"{escaped}\"")
}

fn unit(program: &Path, dir: &Path, config: Option<&Path>, user: &str) -> String {
    let config = config.map_or(String::new(), |path| format!(" -c {}", quoted(path)));
    // '$' begins a variable in a command line only.
    let start = format!("{} agent{config}", quoted(program)).replace('$', "$$");
    let state = match dir == Path::new("/var/lib/murmesh") {
        true => "StateDirectory=murmesh\nStateDirectoryMode=0700".to_owned(),
        false => format!("ReadWritePaths={}", quoted(dir)),
    };
    let environment = format!("MURMESH_DATA_DIR={}", dir.display());
    let environment = quoted(Path::new(&environment));
    // What hides homes would hide a data directory in one.
    let homes = if dir.starts_with("/home") || dir.starts_with("/root") { "no" } else { "yes" };
    let stop = DRAIN_DEADLINE.as_secs() + 15;
    format!(
        "\
# Made by 'murmesh generate systemd'.
[Unit]
Description=murmesh agent
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
ExecStart={start}
ExecReload=/bin/kill -HUP $MAINPID
User={user}
Environment={environment}
{state}
Restart=on-failure
RestartSec=2s
# Something was still open at the end of the drain: no failure.
SuccessExitStatus=1
TimeoutStopSec={stop}s
LimitNOFILE=524288

# Entries to ports below 1024 need: AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
NoNewPrivileges=yes
ProtectSystem=full
ProtectHome={homes}
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
UMask=0077

[Install]
WantedBy=multi-user.target
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stand_in_a_unit_as_they_are() {
        let unit = unit(Path::new("/opt/a b%$/murmesh"), Path::new("/srv/x"), None, "m");
        assert!(unit.contains("ExecStart=\"/opt/a b%%$$/murmesh\" agent\n"), "{unit}");
        assert!(unit.contains("ReadWritePaths=\"/srv/x\"\n"), "{unit}");
        assert!(!unit.contains("StateDirectory"), "{unit}");
    }
}
