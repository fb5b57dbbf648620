//! Taking messages in, each once.
//!
//! A transaction's messages are first planned in memory ([`Plan`]), with what the database knows of
//! their keys read once for all of them, and then written with few statements. So a refusal undoes a
//! part of the plan, and never a row.

use std::collections::HashMap;

use sqlx::{Row, query};

use crate::model::{Idempotency, Lasts, Leased, MessageId, NewMessage, State};

use super::super::columns::WHILE_PENDING;
use super::super::{
    Enqueue, EnqueueOutcome, Enqueued, NewLease, Place, Receipt, Refusal, Result, refusals,
};
use super::desk::{Count, Desk, Held, Queue};
use super::fault::{of_one, unreadable};
use super::rows::{self, Insert, Rows, Statement};
use super::surgery;

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
    let batch = call.batch.zip(batch_queue(desk, call));
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
        && answers.iter().any(|answer| matches!(answer, Enqueued::New(_)))
    {
        plan.remember(desk, queue_id, key, None);
    }
    Ok(EnqueueOutcome::Done(answers))
}

/// The queue whose window a key over the whole batch has: its first message's.
fn batch_queue(desk: &Desk, call: &Enqueue) -> Option<i64> {
    let first = call.messages.first()?;
    desk.queues.named(&first.queue).ok()?.map(|queue| queue.id)
}

/// What a transaction is going to insert, and what it must know for that.
#[derive(Debug, Default)]
pub(super) struct Plan<'a> {
    /// The keys that count, those of the plan too.
    known: HashMap<(i64, [u8; 16]), Known>,
    /// The messages that are there by name; filled only where somebody has to be careful.
    named: HashMap<MessageId, Receipt>,
    rows: Vec<NewRow<'a>>,
    keys: Vec<NewKey>,
}

/// What is remembered of a key. A key over a whole batch has no answer of its own.
#[derive(Debug)]
struct Known {
    fingerprint: [u8; 32],
    answer: Option<Receipt>,
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
    message: &'a NewMessage,
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
}

/// A place in a plan to which it can be undone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    rows: usize,
    keys: usize,
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
        let Some(queue) = desk.queues.named(&message.queue).map_err(of_one)? else {
            return Ok(Enqueued::Refused(Refusal::NoSuchQueue(message.queue.clone())));
        };
        if let Some(answer) = self.known_already(&queue, message) {
            return Ok(answer);
        }
        if self.is_full(desk, &queue) {
            return Ok(Enqueued::Refused(Refusal::QueueFull(message.queue.clone())));
        }
        Ok(Enqueued::New(self.add(desk, &queue, message)))
    }

    /// Where the plan stands now.
    pub(super) fn mark(&self) -> Mark {
        Mark { rows: self.rows.len(), keys: self.keys.len() }
    }

    /// Takes back what was planned since then. News of it may still be told, and then is for nothing.
    pub(super) fn undo(&mut self, desk: &mut Desk, mark: Mark) {
        for row in self.rows.drain(mark.rows..) {
            desk.went(row.queue_id, row.count());
            self.named.remove(&row.message.id);
        }
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
        INSERT_KEYS.all(connection, &self.keys, &[NewKey::bind]).await?;
        Ok(self.rows.into_iter().filter_map(|row| row.handed(desk)).collect())
    }

    /// The answer to a message that has come before, by a key or by its name.
    fn known_already(&self, queue: &Queue, message: &NewMessage) -> Option<Enqueued> {
        let known = |key: &Idempotency| self.known.get(&(queue.id, key.key));
        if message.keys.iter().any(|key| known(key).is_some_and(|known| !known.is_for(key))) {
            return Some(Enqueued::Refused(Refusal::KeyReused));
        }
        let by_key = message.keys.iter().find_map(|key| known(key)?.answer.as_ref());
        let answer = by_key.or_else(|| self.named.get(&message.id))?;
        Some(Enqueued::Duplicate(answer.clone()))
    }

    fn is_full(&self, desk: &Desk, queue: &Queue) -> bool {
        let unsettled = || u64::try_from(desk.unsettled(queue.id)).unwrap_or(0);
        queue.settings.max_messages.is_some_and(|max| unsettled() >= max)
    }

    fn add(&mut self, desk: &mut Desk, queue: &Queue, message: &'a NewMessage) -> Receipt {
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
            message,
            enqueued_at: now,
            due_at,
            expires_at,
            receipt: receipt.clone(),
            group: message.details.group_number(),
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
        for key in &message.keys {
            self.remember(desk, queue.id, *key, Some(&row));
        }
        if desk.careful {
            self.named.insert(message.id, receipt.clone());
        }
        self.rows.push(row);
        receipt
    }

    fn remember(&mut self, desk: &Desk, queue_id: i64, key: Idempotency, of: Option<&NewRow<'_>>) {
        let queue = desk.queues.numbered(queue_id);
        let window = queue.map(|queue| queue.settings.dedup_window).unwrap_or_default();
        let answer = of.map(|row| row.receipt.clone());
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
            seq: of.map_or(0, |row| row.seq),
            id: of.map(|row| row.message.id),
            enqueued_at: desk.now,
            deliver_at: of.map_or(desk.now, |row| row.due_at),
            expires_at,
            sweep_at,
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
insert into content (seq, deliver_at, kind, correlation_id, details, body)
values\n",
        row: "(?, ?, ?, ?, ?, ?)",
        tail: "",
    },
]);

// Lives on: the primary key of idempotency. What is replaced is a key that no longer counted.
static INSERT_KEYS: Insert = Insert::into(&[Rows {
    head: "\
insert into idempotency (
    queue_id, key, fingerprint, seq, id, enqueued_at, deliver_at, expires_at, sweep_at
)
values\n",
    row: "(?, ?, ?, ?, ?, ?, ?, ?, ?)",
    tail: "
on conflict (queue_id, key) do update
set fingerprint = excluded.fingerprint, seq = excluded.seq, id = excluded.id,
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
        let message = self.message;
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
        Some(lease.handed(self.seq, message, self.receipt.enqueued_at, expires_at))
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
            .bind(row.message.body.to_vec())
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
    }
}

// Lives on: the primary keys of idempotency and message. A key counts in its window, and as long as
// its message can still be delivered or is dead.
const KNOWN_KEYS: &str = "\
select idempotency.queue_id, idempotency.key, idempotency.fingerprint, idempotency.seq,
    idempotency.id, idempotency.enqueued_at, idempotency.deliver_at
from json_each(?1) as wanted
cross join idempotency
    on idempotency.queue_id = wanted.value ->> 0
    and idempotency.key = unhex(wanted.value ->> 1)
left join message
    on message.seq = idempotency.seq
    and message.id = idempotency.id
where idempotency.expires_at > ?2
    or message.state in (0, 1, 2)
    or (message.state = 5 and idempotency.expires_at >= 0)";

// Lives on: message_id, then the primary keys of content and queue.
const KNOWN_NAMES: &str = "\
select message.seq, message.queue_id, message.id, message.enqueued_at,
    coalesce(content.deliver_at, message.due_at) as deliver_at, queue.id is null as doomed
from json_each(?) as wanted
cross join message on message.id = unhex(wanted.value)
left join content on content.seq = message.seq
left join queue on queue.id = message.queue_id";

impl Plan<'_> {
    async fn load_keys(
        &mut self,
        desk: &mut Desk,
        messages: &[&NewMessage],
        calls: &[&Enqueue],
    ) -> sqlx::Result<()> {
        let mut wanted = Vec::new();
        for message in messages.iter().filter(|message| !message.keys.is_empty()) {
            let Ok(Some(queue)) = desk.queues.named(&message.queue) else { continue };
            wanted.extend(message.keys.iter().map(|key| (queue.id, rows::hex(&key.key))));
        }
        let batches = calls.iter().filter_map(|call| call.batch.zip(batch_queue(desk, call)));
        wanted.extend(batches.map(|(key, queue_id)| (queue_id, rows::hex(&key.key))));
        if wanted.is_empty() {
            return Ok(());
        }
        let known = query(KNOWN_KEYS).bind(rows::json(&wanted)).bind(desk.now);
        for row in known.fetch_all(&mut desk.connection).await? {
            let seq: i64 = row.try_get("seq")?;
            let answer = if seq == 0 { None } else { Some(receipt(desk, &row)?) };
            let known = Known { fingerprint: bytes(row.try_get("fingerprint")?)?, answer };
            self.known.insert((row.try_get("queue_id")?, bytes(row.try_get("key")?)?), known);
        }
        Ok(())
    }

    async fn load_names(&mut self, desk: &mut Desk, messages: &[&NewMessage]) -> sqlx::Result<()> {
        let names = messages.iter().map(|message| rows::hex(message.id.0.as_bytes()));
        let names = rows::json(&names.collect::<Vec<_>>());
        let mut doomed = Vec::new();
        for row in query(KNOWN_NAMES).bind(names).fetch_all(&mut desk.connection).await? {
            if row.try_get("doomed")? {
                doomed.push(row.try_get("seq")?);
                continue;
            }
            let receipt = receipt(desk, &row)?;
            self.named.insert(receipt.id, receipt);
        }
        // Messages of queues that were deleted are in nobody's way.
        surgery::delete(desk, &doomed).await
    }
}

/// The first answer, made again from what was kept of it.
fn receipt(desk: &Desk, row: &sqlx::sqlite::SqliteRow) -> sqlx::Result<Receipt> {
    let queue = desk.queues.numbered(row.try_get("queue_id")?);
    let queue = queue.ok_or_else(|| unreadable("a queue's number is unknown"))?;
    let (enqueued_at, deliver_at) = (row.try_get("enqueued_at")?, row.try_get("deliver_at")?);
    Ok(Receipt {
        id: rows::message_id(row)?,
        queue: queue.name.clone(),
        state: rows::waiting_state(deliver_at, enqueued_at),
        enqueued_at: rows::moment(enqueued_at)?,
        deliver_at: rows::moment(deliver_at)?,
    })
}

fn bytes<const N: usize>(bytes: &[u8]) -> sqlx::Result<[u8; N]> {
    bytes.try_into().map_err(|_| unreadable("a key has another length"))
}

/// The statements of this file.
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    let inserts = INSERT_MESSAGES.statements().chain(INSERT_KEYS.statements());
    inserts.chain([KNOWN_KEYS, KNOWN_NAMES])
}
