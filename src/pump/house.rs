//! All pumps of one process: start, stop, drain, limits, and what they really do now.
//!
//! What is wanted stands in the store: queues, settings, who is stopped. `line_up.rs` brings the pumps of this
//! process in line with it.

use std::collections::{BTreeMap, HashMap};
use std::ops::AddAssign;
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::{Clock, SystemClock};
use crate::deliver::{self, Connector, Handler};
use crate::model::{self, GuardChange, NewMessage, QueueName, ReplicaName, RunState, Stopped};
use crate::store::{
    self, CEILING_DEFAULT, Enqueue, EnqueueOutcome, Enqueued, Precondition, PutQueue, Store,
};
use crate::telemetry::metrics;

use super::QueuePump;
use super::care::Care;
use super::ceiling::Ceiling;
use super::embed::Queue;
use super::keeper::{self, Calls};
use super::outcomes::Outcomes;
use super::round;

/// A message pump over one store. Cheap to clone; all clones are the same pump.
///
/// It runs until [`Pumphouse::shut_down`]; dropping it does not end it.
#[derive(Debug, Clone)]
pub struct Pumphouse(Arc<House>);

/// What is to be known before a pump starts.
#[derive(Debug)]
pub struct Builder {
    store: Arc<dyn Store>,
    replica: Option<ReplicaName>,
    clock: Arc<dyn Clock>,
    queues: Vec<Queue>,
    answer_max: usize,
}

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

impl AddAssign for StopReport {
    fn add_assign(&mut self, other: Self) {
        self.drained += other.drained;
        self.aborted += other.aborted;
        self.released += other.released;
    }
}

/// What a pump is doing now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overview {
    /// Whether it is to run.
    pub state: RunState,
    /// This process.
    pub replica: ReplicaName,
    /// All processes alive on this store.
    pub replicas: Vec<ReplicaName>,
    /// Deliveries open in this process.
    pub in_flight: u32,
    /// How many may be open at once, over all queues of this process.
    pub ceiling: u32,
    /// Each queue of this process.
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

/// Everything that the pumps of one process share.
#[derive(Debug)]
pub(super) struct House {
    pub(super) store: Arc<dyn Store>,
    pub(super) replica: ReplicaName,
    /// Changes with every start, so that leases of an earlier life are told apart.
    pub(super) incarnation: i64,
    /// The store's revision in the last quiet second after which everything was in line.
    pub(super) revision: AtomicI64,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) connector: Connector,
    pub(super) answer_max: usize,
    /// Handlers in this program, by queue.
    pub(super) services: HashMap<QueueName, Handler>,
    pub(super) ceiling: Arc<Ceiling>,
    pub(super) care: Arc<Care>,
    pub(super) outcomes: Arc<Outcomes>,
    pub(super) calls: Calls,
    known: Mutex<Known>,
    pumps: Mutex<BTreeMap<QueueName, Arc<QueuePump>>>,
    /// Pumps of queues that were deleted while something of them was open. Locked after `pumps`.
    gone: Mutex<Vec<Arc<QueuePump>>>,
    /// Held while pumps are brought in line, so that two changes do not cross.
    pub(super) lining_up: tokio::sync::Mutex<()>,
    pub(super) leaving: CancellationToken,
    tasks: TaskTracker,
}

/// What this process last heard from the store.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) state: RunState,
    replicas: Vec<ReplicaName>,
    heard: Instant,
    /// What the store's clock said, and when.
    pub(super) clock: Option<(Timestamp, Instant)>,
    /// Whether something is stopped until a moment, which no news will tell.
    pub(super) timed_pauses: bool,
}

impl Known {
    /// What the store's clock should say now, if it has said something.
    pub(super) fn store_now(&self) -> Option<Timestamp> {
        let (then, asked) = self.clock?;
        Some(then.checked_add(asked.elapsed()).unwrap_or(Timestamp::MAX))
    }
}

impl Pumphouse {
    /// A pump over this store, to be set up.
    pub fn builder(store: Arc<dyn Store>) -> Builder {
        Builder {
            store,
            replica: None,
            clock: Arc::new(SystemClock),
            queues: Vec::new(),
            answer_max: 1 << 20,
        }
    }

    /// The store below.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.0.store
    }

    /// This process' name.
    pub fn replica(&self) -> &ReplicaName {
        &self.0.replica
    }

    pub(super) fn house(&self) -> &Arc<House> {
        &self.0
    }

    pub(super) fn outcomes(&self) -> &Arc<Outcomes> {
        &self.0.outcomes
    }

    pub(super) fn leaving(&self) -> &CancellationToken {
        &self.0.leaving
    }

    pub(super) fn queue_pump(&self, queue: &QueueName) -> Option<Arc<QueuePump>> {
        self.0.lock_pumps().get(queue).cloned()
    }

    /// Takes messages in. See [`Store::enqueue`]. **Fails** with [`Rejected`](store::Error::Rejected) where one of them has
    /// what no message may have: a group together with a delay or a priority, a header that is reserved.
    pub async fn enqueue(&self, enqueue: Enqueue) -> store::Result<EnqueueOutcome> {
        enqueue.messages.iter().try_for_each(store::check)?;
        self.0.store.enqueue(enqueue).await
    }

    /// Takes one message in.
    pub async fn send(&self, message: NewMessage) -> store::Result<Enqueued> {
        let enqueue = Enqueue { messages: vec![message], atomic: false, batch: None };
        match self.enqueue(enqueue).await? {
            EnqueueOutcome::Done(mut all) if all.len() == 1 => Ok(all.remove(0)),
            outcome => {
                let what = format!("one message was sent, and the store answered {outcome:?}");
                Err(store::Error::Corrupt { what, source: None })
            }
        }
    }

    /// Starts a queue, now and after every restart. `false` where there is none. Twice does no harm.
    pub async fn start_queue(&self, queue: &QueueName) -> store::Result<bool> {
        let found = self.0.store.set_run_state(Some(queue), RunState::Running, None).await?;
        self.0.store.guard(queue, GuardChange::Lifted).await?;
        self.0.line_up().await?;
        Ok(found)
    }

    /// Stops a queue, now and after every restart, and returns once no delivery of it is open here.
    ///
    /// `None` where there is no such queue. Twice: every caller waits for the same end; a shorter deadline
    /// shortens it for all. Other replicas stop within a second and are not waited for.
    pub async fn stop_queue(
        &self,
        queue: &QueueName,
        stop: Stop,
    ) -> store::Result<Option<StopReport>> {
        let (found, report) = self.0.stop(Some(queue), stop).await?;
        Ok(found.then_some(report))
    }

    /// Has a queue's handler asked again, whatever it or its breaker said.
    pub async fn lift(&self, queue: &QueueName) -> store::Result<()> {
        // All processes hear of it, this one too, if there was something to lift.
        self.0.store.guard(queue, GuardChange::Lifted).await.map(drop)
    }

    /// Starts the whole pump: every queue that is not stopped itself.
    pub async fn start(&self) -> store::Result<()> {
        self.0.store.set_run_state(None, RunState::Running, None).await?;
        self.0.line_up().await
    }

    /// Stops the whole pump, as [`Pumphouse::stop_queue`] does for one queue.
    pub async fn stop(&self, stop: Stop) -> store::Result<StopReport> {
        Ok(self.0.stop(None, stop).await?.1)
    }

    /// Sets how many deliveries of all queues may be open at once; in force when it returns.
    pub async fn set_ceiling(&self, ceiling: u32) -> store::Result<()> {
        self.0.store.set_ceiling(ceiling).await?;
        self.0.line_up().await
    }

    /// Looks at queues and settings now, and returns once they are in force in this process.
    pub async fn refresh(&self) -> store::Result<()> {
        self.0.line_up().await
    }

    /// What it is doing now.
    pub fn overview(&self) -> Overview {
        let queues = self.0.pumps().into_iter().map(|pump| QueueOverview {
            queue: pump.queue.clone(),
            in_flight: pump.gate.open(),
            limit: pump.gate.limit(),
        });
        let known = self.0.known();
        Overview {
            state: known.state.clone(),
            replica: self.0.replica.clone(),
            replicas: known.replicas.clone(),
            in_flight: self.0.ceiling.open(),
            ceiling: self.0.ceiling.limit(),
            queues: queues.collect(),
        }
    }

    /// Whether it is on its way out.
    pub fn is_shutting_down(&self) -> bool {
        self.0.leaving.is_cancelled()
    }

    /// Ends it: takes no new lease, lets open deliveries go on for `deadline`, then cuts them and gives
    /// their leases back. What was started or stopped by an operator stays so for the next start.
    pub async fn shut_down(&self, deadline: Duration) -> StopReport {
        let deadline = tokio::time::Instant::now() + deadline;
        self.0.leaving.cancel();
        // Whoever is bringing pumps in line may be about to start one: let it end first, but not for long,
        // because it may be waiting for a database that is away.
        let lining_up = tokio::time::timeout(GOODBYE_MAX, self.0.lining_up.lock()).await;
        let rounds = self.0.close_rounds(None);
        drop(lining_up);
        let report = self.0.alive_during(round::end_all(rounds, deadline)).await;
        self.0.tasks.close();
        if tokio::time::timeout(GOODBYE_MAX, self.0.tasks.wait()).await.is_err() {
            tracing::warn!("left while the database did not answer");
        }
        // Without it the others wait for `good_for` to run out before they take over the shares.
        match tokio::time::timeout(GOODBYE_MAX, self.0.attend(true)).await {
            Ok(Ok(_)) => (),
            Ok(Err(error)) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "left without a goodbye");
            }
            Err(_) => tracing::warn!("left without a goodbye: the database does not answer"),
        }
        report
    }
}

impl Builder {
    /// The name of this process; a random one without it.
    #[must_use]
    pub fn replica(mut self, name: ReplicaName) -> Self {
        self.replica = Some(name);
        self
    }

    /// Where time and chance come from; the machine without it.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// How many bytes of an HTTP handler's answer are read that carries messages; 1 MiB without it.
    #[must_use]
    pub fn answer_max(mut self, bytes: usize) -> Self {
        self.answer_max = bytes;
        self
    }

    /// A queue whose handler is in this program. Made at the start if there is none; if there is one, its
    /// stored settings stay, but for the handler.
    #[must_use]
    pub fn queue(mut self, queue: Queue) -> Self {
        self.queues.push(queue);
        self
    }

    /// Starts to pump: takes back what an earlier life of this process had leased, and goes to work.
    pub async fn start(self) -> store::Result<Pumphouse> {
        metrics::describe();
        for queue in &self.queues {
            declare(&*self.store, queue).await?;
        }
        let chance = getrandom::u64().expect("the operating system has random numbers");
        let replica = self.replica.unwrap_or_else(|| {
            ReplicaName::parse(&format!("replica-{chance:016x}")).expect("hex digits make a name")
        });
        let known = Known {
            state: RunState::Running,
            replicas: Vec::new(),
            heard: Instant::now(),
            clock: None,
            timed_pauses: false,
        };
        let house = Arc::new(House {
            store: self.store,
            replica,
            incarnation: (chance >> 1).cast_signed(),
            revision: AtomicI64::new(0),
            clock: self.clock,
            connector: deliver::connector(),
            answer_max: self.answer_max,
            services: self.queues.into_iter().map(|queue| (queue.name, queue.handler)).collect(),
            ceiling: Ceiling::new(CEILING_DEFAULT),
            care: Arc::default(),
            outcomes: Arc::default(),
            calls: Calls::default(),
            known: Mutex::new(known),
            pumps: Mutex::default(),
            gone: Mutex::default(),
            lining_up: tokio::sync::Mutex::default(),
            leaving: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        house.attend(false).await?;
        house.line_up().await?;
        house.spawn_upkeep();
        Ok(Pumphouse(house))
    }
}

async fn declare(store: &dyn Store, queue: &Queue) -> store::Result<()> {
    let settings = queue.settings.clone();
    let put = store.put_queue(&queue.name, settings, Precondition::Absent).await?;
    if put != PutQueue::PreconditionFailed {
        return Ok(());
    }
    if let Some(found) = store.queue(&queue.name).await?
        && found.settings.handler != model::Handler::Service
    {
        let settings = found.settings.with_handler(model::Handler::Service);
        store.put_queue(&queue.name, settings, Precondition::Exists).await?;
    }
    Ok(())
}

impl House {
    fn spawn_upkeep(self: &Arc<Self>) {
        self.tasks.spawn(keeper::keep_schedule(Arc::clone(self)));
        self.tasks.spawn(keeper::take_back_leases(Arc::clone(self)));
        self.tasks.spawn(keeper::sweep(Arc::clone(self)));
        self.tasks.spawn(Arc::clone(self).keep_in_line());
        self.tasks.spawn(Arc::clone(self).mind_own_silence());
        self.tasks.spawn(Arc::clone(self).keep_schedules());
    }

    pub(super) fn stopped(&self, stop: Stop) -> Stopped {
        Stopped { at: self.clock.now(), by: stop.by, reason: stop.reason, until: stop.until }
    }

    pub(super) fn pumps(&self) -> Vec<Arc<QueuePump>> {
        self.lock_pumps().values().cloned().collect()
    }

    pub(super) fn heard(&self, at: Instant) {
        self.known().heard = at;
    }

    pub(super) fn unheard_for(&self) -> Duration {
        self.known().heard.elapsed()
    }

    pub(super) fn set_replicas(&self, replicas: Vec<ReplicaName>) {
        self.known().replicas = replicas;
    }

    /// Whether no other process is known to work on this store.
    pub(super) fn is_alone(&self) -> bool {
        self.known().replicas.len() <= 1
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_gone(&self) -> MutexGuard<'_, Vec<Arc<QueuePump>>> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_pumps(&self) -> MutexGuard<'_, BTreeMap<QueueName, Arc<QueuePump>>> {
        self.pumps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a goodbye may take.
const GOODBYE_MAX: Duration = Duration::from_secs(1);
