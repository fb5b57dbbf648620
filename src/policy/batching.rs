//! How many messages to lease ahead of the deliveries that can start now.

use std::time::Duration;

/// The most messages one claim takes.
pub const LEASE_BATCH_MAX: usize = 1000;

/// How many messages to hold beyond the open slots, so that the next delivery need not wait for a claim.
///
/// As many as will be started within 100 ms at the pace of the last deliveries, so that a slow
/// handler holds nothing that another replica could be delivering; at most as many as two claims take.
pub fn prefetch(limit: u32, usual_delivery: Option<Duration>) -> usize {
    let Some(usual) = usual_delivery else { return 0 };
    let rounds = HORIZON.as_secs_f64() / usual.as_secs_f64().max(1e-4);
    let ahead = f64::from(limit) * rounds;
    if rounds < 1.0 { 0 } else { (ahead as usize).min(2 * LEASE_BATCH_MAX) }
}

/// How far ahead messages are held.
const HORIZON: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fast_handler_has_the_next_messages_at_hand() {
        assert_eq!(prefetch(16, Some(Duration::from_millis(20))), 80);
        assert_eq!(prefetch(16, Some(Duration::ZERO)), 2 * LEASE_BATCH_MAX);
        assert_eq!(prefetch(10_000, Some(Duration::ZERO)), 2 * LEASE_BATCH_MAX);
    }

    #[test]
    fn a_slow_or_unknown_handler_holds_nothing_ahead() {
        assert_eq!(prefetch(16, Some(Duration::from_secs(1))), 0);
        assert_eq!(prefetch(16, None), 0);
        assert_eq!(prefetch(0, Some(Duration::from_millis(1))), 0);
    }
}
