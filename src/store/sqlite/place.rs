//! A place for a message with somebody who takes it as soon as it is committed.

use std::sync::Arc;
use std::time::Duration;

use crate::model::{Leased, QueueName, ReplicaName};

use super::super::{Handover, Taker};

/// A place that is kept for a message until it is handed over; dropped before that, it is given back.
#[derive(Debug)]
pub(super) struct Place(Option<Arc<dyn Taker>>);

impl Place {
    /// Keeps a place for one message of a queue, if somebody has one.
    pub(super) fn keep(handover: &Handover, queue: &QueueName) -> Option<Self> {
        let taker = handover.taker(queue).filter(|taker| taker.reserve())?;
        Some(Self(Some(taker)))
    }

    /// In whose name, and for how long, the message is leased.
    pub(super) fn terms(&self) -> (ReplicaName, Duration) {
        self.0.as_ref().expect("a place is used once").terms()
    }

    /// Hands a message over that is committed. **Fails** where nobody takes it any more.
    pub(super) fn hand(mut self, leased: Leased) -> Result<(), Box<Leased>> {
        self.0.take().expect("a place is used once").take(leased)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(taker) = self.0.take() {
            taker.give_back();
        }
    }
}
