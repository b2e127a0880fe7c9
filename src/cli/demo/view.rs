//! The mesh as one agent sees it, asked over its local API again and again.

use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::sleep;

use super::fetch::fetch;

/// Between two questions. Short enough that times of the display mean something.
const INTERVAL: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(2);

/// What the display needs of `/v1/mesh/members`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct MemberRow {
    pub(super) name: String,
    pub(super) state: String,
    pub(super) services: Vec<String>,
}

/// What the display needs of `/v1/mesh/services`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct ServiceRow {
    name: String,
    instances: usize,
    ready: usize,
}

/// What one agent told last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    pub(super) members: Vec<MemberRow>,
    services: Vec<ServiceRow>,
}

impl View {
    /// Whether the member `name` is seen alive.
    pub(super) fn is_alive(&self, name: &str) -> bool {
        self.state(name) == Some("alive")
    }

    /// How the member `name` is seen.
    pub(super) fn state(&self, name: &str) -> Option<&str> {
        let row = self.members.iter().find(|row| row.name == name);
        row.map(|row| row.state.as_str())
    }

    /// How many instances of a service are ready, and how many there are.
    pub(super) fn ready(&self, service: &str) -> (usize, usize) {
        let row = self.services.iter().find(|row| row.name == service);
        row.map_or((0, 0), |row| (row.ready, row.instances))
    }
}

/// Asks the agent at `api` for ever; what it tells goes to `view`.
pub(super) async fn watch_mesh(api: SocketAddr, view: watch::Sender<View>) {
    loop {
        let members = ask::<Vec<MemberRow>>(api, "/v1/mesh/members").await;
        let services = ask::<Vec<ServiceRow>>(api, "/v1/mesh/services").await;
        // An agent that does not answer now leaves the last view standing.
        if let (Some(members), Some(services)) = (members, services) {
            let told = View { members, services };
            view.send_if_modified(|view| {
                let is_news = *view != told;
                if is_news {
                    *view = told;
                }
                is_news
            });
        }
        sleep(INTERVAL).await;
    }
}

async fn ask<T: DeserializeOwned>(api: SocketAddr, path: &str) -> Option<T> {
    let answer = fetch(api, path, PATIENCE).await.ok()?;
    serde_json::from_slice(&answer.body).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_are_read_by_their_documented_fields() {
        let members = r#"[{"name":"ash","id":"x","address":"127.0.0.1:1","zone":"","state":"alive",
            "revoked":false,"draining":false,"epoch":1,"version":2,"services":[],"age_ms":3}]"#;
        let services = r#"[{"name":"greeter","protocol":"tcp","instances":2,"ready":1}]"#;
        let view = View {
            members: serde_json::from_str(members).unwrap(),
            services: serde_json::from_str(services).unwrap(),
        };
        assert!(view.is_alive("ash") && !view.is_alive("birch"));
        assert_eq!((view.ready("greeter"), view.ready("clock")), ((1, 2), (0, 0)));
    }
}
