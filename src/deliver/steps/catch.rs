//! A panic costs its own message only.

use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use tower::{ServiceExt, service_fn};

use crate::deliver::Delivery;
use crate::model::{ErrorKind, Failure};

use super::Step;

/// Turns a panic inside into a failed delivery.
///
/// Unwind safety: what is inside was cloned for this delivery and is dropped with it; what a handler
/// shares between deliveries is its own to keep whole.
pub(crate) fn catch<S: Step>(inner: S) -> impl Step {
    service_fn(move |delivery: Delivery| {
        let inner = inner.clone();
        async move {
            // The call itself stands inside, because a service may panic before it returns a future.
            let call = async move { inner.oneshot(delivery).await };
            let panicked = |_| Failure::new(ErrorKind::Panic, "the handler panicked");
            AssertUnwindSafe(call).catch_unwind().await.map_err(panicked)?
        }
    })
}
