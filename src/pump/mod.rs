//! The engine: leases messages, delivers them, settles them, and lets an operator hold the gate.
//!
//! It does not know whether a handler is HTTP or a function, nor which database runs below. This page is
//! the journey of a message, top to bottom; `house.rs` holds all the queues of one process.
//!
//! ```text
//!   intake ──leased──▶ run ──slot──▶ carry: deliver ▶ judge ▶ settle
//!     ▲                                │
//!     └──────────── room ◀── gate ◀────┘
//! ```

mod care;
mod ceiling;
mod embed;
mod guarding;
mod gate;
mod house;
mod intake;
mod keeper;
mod line_up;
mod outcomes;
mod pace;
mod pull;
mod destinations;
mod schedules;
mod round;
mod settler;
mod shares;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::{Semaphore, mpsc};
use tower::ServiceExt;

use crate::clock::Clock;
use crate::deliver::{Delivery, Handler, Outbox};
use crate::model::{
    Answer, DeliveryRecord, ErrorKind, Failure, Head, Lease, Leased, NewMessage, Outcome,
    QueueName, QueueSettings, ReplicaName, Reply, Settlement, Tries, answer_to, children,
};
use crate::policy::{self, Decision};
use crate::store::{Settle, Store, target_gone};
use crate::telemetry::metrics::QueueMeters;

use care::Care;
use ceiling::{Below, Ceiling};
use destinations::Destinations;
use gate::{Gate, Slot};
use guarding::{Guarding, Step};
use outcomes::Outcomes;
use pace::Pace;
use pull::Turnstile;
use round::{Mode, Round};

pub use embed::Queue;
pub use house::{Builder, Overview, Pumphouse, QueueOverview, Stop, StopReport};
pub use outcomes::Watch;
pub use pull::{Heard, PULL_MAX, Pull, Pulled, WorkersWord};

/// The pump of one queue in one process.
struct QueuePump {
    queue: QueueName,
    replica: ReplicaName,
    store: Arc<dyn Store>,
    clock: Arc<dyn Clock>,
    meters: Arc<QueueMeters>,
    /// How many deliveries of this queue may be open here.
    gate: Arc<Gate>,
    /// How many of all queues.
    ceiling: Arc<Ceiling>,
    /// How many of this queue are open below it.
    below: Below,
    care: Arc<Care>,
    setup: RwLock<Arc<Setup>>,
    guarding: Mutex<Guarding>,
    pace: Mutex<Pace>,
    /// This process' share of the limit, before anything else bounds it.
    share: AtomicU32,
    /// How many processes there are.
    replicas: AtomicUsize,
    rounds: Mutex<Vec<Arc<Round>>>,
    /// Leased and not yet started.
    held: AtomicUsize,
    /// Whether one was given back because it had waited too long to start.
    late: AtomicBool,
    /// Bounds what was delivered and is not yet settled.
    settling: Semaphore,
    /// Whether messages take turns, by the last claim.
    fair: AtomicBool,
    /// What a delivery usually takes, in microseconds; 0 for not known.
    usual: AtomicU64,
    /// How many bytes of payload a message usually has.
    usual_size: AtomicU64,
    /// Who waits for messages to take them away.
    turnstile: Turnstile,
    /// What is open to which host, where messages name it themselves.
    destinations: Arc<Destinations>,
    outcomes: Arc<Outcomes>,
}

/// What may change while a queue runs.
struct Setup {
    settings: QueueSettings,
    /// The handler with every step around it; `None` where nobody in this process handles the queue.
    handler: Option<Handler>,
}

/// A delivery that has ended.
struct Attempt {
    setup: Arc<Setup>,
    tries: Tries,
    started_at: Timestamp,
    took: Duration,
    /// How old the message is.
    age: Duration,
    /// The step of a half-open breaker in which it was made.
    step: Option<Step>,
}

/// A place behind the queue's gate, one behind the ceiling, and one among those that are approached with care;
/// given back together.
struct Slots {
    queue: Slot,
    _ceiling: ceiling::Place,
    _care: care::Place,
    _destination: destinations::Place,
}

impl QueuePump {
    /// The loop: what the intake leased is carried as soon as the gate lets it through.
    ///
    /// Ends when the round is closed and everything leased is carried or given back.
    async fn run(self: Arc<Self>, round: Arc<Round>) {
        #[expect(clippy::disallowed_methods, reason = "what is in it is `held`, which has a bound")]
        let (hand_over, mut leased) = mpsc::unbounded_channel();
        round.tasks.spawn(Arc::clone(&self).take_in(Arc::clone(&round), hand_over));
        while let Some(Held { leased: next, since }) = next(&mut leased, &round).await {
            learn(&self.usual_size, next.message.body.len() as u64);
            let setup = self.setup();
            let care = self.approach(&next, &setup.settings, round.mode);
            let destination = self.enter_destination(&next.message.head, &setup.settings);
            let (care, destination) = match (care, destination) {
                (Some(care), Ok(destination)) => (care, destination),
                (_, destination) => {
                    self.hold_no_longer();
                    let wait = destination.err();
                    round.tasks.spawn(Arc::clone(&self).let_wait(next, wait, Arc::clone(&round)));
                    continue;
                }
            };
            let slots = self.enter_in_time(&next, since, &setup, &round, (care, destination)).await;
            self.hold_no_longer();
            // Looked at again, because it may have waited for its turn: the gate may be shut by now.
            let was_shut = slots.as_ref().is_some_and(|slots| !slots.queue.is_current());
            let too_late = is_expired(&next, since) || was_shut || self.gate.limit() == 0;
            match (slots, &setup.handler) {
                (Some(slots), Some(_)) if !round.closed.is_cancelled() && !too_late => {
                    let carry = Arc::clone(&self).carry(next, slots, setup, Arc::clone(&round));
                    round.tasks.spawn(carry);
                }
                // Not started: stopped meanwhile, held for too long, expired while it was held, the handler is to
                // be left alone, or too little of the lease is left.
                _ => {
                    if !round.closed.is_cancelled() && !too_late {
                        self.late.store(true, Ordering::Relaxed);
                        // What was usual no longer is: hold nothing ahead until deliveries say otherwise.
                        self.usual.store(HELD_MAX.as_micros() as u64, Ordering::Relaxed);
                    }
                    round.tasks.spawn(Arc::clone(&self).give_back(next, Arc::clone(&round)));
                    self.gate.nudge();
                }
            }
        }
    }

    fn hold_no_longer(&self) {
        if self.held.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.gate.nudge(); // the intake waits for this, or for much more
        }
    }

    /// One message, from leased to settled. The whole journey, top to bottom.
    async fn carry(
        self: Arc<Self>,
        leased: Leased,
        slots: Slots,
        setup: Arc<Setup>,
        round: Arc<Round>,
    ) {
        let started = (Instant::now(), self.clock.now());
        let step = self.guarding().step();
        self.meters.queue_wait_seconds.record(wait(&leased));

        let outcome = self.deliver(&leased, &setup, &round).await;
        let took = started.0.elapsed();
        let was_cut = matches!(&outcome, Err(failure) if failure.kind == ErrorKind::Cancelled);
        // Two readings of the database's clock and one span of ours, because ours may be wrong.
        let age = since(leased.message.head.enqueued_at, leased.leased_at) + took;
        let (tries, started_at) = (leased.tries, started.1);
        let attempt = Attempt { setup: Arc::clone(&setup), tries, started_at, took, age, step };
        let decision = self.judge(&attempt, &outcome);
        self.learn_pace(took, &outcome, &setup.settings);
        let is_heard = setup.settings.has_one_handler();
        let telling =
            if is_heard { self.heed(&outcome, &decision, &setup.settings, step) } else { None };
        learn(&self.usual, u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1));
        let Leased { lease, message, .. } = leased;
        let sent = match &outcome {
            Ok(answer) => {
                let mut sent = answer.sent.clone(); // shares the payloads' bytes
                let reply = self.reply(&message.head, answer.reply.clone());
                sent.extend(round.within_grace(reply).await.flatten());
                children(&message.head, sent)
            }
            Err(_) => Vec::new(),
        };
        drop(message);
        // The handler is done with it: the next one may start while this one is being written, as long as
        // not too many wait for that.
        let _settling = self.settling.acquire().await;
        drop(slots);
        round.count_ended(was_cut);

        let settled = self.write(&attempt, lease, decision, &outcome, sent, &round);
        match telling {
            Some(telling) => drop(tokio::join!(settled, self.tell_guard(telling, &round))),
            None => settled.await,
        }
    }

    /// Writes what was decided, and what the handler sent. Where that is refused (a queue that is not there, or is
    /// full), the delivery has failed.
    async fn write(
        &self,
        attempt: &Attempt,
        lease: Lease,
        decision: Decision,
        outcome: &Result<Answer, Failure>,
        sent: Vec<NewMessage>,
        round: &Round,
    ) {
        let settle = self.settlement(attempt, lease.clone(), decision, outcome, sent, round).await;
        let Some(what) = self.settle(settle, round).await else { return };
        let status = outcome.as_ref().ok().and_then(|answer| answer.status);
        let excerpt = outcome.as_ref().map(|answer| answer.excerpt.clone()).unwrap_or_default();
        let failed = Err(Failure { status, excerpt, ..Failure::new(ErrorKind::Malformed, what) });
        let decision = self.judge(attempt, &failed);
        let settle = self.settlement(attempt, lease, decision, &failed, Vec::new(), round).await;
        let _nothing_was_sent = self.settle(settle, round).await;
    }

    async fn settlement(
        &self,
        attempt: &Attempt,
        lease: Lease,
        decision: Decision,
        outcome: &Result<Answer, Failure>,
        sent: Vec<NewMessage>,
        round: &Round,
    ) -> Settle {
        if let Some(reason) = decision.stop_queue {
            // First, or a message that goes on to wait would be leased again at once.
            self.stop_for(reason, round).await;
        }
        let settlement = self.with_a_target(decision.settlement, round).await;
        let record = self.record(attempt, &settlement, outcome);
        let sent = if settlement == Settlement::Ack { sent } else { Vec::new() };
        Settle { lease, settlement, delivery: Some(record), sent }
    }

    /// Waits for a place behind both gates, as long as enough of the lease is left for the delivery to end and
    /// be settled before it; before the queue's own gate at most until it was held for [`HELD_MAX`], unless
    /// nobody else may have it.
    async fn enter_in_time(
        &self,
        next: &Leased,
        since: Instant,
        setup: &Setup,
        round: &Round,
        places: (care::Place, destinations::Place),
    ) -> Option<Slots> {
        let (lease, timeout) = (setup.settings.lease(), setup.settings.timeout());
        let needed = timeout + (lease.saturating_sub(timeout) / 2).min(SETTLE_TIME);
        let patience = || next.lease.left(Instant::now()).checked_sub(needed);
        let held = HELD_MAX.saturating_sub(since.elapsed());
        let held = if round.mode == Mode::UrgentOnly { patience()? } else { held };
        let entered = tokio::time::timeout(patience()?, self.enter(held, places));
        let slots = round.closed.run_until_cancelled(entered).await?.ok()??;
        // Looked at again: a process that stood still finds both the place and the end of its patience.
        patience().map(|_| slots)
    }

    /// The queue's own gate first, so that a queue that is full waits without holding a place that
    /// another queue could use. Waits there, and for its turn by the rate limit, for at most `patience`; looks at
    /// least once.
    async fn enter(
        &self,
        patience: Duration,
        (care, destination): (care::Place, destinations::Place),
    ) -> Option<Slots> {
        let until = tokio::time::Instant::now().checked_add(patience);
        let gate_and_turn = async {
            let queue = self.gate.enter().await;
            self.in_turn().await;
            queue
        };
        let queue = match until {
            Some(until) => tokio::time::timeout_at(until, gate_and_turn).await.ok()?,
            None => gate_and_turn.await,
        };
        loop {
            let ceiling = self.ceiling.enter(&self.below).await;
            // Last of all, so that no token is lost.
            if self.take_token() {
                return Some(Slots {
                    queue,
                    _ceiling: ceiling,
                    _care: care,
                    _destination: destination,
                });
            }
            drop(ceiling);
            self.in_turn().await;
        }
    }

    async fn deliver(
        &self,
        leased: &Leased,
        setup: &Setup,
        round: &Round,
    ) -> Result<Answer, Failure> {
        let Some(handler) = setup.handler.clone() else {
            return Err(Failure::new(ErrorKind::Cancelled, "nobody here handles this queue"));
        };
        let delivery = Delivery {
            message: leased.message.clone(), // shares the payload's bytes
            attempt: leased.tries.attempts,
            max_attempts: setup.settings.recovery.max_attempts,
            replica: self.replica.clone(),
            outbox: Outbox::default(),
        };
        let cut = round.cut.run_until_cancelled(handler.oneshot(delivery)).await;
        cut.unwrap_or_else(|| Err(Failure::new(ErrorKind::Cancelled, "the pump was stopped")))
    }

    fn judge(&self, attempt: &Attempt, outcome: &Result<Answer, Failure>) -> Decision {
        let Attempt { tries, age, step, .. } = *attempt;
        let settings = &attempt.setup.settings;
        let recovery = &settings.recovery;
        let chance = self.clock.chance();
        match (outcome, step.zip(settings.breaker.as_ref())) {
            (Ok(answer), _) => policy::after_verdict(recovery, answer, tries, age, chance),
            (Err(failure), Some((step, breaker))) => {
                let open_for = breaker.opens_for(step.times.saturating_add(1));
                policy::after_probe(recovery, failure, tries, age, chance, open_for)
            }
            (Err(failure), None) => policy::after_failure(recovery, failure, tries, age, chance),
        }
    }

    /// A move to a queue that was deleted is a dead letter. The store knows that too, for one that is deleted a moment
    /// later; but then its record says that it was moved.
    async fn with_a_target(&self, settlement: Settlement, round: &Round) -> Settlement {
        let Settlement::Move { to_queue, reason } = &settlement else { return settlement };
        match round.within_grace(self.store.queue(to_queue)).await {
            Some(Ok(None)) => Settlement::DeadLetter { reason: target_gone(reason, to_queue) },
            Some(Ok(Some(_)) | Err(_)) | None => settlement,
        }
    }

    /// The answer as a message, where the message names a queue for it that is there. One that was deleted meanwhile gets
    /// none: what was done must not be done again for that.
    async fn reply(&self, head: &Head, reply: Reply) -> Option<NewMessage> {
        let queue = head.details.reply_to.as_ref()?;
        if let Ok(None) = self.store.queue(queue).await {
            tracing::warn!(queue = %self.queue, message = %head.id, reply_to = %queue, "its answer goes nowhere: there is no such queue any more");
            return None;
        }
        answer_to(head, reply)
    }

    fn record(
        &self,
        attempt: &Attempt,
        settlement: &Settlement,
        outcome: &Result<Answer, Failure>,
    ) -> DeliveryRecord {
        let (status, answer, failure) = match outcome {
            Ok(answer) => (answer.status, answer.excerpt.clone(), None),
            Err(failure) => (failure.status, failure.excerpt.clone(), Some(failure)),
        };
        DeliveryRecord {
            number: attempt.tries.attempts,
            replica: self.replica.clone(),
            started_at: attempt.started_at,
            duration: attempt.took,
            outcome: Outcome::from(settlement),
            status,
            error_kind: failure.map(|failure| failure.kind),
            error: failure.map(|failure| failure.detail.clone()),
            answer,
        }
    }

    fn setup(&self) -> Arc<Setup> {
        Arc::clone(&self.setup.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn rounds(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Round>>> {
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Remembers what is usual: the mean, in which the last eight weigh most; 0 is for nothing seen yet.
fn learn(usual: &AtomicU64, seen: u64) {
    let before = usual.load(Ordering::Relaxed);
    let mean = if before == 0 { seen } else { (before - before / 8).saturating_add(seen / 8) };
    usual.store(mean, Ordering::Relaxed);
}

/// How many deliveries of a queue may wait to be settled before no more are started.
const SETTLEMENTS_WAITING_MAX: usize = 1024;
/// A message on its way from the intake to the loop.
#[derive(Debug)]
struct Held {
    leased: Leased,
    /// When it came to this process.
    since: Instant,
}

impl Held {
    fn now(leased: Leased) -> Self {
        Self { leased, since: Instant::now() }
    }
}

/// The next message that is held; `None` once there will be none. Once the round is cut, only what is there:
/// whoever has a place for one then hears that nobody takes it, and gives it back.
async fn next(leased: &mut mpsc::UnboundedReceiver<Held>, round: &Round) -> Option<Held> {
    if let Some(next) = round.cut.run_until_cancelled(leased.recv()).await {
        return next;
    }
    leased.close();
    leased.recv().await
}

/// How long a message waits before its queue's gate; then another replica may have it.
const HELD_MAX: Duration = Duration::from_secs(1);
/// What is kept of a lease for settling, at most.
const SETTLE_TIME: Duration = Duration::from_millis(500);

/// How long a message was due before its lease, by the database's clock.
fn wait(leased: &Leased) -> Duration {
    since(leased.due_at, leased.leased_at)
}

/// Whether a message has expired that came to this process `since` then, by the database's clock at least.
fn is_expired(leased: &Leased, since: Instant) -> bool {
    let now = leased.leased_at.checked_add(since.elapsed()).unwrap_or(Timestamp::MAX);
    leased.message.head.expires_at.is_some_and(|expires_at| expires_at <= now)
}

fn since(earlier: Timestamp, later: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or_default()
}

impl std::fmt::Debug for QueuePump {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueuePump").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl QueuePump {
    /// Brings the running round in line with what is wanted: none, everything, or the urgent only.
    ///
    /// A round in another mode is closed; what it has open goes on under the same gate.
    fn set_mode(self: &Arc<Self>, mode: Option<Mode>) {
        let mut rounds = self.rounds();
        rounds.retain(|round| !round.is_over());
        let running = rounds.iter().find(|round| !round.closed.is_cancelled());
        // A queue that has got another kind of handler begins anew.
        let takes_in = self.setup().handler.is_some();
        if running.map(|round| (round.mode, round.takes_in)) == mode.map(|mode| (mode, takes_in)) {
            return;
        }
        for round in rounds.iter() {
            round.close();
        }
        self.meters.running.set(if mode == Some(Mode::All) { 1.0 } else { 0.0 });
        if let Some(mode) = mode {
            let round = Arc::new(Round::new(mode, takes_in));
            if takes_in {
                round.tasks.spawn(Arc::clone(self).run(Arc::clone(&round)));
            }
            rounds.push(round);
        }
    }

    /// Whether it takes messages in, and not only those that an operator wants run.
    fn runs(&self) -> bool {
        let is_open = |round: &Arc<Round>| round.mode == Mode::All && !round.closed.is_cancelled();
        self.rounds().iter().any(is_open)
    }

    /// Whether something of it has not ended yet.
    fn is_open(&self) -> bool {
        self.rounds().iter().any(|round| !round.is_over())
    }

    /// Closes what runs, and returns every round that has not ended yet.
    fn close_rounds(&self) -> Vec<Arc<Round>> {
        let mut rounds = self.rounds();
        rounds.retain(|round| !round.is_over());
        for round in rounds.iter() {
            round.close();
        }
        rounds.clone()
    }
}
