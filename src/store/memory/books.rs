//! The rows, and the orders in which they are found. It decides nothing.
//!
//! [`Books::insert`], [`Books::change`] and [`Books::remove`] are the only ways to a row, so that the
//! orders, the counts and the news can never disagree with the rows.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound::{Excluded, Unbounded};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;

use crate::model::{
    DELIVERIES_KEPT, DeliveryRecord, GroupOnDead, Guard, MessageId, QueueName, QueueSettings,
    Record, ReplicaName, RunState, ScheduleName, ScheduleRecord, State, Subscription,
    SubscriptionName, Token, TopicName,
};

use super::super::{CEILING_DEFAULT, News, Published, PumpRecord, Receipt};

/// All that the store knows.
#[derive(Debug)]
pub(super) struct Books {
    /// Messages by arrival.
    rows: BTreeMap<i64, Row>,
    ids: HashMap<MessageId, i64>,
    next_seq: i64,
    /// By when they are due.
    scheduled: BTreeSet<(Timestamp, i64)>,
    /// By when their lease runs out.
    leased: BTreeSet<(Timestamp, i64)>,
    pub(super) queues: BTreeMap<QueueName, Queue>,
    pub(super) keys: HashMap<KeyName, Key>,
    /// Keys that no longer counted and were replaced in this transaction, in case it is undone.
    pub(super) replaced: Vec<(KeyName, Key)>,
    pub(super) subscriptions: BTreeMap<(TopicName, SubscriptionName), Subscription>,
    pub(super) schedules: BTreeMap<ScheduleName, ScheduleRecord>,
    pub(super) pump: PumpRecord,
    pub(super) revision: i64,
    groups: HashMap<GroupName, Group>,
    /// Groups of which something has changed since they were lined up.
    touched: BTreeSet<GroupName>,
    /// Where the last claim of a queue ended whose messages take turns.
    pub(super) last_lanes: HashMap<QueueName, u32>,
    told: Told,
}

/// A group of a queue.
type GroupName = (QueueName, String);

/// The messages of a group that can still be delivered.
#[derive(Debug, Default)]
struct Group {
    /// The one whose turn it is.
    head: Option<i64>,
    /// Those that wait for theirs.
    behind: BTreeSet<i64>,
}

/// A message with all that belongs to it.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) record: Record,
    pub(super) body: Bytes,
    /// What its sender was told.
    pub(super) receipt: Receipt,
    /// The latest last.
    pub(super) deliveries: Vec<DeliveryRecord>,
    /// An operator wants it run now, even if its queue is stopped.
    pub(super) urgent: bool,
    /// There is one if and only if the state is leased.
    pub(super) hold: Option<Hold>,
    pub(super) standing: Standing,
}

/// Where a message stands in its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// In no group, or no longer.
    None,
    /// It waits for its turn.
    Behind,
    /// It is its turn, until it has ended, and longer if it is dead and blocks the others.
    Head,
}

/// Who holds a message.
#[derive(Debug, Clone)]
pub(super) struct Hold {
    pub(super) token: Token,
    pub(super) replica: ReplicaName,
    pub(super) since: Timestamp,
    pub(super) until: Timestamp,
}

/// A queue, and what stands in it.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) settings: QueueSettings,
    pub(super) state: RunState,
    pub(super) guard: Guard,
    /// Ready messages in the order of lease.
    pub(super) ready: BTreeSet<Place>,
    /// Those that wait for their turn in a group, by when they were due.
    oldest_behind: BTreeSet<(Timestamp, i64)>,
    pub(super) behind: u64,
    counts: [u64; State::ALL.len()],
}

/// A place in the order of lease: priority, then fairness key, then due time, then arrival.
pub(super) type Place = (Reverse<i8>, u32, Timestamp, i64);

/// An idempotency key that is remembered.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) fingerprint: [u8; 32],
    /// It counts at least until then; `None` where it counts as long as its message can be delivered.
    pub(super) until: Option<Timestamp>,
    pub(super) answer: Answer,
}

/// Where a key is known: in a queue, or, as one of a topic, in none.
pub(super) type KeyName = (Option<QueueName>, [u8; 16]);

/// What was answered to the request with a key.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    /// It was over a whole batch, and has no answer of its own.
    Nothing,
    /// The message's arrival, and the receipt.
    Message(i64, Receipt),
    /// The number of what was published in the order of arrival, and the answer.
    Published(i64, Published),
}

impl Answer {
    /// The message whose key it is.
    pub(super) fn message(&self) -> Option<i64> {
        match self {
            Self::Message(seq, _) => Some(*seq),
            Self::Nothing | Self::Published(..) => None,
        }
    }

    /// Whether it was given before this number was the next one.
    pub(super) fn is_before(&self, first_seq: i64) -> bool {
        match self {
            Self::Message(seq, _) | Self::Published(seq, _) => *seq < first_seq,
            Self::Nothing => true,
        }
    }
}

impl Default for Books {
    fn default() -> Self {
        Self {
            rows: BTreeMap::new(),
            ids: HashMap::new(),
            next_seq: 1,
            scheduled: BTreeSet::new(),
            leased: BTreeSet::new(),
            queues: BTreeMap::new(),
            keys: HashMap::new(),
            replaced: Vec::new(),
            subscriptions: BTreeMap::new(),
            schedules: BTreeMap::new(),
            pump: PumpRecord { state: RunState::Running, ceiling: CEILING_DEFAULT },
            revision: 1,
            groups: HashMap::new(),
            touched: BTreeSet::new(),
            last_lanes: HashMap::new(),
            told: Told::default(),
        }
    }
}

impl Books {
    /// The number that the next message gets.
    pub(super) fn next_seq(&self) -> i64 {
        self.next_seq
    }

    /// Takes the next number for something that is no message.
    pub(super) fn take_seq(&mut self) -> i64 {
        self.next_seq += 1;
        self.next_seq - 1
    }

    /// Puts a message at the end of the order of arrival.
    pub(super) fn insert(&mut self, row: Row) -> i64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.ids.insert(row.record.head.id, seq);
        self.note(seq, &row);
        self.rows.insert(seq, row);
        seq
    }

    /// Changes a message; `None` where there is none.
    pub(super) fn change<T>(&mut self, seq: i64, change: impl FnOnce(&mut Row) -> T) -> Option<T> {
        let mut row = self.rows.remove(&seq)?;
        self.unnote(seq, &row);
        let lived = row.record.state.lives();
        let changed = change(&mut row);
        if lived && !row.record.state.lives() && !self.blocks(&row) {
            row.standing = Standing::None;
        }
        self.note(seq, &row);
        self.rows.insert(seq, row);
        Some(changed)
    }

    /// Deletes a message with its payload and its history; its keys stay.
    pub(super) fn remove(&mut self, seq: i64) -> Option<Row> {
        let row = self.rows.remove(&seq)?;
        self.unnote(seq, &row);
        self.ids.remove(&row.record.head.id);
        Some(row)
    }

    /// The message with this number.
    pub(super) fn row(&self, seq: i64) -> Option<&Row> {
        self.rows.get(&seq)
    }

    /// The number of the message with this name.
    pub(super) fn seq(&self, id: MessageId) -> Option<i64> {
        self.ids.get(&id).copied()
    }

    /// All messages by arrival.
    pub(super) fn rows(&self) -> impl DoubleEndedIterator<Item = (i64, &Row)> {
        self.rows.iter().map(|(seq, row)| (*seq, row))
    }

    /// The messages that arrived before `seq`, by arrival.
    pub(super) fn rows_before(&self, seq: i64) -> impl DoubleEndedIterator<Item = (i64, &Row)> {
        self.rows.range(..seq).map(|(seq, row)| (*seq, row))
    }

    /// At most `max` of the scheduled messages that are due at `now`, the longest due first.
    pub(super) fn due(&self, max: usize, now: Timestamp) -> Vec<i64> {
        self.scheduled.iter().take_while(|(due, _)| *due <= now).take(max).map(|at| at.1).collect()
    }

    /// When the next scheduled message is due.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        self.scheduled.first().map(|(due, _)| *due)
    }

    /// At most `max` of the leased messages whose lease has run out at `now`.
    pub(super) fn run_out(&self, max: usize, now: Timestamp) -> Vec<i64> {
        self.leased.iter().take_while(|(until, _)| *until <= now).take(max).map(|at| at.1).collect()
    }

    /// Whether this message can still be delivered.
    pub(super) fn is_pending(&self, seq: i64) -> bool {
        self.row(seq).is_some_and(|row| row.record.state.lives())
    }

    /// Whether this message can still be delivered or is dead.
    pub(super) fn needs_its_keys(&self, seq: i64) -> bool {
        self.row(seq).is_some_and(|row| row.record.state.lives() || row.record.state == State::Dead)
    }

    /// Whether its group waits for this message, which has just ended.
    fn blocks(&self, row: &Row) -> bool {
        let settings = self.queues.get(&row.record.head.queue).map(|queue| &queue.settings);
        row.standing == Standing::Head
            && row.record.state == State::Dead
            && settings.is_some_and(|settings| settings.group_on_dead == GroupOnDead::Block)
    }

    /// Gives each group whose turn is nobody's its next message. The last step of every transaction.
    pub(super) fn line_up(&mut self) {
        for name in std::mem::take(&mut self.touched) {
            let Some(group) = self.groups.get(&name) else { continue };
            match (group.head, group.behind.first().copied()) {
                (None, Some(next)) => drop(self.change(next, |row| row.standing = Standing::Head)),
                (None, None) => drop(self.groups.remove(&name)),
                (Some(_), _) => (),
            }
        }
        self.touched.clear();
        self.replaced.clear();
    }

    /// Says that a queue or the pump was changed.
    pub(super) fn settings_changed(&mut self) {
        self.revision += 1;
        self.told.settings = true;
    }

    /// Takes back the news of what was undone.
    pub(super) fn untell(&mut self) {
        self.told = Told::default();
    }

    /// What is to be told, once.
    pub(super) fn take_told(&mut self) -> Told {
        std::mem::take(&mut self.told)
    }

    fn note(&mut self, seq: i64, row: &Row) {
        let name = &row.record.head.queue;
        let queue = self.queues.get_mut(name).expect("a message goes when its queue goes");
        queue.counts[row.record.state as usize] += 1;
        queue.behind += u64::from(row.standing == Standing::Behind);
        match row.record.state {
            State::Ready if row.standing == Standing::Behind => {
                queue.oldest_behind.insert((row.record.deliver_at, seq));
            }
            State::Ready => {
                queue.ready.insert(place(seq, row));
                self.told.queues.insert(name.clone());
            }
            State::Scheduled => {
                self.scheduled.insert((row.record.deliver_at, seq));
                self.told.schedule = true;
            }
            State::Leased => {
                self.leased.insert((row.until(), seq));
            }
            State::Completed
            | State::Discarded
            | State::Dead
            | State::Expired
            | State::Cancelled => (),
        }
        if let Some(name) = row.group_name() {
            let group = self.groups.entry(name.clone()).or_default();
            match row.standing {
                Standing::None => (),
                Standing::Behind => drop(group.behind.insert(seq)),
                Standing::Head => group.head = Some(seq),
            }
            self.touched.insert(name);
        }
    }

    fn unnote(&mut self, seq: i64, row: &Row) {
        let queue = self.queues.get_mut(&row.record.head.queue);
        let queue = queue.expect("a message goes when its queue goes");
        queue.counts[row.record.state as usize] -= 1;
        queue.behind -= u64::from(row.standing == Standing::Behind);
        queue.ready.remove(&place(seq, row));
        queue.oldest_behind.remove(&(row.record.deliver_at, seq));
        self.scheduled.remove(&(row.record.deliver_at, seq));
        self.leased.remove(&(row.until(), seq));
        if let Some(name) = row.group_name() {
            let group = self.groups.entry(name.clone()).or_default();
            group.behind.remove(&seq);
            group.head = group.head.filter(|head| *head != seq);
            self.touched.insert(name);
        }
    }
}

impl Row {
    /// Whether its sender no longer wants it delivered. It counts only while the message waits.
    pub(super) fn is_expired(&self, now: Timestamp) -> bool {
        self.record.head.expires_at.is_some_and(|expires| expires <= now)
    }

    fn group_name(&self) -> Option<GroupName> {
        let head = &self.record.head;
        Some((head.queue.clone(), head.details.group.clone()?))
    }

    /// Lines up again in its group, if it has one, and it is not its turn.
    pub(super) fn line_up(&mut self) {
        if self.record.head.details.group.is_some() && self.standing == Standing::None {
            self.standing = Standing::Behind;
        }
    }

    /// Moves it to a state that ends it.
    pub(super) fn end(&mut self, state: State, reason: Option<String>, now: Timestamp) {
        self.record.state = state;
        self.record.finished_at = Some(now);
        self.record.reason = reason;
        self.urgent = false;
        self.hold = None;
    }

    /// Makes it wait until `due`, which may be now.
    pub(super) fn wait(&mut self, due: Timestamp, now: Timestamp) {
        let ready = due <= now;
        self.record.state = if ready { State::Ready } else { State::Scheduled };
        self.record.deliver_at = due.max(now);
        self.hold = None;
    }

    /// Keeps the record of a delivery. An attempt has one record: the first word counts.
    pub(super) fn remember(&mut self, delivery: DeliveryRecord) {
        if self.deliveries.iter().all(|known| known.number != delivery.number) {
            let forgotten = delivery.number.saturating_sub(DELIVERIES_KEPT);
            self.deliveries.push(delivery);
            self.deliveries.retain(|known| known.number > forgotten);
        }
    }

    fn until(&self) -> Timestamp {
        self.hold.as_ref().map_or(Timestamp::MIN, |hold| hold.until)
    }
}

fn place(seq: i64, row: &Row) -> Place {
    let head = &row.record.head;
    (Reverse(head.priority), head.details.lane(), row.record.deliver_at, seq)
}

impl Queue {
    /// An empty queue that runs.
    pub(super) fn new(settings: QueueSettings) -> Self {
        let counts = [0; State::ALL.len()];
        let (state, guard) = (RunState::Running, Guard::default());
        let (ready, oldest_behind) = (BTreeSet::new(), BTreeSet::new());
        Self { settings, state, guard, ready, oldest_behind, behind: 0, counts }
    }

    /// How many of its messages are in this state.
    pub(super) fn count(&self, state: State) -> u64 {
        self.counts[state as usize]
    }

    /// Since when the ready message that waits longest has been due.
    ///
    /// Of each priority and fairness key the first in the order of lease is the oldest, so only those are looked at,
    /// and the oldest of those that wait in groups.
    pub(super) fn oldest_due(&self) -> Option<Timestamp> {
        let mut oldest = self.oldest_behind.first().map(|(due, _)| *due);
        let mut first = self.ready.first();
        while let Some((priority, lane, due, _)) = first {
            oldest = Some(oldest.map_or(*due, |oldest: Timestamp| oldest.min(*due)));
            let last_of_its_lane = (*priority, *lane, Timestamp::MAX, i64::MAX);
            first = self.ready.range((Excluded(last_of_its_lane), Unbounded)).next();
        }
        oldest
    }

    /// How many of its messages can still be delivered.
    pub(super) fn unsettled(&self) -> u64 {
        State::ALL.into_iter().filter(|state| state.lives()).map(|state| self.count(state)).sum()
    }
}

/// What one transaction has to tell.
#[derive(Debug, Default)]
pub(super) struct Told {
    queues: BTreeSet<QueueName>,
    schedule: bool,
    settings: bool,
}

impl Told {
    /// Puts it on the board.
    pub(super) fn tell(self, news: &News) {
        self.queues.iter().for_each(|queue| news.queue_has_messages(queue));
        if self.schedule {
            news.schedule_changed();
        }
        if self.settings {
            news.settings_changed();
        }
    }
}

/// The moment without what is finer than a microsecond, the unit of every store.
pub(super) fn whole_micros(moment: Timestamp) -> Timestamp {
    Timestamp::from_microsecond(moment.as_microsecond()).unwrap_or(moment)
}

/// So long after a moment.
pub(super) fn after(moment: Timestamp, wait: Duration) -> Timestamp {
    moment.checked_add(wait).map_or(Timestamp::MAX, whole_micros)
}

/// How long ago a moment was; nothing for one that is to come.
pub(super) fn since(moment: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(moment)).unwrap_or_default()
}
