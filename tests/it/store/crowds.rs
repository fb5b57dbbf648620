//! Promises that must hold while many do many things at the same time, and after whatever was done.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use pumphouse::model::{Leased, MessageId, QueueName, Settlement, State};
use pumphouse::store::{Settled, Store};
use tokio::sync::Barrier;
use tokio::task::JoinSet;

use super::program::program;
use super::props::play_alone;
use crate::support::eventually;
use crate::support::stage::{
    ALL, LONG, SHORT, Stage, claim, message, of_queue, retry_at_once, settle, together,
};

const MESSAGES: usize = 120;
const WORKERS: usize = 6;

/// What a worker did: each attempt that it was given, and each ack that was written.
#[derive(Default)]
struct Diary {
    attempts: Vec<(MessageId, u32)>,
    acked: Vec<MessageId>,
}

pub(crate) async fn in_a_crowd_each_message_is_acked_once(stage: Stage) {
    let queue = stage.queue_with("crowd", |s| s.recovery.max_crashes = 1000).await;
    let names = (0..MESSAGES).map(|number| number.to_string()).collect::<Vec<_>>();
    stage.send_all(names.iter().map(|name| message(&queue, name)).collect()).await;
    let start = Arc::new(Barrier::new(WORKERS));
    let mut workers = JoinSet::new();
    for number in 0..WORKERS {
        let (store, start, queue) = (stage.store.clone(), start.clone(), queue.clone());
        workers.spawn(async move {
            start.wait().await;
            work(store.as_ref(), &queue, number).await
        });
    }
    let mut diaries = Vec::new();
    while let Some(diary) = workers.join_next().await {
        diaries.push(diary.expect("a worker does not panic"));
    }
    diaries.push(finish(&stage, &queue).await);
    let attempts = diaries.iter().flat_map(|diary| &diary.attempts).collect::<Vec<_>>();
    assert_eq!(attempts.iter().collect::<HashSet<_>>().len(), attempts.len(), "no number twice");
    let mut acks = HashMap::<_, usize>::new();
    diaries.iter().flat_map(|diary| &diary.acked).for_each(|id| *acks.entry(*id).or_default() += 1);
    assert_eq!(acks.len(), MESSAGES, "every message is acked");
    assert!(acks.values().all(|times| *times == 1), "and once: {acks:?}");
    let mut last = BTreeMap::<MessageId, u32>::new();
    for (id, number) in attempts {
        let latest = last.entry(*id).or_default();
        *latest = (*latest).max(*number);
    }
    for record in stage.list(&of_queue(&queue), 50).await {
        assert_eq!(record.state, State::Completed);
        assert_eq!(
            Some(&record.tries.attempts),
            last.get(&record.head.id),
            "every attempt is known"
        );
    }
}

/// Works a while: acks some, fails some, gives some back, and forgets some for others to take back.
async fn work(store: &dyn Store, queue: &QueueName, number: usize) -> Diary {
    let mut diary = Diary::default();
    for round in number..number + 30 {
        // The shortest leases have run out before anything can be done with them.
        let duration = if round % 5 == 0 { Duration::ZERO } else { LONG };
        let leased = store.lease(claim(queue, 3, duration)).await.unwrap();
        diary.attempts.extend(leased.iter().map(|leased| (leased.lease.id, leased.tries.attempts)));
        for (place, leased) in leased.iter().enumerate() {
            let settlement = match (round + place) % 4 {
                0 => retry_at_once(),
                1 => Settlement::Release,
                _ => Settlement::Ack,
            };
            settle_twice(store, leased, settlement, &mut diary).await;
        }
        store.reap(3).await.unwrap();
        store.promote(3).await.unwrap();
    }
    diary
}

async fn settle_twice(
    store: &dyn Store,
    leased: &Leased,
    settlement: Settlement,
    diary: &mut Diary,
) {
    for _ in 0..2 {
        let settled = store.settle(settle(leased, settlement.clone(), Vec::new())).await.unwrap();
        if matches!(settled, Settled::Done { .. }) && settlement == Settlement::Ack {
            diary.acked.push(leased.lease.id);
        }
    }
}

/// Acks whatever is left.
async fn finish(stage: &Stage, queue: &QueueName) -> Diary {
    let mut diary = Diary::default();
    eventually("nothing is left to be acked", async || {
        stage.pass(Duration::from_millis(1)).await;
        stage.store.reap(ALL).await.unwrap();
        stage.store.promote(ALL).await.unwrap();
        for leased in stage.claim(queue, ALL).await {
            diary.attempts.push((leased.lease.id, leased.tries.attempts));
            settle_twice(stage.store.as_ref(), &leased, Settlement::Ack, &mut diary).await;
        }
        let depth = stage.depth(queue).await;
        depth.ready + depth.scheduled + depth.leased == 0
    })
    .await;
    diary
}

pub(crate) async fn what_comes_and_goes_at_the_same_time_is_counted(stage: Stage) {
    let queue = stage.queue("crowd").await;
    let start = Arc::new(Barrier::new(8));
    let mut crowd = JoinSet::new();
    for number in 0..8 {
        let (store, start, queue) = (stage.store.clone(), start.clone(), queue.clone());
        crowd.spawn(async move {
            start.wait().await;
            for round in 0..15 {
                come_or_go(store.as_ref(), &queue, (number + round) % 4).await;
            }
        });
    }
    while let Some(done) = crowd.join_next().await {
        done.expect("nobody panics");
    }
    stage.pass(SHORT).await;
    let listed = stage.list(&of_queue(&queue), 50).await;
    let count = |state| listed.iter().filter(|record| record.state == state).count() as u64;
    let depth = stage.depth(&queue).await;
    let counted = (depth.ready, depth.scheduled, depth.leased, depth.dead);
    let expected =
        (count(State::Ready), count(State::Scheduled), count(State::Leased), count(State::Dead));
    assert_eq!(counted, expected);
}

async fn come_or_go(store: &dyn Store, queue: &QueueName, what: usize) {
    match what {
        0 | 1 => {
            let messages = (0..4).map(|number| message(queue, &number.to_string())).collect();
            store.enqueue(together(messages)).await.unwrap();
        }
        2 => {
            for leased in store.lease(claim(queue, 3, LONG)).await.unwrap() {
                let settled = settle(&leased, Settlement::Ack, Vec::new());
                store.settle(settled).await.unwrap();
            }
            store.lease(claim(queue, 1, LONG)).await.unwrap();
        }
        _ => {
            store.purge(queue, 2).await.unwrap();
        }
    }
}

pub(crate) async fn after_any_program_depths_are_what_listing_counts(stage: Stage) {
    // Always the same one, so that a store that goes by a real clock has the same work every time.
    let mut runner = TestRunner::deterministic();
    let program = program(150..151).new_tree(&mut runner).expect("a program can be made");
    play_alone(&stage, &program.current()).await;
}
