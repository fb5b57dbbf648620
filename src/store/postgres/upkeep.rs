//! What has to be done from time to time: promote and reap. Any replica may do it, and all at once: each
//! takes what the others do not have in hand. See `sweep.rs` for what is deleted.

use std::collections::BTreeMap;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query, query_scalar};

use crate::model::{QueueName, State};

use super::super::{Promoted, Reaped, Result};
use super::Postgres;
use super::groups::{blocks, free_groups};
use super::news::Word;
use super::rows;

// Lives on: the primary keys of scheduled, ready and queue.
const PROMOTE: &str = "\
with due as (
    delete from scheduled
    where ctid = any(array(
        select ctid
        from scheduled
        where due_at <= (select now_micros())
        order by due_at, seq
        limit $1
        for update skip locked
    ))
    returning queue_id, rank, lane, due_at, seq, expires_at
),
made_ready as (
    insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
    select queue_id, rank, lane, due_at, seq, expires_at, false
    from due
)
select (select name from queue where queue.id = due.queue_id) as queue, count(*) as n
from due
group by queue_id";

// Lives on: the primary key of scheduled.
const NEXT_DUE: &str = "\
select due_at - now_micros()
from scheduled
order by due_at
limit 1";

/// Takes leases back: a crash is counted, and the message is ready again or dead. `$which` selects the
/// `ctid`s of leases, at most `$1`.
///
/// Lives on: the primary keys of lease, queue, message, delivery, and of ready or dead; see `free_groups`.
macro_rules! take_back {
    ([$($with:tt)*], $which:literal) => {
        concat!(
            "\
with ",
            $($with)*,
            "clock as (
    select now_micros() as now
),
lost as (
    delete from lease
    where ctid = any(array(",
            $which,
            "))
    returning seq, queue_id, attempt, replica, leased_at
),
judged as (
    select array_agg(lost.seq) as seqs, array_agg(lost.attempt) as attempts,
        array_agg(message.crashes + 1 >= queue.max_crashes) as died,
        array_agg(format(
            '%s attempts ended with nobody answering for them; recovery.max_crashes is %s',
            message.crashes + 1, queue.max_crashes
        )) as reasons
    from lost
    join queue on queue.id = lost.queue_id
    cross join lateral (select crashes from message where message.seq = lost.seq limit 1) as message
),
moved as (
    update message
    set attempts = (select attempts from judged)[array_position((select seqs from judged), seq)],
        crashes = crashes + 1,
        state = case
            when (select died from judged)[array_position((select seqs from judged), seq)] then 5
            else 0
        end,
        due_at = case
            when (select died from judged)[array_position((select seqs from judged), seq)] then due_at
            else (select now from clock)
        end,
        finished_at = case
            when (select died from judged)[array_position((select seqs from judged), seq)]
            then (select now from clock)
        end,
        reason = case
            when (select died from judged)[array_position((select seqs from judged), seq)]
            then (select reasons from judged)[array_position((select seqs from judged), seq)]
        end
    where seq = any((select seqs from judged)::bigint[])
    returning seq, id, queue_id, rank, lane, due_at, expires_at, state, grp, (select now from clock) as now
),
made_ready as (
    insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
    select queue_id, rank, lane, due_at, seq, expires_at, false
    from moved
    where state = 0
),
died as (
    insert into dead (seq, finished_at, queue_id)
    select seq, now, queue_id
    from moved
    where state = 5
),
recorded as (
    insert into delivery (seq, number, replica, started_at, duration, outcome, error_kind, error, answer)
    select seq, attempt, replica, leased_at, greatest(now - leased_at, 0), 'lease_lost', 'lease_lost',
        'the lease ran out before an answer was written', ''
    from lost, clock
    on conflict (seq, number) do nothing
),
finished as (
    select seq, grp
    from moved
    where grp is not null
        and state = 5
        and not ",
            blocks!("true"),
            "
),
",
            free_groups!(),
            "
select moved.id, queue.name as queue, moved.state
from moved
join queue on queue.id = moved.queue_id
order by moved.seq"
        )
    };
}

pub(super) use take_back;

// Lives on: lease_until; see `take_back`.
const REAP: &str = take_back!(
    [""],
    "
        select ctid
        from lease
        where until <= (select now from clock)
        order by until
        limit $1
        for update skip locked
    "
);

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[PROMOTE, NEXT_DUE, REAP];

pub(super) async fn promote(store: &Postgres, max: usize) -> Result<Promoted> {
    let (by_queue, next) = store
        .hands
        .run(move |connection| {
            Box::pin(async move {
                let next = next_due(connection).await?;
                if next.is_none_or(|next| next > 0) {
                    return Ok((BTreeMap::new(), next));
                }
                let due = query(PROMOTE).bind(limit(max)).fetch_all(&mut *connection).await?;
                Ok((counts(&due)?, next_due(connection).await?))
            })
        })
        .await?;
    let count = by_queue.values().sum::<u64>() as usize;
    store.herald.tell(Word::of_ready(by_queue.into_keys().flatten()));
    Ok(Promoted { count, next: next.map(rows::elapsed) })
}

/// How many microseconds until the next one is due; negative where that is past.
async fn next_due(connection: &mut PgConnection) -> sqlx::Result<Option<i64>> {
    query_scalar(NEXT_DUE).fetch_optional(connection).await
}

pub(super) async fn reap(store: &Postgres, max: usize) -> Result<Vec<Reaped>> {
    let reaped = store
        .hands
        .run(move |connection| {
            Box::pin(async move {
                let rows = query(REAP).bind(limit(max)).fetch_all(connection).await?;
                Ok(taken_back(&rows)?)
            })
        })
        .await?;
    store.herald.tell(word(&reaped));
    Ok(reaped)
}

/// Reads what `take_back` returns.
pub(super) fn taken_back(rows: &[PgRow]) -> sqlx::Result<Vec<Reaped>> {
    let mut reaped = Vec::with_capacity(rows.len());
    for row in rows {
        // It was taken back all the same; there is only no name under which to say so.
        let Ok(queue) = rows::queue_name(row.try_get("queue")?) else { continue };
        let state = rows::state(row.try_get("state")?)?;
        reaped.push(Reaped { id: rows::message_id(row)?, queue, state });
    }
    Ok(reaped)
}

/// What there is to tell of leases that were taken back.
pub(super) fn word(reaped: &[Reaped]) -> Word {
    // Of a group whose first message died, the next one is ready.
    let waits = |state| matches!(state, State::Ready | State::Dead);
    let ready = reaped.iter().filter(|reaped| waits(reaped.state));
    Word::of_ready(ready.map(|reaped| reaped.queue.clone()))
}

/// A number of rows, as Postgres takes it.
pub(super) fn limit(max: usize) -> i64 {
    i64::try_from(max).unwrap_or(i64::MAX)
}

/// How many of each queue; `None` for messages of queues that are being deleted or cannot be named.
pub(super) fn counts(rows: &[PgRow]) -> sqlx::Result<BTreeMap<Option<QueueName>, u64>> {
    let mut counts = BTreeMap::new();
    for row in rows {
        let queue: Option<&str> = row.try_get("queue")?;
        let n: i64 = row.try_get("n")?;
        let queue = queue.and_then(|name| rows::queue_name(name).ok());
        *counts.entry(queue).or_default() += n as u64;
    }
    Ok(counts)
}
