//! Who wants what is published, and clocks that send.

use jiff::Timestamp;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteExecutor, query};

use crate::model::{
    Schedule, ScheduleName, ScheduleRecord, ScheduleState, Subscription, SubscriptionName,
    TopicName,
};

use super::super::schedules::next_of;
use super::super::{Precondition, PutSchedule, PutSubscription};
use super::desk::Desk;
use super::fault::unreadable;
use super::queues::{changed, text};
use super::rows;

// Lives on: subscription, read whole, and the primary key of queue.
const SUBSCRIPTIONS: &str = "\
select subscription.topic, subscription.name, subscription.filter, queue.name as queue
from subscription
cross join queue on queue.id = subscription.queue_id
order by subscription.topic, subscription.name";

/// All subscriptions, by topic and name. One that cannot be read is left out: its topic's others must not wait for it.
pub(super) async fn all(reader: impl SqliteExecutor<'_>) -> sqlx::Result<Vec<Subscription>> {
    let rows = query(SUBSCRIPTIONS).fetch_all(reader).await?;
    let readable = |row: &SqliteRow| {
        let read = subscription(row);
        read.inspect_err(|error| {
            let topic = row.try_get::<&str, _>("topic").unwrap_or_default();
            let name = row.try_get::<&str, _>("name").unwrap_or_default();
            tracing::error!(%topic, %name, %error, "a subscription is left alone, because it cannot be read");
        })
        .ok()
    };
    Ok(rows.iter().filter_map(readable).collect())
}

fn subscription(row: &SqliteRow) -> sqlx::Result<Subscription> {
    let name = |_| unreadable("a name is no name");
    let filter = serde_json::from_str(row.try_get("filter")?);
    Ok(Subscription {
        topic: TopicName::parse(row.try_get("topic")?).map_err(name)?,
        name: SubscriptionName::parse(row.try_get("name")?).map_err(name)?,
        queue: rows::queue_name(row.try_get("queue")?)?,
        filter: filter.map_err(|_| unreadable("a filter is unknown"))?,
    })
}

// Lives on: the primary key of subscription.
const HAS_SUBSCRIPTION: &str = "\
select 1
from subscription
where topic = ? and name = ?";

// Lives on: the primary key of subscription.
const PUT_SUBSCRIPTION: &str = "\
insert into subscription (topic, name, queue_id, filter)
values (?, ?, ?, ?)
on conflict (topic, name) do update
set queue_id = excluded.queue_id, filter = excluded.filter";

/// Makes a subscription, or replaces it.
pub(super) async fn put(
    desk: &mut Desk,
    subscription: &Subscription,
) -> sqlx::Result<PutSubscription> {
    let Some(queue) = desk.queues.named(&subscription.queue)? else {
        return Ok(PutSubscription::NoSuchQueue);
    };
    let (topic, name) = (subscription.topic.as_str(), subscription.name.as_str());
    let found = query(HAS_SUBSCRIPTION).bind(topic.to_owned()).bind(name.to_owned());
    let found = found.fetch_optional(&mut desk.connection).await?;
    query(PUT_SUBSCRIPTION)
        .bind(topic.to_owned())
        .bind(name.to_owned())
        .bind(queue.id)
        .bind(text(&subscription.filter))
        .execute(&mut desk.connection)
        .await?;
    changed(desk).await?;
    Ok(if found.is_some() { PutSubscription::Replaced } else { PutSubscription::Created })
}

// Lives on: the primary key of subscription.
const DELETE_SUBSCRIPTION: &str = "\
delete from subscription
where topic = ? and name = ?";

/// Ends a subscription; says whether there was one.
pub(super) async fn delete(
    desk: &mut Desk,
    topic: &TopicName,
    name: &SubscriptionName,
) -> sqlx::Result<bool> {
    let delete = query(DELETE_SUBSCRIPTION).bind(topic.as_str().to_owned());
    let delete = delete.bind(name.as_str().to_owned());
    let found = delete.execute(&mut desk.connection).await?.rows_affected() > 0;
    if found {
        changed(desk).await?;
    }
    Ok(found)
}

// Lives on: schedule, read whole; there are few.
const SCHEDULES: &str = "\
select name, schedule, state, version
from schedule
order by name";

// Lives on: the primary key of schedule.
const SCHEDULE: &str = "\
select name, schedule, state, version
from schedule
where name = ?";

/// All schedules, by name.
pub(super) async fn schedules(
    reader: impl SqliteExecutor<'_>,
) -> sqlx::Result<Vec<ScheduleRecord>> {
    let rows = query(SCHEDULES).fetch_all(reader).await?;
    let readable = |row: &SqliteRow| {
        let read = record(row);
        read.inspect_err(|error| {
            let name = row.try_get::<&str, _>("name").unwrap_or_default();
            tracing::error!(schedule = %name, %error, "a schedule is left alone, because it cannot be read");
        })
        .ok()
    };
    Ok(rows.iter().filter_map(readable).collect())
}

fn record(row: &SqliteRow) -> sqlx::Result<ScheduleRecord> {
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

// Lives on: the primary key of schedule.
const PUT_SCHEDULE: &str = "\
insert into schedule (name, schedule, state, version)
values (?, ?, ?, ?)
on conflict (name) do update
set schedule = excluded.schedule, state = excluded.state, version = excluded.version";

/// Makes a schedule, or replaces what it says, if the precondition holds.
pub(super) async fn put_schedule(
    desk: &mut Desk,
    name: &ScheduleName,
    schedule: Schedule,
    next_at: Option<Timestamp>,
    precondition: &Precondition,
) -> sqlx::Result<PutSchedule> {
    let before = query(SCHEDULE).bind(name.as_str().to_owned());
    let before = before.fetch_optional(&mut desk.connection).await?;
    let before = before.as_ref().map(record).transpose()?;
    let etag = before.as_ref().map(|before| before.schedule.etag());
    if !precondition.holds(etag.as_deref()) {
        return Ok(PutSchedule::PreconditionFailed);
    }
    let is_new = before.is_none();
    let next_at = next_of(before.as_ref(), &schedule, next_at);
    let (state, version) =
        before.map_or((ScheduleState::default(), 0), |it| (it.state, it.version));
    // Never one that an earlier schedule of this name had.
    let version = (version + 1).max(desk.now);
    let state = ScheduleState { next_at, ..state };
    query(PUT_SCHEDULE)
        .bind(name.as_str().to_owned())
        .bind(text(&schedule))
        .bind(text(&state))
        .bind(version)
        .execute(&mut desk.connection)
        .await?;
    changed(desk).await?;
    let record = ScheduleRecord { name: name.clone(), schedule, state, version };
    Ok(if is_new { PutSchedule::Created(record) } else { PutSchedule::Replaced(record) })
}

// Lives on: the primary key of schedule.
const TURN_SCHEDULE: &str = "\
update schedule
set state = ?3, version = version + 1
where name = ?1 and version = ?2";

/// Says how far a schedule has come, if it still has this version.
pub(super) async fn turn_schedule(
    desk: &mut Desk,
    name: &ScheduleName,
    version: i64,
    state: &ScheduleState,
) -> sqlx::Result<bool> {
    let turn = query(TURN_SCHEDULE).bind(name.as_str().to_owned()).bind(version).bind(text(state));
    Ok(turn.execute(&mut desk.connection).await?.rows_affected() > 0)
}

// Lives on: the primary key of schedule.
const DELETE_SCHEDULE: &str = "\
delete from schedule
where name = ?";

/// Deletes a schedule; says whether there was one.
pub(super) async fn delete_schedule(desk: &mut Desk, name: &ScheduleName) -> sqlx::Result<bool> {
    let delete = query(DELETE_SCHEDULE).bind(name.as_str().to_owned());
    let found = delete.execute(&mut desk.connection).await?.rows_affected() > 0;
    if found {
        changed(desk).await?;
    }
    Ok(found)
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    SUBSCRIPTIONS,
    HAS_SUBSCRIPTION,
    PUT_SUBSCRIPTION,
    DELETE_SUBSCRIPTION,
    SCHEDULES,
    SCHEDULE,
    PUT_SCHEDULE,
    TURN_SCHEDULE,
    DELETE_SCHEDULE,
];
