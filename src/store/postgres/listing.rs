//! Looking at messages; changes nothing.

use std::collections::HashMap;

use bytes::Bytes;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query};

use crate::model::{
    DeliveryRecord, ErrorKind, MessageId, Outcome, QueueName, Record, ReplicaName, State,
};

use super::super::columns::BEHIND;
use super::super::{Depth, Filter, Listed, Page, ROWS_LOOKED_AT_MAX, Result};
use super::Postgres;
use super::fault::{Trouble, unreadable};
use super::rows::{self, records};

// Lives on: message_id; see `records`.
const RECORD: &str = records!("select seq from message where id = $1");

// Lives on: the primary key of delivery.
const DELIVERIES: &str = "\
select number, replica, started_at, duration, outcome, status, error_kind, error, answer
from delivery
where seq = $1
order by number desc";

// Lives on: message_id, then the primary keys of queue and content.
const PAYLOAD: &str = "\
select coalesce((select shared.body from shared where shared.id = content.shared), content.body)
from (select seq, queue_id from message where id = $1 limit 1) as message
join queue on queue.id = message.queue_id
cross join lateral (select body, shared from content where content.seq = message.seq limit 1) as content";

/// The rows that a page looks at: their numbers, from the newest before `$1`, at most `$2`.
macro_rules! looked_at {
    (all) => {
        "select seq from message where seq < $1 order by seq desc limit $2"
    };
    (correlated, $id:literal) => {
        concat!(
            "select content.seq from content where content.correlation_id = ",
            $id,
            " and content.seq < $1 order by content.correlation_id desc, content.seq desc limit $2"
        )
    };
    (group, $group:literal) => {
        concat!(
            "select message.seq from message where message.queue_id = (select id from queue where name = $3) ",
            "and message.grp = ",
            $group,
            " and message.seq < $1 order by message.queue_id desc, message.grp desc, message.seq desc limit $2"
        )
    };
    (queue) => {
        "select message.seq from message where message.queue_id = (select id from queue where name = $3) \
         and message.seq < $1 order by message.queue_id desc, message.seq desc limit $2"
    };
    (dead) => {
        "select seq from dead where seq < $1 order by seq desc limit $2"
    };
    (dead_of_queue) => {
        "select dead.seq from dead where dead.queue_id = (select id from queue where name = $3) \
         and dead.seq < $1 order by dead.queue_id desc, dead.seq desc limit $2"
    };
    (leased) => {
        "select seq from lease where seq < $1 order by seq desc limit $2"
    };
}

/// How far down a page looks.
macro_rules! edge {
    ($($which:tt)+) => {
        concat!(
            "select min(seq) as seq, count(*) as n from (",
            looked_at!($($which)+),
            ") as looked_at"
        )
    };
}

/// What a page finds. See `records`.
macro_rules! page {
    ($looked_at:expr) => {
        concat!(
            records!($looked_at),
            "\
where ($3::text is null or queue.name = $3)
    and (cardinality($4::uuid[]) = 0 or message.id = any($4))
    and ($5::text is null or content.kind = $5)
    and ($6::text is null or content.correlation_id = $6)
    and ($7::bigint is null or message.enqueued_at >= $7)
    and ($8::bigint is null or message.enqueued_at < $8)
    and ($9::smallint is null or stand.state = $9)
    and ($11::bigint is null or message.grp = $11)
order by found.seq desc
limit $10"
        )
    };
}

// Live on: content_correlation; message_grouped; the primary key of message; message_listed; the primary key of dead;
// dead_listed; the primary key of lease.
const EDGE_OF_CONVERSATION: &str = edge!(correlated, "$3");
const EDGE_OF_GROUP: &str = edge!(group, "$4");
const EDGE: &str = edge!(all);
const EDGE_OF_QUEUE: &str = edge!(queue);
const EDGE_OF_DEAD: &str = edge!(dead);
const EDGE_OF_DEAD_OF_QUEUE: &str = edge!(dead_of_queue);
const EDGE_OF_LEASED: &str = edge!(leased);

// Live on: the same, and what `records` says.
const PAGE_OF_CONVERSATION: &str = page!(looked_at!(correlated, "$6"));
const PAGE_OF_GROUP: &str = page!(looked_at!(group, "$11"));
const PAGE: &str = page!(looked_at!(all));
const PAGE_OF_QUEUE: &str = page!(looked_at!(queue));
const PAGE_OF_DEAD: &str = page!(looked_at!(dead));
const PAGE_OF_DEAD_OF_QUEUE: &str = page!(looked_at!(dead_of_queue));
const PAGE_OF_LEASED: &str = page!(looked_at!(leased));

// Lives on: message_id, and what `records` says.
const PAGE_OF_NAMED: &str = page!(
    "select named.seq from unnest($4::uuid[]) as given (id) cross join lateral (
    select seq from message where message.id = given.id and message.seq < $1 limit 1
) as named limit $2"
);

// Lives on: tally, read whole; it is folded to a few rows for each queue.
const COUNTS: &str = "\
select queue_id, state, sum(n)::bigint as n
from tally
group by queue_id, state";

// Lives on: queue_name_key, and the primary key of ready, one step for each priority that waits; and one row each of
// ready_in_turn and behind_since.
const OLDEST: &str = "\
select queue.id, queue.name, now_micros() - least(
    (
        with recursive first (rank, lane, due_at) as (
            (
                select ready.rank, ready.lane, ready.due_at
                from ready
                where ready.queue_id = queue.id
                order by ready.rank, ready.lane, ready.due_at
                limit 1
            )
            union all
            select next.rank, next.lane, next.due_at
            from first
            cross join lateral (
                select ready.rank, ready.lane, ready.due_at
                from ready
                where ready.queue_id = queue.id
                    and ready.rank > first.rank
                order by ready.rank, ready.lane, ready.due_at
                limit 1
            ) as next
        )
        select min(due_at)
        from first
    ),
    (
        select due_at
        from ready
        where ready.queue_id = queue.id
            and ready.lane <> 0
        order by ready.queue_id, ready.due_at
        limit 1
    ),
    (
        select due_at
        from behind
        where behind.queue_id = queue.id
        order by behind.queue_id, behind.due_at
        limit 1
    )
) as age
from queue
order by queue.name";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    RECORD,
    DELIVERIES,
    PAYLOAD,
    EDGE_OF_CONVERSATION,
    EDGE_OF_GROUP,
    EDGE,
    EDGE_OF_QUEUE,
    EDGE_OF_DEAD,
    EDGE_OF_DEAD_OF_QUEUE,
    EDGE_OF_LEASED,
    PAGE_OF_CONVERSATION,
    PAGE_OF_GROUP,
    PAGE,
    PAGE_OF_QUEUE,
    PAGE_OF_DEAD,
    PAGE_OF_DEAD_OF_QUEUE,
    PAGE_OF_LEASED,
    PAGE_OF_NAMED,
    COUNTS,
    OLDEST,
];

pub(super) async fn message(
    store: &Postgres,
    id: MessageId,
) -> Result<Option<(Record, Vec<DeliveryRecord>)>> {
    store.hands.run(move |connection| Box::pin(find(connection, id))).await
}

async fn find(
    connection: &mut PgConnection,
    id: MessageId,
) -> Result<Option<(Record, Vec<DeliveryRecord>)>, Trouble> {
    let row = query(RECORD).bind(id.0).fetch_optional(&mut *connection).await?;
    let Some(row) = row else { return Ok(None) };
    let seq: i64 = row.try_get("seq")?;
    let deliveries = query(DELIVERIES).bind(seq).fetch_all(connection).await?;
    // One that cannot be read does not hide the others.
    let deliveries = deliveries.iter().filter_map(|row| delivery(row).ok()).collect();
    Ok(Some((rows::record(&row)?, deliveries)))
}

pub(super) async fn payload(store: &Postgres, id: MessageId) -> Result<Option<Bytes>> {
    store
        .hands
        .run(move |connection| {
            Box::pin(async move {
                let row = query(PAYLOAD).bind(id.0).fetch_optional(connection).await?;
                let body = row.map(|row| row.try_get::<Vec<u8>, _>(0)).transpose()?;
                Ok(body.map(Bytes::from))
            })
        })
        .await
}

pub(super) async fn messages(store: &Postgres, filter: Filter, page: Page) -> Result<Listed> {
    store
        .hands
        .run(move |connection| {
            let filter = filter.clone();
            Box::pin(async move { list(connection, &filter, page).await })
        })
        .await
}

async fn list(
    connection: &mut PgConnection,
    filter: &Filter,
    page: Page,
) -> Result<Listed, Trouble> {
    let after = page.after.unwrap_or(i64::MAX);
    let (statement, edge) = statements_for(filter);
    // The edge first: what arrives between the two statements is newer than both.
    let edge = match edge {
        Some(edge) => look_down(connection, edge, filter, after).await?,
        None => Edge { last: None, more: false },
    };
    let named = filter.ids.len();
    let limit = page.limit.min(ROWS_LOOKED_AT_MAX as usize);
    let found = query(statement)
        .bind(after)
        .bind(ROWS_LOOKED_AT_MAX)
        .bind(filter.queue.as_ref().map(QueueName::as_str))
        .bind(filter.ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(filter.kind.as_deref())
        .bind(filter.correlation_id.as_deref())
        .bind(filter.since.map(rows::micros))
        .bind(filter.until.map(rows::micros))
        .bind(filter.state.map(State::code))
        .bind(limit as i64)
        .bind(filter.group_number())
        .fetch_all(connection)
        .await?;
    let items = rows::shown(&found);
    let last: Option<i64> = found.last().map(|row| row.try_get("seq")).transpose()?;
    let next = match last {
        Some(last) if found.len() >= limit => {
            let more = edge.more || named > limit || edge.last.is_some_and(|edge| edge < last);
            more.then_some(last)
        }
        _ if edge.more => edge.last,
        _ => None,
    };
    Ok(Listed { items, next })
}

/// Which rows to look at: the narrowest that there is an order for. Names need no edge: they are few.
fn statements_for(filter: &Filter) -> (&'static str, Option<&'static str>) {
    match (&filter.queue, filter.state) {
        _ if !filter.ids.is_empty() => (PAGE_OF_NAMED, None),
        _ if filter.correlation_id.is_some() => (PAGE_OF_CONVERSATION, Some(EDGE_OF_CONVERSATION)),
        (Some(_), _) if filter.group.is_some() => (PAGE_OF_GROUP, Some(EDGE_OF_GROUP)),
        (Some(_), Some(State::Dead)) => (PAGE_OF_DEAD_OF_QUEUE, Some(EDGE_OF_DEAD_OF_QUEUE)),
        (None, Some(State::Dead)) => (PAGE_OF_DEAD, Some(EDGE_OF_DEAD)),
        (_, Some(State::Leased)) => (PAGE_OF_LEASED, Some(EDGE_OF_LEASED)),
        (Some(_), _) => (PAGE_OF_QUEUE, Some(EDGE_OF_QUEUE)),
        (None, _) => (PAGE, Some(EDGE)),
    }
}

/// How far down a page looks, and whether there is more below.
#[derive(Debug)]
struct Edge {
    last: Option<i64>,
    more: bool,
}

async fn look_down(
    connection: &mut PgConnection,
    statement: &'static str,
    filter: &Filter,
    after: i64,
) -> sqlx::Result<Edge> {
    let mut look = query(statement).bind(after).bind(ROWS_LOOKED_AT_MAX);
    let queue = filter.queue.as_ref().map(QueueName::as_str);
    if statement == EDGE_OF_CONVERSATION {
        look = look.bind(filter.correlation_id.as_deref());
    } else if statement == EDGE_OF_GROUP {
        look = look.bind(queue).bind(filter.group_number());
    } else if statement == EDGE_OF_QUEUE || statement == EDGE_OF_DEAD_OF_QUEUE {
        look = look.bind(queue);
    }
    let row = look.fetch_one(connection).await?;
    Ok(Edge { last: row.try_get("seq")?, more: row.try_get::<i64, _>("n")? >= ROWS_LOOKED_AT_MAX })
}

pub(super) async fn depths(store: &Postgres) -> Result<Vec<Depth>> {
    store.hands.run(|connection| Box::pin(count(connection))).await
}

async fn count(connection: &mut PgConnection) -> Result<Vec<Depth>, Trouble> {
    let mut counts = HashMap::<(i32, i16), i64>::new();
    for row in query(COUNTS).fetch_all(&mut *connection).await? {
        counts.insert((row.try_get("queue_id")?, row.try_get("state")?), row.try_get("n")?);
    }
    let mut depths = Vec::new();
    for row in query(OLDEST).fetch_all(connection).await? {
        // A queue without a name that can be said is left out here, as in the list of queues.
        let Ok(queue) = rows::queue_name(row.try_get("name")?) else { continue };
        let id: i32 = row.try_get("id")?;
        let count = |code: i16| {
            let n = counts.get(&(id, code)).copied().unwrap_or(0);
            u64::try_from(n).unwrap_or(0)
        };
        let age: Option<i64> = row.try_get("age")?;
        let behind = count(BEHIND);
        let ready = count(State::Ready.code()) + behind;
        depths.push(Depth {
            queue,
            ready,
            behind,
            scheduled: count(State::Scheduled.code()),
            leased: count(State::Leased.code()),
            dead: count(State::Dead.code()),
            // A token may be left where there is no message.
            oldest_ready: age.filter(|_| ready > 0).map(rows::elapsed),
        });
    }
    Ok(depths)
}

fn delivery(row: &PgRow) -> sqlx::Result<DeliveryRecord> {
    let replica: &str = row.try_get("replica")?;
    let outcome: &str = row.try_get("outcome")?;
    let status: Option<i32> = row.try_get("status")?;
    let error_kind: Option<&str> = row.try_get("error_kind")?;
    let error_kind = error_kind.map(ErrorKind::parse).transpose();
    Ok(DeliveryRecord {
        number: rows::count(row, "number")?,
        replica: ReplicaName::parse(replica)
            .map_err(|_| unreadable("a replica's name is no name"))?,
        started_at: rows::moment(row.try_get("started_at")?)?,
        duration: rows::elapsed(row.try_get("duration")?),
        outcome: Outcome::from_text(outcome).ok_or_else(|| unreadable("an outcome is unknown"))?,
        status: status.and_then(|status| u16::try_from(status).ok()),
        error_kind: error_kind.map_err(|_| unreadable("an error kind is unknown"))?,
        error: row.try_get("error")?,
        answer: Bytes::from(row.try_get::<Vec<u8>, _>("answer")?),
    })
}
