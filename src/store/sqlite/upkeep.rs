//! What has to be done from time to time: promote, reap, sweep, attend.

use std::collections::BTreeMap;

use bytes::Bytes;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, query, query_scalar};

use crate::model::{DeliveryRecord, ErrorKind, Outcome, QueueName, ReplicaName, State};

use super::super::{Attendance, Attended, Promoted, Reaped, Swept};
use super::desk::{Desk, Queue};
use super::fault::unreadable;
use super::{rows, settle, surgery};

// Lives on: message_due, from its front. Leaves it for message_ready.
const PROMOTE: &str = "\
update message
set state = 0
where seq in (
    select seq
    from message indexed by message_due
    where state = 1 and due_at <= ?1
    order by due_at
    limit ?2
)
returning queue_id";

// Lives on: message_due, of which it reads one row.
const NEXT_DUE: &str = "\
select min(due_at)
from message indexed by message_due
where state = 1 and due_at > -1";

/// Makes ready what has come due, and says when to ask again.
pub(super) async fn promote(desk: &mut Desk, max: usize) -> sqlx::Result<Promoted> {
    let promote = query_scalar::<_, i64>(PROMOTE).bind(desk.now).bind(limit(max));
    let promoted = promote.fetch_all(&mut desk.connection).await?;
    for queue_id in &promoted {
        desk.moved(*queue_id, State::Scheduled, State::Ready);
    }
    let next: Option<i64> = query_scalar(NEXT_DUE).fetch_one(&mut desk.connection).await?;
    let next = next.map(|due_at| rows::since(desk.now, due_at));
    Ok(Promoted { count: promoted.len(), next })
}

// Lives on: message_leased, from its front.
const RUN_OUT: &str = "\
select seq, id, queue_id, attempts, crashes, leased_at, due_at, replica
from message indexed by message_leased
where state = 2 and lease_until <= ?1
order by lease_until
limit ?2";

/// Takes back leases that have run out.
pub(super) async fn reap(desk: &mut Desk, max: usize) -> sqlx::Result<Vec<Reaped>> {
    let run_out = query(RUN_OUT).bind(desk.now).bind(limit(max));
    let run_out = run_out.fetch_all(&mut desk.connection).await?;
    take_back(desk, &run_out).await
}

// Lives on: the primary key of message. Leaves message_leased for message_ready or message_dead.
const TAKE_BACK: &str = "\
update message
set state = lost.value ->> 1, crashes = lost.value ->> 2, due_at = lost.value ->> 3,
    finished_at = lost.value ->> 4, reason = lost.value ->> 5
from json_each(?) as lost
where message.seq = lost.value ->> 0";

/// Ends leases for which nobody answers any more.
async fn take_back(desk: &mut Desk, leased: &[SqliteRow]) -> sqlx::Result<Vec<Reaped>> {
    let mut lost = Vec::with_capacity(leased.len());
    let mut records = Vec::with_capacity(leased.len());
    let mut reaped = Vec::with_capacity(leased.len());
    for row in leased {
        let queue_id = row.try_get("queue_id")?;
        let queue = desk.queues.numbered(queue_id).cloned();
        let queue = queue.ok_or_else(|| unreadable("a queue's number is unknown"))?;
        let seq: i64 = row.try_get("seq")?;
        let crashes = row.try_get::<u32, _>("crashes")?.saturating_add(1);
        let reason = reason_to_die(&queue, crashes);
        let state = if reason.is_some() { State::Dead } else { State::Ready };
        let due_at = if reason.is_some() { row.try_get("due_at")? } else { desk.now };
        let finished_at = reason.is_some().then_some(desk.now);
        lost.push((seq, state.code(), crashes, due_at, finished_at, reason));
        records.push((seq, lost_delivery(row, desk.now)?));
        reaped.push(Reaped { id: rows::message_id(row)?, queue: queue.name.clone(), state });
        desk.moved(queue.id, State::Leased, state);
    }
    if lost.is_empty() {
        return Ok(reaped);
    }
    query(TAKE_BACK).bind(rows::json(&lost)).execute(&mut desk.connection).await?;
    let records = records.iter().map(|(seq, record)| (*seq, record)).collect::<Vec<_>>();
    settle::record_deliveries(desk, &records).await?;
    Ok(reaped)
}

fn reason_to_die(queue: &Queue, crashes: u32) -> Option<String> {
    let max = queue.settings.recovery.max_crashes;
    (crashes >= max).then(|| {
        let what = "attempts ended with nobody answering for them";
        format!("{crashes} {what}; recovery.max_crashes is {max}")
    })
}

fn lost_delivery(row: &SqliteRow, now: i64) -> sqlx::Result<DeliveryRecord> {
    let replica = ReplicaName::parse(row.try_get("replica")?);
    let leased_at = row.try_get("leased_at")?;
    Ok(DeliveryRecord {
        number: row.try_get("attempts")?,
        replica: replica.map_err(|_| unreadable("a replica's name is no name"))?,
        started_at: rows::moment(leased_at)?,
        duration: rows::since(leased_at, now),
        outcome: Outcome::LeaseLost,
        status: None,
        error_kind: Some(ErrorKind::LeaseLost),
        error: Some("the lease ran out before an answer was written".to_owned()),
        answer: Bytes::new(),
    })
}

// Lives on: message_leased, read whole: as many rows as deliveries were open in the process that died.
const LEFT_BEHIND: &str = "\
select seq, id, queue_id, attempts, crashes, leased_at, due_at, replica
from message indexed by message_leased
where state = 2 and lease_until > -1 and incarnation <> ?";

// Lives on: the primary key of pump.
const REMEMBER_INCARNATION: &str = "\
update pump
set incarnation = ?
where id = 1";

// Lives on: the primary key of pump.
const REVISION: &str = "\
select revision
from pump
where id = 1";

/// Reports this process alive. The first report after a start takes back what the process before it
/// still held, because only one process at a time has this database, and that one is gone.
pub(super) async fn attend(desk: &mut Desk, attendance: &Attendance) -> sqlx::Result<Attended> {
    let mut reaped = Vec::new();
    if desk.incarnation != attendance.incarnation && !attendance.leaving {
        let left_behind = query(LEFT_BEHIND).bind(attendance.incarnation);
        let left_behind = left_behind.fetch_all(&mut desk.connection).await?;
        reaped = take_back(desk, &left_behind).await?;
        let remember = query(REMEMBER_INCARNATION).bind(attendance.incarnation);
        remember.execute(&mut desk.connection).await?;
        desk.incarnation = attendance.incarnation;
    }
    let share = |limit| if attendance.leaving { 0 } else { limit };
    let present = (!attendance.leaving).then(|| attendance.replica.clone());
    Ok(Attended {
        shares: attendance.wants.iter().map(|want| share(want.limit)).collect(),
        reaped,
        replicas: present.into_iter().collect(),
        revision: query_scalar(REVISION).fetch_one(&mut desk.connection).await?,
    })
}

/// Forgets what nobody needs, at most `max` of each kind.
pub(super) async fn sweep(desk: &mut Desk, max: usize) -> sqlx::Result<Swept> {
    let expired = expire(desk, max).await?;
    let deleted = forget_messages(desk, max).await?;
    let (looked_at, keys) = forget_keys(desk, max).await?;
    give_back_pages(desk).await?;
    let mut by_queue = BTreeMap::<QueueName, u64>::new();
    for queue_id in &expired {
        let queue = desk.queues.numbered(*queue_id).map(|queue| queue.name.clone());
        queue.into_iter().for_each(|queue| *by_queue.entry(queue).or_default() += 1);
    }
    Ok(Swept {
        expired: by_queue.into_iter().collect(),
        deleted: deleted as u64,
        keys,
        more: [expired.len(), deleted, looked_at].contains(&max),
    })
}

// Lives on: message_expiring, from its front.
const EXPIRED: &str = "\
select seq, queue_id, state
from message indexed by message_expiring
where expires_at <= ?1 and state in (0, 1)
order by expires_at
limit ?2";

// Lives on: the primary key of message. Leaves the indexes of what waits for message_ended.
const EXPIRE: &str = "\
update message
set state = 6, urgent = 0, finished_at = ?2
where seq in (select value from json_each(?1))";

/// Expires what waited too long, and says of which queue each was.
async fn expire(desk: &mut Desk, max: usize) -> sqlx::Result<Vec<i64>> {
    let expired = query(EXPIRED).bind(desk.now).bind(limit(max));
    let mut messages = Vec::new();
    let mut queues = Vec::new();
    for row in expired.fetch_all(&mut desk.connection).await? {
        messages.push(row.try_get("seq")?);
        let queue_id = row.try_get("queue_id")?;
        desk.moved(queue_id, rows::state(row.try_get("state")?)?, State::Expired);
        queues.push(queue_id);
    }
    if !messages.is_empty() {
        let expire = query(EXPIRE).bind(rows::list(messages)).bind(desk.now);
        expire.execute(&mut desk.connection).await?;
    }
    Ok(queues)
}

// Lives on: message_ended, from the front of each of the states.
const PAST_RETENTION: &str = "\
select seq, state
from message indexed by message_ended
where queue_id = ?1
    and (state in (3, 4, 6, 7) and finished_at <= ?2)
limit ?3";

// Lives on: message_ended, from the front of the dead letters.
const DEAD_PAST_RETENTION: &str = "\
select seq, state
from message indexed by message_ended
where queue_id = ?1
    and state = 5
    and finished_at <= ?2
limit ?3";

/// Deletes what is past its retention, and says how many.
async fn forget_messages(desk: &mut Desk, max: usize) -> sqlx::Result<usize> {
    let queues = desk.queues.all().cloned().collect::<Vec<_>>();
    let mut deleted = 0;
    for queue in queues {
        let kept = &queue.settings.retention;
        for (text, kept) in [(PAST_RETENTION, kept.completed), (DEAD_PAST_RETENTION, kept.dead)] {
            let ended_by = desk.now.saturating_sub(rows::span(kept));
            let old = query(text).bind(queue.id).bind(ended_by).bind(limit(max - deleted));
            let mut messages = Vec::new();
            for row in old.fetch_all(&mut desk.connection).await? {
                messages.push(row.try_get("seq")?);
                desk.went(queue.id, rows::state(row.try_get("state")?)?);
            }
            surgery::delete(desk, &messages).await?;
            deleted += messages.len();
        }
    }
    Ok(deleted)
}

// Lives on: idempotency_sweep, from its front, then the primary key of message.
const IDLE_KEYS: &str = "\
select idempotency.queue_id, idempotency.key, message.state in (0, 1, 2, 5) as needed
from idempotency indexed by idempotency_sweep
left join message
    on message.seq = idempotency.seq
    and message.id = idempotency.id
where idempotency.sweep_at <= ?1
order by idempotency.sweep_at
limit ?2";

// Lives on: the primary key of idempotency.
const FORGET_KEYS: &str = "\
delete from idempotency
where (queue_id, key) in (select value ->> 0, unhex(value ->> 1) from json_each(?))";

// Lives on: the primary key of idempotency. Moves within idempotency_sweep.
const LOOK_AGAIN: &str = "\
update idempotency
set sweep_at = ?2
where (queue_id, key) in (select value ->> 0, unhex(value ->> 1) from json_each(?1))";

/// How long to leave keys alone whose messages still need them, where there are more of them than one
/// sweep looks at: what comes after them would never be looked at.
const LOOK_AGAIN_AFTER: std::time::Duration = std::time::Duration::from_secs(600);

/// Deletes keys past their window, and says how many it looked at and how many are gone.
async fn forget_keys(desk: &mut Desk, max: usize) -> sqlx::Result<(usize, u64)> {
    let idle = query(IDLE_KEYS).bind(desk.now).bind(limit(max));
    let mut needed = Vec::new();
    let mut unneeded = Vec::new();
    for row in idle.fetch_all(&mut desk.connection).await? {
        let key = (row.try_get::<i64, _>("queue_id")?, rows::hex(row.try_get("key")?));
        let is_needed = row.try_get::<Option<bool>, _>("needed")?.unwrap_or(false);
        if is_needed { needed.push(key) } else { unneeded.push(key) }
    }
    if !unneeded.is_empty() {
        let forget = query(FORGET_KEYS).bind(rows::json(&unneeded));
        forget.execute(&mut desk.connection).await?;
    }
    if !needed.is_empty() && needed.len() + unneeded.len() >= max {
        let again = rows::after(desk.now, LOOK_AGAIN_AFTER);
        let look_again = query(LOOK_AGAIN).bind(rows::json(&needed)).bind(again);
        look_again.execute(&mut desk.connection).await?;
    }
    Ok((needed.len() + unneeded.len(), unneeded.len() as u64))
}

/// Gives some pages back to the file system, where the file is mostly empty; a file that will grow
/// again soon keeps its pages, because growing a file makes every sync slower.
async fn give_back_pages(desk: &mut Desk) -> sqlx::Result<()> {
    let free: i64 = query_scalar("pragma freelist_count").fetch_one(&mut desk.connection).await?;
    let all: i64 = query_scalar("pragma page_count").fetch_one(&mut desk.connection).await?;
    if free > FREE_PAGES_MIN && free > all / 2 {
        query("pragma incremental_vacuum(512)").execute(&mut desk.connection).await?;
    }
    Ok(())
}

/// Below this (40 MB) it is not worth it.
const FREE_PAGES_MIN: i64 = 10_000;

fn limit(max: usize) -> i64 {
    i64::try_from(max).unwrap_or(i64::MAX)
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    PROMOTE,
    NEXT_DUE,
    RUN_OUT,
    TAKE_BACK,
    LEFT_BEHIND,
    REMEMBER_INCARNATION,
    REVISION,
    EXPIRED,
    EXPIRE,
    PAST_RETENTION,
    DEAD_PAST_RETENTION,
    IDLE_KEYS,
    FORGET_KEYS,
    LOOK_AGAIN,
];
