//! Local client in: pick an instance, tunnel out, try another one where that is safe.
//!
//! **Replay only on proof that no byte reached the application.** Until the far agent answers, what
//! the client said is kept as a prefix. Another instance is tried after a refusal, after a dial that
//! failed or whose handshake the peer refused, and after a loss while the prefix is empty. A loss
//! after the first byte and before the answer proves nothing either way: the client is reset.

use std::future::pending;
use std::io;
use std::mem;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::task::Poll;
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::poll;
use futures_util::stream::FuturesUnordered;
use tokio::sync::oneshot;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tracing::debug;

use super::EntryOptions;
use super::board::{Avoid, Boards, Choice, Picked, Preview, Tried};
use super::budget::{Budgets, RetryBudget};
use super::call::Call;
use super::dial::DialError;
use super::instances::Instances;
use super::last_asked::LastAsked;
use super::local::{LocalReader, LocalSocket};
use super::preamble::CalledBy;
use super::socks;
use super::stalls::Stalls;
use super::tcp::{Cut, Leftover, carry, carry_locally};
use super::traffic::{Meter, Traffic};
use crate::mesh::{Endpoint, NoEndpoint, Snapshot};
use crate::model::{InstanceId, MemberId, Moment, Outcome, ServiceName};
use crate::runtime::clock::Clock;
use crate::telemetry::{Direction, Door, EventKind, EventLog, Metrics};
use crate::transport::tunnel::{
    Answer, Header, Mode, OpenError, Refusal, RefusalCode, TunnelReader, TunnelWriter,
};
use crate::transport::{self, Link, Peers};

/// Bytes of the client that are kept until an instance has answered.
const PREFIX_LEN_MAX: usize = 64 * 1024;
/// How long a dial may keep a call waiting before the next instance is dialled beside it, as in RFC
/// 8305: whichever is there first takes the call, so that one that died costs its callers this much.
/// Dials end by themselves, so that at most six of a call are under way at a time.
/// More than a handshake within a continent, less than a person notices.
const DIAL_PATIENCE: Duration = Duration::from_millis(250);
/// How long connecting may take, all tries together. Each instance is tried once, so that only this
/// bounds how many: one that refuses costs a round trip, and is avoided by the next calls.
pub(super) const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// Who asks, and how it is told.
#[derive(Debug)]
pub(super) enum Greeting {
    /// A connection to a service's own entry: nothing is said but the instance's bytes.
    None,
    /// SOCKS5: the client waits for a reply.
    Socks,
    /// A task of this process waits for who took its call.
    Dial(oneshot::Sender<Result<Endpoint, DialError>>),
    /// CONNECT: whoever reads the client's HTTP tells it.
    Tunnel,
}

impl Greeting {
    fn door(&self) -> Door {
        match self {
            Self::None => Door::upstream,
            Self::Socks => Door::socks,
            Self::Dial(_) => Door::dial,
            Self::Tunnel => Door::gateway,
        }
    }

    /// Tells the client that `endpoint` took its call. An error means that it is gone.
    async fn welcome(self, client: &mut LocalSocket, endpoint: &Endpoint) -> io::Result<()> {
        match self {
            Self::None | Self::Tunnel => Ok(()),
            Self::Socks => client.write_all(&socks::SUCCESS).await,
            Self::Dial(reply) => {
                reply.send(Ok(endpoint.clone())).map_err(|_| io::ErrorKind::BrokenPipe.into())
            }
        }
    }

    /// Tells the client why nobody took its call. One that is gone needs no answer.
    async fn turn_away(self, mut client: LocalSocket, error: DialError) {
        match self {
            Self::None | Self::Tunnel => {}
            Self::Socks => {
                if client.write_all(&socks::refusal(error)).await.is_ok() {
                    let _ = client.end().await;
                }
            }
            Self::Dial(reply) => drop(reply.send(Err(error))),
        }
    }
}

/// What a client asks for.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) service: ServiceName,
    pub(super) options: Arc<EntryOptions>,
    pub(super) greeting: Greeting,
}

/// Serves local clients.
pub(super) struct Outbound {
    pub(super) me: MemberId,
    pub(super) snapshot: Arc<ArcSwap<Snapshot>>,
    pub(super) peers: Peers,
    pub(super) instances: Arc<Instances>,
    pub(super) boards: Arc<Boards>,
    pub(super) traffic: Traffic,
    pub(super) stalls: Stalls,
    pub(super) metrics: Metrics,
    pub(super) events: EventLog,
    pub(super) clock: Clock,
    pub(super) budgets: Budgets,
}

/// Why a client was not served.
#[derive(Debug)]
enum Failure {
    /// No instance took the call.
    NotTaken(DialError, Option<LastAsked>),
    /// The client went away, or a loss that proves nothing.
    Cut(Cut),
}

/// Why one try did not connect.
pub(super) enum Setback {
    /// No byte reached the application: another instance may be tried. What its agent `said` may be empty.
    Next { reason: DialError, avoid: Avoid, said: String },
    /// The answer would be the same everywhere. What its agent `said` may be empty.
    Final { reason: DialError, said: String },
    /// The client went away, or a loss that proves nothing.
    Cut(Cut),
}

/// A way to an instance.
enum Route {
    Tunnel { writer: TunnelWriter, reader: TunnelReader, left: Leftover },
    Local { instance: LocalSocket, left: Leftover },
}

/// How a member is reached.
pub(super) enum Way {
    Here,
    There(Arc<Link>),
}

impl Way {
    /// The connection to the member's agent; `None` where that is this one.
    pub(super) fn into_link(self) -> Option<Arc<Link>> {
        match self {
            Self::Here => None,
            Self::There(link) => Some(link),
        }
    }
}

/// An instance whose member was dialled, with what came of it.
pub(super) struct Dialled {
    pub(super) way: Result<Way, transport::DialError>,
    pub(super) call: Call,
    /// When that was known.
    pub(super) at: Moment,
}

/// A connected instance.
pub(super) struct Connected {
    route: Route,
    call: Call,
}

/// The instances that may take one call, each once, in the order in which their members can be had. A
/// dial that takes long goes on while the next begins: it is neither a failure nor forgotten. Last comes
/// again one that was ejected by all callers, where its agent turned the call away.
pub(super) struct Search<'a> {
    outbound: &'a Outbound,
    service: &'a ServiceName,
    choice: Choice,
    /// From being asked, after which no answer is an instance's fault.
    limit: Option<Duration>,
    /// Those that were given out or are being dialled.
    pub(super) tried: Tried,
    /// One whose agent keeps calls from it, but for those that have nobody else.
    turned_away: Option<Picked>,
    /// `None` while none had to be waited for.
    dials: Option<FuturesUnordered<BoxFuture<'a, Dialled>>>,
}

impl<'a> Search<'a> {
    pub(super) fn new(
        outbound: &'a Outbound,
        service: &'a ServiceName,
        choice: Choice,
        limit: Option<Duration>,
    ) -> Self {
        let tried = Tried::default();
        Self { outbound, service, choice, limit, tried, turned_away: None, dials: None }
    }

    /// Nothing of the call reached this instance, for this reason.
    pub(super) fn note_not_taken(&mut self, call: &Call, reason: DialError) {
        if reason == DialError::Ejected {
            call.picked().slot().note_turned_away(self.outbound.clock.now());
            self.turned_away = Some(call.picked().clone());
        }
    }

    /// The next instance, with what came of dialling its member. Where that is connected nothing is
    /// waited for, and nothing allocated.
    pub(super) async fn next(&mut self) -> Result<Dialled, NoEndpoint> {
        loop {
            let now = self.outbound.clock.now();
            let mut next = self.outbound.pick(now, self.service, &self.choice, &self.tried);
            let insists = next.is_err() && !self.is_dialling() && self.turned_away.is_some();
            if insists && let Some(picked) = self.turned_away.take() {
                next = Ok(picked);
            }
            let patience = match next {
                Ok(picked) => {
                    self.tried.add(&picked);
                    let standing = self.outbound.standing(picked.endpoint());
                    let call = Call::new(now, &self.outbound.boards, picked, insists, self.limit);
                    if let Some(way) = standing {
                        return Ok(Dialled { way: Ok(way), call, at: now });
                    }
                    let dials = self.dials.get_or_insert_default();
                    dials.push(Box::pin(self.outbound.dial(call)));
                    DIAL_PATIENCE
                }
                Err(none) if !self.is_dialling() => return Err(none),
                Err(_) => CONNECT_TIME_MAX, // nobody else is left to be dialled
            };
            if let Some(dials) = &mut self.dials
                && let Ok(Some(dialled)) = timeout(patience, dials.next()).await
            {
                return Ok(dialled);
            }
        }
    }

    /// As [`next`](Self::next), within a limit on how long that may take.
    pub(super) async fn next_within(
        &mut self,
        limit: Duration,
    ) -> Result<Result<Dialled, NoEndpoint>, Elapsed> {
        let mut next = pin!(self.next());
        match poll!(next.as_mut()) {
            Poll::Ready(next) => Ok(next), // without a timer
            Poll::Pending => timeout(limit, next).await,
        }
    }

    fn is_dialling(&self) -> bool {
        self.dials.as_ref().is_some_and(|dials| !dials.is_empty())
    }
}

impl Outbound {
    /// Serves one client until its connection ends.
    pub(super) async fn serve(&self, mut client: LocalSocket, ask: Ask) {
        let mut prefix = Prefix::default();
        // Boxed, and gone before bytes are carried: connecting takes much room and little time, and
        // thousands of tasks like this one may rest for days.
        let connecting = Box::pin(self.connect(Some(&mut client), &ask, &mut prefix));
        let limit = ask.options.limits.timeout.connect();
        let connected = timeout(limit, connecting).await;
        match connected.unwrap_or(Err(Failure::NotTaken(DialError::Timeout, None))) {
            Ok(connected) => {
                let len = prefix.len;
                drop(prefix); // it would pin its block for as long as the connection lives
                let _ = self.carry(client, ask, connected, len, None).await; // it was told and counted
            }
            Err(failure) => Box::pin(self.turn_away(client, ask, failure)).await,
        }
    }

    /// Connects to an instance for a client that says nothing before it is told so; then
    /// [`carry`](Self::carry) is what it waits for.
    pub(super) async fn reach(
        &self,
        ask: &Ask,
    ) -> Result<Connected, (DialError, Option<LastAsked>)> {
        let mut prefix = Prefix::default();
        let limit = ask.options.limits.timeout.connect();
        let connecting = timeout(limit, self.connect(None, ask, &mut prefix)).await;
        let timeout = Failure::NotTaken(DialError::Timeout, None);
        let (error, last) = match connecting.unwrap_or(Err(timeout)) {
            Ok(connected) => return Ok(connected),
            Err(Failure::NotTaken(error, last)) => (error, last),
            Err(Failure::Cut(_)) => (DialError::Lost, None),
        };
        self.note_refused(ask, error, last.as_ref());
        Err((error, last))
    }

    /// Why new calls had better not go to this endpoint: the last trouble with it, if that was a
    /// moment ago.
    pub(super) fn trouble(&self, endpoint: &Endpoint) -> Option<&'static str> {
        let is_silent = || endpoint.member != self.me && self.peers.is_silent(&endpoint.member);
        self.boards.trouble(endpoint).or_else(|| is_silent().then_some("silent"))
    }

    /// The instance that takes a call which begins `now`, among those that were not `tried`.
    pub(super) fn pick(
        &self,
        now: Moment,
        service: &ServiceName,
        choice: &Choice,
        tried: &Tried,
    ) -> Result<Picked, NoEndpoint> {
        let is_silent = |member: &MemberId| *member != self.me && self.peers.is_silent(member);
        self.boards.pick(now, &self.snapshot.load(), service, choice, tried, is_silent)
    }

    /// Where calls that are balanced like this would go now.
    pub(super) fn preview(
        &self,
        service: &ServiceName,
        choice: &Choice,
    ) -> Result<Preview, NoEndpoint> {
        let is_silent = |member: &MemberId| *member != self.me && self.peers.is_silent(member);
        self.boards.preview(&self.snapshot.load(), service, choice, is_silent)
    }

    /// Whether there is an instance without trouble that was not `tried`.
    pub(super) fn has_better(&self, service: &ServiceName, choice: &Choice, tried: &Tried) -> bool {
        let picked = self.pick(self.clock.now(), service, choice, tried);
        picked.is_ok_and(|picked| !picked.is_ejected() && self.trouble(picked.endpoint()).is_none())
    }

    /// The way to an instance that needs no waiting.
    fn standing(&self, endpoint: &Endpoint) -> Option<Way> {
        match endpoint.member == self.me {
            true => Some(Way::Here),
            false => self.peers.standing(&endpoint.member).map(Way::There),
        }
    }

    /// Asks one instance after the other and takes the first that can be had. What `client` says
    /// meanwhile goes to it at once.
    async fn connect(
        &self,
        mut client: Option<&mut LocalSocket>,
        ask: &Ask,
        prefix: &mut Prefix,
    ) -> Result<Connected, Failure> {
        let choice = ask.options.balancing.choice(client.as_ref().and_then(|client| client.peer()));
        let mut search = Search::new(self, &ask.service, choice, None);
        let mut last: Option<(DialError, LastAsked)> = None;
        let share = ask.options.limits.retry.budget;
        let budget = self.budgets.of(&ask.service, share, &self.clock);
        budget.note_request();
        loop {
            let dialled = match search.next().await {
                Ok(dialled) => dialled,
                Err(none) => {
                    let (error, last) = last.unzip();
                    return Err(Failure::NotTaken(error.unwrap_or(none.into()), last));
                }
            };
            if let Some((reason, last)) = &last
                && !self.may_retry(&budget, *reason)
            {
                return Err(Failure::NotTaken(*reason, Some(last.clone())));
            }
            let Dialled { way, call, at } = dialled;
            call.ask(at);
            let route = match way {
                Ok(Way::Here) => self.connect_here(ask, &call, prefix).await,
                Ok(Way::There(link)) => {
                    let client = client.as_deref_mut();
                    let tried = &search.tried;
                    let has_other = || self.has_better(&ask.service, &choice, tried);
                    self.connect_there(client, ask, &call, prefix, &link, has_other).await
                }
                Err(error) => Err(error.into()),
            };
            if last.is_some() {
                self.metrics.count_retry(if route.is_ok() { "success" } else { "failure" });
            }
            match route {
                Ok(route) => {
                    call.note_answer();
                    return Ok(Connected { route, call });
                }
                Err(Setback::Next { reason, avoid, said }) => {
                    search.note_not_taken(&call, reason);
                    self.avoid(&call, avoid, reason);
                    last = Some((reason, LastAsked::that_said(call.endpoint(), &said)));
                }
                Err(Setback::Final { reason, said }) => {
                    let last = LastAsked::that_said(call.endpoint(), &said);
                    return Err(Failure::NotTaken(reason, Some(last)));
                }
                Err(Setback::Cut(cut)) => {
                    if let Cut::Tunnel(_) = cut {
                        call.excuse();
                    }
                    return Err(Failure::Cut(cut));
                }
            }
        }
    }

    /// Calls this very instance and gives the connection up again, and says how long it took to be taken.
    pub(super) async fn ping(
        &self,
        service: &ServiceName,
        endpoint: Endpoint,
    ) -> Result<Duration, DialError> {
        let begun_at = self.clock.now();
        let taken = async {
            if endpoint.member == self.me {
                let here = self.connect_own(service, &endpoint.instance, true).await;
                return here.map(drop).map_err(|refusal| refusal.code.into());
            }
            let link = self.peers.link(endpoint.member, endpoint.address).await?;
            let (service, instance) = (service.clone(), endpoint.instance);
            let (source, mode) = (None, Mode::SPLICE);
            let header = Header { service, instance, source, mode, insists: true };
            let header = header.encode().map_err(|_| DialError::Unsupported)?;
            let (mut writer, mut reader) = link.open().await?;
            writer.write(header).await.map_err(|_| DialError::Lost)?;
            match reader.answer().await {
                Ok(Answer::Accepted) => Ok(()),
                Ok(Answer::Refused(refusal)) => Err(refusal.code.into()),
                Err(_) => Err(DialError::Lost),
            }
        };
        timeout(CONNECT_TIME_MAX, taken).await.unwrap_or(Err(DialError::Timeout))?;
        Ok(self.clock.now().since(begun_at))
    }

    /// Whether most of the service fails, so that another instance would fail, too.
    pub(super) fn is_failing(&self, service: &ServiceName) -> bool {
        self.snapshot.load().services.get(service).is_some_and(|view| view.is_failing)
    }

    /// Takes one retry from the budget, if it is charged after this; one that is not left is counted.
    pub(super) fn may_retry(&self, budget: &RetryBudget, after: DialError) -> bool {
        let is_charged = matches!(after, DialError::Overflow | DialError::Lost | DialError::Silent);
        let may = !is_charged || budget.take(self.clock.now());
        if !may {
            self.metrics.count_retry("over_budget");
        }
        may
    }

    /// New calls go elsewhere for a while, and the outcome of this one is known.
    pub(super) fn avoid(&self, call: &Call, avoid: Avoid, reason: DialError) {
        let (endpoint, word) = (call.endpoint(), reason.reason());
        let (instance, peer) = (&endpoint.instance, endpoint.member);
        debug!(%instance, %peer, reason = word, "next instance");
        self.boards.avoid(call.picked(), avoid, word);
        if avoid == Avoid::Member {
            call.excuse();
        }
        // Its agent's word; whatever else keeps a call from an instance says nothing about that.
        let is_refused = reason == DialError::Unreachable && avoid == Avoid::Instance;
        if is_refused {
            call.picked().slot().note_absent();
        }
        call.judge(if is_refused { Outcome::Unreached } else { Outcome::Unknown });
    }

    /// New calls go elsewhere for so long, as the instance asked.
    pub(super) fn leave_alone(&self, call: &Call, time: Duration) {
        call.picked().slot().trouble.leave_alone(self.clock.now(), time);
    }

    /// Finds a way to the member of a call. The dial itself goes on when this is dropped.
    async fn dial(&self, call: Call) -> Dialled {
        let endpoint = call.endpoint();
        let way = self.peers.link(endpoint.member, endpoint.address).await.map(Way::There);
        Dialled { way, call, at: self.clock.now() }
    }

    /// An instance of this very member: no QUIC between.
    async fn connect_here(
        &self,
        ask: &Ask,
        call: &Call,
        prefix: &Prefix,
    ) -> Result<Route, Setback> {
        let id = &call.endpoint().instance;
        let instance = self.connect_own(&ask.service, id, call.insists()).await?;
        Ok(Route::Local { instance, left: prefix.whole() })
    }

    /// Connects to an instance of this member for a caller of this member, which `insists` when it has
    /// nobody else.
    pub(super) async fn connect_own(
        &self,
        service: &ServiceName,
        instance: &InstanceId,
        insists: bool,
    ) -> Result<LocalSocket, Refusal> {
        let me = self.snapshot.load().members.get(&self.me).map(|me| CalledBy {
            id: self.me,
            name: me.name.clone(),
            address: me.address,
        });
        let count = self.boards.in_flight(&self.me, instance);
        self.instances.connect(service, instance, me.as_ref(), count, insists).await
    }

    /// An instance of another member: through its agent. `has_other` says whether there is a better
    /// one than an agent that has fallen silent.
    async fn connect_there(
        &self,
        client: Option<&mut LocalSocket>,
        ask: &Ask,
        call: &Call,
        prefix: &mut Prefix,
        link: &Link,
        has_other: impl Fn() -> bool,
    ) -> Result<Route, Setback> {
        let header = Header {
            service: ask.service.clone(),
            instance: call.endpoint().instance.clone(),
            source: ask.options.source.clone(),
            mode: Mode::SPLICE,
            insists: call.insists(),
        };
        let header = header.encode().map_err(|_| Setback::unsupported())?;
        let (mut writer, mut reader) = link.open().await?;
        let client = client.map(|client| client.split().0);
        let sending = Sending { prefix, unsent: header, next: 0 };
        let left = open(link, client, &mut writer, &mut reader, sending, has_other).await?;
        link.note_answer();
        Ok(Route::Tunnel { writer, reader, left })
    }

    /// Carries bytes between the client and its instance until both have ended. `prefix_len` bytes
    /// of the client were on their way before; `sent` counts those that it is sent.
    pub(super) async fn carry(
        &self,
        mut client: LocalSocket,
        ask: Ask,
        mut connected: Connected,
        prefix_len: usize,
        sent: Option<&AtomicU64>,
    ) -> Result<(), Cut> {
        let Connected { route, call } = &mut connected;
        let (service, endpoint) = (&ask.service, call.endpoint());
        let (peer, name) = (endpoint.member, &endpoint.member_name);
        let traffic = self.traffic.of(Direction::outbound, service, peer, name);
        let open = traffic.begin();
        traffic.bytes.inc_by(prefix_len as u64);
        ask.greeting.welcome(&mut client, endpoint).await?;
        let (bytes, stalls) = (Meter::new(&traffic.bytes, sent), &self.stalls);
        let outcome = match route {
            Route::Local { instance, left } => {
                let left = mem::take(left);
                let call = Some(&*call);
                Box::pin(carry_locally(&mut client, instance, left, bytes, stalls, call)).await
            }
            Route::Tunnel { writer, reader, left } => {
                let left = mem::take(left);
                let call = Some(&*call);
                let outcome = carry(&mut client, writer, reader, left, bytes, stalls, call).await;
                drop(client);
                if outcome.is_ok() {
                    writer.delivered().await;
                }
                outcome
            }
        };
        self.traffic.report_cut(&self.events, service, &outcome);
        open.end(&outcome);
        outcome
    }

    async fn turn_away(&self, client: LocalSocket, ask: Ask, failure: Failure) {
        let (error, last) = match failure {
            Failure::NotTaken(error, last) => (error, last),
            Failure::Cut(cut) => {
                return debug!(service = %ask.service, %cut, "cut before an answer");
            }
        };
        self.note_refused(&ask, error, last.as_ref());
        ask.greeting.turn_away(client, error).await;
    }

    fn note_refused(&self, ask: &Ask, error: DialError, last: Option<&LastAsked>) {
        let (service, reason) = (ask.service.as_str(), error.reason());
        self.metrics.count_refused(ask.greeting.door(), reason);
        let fields = last.map(LastAsked::fields).unwrap_or_default();
        self.events.record_with(EventKind::ConnectionRefused, service, reason, fields);
    }
}

impl Connected {
    /// Which instance.
    pub(super) fn endpoint(&self) -> &Endpoint {
        self.call.endpoint()
    }

    /// With what the client has said meanwhile.
    pub(super) fn with_said(mut self, said: Bytes) -> Self {
        let (Route::Tunnel { left, .. } | Route::Local { left, .. }) = &mut self.route;
        left.chunks.push(said);
        self
    }
}

/// Asks the far agent for the instance and sends what the client says meanwhile. An agent that falls
/// silent is given up while no byte was sent to it, if there is another; it may be only paused.
async fn open(
    link: &Link,
    mut client: Option<LocalReader<'_>>,
    writer: &mut TunnelWriter,
    reader: &mut TunnelReader,
    mut sending: Sending<'_>,
    has_other: impl Fn() -> bool,
) -> Result<Leftover, Setback> {
    let mut answer = pin!(reader.answer());
    let (mut is_mute, mut is_silent) = (false, false);
    // Every arm is cancel safe but the answer, which is never given up while the tunnel lives.
    let answer = loop {
        tokio::select! {
            biased;
            answer = &mut answer => break answer,
            error = sending.run(client.as_mut(), writer), if !is_mute => match error {
                Cut::Local(_) | Cut::Stalled => return Err(Setback::Cut(error)),
                Cut::Tunnel(_) => is_mute = true, // the answer says why
            },
            () = link.silent(), if !is_silent => {
                if sending.prefix.is_empty() && has_other() {
                    return Err(Setback::next(DialError::Silent, Avoid::Member));
                }
                is_silent = true;
            }
        }
    };
    match answer {
        Ok(Answer::Accepted) => Ok(sending.left()),
        Ok(Answer::Refused(refusal)) => Err(refusal.into()),
        Err(_) if link.was_refused() || sending.prefix.is_empty() => {
            Err(Setback::next(DialError::Lost, Avoid::Member))
        }
        Err(error) => Err(Setback::Cut(error.into())),
    }
}

impl Setback {
    /// Another instance may be tried; nothing was said.
    pub(super) const fn next(reason: DialError, avoid: Avoid) -> Self {
        Self::Next { reason, avoid, said: String::new() }
    }

    /// What is asked for cannot be said to any agent.
    pub(super) const fn unsupported() -> Self {
        Self::Final { reason: DialError::Unsupported, said: String::new() }
    }
}

impl From<Refusal> for Setback {
    fn from(Refusal { code, reason: said }: Refusal) -> Self {
        if !code.is_retryable() {
            return Self::Final { reason: code.into(), said };
        }
        let avoid = match code {
            RefusalCode::OVERFLOW => Avoid::Nobody, // one stream less changes that
            _ => Avoid::Instance,
        };
        Self::Next { reason: code.into(), avoid, said }
    }
}

impl From<transport::DialError> for Setback {
    fn from(error: transport::DialError) -> Self {
        Self::next(error.into(), Avoid::Member)
    }
}

impl From<OpenError> for Setback {
    fn from(error: OpenError) -> Self {
        let avoid = match error {
            OpenError::Overflow => Avoid::Nobody,
            OpenError::Lost(_) => Avoid::Member,
        };
        Self::next(error.into(), avoid)
    }
}

/// What the client said before an instance answered: kept, so that it can be said again.
#[derive(Debug, Default)]
struct Prefix {
    chunks: Vec<Bytes>,
    len: usize,
    has_ended: bool,
}

impl Prefix {
    fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn push(&mut self, chunk: Bytes) {
        self.len += chunk.len();
        self.has_ended |= chunk.is_empty();
        self.chunks.push(chunk);
    }

    fn whole(&self) -> Leftover {
        Leftover { chunks: self.chunks.clone(), has_ended: self.has_ended }
    }
}

/// The header and the prefix on their way into one tunnel.
struct Sending<'a> {
    prefix: &'a mut Prefix,
    /// What was begun and not written yet.
    unsent: Bytes,
    /// The chunk of the prefix to be written next.
    next: usize,
}

impl Sending<'_> {
    /// Sends the header and all that the client says, up to the prefix's limit. Ends only by an
    /// error. Cancel safe: what is done so far is in `self`.
    async fn run(
        &mut self,
        mut client: Option<&mut LocalReader<'_>>,
        writer: &mut TunnelWriter,
    ) -> Cut {
        loop {
            if let Err(error) = self.step(client.as_deref_mut(), writer).await {
                return error;
            }
        }
    }

    async fn step(
        &mut self,
        client: Option<&mut LocalReader<'_>>,
        writer: &mut TunnelWriter,
    ) -> Result<(), Cut> {
        if !self.unsent.is_empty() {
            writer.write_some(&mut self.unsent).await?;
        } else if let Some(chunk) = self.prefix.chunks.get(self.next) {
            self.unsent = chunk.clone();
            self.next += 1;
        } else if self.prefix.has_ended {
            writer.end();
            pending::<()>().await;
        } else if let Some(client) = client.filter(|_| self.prefix.len < PREFIX_LEN_MAX) {
            let chunk = client.read(PREFIX_LEN_MAX - self.prefix.len).await?;
            self.prefix.push(chunk);
        } else {
            pending::<()>().await;
        }
        Ok(())
    }

    /// What the tunnel has not taken yet.
    fn left(self) -> Leftover {
        let mut chunks = vec![self.unsent];
        chunks.extend_from_slice(&self.prefix.chunks[self.next..]);
        chunks.retain(|chunk| !chunk.is_empty());
        Leftover { chunks, has_ended: self.prefix.has_ended }
    }
}
