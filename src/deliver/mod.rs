//! The journey of one message to its handler, and the meaning of what comes back.
//!
//! A handler is any [`tower::Service`] from a [`Delivery`] to something that [is a verdict](IntoVerdict);
//! a step around it is any [`tower::Layer`]. Nothing here touches the database.

mod pipeline;
mod steps;
mod connections;
mod http;
mod retry_after;
mod builtin;

use std::fmt;

use tower::util::BoxCloneSyncService;
use tower::{Service, ServiceExt};

use crate::model::{Answer, ErrorKind, Failure, Message, ReplicaName, Verdict};

pub use builtin::builtin;
pub use connections::{Connector, connector};
pub use http::http_handler;
pub use pipeline::{Surroundings, pipeline};

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
    let service = service
        .map_response(|answer: S::Response| Answer::from(answer.into_verdict()))
        .map_err(|error: E| Failure::new(ErrorKind::Handler, chain(&*error.into())));
    Handler::new(service)
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
