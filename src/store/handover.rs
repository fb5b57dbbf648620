//! The short way from a commit to a pump of the same process.
//!
//! A message that is due now, of a queue in which no other is ready, can be stored as leased from the start,
//! and handed over in memory once that is committed: its lease costs no transaction of its own, and it is
//! not read back. Where nobody has a place for it, it is stored as ready, and is claimed later like any other.
//!
//! The leases are those of the store, on the disk with the message: what is handed over and lost with the
//! process comes back as any lease does.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::model::{Leased, QueueName, ReplicaName};

/// Who takes messages as soon as they are committed.
pub trait Taker: Debug + Send + Sync {
    /// Keeps a place for one more message, if there is one.
    fn reserve(&self) -> bool;

    /// Gives back a place that was not used.
    fn give_back(&self);

    /// In whose name, and for how long, its messages are leased.
    fn terms(&self) -> (ReplicaName, Duration);

    /// Takes a message to a place that was kept. **Fails** where nobody takes any more; the place is free then.
    fn take(&self, leased: Leased) -> Result<(), Box<Leased>>;
}

/// Who takes the messages of which queue.
#[derive(Debug, Default)]
pub struct Handover(RwLock<HashMap<QueueName, Arc<dyn Taker>>>);

impl Handover {
    /// From now on this one takes the messages of a queue, in place of any other.
    pub fn open(&self, queue: QueueName, taker: Arc<dyn Taker>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(queue, taker);
    }

    /// From now on this one takes no more; another that came in its place is left alone.
    pub fn close(&self, queue: &QueueName, taker: &Arc<dyn Taker>) {
        let mut takers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if takers.get(queue).is_some_and(|open| Arc::ptr_eq(open, taker)) {
            takers.remove(queue);
        }
    }

    /// Who takes the messages of this queue, if anybody does.
    pub fn taker(&self, queue: &QueueName) -> Option<Arc<dyn Taker>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(queue).cloned()
    }
}
