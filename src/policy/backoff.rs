//! Delays between attempts, with the ceiling and the jitter as arguments.
//!
//! Full jitter follows Brooker, *Exponential Backoff And Jitter* (AWS Architecture Blog, 2015): of the
//! schemes compared there it needs the fewest calls while many clients compete.

use std::time::Duration;

use crate::model::{Backoff, Curve, Jitter};

/// The wait before the retry number `retry` (from 0), for a chance from 0 up to 1.
///
/// Total: no number overflows it, and the result is never above `backoff.max`.
pub fn wait(backoff: &Backoff, retry: u32, chance: f64) -> Duration {
    let base = backoff.base.as_secs_f64();
    let grown = match backoff.curve {
        Curve::Fixed => base,
        Curve::Linear => base * (f64::from(retry) + 1.0),
        Curve::Exponential => base * backoff.factor.powi(i32::try_from(retry).unwrap_or(i32::MAX)),
    };
    let ceiling = grown.min(backoff.max.as_secs_f64());
    let seconds = match backoff.jitter {
        Jitter::Full => ceiling * chance,
        Jitter::Bounded => ceiling * (0.5 + chance / 2.0),
        Jitter::None => ceiling,
    };
    Duration::try_from_secs_f64(seconds).unwrap_or(backoff.max).min(backoff.max)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn waits_double_up_to_the_ceiling() {
        let backoff =
            Backoff { jitter: Jitter::None, max: Duration::from_secs(10), ..Default::default() };
        let waits = [0, 1, 2, 3, 4, u32::MAX].map(|retry| wait(&backoff, retry, 0.0).as_secs());
        assert_eq!(waits, [1, 2, 4, 8, 10, 10]);
    }

    #[test]
    fn curves_grow_as_they_are_called() {
        let waits = |curve| {
            let backoff = Backoff { curve, jitter: Jitter::None, ..Default::default() };
            [0, 1, 2, 3].map(|retry| wait(&backoff, retry, 0.0).as_secs())
        };
        assert_eq!(waits(Curve::Fixed), [1, 1, 1, 1]);
        assert_eq!(waits(Curve::Linear), [1, 2, 3, 4]);
        assert_eq!(waits(Curve::Exponential), [1, 2, 4, 8]);
    }

    #[test]
    fn bounded_jitter_waits_for_half_at_least() {
        let backoff = Backoff { jitter: Jitter::Bounded, ..Default::default() };
        assert_eq!(wait(&backoff, 3, 0.0), Duration::from_secs(4));
        assert_eq!(wait(&backoff, 3, 0.5), Duration::from_secs(6));
    }

    #[test]
    fn full_jitter_spreads_from_nothing_to_the_whole_wait() {
        let backoff = Backoff::default();
        assert_eq!(wait(&backoff, 3, 0.0), Duration::ZERO);
        assert_eq!(wait(&backoff, 3, 0.5), Duration::from_secs(4));
    }

    proptest! {
        #[test]
        fn never_above_the_ceiling(
            base in 1u64..10_000, factor in 1.0f64..100.0, max in 1u64..1_000_000,
            retry: u32, chance in 0.0f64..1.0,
            curve in prop_oneof![Just(Curve::Fixed), Just(Curve::Linear), Just(Curve::Exponential)],
            jitter in prop_oneof![Just(Jitter::Full), Just(Jitter::Bounded), Just(Jitter::None)],
        ) {
            let max = Duration::from_millis(max);
            let backoff = Backoff { curve, base: Duration::from_millis(base), factor, max, jitter };
            prop_assert!(wait(&backoff, retry, chance) <= max);
        }
    }
}
