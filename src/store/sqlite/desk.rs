//! The one place that writes: its connection, its transaction, and what it knows by heart.
//!
//! It decides nothing about messages. Because nobody else writes, what it keeps in memory (the queues,
//! the next number, the changes of the counts) cannot be out of date.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, Row, SqliteConnection, query, query_scalar};

use crate::clock::Clock;
use crate::model::{
    MessageId, NewMessage, QueueName, QueueSettings, State, Subscription, Token, TopicName,
};
use crate::telemetry::metrics;

use super::super::columns::{self, BEHIND};
use super::super::{Handover, News};
use super::fault::{leaves_doubt, unreadable};
use super::groups::GroupChanges;
use super::open::Opened;
use super::{rows, topics};

/// The writer's desk.
pub(super) struct Desk {
    pub(super) connection: SqliteConnection,
    /// The time of the transaction that is open: every comparison in it is with this one moment.
    pub(super) now: i64,
    /// The same moment on the monotonic clock, or shortly before.
    pub(super) began: Instant,
    /// The queues there are, as they were when the transaction began.
    pub(super) queues: Queues,
    /// What the transaction has changed in the counts so far.
    pub(super) tally: Tally,
    /// What the transaction has done to groups so far.
    pub(super) groups: GroupChanges,
    /// Where the last claim of a queue ended whose messages take turns: the lane of its last message.
    pub(super) last_lanes: HashMap<i64, i64>,
    /// What is to be told once it is committed.
    pub(super) word: Word,
    /// Whether messages are to be looked up by name before they are inserted.
    pub(super) careful: bool,
    /// The start of the process that this one is, by its last report.
    pub(super) incarnation: i64,
    /// The same, of a report that is not committed yet.
    reported: Option<i64>,
    next_seq: i64,
    /// What the tokens of the transaction that is open are made of, once the first is given.
    chance: Option<i64>,
    queues_changed: bool,
    /// Whether the connection is not to be used again: see [`Desk::start_anew`].
    in_doubt: bool,
    /// How many messages are in which state, as the last commit left it.
    counts: Counts,
    /// What is leased here, by number, as far as it was not touched by anything but a settlement since.
    /// What is not found here is looked for in the database.
    pub(super) leases: HashMap<i64, Held>,
    /// Who takes messages as soon as they are committed.
    pub(super) handover: Arc<Handover>,
    options: SqliteConnectOptions,
    clock: Arc<dyn Clock>,
    news: Arc<News>,
    /// Held as long as anything here may be written.
    _lock: File,
}

// Lives on: the primary key of message, from its end.
const LAST_SEQ: &str = "\
select coalesce(max(seq), 0)
from message";

// Lives on: the primary key of pump.
const LAST_INCARNATION: &str = "\
select incarnation
from pump
where id = 1";

// Lives on: queue, read whole; there are few.
const QUEUES: &str = "\
select id, name, settings
from queue";

/// Lives on: the primary keys of queue and tally. What is left of deleted queues is not counted.
macro_rules! change_tally {
    () => {
        "\
insert into tally (queue_id, state, n)
select value ->> 0, value ->> 1, value ->> 2
from json_each(?)
where value ->> 0 in (select id from queue)
on conflict (queue_id, state) do update
set n = n + excluded.n"
    };
}

// Lives on: see `change_tally`. It is executed together with the commit.
const CHANGE_TALLY: &str = change_tally!();

// Lives on: tally, read whole; a few rows for each queue.
const TALLY: &str = "\
select queue_id, state, n
from tally";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[LAST_SEQ, LAST_INCARNATION, QUEUES, CHANGE_TALLY, TALLY];

impl Desk {
    /// Sets it up over a connection that may write to a database with today's schema.
    pub(super) async fn new(
        opened: Opened,
        clock: Arc<dyn Clock>,
        news: Arc<News>,
        handover: Arc<Handover>,
    ) -> sqlx::Result<Self> {
        let Opened { mut connection, options, lock } = opened;
        let (next_seq, incarnation) = recall(&mut connection).await?;
        Ok(Self {
            queues: Queues::load(&mut connection).await?,
            counts: Counts::load(&mut connection).await?,
            leases: HashMap::new(),
            handover,
            connection,
            now: 0,
            began: Instant::now(),
            tally: Tally::default(),
            groups: GroupChanges::default(),
            last_lanes: HashMap::new(),
            word: Word::default(),
            careful: false,
            incarnation,
            reported: None,
            next_seq,
            chance: None,
            queues_changed: false,
            in_doubt: false,
            options,
            clock,
            news,
            _lock: lock,
        })
    }

    /// Begins a transaction that may write: the lock is taken now and not half-way through it.
    pub(super) async fn begin(&mut self) -> sqlx::Result<()> {
        if self.in_doubt {
            self.start_anew().await?;
        }
        if query("begin immediate").execute(&mut self.connection).await.is_err() {
            // What went wrong (a crash of its thread, a rollback that failed) may be over on a new one.
            self.start_anew().await?;
            query("begin immediate").execute(&mut self.connection).await?;
        }
        self.reported = None;
        self.began = Instant::now();
        self.now = rows::micros(self.clock.now());
        self.tally = Tally::default();
        self.groups = GroupChanges::default();
        self.word = Word::default();
        self.chance = None;
        if self.queues_changed {
            self.queues = Queues::load(&mut self.connection).await?;
            self.queues_changed = false;
        }
        Ok(())
    }

    /// Leaves the connection behind for a new one, and reads again what is known by heart.
    ///
    /// After a write or a sync that failed, nobody knows what the old one still holds, nor whether its
    /// transaction is in the file: its callers hear that ([`Error::Unavailable`](super::super::Error)), and
    /// the next transaction sees what the files say, be it there or not. What was acknowledged before is
    /// not touched by this: each commit was synced by a call that succeeded, and what is in doubt is
    /// written anew before it is synced again (the system may have forgotten what it could not write): the
    /// log from where the last good commit ended, the pages of a failed checkpoint from the log. This does
    /// not help against a disk that says it has synced and has not, or that loses what it kept.
    async fn start_anew(&mut self) -> sqlx::Result<()> {
        let new = self.options.connect().await?;
        let old = std::mem::replace(&mut self.connection, new);
        // How it ends says nothing about what it wrote.
        let _ = old.close().await;
        let (next_seq, incarnation) = recall(&mut self.connection).await?;
        self.next_seq = self.next_seq.max(next_seq);
        self.counts = Counts::load(&mut self.connection).await?;
        self.leases.clear();
        self.incarnation = incarnation;
        self.queues_changed = true;
        self.in_doubt = false;
        Ok(())
    }

    /// Commits, and tells the news. On an error the transaction is still to be rolled back.
    pub(super) async fn commit(&mut self) -> sqlx::Result<()> {
        let changes = self.tally.changes();
        if changes.is_empty() {
            query("commit").execute(&mut self.connection).await?;
        } else {
            let end = query(concat!(change_tally!(), ";\ncommit")).bind(rows::json(&changes));
            end.execute(&mut self.connection).await?;
        }
        self.counts.change(&self.tally);
        self.incarnation = self.reported.take().unwrap_or(self.incarnation);
        std::mem::take(&mut self.word).spread(&self.news);
        Ok(())
    }

    /// Takes everything back, because of an error, or of a bug that was met.
    pub(super) async fn roll_back(&mut self, error: Option<&sqlx::Error>) {
        // SQLite may have rolled back by itself; if it could not, the next `begin` finds out.
        let _ = query("rollback").execute(&mut self.connection).await;
        // Those of this transaction are nobody's; the others are found in the database.
        self.leases.clear();
        self.in_doubt |= error.is_none_or(leaves_doubt);
    }

    /// Says that this process has reported itself, once it is committed.
    pub(super) fn reports(&mut self, incarnation: i64) {
        self.reported = Some(incarnation);
    }

    /// The number of the next message. One that is not used leaves a gap, which nobody minds.
    pub(super) fn take_seq(&mut self) -> i64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        seq
    }

    /// A random number for the tokens of this transaction: each lease has this and its message's number,
    /// added, for a token. A message is leased at most once in a transaction.
    pub(super) fn chance(&mut self) -> sqlx::Result<i64> {
        let chance = match self.chance {
            Some(chance) => chance,
            None => columns::chance()?,
        };
        self.chance = Some(chance);
        Ok(chance)
    }

    /// Says that queues are changed in this transaction, so that they are read again before the next.
    pub(super) fn queues_change(&mut self) {
        self.queues_changed = true;
        self.word.settings = true;
    }

    /// Moves a message from one state to another in the counts.
    pub(super) fn moved(&mut self, queue_id: i64, from: impl Into<Count>, to: impl Into<Count>) {
        self.went(queue_id, from);
        self.came(queue_id, to);
    }

    /// Counts a message that is new.
    pub(super) fn came(&mut self, queue_id: i64, to: impl Into<Count>) {
        let to = to.into();
        self.tally.add(queue_id, to, 1);
        if let Count::State(state) = to {
            self.told(queue_id, state);
        }
    }

    /// Counts a message out.
    pub(super) fn went(&mut self, queue_id: i64, from: impl Into<Count>) {
        self.tally.add(queue_id, from.into(), -1);
    }

    /// Moves a message that was leased to another queue, in the counts and in its group.
    pub(super) fn moved_to(&mut self, queue_id: i64, seq: i64, held: &Held) {
        self.went(held.queue_id, State::Leased);
        self.came(queue_id, Count::of_ready(held.group.is_some()));
        if let Some(group) = held.group {
            self.groups.gone(&[seq]);
            self.groups.came(queue_id, group);
        }
    }

    /// How many messages of a queue are unsettled, with what this transaction has changed so far.
    pub(super) fn unsettled(&self, queue_id: i64) -> i64 {
        let living = State::ALL.into_iter().filter(|state| state.lives());
        let living = living.map(Count::State).chain([Count::Behind]);
        living.map(|count| self.count(queue_id, count)).sum()
    }

    /// How many messages of a queue are counted there, with what this transaction has changed so far.
    pub(super) fn count(&self, queue_id: i64, count: impl Into<Count>) -> i64 {
        let key = (queue_id, count.into());
        let before = self.counts.0.get(&key).copied().unwrap_or(0);
        before + self.tally.0.get(&key).copied().unwrap_or(0)
    }

    /// Leaves the database in one tidy file, and the file to others.
    pub(super) async fn close(mut self) {
        // What is not written back now is written back by the next process: nothing depends on it.
        let _ = query("pragma wal_checkpoint(truncate)").execute(&mut self.connection).await;
        let _ = self.connection.close().await;
    }

    fn told(&mut self, queue_id: i64, state: State) {
        match state {
            State::Ready => self.word.ready.extend(self.queues.name(queue_id)),
            State::Scheduled => self.word.schedule = true,
            State::Leased
            | State::Completed
            | State::Discarded
            | State::Dead
            | State::Expired
            | State::Cancelled => (),
        }
    }
}

/// What is known by heart of the database: the next number, and the start of the process that reported last.
async fn recall(connection: &mut SqliteConnection) -> sqlx::Result<(i64, i64)> {
    let last: i64 = query_scalar(LAST_SEQ).fetch_one(&mut *connection).await?;
    Ok((last + 1, query_scalar(LAST_INCARNATION).fetch_one(connection).await?))
}

/// The queues there are, by name and by number.
#[derive(Debug, Default)]
pub(super) struct Queues {
    by_name: HashMap<QueueName, Arc<Queue>>,
    by_id: HashMap<i64, Arc<Queue>>,
    /// Those that cannot be read; whoever lists all queues says so in the log.
    unreadable: HashSet<QueueName>,
    /// Who wants what is published, by topic.
    subscriptions: HashMap<TopicName, Vec<Subscription>>,
}

/// A queue, as far as writing needs it.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) id: i64,
    pub(super) name: QueueName,
    pub(super) settings: QueueSettings,
}

impl Queues {
    async fn load(connection: &mut SqliteConnection) -> sqlx::Result<Self> {
        let mut queues = Self::default();
        for row in query(QUEUES).fetch_all(&mut *connection).await? {
            // Nobody can ask for one whose name is no name.
            let Ok(name) = rows::queue_name(row.try_get("name")?) else { continue };
            match serde_json::from_str(row.try_get("settings")?) {
                Ok(settings) => queues.add(Queue { id: row.try_get("id")?, name, settings }),
                Err(_) => drop(queues.unreadable.insert(name)),
            }
        }
        for subscription in topics::all(connection).await? {
            let of_topic = queues.subscriptions.entry(subscription.topic.clone()).or_default();
            of_topic.push(subscription);
        }
        Ok(queues)
    }

    fn add(&mut self, queue: Queue) {
        let queue = Arc::new(queue);
        self.by_name.insert(queue.name.clone(), queue.clone());
        self.by_id.insert(queue.id, queue);
    }

    /// The queue with this name. **Fails** for one that is there and cannot be read.
    pub(super) fn named(&self, name: &QueueName) -> sqlx::Result<Option<Arc<Queue>>> {
        if self.unreadable.contains(name) {
            return Err(unreadable(format!("the settings of queue {name} are unknown")));
        }
        Ok(self.by_name.get(name).cloned())
    }

    /// The queue with this number.
    pub(super) fn numbered(&self, id: i64) -> Option<&Arc<Queue>> {
        self.by_id.get(&id)
    }

    /// The copies of a message that is published, for those that want it.
    pub(super) fn copies_of(
        &self,
        topic: &TopicName,
        message: &NewMessage,
    ) -> Vec<(QueueName, NewMessage)> {
        super::super::topics::copies(message, self.subscribed(topic))
    }

    /// Who has subscribed to a topic.
    pub(super) fn subscribed(&self, topic: &TopicName) -> &[Subscription] {
        self.subscriptions.get(topic).map_or(&[], Vec::as_slice)
    }

    /// Their numbers, as a JSON list.
    pub(super) fn ids(&self) -> String {
        rows::list(self.by_id.keys().copied())
    }

    /// All of them, in no order.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Queue>> {
        self.by_id.values()
    }

    fn name(&self, id: i64) -> Option<QueueName> {
        self.by_id.get(&id).map(|queue| queue.name.clone())
    }
}

/// How many messages of a queue are in which state.
#[derive(Debug, Default)]
struct Counts(HashMap<(i64, Count), i64>);

/// What is counted: messages by their state, and, of those that are ready, by themselves the ones that wait for
/// their turn in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Count {
    State(State),
    Behind,
}

impl From<State> for Count {
    fn from(state: State) -> Self {
        Self::State(state)
    }
}

impl Count {
    /// That of a message which is ready.
    pub(super) fn of_ready(is_behind: bool) -> Self {
        if is_behind { Self::Behind } else { Self::State(State::Ready) }
    }

    fn from_code(code: i64) -> sqlx::Result<Self> {
        if code == i64::from(BEHIND) {
            Ok(Self::Behind)
        } else {
            rows::state(code).map(Self::State)
        }
    }

    fn code(self) -> i16 {
        match self {
            Self::State(state) => state.code(),
            Self::Behind => BEHIND,
        }
    }
}

impl Counts {
    async fn load(connection: &mut SqliteConnection) -> sqlx::Result<Self> {
        let mut counts = Self::default();
        for row in query(TALLY).fetch_all(connection).await? {
            let key = (row.try_get("queue_id")?, Count::from_code(row.try_get("state")?)?);
            counts.0.insert(key, row.try_get("n")?);
        }
        Ok(counts)
    }

    fn change(&mut self, tally: &Tally) {
        for (key, n) in &tally.0 {
            *self.0.entry(*key).or_default() += n;
        }
    }
}

/// A message that is leased, as far as settling needs it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) id: MessageId,
    pub(super) queue_id: i64,
    pub(super) token: Token,
    pub(super) enqueued_at: i64,
    pub(super) due_at: i64,
    pub(super) until: i64,
    pub(super) group: Option<i64>,
}

/// What one transaction changes in the counts, written once at its end.
#[derive(Debug, Default)]
pub(super) struct Tally(HashMap<(i64, Count), i64>);

impl Tally {
    fn add(&mut self, queue_id: i64, count: Count, n: i64) {
        *self.0.entry((queue_id, count)).or_default() += n;
    }

    fn changes(&self) -> Vec<(i64, i16, i64)> {
        let changed = self.0.iter().filter(|(_, n)| **n != 0);
        changed.map(|((queue_id, count), n)| (*queue_id, count.code(), *n)).collect()
    }
}

/// What one transaction has to tell.
#[derive(Debug, Default)]
pub(super) struct Word {
    ready: HashSet<QueueName>,
    schedule: bool,
    settings: bool,
    /// Queues, one for each message that died of being unreadable.
    pub(super) unreadable: Vec<QueueName>,
}

impl Word {
    fn spread(self, news: &News) {
        for queue in &self.ready {
            news.queue_has_messages(queue);
        }
        if self.schedule {
            news.schedule_changed();
        }
        if self.settings {
            news.settings_changed();
        }
        for queue in &self.unreadable {
            metrics::dead(queue).increment(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::*;
    use crate::clock::ManualClock;
    use crate::store::sqlite::open;

    async fn desk(directory: &tempfile::TempDir) -> Desk {
        let url = format!("sqlite://{}", directory.path().join("house.db").display());
        let opened = open::open(&url).await.unwrap();
        let clock = Arc::new(ManualClock::new(Timestamp::UNIX_EPOCH, 0.5));
        let news = Arc::new(News::default());
        Desk::new(opened, clock, news, Arc::default()).await.unwrap()
    }

    /// Whether the connection is the one on which a table was made that no other can see.
    async fn is_the_same(desk: &mut Desk) -> bool {
        query("select * from temp.mark").fetch_all(&mut desk.connection).await.is_ok()
    }

    #[tokio::test]
    async fn a_connection_that_met_an_error_of_the_disk_is_left_behind() {
        let directory = tempfile::tempdir().unwrap();
        let mut desk = desk(&directory).await;
        query("create temp table mark (n)").execute(&mut desk.connection).await.unwrap();

        desk.begin().await.unwrap();
        desk.reports(7);
        desk.roll_back(Some(&unreadable("a row"))).await;
        desk.begin().await.unwrap();
        assert!(is_the_same(&mut desk).await, "a row that cannot be read is no error of the disk");
        query("update pump set incarnation = 3").execute(&mut desk.connection).await.unwrap();
        desk.commit().await.unwrap();
        assert_eq!(desk.incarnation, 0, "what was rolled back was not reported");

        desk.begin().await.unwrap();
        let error = sqlx::Error::Io(io::Error::other("the disk is gone"));
        desk.roll_back(Some(&error)).await;
        desk.begin().await.unwrap();
        assert!(!is_the_same(&mut desk).await);
        assert_eq!(desk.incarnation, 3, "what is known by heart is read again");
        desk.commit().await.unwrap();
    }
}
