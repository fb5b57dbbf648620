//! The journey of one message to its handler, and the meaning of what comes back.
//!
//! A handler is any [`tower::Service`] from a [`Delivery`] to something that [is a verdict](IntoVerdict);
//! a step around it is any [`tower::Layer`]. Nothing here touches the database.

mod pipeline;
mod steps;
mod connections;
mod http;
mod retry_after;
mod sent;
mod builtin;
mod push;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tower::util::BoxCloneSyncService;
use tower::{Service, ServiceExt};

use crate::model::{
    Answer, ErrorKind, Failure, Form, Invalid, Message, NewMessage, ReplicaName, Reply, Verdict,
};

pub use builtin::builtin;
pub use connections::{Connector, connector};
pub use http::http_handler;
pub use pipeline::{Surroundings, pipeline};
pub use push::push_handler;

/// What a handler sees: one attempt at one message.
#[derive(Clone)]
pub struct Delivery {
    /// The message. Its id stays the same over all attempts.
    pub message: Message,
    /// The attempt's number, from 1; no number is used twice for a message.
    pub attempt: u32,
    /// How many deliveries may fail before the message is dead.
    pub max_attempts: u32,
    /// Which process delivers it.
    pub replica: ReplicaName,
    /// What is to leave together with the ack.
    pub outbox: Outbox,
}

/// What a handler sends: it leaves in the transaction that acks the message, or not at all. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Outbox(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    messages: Vec<NewMessage>,
    reply: Reply,
}

impl Outbox {
    /// Puts a message in. Its id, its cause and, where it names none, its conversation follow from the message that
    /// is handled. A queue that does not exist, or is full, makes this delivery a failed one; so do more than 1,000
    /// messages, and one that has what no message may have (a group together with a delay, say).
    pub fn send(&self, message: NewMessage) {
        self.lock().messages.push(message);
    }

    /// Says what goes to the queue that the message names for answers, if it names one; the last word counts. Without it
    /// the answer is empty.
    pub fn reply(&self, content_type: Option<&str>, body: impl Into<Bytes>) {
        let content_type = content_type.map(str::to_owned);
        self.lock().reply = Reply { content_type, body: body.into() };
    }

    /// What was put in, or what is wrong with it.
    fn take(&self) -> Result<(Vec<NewMessage>, Reply), String> {
        let Contents { messages: sent, reply } = std::mem::take(&mut *self.lock());
        if sent.len() > sent::SENT_MAX {
            return Err(format!("a delivery sends at most {} messages", sent::SENT_MAX));
        }
        for (place, message) in sent.iter().enumerate() {
            let wrong = |wrong: Vec<Invalid>| format!("/messages/{place}{}", sent::first(&wrong));
            Form::Envelope.check(message).map_err(wrong)?;
        }
        Ok((sent, reply))
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Delivery {
    /// Sends a message together with the ack of this one; see [`Outbox::send`].
    pub fn send(&self, message: NewMessage) {
        self.outbox.send(message);
    }

    /// Answers whoever sent this message, if it names a queue for that; see [`Outbox::reply`].
    pub fn reply(&self, content_type: Option<&str>, body: impl Into<Bytes>) {
        self.outbox.reply(content_type, body);
    }
}

impl fmt::Debug for Delivery {
    /// Names the message; never its body or its headers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("message", &self.message.head.id)
            .field("queue", &self.message.head.queue)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

/// A handler with everything about its type forgotten, as the pump calls it.
pub type Handler = BoxCloneSyncService<Delivery, Answer, Failure>;

/// An error of a handler, whatever it is.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What a handler may answer.
pub trait IntoVerdict {
    /// What it says of the message.
    fn into_verdict(self) -> Verdict;
}

impl IntoVerdict for Verdict {
    fn into_verdict(self) -> Verdict {
        self
    }
}

/// To return nothing is to acknowledge, as in axum to return nothing is to answer 200.
impl IntoVerdict for () {
    fn into_verdict(self) -> Verdict {
        Verdict::Ack
    }
}

/// Makes a handler of a service. An error of the service is a failed delivery, and goes by the queue's
/// recovery; its text is kept with the delivery, so it should carry no secret.
pub fn handler<S, E>(service: S) -> Handler
where
    S: Service<Delivery, Error = E> + Clone + Send + Sync + 'static,
    S::Response: IntoVerdict,
    S::Future: Send + 'static,
    E: Into<BoxError>,
{
    let answered = move |delivery: Delivery| {
        let (outbox, service) = (delivery.outbox.clone(), service.clone());
        async move {
            match service.oneshot(delivery).await {
                Ok(answer) => {
                    let verdict = answer.into_verdict();
                    let malformed = |what| Failure::new(ErrorKind::Malformed, what);
                    // Nothing is sent without an ack.
                    let (sent, reply) = match &verdict {
                        Verdict::Ack => outbox.take().map_err(malformed)?,
                        Verdict::Retry { .. }
                        | Verdict::DeadLetter { .. }
                        | Verdict::Discard { .. } => Default::default(),
                    };
                    Ok(Answer { sent, reply, ..Answer::from(verdict) })
                }
                Err(error) => Err(Failure::new(ErrorKind::Handler, chain(&*error.into()))),
            }
        }
    };
    Handler::new(tower::service_fn(answered))
}

/// An error and its causes in one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
