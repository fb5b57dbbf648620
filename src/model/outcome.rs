//! Verdict (what a handler says), failure (what went wrong), settlement (what will be written).

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Invalid, NewMessage, QueueName, ReplicaName};

/// How much of a handler's answer is kept with its delivery: the first 4 KiB.
pub const ANSWER_KEPT: usize = 4096;

/// How many headers of an answer a rule can ask for: the first 64.
pub const ANSWER_HEADERS_KEPT: usize = 64;

/// What a handler says of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Done; never deliver it again.
    Ack,
    /// Not now. Counts as a failure, goes by the queue's recovery, and not before `after` if that is given.
    Retry {
        /// The shortest wait the handler wants.
        after: Option<Duration>,
    },
    /// Never; set it aside for a person to look at.
    DeadLetter {
        /// Why, in a sentence.
        reason: String,
    },
    /// Never, and nobody needs to look at it.
    Discard {
        /// Why, in a sentence.
        reason: String,
    },
}

/// A verdict, and what the handler said with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What to do.
    pub verdict: Verdict,
    /// The HTTP status, where there was one.
    pub status: Option<u16>,
    /// The first [`ANSWER_KEPT`] bytes of what it said.
    pub excerpt: Bytes,
    /// What it wants to be sent: together with the ack, or not at all.
    pub sent: Vec<NewMessage>,
    /// What goes to the queue that the message names for answers, with an ack.
    pub reply: Reply,
}

/// An answer as a payload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reply {
    /// Its media type, if it has one.
    pub content_type: Option<String>,
    /// Byte for byte; empty for an answer that says nothing but ack.
    pub body: Bytes,
}

impl From<Verdict> for Answer {
    fn from(verdict: Verdict) -> Self {
        Self {
            verdict,
            status: None,
            excerpt: Bytes::new(),
            sent: Vec::new(),
            reply: Reply::default(),
        }
    }
}

/// A delivery that brought no verdict. The queue's recovery decides what follows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {detail}")]
pub struct Failure {
    /// What sort of failure.
    pub kind: ErrorKind,
    /// What happened, for a person; no bodies, no secrets.
    pub detail: String,
    /// The HTTP status, where there was one.
    pub status: Option<u16>,
    /// What the handler asked for with `Retry-After`.
    pub retry_after: Option<Duration>,
    /// The headers of its answer, by their names in lower case, as far as rules can ask for them: at most
    /// [`ANSWER_HEADERS_KEPT`].
    pub headers: BTreeMap<String, String>,
    /// The first [`ANSWER_KEPT`] bytes of what it said.
    pub excerpt: Bytes,
}

impl Failure {
    /// A failure without an answer.
    pub fn new(kind: ErrorKind, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        let (headers, excerpt) = (BTreeMap::new(), Bytes::new());
        Self { kind, detail, status: None, retry_after: None, headers, excerpt }
    }
}

/// The sorts of failure, as the API names them in `error_kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The handler's name could not be resolved.
    Dns,
    /// No connection came about.
    Connect,
    /// The TLS handshake failed.
    Tls,
    /// The deadline over the whole exchange passed.
    Timeout,
    /// The connection broke before the answer was whole.
    Reset,
    /// The handler answered with a status that is no success.
    Status,
    /// The answer was larger than is read.
    TooLarge,
    /// The answer was not what its headers said.
    Malformed,
    /// The handler in this process panicked.
    Panic,
    /// The pump cut the delivery: an abort, or the end of a drain.
    Cancelled,
    /// The handler's address is one that is never called.
    AddressRefused,
    /// The lease ran out, and nobody answered for the attempt.
    LeaseLost,
    /// The handler in this process returned an error.
    Handler,
}

impl ErrorKind {
    /// Every sort there is.
    pub const ALL: [Self; 13] = [
        Self::Dns,
        Self::Connect,
        Self::Tls,
        Self::Timeout,
        Self::Reset,
        Self::Status,
        Self::TooLarge,
        Self::Malformed,
        Self::Panic,
        Self::Cancelled,
        Self::AddressRefused,
        Self::LeaseLost,
        Self::Handler,
    ];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::Status => "status",
            Self::TooLarge => "too_large",
            Self::Malformed => "malformed",
            Self::Panic => "panic",
            Self::Cancelled => "cancelled",
            Self::AddressRefused => "address_refused",
            Self::LeaseLost => "lease_lost",
            Self::Handler => "handler",
        }
    }

    /// Reads the word; fails with all the words there are.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
            let words = Self::ALL.map(Self::as_str).join(", ");
            Invalid::new("error_kind", format!("an error kind is one of {words}"))
        })
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What will be written about a leased message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settlement {
    /// Completed.
    Ack,
    /// Failed; due again after this long. Counts a failure.
    Retry {
        /// Zero for at once.
        after: Duration,
    },
    /// Due again after this long, nothing counted: the delivery was made to see whether the handler is well.
    Postpone {
        /// Behind what is due before.
        after: Duration,
    },
    /// Dead. Counts a failure.
    DeadLetter {
        /// Why, in a sentence.
        reason: String,
    },
    /// Discarded.
    Discard {
        /// Why, in a sentence.
        reason: String,
    },
    /// Ready in another queue, under the same id, with budgets that start anew. Where there is no such queue
    /// any more: dead.
    Move {
        /// Which one.
        to_queue: QueueName,
        /// Why, in a sentence.
        reason: String,
    },
    /// Ready again, nothing counted: the attempt was cut or never started.
    Release,
}

/// How a delivery ended, as its record and the metric `deliveries_total` say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Acknowledged.
    Acked,
    /// Failed, to be tried again.
    Failed,
    /// Failed while an ill handler was tried; counts as no failure.
    Postponed,
    /// Failed for good or refused; the message is dead.
    DeadLettered,
    /// The handler, or a rule, said to drop it.
    Discarded,
    /// Given to another queue.
    Moved,
    /// Cut by the pump; counts as no failure.
    Released,
    /// The lease ran out before an answer was written.
    LeaseLost,
}

impl Outcome {
    /// Every way a delivery can end.
    pub const ALL: [Self; 8] = [
        Self::Acked,
        Self::Failed,
        Self::Postponed,
        Self::DeadLettered,
        Self::Discarded,
        Self::Moved,
        Self::Released,
        Self::LeaseLost,
    ];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Acked => "acked",
            Self::Failed => "failed",
            Self::Postponed => "postponed",
            Self::DeadLettered => "dead_lettered",
            Self::Discarded => "discarded",
            Self::Moved => "moved",
            Self::Released => "released",
            Self::LeaseLost => "lease_lost",
        }
    }

    /// Reads the word, if it is one.
    pub fn from_text(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.as_str() == text)
    }
}

impl From<&Settlement> for Outcome {
    fn from(settlement: &Settlement) -> Self {
        match settlement {
            Settlement::Ack => Self::Acked,
            Settlement::Retry { .. } => Self::Failed,
            Settlement::Postpone { .. } => Self::Postponed,
            Settlement::DeadLetter { .. } => Self::DeadLettered,
            Settlement::Discard { .. } => Self::Discarded,
            Settlement::Move { .. } => Self::Moved,
            Settlement::Release => Self::Released,
        }
    }
}

/// How many deliveries of a message are remembered: those with the latest numbers.
pub const DELIVERIES_KEPT: u32 = 100;

/// One delivery as it is remembered, written in the transaction that settles it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeliveryRecord {
    /// The attempt's number: never used twice for a message.
    pub number: u32,
    /// Which process delivered it.
    pub replica: ReplicaName,
    /// When it started. By the clock of the replica, for a person to read; nothing is decided by it.
    pub started_at: Timestamp,
    /// How long it took.
    pub duration: Duration,
    /// How it ended.
    pub outcome: Outcome,
    /// The HTTP status, where there was one.
    pub status: Option<u16>,
    /// What went wrong, where something did.
    pub error_kind: Option<ErrorKind>,
    /// The same in a sentence.
    pub error: Option<String>,
    /// The first [`ANSWER_KEPT`] bytes of the answer.
    pub answer: Bytes,
}
