//! Claiming messages, and keeping the claim.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query};

use crate::model::{Lease, Leased, Message, MessageId, QueueName, Token};
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
            Ok(More::No) => break,
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
}

/// Claims once, and adds to `all` what could be read, before what could not is made a dead letter.
async fn claim_and_bury(
    store: &Postgres,
    claim: Claim,
    way: Way,
    all: &mut Vec<Leased>,
) -> Result<More> {
    let queue = claim.queue.clone();
    let asked = claim.max as i64;
    let Claimed { leased, unreadable, dropped, taken, .. } = claim_once(store, claim, way).await?;
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
    /// How many tokens were taken in all.
    taken: i64,
    /// Whether messages of the queue take turns.
    fair: bool,
    /// Where this claim ended, if it took anything.
    last_lane: Option<i32>,
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

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[BURY, RENEW];

/// Claims with one statement, which is on the disk when it returns: a claim that a server forgot in a crash
/// could not be settled, because its token is random, but the number of its attempt would come again.
async fn claim_once(store: &Postgres, claim: Claim, way: Way) -> Result<Claimed> {
    // Before the statement is sent, so that the holder lets go too early rather than too late.
    let asked = Instant::now();
    let until = asked + claim.duration;
    let chance = rows::chance().map_err(Trouble::from)?;
    let incarnation = store.pumps.incarnations.of(&claim.replica);
    let queue = claim.queue.clone();
    let claimed = store.claims.run(move |connection: &mut PgConnection| {
        let claim = claim.clone();
        Box::pin(async move {
            let mut statement = query(match way {
                Way::InOrder => CLAIM,
                Way::Urgent => CLAIM_URGENT,
                Way::InTurn(_) => CLAIM_IN_TURN,
            });
            statement = statement
                .bind(claim.queue.as_str())
                .bind(claim.max as i64)
                .bind(chance)
                .bind(incarnation)
                .bind(rows::span(claim.duration))
                .bind(claim.replica.as_str())
                .bind(CLAIM_BYTES_MAX as i64);
            if let Way::InTurn(last) = way {
                statement = statement.bind(last);
            }
            let rows = statement.fetch_all(connection).await?;
            read(rows, &claim.queue, until)
        })
    });
    let claimed = claimed.await?;
    match (claimed.fair, claimed.last_lane, way) {
        (_, _, Way::Urgent) => (),
        (true, Some(last), _) => drop(store.last_lanes().insert(queue, last)),
        (true, None, _) => drop(store.last_lanes().entry(queue).or_insert(0)),
        (false, _, Way::InTurn(_)) => drop(store.last_lanes().remove(&queue)),
        (false, _, Way::InOrder) => (),
    }
    metrics::commit_seconds("lease").record(asked.elapsed());
    metrics::batch_size("lease").record(claimed.leased.len() as f64);
    Ok(claimed)
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
