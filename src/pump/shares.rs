//! This process' share of every limit, and its sign of life to the others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::model::{Outcome, Scope, State};
use crate::store::{self, Attendance, Reaped, Want};
use crate::telemetry::metrics;

use super::QueuePump;
use super::house::House;

/// What came of a report.
pub(super) struct InForce {
    /// Whether a share is smaller than it will be once other replicas have given theirs up.
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
        let attended = self.store.attend(attendance).await?;
        self.heard(asked);
        count_reaped(&attended.reaped);
        let replicas = attended.replicas.len().max(1);
        let mut waiting = false;
        for ((pump, want), share) in pumps.iter().zip(&wants).zip(&attended.shares) {
            pump.gate.set_limit(*share);
            pump.meters.limit.set(f64::from(*share));
            waiting |= (*share as usize) < want.limit as usize / replicas;
        }
        self.set_replicas(attended.replicas);
        Ok(InForce { waiting, revision: attended.revision })
    }

    /// Shuts the gates of shared queues when nobody has heard of this process for so long that the others
    /// have taken its shares over.
    pub(super) fn shut_shared_gates_if_unheard(&self) {
        if self.unheard_for() < GOOD_FOR {
            return;
        }
        for pump in self.pumps() {
            if pump.setup().settings.concurrency.scope == Scope::Cluster {
                pump.gate.set_limit(0);
            }
        }
    }
}

impl QueuePump {
    fn want(self: &Arc<Self>) -> Want {
        let concurrency = self.setup().settings.concurrency.clone();
        Want {
            queue: self.queue.clone(),
            limit: concurrency.limit,
            shared: concurrency.scope == Scope::Cluster,
            open: self.gate.open(),
        }
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

/// How long a process counts as alive without another sign of life.
pub(super) const GOOD_FOR: Duration = Duration::from_secs(5);
