//! Promises about taking messages in.

use std::time::Duration;

use bytes::Bytes;
use pumphouse::model::{Details, MessageId, NewMessage, Settlement, State, When};
use pumphouse::store::{EnqueueOutcome, Enqueued, Refusal};

use crate::support::heard;
use crate::support::stage::{
    ALL, LONG, Stage, all_or_none, bodies_of, message, message_in, queue_name,
};

pub(crate) async fn what_is_sent_is_kept_byte_for_byte(stage: Stage) {
    let queue = stage.queue("letters").await;
    let body: Vec<u8> = (0..=255).cycle().take(70_000).collect();
    let details = Details {
        content_type: Some("text/plain; charset=utf-8".to_owned()),
        headers: vec![
            ("x-b".to_owned(), "zwölf 🐌".to_owned()),
            ("x-a".to_owned(), String::new()),
            ("x-b".to_owned(), "twice".to_owned()),
        ],
        causation_id: Some("a cause".to_owned()),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned()),
        tracestate: Some("a=b".to_owned()),
        baggage: Some("c=d".to_owned()),
        group: Some("größer".to_owned()),
        fairness_key: Some("tenant 7".to_owned()),
        event: vec![("subject".to_owned(), "größer".into())],
        published_id: Some(MessageId::new()),
        reply_to: Some(queue_name("answers")),
        url: Some("https://example.com/hook".parse().unwrap()),
    };
    let sent = NewMessage {
        kind: Some("order.placed".to_owned()),
        correlation_id: Some("a conversation, größer".to_owned()),
        details: details.clone(),
        expires: Some(When::In(LONG)),
        priority: -7,
        ..NewMessage::new(queue.clone(), body.clone())
    };
    let id = sent.id;
    let receipt = stage.send(sent).await;

    let (record, deliveries) = stage.look(id).await.expect("it is there");
    assert_eq!(record.head.id, id);
    assert_eq!(record.head.queue, queue);
    assert_eq!(record.head.kind.as_deref(), Some("order.placed"));
    assert_eq!(record.head.correlation_id.as_deref(), Some("a conversation, größer"));
    assert_eq!(record.head.details, details);
    assert_eq!(record.head.priority, -7);
    assert_eq!(record.head.enqueued_at, receipt.enqueued_at);
    assert_eq!(record.head.expires_at, Some(receipt.enqueued_at + LONG));
    assert_eq!(record.state, State::Ready);
    assert_eq!(record.deliver_at, receipt.deliver_at);
    assert_eq!(record.finished_at, None);
    assert_eq!(record.tries, Default::default());
    assert_eq!(record.reason, None);
    assert_eq!(record.size, body.len() as u64);
    assert_eq!(deliveries, []);
    assert_eq!(stage.store.payload(id).await.unwrap(), Some(Bytes::from(body.clone())));
    let leased = stage.claim_one(&queue).await;
    assert_eq!(leased.message.head, record.head);
    assert_eq!(leased.message.body, body);
}

pub(crate) async fn an_empty_payload_is_a_payload(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "").await;
    assert_eq!(stage.store.payload(id).await.unwrap(), Some(Bytes::new()));
    assert_eq!(stage.record(id).await.size, 0);
    assert_eq!(stage.claim_one(&queue).await.message.body, Bytes::new());
}

pub(crate) async fn a_receipt_says_when_a_message_is_due(stage: Stage) {
    let queue = stage.queue("letters").await;
    let now = stage.send(message(&queue, "now")).await;
    assert_eq!((now.state, now.deliver_at), (State::Ready, now.enqueued_at));
    assert_eq!(now.queue, queue);

    let later = stage.send(message_in(&queue, "later", LONG)).await;
    assert_eq!((later.state, later.deliver_at), (State::Scheduled, later.enqueued_at + LONG));

    let at_once = stage.send(message_in(&queue, "at once", Duration::ZERO)).await;
    assert_eq!((at_once.state, at_once.deliver_at), (State::Ready, at_once.enqueued_at));

    let moment = later.deliver_at;
    let then = NewMessage { deliver: When::At(moment), ..message(&queue, "then") };
    let then = stage.send(then).await;
    assert_eq!((then.state, then.deliver_at), (State::Scheduled, moment));

    for receipt in [now, later, at_once, then] {
        let record = stage.record(receipt.id).await;
        assert_eq!(record.state, receipt.state);
        assert_eq!(record.deliver_at, receipt.deliver_at);
        assert_eq!(record.head.enqueued_at, receipt.enqueued_at);
    }
}

pub(crate) async fn a_moment_that_has_passed_counts_as_now(stage: Stage) {
    let queue = stage.queue("letters").await;
    let passed = When::At(stage.now() - LONG);
    let due = stage.send(NewMessage { deliver: passed, ..message(&queue, "due") }).await;
    assert_eq!((due.state, due.deliver_at), (State::Ready, due.enqueued_at));
    let gone = NewMessage { expires: Some(passed), ..message(&queue, "gone") };
    let gone = stage.send(gone).await;
    assert_eq!(stage.record(gone.id).await.head.expires_at, Some(gone.enqueued_at));
}

pub(crate) async fn messages_sent_together_keep_their_order(stage: Stage) {
    let queue = stage.queue("letters").await;
    let names = (0..50).map(|number| number.to_string()).collect::<Vec<_>>();
    let answers = stage.send_all(names.iter().map(|name| message(&queue, name)).collect()).await;
    assert!(answers.iter().all(|answer| matches!(answer, Enqueued::New(_))), "{answers:?}");
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), names);
}

pub(crate) async fn nothing_can_be_sent(stage: Stage) {
    let none = stage.store.enqueue(all_or_none(Vec::new())).await.unwrap();
    assert_eq!(none, EnqueueOutcome::Done(Vec::new()));
    assert_eq!(stage.send_all(Vec::new()).await, []);
}

pub(crate) async fn an_unknown_queue_is_refused_and_the_rest_is_taken(stage: Stage) {
    let queue = stage.queue("letters").await;
    let nowhere = queue_name("nowhere");
    let messages = vec![message(&queue, "a"), message(&nowhere, "b"), message(&queue, "c")];
    let lost = messages[1].id;
    let answers = stage.send_all(messages).await;
    assert!(matches!(answers[0], Enqueued::New(_)));
    assert_eq!(answers[1], Enqueued::Refused(Refusal::NoSuchQueue(nowhere)));
    assert!(matches!(answers[2], Enqueued::New(_)));
    assert_eq!(stage.bodies(&queue).await, ["c", "a"]);
    assert_eq!(stage.look(lost).await, None);
    assert_eq!(stage.store.payload(lost).await.unwrap(), None);
}

pub(crate) async fn an_atomic_batch_is_all(stage: Stage) {
    let queue = stage.queue("letters").await;
    let other = stage.queue("parcels").await;
    let batch = all_or_none(vec![message(&queue, "a"), message(&other, "b")]);
    let ids = batch.messages.iter().map(|message| message.id).collect::<Vec<_>>();
    let EnqueueOutcome::Done(answers) = stage.store.enqueue(batch).await.unwrap() else {
        panic!("nothing speaks against it");
    };
    let id = |answer: &Enqueued| match answer {
        Enqueued::New(receipt) => receipt.id,
        other => panic!("not new: {other:?}"),
    };
    assert_eq!(answers.iter().map(id).collect::<Vec<_>>(), ids);
    assert_eq!(stage.bodies(&queue).await, ["a"]);
    assert_eq!(stage.bodies(&other).await, ["b"]);
}

pub(crate) async fn an_atomic_batch_is_nothing_and_every_refusal_is_named(stage: Stage) {
    let full = stage.queue_with("full", |settings| settings.max_messages = Some(1)).await;
    let queue = stage.queue("letters").await;
    let nowhere = queue_name("nowhere");
    let batch = all_or_none(vec![
        message(&queue, "0"),
        message(&nowhere, "1"),
        message(&full, "2"),
        message(&full, "3"),
        message(&queue, "4"),
    ]);
    let ids = batch.messages.iter().map(|message| message.id).collect::<Vec<_>>();
    let refused = stage.store.enqueue(batch).await.unwrap();
    let expected = vec![(1, Refusal::NoSuchQueue(nowhere)), (3, Refusal::QueueFull(full.clone()))];
    assert_eq!(refused, EnqueueOutcome::Refused(expected));
    for id in ids {
        assert_eq!(stage.look(id).await, None);
    }
    assert_eq!(stage.depth(&full).await.ready + stage.depth(&queue).await.ready, 0);
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);
    stage.send_to(&full, "there is still room for one").await;
}

pub(crate) async fn a_full_queue_refuses_until_something_is_settled(stage: Stage) {
    let queue = stage.queue_with("full", |settings| settings.max_messages = Some(3)).await;
    let full = Enqueued::Refused(Refusal::QueueFull(queue.clone()));
    stage.send_to(&queue, "to be leased").await;
    let leased = stage.claim_one(&queue).await;
    stage.send(message_in(&queue, "scheduled", LONG)).await;
    let two_more = vec![message(&queue, "ready"), message(&queue, "too much")];
    let answers = stage.send_all(two_more).await;
    assert!(matches!(answers[0], Enqueued::New(_)), "{answers:?}");
    assert_eq!(answers[1], full, "leased, scheduled and ready messages count");
    assert_eq!(stage.offer(message(&queue, "too much")).await, full);

    stage.must_settle(&leased, Settlement::Ack).await;
    stage.send_to(&queue, "what is completed does not count").await;
    assert_eq!(stage.offer(message(&queue, "too much")).await, full);
    assert_eq!(stage.bodies(&queue).await.len(), 4);
}

pub(crate) async fn a_limit_that_is_lifted_lets_messages_in(stage: Stage) {
    let queue = stage.queue_with("full", |settings| settings.max_messages = Some(1)).await;
    stage.send_to(&queue, "the first").await;
    let second = message(&queue, "the second");
    assert!(matches!(stage.offer(second.clone()).await, Enqueued::Refused(_)));
    stage.queue("full").await;
    assert_eq!(stage.send(second.clone()).await.id, second.id);
}

pub(crate) async fn whoever_listens_hears_of_messages(stage: Stage) {
    let queue = stage.queue("letters").await;
    let other = stage.queue("parcels").await;
    let mut of_queue = stage.store.news().of_queue(&queue);
    let of_other = stage.store.news().of_queue(&other);
    let mut of_schedule = stage.store.news().of_schedule();

    stage.send_to(&queue, "ready").await;
    heard(&mut of_queue).await;
    assert!(!of_other.has_changed().unwrap(), "nothing came for the other queue");

    stage.send(message_in(&queue, "later", LONG)).await;
    heard(&mut of_schedule).await;
}

pub(crate) async fn a_message_with_a_known_name_is_a_duplicate(stage: Stage) {
    let queue = stage.queue("letters").await;
    let first = message(&queue, "once");
    let id: MessageId = first.id;
    let receipt = stage.send(first.clone()).await;
    match stage.offer(first).await {
        Enqueued::Duplicate(again) => {
            assert_eq!((again.id, again.enqueued_at), (id, receipt.enqueued_at));
        }
        other => panic!("not a duplicate: {other:?}"),
    }
    assert_eq!(stage.bodies(&queue).await, ["once"]);
}
