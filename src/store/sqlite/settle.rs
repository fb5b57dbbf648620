//! Writing what became of leased messages, where the lease still holds.

use std::borrow::Cow;
use std::collections::HashMap;

use sqlx::{Row, query};

use crate::model::{
    DELIVERIES_KEPT, DeliveryRecord, NewMessage, QueueName, Settlement, State, Token,
};
use crate::policy;

use super::super::{Enqueued, Error, Result, Settle, Settled, not_sent, target_gone};
use super::desk::{Desk, Held};
use super::enqueue::Plan;
use super::fault::of_one;
use super::rows::{self, Insert, Rows, Statement};

/// Settles one after the other, as if each were alone; what handlers sent goes into the plan.
///
/// A settlement that is refused for what it wanted to send is an error of its own and changes nothing; `unsendable` is
/// what was found out of that before, one after the other too.
pub(super) async fn settle<'a>(
    desk: &mut Desk,
    plan: &mut Plan<'a>,
    settles: &[&'a Settle],
    unsendable: Vec<Option<String>>,
) -> sqlx::Result<Vec<Result<Settled>>> {
    if settles.is_empty() {
        return Ok(Vec::new());
    }
    let mut held = load_held(desk, settles).await?;
    let mut answers = Vec::with_capacity(settles.len());
    let mut changes = Changes::default();
    for (settle, unsendable) in settles.iter().zip(unsendable) {
        answers.push(decide(desk, plan, &mut held, &mut changes, (settle, unsendable)));
    }
    write(desk, changes).await?;
    Ok(answers)
}

/// What leaves together with this settlement.
pub(super) fn sent(settle: &Settle) -> &[NewMessage] {
    if settle.settlement == Settlement::Ack { &settle.sent } else { &[] }
}

/// Why what leaves together with this settlement cannot be taken in, as far as is known by heart. To be asked first, so
/// that nothing is read for copies that are too many.
pub(super) fn unsendable(desk: &Desk, settle: &Settle) -> Option<String> {
    let is_there = |queue: &QueueName| !matches!(desk.queues.named(queue), Ok(None));
    policy::unsendable(sent(settle), |topic| desk.queues.subscribed(topic), is_there)
}

// Lives on: the primary keys of message and queue.
const HELD: &str = "\
select message.seq, message.id, message.queue_id, message.token, message.enqueued_at,
    message.due_at, message.lease_until, message.grp
from json_each(?1) as wanted
cross join message on message.seq = wanted.value
where message.state = 2
    and message.lease_until > ?2
    and message.queue_id in (select id from queue)";

/// What is known of these leases: by heart as far as it is, else from the database.
async fn load_held(desk: &mut Desk, settles: &[&Settle]) -> sqlx::Result<HashMap<i64, Held>> {
    let mut held = HashMap::with_capacity(settles.len());
    let mut unknown = Vec::new();
    for settle in settles {
        let seq = settle.lease.seq;
        match desk.leases.remove(&seq) {
            Some(message) if message.until > desk.now => drop(held.insert(seq, message)),
            _ if held.contains_key(&seq) => (),
            _ => unknown.push(seq),
        }
    }
    if unknown.is_empty() {
        return Ok(held);
    }
    let found = query(HELD).bind(rows::list(unknown)).bind(desk.now);
    for row in found.fetch_all(&mut desk.connection).await? {
        let message = Held {
            id: rows::shown_id(&row),
            queue_id: row.try_get("queue_id")?,
            token: Token(row.try_get("token")?),
            enqueued_at: row.try_get("enqueued_at")?,
            due_at: row.try_get("due_at")?,
            until: row.try_get("lease_until")?,
            group: row.try_get("grp")?,
        };
        held.insert(row.try_get("seq")?, message);
    }
    Ok(held)
}

fn decide<'a>(
    desk: &mut Desk,
    plan: &mut Plan<'a>,
    held: &mut HashMap<i64, Held>,
    changes: &mut Changes<'a>,
    (settle, unsendable): (&'a Settle, Option<String>),
) -> Result<Settled> {
    let lease = &settle.lease;
    let is_held = |message: &Held| message.token == lease.token && message.id == lease.id;
    if !held.get(&lease.seq).is_some_and(is_held) {
        return Ok(Settled::LeaseLost);
    }
    if let Some(what) = unsendable {
        return Err(Error::Rejected { what });
    }
    send(desk, plan, sent(settle))?;
    let target = match &settle.settlement {
        Settlement::Move { to_queue, .. } => desk.queues.named(to_queue).map_err(of_one)?,
        _ => None,
    };
    // Out of the map: whoever comes second in this transaction has lost the lease.
    let message = held.remove(&lease.seq).expect("it was there a moment ago");
    changes.deliveries.extend(settle.delivery.iter().map(|record| (lease.seq, record)));
    if let Some(target) = target {
        changes.moved.push((lease.seq, target.id));
        desk.moved_to(target.id, lease.seq, &message);
    } else {
        let state = changes.add(desk.now, lease.seq, &message, &settle.settlement);
        desk.moved(message.queue_id, State::Leased, state);
        if message.group.is_some() && !state.lives() {
            let queue = desk.queues.numbered(message.queue_id).map(|queue| &**queue);
            desk.groups.ended(queue, lease.seq, state);
        }
    }
    Ok(Settled::Done { age: rows::since(message.enqueued_at, desk.now) })
}

/// Takes in what a handler sent: all of it or nothing.
fn send<'a>(desk: &mut Desk, plan: &mut Plan<'a>, sent: &'a [NewMessage]) -> Result<()> {
    let mark = plan.mark();
    for (place, message) in sent.iter().enumerate() {
        let why = match plan.take_in(desk, message) {
            Ok(Enqueued::New(_) | Enqueued::Duplicate(_) | Enqueued::Published(_)) => continue,
            Ok(Enqueued::Refused(refusal)) => Error::Rejected { what: not_sent(place, &refusal) },
            Err(error) => error,
        };
        plan.undo(desk, mark);
        return Err(why);
    }
    Ok(())
}

/// What is to be written, sorted by statement.
#[derive(Default)]
struct Changes<'a> {
    acked: Vec<i64>,
    others: Vec<Other<'a>>,
    /// Seq, and the number of the new queue.
    moved: Vec<(i64, i64)>,
    deliveries: Vec<(i64, &'a DeliveryRecord)>,
}

/// What is no ack: seq, state, due time, failures to add, end, reason.
type Other<'a> = (i64, i16, i64, i64, Option<i64>, Option<Cow<'a, str>>);

impl<'a> Changes<'a> {
    /// Adds a settlement, and says in which state it leaves the message. One that is to be moved has nowhere to go.
    fn add(&mut self, now: i64, seq: i64, held: &Held, settlement: &'a Settlement) -> State {
        let (state, due_at, failures, reason) = match settlement {
            Settlement::Ack => {
                self.acked.push(seq);
                return State::Completed;
            }
            Settlement::Retry { after } => {
                let due_at = rows::after(now, *after);
                (rows::waiting_state(due_at, now), due_at, 1, None)
            }
            Settlement::Postpone { after } => {
                let due_at = rows::after(now, *after);
                (rows::waiting_state(due_at, now), due_at, 0, None)
            }
            Settlement::DeadLetter { reason } => {
                (State::Dead, held.due_at, 1, Some(Cow::from(reason)))
            }
            Settlement::Discard { reason } => {
                (State::Discarded, held.due_at, 0, Some(Cow::from(reason)))
            }
            Settlement::Move { to_queue, reason } => {
                let reason = target_gone(reason, to_queue);
                (State::Dead, held.due_at, 1, Some(Cow::from(reason)))
            }
            // It keeps its due time, so that it goes first again.
            Settlement::Release => (State::Ready, held.due_at, 0, None),
        };
        let finished_at = (!state.waits()).then_some(now);
        self.others.push((seq, state.code(), due_at, failures, finished_at, reason));
        state
    }
}

// Lives on: the primary key of message. Leaves message_leased for message_ended.
const ACK: &str = "\
update message
set state = 3, finished_at = ?2
where seq in (select value from json_each(?1))";

// Lives on: the primary key of message. Leaves message_leased for the index of the new state.
const SETTLE: &str = "\
update message
set state = settled.value ->> 1, due_at = settled.value ->> 2,
    failures = message.failures + (settled.value ->> 3), finished_at = settled.value ->> 4,
    reason = settled.value ->> 5
from json_each(?) as settled
where message.seq = settled.value ->> 0";

// Lives on: the primary key of message. Leaves message_leased for message_ready, and message_listed of one queue for
// that of the other.
const MOVE: &str = "\
update message
set queue_id = moved.value ->> 1, state = 0, due_at = ?2, failures = 0, crashes = 0, behind = grp is not null
from json_each(?1) as moved
where message.seq = moved.value ->> 0";

async fn write(desk: &mut Desk, changes: Changes<'_>) -> sqlx::Result<()> {
    if !changes.acked.is_empty() {
        let acked = query(ACK).bind(rows::list(changes.acked)).bind(desk.now);
        acked.execute(&mut desk.connection).await?;
    }
    if !changes.others.is_empty() {
        let others = query(SETTLE).bind(rows::json(&changes.others));
        others.execute(&mut desk.connection).await?;
    }
    if !changes.moved.is_empty() {
        let moved = query(MOVE).bind(rows::json(&changes.moved)).bind(desk.now);
        moved.execute(&mut desk.connection).await?;
    }
    record_deliveries(desk, &changes.deliveries).await
}

// Lives on: the primary key of delivery, near its end. An attempt has one record: the first word counts.
static INSERT_DELIVERIES: Insert = Insert::into(&[Rows {
    head: "\
insert into delivery (
    seq, number, replica, started_at, duration, outcome, status, error_kind, error, answer
)
values\n",
    row: "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    tail: "\non conflict (seq, number) do nothing",
}]);

/// Keeps what is to be remembered of deliveries.
pub(super) async fn record_deliveries(
    desk: &mut Desk,
    deliveries: &[(i64, &DeliveryRecord)],
) -> sqlx::Result<()> {
    INSERT_DELIVERIES.all(&mut desk.connection, deliveries, &[bind_delivery]).await?;
    for (seq, record) in deliveries.iter().filter(|(_, record)| record.number > DELIVERIES_KEPT) {
        let forget = query(FORGET_DELIVERIES).bind(*seq);
        let forget = forget.bind(i64::from(record.number - DELIVERIES_KEPT));
        forget.execute(&mut desk.connection).await?;
    }
    Ok(())
}

// Lives on: the primary key of delivery, at the beginning of one message.
const FORGET_DELIVERIES: &str = "\
delete from delivery
where seq = ?1 and number <= ?2";

fn bind_delivery(statement: Statement, (seq, record): &(i64, &DeliveryRecord)) -> Statement {
    statement
        .bind(*seq)
        .bind(i64::from(record.number))
        .bind(record.replica.as_str().to_owned())
        .bind(rows::micros(record.started_at))
        .bind(rows::span(record.duration))
        .bind(record.outcome.as_str())
        .bind(record.status.map(i64::from))
        .bind(record.error_kind.map(|kind| kind.as_str()))
        .bind(record.error.clone())
        .bind(record.answer.to_vec())
}

/// The statements of this file.
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    INSERT_DELIVERIES.statements().chain([HELD, ACK, SETTLE, MOVE, FORGET_DELIVERIES])
}
