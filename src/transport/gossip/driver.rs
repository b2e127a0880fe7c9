//! The loop: wait, do one turn, measure it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep_until;
use tracing::debug;

use super::super::Standing;
use super::pool::{Input, Pool};
use super::{Command, Durable, Gossip};
use crate::breaker::{Grounds, InstanceChange, SharedEvent};
use crate::mesh::{Destination, Evidence, Lane, Mesh, MeshEvent, Snapshot};
use crate::model::{Entry, EntryKind, Epoch, MemberId, MemberState, Moment, ServiceName};
use crate::runtime::clock::Clock;
use crate::telemetry::{EVIDENCE, EventKind, EventLog, Metrics};
use crate::tls::{Dismissed, Trust};

/// Inputs taken in one turn before timers and sending get theirs.
const TURN_INPUTS_MAX: usize = 256;
/// The same in time: a message of entries to be verified takes as long as a thousand datagrams.
const TURN_TIME_MAX: Duration = Duration::from_millis(10);
/// What readers see is made anew at most this often, however much changes: in a mesh of 1,000 it takes,
/// by guess, a millisecond.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(20);
/// Inputs that wait for a turn. Datagrams over it are dropped and counted; messages have bounds of
/// their own, in number and in bytes, and wait.
const INBOX_LEN: usize = 4_096;
/// What is to be kept on disk is handed over at most this often.
const DURABLE_INTERVAL: Duration = Duration::from_secs(2);
/// Time that a goodbye gets to leave.
const GOODBYE_TIME: Duration = Duration::from_millis(400);

/// The node with everything around it, on the gossip thread.
pub(super) struct Driver {
    mesh: Mesh,
    clock: Clock,
    pool: Pool,
    inbox: mpsc::Receiver<Input>,
    commands: mpsc::Receiver<Command>,
    evidence: mpsc::Receiver<(MemberId, Evidence)>,
    /// Told that somebody speaks with this member.
    standing: Standing,
    /// Told who is believed, before readers see the mesh change.
    trust: Trust,
    snapshot: Arc<ArcSwap<Snapshot>>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    /// When readers may be shown the next change.
    snapshot_at: Moment,
    /// Whether there is one.
    is_changed: bool,
    durable: watch::Sender<Durable>,
    /// When a change is to be handed to the disk.
    durable_due: Option<Moment>,
    epochs_needed: Option<Epoch>,
    settled: watch::Sender<bool>,
    events: EventLog,
    metrics: Metrics,
    turn_max: Duration,
    turn_max_since: Moment,
}

/// What a turn begins with.
enum Wake {
    Input(Option<Input>),
    Command(Option<Command>),
    Evidence(Option<(MemberId, Evidence)>),
    Deadline,
}

/// What a turn ends with.
enum Turn {
    Done,
    /// Somebody asked to stop and waits, or nobody can ask any more.
    Stop(Option<oneshot::Sender<()>>),
}

impl Driver {
    pub(super) fn new(parts: Gossip) -> Self {
        let (inputs, inbox) = mpsc::channel(INBOX_LEN);
        let me = parts.mesh.id();
        let (trust, standing) = (parts.endpoint.trust().clone(), parts.endpoint.standing().clone());
        let (metrics, events) = (&parts.metrics, &parts.events);
        let pool =
            Pool::new(me, parts.endpoint, parts.incoming, inputs, parts.tasks, metrics, events);
        Self {
            mesh: parts.mesh,
            clock: parts.clock,
            pool,
            inbox,
            commands: parts.commands.receiver,
            evidence: parts.evidence,
            standing,
            trust,
            snapshot: parts.snapshot,
            snapshots: parts.snapshots,
            snapshot_at: Moment::START,
            is_changed: false,
            durable: parts.durable,
            durable_due: None,
            epochs_needed: None,
            settled: parts.settled,
            events: parts.events,
            metrics: parts.metrics,
            turn_max: Duration::ZERO,
            turn_max_since: Moment::START,
        }
    }

    pub(super) async fn run(mut self) {
        self.drain(self.clock.now());
        let asked = loop {
            let wake = self.wait().await;
            if let Turn::Stop(asked) = self.turn(wake) {
                break asked;
            }
        };
        self.say_goodbye().await;
        if let Some(done) = asked {
            let _ = done.send(()); // the asker gave up
        }
    }

    /// Does what `wake` brought, then what is due, then what the node wants done.
    fn turn(&mut self, wake: Wake) -> Turn {
        let began = self.clock.now();
        match wake {
            Wake::Input(Some(input)) => {
                self.handle_input(began, input);
                for _ in 1..TURN_INPUTS_MAX {
                    if self.clock.now().since(began) >= TURN_TIME_MAX {
                        break;
                    }
                    let Ok(input) = self.inbox.try_recv() else { break };
                    self.handle_input(began, input);
                }
            }
            Wake::Command(Some(Command::Stop(done))) => return Turn::Stop(Some(done)),
            Wake::Command(Some(command)) => self.handle_command(began, command),
            Wake::Evidence(Some((member, seen))) => {
                self.mesh.handle_evidence(began, member, seen);
            }
            Wake::Input(None) | Wake::Command(None) => return Turn::Stop(None),
            Wake::Evidence(None) | Wake::Deadline => {}
        }
        // Inputs come first, but however many there are, others get their word.
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Stop(done) => return Turn::Stop(Some(done)),
                command => self.handle_command(began, command),
            }
        }
        while let Ok((member, seen)) = self.evidence.try_recv() {
            self.mesh.handle_evidence(began, member, seen);
        }
        if self.mesh.poll_timeout().is_some_and(|deadline| deadline <= began) {
            self.mesh.handle_timeout(began);
        }
        self.drain(began);
        self.measure(began);
        Turn::Done
    }

    /// Waits for the next thing to do. What has arrived goes before timers, so that a process that
    /// was paused reads the answers before it convicts anybody. Cancel safe: only receives.
    async fn wait(&mut self) -> Wake {
        let snapshot_due = self.is_changed.then_some(self.snapshot_at);
        let deadlines = [self.mesh.poll_timeout(), self.durable_due, snapshot_due];
        let deadline = deadlines.into_iter().flatten().min();
        let deadline = self.clock.instant(deadline.unwrap_or(Moment::from_secs(u32::MAX.into())));
        tokio::select! {
            biased;
            input = self.inbox.recv() => Wake::Input(input),
            command = self.commands.recv() => Wake::Command(command),
            seen = self.evidence.recv(), if !self.evidence.is_closed() => Wake::Evidence(seen),
            () = sleep_until(deadline) => Wake::Deadline,
        }
    }

    fn handle_input(&mut self, now: Moment, input: Input) {
        match input {
            Input::Datagram(from, data, _share) => {
                self.metrics.gossip_datagrams_received.inc();
                self.metrics.gossip_bytes_received.inc_by(data.len() as u64);
                self.standing.note_heard();
                self.mesh.handle_datagram(now, from, &data);
            }
            Input::Message(from, data, _room) => {
                self.metrics.gossip_bytes_received.inc_by(data.len() as u64);
                self.standing.note_heard();
                self.mesh.handle_message(now, from, &data);
            }
            Input::Accepted(peer, connection) => self.pool.adopt(now, peer, connection),
            Input::Dialled(to, Ok((peer, connection))) => {
                let member = peer.id;
                if member == self.pool.me() {
                    self.forget_myself(now, to);
                } else {
                    let address = connection.remote_address();
                    let waiting = self.pool.dialled(now, to, peer, connection);
                    self.mesh.handle_connected(now, member, address);
                    for transmit in waiting {
                        self.pool.send(now, Lane::There, transmit); // it has just answered
                    }
                }
            }
            Input::Dialled(to, Err(error)) => {
                debug!(?to, error, "gossip dial failed");
                let waiting = self.pool.give_up(&to);
                if !self.pool.reaches(&to) {
                    return self.mesh.handle_unreachable(now, to);
                }
                // It came back while this dial waited for it in vain, and has dialled itself.
                for transmit in waiting {
                    self.pool.send(now, Lane::There, transmit);
                }
            }
            Input::Undelivered(to, member, connection) => {
                self.pool.close(member, Some(connection));
                if !self.pool.reaches(&to) {
                    self.mesh.handle_unreachable(now, to);
                }
            }
            Input::Closed(member, connection) => self.pool.forget(member, connection),
        }
    }

    /// A seed proved to be this agent itself: the node drops it.
    fn forget_myself(&mut self, now: Moment, to: Destination) {
        self.pool.give_up(&to);
        let (Destination::Seed(address) | Destination::Member { address, .. }) = to;
        self.mesh.handle_connected(now, self.pool.me(), address);
    }

    fn handle_command(&mut self, now: Moment, command: Command) {
        if matches!(command, Command::Offers(_) | Command::Phase(_) | Command::Publish(..)) {
            self.snapshot_at = now; // whoever changes something here sees it at once
        }
        match command {
            Command::Offers(offers) => self.mesh.set_offers(now, offers),
            Command::Phase(phase) => self.mesh.set_phase(now, phase),
            Command::Publish(entry, reply) => {
                let published = self.mesh.publish(now, entry).map_err(|error| error.to_string());
                let _ = reply.send(published);
            }
            Command::Entries(kind, reply) => {
                let _ = reply.send(self.mesh.entries_of(kind).cloned().collect());
            }
            Command::EntriesAbout(kind, subject, reply) => {
                let _ = reply.send(self.mesh.entries_about(kind, subject).cloned().collect());
            }
            Command::Holders(name, reply) => {
                let _ = reply.send(self.mesh.holders(&name).collect());
            }
            Command::StoreSizes(reply) => {
                let _ = reply.send(self.mesh.store_sizes().collect());
            }
            Command::Windows(windows) => self.mesh.handle_windows(now, windows),
            Command::Seed(address) => self.mesh.add_seed(now, address),
            Command::Address(address) => self.mesh.set_address(now, address),
            Command::RetryContacts => self.mesh.retry_contacts(now),
            Command::Epochs(until) => {
                self.epochs_needed = None;
                self.mesh.extend_epochs(now, until);
            }
            Command::Leave => self.mesh.leave(now),
            Command::Stop(_) => {} // ends the loop
        }
    }

    /// Takes all that the node wants done.
    fn drain(&mut self, now: Moment) {
        while let Some(transmit) = self.mesh.poll_transmit() {
            self.metrics.gossip_bytes_sent.inc_by(transmit.data.len() as u64);
            let lane = self.mesh.lane(&transmit.to);
            self.pool.send(now, lane, transmit);
        }
        while let Some(event) = self.mesh.poll_event() {
            self.handle_event(now, event);
        }
        if self.mesh.take_changed() {
            self.is_changed = true;
            self.durable_due.get_or_insert(now + DURABLE_INTERVAL);
        }
        if self.is_changed && self.snapshot_at <= now {
            self.snapshot_at = now + SNAPSHOT_INTERVAL;
            self.show();
        }
        if self.durable_due.is_some_and(|due| due <= now) {
            self.hand_over();
        }
    }

    /// Shows readers the mesh as it is now.
    fn show(&mut self) {
        self.is_changed = false;
        let snapshot = self.mesh.snapshot();
        self.count(&snapshot);
        self.trust.set_dismissed(Dismissed::from(&snapshot));
        let snapshot = Arc::new(snapshot);
        self.snapshot.store(Arc::clone(&snapshot));
        self.snapshots.send_replace(snapshot);
    }

    fn hand_over(&mut self) {
        self.durable_due = None;
        let lasts = |entry: &&Entry| entry.key().kind != EntryKind::OBSERVATIONS;
        let entries = self.mesh.entries().filter(lasts).cloned().collect();
        let (remembered, epochs_needed) = (self.mesh.remembered(), self.epochs_needed);
        self.durable.send_replace(Durable { entries, remembered, epochs_needed });
    }

    fn count(&self, snapshot: &Snapshot) {
        let states = [
            MemberState::Alive,
            MemberState::Suspect,
            MemberState::Restarting,
            MemberState::Down,
            MemberState::Left,
        ];
        self.metrics.set_members(states.map(|state| {
            let count = snapshot.members.values().filter(|member| member.state == state).count();
            (state.as_str(), i64::try_from(count).unwrap_or(i64::MAX))
        }));
    }

    fn name_of(&self, member: MemberId) -> String {
        self.mesh.member_name(member).map_or_else(|| member.to_string(), ToString::to_string)
    }

    fn handle_event(&mut self, now: Moment, event: MeshEvent) {
        let record = |kind, member: MemberId, reason: &str| {
            self.events.record(kind, self.name_of(member), reason);
        };
        match event {
            MeshEvent::Settled => {
                self.settled.send_replace(true);
            }
            MeshEvent::MemberUp { member, is_flap } => {
                if is_flap {
                    self.metrics.member_flaps.inc();
                }
                let mut reason = "it answers";
                if is_flap {
                    reason = "it answers again, within a minute of being declared down";
                }
                record(EventKind::MemberUp, member, reason);
            }
            MeshEvent::MemberSuspect(member) => {
                record(EventKind::MemberSuspect, member, "it failed a probe");
            }
            MeshEvent::MemberDown { member, was } => {
                let reason = match was {
                    MemberState::Restarting => "it announced a restart and did not come back",
                    _ => "it did not refute a suspicion in time",
                };
                record(EventKind::MemberDown, member, reason);
                // A connection that lasted through a cut waits for a timer of its own before it
                // sends again; a fresh dial does not. One that works stays: a member that leaves
                // says so in a packet, and its last record may still be on its way.
                if self.mesh.experience(member) == Some(Evidence::Failed) {
                    self.pool.close(member, None);
                }
            }
            MeshEvent::MemberLeft(member) => {
                record(EventKind::MemberLeft, member, "it said goodbye");
            }
            MeshEvent::MemberRestarting(member) => {
                record(EventKind::MemberRestarting, member, "it announced a restart");
            }
            MeshEvent::MemberRenewed { member, epoch } => {
                record(EventKind::MemberRenewed, member, &format!("epoch {epoch}"));
            }
            MeshEvent::Renewed(epoch) => {
                let reason = format!("declared down elsewhere, back with epoch {epoch}");
                record(EventKind::MemberRenewed, self.pool.me(), &reason);
            }
            MeshEvent::Outbid(epoch) => {
                let reason = format!("another process with this key published epoch {epoch}");
                record(EventKind::DuplicateKey, self.pool.me(), &reason);
            }
            MeshEvent::EpochsNeeded { at_least } => {
                self.epochs_needed = Some(at_least);
                self.durable_due = Some(now);
            }
            MeshEvent::InstanceAdded { member, instance } => {
                let on = format!("exposed at {}", self.name_of(member));
                self.events.record(EventKind::InstanceAdded, instance, on);
            }
            MeshEvent::InstanceRemoved { member, instance } => {
                let on = format!("withdrawn at {}", self.name_of(member));
                self.events.record(EventKind::InstanceRemoved, instance, on);
            }
            MeshEvent::InstanceChanged { member, instance, states: (before, now) } => {
                let name = self.name_of(member);
                let told = match before == now {
                    true => format!("changed at {name}"),
                    false => format!("{} at {name}, was {}", now.as_str(), before.as_str()),
                };
                self.events.record(EventKind::InstanceChanged, instance, told);
            }
            MeshEvent::Breaker(event) => self.handle_breaker(event),
            MeshEvent::EntryAccepted(entry) => {
                // Whom the root took a right must not have it again because this machine lost power.
                let is_of_root = entry.key().kind == EntryKind::ISSUER;
                let due = if is_of_root { now } else { now + DURABLE_INTERVAL };
                self.durable_due = Some(self.durable_due.map_or(due, |before| before.min(due)));
            }
            MeshEvent::EntryRefused { from, reason } => {
                self.metrics.count_entry_refused(reason);
                record(EventKind::EntryRefused, from, reason);
            }
            MeshEvent::EntryQuarantined { key, hash } => {
                self.metrics.count_entry_refused("quarantined");
                let reason = format!("{:?} with payload {hash} cannot be read", key.kind);
                record(EventKind::EntryQuarantined, key.owner, &reason);
            }
            MeshEvent::Equivocation(key) => {
                self.metrics.count_entry_refused("equivocation");
                let reason = format!("two payloads of {:?} under one number", key.kind);
                record(EventKind::EntryRefused, key.owner, &reason);
            }
            MeshEvent::NameConflict { name, members } => {
                let reason = format!("{} and {} hold it", members[0], members[1]);
                self.events.record(EventKind::NameConflict, name, reason);
            }
            MeshEvent::OverRate(owner) => {
                self.metrics.count_entry_refused("over_rate");
                let reason = "it changes its own entries faster than others take them";
                record(EventKind::EntryRefused, owner, reason);
            }
            MeshEvent::Blamed { member, reason } => {
                self.metrics.count_gossip_dropped(reason);
                record(EventKind::GossipRefused, member, reason);
            }
            MeshEvent::FalseDeath { from, member } => {
                self.metrics.count_gossip_dropped("false_death");
                let reason =
                    format!("it said that {} is dead, which answers", self.name_of(member));
                record(EventKind::GossipRefused, from, &reason);
            }
            MeshEvent::Dropped { from, reason } => {
                self.metrics.count_gossip_dropped(reason);
                debug!(member = %from, reason, "gossip dropped");
            }
            MeshEvent::Isolated => {
                record(EventKind::Isolated, self.pool.me(), "nobody is heard; routes are kept");
            }
            MeshEvent::Healed => {
                record(EventKind::Healed, self.pool.me(), "others are heard again")
            }
        }
    }

    fn handle_breaker(&self, event: SharedEvent) {
        let of_service = |kind, service: ServiceName, reason| {
            self.events.record(kind, service, reason);
        };
        match event {
            SharedEvent::Instance { key, service, change } => {
                let now = self.clock.now();
                if let Some(state) = change.to() {
                    self.metrics.count_breaker(service.as_str(), state.as_str(), "mesh");
                }
                let (kind, reason) = self.told(&change);
                let subject = format!("{}@{}", key.instance, self.name_of(key.member));
                let mut fields = BTreeMap::from([("service".to_owned(), service.to_string())]);
                let evidence = change.grounds().map(|grounds| self.evidence(now, grounds));
                fields.extend(evidence.map(|told| (EVIDENCE.to_owned(), told)));
                self.events.record_with(kind, subject, reason, fields);
            }
            SharedEvent::Failing { service, is_failing: true, grounds } => {
                let (now, reason) = (
                    self.clock.now(),
                    "more than half of its instances fail: the mesh ejects none",
                );
                let told = grounds.iter().map(|(key, grounds)| {
                    let of = format!("{EVIDENCE} {}@{}", key.instance, self.name_of(key.member));
                    (of, self.evidence(now, grounds))
                });
                self.events.record_with(EventKind::ServiceFailing, service, reason, told.collect());
            }
            SharedEvent::Failing { service, is_failing: false, .. } => {
                let reason = "no more than half of its instances fail";
                of_service(EventKind::ServiceRecovered, service, reason);
            }
            SharedEvent::Panic { service, is_panic: true } => {
                let reason = "most of its instances are ejected: all are called again";
                of_service(EventKind::BreakerPanic, service, reason);
            }
            SharedEvent::Panic { service, is_panic: false } => {
                let reason = "few of its instances are ejected";
                of_service(EventKind::BreakerPanicEnded, service, reason);
            }
        }
    }

    /// Who said what, when, and what it counted for.
    fn evidence(&self, now: Moment, grounds: &Grounds) -> String {
        let told = grounds.testimony.iter().map(|one| {
            format!(
                "{} {}: {} of {} failed, {:.1} s ago",
                self.name_of(one.caller),
                one.weight.as_str(),
                one.failures,
                one.samples,
                now.since(one.told_at).as_secs_f32()
            )
        });
        told.collect::<Vec<_>>().join("; ")
    }

    fn told(&self, change: &InstanceChange) -> (EventKind, String) {
        match change {
            InstanceChange::Ejected(grounds) => {
                let reason = format!(
                    "{} of {} callers saw {} failures, {} % of what counts",
                    grounds.accusers,
                    grounds.callers,
                    grounds.failures,
                    grounds.share / 10
                );
                (EventKind::InstanceEjected, reason)
            }
            InstanceChange::Acquitted(_) | InstanceChange::Restored(_) => {
                (EventKind::AccusationDismissed, "other callers saw it succeed".to_owned())
            }
            InstanceChange::Returning(by) => {
                (EventKind::InstanceReturning, format!("it answered {}", self.name_of(*by)))
            }
            InstanceChange::Returned => {
                let reason = "it took its whole share without a relapse".to_owned();
                (EventKind::InstanceReturned, reason)
            }
        }
    }

    fn measure(&mut self, began: Moment) {
        let now = self.clock.now();
        if now.since(self.turn_max_since) > Duration::from_secs(60) {
            (self.turn_max, self.turn_max_since) = (Duration::ZERO, now);
        }
        self.turn_max = self.turn_max.max(now.since(began));
        self.metrics.gossip_turn_max.set(self.turn_max.as_secs_f64());
    }

    /// Gives what was said last some time to leave, then closes everything.
    async fn say_goodbye(&mut self) {
        self.drain(self.clock.now());
        let end = self.clock.now() + GOODBYE_TIME;
        // Deliveries and dials under way need this task to hear of their ends.
        while self.clock.now() < end {
            let wake = tokio::time::timeout_at(self.clock.instant(end), self.wait()).await;
            if let Ok(Turn::Stop(_)) = wake.map(|wake| self.turn(wake)) {
                break;
            }
        }
        self.hand_over();
        self.show();
        self.pool.close_all();
    }
}
