//! Replicas: who is alive, who may have how many deliveries open, and whose leases have no owner.
//!
//! Shares are written by one replica at a time, under one lock. Each writes what it will have open at
//! most, and takes no more than what the others have left; so the sum of what is written never exceeds
//! a limit, but for deliveries that were open before the limit became smaller. Who finds nothing changed writes
//! nothing of that: see `look.rs`.

use std::collections::HashMap;
use std::sync::Arc;

use sqlx::{PgConnection, Row, query, query_scalar};

use crate::model::ReplicaName;

use super::super::{Attendance, Attended, Error, Reaped, Result};
use super::Postgres;
use super::fault::Trouble;
use super::groups::{blocks, free_groups};
use super::look::{Look, holders, look, replica, still_here};
use super::news::Word;
use super::rows;
use super::upkeep::{counts, take_back, taken_back, word};

/// The advisory lock under which shares are written.
const LOCK: i64 = 0x7075_6d70_7368_6172;
/// How many leases are taken back with one statement.
const TAKEN_BACK_MAX: i64 = 1000;
/// How many notes of what was sent are read with one statement.
const SENT_MAX: i64 = 10_000;

const ENTER: &str = "\
select pg_advisory_xact_lock($1)";

// Lives on: the primary key of replica.
const REPORT: &str = "\
insert into replica (name, incarnation, seen_at, good_for)
values ($1, $2, now_micros(), $3)
on conflict (name) do update
set incarnation = excluded.incarnation, seen_at = excluded.seen_at, good_for = excluded.good_for";

// Lives on: the primary key of replica. One that was started again under the same name stays.
const LEAVE: &str = "\
delete from replica
where name = $1
    and incarnation = $2";

// Lives on: replica, read whole; there are few.
const FORGET_DEAD: &str = "\
delete from replica
where seen_at + good_for <= now_micros()";

// Lives on: the primary key of replica.
const ALIVE: &str = "\
select name
from replica
order by name";

// Lives on: share, read whole; there are few.
const GIVE_UP_SHARES: &str = "\
delete from share
where not exists (select 1 from replica where replica.name = share.replica)
    or (share.replica = $1 and not share.queue_id = any(array(select id from queue where name = any($2))))";

// Lives on: queue_name_key and the primary key of share.
const TAKEN: &str = "\
select queue.id, queue.name, coalesce(sum(share.slots) filter (where share.replica <> $1), 0)::bigint as others,
    count(*) filter (where share.replica <> $1 and not share.able) as unable,
    count(*) filter (where share.replica < $1 and not share.able) as unable_before
from queue
left join share on share.queue_id = queue.id
where queue.name = any($2)
group by queue.id, queue.name";

// Lives on: the primary key of share.
const TAKE: &str = "\
insert into share (queue_id, replica, slots, able)
select queue_id, $1, slots, able
from unnest($2::integer[], $3::integer[], $4::boolean[]) as mine (queue_id, slots, able)
on conflict (queue_id, replica) do update
set slots = excluded.slots, able = excluded.able
where (share.slots, share.able) <> (excluded.slots, excluded.able)";

// Lives on: the primary key of pump.
const REVISION: &str = "\
select revision
from pump
where id = 1";

// Lives on: lease_holder, one step for each holder; the primary key of replica; see `take_back`.
// A holder that has never reported itself (incarnation 0) is known to nobody and judged by time alone.
const TAKE_BACK: &str = take_back!(
    ["recursive ", holders!(), ",\n"],
    "
        select found.tid
        from holder
        cross join lateral (
            select lease.ctid as tid
            from lease
            where lease.replica = holder.replica
                and lease.incarnation = holder.incarnation
            limit $1
            for update skip locked
        ) as found
        where holder.incarnation <> 0
            and not exists (
                select 1
                from replica
                where replica.name = holder.replica
                    and replica.incarnation = holder.incarnation
                    and replica.seen_at + replica.good_for > (select now from clock)
            )
        limit $1
    "
);

// Lives on: sent, from its beginning. What others have in hand, they tell of.
const TAKE_SENT: &str = "\
with taken as (
    delete from sent
    where ctid = any(array(
        select ctid
        from sent
        limit $1
        for update skip locked
    ))
    returning queue_id
)
select (select name from queue where queue.id = taken.queue_id) as queue, count(*) as n
from taken
group by queue_id";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    TAKE_SENT,
    ENTER,
    REPORT,
    LEAVE,
    FORGET_DEAD,
    ALIVE,
    GIVE_UP_SHARES,
    TAKEN,
    TAKE,
    REVISION,
    TAKE_BACK,
];

pub(super) async fn attend(store: &Postgres, attendance: Attendance) -> Result<Attended> {
    // Before it is written, so that no lease is taken in the name of an earlier start of this process.
    store.pumps.incarnations.remember(&attendance);
    let leaving = attendance.leaving;
    let (shares, look) = match still_here(store, &attendance).await? {
        Some(as_before) => as_before,
        None => report(store, attendance).await?,
    };
    let mut reaped = Vec::new();
    if look.orphans && !leaving {
        reaped = take_back_all(store).await?;
    }
    if look.sent
        && !leaving
        && let Err(error) = hear_of_sent(store).await
    {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(
            error,
            "cannot look for what was sent in transactions of others; looking again"
        );
    }
    let Look { replicas, chores, revision, now, .. } = look;
    Ok(Attended { shares, reaped, replicas, chores, revision, now })
}

/// Reports under the lock, and takes the shares that are left to take.
async fn report(store: &Postgres, attendance: Attendance) -> Result<(Vec<u32>, Look)> {
    let (hands, reports) = (store.hands.clone(), Arc::clone(&store.reports));
    reports.begin(&attendance.replica);
    // It is made although nobody may wait for it any more, and so is what is known of it.
    let reported = store.hands.tasks.spawn(async move {
        let asking = attendance.clone();
        let reported = hands.transact(move |connection| {
            let attendance = asking.clone();
            Box::pin(async move { report_alone(connection, &attendance).await })
        });
        let reported = reported.await;
        reports.end(attendance, reported.as_ref().ok());
        reported
    });
    reported.await.map_err(|died| Error::Unavailable(died.into()))?
}

async fn report_alone(
    connection: &mut PgConnection,
    attendance: &Attendance,
) -> Result<(Vec<u32>, Look), Trouble> {
    let name = attendance.replica.as_str();
    query(ENTER).bind(LOCK).execute(&mut *connection).await?;
    // Before anything is read: what changes meanwhile is a change that the next report finds.
    let revision = query_scalar(REVISION).fetch_one(&mut *connection).await?;
    if attendance.leaving {
        let leave = query(LEAVE).bind(name).bind(attendance.incarnation);
        leave.execute(&mut *connection).await?;
    } else {
        let report = query(REPORT).bind(name).bind(attendance.incarnation);
        report.bind(rows::span(attendance.good_for)).execute(&mut *connection).await?;
    }
    query(FORGET_DEAD).execute(&mut *connection).await?;
    let replicas = alive(connection).await?;
    let shares = shares(connection, attendance, &replicas).await?;
    // What it sees now, the next one is compared with.
    let mut seen = look(connection, attendance).await?;
    seen.revision = revision;
    Ok((shares, seen))
}

async fn alive(connection: &mut PgConnection) -> sqlx::Result<Vec<ReplicaName>> {
    let names = query_scalar::<_, String>(ALIVE).fetch_all(connection).await?;
    names.into_iter().map(replica).collect()
}

async fn shares(
    connection: &mut PgConnection,
    attendance: &Attendance,
    replicas: &[ReplicaName],
) -> sqlx::Result<Vec<u32>> {
    let name = attendance.replica.as_str();
    let shared = attendance.wants.iter().filter(|want| want.shared && !attendance.leaving);
    let queues = shared.map(|want| want.queue.as_str()).collect::<Vec<_>>();
    query(GIVE_UP_SHARES).bind(name).bind(&queues).execute(&mut *connection).await?;
    let mut taken = HashMap::new();
    for row in query(TAKEN).bind(name).bind(&queues).fetch_all(&mut *connection).await? {
        let queue = rows::queue_name(row.try_get("name")?)?;
        let taken_here = Taken {
            id: row.try_get("id")?,
            others: row.try_get("others")?,
            unable: row.try_get("unable")?,
            unable_before: row.try_get("unable_before")?,
        };
        taken.insert(queue, taken_here);
    }
    let (mut shares, mut ids, mut slots, mut able) = (vec![], vec![], vec![], vec![]);
    let rank = replicas.iter().position(|replica| *replica == attendance.replica);
    let rank = rank.filter(|_| !attendance.leaving);
    for want in &attendance.wants {
        let Some(rank) = rank.filter(|_| want.able) else {
            shares.push(0);
            if let Some(taken) = taken.get(&want.queue).filter(|_| want.shared) {
                ids.push(taken.id);
                slots
                    .push(i32::try_from(want.open.saturating_add(want.strays)).unwrap_or(i32::MAX));
                able.push(false);
            }
            continue;
        };
        let Some(taken) = taken.get(&want.queue).filter(|_| want.shared) else {
            shares.push(want.of_one());
            continue;
        };
        let left = i64::from(want.most) - taken.others - i64::from(want.strays);
        let left = u32::try_from(left).unwrap_or(0);
        let share = taken.fair(want.limit, rank, replicas.len()).min(left);
        shares.push(share);
        ids.push(taken.id);
        let open = share.max(want.open).saturating_add(want.strays);
        slots.push(i32::try_from(open).unwrap_or(i32::MAX));
        able.push(true);
    }
    query(TAKE).bind(name).bind(ids).bind(slots).bind(able).execute(connection).await?;
    Ok(shares)
}

/// Who has deliveries of a queue beside this replica.
struct Taken {
    id: i32,
    /// How many the others have.
    others: i64,
    /// How many others cannot open any.
    unable: i64,
    /// How many of those come first by name.
    unable_before: i64,
}

impl Taken {
    /// How many deliveries would be fair for the replica with this rank: an equal part, and one of the rest for those
    /// that come first by name, but for those that cannot.
    fn fair(&self, limit: u32, rank: usize, replicas: usize) -> u32 {
        let count = replicas.saturating_sub(self.unable as usize).max(1) as u32;
        let rank = rank.saturating_sub(self.unable_before as usize) as u32;
        limit / count + u32::from(rank < limit % count)
    }
}

/// Tells of what transactions of somebody else's have sent.
async fn hear_of_sent(store: &Postgres) -> Result<()> {
    loop {
        let heard = store.hands.run(|connection| {
            Box::pin(async move {
                let rows = query(TAKE_SENT).bind(SENT_MAX).fetch_all(connection).await?;
                Ok(counts(&rows)?)
            })
        });
        let heard = heard.await?;
        let notes = heard.values().sum::<u64>();
        if notes > 0 {
            let queues = heard.into_keys().flatten();
            store.herald.tell(Word { schedule: true, ..Word::of_ready(queues) });
        }
        if notes < SENT_MAX as u64 {
            return Ok(());
        }
    }
}

async fn take_back_all(store: &Postgres) -> Result<Vec<Reaped>> {
    let mut all = Vec::new();
    loop {
        let reaped = store
            .hands
            .run(|connection| {
                Box::pin(async move {
                    let rows = query(TAKE_BACK).bind(TAKEN_BACK_MAX).fetch_all(connection).await?;
                    Ok(taken_back(&rows)?)
                })
            })
            .await?;
        store.herald.tell(word(&reaped));
        let last = (reaped.len() as i64) < TAKEN_BACK_MAX;
        all.extend(reaped);
        if last {
            return Ok(all);
        }
    }
}
