//! What the driver's errors mean for a caller: the one place where they are told apart.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;

use super::super::{Cause, Error};

pub(super) use super::super::columns::unreadable;

/// The error of the store for an error of the driver, which may have hit several calls at once.
pub(super) fn fault(error: &Arc<sqlx::Error>) -> Error {
    let cause = || -> Cause { Box::new(Shared(error.clone())) };
    let corrupt = |what: &str| Error::Corrupt { what: what.to_owned(), source: Some(cause()) };
    match error.as_ref() {
        sqlx::Error::Database(database) => match primary_code(database.as_ref()) {
            BUSY | LOCKED => Error::Busy(cause()),
            FULL => Error::Full(cause()),
            CORRUPT | NOT_A_DATABASE => corrupt("the file is damaged, or is no database"),
            READ_ONLY => Error::Refused { what: "its file cannot be written".to_owned() },
            // A constraint, or a statement that does not fit the schema: not what this program wrote.
            CONSTRAINT | GENERIC => corrupt("a statement was refused"),
            _ => Error::Unavailable(cause()),
        },
        sqlx::Error::PoolTimedOut => Error::Busy(cause()),
        sqlx::Error::Decode(_)
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::RowNotFound => corrupt("a row is not what was written"),
        _ => Error::Unavailable(cause()),
    }
}

/// The error of the store for an error of the driver that has hit one call.
pub(super) fn of_one(error: sqlx::Error) -> Error {
    fault(&Arc::new(error))
}

/// Whether an error leaves in doubt what the connection still holds, and what became of its transaction.
pub(super) fn leaves_doubt(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(database) => !matches!(
            primary_code(database.as_ref()),
            // What SQLite refuses in good order.
            BUSY | LOCKED | FULL | READ_ONLY | CONSTRAINT | GENERIC
        ),
        sqlx::Error::Decode(_)
        | sqlx::Error::ColumnDecode { .. }
        | sqlx::Error::ColumnNotFound(_)
        | sqlx::Error::ColumnIndexOutOfBounds { .. }
        | sqlx::Error::RowNotFound => false,
        _ => true,
    }
}

/// Whether a row with this unique value is there already.
pub(super) fn is_known_already(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(database) if database.is_unique_violation())
}

// The primary result codes of SQLite, which its C interface fixes for ever.
const GENERIC: i32 = 1;
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const READ_ONLY: i32 = 8;
const CORRUPT: i32 = 11;
const FULL: i32 = 13;
const CONSTRAINT: i32 = 19;
const NOT_A_DATABASE: i32 = 26;

fn primary_code(error: &dyn sqlx::error::DatabaseError) -> i32 {
    let extended = error.code().and_then(|code| code.parse::<i32>().ok());
    extended.map_or(0, |code| code & 0xff)
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
