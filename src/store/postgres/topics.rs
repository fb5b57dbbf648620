//! Who wants what is published, and clocks that send.

use jiff::Timestamp;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query};

use crate::model::{
    Schedule, ScheduleName, ScheduleRecord, ScheduleState, Subscription, SubscriptionName,
    TopicName,
};

use super::super::schedules::next_of;
use super::super::{Precondition, PutSchedule, PutSubscription, Result};
use super::Postgres;
use super::arrivals::readable_subscription;
use super::fault::{Trouble, unreadable};
use super::news::Word;
use super::queues::{COUNT_REVISION, json};

// Lives on: subscription, read whole, and the primary key of queue.
const SUBSCRIPTIONS: &str = "\
select subscription.topic, subscription.name, subscription.filter, queue.name as queue
from subscription
join queue on queue.id = subscription.queue_id
order by subscription.topic, subscription.name";

// Lives on: queue_name_key. The queue is not deleted until the end of the transaction.
const HOLD_QUEUE: &str = "\
select id
from queue
where name = $1
for key share";

// Lives on: the primary key of subscription.
const HAS_SUBSCRIPTION: &str = "\
select 1
from subscription
where topic = $1
    and name = $2";

// Lives on: the primary key of subscription.
const PUT_SUBSCRIPTION: &str = "\
insert into subscription (topic, name, queue_id, filter)
values ($1, $2, $3, $4)
on conflict (topic, name) do update
set queue_id = excluded.queue_id, filter = excluded.filter";

// Lives on: the primary key of subscription.
const DELETE_SUBSCRIPTION: &str = "\
delete from subscription
where topic = $1
    and name = $2";

// Lives on: schedule, read whole; there are few.
const SCHEDULES: &str = "\
select name, schedule, state, version
from schedule
order by name";

// Locks the name of a schedule, whether there is one or not.
const LOCK_SCHEDULE_NAME: &str = "\
select pg_advisory_xact_lock($1, hashtext($2))";

// Lives on: the primary key of schedule.
const LOCK_SCHEDULE: &str = "\
select name, schedule, state, version
from schedule
where name = $1
for update";

// Lives on: the primary key of schedule.
const PUT_SCHEDULE: &str = "\
insert into schedule (name, schedule, state, version)
values ($1, $2, $3, greatest($4, now_micros()))
on conflict (name) do update
set schedule = excluded.schedule, state = excluded.state, version = excluded.version
returning version";

// Lives on: the primary key of schedule.
const TURN_SCHEDULE: &str = "\
update schedule
set state = $3, version = version + 1
where name = $1
    and version = $2";

// Lives on: the primary key of schedule.
const DELETE_SCHEDULE: &str = "\
delete from schedule
where name = $1";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    SUBSCRIPTIONS,
    HOLD_QUEUE,
    HAS_SUBSCRIPTION,
    PUT_SUBSCRIPTION,
    DELETE_SUBSCRIPTION,
    SCHEDULES,
    LOCK_SCHEDULE_NAME,
    LOCK_SCHEDULE,
    PUT_SCHEDULE,
    TURN_SCHEDULE,
    DELETE_SCHEDULE,
];

/// The class of advisory locks on the names of schedules.
const LOCK_SCHEDULES: i32 = 0x7075_6d73;

pub(super) async fn subscriptions(store: &Postgres) -> Result<Vec<Subscription>> {
    store
        .hands
        .run(|connection: &mut PgConnection| {
            Box::pin(async move {
                let rows = query(SUBSCRIPTIONS).fetch_all(connection).await?;
                Ok(rows.iter().filter_map(readable_subscription).collect())
            })
        })
        .await
}

pub(super) async fn put_subscription(
    store: &Postgres,
    subscription: Subscription,
) -> Result<PutSubscription> {
    let put = store.hands.transact(move |connection: &mut PgConnection| {
        let subscription = subscription.clone();
        Box::pin(async move { put(connection, &subscription).await })
    });
    let put = put.await?;
    if put != PutSubscription::NoSuchQueue {
        store.herald.tell(Word::of_settings());
    }
    Ok(put)
}

async fn put(
    connection: &mut PgConnection,
    subscription: &Subscription,
) -> Result<PutSubscription, Trouble> {
    let Subscription { topic, name, queue, filter } = subscription;
    let queue = query(HOLD_QUEUE).bind(queue.as_str()).fetch_optional(&mut *connection).await?;
    let Some(queue) = queue else { return Ok(PutSubscription::NoSuchQueue) };
    let id: i32 = queue.try_get("id")?;
    let found = query(HAS_SUBSCRIPTION).bind(topic.as_str()).bind(name.as_str());
    let found = found.fetch_optional(&mut *connection).await?;
    let put = query(PUT_SUBSCRIPTION).bind(topic.as_str()).bind(name.as_str());
    put.bind(id).bind(json(filter)).execute(&mut *connection).await?;
    query(COUNT_REVISION).execute(connection).await?;
    Ok(if found.is_some() { PutSubscription::Replaced } else { PutSubscription::Created })
}

pub(super) async fn delete_subscription(
    store: &Postgres,
    topic: &TopicName,
    name: &SubscriptionName,
) -> Result<bool> {
    let (topic, name) = (topic.clone(), name.clone());
    let delete = store.hands.transact(move |connection: &mut PgConnection| {
        let (topic, name) = (topic.clone(), name.clone());
        Box::pin(async move {
            let delete = query(DELETE_SUBSCRIPTION).bind(topic.as_str()).bind(name.as_str());
            let found = delete.execute(&mut *connection).await?.rows_affected() > 0;
            if found {
                query(COUNT_REVISION).execute(connection).await?;
            }
            Ok(found)
        })
    });
    let found = delete.await?;
    if found {
        store.herald.tell(Word::of_settings());
    }
    Ok(found)
}

pub(super) async fn schedules(store: &Postgres) -> Result<Vec<ScheduleRecord>> {
    store
        .hands
        .run(|connection: &mut PgConnection| {
            Box::pin(async move {
                let rows = query(SCHEDULES).fetch_all(connection).await?;
                Ok(rows.iter().filter_map(readable).collect())
            })
        })
        .await
}

/// A schedule, unless it cannot be read: one of them must not stop all the others.
fn readable(row: &PgRow) -> Option<ScheduleRecord> {
    let read = record(row);
    read.inspect_err(|error| {
        let name = row.try_get::<&str, _>("name").unwrap_or_default();
        tracing::error!(schedule = %name, %error, "a schedule is left alone, because it cannot be read");
    })
    .ok()
}

fn record(row: &PgRow) -> sqlx::Result<ScheduleRecord> {
    let name = ScheduleName::parse(row.try_get("name")?);
    let schedule = serde_json::from_str(row.try_get("schedule")?);
    let state = serde_json::from_str(row.try_get("state")?);
    Ok(ScheduleRecord {
        name: name.map_err(|_| unreadable("a schedule's name is no name"))?,
        schedule: schedule.map_err(|_| unreadable("what a schedule says is unknown"))?,
        state: state.map_err(|_| unreadable("a schedule's state is unknown"))?,
        version: row.try_get("version")?,
    })
}

pub(super) async fn put_schedule(
    store: &Postgres,
    name: &ScheduleName,
    schedule: Schedule,
    next_at: Option<Timestamp>,
    precondition: Precondition,
) -> Result<PutSchedule> {
    let name = name.clone();
    let put = store.hands.transact(move |connection: &mut PgConnection| {
        let (name, schedule) = (name.clone(), schedule.clone());
        let precondition = precondition.clone();
        Box::pin(async move {
            put_one_schedule(connection, name, schedule, next_at, &precondition).await
        })
    });
    let put = put.await?;
    if put != PutSchedule::PreconditionFailed {
        store.herald.tell(Word::of_settings());
    }
    Ok(put)
}

async fn put_one_schedule(
    connection: &mut PgConnection,
    name: ScheduleName,
    schedule: Schedule,
    next_at: Option<Timestamp>,
    precondition: &Precondition,
) -> Result<PutSchedule, Trouble> {
    let lock = query(LOCK_SCHEDULE_NAME).bind(LOCK_SCHEDULES).bind(name.as_str());
    lock.execute(&mut *connection).await?;
    let before = query(LOCK_SCHEDULE).bind(name.as_str()).fetch_optional(&mut *connection).await?;
    let before = before.as_ref().map(record).transpose()?;
    let etag = before.as_ref().map(|before| before.schedule.etag());
    if !precondition.holds(etag.as_deref()) {
        return Ok(PutSchedule::PreconditionFailed);
    }
    let is_new = before.is_none();
    let next_at = next_of(before.as_ref(), &schedule, next_at);
    let (state, version) =
        before.map_or((ScheduleState::default(), 0), |it| (it.state, it.version));
    let (state, version) = (ScheduleState { next_at, ..state }, version + 1);
    let put = query(PUT_SCHEDULE).bind(name.as_str()).bind(json(&schedule));
    // Never one that an earlier schedule of this name had.
    let put = put.bind(json(&state)).bind(version).fetch_one(&mut *connection).await?;
    let version = put.try_get("version")?;
    query(COUNT_REVISION).execute(connection).await?;
    let record = ScheduleRecord { name, schedule, state, version };
    Ok(if is_new { PutSchedule::Created(record) } else { PutSchedule::Replaced(record) })
}

pub(super) async fn turn_schedule(
    store: &Postgres,
    name: &ScheduleName,
    version: i64,
    state: ScheduleState,
) -> Result<bool> {
    let name = name.clone();
    store
        .hands
        .run(move |connection: &mut PgConnection| {
            let (name, state) = (name.clone(), json(&state));
            Box::pin(async move {
                let turn = query(TURN_SCHEDULE).bind(name.as_str()).bind(version).bind(state);
                Ok(turn.execute(connection).await?.rows_affected() > 0)
            })
        })
        .await
}

pub(super) async fn delete_schedule(store: &Postgres, name: &ScheduleName) -> Result<bool> {
    let name = name.clone();
    let delete = store.hands.transact(move |connection: &mut PgConnection| {
        let name = name.clone();
        Box::pin(async move {
            let delete = query(DELETE_SCHEDULE).bind(name.as_str());
            let found = delete.execute(&mut *connection).await?.rows_affected() > 0;
            if found {
                query(COUNT_REVISION).execute(connection).await?;
            }
            Ok(found)
        })
    });
    let found = delete.await?;
    if found {
        store.herald.tell(Word::of_settings());
    }
    Ok(found)
}
