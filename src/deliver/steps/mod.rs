//! The steps around a delivery: one a file, always the same shape, a function from a service to a service.
//!
//! To add one: copy `patience.rs`, change what happens around `inner`, and add a line to the list in
//! `pipeline.rs`, where the order is.

mod trace;
mod measure;
mod patience;
mod catch;

use tower::Service;

use crate::model::{Answer, Failure};

use super::Delivery;

pub(super) use catch::catch;
pub(super) use measure::measure;
pub(super) use patience::patience;
pub(super) use trace::trace;

/// What every step is made of and makes: a service from a delivery to an answer.
pub(super) trait Step:
    Service<Delivery, Response = Answer, Error = Failure, Future: Send> + Clone + Send + Sync + 'static
{
}

impl<S> Step for S where
    S: Service<Delivery, Response = Answer, Error = Failure, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static
{
}
