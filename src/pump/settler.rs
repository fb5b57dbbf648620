//! Writes what became of a message, and tries again until its lease ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::model::{Leased, Outcome, RunState, Settlement, Stopped};
use crate::store::{self, Settle, Settled};

use super::QueuePump;
use super::round::Round;

impl QueuePump {
    /// Settles, and counts what was written. Gives up when the lease is over, because then the message
    /// comes back anyway, or shortly after the round was cut.
    ///
    /// Says what was refused of what the handler sent; then nothing was written.
    pub(super) async fn settle(&self, settle: Settle, round: &Round) -> Option<String> {
        let until = settle.lease.until;
        let settled = round.within_grace(self.settle_until(settle, until)).await;
        if settled.is_none() {
            tracing::warn!(queue = %self.queue, "not settled before the stop; the message comes back");
        }
        settled.flatten()
    }

    async fn settle_until(&self, settle: Settle, until: Instant) -> Option<String> {
        let mut pause = PAUSE_MIN;
        let mut first = true;
        loop {
            let message = settle.lease.id;
            match self.store.settle(settle.clone()).await {
                Ok(Settled::Done { age }) => {
                    self.count(&settle, age);
                    return None;
                }
                // An earlier try may have been written, and only its answer lost.
                Ok(Settled::LeaseLost) if !first && self.count_if_written(&settle).await => {
                    return None;
                }
                Ok(Settled::LeaseLost) => {
                    self.meters.leases_lost.increment(1);
                    tracing::info!(queue = %self.queue, %message, "lease lost; the message comes back");
                    return None;
                }
                Err(error) if error.is_transient() && Instant::now() + pause < until => {
                    tracing::warn!(queue = %self.queue, %message, error = &error as &dyn std::error::Error, "cannot settle; trying again");
                    first = false;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
                Err(store::Error::Rejected { what }) => return Some(what),
                Err(error) => {
                    tracing::error!(queue = %self.queue, %message, error = &error as &dyn std::error::Error, "not settled; the message comes back");
                    return None;
                }
            }
        }
    }

    /// Whether this very attempt stands in the store as it was to be settled; then it is counted.
    async fn count_if_written(&self, settle: &Settle) -> bool {
        let Some(record) = &settle.delivery else { return false };
        let Ok(Some((message, deliveries))) = self.store.message(settle.lease.id).await else {
            return false;
        };
        let written = deliveries
            .iter()
            .any(|one| one.number == record.number && one.outcome == record.outcome);
        if written {
            let until = message.finished_at.unwrap_or(record.started_at);
            self.count(settle, super::since(message.head.enqueued_at, until));
        }
        written
    }

    pub(super) fn count(&self, settle: &Settle, age: Duration) {
        let outcome = Outcome::from(&settle.settlement);
        match &settle.settlement {
            Settlement::Ack | Settlement::DeadLetter { .. } | Settlement::Discard { .. } => {
                self.outcomes.tell(settle.lease.id);
            }
            Settlement::Retry { .. }
            | Settlement::Postpone { .. }
            | Settlement::Move { .. }
            | Settlement::Release => (),
        }
        if settle.delivery.is_some() {
            self.meters.deliveries(outcome).increment(1);
        }
        match &settle.settlement {
            Settlement::Ack => {
                self.meters.completed.increment(1);
                self.meters.critical_seconds.record(age);
            }
            Settlement::DeadLetter { .. } => {
                self.meters.dead.increment(1);
                tracing::warn!(queue = %self.queue, message = %settle.lease.id, "dead letter");
            }
            Settlement::Retry { .. }
            | Settlement::Postpone { .. }
            | Settlement::Discard { .. }
            | Settlement::Move { .. }
            | Settlement::Release => (),
        }
    }

    /// Gives back a message whose delivery never started.
    pub(super) async fn give_back(self: Arc<Self>, leased: Leased, round: Arc<Round>) {
        round.count_released();
        let settlement = Settlement::Release;
        let settle = Settle { lease: leased.lease, settlement, delivery: None, sent: Vec::new() };
        let _nothing_was_sent = self.settle(settle, &round).await;
    }

    /// Stops this queue on every replica, because its handler or a rule asked for it: here at once, on the others
    /// when they hear the news of settings.
    pub(super) async fn stop_for(&self, reason: String, round: &Round) {
        tracing::warn!(queue = %self.queue, %reason, "queue stopped");
        let stopped = Stopped {
            at: self.clock.now(),
            by: "handler".to_owned(),
            reason: Some(reason),
            until: None,
        };
        let state = RunState::Stopped(stopped);
        // Only a queue that runs: what an operator stopped keeps the operator's reason and time.
        let running = Some(RunState::Running);
        let stopped = self.store.set_run_state(Some(&self.queue), state, running);
        match round.within_grace(stopped).await {
            // Here at once; the other replicas hear of it.
            Some(Ok(true)) => round.close(),
            Some(Ok(false)) | None => (),
            // The next message of the queue meets the same answer and stops it then.
            Some(Err(error)) => {
                tracing::error!(queue = %self.queue, error = &error as &dyn std::error::Error, "cannot stop the queue");
            }
        }
    }
}

const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
