//! The operator's hand on single messages: amend, redrive, delete, purge.
//!
//! What waits is changed by taking its token first, as a claim does, and then the message; so whoever
//! comes second finds no token and looks where the message is now.

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query};

use crate::model::{MessageId, QueueName, Record, State};

use super::super::{Amended, Amendment, Filter, Result};
use super::Postgres;
use super::fault::Trouble;
use super::groups::{free_groups, line_up};
use super::news::Word;
use super::rows::{self, records};

// Lives on: message_id; see `records`.
const RECORD: &str = records!("select seq from message where id = $1");

// Lives on: the primary keys of message and ready. Waits for whoever has the token in hand.
const TAKE_READY: &str = "\
delete from ready
where queue_id = (select queue_id from message where seq = $1)
    and rank = (select rank from message where seq = $1)
    and lane = (select lane from message where seq = $1)
    and due_at = (select due_at from message where seq = $1)
    and seq = $1
returning now_micros() as now";

// Lives on: the primary keys of message and scheduled. Waits for whoever has the token in hand.
const TAKE_SCHEDULED: &str = "\
delete from scheduled
where due_at = (select due_at from message where seq = $1)
    and seq = $1
returning now_micros() as now";

// Lives on: the primary keys of message and behind. Waits for whoever has the token in hand.
const TAKE_BEHIND: &str = "\
delete from behind
where queue_id = (select queue_id from message where seq = $1)
    and grp = (select grp from message where seq = $1)
    and seq = $1
returning now_micros() as now";

// Lives on: the primary keys of message and ended; see `free_groups`.
const CANCEL: &str = concat!(
    "\
with moved as (
    update message
    set state = 7, finished_at = $2, reason = 'cancelled while it waited'
    where seq = $1
    returning finished_at, seq, queue_id, grp
),
finished as (
    select seq, grp
    from moved
    where grp is not null
),
",
    free_groups!(),
    "
insert into ended (finished_at, seq, queue_id)
select finished_at, seq, queue_id
from moved"
);

// Lives on: the primary keys of message, ready and scheduled.
const WAIT: &str = "\
with moved as (
    update message
    set due_at = $2
    where seq = $1
    returning seq, queue_id, rank, lane, due_at, expires_at
),
due as (
    insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
    select queue_id, rank, lane, due_at, seq, expires_at, $4
    from moved
    where $3
)
insert into scheduled (due_at, seq, queue_id, rank, lane, expires_at)
select due_at, seq, queue_id, rank, lane, expires_at
from moved
where not $3";

// Lives on: the primary key of dead, from its beginning (or dead_listed); then those of message, queue,
// content, head and ready; see `line_up`. Passes over dead letters that others have in hand. One that is still the first of
// its group goes on as that.
macro_rules! redrive {
    ($which:literal) => {
        concat!(
            "\
with clock as (
    select now_micros() as now
),
taken as (
    delete from dead
    where ctid = any(array(
        select dead.ctid
        from dead
        cross join lateral (select * from message where message.seq = dead.seq limit 1) as message
        join queue on queue.id = message.queue_id
        left join lateral (select * from content where content.seq = dead.seq limit 1) as content on true
        where ($1::text is null or queue.name = $1)
            and ($2::text is null or content.kind = $2)
            and ($3::text is null or content.correlation_id = $3)
            and ($4::bigint is null or message.enqueued_at >= $4)
            and ($5::bigint is null or message.enqueued_at < $5)
            and ($8::bigint is null or message.grp = $8)
            and ",
            $which,
            "
        order by dead.seq
        limit $7
        for update of dead skip locked
    ))
    returning dead.seq
),
moved as (
    update message
    set state = 0, failures = 0, crashes = 0, finished_at = null, reason = null,
        due_at = (select now from clock),
        expires_at = case when expires_at > (select now from clock) then expires_at end
    where seq = any(array(select seq from taken))
    returning seq, id, queue_id, rank, lane, due_at, expires_at, grp
),
first as (
    select head.seq
    from (select * from moved where grp is not null order by grp) as moved
    cross join lateral (
        select seq
        from head
        where head.grp = moved.grp
            and head.queue_id = moved.queue_id
            and head.seq = moved.seq
        limit 1
        for update
    ) as head
),
made_ready as (
    insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
    select queue_id, rank, lane, due_at, seq, expires_at, false
    from moved
    where grp is null
        or seq = any(array(select seq from first))
),
arriving as (
    select queue_id, grp, seq, due_at, lane, expires_at
    from moved
    where grp is not null
        and not seq = any(array(select seq from first))
),
",
            line_up!(),
            "
select moved.seq, moved.id, queue.name as queue
from moved
join queue on queue.id = moved.queue_id"
        )
    };
}

const REDRIVE: &str = redrive!("(cardinality($6::uuid[]) = 0 or message.id = any($6))");
const REDRIVE_OF_QUEUE: &str = redrive!(
    "(cardinality($6::uuid[]) = 0 or message.id = any($6))
            and dead.queue_id = (select id from queue where name = $1)"
);
const REDRIVE_NAMED: &str = redrive!(
    "message.id = any($6::uuid[])
            and dead.seq = any(array(select seq from message where id = any($6::uuid[])))"
);

/// Deletes messages with all that belongs to them, given the numbers in `gone`. Their keys stay, and are
/// from now on judged by their window alone. What of them was of groups is in `finished`.
/// Lives on: the primary keys of content, delivery and message, and idempotency_needed.
macro_rules! delete_gone {
    () => {
        "\
contents as (
    delete from content
    where seq = any(array(select seq from gone))
    returning shared
),
released_bodies as (
    insert into released (shared)
    select distinct shared
    from contents
    where shared is not null
),
deliveries as (
    delete from delivery
    where seq = any(array(select seq from gone))
),
unneeded as (
    update idempotency
    set sweep_at = expires_at
    where seq = any(array(select seq from gone))
        and sweep_at <> expires_at
),
messages as (
    delete from message
    where seq = any(array(select seq from gone))
    returning seq, grp
),
finished as (
    select seq, grp
    from messages
    where grp is not null
)"
    };
}

pub(super) use delete_gone;

// Lives on: the primary key of dead; see `delete_gone`.
const DELETE_DEAD: &str = concat!(
    "\
with gone as (
    delete from dead
    where seq = $1
    returning seq
),\n",
    delete_gone!(),
    ",
",
    free_groups!(),
    "
select seq
from gone"
);

// Lives on: the primary key of ready; see `delete_gone`.
const PURGE_READY: &str = concat!(
    "\
with gone as (
    delete from ready
    where ctid = any(array(
        select ctid
        from ready
        where queue_id = (select id from queue where name = $1)
            and grp is null
        order by queue_id, rank, lane, due_at, seq
        limit $2
        for update skip locked
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
);

// Lives on: scheduled_queue; see `delete_gone`.
const PURGE_SCHEDULED: &str = concat!(
    "\
with gone as (
    delete from scheduled
    where ctid = any(array(
        select ctid
        from scheduled
        where queue_id = (select id from queue where name = $1)
        order by queue_id, due_at, seq
        limit $2
        for update skip locked
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
);

// Lives on: the primary key of behind; see `delete_gone`.
const PURGE_BEHIND: &str = concat!(
    "\
with gone as (
    delete from behind
    where ctid = any(array(
        select ctid
        from behind
        where queue_id = (select id from queue where name = $1)
        order by queue_id, grp, seq
        limit $2
        for update skip locked
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
);

// Lives on: ready_tokens and the primary key of behind. Tokens of groups in which nobody waits any more.
const PURGE_TOKENS: &str = "\
with held as (
    select ready.ctid as tid, ready.queue_id, ready.grp
    from ready
    where ready.queue_id = (select id from queue where name = $1)
        and ready.grp is not null
    limit $2
    for update skip locked
)
delete from ready
where ctid = any(array(
    select held.tid
    from held
    where (
            select behind.seq
            from behind
            where behind.queue_id = held.queue_id
                and behind.grp = held.grp
            order by behind.queue_id, behind.grp, behind.seq
            limit 1
        ) is null
))";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    RECORD,
    TAKE_READY,
    TAKE_SCHEDULED,
    TAKE_BEHIND,
    CANCEL,
    WAIT,
    REDRIVE,
    REDRIVE_OF_QUEUE,
    REDRIVE_NAMED,
    DELETE_DEAD,
    PURGE_READY,
    PURGE_SCHEDULED,
    PURGE_BEHIND,
    PURGE_TOKENS,
];

/// How often to look again for a message that moves from place to place while we reach for it.
const LOOKS: usize = 20;

pub(super) async fn amend(
    store: &Postgres,
    id: MessageId,
    amendment: Amendment,
) -> Result<Amended> {
    let amended =
        store.hands.transact(move |connection| Box::pin(change(connection, id, amendment))).await?;
    if let Amended::Done(record) = &amended {
        store.herald.tell(word(record));
    }
    Ok(amended)
}

async fn change(
    connection: &mut PgConnection,
    id: MessageId,
    amendment: Amendment,
) -> Result<Amended, Trouble> {
    for _ in 0..LOOKS {
        let Some(row) = find(connection, id).await? else { return Ok(Amended::NoSuchMessage) };
        let (seq, record) = (row.try_get("seq")?, rows::record(&row)?);
        let in_group = record.head.details.group.is_some();
        let places: &[&'static str] = match record.state {
            State::Ready if in_group && amendment != Amendment::Cancel => {
                return Ok(Amended::InGroup);
            }
            State::Ready if in_group => &[TAKE_BEHIND, TAKE_READY],
            State::Ready => &[TAKE_READY],
            State::Scheduled => &[TAKE_SCHEDULED],
            other => return Ok(Amended::Not(other)),
        };
        for take in places {
            let token = query(*take).bind::<i64>(seq).fetch_optional(&mut *connection).await?;
            let Some(token) = token else { continue };
            write(connection, seq, &record, &token, amendment).await?;
            let row = find(connection, id).await?.ok_or(Trouble::Overtaken)?;
            return Ok(Amended::Done(rows::record(&row)?));
        }
    }
    Err(Trouble::Overtaken)
}

async fn find(connection: &mut PgConnection, id: MessageId) -> sqlx::Result<Option<PgRow>> {
    query(RECORD).bind(id.0).fetch_optional(connection).await
}

/// Writes what was asked for about a message whose token we have taken.
async fn write(
    connection: &mut PgConnection,
    seq: i64,
    record: &Record,
    token: &PgRow,
    amendment: Amendment,
) -> sqlx::Result<()> {
    let now: i64 = token.try_get("now")?;
    let (due_at, ready, urgent) = match amendment {
        Amendment::Cancel => {
            return query(CANCEL).bind(seq).bind(now).execute(connection).await.map(drop);
        }
        // What is ready keeps its place in the order.
        Amendment::RunNow if record.state == State::Ready => {
            (rows::micros(record.deliver_at), true, true)
        }
        Amendment::RunNow => (now, true, true),
        Amendment::Reschedule(when) => {
            let due_at = rows::resolve(when, now);
            (due_at, due_at <= now, false)
        }
    };
    let wait = query(WAIT).bind(seq).bind(due_at).bind(ready).bind(urgent);
    wait.execute(connection).await.map(drop)
}

fn word(record: &Record) -> Word {
    match record.state {
        State::Ready => Word::of_ready([record.head.queue.clone()]),
        State::Scheduled => Word { schedule: true, ..Default::default() },
        State::Leased
        | State::Completed
        | State::Discarded
        | State::Dead
        | State::Expired
        | State::Cancelled => Word::of_ready(group_of(record)),
    }
}

/// The queue in which the next one of its group may go.
fn group_of(record: &Record) -> Option<QueueName> {
    record.head.details.group.as_ref().map(|_| record.head.queue.clone())
}

pub(super) async fn redrive(
    store: &Postgres,
    filter: Filter,
    max: usize,
) -> Result<Vec<MessageId>> {
    let mut redriven = store
        .hands
        .run(move |connection| {
            let filter = filter.clone();
            Box::pin(async move { bring_back(connection, &filter, max).await })
        })
        .await?;
    // In the order of arrival, in which they were taken; the statement returns them in any.
    redriven.sort_unstable_by_key(|(seq, ..)| *seq);
    store.herald.tell(Word::of_ready(redriven.iter().filter_map(|(.., queue)| queue.clone())));
    Ok(redriven.into_iter().map(|(_, id, _)| id).collect())
}

async fn bring_back(
    connection: &mut PgConnection,
    filter: &Filter,
    max: usize,
) -> Result<Vec<(i64, MessageId, Option<QueueName>)>, Trouble> {
    let statement = match (&filter.queue, filter.ids.is_empty()) {
        (_, false) => REDRIVE_NAMED,
        (Some(_), true) => REDRIVE_OF_QUEUE,
        (None, true) => REDRIVE,
    };
    let rows = query(statement)
        .bind(filter.queue.as_ref().map(QueueName::as_str))
        .bind(filter.kind.as_deref())
        .bind(filter.correlation_id.as_deref())
        .bind(filter.since.map(rows::micros))
        .bind(filter.until.map(rows::micros))
        .bind(filter.ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(i64::try_from(max).unwrap_or(i64::MAX))
        .bind(filter.group_number())
        .fetch_all(connection)
        .await?;
    let read = |row: &PgRow| {
        // They are back already; a queue that cannot be named is only not told of.
        let queue = rows::queue_name(row.try_get("queue")?).ok();
        Ok((row.try_get("seq")?, rows::message_id(row)?, queue))
    };
    Ok(rows.iter().map(read).collect::<sqlx::Result<_>>()?)
}

pub(super) async fn delete_dead(store: &Postgres, id: MessageId) -> Result<Amended> {
    let deleted = store.hands.transact(move |connection| Box::pin(delete(connection, id))).await?;
    if let Amended::Done(record) = &deleted {
        store.herald.tell(Word::of_ready(group_of(record)));
    }
    Ok(deleted)
}

async fn delete(connection: &mut PgConnection, id: MessageId) -> Result<Amended, Trouble> {
    let Some(row) = find(connection, id).await? else { return Ok(Amended::NoSuchMessage) };
    let (seq, record): (i64, _) = (row.try_get("seq")?, rows::record(&row)?);
    if record.state != State::Dead {
        return Ok(Amended::Not(record.state));
    }
    let gone = query(DELETE_DEAD).bind(seq).fetch_optional(connection).await?;
    gone.map(|_| Amended::Done(record)).ok_or(Trouble::Overtaken)
}

pub(super) async fn purge(store: &Postgres, queue: &QueueName, max: usize) -> Result<u64> {
    let queue = queue.clone();
    let told = queue.clone();
    let purged = store
        .hands
        .run(move |connection| {
            let queue = queue.clone();
            Box::pin(async move {
                let max = i64::try_from(max).unwrap_or(i64::MAX);
                let ready = purge_some(connection, PURGE_READY, &queue, max).await?;
                if ready >= max {
                    return Ok(ready as u64);
                }
                let mut purged = ready;
                for statement in [PURGE_SCHEDULED, PURGE_BEHIND] {
                    purged += purge_some(connection, statement, &queue, max - purged).await?;
                }
                query(PURGE_TOKENS).bind(queue.as_str()).bind(max).execute(connection).await?;
                Ok(purged as u64)
            })
        })
        .await?;
    if purged > 0 {
        // In a group the first of those that are left may go.
        store.herald.tell(Word::of_ready([told]));
    }
    Ok(purged)
}

async fn purge_some(
    connection: &mut PgConnection,
    statement: &'static str,
    queue: &QueueName,
    max: i64,
) -> sqlx::Result<i64> {
    sqlx::query_scalar(statement).bind(queue.as_str()).bind(max).fetch_one(connection).await
}
