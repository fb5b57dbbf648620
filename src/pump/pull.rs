//! Pulling: workers who come and take messages, and say later what became of them.
//!
//! A worker is no part of this process. Its leases outlive the process that gave them, any process takes what it says
//! of them, and how many are out is counted in the store, over all of them (so the scope of the queue's limit is always the
//! cluster, and the ceiling over all queues counts them only as 0: then nothing is given out). Of those who wait for a message of one queue
//! in this process one waits for news, and the others for their turn; so a crowd of them asks the store no more
//! often than one does.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::sync::{Mutex, Notify, oneshot};
use tokio_util::sync::CancellationToken;

use crate::model::{
    DeliveryRecord, ErrorKind, Handler, Held, Lease, Leased, NewMessage, Outcome, QueueName, Reply,
    Settlement, Ticket, Verdict, children,
};
use crate::policy;
use crate::store::{self, Claim, Settle, Settled};

use super::house::Pumphouse;
use super::intake::IDLE_POLL;
use super::pace::LOOK;
use super::round::{Mode, Round};
use super::{QueuePump, since};

/// The most messages that are taken at once.
pub const PULL_MAX: usize = 1000;

/// What a worker wants.
#[derive(Debug, Clone)]
pub struct Pull {
    /// At most so many messages, up to [`PULL_MAX`].
    pub max: usize,
    /// How long to wait for the first.
    pub wait: Duration,
    /// How long it may hold them; `None` for the queue's `lease`.
    pub duration: Option<Duration>,
}

/// What a worker gets.
#[derive(Debug)]
pub enum Pulled {
    /// These messages, and for how long; none where there were none in time, or the queue is stopped.
    Leases(Vec<Leased>, Duration),
    /// There is no such queue.
    NoSuchQueue,
    /// Its messages go to a handler of another kind.
    NotPulled,
}

/// What a worker says of a message that it holds.
#[derive(Debug, Clone)]
pub struct WorkersWord {
    /// The lease.
    pub ticket: Ticket,
    /// What to do; `None` to give it back untouched, with nothing counted.
    pub verdict: Option<Verdict>,
    /// What went wrong, for the record of the delivery.
    pub reason: Option<String>,
    /// What is to be sent together with an ack.
    pub sent: Vec<NewMessage>,
    /// What goes to the queue that the message names for answers, with an ack.
    pub reply: Reply,
}

impl WorkersWord {
    /// What a worker says of the message that this ticket stands for, and nothing besides.
    pub fn new(ticket: Ticket, verdict: Verdict) -> Self {
        let verdict = Some(verdict);
        Self { ticket, verdict, reason: None, sent: Vec::new(), reply: Reply::default() }
    }

    /// That it gives the message back untouched.
    pub fn release(ticket: Ticket) -> Self {
        Self { verdict: None, ..Self::new(ticket, Verdict::Ack) }
    }
}

/// What became of what a worker said.
#[derive(Debug)]
pub enum Heard {
    /// It is written.
    Settled,
    /// The lease is over, used or unknown: nothing was written, and nothing was sent.
    LeaseLost,
    /// What was to be sent was refused, for this reason: nothing was written.
    Refused(String),
    /// The store failed.
    Failed(store::Error),
}

/// Who waits for messages of a queue in this process.
#[derive(Debug, Default)]
pub(super) struct Turnstile {
    /// One of them hears the news; the others wait for their turn.
    waiting: Mutex<()>,
    /// One at a time asks the store, so that tokens of a rate limit are not taken twice.
    claiming: Mutex<()>,
    /// Told when a worker has given something back, so that there may be room.
    freed: Notify,
}

/// Messages on their way to a worker; those that never get there go back.
struct Handed {
    leased: Vec<Leased>,
    pump: Arc<QueuePump>,
    round: Arc<Round>,
}

impl Handed {
    /// They have got there.
    fn keep(mut self) -> Vec<Leased> {
        std::mem::take(&mut self.leased)
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        for leased in self.leased.drain(..) {
            let (pump, round) = (Arc::clone(&self.pump), Arc::clone(&self.round));
            self.round.tasks.spawn(pump.give_back(leased, round));
        }
    }
}

impl Pumphouse {
    /// Leases messages of a queue to a worker; waits for the first.
    ///
    /// Whoever stops waiting gets none: what was leased by then is given back at once.
    pub async fn pull(&self, queue: &QueueName, pull: Pull) -> store::Result<Pulled> {
        let pump = self.pump_of(queue).await?;
        let Some(pump) = pump else { return Ok(Pulled::NoSuchQueue) };
        if pump.setup().settings.handler != Handler::Pull {
            return Ok(Pulled::NotPulled);
        }
        let until = tokio::time::Instant::now() + pull.wait;
        let duration = pull.duration.unwrap_or(pump.setup().settings.lease());
        let pull = Pull { duration: Some(duration), ..pull };
        let leased = pump.pull(&pull, until, self.leaving()).await?;
        Ok(Pulled::Leases(leased, duration))
    }

    /// Writes what workers say of messages that they hold; in order. Of two words on one message the first counts, and
    /// the second only if the first was refused.
    pub async fn hear(&self, words: Vec<WorkersWord>) -> store::Result<Vec<Heard>> {
        let tickets = words.iter().map(|word| word.ticket).collect();
        let held = self.store().held(tickets).await?;
        let mut by_ticket = HashMap::<_, Vec<_>>::new();
        for (place, (word, held)) in words.into_iter().zip(held).enumerate() {
            by_ticket.entry(word.ticket).or_default().push((place, word, held));
        }
        let heard = join_all(by_ticket.into_values().map(|words| self.hear_in_turn(words))).await;
        let in_order = heard.into_iter().flatten().collect::<BTreeMap<_, _>>();
        Ok(in_order.into_values().collect())
    }

    /// Hears what is said of one message, one after the other.
    async fn hear_in_turn(
        &self,
        words: Vec<(usize, WorkersWord, Option<Held>)>,
    ) -> Vec<(usize, Heard)> {
        let mut heard = Vec::with_capacity(words.len());
        for (place, word, held) in words {
            heard.push((place, self.hear_one(word, held).await));
        }
        heard
    }

    async fn hear_one(&self, word: WorkersWord, held: Option<Held>) -> Heard {
        let Some(held) = held else { return Heard::LeaseLost };
        match self.pump_of(&held.head.queue).await {
            Ok(Some(pump)) => pump.hear(word, held).await,
            Ok(None) => Heard::LeaseLost,
            Err(error) => Heard::Failed(error),
        }
    }

    /// Prolongs leases of workers to `duration` from now; in order, `false` for those that are lost.
    pub async fn prolong(
        &self,
        tickets: Vec<Ticket>,
        duration: Duration,
    ) -> store::Result<Vec<bool>> {
        let held = self.store().held(tickets.clone()).await?;
        let known = tickets.iter().zip(&held).filter_map(|(ticket, held)| {
            let id = held.as_ref()?.head.id;
            let until = Instant::now() + duration;
            Some(Lease { seq: ticket.seq, id, token: ticket.token, until })
        });
        let renewed = self.store().renew(known.collect(), duration).await?;
        let mut renewed = renewed.into_iter();
        Ok(held.iter().map(|held| held.is_some() && renewed.next() == Some(true)).collect())
    }

    /// The pump of a queue; one that was made a moment ago is looked for in the store.
    async fn pump_of(&self, queue: &QueueName) -> store::Result<Option<Arc<QueuePump>>> {
        let known = || self.queue_pump(queue);
        if let Some(pump) = known() {
            return Ok(Some(pump));
        }
        if self.store().queue(queue).await?.is_some() {
            self.refresh().await?;
        }
        Ok(known())
    }
}

impl QueuePump {
    /// Leases for a worker, as soon as there is something, until then.
    async fn pull(
        self: &Arc<Self>,
        pull: &Pull,
        until: tokio::time::Instant,
        leaving: &CancellationToken,
    ) -> store::Result<Vec<Leased>> {
        if pull.wait.is_zero() {
            return self.take_for(pull).await;
        }
        // Who waits for this waits for nothing that whoever has it would not hear of.
        let waiting = tokio::time::timeout_at(until, self.turnstile.waiting.lock());
        let Ok(_waiting) = waiting.await else { return Ok(Vec::new()) };
        let mut news = self.store.news().of_queue(&self.queue);
        loop {
            news.mark_unchanged(); // before looking, so that nothing slips in between
            let freed = self.turnstile.freed.notified();
            let leased = self.take_for(pull).await?;
            if !leased.is_empty() || leaving.is_cancelled() {
                return Ok(leased);
            }
            let look = tokio::time::Instant::now() + self.patience_of_workers();
            tokio::select! {
                () = tokio::time::sleep_until(look.min(until)) => (),
                // The sender lives as long as somebody listens.
                _ = news.changed() => (),
                () = freed => (),
                () = leaving.cancelled() => (),
            }
            if tokio::time::Instant::now() >= until {
                return Ok(Vec::new());
            }
        }
    }

    /// Whether nothing may be out at all.
    fn is_shut(&self) -> bool {
        self.setup().settings.concurrency.most() == 0 || self.ceiling.limit() == 0
    }

    /// How long to trust the news alone. A queue that is stopped or shut, and one whose rate limit has no token, are looked at
    /// again soon, which asks nobody; that another process was told of a place that is free, no news tells.
    fn patience_of_workers(&self) -> Duration {
        let asks_nobody =
            self.open_round().is_none() || self.can_start_now() == Some(0) || self.is_shut();
        let idle = if self.replicas.load(Ordering::Relaxed) > 1 { SHARED_POLL } else { IDLE_POLL };
        if asks_nobody { LOOK } else { idle.mul_f64(0.75 + self.clock.chance() / 2.0) }
    }

    /// Claims once, if the queue runs and its rate limit allows it. What is claimed for somebody who has gone is given
    /// back.
    async fn take_for(self: &Arc<Self>, pull: &Pull) -> store::Result<Vec<Leased>> {
        let _claiming = self.turnstile.claiming.lock().await;
        let setup = self.setup();
        let settings = &setup.settings;
        let Some(round) = self.open_round() else { return Ok(Vec::new()) };
        let most = settings.concurrency.most();
        let max = pull.max.min(PULL_MAX);
        let max = self.can_start_now().map_or(max, |now| max.min(now));
        // It may have got another handler while somebody waited.
        let is_pulled = settings.handler == Handler::Pull;
        if !is_pulled || max == 0 || self.is_shut() {
            return Ok(Vec::new());
        }
        let claim = Claim {
            queue: self.queue.clone(),
            max,
            duration: pull.duration.unwrap_or(settings.lease()),
            replica: self.replica.clone(),
            urgent_only: round.mode == Mode::UrgentOnly,
            out_max: Some(most),
        };
        let (reply, answer) = oneshot::channel();
        let (this, its_round) = (Arc::clone(self), Arc::clone(&round));
        // In a task of the round, so that a stop waits for it, and a worker that goes away leaves nothing leased.
        round.tasks.spawn(async move {
            if its_round.closed.is_cancelled() {
                return; // stopped since it was looked at
            }
            let claimed = this.store.lease(claim).await;
            let handed = claimed.map(|leased| Handed { leased, pump: this, round: its_round });
            // Where nobody waits for it any more, it is dropped, and goes back.
            let _ = reply.send(handed);
        });
        let Ok(handed) = answer.await else { return Ok(Vec::new()) };
        let leased = handed?.keep();
        for leased in &leased {
            // There was one for each when it was looked at, and nobody else takes any.
            let _ = self.take_token();
            self.meters.queue_wait_seconds.record(super::wait(leased));
        }
        Ok(leased)
    }

    /// The run in which messages may be taken now.
    fn open_round(&self) -> Option<Arc<Round>> {
        self.rounds().iter().find(|round| !round.closed.is_cancelled()).cloned()
    }

    /// Writes what a worker says.
    async fn hear(&self, word: WorkersWord, held: Held) -> Heard {
        let settings = self.setup().settings.clone();
        let lease = Lease {
            seq: word.ticket.seq,
            id: held.head.id,
            token: word.ticket.token,
            until: Instant::now() + settings.lease(),
        };
        let age = since(held.head.enqueued_at, held.now);
        let settlement = match &word.verdict {
            None => Settlement::Release,
            Some(verdict) => {
                let (recovery, chance) = (&settings.recovery, self.clock.chance());
                policy::after_word(recovery, verdict, held.tries, age, chance)
            }
        };
        let mut sent = Vec::new();
        if settlement == Settlement::Ack {
            sent = word.sent;
            sent.extend(self.reply(&held.head, word.reply).await);
            sent = children(&held.head, sent);
        }
        let failed = matches!(settlement, Settlement::Retry { .. } | Settlement::DeadLetter { .. });
        let record = DeliveryRecord {
            number: held.tries.attempts,
            replica: self.replica.clone(),
            started_at: held.leased_at,
            duration: since(held.leased_at, held.now),
            outcome: Outcome::from(&settlement),
            status: None,
            error_kind: failed.then_some(ErrorKind::Handler),
            error: word.reason.filter(|_| failed),
            answer: Default::default(),
        };
        let settle = Settle { lease, settlement, delivery: Some(record), sent };
        match self.store.settle(settle.clone()).await {
            Ok(Settled::Done { age }) => {
                self.count(&settle, age);
                self.turnstile.freed.notify_waiters();
                Heard::Settled
            }
            Ok(Settled::LeaseLost) => {
                self.meters.leases_lost.increment(1);
                Heard::LeaseLost
            }
            Err(store::Error::Rejected { what }) => Heard::Refused(what),
            Err(error) => Heard::Failed(error),
        }
    }
}

/// How often it is looked for a place that another process was told of.
const SHARED_POLL: Duration = Duration::from_millis(1500);
