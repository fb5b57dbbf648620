//! Brings the pumps of this process in line with what the store wants: which queues there are, how they
//! are set, who is stopped. Whenever something changed, and, if a word of it was lost, within a second.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::deliver::{self, Surroundings};
use crate::model::{
    self, Breaker, GuardChange, QueueName, QueueRecord, QueueSettings, RunState, Stopped,
};
use crate::store;
use crate::telemetry::metrics::QueueMeters;

use super::ceiling::Below;
use super::gate::Gate;
use super::house::{House, Stop, StopReport};
use super::pull::Turnstile;
use super::round::{self, Mode, Round};
use super::{QueuePump, SETTLEMENTS_WAITING_MAX, Setup};

impl House {
    /// Brings the pumps in line whenever something changed, and shows that this process is alive.
    pub(super) async fn keep_in_line(self: Arc<Self>) {
        let mut news = self.store.news().of_settings();
        let mut wait = ATTEND_EVERY;
        loop {
            let told = tokio::time::timeout(wait, news.changed());
            let Some(told) = self.leaving.run_until_cancelled(told).await else { return };
            news.mark_unchanged();
            let looked = match told {
                Ok(_) => self.line_up_and_attend().await,
                Err(_) => self.attend_and_line_up_if_changed().await,
            };
            wait = match looked {
                Ok(true) => ATTEND_WHILE_WAITING,
                Ok(false) => ATTEND_EVERY,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "cannot look at the queues; trying again");
                    ATTEND_EVERY
                }
            };
            self.store.news().forget_unheard();
        }
    }

    /// Brings the pumps of this process in line with what the store wants; in force when it returns.
    pub(super) async fn line_up(self: &Arc<Self>) -> store::Result<()> {
        self.line_up_and_attend().await.map(drop)
    }

    /// The quiet second: shows that this process is alive, and reads the queues only if something changed.
    async fn attend_and_line_up_if_changed(self: &Arc<Self>) -> store::Result<bool> {
        let _one_at_a_time = self.lining_up.lock().await;
        let attended = self.attend(false).await?;
        // Compared with the last quiet second, not with the last reading: what changed during a reading
        // is read again.
        let before = self.revision.load(Ordering::Relaxed);
        if before == attended.revision && !self.known().timed_pauses {
            return Ok(attended.waiting);
        }
        let waiting = self.line_up_alone().await?;
        self.revision.store(attended.revision, Ordering::Relaxed);
        Ok(waiting)
    }

    async fn line_up_and_attend(self: &Arc<Self>) -> store::Result<bool> {
        let _one_at_a_time = self.lining_up.lock().await;
        self.line_up_alone().await
    }

    /// Stops a queue or, without one, all; returns whether there is one, and what became of its deliveries.
    ///
    /// Closed before the store is told, so that nothing is leased after the call, and so that the deadline
    /// cuts although the database is away. If the store could not be told, what was closed is brought in
    /// line with what stands there within a second of its next answer.
    pub(super) async fn stop(
        self: &Arc<Self>,
        queue: Option<&QueueName>,
        stop: Stop,
    ) -> store::Result<(bool, StopReport)> {
        let deadline = tokio::time::Instant::now() + stop.deadline;
        let mut rounds = self.close_rounds(queue);
        let ends = round::end_all(rounds.clone(), deadline);
        let tell = tokio::time::timeout_at(deadline + TELL_MAX, self.close_and_tell(queue, stop));
        let (told, _) = tokio::join!(tell, ends);
        let (found, closed) = told.map_err(|_| {
            self.revision.store(OUT_OF_LINE, Ordering::Relaxed);
            store::Error::Unavailable("it could not be told of the stop in time".into())
        })??;
        for round in closed {
            if rounds.iter().all(|known| !Arc::ptr_eq(known, &round)) {
                rounds.push(round);
            }
        }
        Ok((found, round::end_all(rounds, deadline).await))
    }

    /// Closes once more, under the lock, so that nobody who still reads the old state opens a round again.
    async fn close_and_tell(
        self: &Arc<Self>,
        queue: Option<&QueueName>,
        stop: Stop,
    ) -> store::Result<(bool, Vec<Arc<Round>>)> {
        let _one_at_a_time = self.lining_up.lock().await;
        // Whatever happens from here on, also that nobody waits for the end of this: the next quiet second
        // looks at the queues.
        self.revision.store(OUT_OF_LINE, Ordering::Relaxed);
        let rounds = self.close_rounds(queue);
        let state = RunState::Stopped(self.stopped(stop));
        let found = self.store.set_run_state(queue, state, None).await?;
        self.line_up_alone().await?;
        Ok((found, rounds))
    }

    /// Closes what runs of one queue or of all; returns what has not ended yet.
    pub(super) fn close_rounds(&self, queue: Option<&QueueName>) -> Vec<Arc<Round>> {
        let mut pumps = self.pumps();
        pumps.extend(self.lock_gone().iter().cloned());
        pumps.retain(|pump| queue.is_none_or(|queue| pump.queue == *queue));
        pumps.iter().flat_map(|pump| pump.close_rounds()).collect()
    }

    async fn line_up_alone(self: &Arc<Self>) -> store::Result<bool> {
        if self.leaving.is_cancelled() {
            return Ok(false);
        }
        let pump = self.store.pump().await?;
        let state = self.start_if_time(None, pump.state).await?;
        // Before they are read, so that what is told meanwhile is not taken back.
        let told = |pump: Arc<QueuePump>| (pump.queue.clone(), pump.guarding().told());
        let told = self.pumps().into_iter().map(told).collect::<HashMap<_, _>>();
        let mut queues = self.store.queues().await?;
        for queue in &mut queues {
            let state = std::mem::take(&mut queue.state);
            queue.state = self.start_if_time(Some(&queue.name), state).await?;
        }
        // Some now and the others a second later, so that this process goes on to show that it is alive.
        let tried = tokio::time::timeout(ATTEND_EVERY, self.try_again_if_time(&mut queues)).await;
        if let Ok(Err(error)) = tried {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "cannot try an open breaker; trying again");
        }
        let timed = |state: &RunState| matches!(state, RunState::Stopped(stopped) if stopped.until.is_some());
        let is_open = |queue: &QueueRecord| matches!(queue.guard.breaker, Breaker::Open { .. });
        let waits = |queue: &QueueRecord| timed(&queue.state) || is_open(queue);
        let timed_pauses = timed(&state) || queues.iter().any(waits);
        {
            let mut known = self.known();
            known.state = state.clone();
            known.timed_pauses = timed_pauses;
        }
        self.drop_missing(&queues);
        for queue in &queues {
            self.line_up_queue(queue);
        }
        // Gates are moved before anything new is started behind them.
        for queue in &queues {
            if let Some(pump) = self.lock_pumps().get(&queue.name) {
                pump.set_guard(&queue.guard, told.get(&queue.name).copied());
            }
        }
        let handled = self.pumps().iter().filter(|pump| pump.setup().handler.is_some()).count();
        self.ceiling.set(pump.ceiling, handled);
        let attended = self.attend(false).await?;
        for queue in &queues {
            if let Some(pump) = self.lock_pumps().get(&queue.name)
                && !self.leaving.is_cancelled()
            {
                pump.set_mode(mode(&state, queue, pump));
            }
        }
        Ok(attended.waiting)
    }

    /// Ends a timed pause whose time has come.
    async fn start_if_time(
        &self,
        queue: Option<&QueueName>,
        state: RunState,
    ) -> store::Result<RunState> {
        match &state {
            RunState::Stopped(Stopped { until: Some(until), .. }) if *until <= self.clock.now() => {
                let due = Some(state.clone());
                let started = self.store.set_run_state(queue, RunState::Running, due).await?;
                // Where it was not, an operator said something else meanwhile, and the news of it is
                // under way.
                Ok(if started { RunState::Running } else { state })
            }
            RunState::Stopped(_) | RunState::Running => Ok(state),
        }
    }

    /// Lets some deliveries through breakers that were open for long enough, and closes those that nobody wants.
    async fn try_again_if_time(&self, queues: &mut [QueueRecord]) -> store::Result<()> {
        let now = self.known().store_now();
        for queue in queues {
            let change = match (&queue.guard.breaker, &queue.settings.breaker) {
                (Breaker::Closed, _) | (Breaker::HalfOpen { .. }, Some(_)) => continue,
                (Breaker::Open { .. }, Some(breaker)) => {
                    if now.is_some_and(|now| !queue.guard.is_to_be_tried(breaker, now)) {
                        continue;
                    }
                    // The store looks at its own clock, and does nothing before the time.
                    GuardChange::TimeIsUp(breaker.clone())
                }
                (Breaker::Open { .. } | Breaker::HalfOpen { .. }, None) => GuardChange::Lifted,
            };
            if let Some(guard) = self.store.guard(&queue.name, change).await? {
                queue.guard = guard;
            }
        }
        Ok(())
    }

    /// Stops the pumps of queues that are gone, and keeps those that still have something open.
    fn drop_missing(&self, queues: &[QueueRecord]) {
        let mut pumps = self.lock_pumps();
        let missing =
            pumps.extract_if(.., |name, _| queues.iter().all(|queue| queue.name != *name));
        let mut gone = self.lock_gone();
        for (_, pump) in missing {
            pump.set_mode(None);
            gone.push(pump);
        }
        gone.retain(|pump| pump.is_open());
    }

    fn line_up_queue(self: &Arc<Self>, queue: &QueueRecord) {
        let mut pumps = self.lock_pumps();
        // A queue that was deleted and made again has the gate behind which the old one is still open.
        let again = self.lock_gone().extract_if(.., |pump| pump.queue == queue.name).next();
        if let Some(pump) = again {
            pump.guarding().forget();
            pumps.insert(queue.name.clone(), pump);
        }
        if let Some(pump) = pumps.get(&queue.name) {
            if pump.setup().settings != queue.settings {
                let setup = self.setup(&queue.name, &queue.settings, &pump.meters);
                *pump.setup.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(setup);
                // Narrowed at once; widened only once the share is known.
                pump.share.fetch_min(queue.settings.concurrency.most(), Ordering::Relaxed);
                pump.set_gate();
            }
            return;
        }
        let meters = Arc::new(QueueMeters::of(&queue.name));
        let setup = self.setup(&queue.name, &queue.settings, &meters);
        let pump = QueuePump {
            queue: queue.name.clone(),
            replica: self.replica.clone(),
            store: Arc::clone(&self.store),
            clock: Arc::clone(&self.clock),
            meters,
            gate: Gate::new(0),
            ceiling: Arc::clone(&self.ceiling),
            below: Below::default(),
            care: Arc::clone(&self.care),
            setup: RwLock::new(Arc::new(setup)),
            guarding: Mutex::default(),
            pace: Mutex::default(),
            share: AtomicU32::new(0),
            replicas: AtomicUsize::new(1),
            rounds: Mutex::default(),
            held: AtomicUsize::new(0),
            late: AtomicBool::new(false),
            settling: Semaphore::new(SETTLEMENTS_WAITING_MAX),
            fair: AtomicBool::new(false),
            usual: AtomicU64::new(0),
            usual_size: AtomicU64::new(0),
            turnstile: Turnstile::default(),
            destinations: Arc::default(),
            outcomes: Arc::clone(&self.outcomes),
        };
        pumps.insert(queue.name.clone(), Arc::new(pump));
    }

    fn setup(
        &self,
        name: &QueueName,
        settings: &QueueSettings,
        meters: &Arc<QueueMeters>,
    ) -> Setup {
        let handler = match &settings.handler {
            model::Handler::Http(http) => {
                let (connector, clock) = (self.connector.clone(), Arc::clone(&self.clock));
                Some(deliver::http_handler(connector, http, clock, self.answer_max))
            }
            model::Handler::Push(push) => {
                let (connector, clock) = (self.connector.clone(), Arc::clone(&self.clock));
                Some(deliver::push_handler(connector, push, clock, self.answer_max))
            }
            model::Handler::Builtin { name } => Some(deliver::builtin(*name)),
            model::Handler::Service => self.services.get(name).cloned(),
            model::Handler::Pull => None,
        };
        let around = Surroundings { timeout: settings.timeout(), meters: Arc::clone(meters) };
        let handler = handler.map(|handler| deliver::pipeline(handler, &around));
        Setup { settings: settings.clone(), handler }
    }
}

/// What a queue's pump is to do, if anything.
fn mode(pump_state: &RunState, queue: &QueueRecord, pump: &QueuePump) -> Option<Mode> {
    let setup = pump.setup();
    if setup.handler.is_none() && setup.settings.handler != model::Handler::Pull {
        return None;
    }
    match (pump_state, &queue.state) {
        (RunState::Stopped(_), _) => None,
        (RunState::Running, RunState::Stopped(_)) => Some(Mode::UrgentOnly),
        (RunState::Running, RunState::Running) => Some(Mode::All),
    }
}

/// How long after its deadline a stop may still be told.
const TELL_MAX: Duration = Duration::from_secs(5);
/// No revision of any store.
const OUT_OF_LINE: i64 = -1;
/// How often this process shows that it is alive and looks for changes that it was not told of.
pub(super) const ATTEND_EVERY: Duration = Duration::from_secs(1);
/// The same while another replica has still to give up a share.
const ATTEND_WHILE_WAITING: Duration = Duration::from_millis(100);
