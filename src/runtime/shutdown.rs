//! How an agent stops, in stages.

use tokio::sync::watch;

/// Where the agent is in its life. Only ever moves forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Serving.
    #[default]
    Running,
    /// Takes nothing new, finishes what it has.
    Draining,
    /// Cuts what is left and closes connections.
    Closing,
}

/// Tells everybody the stage. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shutdown {
    stage: watch::Sender<Stage>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { stage: watch::Sender::new(Stage::Running) }
    }
}

impl Shutdown {
    /// Moves on to `stage`; going back is ignored.
    pub fn advance(&self, stage: Stage) {
        self.stage.send_if_modified(|now| {
            let is_later = stage > *now;
            if is_later {
                *now = stage;
            }
            is_later
        });
    }

    /// Returns once the stage is `stage` or later. Cancel safe.
    pub async fn reached(&self, stage: Stage) {
        // The sender lives in self: the channel cannot be closed while we wait.
        let _ = self.stage.subscribe().wait_for(|now| *now >= stage).await;
    }
}
