//! What there is to know before messages are taken in: the time, the queues, and what has come before.
//!
//! Keys are put down first and asked about afterwards, because that is how the second of two
//! transactions with the same key waits for the first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, Row, query};
use uuid::Uuid;

use crate::model::{Idempotency, Lasts, MessageId, QueueName, State};

use super::super::columns::{OF_TOPICS, WHILE_PENDING};
use super::super::{Published, Receipt, TOPIC_WINDOW, topics};
use super::arrivals::{Arrival, Item, ids, items};
use super::fault::{Trouble, unreadable};
use super::open::LOCK_TIMEOUT;
use super::rows;

/// How careful to be with messages that are sent again under the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Care {
    /// They are not expected; one fails the transaction.
    Usual,
    /// They are looked up, and answered with the first one's receipt.
    Names,
}

/// How long to wait for somebody who has put down the same key in a transaction that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// For a commit that is under way: others wait for this transaction.
    Short,
    /// As long as for any lock: nobody waits but the sender.
    Long,
}

impl Patience {
    /// As the database takes it.
    fn lock_timeout(self) -> &'static str {
        match self {
            Self::Short => "250ms",
            Self::Long => LOCK_TIMEOUT,
        }
    }
}

/// What there is to know before messages are taken in.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) now: i64,
    /// A moment shortly before that, by the monotonic clock of this process.
    pub(super) asked: Instant,
    /// What the tokens of the leases that are given together with these messages are made of.
    pub(super) chance: i64,
    /// A number for each item, by its place. One that is not used leaves a gap, which nobody minds.
    pub(super) seqs: Vec<i64>,
    pub(super) queues: HashMap<QueueName, Queue>,
    /// How many unsettled messages the queues with a limit have.
    pub(super) unsettled: HashMap<i32, i64>,
    /// The keys that were put down for these messages, in this transaction.
    put_down: BTreeMap<KeyName, Key>,
    /// The keys that others put down before, and that count.
    pub(super) known: HashMap<KeyName, Known>,
    /// The messages that are there by name, where somebody looked.
    pub(super) named: HashMap<MessageId, Receipt>,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) id: i32,
    window: i64,
    pub(super) max: Option<i64>,
    /// Whether messages of it are ready that come before new ones.
    pub(super) others_wait: bool,
}

/// A key is known to one queue.
pub(super) type KeyName = (i32, [u8; 16]);

/// What is remembered of a key.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) fingerprint: [u8; 32],
    pub(super) answer: Answer,
}

/// What was answered to the request with a key.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    /// It was over a whole batch, and has no answer of its own.
    Nothing,
    Message(Receipt),
    Published(Published),
}

/// What a key is of.
#[derive(Debug, Clone, Copy)]
pub(super) enum Of<'i, 'a> {
    /// A whole batch.
    Nothing,
    Item(&'i Item<'a>),
    Published(&'i Published),
}

impl Known {
    pub(super) fn is_for(&self, key: &Idempotency) -> bool {
        self.fingerprint == key.fingerprint
    }
}

/// A key as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) fingerprint: [u8; 32],
    seq: i64,
    id: Uuid,
    deliver_at: i64,
    expires_at: i64,
    sweep_at: i64,
    answer: Option<String>,
}

// Locks the names of queues against being deleted meanwhile, and not against each other.
const ENTER: &str = "\
select pg_advisory_xact_lock_shared($1, hashtext(name))
from unnest($2::text[]) as name";

// Lives on: queue_name_key, and the primary key of ready.
const SITUATION: &str = "\
select given.now, given.seqs, queue.id, queue.name, queue.dedup_window, queue.max_messages,
    waiting.seq is not null as others_wait
from (
    select now_micros() as now, array(select nextval('message_seq') from generate_series(1, $1)) as seqs
) as given
left join queue on queue.name = any($2)
left join lateral (
    select seq
    from ready
    where ready.queue_id = queue.id
    order by queue_id, rank, lane, due_at, seq
    limit 1
) as waiting on true";

// Locks the queues that have a limit, one transaction at a time.
const LINE_UP: &str = "\
select pg_advisory_xact_lock($1, queue_id)
from unnest($2::integer[]) as queue_id";

// Lives on: tally, read whole; it is folded to a few rows for each queue.
const UNSETTLED: &str = "\
select queue_id, sum(n)::bigint as n
from tally
where queue_id = any($1)
    and state in (0, 1, 2, 8)
group by queue_id";

/// The keys that are named in `$1` and `$2`, each looked up by itself. Lives on: the primary key of
/// idempotency.
macro_rules! named_keys {
    () => {
        "\
from unnest($1::integer[], $2::bytea[]) as named (queue_id, key)
cross join lateral (
    select idempotency.ctid as tid, idempotency.*
    from idempotency
    where idempotency.queue_id = named.queue_id
        and idempotency.key = named.key
    limit 1
) as known"
    };
}

// Lives on: see `named_keys`, and the primary key of message. A key counts in its window, and as long as
// its message can still be delivered or is dead; one that expires at -1 as long as it can be delivered. From here until
// the keys are put down, nobody is waited for longer than $4.
const FORGET_KEYS: &str = concat!(
    "delete from idempotency
where (select set_config('lock_timeout', $4, true)) is not null
    and ctid = any(array(select known.tid ",
    named_keys!(),
    "))
    and expires_at <= $3
    and coalesce((
        select case when idempotency.expires_at < 0 then state <> 0 else state not in (0, 5) end
        from message
        where message.seq = idempotency.seq
    ), true)"
);

// Lives on: the primary key of idempotency. Waits for a transaction that has put down the same key. Its last row says
// nothing: it sets the patience with locks to what it is elsewhere.
const PUT_KEYS_DOWN: &str = "\
with put_down as (
    insert into idempotency (
        queue_id, key, fingerprint, seq, id, enqueued_at, deliver_at, expires_at, sweep_at, answer
    )
    select queue_id, key, fingerprint, seq, id, $1, deliver_at, expires_at, sweep_at, answer
    from unnest(
            $2::integer[], $3::bytea[], $4::bytea[], $5::bigint[], $6::uuid[], $7::bigint[], $8::bigint[],
            $9::bigint[], $10::text[]
        ) as given (queue_id, key, fingerprint, seq, id, deliver_at, expires_at, sweep_at, answer)
    on conflict (queue_id, key) do nothing
    returning queue_id, key
)
select queue_id, key
from put_down
union all
select null, null
where set_config('lock_timeout', $11, true) is null";

// Lives on: see `named_keys`.
const KNOWN_KEYS: &str = concat!("select known.* ", named_keys!());

// Lives on: see `named_keys`.
const DROP_KEYS: &str = concat!(
    "delete from idempotency\nwhere ctid = any(array(select known.tid ",
    named_keys!(),
    "))"
);

// Lives on: message_id, then the primary keys of queue and content.
const KNOWN_NAMES: &str = "\
select message.id, message.enqueued_at, content.deliver_at, queue.name
from unnest($1::uuid[]) as given (id)
cross join lateral (select * from message where message.id = given.id limit 1) as message
join queue on queue.id = message.queue_id
cross join lateral (select * from content where content.seq = message.seq limit 1) as content";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[
    ENTER,
    SITUATION,
    LINE_UP,
    UNSETTLED,
    FORGET_KEYS,
    PUT_KEYS_DOWN,
    KNOWN_KEYS,
    DROP_KEYS,
    KNOWN_NAMES,
];

/// After how long such a key is looked at for the first time, to be forgotten: a minute, in microseconds.
const LOOKED_AT_AFTER: i64 = 60_000_000;

/// The class of advisory locks on the names of queues: shared to take messages in, exclusive to delete.
pub(super) const LOCK_NAMES: i32 = 0x7075_6d70;
/// The class of advisory locks on the numbers of queues that have a limit.
const LOCK_LIMITS: i32 = 0x7075_6d71;

impl Facts {
    /// Finds out what there is to know about these arrivals and these keys over batches (of a queue, or of a topic),
    /// and locks what must not change until the end of the transaction.
    pub(super) async fn find(
        connection: &mut PgConnection,
        arrivals: &[Arrival<'_>],
        batches: &[(Option<&QueueName>, Idempotency)],
        (care, patience): (Care, Patience),
    ) -> Result<Self, Trouble> {
        let mut facts = Self::situation(connection, arrivals).await?;
        facts.put_keys_down(connection, arrivals, batches, patience).await?;
        facts.count(connection).await?;
        if care == Care::Names {
            facts.find_names(connection, arrivals).await?;
        }
        Ok(facts)
    }

    async fn situation(
        connection: &mut PgConnection,
        arrivals: &[Arrival<'_>],
    ) -> sqlx::Result<Self> {
        let names = sorted_names(items(arrivals).map(|item| &item.queue));
        enter(connection, &names).await?;
        let count = i32::try_from(items(arrivals).count()).unwrap_or(i32::MAX);
        let asked = Instant::now();
        let rows = query(SITUATION).bind(count).bind(&names).fetch_all(connection).await?;
        let first = rows.first().ok_or_else(|| unreadable("there is no time"))?;
        let (now, seqs) = (first.try_get("now")?, first.try_get("seqs")?);
        let queues = rows.iter().filter_map(|row| queue(row).transpose());
        Ok(Self {
            now,
            asked,
            chance: rows::chance()?,
            seqs,
            queues: queues.collect::<sqlx::Result<_>>()?,
            unsettled: HashMap::new(),
            put_down: BTreeMap::new(),
            known: HashMap::new(),
            named: HashMap::new(),
        })
    }

    async fn put_keys_down(
        &mut self,
        connection: &mut PgConnection,
        arrivals: &[Arrival<'_>],
        batches: &[(Option<&QueueName>, Idempotency)],
        patience: Patience,
    ) -> Result<(), Trouble> {
        let mut wanted = BTreeMap::new();
        let mut want = |key: Option<(KeyName, Key)>| {
            if let Some((name, key)) = key {
                wanted.entry(name).or_insert(key);
            }
        };
        for arrival in arrivals {
            for item in arrival.items() {
                let keys = item.message.keys.iter();
                keys.for_each(|key| want(self.key(Some(&item.queue), key, Of::Item(item))));
            }
            if let Arrival::Publication(publication) = arrival {
                let answer = publication.answer();
                let keys = topics::keys_of(publication.topic, publication.message);
                keys.iter().for_each(|key| want(self.key(None, key, Of::Published(&answer))));
            }
        }
        for (queue, key) in batches {
            want(self.key(*queue, key, Of::Nothing));
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let forget = bind_names(query(FORGET_KEYS), wanted.keys().copied()).bind(self.now);
        let forget = forget.bind(patience.lock_timeout());
        forget.execute(&mut *connection).await.map_err(Trouble::of_a_key)?;
        let put_down = put_keys_down(connection, self.now, &wanted).await;
        for name in put_down.map_err(Trouble::of_a_key)? {
            let key = wanted.remove(&name).ok_or(Trouble::Overtaken)?;
            self.put_down.insert(name, key);
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let known = bind_names(query(KNOWN_KEYS), wanted.keys().copied());
        for row in known.fetch_all(connection).await? {
            self.known.insert(key_name(&row)?, self.known_key(&row)?);
        }
        // One was forgotten between our putting it down and our looking at it.
        if wanted.keys().any(|name| !self.known.contains_key(name)) {
            return Err(Trouble::Overtaken);
        }
        Ok(())
    }

    async fn count(&mut self, connection: &mut PgConnection) -> sqlx::Result<()> {
        let limited = self.queues.values().filter(|queue| queue.max.is_some());
        let mut limited = limited.map(|queue| queue.id).collect::<Vec<_>>();
        if limited.is_empty() {
            return Ok(());
        }
        limited.sort_unstable();
        query(LINE_UP).bind(LOCK_LIMITS).bind(&limited).execute(&mut *connection).await?;
        for row in query(UNSETTLED).bind(&limited).fetch_all(connection).await? {
            self.unsettled.insert(row.try_get("queue_id")?, row.try_get("n")?);
        }
        Ok(())
    }

    async fn find_names(
        &mut self,
        connection: &mut PgConnection,
        arrivals: &[Arrival<'_>],
    ) -> sqlx::Result<()> {
        let names = ids(arrivals).into_iter().map(|id| id.0).collect::<Vec<_>>();
        for row in query(KNOWN_NAMES).bind(names).fetch_all(connection).await? {
            let receipt = receipt(&row, rows::queue_name(row.try_get("name")?)?)?;
            self.named.insert(receipt.id, receipt);
        }
        Ok(())
    }

    /// A key as it would be written in this queue, or for a topic; `None` where there is no such queue.
    pub(super) fn key(
        &self,
        queue: Option<&QueueName>,
        key: &Idempotency,
        of: Of<'_, '_>,
    ) -> Option<(KeyName, Key)> {
        let (queue_id, window) = match queue {
            Some(queue) => self.queues.get(queue).map(|queue| (queue.id, queue.window))?,
            None => (OF_TOPICS as i32, rows::span(TOPIC_WINDOW)),
        };
        let item = match of {
            Of::Item(item) => Some(item),
            Of::Nothing | Of::Published(_) => None,
        };
        let answer = match of {
            Of::Published(published) => Some(published.kept()),
            Of::Nothing | Of::Item(_) => None,
        };
        let due_at = item.map_or(self.now, |item| rows::resolve(item.message.deliver, self.now));
        let (expires_at, sweep_at) = match key.lasts {
            Lasts::Window => {
                let expires_at = self.now.saturating_add(window);
                (expires_at, expires_at)
            }
            Lasts::WhilePending => (WHILE_PENDING, self.now.saturating_add(LOOKED_AT_AFTER)),
        };
        let row = Key {
            fingerprint: key.fingerprint,
            seq: item.map_or(0, |item| self.seqs[item.place]),
            id: item.map_or(Uuid::nil(), |item| item.message.id.0),
            deliver_at: due_at,
            expires_at,
            sweep_at,
            answer,
        };
        Some(((queue_id, key.key), row))
    }

    /// Takes back the keys of messages that are not taken in after all, and puts down those that took their
    /// place.
    pub(super) async fn correct_keys(
        &self,
        connection: &mut PgConnection,
        planned: Vec<(KeyName, Key)>,
    ) -> sqlx::Result<()> {
        let planned = planned.into_iter().collect::<BTreeMap<_, _>>();
        let wrong = self.put_down.iter().filter(|(name, key)| planned.get(name) != Some(key));
        let wrong = wrong.map(|(name, _)| *name).collect::<Vec<_>>();
        if !wrong.is_empty() {
            bind_names(query(DROP_KEYS), wrong.into_iter()).execute(&mut *connection).await?;
        }
        let missing =
            planned.into_iter().filter(|(name, key)| self.put_down.get(name) != Some(key));
        put_keys_down(connection, self.now, &missing.collect()).await.map(drop)
    }

    fn known_key(&self, row: &PgRow) -> sqlx::Result<Known> {
        let queue_id: i32 = row.try_get("queue_id")?;
        let seq: i64 = row.try_get("seq")?;
        let queue = self.queues.iter().find(|(_, queue)| queue.id == queue_id);
        let answer = match (row.try_get::<Option<&str>, _>("answer")?, queue) {
            (Some(kept), _) => Answer::Published(Published::again(kept)?),
            (None, Some((name, _))) if seq != 0 => Answer::Message(receipt(row, name.clone())?),
            (None, _) => Answer::Nothing,
        };
        Ok(Known { fingerprint: bytes(row.try_get("fingerprint")?)?, answer })
    }
}

/// Keeps these queues from being deleted until the end of the transaction.
pub(super) async fn lock_names<'a>(
    connection: &mut PgConnection,
    queues: impl Iterator<Item = &'a QueueName>,
) -> sqlx::Result<()> {
    let names = queues.map(QueueName::as_str).collect::<BTreeSet<_>>();
    if names.is_empty() {
        return Ok(());
    }
    enter(connection, &names.into_iter().collect::<Vec<_>>()).await
}

async fn enter(connection: &mut PgConnection, names: &[&str]) -> sqlx::Result<()> {
    query(ENTER).bind(LOCK_NAMES).bind(names).execute(connection).await.map(drop)
}

/// The names of these queues, each once, in one order everywhere, so that nobody who locks them waits for each other.
pub(super) fn sorted_names<'a>(queues: impl Iterator<Item = &'a QueueName>) -> Vec<&'a str> {
    let mut names = queues.map(QueueName::as_str).collect::<Vec<_>>();
    names.sort_unstable();
    names.dedup();
    names
}

fn queue(row: &PgRow) -> sqlx::Result<Option<(QueueName, Queue)>> {
    let Some(id) = row.try_get("id")? else { return Ok(None) };
    let (window, max) = (row.try_get("dedup_window")?, row.try_get("max_messages")?);
    let name = rows::queue_name(row.try_get("name")?)?;
    let others_wait = row.try_get("others_wait")?;
    Ok(Some((name, Queue { id, window, max, others_wait })))
}

async fn put_keys_down(
    connection: &mut PgConnection,
    now: i64,
    keys: &BTreeMap<KeyName, Key>,
) -> sqlx::Result<Vec<KeyName>> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    // The map is sorted, so that two transactions with the same keys come to them in the same order.
    let rows = query(PUT_KEYS_DOWN)
        .bind(now)
        .bind(keys.keys().map(|(queue_id, _)| *queue_id).collect::<Vec<_>>())
        .bind(keys.keys().map(|(_, key)| key.as_slice()).collect::<Vec<_>>())
        .bind(keys.values().map(|key| key.fingerprint.as_slice()).collect::<Vec<_>>())
        .bind(keys.values().map(|key| key.seq).collect::<Vec<_>>())
        .bind(keys.values().map(|key| key.id).collect::<Vec<_>>())
        .bind(keys.values().map(|key| key.deliver_at).collect::<Vec<_>>())
        .bind(keys.values().map(|key| key.expires_at).collect::<Vec<_>>())
        .bind(keys.values().map(|key| key.sweep_at).collect::<Vec<_>>())
        .bind(keys.values().map(|key| key.answer.as_deref()).collect::<Vec<_>>())
        .bind(LOCK_TIMEOUT)
        .fetch_all(connection)
        .await?;
    rows.iter().map(key_name).collect()
}

type Statement = sqlx::query::Query<'static, sqlx::Postgres, sqlx::postgres::PgArguments>;

fn bind_names(statement: Statement, names: impl Iterator<Item = KeyName>) -> Statement {
    let (queues, keys): (Vec<_>, Vec<_>) =
        names.map(|(queue_id, key)| (queue_id, key.to_vec())).unzip();
    statement.bind(queues).bind(keys)
}

/// The first answer, made again from what was kept of it.
fn receipt(row: &PgRow, queue: QueueName) -> sqlx::Result<Receipt> {
    let (enqueued_at, deliver_at): (i64, i64) =
        (row.try_get("enqueued_at")?, row.try_get("deliver_at")?);
    let state: State = rows::waiting_state(deliver_at, enqueued_at);
    Ok(Receipt {
        id: rows::message_id(row)?,
        queue,
        state,
        enqueued_at: rows::moment(enqueued_at)?,
        deliver_at: rows::moment(deliver_at)?,
    })
}

fn key_name(row: &PgRow) -> sqlx::Result<KeyName> {
    Ok((row.try_get("queue_id")?, bytes(row.try_get("key")?)?))
}

fn bytes<const N: usize>(bytes: &[u8]) -> sqlx::Result<[u8; N]> {
    bytes.try_into().map_err(|_| unreadable("a key has another length"))
}
