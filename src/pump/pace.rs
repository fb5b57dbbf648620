//! How many deliveries start, and how fast: the gate's limit from all that bounds it, and the rate limit.

use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::{Answer, ErrorKind, Failure, QueueSettings};
use crate::policy::{Adaptive, Bucket, Rate, Sample};

use super::QueuePump;

/// What a queue's own pace is found with, in this process.
#[derive(Debug, Default)]
pub(super) struct Pace {
    adaptive: Option<Adaptive>,
    bucket: Option<Bucket>,
}

impl QueuePump {
    /// Moves the gate to what is allowed now: this process' share, unless the handler is to be left alone, or
    /// serves fewer better. One place below the ceiling stays free for each of the `neighbours`, so that a queue
    /// whose handler hangs never takes all of them.
    pub(super) fn move_gate(&self, share: u32) {
        self.share.store(share, Ordering::Relaxed);
        let neighbours = self.neighbours.load(Ordering::Relaxed);
        let room = self.ceiling.limit().saturating_sub(neighbours).max(1);
        let guarded = self.guarding().limit(share.min(room));
        let limit = self.found_limit().map_or(guarded, |found| guarded.min(found));
        self.gate.set_limit(limit);
        self.meters.limit.set(f64::from(limit));
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
        let overloaded = match outcome {
            Ok(_) => false,
            // Who was cut, or never came through, says nothing of how long it takes.
            Err(Failure { kind: ErrorKind::Timeout, .. }) => true,
            Err(Failure { status: Some(status), .. }) => matches!(status, 429 | 503),
            Err(_) => return,
        };
        let moved = {
            let mut pace = self.pace();
            let Some(adaptive) = &mut pace.adaptive else { return };
            let before = adaptive.limit(bounds);
            let sample = Sample { took, open: self.gate.open(), overloaded };
            adaptive.note(sample, bounds, Instant::now());
            adaptive.limit(bounds) != before
        };
        if moved {
            self.move_gate(self.share.load(Ordering::Relaxed));
        }
    }

    /// Waits until the rate limit lets one more start. A change of the limit is in force within [`LOOK`].
    pub(super) async fn in_turn(&self) {
        while let Some(rate) = self.rate() {
            let now = Instant::now();
            let taken = {
                let mut pace = self.pace();
                pace.bucket.get_or_insert_with(|| Bucket::new(rate, now)).take(rate, now)
            };
            match taken {
                Ok(()) => return,
                Err(wait) => tokio::time::sleep(wait.min(LOOK)).await,
            }
        }
    }

    /// How many may start within [`AHEAD`]; `None` for as many as there are.
    pub(super) fn can_start(&self) -> Option<usize> {
        let rate = self.rate()?;
        let now = Instant::now();
        let mut pace = self.pace();
        let bucket = pace.bucket.get_or_insert_with(|| Bucket::new(rate, now));
        Some(bucket.within(AHEAD, rate, now))
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
