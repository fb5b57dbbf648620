//! Values on their way into rows and out of them. No statement is run here but the chunked insert.

use std::time::Duration;

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Row, Sqlite, SqliteConnection};
use uuid::Uuid;

use crate::model::{Details, Head, MessageId, QueueName, Record, Tries};

use super::super::columns::{elapsed, nearest_priority, unreadable};

pub(super) use super::super::columns::{
    after, maybe_moment, micros, moment, nearest_moment, queue_name, resolve, span, state,
    waiting_state,
};

/// How long ago a moment was; nothing for one that is to come.
pub(super) fn since(moment: i64, now: i64) -> Duration {
    elapsed(now.saturating_sub(moment))
}

/// Numbers as a JSON list, for `json_each`: one bind and one statement for any length.
pub(super) fn list(numbers: impl IntoIterator<Item = i64>) -> String {
    let mut text = String::from("[");
    for number in numbers {
        if text.len() > 1 {
            text.push(',');
        }
        text.push_str(&number.to_string());
    }
    text.push(']');
    text
}

/// Rows of plain values as a JSON list, for `json_each`.
pub(super) fn json(rows: &[impl serde::Serialize]) -> String {
    serde_json::to_string(rows).expect("numbers and text are always JSON")
}

/// Bytes as text, for `unhex`.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An insert for 1, 16 and 64 rows: few texts, so that the statement cache keeps them all.
pub(super) type Insert = [(usize, &'static str); 3];

/// Makes an [`Insert`] from what comes before the rows, one row, and what comes after them.
macro_rules! insert {
    ($head:literal, $row:literal, $tail:literal) => {
        [
            (1, concat!($head, $row, $tail)),
            (16, concat!($head, four!(four!($row)), $tail)),
            (64, concat!($head, four!(four!(four!($row))), $tail)),
        ]
    };
}

macro_rules! four {
    ($row:expr) => {
        concat!($row, ",\n", $row, ",\n", $row, ",\n", $row)
    };
}

pub(super) use {four, insert};

/// A statement on its way to SQLite.
pub(super) type Statement = Query<'static, Sqlite, SqliteArguments>;

/// Inserts rows, as many with one statement as there is a statement for.
pub(super) async fn insert_all<R>(
    connection: &mut SqliteConnection,
    insert: &Insert,
    mut rows: &[R],
    bind: impl Fn(Statement, &R) -> Statement,
) -> sqlx::Result<()> {
    for (size, text) in insert.iter().rev() {
        while rows.len() >= *size {
            let (chunk, rest) = rows.split_at(*size);
            let statement = chunk.iter().fold(sqlx::query(*text), &bind);
            statement.execute(&mut *connection).await?;
            rows = rest;
        }
    }
    Ok(())
}

/// Reads a message's name.
pub(super) fn message_id(row: &SqliteRow) -> sqlx::Result<MessageId> {
    let bytes: &[u8] = row.try_get("id")?;
    let uuid = Uuid::from_slice(bytes).map_err(|_| unreadable("an id is no UUID"))?;
    Ok(MessageId(uuid))
}

/// A message's name, or no name at all where it cannot be read: for showing it, and for ending it.
pub(super) fn shown_id(row: &SqliteRow) -> MessageId {
    message_id(row).unwrap_or(MessageId(Uuid::nil()))
}

/// Reads how often a message was tried.
pub(super) fn tries(row: &SqliteRow) -> sqlx::Result<Tries> {
    Ok(Tries {
        attempts: row.try_get("attempts")?,
        failures: row.try_get("failures")?,
        crashes: row.try_get("crashes")?,
    })
}

/// Reads what never changes of a message, with the details as they stand there.
pub(super) fn head(row: &SqliteRow, queue: QueueName, details: Details) -> sqlx::Result<Head> {
    let rank: i64 = row.try_get("rank")?;
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

/// Reads a message without its payload, as far as it can be read: looking at a message is how a person
/// finds out what is wrong with it, while its lease makes it a dead letter. What is missing or unreadable
/// is left out, and what is out of range is shown as the nearest that is not.
pub(super) fn record(row: &SqliteRow) -> sqlx::Result<Record> {
    let text = |column| row.try_get::<Option<String>, _>(column).unwrap_or_default();
    let count = |column| -> sqlx::Result<u32> {
        Ok(u32::try_from(row.try_get::<i64, _>(column)?).unwrap_or(0))
    };
    let details = text("details").and_then(|details| serde_json::from_str(&details).ok());
    let size: i64 = row.try_get("size")?;
    Ok(Record {
        head: Head {
            id: shown_id(row),
            queue: queue_name(row.try_get("queue")?)?,
            kind: text("kind"),
            correlation_id: text("correlation_id"),
            details: details.unwrap_or_default(),
            priority: nearest_priority(row.try_get("rank")?),
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
pub(super) fn shown(rows: &[SqliteRow]) -> Vec<Record> {
    let show = |row| {
        record(row).inspect_err(|error| {
            tracing::error!(%error, "a message is left out of a list, because it cannot be read");
        })
    };
    rows.iter().filter_map(|row| show(row).ok()).collect()
}
