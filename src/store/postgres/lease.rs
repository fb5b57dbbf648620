//! Claiming messages, and keeping the claim.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query, query_scalar};

use crate::model::{Held, Lease, Leased, Message, MessageId, QueueName, Ticket, Token};
use crate::telemetry::metrics;

use super::super::{CLAIM_BYTES_MAX, Claim, Result};
use super::Postgres;
use super::claims::{CLAIM, CLAIM_IN_TURN, CLAIM_URGENT};
use super::fault::Trouble;
use super::groups::{self, blocks, free_groups};
use super::news::Word;
use super::rows;

/// The most messages one claim takes.
const CLAIM_MAX: usize = 10_000;

/// The start of a process in whose name leases are that are held outside of it: they end by time alone.
const OF_NOBODY_HERE: i64 = 0;
/// The class of advisory locks on the numbers of queues of which somebody outside claims.
const LOCK_OUT: i32 = 0x7075_6d72;

/// Claims messages, and another time for those that could not be read.
pub(super) async fn lease(store: &Postgres, claim: Claim) -> Result<Vec<Leased>> {
    let mut all = Vec::new();
    // Usually once: again only for what could not be read, and never for more than one claim may take.
    let max = claim.max.min(CLAIM_MAX);
    let mut way = Way::of(store, &claim);
    while all.len() < max {
        let rest = Claim { max: max - all.len(), ..claim.clone() };
        match claim_and_bury(store, rest, way, &mut all).await {
            Ok(More::Perhaps) => (),
            // What others have just taken is of the highest priority; the rest is anybody's.
            Ok(More::No) if matches!(way, Way::InTurn(_)) && all.is_empty() => way = Way::InOrder,
            Ok(More::No | More::NoRoom) => break,
            // What is held by now is handed over, because nobody else knows that it is.
            Err(error) if !all.is_empty() => {
                let (queue, held) = (&claim.queue, all.len());
                tracing::warn!(%queue, %error, held, "a claim ended early; what it has taken goes on");
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// How a claim finds what it takes.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// By priority, then by how long it is due.
    InOrder,
    /// The same, of what an operator wants run now.
    Urgent,
    /// Of the highest priority, round the lanes, on from this one.
    InTurn(i32),
}

impl Way {
    fn of(store: &Postgres, claim: &Claim) -> Self {
        let last = store.last_lanes().get(&claim.queue).copied();
        match last {
            _ if claim.urgent_only => Self::Urgent,
            Some(last) => Self::InTurn(last),
            None => Self::InOrder,
        }
    }
}

/// Whether a claim is worth repeating.
enum More {
    Perhaps,
    No,
    /// As much is out as may be.
    NoRoom,
}

/// Claims once, and adds to `all` what could be read, before what could not is made a dead letter.
async fn claim_and_bury(
    store: &Postgres,
    claim: Claim,
    way: Way,
    all: &mut Vec<Leased>,
) -> Result<More> {
    let queue = claim.queue.clone();
    let Claimed { leased, unreadable, dropped, taken, asked, is_full, .. } =
        claim_once(store, claim, way).await?;
    if is_full {
        return Ok(More::NoRoom);
    }
    all.extend(leased);
    if !dropped.is_empty() {
        clear_the_way(store, &queue, dropped).await?;
        // Who holds something does not look for more behind what may be thousands of tokens, and nobody does where there
        // were no more.
        if unreadable.is_empty() && (!all.is_empty() || taken < asked) {
            return Ok(More::No);
        }
    } else if unreadable.is_empty() {
        return Ok(More::No);
    }
    if !unreadable.is_empty() {
        bury(store, &queue, unreadable).await?;
    }
    Ok(More::Perhaps)
}

/// Drops the other tokens of groups of which one was met for nothing: there may be many.
async fn clear_the_way(store: &Postgres, queue: &QueueName, groups: Vec<i64>) -> Result<()> {
    let queue = queue.clone();
    let drop = store.claims.run(move |connection: &mut PgConnection| {
        let (queue, groups) = (queue.clone(), groups.clone());
        Box::pin(async move { groups::drop_tokens(connection, &queue, &groups).await })
    });
    drop.await
}

/// What one claim has brought.
#[derive(Debug, Default)]
struct Claimed {
    leased: Vec<Leased>,
    /// Messages that cannot be read, and why.
    unreadable: Vec<(Lease, String)>,
    /// Groups of which tokens were taken, and that have nothing to lease now.
    dropped: Vec<i64>,
    /// How many tokens were taken in all, and how many were asked for.
    taken: i64,
    asked: i64,
    /// Whether messages of the queue take turns.
    fair: bool,
    /// Where this claim ended, if it took anything.
    last_lane: Option<i32>,
    /// Whether nothing was looked for, because as much is out as may be.
    is_full: bool,
}

// Lives on: the primary keys of lease, message, queue and dead; see `free_groups`.
const BURY: &str = concat!(
    "\
with gone as (
    delete from lease
    where seq = $1
        and token = $2
    returning seq, attempt
),
moved as (
    update message
    set state = 5, attempts = (select attempt from gone), finished_at = now_micros(), reason = $3
    where seq = (select seq from gone)
    returning seq, queue_id, finished_at, grp
),
finished as (
    select seq, grp
    from moved
    where grp is not null
        and not ",
    blocks!("true"),
    "
),
",
    free_groups!(),
    "
insert into dead (seq, finished_at, queue_id)
select seq, finished_at, queue_id
from moved"
);

// Lives on: the primary keys of lease and queue. Comes to the leases in the order of their numbers, and
// writes them by number and token: the place of a row (ctid) is another one after a wait for its lock.
const RENEW: &str = "\
with held as (
    select found.seq, found.token
    from unnest($1::bigint[], $2::bigint[]) as given (seq, token)
    cross join lateral (
        select lease.seq, lease.token
        from lease
        where lease.seq = given.seq
            and lease.token = given.token
            and lease.until > now_micros()
            and exists (select 1 from queue where queue.id = lease.queue_id)
        for update
    ) as found
)
update lease
set until = now_micros() + $3
where seq = any(array(select seq from held))
    and token = any(array(select token from held))
returning seq, token";

// Lives on: the primary keys of lease, message, queue and content, one look for each.
const HELD: &str = "\
select held.seq, held.token, held.leased_at, held.attempt as attempts, now_micros() as now, queue.name as queue,
    message.id, message.rank, message.failures, message.crashes, message.enqueued_at, message.expires_at,
    content.kind, content.correlation_id, content.details
from unnest($1::bigint[], $2::bigint[]) as given (seq, token)
cross join lateral (
    select *
    from lease
    where lease.seq = given.seq
        and lease.token = given.token
        and lease.until > now_micros()
    limit 1
) as held
cross join lateral (select * from message where message.seq = held.seq limit 1) as message
cross join lateral (select name from queue where queue.id = held.queue_id limit 1) as queue
cross join lateral (
    select kind, correlation_id, details
    from content
    where content.seq = held.seq
    limit 1
) as content";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[BURY, RENEW, HELD, LINE_UP_OUTSIDE, OUT];

/// What is known of these leases, in order; `None` for those that are lost.
pub(super) async fn held(store: &Postgres, tickets: Vec<Ticket>) -> Result<Vec<Option<Held>>> {
    let asked = tickets.clone();
    let found = store.claims.run(move |connection: &mut PgConnection| {
        let (seqs, tokens): (Vec<_>, Vec<_>) =
            asked.iter().map(|ticket| (ticket.seq, ticket.token.0)).unzip();
        Box::pin(async move {
            let rows = query(HELD).bind(seqs).bind(tokens).fetch_all(connection).await?;
            let found = rows.iter().map(one_held);
            Ok(found.collect::<sqlx::Result<HashMap<_, _>>>()?)
        })
    });
    let found = found.await?;
    Ok(tickets.iter().map(|ticket| found.get(ticket).cloned()).collect())
}

fn one_held(row: &PgRow) -> sqlx::Result<(Ticket, Held)> {
    let ticket = Ticket { seq: row.try_get("seq")?, token: Token(row.try_get("token")?) };
    let details: &str = row.try_get("details")?;
    let details = serde_json::from_str(details).map_err(|why| sqlx::Error::Decode(why.into()))?;
    let queue = rows::queue_name(row.try_get("queue")?)?;
    let held = Held {
        head: rows::head(row, queue, details)?,
        tries: rows::tries(row)?,
        leased_at: rows::moment(row.try_get("leased_at")?)?,
        now: rows::moment(row.try_get("now")?)?,
    };
    Ok((ticket, held))
}

/// Claims with one statement, which is on the disk when it returns: a claim that a server forgot in a crash
/// could not be settled, because its token is random, but the number of its attempt would come again.
async fn claim_once(store: &Postgres, claim: Claim, way: Way) -> Result<Claimed> {
    // Before the statement is sent, so that the holder lets go too early rather than too late.
    let asked = Instant::now();
    let until = asked + claim.duration;
    let chance = rows::chance().map_err(Trouble::from)?;
    let incarnation = match claim.out_max {
        None => store.pumps.incarnations.of(&claim.replica),
        Some(_) => OF_NOBODY_HERE,
    };
    let queue = claim.queue.clone();
    let is_outside = claim.out_max.is_some();
    let asking = Asking { claim, way, chance, incarnation, until };
    let claimed = if is_outside {
        let ask = store.claims.transact(move |connection: &mut PgConnection| {
            let asking = asking.clone();
            Box::pin(async move { asking.ask(connection).await })
        });
        ask.await?
    } else {
        let ask = store.claims.run(move |connection: &mut PgConnection| {
            let asking = asking.clone();
            Box::pin(async move { asking.ask(connection).await })
        });
        ask.await?
    };
    match (claimed.fair, claimed.last_lane, way) {
        (_, _, Way::Urgent) => (),
        // Where it has come to holds for the next one.
        _ if claimed.is_full => (),
        (true, Some(last), _) => drop(store.last_lanes().insert(queue, last)),
        (true, None, _) => drop(store.last_lanes().entry(queue).or_insert(0)),
        (false, _, Way::InTurn(_)) => drop(store.last_lanes().remove(&queue)),
        (false, _, Way::InOrder) => (),
    }
    metrics::commit_seconds("lease").record(asked.elapsed());
    metrics::batch_size("lease").record(claimed.leased.len() as f64);
    Ok(claimed)
}

/// A claim on its way to the database.
#[derive(Debug, Clone)]
struct Asking {
    claim: Claim,
    way: Way,
    /// What its tokens are made of.
    chance: i64,
    incarnation: i64,
    until: Instant,
}

impl Asking {
    async fn ask(mut self, connection: &mut PgConnection) -> Result<Claimed, Trouble> {
        let claim = &mut self.claim;
        if let Some(most) = claim.out_max {
            claim.max = claim.max.min(room(connection, &claim.queue, most).await?);
            if claim.max == 0 {
                return Ok(Claimed { is_full: true, ..Claimed::default() });
            }
        }
        let mut statement = query(match self.way {
            Way::InOrder => CLAIM,
            Way::Urgent => CLAIM_URGENT,
            Way::InTurn(_) => CLAIM_IN_TURN,
        });
        statement = statement
            .bind(claim.queue.as_str())
            .bind(claim.max as i64)
            .bind(self.chance)
            .bind(self.incarnation)
            .bind(rows::span(claim.duration))
            .bind(claim.replica.as_str())
            .bind(CLAIM_BYTES_MAX as i64);
        if let Way::InTurn(last) = self.way {
            statement = statement.bind(last);
        }
        let rows = statement.fetch_all(connection).await?;
        let claimed = read(rows, &self.claim.queue, self.until)?;
        Ok(Claimed { asked: self.claim.max as i64, ..claimed })
    }
}

// Lives on: queue_name_key. Locks against others who claim for somebody outside.
const LINE_UP_OUTSIDE: &str = "\
select pg_advisory_xact_lock($1, id)
from queue
where name = $2";

// Lives on: queue_name_key; and tally, read whole; it is folded to a few rows for each queue.
const OUT: &str = "\
select coalesce(sum(n), 0)::bigint
from tally
where queue_id = (select id from queue where name = $1)
    and state = 2";

/// How many more of a queue's messages may be leased, until the end of this transaction. What is settled meanwhile
/// counts as leased.
async fn room(
    connection: &mut PgConnection,
    queue: &QueueName,
    most: u32,
) -> Result<usize, Trouble> {
    let line_up = query(LINE_UP_OUTSIDE).bind(LOCK_OUT).bind(queue.as_str());
    line_up.execute(&mut *connection).await?;
    let out: i64 = query_scalar(OUT).bind(queue.as_str()).fetch_one(connection).await?;
    Ok(usize::try_from(i64::from(most) - out).unwrap_or(0))
}

fn read(rows: Vec<PgRow>, queue: &QueueName, until: Instant) -> Result<Claimed, Trouble> {
    let mut claimed = Claimed::default();
    if let Some(first) = rows.first() {
        claimed.dropped = first.try_get("dropped")?;
        claimed.taken = first.try_get("taken")?;
        claimed.fair = first.try_get("fair")?;
        claimed.last_lane = first.try_get("last_lane")?;
    }
    for row in rows {
        let Some(seq) = row.try_get("seq")? else { continue };
        let id = rows::message_id(&row)?;
        let token = Token(row.try_get("token")?);
        let lease = Lease { seq, id, token, until };
        match leased(&row, queue, lease.clone()) {
            Ok(leased) => claimed.leased.push(leased),
            Err(why) => claimed.unreadable.push((lease, format!("it cannot be read: {why}"))),
        }
    }
    // The statement finds them in the order of lease, and returns them in any.
    claimed.leased.sort_by_key(|leased| {
        let priority = leased.message.head.priority;
        (std::cmp::Reverse(priority), leased.due_at, leased.lease.seq)
    });
    Ok(claimed)
}

fn leased(row: &PgRow, queue: &QueueName, lease: Lease) -> sqlx::Result<Leased> {
    let details: &str = row.try_get("details")?;
    let details = serde_json::from_str(details).map_err(|why| sqlx::Error::Decode(why.into()))?;
    let body: Vec<u8> = row.try_get("body")?;
    let head = rows::head(row, queue.clone(), details)?;
    Ok(Leased {
        lease,
        message: Message { head, body: body.into() },
        tries: rows::tries(row)?,
        due_at: rows::moment(row.try_get("due_at")?)?,
        leased_at: rows::moment(row.try_get("leased_at")?)?,
    })
}

/// Makes dead letters of messages that cannot be read.
async fn bury(store: &Postgres, queue: &QueueName, broken: Vec<(Lease, String)>) -> Result<()> {
    let unreadable = vec![queue.clone(); broken.len()];
    for (lease, reason) in &broken {
        log(lease.id, queue, reason);
    }
    store
        .hands
        .run(move |connection: &mut PgConnection| {
            let broken = broken.clone();
            Box::pin(async move {
                for (lease, reason) in broken {
                    let bury = query(BURY).bind(lease.seq).bind(lease.token.0).bind(reason);
                    bury.execute(&mut *connection).await?;
                }
                Ok(())
            })
        })
        .await?;
    store.herald.tell(Word { unreadable, ..Default::default() });
    Ok(())
}

fn log(message: MessageId, queue: &QueueName, reason: &str) {
    tracing::warn!(%message, %queue, reason, "set a message aside that cannot be read");
}

/// Prolongs what is still held.
pub(super) async fn renew(
    store: &Postgres,
    leases: Vec<Lease>,
    duration: Duration,
) -> Result<Vec<bool>> {
    let mut held = leases.iter().map(|lease| (lease.seq, lease.token.0)).collect::<Vec<_>>();
    held.sort_unstable();
    let renewed = store.claims.run(move |connection: &mut PgConnection| {
        let (seqs, tokens): (Vec<_>, Vec<_>) = held.iter().copied().unzip();
        Box::pin(async move {
            let renew = query(RENEW).bind(seqs).bind(tokens).bind(rows::span(duration));
            let renewed = renew.fetch_all(connection).await?;
            let renewed = renewed.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            Ok(renewed.collect::<sqlx::Result<HashSet<(i64, i64)>>>()?)
        })
    });
    let renewed = renewed.await?;
    Ok(leases.iter().map(|lease| renewed.contains(&(lease.seq, lease.token.0))).collect())
}
