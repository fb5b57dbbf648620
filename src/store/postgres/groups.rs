//! Groups: whose turn it is.
//!
//! Whoever sends to a group adds to behind, and leaves one token for the group in ready, in the same transaction. A
//! claim that takes such a token picks the group's first message, locks it, and makes it the head: one insert, which
//! only one of all claims can win. The head goes the way of every other message, back to ready and to scheduled too,
//! and stays the head. Whoever ends it frees the group, and leaves a token where more messages wait.
//!
//! Two things would go wrong without being careful, and a test (`store::races`) stands still without the one or the
//! other: a claim looks at what stood there when it began, but `on conflict` at what stands there now, so that
//! it could win a group for a message that was handled meanwhile; hence it locks the message first (`for update`), and
//! passes over it when it is gone. And whoever frees a group does not see what is just coming in, so that a token could
//! be dropped while nobody is left to see the message; hence whoever drops a token says so in the head (`dirty`), and
//! whoever frees the group leaves a token if there is more *or* it is dirty. (Where nobody waits, there is nothing to say:
//! whoever comes brings a token along.)
//!
//! Locks are taken in one order: tokens (never waited for), messages behind, heads by number. Where a transaction settles
//! in several rounds, each has that order for itself, and a claim that comes between two of them may meet one in a circle:
//! the server ends it after a second, and it is tried again.

use sqlx::{PgConnection, query};

use crate::model::QueueName;

use super::fault::Trouble;

/// Frees the groups whose first messages are in `finished` (seq, grp), and leaves tokens. Lives on: the primary keys of
/// head and behind; then of ready.
macro_rules! free_groups {
    () => {
        "\
freed as (
    delete from head
    where grp = any(array(select grp from finished))
        and seq = any(array(select seq from finished))
    returning queue_id, grp, dirty
),
turns as (
    insert into ready (queue_id, rank, lane, due_at, seq, grp, urgent)
    select freed.queue_id, 0, coalesce(next.lane, 0), coalesce(next.due_at, now_micros()),
        nextval('message_seq'), freed.grp, false
    from freed
    left join lateral (
        select due_at, lane
        from behind
        where behind.queue_id = freed.queue_id
            and behind.grp = freed.grp
        order by behind.queue_id, behind.grp, behind.seq
        limit 1
    ) as next on true
    where next.due_at is not null
        or freed.dirty
)"
    };
}

/// Puts the messages in `arriving` (queue_id, grp, seq, due_at, lane, expires_at) behind, and leaves a token for each.
/// Lives on: the primary keys of behind and ready.
macro_rules! line_up {
    () => {
        "\
lined_up as (
    insert into behind (queue_id, grp, seq, due_at, lane, expires_at)
    select queue_id, grp, seq, due_at, lane, expires_at
    from arriving
),
announced as (
    insert into ready (queue_id, rank, lane, due_at, seq, grp, urgent)
    select queue_id, 0, lane, due_at, nextval('message_seq'), grp, false
    from arriving
)"
    };
}

/// Whether a message, of which `$dead` says whether it is dead, holds up its group. Lives on: the primary key of queue.
/// Whoever changes the queue to let groups go waits for this (`for share`), and finds the dead letter then.
macro_rules! blocks {
    ($dead:literal) => {
        concat!(
            "case when ",
            $dead,
            " then coalesce((select group_blocks from queue where queue.id = queue_id for share), false) else false end"
        )
    };
}

pub(super) use {blocks, free_groups, line_up};

// Lives on: queue_name_key, ready_tokens and the primary keys of head and behind. Never waits for a token. Drops those of
// groups that have a head, and those of groups in which nobody waits: whoever comes to them brings a token along.
const DROP_TOKENS: &str = "\
with held as (
    select ready.ctid as tid, ready.grp
    from ready
    where ready.queue_id = (select id from queue where name = $1)
        and ready.grp = any($2::bigint[])
    limit $3
    for update skip locked
),
dirty as (
    update head
    set dirty = true
    where grp = any(array(select grp from held))
        and queue_id = (select id from queue where name = $1)
    returning grp
),
empty as (
    select grp
    from (select distinct grp from held) as met
    where (
            select behind.seq
            from behind
            where behind.queue_id = (select id from queue where name = $1)
                and behind.grp = met.grp
            order by behind.queue_id, behind.grp, behind.seq
            limit 1
        ) is null
)
delete from ready
where ctid = any(array(
    select tid
    from held
    where grp = any(array(select grp from dirty))
        or grp = any(array(select grp from empty))
))";

// Lives on: queue_name_key, dead_listed and the primary key of head; see `free_groups`. Locks the dead letters first,
// because whoever redrives one does so too, and then it is the first of its group again.
const UNBLOCK: &str = concat!(
    "\
with blocking as (
    select dead.seq, head.grp
    from dead
    cross join lateral (select grp from message where message.seq = dead.seq limit 1) as message
    cross join lateral (
        select grp
        from head
        where head.grp = message.grp
            and head.queue_id = dead.queue_id
            and head.seq = dead.seq
        limit 1
    ) as head
    where dead.queue_id = (select id from queue where name = $1)
    order by dead.queue_id, dead.seq
    for update of dead
),
finished as (
    select seq, grp
    from blocking
),
",
    free_groups!(),
    "
select count(*)
from blocking"
);

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[DROP_TOKENS, UNBLOCK];

/// How many tokens of groups that have nothing to lease are dropped at once.
const TOKENS_DROPPED_AT_ONCE: i64 = 10_000;

/// Clears the way to what can be leased: drops the other tokens of groups of which a claim has met one for nothing.
pub(super) async fn drop_tokens(
    connection: &mut PgConnection,
    queue: &QueueName,
    groups: &[i64],
) -> Result<(), Trouble> {
    let drop = query(DROP_TOKENS).bind(queue.as_str()).bind(groups).bind(TOKENS_DROPPED_AT_ONCE);
    drop.execute(connection).await?;
    Ok(())
}

/// Lets the next ones go where dead letters of this queue hold them up.
pub(super) async fn unblock(connection: &mut PgConnection, queue: &QueueName) -> sqlx::Result<()> {
    query(UNBLOCK).bind(queue.as_str()).execute(connection).await.map(drop)
}
