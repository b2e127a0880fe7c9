//! Which instance is asked, and when another one after it or beside it.
//!
//! **A request is sent again only on proof that no byte of it reached an application**, or where its
//! service declares it idempotent. The proof is a refusal by the instance's agent, nothing written, a
//! connection that the instance had closed before it was given a byte of the request, or HTTP/2's
//! own word. Everything else is answered with 502 `lost`: it may have been done.
//!
//! What is declared idempotent is asked again where an instance went away, fell silent, or answers
//! that it failed, as long as there is another one and the budget lasts; the answer that came is kept
//! for the case that no better one does. Where its caller wants that, a request that takes long is
//! asked of a second instance beside the first.

use std::future::{Future, pending};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use futures_util::future::{Either, select};
use http::header::{HeaderMap, RETRY_AFTER};
use http::{Response, StatusCode};
use hyper::body::Incoming;
use tokio::time::{sleep, timeout, timeout_at};

use super::Http;
use super::answer::{GRPC_STATUS, Reason};
use super::body::{Source, Turn};
use super::miss::{Lost, Miss, Unanswerable};
use super::noted::Noted;
use super::outbox::Outbox;
use super::upstream::{Brought, Kept, Shared, Unanswered, Way};
use super::whose::{self, Key, Whose};
use crate::mesh::Endpoint;
use crate::model::{Moment, Outcome, Protocol, ServiceName};
use crate::proxy::EntryOptions;
use crate::proxy::board::Avoid;
use crate::proxy::budget::RetryBudget;
use crate::proxy::call::Call;
use crate::proxy::dial::DialError;
use crate::proxy::last_asked::LastAsked;
use crate::proxy::outbound::{Dialled, Search, Setback, Way as Reach};
use crate::runtime::clock;
use crate::transport::Link;
use crate::transport::tunnel::{Header, Mode};

/// Requests that one instance may have in flight from this caller; the next is answered at once, while
/// it can still be of use to ask elsewhere. Far more than an instance works on at a time, and few
/// enough to be answered within seconds.
const IN_FLIGHT_MAX: u32 = 1_024;
/// Before the first repetition at most this passes, before each further one twice as much, up to the
/// second: what Envoy does, with full jitter (Brooker, "Exponential Backoff And Jitter", 2015), so
/// that callers whose requests failed together do not come back together.
const PAUSE_MIN: Duration = Duration::from_millis(25);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// For how long an instance is taken at its word that it wants no requests.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// A request, and what is needed to ask instances.
pub(super) struct Question<'a> {
    pub(super) http: &'a Http,
    pub(super) service: &'a ServiceName,
    pub(super) options: &'a EntryOptions,
    pub(super) outbox: Outbox,
}

/// What an instance answered. Its body is still to come.
pub(super) struct Answer {
    pub(super) brought: Box<Brought>,
    pub(super) call: Call,
    /// To the agent of the instance; `None` where that is this one.
    pub(super) link: Option<Arc<Link>>,
}

/// What one instance made of a request. Small: it passes through many hands.
type Attempt = Result<Box<Brought>, Box<Miss>>;

impl Question<'_> {
    /// Asks instances until one answers or its caller's time is over.
    pub(super) async fn ask_in_time(
        &self,
        noted: &mut Option<Box<Noted>>,
    ) -> Result<Answer, Unanswerable> {
        let Some(end) = self.outbox.deadline else { return self.ask(noted, &mut None).await };
        let mut asked = None;
        let answered = timeout_at(end, self.ask(noted, &mut asked)).await;
        answered.unwrap_or(Err(Unanswerable { reason: Reason::Deadline, last: asked }))
    }

    /// Asks instances until one answers.
    async fn ask(
        &self,
        noted: &mut Option<Box<Noted>>,
        asked: &mut Option<LastAsked>,
    ) -> Result<Answer, Unanswerable> {
        let mut held = None;
        let answered = self.ask_in_turn(&mut held, noted, asked).await;
        let answer = answered.or_else(|unanswerable| held.ok_or(unanswerable))?;
        self.note_answer(&answer);
        Ok(answer)
    }

    /// One instance after the other. An answer that is worth asking another one is `held` meanwhile, and
    /// whoever is being asked is in `noted` and `asked`.
    async fn ask_in_turn(
        &self,
        held: &mut Option<Answer>,
        noted: &mut Option<Box<Noted>>,
        asked: &mut Option<LastAsked>,
    ) -> Result<Answer, Unanswerable> {
        let (outbound, limits) = (&self.http.outbound, &self.options.limits);
        // That an entry lets its caller wait for less than this is not the instance's fault.
        let fault_after = limits.timeout.request.map(|limit| limit.0.mul_f64(0.9));
        let choice = self.outbox.choice;
        let mut search = Search::new(outbound, self.service, choice, fault_after);
        let (mut last, mut reached) = (None, 0);
        // What is told when nobody is left: of the one that may have had the request, where there is one.
        let mut setback: Option<Unanswerable> = None;
        let budget = outbound.budgets.of(self.service, limits.retry.budget, &outbound.clock);
        budget.note_request();
        loop {
            if reached > 0 {
                sleep(pause(reached, outbound.boards.jitter())).await;
            }
            let mut dialled = match search.next_within(limits.timeout.connect()).await {
                Ok(Ok(dialled)) => dialled,
                Ok(Err(none)) => {
                    return Err(setback.unwrap_or(Unanswerable::not_taken(none.into())));
                }
                Err(_) => {
                    let late = Unanswerable::not_taken(DialError::Timeout);
                    return Err(setback.filter(|_| reached > 0).unwrap_or(late));
                }
            };
            if let Some(reason) = last
                && !outbound.may_retry(&budget, reason)
            {
                return Err(setback.unwrap_or(Unanswerable::not_taken(reason)));
            }
            let endpoint = dialled.call.endpoint();
            // It was the less busy of two.
            if dialled.call.count() > IN_FLIGHT_MAX {
                let last = Some(LastAsked::new(endpoint));
                let full = Unanswerable { reason: Reason::NotTaken(DialError::Overflow), last };
                return Err(setback.filter(|_| reached > 0).unwrap_or(full));
            }
            if let Some(noted) = noted {
                noted.asked(endpoint);
            }
            if self.outbox.deadline.is_some() {
                *asked = Some(LastAsked::new(endpoint));
            }
            let attempt = match self.hedge_after(endpoint) {
                None => {
                    let has_other = || outbound.has_better(self.service, &choice, &search.tried);
                    self.ask_one(&dialled, has_other).await
                }
                Some(after) => {
                    let asking = Box::pin(self.ask_two(dialled, after, &mut search, &budget));
                    let (answered, attempt) = asking.await;
                    dialled = answered;
                    attempt
                }
            };
            if last.is_some() {
                let result = if attempt.is_ok() { "success" } else { "failure" };
                outbound.metrics.count_retry(result);
            }
            let Dialled { call, way, .. } = dialled;
            let unanswerable = |reason, miss: &Miss| {
                let last = Some(LastAsked::that_said(call.endpoint(), miss.said()));
                Unanswerable { reason, last }
            };
            if let Err(miss) = &attempt
                && let Some(reason) = self.outbox.failure()
            {
                return Err(unanswerable(reason, miss));
            }
            match attempt {
                Ok(brought) => {
                    let outcome = early_outcome(&brought.response, self.outbox.is_grpc);
                    let is_worth_another = outcome == Some(Outcome::Failed)
                        && reached + 1 < limits.retry.tries()
                        && self.outbox.may_repeat(call.endpoint())
                        && !outbound.is_failing(self.service)
                        && outbound.has_better(self.service, &choice, &search.tried);
                    let link = way.ok().and_then(Reach::into_link);
                    let answer = Answer { brought, call, link };
                    if !is_worth_another {
                        return Ok(answer);
                    }
                    self.note_answer(&answer);
                    *held = Some(answer);
                    last = Some(DialError::Lost);
                    reached += 1; // what is told is what it answered
                }
                Err(miss) => {
                    let mut told = unanswerable(miss.answer(), &miss);
                    // One that was asked before may have had the request: that goes first.
                    if let (Miss::NotTaken(_), true) = (&*miss, reached > 0) {
                        told = setback.take().unwrap_or(told);
                    }
                    match *miss {
                        Miss::NotTaken(Setback::Next { reason, avoid, .. }) => {
                            if reached == 0 {
                                // Else it has an answer, or had its try.
                                search.note_not_taken(&call, reason);
                            }
                            outbound.avoid(&call, avoid, reason);
                            last = Some(reason);
                            if !self.outbox.is_whole() {
                                return Err(told);
                            }
                        }
                        Miss::Repeatable { reason, avoid, .. } => {
                            outbound.avoid(&call, avoid, reason);
                            last = Some(reason);
                            reached += 1;
                            if reached >= limits.retry.tries() || outbound.is_failing(self.service)
                            {
                                return Err(told);
                            }
                        }
                        _ => return Err(told),
                    }
                    setback = Some(told);
                }
            }
        }
    }

    /// What an answer says of its instance.
    fn note_answer(&self, Answer { brought, call, .. }: &Answer) {
        let (outbound, response) = (&self.http.outbound, &brought.response);
        call.note_answer();
        if let Some(outcome) = early_outcome(response, self.outbox.is_grpc) {
            call.judge(outcome);
        }
        if response.status() == StatusCode::SERVICE_UNAVAILABLE
            && let Some(after) = retry_after(response.headers())
        {
            outbound.leave_alone(call, after);
        }
    }

    /// After which time another instance is to be asked beside this one. Never with a body: only one
    /// of two can be given what the client sends.
    fn hedge_after(&self, endpoint: &Endpoint) -> Option<Duration> {
        let after = self.options.limits.retry.hedge?;
        let may = self.outbox.source.is_none()
            && self.outbox.may_repeat(endpoint)
            && !self.http.outbound.is_failing(self.service);
        may.then_some(after.0)
    }

    /// Asks one instance, and another one beside it when that takes long. Whichever answers first has
    /// answered; the other one is given up.
    async fn ask_two(
        &self,
        first: Dialled,
        after: Duration,
        search: &mut Search<'_>,
        budget: &RetryBudget,
    ) -> (Dialled, Attempt) {
        let outbound = &self.http.outbound;
        let tried = search.tried.clone();
        let has_other = || outbound.has_better(self.service, &self.outbox.choice, &tried);
        let mut asking = Box::pin(self.ask_one(&first, has_other));
        if let Ok(attempt) = timeout(after, asking.as_mut()).await {
            drop(asking);
            return (first, attempt);
        }
        if !(has_other() && outbound.may_retry(budget, DialError::Silent)) {
            let attempt = asking.await;
            return (first, attempt);
        }
        let beside = Box::pin(async {
            let second = search.next().await.ok()?;
            let attempt = self.ask_one(&second, || false).await;
            Some((second, attempt))
        });
        let (attempt, other) = match select(asking, beside).await {
            Either::Left((attempt @ Ok(_), _)) => (attempt, None),
            Either::Left((attempt, beside)) => (attempt, beside.await),
            Either::Right((Some((second, attempt @ Ok(_))), _)) => {
                outbound.metrics.count_retry("success");
                return (second, attempt);
            }
            Either::Right((other, asking)) => (asking.await, other),
        };
        let has_other_answer = matches!(&other, Some((_, Ok(_)))) && attempt.is_err();
        outbound.metrics.count_retry(if has_other_answer { "success" } else { "failure" });
        match (attempt, other) {
            (Err(_), Some((second, other @ Ok(_)))) => (second, other),
            // What may have had the request says more than what had nothing of it.
            (Err(miss), Some((second, other))) if matches!(*miss, Miss::NotTaken(_)) => {
                (second, other)
            }
            (attempt, _) => (first, attempt),
        }
    }

    /// Asks one instance, first on a connection that is there. `has_other` says whether there is a
    /// better one than an agent that has fallen silent.
    async fn ask_one(&self, dialled: &Dialled, has_other: impl Fn() -> bool) -> Attempt {
        let Dialled { way, call, at: asked_at } = dialled;
        let link = match way {
            Ok(Reach::Here) => None,
            Ok(Reach::There(link)) => Some(link),
            Err(error) => return Err(error.clone().into()),
        };
        let endpoint = call.endpoint();
        let key = whose::key(self.service, endpoint);
        call.ask(*asked_at);
        let _turns = Turns { call, source: self.outbox.source.as_deref() };
        let asking = pin!(async {
            if call.picked().shares_connections()
                && let Some(attempt) = self.ask_resting(endpoint, &key).await
            {
                return attempt;
            }
            // In a box: it takes much room, and most requests find a connection that rests.
            Box::pin(self.ask_anew(call, key, link)).await
        });
        let attempt = match link {
            Some(link) if self.outbox.may_repeat(endpoint) => {
                let limited = self.within_idle(asking, *asked_at);
                Box::pin(self.unless_silent(limited, link, call, has_other)).await
            }
            _ => self.within_idle(asking, *asked_at).await,
        };
        let is_link_open = link.is_none_or(|link| link.is_open());
        match (&attempt, link) {
            (Ok(_), Some(link)) => link.note_answer(),
            (Err(_), _) if !is_link_open || self.outbox.failure().is_some() => call.excuse(),
            (Err(miss), _) if miss.is_fault(is_link_open) => call.judge(Outcome::Failed),
            _ => {}
        }
        attempt
    }

    /// What comes of an attempt that began at `asked_at`, as long as somebody says something.
    async fn within_idle(
        &self,
        mut asking: Pin<&mut impl Future<Output = Attempt>>,
        asked_at: Moment,
    ) -> Attempt {
        let mut waited_since = asked_at;
        loop {
            let end = waited_since + self.options.limits.timeout.idle();
            let end = self.http.outbound.clock.instant(end);
            if let Ok(attempt) = timeout_at(end, asking.as_mut()).await {
                return attempt;
            }
            // An upload may take longer than that; a client that falls silent in it ends it.
            waited_since = match self.outbox.source.as_ref().map(|source| source.turn()) {
                Some(Turn::Client) => self.http.outbound.clock.now(),
                Some(Turn::Either(since) | Turn::Instance(since)) if since > waited_since => since,
                Some(Turn::Either(_)) => return Err(Box::new(Miss::TimedOut { is_fault: false })),
                _ => return Err(Box::new(Miss::TimedOut { is_fault: true })),
            };
        }
    }

    /// What comes of an attempt that may be repeated, unless the instance's agent falls silent and there
    /// is a better one.
    async fn unless_silent(
        &self,
        attempt: impl Future<Output = Attempt>,
        link: &Link,
        call: &Call,
        has_other: impl Fn() -> bool,
    ) -> Attempt {
        let silent = async {
            link.silent().await;
            call.excuse();
            if !(self.outbox.is_whole() && has_other()) {
                pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            attempt = attempt => attempt,
            () = silent => {
                let (reason, avoid) = (DialError::Silent, Avoid::Member);
                Err(Box::new(Miss::Repeatable { reason, avoid, lost: Lost::new() }))
            }
        }
    }

    /// Asks an instance on a connection that is there. `None` when there is none, or the instance had
    /// closed it.
    async fn ask_resting(&self, endpoint: &Endpoint, key: &Key) -> Option<Attempt> {
        let outcome = if self.outbox.protocol == Protocol::Http {
            let kept = self.http.pool.take(key)?;
            let request = match self.outbox.request() {
                Ok(request) => request,
                Err(setback) => return Some(Err(setback.into())),
            };
            kept.send(request).await
        } else {
            let (shared, stream) = self.http.pool.share(key, self.http.outbound.clock.now())?;
            let request = match self.outbox.request() {
                Ok(request) => request,
                Err(setback) => return Some(Err(setback.into())),
            };
            shared.send(request, Some(stream)).await
        };
        match outcome {
            Ok(brought) => Some(Ok(brought)),
            Err(Unanswered::Unsent) => None,
            Err(unanswered) => Some(Err(self.outbox.judge(endpoint, unanswered))),
        }
    }

    /// Asks an instance on a new connection.
    async fn ask_anew(&self, call: &Call, key: Key, link: Option<&Arc<Link>>) -> Attempt {
        let way = self.open(call, link).await?;
        let member = &call.endpoint().member_name;
        let whose = Arc::new(Whose::new(key, member));
        let lost = || Setback::next(DialError::Lost, Avoid::Member);
        let outcome = if self.outbox.protocol == Protocol::Http {
            let kept = Kept::new(way, whose).await.map_err(|_| lost())?;
            kept.send(self.outbox.request()?).await
        } else {
            let tasks = self.http.tasks.clone();
            let shared = Shared::new(way, whose, tasks).await.map_err(|_| lost())?;
            let stream = call.picked().shares_connections().then(|| {
                let now = self.http.outbound.clock.now();
                self.http.pool.add(&shared, now)
            });
            shared.send(self.outbox.request()?, stream).await
        };
        outcome.map_err(|unanswered| self.outbox.judge(call.endpoint(), unanswered))
    }

    /// Begins a new connection to an instance.
    async fn open(&self, call: &Call, link: Option<&Arc<Link>>) -> Result<Way, Setback> {
        let (http, service, protocol) = (self.http, self.service, self.outbox.protocol);
        let instance = &call.endpoint().instance;
        http.remember(service, protocol);
        let Some(link) = link else {
            let own = http.outbound.connect_own(service, instance, call.insists()).await?;
            return Ok(Way::Local(own));
        };
        let header = Header {
            service: service.clone(),
            instance: instance.clone(),
            source: self.options.source.clone(),
            mode: if protocol == Protocol::Http { Mode::HTTP1 } else { Mode::HTTP2 },
            insists: call.insists(),
        };
        let header = header.encode().map_err(|_| Setback::unsupported())?;
        let (writer, mut reader) = link.open().await?;
        reader.end_as_said_of(&writer);
        Ok(Way::Tunnel { writer, reader, header, is_open: false })
    }
}

/// Takes from the time that a call has waited for its instance that in which its client was waited for.
struct Turns<'a> {
    call: &'a Call,
    source: Option<&'a Source>,
}

impl Drop for Turns<'_> {
    fn drop(&mut self) {
        match self.source.map(Source::turn) {
            None => {}
            Some(Turn::Client) => self.call.excuse(), // it has not waited yet
            Some(Turn::Either(since) | Turn::Instance(since)) => self.call.ask_from(since),
        }
    }
}

/// What the head of a response says of its instance; `None` where the rest is still to say it. Faults
/// of the caller say nothing.
fn early_outcome(response: &Response<Incoming>, is_grpc: bool) -> Option<Outcome> {
    let status = response.status();
    if is_grpc && status == StatusCode::OK {
        return grpc_outcome(response.headers());
    }
    if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED {
        return Some(Outcome::Failed);
    }
    status.is_client_error().then_some(Outcome::Unknown)
}

/// What gRPC's status says of the instance, if it is there.
pub(super) fn grpc_outcome(fields: &HeaderMap) -> Option<Outcome> {
    let status = fields.get(GRPC_STATUS)?;
    Some(match status.as_bytes() {
        // UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS
        b"2" | b"4" | b"13" | b"14" | b"15" => Outcome::Failed,
        // CANCELLED, INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, PERMISSION_DENIED,
        // RESOURCE_EXHAUSTED, FAILED_PRECONDITION, ABORTED, OUT_OF_RANGE, UNAUTHENTICATED
        b"1" | b"3" | b"5" | b"6" | b"7" | b"8" | b"9" | b"10" | b"11" | b"16" => Outcome::Unknown,
        _ => Outcome::Success, // OK and UNIMPLEMENTED
    })
}

/// How long to wait before a request reaches its next instance, after it has `reached` so many;
/// `jitter` is from 0 to 1.
fn pause(reached: u32, jitter: f64) -> Duration {
    let doubled = PAUSE_MIN * 2_u32.saturating_pow(reached.saturating_sub(1));
    doubled.min(PAUSE_MAX).mul_f64(jitter)
}

/// When an instance wants to be asked again, in seconds or as a date (RFC 9110, section 10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
    let after = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = httpdate::parse_http_date(text).ok()?;
            let now = UNIX_EPOCH + Duration::from_millis(clock::unix_millis());
            at.duration_since(now).unwrap_or_default()
        }
    };
    Some(after.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn pauses_grow_to_their_limit_and_are_spread_from_nothing_on() {
        for (reached, limit) in [(1, 25), (2, 50), (3, 100), (5, 250), (255, 250)] {
            let limit = Duration::from_millis(limit);
            assert_eq!(pause(reached, 1.0), limit, "{reached}");
            assert_eq!(pause(reached, 0.5), limit / 2, "{reached}");
            assert_eq!(pause(reached, 0.0), Duration::ZERO, "{reached}");
        }
    }

    #[test]
    fn word_of_an_instance_on_when_to_come_back_is_taken_up_to_a_minute() {
        let after = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_static(text));
            retry_after(&headers)
        };
        assert_eq!(after("7"), Some(Duration::from_secs(7)));
        assert_eq!(after("86400"), Some(RETRY_AFTER_MAX));
        assert_eq!(after("Fri, 31 Dec 2100 23:59:59 GMT"), Some(RETRY_AFTER_MAX));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        for none in ["", "soon", "-1", "1.5"] {
            assert_eq!(after(none), None, "{none}");
        }
    }
}
