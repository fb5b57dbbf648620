//! Counts the deliveries that are open, and how long each takes.

use std::sync::Arc;
use std::time::Instant;

use metrics::Gauge;
use tower::{ServiceExt, service_fn};

use crate::deliver::Delivery;
use crate::telemetry::metrics::QueueMeters;

use super::Step;

/// Measures what is inside. One that is cut is no longer counted as open, and leaves no time behind.
pub(crate) fn measure<S: Step>(inner: S, meters: Arc<QueueMeters>) -> impl Step {
    service_fn(move |delivery: Delivery| {
        let (inner, meters) = (inner.clone(), Arc::clone(&meters));
        async move {
            let _open = Open::new(meters.in_flight.clone());
            let start = Instant::now();
            let outcome = inner.oneshot(delivery).await;
            meters.delivery_seconds.record(start.elapsed());
            outcome
        }
    })
}

/// Counts one open delivery for as long as it lives.
struct Open(Gauge);

impl Open {
    fn new(gauge: Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
