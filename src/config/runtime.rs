//! The two files that murmesh writes for itself into the data directory: `node.toml` (what `init` and
//! `join` were told) and `runtime.toml` (what the CLI and the API exposed and opened). Replaced whole, by
//! rename.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::api::{ExposeSpec, OutOfRotation, UpstreamSpec};
use crate::model::MemberId;
use crate::tls::store::{DataDir, StoreError};

const NODE: &str = "node.toml";
const RUNTIME: &str = "runtime.toml";

/// What `init` and `join` were told, so that `agent` needs no file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFile {
    /// Where others reach this member, `host:port`; the default route's address when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// Where the UDP socket is bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mesh: Option<SocketAddr>,
    /// Whom to ask first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<String>,
}

/// What the CLI and the API exposed, opened and took out. Files win over it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeFile {
    /// What is out of rotation, instances of files too.
    #[serde(flatten)]
    pub out: OutOfRotation,
    /// Members hidden from this machine's listings until they are back.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub forgotten: BTreeSet<MemberId>,
    /// Instances by `murmesh expose`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expose: Vec<ExposeSpec>,
    /// Entries by `murmesh upstream`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub upstream: Vec<UpstreamSpec>,
}

impl NodeFile {
    /// What is there; empty when there is no file.
    pub fn load(dir: &DataDir) -> Result<Self, StoreError> {
        load(dir, NODE)
    }

    /// Replaces what is there.
    pub fn save(&self, dir: &DataDir) -> Result<(), StoreError> {
        save(
            dir,
            NODE,
            "Written by 'murmesh init' or 'murmesh join'. A configuration file wins.",
            self,
        )
    }
}

impl RuntimeFile {
    /// What is there; empty when there is no file.
    pub fn load(dir: &DataDir) -> Result<Self, StoreError> {
        load(dir, RUNTIME)
    }

    /// Replaces what is there.
    pub fn save(&self, dir: &DataDir) -> Result<(), StoreError> {
        save(dir, RUNTIME, "Written by the agent for its commands and its API; files win.", self)
    }
}

fn load<T: Default + for<'de> Deserialize<'de>>(
    dir: &DataDir,
    name: &str,
) -> Result<T, StoreError> {
    let Some(bytes) = dir.read(name)? else { return Ok(T::default()) };
    let text = String::from_utf8(bytes).map_err(|error| StoreError::damaged(dir.file(name), error));
    let text = text?;
    if text.trim().is_empty() {
        // Even one that says nothing begins with a comment.
        return Err(StoreError::damaged(dir.file(name), "it is empty"));
    }
    toml::from_str(&text)
        .map_err(|error| StoreError::damaged(dir.file(name), error.to_string().trim_end()))
}

fn save(
    dir: &DataDir,
    name: &str,
    comment: &str,
    content: &impl Serialize,
) -> Result<(), StoreError> {
    let text =
        toml::to_string(content).map_err(|error| StoreError::damaged(dir.file(name), error))?;
    dir.write(name, format!("# {comment}\n{text}").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_cli_exposed_survives_a_restart_and_damage_is_named() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::new(temporary.path());
        assert_eq!(RuntimeFile::load(&dir).unwrap(), RuntimeFile::default());
        let to = "unix:/run/web.sock".parse().unwrap();
        let expose = ExposeSpec::new("web".parse().unwrap(), to).unwrap();
        let listen = "127.0.0.1:5432".parse().unwrap();
        let upstream = UpstreamSpec::new("db".parse().unwrap(), listen);
        let maintenance = [(expose.id.clone(), "a new \"disk\"".to_owned())].into();
        let draining = [expose.id.clone()].into();
        let out = OutOfRotation { node_draining: true, draining, maintenance };
        let forgotten = [MemberId::from_bytes([7; 16])].into();
        let file = RuntimeFile { out, forgotten, expose: vec![expose], upstream: vec![upstream] };
        file.save(&dir).unwrap();
        assert_eq!(RuntimeFile::load(&dir).unwrap(), file);

        dir.write(RUNTIME, b"[[expose]]\nname = 3").unwrap();
        let error = RuntimeFile::load(&dir).unwrap_err().to_string();
        assert!(error.contains("runtime.toml is damaged"), "{error}");
        dir.write(NODE, b"\n").unwrap();
        let error = NodeFile::load(&dir).unwrap_err().to_string();
        assert!(error.contains("node.toml is damaged: it is empty; it may be deleted"), "{error}");
    }
}
