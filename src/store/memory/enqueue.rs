//! Taking messages in, each once.

use jiff::Timestamp;

use crate::model::{Head, Idempotency, Lasts, NewMessage, QueueName, Record, State, Tries, When};

use super::super::{Enqueue, EnqueueOutcome, Enqueued, Receipt, Refusal, refusals};
use super::books::{Books, Key, Row, Standing, after, whole_micros};

impl Books {
    pub(super) fn enqueue(&mut self, enqueue: Enqueue, now: Timestamp) -> EnqueueOutcome {
        let Enqueue { messages, atomic, batch } = enqueue;
        // A key over a batch lies with the queue of the first message; where there is none, nowhere.
        let queue = messages.first().map(|first| first.queue.clone());
        let batch = batch.zip(queue.filter(|queue| self.queues.contains_key(queue)));
        if let Some((key, queue)) = &batch
            && self.key(queue, key, now).is_some_and(|known| known.fingerprint != key.fingerprint)
        {
            return EnqueueOutcome::BatchKeyReused;
        }
        let first_seq = self.next_seq();
        let answers: Vec<_> =
            messages.into_iter().map(|message| self.take_in(message, now)).collect();
        let refusals = refusals(&answers);
        if atomic && !refusals.is_empty() {
            self.undo(first_seq);
            return EnqueueOutcome::Refused(refusals);
        }
        if let Some((key, queue)) = batch
            && answers.iter().any(|answer| matches!(answer, Enqueued::New(_)))
        {
            self.remember(queue, key, None, now);
        }
        EnqueueOutcome::Done(answers)
    }

    /// Takes one message in, or says why not, or that it is here already.
    pub(super) fn take_in(&mut self, message: NewMessage, now: Timestamp) -> Enqueued {
        let name = message.queue.clone();
        let Some(queue) = self.queues.get(&name) else {
            return Enqueued::Refused(Refusal::NoSuchQueue(name));
        };
        if let Some(answer) = self.known(&message, now) {
            return answer;
        }
        if queue.settings.max_messages.is_some_and(|max| queue.unsettled() >= max) {
            return Enqueued::Refused(Refusal::QueueFull(name));
        }
        let keys = message.keys.clone();
        let row = row(message, now);
        let receipt = row.receipt.clone();
        let seq = self.insert(row);
        for key in keys {
            self.remember(name.clone(), key, Some((seq, receipt.clone())), now);
        }
        Enqueued::New(receipt)
    }

    /// Takes everything back that has come in since `first_seq` was the next number.
    pub(super) fn undo(&mut self, first_seq: i64) {
        for seq in first_seq..self.next_seq() {
            self.remove(seq);
        }
        self.keys.retain(|_, key| key.answer.as_ref().is_none_or(|(seq, _)| *seq < first_seq));
        self.keys.extend(self.replaced.drain(..).rev());
        self.untell();
    }

    /// The answer to a message that has come before, by a key or by its name.
    fn known(&self, message: &NewMessage, now: Timestamp) -> Option<Enqueued> {
        let same =
            message.keys.iter().filter_map(|key| Some((key, self.key(&message.queue, key, now)?)));
        let same = same.collect::<Vec<_>>();
        if same.iter().any(|(key, known)| key.fingerprint != known.fingerprint) {
            return Some(Enqueued::Refused(Refusal::KeyReused));
        }
        let by_key = same.iter().find_map(|(_, known)| known.answer.as_ref()).map(|known| &known.1);
        let by_name = || Some(&self.row(self.seq(message.id)?)?.receipt);
        by_key.or_else(by_name).cloned().map(Enqueued::Duplicate)
    }

    /// What is remembered of a key, if it still counts.
    fn key(&self, queue: &QueueName, key: &Idempotency, now: Timestamp) -> Option<&Key> {
        let known = self.keys.get(&(queue.clone(), key.key))?;
        self.key_counts(known, now).then_some(known)
    }

    fn remember(
        &mut self,
        queue: QueueName,
        key: Idempotency,
        answer: Option<(i64, Receipt)>,
        now: Timestamp,
    ) {
        let window = self.queues[&queue].settings.dedup_window;
        let until = (key.lasts == Lasts::Window).then(|| after(now, window));
        let name = (queue, key.key);
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
        let seq = key.answer.as_ref().map(|(seq, _)| *seq);
        match key.until {
            Some(until) => now < until || seq.is_some_and(|seq| self.needs_its_keys(seq)),
            None => seq.is_some_and(|seq| self.is_pending(seq)),
        }
    }
}

/// The moment that is meant, for something said at `now`. What has passed counts as now.
pub(super) fn moment(when: When, now: Timestamp) -> Timestamp {
    match when {
        When::Now => now,
        When::In(wait) => after(now, wait),
        When::At(moment) => whole_micros(moment).max(now),
    }
}

fn row(message: NewMessage, now: Timestamp) -> Row {
    let deliver_at = moment(message.deliver, now);
    let state = if deliver_at <= now { State::Ready } else { State::Scheduled };
    let receipt = Receipt {
        id: message.id,
        queue: message.queue.clone(),
        state,
        enqueued_at: now,
        deliver_at,
    };
    let head = Head {
        id: message.id,
        queue: message.queue,
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
