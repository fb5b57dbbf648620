//! Queues, and whether they and the pump are to run.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query, query_scalar};

use crate::model::{
    GroupOnDead, Guard, GuardChange, OnExpiry, QueueName, QueueRecord, QueueSettings, RunState,
};

use super::super::{DeleteQueue, Precondition, PumpRecord, PutQueue, Result};
use super::Postgres;
use super::facts::LOCK_NAMES;
use super::fault::{Trouble, unreadable};
use super::news::Word;
use super::{groups, rows};

// Lives on: queue_name_key.
const QUEUES: &str = "\
select name, settings, state, guard
from queue
order by name";

// Lives on: queue_name_key.
const QUEUE: &str = "\
select name, settings, state, guard
from queue
where name = $1";

// Lives on: queue_name_key. Locks the queue against other changes, and waits for no transaction that sends to it.
const LOCK_QUEUE: &str = "\
select id, name, settings, state, guard, now_micros() as now
from queue
where name = $1
for no key update";

// Lives on: queue_name_key. Fails at once where somebody sends to the queue in a transaction that is open.
const LOCK_UNUSED_QUEUE: &str = "\
select id, name, settings, state, guard
from queue
where name = $1
for update nowait";

// Lives on: queue_name_key.
const INSERT_QUEUE: &str = "\
insert into queue (
    settings, max_messages, max_crashes, dedup_window, retention_completed, retention_dead,
    dead_on_expiry, state, name, guard, group_blocks
)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)";

// Lives on: queue_name_key.
const UPDATE_QUEUE: &str = "\
update queue
set settings = $1,
    max_messages = $2,
    max_crashes = $3,
    dedup_window = $4,
    retention_completed = $5,
    retention_dead = $6,
    dead_on_expiry = $7,
    state = $8,
    guard = $10,
    group_blocks = $11
where name = $9";

// Lives on: queue_name_key.
const SET_QUEUE_STATE: &str = "\
update queue
set state = $2
where name = $1";

// Lives on: queue_name_key.
const SET_QUEUE_GUARD: &str = "\
update queue
set guard = $2
where name = $1";

// Locks a queue's name against messages that are being taken in.
const LOCK_NAME: &str = "\
select pg_advisory_xact_lock($1, hashtext($2))";

// Lives on: the primary keys of ready and behind, scheduled_queue, dead_listed; and tally, read whole, for leases.
const HAS_MESSAGES: &str = "\
select coalesce(
    (
        select seq
        from ready
        where queue_id = $1
            and grp is null
        order by queue_id, rank, lane, due_at, seq
        limit 1
    ),
    (select seq from behind where queue_id = $1 order by queue_id, grp, seq limit 1),
    (select seq from scheduled where queue_id = $1 order by queue_id, due_at, seq limit 1),
    (select seq from dead where queue_id = $1 order by queue_id, seq limit 1),
    (select 1 from tally where queue_id = $1 and state = 2 having sum(n) > 0)
) is not null";

// Lives on: the primary key of queue, and subscription, read whole. Whatever is left of it finds its end in a sweep.
const DELETE_QUEUE: &str = "\
with gone as (
    delete from queue
    where id = $1
    returning id
),
unsubscribed as (
    delete from subscription
    where queue_id = $1
)
insert into doomed (queue_id)
select id
from gone";

// Lives on: the primary key of pump.
const PUMP: &str = "\
select state, ceiling
from pump
where id = 1";

// Lives on: the primary key of pump.
const LOCK_PUMP: &str = "\
select state
from pump
where id = 1
for update";

// Lives on: the primary key of pump.
const SET_PUMP_STATE: &str = "\
update pump
set state = $1
where id = 1";

// Lives on: the primary key of pump.
const SET_CEILING: &str = "\
update pump
set ceiling = $1
where id = 1";

// Lives on: the primary key of pump.
const SET_BODY_LIMIT: &str = "\
update pump
set body_limit = $1
where id = 1
    and body_limit <> $1";

// Lives on: the primary key of pump.
pub(super) const COUNT_REVISION: &str = "\
update pump
set revision = revision + 1
where id = 1";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    QUEUES,
    QUEUE,
    LOCK_QUEUE,
    LOCK_UNUSED_QUEUE,
    INSERT_QUEUE,
    UPDATE_QUEUE,
    SET_QUEUE_STATE,
    SET_QUEUE_GUARD,
    LOCK_NAME,
    LOCK_PUMP,
    HAS_MESSAGES,
    DELETE_QUEUE,
    PUMP,
    SET_PUMP_STATE,
    SET_CEILING,
    SET_BODY_LIMIT,
    COUNT_REVISION,
];

pub(super) async fn queues(store: &Postgres) -> Result<Vec<QueueRecord>> {
    store
        .hands
        .run(|connection: &mut PgConnection| {
            Box::pin(async move {
                let rows = query(QUEUES).fetch_all(connection).await?;
                Ok(rows.iter().filter_map(readable).collect())
            })
        })
        .await
}

pub(super) async fn queue(store: &Postgres, name: &QueueName) -> Result<Option<QueueRecord>> {
    let name = name.clone();
    store
        .hands
        .run(move |connection: &mut PgConnection| {
            let name = name.clone();
            Box::pin(async move {
                let row = query(QUEUE).bind(name.as_str()).fetch_optional(connection).await?;
                Ok(row.as_ref().map(record).transpose()?)
            })
        })
        .await
}

pub(super) async fn put_queue(
    store: &Postgres,
    name: &QueueName,
    settings: QueueSettings,
    precondition: Precondition,
) -> Result<PutQueue> {
    let (name, told) = (name.clone(), name.clone());
    let done = store
        .hands
        .transact(move |connection: &mut PgConnection| {
            let (name, settings, precondition) =
                (name.clone(), settings.clone(), precondition.clone());
            Box::pin(async move { put(connection, name, settings, &precondition).await })
        })
        .await?;
    if done != PutQueue::PreconditionFailed {
        // Groups that were blocked may go.
        store.herald.tell(Word { settings: true, ..Word::of_ready([told]) });
    }
    Ok(done)
}

async fn put(
    connection: &mut PgConnection,
    name: QueueName,
    settings: QueueSettings,
    precondition: &Precondition,
) -> Result<PutQueue, Trouble> {
    let old = query(LOCK_QUEUE).bind(name.as_str()).fetch_optional(&mut *connection).await?;
    let old = old.as_ref().map(record).transpose()?;
    let etag = old.as_ref().map(|old| old.settings.etag());
    if !precondition.holds(etag.as_deref()) {
        return Ok(PutQueue::PreconditionFailed);
    }
    let known = old.is_some();
    let guard = old.as_ref().map(|old| old.guard_under(&settings)).unwrap_or_default();
    let state = old.map(|old| old.state).unwrap_or_default();
    let statement = if known { UPDATE_QUEUE } else { INSERT_QUEUE };
    query(statement)
        .bind(json(&settings))
        .bind(settings.max_messages.map(|max| i64::try_from(max).unwrap_or(i64::MAX)))
        .bind(i32::try_from(settings.recovery.max_crashes).unwrap_or(i32::MAX))
        .bind(rows::span(settings.dedup_window))
        .bind(rows::span(settings.retention.completed))
        .bind(rows::span(settings.retention.dead))
        .bind(settings.on_expiry == OnExpiry::DeadLetter)
        .bind(json(&state))
        .bind(name.as_str())
        .bind(json(&guard))
        .bind(settings.group_on_dead == GroupOnDead::Block)
        .execute(&mut *connection)
        .await?;
    if known && settings.group_on_dead == GroupOnDead::Next {
        groups::unblock(connection, &name).await?;
    }
    query(COUNT_REVISION).execute(connection).await?;
    let record = QueueRecord { name, settings, state, guard };
    Ok(if known { PutQueue::Replaced(record) } else { PutQueue::Created(record) })
}

pub(super) async fn delete_queue(
    store: &Postgres,
    name: &QueueName,
    force: bool,
    precondition: Precondition,
) -> Result<DeleteQueue> {
    let name = name.clone();
    let mut tries = 1;
    let done = loop {
        let (name, precondition) = (name.clone(), precondition.clone());
        let done = store
            .hands
            .transact(move |connection: &mut PgConnection| {
                let (name, precondition) = (name.clone(), precondition.clone());
                Box::pin(async move { delete(connection, &name, force, &precondition).await })
            })
            .await?;
        if done != DeleteQueue::InUse || tries == UNUSED_TRIES {
            break done;
        }
        tries += 1;
        tokio::time::sleep(UNUSED_PAUSE).await;
    };
    if done == DeleteQueue::Deleted {
        store.herald.tell(Word::of_settings());
    }
    Ok(done)
}

async fn delete(
    connection: &mut PgConnection,
    name: &QueueName,
    force: bool,
    precondition: &Precondition,
) -> Result<DeleteQueue, Trouble> {
    // First, and without waiting: whoever waits with the lock on the name holds up all who send.
    let row = query(LOCK_UNUSED_QUEUE).bind(name.as_str()).fetch_optional(&mut *connection).await;
    let row = match row {
        Ok(Some(row)) => row,
        Ok(None) => return Ok(DeleteQueue::NoSuchQueue),
        Err(error) if is_lock_not_available(&error) => return Ok(DeleteQueue::InUse),
        Err(error) => return Err(error.into()),
    };
    query(LOCK_NAME).bind(LOCK_NAMES).bind(name.as_str()).execute(&mut *connection).await?;
    if !precondition.holds(Some(&record(&row)?.settings.etag())) {
        return Ok(DeleteQueue::PreconditionFailed);
    }
    let id: i32 = row.try_get("id")?;
    if !force && query_scalar(HAS_MESSAGES).bind(id).fetch_one(&mut *connection).await? {
        return Ok(DeleteQueue::NotEmpty);
    }
    query(DELETE_QUEUE).bind(id).execute(&mut *connection).await?;
    query(COUNT_REVISION).execute(connection).await?;
    Ok(DeleteQueue::Deleted)
}

pub(super) async fn set_run_state(
    store: &Postgres,
    queue: Option<&QueueName>,
    state: RunState,
    from: Option<RunState>,
) -> Result<bool> {
    let queue = queue.cloned();
    let known = store
        .hands
        .transact(move |connection: &mut PgConnection| {
            let (queue, state, from) = (queue.clone(), json(&state), from.clone());
            Box::pin(async move {
                if let Some(from) = from
                    && stands(connection, queue.as_ref()).await? != Some(from)
                {
                    return Ok(false);
                }
                let set = match &queue {
                    Some(name) => query(SET_QUEUE_STATE).bind(name.as_str()).bind(state),
                    None => query(SET_PUMP_STATE).bind(state),
                };
                let known = set.execute(&mut *connection).await?.rows_affected() > 0;
                if known {
                    query(COUNT_REVISION).execute(connection).await?;
                }
                Ok(known)
            })
        })
        .await?;
    if known {
        store.herald.tell(Word::of_settings());
    }
    Ok(known)
}

/// Whether a queue or the whole pump is to run, held as it is until the transaction ends.
async fn stands(
    connection: &mut PgConnection,
    queue: Option<&QueueName>,
) -> Result<Option<RunState>, Trouble> {
    let stands = match queue {
        Some(name) => query(LOCK_QUEUE).bind(name.as_str()),
        None => query(LOCK_PUMP),
    };
    let stands = stands.fetch_optional(connection).await?;
    Ok(stands.map(|row| run_state(row.try_get("state")?)).transpose()?)
}

pub(super) async fn guard(
    store: &Postgres,
    queue: &QueueName,
    change: GuardChange,
) -> Result<Option<Guard>> {
    let queue = queue.clone();
    let guard = store
        .hands
        .transact(move |connection: &mut PgConnection| {
            let (queue, change) = (queue.clone(), change.clone());
            Box::pin(async move { change_guard(connection, &queue, &change).await })
        })
        .await?;
    if let Some((_, true)) = guard {
        store.herald.tell(Word::of_settings());
    }
    Ok(guard.map(|(guard, _)| guard))
}

async fn change_guard(
    connection: &mut PgConnection,
    queue: &QueueName,
    change: &GuardChange,
) -> Result<Option<(Guard, bool)>, Trouble> {
    let row = query(LOCK_QUEUE).bind(queue.as_str()).fetch_optional(&mut *connection).await?;
    let Some(row) = row else { return Ok(None) };
    let now = rows::moment(row.try_get("now")?)?;
    let before = guard_of(row.try_get("guard")?)?;
    let guard = before.after(change, now);
    if guard == before {
        return Ok(Some((guard, false)));
    }
    query(SET_QUEUE_GUARD)
        .bind(queue.as_str())
        .bind(json(&guard))
        .execute(&mut *connection)
        .await?;
    query(COUNT_REVISION).execute(connection).await?;
    Ok(Some((guard, true)))
}

pub(super) async fn pump(store: &Postgres) -> Result<PumpRecord> {
    store
        .hands
        .run(|connection: &mut PgConnection| {
            Box::pin(async move {
                let row = query(PUMP).fetch_one(connection).await?;
                let state = run_state(row.try_get("state")?)?;
                Ok(PumpRecord { state, ceiling: rows::count(&row, "ceiling")? })
            })
        })
        .await
}

pub(super) async fn set_ceiling(store: &Postgres, ceiling: u32) -> Result<()> {
    store
        .hands
        .transact(move |connection: &mut PgConnection| {
            Box::pin(async move {
                let ceiling = i32::try_from(ceiling).unwrap_or(i32::MAX);
                query(SET_CEILING).bind(ceiling).execute(&mut *connection).await?;
                query(COUNT_REVISION).execute(connection).await?;
                Ok(())
            })
        })
        .await?;
    store.herald.tell(Word::of_settings());
    Ok(())
}

pub(super) async fn set_body_limit(store: &Postgres, bytes: usize) -> Result<()> {
    store
        .hands
        .run(move |connection: &mut PgConnection| {
            Box::pin(async move {
                let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
                query(SET_BODY_LIMIT).bind(bytes).execute(connection).await?;
                Ok(())
            })
        })
        .await
}

/// How often, and how long apart, it is tried to find a moment in which nobody sends to a queue in a transaction of
/// their own.
const UNUSED_TRIES: u32 = 10;
const UNUSED_PAUSE: Duration = Duration::from_millis(30);

fn is_lock_not_available(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == "55P03")
}

/// A queue, unless it cannot be read: one of them must not stop all the others.
fn readable(row: &PgRow) -> Option<QueueRecord> {
    let record = record(row);
    record
        .inspect_err(|error| {
            let queue = row.try_get::<&str, _>("name").unwrap_or_default();
            tracing::error!(%queue, %error, "a queue is left alone, because it cannot be read");
        })
        .ok()
}

fn record(row: &PgRow) -> sqlx::Result<QueueRecord> {
    let name = rows::queue_name(row.try_get("name")?)?;
    let settings = serde_json::from_str(row.try_get("settings")?);
    let settings =
        settings.map_err(|_| unreadable(format!("the settings of queue {name} are unknown")))?;
    let state = run_state(row.try_get("state")?)?;
    Ok(QueueRecord { name, settings, state, guard: guard_of(row.try_get("guard")?)? })
}

fn guard_of(text: &str) -> sqlx::Result<Guard> {
    serde_json::from_str(text).map_err(|_| unreadable("a queue's guard is unknown"))
}

fn run_state(text: &str) -> sqlx::Result<RunState> {
    serde_json::from_str(text).map_err(|_| unreadable("a run state is unknown"))
}

pub(super) fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("settings are plain data, which is always JSON")
}
