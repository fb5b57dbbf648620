//! Topics: what becomes of a message that is published, and who has subscribed.
//!
//! A message to a topic is taken in as copies, one for each queue that wants it, in the transaction that takes in
//! everything else of its call. Who has subscribed is read in that transaction, so a subscription is in force for the
//! next publish on every replica.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::model::{
    Idempotency, Lasts, MessageId, NewMessage, QueueName, Subscription, TopicName, copy_for,
    wanted_by,
};

/// How long a topic remembers the idempotency keys of what was published to it: a day.
pub const TOPIC_WINDOW: Duration = Duration::from_secs(24 * 3600);

/// How many subscriptions a topic has at most.
pub const SUBSCRIPTIONS_MAX: usize = 1000;

/// What became of a message that was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// To which topic.
    pub topic: TopicName,
    /// What its copies share.
    pub id: MessageId,
    /// The copies, by their queues' names; none where nobody wanted it.
    pub copies: Vec<Copied>,
    /// Whether the same request came before, and this was its answer.
    pub duplicate: bool,
}

/// A copy of a message that was published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copied {
    /// In which queue.
    pub queue: QueueName,
    /// The copy's name.
    pub id: MessageId,
    /// Whether it was there before: of its key one was pending.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub was_there: bool,
}

/// What became of a subscription that was to be put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutSubscription {
    /// It is new.
    Created,
    /// It says something else now, or the same again.
    Replaced,
    /// There is no such queue.
    NoSuchQueue,
}

/// The copies of a message for those that want it.
pub(super) fn copies<'a>(
    message: &NewMessage,
    subscriptions: impl IntoIterator<Item = &'a Subscription>,
) -> Vec<(QueueName, NewMessage)> {
    let wanted = wanted_by(message, subscriptions);
    wanted.into_iter().map(|queue| (queue.clone(), copy_for(message, queue))).collect()
}

/// The keys of a published message that are its topic's, as they are kept: beside those of all other topics.
pub(super) fn keys_of(topic: &TopicName, message: &NewMessage) -> Vec<Idempotency> {
    let own = message.keys.iter().filter(|key| key.lasts == Lasts::Window);
    own.map(|key| key_of(topic, key)).collect()
}

/// A key of a topic as it is kept.
pub(super) fn key_of(topic: &TopicName, key: &Idempotency) -> Idempotency {
    let mut hash = Sha256::new();
    hash.update(b"pumphouse: key of a topic");
    hash.update(key.key);
    hash.update(topic.as_str());
    let digest: [u8; 32] = hash.finalize().into();
    let mut short = [0; 16];
    short.copy_from_slice(&digest[..16]);
    Idempotency { key: short, ..*key }
}
