//! Taking messages in within a transaction of somebody else's.
//!
//! What is done here, the function `take_one` of the schema does: it waits for nobody, and nobody waits for the
//! transaction that called it. The house tells nobody of these messages, because it does not know when the
//! transaction commits; it leaves a note in the table sent, and each replica looks there from time to time.

use sqlx::{PgConnection, Row, query};

use crate::model::{Lasts, NewMessage, QueueName, State, When};

use super::super::{Enqueued, Error, Receipt, Result, check};
use super::fault::Trouble;
use super::{Postgres, rows};

// Lives on: queue_name_key, the primary key of idempotency; then, at their ends, those of message and content, and
// those of ready, scheduled or behind. The names of its tables are full, because the connection is not ours.
const TAKE_ONE: &str = "\
select id, duplicate, enqueued_at, deliver_at
from pumphouse.take_one(
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16
)";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[TAKE_ONE];

impl Postgres {
    /// Takes a message in within a transaction of the caller's own, on a connection to the database of the house: it is
    /// there when that transaction commits, or never, and is delivered within about a second after that.
    ///
    /// It waits for nobody but for one who sends with the same key in a transaction that is open, and nobody waits for
    /// this transaction, however long it is open; only its queue cannot be deleted meanwhile. The database role of the
    /// connection must be allowed to execute `pumphouse.take_one`, as the owner of the schema is.
    ///
    /// **Fails** with [`Error::Rejected`] where there is no such queue, where it is full, where a key belongs to
    /// another request, where it is to be published to a topic, and where a message has what no message may have (then the database is not asked); otherwise the
    /// transaction is aborted, as after every error of a statement.
    ///
    /// ```no_run
    /// # async fn place(database: &sqlx::PgPool) -> Result<(), Box<dyn std::error::Error>> {
    /// use pumphouse::model::{NewMessage, QueueName};
    /// use pumphouse::store::Postgres;
    ///
    /// let mut transaction = database.begin().await?;
    /// sqlx::query("insert into orders (id) values (17)").execute(&mut *transaction).await?;
    /// let message = NewMessage::new(QueueName::parse("orders")?, r#"{"order": 17}"#);
    /// Postgres::enqueue_in(&mut transaction, &message).await?;
    /// transaction.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn enqueue_in(
        connection: &mut PgConnection,
        message: &NewMessage,
    ) -> Result<Enqueued> {
        check(message)?;
        let Some(queue) = message.to.queue() else {
            let what = "what is published to a topic is not sent in a transaction of one's own";
            return Err(Error::Rejected { what: what.to_owned() });
        };
        let details = serde_json::to_string(&message.details);
        let (wait, moment) = split(Some(message.deliver));
        let (lifetime, end) = split(message.expires);
        let keys = || message.keys.iter();
        let pending = |lasts| lasts == Lasts::WhilePending;
        let taken = query(TAKE_ONE)
            .bind(queue.as_str())
            .bind(message.id.0)
            .bind(message.body.as_ref())
            .bind(message.kind.as_deref())
            .bind(message.correlation_id.as_deref())
            .bind(details.expect("details are text, which is always JSON"))
            .bind(wait)
            .bind(moment)
            .bind(lifetime)
            .bind(end)
            .bind(-i16::from(message.priority))
            .bind(message.details.group.as_deref())
            .bind(message.details.fairness_key.as_deref())
            .bind(keys().map(|key| key.key.to_vec()).collect::<Vec<_>>())
            .bind(keys().map(|key| key.fingerprint.to_vec()).collect::<Vec<_>>())
            .bind(keys().map(|key| pending(key.lasts)).collect::<Vec<_>>())
            .fetch_one(connection)
            .await
            .map_err(refused)?;
        receipt(queue, &taken).map_err(|error| Trouble::from(error).into())
    }
}

fn receipt(queue: &QueueName, row: &sqlx::postgres::PgRow) -> sqlx::Result<Enqueued> {
    let (enqueued_at, deliver_at): (i64, i64) =
        (row.try_get("enqueued_at")?, row.try_get("deliver_at")?);
    let state: State = rows::waiting_state(deliver_at, enqueued_at);
    let receipt = Receipt {
        id: rows::message_id(row)?,
        queue: queue.clone(),
        state,
        enqueued_at: rows::moment(enqueued_at)?,
        deliver_at: rows::moment(deliver_at)?,
    };
    let duplicate: bool = row.try_get("duplicate")?;
    Ok(if duplicate { Enqueued::Duplicate(receipt) } else { Enqueued::New(receipt) })
}

/// A time as the function takes it: a span, or a moment.
fn split(when: Option<When>) -> (Option<i64>, Option<i64>) {
    match when {
        None => (None, None),
        Some(When::Now) => (Some(0), None),
        Some(When::In(span)) => (Some(rows::span(span)), None),
        Some(When::At(moment)) => (None, Some(rows::micros(moment))),
    }
}

fn refused(error: sqlx::Error) -> Error {
    match error.as_database_error() {
        // undefined_object, invalid_parameter_value, program_limit_exceeded
        Some(said) if matches!(said.code().as_deref(), Some("42704" | "22023" | "54000")) => {
            Error::Rejected { what: said.message().to_owned() }
        }
        _ => Trouble::from(error).into(),
    }
}
