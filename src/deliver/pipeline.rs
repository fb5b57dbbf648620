//! The list: every step around a delivery, in the order of running. It decides nothing.

use std::sync::Arc;
use std::time::Duration;

use tower::ServiceBuilder;

use crate::telemetry::metrics::QueueMeters;

use super::Handler;
use super::steps::{catch, measure, patience, trace};

/// What the steps need to know of the queue they stand in.
#[derive(Clone)]
pub struct Surroundings {
    /// How long the whole exchange may take.
    pub timeout: Duration,
    /// Where to count.
    pub meters: Arc<QueueMeters>,
}

/// The handler with every built-in step around it. The first line is the outermost step.
pub fn pipeline(handler: Handler, around: &Surroundings) -> Handler {
    let Surroundings { timeout, meters } = around.clone();
    let service = ServiceBuilder::new()
        // One span around everything, so that what is logged inside names its message.
        .layer_fn(trace)
        // Counts what is open and how long it takes, a timeout and a panic too.
        .layer_fn(|inner| measure(inner, Arc::clone(&meters)))
        // One deadline over the whole exchange: a handler that hangs costs its own message only.
        .layer_fn(|inner| patience(inner, timeout))
        // Innermost, so that a panic is an answer like any other to the steps outside.
        .layer_fn(catch)
        .service(handler);
    Handler::new(service)
}
