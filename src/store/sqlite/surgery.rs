//! The operator's hand on single messages: amend, redrive, delete, purge.

use sqlx::{Row, query, query_scalar};

use crate::model::{MessageId, QueueName, State};

use super::super::{Amended, Amendment};
use super::desk::{Count, Desk};
use super::listing;
use super::rows;

/// Cancels, hurries or postpones a message that waits.
pub(super) async fn amend(
    desk: &mut Desk,
    id: MessageId,
    amendment: Amendment,
) -> sqlx::Result<Amended> {
    let Some(found) = find(desk, id).await? else { return Ok(Amended::NoSuchMessage) };
    if !found.state.waits() {
        return Ok(Amended::Not(found.state));
    }
    let in_group = found.group.is_some();
    if amendment != Amendment::Cancel && in_group && found.state == State::Ready {
        return Ok(Amended::InGroup);
    }
    let state = match amendment {
        Amendment::Cancel => cancel(desk, &found).await?,
        Amendment::RunNow => run_now(desk, &found).await?,
        Amendment::Reschedule(when) => {
            let due_at = rows::resolve(when, desk.now);
            reschedule(desk, &found, due_at).await?
        }
    };
    desk.moved(found.queue_id, found.count, state);
    done(desk, id).await
}

struct Found {
    seq: i64,
    queue_id: i64,
    state: State,
    group: Option<i64>,
    count: Count,
}

// Lives on: message_id, then the primary key of queue.
const FIND: &str = "\
select seq, queue_id, state, grp, behind
from message
where id = ? and queue_id in (select id from queue)";

async fn find(desk: &mut Desk, id: MessageId) -> sqlx::Result<Option<Found>> {
    let found = query(FIND).bind(id.0.as_bytes().to_vec());
    let Some(row) = found.fetch_optional(&mut desk.connection).await? else { return Ok(None) };
    let (seq, queue_id) = (row.try_get("seq")?, row.try_get("queue_id")?);
    let (state, group) = (rows::state(row.try_get("state")?)?, row.try_get("grp")?);
    let is_behind: bool = row.try_get("behind")?;
    let count = if is_behind { Count::Behind } else { state.into() };
    Ok(Some(Found { seq, queue_id, state, group, count }))
}

async fn done(desk: &mut Desk, id: MessageId) -> sqlx::Result<Amended> {
    let record = listing::record(&mut desk.connection, id).await?;
    Ok(record.map_or(Amended::NoSuchMessage, |(_, record)| Amended::Done(record)))
}

// Lives on: the primary key of message.
const CANCEL: &str = "\
update message
set state = 7, urgent = 0, behind = 0, finished_at = ?2, reason = 'cancelled while it waited'
where seq = ?1";

async fn cancel(desk: &mut Desk, found: &Found) -> sqlx::Result<State> {
    let cancel = query(CANCEL).bind(found.seq).bind(desk.now);
    cancel.execute(&mut desk.connection).await?;
    if found.group.is_some() {
        desk.groups.gone(&[found.seq]);
    }
    Ok(State::Cancelled)
}

// Lives on: the primary key of message. What is ready keeps its place in the order.
const RUN_NOW: &str = "\
update message
set due_at = case state when 1 then ?2 else due_at end, state = 0, urgent = 1
where seq = ?1";

async fn run_now(desk: &mut Desk, found: &Found) -> sqlx::Result<State> {
    let run_now = query(RUN_NOW).bind(found.seq).bind(desk.now);
    run_now.execute(&mut desk.connection).await?;
    Ok(State::Ready)
}

// Lives on: the primary key of message.
const RESCHEDULE: &str = "\
update message
set state = ?2, due_at = ?3, urgent = 0
where seq = ?1";

async fn reschedule(desk: &mut Desk, found: &Found, due_at: i64) -> sqlx::Result<State> {
    let state = rows::waiting_state(due_at, desk.now);
    let reschedule = query(RESCHEDULE).bind(found.seq).bind(state.code()).bind(due_at);
    reschedule.execute(&mut desk.connection).await?;
    Ok(state)
}

// Lives on: the primary keys of message, queue and head. Leaves message_dead and message_ended for
// message_ready. Whoever redrives a message wants it delivered, and not expired by the next sweep. Only what is still dead, because the list was made before this transaction.
const REDRIVE: &str = "\
update message
set state = 0, due_at = ?2, failures = 0, crashes = 0, finished_at = null, reason = null,
    behind = grp is not null and seq not in (select seq from head where head.seq = message.seq),
    expires_at = case when expires_at > ?2 then expires_at end
where seq in (select value from json_each(?1))
    and state = 5
    and queue_id in (select id from queue)
returning seq, queue_id, id, grp, behind";

/// Makes these dead letters ready again, in this order; what is no longer dead is passed over.
pub(super) async fn redrive(desk: &mut Desk, dead: &[i64]) -> sqlx::Result<Vec<MessageId>> {
    let redrive = query(REDRIVE).bind(rows::list(dead.iter().copied())).bind(desk.now);
    let mut redriven = Vec::new();
    for row in redrive.fetch_all(&mut desk.connection).await? {
        let (seq, queue_id): (i64, i64) = (row.try_get("seq")?, row.try_get("queue_id")?);
        let (group, is_behind): (Option<i64>, bool) = (row.try_get("grp")?, row.try_get("behind")?);
        desk.moved(queue_id, State::Dead, Count::of_ready(is_behind));
        group.into_iter().for_each(|group| desk.groups.came(queue_id, group));
        redriven.push((seq, rows::shown_id(&row)));
    }
    redriven.sort_unstable_by_key(|(seq, _)| *seq);
    Ok(redriven.into_iter().map(|(_, id)| id).collect())
}

/// Deletes a dead letter, its payload and its history.
pub(super) async fn delete_dead(desk: &mut Desk, id: MessageId) -> sqlx::Result<Amended> {
    let Some(found) = find(desk, id).await? else { return Ok(Amended::NoSuchMessage) };
    if found.state != State::Dead {
        return Ok(Amended::Not(found.state));
    }
    let was = done(desk, id).await?;
    delete(desk, &[found.seq]).await?;
    desk.went(found.queue_id, State::Dead);
    Ok(was)
}

// Lives on: message_ready.
const WAITING_READY: &str = "\
select seq
from message indexed by message_ready
where queue_id = ? and state = 0 and behind = 0
limit ?";

// Lives on: message_behind.
const WAITING_BEHIND: &str = "\
select seq
from message indexed by message_behind
where queue_id = ? and behind = 1
limit ?";

// Lives on: message_scheduled.
const WAITING_SCHEDULED: &str = "\
select seq
from message indexed by message_scheduled
where queue_id = ? and state = 1
limit ?";

/// Deletes at most `max` of what waits in a queue, and says how many.
pub(super) async fn purge(desk: &mut Desk, queue: &QueueName, max: usize) -> sqlx::Result<u64> {
    let Some(queue) = desk.queues.named(queue)? else { return Ok(0) };
    let mut purged = 0;
    let behind = (WAITING_BEHIND, Count::Behind);
    let ready = (WAITING_READY, Count::from(State::Ready));
    let scheduled = (WAITING_SCHEDULED, Count::from(State::Scheduled));
    for (text, count) in [ready, scheduled, behind] {
        let left = i64::try_from(max - purged).unwrap_or(i64::MAX);
        let waiting = query_scalar::<_, i64>(text).bind(queue.id).bind(left);
        let waiting = waiting.fetch_all(&mut desk.connection).await?;
        delete(desk, &waiting).await?;
        for _ in &waiting {
            desk.went(queue.id, count);
        }
        purged += waiting.len();
    }
    Ok(purged as u64)
}

// Lives on: the primary key of delivery.
const DELETE_DELIVERIES: &str = "\
delete from delivery
where seq in (select value from json_each(?))";

// Lives on: the primary key of content.
const DELETE_CONTENTS: &str = "\
delete from content
where seq in (select value from json_each(?))";

// Lives on: the primary key of message.
const DELETE_MESSAGES: &str = "\
delete from message
where seq in (select value from json_each(?))";

// Lives on: the primary key of content.
const SHARED_BY: &str = "\
select distinct shared
from content
where seq in (select value from json_each(?)) and shared is not null";

// Lives on: the primary key of shared, and content_shared.
const DELETE_UNSHARED: &str = "\
delete from shared
where id in (select value from json_each(?))
    and not exists (
        select 1
        from content indexed by content_shared
        where content.shared = shared.id
    )";

/// Deletes messages with their payloads and their history; their keys stay.
pub(super) async fn delete(desk: &mut Desk, messages: &[i64]) -> sqlx::Result<()> {
    if messages.is_empty() {
        return Ok(());
    }
    desk.groups.gone(messages);
    let messages = rows::list(messages.iter().copied());
    let shared = query_scalar::<_, i64>(SHARED_BY).bind(messages.clone());
    let shared = shared.fetch_all(&mut desk.connection).await?;
    for text in [DELETE_DELIVERIES, DELETE_CONTENTS, DELETE_MESSAGES] {
        query(text).bind(messages.clone()).execute(&mut desk.connection).await?;
    }
    if !shared.is_empty() {
        let unshared = query(DELETE_UNSHARED).bind(rows::list(shared));
        unshared.execute(&mut desk.connection).await?;
    }
    Ok(())
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    FIND,
    CANCEL,
    RUN_NOW,
    RESCHEDULE,
    REDRIVE,
    WAITING_READY,
    WAITING_BEHIND,
    WAITING_SCHEDULED,
    DELETE_DELIVERIES,
    DELETE_CONTENTS,
    DELETE_MESSAGES,
    SHARED_BY,
    DELETE_UNSHARED,
];
