//! How many deliveries may start in a time: a token bucket.

use std::time::{Duration, Instant};

use crate::model::RateLimit;

/// So many a second on the average, so many at once after a pause.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Tokens that come in a second; above 0.
    pub per_second: f64,
    /// Tokens that gather while none are taken; at least 1.
    pub burst: f64,
}

impl Rate {
    /// What one of so many processes may have of it.
    pub fn new(limit: &RateLimit, processes: usize) -> Self {
        let processes = processes.max(1) as f64;
        Self {
            per_second: f64::from(limit.limit) / limit.period.as_secs_f64() / processes,
            burst: (f64::from(limit.burst) / processes).max(1.0),
        }
    }
}

/// Tokens, of which each delivery takes one before it starts.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// One that is full.
    pub fn new(rate: Rate, now: Instant) -> Self {
        Self { tokens: rate.burst, at: now }
    }

    /// Takes a token. **Fails** with the time until there is one.
    pub fn take(&mut self, rate: Rate, now: Instant) -> Result<(), Duration> {
        match self.wait(rate, now) {
            Some(wait) => Err(wait),
            None => {
                self.tokens -= 1.0;
                Ok(())
            }
        }
    }

    /// The time until there is one; `None` for now.
    pub fn wait(&mut self, rate: Rate, now: Instant) -> Option<Duration> {
        self.fill(rate, now);
        let missing = 1.0 - self.tokens;
        let wait = || Duration::try_from_secs_f64(missing / rate.per_second);
        (missing > 0.0).then(|| wait().unwrap_or(Duration::MAX))
    }

    /// How many could be taken within `ahead` from now.
    pub fn within(&mut self, ahead: Duration, rate: Rate, now: Instant) -> usize {
        self.fill(rate, now);
        (self.tokens + ahead.as_secs_f64() * rate.per_second) as usize
    }

    /// What has come since. A rate that was changed holds for all that time.
    fn fill(&mut self, rate: Rate, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + passed * rate.per_second).min(rate.burst);
        self.at = now.max(self.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(limit: u32, seconds: u64, burst: u32, processes: usize) -> Rate {
        Rate::new(&RateLimit { limit, period: Duration::from_secs(seconds), burst }, processes)
    }

    #[test]
    fn as_many_start_as_the_rate_says_and_no_more() {
        let rate = rate(10, 1, 5, 1);
        let start = Instant::now();
        let mut bucket = Bucket::new(rate, start);
        let (mut now, mut taken) = (start, 0);
        while now < start + Duration::from_secs(10) {
            match bucket.take(rate, now) {
                Ok(()) => taken += 1,
                Err(wait) => now += wait.max(Duration::from_micros(1)),
            }
        }
        assert!(
            (104..=105).contains(&taken),
            "a burst of 5, and 10 in each of 10 seconds: {taken}"
        );
    }

    #[test]
    fn what_gathers_is_bounded_and_time_that_runs_back_gives_nothing() {
        let rate = rate(1, 60, 3, 1);
        let now = Instant::now() + Duration::from_secs(1_000);
        let mut bucket = Bucket::new(rate, now);
        let late = now + Duration::from_secs(86_400);
        let mut taken = 0;
        while bucket.take(rate, late).is_ok() {
            taken += 1;
        }
        assert_eq!(taken, 3);
        let wait = bucket.take(rate, now).unwrap_err();
        assert!(wait > Duration::from_secs(59) && wait <= Duration::from_secs(60), "{wait:?}");
        assert_eq!(bucket.within(Duration::from_secs(120), rate, late), 2);
    }

    #[test]
    fn processes_share_a_rate() {
        assert_eq!(rate(100, 1, 10, 4), Rate { per_second: 25.0, burst: 2.5 });
        assert_eq!(rate(1, 1, 1, 4).burst, 1.0, "or none could ever start");
    }
}
