//! Where calls gather that share a transaction: group commit.
//!
//! A writer has a few connections, and a task for each. While they commit, calls wait; then one takes all that wait,
//! so that a commit costs the same for one call as for hundreds. It adds no delay of its own. Where a
//! batch fails, each of its calls is done alone, so that only the one that is to blame fails.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use sqlx::PgConnection;
use sqlx::postgres::PgConnectOptions;
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::model::{Lease, Leased, QueueName};
use crate::telemetry::metrics;

use super::super::{Error, Handover, Place, Result};
use super::Incarnations;
use super::facts::Patience;
use super::fault::{Trouble, fault};
use super::news::{Herald, Word};
use super::settle::give_back;
use super::transact::{Breaks, Line, answered, pause};

/// How many calls may wait for a batch before their callers wait for a place.
const CALLS_WAITING_MAX: usize = 4096;
/// How many calls go into one batch.
const CALLS_MAX: usize = 1000;
/// How many bytes go into one batch, more or less.
const WEIGHT_MAX: usize = 4 << 20;
/// How often a batch is tried that others were in the way of.
const TRIES: u32 = 4;
/// How many calls of a writer may wait at once for somebody who uses their keys; each has a connection.
const PATIENT_MAX: usize = 4;
/// How long a call waits to be one of them.
const PLACE_MAX: Duration = Duration::from_secs(10);

/// A kind of call, and how many of them are done in one transaction.
pub(super) trait Batch: Send + Sync + 'static {
    /// What is asked.
    type Call: Send + Sync + 'static;
    /// What is answered.
    type Answer: Send + 'static;
    /// The kind's name, as the metrics say it.
    const NAME: &'static str;

    /// Whether a call brings idempotency keys along, which somebody else may be using.
    fn has_keys(call: &Self::Call) -> bool;

    /// About how many bytes a call brings along.
    fn weight(call: &Self::Call) -> usize;

    /// Does all calls in one transaction, or fails and has done none; answers them in order.
    fn commit<'c>(
        connection: &'c mut PgConnection,
        calls: &'c [&'c Self::Call],
        pumps: &'c Pumps,
        patience: Patience,
    ) -> BoxFuture<'c, Committed<Self::Answer>>;
}

/// What has become of a batch.
pub(super) type Committed<A> = Result<Done<A>, Trouble>;

/// A batch that is committed.
pub(super) struct Done<A> {
    /// To each call, in order.
    pub(super) answers: Vec<A>,
    /// What there is to tell.
    pub(super) word: Word,
    /// What was stored as leased, for those who have a place for it.
    pub(super) handed: Vec<(Place, Leased)>,
}

/// The pumps of this process, as far as messages can be handed over to them.
#[derive(Debug, Default)]
pub(super) struct Pumps {
    pub(super) handover: Arc<Handover>,
    pub(super) incarnations: Arc<Incarnations>,
    /// How often one of this store's lines has broken.
    pub(super) breaks: Breaks,
    /// Queues of which others waited when new messages came last: hardly any of these are handed over.
    pub(super) crowded: std::sync::Mutex<HashSet<QueueName>>,
}

impl Pumps {
    /// The queues of which others waited when new messages came last.
    pub(super) fn crowded(&self) -> std::sync::MutexGuard<'_, HashSet<QueueName>> {
        self.crowded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where calls of one kind are handed in.
pub(super) struct Writer<B: Batch> {
    calls: mpsc::Sender<Waiting<B>>,
}

struct Waiting<B: Batch> {
    call: B::Call,
    reply: oneshot::Sender<Result<B::Answer>>,
}

impl<B: Batch> fmt::Debug for Writer<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer").field("kind", &B::NAME).finish()
    }
}

impl<B: Batch> Writer<B> {
    /// Opens a writer with so many connections, each with a transaction of its own. Once told to stop, it
    /// takes no more calls and does those that wait.
    pub(super) fn open(
        tasks: &TaskTracker,
        connections: usize,
        options: PgConnectOptions,
        herald: &Arc<Herald>,
        pumps: &Arc<Pumps>,
        stop: &CancellationToken,
    ) -> Self {
        let (calls, waiting) = mpsc::channel(CALLS_WAITING_MAX);
        let waiting = Arc::new(Mutex::new(waiting));
        let patient = Arc::new(Semaphore::new(PATIENT_MAX));
        for _ in 0..connections {
            let clerk = Clerk {
                waiting: Arc::clone(&waiting),
                line: Line::new(options.clone(), &pumps.breaks),
                options: options.clone(),
                tasks: tasks.clone(),
                patient: Arc::clone(&patient),
                herald: Arc::clone(herald),
                pumps: Arc::clone(pumps),
                stop: stop.clone(),
            };
            tasks.spawn(clerk.serve());
        }
        Self { calls }
    }

    /// Has a call done, together with others. It is done even if nobody waits for the answer.
    pub(super) async fn ask(&self, call: B::Call) -> Result<B::Answer> {
        let (reply, answer) = oneshot::channel();
        let closed = || Error::Unavailable("the store is closed".into());
        self.calls.send(Waiting { call, reply }).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

/// The task behind a writer.
struct Clerk<B: Batch> {
    /// The others of this writer take from it too, one at a time.
    waiting: Arc<Mutex<mpsc::Receiver<Waiting<B>>>>,
    line: Line,
    options: PgConnectOptions,
    tasks: TaskTracker,
    /// How many calls may wait for a key of somebody else's, beside the line.
    patient: Arc<Semaphore>,
    herald: Arc<Herald>,
    pumps: Arc<Pumps>,
    stop: CancellationToken,
}

impl<B: Batch> Clerk<B> {
    async fn serve(mut self) {
        while let Some(batch) = self.gather().await {
            self.settle(batch).await;
        }
        self.line.close().await;
    }

    /// Waits for a call and takes what waits besides, up to what one transaction should carry.
    async fn gather(&self) -> Option<Vec<Waiting<B>>> {
        let mut waiting = self.waiting.lock().await;
        let first = match self.stop.run_until_cancelled(waiting.recv()).await {
            Some(first) => first?,
            None => {
                waiting.close();
                waiting.recv().await?
            }
        };
        let mut weight = B::weight(&first.call);
        let mut batch = vec![first];
        while weight < WEIGHT_MAX && batch.len() < CALLS_MAX {
            let Ok(next) = waiting.try_recv() else { break };
            weight += B::weight(&next.call);
            batch.push(next);
        }
        Some(batch)
    }

    async fn settle(&mut self, batch: Vec<Waiting<B>>) {
        let calls = batch.iter().map(|waiting| &waiting.call).collect::<Vec<_>>();
        match self.commit(&calls, Patience::Short).await {
            Ok((answers, left)) => {
                for (waiting, answer) in batch.into_iter().zip(answers) {
                    waiting.answer(Ok(answer));
                }
                self.give_back(left).await;
            }
            Err(trouble) => self.find_the_culprit(batch, trouble).await,
        }
    }

    /// Answers a batch that has failed: with its trouble where no single call is to blame, and otherwise
    /// each with its own.
    async fn find_the_culprit(&mut self, batch: Vec<Waiting<B>>, trouble: Trouble) {
        if let Some(error) = trouble.is_for_all() {
            batch.into_iter().for_each(|waiting| waiting.answer(Err(fault(error))));
            return;
        }
        if matches!(trouble, Trouble::KeyInUse) {
            return self.set_those_with_keys_aside(batch).await;
        }
        let alone = batch.len() == 1;
        let mut known = alone.then_some(trouble);
        for waiting in batch {
            let done = match known.take() {
                Some(trouble) => Err(trouble),
                None => self.commit(&[&waiting.call], Patience::Short).await,
            };
            let (answer, left) = match done {
                Err(Trouble::KeyInUse) => {
                    self.wait_beside_the_line(waiting);
                    continue;
                }
                Ok((mut answers, left)) => {
                    (Ok(answers.pop().expect("each call is answered")), left)
                }
                Err(trouble) => (Err(Error::from(trouble)), Vec::new()),
            };
            waiting.answer(answer);
            self.give_back(left).await;
        }
    }

    /// Does those of a batch that have no keys together, and lets the others wait for whoever uses theirs.
    async fn set_those_with_keys_aside(&mut self, batch: Vec<Waiting<B>>) {
        let (with, without): (Vec<_>, Vec<_>) =
            batch.into_iter().partition(|waiting| B::has_keys(&waiting.call));
        with.into_iter().for_each(|waiting| self.wait_beside_the_line(waiting));
        if !without.is_empty() {
            Box::pin(self.settle(without)).await;
        }
    }

    /// Lets a call wait for whoever uses its key, on a connection of its own: nobody else is to wait for that.
    fn wait_beside_the_line(&self, waiting: Waiting<B>) {
        let patient = Arc::clone(&self.patient);
        let mut clerk = Self {
            waiting: Arc::clone(&self.waiting),
            line: Line::new(self.options.clone(), &self.pumps.breaks),
            options: self.options.clone(),
            tasks: self.tasks.clone(),
            patient: Arc::clone(&self.patient),
            herald: Arc::clone(&self.herald),
            pumps: Arc::clone(&self.pumps),
            stop: self.stop.clone(),
        };
        self.tasks.spawn(async move {
            let Ok(Ok(_place)) = timeout(PLACE_MAX, patient.acquire_owned()).await else {
                return waiting.answer(Err(Error::KeyInUse));
            };
            match clerk.commit(&[&waiting.call], Patience::Long).await {
                Ok((mut answers, left)) => {
                    waiting.answer(Ok(answers.pop().expect("each call is answered")));
                    clerk.give_back(left).await;
                }
                Err(trouble) => waiting.answer(Err(Error::from(trouble))),
            }
            clerk.line.close().await;
        });
    }

    /// Does these calls, and hands over what was stored as leased; returns the answers, and what nobody takes
    /// any more.
    async fn commit(
        &mut self,
        calls: &[&B::Call],
        patience: Patience,
    ) -> Result<(Vec<B::Answer>, Vec<Lease>), Trouble> {
        let started = Instant::now();
        let mut tries = 1;
        let Done { answers, word, handed } = loop {
            match self.attempt(calls, patience).await {
                Err(trouble) if tries < TRIES && trouble.is_worth_another_try() => {
                    pause(tries).await;
                    tries += 1;
                }
                done => break done?,
            }
        };
        self.herald.tell(word);
        metrics::commit_seconds(B::NAME).record(started.elapsed());
        metrics::batch_size(B::NAME).record(calls.len() as f64);
        let hand = |(place, leased): (Place, Leased)| place.hand(leased).err();
        let left = handed.into_iter().filter_map(hand).map(|leased| leased.lease);
        Ok((answers, left.collect()))
    }

    /// Gives back what nobody takes any more, so that it need not wait for the end of a lease that nobody has.
    async fn give_back(&mut self, left: Vec<Lease>) {
        if left.is_empty() {
            return;
        }
        let messages = left.len();
        let given_back = async {
            let connection = self.line.connection().await?;
            answered(give_back(connection, left)).await
        };
        match given_back.await {
            Ok(word) => self.herald.tell(word),
            Err(trouble) => {
                let error = Error::from(trouble);
                tracing::warn!(%error, messages, "not given back; they return with their leases");
                self.line.hang_up();
            }
        }
    }

    async fn attempt(&mut self, calls: &[&B::Call], patience: Patience) -> Committed<B::Answer> {
        let connection = self.line.connection().await?;
        let done = answered(B::commit(connection, calls, &self.pumps, patience)).await;
        if done.as_ref().is_err_and(|trouble| trouble.is_for_all().is_some()) {
            self.line.hang_up();
        }
        done
    }
}

impl<B: Batch> Waiting<B> {
    fn answer(self, answer: Result<B::Answer>) {
        // A caller who has gone away needs no answer; the call was done all the same.
        let _ = self.reply.send(answer);
    }
}
