//! A message, as sent and as kept.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use url::Url;
use uuid::Uuid;

use super::{Attribute, Destination, Invalid, QueueName, State};

/// The lowest priority a message can have.
pub const PRIORITY_MIN: i8 = -100;
/// The highest priority; higher goes first, 0 is the default.
pub const PRIORITY_MAX: i8 = 100;
/// The longest delay before a delivery or an expiry: a year.
pub const DELAY_MAX: Duration = Duration::from_secs(366 * 86_400);
/// The most bytes in a type, a correlation id or a causation id.
pub const TEXT_MAX: usize = 255;
/// The most bytes in an idempotency key.
pub const IDEMPOTENCY_KEY_MAX: usize = 255;

/// The name of one message, for ever: a UUIDv7 (RFC 9562). It stays the same over all attempts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MessageId(pub Uuid);

impl MessageId {
    /// A new id that sorts after those made before it in this process.
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id of what is sent at this position while the message `parent` is handled: always the same, and nobody
    /// else's. It sorts beside its parent.
    pub fn child(parent: Self, position: usize) -> Self {
        let position = (position as u64).to_be_bytes();
        Self::derived(parent, b"pumphouse: sent while handled", &position)
    }

    /// An id that follows from another one, of which it has the time, and from what it is.
    fn derived(from: Self, why: &[u8], what: &[u8]) -> Self {
        let mut hash = Sha256::new();
        hash.update(why);
        hash.update(from.0.as_bytes());
        hash.update(what);
        let digest: [u8; 32] = hash.finalize().into();
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&from.0.as_bytes()[..6]); // the time of a version 7
        bytes[6..].copy_from_slice(&digest[..10]);
        Self(
            uuid::Builder::from_custom_bytes(bytes)
                .with_version(uuid::Version::SortRand)
                .into_uuid(),
        )
    }

    /// The id of the copy that a queue gets of what was published under this id: always the same, and nobody else's.
    /// It sorts beside what was published.
    pub fn copy(published: Self, queue: &QueueName) -> Self {
        Self::derived(published, b"pumphouse: copy for a queue", queue.as_str().as_bytes())
    }

    /// The id of what a schedule sends when it is due at this moment: always the same, and nobody else's.
    pub fn scheduled(schedule: &str, due: Timestamp) -> Self {
        let micros = due.as_microsecond();
        let mut time = [0; 16];
        time[..6].copy_from_slice(&(micros / 1000).to_be_bytes()[2..]); // that of a version 7
        let what = [&micros.to_be_bytes(), schedule.as_bytes()].concat();
        Self::derived(Self(Uuid::from_bytes(time)), b"pumphouse: sent by a schedule", &what)
    }

    /// Reads an id as the API writes it.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let wrong = |_| Invalid::new("id", "a message id is a UUID");
        Uuid::try_parse(text).map(Self).map_err(wrong)
    }
}

impl Default for MessageId {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// When something is to happen, by the database's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum When {
    /// At once.
    #[default]
    Now,
    /// So long after the message was taken in.
    In(Duration),
    /// At a moment; one that has passed counts as now.
    At(Timestamp),
}

/// A message on its way in: what the sender said, checked.
///
/// Its id is chosen before it is stored, so that a handler's repeat can collapse onto the first one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMessage {
    /// Its name from now on.
    pub id: MessageId,
    /// Where it is to go.
    pub to: Destination,
    /// What it is about, for filters and for `ce-type`.
    pub kind: Option<String>,
    /// What conversation it belongs to.
    pub correlation_id: Option<String>,
    /// The rest of the metadata.
    pub details: Details,
    /// The payload, byte for byte.
    pub body: Bytes,
    /// When it is to be delivered, at the earliest.
    pub deliver: When,
    /// When it is no longer worth delivering; `None` for never.
    pub expires: Option<When>,
    /// [`PRIORITY_MIN`] to [`PRIORITY_MAX`], higher first.
    pub priority: i8,
    /// The keys under which a repeat is recognised: at most its own, its batch's, and one that counts while it is pending.
    pub keys: Vec<Idempotency>,
}

impl NewMessage {
    /// A message with nothing but a payload, due now.
    pub fn new(to: impl Into<Destination>, body: impl Into<Bytes>) -> Self {
        Self {
            id: MessageId::new(),
            to: to.into(),
            kind: None,
            correlation_id: None,
            details: Details::default(),
            body: body.into(),
            deliver: When::Now,
            expires: None,
            priority: 0,
            keys: Vec::new(),
        }
    }
}

/// Metadata that is kept and delivered.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Details {
    /// The payload's media type, as the sender gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// Headers to send on to the handler, names in lower case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub headers: Vec<(String, String)>,
    /// The message that caused this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causation_id: Option<String>,
    /// The key of those of its queue that are delivered one at a time and in order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// On whose behalf it was sent: those who wait take turns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fairness_key: Option<String>,
    /// The attributes and extensions of a CloudEvent, by name; empty for a message that is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub event: Vec<(String, Attribute)>,
    /// Under which id it was published, if it is a copy of what was published to a topic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub published_id: Option<MessageId>,
    /// The queue to which the handler's answer goes, with its ack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply_to: Option<QueueName>,
    /// Where it is to be delivered, if its queue sends each message where that says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<Url>,
    /// W3C trace context of the sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// W3C trace state of the sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
    /// W3C baggage of the sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baggage: Option<String>,
}

impl Details {
    /// Where a message stands among those that take turns: 0 without a fairness key, else 31 bits of its SHA-256.
    /// Two keys with the same number share their turns.
    pub fn lane(&self) -> u32 {
        self.fairness_key.as_deref().map_or(0, |key| (first_bits(key) as u32 & 0x7fff_ffff).max(1))
    }

    /// See [`group_number`].
    pub fn group_number(&self) -> Option<i64> {
        self.group.as_deref().map(group_number)
    }
}

/// A group in 64 bits of its SHA-256. Two groups with the same number are one.
pub fn group_number(group: &str) -> i64 {
    first_bits(group).cast_signed()
}

fn first_bits(key: &str) -> u64 {
    let digest: [u8; 32] = Sha256::digest(key).into();
    u64::from_be_bytes(digest[..8].try_into().expect("a digest has more than eight bytes"))
}

/// A key under which a repeated request is recognised, with a fingerprint of that request.
///
/// Follows the IETF draft *The Idempotency-Key HTTP Header Field*: same key and same fingerprint is a
/// repeat, same key and another fingerprint is a mistake of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Idempotency {
    /// 128 bits of SHA-256 over scope and key.
    pub key: [u8; 16],
    /// SHA-256 over what makes the request the same: body, content type, options.
    pub fingerprint: [u8; 32],
    /// How long it counts.
    pub lasts: Lasts,
}

/// How long a key counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lasts {
    /// For its queue's `dedup_window`, and as long as its message can be delivered or is dead.
    Window,
    /// As long as its message can be delivered.
    WhilePending,
}

impl Idempotency {
    /// The key `key` in `scope` (a message's, a batch's, a batch item's) for a request with this fingerprint.
    pub fn new(scope: &str, key: &str, fingerprint: [u8; 32]) -> Self {
        let mut hash = Sha256::new();
        hash.update((scope.len() as u64).to_be_bytes());
        hash.update(scope);
        hash.update(key);
        let digest: [u8; 32] = hash.finalize().into();
        let mut short = [0; 16];
        short.copy_from_slice(&digest[..16]);
        Self { key: short, fingerprint, lasts: Lasts::Window }
    }

    /// A key of which there is one message at a time that can still be delivered, whatever else it is.
    pub fn while_pending(key: &str) -> Self {
        Self { lasts: Lasts::WhilePending, ..Self::new("while-pending", key, [0; 32]) }
    }
}

/// A message as a handler gets it.
#[derive(Debug, Clone)]
pub struct Message {
    /// Everything but the payload.
    pub head: Head,
    /// The payload, byte for byte as it was sent.
    pub body: Bytes,
}

/// What is known of a message for all its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Its name.
    pub id: MessageId,
    /// Where it waits.
    pub queue: QueueName,
    /// What it is about.
    pub kind: Option<String>,
    /// What conversation it belongs to.
    pub correlation_id: Option<String>,
    /// The rest of the metadata.
    pub details: Details,
    /// Higher goes first.
    pub priority: i8,
    /// When it was committed, by the database's clock.
    pub enqueued_at: Timestamp,
    /// When it stops being worth a delivery.
    pub expires_at: Option<Timestamp>,
}

/// How often a message was tried. All three only grow, but for a redrive, which starts the budgets anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tries {
    /// Leases taken: the number of the latest attempt, counted when its lease is taken.
    pub attempts: u32,
    /// Deliveries that failed; against `recovery.max_attempts`.
    pub failures: u32,
    /// Leases that ran out with nobody answering for them; against `recovery.max_crashes`.
    pub crashes: u32,
}

/// A message as the store knows it, without its payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// What never changes.
    pub head: Head,
    /// Where it stands.
    pub state: State,
    /// When it is due, or was.
    pub deliver_at: Timestamp,
    /// When it reached a state that ends it.
    pub finished_at: Option<Timestamp>,
    /// How often it was tried.
    pub tries: Tries,
    /// Why it is dead, discarded or cancelled, in a sentence.
    pub reason: Option<String>,
    /// The payload's length in bytes.
    pub size: u64,
}
