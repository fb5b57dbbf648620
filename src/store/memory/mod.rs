//! The promises in their shortest form: the reference for the other stores, gone with the process.
//!
//! One lock over plain maps, held for one method and never across an await; so every method is one
//! transaction, and its order is the order of the lock. Nothing here is durable, and nothing is fast
//! for its own sake: what a claim, a settlement or a promotion costs does not grow with the backlog,
//! everything else may look at all there is.

mod books;
mod enqueue;
mod lease;
mod settle;
mod upkeep;
mod looking;
mod surgery;
mod queues;
mod topics;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use crate::clock::Clock;
use crate::model::{
    DeliveryRecord, Guard, GuardChange, Held, Lease, Leased, MessageId, QueueName, QueueRecord,
    QueueSettings, Record, RunState, Schedule, ScheduleName, ScheduleRecord, ScheduleState,
    Subscription, SubscriptionName, Ticket, TopicName,
};

use super::{
    Amended, Amendment, Attendance, Attended, Claim, DeleteQueue, Depth, Enqueue, EnqueueOutcome,
    Filter, Handover, Listed, News, Page, Precondition, Promoted, PumpRecord, PutQueue,
    PutSchedule, PutSubscription, Reaped, Result, Settle, Settled, Store, Swept, count_enqueued,
};
use books::Books;

/// A store in this process' memory. Nothing survives.
pub struct Memory {
    clock: Arc<dyn Clock>,
    books: Mutex<Books>,
    news: News,
    /// Nobody is handed anything: its claims cost nothing.
    handover: Handover,
}

impl Memory {
    /// An empty store that goes by this clock.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            books: Mutex::default(),
            news: News::default(),
            handover: Handover::default(),
        }
    }

    /// Looks or writes, alone, at one moment; then tells the news.
    fn alone<T>(&self, work: impl FnOnce(&mut Books, Timestamp) -> T) -> T {
        let (done, told) = {
            let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
            // Asked under the lock, so that what comes later in the books is never earlier in time.
            let now = books::whole_micros(self.clock.now());
            let done = work(&mut books, now);
            books.line_up();
            (done, books.take_told())
        };
        told.tell(&self.news);
        done
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for Memory {
    async fn enqueue(&self, enqueue: Enqueue) -> Result<EnqueueOutcome> {
        let outcome = self.alone(|books, now| books.enqueue(enqueue, now));
        count_enqueued([&outcome]);
        Ok(outcome)
    }

    async fn lease(&self, claim: Claim) -> Result<Vec<Leased>> {
        let asked = Instant::now();
        Ok(self.alone(|books, now| books.lease(&claim, asked, now)))
    }

    async fn settle(&self, settle: Settle) -> Result<Settled> {
        self.alone(|books, now| books.settle(settle, now))
    }

    async fn held(&self, tickets: Vec<Ticket>) -> Result<Vec<Option<Held>>> {
        Ok(self.alone(|books, now| books.held(&tickets, now)))
    }

    async fn renew(&self, leases: Vec<Lease>, duration: Duration) -> Result<Vec<bool>> {
        Ok(self.alone(|books, now| books.renew(&leases, duration, now)))
    }

    async fn promote(&self, max: usize) -> Result<Promoted> {
        Ok(self.alone(|books, now| books.promote(max, now)))
    }

    async fn reap(&self, max: usize) -> Result<Vec<Reaped>> {
        Ok(self.alone(|books, now| books.reap(max, now)))
    }

    async fn sweep(&self, max: usize) -> Result<Swept> {
        self.news.forget_unheard();
        Ok(self.alone(|books, now| books.sweep(max, now)))
    }

    async fn attend(&self, attendance: Attendance) -> Result<Attended> {
        Ok(self.alone(|books, now| books.attend(&attendance, now)))
    }

    async fn message(&self, id: MessageId) -> Result<Option<(Record, Vec<DeliveryRecord>)>> {
        Ok(self.alone(|books, _| books.message(id)))
    }

    async fn payload(&self, id: MessageId) -> Result<Option<Bytes>> {
        Ok(self.alone(|books, _| books.payload(id)))
    }

    async fn messages(&self, filter: Filter, page: Page) -> Result<Listed> {
        Ok(self.alone(|books, _| books.messages(&filter, page)))
    }

    async fn depths(&self) -> Result<Vec<Depth>> {
        Ok(self.alone(|books, now| books.depths(now)))
    }

    async fn amend(&self, id: MessageId, amendment: Amendment) -> Result<Amended> {
        Ok(self.alone(|books, now| books.amend(id, amendment, now)))
    }

    async fn redrive(&self, filter: Filter, max: usize) -> Result<Vec<MessageId>> {
        Ok(self.alone(|books, now| books.redrive(&filter, max, now)))
    }

    async fn delete_dead(&self, id: MessageId) -> Result<Amended> {
        Ok(self.alone(|books, _| books.delete_dead(id)))
    }

    async fn purge(&self, queue: &QueueName, max: usize) -> Result<u64> {
        Ok(self.alone(|books, _| books.purge(queue, max)))
    }

    async fn queues(&self) -> Result<Vec<QueueRecord>> {
        Ok(self.alone(|books, _| books.queues()))
    }

    async fn queue(&self, name: &QueueName) -> Result<Option<QueueRecord>> {
        Ok(self.alone(|books, _| books.queue(name)))
    }

    async fn put_queue(
        &self,
        name: &QueueName,
        settings: QueueSettings,
        precondition: Precondition,
    ) -> Result<PutQueue> {
        Ok(self.alone(|books, _| books.put_queue(name, settings, &precondition)))
    }

    async fn delete_queue(
        &self,
        name: &QueueName,
        force: bool,
        precondition: Precondition,
    ) -> Result<DeleteQueue> {
        Ok(self.alone(|books, _| books.delete_queue(name, force, &precondition)))
    }

    async fn set_run_state(
        &self,
        queue: Option<&QueueName>,
        state: RunState,
        from: Option<RunState>,
    ) -> Result<bool> {
        Ok(self.alone(|books, _| books.set_run_state(queue, state, from.as_ref())))
    }

    async fn guard(&self, queue: &QueueName, change: GuardChange) -> Result<Option<Guard>> {
        Ok(self.alone(|books, now| books.guard(queue, &change, now)))
    }

    async fn subscriptions(&self) -> Result<Vec<Subscription>> {
        Ok(self.alone(|books, _| books.subscriptions()))
    }

    async fn put_subscription(&self, subscription: Subscription) -> Result<PutSubscription> {
        Ok(self.alone(|books, _| books.put_subscription(subscription)))
    }

    async fn delete_subscription(
        &self,
        topic: &TopicName,
        name: &SubscriptionName,
    ) -> Result<bool> {
        Ok(self.alone(|books, _| books.delete_subscription(topic, name)))
    }

    async fn schedules(&self) -> Result<Vec<ScheduleRecord>> {
        Ok(self.alone(|books, _| books.schedules()))
    }

    async fn put_schedule(
        &self,
        name: &ScheduleName,
        schedule: Schedule,
        next_at: Option<Timestamp>,
        precondition: Precondition,
    ) -> Result<PutSchedule> {
        Ok(self.alone(|books, now| books.put_schedule(name, schedule, next_at, &precondition, now)))
    }

    async fn turn_schedule(
        &self,
        name: &ScheduleName,
        version: i64,
        state: ScheduleState,
    ) -> Result<bool> {
        Ok(self.alone(|books, _| books.turn_schedule(name, version, state)))
    }

    async fn delete_schedule(&self, name: &ScheduleName) -> Result<bool> {
        Ok(self.alone(|books, _| books.delete_schedule(name)))
    }

    async fn pump(&self) -> Result<PumpRecord> {
        Ok(self.alone(|books, _| books.pump.clone()))
    }

    async fn set_ceiling(&self, ceiling: u32) -> Result<()> {
        self.alone(|books, _| books.set_ceiling(ceiling));
        Ok(())
    }

    async fn check(&self) -> Result<()> {
        Ok(())
    }

    fn news(&self) -> &News {
        &self.news
    }

    fn handover(&self) -> &Handover {
        &self.handover
    }

    async fn close(&self) {}
}
