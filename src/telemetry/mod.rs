//! What an agent tells about itself: logs, metrics, events.

mod access;
mod events;
mod lines;
mod logging;
mod metrics;
mod throttle;

pub use access::{Access, AccessLog, AccessLogError, AccessTarget};
pub use events::{EVIDENCE, Event, EventKind, EventLog};
pub use lines::LineQueue;
pub use logging::{Log, LogFormat, LoggingError, check_filter, init as init_logging};
pub use metrics::{
    BreakerGauges, Counter, Direction, Door, EndpointLabels, Metrics, RefusedLabels, TrafficLabels,
    TrafficMetrics,
};
