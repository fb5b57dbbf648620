//! What keeps a queue's handler from being asked: a hold that it wanted, a breaker that found it ill.
//!
//! One state for all replicas, kept by the store; so that N of them do not ask an ill handler N times, and a
//! restart does not forget. Times are the database's.
//!
//! ```text
//!             failures in a row            open_for is over
//!   closed ───────────────────▶ open ───────────────────────▶ half-open: 1, 2, 4, … at once
//!     ▲                          ▲                                │            │
//!     │                          └──── one fails; open for twice ─┘            │
//!     └─────────────────────────────────────── as many as the queue's limit ───┘
//! ```
//!
//! The breaker is Nygard's (*Release It!*, 2007), with the ramp that he leaves open.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BreakerSettings {
    /// How many deliveries in a row must fail in a way that says that the handler is ill, in one process.
    pub failures: u32,
    /// How long it stays open the first time; twice as long each time that the handler is still ill.
    #[serde(with = "super::queue::micros")]
    pub open_for: Duration,
    /// The longest that it stays open at once.
    #[serde(with = "super::queue::micros")]
    pub max_open: Duration,
}

impl Default for BreakerSettings {
    fn default() -> Self {
        Self { failures: 10, open_for: Duration::from_secs(30), max_open: Duration::from_secs(600) }
    }
}

impl BreakerSettings {
    /// For how long it is open that is opened for the so manyth time, from 1.
    pub fn opens_for(&self, times: u32) -> Duration {
        let doubled = self.open_for.checked_mul(1 << times.saturating_sub(1).min(30));
        doubled.unwrap_or(self.max_open).min(self.max_open)
    }
}

/// What keeps a queue's handler from being asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Grows with every change, so that an old reading is told from a new one.
    #[serde(default)]
    pub version: u64,
    /// Until when the handler asked to be left alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_until: Option<Timestamp>,
    /// Whether it is thought to be well.
    #[serde(default)]
    pub breaker: Breaker,
}

/// Whether a handler is thought to be well.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case", deny_unknown_fields)]
pub enum Breaker {
    /// It is.
    #[default]
    Closed,
    /// It is not: nobody asks it.
    Open {
        /// When somebody may try.
        until: Timestamp,
        /// How often it was opened without being closed in between, from 1.
        times: u32,
    },
    /// Some try.
    HalfOpen {
        /// How many at once, over all replicas.
        limit: u32,
        /// As in [`Breaker::Open`].
        times: u32,
        /// How many have gone well since there is this limit.
        well: u32,
    },
}

impl Breaker {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open { .. } => "open",
            Self::HalfOpen { .. } => "half_open",
        }
    }
}

/// For how long a handler wants to be left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    /// So long.
    pub wait: Duration,
    /// The longest that it can ask for: what lasts longer was written before the clock was set back.
    pub longest: Duration,
}

/// Something that happened to a queue's guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardChange {
    /// The handler asked to be left alone for so long.
    Held(Hold),
    /// It failed too often in a row, or while it was tried, by these settings; and may have asked to be left alone
    /// as well.
    Failed(BreakerSettings, Option<Hold>),
    /// The time may be over for which the breaker was open, by these settings.
    TimeIsUp(BreakerSettings),
    /// Deliveries went well that were made to see whether the handler is.
    WentWell {
        /// How many might be open at once when they began.
        tried: u32,
        /// How many there were.
        well: u32,
        /// How many may be open if the handler is well.
        limit: u32,
    },
    /// An operator says that it is to be asked again, or says so by other settings: all is forgotten.
    Lifted,
}

impl Guard {
    /// What becomes of it at `now`; itself where nothing does, because somebody else has said the same before, or
    /// something that counts more.
    #[must_use]
    pub fn after(&self, change: &GuardChange, now: Timestamp) -> Self {
        let (held_until, breaker) = match change {
            GuardChange::Held(hold) => (self.held(*hold, now), self.breaker),
            GuardChange::Failed(settings, hold) => {
                let held_until = hold.map_or(self.held_until, |hold| self.held(hold, now));
                (held_until, self.breaker.failed(settings, now))
            }
            GuardChange::TimeIsUp(settings) => (self.held_until, self.breaker.tried(settings, now)),
            GuardChange::WentWell { tried, well, limit } => {
                (self.held_until, self.breaker.went_well(*tried, *well, *limit))
            }
            GuardChange::Lifted => (None, Breaker::Closed),
        };
        let unchanged = held_until == self.held_until && breaker == self.breaker;
        Self { version: self.version + u64::from(!unchanged), held_until, breaker }
    }

    /// Until when the handler is left alone that asks for it. A little longer than it asked, so that what others
    /// ask for in the same moment changes nothing any more.
    fn held(&self, Hold { wait, longest }: Hold, now: Timestamp) -> Option<Timestamp> {
        if self.holds(longest, now).is_some_and(|until| until >= later(now, wait)) {
            return self.held_until;
        }
        Some(later(now, wait.saturating_add(HELD_LONGER)))
    }

    /// Until when the handler is left alone at `now`, if it is.
    fn holds(&self, longest: Duration, now: Timestamp) -> Option<Timestamp> {
        let longest = later(now, longest.saturating_add(HELD_LONGER));
        self.held_until.filter(|until| *until > now && *until <= longest)
    }

    /// How many deliveries may be open at `now` where `limit` may be otherwise, and a hold may last for `longest`.
    pub fn limit(&self, limit: u32, longest: Duration, now: Timestamp) -> u32 {
        if self.holds(longest, now).is_some() {
            return 0;
        }
        match self.breaker {
            Breaker::Closed => limit,
            Breaker::Open { .. } => 0,
            Breaker::HalfOpen { limit: few, .. } => few.min(limit),
        }
    }

    /// Whether an open breaker is to be tried at `now`.
    pub fn is_to_be_tried(&self, settings: &BreakerSettings, now: Timestamp) -> bool {
        self.breaker.tried(settings, now) != self.breaker
    }
}

impl Breaker {
    fn failed(self, settings: &BreakerSettings, now: Timestamp) -> Self {
        let times = match self {
            Self::Closed => 1,
            Self::HalfOpen { times, .. } => times.saturating_add(1),
            Self::Open { .. } => return self,
        };
        Self::Open { until: later(now, settings.opens_for(times)), times }
    }

    /// One that is open for longer than it can be was opened before the clock was set back.
    fn tried(self, settings: &BreakerSettings, now: Timestamp) -> Self {
        match self {
            Self::Open { until, times }
                if until <= now || until > later(now, settings.max_open) =>
            {
                Self::HalfOpen { limit: 1, times, well: 0 }
            }
            Self::Open { .. } | Self::Closed | Self::HalfOpen { .. } => self,
        }
    }

    fn went_well(self, tried: u32, more: u32, limit: u32) -> Self {
        match self {
            Self::HalfOpen { limit: few, times, well } if few == tried => {
                let well = well.saturating_add(more);
                let wider = few.saturating_mul(2);
                if well < few {
                    Self::HalfOpen { limit: few, times, well }
                } else if wider >= limit {
                    Self::Closed
                } else {
                    Self::HalfOpen { limit: wider, times, well: 0 }
                }
            }
            Self::HalfOpen { .. } | Self::Closed | Self::Open { .. } => self,
        }
    }
}

fn later(now: Timestamp, wait: Duration) -> Timestamp {
    now.checked_add(wait).unwrap_or(Timestamp::MAX)
}

/// What a hold lasts longer than was asked for.
const HELD_LONGER: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(3600);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn after(guard: &Guard, change: GuardChange, second: i64) -> Guard {
        let changed = guard.after(&change, at(second));
        assert_eq!(changed.version, guard.version + 1, "{change:?}");
        changed
    }

    fn nothing(guard: &Guard, change: GuardChange, second: i64) {
        assert_eq!(guard.after(&change, at(second)), *guard, "{change:?}");
    }

    fn failed() -> GuardChange {
        GuardChange::Failed(BreakerSettings::default(), None)
    }

    fn time_is_up() -> GuardChange {
        GuardChange::TimeIsUp(BreakerSettings::default())
    }

    fn held_for(seconds: u64) -> GuardChange {
        GuardChange::Held(Hold { wait: Duration::from_secs(seconds), longest: LONGEST })
    }

    fn well(tried: u32, well: u32) -> GuardChange {
        GuardChange::WentWell { tried, well, limit: 5 }
    }

    #[test]
    fn it_opens_tries_with_a_few_and_closes() {
        let open = after(&Guard::default(), failed(), 0);
        assert_eq!(open.breaker, Breaker::Open { until: at(30), times: 1 });
        assert_eq!(open.limit(5, LONGEST, at(0)), 0);
        nothing(&open, time_is_up(), 29);
        let mut guard = after(&open, time_is_up(), 30);
        for few in [1, 2, 4] {
            assert_eq!(guard.limit(5, LONGEST, at(30)), few);
            nothing(&guard, well(few + 1, 1), 30);
            for _ in 0..few {
                guard = after(&guard, well(few, 1), 30);
            }
        }
        assert_eq!(guard.breaker, Breaker::Closed);
    }

    #[test]
    fn it_stays_open_for_twice_as_long_each_time_up_to_a_limit() {
        let mut guard = Guard::default();
        let mut now = 0;
        for open_for in [30, 60, 120, 240, 480, 600, 600] {
            guard = after(&guard, failed(), now);
            let Breaker::Open { until, .. } = guard.breaker else { panic!("{guard:?}") };
            assert_eq!(until, at(now + open_for));
            nothing(&guard, failed(), now);
            now += open_for;
            guard = after(&guard, time_is_up(), now);
        }
    }

    #[test]
    fn a_hold_is_only_ever_prolonged_and_an_operator_lifts_it() {
        let held = after(&Guard::default(), held_for(60), 0);
        nothing(&held, held_for(30), 10);
        nothing(&held, held_for(60), 1);
        assert_eq!([60, 61].map(|now| held.limit(5, LONGEST, at(now))), [0, 5]);
        let lifted = after(&held, GuardChange::Lifted, 1);
        assert_eq!((lifted.held_until, lifted.breaker), (None, Breaker::Closed));
        nothing(&lifted, GuardChange::Lifted, 1);
        let for_ever = Hold { wait: Duration::MAX, longest: Duration::MAX };
        let for_ever = after(&held, GuardChange::Held(for_ever), 0);
        assert_eq!(for_ever.held_until, Some(Timestamp::MAX));
    }

    #[test]
    fn who_fails_and_asks_for_time_gets_both() {
        let hold = Some(Hold { wait: Duration::from_secs(600), longest: LONGEST });
        let failed = GuardChange::Failed(BreakerSettings::default(), hold);
        let open = after(&Guard::default(), failed, 0);
        assert!(matches!(open.breaker, Breaker::Open { .. }));
        let tried = after(&open, time_is_up(), 30);
        assert_eq!([30, 600, 601].map(|now| tried.limit(5, LONGEST, at(now))), [0, 0, 1]);
    }

    #[test]
    fn a_clock_that_was_set_back_holds_nobody_for_longer_than_can_be() {
        let held = after(&Guard::default(), held_for(3600), 10_000);
        assert_eq!(held.limit(5, LONGEST, at(10_000)), 0);
        assert_eq!(held.limit(5, LONGEST, at(9_000)), 5);
        let again = after(&held, held_for(60), 9_000);
        assert_eq!(again.limit(5, LONGEST, at(9_000)), 0, "and can be held anew");
        let open = after(&Guard::default(), failed(), 10_000);
        after(&open, time_is_up(), 9_000);
    }
}
