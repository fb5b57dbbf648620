//! Values as they stand in the columns of both databases: time in whole microseconds, names as text.

use std::time::Duration;

use jiff::Timestamp;

use crate::model::{QueueName, State, When};

/// The number under which messages are counted that wait for their turn in a group; that of no state.
pub(super) const BEHIND: i16 = 8;

/// The number of the queue to which keys of topics belong; that of none.
pub(super) const OF_TOPICS: i64 = 0;

/// When a key expires that counts as long as its message can be delivered.
pub(super) const WHILE_PENDING: i64 = -1;

/// A thousand years: it can be added to any time of day.
const LONGEST: i64 = 1000 * 366 * 86_400 * 1_000_000;

/// A moment as it stands in a row.
pub(super) fn micros(moment: Timestamp) -> i64 {
    moment.as_microsecond()
}

/// A duration as it stands in a row, at most a thousand years.
pub(super) fn span(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(LONGEST).min(LONGEST)
}

/// A duration that stands in a row; nothing for one that ends before it begins.
pub(super) fn elapsed(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

/// So long after a moment, at most the last moment there is.
pub(super) fn after(moment: i64, wait: Duration) -> i64 {
    moment.saturating_add(span(wait)).min(micros(Timestamp::MAX))
}

/// The moment that is meant by something said at `now`. What has passed counts as now.
pub(super) fn resolve(when: When, now: i64) -> i64 {
    match when {
        When::Now => now,
        When::In(wait) => after(now, wait),
        When::At(moment) => micros(moment).max(now),
    }
}

/// Whether a message that is due then is ready, or scheduled.
pub(super) fn waiting_state(due_at: i64, now: i64) -> State {
    if due_at <= now { State::Ready } else { State::Scheduled }
}

/// A random number of 62 bits, of which the tokens of one claim are made: each is this and its message's
/// number, added. So no two leases have the same, and asking the system for chance costs once for a claim.
pub(super) fn chance() -> sqlx::Result<i64> {
    let bits = getrandom::u64().map_err(|error| sqlx::Error::Io(std::io::Error::other(error)))?;
    Ok((bits >> 2).cast_signed())
}

/// Reads a moment.
pub(super) fn moment(micros: i64) -> sqlx::Result<Timestamp> {
    Timestamp::from_microsecond(micros).map_err(|_| unreadable("a time is out of range"))
}

/// Reads a moment that may be missing.
pub(super) fn maybe_moment(micros: Option<i64>) -> sqlx::Result<Option<Timestamp>> {
    micros.map(moment).transpose()
}

/// Reads a state.
pub(super) fn state(code: i64) -> sqlx::Result<State> {
    State::from_code(code).ok_or_else(|| unreadable(format!("there is no state {code}")))
}

/// Reads a queue's name.
pub(super) fn queue_name(text: &str) -> sqlx::Result<QueueName> {
    QueueName::parse(text).map_err(|_| unreadable("a queue's name is no name"))
}

/// The moment that stands in a row, or the one nearest to it where there is no such moment: for showing
/// rows that something else has written.
pub(super) fn nearest_moment(micros: i64) -> Timestamp {
    let end = if micros < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Timestamp::from_microsecond(micros).unwrap_or(end)
}

/// The priority that stands in a row with its sign turned, or the nearest there is.
pub(super) fn nearest_priority(rank: i64) -> i8 {
    let end = if rank > 0 { i8::MIN } else { i8::MAX };
    rank.checked_neg().and_then(|priority| i8::try_from(priority).ok()).unwrap_or(end)
}

/// An error for a value in the database that cannot be what this program wrote.
pub(super) fn unreadable(what: impl Into<String>) -> sqlx::Error {
    sqlx::Error::Decode(what.into().into())
}
