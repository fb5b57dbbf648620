//! How many deliveries start, and how fast: the gate's limit from all that bounds it, and the rate limit.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::{Answer, ErrorKind, Failure, QueueSettings};
use crate::policy::{Adaptive, Bucket, Load, Rate, Sample};

use super::QueuePump;

/// What a queue's own pace is found with, in this process.
#[derive(Debug, Default)]
pub(super) struct Pace {
    adaptive: Option<Adaptive>,
    bucket: Option<Bucket>,
}

impl QueuePump {
    /// Takes over this process' share of the limit.
    pub(super) fn move_gate(&self, share: u32) {
        self.share.store(share, Ordering::Relaxed);
        self.set_gate();
    }

    /// Moves the gate to what is allowed now: this process' share, unless the handler is to be left alone, is
    /// tried by a few, or serves fewer better.
    pub(super) fn set_gate(&self) {
        // Held until the gate is moved, so that an older reading does not move it after a newer one.
        let guarding = self.guarding();
        let found = self.found_limit().unwrap_or(u32::MAX);
        let settings = &self.setup().settings;
        let share = self.share.load(Ordering::Relaxed);
        let limit = guarding.limit(share, settings).min(found);
        match guarding.step() {
            None => self.gate.set(limit, None),
            // The share is of those few; with what was open before it is within the queue's limit.
            Some(_) => self.gate.set(settings.concurrency.most(), Some(limit)),
        }
        self.meters.limit.set(f64::from(self.gate.limit()));
    }

    /// The limit that was found for an adaptive gate.
    fn found_limit(&self) -> Option<u32> {
        let setup = self.setup();
        let concurrency = &setup.settings.concurrency;
        let mut pace = self.pace();
        let Some(bounds) = concurrency.adaptive else {
            pace.adaptive = None;
            return None;
        };
        let begin = || Adaptive::new(concurrency.limit, bounds, Instant::now());
        Some(pace.adaptive.get_or_insert_with(begin).limit(bounds))
    }

    /// Takes note of how long a delivery took; an adaptive gate may move.
    pub(super) fn learn_pace(
        &self,
        took: Duration,
        outcome: &Result<Answer, Failure>,
        settings: &QueueSettings,
    ) {
        let Some(bounds) = settings.concurrency.adaptive else { return };
        let load = match outcome {
            Ok(_) => Load::Served(took),
            Err(Failure { kind: ErrorKind::Timeout, .. }) => Load::Refused,
            Err(Failure { status: Some(429 | 503), .. }) => Load::Refused,
            // What fails at once, was cut or never came through says nothing of how long it takes.
            Err(_) => return,
        };
        let moved = {
            let mut pace = self.pace();
            let Some(adaptive) = &mut pace.adaptive else { return };
            let before = adaptive.limit(bounds);
            let now = Instant::now();
            let began = now.checked_sub(took).unwrap_or(now);
            adaptive.note(Sample { began, open: self.gate.open(), load }, bounds, now);
            adaptive.limit(bounds) != before
        };
        if moved {
            self.set_gate();
        }
    }

    /// Waits until the rate limit lets one more start. A change of the limit is in force within [`LOOK`].
    pub(super) async fn in_turn(&self) {
        while let Some(wait) = self.ask_bucket(Bucket::wait) {
            tokio::time::sleep(wait.min(LOOK)).await;
        }
    }

    /// Takes a token for one that starts; `false` where somebody else was faster.
    pub(super) fn take_token(&self) -> bool {
        self.ask_bucket(|bucket, rate, now| bucket.take(rate, now).err()).is_none()
    }

    /// What the bucket says; nothing where there is no rate limit.
    fn ask_bucket(
        &self,
        ask: impl FnOnce(&mut Bucket, Rate, Instant) -> Option<Duration>,
    ) -> Option<Duration> {
        let rate = self.rate()?;
        let now = Instant::now();
        let mut pace = self.pace();
        ask(pace.bucket.get_or_insert_with(|| Bucket::new(rate, now)), rate, now)
    }

    /// How many may start within [`AHEAD`]; `None` for as many as there are.
    pub(super) fn can_start(&self) -> Option<usize> {
        let rate = self.rate()?;
        let now = Instant::now();
        let mut pace = self.pace();
        let bucket = pace.bucket.get_or_insert_with(|| Bucket::new(rate, now));
        Some(bucket.within(AHEAD, rate, now))
    }

    /// How many may start now; `None` for as many as there are.
    pub(super) fn can_start_now(&self) -> Option<usize> {
        let rate = self.rate()?;
        let now = Instant::now();
        let mut pace = self.pace();
        let bucket = pace.bucket.get_or_insert_with(|| Bucket::new(rate, now));
        Some(bucket.within(Duration::ZERO, rate, now))
    }

    fn rate(&self) -> Option<Rate> {
        let setup = self.setup();
        let limit = setup.settings.rate_limit.as_ref()?;
        Some(Rate::new(limit, self.replicas.load(Ordering::Relaxed)))
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How far ahead of a rate limit messages are leased.
const AHEAD: Duration = Duration::from_millis(500);
/// How long a rate limit is trusted before it is looked at again.
pub(super) const LOOK: Duration = Duration::from_millis(250);
