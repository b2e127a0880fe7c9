//! Members that people want to see no more: hidden from listings here, and only from those.

use std::sync::Arc;

use super::control::Controller;
use crate::api::ControlError;
use crate::mesh::MemberView;
use crate::model::{MemberId, MemberState};

/// Members that may be hidden at once: as many as the mesh promises.
const FORGOTTEN_MAX: usize = 1_024;

impl Controller {
    /// Hides the members of that name or id that are down or left.
    pub(super) fn forget(&mut self, node: &str) -> Result<(), ControlError> {
        let snapshot = self.snapshot.load_full();
        let is_meant =
            |view: &&MemberView| view.name.as_str() == node || view.id.to_string() == node;
        let meant: Vec<_> = snapshot.members.values().map(Arc::as_ref).filter(is_meant).collect();
        let gone: Vec<_> = meant.iter().filter(|view| is_gone(view)).map(|view| view.id).collect();
        match (meant.first(), gone.is_empty()) {
            (None, _) => {
                let name = node.chars().take(80).collect();
                return Err(ControlError::NotFound { what: "member", name });
            }
            (Some(view), true) => {
                return Err(ControlError::Conflict(format!(
                    "member '{}' is {}: only one that is down or left can be forgotten",
                    view.name, view.state
                )));
            }
            (Some(_), false) => {}
        }
        let forgotten = &mut self.runtime.forgotten;
        if forgotten.len() + gone.len() > FORGOTTEN_MAX {
            forgotten.retain(|id| snapshot.members.contains_key(id));
        }
        if forgotten.len() + gone.len() > FORGOTTEN_MAX {
            let text = format!("{FORGOTTEN_MAX} members are forgotten already, as many as may be");
            return Err(ControlError::Conflict(text));
        }
        forgotten.extend(gone);
        self.show();
        self.keep()
    }

    /// Whoever is back is hidden no more, also when it goes again.
    pub(super) fn remember_returned(&mut self) {
        let snapshot = self.snapshots.borrow_and_update().clone();
        let is_back = |id: &MemberId| snapshot.members.get(id).is_some_and(|view| !is_gone(view));
        let before = self.runtime.forgotten.len();
        self.runtime.forgotten.retain(|id| !is_back(id));
        if self.runtime.forgotten.len() < before {
            self.show();
            let _ = self.keep(); // it warns, and the next start finds it out again
        }
    }
}

fn is_gone(view: &MemberView) -> bool {
    matches!(view.state, MemberState::Down | MemberState::Left)
}
