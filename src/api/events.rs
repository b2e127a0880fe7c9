//! `/v1/mesh/events`: what happened, as an array, or as a stream of lines or server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use hyper::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde::Deserialize;
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::time::timeout;

use super::ApiState;
use super::problem::Refusal;
use crate::runtime::clock;
use crate::telemetry::Event;

/// Proxies and clients give up on a silent stream; most wait half a minute or more.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What may follow the question mark.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct EventsQuery {
    /// A duration (`30m`) or milliseconds since 1970.
    since: Option<String>,
    /// Only what happened to this member, service or instance.
    subject: Option<String>,
    /// Anything but `false`: go on for ever.
    follow: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Array,
    Lines,
    ServerSent,
}

/// Answers in the form that was asked for.
pub(super) fn events(
    state: &ApiState,
    query: &EventsQuery,
    headers: &HeaderMap,
) -> Result<Response, Refusal> {
    let since = query.since.as_deref().map(since_ms).transpose()?;
    let accepts = |kind: &str| {
        let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
        accepted.into_iter().any(|value| value.contains(kind))
    };
    let form = if accepts("text/event-stream") {
        Form::ServerSent
    } else if query.follow.as_deref().is_some_and(|follow| follow != "false")
        || accepts("application/x-ndjson")
    {
        Form::Lines
    } else {
        Form::Array
    };
    let filter = Filter(query.subject.clone());
    if form == Form::Array {
        let mut events = state.events.recent(since.unwrap_or(0));
        events.retain(|event| filter.keeps(event));
        return Ok(axum::Json(events).into_response());
    }
    let follower = state.events.follow(); // before the past is read, so that nothing falls between
    let past = match since {
        Some(since) => state.events.recent(since),
        None => Vec::new(),
    };
    Ok(follow(past, follower, filter, form))
}

fn since_ms(text: &str) -> Result<u64, Refusal> {
    if let Ok(at) = text.parse() {
        return Ok(at);
    }
    let ago = humantime::parse_duration(text).map_err(|_| {
        Refusal::malformed(format!(
            "since '{}' is no duration (30m) and no milliseconds since 1970",
            text.chars().take(40).collect::<String>()
        ))
    })?;
    let ago = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
    Ok(clock::unix_millis().saturating_sub(ago))
}

struct Filter(Option<String>);

impl Filter {
    fn keeps(&self, event: &Event) -> bool {
        let Some(wanted) = &self.0 else { return true };
        // An instance of another member is `instance@member`.
        let is_part =
            event.subject.split_once('@').is_some_and(|(id, of)| id == wanted || of == wanted);
        event.subject == *wanted || is_part || event.fields.values().any(|value| value == wanted)
    }
}

struct Follower {
    past: VecDeque<Event>,
    /// Events recorded between following and reading the past are in both.
    seen: Vec<Event>,
    receiver: Receiver<Event>,
    filter: Filter,
    form: Form,
}

fn follow(past: Vec<Event>, receiver: Receiver<Event>, filter: Filter, form: Form) -> Response {
    let seen = past.iter().rev().take(receiver.len()).cloned().collect();
    let follower = Follower { past: past.into(), seen, receiver, filter, form };
    let chunks = stream::unfold(follower, |mut follower| async move {
        let chunk = follower.next().await?;
        Some((Ok::<_, Infallible>(chunk), follower))
    });
    let mut response = Response::new(Body::from_stream(chunks));
    let kind = match form {
        Form::ServerSent => "text/event-stream",
        Form::Lines | Form::Array => "application/x-ndjson",
    };
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

impl Follower {
    /// The next piece; `None` when the log is gone.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let event = match self.past.pop_front() {
                Some(event) => event,
                None => match timeout(KEEP_ALIVE, self.receiver.recv()).await {
                    Ok(Ok(event)) if self.seen.contains(&event) => continue,
                    Ok(Ok(event)) => event,
                    Ok(Err(RecvError::Lagged(missed))) => return Some(self.missed(missed)),
                    Ok(Err(RecvError::Closed)) => return None,
                    Err(_) => return Some(self.silence()),
                },
            };
            if self.filter.keeps(&event) {
                return Some(self.encode(&event));
            }
        }
    }

    fn encode(&self, event: &Event) -> Bytes {
        let json = serde_json::to_string(event).unwrap_or_default();
        match self.form {
            Form::ServerSent => format!("id: {}\ndata: {json}\n\n", event.at).into(),
            Form::Lines | Form::Array => format!("{json}\n").into(),
        }
    }

    /// A reader that was too slow is told what it missed.
    fn missed(&self, count: u64) -> Bytes {
        match self.form {
            Form::ServerSent => format!("event: missed\ndata: {{\"missed\":{count}}}\n\n").into(),
            Form::Lines | Form::Array => format!("{{\"missed\":{count}}}\n").into(),
        }
    }

    fn silence(&self) -> Bytes {
        match self.form {
            Form::ServerSent => Bytes::from_static(b": \n\n"),
            Form::Lines | Form::Array => Bytes::from_static(b"\n"),
        }
    }
}
