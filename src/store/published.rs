//! What is published, as the databases keep it: on its way into a queue, and the answer beside its key.

use serde::{Deserialize, Serialize};

use crate::model::{MessageId, NewMessage, TopicName};

use super::{Copied, Published};

/// From how many bytes on a payload that goes to several queues is kept once for all of them.
const SHARED_FROM: usize = 4096;

/// A message on its way into one queue: as it was sent, or a copy of what was published. Small, because there are many.
#[derive(Debug, Clone)]
pub(super) enum Incoming<'a> {
    Sent(&'a NewMessage),
    Copy(Box<NewMessage>),
}

impl std::ops::Deref for Incoming<'_> {
    type Target = NewMessage;

    fn deref(&self) -> &NewMessage {
        match self {
            Self::Sent(message) => message,
            Self::Copy(message) => message,
        }
    }
}

/// Whether a payload is kept once for all its copies.
pub(super) fn is_shared(message: &NewMessage, copies: usize) -> bool {
    copies > 1 && message.body.len() >= SHARED_FROM
}

/// An answer as it is kept with its key.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    topic: TopicName,
    id: MessageId,
    copies: Vec<Copied>,
}

impl Published {
    /// As it is kept with its key.
    pub(super) fn kept(&self) -> String {
        let Self { topic, id, copies, .. } = self.clone();
        serde_json::to_string(&Kept { topic, id, copies }).expect("names and ids are always JSON")
    }

    /// The answer to a repeat, from what was kept.
    pub(super) fn again(kept: &str) -> sqlx::Result<Self> {
        let kept = serde_json::from_str::<Kept>(kept);
        let Kept { topic, id, copies } =
            kept.map_err(|_| super::columns::unreadable("an answer that was kept is none"))?;
        Ok(Self { topic, id, copies, duplicate: true })
    }
}
