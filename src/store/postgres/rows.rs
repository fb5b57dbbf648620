//! Values on their way into rows and out of them. No statement is run here.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::Row;
use sqlx::postgres::PgRow;

use crate::model::{Details, Head, MessageId, QueueName, Record, State, Tries, When};

use super::fault::unreadable;

/// A moment as it stands in a row: whole microseconds.
pub(super) fn micros(moment: Timestamp) -> i64 {
    moment.as_microsecond()
}

/// A duration as it stands in a row, at most a thousand years: it can be added to any time of day.
pub(super) fn span(duration: Duration) -> i64 {
    const LONGEST: i64 = 1000 * 366 * 86_400 * 1_000_000;
    i64::try_from(duration.as_micros()).unwrap_or(LONGEST).min(LONGEST)
}

/// So long after a moment.
pub(super) fn after(moment: i64, wait: Duration) -> i64 {
    moment.saturating_add(span(wait)).min(micros(Timestamp::MAX))
}

/// A difference of two moments; nothing for one that is to come.
pub(super) fn elapsed(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
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

/// Reads a moment.
pub(super) fn moment(micros: i64) -> sqlx::Result<Timestamp> {
    Timestamp::from_microsecond(micros).map_err(|_| unreadable("a time is out of range"))
}

/// Reads a moment that may be missing.
pub(super) fn maybe_moment(micros: Option<i64>) -> sqlx::Result<Option<Timestamp>> {
    micros.map(moment).transpose()
}

/// Reads a message's name.
pub(super) fn message_id(row: &PgRow) -> sqlx::Result<MessageId> {
    row.try_get("id").map(MessageId)
}

/// Reads a state.
pub(super) fn state(code: i16) -> sqlx::Result<State> {
    State::from_code(code.into()).ok_or_else(|| unreadable(format!("there is no state {code}")))
}

/// Reads a queue's name.
pub(super) fn queue_name(text: &str) -> sqlx::Result<QueueName> {
    QueueName::parse(text).map_err(|_| unreadable("a queue's name is no name"))
}

/// Reads a count, which is never negative.
pub(super) fn count(row: &PgRow, column: &str) -> sqlx::Result<u32> {
    let count: i32 = row.try_get(column)?;
    u32::try_from(count).map_err(|_| unreadable("a count is negative"))
}

/// Reads how often a message was tried.
pub(super) fn tries(row: &PgRow) -> sqlx::Result<Tries> {
    Ok(Tries {
        attempts: count(row, "attempts")?,
        failures: count(row, "failures")?,
        crashes: count(row, "crashes")?,
    })
}

/// Reads what never changes of a message, with the details as they stand there.
pub(super) fn head(row: &PgRow, queue: QueueName, details: Details) -> sqlx::Result<Head> {
    let rank: i16 = row.try_get("rank")?;
    let priority = i8::try_from(-rank).map_err(|_| unreadable("a priority is out of range"))?;
    Ok(Head {
        id: message_id(row)?,
        queue,
        kind: row.try_get("kind")?,
        correlation_id: row.try_get("correlation_id")?,
        details,
        priority,
        enqueued_at: moment(row.try_get("enqueued_at")?)?,
        expires_at: maybe_moment(row.try_get("expires_at")?)?,
    })
}

/// The columns and tables from which [`record`] reads, for the numbers that a statement finds. Lives on:
/// the primary keys of message, queue, content, lease and scheduled, one look for each number.
macro_rules! records {
    ($found:expr) => {
        concat!(
            "\
select message.seq, message.id, queue.name as queue, message.rank, message.due_at, message.enqueued_at,
    message.expires_at, message.finished_at, message.size, message.failures, message.crashes,
    message.reason, content.kind, content.correlation_id, content.details,
    coalesce(lease.attempt, message.attempts) as attempts, stand.state
from (",
            $found,
            ") as found
cross join lateral (select * from message where message.seq = found.seq limit 1) as message
join queue on queue.id = message.queue_id
cross join lateral (
    select kind, correlation_id, details
    from content
    where content.seq = found.seq
    limit 1
) as content
left join lateral (
    select attempt
    from lease
    where lease.seq = found.seq
    limit 1
) as lease on true
left join lateral (
    select true as there
    from scheduled
    where scheduled.due_at = message.due_at
        and scheduled.seq = message.seq
    limit 1
) as scheduled on true
cross join lateral (
    select (case
        when message.state <> 0 then message.state
        when lease.attempt is not null then 2
        when scheduled.there then 1
        else 0
    end)::smallint as state
) as stand\n"
        )
    };
}

pub(super) use records;

/// Reads a message without its payload. Details that cannot be read are left out here, because looking
/// at a message is how a person finds out; its lease makes it a dead letter.
pub(super) fn record(row: &PgRow) -> sqlx::Result<Record> {
    let queue = queue_name(row.try_get("queue")?)?;
    let details: &str = row.try_get("details")?;
    let details = serde_json::from_str(details).unwrap_or_default();
    let size: i64 = row.try_get("size")?;
    Ok(Record {
        head: head(row, queue, details)?,
        state: state(row.try_get("state")?)?,
        deliver_at: moment(row.try_get("due_at")?)?,
        finished_at: maybe_moment(row.try_get("finished_at")?)?,
        tries: tries(row)?,
        reason: row.try_get("reason")?,
        size: u64::try_from(size).unwrap_or(0),
    })
}
