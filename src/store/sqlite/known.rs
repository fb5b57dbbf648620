//! What the database knows of messages that are to be taken in: their keys, and, for those who have to be careful, their
//! names.

use sqlx::{Row, query};

use crate::model::{Destination, Idempotency, NewMessage, QueueName};

use super::super::columns::OF_TOPICS;
use super::super::{Enqueue, Published, Receipt, topics};
use super::desk::Desk;
use super::enqueue::{Answer, Known, Plan, batch_key, batch_queue};
use super::fault::unreadable;
use super::{rows, surgery};

// Lives on: the primary keys of idempotency and message. A key counts in its window, and as long as
// its message can still be delivered or is dead.
const KNOWN_KEYS: &str = "\
select idempotency.queue_id, idempotency.key, idempotency.fingerprint, idempotency.seq,
    idempotency.id, idempotency.enqueued_at, idempotency.deliver_at, idempotency.answer
from json_each(?1) as wanted
cross join idempotency
    on idempotency.queue_id = wanted.value ->> 0
    and idempotency.key = unhex(wanted.value ->> 1)
left join message
    on message.seq = idempotency.seq
    and message.id = idempotency.id
where idempotency.expires_at > ?2
    or message.state in (0, 1, 2)
    or (message.state = 5 and idempotency.expires_at >= 0)";

// Lives on: message_id, then the primary keys of content and queue.
const KNOWN_NAMES: &str = "\
select message.seq, message.queue_id, message.id, message.enqueued_at,
    coalesce(content.deliver_at, message.due_at) as deliver_at, queue.id is null as doomed
from json_each(?) as wanted
cross join message on message.id = unhex(wanted.value)
left join content on content.seq = message.seq
left join queue on queue.id = message.queue_id";

impl Plan<'_> {
    pub(super) async fn load_keys(
        &mut self,
        desk: &mut Desk,
        messages: &[&NewMessage],
        calls: &[&Enqueue],
    ) -> sqlx::Result<()> {
        let mut wanted = Vec::new();
        let mut want = |queue: &QueueName, keys: &[Idempotency]| {
            let Ok(Some(queue)) = desk.queues.named(queue) else { return };
            wanted.extend(keys.iter().map(|key| (queue.id, rows::hex(&key.key))));
        };
        let mut of_topics = Vec::new();
        for message in messages.iter().filter(|message| !message.keys.is_empty()) {
            match &message.to {
                Destination::Queue(queue) => want(queue, &message.keys),
                Destination::Topic { topic, .. } => {
                    of_topics.extend(topics::keys_of(topic, message));
                    let copies = desk.queues.copies_of(topic, message);
                    copies.iter().for_each(|(queue, copy)| want(queue, &copy.keys));
                }
            }
        }
        wanted.extend(of_topics.iter().map(|key| (OF_TOPICS, rows::hex(&key.key))));
        let batches = calls.iter().filter_map(|call| batch_key(call).zip(batch_queue(desk, call)));
        wanted.extend(batches.map(|(key, queue_id)| (queue_id, rows::hex(&key.key))));
        if wanted.is_empty() {
            return Ok(());
        }
        let known = query(KNOWN_KEYS).bind(rows::json(&wanted)).bind(desk.now);
        for row in known.fetch_all(&mut desk.connection).await? {
            let seq: i64 = row.try_get("seq")?;
            let answer = match row.try_get::<Option<&str>, _>("answer")? {
                Some(kept) => Answer::Published(Published::again(kept)?),
                None if seq == 0 => Answer::Nothing,
                None => Answer::Message(receipt(desk, &row)?),
            };
            let known = Known { fingerprint: bytes(row.try_get("fingerprint")?)?, answer };
            self.known.insert((row.try_get("queue_id")?, bytes(row.try_get("key")?)?), known);
        }
        Ok(())
    }

    pub(super) async fn load_names(
        &mut self,
        desk: &mut Desk,
        messages: &[&NewMessage],
    ) -> sqlx::Result<()> {
        let mut ids = Vec::with_capacity(messages.len());
        for message in messages {
            match &message.to {
                Destination::Queue(_) => ids.push(message.id),
                Destination::Topic { topic, .. } => {
                    let copies = desk.queues.copies_of(topic, message);
                    ids.extend(copies.iter().map(|(_, copy)| copy.id));
                }
            }
        }
        let names = ids.iter().map(|id| rows::hex(id.0.as_bytes()));
        let names = rows::json(&names.collect::<Vec<_>>());
        let mut doomed = Vec::new();
        for row in query(KNOWN_NAMES).bind(names).fetch_all(&mut desk.connection).await? {
            if row.try_get("doomed")? {
                doomed.push(row.try_get("seq")?);
                continue;
            }
            let receipt = receipt(desk, &row)?;
            self.named.insert(receipt.id, receipt);
        }
        // Messages of queues that were deleted are in nobody's way.
        surgery::delete(desk, &doomed).await
    }
}

/// The first answer, made again from what was kept of it.
fn receipt(desk: &Desk, row: &sqlx::sqlite::SqliteRow) -> sqlx::Result<Receipt> {
    let queue = desk.queues.numbered(row.try_get("queue_id")?);
    let queue = queue.ok_or_else(|| unreadable("a queue's number is unknown"))?;
    let (enqueued_at, deliver_at) = (row.try_get("enqueued_at")?, row.try_get("deliver_at")?);
    Ok(Receipt {
        id: rows::message_id(row)?,
        queue: queue.name.clone(),
        state: rows::waiting_state(deliver_at, enqueued_at),
        enqueued_at: rows::moment(enqueued_at)?,
        deliver_at: rows::moment(deliver_at)?,
    })
}

fn bytes<const N: usize>(bytes: &[u8]) -> sqlx::Result<[u8; N]> {
    bytes.try_into().map_err(|_| unreadable("a key has another length"))
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[KNOWN_KEYS, KNOWN_NAMES];
