//! Patience with a server that is away or busy: tries again with growing pauses, and says so once for each trouble.
//!
//! It does not know what is tried.

use std::time::Duration;

use anyhow::{Error, Result};

use crate::clock::{Clock, SystemClock};

use super::client::may_pass;
use super::complain;

/// The first pause, and the longest.
const PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(8);
/// How often something is tried that has an end: for 20 to 40 seconds.
const TRIES: u32 = 10;

/// How long one goes on trying, and how far that has come.
#[derive(Debug)]
pub(super) struct Again {
    /// At most so many tries, if there is an end to them.
    tries: Option<u32>,
    failed: u32,
    is_told: bool,
}

impl Again {
    /// For a while.
    pub(super) fn for_a_while() -> Self {
        Self { tries: Some(TRIES), failed: 0, is_told: false }
    }

    /// Until it goes well.
    pub(super) fn for_ever() -> Self {
        Self { tries: None, failed: 0, is_told: false }
    }

    /// Not at all.
    pub(super) fn never() -> Self {
        Self { tries: Some(1), failed: 0, is_told: false }
    }

    /// Waits a while after a failure. Fails with it where it does not pass by itself, or was waited for long enough.
    pub(super) async fn after(&mut self, failure: Error) -> Result<()> {
        let is_enough = self.tries.is_some_and(|tries| self.failed + 1 >= tries);
        if is_enough || !may_pass(&failure) {
            return Err(failure);
        }
        if !self.is_told {
            self.is_told = true;
            complain(&failure.context("trying again"));
        }
        let pause = PAUSE.saturating_mul(1 << self.failed.min(16)).min(PAUSE_MAX);
        self.failed = self.failed.saturating_add(1);
        // Spread, because many may have failed at the same moment.
        tokio::time::sleep(pause.mul_f64(0.5 + SystemClock.chance() / 2.0)).await;
        Ok(())
    }

    /// Some of it went well: the patience is fresh, and the trouble is still the same.
    pub(super) fn goes_on(&mut self) {
        self.failed = 0;
    }

    /// The trouble is over: the next one is another.
    pub(super) fn is_over(&mut self) {
        self.failed = 0;
        self.is_told = false;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::client::Refused;
    use super::*;

    fn busy() -> Error {
        Refused::of_item(&json!({"status": 503})).expect("it is refused").into()
    }

    async fn tries(again: &mut Again) -> usize {
        let mut tries = 1;
        while tries < 1000 && again.after(busy()).await.is_ok() {
            tries += 1;
        }
        tries
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_and_is_fresh_once_it_goes_on() {
        let mut again = Again::for_a_while();
        let start = tokio::time::Instant::now();
        assert_eq!(tries(&mut again).await, 10);
        let passed = start.elapsed().as_secs();
        assert!((18..=40).contains(&passed), "{passed}");
        assert_eq!(tries(&mut again).await, 1, "it was enough");
        again.goes_on();
        assert_eq!(tries(&mut again).await, 10);
        assert_eq!(tries(&mut Again::for_ever()).await, 1000);
        assert_eq!(tries(&mut Again::never()).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_pass_is_not_waited_for() {
        let wrong = Refused::of_item(&json!({"status": 404})).expect("it is refused");
        assert!(Again::for_ever().after(wrong.into()).await.is_err());
    }
}
