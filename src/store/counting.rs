//! Counts what a store takes in, in one place for all of them.

use std::collections::HashMap;

use crate::model::QueueName;
use crate::telemetry::metrics;

use super::{EnqueueOutcome, Enqueued};

/// Counts what one transaction has taken in, once it is committed, whether its callers still wait or not.
pub(super) fn count_enqueued<'a>(outcomes: impl IntoIterator<Item = &'a EnqueueOutcome>) {
    let mut new = HashMap::<&QueueName, u64>::new();
    for outcome in outcomes {
        let EnqueueOutcome::Done(all) = outcome else { continue };
        for one in all {
            match one {
                Enqueued::New(receipt) => *new.entry(&receipt.queue).or_default() += 1,
                Enqueued::Duplicate(receipt) => metrics::duplicates(&receipt.queue).increment(1),
                Enqueued::Refused(_) => (),
            }
        }
    }
    for (queue, count) in new {
        metrics::enqueued(queue).increment(count);
    }
}
