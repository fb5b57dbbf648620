//! Queues, and whether they and the pump are to run.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteExecutor, query, query_scalar};

use crate::model::{
    GroupOnDead, Guard, GuardChange, QueueName, QueueRecord, QueueSettings, RunState,
};

use super::super::{DeleteQueue, Precondition, PumpRecord, PutQueue};
use super::desk::Desk;
use super::fault::unreadable;
use super::{groups, rows};

// Lives on: queue, read whole; there are few.
const ALL: &str = "\
select id, name, settings, state, guard
from queue
order by name";

// Lives on: the unique index on the name of queue.
const ONE: &str = "\
select id, name, settings, state, guard
from queue
where name = ?";

/// All queues, by name.
pub(super) async fn all(reader: impl SqliteExecutor<'_>) -> sqlx::Result<Vec<QueueRecord>> {
    Ok(query(ALL).fetch_all(reader).await?.iter().filter_map(readable).collect())
}

/// One queue.
pub(super) async fn one(
    reader: impl SqliteExecutor<'_>,
    name: &QueueName,
) -> sqlx::Result<Option<QueueRecord>> {
    let row = query(ONE).bind(name.as_str().to_owned()).fetch_optional(reader).await?;
    row.as_ref().map(record).transpose()
}

// Lives on: the unique index on the name of queue.
const PUT: &str = "\
insert into queue (name, settings, state, guard)
values (?, ?, ?, ?)
on conflict (name) do update
set settings = excluded.settings, guard = excluded.guard";

/// Makes a queue, or replaces its settings, if the precondition holds.
pub(super) async fn put(
    desk: &mut Desk,
    name: &QueueName,
    settings: QueueSettings,
    precondition: &Precondition,
) -> sqlx::Result<PutQueue> {
    let before = one(&mut desk.connection, name).await?;
    let etag = before.as_ref().map(|queue| queue.settings.etag());
    if !precondition.holds(etag.as_deref()) {
        return Ok(PutQueue::PreconditionFailed);
    }
    let is_new = before.is_none();
    let guard = before.as_ref().map(|queue| queue.guard_under(&settings)).unwrap_or_default();
    let state = before.map(|queue| queue.state).unwrap_or_default();
    query(PUT)
        .bind(name.as_str().to_owned())
        .bind(text(&settings))
        .bind(text(&state))
        .bind(text(&guard))
        .execute(&mut desk.connection)
        .await?;
    changed(desk).await?;
    let known = desk.queues.named(name).ok().flatten();
    if settings.group_on_dead == GroupOnDead::Next
        && let Some(known) = known
    {
        groups::unblock(desk, known.id).await?;
    }
    let record = QueueRecord { name: name.clone(), settings, state, guard };
    Ok(if is_new { PutQueue::Created(record) } else { PutQueue::Replaced(record) })
}

// Lives on: the primary key of tally.
const UNFINISHED: &str = "\
select coalesce(sum(n), 0)
from tally
where queue_id = ? and state in (0, 1, 2, 5, 8)";

// Lives on: the primary key of tally.
const DELETE_TALLY: &str = "\
delete from tally
where queue_id = ?";

// Lives on: the primary key of queue.
const DELETE: &str = "\
delete from queue
where id = ?";

// Lives on: subscription, read whole; there are few.
const UNSUBSCRIBE: &str = "\
delete from subscription
where queue_id = ?";

// Lives on: the primary key of doomed.
const DOOM: &str = "\
insert into doomed (queue_id)
values (?)";

/// Deletes a queue, if it may go. From then on nobody sees what is in it, and sweeps delete that bit by
/// bit: at once it would hold up all writing, for seconds where there is much of it.
pub(super) async fn delete(
    desk: &mut Desk,
    name: &QueueName,
    force: bool,
    precondition: &Precondition,
) -> sqlx::Result<DeleteQueue> {
    let Some(queue) = desk.queues.named(name)? else { return Ok(DeleteQueue::NoSuchQueue) };
    if !precondition.holds(Some(&queue.settings.etag())) {
        return Ok(DeleteQueue::PreconditionFailed);
    }
    let unfinished = query_scalar::<_, i64>(UNFINISHED).bind(queue.id);
    if !force && unfinished.fetch_one(&mut desk.connection).await? > 0 {
        return Ok(DeleteQueue::NotEmpty);
    }
    desk.leases.retain(|_, held| held.queue_id != queue.id);
    for text in [DELETE, DOOM, DELETE_TALLY, UNSUBSCRIBE] {
        query(text).bind(queue.id).execute(&mut desk.connection).await?;
    }
    changed(desk).await?;
    Ok(DeleteQueue::Deleted)
}

// Lives on: the unique index on the name of queue.
const SET_QUEUE_STATE: &str = "\
update queue
set state = ?
where name = ?";

// Lives on: the primary key of pump.
const SET_PUMP_STATE: &str = "\
update pump
set state = ?
where id = 1";

// Lives on: the unique index on the name of queue.
const QUEUE_STATE: &str = "\
select state
from queue
where name = ?";

/// Starts or stops a queue, or the whole pump; with `from`, only what still stands as that.
pub(super) async fn set_run_state(
    desk: &mut Desk,
    queue: Option<&QueueName>,
    state: &RunState,
    from: Option<&RunState>,
) -> sqlx::Result<bool> {
    if let Some(from) = from {
        let stands = match queue {
            Some(name) => query(QUEUE_STATE).bind(name.as_str().to_owned()),
            None => query(PUMP),
        };
        let stands = stands.fetch_optional(&mut desk.connection).await?;
        if stands.map(|row| run_state(&row)).transpose()?.as_ref() != Some(from) {
            return Ok(false);
        }
    }
    let set = match queue {
        Some(name) => query(SET_QUEUE_STATE).bind(text(state)).bind(name.as_str().to_owned()),
        None => query(SET_PUMP_STATE).bind(text(state)),
    };
    let found = set.execute(&mut desk.connection).await?.rows_affected() > 0;
    if found {
        changed(desk).await?;
    }
    Ok(found)
}

// Lives on: the unique index on the name of queue.
const QUEUE_GUARD: &str = "\
select guard
from queue
where name = ?";

// Lives on: the unique index on the name of queue.
const SET_QUEUE_GUARD: &str = "\
update queue
set guard = ?
where name = ?";

/// Changes a queue's guard; says what has become of it.
pub(super) async fn guard(
    desk: &mut Desk,
    name: &QueueName,
    change: &GuardChange,
) -> sqlx::Result<Option<Guard>> {
    let found = query(QUEUE_GUARD).bind(name.as_str().to_owned());
    let found = found.fetch_optional(&mut desk.connection).await?;
    let now = rows::moment(desk.now)?;
    let Some(before) = found.as_ref().map(guard_of).transpose()? else { return Ok(None) };
    let guard = before.after(change, now);
    if guard == before {
        return Ok(Some(guard));
    }
    let set = query(SET_QUEUE_GUARD).bind(text(&guard)).bind(name.as_str().to_owned());
    set.execute(&mut desk.connection).await?;
    changed(desk).await?;
    Ok(Some(guard))
}

// Lives on: the primary key of pump.
const PUMP: &str = "\
select state, ceiling
from pump
where id = 1";

/// Whether the whole pump is to run, and its ceiling.
pub(super) async fn pump(reader: impl SqliteExecutor<'_>) -> sqlx::Result<PumpRecord> {
    let row = query(PUMP).fetch_one(reader).await?;
    Ok(PumpRecord { state: run_state(&row)?, ceiling: row.try_get("ceiling")? })
}

// Lives on: the primary key of pump.
const SET_CEILING: &str = "\
update pump
set ceiling = ?
where id = 1";

/// Sets the ceiling over all queues.
pub(super) async fn set_ceiling(desk: &mut Desk, ceiling: u32) -> sqlx::Result<()> {
    query(SET_CEILING).bind(ceiling).execute(&mut desk.connection).await?;
    changed(desk).await
}

// Lives on: the primary key of pump.
const NEXT_REVISION: &str = "\
update pump
set revision = revision + 1
where id = 1";

pub(super) async fn changed(desk: &mut Desk) -> sqlx::Result<()> {
    query(NEXT_REVISION).execute(&mut desk.connection).await?;
    desk.queues_change();
    Ok(())
}

/// A queue, unless it cannot be read: one of them must not stop all the others.
fn readable(row: &SqliteRow) -> Option<QueueRecord> {
    let record = record(row);
    record
        .inspect_err(|error| {
            let queue = row.try_get::<&str, _>("name").unwrap_or_default();
            tracing::error!(%queue, %error, "a queue is left alone, because it cannot be read");
        })
        .ok()
}

fn record(row: &SqliteRow) -> sqlx::Result<QueueRecord> {
    let settings = serde_json::from_str(row.try_get("settings")?);
    Ok(QueueRecord {
        name: rows::queue_name(row.try_get("name")?)?,
        settings: settings.map_err(|_| unreadable("a queue's settings are unknown"))?,
        state: run_state(row)?,
        guard: guard_of(row)?,
    })
}

fn run_state(row: &SqliteRow) -> sqlx::Result<RunState> {
    let state = serde_json::from_str(row.try_get("state")?);
    state.map_err(|_| unreadable("a state of run is unknown"))
}

fn guard_of(row: &SqliteRow) -> sqlx::Result<Guard> {
    let guard = serde_json::from_str(row.try_get("guard")?);
    guard.map_err(|_| unreadable("a queue's guard is unknown"))
}

pub(super) fn text(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("settings are plain data, which is always JSON")
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    ALL,
    ONE,
    PUT,
    UNFINISHED,
    DELETE_TALLY,
    DELETE,
    DOOM,
    UNSUBSCRIBE,
    QUEUE_STATE,
    SET_QUEUE_STATE,
    SET_PUMP_STATE,
    QUEUE_GUARD,
    SET_QUEUE_GUARD,
    PUMP,
    SET_CEILING,
    NEXT_REVISION,
];
