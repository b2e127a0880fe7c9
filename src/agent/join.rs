//! Joining a mesh with a token: the newcomer's side, run once before its first start.

use std::net::SocketAddr;
use std::path::PathBuf;

use futures_util::future::join_all;

use super::disowned;
use super::left::{self, has_left};
use super::start::grounds;
use crate::model::{MemberId, MemberName, MeshId, ServiceName, Signer};
use crate::runtime::reach::{Obstacle, obstacle};
use crate::tls::store::{DataDir, StoreError};
use crate::tls::{NodeCredentials, TlsError, Token};
use crate::transport::enrolment::{EXCHANGE_TIME_MAX, KnockError, knock};

/// What `join` was asked for.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// Where the new identity goes.
    pub data_dir: PathBuf,
    /// As handed out by `invite`.
    pub token: String,
    /// The name wanted.
    pub name: MemberName,
    /// Whether to take the name over from a member that is gone: this machine, before it was set up
    /// anew.
    pub replace: bool,
    /// Issuers to ask before those of the token.
    pub seeds: Vec<SocketAddr>,
}

/// What `join` did.
#[derive(Clone, Debug)]
pub struct JoinReport {
    /// The mesh joined.
    pub mesh: MeshId,
    /// Who this machine is now.
    pub member: MemberId,
    /// What people call it.
    pub name: MemberName,
    /// Members to dial first, for the node's settings.
    pub seeds: Vec<SocketAddr>,
    /// The only services that it may offer; all when absent.
    pub services: Option<Vec<ServiceName>>,
    /// True when there was an identity of this mesh already and nothing changed.
    pub was_there: bool,
}

/// Joining failed. What was in the data directory still is.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Fault: whoever wrote the token.
    #[error(transparent)]
    Token(#[from] TlsError),
    /// Fault: the data directory, for instance one of another mesh.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No issuer let us in.
    #[error(transparent)]
    Knock(#[from] KnockError),
    /// None was reached. Fault: the network, or no agent runs there. A retry is safe.
    #[error("no issuer could be reached within {} s each: {}", EXCHANGE_TIME_MAX.as_secs(), told(.0))]
    Unreachable(Vec<(SocketAddr, Obstacle)>),
}

/// Joins the mesh of a token. Repeated for the same mesh: unchanged, unless this machine has left, nobody
/// vouches for it any more, the others refused it, or its memory of the mesh is damaged: then it is let in
/// again, under its old key. For another mesh: refused.
pub async fn join(options: JoinOptions) -> Result<JoinReport, JoinError> {
    let token: Token = options.token.parse()?;
    let dir = DataDir::new(options.data_dir);
    if dir.has_identity() {
        let credentials = dir.credentials()?;
        if *credentials.mesh() != token.mesh {
            return Err(JoinError::Store(StoreError::OtherMesh {
                path: dir.path().to_owned(),
                found: credentials.mesh().short(),
                wanted: token.mesh.short(),
            }));
        }
        let is_believed = is_vouched(&dir, &credentials) && !disowned::is_marked(&dir);
        if !has_left(&dir) && is_believed {
            return Ok(report(&credentials, token.issuers.clone(), true));
        }
    }
    dir.create()?;
    let _lock = dir.lock()?;
    let node = dir.node_key()?;
    let mut issuers = options.seeds;
    issuers.extend(
        token
            .issuers
            .iter()
            .filter(|issuer| !issuers.contains(issuer))
            .copied()
            .collect::<Vec<_>>(),
    );
    let welcome = match knock(&token, &issuers, &node, &options.name, options.replace).await {
        Err(error @ KnockError::Unreachable(_)) => return Err(unreachable(&issuers, error).await),
        welcome => welcome?,
    };
    let mut seeds: Vec<_> = welcome.contacts.iter().map(|(_, address)| *address).collect();
    seeds.extend(issuers);
    seeds.sort_unstable();
    seeds.dedup();
    dir.store_identity(&welcome.genesis, &welcome.entries, &welcome.chain)?;
    left::clear(&dir)?;
    disowned::clear(&dir)?;
    let credentials = dir.credentials()?;
    debug_assert_eq!(credentials.public_key(), node.public_key());
    Ok(report(&credentials, seeds, false))
}

/// What keeps this machine from the issuers; `error` as it is when something answers everywhere.
async fn unreachable(issuers: &[SocketAddr], error: KnockError) -> JoinError {
    let asked = issuers.iter().map(async |issuer| (*issuer, obstacle(*issuer).await));
    let obstacles = join_all(asked).await;
    match obstacles.iter().all(|(_, obstacle)| *obstacle == Obstacle::None) {
        true => error.into(),
        false => JoinError::Unreachable(obstacles),
    }
}

fn told(obstacles: &[(SocketAddr, Obstacle)]) -> String {
    let told = obstacles.iter().map(|(address, obstacle)| format!("{address}/udp: {obstacle}"));
    told.collect::<Vec<_>>().join("; ")
}

/// Whether an agent can start from what this directory remembers of the mesh: it names an issuer that
/// vouches for this member.
fn is_vouched(dir: &DataDir, credentials: &NodeCredentials) -> bool {
    let Ok(mut entries) = dir.entries() else { return false };
    entries.push(credentials.enrolment().clone());
    grounds(credentials, &entries).enrolment(credentials.member_id()).is_some()
}

fn report(credentials: &NodeCredentials, seeds: Vec<SocketAddr>, was_there: bool) -> JoinReport {
    JoinReport {
        mesh: *credentials.mesh(),
        member: credentials.member_id(),
        name: credentials.name().clone(),
        seeds,
        services: credentials.enrolled().services.clone(),
        was_there,
    }
}
