//! Refusals and failures as `application/problem+json` (RFC 9457).

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use serde::{Deserialize, Serialize};

use super::control::ControlError;

/// What went wrong and what to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `urn:murmesh:<word>`; the word never changes its meaning.
    #[serde(rename = "type")]
    pub kind: String,
    /// The same for every problem of its kind.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// This case, and what to try.
    pub detail: String,
}

/// Rides on a response so that the server counts the refusal in one place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refused(pub(super) &'static str);

/// A problem of the API itself; the word is also the metric's reason.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    word: &'static str,
    title: &'static str,
    detail: String,
}

impl Refusal {
    pub(super) fn new(
        status: StatusCode,
        word: &'static str,
        title: &'static str,
        detail: impl Into<String>,
    ) -> Self {
        Self { status, word, title, detail: detail.into() }
    }

    /// What was sent cannot be read. `detail` says what was expected.
    pub(super) fn malformed(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", "The request cannot be read", detail)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let problem = Problem {
            kind: format!("urn:murmesh:{}", self.word),
            title: self.title.to_owned(),
            status: self.status.as_u16(),
            detail: self.detail,
        };
        let body = serde_json::to_vec(&problem).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let json = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(CONTENT_TYPE, json);
        response.extensions_mut().insert(Refused(self.word));
        response
    }
}

impl From<ControlError> for Refusal {
    fn from(error: ControlError) -> Self {
        let detail = error.to_string();
        let (status, word, title) = match error {
            ControlError::NotFound { .. } => (StatusCode::NOT_FOUND, "not_found", "Not found"),
            ControlError::LastReady { .. } => {
                (StatusCode::CONFLICT, "last_ready", "The last one that is ready")
            }
            ControlError::Conflict(_) => (StatusCode::CONFLICT, "conflict", "Taken already"),
            ControlError::Invalid(_) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "invalid", "This cannot be done")
            }
            ControlError::NotPermitted(_) => {
                (StatusCode::FORBIDDEN, "not_permitted", "Not permitted")
            }
            ControlError::NotIssuer => (StatusCode::FORBIDDEN, "not_issuer", "Not an issuer"),
            ControlError::Stopping => {
                (StatusCode::SERVICE_UNAVAILABLE, "stopping", "The agent is stopping")
            }
            ControlError::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy", "The agent is busy"),
            ControlError::Failed(_) => {
                (StatusCode::INTERNAL_SERVER_ERROR, "failed", "The agent failed")
            }
        };
        Self::new(status, word, title, detail)
    }
}
