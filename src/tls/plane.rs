//! The four planes that share one UDP port.

use crate::model::MeshId;

/// What a connection is for. Decides thread, limits and who may come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Plane {
    /// Membership and replicated state.
    Gossip,
    /// Traffic of services.
    Data,
    /// The only door without a client certificate: joining.
    Enrolment,
    /// A member asks an issuer for its next leaf; one that ended opens this door, too.
    Renewal,
}

impl Plane {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Gossip, Self::Data, Self::Enrolment, Self::Renewal];

    /// First byte of the initial destination connection id that a dialler chooses.
    pub const fn marker(self) -> u8 {
        match self {
            Self::Gossip => 0x67,
            Self::Data => 0x64,
            Self::Enrolment => 0x65,
            Self::Renewal => 0x72,
        }
    }

    /// The plane that a marker names.
    pub fn from_marker(marker: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|plane| plane.marker() == marker)
    }

    /// The ALPN protocol: plane, wire version and mesh, so that a stranger is refused first.
    pub fn alpn(self, mesh: &MeshId) -> Vec<u8> {
        let plane = match self {
            Self::Gossip => "gossip",
            Self::Data => "data",
            Self::Enrolment => "enrol",
            Self::Renewal => "renew",
        };
        format!("murmesh-{plane}/1/{}", mesh.short()).into_bytes()
    }
}
