//! A clock that sends: when, what, and what becomes of times at which nobody was there to send.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::queue::micros;
use super::{Destination, Envelope, Idempotency, Invalid, MessageId, NewMessage, ScheduleName};

/// How many firings of a schedule are remembered: the latest.
pub const FIRINGS_KEPT: usize = 50;
/// How many missed times can be made up for at once.
pub const MISSED_MAX: u32 = 1000;

/// What is sent, and when.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// When.
    pub timetable: Timetable,
    /// The message, as an [`Envelope`] that names its queue or topic. Its text is the payload's, byte for byte.
    pub message: Box<RawValue>,
    /// What becomes of times that were missed.
    pub missed: Missed,
    /// Whether it sends nothing by itself for now. Times that pass meanwhile are not missed: they are nothing.
    pub paused: bool,
}

/// When something is to happen, again and again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Timetable {
    /// At the times that a cron expression names on the clocks of a time zone.
    Cron {
        /// Five fields, or six with seconds first.
        expression: String,
        /// By its name in the IANA database.
        time_zone: String,
    },
    /// Always after as long, whatever clocks on walls show.
    Every {
        /// After so long.
        #[serde(with = "micros")]
        every: Duration,
        /// Counted from here.
        from: Timestamp,
    },
}

/// What becomes of times at which nobody sent, because no process was there, or its queue was full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Missed {
    /// Nothing: the next one comes when it is due.
    Skip,
    /// One message for all of them, at once.
    #[default]
    Once,
    /// A message for each, at once; where there are more, for the latest so many.
    All {
        /// At most [`MISSED_MAX`].
        max: u32,
    },
}

/// A schedule as the store knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduleRecord {
    /// Its name.
    pub name: ScheduleName,
    /// What is sent, and when.
    pub schedule: Schedule,
    /// How far it has come.
    pub state: ScheduleState,
    /// Changes with every change of the other two: whoever writes has seen what it replaces.
    pub version: i64,
}

/// How far a schedule has come.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduleState {
    /// When it sends next; `None` for never again.
    pub next_at: Option<Timestamp>,
    /// What it has sent, the latest first; at most [`FIRINGS_KEPT`].
    #[serde(default)]
    pub firings: Vec<Firing>,
}

/// One time at which a schedule was due, or somebody wanted it run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Firing {
    /// The time that it was for.
    pub due_at: Timestamp,
    /// When it was sent.
    pub fired_at: Timestamp,
    /// Whether somebody wanted it run.
    #[serde(default)]
    pub by_hand: bool,
    /// The message that was sent; under which it was published, for a topic.
    pub message_id: Option<MessageId>,
    /// How many times before this one were missed, and not made up for.
    #[serde(default)]
    pub skipped: u32,
    /// Why nothing was sent, where nothing was.
    pub problem: Option<String>,
}

impl Schedule {
    /// The message for one of its times, under the id that follows from its name and that time, so that nobody sends
    /// it twice.
    pub fn message_at(
        &self,
        name: &ScheduleName,
        due: Timestamp,
    ) -> Result<NewMessage, Vec<Invalid>> {
        let mut message = self.message()?;
        message.id = MessageId::scheduled(name.as_str(), due);
        let key = format!("{name} {due}");
        message.keys.push(Idempotency::new("schedule", &key, [0; 32]));
        Ok(message)
    }

    /// The message, under an id of its own.
    pub fn message(&self) -> Result<NewMessage, Vec<Invalid>> {
        let wrong = |_| vec![Invalid::new("", "it is no message")];
        let envelope = serde_json::from_str::<Envelope>(self.message.get()).map_err(wrong)?;
        let to = envelope.destination().map_err(|wrong| vec![wrong])?;
        // No time in it is absolute, so that no moment bounds how far ahead it may lie.
        let (message, key) = envelope.into_message(to, Timestamp::UNIX_EPOCH)?;
        if key.is_some() {
            let detail = "each of its messages would be the first one again";
            return Err(vec![Invalid::new("/idempotency_key", detail)]);
        }
        Ok(message)
    }

    /// Where its messages go.
    pub fn destination(&self) -> Option<Destination> {
        self.message().ok().map(|message| message.to)
    }

    /// The ETag of its settings: it changes with them and with nothing else.
    pub fn etag(&self) -> String {
        let json = serde_json::to_vec(self).expect("settings are plain data, which is always JSON");
        let digest = Sha256::digest(json);
        let hex = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>();
        format!("\"{hex}\"")
    }
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        self.timetable == other.timetable
            && self.message.get() == other.message.get()
            && self.missed == other.missed
            && self.paused == other.paused
    }
}

impl ScheduleState {
    /// Remembers a firing, and forgets the oldest of too many.
    pub fn remember(&mut self, firing: Firing) {
        self.firings.insert(0, firing);
        self.firings.truncate(FIRINGS_KEPT);
    }
}
