//! Promises about idempotency keys: the same request makes one message, whatever happens around it.

use std::sync::Arc;
use std::time::Duration;

use pumphouse::model::{Idempotency, NewMessage, QueueName, Settlement, State};
use pumphouse::store::{Enqueue, EnqueueOutcome, Enqueued, Receipt, Refusal};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::stage::{
    ALL, LONG, SHORT, Stage, all_or_none, dead_letter, message, message_in, queue_name,
    retry_at_once, together,
};

pub(crate) async fn a_repeat_is_answered_with_the_first_receipt(stage: Stage) {
    let queue = stage.queue("letters").await;
    let first = stage.send(keyed(&queue, "once", "k", 1)).await;
    stage.pass(SHORT).await;
    assert_eq!(stage.offer(keyed(&queue, "once", "k", 1)).await, Enqueued::Duplicate(first));
    assert_eq!(stage.bodies(&queue).await, ["once"]);
}

pub(crate) async fn a_repeat_is_answered_as_it_was_then_whatever_became_of_the_message(
    stage: Stage,
) {
    let queue = stage.queue("letters").await;
    let later = message_in(&queue, "later", SHORT);
    let scheduled = stage.send(with_key(later.clone(), "s", 1)).await;
    assert_eq!(scheduled.state, State::Scheduled);
    stage.pass(SHORT).await;
    stage.store.promote(ALL).await.unwrap();
    let again = NewMessage { id: Default::default(), ..with_key(later, "s", 1) };
    assert_eq!(stage.offer(again.clone()).await, Enqueued::Duplicate(scheduled.clone()));

    let leased = stage.claim_one(&queue).await;
    assert_eq!(stage.offer(again.clone()).await, Enqueued::Duplicate(scheduled.clone()));
    stage.must_settle(&leased, Settlement::Ack).await;
    assert_eq!(stage.offer(again).await, Enqueued::Duplicate(scheduled));
}

pub(crate) async fn a_key_belongs_to_one_request(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send(keyed(&queue, "first", "k", 1)).await;
    let reused = stage.offer(keyed(&queue, "second", "k", 2)).await;
    assert_eq!(reused, Enqueued::Refused(Refusal::KeyReused));
    stage.send(keyed(&queue, "other", "another", 2)).await;
    assert_eq!(stage.bodies(&queue).await, ["other", "first"]);
}

pub(crate) async fn a_key_counts_in_its_queue_only(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    stage.send(keyed(&queue, "here", "k", 1)).await;
    stage.send(keyed(&other, "there", "k", 2)).await;
    assert_eq!(stage.bodies(&queue).await, ["here"]);
    assert_eq!(stage.bodies(&other).await, ["there"]);
}

pub(crate) async fn of_two_messages_with_one_key_in_one_call_the_second_is_the_duplicate(
    stage: Stage,
) {
    let queue = stage.queue("letters").await;
    let messages = vec![
        keyed(&queue, "once", "k", 1),
        keyed(&queue, "once", "k", 1),
        keyed(&queue, "other", "k", 2),
    ];
    let first = messages[0].id;
    let answers = stage.send_all(messages).await;
    let [Enqueued::New(new), Enqueued::Duplicate(known), reused] = &answers[..] else {
        panic!("one new, one duplicate, one refused: {answers:?}");
    };
    assert_eq!((new.id, known), (first, new));
    assert_eq!(*reused, Enqueued::Refused(Refusal::KeyReused));
    assert_eq!(stage.bodies(&queue).await, ["once"]);
}

pub(crate) async fn a_message_with_two_keys_is_known_by_each(stage: Stage) {
    let queue = stage.queue("letters").await;
    let two = with_key(keyed(&queue, "once", "own", 1), "item", 2);
    let first = stage.send(two).await;
    for (key, print) in [("own", 1), ("item", 2)] {
        let answer = stage.offer(keyed(&queue, "again", key, print)).await;
        assert_eq!(answer, Enqueued::Duplicate(first.clone()), "{key}");
    }
    let half_wrong = with_key(keyed(&queue, "again", "own", 1), "item", 3);
    assert_eq!(stage.offer(half_wrong).await, Enqueued::Refused(Refusal::KeyReused));
    assert_eq!(stage.bodies(&queue).await, ["once"]);
}

pub(crate) async fn a_repeat_is_answered_on_a_full_queue_too(stage: Stage) {
    let queue = stage.queue_with("full", |settings| settings.max_messages = Some(1)).await;
    let first = stage.send(keyed(&queue, "once", "k", 1)).await;
    assert_eq!(stage.offer(keyed(&queue, "once", "k", 1)).await, Enqueued::Duplicate(first));
    let reused = stage.offer(keyed(&queue, "other", "k", 2)).await;
    assert_eq!(reused, Enqueued::Refused(Refusal::KeyReused));
    let full = Enqueued::Refused(Refusal::QueueFull(queue.clone()));
    assert_eq!(stage.offer(keyed(&queue, "more", "another", 3)).await, full);
    let batch = all_or_none(vec![keyed(&queue, "once", "k", 1)]);
    let answer = stage.store.enqueue(batch).await.unwrap();
    assert!(matches!(answer, EnqueueOutcome::Done(answers) if answers.len() == 1));
}

pub(crate) async fn what_was_refused_leaves_no_key(stage: Stage) {
    let queue = stage.queue_with("full", |settings| settings.max_messages = Some(1)).await;
    stage.send_to(&queue, "there is no room").await;
    let refused = stage.offer(keyed(&queue, "once", "k", 1)).await;
    assert_eq!(refused, Enqueued::Refused(Refusal::QueueFull(queue.clone())));
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, Settlement::Ack).await;
    stage.send(keyed(&queue, "another request", "k", 2)).await;
}

pub(crate) async fn an_atomic_batch_that_is_refused_leaves_no_key(stage: Stage) {
    let queue = stage.queue("letters").await;
    let messages = vec![keyed(&queue, "a", "k", 1), message(&queue_name("nowhere"), "b")];
    let batch = Enqueue { batch: Some(key("batch", 1)), ..all_or_none(messages) };
    let refused = stage.store.enqueue(batch).await.unwrap();
    assert!(matches!(refused, EnqueueOutcome::Refused(_)), "{refused:?}");
    let batch = Enqueue {
        batch: Some(key("batch", 2)),
        ..all_or_none(vec![keyed(&queue, "other", "k", 2)])
    };
    let taken = stage.store.enqueue(batch).await.unwrap();
    assert!(matches!(taken, EnqueueOutcome::Done(_)), "{taken:?}");
    assert_eq!(stage.bodies(&queue).await, ["other"]);
}

pub(crate) async fn an_atomic_batch_names_a_key_that_was_reused(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send(keyed(&queue, "first", "k", 1)).await;
    let messages = vec![keyed(&queue, "fine", "f", 1), keyed(&queue, "second", "k", 2)];
    let refused = stage.store.enqueue(all_or_none(messages)).await.unwrap();
    assert_eq!(refused, EnqueueOutcome::Refused(vec![(1, Refusal::KeyReused)]));
    assert_eq!(stage.bodies(&queue).await, ["first"]);
}

pub(crate) async fn a_key_over_a_batch_belongs_to_one_request(stage: Stage) {
    let queue = stage.queue("letters").await;
    let batch = |print: u8, body: &str| Enqueue {
        batch: Some(key("batch", print)),
        ..together(vec![keyed(&queue, body, &format!("item of {print}"), print)])
    };
    let first = stage.store.enqueue(batch(1, "a")).await.unwrap();
    let EnqueueOutcome::Done(first) = first else { panic!("it is new: {first:?}") };
    let again = stage.store.enqueue(batch(1, "a")).await.unwrap();
    let EnqueueOutcome::Done(again) = again else { panic!("it is the same: {again:?}") };
    let (Enqueued::New(new), Enqueued::Duplicate(known)) = (&first[0], &again[0]) else {
        panic!("first new, then known: {first:?} {again:?}");
    };
    assert_eq!(new, known);
    let other = stage.store.enqueue(batch(2, "b")).await.unwrap();
    assert_eq!(other, EnqueueOutcome::BatchKeyReused);
    assert_eq!(stage.bodies(&queue).await, ["a"]);
}

pub(crate) async fn a_key_over_a_batch_of_which_nothing_was_taken_is_not_kept(stage: Stage) {
    let queue = stage.queue_with("full", |settings| settings.max_messages = Some(1)).await;
    stage.send_to(&queue, "there is no room").await;
    let batch = |print| Enqueue {
        batch: Some(key("batch", print)),
        ..together(vec![message(&queue, "too much")])
    };
    for print in [1, 2] {
        let refused = stage.store.enqueue(batch(print)).await.unwrap();
        let full = Enqueued::Refused(Refusal::QueueFull(queue.clone()));
        assert_eq!(refused, EnqueueOutcome::Done(vec![full]));
    }
}

pub(crate) async fn sixty_four_senders_of_one_request_make_one_message(stage: Stage) {
    let queue = stage.queue("letters").await;
    let start = Arc::new(Barrier::new(64));
    let mut senders = JoinSet::new();
    for _ in 0..64 {
        let (store, start) = (stage.store.clone(), start.clone());
        let request = together(vec![keyed(&queue, "once", "k", 1)]);
        senders.spawn(async move {
            start.wait().await;
            store.enqueue(request).await.unwrap()
        });
    }
    let (mut new, mut known) = (Vec::<Receipt>::new(), Vec::<Receipt>::new());
    for answer in senders.join_all().await {
        match answer {
            EnqueueOutcome::Done(answers) => match &answers[..] {
                [Enqueued::New(receipt)] => new.push(receipt.clone()),
                [Enqueued::Duplicate(receipt)] => known.push(receipt.clone()),
                other => panic!("neither new nor known: {other:?}"),
            },
            other => panic!("not taken: {other:?}"),
        }
    }
    assert_eq!((new.len(), known.len()), (1, 63));
    assert!(known.iter().all(|receipt| *receipt == new[0]), "all got the first answer");
    assert_eq!(stage.bodies(&queue).await, ["once"]);
}

pub(crate) async fn senders_that_cross_their_keys_do_not_lock_each_other_out(stage: Stage) {
    let queue = stage.queue("letters").await;
    let mut senders = JoinSet::new();
    for sender in 0..16 {
        let mut messages = (0..8)
            .map(|number| keyed(&queue, &number.to_string(), &number.to_string(), number))
            .collect::<Vec<_>>();
        if sender % 2 == 1 {
            messages.reverse();
        }
        let store = stage.store.clone();
        senders.spawn(async move { store.enqueue(together(messages)).await.unwrap() });
    }
    for answer in senders.join_all().await {
        let EnqueueOutcome::Done(answers) = answer else { panic!("not taken: {answer:?}") };
        assert!(answers.iter().all(|answer| !matches!(answer, Enqueued::Refused(_))));
    }
    let mut bodies = stage.bodies(&queue).await;
    bodies.sort();
    assert_eq!(bodies, ["0", "1", "2", "3", "4", "5", "6", "7"]);
}

pub(crate) async fn a_key_is_forgotten_after_its_window(stage: Stage) {
    let queue = stage.queue_with("letters", |settings| settings.dedup_window = SHORT).await;
    stage.send(keyed(&queue, "first", "k", 1)).await;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, Settlement::Ack).await;
    stage.pass(SHORT).await;
    assert_eq!(stage.store.sweep(ALL).await.unwrap().keys, 1);
    stage.send(keyed(&queue, "second", "k", 2)).await;
}

pub(crate) async fn a_key_over_a_batch_is_forgotten_after_its_window(stage: Stage) {
    let queue = stage.queue_with("letters", |settings| settings.dedup_window = SHORT).await;
    for print in [1, 2] {
        let messages = vec![message(&queue, "a")];
        let batch = Enqueue { batch: Some(key("batch", print)), ..together(messages) };
        let taken = stage.store.enqueue(batch).await.unwrap();
        assert!(matches!(taken, EnqueueOutcome::Done(_)), "{taken:?}");
        let leased = stage.claim_one(&queue).await;
        stage.must_settle(&leased, Settlement::Ack).await;
        stage.pass(SHORT).await;
        assert_eq!(stage.store.sweep(ALL).await.unwrap().keys, 1);
    }
}

pub(crate) async fn a_key_in_its_window_is_kept_when_its_message_is_gone(stage: Stage) {
    let queue = stage.queue_with("letters", |s| s.retention.completed = Duration::ZERO).await;
    let first = stage.send(keyed(&queue, "once", "k", 1)).await;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, Settlement::Ack).await;
    stage.pass(SHORT).await;
    let swept = stage.store.sweep(ALL).await.unwrap();
    assert_eq!((swept.deleted, swept.keys), (1, 0));
    assert_eq!(stage.look(first.id).await, None);
    assert_eq!(stage.offer(keyed(&queue, "once", "k", 1)).await, Enqueued::Duplicate(first));
}

pub(crate) async fn a_key_outlives_its_window_while_its_message_lives_or_is_dead(stage: Stage) {
    let queue = stage.queue_with("letters", |settings| settings.dedup_window = SHORT).await;
    let first = stage.send(keyed(&queue, "once", "k", 1)).await;
    let known = || async {
        assert_eq!(stage.store.sweep(ALL).await.unwrap().keys, 0);
        let answer = stage.offer(keyed(&queue, "once", "k", 1)).await;
        assert_eq!(answer, Enqueued::Duplicate(first.clone()));
    };
    stage.pass(SHORT).await;
    known().await;
    let leased = stage.claim_one(&queue).await;
    known().await;
    stage.must_settle(&leased, Settlement::Retry { after: LONG }).await;
    known().await;
    stage.store.amend(first.id, pumphouse::store::Amendment::RunNow).await.unwrap();
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, retry_at_once()).await;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, dead_letter("enough")).await;
    known().await;
    stage.store.delete_dead(first.id).await.unwrap();
    assert_eq!(stage.store.sweep(ALL).await.unwrap().keys, 1);
    stage.send(keyed(&queue, "anew", "k", 2)).await;
}

fn keyed(queue: &QueueName, body: &str, key: &str, print: u8) -> NewMessage {
    with_key(message(queue, body), key, print)
}

fn with_key(mut message: NewMessage, name: &str, print: u8) -> NewMessage {
    message.keys.push(key(name, print));
    message
}

fn key(name: &str, print: u8) -> Idempotency {
    Idempotency::new("test", name, [print; 32])
}

/// A message that is not to be sent while another one like it can still be delivered.
fn unique(queue: &QueueName, body: &str) -> NewMessage {
    NewMessage { keys: vec![Idempotency::while_pending("report")], ..message(queue, body) }
}

pub(crate) async fn of_a_unique_key_one_message_is_pending_at_a_time(stage: Stage) {
    let queue = stage.queue("letters").await;
    let first = stage.send(unique(&queue, "a")).await;
    for _ in 0..2 {
        let again = stage.offer(unique(&queue, "another body")).await;
        assert_eq!(again, Enqueued::Duplicate(first.clone()), "while it waits, while it is out");
        stage.claim(&queue, 1).await;
    }
    let other = stage.queue("others").await;
    stage.send(unique(&other, "in another queue")).await;
    let id = first.id;
    let leased = stage.store.message(id).await.unwrap().expect("it is there").0;
    assert_eq!(leased.state, State::Leased);
    stage.store.reap(ALL).await.unwrap();
    let queue = stage.queue("third").await;
    let first = stage.send(unique(&queue, "b")).await;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, Settlement::Ack).await;
    let second = stage.send(unique(&queue, "c")).await;
    assert_ne!(first.id, second.id);
    stage.store.sweep(ALL).await.unwrap();
    assert_eq!(stage.offer(unique(&queue, "d")).await, Enqueued::Duplicate(second));
}

pub(crate) async fn a_unique_key_says_nothing_of_what_is_dead(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send(unique(&queue, "a")).await;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, dead_letter("it was not to be")).await;
    stage.send(unique(&queue, "b")).await;
}
