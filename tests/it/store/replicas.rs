//! What holds for several replicas' stores on one Postgres database.

use std::collections::HashSet;
use std::time::Duration;

use pumphouse::model::{
    Details, Idempotency, NewMessage, QueueName, QueueSettings, ReplicaName, Settlement, State,
    When,
};
use pumphouse::store::{
    Attendance, Attended, Chores, Claim, EnqueueOutcome, Enqueued, Precondition, Settled, Want,
};
use sqlx::{Connection, PgConnection};

use crate::support::postgres::fresh_database;
use crate::support::stage::{
    ALL, LONG, SHORT, Stage, claim, dead_letter, message, message_in, together,
};
use crate::support::stores::on_postgres;
use crate::support::{eventually, heard};

/// Two replicas' stores on one database.
async fn two() -> (Stage, Stage) {
    let url = fresh_database().await;
    (on_postgres(&url).await, on_postgres(&url).await)
}

fn replica(name: &str) -> ReplicaName {
    ReplicaName::parse(name).expect("a good name")
}

fn attendance(name: &str, incarnation: i64, wants: &[(&QueueName, u32, u32)]) -> Attendance {
    let want = |(queue, limit, open): &(&QueueName, u32, u32)| Want {
        queue: (*queue).clone(),
        limit: *limit,
        most: *limit,
        shared: true,
        able: true,
        open: *open,
        strays: 0,
    };
    Attendance {
        replica: replica(name),
        incarnation,
        good_for: LONG,
        wants: wants.iter().map(want).collect(),
        leaving: false,
    }
}

async fn attend(stage: &Stage, attendance: Attendance) -> Attended {
    stage.store.attend(attendance).await.unwrap()
}

fn claim_by(name: &str, queue: &QueueName) -> Claim {
    Claim { replica: replica(name), ..claim(queue, 1, LONG) }
}

/// Of messages that take turns a claim takes those of the highest priority. What if another replica is just taking all
/// of them?
#[tokio::test]
async fn what_another_replica_has_in_hand_hides_nothing_that_takes_turns() {
    let url = fresh_database().await;
    let stage = on_postgres(&url).await;
    let queue = stage.queue("letters").await;
    let of = |key: &str| Details { fairness_key: Some(key.to_owned()), ..Details::default() };
    for key in ["a", "a", "b"] {
        stage.send(NewMessage { details: of(key), ..message(&queue, key) }).await;
    }
    assert_eq!(stage.claim(&queue, 1).await.len(), 1, "from here on it knows that they take turns");
    let first = NewMessage { priority: 5, details: of("b"), ..message(&queue, "first") };
    stage.send(first).await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    let take = "begin; select from pumphouse.ready where rank = -5 for update";
    sqlx::raw_sql(take).execute(&mut other).await.unwrap();
    let leased = stage.claim(&queue, 5).await;
    assert_eq!(leased.len(), 2);
    assert!(leased.iter().all(|leased| leased.message.head.priority == 0));
    sqlx::raw_sql("rollback").execute(&mut other).await.unwrap();
    assert_eq!(stage.claim(&queue, 5).await.len(), 1);
}

#[tokio::test]
async fn what_one_replica_takes_in_another_delivers_once() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    let bodies = (0..200).map(|n| message(&queue, &n.to_string())).collect();
    one.send_all(bodies).await;
    let mut leased = Vec::new();
    while leased.len() < 200 {
        let here = one.store.lease(claim(&queue, 7, LONG));
        let there = other.store.lease(claim(&queue, 7, LONG));
        let (here, there) = tokio::join!(here, there);
        leased.extend(here.unwrap());
        leased.extend(there.unwrap());
    }
    let ids = leased.iter().map(|leased| leased.lease.id).collect::<HashSet<_>>();
    assert_eq!((ids.len(), leased.len()), (200, 200));
    for leased in &leased {
        other.must_settle(leased, Settlement::Ack).await;
    }
    assert_eq!(one.depth(&queue).await.leased, 0);
}

#[tokio::test]
async fn news_reach_the_other_replica() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    let mut messages = other.store.news().of_queue(&queue);
    let mut settings = other.store.news().of_settings();
    // A listener that has just connected says once that anything may have happened.
    eventually("the other replica listens", async || {
        one.store.set_ceiling(7).await.unwrap();
        settings.has_changed().unwrap()
    })
    .await;
    messages.mark_unchanged();
    // Until the listener is sure to be there, a hint may be lost, as any hint may.
    eventually("the news arrive", async || {
        one.send(message(&queue, "hello")).await;
        messages.has_changed().unwrap()
    })
    .await;
    heard(&mut settings).await;
}

#[tokio::test]
async fn one_request_sent_to_two_replicas_at_once_is_one_message() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    for round in 0..50 {
        let key = Idempotency::new("test", &round.to_string(), [7; 32]);
        let send = || NewMessage { keys: vec![key], ..message(&queue, "once") };
        let (here, there) = tokio::join!(one.offer(send()), other.offer(send()));
        let answers = [here, there];
        let new = answers.iter().filter(|answer| matches!(answer, Enqueued::New(_))).count();
        assert_eq!(new, 1, "{answers:?}");
        let receipts = answers.map(|answer| match answer {
            Enqueued::New(receipt) | Enqueued::Duplicate(receipt) => receipt,
            other => panic!("{other:?}"),
        });
        assert_eq!(receipts[0], receipts[1]);
    }
    assert_eq!(one.depth(&queue).await.ready, 50);
}

#[tokio::test]
async fn a_limit_on_messages_holds_over_replicas() {
    let (one, other) = two().await;
    let queue = one.queue_with("letters", |settings| settings.max_messages = Some(25)).await;
    let mut taken = 0;
    for _ in 0..20 {
        let send = |stage: &Stage| {
            let messages = vec![message(&queue, "a"), message(&queue, "b")];
            let store = stage.store.clone();
            async move { store.enqueue(together(messages)).await.unwrap() }
        };
        let (here, there) = tokio::join!(send(&one), send(&other));
        for outcome in [here, there] {
            let EnqueueOutcome::Done(answers) = outcome else { panic!("{outcome:?}") };
            taken += answers.iter().filter(|it| matches!(it, Enqueued::New(_))).count();
        }
    }
    assert_eq!((taken, one.depth(&queue).await.ready), (25, 25));
}

#[tokio::test]
async fn shares_sum_up_to_the_limit_and_never_to_more() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    let alone = attend(&one, attendance("a", 1, &[(&queue, 5, 0)])).await;
    assert_eq!(alone.shares, [5]);
    // It has all five open, so that nothing is left for who comes second.
    attend(&one, attendance("a", 1, &[(&queue, 5, 5)])).await;
    let second = attend(&other, attendance("b", 2, &[(&queue, 5, 0)])).await;
    assert_eq!((second.shares, second.replicas.len()), (vec![0], 2));
    let gives_up = attend(&one, attendance("a", 1, &[(&queue, 5, 4)])).await;
    assert_eq!(gives_up.shares, [3]);
    let second = attend(&other, attendance("b", 2, &[(&queue, 5, 0)])).await;
    assert_eq!(second.shares, [1]);
    attend(&one, attendance("a", 1, &[(&queue, 5, 3)])).await;
    let second = attend(&other, attendance("b", 2, &[(&queue, 5, 1)])).await;
    assert_eq!(second.shares, [2]);
    let leaving = Attendance { leaving: true, ..attendance("a", 1, &[(&queue, 5, 0)]) };
    assert_eq!(attend(&one, leaving).await.shares, [0]);
    let alone = attend(&other, attendance("b", 2, &[(&queue, 5, 2)])).await;
    assert_eq!((alone.shares, alone.replicas), (vec![5], vec![replica("b")]));
}

#[tokio::test]
async fn who_cannot_deliver_leaves_its_part_to_the_others_and_what_it_has_open_counts() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    let unable = |open, strays| {
        let mut attendance = attendance("a", 1, &[(&queue, 1, open)]);
        let want = Want { able: false, most: 5, strays, ..attendance.wants[0].clone() };
        attendance.wants = vec![want];
        attendance
    };
    assert_eq!(attend(&one, unable(0, 0)).await.shares, [0]);
    // The first by name would have the only one.
    let few = attend(&other, attendance("b", 2, &[(&queue, 1, 0)])).await;
    assert_eq!(few.shares, [1]);
    attend(&one, unable(0, 4)).await;
    let all = attend(&other, attendance("b", 2, &[(&queue, 5, 1)])).await;
    assert_eq!(all.shares, [1], "with four that are open from before, one is left of five");
}

#[tokio::test]
async fn the_share_of_a_replica_that_died_is_free() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    let short = Attendance { good_for: SHORT, ..attendance("a", 1, &[(&queue, 4, 4)]) };
    assert_eq!(attend(&one, short).await.shares, [4]);
    one.pass(SHORT).await;
    let alone = attend(&other, attendance("b", 2, &[(&queue, 4, 0)])).await;
    assert_eq!((alone.shares, alone.replicas), (vec![4], vec![replica("b")]));
}

#[tokio::test]
async fn the_leases_of_a_replica_that_died_come_back_and_count_a_crash() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    let id = one.send_to(&queue, "carried").await;
    attend(&other, attendance("b", 2, &[])).await;
    let short = Attendance { good_for: SHORT, ..attendance("a", 1, &[]) };
    attend(&one, short).await;
    let mut leased = one.store.lease(claim_by("a", &queue)).await.unwrap();
    let lost = leased.pop().expect("one is ready");
    one.pass(SHORT).await;
    let attended = attend(&other, attendance("b", 2, &[])).await;
    assert_eq!(attended.reaped.len(), 1);
    assert_eq!((attended.reaped[0].id, attended.reaped[0].state), (id, State::Ready));
    assert_eq!(other.record(id).await.tries.crashes, 1);
    assert_eq!(one.settle(&lost, Settlement::Ack).await, Settled::LeaseLost);
    let again = other.store.lease(claim_by("b", &queue)).await.unwrap();
    assert_eq!(again[0].tries.attempts, 2);
    assert_eq!(attend(&other, attendance("b", 2, &[])).await.reaped, []);
}

#[tokio::test]
async fn a_replica_that_starts_again_takes_back_its_own_leases_at_once() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    let (mine, theirs) = (one.send_to(&queue, "mine").await, one.send_to(&queue, "theirs").await);
    attend(&one, attendance("a", 1, &[])).await;
    one.store.lease(claim_by("a", &queue)).await.unwrap();
    attend(&other, attendance("b", 2, &[])).await;
    other.store.lease(claim_by("b", &queue)).await.unwrap();
    let attended = attend(&one, attendance("a", 3, &[])).await;
    let reaped = attended.reaped.iter().map(|reaped| reaped.id).collect::<Vec<_>>();
    assert_eq!(reaped, [mine]);
    assert_eq!(one.state(theirs).await, Some(State::Leased));
}

/// Longer than it takes to tidy up.
const SOON: Duration = Duration::from_secs(1);

/// A report is one statement where nothing has changed, and sees all the same what there is to do and who else is there.
#[tokio::test]
async fn a_quiet_report_sees_what_is_to_do() {
    let (one, other) = two().await;
    let queue = one.queue("letters").await;
    let report = async || attend(&one, attendance("a", 1, &[(&queue, 4, 0)])).await;
    let chores = async || report().await.chores;
    let tidy = async || while one.store.sweep(ALL).await.unwrap().more {};
    let nothing = Chores { due: false, lost: false, past: false };
    let past = async |what: &str| {
        // What has only to be folded is no proof.
        tidy().await;
        one.pass(SOON).await;
        assert_eq!(chores().await, Chores { past: true, ..nothing }, "{what}");
        tidy().await;
        assert_eq!(chores().await, nothing, "{what}");
    };
    report().await;
    tidy().await;
    assert_eq!(chores().await, nothing);
    // Each of them is seen as long as it is left undone, and no longer.
    one.send(message_in(&queue, "later", SHORT)).await;
    tidy().await;
    one.pass(SHORT).await;
    assert_eq!(chores().await, Chores { due: true, ..nothing });
    one.store.promote(ALL).await.unwrap();
    tidy().await;
    assert_eq!(chores().await, nothing);
    one.claim_for(&queue, SHORT).await;
    tidy().await;
    one.pass(SHORT).await;
    assert_eq!(chores().await, Chores { lost: true, ..nothing });
    one.store.reap(ALL).await.unwrap();
    let soon = NewMessage { expires: Some(When::In(SOON)), ..message(&queue, "short-lived") };
    one.send(soon).await;
    past("what is ready expires").await;
    // Behind another one, and in the schedule.
    let in_group = |body| NewMessage {
        details: Details { group: Some("g".to_owned()), ..Details::default() },
        ..message(&queue, body)
    };
    one.send(in_group("first")).await;
    one.send(NewMessage { expires: Some(When::In(SOON)), ..in_group("second") }).await;
    past("what waits behind another expires").await;
    let later = message_in(&queue, "later", LONG);
    one.send(NewMessage { expires: Some(When::In(SOON)), ..later }).await;
    past("what is scheduled expires").await;
    let key = Idempotency::new("test", "key", [7; 32]);
    let short = one.queue_with("short", |settings| settings.dedup_window = SOON).await;
    one.send(NewMessage { keys: vec![key], ..message(&short, "keyed") }).await;
    let held = one.claim_one(&short).await;
    one.must_settle(&held, Settlement::Ack).await;
    past("a key is past its window").await;
    let short = |settings: &mut QueueSettings| {
        settings.retention.completed = SOON;
        settings.retention.dead = SOON;
    };
    let short = one.queue_with("forgetful", short).await;
    for settlement in [Settlement::Ack, dead_letter("a test")] {
        one.send_to(&short, "x").await;
        let held = one.claim_one(&short).await;
        one.must_settle(&held, settlement).await;
        past("what has ended is past its retention").await;
    }
    one.store.delete_queue(&short, false, Precondition::None).await.unwrap();
    assert!(chores().await.past, "what is left of a queue that was deleted");
    tidy().await;
    // The others are seen come, change and go.
    assert_eq!(report().await.shares, [4]);
    let theirs = |open| attendance("b", 2, &[(&queue, 4, open)]);
    assert_eq!(attend(&other, theirs(0)).await.shares, [0]);
    assert_eq!(report().await.shares, [2]);
    assert_eq!(attend(&other, theirs(0)).await.shares, [2]);
    let unable = Want { able: false, ..theirs(0).wants.remove(0) };
    attend(&other, Attendance { wants: vec![unable], ..theirs(0) }).await;
    assert_eq!(report().await.shares, [4], "what another cannot use is free");
    attend(&other, Attendance { good_for: SHORT, ..theirs(0) }).await;
    one.pass(SHORT).await;
    assert_eq!(report().await.replicas, [replica("a")]);
    let revision = report().await.revision;
    one.store.set_ceiling(7).await.unwrap();
    assert!(report().await.revision > revision);
}
