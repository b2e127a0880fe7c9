//! Where a local instance or a local entry listens.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest path of a unix socket: `sockaddr_un` holds 108 bytes with the closing zero.
const UNIX_PATH_LEN_MAX: usize = 107;

/// A stream socket on this machine: `127.0.0.1:8080`, `[::1]:80` or `unix:/run/app.sock`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Target {
    /// An IP address and port.
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

impl Target {
    /// The port, for TCP.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(address) => Some(address.port()),
            Self::Unix(_) => None,
        }
    }
}

/// An address that cannot be used. Fault: whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// It is none of the forms. Holds what was written, at most 120 characters of it.
    #[error("'{0}' is not an address, expected ip:port (127.0.0.1:8080), a port, or unix:/path")]
    Malformed(String),
    /// A path that is not absolute: the agent and who asks it may run in different directories.
    /// Holds what was written, at most 120 characters of it.
    #[error("'{0}' is no absolute path, expected unix: and a path that begins with /")]
    Relative(String),
    /// The path of a unix socket is longer than the system takes.
    #[error("'{text}' is {len} bytes long, expected a path of at most {UNIX_PATH_LEN_MAX} bytes")]
    TooLong {
        /// What was written, at most 120 characters of it.
        text: String,
        /// Bytes of the path.
        len: usize,
    },
}

impl FromStr for Target {
    type Err = TargetError;

    /// A bare port means 127.0.0.1.
    fn from_str(text: &str) -> Result<Self, TargetError> {
        let shown = || text.chars().take(120).collect();
        let refused = || TargetError::Malformed(shown());
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.len() {
                _ if !path.starts_with('/') => Err(TargetError::Relative(shown())),
                ..=UNIX_PATH_LEN_MAX => Ok(Self::Unix(path.into())),
                len => Err(TargetError::TooLong { text: shown(), len }),
            };
        }
        if let Ok(port) = text.parse::<u16>() {
            return Ok(Self::Tcp(([127, 0, 0, 1], port).into()));
        }
        let numeric = match text.strip_prefix("localhost:") {
            Some(port) => format!("127.0.0.1:{port}"),
            None => text.to_owned(),
        };
        numeric.parse().map(Self::Tcp).map_err(|_| refused())
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.pad(&address.to_string()),
            Self::Unix(path) => f.pad(&format!("unix:{}", path.display())),
        }
    }
}

impl TryFrom<String> for Target {
    type Error = TargetError;

    fn try_from(text: String) -> Result<Self, TargetError> {
        text.parse()
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_parse_and_print_the_same() {
        for (text, printed) in [
            ("127.0.0.1:8080", "127.0.0.1:8080"),
            ("[::1]:80", "[::1]:80"),
            ("8080", "127.0.0.1:8080"),
            ("localhost:8080", "127.0.0.1:8080"),
            ("unix:/run/x.sock", "unix:/run/x.sock"),
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), printed);
        }
        for bad in ["", "web", "1.2.3.4", "127.0.0.1:70000", "unix:", ":80"] {
            assert!(bad.parse::<Target>().is_err(), "{bad}");
        }
        for (bad, expected) in [
            ("unix:web.sock".to_owned(), "begins with /"),
            ("unix:./web.sock".to_owned(), "begins with /"),
            (format!("unix:/{}", "x".repeat(107)), "108 bytes long"),
        ] {
            let told = bad.parse::<Target>().unwrap_err().to_string();
            assert!(told.contains(expected) && told.contains(&bad), "{told}");
        }
    }
}
