//! Looking at messages; changes nothing.
//!
//! Every statement walks an index from where the page begins, and at most [`ROWS_LOOKED_AT_MAX`] rows
//! far, so that a rare match does not become a scan.

use bytes::Bytes;
use sqlx::sqlite::SqliteRow;
use sqlx::{Connection, Row, SqliteConnection, SqliteExecutor, query, query_scalar};

use crate::model::{
    DeliveryRecord, ErrorKind, MessageId, Outcome, QueueName, Record, ReplicaName, State,
};

use super::super::{Depth, Filter, Listed, Page, ROWS_LOOKED_AT_MAX};
use super::fault::unreadable;
use super::rows::{self, Statement};

// Lives on: message_id, then the primary keys of queue and content.
const MESSAGE: &str = "\
select message.*, queue.name as queue, content.kind, content.correlation_id, content.details
from message
cross join queue on queue.id = message.queue_id
left join content on content.seq = message.seq
where message.id = ?";

// Lives on: the primary key of delivery, from its end.
const DELIVERIES: &str = "\
select *
from delivery
where seq = ?
order by number desc";

// Lives on: message_id, then the primary keys of queue and content.
const PAYLOAD: &str = "\
select coalesce((select shared.body from shared where shared.id = content.shared), content.body)
from message
cross join queue on queue.id = message.queue_id
cross join content on content.seq = message.seq
where message.id = ?";

/// A message with its deliveries, the latest first, both at one moment.
pub(super) async fn message(
    reader: &mut SqliteConnection,
    id: MessageId,
) -> sqlx::Result<Option<(Record, Vec<DeliveryRecord>)>> {
    let mut moment = reader.begin().await?;
    let Some((seq, record)) = record(&mut *moment, id).await? else { return Ok(None) };
    let deliveries = query(DELIVERIES).bind(seq).fetch_all(&mut *moment).await?;
    moment.commit().await?;
    // One that cannot be read does not hide the others.
    Ok(Some((record, deliveries.iter().filter_map(|row| delivery(row).ok()).collect())))
}

/// A message with its number.
pub(super) async fn record(
    reader: impl SqliteExecutor<'_>,
    id: MessageId,
) -> sqlx::Result<Option<(i64, Record)>> {
    let found = query(MESSAGE).bind(id.0.as_bytes().to_vec());
    let Some(row) = found.fetch_optional(reader).await? else { return Ok(None) };
    Ok(Some((row.try_get("seq")?, rows::record(&row)?)))
}

/// A message's payload.
pub(super) async fn payload(
    reader: impl SqliteExecutor<'_>,
    id: MessageId,
) -> sqlx::Result<Option<Bytes>> {
    let body = query_scalar::<_, Vec<u8>>(PAYLOAD).bind(id.0.as_bytes().to_vec());
    Ok(body.fetch_optional(reader).await?.map(Bytes::from))
}

fn delivery(row: &SqliteRow) -> sqlx::Result<DeliveryRecord> {
    let replica = ReplicaName::parse(row.try_get("replica")?);
    let outcome = Outcome::from_text(row.try_get("outcome")?);
    let error_kind: Option<&str> = row.try_get("error_kind")?;
    let error_kind = error_kind.map(ErrorKind::parse).transpose();
    Ok(DeliveryRecord {
        number: row.try_get("number")?,
        replica: replica.map_err(|_| unreadable("a replica's name is no name"))?,
        started_at: rows::moment(row.try_get("started_at")?)?,
        duration: rows::since(0, row.try_get("duration")?),
        outcome: outcome.ok_or_else(|| unreadable("an outcome is unknown"))?,
        status: row.try_get("status")?,
        error_kind: error_kind.map_err(|_| unreadable("an error kind is unknown"))?,
        error: row.try_get("error")?,
        answer: Bytes::from(row.try_get::<Vec<u8>, _>("answer")?),
    })
}

/// A way through the messages: which rows it meets, and the statements that go it.
struct Way {
    /// Where the rows end that a page looks at.
    floor: &'static str,
    /// The page: what matches, newest first.
    page: &'static str,
}

// The parameters: 1 before, 2 floor, 3 queue, 4 state, 5 kind, 6 correlation id, 7 since, 8 until,
// 9 limit, 10 ids, 11 group.
macro_rules! way {
    ($from:literal, $join:literal, $which:literal, $seq:literal) => {
        Way {
            floor: concat!(
                "select ",
                $seq,
                "\nfrom ",
                $from,
                "\nwhere ",
                $which,
                "\n    and ",
                $seq,
                " < ?1\norder by ",
                $seq,
                " desc\nlimit 1 offset ?2"
            ),
            page: concat!(
                record_of!($from, $join, $which),
                "\n    and ",
                $seq,
                " < ?1\n    and ",
                $seq,
                " >= ?2\norder by ",
                $seq,
                " desc\nlimit ?9"
            ),
        }
    };
}

macro_rules! record_of {
    ($from:literal, $join:literal, $which:literal) => {
        concat!(
            "\
select message.*, queue.name as queue, content.kind, content.correlation_id, content.details
from ",
            $from,
            "\n",
            $join,
            "\ncross join queue on queue.id = message.queue_id\nwhere ",
            $which,
            filtered!()
        )
    };
}

macro_rules! filtered {
    () => {
        "
    and (?3 is null or message.queue_id = (select id from queue where name = ?3))
    and (?4 is null or message.state = ?4)
    and (?5 is null or content.kind = ?5)
    and (?6 is null or content.correlation_id = ?6)
    and (?7 is null or message.enqueued_at >= ?7)
    and (?8 is null or message.enqueued_at < ?8)
    and (?11 is null or message.grp = ?11)"
    };
}

// Lives on: the primary key of message, downwards.
const ALL: Way = way!(
    "message not indexed",
    "left join content on content.seq = message.seq",
    "true",
    "message.seq"
);

// Lives on: message_listed, downwards.
const OF_QUEUE: Way = way!(
    "message indexed by message_listed",
    "left join content on content.seq = message.seq",
    "message.queue_id = (select id from queue where name = ?3)",
    "message.seq"
);

// Lives on: message_grouped, downwards.
const OF_GROUP: Way = way!(
    "message indexed by message_grouped",
    "left join content on content.seq = message.seq",
    "message.queue_id = (select id from queue where name = ?3) and message.grp = ?11",
    "message.seq"
);

// Lives on: message_dead_all, downwards.
const DEAD: Way = way!(
    "message indexed by message_dead_all",
    "left join content on content.seq = message.seq",
    "message.state = 5",
    "message.seq"
);

// Lives on: message_dead, downwards.
const DEAD_OF_QUEUE: Way = way!(
    "message indexed by message_dead",
    "left join content on content.seq = message.seq",
    "message.queue_id = (select id from queue where name = ?3) and message.state = 5",
    "message.seq"
);

// Lives on: content_correlation, downwards, then the primary key of message.
const CORRELATED: Way = way!(
    "content indexed by content_correlation",
    "cross join message on message.seq = content.seq",
    "content.correlation_id = ?6",
    "content.seq"
);

// Lives on: message_id, then sorts: a list of ids is as long as a request can be.
const NAMED: &str = concat!(
    record_of!(
        "json_each(?10) as wanted\ncross join message on message.id = unhex(wanted.value)",
        "left join content on content.seq = message.seq",
        "message.seq < ?1"
    ),
    "\norder by message.seq desc\nlimit ?9"
);

/// Messages that match, newest first.
pub(super) async fn messages(
    reader: &mut SqliteConnection,
    filter: &Filter,
    page: Page,
) -> sqlx::Result<Listed> {
    let before = page.after.unwrap_or(i64::MAX);
    let (text, floor) = match way(filter) {
        None => (NAMED, None),
        Some(way) => (way.page, floor(reader, way, filter, before).await?),
    };
    // One more than asked for, to know whether another page follows.
    let limit = i64::try_from(page.limit).unwrap_or(i64::MAX).saturating_add(1);
    let mut statement = query(text).bind(before).bind(floor.unwrap_or(0));
    statement = bind_filter(statement, filter).bind(limit).bind(names(filter));
    statement = statement.bind(filter.group_number());
    let mut found = statement.fetch_all(reader).await?;
    let more = found.len() > page.limit;
    found.truncate(page.limit);
    let next = if more { found.last().map(|row| row.try_get("seq")).transpose()? } else { floor };
    Ok(Listed { items: rows::shown(&found), next })
}

/// The way that meets the fewest rows which do not match; `None` for messages that are named.
fn way(filter: &Filter) -> Option<&'static Way> {
    if !filter.ids.is_empty() {
        return None;
    }
    let dead = filter.state == Some(State::Dead);
    Some(match (&filter.correlation_id, &filter.queue) {
        (Some(_), _) => &CORRELATED,
        (None, Some(_)) if filter.group.is_some() => &OF_GROUP,
        (None, Some(_)) if dead => &DEAD_OF_QUEUE,
        (None, Some(_)) => &OF_QUEUE,
        (None, None) if dead => &DEAD,
        (None, None) => &ALL,
    })
}

/// The last row that a page looks at, where there are more rows than it does.
async fn floor(
    reader: &mut SqliteConnection,
    way: &Way,
    filter: &Filter,
    before: i64,
) -> sqlx::Result<Option<i64>> {
    let floor = query_scalar(way.floor)
        .bind(before)
        .bind(ROWS_LOOKED_AT_MAX - 1)
        .bind(filter.queue.as_ref().map(|queue| queue.as_str().to_owned()))
        .bind(None::<i64>)
        .bind(None::<String>)
        .bind(filter.correlation_id.clone())
        .bind(None::<i64>)
        .bind(None::<i64>)
        .bind(None::<i64>)
        .bind(None::<String>)
        .bind(filter.group_number());
    floor.fetch_optional(reader).await
}

fn bind_filter(statement: Statement, filter: &Filter) -> Statement {
    statement
        .bind(filter.queue.as_ref().map(|queue| queue.as_str().to_owned()))
        .bind(filter.state.map(State::code))
        .bind(filter.kind.clone())
        .bind(filter.correlation_id.clone())
        .bind(filter.since.map(rows::micros))
        .bind(filter.until.map(rows::micros))
}

fn names(filter: &Filter) -> String {
    let names = filter.ids.iter().map(|id| rows::hex(id.0.as_bytes()));
    rows::json(&names.collect::<Vec<_>>())
}

macro_rules! oldest_dead {
    ($from:literal, $which:literal) => {
        concat!(
            "select message.seq\nfrom ",
            $from,
            "\nleft join content on content.seq = message.seq",
            "\ncross join queue on queue.id = message.queue_id\nwhere ",
            $which,
            filtered!(),
            "\n    and message.state = 5\norder by message.seq\nlimit ?9"
        )
    };
}

// Lives on: message_dead_all, upwards.
const OLDEST_DEAD: &str =
    oldest_dead!("message indexed by message_dead_all", "message.state = 5 and message.seq > 0");

// Lives on: message_dead, upwards.
const OLDEST_DEAD_OF_QUEUE: &str = oldest_dead!(
    "message indexed by message_dead",
    "message.queue_id = (select id from queue where name = ?3)"
);

// Lives on: message_id, then sorts: a list of ids is as long as a request can be.
const OLDEST_DEAD_NAMED: &str = oldest_dead!(
    "json_each(?10) as wanted
cross join message on message.id = unhex(wanted.value)",
    "true"
);

/// The numbers of dead letters that match, oldest first.
pub(super) async fn oldest_dead(
    reader: impl SqliteExecutor<'_>,
    filter: &Filter,
    max: usize,
) -> sqlx::Result<Vec<i64>> {
    let text = match (&filter.queue, filter.ids.is_empty()) {
        (_, false) => OLDEST_DEAD_NAMED,
        (Some(_), true) => OLDEST_DEAD_OF_QUEUE,
        (None, true) => OLDEST_DEAD,
    };
    let filter = Filter { state: Some(State::Dead), ..filter.clone() };
    let statement = bind_filter(query(text).bind(None::<i64>).bind(None::<i64>), &filter);
    let max = i64::try_from(max).unwrap_or(i64::MAX);
    let statement = statement.bind(max).bind(names(&filter)).bind(filter.group_number());
    let found = statement.fetch_all(reader).await?;
    found.iter().map(|row| row.try_get("seq")).collect()
}

// Lives on: queue, read whole, the primary key of tally, and message_ready, of which it reads two rows
// for each priority in use, because the order of lease goes by priority first; and one row each of message_in_turn
// and message_behind_since.
const DEPTHS: &str = "\
with recursive ranks (queue_id, rank) as (
    select queue.id, (
        select min(message.rank)
        from message indexed by message_ready
        where message.queue_id = queue.id and message.state = 0 and message.behind = 0
    )
    from queue
    union all
    select ranks.queue_id, (
        select min(message.rank)
        from message indexed by message_ready
        where message.queue_id = ranks.queue_id and message.state = 0 and message.behind = 0
            and message.rank > ranks.rank
    )
    from ranks
    where ranks.rank is not null
),
oldest (queue_id, due_at) as (
    select ranks.queue_id, min((
        select min(message.due_at)
        from message indexed by message_ready
        where message.queue_id = ranks.queue_id and message.state = 0 and message.behind = 0
            and message.rank = ranks.rank and message.lane = 0
    ))
    from ranks
    where ranks.rank is not null
    group by ranks.queue_id
)
select queue.name, oldest.due_at, (
        select min(message.due_at)
        from message indexed by message_in_turn
        where message.queue_id = queue.id and message.state = 0 and message.behind = 0
            and message.lane <> 0
    ) as in_turn, (
        select min(message.due_at)
        from message indexed by message_behind_since
        where message.queue_id = queue.id and message.behind = 1
    ) as behind_since,
    (select n from tally where queue_id = queue.id and state = 8) as behind,
    (select n from tally where queue_id = queue.id and state = 0) as ready,
    (select n from tally where queue_id = queue.id and state = 1) as scheduled,
    (select n from tally where queue_id = queue.id and state = 2) as leased,
    (select n from tally where queue_id = queue.id and state = 5) as dead
from queue
left join oldest on oldest.queue_id = queue.id
order by queue.name";

/// How many messages of each queue are in each state.
pub(super) async fn depths(reader: impl SqliteExecutor<'_>, now: i64) -> sqlx::Result<Vec<Depth>> {
    let mut depths = Vec::new();
    for row in query(DEPTHS).fetch_all(reader).await? {
        // A queue without a name that can be said is left out here, as in the list of queues.
        if let Ok(queue) = rows::queue_name(row.try_get("name")?) {
            depths.push(depth(&row, queue, now)?);
        }
    }
    Ok(depths)
}

fn depth(row: &SqliteRow, queue: QueueName, now: i64) -> sqlx::Result<Depth> {
    let count = |column| -> sqlx::Result<u64> {
        let n: Option<i64> = row.try_get(column)?;
        Ok(u64::try_from(n.unwrap_or(0)).unwrap_or(0))
    };
    let oldest = ["due_at", "in_turn", "behind_since"].map(|column| row.try_get(column));
    let oldest = oldest.into_iter().collect::<sqlx::Result<Vec<Option<i64>>>>()?;
    let oldest = oldest.into_iter().flatten().min();
    let behind = count("behind")?;
    Ok(Depth {
        queue,
        ready: count("ready")? + behind,
        behind,
        scheduled: count("scheduled")?,
        leased: count("leased")?,
        dead: count("dead")?,
        oldest_ready: oldest.map(|due_at| rows::since(due_at, now)),
    })
}

/// The statements of this file.
pub(super) fn statements() -> impl Iterator<Item = &'static str> {
    let ways = [ALL, OF_QUEUE, OF_GROUP, DEAD, DEAD_OF_QUEUE, CORRELATED];
    let ways = ways.into_iter().flat_map(|way| [way.floor, way.page]);
    ways.chain([MESSAGE, DELIVERIES, PAYLOAD, NAMED, DEPTHS]).chain([
        OLDEST_DEAD,
        OLDEST_DEAD_OF_QUEUE,
        OLDEST_DEAD_NAMED,
    ])
}
