//! Several agents of one mesh.

use std::sync::Arc;

use tempfile::TempDir;

use super::SOON;
use super::agent::Agent;

/// A mesh on loopback: the first agent is founder, issuer and seed.
pub struct TestMesh {
    pub home: Arc<TempDir>,
    pub agents: Vec<Agent>,
}

impl TestMesh {
    /// A directory and no agent yet.
    pub fn new() -> Self {
        // In memory, where that can be had: what tests claim of time is not of disks, and one that is
        // still busy with the build takes seconds to say that a file is safe.
        let mut home = tempfile::Builder::new();
        let home = home.prefix("murmesh-");
        let home = home.tempdir_in("/dev/shm").or_else(|_| home.tempdir());
        Self { home: Arc::new(home.expect("a directory")), agents: Vec::new() }
    }

    /// A mesh of running agents with these names, where everybody knows everybody.
    #[track_caller]
    pub fn of(names: &[&str]) -> Self {
        let mut mesh = Self::new();
        mesh.found(names[0]);
        let count = names.len();
        if count > 1 {
            let token = mesh.invite(count - 1);
            for name in &names[1..] {
                mesh.join(name, &token);
            }
        }
        for agent in &mesh.agents {
            agent.wait_alive(count, SOON);
        }
        mesh
    }

    /// Founds the mesh with its first agent.
    #[track_caller]
    pub fn found(&mut self, name: &str) -> &Agent {
        let agent = Agent::new(&self.home, name);
        self.found_with(agent)
    }

    /// The same with an agent made elsewhere.
    #[track_caller]
    pub fn found_with(&mut self, agent: Agent) -> &Agent {
        let at = agent.mesh.to_string();
        agent.run(&["init", "--name", &agent.name, "--mesh", &at, "--advertise", &at]).ok();
        agent.start();
        self.agents.push(agent);
        self.agents.last().expect("just pushed")
    }

    /// A token for `uses` newcomers, made by the first agent.
    #[track_caller]
    pub fn invite(&self, uses: usize) -> String {
        let printed = self.agents[0].run(&["invite", "--uses", &uses.to_string()]).ok();
        printed.trim().to_owned()
    }

    /// A newcomer that joined and runs.
    #[track_caller]
    pub fn join(&mut self, name: &str, token: &str) -> &Agent {
        let agent = Agent::new(&self.home, name);
        self.join_with(agent, token)
    }

    /// The same with an agent made elsewhere.
    #[track_caller]
    pub fn join_with(&mut self, agent: Agent, token: &str) -> &Agent {
        enrol(&agent, token);
        agent.start();
        self.agents.push(agent);
        self.agents.last().expect("just pushed")
    }

    /// The agent of that name.
    #[track_caller]
    pub fn agent(&self, name: &str) -> &Agent {
        let found = self.agents.iter().find(|agent| agent.name == name);
        found.unwrap_or_else(|| panic!("no agent {name}"))
    }
}

/// Joins without starting.
#[track_caller]
pub fn enrol(agent: &Agent, token: &str) {
    let at = agent.mesh.to_string();
    let arguments = ["join", token, "--name", &agent.name, "--mesh", &at, "--advertise", &at];
    agent.run(&arguments).ok();
}
