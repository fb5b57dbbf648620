//! The quiet second: one statement shows that this process is alive, and sees whether anything is to do.
//!
//! Where nothing has changed since the last report, the shares are what they were, and nothing else is asked: an idle
//! process costs the database one statement a second.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use sqlx::{PgConnection, Row, query};

use crate::model::ReplicaName;

use super::super::{Attendance, Chores, Result, Want};
use super::Postgres;
use super::fault::{Trouble, unreadable};
use super::rows;

/// Who holds leases, and by which start of a process. Lives on: lease_holder, one step for each.
macro_rules! holders {
    () => {
        "\
holder (replica, incarnation) as (
    (
        select lease.replica, lease.incarnation
        from lease
        where (lease.replica, lease.incarnation) > ('', 0)
        order by lease.replica, lease.incarnation
        limit 1
    )
    union all
    select next.replica, next.incarnation
    from holder
    cross join lateral (
        select lease.replica, lease.incarnation
        from lease
        where (lease.replica, lease.incarnation) > (holder.replica, holder.incarnation)
        order by lease.replica, lease.incarnation
        limit 1
    ) as next
)"
    };
}

pub(super) use holders;

// Lives on: the primary keys of replica, pump, scheduled and ended; lease_until, lease_holder (one step for each holder),
// ready_expiring, behind_expiring, scheduled_expiring, dead_since and idempotency_sweep, one look each (ended and dead:
// for each queue); share, read whole; doomed, released and sent, at their beginnings; tally, as far as it is folded at a
// time: folded, it has one row for each queue and state. A holder of incarnation 0 is known to nobody. What others have
// at the moment is only compared, so a sum of hashes does. What is due before the next look is called for now, to be in
// time.
const STILL_HERE: &str = concat!(
    "\
with recursive clock as (
    select now_micros() as now
),
me as (
    update replica
    set seen_at = now_micros(), good_for = $3
    where name = $1
        and incarnation = $2
    returning name
),
",
    holders!(),
    "
select revision, now,
    exists (select 1 from me) as known,
    array(select name from replica order by name) as replicas,
    exists (
        select 1
        from replica
        where name <> $1
            and seen_at + good_for <= now
    ) as some_gone,
    (
        select coalesce(sum(hashtext(share::text)), 0)::bigint
        from share
        where replica <> $1
    ) as others,
    exists (
        select 1
        from holder
        where incarnation <> 0
            and not exists (
                select 1
                from replica
                where replica.name = holder.replica
                    and replica.incarnation = holder.incarnation
                    and replica.seen_at + replica.good_for > now
            )
    ) as orphans,
    exists (select 1 from sent) as sent,
    exists (select 1 from scheduled where due_at <= now + 1500000) as due,
    exists (select 1 from lease where until <= now) as lost,
    exists (
            select 1
            from (select queue_id, state from tally limit 10000) as notes
            group by queue_id, state
            having count(*) > 1
        )
        or exists (select 1 from ready where expires_at <= now)
        or exists (select 1 from behind where expires_at <= now)
        or exists (select 1 from scheduled where expires_at <= now)
        or exists (select 1 from idempotency where sweep_at <= now)
        or exists (select 1 from doomed)
        or exists (select 1 from released)
        or exists (
            select 1
            from queue
            cross join lateral (
                select 1
                from ended
                where queue_id = queue.id
                    and finished_at <= now - queue.retention_completed
                limit 1
            ) as past
        )
        or exists (
            select 1
            from queue
            cross join lateral (
                select 1
                from dead
                where queue_id = queue.id
                    and finished_at <= now - queue.retention_dead
                limit 1
            ) as past
        ) as past
from pump, clock
where id = 1"
);

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[STILL_HERE];

/// What one look has seen.
#[derive(Debug, Clone)]
pub(super) struct Look {
    /// Whether the database knew this start of this process, and has noted now that it is alive.
    known: bool,
    /// Whether another process counts as dead and nobody has drawn the consequences.
    some_gone: bool,
    pub(super) replicas: Vec<ReplicaName>,
    /// Changes, as good as surely, when another process' shares do.
    others: i64,
    /// Whether leases are left of a process that counts as dead.
    pub(super) orphans: bool,
    /// Whether transactions of somebody else's have sent something.
    pub(super) sent: bool,
    pub(super) chores: Chores,
    pub(super) revision: i64,
    pub(super) now: Timestamp,
}

/// What was last reported for each process of this program, and what came of it.
#[derive(Debug, Default)]
pub(super) struct Reports(Mutex<HashMap<ReplicaName, Reported>>);

/// What is known of the reports of one process.
#[derive(Debug, Default)]
struct Reported {
    /// What the database has. Nothing while that may change: a report that nobody waits for any more is still made.
    last: Option<Report>,
    under_way: u32,
    /// Whether one of those began while another was under way, so that nobody knows which was the last.
    overlap: bool,
}

#[derive(Debug)]
struct Report {
    incarnation: i64,
    wants: Vec<Want>,
    shares: Vec<u32>,
    seen: Look,
}

impl Reports {
    /// Whether this is what was reported last.
    fn is_the_last(&self, attendance: &Attendance) -> bool {
        let all = self.lock();
        let last = all.get(&attendance.replica).and_then(|reported| reported.last.as_ref());
        last.is_some_and(|last| {
            (last.incarnation, &last.wants) == (attendance.incarnation, &attendance.wants)
        })
    }

    /// The shares of the last report, where all that they follow from is still so.
    fn shares(&self, replica: &ReplicaName, look: &Look) -> Option<Vec<u32>> {
        let all = self.lock();
        let last = all.get(replica)?.last.as_ref()?;
        let seen = |look: &Look| (look.revision, look.others);
        let same = seen(&last.seen) == seen(look) && last.seen.replicas == look.replicas;
        (same && look.known && !look.some_gone).then(|| last.shares.clone())
    }

    /// Notes that a report begins.
    pub(super) fn begin(&self, replica: &ReplicaName) {
        let mut all = self.lock();
        let reported = all.entry(replica.clone()).or_default();
        reported.last = None;
        reported.overlap |= reported.under_way > 0;
        reported.under_way += 1;
    }

    /// Notes that a report has ended, and what came of it if that was committed for sure.
    pub(super) fn end(&self, attendance: Attendance, came: Option<&(Vec<u32>, Look)>) {
        let Attendance { replica, incarnation, wants, leaving, .. } = attendance;
        let mut all = self.lock();
        let Some(reported) = all.get_mut(&replica) else { return };
        reported.under_way -= 1;
        if reported.under_way > 0 {
            return;
        }
        let came = came.filter(|_| !reported.overlap && !leaving).cloned();
        reported.overlap = false;
        reported.last = came.map(|(shares, seen)| Report { incarnation, wants, shares, seen });
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ReplicaName, Reported>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reports this process alive with one statement, and returns its shares; `None` where they may have to be others, which
/// is to be settled under the lock.
///
/// What it has stays its own until somebody deletes its row in `replica`, and then that row is not found here.
pub(super) async fn still_here(
    store: &Postgres,
    attendance: &Attendance,
) -> Result<Option<(Vec<u32>, Look)>> {
    if attendance.leaving || !store.reports.is_the_last(attendance) {
        return Ok(None);
    }
    let asking = attendance.clone();
    let look = store.hands.run(move |connection| {
        let asking = asking.clone();
        Box::pin(async move { look(connection, &asking).await })
    });
    let look = look.await?;
    let shares = store.reports.shares(&attendance.replica, &look);
    Ok(shares.map(|shares| (shares, look)))
}

/// Looks, and notes that this process is alive, if it is known.
pub(super) async fn look(
    connection: &mut PgConnection,
    attendance: &Attendance,
) -> Result<Look, Trouble> {
    let look = query(STILL_HERE).bind(attendance.replica.as_str()).bind(attendance.incarnation);
    let row = look.bind(rows::span(attendance.good_for)).fetch_one(connection).await?;
    let replicas = row.try_get::<Vec<String>, _>("replicas")?;
    Ok(Look {
        known: row.try_get("known")?,
        some_gone: row.try_get("some_gone")?,
        replicas: replicas.into_iter().map(replica).collect::<sqlx::Result<_>>()?,
        others: row.try_get("others")?,
        orphans: row.try_get("orphans")?,
        sent: row.try_get("sent")?,
        chores: Chores {
            due: row.try_get("due")?,
            lost: row.try_get("lost")?,
            past: row.try_get("past")?,
        },
        revision: row.try_get("revision")?,
        now: rows::moment(row.try_get("now")?)?,
    })
}

/// Reads the name of a process.
pub(super) fn replica(name: String) -> sqlx::Result<ReplicaName> {
    ReplicaName::parse(&name).map_err(|_| unreadable("a replica's name is no name"))
}
