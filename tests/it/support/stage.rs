//! A store, a way to let time pass, and the verbs with which promises are told.
//!
//! Each verb does one call and insists on the usual outcome; what a promise is about, it asks of
//! [`Stage::store`] itself.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use pumphouse::clock::{Clock, ManualClock};
use pumphouse::model::{
    DeliveryRecord, Lease, Leased, MessageId, NewMessage, Outcome, QueueName, QueueSettings,
    Record, ReplicaName, Settlement, State, When,
};
use pumphouse::store::{
    Claim, Depth, Enqueue, EnqueueOutcome, Enqueued, Filter, Page, Precondition, PutQueue, Receipt,
    Settle, Settled, Store,
};

/// A lease or a delay that does not end while a test runs.
pub(crate) const LONG: Duration = Duration::from_secs(600);
/// A lease or a delay that is meant to end; nothing may have to happen before it does.
pub(crate) const SHORT: Duration = Duration::from_millis(100);
/// Enough for a call that is to take all there is.
pub(crate) const ALL: usize = 1000;

/// A store to stand on.
pub(crate) struct Stage {
    /// What is tested.
    pub(crate) store: Arc<dyn Store>,
    time: Time,
    /// What is thrown away with the stage: a directory, say.
    _props: Option<Box<dyn Any + Send + Sync>>,
}

enum Time {
    Manual(Arc<ManualClock>),
    Real,
}

impl Stage {
    /// A store whose time stands still until it is told to pass.
    pub(crate) fn manual(store: Arc<dyn Store>, clock: Arc<ManualClock>) -> Self {
        Self { store, time: Time::Manual(clock), _props: None }
    }

    /// A store that goes by a clock of its own, which nobody can move.
    pub(crate) fn real(store: Arc<dyn Store>) -> Self {
        Self { store, time: Time::Real, _props: None }
    }

    /// The same stage, which keeps `props` as long as it stands.
    pub(crate) fn with(self, props: impl Any + Send + Sync) -> Self {
        Self { _props: Some(Box::new(props)), ..self }
    }

    /// Lets at least this much time pass by the store's clock.
    pub(crate) async fn pass(&self, time: Duration) {
        match &self.time {
            Time::Manual(clock) => clock.advance_micros(time.as_micros() as i64),
            // A little more, because two clocks of one machine need not agree to the millisecond.
            Time::Real => tokio::time::sleep(time + Duration::from_millis(20)).await,
        }
    }

    /// What the store's clock shows, or nearly.
    #[expect(clippy::disallowed_methods, reason = "stands for a database's own clock")]
    pub(crate) fn now(&self) -> Timestamp {
        match &self.time {
            Time::Manual(clock) => clock.now(),
            Time::Real => Timestamp::now(),
        }
    }

    /// Makes a queue with the defaults.
    pub(crate) async fn queue(&self, name: &str) -> QueueName {
        self.queue_with(name, |_| ()).await
    }

    /// Makes a queue, or gives it the defaults with these changes.
    pub(crate) async fn queue_with(
        &self,
        name: &str,
        change: impl FnOnce(&mut QueueSettings),
    ) -> QueueName {
        let mut settings = QueueSettings::default();
        change(&mut settings);
        let name = queue_name(name);
        let put = self.store.put_queue(&name, settings, Precondition::None).await.unwrap();
        assert!(matches!(put, PutQueue::Created(_) | PutQueue::Replaced(_)), "{put:?}");
        name
    }

    /// Sends messages, one answer for each.
    pub(crate) async fn send_all(&self, messages: Vec<NewMessage>) -> Vec<Enqueued> {
        match self.store.enqueue(together(messages)).await.unwrap() {
            EnqueueOutcome::Done(answers) => answers,
            other => panic!("not taken in: {other:?}"),
        }
    }

    /// Sends one message, whatever the answer.
    pub(crate) async fn offer(&self, message: NewMessage) -> Enqueued {
        let mut answers = self.send_all(vec![message]).await;
        assert_eq!(answers.len(), 1, "one answer for one message");
        answers.remove(0)
    }

    /// Sends one message that nobody has seen before.
    pub(crate) async fn send(&self, message: NewMessage) -> Receipt {
        match self.offer(message).await {
            Enqueued::New(receipt) => receipt,
            other => panic!("not new: {other:?}"),
        }
    }

    /// Sends one message with nothing but a payload, due now.
    pub(crate) async fn send_to(&self, queue: &QueueName, body: &str) -> MessageId {
        self.send(message(queue, body)).await.id
    }

    /// Claims messages of a queue for [`LONG`].
    pub(crate) async fn claim(&self, queue: &QueueName, max: usize) -> Vec<Leased> {
        self.store.lease(claim(queue, max, LONG)).await.unwrap()
    }

    /// Claims the one message that must be there.
    pub(crate) async fn claim_one(&self, queue: &QueueName) -> Leased {
        self.claim_for(queue, LONG).await
    }

    /// Claims the one message that must be there, for this long.
    pub(crate) async fn claim_for(&self, queue: &QueueName, duration: Duration) -> Leased {
        let mut leased = self.store.lease(claim(queue, 1, duration)).await.unwrap();
        leased.pop().expect("a message is ready")
    }

    /// Claims a message and lets the lease run out; it is not taken back yet.
    pub(crate) async fn lose_a_lease(&self, queue: &QueueName) -> Leased {
        let leased = self.claim_for(queue, SHORT).await;
        self.pass(SHORT).await;
        leased
    }

    /// Settles a lease, with a record of its delivery.
    pub(crate) async fn settle(&self, leased: &Leased, settlement: Settlement) -> Settled {
        self.settle_and_send(leased, settlement, Vec::new()).await
    }

    /// Settles a lease with messages that the handler sent.
    pub(crate) async fn settle_and_send(
        &self,
        leased: &Leased,
        settlement: Settlement,
        sent: Vec<NewMessage>,
    ) -> Settled {
        self.store.settle(settle(leased, settlement, sent)).await.unwrap()
    }

    /// Settles a lease that must hold.
    pub(crate) async fn must_settle(&self, leased: &Leased, settlement: Settlement) {
        let settled = self.settle(leased, settlement).await;
        assert!(matches!(settled, Settled::Done { .. }), "{settled:?}");
    }

    /// Sends a message, and lets it end as this settlement says.
    pub(crate) async fn send_and_settle(
        &self,
        queue: &QueueName,
        settlement: Settlement,
    ) -> MessageId {
        let id = self.send_to(queue, "to be settled").await;
        let leased = self.claim_one(queue).await;
        assert_eq!(leased.lease.id, id, "nothing else is ready in this queue");
        self.must_settle(&leased, settlement).await;
        id
    }

    /// A message that must be there.
    pub(crate) async fn record(&self, id: MessageId) -> Record {
        self.look(id).await.expect("the message is there").0
    }

    /// The deliveries of a message that must be there.
    pub(crate) async fn deliveries(&self, id: MessageId) -> Vec<DeliveryRecord> {
        self.look(id).await.expect("the message is there").1
    }

    /// Where a message stands; `None` where there is none.
    pub(crate) async fn state(&self, id: MessageId) -> Option<State> {
        self.look(id).await.map(|(record, _)| record.state)
    }

    /// A message with its deliveries.
    pub(crate) async fn look(&self, id: MessageId) -> Option<(Record, Vec<DeliveryRecord>)> {
        self.store.message(id).await.unwrap()
    }

    /// All messages that match, newest first, by pages of `limit`.
    pub(crate) async fn list(&self, filter: &Filter, limit: usize) -> Vec<Record> {
        let mut items = Vec::new();
        let mut after = None;
        loop {
            let page = Page { limit, after };
            let listed = self.store.messages(filter.clone(), page).await.unwrap();
            assert!(listed.items.len() <= limit, "a page has at most {limit} items");
            items.extend(listed.items);
            assert!(listed.next.is_none() || listed.next != after, "a page must lead on");
            match listed.next {
                Some(next) => after = Some(next),
                None => return items,
            }
        }
    }

    /// The payloads of all messages of a queue, newest first.
    pub(crate) async fn bodies(&self, queue: &QueueName) -> Vec<String> {
        let mut bodies = Vec::new();
        for record in self.list(&of_queue(queue), 100).await {
            let body = self.store.payload(record.head.id).await.unwrap();
            bodies.push(text(&body.expect("a message has a payload")));
        }
        bodies
    }

    /// How full a queue is that must be there.
    pub(crate) async fn depth(&self, queue: &QueueName) -> Depth {
        let depths = self.store.depths().await.unwrap();
        depths.into_iter().find(|depth| depth.queue == *queue).expect("the queue has a depth")
    }
}

/// A queue's name.
pub(crate) fn queue_name(name: &str) -> QueueName {
    QueueName::parse(name).expect("a test uses good names")
}

/// The name of the process that a test plays.
pub(crate) fn replica() -> ReplicaName {
    ReplicaName::parse("here").expect("a good name")
}

/// A message with nothing but a payload, due now.
pub(crate) fn message(queue: &QueueName, body: &str) -> NewMessage {
    NewMessage::new(queue.clone(), body.to_owned())
}

/// The same, due after a while.
pub(crate) fn message_in(queue: &QueueName, body: &str, wait: Duration) -> NewMessage {
    NewMessage { deliver: When::In(wait), ..message(queue, body) }
}

/// Messages sent together: each stands for itself.
pub(crate) fn together(messages: Vec<NewMessage>) -> Enqueue {
    Enqueue { messages, atomic: false, batch: None }
}

/// Messages sent together: all or none.
pub(crate) fn all_or_none(messages: Vec<NewMessage>) -> Enqueue {
    Enqueue { messages, atomic: true, batch: None }
}

/// A claim on messages of a queue.
pub(crate) fn claim(queue: &QueueName, max: usize, duration: Duration) -> Claim {
    let queue = queue.clone();
    Claim { queue, max, duration, replica: replica(), urgent_only: false, out_max: None }
}

/// A settlement with a record of the delivery.
pub(crate) fn settle(leased: &Leased, settlement: Settlement, sent: Vec<NewMessage>) -> Settle {
    let delivery = Some(delivery(leased, Outcome::from(&settlement)));
    Settle { lease: leased.lease.clone(), settlement, delivery, sent }
}

/// The record of a delivery that ended like this.
pub(crate) fn delivery(leased: &Leased, outcome: Outcome) -> DeliveryRecord {
    DeliveryRecord {
        number: leased.tries.attempts,
        replica: replica(),
        started_at: leased.leased_at,
        duration: Duration::from_millis(7),
        outcome,
        status: Some(200),
        error_kind: None,
        error: None,
        answer: Bytes::from_static(b"an answer"),
    }
}

/// A settlement that sets a message aside.
pub(crate) fn dead_letter(reason: &str) -> Settlement {
    Settlement::DeadLetter { reason: reason.to_owned() }
}

/// A settlement that drops a message.
pub(crate) fn discard(reason: &str) -> Settlement {
    Settlement::Discard { reason: reason.to_owned() }
}

/// A settlement that tries again at once.
pub(crate) fn retry_at_once() -> Settlement {
    Settlement::Retry { after: Duration::ZERO }
}

/// All messages of a queue.
pub(crate) fn of_queue(queue: &QueueName) -> Filter {
    Filter { queue: Some(queue.clone()), ..Filter::default() }
}

/// The payloads of what was leased, in order.
pub(crate) fn bodies_of(leased: &[Leased]) -> Vec<String> {
    leased.iter().map(|leased| text(&leased.message.body)).collect()
}

/// The leases alone.
pub(crate) fn leases_of(leased: &[Leased]) -> Vec<Lease> {
    leased.iter().map(|leased| leased.lease.clone()).collect()
}

pub(crate) fn text(body: &Bytes) -> String {
    String::from_utf8_lossy(body).into_owned()
}
