//! Taking messages in, each once.
//!
//! A transaction's messages are first planned in memory ([`Plan`]), with what the database knows of
//! their keys read once for all of them, and then written with few statements. So a refusal undoes a
//! part of the plan, and never a row.

use std::collections::HashMap;

use bytes::Bytes;

use crate::model::{
    Destination, Idempotency, Lasts, Leased, MessageId, NewMessage, QueueName, State, TopicName,
};

use super::super::columns::{OF_TOPICS, WHILE_PENDING};
use super::super::{
    Copied, Enqueue, EnqueueOutcome, Enqueued, NewLease, Place, Published, Receipt, Refusal,
    Result, TOPIC_WINDOW, is_new,
    published::{self, Incoming},
    refusals, topics,
};
use super::desk::{Count, Desk, Held, Queue};
use super::fault::of_one;
use super::rows::{self, Insert, Rows, Statement};

/// Plans these calls one after the other, as if each were alone.
pub(super) fn plan_calls<'a>(
    desk: &mut Desk,
    plan: &mut Plan<'a>,
    calls: impl IntoIterator<Item = &'a Enqueue>,
) -> Vec<Result<EnqueueOutcome>> {
    calls.into_iter().map(|call| plan_call(desk, plan, call)).collect()
}

fn plan_call<'a>(
    desk: &mut Desk,
    plan: &mut Plan<'a>,
    call: &'a Enqueue,
) -> Result<EnqueueOutcome> {
    let batch = batch_key(call).zip(batch_queue(desk, call));
    if let Some((key, queue_id)) = batch
        && plan.known.get(&(queue_id, key.key)).is_some_and(|known| !known.is_for(&key))
    {
        return Ok(EnqueueOutcome::BatchKeyReused);
    }
    let mark = plan.mark();
    let answers = call.messages.iter().map(|message| plan.take_in(desk, message));
    let answers = answers.collect::<Result<Vec<_>>>();
    let answers = answers.inspect_err(|_| plan.undo(desk, mark))?;
    let refusals = refusals(&answers);
    if call.atomic && !refusals.is_empty() {
        plan.undo(desk, mark);
        return Ok(EnqueueOutcome::Refused(refusals));
    }
    if let Some((key, queue_id)) = batch
        && answers.iter().any(is_new)
    {
        plan.remember(desk, queue_id, key, Of::Nothing);
    }
    Ok(EnqueueOutcome::Done(answers))
}

/// The queue whose window a key over the whole batch has: its first message's.
pub(super) fn batch_queue(desk: &Desk, call: &Enqueue) -> Option<i64> {
    match &call.messages.first()?.to {
        Destination::Queue(queue) => desk.queues.named(queue).ok()?.map(|queue| queue.id),
        Destination::Topic { .. } => Some(OF_TOPICS),
    }
}

/// The key over a whole batch as it is kept.
pub(super) fn batch_key(call: &Enqueue) -> Option<Idempotency> {
    let key = call.batch?;
    match &call.messages.first()?.to {
        Destination::Queue(_) => Some(key),
        Destination::Topic { topic, .. } => Some(topics::key_of(topic, &key)),
    }
}

/// What a transaction is going to insert, and what it must know for that.
#[derive(Debug, Default)]
pub(super) struct Plan<'a> {
    /// The keys that count, those of the plan too.
    pub(super) known: HashMap<(i64, [u8; 16]), Known>,
    /// The messages that are there by name; filled only where somebody has to be careful.
    pub(super) named: HashMap<MessageId, Receipt>,
    rows: Vec<NewRow<'a>>,
    keys: Vec<NewKey>,
    /// Payloads that several of the rows have.
    shared: Vec<(i64, Bytes)>,
}

/// What is remembered of a key.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) fingerprint: [u8; 32],
    pub(super) answer: Answer,
}

/// What was answered to the request with a key.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    /// It was over a whole batch, and has no answer of its own.
    Nothing,
    Message(Receipt),
    Published(Published),
}

/// What a key is of.
enum Of<'k> {
    /// A whole batch.
    Nothing,
    Row(&'k NewRow<'k>),
    Published(&'k Published),
}

impl Known {
    fn is_for(&self, key: &Idempotency) -> bool {
        self.fingerprint == key.fingerprint
    }
}

#[derive(Debug)]
struct NewRow<'a> {
    seq: i64,
    queue_id: i64,
    message: Incoming<'a>,
    /// Where its payload is, if it is that of others too.
    shared: Option<i64>,
    enqueued_at: i64,
    due_at: i64,
    expires_at: Option<i64>,
    receipt: Receipt,
    group: Option<i64>,
    /// With which it is stored, because somebody has a place for it. Its sender is told `ready` all the same.
    lease: Option<NewLease>,
}

#[derive(Debug)]
struct NewKey {
    queue_id: i64,
    key: Idempotency,
    seq: i64,
    id: Option<MessageId>,
    enqueued_at: i64,
    deliver_at: i64,
    expires_at: i64,
    sweep_at: i64,
    answer: Option<String>,
}

/// A place in a plan to which it can be undone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    rows: usize,
    keys: usize,
    shared: usize,
}

impl<'a> Plan<'a> {
    /// An empty plan that knows what is to be known for these messages and batches.
    pub(super) async fn load(
        desk: &mut Desk,
        messages: &[&NewMessage],
        calls: &[&Enqueue],
    ) -> sqlx::Result<Self> {
        let mut plan = Self::default();
        plan.load_keys(desk, messages, calls).await?;
        if desk.careful {
            plan.load_names(desk, messages).await?;
        }
        Ok(plan)
    }

    /// Takes one message in, or says why not, or that it is here already. **Fails** where its queue cannot
    /// be read.
    pub(super) fn take_in(&mut self, desk: &mut Desk, message: &'a NewMessage) -> Result<Enqueued> {
        match &message.to {
            Destination::Queue(queue) => self.take_into(desk, queue, Incoming::Sent(message), None),
            Destination::Topic { topic, require_subscribers } => {
                self.publish(desk, topic, message, *require_subscribers)
            }
        }
    }

    fn take_into(
        &mut self,
        desk: &mut Desk,
        queue: &QueueName,
        message: Incoming<'a>,
        shared: Option<i64>,
    ) -> Result<Enqueued> {
        let Some(queue) = desk.queues.named(queue).map_err(of_one)? else {
            return Ok(Enqueued::Refused(Refusal::NoSuchQueue(queue.clone())));
        };
        if let Some(answer) = self.known_already(&queue, &message) {
            return Ok(answer);
        }
        if self.is_full(desk, &queue) {
            return Ok(Enqueued::Refused(Refusal::QueueFull(queue.name.clone())));
        }
        Ok(Enqueued::New(self.add(desk, &queue, message, shared)))
    }

    /// Takes a copy of a message into each queue that wants it; all of them or none.
    fn publish(
        &mut self,
        desk: &mut Desk,
        topic: &TopicName,
        message: &'a NewMessage,
        require_subscribers: bool,
    ) -> Result<Enqueued> {
        let keys = topics::keys_of(topic, message);
        let known = |key: &Idempotency| self.known.get(&(OF_TOPICS, key.key));
        if keys.iter().any(|key| known(key).is_some_and(|known| !known.is_for(key))) {
            return Ok(Enqueued::Refused(Refusal::KeyReused));
        }
        if let Some(Answer::Published(first)) =
            keys.iter().find_map(|key| Some(known(key)?.answer.clone()))
        {
            return Ok(Enqueued::Published(Published { duplicate: true, ..first }));
        }
        let copies = desk.queues.copies_of(topic, message);
        if copies.is_empty() && require_subscribers {
            return Ok(Enqueued::Refused(Refusal::NoSubscribers(topic.clone())));
        }
        let mark = self.mark();
        let shared = published::is_shared(message, copies.len()).then(|| desk.take_seq());
        let mut published = Published {
            topic: topic.clone(),
            id: message.id,
            copies: Vec::with_capacity(copies.len()),
            duplicate: false,
        };
        for (queue, copy) in copies {
            let (id, was_there) =
                match self.take_into(desk, &queue, Incoming::Copy(Box::new(copy)), shared) {
                    Ok(Enqueued::New(receipt)) => (receipt.id, false),
                    Ok(Enqueued::Duplicate(receipt)) => (receipt.id, true),
                    refused_or_failed => {
                        self.undo(desk, mark);
                        return refused_or_failed;
                    }
                };
            published.copies.push(Copied { queue, id, was_there });
        }
        if let Some(shared) = shared.filter(|id| self.is_used(mark, *id)) {
            self.shared.push((shared, message.body.clone()));
        }
        for key in keys {
            self.remember(desk, OF_TOPICS, key, Of::Published(&published));
        }
        Ok(Enqueued::Published(published))
    }

    /// Whether a row that was planned since then has this payload.
    fn is_used(&self, mark: Mark, shared: i64) -> bool {
        self.rows[mark.rows..].iter().any(|row| row.shared == Some(shared))
    }

    /// Where the plan stands now.
    pub(super) fn mark(&self) -> Mark {
        Mark { rows: self.rows.len(), keys: self.keys.len(), shared: self.shared.len() }
    }

    /// Takes back what was planned since then. News of it may still be told, and then is for nothing.
    pub(super) fn undo(&mut self, desk: &mut Desk, mark: Mark) {
        for row in self.rows.drain(mark.rows..) {
            desk.went(row.queue_id, row.count());
            self.named.remove(&row.message.id);
        }
        self.shared.truncate(mark.shared);
        for key in self.keys.drain(mark.keys..) {
            self.known.remove(&(key.queue_id, key.key.key));
        }
    }

    /// Writes it; returns what is to be handed over once it is committed.
    pub(super) async fn write(self, desk: &mut Desk) -> sqlx::Result<Vec<(Place, Leased)>> {
        let connection = &mut desk.connection;
        let bind: &[fn(Statement, &NewRow<'a>) -> Statement] =
            &[NewRow::bind_message, NewRow::bind_content];
        INSERT_MESSAGES.all(connection, &self.rows, bind).await?;
        INSERT_SHARED.all(connection, &self.shared, &[bind_shared]).await?;
        INSERT_KEYS.all(connection, &self.keys, &[NewKey::bind]).await?;
        Ok(self.rows.into_iter().filter_map(|row| row.handed(desk)).collect())
    }

    /// The answer to a message that has come before, by a key or by its name.
    fn known_already(&self, queue: &Queue, message: &NewMessage) -> Option<Enqueued> {
        let known = |key: &Idempotency| self.known.get(&(queue.id, key.key));
        if message.keys.iter().any(|key| known(key).is_some_and(|known| !known.is_for(key))) {
            return Some(Enqueued::Refused(Refusal::KeyReused));
        }
        let by_key = message.keys.iter().find_map(|key| match &known(key)?.answer {
            Answer::Message(receipt) => Some(receipt),
            Answer::Nothing | Answer::Published(_) => None,
        });
        let answer = by_key.or_else(|| self.named.get(&message.id))?;
        Some(Enqueued::Duplicate(answer.clone()))
    }

    fn is_full(&self, desk: &Desk, queue: &Queue) -> bool {
        let unsettled = || u64::try_from(desk.unsettled(queue.id)).unwrap_or(0);
        queue.settings.max_messages.is_some_and(|max| unsettled() >= max)
    }

    fn add(
        &mut self,
        desk: &mut Desk,
        queue: &Queue,
        message: Incoming<'a>,
        shared: Option<i64>,
    ) -> Receipt {
        let now = desk.now;
        let due_at = rows::resolve(message.deliver, now);
        let expires_at = message.expires.map(|when| rows::resolve(when, now));
        let has_expired = expires_at.is_some_and(|at| at <= now);
        let receipt = Receipt {
            id: message.id,
            queue: queue.name.clone(),
            state: rows::waiting_state(due_at, now),
            enqueued_at: rows::moment(now).unwrap_or_default(),
            deliver_at: rows::moment(due_at).unwrap_or_default(),
        };
        let row = NewRow {
            seq: desk.take_seq(),
            queue_id: queue.id,
            group: message.details.group_number(),
            message,
            shared,
            enqueued_at: now,
            due_at,
            expires_at,
            receipt: receipt.clone(),
            lease: None,
        };
        let lease = if has_expired || row.group.is_some() {
            None
        } else {
            lease(desk, queue, receipt.state)
        };
        let row = NewRow { lease, ..row };
        desk.came(queue.id, row.count());
        if let Some(group) = row.group {
            desk.groups.came(queue.id, group);
        }
        for key in &row.message.keys {
            self.remember(desk, queue.id, *key, Of::Row(&row));
        }
        if desk.careful {
            self.named.insert(receipt.id, receipt.clone());
        }
        self.rows.push(row);
        receipt
    }

    fn remember(&mut self, desk: &Desk, queue_id: i64, key: Idempotency, of: Of<'_>) {
        let queue = desk.queues.numbered(queue_id);
        let window = queue.map_or(TOPIC_WINDOW, |queue| queue.settings.dedup_window);
        let (row, answer, text) = match of {
            Of::Nothing => (None, Answer::Nothing, None),
            Of::Row(row) => (Some(row), Answer::Message(row.receipt.clone()), None),
            Of::Published(it) => (None, Answer::Published(it.clone()), Some(it.kept())),
        };
        let (expires_at, sweep_at) = match key.lasts {
            Lasts::Window => {
                let expires_at = rows::after(desk.now, window);
                (expires_at, expires_at)
            }
            Lasts::WhilePending => (WHILE_PENDING, desk.now),
        };
        self.known.insert((queue_id, key.key), Known { fingerprint: key.fingerprint, answer });
        self.keys.push(NewKey {
            queue_id,
            key,
            seq: row.map_or(0, |row| row.seq),
            id: row.map(|row| row.message.id),
            enqueued_at: desk.now,
            deliver_at: row.map_or(desk.now, |row| row.due_at),
            expires_at,
            sweep_at,
            answer: text,
        });
    }
}

// Lives on: message, at its end, and content, at its end. Each row takes its place in message_id,
// message_listed, one of message_ready, message_leased, message_due and message_behind, where it expires in
// message_expiring, and where it has a correlation id in content_correlation.
static INSERT_MESSAGES: Insert = Insert::into(&[
    Rows {
        head: "\
insert into message (
    seq, id, queue_id, state, rank, due_at, urgent, attempts, failures, crashes, token,
    leased_at, lease_until, incarnation, replica, enqueued_at, expires_at, size, grp, lane, behind
)
values\n",
        row: "(?, ?, ?, ?, ?, ?, 0, ?, 0, 0, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        tail: "",
    },
    Rows {
        head: "\
insert into content (seq, deliver_at, kind, correlation_id, details, body, shared)
values\n",
        row: "(?, ?, ?, ?, ?, ?, ?)",
        tail: "",
    },
]);

// Lives on: shared, at its end.
static INSERT_SHARED: Insert = Insert::into(&[Rows {
    head: "\
insert into shared (id, body)
values\n",
    row: "(?, ?)",
    tail: "",
}]);

fn bind_shared(statement: Statement, (id, body): &(i64, Bytes)) -> Statement {
    statement.bind(*id).bind(body.to_vec())
}

// Lives on: the primary key of idempotency. What is replaced is a key that no longer counted.
static INSERT_KEYS: Insert = Insert::into(&[Rows {
    head: "\
insert into idempotency (
    queue_id, key, fingerprint, seq, id, enqueued_at, deliver_at, expires_at, sweep_at, answer
)
values\n",
    row: "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    tail: "
on conflict (queue_id, key) do update
set fingerprint = excluded.fingerprint, answer = excluded.answer, seq = excluded.seq, id = excluded.id,
    enqueued_at = excluded.enqueued_at, deliver_at = excluded.deliver_at,
    expires_at = excluded.expires_at, sweep_at = excluded.sweep_at",
}]);

/// A lease for a new message, where somebody has a place for it and no other message comes first.
fn lease(desk: &mut Desk, queue: &Queue, state: State) -> Option<NewLease> {
    if state != State::Ready || desk.count(queue.id, State::Ready) != 0 {
        return None;
    }
    let place = Place::keep(&desk.handover, &queue.name)?;
    let chance = desk.chance().ok()?;
    Some(NewLease::new(place, |_| desk.incarnation, chance, (desk.now, desk.began)))
}

impl NewRow<'_> {
    fn state(&self) -> State {
        if self.lease.is_some() { State::Leased } else { self.receipt.state }
    }

    fn count(&self) -> Count {
        if self.group.is_some() { Count::Behind } else { self.state().into() }
    }

    /// What goes to the place that was kept for it, if there was one.
    fn handed(self, desk: &mut Desk) -> Option<(Place, Leased)> {
        let lease = self.lease?;
        let message = &self.message;
        let held = Held {
            id: message.id,
            queue_id: self.queue_id,
            token: lease.token(self.seq),
            enqueued_at: self.enqueued_at,
            due_at: self.due_at,
            until: lease.until.0,
            group: None,
        };
        desk.leases.insert(self.seq, held);
        let expires_at = self.expires_at.and_then(|at| rows::moment(at).ok());
        let queue = &self.receipt.queue;
        Some(lease.handed(self.seq, (queue, message), self.receipt.enqueued_at, expires_at))
    }

    fn bind_message(statement: Statement, row: &Self) -> Statement {
        let lease = row.lease.as_ref();
        statement
            .bind(row.seq)
            .bind(row.message.id.0.as_bytes().to_vec())
            .bind(row.queue_id)
            .bind(row.state().code())
            .bind(-i64::from(row.message.priority))
            .bind(row.due_at)
            .bind(i64::from(lease.is_some()))
            .bind(lease.map_or(0, |lease| lease.token(row.seq).0))
            .bind(lease.map_or(0, |_| row.enqueued_at))
            .bind(lease.map_or(0, |lease| lease.until.0))
            .bind(lease.map_or(0, |lease| lease.incarnation))
            .bind(lease.map(|lease| lease.place.replica.as_str().to_owned()))
            .bind(row.enqueued_at)
            .bind(row.expires_at)
            .bind(i64::try_from(row.message.body.len()).unwrap_or(i64::MAX))
            .bind(row.group)
            .bind(i64::from(row.message.details.lane()))
            .bind(i64::from(row.group.is_some()))
    }

    fn bind_content(statement: Statement, row: &Self) -> Statement {
        let details = serde_json::to_string(&row.message.details);
        statement
            .bind(row.seq)
            .bind(row.due_at)
            .bind(row.message.kind.clone())
            .bind(row.message.correlation_id.clone())
            .bind(details.expect("details are text, which is always JSON"))
            .bind(if row.shared.is_some() { Vec::new() } else { row.message.body.to_vec() })
            .bind(row.shared)
    }
}

impl NewKey {
    fn bind(statement: Statement, key: &Self) -> Statement {
        statement
            .bind(key.queue_id)
            .bind(key.key.key.to_vec())
            .bind(key.key.fingerprint.to_vec())
            .bind(key.seq)
            .bind(key.id.map_or_else(Vec::new, |id| id.0.as_bytes().to_vec()))
            .bind(key.enqueued_at)
            .bind(key.deliver_at)
            .bind(key.expires_at)
            .bind(key.sweep_at)
            .bind(key.answer.clone())
    }
}

/// The statements of this file.
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    let inserts = INSERT_MESSAGES.statements().chain(INSERT_KEYS.statements());
    inserts.chain(INSERT_SHARED.statements())
}
