//! What is deleted from time to time: what is left of deleted queues, what has expired, what is past its
//! retention, and keys that no longer count.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::{Row, query, query_scalar};

use crate::model::{OnExpiry, QueueName, State};

use super::super::Swept;
use super::desk::{Count, Desk};
use super::upkeep::limit;
use super::{rows, surgery};

/// Forgets what nobody needs, at most `max` of each kind.
pub(super) async fn sweep(desk: &mut Desk, max: usize) -> sqlx::Result<Swept> {
    let more_of_doomed = clear_doomed(desk, max).await?;
    let (expired, set_aside) = expire(desk, max).await?;
    let deleted = forget_messages(desk, max).await?;
    let (looked_at, keys) = forget_keys(desk, max).await?;
    give_back_pages(desk).await?;
    Ok(Swept {
        expired: by_queue(desk, &expired),
        set_aside: by_queue(desk, &set_aside),
        deleted: deleted as u64,
        keys,
        more: more_of_doomed || [expired.len(), deleted, looked_at].contains(&max),
    })
}

fn by_queue(desk: &Desk, of: &[i64]) -> Vec<(QueueName, u64)> {
    let mut by_queue = BTreeMap::<QueueName, u64>::new();
    for queue_id in of {
        let queue = desk.queues.numbered(*queue_id).map(|queue| queue.name.clone());
        queue.into_iter().for_each(|queue| *by_queue.entry(queue).or_default() += 1);
    }
    by_queue.into_iter().collect()
}

// Lives on: doomed, read whole, then message_listed.
const DOOMED_MESSAGES: &str = "\
select message.seq
from doomed
cross join message indexed by message_listed on message.queue_id = doomed.queue_id
limit ?";

// Lives on: doomed, read whole, then the primary key of idempotency.
const FORGET_DOOMED_KEYS: &str = "\
delete from idempotency
where (queue_id, key) in (
    select idempotency.queue_id, idempotency.key
    from doomed
    cross join idempotency on idempotency.queue_id = doomed.queue_id
    limit ?
)";

// Lives on: message_listed and the primary key of idempotency.
const FORGET_DOOMED: &str = "\
delete from doomed
where not exists (
        select 1
        from message indexed by message_listed
        where message.queue_id = doomed.queue_id
    )
    and not exists (
        select 1
        from idempotency
        where idempotency.queue_id = doomed.queue_id
    )";

/// Deletes what is left of deleted queues, and says whether there may be more of it.
async fn clear_doomed(desk: &mut Desk, max: usize) -> sqlx::Result<bool> {
    let messages = query_scalar::<_, i64>(DOOMED_MESSAGES).bind(limit(max));
    let messages = messages.fetch_all(&mut desk.connection).await?;
    surgery::delete(desk, &messages).await?;
    let keys = query(FORGET_DOOMED_KEYS).bind(limit(max)).execute(&mut desk.connection).await?;
    query(FORGET_DOOMED).execute(&mut desk.connection).await?;
    Ok(messages.len() >= max || keys.rows_affected() >= max as u64)
}

// Lives on: message_expiring, from its front, and the primary key of queue.
const EXPIRED: &str = "\
select seq, queue_id, state, grp, behind
from message indexed by message_expiring
where expires_at <= ?1 and state in (0, 1) and queue_id in (select id from queue)
order by expires_at
limit ?2";

// Lives on: the primary key of message. Leaves the indexes of what waits for message_ended or message_dead.
const EXPIRE: &str = "\
update message
set state = expired.value ->> 1, urgent = 0, behind = 0, finished_at = ?2, reason = expired.value ->> 2
from json_each(?1) as expired
where message.seq = expired.value ->> 0";

/// Ends what waited too long; says of which queue each was, and of which each that is a dead letter now.
async fn expire(desk: &mut Desk, max: usize) -> sqlx::Result<(Vec<i64>, Vec<i64>)> {
    let expired = query(EXPIRED).bind(desk.now).bind(limit(max));
    let mut messages = Vec::<(i64, i16, Option<&str>)>::new();
    let (mut queues, mut set_aside) = (Vec::new(), Vec::new());
    for row in expired.fetch_all(&mut desk.connection).await? {
        let queue_id = row.try_get("queue_id")?;
        let queue = desk.queues.numbered(queue_id).cloned();
        let on_expiry = queue.as_ref().map_or(OnExpiry::Expire, |queue| queue.settings.on_expiry);
        let (state, reason) = match on_expiry {
            OnExpiry::Expire => (State::Expired, None),
            OnExpiry::DeadLetter => {
                set_aside.push(queue_id);
                (State::Dead, Some(super::super::EXPIRED))
            }
        };
        let seq = row.try_get("seq")?;
        messages.push((seq, state.code(), reason));
        let is_behind = row.try_get("behind")?;
        let before = match rows::state(row.try_get("state")?)? {
            State::Ready => Count::of_ready(is_behind),
            other => other.into(),
        };
        desk.moved(queue_id, before, state);
        if row.try_get::<Option<i64>, _>("grp")?.is_some() {
            desk.groups.ended(queue.as_deref(), seq, state);
        }
        queues.push(queue_id);
    }
    if !messages.is_empty() {
        let expire = query(EXPIRE).bind(rows::json(&messages)).bind(desk.now);
        expire.execute(&mut desk.connection).await?;
    }
    Ok((queues, set_aside))
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
select idempotency.queue_id, idempotency.key,
    message.state in (0, 1, 2) or (message.state = 5 and idempotency.expires_at >= 0) as needed
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
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(600);

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

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    DOOMED_MESSAGES,
    FORGET_DOOMED_KEYS,
    FORGET_DOOMED,
    EXPIRED,
    EXPIRE,
    PAST_RETENTION,
    DEAD_PAST_RETENTION,
    IDLE_KEYS,
    FORGET_KEYS,
    LOOK_AGAIN,
];
