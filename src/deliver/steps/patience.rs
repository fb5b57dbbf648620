//! One deadline over the whole exchange.

use std::time::Duration;

use tower::{ServiceExt, service_fn};

use crate::deliver::Delivery;
use crate::model::{ErrorKind, Failure, span_text};

use super::Step;

/// Drops what is inside when `limit` has passed, connection and all, and calls it a timeout.
pub(crate) fn patience<S: Step>(inner: S, limit: Duration) -> impl Step {
    service_fn(move |delivery: Delivery| {
        let inner = inner.clone();
        async move {
            let Ok(outcome) = tokio::time::timeout(limit, inner.oneshot(delivery)).await else {
                let detail = format!("no whole answer within {}", span_text(limit));
                return Err(Failure::new(ErrorKind::Timeout, detail));
            };
            outcome
        }
    })
}
