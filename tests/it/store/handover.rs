//! What is handed over in memory once it is committed: both databases, with somebody who takes.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pumphouse::model::{Leased, QueueName, ReplicaName, Settlement, State, When};
use pumphouse::store::{Enqueued, Settled, Taker};

use crate::support::eventually;
use crate::support::stage::{ALL, LONG, SHORT, Stage, bodies_of, message, replica, together};

/// Takes what it has places for.
#[derive(Debug)]
struct Hands {
    places: AtomicUsize,
    lease: Duration,
    taken: Mutex<Vec<Leased>>,
    gone: bool,
}

impl Hands {
    fn with(places: usize) -> Self {
        Self { places: places.into(), lease: LONG, taken: Mutex::default(), gone: false }
    }

    fn open(self, stage: &Stage, queue: &QueueName) -> Arc<Self> {
        let hands = Arc::new(self);
        stage.store.handover().open(queue.clone(), hands.clone());
        hands
    }

    fn places(&self) -> usize {
        self.places.load(Ordering::SeqCst)
    }

    fn bodies(&self) -> Vec<String> {
        let taken = self.taken.lock().unwrap();
        taken.iter().map(|one| String::from_utf8_lossy(&one.message.body).into_owned()).collect()
    }

    fn only(&self) -> Leased {
        let taken = self.taken.lock().unwrap();
        let [one] = &taken[..] else { panic!("one was taken: {taken:?}") };
        one.clone()
    }
}

impl Taker for Hands {
    fn reserve(&self) -> bool {
        let less = |places: usize| places.checked_sub(1);
        self.places.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok()
    }

    fn give_back(&self) {
        self.places.fetch_add(1, Ordering::SeqCst);
    }

    fn terms(&self) -> (ReplicaName, Duration) {
        (replica(), self.lease)
    }

    fn take(&self, leased: Leased) -> Result<(), Box<Leased>> {
        if self.gone {
            self.give_back();
            return Err(Box::new(leased));
        }
        self.taken.lock().unwrap().push(leased);
        Ok(())
    }
}

pub(crate) async fn a_message_is_handed_over_as_if_it_had_been_claimed(stage: Stage) {
    let queue = stage.queue("letters").await;
    let hands = Hands::with(1).open(&stage, &queue);
    let receipt = stage.send(message(&queue, "hello")).await;
    assert_eq!(receipt.state, State::Ready, "its sender need not know");
    let leased = hands.only();
    assert_eq!((leased.lease.id, leased.tries.attempts), (receipt.id, 1));
    assert_eq!((leased.due_at, leased.leased_at), (receipt.deliver_at, receipt.enqueued_at));
    let record = stage.record(receipt.id).await;
    assert_eq!((record.state, record.tries), (State::Leased, leased.tries));
    assert_eq!(record.head, leased.message.head);
    assert!(stage.claim(&queue, 1).await.is_empty(), "it is nobody else's");
    stage.must_settle(&leased, Settlement::Ack).await;
    assert_eq!(stage.state(receipt.id).await, Some(State::Completed));
    assert_eq!(stage.settle(&leased, Settlement::Ack).await, Settled::LeaseLost);
}

pub(crate) async fn without_a_place_a_message_waits_and_those_after_it_too(stage: Stage) {
    let queue = stage.queue("letters").await;
    let hands = Hands::with(1).open(&stage, &queue);
    for body in ["first", "second"] {
        stage.send(message(&queue, body)).await;
    }
    hands.give_back();
    let third = stage.send(message(&queue, "third")).await.id;
    assert_eq!(hands.bodies(), ["first"], "none may overtake the one that waits");
    assert_eq!((stage.state(third).await, hands.places()), (Some(State::Ready), 1));
    assert_eq!(stage.claim(&queue, 5).await.len(), 2);
    stage.send(message(&queue, "fourth")).await;
    assert_eq!(hands.bodies(), ["first", "fourth"]);
}

pub(crate) async fn what_is_not_due_too_late_or_of_another_queue_is_not_handed_over(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    let hands = Hands::with(9).open(&stage, &queue);
    let mut later = message(&queue, "later");
    later.deliver = When::In(LONG);
    stage.send(later).await;
    stage.send(message(&other, "elsewhere")).await;
    let mut late = message(&queue, "too late");
    late.expires = Some(When::In(Duration::ZERO));
    let late = stage.send(late).await.id;
    assert_eq!((hands.bodies().len(), hands.places()), (0, 9));
    stage.store.sweep(9).await.unwrap();
    assert_eq!(stage.state(late).await, Some(State::Expired));
}

pub(crate) async fn what_is_refused_gives_its_places_back(stage: Stage) {
    let queue = stage.queue_with("letters", |settings| settings.max_messages = Some(2)).await;
    let hands = Hands::with(9).open(&stage, &queue);
    let mut three = together((0..3).map(|_| message(&queue, "x")).collect());
    three.atomic = true;
    stage.store.enqueue(three).await.unwrap();
    assert_eq!((hands.bodies().len(), hands.places()), (0, 9));
    // And so does what has to be tried again, because one of them is known by its name already.
    let known = message(&queue, "known");
    stage.send(known.clone()).await;
    let answers = stage.send_all(vec![known, message(&queue, "new")]).await;
    assert!(matches!(answers[..], [Enqueued::Duplicate(_), Enqueued::New(_)]), "{answers:?}");
    assert_eq!((hands.bodies(), hands.places()), (vec!["known".into(), "new".into()], 7));
}

pub(crate) async fn what_nobody_takes_any_more_is_ready_at_once(stage: Stage) {
    let queue = stage.queue("letters").await;
    let gone = Hands { gone: true, ..Hands::with(1) }.open(&stage, &queue);
    let id = stage.send_to(&queue, "hello").await;
    eventually("it is ready", async || stage.state(id).await == Some(State::Ready)).await;
    assert_eq!(gone.places(), 1);
    assert_eq!(stage.record(id).await.tries.failures, 0);
    stage.claim_one(&queue).await;
}

pub(crate) async fn a_lease_that_was_handed_over_runs_out_like_any_other(stage: Stage) {
    let queue = stage.queue("letters").await;
    let hands = Hands { lease: SHORT, ..Hands::with(1) }.open(&stage, &queue);
    let id = stage.send_to(&queue, "hello").await;
    stage.pass(SHORT).await;
    assert_eq!(stage.settle(&hands.only(), Settlement::Ack).await, Settled::LeaseLost);
    assert_eq!(stage.store.reap(9).await.unwrap().len(), 1);
    let again = stage.claim_one(&queue).await;
    assert_eq!((again.lease.id, again.tries.attempts, again.tries.crashes), (id, 2, 1));
    assert_eq!(stage.settle(&hands.only(), Settlement::Ack).await, Settled::LeaseLost);
    stage.must_settle(&again, Settlement::Ack).await;
}

pub(crate) async fn who_closes_takes_no_more_and_another_is_left_alone(stage: Stage) {
    let queue = stage.queue("letters").await;
    let first = Hands::with(9).open(&stage, &queue);
    let second = Hands::with(9).open(&stage, &queue);
    let closing: Arc<dyn Taker> = first.clone();
    stage.store.handover().close(&queue, &closing);
    stage.send_to(&queue, "for the second").await;
    assert_eq!((first.bodies().len(), second.bodies().len()), (0, 1));
    let closing: Arc<dyn Taker> = second.clone();
    stage.store.handover().close(&queue, &closing);
    stage.send_to(&queue, "for nobody").await;
    assert_eq!(second.bodies().len(), 1);
}

pub(crate) async fn of_several_queues_in_one_call_each_is_looked_at_alone(stage: Stage) {
    let (a, b, c) = (stage.queue("a").await, stage.queue("b").await, stage.queue("c").await);
    stage.send(message(&b, "waits")).await;
    let all = [&a, &b, &c].map(|queue| Hands::with(2).open(&stage, queue));
    let mixed = [(&c, "c1"), (&a, "a1"), (&b, "b1"), (&a, "a2"), (&c, "c2"), (&a, "a3")];
    let mixed = mixed.map(|(queue, body)| message(queue, body));
    stage.send_all(mixed.to_vec()).await;
    let taken = all.each_ref().map(|hands| hands.bodies());
    assert_eq!(taken, [vec!["a1", "a2"], vec![], vec!["c1", "c2"]]);
    assert_eq!(
        all.each_ref().map(|hands| hands.places()),
        [0, 2, 0],
        "no place is kept for nothing"
    );
    assert_eq!(bodies_of(&stage.claim(&b, ALL).await), ["waits", "b1"]);
    assert_eq!(bodies_of(&stage.claim(&a, ALL).await), ["a3"]);
    for (hands, queue) in all.iter().zip([&a, &b, &c]) {
        let taken = hands.taken.lock().unwrap().clone();
        for leased in taken {
            assert_eq!(leased.message.head.queue, *queue);
            stage.must_settle(&leased, Settlement::Ack).await;
        }
    }
}
