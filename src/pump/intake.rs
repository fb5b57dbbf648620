//! Leases in batches, ahead of the gate by as little as keeps it busy, and hears news.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::model::Leased;
use crate::policy;
use crate::store::{self, Claim};

use super::QueuePump;
use super::round::{Mode, Round};

impl QueuePump {
    /// Leases as long as the round is open, and hands over what it leased.
    ///
    /// Cancelling stops the waiting, never a claim: what the database has handed over is handed on.
    pub(super) async fn take_in(
        self: Arc<Self>,
        round: Arc<Round>,
        hand_over: mpsc::Sender<Leased>,
    ) {
        let mut news = self.store.news().of_queue(&self.queue);
        let mut pause = PAUSE_MIN;
        while let Some(room) = round.closed.run_until_cancelled(self.room()).await {
            if self.late.swap(false, Ordering::Relaxed) {
                // What was leased came too late to start: leasing on at full speed would do the same again.
                let wait = tokio::time::sleep(PAUSE_MIN);
                let _ = round.closed.run_until_cancelled(wait).await;
            }
            news.mark_unchanged(); // before looking, so that nothing slips in between
            match self.claim(room, round.mode).await {
                Ok(leased) if leased.is_empty() => {
                    let wait = tokio::time::timeout(self.idle_wait(), news.changed());
                    // News, no news in time, or closed: each is a reason to look again or to end.
                    let _ = round.closed.run_until_cancelled(wait).await;
                }
                Ok(leased) => {
                    pause = PAUSE_MIN;
                    self.held.fetch_add(leased.len(), Ordering::Relaxed);
                    for next in leased {
                        // The loop on the other side reads until this side is gone.
                        let _ = hand_over.send(next).await;
                    }
                }
                Err(error) => {
                    tracing::warn!(queue = %self.queue, error = &error as &dyn std::error::Error, "cannot lease; trying again");
                    let wait = tokio::time::sleep(pause.mul_f64(0.5 + self.clock.chance() / 2.0));
                    let _ = round.closed.run_until_cancelled(wait).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                }
            }
        }
    }

    async fn claim(&self, max: usize, mode: Mode) -> store::Result<Vec<Leased>> {
        let claim = Claim {
            queue: self.queue.clone(),
            max,
            duration: self.setup().settings.lease(),
            replica: self.replica.clone(),
            urgent_only: mode == Mode::UrgentOnly,
        };
        self.store.lease(claim).await
    }

    /// Waits until there is room for more, and says for how many.
    async fn room(&self) -> usize {
        loop {
            let usual = match self.usual.load(Ordering::Relaxed) {
                0 => None,
                micros => Some(Duration::from_micros(micros)),
            };
            let ceiling = self.ceiling.limit();
            let ahead = policy::prefetch(self.gate.limit().min(ceiling), usual);
            let wanted = self.gate.free().min(ceiling as usize) + ahead;
            let room = wanted.saturating_sub(self.held.load(Ordering::Relaxed));
            if room > 0 {
                return room.min(policy::LEASE_BATCH_MAX);
            }
            self.gate.moved().await;
        }
    }

    /// How long to trust the news alone: long, because it seldom fails, and never the same for all queues.
    fn idle_wait(&self) -> Duration {
        IDLE_POLL.mul_f64(0.75 + self.clock.chance() / 2.0)
    }
}

/// How long an idle queue waits for news before it looks by itself.
const IDLE_POLL: Duration = Duration::from_secs(4);
/// The first and the longest pause after a claim that failed.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(3);
