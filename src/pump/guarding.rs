//! Leaves a queue's handler alone while it is ill or wants to be: the guard, as this process sees it.
//!
//! The store keeps the guard, one for all replicas ([`Guard`]). Here are the counts that lead to its changes,
//! and the gate that follows it: at once where this process has seen the reason, and within a second where
//! another one has.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::model::{Answer, Breaker, ErrorKind, Failure, Guard, GuardChange, Hold, QueueSettings};
use crate::policy::{self, Decision};

use super::QueuePump;
use super::round::Round;

/// What this process knows of a queue's guard.
#[derive(Debug, Default)]
pub(super) struct Guarding {
    guard: Guard,
    /// What the store's clock said, and when.
    clock: Option<(Timestamp, Instant)>,
    /// How many things that were seen here are being told to the store: nobody asks meanwhile.
    telling: u32,
    /// How many things were told, so that an older reading of the store is known as one.
    told: u64,
    /// Until when the handler is held by what is being told.
    held_until: Option<Timestamp>,
    /// How many deliveries in a row said that the handler is ill.
    ill: u32,
    /// How many deliveries went well in this step of a half-open breaker, and were not told yet.
    well: u32,
}

/// Which step of a half-open breaker it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    /// How often it was opened.
    pub(super) times: u32,
    /// How many may be open.
    limit: u32,
}

impl Guarding {
    /// Takes over what stands in the store.
    fn set(&mut self, guard: Guard, settings: &QueueSettings) {
        let breaker = if settings.breaker.is_some() { guard.breaker } else { Breaker::Closed };
        let before = self.step();
        if breaker.as_str() != self.guard.breaker.as_str() {
            self.ill = 0;
        }
        self.guard = Guard { breaker, ..guard };
        if self.step() != before {
            self.well = 0;
        }
    }

    /// Sets the clock.
    pub(super) fn tell_time(&mut self, now: Timestamp, asked: Instant) {
        self.clock = Some((now, asked));
    }

    /// Forgets what was known of a queue that was deleted.
    pub(super) fn forget(&mut self) {
        *self = Self { clock: self.clock, told: self.told + 1, ..Self::default() };
    }

    /// A number that another one follows with each thing that is told.
    pub(super) fn told(&self) -> u64 {
        self.told
    }

    /// How many deliveries may be open over all replicas, where `limit` may be otherwise.
    pub(super) fn limit(&self, limit: u32, settings: &QueueSettings) -> u32 {
        if self.telling > 0 {
            return 0;
        }
        self.guard.limit(limit, settings.recovery.retry_after_max, self.now())
    }

    /// The step in which deliveries are made to see whether the handler is well.
    pub(super) fn step(&self) -> Option<Step> {
        match self.guard.breaker {
            Breaker::HalfOpen { limit, times, .. } => Some(Step { times, limit }),
            Breaker::Closed | Breaker::Open { .. } => None,
        }
    }

    /// Takes note of a delivery that has ended, made in a step of a half-open breaker or not, and says what the
    /// store is to be told.
    fn note(
        &mut self,
        outcome: &Result<Answer, Failure>,
        decision: &Decision,
        settings: &QueueSettings,
        made_in: Option<Step>,
        replicas: usize,
    ) -> Option<GuardChange> {
        let longest = settings.recovery.retry_after_max;
        let hold = decision.hold.map(|wait| Hold { wait, longest });
        let hold = hold.filter(|hold| !self.is_held_for(*hold));
        let signs = Signs::of(outcome);
        let failed = |breaker: &_| Some(GuardChange::Failed(Clone::clone(breaker), hold));
        let breaker = settings.breaker.as_ref();
        let change = match (self.step(), made_in, breaker) {
            (Some(now), Some(then), Some(breaker)) if now.times == then.times => match signs {
                Signs::Ill | Signs::Unwell => failed(breaker),
                Signs::Well if now == then => return self.note_well(now, settings, replicas),
                Signs::Well | Signs::Nothing => None,
            },
            // It was opened before the breaker was, and says nothing of how the handler is now.
            (Some(_), _, _) => None,
            (None, _, breaker) => {
                self.ill = match signs {
                    Signs::Ill => self.ill.saturating_add(1),
                    Signs::Well => 0,
                    Signs::Unwell | Signs::Nothing => self.ill,
                };
                let is_open = matches!(self.guard.breaker, Breaker::Open { .. });
                let too_often = |failures| signs == Signs::Ill && self.ill >= failures && !is_open;
                breaker.filter(|breaker| too_often(breaker.failures)).and_then(failed)
            }
        };
        let change = change.or(hold.map(GuardChange::Held));
        if change.is_some() {
            self.telling += 1;
            self.told += 1;
            let until = hold.and_then(|hold| self.now().checked_add(hold.wait).ok());
            self.held_until = self.held_until.max(until);
        }
        change
    }

    /// Tells of what went well in portions, so that all replicas together tell each step's number.
    fn note_well(
        &mut self,
        step: Step,
        settings: &QueueSettings,
        replicas: usize,
    ) -> Option<GuardChange> {
        self.well += 1;
        if (self.well as usize) < (step.limit as usize).div_ceil(replicas.max(1)) {
            return None;
        }
        let well = std::mem::take(&mut self.well);
        let limit = settings.concurrency.most();
        Some(GuardChange::WentWell { tried: step.limit, well, limit })
    }

    /// Whether the handler is held for so long already, or is about to be.
    fn is_held_for(&self, hold: Hold) -> bool {
        let now = self.now();
        let until = now.checked_add(hold.wait).unwrap_or(Timestamp::MAX);
        let is_written = self.guard.after(&GuardChange::Held(hold), now) == self.guard;
        self.clock.is_some() && (is_written || self.held_until >= Some(until))
    }

    fn now(&self) -> Timestamp {
        let Some((now, asked)) = self.clock else { return Timestamp::MIN };
        now.checked_add(asked.elapsed()).unwrap_or(Timestamp::MAX)
    }
}

/// What the end of a delivery says of its handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Signs {
    /// It answered.
    Well,
    /// It answered what nobody understands, or failed in this program; which counts only while it is tried.
    Unwell,
    Ill,
    /// Nothing: the delivery was cut.
    Nothing,
}

impl Signs {
    fn of(outcome: &Result<Answer, Failure>) -> Self {
        match outcome {
            Ok(_) => Self::Well,
            Err(failure) if policy::says_ill(failure) => Self::Ill,
            Err(Failure { kind: ErrorKind::Malformed, .. }) => Self::Unwell,
            Err(Failure { kind: ErrorKind::Cancelled | ErrorKind::LeaseLost, .. }) => Self::Nothing,
            Err(failure) if failure.status.is_some() => Self::Well,
            Err(_) => Self::Unwell,
        }
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
        made_in: Option<Step>,
    ) -> Option<Telling<'_>> {
        let replicas = self.replicas.load(Ordering::Relaxed);
        let change = self.guarding().note(outcome, decision, settings, made_in, replicas)?;
        let telling = Telling { pump: self, change };
        self.set_gate();
        Some(telling)
    }

    /// Tells the store, as long as the round may; all replicas hear of it from the news of settings.
    pub(super) async fn tell_guard(&self, telling: Telling<'_>, round: &Round) {
        let tell = self.store.guard(&self.queue, telling.change.clone());
        // Not for longer, because the gate is shut meanwhile.
        let tell = tokio::time::timeout(TELL_MAX, tell);
        let told = match round.within_grace(tell).await {
            Some(Ok(Ok(Some(guard)))) => return self.take_over(guard),
            // The queue is gone.
            Some(Ok(Ok(None))) => return,
            Some(Ok(Err(error))) => Some(error),
            Some(Err(_)) | None => None,
        };
        // The next delivery that fails says it again.
        let error = told.as_ref().map(|error| error as &dyn std::error::Error);
        tracing::warn!(queue = %self.queue, error, "cannot tell how the handler is");
    }

    /// Takes over what the store answered, unless a later answer was here before.
    fn take_over(&self, guard: Guard) {
        let setup = self.setup();
        let mut guarding = self.guarding();
        if guard.version <= guarding.guard.version {
            return;
        }
        let (queue, breaker) = (&self.queue, guard.breaker.as_str());
        let held_until = guard.held_until.map(tracing::field::display);
        if breaker == guarding.guard.breaker.as_str()
            && guard.held_until == guarding.guard.held_until
        {
            tracing::debug!(%queue, breaker, guard = ?guard.breaker, "the handler is tried");
        } else {
            let open_until = match guard.breaker {
                Breaker::Open { until, .. } => Some(tracing::field::display(until)),
                Breaker::Closed | Breaker::HalfOpen { .. } => None,
            };
            tracing::warn!(%queue, breaker, open_until, held_until, "what keeps the handler from being asked has changed");
        }
        guarding.set(guard, &setup.settings);
        guarding.told += 1;
        drop(guarding);
        self.set_gate();
    }

    /// Takes over what stands in the store, unless it is old because something was told since `told` was read.
    pub(super) fn set_guard(&self, guard: &Guard, told: Option<u64>) {
        let setup = self.setup();
        let mut guarding = self.guarding();
        if told.is_none_or(|told| guarding.told == told) || guard.version > guarding.guard.version {
            guarding.set(guard.clone(), &setup.settings);
        }
        self.meters.breaker.set(match guarding.guard.breaker {
            Breaker::Closed => 0.0,
            Breaker::HalfOpen { .. } => 1.0,
            Breaker::Open { .. } => 2.0,
        });
        drop(guarding);
        self.set_gate();
    }

    pub(super) fn guarding(&self) -> MutexGuard<'_, Guarding> {
        self.guarding.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a tell may take.
const TELL_MAX: Duration = Duration::from_secs(5);

/// Something of which the store is told; over, however that ends, when it is dropped.
pub(super) struct Telling<'a> {
    pump: &'a QueuePump,
    change: GuardChange,
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        {
            let mut guarding = self.pump.guarding();
            guarding.told += 1;
            // What went well shut nobody out meanwhile.
            if !matches!(self.change, GuardChange::WentWell { .. }) {
                guarding.telling = guarding.telling.saturating_sub(1);
                if guarding.telling == 0 {
                    guarding.held_until = None;
                }
            }
        }
        self.pump.set_gate();
    }
}
