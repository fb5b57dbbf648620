//! One span around a delivery: what is logged inside names the message.

use tower::{ServiceExt, service_fn};
use tracing::{Instrument, debug_span};

use crate::deliver::Delivery;

use super::Step;

/// Names the message and the attempt to whatever is logged inside.
pub(crate) fn trace<S: Step>(inner: S) -> impl Step {
    service_fn(move |delivery: Delivery| {
        let head = &delivery.message.head;
        let span = debug_span!("delivery", queue = %head.queue, message = %head.id, attempt = delivery.attempt);
        inner.clone().oneshot(delivery).instrument(span)
    })
}
