//! What an agent tells about itself: logs, metrics, events.

mod events;
mod lines;
mod logging;
mod metrics;
mod throttle;

pub use events::{Event, EventKind, EventLog};
pub use lines::LineQueue;
pub use logging::{Log, LogFormat, LoggingError, init as init_logging};
pub use metrics::{
    Counter, Direction, Door, EndpointLabels, Metrics, RefusedLabels, TrafficLabels, TrafficMetrics,
};
