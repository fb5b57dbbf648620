//! Claiming messages, and keeping the claim.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row, query};

use crate::model::{Lease, Leased, Message, QueueName, State, Token, Tries};

use super::super::Claim;
use super::desk::{Desk, Held, Queue};
use super::fault::unreadable;
use super::rows;

/// Claims in the order of lease. `asked` is the monotonic time at which the caller asked.
pub(super) async fn lease(
    desk: &mut Desk,
    queue: &Queue,
    claim: &Claim,
    asked: Instant,
) -> sqlx::Result<Vec<Leased>> {
    let mut leased = Vec::new();
    // Goes round again only where it met something unreadable, which then is no longer ready.
    while leased.len() < claim.max {
        let max = claim.max - leased.len();
        let picked = pick(desk, queue, claim.urgent_only, max, asked + claim.duration).await?;
        mark_leased(desk, queue, claim, &picked.good).await?;
        mark_unreadable(desk, queue, &picked.unreadable).await?;
        leased.extend(picked.good);
        if picked.unreadable.is_empty() {
            break;
        }
    }
    Ok(leased)
}

struct Picked {
    good: Vec<Leased>,
    unreadable: Vec<(i64, String)>,
}

// Lives on: message_ready, from its front, then the primary key of content. What has expired is passed
// over; the sweep takes it out of the way.
const READY: &str = "\
select message.seq, message.id, message.rank, message.due_at, message.attempts, message.failures,
    message.crashes, message.enqueued_at, message.expires_at, content.kind,
    content.correlation_id, content.details, content.body
from message indexed by message_ready
left join content on content.seq = message.seq
where message.queue_id = ?1
    and message.state = 0
    and (message.expires_at is null or message.expires_at > ?2)
order by message.rank, message.due_at, message.seq
limit ?3";

// Lives on: message_urgent, from its front, then the primary key of content.
const URGENT: &str = "\
select message.seq, message.id, message.rank, message.due_at, message.attempts, message.failures,
    message.crashes, message.enqueued_at, message.expires_at, content.kind,
    content.correlation_id, content.details, content.body
from message indexed by message_urgent
left join content on content.seq = message.seq
where message.queue_id = ?1
    and message.urgent = 1
    and message.state = 0
    and (message.expires_at is null or message.expires_at > ?2)
order by message.rank, message.due_at, message.seq
limit ?3";

async fn pick(
    desk: &mut Desk,
    queue: &Queue,
    urgent_only: bool,
    max: usize,
    until: Instant,
) -> sqlx::Result<Picked> {
    let text = if urgent_only { URGENT } else { READY };
    let max = i64::try_from(max).unwrap_or(i64::MAX);
    let ready = query(text).bind(queue.id).bind(desk.now).bind(max);
    let mut picked = Picked { good: Vec::new(), unreadable: Vec::new() };
    for row in ready.fetch_all(&mut desk.connection).await? {
        match leased(&row, &queue.name, until, desk.now) {
            Ok(leased) => picked.good.push(leased),
            Err(error) => picked.unreadable.push((row.try_get("seq")?, error.to_string())),
        }
    }
    Ok(picked)
}

fn leased(row: &SqliteRow, queue: &QueueName, until: Instant, now: i64) -> sqlx::Result<Leased> {
    let details: &str = row.try_get("details")?;
    let details = serde_json::from_str(details);
    let details = details.map_err(|_| unreadable("the details are not what was written"))?;
    let head = rows::head(row, queue.clone(), details)?;
    let before = rows::tries(row)?;
    Ok(Leased {
        lease: Lease { seq: row.try_get("seq")?, id: head.id, token: new_token()?, until },
        message: Message { head, body: Bytes::from(row.try_get::<Vec<u8>, _>("body")?) },
        // Counted here and not when it is settled, so that a crash in between counts too.
        tries: Tries { attempts: before.attempts.saturating_add(1), ..before },
        due_at: rows::moment(row.try_get("due_at")?)?,
        leased_at: rows::moment(now)?,
    })
}

pub(super) fn new_token() -> sqlx::Result<Token> {
    let bits = getrandom::u64().map_err(|error| sqlx::Error::Io(std::io::Error::other(error)))?;
    Ok(Token((bits >> 1).cast_signed()))
}

// Lives on: the primary key of message. Leaves message_ready and message_urgent for message_leased.
const MARK_LEASED: &str = "\
update message
set state = 2, urgent = 0, attempts = message.attempts + 1, token = taken.value ->> 1,
    leased_at = ?2, lease_until = ?3, incarnation = ?4, replica = ?5
from json_each(?1) as taken
where message.seq = taken.value ->> 0";

async fn mark_leased(
    desk: &mut Desk,
    queue: &Queue,
    claim: &Claim,
    leased: &[Leased],
) -> sqlx::Result<()> {
    if leased.is_empty() {
        return Ok(());
    }
    let taken = leased.iter().map(|leased| (leased.lease.seq, leased.lease.token.0));
    query(MARK_LEASED)
        .bind(rows::json(&taken.collect::<Vec<_>>()))
        .bind(desk.now)
        .bind(rows::after(desk.now, claim.duration))
        .bind(desk.incarnation)
        .bind(claim.replica.as_str().to_owned())
        .execute(&mut desk.connection)
        .await?;
    let until = rows::after(desk.now, claim.duration);
    for Leased { lease, message, due_at, .. } in leased {
        desk.moved(queue.id, State::Ready, State::Leased);
        let held = Held {
            id: lease.id,
            queue_id: queue.id,
            token: lease.token,
            enqueued_at: rows::micros(message.head.enqueued_at),
            due_at: rows::micros(*due_at),
            until,
        };
        desk.leases.insert(lease.seq, held);
    }
    Ok(())
}

// Lives on: the primary key of message. Leaves message_ready for message_dead.
const MARK_UNREADABLE: &str = "\
update message
set state = 5, urgent = 0, finished_at = ?2, reason = broken.value ->> 1
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
        desk.moved(queue.id, State::Ready, State::Dead);
        desk.word.unreadable.push(queue.name.clone());
    }
    Ok(())
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
pub(super) const STATEMENTS: &[&str] = &[READY, URGENT, MARK_LEASED, MARK_UNREADABLE, RENEW];
