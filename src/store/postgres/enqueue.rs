//! Taking messages in, each once.
//!
//! Where nothing has to be known first, [`at_once`] does it. Otherwise a transaction reads what there is to
//! know for all its messages ([`Facts`]), plans in memory what to write ([`Plan`]), and writes it with few
//! statements. So a refusal undoes a part of the plan, and never a row; keys are the exception.

use bytes::Bytes;
use futures::future::BoxFuture;
use sqlx::{Connection, PgConnection, query};

use crate::model::{Destination, Idempotency, Leased, NewMessage, QueueName, ReplicaName};

use super::super::columns::OF_TOPICS;
use super::super::{
    Copied, Enqueue, EnqueueOutcome, Enqueued, NewLease, Place, Published, Receipt, Refusal,
    count_enqueued, is_new, published::Incoming, refusals, topics,
};
use super::arrivals::{Arrival, Item, Publication, Subscribed, arrivals};
use super::at_once;
use super::facts::{Answer, Care, Facts, Key, KeyName, Known, Of, Patience};
use super::fault::Trouble;
use super::news::Word;
use super::rows;
use super::writer::{Batch, Committed, Done, Pumps};

/// Calls to [`Store::enqueue`](super::super::Store::enqueue), many in one transaction.
pub(super) struct Enqueues;

impl Batch for Enqueues {
    type Call = Enqueue;
    type Answer = EnqueueOutcome;
    const NAME: &'static str = "enqueue";

    fn has_keys(call: &Enqueue) -> bool {
        call.batch.is_some() || call.messages.iter().any(|message| !message.keys.is_empty())
    }

    fn weight(call: &Enqueue) -> usize {
        let weight = |message: &NewMessage| match message.to {
            Destination::Queue(_) => message.body.len() + ROW_WEIGHT,
            // How many copies there are shows only later.
            Destination::Topic { .. } => (message.body.len() + ROW_WEIGHT) * COPIES_GUESSED,
        };
        call.messages.iter().map(weight).sum()
    }

    fn commit<'c>(
        connection: &'c mut PgConnection,
        calls: &'c [&'c Enqueue],
        pumps: &'c Pumps,
        patience: Patience,
    ) -> BoxFuture<'c, Committed<EnqueueOutcome>> {
        Box::pin(async move {
            match enqueue_as_usual(connection, calls, pumps, patience).await {
                // Rare enough that looking for it beforehand is not worth a statement.
                Err(trouble) if trouble.is_known_name() => {
                    enqueue(connection, calls, pumps, (Care::Names, patience)).await
                }
                done => done,
            }
        })
    }
}

/// How many copies are made of what is published, as a guess.
const COPIES_GUESSED: usize = 16;
/// What a message weighs besides its body.
const ROW_WEIGHT: usize = 500;

async fn enqueue_as_usual(
    connection: &mut PgConnection,
    calls: &[&Enqueue],
    pumps: &Pumps,
    patience: Patience,
) -> Committed<EnqueueOutcome> {
    if at_once::suits(calls)
        && let Some(done) = at_once::take_in(connection, calls, pumps).await?
    {
        return Ok(done);
    }
    enqueue(connection, calls, pumps, (Care::Usual, patience)).await
}

async fn enqueue(
    connection: &mut PgConnection,
    calls: &[&Enqueue],
    pumps: &Pumps,
    care: (Care, Patience),
) -> Committed<EnqueueOutcome> {
    let mut transaction = connection.begin().await.map_err(Trouble::unbegun)?;
    let messages = || calls.iter().flat_map(|call| &call.messages);
    let subscribed = Subscribed::to_those_of(&mut transaction, messages()).await?;
    let arrivals = arrivals(&subscribed, messages());
    let batches = calls.iter().filter_map(|call| batch(call)).collect::<Vec<_>>();
    let facts = Facts::find(&mut transaction, &arrivals, &batches, care).await?;
    let mut plan = Plan::new(facts, pumps);
    let mut arrivals = arrivals.into_iter();
    let outcomes = calls.iter().map(|call| plan_call(&mut plan, call, &mut arrivals));
    let outcomes = outcomes.collect::<Vec<_>>();
    let Written { word, handed } = plan.write(&mut transaction).await?;
    transaction.commit().await?;
    count_enqueued(&outcomes);
    Ok(Done { answers: outcomes, word, handed })
}

fn plan_call<'a>(
    plan: &mut Plan<'a>,
    call: &'a Enqueue,
    arrivals: &mut impl Iterator<Item = Arrival<'a>>,
) -> EnqueueOutcome {
    let arrivals = arrivals.take(call.messages.len()).collect::<Vec<_>>();
    let batch = batch(call);
    if let Some((queue, key)) = &batch
        && plan.known(*queue, key).is_some_and(|known| !known.is_for(key))
    {
        return EnqueueOutcome::BatchKeyReused;
    }
    let mark = plan.mark();
    let answers = arrivals.into_iter().map(|arrival| plan.take_in(arrival)).collect::<Vec<_>>();
    let refusals = refusals(&answers);
    if call.atomic && !refusals.is_empty() {
        plan.undo(mark);
        return EnqueueOutcome::Refused(refusals);
    }
    if let Some((queue, key)) = batch
        && answers.iter().any(is_new)
    {
        plan.remember_batch(queue, key);
    }
    EnqueueOutcome::Done(answers)
}

/// A key over a whole batch as it is kept, with the queue of the first message, or none for a topic.
fn batch(call: &Enqueue) -> Option<(Option<&QueueName>, Idempotency)> {
    let (key, first) = call.batch.zip(call.messages.first())?;
    Some(match &first.to {
        Destination::Queue(queue) => (Some(queue), key),
        Destination::Topic { topic, .. } => (None, topics::key_of(topic, &key)),
    })
}

/// What is going to be written.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    facts: Facts,
    pumps: &'a Pumps,
    rows: Vec<NewRow<'a>>,
    keys: Vec<(KeyName, Key)>,
    /// Payloads that several of the rows have.
    shared: Vec<(i64, Bytes)>,
}

#[derive(Debug)]
struct NewRow<'a> {
    seq: i64,
    queue_id: i32,
    queue: QueueName,
    message: Incoming<'a>,
    /// Where its payload is, if it is that of others too.
    shared: Option<i64>,
    due_at: i64,
    expires_at: Option<i64>,
    group: Option<i64>,
    /// With which it is stored, because somebody has a place for it. Its sender is told `ready` all the same.
    lease: Option<NewLease>,
}

/// What was written of a plan.
pub(super) struct Written {
    /// What there is to tell.
    pub(super) word: Word,
    /// What is to be handed over once it is committed.
    pub(super) handed: Vec<(Place, Leased)>,
}

/// A place in a plan to which it can be undone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    rows: usize,
    keys: usize,
    shared: usize,
}

impl<'a> Plan<'a> {
    /// An empty plan over these facts.
    pub(super) fn new(facts: Facts, pumps: &'a Pumps) -> Self {
        Self { facts, pumps, rows: Vec::new(), keys: Vec::new(), shared: Vec::new() }
    }

    /// Takes a message in, or says why not, or that it is here already.
    pub(super) fn take_in(&mut self, arrival: Arrival<'a>) -> Enqueued {
        match arrival {
            Arrival::Message(item) => self.take_into(item),
            Arrival::Publication(publication) => self.publish(publication),
        }
    }

    fn take_into(&mut self, item: Item<'a>) -> Enqueued {
        let Some(queue) = self.facts.queues.get(&item.queue) else {
            return Enqueued::Refused(Refusal::NoSuchQueue(item.queue.clone()));
        };
        let queue_id = queue.id;
        if let Some(answer) = self.known_already(&item) {
            return answer;
        }
        let full = queue.max.is_some_and(|max| self.facts.unsettled.get(&queue_id) >= Some(&max));
        if full {
            return Enqueued::Refused(Refusal::QueueFull(item.queue.clone()));
        }
        *self.facts.unsettled.entry(queue_id).or_default() += 1;
        self.add(queue_id, item)
    }

    /// Takes a copy into each queue that wants the message; all of them or none. Queues that were deleted since they
    /// were looked up want nothing.
    fn publish(&mut self, publication: Publication<'a>) -> Enqueued {
        let Publication { topic, message, require_subscribers, mut copies } = publication;
        let keys = topics::keys_of(topic, message);
        let known = |key: &Idempotency| self.known(None, key);
        if keys.iter().any(|key| known(key).is_some_and(|known| !known.is_for(key))) {
            return Enqueued::Refused(Refusal::KeyReused);
        }
        if let Some(Answer::Published(first)) =
            keys.iter().find_map(|key| Some(known(key)?.answer.clone()))
        {
            return Enqueued::Published(Published { duplicate: true, ..first });
        }
        copies.retain(|item| self.facts.queues.contains_key(&item.queue));
        if copies.is_empty() && require_subscribers {
            return Enqueued::Refused(Refusal::NoSubscribers(topic.clone()));
        }
        let mark = self.mark();
        let (topic, id) = (topic.clone(), message.id);
        let mut published = Published { topic, id, copies: Vec::new(), duplicate: false };
        for item in copies {
            let queue = item.queue.clone();
            let (id, was_there) = match self.take_into(item) {
                Enqueued::New(receipt) => (receipt.id, false),
                Enqueued::Duplicate(receipt) => (receipt.id, true),
                refused => {
                    self.undo(mark);
                    return refused;
                }
            };
            published.copies.push(Copied { queue, id, was_there });
        }
        if let Some(shared) = self.rows[mark.rows..].iter().find_map(|row| row.shared) {
            self.shared.push((shared, message.body.clone()));
        }
        for key in keys {
            let row = self.facts.key(None, &key, Of::Published(&published));
            self.remember(row, Answer::Published(published.clone()));
        }
        Enqueued::Published(published)
    }

    /// Where the plan stands now.
    pub(super) fn mark(&self) -> Mark {
        Mark { rows: self.rows.len(), keys: self.keys.len(), shared: self.shared.len() }
    }

    /// Takes back what was planned since then.
    pub(super) fn undo(&mut self, mark: Mark) {
        for row in self.rows.drain(mark.rows..) {
            *self.facts.unsettled.entry(row.queue_id).or_default() -= 1;
            self.facts.named.remove(&row.message.id);
        }
        self.shared.truncate(mark.shared);
        for (key, _) in self.keys.drain(mark.keys..) {
            self.facts.known.remove(&key);
        }
    }

    fn known(&self, queue: Option<&QueueName>, key: &Idempotency) -> Option<&Known> {
        let queue_id = match queue {
            Some(queue) => self.facts.queues.get(queue)?.id,
            None => OF_TOPICS as i32,
        };
        self.facts.known.get(&(queue_id, key.key))
    }

    /// The answer to a message that has come before, by a key or by its name.
    fn known_already(&self, item: &Item<'_>) -> Option<Enqueued> {
        let message = &item.message;
        let known = |key: &Idempotency| self.known(Some(&item.queue), key);
        if message.keys.iter().any(|key| known(key).is_some_and(|known| !known.is_for(key))) {
            return Some(Enqueued::Refused(Refusal::KeyReused));
        }
        let by_key = message.keys.iter().find_map(|key| match &known(key)?.answer {
            Answer::Message(receipt) => Some(receipt),
            Answer::Nothing | Answer::Published(_) => None,
        });
        let answer = by_key.or_else(|| self.facts.named.get(&message.id))?;
        Some(Enqueued::Duplicate(answer.clone()))
    }

    fn add(&mut self, queue_id: i32, item: Item<'a>) -> Enqueued {
        let (now, message) = (self.facts.now, &item.message);
        let due_at = rows::resolve(message.deliver, now);
        let receipt = Receipt {
            id: message.id,
            queue: item.queue.clone(),
            state: rows::waiting_state(due_at, now),
            enqueued_at: rows::moment(now).unwrap_or_default(),
            deliver_at: rows::moment(due_at).unwrap_or_default(),
        };
        for key in &message.keys {
            let row = self.facts.key(Some(&item.queue), key, Of::Item(&item));
            self.remember(row, Answer::Message(receipt.clone()));
        }
        self.facts.named.insert(message.id, receipt.clone());
        let expires_at = message.expires.map(|when| rows::resolve(when, now));
        let has_expired = expires_at.is_some_and(|at| at <= now);
        let group = message.details.group_number();
        let waits = due_at > now || has_expired || group.is_some();
        let lease = if waits { None } else { self.lease(&item.queue) };
        self.rows.push(NewRow {
            seq: self.facts.seqs[item.place],
            queue_id,
            shared: item.shared.map(|first| self.facts.seqs[first]),
            queue: item.queue,
            message: item.message,
            due_at,
            expires_at,
            group,
            lease,
        });
        Enqueued::New(receipt)
    }

    /// A lease for a new message that is due, where somebody has a place for it and no other message comes
    /// first. Those that other transactions are just taking in do not come first: there is no order between
    /// what is sent at the same time.
    fn lease(&mut self, queue: &QueueName) -> Option<NewLease> {
        let facts = self.facts.queues.get_mut(queue)?;
        let lease = if facts.others_wait { None } else { self.pumps.lease(queue, &self.facts) };
        // What is not handed over comes first for those after it.
        self.facts.queues.get_mut(queue)?.others_wait |= lease.is_none();
        lease
    }

    fn remember_batch(&mut self, queue: Option<&QueueName>, key: Idempotency) {
        let row = self.facts.key(queue, &key, Of::Nothing);
        self.remember(row, Answer::Nothing);
    }

    fn remember(&mut self, key: Option<(KeyName, Key)>, answer: Answer) {
        let Some((name, key)) = key else { return };
        self.facts.known.insert(name, Known { fingerprint: key.fingerprint, answer });
        self.keys.push((name, key));
    }

    /// Writes it, and says what is to be done about it once it is committed.
    pub(super) async fn write(self, connection: &mut PgConnection) -> Result<Written, Trouble> {
        if !self.rows.is_empty() {
            self.write_messages(connection).await?;
        }
        let now = self.facts.now;
        self.facts.correct_keys(connection, self.keys).await?;
        let schedule = self.rows.iter().any(|row| row.due_at > now);
        let ready = self.rows.iter().filter(|row| row.due_at <= now && row.lease.is_none());
        let ready = ready.map(|row| row.queue.clone());
        let word = Word { schedule, ..Word::of_ready(ready) };
        let handed = self.rows.into_iter().filter_map(|row| row.handed(now)).collect();
        Ok(Written { word, handed })
    }

    async fn write_messages(&self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let rows = &self.rows;
        let details = rows.iter().map(|row| {
            serde_json::to_string(&row.message.details)
                .expect("details are text, which is always JSON")
        });
        let leases = || rows.iter().map(|row| row.lease.as_ref());
        let all_leased = leases().all(|lease| lease.is_some());
        query(if all_leased { INSERT_LEASED } else { INSERT })
            .bind(self.facts.now)
            .bind(rows.iter().map(|row| row.seq).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.message.id.0).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.queue_id).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| -i16::from(row.message.priority)).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.due_at).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.expires_at).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.message.body.len() as i64).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.message.kind.as_deref()).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.message.correlation_id.as_deref()).collect::<Vec<_>>())
            .bind(details.collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.own_body()).collect::<Vec<&[u8]>>())
            .bind(leases().map(|it| it.map(|it| it.chance)).collect::<Vec<_>>())
            .bind(leases().map(|it| it.map(|it| it.until.0)).collect::<Vec<_>>())
            .bind(leases().map(|it| it.map(|it| it.incarnation)).collect::<Vec<_>>())
            .bind(leases().map(|it| it.map(|it| it.place.replica.as_str())).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.group).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| at_once::lane(&row.message)).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| row.shared).collect::<Vec<_>>())
            .bind(self.shared.iter().map(|(id, _)| *id).collect::<Vec<_>>())
            .bind(self.shared.iter().map(|(_, body)| body.as_ref()).collect::<Vec<&[u8]>>())
            .execute(connection)
            .await
            .map(drop)
    }
}

impl NewRow<'_> {
    /// The payload, unless it is kept elsewhere.
    fn own_body(&self) -> &[u8] {
        if self.shared.is_some() { &[] } else { self.message.body.as_ref() }
    }

    /// What goes to the place that was kept for it, if there was one.
    fn handed(self, now: i64) -> Option<(Place, Leased)> {
        let lease = self.lease?;
        let now = rows::moment(now).unwrap_or_default();
        let expires_at = self.expires_at.and_then(|at| rows::moment(at).ok());
        Some(lease.handed(self.seq, (&self.queue, &self.message), now, expires_at))
    }
}

impl Pumps {
    /// A lease for a pump of this process that has room for one more message of the queue.
    fn lease(&self, queue: &QueueName, facts: &Facts) -> Option<NewLease> {
        let place = Place::keep(&self.handover, queue)?;
        let incarnation = |replica: &ReplicaName| self.incarnations.of(replica);
        Some(NewLease::new(place, incarnation, facts.chance, (facts.now, facts.asked)))
    }
}

/// Lives on: the primary keys of message, content and shared, at their ends, and of lease.
macro_rules! insert {
    ($others:literal) => {
        concat!(
            "\
with given as (
    select *
    from unnest(
            $2::bigint[], $3::uuid[], $4::integer[], $5::smallint[], $6::bigint[], $7::bigint[],
            $8::bigint[], $13::bigint[], $14::bigint[], $15::bigint[], $16::text[], $17::bigint[],
            $18::integer[]
        ) as given (
            seq, id, queue_id, rank, due_at, expires_at, size, chance, until, incarnation, replica, grp,
            lane
        )
),
messages as (
    insert into message (
        seq, id, queue_id, state, rank, due_at, attempts, failures, crashes, enqueued_at, expires_at, size,
        grp, lane
    )
    select seq, id, queue_id, 0, rank, due_at, 0, 0, 0, $1, expires_at, size, grp, lane
    from given
),
contents as (
    insert into content (seq, deliver_at, kind, correlation_id, details, body, shared)
    select *
    from unnest(
        $2::bigint[], $6::bigint[], $9::text[], $10::text[], $11::text[], $12::bytea[], $19::bigint[]
    )
),
shared_bodies as (
    insert into shared (id, body)
    select *
    from unnest($20::bigint[], $21::bytea[])
)",
            $others,
            "
insert into lease (seq, token, incarnation, leased_at, until, queue_id, attempt, replica)
select seq, chance + seq, incarnation, $1, until, queue_id, 1, replica
from given
where chance is not null"
        )
    };
}

// Lives on: see `insert`; and the primary keys of ready, scheduled and behind. Of a group that gets several messages
// one token says so, because all of them are seen from the same moment on.
const INSERT: &str = insert!(
    ",
due as (
    insert into ready (queue_id, rank, lane, due_at, seq, expires_at, urgent)
    select queue_id, rank, lane, due_at, seq, expires_at, false
    from given
    where due_at <= $1
        and chance is null
        and grp is null
),
later as (
    insert into scheduled (due_at, seq, queue_id, rank, lane, expires_at)
    select due_at, seq, queue_id, rank, lane, expires_at
    from given
    where due_at > $1
),
lined_up as (
    insert into behind (queue_id, grp, seq, due_at, lane, expires_at)
    select queue_id, grp, seq, due_at, lane, expires_at
    from given
    where grp is not null
),
announced as (
    insert into ready (queue_id, rank, lane, due_at, seq, grp, urgent)
    select queue_id, 0, (array_agg(lane order by seq))[1], $1, nextval('message_seq'), grp, false
    from given
    where grp is not null
    group by queue_id, grp
)"
);

// Lives on: see `insert`. For messages that are all handed over: the tables that it leaves out would each cost
// a call of their triggers.
const INSERT_LEASED: &str = insert!("");

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[INSERT, INSERT_LEASED];
