//! A claim on a message, for a time, with a fencing token.

use std::fmt;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;

use super::{Head, Message, MessageId, NewMessage, QueueName, Tries};

/// A number that fences a lease: it changes at every claim and is never reused. It is made of 62 random bits, one
/// such number for each claim, and the message's own number; so it cannot be guessed, but by whoever knows the
/// token of another message of the same claim.
///
/// Random, and not the attempt's number: a number could come again after a crash of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token(pub i64);

/// A lease as somebody outside of this program shows it: the message's number and the token, in 22 characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// The message's number in its store.
    pub seq: i64,
    /// What a settlement must show.
    pub token: Token,
}

impl Ticket {
    /// Reads a ticket; `None` for what is none.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; 16] = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok()?;
        let (seq, token) = bytes.split_at(8);
        let number = |half: &[u8]| Some(i64::from_be_bytes(half.try_into().ok()?));
        Some(Self { seq: number(seq)?, token: Token(number(token)?) })
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = [self.seq.to_be_bytes(), self.token.0.to_be_bytes()].concat();
        f.write_str(&BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }
}

/// What there is to know of a message that somebody outside of this program holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    /// The message, without its payload.
    pub head: Head,
    /// How often it was tried; `tries.attempts` is the number of the attempt that it is held for.
    pub tries: Tries,
    /// When it was leased, and the time now, by the store's clock.
    pub leased_at: Timestamp,
    /// See there.
    pub now: Timestamp,
}

/// The right to deliver and settle one message, until it runs out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The message's number in its store; it means nothing outside.
    pub seq: i64,
    /// The message's name.
    pub id: MessageId,
    /// What a settlement must show.
    pub token: Token,
    /// When it runs out at the latest, by this process' own monotonic clock.
    ///
    /// Taken before the claim was sent, so that it errs on the safe side. The database's clock decides.
    pub until: Instant,
}

impl From<&Lease> for Ticket {
    fn from(lease: &Lease) -> Self {
        Self { seq: lease.seq, token: lease.token }
    }
}

impl Lease {
    /// How much of it is left at `now`; zero once it has run out.
    pub fn left(&self, now: Instant) -> Duration {
        self.until.saturating_duration_since(now)
    }
}

/// A message with the lease on it, as a store hands it over.
#[derive(Debug, Clone)]
pub struct Leased {
    /// The right to settle it.
    pub lease: Lease,
    /// The message with its payload.
    pub message: Message,
    /// How often it was tried; `tries.attempts` is the number of the attempt that this lease is for.
    pub tries: Tries,
    /// When it was due: queue wait is counted from here.
    pub due_at: Timestamp,
    /// The database's time at the claim; with `due_at` it gives the wait by one clock.
    pub leased_at: Timestamp,
}

impl Leased {
    /// A new message, due now, with the lease that was stored together with it.
    pub fn from_new(
        message: &NewMessage,
        queue: &QueueName,
        lease: Lease,
        now: Timestamp,
        expires_at: Option<Timestamp>,
    ) -> Self {
        let head = Head {
            id: message.id,
            queue: queue.clone(),
            kind: message.kind.clone(),
            correlation_id: message.correlation_id.clone(),
            details: message.details.clone(),
            priority: message.priority,
            enqueued_at: now,
            expires_at,
        };
        Self {
            lease,
            message: Message { head, body: message.body.clone() }, // shares the bytes
            tries: Tries { attempts: 1, failures: 0, crashes: 0 },
            due_at: now,
            leased_at: now,
        }
    }
}
