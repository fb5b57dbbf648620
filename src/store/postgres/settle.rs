//! Writing what became of leased messages, if their leases still hold.
//!
//! The fence is in the statement that writes: it takes the lease away only where the token is the
//! current one and the lease has not run out by the database's clock, and everything else follows from
//! the leases it took.

use std::borrow::Cow;
use std::collections::BTreeMap;

use futures::future::BoxFuture;
use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query};

use crate::model::{
    DELIVERIES_KEPT, DeliveryRecord, Lease, NewMessage, QueueName, Settlement, State,
};

use super::super::{Settle, Settled, target_gone};
use super::facts::{Care, Patience};
use super::fault::Trouble;
use super::groups::{blocks, free_groups, line_up};
use super::news::Word;
use super::rows;
use super::sent::settle_and_send;
use super::writer::{Batch, Committed, Done, Pumps};

/// Calls to [`Store::settle`](super::super::Store::settle), many in one transaction.
pub(super) struct Settles;

impl Batch for Settles {
    type Call = Settle;
    type Answer = Answer;
    const NAME: &'static str = "settle";

    fn has_keys(call: &Settle) -> bool {
        sent(call).iter().any(|message| !message.keys.is_empty())
    }

    fn weight(call: &Settle) -> usize {
        let sent = call.sent.iter().map(|message| message.body.len() + ROW_WEIGHT);
        ROW_WEIGHT + sent.sum::<usize>()
    }

    fn commit<'c>(
        connection: &'c mut PgConnection,
        calls: &'c [&'c Settle],
        pumps: &'c Pumps,
        patience: Patience,
    ) -> BoxFuture<'c, Committed<Answer>> {
        Box::pin(async move {
            let rounds = rounds(calls);
            let alone = |call: &&Settle| sent(call).is_empty() && target(call).is_none();
            if rounds.len() == 1 && calls.iter().all(alone) {
                // One statement is one transaction, and one round trip.
                let (settled, word) = write(connection, calls, &rounds).await?;
                let answers = settled.into_iter().map(Ok).collect();
                return Ok(Done { answers, word, handed: Vec::new() });
            }
            match settle_and_send(connection, calls, pumps, (Care::Usual, patience)).await {
                Err(trouble) if trouble.is_known_name() => {
                    settle_and_send(connection, calls, pumps, (Care::Names, patience)).await
                }
                done => done,
            }
        })
    }
}

/// What is said to a settlement: what became of it, or what of its messages was refused.
pub(super) type Answer = std::result::Result<Settled, Refused>;

/// Which message was refused, and why.
pub(super) type Refused = String;

/// What a settlement weighs without what is sent along.
const ROW_WEIGHT: usize = 500;

/// What leaves together with this settlement.
pub(super) fn sent(call: &Settle) -> &[NewMessage] {
    if call.settlement == Settlement::Ack { &call.sent } else { &[] }
}

/// Where this settlement moves its message.
pub(super) fn target(call: &Settle) -> Option<&QueueName> {
    match &call.settlement {
        Settlement::Move { to_queue, .. } => Some(to_queue),
        _ => None,
    }
}

/// Gives back what was leased for somebody who does not want it any more; says what there is to tell.
pub(super) async fn give_back(
    connection: &mut PgConnection,
    leases: Vec<Lease>,
) -> Result<Word, Trouble> {
    let release =
        |lease| Settle { lease, settlement: Settlement::Release, delivery: None, sent: Vec::new() };
    let calls = leases.into_iter().map(release).collect::<Vec<_>>();
    let calls = calls.iter().collect::<Vec<_>>();
    // Several statements need no transaction here: each release stands for itself, and nobody is told.
    Ok(write(connection, &calls, &rounds(&calls)).await?.1)
}

/// The leases that still hold, locked: each is looked up by itself (lateral), in the order of the messages'
/// numbers. What stands after the first two arrays is given by who uses it.
macro_rules! fenced {
    ($arrays:literal, $columns:literal) => {
        concat!(
            "\
with clock as (
    select now_micros() as now
),
fenced as (
    select given.*
    from unnest($1::bigint[], $2::bigint[],",
            $arrays,
            "
            $3::integer[], $4::text[], $5::bigint[], $6::bigint[], $7::text[],
            $8::integer[], $9::text[], $10::text[], $11::bytea[]
        ) as given (
            seq, token,",
            $columns,
            "
            number, replica, started_at, duration, outcome,
            status, error_kind, error, answer
        )
    cross join lateral (
        select
        from lease
        where lease.seq = given.seq
            and lease.token = given.token
            and lease.until > (select now from clock)
            and exists (select 1 from queue where queue.id = lease.queue_id)
        for update
    ) as held
),
gone as (
    delete from lease
    where seq = any(array(select seq from fenced))
    returning seq
),
recorded as (
    insert into delivery (
        seq, number, replica, started_at, duration, outcome, status, error_kind, error, answer
    )
    select seq, number, replica, started_at, duration, outcome, status, error_kind, error, answer
    from fenced
    where number is not null
    on conflict (seq, number) do nothing
),
"
        )
    };
}

// Lives on: the primary keys of lease, queue and message; then of ended and of delivery; see `free_groups`.
//
// The number of the attempt is the one after the last that was written, because that is how the claim made
// it. Nothing in it grows faster than the batch: what differs between messages stands in `SETTLE`.
const ACK: &str = concat!(
    fenced!("", ""),
    "\
moved as (
    update message
    set state = 3, attempts = attempts + 1, finished_at = (select now from clock), reason = null
    where seq = any(array(select seq from gone))
    returning seq, queue_id, enqueued_at, grp
),
completed as (
    insert into ended (finished_at, seq, queue_id)
    select (select now from clock), seq, queue_id
    from moved
),
finished as (
    select seq, grp
    from moved
    where grp is not null
),
",
    free_groups!(),
    "
select seq, (select now from clock) - enqueued_at as age, false as scheduled,
    case when grp is not null then (select name from queue where id = queue_id) end as ready
from moved"
);

// Lives on: the primary keys of lease, queue and message; then of ready, scheduled, dead or ended, and
// of delivery; see `free_groups`. A message of a group that is to be tried again is still its first.
//
// Each message finds what is meant for it by its place in a list, so that there is no order of joining
// that could be chosen wrongly: see `open`. Its time grows with the square of the batch, which therefore
// has a bound of its own.
const SETTLE: &str = concat!(
    fenced!(
        "
            $12::smallint[], $13::integer[], $14::bigint[], $15::text[],",
        "
            state, failed, wait, reason,"
    ),
    "\
listed as (
    select array_agg(seq order by seq) as seqs, array_agg(state order by seq) as states,
        array_agg(failed order by seq) as failed, array_agg(wait order by seq) as waits,
        array_agg(reason order by seq) as reasons
    from fenced
),
moved as (
    update message
    set state = (select states from listed)[array_position((select seqs from listed), seq)],
        attempts = attempts + 1,
        failures = failures
            + (select failed from listed)[array_position((select seqs from listed), seq)],
        due_at = coalesce(
            (select now from clock)
                + (select waits from listed)[array_position((select seqs from listed), seq)],
            due_at
        ),
        finished_at = case
            when (select states from listed)[array_position((select seqs from listed), seq)] <> 0
            then (select now from clock)
        end,
        reason = (select reasons from listed)[array_position((select seqs from listed), seq)]
    where seq = any(array(select seq from gone))
    returning seq, queue_id, state, rank, lane, due_at, expires_at, enqueued_at, grp,
        (select now from clock) as now
),
made_ready as (
    insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
    select queue_id, rank, lane, due_at, seq, expires_at, false
    from moved
    where state = 0 and due_at <= now
),
made_scheduled as (
    insert into scheduled (due_at, seq, queue_id, rank, lane, expires_at)
    select due_at, seq, queue_id, rank, lane, expires_at
    from moved
    where state = 0 and due_at > now
),
died as (
    insert into dead (seq, finished_at, queue_id)
    select seq, now, queue_id
    from moved
    where state = 5
),
completed as (
    insert into ended (finished_at, seq, queue_id)
    select now, seq, queue_id
    from moved
    where state not in (0, 5)
),
finished as (
    select seq, grp
    from moved
    where grp is not null
        and state <> 0
        and not (",
    blocks!("state = 5"),
    ")
),
",
    free_groups!(),
    "
select seq, now - enqueued_at as age, state = 0 and due_at > now as scheduled,
    case
        when grp is not null or (state = 0 and due_at <= now)
        then (select name from queue where id = queue_id)
    end as ready
from moved"
);

// Lives on: the primary keys of lease and message, and queue_name_key; then of ready or dead, and of delivery. For
// one message at a time. Where the queue is gone, the message is dead in its own. See `free_groups` and `line_up`.
const MOVE: &str = concat!(
    fenced!(
        "
            $12::text[], $13::text[],",
        "
            to_queue, reason,"
    ),
    "\
target as (
    select id
    from queue
    where name = (select to_queue from fenced)
),
moved as (
    update message
    set queue_id = coalesce((select id from target), queue_id),
        state = case when exists (select 1 from target) then 0 else 5 end,
        attempts = attempts + 1,
        failures = case when exists (select 1 from target) then 0 else failures + 1 end,
        crashes = case when exists (select 1 from target) then 0 else crashes end,
        due_at = case when exists (select 1 from target) then (select now from clock) else due_at end,
        finished_at = case when not exists (select 1 from target) then (select now from clock) end,
        reason = case when not exists (select 1 from target) then (select reason from fenced) end
    where seq = (select seq from gone)
    returning seq, queue_id, state, rank, lane, due_at, expires_at, enqueued_at, grp,
        (select now from clock) as now
),
made_ready as (
    insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
    select queue_id, rank, lane, due_at, seq, expires_at, false
    from moved
    where state = 0
        and grp is null
),
died as (
    insert into dead (seq, finished_at, queue_id)
    select seq, now, queue_id
    from moved
    where state = 5
),
finished as (
    select seq, grp
    from moved
    where grp is not null
        and not (",
    blocks!("state = 5"),
    ")
),
arriving as (
    select queue_id, grp, seq, due_at, lane, expires_at
    from moved
    where grp is not null
        and state = 0
),
",
    free_groups!(),
    ",
",
    line_up!(),
    ",
freed_queue as (
    select name
    from queue
    where id = (select queue_id from freed limit 1)
)
select seq, now - enqueued_at as age, false as scheduled,
    case
        when state = 0 or grp is not null then (select name from queue where id = queue_id)
    end as ready,
    case when grp is not null then (select name from freed_queue) end as freed
from moved"
);

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[ACK, SETTLE, MOVE, FORGET_DELIVERIES];

// Lives on: the primary key of delivery, at the beginning of one message.
const FORGET_DELIVERIES: &str = "\
delete from delivery
where seq = $1 and number <= $2";

/// How many settlements that are no acks one statement takes.
const OTHERS_MAX: usize = 100;

/// Which calls, by their places, one statement takes: acks, or some that are no acks, each lease once. In the
/// order of the messages' numbers, so that two statements never wait for each other (two transactions of
/// several might, about the same leases; then one of them is tried again); and of several settlements with
/// one token the first, because only one can be written.
pub(super) fn rounds(calls: &[&Settle]) -> Vec<Vec<usize>> {
    let (mut acks, mut others) = (BTreeMap::<i64, usize>::new(), BTreeMap::new());
    let mut again = Vec::new();
    for (place, call) in calls.iter().enumerate() {
        let lease = &call.lease;
        match acks.get(&lease.seq).or(others.get(&lease.seq)) {
            Some(first) if calls[*first].lease.token == lease.token => (),
            Some(_) => again.push(vec![place]),
            None if call.settlement == Settlement::Ack => drop(acks.insert(lease.seq, place)),
            None if target(call).is_some() => again.push(vec![place]),
            None => drop(others.insert(lease.seq, place)),
        }
    }
    let acks = acks.into_values().collect::<Vec<_>>();
    let others = others.into_values().collect::<Vec<_>>();
    let mut rounds = if acks.is_empty() { Vec::new() } else { vec![acks] };
    rounds.extend(others.chunks(OTHERS_MAX).map(<[usize]>::to_vec));
    rounds.extend(again);
    rounds
}

/// Settles, a statement for each round, and says what there is to tell.
pub(super) async fn write(
    connection: &mut PgConnection,
    calls: &[&Settle],
    rounds: &[Vec<usize>],
) -> Result<(Vec<Settled>, Word), Trouble> {
    let mut settled = vec![Settled::LeaseLost; calls.len()];
    let mut word = Word::default();
    for places in rounds {
        let chosen = places.iter().map(|place| calls[*place]).collect::<Vec<_>>();
        for row in bind(&chosen).fetch_all(&mut *connection).await? {
            let seq: i64 = row.try_get("seq")?;
            let age = rows::elapsed(row.try_get("age")?);
            let at = places.binary_search_by_key(&seq, |place| calls[*place].lease.seq);
            if let Ok(at) = at {
                settled[places[at]] = Settled::Done { age };
            }
            tell(&mut word, &row)?;
        }
    }
    let many =
        |call: &&&Settle| call.delivery.as_ref().is_some_and(|it| it.number > DELIVERIES_KEPT);
    for call in calls.iter().filter(many) {
        let number = call.delivery.as_ref().map_or(0, |delivery| delivery.number as i32);
        let forget = query(FORGET_DELIVERIES).bind(call.lease.seq);
        forget.bind(number - DELIVERIES_KEPT as i32).execute(&mut *connection).await?;
    }
    Ok((settled, word))
}

fn tell(word: &mut Word, row: &PgRow) -> sqlx::Result<()> {
    let ready: Option<&str> = row.try_get("ready")?;
    word.ready.extend(ready.and_then(|name| rows::queue_name(name).ok()));
    word.schedule |= row.try_get::<bool, _>("scheduled")?;
    // A message of a group that was moved lets the next one of its old queue go.
    if let Ok(Some(freed)) = row.try_get::<Option<&str>, _>("freed") {
        word.ready.extend(rows::queue_name(freed));
    }
    Ok(())
}

type Statement = sqlx::query::Query<'static, sqlx::Postgres, sqlx::postgres::PgArguments>;

/// The statement for settlements that are all acks, or none of them, or for one that moves its message.
fn bind(calls: &[&Settle]) -> Statement {
    let all = || calls.iter();
    let deliveries = || all().map(|call| call.delivery.as_ref());
    let number = |delivery: &DeliveryRecord| delivery.number as i32;
    let status = |delivery: &DeliveryRecord| delivery.status.map(i32::from);
    let acks = all().all(|call| call.settlement == Settlement::Ack);
    let moves = all().any(|call| target(call).is_some());
    let statement = query(if acks {
        ACK
    } else if moves {
        MOVE
    } else {
        SETTLE
    })
    .bind(all().map(|call| call.lease.seq).collect::<Vec<_>>())
    .bind(all().map(|call| call.lease.token.0).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it.map(number)).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it.map(|it| text(it.replica.as_str()))).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it.map(|it| rows::micros(it.started_at))).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it.map(|it| rows::span(it.duration))).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it.map(|it| text(it.outcome.as_str()))).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it.and_then(status)).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it?.error_kind.map(|kind| text(kind.as_str()))).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it?.error.as_deref().map(text)).collect::<Vec<_>>())
    .bind(deliveries().map(|it| it.map(|it| it.answer.to_vec())).collect::<Vec<_>>());
    if acks {
        return statement;
    }
    if moves {
        let gone = all().map(|call| reason(&call.settlement).map(|it| text(&it)));
        return statement
            .bind(
                all().map(|call| target(call).map(|it| it.as_str().to_owned())).collect::<Vec<_>>(),
            )
            .bind(gone.collect::<Vec<_>>());
    }
    statement
        .bind(all().map(|call| state(&call.settlement).code()).collect::<Vec<_>>())
        .bind(all().map(|call| i32::from(is_failure(&call.settlement))).collect::<Vec<_>>())
        .bind(all().map(|call| wait(&call.settlement)).collect::<Vec<_>>())
        .bind(all().map(|call| reason(&call.settlement).map(|it| text(&it))).collect::<Vec<_>>())
}

/// Where the message goes; 0 for one that can still be delivered.
fn state(settlement: &Settlement) -> State {
    match settlement {
        Settlement::Ack => State::Completed,
        Settlement::Discard { .. } => State::Discarded,
        Settlement::DeadLetter { .. } => State::Dead,
        Settlement::Retry { .. }
        | Settlement::Postpone { .. }
        | Settlement::Move { .. }
        | Settlement::Release => State::Ready,
    }
}

fn is_failure(settlement: &Settlement) -> bool {
    matches!(settlement, Settlement::Retry { .. } | Settlement::DeadLetter { .. })
}

/// How long until it is due again. What is released keeps its due time, so that it goes first again.
fn wait(settlement: &Settlement) -> Option<i64> {
    match settlement {
        Settlement::Retry { after } | Settlement::Postpone { after } => Some(rows::span(*after)),
        Settlement::Ack
        | Settlement::Discard { .. }
        | Settlement::DeadLetter { .. }
        | Settlement::Move { .. }
        | Settlement::Release => None,
    }
}

/// Why it ends, where it ends; of one that is moved, why it ends if there is no such queue.
fn reason(settlement: &Settlement) -> Option<Cow<'_, str>> {
    match settlement {
        Settlement::DeadLetter { reason } | Settlement::Discard { reason } => Some(reason.into()),
        Settlement::Move { to_queue, reason } => Some(target_gone(reason, to_queue).into()),
        Settlement::Ack
        | Settlement::Retry { .. }
        | Settlement::Postpone { .. }
        | Settlement::Release => None,
    }
}

/// A text as the database can keep it. What a handler said may hold the one character that it cannot.
fn text(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
