//! Promises about settlements: what each writes, and that a lost lease writes nothing.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use pumphouse::model::{
    DeliveryRecord, ErrorKind, Idempotency, NewMessage, Outcome, Settlement, State, Tries,
};
use pumphouse::store::{Enqueued, Error, Settle, Settled};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::heard;
use crate::support::stage::{
    ALL, LONG, SHORT, Stage, dead_letter, delivery, discard, message, queue_name, retry_at_once,
    settle,
};

pub(crate) async fn an_ack_completes(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_and_settle(&queue, Settlement::Ack).await;
    let record = stage.record(id).await;
    assert_eq!(record.state, State::Completed);
    assert_eq!(record.tries, Tries { attempts: 1, failures: 0, crashes: 0 });
    assert!(record.finished_at >= Some(record.head.enqueued_at));
    assert_eq!(record.reason, None);
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);
}

pub(crate) async fn a_settlement_says_how_old_the_message_is(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "aged").await;
    stage.pass(SHORT).await;
    let leased = stage.claim_one(&queue).await;
    stage.pass(SHORT).await;
    let Settled::Done { age } = stage.settle(&leased, Settlement::Ack).await else {
        panic!("the lease holds");
    };
    assert!(age >= SHORT * 2 && age < LONG, "{age:?}");
}

pub(crate) async fn a_retry_at_once_is_ready_and_counts_a_failure(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_and_settle(&queue, retry_at_once()).await;
    let record = stage.record(id).await;
    assert_eq!(record.state, State::Ready);
    assert_eq!(record.tries, Tries { attempts: 1, failures: 1, crashes: 0 });
    assert_eq!((record.finished_at, record.reason), (None, None));
    assert_eq!(stage.claim_one(&queue).await.tries.attempts, 2);
}

pub(crate) async fn what_is_postponed_counts_nothing_and_waits(stage: Stage) {
    let queue = stage.queue("letters").await;
    for (after, state) in [(Duration::ZERO, State::Ready), (LONG, State::Scheduled)] {
        let id = stage.send_and_settle(&queue, Settlement::Postpone { after }).await;
        let record = stage.record(id).await;
        assert_eq!(record.state, state);
        assert_eq!(record.tries, Tries { attempts: 1, failures: 0, crashes: 0 });
        assert_eq!(stage.deliveries(id).await.len(), 1);
        assert_eq!(stage.claim(&queue, ALL).await.len(), usize::from(state == State::Ready));
    }
}

pub(crate) async fn what_is_moved_keeps_all_but_its_budget(stage: Stage) {
    let (from, to) = (stage.queue("letters").await, stage.queue("parcels").await);
    let key = Idempotency::new("letters", "one", [1; 32]);
    let keyed = NewMessage { keys: vec![key], ..message(&from, "moves") };
    let id = stage.send(keyed.clone()).await.id;
    let leased = stage.claim_one(&from).await;
    stage.must_settle(&leased, retry_at_once()).await;
    let leased = stage.claim_one(&from).await;
    stage.must_settle(&leased, move_to("parcels")).await;
    let record = stage.record(id).await;
    assert_eq!((record.head.queue.clone(), record.state), (to.clone(), State::Ready));
    assert_eq!(record.tries, Tries { attempts: 2, failures: 0, crashes: 0 });
    assert_eq!((record.finished_at, record.reason), (None, None));
    assert_eq!(stage.deliveries(id).await.len(), 2);
    assert_eq!((stage.depth(&from).await.ready, stage.depth(&to).await.ready), (0, 1));
    assert_eq!(stage.settle(&leased, Settlement::Ack).await, Settled::LeaseLost, "an old token");
    assert!(matches!(stage.offer(keyed).await, Enqueued::Duplicate(_)), "its key goes on to count");
    let again = stage.claim_one(&to).await;
    assert_eq!((again.lease.id, again.tries.attempts), (id, 3));
    assert_eq!(stage.claim(&from, ALL).await.len(), 0);
    stage.must_settle(&again, Settlement::Ack).await;
}

pub(crate) async fn what_cannot_be_moved_is_dead(stage: Stage) {
    let from = stage.queue("letters").await;
    let id = stage.send_and_settle(&from, move_to("nowhere")).await;
    let record = stage.record(id).await;
    assert_eq!((record.head.queue, record.state), (from.clone(), State::Dead));
    assert_eq!(record.tries, Tries { attempts: 1, failures: 1, crashes: 0 });
    assert!(record.reason.is_some_and(|reason| reason.contains("nowhere")));
    assert_eq!(stage.depth(&from).await.dead, 1);
}

pub(crate) async fn the_latest_hundred_deliveries_are_kept(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "never wanted").await;
    for _ in 0..105 {
        let leased = stage.claim_one(&queue).await;
        stage.must_settle(&leased, retry_at_once()).await;
    }
    let numbers = stage.deliveries(id).await.into_iter().map(|one| one.number);
    assert_eq!(numbers.collect::<BTreeSet<_>>(), (6..=105).collect());
}

fn move_to(queue: &str) -> Settlement {
    Settlement::Move { to_queue: queue_name(queue), reason: "it belongs elsewhere".to_owned() }
}

pub(crate) async fn a_retry_later_is_scheduled_and_counts_a_failure(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_and_settle(&queue, Settlement::Retry { after: LONG }).await;
    let record = stage.record(id).await;
    assert_eq!(record.state, State::Scheduled);
    assert_eq!(record.tries, Tries { attempts: 1, failures: 1, crashes: 0 });
    let wait = record.deliver_at.duration_since(record.head.enqueued_at);
    assert!(Duration::try_from(wait).unwrap() >= LONG, "{wait:?}");
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);

    let short = stage.send_and_settle(&queue, Settlement::Retry { after: SHORT }).await;
    stage.pass(SHORT).await;
    assert_eq!(stage.store.promote(ALL).await.unwrap().count, 1);
    let again = stage.claim_one(&queue).await;
    assert_eq!((again.lease.id, again.tries.attempts), (short, 2));
    assert!(again.leased_at >= again.due_at);
}

pub(crate) async fn a_dead_letter_is_set_aside_with_its_reason(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_and_settle(&queue, dead_letter("unreadable")).await;
    let record = stage.record(id).await;
    assert_eq!(record.state, State::Dead);
    assert_eq!(record.reason.as_deref(), Some("unreadable"));
    assert_eq!(record.tries, Tries { attempts: 1, failures: 1, crashes: 0 });
    assert!(record.finished_at.is_some());
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);
    assert_eq!(stage.store.payload(id).await.unwrap().unwrap(), "to be settled");
}

pub(crate) async fn a_discarded_message_keeps_its_reason(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_and_settle(&queue, discard("a test")).await;
    let record = stage.record(id).await;
    assert_eq!(record.state, State::Discarded);
    assert_eq!(record.reason.as_deref(), Some("a test"));
    assert!(record.finished_at.is_some());
    assert_eq!(record.tries, Tries { attempts: 1, failures: 0, crashes: 0 });
}

pub(crate) async fn a_release_counts_nothing_and_uses_up_the_number(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "released").await;
    for attempt in 1..=3 {
        let leased = stage.claim_one(&queue).await;
        assert_eq!(leased.tries, Tries { attempts: attempt, failures: 0, crashes: 0 });
        stage.must_settle(&leased, Settlement::Release).await;
        let record = stage.record(id).await;
        assert_eq!(record.state, State::Ready);
        assert_eq!(record.tries, leased.tries);
    }
}

pub(crate) async fn numbers_of_attempts_are_never_used_twice(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "many ways to fail").await;
    let mut numbers = Vec::new();
    for round in 0..3 {
        let released = stage.claim_one(&queue).await;
        stage.must_settle(&released, Settlement::Release).await;
        let lost = stage.lose_a_lease(&queue).await;
        assert_eq!(stage.store.reap(ALL).await.unwrap().len(), 1);
        let failed = stage.claim_one(&queue).await;
        stage.must_settle(&failed, retry_at_once()).await;
        let set_aside = stage.claim_one(&queue).await;
        stage.must_settle(&set_aside, dead_letter("a round is over")).await;
        let tries = stage.record(id).await.tries;
        assert_eq!((tries.failures, tries.crashes), (2, 1), "round {round}: budgets start anew");
        assert_eq!(stage.store.redrive(Default::default(), ALL).await.unwrap(), [id]);
        let round = [released, lost, failed, set_aside];
        numbers.extend(round.iter().map(|leased| leased.tries.attempts));
    }
    assert_eq!(numbers, (1..=12).collect::<Vec<_>>());
}

pub(crate) async fn the_record_of_a_delivery_is_kept_the_latest_first(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "two deliveries").await;
    let leased = stage.claim_one(&queue).await;
    let first = DeliveryRecord {
        status: Some(503),
        error_kind: Some(ErrorKind::Status),
        error: Some("the handler answered 503".to_owned()),
        duration: Duration::from_micros(1_234_567),
        answer: vec![0, 159, 146, 150].into(),
        ..delivery(&leased, Outcome::Failed)
    };
    let failed =
        Settle { delivery: Some(first.clone()), ..settle(&leased, retry_at_once(), vec![]) };
    assert!(matches!(stage.store.settle(failed).await.unwrap(), Settled::Done { .. }));
    let leased = stage.claim_one(&queue).await;
    let second = DeliveryRecord { status: None, ..delivery(&leased, Outcome::Acked) };
    let acked =
        Settle { delivery: Some(second.clone()), ..settle(&leased, Settlement::Ack, vec![]) };
    assert!(matches!(stage.store.settle(acked).await.unwrap(), Settled::Done { .. }));
    assert_eq!(stage.deliveries(id).await, [second, first]);
}

pub(crate) async fn of_two_records_of_one_attempt_the_first_counts(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "two words").await;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, retry_at_once()).await;
    let first = stage.deliveries(id).await;
    let again = stage.claim_one(&queue).await;
    let second = Some(DeliveryRecord { status: Some(500), ..delivery(&leased, Outcome::Failed) });
    let acked = Settle { delivery: second, ..settle(&again, Settlement::Ack, vec![]) };
    assert!(matches!(stage.store.settle(acked).await.unwrap(), Settled::Done { .. }));
    assert_eq!(stage.deliveries(id).await, first);
}

pub(crate) async fn a_delivery_that_never_started_leaves_no_record(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "prefetched").await;
    let leased = stage.claim_one(&queue).await;
    let released = Settle { delivery: None, ..settle(&leased, Settlement::Release, vec![]) };
    assert!(matches!(stage.store.settle(released).await.unwrap(), Settled::Done { .. }));
    assert_eq!(stage.deliveries(id).await, []);
}

pub(crate) async fn a_second_settlement_changes_nothing(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "once").await;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, Settlement::Ack).await;
    let before = stage.look(id).await;
    for settlement in every_settlement() {
        assert_eq!(stage.settle(&leased, settlement).await, Settled::LeaseLost);
    }
    assert_eq!(stage.look(id).await, before);
}

pub(crate) async fn a_lease_that_is_lost_is_lost_whatever_was_to_be_sent(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "x").await;
    let lost = stage.lose_a_lease(&queue).await;
    let nowhere = || vec![message(&queue_name("nowhere"), "y")];
    let settled = stage.settle_and_send(&lost, Settlement::Ack, nowhere()).await;
    assert_eq!(settled, Settled::LeaseLost);
    stage.store.reap(ALL).await.unwrap();
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, Settlement::Ack).await;
    let settled = stage.settle_and_send(&leased, Settlement::Ack, nowhere()).await;
    assert_eq!(settled, Settled::LeaseLost, "a second time");
}

pub(crate) async fn an_old_token_changes_nothing_and_sends_nothing(stage: Stage) {
    let queue = stage.queue("letters").await;
    let other = stage.queue("parcels").await;
    let id = stage.send_to(&queue, "leased again").await;
    let old = stage.claim_one(&queue).await;
    stage.must_settle(&old, Settlement::Release).await;
    let current = stage.claim_one(&queue).await;
    assert_ne!(old.lease.token, current.lease.token);
    let before = stage.look(id).await;
    for settlement in every_settlement() {
        let sent = vec![message(&other, "a ghost")];
        let settled = stage.settle_and_send(&old, settlement, sent).await;
        assert_eq!(settled, Settled::LeaseLost);
    }
    assert_eq!(stage.look(id).await, before);
    assert_eq!(stage.bodies(&other).await, [""; 0]);
    stage.must_settle(&current, Settlement::Ack).await;
}

pub(crate) async fn a_forged_token_changes_nothing(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_all(["a", "b"].map(|body| message(&queue, body)).into()).await;
    let [first, second] = &stage.claim(&queue, 2).await[..] else { panic!("two are ready") };
    let mut forged = first.clone();
    forged.lease.token = second.lease.token;
    assert_eq!(stage.settle(&forged, Settlement::Ack).await, Settled::LeaseLost);
    stage.must_settle(first, Settlement::Ack).await;
    stage.must_settle(second, Settlement::Ack).await;
}

pub(crate) async fn a_lease_that_has_run_out_settles_nothing(stage: Stage) {
    let queue = stage.queue("letters").await;
    let other = stage.queue("parcels").await;
    let id = stage.send_to(&queue, "too slow").await;
    let leased = stage.lose_a_lease(&queue).await;
    let before = stage.look(id).await;
    for settlement in every_settlement() {
        let sent = vec![message(&other, "a ghost")];
        let settled = stage.settle_and_send(&leased, settlement, sent).await;
        assert_eq!(settled, Settled::LeaseLost, "although nobody has taken it back yet");
    }
    assert_eq!(stage.look(id).await, before);
    assert_eq!(stage.bodies(&other).await, [""; 0]);
    assert_eq!(stage.store.reap(ALL).await.unwrap().len(), 1);
    assert_eq!(stage.settle(&leased, Settlement::Ack).await, Settled::LeaseLost);
}

pub(crate) async fn of_many_settlements_at_the_same_time_one_is_written(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    let id = stage.send_to(&queue, "once").await;
    let leased = stage.claim_one(&queue).await;
    let start = Arc::new(Barrier::new(16));
    let mut handlers = JoinSet::new();
    for number in 0..16 {
        let (store, start) = (stage.store.clone(), start.clone());
        let sent = vec![message(&other, &number.to_string())];
        let ack = settle(&leased, Settlement::Ack, sent);
        handlers.spawn(async move {
            start.wait().await;
            store.settle(ack).await.unwrap()
        });
    }
    let settled = handlers.join_all().await;
    let written = settled.iter().filter(|settled| matches!(settled, Settled::Done { .. }));
    assert_eq!(written.count(), 1);
    assert_eq!(stage.bodies(&other).await.len(), 1, "what the one sent, and nothing else");
    assert_eq!(stage.deliveries(id).await.len(), 1);
}

pub(crate) async fn what_a_handler_sends_comes_with_its_ack(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    stage.send_to(&queue, "the cause").await;
    let leased = stage.claim_one(&queue).await;
    let later =
        NewMessage { deliver: pumphouse::model::When::In(LONG), ..message(&queue, "effect 3") };
    let sent = vec![message(&other, "effect 1"), message(&other, "effect 2"), later];
    let mut news = stage.store.news().of_queue(&other);
    let settled = stage.settle_and_send(&leased, Settlement::Ack, sent).await;
    assert!(matches!(settled, Settled::Done { .. }));
    heard(&mut news).await;
    assert_eq!(stage.bodies(&other).await, ["effect 2", "effect 1"]);
    assert_eq!(stage.depth(&queue).await.scheduled, 1);
    assert_eq!(stage.state(leased.lease.id).await, Some(State::Completed));
}

pub(crate) async fn what_a_handler_sends_is_dropped_without_an_ack(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    for settlement in every_settlement() {
        if settlement == Settlement::Ack {
            continue;
        }
        stage.send_to(&queue, "the cause").await;
        let leased = stage.claim_one(&queue).await;
        let sent = vec![message(&other, "no effect"), message(&queue_name("nowhere"), "none")];
        let settled = stage.settle_and_send(&leased, settlement, sent).await;
        assert!(matches!(settled, Settled::Done { .. }));
        stage.store.purge(&queue, ALL).await.unwrap();
    }
    assert_eq!(stage.bodies(&other).await, [""; 0]);
}

pub(crate) async fn an_ack_that_sends_to_an_unknown_queue_changes_nothing(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    let id = stage.send_to(&queue, "the cause").await;
    let leased = stage.claim_one(&queue).await;
    let before = stage.look(id).await;
    let sent = vec![message(&other, "fine"), message(&queue_name("nowhere"), "not fine")];
    let refused = stage.store.settle(settle(&leased, Settlement::Ack, sent)).await;
    assert!(matches!(refused, Err(Error::Rejected { .. })), "{refused:?}");
    assert_eq!(stage.look(id).await, before);
    assert_eq!(stage.bodies(&other).await, [""; 0]);
    // The lease still holds, so that the handler's work need not be repeated.
    stage.must_settle(&leased, Settlement::Ack).await;
}

pub(crate) async fn whoever_listens_hears_of_what_returns(stage: Stage) {
    let queue = stage.queue("letters").await;
    let mut ready = stage.store.news().of_queue(&queue);
    let mut schedule = stage.store.news().of_schedule();
    for settlement in [retry_at_once(), Settlement::Release] {
        stage.send_to(&queue, "to return").await;
        let leased = stage.claim_one(&queue).await;
        ready.mark_unchanged();
        stage.must_settle(&leased, settlement).await;
        heard(&mut ready).await;
        stage.store.purge(&queue, ALL).await.unwrap();
    }
    schedule.mark_unchanged();
    stage.send_and_settle(&queue, Settlement::Retry { after: LONG }).await;
    heard(&mut schedule).await;
}

fn every_settlement() -> [Settlement; 6] {
    [
        Settlement::Ack,
        retry_at_once(),
        Settlement::Retry { after: LONG },
        dead_letter("a reason"),
        discard("a reason"),
        Settlement::Release,
    ]
}

pub(crate) async fn settlements_of_all_kinds_at_once_are_each_done(stage: Stage) {
    const MANY: usize = 250;
    let queue = stage.queue("letters").await;
    stage.send_all((0..MANY).map(|n| message(&queue, &n.to_string())).collect()).await;
    let leased = stage.claim(&queue, ALL).await;
    let mut stale = leased[0].clone();
    stale.lease.token.0 += 1;
    let retry = Settlement::Retry { after: Duration::ZERO };
    let by_place = |place: usize| match place % 5 {
        0 => Settlement::Ack,
        1 => dead_letter("a test"),
        2 => Settlement::Release,
        _ => retry.clone(),
    };
    let wanted = leased.iter().enumerate();
    let settles = wanted.map(|(place, one)| settle(one, by_place(place), Vec::new()));
    // The same message with a token that is not its own, before its turn and after it.
    let ghost = || settle(&stale, retry.clone(), Vec::new());
    let all = [ghost()].into_iter().chain(settles).chain([ghost()]).collect::<Vec<_>>();
    let settled = join_all(all.into_iter().map(|one| stage.store.settle(one))).await;
    for (place, settled) in settled.iter().enumerate() {
        let is_ghost = place == 0 || place == MANY + 1;
        match settled {
            Ok(Settled::LeaseLost) if is_ghost => (),
            Ok(Settled::Done { .. }) if !is_ghost => (),
            other => panic!("settlement {place}: {other:?}"),
        }
    }
    let depth = stage.depth(&queue).await;
    assert_eq!((depth.dead, depth.ready, depth.leased), (50, 150, 0));
    let failures = stage.claim(&queue, ALL).await.iter().map(|one| one.tries.failures).sum::<u32>();
    assert_eq!(failures, 100, "a retry is a failure, and a release is none");
}
