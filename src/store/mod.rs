//! The memory of the house: what it promises, and how to open one.
//!
//! A store keeps messages, queues and what happened to them. It knows nothing of HTTP and nothing of
//! handlers. Every method of [`Store`] is one transaction: when it returns `Ok`, what it says is
//! committed (and synced, where the store is durable); when it returns `Err`, nothing happened, but for
//! [`Error::Unavailable`], after which nobody knows: ask again, with a key or a token that makes asking
//! again harmless. A future that is dropped half-way leaves the store whole, and the write may happen.
//!
//! Times are compared with one clock, the store's own: Postgres asks the server, the stores inside this
//! process ask their [`Clock`]. So delays come in as durations, not as moments.
//!
//! ```text
//!   memory    the promises in their shortest form; the reference; gone with the process
//!   sqlite    one file, one process, WAL, synced before it answers        (the default)
//!   postgres  N replicas on one database
//! ```

mod counting;
mod error;
mod handover;
mod upkeep;
mod topics;
mod schedules;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod published;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod place;
mod news;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod columns;
mod memory;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(feature = "postgres")]
mod postgres;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use crate::clock::Clock;
use crate::model::{
    DeliveryRecord, Guard, GuardChange, Held, Idempotency, Lease, Leased, MessageId, NewMessage,
    QueueName, QueueRecord, QueueSettings, Record, ReplicaName, RunState, Schedule, ScheduleName,
    ScheduleRecord, ScheduleState, Settlement, State, Subscription, SubscriptionName, Ticket,
    TopicName, When,
};

use counting::count_enqueued;
use error::not_sent;
pub use error::{Cause, Error, Result};
pub(crate) use error::{check, why};
use upkeep::EXPIRED;

pub use handover::{Handover, Taker};
pub use memory::Memory;
pub use news::News;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
use place::{NewLease, Place};
#[cfg(feature = "postgres")]
pub use postgres::Postgres;
pub use schedules::PutSchedule;
#[cfg(feature = "sqlite")]
pub use sqlite::Sqlite;
pub use topics::{Copied, Published, PutSubscription, SUBSCRIPTIONS_MAX, TOPIC_WINDOW};
pub use upkeep::{Attendance, Attended, Chores, Promoted, Reaped, Swept, Want};

/// What a store promises. See the [module](self) for what holds for every method.
#[async_trait]
pub trait Store: Debug + Send + Sync + 'static {
    // Sending

    /// Takes messages in, in order. See [`EnqueueOutcome`].
    ///
    /// **Twice**: a message whose key is known is answered with the first one's receipt, on a full queue
    /// too. A key counts for its queue's `dedup_window`, and as long as its message can still be
    /// delivered or is dead; those of what is published count for [`TOPIC_WINDOW`], wherever the copies are.
    ///
    /// **Topics**: a message to a topic becomes a copy in each queue that wants it, all of them or none.
    async fn enqueue(&self, enqueue: Enqueue) -> Result<EnqueueOutcome>;

    // Pumping

    /// Claims up to `max` ready messages of a queue for `duration`: by priority, then by how long they are due.
    ///
    /// **Groups**: of the messages of one group at most one is leased, scheduled for a retry or, in a queue
    /// whose groups are blocked by their dead, dead; the others wait behind it, in the order of their
    /// arrival. **Fairness**: where messages with fairness keys are ready, those of one priority take turns by
    /// their keys (those without one are as of one key), and a claim may take fewer than there are.
    ///
    /// The attempt is counted here, so that a crash counts too. Expired messages are passed over. A row
    /// that cannot be decoded becomes a dead letter, and the next one is taken.
    async fn lease(&self, claim: Claim) -> Result<Vec<Leased>>;

    /// Writes what became of a leased message, and the record of its delivery, if there was one.
    ///
    /// **Fails** with [`Error::Rejected`] where a message that the handler sent cannot be taken in.
    ///
    /// **Twice**, or with a token that is not the message's current one, or after the lease has run out
    /// by the database's clock: [`Settled::LeaseLost`], and nothing changes, nothing is sent.
    async fn settle(&self, settle: Settle) -> Result<Settled>;

    /// What is known of leases that somebody outside of this program holds; in order, `None` for those that are lost.
    async fn held(&self, tickets: Vec<Ticket>) -> Result<Vec<Option<Held>>>;

    /// Prolongs leases to `duration` from now; in order, `false` for those that are lost.
    async fn renew(&self, leases: Vec<Lease>, duration: Duration) -> Result<Vec<bool>>;

    /// Makes ready what has come due, at most `max`, and says when to ask again.
    async fn promote(&self, max: usize) -> Result<Promoted>;

    /// Takes back leases that have run out, at most `max`: a crash is counted, the message is ready
    /// again, or dead once its crashes have reached its queue's `recovery.max_crashes`.
    ///
    /// Each leaves a delivery record with the outcome `lease_lost`.
    async fn reap(&self, max: usize) -> Result<Vec<Reaped>>;

    /// Forgets what nobody needs: expires what waited too long, deletes what is past its retention and
    /// keys past their window; at most `max` of each.
    async fn sweep(&self, max: usize) -> Result<Swept>;

    /// Reports this process alive, takes back at once the leases of processes that are not, and says how
    /// many deliveries of each queue this process may have open.
    ///
    /// Where one process is alone with its store, each share is the limit that was asked for. Over
    /// replicas the shares of a queue with [`Scope::Cluster`](crate::model::Scope::Cluster) never sum up
    /// to more than its limit: a replica that must give some up reports `open` until it has.
    async fn attend(&self, attendance: Attendance) -> Result<Attended>;

    // Looking

    /// A message with its deliveries, the latest first.
    async fn message(&self, id: MessageId) -> Result<Option<(Record, Vec<DeliveryRecord>)>>;

    /// A message's payload.
    async fn payload(&self, id: MessageId) -> Result<Option<Bytes>>;

    /// Messages that match, newest first; see [`Page`].
    ///
    /// What of a message cannot be read is left out here and in [`Store::message`], or shown as the nearest
    /// that can: one bad row hides neither itself nor the others.
    async fn messages(&self, filter: Filter, page: Page) -> Result<Listed>;

    /// How many messages of each queue are in each state, without counting them one by one.
    async fn depths(&self) -> Result<Vec<Depth>>;

    // Repairing

    /// Cancels, hurries or postpones a message that waits.
    async fn amend(&self, id: MessageId, amendment: Amendment) -> Result<Amended>;

    /// Makes dead letters ready again, oldest first, at most `max`: the same ids, attempt numbers that go
    /// on, budgets of failures and crashes that start anew. An expiry that has passed is cleared, because
    /// whoever redrives a message wants it delivered; one that is to come stays.
    async fn redrive(&self, filter: Filter, max: usize) -> Result<Vec<MessageId>>;

    /// Deletes a dead letter, its payload and its history, also one that cannot be read.
    async fn delete_dead(&self, id: MessageId) -> Result<Amended>;

    /// Deletes at most `max` of what waits in a queue; what is leased, dead or done stays, and so do the
    /// keys. Returns how many; fewer than `max` means that nothing more waits.
    async fn purge(&self, queue: &QueueName, max: usize) -> Result<u64>;

    // Queues and the pump

    /// All queues, by name.
    ///
    /// One that cannot be read (a newer program added a setting, somebody edited the row) is left out, with
    /// a line in the log: its messages stay, and all other queues go on. Calls that need its settings fail
    /// with [`Error::Corrupt`].
    async fn queues(&self) -> Result<Vec<QueueRecord>>;

    /// One queue.
    async fn queue(&self, name: &QueueName) -> Result<Option<QueueRecord>>;

    /// Makes a queue, or replaces its settings, if `precondition` holds.
    async fn put_queue(
        &self,
        name: &QueueName,
        settings: QueueSettings,
        precondition: Precondition,
    ) -> Result<PutQueue>;

    /// Deletes a queue; with `force` also one that has messages, all of them with it.
    async fn delete_queue(
        &self,
        name: &QueueName,
        force: bool,
        precondition: Precondition,
    ) -> Result<DeleteQueue>;

    /// Starts or stops a queue, or with `None` the whole pump. `false` where there is no such queue.
    ///
    /// With `from`, only what still stands as that: who acts by itself (a pause that is over, a handler that
    /// is gone) must not undo what an operator said meanwhile. Then `false` also where it stands otherwise.
    async fn set_run_state(
        &self,
        queue: Option<&QueueName>,
        state: RunState,
        from: Option<RunState>,
    ) -> Result<bool>;

    /// Tells what happened to a queue's guard; gives what has become of it by the database's clock, changed or not;
    /// `None` where there is no such queue.
    async fn guard(&self, queue: &QueueName, change: GuardChange) -> Result<Option<Guard>>;

    // Topics and schedules

    /// All subscriptions, by topic and name.
    async fn subscriptions(&self) -> Result<Vec<Subscription>>;

    /// Makes a subscription, or replaces the one of this name; in force for the next publish on every replica.
    async fn put_subscription(&self, subscription: Subscription) -> Result<PutSubscription>;

    /// Ends a subscription; `false` where there is none. What was published before stays. Those of a queue end with it.
    async fn delete_subscription(&self, topic: &TopicName, name: &SubscriptionName)
    -> Result<bool>;

    /// All schedules, by name. One that cannot be read is left out, with a line in the log.
    async fn schedules(&self) -> Result<Vec<ScheduleRecord>>;

    /// Makes a schedule, or replaces what it says, if `precondition` holds; it is due next at `next_at`. What it has
    /// sent stays remembered.
    async fn put_schedule(
        &self,
        name: &ScheduleName,
        schedule: Schedule,
        next_at: Option<Timestamp>,
        precondition: Precondition,
    ) -> Result<PutSchedule>;

    /// Says how far a schedule has come, if it still has this version: one of all replicas does. Its version grows.
    async fn turn_schedule(
        &self,
        name: &ScheduleName,
        version: i64,
        state: ScheduleState,
    ) -> Result<bool>;

    /// Deletes a schedule; `false` where there is none.
    async fn delete_schedule(&self, name: &ScheduleName) -> Result<bool>;

    /// Whether the whole pump is to run, and its ceiling over all queues.
    async fn pump(&self) -> Result<PumpRecord>;

    /// Sets the ceiling over all queues.
    async fn set_ceiling(&self, ceiling: u32) -> Result<()>;

    /// Says how many bytes a payload may have where messages are checked by the database itself. The others check
    /// nothing, and are told for nothing.
    async fn set_body_limit(&self, bytes: usize) -> Result<()> {
        let _ = bytes;
        Ok(())
    }

    // The house itself

    /// Whether the database answers, can be written, and has the schema this program knows.
    async fn check(&self) -> Result<()>;

    /// Who is told when there is something to do. See [`News`].
    fn news(&self) -> &News;

    /// Who takes messages as soon as they are committed. A store may leave it unused. See [`Handover`].
    fn handover(&self) -> &Handover;

    /// Ends what the store runs in the background, after what was promised is written. Twice does no harm.
    ///
    /// It does not wait for ever: what a database that says nothing was asked to write may happen or not,
    /// and nobody was told that it has.
    async fn close(&self);
}

/// Messages to take in.
#[derive(Debug, Clone)]
pub struct Enqueue {
    /// In the order in which they are to be delivered.
    pub messages: Vec<NewMessage>,
    /// Whether one refusal refuses all.
    pub atomic: bool,
    /// A key over the whole batch, besides those of its messages.
    pub batch: Option<Idempotency>,
}

/// What became of messages that were to be taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnqueueOutcome {
    /// One answer for each message, in order. With `atomic`: none of them is [`Enqueued::Refused`].
    Done(Vec<Enqueued>),
    /// `atomic` was asked for, and these (position, reason) could not be taken: nothing was.
    Refused(Vec<(usize, Refusal)>),
    /// The key over the whole batch belongs to another request: nothing was taken.
    BatchKeyReused,
}

/// What became of one message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Enqueued {
    /// It is committed.
    New(Receipt),
    /// The same request came before, and this was its answer.
    Duplicate(Receipt),
    /// It was published.
    Published(Published),
    /// It was not taken.
    Refused(Refusal),
}

/// What the sender of a message is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The message's name.
    pub id: MessageId,
    /// Where it waits.
    pub queue: QueueName,
    /// [`State::Ready`] or [`State::Scheduled`].
    pub state: State,
    /// When it was taken in.
    pub enqueued_at: Timestamp,
    /// When it is due.
    pub deliver_at: Timestamp,
}

/// Why a message was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such queue.
    NoSuchQueue(QueueName),
    /// The queue has as many unsettled messages as its `max_messages` allows.
    QueueFull(QueueName),
    /// Its idempotency key belongs to another request.
    KeyReused,
    /// No queue wants what was published, and one was asked for.
    NoSubscribers(TopicName),
}

/// How many bytes of payload one claim reads from a database: where there are more, it takes fewer messages
/// than it may, and always one.
#[cfg(any(feature = "sqlite", feature = "postgres"))]
const CLAIM_BYTES_MAX: usize = 16 << 20;

/// A wish for messages.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Of which queue.
    pub queue: QueueName,
    /// At most how many.
    pub max: usize,
    /// For how long.
    pub duration: Duration,
    /// For which process.
    pub replica: ReplicaName,
    /// Only those that an operator wants run now, although the queue is stopped.
    pub urgent_only: bool,
    /// For somebody outside of this process, who keeps what is leased when the process ends: then at most so many of
    /// the queue's messages are leased in all, those of other processes too. `None` for this process itself.
    pub out_max: Option<u32>,
}

/// What became of a leased message.
#[derive(Debug, Clone)]
pub struct Settle {
    /// The right to say so.
    pub lease: Lease,
    /// What to write.
    pub settlement: Settlement,
    /// The record of the delivery; `None` for one that never started.
    pub delivery: Option<DeliveryRecord>,
    /// Messages that the handler sent: taken in with an ack, in the same transaction, and only with one.
    pub sent: Vec<NewMessage>,
}

/// Whether a settlement was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// It was.
    Done {
        /// From enqueue to now, by the database's clock.
        age: Duration,
    },
    /// The lease was somebody else's by then: nothing was written.
    LeaseLost,
}

/// Which messages. What is `None` does not restrict.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of this queue.
    pub queue: Option<QueueName>,
    /// In this state.
    pub state: Option<State>,
    /// Of this type.
    pub kind: Option<String>,
    /// Of this conversation.
    pub correlation_id: Option<String>,
    /// Of this group.
    pub group: Option<String>,
    /// Enqueued at or after.
    pub since: Option<Timestamp>,
    /// Enqueued before.
    pub until: Option<Timestamp>,
    /// With one of these names; empty for all.
    pub ids: Vec<MessageId>,
}

impl Filter {
    /// Whether this message is meant.
    pub fn matches(&self, record: &Record) -> bool {
        let head = &record.head;
        self.queue.as_ref().is_none_or(|queue| *queue == head.queue)
            && self.state.is_none_or(|state| state == record.state)
            && (self.kind.is_none() || self.kind == head.kind)
            && (self.correlation_id.is_none() || self.correlation_id == head.correlation_id)
            && (self.group.is_none() || self.group == head.details.group)
            && self.since.is_none_or(|since| head.enqueued_at >= since)
            && self.until.is_none_or(|until| head.enqueued_at < until)
            && (self.ids.is_empty() || self.ids.contains(&head.id))
    }

    #[cfg(any(feature = "sqlite", feature = "postgres"))]
    fn group_number(&self) -> Option<i64> {
        self.group.as_deref().map(crate::model::group_number)
    }
}

/// Which part of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// At most how many.
    pub limit: usize,
    /// Only what comes after this position; from [`Listed::next`].
    pub after: Option<i64>,
}

/// A part of a list, newest first. Stable while messages are added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The messages. May be fewer than asked for although more follow: a page looks at a bounded number
    /// of rows, so that a rare match does not become a scan.
    pub items: Vec<Record>,
    /// Where the next part begins; `None` at the end.
    pub next: Option<i64>,
}

/// How many rows one page of a list looks at, at most.
pub const ROWS_LOOKED_AT_MAX: i64 = 10_000;

/// How many messages a queue has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Depth {
    /// Which queue.
    pub queue: QueueName,
    /// Due.
    pub ready: u64,
    /// How many of those wait for their turn in their group.
    pub behind: u64,
    /// Due later.
    pub scheduled: u64,
    /// Held by somebody.
    pub leased: u64,
    /// Dead letters.
    pub dead: u64,
    /// How long the oldest ready message has been due.
    pub oldest_ready: Option<Duration>,
}

/// A change to a message that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amendment {
    /// Never deliver it.
    Cancel,
    /// Due now, even if its queue is stopped.
    RunNow,
    /// Due then.
    Reschedule(When),
}

/// What became of a change to a message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "made once for a call of an operator, never in bulk")]
pub enum Amended {
    /// It was made; this is the message now (or was, where it is deleted).
    Done(Record),
    /// The message is in a state that does not allow it.
    Not(State),
    /// It is ready and of a group, so that it goes when its turn comes, and not before.
    InGroup,
    /// There is no such message.
    NoSuchMessage,
}

/// What must hold for a queue to be changed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Precondition {
    /// Nothing.
    #[default]
    None,
    /// It exists, and this is its ETag.
    Matches(String),
    /// It exists.
    Exists,
    /// It does not exist.
    Absent,
}

impl Precondition {
    /// Whether it holds for a queue with this ETag, or for none.
    pub fn holds(&self, etag: Option<&str>) -> bool {
        match self {
            Self::None => true,
            Self::Matches(wanted) => etag == Some(wanted),
            Self::Exists => etag.is_some(),
            Self::Absent => etag.is_none(),
        }
    }
}

/// What became of a queue that was to be put.
#[derive(Debug, Clone, PartialEq)]
pub enum PutQueue {
    /// It is new.
    Created(QueueRecord),
    /// It has other settings now.
    Replaced(QueueRecord),
    /// The precondition did not hold.
    PreconditionFailed,
}

/// What became of a queue that was to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeleteQueue {
    /// It is gone.
    Deleted,
    /// It has messages.
    NotEmpty,
    /// Somebody sends to it in a transaction that is open.
    InUse,
    /// There is none.
    NoSuchQueue,
    /// The precondition did not hold.
    PreconditionFailed,
}

/// The whole pump as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PumpRecord {
    /// Whether it is to run.
    pub state: RunState,
    /// How many deliveries of all queues may be open at once, in each process.
    pub ceiling: u32,
}

/// The ceiling over all queues of a new store.
pub const CEILING_DEFAULT: u32 = 1024;

/// Opens the store that a URL names: `sqlite://pumphouse.db`, `postgres://…`, or `memory:`.
///
/// Migrates the schema first, behind a lock. Fails where the database cannot be reached or used.
pub async fn open(url: &str, clock: Arc<dyn Clock>) -> Result<Arc<dyn Store>> {
    match url.split(':').next() {
        Some("memory") => Ok(Arc::new(Memory::new(clock))),
        #[cfg(feature = "sqlite")]
        Some("sqlite") => Ok(Arc::new(Sqlite::open(url, clock).await?)),
        #[cfg(feature = "postgres")]
        Some("postgres" | "postgresql") => Ok(Arc::new(Postgres::open(url).await?)),
        _ => {
            let what = "the database URL starts with none of sqlite://, postgres://, memory:";
            Err(Error::Refused { what: what.to_owned() })
        }
    }
}

/// Why a message is dead that was to be moved to a queue which is not there.
pub(crate) fn target_gone(reason: &str, to_queue: &QueueName) -> String {
    format!("{reason}; the queue {to_queue}, to which a rule moves it, is gone")
}

/// What was refused, and at which place.
fn refusals(answers: &[Enqueued]) -> Vec<(usize, Refusal)> {
    let refusal = |(position, answer): (usize, &Enqueued)| match answer {
        Enqueued::Refused(refusal) => Some((position, refusal.clone())),
        Enqueued::New(_) | Enqueued::Duplicate(_) | Enqueued::Published(_) => None,
    };
    answers.iter().enumerate().filter_map(refusal).collect()
}

/// Whether something was taken in that was not there before.
fn is_new(answer: &Enqueued) -> bool {
    match answer {
        Enqueued::New(_) => true,
        Enqueued::Published(published) => !published.duplicate,
        Enqueued::Duplicate(_) | Enqueued::Refused(_) => false,
    }
}
