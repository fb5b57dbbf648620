//! All pumps of one process: start, stop, drain, limits, and what they really do now.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::model::{NewMessage, QueueName, ReplicaName};
use crate::store::{self, Enqueue, EnqueueOutcome, Enqueued, Store};

/// A message pump over one store. Cheap to clone; all clones are the same pump.
#[derive(Debug, Clone)]
pub struct Pumphouse {}

/// How to stop, and what to say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// How long open deliveries may go on; zero cuts them at once.
    pub deadline: Duration,
    /// Who stops it.
    pub by: String,
    /// Why, in a sentence.
    pub reason: Option<String>,
    /// When it starts again by itself.
    pub until: Option<Timestamp>,
}

/// What became of the deliveries of this process when it stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StopReport {
    /// Deliveries that ended by themselves.
    pub drained: u64,
    /// Deliveries that were cut at the deadline.
    pub aborted: u64,
    /// Messages that were leased and not yet started.
    pub released: u64,
}

/// What a pump is doing now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overview {
    /// Whether it is to run.
    pub state: crate::model::RunState,
    /// This process.
    pub replica: ReplicaName,
    /// All processes alive on this store.
    pub replicas: Vec<ReplicaName>,
    /// Deliveries open in this process.
    pub in_flight: u32,
    /// How many may be open at once, over all queues of this process.
    pub ceiling: u32,
    /// Each queue that is pumped here.
    pub queues: Vec<QueueOverview>,
}

/// What a queue's pump is doing now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueOverview {
    /// Which queue.
    pub queue: QueueName,
    /// Deliveries open in this process.
    pub in_flight: u32,
    /// How many may be open at once in this process.
    pub limit: u32,
}

/// What is to be known before a pump starts.
#[derive(Debug)]
pub struct Builder {}

impl Pumphouse {
    /// A pump over this store, to be set up.
    pub fn builder(_store: Arc<dyn Store>) -> Builder {
        unimplemented!()
    }

    /// The store below.
    pub fn store(&self) -> &Arc<dyn Store> {
        unimplemented!()
    }

    /// This process' name.
    pub fn replica(&self) -> &ReplicaName {
        unimplemented!()
    }

    /// Takes messages in. See [`Store::enqueue`].
    pub async fn enqueue(&self, _enqueue: Enqueue) -> store::Result<EnqueueOutcome> {
        unimplemented!()
    }

    /// Takes one message in.
    pub async fn send(&self, _message: NewMessage) -> store::Result<Enqueued> {
        unimplemented!()
    }

    /// Starts a queue, now and after every restart. `false` where there is none. Twice does no harm.
    pub async fn start_queue(&self, _queue: &QueueName) -> store::Result<bool> {
        unimplemented!()
    }

    /// Stops a queue, now and after every restart, and returns once no delivery of it is open here.
    ///
    /// `None` where there is no such queue. Twice: every caller waits for the same end; a shorter deadline
    /// shortens it for all.
    pub async fn stop_queue(
        &self,
        _queue: &QueueName,
        _stop: Stop,
    ) -> store::Result<Option<StopReport>> {
        unimplemented!()
    }

    /// Starts the whole pump: every queue that is not stopped itself.
    pub async fn start(&self) -> store::Result<()> {
        unimplemented!()
    }

    /// Stops the whole pump, as [`Pumphouse::stop_queue`] does for one queue.
    pub async fn stop(&self, _stop: Stop) -> store::Result<StopReport> {
        unimplemented!()
    }

    /// Sets how many deliveries of all queues may be open at once; in force when it returns.
    pub async fn set_ceiling(&self, _ceiling: u32) -> store::Result<()> {
        unimplemented!()
    }

    /// Looks at queues and settings now, and returns once they are in force in this process.
    pub async fn refresh(&self) -> store::Result<()> {
        unimplemented!()
    }

    /// What it is doing now.
    pub fn overview(&self) -> Overview {
        unimplemented!()
    }

    /// Whether it is on its way out.
    pub fn is_shutting_down(&self) -> bool {
        unimplemented!()
    }

    /// Ends it: takes no new lease, lets open deliveries go on for `deadline`, then cuts them and gives
    /// their leases back. What was started or stopped by an operator stays so for the next start.
    pub async fn shut_down(&self, _deadline: Duration) -> StopReport {
        unimplemented!()
    }
}

impl Builder {
    /// The name of this process; a random one without it.
    #[must_use]
    pub fn replica(self, _name: ReplicaName) -> Self {
        unimplemented!()
    }

    /// Starts to pump.
    pub async fn start(self) -> store::Result<Pumphouse> {
        unimplemented!()
    }
}
