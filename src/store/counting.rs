//! Counts what a store takes in, in one place for all of them.

use std::collections::HashMap;

use crate::model::{QueueName, TopicName};
use crate::telemetry::{metrics, rates};

use super::{EnqueueOutcome, Enqueued, Published};

/// Counts what one transaction has taken in, once it is committed, whether its callers still wait or not.
pub(super) fn count_enqueued<'a>(outcomes: impl IntoIterator<Item = &'a EnqueueOutcome>) {
    let mut new = HashMap::<&QueueName, u64>::new();
    for outcome in outcomes {
        let EnqueueOutcome::Done(all) = outcome else { continue };
        for one in all {
            match one {
                Enqueued::New(receipt) => *new.entry(&receipt.queue).or_default() += 1,
                Enqueued::Duplicate(receipt) => metrics::duplicates(&receipt.queue).increment(1),
                Enqueued::Published(published) if published.duplicate => {
                    metrics::published_again(topic(published)).increment(1);
                }
                Enqueued::Published(published) => {
                    rates::note(&published.topic);
                    metrics::published(topic(published)).increment(1);
                    for copy in &published.copies {
                        if copy.was_there {
                            metrics::duplicates(&copy.queue).increment(1);
                        } else {
                            *new.entry(&copy.queue).or_default() += 1;
                        }
                    }
                }
                Enqueued::Refused(_) => (),
            }
        }
    }
    for (queue, count) in new {
        metrics::enqueued(queue).increment(count);
    }
}

fn topic(published: &Published) -> Option<&TopicName> {
    (!published.copies.is_empty()).then_some(&published.topic)
}
