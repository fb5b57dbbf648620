//! Writing what became of leased messages, if their leases still hold.
//!
//! The fence is in the statement that writes: it takes the lease away only where the token is the
//! current one and the lease has not run out by the database's clock, and everything else follows from
//! the leases it took.

use std::collections::BTreeMap;

use futures::future::BoxFuture;
use sqlx::postgres::PgRow;
use sqlx::{Connection, PgConnection, Row, query};

use crate::model::{DeliveryRecord, NewMessage, Settlement, State};

use super::super::{Enqueued, Error, Settle, Settled};
use super::enqueue::Plan;
use super::facts::{Care, Facts};
use super::fault::Trouble;
use super::news::Word;
use super::rows;
use super::writer::{Batch, Committed};

/// Calls to [`Store::settle`](super::super::Store::settle), many in one transaction.
pub(super) struct Settles;

impl Batch for Settles {
    type Call = Settle;
    type Answer = Settled;
    const NAME: &'static str = "settle";

    fn weight(call: &Settle) -> usize {
        let sent = call.sent.iter().map(|message| message.body.len() + ROW_WEIGHT);
        ROW_WEIGHT + sent.sum::<usize>()
    }

    fn commit<'c>(
        connection: &'c mut PgConnection,
        calls: &'c [&'c Settle],
    ) -> BoxFuture<'c, Committed<Settled>> {
        Box::pin(async move {
            if calls.iter().all(|call| sent(call).is_empty()) {
                // One statement is one transaction, and one round trip.
                return write(connection, calls).await;
            }
            match settle_and_send(connection, calls, Care::Usual).await {
                Err(trouble) if trouble.is_known_name() => {
                    settle_and_send(connection, calls, Care::Names).await
                }
                done => done,
            }
        })
    }
}

/// What a settlement weighs without what is sent along.
const ROW_WEIGHT: usize = 500;

/// What leaves together with this settlement.
fn sent(call: &Settle) -> &[NewMessage] {
    if call.settlement == Settlement::Ack { &call.sent } else { &[] }
}

async fn settle_and_send(
    connection: &mut PgConnection,
    calls: &[&Settle],
    care: Care,
) -> Committed<Settled> {
    let mut transaction = connection.begin().await?;
    let (settled, mut word) = write(&mut transaction, calls).await?;
    let valid = calls.iter().zip(&settled).filter(|(_, settled)| **settled != Settled::LeaseLost);
    let sent = valid.flat_map(|(call, _)| sent(call)).collect::<Vec<_>>();
    let facts = Facts::find(&mut transaction, &sent, &[], care).await?;
    let mut plan = Plan::new(facts);
    for (place, message) in sent.into_iter().enumerate() {
        if let Enqueued::Refused(refusal) = plan.take_in(message, place) {
            let what = format!("a message sent by a handler was refused: {refusal:?}");
            return Err(Trouble::Ours(Error::Refused { what }));
        }
    }
    word.add(plan.write(&mut transaction).await?);
    transaction.commit().await?;
    Ok((settled, word))
}

// Lives on: the primary keys of lease, queue and message; then of ready, scheduled, dead or ended, and
// of delivery. Comes to the leases in the order of their messages' numbers.
//
// Each lease is looked up by itself (lateral), and each message by its place in a list, so that there is
// no order of joining that could be chosen wrongly: see `open`. A lease that was renewed while we waited
// for its lock stands at another place (ctid) than this statement's snapshot knows; so it is deleted by
// number and token, and nothing is written but for leases that were deleted.
const SETTLE: &str = "\
with clock as (
    select now_micros() as now
),
fenced as (
    select given.*, held.attempt
    from unnest(
            $1::bigint[], $2::bigint[], $3::smallint[], $4::integer[], $5::bigint[], $6::text[],
            $7::integer[], $8::text[], $9::bigint[], $10::bigint[], $11::text[],
            $12::integer[], $13::text[], $14::text[], $15::bytea[]
        ) as given (
            seq, token, state, failed, wait, reason,
            number, replica, started_at, duration, outcome,
            status, error_kind, error, answer
        )
    cross join lateral (
        select lease.attempt
        from lease
        where lease.seq = given.seq
            and lease.token = given.token
            and lease.until > (select now from clock)
            and exists (select 1 from queue where queue.id = lease.queue_id)
        for update
    ) as held
),
listed as (
    select array_agg(seq order by seq) as seqs, array_agg(state order by seq) as states,
        array_agg(attempt order by seq) as attempts, array_agg(failed order by seq) as failed,
        array_agg(wait order by seq) as waits, array_agg(reason order by seq) as reasons,
        array_agg(token order by seq) as tokens
    from fenced
),
gone as (
    delete from lease
    where seq = any(array(select seq from fenced))
        and token = any(array(select token from fenced))
    returning seq
),
moved as (
    update message
    set state = (select states from listed)[array_position((select seqs from listed), seq)],
        attempts = (select attempts from listed)[array_position((select seqs from listed), seq)],
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
    returning seq, queue_id, state, rank, due_at, expires_at, enqueued_at,
        (select now from clock) as now
),
made_ready as (
    insert into ready (queue_id, rank, due_at, seq, expires_at, urgent)
    select queue_id, rank, due_at, seq, expires_at, false
    from moved
    where state = 0 and due_at <= now
),
made_scheduled as (
    insert into scheduled (due_at, seq, queue_id, rank, expires_at)
    select due_at, seq, queue_id, rank, expires_at
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
recorded as (
    insert into delivery (
        seq, number, replica, started_at, duration, outcome, status, error_kind, error, answer
    )
    select seq, number, replica, started_at, duration, outcome, status, error_kind, error, answer
    from fenced
    where number is not null
        and seq = any(array(select seq from gone))
    on conflict (seq, number) do nothing
)
select seq, (select tokens from listed)[array_position((select seqs from listed), seq)] as token,
    now - enqueued_at as age, state = 0 and due_at > now as scheduled,
    case when state = 0 and due_at <= now then (select name from queue where id = queue_id) end as ready
from moved";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[SETTLE];

async fn write(connection: &mut PgConnection, calls: &[&Settle]) -> Committed<Settled> {
    // In the order of their numbers, so that two transactions never wait for each other; and of several
    // settlements with one lease the first, because only one can be written.
    let mut places = BTreeMap::new();
    for (place, call) in calls.iter().enumerate() {
        places.entry((call.lease.seq, call.lease.token.0)).or_insert(place);
    }
    let first = places.values().map(|place| calls[*place]).collect::<Vec<_>>();
    let mut settled = vec![Settled::LeaseLost; calls.len()];
    let mut word = Word::default();
    for row in bind(&first).fetch_all(connection).await? {
        let lease = (row.try_get("seq")?, row.try_get("token")?);
        if let Some(place) = places.get(&lease) {
            settled[*place] = Settled::Done { age: rows::elapsed(row.try_get("age")?) };
        }
        tell(&mut word, &row)?;
    }
    Ok((settled, word))
}

fn tell(word: &mut Word, row: &PgRow) -> sqlx::Result<()> {
    let ready: Option<&str> = row.try_get("ready")?;
    word.ready.extend(ready.and_then(|name| rows::queue_name(name).ok()));
    word.schedule |= row.try_get::<bool, _>("scheduled")?;
    Ok(())
}

type Statement = sqlx::query::Query<'static, sqlx::Postgres, sqlx::postgres::PgArguments>;

fn bind(calls: &[&Settle]) -> Statement {
    let all = || calls.iter();
    let deliveries = || all().map(|call| call.delivery.as_ref());
    let number = |delivery: &DeliveryRecord| delivery.number as i32;
    let status = |delivery: &DeliveryRecord| delivery.status.map(i32::from);
    query(SETTLE)
        .bind(all().map(|call| call.lease.seq).collect::<Vec<_>>())
        .bind(all().map(|call| call.lease.token.0).collect::<Vec<_>>())
        .bind(all().map(|call| state(&call.settlement).code()).collect::<Vec<_>>())
        .bind(all().map(|call| i32::from(is_failure(&call.settlement))).collect::<Vec<_>>())
        .bind(all().map(|call| wait(&call.settlement)).collect::<Vec<_>>())
        .bind(all().map(|call| reason(&call.settlement).map(text)).collect::<Vec<_>>())
        .bind(deliveries().map(|it| it.map(number)).collect::<Vec<_>>())
        .bind(deliveries().map(|it| it.map(|it| text(it.replica.as_str()))).collect::<Vec<_>>())
        .bind(deliveries().map(|it| it.map(|it| rows::micros(it.started_at))).collect::<Vec<_>>())
        .bind(deliveries().map(|it| it.map(|it| rows::span(it.duration))).collect::<Vec<_>>())
        .bind(deliveries().map(|it| it.map(|it| text(it.outcome.as_str()))).collect::<Vec<_>>())
        .bind(deliveries().map(|it| it.and_then(status)).collect::<Vec<_>>())
        .bind(
            deliveries()
                .map(|it| it?.error_kind.map(|kind| text(kind.as_str())))
                .collect::<Vec<_>>(),
        )
        .bind(deliveries().map(|it| it?.error.as_deref().map(text)).collect::<Vec<_>>())
        .bind(deliveries().map(|it| it.map(|it| it.answer.to_vec())).collect::<Vec<_>>())
}

/// Where the message goes; 0 for one that can still be delivered.
fn state(settlement: &Settlement) -> State {
    match settlement {
        Settlement::Ack => State::Completed,
        Settlement::Discard { .. } => State::Discarded,
        Settlement::DeadLetter { .. } => State::Dead,
        Settlement::Retry { .. } | Settlement::Release => State::Ready,
    }
}

fn is_failure(settlement: &Settlement) -> bool {
    matches!(settlement, Settlement::Retry { .. } | Settlement::DeadLetter { .. })
}

/// How long until it is due again. What is released keeps its due time, so that it goes first again.
fn wait(settlement: &Settlement) -> Option<i64> {
    match settlement {
        Settlement::Retry { after } => Some(rows::span(*after)),
        Settlement::Ack
        | Settlement::Discard { .. }
        | Settlement::DeadLetter { .. }
        | Settlement::Release => None,
    }
}

fn reason(settlement: &Settlement) -> Option<&str> {
    match settlement {
        Settlement::DeadLetter { reason } | Settlement::Discard { reason } => Some(reason),
        Settlement::Ack | Settlement::Retry { .. } | Settlement::Release => None,
    }
}

/// A text as the database can keep it. What a handler said may hold the one character that it cannot.
fn text(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
