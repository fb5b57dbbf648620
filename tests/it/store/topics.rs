//! Promises about topics: copies, filters, keys, payloads that are kept once.

use pumphouse::model::{
    Condition, Destination, Idempotency, MessageId, NewMessage, QueueName, Settlement, State,
    Subscription, SubscriptionFilter, SubscriptionName, TopicName,
};
use pumphouse::store::{
    EnqueueOutcome, Enqueued, Error, Precondition, Published, PutSubscription, Refusal, Settled,
};

use crate::support::stage::{ALL, Stage, all_or_none, message, queue_name, settle, text};

pub(crate) fn topic(name: &str) -> TopicName {
    TopicName::parse(name).unwrap()
}

/// Subscribes a queue, under its own name.
async fn subscribe(stage: &Stage, to: &TopicName, queue: &QueueName, kind: Option<&str>) {
    let put = stage.store.put_subscription(subscription(to, queue, kind)).await.unwrap();
    assert_ne!(put, PutSubscription::NoSuchQueue);
}

fn subscription(to: &TopicName, queue: &QueueName, kind: Option<&str>) -> Subscription {
    let filter = SubscriptionFilter {
        kind: kind.map(|kind| Condition::Is(kind.to_owned())),
        ..SubscriptionFilter::default()
    };
    let name = SubscriptionName::parse(queue.as_str()).unwrap();
    Subscription { topic: to.clone(), name, queue: queue.clone(), filter }
}

/// Publishes, and insists on the usual outcome.
async fn publish(stage: &Stage, message: NewMessage) -> Published {
    match stage.offer(message).await {
        Enqueued::Published(published) => published,
        other => panic!("not published: {other:?}"),
    }
}

fn queues_of(published: &Published) -> Vec<&str> {
    published.copies.iter().map(|copy| copy.queue.as_str()).collect()
}

pub(crate) async fn what_is_published_is_copied_into_each_queue_that_wants_it(stage: Stage) {
    let orders = topic("orders");
    let (a, b, c) = (stage.queue("a").await, stage.queue("b").await, stage.queue("c").await);
    subscribe(&stage, &orders, &a, None).await;
    subscribe(&stage, &orders, &b, Some("orders.*")).await;
    subscribe(&stage, &orders, &c, Some("invoices.*")).await;
    subscribe(&stage, &topic("others"), &c, None).await;
    let sent = NewMessage {
        kind: Some("orders.placed".to_owned()),
        correlation_id: Some("17".to_owned()),
        ..NewMessage::new(orders.clone(), "x".repeat(10_000))
    };
    let published = publish(&stage, sent.clone()).await;
    assert_eq!((published.id, published.duplicate), (sent.id, false));
    assert_eq!(queues_of(&published), ["a", "b"]);
    for copy in &published.copies {
        let record = stage.record(copy.id).await;
        assert_eq!((&record.head.queue, record.state), (&copy.queue, State::Ready));
        assert_eq!(record.head.details.published_id, Some(sent.id));
        assert_eq!(record.head.correlation_id.as_deref(), Some("17"));
        assert_eq!(record.size, 10_000);
        let leased = stage.claim_one(&copy.queue).await;
        assert_eq!((leased.lease.id, &leased.message.body), (copy.id, &sent.body));
        stage.must_settle(&leased, Settlement::Ack).await;
        assert_eq!(stage.store.payload(copy.id).await.unwrap().as_ref(), Some(&sent.body));
    }
    assert_ne!(published.copies[0].id, published.copies[1].id);
    assert_eq!(stage.depth(&c).await.ready, 0);
}

pub(crate) async fn what_nobody_wants_is_fine_unless_somebody_has_to(stage: Stage) {
    let orders = topic("orders");
    let published = publish(&stage, NewMessage::new(orders.clone(), "x")).await;
    assert_eq!(queues_of(&published), [""; 0]);
    let to = Destination::Topic { topic: orders.clone(), require_subscribers: true };
    let answer = stage.offer(NewMessage::new(to.clone(), "x")).await;
    assert_eq!(answer, Enqueued::Refused(Refusal::NoSubscribers(orders.clone())));
    let queue = stage.queue("a").await;
    subscribe(&stage, &orders, &queue, None).await;
    let both = vec![NewMessage::new(to, "y"), message(&queue_name("unknown"), "z")];
    let refused = stage.store.enqueue(all_or_none(both)).await.unwrap();
    assert!(matches!(refused, EnqueueOutcome::Refused(all) if all.len() == 1 && all[0].0 == 1));
    assert_eq!(stage.depth(&queue).await.ready, 0, "all or none");
}

pub(crate) async fn a_subscription_is_in_force_for_the_next_publish(stage: Stage) {
    let orders = topic("orders");
    let (a, b) = (stage.queue("a").await, stage.queue("b").await);
    let store = &stage.store;
    let put = |it| store.put_subscription(it);
    assert_eq!(put(subscription(&orders, &a, None)).await.unwrap(), PutSubscription::Created);
    let missing = subscription(&orders, &queue_name("missing"), None);
    assert_eq!(put(missing).await.unwrap(), PutSubscription::NoSuchQueue);
    let mut moved = subscription(&orders, &b, Some("t"));
    moved.name = SubscriptionName::parse("a").unwrap();
    assert_eq!(put(moved.clone()).await.unwrap(), PutSubscription::Replaced);
    assert_eq!(store.subscriptions().await.unwrap(), [moved.clone()]);
    let of_kind = |kind: &str| NewMessage {
        kind: Some(kind.to_owned()),
        ..NewMessage::new(orders.clone(), "x")
    };
    assert_eq!(queues_of(&publish(&stage, of_kind("t")).await), ["b"]);
    assert_eq!(queues_of(&publish(&stage, of_kind("u")).await), [""; 0]);
    assert!(store.delete_subscription(&orders, &moved.name).await.unwrap());
    assert!(!store.delete_subscription(&orders, &moved.name).await.unwrap());
    assert_eq!(queues_of(&publish(&stage, of_kind("t")).await), [""; 0]);
    put(moved).await.unwrap();
    stage.store.delete_queue(&b, true, Precondition::None).await.unwrap();
    assert_eq!(store.subscriptions().await.unwrap(), [], "it ends with its queue");
    stage.queue("b").await;
    assert_eq!(queues_of(&publish(&stage, of_kind("t")).await), [""; 0], "for good");
}

pub(crate) async fn a_repeated_publish_is_answered_with_the_first(stage: Stage) {
    let orders = topic("orders");
    let (a, b) = (stage.queue("a").await, stage.queue("b").await);
    subscribe(&stage, &orders, &a, None).await;
    let keyed = |topic: &TopicName, fingerprint| {
        let mut message = NewMessage::new(topic.clone(), "x");
        message.keys = vec![Idempotency::new("message", "k", [fingerprint; 32])];
        message
    };
    let first = publish(&stage, keyed(&orders, 1)).await;
    assert_eq!(queues_of(&first), ["a"]);
    subscribe(&stage, &orders, &b, None).await;
    let again = publish(&stage, keyed(&orders, 1)).await;
    assert_eq!(again, Published { duplicate: true, ..first });
    let reused = stage.offer(keyed(&orders, 2)).await;
    assert_eq!(reused, Enqueued::Refused(Refusal::KeyReused));
    let other = publish(&stage, keyed(&topic("others"), 2)).await;
    assert!(!other.duplicate, "a key counts for its topic alone");
    let both = stage.send_all(vec![keyed(&topic("third"), 1), keyed(&topic("third"), 1)]).await;
    assert!(matches!(&both[1], Enqueued::Published(second) if second.duplicate), "{both:?}");
    assert_eq!((stage.depth(&a).await.ready, stage.depth(&b).await.ready), (1, 0));
}

pub(crate) async fn a_full_queue_refuses_the_whole_publish(stage: Stage) {
    let orders = topic("orders");
    let a = stage.queue("a").await;
    let b = stage.queue_with("b", |settings| settings.max_messages = Some(1)).await;
    subscribe(&stage, &orders, &a, None).await;
    subscribe(&stage, &orders, &b, None).await;
    let keyed = || {
        let mut message = NewMessage::new(orders.clone(), "x".repeat(5000));
        message.keys = vec![Idempotency::new("message", "k", [1; 32])];
        message
    };
    publish(&stage, NewMessage::new(orders.clone(), "first")).await;
    let answers = stage.send_all(vec![keyed(), message(&a, "beside it")]).await;
    assert_eq!(answers[0], Enqueued::Refused(Refusal::QueueFull(b.clone())));
    assert!(matches!(answers[1], Enqueued::New(_)));
    assert_eq!(stage.bodies(&a).await, ["beside it", "first"], "all copies or none");
    let leased = stage.claim_one(&b).await;
    stage.must_settle(&leased, Settlement::Ack).await;
    assert!(!publish(&stage, keyed()).await.duplicate, "what was refused leaves no key");
}

pub(crate) async fn a_payload_of_several_lasts_as_long_as_the_last(stage: Stage) {
    let orders = topic("orders");
    let queues = [stage.queue("a").await, stage.queue("b").await, stage.queue("c").await];
    for queue in &queues {
        subscribe(&stage, &orders, queue, None).await;
    }
    let body = "large ".repeat(2000);
    let published = publish(&stage, NewMessage::new(orders, body.clone())).await;
    for (done, queue) in queues.iter().enumerate() {
        for copy in &published.copies[done..] {
            let kept = stage.store.payload(copy.id).await.unwrap().expect("it is there");
            assert_eq!(text(&kept), body);
        }
        assert_eq!(stage.store.purge(queue, ALL).await.unwrap(), 1);
        stage.store.sweep(ALL).await.unwrap();
        assert_eq!(stage.store.payload(published.copies[done].id).await.unwrap(), None);
    }
}

pub(crate) async fn what_a_handler_publishes_comes_with_its_ack(stage: Stage) {
    let orders = topic("orders");
    let (from, a) = (stage.queue("from").await, stage.queue("a").await);
    subscribe(&stage, &orders, &a, None).await;
    stage.send_to(&from, "parent").await;
    let leased = stage.claim_one(&from).await;
    let sent = vec![NewMessage::new(orders.clone(), "child"), message(&a, "another")];
    let failed = Settlement::Retry { after: Default::default() };
    stage.settle_and_send(&leased, failed, sent.clone()).await;
    assert_eq!(stage.depth(&a).await.ready, 0, "only with an ack");
    let leased = stage.claim_one(&from).await;
    let settled = stage.settle_and_send(&leased, Settlement::Ack, sent.clone()).await;
    assert!(matches!(settled, Settled::Done { .. }));
    assert_eq!(stage.bodies(&a).await, ["another", "child"]);
    let again = stage.settle_and_send(&leased, Settlement::Ack, sent).await;
    assert_eq!(again, Settled::LeaseLost);
    assert_eq!(stage.depth(&a).await.ready, 2);
}

pub(crate) async fn what_a_handler_publishes_becomes_no_more_copies_than_one_transaction_makes(
    stage: Stage,
) {
    let orders = topic("orders");
    let from = stage.queue("from").await;
    let subscribers = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k"];
    for name in subscribers {
        let queue = stage.queue(name).await;
        subscribe(&stage, &orders, &queue, (name == "k").then_some("rare")).await;
    }
    stage.send_to(&from, "parent").await;
    let leased = stage.claim_one(&from).await;
    let send = |kinds: [&str; 2]| {
        let of_kind = |kind: &str| NewMessage {
            kind: Some(kind.to_owned()),
            ..NewMessage::new(orders.clone(), "x")
        };
        let mut sent = (0..999).map(|_| of_kind(kinds[0])).collect::<Vec<_>>();
        sent.push(of_kind(kinds[1]));
        stage.store.settle(settle(&leased, Settlement::Ack, sent))
    };
    // Only copies count, not all who have subscribed.
    let refused = send(["usual", "rare"]).await;
    assert!(matches!(refused, Err(Error::Rejected { .. })), "{refused:?}");
    assert_eq!(stage.record(leased.lease.id).await.state, State::Leased);
    for name in subscribers {
        assert_eq!(stage.depth(&queue_name(name)).await.ready, 0, "nothing is sent");
    }
    assert!(matches!(send(["usual", "usual"]).await, Ok(Settled::Done { .. })));
    for name in &subscribers[..10] {
        assert_eq!(stage.depth(&queue_name(name)).await.ready, 1000);
    }
    assert_eq!(stage.depth(&queue_name("k")).await.ready, 0);
}

pub(crate) async fn what_wants_its_answer_in_no_queue_does_not_go_with_an_ack(stage: Stage) {
    let (from, next) = (stage.queue("from").await, stage.queue("next").await);
    let answers = stage.queue("answers").await;
    stage.send_to(&from, "parent").await;
    let leased = stage.claim_one(&from).await;
    let asks = |reply_to: &QueueName| {
        let mut asking = message(&next, "question");
        asking.details.reply_to = Some(reply_to.clone());
        let sent = vec![message(&next, "plain"), asking];
        stage.store.settle(settle(&leased, Settlement::Ack, sent))
    };
    let Err(Error::Rejected { what }) = asks(&queue_name("missing")).await else {
        panic!("there is no such queue");
    };
    assert!(what.contains("/messages/1") && what.contains("missing"), "{what}");
    assert_eq!(stage.depth(&next).await.ready, 0, "all or nothing");
    assert!(matches!(asks(&answers).await, Ok(Settled::Done { .. })));
    assert_eq!(stage.depth(&next).await.ready, 2);
}

pub(crate) async fn a_publish_under_a_known_name_collapses_queue_by_queue(stage: Stage) {
    let orders = topic("orders");
    let (a, b) = (stage.queue("a").await, stage.queue("b").await);
    subscribe(&stage, &orders, &a, None).await;
    let named = NewMessage { id: MessageId::new(), ..NewMessage::new(orders.clone(), "x") };
    let first = publish(&stage, named.clone()).await;
    subscribe(&stage, &orders, &b, None).await;
    let second = publish(&stage, named).await;
    assert_eq!(second.copies[0].id, first.copies[0].id);
    assert!(second.copies[0].was_there && !second.copies[1].was_there);
    assert_eq!((stage.depth(&a).await.ready, stage.depth(&b).await.ready), (1, 1));
}
