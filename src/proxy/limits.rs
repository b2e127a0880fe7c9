//! What a caller allows its calls.

use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use serde::{Deserialize, Serialize};

use super::board::Choice;
use super::outbound::CONNECT_TIME_MAX;
use crate::balancer::{Balance, Prefer, hash_of};
use crate::breaker::BreakerConfig;

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

/// How calls through an entry are balanced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balancing {
    /// The rule.
    pub balance: Balance,
    /// How near instances are to be.
    pub prefer: Prefer,
    /// What keeps calls together, where the rule asks for it.
    pub hash: HashKey,
}

impl Balancing {
    /// For a call of this client.
    pub(super) fn choice(&self, client: Option<IpAddr>) -> Choice {
        self.choice_by(client, None)
    }

    /// For a request with these headers.
    pub(super) fn choice_by(&self, client: Option<IpAddr>, headers: Option<&HeaderMap>) -> Choice {
        let hash = match self.balance {
            Balance::Maglev => self.hash.of(client, headers),
            _ => 0,
        };
        Choice { balance: self.balance, prefer: self.prefer, hash }
    }
}

/// What of a call says where it belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HashKey {
    /// The address of the client.
    #[default]
    Client,
    /// A header of the request; the client's address where it has none.
    Header(HeaderName),
}

impl HashKey {
    fn of(&self, client: Option<IpAddr>, headers: Option<&HeaderMap>) -> u64 {
        if let Self::Header(name) = self
            && let Some(value) = headers.and_then(|headers| headers.get(name))
        {
            return hash_of(value.as_bytes());
        }
        match client {
            Some(IpAddr::V4(address)) => hash_of(&address.octets()),
            Some(IpAddr::V6(address)) => hash_of(&address.octets()),
            None => 0,
        }
    }
}

impl TryFrom<String> for HashKey {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let header = || text.strip_prefix("header:").and_then(|name| name.parse().ok());
        match text.as_str() {
            "client" => Ok(Self::Client),
            _ => header().map(Self::Header).ok_or_else(|| {
                format!("'{text}' is no key, expected \"client\" or \"header:NAME\"")
            }),
        }
    }
}

impl From<HashKey> for String {
    fn from(key: HashKey) -> Self {
        match key {
            HashKey::Client => "client".to_owned(),
            HashKey::Header(name) => format!("header:{name}"),
        }
    }
}

/// When this member stops calling an instance. What is absent has its default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BreakerLimits {
    /// Answered failures in a row: 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<u16>,
    /// Share of failures in the window: 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio: Option<Ratio>,
    /// What the share is counted over: 10 s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<Span>,
    /// Calls in the window below which the share says nothing: 10.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min: Option<u16>,
    /// Whose experience counts: that of the whole mesh.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
}

/// A share that people write as a fraction: `0.5`. Above 0 and up to 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "f64", into = "f64")]
pub struct Ratio {
    thousandths: u16,
}

impl Ratio {
    fn as_fraction(self) -> f32 {
        f32::from(self.thousandths) / 1_000.0
    }
}

impl TryFrom<f64> for Ratio {
    type Error = String;

    fn try_from(fraction: f64) -> Result<Self, String> {
        match fraction > 0.0 && fraction <= 1.0 {
            true => Ok(Self { thousandths: ((fraction * 1_000.0).round() as u16).max(1) }),
            false => Err(format!("{fraction} is no share, expected above 0 and up to 1")),
        }
    }
}

impl From<Ratio> for f64 {
    fn from(ratio: Ratio) -> Self {
        Self::from(ratio.thousandths) / 1_000.0
    }
}

/// Whose experience with an instance counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// That of all callers, as they tell each other.
    #[default]
    Mesh,
    /// This member's own.
    Local,
    /// Nobody's: failures cost an instance calls, and never all of them.
    Off,
}

impl Scope {
    /// The word of the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Mesh => "mesh",
            Self::Local => "local",
            Self::Off => "off",
        }
    }
}

impl BreakerLimits {
    /// Whether nothing is set.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// What is set, in a few words: `errors 3, scope local`; empty when nothing is.
    pub fn summary(&self) -> String {
        let words = [
            self.errors.map(|errors| format!("errors {errors}")),
            self.ratio.map(|ratio| format!("ratio {}", ratio.as_fraction())),
            self.window.map(|window| format!("window {}", String::from(window))),
            self.min.map(|min| format!("min {min}")),
            self.scope.map(|scope| format!("scope {}", scope.as_str())),
        ];
        words.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// The same with every default said.
    pub fn whole(&self) -> Self {
        let BreakerConfig { errors, ratio, window, samples_min, .. } = self.config();
        Self {
            errors: Some(errors),
            ratio: Ratio::try_from((f64::from(ratio) * 1_000.0).round() / 1_000.0).ok(),
            window: Some(Span(window)),
            min: Some(samples_min),
            scope: Some(self.scope.unwrap_or_default()),
        }
    }

    /// With the defaults of what is absent.
    pub fn config(&self) -> BreakerConfig {
        let usual = BreakerConfig::default();
        BreakerConfig {
            errors: self.errors.unwrap_or(usual.errors),
            ratio: self.ratio.map_or(usual.ratio, Ratio::as_fraction),
            window: self.window.map_or(usual.window, |window| window.0),
            samples_min: self.min.unwrap_or(usual.samples_min),
            ..usual
        }
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
        match humantime::parse_duration(&text) {
            Ok(span) if has_unit && !span.is_zero() => Ok(Self(span)),
            Ok(_) if has_unit => Err(format!(
                "'{text}' is no time at all, expected more, such as \"250ms\" or \"2s\""
            )),
            _ => Err(format!("'{text}' is no duration with a unit, such as \"250ms\" or \"2s\"")),
        }
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
        assert!(span("0s").unwrap_err().contains("expected more"), "it has a unit");
        let share = |text: &str| Share::try_from(text.to_owned());
        assert_eq!(share("20%").unwrap().as_fraction(), 0.2);
        for bad in ["20", "101%", "-1%", "", "%"] {
            assert!(share(bad).unwrap_err().contains("expected 0% to 100%"), "{bad}");
        }
    }
}
