//! Groups: whose turn it is.
//!
//! Each message of a group comes in behind the others (`behind` = 1). The one whose turn it is stands in the
//! table head, from then until it has ended; one that is retried keeps its place there, and so does one that is
//! dead in a queue whose groups are blocked by their dead. What a transaction does to groups, it notes at the
//! desk ([`GroupChanges`]); its last step gives those without a head their next message. So whatever comes, goes and
//! is sent in one transaction, in whatever order, there is one place that decides.

use std::collections::BTreeSet;

use sqlx::{Row, query};

use crate::model::{GroupOnDead, State};

use super::desk::{Count, Desk, Queue};
use super::rows;

/// What a transaction has done to groups so far.
#[derive(Debug, Default)]
pub(super) struct GroupChanges {
    /// Messages that are no longer the first of their group, if they were.
    freed: Vec<i64>,
    /// Groups, by queue and number, that may need a first message.
    touched: BTreeSet<(i64, i64)>,
}

impl GroupChanges {
    /// Says that this message has ended, in this state.
    pub(super) fn ended(&mut self, queue: Option<&Queue>, seq: i64, state: State) {
        let on_dead = queue.map(|queue| queue.settings.group_on_dead).unwrap_or_default();
        if state != State::Dead || on_dead == GroupOnDead::Next {
            self.freed.push(seq);
        }
    }

    /// Says that these messages are gone, if they were there.
    pub(super) fn gone(&mut self, seqs: &[i64]) {
        self.freed.extend(seqs);
    }

    /// Says that a message has come to this group.
    pub(super) fn came(&mut self, queue_id: i64, group: i64) {
        self.touched.insert((queue_id, group));
    }
}

// Lives on: the primary key of head. Leaves head_group.
const FREE: &str = "\
delete from head
where seq in (select value from json_each(?))
returning queue_id, grp";

// Lives on: head_group, and message_behind, of which it reads one row for each group.
const NEXT_HEADS: &str = "\
insert into head (seq, queue_id, grp)
select next.seq, next.queue_id, next.grp
from (
    select touched.value ->> 0 as queue_id, touched.value ->> 1 as grp, (
        select seq
        from message indexed by message_behind
        where message.queue_id = touched.value ->> 0
            and message.grp = touched.value ->> 1
            and message.behind = 1
        order by message.seq
        limit 1
    ) as seq
    from json_each(?) as touched
) as next
where next.seq is not null
    and not exists (
        select 1
        from head indexed by head_group
        where head.queue_id = next.queue_id
            and head.grp = next.grp
    )
returning seq, queue_id";

// Lives on: the primary key of message. Leaves message_behind for message_ready.
const STEP_FORWARD: &str = "\
update message
set behind = 0
where seq in (select value from json_each(?))";

// Lives on: head_group, of one queue, then the primary key of message.
const BLOCKING: &str = "\
select head.seq
from head indexed by head_group
cross join message on message.seq = head.seq
where head.queue_id = ?
    and message.state = 5";

/// The last step of a transaction: gives each group that needs one its next message.
pub(super) async fn line_up(desk: &mut Desk) -> sqlx::Result<()> {
    let GroupChanges { freed, mut touched } = std::mem::take(&mut desk.groups);
    if !freed.is_empty() {
        let free = query(FREE).bind(rows::list(freed));
        for row in free.fetch_all(&mut desk.connection).await? {
            touched.insert((row.try_get("queue_id")?, row.try_get("grp")?));
        }
    }
    if touched.is_empty() {
        return Ok(());
    }
    let touched = rows::json(&touched.into_iter().collect::<Vec<_>>());
    let mut next = Vec::new();
    for row in query(NEXT_HEADS).bind(touched).fetch_all(&mut desk.connection).await? {
        desk.moved(row.try_get("queue_id")?, Count::Behind, State::Ready);
        next.push(row.try_get("seq")?);
    }
    if !next.is_empty() {
        let step = query(STEP_FORWARD).bind(rows::list(next));
        step.execute(&mut desk.connection).await?;
    }
    Ok(())
}

/// Lets the next ones go where dead letters of this queue hold them up.
pub(super) async fn unblock(desk: &mut Desk, queue_id: i64) -> sqlx::Result<()> {
    let blocking = sqlx::query_scalar::<_, i64>(BLOCKING).bind(queue_id);
    let blocking = blocking.fetch_all(&mut desk.connection).await?;
    desk.groups.gone(&blocking);
    Ok(())
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[FREE, NEXT_HEADS, STEP_FORWARD, BLOCKING];
