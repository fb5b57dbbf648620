//! Taking messages in with a single statement, where nothing about them has to be asked first.
//!
//! Most messages carry no key, are due now, and go to a queue without a limit. For them the way of
//! [`enqueue`](super::enqueue) is four round trips longer than it needs to be: what it would find out and
//! decide, the function `take_in` of the schema does by itself, and its statement is the transaction.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sqlx::{PgConnection, Row, query};

use crate::model::{Leased, NewMessage, QueueName, ReplicaName, State, When};

use super::super::{Enqueue, EnqueueOutcome, Enqueued, NewLease, Place, Receipt, count_enqueued};
use super::facts::{LOCK_NAMES, sorted_names};
use super::fault::Trouble;
use super::news::Word;
use super::rows;
use super::writer::{Done, Pumps};

// Lives on: queue_name_key and the primary key of ready; then, at their ends, the primary keys of message
// and content, and those of ready and lease.
const TAKE_IN: &str = "\
select taken_at, seqs, waiting
from take_in($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[TAKE_IN];

/// Whether nothing about these calls has to be asked first, as far as they tell.
pub(super) fn suits(calls: &[&Enqueue]) -> bool {
    let lasts = |message: &NewMessage| match message.expires {
        None => true,
        Some(When::In(time)) => rows::span(time) > 0,
        Some(When::Now | When::At(_)) => false,
    };
    let simple = |message: &NewMessage| {
        message.to.queue().is_some()
            && message.keys.is_empty()
            && message.deliver == When::Now
            && lasts(message)
    };
    calls.iter().all(|call| call.batch.is_none() && call.messages.iter().all(simple))
}

/// Takes in calls of which [`suits`] says so; `None` where a queue has a limit or is not there, and nothing was
/// done.
pub(super) async fn take_in(
    connection: &mut PgConnection,
    calls: &[&Enqueue],
    pumps: &Pumps,
) -> Result<Option<Done<EnqueueOutcome>>, Trouble> {
    let mut lot = Lot::new(calls, pumps)?;
    let asked = Instant::now();
    let row = lot.statement(pumps).fetch_one(connection).await;
    let row = row.map_err(Trouble::of_the_only_statement)?;
    let Some(now) = row.try_get::<Option<i64>, _>("taken_at")? else { return Ok(None) };
    lot.leave_those_of_crowded_queues(row.try_get("waiting")?, pumps);
    let answers = answers(calls, now);
    count_enqueued(&answers);
    let word = Word::of_ready(lot.not_handed().cloned());
    let handed = lot.handed(row.try_get("seqs")?, pumps, (now, asked));
    Ok(Some(Done { answers, word, handed }))
}

/// Messages that go in together.
struct Lot<'a> {
    messages: Vec<&'a NewMessage>,
    /// The queues' names, each once, in the order in which they are locked.
    names: Vec<&'a str>,
    /// To each message, where its queue's name stands.
    queues: Vec<usize>,
    /// To each message, a place with a pump of this process, if there is one.
    places: Vec<Option<Place>>,
    /// What the tokens of their leases are made of.
    chance: i64,
}

impl<'a> Lot<'a> {
    fn new(calls: &[&'a Enqueue], pumps: &Pumps) -> sqlx::Result<Self> {
        let messages = calls.iter().flat_map(|call| &call.messages).collect::<Vec<_>>();
        let names = sorted_names(messages.iter().map(|message| queue_of(message)));
        let place_of = |message: &&NewMessage| {
            let name = queue_of(message).as_str();
            names.binary_search(&name).expect("every queue's name is there")
        };
        let queues = messages.iter().map(place_of).collect::<Vec<_>>();
        let places = keep_places(&messages, &queues, pumps);
        Ok(Self { messages, names, queues, places, chance: rows::chance()? })
    }

    fn statement(&self, pumps: &Pumps) -> Statement<'_> {
        let messages = || self.messages.iter();
        let places = || self.places.iter().map(Option::as_ref);
        let details = messages().map(|message| {
            serde_json::to_string(&message.details).expect("details are text, which is always JSON")
        });
        let incarnation = |place: &Place| pumps.incarnations.of(&place.replica);
        query(TAKE_IN)
            .bind(LOCK_NAMES)
            .bind(&self.names)
            .bind(self.queues.iter().map(|queue| *queue as i32 + 1).collect::<Vec<_>>())
            .bind(messages().map(|message| message.id.0).collect::<Vec<_>>())
            .bind(messages().map(|message| -i16::from(message.priority)).collect::<Vec<_>>())
            .bind(messages().map(|message| lifetime(message).map(rows::span)).collect::<Vec<_>>())
            .bind(messages().map(|message| message.body.len() as i64).collect::<Vec<_>>())
            .bind(messages().map(|message| message.details.group_number()).collect::<Vec<_>>())
            .bind(messages().map(|message| lane(message)).collect::<Vec<_>>())
            .bind(messages().map(|message| message.kind.as_deref()).collect::<Vec<_>>())
            .bind(messages().map(|message| message.correlation_id.as_deref()).collect::<Vec<_>>())
            .bind(details.collect::<Vec<_>>())
            .bind(messages().map(|message| message.body.as_ref()).collect::<Vec<&[u8]>>())
            .bind(self.chance)
            .bind(places().map(|it| it.map(|it| rows::span(it.duration))).collect::<Vec<_>>())
            .bind(places().map(|it| it.map(incarnation)).collect::<Vec<_>>())
            .bind(places().map(|it| it.map(|it| it.replica.as_str())).collect::<Vec<_>>())
    }

    /// What comes after others is in the table, and its place is free again.
    fn leave_those_of_crowded_queues(&mut self, waiting: Vec<bool>, pumps: &Pumps) {
        for (place, queue) in self.places.iter_mut().zip(&self.queues) {
            *place = place.take().filter(|_| !waiting[*queue]);
        }
        let mut crowded = pumps.crowded();
        for (name, waiting) in self.names.iter().zip(waiting) {
            match QueueName::parse(name) {
                Ok(name) if waiting => drop(crowded.insert(name)),
                Ok(name) => drop(crowded.remove(&name)),
                Err(_) => (),
            }
        }
    }

    /// The queues of messages that wait in the table.
    fn not_handed(&self) -> impl Iterator<Item = &QueueName> {
        let waits = self.messages.iter().zip(&self.places).filter(|(_, place)| place.is_none());
        waits.map(|(message, _)| queue_of(message))
    }

    /// What goes to its place; `now` is the same moment by the database's clock and, shortly before, by ours.
    fn handed(self, seqs: Vec<i64>, pumps: &Pumps, now: (i64, Instant)) -> Vec<(Place, Leased)> {
        let moment = rows::moment(now.0).unwrap_or_default();
        let mut handed = Vec::new();
        for ((message, place), seq) in self.messages.into_iter().zip(self.places).zip(seqs) {
            let Some(place) = place else { continue };
            let incarnation = |replica: &ReplicaName| pumps.incarnations.of(replica);
            let lease = NewLease::new(place, incarnation, self.chance, now);
            let expires_at = message.expires.map(|when| rows::resolve(when, now.0));
            let expires_at = expires_at.and_then(|at| rows::moment(at).ok());
            handed.push(lease.handed(seq, (queue_of(message), message), moment, expires_at));
        }
        handed
    }
}

type Statement<'a> = sqlx::query::Query<'a, sqlx::Postgres, sqlx::postgres::PgArguments>;

/// To each message a place, if there is one. Of a queue in which others waited a moment ago one message tries
/// for all, so that those others find the room.
fn keep_places(messages: &[&NewMessage], queues: &[usize], pumps: &Pumps) -> Vec<Option<Place>> {
    let mut left = HashMap::new();
    let keep = |(message, queue): (&&NewMessage, &usize)| {
        let crowded = || pumps.crowded().contains(queue_of(message));
        // Whose turn it is in a group, only a claim can say.
        if message.details.group.is_some() {
            return None;
        }
        let left = left.entry(*queue).or_insert_with(|| if crowded() { 1 } else { usize::MAX });
        if *left == 0 {
            return None;
        }
        let place = Place::keep(&pumps.handover, queue_of(message));
        // What is not handed over comes first for those after it.
        *left = if place.is_some() { *left - 1 } else { 0 };
        place
    };
    messages.iter().zip(queues).map(keep).collect()
}

/// The queue of a message of which [`suits`] says that it has one.
fn queue_of(message: &NewMessage) -> &QueueName {
    message.to.queue().expect("what is published takes the longer way")
}

/// Where it stands among those that take turns.
pub(super) fn lane(message: &NewMessage) -> i32 {
    message.details.lane().cast_signed()
}

/// How long after it was taken in a message is worth delivering.
fn lifetime(message: &NewMessage) -> Option<Duration> {
    match message.expires? {
        When::In(time) => Some(time),
        When::Now | When::At(_) => None,
    }
}

fn answers(calls: &[&Enqueue], now: i64) -> Vec<EnqueueOutcome> {
    let now = rows::moment(now).unwrap_or_default();
    let receipt = |message: &NewMessage| Receipt {
        id: message.id,
        queue: queue_of(message).clone(),
        state: State::Ready,
        enqueued_at: now,
        deliver_at: now,
    };
    let answer = |call: &&Enqueue| {
        EnqueueOutcome::Done(call.messages.iter().map(|it| Enqueued::New(receipt(it))).collect())
    };
    calls.iter().map(answer).collect()
}
