//! Names, parsed once at the door.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Invalid;

/// The name of a queue: `[a-z0-9][a-z0-9._-]{0,79}`.
///
/// Cheap to clone. [`QueueName::parse`] is the only way in, so a name that exists is a good one.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct QueueName(Arc<str>);

/// The name of a replica, one process of this service: the same alphabet as a queue's name.
///
/// It stands in every delivery's record and in the header `Pumphouse-Replica`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ReplicaName(Arc<str>);

/// The name of a topic: the same alphabet as a queue's name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TopicName(Arc<str>);

/// The name of a subscription to a topic: the same alphabet as a queue's name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SubscriptionName(Arc<str>);

/// The name of a schedule: the same alphabet as a queue's name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ScheduleName(Arc<str>);

impl QueueName {
    /// Parses a queue's name; fails with what is allowed.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        parse("queue", text).map(Self)
    }
}

impl TopicName {
    /// Parses a topic's name; fails with what is allowed.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        parse("topic", text).map(Self)
    }
}

impl SubscriptionName {
    /// Parses a subscription's name; fails with what is allowed.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        parse("subscription", text).map(Self)
    }
}

impl ScheduleName {
    /// Parses a schedule's name; fails with what is allowed.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        parse("schedule", text).map(Self)
    }
}

impl ReplicaName {
    /// Parses a replica's name; fails with what is allowed.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        parse("replica", text).map(Self)
    }
}

fn parse(what: &str, text: &str) -> Result<Arc<str>, Invalid> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let good = text.len() <= 80
        && text.bytes().next().is_some_and(plain)
        && text.bytes().all(|byte| plain(byte) || matches!(byte, b'.' | b'_' | b'-'));
    if good {
        return Ok(text.into());
    }
    let rule = "1 to 80 characters a-z, 0-9, '.', '_' or '-', starting with a letter or digit";
    Err(Invalid::new(what, format!("a {what} name is {rule}")))
}

macro_rules! text_name {
    ($name:ident) => {
        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl TryFrom<String> for $name {
            type Error = Invalid;

            fn try_from(text: String) -> Result<Self, Invalid> {
                Self::parse(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }
    };
}

text_name!(QueueName);
text_name!(ReplicaName);
text_name!(TopicName);
text_name!(SubscriptionName);
text_name!(ScheduleName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_the_protocol_says() {
        for good in ["a", "0", "emails", "e.mails_2-x", &"a".repeat(80)] {
            assert!(QueueName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".a", "-a", "A", "a b", "ä", "a/b", "a\n", &"a".repeat(81)] {
            assert!(QueueName::parse(bad).is_err(), "{bad:?}");
        }
    }
}
