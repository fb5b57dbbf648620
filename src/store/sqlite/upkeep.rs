//! What has to be done from time to time: promote, reap, attend. See `sweep.rs` for what is deleted.

use bytes::Bytes;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, query, query_scalar};

use crate::model::{DeliveryRecord, ErrorKind, Outcome, ReplicaName, State};

use super::super::{Attendance, Attended, Chores, Promoted, Reaped};
use super::desk::{Desk, Queue};
use super::fault::unreadable;
use super::{rows, settle};

// Lives on: message_due, from its front, and the primary key of queue. Leaves it for message_ready.
const PROMOTE: &str = "\
update message
set state = 0
where seq in (
    select seq
    from message indexed by message_due
    where state = 1 and due_at <= ?1 and queue_id in (select id from queue)
    order by due_at
    limit ?2
)
returning queue_id";

// Lives on: message_due, of which it reads one row, and those of deleted queues that come before it.
const NEXT_DUE: &str = "\
select due_at
from message indexed by message_due
where state = 1 and due_at > -1 and queue_id in (select id from queue)
order by due_at
limit 1";

/// Makes ready what has come due, and says when to ask again.
pub(super) async fn promote(desk: &mut Desk, max: usize) -> sqlx::Result<Promoted> {
    let promote = query_scalar::<_, i64>(PROMOTE).bind(desk.now).bind(limit(max));
    let promoted = promote.fetch_all(&mut desk.connection).await?;
    for queue_id in &promoted {
        desk.moved(*queue_id, State::Scheduled, State::Ready);
    }
    let next = query_scalar::<_, i64>(NEXT_DUE).fetch_optional(&mut desk.connection).await?;
    let next = next.map(|due_at| rows::since(desk.now, due_at));
    Ok(Promoted { count: promoted.len(), next })
}

// Lives on: message_leased, from its front. Passes over queues whose settings are not known.
const RUN_OUT: &str = "\
select seq, id, queue_id, attempts, crashes, leased_at, due_at, replica, grp
from message indexed by message_leased
where state = 2 and lease_until <= ?1 and queue_id in (select value from json_each(?3))
order by lease_until
limit ?2";

/// Takes back leases that have run out.
pub(super) async fn reap(desk: &mut Desk, max: usize) -> sqlx::Result<Vec<Reaped>> {
    let run_out = query(RUN_OUT).bind(desk.now).bind(limit(max)).bind(desk.queues.ids());
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
        let crashes = row.try_get::<u32, _>("crashes").unwrap_or(0).saturating_add(1);
        let reason = reason_to_die(&queue, crashes);
        let state = if reason.is_some() { State::Dead } else { State::Ready };
        let due_at = if reason.is_some() { row.try_get("due_at")? } else { desk.now };
        let finished_at = reason.is_some().then_some(desk.now);
        lost.push((seq, state.code(), crashes, due_at, finished_at, reason));
        records.push((seq, lost_delivery(row, desk.now)?));
        reaped.push(Reaped { id: rows::shown_id(row), queue: queue.name.clone(), state });
        desk.moved(queue.id, State::Leased, state);
        if state == State::Dead && row.try_get::<Option<i64>, _>("grp")?.is_some() {
            desk.groups.ended(Some(&queue), seq, state);
        }
        desk.leases.remove(&seq);
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

/// The record of a delivery that nobody answered for. What cannot be read of it must not keep the message
/// from being taken back, and all others with it.
fn lost_delivery(row: &SqliteRow, now: i64) -> sqlx::Result<DeliveryRecord> {
    let replica: Option<&str> = row.try_get("replica")?;
    let replica = replica.and_then(|name| ReplicaName::parse(name).ok());
    let leased_at = row.try_get("leased_at")?;
    Ok(DeliveryRecord {
        number: row.try_get("attempts").unwrap_or(0),
        replica: replica.unwrap_or_else(nobody),
        started_at: rows::nearest_moment(leased_at),
        duration: rows::since(leased_at, now),
        outcome: Outcome::LeaseLost,
        status: None,
        error_kind: Some(ErrorKind::LeaseLost),
        error: Some("the lease ran out before an answer was written".to_owned()),
        answer: Bytes::new(),
    })
}

fn nobody() -> ReplicaName {
    ReplicaName::parse("unknown").expect("this is a name")
}

// Lives on: message_leased, read whole: as many rows as deliveries were open in the process that died. Those of
// incarnation 0 are held outside of it.
const LEFT_BEHIND: &str = "\
select seq, id, queue_id, attempts, crashes, leased_at, due_at, replica, grp
from message indexed by message_leased
where state = 2 and lease_until > -1 and incarnation not in (0, ?1)
    and queue_id in (select value from json_each(?2))";

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
        let left_behind = query(LEFT_BEHIND).bind(attendance.incarnation).bind(desk.queues.ids());
        let left_behind = left_behind.fetch_all(&mut desk.connection).await?;
        reaped = take_back(desk, &left_behind).await?;
        let remember = query(REMEMBER_INCARNATION).bind(attendance.incarnation);
        remember.execute(&mut desk.connection).await?;
        desk.reports(attendance.incarnation);
    }
    let share = |limit| if attendance.leaving { 0 } else { limit };
    let present = (!attendance.leaving).then(|| attendance.replica.clone());
    Ok(Attended {
        shares: attendance.wants.iter().map(|want| share(want.of_one())).collect(),
        reaped,
        replicas: present.into_iter().collect(),
        chores: Chores::ALL,
        revision: query_scalar(REVISION).fetch_one(&mut desk.connection).await?,
        now: rows::moment(desk.now)?,
    })
}

/// A number of rows, as SQLite takes it.
pub(super) fn limit(max: usize) -> i64 {
    i64::try_from(max).unwrap_or(i64::MAX)
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] =
    &[PROMOTE, NEXT_DUE, RUN_OUT, TAKE_BACK, LEFT_BEHIND, REMEMBER_INCARNATION, REVISION];
