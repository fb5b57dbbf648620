//! Leases in batches, ahead of the gate by as little as keeps it busy, and hears news.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::model::{Leased, ReplicaName};
use crate::policy::{self, Usual};
use crate::store::{self, Claim, Taker};

use super::pace::LOOK;
use super::round::{Mode, Round};
use super::{Held, QueuePump};

impl QueuePump {
    /// Leases as long as the round is open, and hands over what it leased.
    ///
    /// Closing stops the waiting, never a claim: what the database has handed over is handed on. Only a database that
    /// says nothing is not waited for beyond the end of the round.
    pub(super) async fn take_in(
        self: Arc<Self>,
        round: Arc<Round>,
        hand_over: mpsc::UnboundedSender<Held>,
    ) {
        self.late.store(false, Ordering::Relaxed);
        let _door = BackDoor::open(&self, &round, &hand_over);
        let mut news = self.store.news().of_queue(&self.queue);
        let mut pause = PAUSE_MIN;
        let mut late_pause = PAUSE_MIN;
        while let Some(room) = round.closed.run_until_cancelled(self.reserve_room()).await {
            if self.late.swap(false, Ordering::Relaxed) {
                // What was leased came too late to start: leasing on at full speed would do the same again.
                let wait = tokio::time::sleep(late_pause);
                let _ = round.closed.run_until_cancelled(wait).await;
                late_pause = (late_pause * 2).min(PAUSE_MAX);
            } else {
                late_pause = PAUSE_MIN;
            }
            news.mark_unchanged(); // before looking, so that nothing slips in between
            let claimed = round.within_grace(self.claim(room, round.mode)).await;
            let taken = claimed.as_ref().and_then(|claimed| claimed.as_ref().ok());
            self.held.fetch_sub(room - taken.map_or(0, Vec::len), Ordering::Relaxed);
            let Some(claimed) = claimed else {
                tracing::warn!(queue = %self.queue, "left while a claim was under way; what it takes comes back with its lease");
                break;
            };
            match claimed {
                Ok(leased) if leased.is_empty() => {
                    let wait = tokio::time::timeout(self.idle_wait(), news.changed());
                    // News, no news in time, or closed: each is a reason to look again or to end.
                    let _ = round.closed.run_until_cancelled(wait).await;
                }
                Ok(leased) => {
                    pause = PAUSE_MIN;
                    let key = |next: &Leased| next.message.head.details.fairness_key.is_some();
                    self.fair.store(leased.iter().any(key), Ordering::Relaxed);
                    let count = leased.len();
                    let leased = self.sort_out(leased, &round).await;
                    self.held.fetch_sub(count - leased.len(), Ordering::Relaxed);
                    for next in leased {
                        // The loop on the other side reads until this side is gone, or the round is cut.
                        if let Err(refused) = hand_over.send(Held::now(next)) {
                            self.held.fetch_sub(1, Ordering::Relaxed);
                            self.gate.nudge();
                            let back = Arc::clone(&self).give_back(refused.0.leased, round.clone());
                            round.tasks.spawn(back);
                        }
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
            out_max: None,
        };
        self.store.lease(claim).await
    }

    /// Waits until there is room for more, and keeps it: for how many.
    ///
    /// Not for the few that one ended delivery makes room for while others are still held: a claim costs
    /// the same for one message and for many.
    async fn reserve_room(&self) -> usize {
        loop {
            let wanted = self.wanted();
            let held = self.held.load(Ordering::Relaxed);
            let room = wanted.saturating_sub(held).min(policy::LEASE_BATCH_MAX);
            if room == 0 || (held > 0 && room < (wanted / 2).min(policy::LEASE_BATCH_MAX)) {
                // A rate limit lets more start without anything having happened.
                let _ = tokio::time::timeout(self.patience(), self.gate.moved()).await;
            } else if self.swap_held(held, held + room) {
                return room;
            }
        }
    }

    /// How many messages are wanted here beyond those whose delivery has started.
    fn wanted(&self) -> usize {
        let usual = match self.usual.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Usual {
                delivery: Duration::from_micros(micros),
                size: self.usual_size.load(Ordering::Relaxed),
            }),
        };
        let ceiling = self.ceiling.limit();
        let fair = self.fair.load(Ordering::Relaxed);
        let ahead = policy::prefetch(self.gate.limit().min(ceiling), usual, fair);
        let wanted = self.gate.free().min(ceiling as usize) + ahead;
        self.can_start().map_or(wanted, |can_start| wanted.min(can_start))
    }

    fn patience(&self) -> Duration {
        let limited = self.setup().settings.rate_limit.is_some();
        if limited { LOOK } else { Duration::MAX }
    }

    fn swap_held(&self, from: usize, to: usize) -> bool {
        self.held.compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// How long to trust the news alone: long, because it seldom fails, and never the same for all queues.
    fn idle_wait(&self) -> Duration {
        IDLE_POLL.mul_f64(0.75 + self.clock.chance() / 2.0)
    }
}

/// Where the store hands over what it has just committed, for as long as a round is open.
struct BackDoor {
    pump: Arc<QueuePump>,
    taker: Arc<dyn Taker>,
}

impl BackDoor {
    /// Opens it, unless only the urgent is wanted.
    fn open(
        pump: &Arc<QueuePump>,
        round: &Round,
        hand_over: &mpsc::UnboundedSender<Held>,
    ) -> Option<Self> {
        if round.mode != Mode::All {
            return None;
        }
        let taker = Arc::new(Reserved {
            pump: Arc::clone(pump),
            closed: round.closed.clone(),
            hand_over: hand_over.clone(),
        });
        pump.store.handover().open(pump.queue.clone(), taker.clone());
        Some(Self { pump: Arc::clone(pump), taker })
    }
}

impl Drop for BackDoor {
    fn drop(&mut self) {
        self.pump.store.handover().close(&self.pump.queue, &self.taker);
    }
}

/// Takes what is handed over, as long as there is room.
#[derive(Debug)]
struct Reserved {
    pump: Arc<QueuePump>,
    closed: CancellationToken,
    hand_over: mpsc::UnboundedSender<Held>,
}

impl Taker for Reserved {
    fn reserve(&self) -> bool {
        let pump = &self.pump;
        loop {
            let held = pump.held.load(Ordering::Relaxed);
            if self.closed.is_cancelled() || held >= pump.wanted() {
                return false;
            }
            if pump.swap_held(held, held + 1) {
                return true;
            }
        }
    }

    fn give_back(&self) {
        self.pump.held.fetch_sub(1, Ordering::Relaxed);
        self.pump.gate.nudge();
    }

    fn terms(&self) -> (ReplicaName, Duration) {
        (self.pump.replica.clone(), self.pump.setup().settings.lease())
    }

    fn take(&self, leased: Leased) -> Result<(), Box<Leased>> {
        self.hand_over.send(Held::now(leased)).map_err(|refused| {
            self.give_back();
            Box::new(refused.0.leased)
        })
    }
}

/// How long an idle queue waits for news before it looks by itself.
pub(super) const IDLE_POLL: Duration = Duration::from_secs(4);
/// The first and the longest pause after a claim that failed, or that was for nothing.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(3);
