//! Blocking queries: an answer that waits until it differs from the one that the client has.
//!
//! An answer's index rises exactly when the answer, as this client asked for it, has changed since
//! it was last looked at: a watcher of `web` sleeps while `db` comes and goes. Indexes come from one
//! counter that begins at the milliseconds since 1970, so a restarted agent goes on above its former
//! self and no client meets an old index with a new meaning. Whoever brings an index that is not the
//! current one is answered at once, also where it is higher: it is of another agent, or the clock
//! was set back.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRef;
use axum::response::Response;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use parking_lot::Mutex;
use ring::digest::{SHA256, digest};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::time::sleep;

use super::problem::Refusal;
use super::{ApiState, Local};
use crate::mesh::Snapshot;
use crate::runtime::{clock, entropy};

/// Blocked queries at once: three of four connections, so that who asks shortly finds room.
pub(super) const BLOCKED_MAX: usize = 768;
/// Questions whose last answers are remembered; one that was forgotten is answered at once when it
/// is asked again. Each takes about 100 bytes.
const QUESTIONS_MAX: usize = 4_096;
/// As Consul has it.
const WAIT_DEFAULT: Duration = Duration::from_secs(5 * 60);
/// As Consul has it.
const WAIT_MAX: Duration = Duration::from_secs(10 * 60);
/// Up to this part of a wait is added to it, so that clients do not come back all at once. As Consul
/// has it.
const JITTER_PART: u32 = 16;

type Digest = [u8; 32];

/// What the handlers share: the agent, and the answers that were given.
#[derive(Clone)]
pub(super) struct Served {
    pub(super) api: ApiState,
    answers: Arc<Mutex<Answers>>,
    room: Arc<Semaphore>,
}

impl FromRef<Served> for ApiState {
    fn from_ref(served: &Served) -> Self {
        served.api.clone()
    }
}

/// How long a client wants to wait for another answer than the one it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wait {
    index: u64,
    time: Duration,
}

impl Wait {
    /// What `index` and `wait` of a query ask for; `None` for an answer at once.
    pub(super) fn read(index: Option<&str>, wait: Option<&str>) -> Result<Option<Self>, Refusal> {
        let told = |text: &str| text.chars().take(40).collect::<String>();
        let index = match index {
            None | Some("") => 0,
            Some(text) => text.parse().map_err(|_| {
                let expected = "expected the X-Consul-Index of an earlier answer";
                Refusal::malformed(format!("index '{}': {expected}", told(text)))
            })?,
        };
        let time = match wait {
            None | Some("") => Duration::ZERO,
            Some(text) => humantime::parse_duration(text).map_err(|_| {
                let expected = "expected a duration with a unit, for instance 30s or 5m";
                Refusal::malformed(format!("wait '{}': {expected}", told(text)))
            })?,
        };
        let time = if time.is_zero() { WAIT_DEFAULT } else { time.min(WAIT_MAX) };
        Ok((index > 0).then_some(Self { index, time }))
    }

    fn with_jitter(self) -> Duration {
        let most = u64::try_from((self.time / JITTER_PART).as_millis()).unwrap_or(u64::MAX);
        let drawn = entropy::seed().unwrap_or(0); // none: they come back together
        self.time + Duration::from_millis(drawn % most.saturating_add(1))
    }
}

impl Served {
    pub(super) fn new(api: ApiState) -> Self {
        let answers = Answers::new(clock::unix_millis());
        let room = Arc::new(Semaphore::new(BLOCKED_MAX));
        Self { api, answers: Arc::new(Mutex::new(answers)), room }
    }

    /// Answers `question` with what `look` finds. A client that waits and has that already is
    /// answered when it has changed or its time is over. Cancel safe.
    pub(super) async fn answer<T: Serialize>(
        &self,
        question: &str,
        wait: Option<Wait>,
        look: impl Fn(&ApiState) -> T,
    ) -> Result<Response, Refusal> {
        let (mut snapshot, mut local) = (self.api.snapshot.clone(), self.api.local.clone());
        let question = digest_of(question.as_bytes());
        let find = || serde_json::to_vec(&look(&self.api)).unwrap_or_default();
        let look = || {
            let world = (self.api.snapshot(), self.api.local());
            self.answers.lock().look(world, question, find)
        };
        snapshot.mark_unchanged(); // before it is looked at: nothing falls between
        local.mark_unchanged();
        let (mut index, mut body) = look();
        let Some(wait) = wait.filter(|wait| wait.index == index) else {
            return Ok(response(index, body.unwrap_or_else(find)));
        };
        let Ok(_place) = self.room.try_acquire() else {
            let detail = format!("{BLOCKED_MAX} queries are blocked already; ask without index");
            let status = StatusCode::TOO_MANY_REQUESTS;
            return Err(Refusal::new(status, "blocked_queries", "Too many wait", detail));
        };
        let _counted = Blocked::new(&self.api);
        let over = sleep(wait.with_jitter());
        tokio::pin!(over);
        while index == wait.index {
            let changed = tokio::select! {
                biased;
                () = &mut over => break,
                changed = snapshot.changed() => changed,
                changed = local.changed() => changed,
            };
            if changed.is_err() {
                break; // the agent stops
            }
            (index, body) = look();
        }
        Ok(response(index, body.unwrap_or_else(find)))
    }
}

/// Counts a blocked query while it lives.
struct Blocked<'a>(&'a ApiState);

impl<'a> Blocked<'a> {
    fn new(api: &'a ApiState) -> Self {
        api.metrics.api_blocked_queries.inc();
        Self(api)
    }
}

impl Drop for Blocked<'_> {
    fn drop(&mut self) {
        self.0.metrics.api_blocked_queries.dec();
    }
}

/// All that answers are made of.
type World = (Arc<Snapshot>, Arc<Local>);

/// The last answers, by what was asked. No text of clients is kept, only its digest.
#[derive(Debug)]
struct Answers {
    /// The last one that was looked at, and its number. Many clients that watch the same cost one
    /// look at each.
    world: Option<World>,
    version: u64,
    /// Of the latest change of any answer.
    index: u64,
    /// How often anything was asked.
    turn: u64,
    /// At most [`QUESTIONS_MAX`].
    known: HashMap<Digest, Known>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    index: u64,
    answer: Digest,
    /// Of the world that gave it.
    version: u64,
    asked_at: u64,
}

impl Answers {
    fn new(index: u64) -> Self {
        Self { world: None, version: 0, index, turn: 0, known: HashMap::new() }
    }

    /// The index of an answer, and the answer, unless this world has given it before. It is found
    /// under this lock, so that a later index never has an earlier answer.
    fn look(
        &mut self,
        world: World,
        question: Digest,
        find: impl FnOnce() -> Vec<u8>,
    ) -> (u64, Option<Vec<u8>>) {
        let is_same = |(snapshot, local): &World| {
            Arc::ptr_eq(snapshot, &world.0) && Arc::ptr_eq(local, &world.1)
        };
        if !self.world.as_ref().is_some_and(is_same) {
            self.world = Some(world);
            self.version += 1;
        }
        self.turn += 1;
        let (version, asked_at) = (self.version, self.turn);
        if let Some(known) = self.known.get_mut(&question).filter(|k| k.version == version) {
            known.asked_at = asked_at;
            return (known.index, None);
        }
        let found = find();
        let answer = digest_of(&found);
        let index = match self.known.get(&question) {
            Some(known) if known.answer == answer => known.index,
            _ => {
                self.index += 1;
                self.index
            }
        };
        if self.known.len() >= QUESTIONS_MAX && !self.known.contains_key(&question) {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.asked_at);
            let oldest = oldest.map(|(question, _)| *question);
            oldest.and_then(|question| self.known.remove(&question));
        }
        self.known.insert(question, Known { index, answer, version, asked_at });
        (index, Some(found))
    }
}

fn digest_of(bytes: &[u8]) -> Digest {
    let mut out = Digest::default();
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

fn response(index: u64, body: Vec<u8>) -> Response {
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("x-consul-index", index.into());
    // What clients of Consul want to read: there is no leader to lose and nothing to lag behind.
    headers.insert("x-consul-knownleader", HeaderValue::from_static("true"));
    headers.insert("x-consul-lastcontact", HeaderValue::from_static("0"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world() -> World {
        (Arc::default(), Arc::default())
    }

    #[test]
    fn an_index_rises_exactly_when_its_own_answer_changes() {
        let mut answers = Answers::new(1_000);
        let mut look =
            |question: u8, answer: &str| answers.look(world(), [question; 32], || answer.into()).0;
        let web = look(1, "one");
        assert!(web > 1_000);
        let db = look(2, "one");
        assert!(db > web, "no index is given twice");
        assert!(look(2, "two") > db);
        assert_eq!(look(1, "one"), web, "what happens to another is no change");
        let changed = look(1, "two");
        assert!(changed > web);
        assert!(look(1, "one") > changed, "what was before has a new index");
    }

    #[test]
    fn many_who_ask_the_same_of_one_world_cost_one_look() {
        let mut answers = Answers::new(0);
        let (one, other) = (world(), world());
        let (index, found) = answers.look(one.clone(), [1; 32], || b"one".to_vec());
        assert_eq!(found, Some(b"one".to_vec()));
        let again = answers.look(one, [1; 32], || unreachable!("it is known"));
        assert_eq!(again, (index, None));
        assert_eq!(answers.look(other, [1; 32], || b"one".to_vec()).0, index, "the same answer");
    }

    #[test]
    fn a_forgotten_question_gets_a_higher_index_and_the_memory_stays_bounded() {
        let mut answers = Answers::new(0);
        let question = |number: usize| digest_of(&number.to_le_bytes());
        let one = world();
        let first = answers.look(one.clone(), question(0), Vec::new).0;
        for number in 1..=QUESTIONS_MAX {
            answers.look(one.clone(), question(number), Vec::new);
        }
        assert_eq!(answers.known.len(), QUESTIONS_MAX);
        assert!(answers.look(one, question(0), Vec::new).0 > first);
        assert_eq!(answers.known.len(), QUESTIONS_MAX);
    }

    #[test]
    fn waits_are_read_as_consul_reads_them() {
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        for (index, wait, expected) in [
            (None, Some("1m"), None),
            (Some("0"), Some("1m"), None),
            (Some("7"), None, Some(minutes(5))),
            (Some("7"), Some("0s"), Some(minutes(5))),
            (Some("7"), Some("120000ms"), Some(minutes(2))),
            (Some("7"), Some("1m30s"), Some(Duration::from_secs(90))),
            (Some("7"), Some("3h"), Some(minutes(10))),
        ] {
            let read = Wait::read(index, wait).unwrap();
            assert_eq!(read.map(|wait| wait.time), expected, "{index:?} {wait:?}");
        }
        assert!(Wait::read(Some("x"), None).is_err() && Wait::read(Some("1"), Some("5")).is_err());
        let wait = Wait { index: 1, time: Duration::from_secs(160) };
        for _ in 0..100 {
            let time = wait.with_jitter();
            assert!((wait.time..=wait.time + Duration::from_secs(10)).contains(&time), "{time:?}");
        }
    }
}
