//! A place for a message with somebody who takes it as soon as it is committed, and the lease that it is stored with.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::model::{Lease, Leased, NewMessage, QueueName, ReplicaName, Token};

use super::columns::after;
use super::{Handover, Taker};

/// A place that is kept for a message until it is handed over; dropped before that, it is given back.
#[derive(Debug)]
pub(super) struct Place {
    taker: Option<Arc<dyn Taker>>,
    /// In whose name, and for how long, the message is leased: as it was when the place was kept.
    pub(super) replica: ReplicaName,
    pub(super) duration: Duration,
}

impl Place {
    /// Keeps a place for one message of a queue, if somebody has one.
    pub(super) fn keep(handover: &Handover, queue: &QueueName) -> Option<Self> {
        let taker = handover.taker(queue).filter(|taker| taker.reserve())?;
        let (replica, duration) = taker.terms();
        Some(Self { taker: Some(taker), replica, duration })
    }

    /// Hands a message over that is committed. **Fails** where nobody takes it any more.
    pub(super) fn hand(mut self, leased: Leased) -> Result<(), Box<Leased>> {
        self.taker.take().expect("a place is used once").take(leased)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(taker) = self.taker.take() {
            taker.give_back();
        }
    }
}

/// A lease with which a new message is stored, because somebody has a place for it.
#[derive(Debug)]
pub(super) struct NewLease {
    pub(super) place: Place,
    pub(super) incarnation: i64,
    /// What its token is made of, together with the message's number.
    pub(super) chance: i64,
    /// By the clock of the database and by that of this process.
    pub(super) until: (i64, Instant),
}

impl NewLease {
    /// A lease in this place; `now` is the same moment by both clocks, or by the second shortly before.
    pub(super) fn new(
        place: Place,
        incarnation: impl FnOnce(&ReplicaName) -> i64,
        chance: i64,
        now: (i64, Instant),
    ) -> Self {
        Self {
            incarnation: incarnation(&place.replica),
            chance,
            until: (after(now.0, place.duration), now.1 + place.duration),
            place,
        }
    }

    pub(super) fn token(&self, seq: i64) -> Token {
        Token(self.chance + seq)
    }

    /// The message as it goes to its place.
    pub(super) fn handed(
        self,
        seq: i64,
        (queue, message): (&QueueName, &NewMessage),
        now: Timestamp,
        expires_at: Option<Timestamp>,
    ) -> (Place, Leased) {
        let token = self.token(seq);
        let lease = Lease { seq, id: message.id, token, until: self.until.1 };
        (self.place, Leased::from_new(message, queue, lease, now, expires_at))
    }
}
