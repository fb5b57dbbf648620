//! What the driver's errors mean for a caller: the one place where they are told apart.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use sqlx::error::DatabaseError;

use super::super::{Cause, Error};

pub(super) use super::super::columns::unreadable;

/// Why a transaction did not come to its end.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The driver says so. Several calls may share one error, because they share one transaction.
    Driver(Arc<sqlx::Error>),
    /// The driver says so, of a connection that was at its end before anything was written on it.
    Unbegun(Arc<sqlx::Error>),
    /// We say so.
    Ours(Error),
    /// Somebody has put down the same idempotency key in a transaction that is open.
    KeyInUse,
    /// Somebody changed underneath us what we had just read: from the beginning, please.
    Overtaken,
}

impl From<sqlx::Error> for Trouble {
    fn from(error: sqlx::Error) -> Self {
        Self::Driver(Arc::new(error))
    }
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Driver(error) | Trouble::Unbegun(error) => fault(&error),
            Trouble::Ours(error) => error,
            Trouble::KeyInUse => Self::KeyInUse,
            Trouble::Overtaken => Self::Busy("overtaken by other transactions".into()),
        }
    }
}

impl Trouble {
    /// A connection on which a transaction could not begin: one that was kept, and is broken.
    pub(super) fn unbegun(error: sqlx::Error) -> Self {
        Self::Unbegun(Arc::new(error))
    }

    /// Of a statement that is a transaction by itself: where the server says that it ended the connection, it took
    /// the statement back. Where the connection broke without a word, nobody knows whether it was done.
    pub(super) fn of_the_only_statement(error: sqlx::Error) -> Self {
        let was_ended = code_of(&error) == Some(ADMIN_SHUTDOWN);
        if was_ended { Self::unbegun(error) } else { Self::from(error) }
    }

    /// Of a statement that waits for idempotency keys.
    pub(super) fn of_a_key(error: sqlx::Error) -> Self {
        if code_of(&error) == Some(LOCK_TIMEOUT) { Self::KeyInUse } else { Self::from(error) }
    }

    /// Whether the same transaction is likely to succeed at once: nothing of it was written, and what
    /// was in its way was another transaction, or a connection that had broken before.
    pub(super) fn is_worth_another_try(&self) -> bool {
        match self {
            Self::Driver(error) => {
                let passing = |code: &str| matches!(code, SERIALIZATION | DEADLOCK | LOCK_TIMEOUT);
                code_of(error).is_some_and(passing) || violates(error, "queue_name_key")
            }
            Self::Ours(_) | Self::KeyInUse => false,
            Self::Overtaken | Self::Unbegun(_) => true,
        }
    }

    /// The error for everybody, where no call of a batch is to blame: the database itself is away.
    pub(super) fn is_for_all(&self) -> Option<&Arc<sqlx::Error>> {
        let (Self::Driver(error) | Self::Unbegun(error)) = self else { return None };
        matches!(fault(error), Error::Unavailable(_) | Error::Full(_)).then_some(error)
    }

    /// Whether a message with this name is there already.
    pub(super) fn is_known_name(&self) -> bool {
        matches!(self, Self::Driver(error) if violates(error, "message_id"))
    }
}

/// The error of the store for an error of the driver, which may have hit several calls at once.
pub(super) fn fault(error: &Arc<sqlx::Error>) -> Error {
    let cause = || -> Cause { Box::new(Shared(error.clone())) };
    let corrupt = |what: &str| Error::Corrupt { what: what.to_owned(), source: Some(cause()) };
    match error.as_ref() {
        sqlx::Error::Database(database) => match database.code().unwrap_or_default().as_ref() {
            // Looked at one by one before their classes.
            "53100" | "53200" => Error::Full(cause()),
            "25006" => Error::Unavailable(cause()),
            "57014" | LOCK_TIMEOUT | "55006" => Error::Busy(cause()),
            "22021" | "22P05" => {
                let what = "a text holds a character that the database cannot keep".to_owned();
                Error::Refused { what }
            }
            "28000" | "28P01" | "3D000" | "42501" => {
                Error::Refused { what: database.message().to_owned() }
            }
            "3F000" | "42P01" | "42703" | "42883" => {
                corrupt("a table, column or function is missing; run the migrations")
            }
            code => match code.get(..2) {
                Some("40") => Error::Busy(cause()),
                Some("08" | "53" | "57" | "58" | "25") => Error::Unavailable(cause()),
                _ => corrupt("a statement was refused"),
            },
        },
        sqlx::Error::Configuration(why) => Error::Refused { what: why.to_string() },
        sqlx::Error::Decode(_)
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::RowNotFound => corrupt("a row is not what was written"),
        _ => Error::Unavailable(cause()),
    }
}

const ADMIN_SHUTDOWN: &str = "57P01";
const SERIALIZATION: &str = "40001";
const DEADLOCK: &str = "40P01";
const LOCK_TIMEOUT: &str = "55P03";

fn code_of(error: &sqlx::Error) -> Option<&str> {
    let database: &dyn DatabaseError = error.as_database_error()?;
    Some(database.try_downcast_ref::<sqlx::postgres::PgDatabaseError>()?.code())
}

fn violates(error: &sqlx::Error, constraint: &str) -> bool {
    error.as_database_error().and_then(DatabaseError::constraint) == Some(constraint)
}

/// One error, the cause of several.
#[derive(Debug)]
struct Shared(Arc<sqlx::Error>);

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl StdError for Shared {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source()
    }
}
