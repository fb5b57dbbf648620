//! Values on their way into rows and out of them. No statement is run here but the chunked insert.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteRow};
use sqlx::{AssertSqlSafe, Row, Sqlite, SqliteConnection};
use uuid::Uuid;

use crate::model::{Head, MessageId, Record, Tries};

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

/// Inserts into one table or several that go together, for any number of rows. Each size is a text of its
/// own, made once and prepared once, because every execution is a trip to another thread and back.
pub(super) struct Insert {
    tables: &'static [Rows],
    texts: [OnceLock<Arc<str>>; SIZES.len()],
}

/// An insert into one table: what comes before the rows, one row, and what comes after them.
pub(super) struct Rows {
    pub(super) head: &'static str,
    pub(super) row: &'static str,
    pub(super) tail: &'static str,
}

/// For how many rows there are texts: every number up to that of usual transactions, and then a few.
const SIZES: [usize; 67] = {
    let mut sizes = [0; 67];
    let mut at = 0;
    while at < 64 {
        sizes[at] = at + 1;
        at += 1;
    }
    (sizes[64], sizes[65], sizes[66]) = (128, 256, 512);
    sizes
};

impl Insert {
    pub(super) const fn into(tables: &'static [Rows]) -> Self {
        Self { tables, texts: [const { OnceLock::new() }; SIZES.len()] }
    }

    /// The texts with one row each, one for each table, for the test that looks at plans.
    pub(super) fn statements(&self) -> impl Iterator<Item = &'static str> + use<> {
        let one = |table: &Rows| -> &'static str {
            format!("{}{}{}", table.head, table.row, table.tail).leak()
        };
        self.tables.iter().map(one).collect::<Vec<_>>().into_iter()
    }

    /// Inserts all, with as few executions as there are sizes for. `bind` has a function for each table.
    pub(super) async fn all<R>(
        &self,
        connection: &mut SqliteConnection,
        mut rows: &[R],
        bind: &[fn(Statement, &R) -> Statement],
    ) -> sqlx::Result<()> {
        while !rows.is_empty() {
            let fitting = SIZES.iter().rposition(|size| *size <= rows.len());
            let size = fitting.expect("one of the sizes is one");
            let (now, rest) = rows.split_at(SIZES[size]);
            let mut statement = sqlx::query(AssertSqlSafe(self.text(size)));
            for bind in bind {
                statement = now.iter().fold(statement, bind);
            }
            statement.execute(&mut *connection).await?;
            rows = rest;
        }
        Ok(())
    }

    fn text(&self, size: usize) -> Arc<str> {
        let made = self.texts[size].get_or_init(|| {
            let text = |table: &Rows| {
                let rows = vec![table.row; SIZES[size]].join(",\n");
                format!("{}{rows}{}", table.head, table.tail)
            };
            self.tables.iter().map(text).collect::<Vec<_>>().join(";\n").into()
        });
        Arc::clone(made)
    }
}

/// A statement on its way to SQLite.
pub(super) type Statement = Query<'static, Sqlite, SqliteArguments>;

/// Reads a message's name.
pub(super) fn message_id(row: &SqliteRow) -> sqlx::Result<MessageId> {
    let bytes: &[u8] = row.try_get("id")?;
    let uuid = Uuid::from_slice(bytes).map_err(|_| unreadable("an id is no UUID"))?;
    Ok(MessageId(uuid))
}

/// Reads a message's name from the text that `hex` makes of it.
pub(super) fn message_id_of_hex(text: &str) -> sqlx::Result<MessageId> {
    let uuid = Uuid::try_parse(text).map_err(|_| unreadable("an id is no UUID"))?;
    Ok(MessageId(uuid))
}

/// A message's name, or no name at all where it cannot be read: for showing it, and for ending it.
pub(super) fn shown_id(row: &SqliteRow) -> MessageId {
    message_id(row).unwrap_or(MessageId(Uuid::nil()))
}

/// How often a message was tried.
pub(super) fn tries_of(attempts: i64, failures: i64, crashes: i64) -> sqlx::Result<Tries> {
    let count = |n| u32::try_from(n).map_err(|_| unreadable("a count is out of range"));
    Ok(Tries { attempts: count(attempts)?, failures: count(failures)?, crashes: count(crashes)? })
}

/// The priority that stands in a row with its sign turned.
pub(super) fn priority(rank: i64) -> sqlx::Result<i8> {
    let priority = rank.checked_neg().and_then(|priority| i8::try_from(priority).ok());
    priority.ok_or_else(|| unreadable("a priority is out of range"))
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
