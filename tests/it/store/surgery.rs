//! Promises about the operator's hand on messages: amend, redrive, delete, purge.

use std::collections::BTreeSet;
use std::time::Duration;

use pumphouse::model::{MessageId, NewMessage, QueueName, Settlement, State, Tries, When};
use pumphouse::store::{Amended, Amendment, Filter};

use crate::support::heard;
use crate::support::stage::{
    ALL, LONG, SHORT, Stage, bodies_of, dead_letter, discard, message, message_in, of_queue,
    queue_name,
};

const AMENDMENTS: [Amendment; 3] =
    [Amendment::Cancel, Amendment::RunNow, Amendment::Reschedule(When::In(LONG))];

pub(crate) async fn what_waits_can_be_cancelled(stage: Stage) {
    let queue = stage.queue("letters").await;
    let ready = stage.send_to(&queue, "ready").await;
    let scheduled = stage.send(message_in(&queue, "scheduled", LONG)).await.id;
    for id in [ready, scheduled] {
        let record = amend(&stage, id, Amendment::Cancel).await;
        assert_eq!(record.state, State::Cancelled);
        assert!(record.finished_at.is_some());
        assert_eq!(stage.record(id).await, record);
        let again = stage.store.amend(id, Amendment::Cancel).await.unwrap();
        assert_eq!(again, Amended::Not(State::Cancelled));
    }
    stage.pass(SHORT).await;
    assert_eq!(stage.store.promote(ALL).await.unwrap().next, None);
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);
}

pub(crate) async fn what_is_due_later_can_be_run_now(stage: Stage) {
    let queue = stage.queue("letters").await;
    let sent = stage.send(message_in(&queue, "later", LONG)).await;
    let mut news = stage.store.news().of_queue(&queue);
    let record = amend(&stage, sent.id, Amendment::RunNow).await;
    heard(&mut news).await;
    assert_eq!(record.state, State::Ready);
    assert!(record.deliver_at < sent.deliver_at && record.deliver_at >= sent.enqueued_at);
    assert_eq!(stage.record(sent.id).await, record);
    assert_eq!(stage.claim_one(&queue).await.lease.id, sent.id);
}

pub(crate) async fn what_is_ready_keeps_its_place_when_it_is_run_now(stage: Stage) {
    let queue = stage.queue("letters").await;
    let first = stage.send(message(&queue, "first")).await;
    stage.pass(SHORT).await;
    stage.send_to(&queue, "second").await;
    stage.pass(SHORT).await;
    let record = amend(&stage, first.id, Amendment::RunNow).await;
    assert_eq!((record.state, record.deliver_at), (State::Ready, first.deliver_at));
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), ["first", "second"]);
}

pub(crate) async fn what_waits_can_be_rescheduled(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "ready").await;
    let mut news = stage.store.news().of_schedule();
    let later = amend(&stage, id, Amendment::Reschedule(When::In(LONG))).await;
    heard(&mut news).await;
    assert_eq!(later.state, State::Scheduled);
    assert!(later.deliver_at >= later.head.enqueued_at + LONG);
    assert_eq!(stage.claim(&queue, ALL).await.len(), 0);

    let moment = later.deliver_at + LONG;
    let then = amend(&stage, id, Amendment::Reschedule(When::At(moment))).await;
    assert_eq!((then.state, then.deliver_at), (State::Scheduled, moment));

    let passed = When::At(then.head.enqueued_at - LONG);
    let now = amend(&stage, id, Amendment::Reschedule(passed)).await;
    assert_eq!(now.state, State::Ready);
    assert!(now.deliver_at >= now.head.enqueued_at, "what has passed counts as now");
    assert_eq!(stage.record(id).await, now);
    assert_eq!(stage.claim_one(&queue).await.lease.id, id);
}

pub(crate) async fn what_is_rescheduled_is_no_longer_urgent(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "not so urgent").await;
    amend(&stage, id, Amendment::RunNow).await;
    amend(&stage, id, Amendment::Reschedule(When::Now)).await;
    let claim = crate::support::stage::claim(&queue, ALL, LONG);
    let urgent = pumphouse::store::Claim { urgent_only: true, ..claim };
    assert_eq!(stage.store.lease(urgent).await.unwrap().len(), 0);
    assert_eq!(stage.claim(&queue, ALL).await.len(), 1);
}

pub(crate) async fn only_what_waits_can_be_amended(stage: Stage) {
    let queue = stage.queue("letters").await;
    let completed = stage.send_and_settle(&queue, Settlement::Ack).await;
    let discarded = stage.send_and_settle(&queue, discard("a test")).await;
    let dead = stage.send_and_settle(&queue, dead_letter("a test")).await;
    let leased = stage.send_to(&queue, "leased").await;
    stage.claim_one(&queue).await;
    for amendment in AMENDMENTS {
        for (id, state) in [
            (completed, State::Completed),
            (discarded, State::Discarded),
            (dead, State::Dead),
            (leased, State::Leased),
        ] {
            let before = stage.look(id).await;
            let amended = stage.store.amend(id, amendment).await.unwrap();
            assert_eq!(amended, Amended::Not(state), "{amendment:?}");
            assert_eq!(stage.look(id).await, before);
        }
        let amended = stage.store.amend(MessageId::new(), amendment).await.unwrap();
        assert_eq!(amended, Amended::NoSuchMessage);
    }
}

pub(crate) async fn a_dead_letter_that_is_redriven_starts_anew(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "again").await;
    stage.lose_a_lease(&queue).await;
    stage.store.reap(ALL).await.unwrap();
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, dead_letter("a test")).await;
    let died = stage.record(id).await;
    assert_eq!(died.tries, Tries { attempts: 2, failures: 1, crashes: 1 });

    let mut news = stage.store.news().of_queue(&queue);
    assert_eq!(stage.store.redrive(of_queue(&queue), ALL).await.unwrap(), [id]);
    heard(&mut news).await;
    let record = stage.record(id).await;
    assert_eq!(record.state, State::Ready);
    assert_eq!(record.tries, Tries { attempts: 2, failures: 0, crashes: 0 });
    assert_eq!((record.reason, record.finished_at), (None, None));
    assert_eq!(record.head, died.head);
    assert_eq!(stage.deliveries(id).await.len(), 2, "its history stays");
    let again = stage.claim_one(&queue).await;
    assert_eq!(again.tries, Tries { attempts: 3, failures: 0, crashes: 0 });
    assert_eq!(stage.store.redrive(of_queue(&queue), ALL).await.unwrap(), []);
}

pub(crate) async fn redriven_messages_line_up_behind_what_is_due(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "dead").await;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, dead_letter("a test")).await;
    stage.pass(SHORT).await;
    stage.send_to(&queue, "fresh").await;
    stage.pass(SHORT).await;
    stage.store.redrive(of_queue(&queue), ALL).await.unwrap();
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), ["fresh", "dead"]);
}

pub(crate) async fn a_redriven_message_does_not_expire_at_once(stage: Stage) {
    let queue = stage.queue("letters").await;
    // Long enough to be claimed in time on a busy machine.
    let life = Duration::from_secs(4);
    let brief = NewMessage { expires: Some(When::In(life)), ..message(&queue, "brief") };
    let brief = stage.send(brief).await.id;
    let lasting = NewMessage { expires: Some(When::In(LONG)), ..message(&queue, "lasting") };
    let lasting = stage.send(lasting).await.id;
    for leased in stage.claim(&queue, 2).await {
        stage.must_settle(&leased, dead_letter("a test")).await;
    }
    let expires_at = stage.record(lasting).await.head.expires_at;
    assert!(expires_at.is_some());
    stage.pass(life).await;
    assert_eq!(stage.store.redrive(of_queue(&queue), ALL).await.unwrap(), [brief, lasting]);
    assert_eq!(stage.record(brief).await.head.expires_at, None);
    assert_eq!(stage.record(lasting).await.head.expires_at, expires_at, "it is still to come");
    assert_eq!(stage.store.sweep(ALL).await.unwrap().expired, []);
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), ["brief", "lasting"]);
}

pub(crate) async fn redriving_takes_the_oldest_and_no_more_than_asked(stage: Stage) {
    let queue = stage.queue("letters").await;
    let dead = dead_letters(&stage, &queue, &["a", "b", "c", "d", "e"]).await;
    assert_eq!(stage.store.redrive(of_queue(&queue), 2).await.unwrap(), dead[..2]);
    assert_eq!(stage.store.redrive(of_queue(&queue), 2).await.unwrap(), dead[2..4]);
    assert_eq!(stage.store.redrive(of_queue(&queue), 2).await.unwrap(), dead[4..]);
    assert_eq!(stage.depth(&queue).await.dead, 0);
    assert_eq!(stage.depth(&queue).await.ready, 5);
}

pub(crate) async fn redriving_takes_what_the_filter_means(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    let dead = dead_letters(&stage, &queue, &["a", "b", "c"]).await;
    let elsewhere = dead_letters(&stage, &other, &["d"]).await;
    let done = stage.send_and_settle(&queue, Settlement::Ack).await;

    let nowhere = of_queue(&queue_name("nowhere"));
    assert_eq!(stage.store.redrive(nowhere, ALL).await.unwrap(), []);
    let kind = Filter { kind: Some("of b".to_owned()), ..Filter::default() };
    assert_eq!(stage.store.redrive(kind, ALL).await.unwrap(), dead[1..2]);
    let ids = Filter { ids: vec![dead[2], dead[1], done, MessageId::new()], ..Filter::default() };
    assert_eq!(stage.store.redrive(ids, ALL).await.unwrap(), dead[2..]);
    let rest = stage.store.redrive(Filter::default(), ALL).await.unwrap();
    assert_eq!(rest, [dead[0], elsewhere[0]]);
    assert_eq!(stage.state(done).await, Some(State::Completed));
}

pub(crate) async fn a_dead_letter_can_be_deleted(stage: Stage) {
    let queue = stage.queue("letters").await;
    let [id, spared] = dead_letters(&stage, &queue, &["a", "b"]).await[..] else { panic!() };
    let was = stage.record(id).await;
    assert_eq!(stage.store.delete_dead(id).await.unwrap(), Amended::Done(was));
    assert_eq!(stage.look(id).await, None);
    assert_eq!(stage.store.payload(id).await.unwrap(), None);
    assert_eq!(stage.store.delete_dead(id).await.unwrap(), Amended::NoSuchMessage);
    assert_eq!(stage.state(spared).await, Some(State::Dead));
    assert_eq!(stage.depth(&queue).await.dead, 1);
}

pub(crate) async fn only_a_dead_letter_can_be_deleted(stage: Stage) {
    let queue = stage.queue("letters").await;
    let done = stage.send_and_settle(&queue, Settlement::Ack).await;
    let leased = stage.send_to(&queue, "leased").await;
    stage.claim_one(&queue).await;
    let ready = stage.send_to(&queue, "ready").await;
    for (id, state) in [(done, State::Completed), (leased, State::Leased), (ready, State::Ready)] {
        assert_eq!(stage.store.delete_dead(id).await.unwrap(), Amended::Not(state));
        assert_eq!(stage.state(id).await, Some(state));
    }
}

pub(crate) async fn a_purge_deletes_what_waits_and_nothing_else(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    let elsewhere = stage.send_to(&other, "elsewhere").await;
    let completed = stage.send_and_settle(&queue, Settlement::Ack).await;
    let dead = stage.send_and_settle(&queue, dead_letter("a test")).await;
    let held = stage.send_to(&queue, "leased").await;
    let leased = stage.claim_one(&queue).await;
    let ready = stage.send_to(&queue, "ready").await;
    let scheduled = stage.send(message_in(&queue, "scheduled", LONG)).await.id;

    assert_eq!(stage.store.purge(&queue, ALL).await.unwrap(), 2);
    assert_eq!(stage.store.purge(&queue, ALL).await.unwrap(), 0);
    for id in [ready, scheduled] {
        assert_eq!(stage.look(id).await, None);
        assert_eq!(stage.store.payload(id).await.unwrap(), None);
    }
    let left = stage.list(&Filter::default(), ALL).await.into_iter().map(|record| record.head.id);
    let expected = BTreeSet::from([elsewhere, completed, dead, held]);
    assert_eq!(left.collect::<BTreeSet<_>>(), expected);
    stage.must_settle(&leased, Settlement::Ack).await;
    assert_eq!(stage.store.purge(&queue_name("nowhere"), ALL).await.unwrap(), 0);
}

pub(crate) async fn a_purge_stops_at_its_limit(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_all((0..4).map(|n| message(&queue, &n.to_string())).collect()).await;
    stage.send(message_in(&queue, "scheduled", LONG)).await;
    assert_eq!(stage.store.purge(&queue, 3).await.unwrap(), 3);
    assert_eq!(stage.list(&of_queue(&queue), ALL).await.len(), 2);
    assert_eq!(stage.store.purge(&queue, 3).await.unwrap(), 2);
    let depth = stage.depth(&queue).await;
    assert_eq!((depth.ready, depth.scheduled), (0, 0));
}

pub(crate) async fn a_purge_keeps_the_keys(stage: Stage) {
    let queue = stage.queue("letters").await;
    let key = pumphouse::model::Idempotency::new("test", "k", [1; 32]);
    let keyed = NewMessage { keys: vec![key], ..message(&queue, "once") };
    let receipt = stage.send(keyed.clone()).await;
    assert_eq!(stage.store.purge(&queue, ALL).await.unwrap(), 1);
    let again = NewMessage { id: MessageId::new(), ..keyed };
    let known = pumphouse::store::Enqueued::Duplicate(receipt);
    assert_eq!(stage.offer(again).await, known);
}

async fn amend(stage: &Stage, id: MessageId, amendment: Amendment) -> pumphouse::model::Record {
    match stage.store.amend(id, amendment).await.unwrap() {
        Amended::Done(record) => record,
        other => panic!("not amended: {other:?}"),
    }
}

async fn dead_letters(stage: &Stage, queue: &QueueName, bodies: &[&str]) -> Vec<MessageId> {
    let sent =
        |body: &&str| NewMessage { kind: Some(format!("of {body}")), ..message(queue, body) };
    let messages = bodies.iter().map(sent).collect::<Vec<_>>();
    let ids = messages.iter().map(|message| message.id).collect();
    stage.send_all(messages).await;
    for leased in stage.claim(queue, bodies.len()).await {
        stage.must_settle(&leased, dead_letter("a test")).await;
    }
    ids
}
