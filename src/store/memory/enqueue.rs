//! Taking messages in, each once.

use jiff::Timestamp;

use crate::model::{
    Destination, Head, Idempotency, Lasts, NewMessage, QueueName, Record, State, TopicName, Tries,
    When,
};

use super::super::{
    Copied, Enqueue, EnqueueOutcome, Enqueued, Published, Receipt, Refusal, TOPIC_WINDOW, is_new,
    refusals, topics,
};
use super::books::{Answer, Books, Key, KeyName, Row, Standing, after, whole_micros};

impl Books {
    pub(super) fn enqueue(&mut self, enqueue: Enqueue, now: Timestamp) -> EnqueueOutcome {
        let Enqueue { messages, atomic, batch } = enqueue;
        let batch = batch.zip(messages.first()).and_then(|(key, first)| self.batch(key, &first.to));
        if let Some((queue, key)) = &batch
            && self.key(queue, key, now).is_some_and(|known| known.fingerprint != key.fingerprint)
        {
            return EnqueueOutcome::BatchKeyReused;
        }
        let mark = self.mark();
        let answers: Vec<_> =
            messages.into_iter().map(|message| self.take_in(message, now)).collect();
        let refusals = refusals(&answers);
        if atomic && !refusals.is_empty() {
            self.undo(mark);
            self.untell();
            return EnqueueOutcome::Refused(refusals);
        }
        if let Some((queue, key)) = batch
            && answers.iter().any(is_new)
        {
            self.remember(queue, key, Answer::Nothing, now);
        }
        EnqueueOutcome::Done(answers)
    }

    /// A key over a batch lies with the queue of the first message, or with its topic; where there is none, nowhere.
    fn batch(
        &self,
        key: Idempotency,
        first: &Destination,
    ) -> Option<(Option<QueueName>, Idempotency)> {
        match first {
            Destination::Queue(queue) => {
                self.queues.contains_key(queue).then(|| (Some(queue.clone()), key))
            }
            Destination::Topic { topic, .. } => Some((None, topics::key_of(topic, &key))),
        }
    }

    /// Takes one message in, or says why not, or that it is here already.
    pub(super) fn take_in(&mut self, message: NewMessage, now: Timestamp) -> Enqueued {
        match message.to.clone() {
            Destination::Queue(queue) => self.take_into(queue, message, now),
            Destination::Topic { topic, require_subscribers } => {
                self.publish(topic, &message, require_subscribers, now)
            }
        }
    }

    fn take_into(&mut self, name: QueueName, message: NewMessage, now: Timestamp) -> Enqueued {
        let Some(queue) = self.queues.get(&name) else {
            return Enqueued::Refused(Refusal::NoSuchQueue(name));
        };
        if let Some(answer) = self.known(&name, &message, now) {
            return answer;
        }
        if queue.settings.max_messages.is_some_and(|max| queue.unsettled() >= max) {
            return Enqueued::Refused(Refusal::QueueFull(name));
        }
        let keys = message.keys.clone();
        let row = row(name.clone(), message, now);
        let receipt = row.receipt.clone();
        let seq = self.insert(row);
        for key in keys {
            self.remember(Some(name.clone()), key, Answer::Message(seq, receipt.clone()), now);
        }
        Enqueued::New(receipt)
    }

    /// Takes a copy of a message into each queue that wants it; all of them or none.
    fn publish(
        &mut self,
        topic: TopicName,
        message: &NewMessage,
        require_subscribers: bool,
        now: Timestamp,
    ) -> Enqueued {
        let keys = topics::keys_of(&topic, message);
        let known = keys.iter().filter_map(|key| Some((key, self.key(&None, key, now)?)));
        let known = known.collect::<Vec<_>>();
        if known.iter().any(|(key, known)| key.fingerprint != known.fingerprint) {
            return Enqueued::Refused(Refusal::KeyReused);
        }
        if let Some((_, Key { answer: Answer::Published(_, first), .. })) = known.first() {
            return Enqueued::Published(Published { duplicate: true, ..first.clone() });
        }
        let of_topic = self.subscriptions.values().filter(|it| it.topic == topic);
        let copies = topics::copies(message, of_topic);
        if copies.is_empty() && require_subscribers {
            return Enqueued::Refused(Refusal::NoSubscribers(topic));
        }
        let (mark, number) = (self.mark(), self.take_seq());
        let mut copied = Vec::with_capacity(copies.len());
        for (queue, copy) in copies {
            let (id, was_there) = match self.take_into(queue.clone(), copy, now) {
                Enqueued::New(receipt) => (receipt.id, false),
                Enqueued::Duplicate(receipt) => (receipt.id, true),
                refused => {
                    self.undo(mark);
                    return refused;
                }
            };
            copied.push(Copied { queue, id, was_there });
        }
        let published = Published { topic, id: message.id, copies: copied, duplicate: false };
        for key in keys {
            self.remember(None, key, Answer::Published(number, published.clone()), now);
        }
        Enqueued::Published(published)
    }

    /// A place to which can be undone what comes in after it.
    pub(super) fn mark(&self) -> Mark {
        Mark { first_seq: self.next_seq(), replaced: self.replaced.len() }
    }

    /// Takes everything back that has come in since then.
    pub(super) fn undo(&mut self, Mark { first_seq, replaced }: Mark) {
        for seq in first_seq..self.next_seq() {
            self.remove(seq);
        }
        self.keys.retain(|_, key| key.answer.is_before(first_seq));
        self.keys.extend(self.replaced.drain(replaced..).rev());
    }

    /// The answer to a message that has come before, by a key or by its name.
    fn known(&self, queue: &QueueName, message: &NewMessage, now: Timestamp) -> Option<Enqueued> {
        let queue = Some(queue.clone());
        let same = message.keys.iter().filter_map(|key| Some((key, self.key(&queue, key, now)?)));
        let same = same.collect::<Vec<_>>();
        if same.iter().any(|(key, known)| key.fingerprint != known.fingerprint) {
            return Some(Enqueued::Refused(Refusal::KeyReused));
        }
        let by_key = same.iter().find_map(|(_, known)| match &known.answer {
            Answer::Message(_, receipt) => Some(receipt),
            Answer::Nothing | Answer::Published(..) => None,
        });
        let by_name = || Some(&self.row(self.seq(message.id)?)?.receipt);
        by_key.or_else(by_name).cloned().map(Enqueued::Duplicate)
    }

    /// What is remembered of a key, if it still counts.
    fn key(&self, queue: &Option<QueueName>, key: &Idempotency, now: Timestamp) -> Option<&Key> {
        let known = self.keys.get(&(queue.clone(), key.key))?;
        self.key_counts(known, now).then_some(known)
    }

    fn remember(
        &mut self,
        queue: Option<QueueName>,
        key: Idempotency,
        answer: Answer,
        now: Timestamp,
    ) {
        let settings = queue.as_ref().map(|queue| &self.queues[queue].settings);
        let window = settings.map_or(TOPIC_WINDOW, |settings| settings.dedup_window);
        let until = (key.lasts == Lasts::Window).then(|| after(now, window));
        let name: KeyName = (queue, key.key);
        let new = Key { fingerprint: key.fingerprint, until, answer };
        // One that counts is of this very message: it names the key twice.
        if let Some(old) = self.keys.insert(name.clone(), new)
            && !self.key_counts(&old, now)
        {
            self.replaced.push((name, old));
        }
    }

    /// Whether a key is in its window, or its message still needs it.
    pub(super) fn key_counts(&self, key: &Key, now: Timestamp) -> bool {
        let seq = key.answer.message();
        match key.until {
            Some(until) => now < until || seq.is_some_and(|seq| self.needs_its_keys(seq)),
            None => seq.is_some_and(|seq| self.is_pending(seq)),
        }
    }
}

/// How far the books had come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    first_seq: i64,
    replaced: usize,
}

/// The moment that is meant, for something said at `now`. What has passed counts as now.
pub(super) fn moment(when: When, now: Timestamp) -> Timestamp {
    match when {
        When::Now => now,
        When::In(wait) => after(now, wait),
        When::At(moment) => whole_micros(moment).max(now),
    }
}

fn row(queue: QueueName, message: NewMessage, now: Timestamp) -> Row {
    let deliver_at = moment(message.deliver, now);
    let state = if deliver_at <= now { State::Ready } else { State::Scheduled };
    let receipt =
        Receipt { id: message.id, queue: queue.clone(), state, enqueued_at: now, deliver_at };
    let head = Head {
        id: message.id,
        queue,
        kind: message.kind,
        correlation_id: message.correlation_id,
        details: message.details,
        priority: message.priority,
        enqueued_at: now,
        expires_at: message.expires.map(|expires| moment(expires, now)),
    };
    let record = Record {
        head,
        state,
        deliver_at,
        finished_at: None,
        tries: Tries::default(),
        reason: None,
        size: message.body.len() as u64,
    };
    let body = message.body;
    let standing = Standing::None;
    let mut row =
        Row { record, body, receipt, deliveries: Vec::new(), urgent: false, hold: None, standing };
    row.line_up();
    row
}
