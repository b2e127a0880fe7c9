//! Carrying bytes both ways, with half-close, until both ends were said or one side is cut.
//!
//! Each direction ends for itself. A reader that goes away (`Stopped`, a failed local write) ends
//! only its own direction, as in TCP: the answer on its way back still arrives. A source that is cut
//! ends everything, and the guards of both sides reset what has not ended.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::both::try_both;
use super::call::Call;
use super::load::Work;
use super::local::{CHUNKS_MAX, LocalReader, LocalSocket, LocalWriter};
use super::stalls::{Stalls, WriteError};
use super::traffic::Meter;
use crate::model::Outcome;
use crate::transport::tunnel::{ResetCode, TunnelError, TunnelReader, TunnelWriter};

/// Why a connection did not end by both its ends.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Cut {
    /// The application's connection failed.
    #[error("local connection: {0}")]
    Local(io::ErrorKind),
    /// The peer, or the way to it, failed.
    #[error(transparent)]
    Tunnel(#[from] TunnelError),
    /// The application took nothing for so long that its memory was needed.
    #[error("stalled")]
    Stalled,
}

/// Of a tunnel whose end is that of its instance: how much of what the caller said the instance was
/// given, at most.
#[derive(Debug)]
struct Given<'a> {
    len: AtomicU64,
    /// As it was when the instance last said something.
    len_when_said: AtomicU64,
    /// Under way from what it is given until it says something.
    work: &'a Work,
}

impl<'a> Given<'a> {
    fn new(work: &'a Work) -> Self {
        Self { len: AtomicU64::new(0), len_when_said: AtomicU64::new(0), work }
    }

    fn add(&self, chunks: &[Bytes]) {
        let len: usize = chunks.iter().map(Bytes::len).sum();
        self.len.fetch_add(len as u64, Ordering::Relaxed);
        self.work.begin();
    }

    fn len(&self) -> u64 {
        self.len.load(Ordering::Relaxed)
    }

    fn note_said(&self) {
        self.len_when_said.store(self.len(), Ordering::Relaxed);
        self.work.end();
    }

    /// Whether the instance was given nothing since it last said something.
    fn is_unasked(&self) -> bool {
        self.len() == self.len_when_said.load(Ordering::Relaxed)
    }
}

impl From<io::Error> for Cut {
    fn from(error: io::Error) -> Self {
        Self::Local(error.kind())
    }
}

/// How a direction ended that did not cut the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Its end was said and carried.
    Well,
    /// Whoever it leads to wants no more.
    Unwanted,
}

/// What a client said that is not yet on its way.
#[derive(Debug, Default)]
pub(super) struct Leftover {
    /// In order.
    pub(super) chunks: Vec<Bytes>,
    /// Whether the client's end follows.
    pub(super) has_ended: bool,
}

/// Carries bytes between a local socket and a tunnel, `left` first. `Ok` when both directions ended and the
/// far agent may still be reading the last bytes; everything else resets on drop. `call` is judged by what
/// comes out of the tunnel first.
pub(super) async fn carry(
    local: &mut LocalSocket,
    writer: &mut TunnelWriter,
    reader: &mut TunnelReader,
    left: Leftover,
    carried: Meter<'_>,
    stalls: &Stalls,
    call: Option<&Call>,
) -> Result<(), Cut> {
    let (local_reader, local_writer) = local.split();
    let outcome = {
        // Pinned here and not inside the join, which would hold them twice.
        let there = pin!(to_tunnel(local_reader, writer, left, carried, None));
        let back = pin!(to_local(reader, local_writer, carried, stalls, None, call));
        try_both(there, back).await
    };
    if outcome == Err(Cut::Stalled) {
        writer.set_drop_code(ResetCode::Stalled);
        reader.stop(ResetCode::Stalled);
    }
    match outcome? {
        (Ended::Well, Ended::Well) => Ok(()),
        (_, Ended::Unwanted) => Err(Cut::Local(io::ErrorKind::BrokenPipe)),
        (Ended::Unwanted, Ended::Well) => Ok(()), // it answered in full and reads no more
    }
}

/// As [`carry`] at the far agent, but what the instance says last ends the whole tunnel: from then on
/// it is given nothing, and the caller is told how much it had. A caller that ends first is `Ok`, too.
/// `work` is under way while the instance has not begun to answer.
pub(super) async fn carry_while_instance_lasts(
    local: &mut LocalSocket,
    writer: &mut TunnelWriter,
    reader: &mut TunnelReader,
    carried: Meter<'_>,
    stalls: &Stalls,
    work: &Work,
) -> Result<(), Cut> {
    let (local_reader, local_writer) = local.split();
    let given = Given::new(work);
    let unwanted = writer.unwanted();
    let (ended, is_stalled) = {
        let none = Leftover::default();
        let mut there = pin!(to_tunnel(local_reader, writer, none, carried, Some(&given)));
        let mut back = pin!(to_local(reader, local_writer, carried, stalls, Some(&given), None));
        // First what the instance says: its end counts before another byte is given to it.
        tokio::select! {
            biased;
            ended = &mut there => (ended, false),
            ended = &mut back => match ended {
                // The caller has said all; what the instance still says is carried while it listens. One
                // that gives back a connection that rested does not, and some instances never close theirs.
                Ok(Ended::Well) => {
                    if given.is_unasked() {
                        work.settle(); // it has its answer, and the instance will close in a moment
                    }
                    return tokio::select! {
                        biased;
                        ended = there => ended.map(drop),
                        () = unwanted => Ok(()),
                    };
                }
                // The instance reads no more, and may have said why before it closed.
                Ok(Ended::Unwanted) => (there.await, false),
                Err(Cut::Stalled) => (Err(Cut::Stalled), true),
                Err(cut) => return Err(cut),
            },
        }
    };
    if is_stalled {
        writer.set_drop_code(ResetCode::Stalled);
        reader.stop(ResetCode::Stalled);
        return ended.map(drop);
    }
    // So a server leaves that refuses an upload: its answer is to be read, and then that it was cut.
    let was_cut = matches!(ended, Err(Cut::Local(_)));
    reader.stop_at(given.len(), was_cut);
    if was_cut {
        writer.end();
        writer.delivered().await;
    }
    ended.map(drop)
}

async fn to_tunnel(
    mut from: LocalReader<'_>,
    to: &mut TunnelWriter,
    left: Leftover,
    carried: Meter<'_>,
    given: Option<&Given<'_>>,
) -> Result<Ended, Cut> {
    let outcome = async {
        for chunk in left.chunks {
            to.write(chunk).await?;
        }
        if left.has_ended {
            return Ok(());
        }
        loop {
            let chunk = from.read(usize::MAX).await?;
            if chunk.is_empty() {
                return Ok(());
            }
            carried.count_said(chunk.len());
            to.write(chunk).await?;
            if let Some(given) = given {
                given.note_said();
            }
        }
    };
    match outcome.await {
        Ok(()) => {
            to.end();
            Ok(Ended::Well)
        }
        Err(Cut::Tunnel(TunnelError::Stopped(_))) => Ok(Ended::Unwanted),
        Err(cut) => Err(cut),
    }
}

async fn to_local(
    from: &mut TunnelReader,
    mut to: LocalWriter<'_>,
    carried: Meter<'_>,
    stalls: &Stalls,
    given: Option<&Given<'_>>,
    call: Option<&Call>,
) -> Result<Ended, Cut> {
    let mut chunks = [const { Bytes::new() }; CHUNKS_MAX];
    loop {
        let read = from.read_chunks(&mut chunks).await;
        if let Some(call) = call {
            // Cut before it said anything: by the instance. A lost connection says nothing about it.
            let is_cut = read == Err(TunnelError::Reset(ResetCode::Cut.into()));
            let is_lost = read.is_err() && !is_cut;
            call.judge(match () {
                () if is_lost => Outcome::Unknown,
                () if is_cut => Outcome::Failed,
                () => Outcome::Success,
            });
        }
        let Some(count) = read? else {
            to.end().await?;
            return Ok(Ended::Well);
        };
        let chunks = &mut chunks[..count];
        carried.count_sent(chunks.iter().map(Bytes::len).sum());
        if let Some(given) = given {
            if given.is_unasked() && to.is_over() {
                return pending().await; // the other direction ends both
            }
            given.add(chunks); // before: a write that is given up may have written some of it
        }
        if wanted(to.write(chunks, stalls).await)? == Ended::Unwanted {
            from.stop(ResetCode::Cut);
            return Ok(Ended::Unwanted);
        }
    }
}

/// Carries bytes between two local sockets: a client and an instance of this very member. `call` is
/// judged by what the instance does first.
pub(super) async fn carry_locally(
    client: &mut LocalSocket,
    instance: &mut LocalSocket,
    left: Leftover,
    carried: Meter<'_>,
    stalls: &Stalls,
    call: Option<&Call>,
) -> Result<(), Cut> {
    let (client_reader, client_writer) = client.split();
    let (instance_reader, instance_writer) = instance.split();
    let said = |len| carried.count_said(len);
    let there = pin!(across(client_reader, instance_writer, left, said, stalls, None));
    let none = Leftover::default();
    let sent = |len| carried.count_sent(len);
    let back = pin!(across(instance_reader, client_writer, none, sent, stalls, call));
    match try_both(there, back).await? {
        (_, Ended::Well) => Ok(()),
        (_, Ended::Unwanted) => Err(Cut::Local(io::ErrorKind::BrokenPipe)),
    }
}

async fn across(
    mut from: LocalReader<'_>,
    mut to: LocalWriter<'_>,
    mut left: Leftover,
    count: impl Fn(usize),
    stalls: &Stalls,
    call: Option<&Call>,
) -> Result<Ended, Cut> {
    for chunk in &mut left.chunks {
        match wanted(to.write(std::slice::from_mut(chunk), stalls).await)? {
            Ended::Well => {}
            unwanted => return Ok(unwanted),
        }
    }
    let mut has_ended = left.has_ended;
    while !has_ended {
        let read = from.read(usize::MAX).await;
        if let Some(call) = call {
            call.judge(if read.is_ok() { Outcome::Success } else { Outcome::Failed });
        }
        let mut chunk = read?;
        has_ended = chunk.is_empty();
        if has_ended {
            break;
        }
        count(chunk.len());
        match wanted(to.write(std::slice::from_mut(&mut chunk), stalls).await)? {
            Ended::Well => {}
            unwanted => return Ok(unwanted),
        }
    }
    Ok(to.end().await.map_or(Ended::Unwanted, |()| Ended::Well))
}

fn wanted(written: Result<(), WriteError>) -> Result<Ended, Cut> {
    match written {
        Ok(()) => Ok(Ended::Well),
        Err(WriteError::Io(_)) => Ok(Ended::Unwanted),
        Err(WriteError::Stalled(_)) => Err(Cut::Stalled),
    }
}
