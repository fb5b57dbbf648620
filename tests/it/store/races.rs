//! Groups in a crowd: claims that cross each other, leases that run out, handlers that come back too late, on two
//! replicas. Does anything get out of order, twice, stuck?
//!
//! What it is for is told in `store/postgres/groups.rs`: without the lock on what is claimed, groups are won for messages
//! that were just handled, and stand still; without the mark on the head, tokens are dropped that nobody leaves again.
//! Either was tried, and `no_group_stands_still_where_claims_cross` failed each time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pumphouse::model::{Details, Leased, MessageId, NewMessage, QueueName, Settlement, State};
use pumphouse::store::{Filter, Settled};
use sqlx::{Connection, PgConnection};
use tokio_util::task::TaskTracker;

use crate::support::chance::mix;
use crate::support::postgres::fresh_database;
use crate::support::stage::{ALL, Stage, claim, message, of_queue, queue_name};
use crate::support::stores::{on_postgres, sqlite_on_a_real_clock};
use crate::support::{eventually_within, pass, say};

const PRODUCERS: u64 = 2;
const WORKERS: u64 = 4;
const SENT_EACH: u64 = 1_200;
const GROUPS: u64 = 10;
/// How long a lease lasts: so short that some run out.
const LEASE: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_keep_their_order_in_a_crowd_on_postgres() {
    let url = fresh_database().await;
    let stages = [on_postgres(&url).await, on_postgres(&url).await];
    crowd(stages.into()).await;
    // A token may be left for a group in which nobody waits any more.
    let stage = on_postgres(&url).await;
    assert_eq!(stage.claim(&queue_name("crowd"), ALL).await.len(), 0);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    for table in ["ready", "behind", "head", "lease", "scheduled"] {
        let count = format!(
            "select count(*) from pumphouse.{table} where queue_id = (select id from pumphouse.queue where name = 'crowd')"
        );
        let count = sqlx::query_scalar::<_, i64>(sqlx::AssertSqlSafe(count));
        assert_eq!(count.fetch_one(&mut connection).await.unwrap(), 0, "{table} is empty");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_keep_their_order_in_a_crowd_on_sqlite() {
    crowd(vec![sqlite_on_a_real_clock().await]).await;
}

/// Nobody is slow and nothing fails, but everybody claims much at once, and messages come just when their group is freed:
/// does any group stand still?
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_group_stands_still_where_claims_cross() {
    let url = fresh_database().await;
    let stages = Arc::new([on_postgres(&url).await, on_postgres(&url).await]);
    let queue = stages[0].queue("crowd").await;
    let producers = TaskTracker::new();
    for number in 0..HURRIED {
        let (stages, queue) = (stages.clone(), queue.clone());
        producers.spawn(async move {
            for n in 0..PAIRS {
                let chance = mix(number * PAIRS + n);
                let group = match chance % 3 {
                    0 => format!("hot {}", chance / 3 % 4),
                    _ => format!("pair {number} {n}"),
                };
                for wait in [0, chance / 100 % 8_000] {
                    pass(Duration::from_micros(wait)).await;
                    let details = Details { group: Some(group.clone()), ..Details::default() };
                    let stage = &stages[number as usize % 2];
                    stage.send(NewMessage { details, ..message(&queue, "x") }).await;
                }
            }
        });
    }
    let (workers, no_more) = (TaskTracker::new(), Arc::new(AtomicBool::new(false)));
    for number in 0..HURRIED {
        let (stages, queue, no_more) = (stages.clone(), queue.clone(), no_more.clone());
        workers.spawn(async move {
            let stage = &stages[number as usize % 2];
            while !no_more.load(Ordering::Relaxed) {
                let leased = stage.claim(&queue, 20).await;
                if leased.is_empty() {
                    pass(Duration::from_millis(1)).await;
                }
                let settle =
                    |leased| async move { stage.must_settle(&leased, Settlement::Ack).await };
                futures::future::join_all(leased.into_iter().map(settle)).await;
            }
        });
    }
    producers.close();
    producers.wait().await;
    let done = async || stages[0].depth(&queue).await.ready == 0;
    eventually_within("no group stands still", Duration::from_secs(30), done).await;
    no_more.store(true, Ordering::Relaxed);
    workers.close();
    workers.wait().await;
    let all = stages[0].list(&of_queue(&queue), ALL).await;
    assert_eq!(all.len() as u64, HURRIED * PAIRS * 2);
    assert!(all.iter().all(|record| record.tries.attempts == 1), "each was out once");
}

/// How many send, and how many claim; and how many pairs of messages each sends.
const HURRIED: u64 = 8;
const PAIRS: u64 = 400;

/// What the crowd has seen.
#[derive(Default)]
struct Seen {
    /// The message of each group that somebody holds, or held when it was lost.
    out: Mutex<HashMap<String, MessageId>>,
    overlaps: AtomicUsize,
    followers: AtomicUsize,
    late: AtomicUsize,
    late_ones_sent: AtomicUsize,
    no_more: AtomicBool,
}

async fn crowd(stages: Vec<Stage>) {
    let stages = Arc::new(stages);
    let queue = stages[0].queue_with("crowd", |it| it.recovery.max_crashes = 1_000_000).await;
    let follow = stages[0].queue("follow").await;
    let seen = Arc::new(Seen::default());
    let (producers, workers) = (TaskTracker::new(), TaskTracker::new());
    for number in 0..PRODUCERS {
        let (stages, queue) = (stages.clone(), queue.clone());
        producers.spawn(async move { produce(&stages, &queue, number).await });
    }
    for number in 0..WORKERS {
        let (stages, seen) = (stages.clone(), seen.clone());
        let queues = (queue.clone(), follow.clone());
        workers.spawn(async move { work(&stages, &seen, &queues.0, &queues.1, number).await });
    }
    let keeper = {
        let (stages, seen) = (stages.clone(), seen.clone());
        workers.spawn(async move {
            while !seen.no_more.load(Ordering::Relaxed) {
                stages[0].store.reap(ALL).await.unwrap();
                stages[0].store.promote(ALL).await.unwrap();
                pass(Duration::from_millis(20)).await;
            }
        })
    };
    producers.close();
    producers.wait().await;
    let done = async || {
        let depth = stages[0].depth(&queue).await;
        depth.ready + depth.scheduled + depth.leased == 0
    };
    eventually_within("nothing is left", Duration::from_secs(90), done).await;
    seen.no_more.store(true, Ordering::Relaxed);
    workers.close();
    workers.wait().await;
    keeper.await.unwrap();

    let all = stages[0].list(&of_queue(&queue), ALL).await;
    assert_eq!(all.len() as u64, PRODUCERS * SENT_EACH);
    assert!(all.iter().all(|record| record.state == State::Completed));
    assert_eq!(seen.overlaps.load(Ordering::Relaxed), 0, "two messages of a group were out");
    let mut ended = all.iter().map(|record| (record.finished_at, record)).collect::<Vec<_>>();
    ended.sort_by_key(|(at, _)| *at);
    let mut last = HashMap::new();
    for (_, record) in ended {
        let (Some(group), Some(place)) = (&record.head.details.group, &record.head.kind) else {
            continue;
        };
        let (producer, n) = place.split_once('-').expect("a producer and a number");
        let n = n.parse::<u64>().expect("a number");
        let before = last.insert((group, producer), n).unwrap_or(0);
        assert!(before <= n, "out of order in {group}: {n} after {before}");
    }
    let followers = stages[0].list(&of_queue(&follow), ALL).await.len();
    assert_eq!(followers, seen.followers.load(Ordering::Relaxed), "each once");
    assert_eq!(
        seen.late_ones_sent.load(Ordering::Relaxed),
        0,
        "a lease that was lost sends nothing"
    );
    say!(
        "{} messages, {} came too late, {followers} followed",
        all.len(),
        seen.late.load(Ordering::Relaxed)
    );
    let dead = Filter { state: Some(State::Dead), ..Filter::default() };
    assert_eq!(stages[0].list(&dead, ALL).await, []);
}

async fn produce(stages: &[Stage], queue: &QueueName, number: u64) {
    let stage = &stages[number as usize % stages.len()];
    for n in 0..SENT_EACH {
        let chance = mix(number * SENT_EACH + n);
        let group = (!chance.is_multiple_of(5)).then(|| format!("group {}", chance / 7 % GROUPS));
        let details = Details { group, ..Details::default() };
        let kind = Some(format!("{number}-{n}"));
        stage.send(NewMessage { details, kind, ..message(queue, "x") }).await;
    }
}

async fn work(
    stages: &[Stage],
    seen: &Arc<Seen>,
    queue: &QueueName,
    follow: &QueueName,
    number: u64,
) {
    let stage = &stages[number as usize % stages.len()];
    let mut chance = mix(number + 1);
    while !seen.no_more.load(Ordering::Relaxed) {
        let leased = stage.store.lease(claim(queue, 5, LEASE)).await.unwrap();
        if leased.is_empty() {
            pass(Duration::from_millis(5)).await;
        }
        // All are out from now on, before any is handled.
        leased.iter().for_each(|leased| seen.takes(leased));
        for leased in leased {
            chance = mix(chance);
            handle(stage, seen, follow, leased, chance).await;
        }
    }
}

impl Seen {
    /// A message of a group is out; whoever was out before must have been this one.
    fn takes(&self, leased: &Leased) {
        let Some(group) = leased.message.head.details.group.clone() else { return };
        let mut out = self.out.lock().expect("nobody panics with it");
        let other = out.insert(group, leased.lease.id);
        // Whoever hears of its lease when that is over, hears of nothing that counts.
        let in_time = Instant::now() < leased.lease.until;
        if in_time && other.is_some_and(|other| other != leased.lease.id) {
            self.overlaps.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// It is about to be done, so that the next one may come.
    fn lets_go(&self, leased: &Leased) {
        let Some(group) = &leased.message.head.details.group else { return };
        let mut out = self.out.lock().expect("nobody panics with it");
        if out.get(group) == Some(&leased.lease.id) {
            out.remove(group);
        }
    }
}

async fn handle(stage: &Stage, seen: &Seen, follow: &QueueName, leased: Leased, chance: u64) {
    let follower = || vec![message(follow, "x")];
    match chance % 20 {
        // Its handler is gone, and nobody says so.
        0 => (),
        // Its handler is slower than its lease, and does not know.
        1 => {
            pass(LEASE + Duration::from_millis(100)).await;
            seen.late.fetch_add(1, Ordering::Relaxed);
            let settled = stage.settle_and_send(&leased, Settlement::Ack, follower()).await;
            if settled != Settled::LeaseLost {
                seen.late_ones_sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        2..=5 => {
            let after = Duration::from_millis(chance / 20 % 30);
            stage.settle(&leased, Settlement::Retry { after }).await;
        }
        other => {
            let sent = if other < 10 { follower() } else { Vec::new() };
            let count = sent.len();
            seen.lets_go(&leased);
            let settled = stage.settle_and_send(&leased, Settlement::Ack, sent).await;
            if settled != Settled::LeaseLost {
                seen.followers.fetch_add(count, Ordering::Relaxed);
            }
        }
    }
}
