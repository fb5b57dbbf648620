//! What is asked and answered when a store is kept in order: what came due, what was taken back, what was
//! forgotten, who is alive.

use std::time::Duration;

use jiff::Timestamp;

use crate::model::{MessageId, QueueName, ReplicaName, State};

/// What came due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promoted {
    /// How many.
    pub count: usize,
    /// How long until the next one is due; `None` where nothing is scheduled.
    pub next: Option<Duration>,
}

/// A lease that was taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reaped {
    /// Of which message.
    pub id: MessageId,
    /// Of which queue.
    pub queue: QueueName,
    /// [`State::Ready`] or [`State::Dead`].
    pub state: State,
}

/// Why a message is dead that expired in a queue that asks for that.
pub(super) const EXPIRED: &str = "it waited longer than its sender wanted";

/// What was forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Swept {
    /// Messages that expired, by queue.
    pub expired: Vec<(QueueName, u64)>,
    /// Those of them that were set aside as dead letters, by queue.
    pub set_aside: Vec<(QueueName, u64)>,
    /// Messages past their retention.
    pub deleted: u64,
    /// Idempotency keys past their window.
    pub keys: u64,
    /// Whether some limit was reached, so that it is worth asking again at once.
    pub more: bool,
}

/// A process reporting itself.
#[derive(Debug, Clone)]
pub struct Attendance {
    /// Its name.
    pub replica: ReplicaName,
    /// A random number that changes with every start of the process.
    pub incarnation: i64,
    /// How long it counts as alive without another report.
    pub good_for: Duration,
    /// For each queue that it pumps: limit, whether it is shared, and how many deliveries it has open.
    pub wants: Vec<Want>,
    /// Whether it is leaving: gives up its shares and is forgotten.
    pub leaving: bool,
}

/// What a process would like to have open of one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Which queue.
    pub queue: QueueName,
    /// How many may be open at once: the queue's limit, or of a half-open breaker as many as may try.
    pub limit: u32,
    /// The queue's limit in any case.
    pub most: u32,
    /// Whether the limit is over all replicas.
    pub shared: bool,
    /// Whether this process can open any; where not, all of it is for the others.
    pub able: bool,
    /// How many this process has open now that count for `limit`.
    pub open: u32,
    /// How many it has open beside those: from before the breaker was opened. They count for `most`.
    pub strays: u32,
}

impl Want {
    /// The share of a process that is alone.
    pub(super) fn of_one(&self) -> u32 {
        if self.able { self.limit.min(self.most.saturating_sub(self.strays)) } else { 0 }
    }
}

/// What is to do in a store, as far as a report saw: whatever is not said here needs no look for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chores {
    /// Something that was scheduled is due, or will be before the next report: see [`Store::promote`](super::Store::promote).
    pub due: bool,
    /// Leases have run out: see [`Store::reap`](super::Store::reap).
    pub lost: bool,
    /// Something is past its time, or left to be cleared away: see [`Store::sweep`](super::Store::sweep).
    pub past: bool,
}

impl Chores {
    /// Of a store that does not look before, because it does them as easily as it looks.
    pub(super) const ALL: Self = Self { due: true, lost: true, past: true };
}

/// What a process may do until it reports again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attended {
    /// For each want, in order: how many deliveries may be open here.
    pub shares: Vec<u32>,
    /// Leases of dead processes that were taken back, as by [`Store::reap`](super::Store::reap).
    pub reaped: Vec<Reaped>,
    /// The names of the processes that are alive, this one too.
    pub replicas: Vec<ReplicaName>,
    /// What is to do now.
    pub chores: Chores,
    /// A number that changes whenever a queue or the pump is changed.
    pub revision: i64,
    /// What the store's clock says.
    pub now: Timestamp,
}
