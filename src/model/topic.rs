//! Where a message goes: into a queue, or to a topic, from which every queue that has subscribed gets a copy.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Invalid, MessageId, NewMessage, QueueName, SubscriptionName, TEXT_MAX, TopicName};

/// How many conditions a filter has at most, and how many values each.
const CONDITIONS_MAX: usize = 32;
const VALUES_MAX: usize = 100;

/// Where a message is to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Into this queue.
    Queue(QueueName),
    /// Into every queue that has subscribed to this topic and wants it.
    Topic {
        /// Which one.
        topic: TopicName,
        /// Whether it is refused where no queue wants it.
        require_subscribers: bool,
    },
}

impl Destination {
    /// The queue, where it is one.
    pub fn queue(&self) -> Option<&QueueName> {
        match self {
            Self::Queue(queue) => Some(queue),
            Self::Topic { .. } => None,
        }
    }
}

impl From<QueueName> for Destination {
    fn from(queue: QueueName) -> Self {
        Self::Queue(queue)
    }
}

/// A topic that need not have subscribers.
impl From<TopicName> for Destination {
    fn from(topic: TopicName) -> Self {
        Self::Topic { topic, require_subscribers: false }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Queue(queue) => write!(f, "queue {queue}"),
            Self::Topic { topic, .. } => write!(f, "topic {topic}"),
        }
    }
}

/// A queue's wish for what is published to a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// To which topic.
    pub topic: TopicName,
    /// Its name, of which a topic has one.
    pub name: SubscriptionName,
    /// Where the copies go.
    pub queue: QueueName,
    /// Which messages it wants.
    pub filter: SubscriptionFilter,
}

/// Which of a topic's messages are wanted: those for which every condition holds; without one, all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubscriptionFilter {
    /// What their type is like. In a plain value `*` stands for one word between dots, `**` for any number of them.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<Condition>,
    /// What headers are like that are sent on to the handler, by name in lower case; `ce-<attribute>` is an attribute
    /// of a CloudEvent. A header that is not there is like nothing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, Condition>,
}

/// What a value is to be like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Condition {
    /// This.
    Is(String),
    /// It begins like this.
    Begins {
        /// Like this.
        prefix: String,
    },
    /// Like any of these.
    Any(Vec<Self>),
}

impl SubscriptionFilter {
    /// Whether it is one that can be kept; says everything that is wrong.
    pub fn check(&self) -> Result<(), Vec<Invalid>> {
        let mut wrong = Vec::new();
        if let Some(Err(detail)) = self.kind.as_ref().map(Condition::check) {
            wrong.push(Invalid::new("/filter/type", detail));
        }
        for (name, condition) in &self.headers {
            let pointer = Invalid::pointer("/filter/headers", name);
            if http::HeaderName::try_from(name).is_err() || *name != name.to_ascii_lowercase() {
                wrong.push(Invalid::new(&pointer, "a header's name is in lower case"));
            }
            if let Err(detail) = condition.check() {
                wrong.push(Invalid::new(pointer, detail));
            }
        }
        if self.headers.len() > CONDITIONS_MAX {
            wrong.push(Invalid::new("/filter/headers", "at most 32 headers"));
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

    /// Whether a message is wanted.
    pub fn wants(&self, message: &NewMessage) -> bool {
        let of_kind = |condition: &Condition| {
            message.kind.as_deref().is_some_and(|kind| condition.holds(kind, like))
        };
        let of_header = |(name, condition): (&String, &Condition)| {
            header(message, name).is_some_and(|value| condition.holds(&value, str::eq))
        };
        self.kind.as_ref().is_none_or(of_kind) && self.headers.iter().all(of_header)
    }
}

impl Condition {
    fn check(&self) -> Result<(), &'static str> {
        let good = |text: &str| text.len() <= TEXT_MAX && !text.chars().any(char::is_control);
        match self {
            Self::Is(text) | Self::Begins { prefix: text } if good(text) => Ok(()),
            Self::Is(_) | Self::Begins { .. } => Err("at most 255 bytes, no control characters"),
            Self::Any(all) if all.is_empty() || all.len() > VALUES_MAX => {
                Err("a list has 1 to 100 values")
            }
            Self::Any(all) => {
                if all.iter().any(|one| matches!(one, Self::Any(_))) {
                    return Err("a list has values, and no lists");
                }
                all.iter().try_for_each(Self::check)
            }
        }
    }

    fn holds(&self, value: &str, is: fn(&str, &str) -> bool) -> bool {
        match self {
            Self::Is(text) => is(text, value),
            Self::Begins { prefix } => value.starts_with(prefix),
            Self::Any(all) => all.iter().any(|one| one.holds(value, is)),
        }
    }
}

/// What a message has under this name: a header that is sent on, or an attribute of an event.
fn header(message: &NewMessage, name: &str) -> Option<String> {
    if let Some(attribute) = name.strip_prefix("ce-") {
        let mut event = message.details.event.iter();
        return event.find(|(known, _)| known == attribute).map(|(_, value)| value.to_string());
    }
    let mut headers = message.details.headers.iter();
    headers.find(|(known, _)| known == name).map(|(_, value)| value.clone())
}

/// Whether a type is like a pattern, word by word between dots: `*` is one word, `**` any number, none too.
///
/// Takes as many steps as there are words in the one times words in the other, whatever the pattern is.
fn like(pattern: &str, kind: &str) -> bool {
    let words = kind.split('.').collect::<Vec<_>>();
    // For each number of words from the front: whether the pattern read so far can stand for just these.
    let mut fits = vec![false; words.len() + 1];
    fits[0] = true;
    for part in pattern.split('.') {
        if part == "**" {
            let first = fits.iter().position(|fits| *fits).unwrap_or(fits.len());
            fits[first..].fill(true);
            continue;
        }
        for count in (1..=words.len()).rev() {
            fits[count] = fits[count - 1] && (part == "*" || part == words[count - 1]);
        }
        fits[0] = false;
    }
    fits[words.len()]
}

/// The queues that want a message, by name, each once, however many of its subscriptions want it.
pub fn wanted_by<'a>(
    message: &NewMessage,
    subscriptions: impl IntoIterator<Item = &'a Subscription>,
) -> BTreeSet<&'a QueueName> {
    let wants = subscriptions.into_iter().filter(|it| it.filter.wants(message));
    wants.map(|subscription| &subscription.queue).collect()
}

/// The copy of a published message for a queue: a message with an id of its own, which follows from the one under which
/// it was published and the queue, so that a repeat collapses onto the first one. Of its keys it has those that count
/// while it is pending; the others are the topic's.
pub fn copy_for(message: &NewMessage, queue: &QueueName) -> NewMessage {
    let mut copy = message.clone(); // shares the payload's bytes
    copy.id = MessageId::copy(message.id, queue);
    copy.to = Destination::Queue(queue.clone());
    copy.details.published_id = Some(message.id);
    copy.keys.retain(|key| key.lasts == super::Lasts::WhilePending);
    copy
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::{Attribute, Details};

    use super::*;

    fn message() -> NewMessage {
        let topic = TopicName::parse("orders").unwrap();
        NewMessage {
            kind: Some("orders.placed.eu".to_owned()),
            details: Details {
                headers: vec![("x-tenant".to_owned(), "acme".to_owned())],
                event: vec![("source".to_owned(), Attribute::Text("/shops/7".to_owned()))],
                ..Details::default()
            },
            ..NewMessage::new(topic, "x")
        }
    }

    fn filter(json: serde_json::Value) -> SubscriptionFilter {
        let filter: SubscriptionFilter = serde_json::from_value(json).unwrap();
        assert_eq!(filter.check(), Ok(()));
        filter
    }

    #[test]
    fn a_type_is_like_a_pattern_word_by_word() {
        for (pattern, kind, fits) in [
            ("orders.placed", "orders.placed", true),
            ("orders.placed", "orders.placedx", false),
            ("orders.*", "orders.placed", true),
            ("orders.*", "orders", false),
            ("orders.*", "orders.placed.eu", false),
            ("orders.**", "orders.placed.eu", true),
            ("orders.**", "orders", true),
            ("orders.**", "ordersx", false),
            ("**", "anything.at.all", true),
            ("*", "anything", true),
            ("*", "any.thing", false),
            ("**.eu", "orders.placed.eu", true),
            ("**.eu", "orders.placed.us", false),
            ("orders.**.eu", "orders.eu", true),
            ("*.**.*", "a", false),
            ("*.**.*", "a.b", true),
            ("a.**.b.**.c", "a.x.b.b.y.c", true),
            ("a.**.b.**.c", "a.x.c.b", false),
            ("orders.pl*", "orders.placed", false),
            ("orders.pl*", "orders.pl*", true),
        ] {
            assert_eq!(like(pattern, kind), fits, "{pattern} and {kind}");
        }
    }

    #[test]
    fn every_condition_has_to_hold() {
        for (json, wanted) in [
            (json!({}), true),
            (json!({"type": "orders.**"}), true),
            (json!({"type": "orders.*"}), false),
            (json!({"type": {"prefix": "orders.pl"}}), true),
            (json!({"type": ["invoices.*", "*.placed.*"]}), true),
            (json!({"type": ["invoices.*", {"prefix": "invoices"}]}), false),
            (json!({"headers": {"x-tenant": "acme"}}), true),
            (json!({"headers": {"x-tenant": "ac*"}}), false),
            (json!({"headers": {"x-tenant": {"prefix": "ac"}}}), true),
            (json!({"headers": {"x-tenant": ["other", "acme"]}}), true),
            (json!({"headers": {"x-other": {"prefix": ""}}}), false),
            (json!({"headers": {"ce-source": {"prefix": "/shops/"}}}), true),
            (json!({"type": "orders.**", "headers": {"x-tenant": "other"}}), false),
        ] {
            assert_eq!(filter(json.clone()).wants(&message()), wanted, "{json}");
        }
        let without_type = NewMessage { kind: None, ..message() };
        assert!(!filter(json!({"type": "**"})).wants(&without_type), "it has no type");
    }

    #[test]
    fn what_no_filter_can_be_is_named() {
        for (json, pointer) in [
            (json!({"type": []}), "/filter/type"),
            (json!({"type": [["a"]]}), "/filter/type"),
            (json!({"type": "x".repeat(256)}), "/filter/type"),
            (json!({"headers": {"X-Tenant": "a"}}), "/filter/headers/X-Tenant"),
            (json!({"headers": {"x y": "a"}}), "/filter/headers/x y"),
        ] {
            let filter: SubscriptionFilter = serde_json::from_value(json.clone()).unwrap();
            assert_eq!(filter.check().unwrap_err()[0].pointer, pointer, "{json}");
        }
        for json in [json!({"kind": "a"}), json!({"type": 7}), json!({"type": {"suffix": "a"}})] {
            assert!(serde_json::from_value::<SubscriptionFilter>(json.clone()).is_err(), "{json}");
        }
    }

    #[test]
    fn a_queue_gets_one_copy_however_often_it_subscribed() {
        let queue = |name| QueueName::parse(name).unwrap();
        let subscription = |name, to| Subscription {
            topic: TopicName::parse("orders").unwrap(),
            name: SubscriptionName::parse(name).unwrap(),
            queue: queue(to),
            filter: SubscriptionFilter::default(),
        };
        let all = [subscription("a", "y"), subscription("b", "x"), subscription("c", "y")];
        let message = message();
        let wanted = wanted_by(&message, &all);
        assert_eq!(wanted.iter().map(|it| it.as_str()).collect::<Vec<_>>(), ["x", "y"]);
        let copies = [copy_for(&message, &queue("x")), copy_for(&message, &queue("y"))];
        assert_ne!(copies[0].id, copies[1].id);
        assert_eq!(copies[0].id, copy_for(&message, &queue("x")).id, "a repeat collapses");
        assert_eq!(copies[1].details.published_id, Some(message.id));
    }
}
