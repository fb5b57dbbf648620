//! Claiming messages, and keeping the claim.
//!
//! A claim is read as one row, whatever it takes: a row is a word between two threads, and a word for each
//! message costs more than the message. What the rows hold is laid end to end, with the lengths beside it.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Deserialize;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, SqliteExecutor, query};

use crate::model::{self, Head, Lease, Leased, Message, State, Ticket, Token, Tries};

use super::super::{CLAIM_BYTES_MAX, Claim};
use super::desk::{Desk, Held, Queue};
use super::fault::unreadable;
use super::rows;

/// The start of a process in whose name leases are that outlive this process.
pub(super) const OF_NOBODY_HERE: i64 = 0;

/// Claims in the order of lease. `asked` is the monotonic time at which the caller asked.
pub(super) async fn lease(
    desk: &mut Desk,
    queue: &Queue,
    claim: &Claim,
    asked: Instant,
) -> sqlx::Result<Vec<Leased>> {
    let mut leased = Vec::new();
    let (max, incarnation) = match claim.out_max {
        None => (claim.max, desk.incarnation),
        Some(most) => {
            let out = usize::try_from(desk.count(queue.id, State::Leased)).unwrap_or(0);
            (claim.max.min((most as usize).saturating_sub(out)), OF_NOBODY_HERE)
        }
    };
    // Goes round again only where it met something unreadable, which then is no longer ready.
    while leased.len() < max {
        let picked = pick(desk, queue, claim.urgent_only, max - leased.len()).await?;
        let taken =
            take(desk, queue, (claim, incarnation), &picked, asked + claim.duration).await?;
        mark_unreadable(desk, queue, &taken.unreadable).await?;
        leased.extend(taken.good);
        if taken.unreadable.is_empty() {
            break;
        }
    }
    Ok(leased)
}

/// What a claim reads of message, as it stands in the list that [`READY`] makes.
macro_rules! pick {
    ($ready:literal, $order:literal, $fair:literal) => {
        concat!(
            "\
select case when fair then '[]' else (
    select json_group_array(json_array(
        seq, hex(id), rank, due_at, attempts, failures, crashes, enqueued_at, expires_at, size, grp, lane
    ))
    from (
        select *
        from message ",
            $ready,
            "
            and message.state = 0
            and message.behind = 0
            and (message.expires_at is null or message.expires_at > ?2)
        ",
            $order,
            "
        limit ?3
    )
) end, fair
from (select ",
            $fair,
            " as fair)"
        )
    };
}

// Lives on: message_ready, from its front, and one row of message_in_turn. What has expired is passed over; the sweep
// takes it out of the way. Where messages are ready that take turns, it says only that.
const READY: &str = pick!(
    "\
indexed by message_ready
    where message.queue_id = ?1",
    "order by message.rank, message.lane, message.due_at, message.seq",
    "\
exists (
    select 1
    from message indexed by message_in_turn
    where message.queue_id = ?1
        and message.state = 0
        and message.behind = 0
        and message.lane <> 0
)"
);

// Lives on: message_ready, one row for each lane. The highest priority that is ready, and of its lanes at most ?3:
// those after ?4, and then those before it.
const LANES: &str = "\
with recursive front (rank) as (
    select rank
    from message indexed by message_ready
    where queue_id = ?1
        and state = 0
        and behind = 0
        and (expires_at is null or expires_at > ?2)
    order by message.rank
    limit 1
),
lanes (lane, n) as (
    select ?4, 0
    union all
    select (
        select min(message.lane)
        from message indexed by message_ready
        where message.queue_id = ?1
            and message.rank = (select rank from front)
            and message.lane > lanes.lane
            and message.state = 0
            and message.behind = 0
            and (message.expires_at is null or message.expires_at > ?2)
    ), lanes.n + 1
    from lanes
    where lanes.lane is not null and lanes.n <= ?3
),
wrapped (lane, n) as (
    select -1, 0
    union all
    select (
        select min(message.lane)
        from message indexed by message_ready
        where message.queue_id = ?1
            and message.rank = (select rank from front)
            and message.lane > wrapped.lane
            and message.lane <= ?4
            and message.state = 0
            and message.behind = 0
            and (message.expires_at is null or message.expires_at > ?2)
    ), wrapped.n + 1
    from wrapped
    where wrapped.lane is not null and wrapped.n <= ?3
)
select (select rank from front), json_group_array(lane)
from (
    select lane from lanes where n > 0 and lane is not null
    union all
    select lane from wrapped where n > 0 and lane is not null
    limit ?3
)";

// Lives on: message_ready, from the front of each of the lanes ?5 of the priority ?4: at most ?6 of each.
const IN_TURN: &str = "\
select json_group_array(json_array(
    seq, hex(id), rank, due_at, attempts, failures, crashes, enqueued_at, expires_at, size, grp, lane
))
from (
    select message.*, turns.key as turn,
        row_number() over (partition by turns.key order by message.due_at, message.seq) as round
    from json_each(?5) as turns
    cross join message on message.seq in (
        select first.seq
        from message as first indexed by message_ready
        where first.queue_id = ?1
            and first.rank = ?4
            and first.lane = turns.value
            and first.state = 0
            and first.behind = 0
            and (first.expires_at is null or first.expires_at > ?2)
        order by first.due_at, first.seq
        limit ?6
    )
    order by round, turn
    limit ?3
)";

// Lives on: message_urgent, from its front.
const URGENT: &str = pick!(
    "\
indexed by message_urgent
    where message.queue_id = ?1
        and message.urgent = 1",
    "order by message.rank, message.due_at, message.seq",
    "false"
);

/// A message that is ready, as [`READY`] lists it.
#[derive(Debug, Deserialize)]
struct Picked {
    seq: i64,
    id: String,
    rank: i64,
    due_at: i64,
    attempts: i64,
    failures: i64,
    crashes: i64,
    enqueued_at: i64,
    expires_at: Option<i64>,
    size: i64,
    grp: Option<i64>,
    lane: i64,
}

/// The first that are ready, as many as may be read at once: always one, and then as far as their payloads
/// stay within [`CLAIM_BYTES_MAX`].
async fn pick(
    desk: &mut Desk,
    queue: &Queue,
    urgent_only: bool,
    max: usize,
) -> sqlx::Result<Vec<Picked>> {
    let text = if urgent_only { URGENT } else { READY };
    let max = i64::try_from(max).unwrap_or(i64::MAX);
    let ready = query(text).bind(queue.id).bind(desk.now).bind(max);
    let ready = ready.fetch_one(&mut desk.connection).await?;
    let mut picked = list_of(ready.try_get(0)?)?;
    let fair = ready.try_get(1)?;
    if fair {
        picked = pick_in_turn(desk, queue, max).await?;
    }
    let mut bytes = 0;
    let fits = |message: &&Picked| {
        bytes += usize::try_from(message.size).unwrap_or(0);
        bytes <= CLAIM_BYTES_MAX
    };
    let fitting = picked.iter().take_while(fits).count();
    picked.truncate(fitting.max(1));
    if fair && let Some(last) = picked.last() {
        desk.last_lanes.insert(queue.id, last.lane);
    }
    Ok(picked)
}

/// Of the highest priority, round the lanes, on from where the last claim ended.
async fn pick_in_turn(desk: &mut Desk, queue: &Queue, max: i64) -> sqlx::Result<Vec<Picked>> {
    let last = desk.last_lanes.get(&queue.id).copied().unwrap_or(0);
    let lanes = query(LANES).bind(queue.id).bind(desk.now).bind(max).bind(last);
    let lanes = lanes.fetch_one(&mut desk.connection).await?;
    let (rank, lanes): (Option<i64>, String) = (lanes.try_get(0)?, lanes.try_get(1)?);
    let count = serde_json::from_str::<Vec<i64>>(&lanes).map_or(0, |lanes| lanes.len());
    let each = usize::try_from(max).unwrap_or(usize::MAX).div_ceil(count.max(1));
    let picked = query(IN_TURN)
        .bind(queue.id)
        .bind(desk.now)
        .bind(max)
        .bind(rank)
        .bind(lanes)
        .bind(i64::try_from(each).unwrap_or(i64::MAX))
        .fetch_one(&mut desk.connection)
        .await?;
    list_of(picked.try_get(0)?)
}

fn list_of(picked: &str) -> sqlx::Result<Vec<Picked>> {
    serde_json::from_str(picked).map_err(|_| unreadable("what is ready is not what was listed"))
}

/// Lives on: the primary key of message. Leaves message_ready and message_urgent for message_leased.
macro_rules! mark_leased {
    () => {
        "\
update message
set state = 2, urgent = 0, attempts = min(attempts + 1, 4294967295), token = ?2 + seq, leased_at = ?3, lease_until = ?4,
    incarnation = ?5, replica = ?6
where seq in (select value from json_each(?1))"
    };
}

/// Lives on: the primary keys of content and shared.
macro_rules! contents {
    () => {
        "\
select
    json_group_array(json_array(
        content.seq, octet_length(kind), octet_length(correlation_id), octet_length(details),
        coalesce((select octet_length(shared.body) from shared where shared.id = content.shared), octet_length(body))
    )) as lengths,
    cast(group_concat(kind, '') as blob) as kinds,
    cast(group_concat(correlation_id, '') as blob) as correlation_ids,
    cast(group_concat(details, '') as blob) as details,
    cast(group_concat(
        coalesce((select shared.body from shared where shared.id = content.shared), body), ''
    ) as blob) as bodies
from json_each(?1) as wanted
cross join content on content.seq = wanted.value"
    };
}

// Lives on: see `mark_leased` and `contents`, which are executed together.
const TAKE: &str = concat!(mark_leased!(), ";\n", contents!());
const MARK_LEASED: &str = mark_leased!();
const CONTENTS: &str = contents!();

/// What a claim took.
#[derive(Debug, Default)]
struct Taken {
    good: Vec<Leased>,
    /// What was marked as leased, and cannot be read: its number, and why.
    unreadable: Vec<(i64, String)>,
}

/// Marks them as leased, and reads their contents.
async fn take(
    desk: &mut Desk,
    queue: &Queue,
    (claim, incarnation): (&Claim, i64),
    picked: &[Picked],
    until: Instant,
) -> sqlx::Result<Taken> {
    let mut taken = Taken::default();
    if picked.is_empty() {
        return Ok(taken);
    }
    let chance = desk.chance()?;
    let lease_until = rows::after(desk.now, claim.duration);
    let row = query(TAKE)
        .bind(rows::list(picked.iter().map(|message| message.seq)))
        .bind(chance)
        .bind(desk.now)
        .bind(lease_until)
        .bind(incarnation)
        .bind(claim.replica.as_str().to_owned())
        .fetch_one(&mut desk.connection)
        .await?;
    let mut contents = Contents::read(&row)?;
    for message in picked {
        desk.moved(queue.id, State::Ready, State::Leased);
        let token = Token(chance + message.seq);
        match leased(message, contents.next(message.seq), queue, token, desk.now, until) {
            Ok(leased) => {
                let held = Held {
                    id: leased.lease.id,
                    queue_id: queue.id,
                    token,
                    enqueued_at: message.enqueued_at,
                    due_at: message.due_at,
                    until: lease_until,
                    group: message.grp,
                };
                desk.leases.insert(message.seq, held);
                taken.good.push(leased);
            }
            Err(error) => taken.unreadable.push((message.seq, error.to_string())),
        }
    }
    Ok(taken)
}

fn leased(
    picked: &Picked,
    content: sqlx::Result<Content>,
    queue: &Queue,
    token: Token,
    now: i64,
    until: Instant,
) -> sqlx::Result<Leased> {
    let id = rows::message_id_of_hex(&picked.id)?;
    let content = content?;
    let details = serde_json::from_slice(&content.details);
    let details = details.map_err(|_| unreadable("the details are not what was written"))?;
    let before = rows::tries_of(picked.attempts, picked.failures, picked.crashes)?;
    let head = Head {
        id,
        queue: queue.name.clone(),
        kind: content.kind.map(text).transpose()?,
        correlation_id: content.correlation_id.map(text).transpose()?,
        details,
        priority: rows::priority(picked.rank)?,
        enqueued_at: rows::moment(picked.enqueued_at)?,
        expires_at: rows::maybe_moment(picked.expires_at)?,
    };
    Ok(Leased {
        lease: Lease { seq: picked.seq, id, token, until },
        message: Message { head, body: content.body },
        // Counted here and not when it is settled, so that a crash in between counts too.
        tries: Tries { attempts: before.attempts.saturating_add(1), ..before },
        due_at: rows::moment(picked.due_at)?,
        leased_at: rows::moment(now)?,
    })
}

fn text(bytes: Bytes) -> sqlx::Result<String> {
    String::from_utf8(bytes.into()).map_err(|_| unreadable("a text is no UTF-8"))
}

/// The contents of several messages, as [`TAKE`] reads them: what is alike, end to end.
struct Contents {
    lengths: std::iter::Peekable<std::vec::IntoIter<Lengths>>,
    kinds: Bytes,
    correlation_ids: Bytes,
    details: Bytes,
    bodies: Bytes,
}

/// How long the parts of a content are.
#[derive(Debug, Deserialize)]
struct Lengths {
    seq: i64,
    kind: Option<usize>,
    correlation_id: Option<usize>,
    details: usize,
    body: usize,
}

/// One message's content, cut out of what was read.
struct Content {
    kind: Option<Bytes>,
    correlation_id: Option<Bytes>,
    details: Bytes,
    body: Bytes,
}

impl Contents {
    fn read(row: &SqliteRow) -> sqlx::Result<Self> {
        let bytes = |column| -> sqlx::Result<Bytes> {
            Ok(row.try_get::<Option<Vec<u8>>, _>(column)?.unwrap_or_default().into())
        };
        let lengths = serde_json::from_str::<Vec<Lengths>>(row.try_get("lengths")?)
            .map_err(|_| unreadable("the contents are not what was listed"))?;
        Ok(Self {
            lengths: lengths.into_iter().peekable(),
            kinds: bytes("kinds")?,
            correlation_ids: bytes("correlation_ids")?,
            details: bytes("details")?,
            bodies: bytes("bodies")?,
        })
    }

    /// The content of this message; they are asked for in the order in which they were listed.
    fn next(&mut self, seq: i64) -> sqlx::Result<Content> {
        let lengths = self.lengths.next_if(|lengths| lengths.seq == seq);
        let lengths = lengths.ok_or_else(|| unreadable("its content is gone"))?;
        Ok(Content {
            kind: lengths.kind.map(|length| cut(&mut self.kinds, length)).transpose()?,
            correlation_id: lengths
                .correlation_id
                .map(|length| cut(&mut self.correlation_ids, length))
                .transpose()?,
            details: cut(&mut self.details, lengths.details)?,
            body: cut(&mut self.bodies, lengths.body)?,
        })
    }
}

/// A copy, so that one message that is handled slowly does not keep the bytes of all others.
fn cut(from: &mut Bytes, length: usize) -> sqlx::Result<Bytes> {
    if length > from.len() {
        return Err(unreadable("the contents are shorter than what was listed"));
    }
    Ok(Bytes::copy_from_slice(&from.split_to(length)))
}

// Lives on: the primary key of message. Leaves message_leased for message_dead. The attempt was none.
const MARK_UNREADABLE: &str = "\
update message
set state = 5, attempts = attempts - 1, finished_at = ?2, reason = broken.value ->> 1
from json_each(?1) as broken
where message.seq = broken.value ->> 0";

async fn mark_unreadable(
    desk: &mut Desk,
    queue: &Queue,
    unreadable: &[(i64, String)],
) -> sqlx::Result<()> {
    if unreadable.is_empty() {
        return Ok(());
    }
    let reason = |why: &String| format!("the stored message cannot be read: {why}");
    let broken = unreadable.iter().map(|(seq, why)| (*seq, reason(why)));
    let broken = rows::json(&broken.collect::<Vec<_>>());
    query(MARK_UNREADABLE).bind(broken).bind(desk.now).execute(&mut desk.connection).await?;
    for (seq, why) in unreadable {
        tracing::error!(queue = %queue.name, seq, why, "set aside a message that cannot be read");
        desk.moved(queue.id, State::Leased, State::Dead);
        desk.groups.ended(Some(queue), *seq, State::Dead);
        desk.word.unreadable.push(queue.name.clone());
    }
    Ok(())
}

// Lives on: the primary keys of message, queue and content.
const HELD: &str = "\
select message.seq, message.id, message.token, message.rank, message.attempts, message.failures,
    message.crashes, message.enqueued_at, message.expires_at, message.leased_at, queue.name as queue,
    content.kind, content.correlation_id, content.details
from json_each(?1) as wanted
cross join message on message.seq = wanted.value
cross join queue on queue.id = message.queue_id
cross join content on content.seq = message.seq
where message.state = 2
    and message.lease_until > ?2";

/// What is known of these leases, in order; `None` for those that are lost.
pub(super) async fn held(
    reader: impl SqliteExecutor<'_>,
    tickets: &[Ticket],
    now: i64,
) -> sqlx::Result<Vec<Option<model::Held>>> {
    let seqs = rows::list(tickets.iter().map(|ticket| ticket.seq));
    let mut found = HashMap::new();
    for row in query(HELD).bind(seqs).bind(now).fetch_all(reader).await? {
        let ticket = Ticket { seq: row.try_get("seq")?, token: Token(row.try_get("token")?) };
        let details = serde_json::from_str(row.try_get("details")?);
        let head = Head {
            id: rows::message_id(&row)?,
            queue: rows::queue_name(row.try_get("queue")?)?,
            kind: row.try_get("kind")?,
            correlation_id: row.try_get("correlation_id")?,
            details: details.map_err(|_| unreadable("the details are not what was written"))?,
            priority: rows::priority(row.try_get("rank")?)?,
            enqueued_at: rows::moment(row.try_get("enqueued_at")?)?,
            expires_at: rows::maybe_moment(row.try_get("expires_at")?)?,
        };
        let tries = rows::tries_of(
            row.try_get("attempts")?,
            row.try_get("failures")?,
            row.try_get("crashes")?,
        )?;
        let leased_at = rows::moment(row.try_get("leased_at")?)?;
        let now = rows::moment(now)?;
        found.insert(ticket, model::Held { head, tries, leased_at, now });
    }
    Ok(tickets.iter().map(|ticket| found.get(ticket).cloned()).collect())
}

// Lives on: the primary keys of message and queue. Moves within message_leased. A lease that has run out, or is
// somebody else's, stays as it is.
const RENEW: &str = "\
update message
set lease_until = ?2
from json_each(?1) as held
where message.seq = held.value ->> 0
    and message.token = held.value ->> 1
    and message.id = unhex(held.value ->> 2)
    and message.state = 2
    and message.lease_until > ?3
    and message.queue_id in (select id from queue)
returning seq, token, id";

/// Prolongs what is still held; in order, whether it was.
pub(super) async fn renew(
    desk: &mut Desk,
    leases: &[Lease],
    duration: Duration,
) -> sqlx::Result<Vec<bool>> {
    for lease in leases {
        desk.leases.remove(&lease.seq);
    }
    let name = |lease: &Lease| rows::hex(lease.id.0.as_bytes());
    let held = leases.iter().map(|lease| (lease.seq, lease.token.0, name(lease)));
    let renew = query(RENEW)
        .bind(rows::json(&held.collect::<Vec<_>>()))
        .bind(rows::after(desk.now, duration))
        .bind(desk.now);
    let mut renewed = HashSet::new();
    for row in renew.fetch_all(&mut desk.connection).await? {
        let token = Token(row.try_get("token")?);
        renewed.insert((row.try_get::<i64, _>("seq")?, token, rows::message_id(&row)?));
    }
    let holds = |lease: &Lease| renewed.contains(&(lease.seq, lease.token, lease.id));
    Ok(leases.iter().map(holds).collect())
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] =
    &[READY, LANES, IN_TURN, URGENT, MARK_LEASED, CONTENTS, MARK_UNREADABLE, HELD, RENEW];
