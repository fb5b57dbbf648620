//! What a queue says of failures otherwise than the table of the protocol.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ErrorKind, Failure, QueueName};

/// How many rules a queue can have.
pub const RULES_MAX: usize = 32;

/// Which failures, and what follows them. Of a queue's rules the first that matches counts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Which failures.
    #[serde(rename = "match")]
    pub matches: Match,
    /// What follows.
    pub action: Action,
}

/// Which failures a rule is for: those that match everything it names. Naming nothing matches all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    /// One of these statuses; empty for any, and for none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub status: Vec<Numbers>,
    /// One of these kinds; empty for any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub error_kind: Vec<ErrorKind>,
    /// Headers of the answer, by their names in lower case, each with exactly this value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub header: BTreeMap<String, String>,
    /// The number of the failure, which is that of the attempts that failed so far, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<Numbers>,
}

/// What follows a failure that a rule matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Action {
    /// Try again: after `delay`, or by the queue's backoff. Within its budget of attempts and its age.
    Retry {
        /// The wait before it; never shorter than what the handler asked for.
        #[serde(default, with = "super::queue::maybe_micros")]
        delay: Option<Duration>,
    },
    /// Set it aside.
    DeadLetter,
    /// Forget it.
    Discard,
    /// Stop the queue. The message waits there, and nothing is counted.
    StopQueue,
    /// Give it to another queue, under the same id, with a new budget of attempts.
    Move {
        /// Which one.
        to_queue: QueueName,
    },
}

impl Match {
    /// Whether it is for this failure, the `number`th of its message.
    pub fn is_for(&self, failure: &Failure, number: u32) -> bool {
        let status = || {
            self.status
                .iter()
                .any(|wanted| failure.status.is_some_and(|status| wanted.contain(status.into())))
        };
        let header = |(name, value): (&String, &String)| failure.headers.get(name) == Some(value);
        (self.status.is_empty() || status())
            && (self.error_kind.is_empty() || self.error_kind.contains(&failure.kind))
            && self.header.iter().all(header)
            && self.attempt.is_none_or(|wanted| wanted.contain(number))
    }
}

/// Some numbers that follow each other: `"404"`, `"500-599"`, `"5xx"`, `"3-"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Numbers {
    first: u32,
    last: u32,
}

impl Numbers {
    /// From the first to the last; `None` where the last comes before it.
    pub fn new(first: u32, last: u32) -> Option<Self> {
        (first <= last).then_some(Self { first, last })
    }

    /// The first of them.
    pub fn first(self) -> u32 {
        self.first
    }

    /// Whether this is one of them.
    pub fn contain(self, number: u32) -> bool {
        (self.first..=self.last).contains(&number)
    }

    /// Whether all of them are within these.
    pub fn are_within(self, first: u32, last: u32) -> bool {
        first <= self.first && self.last <= last
    }
}

impl FromStr for Numbers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse::<u32>().ok();
        let read = match (text.split_once('-'), text.strip_suffix("xx")) {
            (Some((first, "")), _) => number(first).and_then(|first| Self::new(first, u32::MAX)),
            (Some((first, last)), _) => {
                number(first).zip(number(last)).and_then(|(first, last)| Self::new(first, last))
            }
            (None, Some(hundreds)) => number(hundreds)
                .filter(|it| (1..=9).contains(it))
                .map(|it| Self { first: it * 100, last: it * 100 + 99 }),
            (None, None) => number(text).map(|only| Self { first: only, last: only }),
        };
        read.ok_or_else(|| {
            format!("{text:?} is no number and no range like \"500-599\", \"5xx\" or \"3-\"")
        })
    }
}

impl TryFrom<String> for Numbers {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first, self.last) {
            (first, last) if first == last => write!(f, "{first}"),
            (first, u32::MAX) => write!(f, "{first}-"),
            (first, last)
                if first % 100 == 0 && last == first + 99 && first < 1000 && first > 0 =>
            {
                write!(f, "{}xx", first / 100)
            }
            (first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl From<Numbers> for String {
    fn from(numbers: Numbers) -> Self {
        numbers.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_they_are_read() {
        for text in ["404", "500-509", "5xx", "3-", "1-2"] {
            assert_eq!(text.parse::<Numbers>().unwrap().to_string(), text);
        }
        assert_eq!("500-599".parse::<Numbers>().unwrap().to_string(), "5xx");
        for wrong in ["", "-", "x", "5x", "xx", "0xx", "12xx", "5-3", "-3", "1.5", "99999999999"] {
            assert!(wrong.parse::<Numbers>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_rule_is_for_what_matches_everything_that_it_names() {
        let failure = Failure { status: Some(503), ..Failure::new(ErrorKind::Status, "no") };
        let all = Match::default();
        assert!(all.is_for(&failure, 1));
        let status =
            Match { status: vec!["404".parse().unwrap(), "5xx".parse().unwrap()], ..all.clone() };
        assert!(status.is_for(&failure, 1));
        assert!(!status.is_for(&Failure::new(ErrorKind::Timeout, "late"), 1));
        let third = Match { attempt: Some("3-".parse().unwrap()), ..status };
        assert_eq!(
            [1, 2, 3, 4].map(|number| third.is_for(&failure, number)),
            [false, false, true, true]
        );
        let header = Match { header: [("x-why".into(), "gone".into())].into(), ..all };
        assert!(!header.is_for(&failure, 1));
        let headers = [("x-why".to_owned(), "gone".to_owned())].into();
        assert!(header.is_for(&Failure { headers, ..failure }, 1));
    }
}
