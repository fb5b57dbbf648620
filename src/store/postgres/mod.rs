//! The store for several replicas: one Postgres database, version 11 or newer.
//!
//! How a message lives in tables is told in `migrations/postgres/0001_house.sql`; here is how they are
//! reached. Messages coming in, and settlements, share transactions ([`writer`]); claims are one statement
//! each; everything else is a transaction of its own ([`transact`]). The database's clock is the only
//! clock. It keeps no copy of anything that stands in the database.
//!
//! If you change the schema: add a file to `migrations/postgres`, never change one that was released.

mod fault;
mod rows;
mod transact;
mod writer;
mod news;
mod open;
mod enqueue;
mod facts;
mod claims;
mod lease;
mod settle;
mod sent;
mod upkeep;
mod sweep;
mod at_once;
mod attend;
mod look;
mod listing;
mod surgery;
mod queues;
mod arrivals;
mod topics;
mod groups;
mod own_transaction;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::model::{
    DeliveryRecord, Guard, GuardChange, Held, Lease, Leased, MessageId, QueueName, QueueRecord,
    QueueSettings, Record, ReplicaName, RunState, Schedule, ScheduleName, ScheduleRecord,
    ScheduleState, Subscription, SubscriptionName, Ticket, TopicName,
};

use super::{
    Amended, Amendment, Attendance, Attended, Claim, DeleteQueue, Depth, Enqueue, EnqueueOutcome,
    Error, Filter, Handover, Listed, News, Page, Precondition, Promoted, PumpRecord, PutQueue,
    PutSchedule, PutSubscription, Reaped, Result, Settle, Settled, Store, Swept,
};
use enqueue::Enqueues;
use news::Herald;
use settle::Settles;
use transact::Hands;
use writer::{Pumps, Writer};

/// How long closing waits for a database that says nothing. Less than a process has after SIGTERM.
const CLOSE_MAX: Duration = Duration::from_secs(5);

/// How many connections take messages in: while one waits for the disk, the next transaction is written.
const ENQUEUING: usize = 2;
/// How many connections settle.
const SETTLING: usize = 1;

/// A store in a Postgres database, to be shared with other replicas.
#[derive(Debug)]
pub struct Postgres {
    hands: Hands,
    /// Connections for claims alone, so that they wait for nothing that takes longer.
    claims: Hands,
    enqueues: Writer<Enqueues>,
    settles: Writer<Settles>,
    herald: Arc<Herald>,
    pumps: Arc<Pumps>,
    reports: Arc<look::Reports>,
    /// Queues whose messages take turns, and where their last claims ended: the lanes of the last messages.
    last_lanes: Mutex<HashMap<QueueName, i32>>,
    stop: CancellationToken,
    /// A store that is dropped without being closed leaves nobody behind in the background either.
    _stop_when_dropped: DropGuard,
}

impl Postgres {
    /// Opens the database that the URL names, and brings its schema up to date.
    ///
    /// **Fails** where it cannot be reached, and where its schema is newer than this program. Where the
    /// server is set so that a crash of its machine can lose what was acknowledged (`fsync=off`,
    /// `full_page_writes=off`), a warning is logged, and it is used all the same: its owner has chosen so.
    pub async fn open(url: &str) -> Result<Self> {
        let options = open::prepare(url).await?;
        Ok(Self::over(options))
    }

    /// Brings the schema of the database that the URL names up to date. Twice does no harm.
    pub async fn migrate(url: &str) -> Result<()> {
        open::prepare(url).await.map(drop)
    }

    fn over(options: open::Options) -> Self {
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let herald = Arc::new(Herald::new());
        let pumps = Arc::new(Pumps::default());
        let line = transact::Line::new(options.relaxed.clone(), &pumps.breaks);
        tasks.spawn(herald.clone().send(line, stop.clone()));
        tasks.spawn(herald.clone().listen(options.durable.clone(), stop.clone()));
        let durable = || options.durable.clone();
        Self {
            enqueues: Writer::open(&tasks, ENQUEUING, durable(), &herald, &pumps, &stop),
            settles: Writer::open(&tasks, SETTLING, durable(), &herald, &pumps, &stop),
            hands: Hands { pool: open::pool(durable(), 8), tasks: tasks.clone() },
            // Durable too: a number of an attempt that the server forgot in a crash would come again.
            claims: Hands { pool: open::pool(durable(), 4), tasks },
            herald,
            pumps,
            reports: Arc::default(),
            last_lanes: Mutex::default(),
            _stop_when_dropped: stop.clone().drop_guard(),
            stop,
        }
    }

    fn last_lanes(&self) -> MutexGuard<'_, HashMap<QueueName, i32>> {
        self.last_lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What holds for planning on every connection, for the same test.
    #[doc(hidden)]
    pub fn planning() -> &'static [(&'static str, &'static str)] {
        open::PLANNING
    }

    /// Every statement that is ever sent, for a test that looks at their plans.
    #[doc(hidden)]
    pub fn statements() -> impl Iterator<Item = &'static str> {
        let all = [
            open::STATEMENTS,
            enqueue::STATEMENTS,
            at_once::STATEMENTS,
            facts::STATEMENTS,
            claims::STATEMENTS,
            lease::STATEMENTS,
            settle::STATEMENTS,
            sent::STATEMENTS,
            upkeep::STATEMENTS,
            sweep::STATEMENTS,
            attend::STATEMENTS,
            look::STATEMENTS,
            listing::STATEMENTS,
            surgery::STATEMENTS,
            queues::STATEMENTS,
            arrivals::STATEMENTS,
            topics::STATEMENTS,
            groups::STATEMENTS,
            own_transaction::STATEMENTS,
            news::STATEMENTS,
        ];
        all.into_iter().flatten().copied()
    }
}

/// By which start of a process leases are taken, for each that has reported itself here.
#[derive(Debug, Default)]
struct Incarnations(Mutex<HashMap<ReplicaName, i64>>);

impl Incarnations {
    /// The start of this process that it is now; 0 before it has reported itself.
    fn of(&self, replica: &ReplicaName) -> i64 {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(replica).copied().unwrap_or(0)
    }

    fn remember(&self, attendance: &Attendance) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(attendance.replica.clone(), attendance.incarnation);
    }
}

#[async_trait]
impl Store for Postgres {
    async fn enqueue(&self, enqueue: Enqueue) -> Result<EnqueueOutcome> {
        self.enqueues.ask(enqueue).await
    }

    async fn lease(&self, claim: Claim) -> Result<Vec<Leased>> {
        lease::lease(self, claim).await
    }

    async fn settle(&self, settle: Settle) -> Result<Settled> {
        self.settles.ask(settle).await?.map_err(|what| Error::Rejected { what })
    }

    async fn held(&self, tickets: Vec<Ticket>) -> Result<Vec<Option<Held>>> {
        lease::held(self, tickets).await
    }

    async fn renew(&self, leases: Vec<Lease>, duration: Duration) -> Result<Vec<bool>> {
        lease::renew(self, leases, duration).await
    }

    async fn promote(&self, max: usize) -> Result<Promoted> {
        upkeep::promote(self, max).await
    }

    async fn reap(&self, max: usize) -> Result<Vec<Reaped>> {
        upkeep::reap(self, max).await
    }

    async fn sweep(&self, max: usize) -> Result<Swept> {
        sweep::sweep(self, max).await
    }

    async fn attend(&self, attendance: Attendance) -> Result<Attended> {
        attend::attend(self, attendance).await
    }

    async fn message(&self, id: MessageId) -> Result<Option<(Record, Vec<DeliveryRecord>)>> {
        listing::message(self, id).await
    }

    async fn payload(&self, id: MessageId) -> Result<Option<Bytes>> {
        listing::payload(self, id).await
    }

    async fn messages(&self, filter: Filter, page: Page) -> Result<Listed> {
        listing::messages(self, filter, page).await
    }

    async fn depths(&self) -> Result<Vec<Depth>> {
        listing::depths(self).await
    }

    async fn amend(&self, id: MessageId, amendment: Amendment) -> Result<Amended> {
        surgery::amend(self, id, amendment).await
    }

    async fn redrive(&self, filter: Filter, max: usize) -> Result<Vec<MessageId>> {
        surgery::redrive(self, filter, max).await
    }

    async fn delete_dead(&self, id: MessageId) -> Result<Amended> {
        surgery::delete_dead(self, id).await
    }

    async fn purge(&self, queue: &QueueName, max: usize) -> Result<u64> {
        surgery::purge(self, queue, max).await
    }

    async fn queues(&self) -> Result<Vec<QueueRecord>> {
        queues::queues(self).await
    }

    async fn queue(&self, name: &QueueName) -> Result<Option<QueueRecord>> {
        queues::queue(self, name).await
    }

    async fn put_queue(
        &self,
        name: &QueueName,
        settings: QueueSettings,
        precondition: Precondition,
    ) -> Result<PutQueue> {
        queues::put_queue(self, name, settings, precondition).await
    }

    async fn delete_queue(
        &self,
        name: &QueueName,
        force: bool,
        precondition: Precondition,
    ) -> Result<DeleteQueue> {
        queues::delete_queue(self, name, force, precondition).await
    }

    async fn set_run_state(
        &self,
        queue: Option<&QueueName>,
        state: RunState,
        from: Option<RunState>,
    ) -> Result<bool> {
        queues::set_run_state(self, queue, state, from).await
    }

    async fn guard(&self, queue: &QueueName, change: GuardChange) -> Result<Option<Guard>> {
        queues::guard(self, queue, change).await
    }

    async fn subscriptions(&self) -> Result<Vec<Subscription>> {
        topics::subscriptions(self).await
    }

    async fn put_subscription(&self, subscription: Subscription) -> Result<PutSubscription> {
        topics::put_subscription(self, subscription).await
    }

    async fn delete_subscription(
        &self,
        topic: &TopicName,
        name: &SubscriptionName,
    ) -> Result<bool> {
        topics::delete_subscription(self, topic, name).await
    }

    async fn schedules(&self) -> Result<Vec<ScheduleRecord>> {
        topics::schedules(self).await
    }

    async fn put_schedule(
        &self,
        name: &ScheduleName,
        schedule: Schedule,
        next_at: Option<Timestamp>,
        precondition: Precondition,
    ) -> Result<PutSchedule> {
        topics::put_schedule(self, name, schedule, next_at, precondition).await
    }

    async fn turn_schedule(
        &self,
        name: &ScheduleName,
        version: i64,
        state: ScheduleState,
    ) -> Result<bool> {
        topics::turn_schedule(self, name, version, state).await
    }

    async fn delete_schedule(&self, name: &ScheduleName) -> Result<bool> {
        topics::delete_schedule(self, name).await
    }

    async fn pump(&self) -> Result<PumpRecord> {
        queues::pump(self).await
    }

    async fn set_ceiling(&self, ceiling: u32) -> Result<()> {
        queues::set_ceiling(self, ceiling).await
    }

    async fn set_body_limit(&self, bytes: usize) -> Result<()> {
        queues::set_body_limit(self, bytes).await
    }

    async fn check(&self) -> Result<()> {
        open::check(self).await
    }

    fn news(&self) -> &News {
        &self.herald.news
    }

    fn handover(&self) -> &Handover {
        &self.pumps.handover
    }

    async fn close(&self) {
        self.stop.cancel();
        self.hands.tasks.close();
        let written = async {
            self.hands.tasks.wait().await;
            self.hands.pool.close().await;
            self.claims.pool.close().await;
        };
        if timeout(CLOSE_MAX, written).await.is_err() {
            tracing::warn!(
                "the database says nothing; closed without hearing what became of the last writes"
            );
            // From here on nobody gets a connection; those that are in use end with their tasks.
            drop((self.hands.pool.close(), self.claims.pool.close()));
        }
    }
}
