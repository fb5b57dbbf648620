//! Values on their way into rows and out of them. No statement is run here.

use sqlx::Row;
use sqlx::postgres::PgRow;

use crate::model::{Details, Head, MessageId, QueueName, Record, State, Tries};

use super::super::columns::{self, nearest_moment, nearest_priority, unreadable};

pub(super) use super::super::columns::{
    chance, elapsed, maybe_moment, micros, moment, queue_name, resolve, span, waiting_state,
};

/// Reads a message's name.
pub(super) fn message_id(row: &PgRow) -> sqlx::Result<MessageId> {
    row.try_get("id").map(MessageId)
}

/// Reads a state.
pub(super) fn state(code: i16) -> sqlx::Result<State> {
    columns::state(code.into())
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
    let priority = rank.checked_neg().and_then(|priority| i8::try_from(priority).ok());
    let priority = priority.ok_or_else(|| unreadable("a priority is out of range"))?;
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
left join lateral (
    select kind, correlation_id, details
    from content
    where content.seq = found.seq
    limit 1
) as content on true
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

/// Reads a message without its payload, as far as it can be read: looking at a message is how a person
/// finds out what is wrong with it, while its lease makes it a dead letter. What is missing or unreadable
/// is left out, and what is out of range is shown as the nearest that is not.
pub(super) fn record(row: &PgRow) -> sqlx::Result<Record> {
    let text = |column| row.try_get::<Option<String>, _>(column).unwrap_or_default();
    let count = |column| -> sqlx::Result<u32> {
        Ok(u32::try_from(row.try_get::<i32, _>(column)?).unwrap_or(0))
    };
    let details = text("details").and_then(|details| serde_json::from_str(&details).ok());
    let size: i64 = row.try_get("size")?;
    Ok(Record {
        head: Head {
            id: message_id(row)?,
            queue: queue_name(row.try_get("queue")?)?,
            kind: text("kind"),
            correlation_id: text("correlation_id"),
            details: details.unwrap_or_default(),
            priority: nearest_priority(row.try_get::<i16, _>("rank")?.into()),
            enqueued_at: nearest_moment(row.try_get("enqueued_at")?),
            expires_at: row.try_get::<Option<i64>, _>("expires_at")?.map(nearest_moment),
        },
        state: state(row.try_get("state")?)?,
        deliver_at: nearest_moment(row.try_get("due_at")?),
        finished_at: row.try_get::<Option<i64>, _>("finished_at")?.map(nearest_moment),
        tries: Tries {
            attempts: count("attempts")?,
            failures: count("failures")?,
            crashes: count("crashes")?,
        },
        reason: text("reason"),
        size: u64::try_from(size).unwrap_or(0),
    })
}

/// The messages of a list. One that cannot be shown at all does not hide the others.
pub(super) fn shown(rows: &[PgRow]) -> Vec<Record> {
    let show = |row| {
        record(row).inspect_err(|error| {
            tracing::error!(%error, "a message is left out of a list, because it cannot be read");
        })
    };
    rows.iter().filter_map(|row| show(row).ok()).collect()
}
