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

/// What keeps a queue's handler from being asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
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

/// Something that happened to a queue's guard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardChange {
    /// The handler asked to be left alone for so long.
    Held(Duration),
    /// It failed too often in a row, or while it was tried, by these settings.
    Failed(BreakerSettings),
    /// The time is over for which the breaker was open.
    TimeIsUp,
    /// As many deliveries as may be open at once went well; the queue's limit is this.
    WentWell {
        /// How many might be open at once.
        tried: u32,
        /// How many may be if the handler is well.
        limit: u32,
    },
    /// An operator says that it is to be asked again: all is forgotten.
    Lifted,
}

impl Guard {
    /// What becomes of it at `now`; `None` where nothing does, because somebody else has said the same before, or
    /// something that counts more.
    #[must_use]
    pub fn after(&self, change: &GuardChange, now: Timestamp) -> Option<Self> {
        let until = |wait: Duration| now.checked_add(wait).unwrap_or(Timestamp::MAX);
        let breaker = match (change, self.breaker) {
            (GuardChange::Held(wait), _) => {
                let until = until(*wait);
                let longer = self.held_until.is_none_or(|held| held < until);
                return longer.then(|| Self { held_until: Some(until), ..self.clone() });
            }
            (GuardChange::Lifted, _) => {
                return (*self != Self::default()).then(Self::default);
            }
            (GuardChange::Failed(settings), Breaker::Closed) => open(settings, 1, until),
            (GuardChange::Failed(settings), Breaker::HalfOpen { times, .. }) => {
                open(settings, times.saturating_add(1), until)
            }
            (GuardChange::TimeIsUp, Breaker::Open { until, times }) if until <= now => {
                Breaker::HalfOpen { limit: 1, times }
            }
            (
                GuardChange::WentWell { tried, limit },
                Breaker::HalfOpen { limit: now_at, times },
            ) if *tried == now_at => match now_at.saturating_mul(2) {
                more if more >= *limit => Breaker::Closed,
                more => Breaker::HalfOpen { limit: more, times },
            },
            (
                GuardChange::Failed(_) | GuardChange::TimeIsUp | GuardChange::WentWell { .. },
                Breaker::Closed | Breaker::Open { .. } | Breaker::HalfOpen { .. },
            ) => return None,
        };
        Some(Self { breaker, ..self.clone() })
    }

    /// How many deliveries may be open at `now` where `limit` may be otherwise.
    pub fn limit(&self, limit: u32, now: Timestamp) -> u32 {
        if self.held_until.is_some_and(|until| until > now) {
            return 0;
        }
        match self.breaker {
            Breaker::Closed => limit,
            Breaker::Open { .. } => 0,
            Breaker::HalfOpen { limit: few, .. } => few.min(limit),
        }
    }

    /// When it will be another one by itself; `None` where only an event changes it.
    pub fn changes_at(&self, now: Timestamp) -> Option<Timestamp> {
        let held = self.held_until.filter(|until| *until > now);
        let open = match self.breaker {
            Breaker::Open { until, .. } => Some(until.max(now)),
            Breaker::Closed | Breaker::HalfOpen { .. } => None,
        };
        held.into_iter().chain(open).min()
    }
}

fn open(
    settings: &BreakerSettings,
    times: u32,
    until: impl FnOnce(Duration) -> Timestamp,
) -> Breaker {
    let doubled = settings.open_for.checked_mul(1 << (times - 1).min(30));
    let wait = doubled.unwrap_or(settings.max_open).min(settings.max_open);
    Breaker::Open { until: until(wait), times }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn after(guard: &Guard, change: GuardChange, second: i64) -> Guard {
        guard.after(&change, at(second)).unwrap()
    }

    fn failed() -> GuardChange {
        GuardChange::Failed(BreakerSettings::default())
    }

    fn well(tried: u32) -> GuardChange {
        GuardChange::WentWell { tried, limit: 5 }
    }

    #[test]
    fn it_opens_tries_with_a_few_and_closes() {
        let open = after(&Guard::default(), failed(), 0);
        assert_eq!(open.breaker, Breaker::Open { until: at(30), times: 1 });
        assert_eq!((open.limit(5, at(0)), open.changes_at(at(0))), (0, Some(at(30))));
        assert_eq!(open.after(&GuardChange::TimeIsUp, at(29)), None);
        let mut guard = after(&open, GuardChange::TimeIsUp, 30);
        for few in [1, 2, 4] {
            assert_eq!(guard.limit(5, at(30)), few);
            assert_eq!(guard.after(&well(few + 1), at(30)), None, "said of another step");
            guard = after(&guard, well(few), 30);
        }
        assert_eq!(guard, Guard::default());
    }

    #[test]
    fn it_stays_open_for_twice_as_long_each_time_up_to_a_limit() {
        let mut guard = Guard::default();
        let mut now = 0;
        for open_for in [30, 60, 120, 240, 480, 600, 600] {
            guard = after(&guard, failed(), now);
            assert_eq!(guard.changes_at(at(now)), Some(at(now + open_for)));
            assert_eq!(guard.after(&failed(), at(now)), None, "it is open already");
            now += open_for;
            guard = after(&guard, GuardChange::TimeIsUp, now);
        }
    }

    #[test]
    fn a_hold_is_only_ever_prolonged_and_an_operator_lifts_it() {
        let held = after(&Guard::default(), GuardChange::Held(Duration::from_secs(60)), 0);
        assert_eq!(held.after(&GuardChange::Held(Duration::from_secs(30)), at(10)), None);
        assert_eq!((held.limit(5, at(59)), held.limit(5, at(60))), (0, 5));
        assert_eq!(after(&held, GuardChange::Lifted, 1), Guard::default());
        assert_eq!(Guard::default().after(&GuardChange::Lifted, at(1)), None);
        let for_ever = after(&held, GuardChange::Held(Duration::MAX), 0);
        assert_eq!(for_ever.held_until, Some(Timestamp::MAX));
    }
}
