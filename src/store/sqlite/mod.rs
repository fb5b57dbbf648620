//! The default store: one file, one process, synced before it answers.
//!
//! ```text
//!   calls that write ──▶ writer ──▶ desk ──▶ the one connection that writes
//!                     (one task, many calls to a transaction)
//!   calls that look  ──────────────────────▶ a few connections that read
//! ```
//!
//! Each file has the statements of its subject, with the index that each lives on. What is decided about
//! a message is decided in those files, inside the writer's transaction, and nowhere else.

mod open;
mod fault;
mod rows;
mod desk;
mod writer;
mod enqueue;
mod known;
mod lease;
mod settle;
mod queues;
mod topics;
mod surgery;
mod groups;
mod listing;
mod upkeep;
mod sweep;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use sqlx::sqlite::SqlitePool;
use sqlx::{query, query_scalar};

use crate::clock::Clock;
use crate::model::{
    DeliveryRecord, Guard, GuardChange, Held, Lease, Leased, MessageId, QueueName, QueueRecord,
    QueueSettings, Record, RunState, Schedule, ScheduleName, ScheduleRecord, ScheduleState,
    Subscription, SubscriptionName, Ticket, TopicName,
};

use super::{
    Amended, Amendment, Attendance, Attended, Claim, DeleteQueue, Depth, Enqueue, EnqueueOutcome,
    Error, Filter, Handover, Listed, News, Page, Precondition, Promoted, PumpRecord, PutQueue,
    PutSchedule, PutSubscription, Reaped, Result, Settle, Settled, Store, Swept,
};
use desk::Desk;
use fault::of_one;
use writer::Writer;

/// A store in one file, for one process.
///
/// **Survives** a crash of the process and of the machine, if the disk keeps what it says it has synced.
pub struct Sqlite {
    writer: Writer,
    readers: SqlitePool,
    clock: Arc<dyn Clock>,
    news: Arc<News>,
    handover: Arc<Handover>,
}

impl Sqlite {
    /// Opens the database that a URL like `sqlite://pumphouse.db` or `sqlite:///var/lib/pumphouse.db`
    /// names, makes it if there is none, and migrates it.
    ///
    /// **Fails** with [`Error::Refused`] while another process has it open, where its schema is newer than
    /// this program, and for `sqlite::memory:`, which would lose what was acknowledged.
    pub async fn open(url: &str, clock: Arc<dyn Clock>) -> Result<Self> {
        let opened = open::open(url).await?;
        let readers = open::readers(&opened.options);
        let news = Arc::new(News::default());
        let handover = Arc::new(Handover::default());
        let desk = Desk::new(opened, clock.clone(), news.clone(), handover.clone());
        let writer = Writer::start(desk.await.map_err(of_one)?);
        Ok(Self { writer, readers, clock, news, handover })
    }

    /// Brings the schema up to date and closes the database again; also makes one where there is none.
    ///
    /// **Fails** as [`Sqlite::open`] does.
    pub async fn migrate(url: &str) -> Result<()> {
        let opened = open::open(url).await?;
        sqlx::Connection::close(opened.connection).await.map_err(of_one)
    }

    /// Every statement this store runs, for the test that looks at their plans.
    #[doc(hidden)]
    pub fn statements() -> Vec<&'static str> {
        let lists = [
            open::STATEMENTS,
            desk::STATEMENTS,
            known::STATEMENTS,
            lease::STATEMENTS,
            queues::STATEMENTS,
            topics::STATEMENTS,
            surgery::STATEMENTS,
            groups::STATEMENTS,
            upkeep::STATEMENTS,
            sweep::STATEMENTS,
            &[WRITE_SOMETHING, VERSION],
        ];
        let lists = lists.into_iter().flatten().copied();
        let inserts = enqueue::statements().chain(settle::statements());
        lists.chain(inserts).chain(listing::statements()).collect()
    }

    fn now(&self) -> i64 {
        rows::micros(self.clock.now())
    }
}

impl fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sqlite").finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for Sqlite {
    async fn enqueue(&self, enqueue: Enqueue) -> Result<EnqueueOutcome> {
        self.writer.enqueue(enqueue).await
    }

    async fn lease(&self, claim: Claim) -> Result<Vec<Leased>> {
        self.writer.lease(claim).await
    }

    async fn settle(&self, settle: Settle) -> Result<Settled> {
        self.writer.settle(settle).await
    }

    async fn held(&self, tickets: Vec<Ticket>) -> Result<Vec<Option<Held>>> {
        lease::held(&self.readers, &tickets, self.now()).await.map_err(of_one)
    }

    async fn renew(&self, leases: Vec<Lease>, duration: Duration) -> Result<Vec<bool>> {
        self.writer
            .errand(move |desk| {
                Box::pin(async move { lease::renew(desk, &leases, duration).await })
            })
            .await
    }

    async fn promote(&self, max: usize) -> Result<Promoted> {
        self.writer.errand(move |desk| Box::pin(upkeep::promote(desk, max))).await
    }

    async fn reap(&self, max: usize) -> Result<Vec<Reaped>> {
        self.writer.errand(move |desk| Box::pin(upkeep::reap(desk, max))).await
    }

    async fn sweep(&self, max: usize) -> Result<Swept> {
        self.news.forget_unheard();
        self.writer.errand(move |desk| Box::pin(sweep::sweep(desk, max))).await
    }

    async fn attend(&self, attendance: Attendance) -> Result<Attended> {
        self.writer
            .errand(move |desk| Box::pin(async move { upkeep::attend(desk, &attendance).await }))
            .await
    }

    async fn message(&self, id: MessageId) -> Result<Option<(Record, Vec<DeliveryRecord>)>> {
        let mut reader = self.readers.acquire().await.map_err(of_one)?;
        listing::message(&mut reader, id).await.map_err(of_one)
    }

    async fn payload(&self, id: MessageId) -> Result<Option<Bytes>> {
        listing::payload(&self.readers, id).await.map_err(of_one)
    }

    async fn messages(&self, filter: Filter, page: Page) -> Result<Listed> {
        let mut reader = self.readers.acquire().await.map_err(of_one)?;
        listing::messages(&mut reader, &filter, page).await.map_err(of_one)
    }

    async fn depths(&self) -> Result<Vec<Depth>> {
        listing::depths(&self.readers, self.now()).await.map_err(of_one)
    }

    async fn amend(&self, id: MessageId, amendment: Amendment) -> Result<Amended> {
        self.writer.errand(move |desk| Box::pin(surgery::amend(desk, id, amendment))).await
    }

    async fn redrive(&self, filter: Filter, max: usize) -> Result<Vec<MessageId>> {
        // Looked for by a reader, because a rare match among many dead letters takes its time.
        let dead = listing::oldest_dead(&self.readers, &filter, max).await.map_err(of_one)?;
        self.writer
            .errand(move |desk| Box::pin(async move { surgery::redrive(desk, &dead).await }))
            .await
    }

    async fn delete_dead(&self, id: MessageId) -> Result<Amended> {
        self.writer.errand(move |desk| Box::pin(surgery::delete_dead(desk, id))).await
    }

    async fn purge(&self, queue: &QueueName, max: usize) -> Result<u64> {
        let queue = queue.clone();
        self.writer
            .errand(move |desk| Box::pin(async move { surgery::purge(desk, &queue, max).await }))
            .await
    }

    async fn queues(&self) -> Result<Vec<QueueRecord>> {
        queues::all(&self.readers).await.map_err(of_one)
    }

    async fn queue(&self, name: &QueueName) -> Result<Option<QueueRecord>> {
        queues::one(&self.readers, name).await.map_err(of_one)
    }

    async fn put_queue(
        &self,
        name: &QueueName,
        settings: QueueSettings,
        precondition: Precondition,
    ) -> Result<PutQueue> {
        let name = name.clone();
        self.writer
            .errand(move |desk| {
                Box::pin(async move { queues::put(desk, &name, settings, &precondition).await })
            })
            .await
    }

    async fn delete_queue(
        &self,
        name: &QueueName,
        force: bool,
        precondition: Precondition,
    ) -> Result<DeleteQueue> {
        let name = name.clone();
        self.writer
            .errand(move |desk| {
                Box::pin(async move { queues::delete(desk, &name, force, &precondition).await })
            })
            .await
    }

    async fn set_run_state(
        &self,
        queue: Option<&QueueName>,
        state: RunState,
        from: Option<RunState>,
    ) -> Result<bool> {
        let queue = queue.cloned();
        self.writer
            .errand(move |desk| {
                Box::pin(async move {
                    queues::set_run_state(desk, queue.as_ref(), &state, from.as_ref()).await
                })
            })
            .await
    }

    async fn guard(&self, queue: &QueueName, change: GuardChange) -> Result<Option<Guard>> {
        let queue = queue.clone();
        self.writer
            .errand(move |desk| Box::pin(async move { queues::guard(desk, &queue, &change).await }))
            .await
    }

    async fn subscriptions(&self) -> Result<Vec<Subscription>> {
        topics::all(&self.readers).await.map_err(of_one)
    }

    async fn put_subscription(&self, subscription: Subscription) -> Result<PutSubscription> {
        self.writer
            .errand(move |desk| Box::pin(async move { topics::put(desk, &subscription).await }))
            .await
    }

    async fn delete_subscription(
        &self,
        topic: &TopicName,
        name: &SubscriptionName,
    ) -> Result<bool> {
        let (topic, name) = (topic.clone(), name.clone());
        self.writer
            .errand(move |desk| Box::pin(async move { topics::delete(desk, &topic, &name).await }))
            .await
    }

    async fn schedules(&self) -> Result<Vec<ScheduleRecord>> {
        topics::schedules(&self.readers).await.map_err(of_one)
    }

    async fn put_schedule(
        &self,
        name: &ScheduleName,
        schedule: Schedule,
        next_at: Option<Timestamp>,
        precondition: Precondition,
    ) -> Result<PutSchedule> {
        let name = name.clone();
        self.writer
            .errand(move |desk| {
                Box::pin(async move {
                    topics::put_schedule(desk, &name, schedule, next_at, &precondition).await
                })
            })
            .await
    }

    async fn turn_schedule(
        &self,
        name: &ScheduleName,
        version: i64,
        state: ScheduleState,
    ) -> Result<bool> {
        let name = name.clone();
        self.writer
            .errand(move |desk| {
                Box::pin(async move { topics::turn_schedule(desk, &name, version, &state).await })
            })
            .await
    }

    async fn delete_schedule(&self, name: &ScheduleName) -> Result<bool> {
        let name = name.clone();
        self.writer
            .errand(move |desk| Box::pin(async move { topics::delete_schedule(desk, &name).await }))
            .await
    }

    async fn pump(&self) -> Result<PumpRecord> {
        queues::pump(&self.readers).await.map_err(of_one)
    }

    async fn set_ceiling(&self, ceiling: u32) -> Result<()> {
        self.writer.errand(move |desk| Box::pin(queues::set_ceiling(desk, ceiling))).await
    }

    async fn check(&self) -> Result<()> {
        let version = self.writer.errand(|desk| Box::pin(write_and_ask_version(desk))).await?;
        if open::is_current(version) {
            return Ok(());
        }
        let what = format!("its schema is version {version}, which is not this program's");
        Err(Error::Refused { what })
    }

    fn news(&self) -> &News {
        &self.news
    }

    fn handover(&self) -> &Handover {
        &self.handover
    }

    async fn close(&self) {
        self.readers.close().await;
        self.writer.close().await;
    }
}

// Lives on: the primary key of pump.
const WRITE_SOMETHING: &str = "\
update pump
set ceiling = ceiling
where id = 1";

// Lives on: the primary key of what sqlx keeps about migrations; a few rows.
const VERSION: &str = "\
select max(version)
from _sqlx_migrations
where success";

async fn write_and_ask_version(desk: &mut Desk) -> sqlx::Result<i64> {
    query(WRITE_SOMETHING).execute(&mut desk.connection).await?;
    query_scalar(VERSION).fetch_one(&mut desk.connection).await
}
