//! What is deleted from time to time: what has expired, what is past its retention, keys that no longer
//! count, and what is left of deleted queues. Any replica may do it, and all at once: each takes what
//! the others do not have in hand.

use std::collections::BTreeMap;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query, query_scalar};

use crate::model::QueueName;

use super::super::{EXPIRED, Result, Swept};
use super::Postgres;
use super::fault::Trouble;
use super::groups::{blocks, free_groups};
use super::news::Word;
use super::surgery::delete_gone;
use super::upkeep::{counts, limit};

/// Ends messages that waited longer than their sender wanted: as expired, or as dead letters for the reason
/// `$2` where their queue asks for that. Lives on: the primary keys of message, ended, dead and queue; see `free_groups`.
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
    set state = case
            when (select dead_on_expiry from queue where queue.id = queue_id) then 5
            else 6
        end,
        reason = case
            when (select dead_on_expiry from queue where queue.id = queue_id) then $2
        end,
        finished_at = (select now from clock)
    where seq = any(array(select seq from gone))
    returning finished_at, seq, queue_id, grp, state = 5 as dead
),
died as (
    insert into dead (seq, finished_at, queue_id)
    select seq, finished_at, queue_id
    from moved
    where dead
),
done as (
    insert into ended (finished_at, seq, queue_id)
    select finished_at, seq, queue_id
    from moved
    where not dead
),
finished as (
    select seq, grp
    from moved
    where grp is not null
        and not (",
            blocks!("dead"),
            ")
),
",
            free_groups!(),
            "
select (select name from queue where queue.id = moved.queue_id) as queue, dead, count(*) as n
from moved
group by queue_id, dead"
        )
    };
}

// Live on: ready_expiring, behind_expiring and scheduled_expiring; see `expire`.
const EXPIRE_READY: &str = expire!("ready");
const EXPIRE_BEHIND: &str = expire!("behind");
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
            ",
",
            free_groups!(),
            "
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
        "coalesce((
    select case when idempotency.expires_at < 0 then state = 0 else state in (0, 5) end
    from message
    where message.seq = idempotency.seq
), false)"
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
        select message.seq, message.queue_id, message.rank, message.lane, message.due_at, message.grp,
            message.finished_at
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
                and ready.lane = gone.lane
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
from_behind as (
    delete from behind
    where ctid = any(array(
        select token.tid
        from gone
        cross join lateral (
            select behind.ctid as tid
            from behind
            where behind.queue_id = gone.queue_id
                and behind.grp = gone.grp
                and behind.seq = gone.seq
            limit 1
        ) as token
    ))
),
from_head as (
    delete from head
    where grp = any(array(select grp from gone where grp is not null))
        and seq = any(array(select seq from gone where grp is not null))
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
    "
select count(*)
from gone"
);

// Lives on: the primary key of ready. What is left there when its messages are gone are tokens of groups.
const CLEAR_DOOMED_TOKENS: &str = "\
with gone as (
    delete from ready
    where ctid = any(array(
        select found.tid
        from doomed
        cross join lateral (
            select ctid as tid, grp
            from ready
            where ready.queue_id = doomed.queue_id
            order by ready.queue_id, ready.rank, ready.lane, ready.due_at, ready.seq
            limit $1
            for update skip locked
        ) as found
        where found.grp is not null
        limit $1
    ))
    returning 1
)
select count(*)
from gone";

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

// Lives on: message_listed and the primary keys of ready and idempotency.
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
        select seq
        from ready
        where ready.queue_id = doomed.queue_id
        order by ready.queue_id, ready.rank, ready.lane, ready.due_at, ready.seq
        limit 1
    ) is null
    and (
        select key
        from idempotency
        where idempotency.queue_id = doomed.queue_id
        order by idempotency.queue_id, idempotency.key
        limit 1
    ) is null";

// Lives on: released, at its beginning; the primary key of shared, and content_shared. What others have in hand is
// looked at another time. Where none of a payload's messages is left, there will be none.
const FORGET_SHARED: &str = "\
with noted as (
    delete from released
    where ctid = any(array(
        select ctid
        from released
        limit $1
        for update skip locked
    ))
    returning shared
),
gone as (
    delete from shared
    where id = any(array(select shared from noted))
        and (
            select content.seq
            from content
            where content.shared = shared.id
            order by content.shared
            limit 1
        ) is null
)
select count(*)
from noted";

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
    EXPIRE_READY,
    EXPIRE_SCHEDULED,
    EXPIRE_BEHIND,
    FORGET_ENDED,
    FORGET_DEAD,
    FORGET_KEYS,
    KEEP_KEYS,
    CLEAR_DOOMED,
    CLEAR_DOOMED_TOKENS,
    CLEAR_DOOMED_KEYS,
    FORGET_DOOMED,
    FORGET_SHARED,
    FOLD,
];

/// After how long a key that its message needed is looked at again: a minute, in microseconds.
const NEEDED_KEY: i64 = 60_000_000;

pub(super) async fn sweep(store: &Postgres, max: usize) -> Result<Swept> {
    store.herald.news.forget_unheard();
    let swept =
        store.hands.run(move |connection| Box::pin(sweep_all(connection, limit(max)))).await?;
    // Of a group whose first message expired, the next one may go.
    let queues = swept.expired.iter().map(|(queue, _)| queue.clone());
    store.herald.tell(Word::of_ready(queues));
    Ok(swept)
}

async fn sweep_all(connection: &mut PgConnection, max: i64) -> Result<Swept, Trouble> {
    let (mut expired, mut set_aside) = (BTreeMap::new(), BTreeMap::new());
    let mut more = false;
    for statement in [EXPIRE_READY, EXPIRE_SCHEDULED, EXPIRE_BEHIND] {
        let ended = query(statement).bind(max).bind(EXPIRED);
        let mut ended = ended.fetch_all(&mut *connection).await?;
        more |= is_full(add(&mut expired, &ended)?, max);
        ended.retain(|row| matches!(row.try_get("dead"), Ok(true)));
        add(&mut set_aside, &ended)?;
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
    let noted = query_scalar(FORGET_SHARED).bind(max).fetch_one(&mut *connection).await?;
    more |= is_full(noted, max);
    query(FOLD).execute(connection).await?;
    let named = |counts: BTreeMap<Option<QueueName>, u64>| {
        counts.into_iter().filter_map(|(queue, n)| Some((queue?, n))).collect()
    };
    let (expired, set_aside) = (named(expired), named(set_aside));
    Ok(Swept { expired, set_aside, deleted, keys, more })
}

/// Adds up how many there are of each queue; returns how many there are in these rows.
fn add(all: &mut BTreeMap<Option<QueueName>, u64>, rows: &[PgRow]) -> Result<i64, Trouble> {
    let mut sum = 0;
    for (queue, n) in counts(rows)? {
        sum += n;
        *all.entry(queue).or_default() += n;
    }
    Ok(i64::try_from(sum).unwrap_or(i64::MAX))
}

/// Deletes what is left of deleted queues; says whether there is more of it.
async fn clear_doomed(connection: &mut PgConnection, max: i64) -> Result<bool, Trouble> {
    let messages: i64 = query_scalar(CLEAR_DOOMED).bind(max).fetch_one(&mut *connection).await?;
    let tokens = query_scalar(CLEAR_DOOMED_TOKENS).bind(max);
    let tokens: i64 = tokens.fetch_one(&mut *connection).await?;
    let keys: i64 = query_scalar(CLEAR_DOOMED_KEYS).bind(max).fetch_one(&mut *connection).await?;
    query(FORGET_DOOMED).execute(connection).await?;
    Ok([messages, tokens, keys].into_iter().any(|count| is_full(count, max)))
}

fn is_full(count: i64, max: i64) -> bool {
    count >= max
}
