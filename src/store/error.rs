//! What a caller cannot plan for, and what it says of messages that cannot be taken.

use crate::model::{Form, NewMessage};

use super::Refusal;

/// What a caller cannot plan for. The database's own error is the source, never the text.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database does not answer; whether the write happened is not known.
    #[error("the database does not answer")]
    Unavailable(#[source] Cause),
    /// The database answers, but was too busy; nothing was written.
    #[error("the database is busy")]
    Busy(#[source] Cause),
    /// There is no room left; nothing was written.
    #[error("the database has no room left")]
    Full(#[source] Cause),
    /// Somebody else uses an idempotency key of this call in a transaction that is open; nothing was written.
    #[error("an idempotency key is in use in a transaction that is open")]
    KeyInUse,
    /// A message cannot be taken: a queue that is not there or is full, a key of another request, an option that no
    /// message may have; nothing was written.
    #[error("{what}")]
    Rejected {
        /// Which message, and why.
        what: String,
    },
    /// The database cannot be used as it is, and waiting does not help: a wrong URL, a newer schema, a
    /// file that another process holds, a SQLite that can lose what is written.
    #[error("the database cannot be used: {what}")]
    Refused {
        /// What is wrong, and what to do.
        what: String,
    },
    /// What is stored is not what this program writes, or it did not do what it was told.
    #[error("the database holds something that cannot be read: {what}")]
    Corrupt {
        /// What, in a few words.
        what: String,
        /// Why.
        #[source]
        source: Option<Cause>,
    },
}

/// Why a store failed.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// What a store's methods return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the same call may succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::Busy(_) | Self::Full(_) | Self::KeyInUse => true,
            Self::Rejected { .. } | Self::Refused { .. } | Self::Corrupt { .. } => false,
        }
    }
}

/// Whether a message is what a message may be. What came over HTTP was checked when it was read; what a program makes is
/// checked here.
pub(crate) fn check(message: &NewMessage) -> Result<()> {
    Form::Envelope.check(message).map_err(|wrong| {
        let what = wrong.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        Error::Rejected { what }
    })
}

/// Why what a handler sent is not taken in: its message at this place was refused.
pub(super) fn not_sent(place: usize, refusal: &Refusal) -> String {
    format!("/messages/{place} is not sent: {}", why(refusal))
}

/// Why a message was refused, in a sentence.
pub(crate) fn why(refusal: &Refusal) -> String {
    match refusal {
        Refusal::NoSuchQueue(queue) => format!("there is no queue {queue}"),
        Refusal::QueueFull(queue) => {
            format!("the queue {queue} has as many messages as its max_messages allows")
        }
        Refusal::NoSubscribers(topic) => format!("no queue wants what is published to {topic}"),
        Refusal::KeyReused => "its idempotency key came before with another request".to_owned(),
    }
}
