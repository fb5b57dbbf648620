//! Now, and chance: replaceable as one thing, so that a test can own both.
//!
//! Waiting is tokio's business and not in here; what is compared with a database's rows is the
//! database's own time and not in here either, but for the stores that live in this process.

use std::sync::atomic::{AtomicI64, Ordering};

use jiff::Timestamp;

/// A source of time and chance.
pub trait Clock: std::fmt::Debug + Send + Sync + 'static {
    /// The time of day.
    fn now(&self) -> Timestamp;

    /// A number from 0 up to, but never, 1. To spread what would come at once; not for secrets.
    fn chance(&self) -> f64;
}

/// The machine's own clock and random numbers.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "the one place that asks the machine")]
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn chance(&self) -> f64 {
        fastrand::f64()
    }
}

/// A clock that moves only when it is told to, and a chance that is always the same.
#[derive(Debug)]
pub struct ManualClock {
    micros: AtomicI64,
    chance: f64,
}

impl ManualClock {
    /// Stands at `start`; every chance is `chance`.
    pub fn new(start: Timestamp, chance: f64) -> Self {
        Self { micros: AtomicI64::new(start.as_microsecond()), chance }
    }

    /// Moves on, or back for a negative number.
    pub fn advance_micros(&self, micros: i64) {
        self.micros.fetch_add(micros, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_microsecond(self.micros.load(Ordering::SeqCst)).unwrap_or(Timestamp::MAX)
    }

    fn chance(&self) -> f64 {
        self.chance
    }
}
