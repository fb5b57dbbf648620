//! One task that does all writing, and commits together whatever waits.
//!
//! While one transaction is being synced, the next calls gather; so a transaction carries one call when
//! the house is idle and hundreds under load, and nobody ever waits for company. Settlements and claims
//! wait in a queue of their own and go first, so that a flood of new messages cannot starve them. The
//! task waits for nothing but SQLite while a transaction is open.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::model::{Leased, Settlement};
use crate::telemetry::metrics;

use super::super::{
    Claim, Enqueue, EnqueueOutcome, Error, Place, Result, Settle, Settled, count_enqueued,
};
use super::desk::Desk;
use super::enqueue::{self, Plan};
use super::fault::{fault, is_known_already, of_one};
use super::{groups, lease, settle};

/// How many calls may wait in each queue; who comes later waits outside.
const CALLS_WAITING_MAX: usize = 1024;
/// How many calls one transaction carries at most.
const CALLS_AT_ONCE_MAX: usize = 1024;
/// How many new messages one transaction takes before it stops taking more calls.
const MESSAGES_AT_ONCE_MAX: usize = 4096;
/// How many bytes of payload one transaction takes before it stops taking more calls.
const BYTES_AT_ONCE_MAX: usize = 16 << 20;

/// The way to the task that writes.
#[derive(Debug)]
pub(super) struct Writer {
    urgent: mpsc::Sender<Work>,
    enqueues: mpsc::Sender<Work>,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// Ends the task when the store is dropped without being closed.
    _stop_on_drop: DropGuard,
}

type Reply<T> = oneshot::Sender<Result<T>>;

/// What is to be written, and who wants to know.
enum Work {
    Settle(Box<Settle>, Reply<Settled>),
    Lease(Asked, Reply<Vec<Leased>>),
    Enqueue(Enqueue, Reply<EnqueueOutcome>),
    Errand(Errand, Reply<Box<dyn Any + Send>>),
}

/// A claim, and the monotonic time at which it was made.
struct Asked {
    claim: Claim,
    at: Instant,
}

/// Something rare, in a transaction of its own.
type Errand = Box<
    dyn for<'d> FnOnce(&'d mut Desk) -> BoxFuture<'d, sqlx::Result<Box<dyn Any + Send>>> + Send,
>;

impl Writer {
    /// Starts the task.
    pub(super) fn start(desk: Desk) -> Self {
        let (urgent, urgent_waiting) = mpsc::channel(CALLS_WAITING_MAX);
        let (enqueues, enqueues_waiting) = mpsc::channel(CALLS_WAITING_MAX);
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let inbox = Inbox {
            urgent: urgent_waiting,
            enqueues: enqueues_waiting,
            stop: stop.clone(),
            put_back: None,
        };
        tasks.spawn(write_until_stopped(desk, inbox));
        tasks.close();
        Self { urgent, enqueues, _stop_on_drop: stop.clone().drop_guard(), stop, tasks }
    }

    pub(super) async fn enqueue(&self, enqueue: Enqueue) -> Result<EnqueueOutcome> {
        ask(&self.enqueues, |reply| Work::Enqueue(enqueue, reply)).await
    }

    pub(super) async fn lease(&self, claim: Claim) -> Result<Vec<Leased>> {
        let asked = Asked { claim, at: Instant::now() };
        ask(&self.urgent, |reply| Work::Lease(asked, reply)).await
    }

    pub(super) async fn settle(&self, settle: Settle) -> Result<Settled> {
        ask(&self.urgent, |reply| Work::Settle(Box::new(settle), reply)).await
    }

    /// Does something rare in a transaction of its own.
    pub(super) async fn errand<T, F>(&self, errand: F) -> Result<T>
    where
        T: Any + Send,
        F: for<'d> FnOnce(&'d mut Desk) -> BoxFuture<'d, sqlx::Result<T>> + Send + 'static,
    {
        let errand: Errand = Box::new(|desk| {
            Box::pin(async move { Ok(Box::new(errand(desk).await?) as Box<dyn Any + Send>) })
        });
        let answer = ask(&self.urgent, |reply| Work::Errand(errand, reply)).await?;
        Ok(*answer.downcast().expect("an errand answers with what it was made to answer with"))
    }

    /// Writes what waits, and ends the task. Twice does no harm.
    pub(super) async fn close(&self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

async fn ask<T>(to: &mpsc::Sender<Work>, work: impl FnOnce(Reply<T>) -> Work) -> Result<T> {
    let closed = || Error::Unavailable("the store is closed, or failed over this call".into());
    let (reply, answer) = oneshot::channel();
    to.send(work(reply)).await.map_err(|_| closed())?;
    answer.await.map_err(|_| closed())?
}

async fn write_until_stopped(mut desk: Desk, mut inbox: Inbox) {
    while let Some(first) = inbox.next().await {
        let write = async {
            match first {
                Work::Errand(errand, reply) => run_errand(&mut desk, errand, reply).await,
                first => {
                    let batch = inbox.gather(first);
                    run(&mut desk, batch).await;
                }
            }
        };
        // A bug met in one transaction must not end all writing. Its callers hear that it was not done,
        // and nothing of it is kept: what the desk knows is read or made again when the next one begins.
        if AssertUnwindSafe(write).catch_unwind().await.is_err() {
            tracing::error!("a bug was met while writing; the transaction is rolled back");
            desk.roll_back(None).await;
        }
    }
    desk.close().await;
}

/// Where calls wait.
struct Inbox {
    urgent: mpsc::Receiver<Work>,
    enqueues: mpsc::Receiver<Work>,
    stop: CancellationToken,
    /// An errand that was met while a batch was gathered: it comes next.
    put_back: Option<Work>,
}

impl Inbox {
    /// The next call; `None` once the store is closed and nothing waits any more.
    async fn next(&mut self) -> Option<Work> {
        if let Some(work) = self.put_back.take() {
            return Some(work);
        }
        loop {
            tokio::select! {
                biased;
                Some(work) = self.urgent.recv() => return Some(work),
                Some(work) = self.enqueues.recv() => return Some(work),
                () = self.stop.cancelled(), if !self.urgent.is_closed() => {
                    self.urgent.close();
                    self.enqueues.close();
                }
                else => return None,
            }
        }
    }

    /// All that waits besides, as far as one transaction can carry it.
    fn gather(&mut self, first: Work) -> Batch {
        let mut batch = Batch::default();
        self.put_back = batch.add(first);
        while self.put_back.is_none() && batch.has_room() {
            let Ok(work) = self.urgent.try_recv() else { break };
            self.put_back = batch.add(work);
        }
        while batch.has_room() {
            let Ok(work) = self.enqueues.try_recv() else { break };
            batch.add(work);
        }
        batch
    }
}

/// Calls that share a transaction.
#[derive(Default)]
struct Batch {
    settles: Vec<(Box<Settle>, Reply<Settled>)>,
    enqueues: Vec<(Enqueue, Reply<EnqueueOutcome>)>,
    claims: Vec<(Asked, Reply<Vec<Leased>>)>,
    messages: usize,
    bytes: usize,
}

impl Batch {
    /// Adds a call, or gives it back: an errand travels alone.
    fn add(&mut self, work: Work) -> Option<Work> {
        match work {
            Work::Settle(settle, reply) => self.settles.push((settle, reply)),
            // Whoever stopped waiting for messages must not get any.
            Work::Lease(_, reply) if reply.is_closed() => (),
            Work::Lease(asked, reply) => self.claims.push((asked, reply)),
            Work::Enqueue(enqueue, reply) => {
                self.messages += enqueue.messages.len();
                self.bytes += enqueue.messages.iter().map(|m| m.body.len()).sum::<usize>();
                self.enqueues.push((enqueue, reply));
            }
            Work::Errand(..) => return Some(work),
        }
        None
    }

    fn len(&self) -> usize {
        self.settles.len() + self.enqueues.len() + self.claims.len()
    }

    fn has_room(&self) -> bool {
        self.len() < CALLS_AT_ONCE_MAX
            && self.messages < MESSAGES_AT_ONCE_MAX
            && self.bytes < BYTES_AT_ONCE_MAX
    }

    /// Each call alone.
    fn split(self) -> impl Iterator<Item = Self> {
        let settles = self.settles.into_iter();
        let settles = settles.map(|call| Self { settles: vec![call], ..Self::default() });
        let enqueues = self.enqueues.into_iter();
        let enqueues = enqueues.map(|call| Self { enqueues: vec![call], ..Self::default() });
        let claims = self.claims.into_iter();
        let claims = claims.map(|call| Self { claims: vec![call], ..Self::default() });
        settles.chain(enqueues).chain(claims)
    }
}

/// What a transaction answers, in the order of the batch.
struct Answers {
    settles: Vec<Result<Settled>>,
    enqueues: Vec<Result<EnqueueOutcome>>,
    claims: Vec<Result<Vec<Leased>>>,
    /// What was stored as leased, for those who have a place for it.
    handed: Vec<(Place, Leased)>,
}

/// Where a transaction failed. What failed before the commit has certainly not happened.
enum Failed {
    Applying(sqlx::Error),
    Committing(sqlx::Error),
}

/// Writes a batch and answers everybody in it. Where it fails, each call is tried alone, so that only
/// the one which the database does not want fails.
async fn run(desk: &mut Desk, batch: Batch) {
    desk.careful = false;
    match attempt(desk, &batch).await {
        Ok(answers) => answer(desk, batch, answers).await,
        Err(Failed::Applying(error)) if batch.len() > 1 || is_known_already(&error) => {
            tracing::debug!(%error, calls = batch.len(), "trying each call of a batch alone");
            desk.careful = true;
            for alone in batch.split() {
                match attempt(desk, &alone).await {
                    Ok(answers) => answer(desk, alone, answers).await,
                    Err(Failed::Applying(error) | Failed::Committing(error)) => fail(alone, error),
                }
            }
        }
        Err(Failed::Applying(error) | Failed::Committing(error)) => fail(batch, error),
    }
}

async fn attempt(desk: &mut Desk, batch: &Batch) -> Result<Answers, Failed> {
    let started = Instant::now();
    let applied = match desk.begin().await {
        Ok(()) => apply(desk, batch).await,
        Err(error) => return Err(Failed::Applying(error)),
    };
    let done = match applied {
        Ok(answers) => desk.commit().await.map(|()| answers).map_err(Failed::Committing),
        Err(error) => Err(Failed::Applying(error)),
    };
    if let Err(Failed::Applying(error) | Failed::Committing(error)) = &done {
        desk.roll_back(Some(error)).await;
    }
    metrics::commit_seconds("write").record(started.elapsed());
    metrics::batch_size("write").record(batch.len() as f64);
    done
}

/// Settlements first, because they make room; claims last, because then they find what just came.
async fn apply(desk: &mut Desk, batch: &Batch) -> sqlx::Result<Answers> {
    let settles = batch.settles.iter().map(|(settle, _)| &**settle).collect::<Vec<_>>();
    let calls = batch.enqueues.iter().map(|(enqueue, _)| enqueue).collect::<Vec<_>>();
    let unsendable = settles.iter().map(|settle| settle::unsendable(desk, settle));
    let unsendable = unsendable.collect::<Vec<_>>();
    let sendable = settles.iter().zip(&unsendable).filter(|(_, why)| why.is_none());
    let sent = sendable.flat_map(|(settle, _)| settle::sent(settle));
    let sent = sent.chain(calls.iter().flat_map(|call| &call.messages)).collect::<Vec<_>>();

    let mut plan = Plan::load(desk, &sent, &calls).await?;
    let settles = settle::settle(desk, &mut plan, &settles, unsendable).await?;
    let enqueues = enqueue::plan_calls(desk, &mut plan, calls.iter().copied());
    let handed = plan.write(desk).await?;
    groups::line_up(desk).await?;
    let mut claims = Vec::with_capacity(batch.claims.len());
    for (asked, _) in &batch.claims {
        claims.push(match desk.queues.named(&asked.claim.queue) {
            Ok(Some(queue)) => Ok(lease::lease(desk, &queue, &asked.claim, asked.at).await?),
            Ok(None) => Ok(Vec::new()),
            Err(error) => Err(of_one(error)),
        });
    }
    // What a claim could not read is dead, and its group goes on.
    groups::line_up(desk).await?;
    Ok(Answers { settles, enqueues, claims, handed })
}

/// Tells everybody. Nobody may listen any more; then the write has happened all the same.
async fn answer(desk: &mut Desk, batch: Batch, answers: Answers) {
    for ((_, reply), answer) in batch.settles.into_iter().zip(answers.settles) {
        let _ = reply.send(answer);
    }
    let hand = |(place, leased): (Place, Leased)| place.hand(leased).err();
    let mut left =
        answers.handed.into_iter().filter_map(hand).map(|leased| *leased).collect::<Vec<_>>();
    count_enqueued(answers.enqueues.iter().filter_map(|outcome| outcome.as_ref().ok()));
    for ((_, reply), answer) in batch.enqueues.into_iter().zip(answers.enqueues) {
        let _ = reply.send(answer);
    }
    for ((_, reply), answer) in batch.claims.into_iter().zip(answers.claims) {
        left.extend(reply.send(answer).err().and_then(Result::ok).unwrap_or_default());
    }
    if !left.is_empty() {
        put_back(desk, left).await;
    }
}

/// Gives back what was leased for somebody who stopped waiting, so that it need not wait for the end of
/// a lease that nobody has.
async fn put_back(desk: &mut Desk, leased: Vec<Leased>) {
    let release = |leased: Leased| Settle {
        lease: leased.lease,
        settlement: Settlement::Release,
        delivery: None,
        sent: Vec::new(),
    };
    let mut batch = Batch::default();
    for leased in leased {
        let nobody = oneshot::channel().0;
        batch.settles.push((Box::new(release(leased)), nobody));
    }
    if let Err(Failed::Applying(error) | Failed::Committing(error)) = attempt(desk, &batch).await {
        tracing::warn!(%error, messages = batch.len(), "not given back; they return with their leases");
    }
}

fn fail(batch: Batch, error: sqlx::Error) {
    let error = Arc::new(error);
    for (_, reply) in batch.settles {
        let _ = reply.send(Err(fault(&error)));
    }
    for (_, reply) in batch.enqueues {
        let _ = reply.send(Err(fault(&error)));
    }
    for (_, reply) in batch.claims {
        let _ = reply.send(Err(fault(&error)));
    }
}

async fn run_errand(desk: &mut Desk, errand: Errand, reply: Reply<Box<dyn Any + Send>>) {
    let started = Instant::now();
    let done = match desk.begin().await {
        Ok(()) => match errand(desk).await {
            Ok(answer) => end(desk).await.map(|()| answer),
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    };
    if let Err(error) = &done {
        desk.roll_back(Some(error)).await;
    }
    metrics::commit_seconds("errand").record(started.elapsed());
    let _ = reply.send(done.map_err(of_one)); // the write happened all the same
}

async fn end(desk: &mut Desk) -> sqlx::Result<()> {
    groups::line_up(desk).await?;
    desk.commit().await
}
