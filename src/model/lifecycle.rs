//! The states of a message, and the only table of legal moves.
//!
//! ```text
//!              due            lease             ack
//!  scheduled ───────▶ ready ─────────▶ leased ─────────▶ completed
//!      ▲               │ ▲               │  └─ discard ─▶ discarded
//!      │               │ └── release ────┤
//!      └───────────────┼──── retry ──────┤
//!                      │                 └─ dead-letter ▶ dead
//!  waiting = scheduled or ready                             │
//!  waiting ── cancel ─▶ cancelled                           │
//!  waiting ── expire ─▶ expired or dead  ready ◀── redrive ─┘
//! ```
//!
//! If you add a state: 1. add it to [`State::ALL`] and to [`may_move`]; 2. give it a number that no
//! earlier version used, because the numbers stand in databases; 3. extend the picture here and in
//! `docs/lifecycle.md`; 4. say in both stores who counts it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Invalid;

/// Where a message stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Can be leased now.
    Ready = 0,
    /// Due later: a delayed message or one that waits for its next attempt.
    Scheduled = 1,
    /// Somebody holds it, for a time.
    Leased = 2,
    /// A handler said yes.
    Completed = 3,
    /// A handler said that it is not worth keeping.
    Discarded = 4,
    /// Set aside until somebody acts.
    Dead = 5,
    /// Waited longer than its sender wanted.
    Expired = 6,
    /// Taken back before it was delivered.
    Cancelled = 7,
}

impl State {
    /// Every state, in the order of their numbers.
    pub const ALL: [Self; 8] = [
        Self::Ready,
        Self::Scheduled,
        Self::Leased,
        Self::Completed,
        Self::Discarded,
        Self::Dead,
        Self::Expired,
        Self::Cancelled,
    ];

    /// The word for it, as the API and the metrics say it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Scheduled => "scheduled",
            Self::Leased => "leased",
            Self::Completed => "completed",
            Self::Discarded => "discarded",
            Self::Dead => "dead",
            Self::Expired => "expired",
            Self::Cancelled => "cancelled",
        }
    }

    /// Reads the word; fails with all the words there are.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or_else(|| {
            let words = Self::ALL.map(Self::as_str).join(", ");
            Invalid::new("state", format!("a state is one of {words}"))
        })
    }

    /// The number that stands in the database.
    pub fn code(self) -> i16 {
        self as i16
    }

    /// The state with this number, if there is one.
    pub fn from_code(code: i64) -> Option<Self> {
        Self::ALL.into_iter().find(|state| i64::from(state.code()) == code)
    }

    /// Whether nobody has it and it can still be delivered, cancelled or rescheduled.
    pub fn waits(self) -> bool {
        matches!(self, Self::Ready | Self::Scheduled)
    }

    /// Whether it can still be delivered: it waits or is leased.
    pub fn lives(self) -> bool {
        self.waits() || self == Self::Leased
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether a message may go from one state to another in one step.
pub fn may_move(from: State, to: State) -> bool {
    use State::{Cancelled, Completed, Dead, Discarded, Expired, Leased, Ready, Scheduled};
    match from {
        Scheduled => matches!(to, Ready | Cancelled | Expired | Dead),
        Ready => matches!(to, Scheduled | Leased | Cancelled | Expired | Dead),
        Leased => matches!(to, Ready | Scheduled | Completed | Discarded | Dead),
        Dead => matches!(to, Ready),
        Completed | Discarded | Expired | Cancelled => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_numbers_are_read_back() {
        for state in State::ALL {
            assert_eq!(State::parse(state.as_str()), Ok(state));
            assert_eq!(State::from_code(state.code().into()), Some(state));
        }
        assert!(State::parse("gone").is_err());
        assert_eq!(State::from_code(99), None);
    }

    #[test]
    fn what_has_ended_stays_ended_but_for_dead_letters() {
        for from in State::ALL {
            let leaves = State::ALL.into_iter().any(|to| may_move(from, to));
            assert_eq!(leaves, from.lives() || from == State::Dead, "{from}");
        }
    }
}
