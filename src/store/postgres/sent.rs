//! Settlements together with what handlers sent, and with moves, in one transaction.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use sqlx::{Connection, PgConnection, Row, query};

use crate::model::QueueName;
use crate::policy::unsendable;

use super::super::{Enqueued, Settle, Settled, not_sent};
use super::arrivals::{Arrival, Subscribed, arrivals};
use super::enqueue::Plan;
use super::facts::{Care, Facts, Patience, lock_names};
use super::fault::Trouble;
use super::settle::{Answer, rounds, sent, target, write};
use super::writer::{Committed, Done, Pumps};

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[LOCK_HELD, QUEUES_NAMED];

/// Settles, and takes in what was sent along with acks.
pub(super) async fn settle_and_send(
    connection: &mut PgConnection,
    calls: &[&Settle],
    pumps: &Pumps,
    care: (Care, Patience),
) -> Committed<Answer> {
    let mut transaction = connection.begin().await.map_err(Trouble::unbegun)?;
    // Before anything else, so that no queue is deleted while messages come to it.
    lock_names(&mut transaction, calls.iter().filter_map(|call| target(call))).await?;
    let mut answers = lock_those_that_send(&mut transaction, calls).await?;
    let subscribed = refuse_unsendable(&mut transaction, calls, &mut answers).await?;
    let held = calls.iter().zip(&answers).filter(|(_, answer)| is_kept(answer));
    let arrivals = arrivals(&subscribed, held.flat_map(|(call, _)| sent(call)));
    let mut plan = None;
    if !arrivals.is_empty() {
        let facts = Facts::find(&mut transaction, &arrivals, &[], care).await?;
        plan = Some(take_in(Plan::new(facts, pumps), arrivals, calls, &mut answers));
    }
    let chosen = (0..calls.len()).filter(|at| is_kept(&answers[*at])).collect::<Vec<_>>();
    let chosen_calls = chosen.iter().map(|at| calls[*at]).collect::<Vec<_>>();
    let (settled, mut word) =
        write(&mut transaction, &chosen_calls, &rounds(&chosen_calls)).await?;
    for (at, settled) in chosen.into_iter().zip(settled) {
        // Its lease has run out since it was locked: what it sends is planned, and must not be sent.
        if settled == Settled::LeaseLost && !sent(calls[at]).is_empty() {
            return Err(Trouble::Overtaken);
        }
        answers[at] = Ok(settled);
    }
    let mut handed = Vec::new();
    if let Some(plan) = plan {
        let written = plan.write(&mut transaction).await?;
        word.add(written.word);
        handed = written.handed;
    }
    transaction.commit().await?;
    Ok(Done { answers, word, handed })
}

const LOST: Answer = Ok(Settled::LeaseLost);

/// Whether a settlement is still to be written.
fn is_kept(answer: &Answer) -> bool {
    matches!(answer, Ok(Settled::Done { .. }))
}

// Lives on: the unique index of queue on name.
const QUEUES_NAMED: &str = "\
select name
from queue
where name = any($1)";

/// Refuses what cannot be sent, before any copy of it is made; says who has subscribed to what the others publish.
async fn refuse_unsendable(
    connection: &mut PgConnection,
    calls: &[&Settle],
    answers: &mut [Answer],
) -> sqlx::Result<Subscribed> {
    let all_sent = calls.iter().zip(&*answers).filter(|(_, answer)| is_kept(answer));
    let all_sent = all_sent.flat_map(|(call, _)| sent(call)).collect::<Vec<_>>();
    let subscribed = Subscribed::to_those_of(connection, all_sent.iter().copied()).await?;
    let wanted = all_sent.iter().filter_map(|message| message.details.reply_to.as_ref());
    let wanted = wanted.map(QueueName::as_str).collect::<HashSet<_>>();
    let mut there = HashSet::new();
    if !wanted.is_empty() {
        let wanted = wanted.into_iter().collect::<Vec<_>>();
        for row in query(QUEUES_NAMED).bind(wanted).fetch_all(connection).await? {
            there.insert(row.try_get::<String, _>("name")?);
        }
    }
    let is_there = |queue: &QueueName| there.contains(queue.as_str());
    for (call, answer) in calls.iter().zip(answers).filter(|(_, answer)| is_kept(answer)) {
        if let Some(what) = unsendable(sent(call), |topic| subscribed.to(topic), is_there) {
            *answer = Err(what);
        }
    }
    Ok(subscribed)
}

// Lives on: the primary keys of lease and queue.
const LOCK_HELD: &str = "\
select given.seq, given.token
from unnest($1::bigint[], $2::bigint[]) as given (seq, token)
cross join lateral (
    select
    from lease
    where lease.seq = given.seq
        and lease.token = given.token
        and lease.until > now_micros()
        and exists (select 1 from queue where queue.id = lease.queue_id)
    for update
) as held";

/// Keeps the leases of those who send until the end of the transaction, so that nothing is planned for one that is lost:
/// that is answered here. Of two with one token the first counts. What is left has yet to be written.
async fn lock_those_that_send(
    connection: &mut PgConnection,
    calls: &[&Settle],
) -> sqlx::Result<Vec<Answer>> {
    let mut first = BTreeMap::new();
    for (at, call) in calls.iter().enumerate().filter(|(_, call)| !sent(call).is_empty()) {
        first.entry((call.lease.seq, call.lease.token.0)).or_insert(at);
    }
    let (seqs, tokens): (Vec<_>, Vec<_>) = first.keys().copied().unzip();
    let held = match first.is_empty() {
        true => Vec::new(),
        false => query(LOCK_HELD).bind(seqs).bind(tokens).fetch_all(connection).await?,
    };
    let held = held.iter().map(|row| Ok((row.try_get("seq")?, row.try_get("token")?)));
    let held = held.collect::<sqlx::Result<HashSet<(i64, i64)>>>()?;
    let answer = |(at, call): (usize, &&Settle)| {
        let lease = (call.lease.seq, call.lease.token.0);
        let counts = sent(call).is_empty() || (held.contains(&lease) && first[&lease] == at);
        if counts { Ok(Settled::Done { age: Duration::ZERO }) } else { LOST }
    };
    Ok(calls.iter().enumerate().map(answer).collect())
}

/// Plans to take in what these calls send, but for those that have lost their leases or are refused. What is refused is found out before
/// anything is written, so that it fails for its own handler alone.
fn take_in<'a>(
    mut plan: Plan<'a>,
    arrivals: Vec<Arrival<'a>>,
    calls: &[&'a Settle],
    answers: &mut [Answer],
) -> Plan<'a> {
    let mut arrivals = arrivals.into_iter();
    for (call, answer) in calls.iter().zip(answers).filter(|(_, answer)| is_kept(answer)) {
        let mark = plan.mark();
        for (number, arrival) in arrivals.by_ref().take(sent(call).len()).enumerate() {
            if answer.is_err() {
                continue;
            }
            if let Enqueued::Refused(refusal) = plan.take_in(arrival) {
                plan.undo(mark);
                *answer = Err(not_sent(number, &refusal));
            }
        }
    }
    plan
}
