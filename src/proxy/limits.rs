//! What a caller allows its calls.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::outbound::CONNECT_TIME_MAX;

/// How long calls through an entry may take, and how often one may be tried. What is absent has its
/// default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallLimits {
    /// Limits in time.
    pub timeout: Timeouts,
    /// Limits on repetition.
    pub retry: Retry,
}

/// Limits in time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// Until an instance has taken the call, all tries together: 5 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect: Option<Span>,
    /// From a request of HTTP to the end of its response: none. A caller's own deadline that is nearer
    /// counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<Span>,
    /// For which nothing comes, of a request, of its response, or before that begins: 5 minutes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<Span>,
}

impl Timeouts {
    /// Whether nothing is set.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Until an instance has taken the call.
    pub fn connect(&self) -> Duration {
        self.connect.map_or(CONNECT_TIME_MAX, |span| span.0)
    }

    /// For which nothing comes. What most clients and servers wait is a minute; streams that rest for
    /// longer send something.
    pub fn idle(&self) -> Duration {
        self.idle.map_or(Duration::from_secs(300), |span| span.0)
    }
}

/// Limits on repetition.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retry {
    /// Instances that a request which is declared idempotent may reach: 2. With 1 none is repeated.
    /// Another instance is always asked when the one before it certainly had nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tries: Option<u8>,
    /// Repetitions for each request, beside 10 a second: 20 %.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<Share>,
    /// After how long without an answer a request that is declared idempotent and has no body is
    /// asked of a second instance, too, within the budget: never. Longer than most answers take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hedge: Option<Span>,
}

impl Retry {
    /// Whether nothing is set.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Instances that one request may reach.
    pub fn tries(&self) -> u32 {
        self.tries.map_or(2, u32::from)
    }
}

/// A duration that people write with its unit: `250ms`, `2s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let has_unit = text.chars().any(char::is_alphabetic);
        let span = humantime::parse_duration(&text).ok().filter(|span| has_unit && !span.is_zero());
        span.map(Self).ok_or_else(|| {
            format!("'{text}' is no duration with a unit, such as \"250ms\" or \"2s\"")
        })
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        humantime::format_duration(span.0).to_string()
    }
}

/// A share that people write in percent: `20%`. From 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Share {
    percent: u8,
}

impl Share {
    pub(super) fn as_fraction(self) -> f64 {
        f64::from(self.percent) / 100.0
    }
}

impl TryFrom<String> for Share {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let percent = text.strip_suffix('%').and_then(|number| number.parse().ok());
        let percent = percent.filter(|percent| *percent <= 100);
        let expected = || format!("'{text}' is no share, expected 0% to 100%");
        percent.map(|percent| Self { percent }).ok_or_else(expected)
    }
}

impl From<Share> for String {
    fn from(share: Share) -> Self {
        format!("{}%", share.percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_need_a_unit_and_shares_a_percent_sign() {
        let span = |text: &str| Span::try_from(text.to_owned());
        assert_eq!(span("250ms").unwrap().0, Duration::from_millis(250));
        assert_eq!(String::from(span("90s").unwrap()), "1m 30s");
        for bad in ["5", "0s", "", "-1s", "1 parsec"] {
            assert!(span(bad).unwrap_err().contains("such as"), "{bad}");
        }
        let share = |text: &str| Share::try_from(text.to_owned());
        assert_eq!(share("20%").unwrap().as_fraction(), 0.2);
        for bad in ["20", "101%", "-1%", "", "%"] {
            assert!(share(bad).unwrap_err().contains("expected 0% to 100%"), "{bad}");
        }
    }
}
