//! Promises about claims: who gets what, in which order, and for how long.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pumphouse::model::{MessageId, NewMessage, Settlement, State, Tries, When};
use pumphouse::store::{Amendment, Claim, Settled};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use crate::support::stage::{
    ALL, LONG, SHORT, Stage, bodies_of, claim, leases_of, message, message_in, queue_name,
    retry_at_once,
};

pub(crate) async fn a_claim_hands_over_the_message_and_counts_the_attempt(stage: Stage) {
    let queue = stage.queue("letters").await;
    let receipt = stage.send(message(&queue, "hello")).await;
    let before = Instant::now();
    let leased = stage.claim_one(&queue).await;
    assert_eq!(leased.lease.id, receipt.id);
    assert_eq!(leased.message.head.id, receipt.id);
    assert_eq!(leased.message.body, "hello");
    assert_eq!(leased.tries, Tries { attempts: 1, failures: 0, crashes: 0 });
    assert_eq!(leased.due_at, receipt.deliver_at);
    assert!(leased.leased_at >= receipt.enqueued_at);
    assert!(leased.lease.until >= before + LONG, "not shorter than asked for");
    assert!(leased.lease.until <= Instant::now() + LONG, "not longer than asked for");

    let record = stage.record(receipt.id).await;
    assert_eq!(record.state, State::Leased);
    assert_eq!(record.tries, leased.tries);
}

pub(crate) async fn higher_priority_goes_first_then_arrival(stage: Stage) {
    let queue = stage.queue("letters").await;
    let with = |body: &str, priority| NewMessage { priority, ..message(&queue, body) };
    stage.send(with("middle 1", 0)).await;
    stage.send(with("last", -100)).await;
    stage.send(with("first", 100)).await;
    stage.send(with("middle 2", 0)).await;
    stage.send(with("second", 1)).await;
    let order = ["first", "second", "middle 1", "middle 2", "last"];
    let mut got = bodies_of(&stage.claim(&queue, 2).await);
    got.extend(bodies_of(&stage.claim(&queue, ALL).await));
    assert_eq!(got, order);
}

pub(crate) async fn of_one_priority_the_longest_due_goes_first(stage: Stage) {
    let queue = stage.queue("letters").await;
    // In one call, so that nothing can come between their due times.
    let messages = vec![
        message_in(&queue, "due second", SHORT * 2),
        message_in(&queue, "due first", SHORT),
        NewMessage { priority: 1, ..message_in(&queue, "high", SHORT * 2) },
    ];
    stage.send_all(messages).await;
    stage.pass(SHORT * 2).await;
    stage.send_to(&queue, "due last").await;
    assert_eq!(stage.store.promote(ALL).await.unwrap().count, 3);
    let order = ["high", "due first", "due second", "due last"];
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), order);
}

pub(crate) async fn a_retried_message_goes_by_when_it_is_due_again(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "retried").await;
    let leased = stage.claim_one(&queue).await;
    stage.pass(SHORT).await;
    stage.send_to(&queue, "fresh").await;
    stage.pass(SHORT).await;
    stage.must_settle(&leased, retry_at_once()).await;
    let again = stage.claim(&queue, ALL).await;
    assert_eq!(bodies_of(&again), ["fresh", "retried"]);
    assert!(again[1].due_at > again[0].due_at);
}

pub(crate) async fn a_released_message_keeps_its_place(stage: Stage) {
    let queue = stage.queue("letters").await;
    for body in ["first", "second"] {
        stage.send_to(&queue, body).await;
        stage.pass(SHORT).await;
    }
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, Settlement::Release).await;
    let again = stage.claim(&queue, ALL).await;
    assert_eq!(bodies_of(&again), ["first", "second"]);
    assert_eq!(again[0].due_at, leased.due_at);
}

pub(crate) async fn a_claim_takes_no_more_than_it_asks_for(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_all((0..5).map(|n| message(&queue, &n.to_string())).collect()).await;
    assert_eq!(stage.claim(&queue, 0).await.len(), 0);
    assert_eq!(bodies_of(&stage.claim(&queue, 2).await), ["0", "1"]);
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), ["2", "3", "4"]);
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);
}

pub(crate) async fn a_claim_takes_from_its_own_queue(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    stage.send_to(&other, "a parcel").await;
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);
    assert_eq!(stage.claim(&queue_name("nowhere"), ALL).await.len(), 0);
    assert_eq!(bodies_of(&stage.claim(&other, ALL).await), ["a parcel"]);
}

pub(crate) async fn what_is_due_later_is_not_leased(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send(message_in(&queue, "later", LONG)).await.id;
    stage.store.promote(ALL).await.unwrap();
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);
    assert_eq!(stage.state(id).await, Some(State::Scheduled));
}

pub(crate) async fn what_has_expired_is_passed_over(stage: Stage) {
    let queue = stage.queue("letters").await;
    let expires = Some(When::In(SHORT));
    stage.send(NewMessage { expires, priority: 9, ..message(&queue, "too late") }).await;
    let kept = NewMessage { expires: Some(When::In(LONG)), ..message(&queue, "in time") };
    stage.send(kept).await;
    stage.send_to(&queue, "for ever").await;
    stage.pass(SHORT).await;
    assert_eq!(bodies_of(&stage.claim(&queue, 1).await), ["in time"]);
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), ["for ever"]);
}

pub(crate) async fn a_leased_message_is_nobody_elses(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "mine").await;
    stage.lose_a_lease(&queue).await;
    // Run out, and still not to be had before it was taken back: the crash must be counted.
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);
    assert_eq!(stage.state(id).await, Some(State::Leased));
    assert_eq!(stage.store.reap(ALL).await.unwrap().len(), 1);
    assert_eq!(stage.claim_one(&queue).await.tries.attempts, 2);
}

pub(crate) async fn every_claim_has_a_token_of_its_own(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "again and again").await;
    let mut tokens = HashSet::new();
    for _ in 0..20 {
        let leased = stage.claim_one(&queue).await;
        assert!(leased.lease.token.0 >= 0, "63 bits");
        tokens.insert(leased.lease.token);
        stage.must_settle(&leased, Settlement::Release).await;
    }
    assert_eq!(tokens.len(), 20);
}

pub(crate) async fn a_claim_for_what_is_urgent_takes_nothing_else(stage: Stage) {
    let queue = stage.queue("letters").await;
    let urgent_only = || Claim { urgent_only: true, ..claim(&queue, ALL, LONG) };
    stage.send_to(&queue, "usual").await;
    let ready = stage.send_to(&queue, "ready").await;
    let later = stage.send(message_in(&queue, "later", LONG)).await.id;
    assert_eq!(stage.store.lease(urgent_only()).await.unwrap().len(), 0);
    for id in [ready, later] {
        stage.store.amend(id, Amendment::RunNow).await.unwrap();
    }
    let urgent = stage.store.lease(urgent_only()).await.unwrap();
    assert_eq!(bodies_of(&urgent), ["ready", "later"]);
    assert_eq!(stage.store.lease(urgent_only()).await.unwrap().len(), 0);

    for leased in &urgent {
        stage.must_settle(leased, Settlement::Release).await;
    }
    let left = stage.store.lease(urgent_only()).await.unwrap();
    assert_eq!(left.len(), 0, "the mark is used up by the claim");
    assert_eq!(stage.claim(&queue, ALL).await.len(), 3);
}

pub(crate) async fn a_usual_claim_takes_what_is_urgent_too(stage: Stage) {
    let queue = stage.queue("letters").await;
    for body in ["a", "b"] {
        let id = stage.send_to(&queue, body).await;
        stage.store.amend(id, Amendment::RunNow).await.unwrap();
    }
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), ["a", "b"]);
}

pub(crate) async fn claims_at_the_same_time_never_hand_a_message_out_twice(stage: Stage) {
    let queue = stage.queue("letters").await;
    let sent = stage.send_all((0..200).map(|n| message(&queue, &n.to_string())).collect()).await;
    let start = Arc::new(Barrier::new(8));
    let mut workers = JoinSet::new();
    for _ in 0..8 {
        let (store, start, queue) = (stage.store.clone(), start.clone(), queue.clone());
        workers.spawn(async move {
            start.wait().await;
            let mut mine = Vec::<MessageId>::new();
            loop {
                let leased = store.lease(claim(&queue, 7, LONG)).await.unwrap();
                if leased.is_empty() {
                    return mine;
                }
                mine.extend(leased.iter().map(|leased| leased.lease.id));
            }
        });
    }
    let mut handed_out = workers.join_all().await.concat();
    // Who comes last may see nothing while others hold what is left for a moment.
    handed_out.extend(stage.claim(&queue, ALL).await.iter().map(|leased| leased.lease.id));
    assert_eq!(handed_out.len(), sent.len(), "each once");
    assert_eq!(handed_out.iter().collect::<BTreeSet<_>>().len(), sent.len(), "and all of them");
}

pub(crate) async fn a_lease_that_is_renewed_holds_longer(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "long work").await;
    let first = Duration::from_secs(4);
    let leased = stage.claim_for(&queue, first).await;
    let renewed = stage.store.renew(vec![leased.lease.clone()], LONG).await.unwrap();
    assert_eq!(renewed, [true]);
    stage.pass(first).await;
    assert_eq!(stage.store.reap(ALL).await.unwrap(), []);
    assert!(matches!(stage.settle(&leased, Settlement::Ack).await, Settled::Done { .. }));
}

pub(crate) async fn renewing_says_for_each_lease_whether_it_holds(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "run out").await;
    let run_out = stage.lose_a_lease(&queue).await;
    stage.send_all(["held", "settled"].map(|body| message(&queue, body)).into()).await;
    let [held, settled] = &stage.claim(&queue, 2).await[..] else { panic!("two are ready") };
    stage.must_settle(settled, Settlement::Ack).await;
    let mut forged = held.lease.clone();
    forged.token.0 ^= 1;
    let mut leases = leases_of(&[run_out, held.clone(), settled.clone()]);
    leases.push(forged);
    assert_eq!(stage.store.renew(leases, LONG).await.unwrap(), [false, true, false, false]);
    assert_eq!(stage.store.renew(Vec::new(), LONG).await.unwrap(), [false; 0]);
    assert_eq!(stage.store.reap(ALL).await.unwrap().len(), 1, "what ran out stays run out");
}

pub(crate) async fn contents_of_all_kinds_are_claimed_together_and_kept_apart(stage: Stage) {
    let queue = stage.queue("letters").await;
    let mut sent = Vec::new();
    for (kind, correlation_id, body) in [
        (Some("order.paid"), None, &b"plain"[..]),
        (None, Some("talk"), b""),
        (Some(""), Some(""), b"\xff\xfe\x00 no text \x00"),
        (None, None, "\u{e4}\u{20ac}\u{1f600}".as_bytes()),
        (Some("\u{e4}\u{20ac}"), Some("\u{1f600}"), b"\x00"),
    ] {
        let mut message = message(&queue, "");
        message.kind = kind.map(ToOwned::to_owned);
        message.correlation_id = correlation_id.map(ToOwned::to_owned);
        message.details.headers = vec![("x-body".to_owned(), format!("{body:?}"))];
        message.body = body.into();
        sent.push(message);
    }
    stage.send_all(sent.clone()).await;
    let claimed = stage.claim(&queue, ALL).await;
    assert_eq!(claimed.len(), sent.len());
    for (claimed, sent) in claimed.iter().zip(&sent) {
        let head = &claimed.message.head;
        assert_eq!((claimed.lease.id, &claimed.message.body), (sent.id, &sent.body));
        assert_eq!((&head.kind, &head.correlation_id), (&sent.kind, &sent.correlation_id));
        assert_eq!(head.details, sent.details);
    }
}

pub(crate) async fn a_claim_reads_no_more_bytes_than_are_good_for_it(stage: Stage) {
    let queue = stage.queue("parcels").await;
    for size in [17 << 20, 9 << 20, 6 << 20, 6 << 20] {
        let mut large = message(&queue, "");
        large.body = vec![b'x'; size].into();
        stage.send(large).await;
    }
    let mut taken = Vec::new();
    for _ in 0..3 {
        taken.push(stage.claim(&queue, ALL).await.len());
    }
    // One that is larger than all bytes there are, then what fits, then the rest.
    assert_eq!(taken, [1, 2, 1]);
}
