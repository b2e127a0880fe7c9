//! Which requests are meant: a method and a path with holes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest pattern, in bytes.
const PATTERN_LEN_MAX: usize = 256;

/// Requests of a method, or of any (`*`), whose path has a form: `GET /static/*`, `PUT /users/*`,
/// `GET *`. A `*` in the path stands for any characters, none and `/` among them. The query does not
/// count.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RequestPattern(Arc<str>);

/// A text that is no pattern. Fault: whoever wrote it; nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no pattern of requests: expected a method in capital letters or *, a space and a path, such as \"GET /static/*\" or \"GET *\""
)]
pub struct PatternError {
    /// As written, cut where it is long.
    text: String,
}

impl RequestPattern {
    /// Checks the form above.
    pub fn try_new(text: &str) -> Result<Self, PatternError> {
        let is_method = |method: &str| {
            method == "*" || (!method.is_empty() && method.bytes().all(|b| b.is_ascii_uppercase()))
        };
        let is_path = |path: &str| {
            path.starts_with(['/', '*']) && path.bytes().all(|b| b.is_ascii_graphic() && b != b'?')
        };
        match text.split_once(' ') {
            Some((method, path))
                if is_method(method) && is_path(path) && text.len() <= PATTERN_LEN_MAX =>
            {
                Ok(Self(text.into()))
            }
            _ => Err(PatternError { text: text.chars().take(40).collect() }),
        }
    }

    /// Whether a request is meant. Linear in the length of the path times the number of holes.
    pub fn matches(&self, method: &str, path: &str) -> bool {
        let Some((of, form)) = self.0.split_once(' ') else { return false };
        (of == "*" || of == method) && has_form(form.as_bytes(), path.as_bytes())
    }

    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Greedy from the left: where a piece after a hole fits first, it fits best.
fn has_form(form: &[u8], path: &[u8]) -> bool {
    let mut pieces = form.split(|byte| *byte == b'*');
    let Some(mut rest) = pieces.next().and_then(|first| path.strip_prefix(first)) else {
        return false;
    };
    let mut pieces = pieces.peekable();
    let has_hole = pieces.peek().is_some();
    while let Some(piece) = pieces.next() {
        if pieces.peek().is_none() {
            return rest.ends_with(piece);
        }
        let Some(at) = (0..=rest.len()).find(|at| rest[*at..].starts_with(piece)) else {
            return false;
        };
        rest = &rest[at + piece.len()..];
    }
    has_hole || rest.is_empty()
}

impl fmt::Display for RequestPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for RequestPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RequestPattern({})", self.as_str())
    }
}

impl FromStr for RequestPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        Self::try_new(text)
    }
}

impl TryFrom<String> for RequestPattern {
    type Error = PatternError;

    fn try_from(text: String) -> Result<Self, PatternError> {
        Self::try_new(&text)
    }
}

impl From<RequestPattern> for String {
    fn from(pattern: RequestPattern) -> Self {
        pattern.as_str().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_mean_methods_and_forms_of_paths() {
        let cases = [
            ("GET *", "GET", "/", true),
            ("GET *", "POST", "/", false),
            ("* /health", "HEAD", "/health", true),
            ("* /health", "GET", "/healthy", false),
            ("GET /static/*", "GET", "/static/", true),
            ("GET /static/*", "GET", "/static/a/b", true),
            ("GET /static/*", "GET", "/statics", false),
            ("PUT /users/*/name", "PUT", "/users/7/name", true),
            ("PUT /users/*/name", "PUT", "/users/7/names", false),
            ("PUT /users/*/name", "PUT", "/users/name", false),
            ("GET /a*b*c", "GET", "/abbbc", true),
            ("GET /a*b*c", "GET", "/acb", false),
            ("GET /*.png", "GET", "/x/y.png", true),
            ("get *", "GET", "/", false),
        ];
        for (pattern, method, path, is_meant) in cases {
            let matches = RequestPattern::try_new(pattern).map(|one| one.matches(method, path));
            assert_eq!(matches.unwrap_or(false), is_meant, "{pattern}: {method} {path}");
        }
    }

    #[test]
    fn what_is_no_pattern_says_what_is_expected() {
        for bad in ["", "GET", "GET ", " /", "get /", "GET x", "GET /a b", "GET /ä", "GET /a?b"] {
            let error = RequestPattern::try_new(bad).unwrap_err().to_string();
            assert!(error.contains("expected a method in capital letters or *"), "{bad}: {error}");
        }
        assert!(RequestPattern::try_new(&format!("GET /{}", "x".repeat(300))).is_err());
    }
}
