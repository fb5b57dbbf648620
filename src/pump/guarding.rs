//! Leaves a queue's handler alone while it is ill or wants to be: the guard, as this process sees it.
//!
//! The store keeps the guard, one for all replicas ([`Guard`]). Here are the counts that lead to its changes,
//! and the gate that follows it: at once where this process has seen the reason, and within a second where
//! another one has.

use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use jiff::Timestamp;

use crate::model::{Answer, Breaker, BreakerSettings, Failure, Guard, GuardChange, QueueSettings};
use crate::policy::{self, Decision};

use super::QueuePump;

/// What this process knows of a queue's guard.
#[derive(Debug, Default)]
pub(super) struct Guarding {
    guard: Guard,
    /// What the store's clock said, and when.
    clock: Option<(Timestamp, Instant)>,
    /// Something was seen here of which the store has not heard yet: nobody asks meanwhile.
    shut: bool,
    /// How many deliveries in a row said that the handler is ill.
    ill: u32,
    /// How many deliveries went well since the breaker is half-open, or has moved.
    well: u32,
}

impl Guarding {
    /// Takes over what stands in the store.
    pub(super) fn set(&mut self, guard: Guard, breaker: Option<&BreakerSettings>) {
        let breaker = if breaker.is_some() { guard.breaker } else { Breaker::Closed };
        if breaker != self.guard.breaker {
            (self.ill, self.well) = (0, 0);
        }
        self.guard = Guard { breaker, ..guard };
    }

    /// Sets the clock.
    pub(super) fn tell_time(&mut self, now: Timestamp, asked: Instant) {
        self.clock = Some((now, asked));
    }

    /// How many deliveries may be open over all replicas, where `limit` may be otherwise.
    pub(super) fn limit(&self, limit: u32) -> u32 {
        if self.shut { 0 } else { self.guard.limit(limit, self.now()) }
    }

    /// Whether deliveries are made to see whether the handler is well.
    pub(super) fn is_probing(&self) -> bool {
        matches!(self.guard.breaker, Breaker::HalfOpen { .. })
    }

    /// Takes note of a delivery that has ended, and says what the store is to be told.
    fn note(
        &mut self,
        outcome: &Result<Answer, Failure>,
        decision: &Decision,
        breaker: Option<&BreakerSettings>,
        probes: bool,
        (share, limit): (u32, u32),
    ) -> Option<GuardChange> {
        if self.is_probing() && !probes {
            // It was opened before the breaker was, and says nothing of how the handler is now.
            let change = decision.hold.map(GuardChange::Held);
            self.shut |= change.is_some();
            return change;
        }
        let ill = outcome.as_ref().is_err_and(policy::says_ill);
        // Who was cut says nothing of the handler.
        let answered =
            outcome.is_ok() || outcome.as_ref().is_err_and(|failure| failure.status.is_some());
        if ill {
            (self.ill, self.well) = (self.ill.saturating_add(1), 0);
        } else if answered {
            (self.ill, self.well) = (0, self.well.saturating_add(1));
        }
        let change = match (self.guard.breaker, breaker) {
            (Breaker::HalfOpen { .. }, Some(breaker)) if ill => {
                Some(GuardChange::Failed(breaker.clone()))
            }
            (Breaker::Closed, Some(breaker)) if ill && self.ill >= breaker.failures => {
                Some(GuardChange::Failed(breaker.clone()))
            }
            (Breaker::HalfOpen { limit: tried, .. }, _)
                if answered && self.well >= share.max(1) =>
            {
                self.well = 0;
                return Some(GuardChange::WentWell { tried, limit });
            }
            _ => decision.hold.map(GuardChange::Held),
        };
        self.shut |= change.is_some();
        change
    }

    fn now(&self) -> Timestamp {
        let (now, asked) = self.clock.unwrap_or((Timestamp::MIN, Instant::now()));
        now.checked_add(asked.elapsed()).unwrap_or(Timestamp::MAX)
    }
}

impl QueuePump {
    /// Takes note of a delivery that has ended; shuts the gate at once where the handler is to be left alone,
    /// and says what the store is to be told.
    pub(super) fn heed(
        &self,
        outcome: &Result<Answer, Failure>,
        decision: &Decision,
        settings: &QueueSettings,
        probes: bool,
    ) -> Option<GuardChange> {
        let mut guarding = self.guarding();
        let shares = (self.gate.limit(), settings.concurrency.most());
        let change = guarding.note(outcome, decision, settings.breaker.as_ref(), probes, shares);
        if guarding.shut {
            self.gate.set_limit(0);
        }
        change
    }

    /// Tells the store; all replicas hear of it from the news of settings.
    pub(super) async fn tell_guard(&self, change: GuardChange) {
        let told = self.store.guard(&self.queue, change).await;
        let mut guarding = self.guarding();
        guarding.shut = false;
        match told {
            Ok(Some(guard)) => {
                let (queue, state) = (&self.queue, guard.breaker.as_str());
                let (until, held_until) = (guard.changes_at(Timestamp::MIN), guard.held_until);
                tracing::warn!(%queue, breaker = state, ?until, ?held_until, "the handler's guard has changed");
                let setup = self.setup();
                guarding.set(guard, setup.settings.breaker.as_ref());
            }
            // Somebody else has said it before, and the news of it is under way.
            Ok(None) => (),
            // The next delivery that fails says it again.
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(queue = %self.queue, error, "cannot leave the handler alone");
            }
        }
    }

    /// Takes over what stands in the store, and moves the gate no further than that.
    pub(super) fn set_guard(&self, guard: &Guard, breaker: Option<&BreakerSettings>) {
        let mut guarding = self.guarding();
        guarding.set(guard.clone(), breaker);
        // Narrowed at once; widened only once the share is known.
        self.gate.set_limit(guarding.limit(self.gate.limit()));
        self.meters.breaker.set(match guarding.guard.breaker {
            Breaker::Closed => 0.0,
            Breaker::HalfOpen { .. } => 1.0,
            Breaker::Open { .. } => 2.0,
        });
    }

    pub(super) fn guarding(&self) -> MutexGuard<'_, Guarding> {
        self.guarding.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
