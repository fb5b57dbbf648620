//! Messages on their way in, each as what becomes of it: a message in its queue, or a copy in each queue that wants it.

use std::collections::{HashMap, HashSet};

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query};

use crate::model::{
    Destination, MessageId, NewMessage, QueueName, Subscription, SubscriptionName, TopicName,
};

use super::super::published::{self, Incoming};
use super::super::topics;
use super::super::{Copied, Published};
use super::fault::unreadable;
use super::rows;

/// A message on its way into one queue.
#[derive(Debug, Clone)]
pub(super) struct Item<'a> {
    pub(super) queue: QueueName,
    pub(super) message: Incoming<'a>,
    /// Its place among all items of the transaction.
    pub(super) place: usize,
    /// The place of the first of those that have the same payload, where it is kept once for them.
    pub(super) shared: Option<usize>,
}

/// A message on its way in.
#[derive(Debug, Clone)]
pub(super) enum Arrival<'a> {
    Message(Item<'a>),
    Publication(Publication<'a>),
}

/// A message that is published.
#[derive(Debug, Clone)]
pub(super) struct Publication<'a> {
    pub(super) topic: &'a TopicName,
    pub(super) message: &'a NewMessage,
    pub(super) require_subscribers: bool,
    pub(super) copies: Vec<Item<'a>>,
}

impl<'a> Arrival<'a> {
    /// What goes into queues.
    pub(super) fn items(&self) -> &[Item<'a>] {
        match self {
            Self::Message(item) => std::slice::from_ref(item),
            Self::Publication(publication) => &publication.copies,
        }
    }
}

impl Publication<'_> {
    /// The answer to it, if every copy is taken in.
    pub(super) fn answer(&self) -> Published {
        let copied = |item: &Item<'_>| Copied {
            queue: item.queue.clone(),
            id: item.message.id,
            was_there: false,
        };
        Published {
            topic: self.topic.clone(),
            id: self.message.id,
            copies: self.copies.iter().map(copied).collect(),
            duplicate: false,
        }
    }
}

// Lives on: the primary keys of subscription and queue.
const SUBSCRIPTIONS_OF: &str = "\
select subscription.topic, subscription.name, subscription.filter, queue.name as queue
from subscription
join queue on queue.id = subscription.queue_id
where subscription.topic = any($1)";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[SUBSCRIPTIONS_OF];

/// Who has subscribed to the topics of some messages.
pub(super) struct Subscribed(HashMap<TopicName, Vec<Subscription>>);

impl Subscribed {
    /// To the topics of these. Asks the database only where one of them is published.
    pub(super) async fn to_those_of<'a>(
        connection: &mut PgConnection,
        messages: impl Iterator<Item = &'a NewMessage>,
    ) -> sqlx::Result<Self> {
        let topics = messages.filter_map(topic).collect::<HashSet<_>>();
        Ok(Self(subscriptions(connection, topics).await?))
    }

    /// To this one.
    pub(super) fn to(&self, topic: &TopicName) -> &[Subscription] {
        self.0.get(topic).map_or(&[], Vec::as_slice)
    }
}

/// What becomes of these messages, in order.
pub(super) fn arrivals<'a>(
    subscribed: &Subscribed,
    messages: impl Iterator<Item = &'a NewMessage>,
) -> Vec<Arrival<'a>> {
    let mut place = 0;
    let mut next = || {
        place += 1;
        place - 1
    };
    let mut arrival = |message: &'a NewMessage| match &message.to {
        Destination::Queue(queue) => Arrival::Message(Item {
            queue: queue.clone(),
            message: Incoming::Sent(message),
            place: next(),
            shared: None,
        }),
        Destination::Topic { topic, require_subscribers } => {
            let copies = topics::copies(message, subscribed.to(topic));
            let is_shared = published::is_shared(message, copies.len());
            let mut first = None;
            let item = |(queue, copy): (QueueName, NewMessage)| {
                let place = next();
                let first = *first.get_or_insert(place);
                let shared = is_shared.then_some(first);
                Item { queue, message: Incoming::Copy(Box::new(copy)), place, shared }
            };
            let copies = copies.into_iter().map(item).collect();
            let require_subscribers = *require_subscribers;
            Arrival::Publication(Publication { topic, message, require_subscribers, copies })
        }
    };
    messages.map(&mut arrival).collect()
}

/// How many items there are, and their queues' names, each once, in one order everywhere, so that nobody who locks
/// them waits for each other.
pub(super) fn items<'i, 'a>(arrivals: &'i [Arrival<'a>]) -> impl Iterator<Item = &'i Item<'a>> {
    arrivals.iter().flat_map(Arrival::items)
}

fn topic(message: &NewMessage) -> Option<&TopicName> {
    match &message.to {
        Destination::Queue(_) => None,
        Destination::Topic { topic, .. } => Some(topic),
    }
}

async fn subscriptions(
    connection: &mut PgConnection,
    topics: HashSet<&TopicName>,
) -> sqlx::Result<HashMap<TopicName, Vec<Subscription>>> {
    let mut found = HashMap::<_, Vec<_>>::new();
    if topics.is_empty() {
        return Ok(found);
    }
    let topics = topics.into_iter().map(TopicName::as_str).collect::<Vec<_>>();
    for row in query(SUBSCRIPTIONS_OF).bind(topics).fetch_all(connection).await? {
        let Some(subscription) = readable_subscription(&row) else { continue };
        found.entry(subscription.topic.clone()).or_default().push(subscription);
    }
    Ok(found)
}

/// A subscription, unless it cannot be read: one of them must not stop all the others.
pub(super) fn readable_subscription(row: &PgRow) -> Option<Subscription> {
    let read = subscription(row);
    read.inspect_err(|error| {
        let topic = row.try_get::<&str, _>("topic").unwrap_or_default();
        let name = row.try_get::<&str, _>("name").unwrap_or_default();
        tracing::error!(%topic, %name, %error, "a subscription is left alone, because it cannot be read");
    })
    .ok()
}

/// Reads a subscription.
fn subscription(row: &PgRow) -> sqlx::Result<Subscription> {
    let name = |_| unreadable("a name is no name");
    let filter = serde_json::from_str(row.try_get("filter")?);
    Ok(Subscription {
        topic: TopicName::parse(row.try_get("topic")?).map_err(name)?,
        name: SubscriptionName::parse(row.try_get("name")?).map_err(name)?,
        queue: rows::queue_name(row.try_get("queue")?)?,
        filter: filter.map_err(|_| unreadable("a filter is unknown"))?,
    })
}

/// The names under which what goes into queues is found again.
pub(super) fn ids(arrivals: &[Arrival<'_>]) -> Vec<MessageId> {
    items(arrivals).map(|item| item.message.id).collect()
}
