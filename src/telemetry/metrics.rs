//! Every metric of the agent, in one table.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, text};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tracing::warn;

/// A monotone count. Cloning shares it.
pub type Counter = prometheus_client::metrics::counter::Counter<u64, AtomicU64>;

/// Which way traffic goes, seen from this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum Direction {
    /// To an instance of this machine.
    inbound,
    /// From a client of this machine.
    outbound,
}

/// Where something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types)]
pub enum Door {
    /// The UDP port, for members.
    mesh,
    /// The UDP port, for newcomers.
    enrol,
    /// The local API.
    api,
    /// The HTTP gateway.
    gateway,
    /// The public gateway.
    public,
    /// SOCKS5.
    socks,
    /// DNS.
    dns,
    /// A local entry to one service.
    upstream,
    /// A call from within the agent's own process.
    dial,
}

impl Door {
    /// The fixed word of logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::mesh => "mesh",
            Self::enrol => "enrol",
            Self::api => "api",
            Self::public => "public",
            Self::gateway => "gateway",
            Self::socks => "socks",
            Self::dns => "dns",
            Self::upstream => "upstream",
            Self::dial => "dial",
        }
    }
}

/// Labels of what was refused; `reason` is a fixed word, never from the network.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusedLabels {
    /// Where.
    pub door: Door,
    /// Why.
    pub reason: &'static str,
}

/// Labels of traffic: names that the mesh checked, so their number is bounded.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TrafficLabels {
    /// Seen from this machine.
    pub direction: Direction,
    /// What is called.
    pub service: String,
    /// The member at the other end.
    pub peer: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    direction: Direction,
    service: String,
    peer: String,
    /// Of HTTP: `2xx`; empty where nothing has a code.
    code_class: &'static str,
    outcome: &'static str,
}

/// Labels of endpoint counts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EndpointLabels {
    /// Of which service.
    pub service: String,
    /// A fixed word.
    pub state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BreakerLabels {
    service: String,
    to: &'static str,
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabels {
    service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EjectedLabels {
    service: String,
    source: &'static str,
}

/// How the breakers of one service stand now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BreakerGauges {
    /// Which.
    pub service: String,
    /// Whether so much of it is ejected that verdicts are ignored.
    pub is_panic: bool,
    /// Whether more than half of it fails.
    pub is_failing: bool,
    /// Instances that are ejected by the word of `local` or `mesh`.
    pub ejected: [(&'static str, i64); 2],
    /// Instances that calls from here go around because some there have just failed.
    pub avoided: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

/// Series that one family may have.
const SERIES_MAX: usize = 10_000;
/// Series that the breakers of one service may have: three states by three sources.
const BREAKER_SERIES: usize = 9;
/// Series that tell how the breakers of one service stand.
const BREAKER_GAUGES: u64 = 5;

/// The metrics of one kind of traffic, resolved once and then only atomics: hot-path safe.
#[derive(Clone, Debug)]
pub struct TrafficMetrics {
    /// Connections that ended well.
    pub success: Counter,
    /// Connections that failed or were cut.
    pub failure: Counter,
    /// Connections open now.
    pub open: Gauge<i64, AtomicI64>,
    /// Bytes carried, both ways.
    pub bytes: Counter,
    /// From a request to the end of its response, in seconds.
    pub duration: Histogram,
    answered: Arc<Answered>,
}

/// Counters of requests that ended, each made when it is first needed.
#[derive(Debug)]
struct Answered {
    labels: TrafficLabels,
    requests: Family<OutcomeLabels, Counter>,
    /// By class of status, and whether it failed.
    counters: [[OnceLock<Counter>; 2]; CODE_CLASSES.len()],
}

const CODE_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

impl TrafficMetrics {
    /// A request was answered with `status`; `is_whole` says whether the response came to its end.
    pub fn count_answer(&self, status: u16, is_whole: bool) {
        let class = usize::from(status / 100).clamp(1, CODE_CLASSES.len()) - 1;
        let has_failed = !is_whole || status >= 500;
        let counter = self.answered.counters[class][usize::from(has_failed)].get_or_init(|| {
            let TrafficLabels { direction, service, peer } = self.answered.labels.clone();
            let outcome = if has_failed { "failure" } else { "success" };
            let code_class = CODE_CLASSES[class];
            let labels = OutcomeLabels { direction, service, peer, code_class, outcome };
            self.answered.requests.get_or_create_owned(&labels)
        });
        counter.inc();
    }
}

/// All metrics. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
    requests: Family<OutcomeLabels, Counter>,
    durations: Family<TrafficLabels, Histogram, fn() -> Histogram>,
    connections_open: Family<TrafficLabels, Gauge>,
    bytes: Family<TrafficLabels, Counter>,
    refused: Family<RefusedLabels, Counter>,
    endpoints: Family<EndpointLabels, Gauge>,
    members: Family<StateLabels, Gauge>,
    entries_refused: Family<ReasonLabels, Counter>,
    gossip_dropped: Family<ReasonLabels, Counter>,
    retries: Family<ResultLabels, Counter>,
    breakers: Family<BreakerLabels, Counter>,
    breaker_panic: Family<ServiceLabels, Gauge>,
    breaker_failing: Family<ServiceLabels, Gauge>,
    breaker_ejected: Family<EjectedLabels, Gauge>,
    /// How often news of own calls waited, because the gossip driver was busy. Nothing of it is lost.
    pub breaker_news_delayed: Counter,
    breaker_avoided: Family<ServiceLabels, Gauge>,
    /// Services whose breakers are counted.
    breaker_services: Arc<Mutex<BTreeSet<String>>>,
    renewals: Family<ResultLabels, Counter>,
    health_checks: Family<CheckLabels, Counter>,
    series: Arc<Mutex<std::collections::HashSet<TrafficLabels>>>,
    /// Series left out because a family was full, each time that one was wanted.
    pub series_dropped: Counter,
    /// Members that came back within a minute of being declared down.
    pub member_flaps: Counter,
    /// Gossip datagrams sent.
    pub gossip_datagrams_sent: Counter,
    /// Gossip datagrams received.
    pub gossip_datagrams_received: Counter,
    /// Gossip bytes sent, datagrams and streams.
    pub gossip_bytes_sent: Counter,
    /// Gossip bytes received, datagrams and streams.
    pub gossip_bytes_received: Counter,
    /// Longest turn of the gossip driver in the last minute, in seconds.
    pub gossip_turn_max: Gauge<f64, AtomicU64>,
    /// Seconds since 1970 at which this member's certificate ends.
    pub cert_expiry_leaf: Gauge<f64, AtomicU64>,
    /// Seconds since 1970 at which the certificate of this member's issuer ends.
    pub cert_expiry_issuer: Gauge<f64, AtomicU64>,
    /// Seconds since 1970 at which the root certificate ends.
    pub cert_expiry_root: Gauge<f64, AtomicU64>,
    /// By how many seconds the others' clocks are ahead of ours; not a number until measured.
    pub clock_skew: Gauge<f64, AtomicU64>,
    /// Round trip to peers with a data connection.
    pub tunnel_rtt: Histogram,
    /// Open connections that were closed because nobody vouches for their peer any more.
    pub connections_revoked: Counter,
    /// Queries of the local API that wait for a change now.
    pub api_blocked_queries: Gauge<i64, AtomicI64>,
    /// Requests that are missing from the access log, because it was written too slowly.
    pub access_log_dropped: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckLabels {
    /// One of this machine's own, so their number is bounded.
    service: String,
    kind: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabels {
    kind: &'static str,
}

impl Metrics {
    /// All metrics at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("murmesh");
        let r = &mut registry;
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        r.register("build", "Version of this agent", build);
        let expiry = Family::<KindLabels, Gauge<f64, AtomicU64>>::default();
        let cert_expiry_leaf = expiry.get_or_create_owned(&KindLabels { kind: "leaf" });
        let cert_expiry_issuer = expiry.get_or_create_owned(&KindLabels { kind: "issuer" });
        let cert_expiry_root = expiry.get_or_create_owned(&KindLabels { kind: "root" });
        r.register("cert_expiry_timestamp_seconds", "When a certificate ends", expiry);
        macro_rules! table {
            ($($name:literal $help:literal $make:expr;)*) => {($({
                let metric = $make;
                r.register($name, $help, metric.clone());
                metric
            }),*)};
        }
        let (requests, connections_open, bytes, refused, endpoints, members, entries_refused) = table! {
            "requests" "HTTP requests (outbound, with a code_class) and connections (all else) that ended" Family::default();
            "connections_open" "Connections open now" Family::default();
            "bytes" "Bytes carried, both ways" Family::default();
            "refused" "What was refused, by door and reason" Family::default();
            "endpoints" "Endpoints by service and state" Family::default();
            "members" "Members by state, this one included" Family::default();
            "gossip_entries_refused" "Entries refused or quarantined" Family::default();
        };
        let durations = Family::new_with_constructor(durations as fn() -> Histogram);
        let help = "From a request of HTTP to the end of its response";
        r.register("request_duration_seconds", help, durations.clone());
        let (gossip_dropped, retries, renewals, series_dropped, member_flaps) = table! {
            "gossip_dropped" "Gossip messages dropped, by reason" Family::default();
            "retries" "Attempts on another instance, by result" Family::default();
            "cert_renewals" "Attempts to renew this member's certificate, by result" Family::default();
            "series_dropped" "Series left out because a family was full, each time that one was wanted" Counter::default();
            "member_flaps" "Members back within a minute of being down" Counter::default();
        };
        let (breaker_news_delayed, breaker_avoided) = table! {
            "breaker_news_delayed" "How often news of own calls waited for the gossip driver" Counter::default();
            "breaker_avoided" "Instances that are not ejected and that calls from here go around, because some there have just failed" Family::default();
        };
        let (breakers, breaker_panic, breaker_failing, breaker_ejected) = table! {
            "breaker_transitions" "Breakers that changed their state, by who said so" Family::default();
            "breaker_panic" "1 for services of which so much is ejected that verdicts are ignored" Family::default();
            "breaker_failing" "1 for services of which more than half fails, so that nothing more is ejected" Family::default();
            "breaker_ejected" "Instances that are ejected: source mesh by all callers, source local by calls from here alone" Family::default();
        };
        let (sent, received, bytes_sent, bytes_received, turn) = table! {
            "gossip_datagrams_sent" "Gossip datagrams sent" Counter::default();
            "gossip_datagrams_received" "Gossip datagrams received" Counter::default();
            "gossip_sent_bytes" "Gossip payload bytes sent" Counter::default();
            "gossip_received_bytes" "Gossip payload bytes received" Counter::default();
            "gossip_turn_seconds_max" "Longest turn of the gossip driver in the last minute" Gauge::default();
        };
        let (clock_skew, tunnel_rtt, connections_revoked, api_blocked_queries) = table! {
            "clock_skew_seconds" "By how much peers' clocks are ahead of ours, median of the last five asked" Gauge::default();
            "tunnel_rtt_seconds" "Round trip to peers with a data connection" Histogram::new(exponential_buckets(0.000_05, 2.0, 16));
            "connections_revoked" "Open connections closed because nobody vouches for their peer any more" Counter::default();
            "api_blocked_queries" "Queries of the local API that wait for a change now" Gauge::default();
        };
        let health_checks = Family::default();
        let help = "Runs of checks of this machine's instances, and words pushed, by result";
        r.register("health_checks", help, health_checks.clone());
        let access_log_dropped = Counter::default();
        let help = "Requests missing from the access log, which was written too slowly";
        r.register("access_log_dropped", help, access_log_dropped.clone());
        Gauge::<f64, AtomicU64>::set(&clock_skew, f64::NAN);
        Self {
            registry: Arc::new(Mutex::new(registry)),
            requests,
            durations,
            connections_open,
            bytes,
            refused,
            endpoints,
            members,
            entries_refused,
            gossip_dropped,
            retries,
            breakers,
            breaker_panic,
            breaker_failing,
            breaker_ejected,
            breaker_news_delayed,
            breaker_avoided,
            breaker_services: Arc::default(),
            renewals,
            health_checks,
            series: Arc::default(),
            series_dropped,
            member_flaps,
            gossip_datagrams_sent: sent,
            gossip_datagrams_received: received,
            gossip_bytes_sent: bytes_sent,
            gossip_bytes_received: bytes_received,
            gossip_turn_max: turn,
            cert_expiry_leaf,
            cert_expiry_issuer,
            cert_expiry_root,
            clock_skew,
            tunnel_rtt,
            connections_revoked,
            api_blocked_queries,
            access_log_dropped,
        }
    }

    /// Counts a refusal. `reason` is a fixed word.
    pub fn count_refused(&self, door: Door, reason: &'static str) {
        self.refused.get_or_create(&RefusedLabels { door, reason }).inc();
    }

    /// How often `door` refused for `reason`.
    pub fn refused(&self, door: Door, reason: &'static str) -> u64 {
        self.refused.get_or_create(&RefusedLabels { door, reason }).get()
    }

    /// Counts an entry that was refused or quarantined.
    pub fn count_entry_refused(&self, reason: &'static str) {
        self.entries_refused.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// Counts a gossip message that was dropped.
    pub fn count_gossip_dropped(&self, reason: &'static str) {
        self.gossip_dropped.get_or_create(&ReasonLabels { reason }).inc();
    }

    /// How often gossip was dropped for this reason.
    pub fn gossip_dropped(&self, reason: &'static str) -> u64 {
        self.gossip_dropped.get_or_create(&ReasonLabels { reason }).get()
    }

    /// Counts an attempt on another instance: `success`, `failure`, or `over_budget` when it was not
    /// made.
    pub fn count_retry(&self, result: &'static str) {
        self.retries.get_or_create(&ResultLabels { result }).inc();
    }

    /// How many attempts on another instance came to this.
    pub fn retries(&self, result: &'static str) -> u64 {
        self.retries.get_or_create(&ResultLabels { result }).get()
    }

    /// Counts a breaker of `service` that changed `to` another state; `source` says whose word that was:
    /// `local`, `mesh` or `owner`.
    pub fn count_breaker(&self, service: &str, to: &'static str, source: &'static str) {
        let mut services = self.breaker_services.lock();
        if !services.contains(service) {
            if services.len() >= SERIES_MAX / BREAKER_SERIES {
                self.drop_series("breaker_transitions", 1);
                return;
            }
            services.insert(service.to_owned());
        }
        let labels = BreakerLabels { service: service.to_owned(), to, source };
        self.breakers.get_or_create(&labels).inc();
    }

    /// How often breakers of `service` have changed so.
    pub fn breakers(&self, service: &str, to: &'static str, source: &'static str) -> u64 {
        let labels = BreakerLabels { service: service.to_owned(), to, source };
        self.breakers.get_or_create(&labels).get()
    }

    /// Counts an attempt to renew this member's certificate. `result` is a fixed word.
    pub fn count_renewal(&self, result: &'static str) {
        self.renewals.get_or_create(&ResultLabels { result }).inc();
    }

    /// Counts a run of a check, or a word that an application pushed. `kind` and `result` are fixed
    /// words.
    pub fn count_health_check(&self, service: &str, kind: &'static str, result: &'static str) {
        let labels = CheckLabels { service: service.to_owned(), kind, result };
        self.health_checks.get_or_create(&labels).inc();
    }

    /// Sets how many members are in each state.
    pub fn set_members(&self, counts: impl IntoIterator<Item = (&'static str, i64)>) {
        for (state, count) in counts {
            self.members.get_or_create(&StateLabels { state }).set(count);
        }
    }

    /// Sets how many endpoints each service has in each state; forgets services not named.
    pub fn set_endpoints(&self, counts: impl IntoIterator<Item = (EndpointLabels, i64)>) {
        self.endpoints.clear();
        for (number, (labels, count)) in counts.into_iter().enumerate() {
            match number < SERIES_MAX {
                true => {
                    self.endpoints.get_or_create(&labels).set(count);
                }
                false => self.drop_series("endpoints", 1),
            }
        }
    }

    /// Sets how the breakers of each service stand; forgets services not named.
    pub fn set_breakers(&self, services: impl IntoIterator<Item = BreakerGauges>) {
        self.breaker_panic.clear();
        self.breaker_failing.clear();
        self.breaker_ejected.clear();
        self.breaker_avoided.clear();
        for (number, of_one) in services.into_iter().enumerate() {
            let BreakerGauges { service, is_panic, is_failing, ejected, avoided } = of_one;
            if number >= SERIES_MAX / ejected.len() {
                self.drop_series("breaker_*", BREAKER_GAUGES);
                continue;
            }
            for (source, count) in ejected {
                let labels = EjectedLabels { service: service.clone(), source };
                self.breaker_ejected.get_or_create(&labels).set(count);
            }
            let labels = ServiceLabels { service };
            self.breaker_panic.get_or_create(&labels).set(is_panic.into());
            self.breaker_failing.get_or_create(&labels).set(is_failing.into());
            self.breaker_avoided.get_or_create(&labels).set(avoided);
        }
    }

    /// Counts series that are left out, and says so the first time.
    fn drop_series(&self, family: &'static str, count: u64) {
        if self.series_dropped.inc_by(count) == 0 {
            warn!(
                family,
                max = SERIES_MAX,
                "metrics are left out because there are too many; murmesh_series_dropped_total counts them"
            );
        }
    }

    /// The counters of one kind of traffic, to be kept and used without a look-up.
    pub fn traffic(&self, labels: TrafficLabels) -> TrafficMetrics {
        let mut series = self.series.lock();
        let is_known = series.contains(&labels);
        if !is_known && series.len() >= SERIES_MAX {
            self.drop_series("requests", 1);
            return TrafficMetrics {
                success: Counter::default(),
                failure: Counter::default(),
                open: Gauge::default(),
                bytes: Counter::default(),
                duration: self::durations(),
                answered: Arc::new(Answered::new(labels, Family::default())),
            };
        }
        if !is_known {
            series.insert(labels.clone());
        }
        let TrafficLabels { direction, service, peer } = labels.clone();
        let outcome = |outcome| OutcomeLabels {
            direction,
            service: service.clone(),
            peer: peer.clone(),
            code_class: "",
            outcome,
        };
        TrafficMetrics {
            success: self.requests.get_or_create_owned(&outcome("success")),
            failure: self.requests.get_or_create_owned(&outcome("failure")),
            open: self.connections_open.get_or_create_owned(&labels),
            bytes: self.bytes.get_or_create_owned(&labels),
            duration: self.durations.get_or_create_owned(&labels),
            answered: Arc::new(Answered::new(labels, self.requests.clone())),
        }
    }

    /// Shows how many lines the process's log has dropped: it is older than its agent's metrics.
    pub fn show_log_lines_dropped(&self, dropped: &Counter) {
        let help = "Lines of the log that nobody read in time";
        self.registry.lock().register("log_lines_dropped", help, dropped.clone());
    }

    /// Shows how many events were left out because there were too many of their kind.
    pub fn show_events_dropped(&self, dropped: &Counter) {
        let help = "Events left out because there were too many of their kind";
        self.registry.lock().register("events_dropped", help, dropped.clone());
    }

    /// All metrics in the text format of OpenMetrics 1.0, the series of each by their labels.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        text::encode(&mut out, &self.registry.lock())?;
        Ok(sorted(&out))
    }
}

impl Answered {
    fn new(labels: TrafficLabels, requests: Family<OutcomeLabels, Counter>) -> Self {
        Self { labels, requests, counters: Default::default() }
    }
}

/// The same text with the series of each metric in the order of their labels, so that two answers can be
/// compared. The lines of one histogram stay as they are.
fn sorted(text: &str) -> String {
    let mut lines: Vec<_> = text.lines().collect();
    for series in lines.chunk_by_mut(|a, b| a.starts_with('#') == b.starts_with('#')) {
        if !series[0].starts_with('#') {
            series.sort_by_cached_key(|line| labels(line));
        }
    }
    lines.iter().flat_map(|line| [*line, "\n"]).collect()
}

/// The labels of a line but for the bound of a bucket, which the encoder writes first.
fn labels(line: &str) -> &str {
    let all = line.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}'));
    let all = all.map_or("", |(labels, _)| labels);
    match all.strip_prefix("le=\"") {
        Some(bound) => bound.split_once("\",").map_or("", |(_, others)| others),
        None => all,
    }
}

/// 0.5 ms to 16 s.
fn durations() -> Histogram {
    Histogram::new(exponential_buckets(0.000_5, 2.0, 16))
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(number: usize) -> BreakerGauges {
        BreakerGauges {
            service: format!("web-{number}"),
            is_panic: false,
            is_failing: false,
            ejected: [("mesh", 0), ("local", 0)],
            avoided: 0,
        }
    }

    #[test]
    fn series_that_are_left_out_are_counted() {
        let metrics = Metrics::new();
        metrics.set_breakers((0..SERIES_MAX / 2 + 3).map(of));
        assert_eq!(metrics.series_dropped.get(), 3 * BREAKER_GAUGES);
        let labels = |number| EndpointLabels { service: format!("web-{number}"), state: "ready" };
        metrics.set_endpoints((0..SERIES_MAX + 2).map(|number| (labels(number), 1)));
        assert_eq!(metrics.series_dropped.get(), 3 * BREAKER_GAUGES + 2);
    }

    #[test]
    fn series_come_in_the_order_of_their_labels_and_histograms_stay_whole() {
        let metrics = Metrics::new();
        metrics.set_breakers((0..20).map(of));
        for number in (0..20).rev() {
            let (service, peer) = (format!("web-{number}"), "b".to_owned());
            let labels = TrafficLabels { direction: Direction::outbound, service, peer };
            metrics.traffic(labels).duration.observe(0.01);
        }
        let text = metrics.encode().unwrap();
        let mut before = String::new();
        text::encode(&mut before, &metrics.registry.lock()).unwrap();
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
        assert_eq!(lines(&text), lines(&before), "nothing is lost");
        assert!(text.ends_with("# EOF\n"));
        let panics: Vec<_> =
            text.lines().filter(|line| line.starts_with("murmesh_breaker_panic{")).collect();
        assert!(panics.len() == 20 && panics.is_sorted(), "{panics:?}");
        let of_one = text.lines().filter(|line| line.contains("duration"));
        let of_one: Vec<_> = of_one.filter(|line| line.contains("\"web-7\"")).collect();
        let in_row = text.split(of_one[0]).nth(1).unwrap();
        assert!(of_one.len() > 15 && of_one[0].contains("_sum"), "{of_one:?}");
        assert_eq!(
            in_row.lines().skip(1).take(of_one.len() - 1).collect::<Vec<_>>(),
            of_one[1..],
            "one histogram is in one place"
        );
    }
}
