//! This process' share of every limit, and its sign of life to the others.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::model::{Outcome, Scope, State};
use crate::store::{self, Attendance, Reaped, Want};
use crate::telemetry::metrics;

use super::QueuePump;
use super::house::House;
use super::line_up::ATTEND_EVERY;

/// What came of a report.
pub(super) struct InForce {
    /// Whether shares are about to change: one is smaller than it will be once other replicas have given
    /// theirs up, or this one has something to give up.
    pub(super) waiting: bool,
    /// A number that changes with every change to a queue or the pump.
    pub(super) revision: i64,
}

impl House {
    /// Reports to the store, and moves every gate to the share that comes back.
    pub(super) async fn attend(&self, leaving: bool) -> store::Result<InForce> {
        let pumps = self.pumps();
        let wants = pumps.iter().map(|pump| pump.want()).collect::<Vec<_>>();
        let attendance = Attendance {
            replica: self.replica.clone(),
            incarnation: self.incarnation,
            good_for: GOOD_FOR,
            wants: wants.clone(),
            leaving,
        };
        let asked = Instant::now();
        let late = || store::Error::Unavailable("it did not answer a report in time".into());
        let attended = tokio::time::timeout(ATTEND_MAX, self.store.attend(attendance));
        let attended = attended.await.map_err(|_| late())??;
        if asked.elapsed() > ATTEND_MAX {
            // This process stood still meanwhile, and what was its share may be somebody else's by now.
            return Err(late());
        }
        self.heard(asked);
        self.known().clock = Some((attended.now, asked));
        count_reaped(&attended.reaped);
        self.calls.call(attended.chores);
        let replicas = attended.replicas.len().max(1);
        let mut waiting = false;
        for ((pump, want), share) in pumps.iter().zip(&wants).zip(&attended.shares) {
            pump.guarding().tell_time(attended.now, asked);
            pump.replicas.store(replicas, Ordering::Relaxed);
            pump.move_gate(*share);
            // It has still to get a share, or to show that it gave one up.
            waiting |= want.able && (*share as usize) < want.limit as usize / replicas
                || want.shared && *share < want.open;
        }
        self.set_replicas(attended.replicas);
        Ok(InForce { waiting, revision: attended.revision })
    }

    /// Shuts the gates of shared queues at the moment from which the others may take this process for dead
    /// and its shares for theirs.
    pub(super) async fn mind_own_silence(self: Arc<Self>) {
        loop {
            let left = GOOD_FOR.saturating_sub(self.unheard_for());
            if left.is_zero() {
                self.shut_shared_gates();
            }
            let wait = tokio::time::sleep(left.max(SILENCE_LOOK));
            if self.leaving.run_until_cancelled(wait).await.is_none() {
                return;
            }
        }
    }

    fn shut_shared_gates(&self) {
        for pump in self.pumps() {
            if pump.shares_its_limit() {
                pump.move_gate(0);
            }
        }
    }

    /// Does this, and shows meanwhile that this process is alive, so that the others leave it what it has.
    pub(super) async fn alive_during<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            let show = async {
                tokio::time::sleep(ATTEND_EVERY).await;
                if let Err(error) = self.attend(false).await {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "cannot show that this process is alive");
                }
            };
            tokio::select! {
                done = &mut work => return done,
                () = show => (),
            }
        }
    }
}

impl QueuePump {
    fn want(&self) -> Want {
        let setup = self.setup();
        let most = setup.settings.concurrency.most();
        let (limit, tried) = {
            let guarding = self.guarding();
            (guarding.limit(most, &setup.settings), guarding.step().is_some())
        };
        // Nobody tries a handler in a process that is to deliver nothing.
        let able = setup.handler.is_some() && (!tried || self.runs());
        // The few that try are over all replicas in any case; the queue's own limit is then one of each.
        let of_each = setup.settings.concurrency.scope == Scope::Replica;
        let counted = self.gate.counted();
        Want {
            queue: self.queue.clone(),
            limit,
            most: if of_each { u32::MAX } else { most },
            shared: self.shares_its_limit(),
            able,
            // Up to its limit more may be opened before the answer is here.
            open: counted.max(self.gate.limit()),
            strays: self.gate.open().saturating_sub(counted),
        }
    }

    /// Whether its limit is one over all replicas; that of a half-open breaker always is.
    fn shares_its_limit(&self) -> bool {
        let scope = self.setup().settings.concurrency.scope;
        scope == Scope::Cluster || self.guarding().step().is_some()
    }
}

/// Counts leases that were taken back.
pub(super) fn count_reaped(reaped: &[Reaped]) {
    for Reaped { id, queue, state } in reaped {
        metrics::deliveries(queue, Outcome::LeaseLost).increment(1);
        tracing::warn!(%queue, message = %id, "a lease ran out with nobody answering for it");
        if *state == State::Dead {
            metrics::dead(queue).increment(1);
            tracing::warn!(%queue, message = %id, "dead letter: its crashes are used up");
        }
    }
}

/// How long a report may take.
const ATTEND_MAX: Duration = Duration::from_secs(4);
/// How often the gates are shut again while nobody hears of this process.
const SILENCE_LOOK: Duration = Duration::from_millis(100);
/// How long a process counts as alive without another sign of life.
pub(super) const GOOD_FOR: Duration = Duration::from_secs(5);
