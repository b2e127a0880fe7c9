//! A service called from within this process: the connection, and why there is none.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::pipe::Pipe;
use crate::mesh::{Endpoint, NoEndpoint};
use crate::transport;
use crate::transport::tunnel::{OpenError, RefusalCode};

/// A connection to an instance of a service, as `AsyncRead + AsyncWrite`.
///
/// It has the manners of TCP. `shutdown` is the end of what we say: the instance reads all of it and
/// then an end, and may still answer. A read returns 0 only when the instance has said its own
/// end; a connection that is cut on the way is `ConnectionReset`, never a short answer. Dropped
/// before `shutdown` it is reset, and the instance knows that what it has is not all.
///
/// Up to 64 KiB wait in each direction; beyond that the writer waits for the reader.
#[derive(Debug)]
pub struct MeshStream {
    pipe: Pipe,
    endpoint: Endpoint,
}

impl MeshStream {
    pub(super) fn new(pipe: Pipe, endpoint: Endpoint) -> Self {
        Self { pipe, endpoint }
    }

    /// The instance that took the call, as it was seen when it was picked.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl AsyncRead for MeshStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_read(cx, buf)
    }
}

impl AsyncWrite for MeshStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}

/// No instance took the call, and no byte of it has reached one. Where several were tried, this is
/// what the last of them said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// No member offers the service. Fault: the name, or it is not known here yet.
    #[error("no member offers this service")]
    UnknownService,
    /// Instances are failing, down, without weight, or were all tried. Fault: the instances.
    #[error("no instance is ready")]
    NoEndpoints,
    /// Those that are ready are all farther than the entry lets calls go. Fault: the operator, or the
    /// instances that are near.
    #[error("every instance that is ready is farther than 'prefer' lets calls go")]
    TooFar,
    /// Instances, or the agents in front of them, take nothing new. Fault: nobody's.
    #[error("every instance is draining")]
    Draining,
    /// Every instance was taken out by its operator.
    #[error("every instance is in maintenance")]
    Maint,
    /// A rule forbids it, and would everywhere. Fault: the operator, or the caller.
    #[error("denied by a rule")]
    Denied,
    /// The agent that was to have the instance has it no more. Fault: a stale view.
    #[error("the instance is gone")]
    NotServed,
    /// The instance accepts no connection, or its machine cannot be dialled. Fault: the instance or
    /// the network.
    #[error("the instance cannot be reached")]
    Unreachable,
    /// The two agents did not accept each other, for this fixed reason. Fault: credentials.
    #[error("its agent refused the handshake: {0}")]
    Handshake(&'static str),
    /// Its agent cannot do what we ask for. Fault: versions that are too far apart.
    #[error("its agent does not support the call")]
    Unsupported,
    /// Its agent refused for a reason that this version does not know.
    #[error("its agent refused the call")]
    Refused,
    /// The instance, its agent or this one has too much to do. Fault: load.
    #[error("as many connections or requests are open as are allowed")]
    Overflow,
    /// All callers together hold that the instance fails, and its agent keeps calls from it. Fault: the
    /// instance.
    #[error("every instance left is ejected")]
    Ejected,
    /// Its machine has fallen silent. Fault: the machine or the network.
    #[error("its machine has fallen silent")]
    Silent,
    /// The connection to its machine was lost before it answered. Fault: the machine or the network.
    #[error("the connection to its machine was lost")]
    Lost,
    /// Nobody answered in time. Fault: the machine or the network.
    #[error("no instance answered in time")]
    Timeout,
    /// This very agent takes nothing new.
    #[error("this agent is stopping")]
    Stopping,
}

impl DialError {
    /// The fixed word of metrics and events.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::UnknownService => "unknown_service",
            Self::TooFar | Self::NoEndpoints => "no_endpoints",
            Self::Draining => "draining",
            Self::Maint => "maint",
            Self::Denied => "denied",
            Self::NotServed => "not_served",
            Self::Unreachable => "unreachable",
            Self::Handshake(reason) => reason,
            Self::Unsupported => "unsupported",
            Self::Refused => "refused",
            Self::Overflow => "overflow",
            Self::Ejected => "all_ejected",
            Self::Silent => "silent",
            Self::Lost => "lost",
            Self::Timeout => "timeout",
            Self::Stopping => "stopping",
        }
    }

    /// Whether the same call may succeed a moment later, without anybody changing a rule or a
    /// version.
    pub const fn is_retryable(self) -> bool {
        !matches!(self, Self::Denied | Self::Unsupported | Self::Stopping)
    }
}

impl From<NoEndpoint> for DialError {
    fn from(none: NoEndpoint) -> Self {
        match none {
            NoEndpoint::UnknownService => Self::UnknownService,
            NoEndpoint::Draining => Self::Draining,
            NoEndpoint::Maint => Self::Maint,
            NoEndpoint::TooFar => Self::TooFar,
            NoEndpoint::NoEndpoints => Self::NoEndpoints,
        }
    }
}

impl From<RefusalCode> for DialError {
    fn from(code: RefusalCode) -> Self {
        match code {
            RefusalCode::NOT_SERVED => Self::NotServed,
            RefusalCode::DRAINING => Self::Draining,
            RefusalCode::UNREACHABLE => Self::Unreachable,
            RefusalCode::OVERFLOW => Self::Overflow,
            RefusalCode::DENIED => Self::Denied,
            RefusalCode::UNSUPPORTED => Self::Unsupported,
            RefusalCode::EJECTED => Self::Ejected,
            RefusalCode(_) => Self::Refused,
        }
    }
}

impl From<transport::DialError> for DialError {
    fn from(error: transport::DialError) -> Self {
        match error {
            transport::DialError::Timeout => Self::Timeout,
            transport::DialError::Refused { reason } => Self::Handshake(reason),
            transport::DialError::Connect(_) => Self::Unreachable,
        }
    }
}

impl From<OpenError> for DialError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Overflow => Self::Overflow,
            OpenError::Lost(_) => Self::Lost,
        }
    }
}
