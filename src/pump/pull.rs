//! Pulling: workers who come and take messages, and say later what became of them.
//!
//! A worker is no part of this process. Its leases outlive the process that gave them, any process takes what it says
//! of them, and how many are out is counted in the store, over all of them. Of those who wait for a message of one queue
//! in this process one waits for news, and the others for their turn; so a crowd of them asks the store no more
//! often than one does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use tokio::sync::{Mutex, Notify, oneshot};

use crate::model::{
    Answer, DeliveryRecord, ErrorKind, Handler, Held, Lease, Leased, NewMessage, Outcome,
    QueueName, Reply, Settlement, Ticket, Verdict, answer_to, children,
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
    turn: Mutex<()>,
    /// Told when a worker has given something back, so that there may be room.
    freed: Notify,
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

    /// Writes what workers say of messages that they hold; in order.
    pub async fn hear(&self, words: Vec<WorkersWord>) -> store::Result<Vec<Heard>> {
        let tickets = words.iter().map(|word| word.ticket).collect();
        let held = self.store().held(tickets).await?;
        let heard = words.into_iter().zip(held).map(|(word, held)| self.hear_one(word, held));
        Ok(join_all(heard).await)
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
        leaving: &tokio_util::sync::CancellationToken,
    ) -> store::Result<Vec<Leased>> {
        let turn = tokio::time::timeout_at(until, self.turnstile.turn.lock());
        // Whoever waits for no time at all asks all the same.
        let _turn = match turn.await {
            Ok(turn) => Some(turn),
            Err(_) if pull.wait.is_zero() => None,
            Err(_) => return Ok(Vec::new()),
        };
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

    /// How long to trust the news alone. A stopped queue, and a rate limit, are looked at again soon.
    fn patience_of_workers(&self) -> Duration {
        let setup = self.setup();
        let waits_for_us = setup.settings.rate_limit.is_some() || self.open_round().is_none();
        let idle = IDLE_POLL.mul_f64(0.75 + self.clock.chance() / 2.0);
        if waits_for_us { LOOK } else { idle }
    }

    /// Claims once, if the queue runs and its rate limit allows it. What is claimed for somebody who has gone is given
    /// back.
    async fn take_for(self: &Arc<Self>, pull: &Pull) -> store::Result<Vec<Leased>> {
        let Some(round) = self.open_round() else { return Ok(Vec::new()) };
        let settings = self.setup().settings.clone();
        let max = pull.max.min(PULL_MAX);
        let max = self.can_start_now().map_or(max, |now| max.min(now));
        if max == 0 || settings.concurrency.most() == 0 {
            return Ok(Vec::new());
        }
        let claim = Claim {
            queue: self.queue.clone(),
            max,
            duration: pull.duration.unwrap_or(settings.lease()),
            replica: self.replica.clone(),
            urgent_only: round.mode == Mode::UrgentOnly,
            out_max: Some(settings.concurrency.most()),
        };
        let (reply, answer) = oneshot::channel();
        let this = Arc::clone(self);
        let tracked = Arc::clone(&round);
        // In a task of the round, so that a stop waits for it, and a worker that goes away leaves nothing leased.
        round.tasks.spawn(async move {
            let claimed = this.store.lease(claim).await;
            if let Ok(leased) = &claimed {
                for _ in leased {
                    // Looked at a moment ago; somebody else's faster token makes this one's next wait longer.
                    let _ = this.take_token();
                }
            }
            if let Err(Ok(left)) = reply.send(claimed) {
                this.give_all_back(left, &tracked).await;
            }
        });
        let gone = || store::Error::Unavailable("the queue was stopped meanwhile".into());
        let leased = answer.await.map_err(|_| gone())??;
        for leased in &leased {
            self.meters.queue_wait_seconds.record(super::wait(leased));
        }
        Ok(leased)
    }

    async fn give_all_back(self: &Arc<Self>, left: Vec<Leased>, round: &Arc<Round>) {
        let back = left.into_iter().map(|one| Arc::clone(self).give_back(one, Arc::clone(round)));
        join_all(back).await;
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
                let answer = Answer::from(verdict.clone());
                let recovery = &settings.recovery;
                let chance = self.clock.chance();
                // What was counted when it was leased is this very attempt.
                policy::after_verdict(recovery, &answer, held.tries, age, chance).settlement
            }
        };
        let mut sent = Vec::new();
        if settlement == Settlement::Ack {
            sent = word.sent;
            sent.extend(answer_to(&held.head, word.reply));
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
