//! Values on their way into rows and out of them. No statement is run here but the chunked insert.

use std::time::Duration;

use jiff::Timestamp;
use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{Row, Sqlite, SqliteConnection};
use uuid::Uuid;

use crate::model::{Details, Head, MessageId, QueueName, Record, State, Tries, When};

use super::fault::unreadable;

/// A moment as it stands in a row: whole microseconds.
pub(super) fn micros(moment: Timestamp) -> i64 {
    moment.as_microsecond()
}

/// A duration as it stands in a row; longer than any clock lives is as long as it gets.
pub(super) fn span(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// So long after a moment, at most the last moment there is.
pub(super) fn after(moment: i64, wait: Duration) -> i64 {
    moment.saturating_add(span(wait)).min(micros(Timestamp::MAX))
}

/// How long ago a moment was; nothing for one that is to come.
pub(super) fn since(moment: i64, now: i64) -> Duration {
    Duration::from_micros(u64::try_from(now.saturating_sub(moment)).unwrap_or(0))
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

/// Reads a moment.
pub(super) fn moment(micros: i64) -> sqlx::Result<Timestamp> {
    Timestamp::from_microsecond(micros).map_err(|_| unreadable("a time is out of range"))
}

/// Reads a moment that may be missing.
pub(super) fn maybe_moment(micros: Option<i64>) -> sqlx::Result<Option<Timestamp>> {
    micros.map(moment).transpose()
}

/// Reads a message's name.
pub(super) fn message_id(row: &SqliteRow) -> sqlx::Result<MessageId> {
    let bytes: &[u8] = row.try_get("id")?;
    let uuid = Uuid::from_slice(bytes).map_err(|_| unreadable("an id is no UUID"))?;
    Ok(MessageId(uuid))
}

/// Reads a state.
pub(super) fn state(code: i64) -> sqlx::Result<State> {
    State::from_code(code).ok_or_else(|| unreadable(format!("there is no state {code}")))
}

/// Reads a queue's name.
pub(super) fn queue_name(text: &str) -> sqlx::Result<QueueName> {
    QueueName::parse(text).map_err(|_| unreadable("a queue's name is no name"))
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

/// Reads a message without its payload. Details that cannot be read are left out here, because looking
/// at a message is how a person finds out; its lease makes it a dead letter.
pub(super) fn record(row: &SqliteRow) -> sqlx::Result<Record> {
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
