//! What has to be done from time to time: promote, reap, sweep. Any replica may do it, and all at once:
//! each takes what the others do not have in hand.

use std::collections::BTreeMap;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query, query_scalar};

use crate::model::{QueueName, State};

use super::super::{Promoted, Reaped, Result, Swept};
use super::Postgres;
use super::fault::Trouble;
use super::news::Word;
use super::rows;
use super::surgery::delete_gone;

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
    returning queue_id, rank, due_at, seq, expires_at
),
made_ready as (
    insert into ready (queue_id, rank, due_at, seq, expires_at, urgent)
    select queue_id, rank, due_at, seq, expires_at, false
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
/// Lives on: the primary keys of lease, queue, message, delivery, and of ready or dead.
macro_rules! take_back {
    ($with:literal, $which:literal) => {
        concat!(
            "\
with ",
            $with,
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
    returning seq, id, queue_id, rank, due_at, expires_at, state, (select now from clock) as now
),
made_ready as (
    insert into ready (queue_id, rank, due_at, seq, expires_at, urgent)
    select queue_id, rank, due_at, seq, expires_at, false
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
)
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
    "",
    "
        select ctid
        from lease
        where until <= (select now from clock)
        order by until
        limit $1
        for update skip locked
    "
);

/// Ends messages that waited longer than their sender wanted, given their numbers in `gone`.
/// Lives on: the primary keys of message, ended and queue.
macro_rules! expire {
    ($table:literal) => {
        concat!(
            "\
with clock as (
    select now_micros() as now
),
gone as (
    delete from ",
            $table,
            "
    where ctid = any(array(
        select ctid
        from ",
            $table,
            "
        where expires_at <= (select now from clock)
        order by expires_at
        limit $1
        for update skip locked
    ))
    returning seq
),
moved as (
    update message
    set state = 6, finished_at = (select now from clock)
    where seq = any(array(select seq from gone))
    returning finished_at, seq, queue_id
),
done as (
    insert into ended (finished_at, seq, queue_id)
    select finished_at, seq, queue_id
    from moved
)
select (select name from queue where queue.id = moved.queue_id) as queue, count(*) as n
from moved
group by queue_id"
        )
    };
}

// Live on: ready_expiring and scheduled_expiring; see `expire`.
const EXPIRE_READY: &str = expire!("ready");
const EXPIRE_SCHEDULED: &str = expire!("scheduled");

/// Deletes what is past its retention. See `delete_gone`.
macro_rules! forget {
    ($table:literal, $retention:literal) => {
        concat!(
            "\
with clock as (
    select now_micros() as now
),
gone as (
    delete from ",
            $table,
            "
    where ctid = any(array(
        select past.tid
        from queue
        cross join lateral (
            select ctid as tid
            from ",
            $table,
            "
            where queue_id = queue.id
                and finished_at <= (select now from clock) - queue.",
            $retention,
            "
            order by queue_id, finished_at, seq
            limit $1
            for update skip locked
        ) as past
        limit $1
    ))
    returning seq
),\n",
            delete_gone!(),
            "\
select count(*)
from gone"
        )
    };
}

// Live on: the primary key of ended, and dead_since; once for each queue. See `delete_gone`.
const FORGET_ENDED: &str = forget!("ended", "retention_completed");
const FORGET_DEAD: &str = forget!("dead", "retention_dead");

/// Keys that are to be looked at, at most `$1`. Lives on: idempotency_sweep.
macro_rules! past_keys {
    () => {
        "ctid = any(array(
    select ctid
    from idempotency
    where sweep_at <= (select now_micros())
    order by sweep_at
    limit $1
    for update skip locked
))"
    };
}

/// Whether a key's message can still be delivered or is dead. Lives on: the primary key of message.
macro_rules! key_is_needed {
    () => {
        "coalesce((select state from message where message.seq = idempotency.seq) in (0, 5), false)"
    };
}

// Lives on: see `past_keys` and `key_is_needed`.
const FORGET_KEYS: &str =
    concat!("delete from idempotency\nwhere ", past_keys!(), "\nand not ", key_is_needed!());

// Lives on: see `past_keys` and `key_is_needed`. They are looked at again later, so that they do not
// stand in the way of the others.
const KEEP_KEYS: &str = concat!(
    "update idempotency\nset sweep_at = now_micros() + $2\nwhere ",
    past_keys!(),
    "\nand ",
    key_is_needed!()
);

// Lives on: message_listed; then the primary keys of all tables in which a message has a row.
const CLEAR_DOOMED: &str = concat!(
    "\
with gone as (
    select found.*
    from doomed
    cross join lateral (
        select message.seq, message.queue_id, message.rank, message.due_at, message.finished_at
        from message
        where message.queue_id = doomed.queue_id
        order by message.queue_id, message.seq
        limit $1
        for update skip locked
    ) as found
    limit $1
),
from_ready as (
    delete from ready
    where ctid = any(array(
        select token.tid
        from gone
        cross join lateral (
            select ready.ctid as tid
            from ready
            where ready.queue_id = gone.queue_id
                and ready.rank = gone.rank
                and ready.due_at = gone.due_at
                and ready.seq = gone.seq
            limit 1
        ) as token
    ))
),
from_scheduled as (
    delete from scheduled
    where ctid = any(array(
        select token.tid
        from gone
        cross join lateral (
            select scheduled.ctid as tid
            from scheduled
            where scheduled.due_at = gone.due_at
                and scheduled.seq = gone.seq
            limit 1
        ) as token
    ))
),
from_lease as (
    delete from lease
    where seq = any(array(select seq from gone))
),
from_dead as (
    delete from dead
    where seq = any(array(select seq from gone))
),
from_ended as (
    delete from ended
    where ctid = any(array(
        select token.tid
        from gone
        cross join lateral (
            select ended.ctid as tid
            from ended
            where ended.queue_id = gone.queue_id
                and ended.finished_at = gone.finished_at
                and ended.seq = gone.seq
            limit 1
        ) as token
    ))
),\n",
    delete_gone!(),
    "\
select count(*)
from gone"
);

// Lives on: the primary key of idempotency.
const CLEAR_DOOMED_KEYS: &str = "\
with gone as (
    delete from idempotency
    where ctid = any(array(
        select found.tid
        from doomed
        cross join lateral (
            select ctid as tid
            from idempotency
            where idempotency.queue_id = doomed.queue_id
            order by idempotency.queue_id, idempotency.key
            limit $1
            for update skip locked
        ) as found
        limit $1
    ))
    returning 1
)
select count(*)
from gone";

// Lives on: message_listed and the primary key of idempotency.
const FORGET_DOOMED: &str = "\
delete from doomed
where (
        select seq
        from message
        where message.queue_id = doomed.queue_id
        order by message.queue_id, message.seq
        limit 1
    ) is null
    and (
        select key
        from idempotency
        where idempotency.queue_id = doomed.queue_id
        order by idempotency.queue_id, idempotency.key
        limit 1
    ) is null";

// Lives on: tally, at its beginning. What others have in hand is folded another time.
const FOLD: &str = "\
with notes as (
    delete from tally
    where ctid = any(array(
        select ctid
        from tally
        limit 10000
        for update skip locked
    ))
    returning queue_id, state, n
)
insert into tally (queue_id, state, n)
select queue_id, state, sum(n)
from notes
where exists (select 1 from queue where queue.id = notes.queue_id)
group by queue_id, state
having sum(n) <> 0";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    PROMOTE,
    NEXT_DUE,
    REAP,
    EXPIRE_READY,
    EXPIRE_SCHEDULED,
    FORGET_ENDED,
    FORGET_DEAD,
    FORGET_KEYS,
    KEEP_KEYS,
    CLEAR_DOOMED,
    CLEAR_DOOMED_KEYS,
    FORGET_DOOMED,
    FOLD,
];

/// After how long a key that its message needed is looked at again: a minute, in microseconds.
const NEEDED_KEY: i64 = 60_000_000;

pub(super) async fn promote(house: &Postgres, max: usize) -> Result<Promoted> {
    let (by_queue, next) = house
        .hands
        .run(move |connection| {
            Box::pin(async move {
                let due = query(PROMOTE).bind(limit(max)).fetch_all(&mut *connection).await?;
                let next = query_scalar::<_, i64>(NEXT_DUE).fetch_optional(connection).await?;
                Ok((counts(&due)?, next))
            })
        })
        .await?;
    let count = by_queue.values().sum::<u64>() as usize;
    house.herald.tell(Word::of_ready(by_queue.into_keys().flatten()));
    Ok(Promoted { count, next: next.map(rows::elapsed) })
}

pub(super) async fn reap(house: &Postgres, max: usize) -> Result<Vec<Reaped>> {
    let reaped = house
        .hands
        .run(move |connection| {
            Box::pin(async move {
                let rows = query(REAP).bind(limit(max)).fetch_all(connection).await?;
                Ok(taken_back(&rows)?)
            })
        })
        .await?;
    house.herald.tell(word(&reaped));
    Ok(reaped)
}

/// Reads what `take_back` returns.
pub(super) fn taken_back(rows: &[PgRow]) -> sqlx::Result<Vec<Reaped>> {
    let read = |row: &PgRow| {
        let state = rows::state(row.try_get("state")?)?;
        Ok(Reaped {
            id: rows::message_id(row)?,
            queue: rows::queue_name(row.try_get("queue")?)?,
            state,
        })
    };
    rows.iter().map(read).collect()
}

/// What there is to tell of leases that were taken back.
pub(super) fn word(reaped: &[Reaped]) -> Word {
    let ready = reaped.iter().filter(|reaped| reaped.state == State::Ready);
    Word::of_ready(ready.map(|reaped| reaped.queue.clone()))
}

pub(super) async fn sweep(house: &Postgres, max: usize) -> Result<Swept> {
    house.herald.news.forget_unheard();
    house.hands.run(move |connection| Box::pin(sweep_all(connection, limit(max)))).await
}

async fn sweep_all(connection: &mut PgConnection, max: i64) -> Result<Swept, Trouble> {
    let mut by_queue = BTreeMap::<_, u64>::new();
    let mut more = false;
    for statement in [EXPIRE_READY, EXPIRE_SCHEDULED] {
        let expired = query(statement).bind(max).fetch_all(&mut *connection).await?;
        let expired = counts(&expired)?;
        more |= is_full(expired.values().sum::<u64>() as i64, max);
        expired.into_iter().for_each(|(queue, n)| *by_queue.entry(queue).or_default() += n);
    }
    let mut deleted = 0;
    for statement in [FORGET_ENDED, FORGET_DEAD] {
        let count: i64 = query_scalar(statement).bind(max).fetch_one(&mut *connection).await?;
        more |= is_full(count, max);
        deleted += count as u64;
    }
    let keys = query(FORGET_KEYS).bind(max).execute(&mut *connection).await?.rows_affected();
    let kept = query(KEEP_KEYS).bind(max).bind(NEEDED_KEY).execute(&mut *connection).await?;
    more |= is_full((keys + kept.rows_affected()) as i64, max);
    more |= clear_doomed(connection, max).await?;
    query(FOLD).execute(connection).await?;
    let expired = by_queue.into_iter().filter_map(|(queue, n)| Some((queue?, n))).collect();
    Ok(Swept { expired, deleted, keys, more })
}

/// Deletes what is left of deleted queues; says whether there is more of it.
async fn clear_doomed(connection: &mut PgConnection, max: i64) -> Result<bool, Trouble> {
    let messages: i64 = query_scalar(CLEAR_DOOMED).bind(max).fetch_one(&mut *connection).await?;
    let keys: i64 = query_scalar(CLEAR_DOOMED_KEYS).bind(max).fetch_one(&mut *connection).await?;
    query(FORGET_DOOMED).execute(connection).await?;
    Ok(is_full(messages, max) || is_full(keys, max))
}

fn limit(max: usize) -> i64 {
    i64::try_from(max).unwrap_or(i64::MAX)
}

fn is_full(count: i64, max: i64) -> bool {
    count >= max
}

/// How many of each queue; `None` for messages of queues that are being deleted.
fn counts(rows: &[PgRow]) -> sqlx::Result<BTreeMap<Option<QueueName>, u64>> {
    let mut counts = BTreeMap::new();
    for row in rows {
        let queue: Option<&str> = row.try_get("queue")?;
        let n: i64 = row.try_get("n")?;
        *counts.entry(queue.map(rows::queue_name).transpose()?).or_default() += n as u64;
    }
    Ok(counts)
}
