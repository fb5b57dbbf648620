//! Queues whose handler is a function in the program that runs the pump.

use tower::Service;

use crate::deliver::{self, BoxError, Delivery, Handler, IntoVerdict};
use crate::model::{self, Invalid, QueueName, QueueSettings};

/// A queue of this program's own: a name, a handler, and how it is to be treated.
pub struct Queue {
    pub(super) name: QueueName,
    pub(super) settings: QueueSettings,
    pub(super) handler: Handler,
}

impl Queue {
    /// A queue whose messages go to `handler`, any [`tower::Service`] from a [`Delivery`].
    ///
    /// Fails where the name is none; see [`QueueName::parse`].
    pub fn new<S, E>(name: &str, handler: S) -> Result<Self, Invalid>
    where
        S: Service<Delivery, Error = E> + Clone + Send + Sync + 'static,
        S::Response: IntoVerdict,
        S::Future: Send + 'static,
        E: Into<BoxError>,
    {
        Ok(Self {
            name: QueueName::parse(name)?,
            settings: QueueSettings {
                handler: model::Handler::Service,
                ..QueueSettings::default()
            },
            handler: deliver::handler(handler),
        })
    }

    /// How many deliveries may be open at once.
    #[must_use]
    pub fn concurrency(mut self, limit: u32) -> Self {
        self.settings.concurrency.limit = limit;
        self
    }

    /// What follows a failure.
    #[must_use]
    pub fn recovery(mut self, recovery: model::Recovery) -> Self {
        self.settings.recovery = recovery;
        self
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("name", &self.name).finish_non_exhaustive()
    }
}
